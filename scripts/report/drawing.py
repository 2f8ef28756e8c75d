"""Parts of figures: colours and line styles of arms, scales of axes, names at the ends of lines, grids of panels."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gnslog import Array
from gnsplot import BLACK, BLUE, GREEN, GREY, PURPLE, SKY, YELLOW, plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .runs import Experiment

WIDTH = 7.0  # inches, of a page of text
POINTS = 1500  # of a curve; more cannot be told apart on paper
COLOURS = (BLUE, GREEN, PURPLE, SKY, YELLOW)  # of arms; orange is the noise scale of the LayerNorms
DASHED, DOTTED = (0, (4, 1.5)), (0, (1, 1.5))
STYLES = ("-", (0, (6, 1.5, 1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (12, 3)), (0, (3, 1.5, 3, 1.5, 1, 1.5)))
LEADER = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6}  # from a line to its name
CONSTANTS = ("-", (0, (6, 1.5)), (0, (3, 1.5)), (0, (1, 1.5)))

plt.rcParams.update({"svg.hashsalt": "report", "axes.axisbelow": True})


@dataclass(frozen=True)
class Look:
    colour: str
    style: str | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Scale:
    """Of an axis: numbers are divided by `unit`, which is called `name`."""

    unit: float
    name: str


@dataclass(frozen=True)
class Label:
    """The name of a line that ends at (x, y)."""

    x: float
    y: float
    text: str
    colour: str


def looks(experiment: Experiment) -> dict[str, Look]:
    """Of each arm, by name; and by the name of an arm that was run at other learning rates than its own only."""
    reference = experiment.reference
    found: dict[str, Look] = {reference.stem: Look(BLACK, "-")}
    coloured = constants = 0
    for arm in experiment.others:
        original, stem = experiment.original(arm), arm.stem
        if original and original.name in found:
            found[arm.name] = Look(found[original.name].colour, DASHED)
        elif stem in found:
            pass  # a variant, below
        elif re.fullmatch(r"const\d+", stem):
            found[stem] = Look(GREY, CONSTANTS[constants % len(CONSTANTS)])
            constants += 1
        else:
            style = STYLES[coloured // len(COLOURS) % len(STYLES)]
            found[stem] = Look(COLOURS[coloured % len(COLOURS)], style)
            coloured += 1
    variants = {arm.name: Look(found[arm.stem].colour, DOTTED) for arm in experiment.arms if arm.name not in found}
    return found | variants | {reference.name: Look(BLACK, "-")}


def token_scale(most: float) -> Scale:
    return next(
        Scale(unit, f"tokens ({name})")
        for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, ""))
        if most >= unit or unit == 1
    )


def time_scale(most: float) -> Scale:
    return next(
        Scale(unit, f"device time ({name})")
        for unit, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if most >= 3 * unit or unit == 1
    )


def thin(*columns: Array) -> tuple[Array, ...]:
    """Every k-th element, so that no more than POINTS are left."""
    step = max(1, math.ceil(len(columns[0]) / POINTS))
    return tuple(column[::step] for column in columns)


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Names lines to the right of the axes, moved apart where they would touch. Comes last: the limits must be set."""
    size = 8
    labels = sorted(labels, key=lambda label: label.y)
    axes.figure.draw_without_rendering()
    line = 1.25 * size / 72 * axes.figure.dpi / axes.get_window_extent().height  # of the axes' height
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = np.clip(to_axes.transform(np.reshape([(label.x, label.y) for label in labels], (-1, 2))), 0, 1)
    places = spread(ends[:, 1], np.array([line * (1 + label.text.count("\n")) for label in labels]))
    for label, end, place in zip(labels, ends, places):
        arrow = LEADER | {"color": label.colour, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}
        axes.annotate(label.text, end, (1.04, place), "axes fraction", "axes fraction", color=label.colour,
                      fontsize=size, va="center", annotation_clip=False, arrowprops=arrow)  # fmt: skip


