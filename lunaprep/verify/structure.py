"""The HDF5 structure of shards, volumes and the front door, looked at without following anything.

Nothing is read from a dataset here. Before an object's shape is asked for, its layout is known: asking a
virtual dataset for its shape may open the files it names.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deflate
import h5py
import numpy as np

from lunaprep import schema
from lunaprep.verify.findings import Findings
from lunaprep.verify.heaps import require_heaps
from lunaprep.verify.places import BadFileError, open_plain, read_whole
from lunaprep.verify.record import Record, ShardRecord

MOST_ATTRIBUTE_BYTES = 4096

_H5_TYPES = {"int16": h5py.h5t.STD_I16LE, "float32": h5py.h5t.IEEE_F32LE, "uint8": h5py.h5t.STD_U8LE}
_LAYOUTS = {
    h5py.h5d.CHUNKED: "chunked",
    h5py.h5d.CONTIGUOUS: "contiguous",
    h5py.h5d.COMPACT: "compact",
    h5py.h5d.VIRTUAL: "virtual",
}
_FORMAT_ATTRIBUTES: dict[str, Any] = {"format": schema.FORMAT, "version": schema.FORMAT_VERSION}


def check_shard(store: Path, shard: ShardRecord, found: Findings) -> None:
    """Check that a shard of right size is one plain dataset whose crops lie where the format says.

    Parameters
    ----------
    store, shard
        The store, and the shard's entry in store.json.
    found : Findings
        Where problems go, under the codes ``hdf5-*``.
    """

    def look(file: h5py.File) -> None:
        dataset = _dataset(file, shard.dataset, (shard.dataset,))
        _require_layout(dataset, h5py.h5d.CHUNKED, ())
        shape = (shard.rows, *shard.crop_shape)
        _require_grid(dataset, shard.dtype, shape, (1, *shard.crop_shape))
        for where in (h5py.h5g.open(file.id, b"/"), dataset):
            count = h5py.h5a.get_num_attrs(where)
            _require(count == 0, "hdf5-attribute", f"{count} attributes, expected none")
        _require_places(dataset, shard.rows, shard.crop_bytes)

    _guarded(store, str(shard.file), look, found, shard_id=shard.id)


def check_front_doors(store: Path, record: Record, intact: set[str], found: Findings) -> None:
    """Check that crops.h5 and slabs.h5 map all shards, in order, and nothing else.

    Only those of a right checksum, which `intact` names: HDF5 keeps the names of mapped files without a checksum of its
    own, and a page of zeros there has it walk in a circle.
    """
    crops = {schema.CROPS_DATASET: (record.dtype, record.crop_shape, record.shards_with_file)}
    doors = {schema.FRONT_DOOR_FILE: (schema.MANIFEST_FILE, crops)}
    if record.slabs is not None:
        slabs = {
            schema.SLABS_DATASET: (record.slab_dtype, schema.SLAB_SHAPE, list(record.slabs)),
            schema.MASKS_DATASET: ("uint8", schema.SLAB_SHAPE, list(record.masks)),
        }
        doors[schema.SLAB_DOOR_FILE] = (schema.SLABS_FILE, slabs)
    for place, (manifest, datasets) in doors.items():
        if place in intact:
            look = partial(_look_at_door, record=record, manifest=manifest, datasets=datasets)
            _guarded(store, place, look, found)


def _look_at_door(
    file: h5py.File,
    record: Record,
    manifest: str,
    datasets: dict[str, tuple[str, tuple[int, int, int], list[ShardRecord]]],
) -> None:
    """Check a front door; `datasets` are its datasets' dtypes, crop shapes and shards."""
    require_heaps(read_whole(Path(file.filename).parent, Path(file.filename).name))
    for name, (dtype, crop_shape, shards) in datasets.items():
        dataset = _dataset(file, name, tuple(datasets))
        if shards:
            plist = _require_layout(dataset, h5py.h5d.VIRTUAL, ())
            _require_mapping(plist, shards)
            fill = np.zeros((), dtype=dtype)
            plist.get_fill_value(fill)
            _require(
                np.array_equal(fill, np.array(schema.FILL[dtype], dtype), equal_nan=True),
                "hdf5-layout",
                f"the fill value is {fill}, expected {schema.FILL[dtype]}",
            )
        else:
            plist = dataset.get_create_plist()
            _require(plist.get_layout() != h5py.h5d.VIRTUAL, "hdf5-layout", f"maps files though there are no {name}")
            _require(plist.get_external_count() == 0, "hdf5-layout", "its data is in an external file")
        _require_grid(dataset, dtype, (sum(shard.rows for shard in shards), *crop_shape), None)
    expected = {"store_id": record.store_id, "manifest": manifest, "NX_class": "NXdata", "signal": next(iter(datasets))}
    _require_attributes(file.id, {**_FORMAT_ATTRIBUTES, **expected})


