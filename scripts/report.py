"""The report of a run or of a whole experiment: figures as PNG and SVG, and one page with all of it.

    python3 scripts/report.py out/demo                     one run, finished or still going on
    python3 scripts/report.py out/chinchilla-tiny          an experiment: what scripts/chinchilla.py leaves
    python3 scripts/report.py out/a out/b -o out/a-and-b   runs side by side, compared with the first one (or `fixed`)

Writes FOLDER/index.html, which needs nothing else, and FOLDER/<figure>.png and .svg; FOLDER is report/ in the first
folder given, or that of --out. It can be run again at any time, and reads only log.csv, config.json and plan.json.

An experiment's page says, with 95% intervals over the seeds, what each arm saves in tokens and in device time and what
its final loss is beside that of fixed, of the ramp's mean batch and of the best constant one. What the numbers mean
stands beside them, and at the top of scripts/report/savings.py how they are computed. Where an interval includes 0, the
page says so. Where arms were run at several peak learning rates (<arm>@lr<x>), each is also compared with the best
constant batch with both at their own best rate: scripts/report/sweep.py. With --best-rates all that the page shows is
of each arm at its best rate, under the arm's own name; FOLDER is then report-best-rates/.

Needs scripts/requirements.txt. Exit status: 0; 2 with one line on stderr if something given is not what it should be.
"""

from pathlib import Path

from report import figures
from report.captions import Caption, captions
from report.page import Picture, page
from report.results import compare
from report.runs import Experiment, printable, read_all
from report.sweep import at_best_rates
from report.words import summary
from gnslog import LogError, Parser, run  # of dev/, which the package report finds
from gnsplot import save
from matplotlib.figure import Figure

FIGURES = {
    "loss": figures.loss_figure,
    "difference": figures.difference_figure,
    "savings": figures.savings_figure,
    "final": figures.final_figure,
    "sweep": figures.sweep_figure,
    "batch": figures.batch_figure,
    "lr": figures.lr_figure,
    "groups": figures.groups_figure,
    "layernorm": figures.layernorm_figure,
    "phase": figures.phase_figure,
}


def write_picture(name: str, figure: Figure, folder: Path, caption: Caption) -> Picture:
    svg = folder / f"{name}.svg"
    figure.savefig(svg, metadata={"Date": None})
    save(figure, folder / f"{name}.png")
    return Picture(caption, svg)


def write_report(experiment: Experiment, swept: Experiment, folder: Path) -> None:
    """swept: the experiment with all learning rates"""
    results = compare(experiment, swept)
    words = captions(experiment, results)
    drawn: dict[str, Figure | None] = {}
    if experiment.is_single:
        drawn["overview"] = figures.overview(experiment.reference.first)
    drawn |= {name: draw(experiment, results) for name, draw in FIGURES.items()}
    pictures = [
        write_picture(name, figure, folder, words[name]) for name, figure in drawn.items() if figure is not None
    ]
    (folder / "index.html").write_text(printable(page(experiment, results, pictures)), encoding="utf-8")
    print("\n".join(f"{lead}. {printable(text)}" for lead, text in summary(experiment, results)))
    print(printable(f"\n{folder / 'index.html'}: {len(pictures)} figures"))


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, or of one experiment")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="where the report goes [RUN/report]")
    parser.add_argument("--best-rates", action="store_true", help="of each arm, only its best learning rate")
    args = parser.parse_args()
    swept = read_all(args.runs)
    experiment = at_best_rates(swept) if args.best_rates else swept
    folder = args.out or experiment.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(experiment, swept, folder)
    except OSError as error:
        raise LogError(
            f"cannot write the report in '{folder}': {error.strerror}; choose another folder with --out"
        ) from None
    return 0


if __name__ == "__main__":
    run(main)
