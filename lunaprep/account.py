"""What a build will do, and what it did: as figures and as text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lunaprep.carried import Carried
from lunaprep.plan import Plan
from lunaprep.store.receipt import Receipt


@dataclass(frozen=True)
class Preview:
    """What a build is about to do."""

    scans: int
    crops: int
    nodules: int
    dtype: str
    slabs: int
    shards_to_build: int
    shards_to_check: int
    shards_to_add_to: int
    shards_kept: int
    read_bytes: int
    write_bytes: int
    free_bytes: int
    workers: int
    worker_bytes: int
    changes: tuple[str, ...]
    """What differs from the store that is there, and what that touches."""

    failed: tuple[str, ...]
    """A line for each scan that cannot be used, as far as known from its header."""

    left_out: tuple[str, ...]
    """A line for each table row and candidate that is left out."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as one flat object."""
        return asdict(self)

    def text(self) -> str:
        """Return the figures for a reader."""
        work = f"{self.shards_to_build} to build, {self.shards_kept} kept"
        if self.shards_to_check:
            work += f", {self.shards_to_check} to check (their scans were touched)"
        if self.shards_to_add_to:
            work += f", {self.shards_to_add_to} to add volumes or slabs to"
        lines = [
            f"scans       {self.scans:,} to be in the store, {len(self.failed):,} unusable",
            f"candidates  {self.crops:,} crops ({self.dtype}), {self.nodules:,} nodules",
            f"targets     {self.slabs:,} slabs with masks" if self.slabs else "targets     none",
            f"shards      {work}",
            f"disk        reads {size_text(self.read_bytes)}, writes about {size_text(self.write_bytes)}; "
            f"{size_text(self.free_bytes)} free",
            f"memory      {self.workers or 'the scheduler has its'} workers, up to {size_text(self.worker_bytes)} each",
        ]
        return "\n".join([*lines, *(f"changed     {change}" for change in self.changes)])


@dataclass(frozen=True)
class Account:
    """What a build did. Counts of scans are of the whole store; `scans_built` and `crops_built` of this run."""

    store_id: str
    scans_ok: int
    scans_built: int
    scans_kept: int
    scans_failed: int
    series_absent: int
    candidates: int
    candidates_absent: int
    candidates_outside: int
    rows_faulty: int
    crops: int
    crops_built: int
    nodules: int
    nodules_unmatched: int
    negatives_in_nodules: int
    volumes: int
    slabs: int
    slabs_positive: int
    scans_with_lungs: int
    bytes_written: int
    seconds: float
    crops_per_s: float
    changes: tuple[str, ...]
    failed: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether no scan failed and no table row was faulty."""
        return self.scans_failed == 0 and self.rows_faulty == 0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as one flat object."""
        return asdict(self)

    def text(self) -> str:
        """Return the account for a reader."""
        speed = f", {self.crops_per_s:,.0f} crops/s" if self.crops_built else ""
        absent = f", {self.series_absent:,} not on disk or not chosen" if self.series_absent else ""
        lines = [
            f"scans       {self.scans_ok:,} in the store ({self.scans_built:,} built, {self.scans_kept:,} kept), "
            f"{self.scans_failed:,} failed{absent}",
            f"candidates  {self.candidates:,} in the tables -> {self.crops:,} crops, {self.nodules:,} nodules; "
            f"{self.candidates_absent:,} of other series, {self.candidates_outside:,} outside their scan",
            f"written     {size_text(self.bytes_written)} in {self.seconds:.1f} s{speed}",
            f"store       {self.store_id}, {self.volumes:,} volumes, {self.slabs:,} slabs "
            f"({self.slabs_positive:,} with nodule), lungs in {self.scans_with_lungs:,} scans",
        ]
        if self.nodules_unmatched:
            lines.append(f"note        {self.nodules_unmatched:,} nodules lie in no annotation and have no diameter")
        if self.negatives_in_nodules:
            lines.append(
                f"note        {self.negatives_in_nodules:,} candidates of class 0 lie inside an annotated nodule"
            )
        return "\n".join([*lines, *(f"changed     {change}" for change in self.changes)])


def make_preview(
    plan: Plan, workers: int, worker_bytes: int, free_bytes: int, record: Mapping[str, Any] | None
) -> Preview:
    """Sum a plan up."""
    actions = Counter(shard.action for shard in plan.shards)
    return Preview(
        scans=plan.num_scans,
        crops=len(plan.rows),
        nodules=int(plan.rows["is_nodule"].sum()),
        dtype=plan.crop_dtype,
        slabs=len(plan.slabs) if plan.targets else 0,
        shards_to_build=actions["build"],
        shards_to_check=actions["check"],
        shards_to_add_to=actions["add"],
        shards_kept=actions["keep"],
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        free_bytes=free_bytes,
        workers=workers,
        worker_bytes=worker_bytes,
        changes=_changes(plan, record),
        failed=tuple(item.reason for item in plan.failed),
        left_out=(*map(str, plan.source.faults), *plan.outside, *plan.notes),
    )


