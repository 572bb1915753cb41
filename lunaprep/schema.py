"""The store's format 1: names, dtypes, units, columns. Writer, reader, verify and docs all read it here."""

from dataclasses import dataclass

FORMAT = "lunaprep-store"
"""Value of ``format`` in store.json and in the root attributes of volumes and of the front door."""

FORMAT_VERSION = 1

STORE_FILE = "store.json"
"""Parameters, input hashes, counts and every other file's hash; written last: it is the commit."""

MANIFEST_FILE = "crops.parquet"
SCANS_FILE = "scans.parquet"
FRONT_DOOR_FILE = "crops.h5"
SHARDS_DIR = "crops"
VOLUMES_DIR = "volumes"
SLABS_FILE = "slabs.parquet"
SLAB_DOOR_FILE = "slabs.h5"
SLABS_DIR = "slabs"
WORK_DIR = ".build"
"""Lock, half-written files and notes of the builder; not part of the store, may be deleted when idle."""

JOURNAL_FILE = "commit.json"
"""In `WORK_DIR`: there as long as one store takes the place of another."""

LIBVER = ("v110", "v110")
"""HDF5 file format bounds: oldest that has the implicit chunk index, so any HDF5 >= 1.10 opens the store."""

CROPS_DATASET = "crops"
"""In a shard and in the front door: (n, slices, rows, columns), one chunk a crop, no filter."""

SLABS_DATASET = "slabs"
"""In a shard of slabs/ and in slabs.h5: (n, *SLAB_SHAPE), laid out as crops are."""

MASKS_DATASET = "masks"
"""In a shard of masks beside it, and in slabs.h5: (n, *SLAB_SHAPE) uint8, 1 in a nodule."""

SLAB_SHAPE = (7, 96, 96)
"""Slices, rows, columns of a slab: a slice to segment, three more on either side, and room for random crops."""

DATA_OFFSET = 4096
"""Byte at which a shard's first crop begins; all crops follow in row order without a gap."""

HU_DATASET = "hu"
"""In a volume file: (slices, rows, columns) float32, HU, clipped; shuffle + deflate."""

NODULE_MASK_DATASET = "nodule_mask"
LUNG_MASK_DATASET = "lung_mask"
"""In a volume file, where made: uint8 beside /hu, of its shape and chunks, deflate; 1 in a nodule, in a lung."""

VOLUME_DATASETS = (HU_DATASET, NODULE_MASK_DATASET, LUNG_MASK_DATASET)

VOLUME_CHUNK_IRC = (8, 128, 128)
"""Largest chunk of a volume: 512 KiB of float32; cut down to the scan where the scan is smaller."""

CROP_DTYPES = ("int16", "float32")

FILL = {"int16": -32768, "float32": float("nan"), "uint8": 255}
"""What the front door shows for the crops, slabs or masks of a missing shard."""

EDGES = ("shift", "pad")
MATCHES = ("radius", "book")
SPLITS = ("train", "val")
MASK_SOURCES = ("contours",)
STATUSES = ("ok", "failed")

SUBTYPE_NAMES = {
    "A": "adenocarcinoma",
    "B": "small cell carcinoma",
    "E": "large cell carcinoma",
    "G": "squamous cell carcinoma",
}
"""What the letters of `subtype` stand for (TCIA, Lung-PET-CT-Dx)."""


@dataclass(frozen=True)
class Column:
    """One column of a Parquet table: its Arrow type, whether it may be null, and what it means.

    An optional one comes last, may be null, and is left out of a table in which no row has a value: so stores made
    before there was such a column, and those that have no use for it, are as they were.
    """

    name: str
    type: str
    nullable: bool
    doc: str
    optional: bool = False


MANIFEST_COLUMNS = (
    Column("candidate_id", "int64", False, "row of the candidates file, from 0"),
    Column("series_uid", "string", False, "series the candidate lies in"),
    Column("patient_id", "string", True, "patient of the series, where known"),
    Column("subset", "int16", False, "number of the subset folder the scan lies in"),
    Column("fold", "int16", False, "cross-validation fold; LUNA16's subset"),
    Column("x_mm", "float64", False, "centre, world, mm, LPS"),
    Column("y_mm", "float64", False, "centre, world, mm, LPS"),
    Column("z_mm", "float64", False, "centre, world, mm, LPS"),
    Column("index", "int32", False, "slice of the voxel nearest to the centre"),
    Column("row", "int32", False, "row of the voxel nearest to the centre"),
    Column("col", "int32", False, "column of the voxel nearest to the centre"),
    Column("start_index", "int32", False, "first slice of the crop, in the scan; negative where it is padded"),
    Column("start_row", "int32", False, "first row of the crop, in the scan; negative where it is padded"),
    Column("start_col", "int32", False, "first column of the crop, in the scan; negative where it is padded"),
    Column("is_padded", "bool", False, "whether part of the crop lies outside the scan (lower HU bound)"),
    Column("is_nodule", "bool", False, "class of the candidate"),
    Column("is_malignant", "bool", True, "malignancy of its nodule, where known"),
    Column("diameter_mm", "float64", False, "diameter of its nodule, mm; NaN where there is none"),
    Column("annotation_id", "int64", True, "row of the annotations file, from 0, of its nodule"),
    Column("size_rank", "int64", False, "place in the size-sorted list, 0 is the largest nodule"),
    Column("split_series", "string", False, "train or val; a patient's scans stay together"),
    Column("split_candidate", "string", False, "train or val by candidate, as the book; leaks between them"),
    Column("shard_id", "string", False, "shard that holds the crop"),
    Column("shard_row", "int32", False, "row of the crop in its shard"),
    Column("xxh3", "uint64", False, "XXH3-64 of the crop's stored bytes"),
    Column("subtype", "string", True, "kind of tumour of its nodule, as the source's letter; optional", True),
    Column("malignancy_mean", "float64", True, "mean of `malignancy_votes`; optional", True),
    Column(
        "malignancy_votes",
        "string",
        True,
        "readers' malignancy ratings (1 to 5) of its nodule, ascending: `2,2,4,4`; optional",
        True,
    ),
    Column("center_index", "float64", True, "slice of a resampled crop that its centre lies in; optional", True),
    Column("center_row", "float64", True, "row of a resampled crop that its centre lies in; optional", True),
    Column("center_col", "float64", True, "column of a resampled crop that its centre lies in; optional", True),
)

