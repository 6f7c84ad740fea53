"""VRPGE: exact gradients in the mean, projections, draws, lives, steps on drawn channels."""

import copy
import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsefx as sfx
from sparsefx import Dense, Rule, SparsifierError
from sparsefx.sparsifiers import VRPGE, Cubic
from sparsefx.sparsifiers.vrpge import policy_gradient, project
from sparsefx.sparsifiers.vrpge.draws import draw, likely
from sparsefx.sparsifiers.vrpge.maths import adam
from sparsefx.sparsifiers.vrpge.sizes import Programs, round_up

Z = torch.tensor([1.4, 0.9, 0.6, 0.2, -0.3, 0.5])


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


def resnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 9, 3, 1, 1, bias=False), nn.BatchNorm2d(9), nn.ReLU()),
        *(Block(9, 9, 1), Block(9, 14, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(56, 11), nn.ReLU(), nn.Linear(11, 10)),
    )


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 7, generator=torch.Generator().manual_seed(1))


def mlp3() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU()),
        *(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)),
    )


def rows(n: int = 8) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def loss_of(run, x: Tensor) -> Tensor:
    return run(x).square().mean()


def gradients(model: nn.Module, run, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    none = torch.zeros(())
    found = {n: none if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return out.detach(), found


def assert_close(masked: tuple, small: tuple) -> None:
    torch.testing.assert_close(masked[0], small[0], rtol=1e-5, atol=1e-5)
    for name, expected in masked[1].items():
        scale = float(expected.abs().max()) + 1e-3
        assert (expected - small[1][name]).abs().max() <= 2e-5 * scale + 1e-6, name


# --- the mathematics


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (3.0, [1.0, 0.85, 0.55, 0.15, 0.0, 0.45]),
        (1.5, [0.925, 0.425, 0.125, 0, 0, 0.025]),
        (5.0, [1, 0.9, 0.6, 0.2, 0, 0.5]),
        (0.0, [0.0] * 6),
    ],
)
def test_projection(budget, expected):
    torch.testing.assert_close(project(Z, budget), torch.tensor(expected), rtol=0, atol=1e-6)


def test_projection_with_costs_is_the_nearest_point():
    torch.manual_seed(0)
    for n in (1, 2, 57):
        z, costs = torch.randn(n).double() + 0.5, torch.rand(n).double() + 0.1
        s = project(z, 0.2 * n * 0.3, costs)
        assert float(s.min()) >= 0
        assert float(s.max()) <= 1
        assert float((costs * s).sum()) <= 0.06 * n + 1e-9
        for _ in range(200):  # (z - s)(t - s) <= 0 for every feasible t
            t = torch.rand(n).double()
            t *= min(1.0, 0.06 * n / float((costs * t).sum()))
            assert float(((z - s) * (t - s)).sum()) <= 1e-9


def test_the_gradient_is_exact_in_the_mean_and_varies_little():
    """Against the enumeration of all 2^6 sub-nets of a loss of no structure."""
    generator = torch.Generator().manual_seed(3)
    s = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.05]).double()
    masks = torch.tensor(list(itertools.product([0, 1], repeat=6))).double()
    losses = 5 + torch.randn(64, generator=generator).double()
    chance = (masks * s + (1 - masks) * (1 - s)).prod(1)
    unscaled = (masks - s) / (s * (1 - s))  # d log p / d s
    true = (chance * losses) @ unscaled
    for draws in (2, 5):
        picks = torch.multinomial(chance, 20_000 * draws, replacement=True, generator=generator)
        picks = picks.view(-1, draws)
        found = (
            torch.func.vmap(policy_gradient, in_dims=(0, 0, None))(losses[picks], masks[picks], s)
            / (s * (1 - s)).sqrt()
        )
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - true).abs() <= 3 * error).all())
        plain = (losses[picks][..., None] * unscaled[picks]).mean(1)
        assert found.var(0).sum() <= plain.var(0).sum() / 5


def test_two_draws_give_the_published_formula():
    m, s, losses = torch.tensor([[1, 0, 1], [0, 0, 1]]), torch.tensor([0.2, 0.5, 0.9]), Z[:2]
    expected = (losses[0] - losses[1]) * (m[0] - m[1]) / (2 * (s * (1 - s)).sqrt())
    torch.testing.assert_close(policy_gradient(losses, m, s), expected)
    ends = policy_gradient(losses, torch.tensor([[1, 0], [1, 0]]), torch.tensor([1.0, 0.0]))
    assert torch.equal(ends, torch.zeros(2))


