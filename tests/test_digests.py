"""Bits do not move: parameters and state of every way of training are those that ``tests/digests.json`` records."""

import json

import pytest

from tests.digests import CASES, FILE, digest, train

RECORDED = json.loads(FILE.read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_arrives_at_the_recorded_bits(gloo, case):
    for world_size in case.world_sizes:
        assert digest(gloo.run(world_size, train, case)) == RECORDED[case.name], f"on {world_size} ranks"


def test_every_case_is_recorded_and_no_other():
    assert [case.name for case in CASES] == list(RECORDED)
