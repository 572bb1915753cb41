"""Builds to be disturbed, and what must hold afterwards, whatever disturbed them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import lunaprep
from lunaprep import schema
from lunaprep.build import BuildOptions, build
from lunaprep.parameters import Parameters
from lunaprep.verify import verify_store

from .conftest import files_of

SMALL = Parameters(shard_bytes=1, crop_shape=(8, 8, 8))
OTHER = Parameters(shard_bytes=1, crop_shape=(8, 8, 8), hu=(-900, 900))
CASES = ["fresh", "another subset", "other crops"]
SLOW_CASES = [CASES[0], pytest.param(CASES[1], marks=pytest.mark.soak), CASES[2]]
"""For tests of many builds: that with the fewest calls is left to the soak."""


@dataclass(frozen=True)
class Case:
    """A build: its scans, the store it starts from, and the one it makes."""

    root: Path
    old: Path | None
    new: Path
    targets: bool = True

    def command(self, out: Path, workers: int = 1) -> Sequence[str | Path]:
        """The build as a command."""
        shape = ("--crop-shape", "8", "8", "8")
        size = ("--shard-size", "1", *shape, "--targets" if self.targets else "--no-targets")
        return ["build", "--workers", str(workers), *size, "--data", self.root, "--out", out]

    def begin(self, out: Path) -> None:
        """Put a folder into the state the build starts from."""
        if out.exists():
            shutil.rmtree(out)
        if self.old:
            shutil.copytree(self.old, out)

    def check(self, out: Path, when: object) -> None:
        """The store is the old one or the new one, whole; `build` then ends as if nothing had been."""
        found = store_id(out)
        assert found in (store_id(self.old), store_id(self.new)), when
        if found:
            report = verify_store(out)
            assert report.ok, (when, report.findings)
            whole = self.new if found == store_id(self.new) else self.old
            assert whole is not None
            assert files_of(out).items() >= files_of(whole).items(), when
        self.finish(out, when)

    def finish(self, out: Path, when: object = None) -> None:
        """The same build goes through, gives the bytes of an undisturbed one, and leaves nothing else."""
        build(BuildOptions(self.root, out, workers=1, targets=self.targets), SMALL)
        assert files_of(out) == files_of(self.new), when
        assert left_over(out) == [], when


def make_case(name: str, root: Path, folder: Path, *, targets: bool = True) -> Case:
    """One of `CASES`."""
    new, old = folder / "new", folder / "old"
    build(BuildOptions(root, new, workers=1, targets=targets), SMALL)
    if name == "another subset":
        build(BuildOptions(root, old, subsets=(0,), workers=1, targets=targets), SMALL)
    elif name == "other crops":
        build(BuildOptions(root, old, workers=1, targets=targets), OTHER)
    return Case(root, old if old.exists() else None, new, targets)


def store_id(store: Path | None) -> str | None:
    """Who a store is, by a reader; None if there is none."""
    there = store is not None and (store / schema.STORE_FILE).exists()
    return lunaprep.open_store(store).record["store_id"] if there and store else None


def left_over(out: Path) -> list[str]:
    """What lies in the builder's own folder besides its lock and its notes."""
    return sorted(path.name for path in (out / schema.WORK_DIR).rglob("*") if path.name not in ("lock", "inputs.json"))
