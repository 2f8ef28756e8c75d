"""Tests of chinchilla.py. `N passed, N failed` at the end.

    python3 scripts/test_chinchilla.py        after make train_gpt build/text_to_tokens; about a minute

Most tests run the program with a fake trainer, which writes logs and checkpoints of runs in no time, obeys signals, and
fails on demand; its --dry-run is the real trainer's. The validation losses that it logs fall linearly, so that what
follows from them is known exactly. One test trains with the real trainer.
"""

import contextlib
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import chinchilla
import chinchilla_plan
from chinchilla_plan import Mistake

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "dev/test"))
from suite import require, run_tests  # noqa: E402

TRAINER = ROOT / "train_gpt"
SMALL_RUN = ["tiny", "--budget", "200K", "--progress-every", "0.2"]
BATCH_TOKENS = 32 * 64  # of tiny

FAKE = f"""#!{sys.executable}
import json, os, random, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
if "--dry-run" in words:
    os.execv({str(TRAINER)!r}, [{str(TRAINER)!r}, *words])
o = dict(zip(words[::2], words[1::2]))
out = Path(o["--out"])
name = "/".join(out.parts[-2:])
def note(file, *text):
    with open(out.parent.parent / file, "a") as notes:
        print(*text, file=notes)

note("calls.txt", name)
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
note("gpus.txt", gpu, "begins", name)
if name in os.environ.get("FAKE_FAIL", "").split():
    sys.exit("error: the disk of " + name + " is full")
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: os._exit(1) if stopped else stopped.append(1))
budget, every = int(o["--max-tokens"]), int(o["--val-every"].removesuffix("tokens"))
T, B = int(o["--seq-len"]), int(o["--batch-tokens"]) // int(o["--seq-len"])
save_every = int(o["--checkpoint-every"].removesuffix("tokens"))
latest = out / "checkpoints/latest"
header = "step,train/lossf,val/loss,tokens_processed,batch\\n"
log = out / "log.csv"
tokens = json.loads(latest.read_text()) if latest.exists() else 0
rows = log.read_text().splitlines(True)[1:] if tokens else []
rows = [row for row in rows if row.endswith("\\n") and int(row.split(",")[3]) <= tokens]
log.write_text(header + "".join(rows))

def save():
    latest.parent.mkdir(exist_ok=True)
    temporary = latest.with_suffix(".tmp")
    temporary.write_text(json.dumps(tokens))
    temporary.replace(latest)

with open(log, "a", buffering=1) as file:
    step = len(rows)
    while tokens < budget and not stopped:
        n = random.Random(f"{{name}} {{step // 3}}").randint(4, B) if "gns" in o["--batch-schedule"] else B
        before, tokens = tokens, tokens + n * T
        slope = 2.5 if "linear" in o["--batch-schedule"] else 2.0
        val = 5 - slope * tokens / budget + 0.01 * int(o["--seed"])
        evaluated = tokens >= budget or tokens // every > before // every
        file.write(f"{{step}},{{val}},{{val if evaluated else ''}},{{tokens}},{{n}}\\n")
        step += 1
        if tokens // save_every > before // save_every:
            save()
        time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
save()
note("gpus.txt", gpu, "ends", name)
print("finished" if tokens >= budget else "stopped")
"""


