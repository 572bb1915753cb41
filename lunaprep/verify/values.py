"""Whether the tables' values make sense, by themselves, with each other and with store.json."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep import schema
from lunaprep.verify.findings import MOST_ALIKE, Findings
from lunaprep.verify.record import SHARD_ID, Record, ShardRecord
from lunaprep.verify.tables import Manifest

TIE = 1e-6
"""Voxels; a centre this near to half-way between two voxels may have gone to either."""

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_PLACE = schema.MANIFEST_FILE
_AXES = ("index", "row", "col")
_STARTS = ("start_col", "start_row", "start_index")
_SIDES = ("num_slices", "num_rows", "num_cols")
CENTER_COLUMNS = tuple(f"center_{axis}" for axis in _AXES)
_OF_A_NODULE = ("subtype", "malignancy_votes")
_VOTES = re.compile(r"[1-5](,[1-5])*")
_HEX_128 = re.compile(r"[0-9a-f]{32}")


def check_scans(record: Record, scans: list[dict[str, Any]], found: Findings) -> dict[str, dict[str, Any]]:
    """Check scans.parquet row by row; return its good rows of status ok by series."""
    good: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for scan in scans:
        uid = scan["series_uid"]
        problem = "series_uid stands twice" if uid in seen else _scan_problem(scan, record)
        seen.add(uid)
        if problem:
            found.error("bad-value", schema.SCANS_FILE, problem, series_uid=uid)
        elif scan["status"] == "ok":
            good[uid] = scan
    got = {
        "scans_ok": sum(scan["status"] == "ok" for scan in scans),
        "scans_failed": sum(scan["status"] == "failed" for scan in scans),
        "crops": sum(scan["num_crops"] for scan in scans),
        "volumes": sum(scan["volume_file"] is not None for scan in scans),
    }
    for name, number in got.items():
        check_count(name, number, record, schema.SCANS_FILE, found)
    return good


def check_count(name: str, got: int, record: Record, place: str, found: Findings) -> None:
    """A count must be store.json's."""
    if got != record.counts[name]:
        found.error("wrong-count", place, f"{name}: {got}, store.json counts {record.counts[name]}")


def _scan_problem(scan: dict[str, Any], record: Record) -> str | None:
    uid = scan["series_uid"]
    if not uid or "/" in uid or "\0" in uid or uid in (".", ".."):
        return f"series_uid {uid!r:.80} can't be a file's name"
    if scan["status"] == "failed":
        return None if scan["reason"] and scan["num_crops"] == 0 else "failed, but without a reason or with crops"
    if scan["status"] != "ok":
        return f"status is {scan['status']!r:.40}, expected one of {schema.STATUSES}"
    sides = [scan[name] for name in _SIDES]
    if any(side is None or side < 1 for side in sides):
        return f"its shape is {sides}"
    for name, length in (("spacing", 3), ("origin", 3), ("direction", 9)):
        values = scan[name]
        if values is None or len(values) != length or any(v is None or not math.isfinite(v) for v in values):
            return f"{name} isn't {length} finite numbers"
    if min(scan["spacing"]) <= 0 or abs(np.linalg.det(np.reshape(scan["direction"], (3, 3)))) < 1e-3:
        return "spacing isn't positive, or direction is singular"
    if scan["data_bytes"] is None or _HEX_128.fullmatch(scan["data_xxh3"] or "") is None:
        return "data_bytes or data_xxh3 is missing or malformed"
    if scan["is_thin"] not in _thin(record, sides, scan["spacing"]):
        return f"is_thin is {scan['is_thin']} for shape {sides} and crops of {record.crop_shape}"
    return _range_problem(scan) or _volume_problem(scan) or _target_problem(scan, sides)


def _thin(record: Record, sides: list[int], spacing: list[float]) -> set[bool]:
    """What `is_thin` may be: both, where a resampled crop measures what the scan does, within `TIE`."""
    steps = np.divide(record.resample_mm, spacing[::-1]) if record.resample_mm else np.ones(3)
    short = np.array(record.crop_shape) * steps - sides
    return {bool((short > off).any()) for off in ((-TIE, TIE) if record.resample_mm else (0,))}


