"""tangent_report: features by hand and under masks, stationary networks, every refusal."""

import copy
import json
import math
import re
import runpy

import pytest
import torch
from torch import nn

import sparsefx as sfx
from sparsefx.diagnostics import TangentReport, tangent_report
from sparsefx.errors import DiagnosticsError, SparsifierError
from sparsefx.masks import nm_mask
from sparsefx.sparsifiers import DST, SRSTE

HEAD = "2.*"


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1)).double()


def stationary(model, x, seed, noise=1.0):
    """Targets for which a model as it is makes the squared loss stationary: f + Ker(J^T)."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    J = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, x).squeeze(1))(weights)
    J = torch.cat([part.flatten(1) for part in J.values()], 1)
    left, _, _ = torch.linalg.svd(J)  # [samples, samples]
    r = noise * torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).double()
    rest = left[:, torch.linalg.matrix_rank(J) :]
    return model(x).detach().squeeze(1) + rest @ (rest.T @ r)


# --- what it measures


def test_features_are_those_of_a_network_written_by_hand():
    model, x = net(width=3), torch.randn(5, 8).double()
    hidden = torch.tanh(model[0](x))  # [5, 3]
    inner = (1 - hidden**2) * model[2].weight  # d f / d (what goes into the tanh)
    with torch.no_grad():
        K = (inner @ inner.T) * (x @ x.T + 1) + hidden @ hidden.T + 1
    found = tangent_report(model, x)
    torch.testing.assert_close(found.kernel, K)
    assert [(row.parameter, row.active, row.size) for row in found.rows] == [
        ("0.weight", 24, 24),
        ("0.bias", 3, 3),
        ("2.weight", 3, 3),
        ("2.bias", 1, 1),
    ]
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.rows[3].share == pytest.approx(5 / K.trace().item())
    assert (found.samples, found.active, found.rank) == (5, 31, 5)
    assert found.distance is found.stationarity is found.drift is found.initial_kernel is None
    head = tangent_report(model, x, parameters=HEAD)  # the kernel of the last layer's features
    torch.testing.assert_close(head.kernel, (hidden @ hidden.T + 1).detach())


def test_a_stationary_network_is_regression_with_its_kernel():
    """Targets are made for it, so that J^T r is 0 to rounding."""
    x = torch.randn(120, 8, generator=torch.Generator().manual_seed(0)).double()
    model, start = net(1), net(2)
    found = tangent_report(model, x, stationary(model, x, 3), start)
    assert found.stationarity <= 1e-12
    assert found.distance <= 1e-9
    assert found.initial_distance >= 0.5
    assert found.residual > 0.1
    assert 0 < found.drift <= math.sqrt(2)
    moved = tangent_report(model, x, model(x).detach() + 1, start)
    assert moved.stationarity > 1e-3  # its bias would move


def trained(masked, seed):
    """L-BFGS on a noisy teacher's targets, from near it; masks hold weights at 0 throughout."""
    generator = torch.Generator().manual_seed(seed)
    x, noise, *shifts = (
        torch.randn(shape, generator=generator).double()
        for shape in ((200, 8), (200,), (8, 8), (8,), (1, 8), (1,))
    )
    model = net(seed)
    mask = nm_mask(model[0].weight.detach(), 2, 4, dim=1) if masked else torch.ones(8, 8).bool()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 8, generator=generator) / 2 * mask)
        model[2].weight.copy_(torch.randn(1, 8, generator=generator))
        y = model(x).squeeze(1)
        y += y.std() * noise
        for p, shift in zip(model.parameters(), shifts, strict=True):
            p.add_(0.3 * shift)
        model[0].weight.mul_(mask)
    model[0].weight.register_hook(lambda grad: grad * mask)
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=800, tolerance_grad=1e-10, tolerance_change=0,
        history_size=100, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss():
        optimizer.zero_grad()
        found = (model(x).squeeze(1) - y).square().mean()
        found.backward()
        return found

    optimizer.step(loss)
    given = {"0": mask} if masked else None
    return [tangent_report(model, x, y, start, given, parameters=glob) for glob in ("*", HEAD)]


@pytest.mark.parametrize(("masked", "seed"), [(False, 12), (True, 7)])
def test_a_trained_network_is_regression_with_the_kernel_it_learned(masked, seed):
    whole, head = trained(masked, seed)
    assert whole.stationarity <= 1e-6
    assert head.distance <= 2e-2
    assert head.initial_distance >= 0.5
    assert whole.distance <= 0.1  # what J^T r is left with counts for more by small singular values
    assert whole.initial_distance >= 0.4
    assert whole.rows[0].active == (32 if masked else 64)
    assert head.drift > 0.1


# --- masks


