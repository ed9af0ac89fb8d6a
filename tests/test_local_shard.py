"""``LocalShard``: which tensors are local to a rank, and which slices of the full parameters they are."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lion_dist
from lion_dist.boxes import Box
from lion_dist.local_shard import LocalShard, local_part_of_flat, original_ranges, part_of

PACKAGE = Path(lion_dist.__file__).parent


def covers(full: torch.Tensor, shard: LocalShard) -> torch.Tensor:
    """A mask of the elements of ``full`` that are in the boxes of ``shard``, whose views must equal them."""
    mask = torch.zeros(full.shape, dtype=torch.bool)
    for box, view in shard.boxes.items():
        assert torch.equal(box.view_of(box, view), Box((0,) * full.ndim, tuple(full.shape)).view_of(box, full))
        Box((0,) * full.ndim, tuple(full.shape)).view_of(box, mask).fill_(True)
    return mask


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 2)])
def test_a_plain_tensor_is_its_full_parameter(shape):
    param = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).reshape(shape))
    shard = LocalShard.of(param)
    assert shard.tensor is param and shard.is_whole and shard.is_plain and not shard.groups and shard.first_index == 0
    assert covers(param.detach(), shard).all()


def test_a_parameter_without_memory_yet_is_plain():
    assert LocalShard.of(nn.LazyLinear(3).weight).is_plain


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (3, 17), (7, 7), (19, 20)])
def test_a_range_is_cut_into_boxes(start, stop):
    full = torch.arange(20.0).reshape(4, 5)
    shard = LocalShard.of_range(full.shape, start, full.view(-1)[start:stop])
    assert torch.equal(covers(full, shard).view(-1).nonzero().view(-1), torch.arange(start, stop))
    assert shard.first_index == start and shard.is_whole == (stop - start == 20) and not shard.is_plain


def dtensors() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2))
    full = torch.arange(30.0).reshape(5, 6)
    kinds = (Replicate(), Shard(0), Shard(1))
    for placements in itertools.product(kinds, kinds):
        tensor = distribute_tensor(full, mesh, placements)
        shard = LocalShard.of(tensor)
        mask = covers(full, shard)
        assert shard.tensor is tensor._local_tensor and shard.is_dtensor and not shard.is_plain
        assert shard.is_whole == bool(mask.all()) == (placements == (Replicate(), Replicate()))
        first = mask.view(-1).nonzero()
        assert not len(first) or shard.first_index == int(first[0])
        cut = [axis for axis, place in enumerate(placements) if not place.is_replicate()]
        assert shard.groups == tuple(mesh.get_group(axis) for axis in cut)
        everywhere = mask.int()  # the shards of the ranks of `groups` make up the full tensor, each element once
        for group in shard.groups:
            dist.all_reduce(everywhere, group=group)
        assert (everywhere == 1).all()
        assert torch.equal(part_of(full, tensor), shard.tensor) and part_of(full[1:], tensor) is None


def test_a_dtensor_holds_the_box_of_its_placements(gloo):
    gloo.run(4, dtensors)


def addends() -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    shard = LocalShard.of(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    assert shard.is_partial and not shard.is_whole
    with pytest.raises(ValueError, match="holds"):
        shard.boxes  # noqa: B018


def test_addends_are_no_part_of_a_tensor(gloo):
    gloo.run(2, addends)


def flat_parameters(use_orig_params: bool, after_forward: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    originals = [p.detach().clone() for p in model.parameters()]
    device = torch.device("cpu")
    model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=device)
    if after_forward:
        model(torch.ones(1, 3)).sum().backward()
    flat = model._handle.flat_param
    for param in model.parameters():
        shard = LocalShard.of(param)
        assert shard.is_flat and not shard.is_plain and not shard.is_whole
    for full, held in zip(originals, original_ranges(flat), strict=True):
        shard = held.shard_in(local_part_of_flat(flat))
        mask = covers(full, shard).int()
        assert shard.first_index == held.start and int(mask.sum()) == held.numel
        dist.all_reduce(mask)
        assert (mask == 1).all()
        assert (held.optimized is flat) == (not use_orig_params)


@pytest.mark.parametrize("after_forward", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "originals"])
def test_a_flat_parameter_knows_which_ranges_of_its_originals_it_holds(gloo, use_orig_params, after_forward):
    gloo.run(2, flat_parameters, use_orig_params, after_forward)


# What only somebody who asks where a parameter's elements are would write.
QUESTIONS = re.compile(
    r"_local_tensor|_fsdp_flattened|FlatParameter\b|_shard_param_infos|compute_local_shape|(?<!distributed)\.device_mesh"
)
ANSWERS = {
    "local_shard.py",
    "grad_placement.py",  # whether a gradient lies as its parameter does
    "state_dict/full_state.py",  # a tensor that torch takes for a DTensor
    "guards/foreign_wrappers.py",  # names the wrappers that ShardedLion refuses
}


def test_nobody_else_looks_into_the_tensors_of_an_engine():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if QUESTIONS.search(re.sub(r'""".*?"""', "", path.read_text(), flags=re.S))
    }
    assert found <= ANSWERS
