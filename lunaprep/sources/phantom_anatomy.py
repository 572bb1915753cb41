"""The body of a synthetic chest CT: tissue, bone, lungs, vessel and airway trees, painted slice by slice.

Everything here is in *model millimetres* of one adult thorax: x to the patient's left, y to the back, z to the
head (LPS), x and y within ±175 (a 350 mm field of view), z from 0 to 300. `Frame` of `phantom_findings` maps
them to a scan's world. Distances are signed, negative inside. HU of tissues: Hounsfield scale as tabulated in
Kalender, Computed Tomography (2011), chapter 1: fat -100, muscle 50, lung -850, bone 300 to 1000.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Point = tuple[float, float, float]

MODEL_FOV_MM = 350.0
MODEL_HEIGHT_MM = 300.0

AIR_HU, FAT_HU, MUSCLE_HU, VESSEL_HU, BONE_HU = -1000.0, -105.0, 48.0, 45.0, 780.0
MARROW_HU = 260.0

HILA: tuple[Point, Point] = ((-46.0, 10.0, 152.0), (52.0, 12.0, 150.0))
"""Where vessels and bronchi enter the right and the left lung, model mm."""

CARINA: Point = (0.0, 12.0, 182.0)


def smooth_min(a: Array, b: Array, width: float) -> Array:
    """Minimum of two distances with the crease rounded over `width` mm (Quilez, polynomial smooth minimum)."""
    bend = np.maximum(width - np.abs(a - b), 0)
    return np.asarray(np.minimum(a, b) - bend * bend * (0.25 / width))


def ellipsoid(x: Array, y: Array, z: Array, centre: Point, radii: Point) -> Array:
    """Distance to an ellipsoid, mm: right along the axis of its least radius, near enough elsewhere."""
    q = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((z - centre[2]) / radii[2]) ** 2
    return np.asarray((np.sqrt(q) - 1) * min(radii))


def column(x: Array, y: Array, centre: tuple[float, float], radii: tuple[float, float]) -> Array:
    """Distance to an elliptic column along z, mm."""
    q = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2
    return np.asarray((np.sqrt(q) - 1) * min(radii))


def smooth_step(z: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((z - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


@dataclass(frozen=True)
class Anatomy:
    """One patient's measures, model mm and HU; the defaults are an average adult's."""

    half_width: float = 156.0
    half_depth: float = 106.0
    fat: float = 11.0
    heart: float = 1.0
    """Heart size, 1 is average."""
    domes: tuple[float, float] = (74.0, 60.0)
    """Height of the right and the left diaphragm dome."""
    rib_pitch: float = 25.0
    rib_phase: float = 0.0
    lung_hu: float = -856.0

    def skin_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to the skin, mm, negative in the body."""
        shoulder = smooth_step(z, 190, 285)
        u = (x / (self.half_width + 9 * shoulder)) ** 2
        v = (y / (self.half_depth - 6 * shoulder)) ** 2
        return radial_distance(np.sqrt(u * u + v * v + 1.35 * u * v), x, y)

    def cavity_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to the inside of the rib cage, mm, negative inside."""
        taper = 1 - 0.24 * smooth_step(z, 170, 300)
        u = (x / ((self.half_width - 34) * taper)) ** 2
        v = ((y - 1) / ((self.half_depth - 23) * taper)) ** 2
        return radial_distance(np.sqrt(u * u + v * v + 1.6 * u * v), x, y)

    def heart_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to the heart, mm; it leans to the patient's left."""
        k = self.heart
        tilted = x + 0.35 * (y + 32)
        main = ellipsoid(tilted, y, z, (32.0, -32.0, 98.0), (52 * k, 37 * k, 52 * k))
        return smooth_min(main, ellipsoid(x, y, z, (-14.0, -20.0, 116.0), (32 * k, 34 * k, 46 * k)), 14)

    def mediastinum_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to all that lies between the lungs: vessels, heart, hila, spine and front fold, mm."""
        middle = column(x, y, (3.0, 6.0), (25.0, 50.0))
        spine = np.minimum(column(x, y, (0.0, 62.0), (25.0, 24.0)), column(x, y, (22.0, 44.0), (15.0, 15.0)))
        body = smooth_min(middle, spine, 10)
        body = smooth_min(body, np.maximum(np.abs(x - 3) - 4, y + 20), 8)
        for centre in HILA:
            body = smooth_min(body, ellipsoid(x, y, z, centre, (9.0, 13.0, 20.0)), 14)
        return smooth_min(body, self.heart_distance(x, y, z), 8)

    def diaphragm_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance above the diaphragm's two domes, mm, negative above; the back recess reaches lowest."""
        right = self.domes[0] - 80 * ((x + 54) / 80) ** 2
        left = self.domes[1] - 80 * ((x - 58) / 80) ** 2
        height = np.where(x < 0, right, left) - 78 * ((y + 14) / 88) ** 2
        return np.asarray((height - z) * 0.72)

    def lung_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to the surface of both lungs, mm, negative inside; any shapes that broadcast."""
        apex = ellipsoid(np.abs(x), y, z, (60.0, 6.0, 120.0), (72.0, 98.0, 168.0))
        inside = np.maximum(self.cavity_distance(x, y, z), apex)
        inside = np.maximum(inside, -self.mediastinum_distance(x, y, z))
        return np.asarray(np.maximum(inside, self.diaphragm_distance(x, y, z)))

    def rib_distance(self, x: Array, y: Array, z: Array, cavity: Array) -> Array:
        """Distance to the ribs, mm: slanted rings 8 mm outside the `cavity`, open in front."""
        phase = (z + self.rib_phase + 0.42 * y - 0.04 * x) / self.rib_pitch
        dz = (phase - np.floor(phase) - 0.5) * self.rib_pitch
        ring = (np.sqrt(((cavity - 8) / 4.0) ** 2 + (dz / 6.0) ** 2) - 1) * 4.0
        return np.asarray(np.maximum(ring, np.where(y < 0, 46 - np.abs(x), -9)))


def radial_distance(norm: Array, x: Array, y: Array) -> Array:
    """Distance along the ray from (0, 0) to where `norm`, homogeneous of degree 2, is 1, mm."""
    return np.asarray(np.sqrt(x * x + y * y) * (1 - 1 / np.sqrt(np.maximum(norm, 1e-4))))


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One patient, every measure spread by a few per cent about the average."""
    return Anatomy(
        half_width=rng.uniform(148, 161),
        half_depth=rng.uniform(101, 110),
        fat=rng.uniform(7, 14),
        heart=rng.uniform(0.9, 1.08),
        domes=(rng.uniform(66, 82), rng.uniform(54, 68)),
        rib_pitch=rng.uniform(23, 27),
        rib_phase=rng.uniform(0, 25),
        lung_hu=rng.uniform(-866, -846),
    )


