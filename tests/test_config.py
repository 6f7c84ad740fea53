"""What a config refuses and how it says so; that it survives plain dicts; what the presets are."""

import contextlib
import dataclasses
import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given
from torch import nn

from sparsefx.config import (
    NM,
    PRESETS,
    Dense,
    Masked,
    Rule,
    Sampled,
    SparseConfig,
    as_config,
    is_convolution,
    preset,
    reads_input,
)
from sparsefx.errors import ConfigError, SparsefxError
from sparsefx.patterns import MAX_M


def is_forward(site):
    return site.role == "forward"


def first_pass(gm):
    raise NotImplementedError


def refuses(message):
    return pytest.raises(ConfigError, match=f"^{re.escape(message)}$")


# --- patterns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2.0, "m": 4}, "NM: n=2.0 must be an int, got float"),
        ({"n": True, "m": 4}, "NM: n=True must be an int, got bool"),
        ({"n": 2, "m": "4"}, "NM: m='4' must be an int, got str"),
        ({"n": 1, "m": 1}, "NM: m=1 must be between 2 and 32"),
        ({"n": 1, "m": 33}, "NM: m=33 must be between 2 and 32"),
        ({"n": 0, "m": 4}, "NM: n=0 must be between 1 and m-1=3 (n is the number KEPT)"),
        ({"n": 4, "m": 4}, "NM: n=4 must be between 1 and m-1=3 (n is the number KEPT)"),
        ({"n": 2, "m": 4, "transposable": 1}, "NM: transposable=1 must be True or False"),
        (
            {"n": 2, "m": 4, "weight_grad": "straight"},
            "NM: weight_grad='straight' is not one of 'dense', 'masked'",
        ),
        (
            {"n": 2, "m": 4, "weight_grad": None},
            "NM: weight_grad=None is not one of 'dense', 'masked'",
        ),
        ({"n": 2, "m": 4, "decay": -1e-4}, "NM: decay=-0.0001 must be >= 0"),
        ({"n": 2, "m": 4, "decay": "a"}, "NM: decay='a' must be a number, got str"),
        ({"n": 2, "m": 4, "decay": float("nan")}, "NM: decay=nan must be finite"),
        ({"n": 2, "m": 4, "decay": float("inf")}, "NM: decay=inf must be finite"),
    ],
)
def test_what_nm_refuses(arguments, message):
    with refuses(message):
        NM(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "Sampled: ratio=0 must be in (0, 1]"),
        ({"ratio": 1.5}, "Sampled: ratio=1.5 must be in (0, 1]"),
        ({"ratio": -0.1}, "Sampled: ratio=-0.1 must be in (0, 1]"),
        ({"ratio": "0.3"}, "Sampled: ratio='0.3' must be a number, got str"),
        ({"ratio": True}, "Sampled: ratio=True must be a number, got bool"),
        ({"ratio": float("nan")}, "Sampled: ratio=nan must be finite"),
        ({"ratio": 0.3, "min_k": 0}, "Sampled: min_k=0 must be at least 1"),
        ({"ratio": 0.3, "min_k": 1.0}, "Sampled: min_k=1.0 must be an int, got float"),
        (
            {"ratio": 0.3, "estimator": "best"},
            "Sampled: estimator='best' is not one of 'topk', 'topk_mean', 'systematic', "
            "'bernoulli', 'with_replacement'",
        ),
        (
            {"ratio": 0.3, "scores": "norm"},
            "Sampled: scores='norm' is not one of 'product', 'weight', 'input', 'estimated', "
            "'uniform'",
        ),
        ({"ratio": 0.3, "inference": "yes"}, "Sampled: inference='yes' must be True or False"),
        ({"ratio": 0.3, "shared": 1}, "Sampled: shared=1 must be True or False"),
        ({}, "Sampled: ratio=None and mass=None: give one of them"),
        ({"mass": 0.0}, "Sampled: mass=0.0 must be in (0, 1]"),
        ({"mass": 1.1, "ratio": 0.5}, "Sampled: mass=1.1 must be in (0, 1]"),
        ({"mass": "0.9"}, "Sampled: mass='0.9' must be a number, got str"),
        (
            {"mass": 0.9, "estimator": "bernoulli"},
            "Sampled: mass=0.9 goes with estimator='topk' alone, not with estimator='bernoulli'; "
            "give a ratio",
        ),
        (
            {"ratio": 0.5, "estimator": "topk_mean", "scores": "uniform"},
            "Sampled: scores='uniform' tells no pair from another, so estimator='topk_mean' "
            "can't rank by deviation; use another of either",
        ),
    ],
)
def test_what_sampled_refuses(arguments, message):
    with refuses(message):
        Sampled(**arguments)


