"""Language models: mlx-lm's folder and llama.cpp's GGUF, held against what these programs themselves make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.core.adapter import Adapter, Bundle
from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError, LoratoolError, NotExact, NotRepresentable
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import read_bundle
from loratool.ops.base import architecture_of
from loratool.ops.convert import convert
from loratool.ops.convert_file import convert_file
from loratool.ops.inspect import inspect
from loratool.ops.open import open_adapter, understand
from tests.contracts import assert_same_tensors, check_layout

FIXTURES = Path(__file__).parents[2] / "fixtures" / "gguf"
"""Made by llama.cpp's convert_lora_to_gguf.py (in llama-cpp-python 0.3.36) of the PEFT folders beside them: f16, one
layer, 4 heads of 8 rows in q and 2 in k, an embedding, lora_alpha 3 at rank 2."""

WIDTH, MLP, WORDS, HEADS, KV = 32, 48, 20, 4, 2
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH * KV // HEADS, WIDTH),
    "self_attn.v_proj": (WIDTH * KV // HEADS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (MLP, WIDTH),
    "mlp.down_proj": (WIDTH, MLP),
}


def base(folder: Path, model_type: str = "llama", layers: int = 1, **config: Any) -> Architecture:
    """The names and shapes of a small model, with its config."""
    folder.mkdir()
    tensors = {f"model.layers.{i}.{n}.weight": torch.zeros(s) for i in range(layers) for n, s in LINEARS.items()}
    tensors |= {f"{name}.weight": torch.zeros(WORDS, WIDTH) for name in ("model.embed_tokens", "lm_head")}
    save_file(tensors, folder / "model.safetensors")
    facts = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": KV, **config}
    (folder / "config.json").write_text(json.dumps(facts))
    return architecture_of(folder)


def peft(
    folder: Path, ranks: Mapping[str, int] | None = None, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A PEFT folder for it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    ranks = ranks or {}
    for name, (out, columns) in LINEARS.items():
        stem, rank = f"base_model.model.model.layers.0.{name}", ranks.get(name, 4)
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    stem = "base_model.model.model.embed_tokens"
    tensors[f"{stem}.lora_embedding_A"] = torch.randn(4, WORDS, generator=generator).to(dtype)
    tensors[f"{stem}.lora_embedding_B"] = torch.randn(WIDTH, 4, generator=generator).to(dtype)
    if config.get("use_dora"):
        tensors = {key: tensor for key, tensor in tensors.items() if "embedding" not in key}
        for name, (out, _) in LINEARS.items():
            magnitude = torch.rand(out, generator=generator).to(dtype)
            tensors[f"base_model.model.model.layers.0.{name}.lora_magnitude_vector"] = magnitude
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", **config}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {module.targets[0].path: module.delta() for module in adapter.modules}


def assert_same_deltas(left: Adapter, right: Adapter) -> None:
    ours, theirs = deltas(left), deltas(right)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[path], delta) for path, delta in theirs.items())


# -- gguf -----------------------------------------------------------------------------------------------------------

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_what_llama_cpp_makes_of_it(tmp_path: Path, model_type: str) -> None:
    """The same names and bytes as its own converter; and its file back to the very PEFT folder it was made of."""
    table = base(tmp_path / "base", model_type)
    convert_file(FIXTURES / f"{model_type}-peft", "gguf", tmp_path / "ours.gguf", architecture=table)
    ours, theirs = read_bundle(tmp_path / "ours.gguf"), read_bundle(FIXTURES / f"{model_type}.gguf")
    assert_same_tensors(ours, theirs)
    for entry in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.metadata[entry] == theirs.metadata[entry], entry
    convert_file(FIXTURES / f"{model_type}.gguf", "peft", tmp_path / "back", architecture=table)
    assert_same_tensors(read_bundle(tmp_path / "back"), read_bundle(FIXTURES / f"{model_type}-peft"))
    assert_same_deltas(open_adapter(tmp_path / "back"), open_adapter(FIXTURES / f"{model_type}-peft"))


def test_gguf_turns_the_rows_of_each_head(tmp_path: Path) -> None:
    """Row h * 8 + half * 4 + j of transformers is row h * 8 + j * 2 + half of llama.cpp; v and the rest stay."""
    made = load_file(FIXTURES / "llama-peft" / "adapter_model.safetensors")
    stored = read_bundle(FIXTURES / "llama.gguf").tensors
    for name, letter, heads in (("q_proj", "q", HEADS), ("k_proj", "k", KV)):
        ours = made[f"base_model.model.model.layers.0.self_attn.{name}.lora_B.weight"]
        theirs = stored[f"blk.0.attn_{letter}.weight.lora_b"].load()
        for row in range(ours.shape[0]):
            head, inside = divmod(row, 8)
            half, j = divmod(inside, 4)
            assert torch.equal(ours[row], theirs[head * 8 + j * 2 + half])
        assert theirs.shape[0] == 8 * heads
    value = made["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    assert torch.equal(value, stored["blk.0.attn_v.weight.lora_b"].load())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma2"])
def test_gguf_there_and_back(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    table = base(tmp_path / "base", model_type)
    source = peft(tmp_path / "peft", {"mlp.down_proj": 2}, dtype, rank_pattern={"down_proj": 2})
    report = convert_file(source, "gguf", tmp_path / "lora.gguf", architecture=table)
    assert report.proof is not None and report.proof.bitwise == report.proof.compared == 7
    again = open_adapter(tmp_path / "lora.gguf", architecture=table)
    assert (again.layout, again.ranks) == ("gguf", {4: 6, 2: 1})
    assert_same_deltas(again, open_adapter(source, architecture=table))
    check_layout(layouts()["gguf"], read_bundle(tmp_path / "lora.gguf"), table)
    back = convert_file(tmp_path / "lora.gguf", "peft", tmp_path / "back", architecture=table)
    assert back.returned
    assert_same_tensors(read_bundle(tmp_path / "back"), read_bundle(source))


def test_gguf_without_the_number_of_heads(tmp_path: Path) -> None:
    """llama.cpp's order cannot be undone: said, and no name is given to it that would be wrong."""
    adapter = open_adapter(FIXTURES / "llama.gguf")
    assert (adapter.layout, adapter.components) == ("gguf", ("model", "llama.cpp"))
    assert {m.targets[0].path for m in adapter.of("llama.cpp")} == {f"blk.0.attn_{one}.weight" for one in "qk"}
    assert any("--base" in note for note in adapter.notes)
    with pytest.raises(NotRepresentable, match=r"peft has no spelling for llama\.cpp.*--base"):
        convert(adapter, "peft")
    check_layout(layouts()["gguf"], read_bundle(FIXTURES / "llama.gguf"), adapter.architecture)
    convert_file(FIXTURES / "llama.gguf", "gguf", tmp_path / "again.gguf")
    assert_same_tensors(read_bundle(tmp_path / "again.gguf"), read_bundle(FIXTURES / "llama.gguf"))


