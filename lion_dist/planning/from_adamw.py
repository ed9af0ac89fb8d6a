"""What the literature says of Lion's hyperparameters, given those of an AdamW recipe; docs/from-adamw.md has the pages.

Each value has the range in which to look for it, where it comes from, and how much stands behind it. What nobody has
shown for Lion is called a guess, or is not said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAPER = "arXiv 2302.06675, section 5"
TASKS = "authors' experience over their tasks"
ADAMW_TO_LION = 5.0  # the middle, by factors, of the paper's 3 to 10
LEAST, MOST = 3.0, 10.0
BETAS = (0.9, 0.99)
BETAS_OF_LANGUAGE_MODELS = (0.95, 0.98)


@dataclass(frozen=True)
class Suggestion:
    """One line: ``value`` to begin with, ``look``: where to look next, "" where nowhere."""

    name: str
    value: str
    look: str
    source: str
    evidence: str


def suggest(
    lr: float,
    weight_decay: float,
    *,
    language_model: bool = True,
    batch_tokens: float | None = None,
    recipe_batch_tokens: float | None = None,
) -> list[Suggestion]:
    """Lion's hyperparameters for what AdamW trains with ``lr`` and ``weight_decay``.

    Args:
        lr: AdamW's peak.
        weight_decay: AdamW's, which it multiplies with the learning rate.
        language_model: take the paper's betas for those, else its default.
        batch_tokens: of a step of the job to come, in all ranks.
        recipe_batch_tokens: of a step of the job for which the betas are known to be good. With both, beta2 keeps its
            half-life in tokens: ``beta2 ** (batch_tokens / recipe_batch_tokens)`` (arXiv 2507.07101, for AdamW's).

    Raises:
        ValueError: a number is not finite, or has no place here.
    """
    _check(lr, weight_decay, batch_tokens, recipe_batch_tokens)
    wd = weight_decay * ADAMW_TO_LION
    beta1, beta2 = BETAS_OF_LANGUAGE_MODELS if language_model else BETAS
    found = [
        Suggestion("lr", f"{lr / ADAMW_TO_LION:.3g}", f"{lr / MOST:.3g} to {lr / LEAST:.3g}", PAPER, TASKS),
        Suggestion(
            "weight_decay",
            f"{wd:.3g}",
            f"{weight_decay * LEAST:.3g} to {weight_decay * MOST:.3g}; lr * weight_decay stays {lr * weight_decay:.3g}",
            PAPER,
            TASKS,
        ),
        Suggestion("betas", f"{beta1:g}, {beta2:g}", "", PAPER, "language models" if language_model else "default"),
    ]
    if batch_tokens is not None:
        found += _of_the_batch(beta2, batch_tokens, recipe_batch_tokens)
    found += [
        Suggestion("schedule", "AdamW's", "", PAPER, "warm-up, peak and end scaled alike"),
        Suggestion("clipping", "AdamW's", "", "this library", "a sign bounds the step; clipping weighs batches"),
    ]
    if wd > 0:
        found.append(Suggestion("|weight| at most", f"{1 / wd:.3g}", "", "arXiv 2310.05898", "theorem: 1 / decay"))
    return found


def _of_the_batch(beta2: float, batch_tokens: float, recipe_batch_tokens: float | None) -> list[Suggestion]:
    half_life = batch_tokens * math.log(2) / -math.log(beta2)
    source = "arXiv 2507.07101"
    found = [Suggestion("half-life of beta2", f"{half_life:.3g} tokens", "", source, "its definition")]
    if recipe_batch_tokens is not None:
        kept = beta2 ** (batch_tokens / recipe_batch_tokens)
        evidence = "shown for AdamW's beta2; for Lion's a guess"
        found.append(Suggestion("beta2 of equal half-life", f"{kept:.6g}", f"or {beta2:g}", source, evidence))
    return found


def _check(lr: float, weight_decay: float, batch_tokens: float | None, recipe_batch_tokens: float | None) -> None:
    if not 0 < lr < 1:
        raise ValueError(
            f"AdamW's lr must be between 0 and 1, got {lr:g}. Pass the peak of its schedule, such as 3e-4."
        )
    if not 0 <= weight_decay < 10:
        raise ValueError(f"AdamW's weight decay must be from 0 to 10, got {weight_decay:g}. Pass 0.1, for example.")
    for name, tokens in (("batch", batch_tokens), ("recipe's batch", recipe_batch_tokens)):
        if tokens is not None and not 1 <= tokens <= 1e12:
            raise ValueError(f"the {name} must be from 1 to 1e12 tokens, got {tokens:g}. Pass 0.5M, for example.")
    if batch_tokens is None and recipe_batch_tokens is not None:
        raise ValueError("the recipe's batch says nothing without the batch of the job. Pass both.")
