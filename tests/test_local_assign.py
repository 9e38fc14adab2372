"""local_assign: tokens softly assigned to the centres near them, and the centres moved there."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from _implementations import available
from _problems import U32, assert_same_bits, transposed

from pyvit_accel import ops
from pyvit_accel import reference as references

FORMS = [("l2", "mask"), ("dot", "zero"), ("l2", "zero"), ("dot", "mask")]
SIZES = [  # h, w, gh, gw, C, window
    (1, 1, 1, 1, 3, 1),
    (1, 5, 1, 2, 1, 3),
    (4, 4, 2, 2, 64, 9),
    (14, 14, 7, 7, 192, 5),
    (7, 10, 3, 4, 65, 3),
    (5, 4, 5, 4, 768, 3),
]


def problem(h, w, gh, gw, C, B=2):
    return torch.randn(B, h, w, C), torch.randn(B, gh, gw, C)


def exact(x, centres, window, metric, tau, border):
    """One iteration in float64, and how far from it float32 may be: errors of the weights and of the centres.

    A logit has C differences, products and sums; of its exponential the argument is rounded twice and the result is
    2e-7 off; that weighs on the numerator and on the sum of window^2. A centre is two sums over tokens and a division.
    """
    args = (window, metric, tau, 1, border)
    x, centres = x.double(), centres.double()
    truth = references.local_assign(x, centres, *args)
    largest = (x.abs().amax((1, 2)) + centres.abs().amax((1, 2))).square().sum(-1) * tau  # above every sum in a logit
    relative = 2 * ((x.shape[-1] + 14) * U32 * largest + 2e-7) + (window**2 + 4) * U32
    within = x.abs().amax((1, 2))[:, None, None]  # a mean of tokens
    of_centres = 2 * relative + 2 * (x.shape[1] * x.shape[2] + 2) * U32
    return truth, relative[:, None, None] * truth[0] + 2.0**-99, of_centres[:, None, None, None] * within


@pytest.mark.parametrize(("metric", "border"), FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_within_rounding_of_float64(impl, size, metric, border):
    *shape, window = size
    x, centres = problem(*shape)
    tau = 1 / shape[-1]
    weight, index, moved = impl(ops.local_assign, x, centres, window, metric, tau, 1, border)
    truth, weight_error, moved_error = exact(x, centres, window, metric, tau, border)
    assert weight.dtype == moved.dtype == torch.float32 and index.dtype == torch.int32
    assert torch.equal(index, truth[1])
    assert ((weight.double() - truth[0]).abs() <= weight_error).all()
    assert ((moved.double() - truth[2]).abs() <= moved_error).all()
    assert ((weight.double().sum(-1) - 1).abs() <= (window**2 + 2) * U32).all()


@pytest.mark.parametrize(("metric", "border"), FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_instruction_sets_and_iterations_agree(kernel, size, metric, border):
    *shape, window = size
    x, centres = problem(*shape)
    expected = available("portable")(ops.local_assign, x, centres, window, metric, 0.1, 3, border)
    assert_same_bits(kernel(ops.local_assign, x, centres, window, metric, 0.1, 3, border), expected)
    for _ in range(3):
        weight, index, centres = kernel(ops.local_assign, x, centres, window, metric, 0.1, 1, border)
    assert_same_bits((weight, index, centres), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32(impl, dtype):
    x, centres = (t.to(dtype) for t in problem(6, 6, 3, 3, 20))
    result = impl(ops.local_assign, x, centres, 3, tau=0.1, iterations=2)
    assert_same_bits(result, impl(ops.local_assign, x.float(), centres.float(), 3, tau=0.1, iterations=2))


def test_strides(kernel):
    x, centres = problem(6, 8, 3, 4, 20)
    expected = kernel(ops.local_assign, x, centres, 3)
    assert_same_bits(kernel(ops.local_assign, transposed(x), transposed(centres), 3), expected)
    assert_same_bits(kernel(ops.local_assign, *(t.mT.contiguous().mT.mT.mT for t in (x, centres)), 3), expected)


def test_far_tokens_have_one_centre(impl):
    """Distances of which every exponential but one underflows: weights are exact, no centre is divided by zero."""
    x = torch.zeros(1, 4, 4, 8)
    x[0, 2:] = 100.0
    centres = torch.tensor([0.0, 1000.0, 100.0, 2000.0]).view(1, 2, 2, 1).expand(1, 2, 2, 8).contiguous()
    weight, index, moved = impl(ops.local_assign, x, centres, 3, tau=1.0)
    chosen = index.gather(2, weight.argmax(-1, keepdim=True)).flatten()
    assert weight.sum() == 16 and weight.amax(-1).eq(1).all()
    assert chosen.tolist() == [0] * 8 + [2] * 8
    assert torch.equal(moved[0, :, 0, 0], torch.tensor([0.0, 100.0])) and not moved[0, :, 1].any()


def test_nan_stays_in_its_neighbourhood(impl):
    x, centres = problem(8, 8, 8, 8, 5)
    x[0, 0, 0, 0] = torch.nan
    weight, _, moved = impl(ops.local_assign, x, centres, 3)
    assert weight.isnan().flatten(2).any(-1)[0].nonzero().tolist() == [[0]] and not weight[1].isnan().any()
    assert moved.isnan().any(-1).nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_images_do_not_meet(impl):
    x, centres = problem(7, 9, 3, 4, 17, B=4)
    result, order = impl(ops.local_assign, x, centres, 3, iterations=2), torch.tensor([2, 0, 3, 1])
    assert_same_bits(impl(ops.local_assign, x, centres, 3, iterations=2), result)
    permuted = impl(ops.local_assign, x[order], centres[order], 3, iterations=2)
    assert_same_bits(permuted, tuple(t[order] for t in result))


def test_number_of_threads_does_not_show(kernel):
    x, centres = problem(14, 14, 7, 7, 96)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(kernel(ops.local_assign, x, centres, 5, iterations=2))
    torch.set_num_threads(before)
    assert_same_bits(*results)


def test_no_images(impl):
    weight, index, moved = impl(ops.local_assign, torch.zeros(0, 4, 4, 3), torch.zeros(0, 2, 2, 3), 3)
    assert weight.shape == index.shape == (0, 16, 9) and moved.shape == (0, 2, 2, 3)


def grid(*rows):
    """A map of one channel, and the means of its quarters."""
    x = torch.tensor(rows, dtype=torch.float32)
    return x[None, :, :, None], F.avg_pool2d(x[None], 2)[..., None]


def close(result, *values, atol=2e-6):
    """To the six digits printed, and float32's rounding of numbers up to 10."""
    torch.testing.assert_close(result.flatten(), torch.tensor(values), rtol=0, atol=atol)


