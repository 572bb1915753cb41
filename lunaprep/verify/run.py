"""verify_store: all checks of a level, in order, each going on after what it finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from lunaprep import schema
from lunaprep.errors import BusyError, UsageError
from lunaprep.verify.checksums import (
    check_receipts,
    check_shards,
    check_small_files,
    check_volumes,
    load_receipts,
    witnesses,
)
from lunaprep.verify.findings import Findings, VerifyReport
from lunaprep.verify.hashing import Meter
from lunaprep.verify.masks import check_masks, mask_bytes
from lunaprep.verify.places import BadFileError, look
from lunaprep.verify.record import Record, ShardRecord, load_record
from lunaprep.verify.slabs import check_slabs
from lunaprep.verify.structure import check_front_doors, check_shard, check_volume
from lunaprep.verify.tables import Manifest, load_manifest, load_scans
from lunaprep.verify.values import check_manifest, check_scans

Level = Literal["quick", "full", "source"]
Rows = list[dict[str, Any]]


def verify_store(
    store: Path,
    level: Level = "full",
    data: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a store and name all damage.

    Parameters
    ----------
    store : Path
        The store's folder.
    level : {"quick", "full", "source"}
        ``quick``: structure, sizes and values, no voxel read. ``full``: also every checksum, and the masks looked at.
        ``source``: also every crop, slab and volume cut again from the scans in `data`.
    data : Path, optional
        The folder the scans lie in; needed at level source.
    progress : callable, optional
        Called with the bytes done and their total, now and then, perhaps from other threads (one at a time). To what is
        read come the bytes that masks unpack to.

    Returns
    -------
    VerifyReport
        Damage is never raised.

    Raises
    ------
    UsageError
        The folder is no store, the level is unknown, or level source was given no data folder, or one in which not one
        of the scans is.
    BusyError
        Something was found, but a build replaced the store meanwhile.
    """
    store = Path(store)
    _check_usage(store, level, data)
    version = _version(store)
    found = Findings()
    counts = {"shards": 0, "crops": 0, "volumes": 0, "bytes_read": 0}
    record = load_record(store, found)
    if record is not None:
        _verify(store, record, level, data, progress, found, counts)
    if found.as_tuple() and version != _version(store):
        message = f"{store}: a build replaced the store while it was verified. Verify it again"
        raise BusyError(message)
    return VerifyReport(level, found.as_tuple(), counts)


def _version(store: Path) -> tuple[bool, int, int]:
    """What changes when a build replaces the store."""
    stat = (store / schema.STORE_FILE).lstat()
    is_cut_off = (store / schema.WORK_DIR / schema.JOURNAL_FILE).exists()
    return is_cut_off, stat.st_ino, stat.st_mtime_ns


def _check_usage(store: Path, level: str, data: Path | None) -> None:
    if level not in get_args(Level):
        message = f"level is {level!r}, expected one of {', '.join(get_args(Level))}"
        raise UsageError(message)
    if not store.is_dir():
        what = "is a file" if store.exists() else "no such folder"
        message = f"{store}: {what}; give the folder that `lunaprep build --out` wrote"
        raise UsageError(message)
    path = store / schema.STORE_FILE
    if not path.is_symlink() and not path.exists():
        message = f"{store}: isn't a store (it has no {schema.STORE_FILE}); was its build finished?"
        raise UsageError(message)
    if level == "source" and (data is None or not data.is_dir()):
        message = f"level source needs the folder of the scans; got {data}: give --data DIR"
        raise UsageError(message)


def _verify(
    store: Path,
    record: Record,
    level: Level,
    data: Path | None,
    progress: Callable[[int, int], None] | None,
    found: Findings,
    counts: dict[str, int],
) -> None:
    scans, good = _load_scans(store, record, found)
    manifest, slabs = _load_manifest(store, record, good, found), _load_slabs(store, record, good, found)
    if data is not None and level == "source":
        from lunaprep.verify.recut import require_scans

        require_scans(data, good or [])
    volumes = [scan for scan in good or [] if scan["volume_file"] is not None]
    counts |= {"shards": len(record.shards_with_file), "crops": record.counts["crops"], "volumes": len(volumes)}
    counts |= {"slabs": record.counts.get("slabs", 0)}
    here = _check_files(store, record, volumes, found)
    if good is not None:
        _name_extra(store, schema.VOLUMES_DIR, {scan["volume_file"] for scan in volumes}, found)
    for shard in record.mapped:
        if shard.file in here:
            check_shard(store, shard, found)
    if level == "quick":
        return
    for scan in volumes:
        if scan["volume_file"] in here:
            check_volume(store, scan, found)
    meter = Meter(_total(record, volumes, good, slabs, level), progress)
    _verify_bytes(store, record, scans, volumes, (manifest, slabs), meter, found)
    if good is not None:
        check_masks(store, record, good, slabs, here, meter, found)
    if data is not None and level == "source" and manifest is not None and good is not None:
        from lunaprep.verify.recut import check_source

        tables = [(manifest, record.shards_with_file)]
        tables += [(slabs, list(record.slabs))] if slabs is not None and record.slabs else []
        counts["scans"] = len(good)
        counts["scans_cut_again"] = check_source(store, data, record, good, tables, meter, found)
    counts["bytes_read"] = meter.bytes_read


