"""The results of an experiment: what each arm saves and loses against the reference, over the seeds that both have.

    against...     difference of the final losses, in nats per token, seed by seed
    along          savings at equal loss along the run, as the paper reads them (arXiv 2411.00999)
    fitted         runs on another budget with the whole schedule fitted to it: the honest savings, and their price
    sweep          each arm at its own best learning rate, where several were run
    worth          what any arm's final loss is worth in tokens, by the reference's own final losses on several budgets
    own_worth      what an arm that was itself run on several budgets takes to end at the reference's loss

The best constant batch is chosen after the fact, as the arm of constant batch and full budget with the lowest mean
final loss: a yardstick that is harder to beat than any constant chosen beforehand. Where arms were run at several
learning rates it is that of sweep.py, at its best rate; else the lowest over the seeds that all such arms have
finished.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from gnslog import format_tokens

from .runs import Arm, Experiment, Run
from .savings import NOTHING, Interval, Pair, SavingsAlong, Worth, saved_share, savings_along, t_interval, worth
from .sweep import Sweep, read_sweep

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of the reference's budget, at which the tables read the savings along the run
SAME_SPEED = 1.3  # runs that do the same work on the same machine, undisturbed, differ by less
WORK = ("batch-schedule", "batch-tokens", "max-tokens", "gns", "gns-all-every", "micro-batch", "recompute", "tf32")
LISTED = 12  # names in a note; of more, their number

Lines = dict[int, tuple[Worth, list[float]]]  # by seed: what an arm's tokens are worth, its final losses that say so


@dataclass(frozen=True)
class EndSaving:
    """Shares saved against another arm; no intervals where more tokens bought the owner of the lines nothing."""

    tokens: Interval
    seconds: Interval
    beyond: int  # seeds in which a line was prolonged: a loss read off it is not between those that it goes through
    worthless: int  # seeds in which more tokens bought nothing


@dataclass(frozen=True)
class WorthSaved:
    """What an arm saves at its end, by the lines through their owner's final losses on several budgets. The owner is
    the reference, or the arm itself."""

    of_reference: EndSaving
    of_best: EndSaving  # against the best constant batch


@dataclass(frozen=True)
class Result:
    arm: Arm
    against_reference: Interval  # final loss, this arm's less the other's
    against_mean: Interval
    against_best: Interval
    along: SavingsAlong  # without any level if no pair of runs has been evaluated
    worth: WorthSaved | None  # None: the reference has no budget but one
    own_worth: WorthSaved | None  # None: the arm has no budget but one


@dataclass(frozen=True)
class Fitted:
    """An arm whose schedule was fitted to another budget than the reference's."""

    arm: Arm
    tokens: Interval  # share by which it trains on fewer tokens than the reference
    seconds: Interval  # share by which it takes less device time
    against_reference: Interval  # final loss
    against_fitted_reference: Interval  # final loss, against the reference fitted to the same budget


@dataclass(frozen=True)
class Results:
    best_constant: Arm | None
    arms: list[Result]  # all but the reference
    fitted: list[Fitted]
    sweep: Sweep | None
    disturbed: str  # why device times cannot be compared; empty if nothing speaks against it


def compare(experiment: Experiment, swept: Experiment | None = None) -> Results:
    """swept: where the experiment has only each arm's best rate, the one with all of them."""
    sweep = read_sweep(swept or experiment)
    reference, best, mean = experiment.reference, best_constant(experiment, sweep), experiment.arm("mean")
    lines = worth_lines(experiment, reference)
    results = []
    for arm in experiment.others:
        against = partial(final_difference, arm)
        repeats_reference = experiment.original(arm) is reference
        results.append(
            Result(
                arm,
                against(reference),
                against(mean),
                against(best),
                along(reference, arm),
                None if repeats_reference else worth_saved(lines, reference, arm, reference, best),
                worth_saved(worth_lines(experiment, arm), arm, arm, reference, best),
            )
        )
    repeats = [fitted(experiment, arm) for arm in experiment.others if experiment.original(arm)]
    return Results(best, results, repeats, sweep, disturbed(experiment))