def test_gguf_of_a_model_whose_rows_stay(tmp_path: Path) -> None:
    adapter = open_adapter(FIXTURES / "qwen2.gguf")
    assert adapter.components == ("model",)
    convert_file(FIXTURES / "qwen2.gguf", "peft", tmp_path / "peft")
    assert_same_tensors(read_bundle(tmp_path / "peft"), read_bundle(FIXTURES / "qwen2-peft"))


def test_gguf_must_say_the_model(tmp_path: Path) -> None:
    source = peft(tmp_path / "peft")
    with pytest.raises(NotRepresentable, match=r"architecture.*--base"):
        convert(open_adapter(source), "gguf")
    strange = base(tmp_path / "strange", "gpt_neox")
    with pytest.raises(NotRepresentable, match=r"architecture"):
        convert(open_adapter(source, architecture=strange), "gguf")


def test_gguf_has_one_alpha(tmp_path: Path) -> None:
    table = base(tmp_path / "base")
    source = peft(tmp_path / "peft", lora_alpha=8, alpha_pattern={"q_proj": 4})
    made = convert(open_adapter(source, architecture=table), "gguf")
    assert made.bundle.metadata["adapter.lora.alpha"] == "8.0"
    again = layouts()["gguf"].read(made.bundle, table)
    assert_same_deltas(again, open_adapter(source, architecture=table))
    odd = peft(tmp_path / "odd", dtype=torch.bfloat16, lora_alpha=8, alpha_pattern={"q_proj": 3})
    with pytest.raises(NotRepresentable, match=r"one alpha for all modules.*--dtype fp32"):
        convert(open_adapter(odd, architecture=table), "gguf")


