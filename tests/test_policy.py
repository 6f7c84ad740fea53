"""Which pattern a product gets, and every reason for which it gets none. No graph is needed."""

from dataclasses import replace

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsefx.config import NM, Dense, Masked, Rule, Sampled, SparseConfig
from sparsefx.plan import Decision, Site
from sparsefx.policy import decide

NM24 = NM(2, 4)
T24 = NM(2, 4, transposable=True)
S = Sampled(0.5)


def site(**changes):
    """The forward of a linear layer, 5 rows of 8 to 12."""
    known = {
        "layer": "blocks.0.fc",
        "role": "forward",
        "kind": "mm",
        "op": "addmm",
        "shape": (5, 12, 8),
        "dtype": "float32",
        "device": "cpu",
        "group": 0,
        "module_types": (nn.Linear, nn.Sequential),
        "weight": "right",
    }
    return Site(**{**known, **changes})


def convolution(**changes):
    """The forward of a convolution from 8 to 12 channels in two groups."""
    changes = {"kind": "conv", "op": "convolution", "channels": (4, 6, 2, 3), **changes}
    return site(shape=(3 * 49, 12, 4 * 9), **changes)


def products(forward):
    """The three products of a layer."""
    m, n, k = forward.shape
    gradients = {"grad_input": (m, k, n), "grad_weight": (k, n, m)}
    others = {role: replace(forward, role=role, shape=s) for role, s in gradients.items()}
    return {"forward": forward, **others}


def decided(forward, *rules, **options):
    return decide(products(forward), SparseConfig(rules=rules), **options)


def patterns(decisions):
    return tuple(decisions[role].pattern for role in ("forward", "grad_input", "grad_weight"))


def reasons(decisions):
    return tuple(decisions[role].reason for role in ("forward", "grad_input", "grad_weight"))


# --- what each product gets


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("*", NM24), (NM24, NM24, Dense())),
        (Rule("*", T24), (T24, T24, Dense())),
        (Rule("*", S), (S, S, S)),
        (Rule("*", NM24, Dense()), (NM24, Dense(), Dense())),
        (Rule("*", NM24, S, S), (NM24, S, S)),
        (Rule("*", NM24, NM(1, 4)), (NM24, NM(1, 4), Dense())),
        (Rule("*", S, Dense(), Dense()), (S, Dense(), Dense())),
        (Rule("*", S, None, Dense()), (S, S, Dense())),
        (Rule("*", Dense(), S, S), (Dense(), S, S)),
        (Rule("*", grad_input=NM24), (Dense(), NM24, Dense())),
        (Rule("*"), (Dense(), Dense(), Dense())),
    ],
)
def test_patterns(rule, expected):
    assert patterns(decided(site(), rule)) == expected


def test_what_is_derived_says_of_what():
    found = decided(site(), Rule("*", NM24))
    assert found["forward"] == Decision(NM24)
    assert found["grad_input"] == Decision(NM24, derived=True, forward=NM24)
    assert found["grad_weight"].derived
    assert found["grad_weight"].forward == NM24
    found = decided(site(), Rule("*", S))
    assert found["grad_weight"] == Decision(S, derived=True, forward=S)
    found = decided(site(), Rule("*", S, S, S))
    assert found["grad_weight"] == Decision(S)


def test_decay_follows_the_weight_whatever_computes_its_gradient():
    decaying = NM(2, 4, decay=1e-4)
    masked = NM(2, 4, weight_grad="masked", decay=1e-4)
    for forward, own in ((decaying, S), (decaying, Dense()), (masked, S)):
        found = decided(site(), Rule("*", forward, None, own))["grad_weight"]
        assert found.pattern == own
        assert found.forward == decaying  # a product of its own is not masked
    for own in (S, Dense()):
        found = decided(site(), Rule("*", NM24, None, own))["grad_weight"]
        assert found.forward == Dense()
    assert decided(site(), Rule("*", decaying, S))["grad_input"].forward == Dense()


def test_only_the_products_that_there_are_get_a_decision():
    everything = products(site())
    config = SparseConfig(rules=[Rule("*", NM24)])
    assert list(decide({"forward": everything["forward"]}, config)) == ["forward"]
    some = {role: everything[role] for role in ("forward", "grad_weight")}
    assert list(decide(some, config)) == ["forward", "grad_weight"]


