"""A work unit: the scans of one shard, what is to be done with them, and why."""

from dataclasses import dataclass
from typing import Literal

from lunaprep.crops import Triple
from lunaprep.geometry import FloatArray, IntArray
from lunaprep.masks import Nodule
from lunaprep.scans.scan import Scan
from lunaprep.store.receipt import Receipt, VolumeRecord

Action = Literal["keep", "check", "add", "build"]


@dataclass(frozen=True)
class ScanJob:
    """One readable scan of a shard, where its crops and slabs begin (n, 3), in the order they are stored, and why."""

    scan: Scan
    starts: IntArray | FloatArray
    slab_starts: IntArray
    nodules: tuple[Nodule, ...]
    lungs: Scan | None
    """The mask of its lungs that came with the data."""

    volume_key: str
    """Fingerprint of what decides its volume's /hu."""

    targets_key: str
    """Fingerprint of what decides its masks."""

    step_irc: Triple | None = None
    """Of crops that are resampled, see `lunaprep.crops.step_of`; `starts` are then not whole numbers."""

    def volume_fits(self, volume: VolumeRecord | None, volumes: bool, targets: bool) -> bool:
        """Whether its volume is what a build with these wishes would make, or may stay as it is."""
        if volume is None:
            return not volumes
        masks = (self.targets_key,) if targets and volumes else (self.targets_key, None)
        return volume.key == self.volume_key and volume.masks_key in masks


@dataclass(frozen=True)
class ShardPlan:
    """A work unit: a list of whole scans, what is to be done with it, and why."""

    subset: int
    number: int
    jobs: tuple[ScanJob, ...]
    plan_key: str
    slabs_key: str
    action: Action = "build"
    why: str = "new"
    receipt: Receipt | None = None

    @property
    def name(self) -> str:
        """Name without the fingerprint, which only the finished shard has."""
        return f"subset{self.subset}-{self.number:03d}"

    @property
    def rows(self) -> int:
        """Crops planned."""
        return sum(len(job.starts) for job in self.jobs)

    @property
    def is_resampled(self) -> bool:
        """Whether its crops have a spacing of their own."""
        return any(job.step_irc is not None for job in self.jobs)

    @property
    def num_slabs(self) -> int:
        """Slabs planned."""
        return sum(len(job.slab_starts) for job in self.jobs)

    def slabs_fit(self, receipt: Receipt, targets: bool) -> bool:
        """Whether the slabs of a finished unit are what a build would make; without targets, none fit too."""
        return receipt.slabs.key == self.slabs_key if receipt.slabs else not targets

    def short_jobs(self, receipt: Receipt, volumes: bool, targets: bool) -> list[ScanJob]:
        """Scans of a finished unit whose volume is missing or does not fit."""
        done = receipt.scan_by_uid
        return [
            job
            for job in self.jobs
            if (record := done[job.scan.series_uid]).status == "ok"
            and not job.volume_fits(record.volume, volumes, targets)
        ]
