"""What the tools for logs share: reading log.csv, and estimating the gradient noise scale (GNS) from its columns.

A log is what a trainer leaves (its columns: top of llmc/runlog.h) or what the nanoGNS reference leaves (arXiv
2411.00999, https://github.com/CerebrasResearch/nanoGNS, folder exact). The reference's is read with these differences:
`.affine.` in a tensor's name is left out; rows may be shorter than the header, which has all columns that came up
during the run; losses may be printed as tensor(3.21); and transformer.wte.weight/pegn is that of the embedding's half
of the tied gradient only, so that no noise scale of the groups wte and total comes from it. A log counts as the
reference's if it has none of our own columns (gns/<group>). A last line without its newline is torn, and left out.

With n examples in a step, m = mean_b |g_b|^2 (pegn^2) and n2 = |mean_b g_b|^2 (norm^2), summed over a group's tensors,

    |G|^2     ~ gtg     = (n n2 - m) / (n - 1)
    tr(Sigma) ~ trsigma = (m - n2) / (1 - 1/n)            gtg + trsigma = m            GNS = tr(Sigma) / |G|^2

(McCandlish et al. 2018, arXiv 1812.06162, appendix A.1). For any two sizes of batches, s and B examples with the
squared norms |G_s|^2 and |G_B|^2 of their mean gradients, the same are

    gtg = (B |G_B|^2 - s |G_s|^2) / (B - s)               trsigma = (|G_s|^2 - |G_B|^2) / (1/s - 1/B)

and s = 1 gives the lines above. Three ways to smooth the steps' components, each with one standard error:

    fraction_ema    the trainer's: the signal fraction gtg/m, forgetting by tokens (derived at the top of llmc/gns.h)
    component_ema   the reference's: R = EMA(trsigma) / EMA(gtg), each x <- a x + (1 - a) x_t from x_0 on, a = 0.99 a
                    step. Error by the infinitesimal jackknife (Efron 1982, chapter 6) over the steps' weights w_t:
                    SE^2 = sum_t w_t^2 (trsigma_t - R gtg_t)^2 / (sum_t w_t gtg_t)^2 / (1 - sum_t w_t^2)
    jackknife       R = sum(trsigma) / sum(gtg) over a window; SE^2 = (k - 1)/k sum_t (R_t - mean R)^2, where R_t leaves
                    out step t of k

A smoothed |G|^2 of zero or less gives no estimate: NaN. (nanoGNS raises it to 1e-6 instead.)
"""

import argparse
import csv
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

Array = np.ndarray

WTE = "transformer.wte.weight"
GROUPS = ("ln", "attention", "mlp", "wpe", "wte", "total", "total_nowte")
GROUP_OF_PART = {"ln_1": "ln", "ln_2": "ln", "ln_f": "ln", "attn": "attention", "mlp": "mlp", "wpe": "wpe",
                 "wte": "wte"}
VARIANCE_MEMORY = 4  # GNS_VARIANCE_MEMORY of llmc/gns.h


class LogError(Exception):
    """What is wrong with a command or a log, in one line: what was expected, what was found, what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Log:
    path: Path
    columns: dict[str, Array]  # each (rows); NaN where a field is empty
    tensors: list[str]  # those with columns norm, pegn and batch_size
    is_reference: bool  # nanoGNS's

    def column(self, name: str) -> Array:
        if name not in self.columns:
            raise LogError(f"'{self.path}': expected a column '{name}', found none; is this the log.csv of a run?")
        return self.columns[name]

    @property
    def tokens(self) -> Array:
        return self.column("tokens_processed")

    @property
    def batch(self) -> Array:
        """Examples in each step."""
        return self.columns["batch"] if "batch" in self.columns else self.tensor(self.any_tensor(), "batch_size")

    @property
    def applied(self) -> Array:
        """Whether each row's update was applied; nanoGNS knows no other."""
        return self.columns.get("skipped", np.zeros(len(self.tokens))) == 0

    def any_tensor(self) -> str:
        if not self.tensors:
            raise LogError(f"'{self.path}': expected columns train/gns/<tensor>/norm, pegn and batch_size, found none; "
                           "train with --gns ln or --gns all, and not with --log-tensors off")
        return self.tensors[0]

    def tensor(self, name: str, what: str) -> Array:
        return self.column(f"train/gns/{name}/{what}")


def read_log(path: str | Path) -> Log:
    """Reads a log.csv, or that of a run's folder."""
    path = Path(path) / "log.csv" if Path(path).is_dir() else Path(path)
    header, rows = read_fields(path)
    header = [name.replace(".affine.", ".") for name in header]
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        raise LogError(f"'{path}': expected each column once, found '{twice}' twice; two logs cannot be one file")
    columns = {name: parse_column(path, name, [row[i] for row in rows]) for i, name in enumerate(header)}
    tensors = [name[len("train/gns/"):-len("/norm")] for name in header
               if name.startswith("train/gns/") and name.endswith("/norm")]
    tensors = [t for t in tensors if f"train/gns/{t}/pegn" in columns and f"train/gns/{t}/batch_size" in columns]
    log = Log(path, columns, tensors, not any(name.startswith("gns/") for name in header))
    check_tokens(log)
    return log


