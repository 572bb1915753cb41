"""verify: a store held against its own records, and against the scans, by code of its own.

It shares the format's definition (`lunaprep.schema`) with the writer and nothing else. What it finds it names:

===================== ==========================================================================================
code                  meaning
===================== ==========================================================================================
json-unreadable       store.json or a receipt isn't a JSON object
json-not-canonical    its bytes aren't the canonical form of its value
store-json-edited     store.json was changed after it was written (self_sha256)
store-json-invalid    a key of store.json is missing or can't be right
unknown-format        not a store of this project
newer-version         written by a newer lunaprep; nothing else is checked
missing-file          a recorded file isn't there
not-a-file            a folder, device or pipe stands in its place
symlink               a symbolic link on the way to it
path-escapes          a recorded path leads out of the store
wrong-size            cut short or longer (the crops lost are named)
unreadable            the system can't open or read it
extra-file            (warning) a file below crops/, slabs/ or volumes/ that no record names
not-checked           (warning) what an unreadable table would have told of
table-unreadable      pyarrow can't read a table, or a page checksum is wrong
table-schema          its columns or metadata aren't the format's
wrong-count           a table and store.json count differently
bad-value             a value that can't be
bad-place             a centre outside its scan, or whose voxel isn't the one recorded
bad-start             a crop's start isn't that of --edge
bad-order             rows aren't in shard order
bad-rank, bad-split   size_rank or a split doesn't follow its rule
duplicate-candidate   a candidate_id stands twice
unknown-series        a row's series isn't among the good scans
unknown-shard         a row's shard isn't in store.json
hdf5-unreadable       HDF5 can't open it
hdf5-object           other objects than the format's datasets
hdf5-link             a soft or external link
hdf5-layout           virtual, external, contiguous or shifted by a user block
hdf5-filter           other filters than the format's
hdf5-dtype            other elements
hdf5-shape            another or a growing shape
hdf5-chunks           other chunks
hdf5-offset           crops aren't where they are mapped
hdf5-mapping          the front door maps other files than the shards
hdf5-attribute        an attribute is missing, wrong or one too many
wrong-sha256          a file's bytes were changed
crop-damaged          the bytes of a crop, a slab or its mask were changed (shard, row, series, candidate)
crop-misplaced        one stands in another's place
file-misplaced        a shard holds the bytes of another
header-damaged        bytes outside the crops or chunks were changed
chunk-damaged         a chunk of a volume or of its masks was changed (slices)
mask-value            a mask holds something else than 0 and 1, or can't be unpacked
mask-differs          a mask isn't what the tables, or the same mask elsewhere, say
manifest-differs      the manifest's checksum of a crop is wrong, the crop isn't
receipt-differs       a receipt and the other records disagree
source-missing        (warning) a scan isn't in the data folder
source-changed        a scan's voxels were changed since the build
source-unreadable     a scan can't be read, or isn't let near SimpleITK
geometry-differs      scans.parquet and SimpleITK disagree on a grid
index-differs         the centre voxel isn't SimpleITK's
crop-differs          a crop or slab isn't what is cut from its scan
volume-differs        a volume isn't its scan, clipped
===================== ==========================================================================================
"""

from lunaprep.verify.findings import Finding, VerifyReport
from lunaprep.verify.run import Level, verify_store

__all__ = ["Finding", "Level", "VerifyReport", "verify_store"]
