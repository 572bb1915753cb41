"""Scan readers: the same voxels and grid as SimpleITK, one line for everything that is wrong."""

import gzip
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import xxhash

from lunaprep.errors import ScanError
from lunaprep.scans.open import SUFFIXES, iter_slabs, open_scan, read_voxels, series_uid_of
from lunaprep.scans.scan import Scan

from .scan_files import RAW, header_text, nifti_bytes

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
KINDS = {"plain.mhd": False, "packed.mhd": True, "plain.mha": False, "packed.mha": True, "packed.nii.gz": True}
DTYPES = ("int16", "uint8", "int32", "float32", "int8", "uint16", "uint32", "float64", "int64", "uint64")


def random_direction(rng: np.random.Generator) -> np.ndarray:
    """Orthonormal axes: permuted, flipped and, half of the time, turned."""
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    if rng.random() < 0.5:
        axes, _ = np.linalg.qr(axes + rng.normal(0, 0.3, (3, 3)))
    return axes


def random_image(seed: int, dtype: str = "int16", shape: tuple[int, int, int] = (5, 4, 3)) -> SimpleITK.Image:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        voxels = rng.normal(0, 1000, shape).astype(dtype)
    else:
        span = np.iinfo(dtype)
        voxels = rng.integers(span.min, span.max, shape, dtype=dtype, endpoint=True)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetOrigin(rng.uniform(-500, 500, 3).tolist())
    image.SetSpacing(rng.uniform(0.3, 5, 3).tolist())
    image.SetDirection(random_direction(rng).ravel().tolist())
    return image


