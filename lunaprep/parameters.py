"""What a build can be told: checked once, recorded in store.json."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from lunaprep import schema
from lunaprep.crops import Edge
from lunaprep.errors import UsageError

MIN_CROP_VOXELS = 512
MAX_CROP_SIDE = 512
MAX_RATIO = 1000
RESAMPLE_LIMITS_MM = (0.1, 10.0)


@dataclass(frozen=True)
class Parameters:
    """Parameters that decide a store's content.

    Parameters
    ----------
    crop_shape : tuple of 3 int
        Slices, rows, columns of a crop; at least 512 voxels.
    hu : tuple of 2 int
        Window the values are clipped to, HU; whole numbers within int16.
    dtype : {"auto", "int16", "float32"}
        Stored type of crops; ``auto`` takes int16 where every scan holds integers.
    edge : {"shift", "pad"}
        See `lunaprep.crops.window_starts`.
    match : {"radius", "book"}
        See `lunaprep.candidates.match_annotations`.
    val_stride : int
        Every how many-th series (or candidate) is for validation.
    slab_negatives : float
        Slabs that are no nodule for each one that is, about; see `lunaprep.slabs`.
    shard_bytes : int
        Greatest size of a shard, unless one scan alone is larger.
    resample_mm : tuple of 3 float, optional
        Spacing that crops are resampled to, mm to a slice, row, column; None keeps the scan's.
    """

    crop_shape: tuple[int, int, int] = (32, 48, 48)
    hu: tuple[int, int] = (-1000, 1000)
    dtype: Literal["auto", "int16", "float32"] = "auto"
    edge: Edge = "shift"
    match: Literal["radius", "book"] = "radius"
    val_stride: int = 10
    slab_negatives: float = 1.0
    shard_bytes: int = 1 << 30
    resample_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        shape = self.crop_shape
        _require(len(shape) == 3 and all(0 < side <= MAX_CROP_SIDE for side in shape), "crop_shape", shape)
        voxels = shape[0] * shape[1] * shape[2]
        _require(voxels >= MIN_CROP_VOXELS, "crop_shape", shape, f"at least {MIN_CROP_VOXELS} voxels")
        low, high = self.hu
        _require(-32768 <= low < high <= 32767, "hu", self.hu, "LO < HI, whole numbers within int16")
        _require(self.dtype in ("auto", *schema.CROP_DTYPES), "dtype", self.dtype, "auto, int16 or float32")
        _require(self.edge in schema.EDGES, "edge", self.edge, " or ".join(schema.EDGES))
        _require(self.match in schema.MATCHES, "match", self.match, " or ".join(schema.MATCHES))
        _require(self.val_stride >= 2, "val_stride", self.val_stride, "2 or more")
        _require(0 <= self.slab_negatives <= MAX_RATIO, "slab_negatives", self.slab_negatives, f"0 to {MAX_RATIO}")
        _require(self.shard_bytes >= 1, "shard_size", self.shard_bytes, "1 byte or more")
        if self.resample_mm is not None:
            low_mm, high_mm = RESAMPLE_LIMITS_MM
            good = len(self.resample_mm) == 3 and all(low_mm <= mm <= high_mm for mm in self.resample_mm)
            _require(good, "resample_mm", self.resample_mm, f"one spacing or three, {low_mm:g} to {high_mm:g} mm")
            if self.dtype == "int16":
                message = "--dtype int16 would lose something: resampled values (--resample-mm) are not whole numbers. "
                raise UsageError(message + "Use --dtype float32, or auto")

    def to_json(self) -> dict[str, Any]:
        """Return the parameters as store.json keeps them; a spacing of the crops' own only where they have one."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return values if self.resample_mm else {key: v for key, v in values.items() if key != "resample_mm"}


def parameters_from_json(value: dict[str, Any]) -> Parameters:
    """Return the parameters that `Parameters.to_json` gave."""
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
    return Parameters(**cast(Any, fields))


def _require(holds: bool, name: str, got: object, expected: str = "three sides of 1 to 512") -> None:
    if not holds:
        message = f"--{name.replace('_', '-')}: got {got}, expected {expected}"
        raise UsageError(message)
