"""What every op owes the compiler: a true schema, a true fake, a name for its FLOPs, a gradient.

One list of calls covers every op over odd and empty shapes, layouts and dtypes.
"""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sparsefx import ops
from sparsefx.compat import OpOverload

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
LAYOUTS = ["contiguous", "strided", "channels_last"]
PATTERN = (2, 4, 1, False)

# x, w, (stride, padding, dilation, groups)
CONVOLUTIONS = {
    "1d": ((2, 8, 9), (6, 8, 3), ([2], [1], [1], 1)),
    "2d": ((3, 8, 7, 6), (12, 8, 3, 2), ([1, 2], [1, 0], [2, 1], 1)),
    "3d": ((1, 4, 5, 4, 3), (4, 4, 2, 3, 1), ([1, 1, 2], [0, 1, 0], [1, 1, 1], 1)),
    "groups": ((3, 8, 7, 6), (8, 4, 3, 3), ([2, 2], [1, 1], [1, 1], 2)),
    "taps1": ((2, 8, 5, 3), (4, 8, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    "batch0": ((0, 8, 7, 6), (8, 8, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
}


def laid_out(shape, dtype, layout):
    """A tensor of random values whose memory is in order, transposed or channels-last."""
    full = torch.randn(shape).to(dtype)
    if layout == "channels_last" and len(shape) in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return full.to(memory_format=formats[len(shape)])
    if layout != "contiguous" and len(shape) > 1:
        return full.transpose(-1, -2).contiguous().transpose(-1, -2)
    return full


def picked(rows, size, k):
    """Ascending, unique indices: int64 [rows, k]."""
    drawn = [torch.randperm(size)[:k].sort().values for _ in range(rows)]
    return torch.stack(drawn).to(torch.int64)


def variants(indices, dtype):
    """Nothing, a scale, a pair for the rest."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (None, False), (torch.rand(indices.shape).to(wide), False), (None, True)


def matrix_calls(dtype, layout):
    """Calls of the ops on matrices: odd sizes, and nothing along each axis in turn."""
    for m, k, n in [(5, 8, 7), (1, 4, 1), (0, 8, 7), (5, 0, 7), (5, 8, 0)]:
        name = f"{m}x{k}x{n}"
        x, w = (laid_out(shape, dtype, layout) for shape in ((m, k), (k, n)))
        grad, bias = laid_out((m, n), dtype, layout), torch.randn(n).to(dtype)
        mask = torch.rand(k, n) < 0.5
        few = min(3, k)
        indices = picked(1, k, few)[0]
        square = laid_out((k, 12), dtype, layout)
        for b in (None, bias):
            yield name, ops.nm_mm, (x, w, b, 2, 4, 0, False)
            yield name, ops.nm_mm_act, (x, w, b, 2, 4, 0, False, "relu" if b is None else "silu")
            yield name, ops.masked_mm, (x, w, mask, b)
            for pairs in variants(indices, dtype):
                yield name, ops.sampled_mm, (x, w, indices, b, *pairs)
        yield name, ops.nm_mm, (x, square, None, 1, 3, 1, False)
        yield name, ops.nm_mm, (x, square, None, 2, 4, 0, True)
        few_kept = ops.nm_mask(w, 2, 4, 0, False) & (w > 0)
        packed = ops.nm24_compress(w.t(), few_kept.t())
        yield name, ops.nm24_compress, (w.t(), few_kept.t())
        yield name, ops.nm24_mm, (x, packed, w, few_kept, bias)
        yield name, ops.nm24_mm, (x, packed, w, few_kept, None)
        yield name, ops.nm_mask, (w, 2, 4, 0, False)
        yield name, ops.nm_mask, (square, 2, 4, 0, True)
        tokens = picked(1, m, min(2, m))[0]
        for pairs in variants(indices, dtype):
            yield name, ops.sampled_mm_grad_input, (grad, w, indices, *pairs)
            yield name, ops.gather_columns, (x, indices, *pairs)
        for pairs in variants(tokens, dtype):
            yield name, ops.gather_rows, (x, tokens, *pairs)
        whole = w.t().contiguous()  # [n, k]: 4 and 8 are multiples of 4
        yield name, ops.nm_pack, (whole, 1, 4)
        values, codes = ops.nm_pack(whole, 2, 4)
        yield name, ops.nm_pack_both, (square, square > 0, 2, 4)
        yield name, ops.nm_unpack, (values, codes, 2, 4, k)
        for b in (None, bias):
            yield name, ops.nm_packed_mm, (x, values, codes, b, 2, 4)
        yield name, ops.take_columns, (x, indices)
        for others in (None, torch.randn(m, 1).to(dtype)):
            yield name, ops.scattered_mm, (grad, w.t()[:, :few], indices, k, others)
        yield name, ops.sum_rows, (x, False)
        for turned, rest in itertools.product((False, True), repeat=2):
            xs = (
                x[:, : few + rest]
                if few + rest <= k
                else ops.gather_columns(x, indices, None, rest)
            )
            yield name, ops.sampled_mm_grad_weight, (xs, grad, indices, k, turned, rest)
            xs = ops.gather_rows(x, tokens, None, rest)
            yield name, ops.sampled_mm_weight, (xs, grad, tokens, turned, rest)
        for scores in ("product", "left", "right"):
            yield name, ops.topk_mm_indices, (x, w, few, scores)
        yield name, ops.topk_mm_indices, (x, w, 0, "product")
        yield name, ops.after, (x, [w, indices])
        for scores in ("product", "left", "right", "estimated", "uniform"):
            yield name, ops.mm_scores, (x, w, scores, scores == "left", False)
        yield from draw_calls(name, ops.mm_scores(x, w, "product"), few)


def draw_calls(name, scores, few):
    batch, depth = scores.shape[:-1], scores.shape[-1]
    yield name, ops.topk_indices, (scores, few)
    yield name, ops.mass_indices, (scores, few, 1, 0.6)
    yield name, ops.systematic_indices, (scores, torch.rand(*batch, 1), few)
    yield name, ops.with_replacement_indices, (scores, torch.rand(*batch, few), few)
    size = min(depth, few + 2)
    yield name, ops.bernoulli_indices, (scores, torch.rand(*batch, depth), few, size)


def batched_calls(dtype, layout):
    for b, m, k, n in [(3, 5, 8, 7), (0, 5, 8, 7), (2, 1, 1, 1), (2, 3, 0, 4)]:
        name = f"{b}x{m}x{k}x{n}"
        shapes = (b, m, k), (b, k, n), (b, m, n)
        x, w, grad = (laid_out(shape, dtype, layout) for shape in shapes)
        few = min(3, k)
        indices = picked(b, k, few) if b else torch.zeros(0, few, dtype=torch.int64)
        tokens = picked(b, m, min(2, m)) if b else torch.zeros(0, 2, dtype=torch.int64)
        for drawn in (indices, indices[:1]) if b > 1 else (indices,):  # [1, k]: shared
            for pairs in variants(drawn, dtype):
                yield name, ops.sampled_bmm, (x, w, drawn, *pairs)
                yield name, ops.sampled_bmm_grad_input, (grad, w, drawn, *pairs)
                yield name, ops.gather_columns, (x, drawn, *pairs)
            for rest in (False, True):
                xs = ops.gather_columns(x, drawn, None, rest)
                yield name, ops.sampled_bmm_grad_weight, (xs, grad, drawn, k, rest)
                xs = ops.gather_rows(x, tokens, None, rest)
                yield name, ops.sampled_bmm_weight, (xs, grad, tokens, rest)
        if k % 4 == 0:
            yield name, ops.nm_bmm, (x, w, 2, 4, 1, False)
        if n % 4 == 0:
            yield name, ops.nm_bmm, (x, w, 2, 4, 2, n == k == 4)
        yield name, ops.topk_mm_indices, (x, w, few, "product")
        for shared in (False, True):
            yield name, ops.mm_scores, (x, w, "product", True, shared)
        yield from draw_calls(name, ops.mm_scores(x, w, "product"), few)


def convolution_calls(dtype, layout):
    for name, (x_shape, w_shape, where) in CONVOLUTIONS.items():
        x, w = laid_out(x_shape, dtype, layout), laid_out(w_shape, dtype, layout)
        bias, mask, groups = torch.randn(w_shape[0]).to(dtype), torch.rand(w_shape) < 0.5, where[3]
        y = torch.ops.aten.convolution(x, w, None, *where[:3], False, [0] * len(where[0]), groups)
        grad = laid_out(y.shape, dtype, layout)
        inner, outer = picked(groups, w_shape[1], 3), picked(groups, w_shape[0] // groups, 2)
        examples = picked(1, x_shape[0], min(2, x_shape[0]))
        for b in (None, bias):
            yield name, ops.nm_conv, (x, w, b, *where, *PATTERN)
            yield name, ops.masked_conv, (x, w, mask, b, *where)
            for pairs in variants(inner, dtype):
                yield name, ops.sampled_conv, (x, w, inner, b, *where, *pairs)
        if w_shape[0] % 4 == 0:
            yield name, ops.nm_conv, (x, w, None, *where, 2, 4, 1, True)
            yield name, ops.nm_conv_grad_input, (grad, w, x_shape, *where, 1, 4, 0, False)
        yield name, ops.nm_mask, (w, 2, 4, 1, False)
        yield name, ops.nm_conv_grad_input, (grad, w, x_shape, *where, *PATTERN)
        yield name, ops.masked_conv_grad_input, (grad, w, mask, x_shape, *where)
        yield name, ops.conv_grad_input, (grad, w, x_shape, *where)
        yield name, ops.conv_grad_weight, (grad, x, w_shape, *where)
        for pairs in variants(inner, dtype):
            yield name, ops.gather_channels, (x, inner, *pairs)
            yield name, ops.sampled_conv_grad_input, (grad, w, inner, x_shape, *where, *pairs)
        for rest in (False, True):
            xs = ops.gather_channels(x, inner, None, rest)
            yield name, ops.sampled_conv_grad_weight, (xs, grad, inner, w_shape, *where, rest)
        for pairs in variants(outer, dtype):
            yield name, ops.sampled_conv_input, (grad, w, outer, x_shape, *where, *pairs)
        for pairs in variants(examples, dtype):
            xs = ops.gather_examples(x, examples, *pairs)
            yield name, ops.gather_examples, (x, examples, *pairs)
            yield name, ops.sampled_conv_weight, (grad, x, examples, w_shape, *where, *pairs)
            yield name, ops.sampled_conv_weight, (grad, xs, examples, w_shape, *where, *pairs, True)
        for axis, image, filters in (("in", x, w), ("out", grad, w)):
            for scores in ("product", "estimated", "uniform"):
                yield name, ops.conv_scores, (image, filters, axis, groups, scores, False)
        yield name, ops.conv_scores, (x, grad, "batch", 1, "estimated", True)
        yield name, ops.topk_conv_indices, (x, w, 3, "in", groups, "product")
        yield name, ops.topk_conv_indices, (grad, w, 2, "out", groups, "right")
        yield name, ops.topk_conv_indices, (x, grad, min(2, x_shape[0]), "batch", 1, "left")


def calls(dtype=torch.float32, layout="contiguous"):
    torch.manual_seed(0)
    kinds = matrix_calls, batched_calls, convolution_calls
    return list(itertools.chain.from_iterable(kind(dtype, layout) for kind in kinds))


def differentiable(op, args):
    """The same call, its tensors asking for gradients where the op has one."""
    if op not in GRADIENTS:
        return args
    return tuple(
        arg.detach().requires_grad_()
        if isinstance(arg, torch.Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    )


GRADIENTS = {
    ops.nm_mm, ops.nm_mm_act, ops.nm_bmm, ops.masked_mm, ops.nm_conv, ops.masked_conv,
    ops.sampled_mm, ops.sampled_bmm, ops.sampled_conv,
}  # fmt: skip


def test_every_op_is_called_below():
    assert {op for _, op, _ in calls()} == set(ops.REFERENCES)


def test_every_exported_op_is_one_of_them():
    exported = [getattr(ops, name) for name in ops.__all__]
    assert {found for found in exported if isinstance(found, OpOverload)} == set(ops.REFERENCES)


KINDS = [
    (torch.float32, "channels_last"),
    (torch.bfloat16, "strided"),
]


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_schema_fake_and_gradient_are_true(dtype, layout):
    for name, op, args in calls(dtype, layout):
        args = differentiable(op, args)
        found = torch.library.opcheck(op, args, test_utils=QUICK, raise_exception=False)
        assert all(verdict == "SUCCESS" for verdict in found.values()), (op.name(), name, found)


def described(x):
    """Shape, dtype and strides, but for axes along which nothing is ever stepped."""
    steps = [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    return tuple(x.shape), x.dtype, steps if x.numel() else []


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_fake_has_the_real_shape_dtype_and_strides(dtype, layout):
    for name, op, args in calls(dtype, layout):
        with FakeTensorMode() as mode:
            fake = op(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
        real = op(*args)
        pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
        for one, other in pairs:
            assert described(one) == described(other), (op.name(), name)


@pytest.mark.parametrize("op", ops.REFERENCES, ids=lambda op: op.name().split("::")[1])
def test_it_traces_with_symbolic_sizes(op):
    args = next(args for _, other, args in calls() if other is op)
    torch.library.opcheck(op, differentiable(op, args), test_utils="test_aot_dispatch_dynamic")


def test_every_op_has_a_flop_formula():
    for name, op, args in calls():
        with FlopCounterMode(display=False) as counter:
            op(*args)
        counted = counter.get_flop_counts()["Global"]
        assert op.overloadpacket in counted, (op.name(), name)


def test_no_op_changes_what_it_is_given():
    for name, op, args in calls():
        before = pytree.tree_map_only(torch.Tensor, torch.clone, args)
        op(*args)
        pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(args), strict=True)
        for old, new in pairs:
            same = torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
            assert same, (op.name(), name)
