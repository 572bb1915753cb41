"""The build command."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lunaprep.cli_options import (
    EXIT_SOME_FAILED,
    SOURCES,
    Bytes,
    Spacing,
    Subsets,
    UserPath,
    at_home,
    data_folder,
    data_option,
    json_option,
    print_json,
    print_lines,
    table_path,
)

if TYPE_CHECKING:
    from lunaprep.account import Account, Preview
    from lunaprep.build import BuildOptions
    from lunaprep.parameters import Parameters


@click.command()
@data_option
@click.option("--out", type=UserPath(file_okay=False), default=Path(), help="The store's folder.  [default: .]")
@click.option("--subsets", type=Subsets(), multiple=True,
              help="Subsets to take, such as 0-9 or 0,3.  [default: all there are]")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: the cores, as far as memory allows]")
@click.option(
    "--source",
    type=click.Choice(SOURCES),
    default="luna16",
    show_default=True,
    help="Kind of data set.",
)
@click.option(
    "--candidates", type=table_path, help="[default: candidates_V2.csv, else candidates.csv, in the data folder]"
)
@click.option("--annotations", type=table_path, help="[default: annotations.csv in the data folder]")
@click.option("--malignancy", type=table_path, help="[default: annotations_with_malignancy.csv, if there]")
@click.option(
    "--patients", type=table_path, help="CSV with seriesuid and patient_id.  [default: patients.csv, if there]"
)
@click.option("--crop-shape", nargs=3, type=int, default=(32, 48, 48), show_default=True, help="Slices, rows, columns.")
@click.option("--resample-mm", type=Spacing(), metavar="MM[,MM,MM]",
              help="Resample crops to this spacing, or slice,row,column.  [default: the scan's]")  # fmt: skip
@click.option(
    "--hu", nargs=2, type=int, default=(-1000, 1000), show_default=True, help="Window the values are clipped to."
)
@click.option("--dtype", type=click.Choice(["auto", "int16", "float32"]), default="auto", show_default=True,
              help="Crops on disk; auto is int16 where that loses nothing.")  # fmt: skip
@click.option("--edge", type=click.Choice(["shift", "pad"]), default="shift", show_default=True,
              help="At a border: move the crop inwards, or pad it with the lower HU bound.")  # fmt: skip
@click.option("--match", type=click.Choice(["radius", "book"]), default="radius", show_default=True,
              help="A candidate's nodule: nearest within its radius, or the book's rule.")  # fmt: skip
@click.option("--val-stride", type=int, default=10, show_default=True, help="Every how many-th series validates.")
@click.option("--shard-size", type=Bytes(), default="1GiB", show_default=True, help="Greatest size of a shard.")
@click.option("--volumes/--no-volumes", default=True, show_default=True, help="Also write whole clipped scans.")
@click.option("--targets/--no-targets", default=True, show_default=True,
              help="Also make lung and nodule masks, and slabs to train a segmentation on.")  # fmt: skip
@click.option("--slab-negatives", type=float, default=1.0, show_default=True, metavar="RATIO",
              help="Slabs that show no nodule, for each one that does, about.")  # fmt: skip
@click.option("--lungs", type=UserPath(file_okay=False, exists=True),
              help="Folder of lung masks, UID.mhd.  [default: seg-lungs-LUNA16, if there; else computed]")  # fmt: skip
@click.option("--csv", type=UserPath(file_okay=False),
              help="Folder to write the source's tables to, as LUNA16's; the FROC reads them.")  # fmt: skip
@click.option("--backend", type=click.Choice(["loky", "dask"]), default="loky", show_default=True,
              help="Processes of this machine, or a Dask cluster.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS",
              help="Dask scheduler: tcp://node:8786, or the file it wrote.  [default: a cluster here]")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Take the first so many scans only.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@json_option
@click.pass_context
def build(ctx: click.Context, /, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Build a store from scans and tables, or bring one up to date.

    Run the same command again to go on after any interruption; add subsets later with another build into the
    same --out. Exit code 3 says that the store is built but some scans or table rows could not be used.

    \b
    Example:
        lunaprep build --data /data/LUNA16 --out store --subsets 0-9 --workers 8
        lunaprep build --data /data/LUNA16 --out store --subsets 0 --no-volumes --dry-run
    """
    from lunaprep.build import build as run_build
    from lunaprep.build import preview

    wanted, parameters = _build_options(options)
    result: Preview | Account
    result = preview(wanted, parameters) if dry_run else run_build(wanted, parameters)
    print_lines([*result.failed, *result.left_out])
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.text())
    if not dry_run and not result.is_complete:  # type: ignore[union-attr]
        ctx.exit(EXIT_SOME_FAILED)


def _build_options(options: dict[str, Any]) -> tuple["BuildOptions", "Parameters"]:
    from lunaprep.build import BuildOptions
    from lunaprep.parameters import Parameters
    from lunaprep.sources.luna16 import TablePaths

    given = ("candidates", "annotations", "malignancy", "patients", "lungs")
    tables = TablePaths(**{name: options[name] for name in given})
    wanted = BuildOptions(
        data=data_folder(options["data"]),
        out=options["out"],
        source=options["source"],
        subsets=tuple(sorted({number for numbers in options["subsets"] for number in numbers})) or None,
        tables=tables,
        volumes=options["volumes"],
        targets=options["targets"],
        csv=options["csv"],
        limit=options["limit"],
        workers=options["workers"],
        backend=options["backend"],
        scheduler=options["scheduler"] and at_home(options["scheduler"]),
        progress=True,
    )
    names = ("crop_shape", "resample_mm", "hu", "dtype", "edge", "match", "val_stride", "slab_negatives")
    return wanted, Parameters(shard_bytes=options["shard_size"], **{name: options[name] for name in names})