@dataclass(frozen=True)
class Canvas:
    """One slice being painted: HU (rows, columns) float32, and where its voxels lie in model mm."""

    hu: Array
    x: Array
    """(1, columns) float32."""
    y: Array
    """(rows, 1) float32."""
    z: Array
    """0-d float32."""
    voxel: float
    """Model mm over which an edge is spread: partial volume."""

    def fill(self, distance: Array, value: Array | float) -> None:
        """Paint `value` where `distance` is negative."""
        self.hu[...] += coverage(distance, self.voxel) * (value - self.hu)

    def ellipse(self, centre: tuple[float, float], radii: tuple[float, float], value: float, angle: float = 0) -> None:
        """Paint an ellipse turned by `angle` rad; only the window about it is touched."""
        reach = max(radii) + 2 * self.voxel
        cols = np.flatnonzero(np.abs(self.x[0] - centre[0]) < reach)
        rows = np.flatnonzero(np.abs(self.y[:, 0] - centre[1]) < reach)
        if not (cols.size and rows.size):
            return
        window = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        dx = self.x[:, window[1]] - centre[0]
        dy = self.y[window[0]] - centre[1]
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        distance = column(dx * cos + dy * sin, dy * cos - dx * sin, (0.0, 0.0), radii)
        part = self.hu[window]
        part += coverage(distance, self.voxel) * (value - part)


def coverage(distance: Array, voxel: float) -> Array:
    """Share of a voxel that lies inside, 0 to 1, given its centre's distance from the surface."""
    return np.asarray(np.clip(0.5 - distance / voxel, 0, 1))


def paint_slice(body: Anatomy, canvas: Canvas, texture: Array) -> None:
    """Paint one axial slice without vessels, findings and noise.

    Parameters
    ----------
    body : Anatomy
    canvas : Canvas
        Its `hu` is overwritten.
    texture : ndarray, (rows, columns) float32
        Smooth noise of mean 0 and deviation 1: fat streaks in muscle, uneven parenchyma.
    """
    canvas.hu[...] = AIR_HU
    paint_table(canvas)
    rows = np.flatnonzero(np.abs(canvas.y[:, 0]) < body.half_depth + canvas.voxel)
    part = np.s_[rows[0] : rows[-1] + 1]
    canvas = Canvas(canvas.hu[part], canvas.x, canvas.y[part], canvas.z, canvas.voxel)
    texture = texture[part]
    x, y, z = canvas.x, canvas.y, canvas.z
    skin = body.skin_distance(x, y, z)
    cavity = body.cavity_distance(x, y, z)
    canvas.fill(skin, 15.0)
    canvas.fill(skin + 2.2, FAT_HU + 5 * texture)
    muscle = skin + body.fat + 5 * np.abs(y) / body.half_depth
    canvas.fill(muscle, MUSCLE_HU - 120 * np.clip(texture - 1.1, 0, 1.2))
    paint_between_lungs(body, canvas, cavity)
    lung = body.lung_distance(x, y, z)
    canvas.fill(lung, body.lung_hu + 0.3 * y + 17 * texture)
    paint_fissures(canvas, lung)
    rib = body.rib_distance(x, y, z, cavity)
    canvas.fill(rib, BONE_HU)
    canvas.fill(rib + 2.2, MARROW_HU)
    paint_bones(body, canvas)


