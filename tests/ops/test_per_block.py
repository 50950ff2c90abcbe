"""Rules per block: what a value may be, what a pattern reaches, fused weights, and the way through a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.ops.blocks import BlockWeights, block_label, block_weights, places
from loratool.ops.open import understand
from loratool.ops.per_block import from_mapping, read_per_block, rule_of
from loratool.ops.ranks import Candidate, Limits, Rule, choose, parse_rule
from tests.builders import architecture_of, build, typical_parts


def adapter(architecture: str, layout: str = "kohya") -> Adapter:
    return understand(build(typical_parts(architecture, layout), layout)).adapter


@pytest.fixture
def patterns(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "rules.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("value", "kind", "number"),
    [
        ("16", "rank", 16.0),
        ("rank 16", "rank", 16.0),
        ({"rank": "16"}, "rank", 16.0),
        ("keep", "keep", 0.0),
        ("knee", "knee", 0.0),
        ("energy 0.95", "energy", 0.95),
        ({"energy": "0.95"}, "energy", 0.95),
        ("  ratio   20 ", "ratio", 20.0),
        ({"cumulative": "0.5"}, "cumulative", 0.5),
    ],
)
def test_values(value: str | dict[str, str], kind: str, number: float) -> None:
    rule = rule_of(value)
    assert (rule.kind, rule.value) == (kind, number)
    assert rule_of(rule.title) == rule


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("0", "rank is '0'"),
        ("1.5", "rank is '1.5'"),
        ("0.95", "rank is '0.95'"),
        ("high", "rank is 'high'"),
        ("energy 2", "energy is '2', expected a share"),
        ("size 5MiB", "'size'"),
        ("error 0.1", "'error'"),
        ({"knee": "true"}, "'knee'"),
        ({"energy": "0.9", "rank": "3"}, "is no rule"),
        ("energy 0.9 rank", "is no rule"),
        ({}, "is no rule"),
        ("", "is no rule"),
        (None, "is no rule"),
    ],
)
def test_what_is_no_rule(value: str | dict[str, str] | None, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        rule_of(value)
    assert word in str(caught.value) and "--energy" not in str(caught.value)


def test_the_last_line_that_names_a_module_decides(patterns: Callable[[str], str]) -> None:
    source = adapter("sdxl")
    text = 'text_encoder_2: 3\n"unet.*.attn2.*": {energy: 0.5}\n"OUT*": knee\nM00: keep\nOUT02: 2\n'
    rules = read_per_block(patterns(text), source.architecture, source.modules)
    seen = set()
    for module in source.modules:
        label = block_label(module.targets[0], source.architecture)
        expected: str | None = None
        if module.component == "text_encoder_2":
            expected = "rank 3"
        if module.component == "unet" and ".attn2." in module.title:
            expected = "energy 0.5"
        expected = {"M00": "keep", "OUT02": "rank 2"}.get(label, "knee" if label.startswith("OUT") else expected)
        rule = rules(module)
        assert (rule.title if rule else None) == expected, module.title
        seen.add(expected)
    assert len(seen) == 6


def test_rules_survive_a_recipe(patterns: Callable[[str], str]) -> None:
    source = adapter("sdxl")
    text = 'M00: 2\nBASE: ratio 9\n"*": 5\nM00: keep\n"OUT*": {energy: 0.9}\n"unet.*.attn1.*": knee\nOUT01: 1\n'
    rules = read_per_block(patterns(text), source.architecture, source.modules)
    data = json.loads(json.dumps(rules.to_data()))
    assert data == {
        "BASE": "ratio 9",
        "*": "rank 5",
        "M00": "keep",
        "OUT*": "energy 0.9",
        "unet.*.attn1.*": "knee",
        "OUT01": "rank 1",
    }
    again = from_mapping(data, source.architecture, source.modules)
    assert [again(module) for module in source.modules] == [rules(module) for module in source.modules]
    assert again.to_data() == rules.to_data()


def test_mappings_as_a_program_writes_them() -> None:
    rules = from_mapping({"M00": 16, "OUT*": {"energy": 0.9}}, architecture_of("sdxl"))
    assert rules.to_data() == {"M00": "rank 16", "OUT*": "energy 0.9"}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([["M00", 1]], FormatError),
        (None, FormatError),
        ({1: 2}, FormatError),
        ({"M00": [1]}, UsageError),
        ({"M00": True}, UsageError),
        ({"M00": float("nan")}, UsageError),
        ({"M01": 1}, UsageError),
    ],
)
def test_mappings_that_are_none(data: object, error: type[LoratoolError]) -> None:
    with pytest.raises(error):
        from_mapping(data, architecture_of("sd15"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unet.downblocks.1: 4", ["line 1", "did you mean 'unet.down_blocks.1'"]),
        ("M00: 4\nOUT03: size 1MiB", ["line 2", "OUT03", "'size'", "energy 0.95"]),
        ("M00: {energy: [1]}", ["line 1", "M00", "is no rule"]),
        ("M00: [4]", ["line 1", "M00", "is no rule"]),
        ("M00: &a [*a]", ["line 1", "is no rule"]),
        ("M00: &a {energy: *a}", ["line 1", "is no rule"]),
        ("- 4", ["no mapping", "energy 0.95"]),
        ("a: [", ["no YAML"]),
    ],
)
def test_bad_files(patterns: Callable[[str], str], text: str, words: list[str]) -> None:
    path = patterns(text)
    source = adapter("sd15")
    with pytest.raises(UsageError) as caught:
        read_per_block(path, source.architecture, source.modules)
    assert [word for word in [path, *words] if word not in str(caught.value)] == [], str(caught.value)


def test_a_fused_weight_has_one_rule(patterns: Callable[[str], str]) -> None:
    source = adapter("flux")
    fused = next(module for module in source.modules if module.targets[0].path.endswith("attn.to_q"))
    block = fused.targets[0].path.rpartition(".attn.")[0]
    with pytest.raises(UsageError) as caught:
        read_per_block(patterns(f"transformer.{block}.attn.to_q: 2"), source.architecture, source.modules)
    message = str(caught.value)
    for word in (fused.title, "rank 2 for", "the general one for", "--to diffusers", "rules.yaml"):
        assert word in message, message
    rules = read_per_block(patterns(f"transformer.{block}: 2"), source.architecture, source.modules)
    assert rules(fused) == Rule("rank", 2.0, "2")
    other = next(module for module in source.modules if block not in module.targets[0].path)
    assert rules(other) is None


def test_keep_is_the_rank_as_it_is_whatever_the_limits_say() -> None:
    one = Candidate((3.0, 2.0, 1.0, 0.0), 14**0.5, 4, 8, kernel=True, own=parse_rule("keep", ""))
    limits = Limits(max_rank=2, conv_rank=1)
    for rule in (parse_rule("rank", "1"), parse_rule("error", "0.9")):
        assert choose(rule, [one], limits) == [4]
    assert choose(parse_rule("size", "1B"), [one], limits, lambda ranks: 0) == [4]


# -- what blocks share ----------------------------------------------------------------------------------------------


def test_block_weights_survive_a_recipe(patterns: Callable[[str], str]) -> None:
    table = architecture_of("sdxl")
    for spec in ("OUTALL", "none", ",".join("0.5" * 1 for _ in range(12)), patterns("M00: 2\nM00: -1\nunet: 0.25")):
        weights = block_weights(spec, table)
        data = json.loads(json.dumps(weights.to_data()))
        assert data.keys() == {"entries", "rest"}
        again = BlockWeights.from_data(data, table)
        assert again.to_data() == data
        for module in adapter("sdxl").modules:
            assert again.of_module(module) == weights.of_module(module)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"entries": [], "rest": "1"},
        {"entries": [], "rest": True},
        {"entries": [], "rest": float("inf")},
        {"entries": [["a"]], "rest": 1},
        {"entries": [[1, 1]], "rest": 1},
        {"entries": [["a", "b"]], "rest": 1},
        {"entries": {"a": 1}, "rest": 1},
    ],
)
def test_weights_from_what_is_none(data: object) -> None:
    with pytest.raises(FormatError):
        BlockWeights.from_data(data, architecture_of("sdxl"))


def test_places_are_in_model_order_and_complete() -> None:
    source = adapter("sdxl")
    found = places(source)
    assert sorted(place for own in found.values() for place in own) == list(range(len(source.modules)))
    blocks = source.architecture.blocks
    assert blocks is not None
    assert list(found) == [label for label in blocks.labels if label in found]
    for label, own in found.items():
        assert {block_label(source.modules[i].targets[0], source.architecture) for i in own} == {label}
