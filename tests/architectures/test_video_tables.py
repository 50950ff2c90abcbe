"""The tables of video models and their kin against the contract, the committed schemas and the real model classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import make_video_schemas
from fixtures.make_schemas import FOLDER, Schema
from loratool.core.architecture import Architecture
from loratool.core.registry import architectures
from tests.contracts import check_architecture

SIZES = [
    pytest.param(identifier, title, component, id=f"{title} {component}")
    for identifier, sizes in make_video_schemas.MODELS.items()
    for title, components in sizes.items()
    for component in components
]
each_architecture = pytest.mark.parametrize("identifier", make_video_schemas.MODELS)
each_size = pytest.mark.parametrize(("identifier", "title", "component"), SIZES)


def size_of(identifier: str, title: str) -> Architecture:
    return next(size for size in architectures()[identifier].sizes if size.title == title)


def fixture_of(identifier: str, title: str, component: str) -> Schema:
    whole = json.loads((FOLDER / f"{identifier}.json").read_text(encoding="utf-8"))
    return make_video_schemas.unfolded(whole[title][component])


@each_architecture
def test_contract(identifier: str) -> None:
    check_architecture(architectures()[identifier])


@each_architecture
def test_every_size_and_component_has_a_schema(identifier: str) -> None:
    expected = {title: set(components) for title, components in make_video_schemas.MODELS[identifier].items()}
    assert {size.title: set(size.components) for size in architectures()[identifier].sizes} == expected


@each_size
def test_table_equals_fixture(identifier: str, title: str, component: str) -> None:
    canonical = next(iter(size_of(identifier, title).namings(component).values()))
    table = {
        name: [sum(target.rows for target in targets), *targets[0].shape[1:]] for name, targets in canonical.items()
    }
    assert table == fixture_of(identifier, title, component)


@each_size
def test_fixture_equals_real_class(identifier: str, title: str, component: str) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    real = make_video_schemas.MODELS[identifier][title][component]()
    assert real == fixture_of(identifier, title, component)
    assert make_video_schemas.unfolded(make_video_schemas.folded(real)) == real


@pytest.mark.parametrize(
    ("identifier", "name", "config"),
    [
        # What differs is no module's weight: a position embedding, how an image is put in, a bias, an embedding.
        ("wan", "WanTransformer3DModel", {**make_video_schemas.WAN_IMAGE_14B, "pos_embed_seq_len": 514}),
        ("hunyuan-video", "HunyuanVideoTransformer3DModel", {"image_condition_type": "token_replace"}),
    ],
    ids=["wan-first-last-frame", "hunyuan-image-to-video"],
)
def test_models_that_share_a_table(identifier: str, name: str, config: dict[str, object]) -> None:
    pytest.importorskip("diffusers")
    standard = architectures()[identifier]
    assert make_video_schemas._model(name, **config)() == fixture_of(identifier, standard.title, "transformer")


def test_what_the_plain_hunyuan_image_has_is_in_the_distilled_ones_table() -> None:
    pytest.importorskip("diffusers")
    plain = make_video_schemas._model("HunyuanImageTransformer2DModel", text_embed_2_dim=1472)()
    table = fixture_of("hunyuan-image", "HunyuanImage 2.1", "transformer")
    missing = table.keys() - plain.keys()
    assert plain.items() <= table.items()
    assert {name.split(".")[1] for name in missing} == {"timestep_embedder_r", "guidance_embedder"}


def test_framepack_has_the_blocks_of_hunyuan_video() -> None:
    pytest.importorskip("diffusers")
    framepack = make_video_schemas._model(
        "HunyuanVideoFramepackTransformer3DModel", has_image_proj=True, has_clean_x_embedder=True
    )()
    table = fixture_of("hunyuan-video", "HunyuanVideo", "transformer")
    assert table.items() <= framepack.items()
    assert {name.split(".")[0] for name in framepack.keys() - table.keys()} == {"image_projection", "clean_x_embedder"}


@pytest.mark.parametrize(
    ("identifier", "component", "layout", "key", "paths"),
    [
        ("wan", "transformer", "kohya", "lora_unet_blocks_39_cross_attn_k_img", ["blocks.39.attn2.add_k_proj"]),
        ("wan", "transformer", "comfyui", "diffusion_model.blocks.0.ffn.2", ["blocks.0.ffn.net.2"]),
        ("wan", "transformer_2", "diffusers", "transformer_2.blocks.0.attn1.to_q", ["blocks.0.attn1.to_q"]),
        (
            "hunyuan-video",
            "transformer",
            "kohya",
            "lora_unet_single_blocks_0_linear1",
            [f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        ),
        (
            "hunyuan-video",
            "transformer",
            "comfyui",
            "diffusion_model.double_blocks.0.txt_mlp.0",
            ["transformer_blocks.0.ff_context.net.0.proj"],
        ),
        (
            "hunyuan-image",
            "transformer",
            "kohya",
            "lora_unet_final_layer_adaLN_modulation_1",
            ["norm_out.linear:shift", "norm_out.linear:scale"],
        ),
        ("ltx-video", "transformer", "comfyui", "diffusion_model.adaln_single.linear", ["time_embed.linear"]),
        ("ltx2", "connectors", "comfyui", "text_embedding_projection.aggregate_embed", ["text_proj_in"]),
        (
            "cogvideox",
            "transformer",
            "kohya",
            "lora_unet__transformer_blocks_0_attn1_to_out_0",
            ["transformer_blocks.0.attn1.to_out.0"],
        ),
        (
            "cosmos1",
            "transformer",
            "comfyui",
            "diffusion_model.blocks.block3.blocks.1.block.attn.to_k.0",
            ["transformer_blocks.3.attn2.to_k"],
        ),
        (
            "anima",
            "text_conditioner",
            "kohya",
            "lora_unet_llm_adapter_blocks_0_cross_attn_o_proj",
            ["blocks.0.cross_attn.o_proj"],
        ),
        ("anima", "text_encoder", "kohya", "lora_te_layers_27_mlp_up_proj", ["layers.27.mlp.up_proj"]),
        (
            "anima",
            "text_encoder",
            "comfyui",
            "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj",
            ["layers.0.self_attn.q_proj"],
        ),
        ("krea2", "transformer", "kohya", "lora_unet_blocks_27_attn_gate", ["transformer_blocks.27.attn.to_gate"]),
    ],
)
def test_written_spellings(identifier: str, component: str, layout: str, key: str, paths: list[str]) -> None:
    table = architectures()[identifier]
    voice = table.writes[layout][component]
    separator = "_" if layout == "kohya" else "."
    (name,) = table.naming(component, voice.naming).spelled(key.removeprefix(voice.prefix), separator)
    assert key.startswith(voice.prefix)
    assert [target.path for target in table.naming(component, voice.naming)[name]] == paths


def test_tables_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from loratool.core.registry import architectures\n"
        f"for name in {list(make_video_schemas.MODELS)}:\n"
        "    for size in architectures()[name].sizes:\n"
        "        for component in size.components:\n"
        "            size.namings(component)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@each_architecture
def test_every_target_is_in_a_block(identifier: str) -> None:
    for size in architectures()[identifier].sizes:
        assert size.blocks is not None
        labels = {
            size.blocks.label_of(component, name)
            for component in size.components
            for name in size.naming(component, size.blocks.naming(component))
        }
        assert labels == set(size.blocks.labels)
        assert len({len(one) for one in size.blocks.lists}) == len(size.blocks.lists)
        assert all(set(one) <= labels for one in size.blocks.lists)
