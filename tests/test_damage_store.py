"""A built store, damaged in every way we could think of: verify finds all of it, and names the file at fault."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.sources.luna16 import TablePaths
from lunaprep.sources.phantom import write_phantom
from lunaprep.store.files import hash_file
from lunaprep.store.record import make_record
from lunaprep.verify import Finding, verify_store

from .conftest import Figure

PAGE = 4096
ALONE = ("store.json", "crops.parquet", "scans.parquet", "slabs.parquet")
"""Files that say what the others should be: spoilt one at a time."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store with everything in it; never written to."""
    root = tmp_path_factory.mktemp("damage")
    write_phantom(root / "data", num_scans=3, seed=7, size=(16, 48, 48), num_subsets=2, num_candidates=2)
    build(BuildOptions(root / "data", root / "store", workers=1), Parameters(crop_shape=(8, 16, 16), shard_bytes=1))
    shutil.rmtree(root / "store" / ".build")
    assert verify_store(root / "store").ok
    return root / "store"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A store of the test's own."""
    return shutil.copytree(whole, tmp_path / "store")


def places_of(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())


def kinds_of(store: Path) -> dict[str, list[str]]:
    """The files of each kind."""
    kinds: dict[str, list[str]] = {}
    for place in places_of(store):
        folder, *_ = place.split("/")
        kind = place if folder == place else f"{folder} {place.endswith('.masks.h5')} {Path(place).suffix}"
        kinds.setdefault(kind, []).append(place)
    return kinds


def errors_at(store: Path) -> dict[str, list[Finding]]:
    """All that verify finds, by place."""
    found: dict[str, list[Finding]] = {}
    for finding in verify_store(store).findings:
        if finding.severity == "error":
            found.setdefault(finding.place, []).append(finding)
    return found


def test_the_store_has_a_file_of_every_kind(whole: Path) -> None:
    assert len(kinds_of(whole)) == 11


# One bit


def assert_right_row(store: Path, place: str, at: int, found: list[Finding]) -> None:
    """Of a shard the crop, slab or mask is named, or its header; of a volume the scan."""
    if place.startswith("volumes/"):
        assert {finding.series_uid for finding in found} == {Path(place).stem}
        return
    if not place.endswith(".h5") or "/" not in place:
        return
    if at < PAGE:
        own = {"header-damaged", "hdf5-unreadable", "hdf5-object"}
        assert {finding.code for finding in found} <= own | {"mask-differs"}, place  # from a volume spoilt beside it
        return
    with h5py.File(store / place) as h5:
        (dataset,) = h5.values()
        row = (at - PAGE) // (int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
    damaged = [finding for finding in found if finding.code == "crop-damaged"]
    assert [finding.shard_row for finding in damaged] == [row]
    assert damaged[0].shard_id == Path(place).name.split(".")[0]
    assert damaged[0].series_uid


def test_every_flipped_bit_is_found_in_its_file(store: Path, whole: Path, figure: Figure) -> None:
    draw = random.Random(1)
    many = [place for place in places_of(store) if place not in ALONE]
    turns = [many, [ALONE[0]], many, [ALONE[1]], many, [ALONE[2]], many, [ALONE[3]]]
    flips = turn = 0
    while flips < figure(300, 40_000):
        flipped = {}
        for place in turns[turn % len(turns)]:
            data = bytearray((whole / place).read_bytes())
            near = min(len(data), PAGE) if draw.random() < 0.3 else len(data)
            at = draw.randrange(near)
            data[at] ^= 1 << draw.randrange(8)
            (store / place).write_bytes(data)
            flipped[place] = at
        found = errors_at(store)
        assert set(flipped) <= set(found), {place: at for place, at in flipped.items() if place not in found}
        for place, at in flipped.items():
            assert_right_row(whole, place, at, found[place])
            (store / place).write_bytes((whole / place).read_bytes())
        flips += len(flipped)
        turn += 1
    assert verify_store(store).ok


# Bytes, pages, files


