"""Runs and experiments, as trainers leave them in folders.

A run is a folder with log.csv (and config.json); it may still be going on: a last row that is half written is left out,
columns may be missing, and there may be no evaluation yet. Its seconds are device time: the sum of dt, which leaves out
evaluations and checkpoints; where --log-every thinned the log, a row stands for the steps since the one before.

An experiment is a folder with plan.json and the runs <arm>/seed<k>/; of the plan, only the list `arms` (name, title)
and the list `seeds` are read here, everything else from the runs themselves. Several runs given one by one make an
experiment too, each an arm of its own. The reference, which the others are compared with, is the arm `fixed`, or else
the first.

Two arms are compared seed by seed: such a pair started from the same weights and saw the same data in the same order.
That is checked (PAIRED, in config.json); an experiment in which it does not hold is refused.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from gnslog import GROUPS, Array, Log, LogError, check_tokens, parse_column, read_fields

from .savings import Curve

COLUMNS = ("step", "train/lossf", "val/loss", "dt", "lr", "tokens_processed", "batch", "skipped") + tuple(
    f"gns/{group}{part}" for group in GROUPS for part in ("", "/se", "/gtg", "/trsigma")
)

# What two runs of a pair have in common: initial weights, data and its order, and what the loss is measured on.
PAIRED = ("seed", "model-shape", "init", "init-from", "seq-len", "train-data", "val-data", "val-tokens")
LEARNING_RATE = r"@lr(\d*\.?\d+(?:e-?\d+)?)"  # in the name of an arm
FILES = ("train-data", "val-data", "init-from")  # compared by name: the same file lies elsewhere on another machine

# What a run has in common with its repetition on another budget; the warm-up is the same share of it.
RECIPE = (
    *("batch-tokens", "batch-schedule", "batch-quantum", "batch-min", "batch-max", "batch-may-fall"),
    *("gns-scale", "gns-power", "gns-calibration", "gns-freeze", "lr", "lr-schedule", "final-lr-frac", "lr-coupling"),
    *("weight-decay", "wd-coupling", "beta1", "beta2", "beta2-half-life", "eps", "grad-clip"),
)


@dataclass(frozen=True)
class Run:
    folder: Path
    log: Log
    config: dict[str, object]

    def column(self, name: str) -> Array:
        """(rows); NaN where the log has no such column."""
        return self.log.columns.get(name, np.full(len(self.log.tokens), math.nan))

    @property
    def tokens(self) -> Array:
        return self.log.tokens

    @cached_property
    def steps_of_row(self) -> Array:
        """(rows) 1, or the steps since the row before where the log was thinned."""
        if "step" not in self.log.columns:
            return np.ones(len(self.tokens))
        return np.diff(self.log.columns["step"], prepend=-1.0)

    @property
    def steps(self) -> int:
        return int(self.steps_of_row.sum())

    @cached_property
    def seconds(self) -> Array:
        """(rows) Device time up to the row."""
        return np.cumsum(self.column("dt") * self.steps_of_row)

    @property
    def mean_batch(self) -> float:
        return float(np.average(self.column("batch"), weights=self.steps_of_row))

    @cached_property
    def curve(self) -> Curve:
        at = np.isfinite(self.column("val/loss"))
        return Curve(self.tokens[at], self.seconds[at], self.column("val/loss")[at])

    @cached_property
    def budget(self) -> float:
        """Tokens at which the run ends; NaN if config.json does not say."""
        tokens, per_parameter, steps = (self.number(key) for key in ("max-tokens", "tokens-per-param", "max-steps"))
        if tokens > 0:
            return tokens
        return (
            per_parameter * self.number("parameters")
            if per_parameter > 0
            else (steps or math.nan) * self.number("batch-tokens")
        )

    def number(self, key: str) -> float:
        value = self.config.get(key)
        return float(value) if isinstance(value, (int, float)) else math.nan

    @property
    def finished(self) -> bool:
        return bool(self.tokens[-1] >= self.budget)

    @property
    def final_loss(self) -> float:
        """Of the last evaluation; NaN unless the run is finished and was evaluated at its end."""
        return float(self.column("val/loss")[-1]) if self.finished else math.nan

    @property
    def is_constant(self) -> bool:
        return self.config.get("batch-schedule") == "fixed"


def read_run(folder: Path) -> Run:
    path = folder / "log.csv"
    header, rows = read_fields(path)
    wanted = [(i, name) for i, name in enumerate(header) if name in COLUMNS]
    log = Log(path, {name: parse_column(path, name, [row[i] for row in rows]) for i, name in wanted}, [], False)
    check_tokens(log)
    config = folder / "config.json"
    return Run(folder, log, read_json(config) if config.exists() else {})


def read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LogError(f"cannot read '{path}': {error.strerror}") from None
    except ValueError as error:
        raise LogError(f"'{path}': expected JSON, found text that is none ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise LogError(f"'{path}': expected a JSON object, found {type(value).__name__}; copy the file again")
    return value


def has_rows(folder: Path) -> bool:
    """Whether the run has done a step that is in its log."""
    try:
        with (folder / "log.csv").open("rb") as file:
            lines = list(islice(file, 2))
    except OSError:
        return False
    return len(lines) == 2 and lines[1].endswith(b"\n")


# ----------------------------------------------------------------------------------------------------------------------
# Experiments


@dataclass(frozen=True)
class Arm:
    name: str
    title: str
    runs: dict[int, Run]  # by seed; those that have begun

    @property
    def first(self) -> Run:
        """The run of the first seed that has begun."""
        return self.runs[min(self.runs)]

    @property
    def is_sweep(self) -> bool:
        """One of a sweep over learning rates: <arm>@lr<x>."""
        return "@" in self.name

    @property
    def stem(self) -> str:
        """The name without its learning rate: that of the arm whose variant this is."""
        return re.sub(LEARNING_RATE, "", self.name)

    @cached_property
    def rate(self) -> float:
        """The peak learning rate, to six digits; NaN if neither config.json nor the name says it."""
        named = re.search(LEARNING_RATE, self.name)
        rates = [rate for run in self.runs.values() if math.isfinite(rate := run.number("lr"))]
        return float(f"{rates[0] if rates else float(named[1]) if named else math.nan:.6g}")

    def finished(self) -> dict[int, Run]:
        return {seed: run for seed, run in self.runs.items() if math.isfinite(run.final_loss)}


@dataclass(frozen=True)
class Experiment:
    name: str
    folder: Path  # where its report goes
    arms: list[Arm]  # in the plan's order; those that have begun
    seeds: list[int]  # as planned
    missing: list[str]  # runs that have not begun
    unknown: list[str]  # runs in the folder that the plan does not have
    has_best_rates: bool = False  # of each arm, only its best learning rate: at_best_rates() in sweep.py
    left_out: list[str] = field(default_factory=list)  # arms that have none

    @cached_property
    def reference(self) -> Arm:
        return self.arm("fixed") or self.arms[0]

    @property
    def others(self) -> list[Arm]:
        return [arm for arm in self.arms if arm is not self.reference]

    @property
    def is_single(self) -> bool:
        return len(self.arms) == 1 and len(self.reference.runs) == 1 and not self.has_best_rates

    @cached_property
    def by_stem(self) -> list[Arm]:
        """In the plan's order, but the variants of an arm together, by learning rate (unknown ones last)."""
        stems = list(dict.fromkeys(arm.stem for arm in self.arms))
        return sorted(self.arms, key=lambda arm: (stems.index(arm.stem), math.isnan(arm.rate), arm.rate, arm.name))

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs.values()]

    def has_full_budget(self, arm: Arm) -> bool:
        """Whether the arm's runs are as long as the reference's (or do not say how long they are)."""
        budget, full = arm.first.budget, self.reference.first.budget
        return math.isnan(budget) or math.isnan(full) or math.isclose(budget, full, rel_tol=1e-3)

    def original(self, arm: Arm) -> Arm | None:
        """The arm that this one repeats with a schedule fitted to another budget; None if it is no such repetition."""
        candidates = [] if self.has_full_budget(arm) else [a for a in self.arms if self.has_full_budget(a)]
        return next((a for a in candidates if same_recipe(a.first, arm.first)), None)


