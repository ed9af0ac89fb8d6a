"""A module's parameters that are waited for when they are read."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import Parameter

from lion_dist.sharding.bucket import Bucket, ParamState


class WaitingParameters(dict):
    """A module's ``_parameters`` whose readers wait: the parameter that they get is whole.

    It covers what no hook sees: ``model.embedding.weight`` read as an attribute by another module, as tied weights and
    ``nn.MultiheadAttention`` do. Compiled code on torch 2.11 reads past it (Dynamo does not trace ``__getitem__`` of a
    dict there; 2.13 does), so hooks stay on every module: ``forward_hooks.py``.

    A copy of the module (deepcopy, pickle) gets a plain dict, because the copy's parameters never leave.

    Attributes:
        buckets_of: for each optimizer that has parameters in this model, its buckets by parameter.
    """

    def __init__(self, params: dict[str, Parameter | None]):
        super().__init__(params)
        self.buckets_of: list[dict[Parameter, Bucket]] = []
        self._bucket: dict[str, Bucket] = {}  # by name: a Parameter's hash is a function in Python, slow for a read
        self._finish = torch.compiler.disable(Bucket.finish_param_sync)

    @classmethod
    def install(cls, module: nn.Module, bucket_of: dict[Parameter, Bucket]) -> None:
        if not isinstance(module._parameters, cls):
            module._parameters = cls(module._parameters)
        module._parameters.buckets_of.append(bucket_of)
        module._parameters.look_up()

    @classmethod
    def remove(cls, module: nn.Module, bucket_of: dict[Parameter, Bucket]) -> None:
        params = module._parameters
        if isinstance(params, cls):
            params.buckets_of = [other for other in params.buckets_of if other is not bucket_of]
            params.look_up()
            if not params.buckets_of:
                module._parameters = dict(params)

    def look_up(self) -> None:
        """Find the buckets of the parameters; again whenever one or the other change."""
        params = dict.items(self)
        self._bucket = {name: of[param] for of in self.buckets_of for name, param in params if param in of}

    def __getitem__(self, name: str) -> Parameter | None:
        bucket = self._bucket.get(name)
        if bucket is not None and bucket.param_state is not ParamState.FULL:
            self._finish(bucket)
        return dict.__getitem__(self, name)  # super() costs 0.1 us, hundreds of times a forward

    def __setitem__(self, name: str, param: Parameter | None) -> None:
        super().__setitem__(name, param)
        self.look_up()

    def items(self):
        self._finish_all()
        return super().items()

    def values(self):
        self._finish_all()
        return super().values()

    def _finish_all(self) -> None:
        for name in self:
            self[name]

    def __reduce__(self):
        return dict, (dict(self.items()),)
