"""PEFT's other kinds (LoHa, LoKr, IA3, OFT, BOFT): what they save bakes to what they merge; what we write loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loratool.core.adapter import CONFIG
from loratool.core.errors import FormatError, NotExact, NotRepresentable
from loratool.ops.approximate import Wish
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.convert import convert
from loratool.ops.convert_file import convert_file
from loratool.ops.inputs import Asked
from loratool.ops.inspect import inspect
from loratool.ops.open import open_adapter
from loratool.ops.save import save
from tests.contracts import assert_same
from tests.oracles.test_bake_peft import gpt2, llama, qwen2, resnet

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

ATTENTION = ["q_proj", "v_proj", "down_proj"]
CONV = ["convolution"]
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], Any]] = {
    "loha": (llama, LoHaConfig(r=3, alpha=5, target_modules=ATTENTION, init_weights=False)),
    "loha, patterns": (
        llama,
        LoHaConfig(
            r=3,
            alpha=5,
            target_modules=ATTENTION,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 7},
            init_weights=False,
        ),
    ),
    "loha, conv": (resnet, LoHaConfig(r=3, alpha=5, target_modules=CONV, init_weights=False)),
    "loha, Tucker": (
        resnet,
        LoHaConfig(r=3, alpha=5, target_modules=CONV, use_effective_conv2d=True, init_weights=False),
    ),
    "lokr": (llama, LoKrConfig(r=1, alpha=3, target_modules=ATTENTION, init_weights=False)),
    "lokr, factor 2": (
        llama,
        LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=ATTENTION, init_weights=False),
    ),
    "lokr, both": (
        llama,
        LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=ATTENTION, init_weights=False),
    ),
    "lokr, whole": (llama, LoKrConfig(r=8, alpha=3, target_modules=ATTENTION, init_weights=False)),
    "lokr, conv": (resnet, LoKrConfig(r=1, alpha=3, target_modules=CONV, init_weights=False)),
    "lokr, Tucker": (
        resnet,
        LoKrConfig(r=1, alpha=3, target_modules=CONV, use_effective_conv2d=True, init_weights=False),
    ),
    "ia3": (
        llama,
        IA3Config(target_modules=ATTENTION, feedforward_modules=["down_proj"], init_ia3_weights=False),
    ),
    "ia3 with biases": (
        qwen2,
        IA3Config(target_modules=ATTENTION, feedforward_modules=["down_proj"], init_ia3_weights=False),
    ),
    "ia3, fan_in_fan_out": (
        gpt2,
        IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
            init_ia3_weights=False,
        ),
    ),
    "oft": (llama, OFTConfig(oft_block_size=4, target_modules=ATTENTION, use_cayley_neumann=False, init_weights=False)),
    "oft, series": (llama, OFTConfig(oft_block_size=4, target_modules=ATTENTION, init_weights=False)),
    "oft, shared": (llama, OFTConfig(oft_block_size=4, target_modules=ATTENTION, block_share=True, init_weights=False)),
    "oft, by number": (llama, OFTConfig(r=4, oft_block_size=0, target_modules=ATTENTION, init_weights=False)),
    "oft, coft": (
        llama,
        OFTConfig(oft_block_size=4, target_modules=ATTENTION, coft=True, eps=0.1, init_weights=False),
    ),
    "boft": (llama, BOFTConfig(boft_block_size=4, target_modules=ATTENTION, init_weights=False)),
    "boft, by number": (
        llama,
        BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=ATTENTION, init_weights=False),
    ),
}


def trained(kind: str) -> tuple[PeftModel, Any]:
    """A model with a random adapter of that kind on it, and its config."""
    build, config = KINDS[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("hada_", "lokr_", "oft_R", "boft_R")):
                parameter.normal_(std=0.3)
            elif "ia3_l" in name or "boft_s" in name:
                parameter.normal_(1.0, 0.3)
    return model, config


def folders(kind: str, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """The base, the adapter, and the weights that PEFT merges them to."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model, _ = trained(kind)
    model.save_pretrained(adapter)
    torch.manual_seed(0)
    KINDS[kind][0]().save_pretrained(base)
    merged = model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert merged is None
    return base, adapter, load_file(tmp_path / "merged" / "model.safetensors")


each_kind = pytest.mark.parametrize("kind", KINDS)


Weights = dict[str, torch.Tensor]


