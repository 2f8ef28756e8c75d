"""What scripts/chinchilla.py is going to train: sizes, arms, data, and the plan.json that holds them.

An arm is a name, a title and the trainer's options; the docstring of chinchilla.py says what each is there for. A plan
knows all arms and seeds that were ever asked for in its folder, so arms and seeds may be added, but nothing may change
that an arm has already been trained with: another recipe or other data is another experiment.
"""

import argparse
import glob
import json
import math
import os
import re
import shlex
import struct
import subprocess
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
TOKENS_PER_PARAMETER = 20
WARMUP = 374_784_000 / 2_219_950_080  # the paper's, as a share of the budget
TOKEN_FILE_MAGIC, GPT2_VOCAB, BYTE_VOCAB = 20240520, 50257, 257
HALF_LIFE = math.log(2) / -math.log(0.95)  # in steps, of a second moment with beta2 = 0.95
SCHEDULE = "schedule.csv"  # in the folder of a replay
SWEEP = "0.5,0.7,1.4,2"
OURS = {"seed", "out", "resume"}
MACHINE_OPTIONS = {"train-data", "val-data", "micro-batch"}  # may differ between machines in one experiment


class Mistake(Exception):
    """What is wrong with a command or a file, in one line: what was expected, what was found, what to do."""


def parse_count(text: str, option: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.replace("_", ""))
    value = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else 0
    if value < 1:
        raise Mistake(f"{option} '{text}': expected a number of 1 or more, such as 500000, 500K or 2B")
    return round(value)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class Size:
    model: str  # a name, or a shape without its vocabulary
    layers: int
    channels: int
    seq_len: int
    vocab: int | None  # None: that of the data
    model_options: dict[str, str]
    budget: int | None  # tokens; None: 20 per parameter
    lr: float
    batch: int  # sequences: B
    start: int  # A
    constants: tuple[int, int, int, int]
    quantum: int
    micro_batch: int
    val_tokens: int
    val_tokens_needed: int  # that the data must have; of fewer than val_tokens all are evaluated
    evaluations: int  # about
    checkpoints: int  # in a run, about
    log_tensors: str
    arms: str  # by default, as the seeds
    seeds: str
    speed: float  # tokens a second, for the time that --dry-run shows
    machine: str  # that has it

    def parameters(self, vocab: int) -> int:
        """Tied embedding, positions, blocks (matrices of 12 C^2, biases and LayerNorms of 13 C), final LayerNorm."""
        c = self.channels
        return (vocab + self.seq_len) * c + self.layers * (12 * c * c + 13 * c) + 2 * c


