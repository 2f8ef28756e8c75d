"""The report of one run or of a whole experiment; scripts/report.py is its command.

    savings.py     statistics: t intervals, tokens and time saved at equal loss, budgets of equal worth   (numbers only)
    runs.py        reads runs and experiments, pairs their seeds
    sweep.py       arms at several learning rates, each at its own best
    results.py     the experiment's results: what each arm saves and loses, with intervals
    drawing.py     parts of figures: colours of arms, scales, names of lines
    figures.py     the figures        captions.py    their captions
    words.py       the results in words        command.py    the command that made a run
    page.py        the page

Each knows only those above it. Reading log.csv, the estimators of the noise scale and the look of figures are those of
the tools in dev/ (gnslog.py, gns_analysis.py, gnsplot.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dev"))
