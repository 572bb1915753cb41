"""Crops by row from every kind of map, and batches from the ring: right, in order, never overwritten while in use."""

import gc
import itertools
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.errors import StoreError
from lunaprep.store.reader import ShardFile, open_store
from lunatrain import crop_sources, mapping
from lunatrain.crop_sources import Rows, aligned_empty
from lunatrain.data import CropLoader, scale_hu
from lunatrain.errors import UsageError
from lunatrain.mapping import CropMap, open_crops

SHARD_ROWS = (3, 1, 5)
WHOLE_PAGES, BROKEN_PAGES = (8, 16, 16), (5, 6, 7)
IOS = ["auto", "mmap", "willneed", "pread"]


def write_shards(folder: Path, shape: tuple[int, int, int], dtype: str) -> tuple[list[ShardFile], np.ndarray]:
    crops = np.random.default_rng(3).integers(-1000, 1001, (sum(SHARD_ROWS), *shape)).astype(dtype)
    shards, start = [], 0
    for number, rows in enumerate(SHARD_ROWS):
        path = folder / f"{number}.h5"
        path.write_bytes(bytes(4096) + crops[start : start + rows].tobytes())
        shards.append(ShardFile(str(number), path, 4096, rows))
        start += rows
    return shards, crops


@pytest.fixture(params=["int16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def gathered(crops: CropMap, rows: list[int], dtype: str) -> np.ndarray:
    out = aligned_empty((len(rows), *crops.crop_shape), dtype)
    crops.gather(np.array(rows, dtype=np.int64), out)
    return out


@pytest.mark.parametrize("io", IOS)
@pytest.mark.parametrize("shape", [WHOLE_PAGES, BROKEN_PAGES])
@pytest.mark.parametrize(("threads", "compiled"), [(1, True), (3, True), (3, False)])
def test_gather_is_indexing(
    tmp_path: Path,
    dtype: str,
    io: mapping.Io,
    shape: tuple,
    threads: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if not compiled:
        monkeypatch.setattr(crop_sources, "gather_rows", None)
    shards, expected = write_shards(tmp_path, shape, dtype)
    with CropMap(shards, shape, np.dtype(dtype), io, threads) as crops:
        assert crops.is_stitched == (io != "pread" and shape == WHOLE_PAGES)
        random = np.random.default_rng(5)
        for count in (0, 1, 2, 9, 40):
            rows = random.integers(0, len(expected), count).tolist()
            crops.advise(np.array(rows, dtype=np.int64))
            for delivered in {dtype, "float32"}:
                np.testing.assert_array_equal(gathered(crops, rows, delivered), expected[rows].astype(delivered))


@pytest.mark.skipif(shutil.which("cc") is None, reason="installed without a compiler")
def test_the_compiled_gather_is_there():
    assert crop_sources.gather_rows is not None


compiled_only = pytest.mark.skipif(crop_sources.gather_rows is None, reason="installed without a compiler")


@compiled_only
@given(st.data())
def test_compiled_gather_is_indexing(data: st.DataObject):
    """Any number of voxels and any start in a line of 64 bytes: heads, whole lines and tails; no byte beyond."""
    stored, delivered = data.draw(st.sampled_from([("int16", "int16"), ("int16", "float32"), ("float32", "float32")]))
    count, voxels, taken = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 150), st.integers(0, 6)))
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=taken, max_size=taken)), dtype=np.int64)
    from_start, to_start = data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20)))
    source = aligned_empty((from_start + count * voxels,), stored)[from_start:]
    source[:] = np.random.default_rng(0).integers(-32768, 32768, len(source))
    crops = source.reshape(count, voxels)
    space = aligned_empty((to_start + taken * voxels + 9,), delivered)
    space[:] = 7
    out = space[to_start : to_start + taken * voxels].reshape(taken, voxels)
    crop_sources.gather_rows(crops, rows, out)
    np.testing.assert_array_equal(out, crops[rows].astype(delivered))
    assert (space[:to_start] == 7).all()
    assert (space[to_start + out.size :] == 7).all()


@compiled_only
@pytest.mark.parametrize(
    ("crops", "rows", "out", "error"),
    [
        (("int16", (3, 4)), [3], ("int16", (1, 4)), IndexError),
        (("int16", (3, 4)), [0, -1], ("int16", (2, 4)), IndexError),
        (("float32", (3, 4)), [0], ("int16", (1, 4)), ValueError),
        (("float64", (3, 4)), [0], ("float32", (1, 4)), ValueError),
        (("int16", (3, 4)), [0], ("float32", (2, 4)), ValueError),
        (("int16", (3, 4)), [0], ("float32", (1, 5)), ValueError),
        (("int16", (12,)), [0], ("int16", (1, 4)), ValueError),
        ((">i2", (3, 4)), [0], ("int16", (1, 4)), ValueError),
        (("uint16", (3, 4)), [0], ("int16", (1, 4)), ValueError),
    ],
)
def test_compiled_gather_refuses(crops: tuple, rows: list[int], out: tuple, error: type[Exception]):
    with pytest.raises(error):
        crop_sources.gather_rows(np.zeros(crops[1], crops[0]), np.array(rows), np.zeros(out[1], out[0]))


