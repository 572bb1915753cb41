"""Who may import whom: data flows one way, each heavy library has one home, nothing goes in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lunaprep

ROOT = Path(lunaprep.__file__).parent

# A module may import those of lower layers, and of its own; "a.b" names a module, "a" also a whole package.
LAYERS = [
    ["errors", "schema", "geometry", "machine", "__init__"],
    ["crops", "scans", "store"],
    ["candidates", "parameters", "datasheet", "shard_plan"],
    ["splits", "sources"],
    ["manifest", "shard_work", "verify"],
    ["plan", "finished", "carried"],
    ["parallel", "account", "info", "download"],
    ["build", "pictures"],
    ["cli"],
    ["__main__"],
]

# library: modules, or packages, that may import it
HOMES = {
    "SimpleITK": ["scans.itk", "verify.recut"],
    "h5py": ["store", "verify"],
    "pyarrow": ["store.tables", "candidates", "verify"],
    "joblib": ["parallel"],
    "filelock": ["store.commit"],
    "isal": ["store.volume", "scans"],
    "matplotlib": ["pictures"],
    "click": ["cli"],
    "tqdm": ["parallel", "cli"],
    "torch": [],
    "lunatrain": [],
}

# verify shares the format's definition with the writer, and none of its code
VERIFY_MAY_IMPORT = ["schema", "errors", "verify"]


def modules() -> dict[str, ast.Module]:
    paths = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "manifests")
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in named.items()}


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    found = {item.removeprefix("lunaprep.") for item in imports(MODULES[name]) if item.startswith("lunaprep.")}
    known = {item for item in found if item in MODULES or f"{item}.__init__" in MODULES}
    return {item if item in MODULES else f"{item}.__init__" for item in known}


def within(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def layer(name: str) -> int:
    ranks = [rank for rank, places in enumerate(LAYERS) if within(name, places)]
    assert len(ranks) == 1, f"{name} must be in one layer of LAYERS, is in {len(ranks)}"
    return ranks[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_back_along_the_data(name: str) -> None:
    if name in ("__init__",):
        return  # the front of the package hands out the reader lazily
    above = {other for other in own_imports(name) if layer(other) > layer(name)}
    assert not above, f"{name} imports {above}, which lies above it"


def test_no_import_cycle() -> None:
    graph = {name: own_imports(name) - {"__init__"} for name in MODULES if name != "__init__"}
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    users = {name for name, tree in MODULES.items() if any(item.split(".")[0] == library for item in imports(tree))}
    strangers = {name for name in users if not within(name, HOMES[library])}
    assert not strangers, f"{library} is at home in {HOMES[library]}, and imported by {strangers}"
    assert users or not HOMES[library], f"{library} is imported nowhere; take it off the list"


def test_verify_shares_no_code_with_the_writer() -> None:
    for name in MODULES:
        if within(name, ["verify"]):
            strangers = {other for other in own_imports(name) if not within(other, VERIFY_MAY_IMPORT)}
            assert not strangers, f"{name} imports {strangers}"


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_small(name: str) -> None:
    tree = MODULES[name]
    assert tree.body[-1].end_lineno <= 450, f"{name} is too long; split it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - doc <= 60, f"{name}.{node.name} is too long"


def test_nothing_reads_the_environment_clock_or_disk_at_import() -> None:
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
                continue
            calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            text = {ast.unparse(call) for call in calls}
            guilty = {call for call in text if call.split(".")[0] in ("os", "time", "open") or "environ" in call}
            assert not guilty, f"{name} calls {guilty} at import"
