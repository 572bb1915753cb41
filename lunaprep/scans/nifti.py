"""NIfTI-1 files (.nii.gz): the 348-byte header checked by us, the geometry in it read by SimpleITK."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from lunaprep.errors import ScanError
from lunaprep.scans import gate
from lunaprep.scans.gate import Layout, fault, shown

HEADER_BYTES = 348
MAX_VOX_OFFSET = 65536

DATATYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}

DIM, DATATYPE, PIXDIM, VOX_OFFSET, FORMS, QUATERNION = 40, 70, 76, 108, 252, 256


@dataclass(frozen=True)
class NiftiHeader:
    """A checked NIfTI-1 header: grid shape, storage, and the hash of its bytes (extensions included)."""

    shape_irc: tuple[int, int, int]
    layout: Layout
    xxh3: str


def read_header(file: Path, path: Path) -> NiftiHeader:
    """Decompress the start of `file`, no link, and check its header; `path` is its name for users."""
    start, _ = gate.read_start(file, path, MAX_VOX_OFFSET)
    if not start:
        raise fault(path, f"the file is empty; {gate.FETCH}")
    return parse_header(path, _first_bytes(path, start))


def _first_bytes(path: Path, packed: bytes) -> bytes:
    """First `MAX_VOX_OFFSET` decompressed bytes at most, of the first bytes of the file."""
    head = b""

    def pieces() -> Iterator[bytes]:
        yield from (packed[at : at + 4096] for at in range(0, len(packed), 4096))

    try:
        for piece in gate.inflated(path, pieces(), gate.GZIP):
            head += piece
            if len(head) >= MAX_VOX_OFFSET:
                break
    except ScanError:
        if len(head) < HEADER_BYTES + 4:  # else only the packed bytes end here, or damage beyond the header
            raise
    return head[:MAX_VOX_OFFSET]


def parse_header(path: Path, head: bytes) -> NiftiHeader:
    """Check the header with which the decompressed file begins."""
    if len(head) < HEADER_BYTES + 4:
        raise fault(path, f"{len(head)} bytes once decompressed, too few for a NIfTI header; {gate.FETCH}")
    order = next((o for o in "<>" if struct.unpack_from(o + "i", head)[0] == HEADER_BYTES), None)
    if order is None or head[344:348] != b"n+1\0":
        raise fault(path, f"no NIfTI-1 header (magic is {shown(head[344:348])}, expected 'n+1')")
    shape = _shape(path, struct.unpack_from(order + "8h", head, DIM))
    dtype = _dtype(path, struct.unpack_from(order + "2h", head, DATATYPE), order)
    offset, slope, inter = struct.unpack_from(order + "3f", head, VOX_OFFSET)
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise fault(path, f"scl_slope is {slope} and scl_inter {inter}, expected finite numbers")
    _check_pose(path, head, order)
    skip = _voxel_offset(path, head, offset, order)
    layout = Layout(
        dtype=dtype,
        codec=gate.GZIP,
        offset=0,
        skip=skip,
        num_bytes=skip + math.prod(shape) * dtype.itemsize,
        is_scaled=slope not in (0.0, 1.0) or inter != 0.0,
    )
    return NiftiHeader(shape, layout, xxhash.xxh3_128_hexdigest(head[:skip]))


def _shape(path: Path, dim: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape of the grid; four dimensions are taken where the fourth is 1."""
    if dim[0] not in (3, 4) or (dim[0] == 4 and dim[4] != 1):
        raise fault(path, f"dim is {shown(dim, 60)}, expected one volume of three dimensions")
    return gate.checked_shape(path, dim[1:4])


def _dtype(path: Path, code: tuple[int, ...], order: str) -> "np.dtype[np.generic]":
    """Element type as stored."""
    name = DATATYPES.get(code[0])
    if name is None:
        raise fault(path, f"datatype is {code[0]}, expected a plain number type like 4 (int16)")
    dtype = np.dtype(name).newbyteorder("<" if order == "<" else ">")
    if code[1] != dtype.itemsize * 8:
        raise fault(path, f"bitpix is {code[1]}, expected {dtype.itemsize * 8} for datatype {code[0]}")
    return dtype


def _check_pose(path: Path, head: bytes, order: str) -> None:
    """Refuse a header without a position in space, or with numbers that are none."""
    pixdim = struct.unpack_from(order + "8f", head, PIXDIM)
    if not all(math.isfinite(step) and step > 0 for step in pixdim[1:4]):
        raise fault(path, f"pixdim is {shown(pixdim[1:4], 60)}, expected three steps greater than 0")
    forms = struct.unpack_from(order + "2h", head, FORMS)
    if forms[0] <= 0 and forms[1] <= 0:
        raise fault(path, "no position: qform_code and sform_code are both 0; convert the scan again")
    if not all(0 <= code <= 5 for code in forms):
        raise fault(path, f"qform_code and sform_code are {forms}, expected codes from 0 to 5")
    if not all(math.isfinite(value) for value in struct.unpack_from(order + "18f", head, QUATERNION)):
        raise fault(path, "its qform or sform has numbers that are not finite; convert the scan again")


def _voxel_offset(path: Path, head: bytes, offset: float, order: str) -> int:
    """Byte of the first voxel; the header extensions before it must fill the gap exactly."""
    if not HEADER_BYTES + 4 <= offset <= MAX_VOX_OFFSET or offset != int(offset):
        raise fault(path, f"vox_offset is {offset:g}, expected {HEADER_BYTES + 4} to {MAX_VOX_OFFSET}")
    end = int(offset)
    if len(head) < end:
        raise fault(path, f"cut short: {len(head)} bytes decompressed, voxels begin at {end}; {gate.FETCH}")
    at = HEADER_BYTES + 4
    while head[HEADER_BYTES] and at < end:
        size = struct.unpack_from(order + "i", head, at)[0] if at + 8 <= end else 0
        if size < 16 or size % 16 or at + size > end:
            raise fault(path, f"header extension at byte {at} has {size} bytes, which does not fit")
        at += size
    return end
