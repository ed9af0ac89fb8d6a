"""Parameters that are strided slices of memory, and those whose memory no optimizer can update."""

from __future__ import annotations

import lion_pytorch
import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from lion_dist.sharding.memory_format import overlaps_itself
from tests.test_optimizer import LR, gradient_like
from tests.test_optimizer_precision import POLICIES, POLICY

SLICES = {
    "last-dim": lambda dtype: torch.randn(10, 5, 2).to(dtype)[..., 0],
    "column": lambda dtype: torch.randn(10, 2).to(dtype)[:, 0],
    "every-second": lambda dtype: torch.randn(11).to(dtype)[::2],
    "every-second-row": lambda dtype: torch.randn(9, 3).to(dtype)[::2],
    "transposed": lambda dtype: torch.randn(4, 3).to(dtype).t(),
    "columns": lambda dtype: torch.randn(4, 3).to(dtype)[:, :2],
    "diagonal": lambda dtype: torch.randn(5, 5).to(dtype).diagonal(),
    "channels_last": lambda dtype: torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
    "interleaved": lambda dtype: torch.randn(12).to(dtype).as_strided((3, 2), (2, 3)),  # offsets 0 3 2 5 4 7
}
SLICE = pytest.mark.parametrize("name", SLICES)


def make(name: str, dtype: torch.dtype) -> tuple[nn.Parameter, Tensor]:
    """A strided parameter, and the whole memory of which it is a part."""
    torch.manual_seed(0)
    part = SLICES[name](dtype)
    memory = torch.empty(0, dtype=dtype).set_(part.untyped_storage())
    return nn.Parameter(part), memory


def set_gradient(step: int, *params: Tensor) -> None:
    for param in params:
        param.grad = gradient_like(param, step)


@SLICE
def test_strided_parameter_is_trained_as_by_lion_pytorch(name):
    (param, _), (other, _) = make(name, torch.float32), make(name, torch.float32)
    opt, theirs = Lion([param], 1e-2, weight_decay=0.1), lion_pytorch.Lion([other], 1e-2, weight_decay=0.1)
    for step in range(4):
        set_gradient(step, param, other)
        opt.step(), theirs.step()
        assert torch.equal(param, other), step


@SLICE
@POLICY
def test_strided_parameter_gives_the_bits_of_a_contiguous_one(name, policy):
    """State and metrics too; and what lies between the elements of the parameter stays as it was."""
    dtype, precision = POLICIES[policy]
    (param, memory), outside = make(name, dtype), make(name, dtype)[1]
    twin = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    opts = [Lion([p], 1e-2, weight_decay=0.1, precision=precision, metrics_every=1) for p in (param, twin)]
    for step in range(4):
        set_gradient(step, param, twin)
        for opt in opts:
            opt.step()
        assert torch.equal(param, twin), step
        timeless = [{k: v for k, v in opt.metrics().items() if "ms" not in k and k != "slowest_rank"} for opt in opts]
        assert timeless[0] == timeless[1]
    for key, value in opts[0].state[param].items():
        assert torch.equal(value, opts[1].state[twin][key]), key
    covered = torch.zeros(memory.numel(), dtype=torch.bool)
    covered.as_strided(param.shape, param.stride(), param.storage_offset()).fill_(True)
    assert torch.equal(memory[~covered], outside[~covered]) and not torch.equal(memory, outside)


@pytest.mark.parametrize("name", ["last-dim", "transposed"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "cpu_native", "triton", "chunked_reference"])
def test_strided_parameter_on_every_backend(name, cautious, backend, monkeypatch):
    monkeypatch.setattr("lion_dist.kernels.backends.choose_backend", lambda *_: backend)
    param, _ = make(name, torch.bfloat16)
    twin = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    opt, plain = (Lion([p], 1e-2, weight_decay=0.1, cautious=cautious, metrics_every=2) for p in (param, twin))
    for step in range(3):
        set_gradient(step, param, twin)
        opt.step(), plain.step()
    assert torch.equal(param, twin)
    assert torch.equal(opt.state[param]["exp_avg"], plain.state[twin]["exp_avg"])


@SLICE
def test_state_of_a_strided_parameter_goes_to_a_contiguous_one_and_back(name):
    param, _ = make(name, torch.bfloat16)
    opt = Lion([param], 1e-2)
    set_gradient(0, param)
    opt.step()
    other = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    plain = Lion([other], 1e-2)
    plain.load_state_dict(opt.state_dict())
    opt.load_state_dict(plain.state_dict())
    for step in range(1, 4):
        set_gradient(step, param, other)
        opt.step(), plain.step()
    assert torch.equal(param, other)


