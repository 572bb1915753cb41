"""Scans that must not be used: one small builder each, shared by the reader's tests and the build's.

``CASES`` is a list of `BadScan`. ``case.make(folder)`` writes the scan into the folder and returns its header;
the series UID is the case's name (unique), so that all of them fit into one folder. The data folder (`root`)
is `folder` or a parent of it.
"""

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .scan_files import FIELDS, RAW, flip, header_text, nifti_bytes, put


class BadScan(NamedTuple):
    """One case: its name (and series UID), its builder, and words that the error must have."""

    name: str
    make: Callable[[Path], Path]
    words: str


CASES: list[BadScan] = []


def add(name: str, words: str) -> Callable[[Callable[[Path, str], Path]], None]:
    """Register a builder ``(folder, uid) -> header``."""

    def register(build: Callable[[Path, str], Path]) -> None:
        CASES.append(BadScan(name, lambda folder: build(folder, name), words))

    return register


def changed(name: str, words: str, raw: bytes = RAW, **changes: str | None) -> None:
    """A .mhd with changed fields."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        (folder / f"{uid}.raw").write_bytes(raw)
        path = folder / f"{uid}.mhd"
        path.write_text(header_text(uid, **changes))
        return path


def edited(name: str, words: str, edit: Callable[[bytes], bytes]) -> None:
    """A .mhd with the header's bytes edited."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        (folder / f"{uid}.raw").write_bytes(RAW)
        path = folder / f"{uid}.mhd"
        path.write_bytes(edit(header_text(uid).encode()))
        return path


def linked(name: str, words: str, place: Callable[[Path, str], None]) -> None:
    """A good .mhd whose data file is made by `place`."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        place(folder / f"{uid}.raw", uid)
        path = folder / f"{uid}.mhd"
        path.write_text(header_text(uid))
        return path


def packed(name: str, words: str, edit: Callable[[bytes], bytes], size: int | None = None) -> None:
    """A .mhd with a compressed data file that has been edited."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        data = edit(zlib.compress(RAW))
        (folder / f"{uid}.zraw").write_bytes(data)
        path = folder / f"{uid}.mhd"
        count = str(len(data) if size is None else size)
        changes = {"CompressedData": "True", "CompressedDataSize": count, "ElementDataFile": "{uid}.zraw"}
        path.write_text(header_text(uid, **changes))
        return path


def local(name: str, words: str, edit: Callable[[bytes], bytes], data: bytes = RAW, **changes: str) -> None:
    """A .mha with its bytes edited."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        path = folder / f"{uid}.mha"
        text = header_text(uid, **({"ElementDataFile": "LOCAL"} | changes))
        path.write_bytes(edit(text.encode() + data))
        return path


def nifti(
    name: str,
    words: str,
    edit: Callable[[bytearray], None] = lambda _: None,
    pack: Callable[[bytes], bytes] = gzip.compress,
) -> None:
    """A .nii.gz edited before or after it is packed."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        content = nifti_bytes()
        edit(content)
        path = folder / f"{uid}.nii.gz"
        path.write_bytes(pack(bytes(content)))
        return path


# Keys that must be there, once, spelt right
for key in FIELDS:
    if key not in ("CompressedData", "TransformMatrix", "CenterOfRotation", "AnatomicalOrientation"):
        changed(f"no-{key}", f"no {key}", **{key: None})
edited("twice-DimSize", "second time", lambda h: h.replace(b"DimSize", b"DimSize = 8 6 5\nDimSize"))
edited("twice-unknown", "second time", lambda h: h.replace(b"DimSize", b"A = 1\nA = 2\nDimSize"))
edited("lower-case-key", "spells TransformMatrix", lambda h: h.replace(b"TransformM", b"Transformm"))
changed("two-origins", "both Offset and Position", Position="1 2 3")
changed("two-directions", "both TransformMatrix and Rotation", Rotation="1 0 0 0 1 0 0 0 1")
changed("two-byte-orders", "both BinaryDataByteOrderMSB", ElementByteOrderMSB="True")

