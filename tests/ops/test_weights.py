"""weights: base weights found in every kind of checkpoint equal the rows taken by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import FormatError
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import write_safetensors
from loratool.ops.factored import dense_update
from loratool.ops.norms import base_norms
from loratool.ops.weights import base_weights
from tests.builders import Part, architecture_of, build, weights

QKV = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def adapter(architecture: str, layout: str, *names: str) -> Adapter:
    table = {one.name: one for one in weights(architecture, layout)}  # the last component of that name
    parts = [Part(table[name], 2, 1.0) for name in names]
    return layouts()[layout].read(build(parts, layout), architecture_of(architecture))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}, {})
    return path


def assert_loads(path: Path, of: Adapter, expected: list[torch.Tensor]) -> None:
    found = base_weights(path, of)
    assert found.missing(of.modules) == []
    for module, rows in zip(of.modules, expected, strict=True):
        loaded = found.load(module)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, rows.float().flatten(1)), module.title


SD15 = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.resnets.0.conv1",
    "text_model.encoder.layers.0.self_attn.k_proj",
)


def test_sd15_in_one_file(tmp_path: Path) -> None:
    tensors = {
        QKV: noise(320, 320),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": noise(320, 320, 3, 3, seed=1),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight": noise(768, 768, seed=2),
    }
    path = save(tmp_path / "model.safetensors", tensors)
    assert_loads(path, adapter("sd15", "kohya", *SD15), list(tensors.values()))


def test_sd15_in_a_folder_of_components_and_shards(tmp_path: Path) -> None:
    q, conv, k = noise(320, 320), noise(320, 320, 3, 3, seed=1), noise(768, 768, seed=2)
    unet = tmp_path / "model" / "unet"
    save(unet / "diffusion_pytorch_model-00001-of-00002.safetensors", {f"{SD15[0]}.weight": q})
    save(unet / "diffusion_pytorch_model-00002-of-00002.safetensors", {f"{SD15[1]}.weight": conv})
    save(tmp_path / "model" / "text_encoder" / "model.safetensors", {f"{SD15[2]}.weight": k})
    save(tmp_path / "model" / "vae" / "model.safetensors", {"decoder.conv_in.weight": noise(4, 4)})
    for layout in ("kohya", "diffusers"):
        assert_loads(tmp_path / "model", adapter("sd15", layout, *SD15), [q, conv, k])


def test_sdxl_with_openclip(tmp_path: Path) -> None:
    """q, k, v are rows of one `in_proj_weight`, and `text_projection` is stored transposed."""
    fused, projection = noise(3840, 1280), noise(1280, 1280, seed=1)
    stem = "conditioner.embedders.1.model."
    tensors = {
        f"{stem}transformer.resblocks.3.attn.in_proj_weight": fused,
        f"{stem}text_projection": projection,
    }
    path = save(tmp_path / "model.safetensors", tensors)
    layer = "text_model.encoder.layers.3.self_attn"
    names = (f"{layer}.q_proj", f"{layer}.k_proj", f"{layer}.v_proj", "text_projection")
    expected = [fused[:1280], fused[1280:2560], fused[2560:], projection.T]
    assert_loads(path, adapter("sdxl", "kohya", *names), expected)


@pytest.mark.parametrize("checkpoint", ["bfl", "diffusers"])
def test_flux_fused_and_split(tmp_path: Path, checkpoint: str) -> None:
    """Fused modules over fused and split weights, and split modules over fused ones."""
    fused = noise(9216, 3072)
    if checkpoint == "bfl":
        path = save(tmp_path / "flux.safetensors", {"double_blocks.2.img_attn.qkv.weight": fused})
    else:
        keys = [f"transformer_blocks.2.attn.to_{part}.weight" for part in "qkv"]
        path = save(
            tmp_path / "flux" / "transformer" / "a.safetensors", dict(zip(keys, fused.split(3072), strict=True))
        )
        path = tmp_path / "flux"
    assert_loads(path, adapter("flux", "kohya", "double_blocks.2.img_attn.qkv"), [fused])
    names = [f"transformer_blocks.2.attn.to_{part}" for part in "qkv"]
    assert_loads(path, adapter("flux", "diffusers", *names), list(fused.split(3072)))


def test_flux_swapped_rows(tmp_path: Path) -> None:
    """The last modulation: BFL stacks shift, scale; diffusers scale, shift."""
    whole = noise(6144, 3072)
    path = save(tmp_path / "flux.safetensors", {"final_layer.adaLN_modulation.1.weight": whole})
    swapped = torch.cat([whole[3072:], whole[:3072]])
    assert_loads(path, adapter("flux", "diffusers", "norm_out.linear"), [swapped])
    assert_loads(path, adapter("flux", "kohya", "final_layer.adaLN_modulation.1"), [whole])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {QKV: noise(320, 320)})
    with pytest.raises(FormatError, match=r"lacks 2 of the 3 weights.*resnets\.0\.conv1.*k_proj") as caught:
        base_weights(path, adapter("sd15", "kohya", *SD15))
    assert caught.value.file == str(path)


def test_another_shape_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {QKV: noise(320, 640)})
    one = adapter("sd15", "kohya", SD15[0])
    with pytest.raises(FormatError, match="another model"):
        base_weights(path, one).load(one.modules[0])


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    table = architecture_of("sdxl").naming("unet", "diffusers")
    tensors = {f"{name}.weight": noise(1) for name in table}
    save(tmp_path / "sdxl" / "unet" / "a.safetensors", tensors)
    save(tmp_path / "unet.safetensors", tensors)
    for path in (tmp_path / "sdxl", tmp_path / "unet.safetensors"):
        with pytest.raises(FormatError, match=r"is a checkpoint of .*XL.*the adapter is for .*1\.x"):
            base_weights(path, adapter("sd15", "kohya", SD15[0]))


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    one = adapter("sd15", "kohya", SD15[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_bytes(b"no safetensors at all")
    for name, words in (
        ("nowhere", "does not exist"),
        ("empty", "holds no safetensors"),
        ("text.safetensors", "plain text"),
    ):
        with pytest.raises(FormatError, match=words) as caught:
            base_weights(tmp_path / name, one)
        assert caught.value.file == str(tmp_path / name)


# -- Conv1D: weights stored as (in, out) ------------------------------------------------------------------------------

GPT2 = {"c_attn": (24, 8), "c_proj": (8, 8)}
"""Shapes `(out, in)`, as PEFT's factors have them; the checkpoint has them the other way round."""


