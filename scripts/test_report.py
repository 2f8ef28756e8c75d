"""Tests of scripts/report.py.

    make train_gpt && python3 scripts/test_report.py [--trainer ./train_gpt]
    python3 scripts/test_report.py --example FOLDER        leaves an invented experiment of every arm there, to look at

Invented runs have losses with a known answer: an arm whose curve is the reference's with the tokens scaled by 0.8 saves
20% of them, and over many invented experiments the intervals must hold the truth as often as they say. Damaged logs
must be refused in one line, running ones reported on. With the trainer, the page's command must train the same run
again. The last line counts.
"""

import argparse
import csv
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from report import figures
from report.captions import captions
from report.command import command
from report.drawing import looks, rate_axis, rate_name, spread
from report.results import at_quarters, compare, notes
from report.runs import Experiment, has_rows, read_all, read_run, short_names
from report.savings import (
    Array,
    Curve,
    Interval,
    Pair,
    first_reached,
    saved_share,
    savings_along,
    t_interval,
    t_quantile,
    worth,
)
from report.sweep import at_best_rates
from report.words import duration, saving_verdict, share
from report.words import summary as summary_words
from gnslog import GROUPS, LogError

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "dev/test"))
from suite import check, check_raises, summary  # noqa: E402

check_refused = partial(check_raises, LogError)

BUDGET, LENGTH = 1_000_000.0, 64


def check_close(found: Array | float, expected: Array | float, tolerance: float, what: str) -> None:
    """Absolute; NaN only where NaN is expected."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    good = found.shape == expected.shape and np.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)
    check(good, f"{what}: expected {expected}, found {found}")


def report(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-B", HERE / "report.py", *map(str, args)], capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# Invented runs


def loss_at(tokens: Array) -> Array:
    """Of the reference, without noise."""
    return 1.5 + 40 * (tokens + 2e4) ** -0.3


@dataclass(frozen=True)
class Invented:
    """A run that needs `scale` times the tokens of loss_at(), at `speed` tokens a second; `shift` is added to the loss.

    Its batch goes from first_batch to batch; it is evaluated every 2.5% of BUDGET, and `done` of it is done.
    """

    seed: int = 1
    scale: float = 1.0
    shift: float = 0.0
    speed: float = 1e5
    batch: float = 32
    first_batch: float = 0  # 0: as batch
    budget: float = BUDGET
    done: float = 1.0

    def size(self, tokens: float) -> int:
        first = self.first_batch or self.batch
        return max(2, round(first + (self.batch - first) * tokens / self.budget))

    def rows(self) -> Iterator[dict[str, object]]:
        rng, tokens, step = np.random.default_rng(self.seed), 0.0, 0
        while tokens < self.budget * self.done:
            n, before = self.size(tokens), tokens
            tokens += n * LENGTH
            loss = float(loss_at(np.array(tokens / self.scale))) + self.shift
            evaluated = tokens >= self.budget or tokens // (BUDGET / 40) > before // (BUDGET / 40)
            yield {
                "step": step,
                "val/loss": repr(loss) if evaluated else "",
                "dt": n * LENGTH / self.speed,
                "lr": 1e-3 * min(1, 20 * before / self.budget) * (1 - 0.9 * before / self.budget),
                "train/lossf": loss + 0.1 * rng.standard_normal(),
                "tokens_processed": round(tokens),
                **noise_columns(tokens, rng),
                "batch": n,
                "skipped": 0,
            }
            step += 1

    def config(self) -> dict[str, object]:
        constant = self.first_batch in (0, self.batch)
        return {
            "train-data": "/some/where/train.bin",
            "val-data": "val.bin",
            "seed": self.seed,
            "seq-len": LENGTH,
            "max-tokens": self.budget,
            "batch-tokens": self.batch * LENGTH,
            "batch-schedule": "fixed" if constant else f"linear:{self.first_batch:g}:{self.batch:g}",
            "lr": 1e-3,
            "model-shape": "L=1",
            "parameters": 50000,
            "device": "none",
            "git-revision": "abc",
        }


def noise_columns(tokens: float, rng: np.random.Generator) -> dict[str, float]:
    columns = {}
    for k, group in enumerate(GROUPS):
        truth = (5 + 60 * tokens / BUDGET) * (1 + 0.2 * k)
        gns = truth * math.exp(0.1 * rng.standard_normal())
        columns |= {f"gns/{group}": gns, f"gns/{group}/se": 0.15 * truth}
        columns |= {f"gns/{group}/gtg": 0.5 / (1 + k), f"gns/{group}/trsigma": 0.5 * gns / (1 + k)}
    return columns


def write_log(folder: Path, rows: list[dict[str, object]]) -> None:
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_run(folder: Path, config: dict[str, object] | None = None, **options: float) -> Path:
    """An Invented run with these options; config: what differs in its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Invented(**options)
    write_log(folder, list(run.rows()))
    (folder / "config.json").write_text(json.dumps(run.config() | (config or {})))
    return folder


def write_plan(folder: Path, arms: list[str], seeds: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"arms": [{"name": name, "title": f"the arm {name}"} for name in arms], "seeds": seeds, "budget": BUDGET}
    (folder / "plan.json").write_text(json.dumps(plan))


