"""The figures of the report. Each function draws one figure, or gives None where the runs have nothing to show in it.

An arm has one colour and line style in all of them (`looks`): black for the reference, grey for a family of constants,
the colour of their original for arms on another budget (dashed) and of a learning-rate sweep (dotted; but in the
sweep's figure each arm is a line with its own style). Lines are named at their ends. Where an experiment has several
seeds, curves are means over the seeds, bands and bars 95% intervals; the batch, the noise scale and the learning rate
are those of an arm's first seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gns_analysis import Regression, paired_per_token, regress
from gnslog import GROUPS, Array, format_tokens, fraction_ema, group_components, smoothing_length, token_ema
from gnsplot import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, band, limit_to_bulk, plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from .drawing import (
    DASHED,
    DOTTED,
    WIDTH,
    Label,
    Look,
    Path,
    Scale,
    label_ends,
    label_near,
    looks,
    panels,
    rate_axis,
    rate_name,
    thin,
    time_scale,
    token_scale,
)
from .results import Result, Results, final_differences
from .runs import Arm, Experiment, Run
from .savings import Interval
from .sweep import ARROW_ROOM, Family, Sweep

GROUP_NAMES = {
    "ln": "LayerNorm",
    "attention": "attention",
    "mlp": "MLP",
    "wpe": "positions",
    "wte": "tokens (tied)",
    "total": "total",
    "total_nowte": "total without tokens",
}
PHASE_SMOOTHING = 5  # times the run's own smoothing length
GROUP_COLOURS = dict(zip(GROUPS, (ORANGE, BLUE, GREEN, PURPLE, SKY, BLACK, GREY)))


# ----------------------------------------------------------------------------------------------------------------------
# What several figures need


def mean_over_seeds(arm: Arm, x: Array, of_run: Callable[[Run], tuple[Array, Array]]) -> Array:
    """The mean curve at x over the runs that have been evaluated; NaN where not all of them know it."""
    curves = [of_run(run) for run in arm.runs.values()]
    curves = [values_at(x, at, y) for at, y in curves if len(at) > 0]
    return np.mean(curves, axis=0) if curves else np.full(len(x), math.nan)


def values_at(x: Array, at: Array, y: Array) -> Array:
    """The curve, linear between its points, at x; NaN outside. Budgets end within a step: its end counts 1% longer."""
    return np.where(x <= 1.01 * at[-1], np.interp(x, at, y, left=math.nan), math.nan)


def evaluated(experiment: Experiment) -> list[Arm]:
    """Arms whose curves are drawn: those with an evaluation, without sweeps."""
    arms = [arm for arm in experiment.arms if not arm.is_sweep]
    return [arm for arm in arms if any(len(run.curve.loss) > 0 for run in arm.runs.values())]


def named(x: Array, y: Array, text: str, colour: str) -> list[Label]:
    """The name of a curve, at its last known point; none if it has none."""
    known = np.flatnonzero(np.isfinite(y))
    return [Label(x[known[-1]], y[known[-1]], text, colour)] if len(known) > 0 else []


# ----------------------------------------------------------------------------------------------------------------------
# One run


def overview(run: Run) -> Figure:
    """Loss, noise scale and batch of one run."""
    scale = token_scale(run.tokens[-1])
    x, step_loss, noise = run.tokens / scale.unit, run.column("train/lossf"), run.column("gns/ln")
    figure, (loss, batch) = plt.subplots(2, 1, sharex=True, figsize=(WIDTH, 4.8), layout="constrained")
    loss.plot(*thin(x, step_loss), color=GREY, linewidth=0.5, alpha=0.6)
    loss.plot(run.curve.tokens / scale.unit, run.curve.loss, "o-", color=BLUE, markersize=3)
    loss.set(ylabel="loss (nats per token)", xlim=(0, x[-1]))
    draw_batch(batch, run, scale, Look(GREEN, "-"))
    limit_batches(batch, [run])
    batch.set(xlabel=scale.name, ylabel="sequences")
    evaluated = named(run.curve.tokens / scale.unit, run.curve.loss, "validation", BLUE)
    label_ends(loss, evaluated + named(x, step_loss, "training,\neach step", GREY))
    scatter = named(x, noise, "noise scale\n± 2 standard\nerrors", ORANGE)
    label_ends(batch, scatter + named(x, run.column("batch"), "batch", GREEN))
    return figure


def draw_batch(axes: Axes, run: Run, scale: Scale, look: Look) -> None:
    """Batch and noise scale of the LayerNorms, in sequences."""
    noise, error, batch = run.column("gns/ln"), run.column("gns/ln/se"), run.column("batch")
    known = np.isfinite(noise)
    band(axes, *thin(run.tokens[known] / scale.unit, noise[known], error[known]), (ORANGE, "-"), "")
    axes.step(*thin(np.append(0, run.tokens[:-1]) / scale.unit, batch), where="post", color=look.colour, linewidth=2)


def limit_batches(axes: Axes, runs: Sequence[Run]) -> None:
    """Of draw_batch: the batches are to be seen whole, of the noise scales what is no spike."""
    limit_to_bulk(axes, [run.column("gns/ln") for run in runs], [run.column("batch") for run in runs])


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def loss_figure(experiment: Experiment, _: Results) -> Figure | None:
    """Validation loss against tokens and against device time."""
    arms = evaluated(experiment)
    if not arms:
        return None
    figure, (by_tokens, by_time) = plt.subplots(1, 2, sharey=True, figsize=(WIDTH, 3.3), layout="constrained")
    look, last = looks(experiment), max(run.tokens[-1] for run in experiment.runs())
    tokens, seconds = token_scale(last), time_scale(max(np.nan_to_num(run.seconds[-1]) for run in experiment.runs()))
    late = []
    for arm in arms:
        x = np.unique(np.concatenate([run.curve.tokens for run in arm.runs.values()]))
        loss = mean_over_seeds(arm, x, lambda run: (run.curve.tokens, run.curve.loss))
        time = mean_over_seeds(arm, x, lambda run: (run.curve.tokens, run.curve.seconds))
        for axes, at in ((by_tokens, x / tokens.unit), (by_time, time / seconds.unit)):
            axes.plot(at, loss, color=look[arm.name].colour, linestyle=look[arm.name].style, linewidth=1)
        late.append(loss[np.isfinite(loss) & (x >= min(0.15 * last, x[-1]))])
    values = np.concatenate(late)
    if len(values) > 0:
        margin = 0.05 * max(np.ptp(values), 1e-6)
        by_tokens.set_ylim(values.min() - margin, values.max() + margin)
    by_tokens.set(xlabel=tokens.name, ylabel="validation loss (nats per token)", xlim=(0, None))
    by_time.set(xlabel=seconds.name, xlim=(0, None))
    if len(arms) > 1:
        columns = math.ceil(len(arms) / math.ceil(len(arms) / 7))
        names = [arm.name for arm in arms]
        figure.legend(by_tokens.get_lines(), names, loc="outside lower center", fontsize=8, ncols=columns)
    return figure


def difference_figure(experiment: Experiment, _: Results) -> Figure | None:
    """Loss less the reference's at the same tokens."""
    reference, last = experiment.reference, experiment.reference.first.tokens[-1]
    look, scale = looks(experiment), token_scale(last)
    curves = [(arm, *difference(arm, reference)) for arm in evaluated(experiment) if arm is not reference]
    curves = [curve for curve in curves if np.isfinite(curve[2]).any()]
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    labels, late = [], [np.zeros(1)]
    for arm, x, y in curves:
        colour, style = look[arm.name].colour, look[arm.name].style
        axes.plot(x / scale.unit, y, color=colour, linestyle=style)
        labels += named(x / scale.unit, y, arm.name, colour)
        known = np.isfinite(y)
        late.append(y[known & (x >= min(0.3 * last, x[known][-1]))])
    axes.axhline(0, color=BLACK, linewidth=1)
    values = np.concatenate(late)
    margin = 0.08 * max(np.ptp(values), 1e-6)
    axes.set(xlabel=scale.name, xlim=(0, None), ylim=(values.min() - margin, values.max() + margin))
    axes.set_ylabel(f"loss less that of {reference.name}\n(nats per token)")
    label_ends(axes, labels)
    return figure


