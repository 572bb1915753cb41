"""Resampled crops against SimpleITK's own resampling, and through build, verify, info, show."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import lunaprep
from lunaprep.build import BuildOptions, build, preview
from lunaprep.cli import cli
from lunaprep.crops import (
    cut_crop,
    is_sample_padded,
    needed_voxels,
    resample_crop,
    sample_starts,
    samples_inside,
    step_of,
    window_starts,
)
from lunaprep.errors import StoreError, UsageError
from lunaprep.info import format_info, store_info
from lunaprep.parameters import Parameters, parameters_from_json
from lunaprep.store.reader import crop_centers
from lunaprep.verify import verify_store

from .conftest import files_of
from .handmade_store import canonical, resign, sha256, write_shard

MM = (1.25, 1.0, 1.0)
SHAPE = (20, 28, 24)
RESAMPLED = Parameters(crop_shape=SHAPE, resample_mm=MM, shard_bytes=1)


def make(data: Path, out: Path, parameters: Parameters = RESAMPLED, **options: object):
    return build(BuildOptions(data, out, **{"workers": 1, **options}), parameters)


@pytest.fixture(scope="session")
def resampled(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store with crops of a spacing of their own; never written to."""
    out = tmp_path_factory.mktemp("resampled") / "store"
    make(phantom_root, out)
    return out


