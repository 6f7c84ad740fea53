"""Small random-weight Hugging Face models, and what sparse ones mean, written a second time.

``zoo`` builds the models. ``eager_reference`` runs one with its linear layers, convolutions and
matmuls computed by the plain autograd.Function below, which shares no code with sparsefx: masks by
sorting and by trying all patterns, sampling by zeroing what wasn't sampled. ``expected_products``
derives from the modules alone which products must be sparse.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sparsefx  # before its root leaves sys.path

_ROOT = str(Path(__file__).parents[2])


@contextmanager
def _without_root() -> Iterator[None]:
    """With the root on sys.path, transformers would take kernels/ for a package of that name."""
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if entry not in ("", ".", _ROOT)]
    try:
        yield
    finally:
        sys.path[:] = path


with _without_root():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.pytorch_utils import Conv1D
    from transformers.utils.import_utils import is_kernels_available

    is_kernels_available()  # asked later on too; the answer is kept


# --- the models


@dataclass
class Case:
    """A model with what a test has to know of it.

    Attributes:
        model: random weights, no dropout, in training mode.
        inputs: keyword arguments.
        outputs: layers that feed the model's output, which stay dense.
        firsts: layers that read an input which needs no gradient: no grad_input product.
        matmuls: layers with two matmuls of activations each, where attention isn't fused.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    firsts: tuple[str, ...] = ()
    matmuls: tuple[str, ...] = ()

    def of_size(self, batch: int) -> dict[str, Tensor]:
        """Inputs for another batch size: the first ones again, the images among them scaled."""
        return {key: _of_size(value, batch) for key, value in self.inputs.items()}

    def to(self, dtype: torch.dtype) -> "Case":
        """A copy in another precision."""
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        model = copy.deepcopy(self.model).to(dtype)
        return Case(model, inputs, self.outputs, self.firsts, self.matmuls)


