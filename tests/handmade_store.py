"""A tiny store and its scans, written by hand from docs/format.md with plain h5py, pyarrow and json.

Nothing of lunaprep is used to write: what verify accepts here is what the page says.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import SimpleITK
import xxhash

from lunaprep.verify import Finding, VerifyReport

CROP = (4, 12, 12)
HU = (-1000, 1000)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
PLAIN = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
FORMAT_NOTES = {"lunaprep.format": "lunaprep-store", "lunaprep.version": "1"}
ELEMENTS = {"int16": "MET_SHORT", "float32": "MET_FLOAT"}

SCANS = {  # series: subset, shape, direction, centre voxels
    "1.2.840.1": (0, (10, 30, 28), PLAIN, [(0, 2, 1), (5, 15, 14), (9, 29, 27)]),
    "1.2.840.2": (0, (3, 30, 28), FLIPPED, [(1, 6, 20), (2, 20, 6)]),
    "1.2.840.3": (1, (12, 24, 40), FLIPPED, [(2, 3, 4), (6, 12, 20), (6, 12, 21), (11, 0, 39), (0, 23, 0)]),
}
UNITS = {  # shard: series in it
    "subset0-000-00112233aabb": ["1.2.840.1", "1.2.840.2"],
    "subset1-000-4455667788cc": ["1.2.840.3"],
    "subset1-001-99aabbccddee": ["1.2.840.4"],
}
FAILED = "1.2.840.4"
ALIKE = "subset0-000-00112233aabb", "subset1-000-4455667788cc"
"""Two shards of equal size."""
SHARD, OTHER = (f"crops/{shard}.h5" for shard in ALIKE)
RECEIPT = SHARD.replace(".h5", ".json")
VOLUME = "volumes/subset1/1.2.840.3.h5"

DTYPES = {"int16": "shift", "float32": "pad"}
"""Dtype of a test's store, and its edge."""

MANIFEST_TYPES = {
    "candidate_id": pa.int64(), "series_uid": pa.string(), "patient_id": pa.string(), "subset": pa.int16(),
    "fold": pa.int16(), "x_mm": pa.float64(), "y_mm": pa.float64(), "z_mm": pa.float64(), "index": pa.int32(),
    "row": pa.int32(), "col": pa.int32(), "start_index": pa.int32(), "start_row": pa.int32(),
    "start_col": pa.int32(), "is_padded": pa.bool_(), "is_nodule": pa.bool_(), "is_malignant": pa.bool_(),
    "diameter_mm": pa.float64(), "annotation_id": pa.int64(), "size_rank": pa.int64(),
    "split_series": pa.string(), "split_candidate": pa.string(), "shard_id": pa.string(),
    "shard_row": pa.int32(), "xxh3": pa.uint64(),
}  # fmt: skip
SCAN_TYPES = {
    "series_uid": pa.string(), "patient_id": pa.string(), "subset": pa.int16(), "status": pa.string(),
    "reason": pa.string(), "file": pa.string(), "data_bytes": pa.int64(), "data_xxh3": pa.string(),
    "num_slices": pa.int32(), "num_rows": pa.int32(), "num_cols": pa.int32(),
    "spacing": pa.list_(pa.float64()), "origin": pa.list_(pa.float64()), "direction": pa.list_(pa.float64()),
    "hu_min": pa.float64(), "hu_max": pa.float64(), "clipped_share": pa.float64(), "is_thin": pa.bool_(),
    "num_crops": pa.int64(), "volume_file": pa.string(), "volume_bytes": pa.int64(),
    "volume_sha256": pa.string(), "volume_chunk_xxh3": pa.list_(pa.uint64()), "lung_box": pa.list_(pa.int32()),
}  # fmt: skip


@dataclass(frozen=True)
class Handmade:
    """A store, its scans, and what a test asks of it."""

    path: Path
    data: Path
    crop_bytes: int
    dtype: str

    def manifest(self) -> list[dict]:
        return pq.read_table(self.path / "crops.parquet").to_pylist()

    def record(self) -> dict:
        return json.loads((self.path / "store.json").read_bytes())

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())


