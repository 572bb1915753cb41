"""CSV tables as people have them: spoilt, odd, and odd but legal.

``CASES`` is a list of `OddTable`, shared by the reader's tests and the build's. ``case.write(path)`` makes the
file. Of its `kind`:

- ``table``: the whole table is refused, a TableError with `words`;
- ``row``: the rows on `lines` are left out, each as a RowFault, the first with `words`; `kept` rows are read;
- ``legal``: no fault, `kept` rows are read.

Good rows are of series `UID`.
"""

from pathlib import Path
from typing import Literal, NamedTuple

UID = "1.2.840.113"
HEADERS = {
    "candidates": b"seriesuid,coordX,coordY,coordZ,class\n",
    "annotations": b"seriesuid,coordX,coordY,coordZ,diameter_mm\n",
    "malignancy": b"seriesuid,coordX,coordY,coordZ,diameter_mm,mal_bool,patient_id\n",
    "patients": b"seriesuid,patient_id\n",
}
GOOD = {
    "candidates": f"{UID},1.5,-2.5,3,0\n".encode(),
    "annotations": f"{UID},1.5,-2.5,3,8.25\n".encode(),
    "malignancy": f"{UID},1.5,-2.5,3,8.25,True,P1\n".encode(),
    "patients": f"{UID},P1\n".encode(),
}
C = HEADERS["candidates"]
GOOD_C = GOOD["candidates"]


class OddTable(NamedTuple):
    """One case; `content` is None for a file that is missing, "folder" for a folder in its place."""

    name: str
    reader: Literal["candidates", "annotations", "malignancy", "patients"]
    content: bytes | Literal["folder"] | None
    words: str
    kind: Literal["table", "row", "legal"]
    lines: tuple[int, ...] = ()
    kept: int = 0

    def write(self, path: Path) -> Path:
        """Put the case at the path (which is not there yet) and return it."""
        if self.content == "folder":
            path.mkdir()
        elif isinstance(self.content, bytes):
            path.write_bytes(self.content)
        return path


CASES: list[OddTable] = []


def table(name: str, content: bytes | Literal["folder"] | None, words: str, reader: str = "candidates") -> None:
    """A table that is refused as a whole."""
    CASES.append(OddTable(name, reader, content, words, "table"))


def row(name: str, bad: bytes, words: str, reader: str = "candidates", line: int = 3) -> None:
    """A bad line between two good ones."""
    content = HEADERS[reader] + GOOD[reader] + bad + b"\n" + GOOD[reader]
    CASES.append(OddTable(name, reader, content, words, "row", (line,), 2))


def rows(name: str, content: bytes, words: str, lines: tuple[int, ...], kept: int, reader: str = "candidates") -> None:
    """Several bad lines."""
    CASES.append(OddTable(name, reader, content, words, "row", lines, kept))


def legal(name: str, content: bytes, kept: int, reader: str = "candidates") -> None:
    """Odd, but nothing is wrong with it."""
    CASES.append(OddTable(name, reader, content, "", "legal", (), kept))


# No table at all
table("missing-file", None, "No such file")
table("folder", "folder", "directory")
table("empty-file", b"", "is empty")
table("only-spaces", b"   \n", "is empty")
table("only-bom", b"\xef\xbb\xbf", "is empty")
table("first-line-blank", b"\n" + C + GOOD_C, "is empty")
table("binary-junk", bytes(range(256)) * 20, "no column seriesuid")
table("gzip", b"\x1f\x8b\x08\x00" + C + GOOD_C, "not text")
table("html", b"<html>\n<body>404 not found</body></html>\n", "no column seriesuid")
table("utf-16", (C + GOOD_C).decode().encode("utf-16"), "not text")
table("utf-16-le-without-bom", (C + GOOD_C).decode().encode("utf-16-le"), "no column seriesuid")
table("nul-before-header", b"\0" + C + GOOD_C, "no column seriesuid")
table("old-mac-line-ends", (C + GOOD_C).replace(b"\n", b"\r"), "no column")

