"""nanoGNS itself on the steps of one of our runs: a second opinion on every norm, from code that is not ours.

    python dev/nanogns.py NANOGNS/exact RUN --steps 0,1,2,20 --out FOLDER [--device cuda] [--started-in FOLDER]
    python dev/compare_logs.py RUN FOLDER --all --tol norm=1e-4 --tol pegn=1e-4

NANOGNS is a clone of https://github.com/CerebrasResearch/nanoGNS (arXiv 2411.00999), RUN the trainer's --out folder.
Step s, counted from 0, starts from RUN's checkpoint after s steps, step 0 from the initial weights, and takes the same
examples. A run with all checkpoints, of a model that nanoGNS has (the erf form of the GELU; cosine blocks are welcome):

    ./train_gpt ... --gelu erf --gns all --out RUN --checkpoint-every 1tokens --keep 0 --max-steps 21

What runs is nanoGNS's: the model, its layers that measure per-example norms (those of its --linearclass=gns
--embeddingclass=gns --lnclass=shim), and the classes that gather these norms and write log.csv. Its train.py draws
examples of its own, and as a single process it ends with "name 'ddp_gns_enabled' is not defined"; so the piece of its
loop between the batch and the update is done here, in float32, TF32 off, uncompiled: a backward pass of (mean loss /
number of micro-batches) for each micro-batch, the norms, the norm of the whole gradient before clipping.

Its layers add up u = sum_b |g_b / n|^2 over the micro-batches, and n; the log's pegn is sqrt(n u), as every g_b arrives
divided by the n examples of the step. That needs micro-batches of one size, as its train.py has: here the largest up to
--micro-batch that divides n. log.csv holds the step, the norms, train/lossf (of the last micro-batch, as nanoGNS logs
it), grad_norm, gradient_accumulation_steps, iter_num and tokens_processed.

What to expect of the comparison: rounding alone, but for two things that compare_logs.py knows and does not judge
(wte's pegn, of the embedding's half; the loss of several micro-batches). On a CPU PyTorch sums a norm in float32 so
that wte's is off by 1e-5 with a vocabulary of hundreds and by 1e-4 with one of 50,257. The smoothed gns and gns_se are
comparable where --steps has all steps from 0 on; else leave them out: --tol gns=1 --tol gns_se=1e9.

Exit status: 0, or 2 where the command or a file is wrong. Needs PyTorch, and the packages of scripts/requirements.txt.
"""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "reference"))
try:
    import numpy as np
    import torch
    from check import Parser, state_before
    from files import Fault, LogRow, read_log
    from gpt import GPTConfig
    from train import Run, State, open_run, plan_of, set_up_jax
except ModuleNotFoundError as error:
    hint = "pip install torch" if error.name == "torch" else "pip install -r scripts/requirements.txt"
    print(f"error: this needs the package '{error.name}', found none; {hint}", file=sys.stderr)
    sys.exit(2)


@dataclass(frozen=True)
class NanoGNS:
    """Objects of nanoGNS's own classes."""

    model: torch.nn.Module  # GPT, on the device
    tracker: Any  # gnstracking.MeasurementTracker: norm and pegn of every tensor, from the gradients and the layers
    measured: Any  # gnstracking.AccumulateMeasurements: the columns of them
    zero_norms: Callable[[torch.nn.Module], None]  # buffered.zero_sqgradnorm_buffers: forgets a step's norms


def check_model(config: GPTConfig) -> None:
    """nanoGNS's model has one form of the GELU and no multipliers."""
    multipliers = (config.embed_mult, config.residual_mult, config.attn_mult, config.logit_mult)
    if config.gelu != "erf" or multipliers != (1, 1, 1, 1):
        raise Fault("nanoGNS's model has the erf form of the GELU and multipliers of 1, the run's has the "
                    f"{config.gelu} form and {multipliers}; train with --gelu erf and no multipliers")


def build(exact: Path, config: GPTConfig, device: str) -> NanoGNS:
    """Imports nanoGNS's modules and makes their objects, as its train.py does."""
    if not (exact / "buffered.py").is_file():
        raise Fault(f"'{exact}' has no buffered.py, expected nanoGNS's folder exact; clone "
                    "https://github.com/CerebrasResearch/nanoGNS")
    sys.path.append(str(exact))
    import buffered
    import gnstracking
    import layer_config

    with layer_config.set_contextual_config(
        Linear=buffered.PEGradNormLinear,
        Embedding=buffered.PEGradNormEmbedding,
        LayerNorm=buffered.PEGradNormSeparatedLayerNorm,
    ):
        from model import GPT
        from model import GPTConfig as Shape

        model = GPT(Shape(block_size=config.max_seq_len, vocab_size=config.vocab_size, n_layer=config.layers,
                          n_head=config.heads, n_embd=config.channels, bias=True,
                          cos_attn=sorted(config.cosine_blocks)))
    model.to(device)
    measured = gnstracking.AccumulateMeasurements(prefix="train/gns/")
    tracker = gnstracking.MeasurementTracker.from_model(model, callback=measured, enforce_coverage=True)
    return NanoGNS(model, tracker, measured, buffered.zero_sqgradnorm_buffers)


