"""Tests of the tools for logs: gnslog.py, compare_logs.py, gns_analysis.py, micro_gns.py.

    make train_gpt && python3 dev/test_logs.py [--trainer ./train_gpt] [--nanogns path/to/nanoGNS/exact]

Gradients that are known number by number make logs with known answers; damaged logs must be refused in one line; and a
short run of the trainer must give, from its log alone, the estimates that it logged. With --nanogns, the reference's
own gns-analysis.py reads that run's log too (needs pandas) and must find what gns_analysis.py finds. The last line
counts.
"""

import csv
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from compare_logs import relative
from gnslog import (GROUPS, WTE, Array, Components, LogError, Parser, component_ema, fraction_ema, group_components,
                    jackknife, pair_components, read_log, run, tensor_components, tensors_of_group)

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "test"))
from suite import check, check_raises, summary  # noqa: E402

check_refused = partial(check_raises, LogError)

TENSORS = (WTE, "transformer.wpe.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_proj.weight",
           "transformer.h.0.mlp.c_fc.bias")


def check_close(found: Array | float, expected: Array | float, tolerance: float, what: str) -> None:
    """Relative; NaN only where NaN is expected."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    good = found.shape == expected.shape and np.allclose(found, expected, rtol=tolerance, atol=0, equal_nan=True)
    check(good, f"{what}: expected {expected}, found {found}")


def check_near(found: Array, expected: Array, tolerance: float, what: str) -> None:
    """Absolute."""
    worst = float(np.max(np.abs(found - expected)))
    check(worst <= tolerance, f"{what}: expected a difference of at most {tolerance:g}, found {worst:g}")


def tool(name: str, *args: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one of the tools."""
    done = subprocess.run([sys.executable, "-B", HERE / name, *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Logs with known answers


def norms(gradients: Array) -> tuple[float, float]:
    """|mean g_b| and sqrt(mean |g_b|^2). gradients (n, d)"""
    return float(np.linalg.norm(gradients.mean(axis=0))), float(np.sqrt((gradients**2).sum(axis=1).mean()))


def step_row(step: int, tokens: int, gradients: dict[str, Array]) -> dict[str, object]:
    n = len(next(iter(gradients.values())))
    row = {"step": step, "lr": 0, "grad_norm": 1, "gradient_accumulation_steps": 1, "train/lossf": 3}
    for name, g in gradients.items():
        norm, pegn = norms(g)
        row |= {f"train/gns/{name}/norm": norm, f"train/gns/{name}/pegn": pegn, f"train/gns/{name}/batch_size": n}
    return row | {"tokens_processed": tokens, "gns/none": "", "batch": n, "skipped": 0}


def write_log(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def draw_gradients(generator: np.random.Generator, n: int, gns: float, d: int = 20) -> Array:
    """n examples around the true gradient (1, 0, ..., 0), with tr(Sigma) = gns. (n, d)"""
    return np.eye(1, d) + math.sqrt(gns / d) * generator.standard_normal((n, d))


def known_rows(seed: int, steps: int, n: int = 8, gns: float = 5) -> list[dict[str, object]]:
    generator = np.random.default_rng(seed)
    return [step_row(i, (i + 1) * n * 4, {name: draw_gradients(generator, n, gns) for name in TENSORS})
            for i in range(steps)]


# ----------------------------------------------------------------------------------------------------------------------
# gnslog.py


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_reading(folder: Path) -> None:
    reference = ("step,train/lossf,train/gns/transformer.h.0.ln_1.affine.weight/norm,"
                 "train/gns/transformer.h.0.ln_1.affine.weight/pegn,"
                 "train/gns/transformer.h.0.ln_1.affine.weight/batch_size,tokens_processed,val/loss\r\n")
    log = read_log(write(folder / "r.csv", reference + "0,5.5,1,2,4,64\r\n1,tensor(5.25),2,3,4,128,5.0\r\n2,5.0,1"))
    check(log.is_reference and log.tensors == ["transformer.h.0.ln_1.weight"], "the reference's names are mapped")
    check_close(log.column("val/loss"), [math.nan, 5], 0, "a row shorter than the header; a torn last line is left out")
    check_close(log.column("train/lossf"), [5.5, 5.25], 0, "a loss printed as a tensor")
    check_close(log.batch, [4, 4], 0, "the batch, without a column of that name")
    ours = read_log(write_log(folder / "ours", known_rows(1, 2)))
    check(not ours.is_reference and len(ours.tensors) == len(TENSORS), "our own columns tell our log")
    check_refused(lambda: ours.column("dt"), "'dt'")


def test_malformed(folder: Path) -> None:
    head = "step,train/lossf,tokens_processed\n"
    cases = {
        "": ("header",),
        head: ("header and rows",),
        head + "0,1,2,3\n": ("line 2", "3 fields", "found 4"),
        head + "0,1,5\n1,abc,6\n": ("line 3", "train/lossf", "abc"),
        head + "0,1,5\n1,1,5\n": ("line 3", "tokens_processed", "found 5"),
        head + "0,1,5\n1,1,\n": ("line 3", "tokens_processed"),
        "a,tokens_processed,a\n1,2,3\n": ("'a' twice",),
        "step,loss\n0,1\n": ("tokens_processed",),
    }
    for text, words in cases.items():
        check_refused(partial(read_log, write(folder / "bad.csv", text)), "bad.csv", *words)
    (folder / "binary.csv").write_bytes(bytes(range(128, 256)))
    check_refused(partial(read_log, folder / "binary.csv"), "text file")
    check_refused(partial(read_log, folder / "none.csv"), "none.csv", "No such file")
    status, out, error = tool("gns_analysis.py", folder / "bad.csv")
    check(status == 2 and out == "" and error.count("\n") == 1, "a tool refuses a damaged log in one line, status 2")


def test_components(folder: Path) -> None:
    # Two examples, (3, 0) and (0, 4): m = 12.5, n2 = 6.25; gtg = <g_1, g_2> = 0, trsigma = 12.5.
    gtg, trsigma = pair_components(np.array([12.5]), np.array([6.25]), 1.0, 2.0)
    check_close([gtg[0], trsigma[0]], [0, 12.5], 0, "two orthogonal gradients have no common direction")
    rows = known_rows(2, 12)
    rows[3]["skipped"] = 1
    rows[4] = step_row(4, 5 * 32, {name: np.ones((1, 3)) for name in TENSORS})
    log = read_log(write_log(folder / "c", rows))
    for group, count in (("ln", 1), ("total", 5), ("total_nowte", 4)):
        tensors = tensors_of_group(log, group)
        check(len(tensors) == count, f"{group} has {count} tensors")
        c = group_components(log, group)
        check(len(c.n) == 10 and log.tokens[3] not in c.tokens, f"{group}: no skipped step, none of one example")
        m = sum(log.tensor(t, "pegn") ** 2 for t in tensors)[[0, 1, 2, *range(5, 12)]]
        check_close(c.m, m, 1e-12, f"{group}: gtg + trsigma = m")
    rows[7][f"train/gns/{WTE}/batch_size"] = 7
    bad = read_log(write_log(folder / "c", rows))
    check_refused(lambda: group_components(bad, "total"), "batch_size", "transformer.wpe.weight")
    for row in rows:
        del row["gns/none"]
    rows[7][f"train/gns/{WTE}/batch_size"] = 8
    reference = read_log(write_log(folder / "c", rows))
    check(group_components(reference, "wte") is None and group_components(reference, "total") is None
          and group_components(reference, "total_nowte") is not None, "nothing of the reference's wte")


def exact_components(n: int, gtg: list[float], trsigma: list[float], step: float = 10) -> Components:
    count = len(gtg)
    return Components(step * np.arange(1.0, count + 1), np.full(count, float(n)), np.array(gtg, float),
                      np.array(trsigma, float))


def test_estimators() -> None:
    c = exact_components(4, [1, 3, 2], [9, 5, 8])
    curve = component_ema(c, 0.5)
    gtg, trsigma = [1, 2, 2], [9, 7, 7.5]
    check_close(curve.gtg, gtg, 1e-15, "EMA of gtg from its first value")
    check_close(curve.gns, np.array(trsigma) / gtg, 1e-15, "ratio of EMAs")
    # Weights 1/4, 1/4, 1/2; R = 3.75; sum w^2 (t - R g)^2 = (5.25^2 + 6.25^2)/16 + 0.5^2/4; sum w^2 = 3/8.
    check_close(curve.se[2], math.sqrt(((5.25**2 + 6.25**2) / 16 + 0.0625) / 4 / (5 / 8)), 1e-12, "its standard error")
    check(math.isnan(curve.se[0]), "one step has no standard error")
    check(math.isnan(component_ema(exact_components(4, [-1], [9])).gns[0]), "a negative |G|^2 gives no estimate")

    f = np.array([0.1, 0.375])
    w = 1 - math.exp(-0.1)
    mean = (f[0] * (1 - w) + f[1]) / (2 - w)
    error = abs(f[1] - f[0]) / math.sqrt(2) * math.sqrt((1 - w) ** 2 + 1) / (2 - w)
    curve = fraction_ema(c.at(np.arange(2)), 100)
    check_close(curve.gns, [math.nan, 1 / mean - 1], 1e-12, "signal fraction, smoothed by tokens")
    check_close(curve.se[1], error / mean**2, 1e-12, "its standard error")

    x = np.array([1.0, 2, 4, 9])
    check_close(jackknife(x, np.ones(4)), (4, x.std(ddof=1) / 2), 1e-12, "the jackknife of a mean: its standard error")
    check(math.isnan(jackknife(x, -x)[0]), "the jackknife of a negative |G|^2 is no estimate")


def test_errors_are_honest() -> None:
    """Over 200 runs of 300 steps, the truth lies within two standard errors in about 95%: at least 180."""
    truth, inside = 5.0, np.zeros(3)
    for seed in range(200):
        g = draw_gradients(np.random.default_rng(seed), 300 * 8, truth).reshape(300, 8, -1)
        m, n2 = (g**2).sum(axis=2).mean(axis=1), (g.mean(axis=1) ** 2).sum(axis=1)
        c = exact_components(8, *pair_components(m, n2, 1.0, 8.0))
        curves = fraction_ema(c, 300), component_ema(c, 0.95)
        pairs = [(curve.gns[-1], curve.se[-1]) for curve in curves] + [jackknife(c.trsigma, c.gtg)]
        inside += [abs(gns - truth) < 2 * error for gns, error in pairs]
    for count, name in zip(inside, ("fraction_ema", "component_ema", "jackknife")):
        check(180 <= count < 200, f"{name}: the truth within two standard errors in {count:.0f} of 200 runs")


# ----------------------------------------------------------------------------------------------------------------------
# The tools


def test_compare(folder: Path) -> None:
    rows = known_rows(3, 60)
    a = write_log(folder / "a", rows)
    status, out, _ = tool("compare_logs.py", a, a)
    check(status == 0 and "the logs agree" in out and "DIFFER" not in out, "a log agrees with itself")

    column = f"train/gns/{TENSORS[3]}/norm"
    rows[17] = rows[17] | {column: rows[17][column] * 1.02}
    b = write_log(folder / "b", rows[5:])
    status, out, _ = tool("compare_logs.py", a, b)
    line = next(line for line in out.splitlines() if line.startswith("norm"))
    check(status == 1 and "step 17" in line and TENSORS[3] in line and "DIFFER" in line, f"the place is found: {line}")
    check_close(float(line.split()[1]), 0.02 / 1.02, 1e-2, "the worst relative difference")
    check("55 rows compared, 5 more in A, 0 more in B" in out, "rows are aligned by tokens")
    loose = [part for name in ("norm", "gtg", "trsigma", "gns", "gns_se") for part in ("--tol", f"{name}=1")]
    check(tool("compare_logs.py", a, b, *loose)[0] == 0, "tolerances can be changed")
    b = write_log(folder / "b", rows)
    statuses = [tool("compare_logs.py", a, b, "--steps", n)[0] for n in (17, 18)]
    check(statuses == [0, 1], f"only the first rows are compared: {statuses}")

    rows[20] = rows[20] | {"train/lossf": "nan"}
    status, out, _ = tool("compare_logs.py", a, write_log(folder / "b", rows), *loose)
    line = next(line for line in out.splitlines() if line.startswith("loss"))
    check(status == 1 and "inf" in line and "step 20" in line, f"a NaN beside a number differs: {line}")
    nan = np.array([1, math.nan, math.nan, math.inf])
    check_close(relative(nan, np.array([1, math.nan, 1, math.inf]), np.ones(4)), [0, 0, math.inf, 0], 0, "not a number")

    picture = folder / "compare.png"
    tool("compare_logs.py", a, b, "--plot", picture)
    check(picture.read_bytes()[:4] == b"\x89PNG", "the figure is drawn")
    shifted = [row | {"tokens_processed": row["tokens_processed"] + 1} for row in rows]
    check_status(tool("compare_logs.py", a, write_log(folder / "b", shifted)), "no rows in common", "tokens_processed")
    check_status(tool("compare_logs.py", a, b, "--tol", "nonsense=1"), "an unknown quantity", "nonsense")
    check_status(tool("compare_logs.py", a), "a missing log", "B")


def check_status(result: tuple[int, str, str], what: str, *words: str) -> None:
    status, _, error = result
    good = status == 2 and error.count("\n") == 1 and all(word in error for word in words)
    check(good, f"{what}: expected status 2 and a line with {words}, found {status}: {error}")


def test_compare_reference(folder: Path) -> None:
    rows = known_rows(4, 40)
    ours = write_log(folder / "ours", rows)
    for row in rows:
        del row["gns/none"], row["batch"], row["skipped"]
        row[f"train/gns/{WTE}/pegn"] /= 2
        row["gradient_accumulation_steps"] = 2
        row["train/lossf"] = 4
    renamed = [{k.replace("ln_1.", "ln_1.affine."): v for k, v in row.items()} for row in rows]
    status, out, _ = tool("compare_logs.py", ours, write_log(folder / "theirs", renamed))
    apart = [line for line in out.splitlines() if "not judged" in line]
    check(status == 0 and len(apart) == 2 and WTE in apart[1], f"the reference's wte and loss are set apart:\n{out}")
    check("total" not in tool("compare_logs.py", ours, folder / "theirs", "--all")[1].replace("total_nowte", ""),
          "no total of the reference's wte")


def test_analysis(folder: Path) -> None:
    log = write_log(folder / "known", known_rows(5, 400))
    curves = folder / "curves.csv"
    picture = folder / "analysis.png"
    status, out, error = tool("gns_analysis.py", log, "--group", "mine=ln_1|bias", "--csv", curves, "--plot", picture)
    check(status == 0 and error == "", f"the analysis runs: {error}")
    table = {line.split()[0]: line.split() for line in out.splitlines() if len(line.split()) == 10}
    for group in (*GROUPS, "mine"):
        last, error = float(table[group][6]), float(table[group][7])
        check(abs(last - 5) < 4 * error < 4, f"{group}: expected a noise scale of 5, found {last} +- {error}")
    c = group_components(read_log(log), "mlp")
    window = [f"{x:.4g}" for x in jackknife(c.trsigma[-40:], c.gtg[-40:])]
    check(table["mlp"][6:8] == window, f"the last tenth of the steps: expected {window}, found {table['mlp']}")
    check("total GNS on ln GNS" in out and "total_nowte GNS on ln GNS" in out, "LayerNorm against total")
    check(picture.read_bytes()[:4] == b"\x89PNG", "the figure is drawn")
    written = read_log(curves)
    expected = component_ema(group_components(read_log(log), "total"))
    check_close(written.column("total/per_step"), expected.gns, 1e-13, "the curves are written")
    half = tool("gns_analysis.py", log, "--until", "0.5", "--tau", "1K")[1]
    short = write_log(folder / "short", known_rows(5, 400)[:200])
    same = tool("gns_analysis.py", short, "--tau", "1K")[1].replace(str(short), str(log))
    check(half == same, "until half of the tokens is what a run of half as many says")
    check_status(tool("gns_analysis.py", log, "--until", "0.001"), "no rows", "--until")
    check_status(tool("gns_analysis.py", log, "--group", "x=nothing"), "a group without tensors", "nothing")
    check_status(tool("gns_analysis.py", log, "--tau", "-1"), "a negative smoothing length", "--tau")
    alone = write_log(folder / "alone", known_rows(6, 5, n=1))
    check_status(tool("gns_analysis.py", alone), "steps of one example", "two examples")


def micro_logs(folder: Path, gradients: Array, sizes: tuple[int, ...]) -> list[Path]:
    """A log for each size of batch, over the same examples. gradients (examples, d)"""
    logs = []
    for s in sizes:
        steps = gradients.reshape(len(gradients) // s, s, -1)
        rows = [step_row(i, 4 * s * (i + 1), {name: g for name in TENSORS}) for i, g in enumerate(steps)]
        logs.append(write_log(folder / f"micro{s}", rows))
    return logs


def test_micro(folder: Path) -> None:
    gradients = draw_gradients(np.random.default_rng(7), 16 * 200, 5, d=6)
    logs = micro_logs(folder, gradients, (1, 4, 8, 16))
    status, out, error = tool("micro_gns.py", *logs, "--plot", folder / "micro.png")
    check(status == 0 and error == "" and "as expected" in out, f"the micro-batches' noise scale is found: {error}")
    table = {tuple(line.split()[:3]): line.split() for line in out.splitlines() if line.startswith("ln ")}
    big = (gradients.reshape(200, 16, -1).mean(axis=1) ** 2).sum(axis=1)
    for s in (1, 4, 8):
        small = (gradients.reshape(200, 16 // s, s, -1).mean(axis=2) ** 2).sum(axis=2).mean(axis=1)
        gtg, trsigma = pair_components(small, big, s, 16)
        gns, se = jackknife(trsigma, gtg)
        row = table["ln", "all", str(s)]
        check(row[3:5] == [f"{gns:.2f}", f"{se:.2f}"], f"batches of {s}: expected {gns} +- {se}, found {row}")
    widths = [float(table["ln", "all", s][5]) for s in ("1", "4", "8")]
    check(widths[0] == 1 and 1 < widths[1] < widths[2], f"larger micro-batches, wider errors: {widths}")
    errors = [float(table["ln", "all", s][7]) for s in ("1", "4", "8")]
    check(errors[0] == 0 and 0 < errors[1] < errors[2] < widths[2], f"and these have errors of their own: {errors}")
    check((folder / "micro.png").read_bytes()[:4] == b"\x89PNG", "the figure is drawn")

    other = draw_gradients(np.random.default_rng(8), 16 * 200, 5, d=6)
    status = tool("micro_gns.py", *micro_logs(folder, other, (1,)), *logs[1:])[0]
    check(status == 1, f"wrong per-example norms are found: expected status 1, found {status}")
    five = micro_logs(folder, gradients, (5,))[0]
    check_status(tool("micro_gns.py", five, logs[3]), "5 does not divide 16", "divide 16")
    check_status(tool("micro_gns.py", logs[3]), "one log", "two or more")
    for column, value, words in (("train/lossf", 3.1, "losses"), ("lr", 1e-4, "learning rate")):
        rows = [step_row(i, 32 * (i + 1), {name: g for name in TENSORS}) | {column: value}
                for i, g in enumerate(gradients.reshape(400, 8, -1))]
        check_status(tool("micro_gns.py", write_log(folder / "eight", rows), logs[3]), f"another {column}", words)


# ----------------------------------------------------------------------------------------------------------------------
# A run of the trainer


def write_tokens(path: Path) -> None:
    """A file of byte tokens that a model can learn: each mostly follows from the one before."""
    generator = np.random.default_rng(9)
    tokens = np.cumsum(generator.choice([1, 2, 5], size=20000, p=[0.8, 0.1, 0.1])) % 60
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240520, 1, len(tokens), 64
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def train(trainer: Path, folder: Path, name: str, *options: str) -> Path:
    write_tokens(folder / "train.bin")
    command = [trainer.resolve(), "-i", folder / "train.bin", "-e", "L=1,H=2,C=32,T=16", "-b", "8", "-d", "256",
               "--max-tokens", "60K", "--lr", "3e-3", "-v", "0", "-o", folder / name, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # so small a model has no work for two
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise LogError(f"expected the trainer to run, found status {done.returncode}: {done.stderr.strip()}")
    return folder / name


def test_trainer(trainer: Path, folder: Path) -> Path:
    """The trainer logs 9 digits of its components; so the signal fraction that they give is compared, 1/(1 + GNS)."""
    runs = {"fixed": ("--gns", "all"), "growing": ("--gns", "all", "--batch-schedule", "linear:2:40"),
            "skipping": ("--gns", "all", "-sg", "1.5", "--max-bad-steps", "200"), "ln": (),
            "mixed": ("--gns-all-every", "3")}
    for name, options in runs.items():
        log = read_log(train(trainer, folder, name, *options))
        tau = 600.0  # 1% of the budget
        for group in GROUPS if name != "ln" else ("ln",):
            c = group_components(log, group)
            curve = fraction_ema(c, tau)
            rows = np.searchsorted(log.tokens, c.tokens)
            known = np.isfinite(log.column(f"gns/{group}")[rows])
            same = np.array_equal(known, np.isfinite(curve.gns))
            check(same and known.sum() > 20, f"{name}, {group}: the same steps have estimates")
            f = 1 / (1 + log.column(f"gns/{group}")[rows][known])
            error = log.column(f"gns/{group}/se")[rows][known] * f**2
            check_near(curve.gtg[known], f, 1e-8, f"{name}: gns/{group}")
            check_near(curve.se[known] * curve.gtg[known] ** 2, error, 1e-7, f"{name}: gns/{group}/se")
            again = tensor_components(log, tensors_of_group(log, group))
            check_near(again.gtg / c.m, c.gtg / c.m, 1e-8, f"{name}, {group}: from the tensors' norms")
    skipped = ~read_log(folder / "skipping").applied
    check(skipped.any(), "the run that shall skip steps did")
    check(tool("compare_logs.py", folder / "fixed", folder / "fixed")[0] == 0, "the trainer's log agrees with itself")
    return folder / "growing"


def test_nanogns(exact: Path, folder: Path) -> None:
    """The reference's own script on our log, unchanged; its smoothed values have 15 digits, ours come from 9."""
    command = [sys.executable, "-B", "gns-analysis.py", folder, "--no-plots"]
    done = subprocess.run(command, cwd=exact, capture_output=True, text=True)
    check(done.returncode == 0, f"nanoGNS's gns-analysis.py reads our log: {done.stderr}")
    theirs = read_log(folder / "gns_analysis.csv")
    ours = component_ema(group_components(read_log(folder), "total_nowte"))
    for column, values in (("gns", ours.gns), ("gtg_ema", ours.gtg), ("trsigma_ema", ours.trsigma)):
        check_close(values, theirs.column(column), 1e-6, f"nanoGNS's {column}")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--trainer", type=Path, default=HERE.parent / "train_gpt", help="[the repository's train_gpt]")
    parser.add_argument("--nanogns", type=Path, metavar="FOLDER", help="nanoGNS's folder exact, to run its analysis")
    args = parser.parse_args()
    if not args.trainer.is_file():
        raise LogError(f"expected the trainer at '{args.trainer}', found none; build it with make train_gpt")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for test in (test_reading, test_malformed, test_components, test_compare, test_compare_reference, test_analysis,
                     test_micro):
            test(folder)
        test_estimators()
        test_errors_are_honest()
        log = test_trainer(args.trainer, folder)
        if args.nanogns:
            test_nanogns(args.nanogns, log)
    return summary()


if __name__ == "__main__":
    run(main)
