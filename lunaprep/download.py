"""A download held against its data sheet: what is there, what is missing, what was changed."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaprep.datasheet import load_sheet
from lunaprep.errors import LunaprepError, ScanError, UsageError
from lunaprep.sources.advice import SUBSET, looks_like_dicom, no_luna16
from lunaprep.sources.phantom import MARKER_FILE, MAX_SUBSETS
from lunaprep.store.record import read_record

if TYPE_CHECKING:
    from lunaprep.scans.scan import Scan
    from lunaprep.verify.findings import Finding, Findings

MOST_NAMED = 10
"""Missing series named in the account; `DataReport.to_json` has all."""

MOST_TABLE_BYTES = 1 << 30

ROLES = {"readings": "lidc", "boxes": "lung-pet-ct-dx"}
"""Inputs that only one source has."""


@dataclass(frozen=True)
class SubsetAccount:
    """Scans of one subset folder; `expected` is None where the sheet has no number for it."""

    subset: int
    found: int
    unreadable: int
    expected: int | None


@dataclass(frozen=True)
class TableAccount:
    """One table of the sheet: where it was found (or None), its rows, and whether it is the known one."""

    name: str
    path: str | None
    rows: int | None
    expected_rows: int | None
    is_known: bool | None


@dataclass(frozen=True)
class DataReport:
    """What a data folder has of what its sheet says it should.

    Parameters
    ----------
    sheet : str
        Name of the data sheet.
    title : str
        What the data set is called.
    expected : int or None
        Scans of a complete copy.
    subsets : tuple of SubsetAccount
        All subsets of the sheet or on disk.
    tables : tuple of TableAccount
        The sheet's tables.
    missing : tuple of str
        Series of the series list that aren't on disk.
    flipped : tuple of str
        Series whose index axes run against the patient's.
    notes : tuple of str
        Worth knowing, no fault.
    findings : tuple of Finding
        Errors and warnings.
    """

    sheet: str
    title: str
    expected: int | None
    subsets: tuple[SubsetAccount, ...]
    tables: tuple[TableAccount, ...]
    missing: tuple[str, ...]
    flipped: tuple[str, ...]
    notes: tuple[str, ...]
    findings: "tuple[Finding, ...]"

    @property
    def ok(self) -> bool:
        """Whether no error was found. A whole subset that isn't there is a warning: many work with a few."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def found(self) -> int:
        """Scans on disk, each series once to a subset, readable or not."""
        return sum(subset.found for subset in self.subsets)

    def account(self) -> str:
        """Return the one-line account, such as ``887 of 888 scans: 1 missing (subset3: 88 of 89)``."""
        unreadable = sum(subset.unreadable for subset in self.subsets)
        parts = []
        if self.expected is not None and self.found < self.expected:
            short = [s for s in self.subsets if s.expected is not None and s.found < s.expected]
            where = ", ".join(f"subset{s.subset}: {s.found} of {s.expected}" for s in short if s.found)
            absent = [str(s.subset) for s in short if not s.found]
            gone = f"no subset {', '.join(absent)}" if absent else ""
            parts.append(f"{self.expected - self.found} missing ({'; '.join(p for p in (gone, where) if p)})")
        if unreadable:
            parts.append(f"{unreadable} unreadable")
        total = f"{self.found} of {self.expected} scans" if self.expected is not None else f"{self.found} scans"
        return f"{total}: {', '.join(parts)}" if parts else f"{total}: all there" if self.expected else total

    def text(self) -> str:
        """Return the account for people, several lines."""
        lines = [f"{self.title}", self.account()]
        for table in self.tables:
            state = "missing" if table.path is None else f"{table.rows} rows"
            known = {True: ", as published", False: ", changed", None: ""}[table.is_known]
            lines.append(f"{table.name}: {state}{known}")
        named = list(self.missing[:MOST_NAMED])
        lines += [f"not on disk: {uid}" for uid in named]
        if len(self.missing) > len(named):
            lines.append(f"not on disk: {len(self.missing) - len(named)} more series")
        return "\n".join([*lines, *self.notes, *(finding.line() for finding in self.findings)])

    def to_json(self) -> dict[str, Any]:
        """Return the report under the one key ``data``, so that it can stand beside a store's report."""
        from dataclasses import asdict

        value = {k: v for k, v in asdict(self).items() if k != "findings"}
        value["findings"] = [{k: v for k, v in asdict(f).items() if v is not None} for f in self.findings]
        return {"data": {"ok": self.ok, "account": self.account(), "found": self.found, **value}}


@dataclass
class _Copy:
    """What lies on disk: headers by series and subset, and the scans that could be opened."""

    paths: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    subset_of: dict[Path, int] = field(default_factory=dict)
    scans: "dict[Path, Scan]" = field(default_factory=dict)

    def count(self, subset: int) -> tuple[int, int]:
        """Scans of a subset, and how many of them can't be read."""
        paths = [path for path, its in self.subset_of.items() if its == subset]
        return len(paths), sum(path not in self.scans for path in paths)


