"""The learning-rate sweep: each arm at its own best peak learning rate.

A constant batch and a growing one have their best learning rates at different places, so comparing them at one rate
says little. An arm's *variants* are its runs at each peak rate, its own one and those of <arm>@lr<x>; only those on the
reference's budget count. Its best rate has the lowest mean final loss, among the rates with the most seeds: else a rate
that was tried with one seed would win by that seed's luck. Of equal means the lower rate is taken. The best constant
batch is chosen in the same way among the arms of constant batch, each at its best rate.

A rate at an end of those that were run may have a better one beyond; an arm that was run at one rate is not tuned.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from gnslog import LogError

from .runs import Arm, Experiment
from .savings import NOTHING, Interval, t_interval

# Means above the lowest one by this share of it, or by so many times the median arm's distance from it at its best
# rate, whichever is more, are those of runs that diverged or came nowhere near: figures leave them outside, and keep
# this share of their height free for the arrowheads that stand for them.
FAR_SHARE, FAR_TIMES, ARROW_ROOM = 0.1, 3, 0.15


@dataclass(frozen=True)
class Variant:
    """An arm at one peak learning rate."""

    arm: Arm
    rate: float
    losses: dict[int, float]  # final ones, by seed; never empty

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))


@dataclass(frozen=True)
class Family:
    """An arm with all its variants."""

    name: str
    variants: list[Variant]  # in the order of their rates, one of each

    @property
    def is_tuned(self) -> bool:
        return len(self.variants) > 1

    @property
    def is_constant(self) -> bool:
        return all(run.is_constant for v in self.variants for run in v.arm.runs.values())

    @cached_property
    def eligible(self) -> list[Variant]:
        """Those with the most seeds."""
        most = max(len(v.losses) for v in self.variants)
        return [v for v in self.variants if len(v.losses) == most]

    @cached_property
    def best(self) -> Variant:
        return min(self.eligible, key=lambda v: (v.mean, v.rate))

    @property
    def edge(self) -> str:
        """Where the best rate is an end of those that were run; empty inside them."""
        if not self.is_tuned:
            return "only one"
        ends = {self.variants[0].rate: "lowest", self.variants[-1].rate: "highest"}
        return ends.get(self.best.rate, "")

    @property
    def promising(self) -> list[Variant]:
        """Those with too few seeds to be chosen that did better than the best in the seeds they share with it."""
        fewer = [v for v in self.variants if len(v.losses) < len(self.best.losses)]
        return [v for v in fewer if difference(v, self.best).mean < 0]


@dataclass(frozen=True)
class Sweep:
    families: list[Family]  # in the order of their arms
    best_constant: Family | None

    def against_best(self, family: Family) -> Interval:
        """Final loss less that of the best constant batch, each at its best rate."""
        rival = self.best_constant
        return NOTHING if rival is None or rival is family else difference(family.best, rival.best)

    @cached_property
    def limit(self) -> float:
        """Of the losses that figures show: no mean lies in the room above it where arrowheads stand."""
        means = sorted(v.mean for family in self.families for v in family.variants)
        lowest = means[0]
        best = float(np.median([family.best.mean for family in self.families]))
        limit = lowest + max(FAR_SHARE * lowest, FAR_TIMES * (best - lowest))
        for mean in means:
            if limit < mean < limit + ARROW_ROOM * (limit - lowest):
                limit = mean
        return limit

    def is_far(self, variant: Variant) -> bool:
        return variant.mean > self.limit

    def has_far(self, arm: Arm) -> bool:
        """Under whatever name: at_best_rates() below changes it."""
        return any(v.arm.runs is arm.runs and self.is_far(v) for family in self.families for v in family.variants)

    def far_seeds(self, variant: Variant) -> int:
        return sum(loss > self.limit for loss in variant.losses.values())

    @property
    def promising_constants(self) -> list[Family]:
        """Constant batches with too few seeds to be chosen that did better than the best in the seeds they share."""
        rival = self.best_constant
        fewer = [f for f in self.families if rival and f.is_constant and len(f.best.losses) < len(rival.best.losses)]
        return [f for f in fewer if self.against_best(f).mean < 0]


def difference(a: Variant, b: Variant) -> Interval:
    """Of the final losses, over the seeds that both have."""
    return t_interval([a.losses[seed] - b.losses[seed] for seed in sorted(a.losses.keys() & b.losses.keys())])


def read_sweep(experiment: Experiment) -> Sweep | None:
    """None where all runs that are finished have one peak learning rate."""
    names = dict.fromkeys(arm.stem for arm in experiment.arms)
    found = [Family(name, variants(experiment, name)) for name in names]
    families = [family for family in found if family.variants]
    if len({v.rate for family in families for v in family.variants}) < 2:
        return None
    return Sweep(families, best_of([family for family in families if family.is_constant]))


def at_best_rates(experiment: Experiment) -> Experiment:
    """Of each arm its best variant alone, under the arm's own name; and what repeats one of these on another budget, of
    several with one name that with the most seeds."""
    sweep = read_sweep(experiment)
    families = {family.name: family for family in sweep.families} if sweep else {}
    if experiment.reference.stem not in families:
        raise LogError(
            f"--best-rates: expected finished runs of {experiment.reference.stem}, and two peak learning rates among "
            "all finished runs, found none; leave it out, or train some: chinchilla.py --lr-sweep"
        )
    best = [family.best.arm for family in families.values()]
    chosen: dict[str, Arm] = {}
    for arm in experiment.arms:
        original, other = experiment.original(arm), chosen.get(arm.stem)
        is_best = any(arm is b or original is b for b in best)
        if is_best and (other is None or len(arm.finished()) > len(other.finished())):
            chosen[arm.stem] = arm
    names = {arm.name for arm in chosen.values()}
    return replace(
        experiment,
        folder=experiment.folder.with_name("report-best-rates"),
        arms=[replace(arm, name=stem) for stem, arm in chosen.items()],
        missing=[run for run in experiment.missing if run.split("/")[0] in names],
        has_best_rates=True,
        left_out=[stem for stem in dict.fromkeys(arm.stem for arm in experiment.arms) if stem not in chosen],
    )


def variants(experiment: Experiment, name: str) -> list[Variant]:
    """Of the arm of this name; of two at the same rate, the one with more seeds."""
    by_rate: dict[float, Variant] = {}
    for arm in experiment.arms:
        losses = {seed: run.final_loss for seed, run in arm.finished().items()}
        if arm.stem == name and losses and math.isfinite(arm.rate) and experiment.has_full_budget(arm):
            same = by_rate.get(arm.rate)
            if same is None or len(losses) > len(same.losses):
                by_rate[arm.rate] = Variant(arm, arm.rate, losses)
    return [by_rate[rate] for rate in sorted(by_rate)]


def best_of(families: list[Family]) -> Family | None:
    """The lowest mean at its best rate, among those that have the most seeds there."""
    most = max((len(family.best.losses) for family in families), default=0)
    return min((f for f in families if len(f.best.losses) == most), key=lambda f: f.best.mean, default=None)
