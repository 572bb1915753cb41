"""A shard's receipt: what went into it, what became of each scan, and a checksum for each crop."""

import json
from dataclasses import dataclass, fields, is_dataclass
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
    masks_key: str | None = None
    """Fingerprint of what the masks in it were made from; None where it has none."""


@dataclass(frozen=True)
class LungRecord:
    """Where the lungs of a scan lie (start and stop, slice row column; None: none found), and who said so."""

    box: tuple[int, ...] | None
    given_xxh3: str | None = None
    """XXH3-128 of the voxel file of the mask that was given; None where the lungs were computed."""
    note: str | None = None
    """Why a given mask was not taken."""


@dataclass(frozen=True)
class SlabRecord:
    """The slabs of a work unit and their masks, row by row alike; files are None where there is no row."""

    key: str
    shard_id: str
    rows: int
    file: str | None
    bytes: int
    sha256: str | None
    mask_file: str | None
    mask_bytes: int
    mask_sha256: str | None
    slab_xxh3: tuple[str, ...] = ()
    mask_xxh3: tuple[str, ...] = ()
    mask_voxels: tuple[int, ...] = ()
    """Nodule voxels in the middle slice of each."""


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
    lungs: LungRecord | None = None


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
    slabs: SlabRecord | None = None

    @property
    def scan_by_uid(self) -> dict[str, ScanRecord]:
        """The scans' records by series."""
        return {scan.series_uid: scan for scan in self.scans}


OPTIONAL = ("slabs", "lungs", "masks_key")
"""Left out where None: a store without targets has the bytes it had before there were any."""


def receipt_bytes(receipt: Receipt) -> bytes:
    """The receipt's file."""
    return canonical_json(_plain(receipt))


def _plain(value: Any) -> Any:
    """As `dataclasses.asdict`, which would copy the checksum of every crop for itself."""
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return [_plain(item) for item in value]
    if not is_dataclass(value):
        return value
    items = ((field.name, getattr(value, field.name)) for field in fields(value))
    return {name: _plain(item) for name, item in items if item is not None or name not in OPTIONAL}


def receipt_from_bytes(data: bytes) -> Receipt | None:
    """Return the receipt a file holds; None if it is damaged in any way."""
    try:
        value = json.loads(data)
        scans = tuple(_scan(scan) for scan in value.pop("scans"))
        slabs = _slabs(value.pop("slabs", None))
        receipt = Receipt(**{**value, "crop_xxh3": tuple(value["crop_xxh3"]), "scans": scans, "slabs": slabs})
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
    lungs = value.pop("lungs", None)
    if lungs is not None:
        lungs = LungRecord(**{**lungs, "box": lungs["box"] and tuple(lungs["box"])})
    return ScanRecord(**value, volume=volume, lungs=lungs)


def _slabs(value: dict[str, Any] | None) -> SlabRecord | None:
    if value is None:
        return None
    lists = {name: tuple(value[name]) for name in ("slab_xxh3", "mask_xxh3", "mask_voxels")}
    slabs = SlabRecord(**{**value, **lists})
    if not slabs.rows == len(slabs.slab_xxh3) == len(slabs.mask_xxh3) == len(slabs.mask_voxels):
        message = "lists of other lengths than rows"
        raise ValueError(message)
    return slabs
