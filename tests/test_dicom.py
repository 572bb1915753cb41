"""DICOM series: the grid and voxels are SimpleITK's, the bad ones are refused by name, nothing personal goes on."""

import importlib.util
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless, RLELossless

from lunaprep.errors import ScanError
from lunaprep.scans.dicom import DicomScan, describe, find_series, open_series
from lunaprep.scans.dicom_pixels import OUTSIDE_HU, iter_slabs

from .dicom_files import AXIAL, GAP, ORIGIN, SERIES_UID, SHAPE, normal_of, reread, save, stored_values, write_series

has_gdcm = pytest.mark.skipif(importlib.util.find_spec("gdcm") is None, reason="the extra 'dicom' is not installed")


def only(folder: Path) -> DicomScan:
    """The one series of a folder."""
    found = find_series(folder)
    assert len(found.series) == 1
    return describe(found.series[0])


def voxels(scan: DicomScan, num_slices: int = 4) -> np.ndarray:
    return np.concatenate(list(iter_slabs(scan, num_slices)))


def itk_image(folder: Path, series_uid: str = SERIES_UID) -> SimpleITK.Image:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series_uid))
    return reader.Execute()


def assert_same_grid(scan: DicomScan, image: SimpleITK.Image, tolerance: float = 0.0):
    assert scan.geometry.shape_irc == image.GetSize()[::-1]
    assert scan.geometry.origin == image.GetOrigin()
    np.testing.assert_allclose(scan.geometry.spacing, image.GetSpacing(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(scan.geometry.direction, image.GetDirection(), rtol=0, atol=tolerance)


def refused(folder: Path) -> str:
    """The one line with which a folder's first series is refused, on its header or on its voxels."""
    found = find_series(folder)
    with pytest.raises(ScanError) as caught:
        voxels(describe(found.series[0]))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 230
    return message


# what is read


def test_grid_and_voxels_are_those_of_simpleitk(tmp_path):
    write_series(tmp_path)
    scan = only(tmp_path)
    assert_same_grid(scan, itk_image(tmp_path))
    np.testing.assert_array_equal(voxels(scan), SimpleITK.GetArrayFromImage(itk_image(tmp_path)))
    assert scan.dtype == np.int32  # 16 bits less 1024 do not fit into int16


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(SHAPE[0])),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    gap=st.floats(0.4, 5),
)
def test_any_pose_and_any_order_of_files(tmp_path_factory, order, angles, origin, gap):
    a, b, c = angles
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    matrix = turn_z @ turn_y @ turn_x
    folder = tmp_path_factory.mktemp("series")

    def shuffled(ds, number):
        ds.InstanceNumber = order[number] + 1

    pose = (*matrix[:, 0], *matrix[:, 1])
    write_series(folder, order=order, edit=shuffled, orientation=pose, origin=origin, gap=gap)
    scan, image = only(folder), itk_image(folder)
    assert_same_grid(scan, image, 1e-13)
    np.testing.assert_array_equal(voxels(scan), stored_values().astype(int) - 1024)
    corner = image.TransformIndexToPhysicalPoint([SHAPE[2] - 1, SHAPE[1] - 1, SHAPE[0] - 1])
    np.testing.assert_allclose(scan.geometry.irc_to_xyz(np.array(SHAPE) - 1), corner, atol=1e-9)


def test_sorted_by_place_not_by_name_or_instance_number(tmp_path):
    def reversed_numbers(ds, number):
        ds.InstanceNumber = 100 - number

    write_series(tmp_path, order=[4, 0, 5, 2, 1, 3], edit=reversed_numbers)
    scan = only(tmp_path)
    assert [item.path.name[:3] for item in scan.slices] == ["001", "004", "003", "005", "000", "002"]
    np.testing.assert_array_equal(voxels(scan), stored_values().astype(int) - 1024)


def test_every_file_is_hashed_once_in_order(tmp_path):
    write_series(tmp_path)
    scan, hasher = only(tmp_path), xxhash.xxh3_128()
    slabs = list(iter_slabs(scan, 4, hasher))
    assert [len(slab) for slab in slabs] == [4, 2]
    assert not slabs[0].flags.writeable
    content = b"".join(path.read_bytes() for path in scan.data_paths)
    assert hasher.digest() == xxhash.xxh3_128_digest(content)
    assert scan.data_bytes == len(content)
    with pytest.raises(ValueError, match="expected 1 or more"):
        next(iter_slabs(scan, 0))


