"""The loss curves as a picture: `python -m training.shapes.plot_training runs/autoencoder runs/denoiser -o loss.png`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMOOTHING = 0.9  # of the bold line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="training folders with a loss.csv")
    parser.add_argument("-o", "--output", type=Path, default=Path("loss.png"))
    arguments = parser.parse_args()
    figure, axes = plt.subplots(
        1, len(arguments.folders), figsize=(5 * len(arguments.folders), 3.4), squeeze=False
    )
    for axis, folder in zip(axes[0], arguments.folders, strict=True):
        with (folder / "loss.csv").open() as file:
            rows = list(csv.DictReader(file))
        steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
        smooth, value = [], losses[0]
        for loss in losses:
            value = SMOOTHING * value + (1 - SMOOTHING) * loss
            smooth.append(value)
        axis.plot(steps, losses, color="#9db8d9", linewidth=0.8)
        axis.plot(steps, smooth, color="#1f4e8c", linewidth=1.6)
        axis.set(title=folder.name, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=130)


if __name__ == "__main__":
    main()
