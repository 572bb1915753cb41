"""Small good scans, as text and bytes, for tests to write and to spoil."""

import struct
from collections.abc import Callable

SHAPE_XYZ = (8, 6, 5)
RAW = bytes(range(240)) * 2
FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-10 -20 5",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "RAI",
    "ElementSpacing": "0.7 0.7 2.5",
    "DimSize": "8 6 5",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "{uid}.raw",
}


def header_text(uid: str, **changes: str | None) -> str:
    """Header of a good scan with some values changed, removed (None) or added (before DimSize)."""
    fields = FIELDS | {k: v for k, v in changes.items() if k in FIELDS}
    added = [f"{k} = {v}" for k, v in changes.items() if k not in FIELDS]
    lines = [f"{k} = {v}" for k, v in fields.items() if v is not None]
    at = next((i for i, line in enumerate(lines) if line.startswith("DimSize")), len(lines) - 1)
    return "\n".join([*lines[:at], *added, *lines[at:]]).format(uid=uid) + "\n"


def nifti_bytes() -> bytearray:
    """A small good NIfTI-1 file, not compressed."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, *SHAPE_XYZ, 1, 1, 1, 1)
    struct.pack_into("<2h", head, 70, 4, 16)
    struct.pack_into("<8f", head, 76, 1, 0.7, 0.7, 2.5, 0, 0, 0, 0)
    struct.pack_into("<3f", head, 108, 352, 1, 0)
    head[123] = 2
    struct.pack_into("<2h", head, 252, 0, 1)
    struct.pack_into("<12f", head, 280, 0.7, 0, 0, -10, 0, 0.7, 0, -20, 0, 0, 2.5, 5)
    head[344:348] = b"n+1\0"
    return head + RAW


def put(at: int, form: str, *values: float) -> Callable[[bytearray], None]:
    """Edit that packs values at a byte of the NIfTI header."""
    return lambda content: struct.pack_into("<" + form, content, at, *values)


def flip(at: int) -> Callable[[bytes], bytes]:
    """Edit that flips one bit."""
    return lambda data: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
