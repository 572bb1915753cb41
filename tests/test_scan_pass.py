"""What a pass over a scan keeps for the next, and what it asks the disk for ahead."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaprep import shard_work
from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.scan_pass import KEPT
from lunaprep.scans.open import fetch_ahead


def test_kept_arrays_are_each_name_s_and_each_thread_s_own() -> None:
    KEPT.clear()
    shapes = ((4, 5, 6), (2, 3, 4), (8, 9, 10), (8, 9, 10))
    other = KEPT.array("other", (3,), "float32")
    other[:] = 7
    for shape, dtype in zip(shapes, ("int16", "float32", "int16", "float32"), strict=True):
        array = KEPT.array("one", shape, dtype)
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, dtype, True)
        array[:] = 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: KEPT.array("one", (1000,), "int16").fill(2)).result()
        assert (array == 1).all()
    assert np.shares_memory(array, KEPT.array("one", (2,), "int16"))
    assert (other == 7).all()
    KEPT.clear()
    assert not np.shares_memory(array, KEPT.array("one", (2,), "int16"))
    KEPT.clear()


def test_asking_ahead_for_what_is_no_file_does_no_harm_and_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    fetch_ahead([tmp_path / name for name in ("pipe", "link", "file", "nothing", "")])
    fetch_ahead(())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_each_scan_asks_for_the_one_that_is_read_next(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    read: list[Path] = []
    ahead: list[tuple[Path, ...]] = []

    def say(task: shard_work.ShardTask, count: int, series_uid: str, inner: Any = shard_work._say) -> None:
        read.extend(job.scan.data_path for job in task.shard.jobs if job.scan.series_uid == series_uid)
        inner(task, count, series_uid)

    monkeypatch.setattr("lunaprep.shard_work._say", say)
    monkeypatch.setattr("lunaprep.shard_work.fetch_ahead", ahead.append)
    options = BuildOptions(phantom_root, tmp_path / "s", workers=1, volumes=False, targets=False)
    build(options, Parameters(shard_bytes=shard_bytes, crop_shape=(8, 8, 8)))
    assert len(read) == 6
    assert ahead == [*((path,) for path in read[1:]), ()]
