"""Obey the plan: run the shards in parallel, write the tables, commit, account."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lunaprep import schema
from lunaprep.account import Account, Preview, make_account, make_preview, size_text
from lunaprep.assemble import NewStore, assemble
from lunaprep.carried import SHARD_ID, Carried, carry_over, check_fits, store_subsets
from lunaprep.errors import FormatError, NoSpaceError, StoreError, UsageError
from lunaprep.finished import Finished, SeenInputs, find_finished
from lunaprep.machine import available_bytes, default_workers, free_disk_bytes
from lunaprep.parallel import Backend, Crew, run_tasks, spread
from lunaprep.parameters import Parameters
from lunaprep.plan import Plan, decide, make_plan
from lunaprep.shard_work import ShardTask, staged_receipt, staged_volume, worker_bytes
from lunaprep.sources.csv_tables import write_tables
from lunaprep.sources.known import check_data, read_data
from lunaprep.sources.luna16 import TablePaths
from lunaprep.sources.source import SourceData
from lunaprep.store.commit import build_lock, commit, recover
from lunaprep.store.files import write_file
from lunaprep.store.receipt import Receipt
from lunaprep.store.record import read_record

HEADERS_FILE = "headers.json"
"""In `schema.WORK_DIR`: notes on DICOM headers, see `lunaprep.scans.dicom_notes`."""

MEMORY_SHARE = 0.8
"""Share of the available memory that workers may plan for."""

SPARE_BYTES = 64 << 20
"""Disk space that a build leaves free."""


@dataclass(frozen=True)
class BuildOptions:
    """What `build` is asked to do, besides the parameters that decide the content."""

    data: Path
    out: Path
    source: str = "luna16"
    subsets: tuple[int, ...] | None = None
    tables: TablePaths = field(default_factory=TablePaths)
    volumes: bool = True
    targets: bool = True
    csv: Path | None = None
    """Folder that gets the source's tables too, as LUNA16 has them."""

    limit: int | None = None
    workers: int | None = None
    backend: Backend = "loky"
    scheduler: str | None = None
    """Address of a running Dask scheduler, or the file it wrote; it has workers of its own."""

    progress: bool = False

    def __post_init__(self) -> None:
        if self.scheduler and self.backend != "dask":
            message = f"--scheduler goes with --backend dask, got --backend {self.backend}"
            raise UsageError(message)
        if self.scheduler and self.workers:
            message = "--workers: the scheduler has its own. Leave it out, or leave --scheduler out"
            raise UsageError(message)

    @property
    def everywhere(self) -> "BuildOptions":
        """The same with paths that hold in another process's folder too."""
        lungs = self.tables.lungs and self.tables.lungs.absolute()
        tables = replace(self.tables, lungs=lungs)
        return replace(self, data=self.data.absolute(), out=self.out.absolute(), tables=tables)


def preview(options: BuildOptions, parameters: Parameters) -> Preview:
    """Say what `build` would do; nothing is written.

    Raises
    ------
    UsageError, TableError
        As `build`.
    """
    options = options.everywhere
    record = _old_record(options.out)
    plan, _, _ = _plan(options, parameters, record, keep_notes=False)
    return make_preview(plan, *_resources(plan, options), record)


def build(options: BuildOptions, parameters: Parameters) -> Account:
    """Build a store, or bring it up to date; finished shards are kept.

    Parameters
    ----------
    options : BuildOptions
        Where from, where to, how.
    parameters : Parameters
        What decides the content.

    Returns
    -------
    Account
        What was built, kept, left out, and why.

    Raises
    ------
    UsageError, TableError
        Nothing can be built from what was given.
    BusyError
        Another build is at work in `out`.
    NoSpaceError
        The disk is, or would get, full; finished shards are kept.
    """
    start = time.monotonic()
    check_data(options.source, options.data, options.subsets, options.tables)  # before anything is left in --out
    options = options.everywhere
    _check_csv(options)
    with build_lock(options.out):
        recover(options.out)
        work = options.out / schema.WORK_DIR
        begun = [path.stem for path in (work / "tmp").glob("*.now")]
        shutil.rmtree(work / "tmp", ignore_errors=True)
        record = _old_record(options.out)
        plan, carried, seen = _plan(options, parameters, record, keep_notes=True)
        about = make_preview(plan, *_resources(plan, options), record)
        _check_space(about)
        receipts = _run(plan, options, seen, about.workers, begun)
        new = assemble(plan, receipts, carried)
        _publish(options.out, new, receipts)
        shutil.rmtree(work / "tmp", ignore_errors=True)
        if options.csv:
            write_tables(plan.source, options.csv)
        return make_account(about, plan, carried, receipts, new.record, time.monotonic() - start)