def _load_scans(store: Path, record: Record, found: Findings) -> tuple[Rows | None, Rows | None]:
    """All rows of scans.parquet, and the good ones of status ok."""
    scans = load_scans(store, record.counts["scans_ok"] + record.counts["scans_failed"], found)
    if scans is None:
        message = "volumes, grids and sources weren't checked, as this table can't be read"
        found.warning("not-checked", schema.SCANS_FILE, message)
        return None, None
    return scans, list(check_scans(record, scans, found).values())


def _load_manifest(store: Path, record: Record, good: Rows | None, found: Findings) -> Manifest | None:
    manifest = load_manifest(store, schema.MANIFEST_FILE, schema.MANIFEST_COLUMNS, record.counts["crops"], found)
    if manifest is None:
        message = "its rows weren't checked, as this table can't be read"
        found.warning("not-checked", schema.MANIFEST_FILE, message)
    else:
        check_manifest(record, good, manifest, found)
    return manifest


def _load_slabs(store: Path, record: Record, good: Rows | None, found: Findings) -> Manifest | None:
    if record.slabs is None:
        return None
    slabs = load_manifest(store, schema.SLABS_FILE, schema.SLAB_COLUMNS, record.counts["slabs"], found)
    if slabs is None:
        found.warning("not-checked", schema.SLABS_FILE, "its rows weren't checked, as this table can't be read")
    else:
        check_slabs(record, good, slabs, found)
    return slabs


def _verify_bytes(
    store: Path,
    record: Record,
    scans: Rows | None,
    volumes: Rows,
    tables: tuple[Manifest | None, Manifest | None],
    meter: Meter,
    found: Findings,
) -> None:
    check_front_doors(store, record, check_small_files(store, record, meter, found), found)
    receipts = load_receipts(store, record, meter, found)
    check_receipts(record, receipts, scans, found)
    check_shards(store, witnesses(record, *tables, receipts), meter, found)
    check_volumes(store, volumes, meter, found)


def _total(record: Record, volumes: Rows, good: Rows | None, slabs: Manifest | None, level: Level) -> int:
    total = mask_bytes(good, slabs.num_rows if slabs is not None else 0) if good is not None else 0
    total += sum(file.bytes for file in record.files.values()) + sum(shard.bytes for shard in record.mapped)
    for scan in volumes:
        total += int(scan["volume_bytes"])
    for scan in good or [] if level == "source" else []:
        total += int(scan["data_bytes"])
    return total


def _check_files(store: Path, record: Record, volumes: Rows, found: Findings) -> set[str]:
    """Check that each listed file is there, plain and of its size; return those that are. Name extra ones."""
    here: set[str] = set()

    def check(place: str, size: int | None, lost: str, **whose: str) -> None:
        try:
            got = look(store, place).st_size
        except BadFileError as bad:
            found.error(bad.code, place, f"{bad}{lost}", **whose)
            return
        if size is not None and got != size:
            how = "cut short" if got < size else "longer than it was"
            found.error("wrong-size", place, f"{how}: {got} bytes, expected {size}{_cut(place, got)}", **whose)
        else:
            here.add(place)

    shards = {shard.file: shard for shard in record.mapped}

    def _cut(place: str, got: int) -> str:
        return _lost_rows(shards[place], got) if place in shards else ""

    for file in record.files.values():
        check(file.file, file.bytes, "")
    for shard in record.mapped:
        lost = f"; it held {shard.rows} {shard.dataset}: build again to make it"
        check(str(shard.file), shard.bytes, lost, shard_id=shard.id)
    for shard in record.shards:
        check(shard.receipt, None, "; build again to make it", shard_id=shard.id)
    for scan in volumes:
        check(scan["volume_file"], scan["volume_bytes"], "; build again to make it", series_uid=scan["series_uid"])
    listed = {s.receipt for s in record.shards} | {str(s.file) for s in record.shards}
    _name_extra(store, schema.SHARDS_DIR, listed, found)
    _name_extra(store, schema.SLABS_DIR, {str(s.file) for s in (*(record.slabs or ()), *record.masks)}, found)
    return here


def _lost_rows(shard: ShardRecord, size: int) -> str:
    left = max(0, size - schema.DATA_OFFSET) // shard.crop_bytes
    return f"; {shard.dataset} of rows {left} to {shard.rows - 1} are lost" if left < shard.rows else ""


def _name_extra(store: Path, folder: str, listed: set[str], found: Findings) -> None:
    for path in sorted((store / folder).rglob("*")):
        place = path.relative_to(store).as_posix()
        if place not in listed and (path.is_symlink() or not path.is_dir()):
            found.warning("extra-file", place, "belongs to no record of store.json; a reader never opens it")
