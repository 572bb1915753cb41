"""The command-line reference, made of what --help prints; `make docs` writes it to docs/cli.md."""

import click
from click.testing import CliRunner

import lunaprep.cli
import lunatrain.cli

HEAD = """# Commands

Made by `make docs` from what `--help` prints; a test keeps it true.

Defaults make the short forms work: data in `$LUNA16_ROOT` or `./data`, the store in the current folder, runs under
`./runs`. Results go to stdout, progress and complaints to stderr; `--json` prints one object. Exit codes: 0 done ·
1 failed · 2 wrong usage · 3 done, but some scans or table rows could not be used · 4 damage found · 5 no space ·
75 another build is at work · 130 interrupted.
"""


def reference() -> str:
    """Markdown with the help of every command."""
    parts = [HEAD]
    groups: dict[str, click.Group] = {"lunaprep": lunaprep.cli.cli, "lunatrain": lunatrain.cli.cli}
    for program, group in groups.items():
        for words in ([], *([name] for name in group.commands)):
            text = CliRunner().invoke(group, [*words, "--help"], prog_name=program, terminal_width=100).output
            parts.append(f"## {' '.join([program, *words])}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
