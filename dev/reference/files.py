"""The files of a run: config.json, log.csv, checkpoints, model files and token files; and the order of the data.

Binary files are little-endian and begin with a header of 256 int32:

    tokens      [0] 20240520  [1] 1  [2] number of tokens  [3] vocabulary; then uint16 tokens
    model       [0] 20240326  [1] 3 (float32) or 5 (bfloat16)  [2] longest sequence  [3] vocabulary V  [4] layers
                [5] heads  [6] channels  [7] padded V  [8] GELU: 0 tanh, 1 erf  [9..12] a bit for each cosine block
                [13..16] multipliers of embedding, residual branches, attention scores, logits, as the bits of a
                float32, 0: 1; then all tensors in the order of gpt.tensors()
    optimizer   the same header but [0] 20241104; then Adam's first moments, then its second ones, float32

A checkpoint is a folder checkpoints/step_<steps done, 8 digits>[.2] with model.bin, optimizer.bin and state.txt, lines
"name value" whose doubles are hexadecimal.

Order of the data. Files that match a pattern are sorted by name. Sequence j of a file has the T + 1 tokens from token
j T on: inputs, and one later the targets; a file of n tokens holds (n - 1) / T sequences, rounded down; sequences are
numbered through all files. The k-th sequence that training reads is number permute(seed, k / N, N, k mod N) of the N
there are.
"""

import csv
import glob
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt import GPTConfig, tensors

HEADER_WORDS = 256
TOKENS_MAGIC, MODEL_MAGIC, OPTIMIZER_MAGIC = 20240520, 20240326, 20241104
FLOAT32, BFLOAT16 = 3, 5


class Fault(Exception):
    """What is wrong with a command or a file, in one line: what was expected, what was found, what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# config.json and log.csv

Options = dict[str, str | int | float | bool | None]  # as --help names them, resolved
LogRow = dict[str, float | None]  # by column; None: an empty field


def read_config(run: Path) -> Options:
    try:
        return json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise Fault(f"'{run}' has no readable config.json ({error}); give the --out folder of a run") from None


def model_of(options: Options) -> GPTConfig:
    """From config.json's `model-shape`: L=4 NH=4 C=128 T=128 V=257 (padded 384), tanh GELU[, cosine blocks <128 bits as
    hexadecimal>][, multipliers <embedding> <residual> <attention> <logits>]"""
    shape = str(options.get("model-shape"))
    found = re.fullmatch(
        r"L=(\d+) NH=(\d+) C=(\d+) T=(\d+) V=(\d+) \(padded (\d+)\), (tanh|erf) GELU"
        r"(?:, cosine blocks ([0-9a-f]{32}))?(?:, multipliers (\S+) (\S+) (\S+) (\S+))?",
        shape,
    )
    if found is None:
        raise Fault(f"config.json: model-shape is '{shape}', expected 'L=.. NH=.. C=.. T=.. V=.. (padded ..), .. GELU'")
    L, NH, C, T, V, Vp = (int(x) for x in found.groups()[:6])
    bits = int(found[8] or "0", 16)
    multipliers = [float(np.float32(x or 1)) for x in found.groups()[8:]]
    return GPTConfig(T, V, Vp, L, NH, C, found[7], cosine_set(bits, L), *multipliers)


def cosine_set(bits: int, layers: int) -> frozenset[int]:
    return frozenset(layer for layer in range(layers) if bits >> layer & 1)


def read_log(path: Path) -> list[LogRow]:
    def number(text: str) -> float | None:
        return float(text) if text else None

    try:
        with open(path, newline="") as file:
            return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Fault(f"'{path}' is no log that can be read ({error}); expected the log.csv of a run") from None


def write_log(path: Path, rows: list[LogRow]) -> None:
    """Numbers have 15 digits; the trainers' logs have that many in the norms, 9 elsewhere."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows(["" if value is None else f"{value:.15g}" for value in row.values()] for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# Model files and checkpoints


def read_header(path: Path, magic: int) -> np.ndarray:
    try:
        header = np.fromfile(path, "<i4", HEADER_WORDS)
    except OSError as error:
        hint = "a relative path begins where the run was started: --started-in FOLDER"
        raise Fault(f"cannot read '{path}': {error.strerror}; {hint}") from None
    if len(header) < HEADER_WORDS or header[0] != magic:
        found = header[0] if len(header) else "nothing"
        raise Fault(f"'{path}' starts with {found}, expected {magic}: it is another kind of file, or not whole")
    return header


def config_of_header(header: np.ndarray) -> GPTConfig:
    words = [int(x) for x in header[:9]]
    bits = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(header[9:13]))
    multipliers = [float(x) if word else 1.0 for word, x in zip(header[13:17], header[13:17].view("<f4"))]
    return GPTConfig(
        *words[2:4], words[7], *words[4:7], ("tanh", "erf")[words[8]], cosine_set(bits, words[4]), *multipliers
    )


