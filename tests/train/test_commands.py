"""`lunatrain cls` and `eval` as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lunatrain.cli import cli

from ..conftest import typed


@pytest.fixture(scope="session")
def trained(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run has been trained."""
    folder = tmp_path_factory.mktemp("trained")
    done = call(
        folder, "cls", "--store", small_store / "crops.h5", "--model", "luna", "--epochs", "1", "--samples", "48"
    )
    assert done.returncode == 0, done.stderr
    assert "best epoch 1 of 1: auc" in done.stdout
    return folder


def call(folder, *args):
    return typed(cli, args, folder)


def test_eval_with_no_option_reports_on_the_newest_run(trained):
    done = call(trained, "eval")
    assert done.returncode == 0, done.stderr
    for word in ("AUC", "precision", "recall", "F1", "CPM", "report.html", "upper bound"):
        assert word in done.stdout
    out = next(trained.glob("runs/*-cls")) / "eval-series-val"
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert (out / "predictions.csv").read_text().startswith("seriesuid,coordX,coordY,coordZ,probability\n")
    assert json.loads((out / "metrics.json").read_text())["num_positive"] >= 1


def test_eval_takes_the_annotations_for_the_challenges_score_and_froc_takes_its_predictions(
    trained, phantom_root, tmp_path
):
    tables = [
        "--annotations",
        phantom_root / "annotations.csv",
        "--excluded",
        phantom_root / "annotations_excluded.csv",
    ]
    done = call(trained, "eval", "--part", "all", *tables, "--out", tmp_path / "all", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0 <= figures["cpm"] <= 1
    assert figures["num_nodules"] == len((phantom_root / "annotations.csv").read_text().splitlines()) - 1
    names = ["--seriesuids", phantom_root / "seriesuids.csv"]
    done = call(trained, "froc", tmp_path / "all/predictions.csv", *tables, *names, "--bootstrap", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpm"] == pytest.approx(figures["cpm"], abs=1e-9)


def test_resume_of_a_finished_run_says_so_and_changes_nothing(trained):
    run = next(trained.glob("runs/*-cls"))
    before = (run / "best.pt").read_bytes()
    done = call(trained, "cls", "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on at epoch 2" in done.stderr
    assert (run / "best.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["cls", "--store", "nowhere"], "is no store"),
        (["eval", "--checkpoint", "setup.py"], "setup.py"),
        (["cls", "--resume"], "no run of cls under"),
        (["eval"], "no run of cls under"),
        (["cls", "--preset", "book-ch99"], "book-ch99"),
        (["bench", "--store", "nowhere"], "is no store"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(tmp_path, args, words):
    done = call(tmp_path, *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_line(trained, small_store, tmp_path):
    run = next(trained.glob("runs/*-cls"))
    spoiled = bytearray((run / "best.pt").read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(spoiled)
    done = call(tmp_path, "eval", "--checkpoint", "x.pt", "--store", small_store)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1)
    assert "damaged" in done.stderr


def test_help_imports_no_torch():
    code = "import sys; sys.argv = ['lunatrain', 'cls', '--help']\nfrom lunatrain.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\nprint(sorted({'torch', 'numpy', 'pandas'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_mal_goes_on_from_the_newest_classifier_and_eval_judges_it(small_store, tmp_path):
    few = ["--store", small_store, "--split", "candidate", "--epochs", "1", "--samples", "16", "--batch-size", "8"]
    missing = call(tmp_path, "mal", *few)
    assert missing.returncode == 2
    assert "no run of cls" in missing.stderr
    assert call(tmp_path, "cls", "--model", "luna", *few).returncode == 0
    done = call(tmp_path, "mal", *few, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"].endswith("-mal")
    assert call(tmp_path, "mal", "--resume").returncode == 0
    done = call(tmp_path, "eval", "--json")
    assert done.returncode == 0, done.stderr
    assert "diameter_auc" in json.loads(done.stdout)
