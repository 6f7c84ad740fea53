"""Configs in YAML and JSON: what is read, what is refused and where it stands, round trips."""

import json
import sys
from pathlib import Path

import pytest

from sparsefx.config import NM, PRESETS, Dense, Masked, Rule, Sampled, SparseConfig
from sparsefx.errors import ConfigError
from sparsefx.schedules import RatioSchedule

pytest.importorskip("yaml")

CONFIGS = [
    *PRESETS.values(),
    SparseConfig(rules=()),
    SparseConfig(
        rules=[
            Rule("a.*", forward=NM(1, 16, decay=2e-4), lowering="reference"),
            Rule(dict, forward=Masked()),
            Rule("é: [1], #{x}", grad_weight=Sampled(RatioSchedule(0.5, 0.1, steps=9, tail=3))),
            Rule("*", forward=Sampled(None, mass=0.9), grad_input=Dense()),
        ],
        keep_output_dense=False,
        select="profitable",
        codegen="aot_eager",
        freeze=True,
    ),
]


@pytest.mark.parametrize("suffix", [".yaml", ".YML", ".json"])
def test_round_trips(suffix: str, tmp_path: Path):
    for i, config in enumerate(CONFIGS):
        path = tmp_path / f"{i}{suffix}"
        config.to_file(path)
        assert SparseConfig.from_file(str(path)) == config, path.read_text()


def test_numbers_are_read_as_python_reads_them(tmp_path: Path):
    path = tmp_path / "c.yaml"
    for text in ("2e-4", "2E-4", "+2.e-4", "2.0e-4", "0.0002"):
        path.write_text(f"rules: [{{match: x, forward: {{kind: nm, n: 2, m: 4, decay: {text}}}}}]")
        (rule,) = SparseConfig.from_file(path).effective_rules()
        assert rule.forward == NM(2, 4, decay=2e-4), text


