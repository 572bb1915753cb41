"""Put a run together: store, rows, model and settings in; a `Trainer` out. And find runs again."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lunaprep.store.reader import Store, open_store
from lunatrain.augment import Augmentation
from lunatrain.checkpoint import BEST, LAST, Loaded, load_checkpoint, load_newest
from lunatrain.config import TrainConfig, config_from_json
from lunatrain.data import CropLoader
from lunatrain.distributed import Processes
from lunatrain.errors import CheckpointError, UsageError
from lunatrain.loop import Run, Trainer
from lunatrain.mapping import Io, open_crops
from lunatrain.models import build_model, freeze_all_but, load_book_state, prepare_for
from lunatrain.sampling import (
    EpochPlan,
    Mixed,
    Rows,
    Sampler,
    ShardShuffled,
    Shuffled,
    balanced,
    row_labels,
    select_rows,
)
from lunatrain.tasks.classify import Classify

RUNS = Path("runs")
RUN_FILE = "run.json"
CLASSIFIERS = ("cls", "mal")
"""Tasks whose runs `lunatrain eval` can evaluate."""
VAL_BATCH = 256
UNKNOWN, OTHER = -1, -2


@dataclass(frozen=True)
class TrainOptions:
    """What `train` is asked besides the settings of the run."""

    store: Path
    run: Path
    device: str = "auto"
    init: Path | None = None
    io: Io = "auto"
    processes: Processes = field(default_factory=Processes)


def new_run(name: str) -> Path:
    """A folder for a new run, named by the time."""
    stamp = time.strftime("%Y-%m-%d_%H.%M.%S")
    run = RUNS / f"{stamp}-{name}"
    return run if not run.exists() else RUNS / f"{stamp}-{time.time_ns() % 1_000_000:06d}-{name}"


def newest_run(*names: str) -> Path:
    """The latest run under ./runs of one of the given tasks.

    Raises
    ------
    UsageError
        There is none.
    """
    tasks = "|".join(names)
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d_\d\d\.\d\d\.\d\d(-\d{{6}})?-({tasks})")
    runs = sorted(path for path in RUNS.glob("*") if pattern.fullmatch(path.name) and path.is_dir())
    if not runs:
        message = f"there is no run of {names[0]} under ./{RUNS}. Train one with 'lunatrain {names[0]}', or name one"
        raise UsageError(message)
    return runs[-1]


def best_of(run: Path) -> Path:
    """The checkpoint a run's folder stands for: the best, else the last one. A file stands for itself.

    Raises
    ------
    UsageError
        A folder without one, or nothing there.
    """
    if run.is_file():
        return run
    for name in (BEST, LAST):
        if (run / name).exists():
            return run / name
    got = "has no checkpoint" if run.is_dir() else "is not there"
    message = f"{run} {got}. Name a run that has trained, or a checkpoint"
    raise UsageError(message)


def model_of(checkpoint: Path) -> str:
    """Name of the model that a checkpoint holds."""
    if checkpoint.suffix == ".state":
        return "luna"
    return str(_classifier_args(checkpoint, load_checkpoint(checkpoint).state)["name"])


def store_of(run: Path) -> Path:
    """The store a run was trained on, as its run.json says.

    Raises
    ------
    UsageError
        The run does not say.
    """
    try:
        return Path(json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["store"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{run} does not say which store it was trained on. Give --store"
        raise UsageError(message) from error


def note_store(options: TrainOptions) -> None:
    """Write into the run's folder where its store is."""
    options.run.mkdir(parents=True, exist_ok=True)
    store = {"store": str(options.store.resolve())}
    (options.run / RUN_FILE).write_text(json.dumps(store, indent=2) + "\n", encoding="utf-8")


