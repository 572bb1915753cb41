"""Run the shards on a Dask cluster; a scan that kills its worker costs only itself."""

import json
import logging
import platform
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lunaprep import __version__
from lunaprep.errors import LunaprepError
from lunaprep.shard_work import KILLED, ShardTask, excluding, run_shard
from lunaprep.store.receipt import Receipt

CONNECT_S = 10
"""How long to wait for the scheduler."""

WORKERS_S = 60
"""How long to wait for the first worker."""

MAX_BLIND_CRASHES = 3
"""How often workers may die before any scan can be blamed."""

DEATHS_TO_BLAME = 2
"""A worker may die for many reasons while it reads a scan; twice at the same one is no chance."""

SAME_VERSIONS = ("numpy", "scipy", "h5py", "isal", "SimpleITK", "pydicom")
"""Libraries that have a say in the store's bytes."""

PROCESSOR = "processor"
"""The volumes' encoder gives other bytes on another kind (x86-64, ARM)."""


@dataclass(frozen=True)
class Shared:
    """What every worker must have in common with the process that drives the build."""

    mark: Path
    """A file that exists as long as the build does; what it holds is `token`."""

    token: str
    scan: Path
    versions: tuple[tuple[str, str], ...]

    def fault(self) -> str | None:
        """What the process that asks does not share, and what to do; None if it shares everything."""
        for (name, ours), (_, theirs) in zip(self.versions, library_versions(), strict=True):
            if ours != theirs:
                remedy = "Install the same versions (constraints.txt) there"
                if name == PROCESSOR:
                    remedy = "All workers must have the build's kind"
                return f"has {name} {theirs}, the build has {ours}. {remedy}"
        try:
            same = self.mark.read_text(encoding="ascii") == self.token
        except OSError:
            same = False
        if not same:
            return f"does not see {self.mark.parents[2]}. --out must be on a disk that all workers share, at one path"
        if not self.scan.exists():
            return f"does not see {self.scan}. --data must be on a disk that all workers share, at one path"
        return None


def library_versions() -> tuple[tuple[str, str], ...]:
    """Name and version of what has a say in the store's bytes: this package, libraries, the kind of processor."""
    libraries = ((name, _version(name)) for name in SAME_VERSIONS)
    return ("lunaprep", __version__), *libraries, (PROCESSOR, platform.machine())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def run_on_cluster(
    tasks: Sequence[ShardTask], workers: int, scheduler: str | None
) -> Generator[tuple[str, Receipt], None, None]:
    """Yield name and receipt of each task as it is done, in any order.

    Parameters
    ----------
    tasks : sequence of ShardTask
        The shards to work on; all paths absolute.
    workers : int
        Processes of a cluster started here.
    scheduler : str, optional
        Address of a running scheduler, or the file that it wrote (``dask scheduler --scheduler-file``); without it,
        a cluster on this machine is started.

    Raises
    ------
    NoSpaceError
        The disk is full.
    LunaprepError
        No scheduler or worker, a worker without the store's disk or the same libraries, or workers that keep dying.
    """
    if not tasks:
        return
    with _client(workers, scheduler) as client, _shared(tasks[0]) as shared:
        _check_workers(client, shared)
        yield from _run_all(client, tasks, shared)


def _run_all(client: Any, tasks: Sequence[ShardTask], shared: Shared) -> Generator[tuple[str, Receipt], None, None]:
    """Keep two tasks a thread under way: whole plans of many scans would fill the scheduler's memory."""
    distributed = _distributed()
    waiting = list(reversed(tasks))
    running: dict[Any, ShardTask] = {}
    crashes: Counter[str] = Counter()
    done = distributed.as_completed(loop=client.loop)

    def fill() -> None:
        threads = sum(client.ncores().values())
        while waiting and len(running) < 2 * max(1, threads):
            task = waiting.pop()
            future = client.submit(run_shared, task, shared, key=f"{task.shard.name}-{secrets.token_hex(8)}")
            running[future] = task
            done.add(future)

    fill()
    for future in done:
        task = running.pop(future)
        if future.cancelled():
            message = "the Dask scheduler went away; what was finished is kept. Start it again, then the same command"
            raise LunaprepError(message)
        error = future.exception()
        if isinstance(error, distributed.KilledWorker):  # Dask has tried it several times
            crashes[task.shard.name] += 1
            if crashes[task.shard.name] > MAX_BLIND_CRASHES + len(_deaths(task)):
                message = f"{task.shard.name}: workers keep dying ({error.last_worker.address}). See their logs"
                raise LunaprepError(message) from error
            waiting.append(task)
        elif error is not None:
            raise error
        else:
            yield future.result()
        fill()


