"""Put a localisation run together: of a store's volumes, or of DICOM slices and a table of boxes; load its network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lunaprep.store.reader import open_store
from lunatrain.augment_boxes import BoxAugmentation
from lunatrain.box_slices import BoxLoader, BoxSlices, Pictures, predict_boxes, read_store_slices
from lunatrain.box_table import read_csv_slices
from lunatrain.boxes import Floats, mean_of
from lunatrain.checkpoint import Loaded, load_checkpoint
from lunatrain.config import config_from_json
from lunatrain.errors import CheckpointError, UsageError
from lunatrain.localisation_config import LocConfig
from lunatrain.log import progress_bar
from lunatrain.loop import Run, Trainer
from lunatrain.models.boxnet import build_boxnet
from lunatrain.sampling import EpochPlan, Shuffled, select_rows
from lunatrain.tasks.localise import Localise
from lunatrain.training import TrainOptions, best_of, pick_device, resume_with

TASK = "loc"
BOXES = "boxes"
"""What a checkpoint says that it holds."""
TABLE_SUFFIX = ".csv"


@dataclass(frozen=True, eq=False)
class Localiser:
    """A trained network.

    Attributes
    ----------
    path : Path
        Its checkpoint.
    model : Module
    side : int
        Rows and columns of the pictures it has learnt.
    config : LocConfig
    data_id : str
        What it has learnt from.
    """

    path: Path
    model: nn.Module
    side: int
    config: LocConfig
    data_id: str


def open_training(options: TrainOptions, config: LocConfig) -> Trainer:
    """Put a new run together.

    Parameters
    ----------
    options : TrainOptions
        Its `store` is a store with volumes and masks, or a CSV file of boxes; then `slices` is the folder of the
        DICOM files it names.
    config : LocConfig
        Settings.

    Raises
    ------
    UsageError
        Data that lack what the settings ask for.
    LunaprepError
        The store is not whole, or a slice cannot be read.
    """
    device, processes = pick_device(options.device), options.processes
    show = options.show_progress and processes.is_first
    slices = read_slices(options.store, options.slices, config.side, config.slice_mm, show=show)
    if config.split == "series" and slices.table["split_series"].nunique() == 1:
        message = f"all slices of {options.store} are of one part or patient: nothing can be held out. Give --split all"
        raise UsageError(message)
    rows, val_rows = (select_rows(slices.table, config.split, part, unit="slice") for part in ("train", "val"))
    sampler = Shuffled(rows, config.seed, config.samples or None)
    plan = EpochPlan(sampler, config.batch_size, processes.rank, processes.world_size)
    mean_box = slices.boxes[rows].mean(axis=0)
    task = Localise(slices, BoxAugmentation.parse(config.augment), val_rows, mean_box)
    torch.manual_seed(config.seed)
    model = build_boxnet(config.model)
    if options.init is not None:
        _load_weights(model, options.init, config.model)
    else:
        model.head.begin_with(mean_box.tolist())  # type: ignore[operator, union-attr]
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = processes.share_statistics(model, device)
    args = {"name": config.model, "kind": BOXES, "side": config.side}
    loader = BoxLoader(slices, device)
    notes = (_account(slices, len(rows), len(val_rows)),)
    parts = (task, model, plan, loader, slices.data_id, args, processes)
    return Trainer(Run(options.run, config, device, *parts, notes=notes))


def resume_training(options: TrainOptions) -> tuple[Trainer, Loaded]:
    """Put a run together again as its newest good checkpoint has it.

    Raises
    ------
    CheckpointError
        There is none, it is no localisation, or its data are others.
    """
    return resume_with(options, open_training, LocConfig, _args_of)


def read_slices(source: Path, folder: Path | None, side: int, slice_mm: float, *, show: bool = False) -> BoxSlices:
    """Slices of a store, or of a CSV file of boxes and the folder of its DICOM files (default: the file's own)."""
    if source.suffix.lower() == TABLE_SUFFIX and source.is_file():
        return read_csv_slices(source, folder or source.parent, side)
    with progress_bar(None, "reading", "scan", show=show) as bar:
        return read_store_slices(open_store(source), side, slice_mm, lambda text: _tell(bar, text))


def _tell(bar: Any, text: str) -> None:
    bar.set_description_str(text, refresh=False)
    bar.update()


def load_localiser(path: Path, device: torch.device) -> Localiser:
    """The network of a run's best checkpoint, or of a checkpoint.

    Raises
    ------
    UsageError, CheckpointError
        Not there, damaged, or no localisation.
    """
    loaded = load_checkpoint(best_of(path))
    args = _args_of(loaded)
    model = build_boxnet(args["name"])
    model.load_state_dict(loaded.weights)
    model = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    config = config_from_json(loaded.state["config"], LocConfig)
    return Localiser(loaded.path, model, int(args["side"]), config, loaded.state["store_id"])


def find_boxes(localisers: Sequence[Localiser], pictures: Callable[[int], Pictures], device: torch.device) -> Floats:
    """Boxes of slices by several networks together: the mean of theirs, (n, 4).

    Parameters
    ----------
    localisers : sequence of Localiser
    pictures : callable
        Gives the slices as pictures of a side, (n, side, side) uint8.
    """
    made: dict[int, Pictures] = {}
    found = []
    for item in localisers:
        if item.side not in made:
            made[item.side] = pictures(item.side)
        found.append(predict_boxes(item.model, made[item.side], device))
    return mean_of(found)


def is_localisation(path: Path) -> bool:
    """Whether a run (or checkpoint) is one of lung boxes."""
    return path.exists() and load_checkpoint(best_of(path)).state["model_args"].get("kind") == BOXES


def _account(slices: BoxSlices, num_train: int, num_val: int) -> str:
    scans = slices.table["series_uid"].nunique()
    return (
        f"{len(slices):,} slices of {scans:,} series, {num_train:,} to learn and {num_val:,} to be judged on; "
        f"{slices.num_without:,} without lung left out"
    )


def _args_of(loaded: Loaded) -> dict[str, Any]:
    args = loaded.state["model_args"]
    if args.get("kind") != BOXES:
        message = f"{loaded.path} holds {args['name']!r}, which gives no lung boxes. Name a run of 'lunatrain loc'"
        raise CheckpointError(message)
    return dict(args)


def _load_weights(model: nn.Module, path: Path, name: str) -> None:
    loaded = load_checkpoint(path)
    held = _args_of(loaded)["name"]
    if held != name:
        message = f"{path} holds a model {held!r}, not {name!r}. Give --model {held}"
        raise CheckpointError(message)
    model.load_state_dict(loaded.weights)