def _of_size(value: Tensor, batch: int) -> Tensor:
    again = torch.cat([value] * -(-batch // value.shape[0]))[:batch].clone()
    if not value.is_floating_point():
        return again
    return again * torch.linspace(0.5, 1.5, batch, dtype=value.dtype).view(-1, 1, 1, 1)


_TEXT: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 96, (batch, length))


def _images(batch: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch, channels, size, size)


def _gpt2(attention: str = "sdpa", depth: int = 2) -> Case:
    config = transformers.GPT2Config(
        **_TEXT, n_positions=16, n_embd=32, n_layer=depth, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention,
    )  # fmt: skip
    matmuls = tuple(f"transformer.h.{i}.attn" for i in range(depth)) if attention == "eager" else ()
    model = transformers.GPT2LMHeadModel(config)
    return Case(model, {"input_ids": _ids(2, 9)}, ("lm_head",), matmuls=matmuls)


def _bert() -> Case:
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return Case(model, {"input_ids": _ids(3, 9)}, ("classifier",))


def _llama() -> Case:
    config = transformers.LlamaConfig(
        **_TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return Case(transformers.LlamaForCausalLM(config), {"input_ids": _ids(2, 9)}, ("lm_head",))


def _vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=12, patch_size=4, num_channels=4, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    firsts = ("vit.embeddings.patch_embeddings.projection",)
    return Case(model, {"pixel_values": _images(4, 4, 12)}, ("classifier",), firsts)


def _resnet(widths: tuple[int, ...] = (16, 32)) -> Case:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=16, hidden_sizes=list(widths),
        depths=[1] * len(widths), num_labels=3, layer_type="bottleneck",
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    firsts = ("resnet.embedder.embedder.convolution",)
    return Case(model, {"pixel_values": _images(4, 3, 24)}, ("classifier.1",), firsts)


def _convnext() -> Case:
    config = transformers.ConvNextConfig(
        num_channels=4, patch_size=4, num_stages=2, hidden_sizes=[16, 32], depths=[1, 1],
        num_labels=3, image_size=32,
    )  # fmt: skip
    model = transformers.ConvNextForImageClassification(config)
    firsts = ("convnext.embeddings.patch_embeddings",)
    return Case(model, {"pixel_values": _images(2, 4, 32)}, ("classifier",), firsts)


def _t5() -> Case:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1,
        num_heads=4, dropout_rate=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    inputs = {"input_ids": _ids(2, 9), "decoder_input_ids": _ids(2, 7)}
    return Case(model, inputs, ("lm_head",))


def _mixtral(experts: str | None = None) -> Case:
    config = transformers.MixtralConfig(
        **_TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    if experts is not None:
        model.set_experts_implementation(experts)
    return Case(model, {"input_ids": _ids(2, 9)}, ("lm_head",))


_ZOO: dict[str, Callable[[], Case]] = {
    "gpt2": _gpt2,
    "gpt2-small": partial(_gpt2, depth=1),
    "gpt2-eager-attention": partial(_gpt2, "eager"),
    "bert": _bert,
    "llama": _llama,
    "vit": _vit,
    "resnet": _resnet,
    "resnet-small": partial(_resnet, (16,)),
    "convnext": _convnext,
    "t5": _t5,
    "mixtral": _mixtral,
    "mixtral-batched": partial(_mixtral, "batched_mm"),
}


@pytest.fixture
def zoo() -> Callable[[str], Case]:
    """Build a model by name, from one seed, with biases and scales that aren't just 0 and 1."""

    def build(name: str) -> Case:
        torch.manual_seed(1)
        case = _ZOO[name]()
        case.model.train()
        with torch.no_grad():
            for parameter in case.model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:  # the usual 0.02 makes tiny models nearly linear
                    parameter.mul_(0.25 / parameter.std().clamp(min=0.02))
        return case

    return build


# --- masks, by hand


def _row_mask(w: Tensor, n: int, m: int) -> Tensor:
    """The n largest |w| of every m along axis 1, of equals the earlier; w is [out, in, *taps]."""
    groups = w.abs().movedim(1, -1)
    order = groups.unflatten(-1, (-1, m)).sort(dim=-1, descending=True, stable=True)[1]
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order[..., :n], True)
    return mask.flatten(-2).movedim(-1, 1)


def _all_2_4_patterns() -> Tensor:
    lines = [line for line in itertools.product((0, 1), repeat=4) if sum(line) == 2]
    squares = itertools.product(lines, repeat=4)
    legal = [s for s in squares if all(sum(column) == 2 for column in zip(*s, strict=True))]
    assert len(legal) == 90
    return torch.tensor(legal, dtype=torch.float64)


def _tiles(w: Tensor, m: int) -> Tensor:
    """[out, in, *taps] -> [out/m, in/m, taps, m, m]."""
    taps = w.reshape(w.shape[0], w.shape[1], -1)
    return taps.unflatten(1, (-1, m)).unflatten(0, (-1, m)).permute(0, 2, 4, 1, 3)


def _from_tiles(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.permute(0, 3, 1, 4, 2).reshape(shape)


def _square_mask(w: Tensor) -> Tensor:
    """Transposable 2:4: the best of all 90 patterns for every tile."""
    patterns = _all_2_4_patterns()
    scores = torch.einsum("...ij,pij->...p", _tiles(w.abs().double(), 4), patterns)
    return _from_tiles(patterns[scores.argmax(-1)].bool(), w.shape)


def _greedy_mask(w: Tensor) -> Tensor:
    """Transposable 4:8 has no best pattern that one could try out; the mask is checked instead."""
    mask = sparsefx.masks.transposable_mask(w, 4, 8)
    tiles = _tiles(mask, 8)
    assert (tiles.sum(-1) == 4).all()
    assert (tiles.sum(-2) == 4).all()
    kept, half = w[mask].abs().sum(), w.abs().sum() / 2
    assert kept > half
    return mask


# --- products, by hand


@dataclass(frozen=True)
class Recipe:
    """What a preset does to the three products of a layer.

    Attributes:
        mask: of the weight [out, in, *taps], in the forward and grad_input.
        m: what sizes must divide by.
        square: both of them.
        forward: share of the reduction axis that is sampled; the gradients follow.
        grad_input: likewise, on its own.
        grad_weight: likewise.
    """

    mask: Callable[[Tensor], Tensor] | None = None
    m: int = 1
    square: bool = False
    forward: float | None = None
    grad_input: float | None = None
    grad_weight: float | None = None

    def unmasked(self) -> "Recipe":
        """What remains where a mask can't be: patterns of the gradients' own."""
        return replace(self, mask=None)

    def takes(self, inner: int, outer: int) -> bool:
        """Whether a weight of these sizes can be masked."""
        return inner % self.m == 0 and (not self.square or outer % self.m == 0)


RECIPES = {
    "2:4": Recipe(mask=partial(_row_mask, n=2, m=4), m=4),
    "2:4-transposable": Recipe(mask=_square_mask, m=4, square=True),
    "4:8-transposable": Recipe(mask=_greedy_mask, m=8, square=True),
    "sampled-0.3": Recipe(forward=0.3),
    "sampled-backward-0.3": Recipe(grad_input=0.3, grad_weight=0.3),
    "all-three": Recipe(mask=_square_mask, m=4, square=True, grad_weight=0.3),
}


class _Matrix:
    """y[..., M, N] = x[..., M, K] @ w[..., N, K]^T."""

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.mT

    def grad_input(self, grad: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return grad @ w

    def grad_weight(self, grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return grad.mT @ x

    def norms(self, t: Tensor, axis: int) -> Tensor:
        """2-norms of the rows (axis 0) or columns (axis 1)."""
        return torch.linalg.vector_norm(t, dim=-1 if axis == 0 else -2)

    def zeroed(self, t: Tensor, keep: Tensor, axis: int) -> Tensor:
        return t * (keep.unsqueeze(-1) if axis == 0 else keep.unsqueeze(-2))

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum(0)


@dataclass(frozen=True)
class _Convolution:
    """y = conv(x [batch, in, *], w [out, in, *taps]): axis 0 is batch or out, 1 is channels."""

    geometry: tuple[Any, ...]  # stride, padding, dilation

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, *self.geometry)

    def grad_input(self, grad: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_input(x.shape, w, grad, *self.geometry)

    def grad_weight(self, grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(x, w.shape, grad, *self.geometry)

    def norms(self, t: Tensor, axis: int) -> Tensor:
        return torch.linalg.vector_norm(t.transpose(0, axis).flatten(1), dim=1)

    def zeroed(self, t: Tensor, keep: Tensor, axis: int) -> Tensor:
        return t * keep.view([-1 if i == axis else 1 for i in range(t.dim())])

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))


def _largest(scores: Tensor, ratio: float) -> Tensor:
    """1 for the k largest along the last axis, else 0; of equals the earlier."""
    size = scores.shape[-1]
    k = min(size, max(1, int(ratio * size)))
    order = scores.sort(dim=-1, descending=True, stable=True)[1]
    return torch.zeros_like(scores).scatter(-1, order[..., :k], 1.0)


Choices = list[Tensor]


class _Product(torch.autograd.Function):
    """A product with its two gradients, each as the recipe says."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, kind: Any, recipe: Recipe,
        choices: Choices,
    ) -> Tensor:  # fmt: skip
        acting = w if recipe.mask is None else torch.where(recipe.mask(w), w, 0.0)
        ctx.has_bias, ctx.kind, ctx.recipe, ctx.choices = bias is not None, kind, recipe, choices
        ctx.keep = None
        sampled = x
        if recipe.forward is not None:
            ctx.keep = _largest(kind.norms(x, 1) * kind.norms(acting, 1), recipe.forward)
            choices.append(ctx.keep)
            sampled = kind.zeroed(x, ctx.keep, 1)
        ctx.save_for_backward(x, acting)
        out = kind.product(sampled, acting)
        if bias is None:
            return out
        return out + bias.view([-1 if i == 1 else 1 for i in range(out.dim())])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, acting = ctx.saved_tensors
        kind, recipe = ctx.kind, ctx.recipe
        gx = gw = None
        if ctx.needs_input_grad[0]:
            left = grad
            if recipe.grad_input is not None:
                scores = kind.norms(grad, 1) * kind.norms(acting, 0)
                left = kind.zeroed(grad, _largest(scores, recipe.grad_input), 1)
                ctx.choices.append(_largest(scores, recipe.grad_input))
            gx = kind.grad_input(left, acting, x)
        if ctx.needs_input_grad[1]:
            left = grad
            if recipe.grad_weight is not None:
                scores = kind.norms(x, 0) * kind.norms(grad, 0)
                left = kind.zeroed(grad, _largest(scores, recipe.grad_weight), 0)
                ctx.choices.append(_largest(scores, recipe.grad_weight))
            gw = kind.grad_weight(left, x, acting)
        if ctx.keep is not None:  # through the sampled entries only
            gx = gx if gx is None else kind.zeroed(gx, ctx.keep, 1)
            gw = gw if gw is None else kind.zeroed(gw, ctx.keep, 1)
        gb = kind.bias_gradient(grad) if ctx.has_bias else None
        return gx, gw, gb, None, None, None


def _of_activations(left: Tensor, right: Tensor) -> bool:
    return left.dim() > 2 and left.requires_grad and right.requires_grad


class _Eager(TorchFunctionMode):
    """Computes every eligible layer by _Product; everything else as it is."""

    def __init__(self, layers: dict[int, tuple[str, Recipe]], matmuls: Recipe) -> None:
        super().__init__()
        self.layers, self.matmuls = layers, matmuls
        self.choices: Choices = []
        self.called: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, w, bias = (*args, *[None] * (3 - len(args)))
            return self._layer(x, w, w, kwargs.get("bias", bias), func, args, kwargs)
        if func is torch.addmm:  # Conv1D's [in, out]
            bias, x, w = args
            return self._layer(x, w, w.t(), bias, func, args, kwargs)
        if func in (F.conv2d, torch.conv2d) and id(args[1]) in self.layers:
            x, w, bias, stride, padding, dilation, _ = args
            name, recipe = self.layers[id(w)]
            self.called.append(name)
            where = _Convolution((stride, padding, dilation))
            return self._product(x, w, bias, where, recipe)
        if func in (torch.matmul, Tensor.matmul, torch.bmm) and _of_activations(*args):
            return self._product(args[0], args[1].mT, None, _Matrix(), self.matmuls)
        return func(*args, **kwargs)

    def _layer(
        self, x: Tensor, stored: Tensor, w: Tensor, bias: Tensor | None, func: Any, args: Any,
        kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if id(stored) not in self.layers:
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        name, recipe = self.layers[id(stored)]
        self.called.append(name)
        out = self._product(x.reshape(-1, x.shape[-1]), w, bias, _Matrix(), recipe)
        return out.view(*x.shape[:-1], -1)

    def _product(
        self, x: Tensor, w: Tensor, bias: Tensor | None, kind: Any, recipe: Recipe
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, w = x.to(dtype), w.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _Product.apply(x, w, bias, kind, recipe, self.choices)  # type: ignore[no-any-return]


# --- which layers


@dataclass(frozen=True)
class _Layer:
    weight: Tensor
    inner: int
    outer: int
    depthwise: bool = False


def _layers(model: nn.Module) -> dict[str, _Layer]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | MixtralTopKRouter):
            outer, inner = module.weight.shape
            found[name] = _Layer(module.weight, inner, outer)
        elif isinstance(module, Conv1D):
            inner, outer = module.weight.shape
            found[name] = _Layer(module.weight, inner, outer)
        elif isinstance(module, nn.Conv2d):
            outer, inner = module.weight.shape[:2]
            depthwise = module.groups == module.in_channels > 1
            found[name] = _Layer(module.weight, inner, outer, depthwise)
    return found


def _sparse_layers(case: Case) -> dict[str, _Layer]:
    """Those that a preset's ``*`` reaches."""
    layers = _layers(case.model)
    return {k: v for k, v in layers.items() if k not in case.outputs and not v.depthwise}


@pytest.fixture
def expected_products() -> Callable[[Case, str], dict[str, list[str]]]:
    """By role, the layers whose product must be sparse, from the modules alone."""

    def derive(case: Case, preset: str) -> dict[str, list[str]]:
        recipe, layers = RECIPES[preset], _sparse_layers(case)
        both = [name for name in case.matmuls for _ in range(2)]  # q @ k^T and p @ v
        if recipe.mask is not None:
            acting = [k for k, v in layers.items() if recipe.takes(v.inner, v.outer)]
        else:
            acting = [*layers, *both] if recipe.forward is not None else []
        own = [*layers, *both]
        gradients = acting if recipe.grad_input is None else own
        weights = own if recipe.grad_weight is not None else acting
        if recipe.grad_weight is None and recipe.mask is not None:
            weights = []  # straight-through: the whole product
        return {
            "forward": sorted(acting),
            "grad_input": sorted(name for name in gradients if name not in case.firsts),
            "grad_weight": sorted(weights),
        }

    return derive


# --- running


@dataclass
class Result:
    """What a run left: outputs, gradients and buffers by name, and the sampled sets."""

    tensors: dict[str, Tensor]
    choices: Choices = field(default_factory=list)
    called: list[str] = field(default_factory=list)


def _run(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> Result:
    """Forward, and backward of a fixed random functional of the logits where gradients are on."""
    logits = call(**inputs).logits
    found = {"logits": logits.detach()}
    if logits.requires_grad:
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
        model.zero_grad()
        (logits * weights.to(logits.dtype)).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
    floats = ((k, b) for k, b in model.named_buffers() if b.is_floating_point())
    found.update((f"buffer {name}", buffer.clone()) for name, buffer in floats)
    return Result(found)


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run a (compiled) model: ``run(call, model, inputs)``."""
    return _run


@pytest.fixture
def eager_reference() -> Callable[..., Result]:
    """Run a copy of a model as the recipe of a preset says, by hand."""

    def reference(case: Case, preset: str, inputs: dict[str, Tensor] | None = None) -> Result:
        model, recipe = copy.deepcopy(case.model), RECIPES[preset]
        if isinstance(model, transformers.MixtralForCausalLM):
            model.set_experts_implementation("eager")
        layers = {}
        case = Case(model, inputs or case.inputs, case.outputs, case.firsts, case.matmuls)
        for name, layer in _sparse_layers(case).items():
            masked = recipe.takes(layer.inner, layer.outer)
            layers[id(layer.weight)] = name, recipe if masked else recipe.unmasked()
        mode = _Eager(layers, recipe.unmasked())
        with mode:
            result = _run(model, model, case.inputs)
        result.choices, result.called = mode.choices, mode.called
        return result

    return reference
