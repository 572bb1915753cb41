"""store.json, parsed and checked in form: what the store says of itself."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lunaprep import schema
from lunaprep.verify.findings import Findings
from lunaprep.verify.places import BadFileError, read_whole

T = TypeVar("T")

MIN_CROP_VOXELS = 512

SHARD_ID = re.compile(r"subset(\d+)-\d{3,}-[0-9a-f]{12}")
_HEX = re.compile(r"[0-9a-f]+")
_TABLES = (schema.FRONT_DOOR_FILE, schema.MANIFEST_FILE, schema.SCANS_FILE)
_COUNTS = ("scans_ok", "scans_failed", "crops", "nodules", "volumes")


@dataclass(frozen=True)
class FileRecord:
    """One file and what it must be."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """One entry of ``shards``, or a file of ``slabs.shards``; `file` and `sha256` are None where there is no row."""

    id: str
    file: str | None
    rows: int
    bytes: int
    sha256: str | None
    receipt: str
    receipt_sha256: str
    dataset: str
    crop_shape: tuple[int, int, int]
    dtype: str

    @property
    def crop_bytes(self) -> int:
        """Bytes of one crop, slab or mask."""
        return schema.crop_bytes(self.crop_shape, self.dtype)


@dataclass(frozen=True)
class Record:
    """What verify needs of store.json."""

    store_id: str
    crop_shape: tuple[int, int, int]
    dtype: str
    hu: tuple[float, float]
    edge: str
    val_stride: int
    counts: dict[str, int]
    inputs: tuple[FileRecord, ...]
    shards: tuple[ShardRecord, ...]
    files: dict[str, FileRecord]
    resample_mm: tuple[float, ...] | None = None
    """Spacing of resampled crops, mm to a slice, row, column."""

    slabs: tuple[ShardRecord, ...] | None = None
    """Shards of the slabs; None where the store was built without targets."""

    slab_dtype: str = ""
    masks: tuple[ShardRecord, ...] = ()
    """Shards of the slabs' masks, in the same order."""

    @property
    def mapped(self) -> list[ShardRecord]:
        """All shards that are there to be mapped: of crops, slabs, masks."""
        return [*self.shards_with_file, *(self.slabs or ()), *self.masks]

    @property
    def shards_with_file(self) -> list[ShardRecord]:
        """The shards that hold crops, in manifest order."""
        return [shard for shard in self.shards if shard.file is not None]


def canonical(value: object) -> bytes:
    """Bytes of a JSON value on the store's canonical form."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object; anything else is a BadFileError ``json-unreadable``."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        code, message = "json-unreadable", f"isn't JSON: {str(error)[:120]}"
        raise BadFileError(code, message) from None
    if not isinstance(value, dict):
        code, message = "json-unreadable", "isn't a JSON object"
        raise BadFileError(code, message)
    return value


def check_canonical(value: dict[str, Any], raw: bytes, place: str, found: Findings) -> None:
    """Report a JSON file whose bytes aren't the canonical form of its value."""
    try:
        same = canonical(value) == raw
    except (ValueError, RecursionError):
        same = False
    if not same:
        found.error("json-not-canonical", place, "its bytes aren't the canonical form: written by hand?")


def load_record(store: Path, found: Findings) -> Record | None:
    """Read store.json; None, with the reason among the findings, where it is of no use."""
    try:
        raw = read_whole(store, schema.STORE_FILE)
        value = parse_json(raw)
        _check_version(value)
        check_canonical(value, raw, schema.STORE_FILE, found)
        _check_self_hash(value, found)
        return _parse(value)
    except BadFileError as bad:
        found.error(bad.code, schema.STORE_FILE, str(bad))
    return None


def _check_version(value: dict[str, Any]) -> None:
    got, version = value.get("format"), value.get("version")
    if got != schema.FORMAT:
        code, message = "unknown-format", f"format is {got!r:.80}, expected {schema.FORMAT!r}"
        raise BadFileError(code, message)
    if isinstance(version, int) and version > schema.FORMAT_VERSION:
        code = "newer-version"
        message = f"format version {version} is newer than {schema.FORMAT_VERSION}; update lunaprep to read it"
        raise BadFileError(code, message)
    if version is True or version != schema.FORMAT_VERSION:
        code, message = "unknown-format", f"version is {version!r:.80}, expected {schema.FORMAT_VERSION}"
        raise BadFileError(code, message)


def _check_self_hash(value: dict[str, Any], found: Findings) -> None:
    rest = {key: item for key, item in value.items() if key != "self_sha256"}
    try:
        got = hashlib.sha256(canonical(rest)).hexdigest()
    except (ValueError, RecursionError):
        got = "none"
    if got != value.get("self_sha256"):
        message = (
            f"was changed after it was written: its content hashes to {got:.12}…, not self_sha256 "
            f"{value.get('self_sha256')!s:.12}…; what is said of other files below may be its fault"
        )
        found.error("store-json-edited", schema.STORE_FILE, message)


