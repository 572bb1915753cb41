"""Run the shards on several processes, with progress; a scan that kills its worker costs only itself."""

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import resource_tracker
from typing import Any, Literal, TypeVar

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from lunaprep.cluster import MAX_BLIND_CRASHES, run_on_cluster
from lunaprep.errors import LunaprepError
from lunaprep.shard_work import KILLED, ShardTask, excluding, run_shard
from lunaprep.store.receipt import Receipt

POLL_S = 0.5
SLOW_S = 120.0
"""A scan that is read for longer is named."""

CHUNK_ITEMS = 128
"""Items of quick work that a process is given at a time."""

MIN_ITEMS = 512
"""Of fewer the work is done before other processes have started."""

Backend = Literal["loky", "dask"]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Crew:
    """Who does the work: processes of this machine (``loky``), or a Dask cluster."""

    workers: int
    """Processes here; with 1 and ``loky`` the work is done in this one."""

    backend: Backend = "loky"
    scheduler: str | None = None
    """Address of the Dask scheduler, or the file it wrote; None starts a cluster here."""


def run_tasks(
    tasks: Sequence[ShardTask], crew: Crew, *, progress: bool, begun: Collection[str] = ()
) -> Iterator[Receipt]:
    """Yield the receipt of each task as it is done, in any order.

    Parameters
    ----------
    tasks : sequence of ShardTask
        The shards to work on.
    crew : Crew
        Who does it.
    progress : bool
        Whether to show a bar on stderr.
    begun : collection of str
        Shards that a build was at work on when it ended: with one worker, which is this process, a scan of theirs may
        have killed it. They are done in a process of their own.

    Raises
    ------
    NoSpaceError
        The disk is full.
    LunaprepError
        Workers die and no scan is to blame, or the cluster is not what it must be.
    """
    by_name = {task.shard.name: task for task in tasks}
    dask = crew.backend == "dask"
    done = run_on_cluster(tasks, crew.workers, crew.scheduler) if dask else _run_here(by_name, crew.workers, begun)
    with _progress_bar(tasks, progress) as finish, closing(done):
        for name, receipt in done:
            finish(by_name[name])
            yield receipt


def spread(
    work: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    workers: int,
    *,
    what: str,
    progress: bool,
) -> Iterator[Result]:
    """Yield the results of quick work on many items, in their order.

    Parameters
    ----------
    work : callable
        Gives a result for each item of a list; it must be known to other processes by its name.
    items : sequence
        What to work on; few of them stay in this process.
    workers : int
        Processes.
    what : str
        Name of the bar.
    progress : bool
        Whether to show one on stderr.
    """
    chunks = [items[first : first + CHUNK_ITEMS] for first in range(0, len(items), CHUNK_ITEMS)]
    is_many = len(items) >= MIN_ITEMS
    with tqdm(total=len(items), unit="file", desc=what, disable=None if progress and is_many else True) as bar:
        for part in _parts(work, chunks, workers if is_many else 1):
            bar.update(len(part))
            yield from part


def _parts(
    work: Callable[[Sequence[Item]], list[Result]], chunks: Sequence[Sequence[Item]], workers: int
) -> Iterator[list[Result]]:
    count = 0
    if workers > 1:
        pool = joblib.Parallel(workers, backend="loky", return_as="generator", batch_size=1, max_nbytes=None)
        with suppress(TerminatedWorkerError):  # no memory for so many, perhaps: the rest is done here
            for part in _results(pool, (joblib.delayed(_work_below)(work, chunk, os.getpid()) for chunk in chunks)):
                count += 1
                yield part
    yield from map(work, chunks[count:])


def _work_below(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], parent: int) -> list[Result]:
    """What a worker process does with a part of quick work."""
    _end_with(parent)
    return work(items)


def _run_here(
    tasks: Mapping[str, ShardTask], workers: int, begun: Collection[str]
) -> Generator[tuple[str, Receipt], None, None]:
    attempt = secrets.token_hex(8)  # half-written files of its own: a worker of a killed build may still be at work
    pending = {name: replace(task, attempt=attempt) for name, task in tasks.items()}
    for name in sorted(pending.keys() & begun) if workers == 1 else ():
        yield name, _run_alone(pending.pop(name))
    crashes = 0
    while pending:
        try:
            for name, receipt in _parallel(list(pending.values()), workers):
                del pending[name]
                yield name, receipt
        except TerminatedWorkerError as error:
            suspects = [task for task in pending.values() if task.now_path.exists()]
            crashes += not suspects
            if crashes > MAX_BLIND_CRASHES:
                message = f"worker processes keep dying ({str(error).splitlines()[0][:120]}). Use fewer --workers"
                raise LunaprepError(message) from error
            for task in suspects:
                receipt = _run_alone(task)
                del pending[task.shard.name]
                yield task.shard.name, receipt


