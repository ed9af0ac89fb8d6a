"""What ``Lion`` is asked for and an engine hides: refused with the reason, before anything is changed.

Engines show themselves late. FSDP1's flat parameters are seen when a param group is added. DeepSpeed's ZeRO puts flat
partitions in the place of a group's parameters afterwards, and torch's ZeroRedundancyOptimizer is known only once it
holds the optimizer that it has made: so a step asks again when it meets a group's parameters for the first time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Container, Mapping

from torch.nn import Parameter
from torch.optim import Optimizer

from lion_dist.local_shard import LocalShard
from lion_dist.step_rule import SpikeGuard, StepRule

CAUTIOUS, SPIKES, AVERAGE = "cautious=True", "skip_spikes", "ema_decay"
NEEDS = {  # option: (what it needs, what FSDP1's flat parameter does to that)
    CAUTIOUS: ("a statistic over each whole tensor", "hides where tensors begin"),
    SPIKES: ("the norm over all ranks' gradients", "does not say among which ranks it is cut"),
    AVERAGE: ("the model's own weights", "leaves gathered copies in forward passes that cannot be seen here"),
}
ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def refuse_hidden(
    optimizer: Optimizer,
    group: Mapping,
    rule: StepRule,
    guard: SpikeGuard | None,
    given: Container[int],
    is_first_step: bool,
) -> None:
    """Raise ValueError where an engine hides what ``rule`` or ``guard`` needs of the parameters of ``group``.

    Args:
        given: ids of the tensors that the optimizer was given. Another one that is no nn.Parameter belongs to no
            module: somebody copies it, or what it is a part of, into the model.
        is_first_step: ask as well who has made ``optimizer``.
    """
    in_use = {CAUTIOUS: rule.is_cautious, SPIKES: guard is not None, AVERAGE: rule.ema_decay is not None}
    options = [option for option, is_used in in_use.items() if is_used]
    for option in options:
        _refuse_tensors(option, group, given)
    if is_first_step:
        _refuse_divided(options, optimizer)


def _refuse_tensors(option: str, group: Mapping, given: Container[int]) -> None:
    needed, flat_does = NEEDS[option]
    names = group.get("param_names", ())
    for i, param in enumerate(group["params"]):
        if LocalShard.of(param).is_flat:
            name = names[i] if i < len(names) else f"parameter {i} of the group"  # who replaces some leaves the names
            raise ValueError(
                f"{option} needs {needed}, but {name} is part of FSDP1's flat parameter, which {flat_does}. "
                f"Use fully_shard (FSDP2), or leave {option} out."
            )
        if id(param) not in given and not isinstance(param, Parameter):
            raise ValueError(
                f"{option} needs {needed}, but an engine (DeepSpeed, or one of its kind) has put a tensor of its own, "
                f"of shape {tuple(param.shape)}, in the place of the parameters that Lion was given, and what that is "
                f"a part of cannot be seen here. Use ShardedLion or fully_shard (FSDP2), or leave {option} out."
            )


def _refuse_divided(options: list[str], optimizer: Optimizer) -> None:
    """Raise ValueError where torch's ZeroRedundancyOptimizer has made ``optimizer``, over this rank's part of the
    parameters. They are whole tensors there, so that a cautious step is right."""
    hidden = [option for option in options if option != CAUTIOUS]
    zero = sys.modules.get(ZERO)
    if not hidden or zero is None:
        return
    kind = zero.ZeroRedundancyOptimizer
    if any(issubclass(type(x), kind) and vars(x).get("optim") is optimizer for x in gc.get_objects()):
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        raise ValueError(
            f"{hidden[0]} needs {NEEDS[hidden[0]][0]}, but ZeroRedundancyOptimizer has divided the parameters among "
            f"ranks, and this one's Lion has {count} of them: each rank would go by its own. Use ShardedLion, or leave "
            f"{hidden[0]} out."
        )
