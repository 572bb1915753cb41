"""crops.h5: one virtual dataset over all shards, for eyes and for h5py."""

import io
from collections.abc import Sequence

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
        shape = (total, *crop_shape)
        if total:
            layout = h5py.VirtualLayout(shape=shape, dtype=np.dtype(dtype).newbyteorder("<"))
            first = 0
            for file, rows in shards:
                source = h5py.VirtualSource(file, schema.CROPS_DATASET, shape=(rows, *crop_shape), dtype=layout.dtype)
                layout[first : first + rows] = source
                first += rows
            h5.create_virtual_dataset(schema.CROPS_DATASET, layout, fillvalue=schema.FILL[dtype])
        else:
            h5.create_dataset(schema.CROPS_DATASET, shape=shape, dtype=dtype, track_times=False)
        texts = {"format": schema.FORMAT, "store_id": store_id, "manifest": schema.MANIFEST_FILE}
        texts |= {"NX_class": "NXdata", "signal": schema.CROPS_DATASET}
        for name, text in sorted(texts.items()):
            h5.attrs[name] = np.bytes_(text)
        h5.attrs["version"] = np.int64(schema.FORMAT_VERSION)
    return buffer.getvalue()
