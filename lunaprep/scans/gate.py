"""What every scan reader checks before it believes a file: name and place, kind, grid, compressed stream."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from lunaprep.errors import PassingScanError, ScanError
from lunaprep.geometry import Geometry

MAX_SIDE = 4096
MAX_VOXELS = 2**31
SPACING_MM = (1e-3, 1e3)
MAX_ORIGIN_MM = 1e5
ORTHONORMAL_TOLERANCE = 1e-3

PLAIN, ZLIB, GZIP = 0, 15, 31
"""How a stream is coded: not at all, or zlib's ``wbits``."""

CODEC_NAMES = {ZLIB: "zlib", GZIP: "gzip"}
MAX_INFLATION = 1040
"""Deflate cannot make more than 1032 bytes of one."""

STEP_BYTES = 1 << 20
FETCH = "fetch the scan again"


@dataclass(frozen=True)
class Layout:
    """How the voxels lie in a file that is not simply the voxels.

    Parameters
    ----------
    dtype : numpy.dtype
        Element type as stored, with its byte order.
    codec : int
        `PLAIN`, `ZLIB` or `GZIP`.
    offset : int
        Bytes of the file before the (compressed) stream.
    skip : int
        Decoded bytes before the first voxel.
    num_bytes : int
        Decoded bytes in all, `skip` included.
    is_scaled : bool
        Whether the values are to be multiplied or shifted (NIfTI's scl_slope and scl_inter).
    """

    dtype: "np.dtype[np.generic]"
    codec: int
    offset: int
    skip: int
    num_bytes: int
    is_scaled: bool = False


def fault(path: Path, text: str) -> ScanError:
    """Error about the scan whose header is `path`, on one line."""
    return ScanError(f"{path.name}: {text}")


def refused(path: Path, text: str, error: OSError) -> PassingScanError:
    """Error about a scan that the system would not give; `error` says why, its file name is left out."""
    return PassingScanError(f"{path.name}: {text}: {(error.strerror or type(error).__name__).lower()}")


def shown(value: object, limit: int = 40) -> str:
    """A foreign value fit for a line of text: quoted, ASCII, no control characters, cut short."""
    text = ascii(str(value))
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[0]}"


def located(file: Path, root: Path, path: Path) -> Path:
    """`file` itself, or where it leads if it is a link; refused unless it exists and lies inside `root`."""
    role = "the file" if file == path else f"its data file {shown(file.name)}"
    try:
        real = file.resolve(strict=True)
        inside = real.is_relative_to(root.resolve(strict=True))
        is_link = file.is_symlink()
    except FileNotFoundError:
        raise fault(path, f"{role} does not exist; {FETCH}") from None
    except OSError as error:
        raise refused(path, f"{role} cannot be reached", error) from None
    except RuntimeError:  # Python < 3.13
        raise fault(path, f"{role} cannot be reached: a symbolic link leads to itself") from None
    if not inside:
        raise fault(path, f"{role} leads out of the data folder; copy it in, or name the folder it is in")
    return real if is_link else file


def open_plain(file: Path, path: Path) -> tuple[int, int]:
    """Descriptor and size of a regular file; never follows a link, never waits, never opens anything else.

    Parameters
    ----------
    file : Path
        File to open.
    path : Path
        Header to name in errors; may be `file`.
    """
    role = "the file" if file == path else f"its data file {shown(file.name)}"
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise fault(path, f"{role} is no regular file (a folder, link, pipe or device)")
        fd = os.open(file, flags)
    except OSError as error:
        raise refused(path, f"{role} cannot be opened", error) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise fault(path, f"{role} is no regular file (a folder, link, pipe or device)")
    return fd, status.st_size


def plain_size(file: Path, path: Path) -> int:
    """Size of a regular file that can be opened."""
    fd, size = open_plain(file, path)
    os.close(fd)
    return size


def read_start(file: Path, path: Path, limit: int) -> tuple[bytes, int]:
    """First `limit` bytes of a header file, and the size of the file."""
    fd, size = open_plain(file, path)
    with os.fdopen(fd, "rb") as source:
        try:
            return source.read(limit), size
        except OSError as error:
            raise refused(path, "the file cannot be read", error) from None


def landed(path: Path) -> Path:
    """Where a header that has been opened before really lies."""
    return path.resolve() if path.is_symlink() else path