X8 = ((0, 0, 10, 10), (0, 1, 10, 9), (5, 5, 0, 0), (5, 4, 0, 1))
MOVED8 = (0.778093, 9.373155, 4.413258, 0.778093)


def test_published_clustering(impl):
    x, centres = grid(*X8)
    close(centres, 0.25, 9.75, 4.75, 0.25)
    weight, index, moved = impl(ops.local_assign, x, centres, 1, tau=0.1, iterations=2)
    assert torch.equal(moved, centres) and weight.eq(1).all()
    assert index.flatten().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    close(impl(ops.local_assign, x, centres, 3, tau=0.1)[2], 0.665860, 9.439096, 4.584893, 0.665860)
    weight, index, moved = impl(ops.local_assign, x, centres, 3, tau=0.1, iterations=2)
    close(moved, *MOVED8)
    close(weight[0, 0][index[0, 0] >= 0], 0.469952, 0.000066, 0.060030, 0.469952)
    labels = ops.match_tokens(x.flatten(1, 2), moved.flatten(1, 2), "l2")[1].flatten().tolist()
    home = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 0, 0, 2, 2, 0, 0]
    assert [0 if label == 3 else label for label in labels] == home  # centres 0 and 3 tie


@pytest.mark.parametrize(("token", "topk", "l2", "l1"), [
    (0, 2, 3.535534, 2.5), (7, 2, 2.353165, 2.110083), (8, 3, 3.758325, 2.870855)
])  # fmt: skip
def test_published_reconstruction(impl, token, topk, l2, l1):
    """From the nearest centres, whose values are 1, 2, 3, 4; of token 8 the second and third are equally near."""
    x, moved = grid(*X8)[0].flatten(1, 2), torch.tensor(MOVED8).view(1, 4, 1)
    distance, index = ops.match_tokens(x, moved, "l2", topk)
    if token == 0:
        close(distance[0, 0], 0.605429, 0.605429)
    values = torch.arange(1.0, 5).view(1, 4, 1)
    for norm, expected in ((2, l2), (1, l1)):
        weight = F.normalize((-0.1 * distance).exp(), p=norm, dim=-1).flatten(1)
        y = impl(ops.mix_tokens, values, index.flatten(1), None, weight, width=topk)
        close(y[0, token], expected)


def test_published_super_tokens(impl):
    x, centres = grid((0, 0, 2, 2), (0, 1, 2, 1), (1, 1, 0, 0), (1, 0, 0, 2))
    close(centres, 0.25, 1.75, 0.75, 0.5)
    weight, index, moved = impl(ops.local_assign, x, centres, 3, "dot", 1.0, 1, "zero")
    q = (0.063274, 0.063274, 0.063274, 0.063274, 0.081245, 0.364115, 0.063274, 0.133950, 0.104321)
    close(weight[0, 5], *q)
    inside = index[0] >= 0
    mass = torch.zeros(4).index_add_(0, index[0][inside], weight[0][inside])
    close(mass, 1.324427, 5.418841, 1.829242, 1.530901)  # 10.10 of 16: the border leaks
    close(moved, 0.518770, 1.376964, 0.783481, 0.643179)
    y = impl(ops.mix_tokens, moved.flatten(1, 2), index.flatten(1), None, weight.flatten(1), width=9)
    close(y[0, [0, 1, 4, 5]], 0.369155, 0.369155, 0.369155, 0.715566)


def test_errors():
    x, centres = torch.ones(2, 6, 4, 3), torch.ones(2, 3, 2, 3)

    def refuses(error, message, *args):
        with pytest.raises(error, match="^" + re.escape(message)):
            ops.local_assign(*args)

    refuses(TypeError, "local_assign: x must be torch.float32 or torch.float16 or", x.double(), centres, 3)
    refuses(ValueError, "local_assign: centres has shape (6, 2, 3), expected 4", x, centres.flatten(0, 1), 3)
    message = "local_assign: x torch.float32 (2, 6, 4, 3) and centres torch.float32 (2, 3, 2, 2) do not fit"
    refuses(ValueError, message, x, centres[..., :2], 3)
    refuses(ValueError, "local_assign: (6, 2) centres of (3, 4) tokens", x[:, :3], torch.ones(2, 6, 2, 3), 3)
    refuses(ValueError, "local_assign: window=4; use an odd number", x, centres, 4)
    message = "local_assign: metric='cosine', border='mask'; use 'l2' or 'dot', 'mask' or 'zero'"
    refuses(ValueError, message, x, centres, 3, "cosine")
    refuses(ValueError, "local_assign: iterations=0; use 1 or more", x, centres, 3, "l2", 1.0, 0)
