"""Where voxels lie in the patient: array index (slice, row, column) <-> world millimetres (LPS).

Origin, spacing and direction are kept exactly as SimpleITK gives them: *x, y, z* order, the origin at the
centre of voxel (0, 0, 0), the columns of `direction` being the index axes. Array indices are *irc*
(slice, row, column), the order of ``SimpleITK.GetArrayFromImage``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Geometry:
    """Grid of one scan, without its voxels.

    Parameters
    ----------
    origin : tuple of 3 float
        World position of the centre of voxel (0, 0, 0), mm, LPS, x y z.
    spacing : tuple of 3 float
        Millimetres per step along the index axes column, row, slice (ITK's order).
    direction : tuple of 9 float
        3x3 matrix, row by row; its columns are the unit vectors of the index axes in world space.
    shape_irc : tuple of 3 int
        Number of slices, rows and columns.
    """

    origin: tuple[float, float, float]
    spacing: tuple[float, float, float]
    direction: tuple[float, ...]
    shape_irc: tuple[int, int, int]

    @property
    def direction_matrix(self) -> FloatArray:
        """`direction` as a (3, 3) float64 array."""
        return np.array(self.direction, dtype=np.float64).reshape(3, 3)

    @property
    def spacing_irc(self) -> tuple[float, float, float]:
        """Millimetres per step along slice, row, column."""
        return self.spacing[2], self.spacing[1], self.spacing[0]

    @property
    def is_flipped(self) -> bool:
        """Whether any index axis runs against the world axis it lies along (as in LUNA16's flipped scans)."""
        return bool((np.diag(self.direction_matrix) < 0).any())

    def xyz_to_irc(self, xyz: npt.ArrayLike) -> FloatArray:
        """Continuous array index (slice, row, column) of world points.

        Parameters
        ----------
        xyz : array_like, (..., 3)
            World points, mm, LPS.

        Returns
        -------
        ndarray, (..., 3) float64
            ``inverse(direction) @ (xyz - origin) / spacing``, with the axes in array order.

        Examples
        --------
        >>> g = Geometry((-10.0, 0.0, 5.0), (0.5, 0.5, 2.0), IDENTITY, (4, 8, 8))
        >>> g.xyz_to_irc([-9.0, 1.0, 7.0]).tolist()
        [1.0, 2.0, 2.0]
        """
        offset = np.asarray(xyz, dtype=np.float64) - np.array(self.origin)
        inverse: Any = np.linalg.inv(self.direction_matrix)
        return np.asarray((offset @ inverse.T) / np.array(self.spacing))[..., ::-1]

    def irc_to_xyz(self, irc: npt.ArrayLike) -> FloatArray:
        """World points (mm, LPS, x y z) of array indices (slice, row, column), (..., 3) float64.

        Examples
        --------
        >>> g = Geometry((-10.0, 0.0, 5.0), (0.5, 0.5, 2.0), IDENTITY, (4, 8, 8))
        >>> g.irc_to_xyz([1, 2, 2]).tolist()
        [-9.0, 1.0, 7.0]
        """
        steps = np.asarray(irc, dtype=np.float64)[..., ::-1] * np.array(self.spacing)
        return np.asarray(steps @ self.direction_matrix.T + np.array(self.origin))

    def nearest_irc(self, xyz: npt.ArrayLike) -> IntArray:
        """Array index of the voxel nearest to each world point, (..., 3) int64; halves round to even.

        Points too far off for int64 come back clipped, which is outside any scan.
        """
        return np.rint(np.clip(self.xyz_to_irc(xyz), -(2.0**40), 2.0**40)).astype(np.int64)

    def contains_irc(self, irc: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each array index (slice, row, column), (..., 3), names a voxel of this grid."""
        index = np.asarray(irc)
        return np.asarray(((index >= 0) & (index < np.array(self.shape_irc))).all(axis=-1))
