"""Which slabs a store gets: around every annotated nodule, and at some of the places that are none.

The book shows its segmentation network nodules only; what it is never shown, it marks. The negatives here are
candidates of class 0: the places a detector has already taken for nodules.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xxhash

from lunaprep import schema
from lunaprep.candidates import XYZ, match_annotations
from lunaprep.crops import is_padded, window_starts
from lunaprep.manifest import CENTER, START
from lunaprep.masks import MARGIN_MM, DrawnMask, Nodule
from lunaprep.parameters import Parameters
from lunaprep.scans.scan import Scan
from lunaprep.sources.source import SourceData
from lunaprep.store.receipt import Receipt

MOST_SLICES = 5
"""Slabs of one nodule: neighbours differ little."""

USUAL_SLICE_MM = 1.5
"""Slice spacing by which the nodules' slabs are counted in advance (LUNA16: 0.45 to 2.5, median 1.25)."""

CLEAR_MM = MARGIN_MM + 1.0
"""How far outside every annotated nodule a negative must lie."""


def scan_nodules(
    annotations: pd.DataFrame, scans: Mapping[str, Scan], drawn: Mapping[int, DrawnMask]
) -> dict[str, dict[int, Nodule]]:
    """Annotated nodules by series and annotation_id; those whose centre voxel lies outside their scan are left out."""
    found: dict[str, dict[int, Nodule]] = {uid: {} for uid in scans}
    columns = ["series_uid", "annotation_id", "diameter_mm", *XYZ]
    for uid, number, diameter, *xyz in annotations[columns].itertuples(index=False):
        if uid in scans and scans[uid].geometry.contains_irc(scans[uid].geometry.nearest_irc(xyz)):
            i, r, c = scans[uid].geometry.xyz_to_irc(xyz).tolist()
            found[uid][int(number)] = Nodule((i, r, c), float(diameter), drawn.get(int(number)))
    return found


def plan_slabs(
    source: SourceData,
    parameters: Parameters,
    scans: Mapping[str, Scan],
    nodules: Mapping[str, Mapping[int, Nodule]],
    rows: pd.DataFrame,
) -> pd.DataFrame:
    """Rows of slabs.parquet as far as they are known before a voxel is read.

    Parameters
    ----------
    source, parameters, scans
        Tables, options, and the readable scans by series.
    nodules : mapping
        As `scan_nodules` gives it.
    rows : DataFrame
        The manifest's planned rows, of which the negatives are chosen.
    """
    parts = [_positives(source, scans, nodules), _negatives(source, parameters, rows)]
    slabs = pd.concat(parts, ignore_index=True).astype({"annotation_id": "Int64", "candidate_id": "Int64"})
    center = slabs[list(CENTER)].to_numpy(dtype=np.int64)
    start, padded = np.zeros_like(center), np.zeros(len(slabs), dtype=bool)
    for uid, at in slabs.groupby("series_uid").indices.items():
        shape = scans[str(uid)].geometry.shape_irc
        start[at] = window_starts(center[at], shape, schema.SLAB_SHAPE, parameters.edge)
        padded[at] = is_padded(start[at], shape, schema.SLAB_SHAPE)
    return slabs.assign(is_padded=padded, **{name: start[:, axis] for axis, name in enumerate(START)})


def nodule_slices(center: float, radius: float, spacing: float, num_slices: int) -> list[int]:
    """Slices around which a nodule's slabs lie: those its sphere meets, at most `MOST_SLICES`, spread evenly.

    Parameters
    ----------
    center : float
        Its centre, in slices.
    radius, spacing : float
        Its radius, and the distance of slices, mm.
    num_slices : int
        Slices of the scan; the slice nearest to the centre must be one of them.

    Returns
    -------
    list of int
        Ascending; always holds the slice nearest to the centre.

    Examples
    --------
    >>> nodule_slices(10.2, 3.0, 1.0, 40), nodule_slices(10.2, 8.0, 1.0, 40), nodule_slices(0.3, 0.2, 2.5, 40)
    ([8, 9, 10, 11, 12], [3, 7, 10, 14, 18], [0])
    """
    nearest = round(center)
    low = max(min(int(np.ceil(center - radius / spacing)), nearest), 0)
    high = min(max(int(np.floor(center + radius / spacing)), nearest), num_slices - 1)
    if high - low < MOST_SLICES:
        return list(range(low, high + 1))
    spread = np.rint(np.linspace(low, high, MOST_SLICES)).astype(int)
    spread[np.argmin(np.abs(spread - nearest))] = nearest
    return sorted(set(spread.tolist()))


def _positives(
    source: SourceData, scans: Mapping[str, Scan], nodules: Mapping[str, Mapping[int, Nodule]]
) -> pd.DataFrame:
    """A row for each slab around a nodule."""
    ids = source.annotations["annotation_id"].tolist()
    xyz_of = dict(zip(ids, source.annotations[list(XYZ)].to_numpy(dtype=np.float64).tolist(), strict=True))
    rows: list[dict[str, Any]] = []
    for uid, mine in nodules.items():
        geometry = scans[uid].geometry
        for number, nodule in mine.items():
            xyz = dict(zip(XYZ, xyz_of[number], strict=True))
            _, row, col = geometry.nearest_irc(xyz_of[number]).tolist()
            radius, spacing = nodule.diameter_mm / 2, geometry.spacing[2]
            rows += [
                {"series_uid": uid, "annotation_id": number, "candidate_id": None, **xyz, "index": index, "row": row}
                | {"col": col, "diameter_mm": nodule.diameter_mm}
                for index in nodule_slices(nodule.center_irc[0], radius, spacing, geometry.shape_irc[0])
            ]
    names = ["series_uid", "annotation_id", "candidate_id", *XYZ, *CENTER, "diameter_mm"]
    kinds = dict.fromkeys(("annotation_id", "candidate_id"), "Int64") | dict.fromkeys((*XYZ, "diameter_mm"), "float64")
    kinds |= dict.fromkeys(CENTER, "int64")
    return pd.DataFrame(rows, columns=names).astype(kinds)