def same_recipe(a: Run, b: Run) -> bool:
    x, y = (run.number("warmup") / run.budget for run in (a, b))
    same_warmup = math.isclose(x, y, rel_tol=0.01, abs_tol=1e-4) or (math.isnan(x) and math.isnan(y))
    return same_warmup and all(a.config.get(key) == b.config.get(key) for key in RECIPE)


def read_experiment(folder: Path) -> Experiment:
    plan = read_json(folder / "plan.json")
    names, seeds = plan_arms(folder, plan), plan_seeds(folder, plan)
    arms, missing = [], []
    for name, title in names:
        folders = {seed: folder / name / f"seed{seed}" for seed in seeds}
        runs = {seed: read_run(at) for seed, at in folders.items() if has_rows(at)}
        missing += [f"{name}/seed{seed}" for seed in seeds if seed not in runs]
        if runs:
            arms.append(Arm(name, title, runs))
    if not arms:
        raise LogError(
            f"'{folder}': expected runs in <arm>/seed<k>/log.csv for the arms of plan.json, found none with a "
            "step; start the experiment first"
        )
    planned = {f"{name}/seed{seed}" for name, _ in names for seed in seeds}
    found = [f"{path.parts[-3]}/{path.parts[-2]}" for path in sorted(folder.glob("*/seed*/log.csv"))]
    unknown = [name for name in found if name not in planned]
    experiment = Experiment(folder.resolve().name, folder / "report", arms, seeds, missing, unknown)
    check_pairs(experiment)
    return experiment


