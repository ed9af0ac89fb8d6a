"""A parameter keeps its strides inside a bucket (channels_last, transposed), and nothing else can tell."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint
from lion_dist.boxes import boxes_over
from lion_dist.sharding.memory_format import MemoryFormat, is_dense, overlaps_itself
from tests.models import GivenGradients
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params, assert_same_state
from tests.shared_files import over_shared_files

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(5, 4, 3, 3), (70,), (6, 9), (4, 3, 2, 2, 2), (3, 1, 1, 1), (7, 70)]
POLICIES = {
    "fp32": (FP32, PrecisionPolicy()),
    "bf16-split": (BF16, PrecisionPolicy("split")),
    "bf16-fp32-momentum16": (BF16, PrecisionPolicy("fp32", BF16)),
    "bf16-none": (BF16, PrecisionPolicy("none")),
    "fp32-stochastic-momentum": (FP32, PrecisionPolicy(momentum_dtype=BF16, momentum_rounding="stochastic")),
}
KEPT = [name for name in POLICIES if "none" not in name and "stochastic" not in name]


def in_format(tensor: Tensor) -> Tensor:
    """4-D and 5-D tensors in channels_last, matrices transposed."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if tensor.ndim == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def make_weights(dtype: torch.dtype, formatted: bool = True) -> GivenGradients:
    model = GivenGradients(*SHAPES, dtype=dtype)
    if formatted:
        for weight in model.weights:
            weight.data = in_format(weight.data)
    return model


def gradients(step: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [p.stride() for p in model.parameters()]


def make_optimizer(model: nn.Module, policy: PrecisionPolicy, **config) -> ShardedLion:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*become row-major")
        return ShardedLion(
            model.parameters(),
            lr=1e-2,
            weight_decay=0.1,
            module=model,
            precision=policy,
            sharding=ShardingConfig(bucket_numel=300, **config),
        )


# ---- training


def train_beside_lion(name: str, config: dict, clip: float | None) -> None:
    """Two micro-batches a step, one of contiguous gradients and one in the parameters' format."""
    dtype, policy = POLICIES[name]
    model, expected = make_weights(dtype), make_weights(dtype)
    before = strides(model)
    opt = make_optimizer(model, policy, **config)
    oracle = Oracle(expected, Lion(expected.parameters(), lr=1e-2, weight_decay=0.1, precision=policy), ranks())
    for step in range(3):
        for micro_batch in range(1 if config.get("update_in_backward") else 2):
            grads = [gradients(2 * step + micro_batch, rank, dtype) for rank in range(ranks())]
            if micro_batch == 1:
                grads = [list(map(in_format, of_rank)) for of_rank in grads]
            model.loss(grads[dist.get_rank()]).backward()
            oracle.backward([lambda m, g=of_rank: m.loss(g) for of_rank in grads])
        if clip is not None:
            opt.clip_grad_norm_(clip)
        opt.step()
        oracle.step(clip=clip)
    opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_state(opt, model, oracle.lion, expected)
    assert_same_on_all_ranks(model)
    assert (strides(model) == before) == (name in KEPT)
    opt.check_replicas()


def ranks() -> int:
    return dist.get_world_size()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", POLICIES)
def test_other_memory_formats_train_to_the_bits_of_lion(gloo, name, world_size):
    gloo.run(world_size, train_beside_lion, name, {}, 0.5)


CONFIGS = {
    "stage 1": {"zero_stage": 1},
    "in backward": {"update_in_backward": True},
    "coded": {"param_sync": "coded"},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_other_memory_formats_in_every_mode(gloo, config):
    gloo.run(2, train_beside_lion, "bf16-split", CONFIGS[config], None)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["fp32", "bf16-split"])
def test_other_memory_formats_over_peer_memory(gloo, name, world_size):
    gloo.run(world_size, over_shared_files, train_beside_lion, name, {}, None)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def train_convolutions() -> None:
    models = [Convolutions().to(memory_format=torch.channels_last) for _ in range(2)]
    before = strides(models[0])
    opt = ShardedLion(models[0].parameters(), lr=1e-2, module=models[0])
    lion = Lion(models[1].parameters(), lr=1e-2)
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    for _ in range(3):
        for model, optimizer in zip(models, (opt, lion), strict=True):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
    opt.finish_param_sync()
    assert_same_params(*models)
    assert strides(models[0]) == before


def test_a_channels_last_model_stays_channels_last(gloo):
    gloo.run(2, train_convolutions)


def differ_in_format() -> str:
    model = make_weights(FP32, formatted=dist.get_rank() == 1)
    with pytest.raises(ValueError) as raised:
        ShardedLion(model.parameters(), module=model)
    return str(raised.value)


def test_ranks_with_different_memory_formats_are_refused(gloo):
    for message in gloo.run(2, differ_in_format):
        assert "weights.0" in message and "in memory by dimensions (0, 2, 3, 1)" in message


def test_row_major_for_stochastic_rounding_is_said():
    model = make_weights(BF16)
    with pytest.warns(UserWarning, match="'weights.0', 'weights.2', 'weights.3' and 1 more become row-major"):
        ShardedLion(model.parameters(), module=model, precision=PrecisionPolicy("none"))
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_format_that_is_given_after_construction_is_taken_back_with_a_word():
    model = Convolutions()
    opt = ShardedLion(model.parameters(), module=model)
    values = [p.detach().clone() for p in model.parameters()]
    model.to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="'layers.0.weight'.*another memory format.*Convert the model first"):
        opt.state_dict()
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(map(torch.equal, values, model.parameters()))


