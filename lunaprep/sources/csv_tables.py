"""A source's tables as LUNA16 has them, for programs that read those: the challenge's FROC among them."""

from pathlib import Path

import pandas as pd

from lunaprep.sources.source import SourceData
from lunaprep.store.files import write_file

UNKNOWN_DIAMETER = -1
"""What LUNA16 writes for a finding whose size nobody measured; its FROC then takes 10 mm."""

_XYZ = {"x_mm": "coordX", "y_mm": "coordY", "z_mm": "coordZ"}


def write_tables(source: SourceData, folder: Path) -> tuple[Path, ...]:
    """Write annotations.csv, candidates.csv, seriesuids.csv, and others that the source has anything for.

    Parameters
    ----------
    source : SourceData
        What was found and read.
    folder : Path
        Where to; made if it is not there. Files of these names are replaced.

    Returns
    -------
    tuple of Path
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = source.candidates["is_nodule"].astype("int64")
    tables = {
        "annotations.csv": _as_csv(source.annotations, "diameter_mm", "subtype"),
        "candidates.csv": _as_csv(source.candidates.assign(**{"class": labels}), "class"),
        "seriesuids.csv": "".join(f"{scan.series_uid}\n" for scan in source.scans),
    }
    if source.excluded is not None:
        known = source.excluded["diameter_mm"].fillna(UNKNOWN_DIAMETER)
        tables["annotations_excluded.csv"] = _as_csv(source.excluded.assign(diameter_mm=known), "diameter_mm")
    if source.malignancy is not None and len(source.malignancy):
        tables["annotations_with_malignancy.csv"] = _malignancy_csv(source)
    for name, text in tables.items():
        write_file(folder / name, text.encode())
    return tuple(folder / name for name in tables)


def _malignancy_csv(source: SourceData) -> str:
    """Nodules whose malignancy is known, with the readers' ratings and the patient, where there are any."""
    assert source.malignancy is not None
    frame = source.malignancy.assign(mal_bool=source.malignancy["is_malignant"])
    if "malignancy_votes" in frame:
        votes = frame["malignancy_votes"]
        frame = frame.assign(mal_details=[f"[{text.replace(',', ', ')}]" if text else "" for text in votes])
    if source.patients:
        frame = frame.assign(patient_id=frame["series_uid"].map(source.patients).fillna(""))
    return _as_csv(frame, "diameter_mm", "mal_bool", "mal_details", "patient_id")


def _as_csv(frame: pd.DataFrame, *values: str) -> str:
    """Series, place and the given columns, as far as they are there."""
    columns = {"series_uid": "seriesuid", **_XYZ, **{name: name for name in values if name in frame}}
    return frame[list(columns)].rename(columns=columns).to_csv(index=False, lineterminator="\n")
