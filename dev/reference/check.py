"""Does a run of the trainers agree with the reference? Compares log.csv and checkpoints with the same steps done here.

    python3 dev/reference/check.py RUN [--steps N | FROM:TO] [--teacher-forced] [options; --help lists them]

RUN is the trainer's --out folder; of anything else only the data is read (and the model file, if the run started from
one). Two ways:

- Free: the reference starts from the same initial weights (drawn from the seed, or the model file's), or from the
  checkpoint of step FROM, and goes its own way. Two roundings drift apart in time.
- Teacher-forced: each compared step starts from the trainer's own checkpoint of it (weights, moments, tracker), so
  every step must agree as the first one does. Steps without a checkpoint are left out. For a run with all of them:
  ./train_gpt ... --gns all --out RUN --checkpoint-every 1tokens --keep 0 --max-steps 10

Compared are, with x the trainer's number and y the reference's:

    quantity        difference                          of what
    loss            |x - y| / |y|                       train/lossf, train/loss, val/loss
    grad_norm       the same                            grad_norm
    norm, pegn      the same                            every tensor's norm and pegn
    gtg, trsigma    |x - y| / m, m = gtg + trsigma      every group's
    gns, se         |x - y|                             every group's, as signal fractions: 1/(1 + GNS), SE/(1 + GNS)^2
    schedule        |x - y| / |y|                       lr, batch_target, batch, tokens_processed, every batch_size
    log             as gtg and trsigma, |x - y| / |y|   gtg, trsigma, gns, se against what follows from log.csv's own
                                                        norms and pegns, where it has every step and tensor
    and, teacher-forced, in the checkpoint after the step, |.| being the 2-norm of a tensor:
    m, v            |x - y| / |y|                       Adam's moments: the gradient, number by number
    weights         |x - y| / |y|                       the weights against the update from the trainer's own moments
    key_bias        |x| / |y|                           x: the key third of the first moment of c_attn's bias y

Tolerances. The trainers compute in float32. A loss is a mean of many terms and good to 1e-6; a gradient has passed
through every layer twice: 1e-5. What follows from norms inherits theirs: with a relative error e in norm and pegn, m
and n2 <= m have 2e, so gtg/m = (n n2/m - 1) / (n - 1) and trsigma/m have 4e n/(n - 1) <= 8e at most; a mean of f no
more; SE(f), which comes from differences of two f, sqrt(2) times as much: 12e. As these are worst cases, the arithmetic
behind them is also checked on its own (`log`), to the 9 digits of the log. Weights are compared with the update that
belongs to the trainer's moments because Adam's first steps go by the sign of each number of the gradient more than by
its size: where it is all but zero, rounding decides. For the same reason a free run keeps within these tolerances for
some dozen steps, not for hundreds.

The key third of c_attn's bias adds the same q.b to all scores of a query, which the softmax does not see: its true
gradient is zero (but in a cosine block), the trainer's is rounding, and Adam, which divides by its size, makes real
steps of it, without any effect on the loss. In the norm of the whole bias it counts by its square, which is nothing
(1e-9 of the whole leaves 1e-18), so that norm is compared as every other; the third has a bound of its own, key_bias.

Exit status: 0 all within tolerance, 1 not, 2 the command or a file is wrong.
"""

import argparse
import math
import os
import re
import signal
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from files import Checkpoint, Fault, LogRow, checkpoint_folder, read_checkpoint, read_log, write_log
from gpt import GPTConfig, tensors
from noise_scale import GROUPS, Tracker, log_fields, measures
from schedule import StepPlan
from train import (
    Run,
    State,
    group_samples,
    initial_state,
    open_run,
    plan_of,
    set_up_jax,
    state_of,
    take_step,
    to_device,
    updated,
)

Number = float | None  # None: not there

NORM_TOLERANCE = 1e-5
TOLERANCES = {
    "loss": 1e-6,
    "grad_norm": NORM_TOLERANCE,
    "norm": NORM_TOLERANCE,
    "pegn": NORM_TOLERANCE,
    "gtg": 8 * NORM_TOLERANCE,
    "trsigma": 8 * NORM_TOLERANCE,
    "gns": 8 * NORM_TOLERANCE,
    "se": 12 * NORM_TOLERANCE,
    "schedule": 1e-8,
    "log": 1e-8,
    "weights": 1e-6,
    "m": 1e-5,
    "v": 2e-5,
    "key_bias": 1e-6,
}


