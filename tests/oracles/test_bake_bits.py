"""What is baked, bit for bit: (W in float32 + sum of strength * delta) cast once, computed plainly here by torch.

The weights have the real models' names and widths. Where rows of a fused weight lie is written down here, not taken
from the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.core.registry import methods
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.convert_file import convert_file
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from tests.oracles.models import kohya_file, pipeline
from tests.oracles.single_files import single_file

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

SDXL_UNET, SDXL_CLIP = "model.diffusion_model", "conditioner.embedders.1.model"
KOHYA_CLIP = "lora_te2_text_model_encoder_layers_3_self_attn"
WIDTH = 3072


def values(shape: Sequence[int], seed: int, size: float, dtype: torch.dtype) -> torch.Tensor:
    """Random values."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def base_file(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Path:
    """A checkpoint that holds these tensors."""
    save_file({key: values(shape, seed, 0.03, dtype) for seed, (key, shape) in enumerate(shapes.items())}, path)
    return path


def lora_file(
    path: Path, shapes: Mapping[str, Shape], ends: tuple[str, str], rank: int, alpha: float | None, seed: int = 100
) -> Path:
    """A LoRA in bfloat16, with keys `name + ends` (up, down) and, for kohya, alphas; ranks are `rank` and up."""
    tensors: Tensors = {}
    for index, (name, (out, columns, *kernel)) in enumerate(shapes.items()):
        up = values((out, rank + index, *(1,) * len(kernel)), seed + 2 * index, 0.1, torch.bfloat16)
        down = values((rank + index, columns, *kernel), seed + 2 * index + 1, 0.1, torch.bfloat16)
        tensors |= {name + ends[0]: up, name + ends[1]: down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


KOHYA = (".lora_up.weight", ".lora_down.weight")
DIFFUSERS = (".lora_B.weight", ".lora_A.weight")


def deltas(path: Path) -> Tensors:
    """The update of every module by the path of its first target, as a module itself gives it."""
    return {module.targets[0].path: module.delta() for module in open_adapter(path).modules}


def baked(base: Path, asked: Sequence[tuple[Path, float]], output: Path) -> Tensors:
    """The tensors after baking."""
    report = bake_file(base, [Asked(str(path), strength) for path, strength in asked], output, Options())
    assert not report.unmatched
    return load_file(output)


def assert_bits(found: Tensors, expected: Tensors) -> None:
    """The same keys, dtypes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        different = int((found[key] != tensor).sum())
        assert not different, f"{key}: {different} of {tensor.numel()} values are others"


SDXL: dict[str, Shape] = {
    f"{SDXL_UNET}.input_blocks.8.0.in_layers.2.weight": (1280, 1280, 3, 3),
    f"{SDXL_UNET}.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    f"{SDXL_UNET}.input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight": (5120, 640),
    f"{SDXL_CLIP}.transformer.resblocks.3.attn.in_proj_weight": (3840, 1280),
    f"{SDXL_CLIP}.text_projection": (1280, 1280),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}
SDXL_LORA: dict[str, Shape] = {
    "lora_unet_input_blocks_8_0_in_layers_2": (1280, 1280, 3, 3),
    "lora_unet_input_blocks_4_0_skip_connection": (640, 320, 1, 1),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj": (5120, 640),
    f"{KOHYA_CLIP}_q_proj": (1280, 1280),
    f"{KOHYA_CLIP}_k_proj": (1280, 1280),
    f"{KOHYA_CLIP}_v_proj": (1280, 1280),
    "lora_te2_text_projection": (1280, 1280),
}


def sdxl_updates(path: Path) -> Tensors:
    """The update of each tensor of `SDXL`: q, k, v one below the other, the projection on its side."""
    found = deltas(path)
    layer = "text_model.encoder.layers.3.self_attn"
    conv, skip, linear, fused, projection, _ = SDXL
    return {
        conv: found["down_blocks.2.resnets.1.conv1"],
        skip: found["down_blocks.1.resnets.0.conv_shortcut"],
        linear: found["down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"],
        fused: torch.cat([found[f"{layer}.{part}_proj"] for part in "qkv"]),
        projection: found["text_projection"].T,
    }


@each_dtype
def test_sdxl(dtype: torch.dtype, tmp_path: Path) -> None:
    """A 3x3 convolution, 1x1, linear, OpenCLIP's fused q, k, v and its transposed projection."""
    base = base_file(tmp_path / "base.safetensors", SDXL, dtype)
    lora = lora_file(tmp_path / "lora.safetensors", SDXL_LORA, KOHYA, 16, 5.0)
    found = baked(base, [(lora, 0.7)], tmp_path / "baked.safetensors")
    before, updates = load_file(base), sdxl_updates(lora)
    expected = {k: (w.float() + 0.7 * updates[k]).to(dtype) if k in updates else w for k, w in before.items()}
    assert_bits(found, expected)


@each_dtype
def test_two_adapters_are_added_in_order_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", SDXL, dtype)
    first = lora_file(tmp_path / "first.safetensors", SDXL_LORA, KOHYA, 8, 8.0)
    second = lora_file(tmp_path / "second.safetensors", SDXL_LORA, KOHYA, 3, 1.0, seed=500)
    found = baked(base, [(first, 1.0), (second, -0.35)], tmp_path / "baked.safetensors")
    before, one, other = load_file(base), sdxl_updates(first), sdxl_updates(second)
    expected = {
        key: (weight.float() + one[key] + -0.35 * other[key]).to(dtype) if key in one else weight
        for key, weight in before.items()
    }
    assert_bits(found, expected)


FUSED, MODULATION = "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"
PARTS = ("to_q", "to_k", "to_v")
SPLIT = [f"transformer_blocks.0.attn.{part}" for part in PARTS]
BFL: dict[str, Shape] = {f"{FUSED}.weight": (3 * WIDTH, WIDTH), f"{MODULATION}.weight": (2 * WIDTH, WIDTH)}
SEPARATE: dict[str, Shape] = {
    **{f"{name}.weight": (WIDTH, WIDTH) for name in SPLIT},
    "norm_out.linear.weight": (2 * WIDTH, WIDTH),
}


@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [*(("", dtype) for dtype in DTYPES.values()), ("model.diffusion_model.", torch.bfloat16)],
    ids=[*DTYPES, "prefixed"],
)
def test_flux_separate_modules_into_fused_weights(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """q, k, v of different ranks into one tensor; diffusers stacks the modulation the other way round."""
    base = base_file(tmp_path / "base.safetensors", {prefix + key: shape for key, shape in BFL.items()}, dtype)
    shapes = {f"transformer.{key.removesuffix('.weight')}": shape for key, shape in SEPARATE.items()}
    lora = lora_file(tmp_path / "lora.safetensors", shapes, DIFFUSERS, 8, None)
    save_file(load_file(lora), lora, {"modelspec.architecture": "flux-1-dev/lora"})  # else it could be several models'
    found = baked(base, [(lora, 0.9)], tmp_path / "baked.safetensors")
    before, update = load_file(base), deltas(lora)
    scale, shift = update["norm_out.linear:scale"].chunk(2)
    updates = {
        f"{prefix}{FUSED}.weight": torch.cat([update[name] for name in SPLIT]),
        f"{prefix}{MODULATION}.weight": torch.cat([shift, scale]),
    }
    assert_bits(found, {key: (weight.float() + 0.9 * updates[key]).to(dtype) for key, weight in before.items()})


@each_dtype
def test_flux_fused_modules_into_separate_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """One module over q, k, v, cut into three tensors."""
    base = base_file(tmp_path / "base.safetensors", SEPARATE, dtype)
    shapes = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": shape for key, shape in BFL.items()}
    lora = lora_file(tmp_path / "lora.safetensors", shapes, KOHYA, 8, 3.0)
    found = baked(base, [(lora, 0.9)], tmp_path / "baked.safetensors")
    before, update = load_file(base), deltas(lora)
    shift, scale = update["norm_out.linear:shift"].chunk(2)
    rows = update[SPLIT[0]].chunk(3)
    updates = {f"{name}.weight": part for name, part in zip(SPLIT, rows, strict=True)}
    updates["norm_out.linear.weight"] = torch.cat([scale, shift])
    assert_bits(found, {key: (weight.float() + 0.9 * updates[key]).to(dtype) for key, weight in before.items()})


def test_the_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", SDXL, torch.bfloat16)
    lora = lora_file(tmp_path / "lora.safetensors", SDXL_LORA, KOHYA, 16, 5.0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(baked(base, [(lora, 0.7)], tmp_path / f"{threads}.safetensors"))
    finally:
        torch.set_num_threads(before)
    assert_bits(*found)


# -- merging first, or baking at once ---------------------------------------------------------------------------------


def two_loras(architecture: str, folder: Path) -> tuple[Path, Path]:
    """Two adapters for a small model that have most modules in common; the second one in diffusers' spelling."""
    first, kohya, second = (folder / f"{name}.safetensors" for name in ("first", "kohya", "second"))
    kohya_file(first, architecture, share=0.7, ranks=(2, 4), alphas=(1.0, 3.0), size=0.05, seed=1)
    kohya_file(kohya, architecture, share=0.7, ranks=(3,), alphas=(3.0,), size=0.05, seed=2)
    convert_file(kohya, "diffusers", second, architecture=architecture)
    return first, second


@pytest.mark.parametrize(("architecture", "checkpoint"), [("sd15", "ldm"), ("flux", "comfyui")])
def test_baking_two_is_baking_their_merge(architecture: str, checkpoint: str, tmp_path: Path) -> None:
    """At once, one after the other, and as one LoRA that `merge` makes of them: the same, to float32's rounding."""
    base = single_file(pipeline(architecture, zero=False), architecture, checkpoint, tmp_path / "base.safetensors")
    first, second = two_loras(architecture, tmp_path)
    both = [Asked(str(first), 0.8), Asked(str(second), -0.45)]
    merged = tmp_path / "merged.safetensors"
    merge_files(both, merged, methods()["concat"], architecture=architecture)
    at_once = baked(base, [(first, 0.8), (second, -0.45)], tmp_path / "at-once.safetensors")
    half = tmp_path / "half.safetensors"
    baked(base, [(first, 0.8)], half)
    ways: dict[str, Callable[[], Tensors]] = {
        "merged": lambda: baked(base, [(merged, 1.0)], tmp_path / "merged-baked.safetensors"),
        "one by one": lambda: baked(half, [(second, -0.45)], tmp_path / "one-by-one.safetensors"),
        "the other order": lambda: baked(base, [(second, -0.45), (first, 0.8)], tmp_path / "order.safetensors"),
    }
    before = load_file(base)
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, at_once[key])}
    assert len(changed) > 60
    for way, make in ways.items():
        found = make()
        assert found.keys() == at_once.keys()
        for key, expected in at_once.items():
            if key not in changed:
                assert torch.equal(found[key], expected), f"{way}: {key} was touched"
                continue
            error = (found[key].double() - expected.double()).abs().max() / expected.double().abs().max()
            assert error <= 5e-7, f"{way}: {key} differs by {error:.2g}"
