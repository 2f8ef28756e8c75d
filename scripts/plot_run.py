"""Draws one run: loss, gradient noise scale and batch size over tokens.

    python3 scripts/plot_run.py out/demo picture.svg        (or .png)

Reads RUN/log.csv; works while the run goes on. Needs scripts/requirements.txt.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

# Colours that stay apart in print and for the colour-blind (Okabe & Ito 2008).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def draw(log: pd.DataFrame, picture: Path) -> None:
    tokens = log["tokens_processed"] / 1e6
    figure, (loss, batch) = plt.subplots(2, 1, sharex=True, figsize=(7.5, 5), height_ratios=(1, 1.1))

    loss.plot(tokens, log["train/lossf"], color=GREY, linewidth=0.5, alpha=0.6, label="training, each step")
    evaluated = log.dropna(subset=["val/loss"])
    loss.plot(evaluated["tokens_processed"] / 1e6, evaluated["val/loss"], "o-", color=BLUE, markersize=4, label="validation")
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False)

    known = log.dropna(subset=["gns/ln"])
    at, gns, error = known["tokens_processed"] / 1e6, known["gns/ln"], known["gns/ln/se"]
    batch.fill_between(at, gns - 2 * error, gns + 2 * error, color=ORANGE, alpha=0.2, linewidth=0, label="± 2 standard errors")
    batch.plot(at, gns, color=ORANGE, linewidth=1, label="gradient noise scale (LayerNorm)")
    batch.step(tokens, log["batch"], where="post", color=GREEN, linewidth=2, label="batch size")
    batch.set_ylabel("sequences")
    batch.set_xlabel("tokens (millions)")
    batch.set_ylim(0, 1.15 * max(log["batch"].max(), gns.quantile(0.98)) if len(gns) else None)
    batch.legend(frameon=False, loc="upper left")

    for axes in (loss, batch):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(pd.read_csv(Path(sys.argv[1]) / "log.csv"), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
