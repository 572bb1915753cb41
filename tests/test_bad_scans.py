"""Bad scans: every one is a ScanError of one line that names the file, and nothing outside is opened."""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from lunaprep.errors import PassingScanError, ScanError
from lunaprep.scans.open import SUFFIXES, open_scan, read_voxels
from lunaprep.scans.scan import Scan

from .bad_headers import CASES, BadScan
from .scan_files import FIELDS, RAW, header_text


def use(path: Path, root: Path) -> tuple[Scan, np.ndarray]:
    """Open a scan and read all of it."""
    scan = open_scan(path, root)
    return scan, read_voxels(scan)


def tried(path: Path, root: Path) -> tuple[Scan, np.ndarray] | str:
    """The scan and its voxels, or what is wrong; any other exception is a fault of ours."""
    try:
        return use(path, root)
    except ScanError as error:
        return str(error)


@contextmanager
def without_root() -> Iterator[None]:
    """Root reads everything, so be nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_unreadable():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is root's alone
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.raw").write_bytes(RAW)
        (folder / "a.mhd").write_text(header_text("a"))
        for file, role in (("a.raw", "its data file 'a.raw'"), ("a.mhd", "the file")):
            (folder / file).chmod(0)
            with without_root(), pytest.raises(PassingScanError, match=f"{role} cannot be opened: permission denied"):
                open_scan(folder / "a.mhd", folder)


watched: list[list[str]] = []


def watch(event, args):
    """Audit hook (it cannot be removed): notes each file that Python opens while `watched` holds a list."""
    if watched and event == "open" and isinstance(args[0], str):
        watched[-1].append(args[0])


sys.addaudithook(watch)


def assert_one_line(message: str):
    assert message.isprintable()
    assert len(message) <= 200


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_scan(case: BadScan, tmp_path):
    path = case.make(tmp_path)
    opened: list[str] = []
    watched.append(opened)
    try:
        with pytest.raises(ScanError) as caught:
            use(path, tmp_path)
    finally:
        watched.clear()
    message = str(caught.value)
    assert case.words in message
    assert_one_line(message)
    assert message.startswith(f"{path.name}: ") or "no series UID" in message or "unknown kind" in message
    foreign = [name for name in opened if not name.startswith(str(tmp_path)) and ".py" not in name]  # imports
    assert not foreign


def test_bad_scans_are_many_and_distinct(tmp_path):
    assert len({case.name for case in CASES}) == len(CASES) >= 150
    paths = [case.make(tmp_path) for case in CASES]
    assert len(set(paths)) == len(paths)
    (tmp_path / "good.raw").write_bytes(RAW)
    (tmp_path / "good.mhd").write_text(header_text("good"))
    use(tmp_path / "good.mhd", tmp_path)
    for path in paths:
        with pytest.raises(ScanError):
            use(path, tmp_path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Random damage: bytes changed, removed, doubled, and the tail cut."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del out[at : at + rng.randrange(1, 12)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randrange(1, 30)]
        else:
            out[at : at + 1] = rng.choice([b"0", b"9", b"-", b".", b"%", b"\n", b" ", b"=", b"e", b"\0"])
        if not out:
            break
    return bytes(out)


@pytest.mark.timeout(7200)
def test_mutated_headers(tmp_path, figure):
    rng = random.Random(2024)
    (tmp_path / "a.raw").write_bytes(RAW)
    good = header_text("a").encode()
    path = tmp_path / "a.mhd"
    accepted = 0
    count = figure(1_500, 200_000)
    for _ in range(count):
        path.write_bytes(mutated(good, rng))
        result = tried(path, tmp_path)
        if isinstance(result, str):
            assert_one_line(result)
            continue
        scan, voxels = result
        accepted += 1
        image = SimpleITK.ReadImage(str(path))
        assert scan.geometry.origin == image.GetOrigin()
        assert scan.geometry.spacing == image.GetSpacing()
        assert scan.geometry.direction == image.GetDirection()
        np.testing.assert_array_equal(voxels, SimpleITK.GetArrayFromImage(image))
    assert 0.03 < accepted / count < 0.7


@pytest.mark.parametrize("kind", ["packed.mha", "plain.mha", "packed.nii.gz"])
def test_mutated_files(kind, tmp_path, figure):
    rng = random.Random(7)
    path = tmp_path / kind
    expected = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(expected), str(path), kind != "plain.mha")
    good = path.read_bytes()
    for _ in range(figure(400, 10_000)):
        path.write_bytes(mutated(good, rng))
        result = tried(path, tmp_path)
        if isinstance(result, str):
            assert_one_line(result)
        elif kind == "packed.nii.gz":  # its checksum covers the header as well
            np.testing.assert_array_equal(result[1], expected)


@given(text=st.text(max_size=300), raw=st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_text_is_refused(text, raw):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for content in (text.encode("utf-8", "surrogatepass"), raw):
            for suffix in SUFFIXES:
                (folder / f"a{suffix}").write_bytes(content)
                with pytest.raises(ScanError):
                    open_scan(folder / f"a{suffix}", folder)


@given(key=st.sampled_from(sorted(FIELDS)), value=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_value_is_a_scan_or_one_line(key, value):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.raw").write_bytes(RAW)
        lines = [f"{k} = {value if k == key else v.format(uid='a')}" for k, v in FIELDS.items()]
        (folder / "a.mhd").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        result = tried(folder / "a.mhd", folder)
        if isinstance(result, str):
            assert_one_line(result)
