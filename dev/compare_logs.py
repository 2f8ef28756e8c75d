"""Do two runs agree? Compares two logs, ours or nanoGNS's, step by step.

    python3 dev/compare_logs.py out/a out/b                    (folders of runs, or files log.csv)
    python3 dev/compare_logs.py out/a nanoGNS/exact/out-b --tol gns=0.5 --all --plot picture.png

Rows belong together where tokens_processed is equal. For each quantity this prints the worst relative difference, where
it is, the median, and the tolerance that the worst is held against; --tol changes tolerances, --steps and --all what is
looked at. The difference of a and b is |a - b| / max(|a|, |b|), for

    batch               examples in the step
    loss                mean over the step's examples (train/lossf); val_loss at evaluations
    grad_norm           norm of the mean gradient before clipping
    norm, pegn          of each tensor: norm of the mean gradient, root mean square of the examples' norms
    gns                 of each group: the smoothed noise scale, estimated here from either whole log as the trainer
                        does (gnslog.py), with the same smoothing length; gns_se: |a - b| in standard errors of a - b

and, as these are differences that may be near zero, |a - b| / max(m_a, m_b), m = mean_b |g_b|^2, for

    gtg, trsigma        of each group: the step's estimates of |G|^2 and tr(Sigma)

A number beside a NaN counts as an infinite difference in batch, loss, grad_norm and norm, which every step has; the
others are compared where both logs have them. With nanoGNS's logs, two things are shown but not judged: the per-example
norm of wte (its is that of the embedding's half of the tied gradient), and the loss of steps of several micro-batches
(its is that of the last one).

The tolerances assume the same weights and data and two ways of rounding in fp32. Rounding grows as training goes on: to
judge two programs, compare the first steps (--steps 20). Two runs on different data can only agree in their noise
scales, within the error: --tol gns_se=4, --plot.

Exit status: 0 all agree, 1 something does not, 2 the command or a log is wrong. Needs numpy, and matplotlib for --plot.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gnslog import (GROUPS, WTE, Array, Log, LogError, Parser, fraction_ema, group_components, positive, read_log, run,
                    smoothing_length)

TOLERANCES = {"batch": 0.0, "loss": 1e-4, "val_loss": 1e-4, "grad_norm": 1e-3, "norm": 5e-3, "pegn": 5e-3, "gtg": 5e-3,
              "trsigma": 5e-3, "gns": 2e-2, "gns_se": 0.5}


@dataclass(frozen=True)
class Difference:
    """Of one quantity of one tensor or group."""

    quantity: str
    of: str  # the tensor or group; empty for a quantity of the whole step
    values: Array  # relative, at each compared step
    tokens: Array  # these steps'
    judged: bool = True


@dataclass(frozen=True)
class Pair:
    """Two logs and the rows that they have in common."""

    a: Log
    b: Log
    rows_a: Array  # indices
    rows_b: Array

    @property
    def tokens(self) -> Array:
        return self.a.tokens[self.rows_a]

    def columns(self, name: str) -> tuple[Array, Array]:
        return self.a.column(name)[self.rows_a], self.b.column(name)[self.rows_b]

    def have(self, name: str) -> bool:
        return name in self.a.columns and name in self.b.columns


def align(a: Log, b: Log, steps: int | None) -> Pair:
    common, rows_a, rows_b = np.intersect1d(a.tokens, b.tokens, return_indices=True)
    if len(common) == 0:
        raise LogError(f"expected logs with rows at the same tokens_processed, found none: '{a.path}' has "
                       f"{a.tokens[0]:.0f}, ..., {a.tokens[-1]:.0f}, '{b.path}' {b.tokens[0]:.0f}, ..., "
                       f"{b.tokens[-1]:.0f}; compare runs with the same batch and sequence length")
    return Pair(a, b, rows_a[:steps], rows_b[:steps])


def relative(a: Array, b: Array, scale: Array) -> Array:
    """0 where equal, also both NaN; infinite where one of them is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(a - b) / scale
    difference[~np.isfinite(difference)] = math.inf
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
    return difference


