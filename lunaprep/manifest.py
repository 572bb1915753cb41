"""The rows of the store's two tables: planned from the inputs, completed when the shards are there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep import schema
from lunaprep.candidates import XYZ, match_annotations, size_order
from lunaprep.crops import is_padded, is_sample_padded, sample_starts, step_of, window_starts
from lunaprep.parameters import Parameters
from lunaprep.scans.scan import Scan
from lunaprep.shard_plan import ScanJob
from lunaprep.sources.source import FoundScan, SourceData
from lunaprep.splits import largest_nodules, split_by_rank, split_by_series
from lunaprep.store.receipt import Receipt, ScanRecord

START = ("start_index", "start_row", "start_col")
CENTER = ("index", "row", "col")
FIRST = ("first_index", "first_row", "first_col")
"""Exact place of a resampled crop's first voxel in its scan; not kept in the table, as `CROP_CENTER` tells it too."""

CROP_CENTER = ("center_index", "center_row", "center_col")


def plan_rows(
    source: SourceData, parameters: Parameters, scans: Mapping[str, Scan]
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Rows of the manifest of all candidates of readable scans, and a line for each that lies outside its scan."""
    rows = source.candidates[source.candidates["series_uid"].isin(list(scans))].reset_index(drop=True)
    center = np.zeros((len(rows), 3), dtype=np.int64)
    start = np.zeros((len(rows), 3), dtype=np.int64)
    padded = np.zeros(len(rows), dtype=bool)
    inside = np.zeros(len(rows), dtype=bool)
    xyz = rows[list(XYZ)].to_numpy()
    for series_uid, members in rows.groupby("series_uid").indices.items():
        grid = scans[str(series_uid)].geometry
        center[members] = grid.nearest_irc(xyz[members])
        inside[members] = grid.contains_irc(center[members])
        start[members] = window_starts(center[members], grid.shape_irc, parameters.crop_shape, parameters.edge)
        padded[members] = is_padded(start[members], grid.shape_irc, parameters.crop_shape)
    outside = tuple(
        _outside_line(rows.iloc[i], center[i], scans[rows["series_uid"].iloc[i]]) for i in np.flatnonzero(~inside)
    )
    columns: dict[str, Any] = {name: center[:, axis] for axis, name in enumerate(CENTER)}
    columns |= {name: start[:, axis] for axis, name in enumerate(START)}
    rows = rows.assign(is_padded=padded, **columns)[inside].reset_index(drop=True)
    if parameters.resample_mm is not None:
        rows = _resampled(rows, parameters, scans)
    return _add_nodules(rows, source, parameters.match), outside


def _resampled(rows: pd.DataFrame, parameters: Parameters, scans: Mapping[str, Scan]) -> pd.DataFrame:
    """Rows of crops with a spacing of their own: around the exact centre, `START` the voxel nearest to their first."""
    assert parameters.resample_mm is not None
    first, at, padded = np.zeros((len(rows), 3)), np.zeros((len(rows), 3)), np.zeros(len(rows), dtype=bool)
    xyz, shape = rows[list(XYZ)].to_numpy(dtype=np.float64), parameters.crop_shape
    for series_uid, members in rows.groupby("series_uid").indices.items():
        grid = scans[str(series_uid)].geometry
        center, step = grid.xyz_to_irc(xyz[members]), step_of(parameters.resample_mm, grid.spacing_irc)
        first[members] = sample_starts(center, grid.shape_irc, shape, step, parameters.edge)
        at[members] = (center - first[members]) / np.array(step)
        padded[members] = is_sample_padded(first[members], grid.shape_irc, shape, step)
    columns: dict[str, Any] = {name: first[:, axis] for axis, name in enumerate(FIRST)}
    columns |= {name: np.rint(first[:, axis]).astype(np.int64) for axis, name in enumerate(START)}
    columns |= {name: at[:, axis] for axis, name in enumerate(CROP_CENTER)}
    return rows.assign(is_padded=padded, **columns)


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
    hit = match >= 0
    safe = np.where(hit, match, 0)
    diameter = np.full(len(rows), np.nan)
    annotation_id = pd.array([pd.NA] * len(rows), dtype="Int64")
    malignant = pd.array([pd.NA] * len(rows), dtype="boolean")
    subtype, votes = (np.full(len(rows), None, dtype=object) for _ in range(2))
    if hit.any():
        diameter[hit] = annotations["diameter_mm"].to_numpy()[safe[hit]]
        annotation_id[hit] = annotations["annotation_id"].to_numpy()[safe[hit]]
        said = opinions(annotations, source.malignancy)
        malignant[hit] = said["is_malignant"].array[safe[hit]]
        votes[hit] = said["malignancy_votes"].to_numpy(dtype=object)[safe[hit]]
        if "subtype" in annotations:
            subtype[hit] = annotations["subtype"].to_numpy(dtype=object)[safe[hit]]
    return rows.assign(
        diameter_mm=diameter,
        annotation_id=annotation_id,
        is_malignant=malignant,
        subtype=subtype,
        malignancy_mean=[np.mean([int(k) for k in text.split(",")]) if text else np.nan for text in votes],
        malignancy_votes=votes,
        patient_id=rows["series_uid"].map(source.patients).astype(object),
    )


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


def built_rows(planned: pd.DataFrame, receipt: Receipt) -> pd.DataFrame:
    """The rows of one shard as built: those of scans that failed are gone, and each has its place and checksum."""
    done = {scan.series_uid for scan in receipt.scans if scan.status == "ok"}
    rows = planned[planned["series_uid"].isin(done)].reset_index(drop=True)
    assert len(rows) == receipt.rows, f"{receipt.shard_id}: {receipt.rows} crops for {len(rows)} rows"
    xxh3 = np.array([int(value, 16) for value in receipt.crop_xxh3], dtype=np.uint64)
    return rows.assign(shard_id=receipt.shard_id, shard_row=np.arange(len(rows), dtype=np.int32), xxh3=xxh3)


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
        split_series=rows["series_uid"].map(dict(splits)).astype(object),
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
