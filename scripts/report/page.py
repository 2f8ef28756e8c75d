"""The page: what the results are in words and tables, the figures with captions, and the commands that made the runs.

One file without anything outside it: the figures are inside, as SVG. Whatever stands on it is computed from the runs.
"""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gnslog import format_tokens

from .captions import Caption
from .command import command
from .drawing import rate_name
from .results import QUARTERS, EndSaving, Result, Results, WorthSaved, at_quarters, notes
from .runs import Arm, Experiment
from .savings import NOTHING, Interval, t_interval
from .sweep import Family, Sweep
from .words import duration, loss_verdict, nats, number, saving_verdict, several, share, summary

STYLE = """
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; color: #1a1a1a;
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.2rem; margin-top: 2.6rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-size: .8rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; vertical-align: top; white-space: nowrap;
         border-bottom: 1px solid #e2e2e2; }
th { font-weight: 600; border-bottom: 1.5px solid #1a1a1a; }
th:first-child, td:first-child, .text { text-align: left; }
.text { white-space: normal; min-width: 9rem; }
figure { margin: 1.8rem 0 2.4rem; }
figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
pre { background: #f5f5f5; padding: .8rem 1rem; font-size: .8rem; white-space: pre-wrap; }
summary { cursor: pointer; }
"""


NOT_COMPARABLE = "times are not comparable"


@dataclass(frozen=True)
class Picture:
    caption: Caption
    svg: Path


def paragraph(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>"


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int]) -> str:
    """Numbers to the right, the first and text columns to the left."""
    kinds = [" class=text" if i in text_columns else "" for i in range(len(header))]

    def line(tag: str, row: Sequence[str]) -> str:
        cells = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


def arms_table(experiment: Experiment) -> str:
    names = "arm, what, peak rate, finished, steps, mean batch, tokens, device time, final loss, s.d."
    return table(names.split(", "), [arm_row(arm) for arm in experiment.arms], (1,)) + paragraph(
        "Finished: of the runs that have begun. The other numbers are means over the finished runs (over those that "
        "have begun where none has finished). Peak rate: of the learning rate; mean batch in sequences; "
        "device time is the sum of dt over the steps, without evaluations and checkpoints; final loss is the "
        "validation loss, in nats per token, after the last step; s.d. is its standard deviation over the seeds."
    )


def arm_row(arm: Arm) -> list[str]:
    runs = list(arm.finished().values()) or list(arm.runs.values())
    losses = [run.final_loss for run in arm.finished().values()]
    return [
        arm.name,
        arm.title,
        rate_name(arm.rate) if math.isfinite(arm.rate) else "–",
        f"{len(losses)} of {len(arm.runs)}",
        f"{np.mean([r.steps for r in runs]):,.0f}",
        number(float(np.mean([r.mean_batch for r in runs])), 1),
        format_tokens(float(np.mean([r.tokens[-1] for r in runs]))),
        duration(float(np.mean([r.seconds[-1] for r in runs]))),
        number(t_interval(losses).mean, 4),
        number(float(np.std(losses, ddof=1)), 4) if len(losses) > 1 else "–",
    ]


def final_table(experiment: Experiment, results: Results) -> str:
    best, reference = results.best_constant, experiment.reference.name
    columns = [
        (f"less that of {reference}", lambda r: r.against_reference),
        ("less that of mean", lambda r: r.against_mean),
        (f"less the best constant's ({best.name})" if best else "less the best constant's", lambda r: r.against_best),
    ]
    rows = [
        [r.arm.name, *(nats(of(r)) for _, of in columns), str(r.against_reference.n), loss_verdict(r.against_reference)]
        for r in results.arms
        if any(of(r).n > 0 for _, of in columns)
    ]
    text = (
        "Final validation loss of the arm less that of the other one, in nats per token (negative: the arm is "
        "better): mean over the n seeds that both have finished, with its 95% t interval. Intervals are not widened "
        "for the number of comparisons: of twenty arms without any effect, one is expected to seem to have one. The "
        "best constant is the arm of constant batch and full budget with the lowest mean over the seeds that all such "
        "arms have finished (where there is a learning-rate sweep, that of the next table); as it was chosen after the "
        f"fact, it is a hard rival. Arms on another budget than {reference}'s count here as they are."
    )
    header = ["final loss", *(name for name, _ in columns), "n", f"against {reference}"]
    return table(header, rows, (5,)) + paragraph(text) if rows else ""