def write_example(folder: Path) -> None:
    """Every arm of an experiment, three seeds: some better than fixed, some worse, some neither."""
    arms = {
        "fixed": {},
        "ramp": {"scale": 0.88, "first_batch": 4, "speed": 9.4e4},
        "gns": {"scale": 0.86, "first_batch": 6, "speed": 9e4},
        "mean": {"scale": 0.97, "batch": 18, "speed": 9.6e4},
        "const1": {"scale": 1.08, "batch": 4, "speed": 6e4},
        "const2": {"scale": 0.96, "batch": 8, "speed": 8e4},
        "const3": {"scale": 0.98, "batch": 16, "speed": 9.5e4},
        "const4": {"scale": 1.1, "batch": 64, "speed": 1.02e5},
        "fall": {"scale": 1.05, "batch": 4, "first_batch": 32},
        "replay": {"scale": 0.865, "first_batch": 6.5, "speed": 9e4},
        "sqrtlr": {"scale": 0.9, "first_batch": 4, "config": {"lr-coupling": 0.5}},
        "halflife": {"scale": 0.87, "first_batch": 4, "config": {"beta2-half-life": 5e5}},
        "fitted": {"budget": 0.85 * BUDGET},
        "fittedramp": {"budget": 0.85 * BUDGET, "scale": 0.88, "first_batch": 4},
    }
    # Smaller batches have their best rate lower; at the highest one they diverge.
    for name, best in (("fixed", 4e-3), ("ramp", 2e-3), ("gns", 2e-3), ("mean", 2.8e-3), ("const2", 1.4e-3)):
        for rate in (5e-4, 1.4e-3, 2e-3, 4e-3, 8e-3):
            away = math.log(rate / best) ** 2 - math.log(1e-3 / best) ** 2
            scale = 20 if rate >= 4 * best else arms[name].get("scale", 1.0) * math.exp(0.08 * away)
            arms[f"{name}@lr{rate:g}"] = arms[name] | {"scale": scale, "config": {"lr": rate}}
    write_plan(folder, list(arms), [1, 2, 3])
    rng = np.random.default_rng(1)
    for seed in (1, 2, 3):
        shift = 0.02 * rng.standard_normal()
        for name, options in arms.items():
            scale = options.get("scale", 1.0) * math.exp(0.01 * rng.standard_normal())
            write_run(folder / name / f"seed{seed}", seed=seed, shift=shift, **options | {"scale": scale})


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_t() -> None:
    for df, expected in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        check_close(t_quantile(0.95, df), expected, 5e-5, f"t of {df} degrees of freedom, two-sided 95%")
    check_close(t_quantile(0.99, 5), 4.0321, 5e-5, "and 99%")
    i = t_interval([1.0, 2.0, math.nan, 6.0])
    half = 4.3027 * math.sqrt(7 / 3)
    check_close([i.mean, i.low, i.high, i.n], [3, 3 - half, 3 + half, 3], 1e-3, "an interval of three known values")
    i = t_interval([5.0])
    check(i.mean == 5 and math.isnan(i.low) and i.n == 1, "one seed has no interval")
    check(t_interval([]).n == 0 and math.isnan(t_interval([]).mean), "no seeds, no mean")
    check([Interval(0, a, b, 2).sign for a, b in ((1, 2), (-2, -1), (-1, 1))] == [1, -1, 0], "on which side of 0")
    i = saved_share(np.log([0.5, 0.5]))
    check_close([i.mean, i.low, i.high], [0.5, 0.5, 0.5], 1e-12, "half the tokens are half saved")


def test_first_reached() -> None:
    x, y = np.array([10.0, 20, 30, 40]), np.array([4.0, 2, 3, 1])
    levels = np.array([5.0, 4, 3, 2, 1.5, 1, 0.5])
    check_close(
        first_reached(x, y, levels), [-math.inf, 10, 15, 20, 37.5, 40, math.inf], 1e-12, "first time at each level"
    )


def curve(scale: float, shift: float = 0.0, speed: float = 1.0, budget: float = BUDGET) -> Curve:
    tokens = np.linspace(0.025, 1, 40) * budget
    return Curve(tokens, tokens / speed, loss_at(tokens / scale) + shift)


def curve_until(share: float, scale: float) -> Curve:
    whole = curve(scale)
    done = whole.tokens <= share * BUDGET
    return Curve(whole.tokens[done], whole.seconds[done], whole.loss[done])


def test_known_savings() -> None:
    pairs = [Pair(curve(1, shift), curve(0.8, shift, speed=0.9), True) for shift in (0, 0.1, -0.05)]
    s = savings_along(pairs)
    late = s.at >= 0.2 * BUDGET
    tokens, seconds = (np.array([i.mean for i in part])[late] for part in (s.tokens, s.seconds))
    # Straight lines between evaluations, an eighth of the tokens apart or less, lie above the curve by 0.2% at most.
    check_close(tokens, np.full(len(tokens), 0.199), 0.0011, "tokens scaled by 0.8 are a fifth saved, or a little less")
    check_close(seconds, np.full(len(seconds), 0.9991 - 0.8 / 0.9), 0.0011, "less by a clock that is slower by 0.9")
    check(
        all(i.n == 3 and i.low > 0.19 and i.high < 0.21 for i in np.array(s.tokens, object)[late]),
        "seeds agree: narrow intervals",
    )
    check(math.isnan(s.tokens[0].mean), "a level that was passed before the first evaluation has no saving")
    check((s.missed == 0).all(), "all levels are reached")
    cost = savings_along([Pair(curve(1), curve(1.25), True), Pair(curve(1), curve(1), True)])
    check(cost.missed[-1] == 1 and math.isnan(cost.tokens[-1].mean), "a seed that never got there leaves no mean")
    check_close(cost.tokens[19].mean, 1 - math.sqrt(1.25), 0.003, "a cost is a negative saving, averaged as a ratio")
    slow = savings_along([Pair(curve(1), curve(1.25), False), Pair(curve(1), curve(1), True)])
    check(slow.missed[-1] == 0 and slow.tokens[-1].n == 0, "a level that a running seed may still reach: no mean")
    for scale in (0.8, 1.25):  # at half of its budget: whether it has reached the level or not, it does not count yet
        half = savings_along([Pair(curve(1), curve_until(0.5, scale), False), Pair(curve(1), curve(0.9), True)])
        check(
            half.missed[-1] == 0 and half.tokens[-1].n == 1, f"a running seed, {scale} of the tokens: not beyond them"
        )
    check(half.tokens[17].n == 0 and half.tokens[25].n == 1, "a slower one leaves no mean within them")


def test_intervals_cover() -> None:
    """Over 600 invented experiments, 95% intervals hold the truth in 95% +- 2.7% (three standard deviations)."""
    rng, trials, inside = np.random.default_rng(0), 600, np.zeros(2)
    for _ in range(trials):
        shifts, scales = 0.05 * rng.standard_normal(3), 0.8 * np.exp(0.05 * rng.standard_normal(3))
        s = savings_along([Pair(curve(1, a), curve(b, a), True) for a, b in zip(shifts, scales)])
        inside[0] += s.tokens[-1].low < 0.2 < s.tokens[-1].high
        ratios = []
        for shift in shifts:
            fixed = [2.0 - 0.1 * math.log(n) + shift + 0.001 * rng.standard_normal() for n in (8.0, 10.0)]
            other = 2.0 - 0.1 * math.log(10 / 0.9) + shift + 0.001 * rng.standard_normal()
            ratios.append(math.log(10.0) - worth([8.0, 10.0], fixed).log_tokens(other))
        i = saved_share(ratios)
        inside[1] += i.low < 0.1 < i.high
    for count, what in zip(inside, ("along the run", "at its end")):
        check(0.923 <= count / trials <= 0.977, f"intervals of savings {what} hold the truth in {count / trials:.1%}")


def test_worth() -> None:
    line = worth([100.0, 80.0], [2.0, 2.1])
    check_close(
        [math.exp(line.log_tokens(x)) for x in (2.0, 2.1, 2.05)],
        [100, 80, math.sqrt(8000)],
        1e-9,
        "budgets of equal worth",
    )
    check(worth([100.0, 100.0], [2.0, 2.1]) is None, "one budget tells nothing")
    check(math.isnan(worth([100.0, 80.0], [2.1, 2.0]).log_tokens(2.0)), "nothing where more tokens bought nothing")


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def rewrite(path: Path, change: Callable[[str], str]) -> Path:
    path.write_text(change(path.read_text()))
    return path.parent


