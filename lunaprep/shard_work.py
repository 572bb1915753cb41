"""What one worker does: one pass over each scan of a shard, into crops and volumes.

A worker needs no table and no pandas. It keeps a window of slices, never a scan.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep import schema
from lunaprep.crops import cut_crop
from lunaprep.errors import NoSpaceError, ScanError
from lunaprep.geometry import IntArray
from lunaprep.scans.open import iter_slabs
from lunaprep.scans.scan import Scan
from lunaprep.shard_plan import ScanJob, ShardPlan
from lunaprep.store.files import digest, hash_file, publish, write_file
from lunaprep.store.receipt import Receipt, ScanRecord, VolumeRecord, receipt_bytes
from lunaprep.store.shard import ShardWriter
from lunaprep.store.volume import VolumeWriter

SLAB_SLICES = 32
"""Slices read at a time: a multiple of the volume chunk's depth."""

BATCH_CROPS = 7
"""Crops cut before they are hashed and written: about 1 MB, so that they are still in the cache then."""

BATCHES = 16
"""Batches that may wait to be written: about what one slab makes ready."""

INTERPRETER_BYTES = 140 << 20
"""Resident memory of a worker that has done nothing: 45 MB, and with SimpleITK 138 MB, measured 2026-11-22."""

WINDOW_SLABS = 2
"""Slabs the window holds besides what the next crop may reach back to; with one, every slice would be moved once."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to work on, with all a worker has to know."""

    out: Path
    shard: ShardPlan
    crop_shape: tuple[int, int, int]
    hu: tuple[int, int]
    dtype: str
    volumes: bool
    excluded: tuple[tuple[str, str], ...] = ()
    """Series not to be touched, because they killed a worker before, and what to say of them."""

    @property
    def scratch(self) -> Path:
        """Folder for half-written files."""
        return self.out / schema.WORK_DIR / "tmp"

    @property
    def now_path(self) -> Path:
        """File that says how many scans are done and which one is being read."""
        return self.scratch / f"{self.shard.name}.now"


@dataclass(frozen=True)
class PassFacts:
    """What a pass over a scan's voxels found out."""

    data_xxh3: str
    hu_min: float
    hu_max: float
    clipped_share: float


def run_shard(task: ShardTask) -> tuple[str, Receipt]:
    """Do a shard's work; return its unit name and its receipt.

    Raises
    ------
    NoSpaceError
        The disk is full. Nothing half-written stays under a final name.
    """
    task.scratch.mkdir(parents=True, exist_ok=True)
    receipt = task.shard.receipt
    if receipt is not None and task.shard.action in ("check", "volumes") and _same_scans(task, receipt):
        if task.shard.action == "check":
            return task.shard.name, receipt
        return task.shard.name, _keep(task, _add_volumes(task, receipt))
    return task.shard.name, _keep(task, _cut_shard(task))


def staged_volume(out: Path, volume: VolumeRecord) -> Path:
    """Where a finished volume waits for the commit; its name tells its content."""
    return out / schema.WORK_DIR / "volumes" / f"{Path(volume.file).stem}.{volume.sha256[:16]}.h5"


def staged_receipt(out: Path, receipt: Receipt) -> Path:
    """Where a finished receipt waits for the commit."""
    return out / schema.WORK_DIR / "receipts" / f"{receipt.shard_id}.json"


def _keep(task: ShardTask, receipt: Receipt) -> Receipt:
    write_file(staged_receipt(task.out, receipt), receipt_bytes(receipt))
    return receipt


def _same_scans(task: ShardTask, receipt: Receipt) -> bool:
    """Whether every scan's voxel file still has the hash in the receipt."""
    done = receipt.scan_by_uid
    for count, job in enumerate(task.shard.jobs):
        _say(task, count, job.scan.series_uid)
        try:
            if hash_file(job.scan.data_path, "xxh3_128") != done[job.scan.series_uid].data_xxh3:
                return False
        except OSError:
            return False
    return True


