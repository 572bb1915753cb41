"""How likely each candidate is a nodule, or malignant: crops cut as the store's are, judged in batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lunaprep.crops import cut_crop, window_starts
from lunatrain.checkpoint import load_checkpoint
from lunatrain.detect.reading import HU_RANGE
from lunatrain.errors import UsageError
from lunatrain.models import prepare_for
from lunatrain.training import best_of, load_model

LEAST_ODDS = 1e-6
"""No opinion is taken as surer than a million to one."""
BATCH = 16
"""Crops at a time: 5 MB of voxels, and what a network makes of them."""

BOOK_CROP = (32, 48, 48)
"""Crops of the book's .state files, which do not say."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network for crops: its checkpoint, slices, rows and columns of a crop, and the label it has learnt."""

    model: nn.Module
    crop_shape: tuple[int, int, int]
    path: Path
    target: str


def load_classifier(place: Path, device: torch.device) -> Classifier:
    """The network of a run or checkpoint, or of one of the book's .state files, on a device.

    Raises
    ------
    UsageError, CheckpointError
        Not there, damaged, or no classifier.
    """
    path = best_of(place)
    shape = BOOK_CROP if path.suffix == ".state" else _crop_shape(path)
    model, facts = load_model(path, shape)
    return Classifier(prepare_for(device, model).eval(), shape, path, facts["config"].get("target", "is_nodule"))


def cut_crops(
    hu: npt.NDArray[np.int16], centers_irc: npt.ArrayLike, crop_shape: tuple[int, int, int]
) -> npt.NDArray[np.int16]:
    """Crops around voxels as a store has them: moved inwards at a border, the lower HU where the scan is too small.

    Parameters
    ----------
    hu : ndarray, (slices, rows, columns)
    centers_irc : array_like, (n, 3)
        Continuous array index; rounded, halves to even.
    crop_shape : tuple of 3 int

    Returns
    -------
    ndarray, (n, 1, *crop_shape) int16
    """
    centers = np.rint(np.asarray(centers_irc, dtype=np.float64).reshape(-1, 3)).astype(np.int64)
    depth, rows, columns = hu.shape
    crops = np.empty((len(centers), 1, *crop_shape), dtype=np.int16)
    for crop, (i, r, c) in zip(crops, window_starts(centers, (depth, rows, columns), crop_shape, "shift"), strict=True):
        cut_crop(hu, 0, (int(i), int(r), int(c)), crop[0], HU_RANGE[0])
    return crops


@torch.inference_mode()
def classify(
    classifier: Classifier, hu: npt.NDArray[np.int16], centers_irc: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Probability of class 1 for a candidate at each place, (n,) float64; parameters as of `cut_crops`."""
    device = next(classifier.model.parameters()).device
    parts = [np.empty(0)]
    for start in range(0, len(centers_irc), BATCH):
        crops = torch.from_numpy(cut_crops(hu, centers_irc[start : start + BATCH], classifier.crop_shape))
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


def _crop_shape(path: Path) -> tuple[int, int, int]:
    state: dict[str, Any] = load_checkpoint(path).state
    shape = state["model_args"].get("crop_shape")
    if shape is None or len(shape) != 3:
        message = f"{path} is no classifier of crops: it holds {state['model_args'].get('name', 'another model')!r}. "
        raise UsageError(message + "Give a run of 'lunatrain cls' or 'mal'")
    slices, rows, columns = shape
    return int(slices), int(rows), int(columns)
