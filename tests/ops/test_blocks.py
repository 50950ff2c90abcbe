"""Block weights: labels cover the models, lists and presets are the community's, patterns, and norms are true."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Adapter
from loratool.core.blocks import runs
from loratool.core.errors import FormatError, UsageError
from loratool.core.module import Module
from loratool.core.registry import architectures, families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.ops.blocks import BlockWeights, block_label, block_weights, blocks_of
from loratool.ops.open import open_adapter, understand
from tests.builders import ARCHITECTURES, LAYOUTS, Part, architecture_of, build, random_parts, typical_parts, weight

each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)

OUT_03_11 = ["OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"]
ORDER_17 = ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *OUT_03_11]
ORDER_12 = ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"]

COMMUNITY = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}
"""The presets as sd-webui-lora-block-weight ships them."""


def targets_of(architecture: str) -> list[Target]:
    """All targets of a model, norms too."""
    table = architecture_of(architecture)
    return [
        target
        for component in table.components
        for targets in next(iter(table.namings(component).values())).values()
        for target in targets
    ]


def labels_of(architecture: str) -> dict[str, str]:
    """component.path -> label."""
    table = architecture_of(architecture)
    return {f"{t.component}.{t.path}": block_label(t, table) for t in targets_of(architecture)}


def kept(weights: BlockWeights, architecture: str) -> dict[str, float]:
    """component.path -> weight of the targets whose weight is not 0."""
    found = {f"{t.component}.{t.path}": weights.of(t) for t in targets_of(architecture)}
    return {name: value for name, value in found.items() if value}


def only(order: list[str], **values: float) -> str:
    """A list of zeros but for these labels."""
    return ",".join(str(values.get(label, 0)) for label in order)


# -- labels ---------------------------------------------------------------------------------------------------------


@each_model
def test_labels_cover_every_target(architecture: str) -> None:
    blocks = architecture_of(architecture).blocks
    assert blocks is not None
    assert set(labels_of(architecture).values()) == set(blocks.labels)
    assert len(set(blocks.labels)) == len(blocks.labels)
    assert all(len(set(labels)) == len(labels) for labels in blocks.lists)
    assert len({len(labels) for labels in blocks.lists}) == len(blocks.lists), "the number of values names the list"
    assert any(set(blocks.labels) <= set(labels) for labels in blocks.lists), "one list has all blocks"


@pytest.mark.parametrize(
    ("architecture", "name", "label"),
    [
        ("sd15", "text_encoder.text_model.encoder.layers.11.mlp.fc1", "BASE"),
        ("sd15", "unet.conv_in", "IN00"),
        ("sd15", "unet.time_embedding.linear_1", "IN00"),
        ("sd15", "unet.down_blocks.0.attentions.0.proj_in", "IN01"),
        ("sd15", "unet.down_blocks.0.downsamplers.0.conv", "IN03"),
        ("sd15", "unet.down_blocks.3.resnets.1.conv1", "IN11"),
        ("sd15", "unet.mid_block.attentions.0.proj_in", "M00"),
        ("sd15", "unet.up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("sd15", "unet.up_blocks.3.attentions.2.proj_out", "OUT11"),
        ("sd15", "unet.conv_out", "OUT11"),
        ("sdxl", "text_encoder_2.text_projection", "BASE"),
        ("sdxl", "unet.add_embedding.linear_2", "IN00"),
        ("sdxl", "unet.down_blocks.1.attentions.0.proj_in", "IN04"),
        ("sdxl", "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k", "IN08"),
        ("sdxl", "unet.up_blocks.0.attentions.0.proj_in", "OUT00"),
        ("sdxl", "unet.conv_norm_out", "OUT08"),
        ("flux", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "CLIP"),
        ("flux", "text_encoder_2.shared", "T5"),
        ("flux", "transformer.time_text_embed.guidance_embedder.linear_1", "IN"),
        ("flux", "transformer.transformer_blocks.7.attn.to_q", "D07"),
        ("flux", "transformer.single_transformer_blocks.37.proj_out", "S37"),
        ("flux", "transformer.norm_out.linear:shift", "OUT"),
    ],
)
def test_labels_written_out(architecture: str, name: str, label: str) -> None:
    assert labels_of(architecture)[name] == label


def test_labels_of_sd15_are_those_of_sd_scripts() -> None:
    """The arithmetic of sd-scripts' svd_merge_lora.py: level and layer give the number of the block."""
    for name, label in labels_of("sd15").items():
        parts = name.split(".")
        if parts[1] not in ("down_blocks", "up_blocks"):
            continue
        level, kind, layer = int(parts[2]), parts[3], int(parts[4])
        if parts[1] == "down_blocks":
            assert label == f"IN{3 * level + (3 if kind == 'downsamplers' else layer + 1):02d}"
        else:
            assert label == f"OUT{3 * level + (2 if kind == 'upsamplers' else layer):02d}"


