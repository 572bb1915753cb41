"""crops.h5 and slabs.h5: virtual datasets over all shards, for eyes and for h5py."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from lunaprep import schema


@dataclass(frozen=True)
class Rows:
    """One dataset of a front door: its name, and file (relative to the store) and rows of each shard, in order."""

    dataset: str
    shards: Sequence[tuple[str, int]]
    crop_shape: tuple[int, int, int]
    dtype: str


def front_door_bytes(datasets: Sequence[Rows], manifest: str, store_id: str) -> bytes:
    """The file crops.h5, or slabs.h5.

    Parameters
    ----------
    datasets : sequence of Rows
        What it shows; viewers open on the first.
    manifest, store_id : str
        Kept as attributes.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=schema.LIBVER) as h5:
        for rows in datasets:
            _create(h5, rows)
        texts = {"format": schema.FORMAT, "store_id": store_id, "manifest": manifest}
        texts |= {"NX_class": "NXdata", "signal": datasets[0].dataset}
        for name, text in sorted(texts.items()):
            h5.attrs[name] = np.bytes_(text)
        h5.attrs["version"] = np.int64(schema.FORMAT_VERSION)
    return buffer.getvalue()


def _create(h5: Any, given: Rows) -> None:
    """Create a dataset by HDF5's own calls: h5py's VirtualLayout would put the time of day into the file."""
    shape = (sum(rows for _, rows in given.shards), *given.crop_shape)
    type_id = h5py.h5t.py_create(np.dtype(given.dtype).newbyteorder("<"))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_obj_track_times(False)
    plist.set_fill_value(np.array(schema.FILL[given.dtype], dtype=given.dtype))
    space = h5py.h5s.create_simple(shape)
    first = 0
    for file, rows in given.shards:
        space.select_hyperslab((first, 0, 0, 0), (rows, *shape[1:]))
        source = h5py.h5s.create_simple((rows, *shape[1:]))
        plist.set_virtual(space, file.encode(), f"/{given.dataset}".encode(), source)
        first += rows
    space.select_all()
    h5py.h5d.create(h5.id, given.dataset.encode(), type_id, space, plist)