def plan_arms(folder: Path, plan: dict[str, object]) -> list[tuple[str, str]]:
    """(name, title) of each."""
    arms = plan.get("arms")
    if not (
        isinstance(arms, list) and arms and all(isinstance(a, dict) and isinstance(a.get("name"), str) for a in arms)
    ):
        raise LogError(
            f'\'{folder}/plan.json\': expected "arms": a list of objects with a "name", found '
            f"{json.dumps(arms)[:60]}; let scripts/chinchilla.py write it"
        )
    return [(arm["name"], str(arm.get("title", arm["name"]))) for arm in arms]


def plan_seeds(folder: Path, plan: dict[str, object]) -> list[int]:
    seeds = plan.get("seeds")
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
        raise LogError(
            f"'{folder}/plan.json': expected \"seeds\": a list of whole numbers, found {json.dumps(seeds)[:60]}; "
            "let scripts/chinchilla.py write it"
        )
    return seeds


def experiment_of_runs(folders: Sequence[Path]) -> Experiment:
    """Of runs given one by one."""
    names = short_names(folders)
    arms = [Arm(name, name, {1: read_run(folder)}) for name, folder in zip(names, folders)]
    experiment = Experiment(" and ".join(names), folders[0] / "report", arms, [1], [], [])
    check_pairs(experiment)
    return experiment


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many folders above them as it takes to tell them apart; printable, for pictures."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise LogError(f"expected each run once, found '{max(folders, key=folders.count)}' twice; leave one out")
    depth = next(d for d in range(1, 100) if len({p[-d:] for p in parts}) == len(parts))
    return [printable("/".join(p[-depth:])) for p in parts]


def printable(text: str) -> str:
    """With \\udcff for a byte ff that is not UTF-8, as in a file's name: two names stay two."""
    return text.encode(errors="backslashreplace").decode()


def check_pairs(experiment: Experiment) -> None:
    """Refuses an experiment in which arms of one seed are no pair."""
    for arm in experiment.others:
        for seed in sorted(arm.runs.keys() & experiment.reference.runs.keys()):
            a, b = experiment.reference.runs[seed], arm.runs[seed]
            for key in PAIRED:
                x, y = (Path(str(run.config.get(key))).name if key in FILES else run.config.get(key) for run in (a, b))
                if a.config and b.config and x != y:
                    raise LogError(
                        f"'{a.folder}' and '{b.folder}' cannot be compared: expected the same {key} in "
                        f"their config.json, found {x} and {y}; report on them one by one"
                    )


def read_all(paths: Sequence[Path]) -> Experiment:
    """One experiment's folder, or the folders of one run or several."""
    if len(paths) == 1 and (paths[0] / "plan.json").exists():
        return read_experiment(paths[0])
    for path in paths:
        if (path / "plan.json").exists():
            raise LogError(f"'{path}' is a whole experiment: expected it alone; report on it without the other folders")
        if not (path / "log.csv").exists():
            raise LogError(
                f"'{path}': expected a run's log.csv or an experiment's plan.json in it, found neither; give "
                "the folder that was the trainer's -o"
            )
    return experiment_of_runs(paths)
