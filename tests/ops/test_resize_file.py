"""resize, from file to file: real names, every layout in and out, sizes, headers, and what must never happen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import LoratoolError, NotRepresentable, UsageError
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor
from loratool.files import bundle as bundles
from loratool.ops import origin, recipe, resize_file
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from loratool.ops.ranks import Limits, Rule, parse_rule
from loratool.ops.resize import resize
from loratool.ops.save import NotTheSame
from loratool.ops.spectrum import spectrum
from tests.builders import (
    ARCHITECTURES,
    LAYOUTS,
    Part,
    Style,
    build,
    pair,
    spelled,
    typical_parts,
    weight,
    weights,
    write_file,
)
from tests.ops.test_convert import assert_hashes_are_true

run = resize_file.resize_file
RANK2 = parse_rule("rank", "2")


def source(tmp_path: Path, architecture: str, layout: str, style: Style | None = None, **options: object) -> Path:
    parts = typical_parts(architecture, layout, **{"alpha": 2.0, "dtype": "F32", **options})  # type: ignore[arg-type]
    return write_file(tmp_path / ("in" if layout == "peft" else "in.safetensors"), build(parts, layout, style))


def target(tmp_path: Path, layout: str) -> Path:
    return tmp_path / ("out" if layout == "peft" else "out.safetensors")


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


Pair = tuple[torch.Tensor, torch.Tensor]


def by_target(modules: Sequence[Module], cut: int | None = None) -> dict[tuple[str, str], Pair]:
    """Rows of every update by (component, path) of their target, as a pair of float64 matrices.

    With `cut`, of the best approximation of that rank: by the dense SVD, in orthonormal bases of the factors.
    """
    found = {}
    for module in modules:
        up, down = (module.factors[role].load().double().flatten(1) for role in ("up", "down"))
        up = up * module.scale
        if cut is not None:
            (left, outer), (right, inner) = torch.linalg.qr(up), torch.linalg.qr(down.T)
            x, values, y = torch.linalg.svd(outer @ inner.T)
            up, down = left @ (x[:, :cut] * values[:cut]), y[:cut] @ right.T
        row = 0
        for one, height in zip(module.targets, module.heights(), strict=True):
            found[module.component, one.path] = up[row : row + height], down
            row += height
    return found


def norm(pair: Pair) -> float:
    left, right = torch.linalg.qr(pair[0], mode="r").R, torch.linalg.qr(pair[1].T, mode="r").R
    return float((left @ right.T).norm())


def distance(one: Pair, other: Pair) -> float:
    return norm((torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]])))


def assert_is_the_best(before: Adapter, after: Adapter, rank: int, tolerance: float = 1e-6) -> None:
    meant, made = by_target(before.modules, rank), by_target(after.modules)
    assert made.keys() == meant.keys()
    for key, values in meant.items():
        assert distance(made[key], values) <= tolerance * norm(values), key


# -- every layout, every model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout(tmp_path: Path, layout: str, architecture: str) -> None:
    path = source(tmp_path, architecture, layout)
    before = snapshot(path)
    output = target(tmp_path, layout)
    report = run(path, [RANK2], output)
    assert snapshot(path) == before
    old, new = open_adapter(path), open_adapter(output)
    assert (new.layout, new.architecture.id) == (layout, architecture)
    assert set(new.ranks) == {2}
    assert not new.extras
    assert [module.scale for module in new.modules] == [module.scale for module in old.modules]
    assert_is_the_best(old, new, 2)
    (outcome,) = report.outcomes
    assert outcome.size_after == size_of(output)
    assert outcome.held is not None and outcome.held.modules == len(new.modules)
    assert outcome.held.error == pytest.approx(outcome.error, rel=0.5)
    assert report.ranks_before == {4: len(old.modules)} and outcome.ranks_after == {2: len(new.modules)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", LAYOUTS)
def test_any_layout_to_any_other(tmp_path: Path, layout: str, to: str) -> None:
    path, output = source(tmp_path, "sd15", layout, dtype="F16"), target(tmp_path, to)
    report = run(path, [RANK2], output, to=to)
    new = open_adapter(output)
    assert (new.layout, report.layout_after) == (to, to)
    assert {module.dtype for module in new.modules} == {"F16"}
    assert_is_the_best(open_adapter(path), new, 2, 2e-3)
    assert origin.ENTRY not in new.metadata


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_fused_weight_is_cut_before_it_is_split(tmp_path: Path, to: str) -> None:
    names = [f"double_blocks.{n}.{stream}_attn.qkv" for n in range(5) for stream in ("img", "txt")]
    names += [f"single_blocks.{n}.linear1" for n in range(3)]
    parts = [Part(weight("flux", "kohya", name), 4, 2.0) for name in names]
    path = write_file(tmp_path / "in.safetensors", build(parts, "kohya"))
    run(path, [RANK2], target(tmp_path, to), to=to)
    new = open_adapter(target(tmp_path, to))
    assert len(new.modules) == 10 * 3 + 3 * 4
    assert set(new.ranks) == {2}
    assert_is_the_best(open_adapter(path), new, 2)
    downs = [bytes(module.factors["down"].read()) for module in new.modules if ".attn.to_" in module.targets[0].path]
    assert len(set(downs)) < len(downs)


def test_dora_and_bias_are_kept_bit_for_bit(tmp_path: Path) -> None:
    names = ["double_blocks.0.img_attn.proj", "double_blocks.1.img_attn.proj"]
    tensors: dict[str, LazyTensor] = {}
    for seed, name in enumerate(names):
        part = Part(weight("flux", "kohya", name), 4, 2.0)
        tensors |= spelled(part, pair(part.weight.shape, 4, "BF16", seed), "kohya")
        stem = part.weight.prefix + name.replace(".", "_")
        tensors[f"{stem}.dora_scale"] = LazyTensor.from_torch(torch.rand(3072, 1))
    path = write_file(tmp_path / "in.safetensors", Bundle(tensors))
    report = run(path, [RANK2], tmp_path / "out.safetensors")
    assert report.dora == 2
    for old, new in zip(open_adapter(path).modules, open_adapter(tmp_path / "out.safetensors").modules, strict=True):
        assert old.magnitude is not None and new.magnitude is not None
        assert (bytes(old.magnitude.read()), old.magnitude.dtype) == (bytes(new.magnitude.read()), new.magnitude.dtype)
        assert new.rank == 2


def test_a_rank_that_no_module_exceeds_keeps_every_byte(tmp_path: Path) -> None:
    path = source(tmp_path, "sdxl", "kohya", dtype="F16")
    run(path, [parse_rule("rank", "4")], tmp_path / "out.safetensors")
    old, new = bundles.read_bundle(path), bundles.read_bundle(tmp_path / "out.safetensors")
    assert {k: bytes(t.read()) for k, t in old.tensors.items()} == {k: bytes(t.read()) for k, t in new.tensors.items()}


# -- several rules --------------------------------------------------------------------------------------------------


def test_several_rules_share_one_decomposition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = resize_file.decompose

    def counting(modules, *rest):  # type: ignore[no-untyped-def]
        calls.append(len(modules))
        return real(modules, *rest)

    monkeypatch.setattr(resize_file, "decompose", counting)
    path = source(tmp_path, "sd15", "kohya")
    rules = [parse_rule("rank", "1"), RANK2, parse_rule("energy", "0.9"), parse_rule("error", "0.5")]
    report = run(path, rules, tmp_path / "{rule}.safetensors")
    assert calls == [len(open_adapter(path).modules)]
    assert [one.rule for one in report.outcomes] == ["rank 1", "rank 2", "energy 0.9", "error 0.5"]
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == [
        "energy0.9.safetensors",
        "error0.5.safetensors",
        "in.safetensors",
        "rank1.safetensors",
        "rank2.safetensors",
    ]
    run(path, [RANK2], tmp_path / "alone.safetensors")
    assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / "rank2.safetensors").read_bytes()


def test_rules_and_outputs_that_make_no_sense(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    other = parse_rule("rank", "1")
    for rules, output, words in (
        ([], "out.safetensors", "no rule"),
        ([RANK2, other], "out.safetensors", "2 files"),
        ([RANK2, RANK2], "{rule}.safetensors", "same file"),
    ):
        with pytest.raises(UsageError, match=words):
            run(path, rules, tmp_path / output)
    with pytest.raises(UsageError, match="more than --max-rank"):
        run(path, [RANK2], tmp_path / "out.safetensors", limits=Limits(5, 4))
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_dry_run_writes_nothing_and_knows_the_size(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    dry = run(path, [RANK2], None)
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]
    (outcome,) = dry.outcomes
    assert (outcome.output, outcome.held) == (None, None)
    run(path, [RANK2], tmp_path / "out.safetensors")
    assert outcome.size_after == size_of(tmp_path / "out.safetensors")


def test_the_report_tells_the_truth(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    (outcome,) = run(path, [RANK2], tmp_path / "out.safetensors").outcomes
    old = by_target(open_adapter(path).modules)
    new = by_target(open_adapter(tmp_path / "out.safetensors").modules)
    off = sum(distance(old[key], new[key]) ** 2 for key in old)
    total = sum(norm(pair) ** 2 for pair in old.values())
    assert outcome.error == pytest.approx((off / total) ** 0.5, rel=1e-4)
    assert outcome.energy == pytest.approx(1 - off / total, rel=1e-4)
    for cut, module in zip(outcome.modules, open_adapter(path).modules, strict=True):
        key = (module.component, module.targets[0].path)
        assert cut.title == module.title
        assert cut.norm == pytest.approx(norm(old[key]), rel=1e-6)
        assert cut.error == pytest.approx(distance(old[key], new[key]) / norm(old[key]), rel=1e-4)
        assert (cut.rank_before, cut.rank_after) == (4, 2)
        assert cut.bytes_before == 2 * cut.bytes_after


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA on every attention and feed-forward weight of SD 1.5, and its text encoder, in every layout."""
    folder = tmp_path_factory.mktemp("complete")
    parts = [Part(one, 6, 3.0, "F16") for one in weights("sd15", "kohya") if "attn" in one.name or "mlp" in one.name]
    style = Style(metadata={"ss_network_dim": "6", "ss_network_alpha": "3.0", "ss_tag_frequency": "x" * 3000})
    found = {"kohya": write_file(folder / "kohya.safetensors", build(parts, "kohya", style))}
    for to in ("diffusers", "peft", "comfyui"):
        found[to] = folder / (to if to == "peft" else f"{to}.safetensors")
        convert_file(found["kohya"], to, found[to])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_met(tmp_path: Path, complete: Mapping[str, Path], layout: str) -> None:
    """At most the target, header included, and not 2% under it."""
    now = size_of(complete[layout])
    for share in (0.9, 0.5, 0.31):
        rule = parse_rule("size", f"{int(now * share)}B")
        report = run(complete[layout], [rule], tmp_path / f"{share}", verify=share == 0.5)
        size = size_of(tmp_path / f"{share}")
        assert report.outcomes[0].size_after == size
        assert rule.value * 0.98 <= size <= rule.value, share