def use(path: Path, root: Path) -> tuple[Scan, np.ndarray]:
    """Open a scan and read all of it."""
    scan = open_scan(path, root)
    return scan, read_voxels(scan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_simpleitk_writes(kind, dtype, tmp_path):
    for seed in range(3):
        image = random_image(seed, dtype)
        path = tmp_path / kind
        SimpleITK.WriteImage(image, str(path), KINDS[kind])
        expected = SimpleITK.ReadImage(str(path))
        scan = open_scan(path, tmp_path)
        geometry = scan.geometry
        assert geometry.origin == expected.GetOrigin()
        assert geometry.spacing == expected.GetSpacing()
        assert geometry.direction == expected.GetDirection()
        tolerance = 1e-5 if path.name.endswith(".nii.gz") else 0
        assert geometry.origin == pytest.approx(image.GetOrigin(), rel=1e-6, abs=tolerance)
        assert geometry.spacing == pytest.approx(image.GetSpacing(), rel=1e-6)
        assert geometry.direction == pytest.approx(image.GetDirection(), abs=1e-6)
        assert geometry.shape_irc == image.GetSize()[::-1]
        assert scan.dtype == np.dtype(dtype)
        voxels = read_voxels(scan)
        assert voxels.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(voxels, SimpleITK.GetArrayFromImage(image))
        assert scan.reader == ("map" if kind == "plain.mhd" else "simpleitk")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_slices", [1, 2, 3, 7, 100])
def test_slabs_and_hash(kind, num_slices, tmp_path):
    image = random_image(7, shape=(7, 33, 45))
    path = tmp_path / kind
    SimpleITK.WriteImage(image, str(path), KINDS[kind])
    scan = open_scan(path, tmp_path)
    hasher = xxhash.xxh3_128()
    slabs = list(iter_slabs(scan, num_slices, hasher))
    assert [len(slab) for slab in slabs] == [min(num_slices, 7 - i) for i in range(0, 7, num_slices)]
    assert not any(slab.flags.writeable for slab in slabs)
    np.testing.assert_array_equal(np.concatenate(slabs), SimpleITK.GetArrayFromImage(image))
    assert scan.data_bytes == scan.data_path.stat().st_size
    assert hasher.digest() == xxhash.xxh3_128_digest(scan.data_path.read_bytes())


def test_slabs_outlive_the_iterator(tmp_path):
    for kind, packed in KINDS.items():
        image = random_image(1, shape=(6, 200, 200))
        SimpleITK.WriteImage(image, str(tmp_path / kind), packed)
        slabs = iter_slabs(open_scan(tmp_path / kind, tmp_path), 3)
        first = next(slabs)
        next(slabs)
        del slabs
        np.testing.assert_array_equal(first, SimpleITK.GetArrayFromImage(image)[:3])


def test_mapped_memory_stays_small(tmp_path):
    psutil = pytest.importorskip("psutil")
    (tmp_path / "a.raw").write_bytes(bytes(512 * 512 * 100))
    fields = {"DimSize": "512 512 100", "ElementType": "MET_UCHAR"}
    (tmp_path / "a.mhd").write_text(header_text("a", **fields))
    scan = open_scan(tmp_path / "a.mhd", tmp_path)
    process = psutil.Process()
    before = process.memory_info().rss
    grown = []
    for slab in iter_slabs(scan, 8):
        slab.max()
        grown.append(process.memory_info().rss - before)
    assert max(grown) < 10 * 2**20  # of 25; a slab has 2


def test_header_variants(tmp_path):
    voxels = np.arange(240, dtype=np.int16).reshape(5, 6, 8)
    (tmp_path / "a.raw").write_bytes(voxels.astype(">i2").tobytes())
    variants = {
        "big-endian": header_text("a", BinaryDataByteOrderMSB="True"),
        "other key": header_text("a", BinaryDataByteOrderMSB=None, ElementByteOrderMSB="true"),
        "no direction": header_text("a", BinaryDataByteOrderMSB="True", TransformMatrix=None),
        "aliases": header_text("a", BinaryDataByteOrderMSB="True").replace("Offset", "Position"),
        "size": header_text("a", BinaryDataByteOrderMSB="True").replace("ElementSpacing", "ElementSize"),
        "crlf": header_text("a", BinaryDataByteOrderMSB="True").replace("\n", "\r\n"),
        "tabs": header_text("a", BinaryDataByteOrderMSB="True").replace(" = ", "\t=\t"),
        "tight": header_text("a", BinaryDataByteOrderMSB="True").replace(" = ", "="),
        "no last newline": header_text("a", BinaryDataByteOrderMSB="True").rstrip(),
        "metadata": header_text("a", BinaryDataByteOrderMSB="True", Modality="MET_MOD_CT", note="a = b é"),
        "harmless": header_text(
            "a", BinaryDataByteOrderMSB="True", HeaderSize="0", ElementToIntensityFunctionSlope="1.0"
        ),
        "exponents": header_text("a", BinaryDataByteOrderMSB="True", ElementSpacing="7e-1 +.7 250.E-2"),
    }
    for name, text in variants.items():
        (tmp_path / "a.mhd").write_bytes(text.encode())
        scan = open_scan(tmp_path / "a.mhd", tmp_path)
        expected = SimpleITK.ReadImage(str(tmp_path / "a.mhd"))
        assert scan.geometry.spacing == expected.GetSpacing(), name
        assert scan.geometry.origin == expected.GetOrigin(), name
        assert scan.geometry.direction == expected.GetDirection(), name
        assert scan.dtype == np.dtype("int16"), name
        np.testing.assert_array_equal(read_voxels(scan), voxels, name)


def test_packed_and_local_variants(tmp_path):
    """SimpleITK gets a header of ours for these: byte order, aliases and odd keys must survive it or do no harm."""
    voxels = np.arange(240, dtype=np.int16).reshape(5, 6, 8)
    big = voxels.astype(">i2").tobytes()
    changes = {"TransformMatrix": "0 0 -1 1 0 0 0 -1 0", "Note": "%s%n" * 50, "Name": "x" * 5000}
    common = header_text("a", BinaryDataByteOrderMSB="True", **changes)
    for alias in (("Offset", "Origin"), ("TransformMatrix", "Orientation"), ("ElementSpacing", "ElementSize")):
        text = common.replace(*alias)
        packed = text.replace("CompressedData = False", "CompressedData = True")
        (tmp_path / "a.raw").write_bytes(zlib.compress(big))
        (tmp_path / "a.mhd").write_text(packed)
        (tmp_path / "plain.mha").write_bytes(text.replace("a.raw", "LOCAL").encode() + big)
        (tmp_path / "packed.mha").write_bytes(packed.replace("a.raw", "LOCAL").encode() + zlib.compress(big))
        for file in ("a.mhd", "plain.mha", "packed.mha"):
            scan, read = use(tmp_path / file, tmp_path)
            assert scan.reader == "simpleitk"
            assert scan.geometry.direction == (0, 1, 0, 0, 0, -1, -1, 0, 0)
            assert scan.geometry.origin == (-10, -20, 5)
            assert scan.geometry.spacing == (0.7, 0.7, 2.5)
            np.testing.assert_array_equal(read, voxels)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("slope", "inter"), [(1, 0), (0, 0), (2, 0), (1, -1024), (0, 5)])