def assert_weights(found: Weights, expected: Weights, base: Weights) -> None:
    """The same weights, to float32's rounding, and others than the base's."""
    assert found.keys() == expected.keys() == base.keys()
    for key, weight in expected.items():
        assert_same(found[key], weight, key, 1e-6)
    assert any(not torch.equal(base[key], weight) for key, weight in expected.items())


@each_kind
def test_a_bake_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    base, adapter, expected = folders(kind, tmp_path)
    opened = open_adapter(adapter)
    assert not opened.extras and not opened.notes
    report = bake_file(base, [Asked(str(adapter))], tmp_path / "baked", Options())
    assert not report.unmatched
    assert_weights(load_file(tmp_path / "baked" / "model.safetensors"), expected, load_file(base / "model.safetensors"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lokr, conv"])
def test_what_is_written_anew_peft_merges_to_the_same(kind: str, tmp_path: Path) -> None:
    """Without the original's config: ranks, block sizes and factors are told from the modules."""
    _, adapter, expected = folders(kind, tmp_path)
    opened = open_adapter(adapter)
    bare = replace(opened, side_files={}, metadata={})
    proof = save(convert(bare, "peft"), opened, tmp_path / "again")
    assert proof is not None and proof.bitwise == proof.compared
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "again" / CONFIG).read_text())
    if getattr(KINDS[kind][1], "fan_in_fan_out", False):
        config["fan_in_fan_out"] = True
        (tmp_path / "again" / CONFIG).write_text(json.dumps(config))
    torch.manual_seed(0)
    model = KINDS[kind][0]()
    merged = PeftModel.from_pretrained(model, tmp_path / "again").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged again")
    for key, weight in load_file(tmp_path / "merged again" / "model.safetensors").items():
        assert_same(weight, expected[key], key, 1e-6)


@each_kind
def test_written_again_the_folder_is_the_same(kind: str, tmp_path: Path) -> None:
    _, adapter, _ = folders(kind, tmp_path)
    opened = open_adapter(adapter)
    save(convert(opened, "peft"), opened, tmp_path / "again")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    told, again = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "again"))
    assert again["peft_type"] == told["peft_type"] == str(KINDS[kind][1].peft_type.value)
    info = inspect(tmp_path / "again")
    assert info.families == {told["peft_type"].lower(): info.modules}


@pytest.mark.parametrize("kind", ["ia3", "oft", "boft"])
def test_what_depends_on_the_base_is_rewritten_with_it(kind: str, tmp_path: Path) -> None:
    base, adapter, expected = folders(kind, tmp_path)
    with pytest.raises(NotExact, match="--base"):
        convert_file(adapter, "diffusers", tmp_path / "o.safetensors", approximate=Wish(energy=1.0))
    report = convert_file(adapter, "peft", tmp_path / "lora", approximate=Wish(energy=1.0), base=str(base))
    assert len(report.approximated) == len(open_adapter(adapter).modules)
    assert all(item.error < 1e-5 for item in report.approximated)
    before = load_file(base / "model.safetensors")
    for module in open_adapter(tmp_path / "lora").modules:
        key = f"{module.targets[0].path}.weight"
        assert_same(before[key] + module.delta(), expected[key], key, 1e-6)


def test_kinds_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    _, adapter, _ = folders("loha", tmp_path)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "peft_type": "VERA"}))
    with pytest.raises(FormatError, match="peft_type is 'VERA'; can be read: LORA, LOHA"):
        open_adapter(adapter)
    (adapter / CONFIG).write_text(json.dumps({**config, "peft_type": "LOKR"}))
    with pytest.raises(FormatError, match="peft_type is 'LOKR', but a module is of another kind"):
        open_adapter(adapter)


def test_a_folder_without_its_config_is_told(tmp_path: Path) -> None:
    _, adapter, _ = folders("oft", tmp_path)
    (adapter / CONFIG).unlink()
    (note,) = open_adapter(adapter).notes
    assert "how rotations are computed" in note


def test_fields_of_an_activated_lora_are_kept_and_told(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1, 2, 3], task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path / "alora")
    opened = open_adapter(tmp_path / "alora")
    assert any("aLoRA" in note for note in opened.notes)
    save(convert(opened, "peft"), opened, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["alora_invocation_tokens"] == [1, 2, 3]


def test_what_one_config_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    _, adapter, _ = folders("loha", tmp_path)
    _, other, _ = folders("oft", tmp_path / "b")
    first, second = open_adapter(adapter), open_adapter(other)
    mixed = replace(first, modules=(*first.modules[:1], *second.modules[1:]), side_files={})
    with pytest.raises(NotRepresentable, match="several families"):
        convert(mixed, "peft")