def difference(arm: Arm, reference: Arm) -> tuple[Array, Array]:
    """Tokens of the reference's evaluations, and the mean difference over the seeds there, as far as all have come."""
    curves: list[tuple[Array, Array]] = []
    for seed in sorted(arm.runs.keys() & reference.runs.keys()):
        a, b = arm.runs[seed].curve, reference.runs[seed].curve
        if len(a.loss) > 0 and len(b.loss) > 0:
            curves.append((b.tokens, values_at(b.tokens, a.tokens, a.loss) - b.loss))
    if not curves:
        return np.empty(0), np.empty(0)
    x = min((tokens for tokens, _ in curves), key=len)
    return x, np.mean([y[: len(x)] for _, y in curves], axis=0)


# ----------------------------------------------------------------------------------------------------------------------
# Savings


def bounds(intervals: list[Interval]) -> tuple[Array, Array, Array]:
    """Means, lower and upper ends."""
    mean, low, high = np.array([(i.mean, i.low, i.high) for i in intervals]).T
    return mean, low, high


def savings_figure(experiment: Experiment, results: Results) -> Figure | None:
    """Share of tokens and of time saved at equal loss, against the loss; a panel for each arm."""
    shown = [r for r in results.arms if not r.arm.is_sweep and any(math.isfinite(i.mean) for i in r.along.tokens)]
    if not shown:
        return None
    figure, grid = panels(len(shown), 1.75)
    look = looks(experiment)
    for axes, result in zip(grid, shown):
        draw_savings(axes, result, look[result.arm.name])
    late = [i.mean for r in shown for i in r.along.tokens[len(r.along.tokens) // 5 :] if math.isfinite(i.mean)] or [0.0]
    reach = max(0.1, max(late) - min(0, *late))
    grid[0].set_ylim(min(0, *late) - 0.5 * reach, max(0, *late) + 0.5 * reach)
    for axes, result in zip(grid, shown):
        name_if_outside(axes, result.along.seconds)
    losses = np.concatenate([r.along.loss[len(r.along.loss) // 12 :] for r in shown])
    grid[0].set_xlim(np.nanmax(losses), np.nanmin(losses))
    grid[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supxlabel("validation loss (nats per token), falling as training goes on", fontsize=9)
    figure.supylabel("saved at equal loss", fontsize=9)
    return figure


def draw_savings(axes: Axes, result: Result, look: Look) -> None:
    loss = result.along.loss
    mean, low, high = bounds(result.along.tokens)
    axes.fill_between(loss, low, high, color=look.colour, alpha=0.2, linewidth=0)
    axes.plot(loss, mean, color=look.colour, linewidth=1.6)
    mean, low, high = bounds(result.along.seconds)
    axes.plot(loss, mean, color=BLACK, linestyle=DASHED, linewidth=0.9)
    for edge in (low, high):
        axes.plot(loss, edge, color=BLACK, linestyle=DOTTED, linewidth=0.6)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title(result.arm.name, color=look.colour)


def name_if_outside(axes: Axes, seconds: list[Interval]) -> None:
    """Says how much time a panel's arm saved or cost at the end where that lies beyond its axes."""
    known = [i.mean for i in seconds if math.isfinite(i.mean)]
    low, high = axes.get_ylim()
    if known and not low < known[-1] < high:
        place, edge = ((0.97, 0.05), "bottom") if known[-1] < low else ((0.97, 0.95), "top")
        text = f"time {known[-1]:.0%}".replace("-", "−")
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axes.annotate(text, place, xycoords="axes fraction", ha="right", va=edge, fontsize=7, bbox=box)


def final_figure(experiment: Experiment, results: Results) -> Figure | None:
    """Final losses less the reference's: means with intervals, seeds as dots; an arm's variants stand together."""
    of_arm = {r.arm.name: r for r in results.arms if r.against_reference.n > 0}
    shown = [of_arm[arm.name] for arm in experiment.by_stem if arm.name in of_arm]
    if not shown:
        return None
    rows = rows_of_families([r.arm for r in shown])
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.26 * (rows[-1] + 1)), layout="constrained")
    look = looks(experiment)
    differences = {r.arm.name: final_differences(r.arm, experiment.reference) for r in shown}
    near = [r for r in shown if results.sweep is None or not results.sweep.has_far(r.arm)] or shown
    limit_bars(axes, [r.against_reference for r in near], [x for r in near for x in differences[r.arm.name]])
    left, right = axes.get_xlim()
    for row, result in zip(rows, shown):
        i, colour = result.against_reference, look[result.arm.name].colour
        if i.mean > right:
            draw_far(axes, row, i.mean, colour)
            continue
        seeds = np.array(differences[result.arm.name])
        axes.plot(seeds, [row] * len(seeds), "|", color=colour, markersize=6, alpha=0.7)
        for outside, edge, marker in ((seeds < left, 0, "<"), (seeds > right, 1, ">")):
            if outside.any():
                across = axes.get_yaxis_transform()
                axes.plot(edge, row, marker, color=colour, markersize=4, alpha=0.7, transform=across, clip_on=False)
        axes.plot([i.low, i.high], [row, row], color=colour, linewidth=1.6)
        axes.plot(i.mean, row, "o", color=colour, markersize=4.5)
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_yticks(rows, [name_in_family(experiment, r.arm) for r in shown])
    axes.set_ylim(rows[-1] + 0.6, -0.6)
    reference_name = name_in_family(experiment, experiment.reference)
    axes.set_xlabel(f"final loss less that of {reference_name} (nats per token); left of the line is better")
    axes.grid(axis="y", visible=False)
    return figure


def rows_of_families(arms: list[Arm]) -> list[float]:
    """Places of the arms' rows, with some room around an arm with variants."""
    rows = [0.0]
    for before, arm in zip(arms, arms[1:]):
        families = arm.stem != before.stem and (arm.is_sweep or before.is_sweep)
        rows.append(rows[-1] + (1.6 if families else 1.0))
    return rows


def name_in_family(experiment: Experiment, arm: Arm) -> str:
    """The arm's name; with its learning rate where there are variants at others."""
    has_variants = any(other.stem == arm.stem for other in experiment.arms if other is not arm)
    known = not arm.is_sweep and math.isfinite(arm.rate)
    return f"{arm.name} at lr {rate_name(arm.rate)}" if has_variants and known else arm.name


def draw_far(axes: Axes, row: float, mean: float, colour: str) -> None:
    """An arrowhead at the right edge, with the mean that lies beyond it."""
    across = axes.get_yaxis_transform()
    axes.plot(0.99, row, ">", color=colour, markersize=5, transform=across, clip_on=False)
    text = f"{mean:+.2f}".replace("-", "−")
    axes.annotate(text, (0.975, row), xycoords=across, ha="right", va="center", fontsize=7, color=colour)


def limit_bars(axes: Axes, intervals: list[Interval], seeds: list[float]) -> None:
    """So that two seeds' enormous intervals and diverged seeds do not flatten the means: they may leave the figure."""
    means = [i.mean for i in intervals] + [0.0]
    reach = max(max(means) - min(means), 1e-4)
    ends = [end for i in intervals for end in (i.low, i.high) if math.isfinite(end)] + means + seeds
    left, right = min(ends) - 0.05 * reach, max(ends) + 0.05 * reach
    axes.set_xlim(max(left, min(means) - reach), min(right, max(means) + reach))


# ----------------------------------------------------------------------------------------------------------------------
# The learning-rate sweep


def sweep_figure(experiment: Experiment, results: Results) -> Figure | None:
    """Final loss against the peak learning rate: a line for each arm, its best one of several marked."""
    sweep = results.sweep
    if sweep is None:
        return None
    shown = sweep.families
    rates = sorted({v.rate for family in shown for v in family.variants})
    figure, axes = plt.subplots(figsize=(WIDTH, 3.9))
    longest = max(len(family.name) for family in shown)
    figure.subplots_adjust(left=0.1, right=max(0.6, 0.94 - 0.0095 * longest), bottom=0.12, top=0.97)
    pad = 0.05 * math.log(rates[-1] / rates[0])
    axes.set_xlim(rates[0] * math.exp(-pad), rates[-1] * math.exp(pad))
    if rate_axis(axes, rates):
        figure.subplots_adjust(bottom=0.19)
    top = limit_losses(axes, sweep)
    axes.set(xlabel="peak learning rate", ylabel="final validation loss (nats per token)")
    make_room_left(axes)
    look, gap = looks(experiment), float(np.diff(np.log(rates)).min())
    arrows, step = arrow_shifts(sweep, 0.35 * pad, gap), min(0.12 * pad, 0.5 * gap / len(shown))
    paths = [
        draw_family(axes, family, look[family.name], sweep, top, arrows, step * (k - (len(shown) - 1) / 2))
        for k, family in enumerate(shown)
    ]
    label_near(axes, paths, [family.variants[-1].rate < rates[-1] for family in shown])
    return figure


def make_room_left(axes: Axes) -> None:
    """For what stands there: how wide the ticks' labels are depends on their digits."""
    axes.figure.draw_without_rendering()
    outermost = axes.yaxis.get_tightbbox().x0 / axes.figure.bbox.width
    axes.figure.subplots_adjust(left=axes.get_position().x0 + max(0, 0.01 - outermost))


def limit_losses(axes: Axes, sweep: Sweep) -> float:
    """Limits the axis to what is not far above the rest; returns where the arrowheads of the others stand."""
    shown = [v for family in sweep.families for v in family.variants]
    near = [loss for v in shown for loss in (v.mean, *v.losses.values()) if loss <= sweep.limit]
    height = max(max(near) - min(near), 1e-4)
    top = max(near) + (ARROW_ROOM if any(sweep.is_far(v) for v in shown) else 0.06) * height
    axes.set_ylim(min(near) - 0.09 * height, top)
    return top - 0.04 * height


def arrow_shifts(sweep: Sweep, step: float, gap: float) -> dict[tuple[str, float], float]:
    """By arm and rate, how far the arrowheads of one rate stand to the side, in ln(rate), so that all are seen.

    A step apart, but within the gap between rates.
    """
    outside = [(family.name, v.rate) for family in sweep.families for v in family.variants if sweep.is_far(v)]
    shifts: dict[tuple[str, float], float] = {}
    for rate in {rate for _, rate in outside}:
        names = [name for name, at in outside if at == rate]
        apart = min(step, 0.8 * gap / len(names))
        shifts |= {(name, rate): apart * (k - (len(names) - 1) / 2) for k, name in enumerate(names)}
    return shifts


def draw_family(
    axes: Axes,
    family: Family,
    look: Look,
    sweep: Sweep,
    top: float,
    arrows: dict[tuple[str, float], float],
    aside: float,
) -> Path:
    """Seeds (small dots, so far aside), means, the best one (ring), and arrowheads at `top` for what is far."""
    rates, means = np.array([(v.rate, v.mean) for v in family.variants]).T
    inside = np.array([not sweep.is_far(v) for v in family.variants])
    beside = np.array([v.rate * math.exp(arrows.get((family.name, v.rate), 0)) for v in family.variants])
    x, y = np.where(inside, rates, beside), np.where(inside, means, top)
    for k in range(len(x) - 1):
        if inside[k] and inside[k + 1]:
            axes.plot(x[k : k + 2], y[k : k + 2], color=look.colour, linestyle=look.style)
        elif inside[k] or inside[k + 1]:
            axes.plot(x[k : k + 2], y[k : k + 2], color=look.colour, linestyle=DOTTED, linewidth=0.8, alpha=0.7)
    axes.plot(x[inside], y[inside], "o", color=look.colour, markersize=3.5)
    axes.plot(x[~inside], y[~inside], "^", color=look.colour, markersize=6, clip_on=False)
    several = [v for v in family.variants if len(v.losses) > 1]
    seeds = [(v.rate * math.exp(aside), loss) for v in several for loss in v.losses.values() if loss <= sweep.limit]
    dots = np.reshape(seeds, (-1, 2))
    axes.plot(*dots.T, ".", color=look.colour, markersize=4.5, alpha=0.6, markeredgewidth=0)
    if family.is_tuned and not sweep.is_far(family.best):
        axes.plot(family.best.rate, family.best.mean, "o", color=look.colour, markersize=9, fillstyle="none")
    return Path(x, y, dots, family.name, look.colour)


# ----------------------------------------------------------------------------------------------------------------------
# Batch, noise scale, learning rate


def batch_figure(experiment: Experiment, _: Results) -> Figure | None:
    """Batch size and noise scale over tokens; a panel for each arm."""
    arms = [arm for arm in experiment.arms if not arm.is_sweep and np.isfinite(arm.first.column("batch")).any()]
    if experiment.is_single or not arms:
        return None
    figure, grid = panels(len(arms), 1.75)
    look, scale = looks(experiment), token_scale(max(run.tokens[-1] for run in experiment.runs()))
    for axes, arm in zip(grid, arms):
        draw_batch(axes, arm.first, scale, look[arm.name])
        axes.set_title(arm.name, color=look[arm.name].colour)
    limit_batches(grid[0], [arm.first for arm in arms])
    grid[0].set_xlim(0, None)
    figure.supxlabel(scale.name, fontsize=9)
    figure.supylabel("sequences", fontsize=9)
    return figure


def lr_figure(experiment: Experiment, _: Results) -> Figure | None:
    """Learning rate over tokens; arms that have the same share a line."""
    scale, look = token_scale(max(run.tokens[-1] for run in experiment.runs())), looks(experiment)
    peak = max(np.nanmax(arm.first.column("lr"), initial=0) for arm in experiment.arms)
    curves: list[tuple[Array, Array, list[str]]] = []  # tokens before the step, learning rate, arms
    for arm in experiment.arms:
        x, y = np.append(0, arm.first.tokens[:-1]), arm.first.column("lr")
        same = [names for at, lr, names in curves if same_schedule(at, lr, x, y, 0.02)]
        if same:
            same[0].append(arm.name)
        elif np.isfinite(y).any():
            curves.append((x, y, [arm.name]))
    if not curves:
        return None
    most = max((names for _, _, names in curves), key=len)
    labels = []
    for x, y, names in curves:
        shown = names if len(names) <= 3 else [names[0], f"{len(names) - 1} more"]
        text = "all others" if names is most and len(names) > 3 else ",\n".join(shown)
        labels.append(Label(x[-1] / scale.unit, y[-1], text, look[names[0]].colour))
    lines = sum(label.text.count("\n") + 1 for label in labels)
    figure, axes = plt.subplots(figsize=(WIDTH, max(2.6, 0.5 + 0.15 * lines)), layout="constrained")
    for x, y, names in curves:
        axes.plot(*thin(x / scale.unit, y), color=look[names[0]].colour, linestyle=look[names[0]].style)
    axes.set(xlabel=scale.name, ylabel="learning rate", xlim=(0, None), ylim=(0, 1.05 * peak or None))
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    if len(curves) > 1:
        label_ends(axes, labels)
    return figure


def same_schedule(x: Array, y: Array, u: Array, v: Array, tolerance: float) -> bool:
    """Whether two curves end at the same place and differ by no more than this share of their peak."""
    return np.isclose(x[-1], u[-1], rtol=tolerance) and bool(
        np.all(np.abs(np.interp(u, x, y) - v) < tolerance * v.max())
    )


# ----------------------------------------------------------------------------------------------------------------------
# The noise scale's parts, of one run


def measured_groups(run: Run) -> list[str]:
    return [group for group in GROUPS if np.isfinite(run.column(f"gns/{group}")).any()]


def diagnosed(experiment: Experiment) -> Run:
    """The run whose noise scale is shown in parts: the first one with the most groups measured."""
    return max((arm.first for arm in experiment.arms), key=lambda run: len(measured_groups(run)))


def groups_figure(experiment: Experiment, _: Results) -> Figure | None:
    """Noise scale over tokens, by type of layer."""
    run = diagnosed(experiment)
    groups = measured_groups(run)
    if len(groups) < 2:
        return None
    scale, labels = token_scale(run.tokens[-1]), []
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for group in groups:
        noise, error, colour = run.column(f"gns/{group}"), run.column(f"gns/{group}/se"), GROUP_COLOURS[group]
        error = error if group in ("ln", "total") else np.zeros_like(error)
        known = np.isfinite(noise)
        band(axes, *thin(run.tokens[known] / scale.unit, noise[known], error[known]), (colour, "-"), "")
        labels += named(run.tokens / scale.unit, noise, GROUP_NAMES[group], colour)
    limit_to_bulk(axes, [run.column(f"gns/{group}") for group in groups if group != "wpe"])  # whose noise is enormous
    axes.set(xlabel=scale.name, ylabel="gradient noise scale (sequences)", xlim=(0, run.tokens[-1] / scale.unit))
    label_ends(axes, labels)
    return figure


@dataclass(frozen=True)
class LayerNormFit:
    """The total's noise scale (y) on that of the LayerNorms (x), both smoothed by tokens as in the run, each step weighed
    by the standard errors of both."""

    total: str  # its group
    x: Array
    y: Array
    line: Regression


def layernorm_fit(experiment: Experiment) -> LayerNormFit | None:
    run = diagnosed(experiment)
    measured = measured_groups(run)
    total = next((group for group in ("total", "total_nowte") if group in measured), None)
    if "ln" not in measured or total is None:
        return None
    tau, _ = smoothing_length(run.log, None)
    ln, other = group_components(run.log, "ln"), group_components(run.log, total)
    if ln is None or other is None:
        return None
    x, y, weights = paired_per_token(ln, other, tau)
    line = regress("per token", math.nan, x, y, weights)
    return LayerNormFit(total, x, y, line) if line is not None else None


def layernorm_figure(experiment: Experiment, _: Results) -> Figure | None:
    """Total noise scale against that of the LayerNorms."""
    fit = layernorm_fit(experiment)
    if fit is None:
        return None
    figure, axes = plt.subplots(figsize=(0.62 * WIDTH, 3.4), layout="constrained")
    right, top = (1.1 * np.quantile(values, 0.97) for values in (fit.x, fit.y))
    solid, dashed = fit.line.intercept + fit.line.slope * right, fit.line.factor * right
    axes.plot(*thin(fit.x, fit.y), ".", color=BLUE, markersize=2.5, alpha=0.5)
    axes.plot([0, right], [fit.line.intercept, solid], color=BLACK)
    axes.plot([0, right], [0, dashed], color=ORANGE, linestyle=DASHED)
    axes.set(xlabel="noise scale of the LayerNorms (sequences)", xlim=(0, right), ylim=(0, top))
    axes.set_ylabel(f"noise scale, {GROUP_NAMES[fit.total]} (sequences)")
    equation = f"{fit.line.slope:.2f} x {'+' if fit.line.intercept >= 0 else '−'} {abs(fit.line.intercept):.1f}"
    names = (
        Label(right, solid, f"{equation}\nr = {fit.line.r:.3f}", BLACK),
        Label(right, dashed, f"{fit.line.factor:.2f} x", ORANGE),
    )
    label_ends(axes, names)
    return figure


def phase_figure(experiment: Experiment, _: Results) -> Figure | None:
    """tr(Sigma) against |G|^2, from the start of the run (dot) to its end (cross).

    Smoothed over tokens, so that groups that were measured in other steps can be compared, in shares and in logarithms,
    as both fall by decades: their ratio is the noise scale as the trainer estimates it.
    """
    run = diagnosed(experiment)
    tau, paths = PHASE_SMOOTHING * smoothing_length(run.log, None)[0], {}
    for group in measured_groups(run):
        components = group_components(run.log, group)
        if components is None:
            continue
        both = fraction_ema(components, tau)
        size = np.exp(token_ema(components.tokens, np.log(components.m), tau)[0])
        good = (both.gtg > 0) & (both.trsigma > 0)
        if good.any():
            paths[group] = thin((size * both.gtg)[good], (size * both.trsigma)[good])
    if not paths:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.4), layout="constrained")
    for group, (x, y) in paths.items():
        axes.plot(x, y, color=GROUP_COLOURS[group], label=GROUP_NAMES[group])
        axes.plot(x[0], y[0], "o", x[-1], y[-1], "X", color=GROUP_COLOURS[group], markersize=5)
    axes.set(xscale="log", yscale="log", xlabel=r"$|G|^2$, squared norm of the true gradient")
    axes.set_ylabel(r"tr($\Sigma$), variance of the gradient of one sequence")
    draw_equal_noise(axes)
    if len(paths) > 1:
        figure.legend(loc="outside center right", labelcolor="linecolor", handlelength=0.8)
    return figure


def draw_equal_noise(axes: Axes) -> None:
    """Lines of equal noise scale, named where they leave the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for power in range(math.ceil(math.log10(bottom / right)), math.floor(math.log10(top / left)) + 1):
        noise = 10.0**power
        axes.plot([left, right], [noise * left, noise * right], color="#bbbbbb", linewidth=0.7, zorder=0)
        at = (right, noise * right) if noise * right < top else (top / noise, top)
        text = f"GNS {format_tokens(noise) if noise >= 1 else f'{noise:g}'}"
        axes.annotate(text, at, (3, 2), textcoords="offset points", fontsize=7, color=GREY, annotation_clip=False)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for axis in (axes.xaxis, axes.yaxis):
        decades = np.ptp(np.log10(axis.get_view_interval()))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
