"""What radiologists mark in a synthetic chest CT: nodules, look-alikes, small findings, and candidates for them.

Positions are world mm (LPS) unless a name ends in `_model`; `Frame` maps one to the other.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lunaprep.geometry import Geometry
from lunaprep.sources.phantom_anatomy import Anatomy, Array, coverage
from lunaprep.sources.phantom_trees import LUNG_BG_HU, Grid, Tubes

MEDIAN_DIAMETER_MM = 6.4
"""LUNA16's 1186 nodules have median 6.43 mm, 11 % are above 15 mm, the largest has 32.3 mm."""

DIAMETER_SPREAD = 0.60
"""Standard deviation of the logarithm of the diameter, fitted to the same quantiles."""

MIN_DIAMETER_MM, MAX_DIAMETER_MM = 3.0, 30.0

GOLDEN = 0.6180339887498949
"""Steps of the golden ratio spread the first nodules of successive scans over all sizes (Weyl sequence)."""

KINDS = ("solid", "part-solid", "juxta-pleural", "juxta-vascular", "ground-glass")
KIND_SHARES = {False: (0.45, 0.15, 0.20, 0.20, 0.0), True: (0.14, 0.18, 0.18, 0.20, 0.30)}
"""How often each kind is drawn, by `hard`."""

SOURCES = ("fork", "wall", "airway", "lung", "look-alike")
SOURCE_SHARES = {False: (0.30, 0.20, 0.10, 0.35, 0.05), True: (0.29, 0.10, 0.06, 0.05, 0.50)}
"""Where the negative candidates lie, by `hard`."""


@dataclass(frozen=True)
class Frame:
    """Maps model mm to a scan's world mm: ``world = model * scale + shift``, each (3,) float64, x y z."""

    geometry: Geometry
    scale: Array
    shift: Array

    def to_world(self, xyz_model: Array) -> Array:
        """World mm of model points, (..., 3)."""
        return np.asarray(xyz_model * self.scale + self.shift)

    def to_model(self, xyz: Array) -> Array:
        """Model mm of world points, (..., 3)."""
        return np.asarray((xyz - self.shift) / self.scale)


@dataclass(frozen=True)
class Nodule:
    """One nodule as painted; `lobes` (n, 3) are the unit vectors of its bulges, `spikes` (m, 3) of its spicules."""

    center_xyz: Array
    diameter_mm: float
    kind: str
    is_malignant: bool
    hu: float
    halo_hu: float
    lobes: Array
    spikes: Array


@dataclass(frozen=True)
class LookAlike:
    """A thing that is no nodule: an ellipsoid, long (vessel stub) or flat (scar, wall bump); `axes` are its rows."""

    center_xyz: Array
    radii_mm: Array
    axes: Array
    hu: float


@dataclass(frozen=True)
class Findings:
    """All that is painted into the lungs of one scan besides the trees; `dots` are below 3 mm."""

    nodules: list[Nodule]
    dots: list[Nodule]
    look_alikes: list[LookAlike]


@dataclass(frozen=True)
class Sites:
    """Where findings can lie: points in the lungs, their depth (mm), and the trees, all in world mm."""

    lung_xyz: Array
    depth_mm: Array
    fork_xyz: Array
    airway_xyz: Array
    vessel_xyz: Array
    vessel_radius_mm: Array


def find_sites(frame: Frame, points: tuple[Array, Array], vessels: Tubes, airways: Tubes) -> Sites:
    """Gather the places of a scan at which findings and candidates are put, inside the grid only."""
    scale = float(frame.scale.min())
    middle = frame.to_world((vessels.start + vessels.end) / 2)
    wide = vessels.start_radius * scale > 0.6
    wall = airways.end[3:] + np.array([1.0, 0.6, 0.0]) * airways.end_radius[3:, None]
    forks = np.unique(frame.to_world(vessels.start[vessels.is_fork & wide]), axis=0)
    lung = frame.to_world(points[0])
    within = is_within(frame.geometry, lung)
    airway = frame.to_world(wall)
    return Sites(
        lung_xyz=lung[within],
        depth_mm=points[1][within] * scale,
        fork_xyz=forks[is_within(frame.geometry, forks)],
        airway_xyz=airway[is_within(frame.geometry, airway)],
        vessel_xyz=middle,
        vessel_radius_mm=(vessels.start_radius + vessels.end_radius) / 2 * scale,
    )


