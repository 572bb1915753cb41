"""What masks hold: zeros and ones, a nodule where the tables say that one is, and the same in slab and volume."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep import schema
from lunaprep.verify.findings import Findings
from lunaprep.verify.hashing import Meter
from lunaprep.verify.places import open_plain
from lunaprep.verify.record import Record, ShardRecord
from lunaprep.verify.structure import datasets_of, stored_chunks, unpack
from lunaprep.verify.tables import Manifest
from lunaprep.verify.values import continuous_irc

Voxels = npt.NDArray[np.uint8]
Places = dict[int, tuple[npt.NDArray[np.float64], float]]
"""Centre, in voxels, and radius, in mm, of nodules by their annotation_id."""

Chunk = tuple[tuple[int, ...], tuple[int, ...], bytes]
"""First voxel, shape and stored bytes: of a volume's mask only what isn't background is kept, and packed."""

REACH_MM = 1.0
"""How far beyond its annotated sphere a nodule's mask may reach; or half a voxel, where that is more."""

DRAWN_RADII = 4.0
"""How far from its centre a mask that readers drew may reach, in radii: of a spindle eight times longer than wide."""

SLACK = 1e-6
MOST_SCANS = 4
"""Scans looked at at once; a chunk of a mask of each is in memory, and the packed ones in which nodules lie."""


def mask_bytes(scans: list[dict[str, Any]], num_slabs: int) -> int:
    """What the masks of these scans' volumes, and of so many slabs, unpack to."""
    in_volumes = sum(
        (len(datasets_of(scan)) - 1) * math.prod(_sides(scan)) for scan in scans if scan["volume_file"] is not None
    )
    return in_volumes + num_slabs * math.prod(schema.SLAB_SHAPE)


