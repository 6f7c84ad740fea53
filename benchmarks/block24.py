"""A transformer's block on a CUDA device whose MLP is 2:4, attention dense: forward + backward.

    python benchmarks/block24.py vit_block24 [--seconds 60] [--json PATH]

ViT-L's block and GPT-2 medium's, 16384 tokens; the time is what a user sees of 2:4.
"""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import gpu
from cases import Case, Contestant, Field, Goal, Setting, judged, off, tried
from lin24 import OURS, kept_of, ours, peers


class Block(nn.Module):
    """A pre-norm transformer block: ViT's, or GPT-2's where it is causal."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).transpose(1, 3)
        q, k, v = parts.unbind(2)  # [batch, heads, length, width / heads] each
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(gelu(self.up(self.between(x))))


def twin64(block: Block, sparse: bool) -> Block:
    """The block in float64, with the masked weights if sparse."""
    twin = copy.deepcopy(block).double()
    for layer, own in ((twin.up, block.up), (twin.down, block.down)) if sparse else ():
        layer.weight.data.copy_(kept_of(own.weight.detach()))
    return twin


def backward(run: Any, block: nn.Module, x: Tensor, grad: Tensor) -> None:
    x.grad = None
    block.zero_grad(set_to_none=True)
    run(x).backward(grad)


def mlp_tiled(block: Block, s: Setting, notes: list[str]) -> dict[str, Block]:
    found = {}
    for name, swapped in peers(block, s, notes).items():
        for layer in (swapped.qkv, swapped.out):
            layer.__class__ = nn.Linear
        found[name] = swapped
    return found


def in_block(batch: int, length: int, width: int, causal: bool, s: Setting) -> Field:
    block = Block(width, max(1, width // 64), causal).to(s.device, torch.bfloat16)
    x, grad = s.randn(batch, length, width).requires_grad_(), s.randn(batch, length, width)
    notes: list[str] = []
    one_sequence = x[:1].detach().double()
    with torch.no_grad():
        dense, masked = (twin64(block, sparse)(one_sequence) for sparse in (False, True))
    plain, own = copy.deepcopy(block), copy.deepcopy(block)
    runs: dict[str, tuple[Any, nn.Module]] = {
        "dense, torch.compile": (s.compile(plain), plain),
        OURS: (ours(own, s, "up", "down"), own),
    }
    runs |= {name: (swapped, swapped) for name, swapped in mlp_tiled(block, s, notes).items()}
    field = []
    for name, (run, module) in runs.items():
        one = Contestant(name, partial(backward, run, module, x, grad), ours=name == OURS)
        one.dense, one.limit = name.startswith("dense"), None if name.startswith("dense") else 1.29
        if tried(one, lambda one=one: (one.work(), True), notes) is None:
            continue
        found = run(x).detach()[:1]
        if one.dense or one.ours:
            judged(one, found, dense if one.dense else masked, dense, 4 * width, notes)
        else:
            one.error = off(found, dense)  # its own masks: no twin to compare with
        field.append(one)
    return Field(field, [Goal(OURS, 1.12)], notes)


def block_cases(s: Setting) -> list[Case]:
    shapes = {"ViT-L": (64, 256, 1024, False), "GPT-2 medium": (16, 1024, 1024, True)}
    shapes = {"ViT-L": (2, 4, 32, False)} if s.dry else shapes
    return [
        Case(f"{name} block, {shape[0]} x {shape[1]}, fw + bw", partial(in_block, *shape))
        for name, shape in shapes.items()
    ]


ROWS = {"vit_block24": block_cases}

if __name__ == "__main__":
    gpu.main(ROWS, __doc__)
