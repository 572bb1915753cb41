"""What the commands share: kinds of options, options, printing."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

EXIT_SOME_FAILED = 3
SOURCES = ("luna16", "dicom", "lidc", "lung-pet-ct-dx")
"""As in `lunaprep.sources.known`, which is too heavy to be imported for --help."""

MAX_LINES = 20
"""Faults printed one by one; the rest is counted (scans.parquet and --json have all)."""


class Bytes(click.ParamType[int]):
    """A size such as 1GiB, 500MB or 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)", str(value).strip().lower())
        if not match or match[2] not in units:
            self.fail(f"{value!r} is no size; write 1GiB, 500MB or a number of bytes", param, ctx)
        return int(float(match[1]) * units[match[2]])


class Subsets(click.ParamType[tuple[int, ...]]):
    """Subset numbers such as 0-9, 3 or 0,2,5-7."""

    name = "subsets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, ascending."""
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


class Spacing(click.ParamType[tuple[float, float, float]]):
    """Millimetres along slice, row and column: one number for all, or three with commas between."""

    name = "mm"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float]:
        """The three numbers."""
        if isinstance(value, tuple):
            return value
        try:
            parts = [float(part) for part in str(value).split(",")]
            i, r, c = parts * 3 if len(parts) == 1 else parts
        except ValueError:
            self.fail(f"{value!r} is no spacing; write 1, or slice, row and column as 1.25,0.7,0.7", param, ctx)
        return i, r, c


class UserPath(click.Path):
    """A path; ``~`` is the home folder also where the shell leaves it alone, as in ``--out=~/store``."""

    def __init__(self, **kinds: bool) -> None:
        super().__init__(path_type=Path, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        return super().convert(at_home(value), param, ctx)


def at_home(path: str | Path) -> str:
    """A path with ``~`` at its start made the home folder."""
    return os.path.expanduser(path)  # noqa: PTH111 - that of pathlib refuses ~name where there is no such user


store_argument = click.argument("store", required=False, type=UserPath())
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
data_option = click.option(
    "--data",
    type=UserPath(),
    help="Folder with subset0 to subset9 and the CSV files.  [default: $LUNA16_ROOT, else ./data]",
)
file_path = UserPath(dir_okay=False)
table_path = UserPath(dir_okay=False, exists=True)


def data_folder(data: Path | None) -> Path:
    """The folder of scans: as given, else ``$LUNA16_ROOT``, else ``data``."""
    return data or Path(at_home(os.environ.get("LUNA16_ROOT") or "data"))


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_lines(lines: Sequence[str]) -> None:
    """Print complaints on stderr, the first of them."""
    for line in lines[:MAX_LINES]:
        click.echo(f"lunaprep: {line}", err=True)
    if len(lines) > MAX_LINES:
        click.echo(f"lunaprep: ... and {len(lines) - MAX_LINES:,} more; --json lists them all", err=True)