def check_masks(
    store: Path,
    record: Record,
    scans: list[dict[str, Any]],
    slabs: Manifest | None,
    here: set[str],
    meter: Meter,
    found: Findings,
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
    meter : Meter
        Counts what the masks unpack to, `mask_bytes` in all.
    found : Findings
        Where problems go, and what structure and checksums told: of a file that they found fault with, masks that can't
        be read are passed over.
    """
    told = {finding.place for finding in found.as_tuple()}
    masks = {shard.id: shard for shard in record.masks if shard.file in here}
    rows_of: list[list[int]] = [[] for _ in scans]
    if slabs is not None and scans:
        scan_of = {scan["series_uid"]: k for k, scan in enumerate(scans)}
        rows_of = slabs.rows_by_scan(list(scan_of))
        centres = continuous_irc(scans, slabs, slabs.texts["series_uid"].recode(scan_of))

    def check(scan: dict[str, Any], rows: list[int]) -> Findings:
        own, nodules = Findings(), None
        if scan["volume_file"] in here and len(datasets_of(scan)) > 1:
            nodules = _check_volume(store, scan, own)
            if nodules is None and scan["volume_file"] not in told:
                message = "its masks can't be unpacked, though its checksums are right"
                own.error("mask-value", scan["volume_file"], message, series_uid=scan["series_uid"])
        if slabs is not None:
            places = _annotated(slabs, rows, centres)
            _check_slabs(scan, slabs, rows, places, partial(_read_slab, store, masks), nodules, own)
        meter.add_unpacked(mask_bytes([scan], len(rows)))
        return own

    with ThreadPoolExecutor(min(MOST_SCANS, os.cpu_count() or 1)) as pool:
        for own in pool.map(check, scans, rows_of):
            found.absorb(own)


def _check_volume(store: Path, scan: dict[str, Any], found: Findings) -> list[Chunk] | None:
    """Check both masks of a volume; return that of the nodules, or None where they can't be read."""
    place, names, sides = scan["volume_file"], schema.VOLUME_DATASETS[1:], _sides(scan)
    most, is_whole = dict.fromkeys(names, 0), True
    blank: set[bytes] = set()
    nodules: list[Chunk] = []
    try:
        slices, plane = np.zeros(sides[0], np.uint8), np.zeros(sides[1:], np.uint8)  # that the lungs meet
        for name, first, shape, stored in stored_chunks(store, place, names, datasets_of(scan)):
            if stored in blank:
                continue
            part = _unpack((first, shape, stored), sides)
            line = part.max(axis=(1, 2), initial=0)
            top = int(line.max(initial=0))
            most[name] = max(most[name], top)
            if not top and part.shape == shape:
                blank.add(stored)
            elif name == schema.NODULE_MASK_DATASET:
                nodules.append((first, shape, stored))
            else:
                i, r, c = (slice(f, f + side) for f, side in zip(first, part.shape, strict=True))
                slices[i] |= line
                plane[r, c] |= np.bitwise_or.reduce(part, axis=0)
    except Exception:
        is_whole = False
    for name in names:
        if most[name] > 1:
            message = f"/{name} holds {most[name]}, expected 0 and 1 alone"
            found.error("mask-value", place, message, series_uid=scan["series_uid"])
    if not is_whole:
        return None
    box = _box_of(slices, plane)
    if box != scan["lung_box"]:
        message = f"the lungs lie in {box}, scans.parquet has lung_box {scan['lung_box']}"
        found.error("mask-differs", place, message, series_uid=scan["series_uid"])
    return nodules


def _sides(scan: dict[str, Any]) -> tuple[int, int, int]:
    return scan["num_slices"], scan["num_rows"], scan["num_cols"]


def _unpack(chunk: Chunk, sides: tuple[int, int, int]) -> Voxels:
    """Values of a stored chunk, as far as it lies in the scan."""
    first, shape, stored = chunk
    size = math.prod(shape)
    values = np.frombuffer(unpack(stored, size), np.uint8, size).reshape(shape)
    return values[tuple(slice(max(0, side - f)) for f, side in zip(first, sides, strict=True))]


def _box_of(slices: Voxels, plane: Voxels) -> list[int] | None:
    """Start and stop of what meets these slices and, in one of them, this plane."""
    held = [np.flatnonzero(line) for line in (slices, plane.any(axis=1), plane.any(axis=0))]
    return [int(h[0]) for h in held] + [int(h[-1]) + 1 for h in held] if len(held[0]) else None


def _check_slabs(
    scan: dict[str, Any],
    slabs: Manifest,
    rows: list[int],
    places: Places,
    read: Callable[[str, int], Voxels | None],
    nodules: list[Chunk] | None,
    found: Findings,
) -> None:
    """Check the slabs' masks of one scan, at these `rows`, by the `places` of its nodules and by its volume's mask."""
    seen: set[int] = set()
    whole = True
    for k in rows:
        mask = read(str(slabs.texts["shard_id"][k]), int(slabs.numbers["shard_row"][k]))
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
        if nodules is not None and not np.array_equal(mask, _box(nodules, start, _sides(scan))):
            found.error("mask-differs", place, f"isn't the volume's /{schema.NODULE_MASK_DATASET} there", **whose)
    for number in places.keys() - seen if whole else ():
        message = f"no mask of a slab has a voxel in nodule {number}"
        found.error("mask-differs", schema.SLABS_FILE, message, series_uid=scan["series_uid"])


def _annotated(slabs: Manifest, rows: list[int], centres: npt.NDArray[np.float64]) -> Places:
    """Centre (voxels) and radius (mm) of each annotated nodule of a scan."""
    ids, diameters = slabs.numbers["annotation_id"], slabs.numbers["diameter_mm"]
    return {int(ids[k]): (centres[k], float(diameters[k]) / 2) for k in rows if ids[k] >= 0}


def _read_slab(store: Path, masks: dict[str, ShardRecord], shard_id: str, row: int) -> Voxels | None:
    shard = masks.get(shard_id)
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
    places: Places,
    spacing: list[float],
    radii: float,
) -> tuple[int, set[int]]:
    """How many voxels lie outside all nodules' reach, so many radii, and which nodules have one within these."""
    if not mask.any():
        return 0, set()
    voxels = np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), axis=1) + start
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


def _box(chunks: list[Chunk], start: list[int], sides: tuple[int, int, int]) -> Voxels:
    """The box of a slab out of a volume's mask; zeros outside."""
    out = np.zeros(schema.SLAB_SHAPE, dtype=np.uint8)
    for chunk in chunks:
        first, shape, _ = chunk
        low = [max(f, s) for f, s in zip(first, start, strict=True)]
        high = [min(f + n, s + m, e) for f, n, s, m, e in zip(first, shape, start, out.shape, sides, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            here = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            there = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first, strict=True))
            out[here] = _unpack(chunk, sides)[there]
    return out
