"""A Dask cluster builds the store that one process builds, whatever becomes of its workers."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import lunaprep
from lunaprep.build import BuildOptions
from lunaprep.cluster import Shared, _check_workers, library_versions, run_on_cluster
from lunaprep.errors import LunaprepError, UsageError
from lunaprep.shard_work import ShardTask

from .conftest import Run, files_of

# a scan whose name is a file in the folder ORDERS kills the process that reads it: always, or once if the file says so
KILLER = """
import os, signal, pathlib
import lunaprep.scan_pass as work
inner = work.iter_slabs
def iter_slabs(scan, *rest):
    order = pathlib.Path(os.environ["ORDERS"], scan.series_uid)
    if order.exists():
        if order.read_text() == "once":
            order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(scan, *rest)
work.iter_slabs = iter_slabs
"""


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A scheduler and two workers on loopback: the file that names the scheduler, and the folder of orders."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "orders").mkdir()
    (folder / "sitecustomize.py").write_text(KILLER)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "ORDERS": str(folder / "orders"),
        "TZ": "Asia/Tokyo",
        "PYTHONHASHSEED": "5",
    }
    names = ["--scheduler-file", "scheduler.json"]
    here = ["--host", "127.0.0.1", "--no-dashboard"]
    commands = [
        ["scheduler", *here, "--port", "0", *names],
        ["worker", *here, *names, "--nworkers", "2", "--nthreads", "1", "--local-directory", str(folder)],
    ]
    started = []
    for command in commands:
        full = [sys.executable, "-m", "dask", *command]
        started.append(subprocess.Popen(full, cwd=folder, env=env, stderr=subprocess.DEVNULL))
        wait_for((folder / "scheduler.json").exists)
    yield str(folder / "scheduler.json"), folder / "orders"
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def on_cluster(cluster: tuple[str, Path], data: Path, out: object = "s") -> list[object]:
    return ["build", "--data", data, "--out", out, "--shard-size", "1", "--backend", "dask", "--scheduler", cluster[0]]


def test_two_workers_build_the_same_store(
    cluster: tuple[str, Path], phantom_root: Path, built_store: Path, tmp_path: Path, run_apart: Run
) -> None:
    data = os.path.relpath(phantom_root, tmp_path)  # the workers have another working folder
    done = run_apart(on_cluster(cluster, Path(data)))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "s") == files_of(built_store)
    assert {path.name for path in (tmp_path / "s/.build").iterdir()} == {"lock", "inputs.json"}


def test_a_worker_that_dies_once_costs_nothing(
    cluster: tuple[str, Path], phantom_root: Path, built_store: Path, tmp_path: Path, run_apart: Run
) -> None:
    order = cluster[1] / next(phantom_root.glob("subset1/*.mhd")).stem
    order.write_text("once")
    done = run_apart(on_cluster(cluster, phantom_root))
    assert done.returncode == 0, done.stderr
    assert not order.exists()
    assert files_of(tmp_path / "s") == files_of(built_store)


def test_a_scan_that_kills_every_worker_costs_only_itself(
    cluster: tuple[str, Path], phantom_root: Path, built_store: Path, tmp_path: Path, run_apart: Run
) -> None:
    order = cluster[1] / next(phantom_root.glob("subset1/*.mhd")).stem
    order.write_text("always")
    done = run_apart(on_cluster(cluster, phantom_root))
    assert done.returncode == 3, done.stderr
    scans = lunaprep.open_store(tmp_path / "s").scans.set_index("series_uid")
    assert "killed its worker twice" in scans["reason"][order.name]
    assert (scans["status"] == "ok").sum() == 5
    order.unlink()
    assert run_apart(on_cluster(cluster, phantom_root)).returncode == 0
    assert files_of(tmp_path / "s") == files_of(built_store)


def test_without_a_scheduler_a_cluster_is_started_here(
    phantom_root: Path, built_store: Path, tmp_path: Path, run_apart: Run
) -> None:
    args = ["build", "--data", phantom_root, "--out", "s", "--shard-size", "1", "--backend", "dask", "--workers", "2"]
    done = run_apart(args)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "s") == files_of(built_store)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("nonsense", r"no Dask scheduler at nonsense \(missing port number"),
        ("none.json", r"none.json names no Dask scheduler \(\[Errno 2\]"),
        ("list.json", r"list.json names no Dask scheduler \(list indices"),
    ],
)
def test_a_scheduler_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    with pytest.raises(LunaprepError, match=message):
        next(run_on_cluster([cast(ShardTask, None)], 1, scheduler))


def test_a_scheduler_that_does_not_answer_is_one_line(phantom_root: Path, tmp_path: Path, run_apart: Run) -> None:
    (tmp_path / "lunaprep_patch").mkdir()
    patch = "import lunaprep.cluster\nlunaprep.cluster.CONNECT_S = 1\n"
    (tmp_path / "lunaprep_patch/sitecustomize.py").write_text(patch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        path = os.pathsep.join(filter(None, [str(tmp_path / "lunaprep_patch"), os.environ.get("PYTHONPATH")]))
        done = run_apart(on_cluster((address, tmp_path), phantom_root), PYTHONPATH=path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"no Dask scheduler at {address}" in done.stderr


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(LunaprepError, match=r"pip install '\.\[dask\]'"):
        next(run_on_cluster([cast(ShardTask, None)], 1, None))


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match=r"--scheduler goes with --backend dask"):
        BuildOptions(Path(), Path(), scheduler="tcp://a:1")
    with pytest.raises(UsageError, match=r"--workers: the scheduler has its own"):
        BuildOptions(Path(), Path(), backend="dask", scheduler="tcp://a:1", workers=2)


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    mark, scan = tmp_path / "store/.build/tmp/x.cluster", tmp_path / "scan.mhd"
    mark.parent.mkdir(parents=True)
    mark.write_text("token")
    scan.touch()
    return Shared(mark, "token", scan, library_versions())


def test_a_worker_must_share_disk_and_versions(shared: Shared, tmp_path: Path) -> None:
    assert shared.fault() is None
    older = replace(shared, versions=tuple((name, "0.1" if name == "isal" else had) for name, had in shared.versions))
    assert "the build has 0.1. Install the same versions" in str(older.fault())
    other = replace(shared, versions=(*shared.versions[:-1], ("processor", "other")))
    assert "the build has other. All workers must have" in str(other.fault())
    assert f"does not see {tmp_path / 'store'}. --out must be on a disk" in str(replace(shared, token="else").fault())
    shared.scan.unlink()
    assert "--data must be on a disk that all workers share" in str(shared.fault())
    shared.mark.unlink()
    assert f"does not see {tmp_path / 'store'}" in str(shared.fault())


def client_of(threads: int, answer: object) -> SimpleNamespace:
    return SimpleNamespace(
        wait_for_workers=lambda *_, **__: None,
        ncores=lambda: {"tcp://w:1": threads},
        run=lambda *_, **__: {"tcp://w:1": answer},
    )


def test_workers_that_will_not_do_are_refused(shared: Shared) -> None:
    _check_workers(client_of(1, None), shared)
    with pytest.raises(LunaprepError, match=r"tcp://w:1 has 8 threads, expected 1. Start it with --nthreads 1"):
        _check_workers(client_of(8, None), shared)
    with pytest.raises(LunaprepError, match=r"tcp://w:1 cannot run lunaprep \(No module named 'lunaprep'\)"):
        _check_workers(client_of(1, ModuleNotFoundError("No module named 'lunaprep'")), shared)
    with pytest.raises(LunaprepError, match=r"tcp://w:1 does not see /x"):
        _check_workers(client_of(1, "does not see /x. Mount it"), shared)


def scripts_of_the_docs() -> dict[str, str]:
    """The scripts in docs/cluster.md by name."""
    text = (Path(__file__).parents[1] / "docs/cluster.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+\.sh)`[^\n]*\n\n((?:    [^\n]*\n|\n)+)", text)
    return {name: re.sub(r"(?m)^    ", "", body) for name, body in found}


def test_the_scripts_of_the_docs_are_bash() -> None:
    scripts = scripts_of_the_docs()
    assert list(scripts) == ["build.sh", "join.sh", "dask.sh", "train.sh"]
    for script in scripts.values():
        assert script.startswith("#!/bin/bash\n#SBATCH ")
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_an_array_of_builds_joined_is_the_store_built_at_once(
    phantom_root: Path, built_store: Path, tmp_path: Path
) -> None:
    """The array of docs/cluster.md, its tasks side by side; one has to be sent twice."""
    more = 'more=; [ "$1" = build ] && more="--shard-size 1"'
    (tmp_path / "lunaprep").write_text(f'#!/bin/bash\n{more}\nexec {sys.executable} -m lunaprep "$@" $more\n')
    (tmp_path / "lunaprep").chmod(0o755)
    for name, script in scripts_of_the_docs().items():
        (tmp_path / name).write_text(script)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": str(phantom_root)}
    env |= {"STORE": str(tmp_path / "s"), "SLURM_CPUS_PER_TASK": "1"}

    def send(script: str, task: int = 0) -> "subprocess.Popen[str]":
        mine = {**env, "SLURM_ARRAY_TASK_ID": str(task)}
        return subprocess.Popen(["bash", script], env=mine, cwd=tmp_path, stdout=subprocess.DEVNULL, text=True)

    tasks = [send("build.sh", task) for task in range(3)]
    wait_for(lambda: list(tmp_path.glob("s.parts/1/.build")))
    tasks[1].kill()
    assert [task.wait(timeout=100) for task in tasks] == [0, -signal.SIGKILL, 0]
    wait_for(lambda: send("build.sh", 1).wait(timeout=100) == 0)  # 75 as long as the one killed still has the lock
    assert send("join.sh").wait(timeout=100) == 0
    assert files_of(tmp_path / "s") == files_of(built_store)
    assert not (tmp_path / "s.parts").exists()