def spread(ends: Array, heights: Array) -> Array:
    """Places for labels of these heights, in ascending order, as near to their ends (least squares) as can be.

    Less what the labels below take up, places must not fall: isotonic regression, by pooling adjacent violators; within
    0 and 1, if there is room.
    """
    below = np.cumsum(heights) - heights / 2
    pools: list[tuple[float, int]] = []  # sum, members
    for wanted in ends - below:
        pools.append((wanted, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, members = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + members)
    free = np.repeat([total / members for total, members in pools], [members for _, members in pools])
    return below + np.clip(free, 0, max(0, 1 - heights.sum()))


@dataclass(frozen=True)
class Path:
    """A line through points, in the axes' data, and the name to be set near it."""

    x: Array
    y: Array
    dots: Array  # (n, 2) more that is drawn, and to be left free
    text: str
    colour: str


def label_near(axes: Axes, paths: Sequence[Path], named: Sequence[bool]) -> None:
    """Names those lines, near a point of theirs that has room for it: the last one, if it has.

    The others, and those without room, are named to the right of the axes. Comes last, and the layout must be fixed.
    """
    axes.figure.draw_without_rendering()
    window, unit = axes.get_window_extent(), axes.figure.dpi / 72
    points = [axes.transData.transform(np.column_stack([path.x, path.y])) for path in paths]
    dots = axes.transData.transform(np.concatenate([path.dots for path in paths]))
    taken = np.concatenate([dots, *(dense(p, 2 * unit) for p in points), *(rings(p, 4.3 * unit) for p in points)])
    right = []
    # Lines with few points have the least choice: they come first.
    for path, p, near in sorted(zip(paths, points, named), key=lambda line: len(line[1])):
        found = free_box(axes, path, p, taken, 6.5 * unit) if near else None
        if found is None:
            right.append(Label(path.x[-1], path.y[-1], path.text, path.colour))
            continue
        box, point, is_far = found
        (x, y), (u, v) = ((at - window.p0) / window.size for at in (box.mean(axis=0), point))
        arrow = LEADER | {"color": path.colour, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(path.text, (u, v), (x, y), "axes fraction", "axes fraction", color=path.colour, fontsize=8,
                      ha="center", va="center", arrowprops=arrow if is_far else None)  # fmt: skip
        taken = np.concatenate([taken, *(dense(box * [1, 0] + [0, at], unit) for at in np.linspace(*box[:, 1], 5))])
    label_ends(axes, right)


def rings(points: Array, radius: float) -> Array:
    """(n, 2) Points around these: what their markers take up."""
    angles = np.linspace(0, 2 * math.pi, 17)
    circle = radius * np.column_stack([np.cos(angles), np.sin(angles)])
    return (points[:, None] + circle).reshape(-1, 2)


def dense(points: Array, step: float) -> Array:
    """(n, 2) Points of the line through these, about a step apart."""
    parts = [points[:1]]
    for a, b in zip(points, points[1:]):
        parts.append(np.linspace(a, b, 1 + max(1, math.ceil(math.dist(a, b) / step))))
    return np.concatenate(parts)


def free_box(axes: Axes, path: Path, points: Array, taken: Array, gap: float) -> tuple[Array, Array, bool] | None:
    """A place for the line's name this far from one of its points, or somewhat farther: opposite corners, in pixels.

    With the point, and whether it is so far away that a line should lead there. None: no room.
    """
    text = axes.text(0, 0, path.text, fontsize=8)
    size = text.get_window_extent()
    text.remove()
    window, half = axes.get_window_extent(), np.array([size.width, 0.8 * size.height]) / 2
    order = [len(points) - 1, *range(len(points) - 1)]  # the last, then from the first on
    for distance in (1, 2, 3):
        for point in points[order]:
            for side in ((1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1)):
                centre = point + np.array(side) * (half + gap * distance / math.hypot(*side))
                box = np.array([centre - half, centre + half])
                inside = (box[0] > [window.x0, window.y0]).all() and (box[1] < [window.x1, window.y1]).all()
                margin = 0.23 * gap
                if inside and not ((taken > box[0] - margin) & (taken < box[1] + margin)).all(axis=1).any():
                    return box, point, distance > 1
    return None


def rate_name(rate: float) -> str:
    """Of a learning rate, without an exponent."""
    return np.format_float_positional(rate, precision=6, fractional=False, trim="-")


def rate_axis(axes: Axes, rates: Sequence[float]) -> bool:
    """Logarithmic, with ticks at these rates; returns whether their names are upright, as they would touch.

    The limits must be set.
    """
    axes.set_xscale("log")
    low, high = np.log(axes.get_xlim())
    width = 72 * axes.figure.get_figwidth() * axes.get_position().width  # in points
    gaps = np.diff(np.log(rates), prepend=-math.inf) * width / (high - low)
    upright = bool(gaps.min() < 5.2 * max(len(rate_name(rate)) for rate in rates))
    names, room = [], 0.0
    for rate, gap in zip(rates, gaps):
        room += gap
        names.append(rate_name(rate) if room >= 9 else "")  # where even upright ones would touch, every other one
        room = 0.0 if names[-1] else room
    axes.set_xticks(rates, names, rotation=90 if upright else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    return upright


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A grid of panels with common axes, three or four in a row."""
    columns = min(3 if count <= 6 else 4, count)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, 0.4 + height * rows), sharex=True, sharey=True,
                                squeeze=False, layout="constrained")  # fmt: skip
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, list(grid.flat[:count])