def test_series_of_a_folder_are_told_apart(tmp_path):
    other = "1.2.826.0.1.3680043.10.1.2"
    write_series(tmp_path / "b")
    write_series(tmp_path / "a", series_uid=other, values=stored_values(1)[:4])
    for k, path in enumerate(sorted((tmp_path / "a").iterdir())):
        path.rename(tmp_path / "b" / f"x{k}")
    (tmp_path / "readme.txt").write_text("no DICOM")
    (tmp_path / "b" / "._000.dcm").write_bytes(b"a Mac's shadow")
    found = find_series(tmp_path)
    assert [item.series_uid for item in found.series] == [SERIES_UID, other]
    assert found.num_other == 2
    assert found.faults == ()
    assert [len(voxels(describe(item))) for item in found.series] == [6, 4]


def test_a_folder_given_as_a_scan(tmp_path):
    other = "1.2.826.0.1.3680043.10.1.2"
    write_series(tmp_path / "a")
    assert open_series(tmp_path).series_uid == SERIES_UID
    write_series(tmp_path / "b", series_uid=other)
    assert open_series(tmp_path, other).series_uid == other
    with pytest.raises(ScanError, match="holds 2 CT series"):
        open_series(tmp_path)
    with pytest.raises(ScanError, match="no such CT series"):
        open_series(tmp_path, "1.2.3")


def test_a_localizer_in_the_series_is_set_aside_and_named(tmp_path):
    paths = write_series(tmp_path)
    scout = reread(paths[0])
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    save(scout, tmp_path / "scout.dcm")
    (series,) = find_series(tmp_path).series
    assert [item.path.name for item in series.localizers] == ["scout.dcm"]
    assert len(voxels(describe(series))) == SHAPE[0]


def test_only_ids_go_on(tmp_path):
    write_series(tmp_path)
    scan = only(tmp_path)
    assert (scan.patient_id, scan.series_uid) == ("P-1", SERIES_UID)
    for secret in ("Secret", "1950"):
        assert secret not in repr(scan)


