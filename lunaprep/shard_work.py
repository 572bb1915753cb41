"""What one worker does: one pass over each scan of a shard, into crops, volumes, masks and slabs.

A worker needs no table and no pandas.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lunaprep import schema
from lunaprep.errors import DiskError, PassingScanError, ScanError
from lunaprep.scan_pass import (
    BATCHES,
    SLAB_SLICES,
    WINDOW_SLABS,
    Cut,
    PassFacts,
    batch_crops,
    crop_depth,
    pass_over,
)
from lunaprep.scans.scan import Scan
from lunaprep.shard_plan import ScanJob, ShardPlan
from lunaprep.store.files import digest, hash_files, publish, write_file
from lunaprep.store.receipt import LungRecord, Receipt, ScanRecord, SlabRecord, VolumeRecord, receipt_bytes
from lunaprep.store.shard import ShardWriter
from lunaprep.store.slab_writer import SlabWriter, no_slabs
from lunaprep.store.volume import VolumeWriter
from lunaprep.targets import TargetMaker, target_bytes

INTERPRETER_BYTES = 156 << 20
"""Resident memory of a worker that has done nothing: 64 MB, and with SimpleITK 154 MB, measured 2026-11-22."""

KILLED = (
    "reading it killed its worker twice (no memory, or a crash in a library). Look at the file, or use fewer --workers"
)
"""What is said of a scan that costs itself alone."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to work on, with all a worker has to know."""

    out: Path
    shard: ShardPlan
    crop_shape: tuple[int, int, int]
    hu: tuple[int, int]
    dtype: str
    volumes: bool
    targets: bool = True
    excluded: tuple[tuple[str, str], ...] = ()
    """Series not to be touched, because they killed a worker before, and what to say of them."""

    attempt: str = ""
    """Folder for the half-written files of this try alone, where another may still be at work on the same shard."""

    @property
    def crop_dtype(self) -> str:
        """Type of the crops; `dtype` is that of the slabs, and of crops that are not resampled."""
        return "float32" if self.shard.is_resampled else self.dtype

    @property
    def scratch(self) -> Path:
        """Folder for half-written files."""
        return self.out / schema.WORK_DIR / "tmp" / self.attempt

    @property
    def now_path(self) -> Path:
        """File that says how many scans are done and which one is being read; the same for every try."""
        return self.out / schema.WORK_DIR / "tmp" / f"{self.shard.name}.now"


def run_shard(task: ShardTask) -> tuple[str, Receipt]:
    """Do a shard's work; return its unit name and its receipt.

    Raises
    ------
    NoSpaceError
        The disk is full. Nothing half-written stays under a final name.
    """
    task.scratch.mkdir(parents=True, exist_ok=True)
    receipt = task.shard.receipt
    if receipt is not None and task.shard.action in ("check", "add") and _same_scans(task, receipt):
        if task.shard.action == "check":
            return task.shard.name, receipt
        return task.shard.name, _keep(task, _add_to_shard(task, receipt))
    return task.shard.name, _keep(task, _cut_shard(task))


def staged_volume(out: Path, volume: VolumeRecord) -> Path:
    """Where a finished volume waits for the commit; its name tells its content."""
    return out / schema.WORK_DIR / "volumes" / f"{Path(volume.file).stem}.{volume.sha256[:16]}.h5"


def staged_receipt(out: Path, receipt: Receipt) -> Path:
    """Where a finished receipt waits for the commit."""
    return out / schema.WORK_DIR / "receipts" / f"{receipt.shard_id}.json"


def _keep(task: ShardTask, receipt: Receipt) -> Receipt:
    name = f"{receipt.shard_id}.json.partial"
    write_file(staged_receipt(task.out, receipt), receipt_bytes(receipt), task.scratch / name)
    return receipt


def _same_scans(task: ShardTask, receipt: Receipt) -> bool:
    """Whether every scan's voxel file, and every lung mask taken, still has the hash in the receipt."""
    done = receipt.scan_by_uid
    for count, job in enumerate(task.shard.jobs):
        _say(task, count, job.scan.series_uid)
        record = done[job.scan.series_uid]
        files = [(job.scan.data_paths, record.data_xxh3)]
        if job.lungs and record.lungs and record.lungs.given_xxh3:
            files.append((job.lungs.data_paths, record.lungs.given_xxh3))
        try:
            if any(hash_files(paths, "xxh3_128") != said for paths, said in files):
                return False
        except OSError:
            return False
    return True


