"""The batch-schedule experiment: does a batch that grows with the gradient noise train to the same loss for less?

    python3 scripts/chinchilla.py tiny                                  CPU, built-in data, some minutes
    python3 scripts/chinchilla.py small --data 'TRAIN*.bin' VAL.bin     one GPU, 20 tokens per parameter
    python3 scripts/chinchilla.py 111m --data 'TRAIN*.bin' VAL.bin      the recipe of arXiv 2411.00999, on OpenWebText
    python3 scripts/chinchilla.py 111m --arms all --dry-run             the plan as a table; trains and writes nothing

Trains every arm with every seed, one run after the other, or with --gpus 0-7 one at a time on each of these GPUs. What
is done is skipped, what was interrupted goes on from its checkpoint: after Ctrl-C, a kill or a power cut the same
command continues. Needs the standard library only. Leaves

    EXPERIMENT/plan.json           what was planned: budget, shape, data, seeds, arms with all of the trainer's options
    EXPERIMENT/<arm>/seed<k>/      the trainer's folder of that run (log.csv, config.json, checkpoints/), output.txt,
                                   what it said, and lock, held while it lives: no two programs train the same run

A run is done when the last row of its log.csv has reached the arm's budget and a checkpoint is there. To share a plan
between machines, give each the same command with --only 1/2 and --only 2/2, and copy the run folders into one: that is
all there is to collecting. Another program in the same folder takes the runs that nobody is at.

The same in all arms of one seed: initial weights and order of the training data (--seed), the validation tokens, the
micro-batch, and the learning rate as a function of tokens: warm-up, then linear decay to 10%, neither rescaled with the
batch. Evaluations follow the step that crosses a multiple of a number of tokens, itself a multiple of the fixed batch,
and the last step: they are where those of the fixed arm are, to within a step.

Arms, with A the ramp's first batch and B its last, the fixed one (--arms all is all of them):

    fixed       B throughout
    ramp        linear in tokens from A to B: the paper's schedule
    gns         closed loop: the batch follows the measured noise scale, between A and B
    mean        constant at the ramp's mean batch, budget / steps, to the nearest multiple of the batch quantum
    const1-4    constant; the best one, each at its best learning rate, is the ramp's true rival
    fall        linear from B to A. Steps are the integral of dt / (T B(t)) over the tokens t, whatever the direction:
                there are as many, but for a few, as a step takes the batch of its beginning, rounded up (111m: 18,950,
                the ramp 18,953). What a ramp gains beyond this arm is not gained by more steps
    replay      the batches of the gns run of the next seed, open-loop: is it the schedule or the feedback? At another
                peak learning rate, replay@lr<x>, those of gns@lr<x>
    sqrtlr      the ramp with a learning rate x sqrt(batch / B)
    halflife    the ramp with beta2 by a half-life in tokens, that of 0.95 at B: H = B T ln 2 / -ln 0.95
    wide        the ramp from 2A to 2B, with that half-life
    tuned       the closed loop as tuned on one seed of small: 3 times the noise scale of all tensors, measured
                every 16 steps, between 2A and 2B, with that half-life
    fitted      fixed with a budget D', to which its whole learning rate schedule is fitted (below)
    fittedramp  the ramp, likewise
    <arm>@lr<x> any of these at the peak learning rate x; --lr-sweep adds such arms
    your own    --arm 'root=gns --gns-power 0.5' is gns with one more option, 'late=ramp --batch-schedule linear:8:256'
                another ramp; an empty value, as in --beta2 "", takes an option away; --max-tokens, a budget of its own,
                has the whole learning rate schedule fitted to it. Trained beside --arms, or, if that names it with
                @lr<x>, at these rates only

D' is where the better one of fixed and ramp has, on its way, the other's final loss. Validation losses are averaged
over all seeds, and the crossing, the first one, is interpolated linearly between two evaluations. D' / D is thus the
saving as one reads it off two curves; whether it is real, the fitted runs tell, whose decay is over at D'. It is
rounded to whole steps of B, and once known kept in plan.json.

replay is exact: its schedule file, schedule.csv in the run's folder, has a knot where each stretch of equal batches
begins and one where its last step begins. No step begins between two stretches, where the trainer would interpolate.

Exit status: 0 all that was asked for is done; 1 runs failed, or wait for others; 2 wrong command; 130 interrupted.
"""