def test_anchors_and_merges_are_followed(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "rules:\n- &one {match: a, forward: {kind: nm, n: 2, m: 4}}\n- {<<: *one, match: b}\n"
        "- {<<: *one, match: c, lowering: fast}\n"
    )
    with pytest.raises(ConfigError, match=r"c.yaml:4: rules\[2\].lowering: Rule: lowering='fast'"):
        SparseConfig.from_file(path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    rules = SparseConfig.from_file(path).effective_rules()
    assert rules == (Rule("a", forward=NM(2, 4)), Rule("b", forward=NM(2, 4)))


SCHEDULE = "- match: x\n  grad_weight: {kind: sampled, ratio: {start: 2, end: 0.1, steps: 9}}"
REFUSED = [
    ("a.yaml", "", "a.yaml: SparseConfig: None must be a dict"),
    ("a.yaml", "- 1", "a.yaml:1: SparseConfig: [1] must be a dict"),
    ("a.yaml", "strict: true\nselct: all", "a.yaml:2: selct: SparseConfig: unknown key 'selct'"),
    ("a.yaml", "1: 2", "a.yaml:1: SparseConfig: unknown key 1"),
    ("a.yaml", "strict:\n  yes please", "a.yaml:1: strict: SparseConfig: strict='yes please'"),
    ("a.yaml", "rules: 5", "a.yaml:1: rules: SparseConfig: rules=5 must be None or a list"),
    ("a.yaml", "rules:\n- 5", "a.yaml:2: rules[0]: Rule: 5 must be a dict"),
    ("a.yaml", "rules:\n- match:", "a.yaml:2: rules[0].match: Rule: match=None must be"),
    (
        "a.yaml",
        "rules:\n- match: {type: nowhere:At}",
        "a.yaml:2: rules[0].match: 'nowhere:At' can't be imported: No module named 'nowhere'",
    ),
    (
        "a.yaml",
        "rules:\n- match: x\n  forward:\n    kind: nm\n    n: 4\n    m: 4",
        "a.yaml:5: rules[0].forward.n: NM: n=4 must be between 1 and m-1=3",
    ),
    (
        "a.yaml",
        "rules:\n- match: x\n  forward: {kind: nm, n: 4}",
        "a.yaml:3: rules[0].forward: NM: missing key 'm'",
    ),
    ("a.yaml", "rules:\n- {match: x, forward: {kind: 3}}", "rules[0].forward: Rule: forward={"),
    (
        "a.yaml",
        f"rules:\n{SCHEDULE}",
        "a.yaml:3: rules[0].grad_weight.ratio.start: RatioSchedule: start=2 must be in (0, 1]",
    ),
    ("a.yaml", "passes: [3:4]", "a.yaml:1: passes: "),
    ("a.yaml", "passes:\n- here", "passes: 'here' must be a name of the form"),
    ("a.yaml", "strict: [", "a.yaml:1: is no YAML that can be read: expected the node content"),
    ("a.yaml", "strict: !!python/name:os.system x", "a.yaml:1: is no YAML that can be read: could"),
    ("a.yaml", "a: 1\n---\nb: 2", "a.yaml:2: is no YAML that can be read: but found another"),
    ("a.yaml", "select: 2020-13-40", "a.yaml: holds a value that YAML can't read: month"),
    ("a.yaml", "strict: true\nstrict: false", "a.yaml:2: the key 'strict' stands twice"),
    ("a.yaml", "\x07", "a.yaml: is no YAML that can be read: "),
    ("a.yaml", "&a [*a]", "a.yaml: is nested too deeply for a config"),
    ("a.json", "{\n,}", "a.json:2: is no JSON: Expecting property name"),
    ("a.json", '{"strict": true, "strict": false}', "a.json: the key 'strict' stands twice"),
    ("a.json", '{"rules": [{"match": ""}]}', "a.json: rules[0].match: Rule: match=''"),
    ("a.json", "[" * 100_000, "a.json: is nested too deeply for a config"),
    ("a.toml", "", "a.toml: a config's file ends in .yaml, .yml, .json"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_refusals_name_file_line_and_place(
    name: str, text: str, message: str, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        SparseConfig.from_file(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no\.yaml: can't be read: No such file"):
        SparseConfig.from_file(tmp_path / "no.yaml")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ConfigError, match=r"latin\.json: is not UTF-8 text"):
        SparseConfig.from_file(tmp_path / "latin.json")
    with pytest.raises(ConfigError, match=r"c\.json: can't be written: No such file"):
        SparseConfig().to_file(tmp_path / "no" / "c.json")
    with pytest.raises(ConfigError, match=r"c\.txt: a config's file ends in"):
        SparseConfig().to_file(tmp_path / "c.txt")
    with pytest.raises(ConfigError, match="is not importable"):
        SparseConfig(rules=[Rule(lambda site: True)]).to_file(tmp_path / "c.json")
    assert {path.name for path in tmp_path.iterdir()} == {"latin.json"}


def test_yaml_alone_needs_pyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    SparseConfig().to_file(tmp_path / "c.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)  # as if it weren't installed
    asked = r'c.yaml: YAML needs PyYAML.*pip install "sparsefx\[yaml\]", or write .* as JSON'
    with pytest.raises(ConfigError, match=asked):
        SparseConfig.from_file(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=asked):
        SparseConfig().to_file(tmp_path / "c.yaml")
    SparseConfig().to_file(tmp_path / "c.json")
    assert SparseConfig.from_file(tmp_path / "c.json") == SparseConfig()


def test_messages_of_plain_dicts_stay_as_they_were():
    with pytest.raises(ConfigError) as caught:
        SparseConfig.from_dict({"rules": [{"match": "x"}, {"match": "x", "lowering": 1}]})
    assert str(caught.value).startswith("Rule: lowering=1 is not one of")
    assert caught.value.steps == ("rules", 1)


def test_examples_are_configs(root: Path):
    files = sorted((root / "examples" / "configs").iterdir())
    assert len(files) >= 5
    for path in files:
        config = SparseConfig.from_file(path)
        assert config != SparseConfig(), path
        json.dumps(config.to_dict())
