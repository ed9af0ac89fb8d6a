"""Draws figure.png: where a main param can be, and where one step can take it."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OLD, NEW, STEP = 1.0, 0.0, 2.3  # rows of the picture; lr in ulps
TOWARDS, AWAY = "tab:blue", "tab:orange"


def main() -> None:
    figure, axis = plt.subplots(figsize=(8, 2.6))
    for row, label in ((OLD, "before"), (NEW, "after")):
        axis.hlines(row, -4, 4, color="grey", linewidth=0.8)
        axis.text(-4.15, row, label, ha="right", va="center")
        for value in range(-4, 5):
            axis.vlines(value, row - 0.05, row + 0.05, color="grey", linewidth=0.8)
    axis.hlines(OLD, -0.5, 0.5, color="black", linewidth=7, alpha=0.35)
    axis.plot(0, OLD, "o", color="black")
    axis.text(0, OLD + 0.14, "all ranks know the bf16 value; its main param lies in the grey interval", ha="center")
    for shift, color, digits, name in (
        (-STEP, TOWARDS, (2, 3), "towards zero: 2, 3 (4)"),
        (STEP, AWAY, (0, 1), "away from zero: 0, 1"),
    ):
        axis.hlines(NEW, shift - 0.5, shift + 0.5, color=color, linewidth=7, alpha=0.35)
        for end in (-0.5, 0.5):
            axis.plot([end, end + shift], [OLD, NEW], color=color, linewidth=0.8, linestyle=":")
        nearest = round(shift - 0.5), round(shift + 0.5)
        for value, digit in zip(nearest, digits, strict=True):
            axis.plot(value, NEW, "o", color=color)
            axis.text(value, NEW - 0.28, str(digit), ha="center", color=color)
        axis.text(shift, NEW - 0.55, name, ha="center", color=color)
    axis.plot(0, NEW, "o", color="black")
    axis.text(0, NEW - 0.28, "5", ha="center")
    axis.text(0, NEW - 0.55, "not at all: 5", ha="center")
    axis.set(xlim=(-5, 4.2), ylim=(-0.7, 1.35))
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("figure.png"), dpi=100)


if __name__ == "__main__":
    main()
