"""bake_file: the values are W + sum of strength * delta, rounded once; everything else keeps its bytes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loratool
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.tensor import torch_dtype
from loratool.files.safetensors import read_header
from loratool.ops import baking
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_report import BakeReport
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
from loratool.ops.rounding import beyond
from loratool.ops.sites import Site
from tests.bakes import CONV, KEYS, OUT, TEXT, K, Q, V, kohya, load, noise, peft, save, updates

SHAPES: Mapping[str, tuple[int, ...]] = {Q: (48, 32), K: (48, 32), CONV: (24, 8, 3, 3), TEXT: (16, 16)}
OTHERS: Mapping[str, Tensor] = {
    "first_stage_model.decoder.conv_in.weight": noise(8, 4, 3, 3, seed=50),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77),
    "model.diffusion_model.out.0.bias": noise(32, seed=51, dtype=torch.bfloat16),
    "odd": noise(3, seed=52, dtype=torch.float16),
}
METADATA = {"modelspec.title": "base", "format": "pt"}
F16, BF16, E4M3, E5M2 = torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
CODES = {F16: "F16", BF16: "BF16", E4M3: "F8_E4M3", E5M2: "F8_E5M2", torch.float32: "F32"}


def base_file(
    path: Path, dtype: torch.dtype = F16, metadata: Mapping[str, str] | None = METADATA, size: float = 1.0
) -> Path:
    weights = {KEYS[stem]: noise(*shape, seed=number, size=size) for number, (stem, shape) in enumerate(SHAPES.items())}
    return save(path, {key: weight.to(dtype) for key, weight in weights.items()} | dict(OTHERS), metadata)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_file(tmp_path / "base.safetensors")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "lora.safetensors", kohya(SHAPES))


def baked(
    base: Path, asked: Path | Sequence[Asked], options: Options | None = None
) -> tuple[dict[str, Tensor], BakeReport]:
    """The tensors of the output, and the report."""
    output = base.parent / "out.safetensors"
    output.unlink(missing_ok=True)
    report = bake_file(base, [Asked(str(asked))] if isinstance(asked, Path) else asked, output, options)
    return load(output), report


def assert_rounded(found: Tensor, exact: Tensor, slack: float = 1e-6) -> None:
    """`found` is one of the numbers of its dtype nearest to float64 values, but for float32's own error."""
    assert found.shape == exact.shape
    near = exact.to(found.dtype).double()
    limit = (near - exact).abs() + slack * float(exact.abs().max())
    assert bool(((found.double() - exact).abs() <= limit).all())


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16, torch.float32])
def test_every_weight_is_the_sum_rounded_once(tmp_path: Path, lora: Path, dtype: torch.dtype) -> None:
    base = base_file(tmp_path / "b.safetensors", dtype)
    before, (after, report) = load(base), baked(base, lora)
    for stem, update in updates(load(lora)).items():
        assert after[KEYS[stem]].dtype == dtype
        assert_rounded(after[KEYS[stem]], before[KEYS[stem]].double() + update)
    assert report.checked is not None and report.checked.tensors == len(SHAPES)
    assert report.checked.rows == 2 * len(SHAPES) and report.checked.worst <= 0.51 * (
        1 if dtype != torch.float32 else 1e3
    )
    assert {one.key for one in report.tensors} == {KEYS[stem] for stem in SHAPES}


def test_a_full_width_weight(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {KEYS[Q]: noise(1280, 1280, dtype=BF16), KEYS[CONV]: noise(320, 640, 3, 3)})
    lora = save(tmp_path / "l.safetensors", kohya({Q: (1280, 1280), CONV: (320, 640, 3, 3)}))
    before, (after, _) = load(base), baked(base, lora)
    for stem, update in updates(load(lora)).items():
        assert_rounded(after[KEYS[stem]], before[KEYS[stem]].double() + update)


def test_several_adapters_are_added_and_rounded_once(tmp_path: Path, base: Path, lora: Path) -> None:
    other = save(tmp_path / "other.safetensors", kohya({Q: SHAPES[Q], TEXT: SHAPES[TEXT]}, seed=77))
    before, (after, report) = load(base), baked(base, [Asked(str(lora), 0.6), Asked(str(other), -1.5)])
    first, second = updates(load(lora)), updates(load(other))
    for stem, update in first.items():
        both = 0.6 * update - 1.5 * second.get(stem, torch.zeros_like(update))
        assert_rounded(after[KEYS[stem]], before[KEYS[stem]].double() + both)
    assert [(one.strength, one.modules, one.matched) for one in report.adapters] == [(0.6, 4, 4), (-1.5, 2, 2)]