def _range_problem(scan: dict[str, Any]) -> str | None:
    low, high, share = scan["hu_min"], scan["hu_max"], scan["clipped_share"]
    if low is None or high is None or not -math.inf < low <= high < math.inf:
        return f"hu_min {low} and hu_max {high} are no range"
    return None if share is not None and 0 <= share <= 1 else f"clipped_share is {share}"


def _target_problem(scan: dict[str, Any], sides: list[int]) -> str | None:
    if scan["mask_source"] not in (None, *schema.MASK_SOURCES):
        return f"mask_source is {scan['mask_source']!r:.40}, expected null or one of {schema.MASK_SOURCES}"
    box = scan["lung_box"]
    if box is None:
        return None
    if len(box) == 6 and all(0 <= a < b <= n for a, b, n in zip(box[:3], box[3:], sides, strict=True)):
        return None
    return f"lung_box {box} is no box inside {sides}"


def _volume_problem(scan: dict[str, Any]) -> str | None:
    fields = [scan[f"volume_{name}"] for name in ("file", "bytes", "sha256", "chunk_xxh3")]
    if all(field is None for field in fields):
        return None
    if any(field is None for field in fields):
        return "some of the volume_ columns are null, some not"
    expected = f"{schema.VOLUMES_DIR}/subset{scan['subset']}/{scan['series_uid']}.h5"
    return None if fields[0] == expected else f"volume_file is {fields[0]!r:.120}, expected {expected}"


def check_manifest(record: Record, scans: list[dict[str, Any]] | None, manifest: Manifest, found: Findings) -> None:
    """Check crops.parquet: row by row, as a whole, and against scans.parquet where that is readable."""
    check_count("crops", manifest.num_rows, record, _PLACE, found)
    check_count("nodules", int(manifest.numbers["is_nodule"].sum()), record, _PLACE, found)
    check_rows(manifest, found)
    for name in (name for name in _OF_A_NODULE if name in manifest.texts):
        labelled = (manifest.texts[name].codes >= 0) & (manifest.numbers["annotation_id"] < 0)
        tell(found, manifest, labelled, "bad-value", f"{name} is of a nodule, and it has none")
    _check_votes(manifest, found)
    ids = manifest.numbers["candidate_id"]
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    twice = np.isin(ids, ids[first[counts > 1]]) | (ids < 0)
    tell(found, manifest, twice, "duplicate-candidate", "its candidate_id stands in another row too, or is negative")
    check_order(record.shards_with_file, ("candidate_id", *_STARTS), manifest, found)
    _check_ranks(record, manifest, found)
    check_patients(manifest, found)
    if scans is not None:
        _check_against_scans(record, scans, manifest, found)


def _check_votes(manifest: Manifest, found: Findings) -> None:
    """Malignancy ratings are such, in order, and beside them stands their mean."""
    codes, texts = np.full(manifest.num_rows, -1), []
    if "malignancy_votes" in manifest.texts:
        codes, texts = manifest.texts["malignancy_votes"].codes, manifest.texts["malignancy_votes"].values
    ratings = [sorted(map(int, text.split(","))) if _VOTES.fullmatch(text) else [] for text in texts]
    is_bad = [",".join(map(str, each)) != text for each, text in zip(ratings, texts, strict=True)]
    means = [sum(each) / len(each) if each else math.nan for each in ratings]
    expected, bad = np.array([*means, math.nan])[codes], np.array([*is_bad, False])[codes]
    got = manifest.numbers.get("malignancy_mean", np.full(manifest.num_rows, math.nan))
    tell(found, manifest, bad, "bad-value", "malignancy_votes are no ratings from 1 to 5 in ascending order")
    off = ~bad & ~np.isclose(got, expected, rtol=1e-9, equal_nan=True)
    tell(found, manifest, off, "bad-value", "malignancy_mean is not the mean of malignancy_votes")


def tell(found: Findings, manifest: Manifest, mask: Mask, code: str, message: str) -> None:
    """Add an error for each row of the mask; beyond `MOST_ALIKE` they are only counted."""
    rows = np.flatnonzero(mask)
    for k in rows[:MOST_ALIKE]:
        found.error(code, manifest.place, message, **manifest.crop(int(k)))
    if len(rows) > MOST_ALIKE:
        found.count(code, manifest.place, len(rows) - MOST_ALIKE)


