"""Opening one scan, by its file's suffix, and reading its voxels slab by slab."""

import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep.errors import ScanError
from lunaprep.scans import gate
from lunaprep.scans.gate import fault, shown
from lunaprep.scans.scan import Scan

SUFFIXES = (".mhd", ".mha", ".nii.gz")
"""What a scan's file may be called after its series UID."""

SERIES_UID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


def series_uid_of(path: Path) -> str:
    """Series UID of a scan: the name of its header file without the suffix.

    Examples
    --------
    >>> series_uid_of(Path("subset0/1.3.6.1.4.1.14519.5.2.1.mhd"))
    '1.3.6.1.4.1.14519.5.2.1'
    """
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        ends = ", ".join(SUFFIXES)
        text = f"{shown(path.name, 80)}: unknown kind of file, expected a name that ends in {ends}"
        raise ScanError(text)
    name = path.name.removesuffix(suffix)
    if not SERIES_UID.fullmatch(name) or ".." in name:
        text = (
            f"{shown(path.name, 80)}: the name is no series UID, expected at most 128 "
            "letters, digits, '.', '-' and '_', without '..'"
        )
        raise ScanError(text)
    return name


def open_scan(path: Path, root: Path) -> Scan:
    """Check a scan's header and the size of its data; no voxel is read.

    Parameters
    ----------
    path : Path
        Header file, with one of `SUFFIXES`.
    root : Path
        Data folder; neither the header nor the data file may lie outside it, links followed.

    Returns
    -------
    Scan
        The checked scan. Its ``dtype`` is the stored one in the machine's byte order (integers stay so);
        a NIfTI with a slope or intercept comes as float32, as SimpleITK gives it.

    Raises
    ------
    ScanError
        Whatever is wrong, on one line.
    """
    series_uid = series_uid_of(path)
    if path.name.endswith(".nii.gz"):
        from lunaprep.scans import itk

        return itk.open_nifti(path, root, series_uid)
    from lunaprep.scans import metaimage

    return metaimage.open_metaimage(path, root, series_uid)


def iter_slabs(scan: Scan, num_slices: int, hasher: xxhash.xxh3_128 | None = None) -> Iterator[npt.NDArray[Any]]:
    """Yield a scan's voxels in one pass, as consecutive slabs of whole slices.

    Parameters
    ----------
    scan : Scan
        Scan to read.
    num_slices : int
        Slices in a slab; the last slab may have fewer.
    hasher : xxhash.xxh3_128, optional
        Gets all bytes of ``scan.data_paths``, in order, by the time the iterator is exhausted.

    Yields
    ------
    ndarray, (k, rows, columns)
        Read-only, in ``scan.dtype``. A memory-mapped slab leaves the memory once the next is asked for.

    Raises
    ------
    ScanError
        Where the file is not what the header says, or a voxel is NaN or infinite.
    """
    if num_slices < 1:
        msg = f"num_slices is {num_slices}, expected 1 or more"
        raise ValueError(msg)
    start = 0
    for slab in _reader_of(scan)(scan, num_slices, hasher):
        if slab.dtype.kind == "f":
            _check_finite(scan, slab, start)
        slab.flags.writeable = False
        start += len(slab)
        yield slab


def _reader_of(scan: Scan) -> Callable[[Any, int, xxhash.xxh3_128 | None], Iterator[npt.NDArray[Any]]]:
    """Generator of slabs for a scan's kind of storage."""
    if scan.reader == "dicom":
        from lunaprep.scans import dicom_pixels

        return dicom_pixels.iter_slabs
    return _mapped if scan.reader == "map" else _decoded


def read_voxels(scan: Scan) -> npt.NDArray[Any]:
    """All voxels of a scan, (slices, rows, columns), in ``scan.dtype``."""
    voxels = np.empty(scan.geometry.shape_irc, dtype=scan.dtype)
    start = 0
    for slab in iter_slabs(scan, 32):
        voxels[start : start + len(slab)] = slab
        start += len(slab)
    return voxels


def _check_finite(scan: Scan, slab: npt.NDArray[Any], start: int) -> None:
    """Refuse a slab with NaN or infinity; `start` is the number of its first slice."""
    finite = np.isfinite(slab)
    if not finite.all():
        first = start + int(np.argmin(finite.all(axis=(1, 2))))
        raise fault(scan.path, f"slice {first} has voxels that are NaN or infinite; write the scan again")


def _decoded(scan: Scan, num_slices: int, hasher: xxhash.xxh3_128 | None) -> Iterator[npt.NDArray[Any]]:
    """Slabs of a scan that SimpleITK decodes as a whole; copies, as the image dies with this generator."""
    from lunaprep.scans import itk

    image, voxels = itk.decode(scan, hasher)
    for start in range(0, len(voxels), num_slices):
        yield voxels[start : start + num_slices].copy()
    del voxels, image


def _mapped(scan: Scan, num_slices: int, hasher: xxhash.xxh3_128 | None) -> Iterator[npt.NDArray[Any]]:
    """Slabs straight from the memory-mapped file."""
    depth, rows, columns = scan.geometry.shape_irc
    stored = _stored_dtype(scan)
    slice_bytes = rows * columns * stored.itemsize
    pages = _map(scan, depth * slice_bytes)
    page = mmap.PAGESIZE
    pages.madvise(mmap.MADV_WILLNEED, 0, min(num_slices, depth) * slice_bytes)  # before the second slab is asked for
    for start in range(0, depth, num_slices):
        stop = min(start + num_slices, depth)
        offset, length = start * slice_bytes, (stop - start) * slice_bytes
        if stop < depth:  # the disk fetches the next slab while this one is worked on
            ahead = stop * slice_bytes // page * page
            pages.madvise(mmap.MADV_WILLNEED, ahead, min(ahead + length, len(pages)) - ahead)
        flat = np.frombuffer(pages, stored, length // stored.itemsize, offset)
        if hasher is not None:
            hasher.update(flat.data)
        yield flat.reshape(stop - start, rows, columns).astype(scan.dtype, copy=False)
        first = offset // page * page  # a page shared with the next slab is simply mapped again
        pages.madvise(mmap.MADV_DONTNEED, first, offset + length - first)


def _stored_dtype(scan: Scan) -> "np.dtype[np.generic]":
    """Element type in the file, byte order included, from the header, which must not have changed."""
    from lunaprep.scans import metaimage

    header = metaimage.read_header(gate.landed(scan.path), scan.path)
    if header.xxh3 != scan.header_xxh3:
        raise fault(scan.path, "the header has changed since it was checked; run the command again")
    return header.layout.dtype


def _map(scan: Scan, num_bytes: int) -> mmap.mmap:
    """Read-only map of the data file, whose kind and size are checked once more."""
    fd, size = gate.open_plain(scan.data_path, scan.path)
    try:
        if size != num_bytes:
            raise gate.wrong_size(scan.path, size, num_bytes)
        pages = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise gate.refused(scan.path, "its voxels cannot be mapped", error) from None
    finally:
        os.close(fd)
    pages.madvise(mmap.MADV_SEQUENTIAL)
    return pages