@compiled_only
def test_compiled_gather_refuses_what_is_no_array_or_no_buffer_of_ones_own():
    crops, rows, out = np.zeros((3, 4), "int16"), np.zeros(1, np.int64), np.zeros((1, 4), "int16")
    for wrong in (
        (crops, rows.astype(np.int32), out),
        (crops.tolist(), rows, out),
        (crops, rows),
        (crops[:, ::2], rows, out),
    ):
        with pytest.raises((TypeError, ValueError, BufferError)):
            crop_sources.gather_rows(*wrong)
    out.flags.writeable = False
    with pytest.raises((BufferError, ValueError)):
        crop_sources.gather_rows(crops, rows, out)
    shifted = np.zeros(9, np.uint8)[1:].view(np.int16).reshape(1, 4)
    with pytest.raises(ValueError, match="must be"):
        crop_sources.gather_rows(crops, rows, shifted)


@pytest.mark.parametrize("io", IOS)
def test_built_store_as_h5py_reads_it(built_store: Path, io: mapping.Io, monkeypatch: pytest.MonkeyPatch):
    with h5py.File(built_store / "crops.h5") as file:
        expected = file["crops"][...]
    rows = np.random.default_rng(1).permutation(len(expected)).tolist()
    for stitched in (True, False):
        if not stitched:
            monkeypatch.setattr(crop_sources, "_can_stitch", lambda *_: False)
        with open_crops(open_store(built_store), io) as crops:
            assert crops.is_stitched == (stitched and io != "pread")
            np.testing.assert_array_equal(gathered(crops, rows, "float32"), expected[rows])


def test_a_system_that_will_not_stitch_gets_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards, expected = write_shards(tmp_path, WHOLE_PAGES, "int16")
    monkeypatch.setattr(crop_sources._Region, "__init__", lambda *_: (_ for _ in ()).throw(crop_sources._MapError))
    crops = CropMap(shards, WHOLE_PAGES, np.dtype("int16"))
    assert not crops.is_stitched
    np.testing.assert_array_equal(gathered(crops, [8, 0], "int16"), expected[[8, 0]])


@pytest.mark.parametrize("io", IOS)
@pytest.mark.parametrize("shape", [WHOLE_PAGES, BROKEN_PAGES])
def test_short_or_missing_shard_is_one_line(tmp_path: Path, io: mapping.Io, shape: tuple):
    shards, _ = write_shards(tmp_path, shape, "int16")
    os.truncate(shards[1].path, shards[1].path.stat().st_size - 1)
    with pytest.raises(StoreError, match=r"1\.h5 has \d+ bytes, expected \d+: it is cut") as error:
        CropMap(shards, shape, np.dtype("int16"), io)
    assert "\n" not in str(error.value)
    shards[1].path.unlink()
    with pytest.raises(StoreError, match=r"1\.h5 cannot be opened"):
        CropMap(shards, shape, np.dtype("int16"), io)


def test_pread_meets_a_file_cut_later(tmp_path: Path):
    shards, _ = write_shards(tmp_path, WHOLE_PAGES, "int16")
    crops = CropMap(shards, WHOLE_PAGES, np.dtype("int16"), "pread")
    os.truncate(shards[2].path, 8192)
    with pytest.raises(StoreError, match=r"2\.h5 ends before row 4"):
        gathered(crops, [0, 8], "int16")