def canonical(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_record(store: Path, value: dict) -> None:
    """Write store.json, signed."""
    rest = {k: v for k, v in value.items() if k != "self_sha256"}
    (store / "store.json").write_bytes(canonical({**rest, "self_sha256": hashlib.sha256(canonical(rest)).hexdigest()}))


def resign(store: Path) -> None:
    """Make store.json agree with the files as they are: what a forger would do."""
    value = json.loads((store / "store.json").read_bytes())
    for entry in [*value["files"], *value["shards"]]:
        if entry["file"] is not None and (store / entry["file"]).exists():
            entry["bytes"], entry["sha256"] = (store / entry["file"]).stat().st_size, sha256(store / entry["file"])
        if "receipt" in entry:
            entry["receipt_sha256"] = sha256(store / entry["receipt"])
    write_record(store, value)


def write_table(path: Path, rows: list[dict], types: dict[str, pa.DataType]) -> None:
    schema = pa.schema(list(types.items()), metadata=FORMAT_NOTES)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, write_page_checksum=True)


def write_shard(path: Path, crops: np.ndarray) -> None:
    """Write crops as HDF5's implicit chunk index lays them out, by h5py alone."""
    with h5py.File(path, "w", libver=("v110", "v110"), alignment_threshold=512, alignment_interval=4096) as h5:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, *crops.shape[1:]))
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plist.set_obj_track_times(False)
        kind = h5py.h5t.py_create(crops.dtype.newbyteorder("<"))
        dataset = h5py.h5d.create(h5.id, b"crops", kind, h5py.h5s.create_simple(crops.shape), plist)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(crops))


def make_store(root: Path, dtype: str = "int16", edge: str = "shift") -> Handmade:
    """Make `root`/data and `root`/store."""
    data, store = root / "data", root / "store"
    (store / "crops").mkdir(parents=True)
    voxels = {uid: _write_scan(data, uid, dtype) for uid in SCANS}
    scans = {uid: _scan_row(store, data, uid, voxels[uid], dtype) for uid in SCANS}
    scans[FAILED] = _failed_row()
    rows = _candidate_rows(scans, edge)
    shards = []
    for unit, uids in UNITS.items():
        mine = [row for row in rows if row["series_uid"] in uids]
        mine.sort(key=lambda r: [r[k] for k in ("series_uid", "start_index", "start_row", "start_col", "candidate_id")])
        shards.append(_write_unit(store, unit, mine, [scans[u] for u in uids], voxels, dtype))
    rows.sort(key=lambda r: (r["shard_id"], r["shard_row"]))
    write_table(store / "crops.parquet", rows, MANIFEST_TYPES)
    write_table(store / "scans.parquet", [scans[uid] for uid in sorted(scans)], SCAN_TYPES)
    _write_front_door(store / "crops.h5", [s for s in shards if s["file"]], len(rows), dtype)
    files = [{"file": f, "bytes": 0, "sha256": ""} for f in ("crops.h5", "crops.parquet", "scans.parquet")]
    counts = {"scans_ok": 3, "scans_failed": 1, "crops": len(rows), "volumes": 3}
    write_record(
        store,
        {
            "format": "lunaprep-store",
            "version": 1,
            "store_id": "0123456789abcdef",
            "parameters": {
                "crop_shape": list(CROP), "hu": list(HU), "dtype": "auto", "edge": edge, "match": "radius",
                "val_stride": 5, "shard_bytes": 1 << 30,
            },
            "inputs": [{"role": "candidates", "file": "candidates.csv", "bytes": 9, "sha256": "0" * 64}],
            "counts": {**counts, "nodules": sum(row["is_nodule"] for row in rows)},
            "crops": {"shape": [len(rows), *CROP], "dtype": dtype},
            "shards": shards,
            "files": files,
        },
    )  # fmt: skip
    resign(store)
    return Handmade(store, data, int(np.prod(CROP)) * np.dtype(dtype).itemsize, dtype)


def _write_scan(data: Path, uid: str, dtype: str) -> np.ndarray:
    subset, shape, direction, _ = SCANS[uid]
    folder = data / f"subset{subset}"
    folder.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(int(uid[-1])).integers(-1500, 1500, shape).astype(dtype)
    if dtype == "float32":
        voxels += np.float32(0.25)
    voxels.tofile(folder / f"{uid}.raw")
    lines = {
        "ObjectType": "Image", "NDims": 3, "BinaryData": True, "BinaryDataByteOrderMSB": False,
        "CompressedData": False, "TransformMatrix": " ".join(f"{v:g}" for v in direction),
        "Offset": "-100.25 -90.5 -300.75", "ElementSpacing": "0.625 0.703125 1.25",
        "DimSize": " ".join(str(n) for n in shape[::-1]), "ElementType": ELEMENTS[dtype],
        "ElementDataFile": f"{uid}.raw",
    }  # fmt: skip
    (folder / f"{uid}.mhd").write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return voxels


