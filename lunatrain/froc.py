"""FROC and CPM by the rules of the LUNA16 challenge.

The rules, as the challenge describes and computes them (luna16.grand-challenge.org/Evaluation):

- Of a scan with more than 100 marks those count whose probability is above the 101st highest; what ties with it
  is left out.
- A mark hits a finding if its distance is less than the finding's radius; a finding of unknown (negative) diameter
  is taken as 10 mm wide.
- A nodule is found with the highest probability among the marks that hit it; its other marks count for nothing.
  A mark may find two nodules. A mark that hits only an excluded finding counts for nothing either. All others are
  false positives.
- FROC is the ROC curve of nodules found and false positives, in units of the scans and of all nodules; a missed
  nodule is only in the denominator. The curve starts at (0, 0), is linear between its points and level after the
  last. CPM is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives a scan.
- The interval comes from drawing as many scans as there are, with replacement, again and again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunatrain.marks import (
    MARK_COLUMNS,
    MAX_MARKS,
    check_columns,
    check_places,
    check_repeats,
    check_series,
    pairs_within_radius,
    radius_of,
    within_limit,
    xyz_of,
)
from lunatrain.metrics import rank_scores, roc_curve, without_nan

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a scan at which CPM takes the sensitivity."""

PERCENTILES = (2.5, 97.5)
STEPS_PER_OCTAVE = 32
"""Of the false positive rates for which the interval is computed; `RATES` are among them."""

HIT, DOUBLE, ON_EXCLUDED, FALSE_POSITIVE = "hit", "double", "on_excluded", "false_positive"
BEYOND_LIMIT, NOT_LISTED = "beyond_limit", "scan_not_listed"


@dataclass(frozen=True)
class FrocCounts:
    """What became of the marks and the nodules.

    `marks_beyond_limit` are marks left out of scans with more than 100; `marks_double` hit a nodule that another
    mark found with a higher probability; `marks_on_two_nodules` hit more than one.
    """

    num_scans: int
    num_nodules: int
    num_excluded: int
    nodules_found: int
    nodules_missed: int
    marks_read: int
    marks_not_listed: int
    marks_beyond_limit: int
    marks_hit: int
    marks_double: int
    marks_on_excluded: int
    marks_on_two_nodules: int
    false_positives: int


@dataclass(frozen=True, eq=False)
class FrocInterval:
    """Mean and 95 % interval of the sensitivity over draws of scans; a draw without a nodule is left out.

    `fp_per_scan`, `mean`, `low` and `high`, (p,), go from 1/8 to 8 with `STEPS_PER_OCTAVE` to a doubling;
    `at_rates_low` and `at_rates_high`, (7,), are at `RATES`; `num_bootstrap` is the number of draws.
    """

    fp_per_scan: Floats
    mean: Floats
    low: Floats
    high: Floats
    at_rates_low: Floats
    at_rates_high: Floats
    cpm_mean: float
    cpm_low: float
    cpm_high: float
    num_bootstrap: int


