"""DICOM folders as sources: which scans, which rows, what is said of the rest."""

import pytest

from lunaprep.errors import TableError, UsageError
from lunaprep.sources.dicom_folders import (
    check_labels,
    find_scans,
    fold_of,
    read_dicom,
    read_lidc,
    read_lung_pet_ct_dx,
)

from .dicom_files import GAP, ORIGIN, SERIES_UID, SHAPE, SPACING, reread, save, stored_values, write_series

PET_UID = "1.2.826.0.1.3680043.10.1.9"


@pytest.fixture
def folder(tmp_path):
    """A CT series of eight slices of 40 x 40 and, beside it, PET."""

    def pet(ds, number):
        ds.Modality = "PT"

    values = stored_values(shape=(8, 40, 40))
    write_series(tmp_path / "ct", values=values)
    write_series(tmp_path / "pt", values=values, series_uid=PET_UID, edit=pet)
    return tmp_path


def xyz(index: float, row: float, column: float) -> list[float]:
    return [ORIGIN[0] + column * SPACING[1], ORIGIN[1] + row * SPACING[0], ORIGIN[2] + index * GAP]


def box_file(folder, number: int, x, y, name="A"):
    corners = f"<xmin>{x[0]}</xmin><ymin>{y[0]}</ymin><xmax>{x[1]}</xmax><ymax>{y[1]}</ymax>"
    text = f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"
    (folder / f"{SERIES_UID}.{number + 1}.xml").write_text(text)


def test_series_that_are_no_ct_are_left_out_with_a_line(folder):
    found = find_scans(folder)
    assert [item.series_uid for item in found.found] == [SERIES_UID]
    assert found.left_out == (f"series …{PET_UID[-12:]}: PT, 8 images",)
    assert found.scans[SERIES_UID].patient_id == "P-1"


