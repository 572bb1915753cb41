"""The training commands: each reads its options, puts a run together, trains, prints. Also what all commands share."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from lunaprep.cli_options import UserPath, json_option, table_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from lunatrain.config import TrainConfig
    from lunatrain.distributed import Processes
    from lunatrain.loop import Trainer


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


store_path = UserPath()
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_CLASSIFIERS = "residual or luna (the book's).  [default: residual]"
_init_path = UserPath(exists=True)
_AMP = click.Choice(["auto", "bf16", "fp16", "off"])


def all_of(*options: "Callable[[Any], Any]") -> "Callable[[Any], Any]":
    """Several options as one decorator, in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _run_options(
    unit: str,
    batch_size: int,
    model: str,
    augment: str,
    transforms: str = "flip,offset,scale,rotate,noise",
    defaults: tuple[str, str, str, str] = ("10", "adamw", "one-cycle", "best.pt alone"),
) -> "Callable[[Any], Any]":
    """Options of every training command; those that differ between them say so in their help.

    `defaults` are those of --epochs, --optimizer, --schedule and --keep-best.
    """
    epochs, optimizer, schedule, keep_best = defaults
    return all_of(
        click.option(
            "--store", type=store_path, help="The store's folder or its crops.h5.  [default: crops.h5, or the run's]"
        ),
        click.option("--out", "run", type=UserPath(file_okay=False),
                     help="Folder of the run.  [default: runs/TIME-TASK]"),
        click.option("--split", help="series, candidate, fold:K, or all: nothing is held out.  [default: series]"),
        click.option("--epochs", type=int, help=f"[default: {epochs}]"),
        click.option("--samples", type=int,
                     help=f"Samples of an epoch.  [default: as many as there are training {unit}s]"),
        click.option("--batch-size", type=int, help=f"Of all processes together.  [default: {batch_size}]"),
        click.option("--augment", metavar="LIST",
                     help=f"{transforms}; '' for none.  [default: {augment}]"),
        click.option("--model", help=model),
        click.option("--optimizer", type=click.Choice(["adamw", "adam", "sgd"]), help=f"[default: {optimizer}]"),
        click.option("--lr", type=float, help="Learning rate, the highest of a one-cycle schedule."),
        click.option("--schedule", type=click.Choice(["one-cycle", "plateau", "constant"]),
                     help=f"plateau: lower where the score stands still.  [default: {schedule}]"),
        click.option("--patience", type=int,
                     help="Stop after so many epochs without a better score.  [default: never]"),
        click.option("--keep-best", type=int, metavar="K",
                     help=f"Keep the weights of the K best epochs.  [default: {keep_best}]"),
        click.option("--amp", type=_AMP, help="Mixed precision.  [default: auto: on CUDA only]"),
        click.option("--compile/--no-compile", default=None, help="torch.compile the model.  [default: no]"),
        device_option,
        click.option("--io", type=click.Choice(["auto", "mmap", "willneed", "pread"]),
                     default="auto", show_default=True,
                     help="How crops are read: mmap from memory, willneed from a cold disk, pread over a network."),
        click.option("--seed", type=int, help="[default: 0]"),
        click.option("--resume", is_flag=True,
                     help="Go on with the run (--out, else the newest) from its last good checkpoint."),
        json_option,
    )  # fmt: skip


