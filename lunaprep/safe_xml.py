"""XML from strangers: a small tree of elements, or a refusal before anything is blown up.

The standard library's expat does the parsing. No document type is let in (and with it no entity of one's own: the
"billion laughs", the quadratic kind, and files read through external entities), no depth, no size and no number of
elements beyond the limits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from lunaprep.errors import TableError

MAX_BYTES = 8 << 20
"""The largest of LIDC-IDRI's files has about 2 MB."""

MAX_DEPTH = 32
MAX_ELEMENTS = 100_000
"""A contour point is three elements in 90 bytes, so that this is a LIDC-IDRI file of 3 MB."""

MAX_ATTRIBUTES = 10_000


@dataclass(slots=True)
class Element:
    """One element: its name, the line it begins on, its own text before its first child, and its children."""

    name: str
    line: int
    text: str = ""
    children: "list[Element]" = field(default_factory=list)

    def all(self, name: str) -> "list[Element]":
        """Children of that name."""
        return [child for child in self.children if child.name == name]

    def first(self, name: str) -> "Element | None":
        """First child of that name."""
        return next((child for child in self.children if child.name == name), None)

    def value(self, *names: str) -> str | None:
        """Text of a child, or of a child's child, stripped; None where it is missing or empty."""
        element: Element | None = self
        for name in names:
            element = element.first(name) if element else None
        return (element.text.strip() or None) if element else None


def xml_fault(path: Path, text: str) -> TableError:
    """Error about an annotation file, on one line."""
    return TableError(f"{path.name}: {text}")


def read_xml(path: Path, root: str, namespace: str = "") -> Element:
    """Parse a file whose outermost element is `root`.

    Parameters
    ----------
    path : Path
        A regular file of at most `MAX_BYTES`.
    root, namespace : str
        Name of the outermost element, and the namespace it and all others must be in ("" for none).

    Returns
    -------
    Element
        The outermost element; names come without the namespace, attributes are dropped.

    Raises
    ------
    TableError
        Another kind of file, damaged, or one that is made to be dangerous.
    """
    content = _content(path)
    if content.count(b"<") > 2 * MAX_ELEMENTS + MAX_DEPTH or content.count(b"=") > MAX_ATTRIBUTES:
        raise xml_fault(path, f"more than {MAX_ELEMENTS} elements or {MAX_ATTRIBUTES} attributes; it is refused")
    parsed = _Tree(path, namespace).parse(content)
    if parsed.name != root:
        got = ascii(parsed.name)[:60]
        space = f" in namespace {namespace}" if namespace else ""
        raise xml_fault(path, f"its outermost element is {got}, expected {root!r}{space}; is it another kind of file?")
    return parsed


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise xml_fault(path, "it is no regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise xml_fault(path, f"it has {size} bytes, more than the {MAX_BYTES} an annotation file may have")
        with path.open("rb") as source:
            return source.read(MAX_BYTES + 1)
    except OSError as error:
        raise xml_fault(path, f"it cannot be read: {(error.strerror or 'unknown error').lower()}") from None


class _Tree:
    """Handlers of expat that build the tree within the limits."""

    def __init__(self, path: Path, namespace: str) -> None:
        self._path = path
        self._prefix = f"{namespace} " if namespace else ""
        self._open: list[Element] = [Element("", 0)]
        self._count = 0
        self._parser: Any = expat.ParserCreate(namespace_separator=" ")
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.StartDoctypeDeclHandler = self._doctype

    def parse(self, content: bytes) -> Element:
        """Outermost element of a document."""
        try:
            self._parser.Parse(content, True)
        except TableError:
            raise
        except expat.ExpatError as error:
            text = f"line {error.lineno}: it is no well-formed XML ({expat.ErrorString(error.code)}); fetch it again"
            raise xml_fault(self._path, text) from None
        except (LookupError, ValueError) as error:  # an encoding that Python lacks
            raise xml_fault(self._path, f"its encoding is not supported ({ascii(str(error))[:60]})") from None
        return self._open[0].children[0]

    def _start(self, name: str, _attributes: dict[str, str]) -> None:
        self._count += 1
        if len(self._open) > MAX_DEPTH or self._count > MAX_ELEMENTS:
            text = f"more than {MAX_DEPTH} elements in one another, or {MAX_ELEMENTS} in all; it is refused"
            raise xml_fault(self._path, text)
        # a name of another namespace keeps it, and so is not found
        element = Element(name.removeprefix(self._prefix), self._parser.CurrentLineNumber)
        self._open[-1].children.append(element)
        self._open.append(element)

    def _end(self, _name: str) -> None:
        self._open.pop()

    def _characters(self, text: str) -> None:
        if not self._open[-1].children:
            self._open[-1].text += text

    def _doctype(self, _name: str, _system: str | None, _public: str | None, _has_subset: int) -> None:
        raise xml_fault(self._path, "it has a document type (DOCTYPE), which may hide entities; it is refused")
