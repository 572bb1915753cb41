"""crops.parquet and scans.parquet: nothing is lost on the way, and damage is found."""

import errno
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lunaprep import schema
from lunaprep.errors import NoSpaceError, StoreError
from lunaprep.schema import MANIFEST_COLUMNS, SCAN_COLUMNS, Column
from lunaprep.store import tables
from lunaprep.store.files import write_file
from lunaprep.store.tables import arrow_schema, read_table, table_bytes

BIG = 2**64 - 1


def value_of(column: Column, k: int) -> object:
    """Something for the k-th row; None in every third where that may be."""
    if column.nullable and k % 3 == 1:
        return None
    if column.name == "diameter_mm" and k % 2:
        return float("nan")
    if column.type.startswith("list<"):
        kind = {"list<float64>": float, "list<uint64>": lambda n: BIG - n, "list<int32>": int}[column.type]
        return [kind(n) for n in range(k % 4)]
    return {
        "bool": k % 2 == 0,
        "string": f"ü{column.name}-{k:03d}" if k % 5 else "",
        "float64": k / 7 - 1,
        "uint64": BIG - k,
    }.get(column.type, k - 2)


def frame_of(columns: tuple[Column, ...], count: int) -> pd.DataFrame:
    return pd.DataFrame({c.name: pd.Series([value_of(c, k) for k in range(count)], dtype=object) for c in columns})


def plain(value: object) -> object:
    """As Python has it: nulls None, NaN "nan", arrays lists."""
    if isinstance(value, np.ndarray | list):
        return [plain(item) for item in value]
    if value is None or value is pd.NA:
        return None
    if isinstance(value, float) and np.isnan(value):
        return "nan"
    return value.item() if isinstance(value, np.generic) else value


def rows_of(frame: pd.DataFrame, columns: tuple[Column, ...]) -> list[list[object]]:
    """All values; in pandas a nullable text or number shows its null as NaN."""
    lists = []
    for c in columns:
        values = [plain(value) for value in frame[c.name]]
        lists.append([None if c.nullable and value == "nan" else value for value in values])
    return [list(row) for row in zip(*lists, strict=True)]


TABLES = pytest.mark.parametrize("columns", [MANIFEST_COLUMNS, SCAN_COLUMNS], ids=["crops", "scans"])


@TABLES
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_table_comes_back_with_its_nulls_and_nans(tmp_path, columns, count):
    frame = frame_of(columns, count)
    path = tmp_path / "t.parquet"
    path.write_bytes(table_bytes(frame, columns))
    back = read_table(path, columns)
    assert back.columns.tolist() == [c.name for c in columns]
    assert rows_of(back, columns) == rows_of(frame, columns)
    for c in columns:
        if c.nullable and c.type == "bool":
            assert back[c.name].dtype == "boolean"
        if c.nullable and c.type in ("int32", "int64"):
            assert back[c.name].dtype == c.type.capitalize()
        if not c.nullable and c.type not in ("string",):
            assert back[c.name].dtype == c.type


@TABLES
def test_pyarrow_sees_nulls_where_there_are_and_nan_where_there_are(tmp_path, columns):
    path = tmp_path / "t.parquet"
    path.write_bytes(table_bytes(frame_of(columns, 12), columns))
    table = pq.read_table(path)
    for c in columns:
        assert table[c.name].null_count == (4 if c.nullable else 0), c.name
        assert str(table.schema.field(c.name).type).replace("double", "float64").replace("element", "item") in (
            c.type, {"list<float64>": "list<item: float64>", "list<uint64>": "list<item: uint64>",
                     "list<int32>": "list<item: int32>"}.get(c.type), )  # fmt: skip
    if columns is MANIFEST_COLUMNS:
        assert sum(np.isnan(table["diameter_mm"].to_pylist())) == 6
    assert table.schema.metadata == {b"lunaprep.format": b"lunaprep-store", b"lunaprep.version": b"1"}


@TABLES
def test_page_checksums_are_written(tmp_path, columns):
    """Spoil one byte of every page in turn; Arrow must say so itself."""
    data = table_bytes(frame_of(columns, 9), columns)
    path = tmp_path / "t.parquet"
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    for k in range(group.num_columns):
        at = group.column(k).data_page_offset + group.column(k).total_compressed_size
        if group.column(k).has_dictionary_page:
            at = group.column(k).dictionary_page_offset + group.column(k).total_compressed_size
        spoilt = bytearray(data)
        spoilt[at - 1] ^= 0x10
        path.write_bytes(spoilt)
        with pytest.raises(StoreError):
            read_table(path, columns)


