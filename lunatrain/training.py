"""Put a run together: store, rows, model and settings in; a `Trainer` out. And find runs again."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lunaprep.store.reader import open_store
from lunatrain.augment import Augmentation
from lunatrain.checkpoint import BEST, LAST, Loaded, load_checkpoint, load_newest
from lunatrain.config import Config, TrainConfig, config_from_json
from lunatrain.crop_kind import kind_of_store
from lunatrain.data import CropLoader
from lunatrain.distributed import Processes
from lunatrain.errors import CheckpointError, UsageError
from lunatrain.labelled import find_examples, order_of
from lunatrain.loop import Run, Trainer
from lunatrain.mapping import Io, open_crops
from lunatrain.models import build_model, freeze_all_but, load_book_state, prepare_for
from lunatrain.sampling import EpochPlan
from lunatrain.tasks.classify import Classify
from lunatrain.tasks.classify_many import ClassifyMany

RUNS = Path("runs")
RUN_FILE = "run.json"
CLASSIFIERS = ("cls", "mal")
"""Tasks whose runs `lunatrain eval` can evaluate."""
VAL_BATCH = 256


@dataclass(frozen=True)
class TrainOptions:
    """What `train` is asked besides the settings of the run."""

    store: Path
    run: Path
    device: str = "auto"
    init: Path | None = None
    io: Io = "auto"
    processes: Processes = field(default_factory=Processes)
    slices: Path | None = None
    """Folder of the DICOM slices, where `store` is a table of boxes."""
    show_progress: bool = False
    """Whether to draw bars on stderr, where it is a terminal."""


def new_run(name: str) -> Path:
    """A folder for a new run, named by the time."""
    stamp = time.strftime("%Y-%m-%d_%H.%M.%S")
    run = RUNS / f"{stamp}-{name}"
    return run if not run.exists() else RUNS / f"{stamp}-{time.time_ns() % 1_000_000:06d}-{name}"


def newest_run(*names: str) -> Path:
    """The latest run under ./runs of one of the given tasks that has a checkpoint: not one that failed to start.

    Raises
    ------
    UsageError
        There is none.
    """
    tasks = "|".join(names)
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d_\d\d\.\d\d\.\d\d(-\d{{6}})?-({tasks})")
    runs = sorted(path for path in RUNS.glob("*") if pattern.fullmatch(path.name) and _checkpoint_in(path))
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
    checkpoint = _checkpoint_in(run)
    if checkpoint is not None:
        return checkpoint
    got = "has no checkpoint" if run.is_dir() else "is not there"
    message = f"{run} {got}. Name a run that has trained, or a checkpoint"
    raise UsageError(message)


def require_free(run: Path) -> None:
    """Refuse a folder for a new run that holds one already.

    Raises
    ------
    UsageError
        It does.
    """
    if _checkpoint_in(run) is not None:
        message = f"{run} holds a run already. Go on with --resume, or give another --out"
        raise UsageError(message)


def _checkpoint_in(run: Path) -> Path | None:
    return next((run / name for name in (BEST, LAST) if (run / name).exists()), None)


def model_of(checkpoint: Path) -> str:
    """Name of the model that a checkpoint holds."""
    if checkpoint.suffix == ".state":
        return "luna"
    return str(_classifier_args(load_checkpoint(checkpoint))["name"])


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


def slices_of(run: Path) -> Path | None:
    """The folder of slices a run was trained on, where its run.json names one."""
    try:
        return Path(json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["slices"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_store(options: TrainOptions) -> None:
    """Write into the run's folder where its store is."""
    options.run.mkdir(parents=True, exist_ok=True)
    store = {"store": str(options.store.resolve())}
    if options.slices is not None:
        store["slices"] = str(options.slices.resolve())
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
    examples = find_examples(store, config)
    config = replace(config, classes=examples.classes)
    sampler = order_of(store, examples, config)
    plan = EpochPlan(sampler, config.batch_size, processes.rank, processes.world_size)
    torch.manual_seed(config.seed)
    num_classes = len(config.classes) or 2
    args = {"name": config.model, "num_classes": num_classes, "crop_shape": list(store.crop_shape)}
    args["crops"] = kind_of_store(store).to_json()
    model = _network(config, num_classes, store.crop_shape, options.init)
    model = processes.share_statistics(prepare_for(device, model), device)
    frozen = freeze_all_but(model, config.finetune)
    crops = open_crops(store, options.io)
    loader = CropLoader(crops, plan.rank_batch_size, device=device)
    val_loader = CropLoader(crops, max(VAL_BATCH, config.batch_size), device=device)
    augmentation = Augmentation.parse(config.augment)
    given = (examples.labels, augmentation, config.label_smoothing, examples.val_rows, val_loader, processes)
    task = ClassifyMany(*given, config.classes) if config.classes else Classify(*given)
    store_id = store.record["store_id"]
    return Trainer(
        Run(options.run, config, device, task, model, plan, loader, store_id, args, processes, frozen, examples.notes)
    )