def compared(quantity: str, of: str, a: Array, b: Array, tokens: Array, judged: bool = True,
             optional: bool = False) -> Difference:
    """optional: only where both logs have the quantity."""
    both = ~(np.isnan(a) | np.isnan(b)) if optional else np.full(len(a), True)
    a, b = a[both], b[both]
    return Difference(quantity, of, relative(a, b, np.maximum(np.abs(a), np.abs(b))), tokens[both], judged=judged)


def several_micro_batches(log: Log, rows: Array) -> Array:
    return log.columns.get("gradient_accumulation_steps", np.ones(len(log.tokens)))[rows] > 1


def step_differences(pair: Pair) -> Iterator[Difference]:
    yield compared("batch", "", pair.a.batch[pair.rows_a], pair.b.batch[pair.rows_b], pair.tokens)
    last_only = np.full(len(pair.tokens), False)
    for log, rows in ((pair.a, pair.rows_a), (pair.b, pair.rows_b)):
        last_only |= log.is_reference & several_micro_batches(log, rows)
    for name, judged, rows in (("loss", True, ~last_only), ("loss", False, last_only)):
        a, b = pair.columns("train/lossf")
        if rows.any():
            yield compared(name, "", a[rows], b[rows], pair.tokens[rows], judged)
    if pair.have("val/loss"):
        yield compared("val_loss", "", *pair.columns("val/loss"), pair.tokens, optional=True)
    yield compared("grad_norm", "", *pair.columns("grad_norm"), pair.tokens)


def tensor_differences(pair: Pair) -> Iterator[Difference]:
    reference = pair.a.is_reference or pair.b.is_reference
    for tensor in pair.a.tensors:
        if tensor in pair.b.tensors:
            yield compared("norm", tensor, *pair.columns(f"train/gns/{tensor}/norm"), pair.tokens)
            yield compared("pegn", tensor, *pair.columns(f"train/gns/{tensor}/pegn"), pair.tokens,
                           judged=not (reference and tensor == WTE), optional=True)


def group_differences(pair: Pair, tau: float) -> Iterator[Difference]:
    for group in GROUPS:
        a, b = group_components(pair.a, group), group_components(pair.b, group)
        if a is None or b is None:
            continue
        curves = fraction_ema(a, tau), fraction_ema(b, tau)
        tokens, i, j = np.intersect1d(a.tokens, b.tokens, return_indices=True)
        kept = tokens <= pair.tokens[-1]
        tokens, i, j = tokens[kept], i[kept], j[kept]
        scale = np.maximum(a.m[i], b.m[j])
        yield Difference("gtg", group, relative(a.gtg[i], b.gtg[j], scale), tokens)
        yield Difference("trsigma", group, relative(a.trsigma[i], b.trsigma[j], scale), tokens)
        gns = curves[0].gns[i], curves[1].gns[j]
        yield compared("gns", group, *gns, tokens, optional=True)
        both = np.isfinite(gns[0]) & np.isfinite(gns[1])
        errors = np.hypot(curves[0].se[i], curves[1].se[j])
        yield Difference("gns_se", group, relative(gns[0][both], gns[1][both], errors[both]), tokens[both])


# ----------------------------------------------------------------------------------------------------------------------
# What is printed


def line(pair: Pair, label: str, parts: list[Difference], tolerance: float) -> tuple[str, bool]:
    """A line on these differences together, and whether they agree."""
    values = np.concatenate([d.values for d in parts])
    if len(values) == 0:
        return f"{label:<12} not in both logs", True
    worst = max((d for d in parts if len(d.values) > 0), key=lambda d: d.values.max())
    at = int(np.argmax(worst.values))
    row = int(np.searchsorted(pair.a.tokens, worst.tokens[at]))
    step = pair.a.columns.get("step", np.arange(len(pair.a.tokens)))[row]
    where = f"step {step:.0f} {worst.of}"
    judged = parts[0].judged
    agree = not judged or bool(worst.values[at] <= tolerance)
    verdict = f"{tolerance:<10.3g}{'agree' if agree else 'DIFFER'}" if judged else "not judged"
    return f"{label:<12}{worst.values[at]:>10.2e}  {where:<46}{np.median(values):>10.2e}  {verdict}", agree


