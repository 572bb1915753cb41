"""Notes on DICOM headers: a hint that saves time, and changes nothing."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import xxhash

from lunaprep.build import BuildOptions, build, preview
from lunaprep.parallel import CHUNK_ITEMS, MIN_ITEMS, spread
from lunaprep.parameters import Parameters
from lunaprep.scans import dicom_header
from lunaprep.scans.dicom import find_series
from lunaprep.scans.dicom_notes import HeaderNotes

from .conftest import files_of
from .dicom_files import write_series

OTHER = "1.2.826.0.1.3680043.10.1.2"
PARAMETERS = Parameters(crop_shape=(8, 8, 8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two series, and something that is no DICOM."""
    write_series(tmp_path / "data/a")
    write_series(tmp_path / "data/b", series_uid=OTHER)
    (tmp_path / "data/readme.txt").write_text("no slice")
    return tmp_path / "data"


def noted(folder: Path) -> tuple[Path, HeaderNotes]:
    """Notes of a folder as a first look leaves them."""
    file = folder.parent / "headers.json"
    notes = HeaderNotes(file)
    find_series(folder, notes)
    notes.save()
    return file, notes


def test_what_is_recalled_is_what_was_read(folder):
    plain = find_series(folder)
    file, first = noted(folder)
    assert first.num_read == 13
    again = HeaderNotes(file)
    assert find_series(folder, again) == plain
    assert again.num_read == 1  # the file that is no DICOM
    assert not any(b in file.read_bytes() for b in (b"Secret", b"1950"))  # of a patient the id alone
    before = file.stat().st_mtime_ns
    shutil.rmtree(folder / "b")
    fewer = HeaderNotes(file)
    assert find_series(folder, fewer) == find_series(folder)
    fewer.save()
    assert file.stat().st_mtime_ns != before
    assert OTHER not in file.read_text()


def test_a_changed_file_is_read_again_even_with_its_old_size_and_time(folder):
    file, _ = noted(folder)
    path = folder / "a/002.dcm"
    stat = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"P-1 ", b"P-7 "))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    notes = HeaderNotes(file)
    assert find_series(folder, notes) == find_series(folder)
    assert notes.num_read == 2
    assert {item.patient_id for series in find_series(folder, notes).series for item in series.slices} == {"P-1", "P-7"}


def test_links_are_looked_at_each_time(folder):
    (folder / "a/000.dcm").rename(folder / "elsewhere")
    (folder / "a/000.dcm").symlink_to(folder / "elsewhere")
    file, _ = noted(folder)
    assert "a/000.dcm" not in json.loads(file.read_text().splitlines()[1])["files"]
    assert find_series(folder, HeaderNotes(file)) == find_series(folder)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"method":1', '"method":0'),
        lambda text: text.replace('"groups":[[', '"groups":[["x",'),
        lambda text: text.replace('"groups":[', '"groups":[1,'),
        lambda text: json.dumps({**json.loads(text), "files": {k: [] for k in json.loads(text)["files"]}}),
        lambda text: json.dumps({**json.loads(text), "groups": [[]]}),
    ],
)
def test_damaged_notes_are_no_notes(folder, spoil, signed):
    file, _ = noted(folder)
    digest, body = file.read_text().split("\n", 1)
    body = spoil(body)
    digest = xxhash.xxh3_128_hexdigest(body.encode()) if signed else digest
    file.write_text(f"{digest}\n{body}")
    notes = HeaderNotes(file)
    assert find_series(folder, notes) == find_series(folder)
    assert notes.num_read > 1


def test_a_build_that_goes_on_reads_no_header_and_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    options = BuildOptions(folder, tmp_path / "s", source="dicom", workers=1)
    seen = preview(options, PARAMETERS)
    assert not (tmp_path / "s").exists()
    build(options, PARAMETERS)
    first = files_of(tmp_path / "s")
    read = []
    monkeypatch.setattr(dicom_header, "read_header", lambda path, root: read.append(path.name))
    assert preview(options, PARAMETERS).scans == seen.scans
    build(options, PARAMETERS)
    assert set(read) == {"readme.txt"}
    assert files_of(tmp_path / "s") == first
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "s/.build")
    build(options, PARAMETERS)
    assert files_of(tmp_path / "s") == first
    build(BuildOptions(folder, tmp_path / "new", source="dicom", workers=1), PARAMETERS)
    assert files_of(tmp_path / "new") == first


def test_headers_read_by_several_processes_are_the_same(folder, monkeypatch):
    (folder / "a/003.dcm").write_bytes((folder / "a/003.dcm").read_bytes()[:-100])
    (folder / "b/damaged.dcm").write_bytes(b"x" * 200)
    monkeypatch.setattr("lunaprep.parallel.MIN_ITEMS", 2)
    monkeypatch.setattr("lunaprep.parallel.CHUNK_ITEMS", 2)
    plain = find_series(folder)
    assert len(plain.faults) == 2
    file = folder.parent / "headers.json"
    notes = HeaderNotes(file, partial(spread, workers=2, what="headers", progress=False))
    assert find_series(folder, notes) == plain
    notes.save()
    assert find_series(folder, HeaderNotes(file)) == plain


def test_work_whose_processes_die_is_done_here():
    here, numbers = os.getpid(), list(range(MIN_ITEMS + CHUNK_ITEMS))

    def double(items):
        if os.getpid() != here and numbers[-1] in items:
            os.kill(os.getpid(), signal.SIGKILL)
        return [2 * item for item in items]

    assert list(spread(double, numbers, 2, what="", progress=False)) == [2 * number for number in numbers]