import argparse
import contextlib
import csv
import fcntl
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from chinchilla_plan import (
    SCHEDULE,
    SIZES,
    SWEEP,
    Arm,
    Mistake,
    Plan,
    Size,
    find_trainer,
    fit_arm,
    last_line,
    load_plan,
    make_plan,
    merge_plans,
    parse_numbers,
    to_arguments,
)

Curve = list[tuple[float, float]]  # (tokens, validation loss)


# ----------------------------------------------------------------------------------------------------------------------
# Logs


@dataclass(frozen=True)
class Position:
    """Where a run is, by the last row of its log."""

    tokens: int = 0
    train_loss: float = math.nan
    val_loss: float = math.nan  # unless that step was followed by an evaluation


def read_position(folder: Path) -> Position:
    """Looks at the end of log.csv only. A row without its newline is none yet."""
    try:
        with open(folder / "log.csv", "rb") as file:
            header = file.readline().decode().rstrip("\n").split(",")
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - (1 << 17)))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return Position()
    row = lines[-2].decode().split(",") if len(lines) > 1 else []
    if len(row) != len(header):
        return Position()
    at = dict(zip(header, row, strict=True))
    return Position(int(at["tokens_processed"]), float(at["train/lossf"]), float(at["val/loss"] or "nan"))


def read_columns(folder: Path, *names: str) -> list[tuple[str, ...]]:
    """These columns of a finished run's log."""
    with open(folder / "log.csv", newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def mean_curve(folders: list[Path]) -> Curve:
    """Validation loss over tokens, the mean of runs that differ by their seeds alone."""
    runs = [
        [(float(tokens), float(loss)) for tokens, loss in read_columns(folder, "tokens_processed", "val/loss") if loss]
        for folder in folders
    ]
    return [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*runs, strict=True)]


def first_crossing(curve: Curve, loss: float) -> float:
    """The tokens at which the curve first comes down to this loss; its end, if it never does."""
    before = curve[0]
    for point in curve:
        if point[1] <= loss:
            share = (before[1] - loss) / (before[1] - point[1]) if before[1] > point[1] else 1
            return before[0] + share * (point[0] - before[0])
        before = point
    return curve[-1][0]


def fitted_budget(fixed: Curve, ramp: Curve, batch_tokens: int) -> int:
    """D' of the top of this file."""
    better, other = sorted((ramp, fixed), key=lambda curve: curve[-1][1])
    tokens = first_crossing(better, other[-1][1])
    return max(1, round(tokens / batch_tokens)) * batch_tokens


def replay_schedule(rows: Sequence[tuple[str, ...]], seq_len: int, origin: str) -> str:
    """The text of the file that repeats a run's batches; rows are its (tokens_processed, batch)."""
    knots: list[tuple[int, int]] = []
    end = 0
    for after, size in ((int(tokens), int(batch)) for tokens, batch in rows):
        start = after - size * seq_len
        if start != end:
            raise Mistake(
                f"the log of {origin} lacks the rows from {end} to {start} tokens, so it cannot be replayed; "
                "remove that run's folder and train it again"
            )
        if len(knots) > 1 and knots[-1][1] == knots[-2][1] == size:
            knots.pop()
        knots.append((start, size))
        end = after
    lines = [f"# The batches of {origin}: tokens before the step, sequences.", *(f"{t}, {size}" for t, size in knots)]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}/seed{self.seed}"


def planned_runs(plan: Plan) -> list[Run]:
    """Seed by seed; but what is made from other runs comes after all of them."""
    runs = [(arm, Run(arm.name, seed)) for seed, arm in itertools.product(plan.seeds, plan.arms)]
    return [run for _, run in sorted(runs, key=lambda pair: (pair[0].is_fitted, pair[0].is_replay))]