def test_a_number_that_no_float_holds_is_not_finite():
    with pytest.raises(ConfigError, match=r"^Sampled: ratio=1000.* must be finite$"):
        Sampled(10**400)


@pytest.mark.parametrize(
    ("ratio", "min_k", "depth", "k"),
    [
        (0.3, 1, 10, 3),
        (0.3, 1, 9, 2),
        (0.3, 1, 3, 1),
        (0.3, 16, 10, 10),
        (0.3, 16, 100, 30),
        (1, 1, 7, 7),
        (0.5, 1, 0, 0),
        (0.5, 1, 1, 1),
    ],
)
def test_k(ratio, min_k, depth, k):
    assert Sampled(ratio, min_k=min_k).k(depth) == k


@pytest.mark.parametrize(
    ("mass", "ratio", "min_k", "depth", "k"),
    [(0.9, None, 1, 10, 9), (0.5, None, 1, 3, 2), (0.1, None, 4, 10, 4), (1, None, 1, 7, 7),
     (0.9, 0.5, 1, 10, 5), (0.2, 0.5, 1, 10, 5), (0.9, None, 1, 0, 0)],
)  # fmt: skip
def test_most_pairs_of_a_mass(mass, ratio, min_k, depth, k):
    pattern = Sampled(ratio, min_k=min_k, mass=mass)
    assert pattern.k(depth) == pattern.size(depth) == k


@given(ratio=st.floats(0, 1, exclude_min=True), depth=st.integers(0, 10**6))
def test_bernoulli_has_room_for_three_deviations(ratio, depth):
    pattern = Sampled(ratio, estimator="bernoulli")
    k, size = pattern.k(depth), pattern.size(depth)
    assert size == depth or size >= k + 3 * k**0.5
    assert Sampled(ratio, estimator="systematic").size(depth) == k
    assert Sampled(ratio, estimator="topk_mean").size(depth) == min(depth, k + 1)
    assert size <= depth


@given(ratio=st.floats(0, 1, exclude_min=True), min_k=st.integers(1, 9), depth=st.integers(0, 99))
def test_any_k_is_possible(ratio, min_k, depth):
    k = Sampled(ratio, min_k=min_k).k(depth)
    assert min(depth, min_k) <= k <= depth
    assert k >= int(ratio * depth)


