"""The command line: each command reads its options, calls the library, prints. The home of click."""

import errno
import faulthandler
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from lunaprep.cli_options import UserPath, json_option, table_path
from lunaprep.errors import LunaprepError
from lunatrain import __version__
from lunatrain.cli_detect import detect
from lunatrain.cli_train import cls, device_option, loc, mal, print_json, seg, store_path
from lunatrain.errors import LunatrainError, UsageError

EXIT_NO_SPACE = 5
EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    """Turn our errors into one line and an exit code; leave a bug its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LunatrainError, LunaprepError) as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stop:  # one that has left a checkpoint says so
            _fail(str(stop) or "interrupted", EXIT_INTERRUPTED)
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


for _command in (cls, seg, mal, loc, detect):
    cli.add_command(_command)


@cli.command(name="eval")
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=UserPath(file_okay=False, exists=True))
@click.option("--store", type=store_path, help="The store's folder or its crops.h5.  [default: the run's]")
@click.option(
    "--checkpoint", type=table_path, help="A checkpoint, or a .state file of the book.  [default: the run's best]"
)
@click.option("--split", help="series, candidate, fold:K or all.  [default: the run's]")
@click.option("--part", type=click.Choice(["val", "train", "all"]), default="val", show_default=True)
@click.option("--target", type=click.Choice(["nodule", "malignant", "subtype"]), help="[default: the run's]")
@click.option(
    "--annotations", type=table_path, help="annotations.csv, for the challenge's score.  [default: from the crops]"
)
@click.option(
    "--excluded", type=table_path, help="annotations_excluded.csv; marks on these don't count. Goes with --annotations."
)
@click.option(
    "--bootstrap", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Draws for intervals."
)
@device_option
@click.option("--out", type=UserPath(file_okay=False), help="[default: a folder in the run's]")
@json_option
def evaluate(runs: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Evaluate RUN (default: the newest of 'cls' and 'mal') on a part of its split, as the LUNA16 challenge does.

    Writes report.html with pictures, predictions.csv in the challenge's format, and metrics.json. Of a run of 'cls
    --target subtype': a confusion matrix, figures of each class and the means of these, and predictions.csv with a
    probability for each class. Of runs of 'loc': the IoU of each and of their mean, predictions.csv with boxes, and
    boxes.png.

    \b
    Example:
        lunatrain eval
        lunatrain eval runs/2026-11-22_10.00.00-cls --part all --annotations annotations.csv
        lunatrain eval --checkpoint book.state --store store/crops.h5
        lunatrain eval runs/2026-11-22_12.00.00-loc runs/2026-11-22_13.00.00-loc
    """
    if runs and _evaluate_boxes(runs, as_json, options):
        return
    if len(runs) > 1:
        message = f"{runs[0]} and {len(runs) - 1} more: several runs are judged together of 'loc' alone. Name one"
        raise UsageError(message)
    from lunatrain.evaluation import EvalOptions, run_evaluation

    done = run_evaluation(EvalOptions(run=runs[0] if runs else None, **options))
    if as_json:
        print_json(done.result.to_json())
    else:
        click.echo(done.result.text())
        click.echo(f"\n{done.out / 'report.html'}")


def _evaluate_boxes(runs: tuple[Path, ...], as_json: bool, options: dict[str, Any]) -> bool:
    """Judge runs of 'loc'; False where the first is none."""
    from lunatrain.box_evaluation import BoxEvalOptions, evaluate_boxes
    from lunatrain.localisation import is_localisation

    if options["checkpoint"] is not None or not is_localisation(runs[0]):
        return False
    for name in ("target", "annotations", "excluded", "bootstrap"):
        if options[name]:
            message = f"--{name} is for classifiers, and {runs[0]} gives lung boxes. Leave it out"
            raise UsageError(message)
    shared = {name: options[name] for name in ("store", "split", "part", "device", "out")}
    done = evaluate_boxes(BoxEvalOptions(runs, **shared))
    if as_json:
        print_json(done.to_json())
    else:
        click.echo(done.text())
    return True


@cli.command()
@click.option(
    "--store", type=store_path, default=Path("crops.h5"), show_default=True, help="The store's folder or its crops.h5."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=9, show_default=True, help="Alternating rounds; medians are told."
)
@click.option("--cold/--no-cold", default=True, show_default=True, help="Also read from the disk, past the page cache.")
@json_option
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
        print_json(report.to_json())
    else:
        click.echo(report.to_text())


@cli.command()
@click.argument("submission", type=table_path)
@click.option("--annotations", type=table_path, required=True, help="The challenge's annotations.csv.")
@click.option(
    "--excluded", type=table_path, help="The challenge's annotations_excluded.csv; marks on these don't count."
)
@click.option("--no-excluded", is_flag=True, help="Do without --excluded. Not the challenge's score.")
@click.option("--seriesuids", type=table_path, required=True, help="The scans that were searched, one id a line.")
@click.option("--bootstrap", type=click.IntRange(0), default=1000, show_default=True, metavar="N",
              help="Draws of scans for the 95 % interval; 0 for none.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@click.option("--out", type=UserPath(file_okay=False),
              help="Folder for froc.png, froc.csv, missed.csv and marks.csv (the verdict on each mark).")  # fmt: skip
@json_option
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
        print_json(result.to_json())
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
    faulthandler.enable()  # a crash in a library, or a mapped file that was cut, says where it was
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not sys.stderr.isatty():
        os.environ.setdefault("NO_COLOR", "1")
    cli(prog_name="lunatrain")
