"""crops.parquet and scans.parquet: DataFrame to Parquet with page checksums, and back."""

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lunaprep import schema
from lunaprep.errors import StoreError
from lunaprep.store.layout import plain_size

ROW_GROUP_ROWS = 1 << 18

_ARROW: dict[str, Any] = {
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "list<float64>": pa.list_(pa.float64()),
    "list<uint64>": pa.list_(pa.uint64()),
    "list<int32>": pa.list_(pa.int32()),
}


def arrow_schema(columns: Sequence[schema.Column]) -> Any:
    """Arrow schema of one of the store's tables."""
    metadata = {"lunaprep.format": schema.FORMAT, "lunaprep.version": str(schema.FORMAT_VERSION)}
    fields = [pa.field(column.name, _ARROW[column.type], nullable=column.nullable) for column in columns]
    return pa.schema(fields, metadata=metadata)


def table_bytes(frame: pd.DataFrame, columns: Sequence[schema.Column]) -> bytes:
    """The Parquet file of a table; the same rows give the same bytes.

    Parameters
    ----------
    frame : DataFrame
        Has all the columns but optional ones; others are left out.
    columns : sequence of schema.Column
        Names, types and order.
    """
    wanted = arrow_schema([c for c in columns if not c.optional or (c.name in frame and frame[c.name].notna().any())])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, wanted, compression="zstd", write_page_checksum=True) as writer:
        for first in range(0, max(1, len(frame)), ROW_GROUP_ROWS):  # Arrow's copy is of one group at a time
            rows = frame.iloc[first : first + ROW_GROUP_ROWS]
            table = pa.Table.from_arrays([_arrow(rows[field.name], field) for field in wanted], schema=wanted)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    return buffer.getvalue()


def _arrow(column: "pd.Series[Any]", field: Any) -> Any:
    """A column of a table as Arrow has it."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return pa.array(column, type=field.type, from_pandas=field.nullable)
    codes = column.cat.codes.to_numpy()
    return pa.array(column.cat.categories, type=field.type).take(pa.array(codes, mask=codes < 0))


def read_table(
    path: Path,
    columns: Sequence[schema.Column],
    names: Collection[str] | None = None,
    rows: npt.NDArray[np.int64] | None = None,
) -> pd.DataFrame:
    """Read one of the store's tables, its page checksums verified; nullable columns get pandas' nullable types.

    An optional column that is not there comes back without a value.

    Parameters
    ----------
    path : Path
        The file.
    columns : sequence of schema.Column
        What it must hold.
    names : collection of str, optional
        Columns to read, their texts as categories; default all, texts as texts.
    rows : ndarray of int64, optional
        Rows to keep, ascending, which then are the index; default all.

    Raises
    ------
    StoreError
        Not there, damaged, or another schema.
    """
    try:
        plain_size(path)
        with path.open("rb") as file:  # given a folder's name, Arrow would read every file in it
            fields = pq.ParquetFile(file).schema_arrow
            there = [column for column in columns if not column.optional or column.name in fields.names]
            wanted = [column for column in there if names is None or column.name in names]
            table = _read(file, wanted, rows, coded=names is not None) if fields.equals(arrow_schema(there)) else None
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        first = ascii(str(error).splitlines()[0][:160])[1:-1]
        message = f"{path.name} cannot be read: {first}. Run 'lunaprep verify', then 'lunaprep build' again"
        raise StoreError(message) from error
    if table is None:
        message = f"{path.name} has other columns than format {schema.FORMAT_VERSION}. Run 'lunaprep build' again"
        raise StoreError(message)
    arrays, count = dict(zip(table.column_names, table.columns, strict=True)), table.num_rows
    del table  # Arrow's columns go one by one as pandas' come: both together would be twice the memory
    made = {}
    for column in (column for column in columns if names is None or column.name in names):
        array = arrays.pop(column.name, None)
        if array is None:
            made[column.name] = pd.Series([None] * count, dtype=object)
        elif column.nullable and column.type in ("bool", "int64", "int32"):
            dtype = {"bool": "boolean", "int64": "Int64", "int32": "Int32"}[column.type]
            made[column.name] = array.to_pandas(types_mapper=_nullable).astype(dtype)
        else:
            made[column.name] = array.to_pandas()
        del array
    frame = pd.DataFrame(made, index=pd.RangeIndex(count), copy=False)
    return frame if rows is None else frame.set_axis(rows)


def _read(file: Any, columns: Sequence[schema.Column], rows: npt.NDArray[np.int64] | None, *, coded: bool) -> Any:
    """Columns of a table; of some rows, group by group, so that no more than these are held."""
    names = [column.name for column in columns]
    texts = [column.name for column in columns if coded and column.type == "string"]
    parquet = pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=texts)
    if rows is None:
        return parquet.read(columns=names)
    parts, first = [], 0
    for number in range(parquet.num_row_groups):
        stop = first + parquet.metadata.row_group(number).num_rows
        mine = rows[slice(*np.searchsorted(rows, [first, stop]))]
        if len(mine):
            parts.append(parquet.read_row_group(number, columns=names).take(mine - first))
        first = stop
    if len(rows) and rows[-1] >= first:
        message = f"it has fewer rows than expected, {first}"
        raise pa.ArrowInvalid(message)
    return pa.concat_tables(parts) if parts else parquet.read(columns=names).slice(0, 0)


def _nullable(kind: Any) -> Any:
    return {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}.get(kind)