# ----------------------------------------------------------------------------------------------------------------------
# Differences


@dataclass(frozen=True)
class Difference:
    size: float
    step: int
    where: str  # a column, or a tensor
    trainer: Number
    reference: Number


@dataclass
class Comparison:
    found: dict[str, list[Difference]] = field(default_factory=lambda: {quantity: [] for quantity in TOLERANCES})

    def add(self, quantity: str, step: int, where: str, x: Number, y: Number, scale: Number = None) -> None:
        """scale: what the difference is relative to; None: |y|. Where only one of the two is there, it is infinite."""
        if x is None and y is None:
            return
        there = x is not None and y is not None and math.isfinite(x - y)
        self.add_distance(quantity, step, where, abs(x - y) if there else math.inf, x, y, scale)

    def add_distance(
        self, quantity: str, step: int, where: str, distance: float, x: Number, y: Number, scale: Number = None
    ) -> None:
        """x and y differ by this; for tensors these are their norms."""
        scale = abs(y or 0) if scale is None else scale
        size = 0.0 if distance == 0 else distance / scale if scale > 0 else math.inf
        self.found[quantity].append(Difference(size, step, where, x, y))


def quantity_of(column: str) -> str | None:
    """Which quantity a column of log.csv belongs to, the noise scale's apart; None: it is not compared."""
    if column in ("train/lossf", "train/loss", "val/loss"):
        return "loss"
    if column in ("lr", "batch_target", "batch", "tokens_processed") or column.endswith("/batch_size"):
        return "schedule"
    return next((name for name in ("grad_norm", "norm", "pegn") if column.split("/")[-1] == name), None)


def fraction(row: LogRow, group: str) -> tuple[Number, Number]:
    """GNS and SE as the signal fraction and its standard error."""
    gns, se = row[f"gns/{group}"], row[f"gns/{group}/se"]
    return (None, None) if gns is None or se is None else (1 / (1 + gns), se / (1 + gns) ** 2)


def compare_rows(comparison: Comparison, x: LogRow, y: LogRow) -> None:
    step = int(y["step"])
    for column, value in y.items():
        quantity = quantity_of(column)
        if quantity is not None:
            comparison.add(quantity, step, column, x[column], value)
    for group in GROUPS:
        compare_components(comparison, ("gtg", "trsigma"), x, y, group)
        pairs = zip(("gns", "se"), fraction(x, group), fraction(y, group))
        for quantity, of_trainer, of_reference in pairs:
            comparison.add(quantity, step, f"gns/{group} ({quantity})", of_trainer, of_reference, scale=1)


def compare_components(comparison: Comparison, quantities: tuple[str, str], x: LogRow, y: LogRow, group: str) -> None:
    """gtg and trsigma of one group, relative to their sum."""
    a, b = f"gns/{group}/gtg", f"gns/{group}/trsigma"
    m = None if y[a] is None else y[a] + y[b]
    for quantity, column in zip(quantities, (a, b)):
        comparison.add(quantity, int(y["step"]), column, x[column], y[column], m)


def compare_log_with_itself(comparison: Comparison, run: Run, log: list[LogRow], steps: range) -> None:
    """The noise scale in the log against what follows from the norms in it, as far as it has every step."""
    tracker, columns = Tracker(run.options["gns-tau"]), {t.name: f"train/gns/{t.name}/" for t in tensors(run.config)}
    for step, row in enumerate(log[: steps.stop]):
        if row["step"] != step:
            return
        measured = [name for name, column in columns.items() if row.get(column + "pegn") is not None]
        m, n2 = ({name: row[columns[name] + kind] ** 2 for name in measured} for kind in ("pegn", "norm"))
        samples = group_samples(run.config, int(row["batch"]), m, n2)
        tracker.update({group: None for group in GROUPS} if row["skipped"] else samples, row["batch"] * run.train.T)
        gns = "all" if len(measured) == len(columns) else "ln" if measured else "off"
        derived = {"step": step, **log_fields(samples, tracker, gns)}
        for group in GROUPS:
            if step in steps and measures(gns, group):
                compare_components(comparison, ("log", "log"), row, derived, group)
                for column in (f"gns/{group}", f"gns/{group}/se"):
                    comparison.add("log", step, column, row[column], derived[column])


