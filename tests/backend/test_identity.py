"""What the compile caches are told of a config's functions."""

import torch
from torch import nn

from sparsefx import NM, Rule, SparseConfig
from sparsefx.backend import cache_identity
from sparsefx.capture import record_graphs


def identity(match):
    config = SparseConfig(rules=[Rule(match, forward=NM(2, 4))])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    (record,) = record_graphs(model, config, (torch.randn(3, 8),), {})
    return cache_identity(record, {})


def wide(site):
    return site.shape[2] > 4


class Chooser:
    """A predicate whose answer depends on what it holds."""

    def __init__(self, layer):
        self.layer = layer

    def chosen(self, site):
        return site.layer == self.layer


def test_two_lambdas_of_one_line_are_two():
    first, second = (lambda s: s.layer == "0"), (lambda s: s.layer == "2")
    assert identity(first) is not None
    assert identity(first) != identity(second)


def test_a_function_is_itself():
    assert identity(wide) is not None
    assert identity(wide) == identity(wide)


def test_default_arguments_count():
    def pick(value):
        return lambda site, layer=value: site.layer == layer

    assert identity(pick("0")) == identity(pick("0"))
    assert identity(pick("0")) != identity(pick("2"))


def test_what_holds_state_keeps_the_caches_out():
    layer = "0"
    assert identity(Chooser("0").chosen) is None
    assert identity(lambda site: site.layer == layer) is None
