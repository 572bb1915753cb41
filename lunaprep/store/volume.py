"""A volume: one clipped scan as /hu, float32, and its masks, shuffled and deflated by a fast encoder.

The filters are HDF5's own, so any HDF5 program reads the file; only the encoder is another (ISA-L, eight times zlib's
speed). The chunks are compressed here and handed to HDF5 as they are.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.geometry import Geometry
from lunaprep.store.encoder import LEVEL, deflate
from lunaprep.store.files import explain_disk, hash_file, open_partial, publish, write_all


class _DiskFile:
    """File object for h5py that remembers what went wrong: HDF5 must see no failing disk (it crashes) and no Ctrl-C."""

    def __init__(self, path: Path) -> None:
        self.error: BaseException | None = None
        self._fd = open_partial(path)
        self._at = self._size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += self._size
        self._at = self._at + offset if whence == os.SEEK_CUR else offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        try:
            return os.pread(self._fd, count if count >= 0 else self._size, self._at)
        except BaseException as error:  # raised again by the writer, outside HDF5
            self.error = self.error or error
            return b""

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer)).ljust(len(buffer), b"\0")
        buffer[:] = data
        self._at += len(data)
        return len(data)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                write_all(self._fd, data, self._at)
            except BaseException as error:  # as above
                self.error = error
        self._at += len(data)
        self._size = max(self._size, self._at)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._size = size = self._at if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._fd, size)
            except BaseException as error:  # as above
                self.error = error
        return size

    def flush(self) -> None:
        pass

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class _Layers:
    """One dataset of a volume, written a layer of chunks at a time as its slices come."""

    def __init__(self, h5: Any, name: str, shape: tuple[int, int, int], dtype: str) -> None:
        self.chunk_xxh3: list[str] = []
        self._shape = shape
        self._chunk = schema.volume_chunk(shape)
        self._is_shuffled = np.dtype(dtype).itemsize > 1
        self.dataset: Any = h5.create_dataset(
            name,
            shape=shape,
            dtype=dtype,
            chunks=self._chunk,
            shuffle=self._is_shuffled,
            compression="gzip",
            compression_opts=LEVEL,
            track_times=False,
        )
        self.num_written = 0
        self._filled = 0
        self._layer = np.empty((self._chunk[0], *shape[1:]), dtype=dtype)
        self._block = np.zeros(self._chunk, dtype=dtype)
        self._plane = np.empty(self._chunk, dtype=np.uint8)
        self._blank = b""

    @property
    def is_full(self) -> bool:
        """Whether all slices were written."""
        return self.num_written == self._shape[0]

    def append(self, slab: npt.NDArray[Any]) -> None:
        """Add the next slices."""
        while len(slab):
            wanted = min(self._chunk[0], self._shape[0] - self.num_written) - self._filled
            taken, slab = slab[:wanted], slab[wanted:]
            if len(taken) == wanted and not self._filled:
                self._write_layer(taken)
                continue
            self._layer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if len(taken) == wanted:
                self._write_layer(self._layer[: self._filled])
                self._filled = 0

    def _write_layer(self, layer: npt.NDArray[Any]) -> None:
        """Compress and write one layer of chunks, the last one perhaps of fewer slices."""
        _, height, width = self._chunk
        for row in range(0, self._shape[1], height):
            for col in range(0, self._shape[2], width):
                data = self._encode(layer[:, row : row + height, col : col + width])
                self.chunk_xxh3.append(xxhash.xxh3_64_hexdigest(data))
                self.dataset.id.write_direct_chunk((self.num_written, row, col), data)
        self.num_written += len(layer)

    def _encode(self, part: npt.NDArray[Any]) -> bytes:
        """Deflate the bytes of one chunk; of floats all first bytes, then all second bytes, ..."""
        if part.shape != self._chunk:
            self._block.fill(0)
        self._block[: part.shape[0], : part.shape[1], : part.shape[2]] = part
        if not self._is_shuffled:
            return self._encode_mask()
        return deflate(self._planes())

    def _planes(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The block's first bytes, its second bytes, ...; each in the place of the one before."""
        bits = self._block.view("<u4")
        for plane in range(4):  # shifting is half again as fast as copying every fourth byte
            np.right_shift(bits, 8 * plane, out=self._plane, casting="unsafe")
            yield self._plane

    def _encode_mask(self) -> bytes:
        """Most chunks of a mask are empty: those are compressed once."""
        if self._block.any():
            return deflate([self._block])
        self._blank = self._blank or deflate([self._block])
        return self._blank


class VolumeWriter:
    """Write one scan slab by slab, in slice order, then its masks; `finish` makes the file whole.

    Parameters
    ----------
    partial : Path
        Temporary name on the store's file system.
    series_uid : str
        Series, kept as an attribute.
    geometry : Geometry
        Grid of the scan.
    """

    def __init__(self, partial: Path, series_uid: str, geometry: Geometry) -> None:
        self.partial = partial
        self._shape = geometry.shape_irc
        self._file = _DiskFile(partial)
        self._h5: Any = h5py.File(self._file, "w", libver=schema.LIBVER)
        self._h5.attrs["format"] = np.bytes_(schema.FORMAT)
        self._h5.attrs["version"] = np.int64(schema.FORMAT_VERSION)
        self._h5.attrs["series_uid"] = np.bytes_(series_uid)
        self._layers = {schema.HU_DATASET: _Layers(self._h5, schema.HU_DATASET, self._shape, "<f4")}
        for name in ("origin", "spacing", "direction"):
            hu = self._layers[schema.HU_DATASET].dataset
            hu.attrs[name] = np.array(getattr(geometry, name), dtype="<f8")
        self._is_finished = False

    def __enter__(self) -> "VolumeWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_finished:
            self.discard()

    @property
    def chunk_xxh3(self) -> list[str]:
        """XXH3-64 of each stored chunk, dataset after dataset."""
        return [digest for layers in self._layers.values() for digest in layers.chunk_xxh3]

    def append(self, slab: npt.NDArray[Any]) -> None:
        """Add the next (k, rows, columns) slices, clipped HU."""
        self._layers[schema.HU_DATASET].append(slab)
        self._check()

    def append_mask(self, name: str, slab: npt.NDArray[np.uint8]) -> None:
        """Add the next (k, rows, columns) slices of the mask of this name, after all of the scan's."""
        assert self._layers[schema.HU_DATASET].is_full
        if name not in self._layers:
            self._layers[name] = _Layers(self._h5, name, self._shape, "u1")
        self._layers[name].append(slab)
        self._check()

    def _check(self) -> None:
        error = self._file.error
        if isinstance(error, OSError):
            raise explain_disk(error, self.partial) from error
        if error is not None:
            raise error

    def finish(self) -> tuple[int, str]:
        """Close and flush to the disk; return the file's size and SHA-256."""
        for layers in self._layers.values():
            assert layers.is_full, f"{layers.num_written} of {self._shape[0]} slices were written"
        self._h5.close()
        self._check()
        try:
            self._file.sync()
            size, sha256 = self.partial.stat().st_size, hash_file(self.partial)
        except OSError as error:
            raise explain_disk(error, self.partial) from error
        self._file.close()
        self._is_finished = True
        return size, sha256

    def publish_as(self, final: Path) -> None:
        """Give the finished file another name."""
        publish(self.partial, final)

    def discard(self) -> None:
        """Drop the partial file."""
        with suppress(Exception):
            self._h5.close()
        self._file.close()
        with suppress(FileNotFoundError):
            self.partial.unlink()
