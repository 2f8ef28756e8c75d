"""The captions of the figures: what is drawn, and how to read it."""

from typing import NamedTuple

from .drawing import rate_name
from .figures import PHASE_SMOOTHING, diagnosed, layernorm_fit
from .results import Results
from .runs import Experiment
from .sweep import Family, Sweep


class Caption(NamedTuple):
    title: str
    text: str


def captions(experiment: Experiment, results: Results) -> dict[str, Caption]:
    """By the name of the figure."""
    reference = experiment.reference.name
    seeds = "" if len(experiment.seeds) == 1 else " Means over the seeds."
    return {
        "overview": Caption(
            "The run",
            "Top: loss of each step and of the evaluations. Bottom: the gradient noise scale of the LayerNorms with "
            "a band of ± 2 standard errors, and the batch size. The batch is too small where it lies far below the "
            "noise scale, and wasteful far above it.",
        ),
        "loss": Caption(
            "Validation loss",
            f"Against tokens (left) and against device time (right), from 8% of the tokens on.{seeds} Lower and "
            "further left is better; the same tokens take longer where batches are small.",
        ),
        "difference": Caption(
            f"Loss less that of {reference} at the same tokens",
            f"Below the line an arm is ahead of {reference}.{seeds} The names stand in the order of the last values.",
        ),
        "savings": Caption(
            "Saved at equal loss, along the run",
            "Share of tokens (solid, with its 95% interval as a band) and of device time (dashed, interval dotted) "
            f"that each arm needed less than {reference} for the same validation loss. Training goes from left to "
            "right; above the line is a saving. A curve ends where a seed never reached the loss; a time in a corner "
            "lies outside the panel.",
        ),
        "final": Caption(
            "Final loss",
            f"Difference of the final validation loss from that of {reference}: each seed (bar), mean (dot) and 95% t "
            "interval (line, which may leave the figure; a small arrowhead at the edge is a seed beyond it). An interval "
            "across the black line shows no difference."
            + final_words(experiment, results.sweep),
        ),
        "sweep": Caption("Final loss by peak learning rate", sweep_words(results.sweep)),
        "batch": Caption(
            "Batch size and noise scale",
            "Batch size (thick, in the arm's colour) and gradient noise scale of the LayerNorms (orange, with a band "
            "of ± 2 standard errors, which know of the noise from step to step only) of each arm's first seed.",
        ),
        "lr": Caption(
            "Learning rate",
            "As a function of the tokens consumed before the step; arms with the same one share a line.",
        ),
    } | noise_captions(experiment)  # fmt: skip


def final_words(experiment: Experiment, sweep: Sweep | None) -> str:
    """What learning-rate sweeps add to the figure of the final losses."""
    if sweep is None:
        return ""
    is_any_far = any(sweep.has_far(arm) for arm in experiment.arms)
    far = " Large arrowheads with a value: means beyond the right edge." if is_any_far else ""
    together = "" if experiment.has_best_rates else " The variants of an arm stand together, by learning rate."
    return together + far


def sweep_words(sweep: Sweep | None) -> str:
    if sweep is None:
        return ""
    shown = [(family, v) for family in sweep.families for v in family.variants]
    several = any(len(v.losses) > 1 for _, v in shown)
    dots = (
        "Mean final validation loss (dots on the line; small dots, a little aside: seeds)"
        if several
        else "Final validation loss"
    )
    text = (
        f"{dots} of each arm at the peak learning rates that were run with it. The ring marks its best rate, among "
        "those with the most seeds: there arms are compared. An arm with its ring at an end of its line may be better "
        "beyond."
    )
    outside = [words for family in sweep.families if (words := far_words(sweep, family, True))]
    if outside:
        what = "means" if several else "losses"
        text += f" Arrowheads at the top edge, on dotted lines, are {what} above the axis: {'; '.join(outside)}."
    seeds = [words for family in sweep.families if (words := far_words(sweep, family, False))]
    return text + (f" Seeds above the axis, of means within it: {'; '.join(seeds)}." if seeds else "")


def far_words(sweep: Sweep, family: Family, far_mean: bool) -> str:
    """Of the means above the axis, or of those within it with seeds above: ramp at 0.008 (1.32, 1 of 3 seeds), ..."""
    found = []
    for v in family.variants:
        far, seeds = sweep.far_seeds(v), len(v.losses)
        of_seeds = f", {far} of {seeds} seeds" if far < seeds else ""
        if far > 0 and sweep.is_far(v) == far_mean:
            found.append(f"{rate_name(v.rate)} ({v.mean:.2f}{of_seeds})")
    return f"{family.name} at {', '.join(found)}" if found else ""


def noise_captions(experiment: Experiment) -> dict[str, Caption]:
    """Of the figures of one run's noise scale."""
    run = diagnosed(experiment)
    name = f"{run.folder.parent.name}/{run.folder.name}"
    of_run = "" if experiment.is_single else f" Of {name}, the first run with the most groups measured."
    return {
        "groups": Caption(
            "Noise scale by type of layer",
            "Smoothed as in the run, LayerNorm and total with bands of ± 2 standard errors. The total is that of all "
            f"tensors together.{of_run}",
        ),
        "layernorm": Caption(
            "LayerNorm against total",
            "Each dot is a step (the highest few may lie outside): the noise scale of all tensors against that "
            f"of the LayerNorms alone, which costs next to nothing to measure.{fit_words(experiment)}{of_run}",
        ),
        "phase": Caption(
            "Signal and noise",
            f"Both components of the noise scale, smoothed over {PHASE_SMOOTHING} of the run's smoothing lengths, from its "
            "start (dot) to its end (cross). Grey lines have one noise scale each, tr(Σ)/|G|², named at their "
            f"ends.{of_run}",
        ),
    }


def fit_words(experiment: Experiment) -> str:
    fit = layernorm_fit(experiment)
    if fit is None:
        return ""
    return (
        f" Least squares over {len(fit.x):,} steps, each weighed by the standard errors of both: slope "
        f"{fit.line.slope:.2f}, intercept {fit.line.intercept:.1f}, r = {fit.line.r:.3f} (solid); slope through the "
        f"origin {fit.line.factor:.2f} (dashed). Steps within a smoothing length are not independent of each other."
    )
