"""How fast the detector is against the book's way of doing the same with the same weights.

    python benchmarks/detect_speed.py [SCAN...] [--seg RUN] [--cls RUN] [--rounds 3] [--threads N] [--size 250 512 512]

The book's way (*Deep Learning with PyTorch*, chapter 14), restated plainly: read with SimpleITK into float32; a data
set that builds the seven slices of context for each slice, batches of four, every slice whole; mask at 0.5, eroded
once; `scipy.ndimage.label` and `center_of_mass` on the whole volume; a crop for each candidate through a DataLoader in
batches of four, in torch's default memory format. Ours is `lunatrain.detect` as the command runs it, without pictures.

Without SCAN, phantoms of LUNA16's size are made (512x512x250); without runs, networks with fresh weights are taken: the
book's U-Net and classifier, the U-Net's bias set so that it marks a few voxels in ten thousand. Our candidates are then
classified on both sides, so that the ratio is that of the ways and not of the numbers; so it is with
--same-candidates. Alternating rounds; medians.
"""

import argparse
import copy
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its own name for itself
import torch
from scipy import ndimage
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lunaprep.sources.phantom import write_phantom
from lunatrain.detect.classifying import BOOK_CROP, Classifier, load_classifier
from lunatrain.detect.grouping import GroupingOptions
from lunatrain.detect.loading import Detector
from lunatrain.detect.pipeline import search
from lunatrain.detect.reading import find_inputs
from lunatrain.models import build_model, prepare_for
from lunatrain.models.unet import UNet
from lunatrain.segmentation import load_segmenter

SIZE = (250, 512, 512)
BATCH = 4
MARKED = 3e-4
"""Share of the voxels that a fresh U-Net is made to mark."""


class Slices(Dataset[tuple[torch.Tensor, int]]):
    """Each slice of a scan with three on either side, built when it is asked for."""

    def __init__(self, hu: np.ndarray) -> None:
        self.hu = hu

    def __len__(self) -> int:
        return len(self.hu)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One item."""
        slices = torch.zeros((7, *self.hu.shape[1:]))
        for channel, at in enumerate(range(index - 3, index + 4)):
            at = min(max(at, 0), len(self.hu) - 1)
            slices[channel] = torch.from_numpy(self.hu[at].astype(np.float32))
        return slices.clamp_(-1000, 1000), index


class Candidates(Dataset[torch.Tensor]):
    """A crop around each centre, cut when it is asked for; moved inwards at borders."""

    def __init__(self, hu: np.ndarray, centers: np.ndarray, crop_shape: tuple[int, int, int]) -> None:
        self.hu, self.centers, self.crop_shape = hu, centers, crop_shape

    def __len__(self) -> int:
        return len(self.centers)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One item."""
        cut = []
        for center, size, side in zip(self.centers[index], self.hu.shape, self.crop_shape, strict=True):
            start = min(max(round(center - side / 2), 0), max(size - side, 0))
            cut.append(slice(start, start + side))
        crop = torch.full(self.crop_shape, -1000.0)
        part = torch.from_numpy(self.hu[tuple(cut)].astype(np.float32))
        crop[: part.shape[0], : part.shape[1], : part.shape[2]] = part
        return crop.unsqueeze(0)


def book(
    path: Path, seg: nn.Module, cls: nn.Module, crop_shape: tuple[int, int, int], same: np.ndarray | None
) -> dict[str, Any]:
    """One scan the book's way: seconds of each stage and the number of candidates."""
    times, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        times[name], start = now - start, now

    hu = np.array(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), dtype=np.float32)
    lap("read")
    with torch.no_grad():
        output = np.zeros_like(hu)
        for batch, indices in DataLoader(Slices(hu), batch_size=BATCH):
            for index, probability in zip(indices, torch.sigmoid(seg(batch)), strict=True):
                output[index] = probability[0].numpy()
        mask = ndimage.binary_erosion(output > 0.5, iterations=1)
        lap("segment")
        labels, number = ndimage.label(mask)
        found = ndimage.center_of_mass(hu.clip(-1000, 1000) + 1001, labels=labels, index=np.arange(1, number + 1))
        centers = np.array(found).reshape(-1, 3) if same is None else same
        lap("group")
        for batch in DataLoader(Candidates(hu, centers, crop_shape), batch_size=BATCH):
            torch.softmax(cls(batch), dim=1)
        lap("classify")
    return {**times, "candidates": len(centers)}