def _scan_row(store: Path, data: Path, uid: str, voxels: np.ndarray, dtype: str) -> dict:
    subset, shape, _, centres = SCANS[uid]
    image = SimpleITK.ReadImage(str(data / f"subset{subset}" / f"{uid}.mhd"))
    grid = {
        "origin": list(image.GetOrigin()),
        "spacing": list(image.GetSpacing()),
        "direction": list(image.GetDirection()),
    }
    raw = (data / f"subset{subset}" / f"{uid}.raw").read_bytes()
    volume = f"volumes/subset{subset}/{uid}.h5"
    return {
        "series_uid": uid, "patient_id": None if uid.endswith("3") else "P-1", "subset": subset, "status": "ok",
        "reason": None, "file": f"subset{subset}/{uid}.mhd", "data_bytes": len(raw),
        "data_xxh3": xxhash.xxh3_128_hexdigest(raw), "num_slices": shape[0], "num_rows": shape[1],
        "num_cols": shape[2], **grid, "hu_min": float(voxels.min()), "hu_max": float(voxels.max()),
        "clipped_share": float(np.mean((voxels < HU[0]) | (voxels > HU[1]))),
        "is_thin": any(a < b for a, b in zip(shape, CROP, strict=True)), "num_crops": len(centres),
        **_write_volume(store / volume, uid, voxels, grid), "volume_file": volume, "lung_box": None,
    }  # fmt: skip


def _write_volume(path: Path, uid: str, voxels: np.ndarray, grid: dict) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk = tuple(min(a, b) for a, b in zip(voxels.shape, (8, 128, 128), strict=True))
    with h5py.File(path, "w", libver=("v110", "v110")) as h5:
        h5.attrs["format"] = np.bytes_("lunaprep-store")
        h5.attrs["version"] = np.int64(1)
        h5.attrs["series_uid"] = np.bytes_(uid)
        clipped = np.clip(voxels.astype("<f4"), *HU)
        dataset = h5.create_dataset("hu", data=clipped, chunks=chunk, shuffle=True, compression="gzip")
        for name, values in grid.items():
            dataset.attrs[name] = np.array(values)
    digests = []
    with h5py.File(path, "r") as h5:
        for chunk in h5["hu"].iter_chunks():
            stored = h5["hu"].id.read_direct_chunk([axis.start for axis in chunk])[1]
            digests.append(xxhash.xxh3_64_intdigest(stored))
    return {"volume_bytes": path.stat().st_size, "volume_sha256": sha256(path), "volume_chunk_xxh3": digests}


def _failed_row() -> dict:
    row = dict.fromkeys(SCAN_TYPES)
    reason = "its raw is cut short"
    return {**row, "series_uid": FAILED, "subset": 1, "status": "failed", "reason": reason,
            "file": f"subset1/{FAILED}.mhd", "num_crops": 0}  # fmt: skip


def _candidate_rows(scans: dict[str, dict], edge: str) -> list[dict]:
    rows = []
    for uid, (subset, shape, direction, centres) in SCANS.items():
        for k, centre in enumerate(centres):
            number = len(rows)
            size = [None, 4.5, 12.0][number % 3]
            offset = np.array(centre)[::-1] + np.random.default_rng(number).uniform(-0.4, 0.4, 3)
            xyz = np.reshape(direction, (3, 3)) @ (offset * scans[uid]["spacing"]) + scans[uid]["origin"]
            rows.append({
                "candidate_id": 100 - number, "series_uid": uid, "patient_id": scans[uid]["patient_id"],
                "subset": subset, "fold": subset, **dict(zip(("x_mm", "y_mm", "z_mm"), xyz.tolist(), strict=True)),
                **_window(centre, shape, edge), "is_nodule": size is not None,
                "is_malignant": None if size is None else k % 2 == 0,
                "diameter_mm": np.nan if size is None else size, "annotation_id": None if size is None else number,
                "split_series": "val" if subset == 0 else "train",
            })  # fmt: skip
    ranked = sorted(
        rows, key=lambda r: (r["is_nodule"], np.nan_to_num(r["diameter_mm"]), r["series_uid"]), reverse=True
    )
    for rank, row in enumerate(ranked):
        row |= {"size_rank": rank, "split_candidate": "train" if rank % 5 else "val"}
    return rows


