"""Annotation files with random damage: read, or refused in one line; nothing that cannot be comes out."""

import math
from pathlib import Path

import numpy as np
import pytest

from lunaprep.errors import TableError
from lunaprep.scans.gate import MAX_SIDE
from lunaprep.sources.lidc_nodules import find_findings
from lunaprep.sources.lidc_xml import read_reading
from lunaprep.sources.voc_xml import read_boxes

from . import test_lidc_xml, test_voc_xml

READING = test_lidc_xml.document(
    test_lidc_xml.ball(5, 20, 20, 8), test_lidc_xml.ball(5, 21, 20, 8) + test_lidc_xml.non_nodule(3, 40, 41)
).encode()
BOXES = test_voc_xml.document().encode()
WORDS = (b"nan", b"-1", b"1e999", b"99999999999", b"", b"<", b"</roi>", b"&x;", b"]]>", b"\0", "é".encode(), b"<!--")


def look_at_reading(path: Path) -> None:
    reading = read_reading(path)
    assert reading.series_uid
    for finding in find_findings(reading, test_lidc_xml.GRID):
        assert all(map(math.isfinite, finding.xyz))
        assert finding.nodule is None or 0 < finding.diameter_mm < math.inf


def look_at_boxes(path: Path) -> None:
    for box in read_boxes(path).boxes:
        assert 0 <= box.rows[0] < box.rows[1] <= MAX_SIDE
        assert 0 <= box.columns[0] < box.columns[1] <= MAX_SIDE
        assert box.subtype in "ABEG"


def mutated(rng: np.random.Generator, good: bytes) -> bytes:
    """Some bytes changed, cut out, doubled, or replaced by what a parser may stumble over."""
    content = bytearray(good)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(content)))
        stop = at + int(rng.integers(0, 40))
        match rng.integers(0, 4):
            case 0:
                content[at] = int(rng.integers(0, 256))
            case 1:
                del content[at:stop]
            case 2:
                content[at:at] = content[at:stop]
            case _:
                content[at : at + int(rng.integers(0, 6))] = WORDS[rng.integers(0, len(WORDS))]
        if not content:
            break
    return bytes(content)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("good", "look"), [(READING, look_at_reading), (BOXES, look_at_boxes)], ids=["lidc", "voc"])
def test_random_damage_is_a_named_error_or_harmless(tmp_path, figure, good, look):
    path = tmp_path / "1.2.3.xml"
    path.write_bytes(good)
    look(path)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(number := figure(300, 10_000)):
        path.write_bytes(mutated(rng, good))
        try:
            look(path)
        except TableError as error:
            refused += 1
            text = str(error)
            assert text.startswith("1.2.3.xml: ")
            assert text.isprintable()
            assert len(text) <= 250
    assert 0 < refused < number
