"""Speed of whole training steps on this machine's GPU, ours beside llm.c's CUDA trainer (`make bench-gpu`).

    python3 dev/bench/gpu_step.py [SECTION ...] [--llmc FOLDER]      without a section: all of them; see also --help

    d12 c768 d24 d48   steps of half a million tokens (d48: 131,072, with --recompute 1), `--gns ln`, beside those of
                       train_gpt2cu and train_gpt2cu_cudnn in FOLDER (dev/bench/llmc_gpu.sh builds both)
    gns                what `--gns ln` adds to a step of d12, against `--gns off`, in pairs
    gns-all            the same for `--gns all`
    small              steps of 16 sequences against steps of 120, cgpt:111m, micro-batches of 8: what a step costs
                       besides its tokens

Programs take turns: a round runs every one once, and each round begins with the next one, because the GPU's clock
drifts as it warms up. A run is a process of its own on the same random tokens; its time is the median of its steps
after the first few. A ratio compares two runs of a round; printed are its mean over the rounds and, from two rounds
on, its 95% t-interval. Times are the programs' own: log.csv's dt here, llm.c's "ms" there, each from the fetching of
the tokens to the end of the update. Our trainer is killed once log.csv has the steps, as it would save a checkpoint at
its end.

TFLOP/s counts the model's arithmetic alone, as llmc/flops.h does: the same multiple of tokens/s in each program.
Memory is the most that the GPU had in use during the run (NVML, asked 20 times a second), less what it had before.

Exit status: 0; 1 if a program failed, whose last line is then shown; 2 if the command line is wrong. Needs Python 3.10.
"""

import argparse
import array
import csv
import ctypes
import importlib.metadata
import importlib.util
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

VOCAB = 50257
NUM_TOKENS = 1 << 23  # in the token file
# Student's t for a 95% interval, by degrees of freedom, from 1.
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145]


class Shape(NamedTuple):
    title: str
    model: str
    L: int
    C: int
    V: int
    T: int
    B: int  # sequences in a micro-batch
    step_tokens: int
    recompute: int

    def flops_per_token(self) -> float:
        return 6 * (self.L * 12 * self.C**2 + self.V * self.C) + 6 * self.L * self.C * (self.T + 1)


D12 = Shape("d12, T 1024, B 64", "d12", 12, 768, VOCAB, 1024, 64, 524288, 0)
SHAPES = {
    "d12": D12,
    "c768": Shape("gpt3:c768, T 2048, B 32", "gpt3:c768", 12, 768, VOCAB, 2048, 32, 524288, 0),
    "d24": Shape("d24, T 1024, B 32", "d24", 24, 1024, VOCAB, 1024, 32, 524288, 0),
    "d48": Shape("d48, T 1024, B 16, recompute 1", "d48", 48, 1600, VOCAB, 1024, 16, 131072, 1),
}
SMALL = Shape("cgpt:111m, T 2048, B 8", "cgpt:111m", 10, 768, 50304, 2048, 8, 0, 0)
SECTIONS = [*SHAPES, "gns", "gns-all", "small"]


class Failure(Exception):
    """A program did not do what it should; the text says what."""


class Run(NamedTuple):
    seconds: float  # of a step
    tokens_per_second: float
    memory: float | None  # bytes


# ----------------------------------------------------------------------------------------------------------------------
# The GPU's memory


class DeviceMemory:
    """What the first GPU has in use, by NVML, the library that nvidia-smi asks; nothing where there is none."""

    class Info(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    def __init__(self):
        self.handle = ctypes.c_void_p()
        try:
            self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self.found = self.nvml.nvmlInit_v2() == 0
            self.found = self.found and self.nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle)) == 0
        except OSError:
            self.found = False
        self.idle = self.settled()

    def settled(self) -> int:
        """What is in use once a program that has just ended has given its memory back: no less for a second."""
        least, since = self.used(), time.monotonic()
        while self.found and time.monotonic() - since < 1:
            time.sleep(0.05)
            if self.used() < least:
                least, since = self.used(), time.monotonic()
        return least

    def used(self) -> int:
        info = self.Info()
        if self.found and self.nvml.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(info)) != 0:
            self.found = False
        return info.used

    def name(self) -> str:
        text = ctypes.create_string_buffer(96)
        known = self.found and self.nvml.nvmlDeviceGetName(self.handle, text, 96) == 0
        return text.value.decode() if known else "unknown GPU"