@pytest.mark.parametrize(
    "tag",
    [
        *("PatientID", "StudyInstanceUID", "Modality", "ImageType", "InstanceNumber", "SOPInstanceUID"),
        *("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "HighBit", "RescaleSlope"),
    ],
)
def test_tags_that_the_grid_does_not_need_may_be_missing(tmp_path, tag):
    def drop(ds, number):
        delattr(ds, tag)

    write_series(tmp_path, edit=drop)
    np.testing.assert_array_equal(voxels(only(tmp_path)), stored_values().astype(int) - 1024)


@pytest.mark.parametrize(
    ("slope", "intercept", "kind"), [("1", "-1024", "i4"), ("2", "0", "i4"), ("0.5", "-10.25", "f4")]
)
def test_rescale(tmp_path, slope, intercept, kind):
    def rescale(ds, number):
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept

    write_series(tmp_path, edit=rescale)
    scan = only(tmp_path)
    assert scan.dtype == np.dtype(kind)
    np.testing.assert_array_equal(voxels(scan), stored_values() * float(slope) + float(intercept))
    np.testing.assert_array_equal(voxels(scan), SimpleITK.GetArrayFromImage(itk_image(tmp_path)))


def test_each_slice_has_its_own_rescale(tmp_path):
    def rescale(ds, number):
        ds.RescaleIntercept = str(-1000 - number)

    write_series(tmp_path, edit=rescale)
    expected = stored_values().astype(int) - 1000 - np.arange(SHAPE[0])[:, None, None]
    np.testing.assert_array_equal(voxels(only(tmp_path)), expected)


def test_each_slice_has_its_own_slope(tmp_path):
    def rescale(ds, number):
        ds.RescaleSlope = str(1 + number % 2)

    write_series(tmp_path, edit=rescale)
    slope = 1 + np.arange(SHAPE[0])[:, None, None] % 2
    np.testing.assert_array_equal(voxels(only(tmp_path)), stored_values().astype(int) * slope - 1024)


def test_twelve_bits_with_rubbish_above_them(tmp_path):
    values = stored_values().astype(np.uint16)

    def twelve(ds, number):
        ds.BitsStored, ds.HighBit = 12, 11

    write_series(tmp_path, values=values | 0x3000, edit=twelve)
    scan = only(tmp_path)
    assert scan.dtype == np.int16
    np.testing.assert_array_equal(voxels(scan), values.astype(int) - 1024)


def test_twelve_bits_with_a_sign(tmp_path):
    values = stored_values() - 1024

    def twelve(ds, number):
        ds.BitsStored, ds.HighBit, ds.RescaleIntercept = 12, 11, "0"

    write_series(tmp_path, values=values & 0x0FFF, edit=twelve)
    np.testing.assert_array_equal(voxels(only(tmp_path)), values)


@pytest.mark.parametrize(
    ("stored", "padding", "bits", "expected"),
    [
        (-2000, 63536, 16, -3024),  # GE writes the signed value as an unsigned one
        (-32768, 32768, 16, -33792),
        (3000, 3000, 16, OUTSIDE_HU),  # would read as bone
        (-32068, 33468, 12, OUTSIDE_HU),  # the lowest 12 bits alone are 700, soft tissue
    ],
)
def test_padding_reads_as_air_or_less(tmp_path, stored, padding, bits, expected):
    values = stored_values()
    values[:, 0] = stored

    def pad(ds, number):
        ds.add_new(0x00280120, "US", padding)
        ds.BitsStored, ds.HighBit = bits, bits - 1

    write_series(tmp_path, values=values, edit=pad)
    got = voxels(only(tmp_path))
    assert (got[:, 0] == expected).all()
    np.testing.assert_array_equal(got[:, 1:], values[:, 1:].astype(int) - 1024)


@pytest.mark.parametrize("is_turned", [False, True])
def test_monochrome1_whether_its_values_are_turned_over_or_not(tmp_path, is_turned):
    values = stored_values().astype(np.uint16)

    def white_is_low(ds, number):
        ds.PhotometricInterpretation, ds.BitsStored, ds.HighBit = "MONOCHROME1", 12, 11

    write_series(tmp_path, values=4095 - values if is_turned else values, edit=white_is_low)
    np.testing.assert_array_equal(voxels(only(tmp_path)), values.astype(int) - 1024)


def test_rle_needs_no_other_package(tmp_path):
    write_series(tmp_path, edit=lambda ds, number: ds.compress(RLELossless, generate_instance_uid=False))
    np.testing.assert_array_equal(voxels(only(tmp_path)), stored_values().astype(int) - 1024)


def gdcm_compressed(path: Path, syntax: str):
    """Compress a file in place with GDCM."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


SYNTAXES = ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]


@has_gdcm
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_compressed(tmp_path, syntax):
    values = stored_values().astype(np.uint16)
    for path in write_series(tmp_path, values=values):
        gdcm_compressed(path, syntax)
    np.testing.assert_array_equal(voxels(only(tmp_path)), values.astype(int) - 1024)


# what is refused: name, edit of a written series, words of the line


def edited(number: int, change):
    """Edit of one slice's dataset."""

    def spoil(paths):
        ds = reread(paths[number])
        change(ds)
        save(ds, paths[number])

    return spoil


def cut(paths):
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:-50])


def cut_header(paths):
    paths[2].write_bytes(paths[2].read_bytes()[:700])


def junk(paths):
    paths[2].write_bytes(b"\xff" * 5000)


def cut_before_the_grid(paths):
    paths[2].write_bytes(paths[2].read_bytes()[:400])


def damaged(paths):
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:132] + b"\xff" * 300 + content[432:])


def tilt(paths):
    for k, path in enumerate(paths):
        ds = reread(path)
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, float(y) + 0.5 * k, z]
        save(ds, path)


def stretched(paths):
    for k, path in enumerate(paths):
        ds = reread(path)
        ds.ImagePositionPatient = [0, 0, k * 2.0 + 0.036 * k * k]
        save(ds, path)


def deflated(paths):
    bomb = zlib.compressobj(wbits=-15)
    body = bomb.compress(b"\0" * (64 << 20)) + bomb.flush()
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", 22) + b"1.2.840.10008.1.2.1.99"
    paths[2].write_bytes(b"\0" * 128 + b"DICM" + meta + body)


def mislabelled(paths):
    paths[2].write_bytes(paths[2].read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1))


def everywhere(change):
    def spoil(paths):
        for k in range(len(paths)):
            edited(k, change)(paths)

    return spoil


def put(**tags):
    def change(ds):
        for name, value in tags.items():
            setattr(ds, name, value)

    return change


def dropped(*names):
    def change(ds):
        for name in names:
            delattr(ds, name)

    return change


def frame_bomb(paths):
    """A JPEG 2000 stream that says it has 60,000 x 60,000 pixels."""
    stream = b"\xff\x4f\xff\x51\0\x2f\0\0" + struct.pack(">4I", 60000, 60000, 0, 0) + b"\0" * 40

    def change(ds):
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = encapsulate([stream])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True

    edited(2, change)(paths)


