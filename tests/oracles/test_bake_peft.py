"""Baking against PEFT: a folder with an adapter baked into it loads as `merge_and_unload` leaves the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from loratool.core.errors import FormatError
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked

# PEFT's remarks on embeddings, tied weights and biases, all of which are what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""A narrow model of the real topology: grouped keys and values, a gated MLP."""


def llama() -> PreTrainedModel:
    """Llama."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def qwen2() -> PreTrainedModel:
    """Qwen 2: its q, k, v have biases, and its embeddings are its last layer, too."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


def gpt2() -> PreTrainedModel:
    """GPT-2: its Conv1D stores `(in, out)`, q, k, v in one."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def resnet() -> PreTrainedModel:
    """ResNet: convolutions, and norms with running statistics."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config)


@dataclass(frozen=True)
class Case:
    """A model, the LoraConfig's fields, and whether the very bits are expected: PEFT sums in the same order then.

    `tied` says that the update is of a weight that is used twice: PEFT applies it in one place before merging, in both
    afterwards.
    """

    build: Callable[[], PreTrainedModel]
    config: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    tied: bool = False


ATTENTION = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "llama": Case(llama, {"target_modules": ATTENTION}),
    "llama, all-linear": Case(llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama, rslora": Case(llama, {"target_modules": ATTENTION, "use_rslora": True}),
    "llama, patterns": Case(
        llama,
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 3, "down_proj": 1},
        },
    ),
    "llama, dora": Case(llama, {"target_modules": ATTENTION, "use_dora": True}, exact=False),
    "llama, embeddings": Case(llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, embeddings, dora": Case(llama, {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}, False),
    "llama, modules_to_save": Case(
        llama, {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]}
    ),
    "llama, embeddings to save": Case(llama, {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "qwen2": Case(qwen2, {"target_modules": [*ATTENTION, "gate_proj"]}),
    "qwen2, lora_bias": Case(qwen2, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "qwen2, tied embeddings": Case(qwen2, {"target_modules": ["embed_tokens", "o_proj"]}, tied=True),
    "gpt2": Case(gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, rslora": Case(
        gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "use_rslora": True}, tied=True
    ),
    "gpt2, dora": Case(gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}, False),
    "resnet": Case(resnet, {"target_modules": ["convolution", "classifier.1"]}, exact=False),
    "resnet, dora": Case(resnet, {"target_modules": ["convolution"], "use_dora": True}, exact=False),
}
each_case = pytest.mark.parametrize("name", CASES)

OTHERS = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "README.md": "# A model ü\r\n".encode(),
    "original/params.json": b"{}",
}
"""What else lies in a model's folder."""


def base_model(name: str) -> PreTrainedModel:
    """The base, with random values and the same ones every time."""
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 1 and "resnet" in name:
            buffer.uniform_(0.5, 1.5)
    return model


def trained(name: str) -> PeftModel:
    """The base with an adapter of random values, none of them zero."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied embeddings, which PEFT merges all the same
        model = get_peft_model(base_model(name), LoraConfig(r=4, lora_alpha=6, **CASES[name].config))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "magnitude" in parameter_name:
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in parameter_name or "modules_to_save" in parameter_name:
                parameter.normal_(std=0.2)
    return model.eval()


def base_folder(name: str, folder: Path, sharded: bool) -> Path:
    """The base as a model's folder."""
    base_model(name).save_pretrained(folder, **({"max_shard_size": "4KB"} if sharded else {}))
    for other, data in OTHERS.items():
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(data)
    shards = json.loads(index.read_text())["weight_map"] if (index := folder / INDEX).exists() else {}
    assert (len(set(shards.values())) > 2) == sharded
    return folder


