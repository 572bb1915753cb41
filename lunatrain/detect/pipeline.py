"""The detector: each scan through all its stages, one scan in memory at a time; then tables, page and score."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lunaprep.errors import ScanError
from lunatrain import __version__
from lunatrain.dense import channels_of
from lunatrain.detect.bounding import Bounds
from lunatrain.detect.classifying import Classifier, classify, joint_probability
from lunatrain.detect.findings import (
    DIAMETER_NOTE,
    FINDINGS_CSV,
    ScanResult,
    candidate_table,
    empty_table,
    patient_score,
    write_findings,
)
from lunatrain.detect.findings_page import PICTURED_FINDINGS, PICTURED_SCANS, ScanPictures, findings_page
from lunatrain.detect.grouping import Candidates, group
from lunatrain.detect.harvest import Harvest, write_harvest
from lunatrain.detect.loading import DetectOptions, Detector, load_detector
from lunatrain.detect.pictures import View, finding_pictures, montage
from lunatrain.detect.reading import Input, Volume, find_inputs, open_input, read_volume
from lunatrain.detect.segmenting import LUNG_MARGIN_MM, Lungs, find_lungs, segment
from lunatrain.detect.truth import FATES, Truth, hold_against, nodule_fates
from lunatrain.errors import UsageError
from lunatrain.marks import read_annotations

REPORT_FILE = "report.html"
PRINTED_FINDINGS = 10


@dataclass(frozen=True, eq=False)
class Detection:
    """Results of all scans, the score where there is a ground truth, and the folder it all lies in."""

    results: tuple[ScanResult, ...]
    truth: Truth | None
    record: Mapping[str, Any]
    out: Path
    harvest: Harvest | None
    num_left: int = 0
    """Scans that an interrupt left unsearched."""

    def text(self) -> str:
        """Summary for a terminal: a line each finding, the score where there is one, and where to look."""
        lines = []
        for result in self.results:
            if result.reason is not None:
                lines.append(f"{result.series_uid}: failed")
                continue
            seconds = sum(result.stages_s.values())
            lines.append(
                f"{result.series_uid}: {len(result.findings)} findings of {len(result.table)} candidates, "
                f"patient score {result.patient_score:.3f}, {seconds:.1f} s"
            )
            lines += [f"  note: {note}" for note in result.notes]
            shown, more = result.findings.head(PRINTED_FINDINGS), len(result.findings) - PRINTED_FINDINGS
            lines += [_finding_line(record) for record in shown.to_dict("records")]
            lines += [f"  and {more:,} more in {FINDINGS_CSV}"] if more > 0 else []
        if self.truth is not None:
            lines += ["", *_truth_lines(self.truth)]
        if self.harvest is not None:
            kept = self.harvest
            lines.append(
                f"harvest: {kept.added:,} false positives added to {kept.kept:,} rows; left out: {kept.known:,} known "
                f"already, {kept.beside_nodule:,} beside a nodule"
            )
        return "\n".join([*lines, "", str(self.out / REPORT_FILE)])

    @property
    def failed(self) -> list[str]:
        """Why scans failed, a line each."""
        return [result.reason for result in self.results if result.reason is not None]


@dataclass(frozen=True, eq=False)
class _Searched:
    """One scan: its result, its pictures, and the fates of its nodules where they are known."""

    result: ScanResult
    pictures: ScanPictures | None
    fates: pd.DataFrame | None


def run_detection(options: DetectOptions, show_progress: bool = False) -> Detection:
    """Search scans for nodules; write findings.csv, findings.json and report.html.

    Raises
    ------
    UsageError
        No such scan or run, or options that do not go together.
    CheckpointError
        A network that cannot be used.
    """
    if options.harvest is not None and options.annotations is None:
        message = "--harvest needs --annotations: without them nobody knows which findings are false. Give both"
        raise UsageError(message)
    if options.candidates is not None and options.harvest is None:
        message = "--candidates is the file that --harvest adds to. Give --harvest FILE, or leave it out"
        raise UsageError(message)
    if options.excluded is not None and options.annotations is None:
        message = "--excluded needs --annotations: alone it scores nothing. Give both, or leave it out"
        raise UsageError(message)
    inputs = find_inputs(options.scans)
    tables = [read_annotations(path) if path else None for path in (options.annotations, options.excluded)]
    detector = load_detector(options)
    done: list[_Searched] = []
    try:
        search(inputs, detector, tables[0], pictures=options.pictures, show_progress=show_progress, done=done)
    except KeyboardInterrupt:
        if not done:
            raise
    return report(done, detector, options, tables[0], tables[1], num_left=len(inputs) - len(done))


def search(
    inputs: Sequence[Input],
    detector: Detector,
    annotations: pd.DataFrame | None = None,
    *,
    pictures: bool = True,
    show_progress: bool = False,
    done: list[_Searched] | None = None,
) -> list[_Searched]:
    """Search scans one after the other; one that cannot be searched is a result with its reason.

    Results are added to `done` one by one: after an interrupt it has those of the scans before.
    """
    done = [] if done is None else done
    seen: dict[str, Path] = {}
    with tqdm(total=0, unit="slice", disable=None if show_progress else True) as bar:
        for number, item in enumerate(inputs):
            bar.set_description_str(f"scan {number + 1}/{len(inputs)}")
            try:
                searched = _search_one(item, detector, annotations, seen, pictures and number < PICTURED_SCANS, bar)
            except ScanError as error:
                searched = _failed(item, str(error))
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                text = "the memory was not enough for it; search it where more is free, or cut it to the chest"
                searched = _failed(item, f"{item.path.name}: {text}")
            done.append(searched)
    return done


def report(
    searched: Sequence[_Searched],
    detector: Detector,
    options: DetectOptions,
    annotations: pd.DataFrame | None = None,
    excluded: pd.DataFrame | None = None,
    num_left: int = 0,
) -> Detection:
    """Score where there is a truth, and write all files; `num_left` scans were not searched."""
    out = options.out or Path(f"detect-{time.strftime('%Y-%m-%d_%H.%M.%S')}")
    results = tuple(item.result for item in searched)
    notes = [DIAMETER_NOTE]
    if num_left:
        notes.insert(0, f"interrupted: {num_left:,} of {num_left + len(results):,} scans were not searched")
    truth = None
    if annotations is not None and any(result.reason is None for result in results):
        fates = [item.fates for item in searched if item.fates is not None]
        truth = hold_against(results, fates, annotations, excluded)
        if excluded is None:
            notes.append("no excluded findings were given: candidates on them count as false positives")
    if options.pictures and len(results) > PICTURED_SCANS:
        notes.append(f"the page has pictures of the first {PICTURED_SCANS} scans; search the others by themselves")
    settings = {
        "threshold": detector.threshold,
        "grouping": asdict(detector.grouping),
        "lung_margin_mm": LUNG_MARGIN_MM,
    }
    record = {
        "made_by": f"lunatrain {__version__}",
        "networks": dict(detector.facts),
        "settings": settings,
        "num_scans": len(results),
        "num_failed": sum(result.reason is not None for result in results),
        "num_findings": sum(len(result.findings) for result in results),
        "num_candidates": sum(len(result.table) for result in results),
        "notes": notes,
        **({"truth": truth.to_json()} if truth else {}),
        "scans": [result.to_json() for result in results],
    }
    write_findings(results, record, out)
    shown = {item.result.series_uid: item.pictures for item in searched if item.pictures is not None}
    facts = {**detector.facts, **_settings_text(detector), "made by": f"lunatrain {__version__}"}
    (out / REPORT_FILE).write_text(findings_page(results, shown, facts, truth, notes), encoding="utf-8")
    harvest = None
    if options.harvest is not None and truth is not None:
        harvest = write_harvest(truth, options.harvest, options.candidates)
    return Detection(results, truth, record, out, harvest, num_left)


def _search_one(
    item: Input,
    detector: Detector,
    annotations: pd.DataFrame | None,
    seen: dict[str, Path],
    pictures: bool,
    bar: Any,
) -> _Searched:
    """All stages of one scan."""
    stages: dict[str, float] = {}
    with _timed(stages, "read"):
        scan = open_input(item)
        twin = seen.setdefault(scan.series_uid, item.path)
        if twin != item.path:
            text = (
                f"{item.path}: series {scan.series_uid} has been searched as {twin}, expected each once; leave one out"
            )
            raise ScanError(text)
        volume = read_volume(scan, channels_of(detector.segmenter))
    hu, geometry = volume.hu, scan.geometry
    with _timed(stages, "lungs"):
        lungs = find_lungs(scan, hu, detector.lungs)
    bounds: Bounds | None = None
    if detector.bounding is not None:
        with _timed(stages, "bound"):
            lungs, bounds = detector.bounding.bound(hu, geometry, lungs)
    bar.total += len(lungs.near)
    with _timed(stages, "segment"):
        probability = segment(detector.segmenter, hu, lungs, bar.update)
    with _timed(stages, "group"):
        box = hu[lungs.box] if detector.grouping.weight in ("intensity", "both") else None
        candidates = group(probability, geometry.spacing_irc, detector.grouping, lungs.near, box, lungs.start_irc)
    with _timed(stages, "classify"):
        classified = classify(detector.classifier, hu, candidates.center_irc, geometry.spacing_irc)
    nodule = joint_probability(classified, candidates.score)
    table = candidate_table(scan.series_uid, candidates, geometry, nodule, detector.threshold, classified)
    if detector.malignancy is not None:
        with _timed(stages, "malignancy"):
            table = _with_malignancy(table, detector.malignancy, hu, candidates, geometry.spacing_irc)
    fates = None
    if annotations is not None:
        of_scan = annotations[annotations["series_uid"] == scan.series_uid]
        fates = nodule_fates(of_scan, geometry, lungs, probability >= detector.grouping.threshold, table)
    drawn = None
    if pictures:
        with _timed(stages, "draw"):
            drawn = _draw(volume, lungs, candidates, table)
    result = ScanResult(
        series_uid=scan.series_uid,
        file=item.path.name,
        table=table if len(table) else empty_table(),
        shape_irc=geometry.shape_irc,
        spacing=geometry.spacing,
        lung_ml=lungs.volume_ml,
        counts=candidates.counts,
        stages_s=stages,
        notes=(*volume.notes, *lungs.notes, *([bounds.note] if bounds else []), *_notes(volume, detector, candidates)),
        searched_box=bounds.to_json() if bounds else None,
        patient_score=patient_score(table, detector.malignancy is not None),
    )
    return _Searched(result, drawn, fates)


def _with_malignancy(
    table: pd.DataFrame,
    malignancy: Classifier,
    hu: Any,
    candidates: Candidates,
    spacing_irc: tuple[float, float, float],
) -> pd.DataFrame:
    """Judge the findings; what is no nodule is neither malignant nor benign, and stays NaN."""
    rows = table.index[table["is_finding"]].to_numpy()
    values = np.full(len(table), np.nan)
    values[table["is_finding"].to_numpy(dtype=bool)] = classify(
        malignancy, hu, candidates.center_irc[rows], spacing_irc
    )
    return table.assign(malignancy=values)


def _draw(volume: Volume, lungs: Lungs, candidates: Candidates, table: pd.DataFrame) -> ScanPictures:
    view = View.of(volume.hu, volume.scan.geometry)
    findings = table[table["is_finding"].astype(bool)]
    records = findings.to_dict("records")
    planes = {
        int(record["number"]): tuple(
            finding_pictures(view, candidates.labels, candidates.start_irc, int(place) + 1, record)  # type: ignore[arg-type]
        )
        for place, record in list(zip(findings.index, records, strict=True))[:PICTURED_FINDINGS]
    }
    return ScanPictures(tuple(montage(view, lungs, records)), planes)  # type: ignore[arg-type]


def _notes(volume: Volume, detector: Detector, candidates: Candidates) -> Iterator[str]:
    """What a reader of this scan's findings must know."""
    crops, depth, fill = detector.classifier.crops, volume.hu.shape[0], detector.classifier.crops.hu[0]
    step = crops.spacing[0] / volume.scan.geometry.spacing_irc[0] if crops.spacing else 1.0
    needed = math.ceil(crops.shape[0] * step - 1e-6)
    if depth < needed:
        yield f"the scan has {depth} slices, the classifier looks at {needed}: the rest was filled with {fill} HU"
    if candidates.counts.beyond_limit:
        yield (
            f"{candidates.counts.beyond_limit:,} candidates beyond the limit of {detector.grouping.limit} were left "
            "out, those of the lowest rank; --max-candidates raises it"
        )
    if candidates.counts.too_large:
        largest = detector.grouping.max_diameter_mm
        yield f"{candidates.counts.too_large:,} segmented regions wider than {largest:g} mm were left out; look at them"
    if not candidates.counts.voxels:
        yield "the segmentation marked nothing in the lungs"


