"""mlx-lm itself: what is written for it, it loads, and its fused weights are the base's plus the update.

Runs where `mlx` and `mlx-lm` are installed: neither is needed for anything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratool.ops.convert_file import convert_file

mx = pytest.importorskip("mlx.core")
llama = pytest.importorskip("mlx_lm.models.llama")
tuner = pytest.importorskip("mlx_lm.tuner.utils")
utils = pytest.importorskip("mlx.utils")


def fresh() -> Any:
    """Llama's topology, always with the same values."""
    mx.random.seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return llama.Model(llama.ModelArgs(model_type="llama", **sizes, **heads))


def weights() -> dict[str, torch.Tensor]:
    """Path -> weight of every linear and the embedding."""
    named = utils.tree_flatten(fresh().parameters())
    found = {name: torch.tensor(value.tolist()) for name, value in named if name.endswith(".weight")}
    return {name.removesuffix(".weight"): weight for name, weight in found.items() if weight.dim() == 2}


@pytest.mark.parametrize("case", ["everything", "some", "dora"])
def test_what_is_written_is_applied(tmp_path: Path, case: str) -> None:
    noise = torch.Generator().manual_seed(0)
    expected, tensors = weights(), {}
    for path, weight in expected.items():
        embedding = "embed" in path
        if case != "everything" and (embedding or "layers.1" not in path or "mlp" in path):
            continue
        out, columns = weight.shape
        down, up = torch.randn(4, columns, generator=noise), torch.randn(out, 4, generator=noise)
        stem = f"base_model.model.{path}"
        if embedding:
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = (
                up.T.contiguous(),
                down.T.contiguous(),
            )
        else:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = down, up
        expected[path] = weight + 1.5 * up @ down
        if case == "dora":
            magnitude = torch.rand(out, generator=noise) + 0.5
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude
            expected[path] *= (magnitude / expected[path].norm(dim=1))[:, None]
    source = tmp_path / "peft"
    source.mkdir()
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [], "use_dora": case == "dora"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    convert_file(source, "mlx", tmp_path / "mlx")
    model = fresh()
    tuner.load_adapters(model, str(tmp_path / "mlx"))
    fused = {name: module.fuse().weight for name, module in model.named_modules() if hasattr(module, "fuse")}
    assert fused
    for path, weight in fused.items():
        assert torch.allclose(torch.tensor(weight.tolist()), expected[path], atol=1e-5), path
