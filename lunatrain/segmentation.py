"""Put a segmentation run together: of a store's slabs, or of a folder of images. And find its network again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lunaprep.store.reader import Store, open_store
from lunatrain.augment import Augmentation
from lunatrain.checkpoint import Loaded, load_checkpoint
from lunatrain.dense import HU_WINDOW, window_of
from lunatrain.errors import CheckpointError, UsageError
from lunatrain.images import ImageFolder, ImageLoader, read_images
from lunatrain.loop import Run, Trainer
from lunatrain.losses import class_loss, pick_loss
from lunatrain.models.book_state import load_book_state
from lunatrain.models.unet import build_segmenter
from lunatrain.sampling import EpochPlan, Rows, Sampler, Shuffled, balanced, row_labels, select_rows
from lunatrain.segmentation_config import SegConfig
from lunatrain.slabs import SlabLoader, ValSlices, held_out_slabs, held_out_volumes, open_slabs
from lunatrain.tasks.segment import Segment
from lunatrain.tasks.segment_images import SegmentImages
from lunatrain.training import TrainOptions, best_of, pick_device, resume_with
from lunatrain.voxel_scores import BOOK_THRESHOLD

TASK = "seg"
SLICES, IMAGES = "slices", "images"
"""What a network was trained on."""
VAL_BATCH = 4
"""Whole slices at a time."""


def open_training(options: TrainOptions, config: SegConfig) -> Trainer:
    """Put a new run together.

    Parameters
    ----------
    options : TrainOptions
        Its `store` is a store that has slabs, or the folder of images.
    config : SegConfig
        Settings.

    Raises
    ------
    UsageError
        The store or folder lacks what the settings ask for.
    LunaprepError
        The store is not whole.
    """
    torch.manual_seed(config.seed)
    assemble = _open_images if config.images else _open_slabs
    return assemble(options, config, pick_device(options.device))


def resume_training(options: TrainOptions) -> tuple[Trainer, Loaded]:
    """Put a run together again as its newest good checkpoint has it.

    Raises
    ------
    CheckpointError
        There is none, it is no segmentation, or its data are others.
    """
    return resume_with(options, open_training, SegConfig, _args_of)


def load_segmenter(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run, ready to predict, on the CPU.

    Parameters
    ----------
    path : Path
        A run's folder (its best checkpoint is taken), a checkpoint, or a .state file of the book.

    Returns
    -------
    model : Module
        In evaluation mode; for `lunatrain.dense.predict_volume`.
    facts : dict
        `context` (slices), `num_classes`, `kind` ("slices" or "images"), `threshold` (chosen on the validation slices;
        0.5 where nobody chose), `hu_window` (HU to be clipped to; also the model's attribute), `config`, `store_id`,
        `checkpoint`.

    Raises
    ------
    UsageError, CheckpointError
        Not there, damaged, or no segmentation.
    """
    checkpoint = best_of(path)
    if checkpoint.suffix == ".state":
        args: dict[str, Any] = {"name": "unet", "in_channels": 7, "num_classes": 1, "kind": SLICES}
        model = build_segmenter(args["name"], args["in_channels"], args["num_classes"])
        load_book_state(checkpoint, model)
        state: dict[str, Any] = {"config": {}, "store_id": None, "progress": {}}
    else:
        loaded = load_checkpoint(checkpoint)
        state, args = loaded.state, _args_of(loaded)
        model = build_segmenter(args["name"], args["in_channels"], args["num_classes"])
        model.load_state_dict(loaded.weights)
    progress = state["progress"]
    figures = progress.get("figures") or progress.get("best_figures", {})
    low, high = args.get("hu", HU_WINDOW)
    model.hu_window = (float(low), float(high))  # type: ignore[assignment]
    facts = {
        "context": args["in_channels"],
        "num_classes": args["num_classes"],
        "kind": args["kind"],
        "threshold": float(figures.get("threshold", BOOK_THRESHOLD)),
        "hu_window": window_of(model),
        "config": state["config"],
        "store_id": state["store_id"],
        "checkpoint": str(checkpoint),
    }
    return model.to(memory_format=torch.channels_last).eval(), facts  # type: ignore[call-overload]


def _args_of(loaded: Loaded) -> dict[str, Any]:
    args = loaded.state["model_args"]
    if args.get("kind") not in (SLICES, IMAGES):
        message = f"{loaded.path} holds {args['name']!r}, no segmentation. Name a run of 'lunatrain seg'"
        raise CheckpointError(message)
    return dict(args)


