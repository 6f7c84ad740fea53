"""Scores of pairs, against norms computed in plain Python floats."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sparsefx import ops
from sparsefx.ops.scores import ROWS, _places


def norm(part):
    return math.sqrt(sum(v * v for v in part.double().flatten().tolist()))


def norms(x, axis):
    return [norm(part) for part in x.movedim(axis, 0)]


def expected(left, right, scores):
    """Left and right hold one slice a pair, along axis 0."""
    a, b = norms(left, 0), norms(right, 0)
    by_name = {"left": a, "right": b, "product": [i * j for i, j in zip(a, b, strict=True)]}
    return by_name.get(scores, [1.0] * len(a))


def centred(x):
    return x.double() - x.double().mean(0)


KINDS = ["left", "right", "product", "uniform"]


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("scores", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_matrices(dtype, scores, is_centred):
    torch.manual_seed(0)
    x, w = torch.randn(300, 9).to(dtype), torch.randn(9, 5).to(dtype)
    left, right = x.t(), w
    if is_centred:
        left, right = centred(left), centred(right)
    found = ops.mm_scores(x, w, scores, is_centred)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.tensor(expected(left, right, scores)).to(found.dtype)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    turned = ops.mm_scores(w.t(), x.t(), {"left": "right", "right": "left"}.get(scores, scores),
                           is_centred)  # fmt: skip
    torch.testing.assert_close(turned, want, rtol=1e-5, atol=1e-6)


def test_of_batches_each_its_own_or_shared():
    torch.manual_seed(1)
    x, w = torch.randn(3, 4, 6), torch.randn(3, 6, 5)
    each = ops.mm_scores(x, w, "product")
    for b in range(3):
        torch.testing.assert_close(each[b], ops.mm_scores(x[b], w[b], "product"))
    shared = ops.mm_scores(x, w, "product", False, True)
    assert shared.shape == (1, 6)
    torch.testing.assert_close(shared[0], each.square().sum(0).sqrt())


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("scores", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [(7,), (5, 4), (3, 2, 4)])
def test_of_convolutions(spatial, groups, scores, is_centred):
    torch.manual_seed(2)
    x = torch.randn(4, 6, *spatial)
    w = torch.randn(8, 6 // groups, *[2] * len(spatial))
    grad = torch.randn(4, 8, *spatial)
    treat = centred if is_centred else lambda t: t
    sides = {"in": (x, w), "out": (grad, w)}
    for axis, (image, filters) in sides.items():
        found = ops.conv_scores(image, filters, axis, groups, scores, is_centred)
        for g in range(groups):
            mine = filters.chunk(groups)[g]
            left = treat(image.chunk(groups, 1)[g].transpose(0, 1))
            right = treat(mine.transpose(0, 1) if axis == "in" else mine)
            want = torch.tensor(expected(left, right, scores))
            torch.testing.assert_close(found[g], want, rtol=1e-5, atol=1e-6)
    found = ops.conv_scores(x, grad, "batch", 1, scores, is_centred)
    want = torch.tensor([expected(treat(x), treat(grad), scores)])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


# --- estimates


def test_few_rows_are_all_looked_at():
    x, w = torch.randn(ROWS, 6), torch.randn(6, 4)
    exact = ops.mm_scores(x, w, "product")
    torch.testing.assert_close(ops.mm_scores(x, w, "estimated"), exact + 0.1 * exact.mean())


def test_a_size_that_turns_out_small_is_looked_at_everywhere():
    def call(x, w):
        return ops.REFERENCES[ops.mm_scores](x, w, "estimated")

    gm = make_fx(call, tracing_mode="symbolic")(torch.randn(40, 6), torch.randn(6, 44))
    for rows, columns in [(20, 24), (32, 33), (90, 7)]:
        x, w = torch.randn(rows, 6), torch.randn(6, columns)
        torch.testing.assert_close(gm(x, w), ops.mm_scores(x, w, "estimated"))


@pytest.mark.parametrize("size", [33, 64, 100, 768, 4096, 100_003])
def test_places_are_spread(size):
    places = _places(size, torch.device("cpu"))
    assert len(places) == ROWS
    assert 0 <= int(places.min()) <= int(places.max()) < size
    gaps = places.sort().values.diff().double() / size
    assert float(gaps.max()) <= 3.0 / ROWS  # no stretch is overlooked
    if size >= 64:
        assert len(places.unique()) == ROWS
        # out of step with any period: the first of every 8 is not all that is seen
        assert len((places % 8).unique()) >= 5


def test_an_estimate_is_near_for_even_rows_and_never_zero():
    torch.manual_seed(3)
    x, w = torch.randn(2048, 40) * torch.linspace(0.1, 4, 40), torch.randn(40, 512)
    exact, found = ops.mm_scores(x, w, "product"), ops.mm_scores(x, w, "estimated")
    share = found / found.sum() / (exact / exact.sum())
    assert torch.corrcoef(torch.stack([exact, found]))[0, 1] > 0.93
    assert share.median().item() == pytest.approx(1, abs=0.2)
    unseen = torch.zeros(2048, 3)
    unseen[1, 0] = 1  # place 1 is not looked at
    assert 1 not in _places(2048, torch.device("cpu")).tolist()
    unseen[:, 1] = 1
    assert (ops.mm_scores(unseen, torch.ones(3, 2), "estimated") > 0).all()


@pytest.mark.parametrize("spatial", [(50,), (9, 7), (5, 4, 3)])
def test_estimates_of_convolutions(spatial):
    torch.manual_seed(4)
    level = torch.linspace(0.2, 3, 10)
    x = torch.randn(20, 10, *spatial) * level.view(1, -1, *[1] * len(spatial))
    w = torch.randn(64, 10, *[3] * len(spatial))
    found = ops.conv_scores(x, w, "in", 1, "estimated")[0]
    exact = ops.conv_scores(x, w, "in", 1, "product")[0]
    assert torch.corrcoef(torch.stack([exact, found]))[0, 1] > 0.97
    grad = torch.randn(20, 64, *spatial)
    assert ops.conv_scores(grad, w, "out", 2, "estimated").shape == (2, 32)
    examples = ops.conv_scores(x, grad, "batch", 1, "estimated")
    assert examples.shape == (1, 20)
    assert (examples > 0).all()


@pytest.mark.parametrize("scores", [*KINDS, "estimated"])
def test_nothing_at_all(scores):
    assert ops.mm_scores(torch.zeros(0, 3), torch.zeros(3, 2), scores).shape == (3,)
    assert ops.mm_scores(torch.zeros(2, 0), torch.zeros(0, 2), scores).shape == (0,)
    assert ops.mm_scores(torch.zeros(0, 2, 3), torch.zeros(0, 3, 4), scores).shape == (0, 3)
