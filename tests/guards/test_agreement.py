"""check_ranks_agree: the first difference is found, named, and said on every rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lion_dist.guards.agreement import Entry, check_ranks_agree


def compare(entries_by_rank: list[list[Entry]]) -> str | None:
    try:
        check_ranks_agree(entries_by_rank[dist.get_rank()], dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return None


A, B, C = ("a", (1, 2)), ("b", ("x",)), ("c", ())


@pytest.mark.parametrize(
    ("by_rank", "says"),
    [
        ([[A, B], [A, B], [A, B]], None),
        ([[], [], []], None),
        ([[A, B], [A, B], [A, C]], "rank 2 differs from rank 0 at entry 1: 'c' =  there, 'b' = x on rank 0."),
        (
            [[A, B], [("a", (1, 3)), B], [A, B]],
            "rank 1 differs from rank 0 at entry 0: 'a' = 1, 3 there, 'a' = 1, 2 on rank 0.",
        ),
        ([[A, B], [A, B], [A]], "rank 2 differs from rank 0: only rank 0 has 'b' = x."),
        ([[A], [A, B], [A]], "rank 1 differs from rank 0: only rank 1 has 'b' = x."),
    ],
)
def test_first_difference_is_named_on_every_rank(gloo, by_rank, says):
    messages = gloo.run(3, compare, by_rank)
    assert len(set(messages)) == 1
    if says is None:
        assert messages[0] is None
    else:
        assert messages[0].startswith(says) and messages[0].endswith("on every rank.")


def test_alone_there_is_nothing_to_compare():
    check_ranks_agree([A, B], None)
