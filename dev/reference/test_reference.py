"""Does the trainer agree with the reference, and would the check notice if it did not? `N passed, N failed` at the end.

    python3 dev/reference/test_reference.py        after make train_gpt build/text_to_tokens; about a minute

Trains small models on this project's README (byte tokens, made by build/text_to_tokens) in a temporary folder, with a
checkpoint after every step, and requires check.py to agree with its own tolerances: freely from the seed for the first
steps, teacher-forced for every step. Then changes one number of a run at a time, each of which must be noticed.

Why these shapes. The tolerances (1e-5 of a norm) are to hold in float32 for every tensor, also for those whose gradient
is a thousandth of the whole. Rounding makes 1e-7 to 1e-6 of it (1.2e-6 at most in 16 seeds) as long as the inputs of
LayerNorm, which divides by their size, are not small: where training takes some token's embedding close to zero (here,
at a learning rate of 3e-3, after two dozen steps), the digits that cancelled are lost to float32 in any program. So
learning rates are 1e-3 or less and runs short; the closed loop, which needs 50 steps before it moves, has a tenth of
that. What makes mistakes visible is in the shapes: two blocks, two heads, sequences shorter than the model's longest, a
padded vocabulary, batches that no micro-batch divides.
"""

import contextlib
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import check
from files import HEADER_WORDS, MODEL_MAGIC, checkpoint_folder, model_of, permute, read_config, read_header, read_log
from files import read_model
from initial_weights import initial_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "dev/test"))
from suite import require, run_tests  # noqa: E402

DATA = ["-i", "data/readme_train.bin"]
EVERY_STEP = ["--checkpoint-every", "1tokens", "--keep", "0"]
SHAPE = ["-e", "L=2,H=2,C=32,T=32", "-t", "24", "-b", "3", "-d", "192"]
MEASURED = {"loss", "grad_norm", "norm", "pegn", "gtg", "trsigma", "gns", "se", "schedule", "log"}
STATES = {"weights", "m", "v", "key_bias"}

# What each run is there for beside `all of them`: the arguments of the trainer.
RUNS = {
    # Uneven micro-batches (2, 3 and 3 sequences), clipping, validation.
    "plain": [
        *DATA, *SHAPE, "-j", "data/readme_val.bin", "-v", "3", "--val-tokens", "480", "--gns", "all", "-x", "8",
        "--lr", "1e-3", "-u", "2", "-k", "linear", "-q", "0.1", "-c", "0.1", "--grad-clip", "0.8",
    ],
    # The paper's model and schedule, every coupling, all tensors measured in some steps only.
    "paper": [
        *DATA, *SHAPE, "--gelu", "erf", "--cosine-attention", "1", "--init", "truncated",
        "--batch-schedule", "linear:2:12", "--batch-quantum", "2", "--gns", "ln", "--gns-all-every", "3", "-x", "8",
        "--lr", "1e-3", "-u", "1", "-k", "wsd", "-q", "0", "-c", "0.1",
        "--beta2-half-life", "2K", "--lr-coupling", "0.5", "--wd-coupling", "1",
    ],
    # Weights and multipliers from a model file, knots from a file, a cosine learning rate.
    "multipliers": [
        *DATA, "-e", "multipliers.bin", "-t", "32", "-b", "4", "-d", "160", "--batch-schedule", "file:knots.csv:2",
        "--gns", "all", "-x", "8", "--lr", "3e-4", "-k", "cosine", "-q", "0.5",
    ],
    # One example in the first steps, another seed, no clipping, not every step logged.
    "steps": [
        *DATA, *SHAPE, "--seed", "7", "--batch-schedule", "steps:0:1,96:7", "--gns", "ln", "--log-tensors", "all",
        "--log-every", "2", "--gns-tau", "1K", "-x", "6", "--lr", "1e-3", "-k", "constant", "--grad-clip", "0",
    ],
    # The batch follows the noise scale, which it may do from the 50th step on.
    "closed_loop": [
        *DATA, *SHAPE, "--batch-schedule", "gns", "--batch-min", "2", "--gns-scale", "100", "--gns", "ln",
        "--gns-all-every", "5", "--gns-tau", "500", "-x", "32", "--lr", "1e-4",
    ],
}  # fmt: skip


def train(name: str, arguments: list[str]) -> None:
    """Runs the trainer in the present folder, into the folder `name`."""
    command = [str(ROOT / "train_gpt"), *arguments, "-o", name, *EVERY_STEP]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: '{' '.join(command)}' ended with {done.returncode}: {done.stderr.strip()}")


