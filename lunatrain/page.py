"""What all HTML pages of lunatrain share: style, the sorting script, tables, figures, pictures.

A page is one file that needs no other and no network. All text that comes from data is escaped; the page's policy
lets no script run but its own, which sorts tables.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape

from lunatrain import plots
from lunatrain.evaluate import RATE_NAMES, figure_text, percent
from lunatrain.froc import FrocResult

SERIES_TAIL = 10
"""Characters of a series id that are shown; the rest is in the cell's title."""

STYLE = """
:root { --page: #f3f5f8; --card: #ffffff; --text: #1f2328; --muted: #59636e; --line: #d8dee4; --accent: #0072b2;
  --soft: #dcebf5; --warn: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9198a1;
  --line: #30363d; --accent: #56b4e9; --soft: #1d3446; --warn: #ffb000; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; } p { margin: 0 0 12px; } .muted { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin: 20px 0 12px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.panel + .panel, .pair + .panel, details { margin-top: 12px; } .pair > .panel { margin-top: 0; }
.cards .panel { margin: 0; } .cards .panel:first-child { border-top: 3px solid var(--accent); padding-top: 12px; }
.name, .note { color: var(--muted); font-size: 13px; line-height: 1.4; }
.value { font-size: 27px; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; }
.trap { display: grid; grid-template-columns: auto 1fr; gap: 4px 28px; align-items: center; }
.trap { border-left: 4px solid var(--warn); } .trap p { margin: 0; }
.notes { margin: 12px 0 0; padding-left: 20px; color: var(--muted); font-size: 13.5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; align-items: start; }
figure { margin: 0; } img { display: block; width: 100%; height: auto; } .film { background: #161b22; padding: 4px; }
.scroll { overflow-x: auto; } .scroll + p { margin: 12px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; } tbody tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 600; }
th button { all: unset; cursor: pointer; } th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.bar { display: inline-block; width: 90px; height: 9px; margin-left: 8px; border-radius: 3px; background: var(--soft); }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.facts td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--muted); width: 200px; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 900px) { .cards { grid-template-columns: repeat(3, 1fr); } .pair { grid-template-columns: 1fr; } }
@media (max-width: 520px) { .cards { grid-template-columns: 1fr 1fr; } .trap { grid-template-columns: 1fr; } }
@media print { body { background: none; } .panel, tr { break-inside: avoid; } }
"""

SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  const key = row => row.cells[column].dataset.v;
  const order = (a, b) => a === b ? 0 : a === "" ? 1 : b === "" ? -1
    : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  [...body.rows].sort((a, b) => order(key(a), key(b))).forEach(row => body.append(row));
  head.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}));
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page of HTML parts, empty ones left out; `style` is CSS of its own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def short_uid(series_uid: str) -> str:
    """End of a series id."""
    return series_uid if len(series_uid) <= SERIES_TAIL + 1 else f"…{series_uid[-SERIES_TAIL:]}"


def card(name: str, value: str, note: str) -> str:
    """A headline figure."""
    return (
        f'<div class="panel"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def percent_correct(accuracy: float, baseline: str, text: str) -> str:
    """Percent correct, and beside it why not to judge by it: what guessing would have."""
    return (
        '<section class="panel trap"><div><div class="name">Percent correct</div>'
        f'<div class="value">{percent(accuracy)}</div></div>'
        f"<div><p><strong>{escape(baseline)}.</strong> Percent correct alone says little.</p>"
        f'<p class="muted">{escape(text)}</p></div></section>'
    )


def notes_list(notes: Iterable[str]) -> str:
    """What a reader must know, as a list; nothing where there is nothing."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def facts_panel(facts: Mapping[str, str]) -> str:
    """Table of names and what belongs to them."""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(value)}</td></tr>" for k, value in facts.items())
    return f'<div class="panel"><table class="facts"><tbody>{rows}</tbody></table></div>'


def section(heading: str, text: str, body: str) -> str:
    """Part of a page with a heading and a line of text; `body` is HTML."""
    return f'<section><h2>{escape(heading)}</h2><p class="muted">{escape(text)}</p>{body}</section>'


def data_url(png: bytes) -> str:
    """A PNG file within the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table of cells made by `td`; a click on a heading sorts."""
    names = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def td(value: str | float, text: str | None = None, more: str = "") -> str:
    """Cell with the value it is sorted by; `more` is HTML."""
    shown = text if text is not None else f"{value:,}" if isinstance(value, int) else str(value)
    key = "" if value != value else value
    return f'<td data-v="{escape(str(key))}">{escape(shown)}{more}</td>'


def share_td(value: float, digits: int = 3) -> str:
    """Cell with a share, 0 to 1."""
    return td(value, figure_text(value, digits))


def bar_td(value: float) -> str:
    """Percentage with a bar."""
    width = 0.0 if value != value else 100 * value
    return td(value, percent(value), f'<span class="bar"><i style="width:{width:.1f}%"></i></span>')


def themed_plot(draw: Callable[[plots.Theme], bytes], alt: str) -> str:
    """A picture in a light and a dark edition; the reader's setting chooses."""
    light, dark = (data_url(draw(theme)) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<figure class="panel"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(alt)}" src="{light}"></picture></figure>'
    )


def froc_body(froc: FrocResult) -> str:
    """FROC curve, table of sensitivities, and what became of the marks."""
    n, ci, values = froc.counts, froc.ci, [*froc.at_rates, froc.cpm]
    rows = [[td(k, name), share_td(values[k])] for k, name in enumerate([*RATE_NAMES, "CPM (their mean)"])]
    if ci is not None:
        lows, highs = [*ci.at_rates_low, ci.cpm_low], [*ci.at_rates_high, ci.cpm_high]
        for row, low, high in zip(rows, lows, highs, strict=True):
            row.append(td(low, f"{figure_text(low)} to {figure_text(high)}"))
    found = (
        f"{n.num_scans:,} scans, {n.num_nodules:,} nodules: {n.nodules_found:,} have a mark, {n.nodules_missed:,} have "
        f"none at any threshold. {n.marks_read:,} marks, of them {n.false_positives:,} false positives, "
        f"{n.marks_on_excluded:,} on excluded findings, {n.marks_beyond_limit:,} beyond the 100 a scan that count."
    )
    table = html_table(["FP per scan", "sensitivity", *(["95 % interval"] if ci else [])], rows)
    plot = themed_plot(partial(plots.froc_png, froc), "FROC curve")
    return f'<div class="pair">{plot}<div class="panel">{table}<p class="muted">{escape(found)}</p></div></div>'