def _parallel(tasks: Sequence[ShardTask], workers: int) -> Iterator[tuple[str, Receipt]]:
    if workers == 1:
        yield from map(run_shard, tasks)
        return
    # max_nbytes: joblib would hand large arrays over as read-only memory maps in temporary files
    # batch_size: it would give several quick shards to one worker while another has none
    pool = joblib.Parallel(workers, backend="loky", return_as="generator_unordered", batch_size=1, max_nbytes=None)
    yield from _results(pool, (joblib.delayed(_run_below)(task, os.getpid()) for task in tasks))


def _results(pool: joblib.Parallel, calls: Iterable[Any]) -> Iterator[Any]:
    """What the calls give, by processes that never see Ctrl-C, which comes to all: amid their imports they'd trace it.

    It is this one's to answer, as soon as they have been started; whatever ends this early ends them.
    """
    resource_tracker.ensure_running()  # starting amid the workers, it would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    results = None
    try:
        results = pool(calls)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # an interrupt that came meanwhile is raised here
        yield from results
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if results is not None:
            results.close()


def _run_below(task: ShardTask, parent: int) -> tuple[str, Receipt]:
    """What a worker process does."""
    _end_with(parent)
    return run_shard(task)


@cache
def _end_with(parent: int) -> None:
    """End this process as soon as the build is gone: killed, it could not say so, and loky's workers would write on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_alone(task: ShardTask) -> Receipt:
    """Work on one shard in a process of its own; leave out each scan that kills it."""
    for _ in range(len(task.shard.jobs) + 1):
        try:
            (receipt,) = (receipt for _, receipt in _parallel([task], 2))
            return receipt
        except TerminatedWorkerError:
            series_uid = task.now_path.read_text(encoding="utf-8").split()[1]
            task = excluding(task, {series_uid: KILLED})
    message = f"{task.shard.name}: its worker dies even without its scans. Use fewer --workers"
    raise LunaprepError(message)


@contextmanager
def _progress_bar(tasks: Sequence[ShardTask], show: bool) -> Iterator[Callable[[ShardTask], None]]:
    """A bar over scans; workers say in small files how far they are."""
    total = sum(len(task.shard.jobs) for task in tasks)
    done: set[str] = set()
    stop = threading.Event()
    # disable=None: no bar without a terminal
    bar: Any = tqdm(total=total, unit="scan", desc="build", smoothing=0.05, disable=None if show else True)

    def count() -> int:
        begun = _begun(tasks)  # of thousands, a few: each look is a question to the disk, which may be far away
        return sum(
            len(task.shard.jobs) if task.shard.name in done else _scans_done(task)
            for task in tasks
            if task.shard.name in done or task.now_path.name in begun
        )

    def watch() -> None:
        due: dict[str, tuple[float, float]] = {}
        while not stop.wait(POLL_S):
            bar.update(max(0, count() - bar.n))
            for line in _slow_scans(tasks, due, time.monotonic()):
                tqdm.write(line, file=sys.stderr)

    def finish(task: ShardTask) -> None:
        done.add(task.shard.name)
        task.now_path.unlink(missing_ok=True)

    thread = threading.Thread(target=watch, daemon=True)
    if show:
        thread.start()
    try:
        yield finish
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()
        bar.update(max(0, count() - bar.n))
        bar.close()


def _begun(tasks: Sequence[ShardTask]) -> set[str]:
    """Names of the small files that are there."""
    return {path.name for task in tasks[:1] for path in task.now_path.parent.glob("*.now")}


def _scans_done(task: ShardTask) -> int:
    return _progress_of(task)[0]


def _progress_of(task: ShardTask) -> tuple[int, str]:
    """How many scans of a shard are done, and which one is being read."""
    try:
        done, series_uid = task.now_path.read_text(encoding="utf-8").split()
        return int(done), series_uid
    except (OSError, ValueError):
        return 0, ""


def _slow_scans(tasks: Sequence[ShardTask], due: dict[str, tuple[float, float]], now: float) -> Iterator[str]:
    """A line for each scan that has been read for long, and again when it has been twice as long.

    A disk that does not answer, as a network disk may for ever, looks like work otherwise. How long is too long, only
    the user knows: nothing is killed.
    """
    names = _begun(tasks)
    running = {_progress_of(task)[1] for task in tasks if task.now_path.name in names} - {""}
    for series_uid in set(due) - running:
        del due[series_uid]
    for series_uid in running - set(due):
        due[series_uid] = now, SLOW_S
    for series_uid, (began, limit) in due.items():
        if now - began > limit:
            due[series_uid] = began, 2 * limit
            yield (
                f"lunaprep: series {series_uid} has been read for {now - began:.0f} s. If its disk does not answer, "
                "Ctrl-C ends the build; what was finished is kept"
            )