def test_labels_without_a_table_are_paths() -> None:
    generic, unknown = architectures()["generic"], architectures()["unknown"]
    for path, label in [
        ("layers.10.mlp.up", "model.layers.10"),
        ("encoder.block.3.layer.0.q", "model.encoder.block.3"),
        ("lm_head", "model.lm_head"),
        ("proj.to_out.0", "model.proj"),
    ]:
        assert block_label(Target("model", path, (4, 4)), generic) == label
    assert block_label(Target("unet", "blocks_10_attn_q", (4, 4)), unknown) == "unet.blocks_10"
    assert block_label(Target("unet", "img2img_in", (4, 4)), unknown) == "unet.img2img_in"


def test_runs() -> None:
    assert runs(["BASE", "IN00", "IN01", "IN02", "IN04", "IN05", "M00"]) == "BASE IN00-IN02 IN04 IN05 M00"
    assert runs(["D17", "D18", "S00", "OUT"]) == "D17 D18 S00 OUT"
    assert runs([]) == ""


# -- lists and presets ----------------------------------------------------------------------------------------------


def test_a_list_reaches_its_block_and_no_other() -> None:
    weights = block_weights(only(ORDER_17, OUT05=0.25), architecture_of("sd15"))
    reached = kept(weights, "sd15")
    assert set(reached.values()) == {0.25}
    places = {".".join(name.split(".")[1:5]) for name in reached}
    assert places == {f"up_blocks.1.{part}" for part in ("resnets.2", "attentions.2", "upsamplers.0")}
    assert weights.left_out == ("IN00", "IN03", "IN06", "IN09", "IN10", "IN11", "OUT00", "OUT01", "OUT02")


def test_a_list_of_sdxl() -> None:
    weights = block_weights(only(ORDER_12, BASE=1, IN04=-2), architecture_of("sdxl"))
    reached = kept(weights, "sdxl")
    assert {name.split(".")[0] for name, value in reached.items() if value == 1} == {"text_encoder", "text_encoder_2"}
    assert {".".join(name.split(".")[:5]) for name, value in reached.items() if value == -2} == {
        "unet.down_blocks.1.resnets.0",
        "unet.down_blocks.1.attentions.0",
    }


@pytest.mark.parametrize(
    ("architecture", "count", "left_out"),
    [
        ("sd15", 26, ""),
        ("sdxl", 20, ""),
        ("sdxl", 26, ""),
        ("sdxl", 17, "IN00 IN03 IN06 OUT00 OUT01 OUT02"),
        ("sdxl", 12, "IN00 IN01 IN02 IN03 IN06 OUT06 OUT07 OUT08"),
        ("flux", 61, ""),
        ("flux", 57, "CLIP T5 IN OUT"),
    ],
)
def test_ones_reach_all_but_what_is_left_out(architecture: str, count: int, left_out: str) -> None:
    weights = block_weights(",".join("1" * count), architecture_of(architecture))
    assert weights.left_out == tuple(left_out.split())
    labels = labels_of(architecture)
    assert kept(weights, architecture).keys() == {n for n, label in labels.items() if label not in weights.left_out}