# Columns
table("no-header", GOOD_C * 3, "no column seriesuid")
table("semicolons", (C + GOOD_C).replace(b",", b";"), "no column seriesuid")
table("tabs", (C + GOOD_C).replace(b",", b"\t"), "no column seriesuid")
table("missing-column", b"seriesuid,coordX,coordY,class\nu,1,2,0\n", "no column coordZ")
table("other-case", C.replace(b"coordX", b"coordx") + GOOD_C, "no column coordX")
table("column-twice", C.replace(b"class", b"class,coordX") + b"u,1,2,3,0,4\n", "column twice")
table("unused-column-twice", C.replace(b"class", b"class,note,note") + b"u,1,2,3,0,a,b\n", "column twice")
table("other-table", HEADERS["annotations"] + GOOD["annotations"], "no column class")
table("no-diameter", C + GOOD_C, "no column diameter_mm", "annotations")
table("no-malignancy", HEADERS["annotations"] + GOOD["annotations"], "no column mal_bool", "malignancy")
table("no-patient", b"seriesuid,patient\nu,P1\n", "no column patient_id", "patients")
table("patients-missing-file", None, "No such file", "patients")

# One bad row
row("coordinate-text", b"u,left,2,3,0", "coordX is 'left'")
row("coordinate-nan", b"u,1,nan,3,0", "coordY is 'nan'")
row("coordinate-inf", b"u,1,2,inf,0", "coordZ is 'inf'")
row("coordinate-minus-infinity", b"u,1,2,-Infinity,0", "coordZ is '-Infinity'")
row("coordinate-empty", b"u,1,,3,0", "coordY is ''")
row("coordinate-1e300", b"u,1e300,2,3,0", "coordX is '1e300'")
row("coordinate-1e400", b"u,1,2,-1e400,0", "coordZ is '-1e400'")
row("coordinate-hex", b"u,0x10,2,3,0", "coordX is '0x10'")
row("coordinate-underscore", b"u,1_0,2,3,0", "coordX is '1_0'")
row("coordinate-decimal-comma", b'u,"1,5",2,3,0', "coordX is '1,5'")
row("coordinate-true", b"u,True,2,3,0", "coordX is 'True'")
row("coordinate-date", b"u,2001-01-01,2,3,0", "coordX is '2001-01-01'")
row("coordinate-other-digits", "u,\u0661\u0662,2,3,0".encode(), "coordX is")
row("coordinate-escape-codes", b"u,\x1b[2J\x1b]0;x\x07,2,3,0", "coordX is '\\x1b[2J")
row("coordinate-line-separator", "u,1,2,\u2028x,0".encode(), "coordZ is '\\u2028x'")
row("uid-empty", b",1,2,3,0", "seriesuid is ''")
row("uid-spaces", b"   ,1,2,3,0", "seriesuid is '   '")
row("class-2", b"u,1,2,3,2", "class is '2'")
row("class-empty", b"u,1,2,3,", "class is ''")
row("class-1.0", b"u,1,2,3,1.0", "class is '1.0'")
row("class-true", b"u,1,2,3,True", "class is 'True'")
row("short-row", b"u,1,2,3", "4 fields, expected 5")
row("long-row", b"u,1,2,3,0,7", "6 fields, expected 5")
row("one-field", b"u", "1 fields, expected 5")
row("only-commas", b",,,,", "seriesuid is ''")
row("header-again", C[:-1], "coordX is 'coordX'")
row("nul-in-number", b"u,1\0,2,3,0", "coordX is '1\\x00'")
row("nul-line", b"\0\0\0\0", "1 fields, expected 5")
row("very-long-number", b"u," + b"9" * 100_000 + b",2,3,0", "coordX is '9999")
row("diameter-0", b"u,1,2,3,0", "diameter_mm is '0'", "annotations")
row("diameter-negative", b"u,1,2,3,-1", "diameter_mm is '-1'", "annotations")
row("diameter-nan", b"u,1,2,3,NaN", "diameter_mm is 'NaN'", "annotations")
row("diameter-1e9", b"u,1,2,3,1e9", "diameter_mm is '1e9'", "annotations")
row("diameter-empty", b"u,1,2,3,", "diameter_mm is ''", "annotations")
row("diameter-text", b"u,1,2,3,big", "diameter_mm is 'big'", "annotations")
row("malignancy-maybe", b"u,1,2,3,4,maybe,P1", "mal_bool is 'maybe'", "malignancy")
row("malignancy-empty", b"u,1,2,3,4,,P1", "mal_bool is ''", "malignancy")
row("malignancy-nan", b"u,1,2,3,4,nan,P1", "mal_bool is 'nan'", "malignancy")
row("malignancy-no-diameter", b"u,1,2,3,,True,P1", "diameter_mm is ''", "malignancy")

