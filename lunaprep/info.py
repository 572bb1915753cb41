"""What is in a store: its figures, as a dictionary or a text, and its candidates and series by name."""

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lunaprep import schema
from lunaprep.errors import UsageError

if TYPE_CHECKING:
    from lunaprep.store.reader import Store

DIAMETER_EDGES = (0, 3, 5, 8, 10, 15, 20, 30)
"""Lower bounds of the diameter bins, mm; the last has no upper one."""

INDEX = ["index", "row", "col"]
MAX_FAILED = 10
MAX_SUBTYPES = 12
MIN_SUFFIX = 6
WIDTH = 80


def _diameter_bins(diameters: "pd.Series[float]") -> list[dict[str, Any]]:
    """Number of nodules from each lower bound up to, not including, the next; last those without a diameter."""
    values = diameters.dropna().to_numpy()
    counts, _ = np.histogram(values, [*DIAMETER_EDGES, np.inf])
    uppers = [*DIAMETER_EDGES[1:], None]
    bins: list[dict[str, Any]] = [
        {"from_mm": low, "to_mm": high, "nodules": int(n)}
        for low, high, n in zip(DIAMETER_EDGES, uppers, counts, strict=True)
    ]
    return [*bins, {"from_mm": None, "to_mm": None, "nodules": int(diameters.isna().sum())}]


def _by_subset(manifest: pd.DataFrame, scans: pd.DataFrame) -> list[dict[str, int]]:
    """Scans that are in and that failed, crops, nodules, and crops by `split_series`, of each subset."""
    table = pd.DataFrame(
        {
            "scans": scans[scans["status"] == "ok"].groupby("subset").size(),
            "failed": scans[scans["status"] != "ok"].groupby("subset").size(),
            "crops": manifest.groupby("subset").size(),
            "nodules": manifest.groupby("subset")["is_nodule"].sum(),
            **{s: manifest[manifest["split_series"] == s].groupby("subset").size() for s in schema.SPLITS},
        }
    )
    rows = table.fillna(0).astype(int).sort_index().reset_index(names="subset").to_dict("records")
    return [{str(key): int(value) for key, value in row.items()} for row in rows]


def _by_split(manifest: pd.DataFrame, column: str) -> dict[str, dict[str, int]]:
    """Crops, nodules and series in the train and the val part of a split."""
    parts = {name: manifest[manifest[column] == name] for name in schema.SPLITS}
    return {
        name: {"crops": len(p), "nodules": int(p["is_nodule"].sum()), "series": int(p["series_uid"].nunique())}
        for name, p in parts.items()
    }


def _counts(manifest: pd.DataFrame, scans: pd.DataFrame, recorded: Mapping[str, int]) -> dict[str, int]:
    """How many there are of everything; slabs as `recorded` in store.json, where there are any."""
    nodules, ok = manifest[manifest["is_nodule"]], scans[scans["status"] == "ok"]
    slabs = {key: int(recorded[key]) for key in ("slabs", "slabs_positive") if key in recorded}
    return {
        **slabs,
        "scans_with_lungs": int(ok["lung_box"].notna().sum()),
        "scans_ok": len(ok),
        "scans_failed": len(scans) - len(ok),
        "volumes": int(ok["volume_file"].notna().sum()),
        "patients": int(ok["patient_id"].nunique()),
        "scans_without_patient": int(ok["patient_id"].isna().sum()),
        "crops": len(manifest),
        "nodules": len(nodules),
        "annotations": int(nodules["annotation_id"].nunique()),
        "padded_crops": int(manifest["is_padded"].sum()),
    }


def _malignancy(nodules: pd.DataFrame) -> dict[str, int]:
    """Nodules that are malignant, benign, or of which it is not known."""
    known = nodules["is_malignant"].dropna().astype(bool)
    return {"malignant": int(known.sum()), "benign": int((~known).sum()), "unknown": len(nodules) - len(known)}


def _subtypes(nodules: pd.DataFrame) -> dict[str, int]:
    """Nodules of each subtype, the commonest first."""
    counts = nodules["subtype"].dropna().astype(str).value_counts()
    return {name: int(counts[name]) for name in sorted(counts.index, key=lambda name: (-counts[name], name))}


