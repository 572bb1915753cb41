"""The programs of the book, run as they are on a folder of scans: for benchmarks that hold ours against them.

The book is "Deep Learning with PyTorch" (Stevens, Antiga, Viehmann 2020). Its code is no part of this project: clone
github.com/deep-learning-with-pytorch/dlwpt-code, `pip install --target EXTRA --no-deps diskcache==4.1.0` (the version
the book names), and give both to a benchmark as `--book CLONE --extra EXTRA`. A copy of the packages needed is made,
with the scans linked to where the book looks for them, and these changes, without which it does not run today:

- p2ch14/nodule_analysis.py: `np.int` (gone since NumPy 1.24) becomes `int`;
- p2ch14/nodule_analysis.py: `torch.load(path)` gets `map_location` "cpu", as its weights were saved from a GPU;
- p2ch14/nodule_analysis.py, p2ch13/dsets.py: `scipy.ndimage.measurements` and `.morphology` become `scipy.ndimage`
  (same functions, and the old names are deprecated).

Each program runs in a process of its own (`book_program.py`), which times the program's own methods, imports left out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("p2ch11", "p2ch12", "p2ch13", "p2ch14", "util")
CHANGES = {
    "p2ch14/nodule_analysis.py": (
        ("dtype=np.int)", "dtype=int)"),
        ("torch.load(self.cli_args.segmentation_path)", 'torch.load(self.cli_args.segmentation_path, "cpu")'),
        ("torch.load(self.cli_args.classification_path)", 'torch.load(self.cli_args.classification_path, "cpu")'),
        ("import scipy.ndimage.measurements as measurements", "import scipy.ndimage as measurements"),
        ("import scipy.ndimage.morphology as morphology", "import scipy.ndimage as morphology"),
    ),
    "p2ch13/dsets.py": (("import scipy.ndimage.morphology as morph", "import scipy.ndimage as morph"),),
}
TABLES = ("annotations.csv", "annotations_with_malignancy.csv", "candidates.csv")
"""What the book reads beside the scans."""

SEG_STATE = "seg_2020-01-26_19.45.12_w4d3c1-bal_1_nodupe-label_pos-d1_fn8-adam.best.state"
CLS_STATE = "cls_2020-02-06_14.16.55_final-nodule-nonnodule.best.state"
"""The weights it published, and uses where none are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that every benchmark against the book has."""
    parser.add_argument("--book", type=Path, required=True, help="a clone of dlwpt-code")
    parser.add_argument("--extra", type=Path, help="folder that diskcache is installed in, where it is not already")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for scans, stores and caches")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="of the book's DataLoader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")


class Book:
    """A copy of the book's programs beside some scans.

    Parameters
    ----------
    given : Namespace
        Of `add_arguments`.
    data : Path
        A folder as LUNA16's.
    threads : int
        Of torch, in its programs.
    """

    def __init__(self, given: argparse.Namespace, data: Path, threads: int) -> None:
        self.copy: Path = given.folder.resolve() / "book"
        self.threads = threads
        self.extra = given.extra
        shutil.rmtree(self.copy, ignore_errors=True)
        for name in PACKAGES:
            shutil.copytree(given.book / name, self.copy / name)
        for name, changes in CHANGES.items():
            path = self.copy / name
            text = path.read_text(encoding="utf-8")
            for old, new in changes:
                if old not in text:
                    message = f"{given.book / name} has no {old.strip()!r}: is it another edition of the book's code?"
                    raise SystemExit(message)
                text = text.replace(old, new)
            path.write_text(text, encoding="utf-8")
        scans, tables = self.copy / "data-unversioned/part2/luna", self.copy / "data/part2/luna"
        scans.mkdir(parents=True)
        tables.mkdir(parents=True)
        for folder in sorted(data.resolve().glob("subset*")):
            (scans / folder.name).symlink_to(folder)
        for name in TABLES:
            shutil.copy(data / name, tables / name)
        models = given.book / "data/part2/models"
        if models.is_dir():
            shutil.copytree(models, self.copy / "data/part2/models")

    def state(self, name: str) -> Path:
        """One of its published files of weights."""
        return self.copy / "data/part2/models" / name

    def clear_cache(self) -> None:
        """Forget the crops it has kept."""
        shutil.rmtree(self.copy / "data-unversioned/cache", ignore_errors=True)

    def run(self, program: str, **options: Any) -> dict[str, Any]:
        """Run one of the functions of `book_program.py`; what it returns."""
        places = [str(self.copy), *([str(self.extra.resolve())] if self.extra else [])]
        command = [sys.executable, str(Path(__file__).with_name("book_program.py")), program, json.dumps(options)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "ITK_GLOBAL_DEFAULT_THREADER": "Platform",  # threads of a pool would not live through a fork
            "PYTHONPATH": os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        done = subprocess.run(command, cwd=self.copy, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the book's {program} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
