"""What a run was most wrong about is what its predictions say."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lunaprep import pictures
from lunaprep.errors import TableError, UsageError
from lunaprep.store.reader import open_store
from lunaprep.worst import newest_predictions, predicted_rows, worst_rows


@pytest.fixture
def predictions(built_store, tmp_path):
    """A run with predictions of all crops but the first three, in another order, and the probability of each row."""
    manifest = open_store(built_store).manifest
    probability = np.random.default_rng(0).permutation(len(manifest)) / len(manifest)
    table = pd.DataFrame(
        {
            "seriesuid": manifest["series_uid"],
            "coordX": manifest["x_mm"],
            "coordY": manifest["y_mm"],
            "coordZ": manifest["z_mm"],
            "probability": probability,
        }
    )
    (tmp_path / "run/eval-series-val").mkdir(parents=True)
    table[3:].sample(frac=1, random_state=1).to_csv(tmp_path / "run/eval-series-val/predictions.csv", index=False)
    return tmp_path / "run", manifest, probability


def test_the_worst_are_those_farthest_on_the_wrong_side(predictions):
    run, manifest, probability = predictions
    predicted = predicted_rows(manifest, newest_predictions(run))
    assert len(predicted) == len(manifest) - 3
    rows, given = worst_rows(predicted, 10)
    there = np.arange(len(manifest)) >= 3
    is_nodule = manifest["is_nodule"].to_numpy(dtype=bool)
    nodules, others = np.flatnonzero(there & is_nodule), np.flatnonzero(there & ~is_nodule)
    expected = [*nodules[np.argsort(probability[nodules])][:5], *others[np.argsort(-probability[others])][:5]]
    assert rows.tolist() == expected
    np.testing.assert_allclose(given, probability[expected])


def test_show_draws_them(predictions, built_store, tmp_path):
    run, _, _ = predictions
    out = tmp_path / "worst.png"
    command = [sys.executable, "-m", "lunaprep", "show", str(built_store), "--worst", str(run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 10_000


def test_the_picture_says_what_was_wrong(predictions, built_store, tmp_path, monkeypatch):
    run, manifest, _ = predictions
    seen = []
    monkeypatch.setattr(pictures, "_save", lambda figure, out: seen.append(figure))
    pictures.worst_picture(open_store(built_store), run, tmp_path / "worst.png")
    title = "\n".join(text.get_text() for text in seen[0].texts)
    assert f"missed most; blue: others taken for nodules; p: probability ({len(manifest) - 3:,} crops judged)" in title
    assert all(axes.texts[0].get_text().startswith("p 0.") for axes in seen[0].axes)


def test_what_cannot_be_drawn_is_one_line(predictions, tmp_path):
    run, manifest, _ = predictions
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="lunatrain eval"):
        newest_predictions(tmp_path / "empty")
    other = manifest.assign(series_uid="1.2.3")
    with pytest.raises(TableError, match="none of the"):
        predicted_rows(other, newest_predictions(run))
    for content in ("a,b\n1,2\n", "", "seriesuid,coordX,coordY,coordZ,probability\n1,x,2,3,4\n"):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(TableError, match=r"bad\.csv"):
            predicted_rows(manifest, tmp_path / "bad.csv")