def by_itk(image: sitk.Image, xyz, shape, mm, edge: str, hu: tuple[int, int]) -> np.ndarray:
    """A crop by SimpleITK: a grid of the wanted spacing, laid by hand, along the scan's axes, edges as documented."""
    clipped = sitk.Clamp(sitk.Cast(image, sitk.sitkFloat64), lowerBound=hu[0], upperBound=hu[1])
    size, spacing = np.array(shape)[::-1], np.array(mm)[::-1]
    step = spacing / image.GetSpacing()
    first = np.array(image.TransformPhysicalPointToContinuousIndex(xyz)) - (size // 2) * step
    for axis, (n, side) in enumerate(zip(image.GetSize(), size, strict=True)):
        low, high = -0.5 + step[axis] / 2, n - 0.5 - step[axis] / 2 - (side - 1) * step[axis]
        if edge == "shift":
            first[axis] = min(max(first[axis], min(low, high)), max(low, high))
    grid = sitk.Image([int(side) for side in size], sitk.sitkFloat64)
    grid.SetSpacing(spacing.tolist())
    grid.SetDirection(image.GetDirection())
    grid.SetOrigin(image.TransformContinuousIndexToPhysicalPoint(first.tolist()))
    return sitk.GetArrayFromImage(sitk.Resample(clipped, grid, sitk.Transform(), sitk.sitkLinear, float(hu[0])))


# ---- places ---------------------------------------------------------------------------------------------------------

side = st.integers(1, 12)
shapes = st.tuples(side, side, side)
steps = st.tuples(*[st.floats(0.1, 4.0)] * 3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(scan=shapes, crop=shapes, edge=st.sampled_from(["shift", "pad"]), data=st.data())
def test_with_the_scans_spacing_and_whole_centres_it_is_the_plain_crop(scan, crop, edge, data):
    center = [data.draw(st.integers(0, n - 1)) for n in scan]
    start = window_starts([center], scan, crop, edge)
    first = sample_starts([center], scan, crop, (1.0, 1.0, 1.0), edge)
    assert first.tolist() == start.astype(float).tolist()
    voxels = np.random.default_rng(3).integers(-1000, 1000, scan).astype(np.int16)
    plain, ours = np.empty(crop, dtype=np.float32), np.empty(crop, dtype=np.float32)
    cut_crop(voxels, 0, tuple(start[0].tolist()), plain, -1000)
    resample_crop(voxels, 0, scan[0], tuple(first[0].tolist()), (1.0, 1.0, 1.0), ours, -1000)
    np.testing.assert_array_equal(ours, plain)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(scan=shapes, crop=shapes, step=steps, data=st.data())
def test_a_shifted_crop_lies_in_the_scan_or_holds_it_and_a_padded_one_keeps_its_centre(scan, crop, step, data):
    center = [data.draw(st.floats(-0.5, n - 0.5)) for n in scan]
    shifted = sample_starts([center], scan, crop, step, "shift")[0]
    padded = sample_starts([center], scan, crop, step, "pad")[0]
    grain = 2.0**-20
    for axis in range(3):
        low = shifted[axis] - step[axis] / 2
        high = low + crop[axis] * step[axis]
        n = scan[axis]
        if crop[axis] * step[axis] <= n:
            assert low >= -0.5 - grain
            assert high <= n - 0.5 + grain
        else:
            assert low <= -0.5 + grain
            assert high >= n - 0.5 - grain
        assert abs(padded[axis] + crop[axis] // 2 * step[axis] - center[axis]) <= grain
        assert (shifted[axis] / grain).is_integer()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scan=shapes, crop=shapes, step=steps, data=st.data())
def test_what_is_inside_and_what_is_needed_sample_by_sample(scan, crop, step, data):
    first = [data.draw(st.floats(-9, 9)) for _ in scan]
    outside = []
    for start, s, n_out, n in zip(first, step, crop, scan, strict=True):
        places = [start + k * s for k in range(n_out)]
        inside = [k for k, place in enumerate(places) if -0.5 <= place <= n - 0.5]
        low, high = samples_inside(start, s, n_out, n)
        assert list(range(low, high)) == inside
        outside.append(len(inside) < n_out)
        needed = {min(max(int(np.floor(p)) + way, 0), n - 1) for p in places for way in (0, 1)}
        assert needed_voxels(start, s, n_out, n) == (min(needed), max(needed) + 1)
    assert is_sample_padded(np.array([first]), scan, crop, step).tolist() == [any(outside)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scan=st.tuples(*[st.integers(3, 14)] * 3),
    edge=st.sampled_from(["shift", "pad"]),
    mm=st.tuples(*[st.floats(0.4, 3.0)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 3.0)] * 3),
    turned=st.sampled_from([(1, 1, 1), (-1, -1, 1), (-1, 1, -1)]),
    data=st.data(),
)
def test_a_resampled_crop_is_simpleitks(scan, edge, mm, spacing, turned, data):
    voxels = np.random.default_rng(11).integers(-3000, 3000, scan).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetDirection(np.diag(turned).ravel().astype(float).tolist())
    image.SetOrigin((-12.5, 40.25, 7.0))
    center = [data.draw(st.floats(-0.4, n - 0.6)) for n in scan]
    xyz = image.TransformContinuousIndexToPhysicalPoint(center[::-1])
    shape, step = (9, 7, 8), step_of(mm, spacing[::-1])
    expected = by_itk(image, xyz, shape, mm, edge, (-1000, 1000))
    start = sample_starts([center], scan, shape, step, edge)[0]
    got = np.empty(shape, dtype=np.float32)
    low, high = needed_voxels(start[0], step[0], shape[0], scan[0])
    clipped = np.clip(voxels, -1000, 1000)[low:high]  # the slices that it needs, and no more
    resample_crop(clipped, low, scan[0], tuple(start.tolist()), step, got, -1000)
    places = [start[axis] + np.arange(shape[axis]) * step[axis] for axis in range(3)]
    rim = [np.minimum(abs(p + 0.5), abs(p - n + 0.5)) < 2e-6 for p, n in zip(places, scan, strict=True)]
    sure = ~(rim[0][:, None, None] | rim[1][:, None] | rim[2])
    assert np.abs(got - expected)[sure].max(initial=0) <= 0.01


# ---- the store ------------------------------------------------------------------------------------------------------


def test_every_crop_of_a_store_is_simpleitks(phantom_root, resampled):
    store = lunaprep.open_store(resampled)
    assert store.crop_spacing == MM
    assert store.dtype == np.float32
    scans = store.scans.set_index("series_uid")
    for series_uid, rows in store.manifest.groupby("series_uid"):
        image = sitk.ReadImage(str(phantom_root / scans["file"][series_uid]))
        for crop, (_, row) in zip(store.crops(rows.index), rows.iterrows(), strict=True):
            expected = by_itk(image, (row.x_mm, row.y_mm, row.z_mm), SHAPE, MM, "shift", (-1000, 1000))
            np.testing.assert_allclose(crop, expected, atol=0.01)


@pytest.mark.parametrize("edge", ["shift", "pad"])
def test_crops_at_every_border_and_of_thin_scans(data, tmp_path, edge):
    path = next(data.glob("subset0/*.mhd"))
    image = sitk.ReadImage(str(path))
    size = np.array(image.GetSize())
    corners = [
        image.TransformContinuousIndexToPhysicalPoint(((size - 0.7) * np.array(at) / 2 - 0.2).tolist())
        for at in itertools.product(range(3), repeat=3)
    ]
    lines = [f"{path.stem},{x},{y},{z},0" for x, y, z in corners]
    (data / "candidates.csv").write_text("seriesuid,coordX,coordY,coordZ,class\n" + "\n".join(lines) + "\n")
    for shape, mm in ((SHAPE, MM), ((64, 12, 12), (2.0, 1.0, 1.0))):  # the second is deeper than the scan
        out = tmp_path / str(shape[0])
        parameters = Parameters(crop_shape=shape, resample_mm=mm, edge=edge)
        assert make(data, out, parameters, targets=False, volumes=False).candidates_outside == 0
        store = lunaprep.open_store(out)
        is_thin = bool(store.scans.set_index("series_uid").loc[path.stem, "is_thin"])
        assert is_thin == (shape[0] == 64)
        for crop, (_, row) in zip(store.crops(range(27)), store.manifest.iterrows(), strict=True):
            expected = by_itk(image, (row.x_mm, row.y_mm, row.z_mm), shape, mm, edge, (-1000, 1000))
            np.testing.assert_allclose(crop, expected, atol=0.01)
            assert row.is_padded or edge == "pad" or not is_thin
        assert verify_store(out, "source", data).findings == ()
        centers = crop_centers(store.manifest)
        if edge == "pad":
            assert (centers == np.array(shape) // 2).all()
        assert ((centers >= 0) & (centers < shape)).all()


def test_the_store_is_the_same_for_any_workers_and_path(phantom_root, resampled, tmp_path):
    make(phantom_root, tmp_path / "two", workers=2)
    assert files_of(tmp_path / "two") == files_of(resampled)


def test_verify_passes_and_slabs_and_volumes_are_those_of_a_plain_store(phantom_root, built_store, resampled):
    for level in ("quick", "full", "source"):
        assert verify_store(resampled, level, phantom_root).findings == ()
    ours, plain = lunaprep.open_store(resampled), lunaprep.open_store(built_store)
    assert ours.record["slabs"]["dtype"] == "int16"
    assert list(ours.slabs["xxh3"]) == list(plain.slabs["xxh3"])
    assert list(ours.scans["volume_sha256"]) == list(plain.scans["volume_sha256"])


def test_a_changed_spacing_rebuilds_and_the_same_one_keeps(phantom_root, tmp_path):
    few = {"subsets": (0,), "targets": False, "volumes": False}
    first = make(phantom_root, tmp_path / "s", **few)
    assert first.scans_built > 0
    before = lunaprep.open_store(tmp_path / "s").record
    assert make(phantom_root, tmp_path / "s", **few).scans_built == 0
    other = replace(RESAMPLED, resample_mm=(1.25, 1.0, 1.1))
    said = preview(BuildOptions(phantom_root, tmp_path / "s", workers=1, **few), other)
    assert any("resample_mm [1.25, 1.0, 1.0] -> [1.25, 1.0, 1.1]: touches every crop" in line for line in said.changes)
    assert make(phantom_root, tmp_path / "s", other, **few).scans_built == first.scans_built
    after = lunaprep.open_store(tmp_path / "s").record
    assert {s["id"] for s in before["shards"]}.isdisjoint(s["id"] for s in after["shards"])
    plain = replace(RESAMPLED, resample_mm=None)
    assert make(phantom_root, tmp_path / "s", plain, **few).scans_built == first.scans_built
    store = lunaprep.open_store(tmp_path / "s")
    assert store.crop_spacing is None
    assert "resample_mm" not in store.parameters


def test_a_store_without_the_option_says_nothing_of_it(built_store):
    assert "resample_mm" not in (built_store / "store.json").read_text()
    assert not any(name.startswith("center_") for name in pq.read_schema(built_store / "crops.parquet").names)


def test_subsets_of_another_spacing_are_not_put_together(data, tmp_path):
    few = {"targets": False, "volumes": False}
    make(data, tmp_path / "s", subsets=(0,), **few)
    for path in (data / "subset0").iterdir():
        path.unlink()
    (data / "subset0").rmdir()
    for parameters, advice in (
        (replace(RESAMPLED, resample_mm=(1.0, 1.0, 1.0)), "Use --resample-mm 1.25,1.0,1.0"),
        (replace(RESAMPLED, resample_mm=None), "Use --resample-mm 1.25,1.0,1.0"),
    ):
        with pytest.raises(UsageError, match=advice):
            make(data, tmp_path / "s", parameters, subsets=(1,), **few)
    make(data, tmp_path / "s", subsets=(1,), **few)
    assert verify_store(tmp_path / "s").findings == ()


# ---- verify finds ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(phantom_root, tmp_path) -> Path:
    """A store of one subset that a test may spoil."""
    make(phantom_root, tmp_path / "small", subsets=(0,), targets=False, volumes=False)
    return tmp_path / "small"


def forge(store: Path, change) -> None:
    """Change the first crop and every record of it."""
    entry = json.loads((store / "store.json").read_bytes())["shards"][0]
    with h5py.File(store / entry["file"]) as h5:
        crops = h5["crops"][:]
    crops[0] = change(crops[0])
    write_shard(store / entry["file"], crops)
    digest = xxhash.xxh3_64_intdigest(crops[0].tobytes())
    receipt = json.loads((store / entry["receipt"]).read_bytes())
    receipt["crop_xxh3"][0] = f"{digest:016x}"
    receipt["sha256"] = sha256(store / entry["file"])
    (store / entry["receipt"]).write_bytes(canonical(receipt))
    edit_table(store, "xxh3", digest)


def edit_table(store: Path, column: str, value: object) -> None:
    """Change a value of the first row of crops.parquet and every record of it."""
    table = pq.read_table(store / "crops.parquet")
    rows = table.to_pylist()
    rows[0][column] = value
    edited = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(edited, store / "crops.parquet", write_page_checksum=True)
    resign(store)


@pytest.mark.parametrize("change", ["value", "moved"])
def test_source_finds_a_forged_crop(small, phantom_root, change):
    def value(crop):
        crop[3, 4, 5] += 0.5
        return crop

    forge(small, {"value": value, "moved": lambda crop: np.roll(crop, 1, axis=2)}[change])
    assert verify_store(small, "full").ok
    found = [f for f in verify_store(small, "source", phantom_root).findings if f.severity == "error"]
    assert [f.code for f in found] == ["crop-differs"]
    assert found[0].shard_row == 0


@pytest.mark.parametrize(
    ("column", "value", "code"),
    [("start_row", 99, "bad-start"), ("center_col", 3.0, "bad-start"), ("is_padded", True, "bad-value")],
)
def test_verify_finds_a_place_that_does_not_follow(small, column, value, code):
    edit_table(small, column, value)
    assert code in {f.code for f in verify_store(small, "quick").findings}


def test_verify_finds_a_missing_column_of_centres(small):
    table = pq.read_table(small / "crops.parquet")
    pq.write_table(table.drop_columns(["center_row"]), small / "crops.parquet", write_page_checksum=True)
    resign(small)
    assert {f.code for f in verify_store(small, "quick").findings} == {"bad-value"}


@pytest.mark.parametrize("value", [[1.0, 1.0], [0.0, 1.0, 1.0], "1", [1.0, 1.0, None], 1])
def test_a_spacing_that_cannot_be_is_refused(small, value):
    record = json.loads((small / "store.json").read_bytes())
    record["parameters"]["resample_mm"] = value
    (small / "store.json").write_bytes(canonical(record))
    resign(small)
    with pytest.raises(StoreError, match="resample_mm"):
        lunaprep.open_store(small)
    assert {f.code for f in verify_store(small, "quick").findings} == {"store-json-invalid"}


# ---- what people see ------------------------------------------------------------------------------------------------


def test_info_and_show_tell_the_spacing(resampled, tmp_path):
    store = lunaprep.open_store(resampled)
    assert "20 × 28 × 24 · resampled to 1.25 × 1 × 1 mm · float32" in format_info(store_info(store)).replace("\n", "")
    number = str(store.manifest.query("is_nodule")["candidate_id"].iloc[0])
    run = CliRunner().invoke(cli, ["show", str(resampled), "--candidate", number, "--out", str(tmp_path / "c.png")])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize("text", ["1,2", "x", "1,2,3,4", "", "nan", "inf", "0", "0.05,1,1", "11"])
def test_a_bad_spacing_is_wrong_usage(phantom_root, tmp_path, text):
    arguments = ["build", "--data", str(phantom_root), "--out", str(tmp_path / "s"), "--resample-mm", text]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 2, run.output
    assert not (tmp_path / "s").exists()


def test_one_spacing_is_that_of_all_axes():
    from lunaprep.cli_options import Spacing

    assert Spacing().convert("1", None, None) == (1.0, 1.0, 1.0)
    assert Spacing().convert("1.25,0.7,0.8", None, None) == (1.25, 0.7, 0.8)


def test_int16_is_refused_and_parameters_come_back():
    with pytest.raises(UsageError, match="int16 would lose something"):
        replace(RESAMPLED, dtype="int16")
    assert parameters_from_json(RESAMPLED.to_json()) == RESAMPLED
