"""Level source: every crop and volume cut again, naively, from the scan as SimpleITK reads it.

This is the project's second home of SimpleITK, on purpose: a second opinion must not share the builder's
reader, nor its geometry or cutting.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep import schema
from lunaprep.errors import UsageError
from lunaprep.verify.findings import Findings
from lunaprep.verify.gate import Source, find_source, hash_voxels, require_inside
from lunaprep.verify.hashing import Meter
from lunaprep.verify.places import BadFileError, open_plain
from lunaprep.verify.record import Record, ShardRecord
from lunaprep.verify.structure import datasets_of, stored_chunks, unpack
from lunaprep.verify.tables import Manifest
from lunaprep.verify.values import TIE, expected_first

Voxels = npt.NDArray[Any]

TOLERANCE = 5e-6
"""Of the HU window, for resampled crops: 0.01 HU in the default one. The writer rounds places to 2^-20 voxels, so where
HU go from one bound to the other within a voxel, three axes make at most 1.4e-6 of it; float32 adds 6e-8."""


def check_source(
    store: Path,
    data: Path,
    record: Record,
    scans: list[dict[str, Any]],
    tables: Sequence[tuple[Manifest, Sequence[ShardRecord]]],
    meter: Meter,
    found: Findings,
) -> int:
    """Compare the store with its scans, one scan in memory at a time; return how many were compared.

    Parameters
    ----------
    store, data : Path
        The store and the folder its scans were read from.
    record, scans
        store.json, and the good rows of scans.parquet.
    tables : sequence of (Manifest, sequence of ShardRecord)
        crops.parquet, and slabs.parquet if there, each with its shards.
    meter : Meter
        Counts the bytes read.
    found : Findings
        Where differences go.
    """
    uids = [scan["series_uid"] for scan in scans]
    by_table = [manifest.rows_by_scan(uids) for manifest, _ in tables]
    compared = 0
    for k, scan in enumerate(scans):
        number = sum(len(rows[k]) for rows in by_table)
        try:
            image, voxels = _read(_find(data, scan), scan, meter)
        except BadFileError as bad:
            _tell_unread(bad, scan, number, found)
            continue
        except Exception as error:
            message = f"SimpleITK can't read it: {' '.join(str(error).split())[-160:]}"
            found.error("source-unreadable", scan["file"], message, series_uid=scan["series_uid"])
            continue
        if _check_grid(image, scan, found):
            compared += 1
            clipped = _clipped(image, voxels, record) if record.resample_mm else None
            for (manifest, shards), rows in zip(tables, by_table, strict=True):
                resampled = clipped if manifest.place == schema.MANIFEST_FILE else None
                _check_crops(store, record, (manifest, shards), rows[k], (image, resampled), voxels, found)
            _check_volume(store, record, scan, voxels, found)
    return compared


def _tell_unread(bad: BadFileError, scan: dict[str, Any], num_crops: int, found: Findings) -> None:
    whose = {"series_uid": scan["series_uid"]}
    if bad.code == "missing-file":
        message = f"source missing: its {num_crops} crops were not cut again"
        found.warning("source-missing", scan["file"], message, **whose)
    else:
        code = bad.code if bad.code.startswith("source-") else "source-unreadable"
        found.error(code, scan["file"], f"{bad}; its {num_crops} crops were not cut again", **whose)


def require_scans(data: Path, scans: list[dict[str, Any]]) -> None:
    """Refuse a data folder that holds not one of a store's scans, before anything is read.

    Raises
    ------
    UsageError
        Nothing could be compared.
    """
    if scans and not any(_is_there(data, scan) for scan in scans):
        message = (
            f"{data}: not one of the store's {len(scans)} scans is there, such as {scans[0]['file']!r:.160}; give "
            "--data the folder that the store was built from"
        )
        raise UsageError(message)


def _is_there(data: Path, scan: dict[str, Any]) -> bool:
    try:
        _find(data, scan)
    except BadFileError as bad:
        return bad.code != "missing-file"
    except Exception:
        return True  # and can't be read, which is told when it is its turn
    return True


def _find(data: Path, scan: dict[str, Any]) -> Source:
    if (data / scan["file"]).is_dir():
        return _find_series(data, scan)
    return find_source(data, scan["file"])


def _find_series(data: Path, scan: dict[str, Any]) -> Source:
    """A DICOM series, told apart and sorted by GDCM; its folder may not lie outside the data folder."""
    import SimpleITK

    itk: Any = SimpleITK

    require_inside(scan["file"])
    root, folder = Path(os.path.realpath(data)), Path(os.path.realpath(data / scan["file"]))
    if not folder.is_relative_to(root):
        code, message = "source-unreadable", f"{scan['file']} leads out of the data folder"
        raise BadFileError(code, message)
    itk.ProcessObject.GlobalWarningDisplayOff()
    names = itk.ImageSeriesReader().GetGDCMSeriesFileNames(str(folder), scan["series_uid"], False, True)
    paths = tuple(map(Path, names))
    if not paths:
        code, message = "missing-file", f"no file of the series in {scan['file']}"
        raise BadFileError(code, message)
    return Source(paths, paths)


def _read(source: Source, scan: dict[str, Any], meter: Meter) -> tuple[Any, Voxels]:
    got = hash_voxels(source, meter)
    if got != scan["data_xxh3"]:
        code, what = "source-changed", f"{len(source.voxels)} files" if source.voxels[1:] else source.voxels[0].name
        message = f"{what} changed since the build: xxh3 {got:.12}…, expected {scan['data_xxh3']:.12}…"
        raise BadFileError(code, message)
    import SimpleITK

    itk: Any = SimpleITK
    names = [str(path) for path in source.headers]
    image: Any = itk.ReadImage(names if names[1:] else names[0])
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        code, message = "source-unreadable", "isn't one scalar 3-D image"
        raise BadFileError(code, message)
    return image, itk.GetArrayViewFromImage(image)


def _check_grid(image: Any, scan: dict[str, Any], found: Findings) -> bool:
    shape = image.GetSize()[::-1]
    expected = tuple(scan[name] for name in ("num_slices", "num_rows", "num_cols"))
    pairs = [
        ("shape", shape, expected),
        ("origin", image.GetOrigin(), tuple(scan["origin"])),
        ("spacing", image.GetSpacing(), tuple(scan["spacing"])),
        ("direction", image.GetDirection(), tuple(scan["direction"])),
    ]
    for name, got, recorded in pairs:
        if got != recorded:
            message = f"{name} is {recorded}, SimpleITK reads {got}"
            found.error("geometry-differs", schema.SCANS_FILE, message, series_uid=scan["series_uid"])
    return bool(shape == expected)


def _check_crops(
    store: Path,
    record: Record,
    table: tuple[Manifest, Sequence[ShardRecord]],
    rows: list[int],
    images: tuple[Any, Any],
    voxels: Voxels,
    found: Findings,
) -> None:
    """Compare crops with the scan as ITK reads it, or, where there is a second image, with that one resampled."""
    (manifest, shards), (image, clipped) = table, images
    by_id = {shard.id: shard for shard in shards}
    opened: dict[str, int] = {}
    try:
        for k in rows:
            whose = manifest.crop(k)
            centre = np.array([manifest.numbers[name][k] for name in ("index", "row", "col")], dtype=np.int64)
            if not _check_centre(manifest, k, centre, image, whose, found):
                continue
            shard = by_id.get(str(whose["shard_id"]))
            if shard is None:
                continue
            place = str(shard.file)
            if place not in opened:
                opened[place] = open_plain(store, place)
            offset = schema.DATA_OFFSET + whose["shard_row"] * shard.crop_bytes
            stored = os.pread(opened[place], shard.crop_bytes, offset)
            if clipped is not None:
                same = _is_resampled(stored, manifest, k, clipped, record)
            else:
                start = _start(centre, voxels.shape, shard.crop_shape, record.edge)
                same = stored == cut(voxels, start, shard.crop_shape, record, shard.dtype).tobytes()
            if not same:
                found.error("crop-differs", place, "isn't what is cut from its scan", **whose)
    except (BadFileError, OSError):
        pass  # a shard that can't be read was told by the check of every file
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _check_centre(
    manifest: Manifest,
    k: int,
    centre: npt.NDArray[np.int64],
    image: Any,
    whose: dict[str, Any],
    found: Findings,
) -> bool:
    """Compare the centre voxel with ITK's; half-way between two voxels (within `TIE`) either is right.

    A slab of a nodule may lie around any slice that its sphere meets.
    """
    xyz = [float(manifest.numbers[f"{axis}_mm"][k]) for axis in "xyz"]
    place = np.array(image.TransformPhysicalPointToContinuousIndex(xyz))[::-1]
    nearest = np.rint(place).astype(np.int64)
    if manifest.place == schema.SLABS_FILE:
        reach = np.nan_to_num(manifest.numbers["diameter_mm"][k]) / 2 / image.GetSpacing()[2]
        if abs(place[0] - centre[0]) <= reach + 0.5 + TIE:
            place[0] = nearest[0] = centre[0]
    if (nearest == centre).all() or (np.abs(place - centre) <= 0.5 + TIE).all():
        return True
    message = f"centre voxel is {centre.tolist()}, SimpleITK gives {nearest.tolist()}"
    found.error("index-differs", manifest.place, message, **whose)
    return False


def _start(
    centre: npt.NDArray[np.int64], shape: tuple[int, ...], crop_shape: tuple[int, int, int], edge: str
) -> list[int]:
    start = []
    for c, side, width in zip(centre.tolist(), shape, crop_shape, strict=True):
        first = c - width // 2
        if edge == "shift":
            first = min(max(first, min(0, side - width)), max(0, side - width))
        start.append(first)
    return start


def _clipped(image: Any, voxels: Voxels, record: Record) -> Any:
    """The scan as an ITK image of clipped HU."""
    import SimpleITK

    itk: Any = SimpleITK
    clipped = itk.GetImageFromArray(np.clip(voxels.astype(np.float32), *record.hu))
    clipped.CopyInformation(image)
    return clipped


def _is_resampled(stored: bytes, manifest: Manifest, k: int, clipped: Any, record: Record) -> bool:
    """Whether a stored crop is what ITK resamples, but for `TOLERANCE`; at a rim of the scan (`TIE`) it may be fill."""
    expected, sure = resample(clipped, [float(manifest.numbers[f"{axis}_mm"][k]) for axis in "xyz"], record)
    got = np.frombuffer(stored, "<f4")
    if got.size != expected.size:
        return False
    low, high = record.hu
    near = np.abs(got.reshape(expected.shape) - expected) <= TOLERANCE * (high - low)
    return bool((near | ~sure).all())


def resample(clipped: Any, xyz: Sequence[float], record: Record) -> tuple[Voxels, Voxels]:
    """A crop of the store's spacing around a point, by ITK, and which of its voxels don't lie on a rim of the scan."""
    import SimpleITK

    itk: Any = SimpleITK
    sides, width = np.array(clipped.GetSize()[::-1]), record.crop_shape
    step = np.array(record.resample_mm) / clipped.GetSpacing()[::-1]
    place = np.array(clipped.TransformPhysicalPointToContinuousIndex(xyz))[::-1]
    first = expected_first(place, sides, width, step, record.edge)
    crop = itk.Resample(
        clipped,
        [int(side) for side in width[::-1]],
        itk.Transform(),
        itk.sitkLinear,
        clipped.TransformContinuousIndexToPhysicalPoint(first[::-1].tolist()),
        [float(mm) for mm in record.resample_mm[::-1]],  # type: ignore[index]
        clipped.GetDirection(),
        float(record.hu[0]),
        itk.sitkFloat32,
    )
    at = [first[axis] + np.arange(width[axis]) * step[axis] for axis in range(3)]
    sure = [np.minimum(np.abs(p + 0.5), np.abs(p - n + 0.5)) > TIE for p, n in zip(at, sides, strict=True)]
    return itk.GetArrayFromImage(crop), sure[0][:, None, None] & sure[1][:, None] & sure[2]


def cut(voxels: Voxels, start: list[int], crop_shape: tuple[int, int, int], record: Record, dtype: str) -> Voxels:
    """One crop in the shard's dtype, HU clipped, the lower bound where it lies outside the scan."""
    low, high = record.hu
    crop = np.full(crop_shape, low, dtype=np.float32)
    inner, outer = [], []
    for first, side, width in zip(start, voxels.shape, crop_shape, strict=True):
        begin, end = max(first, 0), min(first + width, side)
        if begin >= end:
            return crop.astype(dtype)
        inner.append(slice(begin, end))
        outer.append(slice(begin - first, end - first))
    crop[tuple(outer)] = np.clip(voxels[tuple(inner)].astype(np.float32), low, high)
    return crop.astype(dtype)


