"""The gradient noise scale of a run, from its log: three estimates with error bars, LayerNorm against total, pictures.

    python3 dev/gns_analysis.py out/demo                       (a run's folder or its log.csv, also nanoGNS's)
    python3 dev/gns_analysis.py out/demo --plot picture.png --csv curves.csv
    python3 dev/gns_analysis.py out/demo --until 0.5           the same when half of the log's tokens were done
    python3 dev/gns_analysis.py out/demo --group 'block 0=\\.h\\.0\\.' --group 'biases=bias$'

The table has a row for each group of tensors, of those the log measured, and for each --group, and in it

    per token        the trainer's own smoothed estimate at the end of the log (its column gns/<group>)
    per step         the reference's: ratio of the components' EMAs with 0.99 a step that measured the group
    last 10%         ratio of the components' sums over the last tenth of the tokens; with their means |G|^2, tr(Sigma)

each with one standard error; the estimators are those of gnslog.py, in examples (sequences). Rows whose update was not
applied, or that measured fewer than two examples, teach nothing.

LayerNorm against total: over the steps, the total GNS regressed on that of the LayerNorms, both smoothed per step with
a, for many a: slope with an intercept, slope through the origin (the factor from one to the other) and Pearson's r. It
leaves out the first 3a/(1 - a) steps, in which the first step weighs more than 5% in the EMA; an a that leaves fewer
than 30 steps is left out itself. A last row has the same for the trainer's own estimates, each step weighed by the
inverse of its variance, that of y and that of x times the factor: large estimates are the uncertain ones.

The figure: GNS over tokens, per group; that regression at the a of --alpha; slope and r over a; and |G|^2 against
tr(Sigma), smoothed per step, with lines of equal GNS. Needs numpy, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gnslog import (GROUPS, Array, Components, Curve, Log, LogError, Parser, component_ema, format_tokens, fraction_ema,
                    group_components, jackknife, positive, read_log, run, share, smoothing_length, tensor_components)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
LEAST_POINTS = 30


@dataclass(frozen=True)
class Group:
    name: str
    components: Components
    per_token: Curve
    per_step: Curve


@dataclass(frozen=True)
class Regression:
    smoothing: str
    newest: float  # weight of the newest step in the EMA
    slope: float  # with an intercept
    intercept: float
    factor: float  # slope through the origin
    r: float


def regress(smoothing: str, newest: float, x: Array, y: Array, weights: Array | None = None) -> Regression | None:
    """Least squares of y on x; None where there are too few points or one of them does not vary."""
    if len(x) < LEAST_POINTS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    w = np.ones(len(x)) if weights is None else weights
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(w))
    (xx, xy), (_, yy) = np.cov(x, y, aweights=w)
    factor = np.sum(w * x * y) / np.sum(w * x * x)
    return Regression(smoothing, newest, float(slope), float(intercept), float(factor), float(xy / math.sqrt(xx * yy)))


def paired(ln: Components, total: Components, estimate: Callable[[Components], Curve]) -> tuple[Curve, Curve] | None:
    """The smoothed GNS of LayerNorm and of the total, both over the steps that measured both; None without any."""
    _, i, j = np.intersect1d(ln.tokens, total.tokens, return_indices=True)
    return (estimate(ln.at(i)), estimate(total.at(j))) if len(i) > 0 else None


def paired_per_step(ln: Components, total: Components, alpha: float) -> tuple[Array, Array]:
    """The same where both are known and the first step no longer weighs."""
    pair = paired(ln, total, lambda c: component_ema(c, alpha))
    if pair is None:
        return np.empty(0), np.empty(0)
    x, y = (curve.gns for curve in pair)
    good = np.isfinite(x) & np.isfinite(y) & (np.arange(len(x)) >= 3 * alpha / (1 - alpha))
    return x[good], y[good]


def paired_per_token(ln: Components, total: Components, tau: float) -> tuple[Array, Array, Array]:
    """With the weights of the steps: 1 / (SE(y)^2 + (factor SE(x))^2), the factor being that of these weights."""
    pair = paired(ln, total, lambda c: fraction_ema(c, tau))
    if pair is None:
        return np.empty(0), np.empty(0), np.empty(0)
    known = np.isfinite(pair[0].gns * pair[1].gns) & (pair[0].se * pair[1].se > 0)
    (x, y), (x_error, y_error) = ([curve.gns[known] for curve in pair], [curve.se[known] for curve in pair])
    factor, weights = 1.0, np.ones(len(x))
    for _ in range(50):
        weights = 1 / (y_error**2 + (factor * x_error) ** 2)
        factor = np.sum(weights * x * y) / max(np.sum(weights * x * x), 1e-300)
    return x, y, weights


def regressions(groups: dict[str, Group], total: str) -> list[Regression]:
    pair = groups["ln"].components, groups[total].components
    fits = [regress(f"{a:g}", 1 - a, *paired_per_step(*pair, a)) for a in ALPHAS]
    return [fit for fit in fits if fit is not None]


def make_groups(log: Log, own: list[tuple[str, str]], tau: float, alpha: float) -> dict[str, Group]:
    parts = [(name, group_components(log, name)) for name in GROUPS]
    for name, pattern in own:
        tensors = [t for t in log.tensors if re.search(pattern, t)]
        if not tensors:
            raise LogError(f"--group {name}={pattern}: expected the pattern to match tensors of '{log.path}', found "
                           f"none among its {len(log.tensors)}")
        parts.append((name, tensor_components(log, tensors)))
    groups = {name: Group(name, c, fraction_ema(c, tau), component_ema(c, alpha)) for name, c in parts if c is not None}
    if not groups:
        raise LogError(f"'{log.path}': expected steps of two examples or more with per-example norms, found none; "
                       "train with --gns ln or --gns all and a larger batch")
    return groups


# ----------------------------------------------------------------------------------------------------------------------
# What is printed


def number(x: float) -> str:
    return f"{x:.4g}" if math.isfinite(x) else "--"


def beginning(log: Log, part: float) -> Log:
    """The rows up to this share of the tokens."""
    rows = log.tokens <= part * log.tokens[-1]
    if not rows.any():
        raise LogError(f"'{log.path}': expected rows within {part:g} of its tokens, found none; give a larger --until")
    return replace(log, columns={name: values[rows] for name, values in log.columns.items()})


def table_row(group: Group, window: float) -> list[str]:
    c = group.components
    last = c.tokens > (1 - window) * c.tokens[-1]
    ratio, error = jackknife(c.trsigma[last], c.gtg[last])
    values = [group.per_token.gns[-1], group.per_token.se[-1], group.per_step.gns[-1], group.per_step.se[-1], ratio,
              error, float(c.gtg[last].mean()), float(c.trsigma[last].mean())]
    return [group.name, str(len(c.n))] + [number(v) for v in values]


def print_report(log: Log, groups: dict[str, Group], args: argparse.Namespace, tau: float, source: str) -> None:
    kind = "nanoGNS's log" if log.is_reference else "log"
    print(f"{log.path}: {kind} of {len(log.tokens)} rows, {format_tokens(log.tokens[-1])} tokens, batch "
          f"{np.nanmin(log.batch):.0f} to {np.nanmax(log.batch):.0f}; smoothed over {format_tokens(tau)} tokens "
          f"({source}) and with {args.alpha:g} a step\n")
    header = ["group", "steps", "per token", "+-", "per step", "+-", f"last {100 * args.window:g}%", "+-", "|G|^2",
              "tr(Sigma)"]
    rows = [header] + [table_row(group, args.window) for group in groups.values()]
    for row in rows:
        print(f"{row[0]:<12}" + "".join(f"{field:>11}" for field in row[1:]))
    for total in ("total", "total_nowte"):
        if "ln" in groups and total in groups:
            pair = paired_per_token(groups["ln"].components, groups[total].components, tau)
            own = regress("per token", math.nan, *pair)
            print_regressions(regressions(groups, total) + ([own] if own else []), total)


def print_regressions(fits: list[Regression], total: str) -> None:
    print(f"\n{total} GNS on ln GNS\n" + "".join(f"{name:>15}" for name in ("EMA a step", "slope", "through 0", "r")))
    for fit in fits:
        print(f"{fit.smoothing:>15}{fit.slope:>15.3f}{fit.factor:>15.3f}{fit.r:>15.3f}")


def write_csv(groups: dict[str, Group], path: Path) -> None:
    """The curves of all groups, a row for each step that measured one of them."""
    tokens = np.unique(np.concatenate([g.components.tokens for g in groups.values()]))
    columns: dict[str, Array] = {"tokens_processed": tokens}
    for g in groups.values():
        at = np.searchsorted(tokens, g.components.tokens)
        parts = {"per_token": g.per_token.gns, "per_token/se": g.per_token.se, "per_step": g.per_step.gns,
                 "per_step/se": g.per_step.se, "gtg": g.components.gtg, "trsigma": g.components.trsigma,
                 "gtg_ema": g.per_step.gtg, "trsigma_ema": g.per_step.trsigma}
        for name, values in parts.items():
            column = columns[f"{g.name}/{name}"] = np.full(len(tokens), math.nan)
            column[at] = values
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for row in zip(*columns.values()):
                writer.writerow("" if math.isnan(x) else f"{x:.15g}" for x in row)
    except OSError as error:
        raise LogError(f"cannot write '{path}': {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The figure


def draw(groups: dict[str, Group], alpha: float, path: Path) -> None:
    from gnsplot import LINES, plt, save  # matplotlib only where a figure is wanted

    figure, ((over_tokens, phase), (scatter, smoothing)) = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    styles = {name: LINES[i % len(LINES)] for i, name in enumerate(groups)}
    draw_gns(over_tokens, groups, styles)
    draw_phase(phase, groups, styles)
    total = next((name for name in ("total", "total_nowte") if name in groups and "ln" in groups), None)
    if total is None:
        scatter.set_visible(False)
        smoothing.set_visible(False)
    else:
        draw_scatter(scatter, groups, total, alpha)
        draw_regressions(smoothing, regressions(groups, total))
    save(figure, path)


def draw_gns(axes: Axes, groups: dict[str, Group], styles: dict[str, tuple]) -> None:
    from gnsplot import band, limit_to_bulk

    for g in groups.values():
        band(axes, g.per_token.tokens / 1e6, g.per_token.gns, g.per_token.se, styles[g.name], g.name)
    limit_to_bulk(axes, [g.per_token.gns for g in groups.values()])
    axes.set(title="noise scale, smoothed per token, ± 2 standard errors", xlabel="tokens (millions)",
             ylabel="GNS (sequences)")
    axes.legend(ncols=2, loc="upper left")


def draw_phase(axes: Axes, groups: dict[str, Group], styles: dict[str, tuple]) -> None:
    """tr(Sigma) over |G|^2, from a dot at the start of the run to a cross at its end."""
    for g in groups.values():
        good = (g.per_step.gtg > 0) & (g.per_step.trsigma > 0)
        x, y = g.per_step.gtg[good], g.per_step.trsigma[good]
        if len(x) > 0:
            colour, style = styles[g.name]
            axes.plot(x, y, color=colour, linestyle=style, label=g.name)
            axes.plot(x[0], y[0], "o", x[-1], y[-1], "X", color=colour)
    axes.set(title="signal and noise, smoothed per step: from the dot to the cross", xscale="log", yscale="log",
             xlabel=r"$|G|^2$, squared norm of the true gradient", ylabel=r"tr($\Sigma$), variance of one example's")
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    for gns in (1, 10, 100, 1000, 10000):
        axes.plot([low, high], [gns * low, gns * high], color="#bbbbbb", linewidth=0.7, zorder=0)
        if bottom < gns * low < top:
            axes.annotate(f"GNS {gns}", (low, gns * low), fontsize=7, color="#666666", va="bottom")
    axes.set(xlim=(low, high), ylim=(bottom, top))


def draw_scatter(axes: Axes, groups: dict[str, Group], total: str, alpha: float) -> None:
    from gnsplot import BLACK, BLUE, ORANGE

    x, y = paired_per_step(groups["ln"].components, groups[total].components, alpha)
    fit = regress(f"{alpha:g}", 1 - alpha, x, y)
    axes.plot(x, y, ".", color=BLUE, markersize=3, alpha=0.6, label="a step")
    if fit is not None:
        ends = np.array([x.min(), x.max()])
        sign = "+" if fit.intercept >= 0 else "−"
        axes.plot(ends, fit.intercept + fit.slope * ends, "-", color=BLACK,
                  label=f"{fit.slope:.2f} x {sign} {abs(fit.intercept):.2f}, r = {fit.r:.3f}")
        axes.plot(ends, fit.factor * ends, "--", color=ORANGE, label=f"{fit.factor:.2f} x")
    axes.set(title=f"LayerNorm against {total}, EMA {alpha:g} a step", xlabel="GNS of the LayerNorms (sequences)",
             ylabel=f"GNS of {total} (sequences)")
    axes.legend(loc="upper left")


def draw_regressions(axes: Axes, fits: list[Regression]) -> None:
    from gnsplot import BLACK, BLUE, ORANGE

    x = [fit.newest for fit in fits]
    axes.plot(x, [fit.slope for fit in fits], "o-", color=BLACK, label="slope, with intercept")
    axes.plot(x, [fit.factor for fit in fits], "s--", color=ORANGE, label="slope through the origin")
    axes.plot(x, [fit.r for fit in fits], "^:", color=BLUE, label="Pearson's r")
    axes.set(title="that regression, by smoothing", xscale="log", ylim=(min(0, *[f.slope for f in fits]), None),
             xlabel="weight of the newest step in the EMA (left: smoother)", ylabel="slope, r (no unit)")
    axes.legend(loc="best")


def own_group(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{pattern}' is no regular expression: {error}") from None
    if not (name and equals and pattern) or name in GROUPS:
        raise argparse.ArgumentTypeError(f"expected NAME=PATTERN with a new name, found '{text}'")
    return name, pattern


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("log", help="log.csv, or the folder that holds it")
    parser.add_argument("--tau", type=positive, metavar="TOKENS",
                        help="smoothing length per token [that of config.json beside the log, or 1%% of the tokens]")
    parser.add_argument("--alpha", type=share, default=0.99, help="EMA per step [%(default)s]")
    parser.add_argument("--until", type=share, metavar="SHARE", help="only the rows up to this share of the tokens")
    parser.add_argument("--window", type=share, default=0.1,
                        help="share of the tokens in the last columns [%(default)s]")
    parser.add_argument("--group", type=own_group, action="append", default=[], metavar="NAME=PATTERN",
                        help="also a group of the tensors whose names match this regular expression")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the curves of all groups")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure, .png, .svg or .pdf")
    args = parser.parse_args()
    log = read_log(args.log)
    log = beginning(log, args.until) if args.until else log
    tau, source = smoothing_length(log, args.tau)
    groups = make_groups(log, args.group, tau, args.alpha)
    print_report(log, groups, args, tau, source)
    if args.csv:
        write_csv(groups, args.csv)
    if args.plot:
        draw(groups, args.alpha, args.plot)
    return 0


if __name__ == "__main__":
    run(main)