def key_biases(config: GPTConfig) -> dict[str, slice]:
    """The parts of tensors that have no gradient."""
    key = slice(config.channels, 2 * config.channels)
    blocks = sorted(set(range(config.layers)) - config.cosine_blocks)
    return {f"transformer.h.{layer}.attn.c_attn.qkv.bias": key for layer in blocks}


def compare_tensors(comparison: Comparison, quantity: str, step: int, x: dict, y: dict) -> None:
    for name in y:
        trainer, ours = (np.asarray(of[name], float) for of in (x, y))
        norms = float(np.linalg.norm(trainer)), float(np.linalg.norm(ours))
        comparison.add_distance(quantity, step, name, float(np.linalg.norm(trainer - ours)), *norms)


def compare_checkpoints(
    comparison: Comparison, run: Run, before: State, plan: StepPlan, x: Checkpoint, y: State
) -> None:
    """The trainer's checkpoint x after a step against the reference's state y; both started from `before`."""
    m, v = to_device(run, x.m), to_device(run, x.v)
    weights = updated(run, plan, y.applied, before.weights, m, v) if y.applied > before.applied else before.weights
    compare_tensors(comparison, "m", before.step, x.m, y.m)
    compare_tensors(comparison, "v", before.step, x.v, y.v)
    compare_tensors(comparison, "weights", before.step, x.weights, weights)
    for name, key in key_biases(run.config).items():
        found, whole = float(np.linalg.norm(x.m[name][key])), float(np.linalg.norm(y.m[name]))
        comparison.add("key_bias", before.step, name, found, 0.0, scale=whole)


# ----------------------------------------------------------------------------------------------------------------------
# The two ways


def state_before(run: Run, step: int) -> State | None:
    """From the trainer's checkpoint, or the initial weights; None if there is no checkpoint."""
    if step == 0:
        return initial_state(run)
    folder = checkpoint_folder(run.folder, step)
    return None if folder is None else state_of(run, read_checkpoint(folder, run.config))


def run_free(comparison: Comparison, run: Run, log: dict[int, LogRow], steps: range) -> list[LogRow]:
    state = state_before(run, steps.start)
    if state is None:
        raise Fault(f"'{run.folder}' has no checkpoint of step {steps.start} to start from; --steps 0:{steps.stop}?")
    rows = []
    for step in steps:
        rows.append(take_step(run, state, log.get(step)))
        if step in log:
            compare_rows(comparison, log[step], rows[-1])
    return rows


def run_forced(comparison: Comparison, run: Run, log: dict[int, LogRow], steps: range) -> list[LogRow]:
    rows = []
    for step in (s for s in steps if s in log):
        state = state_before(run, step)
        if state is not None:
            before, plan = replace(state), plan_of(run, state, log[step])
            rows.append(take_step(run, state, log[step]))
            compare_rows(comparison, log[step], rows[-1])
            after = checkpoint_folder(run.folder, step + 1)
            if after is not None:
                compare_checkpoints(comparison, run, before, plan, read_checkpoint(after, run.config), state)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The report


def report(comparison: Comparison, tolerances: dict[str, float]) -> bool:
    """Prints a line a quantity, and below it what is beyond the tolerance; True if nothing is."""
    print(f"{'quantity':10} {'compared':>8} {'median':>9} {'worst':>9} {'tolerance':>9}  where it is worst")
    agrees = True
    for quantity, found in comparison.found.items():
        if found:
            worst, limit = max(found, key=lambda d: d.size), tolerances[quantity]
            figures = f"{statistics.median(d.size for d in found):9.1e} {worst.size:9.1e} {limit:9.1e}"
            print(f"{quantity:10} {len(found):8} {figures}  step {worst.step} {worst.where}")
            agrees = report_beyond(quantity, found, limit) and agrees
    print("agrees" if agrees else "disagrees")
    return agrees


