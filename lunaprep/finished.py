"""What earlier builds left: receipts, and which scans are known to be unchanged since."""

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lunaprep import schema
from lunaprep.carried import shard_place
from lunaprep.scans.scan import Scan
from lunaprep.shard_plan import ScanJob
from lunaprep.shard_work import staged_volume
from lunaprep.store.files import canonical_json
from lunaprep.store.receipt import Receipt, read_receipt, receipt_bytes

SEEN_FILE = "inputs.json"

Stamp = tuple[int, int, int]
"""Size, time of last writing and of last change (ns) of a file; of several, the sums.

The last tells of a file that was unpacked once more, which keeps the archive's time of writing.
"""


@dataclass(frozen=True)
class Finished:
    """Receipts by plan key, and those of them that are the store's."""

    out: Path
    receipts: Mapping[str, Receipt]
    committed: tuple[Receipt, ...]

    @cached_property
    def placed(self) -> dict[str, str]:
        """SHA-256 by file of the volumes that lie at their final place."""
        volumes = [scan.volume for receipt in self.committed for scan in receipt.scans if scan.volume]
        return {volume.file: volume.sha256 for volume in volumes}

    def series_of(self, subsets: Collection[int]) -> set[str]:
        """Series of the given subsets that are in the store."""
        receipts = (receipt for receipt in self.committed if shard_place(receipt.shard_id)[0] in subsets)
        return {scan.series_uid for receipt in receipts for scan in receipt.scans if scan.status == "ok"}

    def is_there(self, receipt: Receipt) -> bool:
        """Whether a receipt's files are in place or staged, each of its right size."""
        files = {receipt.file: receipt.bytes}
        if receipt.slabs:
            files |= {receipt.slabs.file: receipt.slabs.bytes, receipt.slabs.mask_file: receipt.slabs.mask_bytes}
        if not all(_has_size(self.out / file, size) for file, size in files.items() if file):
            return False
        volumes = [scan.volume for scan in receipt.scans if scan.volume]
        return all(
            _has_size(staged_volume(self.out, volume), volume.bytes)
            or (self.placed.get(volume.file) == volume.sha256 and _has_size(self.out / volume.file, volume.bytes))
            for volume in volumes
        )


def find_finished(out: Path, record: Mapping[str, Any] | None) -> Finished:
    """Read the receipts of the store and those of a build that did not come to its commit (they win).

    A receipt of the store that is not what store.json says is not believed; its shard is made again.
    """
    said = {shard["id"]: shard["receipt_sha256"] for shard in record["shards"]} if record else {}
    committed = [receipt for receipt in _read_all(out / schema.SHARDS_DIR) if _is_said(receipt, said)]
    staged = _read_all(out / schema.WORK_DIR / "receipts")
    receipts = {receipt.plan_key: receipt for receipt in [*committed, *staged]}
    return Finished(out, receipts, tuple(committed))


class SeenInputs:
    """Notes on voxel files that were hashed: path, stamp, hash. A convenience: without it they are hashed again."""

    def __init__(self, out: Path) -> None:
        self._path = out / schema.WORK_DIR / SEEN_FILE
        self._stamps: dict[str, Stamp] = {}
        self._saved = self._save_s = 0.0
        try:
            self._seen: dict[str, list[object]] = dict(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError):
            self._seen = {}

    def unchanged(self, scan: Scan, data_xxh3: str) -> bool:
        """Whether a scan's voxel file has the stamp it had when it had this hash."""
        return self._seen.get(str(scan.data_path)) == [*self._stamp(scan), data_xxh3]

    def watch(self, jobs: Iterable[ScanJob]) -> None:
        """Take the stamps before the files are read."""
        for job in jobs:
            self._stamp(job.scan)
            if job.lungs:
                self._stamp(job.lungs)

    def note(self, receipt: Receipt, jobs: Iterable[ScanJob]) -> None:
        """Keep the hashes that a finished shard's pass over its scans gave."""
        done = receipt.scan_by_uid
        for job in jobs:
            record = done.get(job.scan.series_uid)
            if record and record.data_xxh3:
                self._seen[str(job.scan.data_path)] = [*self._stamp(job.scan), record.data_xxh3]
            if record and record.lungs and record.lungs.given_xxh3 and job.lungs:
                self._seen[str(job.lungs.data_path)] = [*self._stamp(job.lungs), record.lungs.given_xxh3]

    def save(self) -> None:
        """Write the notes."""
        start = time.monotonic()
        self._path.write_bytes(canonical_json(self._seen))
        self._saved, self._save_s = time.monotonic(), time.monotonic() - start

    def save_now_and_then(self) -> None:
        """Write the notes unless that would take more than a hundredth of the time: they are of all scans."""
        if time.monotonic() - self._saved > 100 * self._save_s:
            self.save()

    def _stamp(self, scan: Scan) -> Stamp:
        path = str(scan.data_path)
        if path not in self._stamps:
            try:
                stats = [file.stat() for file in scan.data_paths]
                written, changed = (sum(getattr(s, name) for s in stats) for name in ("st_mtime_ns", "st_ctime_ns"))
                self._stamps[path] = (sum(s.st_size for s in stats), written, changed)
            except OSError:
                self._stamps[path] = (-1, -1, -1)
        return self._stamps[path]


def _read_all(folder: Path) -> list[Receipt]:
    receipts = (read_receipt(path) for path in sorted(folder.glob("*.json")))
    return [receipt for receipt in receipts if receipt is not None]


def _is_said(receipt: Receipt, said: Mapping[str, str]) -> bool:
    return said.get(receipt.shard_id) in (None, hashlib.sha256(receipt_bytes(receipt)).hexdigest())


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False