def drop_columns(text: str, *names: str) -> str:
    rows = list(csv.reader(text.splitlines()))
    keep = [i for i, name in enumerate(rows[0]) if not any(name == n or name.startswith(f"{n}/") for n in names)]
    return "".join(",".join(row[i] for i in keep) + "\n" for row in rows)


def test_reading(folder: Path) -> None:
    run = read_run(write_run(folder / "a", first_batch=4))
    check(run.finished and run.budget == BUDGET and run.steps == len(run.tokens), "a finished run")
    check_close(run.seconds[-1], run.tokens[-1] / 1e5, 1e-6, "device time is the sum of dt")
    check_close(run.mean_batch, run.tokens[-1] / LENGTH / run.steps, 1e-9, "mean batch")
    check_close(run.final_loss, float(loss_at(run.tokens[-1])), 1e-12, "final loss")
    thinned = rewrite(
        write_run(folder / "thin", batch=16) / "log.csv",
        lambda t: "".join(
            line for i, line in enumerate(t.splitlines(True)) if i < 2 or (i - 1) % 4 == 0 or i == len(t.splitlines())
        ),
    )
    check_close(
        read_run(thinned).seconds[-1],
        read_run(thinned).tokens[-1] / 1e5,
        1e-6,
        "rows stand for the steps since the last",
    )
    for config, budget in (
        ({"max-tokens": "none", "tokens-per-param": 20, "parameters": 7}, 140),
        ({"max-steps": 5, "batch-tokens": 64, "max-tokens": "none"}, 320),
        ({"max-steps": 0, "batch-tokens": 64}, math.nan),
    ):
        (folder / "a/config.json").write_text(json.dumps(config))
        check_close(read_run(folder / "a").budget, budget, 0, f"the budget of {config}")
    check(not read_run(folder / "a").finished, "a run without a budget is never finished")


