"""Vessel and airway trees of the synthetic lungs, grown through random points and painted as tapering tubes.

Units are model millimetres, as in `phantom_anatomy`.
"""

from dataclasses import dataclass

import numpy as np

from lunaprep.sources.phantom_anatomy import AIR_HU, CARINA, HILA, VESSEL_HU, Anatomy, Array, Point, coverage

LUNG_BG_HU = -850.0
"""What partial volume at the edge of a vessel or nodule mixes with, HU."""

VESSEL_BALANCE, AIRWAY_BALANCE = 0.16, 0.45
"""Weight of the path to the root against the new branch's own length (Cuntz et al. 2010, balancing factor)."""

MURRAY = 2.4
"""Exponent of r_parent^e = sum of r_child^e at a branching (Murray 1926: 3; less in large vessels)."""


@dataclass(frozen=True)
class Tubes:
    """Tapering tubes: (n, 3) ends and (n,) radii, model mm; `is_fork` marks a `start` where a tree branches."""

    start: Array
    end: Array
    start_radius: Array
    end_radius: Array
    is_fork: Array


@dataclass(frozen=True)
class Grid:
    """A volume being painted: HU (slices, rows, columns) float32, voxel (0, 0, 0) and steps in model mm, irc order."""

    hu: Array
    start: Array
    step: Array

    @property
    def voxel(self) -> float:
        """Model mm over which an edge is spread."""
        return float(np.cbrt(self.step.prod()))

    def window(self, low: Array, high: Array) -> tuple[Array, tuple[Array, Array, Array]] | None:
        """Part of `hu` from `low` to `high` (x y z, model mm), with its z (n,1,1), y (n,1) and x (n,)."""
        first = np.maximum(np.floor((low[::-1] - self.start) / self.step), 0).astype(int)
        stop = np.minimum(np.ceil((high[::-1] - self.start) / self.step) + 1, self.hu.shape).astype(int)
        if (first >= stop).any():
            return None
        z, y, x = ((self.start[a] + self.step[a] * np.arange(first[a], stop[a])).astype(np.float32) for a in range(3))
        part = self.hu[first[0] : stop[0], first[1] : stop[1], first[2] : stop[2]]
        return part, (z[:, None, None], y[:, None], x)


def grow_tree(root: Point, points: Array, leaf_radius: float, balance: float) -> Tubes:
    """Join points to a tree, always by the branch that is cheapest in own length and path to the root.

    Parameters
    ----------
    root : tuple of 3 float
        Where the tree starts.
    points : ndarray, (n, 3) float64
        Points it has to reach.
    leaf_radius : float
        Radius of its thinnest branches; Murray's law gives the others.
    balance : float
        Cost of a millimetre of path to the root; low gives few long trunks, high gives many straight ones.

    Returns
    -------
    Tubes
        n tubes, one to each point.
    """
    num = len(points)
    nodes = np.vstack([np.array([root]), points])
    parent = np.zeros(num + 1, dtype=np.int64)
    path = np.zeros(num + 1)
    cost = np.sqrt(((points - nodes[0]) ** 2).sum(axis=1))
    order: list[int] = []
    for _ in range(num):
        new = int(np.argmin(cost)) + 1
        order.append(new)
        step = nodes[new] - nodes[parent[new]]
        path[new] = path[parent[new]] + np.sqrt((step * step).sum())
        cost[new - 1] = np.inf
        offer = np.sqrt(((points - nodes[new]) ** 2).sum(axis=1)) + balance * path[new]
        better = (offer < cost) & np.isfinite(cost)
        cost[better] = offer[better]
        parent[1:][better] = new
    leaves = np.zeros(num + 1)
    children = np.zeros(num + 1, dtype=np.int64)
    for node in reversed(order):
        leaves[node] = max(leaves[node], 1.0)
        leaves[parent[node]] += leaves[node]
        children[parent[node]] += 1
    radius = leaf_radius * leaves ** (1 / MURRAY)
    up = parent[1:]
    start_radius = np.minimum(radius[up], radius[1:] * 1.25)
    return Tubes(nodes[up], nodes[1:], start_radius, radius[1:], children[up] > 1)


def lung_points(rng: np.random.Generator, body: Anatomy, num: int) -> tuple[Array, Array]:
    """About `num` points spread evenly over both lungs, (n, 3) float64, and their depth below the surface, (n,)."""
    low, high = np.array([-130.0, -95.0, 0.0]), np.array([130.0, 95.0, 292.0])
    xyz = rng.uniform(low, high, size=(num * 3, 3))
    depth = -body.lung_distance(xyz[:, 0], xyz[:, 1], xyz[:, 2])
    inside = depth > 0
    return xyz[inside], depth[inside]


