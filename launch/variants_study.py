"""Do variants of the step help? Plain Lion and its variants, and a guard against poisoned batches, paired by seed.

    python launch/variants_study.py --seeds 0 1 2 3 --out runs/variants     # several processes, other seeds each
    python launch/variants_study.py --report --out runs/variants            # the table and the picture

A study that was cut off goes on where it stopped. A poisoned batch is of random bytes; gradients are clipped to a norm
of 1 in all arms, and the guard judges the norm before that.
"""

from comparison import study
from comparison.study import Arm
from lion_dist import SpikeGuard

PLAIN, POISONED, POISON_EVERY = "plain", "poisoned", 200
ARMS = {
    PLAIN: Arm(),
    "cautious": Arm({"cautious": True}),
    "cautious decay": Arm({"cautious_wd": True}),
    "corrected decay": Arm({"corrected_weight_decay": True}),
    POISONED: Arm(poison_every=POISON_EVERY),
    "poisoned, guard": Arm({"skip_spikes": SpikeGuard()}, poison_every=POISON_EVERY),
    "guard": Arm({"skip_spikes": SpikeGuard()}),
}
BASELINES = dict.fromkeys(ARMS, PLAIN) | {PLAIN: None, "poisoned, guard": POISONED}


def main() -> None:
    study.main("variants", __doc__, ARMS, BASELINES)


if __name__ == "__main__":
    main()
