"""Anything that a kernel may be fed, for hypothesis."""

import torch
from hypothesis import strategies as st

from lion_dist.kernels.reference import StepScalars
from tests.kernels.cases import AVERAGED, GRAD_DTYPES, STORAGES, Case

lr = st.sampled_from([0.0, 1e-4, 3e-4, 0.02, 1.0])
beta = st.sampled_from([0.0, 0.9, 0.95, 0.98, 0.99])


@st.composite
def cases(draw, block: int) -> Case:
    """``block``: elements of a kernel's block, around which sizes are drawn."""
    edges = st.sampled_from([0, 1, block - 1, block, block + 1, 2 * block])
    numels = draw(st.lists(edges | st.integers(0, 3 * block), min_size=1, max_size=6))
    optional = lambda values: draw(st.none() | st.sampled_from(values))  # noqa: E731
    grad_scale = optional([0.0, 1.0, 0.37, 1e-8, 1e30, float("inf"), float("nan")])
    skip = optional([0.0, 1.0])
    active = draw(st.none() | st.lists(st.sampled_from([0.0, 1.0]), min_size=len(numels), max_size=len(numels)))
    hyper = draw(lr), (draw(beta), draw(beta)), draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        hyper = (torch.tensor(hyper[0]), *hyper[1:])
    case = Case.make(
        draw(st.sampled_from(STORAGES) | st.sampled_from(AVERAGED)),
        draw(st.sampled_from(GRAD_DTYPES)),
        numels,
        data_seed=draw(st.integers(0, 2**16)),
        index_start=draw(st.sampled_from([0, 12345, 2**32 - 100, 2**45 + 7])),
        step=draw(st.sampled_from([0, 99, 2**32 - 2])),
        scalars=StepScalars.from_group(*hyper),
        grad_scale=None if grad_scale is None else torch.tensor(grad_scale),
        skip=None if skip is None else torch.tensor(skip),
        active=None if active is None else torch.tensor(active),
        seed=draw(st.integers(0, 2**63 - 1)),
        cautious_wd=draw(st.booleans()),
    )
    factor = optional([0.0, 0.25, 1.0])
    return case if factor is None else case.cautious(factor)
