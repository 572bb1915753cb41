"""Level full: every byte held against its checksum, and the crop or chunk at fault named."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.verify.findings import MOST_ALIKE, Findings
from lunaprep.verify.hashing import Hashes, Meter, hash_file, hash_shard
from lunaprep.verify.places import BadFileError, read_whole
from lunaprep.verify.record import Record, ShardRecord, check_canonical, parse_json
from lunaprep.verify.structure import datasets_of, stored_chunks
from lunaprep.verify.tables import Manifest

MOST_THREADS = 4
"""Files hashed at a time: both hashes let other threads run, so cores add up until the disk is the limit."""

T = TypeVar("T")
Digests = npt.NDArray[np.uint64]


@dataclass
class Witnesses:
    """What a table and a receipt say of the crops, slabs or masks of one shard."""

    shard: ShardRecord
    receipt: str = ""
    first: int = 0
    manifest: Manifest | None = None
    in_manifest: Digests | None = None
    in_receipt: Digests | None = None
    receipt_sha256: object = None

    def crop(self, row: int) -> dict[str, Any]:
        """Return which crop the row is, as the optional fields of a finding."""
        if self.manifest is not None and self.in_manifest is not None:
            return self.manifest.crop(self.first + row)
        return {"shard_id": self.shard.id, "shard_row": row}


def check_small_files(store: Path, record: Record, meter: Meter, found: Findings) -> set[str]:
    """Hold the front doors and the tables against store.json; return those that are as they were written."""
    intact: set[str] = set()
    for place, file in record.files.items():
        got = hash_file(store, place, meter)
        _check_whole(got, place, file.sha256, found)
        if got.sha256 == file.sha256:
            intact.add(place)
    return intact


def _check_whole(got: Hashes, place: str, sha256: str, found: Findings) -> None:
    if got.problem is None:
        if got.sha256 != sha256:
            message = f"its bytes were changed: sha256 is {got.sha256:.12}…, store.json has {sha256:.12}…"
            found.error("wrong-sha256", place, message)
    elif got.code == "unreadable":  # the others are told by the check of every file
        found.error(got.code, place, got.problem)


def load_receipts(store: Path, record: Record, meter: Meter, found: Findings) -> dict[str, dict[str, Any]]:
    """Hash and parse the receipts; return those that are whole, by shard id."""
    receipts: dict[str, dict[str, Any]] = {}
    for shard in record.shards:
        got = hash_file(store, shard.receipt, meter)
        _check_whole(got, shard.receipt, shard.receipt_sha256, found)
        if got.problem is None and got.sha256 == shard.receipt_sha256:
            try:
                raw = read_whole(store, shard.receipt)
                receipts[shard.id] = parse_json(raw)
                check_canonical(receipts[shard.id], raw, shard.receipt, found)
            except BadFileError as bad:
                found.error(bad.code, shard.receipt, str(bad), shard_id=shard.id)
    return receipts


def check_receipts(
    record: Record, receipts: dict[str, dict[str, Any]], scans: list[dict[str, Any]] | None, found: Findings
) -> None:
    """Hold what each receipt says against store.json and scans.parquet."""
    by_uid = {scan["series_uid"]: scan for scan in scans or []}
    for shard in record.shards:
        receipt = receipts.get(shard.id)
        if receipt is None:
            continue
        said = {
            "shard_id": shard.id,
            "file": shard.file,
            "rows": shard.rows,
            "bytes": shard.bytes,
            "sha256": shard.sha256,
        }
        _check_slabs_of(record, shard, receipt, found)
        for key, value in said.items():
            if receipt.get(key) != value:
                message = f"{key} is {receipt.get(key)!r:.80}, store.json has {value!r:.80}"
                found.error("receipt-differs", shard.receipt, message, shard_id=shard.id)
        entries = receipt.get("scans")
        for entry in entries if isinstance(entries, list) else [{}]:
            uid = entry.get("series_uid") if isinstance(entry, dict) else None
            problem = "scans isn't a list of scans" if uid is None else None
            if uid is not None and scans is not None:
                problem = _entry_problem(entry, by_uid.get(str(uid)))
            if problem:
                found.error("receipt-differs", shard.receipt, problem, shard_id=shard.id, series_uid=uid and str(uid))


def _entry_problem(entry: dict[str, Any], scan: dict[str, Any] | None) -> str | None:
    if scan is None:
        return "scans.parquet has no such scan"
    for key in ("status", "data_bytes", "data_xxh3", "num_crops"):
        if entry.get(key) != scan[key]:
            return f"{key} is {entry.get(key)!r:.80}, scans.parquet has {scan[key]!r:.80}"
    volume = entry.get("volume")
    for key in ("file", "bytes", "sha256"):
        got = volume.get(key) if isinstance(volume, dict) else None
        if got != scan[f"volume_{key}"]:
            return f"volume {key} is {got!r:.80}, scans.parquet has {scan[f'volume_{key}']!r:.80}"
    lungs = entry.get("lungs")
    box = lungs.get("box") if isinstance(lungs, dict) else None
    if box != scan["lung_box"]:
        return f"the box of its lungs is {box!r:.80}, scans.parquet has {scan['lung_box']!r:.80}"
    return None


def _check_slabs_of(record: Record, shard: ShardRecord, receipt: dict[str, Any], found: Findings) -> None:
    """Hold what a receipt says of slabs against store.json."""
    said = slabs_of(receipt)
    by_id = {s.id: (s, m) for s, m in zip(record.slabs or (), record.masks, strict=True)}
    if said is None or not said.get("rows"):
        return
    pair = by_id.get(str(said["shard_id"]))
    if pair is None:
        message = f"store.json has no shard {said['shard_id']!r:.80} of slabs"
        found.error("receipt-differs", shard.receipt, message, shard_id=shard.id)
        return
    for one, prefix in zip(pair, ("", "mask_"), strict=True):
        for key in ("file", "bytes", "sha256"):
            got, expected = said.get(f"{prefix}{key}"), getattr(one, key)
            if got != expected:
                message = f"slabs: {prefix}{key} is {got!r:.80}, store.json has {expected!r:.80}"
                found.error("receipt-differs", shard.receipt, message, shard_id=shard.id)


def witnesses(
    record: Record, manifest: Manifest | None, slabs: Manifest | None, receipts: dict[str, dict[str, Any]]
) -> list[Witnesses]:
    """What is known of each shard's crops; a table whose rows aren't the shards' rows knows nothing."""
    places = {shard.id: shard.receipt for shard in record.shards}
    said = {str(s["shard_id"]): (places[k], s) for k, r in receipts.items() if (s := slabs_of(r)) is not None}
    known = _witnesses(
        record.shards_with_file, manifest, "xxh3", {k: (places[k], r) for k, r in receipts.items()}, "crop_"
    )
    known += _witnesses(record.slabs or (), slabs, "xxh3", said, "slab_")
    return known + _witnesses(record.masks, slabs, "mask_xxh3", said, "mask_", "mask_")


