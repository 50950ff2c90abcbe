"""extract: what was put into a checkpoint comes out again, whatever the two are spelled like; and nothing else does."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, LoratoolError, NotRepresentable, UsageError
from loratool.core.registry import architectures, layouts
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.files.bundle import read_bundle
from loratool.files.safetensors import write_safetensors
from loratool.ops import extract as extraction
from loratool.ops import recipe
from loratool.ops.bake_file import bake_file
from loratool.ops.extract import Wish
from loratool.ops.extract_file import extract_file
from loratool.ops.extract_report import ExtractReport
from loratool.ops.inputs import Asked
from loratool.ops.open import open_adapter
from loratool.ops.ranks import Limits, parse_rule
from loratool.ops.replay import replay_file
from tests.ops.test_convert import assert_hashes_are_true

Tensors = dict[str, torch.Tensor]
Key = tuple[str, str]
"""Component and path of a target."""

RANK4 = parse_rule("rank", "4")


def wish(rule: str = "rank 4", dtype: str = "F32", **more: Any) -> Wish:
    kind, _, text = rule.partition(" ")
    return Wish(parse_rule(kind, text), dtype=dtype, **more)


def noise(shape: Sequence[int], seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * size


def low_rank(shape: Sequence[int], seed: int, rank: int = 4, size: float = 0.02) -> torch.Tensor:
    """An update of that rank, the size of a trained one."""
    width = math.prod(shape[1:])
    made = noise((shape[0], rank), seed, size) @ noise((rank, width), seed + 1, size)
    return made.reshape(tuple(shape))


def save(path: Path, tensors: Mapping[str, torch.Tensor], dtype: str = "F32") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    code = torch_dtype(dtype)
    stored = {key: LazyTensor.from_torch(tensor.to(code).contiguous()) for key, tensor in tensors.items()}
    write_safetensors(path, stored, {})
    return path


# -- real models: a weight per target, put together as each kind of checkpoint has it ---------------------------------


class Model:
    """Some targets of a model with weights, updates and biases, in the canonical rows."""

    def __init__(self, architecture: str, paths: Mapping[str, Sequence[str]], narrow: int = 1, rank: int = 4) -> None:
        self.architecture = architectures()[architecture]
        self.weights: dict[Key, torch.Tensor] = {}
        self.deltas: dict[Key, torch.Tensor] = {}
        for component, wanted in paths.items():
            canonical = next(iter(self.architecture.namings(component).values()))
            targets = [target for group in canonical.values() for target in group]
            for seed, target in enumerate(targets):
                if wanted and target.path not in wanted:
                    continue
                shape = tuple(max(size // narrow, 1) if size > 3 else size for size in target.shape)
                key = (component, target.path)
                self.weights[key] = noise(shape, 7 * seed, 0.03)
                kinds = [word for word in ("embedding", "shared", "relative_attention_bias") if word in target.path]
                if len(shape) > 1 and not (kinds and "linear_" not in target.path):
                    self.deltas[key] = low_rank(shape, 7 * seed + 1, min(rank, *shape[:2]))

    def tensors(self, checkpoint: str, component: str, tuned: bool, prefix: str | None = None) -> Tensors:
        """The tensors of one component, as that kind of checkpoint spells it; only those whose parts are all known."""
        voice = next(one for one in self.architecture.checkpoints if one.id == checkpoint).voices[component]
        naming = self.architecture.naming(component, voice.naming)
        found: Tensors = {}
        for targets in naming.values():
            keys = [(component, target.path) for target in targets]
            if any(key not in self.weights for key in keys):
                continue
            parts = [self.weights[key] + (self.deltas.get(key, 0.0) if tuned else 0.0) for key in keys]
            whole = torch.cat(parts)
            home = naming.home(targets[0])
            found[(voice.prefix if prefix is None else prefix) + home.tensor_key] = (
                whole.T if home.transposed else whole
            )
        return found

    def write(self, path: Path, checkpoint: str, tuned: bool, dtype: str = "F32") -> Path:
        """One file, or a folder with a sub-folder for each component where their keys have no prefixes."""
        components = list(dict.fromkeys(component for component, _ in self.weights))
        if checkpoint.startswith("diffusers"):
            for component in components:
                save(path / component / "model.safetensors", self.tensors(checkpoint, component, tuned), dtype)
            return path
        known = next(one for one in self.architecture.checkpoints if one.id == checkpoint).voices
        parts = [self.tensors(checkpoint, component, tuned) for component in components if component in known]
        return save(path, {key: tensor for part in parts for key, tensor in part.items()}, dtype)


def updates(adapter: Adapter) -> dict[Key, torch.Tensor]:
    """Rows of every update by target, kernels flattened."""
    found = {}
    for module in adapter.modules:
        delta, row = module.delta().flatten(1), 0
        for target, height in zip(module.targets, module.heights(), strict=True):
            found[module.component, target.path] = delta[row : row + height]
            row += height
    return found


def assert_comes_back(model: Model, made: Adapter, tolerance: float) -> None:
    """The updates are those of the model, but for the rounding of the checkpoints."""
    found = updates(made)
    assert found.keys() == model.deltas.keys()
    for key, delta in model.deltas.items():
        assert float((found[key] - delta.flatten(1)).norm()) <= tolerance * float(delta.norm()), key


SD15 = {
    "unet": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
        "time_embedding.linear_1",
        "conv_in",
    ],
    "text_encoder": [
        "text_model.encoder.layers.0.self_attn.k_proj",
        "text_model.encoder.layers.11.mlp.fc2",
        "text_model.embeddings.position_embedding",
    ],
}
SDXL = {
    "unet": ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", "add_embedding.linear_1"],
    "text_encoder": ["text_model.encoder.layers.3.self_attn.out_proj"],
    "text_encoder_2": [
        *(f"text_model.encoder.layers.3.self_attn.{part}_proj" for part in "qkv"),
        "text_model.encoder.layers.3.mlp.fc1",
        "text_projection",
    ],
}
FLUX = {
    "transformer": [
        *(f"transformer_blocks.2.attn.to_{part}" for part in "qkv"),
        "norm_out.linear:scale",
        "norm_out.linear:shift",
        "transformer_blocks.0.attn.to_out.0",
        "proj_out",
    ]
}
CASES = [
    ("sd15", SD15, "ldm", "diffusers"),
    ("sd15", SD15, "diffusers-short", "ldm"),
    ("sdxl", SDXL, "sgm", "diffusers"),
    ("sdxl", SDXL, "diffusers", "sgm"),
    ("flux", FLUX, "bfl", "diffusers"),
    ("flux", FLUX, "diffusers", "bfl"),
]


@pytest.mark.parametrize(("architecture", "paths", "before", "after"), CASES, ids=lambda one: str(one)[:12])
def test_a_lora_comes_back(
    tmp_path: Path, architecture: str, paths: Mapping[str, Sequence[str]], before: str, after: str
) -> None:
    """Full width, real names; base and tuned spelled differently, both float32: to 5e-5, which is their rounding.

    (A weight of 0.03 in float32 is good to 2e-9; the update's entries are some 8e-4.)
    """
    model = Model(architecture, paths)
    base = model.write(tmp_path / "base", before, tuned=False)
    tuned = model.write(tmp_path / "tuned", after, tuned=True)
    # kohya fuses q, k, v of Flux: three parts of rank 4 side by side.
    rule = "rank 12" if architecture == "flux" else "rank 4"
    report = extract_file(base, tuned, tmp_path / "o.safetensors", wish(rule), architecture=architecture)
    made = open_adapter(tmp_path / "o.safetensors", architecture=architecture)
    assert_comes_back(model, made, 5e-5)
    assert (report.layout, report.architecture, report.missing, report.misshapen) == ("kohya", architecture, (), ())
    assert report.error < 5e-5 and report.energy > 1 - 1e-8
    assert report.held is not None and report.held.modules == len(made.modules)
    assert report.held.error < 3e-6 and report.held.coarse == ()
    assert all(module.scale == 1.0 for module in made.modules)
    assert not made.extras


@pytest.mark.parametrize(
    ("stored", "factors", "tolerance"), [("F16", "F16", 0.03), ("BF16", "F32", 0.2), ("F32", "F16", 1e-3)]
)
def test_rounding_is_all_that_is_lost(tmp_path: Path, stored: str, factors: str, tolerance: float) -> None:
    """In 16 bits the checkpoint itself has lost something: entries of 0.03 are rounded by 1e-5 in float16 (8e-5 in
    bfloat16), the update's are 8e-4, and a pair of rank 4 takes up little of the noise: 3% at most, 20% in bfloat16."""
    model = Model("sd15", SD15)
    base = model.write(tmp_path / "base.safetensors", "ldm", tuned=False, dtype=stored)
    tuned = model.write(tmp_path / "tuned", "diffusers", tuned=True, dtype=stored)
    output = tmp_path / "o.safetensors"
    report = extract_file(base, tuned, output, wish(dtype=factors), architecture="sd15")
    assert {module.dtype for module in open_adapter(output, architecture="sd15").modules} == {factors}
    assert_comes_back(model, open_adapter(output, architecture="sd15"), tolerance)
    assert report.notes == ()


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "comfyui"])
def test_every_layout_of_every_model(tmp_path: Path, architecture: str, layout: str) -> None:
    """All weights of a narrow copy, recognised by its names: text encoders do not mislead (three models share one)."""
    components = {
        c: [] for c in architectures()[architecture].components if architecture != "flux" or c != "text_encoder_2"
    }
    model = Model(architecture, components, narrow=64, rank=1)
    kinds = {"sd15": ("ldm", "diffusers"), "sdxl": ("sgm", "diffusers"), "flux": ("comfyui", "diffusers")}
    base = model.write(tmp_path / "base", kinds[architecture][0], tuned=False)
    tuned = model.write(tmp_path / "tuned", kinds[architecture][1], tuned=True)
    output = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    report = extract_file(base, tuned, output, wish("rank 4"), to=layout)
    made = open_adapter(output)
    assert (made.architecture.id, made.layout, report.architecture) == (architecture, layout, architecture)
    assert_comes_back(model, made, 2e-3)
    assert report.size_after == sum(f.stat().st_size for f in [output, *output.rglob("*")] if f.is_file())


