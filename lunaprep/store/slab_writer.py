"""Two shards written row by row alike: slabs, and the nodule masks of the same places."""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lunaprep import schema
from lunaprep.store.receipt import SlabRecord
from lunaprep.store.shard import ShardWriter


class SlabWriter:
    """Writes slabs as they are cut, and each scan's masks when they are known.

    Parameters
    ----------
    partial : Path
        Temporary name of the slabs; the masks' is beside it.
    num_rows : int
        Slabs expected.
    dtype : {"int16", "float32"}
        Type of the slabs.
    """

    def __init__(self, partial: Path, num_rows: int, dtype: str) -> None:
        self.slabs = ShardWriter(partial, num_rows, schema.SLAB_SHAPE, dtype, schema.SLABS_DATASET)
        beside = partial.with_name(f"{partial.stem}.masks{partial.suffix}")
        try:
            self.masks = ShardWriter(beside, num_rows, schema.SLAB_SHAPE, "uint8", schema.MASKS_DATASET)
        except BaseException:
            self.slabs.discard()
            raise
        self.mask_voxels: list[int] = []

    def __enter__(self) -> "SlabWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.slabs.__exit__(kind, error, trace)
        self.masks.__exit__(kind, error, trace)

    @property
    def num_rows(self) -> int:
        """Slabs written whose masks are written too."""
        return self.masks.num_rows

    def rewind(self, num_rows: int) -> None:
        """Forget all rows from `num_rows` on (a scan that failed half-way)."""
        self.slabs.rewind(num_rows)
        self.masks.rewind(num_rows)
        del self.mask_voxels[num_rows:]

    def append_mask(self, mask: npt.NDArray[Any]) -> None:
        """Add the mask of the next slab that has none, (slices, rows, columns) uint8."""
        self.masks.append(mask[None])
        self.mask_voxels.append(int(np.count_nonzero(mask[len(mask) // 2])))

    def finish(self, key: str, shard_id: str, out: Path) -> SlabRecord:
        """Make both files whole and give them their final names below `out`."""
        assert self.slabs.num_rows == self.masks.num_rows, "each slab needs a mask"
        places = slab_files(shard_id)
        (size, sha256), (mask_size, mask_sha256) = self.slabs.finish(), self.masks.finish()
        for writer, place in zip((self.slabs, self.masks), places, strict=True):
            writer.publish_as(out / place)
        return SlabRecord(
            key=key,
            shard_id=shard_id,
            rows=self.num_rows,
            file=places[0],
            bytes=size,
            sha256=sha256,
            mask_file=places[1],
            mask_bytes=mask_size,
            mask_sha256=mask_sha256,
            slab_xxh3=tuple(self.slabs.crop_xxh3),
            mask_xxh3=tuple(self.masks.crop_xxh3),
            mask_voxels=tuple(self.mask_voxels),
        )


def slab_files(shard_id: str) -> tuple[str, str]:
    """Files of a shard's slabs and of their masks, relative to the store."""
    return f"{schema.SLABS_DIR}/{shard_id}.h5", f"{schema.SLABS_DIR}/{shard_id}.masks.h5"


def no_slabs(key: str, shard_id: str) -> SlabRecord:
    """The record of a work unit that has no slab."""
    return SlabRecord(key, shard_id, 0, None, 0, None, None, 0, None)
