"""`lunatrain cls` and `eval` as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lunatrain import evaluation
from lunatrain.checkpoint import load_checkpoint, save_checkpoint
from lunatrain.cli import cli
from lunatrain.training import store_of

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
    for word in (
        "AUC",
        "precision",
        "recall",
        "F1",
        "CPM",
        "report.html",
        "note: FROC and CPM are an upper bound",
        "found at 0.5",
    ):
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


def test_eval_of_another_split_says_what_may_have_been_learnt_and_gives_no_froc_of_single_candidates(trained, tmp_path):
    done = call(trained, "eval", "--split", "candidate", "--out", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert any("trained on split series" in note for note in figures["notes"])
    assert any("no FROC and no CPM" in note for note in figures["notes"])
    assert figures["cpm"] is None
    figures = json.loads(call(trained, "eval", "--out", tmp_path / "s", "--json").stdout)
    assert not any("trained on split" in note for note in figures["notes"])


def test_the_report_names_the_epoch_of_the_checkpoint_it_judges(trained, tmp_path):
    run = next(trained.glob("runs/*-cls"))
    state = load_checkpoint(run / "best.pt").state
    state["progress"] |= {"epoch": 4, "step": 5, "best_epoch": 0}
    save_checkpoint(tmp_path / "last.pt", state)
    for path, epoch in ((run / "best.pt", "1"), (tmp_path / "last.pt", "4 and 5 steps")):
        done = call(trained, "eval", "--checkpoint", path, "--store", store_of(run), "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert f"<td>epoch</td><td>{epoch}</td>" in (tmp_path / "out/report.html").read_text()


def test_eval_shows_how_far_it_is(trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "tqdm", lambda batches, **given: seen.append(given) or batches)
    assert call(trained, "eval", "--out", tmp_path / "out").returncode == 0
    assert [(given["total"], given["disable"]) for given in seen] == [(1, None)]


def test_excluded_findings_without_annotations_are_refused(trained, phantom_root):
    done = call(trained, "eval", "--excluded", phantom_root / "annotations_excluded.csv")
    assert (done.returncode, "--excluded needs --annotations" in done.stderr) == (2, True)


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


def test_mal_goes_on_from_the_newest_classifier_and_eval_judges_it(small_store, phantom_root, tmp_path):
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
    table = phantom_root / "annotations.csv"
    for option in (["--annotations", table], ["--excluded", table], ["--bootstrap", "9"]):
        done = call(tmp_path, "eval", *option)
        assert (done.returncode, "there is none of malignancy. Leave it out" in done.stderr) == (2, True)
