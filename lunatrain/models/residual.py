"""A small 3-D residual network: the default classifier.

Blocks as in He et al., "Deep residual learning" (2015), with the shortcut's average before its 1×1×1 convolution (He,
T. et al., "Bag of tricks", 2018). The first convolution halves the crop at once, so that no layer works at full size:
on a CPU that is where the book's model spends its time.
"""

import torch
from torch import nn

from lunatrain.errors import UsageError

CHANNELS = (16, 32, 64, 128)
SMALLEST_SIDE = 2 ** len(CHANNELS)
HU_SCALE = 1000.0
"""HU that become 1; the store's window, ±1000 HU, becomes ±1."""
DROPOUT = 0.2


class ResidualBlock(nn.Module):
    """Two convolutions 3×3×3 with batch norm, added to a shortcut.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before and after.
    stride : int
        1, or 2 to halve each side.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(out_channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.AvgPool3d(stride, ceil_mode=True, count_include_pad=False))
        if in_channels != out_channels:
            self.shortcut.append(nn.Conv3d(in_channels, out_channels, 1, bias=False))
            self.shortcut.append(nn.BatchNorm3d(out_channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, I, R, C) to (N, out_channels, I / stride, R / stride, C / stride), sides rounded up."""
        changed = self.norm1(self.conv1(features)).relu_()
        changed = self.norm2(self.conv2(changed))
        shortcut: torch.Tensor = self.shortcut(features)
        summed: torch.Tensor = changed.add_(shortcut)
        return summed.relu_()


class ResidualModel(nn.Module):
    """Strided convolution, four residual blocks of 16, 32, 64 and 128 channels, a linear layer over mean and maximum.

    Parameters
    ----------
    num_classes : int
        Number of logits.
    crop_shape : tuple of int
        Slices, rows, columns of a crop, each 16 or more.
    """

    def __init__(self, num_classes: int = 2, crop_shape: tuple[int, int, int] = (32, 48, 48)) -> None:
        super().__init__()
        if min(crop_shape) < SMALLEST_SIDE:
            shape = "×".join(map(str, crop_shape))
            message = f"residual halves a crop four times, so each side must be {SMALLEST_SIDE} or more, got {shape}"
            raise UsageError(message)
        self.stem = nn.Conv3d(1, CHANNELS[0], 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm3d(CHANNELS[0])
        pairs = zip((CHANNELS[0], *CHANNELS[:-1]), CHANNELS, strict=True)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, stride=2 if i else 1) for i, (a, b) in enumerate(pairs)))
        self.dropout = nn.Dropout(DROPOUT)
        self.head_linear = nn.Linear(2 * CHANNELS[-1], num_classes)
        self._init_weights()

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """HU, (N, 1, I, R, C), to logits, (N, num_classes)."""
        features = self.stem_norm(self.stem(crops / HU_SCALE)).relu_()
        features = self.blocks(features)
        pooled = torch.cat([features.mean(dim=(2, 3, 4)), features.amax(dim=(2, 3, 4))], dim=1)
        logits: torch.Tensor = self.head_linear(self.dropout(pooled))
        return logits

    def _init_weights(self) -> None:
        """Draw convolutions normal for ReLU (He 2015); each block starts as its shortcut."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, ResidualBlock):
                nn.init.zeros_(layer.norm2.weight)
