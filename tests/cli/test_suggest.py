"""``lion-dist suggest``: what it takes from the paper, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest

from lion_dist import cli

RECIPE = ("--adamw-lr", "3e-4", "--adamw-wd", "0.1")


def suggested(capsys, *arguments: str) -> dict[str, dict]:
    assert cli.main(["suggest", "--json", *arguments]) == 0
    return {line["name"]: line for line in json.loads(capsys.readouterr().out)}


def test_the_product_of_learning_rate_and_decay_is_kept(capsys):
    found = suggested(capsys, *RECIPE)
    lr, weight_decay = float(found["lr"]["value"]), float(found["weight_decay"]["value"])
    assert lr == 6e-5 and weight_decay == 0.5
    assert math.isclose(lr * weight_decay, 3e-4 * 0.1)
    assert found["lr"]["look"] == "3e-05 to 0.0001"


def test_betas_are_the_papers(capsys):
    assert suggested(capsys, *RECIPE)["betas"]["value"] == "0.95, 0.98"
    assert suggested(capsys, *RECIPE, "--vision")["betas"]["value"] == "0.9, 0.99"


def test_the_half_life_is_kept_in_tokens(capsys):
    found = suggested(capsys, *RECIPE, "--batch-tokens", "0.5M", "--recipe-batch-tokens", "4M")
    kept = float(found["beta2 of equal half-life"]["value"])
    assert math.isclose(math.log(kept) / 0.5e6, math.log(0.98) / 4e6, rel_tol=1e-3)  # six digits are printed
    assert "guess" in found["beta2 of equal half-life"]["evidence"]
    assert "beta2 of equal half-life" not in suggested(capsys, *RECIPE, "--batch-tokens", "500k")


def test_the_bound_that_decay_sets_to_weights(capsys):
    assert suggested(capsys, *RECIPE)["|weight| at most"]["value"] == "2"
    assert "|weight| at most" not in suggested(capsys, "--adamw-lr", "1e-3", "--adamw-wd", "0")


def test_every_line_of_the_table_has_a_source(capsys):
    assert cli.main(["suggest", *RECIPE]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 6 and all("arXiv" in line or "this library" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adamw-lr", "3", "--adamw-wd", "0.1"], "AdamW's lr must be between 0 and 1, got 3"),
        (["--adamw-lr", "nan", "--adamw-wd", "0.1"], "AdamW's lr must be between 0 and 1, got nan"),
        (["--adamw-lr", "3e-4", "--adamw-wd", "-1"], "AdamW's weight decay must be from 0 to 10, got -1"),
        ([*RECIPE, "--batch-tokens", "0"], "the batch must be from 1 to 1e12 tokens, got 0"),
        ([*RECIPE, "--recipe-batch-tokens", "4M"], "the recipe's batch says nothing without the batch of the job"),
    ],
)
def test_what_no_recipe_can_be_is_refused(capsys, arguments, message):
    assert cli.main(["suggest", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_number_of_tokens_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["suggest", *RECIPE, "--batch-tokens", "lots"])
    assert stop.value.code == 2 and "is not a number of tokens" in capsys.readouterr().err
