"""Every backend is bit-identical to the reference implementation, whatever it is fed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lion_dist.cpu_backend import eager
from lion_dist.kernels import chunked_reference
from lion_dist.kernels.reference import StepScalars, join_main, split_main
from lion_dist.kernels.update import LionTensors, count_aligned_elements, lion_update_
from lion_dist.triton_backend import blocks, launch
from tests.kernels.cases import AVERAGED, BF16, FP16, FP32, GRAD_DTYPES, INT16, STORAGES, Case, Storage, assert_same
from tests.kernels.strategies import cases

BLOCK = 64  # small, so that a few hundred elements fill blocks, leave tails and make a program search
BACKENDS = ["cpu", "cpu_native", "chunked_reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "triton" and not blocks.INTERPRETED.value:
        pytest.skip("the kernels are compiled here: test_gpu.py compares them")
    monkeypatch.setattr(launch, "INTERPRETER_BLOCK", BLOCK)
    monkeypatch.setattr(launch, "SEARCH_STRIDE", 2)
    monkeypatch.setattr(eager, "CHUNK", BLOCK)
    monkeypatch.setattr(chunked_reference, "CHUNK", BLOCK)
    return request.param


def check(case: Case, backend: str, misalignment: int = 0) -> LionTensors:
    actual = case.tensors(misalignment)
    lion_update_(actual, backend=backend, **case.arguments())
    assert_same(actual, case.expected())
    return actual


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_every_storage(backend, storage, grad_dtype):
    numels = [2 * BLOCK + 5, 0, 1, BLOCK]
    check(Case.make(storage, grad_dtype, numels, index_start=1000, step=3, seed=7), backend)


@pytest.mark.parametrize("storage", AVERAGED, ids=str)
def test_every_storage_with_an_average_of_the_weights(backend, storage):
    numels = [2 * BLOCK + 5, 0, 1, BLOCK]
    check(Case.make(storage, BF16, numels, index_start=2**32 - 70, step=3, seed=7), backend)
    check(Case.make(storage, FP32, [3 * BLOCK + 1], grad_scale=torch.tensor(0.37)), backend)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(BLOCK), misalignment=st.sampled_from([0, 0, 1, 8]))
def test_anything(backend, case, misalignment):
    check(case, backend, misalignment)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(BLOCK), misalignment=st.sampled_from([0, 0, 1, 8]))
def test_elements_whose_update_agrees_with_the_gradient_are_counted(backend, case, misalignment):
    tensors = case.tensors(misalignment)
    for _ in range(2):
        counts = count_aligned_elements(tensors, case.grads, case.scalars, grad_scale=case.grad_scale, backend=backend)
        assert counts.tolist() == case.counts().tolist()


@pytest.mark.parametrize("storage", STORAGES[::2], ids=str)
@pytest.mark.parametrize("factor, cautious_wd", [(0.0, False), (None, True), (0.25, True)])
def test_every_rule(backend, storage, factor, cautious_wd):
    case = Case.make(storage, BF16, [2 * BLOCK + 5, 0, 1, BLOCK], step=3, cautious_wd=cautious_wd)
    check(case if factor is None else case.cautious(factor), backend)


def test_a_cautious_step_beyond_fp32_is_its_largest_number(backend):
    """One element of many agrees: lr * numel / 2 overflows, and 0 times infinity would be a NaN elsewhere."""
    case = Case.make(Storage(FP32, None, FP32), FP32, [70], scalars=StepScalars.from_group(3e38, (0.9, 0.99), 0.0))
    grads = torch.ones(70)
    grads[1:] = -0.01
    case = replace(case, params=[torch.zeros(70)], exp_avgs=[torch.ones(70)], grads=[grads]).cautious(0.0)
    result = check(case, backend).params[0]
    assert result[0] == -torch.finfo(FP32).max and (result[1:] == 0).all()


def test_an_element_whose_step_is_zero_does_not_decay_cautiously(backend):
    case = Case.make(Storage(FP32, None, FP32), FP32, [3], cautious_wd=True)
    case = replace(case, params=[torch.ones(3)], exp_avgs=[torch.zeros(3)], grads=[torch.tensor([1.0, -1.0, 0.0])])
    lr, decay = torch.tensor(case.scalars.lr), torch.tensor(case.scalars.decay)
    assert check(case, backend).params[0].tolist() == [decay - lr, 1 + lr, 1.0]


def test_a_skipped_step_changes_nothing(backend):
    case = Case.make(Storage(BF16, None, BF16, True), BF16, [100, 30], skip=torch.tensor(1.0))
    assert_same(check(case, backend), case.tensors())


def test_an_inactive_tensor_is_left_alone(backend):
    case = Case.make(Storage(BF16, None, BF16), BF16, [100, 30], active=torch.tensor([0.0, 1.0]))
    result, before = check(case, backend), case.tensors()
    assert torch.equal(result.params[0].isnan(), before.params[0].isnan()) and result.steps[0] == before.steps[0]
    assert result.steps[1] == before.steps[1] + 1


def test_a_gradient_that_is_not_finite_never_becomes_a_step(backend):
    """lion-pytorch's kernel moves a weight by +lr on a NaN gradient and keeps a NaN momentum for ever."""
    for storage in STORAGES:
        case = Case.make(storage, FP32, [64])
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(22)[:64]
        case = replace(case, params=[torch.ones_like(case.params[0])], grads=[bad])
        case = replace(case, exp_avgs=[torch.full_like(case.exp_avgs[0], 0.5)])
        if storage.main is not None:
            case = replace(case, mains=[torch.ones(64) if storage.main == FP32 else torch.zeros(64, dtype=INT16)])
        result = check(case, backend)
        assert (result.params[0] == 1).all() and (result.exp_avgs[0] == 0.5).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_element_without_a_finite_gradient_keeps_its_average(backend, dtype):
    case = Case.make(Storage(FP32, None, FP32, average=dtype), FP32, [3], ema_decay=0.5)
    grads, numbers = [torch.tensor([float("nan"), 1.0, float("inf")])], [torch.tensor([1.0, 2.0, 3.0])]
    case = replace(case, params=numbers, exp_avgs=[torch.zeros(3)], grads=grads, averages=[torch.zeros(3, dtype=dtype)])
    average = check(case, backend).averages[0]
    assert average[0] == average[2] == 0 and average[1] != 0


