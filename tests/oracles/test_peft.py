"""PEFT itself: what it writes is read to its own scales and deltas, and what we write it loads and merges."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loratool.core.adapter import Adapter
from loratool.core.errors import NotRepresentable
from loratool.core.module import Module
from loratool.ops.convert import convert
from loratool.ops.open import open_adapter
from loratool.ops.save import save
from tests.contracts import assert_same
from tests.oracles.models import SHARED_DATA, clip_l, sd15_unet


def llama() -> nn.Module:
    """Llama's topology."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """GPT-2's topology: its Conv1D stores `(in, out)`."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


class Block(nn.Module):
    """A convolutional block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.narrow = nn.Conv2d(12, 8, (3, 1))
        self.point = nn.Conv2d(8, 8, 1)
        self.proj_out = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a block of a UNet."""
        x = self.point(self.narrow(self.conv(x))).mean(dim=(2, 3))
        return self.proj_out(x)


class Convolutional(nn.Module):
    """Convolutions of all kinds, and a name that is the end of another one: `proj_out`, `blocks.0.proj_out`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the blocks."""
        return self.proj_out(self.blocks[0](x) + self.blocks[1](x))


ATTENTION = ["q_proj", "v_proj", "down_proj"]
CONV = ["conv", "narrow", "point", "proj_out"]
VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}),
    "rank 1, alpha a fraction": (llama, {"r": 1, "lora_alpha": 0.3, "target_modules": ATTENTION}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 3, "down_proj": 1},
        },
    ),
    "patterns that are expressions": (
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ATTENTION,
            "rank_pattern": {r"layers\.0\..*": 2, r"^model\.layers\.1\.self_attn\.(q|v)_proj": 5},
            "alpha_pattern": {r".*mlp.*": 5, r"1\.self_attn\.q_proj": 9, "q_proj": 2},
        },
    ),
    "rslora": (llama, {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}),
    "rslora with patterns": (
        llama,
        {
            "r": 5,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 7},
        },
    ),
    "dora": (llama, {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ATTENTION}),
    "dora, conv": (Convolutional, {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": CONV}),
    "lora_bias": (Convolutional, {"r": 3, "lora_alpha": 3, "lora_bias": True, "target_modules": CONV}),
    "lora_bias, scaled": (Convolutional, {"r": 3, "lora_alpha": 5, "lora_bias": True, "target_modules": CONV}),
    "conv": (Convolutional, {"r": 3, "lora_alpha": 5, "target_modules": CONV}),
    "a name that ends another": (
        Convolutional,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": r"proj_out|blocks\.\d\.(conv|point)",
            "rank_pattern": {"^proj_out": 2},
        },
    ),
    "fan_in_fan_out": (
        gpt2,
        {"r": 3, "lora_alpha": 5, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    ),
    "fan_in_fan_out, dora": (
        gpt2,
        {"r": 3, "lora_alpha": 5, "fan_in_fan_out": True, "use_dora": True, "target_modules": ["c_attn", "c_fc"]},
    ),
    "modules_to_save": (
        llama,
        {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "embeddings": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings, dora": (
        llama,
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "all-linear": (llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
}
NOT_IN = {
    ("embeddings", "comfyui"): "embedding",
    ("embeddings, dora", "comfyui"): "embedding",
    ("lora_bias, scaled", "comfyui"): "lora_bias",
}
EXTRAS = {
    "modules_to_save": ["lm_head.weight", "model.norm.weight"],
    # PEFT saves a copy of the base weight whenever an embedding is a target.
    "embeddings": ["model.embed_tokens.base_layer.weight"],
    "embeddings, dora": ["model.embed_tokens.base_layer.weight"],
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def trained(variant: str) -> PeftModel:
    """A PEFT model whose adapter holds random values, none of them zero."""
    build, options = VARIANTS[variant]
    torch.manual_seed(0)
    base = build()
    config = LoraConfig(base_model_name_or_path="someone/a-model", **options)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    return model.eval()


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's layers by their path in the base model."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def fan_in_fan_out(layer: LoraLayer) -> bool:
    """Whether the base weight is stored as `(in, out)`."""
    return bool(getattr(layer, "fan_in_fan_out", False)) and not isinstance(layer.get_base_layer(), nn.Embedding)


def by_path(adapter: Adapter) -> dict[str, Module]:
    """Modules by the path of their target."""
    return {module.targets[0].path: module for module in adapter.modules}


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Tensors, header metadata and config of a PEFT folder."""
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    return load_file(file), metadata, (folder / "adapter_config.json").read_text()


def assert_identical(folder: Path, original: Path) -> None:
    """Same keys, shapes, dtypes, values, metadata and config."""
    tensors, metadata, config = contents(folder)
    expected, expected_metadata, expected_config = contents(original)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key
    assert metadata == expected_metadata
    assert config == expected_config


def converted(path: Path, to: str, output: Path) -> Path:
    """`path` in another layout, proved as the command does."""
    adapter = open_adapter(path)
    proof = save(convert(adapter, to), adapter, output)
    assert proof is not None
    assert proof.worst <= proof.tolerance
    return output


@each_variant
def test_scales_and_deltas_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    model = trained(variant)
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    assert (adapter.layout, adapter.architecture.id) == ("peft", "generic")
    wrapped = layers(model)
    assert {key.removeprefix("base_model.model.") for key in adapter.extras} == set(EXTRAS.get(variant, ()))
    assert not adapter.unread_families
    found = by_path(adapter)
    assert found.keys() == wrapped.keys()
    for path, layer in wrapped.items():
        module = found[path]
        assert module.scale == pytest.approx(layer.scaling["default"], rel=1e-12), path
        assert module.rank == layer.r["default"]
        delta = layer.get_delta_weight("default").detach()
        assert_same(module.delta(), delta.T if fan_in_fan_out(layer) else delta, path, 1e-6)
        if layer.use_dora["default"]:
            assert module.magnitude is not None
            magnitude = layer.lora_magnitude_vector["default"].weight.detach()
            assert torch.equal(module.magnitude.load().flatten(), magnitude.flatten())
        if layer.lora_bias["default"]:
            assert torch.equal(module.factors["bias"].load(), layer.lora_B["default"].bias.detach())


def test_a_leftover_adapter_name_is_read_and_comes_back(tmp_path: Path) -> None:
    """What `torch.save(model.state_dict())`, Accelerate and FSDP scripts leave: `lora_A.default.weight`."""
    for variant in ("patterns", "dora", "lora_bias", "embeddings"):
        model = trained(variant)
        saved, named = tmp_path / variant, tmp_path / f"{variant} named"
        model.save_pretrained(saved)
        named.mkdir()
        state = {k: v.contiguous() for k, v in model.state_dict().items() if "lora_" in k}
        assert all(".default" in key for key in state)
        save_file(state, named / "adapter_model.safetensors", {"format": "pt"})
        (named / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
        ours, theirs = by_path(open_adapter(named)), by_path(open_adapter(saved))
        assert ours.keys() == theirs.keys()
        assert not open_adapter(named).extras
        for path, module in ours.items():
            assert module.scale == theirs[path].scale
            assert_same(module.delta(), theirs[path].delta(), path, 0.0)
        there = converted(named, "diffusers", tmp_path / f"{variant}.safetensors")
        assert_identical(converted(there, "peft", tmp_path / f"{variant} back"), named)


@each_variant
@pytest.mark.parametrize("over", ["peft", "diffusers", "comfyui"])
def test_there_and_back_is_the_identity(variant: str, over: str, tmp_path: Path) -> None:
    original = tmp_path / "original"
    trained(variant).save_pretrained(original)
    there = tmp_path / ("there" if over == "peft" else "there.safetensors")
    if (variant, over) in NOT_IN:
        with pytest.raises(NotRepresentable, match=NOT_IN[variant, over]) as raised:
            converted(original, over, there)
        assert raised.value.modules
        assert not there.exists()
        return
    converted(original, over, there)
    assert_identical(converted(there, "peft", tmp_path / "back"), original)
    assert by_path(open_adapter(there)).keys() == by_path(open_adapter(original)).keys()


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    """PEFT's own loading, where any warning, missing or unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        warnings.filterwarnings("ignore", "Adapter 'default': .*lora_B.bias")  # on every lora_bias, PEFT's own too
        model = PeftModel.from_pretrained(base, str(folder))
    saved = load_file(folder / "adapter_model.safetensors")
    adapters = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(adapters) == sum("lora_" in key for key in saved)
    return model


def merged_changes(base: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """How PEFT's `merge_and_unload` changes each parameter that it changes, in float64."""
    base = base.double()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    with torch.no_grad():
        after = dict(loaded(base, folder).double().merge_and_unload().named_parameters())
    assert after.keys() == before.keys()
    changes = {name: after[name].detach() - before[name] for name in before}
    return {name: change for name, change in changes.items() if bool((change != 0).any())}


def assert_merges_to(
    adapter: Adapter, changes: Mapping[str, torch.Tensor], prefix: str = "", flip: bool = False
) -> None:
    """Every weight changed by exactly our delta (and bias), and no other changed."""
    expected: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        path = module.targets[0].path.removeprefix(prefix)
        expected[f"{path}.weight"] = module.delta().T if flip else module.delta()
        if "bias" in module.factors:
            expected[f"{path}.bias"] = module.factors["bias"].load() * module.scale
    assert changes.keys() == expected.keys()
    for name, change in changes.items():
        assert_same(change.reshape(expected[name].shape), expected[name], name, 1e-6)


MIXED = [(1, 1.0), (4, 4.0), (4, 2.0), (7, 0.7), (4, 2.0)]
"""Ranks and alphas that mixed files cycle through."""


def mixed_file(model: nn.Module, path: Path, prefix: str, names: list[str]) -> dict[str, tuple[int, float]]:
    """A file in ComfyUI's spelling (dotted names, alpha beside the pair) of some modules, ranks and alphas mixed."""
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    used = {}
    modules = dict(model.named_modules())
    for index, name in enumerate(names):
        rank, alpha = MIXED[index % len(MIXED)]
        used[name] = (rank, alpha)
        weight = modules[name].weight
        out, columns, *kernel = weight.shape if type(modules[name]).__name__ != "Conv1D" else weight.T.shape
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, columns, *kernel)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(out, rank, *[1] * len(kernel))
        tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return used


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[str], bool]]] = {
    "llama": (llama, lambda name: name.endswith(("_proj", "lm_head"))),
    "convolutional": (Convolutional, lambda name: name.rpartition(".")[2] in CONV),
    # Only the longer and the shorter one of two names that end alike.
    "the top proj_out alone": (Convolutional, lambda name: name == "proj_out"),
    "the lower proj_out alone": (Convolutional, lambda name: name == "blocks.1.proj_out"),
    "some of each": (Convolutional, lambda name: name in ("proj_out", "blocks.0.proj_out", "blocks.1.conv")),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_peft_merges_what_we_write_as_its_folder(model: str, layout: str, tmp_path: Path) -> None:
    build, wanted = MODELS[model]
    torch.manual_seed(0)
    base = build()
    linear = (nn.Linear, nn.Conv2d)
    names = [n for n, m in base.named_modules() if isinstance(m, linear) and wanted(n)]
    source = tmp_path / "mixed.safetensors"
    used = mixed_file(base, source, "diffusion_model." if layout == "comfyui" else "transformer.", names)
    folder = converted(source, "peft", tmp_path / "folder")
    adapter = open_adapter(source)
    assert {p: (m.rank, pytest.approx(m.alpha)) for p, m in by_path(adapter).items()} == used
    changes = merged_changes(base, folder)
    assert_merges_to(adapter, changes)


@each_variant
def test_peft_loads_its_own_adapter_after_a_detour(variant: str, tmp_path: Path) -> None:
    """peft -> diffusers -> a fresh PEFT folder (no return ticket: one rank was changed in between)."""
    original = tmp_path / "original"
    model = trained(variant)
    model.save_pretrained(original)
    adapter = open_adapter(original)
    stripped = converted(original, "diffusers", tmp_path / "there.safetensors")
    with safe_open(stripped, "pt") as opened:
        metadata = {k: v for k, v in (opened.metadata() or {}).items() if k != "loratool.origin"}
    save_file(load_file(stripped), stripped, metadata)
    folder = converted(stripped, "peft", tmp_path / "folder")
    base = VARIANTS[variant][0]()
    if VARIANTS[variant][1].get("fan_in_fan_out"):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["fan_in_fan_out"] = True  # nothing in a diffusers file says so, and PEFT sets it itself, with a warning
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if not VARIANTS[variant][1].get("use_dora"):
        flip = bool(VARIANTS[variant][1].get("fan_in_fan_out"))
        assert_merges_to(adapter, merged_changes(base, folder), flip=flip)
        return
    torch.manual_seed(0)
    base = VARIANTS[variant][0]()
    again = layers(loaded(base, folder))
    for path, layer in layers(model).items():
        ours = again[path]
        assert ours.scaling["default"] == pytest.approx(layer.scaling["default"], rel=1e-12)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                assert torch.equal(dict(ours.named_parameters())[name], parameter), f"{path}.{name}"


def test_peft_to_peft_keeps_what_else_the_config_says(tmp_path: Path) -> None:
    """The base model, `modules_to_save` and the saved modules themselves: PEFT loads them all again."""
    original, output = tmp_path / "original", tmp_path / "output"
    model = trained("modules_to_save")
    model.peft_config["default"].base_model_name_or_path = "someone/a-model"
    model.save_pretrained(original)
    converted(original, "peft", output)
    before = json.loads((original / "adapter_config.json").read_text())
    after = json.loads((output / "adapter_config.json").read_text())
    ours = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}
    torch.manual_seed(0)
    again = loaded(llama(), output)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks and alphas"])
@pytest.mark.parametrize("kind", ["lora", "locon"])
def test_one_folder_for_each_component_of_a_kohya_file(kind: str, mixed: bool, tmp_path: Path) -> None:
    source = SHARED_DATA / "kohya" / f"sd15_{kind}.safetensors"
    if not source.exists():
        pytest.skip("no ../shared/data here")
    tensors = {key: tensor.float() for key, tensor in load_file(source).items()}
    if mixed:
        for index, key in enumerate([key for key in tensors if key.endswith(".alpha")]):
            rank = MIXED[index % len(MIXED)][0]
            stem = key.removesuffix(".alpha")
            tensors[key] = tensors[key] * (1 + index % 3) / 2
            tensors[f"{stem}.lora_down.weight"] = tensors[f"{stem}.lora_down.weight"][:rank].contiguous()
            tensors[f"{stem}.lora_up.weight"] = tensors[f"{stem}.lora_up.weight"][:, :rank].contiguous()
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    folder = converted(file, "peft", tmp_path / "folder")
    adapter = open_adapter(file)
    assert {path.name for path in folder.iterdir()} == set(adapter.components) == {"unet", "text_encoder"}
    # transformers >= 5.6 has no `text_model.` in CLIPTextModel, and PEFT's names have to be its exact paths.
    for component, base, prefix in (("unet", sd15_unet(), ""), ("text_encoder", clip_l(), "text_model.")):
        changes = merged_changes(base, folder / component)
        assert_merges_to(replace(adapter, modules=adapter.of(component)), changes, prefix)
    assert load_file(converted(folder, "kohya", tmp_path / "back.safetensors")).keys() == tensors.keys()