def cut_fragments(paths):
    """A compressed slice whose end is missing."""
    for path in paths:
        ds = reread(path)
        ds.compress(RLELossless, generate_instance_uid=False)
        save(ds, path)
    paths[2].write_bytes(paths[2].read_bytes()[:-60])


def unsupported(ds):
    ds.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.201")
    ds.PixelData = encapsulate([b"1234"])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True


BAD = {
    "gap": (lambda paths: paths[2].unlink(), "1 missing there"),
    "duplicate position": (edited(2, put(ImagePositionPatient=[*ORIGIN[:2], ORIGIN[2] + GAP])), "the same position as"),
    "uneven": (edited(2, put(ImagePositionPatient=[*ORIGIN[:2], ORIGIN[2] + 2.2 * GAP])), "not equally spaced"),
    "gaps that grow": (stretched, "the gaps change along the series"),
    "mixed orientation": (
        edited(2, put(ImageOrientationPatient=[0, 1, 0, 0, 0, 1])),
        "ImageOrientationPatient is '0 1 0",
    ),
    "mixed size": (edited(2, put(Rows=SHAPE[1] // 2, PixelData=bytes(SHAPE[1] * SHAPE[2]))), "expected '8 x 10'"),
    "mixed spacing": (edited(2, put(PixelSpacing=[0.7, 0.625])), "PixelSpacing is '0.7 0.625'"),
    "mixed patients": (edited(2, put(PatientID="P-2")), "PatientID is 'P-2'"),
    "truncated pixels": (cut, "cut short"),
    "truncated header": (cut_header, "fetch the scan again"),
    "header cut before rows": (cut_before_the_grid, "its pixels are missing"),
    "junk slice": (junk, "no DICOM file"),
    "damaged header": (damaged, "002.dcm"),
    "no position": (edited(2, dropped("ImagePositionPatient")), "ImagePositionPatient is missing"),
    "no orientation": (everywhere(dropped("ImageOrientationPatient")), "ImageOrientationPatient is missing"),
    "no pixel spacing": (everywhere(dropped("PixelSpacing")), "PixelSpacing is missing"),
    "no series": (edited(2, dropped("SeriesInstanceUID")), "SeriesInstanceUID is missing"),
    "no pixels": (edited(2, dropped("PixelData")), "its pixels are missing"),
    "no rows": (edited(2, dropped("Rows")), "Rows is missing"),
    "wrong transfer syntax": (mislabelled, "against its transfer syntax"),
    "unsupported transfer syntax": (edited(2, unsupported), "is not supported"),
    "deflate bomb": (deflated, "deflated"),
    "frame bomb": (frame_bomb, "says 60000 x 60000"),
    "cut fragments": (cut_fragments, "cut short within its compressed pixels"),
    "tilt": (tilt, "gantry tilt of 11.3 degrees"),
    "not orthogonal": (everywhere(put(ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0])), "at right angles"),
    "position is text": (
        edited(2, lambda ds: ds.add_new(0x00200032, "LO", "left\\here\\1")),
        "expected 3 finite numbers",
    ),
    "position is nan": (edited(2, lambda ds: ds.add_new(0x00200032, "LO", "nan\\0\\1")), "expected 3 finite numbers"),
    "zero spacing": (everywhere(put(PixelSpacing=[0, 0])), "its spacing is"),
    "slope 0": (edited(2, put(RescaleSlope="0")), "RescaleSlope is 0"),
    "multi-frame": (edited(2, put(NumberOfFrames=7)), "7' frames"),
    "colour": (edited(2, put(SamplesPerPixel=3)), "a colour picture"),
    "wrong bits": (edited(2, put(BitsStored=20)), "20 bits of 16"),
    "pixels too few": (edited(2, put(PixelData=bytes(10))), "its pixels are 10 bytes"),
    "PET": (everywhere(put(Modality="PT")), "modality is 'PT', expected CT"),
    "one slice": (lambda paths: [path.unlink() for path in paths[1:]], "has 1 slices, expected 3 or more"),
    "two slices": (lambda paths: [path.unlink() for path in paths[2:]], "has 2 slices, expected 3 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_series(tmp_path, name):
    spoil, words = BAD[name]
    spoil(write_series(tmp_path))
    assert words in refused(tmp_path)


def test_unsigned_values_without_an_intercept_are_no_hu(tmp_path):
    def drop(ds, number):
        del ds.RescaleIntercept

    write_series(tmp_path, values=stored_values().astype(np.uint16), edit=drop)
    assert "are no HU" in refused(tmp_path)


def test_monochrome1_that_looks_like_no_ct(tmp_path):
    def white_is_low(ds, number):
        ds.PhotometricInterpretation = "MONOCHROME1"

    write_series(tmp_path, values=np.full(SHAPE, 1024, np.int16), edit=white_is_low)
    assert "look like HU" in refused(tmp_path)


@has_gdcm
def test_a_damaged_codestream(tmp_path):
    paths = write_series(tmp_path, values=stored_values().astype(np.uint16))
    for path in paths:
        gdcm_compressed(path, "JPEGLSLossless")
    ds = reread(paths[2])
    assert ds.file_meta.TransferSyntaxUID == JPEGLSLossless
    ds.PixelData = encapsulate([b"\xff\xd8" + b"\0" * 100])
    ds["PixelData"].is_undefined_length = True
    save(ds, paths[2])
    assert "compressed stream says no size" in refused(tmp_path)


def test_a_file_that_changes_after_the_plan(tmp_path):
    paths = write_series(tmp_path)
    scan = only(tmp_path)
    content = paths[2].read_bytes()
    paths[2].write_bytes(content.replace(b"P-1 ", b"P-2 "))
    with pytest.raises(ScanError, match="has changed"):
        voxels(scan)
    paths[2].write_bytes(content + b"\0\0")
    with pytest.raises(ScanError, match="has changed"):
        voxels(scan)


@pytest.mark.timeout(10)
def test_a_pipe_or_a_link_out_of_the_folder(tmp_path):
    paths = write_series(tmp_path / "series")
    os.mkfifo(tmp_path / "series" / "pipe.dcm")
    (series,) = find_series(tmp_path / "series").series
    assert "no regular file" in series.broken[0]
    (tmp_path / "series" / "pipe.dcm").unlink()
    paths[2].rename(tmp_path / "outside.dcm")
    paths[2].symlink_to(tmp_path / "outside.dcm")
    assert "leads out of the data folder" in refused(tmp_path / "series")


def test_reports_in_the_folder_are_no_slices(tmp_path):
    paths = write_series(tmp_path)
    report = reread(paths[0])
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.11")
    del report.PixelData
    save(report, tmp_path / "report.dcm")
    found = find_series(tmp_path)
    assert found.num_other == 1
    assert describe(found.series[0]).geometry.shape_irc == SHAPE


@pytest.mark.timeout(1800)
def test_random_damage_is_a_named_error_or_harmless(tmp_path_factory, figure):
    folder = tmp_path_factory.mktemp("damage")
    paths = write_series(folder, values=stored_values()[:3])
    expected = only(folder)
    good, start = paths[1].read_bytes(), expected.slices[1].pixels.start

    @settings(max_examples=figure(80, 5000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def damage(data):
        content = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
        paths[1].write_bytes(content[: data.draw(st.sampled_from([None, None, 200, 400, 800, start]))])
        try:
            for series in find_series(folder).series:
                scan = describe(series)
                assert len(voxels(scan)) == scan.geometry.shape_irc[0]
                np.testing.assert_allclose(scan.geometry.spacing[2], expected.geometry.spacing[2], atol=1e-6)
        except ScanError:
            pass

    damage()


# the real data


@pytest.mark.shared_data
@pytest.mark.parametrize("place", ["dicom/lidc", "dicom/lung-pet-ct-dx"])
def test_real_series_as_simpleitk_reads_them(shared_data, place):
    found = find_series(shared_data / place)
    assert len(found.series) == 2
    for series in found.series:
        scan, image = describe(series), itk_image(series.folder, series.series_uid)
        assert_same_grid(scan, image)
        np.testing.assert_array_equal(voxels(scan, 32), SimpleITK.GetArrayViewFromImage(image))


@pytest.mark.shared_data
def test_lidc_slabs_are_voxel_for_voxel_those_of_luna16(shared_data):
    for series in find_series(shared_data / "dicom" / "lidc").series:
        (path,) = (shared_data / "real_ct").glob(f"*/{series.series_uid}.mhd")
        image = SimpleITK.ReadImage(str(path))
        scan = describe(series)
        assert_same_grid(scan, image)
        np.testing.assert_array_equal(voxels(scan, 32), SimpleITK.GetArrayViewFromImage(image))


def test_normal_is_the_way_of_the_stack():
    np.testing.assert_allclose(normal_of(AXIAL), [0, 0, 1])
