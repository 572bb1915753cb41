"""A data set as LUNA16's whose lesions are of three kinds that can be seen: small, large, hollow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

SHAPE_IRC = (24, 40, 40)
SPACING_XYZ = (1.0, 1.0, 1.25)
KINDS = {"A": (3.0, 0.0), "B": (6.5, 0.0), "G": (6.5, 4.0)}
"""Of each kind the radius, and that of its hole, mm."""
HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = {spacing}
DimSize = {size}
ElementType = MET_SHORT
ElementDataFile = {uid}.raw
"""


def write_scans(root: Path, kinds: str, told: Sequence[str] | None = None, seed: int = 0) -> Path:
    """Write a scan with one lesion of each kind given, a place without one in each, and what they are `told` to be."""
    random = np.random.default_rng(seed)
    (root / "subset0").mkdir(parents=True)
    lesions, places = [], []
    for number, (kind, name) in enumerate(zip(kinds, told or kinds, strict=True)):
        uid = f"1.2.840.{number + 1}"
        hu = random.normal(-800, 60, SHAPE_IRC)
        center_irc = np.array([12, 20, 20]) + random.integers(-2, 3, 3)
        steps = np.moveaxis(np.indices(SHAPE_IRC), 0, -1) - center_irc
        distance = np.linalg.norm(steps * SPACING_XYZ[::-1], axis=-1)
        radius, hole = KINDS[kind]
        hu[(distance <= radius) & (distance >= hole)] += 850
        write_scan(root / "subset0", uid, hu)
        xyz = center_irc[::-1] * SPACING_XYZ
        lesions.append((uid, *xyz, 2 * radius, name))
        places += [(uid, *xyz, 1), (uid, xyz[0] + 9, xyz[1] - 9, xyz[2], 0)]
    xyz = ["coordX", "coordY", "coordZ"]
    columns = ["seriesuid", *xyz, "diameter_mm", "subtype"]
    pd.DataFrame(lesions, columns=columns).to_csv(root / "annotations.csv", index=False)
    pd.DataFrame(places, columns=["seriesuid", *xyz, "class"]).to_csv(root / "candidates.csv", index=False)
    return root


def write_scan(folder: Path, uid: str, hu: np.ndarray) -> None:
    size = " ".join(map(str, SHAPE_IRC[::-1]))
    (folder / f"{uid}.mhd").write_text(HEADER.format(spacing=" ".join(map(str, SPACING_XYZ)), size=size, uid=uid))
    (folder / f"{uid}.raw").write_bytes(hu.clip(-1000, 1000).astype("<i2").tobytes())


def build_store(root: Path, val_stride: int = 3) -> Path:
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    parameters = Parameters(crop_shape=(16, 24, 24), val_stride=val_stride)
    out = root / "store"
    build(BuildOptions(root, out, workers=1, volumes=False), parameters)
    return out