# --- rules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"match": ""},
            "Rule: match='' must be a glob on layer names, a module type or a predicate on a site",
        ),
        (
            {"match": 3},
            "Rule: match=3 must be a glob on layer names, a module type or a predicate on a site",
        ),
        (
            {"match": "*", "forward": None},
            "Rule: forward=None must be Dense(), NM, Sampled or Masked()",
        ),
        (
            {"match": "*", "forward": "2:4"},
            "Rule: forward='2:4' must be Dense(), NM, Sampled or Masked()",
        ),
        (
            {"match": "*", "grad_input": 0.3},
            "Rule: grad_input=0.3 must be None, Dense(), NM or Sampled",
        ),
        (
            {"match": "*", "grad_input": Masked()},
            "Rule: grad_input=Masked() must be None, Dense(), NM or Sampled: None follows the "
            "forward's mask",
        ),
        (
            {"match": "*", "grad_weight": NM},
            f"Rule: grad_weight={NM!r} must be None, Dense(), NM or Sampled",
        ),
        (
            {"match": "*", "grad_weight": NM(2, 4)},
            f"Rule: grad_weight={NM(2, 4)!r}: neither operand of that product is a weight; use "
            "None, Dense() or Sampled (NM(weight_grad='masked') masks the result)",
        ),
        (
            {"match": "*", "grad_input": NM(2, 4, decay=1e-4)},
            f"Rule: grad_input={NM(2, 4, decay=1e-4)!r}: weight_grad and decay belong to the "
            "forward's pattern",
        ),
        (
            {"match": "*", "grad_input": NM(2, 4, weight_grad="masked")},
            f"Rule: grad_input={NM(2, 4, weight_grad='masked')!r}: weight_grad and decay belong "
            "to the forward's pattern",
        ),
    ],
)
def test_what_a_rule_refuses(arguments, message):
    with refuses(message):
        Rule(**arguments)


# --- the config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rules": Rule("*")},
            f"SparseConfig: rules={Rule('*')!r} must be None or a list of Rule",
        ),
        ({"rules": "2:4"}, "SparseConfig: rules='2:4' must be None or a list of Rule"),
        ({"rules": [NM(2, 4)]}, f"SparseConfig: rules holds {NM(2, 4)!r}, which is not a Rule"),
        (
            {"keep_output_dense": None},
            "SparseConfig: keep_output_dense=None must be True or False",
        ),
        ({"strict": 0}, "SparseConfig: strict=0 must be True or False"),
        ({"freeze": 1}, "SparseConfig: freeze=1 must be True or False"),
        ({"verify": "on"}, "SparseConfig: verify='on' must be True or False"),
        ({"select": "some"}, "SparseConfig: select='some' is not one of 'all', 'profitable'"),
        (
            {"codegen": "eager"},
            "SparseConfig: codegen='eager' is not one of 'inductor', 'aot_eager'",
        ),
        ({"passes": len}, f"SparseConfig: passes={len!r} must be a list of functions"),
        ({"passes": [3]}, "SparseConfig: passes=[3] must be a list of functions"),
    ],
)
def test_what_a_config_refuses(arguments, message):
    with refuses(message):
        SparseConfig(**arguments)


def test_errors_are_ours_and_values_are_frozen():
    assert issubclass(ConfigError, SparsefxError)
    assert issubclass(ConfigError, ValueError)
    for thing in (Dense(), NM(2, 4), Sampled(0.3), Rule("*"), SparseConfig()):
        for field in dataclasses.fields(thing):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, field.name, 1)


def test_defaults():
    config = SparseConfig()
    assert config.effective_rules() == (Rule("*", forward=NM(2, 4, transposable=True)),)
    assert (config.keep_output_dense, config.select, config.strict) == (True, "all", False)
    assert (config.codegen, config.verify, config.passes) == ("inductor", False, ())
    assert SparseConfig(rules=[]).effective_rules() == ()


def test_values_compare_and_hash():
    rules = [Rule("a*", forward=NM(2, 4)), Rule(nn.Linear, grad_input=Sampled(0.3))]
    one, same = SparseConfig(rules=rules), SparseConfig(rules=tuple(rules))
    assert one == same
    assert len({one, same, SparseConfig()}) == 2
    assert NM(2, 4) != NM(2, 4, transposable=True)
    assert Sampled(1) == Sampled(1.0)
    assert repr(Sampled(1)) == repr(Sampled(1.0))  # caches tell configs apart by it
    assert repr(NM(2, 4, decay=0)) == repr(NM(2, 4))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Dense(), "dense"),
        (NM(2, 4), "2:4"),
        (NM(4, 8, transposable=True), "4:8 transposable"),
        (Sampled(0.3), "sampled 0.3"),
        (Sampled(0.25, scores="weight"), "sampled 0.25 by weight"),
        (Sampled(0.25, estimator="topk_mean"), "sampled 0.25 topk mean"),
        (Sampled(0.25, estimator="systematic", scores="input"), "sampled 0.25 systematic by input"),
        (
            Sampled(0.25, estimator="bernoulli", scores="estimated"),
            "sampled 0.25 bernoulli by estimate",
        ),
        (
            Sampled(1, estimator="with_replacement", scores="uniform"),
            "sampled 1 with replacement uniformly",
        ),
        (Sampled(mass=0.9), "sampled mass 0.9"),
        (Sampled(0.5, mass=0.9), "sampled mass 0.9 up to 0.5"),
    ],
)
def test_patterns_as_text(pattern, text):
    assert str(pattern) == text


