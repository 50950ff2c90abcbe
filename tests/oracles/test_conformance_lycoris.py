"""The rules of the program `lycoris` against LyCORIS itself: `create_network_from_weights`, as sd-scripts calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lycoris")
pytest.importorskip("diffusers")

from lycoris import LycorisNetwork, create_lycoris
from lycoris.config import PRESET
from lycoris.kohya import create_network_from_weights
from lycoris.wrapper import create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from torch import nn

from loratool.core.adapter import Adapter
from loratool.core.registry import architectures, programs
from loratool.ops.conformance import CHANGED, DIFFERENTLY, FULLY, NOT, READ, Conformance, conform
from loratool.ops.open import open_adapter
from tests.contracts import assert_same
from tests.oracles.models import kohya_file, pipeline
from tests.oracles.test_lycoris import trained_delta

Tensors = dict[str, torch.Tensor]


class Named(nn.Module):
    """The very modules of another model, under other names."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for path, module in modules.items():
            *parents, last = path.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, module)


def sgm_unet(pipe: Any) -> nn.Module:
    """SDXL's UNet under the names that sd-scripts' own class has."""
    naming = architectures()["sdxl"].naming("unet", "ldm")
    known = dict(pipe.unet.named_modules())
    found = {name: known.get(targets[0].module_path) for name, targets in naming.items()}
    return Named({name: module for name, module in found.items() if module is not None})


def encoder(model: nn.Module) -> nn.Module:
    """A CLIP as transformers had it when sd-scripts was written, with `text_model.`."""
    return model if hasattr(model, "text_model") else Named({"text_model": model})


def loaded(path: Path, architecture: str) -> dict[str, nn.Module]:
    pipe = pipeline(architecture)
    unet = sgm_unet(pipe) if architecture == "sdxl" else pipe.unet
    second = [encoder(pipe.text_encoder_2)] if architecture == "sdxl" else []
    encoders = [encoder(pipe.text_encoder), *second] if second else encoder(pipe.text_encoder)
    network, _ = create_network_from_weights(1.0, str(path), None, encoders, unet)
    return {module.lora_name: module for module in (*network.unet_loras, *network.text_encoder_loras)}


def stems(adapter: Adapter) -> list[str]:
    return [next(iter(module.keys.values())).partition(".")[0] for module in adapter.modules]


def assert_as_told(found: Conformance, path: Path, architecture: str) -> None:
    if found.verdict == NOT:
        try:
            modules = loaded(path, architecture)
        except Exception:
            return
        assert not modules, f"said not to load, but {len(modules)} modules do"
        return
    modules, expected = loaded(path, architecture), dict(zip(stems(found.adapter), found.fates, strict=True))
    assert modules.keys() == {stem for stem, fate in expected.items() if fate.outcome in (READ, CHANGED)}
    for stem, ours in zip(stems(found.adapter), found.adapter.modules, strict=True):
        if (theirs := modules.get(stem)) is None:
            continue
        delta = ours.delta() * expected[stem].strength
        assert_same(trained_delta(theirs).reshape(delta.shape), delta, stem, 2e-5)
        if ours.magnitude is not None:
            assert torch.equal(theirs.dora_scale.detach().flatten(), ours.magnitude.load().flatten())


def a_lokr(tensors: Tensors, **factors: Callable[[int, int], tuple[int, ...]]) -> Tensors:
    """The first attention projection as a LoKr with factors of these shapes, made from the weight's (out, in)."""
    key = next(key for key in tensors if key.endswith("attn1_to_q.lora_down.weight"))
    stem = key.removesuffix(".lora_down.weight")
    out, columns = tensors[f"{stem}.lora_up.weight"].shape[0], tensors[key].shape[1]
    rest = {k: t for k, t in tensors.items() if not k.startswith(f"{stem}.")}
    made = {f"{stem}.lokr_{role}": torch.randn(*shape(out, columns)) for role, shape in factors.items()}
    return {**rest, **made, f"{stem}.alpha": torch.tensor(2.0)}


def tucker(tensors: Tensors) -> Tensors:
    key = next(k for k, t in tensors.items() if k.endswith("lora_down.weight") and t.shape[2:] == (3, 3))
    rank, columns = tensors[key].shape[:2]
    mid = key.replace("lora_down", "lora_mid")
    return {**tensors, key: torch.randn(rank, columns, 1, 1), mid: torch.randn(rank, rank, 3, 3)}


def dora(per_output: bool) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        ups = {k.removesuffix(".lora_up.weight"): t for k, t in tensors.items() if k.endswith(".lora_up.weight")}
        made = {}
        for stem, up in ups.items():
            down = tensors[f"{stem}.lora_down.weight"]
            shape = (up.shape[0], *(1,) * (up.dim() - 1)) if per_output else (1, down.shape[1], *(1,) * (up.dim() - 2))
            made[f"{stem}.dora_scale"] = torch.rand(shape) + 0.5
        return {**tensors, **made}

    return change


