"""Pictures, judged by their pixels: what is drawn lies where it should."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lunaprep import pictures, schema
from lunaprep.errors import UsageError
from lunaprep.store.reader import open_store

SPACING = (2.5, 0.7, 0.7)
SHAPE = (30, 80, 80)
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.100225287222365663678666836860"
STRAIGHT, FLIPPED = (False, False, False), (False, True, True)


def ball(shape, center, diameter_mm, spacing=SPACING):
    """Air with a bright ball in it."""
    grid = np.stack(np.indices(shape), axis=-1)
    away = np.linalg.norm((grid - np.array(center)) * spacing, axis=-1)
    return np.where(away <= diameter_mm / 2, 1000.0, -1000.0).astype(np.float32)


def read(out: Path) -> np.ndarray:
    """Pixels (rows, columns, RGB) of a picture, which must be a PNG that tells nothing of its making."""
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert "Software" not in picture.info
        return np.asarray(picture.convert("RGB")).astype(int)


def panel(out: Path, figure: Any, name: str) -> np.ndarray:
    """Pixels (rows, columns, RGB) of one axes of the picture."""
    pixels = read(out)
    axes = next(a for a in figure.axes if a.get_label() == name)
    box, (height, width) = axes.get_window_extent(), pixels.shape[:2]
    assert (width, height) == tuple(round(s * 100) for s in figure.get_size_inches())
    return pixels[round(height - box.y1) : round(height - box.y0), round(box.x0) : round(box.x1)]


def color_mask(pixels, color, tolerance=60):
    wanted = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return np.abs(pixels - wanted).max(axis=-1) < tolerance


def middle(mask):
    """Middle (row, column) of a mask's extent."""
    rows, cols = np.nonzero(mask)
    assert len(rows)
    return np.array([(rows.min() + rows.max()) / 2, (cols.min() + cols.max()) / 2])


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    """The figures that were saved."""
    seen: list[Any] = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, out: (seen.append(figure), save(figure, out)))
    return seen


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    empty = {"is_malignant": None, "patient_id": None, "is_padded": False, "annotation_id": None, "subset": 0}
    empty |= dict.fromkeys(column.name for column in schema.MANIFEST_COLUMNS if column.optional)
    empty |= {"split_series": "train", "split_candidate": "val", "series_uid": UID, "diameter_mm": np.nan}
    frame = pd.DataFrame([{"candidate_id": k, **empty, **row} for k, row in enumerate(rows)])
    for name, side in (("index", 16), ("row", 24), ("col", 24)):
        frame[f"start_{name}"] = frame[name] - side
    return frame.assign(x_mm=-1.0, y_mm=2.0, z_mm=3.0)


CANDIDATES = table(
    {"index": 15, "row": 50, "col": 20, "is_nodule": True, "diameter_mm": 12.0},
    {"index": 15, "row": 20, "col": 60, "is_nodule": False},
    {"index": 3, "row": 30, "col": 30, "is_nodule": True},
)


class FakeStore(SimpleNamespace):
    crop_spacing = None

    def crops(self, rows):
        return np.stack([ball((32, 48, 48), (16, 24, 24), 8.0) for _ in rows])

    @contextmanager
    def open_volume(self, series_uid):
        yield ball(SHAPE, (15, 50, 20), 12.0)

    def has_masks(self, series_uid):
        return False


def make_store(**columns: Any) -> Any:
    scan = {"series_uid": UID, "patient_id": "P1", "subset": 0, "status": "ok", "reason": None, "volume_file": "v.h5"}
    scan |= {"num_slices": 30, "num_rows": 80, "num_cols": 80, "spacing": [0.7, 0.7, 2.5]}
    scan |= {"direction": [1.0, 0, 0, 0, 1, 0, 0, 0, 1]}
    return FakeStore(manifest=CANDIDATES, scans=pd.DataFrame([scan | columns]))


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_ball_is_round_under_its_circle(tmp_path, figures, plane):
    crop = ball((32, 48, 48), (12, 20, 30), 15.0)
    out = tmp_path / "crop.png"
    pictures.draw_crop(crop, "A ball", SPACING, out, 15.0, (12, 20, 30), STRAIGHT)
    pixels = panel(out, figures[0], plane)
    bright, ring = pixels.min(axis=-1) > 235, color_mask(pixels, pictures.NODULE)
    bright[:30], bright[-30:], bright[:, :30], bright[:, -30:] = (False,) * 4  # the ticks and the scale bar
    height, width = (np.ptp(k) + 1 for k in np.nonzero(ring))
    assert abs(height - width) <= 2
    assert np.abs(middle(ring) - middle(bright)).max() < 0.25 * width
    assert np.ptp(np.nonzero(bright)[0]) == pytest.approx(np.ptp(np.nonzero(bright)[1]), rel=0.3)