@pytest.mark.parametrize("count", [0, 7, 30])
def test_row_groups_one_by_one_are_the_bytes_of_pyarrows_whole_table(monkeypatch, count):
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 7)
    frame = frame_of(MANIFEST_COLUMNS, count)
    wanted = arrow_schema([c for c in MANIFEST_COLUMNS if not c.optional or frame[c.name].notna().any()])
    arrays = [pa.array(frame[f.name], type=f.type, from_pandas=f.nullable) for f in wanted]
    whole = pa.BufferOutputStream()
    how = {"row_group_size": 7, "compression": "zstd", "write_page_checksum": True}
    pq.write_table(pa.Table.from_arrays(arrays, schema=wanted), whole, **how)
    texts = [c.name for c in MANIFEST_COLUMNS if c.type == "string"]
    coded = frame.astype(dict.fromkeys(texts, "category"))
    assert table_bytes(frame, MANIFEST_COLUMNS) == table_bytes(coded, MANIFEST_COLUMNS) == whole.getvalue().to_pybytes()


@pytest.mark.parametrize("optional", [True, False])
def test_some_columns_and_some_rows_are_those_of_the_whole(monkeypatch, tmp_path, optional):
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 7)
    frame, path = frame_of(MANIFEST_COLUMNS, 30), tmp_path / "t.parquet"
    if not optional:
        frame = frame.drop(columns=[c.name for c in MANIFEST_COLUMNS if c.optional])
    path.write_bytes(table_bytes(frame, MANIFEST_COLUMNS))
    whole = read_table(path, MANIFEST_COLUMNS)
    names = ["split_series", "is_malignant", "subtype", "fold"]
    some = read_table(path, MANIFEST_COLUMNS, names)
    assert some.columns.tolist() == [name for name in whole if name in names]
    assert isinstance(some["split_series"].dtype, pd.CategoricalDtype)
    chosen = tuple(c for c in MANIFEST_COLUMNS if c.name in names)
    assert rows_of(some, chosen) == rows_of(whole, chosen)
    assert len(read_table(path, MANIFEST_COLUMNS, [])) == 30
    for rows in ([], [0], [6, 7], [3, 13, 14, 29], range(30)):
        got = read_table(path, MANIFEST_COLUMNS, rows=np.array(rows, dtype=np.int64))
        pd.testing.assert_frame_equal(got, whole.iloc[list(rows)])
    with pytest.raises(StoreError, match="fewer rows"):
        read_table(path, MANIFEST_COLUMNS, rows=np.array([30]))


@TABLES
def test_same_rows_give_the_same_bytes(columns):
    frame = frame_of(columns, 30)
    shuffled = frame[list(reversed(frame.columns))].assign(note=1)
    shuffled.index = range(100, 130)
    assert table_bytes(frame, columns) == table_bytes(frame.copy(), columns) == table_bytes(shuffled, columns)
    assert table_bytes(frame, columns) != table_bytes(frame.iloc[::-1], columns)


def test_pandas_nullable_types_give_the_same_bytes_as_objects():
    frame = frame_of(MANIFEST_COLUMNS, 30)
    typed = frame.astype({"annotation_id": "Int64", "is_malignant": "boolean", "xxh3": "uint64", "diameter_mm": float})
    assert table_bytes(typed, MANIFEST_COLUMNS) == table_bytes(frame, MANIFEST_COLUMNS)


@pytest.mark.parametrize("columns", [MANIFEST_COLUMNS, SCAN_COLUMNS], ids=["crops", "scans"])
def test_flipped_bytes_are_found_or_change_nothing(tmp_path, columns):
    frame = frame_of(columns, 40)
    data = table_bytes(frame, columns)
    path = tmp_path / "t.parquet"
    path.write_bytes(data)
    good = rows_of(read_table(path, columns), columns)
    rng = np.random.default_rng(11)
    messages: list[str] = []
    for at in rng.integers(0, len(data), 60).tolist():
        spoilt = bytearray(data)
        spoilt[at] ^= int(rng.integers(1, 256))
        path.write_bytes(spoilt)
        try:
            back = read_table(path, columns)
        except StoreError as error:
            messages.append(str(error))
        else:
            assert rows_of(back, columns) == good, at
    assert len(messages) > 20
    assert all("t.parquet" in message for message in messages)
    assert [message for message in messages if not message.isprintable()] == []


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.999])
def test_cut_table_is_a_store_error(tmp_path, share):
    data = table_bytes(frame_of(MANIFEST_COLUMNS, 40), MANIFEST_COLUMNS)
    path = tmp_path / "t.parquet"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(StoreError, match=r"t\.parquet cannot be read"):
        read_table(path, MANIFEST_COLUMNS)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"PAR1PAR1", b"series_uid,x\na,1\n", bytes(5000)], ids=repr)