def check_rows(manifest: Manifest, found: Findings) -> None:
    """Centres, diameters and splits must be possible ones."""
    n = manifest.numbers
    centres = np.stack([n[f"{axis}_mm"] for axis in "xyz"])
    tell(found, manifest, ~np.isfinite(centres).all(axis=0), "bad-value", "its centre isn't finite")
    diameter = n["diameter_mm"]
    bad = ~(np.isnan(diameter) | ((diameter > 0) & np.isfinite(diameter)))
    tell(found, manifest, bad, "bad-value", "diameter_mm is neither positive nor NaN")
    for name in ("split_series", "split_candidate"):
        mask = manifest.texts[name].recode({split: k for k, split in enumerate(schema.SPLITS)}) < 0
        tell(found, manifest, mask, "bad-value", f"{name} is neither train nor val")


def check_order(shards: Sequence[ShardRecord], keys: Sequence[str], manifest: Manifest, found: Findings) -> None:
    """Rows must be the shards' rows, shard after shard; within one by series, then by the `keys`, last first."""
    shard = manifest.texts["shard_id"].recode({s.id: k for k, s in enumerate(shards)})
    row = manifest.numbers["shard_row"].astype(np.int64)
    expected_shard = np.repeat(np.arange(len(shards)), [s.rows for s in shards])
    expected_row = np.concatenate([np.arange(s.rows) for s in shards] or [np.empty(0, np.int64)])
    size = min(len(expected_row), manifest.num_rows)
    tell(found, manifest, shard < 0, "unknown-shard", "store.json has no such shard")
    wrong = np.zeros(manifest.num_rows, dtype=bool)
    wrong[:size] = (shard[:size] != expected_shard[:size]) | (row[:size] != expected_row[:size])
    wrong[size:] = True
    if wrong.any():
        tell(found, manifest, wrong, "bad-order", "isn't where store.json's shards put it")
        return
    uids = manifest.texts["series_uid"]
    place = {uid: k for k, uid in enumerate(sorted(uids.values))}
    series = uids.recode(place)
    order = np.lexsort((*(manifest.numbers[name] for name in keys), series, shard))
    tell(found, manifest, order != np.arange(len(order)), "bad-order", "out of order within its shard")
    homes = np.unique(series * max(1, len(shards)) + shard) // max(1, len(shards))
    split = np.isin(series, homes[1:][homes[1:] == homes[:-1]])
    tell(found, manifest, split, "bad-order", "its scan is spread over two shards")
    subset = np.array([int(match[1]) if (match := SHARD_ID.match(s.id)) else -1 for s in shards], dtype=np.int64)
    other = subset[shard] != manifest.numbers["subset"] if len(shards) else wrong
    tell(found, manifest, other, "bad-value", "its subset isn't that of its shard")


def _check_ranks(record: Record, manifest: Manifest, found: Findings) -> None:
    """size_rank must number the rows by falling (is_nodule, diameter), and give split_candidate."""
    n, size = manifest.numbers, manifest.num_rows
    rank = n["size_rank"]
    if not np.array_equal(np.sort(rank), np.arange(size)):
        off = (rank < 0) | (rank >= size)
        _, first, counts = np.unique(rank, return_index=True, return_counts=True)
        off |= np.isin(rank, rank[first[counts > 1]])
        tell(found, manifest, off, "bad-rank", "size_rank stands twice or is out of range")
        return
    order = np.argsort(rank)
    diameter = np.nan_to_num(n["diameter_mm"][order], nan=0.0, posinf=0.0, neginf=0.0)
    nodule = n["is_nodule"][order].astype(np.int64)
    up = (nodule[1:] > nodule[:-1]) | ((nodule[1:] == nodule[:-1]) & (diameter[1:] > diameter[:-1]))
    mask = np.zeros(size, dtype=bool)
    mask[order[1:][up]] = True
    tell(found, manifest, mask, "bad-rank", "is larger than the row ranked before it")
    if record.val_stride > 0:
        is_val = manifest.texts["split_candidate"].recode({"val": 1}) == 1
        wrong = is_val != (rank % record.val_stride == 0)
        tell(found, manifest, wrong, "bad-split", f"split_candidate isn't every {record.val_stride}th by size_rank")


