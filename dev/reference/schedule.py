"""What a step is to do, as a function of the tokens consumed before it. D: the budget, W: the warm-up, both in tokens.

Learning rate: peak * tokens / W during the warm-up, then peak * (F + (1 - F) left), F = --final-lr-frac, where u is the
share of the decay that is over, (tokens - start) / (D - start) from start = W on, and

    constant  left = 1            linear  left = 1 - u
    cosine    left = (1 + cos(pi u)) / 2
    wsd       left = 1 - sqrt(u), the decay starting at 0.8 D, or at W if that is later

Batch, in sequences: the --batch-schedule's value at `tokens`, rounded up to a multiple of --batch-quantum.

    fixed                    --batch-tokens
    linear:FROM:TO           from FROM at 0 to TO at D
    steps:0:64,100M:128,...  a size holds from its threshold on
    file:PATH[:UNIT]         lines "tokens, size": linear between these knots, constant outside; times UNIT

Couplings, B_ref being the sequences in --batch-tokens: the learning rate times (batch / B_ref)^--lr-coupling, the
weight decay times (batch / B_ref)^--wd-coupling, and beta2 = 2^(-tokens of the step / --beta2-half-life) if that is
not 0.

Noise scale: `ln` or `all` as --gns says; with --gns-all-every N every N-th step measures all tensors.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from files import Fault, Options

Knots = list[tuple[float, float]]  # (tokens, sequences)


@dataclass(frozen=True)
class StepPlan:
    target: float  # sequences, before rounding
    n: int  # sequences
    lr: float
    beta2: float
    weight_decay: float
    gns: str  # off, ln, all


def learning_rate(options: Options, tokens: float) -> float:
    D, W, peak, final = (options[name] for name in ("max-tokens", "warmup", "lr", "final-lr-frac"))
    kind = options["lr-schedule"]
    if tokens < min(W, D):
        return peak * tokens / W
    start = max(W, 0.8 * D) if kind == "wsd" else W
    u = 1.0 if tokens >= D else max(0.0, (tokens - start) / (D - start))
    left = {"constant": 1, "linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2, "wsd": 1 - math.sqrt(u)}[kind]
    return peak * (final + (1 - final) * left)


# ----------------------------------------------------------------------------------------------------------------------
# Batch size


def count(text: str) -> float:
    """250, 2_000, 1.5M, 0.6e-3"""
    found = re.fullmatch(r"\s*([\d_.]+(?:[eE][+-]?\d+)?)([KMB]?)\s*", text)
    if found is None:
        raise Fault(f"batch schedule: expected a number such as 250, 2_000 or 1.5M, found '{text.strip()}'")
    return float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[found[2]]


def file_knots(path: str, unit: float) -> Knots:
    try:
        lines = [line.split("#")[0].strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise Fault(f"cannot read the batch schedule '{path}': {error.strerror}") from None
    pairs = [re.split(r"\s*,\s*|\s+", line) for line in lines if line]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise Fault(f"the batch schedule '{path}' is not made of lines 'tokens, size'")
    return [(count(tokens), unit * count(size)) for tokens, size in pairs]


def batch_knots(options: Options) -> Knots:
    kind, _, rest = str(options["batch-schedule"]).partition(":")
    if kind == "fixed":
        return [(0, options["batch-tokens"] / options["seq-len"])]
    if kind == "linear":
        first, last = rest.split(":")
        return [(0, count(first)), (options["max-tokens"], count(last))]
    if kind == "steps":
        return [(count(a), count(b)) for a, b in (pair.split(":") for pair in rest.split(","))]
    if kind == "file":
        path, _, unit = rest.rpartition(":")
        return file_knots(path, count(unit)) if path and re.fullmatch(r"[\d_.]+[KMB]?", unit) else file_knots(rest, 1)
    raise Fault(f"--batch-schedule '{kind}' is not a function of the tokens")


def batch_target(options: Options, tokens: float) -> float:
    knots = batch_knots(options)
    last = max((i for i, knot in enumerate(knots) if knot[0] <= tokens), default=0)
    (a, size), after = knots[last], knots[last + 1 : last + 2]
    if not after or tokens <= a or str(options["batch-schedule"]).startswith("steps"):
        return size
    (b, next_size) = after[0]
    return size + (next_size - size) * (tokens - a) / (b - a)


def plan_step(options: Options, step: int, tokens: float, closed_loop_target: float | None) -> StepPlan:
    """closed_loop_target: the batch of --batch-schedule gns, which is not a function of the tokens."""
    follows_gns = options["batch-schedule"] == "gns"
    target = closed_loop_target if follows_gns else batch_target(options, tokens)
    quantum = options["batch-quantum"]
    n = max(1, math.ceil(target / quantum * (1 - 1e-12))) * quantum  # what rounding errors add does not count
    times_ref = n / (options["batch-tokens"] / options["seq-len"])
    half_life, every, gns = options["beta2-half-life"], options["gns-all-every"], options["gns"]
    return StepPlan(
        target=target,
        n=n,
        lr=learning_rate(options, tokens) * times_ref ** options["lr-coupling"],
        beta2=2 ** (-n * options["seq-len"] / half_life) if half_life > 0 else options["beta2"],
        weight_decay=options["weight-decay"] * times_ref ** options["wd-coupling"],
        gns="all" if gns == "ln" and every > 0 and step % every == 0 else gns,
    )