def _add_to_shard(task: ShardTask, receipt: Receipt) -> Receipt:
    """Make the volumes and slabs a finished shard lacks; drop slabs that no longer fit where none are wanted."""
    jobs = {job.scan.series_uid: job for job in task.shard.jobs}
    short = {job.scan.series_uid for job in task.shard.short_jobs(receipt, task.volumes, task.targets)}
    fits = task.shard.slabs_fit(receipt, task.targets)
    records = []
    with ExitStack() as stack:
        slabs = None if fits else _slab_writer(stack, task)
        for count, record in enumerate(receipt.scans):
            _say(task, count, record.series_uid)
            if record.status == "ok" and (record.series_uid in short or (task.targets and not fits)):
                job = jobs[record.series_uid]
                made = _pass(task, job, None, slabs, volume=record.series_uid in short)
                record = replace(record, volume=made.volume or record.volume, lungs=made.lungs or record.lungs)
            elif not fits:
                record = replace(record, lungs=None)
            records.append(record)
        if not fits:
            receipt = replace(receipt, slabs=_finish_slabs(task, slabs, records))
    return replace(receipt, scans=tuple(records))


@dataclass(frozen=True)
class _Made:
    """What became of one scan."""

    facts: PassFacts
    volume: VolumeRecord | None
    lungs: LungRecord | None


def _pass(task: ShardTask, job: ScanJob, crops: ShardWriter | None, slabs: SlabWriter | None, *, volume: bool) -> _Made:
    """One pass over a scan, into whatever is given."""
    cuts = [Cut(job.starts, crops, job.step_irc)] if crops else []
    cuts += [Cut(job.slab_starts, slabs.slabs)] if slabs else []
    with ExitStack() as stack:
        writer = None
        if volume:
            writer = stack.enter_context(VolumeWriter(_partial(task, job), job.scan.series_uid, job.scan.geometry))
        maker = TargetMaker(job.scan.geometry, job.nodules, job.lungs) if task.targets else None
        facts = pass_over(job.scan, task.hu, task.dtype, cuts, writer, maker)
        lungs = None
        if maker is not None:
            targets = maker.finish()
            lungs = targets.lung_record()
            for start in job.slab_starts if slabs else ():
                slabs.append_mask(targets.cut_nodules(start, schema.SLAB_SHAPE))  # type: ignore[union-attr]
            for name, layer in targets.layers() if writer else ():
                writer.append_mask(name, layer)  # type: ignore[union-attr]
        return _Made(facts, _stage_volume(task, job, writer) if writer else None, lungs)


def _cut_shard(task: ShardTask) -> Receipt:
    """Build a shard from its scans; those that fail are left out and recorded."""
    excluded = dict(task.excluded)
    records = []
    with ExitStack() as stack:
        crops = None
        if task.shard.rows:
            partial = task.scratch / f"{task.shard.name}.partial"
            crops = stack.enter_context(ShardWriter(partial, task.shard.rows, task.crop_shape, task.crop_dtype))
        slabs = _slab_writer(stack, task)
        for count, job in enumerate(task.shard.jobs):
            _say(task, count, job.scan.series_uid)
            if job.scan.series_uid in excluded:
                records.append(_failed(job.scan, excluded[job.scan.series_uid], retry=True))
            else:
                records.append(_take_scan(task, job, crops, slabs))
        receipt = _finish_shard(task, crops, tuple(records))
        return replace(receipt, slabs=_finish_slabs(task, slabs, records))


def _slab_writer(stack: ExitStack, task: ShardTask) -> SlabWriter | None:
    if not (task.targets and task.shard.num_slabs):
        return None
    return stack.enter_context(
        SlabWriter(task.scratch / f"{task.shard.name}.slabs.partial", task.shard.num_slabs, task.dtype)
    )


