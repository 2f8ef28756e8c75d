"""The look of the figures: colours that stay apart in print and for the colour-blind (Okabe & Ito 2008), each with a
line style of its own; axes without clutter. Errors are bands of plus and minus two standard errors."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gnslog import Array, LogError
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#777777")
LINES = ((ORANGE, "-"), (BLUE, "--"), (GREEN, "-."), (PURPLE, ":"), (SKY, (0, (5, 1))), (BLACK, "-"), (GREY, "--"),
         (YELLOW, "-."))

plt.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2,
    "legend.frameon": False, "lines.linewidth": 1.2, "savefig.dpi": 200, "axes.titlesize": 9,
    "axes.titlelocation": "left"})


def band(axes: Axes, x: Array, y: Array, error: Array, line: tuple, label: str) -> None:
    """A curve with its error. line: colour and style"""
    colour, style = line
    axes.fill_between(x, y - 2 * error, y + 2 * error, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, y, color=colour, linestyle=style, label=label)


def limit_to_bulk(axes: Axes, curves: list[Array], whole: Sequence[Array] = ()) -> None:
    """From zero to a little above where nearly all of the curves lies, so that a spike does not flatten the rest; and
    to above all of those that are to be seen whole."""
    values = np.concatenate([c[np.isfinite(c)] for c in [*curves, *whole]])
    if len(values) > 0:
        highest = max((np.nanmax(c, initial=0) for c in whole), default=0)
        axes.set_ylim(0, max(1.3 * np.quantile(values, 0.98), 1.05 * highest, 1e-12))


def log_ticks(axis: Axis, at: list[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis: at these places, or at 1, 2, 5, 10, ..."""
    axis.set_major_locator(FixedLocator(at) if at else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise LogError(f"cannot write the figure '{path}': {error}") from None
    plt.close(figure)
