"""Voxels of a checked DICOM series: each file read once, its bytes hashed, its stored values made HU."""

import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from lunaprep.scans import gate
from lunaprep.scans.dicom import DicomScan
from lunaprep.scans.dicom_header import BIG_ENDIAN, NATIVE, PixelFormat, SliceHeader, read_header
from lunaprep.scans.gate import fault, shown

OUTSIDE_HU = -3024
"""What padding becomes where its own value would read as more than air; GE's scanners write it themselves."""

AIR_HU = -1000

RLE = "1.2.840.10008.1.2.5"
JPEG = tuple(f"1.2.840.10008.1.2.4.{k}" for k in (50, 51, 57, 70))
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
COMPRESSED = (RLE, *JPEG, *JPEG_LS, *JPEG_2000)
"""Transfer syntaxes that are decoded: RLE by pydicom itself, the others by the package python-gdcm."""

ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"

Array = npt.NDArray[Any]


def iter_slabs(scan: DicomScan, num_slices: int, hasher: xxhash.xxh3_128 | None = None) -> Iterator[Array]:
    """Yield a series' voxels in one pass, as consecutive slabs of whole slices.

    Parameters
    ----------
    scan : DicomScan
        As `lunaprep.scans.dicom.describe` gives it.
    num_slices : int
        Slices in a slab; the last slab may have fewer.
    hasher : xxhash.xxh3_128, optional
        Gets all bytes of all files, in the order of ``scan.slices``, by the time the iterator is exhausted.

    Yields
    ------
    ndarray, (k, rows, columns)
        HU in ``scan.dtype``. Padding that would read as more than air becomes `OUTSIDE_HU`.

    Raises
    ------
    ScanError
        A file that has changed since its header was read, or whose pixels cannot be decoded.
    """
    if num_slices < 1:
        msg = f"num_slices is {num_slices}, expected 1 or more"
        raise ValueError(msg)
    is_inverted: bool | None = None
    for start in range(0, len(scan.slices), num_slices):
        part = scan.slices[start : start + num_slices]
        slab = np.empty((len(part), *scan.geometry.shape_irc[1:]), dtype=scan.dtype)
        for k, item in enumerate(part):
            stored, padding = read_stored(item, hasher)
            if item.pixels.is_monochrome1:
                if is_inverted is None:
                    is_inverted = _is_inverted(item, stored, padding)
                if is_inverted:
                    stored = sum(item.pixels.stored_range) - stored
            slab[k] = to_hu(item.pixels, stored, padding)
        slab.flags.writeable = False
        yield slab


def read_slice(path: Path, root: Path) -> tuple[Array, SliceHeader]:
    """Read one slice by itself, for programs that look at pictures and need no grid.

    Parameters
    ----------
    path : Path
        DICOM file; a link must lead to a file inside `root`.
    root : Path
        Data folder.

    Returns
    -------
    hu : ndarray, (rows, columns)
        HU, as `iter_slabs` gives them.
    header : SliceHeader
        Whose slice it is.

    Raises
    ------
    ScanError
        No DICOM image, or one that cannot be used.
    """
    header = read_header(path, root)
    if header is None:
        raise fault(path, "no DICOM image (no 'DICM' at byte 128, or no pixels), expected a slice of a CT")
    stored, padding = read_stored(header, None)
    if header.pixels.is_monochrome1 and _is_inverted(header, stored, padding):
        stored = sum(header.pixels.stored_range) - stored
    return to_hu(header.pixels, stored, padding), header


def read_stored(item: SliceHeader, hasher: xxhash.xxh3_128 | None) -> tuple[Array, npt.NDArray[np.bool_] | None]:
    """Stored values of one slice (rows, columns), int32 or wider, and where they are padding (None: nowhere)."""
    content = _file_bytes(item, hasher)
    pixels = item.pixels
    if pixels.transfer_syntax in NATIVE:
        order = ">" if pixels.transfer_syntax == BIG_ENDIAN else "<"
        kind = np.dtype(f"{order}{'i' if pixels.is_signed else 'u'}{pixels.bits_allocated // 8}")
        words = np.frombuffer(content, kind, item.rows * item.columns, pixels.start).reshape(item.rows, item.columns)
    else:
        words = _decoded(item, content)
    words = words.astype(_work_type(pixels))
    stored = _lowest_bits(words, pixels)
    if pixels.padding is None:
        return stored, None
    low, high = pixels.padding
    padding = (stored >= low) & (stored <= high)
    if stored is not words:  # a scanner may pad with a value that the stored bits cannot hold
        padding |= (words >= low) & (words <= high)
    return stored, padding


def _work_type(pixels: PixelFormat) -> type[np.signedinteger[Any]]:
    """Integer type that no value overflows on its way to HU."""
    largest = abs(pixels.slope) * (1 << pixels.bits_allocated) + abs(pixels.intercept)
    return np.int32 if largest < 1 << 31 else np.int64


def to_hu(pixels: PixelFormat, stored: Array, padding: npt.NDArray[np.bool_] | None) -> Array:
    """HU of stored values: ``stored * slope + intercept`` (PS3.3 C.11.1.1.2); float64 where they are not whole."""
    hu: Array
    if pixels.is_whole:
        hu = stored if pixels.slope == 1 else stored * int(pixels.slope)
        hu = hu + int(pixels.intercept)
    else:
        hu = stored * pixels.slope + pixels.intercept
    if padding is not None:
        hu[padding & (hu > AIR_HU)] = OUTSIDE_HU
    return hu


