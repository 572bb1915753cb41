"""The command line: each command reads its options, calls the library, prints. The home of click."""

import errno
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from lunaprep import __version__
from lunaprep.cli_build import build
from lunaprep.cli_options import (
    SOURCES,
    data_folder,
    data_option,
    file_path,
    json_option,
    print_json,
    print_lines,
    store_argument,
)
from lunaprep.errors import LunaprepError, UsageError

EXIT_DAMAGE = 4
EXIT_NO_SPACE = 5
EXIT_INTERRUPTED = 130
RETRY_S = 0.01
TRACKER_QUIET = "ignore:resource_tracker:UserWarning"
"""For child processes: joblib's tracker clears up after an interrupt, and need not say so."""


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
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Where Python ignores what is raised (it was clearing memory up), an interrupt is raised a moment later."""
    if lost.exc_type is KeyboardInterrupt and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
    else:
        sys.__unraisablehook__(lost)


def _fail_interrupted() -> None:
    _fail("interrupted; what was finished is kept, run the same command again to go on", EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> None:
    click.echo(f"lunaprep: {message}", err=True)
    raise SystemExit(code)


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
@json_option
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
        print_json(asdict(summary))
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


cli.add_command(build)


@cli.command()
@store_argument
@click.option("--level", type=click.Choice(["quick", "full", "source"]), default="full", show_default=True,
              help="quick: structure, sizes; full: every checksum; source: also cut again from the scans.")  # fmt: skip
@data_option
@click.option("--source", type=click.Choice(SOURCES),
              help="What --data is a copy of.  [default: the store's, else luna16]")  # fmt: skip
@json_option
@click.pass_context
def verify(
    ctx: click.Context, store: Path | None, level: str, data: Path | None, source: str | None, as_json: bool
) -> None:
    """Look for damage in STORE (default: the current folder).

    With --data, also hold a download against its data sheet; without a store, only that. Exit code 4 says that
    damage was found; each piece is named by shard, row and series.

    \b
    Example:
        lunaprep verify store
        lunaprep verify store --level source --data /data/LUNA16
        lunaprep verify --data /data/LUNA16
        lunaprep verify --data /data/LIDC-IDRI --source lidc
    """
    from lunaprep.schema import STORE_FILE
    from lunaprep.store.commit import recover_if_idle

    reports = []
    folder = store or Path()
    if data is not None and level != "source":
        built = folder if (folder / STORE_FILE).exists() else None
        reports.append(_check_data(data, source, built, as_json))
    if store is not None or data is None or level == "source" or (folder / STORE_FILE).exists():
        recover_if_idle(folder)
        reports.append(_verify_store(folder, level, data, as_json))
    if as_json:
        merged: dict[str, Any] = {}
        for report in reports:
            merged |= report.to_json()
        print_json({**merged, "ok": all(report.ok for report in reports)})
    if not all(report.ok for report in reports):
        ctx.exit(EXIT_DAMAGE)


def _check_data(data: Path, source: str | None, store: Path | None, quiet: bool) -> Any:
    from lunaprep.download import check_data, source_of

    report: Any
    source = source or source_of(data, store)
    if source == "luna16":
        report = check_data(data)
    else:
        from lunaprep.download_dicom import check_dicom

        report = check_dicom(data, source)
    if not quiet:
        click.echo(report.text())
    return report


def _verify_store(store: Path, level: str, data: Path | None, quiet: bool) -> Any:
    from tqdm import tqdm

    from lunaprep.verify import verify_store

    source = data_folder(data) if level == "source" else None
    with tqdm(desc=f"verify {level}", unit="B", unit_scale=True, disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify_store(store, level, source, advance)  # type: ignore[arg-type]
    if not quiet:
        print_lines([finding.line() for finding in report.findings])
        counts = report.counts
        verdict = "no damage found" if report.ok else "DAMAGED. Delete the files named; build makes them again"
        click.echo(
            f"{store} ({level}): {counts['shards']} shards, {counts['crops']:,} crops, {counts['volumes']:,} volumes, "
            f"{counts['bytes_read'] / 1e9:.2f} GB read: {verdict}"
        )
    return report


@cli.command()
@store_argument
@json_option
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
        print_json(figures)
    else:
        click.echo(format_info(figures))


@cli.command()
@store_argument
@click.option("--candidate", type=int, metavar="ID", help="Draw this candidate's crop (candidate_id of the manifest).")
@click.option("--series", metavar="UID", help="Draw this series with its candidates; the end of the UID is enough.")
@click.option(
    "--worst",
    type=click.Path(path_type=Path, exists=True),
    metavar="RUN",
    help="Draw the crops this run of lunatrain was most wrong about, as its last 'lunatrain eval' has it.",
)
@click.option("--out", type=file_path, required=True, help="PNG file to write.")
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
    for name in ("SIGINT", "SIGTERM", "SIGALRM"):
        if hasattr(signal, name):  # Windows has no alarm
            signal.signal(getattr(signal, name), _interrupt)
    sys.unraisablehook = _interrupt_again
    sys.warnoptions.append(TRACKER_QUIET)
    if not sys.stderr.isatty():
        os.environ.setdefault("NO_COLOR", "1")
    cli(prog_name="lunaprep")