def _parse(value: dict[str, Any]) -> Record:
    parameters, counts, crops = (_get(value, key, _object) for key in ("parameters", "counts", "crops"))
    low, high = (_number(v) for v in _items(parameters, "hu", 2))
    shape = tuple(_whole(v) for v in _items(parameters, "crop_shape", 3))
    dtype, wanted = _get(crops, "dtype", _text), _get(parameters, "dtype", _text)
    _require(dtype in schema.CROP_DTYPES, f"crops.dtype is {dtype!r:.40}, expected one of {schema.CROP_DTYPES}")
    record = Record(
        store_id=_get(value, "store_id", _hex(16)),
        crop_shape=(shape[0], shape[1], shape[2]),
        dtype=dtype,
        hu=(low, high),
        edge=_get(parameters, "edge", _text),
        val_stride=_get(parameters, "val_stride", _whole),
        inputs=tuple(_file(v) for v in _items(value, "inputs")),
        shards=tuple(_shard(v, (shape[0], shape[1], shape[2]), dtype) for v in _items(value, "shards")),
        files={file.file: file for file in (_file(v) for v in _items(value, "files"))},
        resample_mm=_spacing(parameters, dtype),
        **_slabs(value, counts),
    )
    _require(wanted in (dtype, "auto"), f"parameters.dtype is {wanted!r:.40}, crops.dtype {dtype!r}")
    voxels = shape[0] * shape[1] * shape[2]
    _require(voxels >= MIN_CROP_VOXELS, f"crop_shape {shape}: fewer than {MIN_CROP_VOXELS} voxels")
    _require(low < high, "parameters.hu isn't a range")
    _require(record.edge in schema.EDGES, f"parameters.edge is {record.edge!r:.40}, expected one of {schema.EDGES}")
    _require(parameters.get("match") in schema.MATCHES, "parameters.match is none of the known ones")
    _require(crops.get("shape") == [record.counts["crops"], *shape], "crops.shape isn't (counts.crops, crop_shape)")
    tables = sorted(_TABLES if record.slabs is None else (*_TABLES, schema.SLAB_DOOR_FILE, schema.SLABS_FILE))
    _require(sorted(record.files) == tables, f"files must be {', '.join(tables)}, each once")
    _require(len(_items(value, "files")) == len(tables), "files names a file twice")
    _check_shards(record)
    return record


def _spacing(parameters: dict[str, Any], dtype: str) -> tuple[float, ...] | None:
    """Spacing of resampled crops; None where they have their scan's."""
    if "resample_mm" not in parameters:
        return None
    spacing = tuple(_number(v) for v in _items(parameters, "resample_mm", 3))
    _require(min(spacing) > 0, f"parameters.resample_mm is {spacing}, expected three spacings")
    _require(dtype == "float32", f"crops.dtype is {dtype}, resampled crops are float32")
    return spacing


def _check_shards(record: Record) -> None:
    ids = [shard.id for shard in record.shards]
    _require(len(set(ids)) == len(ids), "shards has an id twice")
    _require(
        sum(s.rows for s in record.shards) == record.counts["crops"], "the shards' rows don't add up to counts.crops"
    )
    for shard in record.shards:
        stem = f"{schema.SHARDS_DIR}/{shard.id}"
        _require(
            SHARD_ID.fullmatch(shard.id) is not None, f"shard id {shard.id!r:.80} isn't subsetK-III-(12 hex digits)"
        )
        _require(
            shard.receipt == f"{stem}.json",
            f"receipt of shard {shard.id} is {shard.receipt!r:.80}, expected {stem}.json",
        )
        if shard.file is None:
            _require(
                shard.rows == 0 and shard.bytes == 0 and shard.sha256 is None, f"shard {shard.id} has rows but no file"
            )
            continue
        size = schema.DATA_OFFSET + shard.rows * shard.crop_bytes
        _require(shard.file == f"{stem}.h5", f"file of shard {shard.id} is {shard.file!r:.80}, expected {stem}.h5")
        _require(shard.rows > 0 and shard.sha256 is not None, f"shard {shard.id} has a file but no rows or no sha256")
        _require(
            shard.bytes == size, f"shard {shard.id}: {shard.bytes} bytes can't be {shard.rows} crops; {size} would be"
        )


