"""Stable Diffusion 1.5 and XL against diffusers itself: its files are read, and what is written for it is applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from loratool.core.adapter import Adapter
from loratool.core.errors import NotRepresentable
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.oracles.models import (
    assert_diffusers_applies,
    assert_same,
    changes,
    clip_config,
    complaints,
    dense,
    keys_of,
    kohya_file,
    load,
    metadata_of,
    parameters,
    pipeline,
    same_file,
    saved,
    sd15_unet,
    shared,
    trained,
    wrapped,
)

UNET = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
ENCODER = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
PLAIN = {"r": 4, "lora_alpha": 4}
HALF = {"r": 4, "lora_alpha": 2}
PATTERNS = {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn1.to_k": 2, "to_v": 8}, "alpha_pattern": {"to_q": 1}}
ENCODER_PATTERNS = {"r": 3, "lora_alpha": 5, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.*.v_proj": 9}}
CONVS = {"target_modules": ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "proj_in", "time_emb_proj"]}


@dataclass(frozen=True)
class Training:
    """How a file is made with diffusers: architecture, LoraConfig fields by component, and the way it is saved."""

    architecture: str
    configs: Mapping[str, Mapping[str, Any]]
    metadata: bool = True
    old_spelling: bool = False


TRAININGS = {
    "plain": Training("sd15", {"unet": {**UNET, **PLAIN}, "text_encoder": {**ENCODER, **PLAIN}}, metadata=False),
    "script": Training(
        "sd15", {"unet": {**UNET, **PLAIN}, "text_encoder": {**ENCODER, **PLAIN}}, metadata=False, old_spelling=True
    ),
    "script-metadata": Training("sd15", {"unet": {**UNET, **HALF}}, old_spelling=True),
    "alpha": Training("sd15", {"unet": {**UNET, **HALF}, "text_encoder": {**ENCODER, "r": 3, "lora_alpha": 8}}),
    "patterns": Training("sd15", {"unet": {**UNET, **PATTERNS}, "text_encoder": {**ENCODER, **ENCODER_PATTERNS}}),
    "ranks-without-metadata": Training("sd15", {"unet": {**UNET, **PATTERNS}}, metadata=False),
    "rslora": Training("sd15", {"unet": {**UNET, **PATTERNS, "use_rslora": True}}),
    "convs": Training("sd15", {"unet": {**CONVS, **HALF}}),
    "sdxl": Training(
        "sdxl",
        {
            "unet": {"target_modules": ["attn2.to_q", "attn2.to_k"], **HALF, "rank_pattern": {"0.attn2.to_k": 2}},
            "text_encoder": {**ENCODER, **HALF},
            "text_encoder_2": {"target_modules": ["q_proj", "fc1", "text_projection"], **PLAIN},
        },
    ),
    "sdxl-plain": Training(
        "sdxl", {"unet": {"target_modules": ["attn2.to_v"], **PLAIN}}, metadata=False, old_spelling=True
    ),
}
each_training = pytest.mark.parametrize("name", list(TRAININGS))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files that diffusers writes, each made once."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            training = TRAININGS[name]
            pipe = pipeline(training.architecture)
            trained(pipe, training.configs)
            folder = tmp_path_factory.mktemp(name)
            made[name] = saved(
                pipe, folder, training.configs, metadata=training.metadata, old_spelling=training.old_spelling
            )
        return made[name]

    return write


def applied(architecture: str, path: Path) -> tuple[dict[tuple[str, str], torch.Tensor], list[str]]:
    """What diffusers makes of a file: the change of every weight, and its warnings."""
    pipe = pipeline(architecture)
    before = parameters(pipe)
    said = load(pipe, path)
    return changes(before, parameters(pipe)), said


@each_training
def test_a_file_of_diffusers_is_read(name: str, written: Callable[[str], Path]) -> None:
    adapter = open_adapter(written(name))
    assert (adapter.layout, adapter.architecture.id) == ("diffusers", TRAININGS[name].architecture)
    assert not adapter.extras
    # The models are narrow: only their names tell what they are, and those are Stable Diffusion 2's as well.
    assert all("Stable Diffusion 2.x as well" in note for note in adapter.notes)
    assert set(adapter.components) == set(TRAININGS[name].configs)
    found, _ = applied(TRAININGS[name].architecture, written(name))
    assert_same(found, dense(adapter))


@each_training
@pytest.mark.parametrize("to", ["kohya", "comfyui", "peft"])
def test_a_file_of_diffusers_goes_there_and_back(
    name: str, to: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    there = tmp_path / ("folder" if to == "peft" else "there.safetensors")
    back = tmp_path / "back.safetensors"
    report = convert_file(written(name), to, there)
    assert report.proof is not None and report.proof.bitwise == report.proof.compared == report.modules_before
    convert_file(there, "diffusers", back)
    same_file(written(name), back)


@pytest.mark.parametrize("name", ["script", "script-metadata", "rslora", "sdxl"])
def test_a_file_of_diffusers_by_way_of_kohya_in_todays_spelling(
    name: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without the memory of the original: what a stranger's kohya file of the same update becomes."""
    there, bare, out = (tmp_path / f"{i}.safetensors" for i in range(3))
    convert_file(written(name), "kohya", there)
    save_file(load_file(there), bare)
    convert_file(bare, "diffusers", out)
    assert_diffusers_applies(out, open_adapter(written(name)), TRAININGS[name].architecture)


