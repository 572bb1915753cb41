"""One synthetic chest CT: its grid, its patient, its findings and its voxels, from seed and number alone."""

from dataclasses import dataclass

import numpy as np

from lunaprep.geometry import IDENTITY, Geometry
from lunaprep.sources.phantom_anatomy import (
    MODEL_FOV_MM,
    MODEL_HEIGHT_MM,
    Anatomy,
    Array,
    Canvas,
    draw_anatomy,
    paint_slice,
)
from lunaprep.sources.phantom_findings import (
    MAX_DIAMETER_MM,
    Findings,
    Frame,
    Nodule,
    Sites,
    draw_look_alikes,
    draw_negatives,
    draw_nodules,
    draw_positives,
    find_sites,
    paint_look_alike,
    paint_nodule,
    unit_vectors,
)
from lunaprep.sources.phantom_trees import Grid, grow_airways, grow_vessels, lung_points, paint_trees, paint_tube

UID_PREFIX = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
"""Root of LIDC-IDRI's series UIDs (TCIA); LUNA16's carry it, with 30 digits behind."""

OUTSIDE_HU = -3024
"""What GE scanners write outside the circular field of view."""

AIR_FLOOR_HU, METAL_HU = -1024, 3071
"""Ends of the 12-bit range in the field of view."""

FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)

MAX_PIXEL_MM = 2.0
"""Coarsest pixel in a small grid, so that a nodule of 3 mm is still 1.5 pixels wide."""

TEXTURE_MM = 7.0
"""Pitch of the smooth noise in tissue, model mm."""

IDENTITY_STREAM, PATIENT_STREAM, GRID_STREAM, TREE_STREAM, FINDING_STREAM, ROW_STREAM, NOISE_STREAM = range(7)


@dataclass(frozen=True)
class Row:
    """One row of a CSV file: a point (world, mm), what it carries, and malignancy where it is a nodule."""

    xyz: Array
    value: float | int
    is_malignant: bool = False


@dataclass(frozen=True)
class PhantomScan:
    """One scan as written: `hu` (slices, rows, columns) int16 on `geometry`, and its rows of the CSV files."""

    series_uid: str
    patient_id: str
    geometry: Geometry
    hu: Array
    nodules: list[Nodule]
    annotations: list[Row]
    excluded: list[Row]
    candidates: list[Row]


def stream(seed: int, number: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose in one scan, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence((seed, number, purpose)))


def draw_series_uid(seed: int, number: int) -> str:
    """A series UID as LUNA16's: its root and 30 digits."""
    digits = stream(seed, number, IDENTITY_STREAM).integers(0, 10, size=30)
    digits[0] = 1 + digits[0] % 9
    return UID_PREFIX + "".join(str(d) for d in digits)


def patient_number(number: int) -> int:
    """Patient of a scan, from 1; scans 4 and 5 are of one patient."""
    return number + 1 if number < 5 else number


def draw_grid(seed: int, number: int, size: tuple[int, int, int]) -> Geometry:
    """The unflipped grid of a scan: awkward spacing and origin, pixels of at most 2 mm, slices of at most 2.5 mm."""
    rng = stream(seed, number, GRID_STREAM)
    pixel = min(rng.uniform(325, 378) / min(size[1:]), rng.uniform(0.94, 0.995) * MAX_PIXEL_MM)
    thickness = min(rng.uniform(270, 325) / size[0], rng.uniform(2.15, 2.49))
    spacing = (float(np.float32(pixel)), float(np.float32(pixel)), float(np.float32(thickness)))
    aside = 260.0 if number % 4 == 3 else 0.0
    origin = (
        round(-0.5 * pixel * size[2] + rng.uniform(-35, 35) + aside, 6),
        round(-0.5 * pixel * size[1] + rng.uniform(-35, 35) + aside, 6),
        round(rng.uniform(-420, 160), 6),
    )
    return Geometry(origin, spacing, IDENTITY, size)


def flip(geometry: Geometry) -> Geometry:
    """The grid of the same voxels with x and y running backwards, as in LUNA16's flipped scans."""
    _, rows, cols = geometry.shape_irc
    corner = geometry.irc_to_xyz((0, rows - 1, cols - 1))
    origin = (float(corner[0]), float(corner[1]), float(corner[2]))
    return Geometry(origin, geometry.spacing, FLIPPED, geometry.shape_irc)


def fit_body(geometry: Geometry) -> Frame:
    """The frame that fits the whole thorax into the grid, its field of view and its height."""
    slices, rows, cols = geometry.shape_irc
    across = min(rows, cols) * geometry.spacing[0] / MODEL_FOV_MM
    along = slices * geometry.spacing[2] / MODEL_HEIGHT_MM
    middle = geometry.irc_to_xyz((-0.5, (rows - 1) / 2, (cols - 1) / 2))
    return Frame(geometry, np.array([across, across, along]), middle + np.array([0.0, -6.0 * across, 0.0]))