def _add_volumes(task: ShardTask, receipt: Receipt) -> Receipt:
    """Make the volumes a finished shard lacks."""
    jobs = {job.scan.series_uid: job for job in task.shard.jobs}
    records = []
    for count, record in enumerate(receipt.scans):
        job = jobs[record.series_uid]
        _say(task, count, record.series_uid)
        if record.status == "ok" and (record.volume is None or record.volume.key != job.volume_key):
            with VolumeWriter(_partial(task, job), record.series_uid, job.scan.geometry) as volume:
                pass_over(job.scan, task.hu, task.dtype, volume=volume)
                record = replace(record, volume=_stage_volume(task, job, volume))
        records.append(record)
    return replace(receipt, scans=tuple(records))


def _cut_shard(task: ShardTask) -> Receipt:
    """Build a shard from its scans; those that fail are left out and recorded."""
    excluded = dict(task.excluded)
    records = []
    with ExitStack() as stack:
        writer = None
        if task.shard.rows:
            partial = task.scratch / f"{task.shard.name}.partial"
            writer = stack.enter_context(ShardWriter(partial, task.shard.rows, task.crop_shape, task.dtype))
        for count, job in enumerate(task.shard.jobs):
            _say(task, count, job.scan.series_uid)
            if job.scan.series_uid in excluded:
                records.append(_failed(job.scan, excluded[job.scan.series_uid], retry=True))
            else:
                records.append(_take_scan(task, job, writer))
        return _finish_shard(task, writer, tuple(records))


def _take_scan(task: ShardTask, job: ScanJob, writer: ShardWriter | None) -> ScanRecord:
    """One scan into the shard and its volume; a fault of the scan is its record, not an exception."""
    first_row = writer.num_rows if writer else 0
    try:
        if not task.volumes:
            return _ok(job, pass_over(job.scan, task.hu, task.dtype, job.starts, writer, task.crop_shape), None)
        with VolumeWriter(_partial(task, job), job.scan.series_uid, job.scan.geometry) as volume:
            facts = pass_over(job.scan, task.hu, task.dtype, job.starts, writer, task.crop_shape, volume)
            return _ok(job, facts, _stage_volume(task, job, volume))
    except NoSpaceError:
        raise
    except ScanError as error:
        record = _failed(job.scan, str(error), retry=False)
    except (OSError, MemoryError) as error:
        reason = f"{job.scan.path.name}: {error or 'not enough memory'}. Run the same command again to try it once more"
        record = _failed(job.scan, reason, retry=True)
    if writer:
        writer.rewind(first_row)
    return record


def _ok(job: ScanJob, facts: PassFacts, volume: VolumeRecord | None) -> ScanRecord:
    return ScanRecord(
        series_uid=job.scan.series_uid,
        status="ok",
        data_bytes=job.scan.data_bytes,
        data_xxh3=facts.data_xxh3,
        hu_min=facts.hu_min,
        hu_max=facts.hu_max,
        clipped_share=facts.clipped_share,
        num_crops=len(job.starts),
        volume=volume,
    )


def _failed(scan: Scan, reason: str, *, retry: bool) -> ScanRecord:
    data_xxh3 = None
    if not retry:  # so that the next build knows whether the file has been mended
        try:
            data_xxh3 = hash_file(scan.data_path, "xxh3_128")
        except OSError:
            retry = True
    return ScanRecord(scan.series_uid, "failed", reason, retry, scan.data_bytes, data_xxh3)


def _finish_shard(task: ShardTask, writer: ShardWriter | None, records: tuple[ScanRecord, ...]) -> Receipt:
    sources = {record.series_uid: [record.status, record.data_xxh3] for record in records}
    name = f"{task.shard.name}-{digest({'plan': task.shard.plan_key, 'scans': sources})[:12]}"
    if writer is None or writer.num_rows == 0:
        return Receipt(task.shard.plan_key, name, None, 0, 0, None, (), records)
    file = f"{schema.SHARDS_DIR}/{name}.h5"
    size, sha256 = writer.finish()
    writer.publish_as(task.out / file)
    return Receipt(task.shard.plan_key, name, file, writer.num_rows, size, sha256, tuple(writer.crop_xxh3), records)


def _partial(task: ShardTask, job: ScanJob) -> Path:
    return task.scratch / f"{job.scan.series_uid}.partial"


