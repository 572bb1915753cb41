"""Batches of crops for a training loop: one thread fills a ring of reused buffers ahead of it.

A fresh 75 MB tensor for each batch costs seven times its filling, in page faults; so the buffers are made once, aligned
to 64 bytes (on CUDA: pinned), and used in turn. HU stay as they are stored; `scale_hu` scales them on the device.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from lunatrain.crop_sources import Rows, aligned_empty
from lunatrain.errors import UsageError
from lunatrain.mapping import CropMap

Deliver = Literal["stored", "int16", "float32"]

TORCH_DTYPES = {"int16": torch.int16, "float32": torch.float32, "uint8": torch.uint8}
BATCH_SIZE = 256
PREFETCH = 2
ASKERS = 2
LOOKAHEAD = 3
"""Batches ahead of the one being filled that the disk is asked for."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some crops, HU.

    Attributes
    ----------
    crops : Tensor, (k, 1, slices, rows, columns), float32 or int16
        On the CPU it lies in the ring: valid, and yours to change, until the next batch is asked for (or the iteration
        ends, is closed or replaced). On another device it is a tensor of its own.
    rows : ndarray, (k,) int64
        Rows of the manifest.
    """

    crops: torch.Tensor
    rows: Rows


class CropLoader:
    """Delivers the crops of given rows, batch by batch, prepared by one thread.

    Parameters
    ----------
    crops : CropMap
        Where they come from.
    batch_size : int
        Most rows of a batch.
    deliver : {'stored', 'int16', 'float32'}
        Type of the batches; int16 (half the bytes to copy and move) only from an int16 store.
    device : str or device
        Where batches go. On CUDA the copy runs on a stream of its own, from pinned memory.
    prefetch : int
        Batches that may be ready before they are asked for. The ring has two more: one in use, one being filled.
    lookahead : int
        See `LOOKAHEAD`; used where `crops` asks the disk ahead.

    Examples
    --------
    >>> loader = CropLoader(open_crops(store))                       # doctest: +SKIP
    >>> for batch in loader.batches(plan.batches(epoch=0)):          # doctest: +SKIP
    ...     logits = model(scale_hu(batch.crops))
    """

    def __init__(
        self,
        crops: CropMap,
        batch_size: int = BATCH_SIZE,
        deliver: Deliver = "stored",
        device: str | torch.device = "cpu",
        prefetch: int = PREFETCH,
        lookahead: int = LOOKAHEAD,
    ) -> None:
        if prefetch < 1 or batch_size < 1 or lookahead < 0:
            given = f"{prefetch}, {batch_size} and {lookahead}"
            message = f"prefetch and batch size must be 1 or more, lookahead 0 or more, got {given}"
            raise UsageError(message)
        self.dtype = _delivered_dtype(crops, deliver)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.wait_s = 0.0
        """Seconds a loop has waited for batches, over all epochs."""
        self.total_s = 0.0
        """Seconds of those epochs, from the first batch asked for to the end."""
        self._crops = crops
        self._lookahead = lookahead
        self._depth = prefetch + 2
        self._ring: list[_Slot] = []
        self._running: weakref.ref[Iterator[Batch]] | None = None

    @property
    def wait_share(self) -> float:
        """Share of the loop's time that went into waiting for data, 0 to 1."""
        return self.wait_s / self.total_s if self.total_s else 0.0

    def batches(self, rows: Iterable[Rows]) -> Iterator[Batch]:
        """Batches of the given rows, in their order.

        Parameters
        ----------
        rows : iterable of ndarray, (k,) int64
            Rows of each batch; asked for in the thread. Each array is kept until its batch is done.

        Returns
        -------
        iterator of Batch
            What goes wrong in the thread is raised here. Leaving the loop early stops the thread; so does a new call.
        """
        self.close()
        run = self._run(rows)
        self._running = weakref.ref(run)
        return run

    def close(self) -> None:
        """Stop the thread, if one is at work; the loader may be used again."""
        run = self._running() if self._running else None
        self._running = None
        if run is not None:
            run.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, rows: Iterable[Rows]) -> Iterator[Batch]:
        started = time.perf_counter()
        self._crops.check()
        if not self._ring:
            self._ring = [_Slot(self.batch_size, self._crops, self.dtype, self.device) for _ in range(self._depth)]
        filler = _Filler(self._crops, rows, self._ring, self._lookahead)
        waited, total = self.wait_s, self.total_s
        try:
            asked = started
            while True:
                done = filler.ready.get()
                if done is None:
                    return
                if isinstance(done, BaseException):
                    raise done
                crops = done.slot.deliver(len(done.rows))
                now = time.perf_counter()
                waited += now - asked
                self.wait_s, self.total_s = waited, total + now - started
                yield Batch(crops, done.rows)
                del crops
                filler.free.put(done.slot)
                asked = time.perf_counter()
        finally:
            self.total_s = total + time.perf_counter() - started
            filler.stop()


