"""Small pipelines of real topology for the tests against diffusers, and what loading a file changes in them.

Every block and every module of the real model is there; only widths (and for Flux the number of blocks) are small.
Linear and convolution weights are zero unless asked otherwise, so that a fused weight *is* the update.
"""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loratool.core.adapter import Adapter
from loratool.core.registry import architectures

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
"""Files that other programs wrote; not part of the project."""

Weights = dict[tuple[str, str], torch.Tensor]
"""(component, module path without `text_model.`) -> weight, or its change."""

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def sd15_unet(**config: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet, a tenth as wide."""
    standard: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 128, 128),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
    }
    return UNet2DConditionModel(**{**standard, **config})


def sdxl_unet() -> UNet2DConditionModel:
    """Stable Diffusion XL's UNet, a tenth as wide."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=80,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 56,  # six sizes, and what CLIP-G projects to
    )


def flux_transformer() -> FluxTransformer2DModel:
    """FLUX.1's transformer with 2 double and 3 single blocks, 64 wide."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def clip_config(layers: int, width: int, **config: Any) -> CLIPTextConfig:
    """A CLIP text model's configuration with a tiny vocabulary."""
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
        num_hidden_layers=layers,
        projection_dim=width,
        vocab_size=64,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        **config,
    )


def clip_l() -> CLIPTextModel:
    """CLIP-L: 12 layers."""
    return CLIPTextModel(clip_config(12, 24))


def clip_g() -> CLIPTextModelWithProjection:
    """OpenCLIP bigG in transformers' clothes: 32 layers and a projection."""
    return CLIPTextModelWithProjection(clip_config(32, 56, hidden_act="gelu"))


def _sd15() -> Any:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=clip_l(),
        tokenizer=None,
        unet=sd15_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=clip_l(),
        text_encoder_2=clip_g(),
        tokenizer=None,
        tokenizer_2=None,
        unet=sdxl_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )


def _flux() -> Any:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=clip_l(),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux_transformer(),
    )


_BUILDERS: Mapping[str, Callable[[], Any]] = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux}


@cache
def _models(architecture: str) -> Any:
    torch.manual_seed(0)
    return _BUILDERS[architecture]()


def pipeline(architecture: str, zero: bool = True) -> Any:
    """A fresh pipeline. With `zero` every Linear and convolution weight is zero; else all are random and the same."""
    original = _models(architecture)
    pipe = copy.copy(original)
    for component in components(original):
        model = copy.deepcopy(getattr(original, component))
        model.requires_grad_(False)
        if zero:
            for module in adaptable(model).values():
                module.weight.zero_()
        setattr(pipe, component, model)
    return pipe


def components(pipe: Any) -> list[str]:
    """The components of a pipeline into which diffusers loads a LoRA."""
    return [name for name in COMPONENTS if getattr(pipe, name, None) is not None]


def adaptable(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every Linear and convolution of a model, by path."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def parameters(pipe: Any) -> Weights:
    """A copy of every base parameter, by the path of the module (biases by theirs with `.bias`)."""
    found: Weights = {}
    for component in components(pipe):
        for name, tensor in getattr(pipe, component).named_parameters():
            if ".lora_" in name:
                continue
            path = name.replace(".base_layer.", ".").removeprefix("text_model.").removesuffix(".weight")
            found[component, path] = tensor.detach().clone()
    return found


def wrapped(pipe: Any) -> set[tuple[str, str]]:
    """Paths of the modules that carry a LoRA."""
    return {
        (component, path.removeprefix("text_model."))
        for component in components(pipe)
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, LoraLayer)
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: on matrices this small more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collects every warning that diffusers, transformers, peft or Python utter meanwhile."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.name}: {record.getMessage()}")

    collector = Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(collector)
            logger.setLevel(logging.WARNING)
        try:
            yield said
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(collector)
                logger.setLevel(level)
    said += [f"{item.category.__name__}: {item.message}" for item in caught]


def load(pipe: Any, path: Path) -> list[str]:
    """Loads and fuses a file as a user does; returns every warning but diffusers' remark on absent components."""
    with complaints() as said, one_thread():
        pipe.load_lora_weights(str(path))
        pipe.fuse_lora(components=[c for c in components(pipe) if c in pipe._lora_loadable_modules])
    return [remark for remark in said if "safe to ignore if LoRA state dict didn't originally have any" not in remark]


def changes(before: Weights, after: Weights) -> Weights:
    """Those parameters that differ, by how much."""
    assert before.keys() == after.keys()
    return {key: after[key] - before[key] for key in before if not torch.equal(before[key], after[key])}


def dense(adapter: Adapter) -> Weights:
    """What an adapter adds to every weight under its diffusers name, from each module's own `delta()`.

    Independent of `regroup`: the rows of each module's dense update are dealt out to its targets, and targets put
    together as the canonical naming has them.
    """
    parts: Weights = {}
    for module in adapter.modules:
        rows = module.delta().split(module.heights())
        parts |= {(t.component, t.path): part for t, part in zip(module.targets, rows, strict=True)}
    whole: Weights = {}
    for component in adapter.components:
        naming = next(iter(adapter.architecture.namings(component).values()))
        for name, targets in naming.items():
            found = [parts.pop((component, target.path), None) for target in targets]
            present = [part for part in found if part is not None]
            if present:
                full = [torch.zeros_like(present[0]) if part is None else part for part in found]
                whole[component, name.removeprefix("text_model.")] = torch.cat(full)
    assert not parts, f"without a canonical name: {list(parts)}"
    return whole