def read_fields(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a file, each row as long as the header."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise LogError(f"cannot read '{path}': {reason}; give a log.csv or the folder of a run") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = list(csv.reader(lines))
    if len(rows) < 2:
        raise LogError(f"'{path}': expected a header and rows, found {len(rows)} lines; has the run done a step?")
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) > width:
            raise LogError(f"'{path}', line {number}: expected the header's {width} fields or fewer, found {len(row)}; "
                           "the file is damaged")
    return rows[0], [row + [""] * (width - len(row)) for row in rows[1:]]


def parse_column(path: Path, name: str, fields: list[str]) -> Array:
    values = np.full(len(fields), math.nan)
    for i, field in enumerate(fields):
        if field == "":
            continue
        try:
            values[i] = float(re.sub(r"^tensor\((.*)\)$", r"\1", field))
        except ValueError:
            raise LogError(f"'{path}', line {i + 2}, column '{name}': expected a number or nothing, found "
                           f"'{field[:40]}'; the file is damaged") from None
    return values


def check_tokens(log: Log) -> None:
    bad = np.flatnonzero(~(np.diff(log.tokens, prepend=0.0) > 0))
    if len(bad) > 0:
        i = int(bad[0])
        raise LogError(f"'{log.path}', line {i + 2}: expected tokens_processed above those of the row before, found "
                       f"{log.tokens[i]:.0f}; the file is damaged, or holds more than one run")


def config_value(log: Log, key: str) -> float | None:
    """A number from the config.json beside the log; None if there is none."""
    try:
        value = json.loads((log.path.parent / "config.json").read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, (int, float)) else None


def smoothing_length(log: Log, given: float | None) -> tuple[float, str]:
    """The tokens over which fraction_ema forgets, and where that was found."""
    configured = config_value(log, "gns-tau")
    if given is not None:
        return given, "--tau"
    if configured is not None and configured > 0:
        return configured, "config.json"
    return 0.01 * float(log.tokens[-1]), "1% of the log"


# ----------------------------------------------------------------------------------------------------------------------
# Components


@dataclass(frozen=True)
class Components:
    """Of one group, an element for each step that measured it and was applied."""

    tokens: Array  # after the step
    n: Array  # examples
    gtg: Array
    trsigma: Array

    @property
    def m(self) -> Array:
        return self.gtg + self.trsigma

    def at(self, steps: Array) -> "Components":
        """Those at these indices, or where a mask is true."""
        return Components(self.tokens[steps], self.n[steps], self.gtg[steps], self.trsigma[steps])


def pair_components(small: Array, big: Array, s: Array | float, B: Array | float) -> tuple[Array, Array]:
    """gtg and trsigma from the squared norms of mean gradients over s and over B examples."""
    return (B * big - s * small) / (B - s), (small - big) / (1 / s - 1 / B)


def group_of(tensor: str) -> str:
    group = next((GROUP_OF_PART[part] for part in tensor.split(".") if part in GROUP_OF_PART), None)
    if group is None:
        raise LogError(f"tensor '{tensor}': expected a name of GPT-2's with one of {', '.join(GROUP_OF_PART)} in it; "
                       "this is the log of another model")
    return group


def tensors_of_group(log: Log, group: str) -> list[str]:
    """The group's tensors; none if the log lacks columns of some of them."""
    kinds = {tensor: group_of(tensor) for tensor in log.tensors}
    if group == "total" or group == "total_nowte":
        complete = set(GROUP_OF_PART.values()) <= set(kinds.values())
        return [t for t in log.tensors if complete and (group == "total" or t != WTE)]
    return [t for t in log.tensors if kinds[t] == group]


def valid_components(log: Log, n: Array, gtg: Array, trsigma: Array) -> Components | None:
    """Those of applied steps; None if there are none. With one example gtg and trsigma are 0/0, or empty."""
    with np.errstate(invalid="ignore"):
        good = log.applied & np.isfinite(gtg) & np.isfinite(trsigma) & (gtg + trsigma > 0)
    return Components(log.tokens, n, gtg, trsigma).at(good) if good.any() else None


def squared_norms(log: Log, tensors: Sequence[str], what: str) -> Array:
    """Of these tensors together, in each row; what: norm or pegn."""
    return np.sum([log.tensor(tensor, what) ** 2 for tensor in tensors], axis=0)


def tensor_components(log: Log, tensors: Sequence[str]) -> Components | None:
    """Of a group made of these tensors, from their norms."""
    if not tensors:
        return None
    n = log.tensor(tensors[0], "batch_size")
    for tensor in tensors[1:]:
        if not np.array_equal(n, log.tensor(tensor, "batch_size"), equal_nan=True):
            raise LogError(f"'{log.path}': expected the same batch_size for all tensors of a row, found that of "
                           f"'{tensor}' to differ from that of '{tensors[0]}'; the file is damaged")
    with np.errstate(divide="ignore", invalid="ignore"):
        gtg, trsigma = pair_components(squared_norms(log, tensors, "pegn"), squared_norms(log, tensors, "norm"), 1.0, n)
    return valid_components(log, n, gtg, trsigma)


