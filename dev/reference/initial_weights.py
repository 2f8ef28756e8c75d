"""A new model's weights, as PyTorch's recipe for GPT-2 draws them from a seed; and the order of the draws.

Generator: mt19937, seeded with the run's --seed (NumPy's RandomState is the same generator). One number in [0, 1) is
the low 24 bits of a word / 2^24. All arithmetic is float32, as PyTorch's is.

Normal (torch.Tensor.normal_, tensors of 16 numbers or more): n numbers are drawn; each 16 of them, x, become

    x'[j] = r cos(a), x'[j+8] = r sin(a)        r = sqrt(-2 log(1 - x[j])), a = 2 pi x[j+8], j = 0 .. 7

times the standard deviation; if n is no multiple of 16, the last 16 are then drawn anew and transformed likewise.
Truncated at two standard deviations (torch.nn.init.trunc_normal_ of PyTorch up to 2.11): for each number x one draw,

    x' = std sqrt(2) erfinv(low + x (high - low))        high = -low = erf(2 / sqrt(2))

Order: the tensors of block 0, wte and wpe before them, then those of block 1, ...; only matrices are drawn, wte without
the rows that pad the vocabulary. LayerNorm weights are 1, biases 0.
"""

import numpy as np
from scipy.special import erf, erfinv

from files import Fault
from gpt import GPTConfig, Tensor, tensors

FLOAT = np.float32


def uniform(generator: np.random.RandomState, n: int) -> np.ndarray:
    words = generator.randint(0, 2**32, n, dtype=np.uint32)
    return (words & 0xFFFFFF).astype(FLOAT) * FLOAT(2**-24)


def box_muller(x: np.ndarray) -> np.ndarray:
    """x (16 k): k groups of 16 uniform numbers. Functions are rounded to float32 from float64, so they are exact."""
    low, high = x.reshape(-1, 2, 8)[:, 0], x.reshape(-1, 2, 8)[:, 1]
    logarithm = np.log((1 - low).astype(float)).astype(FLOAT)
    radius, angle = np.sqrt(FLOAT(-2) * logarithm), (FLOAT(2 * np.pi) * high).astype(float)
    pair = radius * np.cos(angle).astype(FLOAT), radius * np.sin(angle).astype(FLOAT)
    return np.stack(pair, axis=1).reshape(-1)


def normal(generator: np.random.RandomState, n: int) -> np.ndarray:
    if n < 16:
        raise Fault(f"a tensor of {n} numbers: the reference draws tensors of 16 or more; use a larger model")
    values = uniform(generator, n)
    whole = n - n % 16
    values[:whole] = box_muller(values[:whole])
    if n % 16:
        values[-16:] = box_muller(uniform(generator, 16))
    return values


def truncated_normal(generator: np.random.RandomState, n: int) -> np.ndarray:
    high = FLOAT(erf(2 / np.sqrt(2)))
    x = uniform(generator, n) * (high + high) - high
    return np.clip(np.sqrt(2) * erfinv(x.astype(float)), -2, 2)


def draw(generator: np.random.RandomState, tensor: Tensor, used_rows: int, truncated: bool) -> np.ndarray:
    """One tensor's initial values, of which only the first used_rows rows are drawn."""
    values = np.full(tensor.shape, tensor.constant, FLOAT)
    if tensor.std > 0:
        distribution = truncated_normal if truncated and tensor.truncatable else normal
        used = distribution(generator, used_rows * tensor.shape[1])
        values[:used_rows] = (used * FLOAT(tensor.std)).reshape(used_rows, -1)
    return values


def initial_weights(config: GPTConfig, seed: int, truncated: bool) -> dict[str, np.ndarray]:
    def block_of(tensor: Tensor) -> int:
        parts = tensor.name.split(".")
        return int(parts[2]) if parts[1] == "h" else 0

    generator = np.random.RandomState(seed)
    in_order = sorted(tensors(config), key=block_of)  # stable: wte and wpe stay first
    return {
        t.name: draw(generator, t, config.vocab_size if t.group == "wte" else t.shape[0], truncated) for t in in_order
    }
