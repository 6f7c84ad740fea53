"""calibrate(): batches of every form, order, memory; models that stay as they were on errors."""

import copy
import weakref
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsefx.config import NM, Dense, Rule
from sparsefx.errors import SparsifierError
from sparsefx.masks import is_valid
from sparsefx.sparsifiers import AdaPrune, SparseGPT, Wanda

METHODS = [AdaPrune, Wanda, SparseGPT]
every_method = pytest.mark.parametrize("method", METHODS)
both_modes = pytest.mark.parametrize("sequential", [True, False])


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 2, groups=2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def images(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, 6, 6, generator=g) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    for key, value in now.items():
        assert torch.equal(value, before[key]), key
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def assert_sparse(model: nn.Module, n: int = 2, m: int = 4) -> None:
    """Every weight of a layer holds n:m along its reduction axis."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            assert is_valid(module.in_proj_weight, n, m, dim=1), name
        elif isinstance(module, nn.Linear | nn.Conv2d):
            assert is_valid(module.weight, n, m, dim=1), name
        elif type(module).__name__ == "Conv1D":
            assert is_valid(module.weight, n, m, dim=0), name


# --- the life


@both_modes
@every_method
def test_life(method, sequential: bool):
    model = conv_net()
    model(images()[0])
    model.train()
    model[3].eval()
    flags = [module.training for module in model.modules()]
    ids = [id(p) for p in model.parameters()]
    statistics = {k: v for k, v in state(model).items() if k.startswith("1.")}
    sparsifier = method(model, 2, 4, sequential=sequential)
    rows = sparsifier.calibrate(images()).rows
    assert [row.layer for row in rows] == ["0", "4", "6"]
    assert all(row.after <= row.before or method is Wanda for row in rows)
    sparsifier.squash()
    assert [module.training for module in model.modules()] == flags
    assert [id(p) for p in model.parameters()] == ids
    assert {
        k: v for k, v in model.state_dict().items() if k in statistics
    }.keys() == statistics.keys()
    for key, value in statistics.items():
        assert torch.equal(model.state_dict()[key], value)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert_sparse(model)
    assert model.eval()(images()[0]).isfinite().all()


@every_method
def test_fine_tuning_keeps_zeros(method):
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(images()[0]).square().mean().backward()
    optimizer.step()  # momentum of the dense weights, which would move zeros later
    sparsifier = method(model, 2, 4)
    sparsifier.calibrate(images())
    masks = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(images()[1]).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        for name, layer in sparsifier.layers.items():
            assert torch.equal(layer.mask.mask, masks[name])
            assert not layer.weight[~masks[name]].any()
    assert sparsifier.report().steps == 3
    with pytest.raises(SparsifierError, match="was calibrated before"):
        sparsifier.calibrate(images())
    sparsifier.squash()
    assert_sparse(model)
    with pytest.raises(SparsifierError, match="was squashed"):
        sparsifier.calibrate(images())


def test_no_calibration_after_steps():
    sparsifier = Wanda(conv_net())
    sparsifier.step()
    with pytest.raises(SparsifierError, match=r"step\(\) was called 1 times and cleared"):
        sparsifier.calibrate(images())


def test_state_loads_into_a_new_sparsifier():
    model, other = conv_net(), conv_net()
    sparsifier = SparseGPT(model, 2, 4)
    sparsifier.calibrate(images())
    again = SparseGPT(other, 2, 4)
    other.load_state_dict(model.state_dict())
    sparsifier.squash()
    again.squash()
    assert_untouched(other, state(model))


# --- batches


class Named(nn.Module):
    """Takes two inputs, by place or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.right(input=y)


PAIRS = [(torch.randn(5, 8), torch.randn(5, 8)) for _ in range(3)]