def group_components(log: Log, group: str) -> Components | None:
    """Of one of GROUPS: as the trainer wrote them, or from the norms; None where the log does not have them."""
    if f"gns/{group}/gtg" in log.columns:
        return valid_components(log, log.batch, log.column(f"gns/{group}/gtg"), log.column(f"gns/{group}/trsigma"))
    if log.is_reference and group in ("wte", "total"):
        return None
    return tensor_components(log, tensors_of_group(log, group))


# ----------------------------------------------------------------------------------------------------------------------
# Estimates


@dataclass(frozen=True)
class Curve:
    """A smoothed estimate after each step; NaN where there is none."""

    tokens: Array
    gns: Array
    se: Array
    gtg: Array
    trsigma: Array


def token_ema(tokens: Array, x: Array, tau: float, start: float = 0.0) -> tuple[Array, Array]:
    """The EMA of x over tokens, from `start` on, without bias at its beginning; and the weight that it has by then."""
    mean = weight = 0.0
    last, means, weights = start, np.empty(len(x)), np.empty(len(x))
    for i, (at, value) in enumerate(zip(tokens, x)):
        w = -math.expm1(-(at - last) / tau)
        mean, weight, last = mean + w * (value - mean), weight + w * (1 - weight), at
        means[i], weights[i] = mean / weight, weight
    return means, weights


def fraction_ema(c: Components, tau: float) -> Curve:
    """The trainer's estimate, number for number: FractionEma of llmc/gns.h. gtg and trsigma are shares of m."""
    fractions, weights = token_ema(c.tokens, c.gtg / c.m, tau)
    differences = np.diff(c.gtg / c.m) ** 2 / (1 / c.n[1:] + 1 / c.n[:-1])
    variance, _ = token_ema(c.tokens[1:], differences, VARIANCE_MEMORY * tau, c.tokens[0])
    squares, Q = np.empty(len(c.n)), 0.0
    for i, w in enumerate(-np.expm1(-np.diff(c.tokens, prepend=0.0) / tau)):
        squares[i] = Q = (1 - w) ** 2 * Q + w * w / c.n[i]
    errors = np.sqrt(np.append(math.nan, variance) * squares) / weights
    known = (np.arange(len(c.n)) > 0) & (fractions > 0)
    fractions, errors = np.where(known, fractions, math.nan), np.where(known, errors, math.nan)
    return Curve(c.tokens, np.maximum(0, 1 / fractions - 1), errors / fractions**2, fractions, 1 - fractions)


def component_ema(c: Components, alpha: float = 0.99) -> Curve:
    """The reference's estimate; pandas: ewm(alpha=1 - alpha, adjust=False).mean()."""
    x = np.stack([c.trsigma, c.gtg], axis=1)
    products = np.stack([c.trsigma**2, c.trsigma * c.gtg, c.gtg**2, np.ones(len(c.n))], axis=1)
    mean, weighted = x[0], products[0]  # sum_t w_t x_t and sum_t w_t^2 (products)_t, where sum_t w_t = 1
    means, squares = np.empty(x.shape), np.empty(products.shape)
    for i in range(len(x)):
        if i > 0:
            mean = alpha * mean + (1 - alpha) * x[i]
            weighted = alpha**2 * weighted + (1 - alpha) ** 2 * products[i]
        means[i], squares[i] = mean, weighted
    trsigma, gtg = means.T
    ss, sg, gg, weights = squares.T
    with np.errstate(divide="ignore", invalid="ignore"):
        gns = np.where(gtg > 0, trsigma / gtg, math.nan)
        variance = (ss - 2 * gns * sg + gns**2 * gg) / gtg**2 / (1 - weights)
        se = np.sqrt(np.maximum(variance, 0))
    se[0] = math.nan
    return Curve(c.tokens, gns, se, gtg, trsigma)


def jackknife(numerator: Array, denominator: Array) -> tuple[float, float]:
    """The ratio of the sums and its standard error; NaN where the denominator is not positive."""
    k, total, below = len(numerator), numerator.sum(), denominator.sum()
    if k < 2 or not below > 0:
        return math.nan, math.nan
    without = (total - numerator) / (below - denominator)
    return float(total / below), float(math.sqrt((k - 1) / k * np.sum((without - without.mean()) ** 2)))


# ----------------------------------------------------------------------------------------------------------------------
# Command lines


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line; the tool's docstring is its help."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help explains every option\n")


def positive(text: str) -> float:
    """A number above zero, with K, M or B behind it for thousands, millions and billions."""
    match = re.fullmatch(r"([0-9.eE+-]+)([KMB]?)", text)
    try:
        value = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above zero such as 0.5 or 30K, found '{text}'")
    return value


def share(text: str) -> float:
    """A number above 0 and below 1."""
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found '{text}'")
    return value


def format_tokens(tokens: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a tool; a LogError ends it with one line and status 2, a reader that goes away (head) without a word."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        print(f"error: this needs the package '{error.name}'; pip install -r scripts/requirements.txt", file=sys.stderr)
        sys.exit(2)
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
