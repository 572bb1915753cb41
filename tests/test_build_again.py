"""A build where a store is already, other data lie beside it, or the program has gone elsewhere."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lunaprep
from lunaprep import parallel
from lunaprep.build import BuildOptions, build, preview
from lunaprep.errors import FormatError, NoSpaceError, UsageError
from lunaprep.store.files import canonical_json, digest
from lunaprep.verify import verify_store

from .conftest import files_of
from .test_build import SMALL, make


def test_each_build_writes_where_it_was_started(data: Path, built_store: Path, tmp_path: Path, monkeypatch) -> None:
    """Workers outlive a build, and stay in the folder where they began."""
    for name in ("one", "two"):
        shutil.copytree(data, tmp_path / name / "data")
        monkeypatch.chdir(tmp_path / name)
        make(Path("data"), Path("s"), workers=2)
        assert files_of(tmp_path / name / "s") == files_of(built_store)


def test_an_open_store_is_read_wherever_the_program_goes(built_store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(built_store.parent)
    store = lunaprep.open_store(built_store.name)
    monkeypatch.chdir(tmp_path)
    assert len(store.manifest) == len(store) == len(store.crops(np.arange(len(store))))
    assert len(store.volume(store.scans["series_uid"][0])) == store.scans["num_slices"][0]


def reversed_rows(path: Path) -> None:
    table = pd.read_csv(path, dtype=str)
    table[::-1].to_csv(path, index=False)


@pytest.mark.parametrize("table", ["candidates", "annotations"])
def test_rows_of_another_table_are_not_put_beside_those_carried_over(data: Path, tmp_path: Path, table: str) -> None:
    """Ids are row numbers: two tables' would name each other's."""
    make(data, tmp_path / "s", subsets=(0,))
    shutil.rmtree(data / "subset0")
    before = files_of(tmp_path / "s")
    reversed_rows(data / f"{table}.csv")
    for call in (build, preview):
        with pytest.raises(UsageError, match=f"subset0 .* another table of {table}.*--{table}"):
            call(BuildOptions(data, tmp_path / "s", subsets=(1,), workers=1), SMALL)
    with pytest.raises(UsageError, match=r"another match.*Use --match radius"):
        make(data, tmp_path / "s", replace(SMALL, match="book"), subsets=(1,))
    assert files_of(tmp_path / "s") == before


def test_a_series_that_moved_to_another_subset_is_named(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "s", subsets=(0,))
    for path in (data / "subset0").iterdir():
        path.rename(data / "subset1" / path.name)
    (data / "subset0").rmdir()
    with pytest.raises(UsageError, match=r"lies in subset1 of the data, and in subset0 of the store.*Move it back"):
        make(data, tmp_path / "s", subsets=(1,))


@pytest.mark.parametrize("table", ["without a row", "of one scan", "without a nodule"])
def test_slabs_need_no_candidate(data: Path, tmp_path: Path, table: str) -> None:
    rows = pd.read_csv(data / "candidates.csv", dtype=str)
    kept = {
        "without a row": rows[:0],
        "of one scan": rows[rows["seriesuid"] == rows["seriesuid"][0]],
        "without a nodule": rows[rows["class"] == "0"],
    }[table]
    kept.to_csv(data / "candidates.csv", index=False)
    make(data, tmp_path / "s", replace(SMALL, slab_negatives=0))
    slabs = lunaprep.open_store(tmp_path / "s").slabs
    assert len(slabs) > 0
    assert set(slabs["split_candidate"]) <= {"train", "val"}
    assert verify_store(tmp_path / "s").ok


def test_a_store_of_another_format_is_not_replaced(data: Path, built_store: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built_store, tmp_path / "s"))
    value = json.loads((out / "store.json").read_bytes())
    del value["self_sha256"]
    value["version"] += 1
    (out / "store.json").write_bytes(canonical_json({**value, "self_sha256": digest(value)}))
    before = files_of(out)
    with pytest.raises(FormatError, match="Install the lunaprep that made it"):
        make(data, out)
    assert files_of(out) == before


def test_the_tables_of_the_data_are_not_written_over(data: Path, tmp_path: Path) -> None:
    before = (data / "seriesuids.csv").read_bytes()
    with pytest.raises(UsageError, match="would write over the tables"):
        make(data, tmp_path / "s", csv=tmp_path / "data/../data", subsets=(0,))
    assert (data / "seriesuids.csv").read_bytes() == before


def test_a_scan_unpacked_once_more_is_read_again(data: Path, tmp_path: Path) -> None:
    """An archive gives a file the time it was packed: size and time of writing are as they were."""
    make(data, tmp_path / "s")
    raw = next(data.glob("subset0/*.raw"))
    stat, voxels = raw.stat(), bytearray(raw.read_bytes())
    voxels[1000] ^= 1
    raw.write_bytes(voxels)
    os.utime(raw, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert make(data, tmp_path / "s").scans_built == 1


def test_what_is_only_looked_at_needs_no_space(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(data, tmp_path / "s", volumes=False)
    for raw in data.glob("subset*/*.raw"):
        os.utime(raw)
    monkeypatch.setattr("lunaprep.build.free_disk_bytes", lambda folder: 1000)
    about = preview(BuildOptions(data, tmp_path / "s", volumes=False, workers=1), SMALL)
    assert (about.shards_to_check, about.write_bytes) == (6, 0)
    assert make(data, tmp_path / "s", volumes=False).bytes_written == 0
    with pytest.raises(NoSpaceError):
        make(data, tmp_path / "s")  # with volumes


def test_the_account_is_of_the_whole_store(data: Path, tmp_path: Path) -> None:
    whole = make(data, tmp_path / "s")
    shutil.rmtree(data / "subset0")
    later = make(data, tmp_path / "s")
    names = ("scans_ok", "crops", "nodules", "nodules_unmatched", "negatives_in_nodules", "scans_with_lungs")
    names += ("series_absent", "candidates_absent")
    assert {name: getattr(later, name) for name in names} == {name: getattr(whole, name) for name in names}


def test_a_shard_that_may_have_killed_a_build_is_done_in_a_process_of_its_own(
    data: Path, built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s/.build/tmp").mkdir(parents=True)
    (tmp_path / "s/.build/tmp/subset1-000.now").write_text("0 1.2.3", encoding="utf-8")
    alone, run_alone = [], parallel._run_alone
    monkeypatch.setattr(parallel, "_run_alone", lambda task: (alone.append(task.shard.name), run_alone(task))[1])
    make(data, tmp_path / "s")
    assert alone == ["subset1-000"]
    assert files_of(tmp_path / "s") == files_of(built_store)