# --- which rule


def test_the_first_match_wins():
    rules = [
        Rule("blocks.1.*", forward=S),
        Rule(nn.Conv2d, forward=S),
        Rule(lambda s: s.shape[0] > 5, forward=S),
        Rule("blocks.*.fc", forward=NM24),
        Rule("*", forward=S),
    ]
    assert patterns(decided(site(), *rules))[0] == NM24
    assert patterns(decided(site(layer="blocks.1.fc"), *rules))[0] == S
    assert patterns(decided(site(layer="head"), *rules))[0] == S
    assert patterns(decided(site(layer="head"), *rules[:4]))[0] == Dense()


def test_a_dense_rule_stops_the_search():
    found = decided(site(), Rule("blocks.0.*"), Rule("*", forward=NM24))
    assert reasons(found) == (
        "the rule says Dense()",
        "the derivative of a dense forward",
        "the derivative of a dense forward",
    )


@pytest.mark.parametrize(
    ("glob", "matches"),
    [
        ("*", True),
        ("blocks.*", True),
        ("blocks.?.fc", True),
        ("blocks.[0-3].fc", True),
        ("fc", False),
        ("Blocks.*", False),
        ("blocks.0.fc.weight", False),
    ],
)
def test_globs(glob, matches):
    assert Rule(glob).matches(site()) is matches


class MyLinear(nn.Linear):
    pass


def test_types_match_with_their_subclasses_and_enclosing_modules():
    class Local(nn.Linear):
        pass

    for found in (MyLinear, Local):
        mine = site(module_types=(found, nn.Sequential))
        assert Rule(nn.Linear).matches(mine)
        assert Rule(nn.Sequential).matches(mine)
        assert Rule(found).matches(mine)
        assert not Rule(found).matches(site())
    hf = site(module_types=(Conv1D,))
    assert Rule(Conv1D).matches(hf)
    assert Rule(nn.Module).matches(hf)
    assert not Rule(nn.Conv1d).matches(hf)
    assert not Rule(nn.Linear).matches(site(module_types=()))


def test_a_predicate_sees_the_forward():
    seen = []

    def small(s):
        seen.append(s)
        return s.shape[2] < 9

    assert patterns(decided(site(), Rule(small, forward=S))) == (S, S, S)
    assert seen == [site()]
    assert not Rule(small).matches(site(shape=(1, 1, 9)))


# --- why the whole layer is dense


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (site(dtype="complex64"), "dtype complex64 is not a real floating-point type"),
        (site(dtype="int64"), "dtype int64 is not a real floating-point type"),
        (convolution(transposed=True), "transposed convolution"),
        (convolution(depthwise=True), "depthwise convolution: one input channel per group"),
        (site(is_output=True), "feeds the model's output (keep_output_dense=True)"),
    ],
)
@pytest.mark.parametrize("rule", [Rule("*", NM24), Rule("*", S, S, S), Rule("*")])
def test_blocked(forward, reason, rule):
    found = decided(forward, rule)
    assert patterns(found) == (Dense(),) * 3
    assert reasons(found) == (reason,) * 3


def test_output_is_sparse_when_asked_for():
    config = SparseConfig(rules=[Rule("*", NM24)], keep_output_dense=False)
    assert decide(products(site(is_output=True)), config)["forward"].pattern == NM24


def test_a_backward_that_was_not_split():
    parts = products(convolution())
    parts["grad_input"] = replace(parts["grad_input"], op="convolution_backward")
    found = decide(parts, SparseConfig(rules=[Rule("*", S)]))
    assert reasons(found) == ("its backward could not be split into products",) * 3


def test_a_layer_that_failed_before():
    found = decided(site(), Rule("*", NM24), failed="rewrite_nm failed: ValueError: no")
    assert reasons(found) == ("rewrite_nm failed: ValueError: no",) * 3


def test_no_rule():
    assert reasons(decided(site(), Rule("head", NM24))) == ("no rule matches",) * 3
    assert reasons(decided(site())) == ("no rule matches",) * 3


# --- why a product is dense