SIZES = {
    "tiny": Size(
        model="L=2,H=2,C=64,T=64", layers=2, channels=64, seq_len=64, vocab=None, model_options={}, budget=None,
        lr=6e-3, batch=32, start=4, constants=(4, 8, 20, 64), quantum=1, micro_batch=16, val_tokens=65_536,
        val_tokens_needed=64, evaluations=20, checkpoints=10, log_tensors="off", arms="fixed,ramp,gns", seeds="1-2",
        speed=60e3, machine="two CPU cores",
    ),
    "small": Size(
        model="L=6,H=6,C=384,T=512", layers=6, channels=384, seq_len=512, vocab=None, model_options={}, budget=None,
        lr=4e-3, batch=128, start=16, constants=(16, 32, 96, 256), quantum=1, micro_batch=128, val_tokens=524_288,
        val_tokens_needed=524_288, evaluations=50, checkpoints=4, log_tensors="off", arms="all", seeds="1-5",
        speed=3.7e6, machine="one H200",
    ),
    "111m": Size(
        model="cgpt:111m", layers=10, channels=768, seq_len=2048, vocab=50304,
        model_options={"cosine-attention": "1"}, budget=2_219_950_080, lr=1.17e-3, batch=120, start=16,
        constants=(16, 32, 80, 240), quantum=8, micro_batch=8, val_tokens=524_288, val_tokens_needed=524_288,
        evaluations=100, checkpoints=20, log_tensors="ln", arms="fixed,ramp,gns", seeds="1-3", speed=595e3,
        machine="one H200",
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Arms


@dataclass(frozen=True)
class Arm:
    name: str
    title: str
    base: str  # the arm of built_in_arms() that this is, or is a variant of
    budget: int | None  # tokens; None: a fitted arm's, as long as it is not known
    steps: list[int]  # the fewest and the most that it may take; none as long as they depend on other runs
    options: dict[str, str]  # of the trainer: all but --seed and --out; {run} in a value stands for the run's folder

    @property
    def is_fitted(self) -> bool:
        return self.base.startswith("fitted")

    @property
    def is_replay(self) -> bool:
        return self.base == "replay"

    @property
    def at_rate(self) -> str:
        """@lr<x>, or nothing: which of an arm's variants this is."""
        return "".join(self.name.partition("@")[1:])


def budget_options(budget: int) -> dict[str, str]:
    """All that a fitted budget changes; batch and decay follow from the budget by themselves."""
    return {"max-tokens": str(budget), "warmup": f"{round(WARMUP * budget)}tokens"}


def common_options(size: Size, vocab: int, budget: int, micro_batch: int, data: tuple[str, str]) -> dict[str, str]:
    batch_tokens = size.batch * size.seq_len
    val_every = max(1, round(budget / batch_tokens / size.evaluations)) * batch_tokens
    return {
        "train-data": data[0],
        "val-data": data[1],
        "model": size.model if size.vocab else f"{size.model},V={vocab}",
        **size.model_options,
        "seq-len": str(size.seq_len),
        "micro-batch": str(micro_batch),
        "batch-tokens": str(batch_tokens),
        "batch-quantum": str(size.quantum),
        **budget_options(budget),
        "lr": f"{size.lr:g}",
        "lr-schedule": "linear",
        "final-lr-frac": "0.1",
        "weight-decay": "0.1",
        "beta1": "0.9",
        "beta2": "0.95",
        "grad-clip": "1",
        "gns": "ln",
        "gns-all-every": "16",
        "val-every": f"{val_every}tokens",
        "val-tokens": str(size.val_tokens),
        "log-tensors": size.log_tensors,
        "checkpoint-every": f"{math.ceil(budget / size.checkpoints)}tokens",
        "keep": "1",
    }


def built_in_arms(size: Size, mean: int) -> dict[str, tuple[str, dict[str, str]]]:
    """Of each arm its title and what it changes in the common options; an empty value takes an option away."""

    def constant(batch: int) -> dict[str, str]:
        return fixed | {"batch-tokens": str(batch * size.seq_len)}

    def linear(first: int, last: int) -> dict[str, str]:
        return {"batch-schedule": f"linear:{first}:{last}"}

    def loop(least: int, most: int) -> dict[str, str]:
        return {"batch-schedule": "gns", "batch-min": str(least), "batch-max": str(most)}

    low, high = size.start, size.batch
    fixed, ramp, wide = {"batch-schedule": "fixed"}, linear(low, high), linear(2 * low, 2 * high)
    tuned = loop(2 * low, 2 * high) | {"gns-calibration": "measured", "gns-scale": "3"}
    half_life = {"beta2": "", "beta2-half-life": str(round(HALF_LIFE * high * size.seq_len))}
    no_budget = {"max-tokens": "", "warmup": ""}
    constants = {f"const{i}": (f"constant batch of {n}", constant(n)) for i, n in enumerate(size.constants, 1)}
    return {
        "fixed": (f"fixed batch of {high}", fixed),
        "ramp": (f"linear ramp from {low} to {high}", ramp),
        "gns": ("closed loop on the noise scale", loop(low, high)),
        "mean": (f"constant batch of {mean}, the ramp's mean", constant(mean)),
        **constants,
        "fall": (f"falling ramp from {high} to {low}", linear(high, low)),
        "replay": ("the closed loop's batches of another seed", {"batch-schedule": f"file:{{run}}/{SCHEDULE}"}),
        "sqrtlr": ("ramp, lr ~ sqrt(batch)", ramp | {"lr-coupling": "0.5"}),
        "halflife": ("ramp, beta2 by half-life in tokens", ramp | half_life),
        "wide": (f"ramp from {2 * low} to {2 * high}, beta2 by half-life in tokens", wide | half_life),
        "tuned": (
            f"closed loop at 3 times the noise scale, {2 * low} to {2 * high}, beta2 by half-life in tokens",
            tuned | half_life,
        ),
        "fitted": ("fixed batch, budget fitted to the saving", fixed | no_budget),
        "fittedramp": ("linear ramp, budget fitted to the saving", ramp | no_budget),
    }


@dataclass(frozen=True)
class ArmTable:
    """What arms are made from."""

    built_in: dict[str, tuple[str, dict[str, str]]]
    own: dict[str, str]  # by name: a built-in arm and more options
    common: dict[str, str]
    trainer: Path

    def make(self, name: str) -> Arm:
        """The arm of this name: built-in, one's own, or either at another learning rate."""
        arm = self.without_steps(name)
        unknown = arm.budget is None or arm.is_replay
        return arm if unknown else replace(arm, steps=count_steps(self.trainer, arm.options))

    def without_steps(self, name: str) -> Arm:
        stem, at, lr = name.partition("@lr")
        try:
            base, *extra = shlex.split(self.own.get(stem, stem)) or [""]
        except ValueError as error:
            raise Mistake(f"--arm '{stem}={self.own[stem]}': {error}; close what is quoted") from None
        lr_is_number = re.fullmatch(r"\d*\.?\d+(e-?\d+)?", lr) is not None
        if base not in self.built_in or not re.fullmatch(r"[\w-]+", stem) or lr_is_number != bool(at):
            raise Mistake(
                f"the arm '{name}' is unknown: expected all, {', '.join(self.built_in)}, any of them with "
                "@lr<x>, or --arm 'NAME=ARM OPTIONS'"
            )
        if len(extra) % 2 or not all(word.startswith("--") for word in extra[::2]):
            raise Mistake(f"--arm '{stem}={self.own[stem]}': expected NAME=ARM and options, each --name with its value")
        if ours := [word for word in extra[::2] if word.removeprefix("--") in OURS]:
            raise Mistake(
                f"--arm '{stem}={self.own[stem]}': {ours[0]} is set for each run by this program; leave it out"
            )
        title, changes = self.built_in[base]
        more = {word.removeprefix("--"): value for word, value in zip(extra[::2], extra[1::2], strict=True)}
        own = [f"{option} {value}" if value else f"no {option}" for option, value in more.items()]
        titles = [f"{base} with {', '.join(own)}" if own else title, *([f"lr {lr}"] if at else [])]
        if "max-tokens" in more and (base == "replay" or not more["max-tokens"]):
            why = "a replay has the budget of what it replays" if base == "replay" else "an arm needs a budget"
            raise Mistake(f"--arm '{stem}={self.own[stem]}': {why}; leave --max-tokens out")
        fitted = budget_options(parse_count(more["max-tokens"], "--max-tokens")) if "max-tokens" in more else {}
        merged = self.common | changes | fitted | more | ({"lr": lr} if at else {})
        options = {option: value for option, value in merged.items() if value}
        budget = parse_count(options["max-tokens"], "--max-tokens") if "max-tokens" in options else None
        return Arm(name, ", ".join(titles), base, budget, [], options)


def fit_arm(arm: Arm, budget: int, trainer: Path) -> Arm:
    options = arm.options | budget_options(budget)
    return replace(arm, budget=budget, options=options, steps=count_steps(trainer, options))


# ----------------------------------------------------------------------------------------------------------------------
# The trainer


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def to_arguments(options: dict[str, str], folder: Path) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value.replace("{run}", str(folder)))]