def check_data(data: Path, sheet: str | None = None, progress: Callable[[int, int], None] | None = None) -> DataReport:
    """Hold a download against its data sheet: scans, headers and sizes, tables, oddities.

    Parameters
    ----------
    data : Path
        Folder with the subset folders and the tables.
    sheet : str, optional
        Name of the data sheet; without one the phantom's, where `lunaprep phantom` made the folder, else LUNA16's.
    progress : callable, optional
        Called with scans opened and scans in all, after each.

    Raises
    ------
    UsageError
        No such folder or sheet.
    """
    from lunaprep.verify.findings import Findings

    data = Path(data)
    if not data.is_dir():
        message = f"{data}: no such folder; give --data the folder that holds subset0 to subset9"
        raise UsageError(message)
    sheet = sheet or ("phantom" if (data / MARKER_FILE).is_file() else "luna16")
    known = load_sheet(sheet)
    if sheet == "phantom":
        known["counts"] = _phantom_counts(data / MARKER_FILE)
    found = Findings()
    copy = _open_all(data, found, progress or (lambda done, total: None))
    subsets = _check_subsets(known, copy, found)
    tables, series = _check_tables(known, data, found)
    missing = tuple(sorted(series - set(copy.paths)))
    _check_series(copy, series, missing, found)
    flipped = tuple(sorted(s.series_uid for s in copy.scans.values() if s.geometry.is_flipped))
    notes = [*_flip_notes(known, copy, flipped, found), *_patient_notes(known, copy)]
    counts = known.get("counts", {})
    slices = sum(scan.geometry.shape_irc[0] for scan in copy.scans.values())
    notes.append(f"{slices} slices" + (f"; {counts['slices']} in a complete copy" if "slices" in counts else ""))
    return DataReport(
        sheet=sheet,
        title=known["dataset"]["title"],
        expected=counts.get("series"),
        subsets=subsets,
        tables=tables,
        missing=missing,
        flipped=flipped,
        notes=tuple(notes),
        findings=found.as_tuple(),
    )