@dataclass(frozen=True, eq=False)
class FrocResult:
    """A submission as the challenge scores it.

    Attributes
    ----------
    fp_per_scan, sensitivity, thresholds : ndarray, (p,)
        The curve, from (0, 0) at threshold infinity.
    at_rates : ndarray, (7,)
        Sensitivity at `RATES`; NaN without a nodule.
    cpm : float
        Their mean.
    counts : FrocCounts
    ci : FrocInterval or None
        None without bootstrap.
    marks : DataFrame
        The marks in their order, with `verdict` ('hit', 'double', 'on_excluded', 'false_positive', 'beyond_limit',
        'scan_not_listed') and `annotation`: row of the nodule hit, the first of several; -1 for none.
    nodules : DataFrame
        The annotations of the listed scans, with `found` and `probability` (NaN where missed).
    warnings : tuple of str
        What looks wrong about the input, a line each.
    """

    fp_per_scan: Floats
    sensitivity: Floats
    thresholds: Floats
    at_rates: Floats
    cpm: float
    counts: FrocCounts
    ci: FrocInterval | None
    marks: pd.DataFrame
    nodules: pd.DataFrame
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Flat object of figures; what is undefined is None."""
        ci = self.ci
        figures = {
            "cpm": self.cpm,
            "cpm_low": ci.cpm_low if ci else np.nan,
            "cpm_high": ci.cpm_high if ci else np.nan,
            "fp_per_scan": list(RATES),
            "sensitivity_at": self.at_rates.tolist(),
            "sensitivity_at_low": ci.at_rates_low.tolist() if ci else None,
            "sensitivity_at_high": ci.at_rates_high.tolist() if ci else None,
            "sensitivity_all_marks": float(self.sensitivity[-1]),
            "num_bootstrap": ci.num_bootstrap if ci else 0,
            **asdict(self.counts),
            "warnings": list(self.warnings),
        }
        return without_nan(figures)

    def text(self) -> str:
        """Table of the sensitivities, and what became of the marks."""
        n, ci = self.counts, self.ci
        rows = [(f"{rate:g}", self.at_rates[k]) for k, rate in enumerate(RATES)] + [("CPM", self.cpm)]
        spans = [*zip(ci.at_rates_low, ci.at_rates_high, strict=True), (ci.cpm_low, ci.cpm_high)] if ci else []
        lines = [f"{n.num_scans:,} scans, {n.num_nodules:,} nodules, {n.num_excluded:,} excluded findings", ""]
        lines.append("FP per scan  sensitivity" + ("  95 % interval" if ci else ""))
        for k, (name, value) in enumerate(rows):
            span = f"  {spans[k][0]:.4f} to {spans[k][1]:.4f}" if ci else ""
            lines.append(f"{name:>11}  {value:>11.4f}{span}")
        return "\n".join(
            [
                *lines,
                "",
                f"marks    {n.marks_read:,} read, {n.marks_beyond_limit:,} beyond {MAX_MARKS} a scan, "
                f"{n.marks_not_listed:,} in scans not listed",
                f"         {n.marks_hit:,} hit, {n.marks_double:,} hit what was found already, "
                f"{n.marks_on_excluded:,} on excluded findings, {n.false_positives:,} false positives",
                f"nodules  {n.nodules_found:,} found, {n.nodules_missed:,} missed; "
                f"{n.marks_on_two_nodules:,} marks hit more than one",
            ]
        )


def evaluate_froc(
    marks: pd.DataFrame,
    annotations: pd.DataFrame,
    excluded: pd.DataFrame | None,
    series_uids: Sequence[str],
    num_bootstrap: int = 0,
    seed: int = 0,
) -> FrocResult:
    """Score marks as the challenge does.

    Parameters
    ----------
    marks : DataFrame
        `series_uid`, `x_mm`, `y_mm`, `z_mm` (LPS) and `probability`, which may be any finite number.
    annotations : DataFrame
        The nodules: `series_uid`, `x_mm`, `y_mm`, `z_mm` and `diameter_mm`.
    excluded : DataFrame or None
        Findings that count neither way, the same columns; None counts marks on them as false positives.
    series_uids : sequence of str
        All scans that were searched, those without marks or nodules too.
    num_bootstrap : int
        Draws for the interval; 0 for none.
    seed : int
        The same seed gives the same interval.

    Raises
    ------
    UsageError
        Ids that match nothing, are no text or are listed twice; places, diameters or probabilities that are not
        finite numbers.
    """
    check_columns("marks", marks, "probability")
    check_columns("annotations", annotations, "diameter_mm")
    if excluded is not None:
        check_columns("excluded", excluded, "diameter_mm")
    warnings = [*check_series(marks, annotations, series_uids), *check_repeats(marks)]
    scans = pd.Index(series_uids)
    marks, scan_of_mark = (
        marks.reset_index(drop=True),
        scans.get_indexer(pd.Index(marks["series_uid"])).astype(np.int64),
    )
    nodules = annotations.reset_index(drop=True).rename_axis("annotation").reset_index()
    nodules = nodules[nodules["series_uid"].isin(series_uids)].reset_index(drop=True)
    listed = _Listed(len(scans), scan_of_mark, scans.get_indexer(pd.Index(nodules["series_uid"])).astype(np.int64))
    judged = _judge(marks, nodules, excluded, listed, scans)
    if not len(marks):
        warnings.append("there are no marks: the sensitivity is 0")
    if not len(nodules):
        warnings.append("the listed scans have no nodules: there is no sensitivity")
    warnings += check_places(marks, nodules, listed.of_mark, listed.of_nodule, int(judged.found.sum()))
    entries = _entries(marks, listed, judged)
    fp_per_scan, sensitivity, thresholds = _curve(entries)
    at_rates = np.interp(RATES, fp_per_scan, sensitivity)
    return FrocResult(
        fp_per_scan,
        sensitivity,
        thresholds,
        at_rates,
        float(at_rates.mean()),
        _counts(marks, nodules, excluded, judged, scans),
        _interval(entries, num_bootstrap, seed) if num_bootstrap else None,
        marks.assign(verdict=judged.verdicts, annotation=_rows_hit(judged, nodules, len(marks))),
        nodules.assign(found=judged.found, probability=judged.probability),
        tuple(warnings),
    )


def write_result(result: FrocResult, out: Path) -> None:
    """Write froc.csv, froc_interval.csv (with bootstrap), missed.csv and marks.csv into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    theirs = {ours: name for name, ours in MARK_COLUMNS.items()}
    curve = {"fp_per_scan": result.fp_per_scan, "sensitivity": result.sensitivity, "threshold": result.thresholds}
    pd.DataFrame(curve).to_csv(out / "froc.csv", index=False)
    if result.ci is not None:
        band = {name: getattr(result.ci, name) for name in ("fp_per_scan", "mean", "low", "high")}
        pd.DataFrame(band).to_csv(out / "froc_interval.csv", index=False)
    missed = result.nodules[~result.nodules["found"]].rename(columns=theirs)
    missed[[*MARK_COLUMNS, "diameter_mm", "annotation"]].to_csv(out / "missed.csv", index=False)
    result.marks.rename(columns=theirs).to_csv(out / "marks.csv", index=False)