def test_running(folder: Path) -> None:
    """Reports on runs that have hardly begun, or lack columns."""
    full = (write_run(folder / "full") / "log.csv").read_text()
    all_but_tokens = set(full.splitlines()[0].split(",")) - {"tokens_processed"}
    cases = {
        "half a row": full[: len(full) // 2 - 7],
        "one step": "".join(full.splitlines(True)[:2]),
        "no validation": drop_columns("".join(full.splitlines(True)[:20]), "val/loss"),
        "tokens only": drop_columns(full, *all_but_tokens),
    }
    for name, text in cases.items():
        run = folder / name
        run.mkdir()
        (run / "log.csv").write_text(text)
        done = report(run)
        check(
            done.returncode == 0 and (run / "report/index.html").exists(),
            f"a report of a run with {name}: {done.stderr[-300:]}",
        )
        check(
            "nan" not in (run / "report/index.html").read_text().split("<figure")[0], f"no nan on the page with {name}"
        )
    check(short_names([folder / "odd \udcff"]) == ["odd \\udcff"], "the name of a folder that is not UTF-8")
    run = write_run(folder / "odd", config={"train-data": "not UTF-8 \udcff"})  # as the trainers write it
    done = report(run)
    page = (run / "report/index.html").read_text(encoding="utf-8")
    check(
        done.returncode == 0 and "not UTF-8 \\udcff" in page,
        f"the name of a file that is not UTF-8: {done.stderr[-300:]}",
    )
    check(len(read_run(folder / "half a row").tokens) == cases["half a row"].count("\n") - 1, "half a row is left out")
    check(has_rows(folder / "one step") and not has_rows(folder / "none"), "which runs have begun")


def test_damaged(folder: Path) -> None:
    write_run(folder / "a")
    text = (folder / "a/log.csv").read_text()
    cases = {
        "": "header",
        text.splitlines(True)[0]: "header and rows",
        text.replace("0.02048", "abc", 1): "abc",
        text + text.splitlines(True)[-1]: "tokens_processed",
        drop_columns(text, "tokens_processed"): "tokens_processed",
    }
    for damaged, word in cases.items():
        (folder / "a/log.csv").write_text(damaged)
        done = report(folder / "a")
        check(
            done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr,
            f"refused with '{word}': {done.stderr[:300]}",
        )
    (folder / "a/log.csv").write_text(text)
    (folder / "a/config.json").write_text("{")
    check_refused(lambda: read_run(folder / "a"), "config.json", "JSON")
    check(report(folder / "nowhere").returncode == 2 and report().returncode == 2, "no run, or none given")
    write_plan(folder, ["fixed"], [1])
    check_refused(lambda: read_all([folder]), "none with a step")
    check_refused(lambda: read_all([folder, folder / "a"]), "alone")
    (folder / "plan.json").write_text('{"arms": 3}')
    check_refused(lambda: read_all([folder]), "arms")


# ----------------------------------------------------------------------------------------------------------------------
# Experiments


def invent(folder: Path, arms: dict[str, dict], seeds: int = 3, jitter: float = 0.0) -> Experiment:
    """Runs of arms whose scales vary by `jitter` from seed to seed."""
    rng = np.random.default_rng(5)
    write_plan(folder, list(arms), list(range(1, seeds + 1)))
    for seed in range(1, seeds + 1):
        for name, options in arms.items():
            scale = options.get("scale", 1.0) * math.exp(jitter * rng.standard_normal())
            write_run(folder / name / f"seed{seed}", seed=seed, shift=0.01 * seed, **options | {"scale": scale})
    return read_all([folder])


def test_experiment(folder: Path) -> None:
    short = {"budget": 0.8 * BUDGET}
    slow = {"scale": 1.1, "config": {"weight-decay": 0.5}}
    arms = {
        "fixed": {},
        "ramp": {"scale": 0.8, "first_batch": 4, "speed": 9e4},
        "mean": {"batch": 17, "scale": 0.95},
        "const1": {"batch": 8, "scale": 1.3},
        "const1@lr2e-3": {"batch": 8, "scale": 0.9, "config": {"lr": 2e-3}},
        "fitted": short,
        "fittedramp": short | {"scale": 0.8, "first_batch": 4},
        "slow": slow,
        "shortslow": short | slow,
    }
    e = invent(folder, arms, jitter=1e-3)
    results = compare(e)
    of = {result.arm.name: result for result in results.arms}
    check(
        [e.original(a).name if e.original(a) else None for a in e.arms] == [None] * 5 + ["fixed", "ramp", None, "slow"],
        "which arms repeat which",
    )
    check(results.best_constant.name == "const1@lr2e-3", "the best constant may come from the sweep")
    difference = float(loss_at(BUDGET / 0.8) - loss_at(BUDGET))
    check_close(of["ramp"].against_reference.mean, difference, 1e-3, "final loss against fixed")
    check(
        of["ramp"].against_reference.n == 3 and of["ramp"].against_reference.sign == -1, "over three seeds, and clear"
    )
    check_close(
        of["ramp"].against_best.mean,
        loss_at(BUDGET / 0.8) - loss_at(BUDGET / 0.9),
        1e-3,
        "and against the best constant",
    )
    check(of["const1@lr2e-3"].against_best.n == 0, "which is not compared with itself")
    check_close(
        [of["ramp"].along.tokens[k].mean for k in at_quarters(of["ramp"], e.reference)],
        [0.2] * 4,
        5e-3,
        "saved, at each quarter",
    )
    last = at_quarters(of["const1"], e.reference)[-1]
    check(of["const1"].along.missed[last] == 3, "a worse arm never gets there")
    # The line through two budgets is straight in ln N; the losses are not quite: hence 1%.
    check_close(
        of["fittedramp"].worth.of_reference.tokens.mean,
        0.2,
        0.01,
        "at the end, where the ramp's loss is one that fixed has",
    )
    check_close(of["fittedramp"].worth.of_reference.seconds.mean, 0.2, 0.01, "by its own clock")
    check_close(of["ramp"].worth.of_reference.seconds.mean, 1 - 0.8 / 0.9, 0.02, "by a slower one")
    check_close(of["ramp"].worth.of_best.tokens.mean, 1 - 0.8 / 0.9, 0.01, "against the best constant batch")
    check_close(of["ramp"].worth.of_best.seconds.mean, 1 - 0.8 / 0.9 / 0.9, 0.01, "and by both clocks")
    check(of["const1@lr2e-3"].worth.of_best.tokens.n == 0, "which saves nothing against itself")
    check(
        of["ramp"].worth.of_reference.beyond == 3 and of["fitted"].worth is None,
        "prolonged lines are counted; fixed has no worth of its own",
    )
    own = of["ramp"].own_worth
    check_close(own.of_reference.tokens.mean, 0.2, 0.01, "at the loss of fixed, by the ramp's own two budgets")
    check_close(own.of_reference.seconds.mean, 1 - 0.8 / 0.9, 0.02, "by its slower clock")
    check_close(own.of_best.tokens.mean, 1 - 0.8 / 0.9, 0.01, "at the loss of the best constant batch")
    check_close(own.of_best.seconds.mean, 1 - 0.8 / 0.9 / 0.9, 0.02, "and by both clocks")
    check(own.of_best.beyond == 0, "which lies between the ramp's")
    check_close(of["slow"].own_worth.of_reference.tokens.mean, -0.1, 0.01, "a worse arm needs more")
    check(of["slow"].own_worth.of_reference.beyond == 3, "than it was ever given")
    others = [name for name, result in of.items() if result.own_worth is not None]
    check(others == ["ramp", "slow"], f"no other arm has budgets of its own: {others}")
    look = looks(e)
    check(
        look["fitted"].colour == look["fixed"].colour
        and look["fittedramp"].colour == look["ramp"].colour
        and look["const1@lr2e-3"].colour == look["const1"].colour,
        "arms keep their original's colour",
    )


def test_page(folder: Path) -> None:
    invent(
        folder,
        {
            "fixed": {},
            "same": {"batch": 16},
            "worse": {"scale": 1.2, "batch": 8},
            "better": {"scale": 0.9, "first_batch": 8},
        },
        jitter=0.01,
    )
    done = report(folder)
    check(done.returncode == 0, f"a report: {done.stderr[-500:]}")
    text = (folder / "report/index.html").read_text()
    names = re.findall(r'<figure id="(\w+)"', text)
    check(
        names == ["loss", "difference", "savings", "final", "batch", "lr", "groups", "layernorm", "phase"],
        f"every figure: {names}",
    )
    check(
        all((folder / f"report/{name}.{kind}").stat().st_size > 5000 for name in names for kind in ("png", "svg")),
        "as PNG and SVG",
    )
    check(not re.search(r"(src|href)=.?(?!.?data:)", text) and "@import" not in text, "nothing from outside the page")
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", text.split("<h2>Final loss</h2>")[1].split("</table>")[0]))
    check(
        "no difference shown (interval includes 0)" in rows["same"],
        f"an arm without effect is said to have none: {rows['same']}",
    )
    check("Against the best constant batch, that of same" in text, "the best constant is named")
    check("higher loss" in rows["worse"] and "lower loss" in rows["better"], "who loses, and who wins")
    along = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", text.split("along the run</h2>")[1].split("</table>")[0]))
    check("never reached in 3" in along["worse"] and "saves" in along["better"], f"along the run: {along}")
    check(
        bool(re.search(r"the loss was never reached: (\w+, )*worse", done.stdout)),
        "the summary names who never got there",
    )


def test_partial(folder: Path) -> None:
    """Two seeds; one run is going on, one has not begun; one arm has a single seed."""
    write_plan(folder, ["fixed", "ramp", "gns"], [1, 2])
    for seed in (1, 2):
        write_run(folder / f"fixed/seed{seed}", seed=seed)
        write_run(folder / f"ramp/seed{seed}", seed=seed, first_batch=4, scale=0.9, done=1 if seed == 1 else 0.5)
    write_run(folder / "gns/seed1", scale=0.9, config={"device": "another"})
    e = read_all([folder])
    ramp, gns = compare(e).arms
    check(
        ramp.against_reference.n == 1 and math.isnan(ramp.against_reference.low),
        "only the finished seed counts at the end",
    )
    check(ramp.along.tokens[15].n == 2 and ramp.along.tokens[-1].n == 1, "both count as far as they go")
    check(saving_verdict(gns.along.tokens[-1]) == "nothing shown (one seed, no interval)", "one seed shows nothing")
    words = " ".join(notes(e))
    check(
        all(w in words for w in ("Not started: gns/seed2", "ramp/seed2 (50%)", "devices differ: another; none")),
        f"notes: {words}",
    )
    check("Times are not comparable: the runs' devices differ" in compare(e).disturbed, "of two devices")
    write_run(folder / "mean/seed1", speed=1e4)
    write_run(folder / "gns/seed3", seed=3)
    check(
        "plan.json does not have them: gns/seed3, mean/seed1." in " ".join(notes(read_all([folder]))), "unplanned runs"
    )
    write_run(folder / "gns/seed1", seed=3)
    check_refused(lambda: read_all([folder]), "gns/seed1", "seed", "1 and 3")
    write_run(folder / "gns/seed1", config={"train-data": "/else/where/train.bin"})
    check(len(read_all([folder]).arms) == 3, "the same data may lie elsewhere")
    two = read_all([folder / "fixed/seed1", folder / "ramp/seed1"])
    check(
        [arm.name for arm in two.arms] == ["fixed/seed1", "ramp/seed1"]
        and compare(two).arms[0].against_reference.n == 1,
        "two runs",
    )


def test_best_rates(folder: Path) -> None:
    """Of each arm one rate, and of the repetitions those of that rate."""
    arms = {
        "fixed": {},
        "ramp": {"first_batch": 4, "scale": 20.0},  # diverged at its own rate
        "fixed@lr2e-3": {"scale": 0.98, "config": {"lr": 2e-3}},
        "ramp@lr2e-3": {"first_batch": 4, "scale": 1.05, "config": {"lr": 2e-3}},
        "ramp@lr5e-4": {"first_batch": 4, "scale": 0.9, "config": {"lr": 5e-4}},
        "const1": {"batch": 4},
        "fitted": {"budget": 0.8 * BUDGET, "config": {"lr": 2e-3}},
        "fitted@lr0.002": {"budget": 0.8 * BUDGET, "config": {"lr": 2e-3}},
        "fittedramp@lr5e-4": {"first_batch": 4, "scale": 0.9, "budget": 0.8 * BUDGET, "config": {"lr": 5e-4}},
        "late": {"first_batch": 8, "done": 0.5},
        "late@lr2e-3": {"first_batch": 8, "done": 0.5, "config": {"lr": 2e-3}},
    }
    swept = invent(folder, arms)
    e = at_best_rates(swept)
    chosen = {arm.name: arm.first.folder.parent.name for arm in e.arms}
    expected = {"ramp": "ramp@lr5e-4", "fixed": "fixed@lr2e-3", "const1": "const1", "fitted": "fitted"}
    check(chosen == expected | {"fittedramp": "fittedramp@lr5e-4"}, f"each at its best rate, once: {chosen}")
    results = compare(e, swept)
    check(results.best_constant is e.reference and e.reference.rate == 2e-3, "the best constant batch is among them")
    repeats = [(f.arm.name, e.original(f.arm).name) for f in results.fitted]
    check(repeats == [("fitted", "fixed"), ("fittedramp", "ramp")], f"and what repeats them: {repeats}")
    check([len(family.variants) for family in results.sweep.families] == [2, 3, 1], "all rates are in the sweep")
    axes = figures.final_figure(e, results).axes[0]
    left, right = axes.get_xlim()
    ramp = next(r.against_reference.mean for r in results.arms if r.arm.name == "ramp")
    check(left < ramp < 0 and right < 1, f"a rate that diverged leaves the best one where it was: {left} to {right}")
    figures.plt.close("all")
    done = report(folder, "--best-rates")
    check(done.returncode == 0 and not (folder / "report").exists(), f"a folder of its own: {done.stderr}")
    words = "that it was run at: fixed at 0.002, ramp at 0.0005 and const1 at 0.001 (the only one)."
    check(words in " ".join(done.stdout.split()), f"expected '{words}' in '{done.stdout}'")
    text = (folder / "report-best-rates/index.html").read_text()
    check('<figure id="sweep"' in text and '<figure id="loss"' in text and "ramp@lr2e-3" not in text, "its page")
    check("or none at the best rate of the arm that they repeat: late." in text, "which says what it leaves out")
    done = report(folder / "const1/seed1", "--best-rates")
    check(done.returncode == 2 and "--best-rates: expected finished runs" in done.stderr, f"no rates: {done.stderr}")
    unfinished = invent(folder / "b", {name: arms[name] | {"done": 0.5} for name in ("fixed", "fixed@lr2e-3")} | {
        name: arms[name] for name in ("ramp@lr2e-3", "ramp@lr5e-4")
    })  # fmt: skip
    check_raises(LogError, lambda: at_best_rates(unfinished), "expected finished runs of fixed")


def test_honest(folder: Path) -> None:
    """What the page must not hide: disturbed times, lost losses, rates that differ, other recipes."""
    arms = {
        "fixed": {},
        "fixed@lr2e-3": {"speed": 3e4, "config": {"lr": 2e-3}},
        "ramp": {"first_batch": 4, "scale": 0.9, "config": {"lr": 5e-4}},
        "short": {"budget": 0.8 * BUDGET, "config": {"weight-decay": 0.5}},
        "fitted": {"budget": 0.8 * BUDGET, "config": {"warmup": 0.08 * BUDGET}},
        "warm": {"budget": 0.8 * BUDGET, "config": {"warmup": 0.4 * BUDGET}},
    }
    for name in ("fixed", "fixed@lr2e-3"):
        arms[name] = arms[name] | {"config": arms[name].get("config", {}) | {"warmup": 0.1 * BUDGET}}
    e = invent(folder, arms)
    results = compare(e)
    check("fixed@lr2e-3/seed" in results.disturbed and "at 30K tokens" in results.disturbed, f"{results.disturbed}")
    originals = {arm.name: original.name for arm in e.arms if (original := e.original(arm))}
    check(originals == {"fitted": "fixed"}, f"only the same recipe, warm-up included, is a repetition: {originals}")
    words = dict(summary_words(e, results))
    check("ramp at 0.0005" in words["Final loss"] and "ramp at 0.0005" in words["Saved along the run"], "another rate")
    check("Times are not comparable" in words["Saved along the run"], "the summary says so")
    check("Of the device time" not in " ".join(words.values()), "and nothing of time saved")
    done = report(folder)
    text = (folder / "report/index.html").read_text()
    check(done.returncode == 0 and "<td class=text>times are not comparable</td>" in text, "nor do the tables")
    log = folder / "ramp/seed2/log.csv"
    log.write_text(with_final_loss(log.read_text(), math.nan))
    words = " ".join(notes(read_all([folder])))
    check("Finished without a validation loss that is a number: ramp/seed2." in words, f"a lost loss: {words}")
    arms = {"fixed": {}, "ramp": {"first_batch": 4, "speed": 3e4}, "all": {"speed": 5e4, "config": {"gns": "all"}}}
    e = invent(folder / "b", arms)
    check(compare(e).disturbed == "", "other batches, and other measurements, may have another speed")
    for name, done in (("fixed/seed1", 1.0), ("fixed/seed2", 0.1)):  # a slow start; a run that is at its slow start
        run = write_run(folder / "b" / name, seed=int(name[-1]), shift=0.01 * int(name[-1]), done=done)
        rows = list(csv.DictReader((run / "log.csv").open()))
        rows[0]["dt"] = "20"
        write_log(run, rows)
    check(compare(read_all([folder / "b"])).disturbed == "", "a slow start is no disturbance")


def test_noise_figures(folder: Path) -> None:
    """Groups that are measured in other steps end at the noise scale that they have there, and one wild estimate with a
    wide error does not turn the fit."""
    run = write_run(folder / "a")
    rows = list(csv.DictReader((run / "log.csv").open()))
    rng = np.random.default_rng(2)
    for i, row in enumerate(rows):
        tokens = float(row["tokens_processed"])
        for group, factor in (("ln", 1.0), ("total", 2.0)):
            noise, size = factor * (5 + 60 * tokens / BUDGET), math.exp(-6 * tokens / BUDGET)
            noise *= math.exp(0.05 * rng.standard_normal())
            measured = group == "ln" or i % 8 == 0
            row[f"gns/{group}/gtg"] = repr(size) if measured else ""
            row[f"gns/{group}/trsigma"] = repr(size * noise) if measured else ""
    wild = max(i for i in range(len(rows)) if i % 8 == 0)
    rows[wild]["gns/ln/gtg"] = repr(1e-3 * float(rows[wild]["gns/ln/gtg"]))
    write_log(run, rows)
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | {"gns-tau": 2e4}))
    e = read_all([run])
    fit = figures.layernorm_fit(e)
    check(fit is not None and 1.9 < fit.line.factor < 2.1 and fit.line.r > 0.9, f"twice the LayerNorms': {fit.line}")
    axes = figures.phase_figure(e, compare(e)).axes[0]
    ends = {line.get_label(): line.get_ydata()[-1] / line.get_xdata()[-1] for line in axes.lines}
    check(50 < ends["LayerNorm"] < 75 and 100 < ends["total"] < 150, f"noise scale at the end of each path: {ends}")
    figures.plt.close("all")