def _negatives(source: SourceData, parameters: Parameters, rows: pd.DataFrame) -> pd.DataFrame:
    """The chosen candidates that are no nodules, clear of every annotated one.

    Each candidate has a number of its own between 0 and 1, from its series and id; chosen are those below a share
    that the tables alone decide: whichever scans are on disk, fail or come later, the choice stays.
    """
    expected = parameters.slab_negatives * float(expected_positives(source.annotations["diameter_mm"]).sum())
    share = expected / max(1, int((~source.candidates["is_nodule"]).sum()))
    chosen = rows[~rows["is_nodule"] & (lots(rows["series_uid"], rows["candidate_id"]) < share)]
    wide = source.annotations.assign(diameter_mm=source.annotations["diameter_mm"] + 2 * CLEAR_MM)
    chosen = chosen[match_annotations(chosen, wide, "radius") < 0]
    return chosen[["series_uid", "candidate_id", *XYZ, *CENTER]].assign(annotation_id=None, diameter_mm=np.nan)


def expected_positives(diameter_mm: "pd.Series[float]") -> npt.NDArray[np.float64]:
    """About how many slabs each annotated nodule gives, whatever its scan's spacing."""
    return np.asarray(np.clip(np.rint(diameter_mm.to_numpy(dtype=np.float64) / USUAL_SLICE_MM), 1, MOST_SLICES))


def lots(series_uid: "pd.Series[str]", candidate_id: "pd.Series[int]") -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each candidate, as good as random, the same on every machine (SplitMix64's mixing)."""
    codes, names = pd.factorize(series_uid)
    seeds = np.array([xxhash.xxh3_64_intdigest(str(name).encode()) for name in names], dtype=np.uint64)
    mixed = seeds[codes] ^ candidate_id.to_numpy(dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53)


def slab_order(slabs: pd.DataFrame, unit: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Order of the rows: unit, series, start; then nodules before negatives, and ids."""
    keys: list[Any] = [slabs["candidate_id"].fillna(-1), slabs["annotation_id"].fillna(1 << 62)]
    keys += [slabs[name] for name in reversed((*START, "index"))]
    keys = [key.to_numpy(dtype=np.int64) for key in keys]
    return np.asarray(np.lexsort([*keys, slabs["series_uid"].to_numpy(), np.asarray(unit)]))


def built_slabs(planned: pd.DataFrame, receipt: Receipt) -> pd.DataFrame:
    """The slabs of one work unit as built: those of scans that failed are gone, each has its place and checksums."""
    slabs = receipt.slabs
    assert slabs is not None
    done = {scan.series_uid for scan in receipt.scans if scan.status == "ok"}
    rows = planned[planned["series_uid"].isin(done)].reset_index(drop=True)
    assert len(rows) == slabs.rows, f"{slabs.shard_id}: {slabs.rows} slabs for {len(rows)} rows"
    voxels = np.array(slabs.mask_voxels, dtype=np.int32)
    return rows.assign(
        shard_id=slabs.shard_id,
        shard_row=np.arange(len(rows), dtype=np.int32),
        xxh3=np.array([int(value, 16) for value in slabs.slab_xxh3], dtype=np.uint64),
        mask_xxh3=np.array([int(value, 16) for value in slabs.mask_xxh3], dtype=np.uint64),
        num_mask_voxels=voxels,
        is_positive=voxels > 0,
    )


def complete_slabs(slabs: pd.DataFrame, crops: pd.DataFrame, scans: pd.DataFrame, splits: Mapping[str, str]) -> Any:
    """Add what follows from the other tables: subset, fold, patient, splits, and the candidate of each nodule.

    Parameters
    ----------
    slabs : DataFrame
        All rows, in shard order.
    crops, scans : DataFrame
        The store's other two tables.
    splits : mapping of str to str
        ``split_series`` of each series.
    """
    nodules = crops[crops["is_nodule"] & crops["annotation_id"].notna()]
    first = nodules.groupby("annotation_id")["candidate_id"].min()
    own = slabs["annotation_id"].map(first).astype("Int64")
    candidate = slabs["candidate_id"].where(slabs["annotation_id"].isna(), own).astype("Int64")
    by_series = scans.set_index("series_uid")
    subset = slabs["series_uid"].map(by_series["subset"]).astype("int64")
    split = slabs["series_uid"].map(dict(splits)).astype(object)
    by_candidate = candidate.map(crops.set_index("candidate_id")["split_candidate"]).astype(object)
    return slabs.assign(
        candidate_id=candidate,
        subset=subset,
        fold=subset,
        patient_id=slabs["series_uid"].map(by_series["patient_id"]).astype(object),
        split_series=split,
        split_candidate=by_candidate.where(by_candidate.notna(), split).astype(object),
    )
