"""Write the column tables of docs/format.md from the schema, between its markers."""

import re
from collections.abc import Sequence
from pathlib import Path

from lunaprep import schema

PAGE = Path(__file__).parents[1] / "docs" / "format.md"


def table(columns: Sequence[schema.Column]) -> str:
    """One Markdown table."""
    lines = ["| column | type | null | meaning |", "|---|---|---|---|"]
    lines += [f"| `{c.name}` | {c.type} | {'yes' if c.nullable else ''} | {c.doc} |" for c in columns]
    return "\n".join(lines)


def fill(text: str, marker: str, columns: Sequence[schema.Column]) -> str:
    """Put a table behind its marker, in place of the one that is there."""
    return re.sub(rf"(<!-- {marker} -->\n)(\n?\|.*\n)*", lambda m: f"{m[1]}\n{table(columns)}\n", text)


if __name__ == "__main__":
    page = fill(PAGE.read_text(), "manifest", schema.MANIFEST_COLUMNS)
    page = fill(page, "slabs", schema.SLAB_COLUMNS)
    PAGE.write_text(fill(page, "scans", schema.SCAN_COLUMNS))
