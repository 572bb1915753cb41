"""Subsets of the store that this build does not touch, because their scans are not in the data folder."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lunaprep import schema
from lunaprep.errors import StoreError, UsageError
from lunaprep.plan import Plan
from lunaprep.store.tables import read_table

SHARD_ID = re.compile(r"subset(\d+)-(\d+)-[0-9a-f]{12}")


@dataclass(frozen=True)
class Carried:
    """Rows and shards that go into the new store as they are."""

    rows: pd.DataFrame
    scans: pd.DataFrame
    shards: tuple[dict[str, Any], ...]
    slabs: pd.DataFrame
    slab_shards: tuple[dict[str, Any], ...] = ()
    has_slabs: bool = False
    """Whether the subsets were built with targets, be there a slab among them or not."""


def shard_place(shard_id: str) -> tuple[int, int]:
    """Subset and number of a shard.

    >>> shard_place("subset3-012-0123456789ab")
    (3, 12)
    """
    match = SHARD_ID.fullmatch(shard_id)
    assert match, shard_id
    return int(match[1]), int(match[2])


def store_subsets(out: Path) -> set[int]:
    """Subsets a store holds shards of, as its receipts' names tell (store.json may be damaged)."""
    names = (path.stem for path in (out / schema.SHARDS_DIR).glob("*.json"))
    return {shard_place(name)[0] for name in names if SHARD_ID.fullmatch(name)}


def carry_over(out: Path, record: Mapping[str, Any] | None, planned: Collection[int]) -> Carried:
    """Take over what the store has of subsets that are not planned.

    Raises
    ------
    StoreError
        The store's tables are damaged, and the scans to make them again from are not there.
    """
    keep = store_subsets(out) - set(planned)
    if not keep:
        return Carried(_empty(schema.MANIFEST_COLUMNS), _empty(schema.SCAN_COLUMNS), (), _empty(schema.SLAB_COLUMNS))
    try:
        if record is None:
            message = f"{schema.STORE_FILE} is missing or damaged"
            raise StoreError(message)
        rows = read_table(out / schema.MANIFEST_FILE, schema.MANIFEST_COLUMNS)
        scans = read_table(out / schema.SCANS_FILE, schema.SCAN_COLUMNS)
        has_slabs = "slabs" in record
        slabs = read_table(out / schema.SLABS_FILE, schema.SLAB_COLUMNS) if has_slabs else _empty(schema.SLAB_COLUMNS)
    except StoreError as error:
        names = ", ".join(f"subset{number}" for number in sorted(keep))
        message = (
            f"{out}: {str(error).split('. ')[0]}, so the rows of {names} cannot be kept, and the data folder does not "
            "have the scans. Put them back and build again, or choose another --out"
        )
        raise StoreError(message) from error
    shards = tuple(shard for shard in record["shards"] if shard_place(shard["id"])[0] in keep)
    listed = record["slabs"]["shards"] if has_slabs else ()
    slab_shards = tuple(shard for shard in listed if shard_place(shard["id"])[0] in keep)
    rows, scans, slabs = (table[table["subset"].isin(keep)] for table in (rows, scans, slabs))
    return Carried(rows, scans, shards, slabs, slab_shards, has_slabs)


def _empty(columns: Sequence[schema.Column]) -> pd.DataFrame:
    return pd.DataFrame(columns=[column.name for column in columns])


def check_fits(carried: Carried, record: Mapping[str, Any] | None, plan: Plan) -> None:
    """Refuse to put what is planned beside rows carried over that were made in another way.

    Raises
    ------
    UsageError
        A parameter that reaches the crops or labels differs; or a table, whose row numbers are the candidates' ids; or
        a series is in both.
    """
    if not carried.shards or record is None:
        return
    subset = f"subset{shard_place(carried.shards[0]['id'])[0]}"
    gone = f"{subset} of the store was made with another %s, and its scans are not in the data folder. %s"
    had = {**record["parameters"], "dtype": record["slabs" if carried.has_slabs else "crops"]["dtype"]}
    want = {**plan.parameters.to_json(), "dtype": plan.dtype if carried.has_slabs else plan.crop_dtype}
    for name in ("crop_shape", "hu", "edge", "resample_mm", "match", "dtype"):
        if had.get(name) != want.get(name):
            raise UsageError(gone % (name, f"{_as_option(name, had.get(name), want.get(name))}, or take another --out"))
    listed = {item["role"]: item["sha256"] for item in record["inputs"]}
    given = {item.role: item.sha256 for item in plan.source.files}
    for role in ("candidates", "annotations"):
        if listed.get(role) != given.get(role):
            raise UsageError(gone % (f"table of {role}", f"Use that table (--{role}), or take another --out"))
    places = {item.series_uid: item.subset for item in plan.source.scans}
    for uid, number in zip(carried.scans["series_uid"], carried.scans["subset"], strict=True):
        if uid in places:
            message = (
                f"series {uid} lies in subset{places[uid]} of the data, and in subset{number} of the store, whose "
                "folder is not in the data. Move it back, or take another --out"
            )
            raise UsageError(message)


def _as_option(name: str, value: Any, wanted: Any) -> str:
    """What to say to `build` to get a parameter's value again."""
    if (name, value, wanted) == ("dtype", "int16", "float32"):
        return "Put them back"  # the scans now need float32
    option = f"--{name.replace('_', '-')}"
    if value is None:
        return f"Leave {option} out"
    between = "," if name == "resample_mm" else " "
    return f"Use {option} {between.join(map(str, value)) if isinstance(value, list) else value}"
