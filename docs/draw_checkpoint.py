"""Draws docs/checkpoint.png, what a checkpoint holds, with the code that cuts: ``python docs/draw_checkpoint.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from lion_dist.boxes import Box, boxes_of_range  # noqa: E402
from lion_dist.sharding.layout import BucketLayout  # noqa: E402

SHAPE = (6, 10)
COLORS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]


def sharded_lion(ranks: int) -> list[list[Box]]:
    """The boxes of each rank when the parameter is the middle one of a bucket."""
    layout = BucketLayout((9, SHAPE[0] * SHAPE[1], 7), ranks, alignment=1)
    return [
        [box for s in layout.slices(rank) if s.param == 1 for box in boxes_of_range(SHAPE, s.param_start, s.param_stop)]
        for rank in range(ranks)
    ]


def rows(ranks: int) -> list[list[Box]]:
    """FSDP2, dim 0."""
    each = -(-SHAPE[0] // ranks)
    starts = range(0, SHAPE[0], each)
    return [[Box((start, 0), (min(each, SHAPE[0] - start), SHAPE[1]))] for start in starts]


def tensor_parallel(ranks: int) -> list[list[Box]]:
    """FSDP2 on dim 0 and tensor parallel on dim 1, two ranks each."""
    size = (SHAPE[0] // 2, SHAPE[1] // 2)
    return [[Box((size[0] * (rank // 2), size[1] * (rank % 2)), size)] for rank in range(ranks)]


def draw(axes, title: str, ranks: list[list[Box]]) -> None:
    for rank, boxes in enumerate(ranks):
        for box in boxes:
            (row, column), (height, width) = box.offsets, box.sizes
            axes.add_patch(Rectangle((column, row), width, height, facecolor=COLORS[rank], edgecolor="white", lw=2))
            axes.text(column + width / 2, row + height / 2, str(rank), ha="center", va="center", color="white")
    axes.set(xlim=(0, SHAPE[1]), ylim=(SHAPE[0], 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)


def main() -> None:
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.5))
    draw(axes[0], "ShardedLion or FSDP1, 4 ranks:\nflat ranges, cut into boxes", sharded_lion(4))
    draw(axes[1], "FSDP2, 4 ranks:\nrows, the last rank has none", rows(4))
    draw(axes[2], "FSDP2 x tensor parallel,\n2 x 2 ranks", tensor_parallel(4))
    draw(axes[3], "plain, 1 rank", [[Box((0, 0), SHAPE)]])
    figure.suptitle('"optimizer.blocks.0.weight.exp_avg", [6, 10] on disk: each box as the rank in it wrote it', y=1.06)
    figure.savefig(Path(__file__).with_name("checkpoint.png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