# ----------------------------------------------------------------------------------------------------------------------
# The learning-rate sweep


def invent_sweep(
    folder: Path, losses: dict[str, dict[int, float]], constant: tuple[str, ...] = ("fixed",)
) -> Experiment:
    """Runs with these final losses, by arm and seed; the rate is in the arm's name, or else 0.001."""
    write_plan(folder, list(losses), sorted({seed for of_seed in losses.values() for seed in of_seed}))
    for name, of_seed in losses.items():
        stem, _, rate = name.partition("@lr")
        batch = {"batch": 250.0} if stem in constant else {"batch": 250.0, "first_batch": 125.0}
        for seed, loss in of_seed.items():
            run = write_run(folder / name / f"seed{seed}", {"lr": float(rate or 1e-3)}, seed=seed, **batch)
            log = run / "log.csv"
            log.write_text(with_final_loss(log.read_text(), loss))
    return read_all([folder])


def with_final_loss(text: str, loss: float) -> str:
    rows = list(csv.reader(text.splitlines()))
    rows[-1][rows[0].index("val/loss")] = repr(loss)
    return "".join(",".join(row) + "\n" for row in rows)


def test_sweep(folder: Path) -> None:
    """Two seeds, values by hand: the ramp is better at the common rate, the constant batch at its own best one."""
    losses = {
        "fixed@lr0.002": {1: 1.90, 2: 1.96},
        "fixed": {1: 2.00, 2: 2.10},
        "ramp@lr5e-4": {1: 1.97, 2: 2.01},
        "ramp": {1: 1.94, 2: 2.04},
        "fixed@lr0.004": {1: 1.95, 2: 2.05},
        "ramp@lr0.002": {1: 1.96, 2: 2.06},
        "const1": {1: 1.98, 2: 2.00},
        "ramp@lr0.004": {1: 5.0, 2: 5.2},
    }
    e = invent_sweep(folder, losses, ("fixed", "const1"))
    sweep = compare(e).sweep
    of = {family.name: family for family in sweep.families}
    check(list(of) == ["fixed", "ramp", "const1"], f"a family of each arm, in the plan's order: {list(of)}")
    check([v.rate for v in of["ramp"].variants] == [5e-4, 1e-3, 2e-3, 4e-3], "its rates in order, its own among them")
    check((of["fixed"].best.rate, of["fixed"].edge) == (2e-3, ""), "the best rate of fixed lies inside")
    check((of["ramp"].best.rate, of["const1"].edge) == (5e-4, "only one"), "of a tie the lower rate; one rate")
    check(of["ramp"].edge == "lowest" and sweep.best_constant is of["fixed"], "an edge; the best constant batch")
    i = sweep.against_best(of["ramp"])  # 0.07 and 0.05: s.d. 0.01 sqrt 2, standard error 0.01
    check_close([i.mean, i.low, i.high, i.n], [0.06, 0.06 - 0.127062, 0.06 + 0.127062, 2], 1e-6, "paired by seed")
    check(sweep.against_best(of["fixed"]).n == 0, "the best constant batch is not compared with itself")
    # Lowest mean 1.93; of the best means 1.93, 1.99, 1.99 the median is 0.06 above: a tenth of 1.93 is more.
    check_close(sweep.limit, 1.93 * 1.1, 1e-9, "what is far above")
    check([sweep.far_seeds(v) for v in of["ramp"].variants] == [0, 0, 0, 2], "diverged runs are")
    check([sweep.is_far(v) for v in of["ramp"].variants] == [False, False, False, True], "and their mean")
    look = looks(e)
    check(len({look[n].colour for n in losses if n.startswith("ramp")}) == 1, "variants have their arm's colour")
    order = [arm.name for arm in e.by_stem]
    ramp = ["ramp@lr5e-4", "ramp", "ramp@lr0.002", "ramp@lr0.004"]
    check(order == ["fixed", "fixed@lr0.002", "fixed@lr0.004", *ramp, "const1"], f"together, by rate: {order}")
    check_sweep_page(folder)
    check_sweep_figures(e)