def ours(path: Path, detector: Detector) -> dict[str, Any]:
    """One scan our way."""
    (done,) = search(find_inputs([path]), detector, pictures=False)
    assert done.result.reason is None, done.result.reason
    centers = done.result.table[["index", "row", "col"]].to_numpy()
    return {**done.result.stages_s, "candidates": len(centers), "centers": centers}


def fresh(path: Path) -> UNet:
    """The book's U-Net with fresh weights and a bias that marks `MARKED` of a slice's voxels."""
    torch.manual_seed(0)
    model = UNet().eval()
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    slices, _ = Slices(hu)[len(hu) // 2]
    with torch.no_grad():
        logits = model(slices[None])
        bias = model.unet.last.bias
        assert bias is not None
        bias -= torch.quantile(logits.flatten()[::7], 1 - MARKED)
    return model


def networks(args: argparse.Namespace, path: Path) -> tuple[nn.Module, Classifier]:
    """Segmentation and classifier, from runs or fresh."""
    seg = load_segmenter(args.seg)[0] if args.seg else fresh(path)
    if args.cls:
        return seg, load_classifier(args.cls, torch.device("cpu"))
    torch.manual_seed(1)
    model = build_model("luna", 2, BOOK_CROP.shape)
    return seg, Classifier(prepare_for("cpu", model).eval(), BOOK_CROP, Path(), "is_nodule")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="*", type=Path)
    parser.add_argument("--seg", type=Path)
    parser.add_argument("--cls", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-scans", type=int, default=2, help="phantoms to make")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="slices, rows, columns of the phantoms")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--same-candidates", action="store_true", help="classify ours on both sides")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    places = args.scans
    if not places:
        places = [args.folder / "detect-data"]
        write_phantom(places[0], args.num_scans, 11, tuple(args.size), hard=True)
    paths = [item.path for item in find_inputs(places)]
    seg, classifier = networks(args, paths[0])
    book_seg, book_cls = as_plain(seg), as_plain(classifier.model)
    segmenter = seg.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    detector = Detector(segmenter, classifier, None, GroupingOptions(threshold=0.5))
    same = args.same_candidates or not args.seg
    times: dict[str, list[dict[str, Any]]] = {"book": [], "ours": []}
    for _ in range(args.rounds):
        for path in paths:
            mine = ours(path, detector)
            times["ours"].append(mine)
            centers = mine["centers"] if same else None
            times["book"].append(book(path, book_seg, book_cls, classifier.crops.shape, centers))
    print_table(times, args.threads, len(paths))


def as_plain(model: nn.Module) -> nn.Module:
    """A copy of a network whose weights lie as torch lays them out by default."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return twin.eval()


def print_table(times: dict[str, list[dict[str, Any]]], threads: int, num_scans: int) -> None:
    """Median seconds a scan of each stage."""
    stages = ["read", "lungs", "segment", "group", "classify"]
    print(f"{num_scans} scans, {threads} threads, {len(times['ours']) // num_scans} rounds; median seconds a scan\n")
    print("| stage | book | ours | ratio |\n|---|--:|--:|--:|")
    for stage in [*stages, "all"]:
        pair = []
        for name in ("book", "ours"):
            rows = [sum(row.get(s, 0.0) for s in (stages if stage == "all" else [stage])) for row in times[name]]
            pair.append(statistics.median(rows))
        ratio = f"{pair[0] / pair[1]:.1f}" if pair[0] and pair[1] else ""
        print(f"| {stage} | {pair[0]:.2f} | {pair[1]:.2f} | {ratio} |")
    number = {name: statistics.median(row["candidates"] for row in rows) for name, rows in times.items()}
    print(f"\ncandidates classified: book {number['book']:.0f}, ours {number['ours']:.0f}")
    print(f"peak memory of both together: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