def checked_shape(path: Path, sides_xyz: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape (slices, rows, columns) of a grid of x, y, z voxels."""
    if len(sides_xyz) != 3 or not all(1 <= side <= MAX_SIDE for side in sides_xyz):
        raise fault(path, f"its size is {shown(sides_xyz)}, expected three sides from 1 to {MAX_SIDE}")
    x, y, z = sides_xyz
    if x * y * z > MAX_VOXELS:
        raise fault(path, f"its size is {x} x {y} x {z}, more than {MAX_VOXELS} voxels")
    return z, y, x


def checked_grid(path: Path, grid: Geometry) -> Geometry:
    """`grid`, refused unless its numbers are finite, within reason, and its axes at right angles."""
    low, high = SPACING_MM
    if not all(low <= step <= high for step in grid.spacing):
        got = " ".join(f"{step:.4g}" for step in grid.spacing)
        raise fault(path, f"its spacing is {shown(got)}, expected three steps of {low} to {high:.0f} mm")
    if not all(abs(place) <= MAX_ORIGIN_MM for place in grid.origin):
        got = " ".join(f"{place:.4g}" for place in grid.origin)
        raise fault(path, f"its origin is {shown(got)}, expected three within ±{MAX_ORIGIN_MM:.0f} mm")
    axes = grid.direction_matrix
    if not np.isfinite(axes).all() or np.abs(axes).max() > 2:
        raise fault(path, "its direction has numbers that no unit vector has; write the scan again")
    if np.abs(axes.T @ axes - np.eye(3)).max() > ORTHONORMAL_TOLERANCE:
        raise fault(path, "its direction is not orthonormal (axes of length 1 at right angles)")
    return grid


def check_stored(path: Path, layout: Layout, size: int) -> None:
    """Refuse a file whose size cannot hold what its header promises."""
    stored = size - layout.offset
    if layout.codec == PLAIN:
        if stored != layout.num_bytes:
            raise wrong_size(path, stored, layout.num_bytes)
    elif stored * MAX_INFLATION < layout.num_bytes:
        raise fault(
            path,
            f"cut short: {stored} bytes of {CODEC_NAMES[layout.codec]} data cannot hold the "
            f"{layout.num_bytes} bytes that the header promises; {FETCH}",
        )


def wrong_size(path: Path, got: int, expected: int) -> ScanError:
    """Error about voxel data that are longer or shorter than the header says."""
    if got < expected:
        text = f"the download is cut short: {got} bytes of voxels, the header says {expected}; {FETCH}"
    else:
        text = f"more voxels than the header says: {got} bytes, expected {expected}; {FETCH}"
    return fault(path, text)


def check_stream(path: Path, file: Path, layout: Layout, hasher: xxhash.xxh3_128 | None) -> bytes:
    """Decode a whole stream in small steps; refuse it unless checksum and length are right.

    Parameters
    ----------
    path, file : Path
        Header, to be named in errors, and the file that holds the stream.
    layout : Layout
        What the header promises.
    hasher : xxhash.xxh3_128, optional
        Gets all bytes of the file.

    Returns
    -------
    bytes
        XXH3-128 digest of the voxels' bytes as stored.
    """
    fd, size = open_plain(file, path)
    with os.fdopen(fd, "rb", buffering=0) as source:
        check_stored(path, layout, size)
        voxels = xxhash.xxh3_128()
        skip = layout.skip
        for piece in _decoded(path, _chunks(path, source.fileno(), layout.offset, hasher), layout):
            voxels.update(memoryview(piece)[skip:])
            skip -= min(skip, len(piece))
    return voxels.digest()


def _chunks(path: Path, fd: int, offset: int, hasher: xxhash.xxh3_128 | None) -> Iterator[bytes]:
    """Yield the bytes of a file from `offset` on; the hasher gets those before it as well."""
    while True:
        try:
            chunk = os.read(fd, STEP_BYTES)
        except OSError as error:
            raise refused(path, "its voxels cannot be read", error) from None
        if not chunk:
            return
        if hasher is not None:
            hasher.update(chunk)
        if offset < len(chunk):
            yield chunk[offset:]
        offset -= min(offset, len(chunk))


def _decoded(path: Path, chunks: Iterator[bytes], layout: Layout) -> Iterator[bytes]:
    """Yield the decoded pieces, none longer than `STEP_BYTES`; raise if the sum is not what is promised."""
    total = 0
    for piece in chunks if layout.codec == PLAIN else inflated(path, chunks, layout.codec):
        total += len(piece)
        if total > layout.num_bytes:
            raise wrong_size(path, total, layout.num_bytes)
        yield piece
    if total != layout.num_bytes:
        raise wrong_size(path, total, layout.num_bytes)


def inflated(path: Path, chunks: Iterator[bytes], codec: int) -> Iterator[bytes]:
    """Decompressed pieces of a zlib or gzip stream, each within `STEP_BYTES`, to the verified end."""
    from isal import isal_zlib
    from isal.igzip_lib import IsalError

    name = CODEC_NAMES[codec]
    engine = isal_zlib.decompressobj(wbits=codec)
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                if engine.eof:  # gzip may have several members, zlib may not
                    if codec != GZIP or rest[:1] != b"\x1f":
                        raise fault(path, f"bytes follow the end of its {name} stream; {FETCH}")
                    engine = isal_zlib.decompressobj(wbits=codec)
                yield engine.decompress(rest, STEP_BYTES)
                rest = engine.unused_data if engine.eof else engine.unconsumed_tail
        while not engine.eof and (piece := engine.decompress(b"", STEP_BYTES)):
            yield piece
    except IsalError as error:  # type: ignore[misc] # its stub calls the class a value
        raise fault(path, f"its {name} stream is damaged ({shown(error, 60)}); {FETCH}") from None
    if not engine.eof:
        raise fault(path, f"its {name} stream is cut short; {FETCH}")
