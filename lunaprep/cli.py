"""The command line: each command reads its options, calls the library, prints. The home of click."""

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lunaprep import __version__
from lunaprep.errors import LunaprepError, UsageError

if TYPE_CHECKING:
    from lunaprep.account import Account, Preview
    from lunaprep.build import BuildOptions
    from lunaprep.parameters import Parameters

EXIT_SOME_FAILED = 3
EXIT_DAMAGE = 4
EXIT_NO_SPACE = 5
EXIT_INTERRUPTED = 130
MAX_LINES = 20
"""Faults printed one by one; the rest is counted (scans.parquet and --json have all)."""


class _Commands(click.Group):
    """Turn our errors into one line and an exit code; leave a bug its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LunaprepError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail_interrupted()
        except OSError as error:
            if _interrupts:
                _fail_interrupted()
            if error.errno == errno.EPIPE:
                _fail("the reader of the output went away", 1)
            place = f"{error.filename}: " if error.filename else ""
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            _fail(f"{place}{error.strerror or error}", EXIT_NO_SPACE if full else 1)
        except Exception:
            if _interrupts:  # it hit a library that made another error of it
                _fail_interrupted()
            raise


_interrupts: list[int] = []
"""Signals received; a list, because a handler can only leave notes."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def _fail_interrupted() -> None:
    _fail("interrupted; what was finished is kept, run the same command again to go on", EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> None:
    click.echo(f"lunaprep: {message}", err=True)
    raise SystemExit(code)


class _Bytes(click.ParamType[int]):
    """A size such as 1GiB, 500MB or 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", str(value).strip().lower())
        if not match or match[2] not in units:
            self.fail(f"{value!r} is no size; write 1GiB, 500MB or a number of bytes", param, ctx)
        return int(float(match[1]) * units[match[2]])


class _Subsets(click.ParamType[tuple[int, ...]]):
    """Subset numbers such as 0-9, 3 or 0,2,5-7."""

    name = "subsets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers: set[int] = set()
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
            if not match:
                self.fail(f"{value!r} names no subsets; write 0-9, 3 or 0,2,5-7", param, ctx)
            numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        if not numbers:
            self.fail(f"{value!r} names no subset; the first number must not be the larger one", param, ctx)
        return tuple(sorted(numbers))


_store_argument = click.argument("store", required=False, type=click.Path(path_type=Path))
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder with subset0 to subset9 and the CSV files.  [default: $LUNA16_ROOT, else ./data]",
)
_file_path = click.Path(path_type=Path, dir_okay=False)
_table_path = click.Path(path_type=Path, dir_okay=False, exists=True)


def _data_folder(data: Path | None) -> Path:
    return data or Path(os.environ.get("LUNA16_ROOT") or "data")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines[:MAX_LINES]:
        click.echo(f"lunaprep: {line}", err=True)
    if len(lines) > MAX_LINES:
        click.echo(f"lunaprep: ... and {len(lines) - MAX_LINES:,} more; --json lists them all", err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lunaprep")
def cli() -> None:
    """Turn chest CT scans and their annotations into a verified store of volumes and candidate crops.

    \b
    Example:
        lunaprep phantom data
        lunaprep build --out store
        lunaprep verify store
    """


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--scans", default=10, show_default=True, help="Scans to make.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--size",
    nargs=3,
    type=int,
    default=(96, 160, 160),
    show_default=True,
    metavar="I R C",
    help="Slices, rows, columns.",
)
@click.option("--hard", is_flag=True, help="Nodules that a threshold cannot find.")
@_json_option
def phantom(folder: Path, scans: int, seed: int, size: tuple[int, int, int], hard: bool, as_json: bool) -> None:
    """Make a synthetic LUNA16 in FOLDER: scans, annotations and candidates.

    \b
    Example:
        lunaprep phantom data --scans 10 --seed 1
        lunaprep phantom big --scans 2 --size 250 512 512 --hard
    """
    from dataclasses import asdict

    from lunaprep.sources.phantom import write_phantom

    with _bar("phantom", scans) as advance:
        summary = write_phantom(folder, scans, seed, size, hard=hard, progress=advance)
    if as_json:
        _print_json(asdict(summary))
    else:
        click.echo(
            f"{folder}: {summary.scans} scans, {summary.nodules} nodules, {summary.candidates} candidates "
            f"({summary.positives} positive), {summary.bytes / 1e6:.1f} MB"
        )


class _bar:  # noqa: N801
    """A progress bar on stderr; the value of ``with`` is called with (done, total)."""

    def __init__(self, what: str, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=what, unit="scan", disable=None)

    def __enter__(self) -> Any:
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *args: object) -> None:
        self._bar.close()


@cli.command()
@_data_option
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="The store's folder.  [default: .]"
)
@click.option("--subsets", type=_Subsets(), help="Subsets to take, such as 0-9 or 0,3.  [default: all there are]")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: the cores, as far as memory allows]")
@click.option(
    "--source",
    type=click.Choice(["luna16", "dicom", "lidc", "lung-pet-ct-dx"]),
    default="luna16",
    show_default=True,
    help="Kind of data set.",
)
@click.option(
    "--candidates", type=_table_path, help="[default: candidates_V2.csv, else candidates.csv, in the data folder]"
)
@click.option("--annotations", type=_table_path, help="[default: annotations.csv in the data folder]")
@click.option("--malignancy", type=_table_path, help="[default: annotations_with_malignancy.csv, if there]")
@click.option(
    "--patients", type=_table_path, help="CSV with seriesuid and patient_id.  [default: patients.csv, if there]"
)
@click.option("--crop-shape", nargs=3, type=int, default=(32, 48, 48), show_default=True, help="Slices, rows, columns.")
@click.option(
    "--hu", nargs=2, type=int, default=(-1000, 1000), show_default=True, help="Window the values are clipped to."
)
@click.option("--dtype", type=click.Choice(["auto", "int16", "float32"]), default="auto", show_default=True,
              help="Crops on disk; auto is int16 where that loses nothing.")  # fmt: skip
@click.option("--edge", type=click.Choice(["shift", "pad"]), default="shift", show_default=True,
              help="At a border: move the crop inwards, or pad it with the lower HU bound.")  # fmt: skip
@click.option("--match", type=click.Choice(["radius", "book"]), default="radius", show_default=True,
              help="A candidate's nodule: nearest within its radius, or the book's rule.")  # fmt: skip
@click.option("--val-stride", type=int, default=10, show_default=True, help="Every how many-th series validates.")
@click.option("--shard-size", type=_Bytes(), default="1GiB", show_default=True, help="Greatest size of a shard.")
@click.option("--volumes/--no-volumes", default=True, show_default=True, help="Also write whole clipped scans.")
@click.option("--targets/--no-targets", default=True, show_default=True,
              help="Also make lung and nodule masks, and slabs to train a segmentation on.")  # fmt: skip
@click.option("--slab-negatives", type=float, default=1.0, show_default=True, metavar="RATIO",
              help="Slabs that show no nodule, for each one that does, about.")  # fmt: skip
@click.option("--lungs", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Folder of lung masks, UID.mhd.  [default: seg-lungs-LUNA16, if there; else computed]")  # fmt: skip
@click.option("--csv", type=click.Path(path_type=Path, file_okay=False),
              help="Folder to write the source's tables to, as LUNA16's; the FROC reads them.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Take the first so many scans only.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@_json_option
@click.pass_context
def build(ctx: click.Context, /, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Build a store from scans and tables, or bring one up to date.

    Run the same command again to go on after any interruption; add subsets later with another build into the
    same --out. Exit code 3 says that the store is built but some scans or table rows could not be used.

    \b
    Example:
        lunaprep build --data /data/LUNA16 --out store --subsets 0-9 --workers 8
        lunaprep build --data /data/LUNA16 --out store --subsets 0 --no-volumes --dry-run
    """
    from lunaprep.build import build as run_build
    from lunaprep.build import preview

    wanted, parameters = _build_options(options)
    result: Preview | Account
    result = preview(wanted, parameters) if dry_run else run_build(wanted, parameters)
    _print_lines([*result.failed, *result.left_out])
    if as_json:
        _print_json(result.to_json())
    else:
        click.echo(result.text())
    if not dry_run and not result.is_complete:  # type: ignore[union-attr]
        ctx.exit(EXIT_SOME_FAILED)


def _build_options(options: dict[str, Any]) -> tuple["BuildOptions", "Parameters"]:
    from lunaprep.build import BuildOptions
    from lunaprep.parameters import Parameters
    from lunaprep.sources.luna16 import TablePaths

    given = ("candidates", "annotations", "malignancy", "patients", "lungs")
    tables = TablePaths(**{name: options[name] for name in given})
    wanted = BuildOptions(
        data=_data_folder(options["data"]),
        out=options["out"],
        source=options["source"],
        subsets=options["subsets"],
        tables=tables,
        volumes=options["volumes"],
        targets=options["targets"],
        csv=options["csv"],
        limit=options["limit"],
        workers=options["workers"],
        progress=True,
    )
    names = ("crop_shape", "hu", "dtype", "edge", "match", "val_stride", "slab_negatives")
    return wanted, Parameters(shard_bytes=options["shard_size"], **{name: options[name] for name in names})


@cli.command()
@_store_argument
@click.option("--level", type=click.Choice(["quick", "full", "source"]), default="full", show_default=True,
              help="quick: structure, sizes; full: every checksum; source: also cut again from the scans.")  # fmt: skip
@_data_option
@_json_option
@click.pass_context
def verify(ctx: click.Context, store: Path | None, level: str, data: Path | None, as_json: bool) -> None:
    """Look for damage in STORE (default: the current folder).

    With --data, also hold a download of LUNA16 against its data sheet; without a store, only that. Exit code 4
    says that damage was found; each piece is named by shard, row and series.

    \b
    Example:
        lunaprep verify store
        lunaprep verify store --level source --data /data/LUNA16
        lunaprep verify --data /data/LUNA16
    """
    from lunaprep.schema import STORE_FILE
    from lunaprep.store.commit import recover_if_idle

    reports = []
    if data is not None and level != "source":
        reports.append(_check_data(data, as_json))
    folder = store or Path()
    if store is not None or data is None or level == "source" or (folder / STORE_FILE).exists():
        recover_if_idle(folder)
        reports.append(_verify_store(folder, level, data, as_json))
    if as_json:
        merged: dict[str, Any] = {}
        for report in reports:
            merged |= report.to_json()
        _print_json({**merged, "ok": all(report.ok for report in reports)})
    if not all(report.ok for report in reports):
        ctx.exit(EXIT_DAMAGE)


def _check_data(data: Path, quiet: bool) -> Any:
    from lunaprep.download import check_data

    report = check_data(data)
    if not quiet:
        click.echo(report.text())
    return report


def _verify_store(store: Path, level: str, data: Path | None, quiet: bool) -> Any:
    from tqdm import tqdm

    from lunaprep.verify import verify_store

    source = _data_folder(data) if level == "source" else None
    with tqdm(desc=f"verify {level}", unit="B", unit_scale=True, disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify_store(store, level, source, advance)  # type: ignore[arg-type]
    if not quiet:
        _print_lines([finding.line() for finding in report.findings])
        counts = report.counts
        verdict = "no damage found" if report.ok else "DAMAGED. Delete the files named; build makes them again"
        click.echo(
            f"{store} ({level}): {counts['shards']} shards, {counts['crops']:,} crops, {counts['volumes']:,} volumes, "
            f"{counts['bytes_read'] / 1e9:.2f} GB read: {verdict}"
        )
    return report


@cli.command()
@_store_argument
@_json_option
def info(store: Path | None, as_json: bool) -> None:
    """Say what is in STORE (default: the current folder).

    \b
    Example:
        lunaprep info store
        lunaprep info store --json
    """
    from lunaprep.info import format_info, store_info
    from lunaprep.store.reader import open_store

    figures = store_info(open_store(store or Path()))
    if as_json:
        _print_json(figures)
    else:
        click.echo(format_info(figures))


@cli.command()
@_store_argument
@click.option("--candidate", type=int, metavar="ID", help="Draw this candidate's crop (candidate_id of the manifest).")
@click.option("--series", metavar="UID", help="Draw this series with its candidates; the end of the UID is enough.")
@click.option(
    "--worst",
    type=click.Path(path_type=Path, exists=True),
    metavar="RUN",
    help="Draw the crops this run of lunatrain was most wrong about, as its last 'lunatrain eval' has it.",
)
@click.option("--out", type=_file_path, required=True, help="PNG file to write.")
def show(store: Path | None, candidate: int | None, series: str | None, worst: Path | None, out: Path) -> None:
    """Draw crops or a series of STORE as a PNG, in lung window.

    Without --candidate, --series or --worst: an overview, nodules beside candidates that are none.

    \b
    Example:
        lunaprep show store --out overview.png
        lunaprep show store --candidate 4711 --out candidate.png
        lunaprep show store --series 821260 --out series.png
        lunaprep show store --worst runs/2026-11-22_10.00.00-cls --out worst.png
    """
    from lunaprep import pictures
    from lunaprep.store.reader import open_store

    if sum(choice is not None for choice in (candidate, series, worst)) > 1:
        message = "--candidate, --series and --worst: choose one of them"
        raise UsageError(message)
    opened = open_store(store or Path())
    if candidate is not None:
        pictures.candidate_picture(opened, candidate, out)
    elif series is not None:
        pictures.series_picture(opened, series, out)
    elif worst is not None:
        pictures.worst_picture(opened, worst, out)
    else:
        pictures.overview_picture(opened, out)
    click.echo(str(out))


def main() -> None:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not sys.stderr.isatty():
        os.environ.setdefault("NO_COLOR", "1")
    cli(prog_name="lunaprep")