def set_weights(model: torch.nn.Module, state: State) -> None:
    """Ours into nanoGNS's model. It calls ln_1.weight ln_1.affine.weight, and its wte has no rows of padding."""
    ours = {name: np.array(x) for name, x in state.weights.items()}
    theirs = {name.replace(".affine.", "."): x for name, x in model.named_parameters()}
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(of[name].shape) if name in of else None for of in (ours, theirs)]
        if None in shapes or shapes[0][1:] != shapes[1][1:] or shapes[0][0] < shapes[1][0]:
            raise Fault(f"expected the same tensors in the run and in nanoGNS's model, found '{name}' to be "
                        f"{shapes[0]} and {shapes[1]}; take nanoGNS's folder exact")
        with torch.no_grad():
            theirs[name].copy_(torch.from_numpy(ours[name][: len(theirs[name])]))


def examples(run: Run, state: State, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's inputs and targets, (n, T) each."""
    first = 0 if run.options["overfit"] else state.sequences
    batch = run.train.batch(run.train.shuffled(run.options["seed"], first, n))
    tokens, targets = (torch.tensor(x, dtype=torch.int64, device=device) for x in batch)
    return tokens, targets


def measure(nano: NanoGNS, tokens: torch.Tensor, targets: torch.Tensor, micro: int) -> LogRow:
    """The norms of a step, in nanoGNS's columns. micro: examples in a micro-batch, a divisor of those of the step."""
    n = len(tokens)
    accumulation, loss = n // micro, math.nan
    nano.model.zero_grad(set_to_none=True)
    nano.zero_norms(nano.model)
    for x, y in zip(tokens.split(micro), targets.split(micro)):
        mean_loss = nano.model(x, y)[1] / accumulation
        mean_loss.backward()
        loss = mean_loss.item() * accumulation
    nano.tracker.step(batch_size=n)
    return {
        "grad_norm": math.sqrt(sum(x.grad.norm().item() ** 2 for x in nano.model.parameters())),
        "gradient_accumulation_steps": accumulation,
        "train/lossf": loss,
        **nano.measured.get_msg(),
    }


def compared_step(nano: NanoGNS, run: Run, logged: LogRow | None, step: int, device: str) -> LogRow:
    """The row of one step; logged: that of the run's log."""
    state = state_before(run, step) if logged else None
    if logged is None or state is None:
        what = "no checkpoint of" if logged else "no row in log.csv of"
        raise Fault(f"'{run.folder}' has {what} step {step}; leave it out of --steps, or train with "
                    "--checkpoint-every 1tokens --keep 0 --log-every 1")
    n = plan_of(run, state, logged).n
    micro = max(size for size in range(1, min(n, run.options["micro-batch"]) + 1) if n % size == 0)
    set_weights(nano.model, state)
    row = measure(nano, *examples(run, state, n, device), micro)
    return {**row, "iter_num": step, "tokens_processed": state.tokens + n * run.train.T}


def write(rows: list[LogRow], config: dict[str, str], out: Path) -> None:
    """out/log.csv, by nanoGNS's class for it, of which build() has made the folder known."""
    from tracker import LogWrapper

    writer = LogWrapper(config=config, out_dir=str(out))
    for row in rows:
        writer.step_count = row["iter_num"]  # its column step
        writer.log(row)
        writer.step()
    writer.close()


def run_steps(options: argparse.Namespace, exact: Path, folder: Path, out: Path) -> None:
    """Runs the steps and, when all are done, writes the log."""
    if (out / "log.csv").exists():
        raise Fault(f"'{out}' has a log.csv already; give --out a new folder")
    run, log = open_run(folder, np.dtype("float32"), 1), {int(row["step"]): row for row in read_log(folder / "log.csv")}
    check_model(run.config)
    nano, rows = build(exact, run.config, options.device), []
    for step in options.steps:
        rows.append(compared_step(nano, run, log.get(step), step, options.device))
        print(f"step {step}: loss {rows[-1]['train/lossf']:.6f}, gradient norm {rows[-1]['grad_norm']:.6f}", flush=True)
    write(rows, {"run": str(folder), "device": options.device}, out)


def step_list(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected steps such as 0,1,5,20, found '{text}'")
    return sorted({int(step) for step in text.split(",")})


def device(text: str) -> str:
    if text not in ("cpu", "cuda") or (text == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"expected cpu, or cuda where PyTorch finds a GPU, found '{text}'")
    return text


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exact", type=Path, metavar="NANOGNS/exact", help="the folder of nanoGNS's model.py")
    parser.add_argument("run", type=Path, metavar="RUN", help="the trainer's --out folder")
    parser.add_argument("--steps", type=step_list, required=True, metavar="N,N,...", help="steps, counted from 0")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, for log.csv")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--started-in", type=Path, default=Path(), metavar="FOLDER",
                        help="where the run was started, where its relative paths begin [here]")
    return parser.parse_args()


def main() -> int:
    try:
        options = parse()
        if not options.started_in.is_dir():
            raise Fault(f"--started-in '{options.started_in}': expected a folder, found none")
        set_up_jax("cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        folders = [path.resolve() for path in (options.exact, options.run, options.out)]
        with contextlib.chdir(options.started_in):
            run_steps(options, *folders)
        return 0
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
    except KeyError as missing:
        print(f"error: no {missing} in config.json, log.csv or state.txt: the run is not of this version's trainer; "
              "train it anew", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
