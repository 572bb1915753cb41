"""verify against the scans: what agrees with itself but not with them."""

import json

import h5py
import pyarrow.parquet as pq
import pytest
import xxhash

from lunaprep.errors import UsageError
from lunaprep.verify import verify_store

from .handmade_store import (
    DTYPES,
    OTHER,
    RECEIPT,
    SCAN_TYPES,
    SHARD,
    VOLUME,
    Handmade,
    canonical,
    codes,
    errors,
    flip,
    is_crop,
    make_store,
    resign,
    rewrite_manifest,
    row_of,
    set_value,
    sha256,
    write_shard,
    write_table,
)


@pytest.fixture(params=DTYPES)
def store(request, tmp_path) -> Handmade:
    """A store of the test's own."""
    return make_store(tmp_path / "own", request.param, DTYPES[request.param])


def forge_crop(store: Handmade, row: int) -> None:
    """Change a crop and every record of it."""
    with h5py.File(store.path / SHARD) as h5:
        crops = h5["crops"][:]
    crops[row, 0, 0, 0] -= 1
    write_shard(store.path / SHARD, crops)
    digest = xxhash.xxh3_64_intdigest(crops[row].tobytes())
    rewrite_manifest(store, set_value("xxh3", digest, row))
    receipt = json.loads((store.path / RECEIPT).read_bytes())
    receipt["crop_xxh3"][row] = f"{digest:016x}"
    receipt["sha256"] = sha256(store.path / SHARD)
    (store.path / RECEIPT).write_bytes(canonical(receipt))
    resign(store.path)


def test_source_finds_a_forged_crop(store):
    forge_crop(store, 3)
    assert verify_store(store.path, "full").ok
    found = errors(verify_store(store.path, "source", store.data))
    assert [(f.code, f.place) for f in found] == [("crop-differs", SHARD)]
    assert is_crop(found[0], row_of(store, SHARD, 3))


def test_source_finds_a_forged_volume(store):
    with h5py.File(store.path / VOLUME, "r+") as h5:
        h5["hu"][9, 3, 3] += 1
        chunks = [h5["hu"].id.read_direct_chunk((k, 0, 0))[1] for k in (0, 8)]
    table = pq.read_table(store.path / "scans.parquet").to_pylist()
    mine = next(row for row in table if row["volume_file"] == VOLUME)
    mine |= {"volume_bytes": (store.path / VOLUME).stat().st_size, "volume_sha256": sha256(store.path / VOLUME)}
    mine["volume_chunk_xxh3"] = [xxhash.xxh3_64_intdigest(chunk) for chunk in chunks]
    write_table(store.path / "scans.parquet", table, SCAN_TYPES)
    receipt = OTHER.replace(".h5", ".json")
    value = json.loads((store.path / receipt).read_bytes())
    value["scans"][0]["volume"] |= {"bytes": mine["volume_bytes"], "sha256": mine["volume_sha256"]}
    (store.path / receipt).write_bytes(canonical(value))
    resign(store.path)
    assert verify_store(store.path, "full").ok
    assert codes(verify_store(store.path, "source", store.data)) == {("volume-differs", VOLUME)}


def test_source_missing_is_a_warning(store):
    (store.data / "subset1/1.2.840.3.raw").unlink()
    report = verify_store(store.path, "source", store.data)
    assert report.ok
    assert [(f.code, f.place, f.series_uid) for f in report.findings] == [
        ("source-missing", "subset1/1.2.840.3.mhd", "1.2.840.3")
    ]


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ElementDataFile = 1.2.840.3.raw", "ElementDataFile = /etc/passwd", "source-unreadable"),
        ("ElementDataFile = 1.2.840.3.raw", "ElementDataFile = %s", "source-unreadable"),
        ("ElementDataFile = 1.2.840.3.raw", "ElementDataFile = LIST", "source-unreadable"),
        ("NDims = 3", "NDims = 1000", "source-unreadable"),
        ("DimSize = 40 24 12", "DimSize = 40 24 13", "source-unreadable"),
        ("DimSize = 40 24 12", "DimSize = 24 40 12", "geometry-differs"),
        ("Offset = -100.25", "Offset = -101.25", "geometry-differs"),
    ],
)
def test_source_header_changed(store, old, new, code):
    path = store.data / "subset1/1.2.840.3.mhd"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found = errors(verify_store(store.path, "source", store.data))
    assert code in {f.code for f in found}
    assert {f.series_uid for f in found} == {"1.2.840.3"}


def test_source_voxels_changed(store):
    flip(store.data / "subset1/1.2.840.3.raw", 100)
    found = errors(verify_store(store.path, "source", store.data))
    assert [(f.code, f.place) for f in found] == [("source-changed", "subset1/1.2.840.3.mhd")]


def test_a_subset_folder_may_be_a_link_to_another_disk_as_in_a_build(store):
    outside = store.data.parent / "outside"
    (store.data / "subset1").rename(outside)
    (store.data / "subset1").symlink_to(outside)
    report = verify_store(store.path, "source", store.data)
    assert report.findings == ()
    assert report.counts["scans_cut_again"] == report.counts["scans"] == 3


@pytest.mark.parametrize("suffix", ["mhd", "raw"])
def test_a_scan_that_leads_out_of_its_own_folder_is_not_read(store, suffix):
    path = store.data / f"subset1/1.2.840.3.{suffix}"
    path.rename(path.with_name(f"real.{suffix}"))
    path.symlink_to(f"real.{suffix}")
    assert verify_store(store.path, "source", store.data).findings == ()
    path.unlink()
    path.with_name(f"real.{suffix}").rename(store.data / f"subset0/elsewhere.{suffix}")
    path.symlink_to(store.data / f"subset0/elsewhere.{suffix}")
    (finding,) = errors(verify_store(store.path, "source", store.data))
    assert (finding.code, finding.series_uid) == ("source-unreadable", "1.2.840.3")
    assert f"1.2.840.3.{suffix} leads out of its folder" in finding.message


def test_a_folder_with_none_of_the_scans_is_refused_before_anything_is_read(store, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"other: not one of the store's 3 scans is there, such as 'subset.*--data"):
        verify_store(store.path, "source", tmp_path / "other")
    for path in store.data.rglob("*.raw"):
        path.unlink()
    with pytest.raises(UsageError, match="not one of the store's 3 scans"):
        verify_store(store.path, "source", store.data)


def test_it_is_counted_how_many_scans_were_cut_again(store):
    (store.data / "subset1/1.2.840.3.raw").unlink()
    counts = verify_store(store.path, "source", store.data).counts
    assert (counts["scans"], counts["scans_cut_again"]) == (3, 2)
    assert "scans" not in verify_store(store.path, "full").counts