def test_a_size_above_the_present_one_leaves_everything(tmp_path: Path, complete: Mapping[str, Path]) -> None:
    (outcome,) = run(complete["kohya"], [parse_rule("size", "500MiB")], tmp_path / "out.safetensors").outcomes
    assert outcome.error == 0.0
    old, new = (bundles.read_bundle(path) for path in (complete["kohya"], tmp_path / "out.safetensors"))
    assert {k: bytes(t.read()) for k, t in old.tensors.items()} == {k: bytes(t.read()) for k, t in new.tensors.items()}


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_size_that_is_too_small_names_the_smallest_which_is_possible(
    tmp_path: Path, complete: Mapping[str, Path], layout: str
) -> None:
    with pytest.raises(LoratoolError, match="the smallest possible is") as caught:
        run(complete[layout], [parse_rule("size", "10kB")], tmp_path / "out")
    found = re.search(r"possible is ([\d.]+[KM]iB)", str(caught.value))
    assert found is not None and caught.value.file == str(complete[layout])
    assert not (tmp_path / "out").exists()
    rule = parse_rule("size", found[1])
    run(complete[layout], [rule], tmp_path / "out", verify=False)
    assert rule.value * 0.98 <= size_of(tmp_path / "out") <= rule.value
    assert set(open_adapter(tmp_path / "out").ranks) == {1}