def check_sweep_page(folder: Path) -> None:
    done = report(folder)
    check(done.returncode == 0, f"a report of a sweep: {done.stderr[-500:]}")
    text = (folder / "report/index.html").read_text()
    check('<figure id="sweep"' in text and (folder / "report/sweep.png").stat().st_size > 5000, "with its figure")
    check("ramp at 0.004 (5.10)" in text, "the caption names diverged runs")
    part = text.split("own best learning rate</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", part)]
    difference = "+0.0600 [−0.0671, +0.1871]"
    nothing = "no difference shown (interval includes 0)"
    rates = "0.0005, 0.001, 0.002, 0.004"
    check(rows[1] == ["ramp", rates, "0.0005", "lowest", "1.9900", "2", difference, "2", nothing], f"row: {rows[1]}")
    check(rows[0][-1] == "the best constant batch" and rows[2][3] == "only one", f"the others: {rows[0]}, {rows[2]}")
    for words in (
        "The best constant batch is that of fixed at 0.002, with a mean loss of 1.9300.",
        f"{nothing}: ramp at 0.0005 (n = 2). No growing batch is shown to beat it.",
        "The best rate is the lowest that was run, and a better one may lie beyond: ramp at 0.0005.",
        "Run at one rate only, and so perhaps not at their best: const1.",
    ):
        check(words in done.stdout, f"expected '{words}' in '{done.stdout}'")
    check("chosen after the fact" not in done.stdout, "arms at one rate are not set against the best one of a sweep")


