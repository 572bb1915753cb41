"""The one place that calls SimpleITK: behind the gate, and held to what the gate has seen."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lunaprep.errors import PassingScanError, ScanError
from lunaprep.geometry import Geometry
from lunaprep.scans import gate, metaimage, nifti
from lunaprep.scans.gate import Layout, fault, shown
from lunaprep.scans.scan import Scan


def nifti_grid(path: Path) -> tuple[Geometry, "np.dtype[np.generic]"]:
    """Geometry (LPS) and delivered element type of a .nii.gz whose header has passed the gate."""
    reader = _reader(path, "NiftiImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _refused(path, error) from None
    return _grid(reader), _dtype(path, reader)


def open_nifti(path: Path, root: Path, series_uid: str) -> Scan:
    """Check the header of a .nii.gz inside `root`; its stream is checked when it is read."""
    place = gate.located(path, root, path)
    header = nifti.read_header(place, path)
    size = gate.plain_size(place, path)
    gate.check_stored(path, header.layout, size)
    geometry, dtype = nifti_grid(path)
    if geometry.shape_irc != header.shape_irc:
        raise fault(path, f"SimpleITK sees {geometry.shape_irc} voxels, the header says {header.shape_irc}")
    return Scan(
        series_uid=series_uid,
        path=path,
        geometry=gate.checked_grid(path, geometry),
        dtype=dtype,
        data_path=place,
        data_bytes=size,
        header_xxh3=header.xxh3,
        reader="simpleitk",
    )


def decode(scan: Scan, hasher: xxhash.xxh3_128 | None) -> tuple[Any, npt.NDArray[Any]]:
    """Voxels of a whole scan, decoded by SimpleITK and equal to what the gate has seen.

    Parameters
    ----------
    scan : Scan
        Scan with ``reader == "simpleitk"``.
    hasher : xxhash.xxh3_128, optional
        Gets all bytes of the data file.

    Returns
    -------
    image : SimpleITK.Image
        Owner of the voxels: reading them once it is gone kills the process.
    voxels : ndarray
        Read-only view (slices, rows, columns).
    """
    place = gate.landed(scan.path)
    if scan.path.name.endswith(".nii.gz"):
        packed = nifti.read_header(place, scan.path)
        _same_header(scan, packed.xxh3)
        digest = gate.check_stream(scan.path, scan.data_path, packed.layout, hasher)
        image = _execute(scan.path, scan.path, "NiftiImageIO")
        return image, _checked(scan, packed.layout, image, digest)
    header = metaimage.read_header(place, scan.path)
    _same_header(scan, header.xxh3)
    digest = gate.check_stream(scan.path, scan.data_path, header.layout, hasher)
    image = _read_meta(scan, header)
    return image, _checked(scan, header.layout, image, digest)


def _read_meta(scan: Scan, header: metaimage.MetaHeader) -> Any:
    """Image of a MetaImage file; SimpleITK sees a header of ours, never the file's own."""
    stored = scan.data_bytes - header.layout.offset
    try:
        with tempfile.TemporaryDirectory(prefix="lunaprep-") as folder:
            (Path(folder) / "scan.raw").symlink_to(scan.data_path.absolute())
            ours = Path(folder) / "scan.mhd"
            ours.write_text(metaimage.canonical_text(header, stored, "scan.raw"), encoding="ascii")
            return _execute(scan.path, ours, "MetaImageIO")
    except OSError as error:
        raise gate.refused(scan.path, "no temporary folder (TMPDIR) to decode it", error) from None


def _same_header(scan: Scan, xxh3: str) -> None:
    """Refuse a header that was changed after `scan` was made from it."""
    if xxh3 != scan.header_xxh3:
        raise fault(scan.path, "the header has changed since it was checked; run the command again")


def _simpleitk() -> Any:
    """SimpleITK, which takes a quarter of a second to import."""
    import SimpleITK

    return SimpleITK


def _reader(file: Path, image_io: str) -> Any:
    """SimpleITK reader for one file format, whatever the file is called."""
    sitk = _simpleitk()
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(file))
    return reader


def _execute(path: Path, file: Path, image_io: str) -> Any:
    """Image in `file`, which has passed the gate."""
    try:
        return _reader(file, image_io).Execute()
    except RuntimeError as error:
        raise _refused(path, error) from None


def _refused(path: Path, error: RuntimeError) -> ScanError:
    """Error of ours for one of SimpleITK's, which run over many lines."""
    if "allocate memory" in str(error):
        return PassingScanError(f"{path.name}: not enough memory to decode it")
    last = str(error).strip().rpartition("ITK ERROR: ")[2]
    return fault(path, f"SimpleITK cannot read it: {shown(last, 100)}")


def _grid(image: Any) -> Geometry:
    """Geometry of an image, or of a reader that has read the information."""
    ox, oy, oz = (float(v) for v in image.GetOrigin())
    sx, sy, sz = (float(v) for v in image.GetSpacing())
    columns, rows, slices = (int(v) for v in image.GetSize())
    direction = tuple(float(v) for v in image.GetDirection())
    return Geometry((ox, oy, oz), (sx, sy, sz), direction, (slices, rows, columns))


def _dtype(path: Path, image: Any) -> "np.dtype[np.generic]":
    """Element type of a scalar image, or of a reader that has read the information."""
    sitk = _simpleitk()
    types = {
        sitk.sitkInt8: np.int8,
        sitk.sitkUInt8: np.uint8,
        sitk.sitkInt16: np.int16,
        sitk.sitkUInt16: np.uint16,
        sitk.sitkInt32: np.int32,
        sitk.sitkUInt32: np.uint32,
        sitk.sitkInt64: np.int64,
        sitk.sitkUInt64: np.uint64,
        sitk.sitkFloat32: np.float32,
        sitk.sitkFloat64: np.float64,
    }
    found = types.get(image.GetPixelIDValue())
    if found is None:
        raise fault(path, f"SimpleITK sees {image.GetPixelIDTypeAsString()}, expected one number a voxel")
    return np.dtype(found)


def _checked(scan: Scan, layout: Layout, image: Any, digest: bytes) -> npt.NDArray[Any]:
    """View of the image's voxels, refused unless type, grid and bytes are those the gate has seen."""
    if image.GetDimension() != 3 or _grid(image) != scan.geometry:
        raise fault(scan.path, "SimpleITK sees another grid than the header describes; please report it")
    dtype = _dtype(scan.path, image)
    if dtype != scan.dtype:
        raise fault(scan.path, f"SimpleITK sees {dtype}, expected {scan.dtype}; please report it")
    voxels: npt.NDArray[Any] = _simpleitk().GetArrayViewFromImage(image)
    if not layout.is_scaled:
        stored = voxels.astype(layout.dtype, copy=False)
        if xxhash.xxh3_128_digest(stored.data.cast("B")) != digest:
            raise fault(scan.path, "the file changed while it was read; run the command again")
    return voxels