def test_one_adapter_twice_is_added_twice(base: Path, lora: Path) -> None:
    before, (after, _) = load(base), baked(base, [Asked(str(lora), 1.0), Asked(str(lora), 0.5)])
    for stem, update in updates(load(lora)).items():
        assert_rounded(after[KEYS[stem]], before[KEYS[stem]].double() + 1.5 * update)


def test_block_weights_scale_what_they_name(tmp_path: Path, base: Path, lora: Path) -> None:
    blocks = tmp_path / "blocks.yaml"
    blocks.write_text('"text_encoder.*": 0\n"unet.*.to_q": 0.5', encoding="utf-8")
    before, (after, _) = load(base), baked(base, [Asked(str(lora), 2.0, str(blocks))])
    for stem, gain in ((Q, 1.0), (K, 2.0), (CONV, 2.0)):
        assert_rounded(after[KEYS[stem]], before[KEYS[stem]].double() + gain * updates(load(lora))[stem])
    assert torch.equal(after[KEYS[TEXT]], before[KEYS[TEXT]])


def test_biases_and_whole_tensors_of_peft(tmp_path: Path) -> None:
    model = {"a.weight": noise(6, 4, dtype=F16), "a.bias": noise(6, dtype=F16), "head.weight": noise(3, 4, dtype=F16)}
    base = save(tmp_path / "b.safetensors", model)
    tensors = {"a.lora_A.weight": noise(2, 4, seed=3), "a.lora_B.weight": noise(6, 2, seed=4)}
    extra = {"a.lora_B.bias": noise(6, seed=5), "head.weight": noise(3, 4, seed=6)}
    folder = peft(tmp_path / "lora", tensors | extra, lora_alpha=6, lora_bias=True)
    after, _ = baked(base, [Asked(str(folder), 0.5)])
    update = 1.5 * tensors["a.lora_B.weight"].double() @ tensors["a.lora_A.weight"].double()
    assert_rounded(after["a.weight"], model["a.weight"].double() + update)
    assert_rounded(after["a.bias"], model["a.bias"].double() + 1.5 * extra["a.lora_B.bias"].double())
    assert_rounded(after["head.weight"], (model["head.weight"].double() + extra["head.weight"].double()) / 2)


def test_dora_has_the_norm_that_was_asked_for(tmp_path: Path, base: Path) -> None:
    tensors = kohya({Q: SHAPES[Q]})
    magnitude = noise(48, 1, seed=8).abs() + 5
    lora = save(tmp_path / "dora.safetensors", {**tensors, f"{Q}.dora_scale": magnitude})
    weight, update = load(base)[KEYS[Q]].double(), updates(tensors)[Q]
    for norm, norms in (("paper", (weight + update).norm(dim=1)), ("comfyui", weight.norm(dim=1) + 2.0**-23)):
        after, report = baked(base, [Asked(str(lora), 0.5)], Options(dora_norm=norm))
        changed = (weight + update) * magnitude.double() / norms[:, None]
        assert_rounded(after[KEYS[Q]], weight + 0.5 * (changed - weight))
        assert (report.adapters[0].dora, report.dora_norm) == (1, norm)


# -- everything else --------------------------------------------------------------------------------------------------


def test_everything_else_keeps_its_bytes(base: Path, lora: Path) -> None:
    before = read_header(base)
    _, report = baked(base, lora)
    after = read_header(base.parent / "out.safetensors")
    assert list(after.tensors) == list(before.tensors)
    for key, tensor in before.tensors.items():
        assert (after.tensors[key].dtype, after.tensors[key].shape) == (tensor.dtype, tensor.shape)
        same = bytes(after.tensors[key].read()) == bytes(tensor.read())
        assert same == (key in OTHERS)
    assert report.untouched == sum(before.tensors[key].nbytes for key in OTHERS)
    assert report.checked is not None and report.checked.bytes == report.untouched
    assert report.size == (base.parent / "out.safetensors").stat().st_size