def gpt2(config: Mapping[str, object] | None, names: Sequence[str] = tuple(GPT2)) -> Adapter:
    tensors = {}
    for name in names:
        out, width = GPT2[name]
        stem = f"base_model.model.transformer.h.0.attn.{name}"
        tensors[f"{stem}.lora_A.weight"] = LazyTensor.from_torch(noise(2, width, dtype=torch.float32))
        tensors[f"{stem}.lora_B.weight"] = LazyTensor.from_torch(noise(out, 2, dtype=torch.float32, seed=1))
        tensors[f"{stem}.lora_magnitude_vector"] = LazyTensor.from_torch(noise(out, dtype=torch.float32).abs() + 1)
    side = {} if config is None else {"adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2, **config})}
    return layouts()["peft"].read(Bundle(tensors, {}, side), architecture_of("generic"))


def conv1d(path: Path, transposed: bool = True) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = {name: noise(*shape, seed=3, dtype=torch.float32) for name, shape in GPT2.items()}
    stored = {f"transformer.h.0.attn.{n}.weight": w.T.contiguous() if transposed else w for n, w in weights.items()}
    return save(path / "gpt2.safetensors", stored), weights


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_conv1d(tmp_path: Path, transposed: bool, told: bool) -> None:
    """By PEFT's config, by the shapes of the other weights, or both."""
    path, meant = conv1d(tmp_path, transposed)
    of = gpt2({"fan_in_fan_out": transposed} if told else None)
    assert_loads(path, of, [meant[module.targets[0].path.rpartition(".")[2]] for module in of.modules])


def test_square_weights_that_nobody_knows(tmp_path: Path) -> None:
    path, meant = conv1d(tmp_path)
    for config, names in ((None, ["c_proj"]), ({"fan_in_fan_out": False}, list(GPT2))):  # says one thing, is another
        of = gpt2(config, names)
        square = next(module for module in of.modules if module.shape == (8, 8))
        with pytest.raises(FormatError, match="fan_in_fan_out") as caught:
            base_weights(path, of).load(square)
        assert caught.value.key == square.title and caught.value.file == str(path)
    for told in (True, False):
        (only,) = (of := gpt2({"fan_in_fan_out": told}, ["c_proj"])).modules
        assert torch.equal(base_weights(path, of).load(only), meant["c_proj"] if told else meant["c_proj"].T)


def test_norms_need_no_orientation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, meant = conv1d(tmp_path)
    (found,) = base_norms(path, gpt2(None, ["c_proj"])).values()
    assert found[0] == pytest.approx(float(meant["c_proj"].norm()), rel=1e-6)


def test_a_dora_on_conv1d(tmp_path: Path) -> None:
    """What PEFT computes: the update of the (out, in) weight."""
    path, meant = conv1d(tmp_path)
    of = gpt2({"fan_in_fan_out": True})
    for module in of.modules:
        weight = meant[module.targets[0].path.rpartition(".")[2]]
        found = dense_update(module, torch.float32, base=base_weights(path, of))
        assert module.magnitude is not None
        norms = (weight + found).norm(dim=1)
        assert torch.allclose(norms, module.magnitude.load().flatten(), rtol=1e-5)
        assert torch.allclose((weight + found) / norms[:, None], _rows(weight + module.delta()), atol=1e-6)


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values / values.norm(dim=1, keepdim=True)
