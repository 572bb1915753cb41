"""The report: one file that needs no other, escapes what it shows, and is the same bytes for the same result."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lunaprep
from lunatrain import plots
from lunatrain.evaluate import Evaluation, evaluate
from lunatrain.froc import evaluate_froc
from lunatrain.metrics import calibration_table, precision_recall_curve, rank_scores, roc_curve
from lunatrain.report import report_html, worst_pictures, write_report

EVIL = "<script>alert('1')</script>&\"x\""
FACTS = {"run": "runs/a & b", "checkpoint": "best <7>"}
CURVES = [
    {"part": part, "epoch": epoch, "samples": 1000 * (epoch + 1), name: value / (epoch + 1), "auc": None}
    for epoch in range(3)
    for part, name, value in (("train", "loss", 0.5), ("val", "log_loss", 0.6))
]
VOID = {"meta", "img", "source", "br"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def result(built_store: Path) -> Evaluation:
    rows = lunaprep.open_store(built_store).manifest
    probability = np.random.default_rng(1).random(len(rows)) * 0.7 + 0.3 * rows["is_nodule"].to_numpy()
    return evaluate(rows, probability, num_bootstrap=10)


@pytest.fixture(scope="module")
def written(result: Evaluation, built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    pictures = worst_pictures(result, lunaprep.open_store(built_store).crops, num=5)
    assert write_report(result, out, title="A title", facts=FACTS, pictures=pictures, curves=CURVES).parent == out
    return out


def page_of(out: Path) -> str:
    """The page without the pictures' bytes."""
    text = (out / "report.html").read_text(encoding="utf-8")
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:PICTURE", text)