def _slabs(value: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """Slabs and masks of a `Record`, and the counts that come with them; nothing where the store has none."""
    numbers = {key: _get(counts, key, _whole) for key in _COUNTS}
    if "slabs" not in value:
        return {"counts": numbers}
    part = _get(value, "slabs", _object)
    dtype, entries = _get(part, "dtype", _text), [_object(entry) for entry in _items(part, "shards")]
    _require(dtype in schema.CROP_DTYPES, f"slabs.dtype is {dtype!r:.40}, expected one of {schema.CROP_DTYPES}")
    same = dtype == value["crops"]["dtype"] or "resample_mm" in value["parameters"]
    _require(same, "slabs.dtype isn't crops.dtype")
    numbers |= {key: _get(counts, key, _whole) for key in ("slabs", "slabs_positive")}
    shape = part.get("shape")
    _require(shape == [numbers["slabs"], *schema.SLAB_SHAPE], "slabs.shape isn't (counts.slabs, slices, rows, columns)")
    slabs = tuple(_slab_shard(entry, "", schema.SLABS_DATASET, dtype) for entry in entries)
    masks = tuple(_slab_shard(entry, "mask_", schema.MASKS_DATASET, "uint8") for entry in entries)
    _require(len({shard.id for shard in slabs}) == len(slabs), "slabs.shards has an id twice")
    _require(sum(shard.rows for shard in slabs) == numbers["slabs"], "slabs.shards don't add up to counts.slabs")
    return {"counts": numbers, "slabs": slabs, "slab_dtype": dtype, "masks": masks}


def _slab_shard(entry: dict[str, Any], key: str, dataset: str, dtype: str) -> ShardRecord:
    shard = ShardRecord(
        id=_get(entry, "id", _text),
        file=_get(entry, f"{key}file", _text),
        rows=_get(entry, "rows", _whole),
        bytes=_get(entry, f"{key}bytes", _whole),
        sha256=_get(entry, f"{key}sha256", _hex(64)),
        receipt="",
        receipt_sha256="",
        dataset=dataset,
        crop_shape=schema.SLAB_SHAPE,
        dtype=dtype,
    )
    _require(SHARD_ID.fullmatch(shard.id) is not None, f"slab shard id {shard.id!r:.80} isn't one")
    place = f"{schema.SLABS_DIR}/{shard.id}{'.masks' if key else ''}.h5"
    _require(shard.file == place, f"file of slab shard {shard.id} is {shard.file!r:.80}, expected {place}")
    size = schema.DATA_OFFSET + shard.rows * shard.crop_bytes
    _require(shard.rows > 0 and shard.bytes == size, f"slab shard {shard.id}: {shard.bytes} bytes, expected {size}")
    return shard


def _shard(value: object, crop_shape: tuple[int, int, int], dtype: str) -> ShardRecord:
    entry = _object(value)
    return ShardRecord(
        id=_get(entry, "id", _text),
        file=_get(entry, "file", _or_none(_text)),
        rows=_get(entry, "rows", _whole),
        bytes=_get(entry, "bytes", _whole),
        sha256=_get(entry, "sha256", _or_none(_hex(64))),
        receipt=_get(entry, "receipt", _text),
        receipt_sha256=_get(entry, "receipt_sha256", _hex(64)),
        dataset=schema.CROPS_DATASET,
        crop_shape=crop_shape,
        dtype=dtype,
    )


def _file(value: object) -> FileRecord:
    entry = _object(value)
    return FileRecord(_get(entry, "file", _text), _get(entry, "bytes", _whole), _get(entry, "sha256", _hex(64)))


def _require(holds: bool, message: str) -> None:
    if not holds:
        code = "store-json-invalid"
        raise BadFileError(code, message)


def _get(entry: dict[str, Any], key: str, kind: Callable[[object], T]) -> T:
    _require(key in entry, f"has no key {key!r}")
    try:
        return kind(entry[key])
    except TypeError as error:
        code, message = "store-json-invalid", f"{key} is {entry[key]!r:.80}, expected {error}"
        raise BadFileError(code, message) from None


def _items(entry: dict[str, Any], key: str, length: int | None = None) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list) or (length is not None and len(value) != length):
        code, message = "store-json-invalid", f"{key} isn't a list" + (f" of {length}" if length else "")
        raise BadFileError(code, message)
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        code, message = "store-json-invalid", f"{value!r:.80} stands where an object must"
        raise BadFileError(code, message)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        kind = "a text"
        raise TypeError(kind)
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        code, message = "store-json-invalid", f"{value!r:.40} stands where a whole number must"
        raise BadFileError(code, message)
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        code, message = "store-json-invalid", f"{value!r:.40} stands where a number must"
        raise BadFileError(code, message)
    return float(value)


def _hex(digits: int) -> Callable[[object], str]:
    def kind(value: object) -> str:
        if not isinstance(value, str) or len(value) != digits or _HEX.fullmatch(value) is None:
            expected = f"{digits} hexadecimal digits"
            raise TypeError(expected)
        return value

    return kind


def _or_none(kind: Callable[[object], T]) -> Callable[[object], T | None]:
    return lambda value: None if value is None else kind(value)