def scale_hu(
    crops: torch.Tensor, low: float = -1000.0, high: float = 1000.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Bring HU to -1 to 1, on the device the crops are on.

    Parameters
    ----------
    crops : Tensor, int16 or float32
        HU.
    low, high : float
        HU that become -1 and 1: the store's window.
    out : Tensor, float32, optional
        Where the result goes (may be `crops`): on the CPU a reused one saves the page faults of a fresh one.

    >>> scale_hu(torch.tensor([-1000, 0, 500, 1000], dtype=torch.int16)).tolist()
    [-1.0, 0.0, 0.5, 1.0]
    """
    factor = 2.0 / (high - low)
    return torch.mul(crops, factor, out=out).sub_(low * factor + 1.0)


class _Slot:
    """One buffer of the ring."""

    def __init__(self, batch_size: int, crops: CropMap, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        on_cuda = device.type == "cuda"
        shape = (batch_size, 1, *crops.crop_shape)
        if on_cuda:
            self._tensor = torch.empty(shape, dtype=dtype, pin_memory=True)
        else:  # numpy asks for huge pages: cheap to touch, also after a fork; torch.empty doesn't
            self._tensor = torch.from_numpy(aligned_empty(shape, str(dtype).removeprefix("torch.")))
        self._array: npt.NDArray[Any] = self._tensor.numpy()
        self._moved: torch.Tensor | None = None
        self._stream = _copy_stream(device) if on_cuda else None
        self._event = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def fill(self, crops: CropMap, rows: Rows) -> None:
        """Gather the rows, and start their way to the device. Runs in the thread."""
        if len(rows) > len(self._array):
            message = f"a batch of {len(rows)} rows is more than the loader's batch size, {len(self._array)}"
            raise UsageError(message)
        if self._event is not None:
            self._event.synchronize()  # the last copy out of this buffer; at once where there was none
        crops.gather(rows, self._array[: len(rows)])
        if self._stream is not None and self._event is not None:
            with torch.cuda.stream(self._stream):
                self._moved = self._tensor[: len(rows)].to(self._device, non_blocking=True)
                self._event.record(self._stream)

    def deliver(self, count: int) -> torch.Tensor:
        """The filled buffer as the loop gets it."""
        if self._device.type == "cpu":
            return self._tensor[:count]
        if self._event is None or self._moved is None:
            return self._tensor[:count].to(self._device)
        moved, self._moved = self._moved, None
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._event)
        moved.record_stream(stream)  # memory of the copy stream: not to be given out again while the loop uses it
        return moved


@dataclass(frozen=True, eq=False)
class _Filled:
    slot: _Slot
    rows: Rows


class _Filler:
    """The thread and its two queues: free buffers in, ready ones out; None ends either."""

    def __init__(self, crops: CropMap, rows: Iterable[Rows], ring: list[_Slot], lookahead: int) -> None:
        self.ready: SimpleQueue[_Filled | BaseException | None] = SimpleQueue()
        self.free: SimpleQueue[_Slot | None] = SimpleQueue()
        for slot in ring:
            self.free.put(slot)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(crops, rows, lookahead), name="crops", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the batch it is filling."""
        self._stopping.set()
        self.free.put(None)
        self._thread.join()

    def _fill(self, crops: CropMap, rows: Iterable[Rows], lookahead: int) -> None:
        try:
            with closing(_ahead(crops, rows, lookahead)) as ahead:
                for batch_rows in ahead:
                    slot = self.free.get()
                    if slot is None or self._stopping.is_set():
                        return
                    slot.fill(crops, batch_rows)
                    self.ready.put(_Filled(slot, batch_rows))
            self.ready.put(None)
        except BaseException as error:
            self.ready.put(error)


def _ahead(crops: CropMap, rows: Iterable[Rows], lookahead: int) -> Generator[Rows, None, None]:
    """Pass batches of rows on, after the disk was asked for the next few.

    Asking takes the system as long as copying does (it finds the memory), so threads of their own ask: cold epochs took
    0.27 s with two, 0.5 s with none (2026-11-22, 6,021 crops of int16, 2 cores).
    """
    coming: deque[tuple[Rows, Future[None]]] = deque()
    with ThreadPoolExecutor(ASKERS, thread_name_prefix="ask") as askers:
        for batch_rows in rows:
            coming.append((batch_rows, askers.submit(crops.advise, batch_rows)))
            if len(coming) > lookahead:
                yield _asked(*coming.popleft())
        while coming:
            yield _asked(*coming.popleft())


def _asked(rows: Rows, asking: "Future[None]") -> Rows:
    asking.result()
    return rows


def _delivered_dtype(crops: CropMap, deliver: str) -> torch.dtype:
    name = str(crops.dtype) if deliver == "stored" else deliver
    if name not in TORCH_DTYPES or (name == "int16" and crops.dtype != np.int16):
        message = f"crops stored as {crops.dtype} cannot be delivered as {deliver}. Use 'stored' or 'float32'"
        raise UsageError(message)
    return TORCH_DTYPES[name]


def _copy_stream(device: torch.device) -> "torch.cuda.Stream":
    """One stream a device for all copies; pinned memory makes them run beside the training."""
    if device not in _COPY_STREAMS:
        _COPY_STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _COPY_STREAMS[device]


_COPY_STREAMS: "dict[torch.device, torch.cuda.Stream]" = {}