def test_masks_of_sparsifiers_are_seen_and_models_stay():
    x = torch.randn(20, 8).double()
    plain, masked = net(), net()
    SRSTE(masked, 2, 4, rules=["0"])
    before = copy.deepcopy(masked.state_dict())
    y, start = torch.randn(20, 1).double(), net(5)
    seen = tangent_report(masked, x, y, start)
    mask = nm_mask(plain[0].weight.detach(), 2, 4, dim=1)
    with torch.no_grad():
        plain[0].weight.copy_(torch.where(mask, plain[0].weight, 0))
    for key in ("0", "0.weight"):
        given = tangent_report(plain, x, y, masks={key: mask})
        torch.testing.assert_close(given.kernel, seen.kernel, rtol=0, atol=1e-12)
        assert given.distance == pytest.approx(seen.distance)
    dense = tangent_report(plain, x, y)
    assert [(row.active, row.size) for row in seen.rows if row.parameter == "0.weight"] == [
        (32, 64)
    ]
    assert dense.active - seen.active == 32
    assert seen.drift_from(dense) > 0
    assert seen.drift_from(given) < 1e-12
    assert seen.initial_kernel is not None
    assert masked.training
    assert all(torch.equal(before[name], value) for name, value in masked.state_dict().items())
    assert masked(x).shape == (20, 1)  # what torch put on its class is still there
    assert seen == tangent_report(masked, x, y, start)


def test_an_estimator_does_not_reach_the_features():
    """A trainable threshold gives its weight another gradient: here it isn't asked."""
    model = net()
    sparsifier = DST(model, rules=["0"])
    with torch.no_grad():
        sparsifier.thresholds()["0"].fill_(0.1)
    sparsifier.step()
    x = torch.randn(12, 8).double()
    seen = tangent_report(model, x)
    mask = sparsifier.masks()["0"].clone()
    assert 0 < mask.count_nonzero() < 64
    plain = sparsifier.squash()
    given = tangent_report(plain, x, masks={"0": mask})
    torch.testing.assert_close(seen.kernel, given.kernel)
    assert {row.parameter for row in seen.rows} == {row.parameter for row in given.rows}


def test_an_earlier_state_is_the_start():
    model, x = net(), torch.randn(9, 8).double()
    SRSTE(model, 2, 4, rules=["0"])
    start, kernel = copy.deepcopy(model.state_dict()), tangent_report(model, x).kernel
    with torch.no_grad():
        model[2].weight.add_(1)
    found = tangent_report(model, x, initial=start)
    torch.testing.assert_close(found.initial_kernel, kernel)
    assert found.drift > 0
    assert found.distance is None
    again = tangent_report(model, x, initial=model.state_dict())
    assert again.drift == 0


# --- shapes


