"""Run the shards on several processes, with progress; a scan that kills its worker costs only itself."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from lunaprep.errors import LunaprepError
from lunaprep.shard_work import ShardTask, excluding, run_shard
from lunaprep.store.receipt import Receipt

POLL_S = 0.5
MAX_BLIND_CRASHES = 3
"""How often workers may die before any scan can be blamed."""

KILLED = (
    "reading it killed its worker twice (no memory, or a crash in a library). Look at the file, or use fewer --workers"
)


def run_tasks(tasks: Sequence[ShardTask], workers: int, *, progress: bool) -> Iterator[Receipt]:
    """Yield the receipt of each task as it is done, in any order.

    Parameters
    ----------
    tasks : sequence of ShardTask
        The shards to work on.
    workers : int
        Processes; with 1 the work is done in this one.
    progress : bool
        Whether to show a bar on stderr.

    Raises
    ------
    NoSpaceError
        The disk is full.
    LunaprepError
        Workers die and no scan is to blame.
    """
    pending = {task.shard.name: task for task in tasks}
    crashes = 0
    with _progress_bar(tasks, progress) as finish:
        while pending:
            try:
                for name, receipt in _parallel(list(pending.values()), workers):
                    finish(pending.pop(name))
                    yield receipt
            except TerminatedWorkerError as error:
                suspects = [task for task in pending.values() if task.now_path.exists()]
                crashes += not suspects
                if crashes > MAX_BLIND_CRASHES:
                    message = f"worker processes keep dying ({str(error).splitlines()[0][:120]}). Use fewer --workers"
                    raise LunaprepError(message) from error
                for task in suspects:
                    receipt = _run_alone(task)
                    finish(pending.pop(task.shard.name))
                    yield receipt


def _parallel(tasks: Sequence[ShardTask], workers: int) -> Iterator[tuple[str, Receipt]]:
    if workers == 1:
        yield from map(run_shard, tasks)
        return
    # max_nbytes: joblib would hand large arrays over as read-only memory maps in temporary files
    pool = joblib.Parallel(workers, backend="loky", return_as="generator_unordered", max_nbytes=None)
    yield from pool(joblib.delayed(run_shard)(task) for task in tasks)


def _run_alone(task: ShardTask) -> Receipt:
    """Work on one shard in a process of its own; leave out each scan that kills it."""
    for _ in range(len(task.shard.jobs) + 1):
        try:
            pool = joblib.Parallel(2, backend="loky", max_nbytes=None)
            return pool([joblib.delayed(run_shard)(task)])[0][1]  # type: ignore[no-any-return]
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
        return sum(len(t.shard.jobs) if t.shard.name in done else _scans_done(t) for t in tasks)

    def watch() -> None:
        while not stop.wait(POLL_S):
            bar.update(max(0, count() - bar.n))

    def finish(task: ShardTask) -> None:
        done.add(task.shard.name)
        task.now_path.unlink(missing_ok=True)

    thread = threading.Thread(target=watch, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield finish
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()
        bar.update(max(0, count() - bar.n))
        bar.close()


def _scans_done(task: ShardTask) -> int:
    try:
        return int(task.now_path.read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return 0