SCAN_COLUMNS = (
    Column("series_uid", "string", False, "series"),
    Column("patient_id", "string", True, "patient, where known"),
    Column("subset", "int16", False, "number of the subset folder"),
    Column("status", "string", False, "ok or failed"),
    Column("reason", "string", True, "why it failed"),
    Column("file", "string", False, "header file, relative to the data folder"),
    Column("data_bytes", "int64", True, "size of the file that holds the voxels"),
    Column("data_xxh3", "string", True, "XXH3-128 of that file, hexadecimal"),
    Column("num_slices", "int32", True, "slices"),
    Column("num_rows", "int32", True, "rows"),
    Column("num_cols", "int32", True, "columns"),
    Column("spacing", "list<float64>", True, "mm per step along column, row, slice (as SimpleITK)"),
    Column("origin", "list<float64>", True, "centre of voxel (0, 0, 0), world, mm, LPS"),
    Column("direction", "list<float64>", True, "3x3, row by row, as SimpleITK"),
    Column("hu_min", "float64", True, "least value before clipping"),
    Column("hu_max", "float64", True, "greatest value before clipping"),
    Column("clipped_share", "float64", True, "share of voxels that clipping changed"),
    Column("is_thin", "bool", True, "whether a side is shorter than the crop's, so that crops are padded"),
    Column("num_crops", "int64", False, "crops of this scan in the store"),
    Column("volume_file", "string", True, "its volume, relative to the store"),
    Column("volume_bytes", "int64", True, "size of that file"),
    Column("volume_sha256", "string", True, "SHA-256 of that file"),
    Column(
        "volume_chunk_xxh3",
        "list<uint64>",
        True,
        "XXH3-64 of each stored chunk, in row-major order; of /hu, then where made of /nodule_mask and /lung_mask",
    ),
    Column("lung_box", "list<int32>", True, "lung bounding box, start and stop irc, where made"),
    Column("study_uid", "string", True, "study of the series, where known; optional", True),
    Column(
        "mask_source", "string", True, "contours: readers drew nodules of its mask; null: threshold; optional", True
    ),
)


SLAB_COLUMNS = (
    Column("series_uid", "string", False, "series the slab lies in"),
    Column("patient_id", "string", True, "patient of the series, where known"),
    Column("subset", "int16", False, "number of the subset folder the scan lies in"),
    Column("fold", "int16", False, "cross-validation fold; LUNA16's subset"),
    Column("annotation_id", "int64", True, "row of the annotations file, from 0, of its nodule; null for a negative"),
    Column(
        "candidate_id", "int64", True, "row of the candidates file, from 0, of a negative, or of the nodule's first"
    ),
    Column("x_mm", "float64", False, "centre of the nodule or the candidate, world, mm, LPS"),
    Column("y_mm", "float64", False, "centre of the nodule or the candidate, world, mm, LPS"),
    Column("z_mm", "float64", False, "centre of the nodule or the candidate, world, mm, LPS"),
    Column("index", "int32", False, "slice the slab was put around: one that the nodule meets, or the candidate's"),
    Column("row", "int32", False, "row of the voxel nearest to the centre"),
    Column("col", "int32", False, "column of the voxel nearest to the centre"),
    Column("start_index", "int32", False, "first slice of the slab; negative where it is padded"),
    Column("start_row", "int32", False, "first row of the slab; negative where it is padded"),
    Column("start_col", "int32", False, "first column of the slab; negative where it is padded"),
    Column("is_padded", "bool", False, "whether part of the slab lies outside the scan (lower HU bound, no nodule)"),
    Column("is_positive", "bool", False, "whether the slab's middle slice has nodule voxels"),
    Column("diameter_mm", "float64", False, "diameter of its nodule, mm; NaN where there is none"),
    Column("num_mask_voxels", "int32", False, "nodule voxels in the slab's middle slice"),
    Column("split_series", "string", False, "train or val; a patient's scans stay together"),
    Column("split_candidate", "string", False, "its candidate's in crops.parquet; without one, split_series"),
    Column("shard_id", "string", False, "shard that holds the slab and its mask"),
    Column("shard_row", "int32", False, "row of the slab, and of its mask, in the shard"),
    Column("xxh3", "uint64", False, "XXH3-64 of the slab's stored bytes"),
    Column("mask_xxh3", "uint64", False, "XXH3-64 of the mask's stored bytes"),
)

ITEM_BYTES = {"uint8": 1, "int16": 2, "float32": 4}


def crop_bytes(crop_shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one crop, slab or mask."""
    size = 1
    for side in crop_shape:
        size *= side
    return size * ITEM_BYTES[dtype]


def volume_chunk(shape_irc: tuple[int, int, int]) -> tuple[int, int, int]:
    """Chunk shape of a volume of the given shape.

    >>> volume_chunk((250, 512, 512)), volume_chunk((3, 44, 43))
    ((8, 128, 128), (3, 44, 43))
    """
    i, r, c = (min(a, b) for a, b in zip(shape_irc, VOLUME_CHUNK_IRC, strict=True))
    return i, r, c
