"""The results in words: numbers with their intervals, verdicts, and the summary.

A verdict says what a 95% interval shows, and nothing else: where it includes 0, or there is but one seed, nothing is
shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gnslog import format_tokens

from .drawing import rate_name
from .results import EndSaving, Fitted, Results, at_quarters
from .runs import Arm, Experiment, Run
from .savings import Interval
from .sweep import Family, Sweep


def number(x: float, digits: int, sign: str = "") -> str:
    return f"{x:{sign}.{digits}f}".replace("-", "−") if math.isfinite(x) else "–"


def percent(x: float) -> str:
    if x < -9.99:
        return "below −999%"
    return number(100 * x, 1) + "%" if math.isfinite(x) else "–"


def share(i: Interval) -> str:
    """12.3% [9.1, 15.4]"""
    limits = f" [{percent(i.low)}, {percent(i.high)}]".replace("%", "")
    return percent(i.mean) + (limits if math.isfinite(i.low) else "")


def nats(i: Interval) -> str:
    """+0.0123 [+0.0021, +0.0225]"""
    limits = f" [{number(i.low, 4, '+')}, {number(i.high, 4, '+')}]"
    return number(i.mean, 4, "+") + (limits if math.isfinite(i.low) else "")


def duration(seconds: float) -> str:
    """The two largest units: 45 s, 3 m 20 s, 1 h 02 m, 2 d 03 h."""
    if not math.isfinite(seconds):
        return "–"
    s = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if s >= size:
            return f"{s // size} {unit} {s % size // part:02} {below}"
    return f"{seconds:.3g} s"


def several(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)


def verdict(i: Interval, better: str, worse: str, nothing: str) -> str:
    """What the interval shows."""
    if i.n == 0:
        return "not measured"
    if i.n == 1:
        return "nothing shown (one seed, no interval)"
    return {1: better, -1: worse, 0: f"{nothing} (interval includes 0)"}[i.sign]


def saving_verdict(i: Interval) -> str:
    return verdict(i, "saves", "costs", "no saving shown")


def loss_verdict(i: Interval) -> str:
    return verdict(i, "higher loss", "lower loss", "no difference shown")


# ----------------------------------------------------------------------------------------------------------------------
# The summary


def summary(experiment: Experiment, results: Results) -> list[tuple[str, str]]:
    """Paragraphs, each with its first words."""
    if experiment.is_single:
        return [("The run", describe_run(experiment.reference.first))]
    parts = [
        ("The experiment", describe_experiment(experiment, results.sweep)),
        ("Final loss", final_words(experiment, results)),
        ("At each arm's best learning rate", sweep_words(results.sweep)),
        ("Saved along the run", along_words(experiment, results)),
        ("Saved at the end", worth_words(experiment, results)),
    ]
    return [(lead, text) for lead, text in parts if text]


def describe_experiment(experiment: Experiment, sweep: Sweep | None) -> str:
    run, runs = experiment.reference.first, experiment.runs()
    finished, seeds = sum(run.finished for run in runs), len({seed for arm in experiment.arms for seed in arm.runs})
    return (
        f"{run.config.get('model-shape', 'a model without config.json')}, "
        f"{size(run)}{format_tokens(run.budget if math.isfinite(run.budget) else run.tokens[-1])} tokens; "
        f"{len(experiment.arms)} arms, {seeds} seed{'s' if seeds > 1 else ''}, {finished} of the {len(runs)} runs that "
        f"have begun are finished; {run.config.get('device', 'device unknown')}. Arms are "
        f"compared with {experiment.reference.name} seed by seed; 95% intervals in brackets."
        + best_rates(experiment, sweep)
    )


def best_rates(experiment: Experiment, sweep: Sweep | None) -> str:
    """Which rates the page has, where it has but one of each arm."""
    if not (experiment.has_best_rates and sweep):
        return ""
    at = [at_best(f) + ("" if f.is_tuned else " (the only one)") for f in sweep.families]
    return f" Of each arm this is the best of the peak learning rates that it was run at: {several(at)}."


def size(run: Run) -> str:
    count = run.number("parameters")
    return f"{format_tokens(count)} parameters, " if math.isfinite(count) else ""


def describe_run(run: Run) -> str:
    state = "finished" if run.finished else "so far"
    budget = f" of {format_tokens(run.budget)}" if math.isfinite(run.budget) else ""
    loss, noise = run.curve.loss, run.column("gns/ln")
    noise = noise[np.isfinite(noise)]
    last = (
        f"The last validation loss is {loss[-1]:.4f} nats per token" if len(loss) > 0 else "It has not been evaluated"
    )
    scale = f", the noise scale of the LayerNorms {noise[-1]:.3g} sequences at the end" if len(noise) > 0 else ""
    return (
        f"{run.config.get('model-shape', 'A model without config.json')}, {size(run)}{state}: {run.steps:,} steps and "
        f"{format_tokens(run.tokens[-1])}{budget} tokens in {duration(run.seconds[-1])} of device time "
        f"({run.config.get('device', 'device unknown')}), with a mean batch of {number(run.mean_batch, 1)} sequences. "
        f"{last}{scale}."
    )


@dataclass(frozen=True)
class Finding:
    verdict: str
    arm: str
    numbers: str  # said only where something is shown
    n: int


def grouped(findings: Sequence[Finding]) -> str:
    """The arms of one verdict together, in the order in which verdicts come up; n once, if all have the same."""
    same_n = len({f.n for f in findings}) == 1
    parts = []
    for verdict in dict.fromkeys(f.verdict for f in findings):
        same = [f for f in findings if f.verdict == verdict]
        names = [f"{f.arm}{f.numbers and ' '}{f.numbers}{'' if same_n else f' (n = {f.n})'}" for f in same]
        parts.append(f"{verdict}: {', '.join(names)}")
    return "; ".join(parts) + (f" (n = {findings[0].n})." if same_n else ".")


def finding(arm: str, i: Interval, verdict: str, numbers: str) -> list[Finding]:
    """None where nothing was measured."""
    return [Finding(verdict, arm, numbers if i.sign != 0 else "", i.n)] if i.n > 0 else []


def at_rate(arm: Arm, experiment: Experiment) -> str:
    """The arm's name, with its peak learning rate where that is not the reference's."""
    other = math.isfinite(arm.rate) and arm.rate != experiment.reference.rate
    return f"{arm.name} at {rate_name(arm.rate)}" if other else arm.name


def is_told(arm: Arm, results: Results) -> bool:
    """In the summary: variants at other learning rates are left to sweep_words()."""
    return results.sweep is None or not arm.is_sweep


def final_words(experiment: Experiment, results: Results) -> str:
    found: list[Finding] = []
    rivals: list[Finding] = []
    for r in results.arms:
        if is_told(r.arm, results) and experiment.original(r.arm) is None:
            for findings, i in ((found, r.against_reference), (rivals, r.against_best)):
                findings += finding(at_rate(r.arm, experiment), i, loss_verdict(i), nats(i))
    if not found:
        nothing = "No pair of runs on the full budget has finished: there are no final losses to compare."
        return nothing if results.sweep is None else ""  # what has finished is compared by sweep_words()
    reference, best = experiment.reference, results.best_constant
    text = f"Against {reference.name}, in nats per token, {grouped(found)}"
    if results.sweep is not None:
        return text  # the best constant batch is compared with at each one's best rate: sweep_words()
    if best is reference:
        return f"{text} No constant batch had a lower mean loss than {reference.name}."
    if best is None or not rivals:
        return text
    return f"{text} Against the best constant batch, that of {best.name}, chosen after the fact, {grouped(rivals)}"


def at_best(family: Family) -> str:
    return f"{family.name} at {rate_name(family.best.rate)}"


def sweep_words(sweep: Sweep | None) -> str:
    """Whether growing batches beat the best constant one, each at its best rate."""
    if sweep is None:
        return ""
    rival = sweep.best_constant
    if rival is None:
        parts = ["No constant batch has finished."]
    else:
        parts = [f"The best constant batch is that of {at_best(rival)}, with a mean loss of {rival.best.mean:.4f}."]
        parts += rival_words(sweep, [family for family in sweep.families if not family.is_constant])
    rivals = [at_best(family) for family in sweep.promising_constants]
    if rivals:
        parts.append(
            "With too few seeds to be the best constant batch, but better than it in those they share, so that what is "
            f"said against it is not settled: {several(rivals)}."
        )
    for edge in ("lowest", "highest"):
        names = [at_best(family) for family in sweep.families if family.edge == edge]
        if names:
            parts.append(
                f"The best rate is the {edge} that was run, and a better one may lie beyond: {several(names)}."
            )
    promising = [f"{f.name} at {rate_name(v.rate)}" for f in sweep.families for v in f.promising]
    if promising:
        parts.append(
            "With too few seeds to be chosen, but better than the chosen rate in those they share: "
            f"{several(promising)}."
        )
    untuned = [family.name for family in sweep.families if not family.is_tuned]
    if untuned:
        parts.append(f"Run at one rate only, and so perhaps not at their best: {several(untuned)}.")
    return " ".join(parts)


def rival_words(sweep: Sweep, growing: Sequence[Family]) -> list[str]:
    """How growing batches compare with the best constant one."""
    found: list[Finding] = []
    is_won = False
    for family in growing:
        i = sweep.against_best(family)
        found += finding(at_best(family), i, rival_verdict(i), nats(i))
        is_won |= i.sign < 0
    if not found:
        return ["No growing batch has a seed in common with it."] if growing else []
    nothing = "" if is_won else " No growing batch is shown to beat it."
    return [f"Against it, in nats per token, each at the best of the rates run with it, {grouped(found)}{nothing}"]


def rival_verdict(i: Interval) -> str:
    return verdict(i, "worse than the best constant batch", "beats the best constant batch", "no difference shown")


def along_words(experiment: Experiment, results: Results) -> str:
    by_tokens: list[Finding] = []
    by_seconds: list[Finding] = []
    for r in results.arms:
        if len(r.along.at) == 0 or not is_told(r.arm, results) or experiment.original(r.arm) is not None:
            continue
        last = at_quarters(r, experiment.reference)[-1]
        last = len(r.along.at) - 1 if last is None else last
        if r.along.missed[last]:
            missed = "no saving, the loss was never reached"
            by_tokens.append(Finding(missed, at_rate(r.arm, experiment), "", len(r.arm.runs)))
        for findings, i in ((by_tokens, r.along.tokens[last]), (by_seconds, r.along.seconds[last])):
            findings += finding(at_rate(r.arm, experiment), i, saving_verdict(i), share(i))
    if not by_tokens:
        return ""
    reference = experiment.reference.name + ("" if experiment.reference.finished() else " so far")
    return f"At the lowest loss of {reference}, of the tokens, {tokens_and_time(by_tokens, by_seconds, results)}"


def tokens_and_time(by_tokens: Sequence[Finding], by_seconds: Sequence[Finding], results: Results) -> str:
    of_time = f" Of the device time, {grouped(by_seconds)}" if by_seconds else ""
    return grouped(by_tokens) + (f" {results.disturbed}" if results.disturbed else of_time)


def worth_words(experiment: Experiment, results: Results) -> str:
    reference, best = experiment.reference.name, results.best_constant
    worths = [(r.arm.name, r.worth) for r in results.arms if r.worth is not None and is_told(r.arm, results)]
    own = [(r.arm.name, r.own_worth) for r in results.arms if r.own_worth is not None and is_told(r.arm, results)]
    parts = [fitted_words(f, reference) for f in results.fitted if f.against_reference.n > 0]
    for named, lead, lead_of_best in (
        (own, f"At the loss of {reference}, by the arm's own fitted budgets", "At that of {}, in the same way"),
        (worths, f"By what fitted budgets of {reference} are worth", "Against {}, at the same prices"),
    ):
        parts += saved_words([(name, w.of_reference) for name, w in named], lead, results)
        if best:
            lead = lead_of_best.format(f"the best constant batch, {best.name}")
            parts += saved_words([(name, w.of_best) for name, w in named], lead, results)
    for named, owner in ((own, "the arm itself"), (worths, reference)):
        untold = [name for name, w in named if w.of_reference.worthless]
        if untold:
            parts.append(f"Not to be told, as more tokens bought {owner} nothing in some seed: {several(untold)}.")
    if not parts:
        return f"Not known: that takes finished runs with a schedule fitted to another budget than that of {reference}."
    return "The honest reading. " + " ".join(parts)


def saved_words(named: Sequence[tuple[str, EndSaving]], lead: str, results: Results) -> list[str]:
    """One sentence or two, if anything is known."""
    by_tokens: list[Finding] = []
    by_seconds: list[Finding] = []
    for name, saved in named:
        prolonged = " (prolonged)" if saved.beyond else ""
        for findings, i in ((by_tokens, saved.tokens), (by_seconds, saved.seconds)):
            findings += finding(name, i, saving_verdict(i), share(i) + prolonged)
    return [f"{lead}, of the tokens, {tokens_and_time(by_tokens, by_seconds, results)}"] if by_tokens else []


def fitted_words(f: Fitted, reference: str) -> str:
    loss = f"{loss_verdict(f.against_reference)}, {nats(f.against_reference)} (n = {f.against_reference.n})"
    tokens = f"{percent(abs(f.tokens.mean))} {'fewer' if f.tokens.mean > 0 else 'more'} tokens"
    return f"{f.arm.name}, on {tokens}, against {reference} on its own budget: {loss}."
