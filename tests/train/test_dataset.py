"""The store as a torch Dataset, through torch's own DataLoader."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lunaprep.errors import StoreError
from lunaprep.store.reader import open_store
from lunatrain.dataset import CropDataset
from lunatrain.errors import UsageError
from lunatrain.sampling import select_rows


def test_samples(built_store: Path):
    store = open_store(built_store)
    rows = select_rows(store.manifest, "series", "train")[::-1]
    dataset = CropDataset(built_store / "crops.h5", rows)
    assert len(dataset) == len(rows)
    for index in (0, 5, -1):
        crop, label, row = dataset[index]
        assert (crop.shape, crop.dtype, row) == ((1, *store.crop_shape), torch.float32, rows[index])
        assert label == store.manifest["is_nodule"].iloc[row]
        np.testing.assert_array_equal(crop[0].numpy(), store.crops([row])[0])
    with pytest.raises(IndexError, match="index must lie in"):
        dataset[len(dataset)]


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_through_a_data_loader(built_store: Path, workers: int, context: str | None):
    store = open_store(built_store)
    dataset = CropDataset(built_store)
    dataset[0]  # maps are open here when workers are made
    seen = []
    for crops, labels, rows in DataLoader(dataset, 16, True, num_workers=workers, multiprocessing_context=context):
        np.testing.assert_array_equal(crops[:, 0].numpy(), store.crops(rows.numpy()))
        np.testing.assert_array_equal(labels.numpy(), store.manifest["is_nodule"].to_numpy()[rows.numpy()])
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(store)))


def test_pickle_leaves_the_maps_behind(built_store: Path):
    dataset = CropDataset(built_store, np.arange(4))
    dataset[0]
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[3][0], dataset[3][0])


def test_unknown_labels(built_store: Path):
    with pytest.raises(UsageError, match="crops have no is_malignant"):
        CropDataset(built_store, label="is_malignant")


def test_another_store_in_the_same_place(built_store: Path, tmp_path: Path):
    from lunaprep.build import BuildOptions, build
    from lunaprep.parameters import Parameters
    from lunaprep.sources.phantom import write_phantom

    here = Path(shutil.copytree(built_store, tmp_path / "store"))
    dataset = CropDataset(here)
    shutil.rmtree(here)
    write_phantom(tmp_path / "other", num_scans=1, seed=9, size=(40, 64, 64), num_subsets=1, num_candidates=4)
    build(BuildOptions(tmp_path / "other", here, workers=1, volumes=False), Parameters())
    with pytest.raises(StoreError, match="another store than when the dataset was made"):
        dataset[0]
