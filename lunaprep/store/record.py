"""store.json: made from finished shards and tables, and read back."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lunaprep import schema
from lunaprep.errors import StoreError, UsageError
from lunaprep.store.files import canonical_json, digest


def make_record(content: Mapping[str, Any]) -> bytes:
    """The file store.json: `content`, with format, version and the checksum of itself."""
    value = {**content, "format": schema.FORMAT, "version": schema.FORMAT_VERSION}
    return canonical_json({**value, "self_sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


def store_id_of(parameters: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], tables: Mapping[str, str]) -> str:
    """16 hex digits that name a store's content."""
    hashes = [[shard["id"], shard["sha256"]] for shard in shards]
    return digest({"parameters": dict(parameters), "shards": hashes, "tables": dict(tables)})[:16]


def read_record(store: Path) -> dict[str, Any]:
    """Read and check store.json.

    Raises
    ------
    UsageError
        There is no store.
    StoreError
        It is damaged, or of a format this version does not know.
    """
    path = store / schema.STORE_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        message = (
            f"{store} is no store: {schema.STORE_FILE}: {error.strerror}. Make one with 'lunaprep build --out {store}'"
        )
        raise UsageError(message) from error
    try:
        value = json.loads(data)
        said = value.pop("self_sha256")
        good = hashlib.sha256(canonical_json(value)).hexdigest() == said
        good = good and canonical_json({**value, "self_sha256": said}) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        good = False
    if not good:
        message = (
            f"{path} is damaged: its checksum does not match. Run 'lunaprep build' again; finished shards are kept"
        )
        raise StoreError(message)
    if value.get("format") != schema.FORMAT or value.get("version") != schema.FORMAT_VERSION:
        message = (
            f"{path} has format {value.get('format')} {value.get('version')}; this lunaprep reads {schema.FORMAT} "
            f"{schema.FORMAT_VERSION}. Build the store anew, or install the lunaprep that made it"
        )
        raise StoreError(message)
    return dict(value)