def test_two_folders_of_diffusers(tmp_path: Path) -> None:
    model = Model("sdxl", {"unet": [], "text_encoder": [], "text_encoder_2": []}, narrow=64, rank=1)
    base = model.write(tmp_path / "base", "diffusers", tuned=False)
    tuned = model.write(tmp_path / "tuned", "diffusers-short", tuned=True)
    report = extract_file(base, tuned, None, wish("rank 2"))
    assert (report.architecture, report.output, report.held) == ("sdxl", None, None)
    assert report.error < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


# -- models without a table -------------------------------------------------------------------------------------------

LLM = {
    "model.embed_tokens": (40, 16),
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.k_proj": (8, 16),
    "model.layers.0.mlp.up_proj": (24, 16),
    "model.layers.0.input_layernorm": (16,),
    "lm_head": (40, 16),
}


def llm(tuned: bool, names: Mapping[str, Sequence[int]] | None = None) -> Tensors:
    """A small language model; embedding and norm change as well."""
    made = {}
    for seed, (name, shape) in enumerate((names or LLM).items()):
        made[f"{name}.weight"] = noise(shape, 3 * seed, 0.03)
        if tuned:
            made[f"{name}.weight"] += low_rank(shape, 3 * seed + 1, 2) if len(shape) > 1 else 0.01
    return made