def fitted(experiment: Experiment, arm: Arm) -> Fitted:
    reference = experiment.reference
    twins = [
        a for a in repeats_of(experiment, reference) if math.isclose(a.first.budget, arm.first.budget, rel_tol=1e-3)
    ]
    ratio = partial(over_pairs, arm, reference)
    return Fitted(
        arm,
        saved_share(ratio(lambda x, y: math.log(x.tokens[-1] / y.tokens[-1]))),
        saved_share(ratio(lambda x, y: math.log(x.seconds[-1] / y.seconds[-1]))),
        final_difference(arm, reference),
        final_difference(arm, twins[0] if twins else None),
    )


def repeats_of(experiment: Experiment, original: Arm) -> list[Arm]:
    return [arm for arm in experiment.others if experiment.original(arm) is original]


def best_constant(experiment: Experiment, sweep: Sweep | None) -> Arm | None:
    """That of the sweep; or else over the seeds that all such arms have finished."""
    if sweep is not None:
        rival = sweep.best_constant.best.arm if sweep.best_constant else None
        return next((arm for arm in experiment.arms if rival and arm.runs is rival.runs), None)
    arms = [
        arm
        for arm in experiment.arms
        if arm.finished() and experiment.has_full_budget(arm) and all(r.is_constant for r in arm.runs.values())
    ]
    common = set.intersection(*(set(arm.finished()) for arm in arms)) if arms else set()
    if len(arms) < 2 or not common:
        return None
    return min(arms, key=lambda arm: np.mean([arm.runs[seed].final_loss for seed in common]))


def over_pairs(a: Arm, b: Arm, number: Callable[[Run, Run], float]) -> list[float]:
    """Of each seed that both have finished."""
    x, y = a.finished(), b.finished()
    return [number(x[seed], y[seed]) for seed in sorted(x.keys() & y.keys())]


def final_difference(arm: Arm, other: Arm | None) -> Interval:
    return NOTHING if other is None or other is arm else t_interval(final_differences(arm, other))


def final_differences(arm: Arm, other: Arm) -> list[float]:
    return over_pairs(arm, other, lambda x, y: x.final_loss - y.final_loss)


def along(reference: Arm, arm: Arm) -> SavingsAlong:
    seeds = sorted(reference.runs.keys() & arm.runs.keys())
    pairs = [Pair(reference.runs[seed].curve, arm.runs[seed].curve, arm.runs[seed].finished) for seed in seeds]
    pairs = [pair for pair in pairs if len(pair.reference.loss) > 0 and len(pair.other.loss) > 0]
    return savings_along(pairs)


def worth_lines(experiment: Experiment, owner: Arm) -> Lines:
    repeats = repeats_of(experiment, owner)
    lines = {}
    for seed, run in owner.finished().items():
        runs = [run] + [arm.finished()[seed] for arm in repeats if seed in arm.finished()]
        losses = [r.final_loss for r in runs]
        line = worth([float(r.tokens[-1]) for r in runs], losses)
        if line is not None:
            lines[seed] = line, losses
    return lines


def worth_saved(lines: Lines, owner: Arm, arm: Arm, reference: Arm, best: Arm | None) -> WorthSaved | None:
    if not lines.keys() & arm.finished().keys() & reference.finished().keys():
        return None
    rival = best if best is not reference else None
    return WorthSaved(end_saving(lines, owner, arm, reference), end_saving(lines, owner, arm, rival))


def end_saving(lines: Lines, owner: Arm, arm: Arm, other: Arm | None) -> EndSaving:
    if other is None or other is arm:
        return EndSaving(NOTHING, NOTHING, 0, 0)
    by_tokens, by_seconds, beyond = [], [], 0  # ln of the ratios
    for seed in sorted(lines.keys() & arm.finished().keys() & other.finished().keys()):
        run, rival, (line, losses) = arm.runs[seed], other.runs[seed], lines[seed]
        read_off = [x.runs[seed] for x in (arm, other) if x is not owner]
        excess = sum(log_excess(r, line) * (1 if r is run else -1) for r in read_off)
        by_tokens.append(excess)
        by_seconds.append(excess + log_pace(run) - log_pace(rival))
        beyond += any(not min(losses) <= r.final_loss <= max(losses) for r in read_off)
    worthless = sum(math.isnan(ratio) for ratio in by_tokens)
    if worthless:
        return EndSaving(NOTHING, NOTHING, beyond, worthless)
    return EndSaving(saved_share(by_tokens), saved_share(by_seconds), beyond, 0)


