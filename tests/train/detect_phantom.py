"""Networks that need no training, and scans that are none, for the tests of the detector."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from lunaprep.geometry import Geometry
from lunaprep.sources.phantom import header_text
from lunatrain.crop_kind import CropKind
from lunatrain.detect.classifying import Classifier

CROP = (16, 24, 24)


class Blobs(nn.Module):
    """Segmentation by hand: brighter than its surroundings. Looks, and must be fed, as a U-Net."""

    in_channels, reach, multiple = 7, 6, 4

    def __init__(self, above_hu: float = 250.0) -> None:
        super().__init__()
        self.above_hu = nn.Parameter(torch.tensor(above_hu))

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """HU, (n, 7, rows, columns), to logits."""
        middle = slices[:, 2:5].clamp(-1000, 200).mean(dim=1, keepdim=True)
        means = [
            nn.functional.avg_pool2d(nn.functional.pad(middle, (n // 2,) * 4, mode="replicate"), n, 1) for n in (3, 11)
        ]
        return (means[0] - means[1] - self.above_hu) / 30


class Bright(nn.Module):
    """Classifier by hand: how bright the middle of a crop is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """HU, (n, 1, slices, rows, columns), to logits of two classes."""
        i, r, c = (side // 2 for side in crops.shape[2:])
        middle = crops[:, 0, i - 1 : i + 2, r - 1 : r + 2, c - 1 : c + 2].mean(dim=(1, 2, 3))
        logit = (middle + 300) / self.scale
        return torch.stack([-logit / 2, logit / 2], dim=1)


def bright(target: str = "is_nodule") -> Classifier:
    """`Bright` as the detector takes it."""
    return Classifier(Bright().eval(), CropKind(CROP), Path("bright"), target)


def write_scan(folder: Path, name: str, voxels: np.ndarray, spacing: float = 2.0) -> Path:
    """A .mhd and its .raw of any values, int16, uint8 or float32."""
    folder.mkdir(parents=True, exist_ok=True)
    geometry = Geometry((0.0, 0.0, 0.0), (spacing,) * 3, (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), voxels.shape)
    kinds = {"int16": "MET_SHORT", "uint8": "MET_UCHAR", "uint16": "MET_USHORT", "float32": "MET_FLOAT"}
    text = header_text(geometry, f"{name}.raw").replace("MET_SHORT", kinds[str(voxels.dtype)])
    (folder / f"{name}.raw").write_bytes(voxels.tobytes())
    (folder / f"{name}.mhd").write_text(text)
    return folder / f"{name}.mhd"


def belly(shape: tuple[int, int, int] = (24, 64, 64)) -> np.ndarray:
    """A body without lungs: tissue in air, and a bubble of gas."""
    i, r, c = np.indices(shape)
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[((r - 32) / 26) ** 2 + ((c - 32) / 29) ** 2 < 1] = 40
    hu[((i - 12) / 5) ** 2 + ((r - 20) / 5) ** 2 + ((c - 30) / 6) ** 2 < 1] = -1000
    return hu
