"""RatioSchedule: what ratio at which step, what is compiled, how it is kept and refused."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsefx as sfx
from sparsefx import ConfigError, RatioSchedule, Rule, Sampled, SparseConfig
from sparsefx.config import PRESETS, as_config

SHAPES = ("cosine", "linear", "step")


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 60))
    return RatioSchedule(
        start=draw(st.floats(0.01, 1)),
        end=draw(st.floats(0.01, 1)),
        steps=steps,
        shape=draw(st.sampled_from(SHAPES)),
        levels=draw(st.integers(2, 7)),
        delay=draw(st.integers(0, 20)),
        tail=draw(st.integers(0, steps)),
    )


def curve(s: RatioSchedule, step: int) -> float:
    """The curve before it is rounded to levels."""
    done = min(max(step - s.delay, 0) / s.steps, 1)
    if s.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return s.start + (s.end - s.start) * done


def ratios(s: RatioSchedule, steps: int) -> list[float]:
    return [s.at(t) for t in range(steps)]


# --- the curve


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # nearest of .8 .6 .4 .2 to .8 - .6 t / 12: halves of a gap at both ends
        ({"shape": "linear"}, [0.8] * 3 + [0.6] * 4 + [0.4] * 4 + [0.2] * 4),
        # .8 - .3 (1 - cos(pi t / 12)): slow, fast, slow
        ({"shape": "cosine"}, [0.8] * 4 + [0.6] * 3 + [0.4] * 2 + [0.2] * 6),
        ({"shape": "step"}, [0.8] * 3 + [0.6] * 3 + [0.4] * 3 + [0.2] * 6),
        ({"shape": "step", "levels": 2}, [0.8] * 6 + [0.2] * 9),
        ({"shape": "step", "delay": 2}, [0.8] * 5 + [0.6] * 3 + [0.4] * 3 + [0.2] * 4),
        ({"shape": "step", "tail": 2}, [0.8] * 3 + [0.6] * 3 + [0.4] * 3 + [0.2] + [1.0] * 5),
        ({"shape": "step", "tail": 5}, [0.8] * 3 + [0.6] * 3 + [0.4] + [1.0] * 8),
    ],
)
def test_levels_by_hand(asked, expected):
    assert ratios(RatioSchedule(0.8, 0.2, 12, **asked), 15) == expected


def test_of_two_equally_near_levels_the_earlier():
    s = RatioSchedule(0.9, 0.1, 8, "linear", levels=3)  # .9 .5 .1; at 2 the curve is at .7
    assert ratios(s, 9) == [0.9] * 3 + [0.5] * 4 + [0.1] * 2


def test_levels_are_short_decimals():
    """0.7, not 0.7000000000000001: k = int(0.7 * K) would be the same, 1 - 0.3 * 2 not."""
    assert RatioSchedule(1, 0.1, 90, "linear").values == (1.0, 0.7, 0.4, 0.1)
    assert RatioSchedule(0.4, 0.1, 9, "step", levels=4).values == (0.4, 0.3, 0.2, 0.1)
    small = RatioSchedule(1e-8, 2e-8, 9, "step", levels=3)
    assert small.values == (1e-8, 1.5e-8, 2e-8)  # digits, not decimals: none becomes 0


@given(schedules())
def test_what_holds_for_every_schedule(s):
    steps = s.delay + s.steps + 5
    seen = ratios(s, steps)
    assert tuple(dict.fromkeys(seen)) == s.values
    assert len(s.values) <= s.levels + bool(s.tail)
    runs = [(t, r) for t, r in enumerate(seen) if t == 0 or r != seen[t - 1]]
    assert tuple(runs) == s.switches
    last = s.delay + s.steps
    if s.tail:
        assert seen[last - s.tail :] == [1.0] * (s.tail + 5)
    else:
        assert seen[last:] == [s.end] * 5
    begin = min(s.delay, last - s.tail) if s.tail else s.delay
    assert seen[:begin] == [s.start] * begin
    cut = seen[: last - s.tail]
    down = s.end <= s.start
    assert all((a >= b) if down else (a <= b) for a, b in itertools.pairwise(cut))
    if s.shape != "step":
        half = abs(s.end - s.start) / (s.levels - 1) / 2
        assert all(abs(r - curve(s, t)) <= half + 1e-5 for t, r in enumerate(cut))


@given(schedules())
def test_a_tail_changes_nothing_before_it(s):
    without = RatioSchedule(s.start, s.end, s.steps, s.shape, s.levels, s.delay)
    before = s.delay + s.steps - s.tail
    assert ratios(s, before) == ratios(without, before)


def test_two_million_steps_are_not_counted_through():
    s = RatioSchedule(0.5, 0.1, 2_000_000, delay=10**12, tail=5)
    assert s.switches[0] == (0, 0.5)
    assert s.switches[-1] == (10**12 + 2_000_000 - 5, 1.0)
    assert len(s.values) == 5


# --- where a training stands


def test_step_goes_on_by_one():
    s = RatioSchedule(0.8, 0.2, 4, "linear", levels=2)
    seen = []
    for t in range(7):
        assert s.last_step == t
        assert s.ratio == s.at(t)
        seen.append(s.ratio)
        s.step()
    assert seen == [0.8] * 3 + [0.2] * 4


def test_equality_and_hash_are_of_what_was_given():
    a, b = RatioSchedule(1, 0.5, 10), RatioSchedule(1.0, 0.5, 10)
    a.step()
    assert a == b
    assert hash(a) == hash(b)
    assert a != RatioSchedule(1, 0.5, 10, tail=1)
    assert repr(a) == repr(b)
    with pytest.raises(AttributeError):
        a.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_stands_where_the_original_did(twin_of):
    s = RatioSchedule(0.9, 0.1, 10)
    for _ in range(6):
        s.step()
    twin = twin_of(s)
    assert (twin, twin.last_step, twin.ratio) == (s, 6, s.ratio)
    twin.step()
    assert s.last_step == 6


def test_state_goes_through_a_checkpoint():
    s, resumed = (RatioSchedule(0.9, 0.1, 10, tail=2) for _ in range(2))
    for _ in range(7):
        s.step()
    file = io.BytesIO()
    torch.save(s.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.last_step == 7
    assert resumed.ratio == s.ratio != resumed.at(0)


def test_state_of_another_schedule_is_refused_and_changes_nothing():
    s, other = RatioSchedule(0.9, 0.1, 10), RatioSchedule(0.9, 0.1, 20)
    s.step()
    with pytest.raises(ConfigError, match=r"steps=20, this schedule 10; .* load \{'step': n\}"):
        s.load_state_dict({**other.state_dict(), "step": 5})
    with pytest.raises(ConfigError, match="colour='red', this schedule 'no such key'"):
        s.load_state_dict({"step": 5, "colour": "red"})
    with pytest.raises(ConfigError, match=r"state \{\} must be a dict with a 'step'"):
        s.load_state_dict({})
    with pytest.raises(ConfigError, match=r"state \[1\] must be a dict"):
        s.load_state_dict([1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"step=1\.5 must be an int"):
        s.load_state_dict({"step": 1.5})
    with pytest.raises(ConfigError, match="step=-1 must be at least 0"):
        s.load_state_dict({"step": -1})
    assert (s.last_step, s.ratio) == (1, s.at(1))
    s.load_state_dict({"step": 9})
    assert s.ratio == 0.1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"start": 0}, r"start=0 must be in \(0, 1\]"),
        ({"start": "0.5"}, "start='0.5' must be a number, got str"),
        ({"end": 1.5}, r"end=1.5 must be in \(0, 1\]"),
        ({"end": math.nan}, "end=nan must be finite"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 1.0}, r"steps=1\.0 must be an int, got float"),
        ({"shape": "cubic"}, "shape='cubic' is not one of 'cosine', 'linear', 'step'"),
        ({"levels": 1}, "levels=1 must be between 2 and 64"),
        ({"levels": 65}, "levels=65 must be between 2 and 64"),
        ({"delay": -1}, "delay=-1 must be at least 0"),
        ({"tail": 11}, r"tail=11 must be between 0 and 10 \(the number of steps\)"),
        ({"tail": True}, "tail=True must be an int, got bool"),
    ],
)
def test_bad_values_are_named(asked, message):
    with pytest.raises(ConfigError, match=f"RatioSchedule: {message}"):
        RatioSchedule(**{"start": 0.5, "end": 0.1, "steps": 10, **asked})


def test_at_refuses_what_is_no_step():
    s = RatioSchedule(0.5, 0.1, 10)
    with pytest.raises(ConfigError, match="step=-1 must be at least 0"):
        s.at(-1)
    with pytest.raises(ConfigError, match=r"step=0\.5 must be an int"):
        s.at(0.5)  # type: ignore[arg-type]


# --- in a pattern and a config


def config_with(*schedules: RatioSchedule) -> SparseConfig:
    return SparseConfig(
        rules=[Rule(str(i), grad_weight=Sampled(s)) for i, s in enumerate(schedules)]
    )


def test_sampled_follows_it():
    s = RatioSchedule(0.5, 0.25, 2, "linear", levels=2, tail=1)
    pattern = Sampled(s)
    assert (pattern.k(8), str(pattern)) == (4, "sampled 0.5")
    s.step()
    assert (pattern.k(8), str(pattern)) == (8, "sampled 1")


def test_config_lists_each_object_once_and_resolves_them():
    a, b = RatioSchedule(0.5, 0.1, 2, tail=1), RatioSchedule(0.5, 0.1, 2, tail=1)
    config = config_with(a, b, a)
    assert [id(s) for s in config.schedules] == [id(a), id(b)]
    a.step()
    assert [r.grad_weight.ratio for r in config.resolved().rules] == [1.0, 0.5, 1.0]
    assert [r.grad_weight.ratio for r in config.resolved([0.3, 0.2]).rules] == [0.3, 0.2, 0.3]
    assert config.resolved().schedules == ()
    plain = SparseConfig(rules=[Rule("*", forward=Sampled(0.3))])
    assert plain.resolved() is plain
    assert SparseConfig().schedules == ()


def test_resolving_keeps_everything_else():
    s = RatioSchedule(0.5, 0.1, 2)
    pattern = Sampled(s, min_k=3, estimator="systematic", scores="input")
    rule = Rule("a*", forward=sfx.NM(2, 4), grad_weight=pattern)
    config = SparseConfig(rules=[rule], strict=True, codegen="aot_eager")
    number = Sampled(0.5, min_k=3, estimator="systematic", scores="input")
    wanted = SparseConfig(
        rules=[Rule("a*", forward=sfx.NM(2, 4), grad_weight=number)],
        strict=True,
        codegen="aot_eager",
    )
    assert config.resolved() == wanted


def test_config_goes_through_plain_data():
    s = RatioSchedule(0.5, 0.1, 20, "step", levels=3, delay=4, tail=2)
    config = config_with(s, s)
    s.step()
    data = config.to_dict()
    assert data["rules"][0]["grad_weight"]["ratio"] == {
        "start": 0.5, "end": 0.1, "steps": 20, "shape": "step", "levels": 3, "delay": 4, "tail": 2,
    }  # fmt: skip
    again = SparseConfig.from_dict(data)
    assert again == config
    assert hash(again) == hash(config)
    (own,) = again.schedules  # equal ones of a dict are one
    assert own is not s
    assert own.last_step == 0


def test_dicts_do_not_merge_schedules_that_were_objects():
    a, b = RatioSchedule(0.5, 0.1, 2), RatioSchedule(0.5, 0.1, 2)
    config = SparseConfig.from_dict({"rules": list(config_with(a, b).rules)})
    assert [id(s) for s in config.schedules] == [id(a), id(b)]


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ({"start": 0.5, "end": 0.1}, "RatioSchedule: missing key 'steps'"),
        ({"start": 0.5, "end": 0.1, "steps": 3, "tall": 1}, "unknown key 'tall' .*tail"),
        ({"start": 0.5, "end": 0.1, "steps": 0}, "steps=0 must be at least 1"),
        ([0.5, 0.1], "Sampled: ratio="),
    ],
)
def test_bad_dicts_are_named(ratio, message):
    rule = {"match": "*", "grad_weight": {"kind": "sampled", "ratio": ratio}}
    with pytest.raises(ConfigError, match=message):
        SparseConfig.from_dict({"rules": [rule]})


def test_every_use_of_a_preset_has_its_own(monkeypatch):
    monkeypatch.setitem(PRESETS, "annealed", config_with(RatioSchedule(0.5, 0.1, 2)))
    first, second = as_config("annealed"), sfx.preset("annealed")
    assert first == second == PRESETS["annealed"]
    objects = [c.schedules[0] for c in (first, second, PRESETS["annealed"])]
    assert len({id(s) for s in objects}) == 3
