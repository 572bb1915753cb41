"""The store as an ordinary torch Dataset, for people with a loop of their own.

For speed take `lunatrain.data.CropLoader`: a stock DataLoader makes each batch in fresh memory, whatever it reads from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lunaprep.errors import StoreError
from lunaprep.store.reader import open_store
from lunatrain.crop_sources import Rows
from lunatrain.mapping import CropMap, Io, open_crops
from lunatrain.sampling import WHOLE, columns_of, row_labels

Sample = tuple[torch.Tensor, int, int]


class CropDataset(Dataset[Sample]):
    """Crops of a store, with a label each.

    Parameters
    ----------
    store : str or Path
        The store's folder, or its crops.h5.
    rows : ndarray, (n,) int64, optional
        Rows of the manifest, as from `sampling.select_rows`; default all.
    label : str
        Column of the manifest: 'is_nodule' or 'is_malignant'.
    io : {'auto', 'mmap', 'willneed', 'pread'}
        How crops are read.

    Examples
    --------
    >>> dataset = CropDataset("crops.h5")                                     # doctest: +SKIP
    >>> crop, label, row = dataset[0]                                         # doctest: +SKIP
    >>> loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2)   # doctest: +SKIP
    """

    def __init__(self, store: str | Path, rows: Rows | None = None, label: str = "is_nodule", io: Io = "auto") -> None:
        opened = open_store(store)
        self.rows = np.arange(len(opened), dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)
        self.labels = row_labels(opened.columns(*columns_of(WHOLE, label)), self.rows, label)
        self._path = Path(store).absolute()
        self._store_id = str(opened.record["store_id"])
        self._io = io
        self._crops: CropMap | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Sample by index: crop (1, slices, rows, columns) float32, HU; its label, 0 or 1; its row of the manifest."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Samples by index; torch's DataLoader asks for a whole batch at once by this."""
        at = np.asarray(indices, dtype=np.int64)
        if len(at) and (at.min() < -len(self) or at.max() >= len(self)):
            message = f"index must lie in 0 to {len(self) - 1}, got {at.min()} to {at.max()}"
            raise IndexError(message)
        rows, crops = self.rows[at], self._mapped()
        tensors = [torch.empty((1, *crops.crop_shape), dtype=torch.float32) for _ in rows]
        crops.advise(rows)
        for row, tensor in zip(rows, tensors, strict=True):
            crops.gather(row[np.newaxis], tensor.numpy())
        return list(zip(tensors, self.labels[at].tolist(), rows.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the maps: a worker process opens its own."""
        return {**self.__dict__, "_crops": None}

    def _mapped(self) -> CropMap:
        if self._crops is None:
            store = open_store(self._path)
            if store.record["store_id"] != self._store_id:
                message = f"{self._path} is another store than when the dataset was made. Make it again"
                raise StoreError(message)
            self._crops = open_crops(store, self._io, threads=1)
        return self._crops