def test_nifti_values_are_simpleitks(slope, inter, order, tmp_path):
    content = nifti_bytes()
    struct.pack_into("<2f", content, 112, slope, inter)
    if order == ">":
        swapped = {0: "i", 40: "8h", 70: "2h", 76: "8f", 108: "3f", 252: "2h", 256: "18f"}
        for at, form in swapped.items():
            struct.pack_into(">" + form, content, at, *struct.unpack_from("<" + form, content, at))
        content[352:] = np.frombuffer(bytes(content[352:]), "<i2").byteswap().tobytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))  # two members, as bgzip
    scan = open_scan(path, tmp_path)
    expected = SimpleITK.ReadImage(str(path))
    assert scan.geometry.direction == expected.GetDirection()
    assert scan.geometry.origin == pytest.approx((10, 20, 5))
    assert scan.dtype == np.dtype("int16" if (slope, inter) in ((1, 0), (0, 0)) else "float32")
    np.testing.assert_array_equal(read_voxels(scan), SimpleITK.GetArrayFromImage(expected))
    raw = np.frombuffer(RAW, "<i2").reshape(5, 6, 8)
    np.testing.assert_array_equal(read_voxels(scan), raw.astype(np.float32) * (slope or 1) + inter)


def test_links_inside_the_data_folder_are_followed(tmp_path):
    for kind, packed in KINDS.items():
        store, scans = tmp_path / kind / "blobs", tmp_path / kind / "scans"
        store.mkdir(parents=True)
        scans.mkdir()
        image = random_image(3)
        SimpleITK.WriteImage(image, str(store / kind), packed)
        for file in list(store.iterdir()):
            if kind.endswith(".mhd") and file.suffix != ".mhd":
                (scans / file.name).symlink_to(f"../blobs/{file.name}")
            elif kind.endswith(".mhd"):
                shutil.move(file, scans / file.name)
            else:
                file.rename(store / "0123abcd")
                (scans / file.name).symlink_to("../blobs/0123abcd")
        scan = open_scan(scans / kind, tmp_path / kind)
        np.testing.assert_array_equal(read_voxels(scan), SimpleITK.GetArrayFromImage(image))
        with pytest.raises(ScanError, match="leads out of the data folder"):
            open_scan(scans / kind, scans)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_after_opening(kind, tmp_path):
    path = tmp_path / kind
    SimpleITK.WriteImage(random_image(0), str(path), KINDS[kind])
    scan = open_scan(path, tmp_path)
    SimpleITK.WriteImage(random_image(1, shape=(5, 4, 4)), str(path), KINDS[kind])
    with pytest.raises(ScanError, match="has changed since"):
        read_voxels(scan)
    scan = open_scan(path, tmp_path)
    with scan.data_path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ScanError, match=r"more voxels|follow the end"):
        read_voxels(scan)
    scan.data_path.unlink()
    with pytest.raises(ScanError, match="cannot be opened"):
        read_voxels(scan)


def test_series_uid():
    assert SUFFIXES == (".mhd", ".mha", ".nii.gz")
    for suffix in SUFFIXES:
        assert series_uid_of(Path(f"a/1.2.840-x_{suffix}")) == "1.2.840-x_"
    for name in ("a.nii", "a.dcm", "mhd", "..mhd", "a..b.mhd", "-a.mhd", "a/.mhd", "x" * 129 + ".mha"):
        with pytest.raises(ScanError):
            series_uid_of(Path(name))


def test_wrong_slab_size(tmp_path):
    (tmp_path / "a.raw").write_bytes(RAW)
    (tmp_path / "a.mhd").write_text(header_text("a"))
    with pytest.raises(ValueError, match="num_slices is 0"):
        next(iter_slabs(open_scan(tmp_path / "a.mhd", tmp_path), 0))


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the project")
def test_real_scans():
    paths = sorted((SHARED / "real_ct").rglob("*.mhd")) + sorted((SHARED / "lidc_nodules").rglob("*.mhd"))[::8]
    assert len(paths) > 50
    flipped = 0
    for path in paths:
        scan = open_scan(path, SHARED)
        image = SimpleITK.ReadImage(str(path))
        assert scan.geometry.origin == image.GetOrigin()
        assert scan.geometry.spacing == image.GetSpacing()
        assert scan.geometry.direction == image.GetDirection()
        assert scan.reader == "map"
        np.testing.assert_array_equal(read_voxels(scan), SimpleITK.GetArrayFromImage(image))
        flipped += scan.geometry.is_flipped
    assert flipped > 0
