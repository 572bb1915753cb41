"""How the crops that a network learns from are cut: kept in its checkpoint, so that nothing else is fed to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lunatrain.errors import CheckpointError

if TYPE_CHECKING:
    from lunaprep.store.reader import Store

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CropKind:
    """What decides a crop's voxels, besides its scan and its place.

    Parameters
    ----------
    shape : tuple of 3 int
        Slices, rows, columns.
    hu : tuple of 2 int
        Window the values are clipped to, HU.
    edge : {"shift", "pad"}
        What is done at a border; see the store's ``--edge``.
    spacing : tuple of 3 float, optional
        Millimetres to a slice, row, column that it was resampled to; None: those of its scan.
    """

    shape: tuple[int, int, int]
    hu: tuple[int, int] = (-1000, 1000)
    edge: Literal["shift", "pad"] = "shift"
    spacing: Triple | None = None

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, besides the shape."""
        return {"hu": list(self.hu), "edge": self.edge, "spacing": list(self.spacing) if self.spacing else None}

    def text(self) -> str:
        """Half a line on it."""
        return f"{spacing_text(self.spacing)}, HU {self.hu[0]} to {self.hu[1]}"


def spacing_text(spacing: Triple | None) -> str:
    """A spacing in words.

    >>> spacing_text((1.0, 0.7, 0.7)), spacing_text(None)
    ('resampled to 1 x 0.7 x 0.7 mm', "of their scan's spacing")
    """
    return f"resampled to {' x '.join(f'{mm:g}' for mm in spacing)} mm" if spacing else "of their scan's spacing"


def kind_of_store(store: "Store") -> CropKind:
    """How a store's crops were cut."""
    low, high = store.parameters["hu"]
    return CropKind(store.crop_shape, (low, high), store.parameters["edge"], store.crop_spacing)


def kind_of_model(model_args: Mapping[str, Any]) -> CropKind:
    """How the crops were cut that a checkpoint's network has learnt from; an older one that doesn't say: as by default.

    Parameters
    ----------
    model_args : mapping
        The checkpoint's, those of a classifier.
    """
    slices, rows, columns = model_args["crop_shape"]
    shape = int(slices), int(rows), int(columns)
    said = model_args.get("crops")
    if said is None:
        return CropKind(shape)
    return CropKind(shape, tuple(said["hu"]), said["edge"], tuple(said["spacing"]) if said["spacing"] else None)


def check_fits(path: Path, model_args: Mapping[str, Any], store: "Store") -> None:
    """Refuse to judge a network by crops of another spacing or HU window than it has learnt from.

    Raises
    ------
    CheckpointError
        The checkpoint says that they were others.
    """
    if "crops" not in model_args:
        return
    learnt, given = kind_of_model(model_args), kind_of_store(store)
    if (learnt.spacing, learnt.hu) != (given.spacing, given.hu):
        message = f"{path} was trained on crops {learnt.text()}; the store's are {given.text()}. Take another store"
        raise CheckpointError(message)