def shards(folder: Path, tensors: Tensors) -> Path:
    """As transformers saves a large model."""
    names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    weight_map = {key: names[at % 2] for at, key in enumerate(tensors)}
    for name in names:
        save(folder / name, {key: tensor for key, tensor in tensors.items() if weight_map[key] == name})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.mark.parametrize("wrapper", ["model.", "", "language_model.model."])
def test_a_language_model_in_shards(tmp_path: Path, wrapper: str) -> None:
    """A folder in shards against one file whose names have another wrapper, or none."""
    base = shards(tmp_path / "llama", llm(False))
    respelled = {key.replace("model.", wrapper, 1): tensor for key, tensor in llm(True).items()}
    tuned = save(tmp_path / "tuned.safetensors", respelled)
    report = extract_file(base, tuned, tmp_path / "out", wish("rank 2"))
    assert (report.layout, report.architecture) == ("peft", "generic")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["fan_in_fan_out"]) == ("llama", False)
    found = updates(open_adapter(tmp_path / "out"))
    wanted = {name for name in LLM if "_proj" in name or name == "lm_head"}
    assert {path for _, path in found} == wanted
    for (_, path), delta in found.items():
        meant = llm(True)[f"{path}.weight"] - llm(False)[f"{path}.weight"]
        assert float((delta - meant).norm()) <= 1e-4 * float(meant.norm()), path
    assert {one.kind: (one.count, one.kept) for one in report.others} == {"norm": (1, 0), "embedding": (1, 0)}


