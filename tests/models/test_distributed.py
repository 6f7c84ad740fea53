"""Real models with sparsifiers: two gloo processes, under DDP and FSDP2, train as one does."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsefx import masks
from sparsefx.sparsifiers import SRSTE, Sparsifier, TransposableNM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not torch.distributed.is_available(), reason="needs gloo"
    ),
]
WORLD, STEPS, BATCH = 2, 3, 4
TEXT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A small model in float64, without dropout; batch norm uses its running statistics."""
    import transformers as hf

    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "use_cache": False}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, **sizes, **drop))
    elif name == "llama":
        config = hf.LlamaConfig(**TEXT, **SIZE, num_key_value_heads=1, use_cache=False)
        model = hf.LlamaForCausalLM(config)
    elif name == "bert":
        config = hf.BertConfig(vocab_size=64, max_position_embeddings=8, **SIZE, **off)
        model = hf.BertForSequenceClassification(config)
    elif name == "vit":
        config = hf.ViTConfig(image_size=8, patch_size=4, num_channels=4, **SIZE, **off)
        model = hf.ViTForImageClassification(config)
    else:
        config = hf.ResNetConfig(
            num_channels=4, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3
        )
        model = hf.ResNetForImageClassification(config)
    return model.double().eval()  # eval: each rank's batch would have statistics of its own


def sparsify(name: str, model: nn.Module) -> Sparsifier:
    if name in ("gpt2", "resnet"):
        return TransposableNM(model, 2, 4, refresh=2, decay=0.01)
    return SRSTE(model, 2, 4, decay=0.01)


def inputs(name: str, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if name in ("vit", "resnet"):
        side = 8 if name == "vit" else 16
        shape = (BATCH, 4, side, side)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, 64, (BATCH, 6), generator=generator)}


def train(
    name: str,
    forward: Callable[..., Any],
    sparsifier: Sparsifier,
    part: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(sparsifier.model.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        given = {key: part(value) for key, value in inputs(name, step).items()}
        (forward(**given).logits - 1).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    return {key: whole(value).clone() for key, value in sparsifier.model.state_dict().items()}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def single(name: str) -> dict[str, Tensor]:
    model = build(name)
    return train(name, model, sparsify(name, model))


def distributed(name: str, how: str, rank: int) -> dict[str, Tensor]:
    model = build(name)
    sparsifier = sparsify(name, model)
    forward = model
    if how == "ddp":
        unused = name == "vit"  # a parameter of its own for masked images
        forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        sparsifier.attach()
    return train(name, forward, sparsifier, lambda x: x.chunk(WORLD)[rank])


JOBS = [
    (name, how) for name in ("gpt2", "llama", "bert", "vit", "resnet") for how in ("ddp", "fsdp")
]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    torch.save([distributed(*job, rank) for job in JOBS], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    """What each rank found, for all jobs: starting processes is what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-P", __file__, str(folder)]
    started = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    said = [process.communicate(timeout=180)[1] for process in started]
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("job", range(len(JOBS)), ids=["-".join(job) for job in JOBS])
def test_two_processes_agree_with_one(results: list[list[dict[str, Tensor]]], job: int) -> None:
    mine, other = (found[job] for found in results)
    expected = single(JOBS[job][0])
    assert mine.keys() == expected.keys()
    stored = [key for key in expected if key.endswith(".mask")]
    assert stored
    for key, value in expected.items():
        assert torch.equal(mine[key], other[key]), key
        if value.is_floating_point():
            torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(mine[key], value), key
    assert all(masks.density(mine[key]) == 0.5 for key in stored)


if __name__ == "__main__":  # what each process runs
    worker(int(sys.argv[2]), sys.argv[1])