@dataclass(frozen=True, eq=False)
class _Listed:
    """Number of the scan of each mark and nodule, in listed order; -1 for none of them."""

    num_scans: int
    of_mark: Ints
    of_nodule: Ints


@dataclass(frozen=True, eq=False)
class _Judged:
    """What each mark and nodule turned out to be; pairs of mark and nodule within the radius."""

    verdicts: npt.NDArray[np.object_]
    pair_mark: Ints
    pair_nodule: Ints
    found: Bools
    probability: Floats


@dataclass(frozen=True, eq=False)
class _Entries:
    """Nodules found and false positives: what the curve is made of."""

    scan: Ints
    score: Floats
    is_nodule: Bools
    nodules_per_scan: Ints


def _judge(
    marks: pd.DataFrame, nodules: pd.DataFrame, excluded: pd.DataFrame | None, listed: _Listed, scans: pd.Index
) -> _Judged:
    """Hold every mark that counts against every finding of its scan."""
    scores = marks["probability"].to_numpy(dtype=np.float64)
    counts = within_limit(listed.of_mark, scores)
    verdicts = np.full(len(marks), FALSE_POSITIVE, dtype=object)
    considered = np.flatnonzero(counts)
    xyz, of_mark = xyz_of(marks)[considered], listed.of_mark[considered]
    if excluded is not None:
        of_finding = scans.get_indexer(pd.Index(excluded["series_uid"])).astype(np.int64)
        on_excluded, _ = pairs_within_radius(xyz, of_mark, xyz_of(excluded), of_finding, radius_of(excluded))
        verdicts[considered[on_excluded]] = ON_EXCLUDED
    pair_mark, pair_nodule = pairs_within_radius(xyz, of_mark, xyz_of(nodules), listed.of_nodule, radius_of(nodules))
    pair_mark = considered[pair_mark]
    # of each nodule the pair with the highest probability, the first of equals
    order = np.lexsort([pair_mark, -scores[pair_mark], pair_nodule])
    found, first = np.unique(pair_nodule[order], return_index=True)
    verdicts[pair_mark] = DOUBLE
    verdicts[pair_mark[order][first]] = HIT
    verdicts[~counts] = BEYOND_LIMIT
    verdicts[listed.of_mark < 0] = NOT_LISTED
    probability = np.full(len(nodules), np.nan)
    probability[found] = scores[pair_mark[order][first]]
    return _Judged(verdicts, pair_mark, pair_nodule, ~np.isnan(probability), probability)


def _rows_hit(judged: _Judged, nodules: pd.DataFrame, num_marks: int) -> Ints:
    rows = np.full(num_marks, len(nodules), dtype=np.int64)
    np.minimum.at(rows, judged.pair_mark, judged.pair_nodule)
    return np.append(nodules["annotation"].to_numpy(dtype=np.int64), -1)[rows]


