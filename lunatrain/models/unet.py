"""U-Nets that find structures in 2-D images: the book's, and one of residual blocks.

The first is that of "Deep Learning with PyTorch" (Stevens, Antiga, Viehmann 2020), chapter 13, after Ronneberger,
Fischer and Brox, "U-Net" (2015). Names and shapes of its parameters are the book's, so that its state files load.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, pad

from lunatrain.errors import UsageError

DEPTH, WIDTH_LOG2 = 3, 4
"""The book's: sides are halved twice, the first convolutions have 16 channels."""
CONTEXT = 7
"""The book's slices: the one that is segmented, and three on each side."""


class ConvBlock(nn.Module):
    """Two convolutions 3×3, each with ReLU and then batch norm (in the book's order)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.Conv2d(channels, out_channels, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),
                nn.BatchNorm2d(out_channels),
            ]
        self.block = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, R, C) to (N, out_channels, R, C)."""
        found: torch.Tensor = self.block(features)
        return found


class UpBlock(nn.Module):
    """Doubles the sides, and looks at the result together with what was seen there on the way down."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.conv_block = ConvBlock(in_channels, out_channels)

    def forward(self, features: torch.Tensor, bridge: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, R, C) and (N, out_channels, 2 R, 2 C) to (N, out_channels, 2 R, 2 C)."""
        joined: torch.Tensor = self.conv_block(torch.cat([self.up(features), bridge], dim=1))
        return joined


class _Ladder(nn.Module):
    """The U without its input norm; sides must be multiples of 2^(depth - 1)."""

    def __init__(self, in_channels: int, num_classes: int, depth: int, width_log2: int) -> None:
        super().__init__()
        widths = [2 ** (width_log2 + level) for level in range(depth)]
        self.down_path = nn.ModuleList(
            ConvBlock(before, after) for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.up_path = nn.ModuleList(UpBlock(2 * width, width) for width in widths[-2::-1])
        self.last = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bridges = []
        features = image
        for level, down in enumerate(self.down_path):
            features = down(avg_pool2d(features, 2) if level else features)
            bridges.append(features)
        for up, bridge in zip(self.up_path, bridges[-2::-1], strict=True):
            features = up(features, bridge)
        logits: torch.Tensor = self.last(features)
        return logits


class UNet(nn.Module):
    """The book's segmentation network: batch norm of the input, a U of `depth` levels; any rows and columns.

    Parameters
    ----------
    in_channels : int
        Slices of context, or colours.
    num_classes : int
        Number of logits for each pixel.
    depth : int
        Levels; sides are halved depth - 1 times.
    width_log2 : int
        The first level has 2^width_log2 channels, each further one twice as many.

    Raises
    ------
    UsageError
        A number below 1.

    Notes
    -----
    118,271 parameters as in the book (7 slices, 1 class). The book's ends in a sigmoid; this one returns logits. A side
    that cannot be halved is continued by its border pixels, and cut again: the book's would fail.
    """

    def __init__(
        self,
        in_channels: int = CONTEXT,
        num_classes: int = 1,
        depth: int = DEPTH,
        width_log2: int = WIDTH_LOG2,
    ) -> None:
        super().__init__()
        if min(in_channels, num_classes, depth) < 1 or width_log2 < 0:
            given = f"{in_channels}, {num_classes}, {depth} and {width_log2}"
            message = f"a U-Net needs 1 or more channels, classes and levels, and a width of 2^0 or more, got {given}"
            raise UsageError(message)
        self.in_channels = in_channels
        self.multiple = 2 ** (depth - 1)
        """Sides inside are multiples of this."""
        self.reach = 2 * (2**depth - 1) + 2 * (self.multiple - 1) + 2 * self.multiple
        """Pixels around one that its logits depend on, at most."""
        self.input_batchnorm = nn.BatchNorm2d(in_channels)
        self.unet = _Ladder(in_channels, num_classes, depth, width_log2)
        self._init_weights()

    def forward(self, slabs: torch.Tensor) -> torch.Tensor:
        """HU, (N, in_channels, R, C), to logits, (N, num_classes, R, C)."""
        rows, cols = slabs.shape[-2:]
        logits: torch.Tensor = self.unet(self.input_batchnorm(_to_multiple(slabs, self.multiple)))
        return logits[..., :rows, :cols]

    def begin_with(self, probability: float) -> None:
        """Let a fresh network give about this probability everywhere (Lin et al., "Focal loss", 2017)."""
        nn.init.constant_(self.unet.last.bias, math.log(probability / (1 - probability)))  # type: ignore[arg-type]

    def _init_weights(self) -> None:
        """Draw weights as the book does, with its slip in the biases (see `LunaModel`)."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                bound = 1 / math.sqrt(layer.weight.shape[0] * layer.weight[0, 0].numel())
                if layer.bias is not None:
                    nn.init.normal_(layer.bias, mean=-bound, std=bound)


def _to_multiple(slabs: torch.Tensor, multiple: int) -> torch.Tensor:
    """Continue rows and columns by their last pixel, to the next multiple."""
    more_rows, more_cols = (-side % multiple for side in slabs.shape[-2:])
    return pad(slabs, (0, more_cols, 0, more_rows), mode="replicate") if more_rows or more_cols else slabs


SEGMENTERS: dict[str, Callable[[int, int], nn.Module]] = {"unet": UNet}


def build_segmenter(name: str, in_channels: int = CONTEXT, num_classes: int = 1) -> nn.Module:
    """Make a segmentation network with fresh weights, drawn from torch's own generator.

    Parameters
    ----------
    name : str
        One of `SEGMENTERS`.
    in_channels : int
        Slices of context, or colours.
    num_classes : int
        Number of logits for each pixel.

    Raises
    ------
    UsageError
        Unknown name, or a number below 1.
    """
    if name not in SEGMENTERS:
        message = f"model must be one of {', '.join(SEGMENTERS)}, got {name!r}"
        raise UsageError(message)
    return SEGMENTERS[name](in_channels, num_classes)
