"""F8, F9: what changed is built anew and named, nothing is mixed; what did not change gives the same bytes."""

import random
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import lunaprep
from lunaprep.account import Account
from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.verify import verify_store

from .conftest import Figure, files_of
from .fault_cases import SMALL
from .fault_driver import Driver

OTHERWISE = {
    "crop_shape": ((9, 8, 8), True),
    "hu": ((-900, 900), True),
    "dtype": ("float32", True),
    "edge": ("pad", True),
    "match": ("book", False),
    "val_stride": (2, False),
    "slab_negatives": (2.0, False),
    "shard_bytes": (1 << 20, True),
    "resample_mm": ((2.0, 1.0, 1.0), True),
}
"""For each parameter a value that is not `SMALL`'s, and whether it reaches the shards."""


def make(data: Path, out: Path, parameters: Parameters = SMALL) -> Account:
    return build(BuildOptions(data, out, workers=1), parameters)


@pytest.fixture(scope="module")
def tiny_store(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny_store") / "s"
    make(tiny_root, out)
    return out


@pytest.mark.parametrize("name", [field.name for field in fields(Parameters)])
def test_each_parameter_alone_gives_the_store_built_with_it_at_once(
    tiny_root: Path, tiny_store: Path, tmp_path: Path, name: str
) -> None:
    out = Path(shutil.copytree(tiny_store, tmp_path / "s"))
    value, is_in_shards = OTHERWISE[name]
    changed = replace(SMALL, **{name: value})
    assert changed != SMALL
    account = make(tiny_root, out, changed)
    assert (account.crops_built > 0) == is_in_shards
    assert [change.split()[0].rstrip(":") for change in account.changes if change.startswith(name)] == [name]
    make(tiny_root, tmp_path / "fresh", changed)
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert verify_store(out).ok
    make(tiny_root, out)
    assert files_of(out) == files_of(tiny_store)  # and back


def edit(path: Path, column: int, change: Callable[[str], str]) -> None:
    """Change one field of a table's first row."""
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    cells[column] = change(cells[column])
    lines[1] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


def move(text: str) -> str:
    return str(float(text) + 2.5)


def voxels(data: Path) -> None:
    path = sorted(data.glob("subset0/*.raw"))[0]
    array = np.fromfile(path, dtype="<i2")
    array[1000:1100] += 7
    array.tofile(path)


def header(data: Path) -> None:
    path = sorted(data.glob("subset0/*.mhd"))[0]
    lines = [line if not line.startswith("Offset") else line + "1" for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


INPUTS: dict[str, Callable[[Path], None]] = {
    "candidates.csv": lambda data: edit(data / "candidates.csv", 3, move),
    "annotations.csv": lambda data: edit(data / "annotations.csv", 4, move),
    "annotations_with_malignancy.csv": lambda data: edit(data / "annotations_with_malignancy.csv", 5, lambda _: "True"),
    "patients.csv": lambda data: edit(data / "patients.csv", 1, lambda _: "SOMEONE-ELSE"),
    "voxels": voxels,
    "header": header,
}


@pytest.mark.parametrize("name", INPUTS)
def test_each_input_alone_gives_the_store_built_from_it_at_once(
    tiny_root: Path, tiny_store: Path, tmp_path: Path, name: str
) -> None:
    data = Path(shutil.copytree(tiny_root, tmp_path / "data"))
    out = tmp_path / "s"
    make(data, out)
    assert files_of(out) == files_of(tiny_store)
    INPUTS[name](data)
    account = make(data, out)
    wanted = {"voxels": "subset0-000: its scans were touched", "header": "subset0-000: other"}.get(name, name)
    assert any(wanted in change for change in account.changes), account.changes
    make(data, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh") != files_of(tiny_store)


def copy_in_another_order(source: Path, target: Path, draw: random.Random) -> None:
    """The same files, made in another order: a folder lists them otherwise then."""
    paths = [path for path in source.rglob("*") if path.is_file()]
    draw.shuffle(paths)
    for path in paths:
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(source))


@pytest.fixture(scope="module")
def one_store(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "s"
    make(phantom_root, out)
    return out


def test_workers_order_umask_zone_and_locale_are_without_effect(
    phantom_root: Path, one_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    draw = random.Random(6)
    zones, locales = ["UTC", "Asia/Tokyo", "America/St_Johns"], ["C", "C.UTF-8", "de_DE.UTF-8", "tr_TR.UTF-8"]
    for number in range(figure(1, 12)):
        workers = (2, 5, 8, 1)[number % 4]
        for name, choice in (("TZ", zones), ("LC_ALL", locales), ("PYTHONHASHSEED", ["0", "1", "77"])):
            monkeypatch.setenv(name, choice[number % len(choice)])
        data, out = tmp_path / f"data {number}", tmp_path / f"ß {number}"
        copy_in_another_order(phantom_root, data, draw)
        driver = Driver(tmp_path)
        size = ["--shard-size", "1", "--crop-shape", "8", "8", "8"]
        args = ["build", "--data", data, "--out", out, "--workers", str(workers), *size]
        done = driver.run(args, ("private", "open_to_all")[number % 2])
        driver.close()
        assert done.code == 0, done
        assert {path.stat().st_mode & 0o777 for path in out.glob("*.parquet")} == {(0o600, 0o666)[number % 2]}
        assert files_of(out) == files_of(one_store), number
        assert lunaprep.open_store(out).record == lunaprep.open_store(one_store).record