def log_excess(run: Run, line: Worth) -> float:
    """ln of the run's tokens over those that its final loss is worth."""
    return math.log(run.tokens[-1]) - line.log_tokens(run.final_loss)


def log_pace(run: Run) -> float:
    """ln of its seconds a token."""
    return math.log(run.seconds[-1] / run.tokens[-1])


def at_quarters(result: Result, reference: Arm) -> list[int | None]:
    """The levels of QUARTERS; None where the reference has not come as far, or names no budget."""
    budget = reference.first.budget
    reached = [np.flatnonzero(result.along.at >= 0.999 * share * budget) for share in QUARTERS]
    return [int(i[0]) if len(i) > 0 else None for i in reached]


def notes(experiment: Experiment) -> list[str]:
    """What a reader must know of the runs before trusting the numbers."""
    runs = experiment.runs()
    found = []
    running = [f"{name_of(run)} ({share_done(run)})" for run in runs if not run.finished]
    lost = [name_of(run) for run in runs if run.finished and not math.isfinite(run.final_loss)]
    for names, before, after in (
        (running, "Not finished: ", ". They count along the run, and in no final loss."),
        (lost, "Finished without a validation loss that is a number: ", ". They are in no final loss."),
        (experiment.missing, "Not started: ", "."),
        (experiment.unknown, "Left out, as plan.json does not have them: ", "."),
        (
            experiment.left_out,
            "Left out, as no run on the full budget is finished, or none at the best rate of the arm that they repeat: ",
            ".",
        ),
    ):
        found += [before + listed(names) + after] if names else []
    for run in runs:
        skipped = int(np.nansum(run.column("skipped") != 0)) if "skipped" in run.log.columns else 0
        found += [f"{run.folder} skipped the update of {skipped} steps."] if skipped else []
    for key, what in (
        ("device", "The runs' devices differ"),
        ("git-revision", "The trainer's revisions differ"),
        ("build-flags", "The trainer's build flags differ"),
    ):
        values = sorted({str(run.config.get(key)) for run in runs if run.config})
        found += [f"{what}: {'; '.join(values)}."] if len(values) > 1 else []
    if any((run.steps_of_row != 1).any() for run in runs):
        found.append(
            "Logs were thinned by --log-every: times are estimates, each row standing for the steps since the one "
            "before."
        )
    return found


def disturbed(experiment: Experiment) -> str:
    """Why the runs' times cannot be compared: of other devices, or of very different speed at the same batches."""
    if len({str(run.config.get("device")) for run in experiment.runs() if run.config}) > 1:
        return "Times are not comparable: the runs' devices differ."
    alike: dict[tuple[object, ...], list[Run]] = {}
    for run in experiment.runs():
        if run.finished and run.config.get("batch-schedule") != "gns" and math.isfinite(speed(run)):
            alike.setdefault(tuple(run.config.get(key) for key in WORK), []).append(run)
    pairs = [(min(runs, key=speed), max(runs, key=speed)) for runs in alike.values()]
    slow, fast = max(pairs, key=lambda pair: speed(pair[1]) / speed(pair[0]), default=(None, None))
    if slow is None or fast is None or speed(fast) < SAME_SPEED * speed(slow):
        return ""
    return (
        f"Times are not comparable: with the same batches, {name_of(slow)} ran at {format_tokens(speed(slow))} tokens a "
        f"second and {name_of(fast)} at {format_tokens(speed(fast))}. Did runs share a machine?"
    )


def speed(run: Run) -> float:
    """Tokens a second, without the first tenth, in which a program warms up; NaN if unknown."""
    start = int(np.searchsorted(run.tokens, 0.1 * run.tokens[-1]))
    seconds = run.seconds[-1] - run.seconds[start]
    return float((run.tokens[-1] - run.tokens[start]) / seconds) if seconds > 0 else math.nan


def name_of(run: Run) -> str:
    return f"{run.folder.parent.name}/{run.folder.name}"


def listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def share_done(run: Run) -> str:
    return f"{run.tokens[-1] / run.budget:.0%}" if math.isfinite(run.budget) else "its config.json names no budget"