# --- presets


def test_presets():
    unbiased = Sampled(0.3, estimator="systematic")
    by_input = dataclasses.replace(unbiased, scores="input")
    published = Sampled(0.5, min_k=10)
    everywhere = {name: config.effective_rules() for name, config in PRESETS.items()}
    assert everywhere == {
        "2:4": (Rule("*", NM(2, 4)),),
        "2:4-transposable": (Rule("*", NM(2, 4, transposable=True)),),
        "4:8-transposable": (Rule("*", NM(4, 8, transposable=True)),),
        "sampled-0.3": (Rule("*", Sampled(0.3)),),
        "sampled-backward-0.3": (Rule("*", Dense(), unbiased, unbiased),),
        "sampled-memory-0.3": (Rule("*", grad_weight=by_input),),
        "black-box-0.3": (Rule("*", Sampled(0.3), Dense(), Dense()),),
        "all-three": (Rule("*", NM(2, 4, transposable=True), None, unbiased),),
        "adelman-mlp": (Rule(reads_input), Rule("*", published)),
        "adelman-cnn": (Rule("*", published),),
        "adelman-resnet": (Rule(reads_input), Rule(is_convolution, published)),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_round_trips(name):
    assert preset(name) is as_config(name) is PRESETS[name]
    assert SparseConfig.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == preset(name)


def test_an_unknown_preset_lists_those_there_are():
    with refuses(f"'4:2' is not a preset; there are: {', '.join(PRESETS)}"):
        as_config("4:2")


def test_what_counts_as_a_config():
    assert as_config(None) == SparseConfig()
    config = SparseConfig(strict=True)
    assert as_config(config) is config
    assert as_config({"strict": True}) == config
    with refuses(
        f"config=3 must be a SparseConfig, a preset's name ({', '.join(PRESETS)}) or a dict"
    ):
        as_config(3)


# --- plain dicts

ratios = st.floats(0, 1, exclude_min=True)
decays = st.floats(0, 1)
sampled = st.builds(
    Sampled,
    ratios,
    min_k=st.integers(1, 99),
    scores=st.sampled_from(["product", "weight"]),
    inference=st.booleans(),
)


@st.composite
def n_of_m(draw, **options):
    m = draw(st.integers(2, MAX_M))
    values = {key: draw(values) for key, values in options.items()}
    return NM(draw(st.integers(1, m - 1)), m, transposable=draw(st.booleans()), **values)


forwards = n_of_m(weight_grad=st.sampled_from(["dense", "masked"]), decay=decays)
dense = st.just(Dense())
globs = st.text(min_size=1, max_size=8)
rules = st.builds(
    Rule,
    st.one_of(globs, st.sampled_from([nn.Linear, nn.Conv2d, is_forward])),
    forward=st.one_of(dense, forwards, sampled, st.just(Masked())),
    grad_input=st.one_of(st.none(), dense, n_of_m(), sampled),
    grad_weight=st.one_of(st.none(), dense, sampled),
)
configs = st.builds(
    SparseConfig,
    rules=st.one_of(st.none(), st.lists(rules, max_size=3)),
    keep_output_dense=st.booleans(),
    select=st.sampled_from(["all", "profitable"]),
    strict=st.booleans(),
    codegen=st.sampled_from(["inductor", "aot_eager"]),
    verify=st.booleans(),
    passes=st.sampled_from([(), (first_pass,)]),
    freeze=st.booleans(),
)


@given(config=configs)
def test_any_config_survives_json(config):
    text = json.dumps(config.to_dict())
    again = SparseConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert json.dumps(again.to_dict()) == text


@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["rules", "match", "forward", "kind", "nm", "n", "m", "passes"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    )
)
def test_any_nonsense_is_a_config_error_or_a_config(data):
    for value in (data, {"rules": [{"match": "*", "forward": data}]}, {"rules": [data]}):
        with contextlib.suppress(ConfigError):  # any other error fails the test
            assert isinstance(as_config(value), SparseConfig)


