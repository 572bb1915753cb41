"""What to say of a folder that is not what was asked for, so that the next try works."""

import re
from pathlib import Path

from lunaprep.scans.open import SUFFIXES

SUBSET = re.compile(r"subset(0|[1-9][0-9]{0,3})")
"""Names of LUNA16's folders; with leading zeros two of them would be one subset."""

MOST_LOOKED_AT = 200
"""Files that are opened to see whether a folder is one of DICOM."""


def without_subsets(root: Path) -> str:
    """Why a folder without subset folders is no LUNA16, and which folder may be meant."""
    nothing = f"{root} holds no subset folder"
    full = root.absolute()
    if match := SUBSET.fullmatch(full.name):
        above = root.parent if root.name else full.parent
        return f"{nothing}: it is one. Give the folder above it: --data {above} --subsets {match[1]}"
    if looks_like_dicom(root):
        return no_luna16(root)
    if has_scans(root):
        return f"{nothing}, but scans. Move them into a folder subset0 in it"
    below = (path for path in sorted(root.glob("*/subset*")) if SUBSET.fullmatch(path.name) and path.is_dir())
    if inner := next(below, None):
        return f"{nothing}, {inner.parent} does. Give --data {inner.parent}"
    return f"{nothing}; expected subset0 to subset9. Unpack LUNA16's archives into it"


def no_luna16(root: Path) -> str:
    """What a folder of DICOM files needs to be told with."""
    return (
        f"{root} holds DICOM files and no subset0 to subset9, so it is no LUNA16. Say what it is: --source lidc, "
        "--source lung-pet-ct-dx, or --source dicom for any other"
    )


def looks_like_dicom(data: Path) -> bool:
    """Whether a folder holds DICOM files: one of the first `MOST_LOOKED_AT` has ``DICM`` at byte 128."""
    paths = (path for path in data.rglob("*") if path.is_file() and not path.is_symlink())
    for _, path in zip(range(MOST_LOOKED_AT), paths, strict=False):
        try:
            with path.open("rb") as file:
                if file.read(132)[128:] == b"DICM":
                    return True
        except OSError:
            continue
    return False


def has_scans(folder: Path) -> bool:
    """Whether something in a folder is named like a scan; a folder that cannot be read has none."""
    return any(path.name.endswith(SUFFIXES) for path in folder.glob("*"))


def passed_over(folder: Path) -> str | None:
    """What a subset folder has in place of scans, or beside them, that nobody will read."""
    inside = sorted(folder.iterdir())
    shouted = [path for path in inside if path.name.lower().endswith(SUFFIXES) and not path.name.endswith(SUFFIXES)]
    if shouted:
        some = f"{len(shouted)} passed over, such as {shouted[0].name!a}"
        return f"{folder.name}: {some}; the name must end in {', '.join(SUFFIXES)}, in small letters. Rename it"
    if any(path.name.endswith(SUFFIXES) for path in inside):
        return None
    if not inside:
        return f"{folder.name} is empty; unpack its archive again"
    if deeper := next((path for path in inside if path.is_dir() and has_scans(path)), None):
        return f"{str(Path(folder.name, deeper.name))!a} holds the scans, one level too deep; move its files up"
    return f"{folder.name} holds other files; unpack its archive again"