def sweep_section(sweep: Sweep | None) -> str:
    """Each arm at its own best learning rate."""
    if sweep is None:
        return ""
    rival = sweep.best_constant
    less = f"less that of {rival.name} at {rate_name(rival.best.rate)}" if rival else "less the best constant's"
    header = ["arm", "rates run", "best rate", "of those run", "final loss", "seeds", less, "n", "verdict"]
    text = (
        "Finished runs only. The best rate of an arm is the peak learning rate with the lowest mean final loss of "
        "those that were run, "
        "among the rates with the most seeds (of equal means the lower one); in parentheses, seeds of rates with "
        "fewer. The best constant batch is chosen in the same way, after the fact, among the arms of constant batch "
        "that have the most seeds, each at its best rate. Difference: final loss at the arm's best rate less that of "
        "the best constant batch at its own, in nats per token, negative where the arm is better: mean over the n seeds that both have finished, "
        "with its 95% t interval. Choosing the lowest of several means flatters arms with many rates a little. Where "
        "the best rate is the lowest or the highest run, a better one may lie beyond; an arm with one rate is not "
        "tuned."
    )
    rows = [sweep_row(sweep, family) for family in sweep.families]
    return f"<h2>Each arm at its own best learning rate</h2>{table(header, rows, (3, 8))}{paragraph(text)}"


def sweep_row(sweep: Sweep, family: Family) -> list[str]:
    i, best = sweep.against_best(family), family.best
    most = len(best.losses)
    rates = [rate_name(v.rate) + (f" ({len(v.losses)})" if len(v.losses) < most else "") for v in family.variants]
    found = "the best constant batch" if family is sweep.best_constant else loss_verdict(i)
    numbers = [number(best.mean, 4), str(most), nats(i), str(i.n) if i.n else "–"]
    return [family.name, ", ".join(rates), rate_name(best.rate), family.edge, *numbers, found]


def quarters_table(experiment: Experiment, results: Results, of_time: bool) -> str:
    rows = []
    for result in results.arms:
        levels = at_quarters(result, experiment.reference)
        if any(k is not None for k in levels):
            found = [level_cell(result, k, of_time) for k in levels]
            last = level_interval(result, levels[-1], of_time)
            counts = {i.n for k in levels if (i := level_interval(result, k, of_time)).n}
            n = " to ".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"
            shown = saving_verdict(last) if last.n else found[-1]
            rows.append([result.arm.name, *found, n, NOT_COMPARABLE if of_time and results.disturbed else shown])
    what = "device time" if of_time else "tokens"
    header = [f"{what} saved", *(f"by {q:.0%}" for q in QUARTERS), "n", "verdict by 100%"]
    return table(header, rows, (6,)) if rows else ""


def level_interval(result: Result, level: int | None, of_time: bool) -> Interval:
    if level is None:
        return NOTHING
    return (result.along.seconds if of_time else result.along.tokens)[level]


def level_cell(result: Result, level: int | None, of_time: bool) -> str:
    i = level_interval(result, level, of_time)
    if level is not None and result.along.missed[level]:
        return f"never reached in {result.along.missed[level]}"
    return share(i) if i.n > 0 else "–"


def along_section(experiment: Experiment, results: Results) -> str:
    reference = experiment.reference.name
    tables = "".join(quarters_table(experiment, results, of_time) for of_time in (False, True))
    text = (
        f"At the lowest validation loss that {reference} had seen by 25, 50, 75 and 100% of its tokens: the share of "
        "the tokens, or of the device time by each run's own clock, that the arm needed less to come down to that "
        "loss for the first time, linear between evaluations; geometric mean over n seeds with its 95% t interval. "
        "This is how arXiv 2411.00999 reads its 18%. It compares learning-rate schedules cut short at different "
        "points, so a schedule fitted to a smaller budget seems to save by itself (arms such as fitted show how "
        "much): the next section does not have that fault. “Never reached in k”: k seeds of the arm ended without "
        "that loss, and no mean is given, as it would leave out the worst ones."
    )
    return f"<h2>Saved at equal loss, along the run</h2>{tables}{paragraph(text)}" if tables else ""


def worth_section(experiment: Experiment, results: Results) -> str:
    reference = experiment.reference.name
    of_itself = (
        "Arms with repetitions of their own on other budgets: their final losses give, seed by seed, the loss as a "
        f"line in the logarithm of the budget. Where it comes down to the final loss of {reference}, the arm has had "
        f"so much less than {reference} took; the columns beside these say the same of the best constant batch. "
        "Geometric mean over the seeds with its 95% t interval. Prolonged: seeds, of how many, in which the other's "
        "loss does not lie between the arm's own, and so beyond the ends of the line."
    )
    of_reference = (
        f"The final losses of {reference} and of its repetitions fitted to other budgets give, seed by seed, the loss "
        f"as a line in the logarithm of the budget. An arm is worth the budget with which {reference} would end at the "
        "arm's final loss; it saved the share by which its own tokens are fewer (for device time: by which its own "
        f"time is shorter than that budget takes at the speed of {reference}). The columns beside these compare it in "
        "the same way with the best constant batch, whose loss has its price on the same line. Geometric mean over the "
        "seeds with its 95% t interval. Prolonged: seeds, of how many, in which a loss lies outside those measured, "
        "and so beyond the ends of the line."
    )
    tables = (
        fitted_table(experiment, results)
        + worth_table("saved by its own budgets", [(r.arm.name, r.own_worth) for r in results.arms], of_itself, results)
        + worth_table(
            f"saved by those of {reference}", [(r.arm.name, r.worth) for r in results.arms], of_reference, results
        )
    )
    return "<h2>Saved at the end of the run, by schedules fitted to their budgets</h2>" + tables if tables else ""


