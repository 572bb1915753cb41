"""The rows of a CSV table as columns of text, each with its line: read as a stream, repeated texts held once."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lunaprep.errors import TableError

BLOCK_BYTES = 1 << 24
HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class RowFault:
    """One row of a table that was left out."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}; the row is left out"


@dataclass(frozen=True)
class CsvRows:
    """All fields of a file as text, the line each row stands on, and the rows of another length."""

    file: str
    fields: dict[str, Any]
    """Arrow columns, of text or of codes into texts."""

    lines: npt.NDArray[np.int64]
    faults: list[RowFault]

    def text(self, name: str) -> "pd.Series[str]":
        """A column as it stands."""
        return pd.Series(self.fields[name].to_pandas())

    def codes(self, name: str, *, strip: bool = False) -> "pd.Series[Any]":
        """A coded column with ascending categories; with `strip`, without the white space around its texts."""
        coded = self.fields[name].unify_dictionaries().combine_chunks()
        texts = (pc.utf8_trim_whitespace(coded.dictionary) if strip else coded.dictionary).to_pylist()
        names = sorted(set(texts))
        place = {text: number for number, text in enumerate(names)}
        recode = np.array([place[text] for text in texts], dtype=np.int32)
        codes = recode[coded.indices.to_numpy(zero_copy_only=False)]
        return pd.Series(pd.Categorical.from_codes(codes, pd.Index(names, dtype="str")))

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column's numbers; NaN where a field is not one."""
        out = np.empty(len(self.lines))
        first = 0
        for chunk in self.fields[name].iterchunks():
            out[first : first + len(chunk)] = _numbers(chunk)
            first += len(chunk)
        return out


class _Stream:
    """A file as Arrow is given it: its first bytes, then a line end. Line ends are counted on the way."""

    closed = False

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file, self._left, self._tail, self._is_ended = file, size, b"", False
        self.line_ends = 0
        self.has_blank_lines = False

    def read(self, count: int) -> bytes:
        """At most so many bytes; none at the end."""
        if self._is_ended:
            return b""
        data = self._file.read(min(count - 1, self._left))
        self._left -= len(data)
        self.line_ends += data.count(b"\n")
        seen = self._tail + data
        self.has_blank_lines |= b"\n\n" in seen or b"\n\r\n" in seen
        self._tail = seen[-2:]
        self._is_ended = not self._left or not data
        return data + b"\n" if self._is_ended else data

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""


def read_rows(
    path: Path, columns: Sequence[str], *, optional: Sequence[str] = (), coded: Sequence[str] = ()
) -> CsvRows:
    """Read columns of a CSV file as text.

    Parameters
    ----------
    path : Path
        The file.
    columns : sequence of str
        Columns that it must have.
    optional : sequence of str
        Columns that are read too where there are any.
    coded : sequence of str
        Those of them whose texts repeat; see `CsvRows.codes`.

    Raises
    ------
    TableError
        Not such a table.
    """
    try:
        with path.open("rb") as file:
            stream = _Stream(file, _filled_bytes(file))
            return _read_stream(path, file, stream, (columns, optional, coded))
    except OSError as error:
        message = f"{path.name}: {error.strerror}. Name the file, or put it beside the subset folders"
        raise TableError(message) from error


def _read_stream(path: Path, file: BinaryIO, stream: _Stream, wanted: tuple[Sequence[str], ...]) -> CsvRows:
    columns, optional, coded = wanted
    names = _header(path, file, stream)
    _check_header(path, names, columns)
    misfits: list[tuple[int, int]] = []

    def skip(row: Any) -> str:
        misfits.append((row.number, row.actual_columns))
        return "skip"

    kinds = {name: pa.dictionary(pa.int32(), pa.string()) if name in coded else pa.string() for name in names}
    included = [*columns, *(name for name in optional if name in names)]
    try:
        table = pyarrow.csv.read_csv(
            pa.PythonFile(stream, mode="r"),
            # one thread: only then does Arrow number the rows it refuses
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=1
            ),
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=kinds, include_columns=included, strings_can_be_null=False
            ),
        )
    except pa.ArrowException as error:
        reason = ascii(re.sub("dictionary<.*>", "string", str(error).splitlines()[0])[:120])[1:-1]
        message = f"{path.name} cannot be read as CSV: {reason}. Fetch it again"
        raise TableError(message) from error
    good, bad = _line_numbers(path, stream, len(table), [number for number, _ in misfits])
    faults = [
        RowFault(path.name, line, f"{count} fields, expected {len(names)}")
        for line, (_, count) in zip(bad, misfits, strict=True)
    ]
    return CsvRows(path.name, dict(zip(included, table.columns, strict=True)), good, faults)


def _filled_bytes(file: BinaryIO) -> int:
    """Bytes of a file without the empty lines at its end; it is left at its begin."""
    size = file.seek(0, 2)
    while size:
        first = max(0, size - HEADER_BYTES)
        file.seek(first)
        kept = len(file.read(size - first).rstrip(b"\r\n"))
        size = first + kept
        if kept:
            break
    file.seek(0)
    return size


def _header(path: Path, file: BinaryIO, stream: _Stream) -> list[str]:
    raw = file.read(min(HEADER_BYTES, stream.size)).split(b"\n", 1)[0]
    file.seek(0)
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        message = f"{path.name} is not text (byte {error.start} of its first line). Fetch it again"
        raise TableError(message) from error
    if not text:
        message = f"{path.name} is empty; expected a header line and rows. Fetch it again"
        raise TableError(message)
    try:
        return [name.strip() for name in next(csv.reader([text], skipinitialspace=True))]
    except csv.Error:
        return [text]


def _check_header(path: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in names]
    if missing or len(set(names)) != len(names):
        what = f"has no column {', '.join(missing)}" if missing else "names a column twice"
        got, expected = ",".join(names)[:80], ",".join(columns)
        message = f"{path.name} {what}: got {got!r}, expected {expected}. Check that it is LUNA16's"
        raise TableError(message)


def _line_numbers(
    path: Path, stream: _Stream, num_good: int, misfits: list[int]
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Lines (from 1, the header's) of the rows read, and of the misfits, whose numbers skip blank lines."""
    if stream.has_blank_lines:
        with path.open("rb") as file:
            filled = (number for number, line in enumerate(file, start=1) if line.strip(b"\r\n"))
            lines = np.fromiter(filled, dtype=np.int64)
    else:
        lines = np.arange(1, stream.line_ends + 2, dtype=np.int64)
    if len(lines) != 1 + num_good + len(misfits):
        message = (
            f"{path.name}: {len(lines) - 1} lines give {num_good + len(misfits)} rows, so a quoted field or a lone "
            "carriage return reaches across line ends. Mend the file"
        )
        raise TableError(message)
    at = np.array(misfits, dtype=np.int64) - 1
    return np.delete(lines, [0, *at]) if misfits else lines[1:], lines[at].tolist()


def _numbers(text: Any) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:
        return np.asarray(pd.to_numeric(text.to_pandas(), errors="coerce").to_numpy(dtype=np.float64))