def slabs_of(receipt: dict[str, Any]) -> dict[str, Any] | None:
    """Part of a receipt on slabs, if it has one."""
    slabs = receipt.get("slabs")
    return slabs if isinstance(slabs, dict) and isinstance(slabs.get("shard_id"), str) else None


def _witnesses(
    shards: Iterable[ShardRecord],
    table: Manifest | None,
    column: str,
    receipts: dict[str, tuple[str, dict[str, Any]]],
    list_of: str,
    file_of: str = "",
) -> list[Witnesses]:
    known: list[Witnesses] = []
    first = 0
    for shard in shards:
        place, receipt = receipts.get(shard.id, ("", {}))
        witness = Witnesses(shard, place, first)
        rows = slice(first, first + shard.rows)
        if table is not None and _is_run_of(table, shard, rows):
            witness.manifest, witness.in_manifest = table, table.numbers[column][rows]
        witness.in_receipt = _digests(receipt.get(f"{list_of}xxh3"), shard.rows)
        witness.receipt_sha256 = receipt.get(f"{file_of}sha256")
        known.append(witness)
        first += shard.rows
    return known


def _is_run_of(manifest: Manifest, shard: ShardRecord, rows: slice) -> bool:
    codes = manifest.texts["shard_id"].recode({shard.id: 0})[rows]
    shard_row = manifest.numbers["shard_row"][rows]
    return len(codes) == shard.rows and not codes.any() and np.array_equal(shard_row, np.arange(shard.rows))


def _digests(texts: object, rows: int) -> Digests | None:
    if not isinstance(texts, list) or len(texts) != rows:
        return None
    try:
        return np.array([int(text, 16) for text in texts], dtype=np.uint64)
    except (TypeError, ValueError, OverflowError):
        return None


def check_shards(store: Path, known: list[Witnesses], meter: Meter, found: Findings) -> None:
    """Hash every shard and name each crop that isn't what the manifest and the receipt say."""
    hashed = list(_in_threads(lambda w: hash_shard(store, str(w.shard.file), w.shard.crop_bytes, meter), known))
    owner = {w.shard.sha256: w.shard.file for w in known}
    for witness, got in zip(known, hashed, strict=True):
        shard, place = witness.shard, str(witness.shard.file)
        if got.problem is not None:
            _check_whole(got, place, "", found)
        elif got.sha256 != shard.sha256 and got.sha256 in owner:
            message = f"holds the bytes of {owner[got.sha256]}: the files were swapped or copied"
            found.error("file-misplaced", place, message, shard_id=shard.id)
        else:
            _check_crops(witness, got, found)


