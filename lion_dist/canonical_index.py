"""Where each parameter of a plain ``Lion`` begins in the one numbering of all elements (``sharding/layout.py``)."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

from torch import Tensor

from lion_dist.local_tensors import local_tensor


class CanonicalStarts:
    """The canonical index of this rank's first element of each parameter, counted once."""

    def __init__(self, groups: Sequence[dict]):
        self._params = [p for group in groups for p in group["params"]]
        ends = itertools.accumulate(p.numel() for p in self._params)
        self._starts = dict(zip(self._params, itertools.chain([0], ends), strict=False))

    def of(self, param: Tensor) -> int:
        return self._starts[param] + _first_index(param)

    def hold_for(self, groups: Sequence[dict]) -> bool:
        """Whether the groups have the parameters that were counted, in their order."""
        params = [p for group in groups for p in group["params"]]
        return len(params) == len(self._params) and all(map(operator.is_, params, self._params))


def _first_index(param: Tensor) -> int:
    """Row-major index, in the full tensor, of this rank's first element."""
    if local_tensor(param) is param:
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    strides = [math.prod(param.shape[i + 1 :]) for i in range(param.ndim)]
    return sum(o * s for o, s in zip(offset, strides, strict=True))
