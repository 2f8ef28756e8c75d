"""Training by the book: the reference's own loop, one step after the other, into rows of a log.csv.

A step with n sequences: measure() gives the mean loss, the mean gradient g and the per-example norms; then, with c = 1,
or --grad-clip / |g| where the norm |g| over all tensors exceeds it, and t = 1, 2, ... counting the updates, AdamW
(Loshchilov & Hutter 2019):

    m <- beta1 m + (1 - beta1) c g              v <- beta2 v + (1 - beta2) (c g)^2
    w <- w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay w)       decay: matrices, embeddings

The columns are those of llmc/runlog.h. On two things the reference has no opinion and does as the trainer's log says:
which updates its guards left out (`skipped`), and the batch of --batch-schedule gns.
"""

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from files import Checkpoint, Fault, LogRow, Options, TokenData, model_of, read_config, read_model
from gpt import GPTConfig, Measurement, Weights, mean_loss, measure, square_norm, tensors
from initial_weights import initial_weights
from noise_scale import GROUPS, FractionEma, Sample, Tracker, contains, log_fields, measures, sample
from schedule import StepPlan, plan_step


@dataclass
class Run:
    """What does not change during a run."""

    folder: Path
    options: Options
    config: GPTConfig
    train: TokenData
    val: TokenData | None
    dtype: np.dtype
    chunk: int  # examples whose gradients are in memory at once


def open_run(folder: Path, dtype: np.dtype, chunk: int) -> Run:
    options = read_config(folder)
    T, val = options["seq-len"], options["val-data"]
    train = TokenData(options["train-data"], T)
    return Run(folder, options, model_of(options), train, TokenData(val, T) if val else None, dtype, chunk)


@dataclass
class State:
    """What a step changes."""

    weights: Weights
    m: Weights
    v: Weights
    tracker: Tracker
    step: int = 0
    tokens: int = 0
    sequences: int = 0
    applied: int = 0  # updates
    loss_ema: float = 0  # over about 20 steps: loss_ema / loss_ema_weight is logged as train/loss
    loss_ema_weight: float = 0


def to_device(run: Run, arrays: dict[str, np.ndarray]) -> Weights:
    return {name: jnp.asarray(x, run.dtype) for name, x in arrays.items()}


def initial_state(run: Run) -> State:
    """The weights of the model file that the run names, else drawn from its seed."""
    options, model = run.options, str(run.options["model"])
    file = model if model.endswith(".bin") else options["init-from"]
    if file:
        weights = read_model(Path(file), run.config)
    else:
        truncated = options["init"] == "truncated" or (options["init"] == "model" and model == "cgpt:111m")
        weights = initial_weights(run.config, options["seed"], truncated)
    zeros = {name: np.zeros_like(x) for name, x in weights.items()}
    tracker = Tracker(options["gns-tau"])
    return State(to_device(run, weights), to_device(run, zeros), to_device(run, zeros), tracker)


def state_of(run: Run, checkpoint: Checkpoint) -> State:
    saved_as = {"U": "VW"}  # state.txt has the trackers' fields by the letters of llmc/gns.h

    def ema(group: str) -> FractionEma:
        names = [f.name for f in fields(FractionEma)]
        return FractionEma(**{name: checkpoint.state[f"gns.{group}.{saved_as.get(name, name)}"] for name in names})

    counters = {name: int(checkpoint.state[name]) for name in ("step", "tokens", "sequences", "applied")}
    smoothed = {name: checkpoint.state[name] for name in ("loss_ema", "loss_ema_weight")}
    tracker = Tracker(run.options["gns-tau"], {group: ema(group) for group in GROUPS})
    arrays = (to_device(run, x) for x in (checkpoint.weights, checkpoint.m, checkpoint.v))
    return State(*arrays, tracker, **counters, **smoothed)


# ----------------------------------------------------------------------------------------------------------------------
# One step


def moments(run: Run, state: State, plan: StepPlan, gradient: Weights, clip: float) -> tuple[Weights, Weights]:
    """Adam's moments after the step; clip: what the gradient is multiplied by."""

    def mean(old: Weights, beta: float, power: int) -> Weights:
        return {name: beta * old[name] + (1 - beta) * (clip * g) ** power for name, g in gradient.items()}

    return mean(state.m, run.options["beta1"], 1), mean(state.v, plan.beta2, 2)


def updated(run: Run, plan: StepPlan, t: int, weights: Weights, m: Weights, v: Weights) -> Weights:
    """The weights after update number t (from 1), from those before it and the moments after it."""
    beta1, beta2, eps = run.options["beta1"], plan.beta2, run.options["eps"]

    def step(name: str, decay: float) -> jax.Array:
        direction = m[name] / (1 - beta1**t) / (jnp.sqrt(v[name] / (1 - beta2**t)) + eps)
        return weights[name] - plan.lr * (direction + decay * weights[name])

    return {x.name: step(x.name, plan.weight_decay if x.decays else 0) for x in tensors(run.config)}


