"""The rules of the program `diffusers` against diffusers itself: what they say loads, loads, and as they say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from loratool.core.registry import architectures, programs
from loratool.ops.conformance import DIFFERENTLY, FULLY, NOT, conform
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.oracles.applied import assert_as_told, load_with_diffusers, wide_flux
from tests.oracles.models import kohya_file, pipeline, shared

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]
SHARE = {"sd15": 0.12, "sdxl": 0.08, "flux": 0.5}


def verdict(path: Path, architecture: str, *, wide: bool = False) -> str:
    """The verdict on a file, after the library was seen to do what the rules say."""
    adapter = open_adapter(path, architecture=architecture)
    found = conform(adapter, programs()["diffusers"])
    pipe = wide_flux() if wide else pipeline(architecture)
    assert_as_told(found, lambda: load_with_diffusers(pipe, path))
    return found.verdict


def written(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def stem(key: str) -> str:
    return key.rpartition(".lora_")[0]


def renamed(*pairs: tuple[str, str]) -> Change:
    def change(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {re.sub(old, new, key): tensor for key, tensor in tensors.items()}
        return tensors

    return change


def with_beside(suffix: str, make: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> Change:
    """Another tensor beside every up factor whose key has `only` in it."""

    def change(tensors: Tensors) -> Tensors:
        ups = {k: t for k, t in tensors.items() if k.endswith((".lora_B.weight", ".lora_up.weight")) and only in k}
        return {**tensors, **{stem(key) + suffix: make(up) for key, up in ups.items()}}

    return change


def without(pattern: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}


def only(pattern: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if re.search(pattern, key)}


def also(more: Tensors) -> Change:
    return lambda tensors: {**tensors, **more}


def every_other_alpha(tensors: Tensors) -> Tensors:
    alphas = sorted(key for key in tensors if key.endswith(".alpha"))[::2]
    return {key: tensor for key, tensor in tensors.items() if key not in alphas}


def tucker(tensors: Tensors) -> Tensors:
    """One convolution as LyCORIS's Tucker decomposition."""
    key = next(k for k, t in tensors.items() if k.endswith("lora_down.weight") and t.shape[2:] == (3, 3))
    rank, columns = tensors[key].shape[:2]
    mid = key.replace("lora_down", "lora_mid")
    return {**tensors, key: torch.randn(rank, columns, 1, 1), mid: torch.randn(rank, rank, 3, 3)}


def one_lokr(tensors: Tensors) -> Tensors:
    """One attention projection as LoKr."""
    key = next(k for k in tensors if re.search(r"to[._]q\.lora_(down|A)\.weight", k))
    up = tensors[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]
    left, right = up.shape[0] // 8, tensors[key].shape[1] // 8
    rest = {k: t for k, t in tensors.items() if stem(k) != stem(key)}
    return {**rest, f"{stem(key)}.lokr_w1": torch.randn(8, 8), f"{stem(key)}.lokr_w2": torch.randn(left, right)}


def same(tensors: Tensors) -> Tensors:
    return tensors


def magnitudes(up: torch.Tensor) -> torch.Tensor:
    """As PEFT shapes them."""
    return torch.rand((1, up.shape[0], 1, 1) if up.dim() == 4 else (up.shape[0],)) + 0.5


def dora_in(component: str, suffix: str) -> Change:
    """Magnitudes in one component, which is all that the file is for."""
    add = with_beside(f".lora_magnitude_vector{suffix}", magnitudes)
    return lambda tensors: add(only(rf"^{component}\.")(tensors))


A_DOWN, B_UP = (r"\.lora_A\.", ".lora_down."), (r"\.lora_B\.", ".lora_up.")
DOWN, UP = (r"\.lora_A\.", ".lora.down."), (r"\.lora_B\.", ".lora.up.")
LINEAR_DOWN = (r"^(text.*)\.lora_A\.", r"\1.lora_linear_layer.down.")
LINEAR_UP = (r"^(text.*)\.lora_B\.", r"\1.lora_linear_layer.up.")
OLD_ATTENTION = (
    (r"(attn\d)\.(to_[qkv]|to_out)(\.0)?\.lora_A", r"\1.processor.\2_lora.down"),
    (r"(attn\d)\.(to_[qkv]|to_out)(\.0)?\.lora_B", r"\1.processor.\2_lora.up"),
)

