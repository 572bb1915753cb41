"""Two networks that give a box in a picture: a residual one, and one of large depthwise filters.

They differ in what they are made of, so that their mistakes differ, and their mean is better than either.
Residual blocks as in He et al., "Deep residual learning" (2015); depthwise ones as in Liu et al., "A ConvNet for the
2020s" (2022). Both keep a coarse grid of places to the end: a mean over the whole
picture would forget where things are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lunatrain.errors import UsageError

WIDTHS = (32, 64, 128, 256)
"""Channels of the four stages: half of ResNet-18's, a quarter of its work, which one thread of a CPU can do."""
GROUP = 8
"""Channels that are normed together."""
GRID = 4
"""Rows and columns of places that the last layer looks at."""
SMALLEST_SIDE = 32
"""Both halve a picture's sides five times."""
NEAREST_LOGIT = 1e-3
"""A box begins this far from the edge, as a fraction: at the edge itself a sigmoid does not move."""
DEPTHWISE_WIDTHS = (48, 96, 192, 256)
DEPTHWISE_DEPTHS = (2, 2, 4, 2)


class BoxHead(nn.Module):
    """Features, (N, channels, r, c), to boxes, (N, 4): ordered, and within the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(GRID)
        self.linear = nn.Linear(channels * GRID * GRID, 4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """x0, y0, x1, y1 as fractions, 0 <= x0 <= x1 <= 1: where the box begins, and its share of what is left."""
        begin, share = self.linear(self.pool(features).flatten(1)).float().sigmoid().chunk(2, dim=1)
        return torch.cat([begin, begin + (1 - begin) * share], dim=1)

    def begin_with(self, box: Sequence[float]) -> None:
        """Give this box for any picture, until something is learnt."""
        x0, y0, x1, y1 = box
        start = torch.tensor([x0, y0, (x1 - x0) / max(1 - x0, NEAREST_LOGIT), (y1 - y0) / max(1 - y0, NEAREST_LOGIT)])
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(start.clamp(NEAREST_LOGIT, 1 - NEAREST_LOGIT).logit())


def group_norm(channels: int) -> nn.GroupNorm:
    """Norm over groups of `GROUP` channels: the same in training and after, whatever the batch."""
    return nn.GroupNorm(channels // GROUP, channels)


class BasicBlock(nn.Module):
    """Two convolutions 3×3 with group norm, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, group_norm(out_channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, R, C) to (N, out_channels, R / stride, C / stride)."""
        changed = self.norm1(self.conv1(features)).relu_()
        summed: torch.Tensor = self.norm2(self.conv2(changed)) + self.shortcut(features)
        return summed.relu_()


class ResidualBoxNet(nn.Module):
    """ResNet-18 with a stem of one channel and half the widths, and four outputs: 2.8 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        first = WIDTHS[0]
        stem = [nn.Conv2d(1, first, 7, 2, 3, bias=False), group_norm(first), nn.ReLU(inplace=True)]
        layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
        for before, width in zip((first, *WIDTHS), WIDTHS, strict=False):
            layers += [BasicBlock(before, width, 1 if width == first else 2), BasicBlock(width, width, 1)]
        self.body = nn.Sequential(*layers)
        self.head = BoxHead(WIDTHS[-1])

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures, (N, 1, R, C), 0 to 1, to boxes, (N, 4)."""
        boxes: torch.Tensor = self.head(self.body(pictures - 0.5))
        return boxes


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, channels, R, C) to the same."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseBlock(nn.Module):
    """A 7×7 filter for each channel, then two linear layers over the channels of each pixel; added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ChannelNorm(channels)
        self.widen = nn.Conv2d(channels, 3 * channels, 1)
        self.narrow = nn.Conv2d(3 * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, channels, R, C) to the same."""
        changed = self.widen(self.norm(self.depthwise(features)))
        changed = self.narrow(nn.functional.gelu(changed))
        summed: torch.Tensor = features + self.scale * changed
        return summed


class DepthwiseBoxNet(nn.Module):
    """Patches of 4×4 pixels, then stages of depthwise blocks; layer norm, no batch norm: 2.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (width, depth) in enumerate(zip(DEPTHWISE_WIDTHS, DEPTHWISE_DEPTHS, strict=True)):
            before, step = (1, 4) if number == 0 else (DEPTHWISE_WIDTHS[number - 1], 2)
            layers += [nn.Conv2d(before, width, step, step), ChannelNorm(width)]
            layers += [DepthwiseBlock(width) for _ in range(depth)]
        self.body = nn.Sequential(*layers, ChannelNorm(DEPTHWISE_WIDTHS[-1]))
        self.head = BoxHead(DEPTHWISE_WIDTHS[-1])

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures, (N, 1, R, C), 0 to 1, to boxes, (N, 4)."""
        boxes: torch.Tensor = self.head(self.body(pictures - 0.5))
        return boxes


BOX_MODELS: dict[str, Callable[[], nn.Module]] = {"resnet": ResidualBoxNet, "depthwise": DepthwiseBoxNet}


def build_boxnet(name: str) -> nn.Module:
    """Make a network with fresh weights, drawn from torch's own generator.

    Raises
    ------
    UsageError
        Unknown name.
    """
    if name not in BOX_MODELS:
        message = f"--model: got {name!r}, expected one of {', '.join(BOX_MODELS)}"
        raise UsageError(message)
    return BOX_MODELS[name]()