@pytest.mark.parametrize(
    ("batches", "forward"),
    [
        pytest.param(PAIRS, None, id="tuples"),
        pytest.param([list(pair) for pair in PAIRS], None, id="lists"),
        pytest.param([{"x": x, "y": y} for x, y in PAIRS], None, id="dicts"),
        pytest.param([UserDict(x=x, y=y) for x, y in PAIRS], None, id="mappings"),
        pytest.param(
            [torch.stack(pair) for pair in PAIRS], lambda m, b: m(b[0], y=b[1]), id="forward"
        ),
        pytest.param(
            DataLoader(TensorDataset(*map(torch.cat, zip(*PAIRS, strict=True))), 5),
            None,
            id="DataLoader",
        ),
    ],
)
def test_forms_of_batches(batches: Any, forward: Any):
    torch.manual_seed(0)
    model, same = Named(), Named()
    same.load_state_dict(model.state_dict())
    AdaPrune(model).calibrate(PAIRS)
    AdaPrune(same).calibrate(batches, forward)
    assert_untouched(same, state(model))


def test_shuffled_batches_stay_paired():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    same = copy.deepcopy(model)
    data = torch.randn(40, 8, dtype=torch.float64)
    AdaPrune(model).calibrate(data.split(8))
    loader = DataLoader(TensorDataset(data), 8, shuffle=True)
    AdaPrune(same).calibrate(loader)
    for ours, theirs in zip(same.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_generator_runs_once():
    model = conv_net()
    sparsifier = AdaPrune(model)
    before = state(model)
    with pytest.raises(SparsifierError, match="batches is a generator, which runs only once"):
        sparsifier.calibrate(x for x in images())
    assert_untouched(model, before)
    alone = AdaPrune(conv_net(), sequential=False)
    assert len(alone.calibrate(x for x in images()).rows) == 3


class Fewer:
    """Batches that get fewer each time."""

    def __init__(self, first: int) -> None:
        self.left = first

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter(images(self.left + 1))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there were 0 calibration batches; pass a list"),
        (Fewer(3), "there were 2 calibration batches, and 3 before"),
        ([*images(2), "text"], "a batch is of type str; give a tensor, a tuple or a mapping"),
    ],
)
def test_batches_that_will_not_do(batches: Any, message: str):
    model = conv_net()
    sparsifier = AdaPrune(model)
    before = state(model)
    with pytest.raises(SparsifierError, match=message):
        sparsifier.calibrate(batches)
    assert_untouched(model, before)