@pytest.mark.parametrize("count", [57, 61])
def test_values_of_flux_are_in_order(count: int) -> None:
    values = [float(i + 1) for i in range(count)]
    weights = block_weights(",".join(map(str, values)), architecture_of("flux"))
    extra = 3 if count == 61 else 0
    of = kept(weights, "flux")
    assert of["transformer.transformer_blocks.0.attn.to_q"] == extra + 1
    assert of["transformer.transformer_blocks.18.attn.to_q"] == extra + 19
    assert of["transformer.single_transformer_blocks.0.attn.to_q"] == extra + 20
    assert of["transformer.single_transformer_blocks.37.attn.to_q"] == extra + 57
    if count == 61:
        assert of["text_encoder.text_model.final_layer_norm"] == 1
        assert of["text_encoder_2.encoder.final_layer_norm"] == 2
        assert (of["transformer.x_embedder"], of["transformer.proj_out"]) == (3, 61)


@pytest.mark.parametrize("name", COMMUNITY)
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_presets_are_the_communitys(architecture: str, name: str) -> None:
    table = architecture_of(architecture)
    preset, written = block_weights(name.lower(), table), block_weights(COMMUNITY[name], table)
    everywhere = name in ("ALL", "ALL0.5")  # a list of 17 has no place for the other blocks; these presets do
    for target in targets_of(architecture):
        if everywhere and block_label(target, table) not in ORDER_17:
            assert preset.of(target) == (1.0 if name == "ALL" else 0.5)
        else:
            assert preset.of(target) == written.of(target)
    assert preset.left_out == ()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "generic", "unknown"])