def _file_bytes(item: SliceHeader, hasher: xxhash.xxh3_128 | None) -> bytes:
    """All bytes of a slice's file, which must not have changed since its header was read."""
    descriptor, size = gate.open_plain(item.real_path, item.path)
    with os.fdopen(descriptor, "rb", buffering=0) as source:
        content = b""
        if size == item.num_bytes:
            try:
                content = source.read(size) or b""
            except OSError as error:
                raise gate.refused(item.path, "its voxels cannot be read", error) from None
    is_same = xxhash.xxh3_128_hexdigest(memoryview(content)[: item.pixels.start]) == item.header_xxh3
    if len(content) != item.num_bytes or not is_same:
        raise fault(item.path, "the file has changed since its header was checked; run the command again")
    if hasher is not None:
        hasher.update(content)
    return content


def _lowest_bits(words: Array, pixels: PixelFormat) -> Array:
    """Value of the stored bits alone, sign and all; above them old scanners keep overlays."""
    spare = words.itemsize * 8 - pixels.bits_stored
    if pixels.bits_stored == pixels.bits_allocated:
        return words
    if pixels.is_signed:
        return np.asarray((words << spare) >> spare)
    return np.asarray(words & ((1 << pixels.bits_stored) - 1))


def _is_inverted(item: SliceHeader, stored: Array, padding: npt.NDArray[np.bool_] | None) -> bool:
    """Whether a MONOCHROME1 slice has its values upside down, so that they are HU only once they are turned over.

    The standard (PS3.3 C.7.6.3.1.2) means the display alone, and HU stay as they are; GDCM, and with it SimpleITK,
    turns the values over, and so do programs that write such files. A chest has air around and within: one of both
    readings has it at -1000 HU, or the series is refused.
    """
    plain, turned = (to_hu(item.pixels, values, padding) for values in (stored, sum(item.pixels.stored_range) - stored))
    has_air = [_has_air(values) for values in (plain, turned)]
    if has_air[0] == has_air[1]:
        text = "PhotometricInterpretation is MONOCHROME1, and neither its values nor their inverse look like HU"
        raise fault(item.path, f"{text}; convert it to MONOCHROME2")
    return has_air[1]


def _has_air(hu: Array) -> bool:
    """Whether most values are ones that a CT can have, and a hundredth of them are air or lung."""
    possible = (hu >= -1100) & (hu <= 3100)
    return bool(possible.mean() > 0.5 and (possible & (hu < -500)).mean() > 0.01)


def _decoded(item: SliceHeader, content: bytes) -> Array:
    """Stored values of a compressed slice."""
    pixels, syntax = item.pixels, UID(item.pixels.transfer_syntax)
    if syntax not in COMPRESSED:
        raise fault(item.path, f"its transfer syntax is {shown(syntax.name)}, which is not supported; decompress it")
    fragments = _fragments(item, content)
    if syntax != RLE:
        _check_frame(item, fragments[0], syntax in JPEG_2000)
    decoder: Any = get_decoder(syntax)
    if not decoder.is_available:
        text = f"its pixels are compressed as {shown(syntax.name, 60)}; install python-gdcm, or decompress it"
        raise fault(item.path, text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values, _ = decoder.as_array(
                content[pixels.start :],
                raw=True,
                rows=item.rows,
                columns=item.columns,
                number_of_frames=1,
                samples_per_pixel=1,
                photometric_interpretation="MONOCHROME2",
                pixel_keyword="PixelData",
                pixel_representation=int(pixels.is_signed),
                bits_allocated=pixels.bits_allocated,
                bits_stored=pixels.bits_stored,
            )
    except Exception as error:  # decoders raise anything on damaged bytes
        text = f"its {shown(syntax.name)} pixels cannot be decoded ({shown(error, 50)}); {gate.FETCH}"
        raise fault(item.path, text) from None
    if values.shape != (item.rows, item.columns):
        raise fault(item.path, f"its pixels decode to {values.shape}, expected {(item.rows, item.columns)}")
    return np.asarray(values)


def _fragments(item: SliceHeader, content: bytes) -> list[bytes]:
    """Fragments of the compressed stream, the offset table left out; refused where the file is cut within them."""
    at, found = item.pixels.start, []
    while content[at : at + 4] == ITEM:
        (length,) = struct.unpack_from("<I", content.ljust(at + 8, b"\0"), at + 4)
        found.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    if content[at : at + 4] != DELIMITER or len(found) < 2:
        raise fault(item.path, f"the file is cut short within its compressed pixels; {gate.FETCH}")
    return found[1:]


def _check_frame(item: SliceHeader, stream: bytes, is_jpeg_2000: bool) -> None:
    """Refuse a codestream whose own size is not the slice's, before a decoder makes room for it.

    JPEG 2000: SIZ marker right after SOC (ITU-T T.800, A.5.1). JPEG and JPEG-LS: the start-of-frame segment
    (T.81, B.2.2; T.87, C.2.2).
    """
    size = _size_2000(stream) if is_jpeg_2000 else _size_jpeg(stream)
    if size != (item.rows, item.columns):
        got = "no size" if size is None else f"{size[1]} x {size[0]}"
        raise fault(item.path, f"its compressed stream says {got}, expected {item.columns} x {item.rows}")


def _size_2000(stream: bytes) -> tuple[int, int] | None:
    if stream[:4] != b"\xff\x4f\xff\x51" or len(stream) < 24:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    return bottom - top, right - left


def _size_jpeg(stream: bytes) -> tuple[int, int] | None:
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], struct.unpack_from(">H", stream, at + 2)[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return int(rows), int(columns)
        at += 2 + length
    return None