def resume_training(options: TrainOptions) -> tuple[Trainer, Loaded]:
    """Put a run together again as its newest good checkpoint has it.

    Raises
    ------
    CheckpointError
        There is none, or the store is another one.
    """
    return resume_with(options, open_training, TrainConfig, _classifier_args)


def resume_with(
    options: TrainOptions,
    open_run: Callable[[TrainOptions, Config], Trainer],
    kind: type[Config],
    check: Callable[[Loaded], object],
) -> tuple[Trainer, Loaded]:
    """Resume a run of any task.

    Parameters
    ----------
    options : TrainOptions
    open_run : callable
        Puts a run of the task together.
    kind : type
        Of its settings.
    check : callable
        Raises CheckpointError where a checkpoint is of another task.

    Raises
    ------
    CheckpointError
        As `resume_training`.
    """
    loaded = load_newest(options.run)
    if loaded is None:
        message = f"{options.run} has no checkpoint to go on from. Start it without --resume"
        raise CheckpointError(message)
    check(loaded)
    trainer = open_run(options, config_from_json(loaded.state["config"], kind))
    if loaded.state["store_id"] != trainer.run.store_id:
        message = (
            f"{options.run} was trained on store {loaded.state['store_id']}, this is {trainer.run.store_id}. "
            "Give the same data, or start a new run with --init"
        )
        raise CheckpointError(message)
    trainer.load(loaded.state)
    return trainer, loaded


def _network(
    config: TrainConfig, num_classes: int, crop_shape: tuple[int, int, int], init: Path | None
) -> torch.nn.Module:
    """A fresh network, or one with a checkpoint's weights: of the last layer only where the classes are the same."""
    model = build_model(config.model, num_classes, crop_shape)
    if init is None:
        return model
    held = _classes_of(init)
    if held == config.classes:
        load_weights(model, init, config.model)
        return model
    donor = build_model(config.model, len(held) or 2, crop_shape)
    load_weights(donor, init, config.model)
    donor.head_linear = model.head_linear
    return donor


def _classes_of(checkpoint: Path) -> tuple[str, ...]:
    """Names of the classes that a checkpoint tells apart; none where its label is true or false."""
    if checkpoint.suffix == ".state":
        return ()
    return tuple(load_checkpoint(checkpoint).state["config"].get("classes", ()))


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
    loaded = load_checkpoint(path)
    held = _classifier_args(loaded)["name"]
    if held != name:
        message = f"{path} holds a model {held!r}, not {name!r}. Give --model {held}"
        raise CheckpointError(message)
    try:
        model.load_state_dict(loaded.weights)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()[:120]
        message = f"{path} does not fit the model: {first}. Was it trained on crops of another shape?"
        raise CheckpointError(message) from error


def _classifier_args(loaded: Loaded) -> dict[str, Any]:
    args: dict[str, Any] = loaded.state["model_args"]
    if "crop_shape" not in args:
        held = "gives lung boxes" if args.get("kind") == "boxes" else "is a segmentation"
        message = f"{loaded.path} is no classifier, it {held}. Name a run of 'lunatrain cls' or 'mal'"
        raise CheckpointError(message)
    return args


def load_model(path: Path, crop_shape: tuple[int, int, int]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a checkpoint, ready to predict, and the checkpoint's facts.

    These are its config, progress, store_id and model_args.

    A .state file of the book is taken for its LunaModel.
    """
    if path.suffix == ".state":
        model = build_model("luna", 2, crop_shape)
        load_book_state(path, model)
        return model, {"config": {}, "progress": {}, "store_id": None, "model_args": {}}
    loaded = load_checkpoint(path)
    state, args = loaded.state, _classifier_args(loaded)
    if tuple(args["crop_shape"]) != crop_shape:
        message = (
            f"{path} was trained on crops {tuple(args['crop_shape'])}, the store has {crop_shape}. Take another store"
        )
        raise CheckpointError(message)
    model = build_model(args["name"], args["num_classes"], crop_shape)
    model.load_state_dict(loaded.weights)
    return model, {key: state[key] for key in ("config", "progress", "store_id", "model_args")}