@contextlib.contextmanager
def hold(path: Path, wait: bool = False) -> Iterator[int]:
    """Locks the file for us and for every child that inherits the descriptor, which this yields. BlockingIOError if it
    is taken, unless we wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def write_owner(lock: int, process: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{process}\n".encode(), 0)


@dataclass
class Experiment:
    out: Path
    plan: Plan  # all arms and seeds of the folder
    trainer: Path

    def folder(self, run: Run) -> Path:
        return self.out / run.arm / f"seed{run.seed}"

    def budget(self, run: Run) -> int:
        """In tokens; that of the plan as long as a fitted one is not known, or where the plan has no such arm."""
        return next((arm.budget for arm in self.plan.arms if arm.name == run.arm and arm.budget), self.plan.budget)

    def is_done(self, run: Run) -> bool:
        folder = self.folder(run)
        return (folder / "checkpoints/latest").is_file() and read_position(folder).tokens >= self.budget(run)

    def needs(self, run: Run) -> list[Run]:
        """Runs whose logs this one is still to be made from."""
        arm = self.plan.arm(run.arm)
        if arm.is_replay and not (self.folder(run) / SCHEDULE).exists():
            return [Run("gns" + arm.at_rate, self.plan.other_seed(run.seed))]
        if arm.is_fitted and arm.budget is None:
            return [Run(name, seed) for seed in self.plan.seeds for name in ("fixed", "ramp")]
        return []

    def prepare(self, run: Run) -> None:
        """Makes of the runs that this one needs what it needs of them: the schedule to replay, or the arm's budget."""
        arm, origins = self.plan.arm(run.arm), self.needs(run)
        if origins and arm.is_replay:
            rows = read_columns(self.folder(origins[0]), "tokens_processed", "batch")
            temporary = self.folder(run) / f"{SCHEDULE}.tmp"
            temporary.write_text(replay_schedule(rows, self.plan.seq_len, str(origins[0])))
            temporary.replace(self.folder(run) / SCHEDULE)
        elif origins:
            self.fit(arm)

    def fit(self, arm: Arm) -> None:
        """Notes the arm's budget, here and in plan.json, to which another program may have added arms meanwhile."""
        curves = {
            name: mean_curve([self.folder(Run(name, seed)) for seed in self.plan.seeds]) for name in ("fixed", "ramp")
        }
        budget = fitted_budget(curves["fixed"], curves["ramp"], self.plan.batch * self.plan.seq_len)
        fitted = fit_arm(arm, min(budget, self.plan.budget), self.trainer)
        with hold(self.out / "lock", wait=True):
            self.plan = self.plan.with_arm(fitted)
            (load_plan(self.out / "plan.json") or self.plan).with_arm(fitted).save(self.out / "plan.json")

    def command(self, run: Run) -> list[str]:
        folder = self.folder(run)
        options = to_arguments(self.plan.arm(run.arm).options, folder)
        return [str(self.trainer), *options, "--seed", str(run.seed), "--out", str(folder), "--resume", "1"]


# ----------------------------------------------------------------------------------------------------------------------
# Progress