FILES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "LoRA": (lambda t: t, FULLY),
    "Tucker": (tucker, FULLY),
    "DoRA per output": (dora(True), FULLY),
    "DoRA per input": (dora(False), NOT),
    "LoKr": (lambda t: a_lokr(t, w1=lambda o, i: (4, 4), w2=lambda o, i: (o // 4, i // 4)), FULLY),
    "LoKr, w2 factored": (
        lambda t: a_lokr(t, w1=lambda o, i: (4, 4), w2_a=lambda o, i: (o // 4, 2), w2_b=lambda o, i: (2, i // 4)),
        FULLY,
    ),
    "LoKr, w1 factored": (
        lambda t: a_lokr(t, w1_a=lambda o, i: (4, 1), w1_b=lambda o, i: (1, 4), w2=lambda o, i: (o // 4, i // 4)),
        NOT,
    ),
    "LoKr, unbalanced": (
        lambda t: a_lokr(t, w1=lambda o, i: (o // 4, 4), w2_a=lambda o, i: (4, 2), w2_b=lambda o, i: (2, i // 4)),
        NOT,
    ),
    "an unknown key": (lambda t: {**t, "bundle_emb.x": torch.ones(2)}, DIFFERENTLY),
    "lora_A": (
        lambda t: {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in t.items()},
        NOT,
    ),
    "no alpha": (lambda t: {k: v for k, v in t.items() if not k.endswith(".alpha")}, NOT),
}


@pytest.mark.parametrize("name", FILES)
def test_sdxl(name: str, tmp_path: Path) -> None:
    change, expected = FILES[name]
    torch.manual_seed(0)
    source = kohya_file(tmp_path / "k.safetensors", "sdxl", share=0.08, ranks=(2, 4), alphas=(1.0, 2.0), seed=3)
    save_file(change(load_file(source)), tmp_path / "x.safetensors")
    found = conform(open_adapter(tmp_path / "x.safetensors", architecture="sdxl"), programs()["lycoris"])
    assert_as_told(found, tmp_path / "x.safetensors", "sdxl")
    assert found.verdict == expected


def test_stable_diffusion_1(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "k.safetensors", "sd15", share=0.1, seed=3)
    found = conform(open_adapter(source), programs()["lycoris"])
    assert found.verdict == NOT
    assert_as_told(found, source, "sd15")


KINDS: dict[str, tuple[dict[str, object], bool]] = {
    # what LyCORIS trains: (its arguments, whether it reads it again)
    "LoRA": ({}, True),
    "LoRA, Tucker": ({"use_tucker": True}, True),
    "LoRA and norms": ({"train_norm": True}, True),
    "DoRA per output": ({"dora_wd": True}, True),
    "DoRA per input": ({"dora_wd": True, "wd_on_output": False}, False),
    "LoHa": ({"algo": "loha"}, True),
    "LoHa, Tucker": ({"algo": "loha", "use_tucker": True}, True),
    "LoHa, DoRA": ({"algo": "loha", "dora_wd": True}, True),
    "LoKr": ({"algo": "lokr", "factor": 4}, True),
    "LoKr, unbalanced": ({"algo": "lokr", "factor": 4, "unbalanced_factorization": True}, False),
    "full": ({"algo": "full"}, True),
    "GLoRA": ({"algo": "glora"}, True),
    "OFT": ({"algo": "diag-oft"}, True),
    "OFT, rescaled": ({"algo": "diag-oft", "rescaled": True}, True),
    "BOFT": ({"algo": "boft"}, True),
    "IA3": ({"algo": "ia3"}, False),
}
PLACES = ("down_blocks_0_", "input_blocks_1_", "input_blocks_2_", "input_blocks_4_")


def trained(model: nn.Module, prefix: str, arguments: dict[str, object]) -> Tensors:
    """What LyCORIS saves of a few blocks of a model, every value moved."""
    LycorisNetwork.apply_preset(PRESET["full"])
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=4, conv_alpha=2.0, **arguments)
    found = {}
    for lora in network.loras:
        if any(place in lora.lora_name for place in PLACES):
            for name, tensor in lora.state_dict().items():
                moved = tensor + 0.1 * torch.randn_like(tensor) if tensor.dim() else tensor
                found[f"{lora.lora_name.replace('lycoris_', prefix, 1)}.{name}"] = moved.detach().contiguous()
    return found


@pytest.mark.parametrize("wrapped", [True, False], ids=["lycoris_", "lora_unet_"])
@pytest.mark.parametrize("name", KINDS)
def test_its_own_kinds(name: str, wrapped: bool, tmp_path: Path) -> None:
    """Of its own wrapper around Stable Diffusion 1.x, and of sd-scripts around SDXL."""
    arguments, expected = KINDS[name]
    torch.manual_seed(0)
    unet = pipeline("sd15").unet if wrapped else sgm_unet(pipeline("sdxl"))
    tensors = trained(unet, "lycoris_" if wrapped else "lora_unet_", arguments)
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    adapter = open_adapter(file)
    assert (adapter.layout, bool(adapter.extras)) == ("lycoris" if wrapped else "kohya", False)
    assert len(adapter.modules) == len({key.partition(".")[0] for key in tensors}) > 30
    assert conform(adapter, programs()["lycoris"]).fully is expected
    try:
        if wrapped:
            found = create_lycoris_from_weights(1.0, str(file), unet)[0].loras
        else:
            found = create_network_from_weights(1.0, str(file), None, None, unet)[0].unet_loras
    except (RuntimeError, TypeError):
        found = []
    assert len(found) == (len(adapter.modules) if expected else 0)