def test_info_of_a_gguf_file() -> None:
    info = inspect(FIXTURES / "qwen2.gguf")
    assert (info.layout, info.architecture, info.modules) == ("gguf", "generic", 7)


def test_a_gguf_model_is_no_lora(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="a GGUF model, not a LoRA"):
        open_adapter(tmp_path / "model.gguf")


@pytest.mark.parametrize("length", [4, 20, 100, 300, 2000])
def test_a_damaged_gguf_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes((FIXTURES / "llama.gguf").read_bytes()[:length])
    with pytest.raises(LoratoolError, match=r"cut\.gguf"):
        open_adapter(path)


def test_quantised_factors_are_not_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    writer.add_string("adapter.type", "lora")
    quantised = gguf.quants.quantize(torch.randn(4, 32).numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_v.weight.lora_a", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"Q8_0.*--outtype f16"):
        open_adapter(tmp_path / "q8.gguf")


# -- mlx ------------------------------------------------------------------------------------------------------------


def mlx(folder: Path, **config: Any) -> Path:
    """A folder as mlx-lm's trainer leaves it: the last layer's q and down, and the embedding."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, columns) in LINEARS.items():
        tensors[f"model.layers.7.{name}.lora_a"] = torch.randn(columns, 4, generator=generator)
        tensors[f"model.layers.7.{name}.lora_b"] = torch.randn(4, out, generator=generator)
    tensors["model.embed_tokens.lora_a"] = torch.randn(WORDS, 4, generator=generator)
    tensors["model.embed_tokens.lora_b"] = torch.randn(4, WIDTH, generator=generator)
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    facts = {"fine_tune_type": "lora", "num_layers": 1, "model": "some/model", "lora_parameters": parameters, **config}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def test_mlx_is_read(tmp_path: Path) -> None:
    """scale * (lora_a @ lora_b) transposed; an embedding's update is not (mlx_lm/tuner/lora.py, fuse)."""
    folder = mlx(tmp_path / "mlx")
    adapter = open_adapter(folder)
    assert (adapter.layout, adapter.architecture.id, adapter.extras) == ("mlx", "generic", {})
    stored = load_file(folder / "adapters.safetensors")
    for path, delta in deltas(adapter).items():
        product = 20.0 * stored[f"{path}.lora_a"] @ stored[f"{path}.lora_b"]
        expected = product if "embed" in path else product.T
        assert torch.allclose(delta, expected, rtol=1e-5, atol=1e-5), path
    assert inspect(folder).written_by == "mlx-lm"
    check_layout(layouts()["mlx"], read_bundle(folder), adapter.architecture)


@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui"])
def test_mlx_there_and_back(tmp_path: Path, to: str) -> None:
    folder = mlx(tmp_path / "mlx")
    adapter = open_adapter(folder)
    if to == "comfyui":
        adapter = Adapter(
            tuple(m for m in adapter.modules if "embed" not in m.title), adapter.architecture, "mlx",
            adapter.metadata, voices=adapter.voices, side_files=adapter.side_files, stored=adapter.stored,
        )  # fmt: skip
    there = convert(adapter, to)
    back = convert(layouts()[to].read(there.bundle, adapter.architecture), "mlx")
    assert back.returned
    for key, tensor in back.bundle.tensors.items():
        assert torch.equal(tensor.load(), adapter.stored[key].load()), key
    assert back.bundle.side_files == dict(adapter.side_files)


def test_mlx_is_written_as_its_loader_wants_it(tmp_path: Path) -> None:
    source = peft(tmp_path / "peft")
    report = convert_file(source, "mlx", tmp_path / "mlx")
    assert report.proof is not None and report.proof.bitwise == report.proof.compared
    assert sorted(file.name for file in (tmp_path / "mlx").iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (4, 1.5, 0.0)
    assert parameters["keys"] == sorted([*LINEARS, "model.embed_tokens"])
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert stored["model.layers.0.self_attn.k_proj.lora_a"].shape == (WIDTH, 4)
    assert stored["model.layers.0.self_attn.k_proj.lora_b"].shape == (4, WIDTH // 2)
    assert_same_deltas(open_adapter(tmp_path / "mlx"), open_adapter(source))
    convert_file(tmp_path / "mlx", "peft", tmp_path / "back")
    assert_same_tensors(read_bundle(tmp_path / "back"), read_bundle(source))


def test_mlx_dora(tmp_path: Path) -> None:
    source = peft(tmp_path / "peft", use_dora=True)
    convert_file(source, "mlx", tmp_path / "mlx")
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert stored["model.layers.0.self_attn.k_proj.m"].shape == (WIDTH // 2,)
    convert_file(tmp_path / "mlx", "peft", tmp_path / "back")
    assert_same_tensors(read_bundle(tmp_path / "back"), read_bundle(source))


def test_mlx_has_one_rank_and_one_scale(tmp_path: Path) -> None:
    ranks = peft(tmp_path / "ranks", {"mlp.down_proj": 2}, rank_pattern={"down_proj": 2})
    with pytest.raises(NotRepresentable, match=r"one rank.*resize --rank 2"):
        convert(open_adapter(ranks), "mlx")
    scales = peft(tmp_path / "scales", lora_alpha=8, alpha_pattern={"q_proj": 4})
    made = convert(open_adapter(scales), "mlx")
    assert json.loads(made.bundle.side_files["adapter_config.json"])["lora_parameters"]["scale"] == 2.0
    assert_same_deltas(layouts()["mlx"].read(made.bundle, open_adapter(scales).architecture), open_adapter(scales))
    odd = peft(tmp_path / "odd", dtype=torch.bfloat16, lora_alpha=8, alpha_pattern={"q_proj": 3})
    with pytest.raises((NotRepresentable, NotExact), match="--dtype fp32"):
        convert(open_adapter(odd), "mlx")


def test_mlx_experts_are_extras() -> None:
    tensors = {
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.zeros(3, 4, 8),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_b": torch.zeros(3, 6, 4),
        "model.layers.0.self_attn.q_proj.lora_a": torch.zeros(8, 4),
        "model.layers.0.self_attn.q_proj.lora_b": torch.zeros(4, 8),
    }
    bundle = Bundle({key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()})
    adapter = understand(bundle).adapter
    assert (adapter.layout, len(adapter.modules), len(adapter.extras)) == ("mlx", 1, 2)
    assert any("scale is unknown" in note for note in adapter.notes)


@pytest.mark.parametrize(
    "config", [{"fine_tune_type": "full"}, {"lora_parameters": []}, {"lora_parameters": {"scale": "much"}}]
)
def test_mlx_configs_that_make_no_sense(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        open_adapter(mlx(tmp_path / "mlx", **config))


def test_a_model_with_a_table_is_no_language_model() -> None:
    from tests.builders import architecture_of as table
    from tests.builders import build, typical_parts

    adapter = layouts()["kohya"].read(build(typical_parts("flux", "kohya"), "kohya"), table("flux"))
    for layout in ("mlx", "gguf"):
        with pytest.raises(NotRepresentable, match="no spelling for transformer"):
            convert(adapter, layout)
