"""Random changes of crops: flips, shifts, zooms, turns and noise, a transform of its own for each sample of a batch.

They run batched on the device the crops are on. All but noise are one affine resampling, in voxel units: a turn keeps
the shape of what it turns also where a crop has more columns than rows.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import affine_grid, grid_sample

from lunatrain.errors import UsageError

AXES = (2, 3, 4)
"""Slices, rows and columns in a batch of crops."""


@dataclass(frozen=True)
class Augmentation:
    """What is changed, and by how much; the defaults change nothing.

    Attributes
    ----------
    flip : bool
        Mirror each axis or not, half and half.
    offset : float
        Shift along each axis by at most this share of the crop's half side, uniform.
    scale : float
        Zoom of each axis by a factor of 1 ± at most this, uniform; below 1.
    rotate : bool
        Turn about the slice axis by any angle.
    noise_hu : float
        Standard deviation of normal noise on each voxel, HU. The result is not clipped again.
    """

    flip: bool = False
    offset: float = 0.0
    scale: float = 0.0
    rotate: bool = False
    noise_hu: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in (("offset", 1.0), ("scale", 1.0), ("noise_hu", math.inf)):
            value = getattr(self, name)
            if not 0 <= value < limit:
                message = f"augmentation {name} must be 0 or more and below {limit:g}, got {value:g}"
                raise UsageError(message)

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """Augmentation from a list as ``flip,offset,scale,rotate,noise``, each as strong as in the book.

        ``offset=0.05`` (``scale=``, ``noise=``) sets another strength; ``all`` is the whole list, ``none`` nothing.

        >>> Augmentation.parse("flip,noise=10")
        Augmentation(flip=True, offset=0.0, scale=0.0, rotate=False, noise_hu=10.0)
        """
        chosen: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition("=")
            if item == "all":
                chosen |= {field.name: getattr(BOOK, field.name) for field in fields(cls)}
            elif item != "none":
                chosen[_field_of(name)] = _strength(name, value) if "=" in item else getattr(BOOK, _field_of(name))
        return cls(**chosen)

    def __str__(self) -> str:
        """List that `parse` reads back."""
        parts = [name for name in ("flip", "rotate") if getattr(self, name)]
        parts += [f"{name}={getattr(self, _field_of(name))!r}" for name in STRENGTHS if getattr(self, _field_of(name))]
        return ",".join(parts) or "none"

    @property
    def resamples(self) -> bool:
        """Whether voxels fall between others: everything but flips and noise."""
        return self.offset > 0 or self.scale > 0 or self.rotate


STRENGTHS = ("offset", "scale", "noise")
NONE = Augmentation()
BOOK = Augmentation(flip=True, offset=0.1, scale=0.2, rotate=True, noise_hu=25.0)
"""Strengths of the book, chapter 12."""


@torch.no_grad()
def augment(crops: torch.Tensor, settings: Augmentation, generator: torch.Generator | None = None) -> torch.Tensor:
    """Change each crop by a random transform of its own.

    Parameters
    ----------
    crops : Tensor, (N, 1, slices, rows, columns), float32
        HU; not changed. Voxels outside a crop are taken as its nearest border voxel.
    settings : Augmentation
        What to do. Flips alone are exact; everything else is interpolated linearly, always in float32.
    generator : Generator, optional
        Source of the random numbers: same state, same result. Numbers are drawn on its device (fastest if it is the
        crops'), by default torch's own generator of the crops' device.

    Returns
    -------
    Tensor, (N, 1, slices, rows, columns), float32
        A new tensor, or `crops` itself where there is nothing to do.
    """
    if settings == NONE or not len(crops):
        return crops
    drawn_on = crops.device if generator is None else generator.device
    with torch.autocast(crops.device.type, enabled=False):
        changed = crops.float()
        if settings.resamples:
            transforms = draw_transforms(len(crops), tuple(crops.shape[2:]), settings, generator, drawn_on)
            changed = resample(changed, transforms.to(crops.device))
        elif settings.flip:
            changed = _flip(changed, _coin(len(crops), generator, drawn_on).to(crops.device))
        if settings.noise_hu:
            noise = torch.randn(crops.shape, generator=generator, device=drawn_on).to(crops.device)
            changed = noise.mul_(settings.noise_hu).add_(changed)
    return changed


def draw_transforms(
    num_samples: int,
    crop_shape: tuple[int, ...],
    settings: Augmentation,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw one affine transform for each sample.

    Returns
    -------
    Tensor, (num_samples, 3, 4), float32
        Where a voxel of the result comes from: ``source = matrix[:, :3] @ target + matrix[:, 3]``, both voxels (slice,
        row, column) counted from the crop's centre. A turn first, then zoom and mirror along the crop's axes (as the
        book's matrices do), then the shift.
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    factors = torch.ones(num_samples, 3, device=device)
    if settings.flip:
        factors = torch.where(_coin(num_samples, generator, device), -1.0, 1.0)
    if settings.scale:
        factors = factors * (1 + settings.scale * (2 * uniform(num_samples, 3) - 1))
    matrix = torch.eye(3, device=device).repeat(num_samples, 1, 1)
    if settings.rotate:
        angle = 2 * math.pi * uniform(num_samples)
        cos, sin = angle.cos(), angle.sin()
        matrix[:, 1, 1], matrix[:, 1, 2], matrix[:, 2, 1], matrix[:, 2, 2] = cos, -sin, sin, cos
    shift = torch.zeros(num_samples, 3, device=device)
    if settings.offset:
        half_sides = torch.tensor(crop_shape, dtype=torch.float32, device=device) / 2
        shift = settings.offset * (2 * uniform(num_samples, 3) - 1) * half_sides
    return torch.cat([factors[:, :, None] * matrix, shift[:, :, None]], dim=2)


def resample(crops: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """Apply affine transforms in voxel units, linearly, with the border voxel beyond the border.

    Slices are blended first, then each is resampled in its plane: linear interpolation is a product over the axes, and
    so takes a quarter of the time of one resampling in three dimensions.

    Parameters
    ----------
    crops : Tensor, (N, 1, slices, rows, columns), float32
        HU.
    transforms : Tensor, (N, 3, 4), float32
        As `draw_transforms` gives them: what they do to slices has nothing to do with rows and columns.
    """
    num_samples, _, num_slices, num_rows, num_cols = crops.shape
    center = (num_slices - 1) / 2
    target = torch.arange(num_slices, device=crops.device) - center
    source = (transforms[:, 0, :1] * target + transforms[:, 0, 3:] + center).clamp_(0, num_slices - 1)
    below = source.floor()
    first = below.long()
    sample = torch.arange(num_samples, device=crops.device)[:, None]
    planes = crops[:, 0]
    share = (source - below)[:, :, None, None]
    planes = planes[sample, first].lerp_(planes[sample, (first + 1).clamp_(max=num_slices - 1)], share)

    half_sides = torch.tensor([num_rows, num_cols], dtype=torch.float32, device=crops.device) / 2
    # torch wants shares of the half side, column first
    linear = transforms[:, 1:, 1:3] * half_sides / half_sides[:, None]
    shift = transforms[:, 1:, 3] / half_sides
    theta = torch.cat([linear.flip(1, 2), shift.flip(1)[:, :, None]], dim=2)
    grid = affine_grid(theta, list(planes.shape), align_corners=False)
    return grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, None]


def _coin(num_samples: int, generator: torch.Generator | None, device: torch.device | str) -> torch.Tensor:
    """Yes or no for each sample and axis, (num_samples, 3) bool."""
    return torch.rand(num_samples, 3, generator=generator, device=device) < 0.5


def _flip(crops: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    for axis, chosen in zip(AXES, mirrored.unbind(1), strict=True):
        crops = torch.where(chosen[:, None, None, None, None], crops.flip(axis), crops)
    return crops


def _field_of(name: str) -> str:
    known = ("flip", "rotate", *STRENGTHS)
    if name not in known:
        message = f"augmentation must be a list of {', '.join(known)}, or all or none, got {name!r}"
        raise UsageError(message)
    return "noise_hu" if name == "noise" else name


def _strength(name: str, value: str) -> float:
    field = _field_of(name)
    try:
        if name in STRENGTHS:
            return float(value)
    except ValueError:
        pass
    message = f"augmentation {field} got {value!r}, expected {'a number' if name in STRENGTHS else 'no strength'}"
    raise UsageError(message)
