"""Small residual networks that look at a candidate three times, near, wider and whole: the default classifier.

What is asked about a crop is what lies at its centre: a nodule is 3 to 30 mm wide, a crop some 35 mm or more. So the
centre is seen voxel by voxel, twice as much at half and all of it at a quarter of the resolution, each view by a
network of its own; Dou et al., "Multilevel contextual 3-D CNNs for false positive reduction" (2017), look at LUNA16 so.
A view has 1/64 of a crop's voxels, so a step takes a small part of the book's model's time. Blocks as in He et al.,
"Deep residual learning" (2015), with an average in the shortcut ("Bag of tricks", 2018).
"""

import math

import torch
from torch import nn
from torch.nn.functional import avg_pool3d

from lunatrain.errors import UsageError

VIEWS = (1, 2, 4)
"""Voxels of a crop along a voxel of each view: all views have as many voxels, the last one covers the crop."""
HALVINGS = 2
SMALLEST_SIDE = VIEWS[-1] * 2**HALVINGS
WIDTH = 16
DROPOUT = 0.2
HU_SCALE = 1000.0
"""HU that become 1: the store's window, ±1000 HU, becomes ±1."""


class ResidualBlock(nn.Module):
    """Two convolutions 3×3×3 with batch norm, added to a shortcut; halves the sides, doubles the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(2 * channels)
        self.conv2 = nn.Conv3d(2 * channels, 2 * channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(2 * channels)
        self.shortcut = nn.Sequential(
            nn.AvgPool3d(2, ceil_mode=True, count_include_pad=False),
            nn.Conv3d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm3d(2 * channels),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, channels, I, R, C) to (N, 2 * channels, I / 2, R / 2, C / 2), sides rounded up."""
        changed = self.norm1(self.conv1(features)).relu_()
        changed = self.norm2(self.conv2(changed))
        shortcut: torch.Tensor = self.shortcut(features)
        summed: torch.Tensor = shortcut + changed
        return summed.relu_()


class ViewNetwork(nn.Sequential):
    """One view, (N, 1, i, r, c), to its features, (N, 4 * width, i / 4, r / 4, c / 4)."""

    def __init__(self, width: int) -> None:
        stem = nn.Conv3d(1, width, 3, padding=1, bias=False)
        blocks = (ResidualBlock(width * 2**number) for number in range(HALVINGS))
        super().__init__(stem, nn.BatchNorm3d(width), nn.ReLU(inplace=True), *blocks)


class ResidualModel(nn.Module):
    """Three views of a crop's centre, a residual network for each, one linear layer over all they find, where it lies.

    Parameters
    ----------
    num_classes : int
        Number of logits.
    crop_shape : tuple of int
        Slices, rows, columns of a crop, each 16 or more.
    width : int
        Channels of the first convolutions; the last ones have four times as many.

    Raises
    ------
    UsageError
        A crop too small for the views.

    Notes
    -----
    639,794 parameters for two classes and crops of 32×48×48.
    """

    def __init__(
        self, num_classes: int = 2, crop_shape: tuple[int, int, int] = (32, 48, 48), width: int = WIDTH
    ) -> None:
        super().__init__()
        if min(crop_shape) < SMALLEST_SIDE:
            shape = "×".join(map(str, crop_shape))
            message = f"residual views a crop's quarters, so each side must be {SMALLEST_SIDE} or more, got {shape}"
            raise UsageError(message)
        self.networks = nn.ModuleList(ViewNetwork(width) for _ in VIEWS)
        places = math.prod(math.ceil(side // VIEWS[-1] / 2**HALVINGS) for side in crop_shape)
        self.dropout = nn.Dropout(DROPOUT)
        self.head_linear = nn.Linear(len(VIEWS) * width * 2**HALVINGS * places, num_classes)
        self._init_weights()

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """HU, (N, 1, I, R, C), to logits, (N, num_classes)."""
        found = [
            network(_view(crops, step) / HU_SCALE).flatten(1)
            for network, step in zip(self.networks, VIEWS, strict=True)
        ]
        logits: torch.Tensor = self.head_linear(self.dropout(torch.cat(found, dim=1)))
        return logits

    def stages(self) -> list[list[nn.Module]]:
        """Parts from the input to the logits; all views' networks side by side."""
        stem_layers = 3
        stems = [layer for network in self.networks for layer in list(network.children())[:stem_layers]]
        blocks = [list(network.children())[stem_layers:] for network in self.networks]
        return [stems, *map(list, zip(*blocks, strict=True)), [self.head_linear]]

    def _init_weights(self) -> None:
        """Draw convolutions normal for ReLU (He 2015); each block starts as its shortcut."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, ResidualBlock):
                nn.init.zeros_(layer.norm2.weight)


def _view(crops: torch.Tensor, step: int) -> torch.Tensor:
    """Centre of crops, (N, 1, I // 4, R // 4, C // 4): each voxel the mean of `step` voxels along each axis."""
    for axis in (2, 3, 4):
        side = crops.shape[axis]
        covered = side // VIEWS[-1] * step
        crops = crops.narrow(axis, (side - covered) // 2, covered)
    return avg_pool3d(crops, step) if step > 1 else crops.contiguous()