def check_patients(manifest: Manifest, found: Findings) -> None:
    """All rows of a patient (or of a series without one) must lie on one side of split_series."""
    patient, series = manifest.texts["patient_id"], manifest.texts["series_uid"]
    person = np.where(patient.codes >= 0, patient.codes, len(patient.values) + series.codes)
    is_val = manifest.texts["split_series"].recode({"val": 1}) == 1
    both = np.intersect1d(person[is_val], person[~is_val])
    tell(found, manifest, np.isin(person, both), "bad-split", "split_series puts its patient on both sides")


def _check_against_scans(record: Record, scans: list[dict[str, Any]], manifest: Manifest, found: Findings) -> None:
    scan = manifest.texts["series_uid"].recode({s["series_uid"]: k for k, s in enumerate(scans)})
    tell(found, manifest, scan < 0, "unknown-series", "scans.parquet has no good scan of this series")
    num_crops = np.bincount(scan[scan >= 0], minlength=len(scans))
    for k, entry in enumerate(scans):
        if entry["num_crops"] != num_crops[k]:
            message = f"num_crops is {entry['num_crops']}, crops.parquet has {num_crops[k]} rows of it"
            found.error("wrong-count", schema.SCANS_FILE, message, series_uid=entry["series_uid"])
    check_owners(scans, manifest, scan, found)
    check_windows(record, record.crop_shape, scans, manifest, scan, found)
    if not record.resample_mm and any(name in manifest.numbers for name in CENTER_COLUMNS):
        found.error("bad-value", _PLACE, f"has {CENTER_COLUMNS[0]}, but its crops aren't resampled")


def check_owners(scans: list[dict[str, Any]], manifest: Manifest, scan: Ints, found: Findings) -> None:
    """Patient and subset must be those of the row's scan, which is number `scan` of `scans` (-1: unknown)."""
    if not scans:
        return
    known = scan >= 0
    patients = {p: k for k, p in enumerate({s["patient_id"] for s in scans} - {None})}
    whose = np.array([patients.get(s["patient_id"], -1) for s in scans], dtype=np.int64)
    mine = manifest.texts["patient_id"]
    unknown = (mine.codes >= 0) & (mine.recode(patients) < 0)
    wrong = known & (unknown | (mine.recode(patients) != whose[scan]))
    tell(found, manifest, wrong, "bad-value", "patient_id isn't that of its scan")
    subset = np.array([s["subset"] for s in scans], dtype=np.int64)
    wrong = known & (manifest.numbers["subset"] != subset[scan])
    tell(found, manifest, wrong, "bad-value", "subset isn't that of its scan")


def check_windows(
    record: Record,
    crop_shape: tuple[int, int, int],
    scans: list[dict[str, Any]],
    manifest: Manifest,
    scan: Ints,
    found: Findings,
) -> None:
    """Centre voxel, start and is_padded must follow from the centre, the grid and the parameters."""
    if not scans:
        return
    n, known = manifest.numbers, scan >= 0
    sides = np.array([[s[name] for name in _SIDES] for s in scans], dtype=np.int64)[scan]
    centre = np.stack([n[axis].astype(np.int64) for axis in _AXES], axis=1)
    start = np.stack([n[f"start_{axis}"].astype(np.int64) for axis in _AXES], axis=1)
    outside = known & ((centre < 0) | (centre >= sides)).any(axis=1)
    tell(found, manifest, outside, "bad-place", "its centre voxel lies outside its scan")
    off = np.abs(continuous_irc(scans, manifest, scan) - centre)
    if manifest.place == schema.SLABS_FILE:  # a slab of a nodule lies around any slice that its sphere meets
        thickness = np.array([s["spacing"][2] for s in scans])[scan]
        off[:, 0] -= np.nan_to_num(n["diameter_mm"] / 2 / thickness)
    with np.errstate(invalid="ignore"):
        tell(
            found,
            manifest,
            known & ~(off <= 0.5 + TIE).all(axis=1),
            "bad-place",
            "its centre in mm lies in another voxel",
        )
    if record.resample_mm and manifest.place == _PLACE:
        check_samples(record, scans, manifest, scan, continuous_irc(scans, manifest, scan), found)
        return
    wrong = known & (start != expected_start(centre, sides, crop_shape, record.edge)).any(axis=1)
    tell(found, manifest, wrong, "bad-start", f"its start isn't that of --edge {record.edge}")
    padded = ((start < 0) | (start + crop_shape > sides)).any(axis=1)
    tell(found, manifest, known & (padded != n["is_padded"]), "bad-value", "is_padded is wrong")