def pick_device(name: str) -> torch.device:
    """The device a name stands for; auto takes CUDA where there is one.

    Raises
    ------
    UsageError
        No such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {name}: {str(error).splitlines()[0][:100]}. Use auto or cpu"
        raise UsageError(message) from error
    return device


def open_training(options: TrainOptions, config: TrainConfig) -> Trainer:
    """Put a new run together.

    Raises
    ------
    UsageError
        The store lacks what the settings ask for.
    LunaprepError
        The store is not whole.
    """
    store = open_store(options.store)
    processes = options.processes
    device = pick_device(options.device)
    rows, val_rows, labels = _rows_and_labels(store, config)
    _check_classes(labels, rows, val_rows, config)
    sampler = _sampler(store, rows, labels, config)
    plan = EpochPlan(sampler, config.batch_size, processes.rank, processes.world_size, not processes.is_alone)
    torch.manual_seed(config.seed)
    args = {"name": config.model, "num_classes": 2, "crop_shape": list(store.crop_shape)}
    model = processes.share_statistics(prepare_for(device, build_model(config.model, 2, store.crop_shape)), device)
    if options.init is not None:
        load_weights(model, options.init, config.model)
    frozen = freeze_all_but(model, config.finetune)
    crops = open_crops(store, options.io)
    loader = CropLoader(crops, plan.rank_batch_size, device=device)
    val_loader = CropLoader(crops, max(VAL_BATCH, config.batch_size), device=device)
    augmentation = Augmentation.parse(config.augment)
    task = Classify(labels, augmentation, config.label_smoothing, val_rows, val_loader, processes)
    store_id = store.record["store_id"]
    return Trainer(Run(options.run, config, device, task, model, plan, loader, store_id, args, processes, frozen))


def resume_training(options: TrainOptions) -> tuple[Trainer, Loaded]:
    """Put a run together again as its newest good checkpoint has it.

    Raises
    ------
    CheckpointError
        There is none, or the store is another one.
    """

    def reopen(loaded: Loaded) -> Trainer:
        _classifier_args(loaded.path, loaded.state)
        return open_training(options, config_from_json(loaded.state["config"]))

    return resume_with(options, reopen)


def resume_with(options: TrainOptions, reopen: Callable[[Loaded], Trainer]) -> tuple[Trainer, Loaded]:
    """Resume a run of any task: `reopen` puts it together as a checkpoint says.

    Raises
    ------
    CheckpointError
        As `resume_training`.
    """
    loaded = load_newest(options.run)
    if loaded is None:
        message = f"{options.run} has no checkpoint to go on from. Start it without --resume"
        raise CheckpointError(message)
    trainer = reopen(loaded)
    if loaded.state["store_id"] != trainer.run.store_id:
        message = (
            f"{options.run} was trained on store {loaded.state['store_id']}, this is {trainer.run.store_id}. "
            "Give the same data, or start a new run with --init"
        )
        raise CheckpointError(message)
    trainer.load(loaded.state)
    return trainer, loaded


def load_weights(model: torch.nn.Module, path: Path, name: str) -> None:
    """Fill a model from a checkpoint of ours, or from one of the book's .state files.

    Raises
    ------
    CheckpointError
        Damaged, or the weights of another model.
    """
    if path.suffix == ".state":
        load_book_state(path, model)
        return
    state = load_checkpoint(path).state
    _classifier_args(path, state)
    if state["model_args"]["name"] != name:
        held = state["model_args"]["name"]
        message = f"{path} holds a model {held!r}, not {name!r}. Give --model {held}"
        raise CheckpointError(message)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()[:120]
        message = f"{path} does not fit the model: {first}. Was it trained on crops of another shape?"
        raise CheckpointError(message) from error


def _classifier_args(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = state["model_args"]
    if "crop_shape" not in args:
        message = f"{path} is no classifier but a segmentation. Name a run of 'lunatrain cls' or 'mal'"
        raise CheckpointError(message)
    return args


def load_model(path: Path, crop_shape: tuple[int, int, int]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a checkpoint, ready to predict, and the checkpoint's facts (config, epoch, samples, store_id).

    A .state file of the book is taken for its LunaModel.
    """
    if path.suffix == ".state":
        model = build_model("luna", 2, crop_shape)
        load_book_state(path, model)
        return model, {"config": {}, "progress": {}, "store_id": None}
    state = load_checkpoint(path).state
    args = _classifier_args(path, state)
    if tuple(args["crop_shape"]) != crop_shape:
        message = (
            f"{path} was trained on crops {tuple(args['crop_shape'])}, the store has {crop_shape}. Take another store"
        )
        raise CheckpointError(message)
    model = build_model(args["name"], args["num_classes"], crop_shape)
    model.load_state_dict(state["model"])
    return model, {key: state[key] for key in ("config", "progress", "store_id")}


def _rows_and_labels(store: Store, config: TrainConfig) -> tuple[Rows, Rows, npt.NDArray[np.int64]]:
    """Rows to train on and to be judged on, and a label for each row of the manifest that is one of them."""
    rows = select_rows(store.manifest, config.split, "train", config.target)
    val_rows = select_rows(store.manifest, config.split, "val", config.target)
    labels = np.full(len(store), UNKNOWN, dtype=np.int64)
    for known in (rows, val_rows):
        labels[known] = row_labels(store.manifest, known, config.target)
    if config.with_others:
        train = select_rows(store.manifest, config.split, "train")
        others = train[(labels[train] == UNKNOWN) & ~store.manifest["is_nodule"].to_numpy(dtype=np.bool_)[train]]
        labels[others] = OTHER
        rows = np.sort(np.concatenate([rows, others]))
    return rows, val_rows, labels


def _check_classes(labels: Any, rows: Rows, val_rows: Rows, config: TrainConfig) -> None:
    for part, members in (("train", rows), ("val", val_rows)):
        for value, word in ((1, "true"), (0, "false")):
            if not (labels[members] == value).any():
                message = (
                    f"no {part} crop of split {config.split} has {config.target} {word}, so nothing can be learnt or "
                    "judged. Take another split, or more scans"
                )
                raise UsageError(message)


def _sampler(store: Store, rows: Rows, labels: npt.NDArray[np.int64], config: TrainConfig) -> Sampler:
    """The order of the rows; turns the label of others into that of a negative."""
    groups = tuple(rows[labels[rows] == value] for value in (1, 0, OTHER))
    labels[labels == OTHER] = 0
    count = config.samples or len(rows)
    if config.ratio and len(groups[2]):
        negatives = [1, 2] * config.ratio  # of two turns
        pattern = (0, *negatives[: config.ratio], 0, *negatives[config.ratio :])
        return Mixed(groups, pattern, config.seed, count)
    if config.ratio:
        return balanced(groups[0], groups[1], config.seed, count, config.ratio)
    if config.shuffle == "shards":
        shards = tuple(shard.rows for shard in store.shards)
        return ShardShuffled(rows, config.seed, config.samples or None, shards)
    return Shuffled(rows, config.seed, config.samples or None)