@click.command()
@_run_options("crop", 32, _CLASSIFIERS, "flip,rotate")
@click.option(
    "--preset", type=click.Choice(["book-ch11", "book-ch12"]), help="The book's settings; others override them."
)
@click.option(
    "--target",
    type=click.Choice(["nodule", "malignant", "subtype"]),
    help="What to learn; subtype is of several classes.  [default: nodule]",
)
@click.option("--balanced/--no-balanced", default=None, help="As many of each class in a batch.  [default: balanced]")
@click.option("--ratio", type=int, help="Negatives for each positive, where balanced.  [default: 1]")
@click.option(
    "--shuffle",
    type=click.Choice(["all", "shards"]),
    help="With --no-balanced: mix all crops, or those of some shards at a time, for a store larger than memory."
    "  [default: all]",
)
@click.option(
    "--init",
    type=_init_path,
    help="Start from the weights of a run, of a checkpoint, or of a .state file of the book.",
)
@click.option("--finetune", type=int, metavar="N", help="Train the last N stages of the model alone.  [default: all]")
def cls(**options: Any) -> None:
    """Train a classifier on the crops of a store.

    Writes checkpoints (last.pt, best.pt), metrics.jsonl and TensorBoard events into the run's folder. Ctrl-C leaves a
    checkpoint; --resume goes on as if nothing had happened. On several GPUs: torchrun --nproc-per-node gpu -m
    lunatrain cls ...

    \b
    Example:
        lunatrain cls --store store/crops.h5
        lunatrain cls --store store/crops.h5 --preset book-ch12 --samples 20000 --epochs 5
        lunatrain cls --store store/crops.h5 --target subtype --init runs/2026-11-22_10.00.00-cls
        lunatrain cls --store store/crops.h5 --resume
    """
    _train("cls", _config, **options)


@click.command()
@click.option(
    "--images",
    type=UserPath(file_okay=False),
    help="Learn this folder's images instead: train/ and test/, each inputs/NAME.png and outputs/NAME.png.",
)
@_run_options("slab", 16, "unet (the book's).  [default: unet]", "all, with offset=0.03")
@click.option("--preset", type=click.Choice(["book-ch13"]), help="The book's settings; others override them.")
@click.option("--loss", type=click.Choice(["dice-bce", "book"]), help="[default: dice-bce]")
@click.option("--side", type=int, help="Side of the windows trained on.  [default: 64, of images 128]")
@click.option(
    "--balanced/--no-balanced", default=None, help="As many slabs with a nodule as without.  [default: balanced]"
)
@click.option("--ratio", type=int, help="Slabs without a nodule for each with one, where balanced.  [default: 1]")
@click.option("--prior", type=float, help="Probability a fresh network begins with.  [default: 0.02]")
@click.option("--val-slices", type=int, help="Most whole slices to validate on; 0 for no limit.  [default: 600]")
@click.option(
    "--init",
    type=_init_path,
    help="Start from the weights of a run of 'seg', of a checkpoint, or of a .state file of the book.",
)
def seg(images: Path | None, store: Path | None, **options: Any) -> None:
    """Train a U-Net to find the voxels of nodules, or the classes of an image's pixels.

    Learns windows of the store's slabs (a slice with three more on each side), and is judged on whole slices of
    held-out scans. Writes what 'cls' writes, and predictions/ (green right, red wrongly marked, orange missed) and
    curves.png.

    \b
    Example:
        lunatrain seg --store store/crops.h5
        lunatrain seg --images cells --epochs 40
        lunatrain seg --resume
    """
    if images is not None and store is not None:
        message = "--store and --images: choose one of them"
        raise click.UsageError(message)
    make_config = _seg_config if images is None else _image_config
    _train("seg", make_config, store=images or store, **options)


@click.command()
@_run_options("crop", 32, _CLASSIFIERS, "flip,rotate")
@click.option(
    "--init", type=_init_path, help="A run of 'cls', or a checkpoint, to go on from.  [default: the newest run of cls]"
)
@click.option("--finetune", type=int, metavar="N", help="Last stages that learn; 1 is the linear layer.  [default: 2]")
def mal(init: Path | None, resume: bool, **options: Any) -> None:
    """Fine-tune a nodule classifier to tell malignant nodules from benign ones.

    Learns the last stages anew from the nodules whose malignancy is known (half malignant, a quarter benign, a quarter
    other candidates); what is frozen keeps its batch-norm statistics. The score is taken on nodules alone: 'lunatrain
    eval' puts the AUC of their diameter beside it.

    \b
    Example:
        lunatrain mal --store store/crops.h5 --init runs/2026-11-22_10.00.00-cls
        lunatrain eval runs/2026-11-22_11.00.00-mal
    """
    from lunatrain import training

    if not resume:
        init = training.best_of(init or training.newest_run("cls"))
        options["model"] = options["model"] or training.model_of(init)
    _train("mal", _mal_config, init=init, resume=resume, **options)


