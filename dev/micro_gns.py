"""How much wider is the error of a noise scale from micro-batches than of one from single examples? Measured.

A noise scale needs the squared norms of mean gradients over s and over B > s examples (pair_components in gnslog.py).
Where per-example norms are not to be had, s is a micro-batch, or one rank's share; this tool measures what that costs.
The gradients have to be of the same weights, so the trainer runs with a learning rate of 0 from a trained model, once
for each size, over the same data, whose order does not depend on the batch: then row i of the log with s sequences a
step holds exactly the norm over the sequences i s, ..., (i + 1) s - 1, and B/s rows make a row of the log with B.

    mkdir -p out/micro
    for n in 1 2 4 8 16 32 64; do ./train_gpt -i data/demo_train.bin -e out/demo/checkpoints/step_*/model.bin \\
        -b 16 -t 128 -d $((128 * n)) --max-tokens 630784 --lr 0 -v 0 --gns all -o out/micro/$n; done
    python3 dev/micro_gns.py out/micro/* --plot picture.png

(630,784 tokens: 77 batches of 64 sequences, not quite once through the demo's data.) Logs are folders or files
log.csv; the one with the largest batch is B. For each s this estimates, from each batch of B examples,

    all      the mean of |G_s|^2 over the batch's B/s micro-batches beside |G_B|^2; s = 1 is from the log of B alone,
             its per-example norms: what the trainer does
    first    |G_s|^2 of the first micro-batch alone: what a trainer could do with one more pass over its gradients

With all micro-batches, gtg is the mean product of two different micro-batches' gradients, which are (B - s)/(B - 1) of
the pairs of examples: little is lost until s is near B. trsigma is a variance between B/s gradients, and loses more.

The table has, over all batches together, GNS = sum trsigma / sum gtg, its standard error by the jackknife over batches,
and its ratio to that of s = 1, the examples with which it would be a tenth of the noise scale, and the components'
relative standard deviations from batch to batch. The examples are the same for every s. The error of the ratio is half
the width of the middle 68% of its bootstrap over batches, in which both resample the same batches.

Where there is a log with s = 1, it must agree with B's per-example norms; the second line tells: a test of those norms.
Exit status: 0, or 1 where it does not, or 2 where the command or a log is wrong. Needs numpy; matplotlib for --plot.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gnslog import (GROUPS, Array, Log, LogError, Parser, jackknife, pair_components, read_log, run, squared_norms,
                    tensors_of_group)

RESAMPLES = 1000
PEGN_TOLERANCE = 1e-4  # fp32 norms of the same gradients, summed in another order
SAME_LOSS = 1e-5  # relative; what rounding leaves between the same examples in other micro-batches


@dataclass(frozen=True)
class Estimate:
    """From micro-batches of s examples: the components of each big batch."""

    s: int
    gtg: Array
    trsigma: Array

    @property
    def gns(self) -> tuple[float, float]:
        return jackknife(self.trsigma, self.gtg)


@dataclass(frozen=True)
class Result:
    estimate: Estimate
    relative_error: float  # of the GNS over all batches
    ratio: float  # to that of s = 1
    ratio_error: float  # one standard error of the ratio


def batch_of(log: Log) -> int:
    sizes = np.unique(log.batch)
    if len(sizes) != 1:
        raise LogError(f"'{log.path}': expected the same batch in all rows, found {sizes[0]:.0f} to {sizes[-1]:.0f}; "
                       "run with a fixed -d")
    if np.any(log.column("lr") != 0):
        raise LogError(f"'{log.path}': expected a learning rate of 0 in all rows, so that all gradients are of the "
                       f"same weights, found {np.max(log.column('lr')):g}; run with --lr 0")
    return int(sizes[0])


def by_batch(values: Array, s: int, B: int, batches: int) -> Array:
    """(batches, B/s): the rows of a log of batches of s, a line for each batch of B."""
    return values[: batches * (B // s)].reshape(batches, B // s)


def read_sizes(paths: list[str]) -> dict[int, Log]:
    """The logs by batch; their rows are of the same examples, as their losses prove."""
    logs = sorted(((batch_of(log), log) for log in map(read_log, paths)), key=lambda pair: pair[0])
    sizes = dict(logs)
    B = max(sizes)
    big = sizes[B]
    batches = len(big.tokens)
    if len(sizes) != len(logs) or len(sizes) < 2 or batches < 10:
        raise LogError(f"expected logs of two or more different batches, the largest with 10 rows or more, found "
                       f"batches {', '.join(str(s) for s, _ in logs)}, the largest with {batches} rows")
    for s, log in sizes.items():
        if B % s != 0 or len(log.tokens) < batches * (B // s):
            raise LogError(f"'{log.path}': expected batches that divide {B} and {batches * B} examples in all, found "
                           f"{len(log.tokens)} batches of {s}; give all runs the same --max-tokens")
        loss = by_batch(log.column("train/lossf"), s, B, batches).mean(axis=1)
        off = np.max(np.abs(loss / big.column("train/lossf") - 1))
        if not off < SAME_LOSS:
            raise LogError(f"'{log.path}': expected the losses of the same examples and weights as in '{big.path}', "
                           f"found them {off:.1e} apart; give all runs the same model, data and seed")
    return sizes


def estimates(sizes: dict[int, Log], tensors: list[str], first: bool) -> list[Estimate]:
    """One for each s; s = 1 from the per-example norms of the largest batch."""
    B = max(sizes)
    norm = squared_norms(sizes[B], tensors, "norm")
    found = [Estimate(1, *pair_components(squared_norms(sizes[B], tensors, "pegn"), norm, 1, B))]
    for s, log in sizes.items():
        if 1 < s < B:
            small = by_batch(squared_norms(log, tensors, "norm"), s, B, len(norm))
            found.append(Estimate(s, *pair_components(small[:, 0] if first else small.mean(axis=1), norm, s, B)))
    return found


def check_examples(sizes: dict[int, Log]) -> bool:
    """Whether the largest batch's per-example norms are the norms of the steps of one example; prints it."""
    B, worst, where = max(sizes), 0.0, ""
    for tensor in sizes[B].tensors:
        pegn = sizes[B].tensor(tensor, "pegn")
        single = np.sqrt((by_batch(sizes[1].tensor(tensor, "norm"), 1, B, len(pegn)) ** 2).mean(axis=1))
        difference = float(np.max(np.abs(pegn / single - 1)))
        if not difference <= worst:
            worst, where = difference, tensor
    good = worst <= PEGN_TOLERANCE
    print(f"per-example norms in batches of {B} and norms of single examples: at most {worst:.1e} apart ({where}), "
          f"{'as' if good else 'NOT as'} expected (below {PEGN_TOLERANCE:g})\n")
    return good


