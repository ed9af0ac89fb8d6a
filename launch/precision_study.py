"""Does a 16-bit momentum, or a 16-bit weight, cost anything? The same runs in every precision, paired by seed.

    python launch/precision_study.py --seeds 0 1 2 --out runs/precision     # one process per GPU, other seeds each
    python launch/precision_study.py --report --out runs/precision          # the table and the picture

A study that was cut off goes on where it stopped: runs whose result is in --out are not repeated. Main params "split"
are not an arm: they are "fp32" bit for bit.
"""

import torch

from comparison import study
from comparison.study import Arm
from lion_dist import PrecisionPolicy

BASELINE = "fp32 main params, fp32 momentum"
ARMS = {
    BASELINE: Arm(precision=PrecisionPolicy("fp32", torch.float32)),
    "fp32 main params, bf16 momentum, nearest": Arm(precision=PrecisionPolicy("fp32", torch.bfloat16)),
    "fp32 main params, bf16 momentum, stochastic": Arm(precision=PrecisionPolicy("fp32", torch.bfloat16, "stochastic")),
    "no main params, fp32 momentum": Arm(precision=PrecisionPolicy("none", torch.float32)),
    "no main params, bf16 momentum, nearest": Arm(precision=PrecisionPolicy("none", torch.bfloat16)),
    "no main params, bf16 momentum, stochastic": Arm(precision=PrecisionPolicy("none", torch.bfloat16, "stochastic")),
}
BASELINES = {arm: None if arm == BASELINE else BASELINE for arm in ARMS}


def main() -> None:
    study.main("precision", __doc__, ARMS, BASELINES)


if __name__ == "__main__":
    main()