@click.command()
@_run_options(
    "slice", 32, "resnet or depthwise.  [default: resnet]", "all of them", "flip,gamma,offset,scale,rotate",
    ("20", "adam", "plateau", "3"),
)  # fmt: skip
@click.option("--boxes", type=table_path, help="Learn this CSV's boxes instead: Image,Xmin,Ymin,Xmax,Ymax, fractions.")
@click.option(
    "--slices",
    type=UserPath(file_okay=False, exists=True),
    help="Folder of the DICOM files that --boxes names.  [default: the CSV's]",
)
@click.option("--side", type=int, help="Rows and columns that slices are brought to.  [default: 96]")
@click.option("--slice-mm", type=float, help="Distance of the slices that are learnt.  [default: 5]")
@click.option("--init", type=_init_path, help="Start from the weights of a run of 'loc', or of a checkpoint.")
def loc(boxes: Path | None, store: Path | None, **options: Any) -> None:
    """Train a network that gives the box around the lungs in a slice.

    Learns the boxes of a store's lung masks, or those of a CSV file and its DICOM slices. Writes what 'cls' writes, the
    weights of the best epochs (epoch-NNN.pt), predictions/ (slices with both boxes, the worst first) and curves.png.
    Train one of each --model, and name both where boxes are wanted: 'lunatrain eval', 'lunatrain detect --loc'.

    \b
    Example:
        lunatrain loc --store store/crops.h5
        lunatrain loc --boxes boxes.csv --slices dicom --model depthwise
        lunatrain eval runs/A-loc runs/B-loc
    """
    if boxes is not None and store is not None:
        message = "--store and --boxes: choose one of them"
        raise click.UsageError(message)
    _train("loc", _loc_config, store=boxes or store, **options)


@dataclass(frozen=True)
class _Given:
    """What every training command is given besides the settings of its run."""

    task: str
    store: Path | None
    run: Path | None
    device: str
    io: Any
    init: Path | None
    resume: bool
    as_json: bool
    slices: Path | None = None

    @property
    def home(self) -> Any:
        """The module that puts runs of the task together."""
        from lunatrain import localisation, segmentation, training

        return {"seg": segmentation, "loc": localisation}.get(self.task, training)


def _train(task: str, make_config: "Callable[[dict[str, Any]], TrainConfig]", **options: Any) -> None:
    """Train a new run, or go on with one; what `_Given` does not name are settings."""
    from lunatrain.distributed import join_processes

    given = _Given(task, **{name: options.pop(name) for name in _Given.__dataclass_fields__ if name in options})
    if given.resume:
        _refuse_settings({"init": given.init, **options})
    with join_processes(given.device) as processes:
        trainer = _go_on(given, processes) if given.resume else _begin(given, make_config(options), processes)
        _run_to_the_end(trainer, given.as_json)


def _refuse_settings(settings: dict[str, Any]) -> None:
    """Refuse what a resumed run would not heed."""
    from lunatrain.errors import UsageError

    names = ", ".join(_option(name, value) for name, value in settings.items() if value is not None)
    if names:
        message = f"{names}: a resumed run keeps its settings. Leave it out, or start a new run with --init"
        raise UsageError(message)