def require_equal(found: object, expected: object, what: str) -> None:
    require(found == expected, f"{what}: expected {expected}, found {found}")


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """The program at work in the folder `e` with the fake trainer, unless the arguments name others."""
    words = [sys.executable, str(ROOT / "scripts/chinchilla.py"), "--trainer", "./fake", "--out", "e", *arguments]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Its exit status and what it said."""
    process = start(*arguments, **environment)
    said, _ = process.communicate()
    return process.returncode, said


def require_run(status: int, *arguments: str, **environment: str) -> str:
    found, said = run(*arguments, **environment)
    require(found == status, f"{' '.join(arguments)}: status {found} instead of {status}: {said}")
    return said


def calls() -> list[str]:
    """The runs that the fake trainer was started for since it was last asked."""
    path = Path("e/calls.txt")
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def log_of(run_name: str) -> list[str]:
    return Path(f"e/{run_name}/log.csv").read_text().splitlines()


def column(run_name: str, name: str) -> list[str]:
    folder = Path("e") / run_name
    return [value for (value,) in chinchilla.read_columns(folder, name)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        require(time.monotonic() < deadline, f"waited in vain for {what}")
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_first_crossing() -> None:
    curve = [(0.0, 5.0), (10.0, 4.0), (20.0, 4.5), (30.0, 3.0)]
    for loss, tokens in ((4.5, 5.0), (4.0, 10.0), (3.5, 20 + 10 * 2 / 3), (3.0, 30.0), (6.0, 0.0), (1.0, 30.0)):
        found = chinchilla.first_crossing(curve, loss)
        require(math.isclose(found, tokens), f"crossing of {loss}: expected {tokens}, found {found}")


def test_fitted_budget() -> None:
    """Whichever is better at its end, its curve is read at the other's final loss."""
    good, bad = [(0.0, 5.0), (50.0, 3.5), (100.0, 2.5)], [(0.0, 5.0), (100.0, 3.0)]
    for fixed, ramp in ((bad, good), (good, bad)):
        require_equal(chinchilla.fitted_budget(fixed, ramp, 10), 80, "from 75, in steps of 10")
    require_equal(chinchilla.fitted_budget(good, good, 10), 100, "no saving")
    dips = [(100.0, 3.0), (200.0, 1.5), (300.0, 1.6)]  # the worse one, with a lower loss on its way
    require_equal(
        chinchilla.fitted_budget(dips, [(100.0, 3.0), (200.0, 1.7), (300.0, 1.3)], 1), 225, "of the better one"
    )


