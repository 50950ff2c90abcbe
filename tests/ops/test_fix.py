"""Known faults of producers: each is found where it is, not found where it is not, and what is mended is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.errors import UsageError
from loratool.core.registry import programs
from loratool.files.safetensors import EMPTY_SHA256, read_header
from loratool.ops.fix import FIXES, UNREAD_ENCODER, fix_file
from loratool.ops.open import open_adapter
from loratool.ops.validate import validate
from tests.bakes import K, Q, noise, save

TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
RANK, ALPHA = 8, 4.0
TRUE: Mapping[str, str] = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_base_model_version": "sd_v1"}


def lora(alpha: float = ALPHA, rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three modules of SD 1.5 in kohya's layout."""
    tensors: dict[str, Tensor] = {}
    for seed, (stem, size) in enumerate(((Q, 320), (K, 320), (TEXT, 768))):
        tensors[f"{stem}.lora_down.weight"] = noise(rank, size, seed=seed, size=0.1).to(dtype)
        tensors[f"{stem}.lora_up.weight"] = noise(size, rank, seed=seed + 9, size=0.1).to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return tensors


def deltas(path: Path) -> dict[str, Tensor]:
    """The update of every module, as the formula says it, float64."""
    tensors = load_file(path)
    found = {}
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            stem = key.removesuffix(".lora_up.weight")
            down = tensors[f"{stem}.lora_down.weight"].double()
            scale = tensors[f"{stem}.alpha"].double() / down.shape[0]
            found[stem] = up.double() @ down * scale
    return found


def codes_of(path: Path) -> set[str]:
    """Everything that is found in a file."""
    return {finding.code for result in validate(path) for finding in result.findings}


def mended(path: Path, tmp_path: Path, code: str) -> Path:
    """The file without that fault; nothing else of it is a known fault."""
    assert code in codes_of(path)
    output = tmp_path / "fixed.safetensors"
    report = fix_file(path, output, only=[code])
    assert [one.code for one in report.mended] == [code] and not report.left
    assert code not in codes_of(output)
    history = json.loads(read_header(output).metadata["loratool.history"])
    assert history[-1]["op"] == "fix" and history[-1]["codes"] == [code]
    return output


def test_a_sound_file_has_nothing(tmp_path: Path) -> None:
    """And nothing is written."""
    path = save(tmp_path / "a.safetensors", lora(), TRUE)
    assert not codes_of(path) & set(FIXES)
    report = fix_file(path, tmp_path / "b.safetensors")
    assert not report.mended and report.output is None and not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("code", "alpha", "rank", "metadata", "times"),
    [
        ("alpha-became-one", 1.0, 8, TRUE, 4.0),
        ("alpha-became-one", 1.0, 8, {**TRUE, "ss_network_alpha": "None"}, 8.0),
        ("scale-twice", 2.0, 8, TRUE, 2.0),
        ("diluted-concat", 4.0, 16, {**TRUE, "modelspec.merged_from": "a, b"}, 2.0),
        ("diluted-concat", 4.0, 24, {**TRUE, "modelspec.merged_from": "a, b, c"}, 3.0),
    ],
)
def test_alphas(tmp_path: Path, code: str, alpha: float, rank: int, metadata: Mapping[str, str], times: float) -> None:
    """The update becomes so many times as strong, and the factors keep their bytes."""
    path = save(tmp_path / "a.safetensors", lora(alpha, rank), metadata)
    output = mended(path, tmp_path, code)
    before, after = deltas(path), deltas(output)
    for stem, delta in before.items():
        assert torch.allclose(after[stem], delta * times, rtol=1e-12)
    old, new = load_file(path), load_file(output)
    assert all(torch.equal(old[key], new[key]) for key in old if not key.endswith(".alpha"))


def test_an_alpha_that_was_rounded(tmp_path: Path) -> None:
    """bf16 has no 100.3: the alpha is stored as float32, the factors stay what they are."""
    metadata = {**TRUE, "ss_network_alpha": "100.3"}
    path = save(tmp_path / "a.safetensors", lora(100.3, dtype=torch.bfloat16), metadata)
    new = load_file(mended(path, tmp_path, "alpha-rounded"))
    assert new[f"{Q}.alpha"].dtype == torch.float32 and float(new[f"{Q}.alpha"]) == pytest.approx(100.3, rel=1e-7)
    assert new[f"{Q}.lora_up.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("code", "entry", "wrong", "right"),
    [("wrong-dim", "ss_network_dim", "32", "8"), ("wrong-alpha", "ss_network_alpha", "16", "4")],
)
def test_entries_that_are_wrong(tmp_path: Path, code: str, entry: str, wrong: str, right: str) -> None:
    path = save(tmp_path / "a.safetensors", lora(), {**TRUE, entry: wrong})
    output = mended(path, tmp_path, code)
    assert read_header(output).metadata[entry] == right
    assert all(torch.equal(left, load_file(output)[key]) for key, left in load_file(path).items())


def test_an_entry_that_no_number_could_be_true_of(tmp_path: Path) -> None:
    """Ranks that differ are Dynamic, as sd-scripts says."""
    tensors = lora() | {key: value for key, value in lora(rank=4).items() if key.startswith(TEXT)}
    path = save(tmp_path / "a.safetensors", tensors, {**TRUE, "ss_network_dim": "32"})
    assert read_header(mended(path, tmp_path, "wrong-dim")).metadata["ss_network_dim"] == "Dynamic"