def grow_vessels(rng: np.random.Generator, body: Anatomy, voxel: float) -> Tubes:
    """Arteries and veins of both lungs; coarser voxels get fewer and thicker ones, none that would not show."""
    num = int(np.clip(1250 / voxel, 130, 950))
    leaf = max(0.56, 0.24 * voxel)
    trees = []
    for side, hilum in zip((-1, 1), HILA, strict=True):
        for drop, share in ((0.0, 0.6), (-22.0, 0.4)):
            xyz, depth = lung_points(rng, body, num * 2)
            keep = (xyz[:, 0] * side > 0) & (depth > 3.0)
            root = (hilum[0], hilum[1] + drop * 0.4, hilum[2] + drop)
            trees.append(grow_tree(root, xyz[keep][: int(num * share)], leaf, VESSEL_BALANCE))
    return join_tubes(trees)


def grow_airways(rng: np.random.Generator, body: Anatomy) -> Tubes:
    """Lumen of trachea and bronchi down to those of about a millimetre in the inner two thirds of the lungs."""
    trunk = np.array([(0.0, 10.0, 330.0), CARINA, *HILA])
    radii = np.array([8.6, 8.4, 5.6, 5.6])
    up = np.array([0, 1, 1])
    trees = [Tubes(trunk[up], trunk[1:], np.array([8.6, 6.6, 6.4]), radii[1:], np.array([False, True, True]))]
    for side, hilum in zip((-1, 1), HILA, strict=True):
        xyz, depth = lung_points(rng, body, 600)
        near = np.sqrt(((xyz - np.array(hilum)) ** 2).sum(axis=1)) < 75
        keep = (xyz[:, 0] * side > 0) & (depth > 12) & near
        trees.append(grow_tree(hilum, xyz[keep][:26], 1.05, AIRWAY_BALANCE))
    return join_tubes(trees)


def join_tubes(trees: list[Tubes]) -> Tubes:
    """Put several trees' tubes into one list."""
    return Tubes(
        np.concatenate([t.start for t in trees]),
        np.concatenate([t.end for t in trees]),
        np.concatenate([t.start_radius for t in trees]),
        np.concatenate([t.end_radius for t in trees]),
        np.concatenate([t.is_fork for t in trees]),
    )


def paint_tubes(grid: Grid, tubes: Tubes, value: float, grow: float = 0.0) -> None:
    """Paint tubes `grow` mm thicker than they are; air (`AIR_HU`) digs, all else only raises the HU."""
    for k in range(len(tubes.start)):
        ends = tubes.start[k], tubes.end[k]
        paint_tube(grid, ends, (tubes.start_radius[k] + grow, tubes.end_radius[k] + grow), value)


def paint_tube(grid: Grid, ends: tuple[Array, Array], radii: tuple[float, float], value: float) -> None:
    """Paint one tapering tube; thinner than a voxel it gets fainter, not thicker."""
    start, end = ends
    reach = max(radii) + grid.voxel
    found = grid.window(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
    if found is None:
        return
    hu, (z, y, x) = found
    along = (end - start).astype(np.float32)
    along /= max(float((along * along).sum()), 1e-6)
    dx, dy, dz = x - np.float32(start[0]), y - np.float32(start[1]), z - np.float32(start[2])
    share = np.clip(dx * along[0] + (dy * along[1] + dz * along[2]), 0, 1)
    vx, vy, vz = (np.float32(v) for v in end - start)
    off = np.sqrt((dx - share * vx) ** 2 + (dy - share * vy) ** 2 + (dz - share * vz) ** 2)
    radius = np.float32(radii[0]) + share * np.float32(radii[1] - radii[0])
    faint = min(1.0, 2 * max(radii) / grid.voxel)
    alpha = coverage(off - np.maximum(radius, 0.5 * grid.voxel), grid.voxel) * faint
    if value == AIR_HU:
        hu += alpha * (value - hu)
    else:
        np.maximum(hu, LUNG_BG_HU + alpha * (value - LUNG_BG_HU), out=hu)


def paint_trees(grid: Grid, vessels: Tubes, airways: Tubes) -> None:
    """Paint vessels, then the airways' walls, then their lumen."""
    paint_tubes(grid, vessels, VESSEL_HU)
    paint_tubes(grid, airways, -60.0, grow=1.1)
    paint_tubes(grid, airways, AIR_HU)
