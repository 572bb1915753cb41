"""The bench's figures: all there, plausible, and the machine left as it was. No figure is judged here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lunaprep.errors import LunaprepError
from lunatrain import bench
from lunatrain.disk import drop_from_cache, read_through


def test_report(built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "_seconds_of", lambda _: 0.5)  # starts python six times
    monkeypatch.setattr(bench, "CONSUMER_BATCHES", 8)
    told: list[str] = []
    report = bench.run_bench(built_store, rounds=1, batch_size=8, scratch=tmp_path, progress=told.append)
    assert len(told) == (4 if sys.platform == "linux" else 3)
    assert not list(tmp_path.iterdir())
    figures = json.loads(json.dumps(report.to_json()))
    table = figures.pop("table")
    assert all(isinstance(value, (int, float, str)) for value in figures.values())
    assert figures["limit_ratio"] == 1
    ways = ["gather_int16_1", "gather_int16_2", "loader_int16", "gather_float32_1", "loader_float32", "dataloader_0"]
    for way in [*ways, *["sequential", "cold_auto"] * (sys.platform == "linux")]:
        assert figures[f"{way}_crops_per_s"] > 0
        assert figures[f"{way}_ratio"] > 0
    assert figures["open_s"] > 0
    assert 0 <= figures["data_wait_int16_share"] <= 1
    text = report.to_text()
    assert all(row["what"] in text for row in table)


def test_first_batch_of_a_new_process(built_store: Path):
    subprocess.run([sys.executable, "-c", bench.FIRST_BATCH, str(built_store)], check=True)
    assert bench._seconds_of([sys.executable, "-c", ""]) > 0


def test_no_store(tmp_path: Path):
    with pytest.raises(LunaprepError, match="is no store"):
        bench.run_bench(tmp_path)


def test_all_luna16_in_sparse_files(tmp_path: Path):
    shards = bench._sparse_shards(tmp_path, 32 * 48 * 48 * 4)
    assert sum(shard.rows for shard in shards) == bench.LARGE_STORE_CROPS
    with bench.CropMap(shards, (32, 48, 48), np.dtype("float32")) as crops:
        out = bench.aligned_empty((3, 32, 48, 48), "float32")
        out[:] = 7
        crops.gather(np.array([0, 300_000, bench.LARGE_STORE_CROPS - 1]), out)
        assert not out.any()


@pytest.mark.skipif(sys.platform != "linux", reason="drops the page cache")
@pytest.mark.parametrize("direct", [True, False])
def test_disk(tmp_path: Path, direct: bool):
    path = tmp_path / "file"
    path.write_bytes(bytes(9 * 2**20))
    drop_from_cache([(path, 4096, 2**20)])
    assert read_through([(path, 4096, 5 * 2**20)], direct) > 0
    assert path.stat().st_size == 9 * 2**20