def test_wrong_calls(tmp_path: Path):
    shards, _ = write_shards(tmp_path, WHOLE_PAGES, "float32")
    crops = CropMap(shards, WHOLE_PAGES, np.dtype("float32"))
    for rows in ([-1], [9]):
        with pytest.raises(IndexError, match="rows must lie in 0 to 8"):
            gathered(crops, rows, "float32")
    out = aligned_empty((9, *WHOLE_PAGES), "float32")
    with pytest.raises(IndexError, match=r"for a mask, np\.flatnonzero"):
        crops.gather(np.ones(9, dtype=bool), out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out must be contiguous"):
        crops.gather(np.arange(4), out[::2][:4])
    with pytest.raises(ValueError, match="out must be contiguous"):
        crops.gather(np.arange(4), out)
    with pytest.raises(UsageError, match="cannot be delivered as int16"):
        gathered(crops, [0], "int16")
    with pytest.raises(UsageError, match="io must be one of"):
        CropMap(shards, WHOLE_PAGES, np.dtype("float32"), "fast")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no crops"):
        CropMap([], WHOLE_PAGES, np.dtype("float32"))
    crops.close()
    with pytest.raises(ValueError, match="closed"):
        gathered(crops, [0], "float32")


def test_memory_is_given_back(tmp_path: Path):
    shards, _ = write_shards(tmp_path, WHOLE_PAGES, "float32")

    def open_files_and_maps() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), maps.count(str(tmp_path))

    before = open_files_and_maps()
    for io in IOS:
        with CropMap(shards, WHOLE_PAGES, np.dtype("float32"), io) as crops:  # type: ignore[arg-type]
            files, maps = open_files_and_maps()
            assert (maps > before[1], files > before[0]) == (io != "pread", io == "pread")
    del crops
    assert open_files_and_maps() == before


def test_auto_asks_once_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards, _ = write_shards(tmp_path, WHOLE_PAGES, "int16")
    asked: list[int] = []
    monkeypatch.setattr(crop_sources._Stitched, "advise", lambda _, rows: asked.extend(rows.tolist()))
    for io, expected in (("auto", [2, 5, 7]), ("willneed", [2, 5, 5, 7]), ("mmap", [])):
        asked.clear()
        crops = CropMap(shards, WHOLE_PAGES, np.dtype("int16"), io)  # type: ignore[arg-type]
        crops.advise(np.array([5, 2, 5]))
        crops.advise(np.array([7, 5]))
        assert asked == expected


@given(st.integers(1, 300), st.sampled_from(["int16", "float32"]))
def test_aligned_empty(count: int, dtype: str):
    array = aligned_empty((count, 3), dtype)
    assert array.ctypes.data % 64 == 0
    assert (array.shape, array.dtype) == ((count, 3), np.dtype(dtype))


# --- the loader ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[CropMap, np.ndarray]]:
    shards, expected = write_shards(tmp_path, WHOLE_PAGES, "int16")
    with CropMap(shards, WHOLE_PAGES, np.dtype("int16")) as crops:
        yield crops, expected
    assert not busy_threads()


def busy_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("crops", "ask"))]


def random_batches(count: int, size: int = 4) -> list[Rows]:
    random = np.random.default_rng(8)
    return [random.integers(0, 9, random.integers(1, size + 1)) for _ in range(count)]


@pytest.mark.parametrize("deliver", ["stored", "int16", "float32"])
@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("slow", ["nobody", "consumer", "thread"])
def test_batches_are_right_and_stay_so(small: tuple, deliver, prefetch: int, slow: str, monkeypatch):
    crops, expected = small
    if slow == "thread":
        plain = crops.gather
        monkeypatch.setattr(crops, "gather", lambda *args: (time.sleep(0.004), plain(*args)))
    loader = CropLoader(crops, 4, deliver, prefetch=prefetch)
    rows, seen = random_batches(20), 0
    for batch, wanted in zip(loader.batches(rows), rows, strict=True):
        if slow == "consumer":
            time.sleep(0.004)  # the thread runs ahead as far as it may
        np.testing.assert_array_equal(batch.rows, wanted)
        assert batch.crops.dtype == (torch.float32 if deliver == "float32" else torch.int16)
        assert batch.crops.shape == (len(wanted), 1, *WHOLE_PAGES)
        assert batch.crops.data_ptr() % 64 == 0
        np.testing.assert_array_equal(batch.crops[:, 0].numpy(), expected[wanted])
        batch.crops.fill_(-3)  # it is the consumer's to change
        seen += 1
    assert seen == 20
    assert 0 <= loader.wait_s <= loader.total_s
    assert 0 <= loader.wait_share <= 1


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), max_size=12), st.integers(1, 4), st.integers(0, 4))
def test_any_batches_come_as_asked(tmp_path_factory, batches: list[list[int]], prefetch: int, lookahead: int):
    shards, expected = write_shards(tmp_path_factory.mktemp("shards"), WHOLE_PAGES, "float32")
    loader = CropLoader(CropMap(shards, WHOLE_PAGES, np.dtype("float32")), 6, prefetch=prefetch, lookahead=lookahead)
    for _ in range(2):  # the ring serves a second epoch
        got = [(b.rows.tolist(), b.crops[:, 0].numpy().copy()) for b in loader.batches(map(np.array, batches))]
        assert [rows for rows, _ in got] == batches
        for rows, crops in got:
            np.testing.assert_array_equal(crops, expected[rows])