def _phantom_counts(marker: Path) -> dict[str, Any]:
    """What a phantom should hold, by the file it was begun with; nothing where that doesn't say."""
    try:
        made = json.loads(marker.read_bytes())
        scans, subsets = int(made["num_scans"]), int(made["num_subsets"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if scans < 1 or not 1 <= subsets <= MAX_SUBSETS:
        return {}
    return {"series": scans, "subsets": [len(range(k, scans, subsets)) for k in range(min(scans, subsets))]}


def _open_all(data: Path, found: "Findings", progress: Callable[[int, int], None]) -> _Copy:
    from lunaprep.scans.open import SUFFIXES, open_scan

    copy = _Copy()
    for folder in sorted(data.glob("subset*")):
        number = SUBSET.fullmatch(folder.name)
        if number is None or not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
            if suffix is None:
                continue
            uid = path.name.removesuffix(suffix)
            copy.paths[uid].append(path)
            copy.subset_of[path] = int(number[1])
    for done, path in enumerate(copy.subset_of, 1):
        place = path.relative_to(data).as_posix()
        try:
            copy.scans[path] = open_scan(path, path.parent)  # as in a build: the folder may be a link to another disk
        except ScanError as error:
            suffix = next(s for s in SUFFIXES if path.name.endswith(s))
            found.error("scan-unreadable", place, str(error), series_uid=path.name.removesuffix(suffix))
        progress(done, len(copy.subset_of))
    for uid, paths in sorted(copy.paths.items()):
        if len(paths) > 1:
            places = ", ".join(path.relative_to(data).as_posix() for path in paths)
            message = f"the series stands {len(paths)} times: {places}; keep one"
            found.error("duplicate-series", paths[0].relative_to(data).as_posix(), message, series_uid=uid)
    return copy


def _check_subsets(known: dict[str, Any], copy: _Copy, found: "Findings") -> tuple[SubsetAccount, ...]:
    expected = dict(enumerate(known.get("counts", {}).get("subsets", [])))
    accounts = []
    for subset in sorted({*expected, *copy.subset_of.values()}):
        number, unreadable = copy.count(subset)
        accounts.append(SubsetAccount(subset, number, unreadable, expected.get(subset)))
        place, wanted = f"subset{subset}", expected.get(subset)
        if not number:
            found.warning("subset-missing", place, f"not there; a complete copy has {wanted} scans in it")
        elif wanted is None and expected:
            found.warning("subset-unknown", place, f"{number} scans in a subset that {known['dataset']['name']} hasn't")
        elif wanted is not None and number != wanted:
            found.error("subset-incomplete", place, f"{number} of {wanted} scans; unpack its archive again")
    return tuple(accounts)


def _check_tables(known: dict[str, Any], data: Path, found: "Findings") -> tuple[tuple[TableAccount, ...], set[str]]:
    """Return the account of each table, and the series of the series list (empty without one)."""
    layout = known.get("tables", {})
    accounts, series, roles = [], set[str](), set()
    for entry in known.get("files", []):
        paths = [data / folder / entry["name"] for folder in layout.get("csv_folders", [""])]
        path = next((p for p in paths if p.is_file()), None)
        raw = _read_table(path, data, found) if path is not None else None
        if raw is None:
            accounts.append(TableAccount(entry["name"], None, None, entry.get("rows"), None))
            continue
        roles.add(entry["role"])
        account = _account_table(entry, str(path.relative_to(data)) if path else "", raw)
        accounts.append(account)
        _tell_table(entry, account, raw, found)
        if entry["role"] == "series":
            series = {line.strip().decode("latin-1") for line in raw.splitlines() if line.strip()}
    names = {
        role: [e["name"] for e in known.get("files", []) if e["role"] == role] for role in layout.get("needed", [])
    }
    for role, choice in names.items():
        if role not in roles:
            found.error("table-missing", choice[0], f"no {' or '.join(choice)}; a build needs it")
    for account in accounts:
        if account.path is None and not any(account.name in choice for choice in names.values()):
            found.warning("table-missing", account.name, "isn't there; a build doesn't need it, the FROC does")
    return tuple(accounts), series


def _read_table(path: Path, data: Path, found: "Findings") -> bytes | None:
    try:
        if path.stat().st_size <= MOST_TABLE_BYTES:
            return path.read_bytes()
        problem = f"has more than {MOST_TABLE_BYTES} bytes"
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    found.error("table-unreadable", path.relative_to(data).as_posix(), problem)
    return None


def _account_table(entry: dict[str, Any], path: str, raw: bytes) -> TableAccount:
    rows = sum(bool(line.strip()) for line in raw.splitlines()) - entry.get("header", True)
    is_known = None
    if "sha256" in entry:
        forms = (raw, raw.replace(b"\r\n", b"\n"))
        is_known = any(hashlib.sha256(form).hexdigest() == entry["sha256"] for form in forms)
    return TableAccount(entry["name"], path, rows, entry.get("rows"), is_known)


def _tell_table(entry: dict[str, Any], account: TableAccount, raw: bytes, found: "Findings") -> None:
    place = str(account.path)
    if account.expected_rows is not None and account.rows != account.expected_rows:
        found.error("table-differs", place, f"{account.rows} rows, expected {account.expected_rows}; fetch it again")
    elif account.is_known is False:
        message = f"{account.rows} rows as expected, but its bytes aren't the published ones (sha256, line ends aside)"
        found.error("table-differs", place, message)
    if "positives" in entry:
        positives = sum(line.rstrip().endswith(b",1") for line in raw.splitlines())
        if positives != entry["positives"]:
            found.error("table-differs", place, f"{positives} rows of class 1, expected {entry['positives']}")


def _check_series(copy: _Copy, series: set[str], missing: tuple[str, ...], found: "Findings") -> None:
    if not series:
        return
    for uid in sorted(set(copy.paths) - series):
        path = copy.paths[uid][0]
        message = "isn't in the series list; is it of another data set?"
        found.warning("series-unknown", f"{path.parent.name}/{path.name}", message, series_uid=uid)
    if missing:
        message = f"{len(missing)} of {len(series)} listed series aren't on disk"
        found.warning("series-missing", "seriesuids.csv", message)


def _flip_notes(known: dict[str, Any], copy: _Copy, flipped: tuple[str, ...], found: "Findings") -> list[str]:
    lists, counts = known.get("flipped", {}), known.get("counts", {})
    opened = {scan.series_uid for scan in copy.scans.values()}
    for uid in lists.get("certain", []):
        if uid in opened and uid not in flipped:
            message = "its header says it isn't flipped, the data sheet says it is: were the scans converted?"
            found.warning("flip-differs", copy.paths[uid][0].name, message, series_uid=uid)
    if "flipped" not in counts:
        return [f"{len(flipped)} flipped scans"]
    if len(opened) == counts["series"] and len(flipped) != counts["flipped"]:
        message = f"{len(flipped)} flipped scans in a complete copy, expected {counts['flipped']}"
        found.warning("flip-differs", "subset*", message)
    named = sum(uid in flipped for group in lists.values() for uid in group)
    return [
        f"{len(flipped)} flipped scans, {named} of them named in the sheet ({counts['flipped']} in a complete copy)"
    ]


def _patient_notes(known: dict[str, Any], copy: _Copy) -> list[str]:
    notes = []
    for patient, uids in known.get("patients", {}).items():
        here = [uid for uid in uids if uid in copy.paths]
        if len(here) > 1:
            notes.append(f"patient {patient} has {len(here)} scans: {', '.join(here)}")
    return notes


def source_of(data: Path, store: Path | None) -> str:
    """Which data set a folder is a copy of, where nobody says: the store's that is verified with it, else LUNA16.

    Raises
    ------
    UsageError
        A folder of DICOM, and no store that was built from it.
    """
    roles = set()
    if store is not None:
        try:
            roles = {str(item.get("role")) for item in read_record(store)["inputs"]}
        except (LunaprepError, AttributeError):
            store = None  # damaged, which verify tells
    if roles & ROLES.keys():
        return next(source for role, source in ROLES.items() if role in roles)
    if any(data.glob("subset*")) or not looks_like_dicom(data):
        return "luna16"
    if store is not None:
        return "dicom"
    raise UsageError(no_luna16(data))
