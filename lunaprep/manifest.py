"""The rows of the store's two tables: planned from the inputs, completed when the shards are there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep import schema
from lunaprep.candidates import XYZ, match_annotations, series_codes, size_order
from lunaprep.crops import is_padded, is_sample_padded, sample_starts, step_of, window_starts
from lunaprep.parameters import Parameters
from lunaprep.scans.scan import Scan
from lunaprep.shard_plan import ScanJob
from lunaprep.sources.source import FoundScan, SourceData
from lunaprep.splits import largest_nodules, split_by_rank, split_by_series
from lunaprep.store.receipt import Receipt, ScanRecord

START = ("start_index", "start_row", "start_col")
CENTER = ("index", "row", "col")
CROP_CENTER = ("center_index", "center_row", "center_col")


@dataclass(frozen=True)
class PlannedRows:
    """Rows of the manifest, scan by scan, each scan's ordered by `START`, then by candidate."""

    frame: pd.DataFrame
    starts: Mapping[str, npt.NDArray[Any]]
    """First voxel of each crop of a scan, (n, 3), in the order of the rows; of resampled crops its exact place."""

    outside: tuple[str, ...]
    """A line for each candidate that lies outside its scan."""


@dataclass(frozen=True)
class _Places:
    """Where the crops of one scan lie, a row for each candidate: voxel of the centre, first voxel, exact places."""

    center: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    is_padded: npt.NDArray[np.bool_]
    first: npt.NDArray[np.float64] | None = None
    in_crop: npt.NDArray[np.float64] | None = None


def plan_rows(source: SourceData, parameters: Parameters, scans: Mapping[str, Scan]) -> PlannedRows:
    """Rows of the manifest of all candidates of the given scans, scan by scan in their order."""
    given = source.candidates
    codes, names = series_codes(given["series_uid"])
    of_series = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    bounds = dict(zip(names, pairwise([0, *ends.tolist()]), strict=True))
    members = {uid: of_series[slice(*bounds.get(uid, (0, 0)))] for uid in scans}
    del codes
    rows = _Filled(sum(map(len, members.values())), resampled=parameters.resample_mm is not None)
    axes, numbers = [given[axis].to_numpy(dtype=np.float64) for axis in XYZ], given["candidate_id"].to_numpy()
    counts, strays = [], []
    for uid, scan in scans.items():
        at = members[uid]
        xyz = np.stack([axis[at] for axis in axes], axis=1)
        center = scan.geometry.nearest_irc(xyz)
        inside = scan.geometry.contains_irc(center)
        strays += [(k, _outside_line(given.iloc[k], center[at == k][0], scan)) for k in at[~inside].tolist()]
        at, places = at[inside], _places(xyz[inside], center[inside], scan, parameters)
        order = np.lexsort([numbers[at], *reversed(places.start.T)])
        rows.add(at[order], places, order)
        counts.append(len(at))
    frame = rows.frame(given, _repeated(scans, counts))
    cuts = zip(scans, pairwise(np.cumsum([0, *counts]).tolist()), strict=True)
    starts = {uid: rows.starts[slice(*cut)] for uid, cut in cuts}
    outside = tuple(line for _, line in sorted(strays))
    return PlannedRows(_add_nodules(frame, source, parameters.match), starts, outside)


def _repeated(names: Iterable[str], counts: Sequence[int]) -> pd.Categorical:
    """Each name so many times; the categories ascending."""
    given = list(names)
    categories = sorted(given)
    place = {name: number for number, name in enumerate(categories)}
    codes = np.array([place[name] for name in given], dtype=np.int32)
    return pd.Categorical.from_codes(np.repeat(codes, counts), pd.Index(categories, dtype="str"))


class _Filled:
    """Columns of the manifest that are filled scan by scan; as narrow as the format has them."""

    def __init__(self, count: int, *, resampled: bool) -> None:
        self._count = 0
        self._candidate = np.empty(count, dtype=np.int64)
        self._center = np.empty((count, 3), dtype=np.int32)
        self._start = np.empty((count, 3), dtype=np.int32)
        self._padded = np.empty(count, dtype=bool)
        self._first, self._in_crop = (np.empty((count if resampled else 0, 3)) for _ in range(2))
        self._resampled = resampled

    def add(self, candidates: npt.NDArray[np.int64], places: _Places, order: npt.NDArray[np.int64]) -> None:
        """Append the crops of one scan."""
        end = self._count + len(order)
        rows = slice(self._count, end)
        self._candidate[rows] = candidates
        self._center[rows], self._start[rows] = places.center[order], places.start[order]
        self._padded[rows] = places.is_padded[order]
        if places.first is not None and places.in_crop is not None:
            self._first[rows], self._in_crop[rows] = places.first[order], places.in_crop[order]
        self._count = end

    @property
    def starts(self) -> npt.NDArray[Any]:
        """Places of the crops' first voxels."""
        return self._first if self._resampled else self._start

    def frame(self, given: pd.DataFrame, uids: pd.Categorical) -> pd.DataFrame:
        """All columns that do not depend on annotations."""
        at = self._candidate[: self._count]
        columns: dict[str, Any] = {"series_uid": uids}
        columns |= {name: given[name].to_numpy()[at] for name in ("candidate_id", *XYZ, "is_nodule")}
        columns["is_padded"] = self._padded[: self._count]
        for names, places in ((CENTER, self._center), (START, self._start)):
            columns |= {name: places[: self._count, axis] for axis, name in enumerate(names)}
        if self._resampled:
            columns |= {name: self._in_crop[: self._count, axis] for axis, name in enumerate(CROP_CENTER)}
        return pd.DataFrame(columns, copy=False)


