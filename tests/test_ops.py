"""What holds for every op: registration, compilation, no gradient, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _problems import assert_same_bits, codes, one_call_of_each, transposed, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit_accel import backends, ops
from pyvit_accel.ops.lowbit_linear import ACTIVATIONS
from pyvit_accel.reference import scalar

CALLS = one_call_of_each()
every_call = pytest.mark.parametrize("name", list(CALLS))


class Recorder(TorchDispatchMode):
    """Keeps the calls of pyvit_accel ops that a public function makes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyvit_accel":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(name):
    with Recorder() as recorder:
        CALLS[name]()
    ((op, args),) = recorder.calls
    return op, args


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_op_is_called():
    assert {recorded(name)[0].name().partition("::")[2] for name in CALLS} == set(backends.OPS)
    assert set(ops.__all__) == {call.op.__name__ for call in CALLS.values()}


@every_call
def test_opcheck(name):
    op, args = recorded(name)
    torch.library.opcheck(op, args)
    torch.library.opcheck(op, tuple(transposed(a) if isinstance(a, Tensor) and a.dim() == 2 else a for a in args))


@every_call
def test_autograd_is_registered(name):
    """opcheck looks for it only where an input asks for a gradient."""
    op, args = recorded(name)
    args = tuple(a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    torch.library.opcheck(op, args, test_utils="test_autograd_registration")


@every_call
def test_backward_raises(name):
    """No result can pass a gradient on: codes are integers, and what is float refuses."""
    call = CALLS[name]
    leaves = []

    def with_gradient(value):
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.clone().requires_grad_())
            return leaves[-1]
        return value

    args, kwargs = [with_gradient(a) for a in call.args], {k: with_gradient(v) for k, v in call.kwargs.items()}
    assert leaves or name == "split_tokens"  # which reads booleans
    if name == "lowbit_linear_scatter":  # writes into an argument, so that there is no result to refuse later
        with pytest.raises(RuntimeError, match="not implemented"):
            call.op(*args, **kwargs)
        return
    results = call.op(*args, **kwargs)
    for result in (results,) if isinstance(results, Tensor) else results:
        if any(result is leaf for leaf in leaves):  # a static scale is handed back
            continue
        with pytest.raises(RuntimeError, match=r"not implemented|does not require grad"):
            result.sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


@every_call
def test_inference_mode_and_no_grad(name):
    expected = CALLS[name]()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_same_bits(CALLS[name](), expected)


@every_call
def test_compiles_as_one_graph(name):
    call = CALLS[name]
    compiled = torch.compile(call.op, fullgraph=True, backend="eager", dynamic=False)
    assert_same_bits(compiled(*call.args, **call.kwargs), call())


def test_compiles_for_any_batch():
    """One graph with a symbolic number of rows."""
    _, w_packed, w_scale = weights(20, 37)

    def layer(x):
        q, scale = ops.quantize(x)
        return ops.lowbit_linear(q, scale, w_packed, w_scale, activation="gelu")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (3, 8, 50):
        x = torch.randn(2, M, 37)
        assert_same_bits(compiled(x), layer(x))


def test_two_python_threads_give_the_same_bits(impl, set_threads):
    """Each keeps its own scratch memory, of sizes that grow while both run."""
    set_threads(1)
    calls = [*CALLS.values(), *reversed(CALLS.values())]
    expected = [impl(call) for call in calls]

    def run(offset):
        order = [(i * 7 + offset) % len(calls) for i in range(4 * len(calls))]
        return [(i, impl(calls[i])) for i in order]  # the reference is chosen for a thread, not for the process

    with impl.active(), ThreadPoolExecutor(2) as pool:
        for results in pool.map(run, range(2)):
            for i, result in results:
                assert_same_bits(result, expected[i])


def test_number_of_threads_does_not_show(kernel, set_threads):
    """Large enough to be divided: by rows, by features, by heads and by queries."""
    _, w_packed, w_scale = weights(200, 130)
    x = torch.randn(400, 130)
    q, k, v = codes("random", 3, 1, 150, 3, 32).transpose(2, 3)
    one = torch.full((1,), 0.01)

    def run():
        rows, scale = ops.quantize(x)
        yield ops.norm_quant(x, torch.ones(130), torch.zeros(130))
        yield ops.lowbit_linear(rows, scale, w_packed, w_scale, activation="gelu")
        yield ops.lowbit_linear(rows[:3], scale[:3], w_packed, w_scale)
        yield ops.weight_only_linear(x, w_packed, w_scale)
        yield ops.quant_attention(q, k, v, one, one, one, 0.2)

    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        with kernel.active():
            results.append(list(run()))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@every_call
def test_reference_has_the_strides_of_the_fake(name):
    """Compiled code believes the fake, and the reference is what runs where there is no kernel."""
    op, args = recorded(name)
    for layout in (torch.Tensor.contiguous, transposed):
        laid_out = tuple(layout(a) if isinstance(a, Tensor) and a.dim() == 2 else a for a in args)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = op(*laid_out)
        with backends.use_reference():
            real = op(*laid_out)
        if name == "lowbit_linear_scatter":
            assert fake is None and real is None
            continue
        for f, r in zip(*((t,) if isinstance(t, Tensor) else t for t in (fake, real)), strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def test_activations_of_op_and_reference_are_the_same():
    assert set(ACTIVATIONS) == set(scalar.ACTIVATIONS)