# Several
rows("cut-last-line", C + GOOD_C + b"1.2.840", "1 fields", (3,), 1)
rows("all-rows-bad", C + b"u,x,2,3,0\nu,1,y,3,0\nu\n", "coordX is 'x'", (2, 3, 4), 0)
rows("one-row-bad-twice", C + b"u,x,y,3,9\n" + GOOD_C, "coordX is 'x'", (2,), 1)
SPARSE = C + GOOD_C + b"\n\nu,x,2,3,0\n\nu,1\n" + GOOD_C + b"\n\n"
rows("blank-lines", SPARSE, "coordX is 'x'", (5, 7), 2)
rows("blank-lines-crlf", SPARSE.replace(b"\n", b"\r\n"), "coordX is 'x'", (5, 7), 2)
rows("blank-line-after-header", C + b"\nu,x,2,3,0\n" + GOOD_C, "coordX is 'x'", (3,), 1)
rows("crlf-with-a-bad-row", (C + GOOD_C + b"u,1,2\n").replace(b"\n", b"\r\n"), "3 fields", (3,), 1)
ONE_SERIES_TWO_PATIENTS = HEADERS["patients"] + b"a,P1\nb,P2\na,P3\na,P1\n"
rows(
    "two-patients",
    ONE_SERIES_TWO_PATIENTS,
    "patient_id is 'P3', expected the patient named before",
    (4,),
    3,
    "patients",
)
rows("patient-empty", HEADERS["patients"] + b"a,\nb,P2\n", "patient_id is ''", (2,), 1, "patients")
rows("patient-uid-empty", HEADERS["patients"] + b",P1\nb,P2\n", "seriesuid is ''", (2,), 1, "patients")

# Odd, but legal
legal("header-only", C, 0)
legal("header-only-without-newline", C[:-1], 0)
legal("no-newline-at-the-end", C + GOOD_C[:-1], 1)
legal("crlf", (C + GOOD_C * 2).replace(b"\n", b"\r\n"), 2)
legal("bom", b"\xef\xbb\xbf" + C + GOOD_C, 1)
legal("bom-and-crlf", b"\xef\xbb\xbf" + (C + GOOD_C).replace(b"\n", b"\r\n"), 1)
legal("quoted", b'"seriesuid","coordX","coordY","coordZ","class"\n"u","1","2","3","1"\n', 1)
legal("quoted-comma-in-the-header", C.replace(b"\n", b',"note, long"\n') + b"u,1,2,3,0,x\n", 1)
legal("quoted-comma", C + b'"u,v",1,2,3,0\n', 1)
legal("extra-columns", C.replace(b"\n", b",note,len\n") + b"u,1,2,3,0,big,4\n", 1)
legal("extra-column-of-latin-1", C.replace(b"\n", b",note\n") + b"u,1,2,3,0,M\xfcller\n", 1)
legal("columns-in-other-order", b"class,coordZ,coordY,coordX,seriesuid\n1,3,2,1,u\n", 1)
legal("uid-na", C + b"NA,1,2,3,0\nnull,1,2,3,0\nnan,1,2,3,0\n", 3)
legal("uid-like-a-number", C + b"056,1,2,3,0\n56,1,2,3,0\n5.60,1,2,3,0\n", 3)
legal("spaces-around-fields", C + b" u , 1 ,2 , 3,0\n", 1)
legal("long-uid", C + b"9" * 100_000 + b",1,2,3,0\n", 1)
legal("exponents-and-signs", C + b"u,1e2,-2.5E+1,.5,0\nu,1.,+0,-0,1\n", 2)
legal(
    "malignancy-in-all-spellings",
    HEADERS["malignancy"] + GOOD["malignancy"] + b"u,1,2,3,4,0,P\nu,1,2,3,4,FALSE,P\n",
    3,
    "malignancy",
)
legal("patient-named-twice-alike", HEADERS["patients"] + b"a,P1\na,P1\n", 2, "patients")