def test_a_bad_series_has_its_reason(folder):
    (folder / "ct" / "003.dcm").unlink()
    (item,) = find_scans(folder).found
    assert item.scan is None
    assert "1 missing there" in item.reason


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        find_scans(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no CT series"):
        find_scans(tmp_path)


def test_patients_keep_their_fold_and_fill_all_ten():
    folds = [fold_of(f"LIDC-IDRI-{k:04d}") for k in range(1, 1011)]
    assert min(folds.count(k) for k in range(10)) > 70


def test_a_plain_folder_with_tables(folder):
    place = ",".join(map(str, xyz(4, 20, 20)))
    (folder / "a.csv").write_text(f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{SERIES_UID},{place},6\n")
    (folder / "c.csv").write_text(f"seriesuid,coordX,coordY,coordZ,class\n{SERIES_UID},{place},1\nx,1,2,3,2\n")
    data = read_dicom(folder, folder / "c.csv", folder / "a.csv")
    assert (len(data.candidates), len(data.annotations), len(data.faults)) == (1, 1, 1)
    assert data.patients == {SERIES_UID: "P-1"}
    assert len(read_dicom(folder).candidates) == 0


def test_lesions_become_rows_with_their_subtype(folder):
    for number in (3, 4, 5):
        box_file(folder, number, (4, 12), (10, 20), "G")
    (folder / "junk.xml").write_text("<a")
    data = read_lung_pet_ct_dx(folder)
    assert data.annotations["subtype"].tolist() == ["G"]
    assert data.annotations[["x_mm", "y_mm", "z_mm"]].to_numpy()[0].tolist() == pytest.approx(xyz(4, 15, 8))
    assert data.annotations["diameter_mm"].tolist() == [11 * SPACING[0]]
    assert data.candidates["is_nodule"].tolist() == [True, False]
    assert data.candidates[["x_mm", "y_mm", "z_mm"]].to_numpy()[1].tolist() == pytest.approx(xyz(4, 15, 31))
    assert [fault.file for fault in data.faults] == ["junk.xml"]


def test_a_mirror_image_inside_a_lesion_is_no_negative(folder):
    box_file(folder, 3, (15, 25), (10, 20))
    with pytest.raises(
        UsageError, match="all candidates are 'nodule': such runs reach 100 % accuracy and mean nothing"
    ):
        read_lung_pet_ct_dx(folder)
    box_file(folder, 6, (2, 8), (10, 20))
    assert read_lung_pet_ct_dx(folder).candidates["is_nodule"].tolist() == [True, True, False]


def test_one_subtype_alone_is_noted_and_two_are_not(folder):
    box_file(folder, 3, (2, 8), (10, 20), "A")
    (note, *others) = read_lung_pet_ct_dx(folder).notes[::-1]
    assert note == "all subtypes are 'A': training on them would mean nothing"
    assert others == [f"left out series …{PET_UID[-12:]}: PT, 8 images"]
    box_file(folder, 6, (2, 8), (10, 20), "G")
    assert len(read_lung_pet_ct_dx(folder).notes) == 1


def test_boxes_of_another_data_set(folder):
    (folder / "9.9.9.xml").write_text("<annotation/>")
    with pytest.raises(TableError, match="none of 1 box files matches a slice"):
        read_lung_pet_ct_dx(folder)
    (folder / "9.9.9.xml").unlink()
    with pytest.raises(TableError, match="holds no box file"):
        read_lung_pet_ct_dx(folder)


def test_labels_that_are_all_the_same():
    check_labels("AG", "subtypes")
    with pytest.raises(UsageError, match="all subtypes are 'A': such runs reach 100 % accuracy and mean nothing"):
        check_labels("AA", "subtypes")
    with pytest.raises(UsageError, match="there are no subtypes"):
        check_labels([], "subtypes")


def test_two_studies_of_one_patient_share_a_fold(folder):
    def later(ds, number):
        ds.StudyInstanceUID = "1.2.826.0.1.3680043.10.2"

    write_series(folder / "later", series_uid=f"{SERIES_UID}7", edit=later)
    one, other = find_scans(folder).found
    assert one.subset == other.subset == fold_of("P-1")
    ds = reread(folder / "later" / "000.dcm")
    ds.StudyInstanceUID = "1.2.3"
    save(ds, folder / "later" / "000.dcm")
    assert "StudyInstanceUID is" in str(find_scans(folder).found[1].reason)
    assert SHAPE[0] == 6


def test_copies_of_a_reading_and_readings_of_xrays_are_no_faults(folder):
    def reading(malignancy, header=""):
        sides = ((10, 10), (20, 10), (20, 20), (10, 20), (10, 10))
        edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in sides)
        outline = f"<roi><imageZposition>{ORIGIN[2] + GAP}</imageZposition>{edges}</roi>"
        traits = f"<characteristics><malignancy>{malignancy}</malignancy></characteristics>"
        session = f"<readingSession><unblindedReadNodule>{traits}{outline}</unblindedReadNodule></readingSession>"
        uid = f"<ResponseHeader>{header}<SeriesInstanceUid>{SERIES_UID}</SeriesInstanceUid></ResponseHeader>"
        return f'<LidcReadMessage xmlns="http://www.nih.gov">{uid}{3 * session}</LidcReadMessage>'

    (folder / "1.xml").write_text(reading(4))
    (folder / "2.xml").write_text(reading(4, "<Message>again</Message>").replace("><", ">\n<"))
    (folder / "x.xml").write_text('<?xml version="1.0"?><IdriReadMessage xmlns="http://www.nih.gov/idri"/>')
    data = read_lidc(folder)
    assert not data.faults
    assert len(data.annotations) == 1
    assert list(data.masks) == [0]
    (folder / "3.xml").write_text(reading(5))
    (fault,) = read_lidc(folder).faults
    assert "another reading" in str(fault)
    assert "1.xml, which is taken" in str(fault)


@pytest.mark.shared_data
def test_real_lidc(shared_data):
    data = read_lidc(shared_data / "dicom" / "lidc")
    assert len(data.scans) == 2
    assert data.annotations["diameter_mm"].round(2).tolist() == [23.11]
    assert data.malignancy["is_malignant"].tolist() == [True]
    assert data.malignancy["malignancy_votes"].tolist() == ["4,5,5,5"]
    assert data.candidates["is_nodule"].sum() == 1
    assert (~data.candidates["is_nodule"]).sum() > 10
    assert sorted(data.patients.values()) == ["LIDC-IDRI-0001", "LIDC-IDRI-0002"]
    assert data.excluded["diameter_mm"].isna().sum() == 73
    assert data.excluded["diameter_mm"].dropna().round(2).tolist() == [23.32]
    assert not data.faults


@pytest.mark.shared_data
def test_real_lung_pet_ct_dx(shared_data):
    data = read_lung_pet_ct_dx(shared_data / "dicom" / "lung-pet-ct-dx")
    assert data.annotations["subtype"].tolist() == ["A", "A"]
    assert data.candidates["is_nodule"].tolist() == [True, False, True, False]
    assert not data.faults
    (files,) = data.files
    folder = shared_data / "dicom" / "lung-pet-ct-dx" / "Annotation" / "A0001"
    assert (files.role, files.bytes) == ("boxes", sum(path.stat().st_size for path in folder.iterdir()))