def test_feet_are_down_and_flipped_axes_turned(tmp_path, figures):
    crop = ball((32, 48, 48), (6, 10, 10), 12.0)  # low slice, low row, low column
    expected = {STRAIGHT: {"axial": (0, 0), "coronal": (1, 0)}, FLIPPED: {"axial": (1, 1), "coronal": (1, 1)}}
    for flips, places in expected.items():
        out = tmp_path / "crop.png"
        pictures.draw_crop(crop, "t", SPACING, out, 12.0, (6, 10, 10), flips)
        for plane, quadrant in places.items():
            ring = color_mask(pixels := panel(out, figures[-1], plane), pictures.NODULE)
            found = middle(ring) > np.array(pixels.shape[:2]) / 2
            assert tuple(found.astype(int)) == quadrant, (flips, plane)


def test_sections_shrink_away_from_the_centre(tmp_path, figures):
    pictures.draw_crop(ball((32, 48, 48), (16, 24, 24), 15.0), "t", SPACING, tmp_path / "c.png", 15.0)
    counts = [
        int(color_mask(panel(tmp_path / "c.png", figures[0], f"slice {k}"), "#ffb000")[25:].sum()) for k in (16, 18, 20)
    ]
    assert counts[0] > counts[1] > counts[2] == 0
    assert sum(a.get_label().startswith("slice") for a in figures[0].axes) == 16


@pytest.mark.parametrize("diameter", [None, float("nan")])
def test_no_circle_without_diameter(tmp_path, figures, diameter):
    crop = ball((32, 48, 48), (16, 24, 24), 15.0)
    pictures.draw_crop(crop, "t", SPACING, tmp_path / "c.png", diameter)
    pictures.draw_crop(crop, "t", None, tmp_path / "d.png", 15.0)
    for out, figure in zip(("c.png", "d.png"), figures, strict=True):
        assert not color_mask(panel(tmp_path / out, figure, "axial"), pictures.NODULE).any()


@pytest.mark.parametrize("flips", [STRAIGHT, FLIPPED])
def test_candidates_lie_at_their_place(tmp_path, figures, flips):
    out = tmp_path / "series.png"
    pictures.draw_series(ball(SHAPE, (15, 50, 20), 12.0), SPACING, CANDIDATES, "t", out, flips)
    pixels = panel(out, figures[0], "slice 15")
    ring, cross = color_mask(pixels, pictures.NODULE), color_mask(pixels, pictures.NEGATIVE)
    size = pixels.shape[0]
    for mask, place in ((cross, (20, 60)), (ring, (50, 20))):
        expected = (np.array(place) + 0.5) / 80 * size
        if flips == FLIPPED:
            expected = size - expected
        if mask is ring:  # the label beside it has the same colour: look at the circle's sides alone
            row = round(expected[0])
            sides = np.nonzero(ring[row])[0]
            assert (sides.min() + sides.max()) / 2 == pytest.approx(expected[1], abs=2)
            assert np.ptp(sides) == pytest.approx(12.0 / 0.7 / 80 * size, abs=4)
        else:
            assert np.abs(middle(mask) - expected).max() < 3
    square = color_mask(panel(out, figures[0], "slice 3"), pictures.NODULE)
    assert square.any()  # a nodule of unknown diameter
    assert color_mask(panel(out, figures[0], "coronal"), pictures.NODULE).any()


def test_series_reads_only_planes(tmp_path):
    class Volume:
        shape = SHAPE
        voxels = ball(SHAPE, (15, 50, 20), 12.0)

        def __getitem__(self, key):
            found = self.voxels[key]
            assert found.ndim == 2
            return found

    pictures.draw_series(Volume(), SPACING, CANDIDATES, "t", tmp_path / "s.png")


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 300, 40), (600, 20, 20)])
def test_odd_shapes(tmp_path, shape):
    none = CANDIDATES.head(0)
    pictures.draw_series(ball(shape, (0, 0, 0), 3.0), SPACING, none, "t", tmp_path / "s.png")
    pictures.draw_crop(ball(shape, (0, 0, 0), 3.0), "t", SPACING, tmp_path / "c.png")
    for name in ("s.png", "c.png"):
        assert max(read(tmp_path / name).shape) < 3000


def test_same_bytes_whatever_the_settings(tmp_path):
    import matplotlib as mpl

    store = make_store()
    before = dict(mpl.rcParams)
    for name, settings in (("a", {}), ("b", {"image.cmap": "hot", "font.size": 30, "savefig.dpi": 7})):
        with mpl.rc_context(settings):
            pictures.candidate_picture(store, 0, tmp_path / f"candidate_{name}.png")
            pictures.series_picture(store, UID, tmp_path / f"series_{name}.png")
            pictures.overview_picture(store, tmp_path / f"overview_{name}.png")
    assert dict(mpl.rcParams) == before
    for kind, width in (("candidate", 1000), ("series", 1280), ("overview", 1280)):
        first, second = ((tmp_path / f"{kind}_{name}.png").read_bytes() for name in "ab")
        assert first == second
        height, found, _ = read(tmp_path / f"{kind}_a.png").shape
        assert found == width
        assert 200 < height < 2000