def relative_error(e: Estimate, batches: Array) -> float:
    gns, error = jackknife(e.trsigma[batches], e.gtg[batches])
    return error / abs(gns)


def results(found: list[Estimate]) -> list[Result]:
    count = len(found[0].gtg)
    generator = np.random.default_rng(1)
    samples = [generator.integers(count, size=count) for _ in range(RESAMPLES)]
    base = np.array([relative_error(found[0], sample) for sample in samples])
    out = []
    for e in found:
        error, errors = relative_error(e, np.arange(count)), np.array([relative_error(e, sample) for sample in samples])
        ratio = error / relative_error(found[0], np.arange(count))
        low, high = np.nanquantile(errors / base, (0.16, 0.84))
        out.append(Result(e, error, ratio, float(high - low) / 2))
    return out


def examples_for_tenth(r: Result, B: int) -> float:
    """The examples with which the standard error would be a tenth of the noise scale."""
    return B * len(r.estimate.gtg) * (r.relative_error / 0.1) ** 2


def print_results(group: str, kind: str, found: list[Result], B: int) -> None:
    for r in found:
        gns, error = r.estimate.gns
        print(f"{group:<12}{kind:<7}{r.estimate.s:>4} {gns:>10.2f} {error:>9.2f} "
              f"{r.ratio:>8.2f} +- {r.ratio_error:<6.2f}"
              f"{examples_for_tenth(r, B):>10.0f}{np.std(r.estimate.gtg) / r.estimate.gtg.mean():>10.3f}"
              f"{np.std(r.estimate.trsigma) / r.estimate.trsigma.mean():>11.3f}")


def draw(drawn: dict[tuple[str, str], list[Result]], B: int, path: Path) -> None:
    from gnsplot import BLACK, ORANGE, log_ticks, plt, save  # matplotlib only where a figure is wanted

    figure, (ratio, examples) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (group, kind), found in drawn.items():
        s = [r.estimate.s for r in found]
        look = {"color": ORANGE if group == "ln" else BLACK, "linestyle": "-" if kind == "all" else "--",
                "marker": "o" if group == "ln" else "s", "markersize": 4,
                "label": f"{group}, {'all micro-batches' if kind == 'all' else 'first micro-batch alone'}"}
        ratio.errorbar(s, [r.ratio for r in found], [2 * r.ratio_error for r in found], capsize=2, **look)
        examples.plot(s, [examples_for_tenth(r, B) for r in found], **look)
    ratio.set(title="standard error of the GNS, that of single examples = 1", ylabel="ratio (± 2 standard errors)",
              ylim=(0, None))
    examples.set(title="what a standard error of 10% costs", ylabel="examples", yscale="log")
    log_ticks(examples.yaxis)
    for axes in (ratio, examples):
        axes.set(xlabel=f"examples in a micro-batch, of a batch of {B}", xscale="log")
        log_ticks(axes.xaxis, [2**i for i in range(B.bit_length())])
    ratio.legend(loc="upper left")
    save(figure, path)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log.csv or its folder for each size of batch")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure (ln and total), .png, .svg or .pdf")
    args = parser.parse_args()
    sizes = read_sizes(args.logs)
    B = max(sizes)
    print(f"{len(sizes[B].tokens)} batches of {B} examples, the same ones in micro-batches of "
          f"{', '.join(str(s) for s in sizes if s < B)}")
    good = check_examples(sizes) if 1 in sizes else True
    print(f"{'group':<12}{'of':<7}{'s':>4}{'GNS':>11}{'+-':>10}{'+-, ratio to s = 1':>22}{'for 10%':>10}{'sd gtg':>10}"
          f"{'sd trsigma':>11}")
    drawn: dict[tuple[str, str], list[Result]] = {}
    for group in GROUPS:
        tensors = tensors_of_group(sizes[B], group)
        for kind in ("all", "first") if tensors else ():
            found = results(estimates(sizes, tensors, kind == "first"))
            print_results(group, kind, found if kind == "all" else found[1:], B)
            if group in ("ln", "total"):
                drawn[group, kind] = found
    if args.plot:
        draw(drawn, B, args.plot)
    return 0 if good else 1


if __name__ == "__main__":
    run(main)