def prepare() -> None:
    """Tokens, the model file and the schedule's file that RUNS name, and the runs, in the present folder."""
    for program in ("train_gpt", "build/text_to_tokens"):
        if not (ROOT / program).is_file():
            sys.exit(f"error: {program} is not there; make {program}")
    os.mkdir("data")
    make_tokens = [str(ROOT / "build/text_to_tokens"), "--out", "data/readme", str(ROOT / "README.md")]
    subprocess.run(make_tokens, check=True, capture_output=True)
    for name, arguments in RUNS.items():
        if name == "multipliers":
            Path("knots.csv").write_text("# tokens, pairs of sequences\n0, 1\n500, 2.5\n1_000 4\n")
            write_multipliers(checkpoint_folder(Path("plain"), 4) / "model.bin", Path("multipliers.bin"))
        train(name, arguments)


def write_multipliers(model: Path, copy: Path) -> None:
    """A copy of a model file that multiplies embedding, residual branches, scores and logits; with the erf GELU, and
    with all weights three times as large, where the two forms of GELU differ."""
    header = read_header(model, MODEL_MAGIC)
    header[8] = 1
    header[13:17] = np.array([2.5, 0.7, 1.5, 0.6], "<f4").view("<i4")
    copy.write_bytes(header.tobytes() + (3 * np.fromfile(model, "<f4")[HEADER_WORDS:]).tobytes())


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def run_check(*arguments: str) -> tuple[int, str, str]:
    """check.py's exit status, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = check.main(list(arguments))
    return status, out.getvalue(), err.getvalue()


def require_agreement(quantities: set[str], *arguments: str) -> str:
    """The output of a check that must agree and must have compared these quantities."""
    status, out, err = run_check(*arguments)
    require(status == 0, f"status {status}\n{out}{err}")
    compared = {line.split()[0] for line in out.splitlines() if re.match(r"\w+ +[1-9]\d* +\d\.", line)}
    require(compared == quantities, f"compared {sorted(compared)}, expected {sorted(quantities)}\n{out}")
    return out


def expected_of(name: str) -> set[str]:
    """A log that leaves out steps cannot be compared with itself."""
    return MEASURED - {"log"} if "--log-every" in RUNS[name] else MEASURED


def test_order_of_the_data() -> None:
    vectors = {
        (0, 0, 10): [6, 9, 2, 7, 1, 4, 0, 8, 3, 5],
        (0, 1, 10): [4, 6, 9, 2, 1, 3, 5, 8, 0, 7],
        (1, 0, 10): [1, 5, 0, 8, 3, 7, 2, 4, 6, 9],
        (42, 3, 1000): [485, 455, 505, 156, 128, 126, 174, 609, 530, 134],
        (2**64 - 1, 7, 10**12): [303138615449, 450786713445, 22682906792, 22571709787],
    }
    for key, expected in vectors.items():
        found = [permute(*key, i) for i in range(len(expected))]
        require(found == expected, f"permute{key}: {found}, expected {expected}")


def test_initial_weights() -> None:
    """Bit for bit but for the last bit of a logarithm or cosine: a first step at learning rate 0 leaves them alone."""
    for run in (Path("plain"), Path("paper")):
        options = read_config(run)
        config = model_of(options)
        ours = initial_weights(config, options["seed"], options["init"] == "truncated")
        for name, trainers in read_model(checkpoint_folder(run, 1) / "model.bin", config).items():
            worst = np.abs(ours[name] - trainers).max()
            require(worst <= 2e-8, f"{run} {name}: {worst:.1e} apart, of values up to {np.abs(trainers).max():.2f}")


def test_teacher_forced(name: str) -> None:
    require_agreement(expected_of(name) | STATES, name, "--teacher-forced")


def test_free(name: str) -> None:
    require_agreement(expected_of(name), name, "--steps", "8")


def test_from_a_checkpoint() -> None:
    require_agreement(MEASURED, "plain", "--steps", "3:7")


def test_closed_loop_moves() -> None:
    batches = {row["batch"] for row in read_log(Path("closed_loop/log.csv"))}
    require(len(batches) > 3, f"the batch took only the sizes {sorted(batches)}")


def test_own_log() -> None:
    """The reference's log has the trainer's columns in the trainer's order."""
    require_agreement(MEASURED, "plain", "--steps", "2", "--log", "reference.csv")
    ours, trainers = read_log(Path("reference.csv")), read_log(Path("plain/log.csv"))
    require(list(ours[0]) == list(trainers[0]), "other columns")
    require(len(ours) == 2 and abs(ours[1]["grad_norm"] / trainers[1]["grad_norm"] - 1) < 1e-6, f"rows {ours}")


