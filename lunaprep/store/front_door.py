"""crops.h5: one virtual dataset over all shards, for eyes and for h5py."""

import io
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from lunaprep import schema


def front_door_bytes(
    shards: Sequence[tuple[str, int]], crop_shape: tuple[int, int, int], dtype: str, store_id: str
) -> bytes:
    """The file crops.h5.

    Parameters
    ----------
    shards : sequence of (str, int)
        File relative to the store, and rows, of each shard in manifest order.
    crop_shape, dtype
        As in the shards.
    store_id : str
        Kept as an attribute.
    """
    total = sum(rows for _, rows in shards)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=schema.LIBVER) as h5:
        _create_crops(h5, shards, (total, *crop_shape), dtype)
        texts = {"format": schema.FORMAT, "store_id": store_id, "manifest": schema.MANIFEST_FILE}
        texts |= {"NX_class": "NXdata", "signal": schema.CROPS_DATASET}
        for name, text in sorted(texts.items()):
            h5.attrs[name] = np.bytes_(text)
        h5.attrs["version"] = np.int64(schema.FORMAT_VERSION)
    return buffer.getvalue()


def _create_crops(h5: Any, shards: Sequence[tuple[str, int]], shape: tuple[int, ...], dtype: str) -> None:
    """Create /crops by HDF5's own calls: h5py's VirtualLayout would put the time of day into the file."""
    type_id = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_obj_track_times(False)
    plist.set_fill_value(np.array(schema.FILL[dtype], dtype=dtype))
    space = h5py.h5s.create_simple(shape)
    first = 0
    for file, rows in shards:
        space.select_hyperslab((first, 0, 0, 0), (rows, *shape[1:]))
        source = h5py.h5s.create_simple((rows, *shape[1:]))
        plist.set_virtual(space, file.encode(), f"/{schema.CROPS_DATASET}".encode(), source)
        first += rows
    space.select_all()
    h5py.h5d.create(h5.id, schema.CROPS_DATASET.encode(), type_id, space, plist)