def test_adam_is_torchs():
    p = nn.Parameter(Z.clone())
    optimizer = torch.optim.Adam([p], 0.1)
    moments, own = torch.zeros(2, 6), Z.clone()
    for i in range(4):
        p.grad = Z * (i - 1.5)
        optimizer.step()
        own -= 0.1 * adam(moments, Z * (i - 1.5), i + 1)
    torch.testing.assert_close(own, p.detach())


def test_draws_follow_from_their_key():
    s = torch.full((4000,), 0.3)
    before = torch.get_rng_state()
    one = draw(s, 0, "weights", 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, draw(s, 0, "weights", 7))
    assert all(not torch.equal(one, draw(s, *key)) for key in ((1, "weights", 7), (0, "x", 7)))
    assert abs(float(one.float().mean()) - 0.3) < 0.03
    assert bool(draw(torch.ones(99), 1).all())
    assert not bool(draw(torch.zeros(99), 1).any())


def test_the_most_probable_sub_net():
    groups, costs = torch.tensor([0, 0, 0, 0, 1, 1]), torch.ones(6)
    s = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.2, 0.3])  # 3 are expected
    assert likely(s, costs, groups).tolist() == [True, True, False, False, False, True]
    even = likely(torch.full((6,), 0.5), costs, groups)
    assert even.tolist() == [True, True, False, False, True, False]
    none = likely(torch.zeros(6), costs, groups)  # no layer is cut off
    assert none.tolist() == [True, False, False, False, True, False]


def test_sizes():
    assert [round_up(c, 32, 8) for c in (0, 4, 5, 32)] == [4, 4, 8, 32]
    assert [round_up(c, 3, 8) for c in (0, 1, 2, 3)] == [1, 1, 2, 3]
    programs = Programs((16, 16), 8, 2, lambda sizes: sizes[0] * sizes[1])
    assert programs.choose([3, 5], [5.5, 4]) == (6, 6)
    assert programs.choose([4, 6], [5, 5]) == (6, 6)  # a known one holds it
    assert programs.choose([2, 2], [2, 2]) == (2, 2)  # the known one would cost far more
    assert programs.choose([4, 4], [4, 4]) == (6, 6)  # no more than two
    assert programs.choose([9, 9], [9, 9]) == (16, 16)


# --- the life


def test_gates_are_tied_along_a_residual_stream():
    model = resnet()
    gates = VRPGE(model, 0.5, args=images(), budget="flops")
    names = [[member.target.name for member in group.members] for group in gates.groups]
    assert names == [["0", "3.conv2"], ["3.conv1"], ["4.conv1"], ["4.conv2", "4.shortcut"], ["7"]]
    assert "keep_output" in gates.skipped["9"]
    beside = {member.target.name for group in gates.groups for member in group.beside}
    assert {"1.weight", "1.bias", "3.conv2.bias", "3.norm2.weight", "7.bias"} <= beside
    stream = model[:5](images())  # what is off is zero at the end of the stream
    start = sum(group.size for group in gates.groups[:3])
    off = ~gates.state.gates[0][start : start + 14]
    assert bool(off.any())
    assert not bool(stream[:, off].any())
    assert gates.costs[0] > gates.costs[9]  # two layers' filters, against one's


def test_without_inputs_each_layer_is_on_its_own():
    gates = VRPGE(resnet(), 0.5)
    assert len(gates.groups) == 7  # every layer but the last
    assert gates.skipped == {"9": "it is the last layer (keep_output=True)"}
    everything = VRPGE(nn.Sequential(nn.Linear(4, 6)), 0.5, keep_output=False)
    assert len(everything.probabilities) == 6
    ruled = VRPGE(resnet(), 0.5, rules=[Rule("3.*", forward=Dense()), nn.Conv2d])
    assert [group.name for group in ruled.groups] == ["0", "4.conv1", "4.conv2"]