def _open_slabs(options: TrainOptions, config: SegConfig, device: torch.device) -> Trainer:
    store = open_store(options.store)
    table = store.slabs
    if not len(table):
        message = f"{options.store} has no slabs. Build it with a lunaprep that makes them, from scans with nodules"
        raise UsageError(message)
    rows, val_rows = (select_rows(table, config.split, part, config.target, "slab") for part in ("train", "val"))
    processes = options.processes
    show = options.show_progress and processes.is_first
    plan = EpochPlan(_sampler(table, rows, config), config.batch_size, processes.rank, processes.world_size)
    slabs, masks = open_slabs(store, options.io)
    loader = SlabLoader(slabs, masks, plan.rank_batch_size, device)
    context = store.slab_shape[0]
    val_loader = SlabLoader(slabs, masks, max(16, config.batch_size), device)
    val = _validation(store, (rows, val_rows), val_loader, config, show)
    if not val.num_nodules:
        message = (
            f"no held-out slice of split {config.split} shows a nodule, so nothing can be judged. "
            "Take another split (fold:K, candidate), a larger --val-slices, or more scans"
        )
        raise UsageError(message)
    task = Segment(Augmentation.parse(config.augment), config.side, pick_loss(config.loss), val, show)
    args = {"name": config.model, "in_channels": context, "num_classes": 1, "kind": SLICES}
    args["hu"] = list(store.parameters["hu"])
    return _trainer(options, config, device, (task, plan, loader, store.record["store_id"], args))


def _open_images(options: TrainOptions, config: SegConfig, device: torch.device) -> Trainer:
    folder = read_images(options.store)
    count = len(folder.values)
    is_binary = count == 2
    if not is_binary and config.loss != SegConfig.loss:
        message = (
            f"--loss: got {config.loss} for images of {count} classes, which have a loss of their own. Leave it out"
        )
        raise UsageError(message)
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = pick_loss(config.loss) if is_binary else class_loss
    task = SegmentImages(count, Augmentation.parse(config.augment), config.side, loss, folder.test)
    sampler = Shuffled(np.arange(len(folder.train)), config.seed, config.samples or None)
    processes = options.processes
    plan = EpochPlan(sampler, config.batch_size, processes.rank, processes.world_size)
    args = {
        "name": config.model,
        "in_channels": folder.num_channels,
        "num_classes": 1 if is_binary else count,
        "kind": IMAGES,
        "values": list(folder.values),
    }
    return _trainer(options, config, device, (task, plan, ImageLoader(folder.train), _name_of(folder), args))


def _trainer(options: TrainOptions, config: SegConfig, device: torch.device, parts: tuple[Any, ...]) -> Trainer:
    task, plan, loader, data_id, args = parts
    model = build_segmenter(args["name"], args["in_channels"], args["num_classes"])
    if options.init is not None:
        _load_weights(model, options.init, args)
    elif config.prior:
        model.begin_with(config.prior)  # type: ignore[operator]
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = options.processes.share_statistics(model, device)
    run = Run(options.run, config, device, task, model, plan, loader, data_id, args, options.processes)
    return Trainer(run)


def _load_weights(model: nn.Module, path: Path, args: dict[str, Any]) -> None:
    if path.suffix == ".state":
        load_book_state(path, model)
        return
    loaded = load_checkpoint(path)
    held = _args_of(loaded)
    for name, word in (("name", "a model"), ("in_channels", "channels"), ("num_classes", "classes")):
        if held[name] != args[name]:
            message = f"{path} is for {word} {held[name]}, this run for {args[name]}. Start from another checkpoint"
            raise CheckpointError(message)
    model.load_state_dict(loaded.weights)


def _sampler(table: Any, rows: Rows, config: SegConfig) -> Sampler:
    labels = row_labels(table, rows, config.target)
    positives, negatives = rows[labels == 1], rows[labels == 0]
    if not len(positives):
        message = f"no training slab of split {config.split} shows a nodule, so nothing can be learnt"
        raise UsageError(message)
    if not config.negatives:
        return Shuffled(positives, config.seed, config.samples or None)
    if not config.ratio or not len(negatives):
        return Shuffled(rows, config.seed, config.samples or None)
    return balanced(positives, negatives, config.seed, config.samples or len(rows), config.ratio)


def _validation(store: Store, parts: tuple[Rows, Rows], loader: SlabLoader, config: SegConfig, show: bool) -> ValSlices:
    """Whole slices of the held-out scans where the store has them, else the held-out slabs."""
    table, (train_rows, val_rows) = store.slabs, parts
    val_series = sorted(set(table["series_uid"].iloc[val_rows]))
    are_held_out = not set(val_series) & set(table["series_uid"].iloc[train_rows])
    if are_held_out and store.scans.set_index("series_uid")["volume_file"].loc[val_series].notna().all():
        context = store.slab_shape[0]
        return held_out_volumes(store, val_series, context, VAL_BATCH, config.val_slices, show_progress=show)
    return held_out_slabs(loader, table, val_rows)


def _name_of(folder: ImageFolder) -> str:
    """What tells folders of images apart: their masks' values and numbers of images."""
    return f"images {len(folder.train)}+{len(folder.test)} of values {' '.join(map(str, folder.values))}"