def _places(xyz: npt.NDArray[np.float64], center: npt.NDArray[np.int64], scan: Scan, parameters: Parameters) -> _Places:
    """Places of a scan's crops; those with a spacing of their own lie around the exact centre."""
    grid, shape = scan.geometry, parameters.crop_shape
    if parameters.resample_mm is None:
        start = window_starts(center, grid.shape_irc, shape, parameters.edge)
        return _Places(center, start, is_padded(start, grid.shape_irc, shape))
    exact, step = grid.xyz_to_irc(xyz), step_of(parameters.resample_mm, grid.spacing_irc)
    first = sample_starts(exact, grid.shape_irc, shape, step, parameters.edge)
    padded = is_sample_padded(first, grid.shape_irc, shape, step)
    return _Places(center, np.rint(first).astype(np.int64), padded, first, (exact - first) / np.array(step))


def _outside_line(row: "pd.Series[Any]", center: npt.NDArray[np.int64], scan: Scan) -> str:
    return (
        f"candidate {row['candidate_id']} of series {row['series_uid']}: its centre ({row['x_mm']:.1f}, "
        f"{row['y_mm']:.1f}, {row['z_mm']:.1f}) mm is voxel {tuple(center.tolist())}, outside the scan's "
        f"{scan.geometry.shape_irc}; left out. Check that the candidates belong to this scan"
    )


def _add_nodules(rows: pd.DataFrame, source: SourceData, rule: str) -> pd.DataFrame:
    """Add diameter_mm, annotation_id, patient_id, and what is said of the nodule: malignancy and subtype."""
    annotations = source.annotations
    match = match_annotations(rows, annotations, rule)
    missing = match < 0
    said = opinions(annotations, source.malignancy)
    # row -1, for a candidate without a nodule, is the last: that of nothing
    diameter = np.append(annotations["diameter_mm"].to_numpy(dtype=np.float64), np.nan)
    number = np.append(annotations["annotation_id"].to_numpy(dtype=np.int64), 1)
    malignant = said["is_malignant"].array
    is_true = np.append(malignant.to_numpy(dtype=bool, na_value=False), False)
    is_unknown = np.append(malignant.isna(), True)
    columns: dict[str, Any] = {
        "diameter_mm": diameter[match],
        "annotation_id": pd.arrays.IntegerArray(number[match], missing),
        "is_malignant": pd.arrays.BooleanArray(is_true[match], is_unknown[match]),
        "patient_id": of_series(rows["series_uid"], source.patients),
    }
    if "subtype" in annotations:
        columns["subtype"] = _coded(annotations["subtype"].to_numpy(dtype=object), match)
    votes = said["malignancy_votes"].to_numpy(dtype=object)
    if any(votes):
        means = [float(np.mean([int(k) for k in text.split(",")])) if text else np.nan for text in votes]
        columns |= {"malignancy_mean": np.array([*means, np.nan])[match], "malignancy_votes": _coded(votes, match)}
    return rows.assign(**columns)


def of_series(uids: "pd.Series[Any]", said: Mapping[str, str]) -> pd.Categorical:
    """For each row what is said of its series, None where nothing is."""
    codes, names = series_codes(uids)
    return _coded(np.array([*(said.get(name) for name in names), None], dtype=object)[:-1], codes)


def _coded(texts: npt.NDArray[Any], rows: npt.NDArray[np.integer[Any]]) -> pd.Categorical:
    """The text of each row, by its place among the texts; -1: none."""
    known: Any = pd.Categorical(texts)
    codes: Any = np.append(known.codes, known.codes.dtype.type(-1))[rows]
    return pd.Categorical.from_codes(codes, dtype=known.dtype)


def opinions(annotations: pd.DataFrame, malignancy: pd.DataFrame | None) -> pd.DataFrame:
    """What is said of each annotation by the nearest labelled nodule in whose radius it lies.

    Returns
    -------
    DataFrame
        `is_malignant` (boolean) and `malignancy_votes` (text or None), a row for each annotation; null without one.
    """
    malignant = pd.array([pd.NA] * len(annotations), dtype="boolean")
    votes = np.full(len(annotations), None, dtype=object)
    if malignancy is not None and not malignancy.empty:
        match = match_annotations(annotations, malignancy, "radius")
        hit = match >= 0
        malignant[hit] = malignancy["is_malignant"].to_numpy()[match[hit]]
        if "malignancy_votes" in malignancy:
            votes[hit] = malignancy["malignancy_votes"].to_numpy(dtype=object)[match[hit]]
    return pd.DataFrame({"is_malignant": malignant, "malignancy_votes": pd.Series(votes, dtype=object)})


