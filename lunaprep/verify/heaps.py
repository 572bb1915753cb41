"""The global heaps of an HDF5 file, where it keeps the names of mapped files: looked at before HDF5 reads them.

HDF5 follows a heap's sizes, and reads a list of files to its end, before it looks at the list's checksum: a page of
zeros has it walk in a circle, and a changed byte in the rank of a selection has it crash. Layout: the HDF5 file format
specification, III.E (global heap) and "Global Heap Block for Virtual Datasets".
"""

from lunaprep.verify.places import BadFileError

HEAP = b"GCOL"
HEAD_BYTES = 16
"""Of a heap, and of each object in it."""
SUM_BYTES = 4
MASK = 0xFFFFFFFF


def require_heaps(raw: bytes) -> None:
    """Refuse a front door whose heaps hold anything but whole lists of mapped files.

    Raises
    ------
    BadFileError
        ``hdf5-layout``: sizes that lead nowhere, or a list that is not what its checksum says.
    """
    at = raw.find(HEAP)
    while at >= 0:
        end, place = at + _number(raw, at + 8), at + HEAD_BYTES
        _require(end <= len(raw), f"the heap at byte {at} goes beyond the end of the file")
        while place + HEAD_BYTES <= end:
            size, is_free = _number(raw, place + 8), raw[place : place + 2] == b"\0\0"
            block = raw[place + HEAD_BYTES : place + HEAD_BYTES + size]
            place += size if is_free else HEAD_BYTES + -(-size // 8) * 8
            is_whole = place <= end and size >= HEAD_BYTES and (is_free or _is_as_written(block))
            _require(is_whole, f"the heap at byte {at} is damaged; HDF5 isn't let near it")
        at = raw.find(HEAP, at + len(HEAP))


def _is_as_written(block: bytes) -> bool:
    return lookup3(block[:-SUM_BYTES]) == int.from_bytes(block[-SUM_BYTES:], "little")


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata: `hashlittle` of Bob Jenkins's lookup3.c (2006), begun at 0.

    >>> lookup3(b""), hex(lookup3(b"Four score and seven years ago"))
    (3735928559, '0x17770551')
    """
    a = b = c = (0xDEADBEEF + len(data)) & MASK
    if not data:
        return c
    last = (len(data) - 1) // 12 * 12
    for at in range(0, last, 12):
        a += int.from_bytes(data[at : at + 4], "little")
        b += int.from_bytes(data[at + 4 : at + 8], "little")
        c += int.from_bytes(data[at + 8 : at + 12], "little")
        for left in (4, 6, 8, 16, 19, 4):  # a, b, c take turns
            a = ((a - c) ^ _turn(c, left)) & MASK
            c += b
            a, b, c = b, c & MASK, a
    rest = data[last:].ljust(12, b"\0")
    a += int.from_bytes(rest[:4], "little")
    b += int.from_bytes(rest[4:8], "little")
    c += int.from_bytes(rest[8:], "little")
    for left in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _turn(b, left)) & MASK
        a, b, c = b, c, a
    return b  # the last of the turns was c's


def _turn(value: int, left: int) -> int:
    value &= MASK
    return value << left | value >> 32 - left


def _number(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 8], "little")


def _require(holds: bool, message: str) -> None:
    if not holds:
        code = "hdf5-layout"
        raise BadFileError(code, message)
