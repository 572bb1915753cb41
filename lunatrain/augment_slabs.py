"""Random windows and changes of images with their masks, a transform of its own for each sample of a batch.

One resampling does everything but noise. Draws are those of `lunatrain.augment`; its slice axis is the channels here,
which are mirrored (slices of context), never blended.
"""

import torch
from torch.nn.functional import affine_grid, grid_sample

from lunatrain.augment import Augmentation, draw_transforms


@torch.no_grad()
def augment_slabs(
    slabs: torch.Tensor,
    masks: torch.Tensor,
    settings: Augmentation,
    side: int,
    generator: torch.Generator | None = None,
    *,
    flips_channels: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a random window out of each sample, changed at random.

    Parameters
    ----------
    slabs : Tensor, (N, channels, R, C), float32
        HU, or colours; not changed. Beyond a border lies the border pixel.
    masks : Tensor, (N, R, C), any type
        Class of each pixel of the image (for slices of context: of the middle one).
    settings : Augmentation
        What to do. Offsets are shares of half the window.
    side : int
        Rows and columns of the windows, at most; a shorter image is taken whole.
    generator : Generator, optional
        Source of the random numbers: same state, same result.
    flips_channels : bool
        Whether flips mirror the channels too: right for slices of context, wrong for colours.

    Returns
    -------
    slabs : Tensor, (N, channels, r, c), float32
        Interpolated linearly; exact where nothing but windows and flips is asked for (to rounding).
    masks : Tensor, (N, r, c), type of `masks`
        The nearest pixel of the mask: classes stay classes, and the area of a small one is right in the mean.
        (Linear interpolation with a threshold at a half keeps 31 % of one-pixel masks.)
    """
    drawn_on = slabs.device if generator is None else generator.device
    shape = tuple(slabs.shape[2:])
    window = (min(side, shape[0]), min(side, shape[1]))
    with torch.autocast(slabs.device.type, enabled=False):
        starts = _draw_starts(len(slabs), shape, window, settings.resamples, generator, drawn_on)
        transforms = draw_transforms(len(slabs), (1, *window), settings, generator, drawn_on)
        starts, transforms = starts.to(slabs.device), transforms.to(slabs.device)
        changed, moved = resample_slabs(slabs.float(), masks, transforms[:, 1:, 1:], starts, window)
        if settings.flip and flips_channels:
            is_mirrored = (transforms[:, 0, 0] < 0)[:, None, None, None]
            changed = torch.where(is_mirrored, changed.flip(1), changed)
        if settings.noise_hu:
            noise = torch.randn(changed.shape, generator=generator, device=drawn_on).to(slabs.device)
            changed = changed.add_(noise, alpha=settings.noise_hu)
    return changed, moved


def resample_slabs(
    slabs: torch.Tensor,
    masks: torch.Tensor,
    transforms: torch.Tensor,
    starts: torch.Tensor,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut windows, each through an affine transform about its centre.

    Parameters
    ----------
    slabs : Tensor, (N, channels, R, C), float32
        Images.
    masks : Tensor, (N, R, C)
        Their masks.
    transforms : Tensor, (N, 2, 3), float32
        ``source = matrix[:, :2] @ target + matrix[:, 2]``, both pixels (row, column) counted from the window's centre.
    starts : Tensor, (N, 2), float32
        First row and column of each window in its image.
    window : tuple of int
        Rows, columns.

    Returns
    -------
    slabs : Tensor, (N, channels, rows, columns), float32
        Linear between pixels.
    masks : Tensor, (N, rows, columns)
        Nearest pixel.
    """
    sides = torch.tensor(slabs.shape[2:], dtype=torch.float32, device=slabs.device)
    out_sides = torch.tensor(window, dtype=torch.float32, device=slabs.device)
    # torch wants shares of the half side, counted from the centre, column first
    linear = transforms[:, :, :2] * out_sides / sides[:, None]
    centers = starts + out_sides / 2 - sides / 2
    shift = (transforms[:, :, 2] + centers) * 2 / sides
    theta = torch.cat([linear.flip(1, 2), shift.flip(1)[:, :, None]], dim=2)
    grid = affine_grid(theta, [len(slabs), 1, *window], align_corners=False)
    style = {"padding_mode": "border", "align_corners": False}
    changed = grid_sample(slabs, grid, mode="bilinear", **style)  # type: ignore[arg-type]
    moved = grid_sample(masks[:, None].float(), grid, mode="nearest", **style)  # type: ignore[arg-type]
    return changed, moved[:, 0].to(masks.dtype)


def _draw_starts(
    num_samples: int,
    shape: tuple[int, ...],
    window: tuple[int, int],
    is_between: bool,
    generator: torch.Generator | None,
    device: torch.device | str,
) -> torch.Tensor:
    """First row and column of each window, (N, 2) float32: whole pixels, unless pixels fall between others anyway."""
    spare = torch.tensor([side - cut for side, cut in zip(shape, window, strict=True)], device=device)
    share = torch.rand(num_samples, 2, generator=generator, device=device)
    return share * spare if is_between else (share * (spare + 1)).floor().clamp(max=spare)