def store_info(store: "Store") -> dict[str, Any]:
    """Figures of a store, ready for JSON.

    Parameters
    ----------
    store : Store
        An opened store; only its tables are looked at.

    Returns
    -------
    dict
        ``store_id``, ``parameters``, ``dtype``, ``counts``, ``bytes``, ``by_class``, ``by_split`` (of ``split_series``
        and ``split_candidate``), ``by_subset`` (a list; train and val as in ``split_series``), ``by_diameter`` (a list
        of bins ``from_mm <= d < to_mm``; the last, both null, counts nodules without a diameter), ``diameter_mm``
        (median and largest, or null), ``malignancy`` and ``subtype`` (counts of nodules), ``malignancy_mean`` (of their
        mean ratings, or null) and ``failed`` (a list). A nodule here is a
        candidate of that class; ``counts.annotations`` are the annotated nodules they belong to.
    """
    manifest, scans = store.manifest, store.scans
    nodules, failed = manifest[manifest["is_nodule"]], scans[scans["status"] != "ok"]
    sizes, rated = nodules["diameter_mm"].dropna(), nodules["malignancy_mean"].dropna()
    reasons = [None if pd.isna(reason) else str(reason) for reason in failed["reason"]]
    one = schema.crop_bytes(store.crop_shape, str(store.dtype))
    slabs = store.record.get("slabs", {"shards": []})["shards"]
    sizes_of = {"crops": len(manifest) * one, "volumes": int(scans["volume_bytes"].dropna().sum())}
    sizes_of["slabs"] = sum(int(shard["bytes"]) + int(shard["mask_bytes"]) for shard in slabs)
    return {
        "store_id": store.record["store_id"],
        "parameters": dict(store.parameters),
        "dtype": str(store.dtype),
        "counts": _counts(manifest, scans, store.record.get("counts", {})),
        "bytes": sizes_of,
        "by_class": {"nodule": len(nodules), "other": len(manifest) - len(nodules)},
        "by_split": {name: _by_split(manifest, name) for name in ("split_series", "split_candidate")},
        "by_subset": _by_subset(manifest, scans),
        "by_diameter": _diameter_bins(nodules["diameter_mm"]),
        "diameter_mm": {
            "median": float(sizes.median()) if len(sizes) else None,
            "largest": float(sizes.max()) if len(sizes) else None,
        },
        "malignancy": _malignancy(nodules),
        "malignancy_mean": float(rated.mean()) if len(rated) else None,
        "subtype": _subtypes(nodules),
        "failed": [
            {"series_uid": str(uid), "subset": int(subset), "reason": reason}
            for uid, subset, reason in zip(failed["series_uid"], failed["subset"], reasons, strict=True)
        ],
    }


def _plural(number: int, word: str) -> str:
    """``1 scan``, ``2,000 scans``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    """``12.3 GiB``."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(np.log2(max(num_bytes, 1)) // 10), len(units) - 1)
    return f"{num_bytes / 1024**power:.{min(power, 1)}f} {units[power]}"