def test_what_is_no_parquet_is_a_store_error(tmp_path, content):
    path = tmp_path / "t.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"t\.parquet") as info:
        read_table(path, MANIFEST_COLUMNS)
    assert str(info.value).isprintable()


def test_folder_in_the_place_of_a_table_is_a_store_error(tmp_path):
    """Arrow would read all files in it, links to elsewhere too."""
    folder = tmp_path / "store" / "t.parquet"
    folder.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere.parquet"
    elsewhere.write_bytes(table_bytes(frame_of(MANIFEST_COLUMNS, 4), MANIFEST_COLUMNS))
    (folder / "part.parquet").symlink_to(elsewhere)
    with pytest.raises(StoreError):
        read_table(folder, MANIFEST_COLUMNS)


def test_folder_names_are_not_taken_for_columns(tmp_path):
    path = tmp_path / "run=5" / "subset=3" / "t.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(table_bytes(frame_of(MANIFEST_COLUMNS, 4), MANIFEST_COLUMNS))
    assert read_table(path, MANIFEST_COLUMNS)["subset"].tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "type", "order", "nullable", "other table"])
def test_table_of_another_schema_is_a_store_error(tmp_path, change):
    columns = list(MANIFEST_COLUMNS)
    k = next(i for i, c in enumerate(columns) if c.name == "index")
    if change == "missing":
        del columns[k]
    elif change == "extra":
        columns.append(Column("note", "string", True, ""))
    elif change == "renamed":
        columns[k] = Column("slice", "int32", False, "")
    elif change == "type":
        columns[k] = Column("index", "int64", False, "")
    elif change == "order":
        columns[k], columns[k + 1] = columns[k + 1], columns[k]
    elif change == "nullable":
        columns[k] = Column("index", "int32", True, "")
    else:
        columns = list(SCAN_COLUMNS)
    path = tmp_path / "t.parquet"
    path.write_bytes(table_bytes(frame_of(tuple(columns), 5), columns))
    with pytest.raises(StoreError, match=r"t\.parquet has other columns"):
        read_table(path, MANIFEST_COLUMNS)


def test_an_optional_column_without_a_value_is_left_out_and_comes_back_empty(tmp_path):
    path = tmp_path / "t.parquet"
    plain_columns = [c for c in SCAN_COLUMNS if not c.optional]
    frame = frame_of(SCAN_COLUMNS, 5)
    for names in (["study_uid", "mask_source"], ["study_uid"]):
        path.write_bytes(table_bytes(frame.assign(**dict.fromkeys(names)), SCAN_COLUMNS))
        got = pq.read_schema(path).names
        assert got == [c.name for c in SCAN_COLUMNS if c.name not in names]
        back = read_table(path, SCAN_COLUMNS)
        assert back.columns.tolist() == [c.name for c in SCAN_COLUMNS]
        assert back["study_uid"].isna().all()
    bare = frame[[c.name for c in plain_columns]]
    assert table_bytes(bare, SCAN_COLUMNS) == table_bytes(bare, plain_columns)
    assert [c.optional for c in SCAN_COLUMNS] == sorted(c.optional for c in SCAN_COLUMNS)


def test_every_column_has_a_type_the_writer_knows():
    for columns in (MANIFEST_COLUMNS, SCAN_COLUMNS):
        assert arrow_schema(columns).names == [c.name for c in columns]


def test_null_where_none_may_be_is_not_written(tmp_path):
    frame = frame_of(MANIFEST_COLUMNS, 3)
    frame.loc[1, "series_uid"] = None
    with pytest.raises(pa.ArrowException):
        table_bytes(frame, MANIFEST_COLUMNS)


def test_more_rows_than_one_group_come_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("lunaprep.store.tables.ROW_GROUP_ROWS", 7)
    path = tmp_path / "t.parquet"
    path.write_bytes(table_bytes(frame_of(MANIFEST_COLUMNS, 40), MANIFEST_COLUMNS))
    assert pq.ParquetFile(path).num_row_groups == 6
    assert read_table(path, MANIFEST_COLUMNS)["candidate_id"].tolist() == list(range(-2, 38))


@pytest.mark.parametrize("call", ["pwrite", "fsync", "open"])
def test_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / schema.MANIFEST_FILE
    write_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(NoSpaceError, match=r"crops\.parquet: the disk is full"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
