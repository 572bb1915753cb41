"""crops.parquet and scans.parquet: DataFrame to Parquet with page checksums, and back."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    arrays = [pa.array(frame[field.name], type=field.type, from_pandas=field.nullable) for field in wanted]
    table = pa.Table.from_arrays(arrays, schema=wanted)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def read_table(path: Path, columns: Sequence[schema.Column]) -> pd.DataFrame:
    """Read one of the store's tables, its page checksums verified; nullable columns get pandas' nullable types.

    An optional column that is not there comes back without a value.

    Raises
    ------
    StoreError
        Not there, damaged, or another schema.
    """
    try:
        plain_size(path)
        with path.open("rb") as file:  # given a folder's name, Arrow would read every file in it
            table = pq.read_table(file, page_checksum_verification=True)
            names = table.column_names
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        first = ascii(str(error).splitlines()[0][:160])[1:-1]
        message = f"{path.name} cannot be read: {first}. Run 'lunaprep verify', then 'lunaprep build' again"
        raise StoreError(message) from error
    there = [column for column in columns if not column.optional or column.name in names]
    if not table.schema.equals(arrow_schema(there)):
        message = f"{path.name} has other columns than format {schema.FORMAT_VERSION}. Run 'lunaprep build' again"
        raise StoreError(message)
    arrays, count = dict(zip(names, table.columns, strict=True)), table.num_rows
    del table  # Arrow's columns go one by one as pandas' come: both together would be twice the memory
    made = {}
    for column in columns:
        array = arrays.pop(column.name, None)
        if array is None:
            made[column.name] = pd.Series([None] * count, dtype=object)
        elif column.nullable and column.type in ("bool", "int64", "int32"):
            dtype = {"bool": "boolean", "int64": "Int64", "int32": "Int32"}[column.type]
            made[column.name] = array.to_pandas(types_mapper=_nullable).astype(dtype)
        else:
            made[column.name] = array.to_pandas()
        del array
    return pd.DataFrame(made, index=pd.RangeIndex(count), copy=False)


def _nullable(kind: Any) -> Any:
    return {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}.get(kind)
