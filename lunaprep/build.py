"""Obey the plan: run the shards in parallel, write the tables, commit, account."""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lunaprep import schema
from lunaprep.account import Account, Preview, make_account, make_preview, size_text
from lunaprep.carried import SHARD_ID, Carried, carry_over, check_same_crops, shard_place, store_subsets
from lunaprep.errors import NoSpaceError, StoreError, UsageError
from lunaprep.finished import Finished, SeenInputs, find_finished
from lunaprep.machine import available_bytes, default_workers, free_disk_bytes
from lunaprep.manifest import built_rows, complete_rows, scan_row
from lunaprep.parallel import run_tasks
from lunaprep.parameters import Parameters
from lunaprep.plan import Plan, decide, make_plan
from lunaprep.shard_work import ShardTask, staged_receipt, staged_volume, worker_bytes
from lunaprep.sources.luna16 import TablePaths, read_source
from lunaprep.store.commit import build_lock, commit, recover
from lunaprep.store.files import write_file
from lunaprep.store.front_door import front_door_bytes
from lunaprep.store.receipt import Receipt, ScanRecord, receipt_bytes
from lunaprep.store.record import make_record, read_record, store_id_of
from lunaprep.store.tables import table_bytes

MEMORY_SHARE = 0.8
"""Share of the available memory that workers may plan for."""

SPARE_BYTES = 64 << 20
"""Disk space that a build leaves free."""


@dataclass(frozen=True)
class BuildOptions:
    """What `build` is asked to do, besides the parameters that decide the content."""

    data: Path
    out: Path
    subsets: tuple[int, ...] | None = None
    tables: TablePaths = field(default_factory=TablePaths)
    volumes: bool = True
    limit: int | None = None
    workers: int | None = None
    progress: bool = False


def preview(options: BuildOptions, parameters: Parameters) -> Preview:
    """Say what `build` would do; nothing is written.

    Raises
    ------
    UsageError, TableError
        As `build`.
    """
    record = _old_record(options.out)
    plan, _ = _plan(options, parameters, record)
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
    with build_lock(options.out):
        recover(options.out)
        work = options.out / schema.WORK_DIR
        shutil.rmtree(work / "tmp", ignore_errors=True)
        record = _old_record(options.out)
        plan, seen = _plan(options, parameters, record)
        carried = carry_over(options.out, record, _planned_subsets(plan))
        check_same_crops(carried, record, parameters.to_json(), plan.dtype)
        about = make_preview(plan, *_resources(plan, options), record)
        _check_space(about)
        receipts = _run(plan, options, seen, about.workers)
        new = _assemble(plan, receipts, carried)
        _publish(options.out, new, receipts)
        shutil.rmtree(work / "tmp", ignore_errors=True)
        return make_account(about, plan, receipts, new.record, time.monotonic() - start)


def _old_record(out: Path) -> dict[str, Any] | None:
    """The store there is; None without one, or with one whose store.json is damaged (its shards have receipts)."""
    try:
        return read_record(out) if (out / schema.STORE_FILE).exists() else None
    except StoreError:
        return None


def _planned_subsets(plan: Plan) -> set[int]:
    return set(plan.source.subsets)


def _plan(options: BuildOptions, parameters: Parameters, record: Mapping[str, Any] | None) -> tuple[Plan, SeenInputs]:
    subsets = options.subsets
    if subsets is not None:  # what the store has besides, and the data folder still holds, is kept up to date too
        known = {number for number in store_subsets(options.out) if (options.data / f"subset{number}").is_dir()}
        subsets = tuple(sorted({*subsets, *known}))
    source = read_source(options.data, subsets, options.tables)
    plan = make_plan(source, parameters, volumes=options.volumes, limit=options.limit)
    finished, seen = find_finished(options.out, record), SeenInputs(options.out)
    _check_nothing_lost(plan, finished)
    seen.watch(job.scan for shard in plan.shards for job in shard.jobs)
    return decide(plan, finished.receipts, finished.is_there, seen.unchanged), seen


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
    """Workers to use, bytes of memory for each, bytes free on the disk."""
    shards = plan.to_do
    each = max((worker_bytes(shard, plan.parameters.crop_shape, plan.dtype) for shard in shards), default=0)
    workers = min(options.workers or default_workers(), max(1, len(shards)))
    free = available_bytes()
    if free is not None and each:
        workers = max(1, min(workers, int(free * MEMORY_SHARE / each)))
    return workers, each, free_disk_bytes(options.out)


def _check_space(about: Preview) -> None:
    if about.write_bytes and about.write_bytes + SPARE_BYTES > about.free_bytes:
        message = (
            f"the disk of the store has {size_text(about.free_bytes)} free, and about "
            f"{size_text(about.write_bytes + SPARE_BYTES)} are needed. Free some, choose another --out, take fewer "
            "--subsets, or leave the volumes out (--no-volumes)"
        )
        raise NoSpaceError(message)


def _run(plan: Plan, options: BuildOptions, seen: SeenInputs, workers: int) -> list[Receipt]:
    """Receipts of all shards, in plan order."""
    receipts = {shard.plan_key: shard.receipt for shard in plan.shards if shard.action == "keep" and shard.receipt}
    scans = {shard.plan_key: [job.scan for job in shard.jobs] for shard in plan.shards}
    tasks = [
        ShardTask(
            out=options.out,
            shard=shard,
            crop_shape=plan.parameters.crop_shape,
            hu=plan.parameters.hu,
            dtype=plan.dtype,
            volumes=plan.volumes,
        )
        for shard in plan.to_do
    ]
    for receipt in run_tasks(tasks, workers, progress=options.progress):
        receipts[receipt.plan_key] = receipt
        seen.note(receipt, scans[receipt.plan_key])
        seen.save()
    return [receipts[shard.plan_key] for shard in plan.shards]