def test_waiting_is_measured(small: tuple, monkeypatch: pytest.MonkeyPatch):
    crops, _ = small
    plain = crops.gather
    monkeypatch.setattr(crops, "gather", lambda *args: (time.sleep(0.02), plain(*args)))
    loader = CropLoader(crops, 4)
    for _ in loader.batches(random_batches(5)):
        pass
    assert loader.wait_s >= 0.09
    assert loader.wait_share > 0.5


def broken(rows: list[Rows]) -> Iterator[Rows]:
    yield from rows
    message = "the order broke"
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (lambda: broken(random_batches(3)), RuntimeError, "the order broke"),
        (lambda: [*random_batches(3), np.array([99])], IndexError, "rows must lie in 0 to 8"),
        (lambda: [*random_batches(3), np.zeros(5, dtype=np.int64)], UsageError, "more than the loader's batch size, 4"),
    ],
)
@pytest.mark.parametrize("lookahead", [0, 2])
def test_errors_of_the_thread_are_raised_here(small: tuple, rows: Callable, error: type, text: str, lookahead: int):
    loader = CropLoader(small[0], 4, lookahead=lookahead)
    with pytest.raises(error, match=text):
        for _ in loader.batches(rows()):
            pass
    assert not busy_threads()
    assert sum(len(batch.rows) for batch in loader.batches(random_batches(3))) > 0  # and it goes on


@pytest.mark.parametrize("way", ["break", "close", "again", "error", "forgotten"])
def test_leaving_early_stops_the_thread(small: tuple, way: str):
    loader = CropLoader(small[0], 4)
    endless = itertools.repeat(np.array([1, 2]))
    run = loader.batches(endless)
    next(run)
    assert busy_threads()
    if way == "break":
        del run
        for _ in loader.batches(endless):
            break
    elif way == "close":
        loader.close()
        assert next(run, None) is None
    elif way == "again":
        assert sum(len(batch.rows) for batch in loader.batches([np.array([3])])) == 1
        assert next(run, None) is None
    elif way == "error":
        with pytest.raises(ZeroDivisionError), loader:
            1 / 0  # noqa: B018
    else:
        del run, loader
    gc.collect()
    assert not busy_threads()


def test_loader_refuses_what_it_cannot_do(tmp_path: Path):
    shards, _ = write_shards(tmp_path, WHOLE_PAGES, "float32")
    crops = CropMap(shards, WHOLE_PAGES, np.dtype("float32"))
    with pytest.raises(UsageError, match="stored as float32 cannot be delivered as int16"):
        CropLoader(crops, deliver="int16")
    with pytest.raises(UsageError, match="prefetch and batch size must be 1 or more"):
        CropLoader(crops, prefetch=0)


def test_other_devices_get_a_tensor_of_their_own(small: tuple):
    kept = [batch.crops for batch in CropLoader(small[0], 4, device="meta").batches(random_batches(4))]
    assert {tensor.device.type for tensor in kept} == {"meta"}


def test_a_forked_child_can_gather(built_store: Path):
    with open_crops(open_store(built_store), threads=2) as crops:
        expected = gathered(crops, list(range(8)), "float32")
        pid = os.fork()
        if pid == 0:
            os._exit(0 if np.array_equal(gathered(crops, list(range(8)), "float32"), expected) else 1)
        assert os.waitpid(pid, 0)[1] == 0


def test_store_cut_after_opening(built_store: Path, tmp_path: Path):
    store = open_store(shutil.copytree(built_store, tmp_path / "store"))
    os.truncate(store.shards[0].path, 5000)
    with pytest.raises(StoreError, match="it is cut"):
        open_crops(store)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_scale_hu(dtype: torch.dtype):
    hu = torch.tensor([-1000, -500, 0, 400, 1000], dtype=dtype)
    scaled = scale_hu(hu)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([-1, -0.5, 0, 0.4, 1]))
    out = torch.empty(5)
    assert scale_hu(hu, -1000, 400, out=out) is out
    torch.testing.assert_close(out, (hu.float() + 1000) / 1400 * 2 - 1)
    if dtype == torch.float32:
        torch.testing.assert_close(scale_hu(hu, out=hu), scaled)


def test_pread_of_more_shards_than_files_may_be_open(tmp_path):
    shards = []
    for number in range(80):
        path = tmp_path / f"{number}.h5"
        path.write_bytes(np.full(2 * 512, number, dtype="<i2").tobytes())
        shards.append(ShardFile(str(number), path, 0, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with CropMap(shards, (8, 8, 8), np.dtype("int16"), "pread") as crops:
            out = np.empty((2, 8, 8, 8), dtype=np.int16)
            crops.gather(np.array([158, 5]), out)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (out[0] == 79).all()
    assert (out[1] == 2).all()