def write(text: str, end: str = "\n") -> None:
    """To the standard output. That its reader has gone, as `head` does, is no reason to stop training."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_count(x: float) -> str:
    """Three digits and a unit: 999, 1.23K, 45.6M, 2.22B."""
    unit = next((i for i in range(3) if x < 999.5 * 1000**i), 3)
    x /= 1000**unit
    return f"{x:.{0 if unit == 0 or x >= 99.95 else 1 if x >= 9.995 else 2}f}{' KMB'[unit].strip()}"


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 3m20s, 1h02m, 2d03h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02}s"
    return f"{s // 3600}h{s // 60 % 60:02}m" if s < 86400 else f"{s // 86400}d{s // 3600 % 24:02}h"


class Progress:
    """One line over all runs: refreshed every second on a terminal, printed now and then into a file."""

    def __init__(self, experiment: Experiment, runs: list[Run], every: float) -> None:
        self.experiment, self.runs = experiment, runs
        self.terminal = sys.stdout.isatty()
        self.every = 1.0 if self.terminal else every
        self.began = self.shown = 0.0  # when the first run began; when the line was last shown
        self.trained = 0  # tokens, by this program in runs that have ended
        self.tokens: dict[Run, int] = {}  # of all runs, when one was last begun or ended
        self.at_hand: dict[Run, int] = {}  # with the tokens that each began from

    def position(self, run: Run) -> Position:
        return read_position(self.experiment.folder(run))

    def read_tokens(self) -> None:
        self.tokens = {run: self.position(run).tokens for run in self.runs}

    def say(self, text: str) -> None:
        write(f"\r\x1b[K{text}" if self.terminal else text)

    def start(self, run: Run) -> None:
        now = time.monotonic()
        self.read_tokens()
        self.at_hand[run] = self.tokens[run]
        self.began = self.began or now
        self.shown = max(self.shown, now - self.every + 1)  # its first line comes after a second

    def here(self, run: Run, position: Position) -> str:
        share = min(100, 100 * position.tokens / self.experiment.budget(run))
        state = f"{share:.1f}% loss {position.train_loss:.4f}" if position.tokens else "starts"
        return f"{self.runs.index(run) + 1}/{len(self.runs)} {run} {state}"

    def line(self) -> str:
        at_hand = dict(self.at_hand)
        positions = {run: self.position(run) for run in at_hand}
        tokens = self.tokens | {run: position.tokens for run, position in positions.items()}
        budgets = {run: self.experiment.budget(run) for run in self.runs}
        planned, done = sum(budgets.values()), sum(min(tokens[run], budgets[run]) for run in self.runs)
        trained = self.trained + sum(max(0, tokens[run] - start) for run, start in at_hand.items())
        speed = trained / max(1e-9, time.monotonic() - self.began)
        eta = format_duration((planned - done) / speed) if speed > 0 else "--"
        total = f"all {100 * done / planned:.1f}% of {format_count(planned)} tokens"
        here = ", ".join(self.here(run, positions[run]) for run in at_hand)
        return f"{here} | {total} | {format_count(speed)} tok/s | ETA {eta}"

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.shown < self.every:
            return
        self.shown = now
        text = self.line()
        if self.terminal:
            write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="")
        else:
            write(text)

    def finish(self, run: Run) -> None:
        self.read_tokens()
        self.trained += max(0, self.tokens[run] - self.at_hand.pop(run))


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Stop:
    """SIGINT, SIGTERM or SIGHUP: the first asks the trainers to save and end, and us to train nothing more; a second
    one ends them at once. A trainer has a session of its own, so that Ctrl-C reaches it through us, and once."""

    def __init__(self) -> None:
        self.requested = False
        self.trainers: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.handle)

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        for trainer in list(self.trainers):
            trainer.send_signal(signal.SIGINT)

    @contextlib.contextmanager
    def watch(self, trainer: subprocess.Popen[bytes]) -> Iterator[None]:
        self.trainers.append(trainer)
        if self.requested:
            trainer.send_signal(signal.SIGINT)
        try:
            yield
        finally:
            self.trainers.remove(trainer)


@dataclass
class Session:
    """What this program does in an experiment."""

    experiment: Experiment
    runs: list[Run]
    progress: Progress
    stop: Stop
    gpus: list[int | None]  # each has a run at a time; None: the one that the trainer takes
    failed: set[Run] = field(default_factory=set)
    waiting: dict[Run, str] = field(default_factory=dict)  # for other runs, or for a trainer that is not ours
    changed: threading.Condition = field(default_factory=threading.Condition)  # guards the two below
    active: set[Run] = field(default_factory=set)
    tried: set[Run] = field(default_factory=set)  # in vain, since a run was last finished

    def train(self, run: Run, lock: int, gpu: int | None) -> str | None:
        """Trains the run to its end, or until we are stopped; what went wrong, or None."""
        log = self.experiment.folder(run) / "output.txt"
        environment = os.environ if gpu is None else os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with open(log, "ab") as output:
            trainer = subprocess.Popen(
                self.experiment.command(run),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock],
                start_new_session=True,
                env=environment,
            )
        with self.stop.watch(trainer):
            write_owner(lock, trainer.pid)
            self.progress.start(run)
            while trainer.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    trainer.wait(timeout=0.5)
                self.progress.tick()
        self.progress.finish(run)
        status = trainer.returncode
        if self.experiment.is_done(run) or (self.stop.requested and status <= 0):
            return None
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status} before its budget"
        return f"the trainer {how}; its last line in {log}: {last_line(log.read_text(errors='replace'))}"

    def attempt(self, run: Run, gpu: int | None) -> bool:
        """Trains the run if it can be trained now; is it done now, and was not before?"""
        missing = [str(need) for need in self.experiment.needs(run) if not self.experiment.is_done(need)]
        if missing:
            self.waiting[run] = f"it needs {', '.join(missing)}: train these, or copy their folders here"
            return False
        folder = self.experiment.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with hold(folder / "lock") as lock:
                if self.experiment.is_done(run):
                    return False
                write_owner(lock, os.getpid())
                self.experiment.prepare(run)
                problem = self.train(run, lock, gpu)
        except BlockingIOError:
            owner = (folder / "lock").read_text().strip()
            self.waiting[run] = f"process {owner} is training it; wait, or stop it with kill {owner}: it saves first"
            return False
        except (Mistake, OSError) as error:
            problem = str(error)
        if problem:
            self.failed.add(run)
            self.progress.say(f"{run} FAILED: {problem}")
        elif self.experiment.is_done(run):
            loss = read_position(folder).val_loss
            self.progress.say(f"{run} done: {self.experiment.plan.arm(run.arm).title}; validation loss {loss:.4f}")
        return self.experiment.is_done(run)

    def next_run(self) -> Run | None:
        """One that nobody here is at; None if there is no more that a run of ours, once finished, could not change."""
        with self.changed:
            while not self.stop.requested:
                out = self.failed | self.active | self.tried
                if run := next((run for run in self.left() if run not in out), None):
                    self.active.add(run)
                    return run
                if not self.active:
                    return None
                while not self.stop.requested and not self.changed.wait(0.5):
                    pass  # looking at all runs again would find the same
        return None

    def work(self, gpu: int | None) -> None:
        """Goes through the runs until no more can be finished: one may be what another waits for."""
        while run := self.next_run():
            finished = False
            try:
                finished = self.attempt(run, gpu)
            finally:
                with self.changed:
                    self.active.remove(run)
                    self.tried = set() if finished else self.tried | {run}
                    self.changed.notify_all()

    def train_all(self) -> None:
        """A thread for each GPU; this one handles the signals."""
        threads = [threading.Thread(target=self.work, args=(gpu,)) for gpu in self.gpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def left(self) -> list[Run]:
        return [run for run in self.runs if not self.experiment.is_done(run)]

    def report(self) -> int:
        """Says how it ended; the exit status."""
        left, all_runs = self.left(), len(self.runs)
        if not left:
            self.progress.say(f"all {all_runs} runs are done: {self.experiment.out}")
            return 0
        if self.stop.requested:
            self.progress.say(f"stopped, {len(left)} of {all_runs} runs left; to go on: {shlex.join(sys.orig_argv)}")
            return 130
        for run in left:
            if run not in self.failed:
                self.progress.say(f"{run} WAITS: {self.waiting[run]}")
        self.progress.say(
            f"{all_runs - len(left)} of {all_runs} runs are done, {len(self.failed)} failed; the same command "
            "tries the others again"
        )
        return 1


# ----------------------------------------------------------------------------------------------------------------------
# --dry-run


def show_plan(experiment: Experiment, runs: list[Run], size: Size) -> None:
    """A line for each arm, and the sums."""
    plan = experiment.plan
    columns = ("arm", "runs", "done", "steps", "tokens", "mean batch", "time a run")
    write("{:<16} {:>5} {:>5} {:>15} {:>15} {:>11} {:>11}  what it is".format(*columns))
    left = 0
    for name in dict.fromkeys(run.arm for run in runs):
        of_arm = [run for run in runs if run.arm == name]
        arm, budget = plan.arm(name), experiment.budget(of_arm[0])
        done = sum(experiment.is_done(run) for run in of_arm)
        left += budget * (len(of_arm) - done)
        known = len(set(arm.steps)) == 1
        steps = "-".join(f"{n:,}" for n in dict.fromkeys(arm.steps)) or "?"
        mean = f"{budget / arm.steps[0] / plan.seq_len:.1f}" if known else "?"
        tokens = f"{budget:,}" if arm.budget else "?"
        write(
            f"{name:<16} {len(of_arm):>5} {done:>5} {steps:>15} {tokens:>15} {mean:>11} "
            f"{format_duration(budget / size.speed):>11}  {arm.title}"
        )
    epochs = plan.data.train_tokens and f"; {plan.budget / plan.data.train_tokens:.2f} epochs of the data"
    write(
        f"\n{plan.model}: {plan.parameters:,} parameters, {plan.budget / plan.parameters:.2f} tokens each"
        f"{epochs or ''}; seeds {', '.join(map(str, sorted({run.seed for run in runs})))}"
    )
    write(
        f"{len(runs)} runs, left to train: {format_count(left)} tokens, {format_duration(left / size.speed)} at "
        f"{format_count(size.speed)} tok/s ({size.machine})"
    )
    write(
        "Steps are those of the trainer's --dry-run; in a closed loop and its replay the noise decides, on fitted "
        "budgets other runs."
    )


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; --help explains the options")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("size", choices=SIZES, help="of model and budget")
    add("--out", type=Path, metavar="EXPERIMENT", help="folder of the results; default out/chinchilla-SIZE")
    add("--data", nargs=2, metavar=("TRAIN", "VAL"), help="token files, patterns in quotes; tiny has its own")
    add("--arms", metavar="LIST", help="names, separated by commas; default: small all, else fixed,ramp,gns")
    add("--arm", action="append", default=[], metavar="'NAME=ARM OPTIONS'", help="an arm with more trainer options")
    add("--seeds", metavar="LIST", help="such as 1-5 or 1,3; default: tiny 1-2, small 1-5, 111m 1-3")
    add(
        "--lr-sweep",
        nargs="?",
        const=SWEEP,
        metavar="FACTORS",
        help=f"also each arm at its peak learning rate times these; {SWEEP} if none are given",
    )
    add("--gpus", metavar="LIST", help="such as 0-7: GPUs of this machine, each of which has a run at a time")
    add("--only", default="1/1", metavar="I/N", help="every N-th run, from the I-th on: one plan for N machines")
    add(
        "--trainer",
        type=Path,
        metavar="PATH",
        help="default: train_gptcu if built and nvidia-smi works, else train_gpt",
    )
    add("--micro-batch", metavar="N", help="sequences in memory at once; the result does not depend on it")
    add("--budget", metavar="TOKENS", help="in place of the size's own, for a trial; the schedules shrink with it")
    add("--progress-every", type=float, default=60, metavar="SECONDS", help="if the output is no terminal; default 60")
    add("--dry-run", action="store_true", help="print the plan, train nothing, write nothing")
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"out/chinchilla-{args.size}")
    return args


def parse_share(text: str) -> slice:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise Mistake(f"--only '{text}': expected this machine's number and how many there are, such as 1/2")
    return slice(int(match[1]) - 1, None, int(match[2]))


def run_command(argv: list[str]) -> int:
    args = parse_arguments(argv)
    share, trainer, path = parse_share(args.only), find_trainer(args.trainer), args.out / "plan.json"
    gpus: list[int | None] = [*parse_numbers(args.gpus, "--gpus")] if args.gpus else [None]
    if args.dry_run:
        known = load_plan(path)
        asked = make_plan(args, trainer, known)
        experiment = Experiment(args.out, merge_plans(known, asked, trainer), trainer)
        show_plan(experiment, planned_runs(asked)[share], SIZES[args.size])
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    with hold(args.out / "lock", wait=True):
        known = load_plan(path)
        asked = make_plan(args, trainer, known)
        experiment = Experiment(args.out, merge_plans(known, asked, trainer), trainer)
        experiment.plan.save(path)
    runs = planned_runs(asked)[share]
    session = Session(experiment, runs, Progress(experiment, runs, args.progress_every), Stop(), gpus)
    session.progress.say(f"{len(runs)} runs, {len(runs) - len(session.left())} done, by {trainer}, in {args.out}")
    session.train_all()
    return session.report()


def main(argv: list[str]) -> int:
    try:
        return run_command(argv)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"'{error.filename}': {error.strerror}" if error.filename else str(error)
        print(f"error: {what}; --out, --data and --trainer say where files lie", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first run
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
