"""A child process that spoils files of a store again and again, one at a time, and has everything look at them.

    python fuzz_store.py STORE COUNT FILE SEED [FILE SEED]...

What is wrong with a file is a report or an error of ours; anything else (another exception, a signal, an hour, a
gigabyte) ends this process with a trace of which round it was. HDF5 and Arrow are C and C++: hence a process apart.
"""

import faulthandler
import hashlib
import json
import random
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lunaprep.errors import LunaprepError
from lunaprep.store.reader import ShardFile, open_store
from lunaprep.store.record import make_record
from lunaprep.verify import verify_store
from lunatrain.mapping import CropMap

ROUND_S = 30
MOST_RSS_KIB = 1 << 20
MOST_ADDRESSES = 8 << 30
HOT = 2500
"""Bytes at a file's either end in which most damage falls: there lie the headers, and Parquet's footer."""

ODD_BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\x01", b"OHDR", b"OCHK", b"FRHP", b"BTHD", b"TREE", b"HEAP")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**30, 0.5, -1e300, "", "x", "..", "../x", "/etc/passwd",
    "\0", "crops/\ud7ff", "9" * 5000, [], [1], [[]], [0, 0, 0], [2**40] * 4, ["a"] * 4, {}, {"file": "x"},
)  # fmt: skip


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Random damage: bits, bytes, words, pages, numbers; moved, cut and doubled."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        near = rng.randrange(min(HOT, len(out)))
        at = rng.choice((near, near, len(out) - 1 - near, rng.randrange(len(out))))
        match rng.randrange(9):
            case 0 | 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at] = rng.randrange(256)
            case 3:
                word = rng.choice(ODD_BYTES)
                out[at : at + len(word)] = word[: len(out) - at]
            case 4:
                number = rng.choice((0, 1, 2**31 - 1, 2**63 - 1, 2**64 - 1, len(out))).to_bytes(8, "little")
                out[at : at + 8] = number[: len(out) - at]
            case 5:
                size = rng.choice((8, 64, 512, 4096))
                out[at : at + size] = bytes(len(out[at : at + size]))
            case 6:
                size, other = rng.choice((4, 64, 1024)), rng.randrange(len(out))
                moved = bytes(out[other : other + size])
                out[at : at + len(moved)] = moved[: len(out) - at]
            case 7 if rng.random() < 0.3:
                del out[at : at + rng.randrange(1, 600)]
            case 8 if rng.random() < 0.3:
                out[at:at] = rng.randbytes(rng.randrange(1, 60))
        out = out or bytearray(b"\0")
    return bytes(out)


def spoil_json(data: bytes, rng: random.Random) -> bytes:
    """Put an odd value in a random place of store.json, and sign it: a forger knows how."""
    value = json.loads(data)
    value.pop("self_sha256")
    for _ in range(rng.choice((1, 1, 2))):
        node: Any = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.75:
                node = node[key]
                continue
            if isinstance(node, dict) and rng.random() < 0.2:
                del node[key]
            else:
                node[key] = rng.choice(ODD_VALUES)
            break
        if not value:
            break
    try:
        return make_record(value) if not {"format", "version"} - value.keys() else json.dumps(value).encode()
    except ValueError:  # a number with more digits than Python prints
        return b"{}"


def sign(folder: Path, place: str, data: bytes, record: bytes) -> None:
    """Have store.json say that the file is meant to be so."""
    value = json.loads(record)
    value.pop("self_sha256")
    for entry in value["files"]:
        if entry["file"] == place:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "store.json").write_bytes(make_record(value))


def look_at_all(folder: Path) -> None:
    """Open the store and read everything in it, as a program that trains would and more."""
    store = open_store(folder)
    rows = np.arange(len(store), dtype=np.int64)
    _tried(lambda: store.crops(rows))
    _tried(lambda: store.manifest)
    with CropMap(store.shards, store.crop_shape, store.dtype) as crops:
        crops.gather(rows, np.empty((len(rows), *store.crop_shape), store.dtype))
    for shards, dtype in ((store.slab_shards, store.dtype), (store.slab_mask_shards, np.dtype(np.uint8))):
        _tried(lambda shards=shards, dtype=dtype: _gather(shards, store.slab_shape, dtype))
    _tried(lambda: store.slabs)
    for uid in store.scans["series_uid"]:
        _tried(lambda uid=uid: store.volume(uid))
        _tried(lambda uid=uid: store.masks(uid))


def _gather(shards: tuple[ShardFile, ...], shape: tuple[int, int, int], dtype: Any) -> None:
    count = sum(shard.rows for shard in shards)
    with CropMap(shards, shape, dtype) as crops:
        crops.gather(np.arange(count), np.empty((count, *shape), dtype))


def _tried(call: Callable[[], object]) -> None:
    try:
        call()
    except LunaprepError as error:
        if "\n" in str(error):
            raise


def spoil_often(folder: Path, place: str, numbers: range) -> None:
    """Spoil `place` once for each number; the file is whole again afterwards."""
    path = folder / place
    whole, record = path.read_bytes(), (folder / "store.json").read_bytes()
    for number in numbers:
        rng = random.Random(number)
        is_signed = "/" not in place and number % 4 > 0
        new = spoil_json(whole, rng) if is_signed and place == "store.json" else spoil(whole, rng)
        path.write_bytes(new)
        if is_signed and place != "store.json":
            sign(folder, place, new, record)
        sys.stdout.write(f"\r{place} round {number}")
        sys.stdout.flush()
        faulthandler.dump_traceback_later(ROUND_S, exit=True)
        report = verify_store(folder)
        assert is_signed or new == whole or not report.ok, "changed, and not found"
        assert all("\n" not in finding.line() for finding in report.findings)
        _tried(lambda: look_at_all(folder))
    faulthandler.cancel_dump_traceback_later()
    path.write_bytes(whole)
    (folder / "store.json").write_bytes(record)


def main(folder: Path, count: int, files: Sequence[str]) -> None:
    """Spoil each of some files so many times; `files` alternates with the number to begin at."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    for place, first in zip(files[::2], files[1::2], strict=True):
        spoil_often(folder, place, range(int(first), int(first) + count))
    status = Path("/proc/self/status").read_text(encoding="ascii")  # ru_maxrss counts the parent before the exec
    peak = int(status.split("VmHWM:")[1].split()[0])
    assert peak < MOST_RSS_KIB, f"{peak} KiB of memory"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