def check_sweep_figures(e: Experiment) -> None:
    results = compare(e)
    figure = figures.sweep_figure(e, results)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    check(names == ["0.0005", "0.001", "0.002", "0.004"], f"ticks at the rates that were run: {names}")
    check(axes.get_ylim()[1] < 2.2, "a diverged run does not flatten the others")
    arrows = [line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata()) > 0]
    check([list(line.get_xdata()) for line in arrows] == [[4e-3]], "an arrowhead at its rate")
    rings = [line.get_xdata()[0] for line in axes.lines if line.get_fillstyle() == "none"]
    check(rings == [2e-3, 5e-4], f"rings at the best rates of what was tuned: {rings}")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    check(sorted(text.get_text() for text in axes.texts) == ["const1", "fixed", "ramp"], "each line has its name")
    check(not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "names do not overlap")
    axes = figures.final_figure(e, results).axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    ramp = ["ramp@lr5e-4", "ramp at lr 0.001", "ramp@lr0.002", "ramp@lr0.004"]
    check(rows == ["fixed@lr0.002", "fixed@lr0.004", *ramp, "const1"], f"rows of the final losses: {rows}")
    check(axes.get_xlim()[1] < 1 and [t.get_text() for t in axes.texts] == ["+3.05"], "a diverged run at the edge")
    figures.plt.close("all")


def test_sweep_seeds(folder: Path) -> None:
    """One lucky seed, one seed in all, a diverged seed, a clear win, and no sweep."""
    three = {1: 2.0, 2: 2.1, 3: 1.9}

    def shifted(by: float, tilt: float = 0.0) -> dict[int, float]:
        return {seed: loss + by + tilt * (seed - 2) for seed, loss in three.items()}

    losses = {
        "fixed": three,
        "fixed@lr0.002": {1: 1.8},
        "fixed@lr0.0005": shifted(0.1),
        "ramp": shifted(-0.02),
        "ramp@lr0.002": shifted(-0.05, 0.001),
        "ramp@lr0.004": {1: 1.9, 2: 1.9, 3: 3.1},
        "gns": shifted(0.3),
        "gns@lr0.002": shifted(0.2, 0.001),
    }
    e = invent_sweep(folder / "a", losses)
    results = compare(e)
    fixed, ramp, gns = results.sweep.families
    check(fixed.best.rate == 1e-3 and fixed.edge == "", "a rate with one seed does not win")
    check([v.rate for v in fixed.promising] == [2e-3], "but is named")
    check(ramp.best.rate == 2e-3 and ramp.edge == "", "a rate with a diverged seed does not, nor is it the edge")
    i = results.sweep.against_best(ramp)  # -0.05 with s.d. 0.001 over three seeds: +- 4.3027 0.001 / sqrt 3
    check_close([i.mean, i.high, i.n], [-0.05, -0.05 + 0.0024841, 3], 1e-6, "a clear win")
    words = dict(summary_words(e, results))["At each arm's best learning rate"]
    for expected in (
        "beats the best constant batch: ramp at 0.002 −0.0500 [−0.0525, −0.0475]",
        "worse than the best constant batch: gns at 0.002 +0.2000",
        "better than the chosen rate in those they share: fixed at 0.002.",
        "the highest that was run, and a better one may lie beyond: gns at 0.002.",
    ):
        check(expected in words, f"expected '{expected}' in '{words}'")
    check("is shown to beat it" not in words, "where one arm wins, it is not said that none does")
    caption = captions(e, results)["sweep"].text
    check("ramp at 0.004 (2.30, 1 of 3 seeds)" in caption, f"one diverged seed is said so: {caption}")
    top = figures.sweep_figure(e, results).axes[0].get_ylim()[1]
    check(2.4 < top < 2.6, f"and leaves the scale to the others: {top}")
    one = invent_sweep(folder / "b", {name: {1: loss[1]} for name, loss in losses.items()})
    words = dict(summary_words(one, compare(one)))["At each arm's best learning rate"]
    check("nothing shown (one seed, no interval): ramp at 0.004, gns at 0.002 (n = 1)" in words, f"one seed: {words}")
    check(compare(one).sweep.families[0].edge == "highest", "whose best rate may be another one")
    check(figures.sweep_figure(one, compare(one)) is not None, "one seed has a figure")
    check_sweep_axis(folder / "e")
    check_few_seeds(folder / "f")
    none = invent_sweep(folder / "c", {"fixed": three, "ramp": three})
    check(compare(none).sweep is None and figures.sweep_figure(none, compare(none)) is None, "one rate each: no sweep")
    chosen = invent_sweep(
        folder / "g", {"fixed": three, "const1": {s: x - 0.01 for s, x in three.items()}, "gns@lr0.002": three}
    )
    words = dict(summary_words(chosen, compare(chosen)))["At each arm's best learning rate"]
    check(
        "Run at one rate only, and so perhaps not at their best: fixed, const1 and gns." in words, f"one each: {words}"
    )
    check("gns at 0.002" in words, f"still compared with the best constant batch: {words}")
    same = invent_sweep(folder / "h", {"fixed@lr0.002": three, "ramp@lr0.002": three})
    check(compare(same).sweep is None and report(folder / "h").returncode == 0, "all at one rate: no sweep, but a page")
    words = dict(summary_words(same, compare(same)))["Final loss"]
    check("no difference shown (interval includes 0): ramp@lr0.002" in words, f"and words: {words}")
    best = at_best_rates(chosen)
    check([arm.name for arm in best.arms] == ["fixed", "const1", "gns"], "each is its own best")
    growing = invent_sweep(folder / "d", {"ramp@lr0.002": three, "ramp@lr0.004": three}, ())
    sweep = compare(growing).sweep
    check(
        sweep.best_constant is None and sweep.families[0].best.rate == 2e-3, "no constant batch, its own rate not run"
    )
    words = dict(summary_words(growing, compare(growing)))["At each arm's best learning rate"]
    check(words.startswith("No constant batch has finished."), f"and says so: {words}")
    figures.plt.close("all")