def _old_record(out: Path) -> dict[str, Any] | None:
    """The store there is; None without one, or with one whose store.json is damaged (its shards have receipts)."""
    try:
        return read_record(out)
    except FormatError:  # another lunaprep's, perhaps a newer one's: not ours to replace
        raise
    except (StoreError, UsageError):
        return None


def _check_csv(options: BuildOptions) -> None:
    if options.csv and options.csv.resolve() == options.data.resolve():
        message = f"--csv {options.csv}: that would write over the tables of --data. Name another folder"
        raise UsageError(message)


def _plan(
    options: BuildOptions, parameters: Parameters, record: Mapping[str, Any] | None, *, keep_notes: bool
) -> tuple[Plan, Carried, SeenInputs]:
    """What is to be done, what of the store stays as it is, and which scans are known."""
    subsets = options.subsets
    if subsets is not None:  # what the store has besides, and the data folder still holds, is kept up to date too
        held = store_subsets(options.out)
        if options.source == "luna16":
            held = {number for number in held if (options.data / f"subset{number}").is_dir()}
        subsets = tuple(sorted({*subsets, *held}))
    source = _read_data(options, subsets, keep_notes)
    plan = make_plan(source, parameters, volumes=options.volumes, targets=options.targets, limit=options.limit)
    finished, seen = find_finished(options.out, record), SeenInputs(options.out)
    _check_nothing_lost(plan, finished)
    carried = carry_over(options.out, record, source.subsets)
    check_fits(carried, record, plan)
    seen.watch(job for shard in plan.shards for job in shard.jobs)
    return decide(plan, finished.receipts, finished.is_there, seen.unchanged), carried, seen


def _read_data(options: BuildOptions, subsets: tuple[int, ...] | None, keep_notes: bool) -> SourceData:
    """The scans and tables; what was read of DICOM headers is noted at once, for a build that goes on from here."""
    if options.source == "luna16":
        return read_data(options.source, options.data, subsets, options.tables)
    from lunaprep.scans.dicom_notes import HeaderNotes

    workers = (options.workers or default_workers()) if options.backend == "loky" else 1
    read_many = partial(spread, workers=workers, what="headers", progress=options.progress)
    notes = HeaderNotes(options.out / schema.WORK_DIR / HEADERS_FILE, read_many)
    source = read_data(options.source, options.data, subsets, options.tables, notes)
    if keep_notes:
        notes.save()
    return source


def _check_nothing_lost(plan: Plan, finished: Finished) -> None:
    planned = {job.scan.series_uid for shard in plan.shards for job in shard.jobs}
    planned |= {item.found.series_uid for item in plan.failed}
    lost = sorted(finished.series_of(plan.source.subsets) - planned)
    if lost:
        scans = f"{len(lost)} scan{'s' * (len(lost) > 1)}"
        message = (
            f"{finished.out} holds {scans} that this build would leave out, such as {lost[0]}. Put the files back, "
            "leave --limit out, or choose another --out"
        )
        raise UsageError(message)