# Text that is no header
edited("empty", "no ElementDataFile", lambda _: b"")
edited("junk", "not UTF-8", lambda _: bytes(range(255, 0, -1)) * 9)
edited("zeros", "expected 'Key = Value'", lambda _: bytes(300))
edited("latin-1", "not UTF-8", lambda h: h.replace(b"DimSize", b"Name = M\xfcller\nDimSize"))
edited("utf-16", "not UTF-8", lambda h: h.decode().encode("utf-16"))
edited("no-equals", "expected 'Key = Value'", lambda h: h.replace(b"NDims =", b"NDims "))
edited("blank-line", "expected 'Key = Value'", lambda h: h.replace(b"NDims", b"\nNDims"))
edited("no-key", "expected 'Key = Value'", lambda h: h.replace(b"NDims", b""))
edited("escape-codes", "expected 'Key = Value'", lambda h: h.replace(b"RAI", b"\x1b[2J"))
edited("nul-in-name", "expected 'Key = Value'", lambda h: h.replace(b".raw", b"\0.raw"))
edited("html", "expected 'Key = Value'", lambda _: b"<html><body>404 not found</body></html>\n")
edited("huge", "expected at most 65536", lambda h: b"Comment = " + b"x" * 70000 + b"\n" + h)
edited("after-last", "follows ElementDataFile", lambda h: h + b"DimSize = 9 9 9\n")
edited("cut-header", "no ElementDataFile", lambda h: h[:150])
edited("long-value", "DimSize is", lambda h: h.replace(b"8 6 5", b"8 " * 20000))

# Values
changed("scene", "ObjectType is", ObjectType="Scene")
for count in ("1000", "100", "-1", "2", "4", "0", "3.0", "three"):
    changed(f"ndims-{count}", "NDims is", NDims=count)
changed("ascii-data", "BinaryData is False", BinaryData="False")
changed("binary-maybe", "BinaryData is", BinaryData="maybe")
changed("byte-order-middle", "BinaryDataByteOrderMSB is", BinaryDataByteOrderMSB="Middle")
changed("compressed-maybe", "CompressedData is", CompressedData="2")
for label, value in {
    "zero": "8 0 5",
    "negative": "8 -6 5",
    "float": "8 6.0 5",
    "two": "8 6",
    "four": "8 6 5 1",
    "words": "a b c",
    "side": "5000 1 1",
    "product": "4096 4096 4096",
    "overflow": "4294967296 4294967296 4294967296",
    "digits": "9" * 400 + " 1 1",
    "arabic": "٨ ٦ ٥",
    "underscore": "8 6 0_5",
}.items():
    words = {"zero": "three sides", "negative": "three sides", "side": "three sides", "product": "more than"}
    words["overflow"] = "three sides"
    changed(f"dims-{label}", words.get(label, "DimSize is"), DimSize=value)
for label, value in {
    "zero": "0 0.7 2.5",
    "negative": "0.7 -0.7 2.5",
    "inf": "0.7 0.7 inf",
    "nan": "0.7 0.7 nan",
    "huge": "0.7 0.7 1e9",
    "overflow": "0.7 0.7 1e999",
    "tiny": "1e-9 0.7 2.5",
    "two": "0.7 0.7",
    "comma": "0,7 0,7 2,5",
}.items():
    changed(f"spacing-{label}", "acing is", ElementSpacing=value)
for label, value in {"nan": "nan 0 0", "inf": "0 -inf 0", "far": "0 0 1e30", "four": "0 0 0 0"}.items():
    changed(f"offset-{label}", "Offset is" if label != "far" else "origin is", Offset=value)