def _option(name: str, value: Any) -> str:
    """What a setting was typed as."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def _go_on(given: _Given, processes: "Processes") -> "Trainer":
    """The run as its last good checkpoint has it."""
    from lunatrain.training import TrainOptions, newest_run, slices_of, store_of

    run = given.run or newest_run(given.task)
    store, slices = given.store or store_of(run), given.slices or slices_of(run)
    options = TrainOptions(store, run, given.device, None, given.io, processes, slices, show_progress=True)
    trainer, loaded = given.home.resume_training(options)
    if processes.is_first:
        at = f"epoch {trainer.progress.epoch + 1}, step {trainer.progress.step}"
        if loaded.fault is not None:
            click.echo(f"lunatrain: {loaded.fault}; going on from {loaded.path.name}", err=True)
        click.echo(f"{loaded.path}: going on at {at}", err=True)
    return cast("Trainer", trainer)


def _begin(given: _Given, config: "TrainConfig", processes: "Processes") -> "Trainer":
    """A new run, noted in its folder."""
    from lunatrain.training import TrainOptions, best_of, new_run, note_store, require_free

    run = given.run or Path(processes.agree(str(new_run(given.task))))
    require_free(run)
    store, init = given.store or Path("crops.h5"), best_of(given.init) if given.init else None
    options = TrainOptions(store, run, given.device, init, given.io, processes, given.slices, show_progress=True)
    trainer = given.home.open_training(options, config)
    if processes.is_first:
        note_store(options)
        for note in trainer.run.notes:
            click.echo(f"lunatrain: {note}", err=True)
        if trainer.run.config.split == "all":
            click.echo("lunatrain: --split all: figures are those of the training crops themselves", err=True)
    return cast("Trainer", trainer)


def _run_to_the_end(trainer: "Trainer", as_json: bool) -> None:
    """Train, and print the best epoch."""
    from lunatrain.log import RunLog, figure_text
    from lunatrain.loop import train

    run = trainer.run.path
    if not trainer.run.processes.is_first:
        train(trainer, None)
        return
    with RunLog(run) as log:
        log.forget_after(trainer.progress.samples)
        done = train(trainer, log, show_progress=True)
    best = done.best_figures
    if as_json:
        plain = {name: None if math.isnan(value) else value for name, value in best.items()}
        about = {"run": str(run), "epochs": done.epoch, "samples": done.samples, "epoch": done.best_epoch}
        print_json({**about, "part": "val", **plain})
    else:
        shown = [name for name in trainer.run.task.shown if name in best]
        figures = ", ".join(f"{name} {figure_text(best[name])}" for name in shown)
        click.echo(f"{run}: best epoch {done.best_epoch + 1} of {done.epoch}: {figures}")


def _config(settings: dict[str, Any]) -> "TrainConfig":
    from lunatrain.config import PRESETS, TrainConfig

    preset = settings.pop("preset")
    return _changed(PRESETS[preset] if preset else TrainConfig(), settings)


def _seg_config(settings: dict[str, Any]) -> "TrainConfig":
    from lunatrain.segmentation_config import SEG_PRESETS, SegConfig

    preset = settings.pop("preset")
    return _changed(SEG_PRESETS[preset] if preset else SegConfig(), settings)


def _image_config(settings: dict[str, Any]) -> "TrainConfig":
    from lunatrain.errors import UsageError
    from lunatrain.segmentation_config import IMAGES

    preset = settings.pop("preset")
    of_slabs = {name: settings[name] for name in ("balanced", "ratio", "split", "val_slices")}
    names = [_option(name, value) for name, value in {"preset": preset, **of_slabs}.items() if value is not None]
    if names:
        message = f"{', '.join(names)}: of a store's slabs alone, --images has a test/ folder. Leave it out"
        raise UsageError(message)
    return _changed(IMAGES, settings)


def _changed(base: "TrainConfig", settings: dict[str, Any]) -> "TrainConfig":
    """Settings with those replaced that were given."""
    from dataclasses import replace

    from lunatrain.config import TARGETS
    from lunatrain.errors import UsageError

    given = {name: value for name, value in settings.items() if value is not None}
    if "target" in given:
        given["target"] = TARGETS[given["target"]]
    balanced = given.pop("balanced", None)
    if balanced is not None:
        if "ratio" in given and bool(given["ratio"]) != balanced:
            message = f"{_option('balanced', balanced)} and --ratio {given['ratio']}: choose one of them"
            raise UsageError(message)
        given.setdefault("ratio", max(1, base.ratio) if balanced else 0)
    return replace(base, **given)


def _loc_config(settings: dict[str, Any]) -> "TrainConfig":
    from lunatrain.localisation_config import LocConfig

    return _changed(LocConfig(), settings)


def _mal_config(settings: dict[str, Any]) -> "TrainConfig":
    from lunatrain.config import MALIGNANCY

    return _changed(MALIGNANCY, settings)