def test_titles(tmp_path, figures):
    store = make_store()
    pictures.candidate_picture(store, 0, tmp_path / "c.png")
    pictures.candidate_picture(store, 1, tmp_path / "d.png")
    pictures.series_picture(store, UID[-6:], tmp_path / "s.png")
    texts = ["\n".join(t.get_text() for t in figure.texts) for figure in figures]
    assert "Candidate 0 · nodule, 12.0 mm" in texts[0]
    assert "train by series, val by candidate" in texts[0]
    assert "slice 15, row 50, column 20" in texts[0]
    assert "not a nodule" in texts[1]
    assert "3 candidates (2 nodules)" in texts[2]


def texts_of(figure: Any) -> str:
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join([*(text.get_text() for text in figure.texts), *legends])


def test_pictures_say_what_is_drawn(tmp_path, figures):
    store = make_store()
    pictures.candidate_picture(store, 0, tmp_path / "c.png")
    pictures.series_picture(store, UID, tmp_path / "s.png")
    pictures.overview_picture(store, tmp_path / "o.png")
    told = ("slices from the centre", "the annotation's diameter around the candidate's centre", "the ticks point at")
    for figure, words in zip(figures, told, strict=True):
        assert words in texts_of(figure)
    assert "at the sides: slices shown" in texts_of(figures[1])
    assert "48 × 48 pixels, lung window" in texts_of(figures[2])


def test_a_nodule_of_two_candidates_has_one_label(tmp_path, figures):
    shared = {"index": 15, "is_nodule": True, "diameter_mm": 12.0}
    places = [(50, 20, 7), (51, 21, 7), (20, 60, 8), (60, 60, None), (61, 61, None)]
    rows = [shared | {"row": row, "col": col, "annotation_id": number} for row, col, number in places]
    pictures.draw_series(ball(SHAPE, (15, 50, 20), 12.0), SPACING, table(*rows), "t", tmp_path / "s.png")
    axes = next(axes for axes in figures[0].axes if axes.get_label() == "slice 15")
    assert sum(text.get_text() == "12.0 mm" for text in axes.texts) == 4
    assert len(axes.patches) == 5


def test_text_from_outside_is_plain(tmp_path):
    pictures.draw_crop(np.zeros((4, 6, 6)), "$\\frac{ 漢字 \x1b \n$", SPACING, tmp_path / "c.png")
    pictures.draw_montage([np.zeros((4, 6, 6))], ["$x_$ 漢"], "\x00", tmp_path / "m.png")


def test_series_without_volume_shows_its_crops(tmp_path, figures):
    pictures.series_picture(make_store(volume_file=None), UID, tmp_path / "s.png")
    assert "No volume of this scan" in "\n".join(t.get_text() for t in figures[0].texts)
    assert [a.get_label() for a in figures[0].axes] == ["crop 0", "crop 1", "crop 2"]
    frame = read(tmp_path / "s.png")
    assert color_mask(frame, pictures.NODULE).sum() > color_mask(frame, pictures.NEGATIVE).sum() > 0


def test_montage_shows_the_slice_of_the_centre(tmp_path, figures):
    crop = ball((32, 48, 48), (5, 24, 24), 10.0)
    pictures.draw_montage([crop, crop], ["a", "b"], "t", tmp_path / "m.png", [True, False], [(5, 24, 24), (30, 24, 24)])
    bright = [panel(tmp_path / "m.png", figures[0], f"crop {k}")[95:105, 95:105].mean() > 230 for k in (0, 1)]
    assert bright == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, d: pictures.candidate_picture(s, 8, d / "a.png"), "candidate 8: .* between 0 and 2"),
        (lambda s, d: pictures.candidate_picture(s, 0, d / "a.jpg"), r"a\.jpg: pictures are PNG"),
        (lambda s, d: pictures.overview_picture(s, d / "none" / "a.png"), "does not exist"),
        (lambda s, d: pictures.series_picture(s, UID[:-1] + "9", d / "a.png"), f"similar: {UID}"),
    ],
)
def test_errors_are_one_line(tmp_path, call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call(make_store(), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw(tmp_path):
    store = make_store(volume_file=None)
    store.manifest = CANDIDATES.head(0)
    with pytest.raises(UsageError, match="nothing to draw"):
        pictures.series_picture(store, UID, tmp_path / "a.png")
    with pytest.raises(UsageError, match="nothing to draw"):
        pictures.overview_picture(store, tmp_path / "a.png")


def test_real_store(built_store, tmp_path):
    store = open_store(built_store)
    pictures.candidate_picture(store, int(store.manifest["candidate_id"].iloc[0]), tmp_path / "c.png")
    pictures.series_picture(store, store.scans["series_uid"].iloc[0], tmp_path / "s.png")
    pictures.overview_picture(store, tmp_path / "o.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_pyplot_stays_out():
    code = "import sys, lunaprep.info; assert 'matplotlib' not in sys.modules; import lunaprep.pictures; "
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(pictures.__file__).parents[1])