def paint_table(canvas: Canvas) -> None:
    """Paint the scanner's table: a curved shell below the back."""
    sag = canvas.y - 126 + 0.0012 * canvas.x * canvas.x
    canvas.fill(np.abs(sag) - 2.0, -250.0)
    canvas.fill(np.abs(sag - 10) - 8.0, -930.0)


def paint_between_lungs(body: Anatomy, canvas: Canvas, cavity: Array) -> None:
    """Paint fat, heart, great vessels, gullet and what lies under the diaphragm."""
    x, y, z = canvas.x, canvas.y, canvas.z
    canvas.fill(cavity + 2, -90.0)
    below = np.maximum(cavity + 3, -body.diaphragm_distance(x, y, z) - 1.5)
    canvas.fill(np.maximum(below, x - 12), 58.0)
    canvas.fill(np.maximum(below, 8 - x), 44.0)
    canvas.fill(np.maximum(below + 6, ellipsoid(x, y, z, (62.0, -34.0, 30.0), (26.0, 16.0, 17.0))), -960.0)
    canvas.fill(body.heart_distance(x, y, z) + 4, VESSEL_HU)
    canvas.fill(ellipsoid(x, y, z, (14.0, 4.0, 214.0), (15.0, 42.0, 13.0)), VESSEL_HU)
    canvas.fill(ellipsoid(x, y, z, (8.0, -6.0, 158.0), (46.0, 14.0, 13.0)), VESSEL_HU)
    canvas.ellipse((22.0, 43.0), (12.0, 12.0), VESSEL_HU if z < 216 else 20.0)
    canvas.ellipse((7.0, 32.0), (7.0, 5.0), 32.0)
    if z > 140:
        canvas.ellipse((-19.0, -18.0), (9.0, 9.0), VESSEL_HU)
        canvas.ellipse((6.0, -26.0), (14.0, 13.0), VESSEL_HU if z < 218 else 10.0)


def paint_fissures(canvas: Canvas, lung: Array) -> None:
    """Paint both oblique fissures, a plane of a millimetre that shows as a faint line."""
    plane = np.abs((canvas.z - 150 + 1.25 * (canvas.y + 20) - 0.1 * np.abs(canvas.x)) * 0.62) - 0.45
    canvas.hu[...] += coverage(np.maximum(plane, lung + 1), canvas.voxel) * min(130.0, 130 / canvas.voxel)


def paint_bones(body: Anatomy, canvas: Canvas) -> None:
    """Paint spine, breast bone and shoulder blades; the ribs are painted before."""
    z = float(canvas.z)
    disc = abs((z / 27) % 1 - 0.5) > 0.41
    canvas.ellipse((0.0, 60.0), (18.5, 15.5), 110.0 if disc else BONE_HU * 0.8)
    canvas.ellipse((0.0, 60.0), (16.0, 13.0), 95.0 if disc else MARROW_HU * 0.85)
    canvas.ellipse((0.0, 78.0), (12.0, 10.0), BONE_HU * 0.6)
    canvas.ellipse((0.0, 78.0), (8.0, 7.0), 25.0)
    canvas.ellipse((0.0, 92.0), (3.2, 8.0), BONE_HU * 0.7)
    for side in (-1.0, 1.0):
        canvas.ellipse((side * 22, 76.0), (12.0, 4.2), BONE_HU * 0.6, side * 0.35)
        if z > 150:
            out = min(1.0, (z - 150) / 60)
            canvas.ellipse((side * 106, 62.0), (9 + 20 * out, 3.4), BONE_HU, side * -0.85)
    if 70 < z < 262:
        front = 12.5 - body.half_depth
        canvas.ellipse((0.0, front), (17.0, 5.4), BONE_HU * 0.7)
        canvas.ellipse((0.0, front), (14.5, 3.2), MARROW_HU * 0.7)