def is_within(geometry: Geometry, xyz: Array) -> Array:
    """Whether points (n, 3) lie in the grid, 2 mm and more from the centres of its outermost voxels."""
    margin = 2 / np.array(geometry.spacing_irc)
    irc = geometry.xyz_to_irc(xyz)
    return np.asarray(((irc > margin) & (irc < np.array(geometry.shape_irc) - 1 - margin)).all(axis=1))


def draw_diameter(rng: np.random.Generator, limit: float, quantile: float | None = None) -> float:
    """A nodule's diameter in mm, log-normal as LUNA16's, between 3 mm and `limit`."""
    log = NormalDist(float(np.log(MEDIAN_DIAMETER_MM)), DIAMETER_SPREAD)
    low, high = log.cdf(float(np.log(MIN_DIAMETER_MM + 0.1))), log.cdf(float(np.log(limit)))
    share = rng.uniform() if quantile is None else quantile
    return float(np.exp(log.inv_cdf(low + (high - low) * (0.005 + 0.99 * share))))


def draw_nodules(rng: np.random.Generator, sites: Sites, number: int, limit: float, hard: bool) -> list[Nodule]:
    """The nodules of scan `number`: 1 to 4, none in every fifth scan (3, 8, 13, …)."""
    count = 0 if number % 5 == 3 else int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1]))
    first = (rng.uniform() * 0.06 + 0.6 + number * GOLDEN) % 1.0
    nodules: list[Nodule] = []
    for k in range(count):
        diameter = draw_diameter(rng, limit, first if k == 0 else None)
        kind = KINDS[rng.choice(len(KINDS), p=KIND_SHARES[hard])]
        taken = [(n.center_xyz, n.diameter_mm / 2) for n in nodules]
        found = place_nodule(rng, sites, kind, diameter, taken)
        if found is not None:
            nodules.append(draw_nodule(rng, found[0], found[1], kind, hard))
    return nodules


def place_nodule(
    rng: np.random.Generator, sites: Sites, kind: str, diameter: float, taken: list[tuple[Array, float]]
) -> tuple[Array, float] | None:
    """Centre and diameter for a nodule, 4 mm clear of those `taken`; smaller where the lung is too narrow."""
    for size in (diameter, 0.7 * diameter, 0.5 * diameter, MIN_DIAMETER_MM + 0.2):
        radius = max(size, MIN_DIAMETER_MM + 0.1) / 2
        xyz = nodule_places(rng, sites, kind, radius)
        free = np.ones(len(xyz), dtype=bool)
        for center, other in taken:
            free &= distance(xyz, center) > radius + other + 4
        if free.any():
            places = xyz[free]
            return places[rng.integers(len(places))], 2 * radius
    return None


def nodule_places(rng: np.random.Generator, sites: Sites, kind: str, radius: float) -> Array:
    """Points (n, 3) at which a nodule of this kind and radius may lie."""
    depth = sites.depth_mm
    if kind == "juxta-pleural":
        return np.asarray(sites.lung_xyz[(depth > 0.35 * radius) & (depth < 0.8 * radius)])
    if kind == "juxta-vascular":
        wide = (sites.vessel_radius_mm > 0.25 * radius) & (sites.vessel_radius_mm < 0.8 * radius)
        side = rng.normal(size=(int(wide.sum()), 3))
        side *= 0.7 * radius / np.sqrt((side * side).sum(axis=1, keepdims=True))
        near = sites.vessel_xyz[wide] + side
        deep = sites.lung_xyz[depth > radius]
        return np.asarray([p for p in near if len(deep) and distance(deep, p).min() < 6.0]).reshape(-1, 3)
    return np.asarray(sites.lung_xyz[depth > 1.15 * radius + 1])


