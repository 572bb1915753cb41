"""One DICOM file's header: the few facts a volume needs, checked; never its pixels, never a person's name."""

import io
import math
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from lunaprep.errors import ScanError
from lunaprep.scans import gate
from lunaprep.scans.gate import fault, shown

PREAMBLE, MAGIC = 128, b"DICM"

WINDOWS = (1 << 13, 1 << 17, 1 << 24)
"""Bytes read in search of the pixels; a CT slice's header has 2 to 6 KiB, with private blocks some more."""

SERIES_UID, STUDY_UID, SOP_UID = 0x0020000E, 0x0020000D, 0x00080018
PATIENT_ID, MODALITY, IMAGE_TYPE, CHARACTER_SET = 0x00100020, 0x00080060, 0x00080008, 0x00080005
POSITION, ORIENTATION, PIXEL_SPACING = 0x00200032, 0x00200037, 0x00280030
ROWS, COLUMNS, SAMPLES, FRAMES, PHOTOMETRIC = 0x00280010, 0x00280011, 0x00280002, 0x00280008, 0x00280004
ALLOCATED, STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
PADDING, PADDING_LIMIT, INTERCEPT, SLOPE = 0x00280120, 0x00280121, 0x00281052, 0x00281053
TAGS = [
    *(CHARACTER_SET, IMAGE_TYPE, SOP_UID, MODALITY, PATIENT_ID, STUDY_UID, SERIES_UID, POSITION, ORIENTATION),
    *(SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS, PIXEL_SPACING, ALLOCATED, STORED, HIGH_BIT, SIGNED),
    *(PADDING, PADDING_LIMIT, INTERCEPT, SLOPE),
]
"""All that is read. Name, birth date, institution and the like never come into memory as values."""

PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
"""Float, double float and plain pixel data; the header ends where the first of them begins."""

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN)
DEFLATED = "1.2.840.10008.1.2.1.99"
UNDEFINED = 0xFFFFFFFF
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


class HeaderError(ScanError):
    """A DICOM file whose header cannot be used; `series_uid` is its series, where that much could be read."""

    def __init__(self, error: ScanError, series_uid: str | None) -> None:
        super().__init__(str(error))
        self.series_uid = series_uid

    def __reduce__(self) -> tuple[Any, ...]:
        return HeaderError, (ScanError(str(self)), self.series_uid)