def group_samples(config: GPTConfig, n: int, m: dict[str, float], n2: dict[str, float]) -> dict[str, Sample | None]:
    """m, n2: mean_b |g_b|^2 and |mean_b g_b|^2 by tensor. A group's sample comes from its tensors' sums; None for a
    group of which a tensor is not there."""

    def of(group: str) -> Sample | None:
        names = [t.name for t in tensors(config) if contains(group, t.group)]
        if any(name not in m for name in names):
            return None
        return sample(n, sum(m[name] for name in names), sum(n2[name] for name in names))

    return {group: of(group) for group in GROUPS}


def tensor_fields(run: Run, plan: StepPlan, found: Measurement, n2: dict[str, float]) -> LogRow:
    row: LogRow = {}
    for tensor in tensors(run.config):
        if measures(str(run.options["log-tensors"]), tensor.group):
            column = f"train/gns/{tensor.name}/"
            row[column + "norm"] = math.sqrt(n2[tensor.name])
            measured = measures(plan.gns, tensor.group)
            row[column + "pegn"] = math.sqrt(found.square_norm[tensor.name]) if measured else None
            row[column + "batch_size"] = plan.n
    return row


def validation_loss(run: Run, state: State) -> float:
    """Over the first --val-tokens, rounded up to whole sequences, in file order."""
    count = min(math.ceil(run.options["val-tokens"] / run.val.T), run.val.num_sequences)
    return mean_loss(run.config, state.weights, *run.val.batch(list(range(count))), run.chunk)


def evaluation_fields(run: Run, state: State, before: int) -> LogRow:
    """Filled in where the step crossed a multiple of --val-every, and in the last step."""
    every, tokens = run.options["val-every"], state.tokens
    crossed = every > 0 and (tokens >= run.options["max-tokens"] or tokens // every > before // every)
    return {
        "train/loss": state.loss_ema / state.loss_ema_weight if crossed else None,
        "val/loss": validation_loss(run, state) if crossed and run.val is not None else None,
    }


def plan_of(run: Run, state: State, logged: LogRow | None) -> StepPlan:
    if run.options["batch-schedule"] == "gns" and logged is None:
        raise Fault(f"step {state.step} is not in log.csv, which alone knows the batch of --batch-schedule gns")
    return plan_step(run.options, state.step, state.tokens, logged["batch_target"] if logged else None)


def take_step(run: Run, state: State, logged: LogRow | None) -> LogRow:
    """One step: moves the state on, returns the row of the log. logged: the trainer's row, None if it logged none."""
    start, before, step = time.perf_counter(), state.tokens, state.step
    plan = plan_of(run, state, logged)
    skipped = logged["skipped"] if logged else 0
    first = 0 if run.options["overfit"] else state.sequences
    batch = run.train.batch(run.train.shuffled(run.options["seed"], first, plan.n))
    found = measure(run.config, state.weights, *batch, run.chunk)

    n2 = {name: square_norm(g) for name, g in found.gradient.items()}
    norm, limit = math.sqrt(sum(n2.values())), run.options["grad-clip"]
    measured = {t.name: found.square_norm[t.name] for t in tensors(run.config) if measures(plan.gns, t.group)}
    samples = group_samples(run.config, plan.n, measured, n2)
    if not skipped:
        state.applied += 1
        state.m, state.v = moments(run, state, plan, found.gradient, limit / norm if 0 < limit < norm else 1)
        state.weights = updated(run, plan, state.applied, state.weights, state.m, state.v)
    tokens = plan.n * run.train.T
    state.tracker.update({group: None for group in GROUPS} if skipped else samples, tokens)
    state.step, state.tokens, state.sequences = step + 1, before + tokens, state.sequences + plan.n
    if math.isfinite(found.loss):
        state.loss_ema += 0.05 * (found.loss - state.loss_ema)
        state.loss_ema_weight += 0.05 * (1 - state.loss_ema_weight)

    seconds = time.perf_counter() - start
    return {
        "step": step,
        **evaluation_fields(run, state, before),
        "dt": seconds,
        "tokens_per_sec": tokens / seconds,
        "mfu": None,
        "lr": plan.lr,
        "grad_norm": norm,
        "gradient_accumulation_steps": math.ceil(plan.n / run.options["micro-batch"]),
        "train/lossf": found.loss,
        **tensor_fields(run, plan, found, n2),
        "iter_num": step,
        "tokens_processed": state.tokens,
        **log_fields(samples, state.tracker, plan.gns),
        "batch_target": plan.target,
        "batch": plan.n,
        "skipped": skipped,
        "val/hellaswag": None,
    }


def set_up_jax(platform: str) -> None:
    """platform: cpu or cuda. To be called before anything is computed."""
    jax.config.update("jax_platforms", platform)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