def draw_nodule(rng: np.random.Generator, center: Array, diameter: float, kind: str, hard: bool) -> Nodule:
    """Malignancy, density and shape of a nodule; odds of malignancy rise with size and for part-solid ones."""
    odds = (diameter - 9.5) / 2.4 + (0.9 if kind == "part-solid" else 0.0)
    is_malignant = bool(rng.uniform() < 1 / (1 + np.exp(-odds)))
    spiculated = rng.uniform() < (0.65 if is_malignant else 0.08)
    low = -620.0 if hard else -600.0
    return Nodule(
        center_xyz=center,
        diameter_mm=diameter,
        kind=kind,
        is_malignant=is_malignant,
        hu=rng.uniform(-350, 60) if hard else rng.uniform(-50, 100),
        halo_hu=rng.uniform(low, -480 if hard else -420),
        lobes=unit_vectors(rng, 4),
        spikes=unit_vectors(rng, 18 if spiculated else 0),
    )


def draw_look_alikes(
    rng: np.random.Generator, body: Anatomy, frame: Frame, sites: Sites, nodules: list[Nodule], hard: bool
) -> list[LookAlike]:
    """Stubs, plates and wall bumps, clear of all nodules; three in a scan, or 16 of them where it is `hard`."""
    found: list[LookAlike] = []
    for _ in range(16 if hard else 3):
        size = min(draw_diameter(rng, 16.0), 16.0) / 2
        shape = int(rng.integers(3))
        radii = size * np.array([(0.55, 0.55, 2.0), (0.42, 1.3, 1.3), (0.5, 1.2, 1.2)][shape])
        depth = sites.depth_mm
        at = (depth < 0.4 * size) if shape == 2 else (depth > 0.8 * size)
        for other in nodules:
            at &= distance(sites.lung_xyz, other.center_xyz) > other.diameter_mm / 2 + radii.max() + 3
        if not at.any():
            continue
        places = sites.lung_xyz[at]
        center = places[rng.integers(len(places))]
        first = wall_normal(body, frame, center) if shape == 2 else unit_vectors(rng, 1)[0]
        solid = rng.uniform() < 0.75
        hu = rng.uniform(-150, 60) if solid else rng.uniform(-620, -400)
        found.append(LookAlike(center, radii, axes_from(rng, first), hu))
    return found


def wall_normal(body: Anatomy, frame: Frame, xyz: Array) -> Array:
    """Unit vector from a world point towards the nearest lung surface, by central differences over 2 mm."""
    steps = frame.to_model(xyz) + np.vstack([np.eye(3), -np.eye(3)])
    value = body.lung_distance(steps[:, 0], steps[:, 1], steps[:, 2])
    slope = value[:3] - value[3:]
    return np.asarray(slope / max(float(np.sqrt((slope * slope).sum())), 1e-6))


def axes_from(rng: np.random.Generator, first: Array) -> Array:
    """A random orthonormal basis, (3, 3) rows, beginning with `first`."""
    second = np.cross(first, unit_vectors(rng, 1)[0])
    second /= np.sqrt((second * second).sum())
    return np.stack([first, second, np.cross(first, second)])


def unit_vectors(rng: np.random.Generator, num: int) -> Array:
    """Random directions, (num, 3) float64."""
    v = rng.normal(size=(num, 3))
    return np.asarray(v / np.sqrt((v * v).sum(axis=1, keepdims=True)))


def distance(xyz: Array, center: Array) -> Array:
    """Distance of points (n, 3) from one point, mm."""
    return np.asarray(np.sqrt(((xyz - center) ** 2).sum(axis=1)))


def world_window(grid: Grid, frame: Frame, center: Array, reach: float) -> tuple[Array, tuple[Array, ...]] | None:
    """Part of the volume within `reach` mm of a world point, and its voxels' offsets x, y, z from it in mm."""
    c = frame.to_model(center)
    found = grid.window(c - reach / frame.scale, c + reach / frame.scale)
    if found is None:
        return None
    hu, (z, y, x) = found
    zyx = (((v - np.float32(m)) * np.float32(s)) for v, m, s in zip((z, y, x), c[::-1], frame.scale[::-1], strict=True))
    return hu, tuple(zyx)[::-1]