class Pooled(nn.Module):
    """A layer over tokens, and one over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.pooled = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.token(x).tanh() * mask[..., None]
        return self.pooled(hidden.sum(1) / mask.sum(1, keepdim=True))


@both_modes
def test_padding_can_be_left_out(sequential: bool):
    x, mask = torch.randn(6, 5, 8), torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    model, same = Pooled(), Pooled()
    same.load_state_dict(model.state_dict())
    data = [{"x": x[i : i + 2], "mask": mask[i : i + 2]} for i in (0, 2, 4)]
    sparsifier = AdaPrune(model, sequential=sequential)
    rows = sparsifier.calibrate(data, keep=lambda batch: batch["mask"]).rows
    assert [(row.layer, row.inputs) for row in rows] == [("token", 20), ("pooled", 6)]
    for batch in data:
        batch["x"][~batch["mask"]] = 1e6  # changes nothing
    AdaPrune(same, sequential=sequential).calibrate(data, keep=lambda batch: batch["mask"])
    assert_untouched(same, state(model))


@pytest.mark.parametrize(
    ("returned", "message"),
    [(torch.ones(2, 5), "keep returned torch.float32; return a bool"), (None, "returned NoneType")],
)
def test_keep_returns_a_bool_tensor(returned: Any, message: str):
    with pytest.raises(SparsifierError, match=message):
        AdaPrune(nn.Linear(8, 4)).calibrate([torch.randn(2, 5, 8)], keep=lambda batch: returned)


# --- errors half-way


@both_modes
@every_method
def test_a_bad_batch_leaves_everything_as_it_was(method, sequential: bool):
    model = conv_net()
    sparsifier = method(model, 2, 4, sequential=sequential)
    before, flags = state(model), [module.training for module in model.modules()]
    message = "channels" if sequential else "layer '0', batch 2: its input has 45 values for each"
    with pytest.raises((RuntimeError, SparsifierError), match=message):
        sparsifier.calibrate([*images(2), torch.randn(2, 5, 6, 6)])
    assert_untouched(model, before)
    assert [module.training for module in model.modules()] == flags
    sparsifier.calibrate(images())  # and it can still be done


@every_method
def test_an_interrupt_in_the_last_layer_leaves_everything_as_it_was(
    method, monkeypatch: pytest.MonkeyPatch
):
    model = conv_net()
    sparsifier = method(model, 2, 4)
    before, solve = state(model), sparsifier.solve

    def interrupted(layer, *rest):
        if layer.target.name == "6":
            raise KeyboardInterrupt
        return solve(layer, *rest)

    monkeypatch.setattr(sparsifier, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparsifier.calibrate(images())
    assert_untouched(model, before)
    assert sparsifier.calibration is None


@both_modes
def test_nan_in_the_data_names_layer_and_batch(sequential: bool):
    model = conv_net()
    sparsifier = AdaPrune(model, sequential=sequential)
    before, data = state(model), images()
    data[1][0, 0, 0, 0] = float("nan")
    message = "layer '0', batch 1: its input holds NaN or infinity; clean the calibration data"
    with pytest.raises(SparsifierError, match=message):
        sparsifier.calibrate(data)
    assert_untouched(model, before)


def test_a_weight_that_became_infinite_is_named():
    model = conv_net()
    sparsifier = AdaPrune(model)
    with torch.no_grad():
        sparsifier.layers["4"].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(SparsifierError, match="layer '4' holds NaN or infinity in its weight"):
        sparsifier.calibrate(images())


# --- layers that no data reaches


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@both_modes
@every_method
def test_what_no_data_reaches_stays_dense(method, sequential: bool):
    model = Branches()
    weight = model.unused.weight.detach().clone()
    sparsifier = method(model, 2, 4, sequential=sequential)
    sparsifier.calibrate([torch.randn(20, 8)])
    assert sparsifier.skipped == {"unused": "no calibration data reached it"}
    assert list(sparsifier.layers) == ["used"]
    assert torch.equal(model.unused.weight, weight)
    assert isinstance(model.unused.weight, nn.Parameter)
    assert "no calibration data reached it" in str(sparsifier.report())
    sparsifier.step()
    sparsifier.squash()
    assert is_valid(model.used.weight, 2, 4, dim=1)


def test_no_layer_reached_is_an_error():
    model = Branches()
    sparsifier = AdaPrune(model, rules=["unused"])
    before = state(model)
    with pytest.raises(SparsifierError, match="no calibration data reached any layer of: unused"):
        sparsifier.calibrate([torch.randn(20, 8)])
    assert_untouched(model, before)


# --- order and repeated calls


def test_layers_are_solved_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(12, 4), nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    rows = AdaPrune(Backwards()).calibrate([torch.randn(20, 8)]).rows
    assert [row.layer for row in rows] == ["first", "last"]


class Counted(nn.Module):
    """Three layers on one input, then one more; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        q, k, v = self.q(x), self.k(x), self.v(x)
        x.add_(0)  # a change in place: what comes now has another input
        return self.o(x) + q * k * v


@pytest.mark.parametrize(("method", "forwards"), [(AdaPrune, 1 + 1 + 2), (Wanda, 1 + 1 + 1)])
def test_layers_with_one_input_share_its_rounds(method, forwards: int):
    """A survey, one round for q, k and v together, one for o (in both nets where it is paired)."""
    model, data = Counted(), [torch.randn(9, 8) for _ in range(2)]
    sparsifier = method(model)
    rows = sparsifier.calibrate(data).rows
    assert [row.layer for row in rows] == ["q", "k", "v", "o"]
    assert model.count == forwards * len(data)


def test_a_layer_called_twice_is_fitted_to_both_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).relu())

    (row,) = AdaPrune(Twice()).calibrate([torch.randn(10, 8) for _ in range(2)]).rows
    assert row.inputs == 40
    assert row.after < row.before