def test_plain_data():
    config = SparseConfig(
        rules=[Rule("fc*", forward=NM(2, 4)), Rule(nn.Linear), Rule(is_forward)],
        passes=[first_pass],
    )
    here = __name__
    assert config.to_dict() == {
        "keep_output_dense": True,
        "select": "all",
        "strict": False,
        "codegen": "inductor",
        "verify": False,
        "freeze": False,
        "rules": [
            {
                "match": "fc*",
                "forward": {
                    "kind": "nm", "n": 2, "m": 4, "transposable": False,
                    "weight_grad": "dense", "decay": 0.0,
                },
                "grad_input": None,
                "grad_weight": None,
                "lowering": None,
            },
            {
                "match": {"type": "torch.nn.modules.linear:Linear"},
                "forward": {"kind": "dense"}, "grad_input": None, "grad_weight": None,
                "lowering": None,
            },
            {
                "match": {"predicate": f"{here}:is_forward"},
                "forward": {"kind": "dense"}, "grad_input": None, "grad_weight": None,
                "lowering": None,
            },
        ],
        "passes": [f"{here}:first_pass"],
    }  # fmt: skip


@pytest.mark.parametrize("lowering", ["cuda", 1, ""])
def test_a_lowering_is_one_of_four(lowering):
    said = f"Rule: lowering={lowering!r} is not one of 'reference', 'triton', 'cpp', 'vendor'"
    with refuses(said):
        Rule("*", lowering=lowering)


