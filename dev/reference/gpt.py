"""The model as a function of its weights, and what a training step measures of it. In JAX, and nothing clever.

A GPT-2 with pre-LayerNorm blocks, learned positions, biases everywhere and a tied output head. For one sequence, with
x_t the token at position t, mult_* the config's forward multipliers (1 in GPT-2), l the block:

    h_t = mult_embed (wte[x_t] + wpe[t])
    h   = h + mult_residual attention_l(LN(h; ln_1))
    h   = h + mult_residual c_proj(GELU(c_fc(LN(h; ln_2))))                      for l = 0 .. L-1
    logits = mult_logit LN(h; ln_f) wte^T                                         over the V tokens that exist
    loss   = mean_t (log sum_v exp logits_tv - logits_t,target)

    LN(x)     = (x - mean) / sqrt(variance + 1e-5) * weight + bias
    attention = c_proj(softmax over the keys s <= t of (mult_attn q_t.k_s / sqrt(head size)) v_s), head by head; q, k, v
                are the thirds of c_attn.qkv's output. In a cosine block q and k are first divided by max(|.|, 1e-12).
    GELU      = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) or x/2 (1 + erf(x / sqrt 2)): the config's `gelu`

Weights are a dictionary by the names that log.csv uses; a matrix is (out, in). wte is padded to a multiple of 128 rows:
the rows beyond V are zero, are no token and have no logit, so their gradient is zero.

An example is one sequence, and g_b the gradient of its mean loss with respect to a tensor. measure() returns, over the
n examples of a step, the mean loss, the mean gradient and, for every tensor, m = mean_b |g_b|^2: by JAX's vmap over
the gradient of one example, so every g_b exists in memory, a chunk of examples at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Weights = dict[str, jax.Array]


@dataclass(frozen=True)
class GPTConfig:
    max_seq_len: int
    vocab_size: int
    padded_vocab_size: int
    layers: int
    heads: int
    channels: int
    gelu: str = "tanh"
    cosine_blocks: frozenset[int] = frozenset()
    embed_mult: float = 1.0
    residual_mult: float = 1.0
    attn_mult: float = 1.0
    logit_mult: float = 1.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model. Matrices and embeddings decay, vectors do not."""

    name: str
    shape: tuple[int, ...]
    group: str  # of the noise scale
    std: float = 0.0  # of its initial values; 0: they are all `constant`
    constant: float = 0.0
    truncatable: bool = False  # drawn within two standard deviations where the run asks for truncated weights

    @property
    def decays(self) -> bool:
        return len(self.shape) == 2


def block_tensors(config: GPTConfig, layer: int) -> list[Tensor]:
    C, small = config.channels, 0.02 / np.sqrt(2 * config.layers)
    h = f"transformer.h.{layer}."
    return [
        Tensor(h + "ln_1.weight", (C,), "ln", constant=1),
        Tensor(h + "ln_1.bias", (C,), "ln"),
        Tensor(h + "attn.c_attn.qkv.weight", (3 * C, C), "attention", 0.02, truncatable=True),
        Tensor(h + "attn.c_attn.qkv.bias", (3 * C,), "attention"),
        Tensor(h + "attn.c_proj.weight", (C, C), "attention", small),
        Tensor(h + "attn.c_proj.bias", (C,), "attention"),
        Tensor(h + "ln_2.weight", (C,), "ln", constant=1),
        Tensor(h + "ln_2.bias", (C,), "ln"),
        Tensor(h + "mlp.c_fc.weight", (4 * C, C), "mlp", 0.02, truncatable=True),
        Tensor(h + "mlp.c_fc.bias", (4 * C,), "mlp"),
        Tensor(h + "mlp.c_proj.weight", (C, 4 * C), "mlp", small),
        Tensor(h + "mlp.c_proj.bias", (C,), "mlp"),
    ]