def test_a_hash_of_nothing(tmp_path: Path) -> None:
    """The true one is that of the data, and validate does not call it damage."""
    path = save(tmp_path / "a.safetensors", lora(), {**TRUE, "sshs_model_hash": EMPTY_SHA256})
    assert "hash-mismatch" not in codes_of(path)
    output = mended(path, tmp_path, "hash-of-nothing")
    assert "hash-mismatch" not in codes_of(output)
    assert len(set(read_header(output).metadata["sshs_model_hash"])) > 4


def test_dead_modules(tmp_path: Path) -> None:
    """What changes nothing is left out; an adapter of nothing else is left alone."""
    tensors = lora()
    tensors[f"{K}.lora_up.weight"].zero_()
    path = save(tmp_path / "a.safetensors", tensors, TRUE)
    output = mended(path, tmp_path, "zero-module")
    assert {key.partition(".")[0] for key in load_file(output)} == {Q, TEXT}


def test_factors_beyond_fp16(tmp_path: Path) -> None:
    """No bit of the update changes: powers of two are moved."""
    tensors = lora()
    tensors[f"{Q}.lora_up.weight"] *= 1e7
    path = save(tmp_path / "a.safetensors", tensors, TRUE)
    output = mended(path, tmp_path, "fp16-factor")
    assert all(bool(tensor.half().isfinite().all()) for tensor in load_file(output).values())
    assert all(torch.equal(delta, deltas(output)[stem]) for stem, delta in deltas(path).items())


def test_factors_that_cannot_be_within_fp16(tmp_path: Path) -> None:
    """Told, not done; exit 1."""
    tensors = lora()
    for part in ("up", "down"):
        tensors[f"{Q}.lora_{part}.weight"] *= 1e9
    path = save(tmp_path / "a.safetensors", tensors, TRUE)
    report = fix_file(path, tmp_path / "b.safetensors", only=["fp16-factor"])
    assert not report.mended and "neither factor" in report.left[0].fixed
    assert run(path, "-o", tmp_path / "b.safetensors", "--only", "fp16-factor").exit_code == 1


def test_a_scale_that_is_told_twice(tmp_path: Path) -> None:
    """diffusers refuses both at once; where they agree the alphas go, else nobody can know."""
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{stem}.lora_A.weight": noise(RANK, 320),
        f"{stem}.lora_B.weight": noise(320, RANK),
        f"{stem}.alpha": torch.tensor(ALPHA),
    }
    config = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.target_modules": ["to_q"]}
    path = save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    before = open_adapter(path).modules[0].scale
    output = mended(path, tmp_path, "two-scales")
    assert not any(key.endswith("alpha") for key in load_file(output))
    assert open_adapter(output).modules[0].scale == before
    config["unet.lora_alpha"] = 16.0
    path = save(tmp_path / "c.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert "another scale" in fix_file(path, None, only=["two-scales"]).left[0].fixed


def test_a_text_encoder_that_is_not_loaded(tmp_path: Path) -> None:
    """With --for PROGRAM, where its rules say so."""
    tensors = {key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in lora().items() if key.startswith(TEXT)}
    stem = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    block = "lora_unet_double_blocks_0_img_attn_proj"
    for name, size in ((stem, 4096), (block, 3072)):
        tensors |= {f"{name}.lora_down.weight": noise(8, size), f"{name}.lora_up.weight": noise(size, 8)}
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    path = save(tmp_path / "a.safetensors", tensors)
    report = fix_file(path, None, only=[UNREAD_ENCODER], program=programs()["diffusers"])
    if not report.mended:
        pytest.skip("diffusers reads it")
    output = tmp_path / "b.safetensors"
    fix_file(path, output, only=[UNREAD_ENCODER], program=programs()["diffusers"])
    assert {key.partition(".")[0] for key in load_file(output)} >= {block}
    assert stem not in {key.partition(".")[0] for key in load_file(output)}


def test_merged_factors_are_told_and_not_fixed(tmp_path: Path) -> None:
    """The strengths that were used stand nowhere."""
    path = save(tmp_path / "a.safetensors", lora(), {**TRUE, "modelspec.merged_from": "a, b"})
    assert "merged-factors" in codes_of(path) and "merged-factors" not in FIXES


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Without --only everything goes, and a second run finds nothing."""
    tensors = lora(1.0)
    tensors[f"{K}.lora_up.weight"].zero_()
    metadata = {**TRUE, "ss_network_dim": "32", "sshs_model_hash": EMPTY_SHA256}
    path = save(tmp_path / "a.safetensors", tensors, metadata)
    output = tmp_path / "b.safetensors"
    report = fix_file(path, output)
    assert {one.code for one in report.mended} >= {"alpha-became-one", "wrong-dim", "zero-module", "hash-of-nothing"}
    assert not codes_of(output) & set(FIXES)
    assert not fix_file(output, None).mended


# -- the command ------------------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["fix", *map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    """A plan, the file, the report as JSON; what exists is not replaced."""
    path = save(tmp_path / "a.safetensors", lora(2.0), TRUE)
    output = tmp_path / "b.safetensors"
    plan = run(path, "--dry-run")
    assert plan.exit_code == 0 and "scale-twice" in plan.stdout and not output.exists()
    done = run(path, "-o", output, "--json")
    data = json.loads(done.stdout)
    assert done.exit_code == 0 and data["mended"][0]["code"] == "scale-twice" and data["output"] == str(output)
    again = run(path, "-o", output)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert run(path, "-o", path, "--overwrite").exit_code == 1
    assert run(path).exit_code == 2
    assert run(path, "--dry-run", "--only", "nonsense").exit_code == 2
    clean = run(output, "--dry-run")
    assert clean.exit_code == 0 and "nothing was written" in clean.stdout


def test_what_depends_on_the_program_needs_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora(), TRUE)
    with pytest.raises(UsageError, match="--for"):
        fix_file(path, None, only=[UNREAD_ENCODER])
