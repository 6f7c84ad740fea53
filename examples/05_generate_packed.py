"""Packed weights: a small Llama generates token by token, on CPU, from 2:4 and 1:4 weights.

    python examples/05_generate_packed.py [--quick] [--no-compile] [--bf16] [--tokens 64]

One row of activations against all weights: what counts is how many bytes of weights are read.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import sparsefx as sfx

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
PATTERNS = (sfx.NM(2, 4), sfx.NM(1, 4))
Model = Callable[..., object]


def llama(quick: bool, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights; the vocabulary is small, so that nearly all bytes are in the layers."""
    hidden, layers = (64, 1) if quick else (1024, 4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def generate(run: Model, config: LlamaConfig, tokens: int) -> tuple[list[int], float]:
    """Greedy decoding, one token a call: (tokens, tokens per second)."""
    cache = StaticCache(config=config, max_cache_len=len(PROMPT) + tokens)
    said, start = list(PROMPT), 0.0
    for place in range(len(PROMPT) + tokens - 1):
        if place == len(PROMPT) - 1:  # the prompt was read: from here on each call says a token
            start = time.perf_counter()
        where = torch.tensor([place])
        step = {"cache_position": where, "position_ids": where.unsqueeze(0)}
        logits = run(torch.tensor([[said[place]]]), past_key_values=cache, **step).logits
        if place >= len(PROMPT) - 1:
            said.append(int(logits[0, -1].argmax()))
    return said[len(PROMPT) :], tokens / (time.perf_counter() - start)


def best(run: Model, config: LlamaConfig, tokens: int, rounds: int) -> tuple[list[int], float]:
    """The tokens, and the pace of the fastest of some rounds after one to warm up."""
    generate(run, config, 2)
    found = [generate(run, config, tokens) for _ in range(rounds)]
    return found[0][0], max(pace for _, pace in found)


@torch.no_grad()
def masked(model: LlamaForCausalLM, pattern: sfx.NM) -> LlamaForCausalLM:
    """A dense copy whose layers hold the pattern."""
    twin = copy.deepcopy(model)
    for layer in twin.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(sfx.masks.nm_mask(layer.weight, pattern.n, pattern.m, 1))
    return twin


def alike(said: list[int], wanted: list[int]) -> int:
    """How many tokens agree before the first that doesn't: bfloat16 rounds logits to ties."""
    pairs = enumerate(zip(said, wanted, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(said))


def weight_bytes(model: nn.Module) -> int:
    held: list[Tensor] = [*model.model.layers.parameters(), *model.model.layers.buffers()]
    return sum(tensor.nbytes for tensor in held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, few tokens")
    parser.add_argument("--no-compile", action="store_true", help="eager rows only")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    args = parser.parse_args()
    tokens, rounds = (6, 1) if args.quick else (args.tokens, 3)
    model = llama(args.quick, torch.bfloat16 if args.bf16 else torch.float32)
    config, rows = model.config, []

    def add(name: str, which: LlamaForCausalLM, wanted: list[int] | None = None) -> None:
        torch.compiler.reset()  # models of one class share what Dynamo keeps
        for how in ("eager",) if args.no_compile else ("eager", "compiled"):
            run = which if how == "eager" else torch.compile(which, fullgraph=True)
            said, pace = best(run, config, tokens, rounds)
            told = "" if wanted is None else f"first {alike(said, wanted)} of {tokens}"
            rows.append((f"{name}, {how}", weight_bytes(which) / 1e6, pace, told))

    add("dense", model)
    for pattern in PATTERNS:
        twin = masked(model, pattern)
        wanted, _ = generate(twin, config, tokens)
        report = sfx.pack(twin)  # no config: what already holds a pattern is packed
        first, *_, last = str(report).splitlines()
        print(f"{first}\n...\n{last}\n")
        add(f"packed {pattern}", twin, wanted)

    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{dtype}, {torch.get_num_threads()} threads, {tokens} tokens after {len(PROMPT)}\n")
    print(f"{'':26}{'layers MB':>10}{'tokens/s':>10}{'of dense':>10}  as masked dense")
    dense = max(pace for name, _, pace, _ in rows if name.startswith("dense"))
    for name, megabytes, pace, told in rows:
        print(f"{name:26}{megabytes:10.1f}{pace:10.1f}{pace / dense:9.2f}x  {told}")


if __name__ == "__main__":
    main()
