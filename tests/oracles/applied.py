"""What a library really applies of a file, to be compared with what the rules of its program say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel

from loratool.core.adapter import Adapter
from loratool.ops.conformance import CHANGED, NOT, READ, Conformance
from tests.oracles.models import complaints, components, one_thread

Name = tuple[str, str]
"""(component, path of the module without `text_model.`)."""


@dataclass(frozen=True)
class Update:
    """What one module of a model got: the update times a random vector, and the DoRA magnitude, if any."""

    probe: torch.Tensor
    magnitude: torch.Tensor | None


def probed(scale: float, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """scale * up @ down @ x for one random x, kernels flattened."""
    down, up = down.detach().float().flatten(1), up.detach().float().flatten(1)
    x = torch.randn(down.shape[1], generator=torch.Generator().manual_seed(down.shape[1]))
    return scale * (up @ (down @ x))


def layers_of(model: torch.nn.Module) -> Iterable[tuple[str, Any]]:
    """(path, PEFT layer) of everything that carries an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and len(module.lora_A):
            path = path.removeprefix("base_model.model.")
            yield path.removeprefix("text_model."), module


def carried(models: Mapping[str, torch.nn.Module]) -> dict[Name, Update]:
    """What PEFT's layers in some models hold."""
    found = {}
    for component, model in models.items():
        for path, layer in layers_of(model):
            (name,) = layer.lora_A.keys()
            vectors = layer.lora_magnitude_vector
            magnitude = vectors[name].weight.detach().flatten() if name in vectors else None
            pair = layer.lora_A[name].weight, layer.lora_B[name].weight
            found[component, path] = Update(probed(layer.scaling[name], *pair), magnitude)
    return found


def told(conformance: Conformance) -> dict[Name, Update]:
    """What the program is said to apply, module by module under its canonical name."""
    adapter, parts = conformance.adapter, {}
    for module, fate in zip(adapter.modules, conformance.fates, strict=True):
        if fate.outcome not in (READ, CHANGED):
            continue
        whole = probed(module.scale * fate.strength, module.factors["down"].load(), module.factors["up"].load())
        kept = module.magnitude is not None and "magnitude" not in fate.drops
        magnitude = module.magnitude.load().flatten().float() if kept and module.magnitude else None
        start = 0
        for target, height in zip(module.targets, module.heights(), strict=True):
            rows = slice(start, start + height)
            parts[target.component, target.path] = Update(whole[rows], None if magnitude is None else magnitude[rows])
            start += height
    return {(c, path.removeprefix("text_model.")): update for (c, path), update in _joined(adapter, parts).items()}


def _joined(adapter: Adapter, parts: dict[Name, Update]) -> dict[Name, Update]:
    """Targets that are parts of one module put together, as diffusers has them."""
    joined: dict[Name, Update] = {}
    for component in adapter.components:
        for name, targets in next(iter(adapter.architecture.namings(component).values())).items():
            present = [parts[component, t.path] for t in targets if (component, t.path) in parts]
            if present:
                vectors = [one.magnitude for one in present if one.magnitude is not None]
                magnitude = torch.cat(vectors) if vectors else None
                joined[component, name] = Update(torch.cat([one.probe for one in present]), magnitude)
    return joined


def assert_as_told(conformance: Conformance, load: Callable[[], Mapping[Name, Update]]) -> None:
    """`load` returns what the rules say, module by module, or, where they say that nothing loads, nothing."""
    expected = told(conformance)
    if conformance.verdict == NOT:
        try:
            found = load()
        except Exception:  # whatever the library raises: the user gets nothing
            return
        assert not found, f"said not to load, but {len(found)} modules do"
        return
    found = load()
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not missing, f"said to be read, but {len(missing)} are not: {missing[:3]}"
    assert not more, f"said to be ignored, but {len(more)} are not: {more[:3]}"
    for name, update in expected.items():
        got = found[name]
        error = (got.probe - update.probe).norm() / update.probe.norm()
        assert error < 2e-5, f"{name}: off by {error:.2g}"
        if update.magnitude is None:
            assert got.magnitude is None or "magnitude" in dropped(conformance, name), f"{name}: has a magnitude"
        else:
            assert got.magnitude is not None, f"{name}: no magnitude"
            torch.testing.assert_close(got.magnitude, update.magnitude)


def dropped(conformance: Conformance, name: Name) -> tuple[str, ...]:
    """The parts that the module of this name is said to lose."""
    for fate in conformance.fates:
        paths = {target.partition(":")[0].removeprefix("text_model.") for target in fate.targets}
        if fate.component == name[0] and name[1] in paths:
            return fate.drops
    return ()


def load_with_diffusers(pipe: Any, path: Path) -> dict[Name, Update]:
    """What `load_lora_weights` puts into a pipeline."""
    with complaints(), one_thread():
        pipe.load_lora_weights(str(path))
    return carried({name: getattr(pipe, name) for name in components(pipe)})


def wide_flux(double: int = 1, single: int = 1) -> Any:
    """FLUX.1 and CLIP-L at full width with few blocks; weights are zeros that take no memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
        encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=2, **sizes))
    for model in (transformer, encoder):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                zeros = torch.zeros(()).expand(parameter.shape)
                setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
