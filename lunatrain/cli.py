"""The command line: each command reads its options, calls the library, prints. The home of click."""

import errno
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lunaprep.errors import LunaprepError
from lunatrain import __version__
from lunatrain.errors import LunatrainError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lunatrain.config import TrainConfig
    from lunatrain.loop import Trainer

EXIT_NO_SPACE = 5
EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    """Turn our errors into one line and an exit code; leave a bug its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LunatrainError, LunaprepError) as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; a training run has left a checkpoint, go on with --resume", EXIT_INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                _fail("the reader of the output went away", 1)
            place = f"{error.filename}: " if error.filename else ""
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            _fail(f"{place}{error.strerror or error}", EXIT_NO_SPACE if full else 1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    click.echo(f"lunatrain: {message}", err=True)
    raise SystemExit(code)


_table = click.Path(path_type=Path, dir_okay=False, exists=True)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lunatrain")
def cli() -> None:
    """Train lung nodule networks on a lunaprep store, and evaluate them as the LUNA16 challenge does.

    \b
    Example:
        lunatrain cls --store store/crops.h5
        lunatrain eval
        lunatrain froc submission.csv --annotations annotations.csv --excluded annotations_excluded.csv
            --seriesuids seriesuids.csv
    """


_store_path = click.Path(path_type=Path)
_device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_AMP = click.Choice(["auto", "bf16", "fp16", "off"])


def _all_of(*options: "Callable[[Any], Any]") -> "Callable[[Any], Any]":
    """Several options as one decorator, in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_run_options = _all_of(
    click.option(
        "--store", type=_store_path, help="The store's folder or its crops.h5.  [default: crops.h5, or the run's]"
    ),
    click.option("--out", "run", type=click.Path(path_type=Path, file_okay=False),
                 help="Folder of the run.  [default: runs/TIME-TASK]"),
    click.option("--split", help="series, candidate or fold:K.  [default: series]"),
    click.option("--epochs", type=int, help="[default: 10]"),
    click.option("--samples", type=int, help="Samples of an epoch.  [default: every training crop once]"),
    click.option("--batch-size", type=int, help="Of all processes together.  [default: 32]"),
    click.option("--augment", metavar="LIST", help="flip,offset,scale,rotate,noise; '' for none.  [default: all]"),
    click.option("--model", help="residual or luna (the book's).  [default: residual]"),
    click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), help="[default: adamw]"),
    click.option("--lr", type=float, help="Learning rate, the highest of a one-cycle schedule."),
    click.option("--schedule", type=click.Choice(["one-cycle", "constant"]), help="[default: one-cycle]"),
    click.option("--patience", type=int, help="Stop after so many epochs without a better score.  [default: never]"),
    click.option("--amp", type=_AMP, help="Mixed precision.  [default: auto: on CUDA only]"),
    click.option("--compile/--no-compile", default=None, help="torch.compile the model.  [default: no]"),
    _device_option,
    click.option("--io", type=click.Choice(["auto", "mmap", "willneed", "pread"]), default="auto", show_default=True,
                 help="How crops are read: mmap from memory, willneed from a cold disk, pread over a network."),
    click.option("--seed", type=int, help="[default: 0]"),
    click.option("--resume", is_flag=True,
                 help="Go on with the run (--out, else the newest) from its last good checkpoint."),
    _json_option,
)  # fmt: skip


