"""Accuracy on digits by estimator: 1 to 3 seeds, all layers sampled, the last one too.

Dense reaches 97.8 %. ``python examples/recipes --digits-table`` prints what stands behind the
bounds: every estimator at three ratios.
"""

import statistics

import pytest

from sparsefx import Sampled
from sparsefx.patterns import ESTIMATORS

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def accuracy(kit):
    """Mean accuracy in percent of a pattern, in the forward or in the backward alone."""
    images = kit.images.digits()

    def measure(sampling: str, pattern: Sampled, seeds=(0, 1, 2)) -> float:
        config = kit.digits.config_of(sampling, pattern)
        return statistics.mean(kit.digits.train(images, config, seeds))

    return measure


@pytest.mark.slow
def test_topk_in_the_forward(accuracy):
    assert accuracy("forward", Sampled(0.5)) >= 97.0


@pytest.mark.slow
def test_unbiased_in_the_backward_alone(accuracy):
    assert accuracy("backward", Sampled(0.5, estimator="systematic"), (0, 1)) >= 97.4


@pytest.mark.slow
def test_in_a_forward_noise_is_worse_than_bias_and_the_mean_helps(accuracy):
    """At a tenth: unbiased draws learn nothing, top-k half of it, mean-corrected a little more."""
    topk = accuracy("forward", Sampled(0.1), [0])
    assert accuracy("forward", Sampled(0.1, estimator="systematic"), [0]) < 20 < topk
    assert accuracy("forward", Sampled(0.1, estimator="topk_mean"), [0]) > topk + 3


def test_the_table(kit):
    """One epoch, two of its cells: where each of them stands, and what it says."""
    images, ticks = kit.images.digits(), []
    cells = kit.digits.cells(images, lambda: ticks.append(1), ["topk"], [0.5], epochs=1)
    assert [(c.estimator, c.sampling, c.ratio) for c in cells] == [
        ("topk", "forward", 0.5),
        ("topk", "backward", 0.5),
    ]
    assert ticks == [1, 1]
    assert all(len(cell.accuracies) == 3 for cell in cells)
    config = kit.digits.config_of("forward", Sampled(0.5))
    assert cells[0].accuracies == kit.digits.train(images, config, epochs=1)
    table = kit.digits.table([50.0, 60.0, 70.0], cells)
    assert "dense 60.00 ± 8.16" in table.title
    assert [c.header for c in table.columns] == ["estimator", "forward 0.5", "backward 0.5"]
    assert [next(iter(c.cells)) for c in table.columns] == ["topk", *map(str, cells)]


def test_every_estimator_of_the_table_is_a_pattern(kit):
    patterns = [kit.digits.pattern_of(name, 0.25) for name in kit.digits.ESTIMATORS]
    assert len(set(patterns)) == len(patterns)
    assert {p.estimator for p in patterns} == set(ESTIMATORS)
    assert kit.digits.trainings() == 2 * 3 * len(patterns)
