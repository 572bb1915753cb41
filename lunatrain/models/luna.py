"""The classifier of "Deep Learning with PyTorch" (Stevens, Antiga, Viehmann 2020), chapter 11, and its weights.

Names and shapes of the parameters are the book's, so that its state files load as they are.
"""

import math

import torch
from torch import nn
from torch.func import functional_call

from lunatrain.errors import UsageError

CHANNELS = (8, 16, 32, 64)
SMALLEST_SIDE = 2 ** len(CHANNELS)
CACHE_CROPS = 4
"""Crops whose largest features, 2.4 MB each, a processor's cache and the allocator keep at hand."""


class LunaBlock(nn.Module):
    """Two convolutions 3×3×3 with ReLU, then the largest of each 2×2×2: half the sides, `out_channels` channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, I, R, C) to (N, out_channels, I // 2, R // 2, C // 2)."""
        return self.after_conv1(self.conv1(features))

    def after_conv1(self, features: torch.Tensor) -> torch.Tensor:
        """(N, out_channels, I, R, C), which are overwritten, to the block's result."""
        features = features.relu_()
        return nn.functional.max_pool3d(self.conv2(features), 2).relu_()  # as before the pool, on an eighth of it


class LunaModel(nn.Module):
    """The book's classifier: batch norm of the HU, four blocks of 8, 16, 32 and 64 channels, one linear layer.

    Parameters
    ----------
    num_classes : int
        Number of logits.
    crop_shape : tuple of int
        Slices, rows, columns of a crop, each 16 or more.

    Raises
    ------
    UsageError
        A crop too small to be halved four times.

    Notes
    -----
    222,220 parameters for two classes and crops of 32×48×48. The book returns logits and probabilities; this one
    returns logits.
    """

    def __init__(self, num_classes: int = 2, crop_shape: tuple[int, int, int] = (32, 48, 48)) -> None:
        super().__init__()
        if min(crop_shape) < SMALLEST_SIDE:
            shape = "×".join(map(str, crop_shape))
            message = f"luna halves a crop four times, so each side must be {SMALLEST_SIDE} or more, got {shape}"
            raise UsageError(message)
        self.tail_batchnorm = nn.BatchNorm3d(1)
        self.block1 = LunaBlock(1, CHANNELS[0])
        self.block2 = LunaBlock(CHANNELS[0], CHANNELS[1])
        self.block3 = LunaBlock(CHANNELS[1], CHANNELS[2])
        self.block4 = LunaBlock(CHANNELS[2], CHANNELS[3])
        places = math.prod(side // SMALLEST_SIDE for side in crop_shape)
        self.head_linear = nn.Linear(CHANNELS[3] * places, num_classes)
        self._init_weights()

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """HU, (N, 1, I, R, C), to logits, (N, num_classes)."""
        norm = self.tail_batchnorm
        without = {"weight": torch.ones_like(norm.weight), "bias": torch.zeros_like(norm.bias)}
        features = functional_call(norm, without, crops)
        parts = features.split(_part_sizes(len(crops))) if crops.device.type == "cpu" else (features,)
        features = torch.cat([self.block2(self.block1.after_conv1(self._first_conv(part))) for part in parts])
        features = self.block4(self.block3(features))
        logits: torch.Tensor = self.head_linear(features.flatten(1))
        return logits

    def _first_conv(self, normed: torch.Tensor) -> torch.Tensor:
        """Batch norm's factor and summand and the first convolution, as one: its weights take them in.

        The summand is that of a second channel, of ones, as no border has it. So no gradient is needed of the voxels,
        for which one-channel convolutions are slow: 7 % of a training step.
        """
        conv, norm = self.block1.conv1, self.tail_batchnorm
        weight = torch.cat([conv.weight * norm.weight, conv.weight * norm.bias], dim=1)
        plane = normed[:, 0]
        both = torch.stack([plane, torch.ones_like(plane)], dim=-1).movedim(-1, 1)
        return nn.functional.conv3d(both, weight, conv.bias, padding=1)

    def stages(self) -> list[list[nn.Module]]:
        """Parts from the input to the logits."""
        return [[self.tail_batchnorm], [self.block1], [self.block2], [self.block3], [self.block4], [self.head_linear]]

    def _init_weights(self) -> None:
        """Draw weights as the book does, with its slip in the biases.

        A bias is normal with mean -1 / sqrt(fan_out) and that deviation, where a uniform one was likely meant: most
        biases start negative. Kept, so that the preset trains from the book's start.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                bound = 1 / math.sqrt(layer.weight.shape[0] * layer.weight[0, 0].numel())
                if layer.bias is not None:
                    nn.init.normal_(layer.bias, mean=-bound, std=bound)


def _part_sizes(count: int) -> list[int]:
    """Sizes of the parts a batch is cut to, all `CACHE_CROPS` or a few more: a part of one crop would be slow."""
    number = max(1, count // CACHE_CROPS)
    return [(count + k) // number for k in range(number)]