def continuous_irc(scans: list[dict[str, Any]], manifest: Manifest, scan: Ints) -> npt.NDArray[np.float64]:
    """Centres of all rows in voxels, (n, 3), slice row column; of a row without a scan, anything."""
    to_xyz = np.array([s["direction"] for s in scans]).reshape(-1, 3, 3)
    to_index = np.linalg.inv(to_xyz) / np.array([s["spacing"] for s in scans])[:, :, None]
    origin = np.array([s["origin"] for s in scans])
    xyz = np.stack([manifest.numbers[f"{axis}_mm"] for axis in "xyz"], axis=1)
    with np.errstate(all="ignore"):
        index: npt.NDArray[np.float64] = np.einsum("kij,kj->ki", to_index[scan], xyz - origin[scan])
    return index[:, ::-1]


def expected_start(centre: Ints, sides: Ints, crop_shape: tuple[int, int, int], edge: str) -> Ints:
    """First voxel of the crop of each centre voxel, (..., 3), by the rule of ``--edge``."""
    width = np.array(crop_shape)
    start = centre - width // 2
    if edge == "pad":
        return np.asarray(start)
    return np.asarray(np.clip(start, np.minimum(0, sides - width), np.maximum(0, sides - width)))


def check_samples(
    record: Record,
    scans: list[dict[str, Any]],
    manifest: Manifest,
    scan: Ints,
    place: npt.NDArray[np.float64],
    found: Findings,
) -> None:
    """Start, centre and is_padded of resampled crops must follow from the centre's place in the scan, within `TIE`."""
    n, known, mm = manifest.numbers, scan >= 0, np.array(record.resample_mm)
    if manifest.num_rows and any(name not in n for name in CENTER_COLUMNS):
        found.error("bad-value", _PLACE, f"lacks one of {', '.join(CENTER_COLUMNS)}, and its crops are resampled")
        return
    sides = np.array([[s[name] for name in _SIDES] for s in scans], dtype=np.int64)[scan]
    step = mm / np.array([s["spacing"][::-1] for s in scans])[scan]
    first = expected_first(place, sides, record.crop_shape, step, record.edge)
    start = np.stack([n[f"start_{axis}"] for axis in _AXES], axis=1)
    centre = np.stack([n[name] for name in CENTER_COLUMNS], axis=1)
    with np.errstate(invalid="ignore"):
        near = (np.abs(start - first) <= 0.5 + TIE).all(axis=1)
        right = (np.abs(first + centre * step - place) <= TIE).all(axis=1)
        out = np.maximum(-0.5 - first, first + (np.array(record.crop_shape) - 1) * step - (sides - 0.5)).max(axis=1)
    tell(found, manifest, known & ~near, "bad-start", f"its start isn't that of --edge {record.edge}")
    tell(found, manifest, known & ~right, "bad-start", "center_index, _row, _col aren't where its centre is")
    wrong = (np.abs(out) > TIE) & ((out > 0) != n["is_padded"])
    tell(found, manifest, known & wrong, "bad-value", "is_padded is wrong")


def expected_first(
    place: npt.NDArray[np.float64],
    sides: npt.NDArray[Any],
    crop_shape: tuple[int, int, int],
    step: npt.NDArray[np.float64],
    edge: str,
) -> npt.NDArray[np.float64]:
    """Place in the scan, (..., 3), of the first voxel of resampled crops; `step` is what a voxel of theirs measures."""
    width = np.array(crop_shape)
    first = place - width // 2 * step
    if edge == "pad":
        return np.asarray(first)
    low, high = -0.5 + step / 2, sides - 0.5 - step / 2 - (width - 1) * step
    return np.asarray(np.clip(first, np.minimum(low, high), np.maximum(low, high)))