def _resources(plan: Plan, options: BuildOptions) -> tuple[int, int, int]:
    """Workers to use (0: those of the scheduler), bytes of memory for each, bytes free on the disk."""
    shards = plan.to_do
    needs = (worker_bytes(shard, plan.parameters.crop_shape, plan.dtype, plan.targets) for shard in shards)
    each = max(needs, default=0)
    workers = min(options.workers or default_workers(), max(1, len(shards)))
    free = available_bytes()
    if free is not None and each:
        workers = max(1, min(workers, int(free * MEMORY_SHARE / each)))
    return 0 if options.scheduler else workers, each, free_disk_bytes(options.out)


def _check_space(about: Preview) -> None:
    if about.write_bytes and about.write_bytes + SPARE_BYTES > about.free_bytes:
        message = (
            f"the disk of the store has {size_text(about.free_bytes)} free, and about "
            f"{size_text(about.write_bytes + SPARE_BYTES)} are needed. Free some, choose another --out, take fewer "
            "--subsets, or leave the volumes out (--no-volumes)"
        )
        raise NoSpaceError(message)


def _run(plan: Plan, options: BuildOptions, seen: SeenInputs, workers: int, begun: Sequence[str]) -> list[Receipt]:
    """Receipts of all shards, in plan order."""
    receipts = {shard.plan_key: shard.receipt for shard in plan.shards if shard.action == "keep" and shard.receipt}
    jobs = {shard.plan_key: shard.jobs for shard in plan.shards}
    tasks = [
        ShardTask(
            out=options.out,
            shard=shard,
            crop_shape=plan.parameters.crop_shape,
            hu=plan.parameters.hu,
            dtype=plan.dtype,
            volumes=plan.volumes,
            targets=plan.targets,
        )
        for shard in plan.to_do
    ]
    crew = Crew(workers, options.backend, options.scheduler)
    try:
        for receipt in run_tasks(tasks, crew, progress=options.progress, begun=begun):
            receipts[receipt.plan_key] = receipt
            seen.note(receipt, jobs[receipt.plan_key])
            seen.save_now_and_then()
    finally:
        if tasks:
            with suppress(OSError):  # a convenience, and the disk may be full
                seen.save()
    return [receipts[shard.plan_key] for shard in plan.shards]


def _publish(out: Path, new: NewStore, receipts: Sequence[Receipt]) -> None:
    """Commit the new store, unless it is the one that is there; then drop what nothing names any more."""
    work = out / schema.WORK_DIR
    moves = []
    for receipt in receipts:
        staged = staged_receipt(out, receipt)
        if staged.exists():
            moves.append((staged, f"{schema.SHARDS_DIR}/{receipt.shard_id}.json"))
        volumes = [scan.volume for scan in receipt.scans if scan.volume]
        moves += [(path, volume.file) for volume in volumes if (path := staged_volume(out, volume)).exists()]
    if moves or not all(_holds(out / name, data) for name, data in new.files.items()):
        for name, data in new.files.items():
            write_file(work / "new" / name, data)
            moves.append((work / "new" / name, name))
        renames = [(path.relative_to(out).as_posix(), name) for path, name in moves]
        commit(out, renames, _left_over(out, new.record))
    else:  # what another build, cut off and not gone on with, had finished
        for name in _left_over(out, new.record):
            (out / name).unlink(missing_ok=True)
    for folder in ("new", "receipts", "volumes"):
        shutil.rmtree(work / folder, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _left_over(out: Path, record: Mapping[str, Any]) -> list[str]:
    """Files of the store's that the new one does not name: shards, receipts, slabs, a front door of slabs."""
    shards = [*record["shards"], *record.get("slabs", {"shards": []})["shards"]]
    named = {shard.get(key) for shard in shards for key in ("file", "receipt", "mask_file")}
    folders = ((out / folder).glob("*") for folder in (schema.SHARDS_DIR, schema.SLABS_DIR))
    paths = [path for folder in folders for path in folder if SHARD_ID.fullmatch(path.name.split(".")[0])]
    if "slabs" not in record:
        paths += [path for name in (schema.SLABS_FILE, schema.SLAB_DOOR_FILE) if (path := out / name).exists()]
    return [name for path in paths if (name := path.relative_to(out).as_posix()) not in named]