class Routed(nn.Module):
    """Rows go to the second layer by what the first one says, as in a mixture of experts."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.first(x)[:, 0] > 0
        if self.whole:
            return self.second(x + 0) if bool(chosen.all()) else x
        return self.second(x[chosen])


def test_a_dense_input_that_changes_in_place_later():
    """The model adds to a layer's input behind it, and calls the layer again."""

    class Changing(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.first, self.fc, self.inplace = nn.Linear(8, 8), nn.Linear(8, 8), inplace

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(2):
                y = self.fc(x)
                x = x.add_(y) if self.inplace else x + y
            return x

    model, same = Changing(True), Changing(False)
    same.load_state_dict(model.state_dict())
    data = [torch.randn(20, 8)]
    AdaPrune(model).calibrate(data)
    AdaPrune(same).calibrate(data)
    assert_untouched(same, state(model))


def test_more_calls_in_the_pruned_net_are_an_error():
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x))
            return self.second(y) if bool(self.first(x)[0, 0] < 0) else y

    model = Bounded()
    model.first.weight.data = torch.eye(4)
    model.first.weight.data[0] = torch.tensor([1.0, 1.0, 0.5, 0.5])
    sparsifier = AdaPrune(model, damping=1e9)
    x = torch.tensor([[-1.0, -1.0, 3.0, 3.0]])  # dense: 1; without the halves: -2
    with pytest.raises(SparsifierError, match="layer 'second' ran more often in the pruned net"):
        sparsifier.calibrate([x, torch.ones(1, 4), -torch.ones(1, 4)])


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (False, r"its input is \[\(2, 8\)\] in the pruned net and \[\(3, 8\)\] in the dense one"),
        (True, "layer 'second' ran 1 times less in the pruned net than in the dense one"),
    ],
)
def test_another_route_in_the_pruned_net_is_an_error(whole: bool, message: str):
    model = Routed(whole)
    model.first.weight.data = torch.eye(4, 8)
    model.first.weight.data[0] = torch.tensor([1.0, 1.0, 0.5, 0.5, 0, 0, 0, 0])
    x = torch.randn(3, 8).abs()
    x[0] = torch.tensor([-1.0, -1.0, 3.0, 3.0, 0, 0, 0, 0])  # dense: 1; without the halves: -2
    sparsifier = AdaPrune(model, damping=1e9)  # weights stay at their masked values
    before = state(model)
    with pytest.raises(SparsifierError, match=message + "; pass sequential=False"):
        sparsifier.calibrate([x])
    assert_untouched(model, before)


# --- memory


@both_modes
def test_only_gram_matrices_outlive_a_batch(sequential: bool):
    """No input of any layer is alive when the next batch is made, however many there are."""
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    made = 0

    class Many:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal made
            for _ in range(30):
                alive.append(len({id(ref()) for ref in seen if ref() is not None}))
                seen.clear()
                made += 1
                yield torch.randn(50, 8)

    def forward(net: nn.Module, x: Tensor) -> None:
        for layer in net:
            seen.append(weakref.ref(x))
            x = layer(x)

    AdaPrune(model, sequential=sequential).calibrate(Many(), forward)
    assert made == 30 * (4 if sequential else 1)
    # the driver's loop variable holds the last batch itself, and nothing holds an activation
    assert max(alive) <= 1


# --- precision, rules, compiled models


@both_modes
@every_method
def test_bfloat16(method, sequential: bool):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).bfloat16()
    data = [(torch.randn(40, 6) @ torch.randn(6, 16)).bfloat16() for _ in range(2)]
    rows = method(model, 2, 4, sequential=sequential).calibrate(data).rows
    assert all(row.after < row.before for row in rows) or method is Wanda
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_surroundings_change_nothing_but_the_models_own_numbers():
    """Sums and solutions stay float64 under autocast; tensors of inference mode will do."""
    data = [torch.randn(40, 6) @ torch.randn(6, 16) for _ in range(2)]
    models = [nn.Sequential(nn.Linear(16, 8))]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    AdaPrune(models[0]).calibrate(data)
    with torch.autocast("cpu", torch.bfloat16):
        AdaPrune(models[1]).calibrate(data)
    with torch.inference_mode():
        copies = [x.clone() for x in data]
    AdaPrune(models[2]).calibrate(copies)
    for model in models[1:]:
        assert torch.equal(model[0].weight, models[0][0].weight)