def _take_scan(task: ShardTask, job: ScanJob, crops: ShardWriter | None, slabs: SlabWriter | None) -> ScanRecord:
    """One scan into the shards and its volume; a fault of the scan is its record, not an exception."""
    writers = [(writer, writer.num_rows) for writer in (crops, slabs) if writer is not None]
    try:
        return _ok(job, _pass(task, job, crops, slabs, volume=task.volumes))
    except DiskError:  # the store's disk, not the scan
        raise
    except ScanError as error:
        record = _failed(job.scan, str(error), retry=isinstance(error, PassingScanError))
    except (OSError, MemoryError) as error:
        what = str(error) or "not enough memory"
        reason = f"{job.scan.path.name}: {what}. Run the same command again to try it once more"
        record = _failed(job.scan, reason, retry=True)
    for writer, first_row in writers:
        writer.rewind(first_row)
    return record


def _ok(job: ScanJob, made: _Made) -> ScanRecord:
    return ScanRecord(
        series_uid=job.scan.series_uid,
        status="ok",
        data_bytes=job.scan.data_bytes,
        data_xxh3=made.facts.data_xxh3,
        hu_min=made.facts.hu_min,
        hu_max=made.facts.hu_max,
        clipped_share=made.facts.clipped_share,
        num_crops=len(job.starts),
        volume=made.volume,
        lungs=made.lungs,
    )


def _failed(scan: Scan, reason: str, *, retry: bool) -> ScanRecord:
    data_xxh3 = None
    if not retry:  # so that the next build knows whether the file has been mended
        try:
            data_xxh3 = hash_files(scan.data_paths, "xxh3_128")
        except OSError:
            retry = True
    return ScanRecord(scan.series_uid, "failed", reason, retry, scan.data_bytes, data_xxh3)


def _shard_id(task: ShardTask, key: Mapping[str, str], records: Iterable[ScanRecord]) -> str:
    sources = {record.series_uid: [record.status, record.data_xxh3] for record in records}
    return f"{task.shard.name}-{digest({**key, 'scans': sources})[:12]}"


def _finish_slabs(task: ShardTask, slabs: SlabWriter | None, records: Iterable[ScanRecord]) -> SlabRecord | None:
    if not task.targets:
        return None
    key = task.shard.slabs_key
    name = _shard_id(task, {"slabs": key}, records)
    return slabs.finish(key, name, task.out) if slabs and slabs.num_rows else no_slabs(key, name)


def _finish_shard(task: ShardTask, writer: ShardWriter | None, records: tuple[ScanRecord, ...]) -> Receipt:
    name = _shard_id(task, {"plan": task.shard.plan_key}, records)
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
    masks_key = job.targets_key if task.targets else None
    record = VolumeRecord(file, size, sha256, job.volume_key, tuple(volume.chunk_xxh3), masks_key)
    publish(volume.partial, staged_volume(task.out, record))
    return record


def _say(task: ShardTask, count: int, series_uid: str) -> None:
    task.now_path.write_text(f"{count} {series_uid}", encoding="utf-8")


def worker_bytes(shard: ShardPlan, crop_shape: tuple[int, int, int], dtype: str, targets: bool = True) -> int:
    """Memory a worker needs at most for a shard, bytes: interpreter and libraries, window, batches of crops, masks."""
    size = schema.ITEM_BYTES[dtype]
    most = 0
    for job in shard.jobs:
        slices, rows, cols = job.scan.geometry.shape_irc
        depth = max(crop_depth(crop_shape[0], job.step_irc), schema.SLAB_SHAPE[0])
        window = (min(WINDOW_SLABS * SLAB_SLICES + depth, slices) + SLAB_SLICES) * rows * cols * size
        whole = slices * rows * cols * job.scan.dtype.itemsize if job.scan.reader == "simpleitk" else 0
        masks = target_bytes(job.scan.geometry, job.nodules, job.lungs) if targets else 0
        most = max(most, window + whole + masks)
    sizes = [schema.crop_bytes(crop_shape, "float32" if shard.is_resampled else dtype)]
    sizes += [schema.crop_bytes(schema.SLAB_SHAPE, dtype)] if targets else []
    return INTERPRETER_BYTES + most + BATCHES * sum(batch_crops(size) * size for size in sizes)


def excluding(task: ShardTask, series: Mapping[str, str]) -> ShardTask:
    """The same task without the given series; says of each why."""
    return replace(task, excluded=(*task.excluded, *series.items()))
