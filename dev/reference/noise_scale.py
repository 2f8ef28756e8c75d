"""The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1) and its smoothing.

With m = mean_b |g_b|^2 and n2 = |mean_b g_b|^2 over the n examples of a step, summed over the tensors of a group,

    gtg     = (n n2 - m) / (n - 1)          estimates |G|^2, G the true gradient
    trsigma = (m - n2) / (1 - 1/n)          estimates tr(Sigma), the variance of one example's gradient
    GNS     = tr(Sigma) / |G|^2             in examples

What is smoothed is the signal fraction of each step, f_t = gtg / m, with GNS = 1/f - 1; by tokens, tau of them, where
`tokens` is what was consumed since the group's last sample:

    w = 1 - exp(-tokens / tau)
    F <- (1 - w) F + w f_t           W <- (1 - w) W + w           f = F / W

Its standard error comes from the differences of successive samples, each the mean of n_t examples:

    d = (f_t - f_(t-1))^2 / (1/n_t + 1/n_(t-1))
    V <- (1 - u) V + u d             U <- (1 - u) U + u           u = 1 - exp(-tokens / (4 tau))
    Q <- (1 - w)^2 Q + w^2 / n_t
    SE(f) = sqrt(V/U Q) / W          SE(GNS) = SE(f) / f^2

An estimate is known from the second sample on, where f > 0. A step of one example gives no sample, and neither does one
whose update was skipped; their tokens pass.
"""

import math
from dataclasses import dataclass, field

GROUPS = ("ln", "attention", "mlp", "wpe", "wte", "total", "total_nowte")


def contains(group: str, tensor_group: str) -> bool:
    """total is every tensor, total_nowte every one but the tied embedding."""
    return group in (tensor_group, "total") or (group == "total_nowte" and tensor_group != "wte")


def measures(gns: str, group: str) -> bool:
    """Does a step that measures `gns` measure this group?"""
    return gns == "all" or (gns == "ln" and group == "ln")


@dataclass(frozen=True)
class Sample:
    n: int
    m: float
    gtg: float
    trsigma: float


def sample(n: int, m: float, n2: float) -> Sample | None:
    if n < 2 or not m > 0 or not math.isfinite(m + n2):
        return None
    return Sample(n, m, (n * n2 - m) / (n - 1), (m - n2) / (1 - 1 / n))


@dataclass
class FractionEma:
    """The letters are those of the text above; last_f, last_n: of the sample before."""

    count: float = 0
    F: float = 0
    W: float = 0
    Q: float = 0
    V: float = 0
    U: float = 0
    last_f: float = 0
    last_n: float = 0
    unmeasured_tokens: float = 0  # since the last sample

    def add(self, s: Sample, tau: float) -> None:
        f, tokens = s.gtg / s.m, self.unmeasured_tokens
        w, u = -math.expm1(-tokens / tau), -math.expm1(-tokens / (4 * tau))
        if self.count > 0:
            d = (f - self.last_f) ** 2 / (1 / s.n + 1 / self.last_n)
            self.V, self.U = (1 - u) * self.V + u * d, (1 - u) * self.U + u
        self.F, self.W = (1 - w) * self.F + w * f, (1 - w) * self.W + w
        self.Q = (1 - w) ** 2 * self.Q + w**2 / s.n
        self.last_f, self.last_n, self.unmeasured_tokens = f, s.n, 0
        self.count += 1

    def estimate(self) -> tuple[float, float] | None:
        """GNS and its standard error."""
        if self.count < 2 or not self.W > 0 or not self.U > 0 or not self.F > 0:
            return None
        f, se = self.F / self.W, math.sqrt(self.V / self.U * self.Q) / self.W
        return max(0, 1 / f - 1), se / f**2


@dataclass
class Tracker:
    tau: float
    groups: dict[str, FractionEma] = field(default_factory=lambda: {group: FractionEma() for group in GROUPS})

    def update(self, samples: dict[str, Sample | None], tokens: float) -> None:
        """After each step: its samples, None where there is none, and its tokens."""
        for group, ema in self.groups.items():
            ema.unmeasured_tokens += tokens
            if samples[group] is not None:
                ema.add(samples[group], self.tau)


def log_fields(samples: dict[str, Sample | None], tracker: Tracker, gns: str) -> dict[str, float | None]:
    """The columns of log.csv after an update; empty where the step did not measure, or where there is no estimate."""
    fields: dict[str, float | None] = {}
    for group in GROUPS:
        s = samples[group] if measures(gns, group) else None
        known = tracker.groups[group].estimate() if measures(gns, group) else None
        fields[f"gns/{group}"], fields[f"gns/{group}/se"] = known or (None, None)
        fields[f"gns/{group}/gtg"], fields[f"gns/{group}/trsigma"] = (s.gtg, s.trsigma) if s else (None, None)
    return fields
