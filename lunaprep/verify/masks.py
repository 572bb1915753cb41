"""What masks hold: zeros and ones, a nodule where the tables say that one is, and the same in slab and volume."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep import schema
from lunaprep.verify.findings import Findings
from lunaprep.verify.places import open_plain
from lunaprep.verify.record import Record, ShardRecord
from lunaprep.verify.structure import datasets_of, stored_chunks
from lunaprep.verify.tables import Manifest
from lunaprep.verify.values import continuous_irc

Voxels = npt.NDArray[np.uint8]

REACH_MM = 1.0
"""How far beyond its annotated sphere a nodule's mask may reach; or half a voxel, where that is more."""

DRAWN_RADII = 4.0
"""How far from its centre a mask that readers drew may reach, in radii: of a spindle eight times longer than wide."""

SLACK = 1e-6
MOST_SCANS = 4
"""Scans looked at at once; both masks of each are in memory, 65 MB a mask of 512 × 512 × 250."""


def check_masks(
    store: Path, record: Record, scans: list[dict[str, Any]], slabs: Manifest | None, here: set[str], found: Findings
) -> None:
    """Look at the masks of all volumes and slabs, a few scans at a time.

    Parameters
    ----------
    store, record : Path, Record
        The store and its store.json.
    scans : list of dict
        The good rows of scans.parquet.
    slabs : Manifest, optional
        slabs.parquet, if there.
    here : set of str
        Files that are there and of their size; others are passed over.
    found : Findings
        Where problems go. What can't be read was told by structure and checksums, and is passed over.
    """
    masks = {shard.id: shard for shard in record.masks if shard.file in here}
    rows_of = _rows_by_scan(slabs, scans) if slabs is not None else [[] for _ in scans]

    def check(scan: dict[str, Any], rows: list[int]) -> Findings:
        own, nodules = Findings(), None
        if scan["volume_file"] in here and len(datasets_of(scan)) > 1:
            nodules = _check_volume(store, scan, own)
        if slabs is not None:
            _check_slabs(store, scan, slabs, rows, masks, nodules, own)
        return own

    with ThreadPoolExecutor(min(MOST_SCANS, os.cpu_count() or 1)) as pool:
        for own in pool.map(check, scans, rows_of):
            found.absorb(own)


def _rows_by_scan(slabs: Manifest, scans: list[dict[str, Any]]) -> list[list[int]]:
    codes = slabs.texts["series_uid"].recode({scan["series_uid"]: k for k, scan in enumerate(scans)})
    return [np.flatnonzero(codes == k).tolist() for k in range(len(scans))]


def _check_volume(store: Path, scan: dict[str, Any], found: Findings) -> Voxels | None:
    """Check both masks of a volume; return that of the nodules."""
    masks = {}
    place, uid = scan["volume_file"], scan["series_uid"]
    for name in schema.VOLUME_DATASETS[1:]:
        mask = read_mask(store, scan, name)
        if mask is None:
            return None
        if mask.max(initial=0) > 1:
            found.error("mask-value", place, f"/{name} holds {mask.max()}, expected 0 and 1 alone", series_uid=uid)
        masks[name] = mask
    box = _box_of(masks[schema.LUNG_MASK_DATASET])
    if box != scan["lung_box"]:
        message = f"the lungs lie in {box}, scans.parquet has lung_box {scan['lung_box']}"
        found.error("mask-differs", place, message, series_uid=uid)
    return masks[schema.NODULE_MASK_DATASET]


def read_mask(store: Path, scan: dict[str, Any], name: str) -> Voxels | None:
    """A mask of a volume, unpacked within bounds; None where it can't be read."""
    shape = tuple(scan[side] for side in ("num_slices", "num_rows", "num_cols"))
    out = np.zeros(shape, dtype=np.uint8)
    uniform: dict[bytes, int] = {}  # most chunks are all 0 or all 1: unpacked once each
    try:
        for first, chunk, stored in stored_chunks(store, scan["volume_file"], name, datasets_of(scan)):
            part = out[tuple(slice(f, f + c) for f, c in zip(first, chunk, strict=True))]
            if stored not in uniform:
                size = int(np.prod(chunk))
                plain = zlib.decompressobj().decompress(stored, size)
                values = np.frombuffer(plain, np.uint8, size).reshape(chunk)
                if values.min() != values.max():
                    part[...] = values[tuple(slice(0, side) for side in part.shape)]
                    continue
                uniform[stored] = int(values.flat[0])
            if uniform[stored]:
                part[...] = uniform[stored]
    except Exception:
        return None
    return out


def _box_of(mask: Voxels) -> list[int] | None:
    low, high = [], []
    for axis in range(3):
        held = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        if not len(held):
            return None
        low.append(int(held[0]))
        high.append(int(held[-1]) + 1)
    return low + high


