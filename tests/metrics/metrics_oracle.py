"""What ``metrics()`` must say, computed by one process from whole tensors, before and after a real step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lion_dist import Lion
from lion_dist.kernels.reference import read_main

NORMS = ("grad_norm", "param_norm", "update_norm", "exp_avg_norm", "update_ratio")
SHARES = ("flipped_share", "agreement_share", "zero_share", "lost_share")


class MeasuredLion(Lion):
    """``Lion`` over plain tensors that leaves in ``expected`` what its last step did."""

    def step(self, closure=None):
        before = [self._read(p) for p in self._measured_params()]
        grads = [self._scaled(p.grad) for p in self._measured_params()]
        result = super().step(closure)
        after = [self._read(p) for p in self._measured_params()]
        self.expected = self._describe(before, grads, after)
        return result

    def _measured_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _scaled(self, grad: Tensor) -> Tensor:
        scale = getattr(self, "grad_scale", None)
        return grad.float() if scale is None else grad.float() * scale.double().reciprocal().float()

    def _read(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """(what carries the value on, the momentum), both fp32."""
        state = self.state_of(param)
        value = read_main(param.detach(), state.get("main_param"))
        return value.clone(), state["exp_avg"].float().clone()

    def _describe(self, before, grads, after) -> dict[str, float]:
        beta1 = self.param_groups[0]["betas"][0]
        p, m, g, new_p = (torch.cat([x.flatten() for x in column]) for column in self._columns(before, grads, after))
        c = m * beta1 + g * (1.0 - beta1)
        u = torch.where(g.isfinite(), c.sign(), 0.0)
        if self.rule.is_cautious:
            u = u * (c.sign() == g.sign())
        norm = lambda x: math.sqrt(x.double().square().sum().item())  # noqa: E731
        share = lambda mask: mask.sum().item() / len(u)  # noqa: E731
        return {
            "grad_norm": norm(g),
            "param_norm": norm(p),
            "update_norm": norm(new_p.double() - p.double()),
            "exp_avg_norm": norm(m),
            "update_ratio": norm(new_p.double() - p.double()) / norm(p),
            "flipped_share": share(u * m.sign() < 0),
            "agreement_share": share(u * g.sign() > 0),
            "zero_share": share(u == 0),
            "lost_share": share((u != 0) & (new_p == p)),
        }

    @staticmethod
    def _columns(before, grads, after):
        return [p for p, _ in before], [m for _, m in before], grads, [p for p, _ in after]


def assert_same_metrics(actual: dict, expected: dict, but: tuple[str, ...] = ()) -> None:
    """Shares are equal, norms too but for the order in which fp64 squares were added."""
    for name in SHARES:
        assert actual[name] == expected[name], name
    for name in NORMS:
        if name not in but:
            assert actual[name] == pytest.approx(expected[name], rel=1e-13, abs=0), name
