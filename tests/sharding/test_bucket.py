"""One bucket in one process: its states, its views, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lion_dist.sharding.bucket import Bucket, GradState, ParamState
from lion_dist.sharding.buffers import GradBufferPool, gaps_of, views_of
from lion_dist.sharding.collective_transport import CollectiveTransport
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.process_groups import ShardGroups
from lion_dist.sharding.transport import FlatBuffer

CPU = torch.device("cpu")


def make_bucket(*shapes: tuple[int, ...], wire: torch.dtype = torch.float32, ordered_sum: bool = True) -> Bucket:
    params = [nn.Parameter(torch.full(shape, float(i + 1))) for i, shape in enumerate(shapes)]
    names, groups, stream = [f"p{i}" for i in range(len(params))], ShardGroups(None), CommStream()
    transport = CollectiveTransport(groups, CPU, stream)
    return Bucket(params, names, groups, transport, reduce_dtype=wire, ordered_sum=ordered_sum, stream=stream)


def reduce(bucket: Bucket, *values: float | None) -> None:
    for position, (param, value) in enumerate(zip(bucket.params, values, strict=True)):
        if value is not None:
            param.grad = torch.full_like(param, value)
            bucket.register_grad_ready(position)
    bucket.start_grad_sync()


def test_parameters_become_views_and_keep_values_and_shapes():
    bucket = make_bucket((3, 5), (), (0, 2), (70,))
    assert [tuple(p.shape) for p in bucket.params] == [(3, 5), (), (0, 2), (70,)]
    for i, param in enumerate(bucket.params):
        assert (param == i + 1).all()
    bucket.flat_params.fill_(9.0)
    assert all((p == 9).all() for p in bucket.params)
    assert bucket.param_shard.data_ptr() == bucket.flat_params.data_ptr()  # alone: the shard is all of it


def test_padding_is_zero_and_stays_zero():
    bucket = make_bucket((3,), (5,))
    assert bucket.flat_params.sum().item() == 3 * 1 + 5 * 2
    for _ in range(GradBufferPool.DEPTH):
        bucket._reduce_scatter.pool.take().flat.fill_(7.0)  # what another bucket left in the buffers
    reduce(bucket, 1.0, 1.0)
    assert bucket.finish_grad_sync().sum().item() == 8.0


def test_gradients_are_forgotten_once_packed_and_missing_ones_count_as_zeros():
    bucket = make_bucket((3,), (5,))
    reduce(bucket, 2.0, None)
    assert all(p.grad is None for p in bucket.params)
    grad = bucket.finish_grad_sync()
    assert grad[:3].tolist() == [2.0] * 3 and grad[3:].abs().sum().item() == 0.0
    assert bucket.used == [True, False]


@pytest.mark.parametrize(
    ("wire", "ordered_sum"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)]
)
def test_micro_batches_add_up_in_fp32(wire, ordered_sum):
    bucket = make_bucket((64,), wire=wire, ordered_sum=ordered_sum)
    for value in (1.0, 2**-10, 2**-10):
        reduce(bucket, value)
    assert bucket.finish_grad_sync().dtype == torch.float32
    assert bucket.finish_grad_sync()[0].item() == 1.0 + 2**-9
    bucket.reset_grad()
    reduce(bucket, 0.5)
    assert bucket.finish_grad_sync()[0].item() == 0.5
    assert bucket.finish_grad_sync().dtype == (torch.float32 if ordered_sum else wire)


def test_gradient_states_in_order():
    bucket = make_bucket((3,))
    assert bucket.grad_state is GradState.EMPTY
    with pytest.raises(RuntimeError, match="'p0'.*no gradient has been reduced.*start_grad_sync.. comes first"):
        bucket.finish_grad_sync()
    reduce(bucket, 1.0)
    assert bucket.grad_state is GradState.SYNCING
    bucket.finish_grad_sync()
    assert bucket.grad_state is GradState.REDUCED
    bucket.reset_grad()
    assert bucket.grad_state is GradState.EMPTY and bucket.used == [False]


def test_parameter_states_in_order():
    bucket = make_bucket((3,))
    bucket.finish_param_sync()  # nothing under way: nothing happens
    bucket.start_param_sync()
    assert bucket.param_state is ParamState.GATHERING
    with pytest.raises(RuntimeError, match="'p0'.*parameters cannot go GATHERING -> GATHERING"):
        bucket.start_param_sync()
    bucket.finish_param_sync()
    bucket.finish_param_sync()
    assert bucket.param_state is ParamState.FULL


def test_reset_forgets_a_reduction_under_way():
    bucket = make_bucket((3,))
    reduce(bucket, 1.0)
    bucket.reset_grad()
    reduce(bucket, 5.0)
    assert bucket.finish_grad_sync()[0].item() == 5.0


def test_frozen_parameter_is_not_waited_for():
    bucket = make_bucket((3,), (5,))
    bucket.register_grad_ready(0)
    assert not bucket.all_grads_ready()
    bucket.params[1].requires_grad_(False)
    assert bucket.all_grads_ready()


def test_gradient_of_another_shape_is_refused():
    bucket = make_bucket((3, 2))
    bucket.params[0].grad = torch.ones(3, 2)
    bucket.params[0].grad.data = torch.ones(1)
    with pytest.raises(ValueError, match=r"gradient of 'p0' has shape \(1,\), the parameter \(3, 2\)"):
        bucket.start_grad_sync()
    assert bucket.grad_state is GradState.EMPTY


# ---- buffers


def test_views_and_gaps_cover_the_flat_buffer():
    layout = BucketLayout((3, 0, 70, 1), 3)
    flat = torch.zeros(layout.numel)
    shapes = [torch.Size(s) for s in ((3,), (0,), (7, 10), ())]
    views = views_of(flat, layout, [MemoryFormat.row_major(shape) for shape in shapes])
    for view, shape in zip(views, shapes, strict=True):
        assert view.shape == shape
        view += 1
    for gap in gaps_of(flat, layout):
        assert gap.numel()
        gap += 1
    assert torch.equal(flat, torch.ones(layout.numel))


def test_pool_completes_the_last_use_of_a_buffer_before_it_is_taken_again():
    pool = GradBufferPool(lambda numel: FlatBuffer(torch.zeros(numel)))
    pool.fit(10)
    released = []
    buffers = []
    for i in range(2 * GradBufferPool.DEPTH):
        buffer = pool.take()
        buffer.release = lambda i=i: released.append(i)
        buffers.append(buffer)
    assert released == list(range(GradBufferPool.DEPTH))
    assert buffers[: GradBufferPool.DEPTH] == buffers[GradBufferPool.DEPTH :]
    assert pool.nbytes == GradBufferPool.DEPTH * 10 * 4


def test_pool_completes_the_uses_of_buffers_that_it_gives_up():
    """A collective on another stream may read them yet; their memory goes to whoever asks next."""
    pool, released = GradBufferPool(lambda numel: FlatBuffer(torch.zeros(numel))), []
    pool.fit(10)
    for i in range(2):
        pool.take().release = lambda i=i: released.append(i)
    pool.fit(20)
    assert released == [0, 1]


def test_pool_grows_with_the_largest_bucket():
    pool = GradBufferPool(lambda numel: FlatBuffer(torch.zeros(numel, dtype=torch.bfloat16)))
    pool.fit(10)
    pool.take()
    pool.fit(30)
    assert pool.take().flat.numel() == 30
    pool.fit(20)
    assert pool.nbytes == 30 * 2