def _check_volume(store: Path, record: Record, scan: dict[str, Any], voxels: Voxels, found: Findings) -> None:
    place = scan["volume_file"]
    if place is None:
        return
    grid, chunk = 0, voxels.shape
    try:
        for _, first, chunk, stored in stored_chunks(store, place, (schema.HU_DATASET,), datasets_of(scan)):
            grid += 1
            if not _chunk_is(stored, first, chunk, voxels, record.hu):
                message = f"the chunk at {first} isn't the scan's, clipped to {record.hu}"
                found.error("volume-differs", place, message, series_uid=scan["series_uid"])
    except Exception:
        return  # damage, which the structure and the checksums have told
    if grid != np.prod([-(-side // c) for side, c in zip(voxels.shape, chunk, strict=True)]):
        found.error("volume-differs", place, "some of its chunks are missing", series_uid=scan["series_uid"])


def _chunk_is(
    stored: bytes, first: tuple[int, ...], chunk: tuple[int, ...], voxels: Voxels, hu: tuple[float, float]
) -> bool:
    """Whether a stored chunk (shuffled, deflated) unpacks to the clipped scan there; bounded in memory."""
    size = int(np.prod(chunk)) * 4
    try:
        plain = unpack(stored, size)
    except zlib.error:
        return False
    if len(plain) != size:
        return False
    planes = np.frombuffer(plain, np.uint8).reshape(4, *chunk)
    bits = planes[3].astype("<u4")
    for plane in planes[2::-1]:  # twelve times as fast as transposing
        bits <<= 8
        bits |= plane
    box = tuple(slice(f, f + c) for f, c in zip(first, chunk, strict=True))
    expected = np.clip(voxels[box].astype("<f4"), *hu)
    inside = tuple(slice(0, side) for side in expected.shape)
    return np.array_equal(bits[inside], expected.view("<u4"))