def assert_same(found: Weights, expected: Weights, tolerance: float = 1e-6) -> None:
    """The same weights change, each by the same amount (relative Frobenius norm, computed in float64)."""
    found = {key: delta for key, delta in found.items() if delta.any()}
    expected = {key: delta for key, delta in expected.items() if delta.any()}
    assert found.keys() == expected.keys(), (
        f"changed but not expected: {sorted(found.keys() - expected.keys())[:5]}; "
        f"expected but not changed: {sorted(expected.keys() - found.keys())[:5]}"
    )
    for key, delta in expected.items():
        wanted = delta.double()
        error = (found[key].double().reshape(wanted.shape) - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"{'.'.join(key)}: differs by {error:.2g}"


def assert_diffusers_applies(path: Path, adapter: Adapter, architecture: str) -> None:
    """diffusers loads `path` without a word, touches exactly the modules of `adapter` and adds exactly its updates."""
    pipe = pipeline(architecture)
    before = parameters(pipe)
    assert load(pipe, path) == []
    expected = dense(adapter)
    assert wrapped(pipe) == expected.keys()
    assert_same(changes(before, parameters(pipe)), expected)


def kohya_file(
    path: Path,
    architecture: str,
    *,
    share: float = 1.0,
    ranks: Sequence[int] = (4,),
    alphas: Sequence[float] = (2.0,),
    only: Callable[[str], bool] = lambda stem: True,
    dora: bool = False,
    size: float = 1.0,
    seed: int = 0,
) -> Path:
    """A float32 file in kohya's key grammar with random values, over a random `share` of every Linear and convolution.

    Rank and alpha of each module are drawn from `ranks` and `alphas`; `only` says which stems may occur. All updates
    are multiplied by `size`: a model whose weights they outweigh by far turns every rounding into another picture.
    """
    draw = random.Random(seed)
    values = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for stem, shape in kohya_shapes(architecture).items():
        if not only(stem) or draw.random() > share:
            continue
        rank, alpha = draw.choice(ranks), draw.choice(alphas)
        ones = (1,) * (len(shape) - 2)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=values)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=values) * size / rank
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        if dora:
            tensors[f"{stem}.dora_scale"] = torch.rand(shape[0], 1, *ones, generator=values) + 0.5
    version = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}[architecture]
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_base_model_version": version})
    return path


def kohya_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """kohya's stem of every Linear and convolution of the small models -> the shape of its update."""
    table, pipe = architectures()[architecture], _models(architecture)
    shapes: dict[str, tuple[int, ...]] = {}
    for component in components(pipe):
        weights = {p.removeprefix("text_model."): m.weight for p, m in adaptable(getattr(pipe, component)).items()}
        standard: dict[str, int] = {}
        for targets in next(iter(table.namings(component).values())).values():
            standard[targets[0].module_path] = sum(target.rows for target in targets)
        voice = table.writes["kohya"][component]
        for name, targets in table.naming(component, voice.naming).items():
            found = [weights.get(target.module_path.removeprefix("text_model.")) for target in targets]
            present = [weight for weight in found if weight is not None]
            if len(present) < len(targets):
                continue  # a norm, an embedding, or a block that the small model lacks
            rows = sum(
                weight.shape[0] * target.rows // standard[target.module_path]
                for weight, target in zip(present, targets, strict=True)
            )
            shapes[voice.prefix + name.replace(".", "_")] = (rows, *present[0].shape[1:])
    return shapes


def same_file(left: Path, right: Path, rounding: float = 0.0) -> None:
    """Two files hold the same keys, dtypes, shapes, values (bit for bit without `rounding`), and the same metadata."""
    with safe_open(left, "pt") as one, safe_open(right, "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert (one.metadata() or {}) == (other.metadata() or {})
        for key in one.keys():  # noqa: SIM118 (safe_open is no mapping)
            x, y = one.get_tensor(key), other.get_tensor(key)
            assert x.dtype == y.dtype and x.shape == y.shape, key
            assert torch.equal(x, y) if not rounding else torch.allclose(x, y, rtol=rounding, atol=0), key


def keys_of(path: Path) -> list[str]:
    """Keys of a safetensors file in file order."""
    with safe_open(path, "pt") as file:
        return list(file.keys())


def metadata_of(path: Path) -> dict[str, str]:
    """Header metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def shared(*parts: str) -> Path:
    """A file of `../shared/data`; skips the test where it is absent."""
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return path


def trained(pipe: Any, configs: Mapping[str, Mapping[str, Any]], seed: int = 0) -> None:
    """Adds PEFT adapters as diffusers' training scripts do (component -> LoraConfig fields), with random values."""
    values = torch.Generator().manual_seed(seed)
    for component, config in configs.items():
        model = getattr(pipe, component)
        with complaints():
            model.add_adapter(LoraConfig(**config))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=values)
                parameter.data = noise.abs() + 0.5 if "magnitude" in name else noise * 0.3


def saved(pipe: Any, folder: Path, configs: Mapping[str, Any], *, metadata: bool, old_spelling: bool = False) -> Path:
    """What `save_lora_weights` makes of the adapters on `pipe`.

    `metadata` hands it the configurations; `old_spelling` converts the keys first, as the scripts for Stable
    Diffusion do.
    """
    arguments: dict[str, Any] = {}
    for component in configs:
        model = getattr(pipe, component)
        state = get_peft_model_state_dict(model)
        arguments[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(state) if old_spelling else state
        if metadata:
            arguments[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, **arguments)
    return folder / "pytorch_lora_weights.safetensors"
