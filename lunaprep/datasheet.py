"""Data sheets of known data sets (`manifests/`): where they come from, what a complete copy has, what is odd."""

import tomllib
from importlib import resources
from typing import Any

from lunaprep.errors import UsageError


def load_sheet(name: str) -> dict[str, Any]:
    """Return the data sheet of a data set.

    Parameters
    ----------
    name : str
        As in the sheet's file name, ``luna16`` for ``manifests/luna16.toml``.

    Raises
    ------
    UsageError
        There is no such sheet; the message names those there are.
    """
    folder = resources.files("lunaprep.manifests")
    names = sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))
    if name not in names:
        message = f"no data sheet {name!r}; there are: {', '.join(names)}"
        raise UsageError(message)
    return tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