def report_beyond(quantity: str, found: list[Difference], limit: float) -> bool:
    """Names the first differences beyond the tolerance; True if there are none."""
    beyond = [d for d in found if not d.size <= limit]
    for d in beyond[:3]:
        numbers = f"the trainer has {d.trainer}, the reference {d.reference}: {d.size:.1e}"
        print(f"    DISAGREES: {quantity}, step {d.step}, {d.where}: {numbers}")
    if len(beyond) > 3:
        print(f"    and {len(beyond) - 3} more")
    return not beyond


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Fault(f"{message}; --help lists all options")


def step_range(text: str) -> range:
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    steps = range(int(found[1] or 0), int(found[2])) if found else range(0)
    if not steps:
        raise argparse.ArgumentTypeError(f"expected N or FROM:TO, at least one step, found '{text}'")
    return steps


def tolerance(text: str) -> tuple[str, float]:
    found = re.fullmatch(rf"({'|'.join(TOLERANCES)})=(\d[\d.]*(?:e[+-]?\d+)?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(TOLERANCES)} and its =NUMBER, found '{text}'")
    return found[1], float(found[2])


def chunk_size(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a number of examples, 1 or more, found '{text}'")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(usage="%(prog)s RUN [options]", description="Compares a run with the reference.")
    parser.add_argument("run", type=Path, help="the trainer's --out folder")
    parser.add_argument("--steps", type=step_range, help="N: the first N steps; FROM:TO, counted from 0 [10; all]")
    parser.add_argument("--teacher-forced", action="store_true", help="start each step from the trainer's checkpoint")
    parser.add_argument("--tolerance", type=tolerance, action="append", default=[], metavar="QUANTITY=X",
                        help=f"of {', '.join(TOLERANCES)}; may be repeated")  # fmt: skip
    parser.add_argument(
        "--started-in", type=Path, metavar="FOLDER", help="where relative paths in config.json begin [here]"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the reference's own log.csv to this file")
    parser.add_argument(
        "--chunk", type=chunk_size, default=8, metavar="N", help="gradients of examples in memory at once [8]"
    )
    parser.add_argument("--precision", choices=("float64", "float32"), default="float64", help="[float64]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs jax[cuda] [cpu]")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> bool:
    set_up_jax(options.device)
    folder, log_file = options.run.resolve(), options.log.resolve() if options.log else None
    try:
        os.chdir(options.started_in or ".")
    except OSError as error:
        raise Fault(f"--started-in '{options.started_in}' cannot be entered: {error.strerror}") from None
    run, log = open_run(folder, np.dtype(options.precision), options.chunk), read_log(folder / "log.csv")
    by_step = {int(row["step"]): row for row in log}
    steps = options.steps or range(max(by_step, default=0) + 1 if options.teacher_forced else 10)
    steps = range(steps.start, min(steps.stop, max(by_step, default=-1) + 1))
    comparison = Comparison()
    rows = (run_forced if options.teacher_forced else run_free)(comparison, run, by_step, steps)
    if not rows:
        raise Fault(f"'{folder}' has no step to compare: no logged step (with a checkpoint) is among --steps")
    compare_log_with_itself(comparison, run, log, steps)
    if log_file:
        write_log(log_file, rows)
    print(f"{options.run}: {len(rows)} of steps {steps.start} to {steps.stop - 1}, {options.precision}, "
          f"{'each from its checkpoint' if options.teacher_forced else 'running freely'}")  # fmt: skip
    return report(comparison, TOLERANCES | dict(options.tolerance))


def main(arguments: list[str] | None = None) -> int:
    try:
        return 0 if check(parse(arguments)) else 1
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
    except KeyError as missing:
        print(f"error: no {missing} in config.json, log.csv or state.txt: the run is not of this version's trainer; "
              "train it anew", file=sys.stderr)  # fmt: skip
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `check.py ... | head` ends without a word
    sys.exit(main())