def make_account(
    about: Preview,
    plan: Plan,
    carried: Carried,
    receipts: Sequence[Receipt],
    record: Mapping[str, Any],
    seconds: float,
) -> Account:
    """Sum a finished build up."""
    before = {shard.plan_key: shard.receipt for shard in plan.shards}
    new = [receipt for receipt in receipts if before[receipt.plan_key] != receipt]
    cut = [receipt for receipt in new if (old := before[receipt.plan_key]) is None or old.sha256 != receipt.sha256]
    built = sum(scan.status == "ok" for receipt in new for scan in receipt.scans)
    written = sum(receipt.bytes for receipt in cut) + _added_bytes(new, before)
    counts = record["counts"]
    labels = [(table["is_nodule"].astype(bool), table["annotation_id"].notna()) for table in (plan.rows, carried.rows)]
    crops_built = sum(receipt.rows for receipt in cut)
    there = {item.series_uid for item in plan.source.scans} | set(carried.scans["series_uid"])
    series = plan.source.candidates["series_uid"]
    absent = series[~series.isin(there)]
    notes = [scan.lungs.note for receipt in receipts for scan in receipt.scans if scan.lungs and scan.lungs.note]
    lungs = sum(bool(scan.lungs and scan.lungs.box) for receipt in receipts for scan in receipt.scans)
    late = [str(scan.reason) for receipt in receipts for scan in receipt.scans if scan.status == "failed"]
    return Account(
        store_id=record["store_id"],
        scans_ok=counts["scans_ok"],
        scans_built=built,
        scans_kept=counts["scans_ok"] - built,
        scans_failed=counts["scans_failed"],
        series_absent=absent.nunique(),
        candidates=len(plan.source.candidates),
        candidates_absent=len(absent),
        candidates_outside=len(plan.outside),
        rows_faulty=len(plan.source.faults),
        crops=counts["crops"],
        crops_built=crops_built,
        nodules=counts["nodules"],
        nodules_unmatched=sum(int((is_nodule & ~matched).sum()) for is_nodule, matched in labels),
        negatives_in_nodules=sum(int((~is_nodule & matched).sum()) for is_nodule, matched in labels),
        volumes=counts["volumes"],
        slabs=counts.get("slabs", 0),
        slabs_positive=counts.get("slabs_positive", 0),
        scans_with_lungs=lungs + int(carried.scans["lung_box"].notna().sum()),
        bytes_written=written,
        seconds=seconds,
        crops_per_s=crops_built / seconds if seconds > 0 else 0.0,
        changes=about.changes,
        failed=(*about.failed, *late),
        left_out=(*about.left_out, *notes),
    )


def _added_bytes(new: Sequence[Receipt], before: Mapping[str, Receipt | None]) -> int:
    """Bytes of the volumes and slabs that were not there before."""
    total = 0
    for receipt in new:
        old = before[receipt.plan_key]
        had = {scan.volume for scan in old.scans} if old else set()
        total += sum(scan.volume.bytes for scan in receipt.scans if scan.volume and scan.volume not in had)
        if receipt.slabs and (old is None or old.slabs != receipt.slabs):
            total += receipt.slabs.bytes + receipt.slabs.mask_bytes
    return total


def _changes(plan: Plan, record: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What differs from the store that is there, and what has to be done for it."""
    if record is None:
        return ()
    lines = []
    touches = {
        "slab_negatives": "the slabs",
        "match": "the manifest",
        "val_stride": "the manifest",
        "shard_bytes": "which scans share a shard",
    }
    had, want = record["parameters"], plan.parameters.to_json()
    for name in dict.fromkeys((*want, *had)):
        if name == "slab_negatives" and not (plan.targets and "slabs" in record):
            continue
        if had.get(name) != want.get(name):
            lines.append(f"{name} {had.get(name)} -> {want.get(name)}: touches {touches.get(name, 'every crop')}")
    old_dtype, new_dtype = record["crops"]["dtype"], plan.crop_dtype
    if old_dtype != new_dtype and had.get("dtype") == want["dtype"]:
        lines.append(f"crops {old_dtype} -> {new_dtype}, as the scans now need: touches every crop")
    old = {item["role"]: item["sha256"] for item in record["inputs"]}
    for item in plan.source.files:
        if old.get(item.role) != item.sha256:
            lines.append(f"{item.path.name} ({item.role}): touches the manifest, and crops whose place changed")
    there = {shard["id"].rsplit("-", 1)[0] for shard in record["shards"]}
    unexplained = set() if lines else {shard.name for shard in plan.to_do if shard.why == "new"} & there
    lines += [f"{name}: other scans than before, or other headers" for name in sorted(unexplained)]
    lines += [f"{shard.name}: {shard.why}" for shard in plan.to_do if shard.why != "new"]
    return tuple(lines)


def size_text(count: float) -> str:
    """Bytes for a reader.

    >>> size_text(512), size_text(3_210_000), size_text(8.13e10)
    ('512 B', '3.2 MB', '81.3 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} B"