def check_sweep_axis(folder: Path) -> None:
    """A seed above the axis of a mean within it; a mean in the arrowheads' room; an outlying seed of the final losses."""
    losses = {
        "fixed": {1: 2.0, 2: 2.02, 3: 1.98, 4: 2.0, 5: 2.0},
        "fixed@lr0.002": {1: 2.19, 2: 2.19, 3: 2.19, 4: 2.19, 5: 2.215},
        "fixed@lr0.004": {1: 2.21, 2: 2.21, 3: 2.21, 4: 2.21, 5: 2.21},
        "ramp": {1: 2.01, 2: 2.0, 3: 1.99, 4: 2.0, 5: 2.0},
        "ramp@lr0.002": {1: 2.0, 2: 2.02, 3: 1.98, 4: 2.0, 5: 1.9},
        "gns": {1: 2.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.9},
        "ramp@lr0.004": {1: 9.0, 2: 9.0, 3: 9.0, 4: 9.0, 5: 9.0},
    }
    e = invent_sweep(folder, losses)
    results = compare(e)
    far = [v.arm.name for f in results.sweep.families for v in f.variants if results.sweep.is_far(v)]
    check(far == ["ramp@lr0.004"], f"only what cannot be drawn is an arrowhead: {far}")
    axes = figures.sweep_figure(e, results).axes[0]
    arrow = next(line.get_ydata()[0] for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata()) > 0)
    check(2.21 < arrow < axes.get_ylim()[1], f"which stands above all means: {arrow}")
    caption = captions(e, results)["sweep"].text
    check("means above the axis: ramp at 0.004 (9.00)." in caption, f"so says the caption: {caption}")
    axes = figures.final_figure(e, results).axes[0]
    left, right = axes.get_xlim()
    seeds = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == "|"])
    edges = [line for line in axes.lines if line.get_marker() in "<>" and line.get_marker()]
    outside = int(np.sum((seeds < left) | (seeds > right)))
    check(
        len(seeds) == 25 and outside == 1 and len(edges) == outside + 1,
        f"seeds outside {left:.2f}..{right:.2f}: {outside}, {len(edges)}",
    )
    figures.plt.close("all")


def check_few_seeds(folder: Path) -> None:
    """The best constant batch is the same everywhere on the page, and a better one with fewer seeds is named."""
    losses = {
        "fixed": {1: 2.0, 2: 2.1, 3: 1.9},
        "fixed@lr0.002": {1: 2.2, 2: 2.3, 3: 2.1},
        "const1": {1: 1.7, 2: 1.8},
        "ramp": {1: 1.99, 2: 2.09, 3: 1.89},
        "ramp@lr0.002": {1: 2.2, 2: 2.3, 3: 2.1},
    }
    e = invent_sweep(folder, losses, ("fixed", "const1"))
    results = compare(e)
    check(results.best_constant.name == results.sweep.best_constant.best.arm.name == "fixed", "one best constant batch")
    words = dict(summary_words(e, results))["At each arm's best learning rate"]
    check("is not settled: const1 at 0.001." in words, f"a better one with fewer seeds is named: {words}")


def test_rate_axis() -> None:
    """Plain names; upright where they would touch; where even those would, some are left out."""
    check([rate_name(x) for x in (6e-5, 0.0113, 1.0, 0.0028)] == ["0.00006", "0.0113", "1", "0.0028"], "plain rates")
    for rates, upright, named in (
        ([1e-3, 2e-3], False, 2),
        ([1e-3, 1.05e-3, 2e-3], True, 3),
        ([1e-3, 1.01e-3, 4e-3], True, 2),
    ):
        figure, axes = figures.plt.subplots(figsize=(7, 4))
        axes.set_xlim(rates[0] / 1.1, rates[-1] * 1.1)
        check(rate_axis(axes, rates) == upright, f"ticks at {rates} are {'' if upright else 'not '}upright")
        names = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
        check(len(names) == named, f"names of {rates}: {names}")
    figures.plt.close("all")


def test_words() -> None:
    check(
        [duration(s) for s in (math.nan, 1.5, 200, 3720, 183600)] == ["–", "1.5 s", "3 m 20 s", "1 h 02 m", "2 d 03 h"],
        "durations",
    )
    check(share(Interval(0.1234, -0.01, 0.2, 3)) == "12.3% [−1.0, 20.0]", "shares with their interval")
    places = spread(np.array([0.34, 0.35, 0.36, 0.9]), np.full(4, 0.1))
    check_close(places, [0.25, 0.35, 0.45, 0.9], 1e-6, "labels that would touch share their middle")


def test_command(folder: Path, trainer: Path) -> None:
    """The page's command trains the same run again."""
    tokens = np.random.default_rng(0).integers(0, 40, 20000).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, len(tokens), 40
    (folder / "x.bin").write_bytes(header.tobytes() + tokens.tobytes())
    common = ["-e", "L=1,H=2,C=16,T=16", "-i", folder / "x.bin", "-b", "8"]
    cases = {
        "plain": ["-k", "linear", "-q", "0", "--seed", "0", "--grad-clip", "0", "-u", "100steps"],
        "loop": [
            "-j",
            folder / "x.bin",
            "-v",
            "5K",
            "--val-tokens",
            "2K",
            "--batch-schedule",
            "gns",
            "--gns-tau",
            "1K",
            "-d",
            "512",
            "--gns-all-every",
            "4",
            "-u",
            "2K",
            "-k",
            "cosine",
            "-q",
            "0.1",
            "--gns-freeze",
            "0.5",
            "--batch-may-fall",
            "--beta2-half-life",
            "10K",
            "-n",
            "10K",
        ],
    }
    cases["steps"] = ["-x", "20", "-j", folder / "x.bin", "-v", "5", "--val-batches", "2"]
    cases["per parameter"] = ["--tokens-per-param", "0.7", "--beta2-half-life", "3K", "-d", "256"]
    for name, options in cases.items():
        budget = [] if name in ("steps", "per parameter") else ["--max-tokens", "20K"]
        first, again = folder / name, folder / f"{name} again"
        subprocess.run([trainer, *common, *budget, *options, "-o", first], check=True, capture_output=True)
        words = shlex.split(command(read_run(first)))[1:]
        words[words.index("--out") + 1] = str(again)
        done = subprocess.run([trainer, *words], capture_output=True, text=True)
        check(done.returncode == 0, f"the command of '{name}' runs: {done.stderr[-300:]}")
        if done.returncode == 0:
            a, b = read_run(first), read_run(again)
            check(a.config | {"out": ""} == b.config | {"out": ""}, f"'{name}' has the same settings again")
            same = [np.array_equal(a.column(c), b.column(c), equal_nan=True) for c in a.log.columns if c != "dt"]
            check(all(same), f"'{name}' gives the same numbers again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", type=Path, default=HERE.parent / "train_gpt")
    parser.add_argument(
        "--example", type=Path, metavar="FOLDER", help="write an invented experiment there, and test nothing"
    )
    args = parser.parse_args()
    if args.example:
        write_example(args.example)
        return 0
    for test in (
        test_t,
        test_first_reached,
        test_known_savings,
        test_intervals_cover,
        test_worth,
        test_words,
        test_rate_axis,
    ):
        test()
    in_folder = (test_reading, test_running, test_damaged, test_experiment, test_page, test_partial)
    for test in (*in_folder, test_best_rates, test_honest, test_noise_figures, test_sweep, test_sweep_seeds):
        with tempfile.TemporaryDirectory() as folder:
            test(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        test_command(Path(folder), args.trainer.resolve())
    return summary()


if __name__ == "__main__":
    sys.exit(main())