def check_volume(store: Path, scan: dict[str, Any], found: Findings) -> None:
    """Check a volume's structure and attributes against its row of scans.parquet."""
    uid = scan["series_uid"]
    shape = (scan["num_slices"], scan["num_rows"], scan["num_cols"])

    def look(file: h5py.File) -> None:
        names = datasets_of(scan)
        dataset = _dataset(file, schema.HU_DATASET, names)
        _require_layout(dataset, h5py.h5d.CHUNKED, (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE))
        _require_grid(dataset, "float32", shape, None)
        chunk = dataset.get_create_plist().get_chunk()
        fits = all(c <= most for c, most in zip(chunk, schema.VOLUME_CHUNK_IRC, strict=True))
        _require(fits, "hdf5-chunks", f"chunks of {chunk}, at most {schema.VOLUME_CHUNK_IRC} expected")
        for name in names[1:]:
            mask = _dataset(file, name, names)
            _require_layout(mask, h5py.h5d.CHUNKED, (h5py.h5z.FILTER_DEFLATE,))
            _require_grid(mask, "uint8", shape, chunk)
        _require_attributes(file.id, {**_FORMAT_ATTRIBUTES, "series_uid": uid})
        geometry = {name: scan[name] for name in ("origin", "spacing", "direction")}
        _require_attributes(dataset, geometry)

    _guarded(store, scan["volume_file"], look, found, series_uid=uid)