def test_single_precision() -> None:
    require_agreement(MEASURED, "plain", "--steps", "2", "--precision", "float32")


# ----------------------------------------------------------------------------------------------------------------------
# Checks of the check: a copy of the run `plain` with one thing wrong in step 4


def broken_copy() -> Path:
    copy = Path("broken")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree("plain", copy)
    return copy


def change_log(column: str, factor: float) -> None:
    path, step = Path("broken/log.csv"), 4
    rows = list(csv.reader(path.open(newline="")))
    cell = rows[0].index(column)
    rows[step + 1][cell] = f"{float(rows[step + 1][cell]) * factor:.15g}"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def require_disagreement(quantity: str, where: str) -> None:
    for mode in (["--teacher-forced", "--steps", "4:5"], ["--steps", "6"]):
        if quantity in STATES and mode[0] != "--teacher-forced":
            continue
        status, out, err = run_check("broken", *mode)
        require(status == 1, f"status {status} instead of 1\n{out}{err}")
        require(f"DISAGREES: {quantity}, step 4, {where}" in out, f"{quantity} of {where} is not named\n{out}")


def test_changed_log(quantity: str, column: str, factor: float) -> None:
    broken_copy()
    change_log(column, factor)
    require_disagreement(quantity, column)


def test_changed_checkpoint(quantity: str, file: str, models_before: int) -> None:
    """The largest number of wte, which comes first, in the checkpoint after step 4. models_before: how many times the
    model's numbers stand in the file before it."""
    run = broken_copy()
    config, folder = model_of(read_config(run)), checkpoint_folder(run, 5)
    values = np.fromfile(folder / file, "<f4")
    size = (folder / "model.bin").stat().st_size // 4 - HEADER_WORDS
    wte = values[HEADER_WORDS + models_before * size :][: config.vocab_size * config.channels]
    wte[np.abs(wte).argmax()] *= 1.001
    values.tofile(folder / file)
    require_disagreement(quantity, "transformer.wte.weight")


def test_changed_option() -> None:
    config = broken_copy() / "config.json"
    config.write_text(config.read_text().replace('"weight-decay": 0.1', '"weight-decay": 0.2'))
    require_disagreement("weights", "transformer.wte.weight")


def test_wrong_usage(message: str, *arguments: str) -> None:
    status, out, err = run_check(*arguments)
    require(status == 2, f"status {status} instead of 2\n{out}{err}")
    require(err.count("\n") == 1 and message in err, f"expected one line with '{message}', found: {err}")


C_FC = "train/gns/transformer.h.1.mlp.c_fc.weight/"
TESTS: list[tuple[Callable, ...]] = [
    (test_order_of_the_data,),
    (test_initial_weights,),
    *((test_teacher_forced, name) for name in RUNS),
    *((test_free, name) for name in RUNS),
    (test_from_a_checkpoint,),
    (test_closed_loop_moves,),
    (test_own_log,),
    (test_single_precision,),
    (test_changed_log, "pegn", C_FC + "pegn", 1 + 1e-4),
    (test_changed_log, "norm", C_FC + "norm", 1 - 1e-4),
    (test_changed_log, "loss", "train/lossf", 1 + 1e-5),
    (test_changed_log, "grad_norm", "grad_norm", 1 + 1e-4),
    (test_changed_log, "log", "gns/mlp/se", 1 + 1e-6),
    (test_changed_log, "log", "gns/total/gtg", 1 + 1e-6),
    (test_changed_log, "schedule", "lr", 1 + 1e-6),
    (test_changed_checkpoint, "weights", "model.bin", 0),
    (test_changed_checkpoint, "m", "optimizer.bin", 0),
    (test_changed_checkpoint, "v", "optimizer.bin", 1),
    (test_changed_option,),
    (test_wrong_usage, "no readable config.json", "no_such_run"),
    (test_wrong_usage, "expected N or FROM:TO", "plain", "--steps", "3:3"),
    (test_wrong_usage, "expected one of loss", "plain", "--tolerance", "losses=1"),
    (test_wrong_usage, "unrecognized arguments", "plain", "--fast"),
    (test_wrong_usage, "the following arguments are required: run"),
    (test_wrong_usage, "has no step to compare", "plain", "--steps", "20:21", "--teacher-forced"),
]


if __name__ == "__main__":
    sys.exit(run_tests(TESTS, prepare))
