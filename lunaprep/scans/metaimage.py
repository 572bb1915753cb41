"""MetaImage headers (.mhd, .mha): a strict reader of our own, because SimpleITK believes anything.

It takes the headers that ITK, elastix and plastimatch write, and refuses what ITK would misread, follow
out of the folder or crash on. Units, layout and defaults are ITK's: `TransformMatrix` holds the index axes
one after the other (the columns of SimpleITK's direction), MET_LONG has 32 bits.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.scans import gate
from lunaprep.scans.gate import Layout, fault, shown
from lunaprep.scans.scan import Scan

MAX_HEADER_BYTES = 65536
MAX_NAME_BYTES = 255

ELEMENT_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}

BYTE_ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
ORIGIN = ("Offset", "Position", "Origin")
DIRECTION = ("TransformMatrix", "Rotation", "Orientation")
SPACING = ("ElementSpacing", "ElementSize")
ONLY_VALUE = {
    "HeaderSize": 0.0,
    "HeaderSizePerSlice": 0.0,
    "ElementNumberOfChannels": 1.0,
    "ElementToIntensityFunctionSlope": 1.0,
    "ElementToIntensityFunctionOffset": 0.0,
}
GIVEN = ("ObjectType", "NDims", "BinaryData", "DimSize", "ElementType", "ElementDataFile")
KNOWN = (*GIVEN, *BYTE_ORDER, *ORIGIN, *DIRECTION, *SPACING, *ONLY_VALUE, "CompressedData", "DistanceUnits")
SPELLING = {key.lower(): key for key in (*KNOWN, "CompressedDataSize")}

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class MetaHeader:
    """A checked MetaImage header.

    Parameters
    ----------
    geometry : Geometry
        The grid.
    layout : Layout
        How the voxels are stored; `offset` is the header's length in a .mha, else 0.
    compressed_bytes : int or None
        CompressedDataSize, where given.
    data_name : str
        ElementDataFile.
    fields : dict
        The header's text by key.
    xxh3 : str
        XXH3-128 of the header's bytes.
    """

    geometry: Geometry
    layout: Layout
    compressed_bytes: int | None
    data_name: str
    fields: dict[str, str]
    xxh3: str


def open_metaimage(path: Path, root: Path, series_uid: str) -> Scan:
    """Check the header of a .mhd or .mha inside `root`, and the place and size of its data file."""
    place = gate.located(path, root, path)
    header = read_header(place, path)
    is_local = header.data_name == "LOCAL"
    data_path = place if is_local else gate.located(place.with_name(header.data_name), root, path)
    return Scan(
        series_uid=series_uid,
        path=path,
        geometry=header.geometry,
        dtype=header.layout.dtype.newbyteorder("="),
        data_path=data_path,
        data_bytes=checked_size(path, header, gate.plain_size(data_path, path)),
        header_xxh3=header.xxh3,
        reader="simpleitk" if is_local or header.layout.codec else "map",
    )


def checked_size(path: Path, header: MetaHeader, size: int) -> int:
    """Size of the data file, refused unless it is what the header says."""
    stored = size - header.layout.offset
    gate.check_stored(path, header.layout, size)
    if header.layout.codec and header.compressed_bytes not in (None, stored):
        promised = f"CompressedDataSize is {header.compressed_bytes}"
        raise fault(path, f"{stored} bytes of compressed data, {promised}; {gate.FETCH}")
    return size


def read_header(file: Path, path: Path) -> MetaHeader:
    """Read and check the header in `file`, no link; `path` is its name for users, suffix and all."""
    start, size = gate.read_start(file, path, MAX_HEADER_BYTES)
    if path.suffix == ".mhd" and size > MAX_HEADER_BYTES:
        raise fault(path, f"the header has {size} bytes, expected at most {MAX_HEADER_BYTES}")
    return parse_header(path, start)


def parse_header(path: Path, start: bytes) -> MetaHeader:
    """Check the header with which `start` begins (.mha) or that it is (.mhd)."""
    fields, length = _split(path, start)
    _check_constants(path, fields)
    geometry = _grid(path, fields)
    code = ELEMENT_TYPES.get(fields["ElementType"])
    if code is None:
        raise fault(path, f"ElementType is {shown(fields['ElementType'])}, expected a scalar like MET_SHORT")
    order = _one_of(path, fields, BYTE_ORDER)
    dtype = np.dtype(code).newbyteorder(">" if _flag(path, fields, order) else "<")
    is_compressed = "CompressedData" in fields and _flag(path, fields, "CompressedData")
    compressed = None
    if "CompressedDataSize" in fields:
        compressed = _integers(path, fields, "CompressedDataSize", 1)[0]
    data_name = _data_name(path, fields["ElementDataFile"])
    layout = Layout(
        dtype=dtype,
        codec=gate.ZLIB if is_compressed else gate.PLAIN,
        offset=length if data_name == "LOCAL" else 0,
        skip=0,
        num_bytes=math.prod(geometry.shape_irc) * dtype.itemsize,
    )
    xxh3 = xxhash.xxh3_128_hexdigest(start[:length])
    return MetaHeader(geometry, layout, compressed, data_name, fields, xxh3)


def canonical_text(header: MetaHeader, stored_bytes: int, data_name: str) -> str:
    """Header for SimpleITK that has nothing but the checked fields, and `data_name` as the data file."""
    kept = (*GIVEN[:-1], *BYTE_ORDER, *DIRECTION, *ORIGIN, *SPACING)
    lines = [f"{key} = {header.fields[key]}" for key in kept if key in header.fields and key not in GIVEN[3:]]
    lines.append(f"CompressedData = {bool(header.layout.codec)}")
    if header.layout.codec:
        lines.append(f"CompressedDataSize = {stored_bytes}")
    lines.append(f"HeaderSize = {header.layout.offset}")
    lines += [f"{key} = {header.fields[key]}" for key in ("DimSize", "ElementType")]
    return "\n".join([*lines, f"ElementDataFile = {data_name}\n"])


def _split(path: Path, start: bytes) -> tuple[dict[str, str], int]:
    """Fields of a header up to ElementDataFile, and its length in bytes."""
    fields: dict[str, str] = {}
    position = 0
    number = 0
    while "ElementDataFile" not in fields:
        if position >= len(start):
            tail = "within 64 KiB" if position >= MAX_HEADER_BYTES else "at its end"
            raise fault(path, f"the header has no ElementDataFile {tail}; {gate.FETCH}")
        number += 1
        end = start.find(b"\n", position)
        end = len(start) if end < 0 else end + 1
        key, value = _key_value(path, start[position:end], number)
        if key in fields:
            raise fault(path, f"line {number} gives {shown(key)} a second time; write the scan again")
        fields[key] = value
        position = end
    if path.suffix == ".mhd" and start[position:].strip():
        raise fault(path, f"something follows ElementDataFile in line {number}, which must be the last")
    if path.suffix == ".mha" and start[position - 1 : position] != b"\n":
        raise fault(path, f"the file ends with its header; {gate.FETCH}")
    return fields, position


def _key_value(path: Path, line: bytes, number: int) -> tuple[str, str]:
    """Key and value of one header line."""
    try:
        text = line.decode("utf-8").replace("\t", " ").strip()
    except UnicodeDecodeError:
        raise fault(path, f"line {number} of the header is not UTF-8 text; {gate.FETCH}") from None
    key, sign, value = (part.strip() for part in text.partition("="))
    if not text.isprintable() or not sign or not key:
        raise fault(path, f"line {number} of the header is {shown(text)}, expected 'Key = Value'")
    known = SPELLING.get(key.lower())
    if known is not None and known != key:
        raise fault(path, f"line {number} of the header spells {known} as {shown(key)}; correct it")
    return key, value


def _check_constants(path: Path, fields: dict[str, str]) -> None:
    """Refuse a header that lacks a key, or that means another kind of image than ours."""
    for key in GIVEN:
        if key not in fields:
            raise fault(path, f"the header has no {key}; write the scan again")
    if fields["ObjectType"] != "Image":
        raise fault(path, f"ObjectType is {shown(fields['ObjectType'])}, expected 'Image'")
    if _integers(path, fields, "NDims", 1) != (3,):
        raise fault(path, f"NDims is {shown(fields['NDims'])}, expected 3")
    if not _flag(path, fields, "BinaryData"):
        raise fault(path, "BinaryData is False, expected True; write the scan again as binary")
    if fields.get("DistanceUnits", "mm") not in ("mm", "?"):
        raise fault(path, f"DistanceUnits is {shown(fields['DistanceUnits'])}, expected 'mm'")
    for key, value in ONLY_VALUE.items():
        if key in fields and _numbers(path, fields, key, 1) != (value,):
            raise fault(path, f"{key} is {shown(fields[key])}, expected {value:.0f}; write the scan again")


def _grid(path: Path, fields: dict[str, str]) -> Geometry:
    """Geometry that the header describes."""
    shape = gate.checked_shape(path, _integers(path, fields, "DimSize", 3))
    ox, oy, oz = _numbers(path, fields, _one_of(path, fields, ORIGIN), 3)
    spacing_key = SPACING[0] if SPACING[0] in fields else _one_of(path, fields, SPACING)
    sx, sy, sz = _numbers(path, fields, spacing_key, 3)
    direction: tuple[float, ...] = IDENTITY
    if any(key in fields for key in DIRECTION):
        axes = _numbers(path, fields, _one_of(path, fields, DIRECTION), 9)
        direction = (*axes[0::3], *axes[1::3], *axes[2::3])
    return gate.checked_grid(path, Geometry((ox, oy, oz), (sx, sy, sz), direction, shape))


def _one_of(path: Path, fields: dict[str, str], names: tuple[str, ...]) -> str:
    """Return the one key of several with the same meaning that the header has."""
    found = [name for name in names if name in fields]
    if not found:
        raise fault(path, f"the header has no {names[0]}; write the scan again")
    if len(found) > 1:
        raise fault(path, f"the header has both {found[0]} and {found[1]}; remove one")
    return found[0]


def _flag(path: Path, fields: dict[str, str], key: str) -> bool:
    """Value of a True/False key."""
    value = fields[key].lower()
    if value not in ("true", "false"):
        raise fault(path, f"{key} is {shown(fields[key])}, expected True or False")
    return value == "true"


def _numbers(path: Path, fields: dict[str, str], key: str, count: int) -> tuple[float, ...]:
    """`count` finite numbers."""
    words = fields[key].split()
    if len(words) != count or not all(NUMBER.fullmatch(word) for word in words):
        raise fault(path, f"{key} is {shown(fields[key])}, expected {count} plain number(s)")
    values = tuple(float(word) for word in words)
    if not all(math.isfinite(value) for value in values):
        raise fault(path, f"{key} is {shown(fields[key])}, expected {count} finite number(s)")
    return values


def _integers(path: Path, fields: dict[str, str], key: str, count: int) -> tuple[int, ...]:
    """`count` integers."""
    words = fields[key].split()
    if len(words) != count or not all(INTEGER.fullmatch(word) for word in words):
        raise fault(path, f"{key} is {shown(fields[key])}, expected {count} integer(s)")
    return tuple(int(word) for word in words)


def _data_name(path: Path, name: str) -> str:
    """ElementDataFile, refused unless it is the name of a file beside the header (.mhd) or LOCAL (.mha)."""
    if path.suffix == ".mha":
        if name != "LOCAL":
            raise fault(path, f"ElementDataFile is {shown(name)}, expected LOCAL in a .mha")
        return name
    if name.upper() == "LOCAL":
        raise fault(path, "ElementDataFile is LOCAL, which belongs in a .mha; expected a file's name")
    if name.startswith("LIST") or "%" in name:
        raise fault(path, f"ElementDataFile is {shown(name)}, a list or pattern; expected one file's name")
    if not name or "/" in name or "\\" in name or ".." in name or name == "." or name == path.name:
        raise fault(path, f"ElementDataFile is {shown(name)}, expected the name of a file in the same folder")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise fault(path, f"ElementDataFile has {len(name)} characters, expected a file's name")
    return name