def _window(centre: tuple[int, ...], shape: tuple[int, ...], edge: str) -> dict:
    window, padded = {}, False
    for name, c, side, width in zip(("index", "row", "col"), centre, shape, CROP, strict=True):
        start = c - width // 2
        if edge == "shift" and side >= width:
            start = max(0, min(start, side - width))
        elif edge == "shift":
            start = min(0, max(start, side - width))
        window |= {name: c, f"start_{name}": start}
        padded |= start < 0 or start + width > side
    return {**window, "is_padded": padded}


def _crop(voxels: np.ndarray, row: dict, dtype: str) -> np.ndarray:
    start = [row[f"start_{axis}"] for axis in ("index", "row", "col")]
    padded = np.pad(np.clip(voxels, *HU), 12, constant_values=HU[0])
    box = tuple(slice(s + 12, s + 12 + width) for s, width in zip(start, CROP, strict=True))
    return padded[box].astype(dtype)


def _write_unit(
    store: Path, unit: str, rows: list[dict], scans: list[dict], voxels: dict[str, np.ndarray], dtype: str
) -> dict:
    file = store / "crops" / f"{unit}.h5"
    for k, row in enumerate(rows):
        crop = _crop(voxels[row["series_uid"]], row, dtype)
        row |= {"shard_id": unit, "shard_row": k, "xxh3": xxhash.xxh3_64_intdigest(crop.tobytes())}
    if rows:
        write_shard(file, np.stack([_crop(voxels[row["series_uid"]], row, dtype) for row in rows]))
    entry = {
        "file": f"crops/{unit}.h5" if rows else None,
        "rows": len(rows),
        "bytes": file.stat().st_size if rows else 0,
        "sha256": sha256(file) if rows else None,
    }
    receipt = store / "crops" / f"{unit}.json"
    told = (
        "series_uid",
        "status",
        "reason",
        "data_bytes",
        "data_xxh3",
        "hu_min",
        "hu_max",
        "clipped_share",
        "num_crops",
    )
    receipt.write_bytes(
        canonical({
            **entry, "plan_key": "00", "shard_id": unit, "crop_xxh3": [f"{row['xxh3']:016x}" for row in rows],
            "scans": [{**{k: s[k] for k in told}, "retry": False, "volume": _told_volume(s)} for s in scans],
        })
    )  # fmt: skip
    return {"id": unit, **entry, "receipt": f"crops/{unit}.json", "receipt_sha256": sha256(receipt)}


def _told_volume(scan: dict) -> dict | None:
    if scan["volume_file"] is None:
        return None
    told = {key: scan[f"volume_{key}"] for key in ("file", "bytes", "sha256")}
    return {**told, "key": "00", "chunk_xxh3": [f"{digest:016x}" for digest in scan["volume_chunk_xxh3"]]}


def _write_front_door(path: Path, shards: list[dict], num_crops: int, dtype: str) -> None:
    layout = h5py.VirtualLayout((num_crops, *CROP), np.dtype(dtype).newbyteorder("<"))
    start = 0
    for shard in shards:
        source = h5py.VirtualSource(shard["file"], "crops", (shard["rows"], *CROP), dtype=layout.dtype)
        layout[start : start + shard["rows"]] = source
        start += shard["rows"]
    with h5py.File(path, "w", libver=("v110", "v110")) as h5:
        h5.create_virtual_dataset("crops", layout, fillvalue=-32768 if dtype == "int16" else np.nan)
        texts = {"format": "lunaprep-store", "store_id": "0123456789abcdef", "manifest": "crops.parquet"}
        for name, text in {**texts, "NX_class": "NXdata", "signal": "crops"}.items():
            h5.attrs[name] = np.bytes_(text)
        h5.attrs["version"] = np.int64(1)


def errors(report: VerifyReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity == "error"]


def codes(report: VerifyReport) -> set[tuple[str, str]]:
    return {(finding.code, finding.place) for finding in errors(report)}


def flip(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def row_of(store: Handmade, place: str, row: int) -> dict:
    shard = Path(place).stem
    return next(r for r in store.manifest() if (r["shard_id"], r["shard_row"]) == (shard, row))


def is_crop(finding: Finding, row: dict) -> bool:
    names = ("shard_id", "shard_row", "series_uid", "candidate_id")
    return all(getattr(finding, name) == row[name] for name in names)


def rewrite_manifest(store: Handmade, edit: Callable[[list[dict]], object], sign: bool = True) -> None:
    rows = store.manifest()
    edit(rows)
    write_table(store.path / "crops.parquet", rows, MANIFEST_TYPES)
    if sign:
        resign(store.path)


def set_value(name: str, value: object, row: int = 2) -> Callable[[list[dict]], object]:
    return lambda rows: rows[row].update({name: value})
