"""What earlier builds left: receipts, and which scans are known to be unchanged since."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lunaprep import schema
from lunaprep.scans.scan import Scan
from lunaprep.shard_work import staged_volume
from lunaprep.store.files import canonical_json
from lunaprep.store.receipt import Receipt, read_receipt

SEEN_FILE = "inputs.json"

Stamp = tuple[int, int]
"""Size and time of last change (ns) of a file."""


@dataclass(frozen=True)
class Finished:
    """Receipts by plan key, and the volumes that lie at their final place."""

    out: Path
    receipts: Mapping[str, Receipt]
    placed: Mapping[str, str]
    """SHA-256 by file of the committed volumes."""

    def is_there(self, receipt: Receipt) -> bool:
        """Whether a receipt's files are in place or staged, each of its right size."""
        if receipt.file and not _has_size(self.out / receipt.file, receipt.bytes):
            return False
        volumes = [scan.volume for scan in receipt.scans if scan.volume]
        return all(
            _has_size(staged_volume(self.out, volume), volume.bytes)
            or (self.placed.get(volume.file) == volume.sha256 and _has_size(self.out / volume.file, volume.bytes))
            for volume in volumes
        )


def find_finished(out: Path) -> Finished:
    """Read the receipts of the store and those of a build that did not come to its commit (they win)."""
    committed = _read_all(out / schema.SHARDS_DIR)
    staged = _read_all(out / schema.WORK_DIR / "receipts")
    volumes = [scan.volume for receipt in committed for scan in receipt.scans if scan.volume]
    receipts = {receipt.plan_key: receipt for receipt in [*committed, *staged]}
    return Finished(out, receipts, {volume.file: volume.sha256 for volume in volumes})


class SeenInputs:
    """Notes on voxel files that were hashed: path, stamp, hash. A convenience: without it they are hashed again."""

    def __init__(self, out: Path) -> None:
        self._path = out / schema.WORK_DIR / SEEN_FILE
        self._stamps: dict[str, Stamp] = {}
        try:
            self._seen: dict[str, list[object]] = dict(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError):
            self._seen = {}

    def unchanged(self, scan: Scan, data_xxh3: str) -> bool:
        """Whether a scan's voxel file has the stamp it had when it had this hash."""
        return self._seen.get(str(scan.data_path)) == [*self._stamp(scan), data_xxh3]

    def watch(self, scans: Iterable[Scan]) -> None:
        """Take the stamps before the files are read."""
        for scan in scans:
            self._stamp(scan)

    def note(self, receipt: Receipt, scans: Iterable[Scan]) -> None:
        """Keep the hashes that a finished shard's pass over its scans gave."""
        done = receipt.scan_by_uid
        for scan in scans:
            record = done.get(scan.series_uid)
            if record and record.data_xxh3:
                self._seen[str(scan.data_path)] = [*self._stamp(scan), record.data_xxh3]

    def save(self) -> None:
        """Write the notes."""
        self._path.write_bytes(canonical_json(self._seen))

    def _stamp(self, scan: Scan) -> Stamp:
        path = str(scan.data_path)
        if path not in self._stamps:
            try:
                stat = scan.data_path.stat()
                self._stamps[path] = (stat.st_size, stat.st_mtime_ns)
            except OSError:
                self._stamps[path] = (-1, -1)
        return self._stamps[path]


def _read_all(folder: Path) -> list[Receipt]:
    receipts = (read_receipt(path) for path in sorted(folder.glob("*.json")))
    return [receipt for receipt in receipts if receipt is not None]


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False
