"""Batch norm statistics: the averages over the batches, and everything else as it was."""

import pytest
import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers import recalibrate_batchnorm


def net(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, **options),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def batches(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5 + i, 3, 6, 6, generator=g) + i for i in range(count)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_averages_over_batches(momentum: float | None):
    model = net(momentum=momentum)
    model(batches()[0])  # statistics and a count of their own
    data = batches()
    with torch.no_grad():
        outputs = [model[0](x).double().movedim(1, 0).flatten(1) for x in data]
    count = int(model[1].num_batches_tracked)
    assert recalibrate_batchnorm(model, data) == 1
    mean = torch.stack([y.mean(1) for y in outputs]).mean(0)
    var = torch.stack([y.var(1) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert model[1].momentum == momentum
    assert int(model[1].num_batches_tracked) == count == 1


def test_layers_behind_see_batches_normalised_by_their_own_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = [torch.randn(20, 4) * 3 + 1 for _ in range(2)]
    recalibrate_batchnorm(model, data)
    with torch.no_grad():
        hidden = [model[1](nn.functional.batch_norm(x, None, None, training=True)) for x in data]
    torch.testing.assert_close(model[2].running_mean, sum(h.mean(0) for h in hidden) / 2)


def test_flags_gradients_and_dropout_stay():
    model = net()
    model.train()
    model[4].eval()
    flags = [module.training for module in model.modules()]
    recalibrate_batchnorm(model, batches())
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].running_mean.grad_fn is None


def test_a_generator_and_a_forward_of_ones_own():
    model, same = net(), net()
    same.load_state_dict(model.state_dict())
    pairs = ((x, 0) for x in batches())
    recalibrate_batchnorm(model, pairs, forward=lambda m, batch: m(batch[0]))
    recalibrate_batchnorm(same, batches())
    torch.testing.assert_close(model[1].running_var, same[1].running_var)


def test_what_no_batch_reaches_stays():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4)})
    model["unused"].running_mean.fill_(7)
    data = [torch.randn(8, 4) + 2]
    assert recalibrate_batchnorm(model, data, forward=lambda m, x: m["used"](x)) == 1
    assert model["unused"].running_mean.eq(7).all()
    torch.testing.assert_close(model["used"].running_mean, data[0].mean(0))


@pytest.mark.parametrize("bad", ["shape", "nan", "empty"])
def test_errors_leave_everything_as_it_was(bad: str):
    model = net()
    model(batches()[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = batches()
    if bad == "shape":
        data[2] = torch.randn(2, 4, 6, 6)
        with pytest.raises(RuntimeError, match="channels"):
            recalibrate_batchnorm(model, data)
    elif bad == "nan":
        data[1][0] = float("nan")
        with pytest.raises(SparsifierError, match="batch norm '1': the new statistics hold NaN"):
            recalibrate_batchnorm(model, data)
    else:
        with pytest.raises(SparsifierError, match="there were 0 calibration batches"):
            recalibrate_batchnorm(model, [])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model[1].momentum == 0.1
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_nothing_to_recalibrate(model: nn.Module):
    with pytest.raises(SparsifierError, match="no batch norm with running statistics"):
        recalibrate_batchnorm(model, [torch.randn(3, 2)])
