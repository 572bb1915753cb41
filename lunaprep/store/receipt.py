"""A shard's receipt: what went into it, what became of each scan, and a checksum for each crop."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lunaprep.store.files import canonical_json


@dataclass(frozen=True)
class VolumeRecord:
    """A volume file as written. `key` fingerprints the parameters that reach it."""

    file: str
    bytes: int
    sha256: str
    key: str
    chunk_xxh3: tuple[str, ...]


@dataclass(frozen=True)
class ScanRecord:
    """What became of one scan. `retry` says whether another try may help (an I/O error, a killed worker)."""

    series_uid: str
    status: str
    reason: str | None = None
    retry: bool = False
    data_bytes: int | None = None
    data_xxh3: str | None = None
    hu_min: float | None = None
    hu_max: float | None = None
    clipped_share: float | None = None
    num_crops: int = 0
    volume: VolumeRecord | None = None


@dataclass(frozen=True)
class Receipt:
    """A finished work unit. `plan_key` fingerprints what was known of its inputs before any voxel was read."""

    plan_key: str
    shard_id: str
    file: str | None
    rows: int
    bytes: int
    sha256: str | None
    crop_xxh3: tuple[str, ...]
    scans: tuple[ScanRecord, ...]

    @property
    def scan_by_uid(self) -> dict[str, ScanRecord]:
        """The scans' records by series."""
        return {scan.series_uid: scan for scan in self.scans}


def receipt_bytes(receipt: Receipt) -> bytes:
    """The receipt's file."""
    return canonical_json(asdict(receipt))


def receipt_from_bytes(data: bytes) -> Receipt | None:
    """Return the receipt a file holds; None if it is damaged in any way."""
    try:
        value = json.loads(data)
        scans = tuple(_scan(scan) for scan in value.pop("scans"))
        receipt = Receipt(**{**value, "crop_xxh3": tuple(value["crop_xxh3"]), "scans": scans})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return receipt if receipt_bytes(receipt) == data and receipt.rows == len(receipt.crop_xxh3) else None


def read_receipt(path: Path) -> Receipt | None:
    """Read a receipt; None if it is not there or damaged."""
    try:
        return receipt_from_bytes(path.read_bytes())
    except OSError:
        return None


def _scan(value: dict[str, Any]) -> ScanRecord:
    volume = value.pop("volume")
    if volume is not None:
        volume = VolumeRecord(**{**volume, "chunk_xxh3": tuple(volume["chunk_xxh3"])})
    return ScanRecord(**value, volume=volume)