def _check_crops(witness: Witnesses, got: Hashes, found: Findings) -> None:
    """Let crop, manifest, receipt and the shard's own sha256 vote on each row."""
    shard, size = witness.shard, len(got.crops)
    intact, crops = got.sha256 == shard.sha256, got.crops
    said = [None if d is None else d[:size] for d in (witness.in_manifest, witness.in_receipt)]
    off = [None if d is None else crops[: len(d)] != d for d in said]
    known = [mask for mask in off if mask is not None]
    if not known:
        if not intact and got.size == shard.bytes:
            message = "its bytes were changed; which crop is unknown, as neither manifest nor receipt is readable"
            found.error("wrong-sha256", str(shard.file), message, shard_id=shard.id)
        return
    wrong = np.zeros_like(known[0]) if intact else np.logical_and.reduce(known)
    _tell_crops(witness, crops, wrong, found)
    for mask, digests, code, place in (
        (off[0], said[0], "manifest-differs", witness.manifest.place if witness.manifest else ""),
        (off[1], said[1], "receipt-differs", witness.receipt),
    ):
        if mask is not None and digests is not None:
            for row in np.flatnonzero(mask & ~wrong).tolist():
                message = f"checksum of shard row {row} is {digests[row]:016x}; the crop itself has {crops[row]:016x}"
                found.error(code, place, message, **witness.crop(row))
    if not intact and got.size == shard.bytes and not wrong.any():
        _tell_header(witness, got.sha256, found)


def _tell_crops(witness: Witnesses, crops: Digests, wrong: npt.NDArray[np.bool_], found: Findings) -> None:
    expected = witness.in_manifest if witness.in_manifest is not None else witness.in_receipt
    place, rows = str(witness.shard.file), np.flatnonzero(wrong)
    for row in rows[:MOST_ALIKE].tolist():
        whose = np.flatnonzero(expected == crops[row])
        if len(whose):
            message = f"holds the crop of row {whose[0]} of this shard: crops were swapped or copied"
            found.error("crop-misplaced", place, message, **witness.crop(row))
        else:
            message = f"the crop's bytes were changed: their xxh3 is now {crops[row]:016x}"
            found.error("crop-damaged", place, message, **witness.crop(row))
    if len(rows) > MOST_ALIKE:
        found.count("crop-damaged", place, len(rows) - MOST_ALIKE)


def _tell_header(witness: Witnesses, sha256: str, found: Findings) -> None:
    shard = witness.shard
    if sha256 == witness.receipt_sha256:
        message = (
            f"sha256 of shard {shard.id} is {shard.sha256!s:.12}…; the shard and its receipt agree on {sha256:.12}…"
        )
        found.error("wrong-sha256", schema.STORE_FILE, message, shard_id=shard.id)
    else:
        message = f"all crops are right, but the header (the first {schema.DATA_OFFSET} bytes) was changed"
        found.error("header-damaged", str(shard.file), message, shard_id=shard.id)


def check_volumes(store: Path, scans: Iterable[dict[str, Any]], meter: Meter, found: Findings) -> None:
    """Hash every volume and name the slices of each stored chunk that was changed."""
    scans = [scan for scan in scans if scan["volume_file"] is not None]
    hashed = _in_threads(lambda scan: hash_file(store, scan["volume_file"], meter), scans)
    for scan, got in zip(scans, hashed, strict=True):
        if got.problem is not None:
            _check_whole(got, scan["volume_file"], "", found)
        elif got.sha256 != scan["volume_sha256"]:
            _name_chunks(store, scan, found)


def _name_chunks(store: Path, scan: dict[str, Any], found: Findings) -> None:
    place, uid, expected = scan["volume_file"], scan["series_uid"], scan["volume_chunk_xxh3"]
    try:
        names = datasets_of(scan)
        chunks = [
            (name, first, shape, xxhash.xxh3_64_intdigest(raw))
            for name, first, shape, raw in stored_chunks(store, place, names, names)
        ]
    except Exception:
        chunks = []
    if len(chunks) != len(expected):
        message = f"its bytes were changed, and HDF5 finds {len(chunks)} of {len(expected)} chunks"
        found.error("header-damaged", place, message, series_uid=uid)
        return
    wrong = [chunk for chunk, digest in zip(chunks, expected, strict=True) if chunk[3] != digest]
    for name, first, shape, _ in wrong:
        last = min(first[0] + shape[0], scan["num_slices"]) - 1
        message = (
            f"the chunk of /{name}, slices {first[0]} to {last} from row {first[1]}, column {first[2]}, was changed"
        )
        found.error("chunk-damaged", place, message, series_uid=uid)
    if not wrong:
        message = "all chunks are right, but bytes between them were changed"
        found.error("header-damaged", place, message, series_uid=uid)


def _in_threads(task: Callable[[T], Hashes], items: list[T]) -> Iterator[Hashes]:
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(task, items)
