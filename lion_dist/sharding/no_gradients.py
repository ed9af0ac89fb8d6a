"""A warning for an optimizer that trains nothing: the model was wrapped, adapted or sharded after it was made."""

from __future__ import annotations

import warnings

STEPS = 3  # so many may a rank begin without a batch


class NoGradients:
    """Warns once when none of the first ``STEPS`` steps had a gradient on this rank.

    Attributes:
        is_over: a gradient has been seen, or the warning given: there is nothing to note any more.
    """

    def __init__(self):
        self.is_over = False
        self._steps = 0

    def note_step(self, had_gradients: bool) -> None:
        self._steps += 1
        self.is_over = had_gradients or self._steps == STEPS
        if self.is_over and not had_gradients:
            warnings.warn(
                f"ShardedLion: no parameter had a gradient on this rank in the first {STEPS} steps. If the model was "
                "wrapped, given adapters (LoRA), sharded (fully_shard) or rebuilt after the optimizer was constructed, "
                "the optimizer holds parameters that nobody uses: construct it after. (All frozen: nothing to do.)",
                stacklevel=4,
            )
