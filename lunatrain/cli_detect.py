"""The command `lunatrain detect`: its options, and what it prints. Imports nothing heavy before it runs."""

from pathlib import Path
from typing import Any

import click

from lunaprep.cli_options import UserPath, json_option, table_path
from lunatrain.cli_train import device_option, print_json

EXIT_PARTLY = 3

_run = UserPath(exists=True)


@click.command()
@click.argument("scans", nargs=-1, required=True, metavar="SCAN...", type=UserPath())
@click.option("--seg", type=_run, help="Run (or checkpoint) of the segmentation.  [default: the newest run of seg]")
@click.option("--cls", type=_run, help="Run (or checkpoint) of the classifier.  [default: the newest run of cls]")
@click.option(
    "--mal", type=_run, help="Run (or checkpoint) of 'mal', for the malignancy of findings.  [default: without]"
)
@click.option(
    "--loc", type=_run, multiple=True,
    help="Run (or checkpoint) of 'loc': search inside its box around the lungs alone. Given more than once: inside the "
    "mean of theirs.",
)  # fmt: skip
@click.option(
    "--loc-margin", type=click.FloatRange(0), default=25.0, show_default=True, metavar="MM", help="Added to that box."
)
@click.option("--out", type=UserPath(file_okay=False), help="[default: detect-TIME]")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="P",
    help="Nodule probability from which on a candidate is a finding.",
)  # fmt: skip
@click.option(
    "--seg-threshold", type=click.FloatRange(0, 1, min_open=True), metavar="P",
    help="Of the segmentation's probability.  [default: the run's]",
)  # fmt: skip
@click.option(
    "--max-candidates", type=click.IntRange(1), default=50, show_default=True, metavar="N",
    help="Most candidates of a scan.",
)  # fmt: skip
@click.option(
    "--annotations", type=table_path, help="annotations.csv: says what was found, and where the rest was lost."
)
@click.option("--excluded", type=table_path, help="annotations_excluded.csv; candidates on these count neither way.")
@click.option(
    "--harvest", type=UserPath(dir_okay=False), metavar="FILE",
    help="Write the false positives as a candidates.csv for 'lunaprep build --candidates'.",
)  # fmt: skip
@click.option("--candidates", type=table_path, help="A candidates.csv whose rows go in front in --harvest's file.")
@click.option("--pictures/--no-pictures", default=True, show_default=True, help="In report.html.")
@device_option
@json_option
def detect(scans: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Find nodules in new scans: segment, group, classify.

    SCAN is a .mhd, .mha or .nii.gz file, a folder of these, or a folder of DICOM series. Writes findings.csv
    (LUNA16's submission columns first), findings.json and report.html with pictures. A scan that cannot be searched is
    named, and the others go on (exit code 3; 1 where all failed). An interrupt leaves the report of the scans searched
    until then (exit code 130).

    \b
    Example:
        lunatrain detect scan.mhd
        lunatrain detect data/subset9 --seg runs/A-seg --cls runs/B-cls --out findings
        lunatrain detect scan.mhd --loc runs/A-loc --loc runs/B-loc
        lunatrain detect data/subset9 --annotations data/annotations.csv --harvest hard.csv
    """
    from lunatrain.detect.loading import DetectOptions
    from lunatrain.detect.pipeline import run_detection

    try:
        done = run_detection(DetectOptions(scans, **options), show_progress=True)
    except KeyboardInterrupt:
        message = "interrupted before a report was written"
        raise KeyboardInterrupt(message) from None
    for line in done.failed:
        click.echo(f"lunatrain: {line}", err=True)
    if as_json:
        print_json(done.record)
    else:
        click.echo(done.text())
    if done.num_left:
        number = len(done.results)
        text = f"interrupted: {done.num_left:,} of {number + done.num_left:,} scans were not searched"
        message = f"{text}; the report is of the others"
        raise KeyboardInterrupt(message)
    if done.failed:
        raise SystemExit(1 if len(done.failed) == len(done.results) else EXIT_PARTLY)