def _finding_line(record: Mapping[Any, Any]) -> str:
    malignancy = "" if np.isnan(record["malignancy"]) else f", malignancy {record['malignancy']:.3f}"
    return (
        f"  {record['number']:>3}  probability {record['probability']:.3f}{malignancy}, about "
        f"{record['diameter_mm']:.1f} mm, at {record['x_mm']:.1f} {record['y_mm']:.1f} {record['z_mm']:.1f} mm "
        f"(slice {record['index']}, row {record['row']}, column {record['col']})"
    )


def _truth_lines(truth: Truth) -> Iterator[str]:
    counts = truth.nodules["fate"].value_counts()
    yield f"{len(truth.nodules):,} annotated nodules"
    yield from (f"  {counts[name]:>4}  {words}" for name, words in FATES.items() if counts.get(name, 0))
    yield truth.froc.text()
    yield from (f"warning: {line}" for line in truth.warnings)


def _settings_text(detector: Detector) -> dict[str, str]:
    grouping = detector.grouping
    return {
        "grouping": f"{grouping.min_diameter_mm:g} to {grouping.max_diameter_mm:g} mm, centres nearer than "
        f"{grouping.merge_mm:g} mm merged, at most {grouping.limit} candidates a scan",
        "lungs": f"candidates lie in the lungs or up to {LUNG_MARGIN_MM:g} mm beside them",
    }


def _name_of(item: Input) -> str:
    """A failed scan's series id, as its file's name has it."""
    name = item.name
    for suffix in (".mhd", ".mha", ".nii.gz"):
        name = name.removesuffix(suffix)
    return name


def _failed(item: Input, reason: str) -> _Searched:
    return _Searched(ScanResult(_name_of(item), item.path.name, reason), None, None)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory gave out: numpy has an exception for it; torch has one on a GPU, on a CPU only a text."""
    is_torchs = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torchs


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - start