def test_a_skipped_step_and_an_inactive_tensor_leave_averages_as_they_were(backend):
    storage = Storage(BF16, INT16, BF16, average=BF16)
    case = Case.make(storage, BF16, [100, 30], skip=torch.tensor(1.0))
    assert_same(check(case, backend), case.tensors())
    case = Case.make(storage, BF16, [100, 30], active=torch.tensor([0.0, 1.0]))
    result = check(case, backend)
    assert torch.equal(result.averages[0].nan_to_num(7), case.averages[0].nan_to_num(7))
    assert not torch.equal(result.averages[1].nan_to_num(7), case.averages[1].nan_to_num(7))


def test_finite_gradients_that_overflow_when_unscaled_are_not_a_step(backend):
    case = Case.make(Storage(FP32, None, FP32), FP32, [5], grad_scale=torch.tensor(1e30))
    case = replace(case, params=[torch.ones(5)], exp_avgs=[torch.ones(5)], grads=[torch.full((5,), 1e30)])
    result = check(case, backend)
    assert (result.params[0] == 1).all() and (result.exp_avgs[0] == 1).all()


def test_the_sign_of_zero_is_zero(backend):
    """DeepSpeed's kernels move every weight whose gradient and momentum are zero, and with them unused ones."""
    case = Case.make(Storage(FP32, None, FP32), FP32, [70], scalars=StepScalars.from_group(1e-3, (0.9, 0.99), 0.0))
    zeros = torch.zeros(70)
    zeros[::2] = -0.0
    case = replace(case, params=[torch.ones(70)], exp_avgs=[zeros], grads=[zeros.clone()])
    assert (check(case, backend).params[0] == 1).all()