def make_grid(frame: Frame) -> Grid:
    """An empty volume on the frame's grid."""
    geometry = frame.geometry
    start = frame.to_model(np.array(geometry.origin))[::-1]
    step = np.array(geometry.spacing_irc) / frame.scale[::-1]
    return Grid(np.empty(geometry.shape_irc, dtype=np.float32), start, step)


def axis_weights(length: int, start: float, step: float, first: float) -> tuple[Array, Array]:
    """For linear interpolation on the texture grid: lower node and share of the upper one, per voxel."""
    at = (start + step * np.arange(length) - first) / TEXTURE_MM
    node = np.floor(at).astype(int)
    return node, (at - node).astype(np.float32)


def paint_body(rng: np.random.Generator, grid: Grid, body: Anatomy) -> None:
    """Paint all slices of the body, without trees and findings."""
    low, stop = grid.start - TEXTURE_MM, grid.start + grid.step * grid.hu.shape
    nodes = rng.standard_normal(tuple(((stop - low) / TEXTURE_MM).astype(int) + 3), dtype=np.float32) * 1.6
    ends = [axis_weights(n, s, d, f) for n, s, d, f in zip(grid.hu.shape, grid.start, grid.step, low, strict=True)]
    (i, si), (r, sr), (c, sc) = ends
    y = (grid.start[1] + grid.step[1] * np.arange(grid.hu.shape[1])).astype(np.float32)[:, None]
    x = (grid.start[2] + grid.step[2] * np.arange(grid.hu.shape[2])).astype(np.float32)[None]
    for k, hu in enumerate(grid.hu):
        plane = nodes[i[k]] * (1 - si[k]) + nodes[i[k] + 1] * si[k]
        rows = plane[r] * (1 - sr)[:, None] + plane[r + 1] * sr[:, None]
        texture = rows[:, c] * (1 - sc) + rows[:, c + 1] * sc
        z = np.array(grid.start[0] + grid.step[0] * k, dtype=np.float32)
        paint_slice(body, Canvas(hu, x, y, z, float(grid.step[1])), texture)


def paint_metal(rng: np.random.Generator, grid: Grid) -> None:
    """Paint a piece of metal, in the left chest wall or in the spine, with mild streaks in its slices."""
    wall = rng.uniform() < 0.6
    start, end = ((82.0, -74.0, 226.0), (100.0, -64.0, 242.0)) if wall else ((-15.0, 72.0, 118.0), (-4.0, 52.0, 122.0))
    ends = np.array(start), np.array(end)
    paint_tube(grid, ends, (5.0, 5.0), 12000.0)
    dy = (grid.start[1] + grid.step[1] * np.arange(grid.hu.shape[1]) - (start[1] + end[1]) / 2).astype(np.float32)
    dx = (grid.start[2] + grid.step[2] * np.arange(grid.hu.shape[2]) - (start[0] + end[0]) / 2).astype(np.float32)
    far = np.sqrt(dx[None] ** 2 + dy[:, None] ** 2)
    rays = np.cos(8 * np.arctan2(dy[:, None], dx[None]) + np.float32(rng.uniform(0, 6))) ** 3
    streak = np.float32(220) * rays * np.exp(-far / np.float32(70))
    for k, hu in enumerate(grid.hu):
        z = grid.start[0] + grid.step[0] * k
        beyond = max(start[2] - z, z - end[2], 0.0)
        if beyond < 8:
            hu += streak * np.float32(1 - beyond / 8)


def add_noise(rng: np.random.Generator, hu: Array, sigma: float) -> Array:
    """Volume as int16 with the scanner's noise, clipped to 12 bits, -3024 outside the field of view.

    The noise is Gaussian, smoothed by (1, 2, 1) / 4 in the plane as a soft kernel does, with correlation 0.35
    between slices, a quarter stronger on the axis than at the rim of the field of view.
    """
    _, rows, cols = hu.shape
    y, x = np.arange(rows)[:, None] - (rows - 1) / 2, np.arange(cols)[None] - (cols - 1) / 2
    far = np.sqrt(y * y + x * x) / (min(rows, cols) / 2)
    strength = (sigma * (1.1 - 0.25 * np.minimum(far, 1))).astype(np.float32)
    outside = far > 1
    out = np.empty(hu.shape, dtype="<i2")
    last = np.zeros((rows, cols), dtype=np.float32)
    for k, plane in enumerate(hu):
        white = rng.standard_normal((rows + 2, cols + 2), dtype=np.float32)
        tall = white[:-2] + 2 * white[1:-1] + white[2:]
        smooth = (tall[:, :-2] + 2 * tall[:, 1:-1] + tall[:, 2:]) / 6
        last = smooth if k == 0 else 0.35 * last + np.float32(0.9368) * smooth
        noisy = np.clip(np.rint(plane + strength * last), AIR_FLOOR_HU, METAL_HU)
        noisy[outside] = OUTSIDE_HU
        out[k] = noisy
    return out


