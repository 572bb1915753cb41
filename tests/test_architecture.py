"""Who may import whom: data flows one way, each heavy library has one home, nothing goes in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lunaprep
import lunatrain

ROOTS = {"lunaprep": Path(lunaprep.__file__).parent, "lunatrain": Path(lunatrain.__file__).parent}

# A module may import those of lower layers, and of its own; a name stands for a module or for a whole package.
PREP_LAYERS = [
    ["errors", "schema", "geometry", "machine", "safe_xml", "__init__"],
    ["crops", "csv_rows", "lungs", "masks", "scans", "store"],
    ["candidates", "parameters", "datasheet", "shard_plan", "targets"],
    ["splits", "sources"],
    ["manifest", "scan_pass", "shard_work", "verify"],
    ["slabs", "plan", "finished", "carried", "cluster"],
    ["parallel", "account", "assemble", "info", "worst", "download", "download_dicom"],
    ["build", "pictures", "cli_options"],
    ["cli_build"],
    ["cli"],
    ["__main__"],
]

TRAIN_LAYERS = [
    ["errors", "config", "__init__"],
    ["crop_sources"],
    [
        "segmentation_config",
        "boxes",
        "localisation_config",
        "crop_kind",
        "mapping",
        "sampling",
        "distributed",
        "metrics",
        "class_metrics",
        "marks",
        "disk",
    ],
    [
        "data",
        "models",
        "augment",
        "losses",
        "images",
        "dense",
        "augment_boxes",
        "voxel_scores",
        "overlays",
        "froc",
        "checkpoint",
        "log",
        "labelled",
    ],
    ["dataset", "slabs", "augment_slabs", "box_slices", "box_table", "plots", "evaluate", "evaluate_classes"],
    ["page", "segmentation_plots", "box_pictures"],
    ["tasks"],
    ["loop", "bench", "report", "report_classes"],
    ["training"],
    ["segmentation", "localisation"],
    ["evaluation", "box_evaluation", "detect"],
    ["cli_train", "cli_detect"],
    ["cli"],
    ["__main__"],
]

LAYERS = {
    f"{package}.{place}": rank
    for package, layers in (("lunaprep", PREP_LAYERS), ("lunatrain", TRAIN_LAYERS))
    for rank, places in enumerate(layers)
    for place in places
}

# library: modules, or packages, that may import it
HOMES = {
    "SimpleITK": ["lunaprep.scans.itk", "lunaprep.verify.recut"],
    "h5py": ["lunaprep.store", "lunaprep.verify"],
    "pyarrow": ["lunaprep.store.tables", "lunaprep.csv_rows", "lunaprep.verify"],
    "scipy": ["lunaprep.crops", "lunaprep.lungs", "lunaprep.masks", "lunaprep.sources.lidc_nodules", "lunatrain"],
    "pydicom": ["lunaprep.scans.dicom_header", "lunaprep.scans.dicom_pixels"],
    "joblib": ["lunaprep.parallel"],
    "distributed": ["lunaprep.cluster"],
    "filelock": ["lunaprep.store.commit"],
    "deflate": ["lunaprep.verify.structure"],
    "isal": ["lunaprep.scans", "lunaprep.store.encoder"],
    "matplotlib": ["lunaprep.pictures", "lunatrain.plots", "lunatrain.segmentation_plots"],
    "click": [
        "lunaprep.cli",
        "lunaprep.cli_build",
        "lunaprep.cli_options",
        "lunatrain.cli",
        "lunatrain.cli_train",
        "lunatrain.cli_detect",
    ],
    "PIL": ["lunatrain.images"],
    "tqdm": [
        "lunaprep.parallel",
        "lunaprep.cli",
        "lunatrain.loop",
        "lunatrain.log",
        "lunatrain.evaluation",
        "lunatrain.detect.pipeline",
    ],
    "torch": ["lunatrain"],
    "lunatrain": ["lunatrain"],
    "sklearn": [],
}

# lunatrain knows lunaprep only through the store's reader
TRAIN_MAY_IMPORT = ["lunaprep.store.reader", "lunaprep.schema", "lunaprep.errors", "lunaprep.__init__"]

# but a table of boxes names DICOM slices, which nobody has built into a store
TABLE_MAY_IMPORT = [*TRAIN_MAY_IMPORT, "lunaprep.scans.dicom_pixels"]

# and the detector, which reads new scans, also through its readers and what prepares a scan
DETECT_MAY_IMPORT = [*TRAIN_MAY_IMPORT, "lunaprep.scans", "lunaprep.geometry", "lunaprep.crops", "lunaprep.lungs"]

# commands of both tools take paths alike
COMMANDS_MAY_IMPORT = [*TRAIN_MAY_IMPORT, "lunaprep.cli_options"]

# verify shares the format's definition with the writer, and none of its code
VERIFY_MAY_IMPORT = ["lunaprep.__init__", "lunaprep.schema", "lunaprep.errors", "lunaprep.verify"]


def modules() -> dict[str, ast.Module]:
    named = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[0] != "manifests":
                named[".".join((package, *parts))] = ast.parse(path.read_text(encoding="utf-8"))
    return named


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
    found = set(imports(MODULES[name]))
    return {
        item if item in MODULES else f"{item}.__init__" for item in found if {item, f"{item}.__init__"} & MODULES.keys()
    }


def within(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def layer(name: str) -> int:
    ranks = [rank for place, rank in LAYERS.items() if within(name, [place])]
    assert len(ranks) == 1, f"{name} must be in one layer, is in {len(ranks)}"
    return ranks[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_back_along_the_data(name: str) -> None:
    package = name.split(".")[0]
    if name == f"{package}.__init__":
        return  # the front of a package hands out what is behind it
    above = {other for other in own_imports(name) if other.startswith(package) and layer(other) > layer(name)}
    assert not above, f"{name} imports {above}, which lies above it"


def test_the_trainer_knows_the_store_only_by_its_reader() -> None:
    for name in MODULES:
        if within(name, ["lunatrain"]):
            allowed = DETECT_MAY_IMPORT if within(name, ["lunatrain.detect"]) else TRAIN_MAY_IMPORT
            allowed = TABLE_MAY_IMPORT if name == "lunatrain.box_table" else allowed
            allowed = COMMANDS_MAY_IMPORT if name.startswith("lunatrain.cli") else allowed
            strangers = {o for o in own_imports(name) if within(o, ["lunaprep"]) and not within(o, allowed)}
            assert not strangers, f"{name} imports {strangers}"


def test_no_import_cycle() -> None:
    fronts = {f"{package}.__init__" for package in ROOTS}
    graph = {name: own_imports(name) - fronts for name in MODULES if name not in fronts}
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
        if within(name, ["lunaprep.verify"]):
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