class Outline(HTMLParser):
    """Raises where a tag is closed that isn't open; collects tags with attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(written: Path) -> None:
    page = page_of(written)
    assert not re.search(r"https?:|//|@import|url\(|<link|<iframe", page)
    outline = Outline(page)
    assert not outline.open
    links = [value for _, attrs in outline.tags for name, value in attrs.items() if name in ("src", "srcset", "href")]
    assert set(links) == {"data:PICTURE"}
    assert sum(tag == "source" for tag, _ in outline.tags) == 6, "each plot for light and dark"
    assert sum(tag == "img" for tag, _ in outline.tags) == 8
    assert all(attrs.get("alt") for tag, attrs in outline.tags if tag == "img")


def test_only_the_pages_own_script_may_run(written: Path) -> None:
    page = page_of(written)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_it_opens_with_the_cards_and_the_trap(written: Path, result: Evaluation) -> None:
    page = page_of(written)
    marks = ["<h1>A title</h1>", 'class="cards"', ">CPM<", ">AUC<", "Percent correct", "Calling every crop", "<h2>"]
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)
    for value in (result.froc.cpm, result.binary.auc, result.binary.recall, result.binary.average_precision):
        assert f'<div class="value">{value:.3f}</div>' in page
    assert "upper bound" in page
    assert "runs/a &amp; b" in page
    assert "best &lt;7&gt;" in page
    for heading in ("By diameter", "By threshold", "Calibration", "FROC", "Training", "Crops of class"):
        assert heading in page


def test_files_beside_the_page(written: Path, result: Evaluation) -> None:
    table = pd.read_csv(written / "predictions.csv")
    assert list(table) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    assert table["probability"].tolist() == result.probability.tolist()
    assert json.loads((written / "metrics.json").read_text()) == result.to_json()
    assert sorted(path.name for path in written.iterdir()) == ["metrics.json", "predictions.csv", "report.html"]


def test_the_same_result_gives_the_same_bytes(
    written: Path, result: Evaluation, built_store: Path, tmp_path: Path
) -> None:
    pictures = worst_pictures(result, lunaprep.open_store(built_store).crops, num=5)
    write_report(result, tmp_path, title="A title", facts=FACTS, pictures=pictures, curves=CURVES)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_text_from_data_is_escaped(result: Evaluation) -> None:
    rows = result.rows.assign(series_uid=EVIL)
    evil = evaluate(rows, result.probability)
    page = report_html(evil, EVIL, {EVIL: EVIL}, {EVIL: PNG}, ())
    assert page.count("<script>") == 1
    assert "alert('1')" not in page
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&amp;&quot;x&quot;" in page
    assert not Outline(page).open


@pytest.mark.parametrize("is_nodule", [False, True])
def test_an_empty_class_and_equal_scores_make_a_report(result: Evaluation, is_nodule: bool) -> None:
    rows = result.rows[result.rows["is_nodule"] == is_nodule]
    page = report_html(evaluate(rows, np.full(len(rows), 0.25)), "Empty", {}, {}, ())
    assert '<div class="value">–</div>' in page
    assert "there are no " in page
    assert "nan" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page).lower().replace("isnan", "")


def test_malignancy_has_the_diameter_beside_it(built_store: Path) -> None:
    store = lunaprep.open_store(built_store)
    rows = store.manifest[store.manifest["is_nodule"]]
    rows = rows.assign(is_malignant=pd.array(rows["diameter_mm"] > rows["diameter_mm"].median(), dtype="boolean"))
    result = evaluate(rows, np.linspace(0, 1, len(rows)), label="is_malignant")
    page = report_html(result, "Malignancy", {}, worst_pictures(result, store.crops), ())
    assert '<div class="name">Diameter alone</div><div class="value">1.000</div>' in page
    assert "FROC" not in page
    assert "Crops of class &#x27;benign&#x27; with the highest probability" in page


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    seen: list[Any] = []
    save = plots.png_of
    monkeypatch.setattr(plots, "png_of", lambda figure: seen.append(figure) or save(figure))
    return seen


@pytest.mark.parametrize("share_found", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_the_legend_of_a_froc_curve_covers_none_of_it(figures: list[Any], share_found: float) -> None:
    scans = [f"s{k}" for k in range(10)]
    nodules = pd.DataFrame({"series_uid": scans, "x_mm": 0.0, "y_mm": 0.0, "z_mm": 0.0, "diameter_mm": 9.0})
    sure = nodules.head(round(10 * share_found)).assign(probability=0.9)
    false = pd.DataFrame({"series_uid": scans * 9, "x_mm": np.arange(90) + 50.0, "y_mm": 0.0, "z_mm": 0.0})
    marks = pd.concat([sure, false.assign(probability=np.linspace(0.1, 0.8, 90))], ignore_index=True)
    plots.froc_png(evaluate_froc(marks, nodules, None, scans))
    (axes,) = figures[0].axes
    x, y = axes.lines[0].get_data()
    pixels = axes.transData.transform(np.stack([x, y], axis=1))
    box = axes.get_legend().get_window_extent()
    assert not any(box.contains(*pixel) for pixel in pixels)


def test_curves_of_one_epoch_have_axes_from_0_to_1(figures: list[Any]) -> None:
    first = {"part": "val", "epoch": 0, "samples": 48, "log_loss": 2.0, "auc": 0.5, "f1": 0.24}
    plots.training_png([first])
    loss, *scores = figures[0].axes
    assert all(axes.get_ylim() == (-0.02, 1.02) for axes in scores)
    assert loss.get_ylim()[0] < 2.0 < loss.get_ylim()[1]
    plots.training_png([first, first | {"epoch": 1, "samples": 96, "auc": 0.52, "f1": 1.0}])
    _, auc, f1 = figures[1].axes
    assert auc.get_ylim()[1] - auc.get_ylim()[0] < 0.1
    assert f1.get_ylim()[1] == 1.02


def test_pictures_are_png_of_both_themes_whatever_is_drawn() -> None:
    labels, scores = np.array([True, False, False]), np.array([1.0, 0.0, 0.4])
    ranking = rank_scores(labels, scores)
    for theme in (plots.LIGHT, plots.DARK):
        drawn = [
            plots.roc_png(roc_curve(ranking), 1.0, (0.0, 1.0), theme),
            plots.precision_recall_png(precision_recall_curve(ranking), 1.0, 1 / 3, (1.0, 1.0), theme),
            plots.calibration_png(calibration_table(labels, scores), theme),
            plots.calibration_png((), theme),
            plots.scores_png(labels, scores, ("$a", "b_"), 0.5, theme),
            plots.training_png([], theme),
            plots.training_png([{"part": "val", "epoch": 0, "samples": 1_500_000, "dice": 0.5, "iou": None}], theme),
        ]
        assert all(png.startswith(PNG) for png in drawn)
    crops = np.random.default_rng(0).normal(-600, 300, (7, 4, 6, 5)).astype(np.float32)
    plain = plots.montage_png(crops, ["$x_1 …"] * 7)
    marked = plots.montage_png(crops, ["$x_1 …"] * 7, [True] * 7, [(9, -1, 2)] * 7)
    assert plain.startswith(PNG)
    assert plain != marked
    assert plots.montage_png(crops[:0], []).startswith(PNG)