def read_tensor_file(path: Path, magic: int, kinds: int, config: GPTConfig) -> list[dict[str, np.ndarray]]:
    """`kinds` numbers for each weight: a list of as many dictionaries. The file must be of this model."""
    header = read_header(path, magic)
    if config_of_header(header) != config:
        raise Fault(f"'{path}' holds {config_of_header(header)}, config.json describes {config}")
    if header[1] not in (FLOAT32, BFLOAT16):
        raise Fault(f"'{path}' has version {header[1]}, expected {FLOAT32} (float32) or {BFLOAT16} (bfloat16)")
    values = np.fromfile(path, "<f4" if header[1] == FLOAT32 else "<u2", offset=4 * HEADER_WORDS)
    if header[1] == BFLOAT16:  # the upper halves of float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    sizes = [math.prod(t.shape) for t in tensors(config)]
    if len(values) != kinds * sum(sizes):
        raise Fault(f"'{path}' holds {len(values)} numbers, its header calls for {kinds * sum(sizes)}; copy it again")
    parts = iter(np.split(values, np.cumsum(sizes * kinds)[:-1]))
    return [{t.name: next(parts).reshape(t.shape) for t in tensors(config)} for _ in range(kinds)]


def read_model(path: Path, config: GPTConfig) -> dict[str, np.ndarray]:
    return read_tensor_file(path, MODEL_MAGIC, 1, config)[0]


@dataclass
class Checkpoint:
    weights: dict[str, np.ndarray]
    m: dict[str, np.ndarray]
    v: dict[str, np.ndarray]
    state: dict[str, float]  # state.txt


def checkpoint_folder(run: Path, step: int) -> Path | None:
    """The checkpoint after `step` steps; None if the run left none."""
    plain = run / "checkpoints" / f"step_{step:08d}"
    return next((folder for folder in (plain, plain.with_name(plain.name + ".2")) if folder.is_dir()), None)


def read_checkpoint(folder: Path, config: GPTConfig) -> Checkpoint:
    def value(text: str) -> float:
        return float.fromhex(text) if "x" in text else float(text)

    try:
        lines = (folder / "state.txt").read_text().splitlines()
        state = {name: value(text) for name, text in (line.split() for line in lines)}
    except (OSError, ValueError) as error:
        raise Fault(f"'{folder}' has no readable state.txt ({error}); it is no checkpoint, or damaged") from None
    m, v = read_tensor_file(folder / "optimizer.bin", OPTIMIZER_MAGIC, 2, config)
    return Checkpoint(read_model(folder / "model.bin", config), m, v, state)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens

WORD = 2**64 - 1  # arithmetic of the order is modulo 2^64


def hash64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def permute(seed: int, epoch: int, n: int, i: int) -> int:
    """Where position i of an epoch lies among n sequences: a Feistel network of 8 rounds on 2h bits, 4^h >= n, walked
    until it lands below n."""
    h = ((n - 1).bit_length() + 1) // 2
    mask = 2**h - 1
    key = hash64((hash64((seed + 0x9E3779B97F4A7C15) & WORD) + epoch) & WORD)
    x = i
    while True:
        left, right = x >> h, x & mask
        for r in range(1, 9):
            left, right = right, left ^ hash64((key + hash64((r << 32) + right)) & WORD) & mask
        x = left << h | right
        if x < n:
            return x


class TokenData:
    """All sequences of T tokens in the files that match a pattern."""

    def __init__(self, pattern: str, T: int):
        self.T, self.shards = T, [self.open(Path(path)) for path in sorted(glob.glob(pattern)) or [pattern]]
        counts = [(len(shard) - 1) // T for shard in self.shards]
        self.starts = np.cumsum([0, *counts])
        self.num_sequences = int(self.starts[-1])
        if self.num_sequences == 0:
            raise Fault(f"'{pattern}' holds no sequence of {T} tokens")

    @staticmethod
    def open(path: Path) -> np.ndarray:
        count = int(read_header(path, TOKENS_MAGIC)[2:3].view("<u4")[0])
        tokens = np.memmap(path, "<u2", "r", offset=4 * HEADER_WORDS)
        if len(tokens) != count:
            raise Fault(f"'{path}' has {len(tokens)} tokens, its header says {count}; copy it again")
        return tokens

    def sequence(self, number: int) -> np.ndarray:
        """T + 1 tokens."""
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        first = (number - int(self.starts[shard])) * self.T
        return self.shards[shard][first : first + self.T + 1].astype(np.int32)

    def batch(self, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (n, T) each."""
        rows = np.stack([self.sequence(number) for number in numbers])
        return rows[:, :-1], rows[:, 1:]

    def shuffled(self, seed: int, first: int, n: int) -> list[int]:
        """The numbers of the n sequences from position `first` of the endless stream on."""
        N = self.num_sequences
        return [permute(seed, k // N, N, k % N) for k in range(first, first + n)]