def _bar(share: float, width: int) -> str:
    """Bar of `share` of `width` characters, to an eighth of one; something wherever there is something.

    >>> _bar(0.5, 3), _bar(0, 3), _bar(1e-9, 3)
    ('█▌', '', '▏')
    """
    eighths = max(round(share * width * 8), int(share > 0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _wrapped(label: str, parts: list[str]) -> list[str]:
    """Label in a column of its own, then the parts with dots between, broken where the line is full."""
    text = " · ".join(parts).replace(" ", "\u00a0").replace("\u00a0·\u00a0", "\u00a0· ")
    lines = textwrap.wrap(text, WIDTH - 14, break_on_hyphens=False) or [""]
    return [f"{label if k == 0 else '':<12}  {line}".replace("\u00a0", " ").rstrip() for k, line in enumerate(lines)]


def _header(info: Mapping[str, Any]) -> list[str]:
    """What the store is and how it was made."""
    counts, parameters = info["counts"], info["parameters"]
    people = [_plural(counts["patients"], "patient")] if counts["patients"] else []
    of = f" of {_plural(counts['annotations'], 'annotated nodule')}" if counts["annotations"] else ""
    scans = _plural(counts["scans_ok"], "scan") + f" ({counts['scans_failed']:,} failed)" * bool(counts["scans_failed"])
    sizes = info["bytes"]
    low, high = parameters["hu"]
    shape = " × ".join(str(side) for side in parameters["crop_shape"])
    padded = f"{counts['padded_crops']:,} padded at the border"
    spacing = [spacing_text(parameters["resample_mm"])] if "resample_mm" in parameters else []
    volumes = [_plural(counts["volumes"], "volume"), _size(sizes["volumes"])] if counts["volumes"] else ["none"]
    made = [
        f"HU {low:g} to {high:g}".replace("-", "−"),
        f"edge {parameters['edge']}",
        f"match {parameters['match']}",
    ]
    return [
        *_wrapped("store", [info["store_id"]]),
        *_wrapped("holds", [scans, *people, _plural(counts["crops"], "crop")]),
        *_wrapped("nodules", [_plural(counts["nodules"], "crop") + of]),
        *_wrapped("crops", [shape, *spacing, info["dtype"], _size(sizes["crops"]), padded]),
        *_wrapped("volumes", volumes),
        *_wrapped("targets", _targets(counts, sizes)),
        *_wrapped("made with", [*made, f"every {parameters['val_stride']}th to val"]),
    ]


def _targets(counts: Mapping[str, int], sizes: Mapping[str, int]) -> list[str]:
    """What a segmentation is trained on."""
    if "slabs" not in counts:
        return ["none"]
    slabs = f"{_plural(counts['slabs'], 'slab')}, {counts['slabs_positive']:,} with nodule"
    return [slabs, _size(sizes["slabs"]), f"lungs in {_plural(counts['scans_with_lungs'], 'scan')}"]


def _subset_table(info: Mapping[str, Any]) -> list[str]:
    """A line per subset and the sum; train and val are crops by `split_series`."""
    names = ["scans", "failed", "crops", "nodules", "train", "val"]
    rows = info["by_subset"]
    total = [f"{sum(row[name] for row in rows):,}" for name in names]
    cells = [["subset", *names], *([str(row["subset"]), *(f"{row[n]:,}" for n in names)] for row in rows)]
    lines = [
        "".join(f"{cell:>{6 if k == 0 else 11}}" for k, cell in enumerate(row)) for row in [*cells, ["all", *total]]
    ]
    rule = "─" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _histogram(info: Mapping[str, Any]) -> list[str]:
    """Nodule crops by diameter, as bars."""
    bins, sizes = info["by_diameter"], info["diameter_mm"]
    if not info["counts"]["nodules"]:
        return ["Nodules by diameter: none"]
    title = "Nodules by diameter"
    if sizes["median"] is not None:
        title += f" (median {sizes['median']:.1f} mm, largest {sizes['largest']:.1f} mm)"
    most, lines = max(b["nodules"] for b in bins), [title]
    for b in bins:
        low, high = b["from_mm"], b["to_mm"]
        if b["nodules"] == 0 and low in (0, None):
            continue
        label = (
            "unmatched"
            if low is None
            else f"≥ {low} mm"
            if high is None
            else f"{low}–{high} mm"
            if low
            else f"< {high} mm"
        )
        lines.append(f"{label:>12}  {_bar(b['nodules'] / most, WIDTH - 23)} {b['nodules']:,}".rstrip())
    return lines


def _failures(info: Mapping[str, Any]) -> list[str]:
    """The scans that failed, with their reasons."""
    failed = info["failed"]
    lines = ["Failed scans"] if failed else []
    for scan in failed[:MAX_FAILED]:
        reason = printable(" ".join((scan["reason"] or "no reason recorded").split()))
        lines.append(f"  {short_uid(scan['series_uid'], 64)}, subset {scan['subset']}"[:WIDTH])
        lines += textwrap.wrap(reason, WIDTH, initial_indent="    ", subsequent_indent="    ")
    if len(failed) > MAX_FAILED:
        lines.append(f"  … and {len(failed) - MAX_FAILED:,} more: see {schema.SCANS_FILE}")
    return lines


def format_info(info: Mapping[str, Any]) -> str:
    """Text of `store_info`'s figures for a terminal, at most 80 columns wide, without a newline at the end."""
    lines = []
    for label, split in (("by series", "split_series"), ("by candidate", "split_candidate")):
        parts = info["by_split"][split].items()
        lines += _wrapped(label, [f"{k} {p['crops']:,} ({_plural(p['nodules'], 'nodule')})" for k, p in parts])
    rated = [] if info["malignancy_mean"] is None else [f"mean rating {info['malignancy_mean']:.2f} of 5"]
    lines += _wrapped("malignancy", [f"{n:,} {name}" for name, n in info["malignancy"].items()] + rated)
    subtypes = list(info["subtype"].items())[:MAX_SUBTYPES]
    lines += _wrapped("subtype", [f"{n:,} {subtype_title(name)}" for name, n in subtypes]) if subtypes else []
    blocks = [_header(info), _subset_table(info), lines, _histogram(info), _failures(info)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def printable(text: str) -> str:
    """Text with each character that would not print (a control or an escape) as ``?``."""
    return "".join(c if c.isprintable() else "?" for c in text)


def spacing_text(resample_mm: Sequence[float]) -> str:
    """What a voxel of a resampled crop measures.

    >>> spacing_text([1.0, 1.0, 1.0]), spacing_text((1.25, 0.7, 0.7))
    ('resampled to 1 mm', 'resampled to 1.25 × 0.7 × 0.7 mm')
    """
    sides = resample_mm[:1] if len(set(resample_mm)) == 1 else resample_mm
    return f"resampled to {' × '.join(f'{mm:g}' for mm in sides)} mm"


def short_uid(series_uid: str, width: int = 40) -> str:
    """Series UID shortened in the middle to at most `width` characters.

    >>> short_uid("1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192", 22)
    '1.3.6.1.4…59720603192'
    """
    uid = printable(series_uid)
    if len(uid) <= width:
        return uid
    head = (width - 1) // 2
    return f"{uid[:head].rstrip('.')}…{uid[-(width - 1 - head) :]}"


def find_candidate(store: "Store", candidate_id: int) -> int:
    """Row in the manifest of a candidate; `UsageError` if there is none."""
    ids = store.manifest["candidate_id"].to_numpy()
    rows = np.flatnonzero(ids == candidate_id)
    if len(rows):
        return int(rows[0])
    if not len(ids):
        msg = f"candidate {candidate_id}: the store has no candidate at all"
        raise UsageError(msg)
    nearest = ids[np.abs(ids - candidate_id).argmin()]
    msg = f"candidate {candidate_id}: not among the store's {_plural(len(ids), 'candidate')}, whose ids lie between "
    msg += f"{ids.min()} and {ids.max()}; the nearest is {nearest}"
    raise UsageError(msg)


def find_series(store: "Store", series_uid: str) -> dict[str, Any]:
    """Row of the scan table that has this series UID, or alone ends with it (6 characters or more).

    Raises
    ------
    UsageError
        There is none (the message names up to 3 similar ones), or several, or the scan failed.
    """
    scans, name = store.scans, printable(series_uid)
    uids = scans["series_uid"].astype(str)
    found = scans[uids == series_uid]
    if not len(found) and len(series_uid) >= MIN_SUFFIX:
        found = scans[uids.str.endswith(series_uid)]
    if found["series_uid"].nunique() > 1:
        some = ", ".join(found["series_uid"].iloc[:3])
        msg = f"series {name}: {found['series_uid'].nunique()} series end with it ({some}); give more of it"
        raise UsageError(msg)
    if not len(found):
        tails = {uid[-len(series_uid) :]: uid for uid in uids} if series_uid else {}
        similar = ", ".join(tails[t] for t in difflib.get_close_matches(series_uid, tails, 3, 0.6))
        hint = f"similar: {similar}" if similar else f"give a whole UID or at least its last {MIN_SUFFIX} characters"
        msg = f"series {name}: not among the store's {_plural(len(uids), 'scan')}; {hint}"
        raise UsageError(msg)
    usable = found[found["status"] == "ok"]
    if not len(usable):
        msg = f"series {name}: not in the store, its scan failed: {found['reason'].iloc[0]}"
        raise UsageError(printable(" ".join(msg.split())))
    return {str(key): value for key, value in usable.iloc[0].items()}


def _opinions(record: "pd.Series[Any]") -> list[str]:
    """What the store says of a nodule: malignant or not, its ratings, its subtype."""
    said = []
    if not pd.isna(record["is_malignant"]):
        said.append("malignant" if record["is_malignant"] else "benign")
    if not pd.isna(record["malignancy_votes"]):
        votes = printable(str(record["malignancy_votes"]))
        said.append(f"rated {votes} (mean {record['malignancy_mean']:.1f})")
    if not pd.isna(record["subtype"]):
        said.append(subtype_title(record["subtype"]))
    return said


def subtype_title(subtype: object) -> str:
    """A subtype with what its letter stands for: ``A (adenocarcinoma)``."""
    name = schema.SUBTYPE_NAMES.get(str(subtype))
    return printable(str(subtype)[:40]) + (f" ({name})" if name else "")


def candidate_text(record: "pd.Series[Any]") -> str:
    """Title of a candidate's picture, three lines: what it is, where it is in the store, where in the patient."""
    what = "not a nodule"
    if record["is_nodule"]:
        what = (
            "nodule, diameter unknown" if pd.isna(record["diameter_mm"]) else f"nodule, {record['diameter_mm']:.1f} mm"
        )
        what += "".join(f" · {said}" for said in _opinions(record))
    where = [f"series {short_uid(record['series_uid'])}", f"subset {record['subset']}"]
    if not pd.isna(record["patient_id"]):
        where.insert(1, f"patient {printable(str(record['patient_id']))}")
    where.append(f"split: {record['split_series']} by series, {record['split_candidate']} by candidate")
    x, y, z = (f"{record[f'{axis}_mm']:.1f}".replace("-", "−") for axis in "xyz")
    place = [
        f"x {x}, y {y}, z {z} mm",
        f"slice {record['index']}, row {record['row']}, column {record['col']}",
    ]
    if record["is_padded"]:
        place.append("crop padded where it leaves the scan")
    return f"Candidate {record['candidate_id']} · {what}\n{' · '.join(where)}\n{' · '.join(place)}"


def candidate_caption(record: "pd.Series[Any]") -> str:
    """Two short lines for below a small picture of a candidate."""
    size = "" if pd.isna(record["diameter_mm"]) else f" {record['diameter_mm']:.1f} mm"
    what = f"nodule{size}" if record["is_nodule"] else "not a nodule"
    return f"{record['candidate_id']} · {what}\n{short_uid(record['series_uid'], 22)}"


def series_text(scan: Mapping[str, Any], candidates: pd.DataFrame) -> str:
    """Title of a scan's picture, two lines: which scan, and what it holds."""
    which = [f"Series {short_uid(scan['series_uid'], 64)}", f"subset {scan['subset']}"]
    if not pd.isna(scan["patient_id"]):
        which.append(printable(str(scan["patient_id"])))
    x, _, z = scan["spacing"]
    pixels = f"{int(scan['num_rows'])} × {int(scan['num_cols'])} pixels of {x:.2f} mm"
    nodules = _plural(int(candidates["is_nodule"].sum()), "nodule")
    grid = f"{int(scan['num_slices'])} slices of {z:.2f} mm, {pixels}"
    what = [grid, f"{_plural(len(candidates), 'candidate')} ({nodules})"]
    return f"{' · '.join(which)}\n{' · '.join(what)}"


def grid_of(scan: Mapping[str, Any]) -> tuple[tuple[float, float, float], tuple[bool, bool, bool]]:
    """Spacing (mm per slice, row, column) of a row of scans.parquet, and which array axes run against LPS."""
    (x, y, z), signs = scan["spacing"], np.array(scan["direction"], dtype=np.float64)[[8, 4, 0]] < 0
    return (float(z), float(y), float(x)), (bool(signs[0]), bool(signs[1]), bool(signs[2]))


def nodules_by_size(candidates: pd.DataFrame) -> pd.DataFrame:
    """Rows that are nodules, largest first, those without a diameter last."""
    return candidates[candidates["is_nodule"]].sort_values("diameter_mm", ascending=False, kind="stable")


def chosen_slices(num_slices: int, candidates: pd.DataFrame, most: int = 12) -> list[int]:
    """At most `most` slices of a scan to show: those of the largest nodules, filled up evenly."""
    if num_slices <= most:
        return list(range(num_slices))
    chosen = list(dict.fromkeys(int(i) for i in nodules_by_size(candidates)["index"]))[:most]
    free = most - len(chosen)
    return sorted({*chosen, *(int((k + 0.5) * num_slices / free) for k in range(free))})


def overview_rows(manifest: pd.DataFrame, num: int) -> tuple[npt.NDArray[np.int64], str]:
    """At most `num` manifest rows to show, half nodules evenly over the sizes, half others, and a title."""
    table = manifest.reset_index(drop=True)
    nodules, others = nodules_by_size(table).index.to_numpy(np.int64), np.flatnonzero(~table["is_nodule"].to_numpy())
    count = min(len(nodules), max(num // 2, num - len(others)))
    rest = min(len(others), num - count)
    rows = [
        part[np.linspace(0, len(part) - 1, k).round().astype(int)]
        for part, k in ((nodules, count), (others, rest))
        if k
    ]
    title = f"Nodules and other candidates\n{count} of {_plural(len(nodules), 'nodule')} (orange), largest first; "
    title += f"{rest} of {_plural(len(others), 'other candidate')} (blue)"
    return np.concatenate([nodules[:0], *rows]), title
