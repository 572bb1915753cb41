"""Folders of images with masks: train and test, each inputs/NAME.png and outputs/NAME.png. The home of Pillow."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lunatrain.errors import TableError, UsageError
from lunatrain.sampling import Rows

if TYPE_CHECKING:
    from PIL import Image as Pillow

PARTS = ("train", "test")
MAX_CLASSES = 32
"""More values than this are a photograph, or a mask with soft edges."""
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
SIXTEEN_BIT = 257
"""What a 16-bit value is divided by to become an 8-bit one."""

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]


class ImageError(TableError):
    """An image or its mask cannot be used."""


@dataclass(frozen=True, eq=False)
class ImagePair:
    """An image and its mask.

    Attributes
    ----------
    name : str
        File name, the same of both.
    image : ndarray, (channels, R, C) float32
        0 to 255; 1 channel (grey) or 3.
    mask : ndarray, (R, C) uint8
        Number of each pixel's class.
    """

    name: str
    image: Image
    mask: Mask


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """A folder as read. Use `read_images`.

    Attributes
    ----------
    train, test : tuple of ImagePair
        By name.
    values : tuple of int
        What the masks hold, ascending; a class's number is its place here.
    """

    path: Path
    train: tuple[ImagePair, ...]
    test: tuple[ImagePair, ...]
    values: tuple[int, ...]

    @property
    def num_channels(self) -> int:
        """1 where all images are grey, else 3."""
        return len(self.train[0].image)


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Some pairs, as they are; their sizes may differ."""

    pairs: Sequence[ImagePair]
    rows: Rows


@dataclass(frozen=True, eq=False)
class ImageLoader:
    """Batches of pairs that are in memory."""

    pairs: Sequence[ImagePair]
    wait_share = 0.0

    def batches(self, rows: Iterable[Rows]) -> Iterator[ImageBatch]:
        """A batch for each array of rows, in their order."""
        for chosen in rows:
            yield ImageBatch([self.pairs[row] for row in chosen.tolist()], chosen)


def read_images(folder: Path) -> ImageFolder:
    """Read a folder of images and masks.

    Parameters
    ----------
    folder : Path
        Holds train/inputs, train/outputs, test/inputs and test/outputs with PNG files; an image's mask has its name.
        Masks hold a value for each class (as 0 and 255) or indices of a palette.

    Raises
    ------
    UsageError
        A folder is missing or empty, or an image has no mask.
    ImageError
        A file cannot be read, sizes differ, or a mask is none.
    """
    names = {part: _names(folder / part) for part in PARTS}
    raw = {part: [_read_pair(folder / part, name) for name in names[part]] for part in PARTS}
    pairs = [pair for part in PARTS for pair in raw[part]]
    values = sorted({int(value) for _, _, mask in pairs for value in np.unique(mask)})
    if not 2 <= len(values) <= MAX_CLASSES:
        what = "are all of one value" if len(values) < 2 else f"hold {len(values)} values, more than {MAX_CLASSES}"
        message = f"{folder}: the masks {what}. Give a value for each class, as 0 and 255, without soft edges"
        raise ImageError(message)
    channels = max(len(image) for _, image, _ in pairs)
    made = {part: tuple(_pair(*item, channels, values) for item in raw[part]) for part in PARTS}
    return ImageFolder(folder, made["train"], made["test"], tuple(values))


def _names(folder: Path) -> list[str]:
    found = []
    for kind in ("inputs", "outputs"):
        if not (folder / kind).is_dir():
            message = f"{folder / kind} is no folder. Put images into {folder}/inputs and their masks into outputs"
            raise UsageError(message)
        found.append({path.name for path in (folder / kind).iterdir() if path.suffix.lower() == ".png"})
    inputs, outputs = found
    for here, other, names in (("inputs", "outputs", inputs - outputs), ("outputs", "inputs", outputs - inputs)):
        if names:
            message = f"{folder}: {sorted(names)[0]} is in {here} and not in {other} ({len(names)} such)"
            raise UsageError(message)
    if not inputs:
        message = f"{folder / 'inputs'} holds no PNG files"
        raise UsageError(message)
    return sorted(inputs)


def _read_pair(folder: Path, name: str) -> tuple[str, Image, npt.NDArray[np.int64]]:
    image, mask = _read_image(folder / "inputs" / name), _read_mask(folder / "outputs" / name)
    if image.shape[1:] != mask.shape:
        rows, cols = image.shape[1:]
        message = f"{folder / 'outputs' / name} is {mask.shape[1]}×{mask.shape[0]}, its image {cols}×{rows}: no pair"
        raise ImageError(message)
    return name, image, mask


def _read_image(path: Path) -> Image:
    with _opened(path) as file:
        if file.mode in GREY_MODES:
            plain = file.convert("L") if file.mode in ("1", "LA") else file
            values = np.asarray(plain, dtype=np.float32)[None]
            return values / np.float32(SIXTEEN_BIT) if file.mode.startswith("I") else values
        return np.ascontiguousarray(np.asarray(file.convert("RGB"), dtype=np.float32).transpose(2, 0, 1))


def _read_mask(path: Path) -> npt.NDArray[np.int64]:
    with _opened(path) as file:
        values = np.asarray(file.convert("L") if file.mode in ("1", "LA") else file)
    if values.ndim == 3:
        colours = values[..., :3]
        if not (colours == colours[..., :1]).all():
            message = f"{path} is coloured. Give a grey value or a palette index for each class"
            raise ImageError(message)
        values = colours[..., 0]
    return values.astype(np.int64)


def _opened(path: Path) -> "Pillow.Image":
    """An image with its pixels, whatever else its file is."""
    import warnings

    from PIL import Image as Pillow

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            with path.open("rb") as file:
                image = Pillow.open(file, formats=["PNG"])
                image.load()
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        message = f"{path} cannot be read as PNG: {first}"
        raise ImageError(message) from error
    return image


def _pair(name: str, image: Image, mask: npt.NDArray[np.int64], channels: int, values: Sequence[int]) -> ImagePair:
    if len(image) < channels:
        image = np.repeat(image, channels, axis=0)
    return ImagePair(name, image, np.searchsorted(np.asarray(values), mask).astype(np.uint8))