@pytest.mark.parametrize(
    ("forward", "pattern", "reason"),
    [
        (
            site(kind="bmm", weight=None), NM24,
            "both operands are activations: N:M needs a weight",
        ),
        (site(weight=None), NM24, "both operands are activations: N:M needs a weight"),
        (site(weight="both"), NM24, "both operands are weights"),
        (site(weight="left"), NM24, "the weight is the left operand of the product"),
        (site(), NM(1, 3), "K=8 is not a multiple of m=3"),
        (site(shape=(5, 6, 8)), T24, "N=6 is not a multiple of m=4 (transposable)"),
        (site(shape=(5, 8, 6)), T24, "K=6 is not a multiple of m=4"),
        (site(shape=(5, 12, "s0")), NM24, "K=s0 is not known when compiling"),
        (site(shape=(5, "s0", 8)), T24, "N=s0 is not known when compiling (transposable)"),
        (convolution(), NM(1, 3), "channels per group=4 is not a multiple of m=3"),
        (convolution(), T24, "output channels per group=6 is not a multiple of m=4 (transposable)"),
        (site(), Sampled(1.0), "k = K = 8: exact"),
        (site(), Sampled(0.3, min_k=8), "k = K = 8: exact"),
        (convolution(), Sampled(0.3, min_k=16), "k = K = 4: exact"),
        (
            site(has_backward=False), S,
            "inference graph: exact unless Sampled(inference=True)",
        ),
    ],
)  # fmt: skip
def test_forward_stays_dense(forward, pattern, reason):
    found = decided(forward, Rule("*", pattern))
    assert reasons(found) == (
        reason,
        "the derivative of a dense forward",
        "the derivative of a dense forward",
    )


@pytest.mark.parametrize(
    ("forward", "rule", "expected"),
    [
        (
            site(shape=(5, 6, 8)), Rule("*", grad_input=NM24),
            ("", "K=6 is not a multiple of m=4", ""),
        ),
        (
            convolution(), Rule("*", grad_input=NM24),
            ("", "output channels per group=6 is not a multiple of m=4", ""),
        ),
        (
            convolution(), Rule("*", grad_input=NM(1, 3, transposable=True)),
            ("", "channels per group=4 is not a multiple of m=3 (transposable)", ""),
        ),
        (
            site(), Rule("*", grad_input=Sampled(0.5, min_k=12), grad_weight=Sampled(0.5, min_k=5)),
            ("", "k = K = 12: exact", "k = K = 5: exact"),
        ),
        (
            convolution(), Rule("*", grad_input=Sampled(0.1, 6), grad_weight=Sampled(0.1, 3)),
            ("", "k = K = 6: exact", "k = K = 3: exact"),
        ),
    ],
)  # fmt: skip
def test_a_gradient_of_its_own_stays_dense(forward, rule, expected):
    found = reasons(decided(forward, rule))
    assert found[1] == expected[1]
    if expected[2]:
        assert found[2] == expected[2]


def test_sampled_inference_when_asked_for():
    forward = site(has_backward=False)
    asked = Sampled(0.5, inference=True)
    assert decide({"forward": forward}, SparseConfig(rules=[Rule("*", asked)])) == {
        "forward": Decision(asked)
    }


def test_n_of_m_acts_without_a_backward():
    found = decide({"forward": site(has_backward=False)}, SparseConfig(rules=[Rule("*", NM24)]))
    assert found["forward"].pattern == NM24


def test_a_symbolic_depth_is_sampled():
    found = decided(site(shape=(5, 12, "s0")), Rule("*", S))
    assert patterns(found) == (S, S, S)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (NM24, "straight-through: reaches every weight (weight_grad='dense')"),
        (
            NM(2, 4, weight_grad="masked"),
            "dense product, masked afterwards (weight_grad='masked')",
        ),
        (Dense(), "the derivative of a dense forward"),
    ],
)
def test_why_a_weight_gradient_is_dense(pattern, reason):
    assert decided(site(), Rule("*", pattern))["grad_weight"].reason == reason


def test_unprofitable():
    asked = []

    def no(candidates, pattern):
        asked.append((*(candidate.role for candidate in candidates), pattern))
        return "not profitable: says the test"

    found = decided(site(), Rule("*", S, S, None), unprofitable=no)
    assert asked == [("forward", "grad_weight", S), ("grad_input", S)]
    assert reasons(found) == (
        "not profitable: says the test",
        "not profitable: says the test",
        "the derivative of a dense forward",
    )
    assert patterns(decided(site(), Rule("*", S), unprofitable=lambda *_: "")) == (S, S, S)
    asked.clear()
    found = decided(site(), Rule("*", S), unprofitable=no)
    assert asked == [("forward", "grad_input", "grad_weight", S)]  # worth what their sum is worth
    assert patterns(found) == (Dense(), Dense(), Dense())
    asked.clear()
    decided(site(), Rule("*", S, Dense()), unprofitable=no)
    assert asked == [("forward", "grad_weight", S)]
    asked.clear()
    decided(site(), Rule("*", Sampled(1.0)), unprofitable=no)  # exact anyway
    assert asked == []


