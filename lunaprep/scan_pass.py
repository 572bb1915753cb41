"""One pass over a scan's voxels, and all that is made on the way: crops, slabs, the volume, masks.

It keeps a window of slices, never a scan.
"""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.crops import Triple, cut_crop, needed_voxels, resample_crop
from lunaprep.errors import ScanError
from lunaprep.geometry import FloatArray, IntArray
from lunaprep.scans.open import iter_slabs
from lunaprep.scans.scan import Scan
from lunaprep.store.shard import ShardWriter
from lunaprep.store.volume import VolumeWriter
from lunaprep.targets import TargetMaker

SLAB_SLICES = 32
"""Slices read at a time: a multiple of the volume chunk's depth."""

BATCH_BYTES = 1 << 20
"""Crops cut before they are hashed and written: about 1 MB, so that they are still in the cache then."""

BATCHES = 16
"""Batches that may wait to be written: about what one slab makes ready."""

WINDOW_SLABS = 2
"""Slabs the window holds besides what the next crop may reach back to; with one, every slice would be moved once."""


@dataclass(frozen=True)
class Cut:
    """Crops to cut: first voxels (n, 3), sorted by slice, and the shard they go to, in this order.

    With a step (see `lunaprep.crops.step_of`) they are resampled; the starts are then places between voxels.
    """

    starts: IntArray | FloatArray
    writer: ShardWriter
    step_irc: Triple | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns of a crop."""
        return self.writer.crop_shape

    @property
    def depth(self) -> int:
        """Slices of the scan that a crop may need at once, counted from the start of the one before."""
        return crop_depth(self.shape[0], self.step_irc)

    @property
    def batch_crops(self) -> int:
        """Crops to hash and write at a time."""
        return batch_crops(schema.crop_bytes(self.shape, self.writer.dtype))

    def stop(self, k: int, num_slices: int) -> int:
        """Slices of the scan, counted from its first, that must have been read for crop `k`."""
        start, side = self.starts[k, 0], self.shape[0]
        if self.step_irc is None:
            return min(int(start) + side, num_slices)
        return needed_voxels(float(start), self.step_irc[0], side, num_slices)[1]

    def make(self, k: int, window: "_Window", out: npt.NDArray[Any], fill: float) -> None:
        """Cut crop `k`."""
        i, r, c = self.starts[k].tolist()
        if self.step_irc is None:
            cut_crop(window.slices, window.first, (i, r, c), out, fill)
        else:
            resample_crop(window.slices, window.first, window.num_slices, (i, r, c), self.step_irc, out, fill)


@dataclass(frozen=True)
class PassFacts:
    """What a pass over a scan's voxels found out."""

    data_xxh3: str
    hu_min: float
    hu_max: float
    clipped_share: float


def pass_over(
    scan: Scan,
    hu: tuple[int, int],
    dtype: str,
    cuts: Sequence[Cut] = (),
    volume: VolumeWriter | None = None,
    targets: TargetMaker | None = None,
) -> PassFacts:
    """Read a scan once; cut its crops, write its volume and see its targets on the way.

    Parameters
    ----------
    scan : Scan
        The scan.
    hu : tuple of 2 int
        Window to clip to, HU.
    dtype : {"int16", "float32"}
        Type of the slabs, and of crops that are not resampled.
    cuts : sequence of Cut
        Crops to cut, and slabs.
    volume : VolumeWriter, optional
        Where the clipped slices go.
    targets : TargetMaker, optional
        Sees the slices before they are clipped.

    Raises
    ------
    ScanError
        The voxels are not what the header says, or int16 would lose something.
    """
    window = _Window(scan, hu, dtype, max((cut.depth for cut in cuts), default=1))
    hasher = xxhash.xxh3_128()
    with ExitStack() as stack:
        cutters = [stack.enter_context(_Cutter(window, cut, fill=hu[0])) for cut in cuts]
        for slab in iter_slabs(scan, SLAB_SLICES, hasher):
            fresh = window.take(slab)
            for cutter in cutters:
                cutter.cut_ready()
            if targets is not None:
                targets.take(slab)
            if volume is not None:
                volume.append(fresh)
        for cutter in cutters:
            cutter.finish()
    return PassFacts(hasher.hexdigest(), window.hu_min, window.hu_max, window.num_clipped / window.num_voxels)