INDEX = "model.safetensors.index.json"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What a model computes of some input."""
    if model.config.model_type == "resnet":
        return model(pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))).logits
    return model(input_ids=torch.tensor([[3, 1, 4, 15, 9, 26, 5]])).logits


def generated(model: Any) -> list[int]:
    """Eight tokens, each the likeliest."""
    start = torch.tensor([[3, 1, 4]])
    found = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in found[0]]


@each_case
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_baked_folder_is_what_merge_and_unload_leaves(name: str, sharded: bool, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "baked"
    base_folder(name, base, sharded)
    model = trained(name)
    model.save_pretrained(adapter)
    at_run_time = logits(model)
    report = bake_file(base, [Asked(str(adapter))], output, Options())
    assert not report.unmatched
    assert_same_files(base, output)
    found, loading = CASES[name].build().from_pretrained(output, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged = model.merge_and_unload()
    assert_same(found.state_dict(), merged.state_dict(), base_model(name).state_dict(), CASES[name].exact)
    expected = logits(merged) if CASES[name].tied else at_run_time
    torch.testing.assert_close(logits(found.eval()), expected, rtol=2e-5, atol=2e-5)
    if found.can_generate():
        assert generated(found) == generated(merged)


def assert_same(
    found: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], exact: bool
) -> None:
    """Every weight equal, to float32's rounding or bit for bit; and something is another one than the base's."""
    assert found.keys() == merged.keys()
    for key, wanted in merged.items():
        assert found[key].dtype == wanted.dtype
        if exact or torch.equal(wanted, base[key]):
            assert torch.equal(found[key], wanted), f"{key}: {(found[key] - wanted).abs().max():.3g}"
        else:
            error = (found[key].double() - wanted.double()).abs().max() / wanted.double().abs().max()
            assert error <= 5e-7, f"{key}: differs by {error:.2g}"
    assert not all(torch.equal(tensor, base[key]) for key, tensor in found.items())


def assert_same_files(base: Path, output: Path) -> None:
    """The same files; those with weights have the same keys, dtypes and shapes, and all others the same bytes."""
    names = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert names == {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert {Path(other) for other in OTHERS} < names
    for name in names:
        if name.suffix != ".safetensors":
            assert (base / name).read_bytes() == (output / name).read_bytes(), name
            continue
        before, after = load_file(base / name), load_file(output / name)
        assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_a_strength_is_what_scale_layer_makes_of_it(strength: float, tmp_path: Path) -> None:
    name = "llama, patterns"
    base_folder(name, tmp_path / "base", False)
    model = trained(name)
    model.save_pretrained(tmp_path / "adapter")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(strength)
    bake_file(tmp_path / "base", [Asked(str(tmp_path / "adapter"), strength)], tmp_path / "baked", Options())
    found = LlamaForCausalLM.from_pretrained(tmp_path / "baked")
    base = base_model(name).state_dict()
    assert_same(found.state_dict(), model.merge_and_unload().state_dict(), base, exact=False)


def test_the_embedding_that_peft_keeps_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    """PEFT loads it over the base's before anything is added, so the sum is of that one."""
    name, adapter = "llama, embeddings", tmp_path / "adapter"
    base_folder(name, tmp_path / "base", False)
    trained(name).save_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (key,) = (key for key in tensors if key.endswith("embed_tokens.base_layer.weight"))
    save_file({**tensors, key: tensors[key] + 1}, adapter / "adapter_model.safetensors")
    bake_file(tmp_path / "base", [Asked(str(adapter))], tmp_path / "baked", Options())
    found = LlamaForCausalLM.from_pretrained(tmp_path / "baked").state_dict()
    merged = PeftModel.from_pretrained(base_model(name), str(adapter)).merge_and_unload()
    assert_same(found, merged.state_dict(), base_model(name).state_dict(), exact=True)


def test_whole_weights_of_strength_zero_change_nothing(tmp_path: Path) -> None:
    base_folder("llama", tmp_path / "base", False)
    for name in ("llama", "llama, modules_to_save"):
        trained(name).save_pretrained(tmp_path / name)
    asked = [Asked(str(tmp_path / "llama")), Asked(str(tmp_path / "llama, modules_to_save"), 0.0)]
    bake_file(tmp_path / "base", asked, tmp_path / "both", Options())
    bake_file(tmp_path / "base", asked[:1], tmp_path / "alone", Options())
    both, alone = (load_file(tmp_path / out / "model.safetensors") for out in ("both", "alone"))
    assert all(torch.equal(both[key], tensor) for key, tensor in alone.items())


def test_a_bias_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    """`lora_bias` on layers without one: PEFT gives them a bias when it merges; a checkpoint has no room for it."""
    base_folder("llama", tmp_path / "base", False)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    get_peft_model(base_model("llama"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FormatError, match=r"2 parts .*q_proj.*bias.*--allow-unmatched"):
        bake_file(tmp_path / "base", [Asked(str(tmp_path / "adapter"))], tmp_path / "baked", Options())
    assert not (tmp_path / "baked").exists()