class PeakMemory:
    """The most memory in use while the `with` block runs, above what was in use when the benchmark began."""

    def __init__(self, device: DeviceMemory):
        self.device = device
        self.highest = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while self.device.found and not self.done.wait(0.05):
            self.highest = max(self.highest, self.device.used())

    def __enter__(self) -> "PeakMemory":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()

    def bytes(self) -> float | None:
        return max(0, self.highest - self.device.idle) if self.device.found else None


# ----------------------------------------------------------------------------------------------------------------------
# Programs


def write_tokens(path: Path) -> None:
    """A token file (llmc/dataloader.h) with random tokens, always the same ones."""
    header = array.array("i", [20240520, 1, NUM_TOKENS, VOCAB] + 252 * [0])
    source = random.Random(42)
    tokens = array.array("H")
    while len(tokens) < NUM_TOKENS:
        tokens.extend(t for t in array.array("H", source.randbytes(1 << 20)) if t < VOCAB)
    path.write_bytes(header.tobytes() + tokens[:NUM_TOKENS].tobytes())


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip() if lines else ""


def execute(command: list[str], folder: Path, limit: float, env=None, until=None) -> Path:
    """Runs the command with its output in files in the folder; returns that of stdout. until(): once it is true, the
    program has done enough and is killed. Failure if it ends before that or with an error, or takes too long."""
    output, errors = folder / "stdout", folder / "stderr"
    start = time.monotonic()
    with output.open("w") as out, errors.open("w") as err:
        try:
            program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        except OSError as error:
            raise Failure(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        while program.poll() is None and not (until and until()):
            if time.monotonic() - start > limit:
                raise Failure(f"not done after {limit:g} s (--limit); its last line: {last_line(output)}")
            time.sleep(0.02)
        status = program.poll()
        if status is None or (until and until()):
            return output
        if status != 0 or until:
            raise Failure(f"ended with status {status}: {last_line(errors) or last_line(output)}")
        return output
    finally:
        program.kill()
        program.wait()


class Bench:
    """The machine, the programs and the settings of the command line."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args = args
        self.folder = folder
        self.memory = DeviceMemory()
        self.failed = False
        self.tokens = folder / "tokens.bin"
        write_tokens(self.tokens)

    def ours(self, shape: Shape, gns: str, skip: int, steps: int) -> Run:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            log = folder / "run" / "log.csv"
            command = [self.args.ours, "-i", str(self.tokens), "-o", str(folder / "run"), "--log-tensors", "off"]
            command += ["-e", shape.model, "-t", str(shape.T), "-b", str(shape.B), "-d", str(shape.step_tokens)]
            command += ["--recompute", str(shape.recompute), "--gns", gns, "-x", str(1000 * (skip + steps))]

            def enough() -> bool:
                return log.exists() and log.read_bytes().count(b"\n") > skip + steps

            with PeakMemory(self.memory) as peak:
                execute(command, folder, self.args.limit, until=enough)
            with log.open() as file:
                rows = list(csv.DictReader(file))[: skip + steps]
        if any(row["skipped"] != "0" or not math.isfinite(float(row["train/lossf"])) for row in rows):
            raise Failure("a step's update was skipped or its loss is not finite")
        return self.run_of(shape, [float(row["dt"]) for row in rows], skip, peak)

    def llmc(self, program: Path, env, shape: Shape, skip: int, steps: int) -> Run:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            command = [str(program), "-i", str(self.tokens), "-j", str(self.tokens), "-v", "100000", "-m", "1"]
            command += ["-e", shape.model, "-t", str(shape.T), "-b", str(shape.B), "-d", str(shape.step_tokens)]
            command += ["-r", str(shape.recompute), "-s", "0", "-h", "0", "-x", str(skip + steps)]
            with PeakMemory(self.memory) as peak:
                output = execute(command, Path(name), self.args.limit, env).read_text(errors="replace")
        found = re.findall(r"^step +\d+/\d+ \| loss +(\S+) .*?\| +([0-9.]+) ms \|", output, re.MULTILINE)
        if len(found) != skip + steps:
            raise Failure(f"printed {len(found)} steps, not {skip + steps}; is this llm.c's train_gpt2cu?")
        if not all(math.isfinite(float(loss)) for loss, _ in found):
            raise Failure("a step's loss is not finite")
        return self.run_of(shape, [1e-3 * float(ms) for _, ms in found], skip, peak)

    def run_of(self, shape: Shape, times: list[float], skip: int, peak: PeakMemory) -> Run:
        seconds = statistics.median(times[skip:])
        return Run(seconds, shape.step_tokens / seconds, peak.bytes())

    def rounds(self, title: str, programs: dict, count: int) -> dict[str, list[Run]]:
        """Runs every program `count` times, in turns; a program that fails is reported and has no runs."""
        runs: dict[str, list[Run]] = {name: [] for name in programs}
        for i in range(count):
            order = list(programs)[i % len(programs) :] + list(programs)[: i % len(programs)]
            for name in order:
                if name not in runs:
                    continue
                start = time.monotonic()
                try:
                    run = programs[name]()
                except Failure as failure:
                    print(f"error: {title}: {name}: {failure}", file=sys.stderr, flush=True)
                    self.failed = True
                    del runs[name]
                    continue
                runs[name].append(run)
                note(f"{title}, round {i + 1}: {name}: {run.tokens_per_second:,.0f} tok/s", start)
        return runs


def note(text: str, start: float) -> None:
    print(f"  {text} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def interval(values: list[float], unit: float, form: str, suffix: str) -> str:
    """The mean and, of two values or more, the half-width of its 95% confidence interval (Student's t)."""
    text = f"{unit * statistics.fmean(values):{form}}{suffix}"
    n = len(values)
    if n < 2:
        return text
    return text + f" +- {unit * T95[n - 2] * statistics.stdev(values) / math.sqrt(n):{form.lstrip('+')}}{suffix}"


def print_row(title: str, name: str, runs: list[Run], shape: Shape, comparison: str) -> None:
    speed = statistics.median(run.tokens_per_second for run in runs)
    milliseconds = 1e3 * statistics.median(run.seconds for run in runs)
    memory = [run.memory for run in runs if run.memory is not None]
    gib = f"{max(memory) / 2**30:.1f}" if memory else "--"
    tflops = speed * shape.flops_per_token() * 1e-12
    print(f"{title:<32}{name:<22}{speed:>10,.0f}{milliseconds:>11.2f}{tflops:>9.1f}{gib:>8}  {comparison}", flush=True)


def print_heading(comparison: str) -> None:
    columns = f"{'tokens/s':>10}{'ms a step':>11}{'TFLOP/s':>9}{'GiB':>8}"
    print(f"\n{'training step':<32}{'program':<22}{columns}  {comparison}", flush=True)


def compare(bench: Bench, shape: Shape, programs: dict, against: str, count: int, comparison) -> None:
    """Runs the programs; prints a row for each, with the comparison of its runs with those of the program `against`."""
    runs = bench.rounds(shape.title, programs, count)
    title = shape.title
    for name in programs:
        if name not in runs:
            print(f"{title:<32}{name:<22}{'failed':>10}", flush=True)
        elif name == against or against not in runs:
            print_row(title, name, runs[name], shape, "")
        else:
            print_row(title, name, runs[name], shape, comparison(runs[against], runs[name]))
        title = ""


def faster(ours: list[Run], other: list[Run]) -> str:
    return interval([a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, other)], 1, ".3f", "")


def more_time(base: list[Run], more: list[Run]) -> str:
    return interval([b.seconds / a.seconds - 1 for a, b in zip(base, more)], 100, "+.2f", "%")


def speed_share(base: list[Run], other: list[Run]) -> str:
    return interval([b.tokens_per_second / a.tokens_per_second for a, b in zip(base, other)], 100, ".2f", "%")


# ----------------------------------------------------------------------------------------------------------------------
# Sections


def find_llmc(folder: str | None) -> dict:
    """llm.c's programs in the folder, by the name they have in the table, with the environment that they need."""
    if folder is None:
        print("llm.c is left out: no --llmc FOLDER (dev/bench/llmc_gpu.sh builds it)")
        return {}
    env = dict(os.environ)
    try:  # the package that llmc_gpu.sh takes cuDNN from
        cudnn = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        cudnn = None
    if cudnn is not None:
        paths = [f"{path}/lib" for path in cudnn.submodule_search_locations]
        env["LD_LIBRARY_PATH"] = ":".join(paths + [p for p in [env.get("LD_LIBRARY_PATH")] if p])
        packages = [d for d in importlib.metadata.distributions() if d.name.startswith("nvidia-cudnn")]
        print("cuDNN for llm.c:", ", ".join(f"{package.name} {package.version}" for package in packages))
    found = {}
    for name, file in (("llm.c, cuDNN", "train_gpt2cu_cudnn"), ("llm.c, own attention", "train_gpt2cu")):
        program = Path(folder).resolve() / file
        if program.exists():
            found[name] = (program, env if file.endswith("cudnn") else None)
        else:
            print(f"{name} is left out: there is no {program}")
    return found


def run_shape(bench: Bench, shape: Shape, peers: dict) -> None:
    skip, steps = bench.args.skip, bench.args.steps
    programs = {"ours, --gns ln": lambda: bench.ours(shape, "ln", skip, steps)}
    for name, (program, env) in peers.items():
        programs[name] = lambda program=program, env=env: bench.llmc(program, env, shape, skip, steps)
    compare(bench, shape, programs, "ours, --gns ln", bench.args.rounds, faster)


def run_gns(bench: Bench, gns: str) -> None:
    skip, steps = bench.args.skip, bench.args.steps
    programs = {f"--gns {g}": lambda g=g: bench.ours(D12, g, skip, steps) for g in ("off", gns)}
    print_heading("more time than --gns off")
    compare(bench, D12, programs, "--gns off", bench.args.pairs, more_time)


def run_small(bench: Bench) -> None:
    """A step of 16 sequences is 7.5 times as short as one of 120, so there are 7 times as many."""
    programs = {}
    for sequences, factor in ((120, 1), (16, 7)):
        shape = SMALL._replace(step_tokens=sequences * SMALL.T)
        skip, steps = factor * bench.args.skip, factor * bench.args.steps
        programs[f"{sequences} sequences"] = lambda s=shape, k=skip, n=steps: bench.ours(s, "ln", k, n)
    print_heading("share of the speed at 120")
    compare(bench, SMALL, programs, "120 sequences", bench.args.pairs, speed_share)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of: {' '.join(SECTIONS)}")
    parser.add_argument("--ours", default="./train_gptcu", metavar="PROGRAM", help="our trainer")
    parser.add_argument("--llmc", metavar="FOLDER", help="with train_gpt2cu and train_gpt2cu_cudnn")
    parser.add_argument("--rounds", type=int, default=3, help="of the sections with llm.c")
    parser.add_argument("--pairs", type=int, default=5, help="of the other sections")
    parser.add_argument("--steps", type=int, default=8, help="that are timed in a run")
    parser.add_argument("--skip", type=int, default=3, help="steps that come before them")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a run may take")
    args = parser.parse_args()
    for section in args.sections:
        if section not in SECTIONS:
            parser.error(f"unknown section '{section}': expected any of {' '.join(SECTIONS)}")
    for name in ("rounds", "pairs"):
        if not 1 <= getattr(args, name) <= len(T95) + 1:
            parser.error(f"--{name} must be 1 to {len(T95) + 1}")
    if args.steps < 1 or args.skip < 0:
        parser.error("--steps must be 1 or more, --skip 0 or more")
    if not Path(args.ours).exists():
        parser.error(f"there is no {args.ours}: `make train_gptcu` builds it, --ours names another one")
    args.ours = str(Path(args.ours).resolve())
    return args


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))  # by way of execute(), which kills the program at hand
    sections = args.sections or SECTIONS
    with tempfile.TemporaryDirectory(prefix="gpu_step_") as folder:
        bench = Bench(args, Path(folder))
        shapes = [SHAPES[section] for section in sections if section in SHAPES]
        print(f"{bench.memory.name()}; bf16; median of {args.steps} steps after {args.skip}")
        if not bench.memory.found:
            print("memory is left out: there is no NVML (libnvidia-ml.so.1)")
        if shapes:
            peers = find_llmc(args.llmc)
            print_heading("our speed / its speed")
        for shape in shapes:
            run_shape(bench, shape, peers)
        for section, gns in (("gns", "ln"), ("gns-all", "all")):
            if section in sections:
                run_gns(bench, gns)
        if "small" in sections:
            run_small(bench)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
