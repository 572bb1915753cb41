"""What the detector is asked, and the networks it searches with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lunaprep.lungs import lung_mask
from lunatrain.detect.bounding import MARGIN_MM, Bounding, load_bounding
from lunatrain.detect.classifying import Classifier, load_classifier
from lunatrain.detect.grouping import GroupingOptions
from lunatrain.detect.segmenting import FindLungs, check_window
from lunatrain.errors import UsageError
from lunatrain.training import best_of, newest_run, pick_device

MALIGNANT = "is_malignant"


@dataclass(frozen=True)
class DetectOptions:
    """What the command is asked; None takes the newest run, or does without."""

    scans: tuple[Path, ...]
    seg: Path | None = None
    cls: Path | None = None
    mal: Path | None = None
    loc: tuple[Path, ...] = ()
    loc_margin: float = MARGIN_MM
    out: Path | None = None
    threshold: float = 0.5
    seg_threshold: float | None = None
    max_candidates: int = GroupingOptions.limit
    annotations: Path | None = None
    excluded: Path | None = None
    harvest: Path | None = None
    candidates: Path | None = None
    pictures: bool = True
    device: str = "auto"


@dataclass(frozen=True, eq=False)
class Detector:
    """The networks and settings that each scan is searched with.

    Attributes
    ----------
    segmenter : Module
        See `lunatrain.detect.segmenting.segment`; on its device, in evaluation mode.
    classifier : Classifier
        Nodule or not.
    malignancy : Classifier or None
    grouping : GroupingOptions
        Its threshold is the segmentation's.
    threshold : float
        Nodule probability from which on a candidate is a finding.
    lungs : callable
        Finds the lungs: `lunaprep.lungs.lung_mask`.
    bounding : Bounding or None
        Bounds the search by a box around the lungs.
    facts : dict of str to str
        Where the networks come from, for the report.
    """

    segmenter: nn.Module
    classifier: Classifier
    malignancy: Classifier | None = None
    grouping: GroupingOptions = field(default_factory=GroupingOptions)
    threshold: float = 0.5
    lungs: FindLungs = lung_mask
    bounding: Bounding | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def load_detector(options: DetectOptions) -> Detector:
    """Load the networks that the options name, or the newest."""
    from lunatrain.segmentation import load_segmenter

    device = pick_device(options.device)
    seg = best_of(options.seg or _newest("seg"))
    segmenter, facts = load_segmenter(seg)
    check_window(segmenter, str(seg))
    classifier = load_classifier(options.cls or _newest("cls"), device)
    malignancy = load_classifier(options.mal, device) if options.mal else None
    if malignancy is not None and malignancy.target != MALIGNANT:
        message = (
            f"{malignancy.path} has learnt {malignancy.target}, expected {MALIGNANT}. Give a run of 'lunatrain mal'"
        )
        raise UsageError(message)
    if classifier.target == MALIGNANT:
        message = f"--cls {classifier.path} has learnt {MALIGNANT}, expected is_nodule. Give it as --mal"
        raise UsageError(message)
    threshold = options.seg_threshold or float(facts.get("threshold", 0.5))
    about = {
        "segmentation": f"{seg}, threshold {threshold:g}",
        "classification": f"{classifier.path}, threshold {options.threshold:g}",
        "malignancy": str(malignancy.path) if malignancy else "-",
    }
    bounding = load_bounding(options.loc, options.loc_margin, device)
    if bounding is not None:
        about["lung box"] = str(bounding)
    return Detector(
        segmenter.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        classifier,
        malignancy,
        GroupingOptions(threshold=threshold, limit=options.max_candidates),
        options.threshold,
        bounding=bounding,
        facts=about,
    )


def _newest(task: str) -> Path:
    try:
        return newest_run(task)
    except UsageError as error:
        message = f"there is no {task} run under ./runs. Train one with 'lunatrain {task}', or give --{task} RUN"
        raise UsageError(message) from error