def test_a_lowering_goes_through_plain_data():
    config = SparseConfig([Rule("*", NM(2, 4), lowering="triton")])
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dicts_may_hold_objects_and_leave_out_defaults():
    rule = Rule("*", forward=NM(2, 4))
    assert SparseConfig.from_dict({}) == SparseConfig()
    assert SparseConfig.from_dict({"rules": [rule]}).rules == (rule,)
    plain = {"match": "*", "forward": {"kind": "nm", "n": 2, "m": 4}}
    assert SparseConfig.from_dict({"rules": [plain]}).rules == (rule,)
    assert SparseConfig.from_dict({"rules": [{"match": "*", "forward": NM(2, 4)}]}).rules == (rule,)
    assert SparseConfig.from_dict({"passes": [first_pass]}).passes == (first_pass,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"rule": []},
            "SparseConfig: unknown key 'rule' (value []); allowed: rules, keep_output_dense, "
            "select, strict, codegen, verify, passes, freeze",
        ),
        ({"rules": {}}, "SparseConfig: rules={} must be None or a list of rules"),
        ({"rules": [3]}, "Rule: 3 must be a dict"),
        ({"rules": [{}]}, "Rule: missing key 'match' in {}"),
        (
            {"rules": [{"match": "*", "backward": 1}]},
            "Rule: unknown key 'backward' (value 1); allowed: match, forward, grad_input, "
            "grad_weight, lowering",
        ),
        (
            {"rules": [{"match": "*", "forward": {"kind": "nm", "n": 2}}]},
            "NM: missing key 'm' in {'n': 2}",
        ),
        (
            {"rules": [{"match": "*", "forward": {"kind": "nm", "n": 2, "m": 4, "N": 1}}]},
            "NM: unknown key 'N' (value 1); allowed: n, m, transposable, weight_grad, decay",
        ),
        (
            {"rules": [{"match": "*", "forward": {"kind": "sampled", "k": 3}}]},
            "Sampled: unknown key 'k' (value 3); allowed: ratio, min_k, estimator, scores, "
            "inference, mass, shared",
        ),
        (
            {"rules": [{"match": "*", "forward": {"kind": "dense", "n": 3}}]},
            "Dense: unknown key 'n' (value 3); allowed: none",
        ),
        (
            {"rules": [{"match": "*", "forward": {"n": 2, "m": 4}}]},
            "Rule: forward={'n': 2, 'm': 4} must be a pattern, or a dict whose 'kind' is one of "
            "'dense', 'nm', 'sampled', 'masked'",
        ),
        (
            {"rules": [{"match": "*", "forward": {"kind": ["nm"]}}]},
            "Rule: forward={'kind': ['nm']} must be a pattern, or a dict whose 'kind' is one of "
            "'dense', 'nm', 'sampled', 'masked'",
        ),
        (
            {"rules": [{"match": "*", "grad_input": 3}]},
            "Rule: grad_input=3 must be None, a pattern, or a dict whose 'kind' is one of "
            "'dense', 'nm', 'sampled', 'masked'",
        ),
        (
            {"rules": [{"match": "*", "forward": {"kind": "nm", "n": 4, "m": 4}}]},
            "NM: n=4 must be between 1 and m-1=3 (n is the number KEPT)",
        ),
        (
            {"rules": [{"match": {"class": "torch.nn:Linear"}}]},
            "Rule: match={'class': 'torch.nn:Linear'} must hold one key, 'type' or 'predicate'",
        ),
        (
            {"rules": [{"match": {"type": "Linear"}}]},
            "'Linear' must be a name of the form 'module:qualified.name'",
        ),
        (
            {"rules": [{"match": {"type": 3}}]},
            "3 must be a name of the form 'module:qualified.name'",
        ),
        (
            {"rules": [{"match": {"type": "torch.nn:Linaer"}}]},
            "'torch.nn:Linaer' can't be imported: module 'torch.nn' has no attribute 'Linaer'",
        ),
        (
            {"rules": [{"match": {"predicate": "nowhere.at.all:f"}}]},
            "'nowhere.at.all:f' can't be imported: No module named 'nowhere'",
        ),
        (
            {"rules": [{"match": {"type": "math:floor"}}]},
            "Rule: match={'type': 'math:floor'} is not a type",
        ),
        (
            {"rules": [{"match": {"predicate": "torch.nn:Linear"}}]},
            "Rule: match={'predicate': 'torch.nn:Linear'} is not a predicate",
        ),
        ({"passes": "math:floor"}, "SparseConfig: passes='math:floor' must be a list of functions"),
        (
            {"passes": ["math:pi"]},
            "SparseConfig: passes=(3.141592653589793,) must be a list of functions",
        ),
        ({"strict": "no"}, "SparseConfig: strict='no' must be True or False"),
    ],
)
def test_what_a_dict_refuses(data, message):
    with refuses(message):
        SparseConfig.from_dict(data)


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (SparseConfig(rules=[Rule(lambda site: True)]), "match=<function <lambda>"),
        (SparseConfig(passes=[lambda gm: gm]), "passes=<function <lambda>"),
        (SparseConfig(rules=[Rule(type("Local", (nn.Module,), {}))]), "match=<class"),
    ],
)
def test_what_has_no_name_cannot_be_written_down(config, start):
    with pytest.raises(ConfigError, match=f"^{re.escape(start)}") as caught:
        config.to_dict()
    assert "can't be written as plain data: it is not importable as" in str(caught.value)
    assert str(caught.value).endswith("define it at the top level of a module")