def _stage_volume(task: ShardTask, job: ScanJob, volume: VolumeWriter) -> VolumeRecord:
    size, sha256 = volume.finish()
    file = f"{schema.VOLUMES_DIR}/subset{task.shard.subset}/{job.scan.series_uid}.h5"
    record = VolumeRecord(file, size, sha256, job.volume_key, tuple(volume.chunk_xxh3))
    publish(volume.partial, staged_volume(task.out, record))
    return record


def _say(task: ShardTask, count: int, series_uid: str) -> None:
    task.now_path.write_text(f"{count} {series_uid}", encoding="utf-8")


def pass_over(
    scan: Scan,
    hu: tuple[int, int],
    dtype: str,
    starts: IntArray | None = None,
    writer: ShardWriter | None = None,
    crop_shape: tuple[int, int, int] = (1, 1, 1),
    volume: VolumeWriter | None = None,
) -> PassFacts:
    """Read a scan once; cut its crops and write its volume on the way.

    Parameters
    ----------
    scan : Scan
        The scan.
    hu : tuple of 2 int
        Window to clip to, HU.
    dtype : {"int16", "float32"}
        Type of the crops.
    starts : ndarray, (n, 3) int, optional
        First voxels of the crops, sorted by slice.
    writer : ShardWriter, optional
        Where the crops go, in the order of `starts`.
    crop_shape : tuple of 3 int
        Slices, rows, columns of a crop.
    volume : VolumeWriter, optional
        Where the clipped slices go.

    Raises
    ------
    ScanError
        The voxels are not what the header says, or int16 would lose something.
    """
    window = _Window(scan, hu, dtype, crop_shape[0])
    hasher = xxhash.xxh3_128()
    with ExitStack() as stack:
        cutter = None
        if writer is not None and starts is not None:
            cutter = stack.enter_context(_Cutter(window, starts, writer, crop_shape, fill=hu[0]))
        for slab in iter_slabs(scan, SLAB_SLICES, hasher):
            fresh = window.take(slab)
            if cutter is not None:
                cutter.cut_ready()
            if volume is not None:
                volume.append(fresh)
        if cutter is not None:
            cutter.finish()
    return PassFacts(hasher.hexdigest(), window.hu_min, window.hu_max, window.num_clipped / window.num_voxels)


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

    def __init__(
        self, window: _Window, starts: IntArray, writer: ShardWriter, crop_shape: tuple[int, int, int], fill: float
    ) -> None:
        self._window = window
        self._starts = [(int(i), int(r), int(c)) for i, r, c in starts]
        self._depth = crop_shape[0]
        self._writer = writer
        self._fill = fill
        self._next = 0
        num_batches = min(BATCHES, len(starts) // BATCH_CROPS + 1)
        self._batches = np.empty((num_batches, BATCH_CROPS, *crop_shape), dtype=writer.dtype)
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
        while self._next < len(self._starts):
            start = self._starts[self._next]
            if min(start[0] + self._depth, self._window.num_slices) > self._window.stop:
                return
            out = self._batches[self._batch, self._held]
            cut_crop(self._window.slices, self._window.first, start, out, self._fill)
            self._next += 1
            self._held += 1
            if self._held == BATCH_CROPS:
                self._write()

    def finish(self) -> None:
        """Write what is left, and wait for it."""
        assert self._next == len(self._starts), f"{self._next} of {len(self._starts)} crops were cut"
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


def worker_bytes(shard: ShardPlan, crop_shape: tuple[int, int, int], dtype: str) -> int:
    """Memory a worker needs at most for a shard, bytes: interpreter and libraries, window, one batch of crops."""
    size = 2 if dtype == "int16" else 4
    most = 0
    for job in shard.jobs:
        slices, rows, cols = job.scan.geometry.shape_irc
        window = (min(WINDOW_SLABS * SLAB_SLICES + crop_shape[0], slices) + SLAB_SLICES) * rows * cols * size
        whole = slices * rows * cols * job.scan.dtype.itemsize if job.scan.reader == "simpleitk" else 0
        most = max(most, window + whole)
    return INTERPRETER_BYTES + most + BATCHES * BATCH_CROPS * schema.crop_bytes(crop_shape, dtype)


def excluding(task: ShardTask, series: Mapping[str, str]) -> ShardTask:
    """The same task without the given series; says of each why."""
    return replace(task, excluded=(*task.excluded, *series.items()))
