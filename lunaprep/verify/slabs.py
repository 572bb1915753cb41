"""Whether the values of slabs.parquet make sense, by themselves, with store.json and with scans.parquet."""

from dataclasses import replace
from typing import Any

import numpy as np

from lunaprep import schema
from lunaprep.verify.findings import Findings
from lunaprep.verify.record import Record
from lunaprep.verify.tables import Manifest
from lunaprep.verify.values import (
    check_count,
    check_order,
    check_owners,
    check_patients,
    check_rows,
    check_windows,
    tell,
)

_KEYS = ("candidate_id", "annotation_id", "index", "start_col", "start_row", "start_index")
_LAST = 1 << 62


def check_slabs(record: Record, scans: list[dict[str, Any]] | None, slabs: Manifest, found: Findings) -> None:
    """Check slabs.parquet row by row, as a whole, and against scans.parquet where that is readable."""
    n = slabs.numbers
    check_count("slabs", slabs.num_rows, record, schema.SLABS_FILE, found)
    check_count("slabs_positive", int(n["is_positive"].sum()), record, schema.SLABS_FILE, found)
    check_rows(slabs, found)
    tell(found, slabs, n["is_positive"] != (n["num_mask_voxels"] > 0), "bad-value", "is_positive isn't its mask's")
    section = schema.SLAB_SHAPE[1] * schema.SLAB_SHAPE[2]
    off = (n["num_mask_voxels"] < 0) | (n["num_mask_voxels"] > section)
    tell(found, slabs, off, "bad-value", f"num_mask_voxels isn't 0 to {section}")
    is_nodule = n["annotation_id"] >= 0
    tell(found, slabs, is_nodule == np.isnan(n["diameter_mm"]), "bad-value", "a nodule has a diameter, no other has")
    tell(found, slabs, ~is_nodule & (n["candidate_id"] < 0), "bad-value", "is neither a nodule's nor a candidate's")
    tell(found, slabs, n["fold"] != n["subset"], "bad-value", "fold isn't its subset")
    # nodules come before candidates that start at the same voxel
    ordered = replace(slabs, numbers={**n, "annotation_id": np.where(is_nodule, n["annotation_id"], _LAST)})
    check_order(record.slabs or (), _KEYS, ordered, found)
    check_patients(slabs, found)
    if scans is not None:
        scan = slabs.texts["series_uid"].recode({s["series_uid"]: k for k, s in enumerate(scans)})
        tell(found, slabs, scan < 0, "unknown-series", "scans.parquet has no good scan of this series")
        check_owners(scans, slabs, scan, found)
        check_windows(record, schema.SLAB_SHAPE, scans, slabs, scan, found)