for label, value in {
    "singular": "1 0 0 1 0 0 0 0 1",
    "zero": "0 0 0 0 0 0 0 0 0",
    "sheared": "1 0.1 0 0 1 0 0 0 1",
    "scaled": "2 0 0 0 2 0 0 0 2",
    "vast": "1e200 0 0 0 1e200 0 0 0 1",
    "eight": "1 0 0 0 1 0 0 0",
    "nan": "nan 0 0 0 1 0 0 0 1",
}.items():
    words = "TransformMatrix is" if label in ("eight", "nan") else "direction"
    changed(f"matrix-{label}", words, TransformMatrix=value)
for kind in ("MET_OTHER", "MET_NONE", "MET_STRING", "MET_SHORT_ARRAY", "MET_FLOAT_MATRIX", "short", "", "%n"):
    name = "type-" + (kind.replace("%", "percent-") or "blank")
    changed(name, "ElementType is", ElementType=kind)
changed("type-wider", "cut short", ElementType="MET_DOUBLE")
changed("type-narrower", "more voxels", ElementType="MET_UCHAR")
changed("channels", "ElementNumberOfChannels is", ElementNumberOfChannels="3")
for value in ("-1", "512", "abc"):
    changed(f"header-size-{value}", "HeaderSize is", HeaderSize=value)
changed("header-size-slice", "HeaderSizePerSlice is", HeaderSizePerSlice="16")
changed("slope", "Slope is '2'", ElementToIntensityFunctionSlope="2")
changed("intercept", "Offset is '-1024'", ElementToIntensityFunctionOffset="-1024")
changed("microns", "DistanceUnits is", DistanceUnits="um")

# Data file: name
for label, value in {
    "absolute": "/etc/passwd",
    "relative": "../../../../../../../../../etc/passwd",
    "parent": "../{uid}.raw",
    "folder-below": "sub/{uid}.raw",
    "backslash": "..\\{uid}.raw",
    "dot": ".",
    "dots": "..",
    "blank": "",
    "itself": "{uid}.mhd",
}.items():
    changed(f"data-{label}", "file in the same folder", ElementDataFile=value)
changed("data-local", "LOCAL", ElementDataFile="LOCAL")
changed("data-local-mixed", "LOCAL", ElementDataFile="Local")
for label, value in {
    "list": "LIST",
    "list-2d": "LIST 2",
    "percent-s": "%s",
    "percent-n": "a%n.raw",
    "pattern": "sl%d.raw 1 8 0",
    "long-pattern": "%099999d.raw 1 2 1",
}.items():
    changed(f"data-{label}", "list or pattern", ElementDataFile=value)
changed("data-missing", "does not exist", ElementDataFile="other.raw")
changed("data-long", "characters", ElementDataFile="x" * 300)

# Data file: kind and size
linked("link-passwd", "leads out", lambda p, _: p.symlink_to("/etc/passwd"))
linked("link-relative", "leads out", lambda p, _: p.symlink_to("../" * 20 + "etc/passwd"))
linked("link-device", "leads out", lambda p, _: p.symlink_to("/dev/zero"))
linked("link-loop", "cannot be reached", lambda p, _: p.symlink_to(p.name))
linked("link-dangling", "does not exist", lambda p, _: p.symlink_to("gone.raw"))
linked("fifo", "no regular file", lambda p, _: os.mkfifo(p))
linked("folder", "no regular file", lambda p, _: p.mkdir())


@add("link-fifo", "no regular file")
def link_to_fifo(folder: Path, uid: str) -> Path:
    os.mkfifo(folder / f"{uid}.fifo")
    (folder / f"{uid}.raw").symlink_to(f"{uid}.fifo")
    path = folder / f"{uid}.mhd"
    path.write_text(header_text(uid))
    return path