def datasets_of(scan: dict[str, Any]) -> tuple[str, ...]:
    """Datasets of a scan's volume: as many chunks' checksums as three grids have mean that it has masks."""
    shape = [scan[name] for name in ("num_slices", "num_rows", "num_cols")]
    grid = int(
        np.prod([-(-side // min(side, most)) for side, most in zip(shape, schema.VOLUME_CHUNK_IRC, strict=True)])
    )
    has_masks = len(scan["volume_chunk_xxh3"]) == len(schema.VOLUME_DATASETS) * grid
    return schema.VOLUME_DATASETS if has_masks else schema.VOLUME_DATASETS[:1]


def stored_chunks(
    store: Path, place: str, wanted: tuple[str, ...], names: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], bytes]]:
    """Dataset, first voxel, chunk shape and stored bytes of each chunk of the `wanted` datasets of the file's `names`.

    Dataset after dataset, each in row-major order of its chunks' grid.

    The bytes are read from the file as they lie there: HDF5 unpacks nothing. A damaged or hostile file makes
    h5py raise anything.
    """
    with h5py.File(store / place, "r", locking=False) as file:
        found = [_dataset(file, name, names) for name in wanted]
        shapes = [dataset.get_create_plist().get_chunk() for dataset in found]
        places = [sorted(_chunks(dataset)) for dataset in found]
    with os.fdopen(open_plain(store, place), "rb", buffering=0) as raw:
        most = os.fstat(raw.fileno()).st_size
        for name, shape, chunks in zip(wanted, shapes, places, strict=True):
            for first, _, offset, size in chunks:
                yield name, first, shape, os.pread(raw.fileno(), min(size, most), offset)


def unpack(stored: bytes, size: int) -> bytes | bytearray:
    """The first `size` bytes of a deflated chunk, and never more; fewer where it holds fewer.

    Raises
    ------
    BadFileError, zlib.error
        No chunk of the format is as large, or the bytes aren't deflated ones.
    """
    most = math.prod(schema.VOLUME_CHUNK_IRC) * schema.ITEM_BYTES["float32"]
    _require(0 < size <= most, "hdf5-chunks", f"chunks of {size} bytes, 1 to {most} expected")  # 0 is no bound to zlib
    try:
        return deflate.zlib_decompress(stored, size)
    except deflate.DeflateError:  # what is cut, or longer than `size`: as far as it goes
        return zlib.decompressobj().decompress(stored, size)


def _chunks(dataset: h5py.h5d.DatasetID) -> list[Any]:
    """First voxel, skipped filters, byte offset and size of each stored chunk."""
    places: list[Any] = []
    dataset.chunk_iter(places.append)
    return places


def _guarded(
    store: Path,
    place: str,
    look: Callable[[h5py.File], None],
    found: Findings,
    **whose: Any,
) -> None:
    """Run `look` on an HDF5 file; whatever it or h5py raises becomes a finding."""
    try:
        with h5py.File(store / place, "r", locking=False) as file:
            _require(file.userblock_size == 0, "hdf5-layout", "has a user block in front")
            look(file)
    except BadFileError as bad:
        found.error(bad.code, place, str(bad), **whose)
    except Exception as error:
        message = f"HDF5 can't read it: {type(error).__name__}: {str(error)[:160]}"
        found.error("hdf5-unreadable", place, message, **whose)


def _require(holds: bool, code: str, message: str) -> None:
    if not holds:
        raise BadFileError(code, message)


def _dataset(file: h5py.File, name: str, names: tuple[str, ...]) -> h5py.h5d.DatasetID:
    """Open one of the file's objects, `names`, having seen that it is a hard link to a dataset."""
    links = file.id.links
    count = file.id.get_num_objs()
    listed = " and ".join(f"/{one}" for one in names)
    _require(count == len(names), "hdf5-object", f"{count} objects at its root, expected {listed} alone")
    _require(links.exists(name.encode()), "hdf5-object", f"has no /{name}")
    kind = links.get_info(name.encode()).type
    _require(kind == h5py.h5l.TYPE_HARD, "hdf5-link", f"/{name} is a soft or external link; none is followed")
    what = h5py.h5o.get_info(file.id, name.encode()).type
    _require(what == h5py.h5o.TYPE_DATASET, "hdf5-object", f"/{name} isn't a dataset")
    return h5py.h5d.open(file.id, name.encode())


def _require_layout(dataset: h5py.h5d.DatasetID, layout: int, filters: tuple[int, ...]) -> h5py.h5p.PropDCID:
    plist = dataset.get_create_plist()
    got = plist.get_layout()
    message = f"the dataset is {_LAYOUTS.get(got, got)}, expected {_LAYOUTS[layout]}"
    if got == h5py.h5d.VIRTUAL and plist.get_virtual_count():
        message += f"; it would read {plist.get_virtual_filename(0)!r:.120}"
    _require(plist.get_external_count() == 0, "hdf5-layout", "its data is in an external file; it isn't opened")
    _require(got == layout, "hdf5-layout", message)
    used = tuple(plist.get_filter(k)[0] for k in range(plist.get_nfilters()))
    _require(used == filters, "hdf5-filter", f"HDF5 filters {used}, expected {filters}")
    return plist


def _require_grid(
    dataset: h5py.h5d.DatasetID, dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...] | None
) -> None:
    same = dataset.get_type().equal(_H5_TYPES[dtype])
    _require(bool(same), "hdf5-dtype", f"the elements are {dataset.dtype}, expected little-endian {dtype}")
    space = dataset.get_space()
    got = space.get_simple_extent_dims() if space.get_simple_extent_type() == h5py.h5s.SIMPLE else ()
    _require(got == shape, "hdf5-shape", f"shape is {got}, expected {shape}")
    most = space.get_simple_extent_dims(True)
    _require(most == shape, "hdf5-shape", f"may grow to {most}, expected a fixed shape")
    if chunk is not None:
        real = dataset.get_create_plist().get_chunk()
        _require(real == chunk, "hdf5-chunks", f"chunks of {real}, expected {chunk}")