@dataclass(frozen=True)
class _NewStore:
    """All of the new store but shards and volumes: bytes of its files, and what store.json says."""

    files: Mapping[str, bytes]
    record: dict[str, Any]


def _assemble(plan: Plan, receipts: Sequence[Receipt], carried: Carried) -> _NewStore:
    """Make the tables, the front door and store.json from finished shards."""
    scans = _scan_rows(plan, receipts, carried)
    parts = [built_rows(plan.rows[plan.rows["unit"] == unit], receipt) for unit, receipt in enumerate(receipts)]
    parts += [group for _, group in carried.rows.groupby("shard_id")]
    parts = sorted((part for part in parts if len(part)), key=lambda part: shard_place(part["shard_id"].iloc[0]))
    empty = plan.rows[:0].assign(shard_id="", shard_row=0, xxh3=0)
    known = scans[scans["patient_id"].notna()]
    patients = dict(zip(known["series_uid"], known["patient_id"], strict=True))
    rows = complete_rows(
        pd.concat(parts, ignore_index=True) if parts else empty,
        plan.source.annotations,
        patients,
        scans[scans["status"] == "ok"]["series_uid"].tolist(),
        plan.parameters.val_stride,
    )
    shards = sorted([*map(_shard_entry, receipts), *carried.shards], key=lambda shard: shard_place(shard["id"]))
    tables = {
        schema.MANIFEST_FILE: table_bytes(rows, schema.MANIFEST_COLUMNS),
        schema.SCANS_FILE: table_bytes(scans, schema.SCAN_COLUMNS),
    }
    parameters = plan.parameters.to_json()
    hashes = {name: _sha256(data) for name, data in tables.items()}
    store_id = store_id_of(parameters, shards, hashes)
    with_crops = [(shard["file"], shard["rows"]) for shard in shards if shard["file"]]
    door = front_door_bytes(with_crops, plan.parameters.crop_shape, plan.dtype, store_id)
    files = {schema.FRONT_DOOR_FILE: door, **tables}
    content = {
        "store_id": store_id,
        "parameters": parameters,
        "inputs": [item.to_json() for item in plan.source.files],
        "counts": _counts(rows, scans),
        "crops": {"shape": [len(rows), *plan.parameters.crop_shape], "dtype": plan.dtype},
        "shards": shards,
        "files": [{"file": name, "bytes": len(data), "sha256": _sha256(data)} for name, data in sorted(files.items())],
    }
    return _NewStore({**files, schema.STORE_FILE: make_record(content)}, content)


def _scan_rows(plan: Plan, receipts: Sequence[Receipt], carried: Carried) -> pd.DataFrame:
    found = {item.series_uid: item for item in plan.source.scans}
    jobs = {job.scan.series_uid: job.scan for shard in plan.shards for job in shard.jobs}
    done = [record for receipt in receipts for record in receipt.scans]
    done += [ScanRecord(item.found.series_uid, "failed", item.reason) for item in plan.failed]
    rows = [
        scan_row(found[r.series_uid], r, jobs.get(r.series_uid), plan.source, plan.parameters.crop_shape) for r in done
    ]
    frame = pd.DataFrame(rows, columns=[column.name for column in schema.SCAN_COLUMNS]).astype(object)
    frame = pd.concat([frame, carried.scans.astype(object)], ignore_index=True)
    return frame.sort_values(["subset", "series_uid"], ignore_index=True)


def _shard_entry(receipt: Receipt) -> dict[str, Any]:
    data = receipt_bytes(receipt)
    return {
        "id": receipt.shard_id,
        "file": receipt.file,
        "rows": receipt.rows,
        "bytes": receipt.bytes,
        "sha256": receipt.sha256,
        "receipt": f"{schema.SHARDS_DIR}/{receipt.shard_id}.json",
        "receipt_sha256": _sha256(data),
    }


def _counts(rows: pd.DataFrame, scans: pd.DataFrame) -> dict[str, int]:
    return {
        "scans_ok": int((scans["status"] == "ok").sum()),
        "scans_failed": int((scans["status"] == "failed").sum()),
        "crops": len(rows),
        "nodules": int(rows["is_nodule"].sum()),
        "volumes": int(scans["volume_file"].notna().sum()),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _publish(out: Path, new: _NewStore, receipts: Sequence[Receipt]) -> None:
    """Commit the new store, unless it is the one that is there; then drop what nothing names any more."""
    work = out / schema.WORK_DIR
    moves = []
    for receipt in receipts:
        staged = staged_receipt(out, receipt)
        if staged.exists():
            moves.append((staged, f"{schema.SHARDS_DIR}/{receipt.shard_id}.json"))
        volumes = [scan.volume for scan in receipt.scans if scan.volume]
        moves += [(path, volume.file) for volume in volumes if (path := staged_volume(out, volume)).exists()]
    if not moves and all(_holds(out / name, data) for name, data in new.files.items()):
        return
    for name, data in new.files.items():
        write_file(work / "new" / name, data)
        moves.append((work / "new" / name, name))
    renames = [(path.relative_to(out).as_posix(), name) for path, name in moves]
    commit(out, renames, _left_over(out, new.record))
    for folder in ("new", "receipts", "volumes"):
        shutil.rmtree(work / folder, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _left_over(out: Path, record: Mapping[str, Any]) -> list[str]:
    """Shards and receipts that lie in the store's folder and that the new store does not name."""
    named = {shard[key] for shard in record["shards"] for key in ("file", "receipt")}
    paths = (path for path in (out / schema.SHARDS_DIR).glob("*") if SHARD_ID.fullmatch(path.stem))
    return [name for path in paths if (name := path.relative_to(out).as_posix()) not in named]