def unet_only(stem: str) -> bool:
    return not stem.startswith("lora_te")


KOHYA = {
    "sd15-everything": ("sd15", {"ranks": (2, 4, 8), "alphas": (1.0, 3.0, 4.0)}),
    "sd15-some": ("sd15", {"share": 0.3, "ranks": (1, 5), "alphas": (0.5, 5.0), "seed": 1}),
    "sd15-one-rank": ("sd15", {"share": 0.3, "alphas": (4.0,), "seed": 2}),
    "sd15-ranks-only": ("sd15", {"share": 0.3, "ranks": (4,), "alphas": (16.0,), "seed": 3}),
    "sd15-one-module": ("sd15", {"only": lambda stem: stem == "lora_unet_conv_in"}),
    "sdxl-everything": ("sdxl", {"ranks": (4,), "alphas": (3.0,)}),
    "sdxl-some": ("sdxl", {"share": 0.1, "ranks": (2, 4), "alphas": (1.0, 3.0), "seed": 4}),
    "sdxl-unet": ("sdxl", {"share": 0.1, "alphas": (4.0,), "only": unet_only, "seed": 5}),
}


@pytest.mark.parametrize("case", list(KOHYA))
def test_diffusers_applies_what_is_made_of_kohya(case: str, tmp_path: Path) -> None:
    architecture, options = KOHYA[case]
    source = kohya_file(tmp_path / "kohya.safetensors", architecture, **options)
    convert_file(source, "diffusers", tmp_path / "out.safetensors", architecture=architecture)
    adapter = open_adapter(source, architecture=architecture)
    assert not adapter.extras
    assert_diffusers_applies(tmp_path / "out.safetensors", adapter, architecture)


@pytest.mark.parametrize(
    ("name", "architecture"), [("sd15_lora", "sd15"), ("sd15_locon", "sd15"), ("sdxl_lora", "sdxl")]
)
def test_diffusers_applies_what_is_made_of_files_of_sd_scripts(name: str, architecture: str, tmp_path: Path) -> None:
    source, out = shared("kohya", f"{name}.safetensors"), tmp_path / "out.safetensors"
    convert_file(source, "diffusers", out)
    assert_diffusers_applies(out, open_adapter(source), architecture)