STABLE_DIFFUSION: dict[str, tuple[str, Change, str]] = {
    # name: (layout that the file starts in, what is done to it, the verdict)
    "kohya": ("kohya", same, FULLY),
    "kohya, no alpha": ("kohya", without(r"\.alpha$"), FULLY),
    "kohya, some alphas": ("kohya", every_other_alpha, DIFFERENTLY),
    "kohya, DoRA": ("kohya", with_beside(".dora_scale", lambda up: up[:, :1].abs() + 0.5), DIFFERENTLY),
    "kohya, Tucker": ("kohya", tucker, NOT),
    "kohya, one LoKr": ("kohya", one_lokr, NOT),
    "kohya, bundled embedding": ("kohya", also({"bundle_emb.x.string_to_param.*": torch.ones(2, 4)}), NOT),
    "kohya, lora_A": ("kohya", renamed((r"lora_down", "lora_A"), (r"lora_up", "lora_B")), NOT),
    "kohya, lora.up": ("kohya", renamed((r"\.lora_down", ".lora.down"), (r"\.lora_up", ".lora.up")), NOT),
    "kohya, to_k_lora": ("kohya", renamed((r"(to_k)\.lora_(up|down)", r"\1_lora.\2")), NOT),
    "kohya, lora_magnitude_vector": ("kohya", with_beside(".lora_magnitude_vector", magnitudes), NOT),
    "kohya, UNet only": ("kohya", only(r"^lora_unet_"), FULLY),
    "kohya, encoders without out_proj": ("kohya", without(r"out_proj"), DIFFERENTLY),
    "kohya, encoders' q, k, v": ("kohya", without(r"^lora_te.*(out_proj|mlp|text_projection)"), NOT),
    "kohya, encoders without attention": ("kohya", without(r"self_attn"), FULLY),
    "diffusers": ("diffusers", same, FULLY),
    "diffusers, alpha beside": ("diffusers", with_beside(".alpha", lambda up: torch.tensor(2.0)), NOT),
    "diffusers, scripts' spelling": ("diffusers", renamed(LINEAR_DOWN, LINEAR_UP, DOWN, UP), FULLY),
    "diffusers, lora.up in encoders": ("diffusers", renamed(DOWN, UP), NOT),
    "diffusers, lora_up": ("diffusers", renamed(A_DOWN, B_UP), NOT),
    "diffusers, old attention": ("diffusers", lambda t: renamed(*OLD_ATTENTION)(only(r"^unet.*attn")(t)), FULLY),
    "diffusers, encoders without attention": ("diffusers", without(r"self_attn"), NOT),
    "diffusers, scripts' encoders without attention": (
        "diffusers",
        lambda t: renamed(LINEAR_DOWN, LINEAR_UP, DOWN, UP)(without(r"self_attn")(t)),
        FULLY,
    ),
    "diffusers, no prefix": ("diffusers", lambda t: renamed((r"^unet\.", ""))(only(r"^unet")(t)), NOT),
    "diffusers, a key without lora": ("diffusers", also({"x.y": torch.ones(2)}), NOT),
    "diffusers, an unknown module": (
        "diffusers",
        also({"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(3, 2)}),
        DIFFERENTLY,
    ),
    "diffusers, DoRA": ("diffusers", with_beside(".lora_magnitude_vector.weight", magnitudes), FULLY),
    "diffusers, bare DoRA in the UNet": ("diffusers", dora_in("unet", ""), FULLY),
    "diffusers, bare DoRA in encoders": ("diffusers", dora_in("text_encoder", ""), DIFFERENTLY),
    "diffusers, dora_scale": ("diffusers", with_beside(".dora_scale", lambda up: up[:, :1].abs() + 0.5), DIFFERENTLY),
    "comfyui": ("comfyui", without(r"\.alpha$"), NOT),
    "comfyui, alpha": ("comfyui", same, NOT),
}


# What SDXL's names and second encoder make different.
SDXL = ("kohya", "kohya, some alphas", "kohya, encoders without out_proj", "diffusers", "diffusers, scripts' spelling")


@pytest.mark.parametrize(
    ("architecture", "name"), [*(("sd15", name) for name in STABLE_DIFFUSION), *(("sdxl", name) for name in SDXL)]
)
def test_stable_diffusion(architecture: str, name: str, tmp_path: Path) -> None:
    layout, change, expected = STABLE_DIFFUSION[name]
    source = kohya_file(tmp_path / "k.safetensors", architecture, share=SHARE[architecture], alphas=(2.0,), seed=3)
    if layout != "kohya":
        convert_file(source, layout, tmp_path / "start.safetensors")
        source = tmp_path / "start.safetensors"
    file = written(change(load_file(source)), tmp_path / "x.safetensors")
    assert verdict(file, architecture) == expected


@pytest.mark.parametrize("ranks", [(4,), (2, 3)], ids=["one rank", "two ranks"])
def test_mixed_alphas(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """The strengths are those that the library ends up with, in the UNet and in both encoders."""
    source = kohya_file(tmp_path / "k.safetensors", "sdxl", share=0.1, ranks=ranks, alphas=(1.0, 2.0, 2.0, 4.0), seed=5)
    assert verdict(source, "sdxl") == DIFFERENTLY
    convert_file(source, "diffusers", tmp_path / "x.safetensors")
    assert verdict(tmp_path / "x.safetensors", "sdxl") == FULLY


def test_the_second_encoder_without_its_prefix(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "k.safetensors", "sdxl", share=0.08, seed=3)
    convert_file(source, "diffusers", tmp_path / "d.safetensors")
    short = {key.replace("text_model.", ""): tensor for key, tensor in load_file(tmp_path / "d.safetensors").items()}
    assert verdict(written(short, tmp_path / "x.safetensors"), "sdxl") == NOT


def test_kohya_with_diffusers_block_names(tmp_path: Path) -> None:
    """Old exports have `lora_unet_down_blocks_` for SDXL, too."""
    source = kohya_file(tmp_path / "k.safetensors", "sdxl", share=0.05, seed=3, only=lambda stem: "unet" in stem)
    table = architectures()["sdxl"]
    flat = {
        f"lora_unet_{name.replace('.', '_')}": f"lora_unet_{targets[0].module_path.replace('.', '_')}"
        for name, targets in table.naming("unet", "ldm").items()
    }
    tensors = {
        key.replace(key.partition(".")[0], flat[key.partition(".")[0]]): t for key, t in load_file(source).items()
    }
    assert verdict(written(tensors, tmp_path / "x.safetensors"), "sdxl") == FULLY


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_kohya_encoders_without_their_prefix(architecture: str, tmp_path: Path) -> None:
    """Today's CLIP has no `text_model.`; SDXL's second encoder still has."""
    source = kohya_file(tmp_path / "k.safetensors", architecture, share=0.1, seed=3, only=lambda s: "_layers_" in s)
    short = {key.replace("text_model_", ""): tensor for key, tensor in load_file(source).items()}
    assert verdict(written(short, tmp_path / "x.safetensors"), architecture) == (
        FULLY if architecture == "sd15" else NOT
    )


def test_a_file_whose_first_key_is_spelled_otherwise(tmp_path: Path) -> None:
    def some(stem: str) -> bool:
        return stem.startswith("lora_unet_conv") or "down_blocks_0_attentions" in stem

    source = kohya_file(tmp_path / "k.safetensors", "sd15", only=some)
    convert_file(source, "diffusers", tmp_path / "d.safetensors")
    tensors = load_file(tmp_path / "d.safetensors")
    new, old = only(r"conv_in")(tensors), renamed(DOWN, UP)(without("conv_in")(tensors))
    assert verdict(written({**old, **new}, tmp_path / "x.safetensors"), "sd15") == DIFFERENTLY


def test_an_encoder_of_which_it_finds_no_rank(tmp_path: Path) -> None:
    def projection(stem: str) -> bool:
        return stem == "lora_te2_text_projection"

    source = kohya_file(tmp_path / "k.safetensors", "sdxl", only=projection, alphas=(4.0,))
    assert verdict(source, "sdxl") == NOT
    convert_file(source, "diffusers", tmp_path / "d.safetensors", architecture="sdxl")
    assert verdict(tmp_path / "d.safetensors", "sdxl") == NOT


# -- FLUX.1 ---------------------------------------------------------------------------------------------------------


def mixed(values: tuple[float, ...], share: int = 0) -> Change:
    """alphas beside the factors, in turn; every `share`-th module has none."""

    def change(tensors: Tensors) -> Tensors:
        stems = sorted(stem(key) for key in tensors if ".lora_B." in key)
        kept = {s: values[i % len(values)] for i, s in enumerate(stems) if not share or i % share}
        return {**tensors, **{f"{s}.alpha": torch.tensor(value) for s, value in kept.items()}}

    return change


T5 = {
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.ones(4, 4096),
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight": torch.ones(4096, 4),
}
BESIDE = with_beside(".alpha", lambda up: torch.tensor(2.0))

FLUX: dict[str, tuple[Change, str]] = {
    "as written": (same, FULLY),
    "alpha beside": (BESIDE, FULLY),
    "mixed alphas": (mixed((1.0, 1.0, 2.0)), DIFFERENTLY),
    "some alphas": (mixed((1.0,), 3), DIFFERENTLY),
    "lora.up": (lambda t: renamed(DOWN, UP)(only("^transformer")(t)), FULLY),
    "lora.up in the encoder": (renamed(DOWN, UP), NOT),
    "lora_up": (lambda t: renamed(A_DOWN, B_UP)(only("^transformer")(t)), FULLY),
    "lora_up, alpha": (lambda t: renamed(A_DOWN, B_UP)(BESIDE(only("^transformer")(t))), DIFFERENTLY),
    "lora_up in the encoder": (renamed(A_DOWN, B_UP), DIFFERENTLY),
    "no prefix": (lambda t: renamed((r"^transformer\.", ""))(only("^transformer")(t)), NOT),
    "T5": (also(T5), DIFFERENTLY),
    "a bundled embedding": (also({"bundle_emb.x": torch.ones(2)}), DIFFERENTLY),
    "DoRA": (with_beside(".lora_magnitude_vector.weight", magnitudes), FULLY),
    "DoRA, bare": (with_beside(".lora_magnitude_vector", magnitudes), DIFFERENTLY),
    "DoRA, dora_scale": (with_beside(".dora_scale", lambda up: up[:, :1].abs() + 0.5), DIFFERENTLY),
    "one LoKr": (one_lokr, DIFFERENTLY),
    "bias": (with_beside(".lora_B.bias", lambda up: torch.ones(up.shape[0])), FULLY),
}


@pytest.mark.parametrize("name", FLUX)
def test_flux_in_its_own_layout(name: str, tmp_path: Path) -> None:
    change, expected = FLUX[name]
    source = kohya_file(tmp_path / "k.safetensors", "flux", share=SHARE["flux"], alphas=(4.0,), seed=3)
    convert_file(source, "diffusers", tmp_path / "d.safetensors")
    file = written(change(load_file(tmp_path / "d.safetensors")), tmp_path / "x.safetensors")
    assert verdict(file, "flux") == expected


WIDTH = 3072
BLOCKS = {
    **{f"double_blocks.0.{stream}_mod.lin": (6 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_attn.qkv": (3 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_attn.proj": (WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mlp.0": (4 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mlp.2": (WIDTH, 4 * WIDTH) for stream in ("img", "txt")},
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
    "single_blocks.0.modulation.lin": (3 * WIDTH, WIDTH),
}
ENDS = {
    "img_in": (WIDTH, 64),
    "txt_in": (WIDTH, 4096),
    "time_in.in_layer": (WIDTH, 256),
    "vector_in.out_layer": (WIDTH, WIDTH),
    "guidance_in.in_layer": (WIDTH, 256),
    "final_layer.linear": (64, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}
SPLIT = {
    "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.ff.net.0.proj": (4 * WIDTH, WIDTH),
    "single_transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "single_transformer_blocks.0.proj_mlp": (4 * WIDTH, WIDTH),
}
CLIP = {
    "text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    "text_model.encoder.layers.0.self_attn.out_proj": (768, 768),
    "text_model.encoder.layers.1.mlp.fc1": (3072, 768),
}


def made(
    names: Mapping[str, tuple[int, int]], prefix: str, separator: str = "_", alpha: float | None = 2.0, **suffixes: str
) -> Tensors:
    """A file of rank 4 with these names behind a prefix."""
    tensors = {}
    for name, (out, columns) in names.items():
        stem = prefix + name.replace(".", separator)
        tensors[f"{stem}.{suffixes.get('down', 'lora_down')}.weight"] = torch.randn(4, columns)
        tensors[f"{stem}.{suffixes.get('up', 'lora_up')}.weight"] = torch.randn(out, 4)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(**options: str | float | None) -> Tensors:
    return made(BLOCKS, "diffusion_model.", ".", **options)  # type: ignore[arg-type]


WIDE: dict[str, tuple[Callable[[], Tensors], str]] = {
    "kohya": (lambda: {**made(BLOCKS, "lora_unet_"), **made(CLIP, "lora_te1_")}, FULLY),
    "kohya, no alpha": (lambda: {**made(BLOCKS, "lora_unet_", alpha=None), **made(CLIP, "lora_te1_")}, FULLY),
    "kohya, mixed alphas": (lambda: {**made(BLOCKS, "lora_unet_", alpha=1.0), **made(CLIP, "lora_te1_")}, FULLY),
    "kohya, outside the blocks": (lambda: made({**BLOCKS, **ENDS}, "lora_unet_"), DIFFERENTLY),
    "kohya, T5": (
        lambda: {
            **made(BLOCKS, "lora_unet_"),
            **made({"encoder.block.0.layer.0.SelfAttention.q": (4096, 4096)}, "lora_te3_"),
        },
        DIFFERENTLY,
    ),
    "kohya, DoRA": (
        lambda: {**made(BLOCKS, "lora_unet_"), "lora_unet_single_blocks_0_linear2.dora_scale": torch.ones(WIDTH, 1)},
        DIFFERENTLY,
    ),
    "kohya, one LoKr": (
        lambda: {
            **made({name: BLOCKS[name] for name in list(BLOCKS)[:-1]}, "lora_unet_"),
            "lora_unet_single_blocks_0_modulation_lin.lokr_w1": torch.ones(3, 1),
            "lora_unet_single_blocks_0_modulation_lin.lokr_w2": torch.ones(WIDTH, WIDTH),
        },
        NOT,
    ),
    "kohya, diffusers' names": (lambda: made(SPLIT, "lora_unet_"), NOT),
    "kohya, OneTrainer's names": (lambda: made(SPLIT, "lora_transformer_"), NOT),
    "kohya, lycoris_": (lambda: made(SPLIT, "lycoris_"), NOT),
    "comfyui": (lambda: dotted(down="lora_A", up="lora_B", alpha=None), NOT),
    "comfyui, alpha": (lambda: dotted(down="lora_A", up="lora_B"), NOT),
    "comfyui, lora_down": (dotted, FULLY),
    "comfyui, OMI": (lambda: made({"double_blocks.0.img_attn.qkv.0": (WIDTH, WIDTH)}, "transformer.", "."), NOT),
}


@pytest.mark.parametrize("name", WIDE)
def test_flux_at_full_width(name: str, tmp_path: Path) -> None:
    make, expected = WIDE[name]
    torch.manual_seed(0)
    assert verdict(written(make(), tmp_path / "x.safetensors"), "flux", wide=True) == expected


def test_the_kohya_export_of_diffusers_scripts() -> None:
    """Of SDXL with diffusers 0.36: it does not read its own file."""
    assert verdict(shared("diffusers-0.36", "sdxl_script_kohya.safetensors"), "sdxl") == NOT


def test_peft_folders_are_passed_over(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "k.safetensors", "sd15", share=0.1, seed=3)
    convert_file(source, "peft", tmp_path / "folder")
    assert verdict(tmp_path / "folder", "sd15") == NOT


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
def test_what_it_writes_it_reads(architecture: str) -> None:
    """`convert --for` chooses a layout that every model here has a voice for."""
    (layout,) = programs()["diffusers"].layouts_for(architecture)
    assert layout in architectures()[architecture].writes