def draw_findings(
    rng: np.random.Generator, body: Anatomy, frame: Frame, sites: Sites, number: int, hard: bool
) -> Findings:
    """Nodules of 3 mm and more, dots below that, and look-alikes."""
    across = min(frame.geometry.shape_irc[1:]) * frame.geometry.spacing[0]
    limit = min(MAX_DIAMETER_MM, 0.16 * across)
    nodules = draw_nodules(rng, sites, number, limit, hard)
    look_alikes = draw_look_alikes(rng, body, frame, sites, nodules, hard)
    deep = sites.lung_xyz[sites.depth_mm > 2.5]
    dots: list[Nodule] = []
    for _ in range(int(rng.integers(1, 4))):
        center = deep[rng.integers(len(deep))]
        if all(np.sqrt(((center - n.center_xyz) ** 2).sum()) > n.diameter_mm / 2 + 5 for n in nodules):
            none = np.zeros((0, 3))
            dots.append(Nodule(center, rng.uniform(1.8, 2.9), "solid", False, 40.0, -500.0, none, none))
    return Findings(nodules, dots, look_alikes)


def paint_scan(seed: int, number: int, size: tuple[int, int, int], hard: bool) -> tuple[Frame, Sites, Findings, Array]:
    """Voxels (int16, unflipped) of one scan, with its frame, sites and findings."""
    frame = fit_body(draw_grid(seed, number, size))
    body = draw_anatomy(stream(seed, patient_number(number), PATIENT_STREAM))
    grid = make_grid(frame)
    rng = stream(seed, number, TREE_STREAM)
    vessels, airways = grow_vessels(rng, body, grid.voxel), grow_airways(rng, body)
    sites = find_sites(frame, lung_points(rng, body, 9000), vessels, airways)
    findings = draw_findings(stream(seed, number, FINDING_STREAM), body, frame, sites, number, hard)
    rng = stream(seed, number, NOISE_STREAM)
    paint_body(rng, grid, body)
    paint_trees(grid, vessels, airways)
    for thing in findings.look_alikes:
        paint_look_alike(grid, frame, thing)
    for nodule in (*findings.nodules, *findings.dots):
        paint_nodule(grid, frame, nodule)
    if number % 5 == 1:
        paint_metal(rng, grid)
    sigma = rng.uniform(44, 56) if hard else rng.uniform(25, 38)
    return frame, sites, findings, add_noise(rng, grid.hu, sigma)


def off_the_halves(geometry: Geometry, xyz: Array) -> Array:
    """The point, rounded to 9 decimals and moved a little where it lies within 0.02 voxel of a half."""
    irc = geometry.xyz_to_irc(xyz)
    near = np.abs(irc - np.floor(irc) - 0.5) < 0.02
    return np.round(geometry.irc_to_xyz(irc + 0.05 * near), 9)


def draw_rows(
    rng: np.random.Generator, frame: Frame, sites: Sites, findings: Findings, num: int, hard: bool
) -> tuple[list[Row], list[Row], list[Row]]:
    """Annotations, excluded findings and shuffled candidates of one scan, all inside its grid."""
    geometry = frame.geometry
    annotations, candidates = [], []
    for nodule in findings.nodules:
        center = off_the_halves(geometry, nodule.center_xyz + unit_vectors(rng, 1)[0] * rng.uniform(0.02, 0.24))
        annotations.append(Row(center, round(nodule.diameter_mm, 9), nodule.is_malignant))
        positives = draw_positives(rng, geometry, center, nodule.diameter_mm)
        candidates += [Row(off_the_halves(geometry, p), 1) for p in positives]
    excluded = [Row(off_the_halves(geometry, d.center_xyz), round(d.diameter_mm, 9)) for d in findings.dots]
    for thing in findings.look_alikes[:2]:
        excluded.append(Row(off_the_halves(geometry, thing.center_xyz), -1))
    negatives = draw_negatives(rng, sites, findings, num, hard)
    candidates += [Row(off_the_halves(geometry, p), 0) for p in negatives]
    candidates = [candidates[k] for k in rng.permutation(len(candidates))]
    return annotations, excluded, candidates


def make_scan(seed: int, number: int, size: tuple[int, int, int], hard: bool, num_candidates: int) -> PhantomScan:
    """Scan `number` of the phantom of this seed, whatever the number of scans in all."""
    frame, sites, findings, hu = paint_scan(seed, number, size, hard)
    rows = draw_rows(stream(seed, number, ROW_STREAM), frame, sites, findings, num_candidates, hard)
    is_flipped = number % 6 == 2
    return PhantomScan(
        series_uid=draw_series_uid(seed, number),
        patient_id=f"PHANTOM-{patient_number(number):04d}",
        geometry=flip(frame.geometry) if is_flipped else frame.geometry,
        hu=np.ascontiguousarray(hu[:, ::-1, ::-1]) if is_flipped else hu,
        nodules=findings.nodules,
        annotations=rows[0],
        excluded=rows[1],
        candidates=rows[2],
    )
