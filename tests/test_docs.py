"""The documents say what the code does: commands, links, tables, the README's first screen."""

import re
from pathlib import Path

import pytest

from lunaprep import schema

from .cli_reference import reference

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*.md"))]


def test_the_command_reference_is_what_help_prints() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference(), "run 'make docs'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_column_and_key_of_the_format_is_documented() -> None:
    text = (ROOT / "docs/format.md").read_text()
    for column in (*schema.MANIFEST_COLUMNS, *schema.SCAN_COLUMNS, *schema.SLAB_COLUMNS):
        assert f"| `{column.name}` |" in text, f"docs/format.md lacks {column.name}; run 'make docs'"
        assert column.doc in text


def test_the_readme_starts_with_the_two_commands_and_names_no_place_of_this_machine() -> None:
    screen = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("make demo" in line for line in screen)
    assert any("make test" in line for line in screen)
    for page in PAGES:
        assert "/work/" not in page.read_text(), page


def test_the_readme_commands_exist() -> None:
    from lunaprep.cli import cli

    text = (ROOT / "README.md").read_text()
    for command in re.findall(r"^\s*lunaprep (\w+)", text, flags=re.MULTILINE):
        assert command in cli.commands


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)`", page.read_text())) <= targets, page