def test_units():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
    heads = VRPGE(copy.deepcopy(layer), 0.5, "head")
    assert len(heads.probabilities) == 3
    heads.state.gates[0] = torch.tensor([True, False, True])
    heads._show(heads.state.gates)
    mask = heads.masks()["self_attn.in_proj_weight"].view(3, 3, 4, 12)
    assert bool(mask[:, [0, 2]].all())
    assert not bool(mask[:, 1].any())
    hidden = VRPGE(copy.deepcopy(layer), 0.5, "hidden", args=torch.randn(2, 5, 12))
    assert [group.size for group in hidden.groups] == [20]
    blocks = VRPGE(nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 2)), 0.5, "block", block=4)
    assert blocks.groups[0].size == 3
    rows = blocks.masks()["0"].all(1)
    assert bool((rows[:4] == rows[0]).all())
    assert bool((rows[8:] == rows[8]).all())


def test_a_structure_step_leaves_all_but_probabilities():
    model = mlp3()
    gates = VRPGE(model, 0.5, args=rows())
    before = copy.deepcopy(model.state_dict())
    losses = gates.structure_step(lambda: loss_of(model, rows()), draws=3)
    assert losses.shape == (3,)
    assert len(set(losses.tolist())) == 3
    changed = {
        key.rpartition(".")[2]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed <= {"probability", "moments", "counts", "likely", "gates"}
    assert not torch.equal(gates.probabilities, torch.full_like(gates.probabilities, 0.5))
    assert gates.share() <= 0.5 + 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())