def test_diffusers_reads_the_kohya_names_written_for_sdxl(tmp_path: Path) -> None:
    """Trap 9: SGM's block names, which diffusers maps back by a table of its own."""
    pipe = pipeline("sdxl")
    configs = {"unet": {"target_modules": ["attn1.to_v", "proj_in", "conv1"], "r": 4, "lora_alpha": 4}}
    trained(pipe, configs)
    source, out = saved(pipe, tmp_path, configs, metadata=True), tmp_path / "kohya.safetensors"
    convert_file(source, "kohya", out)
    assert all(key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for key in keys_of(out))
    found, said = applied("sdxl", out)
    assert said == []
    assert_same(found, dense(open_adapter(source)))


def test_diffusers_reads_the_kohya_names_that_are_written_for_sd15(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    convert_file(written("plain"), "kohya", tmp_path / "kohya.safetensors")
    found, said = applied("sd15", tmp_path / "kohya.safetensors")
    assert said == []
    assert_same(found, dense(open_adapter(written("plain"))))


# -- the really trained file ---------------------------------------------------------------------------------------


def test_the_trained_file_loads_in_a_unet_of_full_width(tmp_path: Path) -> None:
    source = shared("real", "lora_disney.safetensors")
    adapter = open_adapter(source)
    assert (adapter.layout, adapter.architecture.id) == ("cloneofsimo", "sd15")
    assert set(adapter.extras) == {"<s1>", "<s2>"} and 2 * len(adapter.modules) + 2 == len(keys_of(source))
    out = tmp_path / "diffusers.safetensors"
    convert_file(source, "diffusers", out)
    convert_file(source, "peft", tmp_path / "folder")
    convert_file(tmp_path / "folder", "kohya", tmp_path / "kohya.safetensors")
    convert_file(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "again.safetensors")
    again, first = load_file(tmp_path / "again.safetensors"), load_file(out)
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)

    pipe = pipeline("sd15")
    with torch.device("meta"):  # 3.4 GB of weights that nobody needs to see that every key finds its module
        pipe.unet = sd15_unet(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
    pipe.text_encoder = CLIPTextModel(clip_config(12, 768))
    with complaints() as said:
        pipe.load_lora_weights(str(out))
    assert said == []
    expected = dense(adapter)
    assert wrapped(pipe) == expected.keys()
    layers = dict(pipe.text_encoder.named_modules())
    for (component, path), delta in expected.items():
        if component == "text_encoder":  # what lies on the meta device has no values
            pair = layers[path]
            up, down = pair.lora_B["default_0"].weight.detach(), pair.lora_A["default_0"].weight.detach()
            assert (up @ down * pair.scaling["default_0"] - delta).norm() <= 1e-6 * delta.norm()


# -- DoRA ----------------------------------------------------------------------------------------------------------


def with_dora(adapter: Adapter, before: Mapping[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """The change of every weight by DoRA's formula: magnitude * (W + delta) / ||W + delta||, by output row, less W."""
    found = {}
    for module in adapter.modules:
        (target,) = module.targets
        key = target.component, target.path.removeprefix("text_model.")
        weight = before[key].double()
        moved = weight + module.delta().double()
        rows = (-1, *(1,) * (weight.dim() - 1))
        assert module.magnitude is not None
        magnitude = module.magnitude.load().double().reshape(rows)
        found[key] = magnitude * moved / moved.flatten(1).norm(dim=1).reshape(rows) - weight
    return found


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_diffusers_applies_the_dora_of_kohya(architecture: str, tmp_path: Path) -> None:
    """Traps 17 and 21: rows' magnitudes under the name and in the shape of PEFT; `dora_scale` would be dropped."""
    share = 0.4 if architecture == "sd15" else 0.1
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, architecture, share=share, ranks=(2, 4), alphas=(1.0, 3.0), dora=True)
    convert_file(source, "diffusers", out)
    tensors = load_file(out)
    assert not any("dora_scale" in key for key in tensors)
    shapes = {tensor.dim() for key, tensor in tensors.items() if ".lora_magnitude_vector" in key}
    assert shapes == {1, 4}
    pipe = pipeline(architecture, zero=False)
    before = parameters(pipe)
    assert load(pipe, out) == []
    adapter = open_adapter(source)
    assert_same(changes(before, parameters(pipe)), with_dora(adapter, before), tolerance=2e-6)


@pytest.mark.parametrize("metadata", [True, False])
def test_the_dora_of_diffusers_is_read_and_comes_back(metadata: bool, tmp_path: Path) -> None:
    configs = {"unet": {"target_modules": ["to_q", "conv1", "proj_in"], "r": 4, "lora_alpha": 4, "use_dora": True}}
    trainer = pipeline("sd15")
    trained(trainer, configs)
    source = saved(trainer, tmp_path, configs, metadata=metadata)
    adapter = open_adapter(source)
    assert not adapter.extras and all(module.magnitude_per_row for module in adapter.modules)
    pipe = pipeline("sd15", zero=False)
    before = parameters(pipe)
    load(pipe, source)
    assert_same(changes(before, parameters(pipe)), with_dora(adapter, before), tolerance=2e-6)
    for to in ("kohya", "comfyui", "peft"):
        there, back = tmp_path / f"{to}-there.safetensors", tmp_path / f"{to}-back.safetensors"
        there = tmp_path / "folder" if to == "peft" else there
        convert_file(source, to, there)
        convert_file(there, "diffusers", back)
        same_file(source, back)


def test_trap_21_columns_magnitudes_are_refused(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "kohya.safetensors", "sd15", only=lambda s: s.endswith("ff_net_2"), dora=True)
    tensors = load_file(source)
    for key in [key for key in tensors if key.endswith(".dora_scale")]:
        tensors[key] = torch.ones(1, tensors[key.replace("dora_scale", "lora_down.weight")].shape[1])
    save_file(tensors, source)
    with pytest.raises(NotRepresentable, match="DoRA magnitude per input"):
        convert_file(source, "diffusers", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# -- traps that touch these models ---------------------------------------------------------------------------------


def test_trap_1_text_model_is_read_either_way_and_always_written(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "kohya.safetensors"
    kohya_file(source, "sdxl", only=lambda stem: "_layers_1_" in stem)
    convert_file(source, "diffusers", tmp_path / "long.safetensors")
    long = load_file(tmp_path / "long.safetensors")
    encoders = ("text_encoder.text_model.", "text_encoder_2.text_model.")
    assert all(key.startswith(encoders) for key in long)
    short = {key.replace(".text_model.", "."): tensor for key, tensor in long.items()}
    save_file(short, tmp_path / "short.safetensors", metadata_of(tmp_path / "long.safetensors"))
    adapter = open_adapter(tmp_path / "short.safetensors")
    assert not adapter.extras
    assert_same(dense(adapter), dense(open_adapter(source)))


def test_trap_2_the_scripts_mix_of_spellings(tmp_path: Path) -> None:
    source, out = shared("diffusers-0.36", "sd15_script.safetensors"), tmp_path / "out.safetensors"
    adapter = open_adapter(source)
    assert (adapter.layout, adapter.architecture.id, dict(adapter.extras)) == ("diffusers", "sd15", {})
    found, _ = applied("sd15", source)
    assert_same(found, dense(adapter))
    convert_file(source, "kohya", tmp_path / "kohya.safetensors")
    convert_file(tmp_path / "kohya.safetensors", "diffusers", out)
    same_file(source, out)


def test_trap_3_one_spelling_throughout(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "kohya.safetensors", "sd15", alphas=(4.0,))
    convert_file(source, "diffusers", tmp_path / "out.safetensors")
    ends = {key.rpartition(".lora_")[2] for key in keys_of(tmp_path / "out.safetensors")}
    assert ends == {"A.weight", "B.weight"}


def test_trap_4_alpha_is_in_the_header_or_was_forgotten(tmp_path: Path) -> None:
    configs = {"unet": {**UNET, **HALF}}
    pipe = pipeline("sd15")
    trained(pipe, configs)
    forgotten = open_adapter(saved(pipe, tmp_path / "without", configs, metadata=False))
    kept = open_adapter(saved(pipe, tmp_path / "with", configs, metadata=True))
    assert {module.scale for module in forgotten.modules} == {1.0}
    assert {module.scale for module in kept.modules} == {0.5}


def test_trap_5_mixed_alphas(tmp_path: Path) -> None:
    def only_k(stem: str) -> bool:
        return stem.startswith("lora_unet") and stem.endswith(("to_k", "to_q"))

    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, "sd15", only=only_k, alphas=(1.0, 2.0, 4.0))
    convert_file(source, "diffusers", out)
    patterns = json.loads(metadata_of(out)["lora_adapter_metadata"])["unet.alpha_pattern"]
    assert patterns and not any("lora" in name or "processor" in name for name in patterns)
    assert_diffusers_applies(out, open_adapter(source), "sd15")


def test_trap_6_the_broken_kohya_export_of_diffusers(tmp_path: Path) -> None:
    source, out = shared("diffusers-0.36", "sdxl_script_kohya.safetensors"), tmp_path / "out.safetensors"
    adapter = open_adapter(source)
    assert (adapter.layout, adapter.architecture.id, dict(adapter.extras)) == ("kohya", "sdxl", {})
    assert {module.scale for module in adapter.modules} == {1.0}
    convert_file(source, "diffusers", out)
    assert_diffusers_applies(out, adapter, "sdxl")


def test_trap_7_its_names_and_its_alpha_of_integers(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    configs = {"unet": {**UNET, **PLAIN}, "text_encoder": {**ENCODER, **PLAIN}}
    trained(pipe, configs)
    original = saved(pipe, tmp_path, configs, metadata=False)
    exported = {key: t.contiguous() for key, t in convert_state_dict_to_kohya(load_file(original)).items()}
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    save_file(exported, source)
    assert any(key.startswith("lora_te1_") for key in exported)
    assert {tensor.dtype for key, tensor in exported.items() if key.endswith(".alpha")} == {torch.int64}
    adapter = open_adapter(source)
    assert (adapter.layout, adapter.architecture.id, dict(adapter.extras)) == ("kohya", "sd15", {})
    assert_same(dense(adapter), dense(open_adapter(original)))
    convert_file(source, "diffusers", out)
    assert_diffusers_applies(out, open_adapter(original), "sd15")
    convert_file(out, "kohya", tmp_path / "back.safetensors")
    same_file(source, tmp_path / "back.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trap_8_alpha_has_no_dimension_and_the_files_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    configs = {"unet": {**UNET, **HALF}}
    trained(pipe, configs)
    source = saved(pipe, tmp_path, configs, metadata=True)
    save_file({key: tensor.to(dtype) for key, tensor in load_file(source).items()}, source, metadata_of(source))
    convert_file(source, "kohya", tmp_path / "kohya.safetensors")
    tensors = load_file(tmp_path / "kohya.safetensors")
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert len(alphas) == len(tensors) // 3
    assert {(alpha.dtype, alpha.dim(), alpha.item()) for alpha in alphas} == {(dtype, 0, 2.0)}


def test_an_encoder_of_which_diffusers_finds_no_rank(tmp_path: Path) -> None:
    """diffusers looks for ranks in attention and MLP only: beside those the header has to say them."""
    stems = ("lora_te2_text_projection", "lora_te2_text_model_encoder_layers_3_self_attn_q_proj")
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, "sdxl", only=lambda stem: stem in stems, alphas=(4.0,))
    convert_file(source, "diffusers", out)
    assert_diffusers_applies(out, open_adapter(source), "sdxl")