class Tokens(nn.Module):
    """Convolution, norm, dropout, attention; inputs by name; two outputs a sample."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, signal, scale):
        x = self.norm(self.conv(signal)).transpose(1, 2)  # [batch, 5, 8]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.drop(x).mean(1)) * scale


def test_outputs_are_picked_and_chunks_join(monkeypatch):
    torch.manual_seed(0)
    model, batch = Tokens(), {"signal": torch.randn(7, 3, 7), "scale": torch.randn(7, 1)}
    y = torch.randn(7, 2)
    first, last = (tangent_report(model, batch, y, output=i) for i in (0, -1))
    total = tangent_report(model, batch, y, output="sum")
    assert first.rows[0].parameter == "conv.weight"
    assert first.active == sum(p.numel() for p in model.parameters())
    bias = model.out.bias
    torch.testing.assert_close(  # of the head alone, the two columns' kernels add up
        tangent_report(model, batch, output="sum", parameters="out.*").kernel,
        sum(tangent_report(model, batch, output=i, parameters="out.*").kernel for i in (0, 1)),
    )
    assert total.residual != first.residual != last.residual
    monkeypatch.setattr("sparsefx.diagnostics.features.CHUNK", 1)
    torch.testing.assert_close(
        tangent_report(model, batch, y, output="sum").kernel, total.kernel, rtol=1e-4, atol=1e-4
    )
    bias.requires_grad_(False)
    assert tangent_report(model, batch, output=0, parameters=["out.*"]).active == 16
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_a_compiled_model_and_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    compiled = torch.compile(model, backend="sparsefx", options={"codegen": "aot_eager"})
    x = torch.randn(9, 4)
    found = tangent_report(compiled, x, torch.randn(9), initial=compiled)
    assert found.kernel.dtype is torch.float64
    assert found.drift == 0
    assert found.distance == found.initial_distance
    assert tangent_report(compiled, x, cutoff=0.5).rank < found.rank


def test_plain_data_and_text():
    x = torch.randn(6, 8).double()
    found = tangent_report(net(), x, torch.randn(6).double(), net(1))
    assert isinstance(found, TangentReport)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["rows"][0] == {
        "parameter": "0.weight", "active": 64, "size": 64, "share": found.rows[0].share,
    }  # fmt: skip
    assert (data["samples"], data["active"], data["drift"]) == (6, 81, found.drift)
    assert "kernel" not in data
    text = str(found)
    assert "regression with its kernels, 6 samples" in text
    for word in ("final K_T", "initial K_0", "stationarity: ", "drift of the kernel: ", "2.bias"):
        assert word in text
    bare = str(tangent_report(net(), x))
    assert "K_0" not in bare
    assert "stationarity" not in bare


# --- refusals

X = torch.randn(6, 8).double()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tangent_report(nn.Linear(8, 3).double(), X), "output=None: pass output='sum'"),
        (lambda: tangent_report(nn.Linear(8, 3).double(), X, output=3), "output=3: pass"),
        (lambda: tangent_report(net(), X * math.nan), r"x \[6, 8\] holds 48 NaN"),
        (lambda: tangent_report(net(), X, X[:, 0] / 0), r"y \[6\] holds 6 NaN or infinite"),
        (lambda: tangent_report(net(), X, torch.zeros(6, dtype=int)), "y is torch.int64; pass"),
        (lambda: tangent_report(net(), X, X[:4, 0]), r"y has shape \[4\], x has 6 samples"),
        (lambda: tangent_report(net(), X, X), r"y has shape \[6, 8\], several numbers"),
        (lambda: tangent_report(net(), 3), "x must be tensors"),
        (lambda: tangent_report(net(), (X, X[:2])), r"x has \[2, 6\] samples"),
        (lambda: tangent_report(net(), X[:0]), r"x has \[0\] samples"),
        (lambda: tangent_report(net, X), "must be a torch.nn.Module"),
        (lambda: tangent_report(net().requires_grad_(False), X), "requires a gradient"),
        (lambda: tangent_report(net(), X, parameters="3.*"), r"\['3.\*'\] match none of: 0.weight"),
        (lambda: tangent_report(net(), X, masks={"9": X > 0}), "'9' is no layer or parameter"),
        (lambda: tangent_report(net(), X, masks={"0": X > 0}), r"pass torch.bool \[8, 8\]"),
        (lambda: tangent_report(net(), X, masks={"0": 1}), "masks: '0.weight' is 1; pass"),
        (lambda: tangent_report(net(), X, initial=3), "initial is int: pass a module"),
        (lambda: tangent_report(net(), X, initial={"0.weight": X}), "initial doesn't fit"),
        (
            lambda: tangent_report(net(), X, memory=1e-6),
            "6 samples and 81 active parameters take about 1.17e-05 GiB, over memory=1e-06",
        ),
        (
            lambda: tangent_report(
                net(), X, masks={"2": torch.zeros(1, 8, dtype=bool)}, parameters="2.weight"
            ),
            "every mask of the chosen parameters is empty",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(DiagnosticsError, match=message):
        make()


def test_refusals_that_need_a_model():
    model = net()
    with torch.no_grad():
        model[2].bias.fill_(math.inf)
    with pytest.raises(DiagnosticsError, match="outputs hold NaN or infinity"):
        tangent_report(model, X)
    root = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0), Root()).double()
    with pytest.raises(DiagnosticsError, match="derivatives hold NaN"):
        tangent_report(root, torch.zeros(2, 8).double())
    masked = net()
    SRSTE(masked, 2, 4, rules=["0"])
    with pytest.raises(DiagnosticsError, match=r"'0\.weight' carries a mask already"):
        tangent_report(masked, X, masks={"0": torch.ones(8, 8, dtype=torch.bool)})
    with pytest.raises(SparsifierError):  # a dense state under masks
        tangent_report(masked, X, initial=net().state_dict())
    with pytest.raises(DiagnosticsError, match="6 and 4 samples: make both with the same x"):
        tangent_report(net(), X).drift_from(tangent_report(net(), X[:4]))


class Root(nn.Module):
    """sqrt has no derivative at 0: 0 * infinity."""

    def forward(self, x):
        return (x * 0).abs().sqrt()


def test_the_example_says_what_it_promises(root, monkeypatch, capsys):
    """Run here and not in a process of its own, whose imports would take longer than it does."""
    example = str(root / "examples" / "06_tangent_kernels.py")
    monkeypatch.setattr("sys.argv", [example, "--steps", "30"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(example, run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert said.count("final K_T") == 2
    assert re.search(r"0\.weight +32 +64 ", said)
    assert "drift of the dense and the 2:4 network's kernels from each other: " in said


def test_it_is_public():
    assert sfx.diagnostics.tangent_report is tangent_report