def test_the_order_of_header_and_data_stays(tmp_path: Path, base: Path, lora: Path) -> None:
    """Of a file that another program wrote in its own order."""
    header = read_header(base)
    keys = sorted(header.tensors, key=lambda key: hashlib.sha256(key.encode()).digest())
    sizes = [0]
    for key in keys:
        sizes.append(sizes[-1] + header.tensors[key].nbytes)
    entries = {
        key: {"dtype": header.tensors[key].dtype, "shape": header.tensors[key].shape, "data_offsets": place}
        for key, place in zip(keys, pairwise(sizes), strict=True)
    }
    text = json.dumps(dict(reversed(entries.items()))).encode()
    data = b"".join(bytes(header.tensors[key].read()) for key in keys)
    other = tmp_path / "other.safetensors"
    other.write_bytes(len(text).to_bytes(8, "little") + text + data)
    straight, _ = baked(base, lora)
    mixed, _ = baked(other, lora)
    assert list(mixed) == list(reversed(keys))
    assert all(torch.equal(mixed[key], straight[key]) for key in keys)
    after = read_header(tmp_path / "out.safetensors")
    assert sorted(keys, key=lambda key: after.tensors[key].source.start) == keys  # type: ignore[attr-defined]


# -- the header -------------------------------------------------------------------------------------------------------