def test_a_nan_momentum_decays_the_param_and_moves_it_no_further(backend):
    case = Case.make(Storage(FP32, None, FP32), FP32, [70])
    case = replace(case, params=[torch.ones(70)], exp_avgs=[torch.full((70,), float("nan"))], grads=[torch.ones(70)])
    assert (check(case, backend).params[0] == torch.tensor(1 - 1e-3 * 0.1)).all()


@pytest.mark.parametrize("storage", [Storage(BF16, None, BF16, True), Storage(BF16, INT16, BF16, True)], ids=str)
def test_random_bits_do_not_depend_on_how_tensors_are_cut(backend, storage):
    """Shards, buckets and views of one parameter round like the whole parameter."""
    whole = Case.make(storage, BF16, [300], index_start=2**32 - 150, seed=5)
    cuts = [0, 1, 97, 150, 299, 300]

    def cut(column):
        return [column[0][a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

    pieces = replace(
        whole,
        params=cut(whole.params),
        mains=None if whole.mains is None else cut(whole.mains),
        exp_avgs=cut(whole.exp_avgs),
        grads=cut(whole.grads),
        index_starts=[whole.index_starts[0] + a for a in cuts[:-1]],
        steps=whole.steps.repeat(len(cuts) - 1),
    )
    joined, expected = check(pieces, backend), check(whole, backend)
    for column in ("params", "exp_avgs"):
        assert torch.equal(torch.cat(getattr(joined, column)).nan_to_num(), getattr(expected, column)[0].nan_to_num())


def test_gradients_at_new_addresses_are_read_there(backend):
    """The address table of the list kernel is kept between calls; gradients come back elsewhere after zero_grad()."""
    case = Case.make(Storage(FP32, None, FP32), FP32, [100, 200, 3])
    result, expected = case.tensors(), case
    for _ in range(3):
        case = replace(case, grads=[torch.randn_like(grad) for grad in case.grads])
        lion_update_(result, backend=backend, **case.arguments())
        expected = replace(expected, grads=case.grads)
        after = expected.expected()
        assert_same(result, after)
        expected = replace(expected, params=after.params, exp_avgs=after.exp_avgs)


@pytest.mark.parametrize("exp_avg", [FP32, BF16], ids=str)
def test_split_is_fp32_main_params_at_half_the_memory(backend, exp_avg):
    numels, steps = [200, 65], 25
    main = Case.make(Storage(BF16, FP32, exp_avg), BF16, numels)
    mains = [torch.randn(numel) for numel in numels]
    fp32 = replace(main, params=[x.bfloat16() for x in mains], mains=mains).tensors()
    pairs = [split_main(x) for x in mains]
    split_case = replace(main, params=[p for p, _ in pairs], mains=[r for _, r in pairs])
    split = split_case.tensors()
    fp32.params = [p.clone() for p, _ in pairs]
    for tensors in (fp32, split):
        for exp_avg_tensor in tensors.exp_avgs:
            exp_avg_tensor.zero_()
    for step in range(steps):
        torch.manual_seed(step)
        grads = [torch.randn(numel).bfloat16() for numel in numels]
        for tensors in (fp32, split):
            lion_update_(tensors, grads, main.scalars, backend=backend)
    for i in range(len(numels)):
        assert torch.equal(join_main(split.params[i], split.mains[i]), fp32.mains[i])
        assert torch.equal(split.params[i], fp32.params[i])
        assert torch.equal(split.exp_avgs[i], fp32.exp_avgs[i])


@pytest.mark.parametrize("storage", [Storage(FP16, FP32, FP32), Storage(BF16, FP32, BF16)], ids=str)
def test_a_wrong_gradient_is_refused_before_anything_changes(backend, storage):
    case = Case.make(storage, BF16, [10, 20])
    tensors = case.tensors()
    for grads in ([case.grads[0], case.grads[1][:5]], [case.grads[0], case.grads[1].float()]):
        with pytest.raises(ValueError, match="a gradient has"):
            lion_update_(tensors, grads, case.scalars, backend=backend)
    assert_same(tensors, case.tensors())
