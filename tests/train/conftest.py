"""A store of small crops, quick to train on."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_store(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store with crops of 16x24x24, every third patient for validation."""
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    out = tmp_path_factory.mktemp("small") / "store"
    parameters = Parameters(crop_shape=(16, 24, 24), val_stride=3, shard_bytes=1)
    build(BuildOptions(phantom_root, out, workers=1, volumes=False), parameters)
    return out


@pytest.fixture(scope="session")
def loc_store(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's store with volumes and targets, every third patient for validation."""
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters

    out = tmp_path_factory.mktemp("loc") / "store"
    build(BuildOptions(phantom_root, out, workers=1), Parameters(val_stride=3))
    return out


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and lose much where the cores are busy."""
    import torch

    torch.set_num_threads(1)