@dataclass(frozen=True)
class PixelFormat:
    """How a slice's values are stored.

    `padding` is the first and last stored value that stands for "no image here", as the file's 16-bit words.
    `length` is None where the pixels are compressed, in fragments.
    """

    transfer_syntax: str
    start: int
    length: int | None
    bits_allocated: int
    bits_stored: int
    is_signed: bool
    is_monochrome1: bool
    padding: tuple[int, int] | None
    slope: float
    intercept: float

    @property
    def stored_range(self) -> tuple[int, int]:
        """Least and greatest value that `bits_stored` bits can hold."""
        top = 1 << self.bits_stored
        return (-top // 2, top // 2 - 1) if self.is_signed else (0, top - 1)

    @property
    def is_whole(self) -> bool:
        """Whether all HU are whole numbers."""
        return self.slope.is_integer() and self.intercept.is_integer()


@dataclass(frozen=True)
class SliceHeader:
    """A slice on disk: whose it is, where it lies in the patient, and how its pixels are stored.

    Geometry is None where the file does not say. `pixel_spacing` is as in DICOM: between rows, between columns.
    """

    path: Path
    real_path: Path
    num_bytes: int
    header_xxh3: str
    series_uid: str
    study_uid: str | None
    sop_uid: str
    patient_id: str | None
    modality: str | None
    is_localizer: bool
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    rows: int
    columns: int
    pixels: PixelFormat


def read_header(path: Path, root: Path) -> SliceHeader | None:
    """Read one file's header.

    Parameters
    ----------
    path : Path
        The file; if it is a link, it must lead to a file inside `root`.
    root : Path
        Data folder.

    Returns
    -------
    SliceHeader or None
        None where the file is no DICOM file (no ``DICM`` at byte 128), or one without an image.

    Raises
    ------
    HeaderError
        A DICOM file that cannot be used.
    """
    elements = None
    try:
        place = gate.located(path, root, path) if path.is_symlink() else path
        for window in WINDOWS:
            start, size = gate.read_start(place, path, window)
            if start[PREAMBLE : PREAMBLE + 4] != MAGIC:
                return None
            elements = Elements(path, start)
            if elements.pixel_tag or size <= window:
                break
        else:
            raise fault(path, f"no pixels within its first {WINDOWS[-1]} bytes; is it damaged? {gate.FETCH}")
        if not elements.pixel_tag:
            if elements.is_no_image:
                return None
            raise fault(path, f"its pixels are missing: the file ends before them; {gate.FETCH}")
        return _facts(path, place, elements, start, size)
    except ScanError as error:
        raise HeaderError(error, elements.uid(SERIES_UID) if elements else None) from None


def read_headers(paths: Sequence[Path], root: Path) -> list[SliceHeader | HeaderError | None]:
    """As `read_header` of each file; an error stands in its place."""
    found: list[SliceHeader | HeaderError | None] = []
    for path in paths:
        try:
            found.append(read_header(path, root))
        except HeaderError as error:
            found.append(HeaderError(error, error.series_uid))  # a fresh one keeps no bytes alive
    return found


class Elements:
    """The data elements of a file's start as raw bytes, and where the pixels begin."""

    def __init__(self, path: Path, start: bytes) -> None:
        self.path = path
        self.pixel_tag = 0
        stream = io.BytesIO(start)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom's words on odd values; what matters is checked here
                stream.seek(PREAMBLE + 4)
                meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
                self.transfer_syntax = _uid_text(_raw(meta, 0x00020010))
                self._check_syntax()
                self._sop_class, self._sop_uid = (_uid_text(_raw(meta, tag)) for tag in (0x00020002, 0x00020003))
                self.is_implicit = self.transfer_syntax == IMPLICIT
                self.order = ">" if self.transfer_syntax == BIG_ENDIAN else "<"
                self._data: Any = read_dataset(
                    stream, self.is_implicit, self.order == "<", stop_when=self._stop, specific_tags=list(TAGS)
                )
        except ScanError:
            raise
        except Exception as error:  # pydicom raises anything on damaged bytes
            text = f"its header cannot be read as DICOM ({shown(error, 60)}); {gate.FETCH}"
            raise fault(path, text) from None
        self.pixel_start = stream.tell()

    def _stop(self, tag: int, _vr: str | None, _length: int) -> bool:
        number = int(tag)  # pydicom's own comparison takes ten times as long
        if number >= PIXEL_TAGS[0]:
            self.pixel_tag = number
        return number >= PIXEL_TAGS[0]

    def _check_syntax(self) -> None:
        if self.transfer_syntax == DEFLATED:
            raise fault(self.path, "its transfer syntax is deflated, which may hide any size; inflate it: dcmconv +te")
        if not _is_uid(self.transfer_syntax):
            raise fault(
                self.path, f"its transfer syntax is {shown(self.transfer_syntax)}, expected a UID; {gate.FETCH}"
            )

    def has(self, tag: int) -> bool:
        """Whether an element is there and not empty."""
        return bool(_raw(self._data, tag))

    def uid(self, tag: int) -> str | None:
        """Value of a UID element; None where it is missing or no UID."""
        text = _uid_text(_raw(self._data, tag))
        return text if _is_uid(text) else None

    def text(self, tag: int) -> str | None:
        """Value of a text element; None where it is missing or empty."""
        is_utf8 = b"192" in _raw(self._data, CHARACTER_SET)
        return _raw(self._data, tag).decode("utf-8" if is_utf8 else "latin-1", "replace").strip(" \0") or None

    def numbers(self, tag: int, name: str, count: int) -> tuple[float, ...] | None:
        """Values of a decimal string element: exactly `count`, all finite; None where it is missing."""
        raw = _raw(self._data, tag)
        if not raw.strip(b" \0"):
            return None
        try:
            values = tuple(float(part) for part in raw.decode("ascii").strip(" \0").split("\\"))
        except ValueError:
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            got = shown(raw.decode("latin-1"))
            raise fault(self.path, f"{name} is {got}, expected {count} finite numbers; {gate.FETCH}")
        return values

    def whole(self, tag: int, default: int | None, name: str) -> int:
        """Value of an unsigned 16-bit element."""
        raw = _raw(self._data, tag)
        if len(raw) >= 2:
            return int(struct.unpack_from(self.order + "H", raw)[0])
        if default is None:
            raise fault(self.path, f"{name} is missing; {gate.FETCH}")
        return default

    @property
    def is_no_image(self) -> bool:
        """Whether the file says of itself that it is a report, a plan, a directory or the like."""
        if not _is_uid(self._sop_class):
            return False
        name = UID(str(self._sop_class)).name
        return name != self._sop_class and "Image" not in name  # pydicom gives the UID itself where it knows no name

    @property
    def sop_uid(self) -> str:
        """SOP instance UID, also from the file's meta header; empty where it is in neither."""
        return self.uid(SOP_UID) or self._sop_uid or ""


def _raw(data: Any, tag: int) -> bytes:
    element = data.get_item(tag)
    value = element.value if element is not None else None
    return value if isinstance(value, bytes) else b""


def _is_uid(text: str | None) -> bool:
    return bool(text) and len(str(text)) <= 64 and _UID.fullmatch(str(text)) is not None


def _uid_text(raw: bytes) -> str | None:
    return raw.decode("latin-1").strip(" \0") or None


def _facts(path: Path, place: Path, elements: Elements, start: bytes, size: int) -> SliceHeader:
    """Everything a volume needs of one file."""
    series_uid = elements.uid(SERIES_UID)
    if series_uid is None:
        raise fault(path, "SeriesInstanceUID is missing or no UID, so its series is unknown")
    frames = (elements.text(FRAMES) or "1").strip()
    if frames != "1":
        raise fault(path, f"it holds {shown(frames)} frames, expected one slice a file; split it: emf2sf")
    samples = elements.whole(SAMPLES, 1, "SamplesPerPixel")
    if samples != 1:
        raise fault(path, f"SamplesPerPixel is {samples}: a colour picture, expected one value a pixel")
    rows, columns = elements.whole(ROWS, None, "Rows"), elements.whole(COLUMNS, None, "Columns")
    if not (1 <= rows <= gate.MAX_SIDE and 1 <= columns <= gate.MAX_SIDE):
        raise fault(path, f"its size is {columns} x {rows}, expected sides from 1 to {gate.MAX_SIDE}")
    pixels, value_start = _pixel_format(path, elements, start)
    _check_length(path, pixels, rows * columns, size)
    return SliceHeader(
        path=path,
        real_path=place,
        num_bytes=size,
        header_xxh3=xxhash.xxh3_128_hexdigest(start[:value_start]),
        series_uid=series_uid,
        study_uid=elements.uid(STUDY_UID),
        sop_uid=elements.sop_uid,
        patient_id=elements.text(PATIENT_ID),
        modality=elements.text(MODALITY),
        is_localizer="LOCALIZER" in (elements.text(IMAGE_TYPE) or "").upper(),
        position=elements.numbers(POSITION, "ImagePositionPatient", 3),
        orientation=elements.numbers(ORIENTATION, "ImageOrientationPatient", 6),
        pixel_spacing=elements.numbers(PIXEL_SPACING, "PixelSpacing", 2),
        rows=rows,
        columns=columns,
        pixels=pixels,
    )


def _pixel_format(path: Path, elements: Elements, start: bytes) -> tuple[PixelFormat, int]:
    """How the pixels are stored, and the byte at which they begin."""
    if elements.pixel_tag != PIXEL_TAGS[2]:
        raise fault(path, "its pixels are floating-point, which no CT slice has")
    allocated = elements.whole(ALLOCATED, None, "BitsAllocated")
    stored = elements.whole(STORED, allocated, "BitsStored")
    high = elements.whole(HIGH_BIT, stored - 1, "HighBit")
    signed = elements.whole(SIGNED, None, "PixelRepresentation")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1 or signed > 1:
        got = f"{stored} bits of {allocated}, high bit {high}, sign {signed}"
        raise fault(path, f"its values have {got}; expected 8, 16 or 32 bits, the lowest used")
    photometric = (elements.text(PHOTOMETRIC) or "MONOCHROME2").upper()
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise fault(path, f"PhotometricInterpretation is {shown(photometric)}, expected MONOCHROME2")
    slope, intercept = _rescale(path, elements, bool(signed))
    value_start, length = _value_place(path, elements, start)
    pixels = PixelFormat(
        transfer_syntax=str(elements.transfer_syntax),
        start=value_start,
        length=None if length == UNDEFINED else length,
        bits_allocated=allocated,
        bits_stored=stored,
        is_signed=bool(signed),
        is_monochrome1=photometric == "MONOCHROME1",
        padding=_padding(elements, bool(signed)),
        slope=slope,
        intercept=intercept,
    )
    return pixels, value_start


def _rescale(path: Path, elements: Elements, is_signed: bool) -> tuple[float, float]:
    """Slope and intercept that make HU of the stored values; without them the values must be able to be HU."""
    slope = elements.numbers(SLOPE, "RescaleSlope", 1)
    intercept = elements.numbers(INTERCEPT, "RescaleIntercept", 1)
    if intercept is None and not is_signed:
        raise fault(path, "RescaleIntercept is missing and its values have no sign, so that they are no HU")
    if slope is not None and slope[0] == 0:
        raise fault(path, "RescaleSlope is 0, which would make every voxel the same")
    return slope[0] if slope else 1.0, intercept[0] if intercept else 0.0


def _padding(elements: Elements, is_signed: bool) -> tuple[int, int] | None:
    """First and last padding value, signed as the pixels are whatever the element's own type says."""
    if not elements.has(PADDING):
        return None
    ends = [elements.whole(PADDING, 0, "")]
    ends.append(elements.whole(PADDING_LIMIT, ends[0], ""))
    if is_signed:
        ends = [end - (1 << 16) if end >= 1 << 15 else end for end in ends]
    return min(ends), max(ends)


def _value_place(path: Path, elements: Elements, start: bytes) -> tuple[int, int]:
    """Byte and length of the pixel data element's value; PS3.5 section 7.1 has the four forms of an element."""
    at = elements.pixel_start
    head = start[at : at + 12]
    has_vr = not elements.is_implicit and head[4:6] in (b"OW", b"OB")
    if len(head) < 12 or not (has_vr or elements.is_implicit):
        raise fault(path, f"its pixel data element is damaged or cut; {gate.FETCH}")
    (length,) = struct.unpack_from(elements.order + "I", head, 8 if has_vr else 4)
    return at + (12 if has_vr else 8), int(length)


def _check_length(path: Path, pixels: PixelFormat, num_values: int, size: int) -> None:
    """Refuse pixels that are not as many as the header says, or that the file does not hold."""
    is_native = pixels.transfer_syntax in NATIVE
    if is_native != (pixels.length is not None):
        kind = "compressed" if is_native else "not compressed"
        raise fault(path, f"its pixels are {kind}, against its transfer syntax {UID(pixels.transfer_syntax).name}")
    if pixels.length is None:
        return
    expected = num_values * pixels.bits_allocated // 8
    if pixels.length not in (expected, expected + expected % 2):
        raise fault(path, f"its pixels are {pixels.length} bytes, expected {expected} by rows, columns and bits")
    there = size - pixels.start
    if there < pixels.length:
        raise fault(path, f"the file is cut short: {there} bytes of pixels, expected {pixels.length}; {gate.FETCH}")
