"""A phantom made once for all tests, a store built from it once; commands, typed here or in a process of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

from .fault_driver import Driver

SOAK = "--soak"
PART = "--part"
SIZE = (40, 64, 64)
NUM_SCANS = 6
NUM_SUBSETS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(SOAK, action="store_true", help="only the tests that have a long figure, with that (make soak)")
    parser.addoption(PART, type=float, default=1.0, help="with --soak: this part of each long figure, spread evenly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --soak the tests that have a long figure, and those that are long; without it all but the latter."""
    soak = config.getoption(SOAK)

    def is_chosen(item: pytest.Item) -> bool:
        is_long = item.get_closest_marker("soak") is not None
        return is_long or "figure" in getattr(item, "fixturenames", ()) if soak else not is_long

    left_out = [item for item in items if not is_chosen(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if is_chosen(item)]


Figure = Callable[[int, int], int]


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Figure:
    """How many of something: figure(quick, long), the long one with --soak, or a part of it."""
    part = request.config.getoption(PART)
    return lambda quick, long: max(quick, round(long * part)) if request.config.getoption(SOAK) else quick


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small scans in three subsets; never written to."""
    from lunaprep.sources.phantom import write_phantom

    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, num_scans=NUM_SCANS, seed=7, size=SIZE, num_subsets=NUM_SUBSETS, num_candidates=20)
    return root


@pytest.fixture
def data(phantom_root: Path, tmp_path: Path) -> Path:
    """A copy of the phantom that a test may spoil."""
    return Path(shutil.copytree(phantom_root, tmp_path / "data"))


@pytest.fixture(scope="session")
def built_store(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store, two shards a subset; never written to."""
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    out = tmp_path_factory.mktemp("store") / "store"
    build(BuildOptions(phantom_root, out, workers=1), Parameters(shard_bytes=1))
    return out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A warm process that forks a child for each command; see fault_driver."""
    opened = Driver(tmp_path_factory.mktemp("driver"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny scans in two subsets, quick to build; never written to."""
    from lunaprep.sources.phantom import write_phantom

    root = tmp_path_factory.mktemp("tiny")
    write_phantom(root, num_scans=3, seed=7, size=(16, 48, 48), num_subsets=2, num_candidates=6)
    return root


Run = Callable[..., subprocess.CompletedProcess[str]]


def typed(command: Any, args: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """What a command does that is typed in a folder, without a process of its own: most of its time is its start.

    A bug comes out as the exception that it is. A build has one worker, as loky's would stay in this folder.
    """
    words = [str(arg) for arg in args]
    one_worker = mock.patch("lunaprep.build.default_workers", return_value=1)
    with contextlib.chdir(folder), one_worker, mock.patch.dict(os.environ, NO_COLOR="1"):
        os.environ.pop("LUNA16_ROOT", None)
        done = CliRunner().invoke(command, words, catch_exceptions=False)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Type `lunaprep` in a folder of its own."""
    from lunaprep.cli import cli

    return lambda args: typed(cli, args, tmp_path)


@pytest.fixture
def run_apart(tmp_path: Path) -> Run:
    """Run `lunaprep` as a process, in a folder of its own."""

    def call(args: Sequence[str | Path], **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lunaprep", *map(str, args)]
        clean = {key: value for key, value in os.environ.items() if key != "LUNA16_ROOT"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**clean, **env}, timeout=100, check=False
        )

    return call


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a store but the builder's notes, by name."""
    paths = (path for path in sorted(store.rglob("*")) if path.is_file() and ".build" not in path.parts)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}