def test_three_presets_for_every_model(architecture: str) -> None:
    for name, value in (("NONE", 0.0), ("all", 1.0), ("All0.5", 0.5)):
        weights = block_weights(name, architectures()[architecture])
        assert weights.of(Target("model", "layers.0.q", (4, 4)) if architecture in ("generic", "unknown") else
                          targets_of(architecture)[0]) == value  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "architecture", "words"),
    [
        ("MIDDD", "sd15", ["Stable Diffusion 1.x", "'MIDDD'", "did you mean MIDD?", "OUTALL"]),
        ("INS", "flux", ["FLUX.1", "'INS'", "known: NONE, ALL, ALL0.5"]),
        ("OUTALL", "generic", ["a model without a table", "known: NONE, ALL, ALL0.5"]),
        ("", "sd15", ["''"]),
        ("nan", "sd15", ["'nan'"]),
        ("1", "sd15", ["1 value for", "17: BASE IN01", "26: BASE IN00-IN11"]),
        (",".join("1" * 12), "sd15", ["12 values for", "17: BASE IN01 IN02 IN04"]),
        (",".join("1" * 19), "flux", ["19 values for", "57: D00-D18 S00-S37", "61: CLIP T5 IN"]),
        ("1,1,1", "generic", ["has no list of blocks", ".yaml"]),
        (only(ORDER_17).replace("0", "x", 1), "sd15", ["for BASE", "'x'"]),
        (only(ORDER_17, IN02=math.nan), "sd15", ["for IN02", "'nan'"]),
        (only(ORDER_17, M00=math.inf), "sd15", ["for M00", "'inf'"]),
        (only(ORDER_17) + ",", "sd15", ["18 values"]),
    ],
)
def test_bad_specs(spec: str, architecture: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        block_weights(spec, architectures()[architecture])
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


# -- patterns -------------------------------------------------------------------------------------------------------


@pytest.fixture
def patterns(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "blocks.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_the_example_of_the_issue(patterns: Callable[[str], str]) -> None:
    weights = block_weights(patterns('"unet.*.attn2.*": 0.5\ntext_encoder: 0\n'), architecture_of("sdxl"))
    for target in targets_of("sdxl"):
        expected = 0.0 if target.component == "text_encoder" else 0.5 if ".attn2." in target.path else 1.0
        assert weights.of(target) == expected, target


@pytest.mark.parametrize(
    ("pattern", "reaches"),
    [
        ("IN04", lambda name, label: label == "IN04"),
        ("OUT*", lambda name, label: label.startswith("OUT")),
        ("OUT0[0-2]", lambda name, label: label in ("OUT00", "OUT01", "OUT02")),
        ("text_encoder*", lambda name, label: label == "BASE"),
        ("unet.down_blocks.1", lambda name, label: name.startswith("unet.down_blocks.1.")),
        ("unet.conv_in", lambda name, label: name == "unet.conv_in"),
        ("unet.*.attn1", lambda name, label: ".attn1." in name),
        ("*", lambda name, label: True),
    ],
)
def test_what_a_pattern_reaches(
    patterns: Callable[[str], str], pattern: str, reaches: Callable[[str, str], bool]
) -> None:
    weights = block_weights(patterns(f'"{pattern}": 0.0\n'), architecture_of("sdxl"))
    table = architecture_of("sdxl")
    for target in targets_of("sdxl"):
        expected = reaches(f"{target.component}.{target.path}", block_label(target, table))
        assert weights.of(target) == (0.0 if expected else 1.0), target


def test_the_last_line_wins_even_if_it_is_there_twice(patterns: Callable[[str], str]) -> None:
    weights = block_weights(patterns('M00: 2\n"*": 0.5\nM00: 1e-1\nD0?: -1\n'.replace("D0?", "IN0?")),
                            architecture_of("sd15"))  # fmt: skip
    of = {block_label(t, architecture_of("sd15")): weights.of(t) for t in targets_of("sd15")}
    assert (of["M00"], of["BASE"], of["IN03"], of["IN10"]) == (0.1, 0.5, -1.0, 0.5)


def test_parts_of_a_fused_weight_have_their_own(patterns: Callable[[str], str]) -> None:
    adapter = understand(build(typical_parts("flux", "kohya"), "kohya")).adapter
    weights = block_weights(patterns('"transformer.*.to_q": 0\nD00: 0.5\nOUT: 3'), adapter.architecture)
    for module in adapter.modules:
        values = weights.of_module(module)
        assert len(values) == len(module.targets)
        for target, value in zip(module.targets, values, strict=True):
            label = block_label(target, adapter.architecture)
            expected = 0.5 if label == "D00" else 3 if label == "OUT" else 0 if target.path.endswith("to_q") else 1
            assert value == expected
    final = next(module for module in adapter.modules if len(module.targets) > 1)
    assert weights.of_module(final)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unet.downblocks.1: 0", ["line 1", "unet.downblocks.1", "'unet.down_blocks.1'"]),
        ("M00: 1\ndown_blocks.0: 0", ["line 2", "'unet.down_blocks.0'"]),
        ("D00: 1", ["line 1", "D00", "Stable Diffusion 1.x"]),
        ("OUT12: 1", ["OUT12", "did you mean 'OUT"]),
        ("text_encoder_2: 1", ["did you mean 'text_encoder'"]),
        ("M00: high", ["line 1", "M00", "'high'"]),
        ("M00: true", ["line 1", "'true'"]),
        ("M00: .nan", ["line 1", "'.nan'"]),
        ("M00: nan", ["line 1", "'nan'"]),
        ("M00:", ["line 1", "''"]),
        ("M00: [1]", ["line 1", "M00", "a collection"]),
        ("\n? [a, b]\n: 1", ["line 2", "a pattern is one text"]),
        ("- 1\n- 2", ["no mapping"]),
        ("", ["no mapping"]),
        ("just text", ["no mapping"]),
        ("a: 1\nb: [", ["is no YAML"]),
        ("a: 1\n---\nb: 1", ["is no YAML"]),
        ("*: 1", ["is no YAML"]),
        ("[" * 3000, ["is no YAML"]),
        ("!!python/object/apply:os.system ['true']", ["no mapping"]),
    ],
)
def test_bad_files(patterns: Callable[[str], str], text: str, words: list[str]) -> None:
    path = patterns(text)
    with pytest.raises(UsageError) as caught:
        block_weights(path, architecture_of("sd15"))
    assert [word for word in [path, *words] if word not in str(caught.value)] == [], str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        block_weights(str(tmp_path / "none.yml"), architecture_of("sd15"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UsageError, match="no YAML"):
        block_weights(str(tmp_path / "binary.yaml"), architecture_of("sd15"))


def lora_module(component: str, path: str, seed: int = 0) -> Module:
    """A pair without a table."""
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((6, 2), (2, 4)))
    factors = {"up": LazyTensor.from_torch(up), "down": LazyTensor.from_torch(down)}
    return Module((Target(component, path, (6, 4)),), families()["lora"], factors)


