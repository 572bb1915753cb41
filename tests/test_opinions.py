"""What readers and pathologists say of a nodule: ratings and subtype, from tables through the store to the pictures."""

import json

import numpy as np
import pandas as pd
import pytest

from lunaprep.build import BuildOptions, build
from lunaprep.candidates import read_annotations, read_malignancy, votes_text
from lunaprep.info import candidate_text, format_info, store_info
from lunaprep.parameters import Parameters
from lunaprep.schema import MANIFEST_COLUMNS
from lunaprep.sources.csv_tables import write_tables
from lunaprep.sources.luna16 import TablePaths, read_source
from lunaprep.store.reader import open_store
from lunaprep.store.tables import read_table, table_bytes

HEAD = "seriesuid,coordX,coordY,coordZ,diameter_mm,mal_bool,mal_details\n"


@pytest.fixture
def said(data):
    """The phantom's tables, with ratings as LUNA16's file has them (of each second nodule none) and subtypes."""
    table = pd.read_csv(data / "annotations_with_malignancy.csv", dtype={"seriesuid": str})
    table["mal_details"] = ["[4, 2, 5]" if k % 2 else "" for k in range(len(table))]
    table.to_csv(data / "annotations_with_malignancy.csv", index=False)
    nodules = pd.read_csv(data / "annotations.csv", dtype={"seriesuid": str})
    nodules["subtype"] = ["AG"[k % 2] if k else "" for k in range(len(nodules))]
    nodules.to_csv(data / "annotations.csv", index=False)
    return data


@pytest.fixture
def store(said, tmp_path):
    build(BuildOptions(said, tmp_path / "s", workers=1, volumes=False), Parameters(crop_shape=(16, 24, 24)))
    return tmp_path / "s"


def test_ratings_are_read_in_order_and_a_bad_one_costs_its_row(tmp_path):
    path = tmp_path / "m.csv"
    rows = ['True,"[4, 2, 4, 2]"', "False,", "False,[3]", 'True,"[4, 6]"', 'True,"4, 5"', "True,nan"]
    path.write_text(HEAD + "".join(f"u,1,2,3,4,{row}\n" for row in rows))
    table = read_malignancy(path)
    assert table.frame["malignancy_votes"].tolist() == ["2,2,4,4", None, "3"]
    assert [fault.line for fault in table.faults] == [5, 6, 7]
    assert "mal_details is '[4, 6]', expected ratings of 1 to 5 as [4, 2, 4]" in str(table.faults[0])
    assert votes_text([]) is None


@pytest.mark.shared_data
def test_the_real_table_calls_malignant_what_two_readers_rated_4_or_5(shared_data):
    table = read_malignancy(shared_data / "luna16_csv" / "annotations_with_malignancy.csv")
    assert (len(table.frame), table.faults) == (1182, ())
    ratings = [list(map(int, text.split(","))) for text in table.frame["malignancy_votes"]]
    assert [sum(k >= 4 for k in each) >= 2 for each in ratings] == table.frame["is_malignant"].tolist()
    assert ratings[0] == [2, 2, 4, 4]


def test_a_subtype_of_annotations_csv_is_taken(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm,subtype\nu,1,2,3,4, A \nu,1,2,3,4,\n")
    assert read_annotations(path).frame["subtype"].tolist() == ["A", None]


def test_the_store_keeps_ratings_their_mean_and_subtypes(store, said, run):
    manifest = open_store(store).manifest
    nodules = manifest[manifest["annotation_id"].notna()]
    assert set(nodules["malignancy_votes"].dropna()) == {"2,4,5"}
    is_rated = nodules["malignancy_votes"].notna()
    assert nodules["malignancy_mean"][is_rated].tolist() == [11 / 3] * int(is_rated.sum())
    assert nodules["malignancy_mean"][~is_rated].isna().all()
    assert is_rated.any()
    assert not is_rated.all()
    expected = pd.read_csv(said / "annotations.csv")["subtype"]
    for row in nodules.itertuples():
        assert row.subtype == expected[row.annotation_id] or (
            pd.isna(row.subtype) and pd.isna(expected[row.annotation_id])
        )
    others = manifest[manifest["annotation_id"].isna()]
    assert others[["malignancy_votes", "malignancy_mean", "subtype"]].isna().all().all()
    assert run(["verify", store]).returncode == 0


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("malignancy_votes", "4,2,5", "no ratings from 1 to 5 in ascending order"),
        ("malignancy_votes", "2,4,6", "no ratings from 1 to 5 in ascending order"),
        ("malignancy_mean", 3.6, "malignancy_mean is not the mean of malignancy_votes"),
        ("malignancy_mean", None, "malignancy_mean is not the mean of malignancy_votes"),
    ],
)
def test_verify_knows_what_ratings_are(store, run, column, value, words):
    path = store / "crops.parquet"
    table = read_table(path, MANIFEST_COLUMNS)
    table.loc[table.index[table["malignancy_votes"].notna()][0], column] = value
    path.write_bytes(table_bytes(table, MANIFEST_COLUMNS))
    report = run(["verify", store])
    assert report.returncode == 4
    assert words in report.stderr


def test_the_tables_written_are_the_tables_read(said, tmp_path):
    source = read_source(said, None, TablePaths())
    write_tables(source, tmp_path / "csv")
    again = read_malignancy(tmp_path / "csv" / "annotations_with_malignancy.csv").frame
    pd.testing.assert_frame_equal(again, source.malignancy[list(again)])
    pd.testing.assert_frame_equal(read_annotations(tmp_path / "csv" / "annotations.csv").frame, source.annotations)


def test_titles_and_figures_name_them(store, run):
    opened = open_store(store)
    rated = opened.manifest[opened.manifest["malignancy_votes"].notna() & (opened.manifest["subtype"] == "G")].iloc[0]
    what = candidate_text(rated).splitlines()[0]
    assert "rated 2,4,5 (mean 3.7) · G (squamous cell carcinoma)" in what
    figures = store_info(opened)
    nodules = opened.manifest[opened.manifest["is_nodule"]]
    assert figures["subtype"] == nodules["subtype"].value_counts().to_dict()
    assert figures["malignancy_mean"] == pytest.approx(np.mean([2, 4, 5]))
    text = format_info(figures)
    assert "mean rating 3.67 of 5" in text
    assert "A (adenocarcinoma)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(run(["info", store, "--json"]).stdout)["subtype"] == figures["subtype"]
