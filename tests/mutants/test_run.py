"""What ``make mutants`` says of faults that are noticed, and of those that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.mutants.faults import Fault
from tests.mutants.run import ROOT, run

TESTS = "tests/sharding/test_layout.py"
NOTICED = Fault(
    "noticed",
    "lion_dist/sharding/layout.py",
    "ALIGNMENT = 64",
    "ALIGNMENT = 32",
    (f"{TESTS}::test_alignment_is_a_memory_transaction",),
)
OTHERS = {
    "unnoticed": replace(NOTICED, name="unnoticed", tests=(f"{TESTS}::test_round_up",)),
    "gone": replace(NOTICED, name="gone", old="ALIGNMENT = 63"),
    "no Python": replace(NOTICED, name="no Python", new="ALIGNMENT = ("),
}


@pytest.mark.slow
def test_a_fault_is_noticed_when_a_test_fails_and_by_nothing_else(capsys):
    before = (ROOT / NOTICED.file).read_text()
    assert run([NOTICED, *OTHERS.values()], workers=2) == len(OTHERS)
    said = capsys.readouterr().out
    assert f"] noticed: noticed by {NOTICED.tests[0]} (" in said
    assert f"] unnoticed: UNNOTICED by {TESTS}::test_round_up (" in said
    assert f"] gone: does not apply: {NOTICED.file} has its text 0 times (" in said
    assert "] no Python: cannot be tested: pytest exits with" in said
    assert (ROOT / NOTICED.file).read_text() == before


@pytest.mark.slow
def test_tests_that_fail_without_a_fault_end_the_program():
    with pytest.raises(SystemExit, match="Tests fail without any fault"):
        run([replace(NOTICED, tests=(f"{TESTS}::test_that_is_not_there",))], workers=1)