def test_patterns_without_a_table_are_checked_against_the_file(patterns: Callable[[str], str]) -> None:
    generic = architectures()["generic"]
    modules = [lora_module("model", f"layers.{i}.q") for i in (1, 10)]
    weights = block_weights(patterns("model.layers.1: 0"), generic, modules)
    assert [weights.of_module(module) for module in modules] == [(0.0,), (1.0,)]
    with pytest.raises(UsageError, match=r"of the file; did you mean 'model\.layers\.1'"):
        block_weights(patterns("model.layer.1: 0"), generic, modules)
    assert block_weights(patterns("model.layer.1: 0"), generic).entries  # nothing to check against


def test_flattened_names_end_at_underscores(patterns: Callable[[str], str]) -> None:
    unknown = architectures()["unknown"]
    modules = [lora_module("unet", f"blocks_{i}_attn") for i in (1, 10)]
    modules += [lora_module(f"text_encoder{tail}", "layers_0") for tail in ("", "_2")]
    weights = block_weights(patterns("unet.blocks_1: 0\ntext_encoder: 3"), unknown, modules)
    assert [weights.of_module(module)[0] for module in modules] == [0.0, 1.0, 3.0, 1.0]


# -- what a file holds ----------------------------------------------------------------------------------------------


def dense_norms(adapter: Adapter) -> dict[str, float]:
    """label -> Frobenius norm, from dense updates."""
    squares: dict[str, float] = {}
    for module in adapter.modules:
        label = block_label(module.targets[0], adapter.architecture)
        squares[label] = squares.get(label, 0.0) + float(module.delta().double().square().sum())
    return {label: math.sqrt(square) for label, square in squares.items()}


def assert_true(adapter: Adapter) -> None:
    table = blocks_of(adapter)
    dense = dense_norms(adapter)
    assert sum(block.modules for block in table.blocks) == len(adapter.modules)
    total = sum(norm**2 for norm in dense.values())
    for block in table.blocks:
        assert block.norm == pytest.approx(dense.get(block.label, 0.0), rel=1e-5, abs=1e-12)
        assert block.share == pytest.approx(dense.get(block.label, 0.0) ** 2 / total if total else 0.0, rel=1e-4)
        assert bool(block.modules) == (block.label in dense) == bool(block.present)
        assert set(block.present) <= set(block.names)


@each_model
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_those_of_the_dense_updates(architecture: str, layout: str) -> None:
    parts = random_parts(random.Random(7), architecture, layout, count=3, alphas=(1.0, 4.0))
    adapter = understand(build(parts, layout), architecture_of(architecture)).adapter
    assert_true(adapter)


@each_model
def test_the_table_is_in_model_order_and_complete(architecture: str) -> None:
    table = blocks_of(understand(build(typical_parts(architecture, "kohya"), "kohya")).adapter)
    blocks = architecture_of(architecture).blocks
    assert blocks is not None
    assert tuple(block.label for block in table.blocks) == blocks.labels
    assert table.lists == blocks.lists
    assert table.fitting in blocks.lists