def _check_slabs(
    store: Path,
    scan: dict[str, Any],
    slabs: Manifest,
    rows: list[int],
    masks: dict[str, ShardRecord],
    nodules: Voxels | None,
    found: Findings,
) -> None:
    """Check the slabs' masks of one scan; `nodules` is its volume's mask, if there."""
    places = _annotated(scan, slabs, rows)
    seen: set[int] = set()
    whole = True
    for k in rows:
        mask = _read_slab(store, masks.get(str(slabs.texts["shard_id"][k])), int(slabs.numbers["shard_row"][k]))
        if mask is None:
            whole = False
            continue
        place, whose = f"{schema.SLABS_DIR}/{slabs.texts['shard_id'][k]}.masks.h5", slabs.crop(k)
        if mask.max() > 1:
            found.error("mask-value", place, f"holds {mask.max()}, expected 0 and 1 alone", **whose)
        voxels, said = int(np.count_nonzero(mask[len(mask) // 2])), int(slabs.numbers["num_mask_voxels"][k])
        if voxels != said:
            message = f"{voxels} nodule voxels in its middle slice, slabs.parquet has {said}"
            found.error("mask-differs", place, message, **whose)
        start = [int(slabs.numbers[f"start_{axis}"][k]) for axis in ("index", "row", "col")]
        radii = DRAWN_RADII if scan["mask_source"] else 1.0
        outside, met = _against_spheres(mask, start, places, scan["spacing"], radii)
        seen |= met
        if outside:
            message = f"{outside} voxels lie beyond {radii:g} radii and {REACH_MM} mm of every annotated nodule"
            found.error("mask-differs", place, message, **whose)
        if nodules is not None and not np.array_equal(mask, _box(nodules, start)):
            found.error("mask-differs", place, f"isn't the volume's /{schema.NODULE_MASK_DATASET} there", **whose)
    for number in places.keys() - seen if whole else ():
        message = f"no mask of a slab has a voxel in nodule {number}"
        found.error("mask-differs", schema.SLABS_FILE, message, series_uid=scan["series_uid"])


def _annotated(
    scan: dict[str, Any], slabs: Manifest, rows: list[int]
) -> dict[int, tuple[npt.NDArray[np.float64], float]]:
    """Centre (voxels) and radius (mm) of each annotated nodule of a scan."""
    numbers = slabs.numbers
    centres = continuous_irc([scan], slabs, np.zeros(slabs.num_rows, dtype=np.int64)) if rows else np.empty((0, 3))
    ids = numbers["annotation_id"]
    return {int(ids[k]): (centres[k], float(numbers["diameter_mm"][k]) / 2) for k in rows if ids[k] >= 0}


def _read_slab(store: Path, shard: ShardRecord | None, row: int) -> Voxels | None:
    if shard is None or not 0 <= row < shard.rows:
        return None
    try:
        descriptor = open_plain(store, str(shard.file))
        try:
            data = os.pread(descriptor, shard.crop_bytes, schema.DATA_OFFSET + row * shard.crop_bytes)
        finally:
            os.close(descriptor)
        return np.frombuffer(data, np.uint8).reshape(shard.crop_shape)
    except Exception:
        return None


def _against_spheres(
    mask: Voxels,
    start: list[int],
    places: dict[int, tuple[npt.NDArray[np.float64], float]],
    spacing: list[float],
    radii: float,
) -> tuple[int, set[int]]:
    """How many voxels lie outside all nodules' reach, so many radii, and which nodules have one within these."""
    voxels = np.argwhere(mask) + start
    mm = np.array(spacing[::-1])
    outside = np.ones(len(voxels), dtype=bool)
    met: set[int] = set()
    for number, (centre, one_radius) in places.items():
        radius = radii * one_radius
        offset = (voxels - centre) * mm
        reach = radius + np.maximum(REACH_MM, mm / 2)
        nearest = (np.rint(centre) == voxels).all(axis=1)  # of a nodule smaller than a voxel
        outside &= (((offset / reach) ** 2).sum(axis=1) > 1 + SLACK) & ~nearest
        if (((offset**2).sum(axis=1) <= radius**2 * (1 + SLACK)) | nearest).any():
            met.add(number)
    return int(outside.sum()), met


def _box(mask: Voxels, start: list[int]) -> Voxels:
    """The box of a slab out of a volume's mask; zeros outside."""
    out = np.zeros(schema.SLAB_SHAPE, dtype=np.uint8)
    low = np.maximum(start, 0)
    high = np.minimum(np.add(start, schema.SLAB_SHAPE), mask.shape)
    if (low < high).all():
        target = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        out[target] = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return out