def crop_depth(num_slices: int, step_irc: Triple | None) -> int:
    """Slices of the scan that must be kept for crops of so many slices.

    Resampled ones reach one slice further; and they are sorted by their first place rounded, so that the next may
    begin a slice before this one.
    """
    return num_slices if step_irc is None else math.ceil((num_slices - 1) * step_irc[0]) + 4


def batch_crops(crop_bytes: int) -> int:
    """Crops that are hashed and written at a time."""
    return max(1, BATCH_BYTES // crop_bytes)


class _Window:
    """The latest clipped slices of a scan: enough for any crop that the next slab completes."""

    def __init__(self, scan: Scan, hu: tuple[int, int], dtype: str, depth: int) -> None:
        num_slices, num_rows, num_cols = scan.geometry.shape_irc
        self.scan = scan
        self.num_slices = num_slices
        self.num_voxels = num_slices * num_rows * num_cols
        self.first = 0
        self.stop = 0
        self.hu_min, self.hu_max = np.inf, -np.inf
        self.num_clipped = 0
        self._hu = hu
        self._keep = depth - 1
        room = min(WINDOW_SLABS * SLAB_SLICES + self._keep, num_slices)
        self._buffer = np.empty((room, num_rows, num_cols), dtype=dtype)

    @property
    def slices(self) -> npt.NDArray[Any]:
        """Clipped slices `first` to `stop`."""
        return self._buffer[: self.stop - self.first]

    def take(self, slab: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Clip the next slices into the window, dropping old ones; return the new part."""
        held = self.stop - self.first
        if held + len(slab) > len(self._buffer):
            keep = min(self._keep, held)
            self._buffer[:keep] = self._buffer[held - keep : held]
            self.first, held = self.stop - keep, keep
        # slice by slice: half a megabyte stays in the cache through all five steps
        for source, target in zip(slab, self._buffer[held:], strict=False):
            self._clip(source, target)
        self.stop += len(slab)
        return self._buffer[held : held + len(slab)]

    def _clip(self, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
        low, high = self._hu
        self.hu_min = min(self.hu_min, float(source.min()))
        self.hu_max = max(self.hu_max, float(source.max()))
        if source.dtype == np.int16:
            np.clip(source, low, high, out=target)
            self.num_clipped += int(np.count_nonzero(source != target))
            return
        values = source.astype(np.float64)
        clipped = np.clip(values, low, high)
        self.num_clipped += int(np.count_nonzero(values != clipped))
        if target.dtype == np.int16 and (clipped != np.rint(clipped)).any():
            message = (
                f"{self.scan.path.name}: its values are not whole numbers, so int16 crops would lose something. "
                "Use --dtype float32, or auto"
            )
            raise ScanError(message)
        target[...] = clipped


class _Cutter:
    """Cuts crops, in order, as soon as the window holds all their slices.

    A thread hashes and writes one batch while the next are cut: both leave Python's lock to each other.
    """

    def __init__(self, window: _Window, cut: Cut, fill: float) -> None:
        self._window = window
        self._cut = cut
        self._writer = cut.writer
        self._fill = fill
        self._next = 0
        num_batches = min(BATCHES, len(cut.starts) // cut.batch_crops + 1)
        self._batches = np.empty((num_batches, cut.batch_crops, *cut.shape), dtype=cut.writer.dtype)
        self._batch = 0
        self._held = 0
        self._writing: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Cutter":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def cut_ready(self) -> None:
        """Cut all crops whose last slice has been read."""
        while self._next < len(self._cut.starts):
            if self._cut.stop(self._next, self._window.num_slices) > self._window.stop:
                return
            self._cut.make(self._next, self._window, self._batches[self._batch, self._held], self._fill)
            self._next += 1
            self._held += 1
            if self._held == self._cut.batch_crops:
                self._write()

    def finish(self) -> None:
        """Write what is left, and wait for it."""
        assert self._next == len(self._cut.starts), f"{self._next} of {len(self._cut.starts)} crops were cut"
        self._write()
        while self._writing:
            self._writing.popleft().result()

    def _write(self) -> None:
        """Hand the batch over; go on with one that has been written."""
        if self._held:
            full = self._batches[self._batch, : self._held]
            self._writing.append(self._thread.submit(self._writer.append, full))
        self._batch = (self._batch + 1) % len(self._batches)
        self._held = 0
        while len(self._writing) >= len(self._batches):
            self._writing.popleft().result()
