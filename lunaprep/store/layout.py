"""Whether an HDF5 file of the store is built as the format says, before anything in it is believed."""

import re
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lunaprep import schema
from lunaprep.errors import StoreError

ADVICE = "Don't trust it; delete it and run 'lunaprep build' again"


def check_shard(
    path: Path, rows: int, crop_shape: tuple[int, ...], dtype: str, dataset: str = schema.CROPS_DATASET
) -> None:
    """Refuse a shard that is not one run of `rows` crops behind `DATA_OFFSET` bytes, and nothing else.

    Raises
    ------
    StoreError
        Says what it is instead.
    """
    expected = schema.DATA_OFFSET + rows * schema.crop_bytes(crop_shape, dtype)
    size = plain_size(path)
    if size != expected:
        message = f"{path.name} has {size} bytes, expected {expected}: it is cut or changed. {ADVICE}"
        raise StoreError(message)
    got = _layout(path, dataset.encode())
    _require(path, "shape", got["shape"], (rows, *crop_shape))
    _require(path, "dtype", got["dtype"], np.dtype(dtype).newbyteorder("<"))
    _require(path, "chunks", got["chunks"], (1, *crop_shape))
    _require(path, "filters", got["filters"], 0)
    _require(path, "offset of the first crop", got["offset"], schema.DATA_OFFSET)


def _layout(path: Path, dataset: bytes) -> dict[str, Any]:
    """What HDF5 says of a chunked dataset that lies in this very file.

    By h5py's inner functions: half the time of its objects, and a large store has 150 shards to look at when it opens.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_file_locking(False, True)
    try:
        file = h5py.h5f.open(bytes(path), h5py.h5f.ACC_RDONLY, access)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if file.links.get_info(dataset).type == h5py.h5l.TYPE_HARD:
            found = h5py.h5d.open(file, dataset)
            made = found.get_create_plist()
            if made.get_layout() == h5py.h5d.CHUNKED and made.get_external_count() == 0:
                return {
                    "shape": found.shape,
                    "dtype": found.dtype,
                    "chunks": made.get_chunk(),
                    "filters": made.get_nfilters(),
                    "offset": found.get_chunk_info(0).byte_offset,
                }
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if _system_says(error):
            raise _unreadable(path, error) from error
        # else damaged inside, or no dataset
    finally:
        file.close()
    message = f"{path.name} has no plain chunked dataset /{dataset.decode()}. {ADVICE}"
    raise StoreError(message)


def plain_size(path: Path) -> int:
    """Size of a regular file.

    Raises
    ------
    StoreError
        It is not there, or something else (a pipe would wait for ever).
    """
    try:
        status = path.stat()
    except OSError as error:
        message = f"{path.name} cannot be read: {error.strerror}. Run 'lunaprep build' again"
        raise StoreError(message) from error
    if not stat.S_ISREG(status.st_mode):
        message = f"{path.name} is no plain file. {ADVICE}"
        raise StoreError(message)
    return status.st_size


def open_h5(path: Path) -> Any:
    """Open an HDF5 file for reading, without locks.

    Raises
    ------
    StoreError
        HDF5 cannot open it.
    """
    plain_size(path)
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise _unreadable(path, error) from error


def _system_says(error: Exception) -> str:
    """What the system told HDF5, where it would not read: the file may well be whole."""
    found = re.search(r"errno = [1-9]\d*, error message = '([^']*)'", str(error))
    return found[1] if found else ""


def _unreadable(path: Path, error: Exception) -> StoreError:
    reason = _system_says(error) or str(error).splitlines()[0][:120]
    return StoreError(f"{path.name} cannot be opened: {reason}. Run 'lunaprep verify'")


def plain_dataset(path: Path, h5: Any, name: str) -> Any:
    """The dataset of that name, if it is a hard link to values in this very file.

    Raises
    ------
    StoreError
        There is none, or it leads elsewhere.
    """
    try:
        if isinstance(h5.get(name, getlink=True), h5py.HardLink):
            dataset = h5[name]
            if isinstance(dataset, h5py.Dataset) and not dataset.is_virtual and dataset.external is None:
                return dataset
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if _system_says(error):
            raise _unreadable(path, error) from error
    message = f"{path.name} has no plain dataset /{name}. {ADVICE}"
    raise StoreError(message)


def check_packing(path: Path, dataset: Any) -> None:
    """Refuse a volume or mask whose chunks are larger than the format's, or packed in another way.

    HDF5 unpacks a deflated chunk to its end, however much that is. Of a chunk that takes no more room than its voxels
    would, that is at most a thousand times a small chunk.

    Raises
    ------
    StoreError
        Says what it is instead.
    """
    sizes: list[int] = []
    made = dataset.id.get_create_plist()
    filters = [made.get_filter(k)[0] for k in range(made.get_nfilters())]
    deflate = [h5py.h5z.FILTER_DEFLATE]
    _require(path, "filters", filters, [h5py.h5z.FILTER_SHUFFLE, *deflate] if dataset.dtype.itemsize > 1 else deflate)
    chunk = np.minimum(dataset.chunks, schema.VOLUME_CHUNK_IRC)
    _require(path, "chunks", tuple(dataset.chunks), tuple(chunk.tolist()))
    dataset.id.chunk_iter(lambda stored: sizes.append(stored.size))
    plain = int(np.prod(chunk)) * dataset.dtype.itemsize
    most = plain + plain // 1000 + 64  # deflate's own worst case
    largest = max(sizes, default=0)
    if largest > most:
        message = f"{path.name} has a chunk of {largest} bytes, expected at most {most}. {ADVICE}"
        raise StoreError(message)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what h5py raises of damage within a file into an error that names the file."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        *_, innermost = traceback.walk_tb(error.__traceback__)
        if "h5py/" not in innermost[0].f_code.co_filename:
            raise
        if _system_says(error):
            raise _unreadable(path, error) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        message = f"{path.name} is damaged inside: {reason}. Run 'lunaprep verify'"
        raise StoreError(message) from error


def _require(path: Path, what: str, got: object, expected: object) -> None:
    if got != expected:
        message = f"{path.name}: {what} is {got}, expected {expected}. {ADVICE}"
        raise StoreError(message)