def fitted_table(experiment: Experiment, results: Results) -> str:
    reference = experiment.reference.name
    rows = []
    for f in results.fitted:
        i = f.against_reference
        if i.n > 0:
            losses = nats(i), nats(f.against_fitted_reference)
            rows.append([f.arm.name, share(f.tokens), share(f.seconds), *losses, str(i.n), loss_verdict(i)])
    if not rows:
        return ""
    losses = f"final loss less that of {reference}", f"less that of {reference}, fitted"
    return table(["fitted", "fewer tokens", "less time", *losses, "n", "verdict"], rows, (6,)) + paragraph(
        "Runs on fewer tokens, with the whole learning-rate schedule fitted to them: what they saved for certain, and "
        f"the final loss they paid for it, in nats per token, against {reference} on its full budget (verdict) and "
        f"against {reference} fitted to the same budget. An interval that includes 0 does not show that they are "
        "equal: its upper end is the price that cannot be excluded."
    )


def worth_table(what: str, worths: Sequence[tuple[str, WorthSaved | None]], text: str, results: Results) -> str:
    rows = []
    for name, w in worths:
        if w is not None:
            cells = [cell for saved in (w.of_reference, w.of_best) for cell in saving_cells(saved)]
            of_time = NOT_COMPARABLE if results.disturbed else saving_verdict(w.of_reference.seconds)
            verdicts = saving_verdict(w.of_reference.tokens), of_time
            rows.append([name, *cells, *verdicts])
    best = f"less {results.best_constant.name}'s" if results.best_constant else "less the best constant's"
    saved = ["tokens", "device time", "prolonged", f"tokens, {best}", f"device time, {best}", "prolonged"]
    header = [what, *saved, "tokens: verdict", "time: verdict"]
    return table(header, rows, (7, 8)) + paragraph(text) if rows else ""


def saving_cells(saved: EndSaving) -> list[str]:
    """Tokens, device time, prolonged."""
    if saved.worthless:
        prolonged = f"more tokens bought nothing in {saved.worthless} of the seeds"
    else:
        prolonged = f"{saved.beyond} of {saved.tokens.n}" if saved.tokens.n else "–"
    return [share(saved.tokens), share(saved.seconds), prolonged]


# ----------------------------------------------------------------------------------------------------------------------
# The page


def picture_html(picture: Picture) -> str:
    title, text = html.escape(picture.caption.title), html.escape(picture.caption.text)
    data = base64.b64encode(picture.svg.read_bytes()).decode()
    image = f'<img alt="{title}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure id="{picture.svg.stem}">{image}<figcaption><b>{title}.</b> {text}</figcaption></figure>'


def commands_section(experiment: Experiment) -> str:
    opened = " open" if experiment.is_single else ""
    parts = [
        f"<details{opened}><summary>{html.escape(arm.name)}</summary>"
        f"<pre>{html.escape(command(arm.first))}</pre></details>"
        for arm in experiment.arms
        if arm.first.config
    ]
    revision = experiment.reference.first.config.get("git-revision")
    seeds = several([str(seed) for seed in experiment.seeds])
    others = (
        "" if len(experiment.seeds) == 1 else f" Of each arm's first seed; those of {seeds} differ in --seed and --out."
    )
    text = f"From config.json, at revision {revision}.{others}"
    return "<h2>Commands</h2>" + paragraph(text) + "".join(parts) if parts else ""


def page(experiment: Experiment, results: Results, pictures: Sequence[Picture]) -> str:
    title = html.escape(f"{experiment.name}: report of {'a run' if experiment.is_single else 'an experiment'}")
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in [*notes(experiment), results.disturbed] if text)
    final = final_table(experiment, results)
    parts = [
        f"<h1>{title}</h1>",
        *(f"<p><b>{html.escape(lead)}.</b> {html.escape(text)}</p>" for lead, text in summary(experiment, results)),
        f"<ul class=note>{remarks}</ul>" if remarks else "",
        "" if experiment.is_single else f"<h2>Arms</h2>{arms_table(experiment)}",
        f"<h2>Final loss</h2>{final}" if final else "",
        sweep_section(results.sweep),
        along_section(experiment, results),
        worth_section(experiment, results),
        "<h2>Figures</h2>",
        *(picture_html(picture) for picture in pictures),
        commands_section(experiment),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    body = "\n".join(part for part in parts if part)
    return f"<!DOCTYPE html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