def told(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(read_header(path).metadata["loratool.baked"])
    return found


def test_the_header_says_what_was_baked(base: Path, lora: Path) -> None:
    _, report = baked(base, [Asked(str(lora), 0.8)])
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert told(base.parent / "out.safetensors") == [
        {
            "version": loratool.__version__,
            "base": "base.safetensors",
            "adapters": [{"name": "lora.safetensors", "sha256": digest, "strength": 0.8}],
        }
    ]
    assert {k: v for k, v in read_header(base.parent / "out.safetensors").metadata.items() if k in METADATA} == METADATA
    assert report.adapters[0].sha256 == digest


def test_the_header_says_how_where_it_was_not_as_always(tmp_path: Path, base: Path, lora: Path) -> None:
    options = Options(dtype="BF16", rounding="stochastic", seed=7, dora_norm="comfyui")
    baked(base, [Asked(str(lora), 1.0, "ALL", "other name")], options)
    (one,) = told(tmp_path / "out.safetensors")
    assert (one["dtype"], one["rounding"], one["seed"], one["dora_norm"]) == ("BF16", "stochastic", 7, "comfyui")
    (adapter,) = one["adapters"]
    assert (adapter["name"], adapter["blocks"]) == ("other name", "ALL")


@pytest.mark.parametrize("metadata", [None, {}, {"loratool.baked": "no JSON"}, {"loratool.baked": "{}"}], ids=repr)
def test_a_base_without_a_record_gets_one(tmp_path: Path, lora: Path, metadata: Mapping[str, str] | None) -> None:
    baked(base_file(tmp_path / "b.safetensors", metadata=metadata), lora)
    assert len(told(tmp_path / "out.safetensors")) == 1


def test_a_second_bake_is_added_to_the_list(tmp_path: Path, base: Path, lora: Path) -> None:
    baked(base, lora)
    first = (tmp_path / "out.safetensors").rename(tmp_path / "first.safetensors")
    baked(first, [Asked(str(lora), -1.0)])
    one, two = told(tmp_path / "out.safetensors")
    assert [one] == told(first)
    assert (two["base"], two["adapters"][0]["strength"]) == ("first.safetensors", -1.0)


def test_hashes_that_would_be_false_are_left_out(tmp_path: Path, lora: Path) -> None:
    stale = {"modelspec.hash_sha256": "0xabc", **METADATA}
    _, report = baked(base_file(tmp_path / "b.safetensors", metadata=stale), lora)
    assert set(read_header(tmp_path / "out.safetensors").metadata) == {*METADATA, "loratool.baked"}
    assert any("modelspec.hash_sha256" in note for note in report.notes)


# -- planning ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_reads_no_weight(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("loratool.files.safetensors.OpenFile.readinto", lambda *_: pytest.fail("a weight was read"))
    report = bake_file(base, [Asked(str(lora))], None)
    assert sorted(os.listdir(tmp_path)) == before
    assert (report.output, report.checked) == (None, None)
    assert {one.key for one in report.tensors} == {KEYS[stem] for stem in SHAPES}
    assert {one.survived for one in report.tensors} == {one.survived for one in report.components} == {None}
    assert report.adapters[0].sha256 == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert {one.component: one.tensors for one in report.components} == {"unet": 3, "text_encoder": 1}


def test_progress_reaches_its_totals(base: Path, lora: Path) -> None:
    last: dict[str, tuple[int, int]] = {}
    seen: list[tuple[str, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        last[stage] = done, total
        seen.append((stage, done))

    output = base.parent / "out.safetensors"
    bake_file(base, [Asked(str(lora))], output, progress=progress)
    data = sum(tensor.nbytes for tensor in read_header(base).tensors.values())
    assert set(last) == {"writing", "verifying"}
    assert all(done == total for done, total in last.values())
    assert last["writing"] == (data, data)
    for stage in last:
        amounts = [done for name, done in seen if name == stage]
        assert amounts == sorted(amounts)


def test_without_verification_nothing_is_checked(base: Path, lora: Path) -> None:
    _, report = baked(base, lora, Options(verify=False))
    assert report.checked is None


def test_a_module_without_a_weight_stops_everything(tmp_path: Path, base: Path) -> None:
    lora = save(tmp_path / "l.safetensors", kohya({**SHAPES, V: (48, 32), OUT: (48, 48)}))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FormatError, match=r"2 parts of .*l\.safetensors cannot be baked.*attn1\.to_v") as caught:
        bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors")
    assert caught.value.hint and "--allow-unmatched" in caught.value.hint
    assert sorted(os.listdir(tmp_path)) == before


def test_allowed_to_it_bakes_the_rest_and_says_so(tmp_path: Path, base: Path) -> None:
    lora = save(tmp_path / "l.safetensors", kohya({**SHAPES, V: (48, 32)}))
    before, (after, report) = load(base), baked(base, lora, Options(allow_unmatched=True))
    (one,) = report.unmatched
    assert one.title.endswith("attn1.to_v") and one.nearest is not None
    assert (report.adapters[0].modules, report.adapters[0].matched) == (5, 4)
    for stem in SHAPES:
        assert_rounded(after[KEYS[stem]], before[KEYS[stem]].double() + updates(load(lora))[stem])


def test_nothing_to_bake(base: Path, lora: Path) -> None:
    output = base.parent / "out.safetensors"
    with pytest.raises(UsageError, match="nothing to bake"):
        bake_file(base, [], output)
    with pytest.raises(FormatError, match="every strength is 0"):
        bake_file(base, [Asked(str(lora), 0.0)], output)
    with pytest.raises(FormatError, match=r"nothing to cast.*F16"):
        bake_file(save(base.parent / "half.safetensors", {"a": noise(3, dtype=F16)}), [], output, Options(dtype="F16"))
    assert not output.exists()


# -- fp8 --------------------------------------------------------------------------------------------------------------

FP8 = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def top(dtype: torch.dtype) -> float:
    return {E4M3: 448.0, E5M2: 57344.0}[dtype]


@FP8
def test_plain_fp8_is_added_in_float32_and_cast_back(tmp_path: Path, lora: Path, dtype: torch.dtype) -> None:
    base = base_file(tmp_path / "b.safetensors", dtype)
    before, (after, _) = load(base), baked(base, lora)
    for stem, update in updates(load(lora)).items():
        exact = before[KEYS[stem]].double() + update
        assert after[KEYS[stem]].dtype == dtype
        assert_rounded(after[KEYS[stem]], exact)
        assert float((after[KEYS[stem]].double() != before[KEYS[stem]].double()).double().mean()) > 0.01


@FP8
def test_plain_fp8_beyond_its_range_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is less than half a step beyond the largest number is rounded to it, and is no NaN."""
    weight = torch.full((48, 32), top(dtype)).to(dtype)
    base = save(tmp_path / "b.safetensors", {KEYS[Q]: weight})
    lora = save(tmp_path / "l.safetensors", kohya({Q: (48, 32)}))
    most = beyond(CODES[dtype]) - top(dtype)
    strength = most / float(updates(load(lora))[Q].max())
    after, _ = baked(base, [Asked(str(lora), strength * 0.99)])
    exact = weight.double() + strength * 0.99 * updates(load(lora))[Q]
    assert float(exact.max()) > top(dtype)
    assert_rounded(after[KEYS[Q]], exact.clamp(-top(dtype), top(dtype)))
    (tmp_path / "out.safetensors").unlink()
    with pytest.raises(LoratoolError, match=f"too large for {CODES[dtype]}; lower the strength"):
        bake_file(base, [Asked(str(lora), strength * 1.01)], tmp_path / "out.safetensors")


@FP8
def test_infinities_have_no_place_in_a_cast_to_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = noise(48, 32, dtype=F16)
    weight[7, 3] = -math.inf
    error = refused(
        save(tmp_path / "b.safetensors", {"layer.weight": weight}), None, "too large", Options(dtype=CODES[dtype])
    )
    assert (error.key, error.hint) == ("layer.weight", "store a wider dtype with --dtype")


@pytest.mark.parametrize("verify", [True, False])
def test_scaled_fp8_too_large_for_the_dtype_it_is_cast_to_is_refused(tmp_path: Path, verify: bool) -> None:
    weight = torch.full((512, 64), 0.5)
    weight[7, 3] = 448
    scaled = {KEYS[Q]: weight.to(E4M3), f"{KEYS[Q][: -len('weight')]}scale_weight": torch.tensor(1000.0)}
    base = save(tmp_path / "b.safetensors", scaled)
    assert refused(base, None, "too large for F16", Options(dtype="F16", verify=verify)).key == KEYS[Q]
    after, _ = baked(base, [], Options(dtype="BF16", verify=verify))
    assert float(after[KEYS[Q]][7, 3]) == float(torch.tensor(448_000.0).to(BF16))


@pytest.mark.parametrize("value", [1e5, math.inf])
@pytest.mark.parametrize("code", ["F16", "F8_E4M3"])
def test_a_base_too_large_for_the_dtype_it_is_cast_to_is_refused(tmp_path: Path, code: str, value: float) -> None:
    """Where something is added, too."""
    weight = torch.full((16, 16), 0.5)
    weight[7, 3] = value
    base = save(tmp_path / "b.safetensors", {KEYS[Q]: weight})
    lora = save(tmp_path / "l.safetensors", kohya({Q: (16, 16)}, size=0.01))
    refused(base, lora, "too large" if math.isfinite(value) else "holds NaN or infinite", Options(dtype=code))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_alpha_that_is_no_number_is_the_loras_fault(tmp_path: Path, base: Path, value: float) -> None:
    tensors = kohya(SHAPES) | {f"{K}.alpha": torch.tensor(value)}
    lora = save(tmp_path / "alpha.safetensors", tensors)
    error = refused(base, lora, "its alpha is NaN or infinite")
    assert error.file == str(lora) and error.key is not None and "attn1.to_k" in error.key


@FP8
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_fp8_is_dequantised_and_quantised_anew(
    tmp_path: Path, dtype: torch.dtype, per_row: bool, scale_dtype: torch.dtype, names: tuple[str, str]
) -> None:
    stem = KEYS[Q].removesuffix("weight")
    weight = noise(48, 32, size=0.1) * torch.linspace(0.1, 3, 48)[:, None]
    peak = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
    scale = (peak / top(dtype)).to(scale_dtype)
    codes = (weight / scale.float()).clamp(-top(dtype), top(dtype)).to(dtype)
    held = {
        KEYS[Q]: codes,
        stem + names[0]: scale.reshape(-1) if per_row else scale,
        stem + names[1]: torch.tensor(3.0),
    }
    base = save(tmp_path / "b.safetensors", {**held, **OTHERS})
    lora = save(tmp_path / "l.safetensors", kohya({Q: (48, 32)}))
    after, report = baked(base, lora)

    total = codes.float() * scale.float() + updates(load(lora))[Q].float()
    new_peak = total.abs().amax(1, keepdim=True) if per_row else total.abs().max()
    new_scale = (new_peak / top(dtype)).to(scale_dtype)
    expected = (total / new_scale.float()).clamp(-top(dtype), top(dtype)).to(dtype)
    found_scale = after[stem + names[0]]
    assert (found_scale.dtype, found_scale.shape) == (scale_dtype, held[stem + names[0]].shape)
    assert torch.allclose(found_scale.float().reshape(new_scale.shape), new_scale.float(), rtol=1e-6)
    same = (after[KEYS[Q]].float() == expected.float()).double().mean()
    assert float(same) > 0.99  # a float32 sum may lie on the other side of the middle
    assert_rounded(after[KEYS[Q]], (total / new_scale.float()).double().clamp(-top(dtype), top(dtype)), 1e-5)
    for key in (stem + names[1], *OTHERS):
        assert torch.equal(after[key], (held | dict(OTHERS))[key])
    before, update = codes.double() * scale.double(), updates(load(lora))[Q]
    change = after[KEYS[Q]].double() * found_scale.double().reshape(new_scale.shape) - before
    share = float((change * update).sum() / update.square().sum())
    assert report.tensors[0].survived == pytest.approx(share, rel=1e-4)


def test_scaled_fp8_keeps_its_scale_where_all_is_zero(tmp_path: Path) -> None:
    stem = KEYS[Q].removesuffix("weight")
    held = {KEYS[Q]: torch.zeros(48, 32).to(E4M3), f"{stem}scale_weight": torch.full((48,), 0.5)}
    tensors = kohya({Q: (48, 32)})
    tensors[f"{Q}.lora_up.weight"][10:] = 0
    base, lora = save(tmp_path / "b.safetensors", held), save(tmp_path / "l.safetensors", tensors)
    after, _ = baked(base, lora)
    assert after[f"{stem}scale_weight"][10:].tolist() == [0.5] * 38
    assert not after[KEYS[Q]][10:].float().any()
    assert after[KEYS[Q]][:10].float().abs().amax(1).tolist() == [448.0] * 10


# -- what survives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16, E4M3, E5M2, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_share_that_survives_is_its_definition(tmp_path: Path, dtype: torch.dtype, rounding: str) -> None:
    """sum((written - base) * update) / sum(update^2), per tensor and per component."""
    base = base_file(tmp_path / "b.safetensors", dtype)
    lora = save(tmp_path / "l.safetensors", kohya(SHAPES, size=0.02))
    before, (after, report) = load(base), baked(base, lora, Options(rounding=rounding))
    sums: dict[str, list[float]] = {"unet": [0.0, 0.0], "text_encoder": [0.0, 0.0]}
    found = {one.key: one.survived for one in report.tensors}
    for stem, update in updates(load(lora)).items():
        along = float(((after[KEYS[stem]].double() - before[KEYS[stem]].double()) * update).sum())
        square = float(update.square().sum())
        assert found[KEYS[stem]] == pytest.approx(along / square, rel=1e-4, abs=1e-5)
        kept = sums["text_encoder" if stem == TEXT else "unet"]
        kept[0], kept[1] = kept[0] + along, kept[1] + square
    for one in report.components:
        assert one.survived == pytest.approx(sums[one.component][0] / sums[one.component][1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2], ids=str)
def test_a_tiny_update_is_lost_to_nearest_rounding_only(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save(tmp_path / "b.safetensors", {KEYS[Q]: noise(640, 640, dtype=dtype)})
    lora = save(tmp_path / "l.safetensors", kohya({Q: (640, 640)}, size=0.02))
    _, nearest = baked(base, lora)
    assert nearest.tensors[0].survived is not None and nearest.tensors[0].survived < 0.9
    _, stochastic = baked(base, lora, Options(rounding="stochastic"))
    assert stochastic.tensors[0].survived == pytest.approx(1, abs=0.1)


def test_stochastic_rounding_depends_on_its_seed_alone(tmp_path: Path, base: Path, lora: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / f"{name}.safetensors"
        bake_file(base, [Asked(str(lora))], output, Options(rounding="stochastic", seed=seed))
        files.append(load(output))
    key = KEYS[Q]
    assert torch.equal(files[0][key], files[1][key])
    assert not torch.equal(files[0][key], files[2][key])
    exact = load(base)[key].double() + updates(load(lora))[Q]
    ulp = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp(min=2.0**-14))) - 10)
    assert bool(((files[0][key].double() - exact).abs() < 1.001 * ulp).all())


def test_float32_needs_no_stochastic_rounding(tmp_path: Path, lora: Path) -> None:
    base = base_file(tmp_path / "b.safetensors", torch.float32)
    nearest, _ = baked(base, lora)
    stochastic, _ = baked(base, lora, Options(rounding="stochastic"))
    assert all(torch.equal(stochastic[key], tensor) for key, tensor in nearest.items())


# -- --dtype ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_a_cast_is_of_everything_and_after_adding(base: Path, lora: Path, dtype: str) -> None:
    kind = torch_dtype(dtype)
    before, (after, report) = load(base), baked(base, lora, Options(dtype=dtype))
    update = {KEYS[stem]: one for stem, one in updates(load(lora)).items()}
    assert list(after) == list(before)
    for key, tensor in before.items():
        if not tensor.is_floating_point() or (dtype == "F8_E4M3" and tensor.dim() < 2):
            assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype
        else:
            assert after[key].dtype == kind
            assert_rounded(after[key], tensor.double() + update.get(key, 0.0))
            if key not in update:
                assert torch.equal(after[key], tensor.to(kind))
    assert report.dtype == dtype


def test_a_cast_alone(tmp_path: Path, base: Path) -> None:
    before, (after, report) = load(base), baked(base, [], Options(dtype="BF16"))
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor.to(BF16) if tensor.is_floating_point() else tensor)
    assert report.components == () and all(one.survived is None for one in report.tensors)


@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_cast_to_bfloat16_means_the_same(tmp_path: Path, per_row: bool) -> None:
    """Whether a program multiplies by the scale or not."""
    codes = (noise(48, 32) * 100).to(E4M3)
    scale = torch.linspace(0.01, 0.02, 48) if per_row else torch.tensor(0.01)
    key = "layer.scale_weight"
    base = save(tmp_path / "b.safetensors", {"layer.weight": codes, key: scale, "scaled_fp8": torch.zeros(0).to(E4M3)})
    after, _ = baked(base, [], Options(dtype="BF16"))
    assert_rounded(after["layer.weight"], codes.double() * scale.double().reshape(-1, 1))
    assert after[key].float().flatten().tolist() == [1.0] * scale.numel()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_a_cast_of_nothing_is_nothing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = save(tmp_path / "b.safetensors", {"a.weight": noise(3, 3, dtype=F16), "void": torch.zeros(shape, dtype=F16)})
    after, _ = baked(base, [], Options(dtype="BF16"))
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in after.items()} == {
        "a.weight": (BF16, (3, 3)),
        "void": (BF16, shape),
    }


# -- numbers that cannot be stored ------------------------------------------------------------------------------------


def refused(base: Path, lora: Path | None, words: str, options: Options | None = None) -> LoratoolError:
    """The error, after looking that nothing was written."""
    before = sorted(os.listdir(base.parent))
    asked = [] if lora is None else [Asked(str(lora))]
    with pytest.raises(LoratoolError, match=words) as caught:
        bake_file(base, asked, base.parent / "out.safetensors", options)
    assert sorted(os.listdir(base.parent)) == before
    return caught.value


def test_a_note_of_several_loras_is_told_once(tmp_path: Path, base: Path) -> None:
    header = {"ss_network_args": '{"split_qkv": "true"}'}
    loras = [save(tmp_path / f"{name}.safetensors", kohya(SHAPES), header) for name in "ab"]
    report = bake_file(base, [Asked(str(one)) for one in loras], None)
    assert sum("split_qkv" in note for note in report.notes) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("verify", [True, False])
def test_an_adapter_with_nan_is_refused(tmp_path: Path, base: Path, bad: float, verify: bool) -> None:
    tensors = kohya(SHAPES)
    tensors[f"{K}.lora_down.weight"][1, 1] = bad
    lora = save(tmp_path / "nan.safetensors", tensors)
    error = refused(base, lora, "NaN or infinite", Options(verify=verify))
    assert error.file == str(lora)
    assert error.key is not None and "attn1.to_k" in error.key


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("key", [KEYS[Q], f"{KEYS[Q][: -len('weight')]}scale_weight"])
def test_a_base_with_nan_is_refused(tmp_path: Path, bad: float, key: str) -> None:
    scaled = key != KEYS[Q]
    tensors = {KEYS[Q]: noise(*SHAPES[Q]).to(E4M3 if scaled else F16)}
    tensors |= {key: torch.tensor(bad)} if scaled else {}
    if not scaled:
        tensors[key][1, 1] = bad
    base = save(tmp_path / "sick.safetensors", tensors)
    error = refused(base, save(tmp_path / "a.safetensors", kohya({Q: SHAPES[Q]})), "use another copy of it")
    assert (error.file, error.key, error.message) == (str(base), key, "holds NaN or infinite values")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_update_too_large_for_float16_is_refused(tmp_path: Path, base: Path, verify: bool, rounding: str) -> None:
    lora = save(tmp_path / "large.safetensors", kohya({Q: SHAPES[Q]}, size=500.0))
    assert float(updates(load(lora))[Q].abs().max()) > 1e5
    error = refused(base, lora, "too large for F16", Options(verify=verify, rounding=rounding))
    assert (error.file, error.key) == (str(base), KEYS[Q])
    _, report = baked(base, lora, Options(dtype="BF16"))
    assert report.dtype == "BF16"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("dtype", "fits", "bursts"),
    [("F16", 65519.0, 65520.0), ("F8_E4M3", 464.0, 464.1), ("F8_E5M2", -61440.0, -61441.0)],  # half a step beyond
)
def test_a_cast_that_overflows_is_refused(tmp_path: Path, verify: bool, dtype: str, fits: float, bursts: float) -> None:
    weight = noise(200, 8)
    weight[117, 3] = fits
    base = save(tmp_path / "b.safetensors", {"layer.weight": weight})
    after, _ = baked(base, [], Options(dtype=dtype, verify=verify))
    assert float(after["layer.weight"].float().abs().max()) == torch.finfo(after["layer.weight"].dtype).max
    weight[117, 3] = bursts
    base = save(tmp_path / "b.safetensors", {"layer.weight": weight})
    os.unlink(tmp_path / "out.safetensors")
    error = refused(base, None, f"too large for {dtype}", Options(dtype=dtype, verify=verify))
    assert error.key == "layer.weight"


def test_infinity_that_was_there_is_cast_as_it_is(tmp_path: Path) -> None:
    """Masks are full of it."""
    mask = torch.full((4, 4), -math.inf, dtype=F16).triu(1)
    after, _ = baked(save(tmp_path / "b.safetensors", {"mask.weight": mask}), [], Options(dtype="BF16"))
    assert torch.equal(after["mask.weight"], mask.to(BF16))


def test_a_base_with_nan_where_something_is_added_is_refused(tmp_path: Path, lora: Path) -> None:
    tensors = load(base_file(tmp_path / "b.safetensors"))
    tensors[KEYS[Q]][1, 1] = math.nan
    refused(save(tmp_path / "b.safetensors", tensors), lora, "NaN")


# -- blocks and threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, E4M3], ids=str)
@pytest.mark.parametrize("options", [Options(), Options(rounding="stochastic", seed=3), Options(dtype="F32")], ids=str)
def test_a_tensor_that_is_dealt_to_many_jobs_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: Options
) -> None:
    shapes = {Q: (640, 320), K: (640, 321), CONV: (64, 32, 3, 3)}
    weights = {KEYS[stem]: noise(*shape, dtype=dtype) for stem, shape in shapes.items()}
    base = save(tmp_path / "b.safetensors", weights)
    lora = save(tmp_path / "l.safetensors", kohya(shapes))
    baked(base, lora, options)
    whole = (tmp_path / "out.safetensors").read_bytes()
    for job, block in ((64 << 10, 16 << 10), (16 << 10, 16 << 10), (1, 1 << 20)):
        monkeypatch.setattr(baking, "JOB", job)
        monkeypatch.setattr(baking, "CPU_BLOCK", block)
        baked(base, lora, options)
        assert (tmp_path / "out.safetensors").read_bytes() == whole


def test_large_tensors_are_dealt_to_many_jobs(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would mean nothing otherwise."""
    seen: list[int] = []
    dealt = baking.Bakery._dealt

    def counted(self: baking.Bakery, sites: Sequence[Site]) -> Any:
        jobs = dealt(self, sites)
        seen.append(len(jobs))
        return jobs

    monkeypatch.setattr(baking.Bakery, "_dealt", counted)
    baked(base, lora)
    monkeypatch.setattr(baking, "JOB", 512)
    monkeypatch.setattr(baking, "CPU_BLOCK", 256)
    baked(base, lora)
    assert seen[0] == len(SHAPES) and seen[1] > 5 * len(SHAPES)


def test_one_thread_gives_the_same_bits(tmp_path: Path, base: Path, lora: Path) -> None:
    baked(base, lora)
    whole = (tmp_path / "out.safetensors").read_bytes()
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            baked(base, lora)
            assert (tmp_path / "out.safetensors").read_bytes() == whole
    finally:
        torch.set_num_threads(before)