def run_shared(task: ShardTask, shared: Shared) -> tuple[str, Receipt]:
    """What a Dask worker does: a shard's work, without the scans at which workers died before."""
    fault = shared.fault()
    if fault is not None:
        message = f"Dask worker on {socket.gethostname()} {fault}"
        raise LunaprepError(message)
    deaths = _deaths(task)
    with suppress(OSError, IndexError):  # how far the try before came; it would be gone if it had ended well
        deaths.append(task.now_path.read_text(encoding="utf-8").split()[1])
        _deaths_path(task).write_text("\n".join(deaths), encoding="utf-8")
    guilty = [series_uid for series_uid, count in Counter(deaths).items() if count >= DEATHS_TO_BLAME]
    # files of its own: the scheduler may take a worker for dead that is only out of reach and still writes
    attempt = f"{task.shard.name}-{secrets.token_hex(8)}"
    task = replace(excluding(task, dict.fromkeys(guilty, KILLED)), attempt=attempt)
    try:
        return run_shard(task)
    finally:
        shutil.rmtree(task.scratch, ignore_errors=True)


def _deaths_path(task: ShardTask) -> Path:
    return task.now_path.with_suffix(".died")


def _deaths(task: ShardTask) -> list[str]:
    """Series at which workers died that were at this shard."""
    try:
        return _deaths_path(task).read_text(encoding="utf-8").split()
    except OSError:
        return []


@contextmanager
def _shared(task: ShardTask) -> Iterator[Shared]:
    """Leave a mark for the workers to find. Without it, and the folder, those that still run stop at the next scan."""
    token = secrets.token_hex(16)
    folder = task.now_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{token}.cluster"
    mark.write_text(token, encoding="ascii")
    try:
        yield Shared(mark, token, task.shard.jobs[0].scan.path, library_versions())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        message = "--backend dask needs the package distributed. Install it: pip install '.[dask]' in lunaprep's clone"
        raise LunaprepError(message) from error
    return distributed


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    distributed = _distributed()
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what goes wrong is said in one line
    if scheduler is not None:
        address = _address(scheduler)
        try:
            distributed.comm.get_address_host_port(address)  # a Client that was never one makes noise when it goes
            client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            message = f"no Dask scheduler at {address} ({_first(error)}). Start one with 'dask scheduler'"
            raise LunaprepError(message) from error
        with client:
            yield client
        return
    cluster = distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        memory_limit=0,  # the plan has counted the memory
        silence_logs=logging.CRITICAL,
    )
    with cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield client


def _address(scheduler: str) -> str:
    if not scheduler.endswith(".json"):
        return scheduler
    try:
        return str(json.loads(Path(scheduler).read_bytes())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{scheduler} names no Dask scheduler ({_first(error)}). 'dask scheduler --scheduler-file' writes it"
        raise LunaprepError(message) from error


def _check_workers(client: Any, shared: Shared) -> None:
    """Wait for a worker; refuse those that would not do the same work on the same files, one scan at a time."""
    try:
        client.wait_for_workers(1, timeout=WORKERS_S)
    except TimeoutError as error:
        message = (
            f"the Dask scheduler has no worker, {WORKERS_S} s long. Start some: 'dask worker ADDRESS --nthreads 1'"
        )
        raise LunaprepError(message) from error
    for worker, threads in sorted(client.ncores().items()):
        if threads > 1:  # two scans at once could not be told apart when they kill their worker
            message = f"Dask worker {worker} has {threads} threads, expected 1. Start it with --nthreads 1 --nworkers N"
            raise LunaprepError(message)
    for worker, answer in sorted(client.run(shared.fault, on_error="return").items()):
        if answer is not None:
            fault = f"cannot run lunaprep ({_first(answer)}). Install the same version there"
            message = f"Dask worker {worker} {answer if isinstance(answer, str) else fault}"
            raise LunaprepError(message)


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