def tensors(config: GPTConfig) -> list[Tensor]:
    """All tensors in the order of model files and of log.csv: kind by kind, of each kind one layer after the other."""
    C = config.channels
    blocks = [block_tensors(config, layer) for layer in range(config.layers)]
    return [
        Tensor("transformer.wte.weight", (config.padded_vocab_size, C), "wte", 0.02, truncatable=True),
        Tensor("transformer.wpe.weight", (config.max_seq_len, C), "wpe", 0.02, truncatable=True),
        *(tensor for kind in zip(*blocks) for tensor in kind),
        Tensor("transformer.ln_f.weight", (C,), "ln", constant=1),
        Tensor("transformer.ln_f.bias", (C,), "ln"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# One example


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: jax.Array, form: str) -> jax.Array:
    if form == "erf":
        return x / 2 * (1 + jax.scipy.special.erf(x / np.sqrt(2)))
    return x / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12), in a form that has a gradient at zero."""
    return x / jnp.sqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))


def attention(config: GPTConfig, layer: int, qkv: jax.Array) -> jax.Array:
    T, size = len(qkv), config.channels // config.heads
    q, k, v = qkv.reshape(T, 3, config.heads, size).transpose(1, 2, 0, 3)  # (heads, T, size) each
    if layer in config.cosine_blocks:
        q, k = unit(q), unit(k)
    scores = config.attn_mult / np.sqrt(size) * q @ k.transpose(0, 2, 1)
    scores = jnp.where(np.tril(np.ones((T, T), bool)), scores, -jnp.inf)
    return (jax.nn.softmax(scores) @ v).transpose(1, 0, 2).reshape(T, config.channels)


def block(config: GPTConfig, weights: Weights, layer: int, x: jax.Array) -> jax.Array:
    def of(name: str) -> tuple[jax.Array, jax.Array]:
        prefix = f"transformer.h.{layer}.{name}."
        return weights[prefix + "weight"], weights[prefix + "bias"]

    def linear(name: str, inp: jax.Array) -> jax.Array:
        weight, bias = of(name)
        return inp @ weight.T + bias

    qkv = linear("attn.c_attn.qkv", layer_norm(x, *of("ln_1")))
    x = x + config.residual_mult * linear("attn.c_proj", attention(config, layer, qkv))
    hidden = gelu(linear("mlp.c_fc", layer_norm(x, *of("ln_2"))), config.gelu)
    return x + config.residual_mult * linear("mlp.c_proj", hidden)


def example_loss(config: GPTConfig, weights: Weights, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss of one sequence; tokens, targets (T)."""
    wte, wpe = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    x = config.embed_mult * (wte[tokens] + wpe[: len(tokens)])
    for layer in range(config.layers):
        x = block(config, weights, layer, x)
    x = layer_norm(x, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    logits = config.logit_mult * x @ wte[: config.vocab_size].T
    at_target = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return (jax.scipy.special.logsumexp(logits, axis=1) - at_target).mean()


# ----------------------------------------------------------------------------------------------------------------------
# A step's examples


@dataclass
class Measurement:
    """Over the n examples of a step; gradient and square_norm by tensor."""

    n: int
    loss: float
    gradient: Weights  # mean_b g_b
    square_norm: dict[str, float]  # mean_b |g_b|^2


@partial(jax.jit, static_argnums=0)
def chunk_sums(config: GPTConfig, weights: Weights, tokens: jax.Array, targets: jax.Array, counts: jax.Array):
    """Sums of loss, gradient and squared gradient norms over the examples b, each counts[b] times.
    tokens, targets (B, T); counts (B)"""
    one_example = jax.value_and_grad(partial(example_loss, config))
    losses, gradients = jax.vmap(one_example, in_axes=(None, 0, 0))(weights, tokens, targets)
    square_norms = {name: jax.vmap(lambda g: (g**2).sum())(g) for name, g in gradients.items()}
    return jax.tree.map(lambda x: jnp.tensordot(counts, x, 1), (losses, gradients, square_norms))


def chunks(tokens: np.ndarray, targets: np.ndarray, size: int, dtype: np.dtype) -> Iterator[tuple[np.ndarray, ...]]:
    """Tokens, targets and counts of `size` examples at a time. All chunks have one shape, so that one compilation
    serves them: the last is filled up with repeated examples that count 0 times."""
    for first in range(0, len(tokens), size):
        index = np.arange(first, first + size)
        inside = np.minimum(index, len(tokens) - 1)
        yield tokens[inside], targets[inside], (index < len(tokens)).astype(dtype)


def measure(config: GPTConfig, weights: Weights, tokens: np.ndarray, targets: np.ndarray, chunk: int) -> Measurement:
    """Loss, gradient and per-example norms of a step; tokens, targets (n, T)."""
    n, total, dtype = len(tokens), None, weights["transformer.wte.weight"].dtype
    for part in chunks(tokens, targets, chunk, dtype):
        sums = chunk_sums(config, weights, *part)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    loss, gradient, square_norm = jax.tree.map(lambda x: x / n, total)
    return Measurement(n, float(loss), gradient, {name: float(x) for name, x in square_norm.items()})


@partial(jax.jit, static_argnums=0)
def chunk_loss(config: GPTConfig, weights: Weights, tokens: jax.Array, targets: jax.Array, counts: jax.Array):
    return counts @ jax.vmap(partial(example_loss, config, weights))(tokens, targets)


def mean_loss(config: GPTConfig, weights: Weights, tokens: np.ndarray, targets: np.ndarray, chunk: int) -> float:
    dtype = weights["transformer.wte.weight"].dtype
    parts = chunks(tokens, targets, chunk, dtype)
    return float(sum(chunk_loss(config, weights, *part) for part in parts)) / len(tokens)


def square_norm(x: jax.Array) -> float:
    return float((x**2).sum())
