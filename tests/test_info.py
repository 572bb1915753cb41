"""The figures of a store against counts by hand, the text, and finding things by name."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lunaprep import info, schema
from lunaprep.errors import UsageError
from lunaprep.info import find_candidate, find_series, format_info, store_info
from lunaprep.store.reader import open_store

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001."


def candidate(candidate_id: int, series: str, subset: int, **columns: Any) -> dict[str, Any]:
    row = {column.name: None if column.optional else 0 for column in schema.MANIFEST_COLUMNS}
    row |= {"candidate_id": candidate_id, "series_uid": UID + series, "patient_id": None, "subset": subset}
    row |= {"is_nodule": False, "is_malignant": None, "diameter_mm": np.nan, "annotation_id": None}
    row |= {"is_padded": False, "split_series": "train", "split_candidate": "train", "shard_id": "s"}
    return row | columns


def scan(series: str, subset: int, **columns: Any) -> dict[str, Any]:
    row: dict[str, Any] = {column.name: None for column in schema.SCAN_COLUMNS}
    row |= {"series_uid": UID + series, "subset": subset, "status": "ok", "file": "f", "num_crops": 1}
    return row | {"volume_file": "v.h5", "volume_bytes": 1000} | columns


def fake_store(manifest: list[dict[str, Any]], scans: list[dict[str, Any]]) -> Any:
    parameters = {"crop_shape": [32, 48, 48], "hu": [-1000, 1000], "edge": "shift", "match": "radius", "val_stride": 10}
    table = pd.DataFrame(manifest, columns=[column.name for column in schema.MANIFEST_COLUMNS])
    types = {"is_nodule": bool, "is_padded": bool, "is_malignant": "boolean", "annotation_id": "Int64"}
    return SimpleNamespace(
        record={"store_id": "0123456789abcdef"},
        parameters=parameters,
        crop_shape=(32, 48, 48),
        dtype=np.dtype("int16"),
        manifest=table.astype(types),
        scans=pd.DataFrame(scans, columns=[column.name for column in schema.SCAN_COLUMNS]),
    )


def nodule(candidate_id: int, series: str, subset: int, diameter: float, **columns: Any) -> dict[str, Any]:
    return candidate(candidate_id, series, subset, is_nodule=True, diameter_mm=diameter, **columns)


@pytest.fixture
def store() -> Any:
    manifest = [
        nodule(0, "111111", 0, 3.0, annotation_id=4, is_malignant=True, split_candidate="val"),
        nodule(1, "111111", 0, 4.99, annotation_id=4, is_malignant=True),
        nodule(2, "222222", 2, 5.0, annotation_id=5, is_malignant=False, split_series="val"),
        nodule(3, "222222", 2, 30.0, annotation_id=6, split_series="val", is_padded=True),
        nodule(4, "222222", 2, np.nan, split_series="val"),
        candidate(7, "111111", 0),
        candidate(9, "222222", 2, split_series="val"),
    ]
    scans = [
        scan("111111", 0, patient_id="A"),
        scan("222222", 2, patient_id="A", volume_file=None, volume_bytes=None),
        scan("333333", 2),
        scan("444444", 5, status="failed", reason="too\nshort", volume_file=None, volume_bytes=None),
    ]
    return fake_store(manifest, scans)


def test_counts(store):
    figures = store_info(store)
    assert figures["counts"] == {
        "scans_ok": 3,
        "scans_failed": 1,
        "volumes": 2,
        "patients": 1,
        "scans_without_patient": 1,
        "crops": 7,
        "nodules": 5,
        "annotations": 3,
        "padded_crops": 1,
        "scans_with_lungs": 0,
    }
    assert figures["bytes"] == {"crops": 7 * 32 * 48 * 48 * 2, "volumes": 2000, "slabs": 0}
    assert figures["by_class"] == {"nodule": 5, "other": 2}
    assert figures["malignancy"] == {"malignant": 2, "benign": 1, "unknown": 2}
    assert figures["failed"] == [{"series_uid": UID + "444444", "subset": 5, "reason": "too\nshort"}]
    assert (figures["store_id"], figures["dtype"]) == ("0123456789abcdef", "int16")


def test_by_subset_and_split(store):
    figures = store_info(store)
    assert figures["by_subset"] == [
        {"subset": 0, "scans": 1, "failed": 0, "crops": 3, "nodules": 2, "train": 3, "val": 0},
        {"subset": 2, "scans": 2, "failed": 0, "crops": 4, "nodules": 3, "train": 0, "val": 4},
        {"subset": 5, "scans": 0, "failed": 1, "crops": 0, "nodules": 0, "train": 0, "val": 0},
    ]
    assert figures["by_split"]["split_series"]["val"] == {"crops": 4, "nodules": 3, "series": 1}
    assert figures["by_split"]["split_candidate"]["val"] == {"crops": 1, "nodules": 1, "series": 1}


def test_diameter_bins_hold_their_lower_bound(store):
    figures = store_info(store)
    found = {(b["from_mm"], b["to_mm"]): b["nodules"] for b in figures["by_diameter"]}
    assert found[3, 5] == 2
    assert found[5, 8] == 1
    assert found[30, None] == 1
    assert found[None, None] == 1
    assert sum(found.values()) == 5
    assert figures["diameter_mm"] == {"median": 4.995, "largest": 30.0}


def test_figures_are_json(store):
    figures = store_info(store)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_real_store(built_store):
    store = open_store(built_store)
    figures = store_info(store)
    by_hand = store.manifest.groupby("subset")["is_nodule"].agg(["size", "sum"])
    assert {r["subset"]: [r["crops"], r["nodules"]] for r in figures["by_subset"]} == {
        k: list(v) for k, v in zip(by_hand.index, by_hand.to_numpy().tolist(), strict=True)
    }
    assert {k: figures["counts"][k] for k in store.record["counts"]} == store.record["counts"]
    json.dumps(figures, allow_nan=False)


def test_text(store):
    text = format_info(store_info(store))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "0123456789abcdef" in lines[0]
    assert "3 scans (1 failed) · 1 patient · 7 crops" in text
    assert "HU −1000 to 1000" in text
    assert ["2", "2", "0", "4", "3", "0", "4"] in [line.split() for line in lines]
    assert ["all", "3", "1", "7", "5", "3", "4"] in [line.split() for line in lines]
    bars = {line[:12].strip(): line[12:].split() for line in lines}
    assert bars["3–5 mm"][1] == "2"
    assert len(bars["3–5 mm"][0]) == 2 * len(bars["unmatched"][0].replace("▌", "")) + 1
    assert "too short" in text
    assert not any(line != line.rstrip() for line in lines)


def test_text_stays_narrow_with_long_names():
    failed = [scan("9" * 200, 1, status="failed", reason="wörd" * 40 + " and\x1b[31m why") for _ in range(13)]
    text = format_info(store_info(fake_store([], failed)))
    assert max(map(len, text.splitlines())) <= 80
    assert "and 3 more: see scans.parquet" in text
    assert "\x1b" not in text
    assert "Nodules by diameter: none" in text


def test_find_candidate(store):
    assert find_candidate(store, 9) == 6
    with pytest.raises(UsageError, match=r"candidate 12: .* 7 candidates, .* between 0 and 9; the nearest is 9$"):
        find_candidate(store, 12)
    with pytest.raises(UsageError, match="no candidate at all"):
        find_candidate(fake_store([], []), 0)


def test_find_series(store):
    assert find_series(store, UID + "222222")["subset"] == 2
    assert find_series(store, "222222")["series_uid"] == UID + "222222"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("22222", "similar: .*222222"),
        ("222232", "similar: .*222222"),
        (UID + "111112", "similar: .*111111"),
        ("", "at least its last 6"),
        ("abc\n", r"series abc\?: not among"),
        ("444444", "its scan failed: too short"),
    ],
)
def test_unknown_series(store, name, message):
    with pytest.raises(UsageError, match=message) as caught:
        find_series(store, name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(UID) <= 4


def test_ambiguous_series():
    store = fake_store([], [scan("1.777777", 0), scan("2.777777", 0)])
    with pytest.raises(UsageError, match="2 series end with it"):
        find_series(store, "777777")


def test_short_uid_keeps_its_ends():
    short = info.short_uid(UID + "179049373636438705059720603192", 30)
    assert len(short) <= 30
    head, tail = short.split("…")
    assert (UID + "179049373636438705059720603192").startswith(head)
    assert tail == "9720603192"[-len(tail) :] or "179049373636438705059720603192".endswith(tail)


def test_chosen_slices(store):
    table = store.manifest.assign(index=[50, 50, 3, 99, 7, 1, 2])
    chosen = info.chosen_slices(100, table)
    assert len(chosen) <= 12
    assert {50, 3, 99, 7} <= set(chosen)
    assert chosen == sorted(set(chosen))
    assert info.chosen_slices(5, table) == [0, 1, 2, 3, 4]
    assert len(info.chosen_slices(100, table.assign(index=range(7)), most=3)) == 3


def test_overview_rows(store):
    rows, title = info.overview_rows(store.manifest, 4)
    assert rows.tolist() == [3, 4, 5, 6]
    assert "2 of 5 nodules" in title
    assert sorted(info.overview_rows(store.manifest, 100)[0]) == list(range(7))
    assert info.overview_rows(store.manifest, 6)[0].tolist()[0] == 3
    assert info.overview_rows(store.manifest.head(0), 6)[0].tolist() == []