def test_each_layer_has_the_pattern_of_its_rule():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [Rule("0", forward=NM(1, 4)), Rule("1", forward=Dense()), "2"]
    weight = model[1].weight.detach().clone()
    sparsifier = SparseGPT(model, 2, 4, transposable=True, rules=rules)
    rows = sparsifier.calibrate([torch.randn(20, 8)]).rows
    assert [row.layer for row in rows] == ["0", "2"]
    sparsifier.squash()
    assert is_valid(model[0].weight, 1, 4, dim=1)
    assert is_valid(model[2].weight, 2, 4, transposable=True)
    assert torch.equal(model[1].weight, weight)


def test_a_compiled_model_is_not_compiled_again():
    model, count = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal count
        count += 1
        return graph

    sparsifier, x = AdaPrune(model), torch.randn(20, 16)
    compiled = torch.compile(model, backend=backend)
    before = compiled(x)
    sparsifier.calibrate([x])
    after = compiled(x)
    assert count == 1
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(x))


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    sparsifier = AdaPrune(conv_net())
    monkeypatch.setattr("sparsefx.sparsifiers.calibration.is_sharded", lambda w: True)
    with pytest.raises(SparsifierError, match="layer '0' is sharded: calibrate before fully_shard"):
        sparsifier.calibrate(images())


# --- progress


def test_progress_bar_is_drawn_when_asked(capsys: pytest.CaptureFixture[str]):
    Wanda(conv_net()).calibrate(images())
    assert capsys.readouterr().out == ""
    Wanda(conv_net(), progress=True).calibrate(images())
    assert "100%" in capsys.readouterr().out


# --- whole models


def test_transformer_encoder_with_attention():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    data = [torch.randn(3, 6, 16) for _ in range(3)]
    dense = model(data[0]).detach()
    errors = {}
    for method in METHODS:
        net = copy.deepcopy(model)
        sparsifier = method(net, 2, 4)
        plain = float((net(data[0]) - dense).norm().detach())
        rows = sparsifier.calibrate(data).rows
        assert [row.layer.split(".", 2)[2] for row in rows[:4]] == [
            "self_attn.in_proj_weight",
            "self_attn.out_proj",
            "linear1",
            "linear2",
        ]
        assert not sparsifier.skipped
        errors[method] = float((net(data[0]) - dense).norm().detach()) / plain
        sparsifier.squash()
        assert_sparse(net)
    assert max(errors[AdaPrune], errors[SparseGPT]) < min(1, errors[Wanda])


@pytest.fixture
def quiet_transformers() -> Iterator[Any]:
    transformers = pytest.importorskip("transformers")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield transformers
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_hugging_face(family: str, quiet_transformers: Any):
    tf = quiet_transformers
    if family == "gpt2":
        size = tf.GPT2Config(
            n_layer=2,
            n_embd=32,
            n_head=2,
            vocab_size=48,
            n_positions=16,
            bos_token_id=0,  # inside the vocabulary
            eos_token_id=0,
        )
        model = tf.GPT2LMHeadModel(size).eval()
    else:
        size = tf.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=48,
            max_position_embeddings=16,
        )
        model = tf.BertModel(size).eval()
    ids = torch.randint(0, 48, (3, 4, 12))
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    dense = model(**data[0])[0].detach()
    errors = {}
    for method in METHODS:
        net = copy.deepcopy(model)
        sparsifier = method(net, 2, 4)
        plain = float((net(**data[0])[0] - dense).norm().detach())
        rows = sparsifier.calibrate(data).rows
        assert len(rows) == (8 if family == "gpt2" else 13)
        errors[method] = float((net(**data[0])[0] - dense).norm().detach()) / plain
        sparsifier.squash()
        if family == "gpt2":
            assert "tied weights" in sparsifier.skipped["lm_head"]
            net.lm_head = nn.Identity()
        assert_sparse(net)
    assert max(errors[AdaPrune], errors[SparseGPT]) < min(1, errors[Wanda])
