"""XML from strangers: bombs are refused at once and in little memory, everything else in one line."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lunaprep.errors import TableError
from lunaprep.safe_xml import MAX_BYTES, read_xml

LAUGHS = "<!DOCTYPE a [<!ENTITY l0 'ha'>" + "".join(f"<!ENTITY l{k} '{f'&l{k - 1};' * 10}'>" for k in range(1, 10))
BOMBS = {
    "billion laughs": f"{LAUGHS}]><a>&l9;</a>".encode(),
    "quadratic": f"<!DOCTYPE a [<!ENTITY x '{'x' * 50_000}'>]><a>{'&x;' * 50_000}</a>".encode(),
    "external entity": b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>",
    "external DTD": b"<!DOCTYPE a SYSTEM 'http://127.0.0.1:9/x.dtd'><a/>",
    "UTF-16 DOCTYPE": "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>".encode("utf-16"),
    "500,000 deep": b"<a>" * 500_000,
    "33 deep": b"<a>" * 33 + b"</a>" * 33,
    "two million elements": b"<a>" + b"<b/>" * 2_000_000 + b"</a>",
    "600,000 attributes": b"<a " + b" ".join(b"k%d=''" % k for k in range(600_000)) + b"/>",
    "too long": b"<a>" + b" " * MAX_BYTES + b"</a>",
}
BAD = {
    "empty": (b"", "no well-formed XML"),
    "no XML": (b"seriesuid,coordX\n", "line 1: it is no well-formed XML"),
    "cut": (b"<a>\n<b>1</b>", "line 2: it is no well-formed XML"),
    "another root": (b"<b/>", "its outermost element is 'b', expected 'a'"),
    "another namespace": (b"<a xmlns='http://example.org'/>", "expected 'a'"),
    "unknown entity": (b"<a>&x;</a>", "no well-formed XML"),
    "unknown encoding": (b"<?xml version='1.0' encoding='x-none'?><a/>", "unknown encoding"),
    "NUL": (b"<a>\0</a>", "no well-formed XML"),
}


def message(path: Path) -> str:
    with pytest.raises(TableError) as caught:
        read_xml(path, "a")
    text = str(caught.value)
    assert text.startswith(f"{path.name}: ")
    assert text.isprintable()
    assert len(text) <= 200
    return text


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(tmp_path, name):
    path = tmp_path / "a.xml"
    path.write_bytes(BOMBS[name])
    words = message(path)
    assert "refused" in words or "may have" in words


@pytest.mark.parametrize("name", BAD)
def test_bad_xml(tmp_path, name):
    content, words = BAD[name]
    path = tmp_path / "a.xml"
    path.write_bytes(content)
    assert words in message(path)


def test_no_file(tmp_path):
    assert "no regular file" in message(tmp_path / "none.xml")
    assert "no regular file" in message(tmp_path)


def test_a_gigabyte_is_refused_by_its_size(tmp_path):
    path = tmp_path / "a.xml"
    with path.open("wb") as sparse:
        sparse.truncate(1 << 30)
    assert "1073741824 bytes" in message(path)


def test_bombs_take_little_memory(tmp_path):
    """Peak memory of a process that meets them all, over one that has only imported the reader."""
    for k, content in enumerate(BOMBS.values()):
        (tmp_path / f"{k}.xml").write_bytes(content)
    code = """
        import sys
        from pathlib import Path
        from lunaprep.safe_xml import read_xml

        def peak():  # not ru_maxrss: it would count the parent before the exec
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

        before = peak()
        for path in sorted(Path(sys.argv[1]).glob("*.xml")):
            try:
                read_xml(path, "a")
            except ValueError:
                continue
            raise SystemExit(f"{path} was taken")
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert grown * 1024 < 50e6


def test_what_is_read(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<a xmlns='urn:x' xmlns:o='urn:o'>\n <b> 1 </b><b/><o:c>other</o:c>\n <d><e>ä</e></d></a>")
    root = read_xml(path, "a", "urn:x")
    assert [item.value("e") for item in root.all("d")] == ["ä"]
    assert (root.value("b"), root.value("d", "e"), root.value("d", "none"), root.value("c")) == ("1", "ä", None, None)
    assert [item.line for item in root.children] == [2, 2, 2, 3]
