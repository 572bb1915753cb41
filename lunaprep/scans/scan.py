"""One scan whose header has been checked; its voxels have not been read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lunaprep.geometry import Geometry


@dataclass(frozen=True)
class Scan:
    """A scan on disk: identity, grid, and where and how its voxels are stored.

    Parameters
    ----------
    series_uid : str
        Series the scan belongs to; the file's name without its suffix.
    path : Path
        The header file (.mhd), or the one file that holds everything (.mha, .nii.gz).
    geometry : Geometry
        Grid, exactly as SimpleITK would give it.
    dtype : numpy.dtype
        Element type of the voxels as they are delivered, HU.
    data_path : Path
        File that holds the voxels; `path` itself for .mha and .nii.gz.
    data_bytes : int
        Size of that file.
    header_xxh3 : str
        XXH3-128 of the header's bytes, hexadecimal.
    reader : {"map", "simpleitk", "dicom"}
        ``map``: the file is exactly the voxels in C order and is memory-mapped.
        ``simpleitk``: SimpleITK decodes it as a whole.
        ``dicom``: a file a slice; `lunaprep.scans.dicom.DicomScan` names them, `data_path` is the first.
    """

    series_uid: str
    path: Path
    geometry: Geometry
    dtype: "np.dtype[np.generic]"
    data_path: Path
    data_bytes: int
    header_xxh3: str
    reader: Literal["map", "simpleitk", "dicom"]

    @property
    def data_paths(self) -> tuple[Path, ...]:
        """Files that hold the voxels, in the order in which they are read and hashed."""
        return (self.data_path,)
