"""PEFT itself: what was extracted of two transformers models turns the one into the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from loratool.ops.extract import Wish
from loratool.ops.extract_file import extract_file
from loratool.ops.ranks import parse_rule
from tests.oracles.test_peft import gpt2, llama


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "backbone"])
def test_base_and_adapter_are_the_tuned_model(tmp_path: Path, make: Callable[[], nn.Module], bare: bool) -> None:
    """Linears and GPT-2's Conv1D, whose weights are stored (in, out); `bare`: the tuned one has no wrapper."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    changed = 0
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ("Linear", "Conv1D") and module is not getattr(model, "lm_head", None):
                weight = module.weight
                weight += 0.01 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
                changed += 1
    backbone = model.get_submodule("transformer" if make is gpt2 else "model")
    (backbone if bare else model).save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    wish = Wish(parse_rule("rank", "2"), dtype="F32")
    report = extract_file(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", wish)
    assert len(report.modules) == changed and report.error < 1e-4
    meant = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = type(model).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, meant[name], atol=1e-6), name
