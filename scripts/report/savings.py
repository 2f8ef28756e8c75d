"""Statistics of the report: intervals over seeds, and what a run saves against another one at equal loss.

Intervals are Student's t, two-sided, over independent seeds: mean +- t(n - 1) s / sqrt(n). One seed has no interval.

Along the run. A run's evaluations are joined by straight lines. A loss level is *reached* where this curve first comes
down to it. At each evaluation of the reference run, the level is the lowest loss it has seen so far; if it reached it
after t tokens, and the other run after u tokens, the other one saved the share 1 - u/t. (The line lies above a curve
that bends as losses do, so u is a little too large, and the saving, if anything, too small.) Nothing is extrapolated:
if a run never reached the level, or had passed it before its first evaluation, the level has no saving, and leaving
that seed out of the mean would favour one side: then no mean is given either. A run that is still going on counts at
the levels that the reference reached within as many tokens as this run has had so far, whether this run has reached
them or not.

At the end of the run. A run is worth what its schedule was made for: cut short, it has not yet been annealed. So let
the reference be trained anew for other budgets N, each with its whole schedule. Its final losses give

    L(N) = a + b ln N        through two budgets, or by least squares through more

and a run that ends with the loss M after U tokens is worth the reference's N* = exp((M - a) / b) tokens: the other arm
saved 1 - U/N*. For b >= 0 more tokens bought the reference nothing, and no saving can be told. Of two other arms one
saved 1 - (U/N*) / (U'/N*') against the other. The other way round, an arm that was itself trained anew for other
budgets has a line of its own: it ends at the final loss of a reference that had V tokens with N* of its own, and saved
1 - N*/V.

Shares saved are averaged as logarithms of the ratios u/t, in which a saving and the opposite cost have the same size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

LEVEL = 0.95  # of all intervals


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its confidence interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval lies on that side of 0; else 0."""
        return int(self.low > 0) - int(self.high < 0)


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Curve:
    """A run's evaluations, in order. Each array (evaluations)"""

    tokens: Array
    seconds: Array
    loss: Array


# ----------------------------------------------------------------------------------------------------------------------
# Student's t


def t_within(theta: float, df: int) -> float:
    """P(|t| < sqrt(df) tan(theta)) for df degrees of freedom (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(3 if odd else 2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_quantile(level: float, df: int) -> float:
    """The t that |t| stays below with probability `level`, by bisection."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def t_interval(values: Sequence[float] | Array, level: float = LEVEL) -> Interval:
    """Of the mean of the values that are known (finite)."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    n = len(known)
    if n == 0:
        return NOTHING
    mean = float(known.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = t_quantile(level, n - 1) * float(known.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def saved_share(log_ratios: Sequence[float] | Array) -> Interval:
    """1 - u/t, from ln(u/t) of each seed."""
    i = t_interval(log_ratios)
    with np.errstate(over="ignore"):
        mean, low, high = (-float(np.expm1(x)) for x in (i.mean, i.high, i.low))
    return Interval(mean, low, high, i.n)


# ----------------------------------------------------------------------------------------------------------------------
# Along the run


def first_reached(position: Array, loss: Array, levels: Array) -> Array:
    """Where the curve first comes down to each level; -inf: before its first point; +inf: not within it."""
    lowest = np.minimum.accumulate(loss)
    after = np.searchsorted(-lowest, -levels)  # the first point at or below the level
    at = np.full(len(levels), math.inf)
    for k, (i, level) in enumerate(zip(after, levels)):
        if i == 0:
            at[k] = position[0] if loss[0] == level else -math.inf
        elif i < len(loss):
            share = (loss[i - 1] - level) / (loss[i - 1] - loss[i])
            at[k] = position[i - 1] + share * (position[i] - position[i - 1])
    return at


@dataclass(frozen=True)
class Pair:
    """Two runs of the same seed."""

    reference: Curve
    other: Curve
    finished: bool  # the other run: what it has not reached, it never will


@dataclass(frozen=True)
class SavingsAlong:
    """What an arm saves, at each of K levels, those of the reference's evaluations."""

    at: Array  # (K) tokens of the reference's evaluation
    loss: Array  # (K) the level, mean over the seeds
    tokens: list[Interval]  # (K) share saved
    seconds: list[Interval]  # (K)
    missed: Array  # (K) seeds whose other run ended without reaching the level


def savings_along(pairs: Sequence[Pair]) -> SavingsAlong:
    at = np.unique(np.concatenate([np.empty(0), *(p.reference.tokens for p in pairs)]))
    shape = (len(pairs), len(at))
    level, by_tokens, by_seconds = (np.full(shape, math.nan) for _ in range(3))
    for s, p in enumerate(pairs):
        where = np.searchsorted(at, p.reference.tokens)
        level[s, where] = levels = np.minimum.accumulate(p.reference.loss)
        for ratios, x, y in (
            (by_tokens, p.reference.tokens, p.other.tokens),
            (by_seconds, p.reference.seconds, p.other.seconds),
        ):
            reached = first_reached(y, p.other.loss, levels)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios[s, where] = np.log(reached / first_reached(x, p.reference.loss, levels))
            ratios[s, where[reached == -math.inf]] = -math.inf
            if not p.finished:
                ratios[s, where[reached == math.inf]] = -math.inf  # not yet: unknown, not missed
                ratios[s, where[p.reference.tokens > 1.01 * p.other.tokens[-1]]] = math.nan
    missed = (by_tokens == math.inf).sum(axis=0)
    return SavingsAlong(at, column_means(level), share_of_columns(by_tokens), share_of_columns(by_seconds), missed)


def column_means(values: Array) -> Array:
    """Over the finite ones of each column; NaN where there are none."""
    return np.array([t_interval(column).mean for column in values.T])


def share_of_columns(log_ratios: Array) -> list[Interval]:
    """Of each column; none where a seed's saving is known to lie beyond what was measured."""
    return [NOTHING if np.isinf(column).any() else saved_share(column) for column in log_ratios.T]


# ----------------------------------------------------------------------------------------------------------------------
# At the end of the run


@dataclass(frozen=True)
class Worth:
    """What the reference's final loss would be after a budget of N tokens: a + b ln N."""

    a: float
    b: float

    def log_tokens(self, loss: float) -> float:
        """ln of the budget that ends with this loss; NaN if more tokens buy nothing."""
        return (loss - self.a) / self.b if self.b < 0 else math.nan


def worth(budgets: Sequence[float], losses: Sequence[float]) -> Worth | None:
    """From runs of one seed, each annealed over its whole budget; None for fewer than two budgets."""
    if len(set(budgets)) < 2:
        return None
    b, a = np.polyfit(np.log(budgets), losses, 1)
    return Worth(float(a), float(b))
