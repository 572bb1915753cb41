"""Random changes of pictures whose boxes move along: gamma, flips, shifts, zoom, small turns; each sample its own."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import affine_grid, grid_sample

from lunatrain.errors import UsageError

DEFAULTS = {"flip": 1.0, "gamma": 1.4, "offset": 0.1, "scale": 0.2, "rotate": 10.0}


@dataclass(frozen=True)
class BoxAugmentation:
    """What is done to training pictures.

    Parameters
    ----------
    flip : float
        1: each axis is mirrored in half of the samples. Some of LUNA16's scans lie the other way round.
    gamma : float
        Values 0 to 1 are raised to a power between 1 / gamma and gamma; 1 for none.
    offset : float
        Greatest shift, as a share of the picture's side.
    scale : float
        Greatest zoom along each axis: 0.2 is 1 / 1.2 to 1.2.
    rotate : float
        Greatest turn, degrees.
    """

    flip: float = 0.0
    gamma: float = 1.0
    offset: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "BoxAugmentation":
        """Changes from a list as ``flip,gamma,offset=0.05``; ``all`` is the whole list, ``none`` nothing.

        >>> BoxAugmentation.parse("gamma,rotate=5")
        BoxAugmentation(flip=0.0, gamma=1.4, offset=0.0, scale=0.0, rotate=5.0)
        """
        chosen: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition("=")
            if item == "all":
                chosen |= DEFAULTS
            elif item != "none":
                chosen[name] = _strength(name, value)
        return cls(**chosen)

    @property
    def moves(self) -> bool:
        """Whether anything but the values is changed."""
        return bool(self.flip or self.offset or self.scale or self.rotate)


@torch.no_grad()
def augment_boxes(
    pictures: torch.Tensor, outlines: torch.Tensor, settings: BoxAugmentation, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change each picture by a random transform of its own.

    Parameters
    ----------
    pictures : Tensor, (N, 1, S, S), float32
        0 to 1; not changed. Beyond a border lies the border pixel.
    outlines : Tensor, (N, k, 2), float32
        Points around what is boxed, fractions of the side; see `lunatrain.boxes.outline_of`.
    settings : BoxAugmentation
    generator : Generator, optional
        Source of the random numbers: same state, same result.

    Returns
    -------
    pictures : Tensor, (N, 1, S, S)
        Linear between pixels.
    boxes : Tensor, (N, 4)
        Around the moved points, as far as they lie in the picture.
    """
    device = pictures.device if generator is None else generator.device

    def uniform(*shape: int) -> torch.Tensor:
        """From -1 to 1."""
        return (2 * torch.rand(shape, generator=generator, device=device) - 1).to(pictures.device)

    count = len(pictures)
    if settings.moves:
        zoom = (1 + settings.scale) ** uniform(count, 2)
        if settings.flip:
            zoom = torch.where(uniform(count, 2) < 0, -zoom, zoom)
        angle = math.radians(settings.rotate) * uniform(count)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
        shift = 2 * settings.offset * uniform(count, 2)
        pictures, outlines = move(pictures, outlines, torch.cat([zoom[:, :, None] * turn, shift[:, :, None]], dim=2))
    if settings.gamma != 1:
        power = settings.gamma ** uniform(count)
        pictures = pictures.clamp(0, 1) ** power[:, None, None, None]
    return pictures, torch.cat([outlines.amin(dim=1), outlines.amax(dim=1)], dim=1).clamp(0, 1)


def move(pictures: torch.Tensor, outlines: torch.Tensor, transforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply affine transforms to pictures (N, 1, S, S) and to points in them (N, k, 2).

    Parameters
    ----------
    transforms : Tensor, (N, 2, 3), float32
        Where a point of the result comes from: ``source = matrix[:, :2] @ target + matrix[:, 2]``, both (x, y) counted
        from the centre in halves of the side.
    """
    grid = affine_grid(transforms, list(pictures.shape), align_corners=False)
    moved = grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    source = 2 * outlines - 1 - transforms[:, None, :, 2]
    target = torch.linalg.solve(transforms[:, :, :2], source.transpose(1, 2)).transpose(1, 2)
    return moved, (target + 1) / 2


def _strength(name: str, value: str) -> float:
    if name not in DEFAULTS:
        message = f"--augment: a list of {', '.join(DEFAULTS)}, or all or none, got {name!r}"
        raise UsageError(message)
    least = 1.0 if name == "gamma" else 0.0
    try:
        number = float(value) if value else DEFAULTS[name]
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        message = f"--augment: {name} got {value!r}, expected a number from {least:g} on"
        raise UsageError(message)
    return number
