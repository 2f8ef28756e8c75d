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

from .runs import Experiment

WIDTH = 7.0  # inches, of a page of text
POINTS = 1500  # of a curve; more cannot be told apart on paper
COLOURS = (BLUE, GREEN, PURPLE, SKY, YELLOW)  # of arms; orange is the noise scale of the LayerNorms
DASHED, DOTTED, DASH_DOTTED = (0, (4, 1.5)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5))
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
    """Of each arm, by name."""
    found: dict[str, Look] = {experiment.reference.name: Look(BLACK, "-")}
    coloured = constants = 0
    for arm in experiment.others:
        original = experiment.original(arm)
        parent = original.name if original else arm.name.split("@")[0]
        if parent != arm.name and parent in found:
            found[arm.name] = Look(found[parent].colour, DASHED if original else DOTTED)
        elif re.fullmatch(r"const\d+", arm.name):
            found[arm.name] = Look(GREY, CONSTANTS[constants % len(CONSTANTS)])
            constants += 1
        else:
            found[arm.name] = Look(COLOURS[coloured % len(COLOURS)], "-" if coloured < len(COLOURS) else DASH_DOTTED)
            coloured += 1
    return found


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
        arrow = {
            "arrowstyle": "-",
            "color": label.colour,
            "linewidth": 0.5,
            "alpha": 0.6,
            "shrinkA": 1,
            "shrinkB": 1,
            "relpos": (0, 0.5),
        }
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
