"""Make the new store's tables, front doors and store.json from finished shards and from what is carried over."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from lunaprep import schema
from lunaprep.carried import Carried, shard_place
from lunaprep.manifest import built_rows, complete_rows, scan_row, series_splits
from lunaprep.plan import Plan
from lunaprep.slabs import built_slabs, complete_slabs
from lunaprep.store.front_door import Rows, front_door_bytes
from lunaprep.store.receipt import Receipt, ScanRecord, SlabRecord, receipt_bytes
from lunaprep.store.record import make_record, store_id_of
from lunaprep.store.tables import table_bytes


@dataclass(frozen=True)
class NewStore:
    """All of the new store but shards and volumes: bytes of its files, and what store.json says."""

    files: Mapping[str, bytes]
    record: dict[str, Any]


def assemble(plan: Plan, receipts: Sequence[Receipt], carried: Carried) -> NewStore:
    """Make the tables, the front doors and store.json.

    Parameters
    ----------
    plan : Plan
        What was to be done.
    receipts : sequence of Receipt
        What was done, in plan order.
    carried : Carried
        Subsets of the old store that the plan does not touch.
    """
    scans = _scan_rows(plan, receipts, carried)
    splits = _splits(plan, scans)
    rows = complete_rows(_crop_rows(plan, receipts, carried), splits, plan.parameters.val_stride)
    shards = sorted([*map(_shard_entry, receipts), *carried.shards], key=lambda shard: shard_place(shard["id"]))
    tables = {
        schema.MANIFEST_FILE: table_bytes(rows, schema.MANIFEST_COLUMNS),
        schema.SCANS_FILE: table_bytes(scans, schema.SCAN_COLUMNS),
    }
    parameters, counts = plan.parameters.to_json(), _counts(rows, scans)
    slabs = None
    if carried.has_slabs or any(receipt.slabs for receipt in receipts):
        slabs = _slab_rows(plan, receipts, carried)
        slabs = complete_slabs(slabs, _named(rows, slabs), scans, splits)
        tables[schema.SLABS_FILE] = table_bytes(slabs, schema.SLAB_COLUMNS)
        counts |= {"slabs": len(slabs), "slabs_positive": int(slabs["is_positive"].sum())}
    else:
        del parameters["slab_negatives"]  # as in a store made before there were slabs
    store_id = store_id_of(parameters, shards, {name: _sha256(data) for name, data in tables.items()})
    crop_rows = _dataset(schema.CROPS_DATASET, shards, "file", plan.parameters.crop_shape, plan.crop_dtype)
    files = {schema.FRONT_DOOR_FILE: front_door_bytes([crop_rows], schema.MANIFEST_FILE, store_id), **tables}
    content = {
        "store_id": store_id,
        "parameters": parameters,
        "inputs": [item.to_json() for item in plan.source.files],
        "counts": counts,
        "crops": {"shape": [len(rows), *plan.parameters.crop_shape], "dtype": plan.crop_dtype},
        "shards": shards,
    }
    if slabs is not None:
        entries = [_slab_entry(receipt.slabs) for receipt in receipts if receipt.slabs and receipt.slabs.rows]
        entries = sorted([*entries, *carried.slab_shards], key=lambda shard: shard_place(shard["id"]))
        datasets = [
            _dataset(schema.SLABS_DATASET, entries, "file", schema.SLAB_SHAPE, plan.dtype),
            _dataset(schema.MASKS_DATASET, entries, "mask_file", schema.SLAB_SHAPE, "uint8"),
        ]
        files[schema.SLAB_DOOR_FILE] = front_door_bytes(datasets, schema.SLABS_FILE, store_id)
        content["slabs"] = {"shape": [len(slabs), *schema.SLAB_SHAPE], "dtype": plan.dtype, "shards": entries}
    content["files"] = [
        {"file": name, "bytes": len(data), "sha256": _sha256(data)} for name, data in sorted(files.items())
    ]
    return NewStore({**files, schema.STORE_FILE: make_record(content)}, content)


def _crop_rows(plan: Plan, receipts: Sequence[Receipt], carried: Carried) -> pd.DataFrame:
    """Rows of the manifest in shard order."""
    rows = built_rows(plan.rows, receipts)
    if carried.rows.empty:
        return rows
    return _in_order([*_by_unit(rows, len(receipts)), *(group for _, group in carried.rows.groupby("shard_id"))], rows)


def _slab_rows(plan: Plan, receipts: Sequence[Receipt], carried: Carried) -> pd.DataFrame:
    """Rows of slabs.parquet in shard order."""
    units = zip(_by_unit(plan.slabs, len(receipts)), receipts, strict=True)
    parts = [built_slabs(slabs, receipt) for slabs, receipt in units if receipt.slabs]
    empty = plan.slabs[:0].assign(shard_id="", shard_row=0, xxh3=0, mask_xxh3=0, num_mask_voxels=0, is_positive=False)
    return _in_order([*parts, *(group for _, group in carried.slabs.groupby("shard_id"))], empty)


def _named(rows: pd.DataFrame, slabs: pd.DataFrame) -> pd.DataFrame:
    """The crops that slabs may be of: nodules, and the candidates they name."""
    crops = rows[rows["is_nodule"] | rows["candidate_id"].isin(slabs["candidate_id"].dropna())]
    return crops[["candidate_id", "annotation_id", "is_nodule", "split_candidate"]].astype({"split_candidate": object})


def _by_unit(rows: pd.DataFrame, count: int) -> list[pd.DataFrame]:
    """Planned rows, which are sorted by unit, of each unit."""
    bounds = np.searchsorted(rows["unit"].to_numpy(dtype=np.int64), np.arange(count + 1))
    return [rows.iloc[start:stop] for start, stop in pairwise(bounds)]


def _in_order(parts: Sequence[pd.DataFrame], empty: pd.DataFrame) -> pd.DataFrame:
    full = sorted((part for part in parts if len(part)), key=lambda part: shard_place(part["shard_id"].iloc[0]))
    return pd.concat(full, ignore_index=True) if full else empty


def _dataset(name: str, shards: Sequence[Mapping[str, Any]], key: str, shape: tuple[int, int, int], dtype: str) -> Rows:
    return Rows(name, [(shard[key], shard["rows"]) for shard in shards if shard[key]], shape, dtype)


def _splits(plan: Plan, scans: pd.DataFrame) -> dict[str, str]:
    known = scans[scans["patient_id"].notna()]
    patients = dict(zip(known["series_uid"], known["patient_id"], strict=True))
    uids = scans[scans["status"] == "ok"]["series_uid"].tolist()
    return series_splits(plan.source.annotations, patients, uids, plan.parameters.val_stride)


def _scan_rows(plan: Plan, receipts: Sequence[Receipt], carried: Carried) -> pd.DataFrame:
    found = {item.series_uid: item for item in plan.source.scans}
    jobs = {job.scan.series_uid: job for shard in plan.shards for job in shard.jobs}
    done = [record for receipt in receipts for record in receipt.scans]
    done += [ScanRecord(item.found.series_uid, "failed", item.reason) for item in plan.failed]
    rows = [
        scan_row(found[r.series_uid], r, jobs.get(r.series_uid), plan.source, plan.parameters.crop_shape) for r in done
    ]
    frame = pd.DataFrame(rows, columns=[column.name for column in schema.SCAN_COLUMNS]).astype(object)
    frame = pd.concat([frame, carried.scans.astype(object)], ignore_index=True)
    return frame.sort_values(["subset", "series_uid"], ignore_index=True)


def _shard_entry(receipt: Receipt) -> dict[str, Any]:
    data = receipt_bytes(receipt)
    return {
        "id": receipt.shard_id,
        "file": receipt.file,
        "rows": receipt.rows,
        "bytes": receipt.bytes,
        "sha256": receipt.sha256,
        "receipt": f"{schema.SHARDS_DIR}/{receipt.shard_id}.json",
        "receipt_sha256": _sha256(data),
    }


def _slab_entry(slabs: SlabRecord) -> dict[str, Any]:
    names = ("file", "rows", "bytes", "sha256", "mask_file", "mask_bytes", "mask_sha256")
    return {"id": slabs.shard_id, **{name: getattr(slabs, name) for name in names}}


def _counts(rows: pd.DataFrame, scans: pd.DataFrame) -> dict[str, int]:
    return {
        "scans_ok": int((scans["status"] == "ok").sum()),
        "scans_failed": int((scans["status"] == "failed").sum()),
        "crops": len(rows),
        "nodules": int(rows["is_nodule"].sum()),
        "volumes": int(scans["volume_file"].notna().sum()),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