def transpose_by_data(param: nn.Parameter) -> None:
    param.data = param.data.t()


def transpose_in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.t_()


@pytest.mark.parametrize("transpose", [transpose_by_data, transpose_in_place])
@pytest.mark.filterwarnings("ignore:.*another memory format")
def test_a_parameter_that_is_transposed_where_it_is_trains_on_from_there(transpose):
    """Same address, same shape: its gradients once went to the elements across the diagonal."""
    models = [nn.Linear(5, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = ShardedLion(models[0].parameters(), 0.1, module=models[0]), Lion(models[1].parameters(), 0.1)
    x = torch.randn(3, 5)
    for model, opt in zip(models, optimizers, strict=True):
        transpose(model.weight)
        for _ in range(2):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
    assert_same_params(*models)


# ---- checkpoints


def train_given(model: GivenGradients, opt, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        opt.zero_grad()
        model.loss(gradients(step, 0, dtype)).backward()
        opt.step()


def save_in_the_middle(path: str, name: str, formatted: bool) -> list[Tensor]:
    dtype, policy = POLICIES[name]
    model = make_weights(dtype, formatted)
    opt = make_optimizer(model, policy)
    train_given(model, opt, range(2), dtype)
    checkpoint.save(path, model=model, optimizer=opt)
    train_given(model, opt, range(2, 4), dtype)
    opt.finish_param_sync()
    return [p.detach().contiguous() for p in model.parameters()]


def go_on(path: str, name: str, formatted: bool, engine: str) -> list[Tensor]:
    dtype, policy = POLICIES[name]
    model = make_weights(dtype, formatted)
    for param in model.parameters():
        param.data.zero_()
    if engine == "sharded":
        opt = make_optimizer(model, policy)
    else:
        opt = Lion(model.parameters(), lr=1e-2, weight_decay=0.1, precision=policy)
    checkpoint.load(path, model=model, optimizer=opt)
    train_given(model, opt, range(2, 4), dtype)
    if engine == "sharded":
        opt.finish_param_sync()
    return [p.detach().contiguous() for p in model.parameters()]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("loaded", ["formatted", "row-major", "plain Lion"])
@pytest.mark.parametrize("saved", ["formatted", "row-major"])
def test_checkpoints_do_not_depend_on_the_memory_format(gloo, once, saved, loaded, name):
    def save(folder):
        path = str(folder / "checkpoint")
        return path, gloo.run(4, save_in_the_middle, path, name, saved == "formatted")[0]

    path, expected = once(f"formats, {saved}, {name}", save)  # what all loads of it share
    engine = "plain" if loaded == "plain Lion" else "sharded"
    found = gloo.run(1 if engine == "plain" else 2, go_on, path, name, loaded == "formatted", engine)[0]
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def load_with_other_precision(path: str) -> list[Tensor]:
    model = make_weights(BF16)
    opt = make_optimizer(model, PrecisionPolicy("fp32"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(path, model=model, optimizer=opt)
    return [p.detach().contiguous() for p in model.parameters()]


def save_only(path: str) -> list[Tensor]:
    model = make_weights(FP32)
    opt = make_optimizer(model, PrecisionPolicy())
    train_given(model, opt, range(2), FP32)
    checkpoint.save(path, model=model, optimizer=opt)
    return [p.detach().contiguous() for p in model.parameters()]


def test_a_checkpoint_is_converted_into_another_precision_in_any_format(gloo, tmp_path):
    path = str(tmp_path / "checkpoint")
    saved = gloo.run(2, save_only, path)[0]
    for mine, other in zip(gloo.run(4, load_with_other_precision, path)[0], saved, strict=True):
        assert ((mine.float() - other).abs() <= other.abs() * 2**-8).all()


# ---- the arithmetic of formats


@st.composite
def permuted_tensors(draw) -> Tensor:
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    tensor = torch.arange(float(math.prod(shape))).view([shape[d] for d in order])
    return tensor.permute(sorted(range(len(order)), key=order.__getitem__))


@given(permuted_tensors(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_range_in_memory_is_cut_into_boxes_of_the_tensor(tensor, data):
    memory = MemoryFormat.of(tensor)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    flat = memory.flatten(tensor)
    assert flat.data_ptr() == tensor.data_ptr()
    assert torch.equal(memory.place_in(flat), tensor) and memory.place_in(flat).stride() == tensor.stride()
    seen = torch.zeros(tensor.numel())
    for box, view in boxes_over(tensor.shape, start, flat[start:stop], memory.dims).items():
        region = tensor[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
        assert torch.equal(view, region)
        seen[view.flatten().long()] += 1
    assert torch.equal(seen.bool(), (torch.arange(tensor.numel()) >= start) & (torch.arange(tensor.numel()) < stop))
    assert seen.max() <= 1


def test_gaps_and_overlaps_are_told_from_dense_tensors():
    whole = torch.zeros(6, 8)
    assert is_dense(whole) and is_dense(whole.t()) and is_dense(whole[:3]) and is_dense(torch.zeros(()))
    assert is_dense(torch.zeros(0, 3).t()) and is_dense(whole[:, :1][:1])
    assert not is_dense(whole[:, ::2]) and not is_dense(whole[:, :3]) and not is_dense(whole[::2])
    assert overlaps_itself(torch.zeros(1).expand(5)) and overlaps_itself(torch.zeros(6).unfold(0, 3, 1))
    assert not any(map(overlaps_itself, (whole, whole.t(), whole[:, ::2], whole[:, :0].expand(6, 0))))