def replayed(schedule: str, budget: int, seq_len: int) -> list[int]:
    """The batches of a trainer that follows the file: linear between knots, rounded up (llmc/schedule.h)."""
    knots = [tuple(map(int, line.split(", "))) for line in schedule.splitlines() if not line.startswith("#")]
    batches, tokens = [], 0
    while tokens < budget:
        i = max(i for i, knot in enumerate(knots) if knot[0] <= tokens)
        (t, size), (next_t, next_size) = knots[i], knots[min(i + 1, len(knots) - 1)]
        exact = size if t in (tokens, next_t) else size + (next_size - size) * (tokens - t) / (next_t - t)
        batches.append(-int(-exact // 1))
        tokens += batches[-1] * seq_len
    return batches


def test_replay_schedule() -> None:
    rng = random.Random(1)
    for _ in range(200):
        batches = [size for _ in range(rng.randint(1, 12)) for size in [rng.randint(1, 9)] * rng.choice((1, 1, 2, 7))]
        ends = [8 * sum(batches[: i + 1]) for i in range(len(batches))]
        rows = [(str(end), str(size)) for end, size in zip(ends, batches, strict=True)]
        require_equal(replayed(chinchilla.replay_schedule(rows, 8, "a"), ends[-1], 8), batches, "replayed batches")
    long = chinchilla.replay_schedule([(str(8 * i), "1") for i in range(1, 1000)], 8, "a")
    require_equal(long.count("\n"), 3, "lines for one stretch")


def test_replay_needs_every_row() -> None:
    try:
        chinchilla.replay_schedule([("8", "1"), ("24", "1")], 8, "gns/seed2")
    except Mistake as error:
        require("gns/seed2 lacks the rows from 8 to 16 tokens" in str(error), str(error))
    else:
        raise AssertionError("a log with a gap was accepted")


def test_position() -> None:
    log = Path("log.csv")
    require_equal(chinchilla.read_position(Path(".")).tokens, 0, "tokens without a log")
    header, rows = "step,train/lossf,val/loss,tokens_processed\n", ["0,5,,64\n", "1,4,3.5,128\n", "2,3,,1"]
    for count, tokens in ((0, 0), (1, 64), (2, 128), (3, 128)):
        log.write_text(header + "".join(rows[:count]))
        require_equal(chinchilla.read_position(Path(".")).tokens, tokens, f"tokens after {count} rows")
    require_equal(chinchilla.read_position(Path(".")).val_loss, 3.5, "validation loss")
    log.write_text(header + "".join(f"{i},5,,{i}\n" for i in range(1, 50_000)))
    require_equal(chinchilla.read_position(Path(".")).tokens, 49_999, "tokens of a long log")
    log.unlink()


def test_numbers() -> None:
    require_equal(chinchilla_plan.parse_numbers("1-3,7,2", "--seeds"), [1, 2, 3, 7], "seeds")
    for text, count in (("250", 250), ("2_000", 2000), ("1.5M", 1_500_000), ("2B", 2_000_000_000)):
        require_equal(chinchilla_plan.parse_count(text, "--budget"), count, text)
    for x, text in ((0, "0"), (999, "999"), (1234, "1.23K"), (45.6e6, "45.6M"), (2.22e9, "2.22B"), (1e13, "10000B")):
        require_equal(chinchilla.format_count(x), text, "count")
    for seconds, text in ((7.6, "8s"), (200, "3m20s"), (59.7, "1m00s"), (3725, "1h02m"), (183_600, "2d03h")):
        require_equal(chinchilla.format_duration(seconds), text, "duration")
    require_equal(chinchilla_plan.SIZES["111m"].parameters(50304), 111_086_592, "parameters of cgpt:111m")


# ----------------------------------------------------------------------------------------------------------------------
# Plans


def test_paper_plan() -> None:
    """The steps of the paper's recipe, by the real trainer; nothing is written."""
    said = require_run(0, "111m", "--arms", "all", "--dry-run", "--out", "none", "--trainer", str(TRAINER))
    steps = dict(re.findall(r"^(\S+) +3 +0 +([\d,?]+)", said, re.MULTILINE))
    expected = {
        "fixed": "9,033",
        "ramp": "18,953",
        "fall": "18,950",
        "mean": "19,357",
        "const4": "4,517",
        "fitted": "?",
    }
    require_equal({name: steps.get(name) for name in expected}, expected, "steps")
    require("constant batch of 56, the ramp's mean" in said, said)
    require_equal(Path("none").exists(), False, "a folder after --dry-run")


def test_plan_file() -> None:
    """Options of every arm, in order; arms and seeds add up over commands."""
    require_run(0, *SMALL_RUN, "--arms", "halflife,fixed", "--seeds", "2", "--lr-sweep", "0.5")
    own = ("--arm", "root=gns --gns-power 0.5", "--arm", "half=mean --beta2 '' --beta2-half-life 1K")
    own += ("--arm", "short=tuned --max-tokens 100000")
    require_run(0, *SMALL_RUN, "--arms", "fixed", *own, "--seeds", "5")
    plan = json.loads(Path("e/plan.json").read_text())
    names = ["halflife", "fixed", "halflife@lr0.003", "fixed@lr0.003", "root", "half", "short"]
    require_equal([arm["name"] for arm in plan["arms"]], names, "arms")
    require_equal((plan["schema"], plan["seeds"], plan["budget"]), (1, [2, 5], 200_000), "schema, seeds, budget")
    options = {arm["name"]: arm["options"] for arm in plan["arms"]}
    require("beta2" not in options["halflife"] and options["fixed"]["beta2"] == "0.95", "beta2")
    require_equal(options["halflife"]["beta2-half-life"], "27675", "half-life: 2048 ln 2 / -ln 0.95")
    require_equal(options["fixed@lr0.003"], options["fixed"] | {"lr": "0.003"}, "options of a sweep")
    require_equal((options["root"]["gns-power"], options["root"]["batch-max"]), ("0.5", "32"), "options of one's own")
    require("beta2" not in options["half"] and options["half"]["beta2-half-life"] == "1K", "an option taken away")
    short = {"batch-max": "64", "gns-scale": "3", "beta2-half-life": "27675", "max-tokens": "100000"}
    short["warmup"] = "16883tokens"  # 374,784,000 of 2,219,950,080 tokens, in the same proportion
    require_equal({name: options["short"].get(name) for name in short}, short, "options of a budget of its own")
    titles = [arm["title"] for arm in plan["arms"][-3:-1]]
    require_equal(titles, ["gns with gns-power 0.5", "mean with no beta2, beta2-half-life 1K"], "titles")
    expected = {f"{name}/seed2" for name in names[:4]} | {f"{name}/seed5" for name in ("fixed", *names[4:])}
    require_equal(sorted(calls()), sorted(expected), "runs")
    require_run(
        0, *SMALL_RUN, "--arms", "ramp@lr0.01", "--arm", "own=mean --lr 0.02", "--lr-sweep", "0.5,2", "--seeds", "2"
    )
    rates = [
        f"{name}@lr{rate}/seed2"
        for name, sweep in (("ramp", ("0.01", "0.005", "0.02")), ("own", ("0.01", "0.04")))
        for rate in sweep
    ]
    require_equal(sorted(calls()), sorted([*rates, "own/seed2"]), "a sweep about each arm's own rate")
    require_run(0, *SMALL_RUN, "--arms", "hot@lr0.02", "--arm", "hot=ramp --lr-coupling 1", "--seeds", "2")
    require_equal(calls(), ["hot@lr0.02/seed2"], "runs of one's own arm at a rate")


def test_other_experiment_is_refused() -> None:
    require_run(0, *SMALL_RUN, "--arms", "fixed", "--seeds", "1")
    calls()
    test_wrong_usage("has budget 200000, this command 300000", *SMALL_RUN, "--budget", "300K")
    test_wrong_usage("has size tiny, this command 111m", "111m", "--data", "e/data/own_train.bin", "big.bin")
    require_run(0, *SMALL_RUN, "--arm", "mine=fixed --eps 1e-7", "--arms", "fixed", "--seeds", "1")
    other = [*SMALL_RUN, "--arm", "mine=fixed --eps 1e-6"]
    test_wrong_usage("the arm mine with --eps 1e-7, this command with 1e-6", *other)
    test_wrong_usage("has data Data(", *SMALL_RUN, "--data", "e/data/own_val.bin", "e/data/own_val.bin")
    require_equal(calls(), ["mine/seed1"], "runs")
    plan = json.loads(Path("e/plan.json").read_text())
    plan["arms"][0]["options"]["lr"] = "0.001"
    Path("e/plan.json").write_text(json.dumps(plan))
    test_wrong_usage("the arm fixed with --lr 0.001, this command with 0.006", *SMALL_RUN, "--arms", "ramp")


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_all_runs() -> None:
    """Each run once, in order, with its results where they belong; a second command finds nothing to do."""
    said = require_run(0, *SMALL_RUN)
    runs = [f"{arm}/seed{seed}" for seed in (1, 2) for arm in ("fixed", "ramp", "gns")]
    require_equal(calls(), runs, "runs")
    require("all 6 runs are done" in said and "ramp/seed2 done: linear ramp from 4 to 32; validation" in said, said)
    require("6 runs, 6 done" in require_run(0, *SMALL_RUN), "said of the second command")
    require_equal(calls(), [], "runs of the second command")


def test_failure() -> None:
    """The others go on, the exit status is 1, and the next command tries again what failed."""
    said = require_run(1, *SMALL_RUN, FAKE_FAIL="ramp/seed1 gns/seed2")
    require("ramp/seed1 FAILED: the trainer ended with status 1" in said, said)
    require("error: the disk of gns/seed2 is full" in said and "4 of 6 runs are done, 2 failed" in said, said)
    require_equal(len(calls()), 6, "runs")
    require_run(0, *SMALL_RUN)
    require_equal(calls(), ["ramp/seed1", "gns/seed2"], "runs of the second command")


def test_made_from_other_runs() -> None:
    """Replays and fitted budgets, on two machines whose folders are then copied together."""
    options = [*SMALL_RUN, "--arms", "fitted,fixed,fittedramp,ramp,gns,replay"]
    said = require_run(1, *options, "--only", "1/2")
    first = ["fixed/seed1", "gns/seed1", "ramp/seed2"]
    require_equal(calls(), first, "runs of the first machine")
    require("replay/seed1 WAITS: it needs gns/seed2: train" in said, said)
    require("fitted/seed1 WAITS: it needs ramp/seed1, fixed/seed2: train" in said, said)
    shutil.move("e", "first")
    require_run(1, *options, "--only", "2/2")
    require_equal(calls(), ["ramp/seed1", "fixed/seed2", "gns/seed2"], "runs of the second machine")
    for name in first:
        shutil.copytree(f"first/{name}", f"e/{name}")
    require_run(0, *options)
    made = [f"{arm}/seed{seed}" for arm in ("replay", "fitted", "fittedramp") for seed in (1, 2)]
    require_equal(sorted(calls()), sorted(made), "runs after collecting")
    budgets = {arm["name"]: arm["budget"] for arm in json.loads(Path("e/plan.json").read_text())["arms"]}
    end = int(column("ramp/seed1", "tokens_processed")[-1])
    expected = round(0.8 * end / BATCH_TOKENS) * BATCH_TOKENS  # losses 5 - 2 t and 5 - 2.5 t meet 3 at 1 and 0.8
    require_equal((budgets["fitted"], budgets["fittedramp"]), (expected, expected), "fitted budgets")
    require_equal(int(column("fitted/seed2", "tokens_processed")[-1]), expected, "tokens of a fitted run")
    require("needs gns@lr0.02/seed2" in require_run(1, *SMALL_RUN, "--arms", "replay@lr0.02"), "a replay's own rate")
    require_run(0, *SMALL_RUN, "--arms", "gns@lr0.02,replay@lr0.02")
    for rate, seed, other in (("", 1, 2), ("", 2, 1), ("@lr0.02", 1, 2), ("@lr0.02", 2, 1)):
        batches = [int(n) for n in column(f"gns{rate}/seed{other}", "batch")]
        schedule = Path(f"e/replay{rate}/seed{seed}/schedule.csv").read_text()
        require_equal(replayed(schedule, 200_000, 64), batches, f"the schedule of replay{rate}/seed{seed}")


def test_ctrl_c() -> None:
    """At a terminal, which signals a whole group: stops the trainer, once, with a checkpoint; says how to go on."""
    program = start(*SMALL_RUN, FAKE_DELAY="0.02")
    wait_for(lambda: chinchilla.read_position(Path("e/fixed/seed1")).tokens > 10 * BATCH_TOKENS, "the first run")
    os.killpg(program.pid, signal.SIGINT)
    said, _ = program.communicate()
    require_equal(program.returncode, 130, "exit status")
    require("stopped, 6 of 6 runs left; to go on: " in said and "--budget 200K" in said, said)
    saved = int(Path("e/fixed/seed1/checkpoints/latest").read_text())
    require_equal(saved, chinchilla.read_position(Path("e/fixed/seed1")).tokens, "tokens in the checkpoint")
    require_equal(calls(), ["fixed/seed1"], "runs")
    require_run(0, *SMALL_RUN)
    require_equal(len(log_of("fixed/seed1")), 1 + 98, "rows")


def test_kills() -> None:
    """kill -9 of the program, the trainer or both at random moments; every log ends up as that of an unbroken run."""
    rng = random.Random(2)
    options = [*SMALL_RUN, "--arms", "fixed,ramp", "--seeds", "1-2"]
    kinds = ["program", "trainer", "both"] * 3
    for kind in kinds:
        program = start(*options, FAKE_DELAY="0.06")
        time.sleep(0.3 + 1.5 * rng.random())
        if kind != "trainer":
            program.kill()
        if kind != "program":
            end_trainers(signal.SIGKILL)
        program.terminate()
        program.communicate()
    end_trainers(signal.SIGTERM)
    require(len(calls()) > len(kinds) / 2, "too few runs were interrupted")
    require_run(0, *options)
    broken = {name: log_of(name) for name in ("fixed/seed1", "fixed/seed2", "ramp/seed1", "ramp/seed2")}
    shutil.rmtree("e")
    require_run(0, *options)
    for name, log in broken.items():
        require_equal(log_of(name), log, f"log of {name}")


def is_held(lock: Path) -> bool:
    try:
        with chinchilla.hold(lock):
            return False
    except BlockingIOError:
        return True


def end_trainers(number: signal.Signals) -> None:
    """Sends the signal to every trainer at work, and waits for their ends."""
    locks = [lock for lock in Path("e").glob("*/*/lock") if is_held(lock)]
    for lock in locks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(lock.read_text()), number)
    wait_for(lambda: not any(map(is_held, locks)), "the trainers' ends")


def test_two_programs() -> None:
    """A run is left alone while a trainer is at it, even if the program that started that was killed."""
    options = [*SMALL_RUN, "--arms", "fixed", "--seeds", "1-2"]
    program = start(*options, FAKE_DELAY="0.05")
    wait_for(lambda: chinchilla.read_position(Path("e/fixed/seed1")).tokens > 0, "the first run")
    program.kill()
    program.communicate()
    trainer = Path("e/fixed/seed1/lock").read_text().strip()
    said = require_run(1, *options)
    require(f"fixed/seed1 WAITS: process {trainer} is training it" in said and "1 of 2 runs are done" in said, said)
    end_trainers(signal.SIGTERM)
    require_run(0, *options)
    require_equal(calls(), ["fixed/seed1", "fixed/seed2", "fixed/seed1"], "runs")


def test_gpus() -> None:
    """One run on each GPU at a time, those that are made from others after them; Ctrl-C saves all that are at work."""
    arms = "fixed,ramp,gns,replay,fitted"
    options = [*SMALL_RUN, "--arms", arms, "--gpus", "0,2-3"]
    program = start(*options, FAKE_DELAY="0.2")
    first = [Path(f"e/{arm}/seed1") for arm in ("fixed", "ramp", "gns")]
    wait_for(lambda: all(chinchilla.read_position(run).tokens > 0 for run in first), "three runs at once")
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate()
    require(program.returncode == 130 and "10 of 10 runs left" in said, said)
    require(all((run / "checkpoints/latest").exists() for run in first), said)
    said = require_run(0, *options, FAKE_DELAY="0.02")
    require(
        re.search(r"\d/10 \S+ [\d.]+% loss [\d.]+, \d/10 \S+ .* \| all [\d.]+% of .* \| ETA \d+s", said) is not None,
        said,
    )
    require_equal(sorted(calls()[3:]), sorted(f"{a}/seed{n}" for a in arms.split(",") for n in (1, 2)), "runs")
    at_work: dict[str, str] = {}
    used = set()
    for gpu, event, name in (line.split() for line in Path("e/gpus.txt").read_text().splitlines()):
        expected = None if event == "begins" else name
        require_equal(at_work.pop(gpu, None), expected, f"what GPU {gpu} is at when {name} {event}")
        if event == "begins":
            used.add(gpu)
            at_work[gpu] = name
    require_equal(used, {"0", "2", "3"}, "GPUs")


def test_progress() -> None:
    """Lines in a file; one line, refreshed and cut to the width, on a terminal."""
    said = require_run(0, *SMALL_RUN, "--arms", "fixed", "--seeds", "1-2", FAKE_DELAY="0.02")
    line = r"^2/2 fixed/seed2 [\d.]+% loss \d\.\d{4} \| all ([\d.]+)% of 400K tokens \| [\d.]+K tok/s \| ETA \d+s$"
    shares = [float(share) for share in re.findall(line, said, re.MULTILINE)]
    require(len(shares) >= 3 and shares == sorted(shares) and shares[0] >= 50 and shares[-1] <= 100, said)
    shutil.rmtree("e")
    master, slave = pty.openpty()
    words = [sys.executable, str(ROOT / "scripts/chinchilla.py"), *SMALL_RUN, "--trainer", "./fake", "--out", "e"]
    environment = os.environ | {"FAKE_DELAY": "0.03", "COLUMNS": "40"}
    program = subprocess.Popen([*words, "--arms", "fixed", "--seeds", "1"], stdout=slave, env=environment)
    program.wait()
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    refreshed = re.findall(r"\r([^\r\n]*)\x1b\[K", shown)
    require(any(text.startswith("1/1 fixed/seed1") and len(text) == 39 for text in refreshed), repr(shown))
    require("\r\x1b[Kall 1 runs are done" in shown, repr(shown))


def test_reader_gone() -> None:
    """What `chinchilla.py ... | head -1` leaves: all runs, and nothing said of a broken pipe."""
    words = [sys.executable, str(ROOT / "scripts/chinchilla.py"), *SMALL_RUN, "--trainer", "./fake", "--out", "e"]
    for more in ([], ["--dry-run"]):
        program = subprocess.Popen([*words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert program.stdout and program.stderr
        program.stdout.readline()
        program.stdout.close()
        said = program.stderr.read()
        require(program.wait() == 0 and not said, f"status {program.returncode}: {said}")
    require_equal(len(calls()), 6, "runs")


def test_real_trainer() -> None:
    """What has to be equal across arms is equal, and a replay repeats its original: a closed loop that asks for 100
    times the noise scale and smooths over 40 steps, so that it rises in so short a run on whatever text (the text is
    that of this project's sources, which changes with them), and that is then put in the place of gns."""
    write_tokens(Path("val.bin"), Path("own_val.bin").read_bytes()[1024:9024:2])
    options = ["tiny", "--budget", "60K", "--data", "own_train.bin", "val.bin", "--trainer", str(TRAINER), "--arms"]
    require_run(0, *options, "fixed", "--arm", "loop=gns --gns-scale 100 --gns-tau 10K")
    Path("e/loop").rename("e/gns")
    require_run(0, *options, "replay")
    first_loss: dict[str, set[str]] = {}
    for path in Path("e").glob("*/*/output.txt"):
        found = re.search(r"eval at 0 tokens \| val loss ([\d.]+)", path.read_text())
        first_loss.setdefault(path.parent.name, set()).add(found[1] if found else f"none in {path}")
    require(all(len(losses) == 1 for losses in first_loss.values()), f"losses of equal initial weights: {first_loss}")
    require(first_loss["seed1"] != first_loss["seed2"], "two seeds have the same initial weights")
    for seed, other in ((1, 2), (2, 1)):
        sizes = column(f"gns/seed{other}", "batch")
        require(len(set(sizes)) >= 3, f"the closed loop took the sizes {set(sizes)} only")
        for name in ("batch", "tokens_processed", "lr"):
            require_equal(column(f"replay/seed{seed}", name), column(f"gns/seed{other}", name), f"{name} of a replay")
    rows = chinchilla.read_columns(Path("e/gns/seed1"), "tokens_processed", "batch", "val/loss")
    for tokens, batch, loss in rows[:-1]:  # 29.3 fixed batches, about 20 evaluations: at each
        crossed = int(tokens) // BATCH_TOKENS > (int(tokens) - 64 * int(batch)) // BATCH_TOKENS
        require(crossed == bool(loss), f"evaluated at {tokens} tokens: {bool(loss)}")


def test_wrong_usage(message: str, *arguments: str) -> None:
    status, said = run(*arguments)
    require(status == 2, f"status {status} instead of 2: {said}")
    require(said.count("\n") == 1 and said.startswith("error: ") and message in said, f"not '{message}' alone: {said}")


TESTS: list[tuple[Callable[..., None], *tuple[str, ...]]] = [
    (test_first_crossing,),
    (test_fitted_budget,),
    (test_replay_schedule,),
    (test_replay_needs_every_row,),
    (test_position,),
    (test_numbers,),
    (test_paper_plan,),
    (test_plan_file,),
    (test_other_experiment_is_refused,),
    (test_all_runs,),
    (test_failure,),
    (test_made_from_other_runs,),
    (test_ctrl_c,),
    (test_kills,),
    (test_two_programs,),
    (test_gpus,),
    (test_progress,),
    (test_reader_gone,),
    (test_real_trainer,),
    (test_wrong_usage, "invalid choice: 'huge'", "huge"),
    (test_wrong_usage, "the following arguments are required: size",),
    (test_wrong_usage, "small needs --data", "small"),
    (test_wrong_usage, "no token file matches 'none.bin'", "small", "--data", "none.bin", "none.bin"),
    (test_wrong_usage, "'fake' is not a token file", "small", "--data", "fake", "fake"),
    (test_wrong_usage, "more than 524,288 are needed", "small", "--data", "own_train.bin", "own_val.bin"),
    (test_wrong_usage, "the arm 'rump' is unknown", "tiny", "--arms", "rump"),
    (test_wrong_usage, "the arm 'ramp@lrx' is unknown", "tiny", "--arms", "ramp@lrx"),
    (test_wrong_usage, "there is an arm of that name", "tiny", "--arm", "gns=gns --gns-power 1"),
    (test_wrong_usage, "each --name with its value", "tiny", "--arm", "loop=gns --gns-power"),
    (test_wrong_usage, "was refused: error: unknown option '--gns-pover'", "tiny", "--arm", "a=gns --gns-pover 1"),
    (test_wrong_usage, "expected numbers and ranges", "tiny", "--seeds", "3-1"),
    (test_wrong_usage, "--gpus 'all': expected numbers and ranges", "tiny", "--gpus", "all"),
    (test_wrong_usage, "expected factors", "tiny", "--lr-sweep", "2x"),
    (test_wrong_usage, "this machine's number and how many", "tiny", "--only", "3/2"),
    (test_wrong_usage, "--budget '5X': expected a number", "tiny", "--budget", "5X"),
    (test_wrong_usage, "the trainer 'none' is not there", "tiny", "--trainer", "none"),
    (test_wrong_usage, "the trainer 'own_val.bin' is not there", "tiny", "--trainer", "own_val.bin"),
    (test_wrong_usage, "'own_val.bin': File exists; --out, --data", "tiny", "--out", "own_val.bin"),
    (test_wrong_usage, "Is a directory; --out, --data", "tiny", "--data", ".", "."),
    (test_wrong_usage, "has --lr 'abc': expected a number", "tiny", "--arm", "x=fixed --lr abc", "--lr-sweep", "2"),
    (test_wrong_usage, "No closing quotation; close what is quoted", "tiny", "--arm", "a=gns --prompt 'x"),
    (test_wrong_usage, "--seed is set for each run by this program", "tiny", "--arm", "a=gns --seed 7"),
    (test_wrong_usage, "an arm needs a budget; leave --max-tokens out", "tiny", "--arm", "a=gns --max-tokens ''"),
    (test_wrong_usage, "has the budget of what it replays", "tiny", "--arm", "a=replay --max-tokens 9K"),
    (test_wrong_usage, "expected to print a number of steps", "tiny", "--trainer", "/bin/true"),
    (test_wrong_usage, "there is one only; give two --seeds", "tiny", "--arms", "replay", "--seeds", "1"),
]  # fmt: skip


def write_tokens(path: Path, tokens: bytes) -> None:
    header = struct.pack("<4I", 20240520, 1, len(tokens), 257).ljust(1024, b"\0")
    path.write_bytes(header + b"".join(token.to_bytes(2, "little") for token in tokens))


def prepare() -> None:
    """The fake trainer, and token files, in the present folder. Ctrl-C reaches our children even if it does not reach
    us, whom a shell may have started in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for program in ("train_gpt", "build/text_to_tokens"):
        if not (ROOT / program).is_file():
            sys.exit(f"error: {program} is not there; make {program}")
    fake = Path("fake")
    fake.write_text(FAKE)
    fake.chmod(0o755)
    subprocess.run([ROOT / "scripts/own_text.sh", Path("own").resolve()], check=True, capture_output=True)
    write_tokens(Path("big.bin"), bytes(600_000))


def remove_experiments() -> None:
    for leftover in ("e", "first"):
        shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_tests(TESTS, prepare, remove_experiments))