def test_conv1d_is_turned(tmp_path: Path) -> None:
    """GPT-2 stores (in, out); PEFT's factors are those of (out, in). Square weights are told by the others."""
    names = {"h.0.attn.c_attn": (16, 48), "h.0.attn.c_proj": (16, 16), "wte": (40, 16), "lm_head": (40, 16)}
    before, after = llm(False, names), llm(True, names)
    biases = {"h.0.attn.c_attn.bias": torch.zeros(48), "h.0.attn.c_proj.bias": torch.zeros(16)}
    base = shards(tmp_path / "gpt2", before | biases)
    tuned = save(tmp_path / "t.safetensors", {f"transformer.{key}": one for key, one in (after | biases).items()})
    extract_file(base, tuned, tmp_path / "out", wish("rank 2"), to="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["fan_in_fan_out"] is True
    found = {path: delta for (_, path), delta in updates(open_adapter(tmp_path / "out")).items()}
    assert found.keys() == {"h.0.attn.c_attn", "h.0.attn.c_proj", "lm_head"}
    for path, delta in found.items():
        meant = after[f"{path}.weight"] - before[f"{path}.weight"]
        meant = meant if path == "lm_head" else meant.T
        assert delta.shape == meant.shape
        assert float((delta - meant).norm()) <= 1e-4 * float(meant.norm()), path


def test_other_parameters_are_told(tmp_path: Path) -> None:
    before, after = llm(False), llm(True)
    before["model.layers.0.modulation"] = torch.zeros(6, 16)
    after["model.layers.0.modulation"] = torch.ones(6, 16)
    report = extract_file(save(tmp_path / "a", before), save(tmp_path / "b", after), None, wish())
    assert {one.kind: one.count for one in report.others}["other"] == 1
    assert report.layout == "kohya"


def test_parameters_that_only_one_has_are_told(tmp_path: Path) -> None:
    """Of a model without a table: everything that its names do not show, too. The wrapper of TUNED is another one."""
    before, after = llm(False), llm(True)
    norm, head = "model.layers.0.input_layernorm", "lm_head"
    before |= {f"{norm}.bias": torch.zeros(16), "model.scale": torch.zeros(2), "model.gone": torch.zeros(2)}
    after |= {f"{head}.bias": torch.zeros(40), "model.scale": torch.zeros(3), "model.new.weight": torch.zeros(4, 4)}
    respelled = {key.replace("model.", "wrapped.model.", 1): one for key, one in after.items()}
    for tuned in (after, {key if key.startswith("w") else f"wrapped.{key}": one for key, one in respelled.items()}):
        report = extract_file(save(tmp_path / "a", before), save(tmp_path / "b", tuned), None, wish())
        missing = {f"model.{norm}.bias", f"model.{head}.bias", "model.model.gone", "model.model.new"}
        assert (set(report.missing), len(report.missing)) == (missing, 4)
        assert report.misshapen == ("model.model.scale [2] and [3]",)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_other_parameters_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    before, after = llm(False), llm(True)
    before["model.layers.0.modulation"] = torch.zeros(6, 16)
    after["model.layers.0.modulation"] = torch.full((6, 16), value)
    files = save(tmp_path / "a", before), save(tmp_path / "b", after)
    for base, tuned in (files, files[::-1]):
        with pytest.raises(FormatError, match=r"modulation: holds NaN or infinite values") as caught:
            extract_file(base, tuned, None, wish())
        assert caught.value.file == str(tmp_path / "b")  # whichever it is


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A narrow SD 1.x whose differences have a tail, in F32; one weight is unchanged, one hardly changed."""
    folder = tmp_path_factory.mktemp("trained")
    model = Model("sd15", {"unet": [], "text_encoder": []}, narrow=16, rank=4)
    for at, (key, delta) in enumerate(model.deltas.items()):
        model.deltas[key] = delta + noise(delta.shape, at, 1e-4)
    model.deltas["unet", "conv_in"] *= 0
    model.deltas["unet", "down_blocks.1.resnets.0.conv1"] *= 1e-4
    return (
        model.write(folder / "base.safetensors", "ldm", tuned=False),
        model.write(folder / "tuned.safetensors", "ldm", tuned=True),
    )


def dense(trained: tuple[Path, Path], to: str = "kohya") -> dict[Key, torch.Tensor]:
    """TUNED - BASE by hand, under the ldm names."""
    before, after = (read_bundle(path).tensors for path in trained)
    table = architectures()["sd15"]
    found = {}
    for component, voice in next(one for one in table.checkpoints if one.id == "ldm").voices.items():
        for name, (target,) in table.naming(component, voice.naming).items():
            key = f"{voice.prefix}{name}.weight"
            found[component, target.path] = after[key].load() - before[key].load()
    return found


def test_the_report_tells_the_truth(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Errors are those of what the file holds, fp16 rounding included; skipped weights count in the total."""
    output = tmp_path / "o.safetensors"
    report = extract_file(*trained, output, wish(dtype="F16", min_norm=1e-3))
    made, meant = updates(open_adapter(output)), dense(trained)
    off = total = 0.0
    cuts = {cut.title: cut for cut in report.modules}
    assert len(cuts) == len(made)
    for key, delta in made.items():
        cut = cuts[".".join(key)]
        size, error = float(meant[key].norm()), float((delta - meant[key].flatten(1)).double().norm())
        assert cut.norm == pytest.approx(size, rel=1e-5)
        assert cut.error == pytest.approx(error / size, rel=1e-3, abs=1e-6)
        off, total = off + error**2, total + size**2
    (below,) = report.below
    assert (below, report.unchanged) == ("unet.down_blocks.1.resnets.0.conv1", 1)
    small = float(meant["unet", "down_blocks.1.resnets.0.conv1"].norm()) ** 2
    assert report.norm == pytest.approx(math.sqrt(total + small), rel=1e-5)
    assert report.error == pytest.approx(math.sqrt((off + small) / (total + small)), rel=1e-3)
    assert report.energy == pytest.approx(1 - report.error**2)


@pytest.mark.parametrize(
    "rule", ["rank 2", "energy 0.9", "ratio 3", "cumulative 0.6", "knee", "error 0.2", "size 400KiB"]
)
def test_every_rule(trained: tuple[Path, Path], tmp_path: Path, rule: str) -> None:
    output = tmp_path / "o.safetensors"
    report = extract_file(*trained, output, wish(rule, "F16"))
    assert report.rule == rule
    spectra = {
        key: torch.linalg.svdvals(delta.flatten(1).double()) for key, delta in dense(trained).items() if delta.dim() > 1
    }
    for cut in report.modules:
        component, _, path = cut.title.partition(".")
        values = spectra[component, path]
        best = float(values[cut.rank_after :].norm() / values.norm())
        assert best * 0.999 - 1e-6 <= cut.error <= best + 2e-3, cut.title
        if rule == "energy 0.9":
            assert best**2 <= 0.1 + 1e-9 and float(values[cut.rank_after - 1 :].norm() / values.norm()) ** 2 > 0.1
        if rule == "ratio 3":
            assert cut.rank_after == int((values >= values[0] / 3 * (1 + 1e-6)).sum())
    if rule == "error 0.2":
        assert 0.19 < report.error <= 0.201
    if rule == "size 400KiB":
        assert 0.98 * 400 * 1024 <= output.stat().st_size == report.size_after <= 400 * 1024


def test_limits(trained: tuple[Path, Path]) -> None:
    report = extract_file(*trained, None, wish("energy 1", limits=Limits(max_rank=3, conv_rank=2)))
    kernels = {cut.rank_after for cut in report.modules if cut.title.endswith(("conv1", "conv2", "conv_in", ".conv"))}
    assert kernels == {2}
    assert max(cut.rank_after for cut in report.modules) == 3
    assert extract_file(*trained, None, wish("ratio 1", limits=Limits(min_rank=2))).ranks_after.keys() >= {2}


def test_exact_and_randomised_agree(tmp_path: Path) -> None:
    """A wide weight of rank 4 and noise: 8e-4 of its error at most between the two."""
    path = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    model = Model("sd15", {"unet": [path]})
    model.deltas["unet", path] += noise((5120, 640), 9, 1e-4)
    sides = [model.write(tmp_path / str(tuned), "ldm", tuned=tuned) for tuned in (False, True)]
    fast, exact = (
        extract_file(*sides, None, wish("rank 8", exact=exact), architecture="sd15") for exact in (False, True)
    )
    assert (fast.exact, exact.exact) == (0, 1)
    assert fast.error == pytest.approx(exact.error, rel=8e-4) and fast.error > 0.05


def test_a_pair_that_is_too_far_off_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is measured, and a randomised pair that does not hold what it says is not taken."""
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    model = Model("sd15", {"unet": [path]})
    sides = [model.write(tmp_path / str(tuned), "ldm", tuned=tuned) for tuned in (False, True)]
    real = extraction.leading

    def wrong(matrix, count, *, exact=False):  # type: ignore[no-untyped-def]
        found = real(matrix, count, exact=exact)
        return found if exact else found._replace(left=found.left * 0.9, exact=False)

    monkeypatch.setattr(extraction, "leading", wrong)
    report = extract_file(*sides, None, wish(), architecture="sd15")
    assert (report.exact, len(report.modules)) == (1, 1) and report.error < 1e-4


def test_clamp_is_that_of_the_popular_scripts(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """U S and V, both cut at the quantile of all entries (sd-scripts' extract_lora_from_models)."""
    output = tmp_path / "o.safetensors"
    report = extract_file(*trained, output, wish("rank 3", clamp=0.9))
    meant = dense(trained)
    for key, delta in list(updates(open_adapter(output)).items())[::40]:
        x, values, y = torch.linalg.svd(meant[key].flatten(1), full_matrices=False)
        up, down = x[:, :3] * values[:3], y[:3]
        # Signs of singular vectors are free, and the quantile of signed entries depends on them.
        options = []
        for signs in np.ndindex(*(2,) * up.shape[1]):
            sign = 1 - 2 * torch.tensor(signs, dtype=up.dtype)
            left, right = up * sign, down * sign[:, None]
            most = torch.quantile(torch.cat([left.flatten(), right.flatten()]), 0.9)
            options.append(left.clamp(-most, most) @ right.clamp(-most, most))
        assert min(float((delta - one).norm()) for one in options) <= 1e-3 * float(delta.norm()), key
    assert report.error > extract_file(*trained, None, wish("rank 3")).error


# -- norms and biases in full -----------------------------------------------------------------------------------------


def with_norms(tmp_path: Path) -> tuple[Path, Path, Tensors]:
    """Full-width weights, norms and biases of SD 1.x and of OpenCLIP's neighbour; the tuned one is a folder."""
    stem = "model.diffusion_model.input_blocks.1.0."
    clip = "cond_stage_model.transformer.text_model."
    shapes = {
        f"{stem}in_layers.0.weight": (320,),
        f"{stem}in_layers.0.bias": (320,),
        f"{stem}in_layers.2.weight": (320, 320, 3, 3),
        f"{stem}in_layers.2.bias": (320,),
        f"{stem}out_layers.0.weight": (320,),
        f"{clip}embeddings.position_embedding.weight": (77, 768),
        f"{clip}encoder.layers.0.self_attn.q_proj.weight": (768, 768),
        f"{clip}encoder.layers.0.self_attn.q_proj.bias": (768,),
    }
    before = {key: noise(shape, at, 0.03) for at, (key, shape) in enumerate(shapes.items())}
    deltas = {
        key: low_rank(shape, 50 + at, 2) if len(shape) > 2 else noise(shape, at, 0.01)
        for at, (key, shape) in enumerate(shapes.items())
        if "out_layers" not in key
    }
    after = {key: tensor + deltas.get(key, 0) for key, tensor in before.items()}
    names = {
        f"{stem}in_layers.0": "unet/down_blocks.0.resnets.0.norm1",
        f"{stem}in_layers.2": "unet/down_blocks.0.resnets.0.conv1",
        f"{stem}out_layers.0": "unet/down_blocks.0.resnets.0.norm2",
        f"{clip}embeddings.position_embedding": "text_encoder/text_model.embeddings.position_embedding",
        f"{clip}encoder.layers.0.self_attn.q_proj": "text_encoder/text_model.encoder.layers.0.self_attn.q_proj",
    }
    for component in ("unet", "text_encoder"):
        own = {
            f"{names[stem].partition('/')[2]}.{kind}": tensor
            for (stem, _, kind), tensor in ((key.rpartition("."), tensor) for key, tensor in after.items())
            if names[stem].startswith(f"{component}/")
        }
        save(tmp_path / "tuned" / component / "model.safetensors", own)
    return save(tmp_path / "base.safetensors", before), tmp_path / "tuned", deltas


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_full_differences(tmp_path: Path, layout: str) -> None:
    base, tuned, deltas = with_norms(tmp_path)
    output = tmp_path / "o.safetensors"
    report = extract_file(base, tuned, output, wish(), to=layout, full=True, architecture="sd15")
    stems = {
        "kohya": ["lora_unet_down_blocks_0_resnets_0_norm1", "lora_unet_down_blocks_0_resnets_0_conv1"]
        + [
            f"lora_te_text_model_{name}"
            for name in ("embeddings_position_embedding", "encoder_layers_0_self_attn_q_proj")
        ],
        "comfyui": ["diffusion_model.input_blocks.1.0.in_layers.0", "diffusion_model.input_blocks.1.0.in_layers.2"]
        + [
            f"text_encoders.clip_l.transformer.text_model.{name}"
            for name in ("embeddings.position_embedding", "encoder.layers.0.self_attn.q_proj")
        ],
    }[layout]
    keys = [key.rpartition(".") for key in deltas]
    sources = list(dict.fromkeys(stem for stem, _, _ in keys))
    written = read_bundle(output).tensors
    expected = {}
    for source, stem in zip(sources, stems, strict=True):
        for kind, suffix in (("weight", ".diff"), ("bias", ".diff_b")):
            delta = deltas.get(f"{source}.{kind}")
            paired = "in_layers.2" in source or "q_proj" in source
            if delta is not None and not (paired and (kind == "weight" or layout == "kohya")):
                expected[stem + suffix] = delta
    assert {key for key in written if ".diff" in key} == expected.keys()
    for key, delta in expected.items():
        assert written[key].dtype == "F32" and written[key].shape == tuple(delta.shape)
        assert torch.allclose(written[key].load(), delta, atol=1e-8), key
    assert {one.kind: (one.count, one.kept) for one in report.others} == {
        "norm": (1, 1),
        "bias": (3, 1 if layout == "kohya" else 3),
        "embedding": (1, 1),
    }
    lost = "kohya has no spelling for the bias of a linear or convolution, 2 are left out: --to comfyui keeps them"
    assert report.notes == ((lost,) if layout == "kohya" else ())
    bake_file(base, [Asked(str(output))], tmp_path / "again.safetensors", architecture="sd15")  # all has a place


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_full_differences_alone(tmp_path: Path, layout: str) -> None:
    """Training of norms only."""
    base, _, deltas = with_norms(tmp_path)
    tensors = {key: tensor.load() for key, tensor in read_bundle(base).tensors.items()}
    norm = "model.diffusion_model.input_blocks.1.0.in_layers.0"
    own = {key: tensors[key] + deltas[key] for key in (f"{norm}.weight", f"{norm}.bias")}
    tuned, output = save(tmp_path / "norms.safetensors", {**tensors, **own}), tmp_path / "o.safetensors"
    with pytest.raises(LoratoolError, match=r"none of its 2 linears .* differs .*; norms, .* do: --full keeps those"):
        extract_file(base, tuned, output, wish(), to=layout, architecture="sd15")
    report = extract_file(base, tuned, output, wish(), to=layout, full=True, architecture="sd15")
    assert (report.modules, report.error, report.unchanged) == ((), 0.0, 2)
    assert {one.kind: (one.count, one.kept) for one in report.others} == {"norm": (1, 1), "bias": (1, 1)}
    bake_file(base, [Asked(str(output))], tmp_path / "again.safetensors", architecture="sd15")
    again = read_bundle(tmp_path / "again.safetensors").tensors
    for key, tensor in {**tensors, **own}.items():
        assert torch.allclose(again[key].load(), tensor, atol=1e-7), key


def test_a_full_difference_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, tuned, _ = with_norms(tmp_path)
    file = tuned / "unet" / "model.safetensors"
    tensors = {key: tensor.load().clone() for key, tensor in read_bundle(file).tensors.items()}
    for key in ("down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.conv1.bias"):
        save(file, {**tensors, key: tensors[key] + 1e5})
        with pytest.raises(LoratoolError, match="the difference does not fit F16"):
            extract_file(base, tuned, tmp_path / "o", wish(dtype="F16"), to="comfyui", full=True, architecture="sd15")
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_layouts_that_cannot_hold_full_differences(tmp_path: Path, layout: str) -> None:
    base, tuned, _ = with_norms(tmp_path)
    with pytest.raises(NotRepresentable, match=f"{layout} has no spelling for the full difference"):
        extract_file(base, tuned, tmp_path / "out", wish(), to=layout, full=True, architecture="sd15")
    report = extract_file(base, tuned, tmp_path / "out", wish(), to=layout, architecture="sd15")
    assert sum(one.count for one in report.others) == 5 and not any(one.kept for one in report.others)


def test_flux_norms_have_their_own_names_in_comfyui(tmp_path: Path) -> None:
    """`query_norm.scale` is no module's weight: ComfyUI looks for a difference under the parameter's own name."""
    stem = "double_blocks.0.img_attn."
    before = {f"{stem}proj.weight": noise((3072, 3072), 0, 0.02), f"{stem}norm.query_norm.scale": torch.ones(128)}
    after = {key: tensor + 0.01 for key, tensor in before.items()}
    sides = save(tmp_path / "a.safetensors", before), save(tmp_path / "b.safetensors", after)
    extract_file(*sides, tmp_path / "o.safetensors", wish("rank 1"), to="comfyui", full=True, architecture="flux")
    written = read_bundle(tmp_path / "o.safetensors").tensors
    assert f"diffusion_model.{stem}norm.query_norm.scale.diff" in written


def test_openclip_biases_are_cut(tmp_path: Path) -> None:
    stem = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj"
    before = {f"{stem}_weight": noise((3840, 1280), 0, 0.02), f"{stem}_bias": torch.zeros(3840)}
    after = {f"{stem}_weight": before[f"{stem}_weight"] + low_rank((3840, 1280), 3), f"{stem}_bias": noise((3840,), 5)}
    sides = save(tmp_path / "a.safetensors", before), save(tmp_path / "b.safetensors", after)
    extract_file(*sides, tmp_path / "o.safetensors", wish(), full=True, architecture="sdxl")
    written = read_bundle(tmp_path / "o.safetensors").tensors
    for at, part in enumerate("qkv"):
        key = f"text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.{part}_proj.diff_b"
        assert torch.equal(written[key].load(), after[f"{stem}_bias"][1280 * at : 1280 * (at + 1)])


# -- the file ---------------------------------------------------------------------------------------------------------


def test_header_and_recipe(trained: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    extract_file(*trained, output, wish(dtype="F16", min_norm=1e-3))
    metadata = read_bundle(output).metadata
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_sd_model_name"] == "base.safetensors"
    made = recipe.decode(metadata)
    assert made["command"] == "extract" and (made["rule"], made["min_norm"]) == ("rank 4", 1e-3)
    assert made["inputs"] == [{"name": path.name, "sha256": recipe.checkpoint_sha256(path)} for path in trained]
    assert str(trained[0].parent) not in json.dumps(dict(metadata))
    assert_hashes_are_true(output)
    with pytest.raises(FormatError, match="its recipe is for 'extract'"):
        replay_file(output)


def test_the_same_twice_is_the_same_file(trained: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        extract_file(*trained, tmp_path / name, wish("energy 0.5"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_dry_run_knows_the_size(trained: tuple[Path, Path], tmp_path: Path) -> None:
    dry = extract_file(*trained, None, wish())
    assert not list(tmp_path.iterdir())
    extract_file(*trained, tmp_path / "o.safetensors", wish())
    assert dry.size_after == (tmp_path / "o.safetensors").stat().st_size


# -- what it refuses --------------------------------------------------------------------------------------------------


def narrow(tmp_path: Path, architecture: str, checkpoint: str, scale: int = 64) -> Path:
    model = Model(architecture, {next(iter(architectures()[architecture].components)): []}, narrow=scale, rank=1)
    return model.write(tmp_path / f"{architecture}{scale}", checkpoint, tuned=False)


def test_two_models_are_refused_by_name(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    other = narrow(tmp_path, "sdxl", "sgm")
    with pytest.raises(FormatError, match=r"is a checkpoint of .*XL, the base is a checkpoint of .*1\.x") as caught:
        extract_file(trained[0], other, None, wish())
    assert caught.value.file == str(other)
    unknown = save(tmp_path / "llm.safetensors", llm(True))
    with pytest.raises(FormatError, match="is of no model that is known, the base is a checkpoint of"):
        extract_file(trained[0], unknown, None, wish())
    stranger = save(tmp_path / "other.safetensors", {"h.0.mlp.weight": noise((4, 4), 0)})
    with pytest.raises(FormatError, match=r"has no part of the model in llm\.safetensors that the base has"):
        extract_file(unknown, stranger, None, wish())
    few = save(tmp_path / "few.safetensors", dict(list(llm(True).items())[:2]))
    with pytest.raises(FormatError, match="has 2 of the 6 weights that the base has in model"):
        extract_file(unknown, few, None, wish())
    with pytest.raises(FormatError, match="have another shape than in the base"):
        extract_file(trained[0], narrow(tmp_path, "sd15", "ldm"), None, wish())


def test_one_weight_of_another_shape_is_left_out_and_told(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """An inpainting model's first convolution has nine inputs."""
    tensors = {key: tensor.load() for key, tensor in read_bundle(trained[1]).tensors.items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = torch.ones(tensors[first].shape[0], 9, 3, 3)
    tensors.pop("model.diffusion_model.out.2.weight")
    report = extract_file(trained[0], save(tmp_path / "inpainting.safetensors", tensors), None, wish())
    assert len(report.misshapen) == 1 and report.misshapen[0].startswith("unet.conv_in [20, 1, 3, 3] and [20, 9, 3, 3]")
    assert report.missing == ("unet.conv_out",)


def test_parts_that_only_one_has_are_told(trained: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = read_bundle(trained[1]).tensors
    unet = {k.removeprefix("model.diffusion_model."): t.load().half() for k, t in tensors.items() if "diffusion" in k}
    report = extract_file(trained[0], save(tmp_path / "unet.safetensors", unet, "F16"), None, wish())
    assert {cut.component for cut in report.modules} == {"unet"}
    assert report.notes == (
        "only one of the two has text_encoder",
        "stored as F32 and as F16: the rounding of the coarser is part of the difference",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_values_that_cannot_be_computed_with_name_the_weight(
    trained: tuple[Path, Path], tmp_path: Path, value: float
) -> None:
    tensors = {key: tensor.load() for key, tensor in read_bundle(trained[1]).tensors.items()}
    key = next(key for key in tensors if key.endswith("ff.net.2.weight"))
    tensors[key] = torch.full_like(tensors[key], value)
    broken = save(tmp_path / "broken.safetensors", tensors)
    with pytest.raises(FormatError, match=r"ff\.net\.2.*(NaN|float32)") as caught:
        extract_file(trained[0], broken, tmp_path / "o.safetensors", wish())
    assert caught.value.file == str(broken) and not (tmp_path / "o.safetensors").exists()
    if not math.isfinite(value):
        with pytest.raises(FormatError, match=r"ff\.net\.2.*use another copy of it") as caught:
            extract_file(broken, trained[0], None, wish())
        assert caught.value.file == str(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_biases_that_are_not_finite_name_the_checkpoint(tmp_path: Path, value: float) -> None:
    name = "lm_head.bias"
    files = (
        save(tmp_path / "a", llm(False) | {name: torch.zeros(40)}),
        save(tmp_path / "b", llm(True) | {name: torch.full((40,), value)}),
    )
    for base, tuned in (files, files[::-1]):
        with pytest.raises(FormatError, match=r"lm_head\.bias: holds NaN or infinite values") as caught:
            extract_file(base, tuned, None, wish())
        assert caught.value.file == str(tmp_path / "b")


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    plain, scaled = llm(False), llm(True)
    scaled["model.layers.0.mlp.up_proj.scale_weight"] = torch.ones(1)
    with pytest.raises(FormatError, match="belongs to quantised weights"):
        extract_file(save(tmp_path / "a", plain), save(tmp_path / "b", scaled), None, wish())
    stored = {key: LazyTensor.from_torch((tensor * 100).to(torch.int8)) for key, tensor in llm(True).items()}
    write_safetensors(tmp_path / "c", stored, {})
    with pytest.raises(FormatError, match="is stored as I8, expected one of"):
        extract_file(tmp_path / "a", tmp_path / "c", None, wish())


def test_nothing_differs(trained: tuple[Path, Path]) -> None:
    with pytest.raises(LoratoolError, match=r"none of its \d+ linears and convolutions differs from the base"):
        extract_file(trained[0], trained[0], None, wish())
    with pytest.raises(LoratoolError, match="by more than 100 of its norm"):
        extract_file(*trained, None, wish("error 0.5", min_norm=100.0))


def test_a_checkpoint_is_never_an_output(trained: tuple[Path, Path]) -> None:
    before = [path.read_bytes() for path in trained]
    for path in trained:
        with pytest.raises(LoratoolError, match="an input is never changed"):
            extract_file(*trained, path, wish(), overwrite=True)
    assert [path.read_bytes() for path in trained] == before


@pytest.mark.parametrize(
    ("asked", "more", "words"),
    [
        (wish(min_norm=-1.0), {}, "--min-norm"),
        (wish(clamp=0.2), {}, "--clamp"),
        (wish(limits=Limits(5, 4)), {}, "--max-rank"),
        (wish(), {"to": "cloneofsimo"}, "only read"),
        (wish(), {"architecture": "generic"}, "known: .*flux, .*sd15, .*sdxl, "),
    ],
    ids=["min-norm", "clamp", "limits", "to", "architecture"],
)
def test_wishes_that_make_no_sense(
    trained: tuple[Path, Path], asked: Wish, more: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        extract_file(*trained, None, asked, **more)


def test_hostile_shapes_are_refused(tmp_path: Path) -> None:
    """Scalars, vectors and empty tensors under the names of weights: an error, never a traceback."""
    rng = random.Random(0)
    for shape in ((), (0,), (5,), (0, 4), (3, 0), (2, 3, 4), (1, 1, 1, 1, 1)):
        tensors = llm(True)
        for key in rng.sample(list(tensors), 4):
            tensors[key] = torch.zeros(shape)
        path = save(tmp_path / "b", tensors)
        for sides in ((save(tmp_path / "a", llm(False)), path), (path, path)):
            try:
                extract_file(*sides, None, wish())
            except LoratoolError:
                continue


def test_the_layout_fits_the_model(trained: tuple[Path, Path]) -> None:
    assert extract_file(*trained, None, wish()).layout == "kohya"
    report: ExtractReport = extract_file(*trained, None, wish(), to="diffusers")
    assert report.layout == "diffusers" and "diffusers" in layouts()


def test_what_a_part_of_a_model_leaves_out_is_told(tmp_path: Path) -> None:
    """Too few weights to tell the model by: only the diffusion model's are compared, and the rest is counted."""
    before = {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": noise((16, 16), 1),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": noise((16, 16), 2),
        "first_stage_model.decoder.conv_in.weight": noise((16, 16), 3),
    }
    base = save(tmp_path / "base.safetensors", before)
    tuned = save(tmp_path / "tuned.safetensors", {key: tensor + 0.1 * tensor.T for key, tensor in before.items()})
    report = extract_file(base, tuned, tmp_path / "out.safetensors", wish())
    assert len(report.notes) == 1 and report.notes[0].startswith("2 weights outside of the diffusion model")
