"""A warning for the optimizer of which no parameter ever gets a gradient.

Such an optimizer runs to the end without an error and trains nothing. It happens when the model's parameters are
replaced after the optimizer was made.
"""

from __future__ import annotations

import warnings

STEPS_BEFORE_WARNING = 3  # a first step without gradients is not unusual: it silences a scheduler's warning


class NoGradientWarning:
    """Warn once, if none of the first steps finds a gradient.

    The caller asks :attr:`is_waiting`, an attribute, at every step, and calls :meth:`note_step` only while it is True:
    nothing else is done after the first gradient.

    Attributes:
        is_waiting: no gradient was seen so far, and no warning was given.
    """

    def __init__(self):
        self.is_waiting = True
        self._steps = 0

    def note_step(self, any_gradients: bool) -> None:
        """Count one step, in which ``any_gradients`` of the optimizer's parameters were there."""
        self._steps += 1
        if any_gradients:
            self.is_waiting = False
        elif self._steps >= STEPS_BEFORE_WARNING:
            self.is_waiting = False
            warnings.warn(
                f"lion_dist: none of the optimizer's parameters had a gradient in its first {self._steps} steps, so it "
                "trains nothing. The model probably uses other parameters than those the optimizer was made with: it "
                "was wrapped (FSDP, fully_shard, PEFT/LoRA), converted, or loaded with "
                "load_state_dict(assign=True) after the optimizer was made; or every parameter is frozen "
                "(requires_grad=False). Make the optimizer last, from the parameters of the model that is trained.",
                stacklevel=4,
            )
