"""The findings as one HTML page for people: what was found where, with pictures, and what went wrong.

Pictures are made while a scan is in memory and kept as HTML; the page is put together at the end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from lunatrain.detect.findings import DIAMETER_NOTE, ScanResult
from lunatrain.detect.pictures import MARK, TEXT
from lunatrain.detect.truth import FATES, FOUND, TARGET_MM, Truth
from lunatrain.page import card, facts_panel, froc_body, html_table, notes_list, page, section, share_td, short_uid, td

PICTURED_SCANS = 30
"""Scans with pictures on a page, some 1 MB each; those beyond have their tables."""

PICTURED_FINDINGS = 25
"""Findings of a scan with pictures."""

CAUTION = "Software for research: places to look at, no diagnosis. What is not listed may still be there."

TRUTH_NOTE = (
    "Truth, from the annotations: 'nodule' hits one; 'nodule, again' hits one that a more probable candidate hit "
    "already; 'excluded finding' counts neither way; 'no nodule' is a false positive."
)

STYLE = f""".tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 4px; }}
.film svg {{ display: block; width: 100%; background: #000; }} .film text {{ fill: {TEXT}; font-weight: 600; }}
.film text, .film .tick {{ filter: drop-shadow(0 0 1px #000) drop-shadow(0 0 1px #000); }}
.film .mark {{ fill: {MARK}; }} .film .ring, .film .outline {{ fill: none; stroke: {MARK}; stroke-width: 1.6;
  vector-effect: non-scaling-stroke; }}
.film .tick {{ fill: none; stroke: {TEXT}; stroke-width: 1.6; vector-effect: non-scaling-stroke; }}
.finds {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 12px; }}
.finds .panel {{ margin: 0; padding: 10px; }} .planes {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: 3px;
  background: #161b22; }}
.finds p {{ margin: 0 0 6px; font-variant-numeric: tabular-nums; }} .tag {{ border: 1px solid var(--line);
  border-radius: 9px; padding: 0 8px; font-size: 12.5px; margin-left: 6px; white-space: nowrap; }}
.bad {{ border-left: 4px solid var(--warn); }} h3 {{ font-size: 15px; margin: 20px 0 6px; }}
a {{ color: var(--accent); }}
section.scan > p {{ overflow-wrap: anywhere; }} .notes + .panel {{ margin-top: 12px; }}
section.scan {{ border-top: 1px solid var(--line); margin-top: 40px; }}
.cards {{ grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }}
"""


@dataclass(frozen=True)
class ScanPictures:
    """SVG of one scan: tiles of the montage, and of each pictured finding, by number, its three planes."""

    tiles: tuple[str, ...] = ()
    findings: Mapping[int, tuple[str, ...]] | None = None


def findings_page(
    results: Sequence[ScanResult],
    pictures: Mapping[str, ScanPictures],
    facts: Mapping[str, str],
    truth: Truth | None,
    notes: Sequence[str],
) -> str:
    """The whole page; `pictures` by series id, `facts` on how it was made."""
    title = _title(results)
    has_malignancy = any(result.table["malignancy"].notna().any() for result in results)
    verdicts = _verdicts(truth)
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="muted">{escape(CAUTION)}</p></header>',
        _cards(results, truth),
        _failed(results),
        notes_list([*notes, *(truth.warnings if truth else ())]),
    ]
    if len(results) > 1:
        parts.append(_scans_section(results))
    if truth is not None:
        parts += [_nodules_section(truth, results), _froc_section(truth)]
    parts += [
        _scan_section(number, result, pictures.get(result.series_uid), has_malignancy, verdicts)
        for number, result in enumerate(results, start=1)
        if result.reason is None
    ]
    parts.append(section("How this was made", "Beside this file: findings.csv and findings.json.", facts_panel(facts)))
    return page(title, parts, STYLE)


def _title(results: Sequence[ScanResult]) -> str:
    number = sum(len(result.findings) for result in results)
    what = f"{number:,} finding{'s' * (number != 1)}"
    where = f"scan {short_uid(results[0].series_uid)}" if len(results) == 1 else f"{len(results):,} scans"
    return f"{what} in {where}"


def _cards(results: Sequence[ScanResult], truth: Truth | None) -> str:
    done = [result for result in results if result.reason is None]
    findings = sum(len(result.findings) for result in results)
    candidates = sum(len(result.table) for result in results)
    seconds = [sum(result.stages_s.values()) for result in done]
    scores = [result.patient_score for result in done]
    cards = [
        card("Findings", f"{findings:,}", f"of {candidates:,} candidates"),
        card("Scans searched", f"{len(done):,}", f"{len(results) - len(done):,} failed"),
        card("Highest patient score", f"{max(scores):.3f}" if scores else "–", "0 to 1, see below"),
        card("Seconds a scan", f"{sum(seconds) / len(seconds):.1f}" if seconds else "–", "all stages, mean"),
    ]
    if truth is not None:
        figures = truth.to_json()
        found, number = figures[f"fate_{FOUND}"], len(truth.nodules)
        cards.insert(1, card("Nodules found", f"{found:,} of {number:,}", "annotated nodules that a finding hits"))
        cpm = figures["cpm"]
        cards.insert(2, card("CPM", "–" if cpm is None else f"{cpm:.3f}", "LUNA16's score, over all candidates"))
    return f'<section class="cards" aria-label="Headline figures">{"".join(cards)}</section>'


def _failed(results: Sequence[ScanResult]) -> str:
    lines = [escape(result.reason) for result in results if result.reason is not None]
    if not lines:
        return ""
    head = f"{len(lines)} scan{'s' * (len(lines) != 1)} could not be searched, and may hold anything"
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section class="panel bad"><strong>{escape(head)}:</strong><ul>{items}</ul></section>'


def _scans_section(results: Sequence[ScanResult]) -> str:
    rows = []
    for number, result in enumerate(results, start=1):
        uid = escape(result.series_uid)
        link = (
            f'<td data-v="{uid}" title="{uid}"><a href="#scan{number}">{escape(short_uid(result.series_uid))}</a></td>'
        )
        if result.reason is not None:
            link = f'<td data-v="{uid}" title="{uid}">{escape(short_uid(result.series_uid))} (failed)</td>'
        rows.append(
            [
                td(number),
                link,
                td(len(result.findings)),
                td(len(result.table)),
                share_td(result.patient_score),
                td(result.lung_ml, _number(result.lung_ml, 0)),
                td(sum(result.stages_s.values()), f"{sum(result.stages_s.values()):.1f}"),
            ]
        )
    head = ["scan", "series", "findings", "candidates", "patient score", "lung, ml", "seconds"]
    text = "A click on a heading sorts. Patient score: the highest malignancy of a finding where malignancy was asked "
    text += "for, else the highest nodule probability."
    return section("Scans", text, f'<div class="panel">{html_table(head, rows)}</div>')


def _nodules_section(truth: Truth, results: Sequence[ScanResult]) -> str:
    number_of = {result.series_uid: k for k, result in enumerate(results, start=1)}
    rows = []
    for record in truth.nodules.to_dict("records"):
        fate = str(record["fate"])
        rows.append(
            [
                td(number_of.get(str(record["series_uid"]), 0)),
                *(td(float(record[name]), f"{record[name]:.1f}") for name in ("x_mm", "y_mm", "z_mm")),
                td(float(record["diameter_mm"]), f"{record['diameter_mm']:.1f}"),
                share_td(float(record["probability"])),
                td(list(FATES).index(fate), FATES[fate].split(":")[0]),
            ]
        )
    figures = truth.to_json()
    counts = truth.nodules["fate"].value_counts()
    lost = [f"{FATES[name]}: {counts[name]:,}" for name in FATES if counts.get(name, 0)]
    text = (
        f"{len(truth.nodules):,} annotated nodules. Candidates hit {_share(figures['sensitivity_candidates'])} of "
        f"them, {_share(figures['sensitivity_candidates_5mm'])} of those of {TARGET_MM:g} mm and more, with "
        f"{_number(figures['candidates_per_scan'], 1)} candidates a scan."
    )
    head = ["scan", "x, mm", "y, mm", "z, mm", "diameter, mm", "probability", "fate"]
    body = notes_list(lost) + f'<div class="panel">{html_table(head, rows)}</div>'
    return section("Annotated nodules: found, and where lost", text, body)


def _froc_section(truth: Truth) -> str:
    if not truth.froc.counts.num_nodules:
        return ""
    text = "Scored by the rules of the LUNA16 challenge, each candidate a mark."
    return section("Nodules found per false positive (FROC)", text, froc_body(truth.froc))


def _scan_section(
    number: int,
    result: ScanResult,
    pictures: ScanPictures | None,
    has_malignancy: bool,
    verdicts: Mapping[tuple[str, int], str],
) -> str:
    findings = result.findings.to_dict("records")
    others = result.table[~result.table["is_finding"].astype(bool)].to_dict("records")
    parts = [
        f'<section class="scan" id="scan{number}"><h2>Scan {number}: {escape(short_uid(result.series_uid))}</h2>',
        f'<p class="muted">{escape(_about(result))}</p>',
        notes_list(result.notes),
    ]
    if findings:
        rows = [_row(record, has_malignancy, verdicts) for record in findings]
        parts.append(f'<div class="panel">{html_table(_head(has_malignancy, verdicts), rows)}</div>')
    else:
        parts.append('<div class="panel"><strong>No findings</strong>: no candidate reaches the threshold.</div>')
    if verdicts and len(result.table):
        parts.append(f'<p class="note">{escape(TRUTH_NOTE)}</p>')
    if pictures is not None:
        parts.append(_montage(pictures, bool(findings)))
        parts.append(_finding_cards(number, findings, pictures, verdicts))
    if others:
        rows = [_row(record, has_malignancy, verdicts) for record in others]
        table = html_table(_head(has_malignancy, verdicts), rows)
        summary = f"{len(others):,} further candidates, below the threshold"
        parts.append(f'<details class="panel"><summary>{escape(summary)}</summary>{table}</details>')
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in result.stages_s.items())
    parts.append(f'<p class="note">{escape(stages)}</p></section>')
    return "\n".join(part for part in parts if part)


def _about(result: ScanResult) -> str:
    slices, rows, columns = result.shape_irc
    x, y, z = result.spacing
    counts = result.counts
    grouped = ""
    if counts is not None:
        number = counts.components + counts.split
        grouped = (
            f" Of {number:,} components {counts.too_small:,} were too small, {counts.too_large:,} too "
            f"large, {counts.merged:,} merged with others and {counts.beyond_limit:,} beyond the limit."
        )
    return (
        f"{result.series_uid} ({result.file}): {columns} × {rows} × {slices} voxels of {x:.3g} × {y:.3g} × {z:.3g} mm, "
        f"{_number(result.lung_ml, 0)} ml of lung. Patient score {result.patient_score:.3f}; "
        f"{len(result.findings):,} findings of {len(result.table):,} candidates.{grouped}"
    )


def _head(has_malignancy: bool, verdicts: Mapping[tuple[str, int], str]) -> list[str]:
    names = ["no.", "probability", *(["malignancy"] if has_malignancy else []), "diameter, mm (estimate)"]
    names += ["x, mm", "y, mm", "z, mm", "slice", "row", "column", "volume, mm³"]
    return [*names, *(["truth"] if verdicts else [])]


def _row(record: Mapping[Any, Any], has_malignancy: bool, verdicts: Mapping[tuple[str, int], str]) -> list[str]:
    cells = [td(int(record["number"])), share_td(float(record["probability"]))]
    if has_malignancy:
        cells.append(share_td(float(record["malignancy"])))
    cells += [td(float(record[name]), f"{record[name]:.1f}") for name in ("diameter_mm", "x_mm", "y_mm", "z_mm")]
    cells += [td(int(record[name]), str(int(record[name]))) for name in ("index", "row", "col")]
    cells.append(td(float(record["volume_mm3"]), f"{record['volume_mm3']:,.0f}"))
    if verdicts:
        cells.append(td(verdicts.get((str(record["series_uid"]), int(record["number"])), "")))
    return cells


def _montage(pictures: ScanPictures, has_findings: bool) -> str:
    tiles = "".join(pictures.tiles)
    text = "Axial slices of the lungs from head to feet, lung window (−600 / 1500 HU); below left the slice's number."
    text += " Circled: the findings; where many lie together some have no room for their number." * has_findings
    return f'<h3>Montage</h3><p class="note">{escape(text)}</p><div class="panel film tiles">{tiles}</div>'


def _finding_cards(
    scan: int, findings: Sequence[Mapping[Any, Any]], pictures: ScanPictures, verdicts: Mapping[tuple[str, int], str]
) -> str:
    if not findings:
        return ""
    blocks = []
    for record in findings:
        number = int(record["number"])
        planes = (pictures.findings or {}).get(number)
        if planes is None:
            continue
        uid = str(record["series_uid"])
        tags = [verdicts[uid, number]] if (uid, number) in verdicts else []
        malignancy = float(record["malignancy"])
        if not math.isnan(malignancy):
            tags.insert(0, f"malignancy {malignancy:.2f}")
        place = ", ".join(f"{float(record[name]):.1f}" for name in ("x_mm", "y_mm", "z_mm"))
        text = (
            f"probability {float(record['probability']):.3f} · ≈ {float(record['diameter_mm']):.1f} mm · "
            f"{place} mm · slice {int(record['index'])}, row {int(record['row'])}, column {int(record['col'])}"
        )
        marks = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
        blocks.append(
            f'<div class="panel" id="f{scan}-{number}"><p><strong>{number}</strong>{marks}'
            f'<br><span class="note">{escape(text)}</span></p><div class="film planes">{"".join(planes)}</div></div>'
        )
    more = len(findings) - len(blocks)
    note = "Axial, coronal and sagittal; the outline is the segmented mask, black is outside the scan. "
    note += DIAMETER_NOTE.capitalize() + "."
    note += f" {more:,} further findings are in the table only." if more else ""
    return f'<h3>Findings</h3><p class="note">{escape(note)}</p><div class="finds">{"".join(blocks)}</div>'


def _verdicts(truth: Truth | None) -> dict[tuple[str, int], str]:
    """What each candidate turned out to be, by series and number."""
    if truth is None:
        return {}
    words = {
        "hit": "nodule",
        "double": "nodule, again",
        "on_excluded": "excluded finding",
        "false_positive": "no nodule",
    }
    marks: pd.DataFrame = truth.froc.marks
    return {
        (str(uid), int(number)): words.get(str(verdict), str(verdict))
        for uid, number, verdict in zip(marks["series_uid"], marks["number"], marks["verdict"], strict=True)
    }


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
