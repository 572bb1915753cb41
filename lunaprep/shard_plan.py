"""A work unit: the scans of one shard, what is to be done with them, and why."""

from dataclasses import dataclass
from typing import Literal

from lunaprep.geometry import IntArray
from lunaprep.scans.scan import Scan
from lunaprep.store.receipt import Receipt

Action = Literal["keep", "check", "volumes", "build"]


@dataclass(frozen=True)
class ScanJob:
    """One readable scan of a shard, and where its crops begin (n, 3), in the order they are stored."""

    scan: Scan
    starts: IntArray
    volume_key: str


@dataclass(frozen=True)
class ShardPlan:
    """A work unit: a list of whole scans, what is to be done with it, and why."""

    subset: int
    number: int
    jobs: tuple[ScanJob, ...]
    plan_key: str
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
