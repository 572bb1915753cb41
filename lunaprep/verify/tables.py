"""The two Parquet tables, read with their page checksums verified and held to the schema."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lunaprep import schema
from lunaprep.verify.findings import Findings
from lunaprep.verify.places import BadFileError, look

MOST_ROWS = 10**9
"""A table that claims more rows isn't read."""

_TYPES = {
    "bool": pa.bool_(),
    "float64": pa.float64(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "string": pa.string(),
    "uint64": pa.uint64(),
}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Coded:
    """A text column as codes into its distinct values; -1 where null."""

    codes: npt.NDArray[np.int64]
    values: list[str]

    def __getitem__(self, k: int) -> str | None:
        """Text of row k."""
        code = int(self.codes[k])
        return None if code < 0 else self.values[code]

    def recode(self, known: dict[str, int]) -> npt.NDArray[np.int64]:
        """Return each row's number in `known`; -1 where it isn't there or null."""
        table = np.array([*(known.get(value, -1) for value in self.values), -1], dtype=np.int64)
        return table[self.codes]


@dataclass(frozen=True)
class Manifest:
    """crops.parquet, or slabs.parquet, as arrays; null whole numbers are -1. Optional columns may be missing."""

    place: str
    num_rows: int
    numbers: dict[str, Array]
    texts: dict[str, Coded]

    def rows_by_scan(self, uids: list[str]) -> list[list[int]]:
        """Return the rows that belong to each series."""
        scan = self.texts["series_uid"].recode({uid: k for k, uid in enumerate(uids)})
        order = np.argsort(scan, kind="stable")
        ends = np.searchsorted(scan[order], np.arange(len(uids) + 1))
        return [order[ends[k] : ends[k + 1]].tolist() for k in range(len(uids))]

    def crop(self, k: int) -> dict[str, Any]:
        """Return which crop row k is, as the optional fields of a finding."""
        return {
            "shard_id": self.texts["shard_id"][k],
            "shard_row": int(self.numbers["shard_row"][k]),
            "series_uid": self.texts["series_uid"][k],
            "candidate_id": int(number) if (number := self.numbers["candidate_id"][k]) >= 0 else None,
        }


def load_manifest(
    store: Path, place: str, columns: tuple[schema.Column, ...], num_rows: int, found: Findings
) -> Manifest | None:
    """Read crops.parquet or slabs.parquet; None, with the reason among the findings, where it can't be used."""
    table = _load(store, place, columns, num_rows, found)
    if table is None:
        return None
    numbers: dict[str, Array] = {}
    texts: dict[str, Coded] = {}
    for column in (column for column in columns if column.name in table.column_names):
        values = table.column(column.name).combine_chunks()
        if column.type == "string":
            coded = values.dictionary_encode()
            codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            texts[column.name] = Coded(codes, coded.dictionary.to_pylist())
        else:
            whole = column.type.startswith("int")
            numbers[column.name] = (values.fill_null(-1) if whole else values).to_numpy(zero_copy_only=False)
    return Manifest(place, table.num_rows, numbers, texts)


def load_scans(store: Path, num_scans: int, found: Findings) -> list[dict[str, Any]] | None:
    """Read scans.parquet as one dict a row; None, with the reason among the findings, where it can't be used."""
    table = _load(store, schema.SCANS_FILE, schema.SCAN_COLUMNS, num_scans, found)
    if table is None:
        return None
    absent = dict.fromkeys(column.name for column in schema.SCAN_COLUMNS if column.optional)
    return [{**absent, **row} for row in table.to_pylist()]


def _load(
    store: Path, place: str, columns: tuple[schema.Column, ...], num_rows: int, found: Findings
) -> pa.Table | None:
    try:
        look(store, place)
        with pq.ParquetFile(store / place, page_checksum_verification=True) as file:
            _check_schema(file, columns)
            got = file.metadata.num_rows
            if got != num_rows:
                found.error("wrong-count", place, f"{got} rows; store.json counts {num_rows}: another build's table?")
            if got > MOST_ROWS:
                return None
            table = file.read(use_threads=False)
            table.validate(full=True)
    except BadFileError as bad:
        if bad.code == "table-schema":  # what `look` finds is told by the check of every file
            found.error(bad.code, place, str(bad))
        return None
    except Exception as error:
        found.error("table-unreadable", place, f"can't be read: {type(error).__name__}: {str(error)[:160]}")
        return None
    return None if _has_null(table, place, columns, found) else table


def _check_schema(file: pq.ParquetFile, columns: tuple[schema.Column, ...]) -> None:
    fields = file.schema_arrow
    got = [(field.name, field.type) for field in fields]
    there = (column for column in columns if not column.optional or column.name in fields.names)
    expected = [(column.name, _arrow_type(column.type)) for column in there]
    code = "table-schema"
    for k, (name, kind) in enumerate(expected):
        if k >= len(got) or got[k][0] != name:
            message = f"column {k} is {got[k][0] if k < len(got) else 'absent'!r:.60}, expected {name!r}"
            raise BadFileError(code, message)
        if got[k][1] != kind:
            message = f"column {name} is {got[k][1]}, expected {kind}"
            raise BadFileError(code, message)
    if len(got) > len(expected):
        message = f"has a column more than the format: {got[len(expected)][0]!r:.60}"
        raise BadFileError(code, message)
    notes = fields.metadata or {}
    for key, value in (("lunaprep.format", schema.FORMAT), ("lunaprep.version", str(schema.FORMAT_VERSION))):
        if notes.get(key.encode()) != value.encode():
            message = f"its schema metadata has {key} = {notes.get(key.encode())!r:.60}, expected {value!r}"
            raise BadFileError(code, message)


def _has_null(table: pa.Table, place: str, columns: tuple[schema.Column, ...], found: Findings) -> bool:
    nulls = [c.name for c in columns if not c.nullable and table.column(c.name).null_count]
    for name in nulls:
        found.error("bad-value", place, f"column {name} has a null; it must not")
    return bool(nulls)


def _arrow_type(name: str) -> pa.DataType:
    if name.startswith("list<"):
        return pa.list_(_TYPES[name[5:-1]])
    return _TYPES[name]
