"""Small DICOM series, for tests to write and to spoil."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

SERIES_UID = "1.2.826.0.1.3680043.10.1.1"
STUDY_UID = "1.2.826.0.1.3680043.10.1"
SHAPE = (6, 10, 8)
SPACING = (0.75, 0.625)
"""Between rows, and between columns."""

GAP = 2.5
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ORIGIN = (-10.0, -20.5, 30.0)

Edit = Callable[[FileDataset, int], None]


def stored_values(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Stored values as of a CT: int16 whose HU, with intercept -1024, are -1024 to 975."""
    return np.random.default_rng(seed).integers(0, 2000, shape, dtype=np.int16)


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """Unit vector from slice to slice."""
    return np.cross(orientation[:3], orientation[3:])


def text(value: float) -> str:
    """Decimal string of DICOM: 16 characters at most."""
    return format(value, ".10g")[:16]


def slice_dataset(
    number: int,
    values: np.ndarray,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = ORIGIN,
    gap: float = GAP,
    series_uid: str = SERIES_UID,
) -> FileDataset:
    """One slice with what a CT slice has, and some personal data that must not go on."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"{series_uid}.{number + 1}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID = series_uid, STUDY_UID
    ds.PatientID, ds.PatientName, ds.PatientBirthDate = "P-1", "Secret^Name", "19500101"
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.InstanceNumber = number + 1
    place = np.array(origin) + number * gap * normal_of(orientation)
    ds.ImagePositionPatient = [text(v) for v in place]
    ds.ImageOrientationPatient = [text(v) for v in orientation]
    ds.PixelSpacing = [text(v) for v in SPACING]
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    ds.RescaleIntercept, ds.RescaleSlope = "-1024", "1"
    ds.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return ds


def save(ds: Dataset, path: Path) -> Path:
    """Write one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    values: np.ndarray | None = None,
    edit: Edit | None = None,
    order: Sequence[int] | None = None,
    **slice_options: object,
) -> list[Path]:
    """Write a series of slices; `edit` may spoil each, `order` gives the file names another order."""
    values = stored_values() if values is None else values
    order = range(len(values)) if order is None else order
    paths = []
    for name, number in enumerate(order):
        ds = slice_dataset(number, values[number], **slice_options)
        if edit:
            edit(ds, number)
        paths.append(save(ds, folder / f"{name:03d}.dcm"))
    return paths


def reread(path: Path) -> FileDataset:
    """A file as pydicom reads it."""
    return pydicom.dcmread(path)
