"""The crops a run was most wrong about: its predictions held against the store's manifest."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep.errors import TableError, UsageError

PREDICTIONS_FILE = "predictions.csv"
"""What an evaluation leaves in its folder, in LUNA16's submission format."""

PLACE = {"seriesuid": "series_uid", "coordX": "x_mm", "coordY": "y_mm", "coordZ": "z_mm"}
DECIMALS = 6
"""Places, mm, are told apart to a nanometre: they were read from the same tables."""


def newest_predictions(run: Path) -> Path:
    """The latest predictions.csv in a run's folder or in those in it; a file stands for itself.

    Raises
    ------
    UsageError
        There is none.
    """
    if run.is_file():
        return run
    found = sorted(run.glob(f"**/{PREDICTIONS_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        message = f"{run} holds no {PREDICTIONS_FILE}. Evaluate the run first: lunatrain eval {run}"
        raise UsageError(message)
    return found[-1]


def predicted_rows(manifest: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Rows of the manifest that a file predicts, with `row`, `is_nodule` and `probability`.

    Raises
    ------
    TableError
        Not a table of predictions, or of another store.
    """
    try:
        table = pd.read_csv(path, dtype={"seriesuid": "string"})
        given = table.rename(columns=PLACE)[[*PLACE.values(), "probability"]]
        given["probability"] = given["probability"].astype(np.float64)
        for name in ("x_mm", "y_mm", "z_mm"):
            given[name] = given[name].astype(np.float64).round(DECIMALS)
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        hint = "Of a run of several classes the report shows the worst; else run 'lunatrain eval' again"
        message = f"{path} is no table of predictions: {str(error).splitlines()[0][:100]}. {hint}"
        raise TableError(message) from error
    known = manifest[["series_uid", "x_mm", "y_mm", "z_mm", "is_nodule"]].round(DECIMALS)
    known = known.assign(row=np.arange(len(known)), series_uid=known["series_uid"].astype("string"))
    found = given.merge(known, on=list(PLACE.values()))
    if found.empty:
        message = f"none of the {len(given)} predictions of {path} is of a crop of this store. Name the run's own store"
        raise TableError(message)
    return found.drop_duplicates("row")


def worst_rows(predicted: pd.DataFrame, num: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and probabilities of the nodules called least likely and the others called most likely, half of `num` each.

    Each list begins with the worst.
    """
    is_nodule = predicted["is_nodule"].astype(bool)
    missed = predicted[is_nodule].sort_values(["probability", "row"]).head(num // 2)
    alarms = predicted[~is_nodule].sort_values(["probability", "row"], ascending=[False, True]).head(num - num // 2)
    chosen = pd.concat([missed, alarms])
    return chosen["row"].to_numpy(dtype=np.int64), chosen["probability"].to_numpy(dtype=np.float64)
