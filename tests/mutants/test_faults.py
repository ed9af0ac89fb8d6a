"""The list of faults follows the code: each still applies, and its tests are there. ``make mutants`` runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_and_its_tests_exist(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1 and fault.new != fault.old
    for test in fault.tests:
        file, _, function = test.partition("[")[0].partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert not function or function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], test


def test_names_of_faults_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