# --- a weight that the model masks

M = Masked()
KEPT = "the gradient that the model gives its masked weight, masked or straight-through"


def masked(**changes):
    return site(mask="blocks.0.fc.mask", **changes)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], (M, M, Dense())),
        ([Rule("*")], (M, M, Dense())),
        ([Rule("other", S)], (M, M, Dense())),
        ([Rule("*", M)], (M, M, Dense())),
        ([Rule("*", NM24)], (M, M, Dense())),
        ([Rule("*", T24, NM(1, 4))], (M, M, Dense())),
        ([Rule("*", T24, None, S)], (M, M, S)),
        ([Rule("*", Dense(), S, S)], (M, S, S)),
        ([Rule("*", Dense(), Dense(), Dense())], (M, Dense(), Dense())),
        ([Rule("*", S)], (S, S, S)),
        ([Rule("*", S, Dense(), Dense())], (S, Dense(), Dense())),
        ([Rule("*", Sampled(1.0))], (M, M, Dense())),
    ],
)
def test_a_stored_mask_acts_unless_the_forward_is_sampled(rules, expected):
    assert patterns(decided(masked(), *rules)) == expected


def test_a_stored_mask_acts_on_the_output_too_and_nothing_else_does():
    found = decided(masked(is_output=True), Rule("*", S, S, S))
    assert patterns(found) == (M, M, Dense())
    assert reasons(found) == ("", "", KEPT)
    assert found["grad_input"] == Decision(M, derived=True, forward=M)


def test_a_stored_mask_acts_at_inference_where_sampling_does_not():
    forward = masked(has_backward=False)
    found = decide({"forward": forward}, SparseConfig(rules=[Rule("*", S)]))
    assert found == {"forward": Decision(M)}


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (Rule("*"), ""),
        (Rule("*", M), ""),
        (Rule("*", T24), "the rule's 2:4 transposable does not act on a weight with a stored mask"),
        (
            Rule("*", NM(2, 4, weight_grad="masked", decay=2e-4), NM(1, 4)),
            "the rule's 2:4 (weight_grad='masked', decay=0.0002) and 1:4 do not act on a weight "
            "with a stored mask",
        ),
    ],
)
def test_what_does_not_act_is_told(rule, note):
    found = decided(masked(), rule)
    assert found["forward"].note == note
    assert {found[role].note for role in ("grad_input", "grad_weight")} == {""}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (masked(dtype="int64"), "dtype int64 is not a real floating-point type"),
        (masked(weight="left"), "the weight is the left operand of the product"),
        (masked(opaque="out of reach"), "out of reach"),
        (convolution(mask="m", transposed=True), "transposed convolution"),
    ],
)
def test_a_stored_mask_that_stays_as_it_was(forward, reason):
    for rules in ([], [Rule("*", NM24, None, S)]):
        found = decided(forward, *rules)
        assert patterns(found) == (Dense(),) * 3
        assert reasons(found) == (reason,) * 3
    failed = "rewrite_masked failed: ValueError: no"
    assert reasons(decided(masked(), failed=failed)) == (failed,) * 3


def test_a_depthwise_convolution_may_have_a_stored_mask_but_is_not_sampled():
    forward = convolution(mask="m", depthwise=True)
    assert patterns(decided(forward, Rule("*", S, S, S))) == (M, M, Dense())


def test_a_rule_for_stored_masks_says_where_there_is_none():
    found = decided(site(), Rule("*", M))
    assert reasons(found)[0] == "no stored mask was found in the graph"
    assert patterns(found) == (Dense(),) * 3


def test_an_unprofitable_stored_mask():
    found = decided(masked(), Rule("*", NM24), unprofitable=lambda *_: "not profitable")
    assert reasons(found) == ("not profitable", "not profitable", KEPT)
