"""How likely each candidate is a nodule, or malignant: crops cut as the store's are, judged in batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunaprep.crops import Triple, cut_crop, resample_crop, sample_starts, step_of, window_starts
from lunatrain.checkpoint import load_checkpoint
from lunatrain.crop_kind import CropKind, kind_of_model
from lunatrain.dense import HU_WINDOW
from lunatrain.errors import UsageError
from lunatrain.models import prepare_for
from lunatrain.training import best_of, load_model

LEAST_ODDS = 1e-6
"""No opinion is taken as surer than a million to one."""
BATCH = 16
"""Crops at a time: 5 MB of voxels, and what a network makes of them."""

BOOK_CROP = CropKind((32, 48, 48))
"""Crops of the book's .state files, which do not say."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network for crops: how these are cut, its checkpoint, and the label it has learnt."""

    model: nn.Module
    crops: CropKind
    path: Path
    target: str


def load_classifier(place: Path, device: torch.device) -> Classifier:
    """The network of a run or checkpoint, or of one of the book's .state files, on a device.

    Raises
    ------
    UsageError, CheckpointError
        Not there, damaged, no classifier, or one of HU that the detector does not keep.
    """
    path = best_of(place)
    kind = BOOK_CROP if path.suffix == ".state" else _crop_kind(path)
    (low, high), (lowest, highest) = kind.hu, HU_WINDOW
    if low < lowest or high > highest:
        message = (
            f"{path} was trained on HU {low} to {high}, the detector keeps {lowest} to {highest} only. "
            f"Train it on a store built with --hu {lowest} {highest}, or a narrower window"
        )
        raise UsageError(message)
    model, facts = load_model(path, kind.shape)
    if facts["config"].get("classes"):
        kinds = ", ".join(facts["config"]["classes"])
        message = f"{path} tells {kinds} apart, and no nodule from anything else. Give a run of another --target"
        raise UsageError(message)
    return Classifier(prepare_for(device, model).eval(), kind, path, facts["config"].get("target", "is_nodule"))


def cut_crops(
    hu: npt.NDArray[np.int16], centers_irc: npt.ArrayLike, kind: CropKind, spacing_irc: Triple
) -> npt.NDArray[Any]:
    """Crops around places of a scan, as the store has them that the classifier has learnt from.

    Parameters
    ----------
    hu : ndarray, (slices, rows, columns)
        Clipped to the window of `kind`.
    centers_irc : array_like, (n, 3)
        Continuous array index; rounded, halves to even, where crops are not resampled.
    kind : CropKind
    spacing_irc : tuple of 3 float
        Of the scan, mm to a slice, row, column.

    Returns
    -------
    ndarray, (n, 1, *kind.shape) int16, or float32 where they are resampled
    """
    centers = np.asarray(centers_irc, dtype=np.float64).reshape(-1, 3)
    depth, rows, columns = hu.shape
    fill, size = kind.hu[0], (len(centers), 1, *kind.shape)
    crops: npt.NDArray[Any]
    if kind.spacing is not None:
        crops, step = np.empty(size, dtype=np.float32), step_of(kind.spacing, spacing_irc)
        starts = sample_starts(centers, (depth, rows, columns), kind.shape, step, kind.edge)
        for crop, (z, y, x) in zip(crops, starts.tolist(), strict=True):
            resample_crop(hu, 0, depth, (z, y, x), step, crop[0], fill)
        return crops
    crops, voxels = np.empty(size, dtype=np.int16), np.rint(centers).astype(np.int64)
    for crop, (i, r, c) in zip(
        crops, window_starts(voxels, (depth, rows, columns), kind.shape, kind.edge).tolist(), strict=True
    ):
        cut_crop(hu, 0, (i, r, c), crop[0], fill)
    return crops


@torch.inference_mode()
def classify(
    classifier: Classifier, hu: npt.NDArray[np.int16], centers_irc: npt.NDArray[np.float64], spacing_irc: Triple
) -> npt.NDArray[np.float64]:
    """Probability of class 1 for a candidate at each place, (n,) float64; parameters as of `cut_crops`."""
    device, kind = next(classifier.model.parameters()).device, classifier.crops
    if kind.hu != HU_WINDOW:
        hu = np.clip(hu, *kind.hu)
    parts = [np.empty(0)]
    for start in range(0, len(centers_irc), BATCH):
        crops = torch.from_numpy(cut_crops(hu, centers_irc[start : start + BATCH], kind, spacing_irc))
        logits = classifier.model(crops.to(device).float().contiguous(memory_format=torch.channels_last_3d))
        parts.append(torch.softmax(logits.float(), dim=1)[:, 1].double().cpu().numpy())
    return np.concatenate(parts)


def joint_probability(
    classified: npt.NDArray[np.float64], segmented: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """One probability from two opinions, (n,): the mean of their log-odds.

    The classifier sees the surroundings, the segmentation each voxel; their mistakes differ, and on 20 held-out hard
    phantoms the mean found more than either (docs/detect.md). The book takes the classifier's word alone.

    Parameters
    ----------
    classified, segmented : ndarray, (n,)
        Probability of the classifier, and the highest of the segmentation in the candidate.

    >>> joint_probability(np.array([0.8, 0.5]), np.array([0.2, 0.9])).round(2)
    array([0.5 , 0.75])
    """
    odds = [np.log(p) - np.log1p(-p) for p in (np.clip(p, LEAST_ODDS, 1 - LEAST_ODDS) for p in (classified, segmented))]
    return np.asarray(1 / (1 + np.exp(-(odds[0] + odds[1]) / 2)))


def _crop_kind(path: Path) -> CropKind:
    args: dict[str, Any] = load_checkpoint(path).state["model_args"]
    shape = args.get("crop_shape")
    if shape is None or len(shape) != 3:
        message = f"{path} is no classifier of crops: it holds {args.get('name', 'another model')!r}. "
        raise UsageError(message + "Give a run of 'lunatrain cls' or 'mal'")
    return kind_of_model(args)