def built_rows(planned: pd.DataFrame, receipts: Sequence[Receipt]) -> pd.DataFrame:
    """The rows as built: those of scans that failed are gone, and each has its place and checksum.

    Parameters
    ----------
    planned : DataFrame
        As `plan_rows` gives it, with the `unit` of each row.
    receipts : sequence of Receipt
        Of each unit.
    """
    failed = [scan.series_uid for receipt in receipts for scan in receipt.scans if scan.status != "ok"]
    rows = planned[~planned["series_uid"].isin(failed)].reset_index(drop=True) if failed else planned
    counts = np.bincount(rows["unit"], minlength=len(receipts))
    for receipt, count in zip(receipts, counts.tolist(), strict=True):
        assert count == receipt.rows, f"{receipt.shard_id}: {receipt.rows} crops for {count} rows"
    ids = [receipt.shard_id for receipt in receipts]
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return rows.assign(
        shard_id=pd.Categorical.from_codes(rows["unit"].to_numpy(), pd.Index(ids, dtype="str")),
        shard_row=(np.arange(len(rows)) - first).astype(np.int32),
        xxh3=np.concatenate([np.zeros(0, dtype=np.uint64), *map(_digests, receipts)]),
    )


def _digests(receipt: Receipt) -> npt.NDArray[np.uint64]:
    """XXH3-64 of each crop of a shard."""
    return np.frombuffer(bytes.fromhex("".join(receipt.crop_xxh3)), dtype=">u8").astype(np.uint64)


def series_splits(
    annotations: pd.DataFrame, patients: Mapping[str, str], series_uids: Sequence[str], val_stride: int
) -> dict[str, str]:
    """``split_series`` of each series.

    Parameters
    ----------
    annotations : DataFrame
        For the largest nodule of each series.
    patients : mapping of str to str
        Patient of each series, where known.
    series_uids : sequence of str
        All series in the store, those without a candidate too.
    val_stride : int
        Every how many-th patient validates.
    """
    return split_by_series(largest_nodules(series_uids, annotations), patients, val_stride)


def complete_rows(rows: pd.DataFrame, splits: Mapping[str, str], val_stride: int) -> pd.DataFrame:
    """Add fold, size_rank and the splits, which depend on all rows together.

    Parameters
    ----------
    rows : DataFrame
        All rows of the manifest.
    splits : mapping of str to str
        As `series_splits` gives it.
    val_stride : int
        Every how many-th candidate validates.
    """
    rank = np.empty(len(rows), dtype=np.int64)
    rank[size_order(rows)] = np.arange(len(rows))
    return rows.assign(
        fold=rows["subset"],
        size_rank=rank,
        split_series=of_series(rows["series_uid"], splits),
        split_candidate=split_by_rank(rank, val_stride),
    )


def scan_row(
    found: FoundScan, record: ScanRecord, job: ScanJob | None, source: SourceData, crop_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """One row of scans.parquet; `job` is None where not even the header could be read."""
    scan = job.scan if job else None
    is_drawn = bool(job and record.lungs and any(nodule.drawn for nodule in job.nodules))
    row: dict[str, Any] = {
        "series_uid": found.series_uid,
        "patient_id": source.patients.get(found.series_uid),
        "subset": found.subset,
        "status": record.status,
        "reason": record.reason,
        "file": found.path.relative_to(source.root).as_posix(),
        "data_bytes": record.data_bytes,
        "data_xxh3": record.data_xxh3,
        "hu_min": record.hu_min,
        "hu_max": record.hu_max,
        "clipped_share": record.clipped_share,
        "num_crops": record.num_crops,
        "study_uid": source.studies.get(found.series_uid),
        "mask_source": schema.MASK_SOURCES[0] if is_drawn else None,
        "lung_box": list(record.lungs.box) if record.lungs and record.lungs.box else None,
    }
    names = ("num_slices", "num_rows", "num_cols")
    shape = scan.geometry.shape_irc if scan else (None, None, None)
    row |= dict(zip(names, shape, strict=True))
    row |= {name: list(getattr(scan.geometry, name)) if scan else None for name in ("spacing", "origin", "direction")}
    steps = (job.step_irc if job else None) or (1.0, 1.0, 1.0)
    spans = [side * step for side, step in zip(crop_shape, steps, strict=True)]
    row["is_thin"] = any(n < span for n, span in zip(scan.geometry.shape_irc, spans, strict=True)) if scan else None
    volume = record.volume
    row["volume_file"] = volume.file if volume else None
    row["volume_bytes"] = volume.bytes if volume else None
    row["volume_sha256"] = volume.sha256 if volume else None
    row["volume_chunk_xxh3"] = [int(value, 16) for value in volume.chunk_xxh3] if volume else None
    return row
