"""store.json: made from finished shards and tables, and read back."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lunaprep import schema
from lunaprep.errors import DiskError, FormatError, StoreError, UsageError
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
    DiskError
        The system would not read it.
    StoreError
        It is damaged; a `FormatError` where it is of a format that this version does not know.
    """
    path = store / schema.STORE_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(_no_store(store)) from error
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}. Look at the disk and at the rights on it"
        raise DiskError(message) from error
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
            f"{schema.FORMAT_VERSION}. Install the lunaprep that made it, or take another folder"
        )
        raise FormatError(message)
    fault = _fault_of(value)
    if fault:
        message = f"{path}: {fault}. Don't trust this store; build it anew"
        raise StoreError(message)
    return dict(value)


def _no_store(store: Path) -> str:
    """What is said of a folder or file that is no store."""
    if (store / "run.json").exists():
        return f"{store} is a run of lunatrain's, no store. Name the folder that 'lunaprep build --out' wrote"
    if store.is_file():
        return f"{store} is a file, no store. Name the folder that 'lunaprep build --out' wrote, or its crops.h5"
    return f"{store} is no store: it has no {schema.STORE_FILE}. Make one with 'lunaprep build --out {store}'"


def _fault_of(value: dict[str, Any]) -> str | None:
    """What in a record cannot be, although its checksum is right; None if it can."""
    crops, counts, shards = value.get("crops"), value.get("counts"), value.get("shards")
    if not (isinstance(crops, dict) and isinstance(counts, dict) and isinstance(shards, list)):
        return "crops, counts or shards is missing"
    if crops.get("dtype") not in schema.CROP_DTYPES:
        return f"crops.dtype is {crops.get('dtype')!r:.40}, expected one of {', '.join(schema.CROP_DTYPES)}"
    shape = crops.get("shape")
    if not (isinstance(shape, list) and len(shape) == 4 and all(_is_count(side) for side in shape) and all(shape[1:])):
        return f"crops.shape is {shape!r:.60}, expected four whole numbers"
    if not all(_is_shard(shard) for shard in shards):
        return "an entry of shards lacks id, file, rows, bytes or a hash"
    rows = sum(shard["rows"] for shard in shards)
    if not rows == shape[0] == counts.get("crops"):
        return f"shards hold {rows} crops, crops.shape says {shape[0]}, counts.crops {counts.get('crops')!r:.40}"
    if "slabs" in value and (fault := _slab_fault(value["slabs"])):
        return fault
    if fault := _spacing_fault(value.get("parameters")):
        return fault
    texts = isinstance(value.get("store_id"), str) and isinstance(value.get("parameters"), dict)
    lists = isinstance(value.get("inputs"), list) and isinstance(value.get("files"), list)
    return None if texts and lists else "store_id, parameters, inputs or files is missing"


def _spacing_fault(parameters: object) -> str | None:
    """What in the spacing of resampled crops cannot be; None if they have none of their own."""
    spacing = parameters.get("resample_mm") if isinstance(parameters, dict) else None
    if spacing is None:
        return None
    good = isinstance(spacing, list) and len(spacing) == 3
    good = good and all(isinstance(mm, int | float) and not isinstance(mm, bool) and 0 < mm < 1000 for mm in spacing)
    return None if good else f"parameters.resample_mm is {spacing!r:.60}, expected three spacings, mm"


def _slab_fault(slabs: object) -> str | None:
    """What in the optional part on slabs cannot be."""
    if not (isinstance(slabs, dict) and isinstance(slabs.get("shards"), list)):
        return "slabs or its shards is missing"
    if slabs.get("dtype") not in schema.CROP_DTYPES:
        return f"slabs.dtype is {slabs.get('dtype')!r:.40}, expected one of {', '.join(schema.CROP_DTYPES)}"
    shape = slabs.get("shape")
    if not (isinstance(shape, list) and shape[1:] == list(schema.SLAB_SHAPE) and _is_count(shape[0])):
        return f"slabs.shape is {shape!r:.60}, expected slabs of {schema.SLAB_SHAPE}"
    for shard in slabs["shards"]:
        texts = isinstance(shard, dict) and all(isinstance(shard.get(key), str) for key in ("id", "file", "mask_file"))
        if not (texts and all(_is_count(shard.get(key)) for key in ("rows", "bytes", "mask_bytes")) and shard["rows"]):
            return "an entry of slabs.shards lacks id, a file, rows or bytes"
    rows = sum(shard["rows"] for shard in slabs["shards"])
    return None if rows == shape[0] else f"slabs.shards hold {rows} slabs, slabs.shape says {shape[0]}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_shard(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts = all(isinstance(value.get(key), str) for key in ("id", "receipt", "receipt_sha256"))
    file = value.get("file")
    named = isinstance(file, str) if value.get("rows") else file is None
    return texts and named and _is_count(value.get("rows")) and _is_count(value.get("bytes"))