def paint_nodule(grid: Grid, frame: Frame, nodule: Nodule) -> None:
    """Paint a nodule: lobulated, spiculated where it has spikes, a soft halo where it is not solid."""
    radius = nodule.diameter_mm / 2
    voxel = float(np.cbrt(np.prod(frame.geometry.spacing)))
    found = world_window(grid, frame, nodule.center_xyz, radius * 1.7 + 2 * voxel)
    if found is None:
        return
    hu, (x, y, z) = found
    r = np.sqrt(x * x + y * y + z * z) + 1e-3
    shape = np.full_like(r, 0.98)
    for k, q in enumerate(nodule.lobes.tolist()):
        cosine = (x * q[0] + y * q[1] + z * q[2]) / r
        shape += (0.035 + 0.02 * k) * (np.clip(cosine, 0, 1) ** 3 - 0.125)
    for q in nodule.spikes.tolist():
        cosine = (x * q[0] + y * q[1] + z * q[2]) / r
        shape += 0.6 * np.clip((cosine - 0.95) * 20, 0, 1) ** 2
    if nodule.kind in ("part-solid", "ground-glass"):
        soften(hu, coverage(r - radius * shape, 1.6 * voxel), nodule.halo_hu)
        radius *= 0.5 if nodule.kind == "part-solid" else 0.0
    if radius:
        soften(hu, coverage(r - radius * shape, voxel), nodule.hu)


def soften(hu: Array, alpha: Array, value: float) -> None:
    """Raise HU to `value` by the share `alpha`, mixed with lung."""
    np.maximum(hu, LUNG_BG_HU + alpha * (value - LUNG_BG_HU), out=hu)


def paint_look_alike(grid: Grid, frame: Frame, thing: LookAlike) -> None:
    """Paint an ellipsoid that is no nodule."""
    voxel = float(np.cbrt(np.prod(frame.geometry.spacing)))
    found = world_window(grid, frame, thing.center_xyz, float(thing.radii_mm.max()) + 2 * voxel)
    if found is None:
        return
    hu, (x, y, z) = found
    q = np.zeros(hu.shape, dtype=np.float32)
    for axis, radius in zip(thing.axes.tolist(), thing.radii_mm.tolist(), strict=True):
        q += ((x * axis[0] + y * axis[1] + z * axis[2]) / max(radius, 0.5 * voxel)) ** 2
    soften(hu, coverage((np.sqrt(q) - 1) * max(float(thing.radii_mm.min()), 0.5 * voxel), voxel), thing.hu)


def draw_negatives(rng: np.random.Generator, sites: Sites, findings: Findings, num: int, hard: bool) -> Array:
    """Centres of `num` negative candidates, (num, 3): forks, walls, airways, lung, look-alikes; none in a nodule."""
    pools = (
        sites.fork_xyz,
        sites.lung_xyz[sites.depth_mm < 2.5],
        sites.airway_xyz,
        sites.lung_xyz,
        np.array([t.center_xyz for t in findings.look_alikes]).reshape(-1, 3),
    )
    shares = np.array([s if len(p) else 0.0 for s, p in zip(SOURCE_SHARES[hard], pools, strict=True)])
    rows: list[Array] = []
    while len(rows) < num:
        pool = pools[rng.choice(len(pools), p=shares / shares.sum())]
        xyz = pool[rng.integers(len(pool))] + rng.uniform(-0.9, 0.9, size=3)
        if all(np.sqrt(((xyz - n.center_xyz) ** 2).sum()) > n.diameter_mm / 2 + 1 for n in findings.nodules):
            rows.append(xyz)
    return np.array(rows).reshape(-1, 3)


def draw_positives(rng: np.random.Generator, geometry: Geometry, center: Array, diameter: float) -> Array:
    """One candidate of a nodule, in one of five nodules two, within 0.24 of its diameter from `center`, (n, 3)."""
    tries = center + unit_vectors(rng, 32) * (diameter * rng.uniform(0.01, 0.24, size=(32, 1)))
    count = 2 if rng.uniform() < 0.2 else 1
    return np.asarray(tries[is_within(geometry, tries)][:count])