def test_probabilities_follow_the_losses():
    """A loss that asks for the first half of the units and punishes the others."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    gates = VRPGE(model, 0.5, lr=0.05)
    want = torch.tensor([1.0] * 4 + [-1.0] * 4)
    for _ in range(120):
        gates.structure_step(lambda: -(want * gates.masks()["0"][:, 0]).sum())
        gates.step()
    assert gates.probabilities[:4].min() > 0.95
    assert gates.probabilities[4:].max() < 0.05


def test_the_budget_follows_its_schedule():
    model = mlp3()
    gates = VRPGE(model, 0.25, args=rows(), budget="parameters", schedule=Cubic(1, 0.25, 10))
    assert gates.share() == 1
    assert bool(gates.state.gates.all())
    shares = []
    for _ in range(10):
        gates.step()
        shares.append(gates.share())
    assert shares == sorted(shares, reverse=True)
    assert abs(shares[-1] - 0.25) < 1e-5
    with pytest.raises(SparsifierError, match=r"schedule\(0\) is 2"):
        VRPGE(mlp3(), schedule=lambda step: 2.0)


def test_eval_is_deterministic_and_freezing_ends_the_draws():
    model = mlp3()
    gates = VRPGE(model, 0.5, args=rows())
    outs = []
    for training in (True, False):
        model.train(training)
        outs.append(model(rows()))
        gates.step()
        assert torch.equal(outs[-1], model(rows())) != training
    model.train()
    chosen = gates.choose(lambda: loss_of(model, rows()), draws=4)
    assert len(chosen.losses) == 4
    assert chosen.loss == min(chosen.losses)
    assert chosen.share == gates.share(gates.state.gates[0])
    assert torch.equal(gates.state.gates[0], gates.state.gates[1])
    assert float(loss_of(model, rows()).detach()) == pytest.approx(chosen.loss, rel=1e-5)
    masks = {name: mask.clone() for name, mask in gates.masks().items()}
    gates.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in gates.masks().items())
    for call in (gates.structure_step, gates.choose):
        with pytest.raises(SparsifierError, match="frozen"):
            call(lambda: loss_of(model, rows()))


def test_squash_leaves_a_plain_model_of_zeros():
    plain, model = mlp3(), mlp3()
    gates = VRPGE(model, 0.5, args=rows())
    compact = gates.compact()
    model.eval()
    expected, kept = model(rows()), gates.state.gates[1].clone()
    assert gates.squash() is model
    assert gates.squash() is model
    assert torch.equal(model(rows()), expected)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model[3].weight.any(1), kept[-9:])
    with pytest.raises(SparsifierError, match="was squashed"):
        compact(rows())


def test_squash_refuses_what_lies_on_a_gate():
    model = mlp3()
    gates = VRPGE(model, 0.5, args=rows())
    nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Identity())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsifierError, match=r"'1\.bias' carries another parametrization"):
        gates.squash()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not gates.frozen


# --- resume, ranks, the compiler


def trained(model: nn.Module, gates: VRPGE, optimizer, first: int, steps: int) -> None:
    compact = gates.compact()
    for i in range(first, first + steps):
        x = rows(5) + i
        optimizer.zero_grad()
        loss_of(compact, x).backward()
        optimizer.step()
        gates.structure_step(lambda x=x: loss_of(compact, x))
        gates.step()


def start(keep: float = 0.5) -> tuple[nn.Module, VRPGE, torch.optim.Optimizer]:
    model = mlp3()
    gates = VRPGE(model, keep, args=rows())
    return model, gates, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def test_resume_is_bitwise(tmp_path):
    model, gates, optimizer = start()
    trained(model, gates, optimizer, 0, 2)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    trained(model, gates, optimizer, 2, 2)
    other, resumed, again = start()
    states = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    torch.randn(3)  # the global generator doesn't matter
    trained(other, resumed, again, 2, 2)
    assert resumed.steps == 4
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    with pytest.raises(SparsifierError, match=r"whole filters 0\.5"):
        start(0.25)[0].load_state_dict(states[0])


def test_losses_are_averaged_over_ranks():
    """A rank that sees other data moves its gates by the average, with the same draws."""
    _model, gates, _ = start()
    other = copy.deepcopy(gates.probabilities)
    group = torch.distributed

    def add(losses: Tensor) -> None:
        losses += torch.tensor([3.0, 1.0])

    with (
        mock.patch.object(group, "is_initialized", return_value=True),
        mock.patch.object(group, "get_world_size", return_value=2),
        mock.patch.object(group, "all_reduce", add),
    ):
        losses = gates.structure_step(lambda: torch.ones(()))
    assert losses.tolist() == [2, 1]
    assert not torch.equal(other, gates.probabilities)
    again = start()[1]
    given = iter([2.0, 1.0])
    again.structure_step(lambda: torch.tensor(next(given)))
    assert torch.equal(again.probabilities, gates.probabilities)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_compiler_recognizes_the_masks(mlp):
    model = mlp()
    gates = VRPGE(model, 0.5, args=torch.randn(2, 16))
    config = sfx.SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    x = torch.randn(3, 16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))
            gates.step()
    assert "stored mask" in str(sfx.explain(compiled))


# --- the weight step on the drawn channels


def test_the_compact_step_is_the_masked_model():
    model = resnet()
    gates = VRPGE(model, 0.5, args=images())
    for buffer in model.buffers():
        if buffer.dtype is torch.float32 and buffer.dim() == 1 and len(buffer) < 20:
            buffer.add_(torch.rand(len(buffer)))
    compact = gates.compact(buckets=4)
    assert compact.whole == {}
    for training in (True, False, True):
        gates.step()
        model.train(training)
        start = copy.deepcopy(model.state_dict())
        small = gradients(model, compact, images())
        after = copy.deepcopy(model.state_dict())
        model.load_state_dict(start)
        assert_close(gradients(model, model, images()), small)
        on = gates.state.gates[0 if training else 1][:9]
        for name in ("running_mean", "running_var"):
            mine, theirs = after[f"1.{name}"], model.state_dict()[f"1.{name}"]
            torch.testing.assert_close(mine[on], theirs[on])
            assert torch.equal(mine[~on], start[f"1.{name}"][~on])
        assert int(after["1.num_batches_tracked"]) == int(model[1].num_batches_tracked)
        assert int(on.sum()) <= compact.sizes[0] <= int(on.sum()) + 3
        macs = compact.macs()
        assert macs.live <= macs.computed < macs.dense
        with FlopCounterMode(display=False) as counter:
            compact(images())
        assert counter.get_total_flops() == 2 * macs.computed
    with FlopCounterMode(display=False) as counter:
        resnet()(images())
    assert counter.get_total_flops() == 2 * macs.dense


def test_compiled_programs_are_few():
    model = mlp3()
    gates = VRPGE(model, 0.5, args=rows())
    compact = gates.compact("aot_eager", buckets=2, programs=2)
    for _ in range(5):
        assert_close(gradients(model, model, rows()), gradients(model, compact, rows()))
        gates.step()
    assert 1 <= len(compact._compiled) <= 3


class Normed(nn.Module):
    """A norm over channels, a sigmoid, and a layer whose channels may go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.second, self.third = nn.Linear(12, 7), nn.Linear(7, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.last(torch.sigmoid(self.third(self.second(x).relu())))


def test_what_can_not_be_left_out_is_computed_whole():
    torch.manual_seed(0)
    model = Normed()
    gates = VRPGE(model, 0.5, args=torch.randn(2, 5))
    compact = gates.compact()
    assert set(compact.whole) == {"first", "third"}
    assert "differs" in compact.whole["third"]
    x = torch.randn(6, 5)
    assert_close(gradients(model, model, x), gradients(model, compact, x))
    assert compact.sizes[0] == 12
    assert compact.sizes[2] == 6
    assert compact.sizes[1] < 7
    heads = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
    gates = VRPGE(heads, 0.5, "head", args=torch.randn(2, 5, 12))
    compact = gates.compact()
    assert "heads" in compact.whole["self_attn.in_proj_weight"]
    x = torch.randn(2, 4, 12)
    assert_close(gradients(heads, heads, x), gradients(heads, compact, x))


def test_sizes_that_code_holds_as_numbers_follow():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8), nn.PReLU(8)),
        *(nn.Conv1d(8, 5, 2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(15, 2)),
    )
    x = torch.randn(2, 3, 10)
    gates = VRPGE(model, 0.5, args=x)
    compact = gates.compact()
    assert compact.whole == {}
    assert_close(gradients(model, model, x), gradients(model, compact, x))
    assert compact.skeleton[2].groups == compact.sizes[0] < 8 == model[2].groups


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep=0 must be in \(0, 1\]"),
        ({"keep": True}, "keep=True"),
        ({"unit": "layer"}, "unit='layer' is not one of 'filter'"),
        ({"budget": "bytes"}, "budget='bytes' is not one of 'count'"),
        ({"budget": "flops"}, "needs args="),
        ({"seed": -1}, "seed=-1"),
        ({"block": 0}, "block=0"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"unit": "head"}, r"VRPGE\(unit='head'\): no layer carries gates"),
        ({"rules": ["nothing"]}, "matches no layer"),
    ],
)
def test_refusals_leave_the_model_alone(mlp, snapshot, options, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=message):
        VRPGE(model, **options)
    before.assert_same()


