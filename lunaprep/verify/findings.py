"""What verify says: one finding a problem, and the report that gathers them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]

MOST_ALIKE = 100
"""Findings of one code on one file that are told singly; the rest is counted."""


@dataclass(frozen=True)
class Finding:
    """One problem of a store.

    Parameters
    ----------
    code : str
        What kind of problem; stable, in kebab case (listed in ``lunaprep/verify/__init__.py``).
    severity : {"error", "warning"}
        An error is damage; a warning is worth knowing.
    place : str
        The file at fault, relative to the store (or to the data folder, for a source scan).
    message : str
        What, got, expected, what to do; one line.
    shard_id, shard_row, series_uid, candidate_id
        The crop or scan concerned, where the problem has one.
    """

    code: str
    severity: Severity
    place: str
    message: str
    shard_id: str | None = None
    shard_row: int | None = None
    series_uid: str | None = None
    candidate_id: int | None = None

    def line(self) -> str:
        """Return the finding as one printable line, whatever is in the file names."""
        where = [
            f"{name} {value}"
            for name, value in (
                ("row", self.shard_row),
                ("series", self.series_uid),
                ("candidate", self.candidate_id),
            )
            if value is not None
        ]
        place = ", ".join([self.place, *where])
        return _printable(f"{self.severity}: {place}: {self.message} [{self.code}]")


@dataclass(frozen=True)
class VerifyReport:
    """All findings of one run, errors before warnings, each in the order found."""

    level: str
    findings: tuple[Finding, ...]
    counts: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """Whether no error was found (warnings may be)."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as one flat object for ``json.dumps``."""
        return {
            "ok": self.ok,
            "level": self.level,
            **self.counts,
            "findings": [{k: v for k, v in asdict(f).items() if v is not None} for f in self.findings],
        }


class Findings:
    """Gathers findings; of many alike on one file it keeps the first and counts the rest."""

    def __init__(self) -> None:
        self._kept: list[Finding] = []
        self._alike: Counter[tuple[str, Severity, str]] = Counter()

    def error(self, code: str, place: str, message: str, **crop: Any) -> None:
        """Add an error; `crop` are the optional fields of `Finding`."""
        self._add(Finding(code, "error", place, message, **crop))

    def warning(self, code: str, place: str, message: str, **crop: Any) -> None:
        """Add a warning; `crop` are the optional fields of `Finding`."""
        self._add(Finding(code, "warning", place, message, **crop))

    def extend(self, findings: list[Finding]) -> None:
        """Add findings made elsewhere."""
        for finding in findings:
            self._add(finding)

    def count(self, code: str, place: str, more: int) -> None:
        """Count `more` errors of a code on a file without telling them singly."""
        self._alike[code, "error", place] += more

    def absorb(self, other: "Findings") -> None:
        """Add what another one gathered."""
        self.extend(other._kept)
        self._alike += other._alike - Counter((f.code, f.severity, f.place) for f in other._kept)

    def _add(self, finding: Finding) -> None:
        alike = finding.code, finding.severity, finding.place
        self._alike[alike] += 1
        if self._alike[alike] <= MOST_ALIKE:
            self._kept.append(finding)

    def as_tuple(self) -> tuple[Finding, ...]:
        """Return what was found, errors first, ending with the counts of those left out."""
        told = Counter((f.code, f.severity, f.place) for f in self._kept)
        rest = [
            Finding(code, severity, place, f"and {n - told[code, severity, place]} more of this kind")
            for (code, severity, place), n in self._alike.items()
            if n > told[code, severity, place]
        ]
        return tuple(sorted([*self._kept, *rest], key=lambda f: f.severity != "error"))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