def count_steps(trainer: Path, options: dict[str, str]) -> list[int]:
    """The fewest and the most steps, by the trainer's own --dry-run; they differ in a closed loop."""
    command = [str(trainer), *to_arguments(options, Path(".")), "--out", ".", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Mistake(f"'{shlex.join(command)}' was refused: {last_line(done.stderr)}")
    text = done.stdout.replace(",", "")
    known = re.search(r"^(\d+) steps \d+ tokens mean batch", text, re.MULTILINE)
    found = known or re.search(r"takes (\d+) to (\d+) steps", text)
    if found is None:
        raise Mistake(f"'{shlex.join(command)}' was expected to print a number of steps; is --trainer this project's?")
    counts = [int(n) for n in found.groups()]
    return [counts[0], counts[-1]]


def find_trainer(path: Path | None) -> Path:
    """This one; or the CUDA trainer where it is built and there is a GPU, else the CPU trainer."""
    trainer = path or ROOT / "train_gpt"
    if path is None and (ROOT / "train_gptcu").is_file():
        try:
            gpu = subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            gpu = False
        trainer = ROOT / "train_gptcu" if gpu else trainer
    if not (trainer.is_file() and os.access(trainer, os.X_OK)):
        raise Mistake(f"the trainer '{trainer}' is not there; make train_gpt (or train_gptcu), or give --trainer PATH")
    return trainer.resolve()


# ----------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Data:
    train_tokens: int
    val_tokens: int
    vocab: int
    crc32: int  # of the beginning of every file: the same data under other names, on another machine, is the same


def read_data(train: str, val: str) -> Data:
    """What the token files that match two patterns say of themselves."""
    counts, vocab, crc = [], 0, 0
    for pattern in (train, val):
        names = sorted(glob.glob(pattern))
        if not names:
            raise Mistake(f"no token file matches '{pattern}'; data/README.md says how to make or get one")
        counts.append(0)
        for name in names:
            with open(name, "rb") as file:
                start = file.read(1 << 16)
            magic, _, count, size = struct.unpack("<4I", start[:16]) if len(start) >= 1024 else (0, 0, 0, 0)
            if magic != TOKEN_FILE_MAGIC:
                raise Mistake(f"'{name}' is not a token file; data/README.md says how to make or get one")
            counts[-1] += count
            vocab = max(vocab, size or GPT2_VOCAB)
            crc = zlib.crc32(start, crc)
    return Data(counts[0], counts[1], vocab, crc)


def built_in_data(out: Path) -> tuple[str, str]:
    """The token files of size tiny, made once: this project's text may change, an experiment's may not."""
    train, val = out / "data/own_train.bin", out / "data/own_val.bin"
    if not (train.is_file() and val.is_file()):
        if not (ROOT / "build/text_to_tokens").is_file():
            raise Mistake("the built-in data is made by build/text_to_tokens, which is not there; make it")
        command = [ROOT / "scripts/own_text.sh", out.resolve() / "data/own"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise Mistake(f"scripts/own_text.sh could not make the built-in data: {last_line(made.stderr)}")
    return str(train), str(val)


def find_data(args: argparse.Namespace, size: Size, known: Data | None) -> tuple[tuple[str, str], Data]:
    """The token files and what they hold. A dry run needs none: it takes what is known from a plan, or bytes."""
    if args.data is None and args.dry_run:
        return ("TRAIN", "VAL"), known or Data(0, 0, size.vocab or BYTE_VOCAB, 0)
    if args.data is None and args.size != "tiny":
        raise Mistake(
            f"{args.size} needs --data 'TRAIN*.bin' VAL.bin, token files; data/README.md says how to make them"
        )
    names = (args.data[0], args.data[1]) if args.data else built_in_data(args.out)
    data = read_data(*names)
    if data.val_tokens <= size.val_tokens_needed:
        raise Mistake(
            f"'{names[1]}' has {data.val_tokens:,} tokens, but more than {size.val_tokens_needed:,} are needed to "
            "evaluate on; give more validation data"
        )
    return names, data


# ----------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Plan:
    schema: int
    size: str
    model: str
    parameters: int
    seq_len: int
    batch: int  # sequences
    quantum: int
    budget: int  # tokens
    data: Data
    trainer: str
    seeds: list[int]
    arms: list[Arm]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def other_seed(self, seed: int) -> int:
        """Whose closed loop is replayed with this seed."""
        return self.seeds[(self.seeds.index(seed) + 1) % len(self.seeds)]

    def with_arm(self, arm: Arm) -> "Plan":
        return replace(self, arms=[arm if a.name == arm.name else a for a in self.arms])

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(path)


def load_plan(path: Path) -> Plan | None:
    """The plan in this file; None if there is no file."""
    try:
        content = json.loads(path.read_text())
        content["data"] = Data(**content["data"])
        content["arms"] = [Arm(**arm) for arm in content["arms"]]
        return Plan(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise Mistake(f"'{path}' is not a plan that this program wrote ({error!r}); choose another --out") from None


def parse_numbers(text: str, option: str) -> list[int]:
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise Mistake(f"{option} '{text}': expected numbers and ranges, such as 1-5 or 1,3")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(numbers)


def arm_names(args: argparse.Namespace, size: Size, table: ArmTable) -> list[str]:
    """Those of --arms, those of --arm that --arms does not name at any learning rate, and each of them at the learning
    rates of --lr-sweep."""
    names: list[str] = []
    for name in (args.arms or size.arms).split(","):
        names += table.built_in if name == "all" else [name]
    named = {name.partition("@")[0] for name in names}
    names += [name for name in table.own if name not in named]
    factors = args.lr_sweep.split(",") if args.lr_sweep else []
    if not all(re.fullmatch(r"\d*\.?\d+", factor) and float(factor) > 0 for factor in factors):
        raise Mistake(f"--lr-sweep '{args.lr_sweep}': expected factors, such as {SWEEP}")
    rates = {name: own_rate(table.without_steps(name), size) for name in names} if factors else {}
    swept = [f"{name.partition('@')[0]}@lr{float(f) * rates[name]:.3g}" for name in names for f in factors]
    return list(dict.fromkeys([*names, *swept]))


def own_rate(arm: Arm, size: Size) -> float:
    try:
        return float(arm.options.get("lr", size.lr))
    except ValueError:
        raise Mistake(f"the arm '{arm.name}' has --lr '{arm.options['lr']}': expected a number") from None


def make_plan(args: argparse.Namespace, trainer: Path, known: Plan | None) -> Plan:
    """What this command asks for; known: the plan of an earlier one in the same folder."""
    size = SIZES[args.size]
    names, data = find_data(args, size, known.data if known else None)
    vocab = size.vocab or data.vocab
    parameters = size.parameters(vocab)
    budget = parse_count(args.budget, "--budget") if args.budget else size.budget or TOKENS_PER_PARAMETER * parameters
    micro_batch = parse_count(args.micro_batch, "--micro-batch") if args.micro_batch else size.micro_batch
    common = common_options(size, vocab, budget, micro_batch, names)
    ramp_steps, _ = count_steps(trainer, common | {"batch-schedule": f"linear:{size.start}:{size.batch}"})
    mean = max(1, round(budget / ramp_steps / size.seq_len / size.quantum)) * size.quantum
    own = dict(text.partition("=")[::2] for text in args.arm)
    table = ArmTable(built_in_arms(size, mean), own, common, trainer)
    if clash := [name for name in own if name in table.built_in]:
        raise Mistake(f"--arm '{clash[0]}=...': there is an arm of that name; choose another")
    arms = [table.make(name) for name in arm_names(args, size, table)]
    seeds = parse_numbers(args.seeds or size.seeds, "--seeds")
    plan = Plan(
        SCHEMA,
        args.size,
        common["model"],
        parameters,
        size.seq_len,
        size.batch,
        size.quantum,
        budget,
        data,
        str(trainer),
        seeds,
        arms,
    )
    if known is not None:
        check_same_experiment(known, plan, table)
    return plan


def check_same_experiment(old: Plan, new: Plan, table: ArmTable) -> None:
    """Mistake if they are two: another model, budget or data, or another recipe behind the arms' names."""
    for name in ("schema", "size", "model", "parameters", "seq_len", "batch", "quantum", "budget", "data"):
        if getattr(old, name) != getattr(new, name):
            raise Mistake(
                f"plan.json there has {name} {getattr(old, name)}, this command {getattr(new, name)}; choose "
                "another --out"
            )
    for arm in old.arms:
        if arm.name.partition("@")[0] in table.built_in and not arm.is_fitted:
            check_same_options(arm, table.without_steps(arm.name))


def merge_arm(old: Arm, new: Arm, trainer: Path) -> Arm:
    """The new one, with the budget that the old one was fitted to. Mistake if they are not the same."""
    if old.budget and not new.budget:
        new = fit_arm(new, old.budget, trainer)
    check_same_options(old, new)
    return new


def check_same_options(old: Arm, new: Arm) -> None:
    for name in sorted((old.options.keys() | new.options.keys()) - MACHINE_OPTIONS):
        if old.options.get(name) != new.options.get(name):
            raise Mistake(
                f"plan.json there has the arm {old.name} with --{name} {old.options.get(name)}, this command with "
                f"{new.options.get(name)}; choose another --out"
            )


def merge_plans(old: Plan | None, new: Plan, trainer: Path) -> Plan:
    """The new plan with the arms and seeds of the old one before its own. Mistake if an arm is not the same in both."""
    if old is not None:
        arms = {arm.name: arm for arm in old.arms}
        for arm in new.arms:
            arms[arm.name] = merge_arm(arms[arm.name], arm, trainer) if arm.name in arms else arm
        new = replace(new, arms=list(arms.values()), seeds=sorted({*old.seeds, *new.seeds}))
    if len(new.seeds) < 2 and any(arm.is_replay for arm in new.arms):
        raise Mistake("the arm replay repeats the closed loop of another seed, but there is one only; give two --seeds")
    return new
