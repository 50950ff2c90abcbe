"""The tables of SD 1.5, SDXL and Flux against the contract, the committed schemas and the real model classes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from fixtures import make_schemas
from loratool.architectures import flux, sd15, sdxl
from loratool.architectures._clip import ClipText, clip_namings, open_clip_namings
from loratool.architectures._flux import FluxTransformer, transformer_namings
from loratool.architectures._t5 import T5Encoder, t5_namings
from loratool.architectures._unet import UNet, unet_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.naming import Naming
from loratool.core.target import Target
from tests.contracts import check_architecture

ARCHITECTURES = [sd15.ARCHITECTURE, sdxl.ARCHITECTURE, flux.ARCHITECTURE]
COMPONENTS = [(architecture, component) for architecture in ARCHITECTURES for component in architecture.components]

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.id)
each_component = pytest.mark.parametrize(
    ("architecture", "component"),
    COMPONENTS,
    ids=[f"{architecture.id}-{component}" for architecture, component in COMPONENTS],
)


def table_schema(namings: Mapping[str, Naming]) -> dict[str, list[int]]:
    """Name -> shape of every weight in the canonical naming; finer targets are stacked."""
    canonical = next(iter(namings.values()))
    return {
        name: [sum(target.rows for target in targets), *targets[0].shape[1:]] for name, targets in canonical.items()
    }


@each_architecture
def test_contract(architecture: Architecture) -> None:
    check_architecture(architecture)


@each_component
def test_table_equals_fixture(architecture: Architecture, component: str) -> None:
    fixture = json.loads((make_schemas.FOLDER / f"{architecture.id}-{component}.json").read_text(encoding="utf-8"))
    assert table_schema(architecture.namings(component)) == fixture


@each_component
def test_fixture_equals_real_class(architecture: Architecture, component: str) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    name = f"{architecture.id}-{component}"
    fixture = json.loads((make_schemas.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert make_schemas.SCHEMAS[name]() == fixture


def test_hf_and_hf_short_are_the_names_of_transformers_before_and_after_5_6() -> None:
    transformers = pytest.importorskip("transformers")
    schema = make_schemas.schema_of(
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**make_schemas.CLIP_L))
    )
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    naming = "hf-short" if (major, minor) >= (5, 6) else "hf"
    assert set(sd15.ARCHITECTURE.naming("text_encoder", naming)) == set(schema)


SD21_UNET = UNet((320, 640, 1280, 1280), (1, 1, 1, 0), mid_depth=1, context=1024, linear_projection=True)
REFINER_UNET = UNet((384, 768, 1536, 1536), (0, 4, 4, 0), mid_depth=4, context=1280, linear_projection=True, added=2560)
TINY_UNET = UNet((8, 16, 24), (0, 1, 3), mid_depth=3, context=10, linear_projection=True, added=20, layers=1)


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param(
            SD21_UNET,
            {
                **make_schemas.SD15_UNET,
                "attention_head_dim": (5, 10, 20, 20),
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            },
            id="sd21",
        ),
        pytest.param(
            REFINER_UNET,
            {
                **make_schemas.SDXL_UNET,
                "block_out_channels": (384, 768, 1536, 1536),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": 4,
                "attention_head_dim": (6, 12, 24, 24),
                "cross_attention_dim": 1280,
                "projection_class_embeddings_input_dim": 2560,
            },
            id="refiner",
        ),
        pytest.param(
            TINY_UNET,
            {
                **make_schemas.SDXL_UNET,
                "block_out_channels": (8, 16, 24),
                "transformer_layers_per_block": (1, 1, 3),
                "attention_head_dim": 2,
                "norm_num_groups": 4,
                "cross_attention_dim": 10,
                "projection_class_embeddings_input_dim": 20,
                "layers_per_block": 1,
            },
            id="tiny",
        ),
    ],
)
def test_unet_generator_at_other_sizes(spec: UNet, changes: dict[str, object]) -> None:
    pytest.importorskip("diffusers")
    assert table_schema(unet_namings(spec)) == make_schemas.unet(**changes)


def test_clip_generator_at_other_sizes() -> None:
    pytest.importorskip("transformers")
    spec = ClipText(layers=3, width=8, mlp=20, projection=6, vocabulary=30, positions=9)
    config = {
        "hidden_size": 8,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 6,
        "vocab_size": 30,
        "max_position_embeddings": 9,
    }
    assert table_schema(open_clip_namings(spec, "text_encoder_2")) == make_schemas.clip_text_with_projection(**config)
    bare = ClipText(layers=3, width=8, mlp=20, vocabulary=30, positions=9)
    assert table_schema(clip_namings(bare, "text_encoder")) == make_schemas.clip_text(**config)


def test_t5_generator_at_other_sizes() -> None:
    pytest.importorskip("transformers")
    spec = T5Encoder(layers=2, width=8, inner=12, mlp=20, heads=3, vocabulary=30)
    config = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 20,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 30,
    }
    assert table_schema(t5_namings(spec, "text_encoder_2")) == make_schemas.t5_encoder(**config)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_flux_generator_at_other_sizes(guidance: bool) -> None:
    pytest.importorskip("diffusers")
    spec = FluxTransformer(double=2, single=3, width=16, head=8, channels=4, context=12, pooled=10, guidance=guidance)
    schema = make_schemas.flux_transformer(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=guidance,
    )
    assert table_schema(transformer_namings(spec)) == schema


@pytest.mark.parametrize(
    ("plugin", "component", "layout", "key", "paths"),
    [
        (sd15, "unet", "kohya", "lora_unet_mid_block_attentions_0_proj_in", ["mid_block.attentions.0.proj_in"]),
        (sd15, "unet", "comfyui", "diffusion_model_output_blocks_2_1_conv", ["up_blocks.0.upsamplers.0.conv"]),
        (sd15, "unet", "comfyui", "diffusion_model_output_blocks_5_2_conv", ["up_blocks.1.upsamplers.0.conv"]),
        (sdxl, "unet", "kohya", "lora_unet_label_emb_0_2", ["add_embedding.linear_2"]),
        (sdxl, "unet", "kohya", "lora_unet_input_blocks_3_0_op", ["down_blocks.0.downsamplers.0.conv"]),
        (sdxl, "unet", "kohya", "lora_unet_output_blocks_2_2_conv", ["up_blocks.0.upsamplers.0.conv"]),
        (sdxl, "text_encoder_2", "kohya", "lora_te2_text_projection", ["text_projection"]),
        (
            flux,
            "transformer",
            "kohya",
            "lora_unet_double_blocks_0_txt_attn_qkv",
            [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
        ),
        (
            flux,
            "transformer",
            "kohya",
            "lora_unet_final_layer_adaLN_modulation_1",
            ["norm_out.linear:shift", "norm_out.linear:scale"],
        ),
        (
            flux,
            "transformer",
            "diffusers",
            "transformer_norm_out_linear",
            ["norm_out.linear:scale", "norm_out.linear:shift"],
        ),
        (
            flux,
            "text_encoder_2",
            "comfyui",
            "text_encoders_t5xxl_transformer_encoder_block_0_layer_0_SelfAttention_q",
            ["encoder.block.0.layer.0.SelfAttention.q"],
        ),
    ],
)
def test_written_spellings(plugin: ModuleType, component: str, layout: str, key: str, paths: list[str]) -> None:
    table: Architecture = plugin.ARCHITECTURE
    voice = table.writes[layout][component]
    spoken = {
        f"{voice.prefix}{name}".replace(".", "_"): targets
        for name, targets in table.naming(component, voice.naming).items()
    }
    assert [target.path for target in spoken[key]] == paths


def test_components_shared_by_models_are_one_table() -> None:
    assert sd15.ARCHITECTURE.namings("text_encoder") is flux.ARCHITECTURE.namings("text_encoder")


def test_tables_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from loratool.architectures import flux, sd15, sdxl\n"
        "for plugin in (flux, sd15, sdxl):\n"
        "    for component in plugin.ARCHITECTURE.components:\n"
        "        plugin.ARCHITECTURE.namings(component)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def assert_noticed(message: str, **changes: object) -> None:
    with pytest.raises(AssertionError, match=message):
        check_architecture(dataclasses.replace(sdxl.ARCHITECTURE, **changes))  # type: ignore[arg-type]


def test_the_contract_notices_what_it_is_for() -> None:
    one_prefix = {"text_encoder": Voice("lora_te_", "hf"), "text_encoder_2": Voice("lora_te_", "hf")}
    assert_noticed("means two things", writes={"kohya": one_prefix}, reads={})
    assert_noticed("has no naming bfl", writes={"kohya": {"unet": Voice("lora_unet_", "bfl")}}, reads={})
    one_folder = {"text_encoder": Voice("", "hf"), "text_encoder_2": Voice("", "hf")}
    assert_noticed("two components have the key", checkpoints=(Checkpoint("single", one_folder),))
    left, right = (Target("model", f"norm.linear:{part}", (2, 3)) for part in ("left", "right"))
    uneven = {"diffusers": Naming({"norm.linear": (left, right)}), "ldm": Naming({"norm": (left,)})}
    assert_noticed("other targets", components={"model": lambda: uneven}, writes={}, reads={}, checkpoints=())