@cli.command()
@_run_options
@click.option(
    "--preset", type=click.Choice(["book-ch11", "book-ch12"]), help="The book's settings; others override them."
)
@click.option("--target", type=click.Choice(["nodule", "malignant"]), help="What to learn.  [default: nodule]")
@click.option(
    "--balanced/--no-balanced", default=None, help="As many nodules as others in a batch.  [default: balanced]"
)
@click.option("--ratio", type=int, help="Negatives for each positive, where balanced.  [default: 1]")
@click.option(
    "--shuffle",
    type=click.Choice(["all", "shards"]),
    help="With --no-balanced: mix all crops, or those of some shards at a time, for a store larger than memory."
    "  [default: all]",
)
@click.option("--init", type=_table, help="Start from the weights of a checkpoint, or of a .state file of the book.")
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
        lunatrain cls --store store/crops.h5 --resume
    """
    _train_classifier("cls", _config, **options)


@cli.command()
@_run_options
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True),
    help="A run of 'cls', or a checkpoint, to go on from.  [default: the newest run of cls]",
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
    _train_classifier("mal", _mal_config, init=init, resume=resume, **options)


def _train_classifier(
    name: str,
    make_config: "Callable[[dict[str, Any]], TrainConfig]",
    *,
    store: Path | None,
    run: Path | None,
    device: str,
    io: Any,
    init: Path | None,
    resume: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    from lunatrain import training
    from lunatrain.distributed import join_processes

    with join_processes(device) as processes:
        if resume:
            run = run or training.newest_run(name)
            options = training.TrainOptions(store or training.store_of(run), run, device, None, io, processes)
            trainer, loaded = training.resume_training(options)
            progress = trainer.progress
            if processes.is_first:
                click.echo(f"{loaded.path}: going on at epoch {progress.epoch + 1}, step {progress.step}", err=True)
        else:
            run = run or Path(processes.agree(str(training.new_run(name))))
            options = training.TrainOptions(store or Path("crops.h5"), run, device, init, io, processes)
            trainer = training.open_training(options, make_config(settings))
            if processes.is_first:
                training.note_store(options)
        _run_to_the_end(trainer, as_json)


def _run_to_the_end(trainer: "Trainer", as_json: bool) -> None:
    """Train, and print the best epoch."""
    from lunatrain.log import RunLog, read_metrics
    from lunatrain.loop import train

    run = trainer.run.path
    if not trainer.run.processes.is_first:
        train(trainer, None)
        return
    with RunLog(run) as log:
        log.forget_after(trainer.progress.samples)
        done = train(trainer, log, show_progress=True)
    best = next(line for line in read_metrics(run) if line["part"] == "val" and line["epoch"] == done.best_epoch)
    if as_json:
        _print_json({"run": str(run), "epochs": done.epoch, "samples": done.samples, **best})
    else:
        shown = [name for name in trainer.run.task.shown if name in best]
        figures = ", ".join(f"{name} {_figure(best[name])}" for name in shown)
        click.echo(f"{run}: best epoch {done.best_epoch + 1} of {done.epoch}: {figures}")


@cli.command(name="eval")
@click.argument("run", required=False, type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--store", type=_store_path, help="The store's folder or its crops.h5.  [default: the run's]")
@click.option(
    "--checkpoint", type=_table, help="A checkpoint, or a .state file of the book.  [default: the run's best]"
)
@click.option("--split", help="series, candidate or fold:K.  [default: the run's]")
@click.option("--part", type=click.Choice(["val", "train", "all"]), default="val", show_default=True)
@click.option("--target", type=click.Choice(["nodule", "malignant"]), help="[default: the run's]")
@click.option(
    "--annotations", type=_table, help="annotations.csv, for the challenge's score.  [default: from the crops]"
)
@click.option("--excluded", type=_table, help="annotations_excluded.csv; marks on these don't count.")
@click.option(
    "--bootstrap", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Draws for intervals."
)
@_device_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="[default: a folder in the run's]")
@_json_option
def evaluate(as_json: bool, **options: Any) -> None:
    """Evaluate RUN (default: the newest) on a part of its split, as the LUNA16 challenge does.

    Writes report.html with pictures, predictions.csv in the challenge's format, and metrics.json.

    \b
    Example:
        lunatrain eval
        lunatrain eval runs/2026-11-22_10.00.00-cls --part all --annotations annotations.csv
        lunatrain eval --checkpoint book.state --store store/crops.h5
    """
    from lunatrain.evaluation import EvalOptions, run_evaluation

    done = run_evaluation(EvalOptions(**options))
    if as_json:
        _print_json(done.result.to_json())
    else:
        click.echo(done.result.text())
        click.echo(f"\n{done.out / 'report.html'}")


@cli.command()
@click.option(
    "--store", type=_store_path, default=Path("crops.h5"), show_default=True, help="The store's folder or its crops.h5."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=9, show_default=True, help="Alternating rounds; medians are told."
)
@click.option("--cold/--no-cold", default=True, show_default=True, help="Also read from the disk, past the page cache.")
@_json_option
def bench(store: Path, rounds: int, cold: bool, as_json: bool) -> None:
    """Measure crops a second from a store into batches, against this machine's own copy of the same crops.

    Takes about a minute, and up to 1 GB in the temporary folder.

    \b
    Example:
        lunatrain bench --store store/crops.h5
    """
    from lunatrain.bench import run_bench

    report = run_bench(store, rounds=rounds, cold=cold, progress=lambda what: click.echo(what, err=True))
    if as_json:
        _print_json(report.to_json())
    else:
        click.echo(report.to_text())


def _config(settings: dict[str, Any]) -> "TrainConfig":
    from dataclasses import replace

    from lunatrain.config import PRESETS, TrainConfig

    preset = settings.pop("preset")
    base = PRESETS[preset] if preset else TrainConfig()
    given = {name: value for name, value in settings.items() if value is not None}
    if "target" in given:
        given["target"] = f"is_{given['target']}"
    balanced = given.pop("balanced", None)
    if balanced is not None:
        given.setdefault("ratio", max(1, base.ratio) if balanced else 0)
    return replace(base, **given)


def _mal_config(settings: dict[str, Any]) -> "TrainConfig":
    from dataclasses import replace

    from lunatrain.config import MALIGNANCY

    return replace(MALIGNANCY, **{name: value for name, value in settings.items() if value is not None})


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@cli.command()
@click.argument("submission", type=_table)
@click.option("--annotations", type=_table, required=True, help="The challenge's annotations.csv.")
@click.option("--excluded", type=_table, help="The challenge's annotations_excluded.csv; marks on these don't count.")
@click.option("--no-excluded", is_flag=True, help="Do without --excluded. Not the challenge's score.")
@click.option("--seriesuids", type=_table, required=True, help="The scans that were searched, one id a line.")
@click.option("--bootstrap", type=click.IntRange(0), default=1000, show_default=True, metavar="N",
              help="Draws of scans for the 95 % interval; 0 for none.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for froc.png, froc.csv, missed.csv and marks.csv (the verdict on each mark).")  # fmt: skip
@_json_option
def froc(submission: Path, no_excluded: bool, out: Path | None, as_json: bool, **options: Any) -> None:
    """Score SUBMISSION, a CSV file of marks, by the rules of the LUNA16 challenge: FROC and CPM.

    SUBMISSION has the columns seriesuid, coordX, coordY, coordZ (mm) and probability. For a cross-validation,
    score the submissions of all folds in one file; for one fold, give --seriesuids with the scans of that fold.

    \b
    Example:
        lunatrain froc submission.csv --annotations annotations.csv --excluded annotations_excluded.csv
            --seriesuids seriesuids.csv --out froc
    """
    from lunatrain.froc import evaluate_froc, write_result
    from lunatrain.marks import read_annotations, read_marks, read_series_uids

    excluded = options["excluded"]
    if (excluded is None) != no_excluded:
        raise UsageError(_excluded_complaint(no_excluded))
    result = evaluate_froc(
        read_marks(submission),
        read_annotations(options["annotations"]),
        None if excluded is None else read_annotations(excluded),
        read_series_uids(options["seriesuids"]),
        options["bootstrap"],
        options["seed"],
    )
    for line in result.warnings:
        click.echo(f"lunatrain: warning: {line}", err=True)
    if out is not None:
        from lunatrain.plots import froc_picture

        write_result(result, out)
        froc_picture(result, out / "froc.png")
    if as_json:
        _print_json(result.to_json())
    else:
        click.echo(result.text())


def _excluded_complaint(no_excluded: bool) -> str:
    if no_excluded:
        return "--excluded and --no-excluded: choose one of them"
    return (
        "--excluded is missing: without it marks on excluded findings count as false positives, which is not the "
        "challenge's score. Name annotations_excluded.csv, or give --no-excluded"
    )


def main() -> None:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not sys.stderr.isatty():
        os.environ.setdefault("NO_COLOR", "1")
    cli(prog_name="lunatrain")