def test_parameter_that_is_transposed_in_place_is_followed():
    """A square one keeps its address and its shape."""
    param = nn.Parameter(torch.zeros(3, 3))
    opt = Lion([param], lr=LR, betas=(0.0, 0.0))
    param.grad = torch.zeros(3, 3)
    opt.step()
    param.data = param.data.t()
    param.grad = torch.zeros(3, 3)
    param.grad[0] = -1.0
    opt.step()
    assert torch.equal(param[0], torch.full((3,), LR)) and not param[1:].any()


# ---- refused


OVERLAPPING = {
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "scalar-expanded": lambda: torch.randn(()).expand(4),
    "windows": lambda: torch.randn(10).as_strided((4, 3), (2, 1)),
    "interleaved": lambda: torch.randn(12).as_strided((4, 2), (2, 4)),  # offsets 0 4 2 6 4 ...
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_parameter_whose_elements_share_memory_is_refused_at_construction(name):
    param = nn.Parameter(OVERLAPPING[name]())
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"gain has elements that share memory: shape.*clone\(\)"):
        Lion([("gain", param)])
    assert torch.equal(param, before)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_parameter_that_comes_to_share_memory_is_refused_and_nothing_is_changed(name):
    param, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(3))
    opt = Lion([other, param], lr=LR)
    param.data = OVERLAPPING[name]()
    before = param.detach().clone()
    param.grad, other.grad = torch.ones_like(param), torch.ones(3)
    with pytest.raises(ValueError, match="has elements that share memory"):
        opt.step()
    assert torch.equal(param, before) and torch.equal(other, torch.ones(3))


def test_frozen_parameter_whose_elements_share_memory_is_left_alone():
    model = nn.Linear(3, 3)
    model.bias = nn.Parameter(torch.zeros(1).expand(3), requires_grad=False)
    opt = Lion(model.parameters(), lr=LR)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    assert not model.bias.any()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (1, 1), (2, 3), (2, 3, 2)])
def test_overlap_is_what_addresses_say(shape):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        strides = torch.randint(0, 9, (len(shape),), generator=generator).tolist()
        tensor = torch.arange(100).as_strided(shape, strides)
        assert overlaps_itself(tensor) == (tensor.unique().numel() < tensor.numel()), strides


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as quantized tensors are."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = [x.inner if isinstance(x, Wrapper) else x for x in args]
        result = func(*unwrapped, **(kwargs or {}))
        return Wrapper(result) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("steps_before", [0, 1])
def test_tensor_without_memory_is_refused_and_nothing_is_changed(steps_before):
    """The update read and wrote address 0. A frozen one beside trained parameters is left alone."""
    param, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(Wrapper(torch.ones(3)), requires_grad=False)
    opt = Lion([param, frozen], lr=0.0)
    for _ in range(steps_before):
        param.grad = torch.ones(3)
        opt.step()
    opt.param_groups[0]["lr"] = LR
    param.grad = Wrapper(torch.ones(3))
    with pytest.raises(TypeError, match="a gradient of shape .* is a Wrapper, whose memory Lion cannot reach"):
        opt.step()
    param.grad, frozen.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(TypeError, match="a parameter of shape .* is a .*, whose memory Lion cannot reach"):
        opt.step()
    assert torch.equal(param, torch.ones(3)) and torch.equal(frozen.inner, torch.ones(3))


def test_parameter_of_a_lazy_module_is_trained_once_it_is_there():
    """It gets its memory in place, so that the optimizer may be made before."""
    model = nn.LazyLinear(3)
    opt = Lion(model.parameters(), lr=LR)
    opt.step()
    model(torch.ones(1, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert all(torch.allclose(b - p, torch.tensor(LR)) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("cls", [Lion, ShardedLion])
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_parameter_is_refused_by_name(cls, layout):
    param = nn.Parameter(getattr(torch.eye(3), layout)())
    dense = nn.Parameter(torch.ones(3))
    memory = dense.data_ptr()
    with pytest.raises(TypeError, match=r"'?table'? has the layout torch.sparse_.*dense parameters"):
        cls([("dense", dense), ("table", param)])
    assert dense.data_ptr() == memory


@pytest.mark.parametrize("cls", [Lion, ShardedLion])
def test_meta_parameter_is_refused_by_name(cls):
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"'?weight'? is on the meta device.*Materialize the model first.*to_empty"):
        cls(model.named_parameters())


def test_meta_parameter_is_refused_in_a_group_added_later():
    opt = Lion([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="is on the meta device"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(3, device="meta"))]})
    assert len(opt.param_groups) == 1


def train_after_to_empty() -> None:
    """fully_shard's deferred initialization: to_empty() fills the DTensors that the optimizer has."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Linear(3, 4)
    fully_shard(model)
    opt = Lion(model.parameters(), lr=LR)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    for param in model.parameters():
        assert torch.equal(param.full_tensor(), torch.full(param.shape, 1.0 - LR))


def test_sharded_meta_parameters_are_trained_after_to_empty(gloo):
    gloo.run(2, train_after_to_empty)