def test_rules_of_which_one_has_no_answer_write_nothing(tmp_path: Path, complete: Mapping[str, Path]) -> None:
    rules = [parse_rule("rank", "2"), parse_rule("size", "10kB")]
    with pytest.raises(LoratoolError, match="the smallest possible is"):
        run(complete["kohya"], rules, tmp_path / "out-{rule}.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_a_size_with_tucker_cores_and_whole_matrices(tmp_path: Path) -> None:
    """Bytes that are no multiple of the rank: still at most the target, and close to it."""
    names = [one for one in weights("sd15", "kohya") if one.shape[2:] == (3, 3)][:12]
    names += [one for one in weights("sd15", "kohya") if "ff_net" in one.name.replace(".", "_")][:8]
    tensors: dict[str, LazyTensor] = {}
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> LazyTensor:
        return LazyTensor.from_torch(torch.randn(shape, generator=generator).half())

    for one in names:
        stem = one.prefix + one.name.replace(".", "_")
        out, width, *kernel = one.shape
        if kernel:
            tensors[f"{stem}.lora_up.weight"] = noise(out, 16, 1, 1)
            tensors[f"{stem}.lora_down.weight"] = noise(16, width, 1, 1)
            tensors[f"{stem}.lora_mid.weight"] = noise(16, 16, 3, 3)
        else:
            tensors[f"{stem}.lokr_w1"] = noise(8, 8)
            tensors[f"{stem}.lokr_w2"] = noise(out // 8, width // 8)
        tensors[f"{stem}.alpha"] = LazyTensor.scalar(8.0, "F16")
    path = write_file(tmp_path / "in.safetensors", Bundle(tensors))
    now = size_of(path)
    for share in (0.95, 0.7, 0.5, 0.3):
        rule = parse_rule("size", f"{int(now * share)}B")
        run(path, [rule], tmp_path / "out.safetensors", overwrite=True)
        assert rule.value * 0.98 <= size_of(tmp_path / "out.safetensors") <= rule.value, share


# -- the header -----------------------------------------------------------------------------------------------------


def test_the_header_is_true(tmp_path: Path) -> None:
    style = Style(
        metadata={
            "ss_network_dim": "4",
            "ss_network_alpha": "2.0",
            "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "2", "algo": "lora"}),
            "ss_output_name": "kept",
            "sshs_model_hash": "stale",
            "sshs_legacy_hash": "stale",
            "modelspec.hash_sha256": "0xstale",
        }
    )
    path = source(tmp_path, "sd15", "kohya", style)
    output = tmp_path / "out.safetensors"
    run(path, [parse_rule("rank", "3")], output, limits=Limits(conv_rank=1))
    new = open_adapter(output)
    kernels = [module for module in new.modules if any(size > 1 for size in module.shape[2:])]
    assert kernels and {module.rank for module in kernels} == {1}
    assert {module.rank for module in new.modules} == {1, 3}
    header = new.metadata
    args = json.loads(header["ss_network_args"])
    assert (args["conv_dim"], args["conv_alpha"], args["algo"]) == ("1", "0.5", "lora")
    assert header["ss_network_dim"] in ("3", "Dynamic")
    assert header["ss_network_alpha"] in ("1.5", "Dynamic")
    assert header["ss_output_name"] == "kept"
    assert "modelspec.hash_sha256" not in header
    assert_hashes_are_true(output)
    made = recipe.decode(header)
    assert (made["command"], made["rule"], made["conv_rank"]) == ("resize", "rank 3", 1)
    assert made["inputs"] == [{"name": "in.safetensors", "sha256": recipe.sha256(path)}]
    assert json.loads(header["loratool.history"])[-1]["op"] == "resize"


def test_one_rank_everywhere_is_stated(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya", Style(metadata={"ss_network_dim": "4", "ss_network_alpha": "2.0"}))
    run(path, [RANK2], tmp_path / "out.safetensors")
    header = open_adapter(tmp_path / "out.safetensors").metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "1")


def test_no_way_back_to_what_it_is_no_more(tmp_path: Path) -> None:
    """A converted file remembers its original; resized, it must forget it."""
    path = source(tmp_path, "sd15", "kohya")
    convert_file(path, "diffusers", tmp_path / "there.safetensors")
    assert origin.ENTRY in open_adapter(tmp_path / "there.safetensors").metadata
    run(tmp_path / "there.safetensors", [RANK2], tmp_path / "small.safetensors")
    small = open_adapter(tmp_path / "small.safetensors")
    assert origin.ENTRY not in small.metadata
    report = convert_file(tmp_path / "small.safetensors", "kohya", tmp_path / "back.safetensors")
    assert not report.returned
    assert set(open_adapter(tmp_path / "back.safetensors").ranks) == {2}


def test_resizing_twice_keeps_the_last_recipe_and_all_history(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    run(path, [parse_rule("rank", "3")], tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", [RANK2], tmp_path / "b.safetensors")
    header = open_adapter(tmp_path / "b.safetensors").metadata
    assert recipe.decode(header)["inputs"][0]["name"] == "a.safetensors"
    assert [entry["rule"] for entry in json.loads(header["loratool.history"])] == ["rank 3", "rank 2"]
    assert_is_the_best(open_adapter(path), open_adapter(tmp_path / "b.safetensors"), 2)


# -- what must never happen -----------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(LoratoolError, match="exists already"):
        run(path, [RANK2], output)
    assert output.read_bytes() == b"precious"
    run(path, [RANK2], output, overwrite=True)
    assert set(open_adapter(output).ranks) == {2}
    for overwrite in (False, True):
        with pytest.raises(LoratoolError, match="never changed"):
            run(path, [RANK2], path, overwrite=overwrite)


def test_a_damaged_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path, "sd15", "kohya")
    real = bundles.write_safetensors

    def corrupting(place: Path, tensors: Mapping[str, LazyTensor], *rest: object, **options: object) -> None:
        changed = {
            key: LazyTensor.from_torch(tensor.load() * 1.01) if key.endswith(("up.weight", "lora_B.weight")) else tensor
            for key, tensor in tensors.items()
        }
        real(place, changed, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bundles, "write_safetensors", corrupting)
    before = snapshot(path)
    for layout in ("kohya", "peft"):
        # Truncation alone is 30% and more here: with every rank kept, one percent shows.
        with pytest.raises(NotTheSame, match="differs by"):
            run(path, [parse_rule("rank", "4")], tmp_path / "out.x", to=layout)
        assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]
    assert snapshot(path) == before


def test_a_module_that_is_lost_on_the_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of many: less than what truncation alone takes away."""
    path = source(tmp_path, "sd15", "kohya")
    real = bundles.write_safetensors

    def losing(place: Path, tensors: Mapping[str, LazyTensor], *rest: object, **options: object) -> None:
        stem = next(iter(tensors)).partition(".")[0]
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(stem + ".")}
        real(place, kept, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bundles, "write_safetensors", losing)
    with pytest.raises(NotTheSame, match="is not in the written file"):
        run(path, [RANK2], tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_what_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    parts = typical_parts("sd15", "kohya", dtype="F32")
    bundle = build(parts, "kohya")
    key = next(key for key in bundle.tensors if ".lora_down." in key)
    spoiled = bundle.tensors[key].load().clone()
    spoiled[0, 0] = float("nan")
    bundle = replace(bundle, tensors={**bundle.tensors, key: LazyTensor.from_torch(spoiled)})
    path = write_file(tmp_path / "in.safetensors", bundle)
    with pytest.raises(LoratoolError, match=r"in\.safetensors: unet\.\S+: .*NaN"):
        run(path, [RANK2], tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_dtype_that_cannot_hold_the_values_is_refused(tmp_path: Path) -> None:
    parts = typical_parts("sd15", "kohya", dtype="F32", alpha=4.0)
    bundle = build(parts, "kohya")
    large = {k: LazyTensor.from_torch(t.load() * 1e6) if "lora" in k[-20:] else t for k, t in bundle.tensors.items()}
    path = write_file(tmp_path / "in.safetensors", replace(bundle, tensors=large))
    with pytest.raises(NotTheSame, match="--dtype"):
        run(path, [RANK2], tmp_path / "out.safetensors", dtype="F16")
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_another_dtype(tmp_path: Path, dtype: str) -> None:
    path = source(tmp_path, "sd15", "kohya")
    run(path, [RANK2], tmp_path / "out.safetensors", dtype=dtype)
    new = open_adapter(tmp_path / "out.safetensors")
    assert {tensor.dtype for module in new.modules for tensor in module.tensors.values()} == {dtype}
    assert_is_the_best(open_adapter(path), new, 2, 1e-2)


# -- extras ---------------------------------------------------------------------------------------------------------


EXTRAS = {
    "lora_unet_mid_block_attentions_0_proj_in.bias_indices": LazyTensor.from_torch(torch.rand(8, 2)),
    "lora_unet_mid_block_attentions_0_proj_in.bias_values": LazyTensor.from_torch(torch.rand(2, 8)),
    "bundle_emb.token.string_to_param.*": LazyTensor.from_torch(torch.rand(2, 768)),
    "large": LazyTensor.from_torch(torch.rand(1 << 19)),
}


def test_extras_and_other_families_stay_in_the_same_layout(tmp_path: Path) -> None:
    parts = [part for part in typical_parts("sd15", "kohya") if "mid_block" not in part.weight.name]
    bundle = build(parts, "kohya")
    path = write_file(tmp_path / "in.safetensors", replace(bundle, tensors={**bundle.tensors, **EXTRAS}))
    run(path, [RANK2], tmp_path / "out.safetensors")
    written = bundles.read_bundle(tmp_path / "out.safetensors").tensors
    for key, tensor in EXTRAS.items():
        assert bytes(written[key].read()) == bytes(tensor.read()), key
    with pytest.raises(NotRepresentable, match="drop-extras"):
        run(path, [RANK2], tmp_path / "other.safetensors", to="diffusers")
    (outcome,) = run(path, [RANK2], tmp_path / "other.safetensors", to="diffusers", drop_extras=True).outcomes
    assert set(outcome.dropped) == set(EXTRAS)
    assert set(open_adapter(tmp_path / "other.safetensors").ranks) == {2}


def test_a_file_of_an_unknown_model(tmp_path: Path) -> None:
    shapes = {f"lora_unet_blocks_{n}_q": (24, 16) for n in range(4)}
    tensors: dict[str, LazyTensor] = {}
    for seed, (stem, shape) in enumerate(shapes.items()):
        factors = pair(shape, 4, "F32", seed)
        tensors |= {f"{stem}.lora_up.weight": factors["up"], f"{stem}.lora_down.weight": factors["down"]}
    path = write_file(tmp_path / "in.safetensors", Bundle(tensors))
    run(path, [RANK2], tmp_path / "out.safetensors")
    new = open_adapter(tmp_path / "out.safetensors")
    assert set(new.ranks) == {2} and len(new.modules) == 4
    assert [m.scale for m in new.modules] == [1.0] * 4
    assert_is_the_best(open_adapter(path), new, 2)


def test_own_rules(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")

    def own(module: Module) -> Rule | None:
        return Rule("rank", 1) if module.component == "text_encoder" else None

    run(path, [parse_rule("rank", "3")], tmp_path / "out.safetensors", own=own, per_block={"text_encoder": "rank 1"})
    new = open_adapter(tmp_path / "out.safetensors")
    assert {module.rank for module in new.of("text_encoder")} == {1}
    assert {module.rank for module in new.of("unet")} == {3}
    assert recipe.decode(new.metadata)["per_block"] == {"text_encoder": "rank 1"}


def test_progress(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    told: list[tuple[str, int, int]] = []
    run(path, [RANK2], tmp_path / "out.safetensors", progress=lambda *step: told.append(step))
    count = len(open_adapter(path).modules)
    assert {stage for stage, _, _ in told} == {"decomposing", "writing", "verifying"}
    for stage in ("decomposing", "verifying"):
        assert [step[1:] for step in told if step[0] == stage] == [(n, count) for n in range(1, count + 1)]


def test_the_library_call_equals_the_file(tmp_path: Path) -> None:
    path = source(tmp_path, "sd15", "kohya")
    adapter = open_adapter(path)
    made = resize(adapter, RANK2, spectra=[spectrum(module) for module in adapter.modules])
    run(path, [RANK2], tmp_path / "out.safetensors")
    for ours, theirs in zip(made.adapter.modules, open_adapter(tmp_path / "out.safetensors").modules, strict=True):
        assert bytes(ours.factors["up"].read()) == bytes(theirs.factors["up"].read())