def _counts(
    marks: pd.DataFrame, nodules: pd.DataFrame, excluded: pd.DataFrame | None, judged: _Judged, scans: pd.Index
) -> FrocCounts:
    number = {name: int((judged.verdicts == name).sum()) for name in np.unique(judged.verdicts)}
    found = int(judged.found.sum())
    return FrocCounts(
        num_scans=len(scans),
        num_nodules=len(nodules),
        num_excluded=int(excluded["series_uid"].isin(scans).sum()) if excluded is not None else 0,
        nodules_found=found,
        nodules_missed=len(nodules) - found,
        marks_read=len(marks),
        marks_not_listed=number.get(NOT_LISTED, 0),
        marks_beyond_limit=number.get(BEYOND_LIMIT, 0),
        marks_hit=number.get(HIT, 0),
        marks_double=number.get(DOUBLE, 0),
        marks_on_excluded=number.get(ON_EXCLUDED, 0),
        marks_on_two_nodules=int((np.bincount(judged.pair_mark, minlength=1) > 1).sum()),
        false_positives=number.get(FALSE_POSITIVE, 0),
    )


def _entries(marks: pd.DataFrame, listed: _Listed, judged: _Judged) -> _Entries:
    wrong = np.flatnonzero(judged.verdicts == FALSE_POSITIVE)
    found = np.flatnonzero(judged.found)
    scores = marks["probability"].to_numpy(dtype=np.float64)
    return _Entries(
        np.concatenate([listed.of_nodule[found], listed.of_mark[wrong]]),
        np.concatenate([judged.probability[found], scores[wrong]]),
        np.arange(found.size + wrong.size) < found.size,
        np.bincount(listed.of_nodule, minlength=listed.num_scans),
    )


def _curve(entries: _Entries) -> tuple[Floats, Floats, Floats]:
    """Corners of the FROC curve: false positives a scan, sensitivity, threshold."""
    ranking = rank_scores(entries.is_nodule, entries.score)
    roc = roc_curve(ranking)
    num_scans, num_nodules = entries.nodules_per_scan.size, int(entries.nodules_per_scan.sum())
    fp_per_scan = _scaled(roc.false_positive_rate, ranking.num_negative, num_scans)
    return fp_per_scan, _scaled(roc.true_positive_rate, ranking.num_positive, num_nodules), roc.thresholds


def _scaled(rate: Floats, number: float, whole: int) -> Floats:
    """A rate of the ROC curve in units of scans or nodules, rounded in the challenge's order: the curve has steps."""
    if not whole:
        return np.full_like(rate, np.nan)
    return rate * number / whole if number else np.zeros_like(rate)


def _interval(entries: _Entries, num_bootstrap: int, seed: int) -> FrocInterval:
    octaves = round(np.log2(RATES[-1] / RATES[0]))
    grid = RATES[0] * 2.0 ** (np.arange(octaves * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)
    curves = np.array(list(_drawn_curves(entries, num_bootstrap, seed, grid)) or [np.full(grid.size, np.nan)])
    at_rates = curves[:, np.searchsorted(grid, RATES)]
    low, high = np.percentile(curves, PERCENTILES, axis=0)
    rates_low, rates_high = np.percentile(at_rates, PERCENTILES, axis=0)
    cpm = at_rates.mean(axis=1)
    cpm_low, cpm_high = np.percentile(cpm, PERCENTILES).tolist()
    of_cpm = float(cpm.mean()), cpm_low, cpm_high
    return FrocInterval(grid, curves.mean(axis=0), low, high, rates_low, rates_high, *of_cpm, num_bootstrap)


def _drawn_curves(entries: _Entries, num_bootstrap: int, seed: int, grid: Floats) -> Iterator[Floats]:
    """Sensitivity on a grid for each draw of scans; sorted once, a draw only weighs the scans."""
    random = np.random.default_rng(seed)
    order = np.argsort(-entries.score, kind="stable")
    scan, is_nodule, score = entries.scan[order], entries.is_nodule[order], entries.score[order]
    ends = np.append(np.flatnonzero(score[1:] != score[:-1]), max(score.size - 1, 0)) if score.size else np.arange(0)
    num_scans = entries.nodules_per_scan.size
    for _ in range(num_bootstrap):
        weight = np.bincount(random.integers(num_scans, size=num_scans), minlength=num_scans)
        num_nodules = int(weight @ entries.nodules_per_scan)
        if not num_nodules:
            continue
        weights = weight[scan]
        tp = np.append(0, np.cumsum(weights * is_nodule)[ends])
        fp = np.append(0, np.cumsum(weights)[ends]) - tp
        fp_per_scan = _scaled(fp / max(fp[-1], 1), fp[-1], num_scans)
        yield np.interp(grid, fp_per_scan, _scaled(tp / max(tp[-1], 1), tp[-1], num_nodules))