@each_model
def test_names_are_patterns_for_the_block_and_nothing_else(architecture: str, patterns: Callable[[str], str]) -> None:
    table = blocks_of(understand(build(typical_parts(architecture, "kohya"), "kohya")).adapter)
    for block in table.blocks[:: max(1, len(table.blocks) // 12)]:
        weights = block_weights(
            patterns("".join(f"{name}: 0\n" for name in block.names)), architecture_of(architecture)
        )
        labels = {block_label(t, architecture_of(architecture)) for t in targets_of(architecture) if not weights.of(t)}
        assert labels == {block.label}


def test_the_fitting_list_has_a_place_for_every_block() -> None:
    attention = Part(weight("sdxl", "kohya", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"), 2, 1.0)
    resnet = Part(weight("sdxl", "kohya", "input_blocks.1.0.in_layers.2"), 2, 1.0)
    sizes = []
    for parts in ([attention], [attention, resnet]):
        fitting = blocks_of(understand(build(parts, "kohya"), architecture_of("sdxl")).adapter).fitting
        sizes.append(len(fitting or ()))
    assert sizes == [12, 17]


def test_zero_and_broken_updates() -> None:
    module = lora_module("model", "layers.0.q")
    zero = {"up": LazyTensor.from_torch(torch.zeros(6, 2)), "down": module.factors["down"]}
    odd = {"up": LazyTensor.from_torch(torch.full((6, 2), math.nan)), "down": module.factors["down"]}
    generic = architectures()["generic"]
    for factors, norm, share in ((zero, 0.0, 0.0), (odd, math.nan, math.nan)):
        (block,) = blocks_of(Adapter((Module(module.targets, module.family, factors),), generic, "diffusers")).blocks
        assert (block.norm, block.share) == pytest.approx((norm, share), nan_ok=True)


def test_blocks_without_a_table_are_in_the_order_of_numbers() -> None:
    modules = tuple(lora_module("model", f"layers.{i}.q", i) for i in (1, 10, 2))
    adapter = Adapter(modules, architectures()["generic"], "diffusers")
    table = blocks_of(adapter)
    assert [block.label for block in table.blocks] == ["model.layers.1", "model.layers.2", "model.layers.10"]
    assert [block.present for block in table.blocks] == [(block.label,) for block in table.blocks]
    assert (table.lists, table.fitting, table.presets) == ((), None, ("NONE", "ALL", "ALL0.5"))
    assert_true(adapter)


def test_other_kinds_of_factors() -> None:
    generator = torch.Generator().manual_seed(3)

    def tensors(**shapes: tuple[int, ...]) -> dict[str, LazyTensor]:
        return {role: LazyTensor.from_torch(torch.randn(*s, generator=generator)) for role, s in shapes.items()}

    lora, lokr = families()["lora"], families()["lokr"]
    modules = (
        Module((Target("model", "a.0.conv", (6, 4, 3, 3)),), lora, tensors(up=(6, 2, 1, 1), down=(2, 4, 3, 3)), 3.0),
        Module(
            (Target("model", "a.1.tucker", (6, 4, 3, 3)),),
            lora,
            tensors(up=(6, 2, 1, 1), mid=(2, 2, 3, 3), down=(2, 4, 1, 1)),
            1.0,
        ),
        Module((Target("model", "a.2.emb", (9, 4)),), lora, tensors(embedding_A=(2, 9), embedding_B=(4, 2)), 1.0),
        Module((Target("model", "a.3.kron", (6, 4)),), lokr, tensors(w1=(2, 2), w2=(3, 2)), 1.0),
        Module((Target("model", "a.4.bias", (6, 4)),), lora, tensors(up=(6, 2), down=(2, 4), bias=(6,)), -2.0),
    )
    assert_true(Adapter(modules, architectures()["generic"], "diffusers"))


def shared(name: str) -> Path:
    models = pytest.importorskip("tests.oracles.models")
    path: Path = models.SHARED_DATA / "kohya" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.mark.parametrize(
    ("name", "count", "empty"),
    [
        ("sd15_lora.safetensors", 17, "IN00 IN03 IN06 IN09 IN10 IN11 OUT00 OUT01 OUT02"),
        ("sd15_locon.safetensors", 26, "IN00"),
        ("sdxl_lora.safetensors", 12, "IN00 IN01 IN02 IN03 IN06 OUT06 OUT07 OUT08"),
    ],
)
def test_files_of_sd_scripts(name: str, count: int, empty: str) -> None:
    adapter = open_adapter(shared(name))
    table = blocks_of(adapter)
    assert len(table.fitting or ()) == count
    assert [block.label for block in table.blocks if not block.modules] == empty.split()
    assert_true(adapter)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf, True, None, "1"])
def test_data_that_is_no_weight(value: object) -> None:
    model = architecture_of("sd15")
    for data in ({"entries": [["unet", value]], "rest": 1.0}, {"entries": [], "rest": value}):
        with pytest.raises(FormatError, match="block weights"):
            BlockWeights.from_data(data, model)