def test_other_refusals(mlp):
    with pytest.raises(SparsifierError, match=r"model is int; pass an nn\.Module"):
        VRPGE(3)
    gates = VRPGE(mlp(), 0.5)
    with pytest.raises(SparsifierError, match="pass args="):
        gates.compact()
    with pytest.raises(SparsifierError, match="draws=1 must be an int of at least 2"):
        gates.structure_step(lambda: torch.ones(()), draws=1)
    for wrong, message in ((torch.ones(2), r"\(2,\); return the loss"), (1.0, "float; return")):
        with pytest.raises(SparsifierError, match=message):
            gates.structure_step(lambda wrong=wrong: wrong)
    before = copy.deepcopy(gates.model.state_dict())
    with pytest.raises(SparsifierError, match="nan"):
        gates.structure_step(lambda: torch.tensor(float("nan")))
    assert all(torch.equal(v, before[k]) for k, v in gates.model.state_dict().items())
    with pytest.raises(SparsifierError, match="vectors of one length"):
        project(torch.ones(2, 2), 1.0)
    with pytest.raises(SparsifierError, match="K >= 2"):
        policy_gradient(torch.ones(1), torch.ones(1, 3), torch.ones(3))
    for options in ({"buckets": 0}, {"programs": 0}):
        with pytest.raises(SparsifierError, match="=0 must be an int of at least 1"):
            VRPGE(mlp(), 0.5, args=torch.randn(2, 16)).compact(**options)


# --- accuracy


@pytest.mark.slow
def test_digits():
    """A quarter of the hidden units, 12 epochs of gates and 7 of fine-tuning."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
    x, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, y_test = (torch.tensor(part) for part in parts[2:])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
    )
    gates = VRPGE(model, 0.25, "hidden", lr=0.05, args=x[:1], schedule=Cubic(1, 0.25, 160))
    compact, entropy = gates.compact(), nn.functional.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(19):
        if epoch == 12:
            gates.choose(lambda: entropy(model(x), y))
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            entropy(compact(x[batch]), y[batch]).backward()
            optimizer.step()
            if not gates.frozen:
                gates.structure_step(lambda b=batch: entropy(compact(x[b]), y[b]))
                gates.step()
    model.eval()
    assert 100 * (model(x_test).argmax(1) == y_test).float().mean() >= 95.5
    macs = compact.macs()
    assert macs.live <= 0.17 * macs.dense
