"""Volumes' deflate: any inflate reads it, it fits its limit, and the same arrays give the same bytes."""

import os
import platform
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from lunaprep.store import encoder
from lunaprep.store.encoder import deflate

from .conftest import Figure


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num_parts=st.integers(1, 4),
    size=st.integers(1, 3000) | st.sampled_from([65535, 65536, 131072]),
    values=st.sampled_from([1, 2, 17, 256]),
    seed=st.integers(0, 9),
)
def test_any_inflate_gives_the_arrays_back_and_little_is_added(num_parts, size, values, seed):
    parts = np.random.default_rng(seed).integers(0, values, (num_parts, size)).astype(np.uint8)
    stored = deflate(parts)
    assert zlib.decompress(stored) == parts.tobytes()
    assert isal_zlib.decompress(stored) == parts.tobytes()
    assert len(stored) <= parts.nbytes + parts.nbytes // 1000 + 64  # what a reader takes: store/layout.py


def test_a_part_may_be_used_again_for_the_next():
    rows = np.random.default_rng(0).integers(0, 9, (3, 70000)).astype(np.uint8)
    part = np.empty(70000, dtype=np.uint8)

    def parts():
        for row in rows:
            part[:] = row
            yield part

    assert deflate(parts()) == deflate(rows)


def address_counts(num_trials: int) -> bool:
    """Whether one of so many inputs gives other bytes where the encoder's state has another address.

    By itself ISA-L files the third byte's place under a number of 13 bits made from the address instead of from the
    bytes there. Here those come again later, and are found only where both numbers are equal.
    """
    rng = np.random.default_rng(3)
    for _ in range(num_trials):
        data = rng.integers(0, 256, 96).astype(np.uint8)
        data[40:48] = data[2:10]
        first = deflate([data])
        taken = isal_zlib.compressobj(encoder.LEVEL)  # where the first one's state was
        if deflate([data]) != first:
            return True
        del taken
    return False


def test_the_same_bytes_wherever_the_encoder_lies_in_memory(monkeypatch: pytest.MonkeyPatch, figure: Figure):
    assert not address_counts(figure(10_000, 300_000))
    if platform.machine() in ("x86_64", "AMD64"):  # that it would be seen
        monkeypatch.setattr(encoder, "LEAD_BYTES", 0)
        assert address_counts(100_000)


DIGEST = """
import hashlib, numpy as np
from lunaprep.store.encoder import deflate
rng, digest = np.random.default_rng(1), hashlib.sha256()
for k in range(40):
    values = np.clip(rng.normal(-800, 10 * k, (8, 64, 64)).round(), -1000, 1000).astype("<f4")
    junk = [np.full(rng.integers(1000, 400_000), k, np.uint8) for _ in range(3)]
    del junk
    digest.update(deflate(values.view(np.uint8).reshape(-1, 4).T.copy()))
print(digest.hexdigest())
"""


def test_the_same_bytes_whatever_lay_in_its_memory_before(figure: Figure):
    digests = set()
    for fill in range(1, figure(3, 40)):
        poison = {"MALLOC_PERTURB_": str(fill * 89 % 256), "PYTHONMALLOC": "malloc" if fill % 2 else "pymalloc"}
        done = subprocess.run([sys.executable, "-c", DIGEST], env=os.environ | poison, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
