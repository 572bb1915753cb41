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
    UserPath,
    data_folder,
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
            from lunaprep.store.files import no_space

            _fail(f"{place}{error.strerror or error}", EXIT_NO_SPACE if no_space(error) else 1)
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
@click.argument("folder", type=UserPath(file_okay=False))
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
    """Make a synthetic LUNA16 in FOLDER: scans, annotations and candidates. An earlier phantom there is replaced.

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
        earlier = f", in place of {summary.replaced} that were there" if summary.replaced else ""
        click.echo(
            f"{folder}: {summary.scans} scans{earlier}, {summary.nodules} nodules, {summary.candidates} candidates "
            f"({summary.positives} positive), {summary.bytes / 1e6:.1f} MB"
        )


class _bar:  # noqa: N801
    """A progress bar on stderr; the value of ``with`` is called with (done, total)."""

    def __init__(self, what: str, total: int | None = None, unit: str = "scan") -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", disable=None)

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
@click.option("--data", type=UserPath(),
              help="Folder of the scans. At level source they are read again there, by default in $LUNA16_ROOT, else "
              "./data; at the others it is held against its data sheet, by default none is.")  # fmt: skip
@click.option("--source", type=click.Choice(SOURCES),
              help="What --data is a copy of; not at level source.  [default: the store's, else luna16]")  # fmt: skip
@json_option
@click.pass_context
def verify(
    ctx: click.Context, store: Path | None, level: str, data: Path | None, source: str | None, as_json: bool
) -> None:
    """Look for damage in STORE (default: the current folder).

    With --data, at levels quick and full, also hold a download against its data sheet; where there is no store, only
    that. Exit code 4 says that damage was found; each piece is named by shard, row and series.

    \b
    Example:
        lunaprep verify store
        lunaprep verify store --level source --data /data/LUNA16
        lunaprep verify --data /data/LUNA16
        lunaprep verify --data /data/LIDC-IDRI --source lidc
    """
    from lunaprep.schema import STORE_FILE
    from lunaprep.store.commit import recover_if_idle
    from lunaprep.store.reader import store_folder

    if source is not None and (data is None or level == "source"):
        message = "--source says what a download is a copy of: give it with --data, and not with --level source"
        raise UsageError(message)
    download = data if level != "source" else None
    if download is not None and not download.is_dir():
        message = f"{download}: no such folder; give --data the folder of the scans"
        raise UsageError(message)
    folder = store_folder(store or Path())
    is_store = (folder / STORE_FILE).exists()
    is_typed = store is not None or ctx.get_parameter_source("level") is click.core.ParameterSource.COMMANDLINE
    if download is not None and source is None:
        from lunaprep.download import source_of

        source = source_of(download, folder if is_store else None)
    told: list[tuple[Any, str]] = []
    if is_typed or is_store or download is None:
        recover_if_idle(folder)
        told.append(_verify_store(folder, level, data, as_json))
    if download is not None:
        told.append(_check_data(download, str(source), as_json))
    is_ok = all(report.ok for report, _ in told)
    if as_json:
        print_json({key: value for report, _ in told for key, value in report.to_json().items()} | {"ok": is_ok})
    else:
        for _, line in sorted(told, key=lambda one: not one[0].ok):  # the last agrees with the exit code
            click.echo(line)
    if not is_ok:
        ctx.exit(EXIT_DAMAGE)


def _check_data(data: Path, source: str, quiet: bool) -> tuple[Any, str]:
    """The report on a download, whose account has been printed, and the line that ends it."""
    report: Any
    if source == "luna16":
        from lunaprep.download import check_data

        with _bar("headers") as advance:
            report = check_data(data, progress=advance)
    else:
        from lunaprep.download_dicom import check_dicom

        report = check_dicom(data, source, progress=True)
    if not quiet:
        click.echo(report.text())
    errors = sum(finding.severity == "error" for finding in report.findings)
    verdict = f"{errors:,} error{'s' * (errors > 1)}, named above" if errors else "no error found"
    return report, f"{data} (data): {verdict}"


def _verify_store(store: Path, level: str, data: Path | None, quiet: bool) -> tuple[Any, str]:
    """The report on a store, whose findings have been printed, and the line that ends it."""
    from lunaprep.verify import verify_store

    source = data_folder(data) if level == "source" else None
    with _bar(f"verify {level}", unit="B") as advance:
        report = verify_store(store, level, source, advance)  # type: ignore[arg-type]
    if not quiet:
        print_lines([finding.line() for finding in report.findings])
    counts = report.counts
    scans = f"{counts['scans_cut_again']} of {counts['scans']} scans cut again, " if "scans" in counts else ""
    return report, (
        f"{store} ({level}): {counts['shards']} shards, {counts['crops']:,} crops, {counts['volumes']:,} volumes, "
        f"{scans}{counts['bytes_read'] / 1e9:.2f} GB read: {_verdict(report)}"
    )


def _verdict(report: Any) -> str:
    if report.ok:
        return "no damage found"
    if all(finding.code.startswith("source-") for finding in report.findings if finding.severity == "error"):
        return (
            "THE SCANS named are not those it was built from. Nothing in the store needs deleting: put the scans back, "
            "or build again"
        )
    return "DAMAGED. Delete the files of the store that are named; build makes them again"


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
    type=UserPath(exists=True),
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
