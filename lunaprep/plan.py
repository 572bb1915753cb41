"""Decide what a build has to do; nothing here writes, and no voxel is read.

SourceData -> rows of the manifest and of the slabs, scan by scan -> shards -> for each: keep, check, build, or only
add what it lacks (volumes, targets).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import xxhash

from lunaprep import schema
from lunaprep.crops import step_of
from lunaprep.errors import ScanError
from lunaprep.manifest import START, PlannedRows, plan_rows
from lunaprep.masks import MARGIN_MM, THRESHOLD_HU, TISSUE_HU, Nodule
from lunaprep.parameters import Parameters
from lunaprep.scans.open import open_scan
from lunaprep.scans.scan import Scan
from lunaprep.shard_plan import ScanJob, ShardPlan
from lunaprep.slabs import plan_slabs, scan_nodules, slab_order
from lunaprep.sources.source import FoundScan, SourceData
from lunaprep.store.files import digest
from lunaprep.store.receipt import Receipt

TARGETS_METHOD = 1
"""Number of the way masks are made; a new one makes them all anew."""

RESAMPLE_METHOD = 1
"""Number of the way crops are resampled; a new one cuts them all anew."""


@dataclass(frozen=True)
class FailedScan:
    """A scan that cannot be used, known before its voxels are read."""

    found: FoundScan
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything a build will do.

    `rows` is the manifest as far as it is known now, in shard order, with a `unit` column (index in `shards`);
    `slabs` is slabs.parquet in the same way.
    """

    source: SourceData
    parameters: Parameters
    dtype: str
    """Type of the slabs, and of crops that are not resampled."""

    volumes: bool
    targets: bool
    rows: pd.DataFrame
    slabs: pd.DataFrame
    shards: tuple[ShardPlan, ...]
    failed: tuple[FailedScan, ...]
    outside: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What the source says of itself, and a line for each lung mask that cannot be used, as far as known now."""

    @property
    def crop_dtype(self) -> str:
        """Type of the crops: resampled ones are float32."""
        return self.dtype if self.parameters.resample_mm is None else "float32"

    @property
    def to_do(self) -> tuple[ShardPlan, ...]:
        """Shards that need work."""
        return tuple(shard for shard in self.shards if shard.action != "keep")

    @property
    def num_scans(self) -> int:
        """Scans that will be in the store."""
        return sum(len(shard.jobs) for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        """Bytes of scans to read."""
        return sum(job.scan.data_bytes for shard in self.to_do for job in shard.jobs)

    @property
    def write_bytes(self) -> int:
        """Bytes to write; volumes are taken at half their float32 size, their masks at a twentieth of a byte."""
        return sum(map(self._bytes_of, self.shards))

    def _bytes_of(self, shard: ShardPlan) -> int:
        done = shard.receipt if shard.action == "add" else None
        if shard.action in ("keep", "check"):
            return 0
        size = 0
        if done is None:
            one = schema.crop_bytes(self.parameters.crop_shape, self.crop_dtype)
            size += shard.rows * one + schema.DATA_OFFSET
        if self.targets and not (done and shard.slabs_fit(done, self.targets)):
            slab = schema.crop_bytes(schema.SLAB_SHAPE, self.dtype) + schema.crop_bytes(schema.SLAB_SHAPE, "uint8")
            size += shard.num_slabs * slab + 2 * schema.DATA_OFFSET
        jobs = shard.short_jobs(done, self.volumes, self.targets) if done else shard.jobs if self.volumes else ()
        voxels = sum(int(np.prod(job.scan.geometry.shape_irc)) for job in jobs)
        return size + 2 * voxels + (voxels // 20 if self.targets else 0)


def make_plan(
    source: SourceData,
    parameters: Parameters,
    *,
    volumes: bool = True,
    targets: bool = True,
    limit: int | None = None,
) -> Plan:
    """Plan a build as if nothing were there yet; `decide` then takes what is finished into account.

    Parameters
    ----------
    source : SourceData
        Scans found and tables read.
    parameters : Parameters
        What the user asked for.
    volumes : bool
        Whether volumes are wanted too.
    targets : bool
        Whether masks, lung boxes and slabs are wanted too.
    limit : int, optional
        Take the first so many scans only.
    """
    found = source.scans[:limit]
    scans, failed = _open_all(found, source.root)
    subset_of = {item.series_uid: item.subset for item in found}
    dtype = _resolve_dtype(parameters, scans.values())
    units = _pack_all(source, parameters, dtype, subset_of, scans)
    planned = plan_rows(source, parameters, {uid: scans[uid] for _, _, uids in units for uid in uids})
    jobs_of, slabs, notes = _jobs(source, parameters, scans, planned)
    shards = []
    for subset, number, uids in units:
        jobs, place = tuple(jobs_of[uid] for uid in uids), f"subset{subset}-{number:03d}"
        keys = _plan_key(parameters, dtype, jobs, place), _slabs_key(parameters, dtype, jobs, place)
        shards.append(ShardPlan(subset, number, jobs, *keys))
    counts = [shard.rows for shard in shards]
    rows = planned.frame.assign(
        unit=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        subset=np.repeat(np.array([shard.subset for shard in shards], dtype=np.int16), counts),
    )
    unit_of = {uid: unit for unit, (_, _, uids) in enumerate(units) for uid in uids}
    slabs = slabs.assign(unit=slabs["series_uid"].map(unit_of).astype("int64"))
    return Plan(
        source=source,
        parameters=parameters,
        dtype=dtype,
        volumes=volumes,
        targets=targets,
        rows=rows,
        slabs=slabs.iloc[slab_order(slabs, slabs["unit"].to_numpy())].reset_index(drop=True),
        shards=tuple(shards),
        failed=failed,
        outside=planned.outside,
        notes=(*source.notes, *notes),
    )


def decide(
    plan: Plan,
    finished: Mapping[str, Receipt],
    is_there: Callable[[Receipt], bool],
    unchanged: Callable[[Scan, str], bool],
) -> Plan:
    """Say for each shard what is left to do.

    Parameters
    ----------
    plan : Plan
        As `make_plan` gives it.
    finished : mapping of str to Receipt
        Receipts at hand by plan key.
    is_there : callable
        Whether a receipt's files are in place, by name and size.
    unchanged : callable
        Whether a scan's voxel file is known to have the given hash, without reading it.
    """
    shards = tuple(_decide_one(plan, shard, finished.get(shard.plan_key), is_there, unchanged) for shard in plan.shards)
    return replace(plan, shards=shards)


def pack(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Fill shards one after another with whole scans, in the given order, up to `limit` bytes each.

    >>> pack({"a": 4, "b": 4, "c": 9, "d": 1}, 8)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _pack_all(
    source: SourceData, parameters: Parameters, dtype: str, subset_of: Mapping[str, int], scans: Mapping[str, Scan]
) -> list[tuple[int, int, list[str]]]:
    """Subset, number and readable scans of each shard.

    Packed by what the tables list, so that a scan that fails does not move the others.
    """
    one = schema.crop_bytes(parameters.crop_shape, "float32" if parameters.resample_mm else dtype)
    listed = source.candidates["series_uid"].value_counts().to_dict()
    units = []
    for subset in sorted(set(subset_of.values())):
        sizes = {uid: listed.get(uid, 0) * one for uid in sorted(subset_of) if subset_of[uid] == subset}
        for number, uids in enumerate(pack(sizes, parameters.shard_bytes)):
            if readable := [uid for uid in uids if uid in scans]:
                units.append((subset, number, readable))
    return units


def _open_all(found: Sequence[FoundScan], root: Path) -> tuple[dict[str, Scan], tuple[FailedScan, ...]]:
    scans: dict[str, Scan] = {}
    failed: list[FailedScan] = []
    for item in found:
        try:
            if item.twin is not None:
                message = (
                    f"{item.path.name} is there twice: also as {os.path.relpath(item.twin, root)}. Remove one of them"
                )
                raise ScanError(message)
            scans[item.series_uid] = item.open()
        except ScanError as error:
            failed.append(FailedScan(item, str(error)))
    return scans, tuple(failed)


def _resolve_dtype(parameters: Parameters, scans: Iterable[Scan]) -> str:
    if parameters.dtype != "auto":
        return parameters.dtype
    return "int16" if all(scan.dtype.kind in "iu" for scan in scans) else "float32"


def _jobs(
    source: SourceData, parameters: Parameters, scans: Mapping[str, Scan], planned: PlannedRows
) -> tuple[dict[str, ScanJob], pd.DataFrame, tuple[str, ...]]:
    """What is to be done with each scan, the rows of all slabs, and a line for each lung mask that is of no use."""
    nodules = scan_nodules(source.annotations, scans, source.masks)
    slabs = plan_slabs(source, parameters, scans, nodules, planned.frame)
    lungs, notes = _open_lungs(source.lungs, scans)
    mm = parameters.resample_mm
    slabs_of = _slab_starts(slabs)
    jobs = {}
    for uid, scan in scans.items():
        source_key = {"header": scan.header_xxh3, "bytes": scan.data_bytes, "version": schema.FORMAT_VERSION}
        jobs[uid] = ScanJob(
            scan=scan,
            starts=planned.starts[uid],
            slab_starts=slabs_of.get(uid, np.zeros((0, 3), dtype=np.int64)),
            nodules=tuple(nodules[uid].values()),
            lungs=lungs.get(uid),
            volume_key=digest({**source_key, "hu": parameters.hu, "chunk": schema.VOLUME_CHUNK_IRC}),
            targets_key=_targets_key(source_key, nodules[uid].values(), lungs.get(uid)),
            step_irc=step_of(mm, scan.geometry.spacing_irc) if mm else None,
        )
    return jobs, slabs, notes


def _slab_starts(slabs: pd.DataFrame) -> dict[str, npt.NDArray[np.int64]]:
    """Where the slabs of each series begin, in order. One sort of all: pandas takes milliseconds a series."""
    codes, uids = pd.factorize(slabs["series_uid"])
    values = slabs[list(START)].to_numpy()[slab_order(slabs, codes)]
    bounds = np.cumsum([0, *np.bincount(codes, minlength=len(uids))])
    return {str(uid): values[start:stop] for uid, (start, stop) in zip(uids, pairwise(bounds), strict=True)}


def _open_lungs(folder: Path | None, scans: Mapping[str, Scan]) -> tuple[dict[str, Scan], tuple[str, ...]]:
    lungs, notes = {}, []
    for uid in scans if folder else ():
        path = Path(folder or "") / f"{uid}.mhd"
        try:
            if path.exists():
                lungs[uid] = open_scan(path, path.parent)
        except ScanError as error:
            notes.append(f"{error}; the lungs of {uid} are computed")
    return lungs, tuple(notes)


def _targets_key(source_key: Mapping[str, object], nodules: Iterable[Nodule], lungs: Scan | None) -> str:
    rules = {"method": TARGETS_METHOD, "hu": [THRESHOLD_HU, TISSUE_HU], "margin": MARGIN_MM}
    places: list[list[object]] = [
        [*nodule.center_irc, nodule.diameter_mm, *([repr(nodule.drawn)] if nodule.drawn else [])] for nodule in nodules
    ]
    given = [lungs.header_xxh3, lungs.data_bytes] if lungs else None
    return digest({**source_key, **rules, "nodules": places, "lungs": given})


def _plan_key(parameters: Parameters, dtype: str, jobs: Sequence[ScanJob], place: str) -> str:
    own = {"resample_mm": parameters.resample_mm, "method": RESAMPLE_METHOD} if parameters.resample_mm else {}
    kind = "<f8" if own else "<i8"
    return digest(
        {
            **own,
            "version": schema.FORMAT_VERSION,
            "place": place,
            "crop_shape": parameters.crop_shape,
            "hu": parameters.hu,
            "edge": parameters.edge,
            "dtype": dtype,
            "scans": [
                {
                    "series_uid": job.scan.series_uid,
                    "header": job.scan.header_xxh3,
                    "bytes": job.scan.data_bytes,
                    "starts": xxhash.xxh3_128_hexdigest(job.starts.astype(kind).tobytes()),
                }
                for job in jobs
            ],
        }
    )


def _slabs_key(parameters: Parameters, dtype: str, jobs: Sequence[ScanJob], place: str) -> str:
    starts = [xxhash.xxh3_128_hexdigest(job.slab_starts.astype("<i8").tobytes()) for job in jobs]
    scans = [[job.scan.series_uid, job.targets_key, at] for job, at in zip(jobs, starts, strict=True)]
    return digest({"place": place, "shape": schema.SLAB_SHAPE, "hu": parameters.hu, "dtype": dtype, "scans": scans})


def _decide_one(
    plan: Plan,
    shard: ShardPlan,
    receipt: Receipt | None,
    is_there: Callable[[Receipt], bool],
    unchanged: Callable[[Scan, str], bool],
) -> ShardPlan:
    if receipt is None or not {job.scan.series_uid for job in shard.jobs} <= receipt.scan_by_uid.keys():
        return shard
    if not is_there(receipt):
        return replace(shard, why="a file of it is missing or cut")
    if any(scan.retry for scan in receipt.scans):
        return replace(shard, why="a scan failed for a passing reason")
    done = receipt.scan_by_uid
    short = shard.short_jobs(receipt, plan.volumes, plan.targets)
    lacks = [f"{len(short)} volumes"] if short else []
    lacks += [] if shard.slabs_fit(receipt, plan.targets) else ["slabs"]
    if lacks:
        return replace(shard, action="add", why=f"{' and '.join(lacks)} to add or bring up to date", receipt=receipt)
    same = all(unchanged(job.scan, str(done[job.scan.series_uid].data_xxh3)) for job in shard.jobs)
    given = [(job.lungs, done[job.scan.series_uid].lungs) for job in shard.jobs]
    same &= all(unchanged(lungs, said.given_xxh3) for lungs, said in given if lungs and said and said.given_xxh3)
    if same:
        return replace(shard, action="keep", why="finished", receipt=receipt)
    return replace(shard, action="check", why="its scans were touched", receipt=receipt)
