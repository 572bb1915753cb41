"""A checkpoint that is cut, spoilt, made to harm or killed half-way: refused in a line, or the one before."""

import errno
import gc
import hashlib
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from lunatrain.checkpoint import BEST, LAST, load_checkpoint, load_newest, save_checkpoint
from lunatrain.errors import CheckpointError, LunatrainError
from lunatrain.models import build_model, load_book_state
from lunatrain.segmentation import load_segmenter
from lunatrain.training import load_model

from ..conftest import Figure
from ..fuzz_store import spoil

CROP = (16, 24, 24)


def state_of(epoch: int) -> dict:
    """What a run saves, made small."""
    generator = torch.Generator().manual_seed(epoch)
    model = {"w": torch.randn(40, 30, generator=generator), "n": torch.tensor(epoch)}
    return {
        "model": model, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "progress": {"epoch": epoch, "sums": {"loss": 0.5}, "best_figures": {}}, "config": {"model": "luna"},
        "model_args": {"name": "luna", "num_classes": 2, "crop_shape": list(CROP)}, "store_id": "0123456789abcdef",
    }  # fmt: skip


def signed(body: bytes) -> bytes:
    """A body without its comment's length, with the checksum that a forger can make as well."""
    digest = hashlib.sha256(body).hexdigest().encode()
    return body + len(digest).to_bytes(2, "little") + digest


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as info:
        load_checkpoint(path)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_what_is_flipped_or_cut_anywhere_is_found_before_use(tmp_path: Path, figure: Figure) -> None:
    save_checkpoint(tmp_path / BEST, state_of(1))
    save_checkpoint(tmp_path / LAST, state_of(2))
    good = (tmp_path / LAST).read_bytes()
    draw = random.Random(5)
    for number in range(figure(500, 20_000)):
        new = bytearray(good)
        new[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        (tmp_path / LAST).write_bytes(new)
        assert "damaged" in refusal(tmp_path / LAST)
        if number % 100 == 0:
            assert load_newest(tmp_path).path.name == BEST
    for _ in range(figure(100, 4_000)):
        (tmp_path / LAST).write_bytes(good[: draw.randrange(len(good))])
        assert "damaged" in refusal(tmp_path / LAST)
    assert load_newest(tmp_path).state["progress"]["epoch"] == 1


def test_what_is_spoilt_and_signed_again_is_a_state_or_a_line(tmp_path: Path, figure: Figure) -> None:
    """A pickle that was tampered with can fail in any way, of which users see one."""
    save_checkpoint(tmp_path / LAST, state_of(1))
    body = (tmp_path / LAST).read_bytes()[:-66]
    for number in range(figure(300, 10_000)):
        (tmp_path / LAST).write_bytes(signed(spoil(body, random.Random(number))))
        with suppress(CheckpointError):
            load_checkpoint(tmp_path / LAST)


class Call:
    """Pickled, this is a call."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.what = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.what


def bombs() -> dict[str, Callable[[Path], bytes]]:
    """Files that make the marker when they are unpickled freely."""

    def through_torch(marker: Path) -> bytes:
        inner = pickle.dumps(Call(os.mkdir, str(marker)))
        return saved({"model_state": Call(torch.load, io.BytesIO(inner))})

    def renamed_zip(marker: Path) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Call(os.mkdir, str(marker))))
            archive.writestr("archive/version", "3\n")
        return buffer.getvalue()

    def numpys(marker: Path) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Call(os.mkdir, str(marker))], dtype=object), allow_pickle=True)
        return buffer.getvalue()

    return {
        "plain pickle": lambda marker: pickle.dumps(Call(os.mkdir, str(marker))),
        "torch.save": lambda marker: saved({"model_state": Call(os.mkdir, str(marker))}),
        "nested": lambda marker: saved({"model_state": {"a": [{"b": (1, {"c": Call(os.mkdir, str(marker))})}]}}),
        "exec": lambda marker: saved({"model_state": Call(exec, f"import os; os.mkdir({str(marker)!r})")}),
        "shell": lambda marker: saved({"model_state": Call(os.system, f"mkdir {marker}")}),
        "process": lambda marker: saved({"model_state": Call(subprocess.call, ["mkdir", str(marker)])}),
        "old format": lambda marker: saved([Call(os.mkdir, str(marker))], _use_new_zipfile_serialization=False),
        "torch in torch": through_torch,
        "renamed zip": renamed_zip,
        "numpy": numpys,
    }


@pytest.mark.parametrize("name", bombs())
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "exploded"
    body = bombs()[name](marker)
    files = {"plain.pt": body, "signed.pt": signed(body.removesuffix(b"\0\0")), "book.state": body}
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
        for load in (
            load_checkpoint,
            load_segmenter,
            lambda path: load_model(path, CROP),
            lambda path: load_book_state(path, build_model("luna", 2, CROP)),
        ):
            with pytest.raises(LunatrainError) as info:
                load(tmp_path / file)
            assert "\n" not in str(info.value)
    (tmp_path / LAST).write_bytes(files["signed.pt"])
    with pytest.raises(CheckpointError):
        load_newest(tmp_path)
    assert not marker.exists()


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    for name, make in bombs().items():
        if name in ("numpy", "renamed zip", "torch in torch"):
            continue
        data = make(tmp_path / name.replace(" ", "-"))
        unpack = pickle.loads if name == "plain pickle" else lambda raw: torch.load(io.BytesIO(raw), weights_only=False)
        unpack(data)
        assert (tmp_path / name.replace(" ", "-")).is_dir(), name


# Killed while it saves


def in_a_child(task: Callable[[], object], *, traced: list[str] | None = None, log: Path | None = None) -> int:
    """Run in a fork, under strace if told so; return its exit code, or minus the signal that ended it."""
    go_read, go_write = os.pipe()
    gc.collect()  # here, and never in the child: what it closes there would be counted with the task's own calls
    pid = os.fork()
    if pid == 0:
        gc.disable()
        code = 1
        try:
            signal.alarm(60)
            os.read(go_read, 1)
            task()
            code = 0
        except OSError as error:
            code = error.errno if str(error.filename).endswith(LAST) else 1
        finally:
            os._exit(code)
    tracer = None
    if traced is not None:
        command = ["strace", "-o", str(log or os.devnull), *traced, "-p", str(pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
    os.write(go_write, b".")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(go_read)
    os.close(go_write)
    if tracer is not None:
        tracer.communicate()
        if "attached" not in said:
            pytest.skip(f"strace cannot attach here: {said.strip()}")
    return code


CALLS = "openat,write,fsync,rename,unlink,close,ftruncate,lseek,fstat,newfstatat,mkdir"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint of epoch 1."""
    save_checkpoint(tmp_path / "run" / LAST, state_of(1))
    return tmp_path / "run"


def calls_of_a_save(run: Path, tmp_path: Path) -> list[tuple[str, int]]:
    """Each system call of a save, as (name, how many-th of its name)."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "log"
    aside = shutil.copytree(run, tmp_path / "aside")
    assert in_a_child(lambda: save_checkpoint(aside / LAST, state_of(2)), traced=["-e", f"trace={CALLS}"], log=log) == 0
    counts: dict[str, int] = {}
    found = []
    for name in re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE):
        counts[name] = counts.get(name, 0) + 1
        found.append((name, counts[name]))
    return found


def assert_whole_and_goes_on(run: Path, before: bytes, after: bytes) -> None:
    assert (run / LAST).read_bytes() in (before, after)
    assert load_newest(run).state["progress"]["epoch"] in (1, 2)
    save_checkpoint(run / LAST, state_of(3))
    assert load_newest(run).state["progress"]["epoch"] == 3
    assert [path.name for path in run.iterdir()] == [LAST]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork with threads: the child uses none of them
def test_killed_at_any_system_call_of_a_save(run: Path, tmp_path: Path) -> None:
    calls = calls_of_a_save(run, tmp_path)
    assert {"write", "fsync", "rename"} <= {name for name, _ in calls}
    before = (run / LAST).read_bytes()
    save_checkpoint(tmp_path / "other.pt", state_of(2))
    after = (tmp_path / "other.pt").read_bytes()
    outcomes = set()
    for name, nth in calls:
        (run / LAST).write_bytes(before)
        kill = ["-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={nth}"]
        code = in_a_child(lambda: save_checkpoint(run / LAST, state_of(2)), traced=kill)
        assert code == -signal.SIGKILL, (name, nth)
        outcomes.add((run / LAST).read_bytes() == after)
        assert_whole_and_goes_on(run, before, after)
    assert outcomes == {False, True}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_call_of_a_save_that_fails_keeps_the_one_before(run: Path, tmp_path: Path, fault: int) -> None:
    before = (run / LAST).read_bytes()
    for name, nth in calls_of_a_save(run, tmp_path):
        if name in ("write", "fsync", "rename"):
            fail = ["-e", f"trace={name}", "-e", f"inject={name}:error={errno.errorcode[fault]}:when={nth}"]
            code = in_a_child(lambda: save_checkpoint(run / LAST, state_of(2)), traced=fail)
            assert code == fault, (name, nth)
            assert (run / LAST).read_bytes() == before
            assert [path.name for path in run.iterdir()] == [LAST]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_disk_that_is_full_at_any_byte_keeps_the_one_before(run: Path, share: float) -> None:
    before = (run / LAST).read_bytes()

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = int(share * len(before))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        save_checkpoint(run / LAST, state_of(2))

    assert in_a_child(save) == errno.EFBIG
    assert (run / LAST).read_bytes() == before
    assert [path.name for path in run.iterdir()] == [LAST]


def test_leftovers_of_a_killed_save_are_no_obstacle(run: Path) -> None:
    (run / f"{LAST}.partial").write_bytes(b"half")
    save_checkpoint(run / LAST, state_of(2))
    assert [path.name for path in run.iterdir()] == [LAST]