def at_page(data: bytearray, rng: random.Random) -> int:
    return rng.randrange(-(-len(data) // PAGE)) * PAGE


def put(data: bytearray, at: int, new: bytes) -> None:
    data[at : at + len(new)] = new[: len(data) - at]


def swapped_pages(data: bytearray, rng: random.Random) -> None:
    size = min(PAGE, len(data) // 2)
    one, two = 0, (rng.randrange(1, len(data) // size)) * size
    first, second = bytes(data[one : one + size]), bytes(data[two : two + size])
    put(data, one, second)
    put(data, two, first)


def copied_block(data: bytearray, rng: random.Random) -> None:
    size = min(512, len(data) // 4)
    put(data, rng.randrange(len(data) - size), bytes(data[:size]))


BYTES: dict[str, Callable[[bytearray, random.Random], object]] = {
    "00 to FF": lambda d, r: put(d, r.randrange(len(d)), b"\xff\xff\xff\xff"),
    "a word of zeros": lambda d, r: put(d, r.randrange(len(d)), bytes(8)),
    "a page of zeros": lambda d, r: put(d, at_page(d, r), bytes(PAGE)),
    "a page of FF": lambda d, r: put(d, at_page(d, r), b"\xff" * PAGE),
    "a sector of zeros": lambda d, r: put(d, r.randrange(-(-len(d) // 512)) * 512, bytes(512)),
    "half of it zeros": lambda d, r: put(d, len(d) // 2, bytes(len(d))),
    "all zeros": lambda d, r: put(d, 0, bytes(len(d))),
    "pages swapped": swapped_pages,
    "a block copied": copied_block,
    "a kilobyte of noise": lambda d, r: put(d, r.randrange(len(d)), r.randbytes(1024)),
    "bytes reversed": lambda d, r: put(d, len(d) // 3, bytes(reversed(d[len(d) // 3 : len(d) // 3 + 64]))),
    "words swapped": lambda d, r: put(d, 0, b"".join(bytes(d[k : k + 2][::-1]) for k in range(0, len(d), 2))),
    "line ends": lambda d, r: d.__setitem__(slice(None), bytes(d).replace(b"\n", b"\r\n")),
    "a byte inserted": lambda d, r: d.insert(r.randrange(len(d)), 7),
    "a byte lost": lambda d, r: d.__delitem__(r.randrange(len(d))),
    "shifted by one": lambda d, r: d.append(d.pop(0)),
    "appended": lambda d, r: d.extend(r.randbytes(r.choice((1, 8, PAGE)))),
    "emptied": lambda d, r: d.clear(),
}


def by_bytes(change: Callable[[bytearray, random.Random], object]) -> Callable[[Path, random.Random], object]:
    def damage(path: Path, rng: random.Random) -> None:
        data = bytearray(path.read_bytes())
        change(data, rng)
        path.write_bytes(data)

    return damage


def linked(path: Path, rng: random.Random) -> None:
    aside = Path(f"{path}.aside")
    path.rename(aside)
    path.symlink_to(aside)


def made_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def made_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def doubled(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


FILES: dict[str, Callable[[Path, random.Random], object]] = {
    **{name: by_bytes(change) for name, change in BYTES.items()},
    "missing": lambda path, _: path.unlink(),
    "renamed": lambda path, _: path.rename(f"{path}.bak"),
    "a link to itself elsewhere": linked,
    "a folder": made_folder,
    "a pipe": made_pipe,
    "doubled": doubled,
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES)
def test_structured_damage_is_found_and_named(whole: Path, tmp_path: Path, figure: Figure, name: str) -> None:
    kinds = list(kinds_of(whole).values())
    start = list(FILES).index(name)
    for number in range(figure(2, 10 * len(kinds))):
        rng = random.Random(number)
        place = rng.choice(kinds[(start + 3 * number) % len(kinds)])
        store = shutil.copytree(whole, tmp_path / str(number))
        FILES[name](store / place, rng)
        is_same = (store / place).is_file() and not (store / place).is_symlink()
        is_same = is_same and (store / place).read_bytes() == (whole / place).read_bytes()
        if place == "store.json" and not (store / place).exists():
            continue  # no store, a usage error: test_verify
        assert is_same or place in errors_at(store), place
        shutil.rmtree(store)


def test_cut_at_fifty_lengths_all_are_named(store: Path, whole: Path, figure: Figure) -> None:
    draw = random.Random(3)
    many = [place for place in places_of(store) if place not in ALONE]
    for number in range(figure(15, 1_000)):
        cut = many if number % 5 else [ALONE[number // 5 % len(ALONE)]]
        for place in cut:
            size = (whole / place).stat().st_size
            near = draw.choice((0, 1, 8, 48, 512, PAGE - 1, PAGE, PAGE + 1, size - 1, draw.randrange(size)))
            os.truncate(store / place, min(near, size - 1))
        assert set(cut) <= set(errors_at(store)), number
        for place in cut:
            shutil.copy(whole / place, store / place)


# Parts that are right by themselves, in the wrong place


def sign(store: Path, change: Callable[[dict], object] = lambda value: None) -> None:
    """Have store.json agree with the files as they are: damage that came with right checksums, or a forger."""
    value = json.loads((store / "store.json").read_bytes())
    value.pop("self_sha256")
    entries = [*value["files"], *value["shards"], *value["slabs"]["shards"]]
    for entry in entries:
        for prefix in ("", "mask_"):
            path = store / str(entry.get(f"{prefix}file"))
            if path.is_file():
                entry[f"{prefix}bytes"], entry[f"{prefix}sha256"] = path.stat().st_size, hash_file(path)
        if "receipt" in entry:
            entry["receipt_sha256"] = hash_file(store / entry["receipt"])
    change(value)
    (store / "store.json").write_bytes(make_record(value))


def swap(one: Path, two: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def table(store: Path, name: str, change: Callable[[list[dict]], object]) -> None:
    """Write a table with other rows."""
    rows, columns = pq.read_table(store / name).to_pylist(), pq.read_schema(store / name)
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=columns), store / name)


def shards(store: Path, folder: str = "crops", ending: str = ".h5") -> list[Path]:
    return sorted(p for p in (store / folder).glob(f"*{ending}") if ending != ".h5" or ".masks" not in p.name)


def volumes(store: Path) -> list[Path]:
    return sorted((store / "volumes").rglob("*.h5"))


def swapped_crops(store: Path) -> set[str]:
    path = shards(store)[0]
    data, size = bytearray(path.read_bytes()), 8 * 16 * 16 * 2
    one, two = data[PAGE : PAGE + size], data[PAGE + 2 * size : PAGE + 3 * size]
    data[PAGE : PAGE + size], data[PAGE + 2 * size : PAGE + 3 * size] = two, one
    path.write_bytes(data)
    return {f"crops/{path.name}"}


def one_crop_over_another(store: Path) -> set[str]:
    path = shards(store)[1]
    data, size = bytearray(path.read_bytes()), 8 * 16 * 16 * 2
    data[PAGE : PAGE + size] = data[PAGE + size : PAGE + 2 * size]
    path.write_bytes(data)
    return {f"crops/{path.name}"}


def swapped_in(folder: str, ending: str = ".h5") -> Callable[[Path], set[str]]:
    def damage(store: Path) -> set[str]:
        one, two, *_ = shards(store, folder, ending)
        swap(one, two)
        return {f"{folder}/{one.name}", f"{folder}/{two.name}"}

    return damage


def a_copy(source: str, target: str) -> Callable[[Path], set[str]]:
    def damage(store: Path) -> set[str]:
        shutil.copy(store / source, store / target)
        return {target}

    return damage


def masks_for_slabs(store: Path) -> set[str]:
    path = shards(store, "slabs")[0]
    shutil.copy(path.with_suffix(".masks.h5"), path)
    return {f"slabs/{path.name}"}


def another_scans_volume(store: Path) -> set[str]:
    one, two, *_ = volumes(store)
    shutil.copy(one, two)
    return {two.relative_to(store).as_posix()}


def wrong_attribute(name: str) -> Callable[[Path], set[str]]:
    """A volume whose grid is another than the table's, all checksums right."""

    def damage(store: Path) -> set[str]:
        path = volumes(store)[1]
        place = path.relative_to(store).as_posix()
        with h5py.File(path, "r+") as h5:
            h5["hu"].attrs[name] = h5["hu"].attrs[name] * 1.25 + 0.5

        def agree(rows: list[dict]) -> None:
            row = next(row for row in rows if row["volume_file"] == place)
            row |= {"volume_bytes": path.stat().st_size, "volume_sha256": hash_file(path)}

        table(store, "scans.parquet", agree)
        sign(store)
        return {place}

    return damage


def edited(name: str, change: Callable[[list[dict]], object], named: str | None = None) -> Callable[[Path], set[str]]:
    """A table with other rows, signed; `named` is what no longer agrees, where the table itself may be right."""

    def damage(store: Path) -> set[str]:
        table(store, name, change)
        sign(store)
        return {named or name}

    return damage


def recorded(places: set[str], change: Callable[[dict], object]) -> Callable[[Path], set[str]]:
    """Another store.json, signed; what is at odds with it is named."""

    def damage(store: Path) -> set[str]:
        sign(store, change)
        return places

    return damage


def exchange(rows: list[dict], *names: str) -> None:
    for name in names:
        rows[0][name], rows[-1][name] = rows[-1][name], rows[0][name]


def of_another_build(*names: str) -> Callable[[Path], set[str]]:
    """Files of a store of the same scans with fewer candidates."""

    def damage(store: Path) -> set[str]:
        for name in names:
            shutil.copy(store.parent / "older" / name, store / name)
        return set(names)

    return damage


MISPLACED: dict[str, Callable[[Path], set[str]]] = {
    "swapped crops": swapped_crops,
    "a crop over another": one_crop_over_another,
    "swapped shards": swapped_in("crops"),
    "swapped slabs": swapped_in("slabs"),
    "swapped masks": swapped_in("slabs", ".masks.h5"),
    "swapped receipts": swapped_in("crops", ".json"),
    "masks for slabs": masks_for_slabs,
    "another scan's volume": another_scans_volume,
    "one front door for the other": a_copy("slabs.h5", "crops.h5"),
    "one table for the other": a_copy("slabs.parquet", "crops.parquet"),
    "an older manifest": of_another_build("crops.parquet"),
    "an older scan table": of_another_build("scans.parquet"),
    "older tables": of_another_build("crops.parquet", "slabs.parquet"),
    "an older front door": of_another_build("crops.h5"),
    "wrong spacing": wrong_attribute("spacing"),
    "wrong origin": wrong_attribute("origin"),
    "wrong direction": wrong_attribute("direction"),
    "rows swapped": edited("crops.parquet", lambda rows: rows.insert(0, rows.pop())),
    "slabs swapped": edited("slabs.parquet", lambda rows: rows.insert(0, rows.pop())),
    "a row lost": edited("crops.parquet", lambda rows: rows.pop(1)),
    "a row twice": edited("crops.parquet", lambda rows: rows.append(rows[0])),
    "series exchanged": edited("crops.parquet", lambda rows: exchange(rows, "series_uid", "subset", "fold")),
    "places exchanged": edited("crops.parquet", lambda rows: exchange(rows, "x_mm", "y_mm", "z_mm")),
    "starts exchanged": edited("crops.parquet", lambda rows: exchange(rows, "start_index", "start_row", "start_col")),
    "checksums exchanged": edited("crops.parquet", lambda rows: exchange(rows, "xxh3")),
    "a label turned": edited("crops.parquet", lambda rows: rows[0].update(is_nodule=not rows[0]["is_nodule"])),
    "grids exchanged": edited("scans.parquet", lambda rows: exchange(rows, "origin", "spacing"), "crops.parquet"),
    "more slices": edited("scans.parquet", lambda rows: rows[0].update(num_slices=20), "crops.parquet"),
    "a nodule moved": edited("slabs.parquet", lambda rows: [row.update(x_mm=row["x_mm"] + 9) for row in rows]),
    "counts edited": recorded({"crops.parquet"}, lambda value: value["counts"].update(nodules=10**6)),
    "a scan less counted": recorded({"scans.parquet"}, lambda value: value["counts"].update(scans_ok=2)),
    "other clipping": recorded({"store.json"}, lambda value: value["parameters"].update(hu=[5, -5])),
    "shards in another order": recorded({"crops.parquet", "crops.h5"}, lambda value: value["shards"].reverse()),
    "a shard twice": recorded({"store.json"}, lambda value: value["shards"].append(value["shards"][0])),
    "a shard less": recorded({"store.json"}, lambda value: value["shards"].pop()),
}


@pytest.fixture(scope="module")
def older(whole: Path) -> Path:
    """A store of the same scans and half of the candidates, beside the other."""
    data, out = whole.parent / "data", whole.parent / "older"
    lines = (data / "candidates.csv").read_text().splitlines(keepends=True)
    (whole.parent / "fewer.csv").write_text("".join([lines[0], *lines[1::2]]))
    options = BuildOptions(data, out, workers=1, tables=TablePaths(candidates=whole.parent / "fewer.csv"))
    build(options, Parameters(crop_shape=(8, 16, 16), shard_bytes=1))
    return out


@pytest.mark.parametrize("name", MISPLACED)
def test_what_is_right_in_itself_and_misplaced_is_found(store: Path, older: Path, name: str) -> None:
    (store.parent / "older").symlink_to(older)
    places = MISPLACED[name](store)
    found = errors_at(store)
    assert places <= set(found), {place: [f.line() for f in found[place]] for place in found}
    assert all(finding.line().isprintable() for each in found.values() for finding in each)