def _require_places(dataset: h5py.h5d.DatasetID, rows: int, crop_bytes: int) -> None:
    """Crop k must lie at byte 4096 + k × crop bytes."""
    places = _chunks(dataset)
    _require(len(places) == rows, "hdf5-offset", f"{len(places)} crops have a place in the file, expected {rows}")
    for first, _, offset, size in places:
        expected = schema.DATA_OFFSET + first[0] * crop_bytes
        if offset != expected or size != crop_bytes:
            where = f"crop {first[0]} lies at byte {offset} with {size} bytes"
            _require(False, "hdf5-offset", f"{where}, expected byte {expected} with {crop_bytes}")


def _require_mapping(plist: h5py.h5p.PropDCID, shards: list[ShardRecord]) -> None:
    count = plist.get_virtual_count()
    _require(count == len(shards), "hdf5-mapping", f"maps {count} shards, expected {len(shards)}")
    start = 0
    for k, shard in enumerate(shards):
        name, inner = plist.get_virtual_filename(k), plist.get_virtual_dsetname(k)
        _require(name == shard.file, "hdf5-mapping", f"mapping {k} reads {name!r:.120}, expected {shard.file!r}")
        _require(inner.lstrip("/") == shard.dataset, "hdf5-mapping", f"mapping {k} reads dataset {inner!r:.80}")
        last = tuple(side - 1 for side in shard.crop_shape)
        here = (start, 0, 0, 0), (start + shard.rows - 1, *last)
        _require_box(plist.get_virtual_vspace(k), here, k)
        _require_box(plist.get_virtual_srcspace(k), ((0, 0, 0, 0), (shard.rows - 1, *last)), k)
        start += shard.rows


def _require_box(space: h5py.h5s.SpaceID, box: tuple[tuple[int, ...], tuple[int, ...]], k: int) -> None:
    if space.get_select_type() == h5py.h5s.SEL_ALL and not space.get_simple_extent_ndims():
        return  # the whole of the source, whose shape the shard's own check has seen
    got = space.get_select_bounds()
    _require((tuple(got[0]), tuple(got[1])) == box, "hdf5-mapping", f"mapping {k} covers {got}, expected {box}")
    size = int(np.prod([b - a + 1 for a, b in zip(*box, strict=True)]))
    _require(space.get_select_npoints() == size, "hdf5-mapping", f"mapping {k} has holes")


def _require_attributes(where: h5py.h5g.GroupID | h5py.h5d.DatasetID, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        _require(h5py.h5a.exists(where, name.encode()), "hdf5-attribute", f"has no attribute {name!r}")
        attribute = h5py.h5a.open(where, name.encode())
        _require(attribute.get_storage_size() <= MOST_ATTRIBUTE_BYTES, "hdf5-attribute", f"attribute {name} is huge")
        got = _value(attribute)
        _require(got == value, "hdf5-attribute", f"attribute {name} is {got!r:.120}, expected {value!r}")


def _value(attribute: h5py.h5a.AttrID) -> Any:
    """Text, number or list of numbers of an attribute."""
    kind = attribute.get_type()
    if isinstance(kind, h5py.h5t.TypeStringID):
        holder = np.empty(attribute.shape, dtype=attribute.dtype)
        attribute.read(holder, mtype=kind)
        value = holder.item() if holder.size == 1 else b""
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    _require(isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID), "hdf5-attribute", "of an odd type")
    holder = np.empty(attribute.shape, dtype=attribute.dtype)
    attribute.read(holder)
    return holder.tolist()