def report(pair: Pair, differences: list[Difference], tolerances: dict[str, float], every: bool) -> bool:
    print(f"A  {pair.a.path}: {len(pair.a.tokens)} rows{', nanoGNS' if pair.a.is_reference else ''}")
    print(f"B  {pair.b.path}: {len(pair.b.tokens)} rows{', nanoGNS' if pair.b.is_reference else ''}")
    print(f"{len(pair.tokens)} rows compared, {len(pair.a.tokens) - len(pair.tokens)} more in A, "
          f"{len(pair.b.tokens) - len(pair.tokens)} more in B\n")
    print(f"{'quantity':<12}{'worst':>10}  {'where':<46}{'median':>10}  tolerance")
    agree = True
    for quantity, tolerance in tolerances.items():
        for judged in (True, False):
            parts = [d for d in differences if d.quantity == quantity and d.judged == judged]
            if parts:
                text, good = line(pair, quantity, parts, tolerance)
                agree = agree and good
                print(text)
            for part in parts if every and len(parts) > 1 else []:
                print("  " + line(pair, quantity, [part], tolerance)[0])
    print("\nthe logs agree" if agree else "\nthe logs DIFFER")
    return agree


def draw(pair: Pair, tau: float, path: Path) -> None:
    """Both noise scales over tokens, a panel for each group."""
    from gnsplot import BLUE, ORANGE, band, limit_to_bulk, plt, save  # matplotlib only where a figure is wanted

    both = [(group, a, b) for group in GROUPS if (a := group_components(pair.a, group)) is not None
            and (b := group_components(pair.b, group)) is not None]
    if not both:
        raise LogError("--plot: expected a group with per-example norms in both logs, found none; train with --gns")
    columns = min(len(both), 4 if len(both) > 6 else 3)
    rows = math.ceil(len(both) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.7 * rows), squeeze=False,
                                  layout="constrained")
    for panel in panels.flat[len(both):]:
        panel.set_visible(False)
    for panel, (group, a, b) in zip(panels.flat, both):
        curves = [fraction_ema(c, tau) for c in (a, b)]
        for curve, line, name in zip(curves, ((ORANGE, "-"), (BLUE, "--")), ("A", "B")):
            band(panel, curve.tokens / 1e6, curve.gns, curve.se, line, name)
        limit_to_bulk(panel, [c.gns for c in curves])
        panel.set(title=group, xlabel="tokens (millions)", ylabel="GNS (sequences)")
    panels.flat[0].legend()
    figure.suptitle(f"A {pair.a.path}, B {pair.b.path}, ± 2 standard errors", fontsize=8)
    save(figure, path)


def tolerance(text: str) -> tuple[str, float]:
    quantity, equals, value = text.partition("=")
    if quantity not in TOLERANCES or not equals:
        raise argparse.ArgumentTypeError(f"expected QUANTITY=NUMBER with one of {', '.join(TOLERANCES)}, found "
                                         f"'{text}'")
    return quantity, 0.0 if value == "0" else positive(value)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of steps of 1 or more, found '{text}'")
    return int(text)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("a", metavar="A", help="a log.csv, or the folder that holds it")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("--tol", type=tolerance, action="append", default=[], metavar="QUANTITY=NUMBER",
                        help="another tolerance; " + ", ".join(f"{k} {v:g}" for k, v in TOLERANCES.items()))
    parser.add_argument("--steps", type=count, metavar="N", help="compare the first N common rows")
    parser.add_argument("--all", action="store_true", help="a line for each tensor and group as well")
    parser.add_argument("--tau", type=positive, metavar="TOKENS",
                        help="smoothing length of gns [that of A's config.json, or 1%% of A's tokens]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw both noise scales, .png, .svg or .pdf")
    args = parser.parse_args()
    pair = align(read_log(args.a), read_log(args.b), args.steps)
    tau = smoothing_length(pair.a, args.tau)[0]
    differences = [*step_differences(pair), *tensor_differences(pair), *group_differences(pair, tau)]
    agree = report(pair, differences, TOLERANCES | dict(args.tol), args.all)
    if args.plot:
        draw(pair, tau, args.plot)
    return 0 if agree else 1


if __name__ == "__main__":
    run(main)