changed("raw-empty", "cut short: 0 bytes", raw=b"")
changed("raw-short", "cut short: 479 bytes of voxels, the header says 480", raw=RAW[:-1])
changed("raw-half", "fetch the scan again", raw=RAW[:240])
changed("raw-long", "481 bytes, expected 480", raw=RAW + b"\0")
changed("not-compressed", "zlib stream is damaged", CompressedData="True")
changed(
    "not-finite",
    "slice 2 has voxels",
    ElementType="MET_FLOAT",
    raw=struct.pack("<240f", *[*[0.0] * 120, float("nan"), *[0.0] * 119]),
)
changed(
    "infinite", "slice 4 has voxels", ElementType="MET_DOUBLE", raw=struct.pack("<240d", *[*[0.0] * 239, float("-inf")])
)

# Compressed data file
packed("zraw-flip", "damaged", flip(40))
packed("zraw-flip-sum", "damaged", flip(-2))
packed("zraw-cut", "cut short", lambda z: z[:-3])
packed("zraw-cut-half", "cut short", lambda z: z[: len(z) // 2])
packed("zraw-empty", "cut short", lambda _: b"")
packed("zraw-trailing", "follow the end", lambda z: z + b"\0")
packed("zraw-twice", "follow the end", lambda z: z + z)
packed("zraw-size", "CompressedDataSize is 7", lambda z: z, 7)
packed("zraw-size-negative", "CompressedDataSize is -1", lambda z: z, -1)
packed("zraw-short-content", "cut short: 479", lambda _: zlib.compress(RAW[:-1]))
packed("zraw-bomb", "more voxels", lambda _: zlib.compress(bytes(50_000_000)))
packed("zraw-gzip", "damaged", lambda _: gzip.compress(RAW))
changed("zraw-tiny", "cannot hold", CompressedData="True", DimSize="4096 4096 100")

# One file with header and data
local("mha-cut", "cut short: 479 bytes", lambda b: b[:-1])
local("mha-no-data", "cut short: 0 bytes", lambda b: b[: -len(RAW)])
local("mha-no-newline", "ends with its header", lambda b: b[: -len(RAW) - 1])
local("mha-trailing", "481 bytes, expected 480", lambda b: b + b"\0")
local("mha-elsewhere", "expected LOCAL", lambda b: b, ElementDataFile="{uid}.raw")
local("mha-long-header", "within 64 KiB", lambda b: b"A = " + b"x" * 70000 + b"\n" + b)
local("mha-flip", "damaged", flip(-20), zlib.compress(RAW), CompressedData="True")
local("mha-zlib-cut", "cut short", lambda b: b[:-3], zlib.compress(RAW), CompressedData="True")
local("mha-not-compressed", "damaged", lambda b: b, CompressedData="True")
local("mha-empty", "no ElementDataFile", lambda _: b"")

# NIfTI
nifti("nii-magic", "no NIfTI-1 header", put(344, "4s", b"ni1\0"))
nifti("nii-nifti-2", "no NIfTI-1 header", put(0, "i", 540))
nifti("nii-header-size", "no NIfTI-1 header", put(0, "i", -1))
nifti("nii-dims-2", "dim is", put(40, "h", 2))
nifti("nii-dims-huge", "dim is", put(40, "h", 32767))
nifti("nii-time", "dim is", put(40, "8h", 4, 8, 6, 5, 2, 1, 1, 1))
nifti("nii-negative", "three sides", put(42, "h", -8))
nifti("nii-zero", "three sides", put(44, "h", 0))
nifti("nii-complex", "datatype is 32", put(70, "2h", 32, 64))
nifti("nii-rgb", "datatype is 128", put(70, "2h", 128, 24))
nifti("nii-bitpix", "bitpix is 8", put(72, "h", 8))
nifti("nii-spacing-zero", "pixdim is", put(80, "f", 0))
nifti("nii-spacing-negative", "pixdim is", put(84, "f", -0.7))
nifti("nii-spacing-nan", "pixdim is", put(88, "f", float("nan")))
nifti("nii-metres", "spacing is", put(123, "B", 1))
nifti("nii-offset", "vox_offset is", put(108, "f", 0))
nifti("nii-offset-nan", "vox_offset is", put(108, "f", float("nan")))
nifti("nii-offset-huge", "vox_offset is", put(108, "f", 1e30))
nifti("nii-offset-half", "vox_offset is", put(108, "f", 352.5))
nifti("nii-extension", "extension at byte 352", lambda c: (put(108, "f", 368)(c), put(348, "B", 1)(c), None)[-1])
nifti("nii-slope-nan", "scl_slope is nan", put(112, "f", float("nan")))
nifti("nii-inter-inf", "scl_inter inf", put(116, "f", float("inf")))
nifti("nii-no-pose", "no position", put(252, "2h", 0, 0))
nifti("nii-pose-code", "expected codes", put(252, "2h", 1, 77))
nifti("nii-pose-nan", "not finite", put(292, "f", float("nan")))
nifti("nii-sheared", "orthonormal", put(280, "4f", 0.7, 0.7, 0, 0))
nifti("nii-far", "origin is", put(292, "f", 1e6))
nifti("nii-trailing", "more voxels", lambda c: c.extend(b"\0"))
nifti("nii-short", "cut short", lambda c: c.__delitem__(-1))
nifti("nii-header-only", "cut short", lambda c: c.__delitem__(slice(352, None)))
nifti("nii-stub", "too few", lambda c: c.__delitem__(slice(100, None)))
nifti("nii-cut", "cut short", pack=lambda b: gzip.compress(b)[:-9])
nifti("nii-cut-early", "cut short", pack=lambda b: gzip.compress(b)[:50])
nifti("nii-crc", "damaged", pack=lambda b: flip(-6)(gzip.compress(b)))
nifti("nii-flip", "damaged", pack=lambda b: flip(-30)(gzip.compress(b)))
nifti("nii-junk-after", "follow the end", pack=lambda b: gzip.compress(b) + b"junk")
nifti("nii-second-member", "more voxels", pack=lambda b: gzip.compress(b) + gzip.compress(b))
nifti("nii-not-gzip", "damaged", pack=bytes)
nifti("nii-empty", "file is empty", pack=lambda _: b"")


# Header file: kind and name
@add("header-missing", "does not exist")
def no_header(folder: Path, uid: str) -> Path:
    return folder / f"{uid}.mhd"


@add("header-folder", "no regular file")
def folder_as_header(folder: Path, uid: str) -> Path:
    path = folder / f"{uid}.mhd"
    path.mkdir()
    return path


@add("header-fifo", "no regular file")
def fifo_as_header(folder: Path, uid: str) -> Path:
    path = folder / f"{uid}.mhd"
    os.mkfifo(path)
    return path


@add("header-loop", "cannot be reached")
def loop_as_header(folder: Path, uid: str) -> Path:
    path = folder / f"{uid}.mhd"
    path.symlink_to(path.name)
    return path


def outside(name: str, suffix: str) -> None:
    """A header that is a link out of the data folder."""

    @add(name, "leads out")
    def build(folder: Path, uid: str) -> Path:
        path = folder / f"{uid}{suffix}"
        path.symlink_to("/etc/passwd")
        return path


outside("header-passwd", ".mhd")
outside("header-passwd-mha", ".mha")
outside("header-passwd-nii", ".nii.gz")


def named(name: str, file_name: str, words: str = "no series UID") -> None:
    """A good scan under a bad name."""

    @add(name, words)
    def build(folder: Path, uid: str) -> Path:
        (folder / f"{uid}.raw").write_bytes(RAW)
        path = folder / file_name
        path.write_text(header_text(uid))
        return path


named("uid-dots", "1..2.mhd")
named("uid-hidden", ".mhd")
named("uid-long", "1" * 129 + ".mhd")
named("uid-space", "a b.mhd")
named("uid-newline", "a\nb.mhd")
named("uid-unicode", "é.mhd")
named("uid-csv", "=cmd,1.mhd")
named("suffix-case", "suffix-case.MHD", "unknown kind")
