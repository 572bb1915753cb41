"""What a source scan must look like before SimpleITK is let near it.

SimpleITK reads more than it should: a header may name any file of the machine, and some values crash the
process. This is verify's own short look at a header, apart from the builder's.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from lunaprep.verify.hashing import BLOCK_BYTES, Meter
from lunaprep.verify.places import BadFileError, look, open_plain

MOST_HEADER_BYTES = 1 << 16

_ELEMENTS = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_FLOAT": 4,
    "MET_DOUBLE": 8, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What SimpleITK is given, one file or those of a series, and the files that the voxels lie in."""

    headers: tuple[Path, ...]
    voxels: tuple[Path, ...]


def find_source(data: Path, place: str) -> Source:
    """Find a scan's voxel file; BadFileError says why the scan can't be handed to SimpleITK.

    As in a build, the scan's own folder is the limit, and may itself be a link to another disk.
    """
    require_inside(place)
    folder = Path(os.path.realpath((data / place).parent))
    header, _ = _landed(folder, data / place)
    if not place.endswith(".mhd"):
        return Source((header,), (header,))
    fields = _header(header)
    name = fields.get("ElementDataFile", "")
    if not name or name in ("LOCAL", "LIST") or set(name) & set('/\\%"') or len(name.split()) != 1:
        code, message = "source-unreadable", f"ElementDataFile is {name!r:.120}; a file beside the header expected"
        raise BadFileError(code, message)
    voxels, size = _landed(folder, header.with_name(name))
    if fields.get("CompressedData", "False").lower() != "true":
        expected = _voxel_bytes(fields)
        if size != expected:
            code, message = "source-unreadable", f"{name} has {size} bytes, the header asks for {expected}"
            raise BadFileError(code, message)
    return Source((header,), (voxels,))


def require_inside(place: str) -> None:
    """Refuse a recorded path that doesn't lead down from the data folder, as it is written."""
    if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\0" in place:
        code, message = "source-unreadable", f"not a path inside the data folder: {place!r:.120}"
        raise BadFileError(code, message)


def _landed(folder: Path, file: Path) -> tuple[Path, int]:
    """Where a file lies once links are followed, which must be inside a folder without links; and its size."""
    path = Path(os.path.realpath(file))
    if not path.is_relative_to(folder):
        code, message = "source-unreadable", f"{file.name} leads out of its folder"
        raise BadFileError(code, message)
    return path, look(folder, path.relative_to(folder).as_posix()).st_size


def _header(path: Path) -> dict[str, str]:
    code = "source-unreadable"
    with open(open_plain(path.parent, path.name), "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        raw = file.read(MOST_HEADER_BYTES + 1)
    if len(raw) > MOST_HEADER_BYTES:
        message = f"the header has more than {MOST_HEADER_BYTES} bytes"
        raise BadFileError(code, message)
    fields: dict[str, str] = {}
    for line in raw.decode("latin-1").splitlines():
        key, equals, value = line.partition("=")
        if line.strip() and (not equals or key.strip() in fields):
            message = f"header line {line!r:.80} has no = or stands twice"
            raise BadFileError(code, message)
        fields[key.strip()] = value.strip()
    if fields.get("NDims") != "3":
        message = f"NDims is {fields.get('NDims')!r:.40}, expected 3"
        raise BadFileError(code, message)
    return fields


def _voxel_bytes(fields: dict[str, str]) -> int:
    try:
        sides = [int(side) for side in fields["DimSize"].split()]
        element = _ELEMENTS[fields["ElementType"]]
    except (KeyError, ValueError):
        sides, element = [], 0
    channels = fields.get("ElementNumberOfChannels", "1")
    if len(sides) != 3 or min(sides) < 1 or channels != "1" or fields.get("HeaderSize", "0") != "0":
        code, message = "source-unreadable", "DimSize, ElementType, channels or HeaderSize aren't a plain scan's"
        raise BadFileError(code, message)
    return int(np.prod([*sides, element], dtype=object))


def hash_voxels(source: Source, meter: Meter) -> str:
    """XXH3-128 of the bytes of the voxel files, one after another, hexadecimal."""
    digest = xxhash.xxh3_128()
    for path in source.voxels:
        with open(open_plain(path.parent, path.name), "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                meter.add(len(block))
    return digest.hexdigest()
