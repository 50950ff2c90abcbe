"""Operations on every family: each works, or refuses by name with the option that approximates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratool.core.errors import FormatError, LoratoolError, NotExact, UsageError
from loratool.core.registry import families, methods
from loratool.ops.approximate import Wish
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.blocks import blocks_of
from loratool.ops.convert_file import convert_file
from loratool.ops.inputs import Asked
from loratool.ops.inspect import inspect
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from loratool.ops.ranks import parse_rule
from loratool.ops.resize_file import resize_file
from loratool.ops.unbake_file import subtract_file, unbake_file
from tests.bakes import CONV, KEYS, OUT, Q, Tensors, dense, factors, kohya, load, noise, save

LINEAR, KERNEL = (320, 320), (320, 320, 3, 3)
BASE = {
    KEYS[Q]: noise(*LINEAR, seed=90, size=0.05),
    KEYS[OUT]: noise(*LINEAR, seed=91, size=0.05),
    KEYS[OUT].replace("weight", "bias"): noise(320, seed=92),
    KEYS[CONV]: noise(*KERNEL, seed=93, size=0.02),
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": noise(320, seed=94),
    "model.diffusion_model.input_blocks.1.0.in_layers.0.bias": noise(320, seed=95),
}
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
SIDE = 0.3


def loha(stem: str, columns: int, rank: int = 2) -> Tensors:
    """A LoHa module."""
    shapes = {"w1_a": (320, rank), "w1_b": (rank, columns), "w2_a": (320, rank), "w2_b": (rank, columns)}
    made = {f"{stem}.hada_{role}": noise(*shape, seed=n, size=SIDE) for n, (role, shape) in enumerate(shapes.items())}
    return made | {f"{stem}.alpha": torch.tensor(1.0)}


def glora(stem: str, width: int, kernel: tuple[int, ...] = ()) -> Tensors:
    """A GLoRA module."""
    ones = (1,) * len(kernel)
    shapes = {"a1": (width, 2, *ones), "a2": (2, width, *ones), "b1": (320, 2, *ones), "b2": (2, width, *kernel)}
    made = {f"{stem}.{role}.weight": noise(*shape, seed=n, size=0.1) for n, (role, shape) in enumerate(shapes.items())}
    return made | {f"{stem}.alpha": torch.tensor(1.0)}


FILES: Mapping[str, Tensors] = {
    "loha": loha(Q, 320) | loha(CONV, 320 * 9),
    "lokr": {f"{Q}.lokr_w1": noise(4, 4, seed=1), f"{Q}.lokr_w2": noise(80, 80, seed=2, size=0.05)},
    "diff": {f"{Q}.diff": noise(*LINEAR, seed=1, size=0.1), f"{CONV}.diff": noise(*KERNEL, seed=2, size=0.1)},
    "ia3": {
        f"{Q}.weight": noise(320, seed=1, size=0.2),
        f"{Q}.on_input": torch.tensor(1),
        f"{CONV}.weight": noise(1, 320, 1, 1, seed=2, size=0.2),
        f"{CONV}.on_input": torch.tensor(0),
    },
    "oft": {f"{stem}.oft_blocks": noise(20, 16, 16, seed=n, size=0.1) for n, stem in enumerate((Q, CONV))}
    | {f"{stem}.alpha": torch.tensor(0.0) for stem in (Q, CONV)},
    "boft": {f"{stem}.oft_blocks": noise(3, 8, 40, 40, seed=n, size=0.1) for n, stem in enumerate((Q, CONV))}
    | {f"{stem}.alpha": torch.tensor(0.0) for stem in (Q, CONV)},
    "glora": glora(Q, 320) | glora(CONV, 320, (3, 3)),
    "set": {f"{Q}.set_weight": noise(*LINEAR, seed=1, size=0.05)},
}
ADDITIVE = ("loha", "lokr", "diff")
OF_THE_WEIGHT = tuple(name for name in FILES if name not in ADDITIVE)
each_file = pytest.mark.parametrize("family", FILES)


def adapter_file(tmp_path: Path, family: str, name: str = "adapter") -> Path:
    """The file of one family."""
    return save(tmp_path / f"{name}.safetensors", FILES[family])


def base_file(tmp_path: Path) -> Path:
    """A part of a checkpoint of SD 1.5, in float32."""
    return save(tmp_path / "base.safetensors", BASE)


def baked(tmp_path: Path, adapter: Path, strength: float = 1.0, name: str = "baked") -> dict[str, Tensor]:
    """What the base becomes."""
    output = tmp_path / f"{name}.safetensors"
    report = bake_file(
        base_file(tmp_path), [Asked(str(adapter), strength)], output, Options(overwrite=True), architecture="sd15"
    )
    assert not report.unmatched
    return load(output)


def test_every_family_is_here() -> None:
    assert set(families()) == {*FILES, "lora"}


@each_file
def test_info_reads_every_key(family: str, tmp_path: Path) -> None:
    info = inspect(adapter_file(tmp_path, family), architecture="sd15", keys=True)
    assert info.families == {family: info.modules}
    assert not info.unread_keys and not info.unread_families and info.standard_width
    if family not in ("loha", "lokr", "glora"):
        assert not info.ranks, "a rank that there is not"


@each_file
def test_a_bake_is_the_family_applied_to_the_weight(family: str, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, family)
    found = baked(tmp_path, path, 0.6)
    for module in open_adapter(path, architecture="sd15").modules:
        stem = next(iter(module.keys.values())).partition(".")[0]
        weight = BASE[KEYS[stem]]
        loaded = {role: factor.load().double() for role, factor in module.factors.items()}
        made = module.family.apply(loaded, module.scale, weight.double().flatten(1), 0.6).reshape(weight.shape)
        error = float((found[KEYS[stem]].double() - made).norm() / made.norm())
        assert error < 1e-6, f"{stem}: {error:.2g}"
        assert not torch.equal(found[KEYS[stem]], weight)


@each_file
def test_an_undo_file_gives_the_base_back(family: str, tmp_path: Path) -> None:
    base, path = base_file(tmp_path), adapter_file(tmp_path, family)
    output, undo = tmp_path / "baked.safetensors", tmp_path / "undo.loratool"
    bake_file(base, [Asked(str(path), 0.8)], output, Options(), architecture="sd15", undo=undo)
    unbake_file(output, undo, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("family", OF_THE_WEIGHT)
def test_what_depends_on_the_base_cannot_be_subtracted(family: str, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, family)
    title = families()[family].title.replace("(", r"\(").replace(")", r"\)").replace("^", r"\^")
    with pytest.raises(LoratoolError, match=f"are {title}: what they change depends on the base.*undo file"):
        subtract_file(base_file(tmp_path), [Asked(str(path))], tmp_path / "o.safetensors", Options())


@pytest.mark.parametrize("family", ["loha", "diff", *OF_THE_WEIGHT])
def test_resizing_is_refused_by_name(family: str, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, family)
    with pytest.raises(NotExact) as told:
        resize_file(path, [parse_rule("rank", "2")], tmp_path / "o.safetensors", architecture="sd15")
    message = str(told.value)
    assert f"a {families()[family].title} module has no ranks that can be cut" in message
    assert "convert --approximate lora" in message and ("--base" in message) == (family in OF_THE_WEIGHT)
    assert not (tmp_path / "o.safetensors").exists()


def test_norms_and_biases_stay_when_the_rest_is_resized(tmp_path: Path) -> None:
    vectors = {f"{NORM}.w_norm": noise(320, seed=1), f"{NORM}.b_norm": noise(320, seed=2), f"{OUT}.diff_b": noise(320)}
    path = save(tmp_path / "a.safetensors", kohya({Q: LINEAR}) | vectors)
    report = resize_file(path, [parse_rule("rank", "2")], tmp_path / "o.safetensors", architecture="sd15")
    assert report.ranks_before == {4: 1} and report.outcomes[0].ranks_after == {2: 1}
    after = load(tmp_path / "o.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in vectors.items())


@each_file
def test_approximating_gives_the_best_pair_and_tells_its_error(family: str, tmp_path: Path) -> None:
    """Against the dense SVD of what the bake adds."""
    path = adapter_file(tmp_path, family)
    base = base_file(tmp_path)
    output = tmp_path / "lora.safetensors"
    if family in OF_THE_WEIGHT:
        with pytest.raises(NotExact, match=r"depends on the base weights; add --base"):
            convert_file(path, "kohya", output, architecture="sd15", approximate=Wish(rank=8))
    report = convert_file(path, "kohya", output, architecture="sd15", approximate=Wish(rank=8), base=str(base))
    told = {item.title: item for item in report.approximated}
    modules = open_adapter(output, architecture="sd15").modules
    assert len(told) == len(modules) and all(module.family.id == "lora" for module in modules)
    found = baked(tmp_path, path)
    for module in modules:
        stem = next(iter(module.keys.values())).partition(".")[0]
        change = (found[KEYS[stem]].double() - BASE[KEYS[stem]].double()).flatten(1)
        values = torch.linalg.svdvals(change)
        best = float(values[8:].norm() / values.norm())
        own = float((change - module.delta().double().flatten(1)).norm() / change.norm())
        assert told[module.title].family == family and told[module.title].rank == 8
        assert own == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert told[module.title].error == pytest.approx(best, rel=1e-3, abs=1e-5)


def test_an_energy_decides_the_rank_of_each_module(tmp_path: Path) -> None:
    report = convert_file(
        adapter_file(tmp_path, "loha"),
        "diffusers",
        tmp_path / "lora.safetensors",
        architecture="sd15",
        approximate=Wish(energy=1 - 1e-12),
    )
    assert {item.rank for item in report.approximated} == {4}, "a Hadamard product of two ranks 2 has rank 4"
    assert all(item.error < 1e-6 for item in report.approximated)


@each_file
def test_alone_in_a_merge_a_module_is_kept(family: str, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, family)
    report = merge_files([Asked(str(path))], tmp_path / "m.safetensors", methods()["concat"], architecture="sd15")
    assert report.error == 0 and report.held is not None and report.held.error == 0
    before, after = load(path), load(tmp_path / "m.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@each_file
def test_merged_with_others_it_is_refused_by_name_or_approximated(family: str, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, family)
    other = save(tmp_path / "other.safetensors", kohya({Q: LINEAR}))
    asked = [Asked(str(path), 0.5), Asked(str(other), 1.0)]
    title = families()[family].title
    base = base_file(tmp_path)
    with pytest.raises(NotExact) as told:
        merge_files(asked, tmp_path / "m.safetensors", methods()["concat"], architecture="sd15")
    assert title in str(told.value) and "--approximate" in str(told.value)
    assert ("--base" in str(told.value)) == (family in OF_THE_WEIGHT)
    if family in OF_THE_WEIGHT:
        with pytest.raises(NotExact, match="add --base"):
            merge_files(
                asked,
                tmp_path / "m.safetensors",
                methods()["concat"],
                architecture="sd15",
                approximate=True,
                rule=parse_rule("rank", "320"),
            )
    report = merge_files(
        asked,
        tmp_path / "m.safetensors",
        methods()["concat"],
        architecture="sd15",
        approximate=True,
        rule=parse_rule("energy", "1.0"),
        base=str(base) if family in OF_THE_WEIGHT else None,
    )
    assert report.error < 1e-5
    change = baked(tmp_path, path)[KEYS[Q]].double() - BASE[KEYS[Q]].double()
    expected = 0.5 * change + dense(*factors(LINEAR), 0.5)
    (merged,) = [m for m in open_adapter(tmp_path / "m.safetensors").modules if m.targets[0].path.endswith("to_q")]
    assert merged.family.id == "lora"
    assert float((merged.delta().double() - expected).norm() / expected.norm()) < 1e-5


def test_full_differences_add_up_exactly(tmp_path: Path) -> None:
    vectors = {f"{NORM}.w_norm": noise(320, seed=1), f"{NORM}.b_norm": noise(320, seed=2)}
    one = save(tmp_path / "a.safetensors", FILES["diff"] | vectors)
    other = save(
        tmp_path / "b.safetensors", {f"{Q}.diff": noise(*LINEAR, seed=7), f"{NORM}.w_norm": noise(320, seed=8)}
    )
    asked = [Asked(str(one), 0.5), Asked(str(other), -2.0)]
    report = merge_files(asked, tmp_path / "m.safetensors", methods()["concat"], architecture="sd15")
    assert report.error == 0
    first, second, made = (load(tmp_path / f"{name}.safetensors") for name in "abm")
    for key in (f"{Q}.diff", f"{NORM}.w_norm"):
        torch.testing.assert_close(made[key], 0.5 * first[key] - 2.0 * second[key], rtol=1e-6, atol=1e-6)
    for key in (f"{CONV}.diff", f"{NORM}.b_norm"):
        torch.testing.assert_close(made[key], 0.5 * first[key], rtol=1e-6, atol=1e-6)


def test_norms_and_biases_are_baked(tmp_path: Path) -> None:
    tensors = {
        f"{NORM}.w_norm": noise(320, seed=1),
        f"{NORM}.b_norm": noise(320, seed=2),
        f"{OUT}.diff": noise(*LINEAR, seed=3),
        f"{OUT}.diff_b": noise(320, seed=4),
    }
    found = baked(tmp_path, save(tmp_path / "a.safetensors", tensors), 0.5)
    norm = "model.diffusion_model.input_blocks.1.0.in_layers.0"
    for key, role in (
        (f"{norm}.weight", f"{NORM}.w_norm"),
        (f"{norm}.bias", f"{NORM}.b_norm"),
        (KEYS[OUT], f"{OUT}.diff"),
        (KEYS[OUT].replace("weight", "bias"), f"{OUT}.diff_b"),
    ):
        torch.testing.assert_close(found[key], BASE[key] + 0.5 * tensors[role], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[KEYS[Q]], BASE[KEYS[Q]])


def test_a_bias_alone_is_baked_and_changes_no_weight(tmp_path: Path) -> None:
    tensors = {f"{OUT}.diff_b": noise(320, seed=4)}
    found = baked(tmp_path, save(tmp_path / "a.safetensors", tensors))
    bias = KEYS[OUT].replace("weight", "bias")
    torch.testing.assert_close(found[bias], BASE[bias] + tensors[f"{OUT}.diff_b"])
    assert all(torch.equal(found[key], tensor) for key, tensor in BASE.items() if key != bias)


def test_blocks_tell_no_norm_of_what_depends_on_the_base(tmp_path: Path) -> None:
    def norms(family: str) -> list[float]:
        table = blocks_of(open_adapter(adapter_file(tmp_path, family, family), architecture="sd15"))
        return [block.norm for block in table.blocks if block.modules]

    assert all(norm > 0 for norm in norms("loha"))
    assert all(norm != norm for norm in norms("oft"))


def test_two_adapters_change_the_same_weight_of_the_base(tmp_path: Path) -> None:
    """Each of them changes the base, and the changes add up, in any order."""
    path, other = adapter_file(tmp_path, "oft"), adapter_file(tmp_path, "ia3", "other")
    results = []
    for asked in ([path, other], [other, path]):
        output = tmp_path / "both.safetensors"
        options = Options(overwrite=True)
        bake_file(base_file(tmp_path), [Asked(str(one)) for one in asked], output, options, architecture="sd15")
        results.append(load(output)[KEYS[Q]])
    changes = [baked(tmp_path, one)[KEYS[Q]] - BASE[KEYS[Q]] for one in (path, other)]
    for found in results:
        torch.testing.assert_close(found, BASE[KEYS[Q]] + changes[0] + changes[1], rtol=1e-5, atol=1e-6)


def test_sd_scripts_own_oft_prefix_is_read(tmp_path: Path) -> None:
    stem = "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.oft_blocks": noise(4, 160, 160, size=0.01), f"{stem}.alpha": torch.tensor(1e-3)}
    adapter = open_adapter(save(tmp_path / "a.safetensors", tensors), architecture="sdxl")
    (module,) = adapter.modules
    assert module.family.id == "oft" and module.shape == (640, 640) and not adapter.extras
    assert module.alpha is None and module.factors["constraint"].item() == pytest.approx(1e-3)


def test_a_weight_without_a_flag_is_no_ia3(tmp_path: Path) -> None:
    stray = {f"{CONV}.weight": noise(320)}
    tensors = kohya({Q: LINEAR, OUT: LINEAR}) | stray
    adapter = open_adapter(save(tmp_path / "a.safetensors", tensors), architecture="sd15")
    assert list(adapter.extras) == [f"{CONV}.weight"] and len(adapter.modules) == 2


def test_a_bias_beside_another_family_is_an_extra_in_kohyas_layout(tmp_path: Path) -> None:
    stray = {f"{Q}.diff_b": noise(320)}
    adapter = open_adapter(save(tmp_path / "a.safetensors", kohya({Q: LINEAR}) | stray), architecture="sd15")
    assert list(adapter.extras) == [f"{Q}.diff_b"] and adapter.modules[0].family.id == "lora"


def test_two_families_on_one_weight_are_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya({Q: LINEAR}) | FILES["diff"])
    with pytest.raises(FormatError, match="two families: diff and lora"):
        open_adapter(path, architecture="sd15")


def test_flux_norms_go_by_their_own_names_in_comfyui(tmp_path: Path) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff"
    pair = {
        f"diffusion_model.double_blocks.0.img_attn.proj.lora_{x}.weight": noise(*shape)
        for x, shape in (("A", (2, 3072)), ("B", (3072, 2)))
    }
    path = save(tmp_path / "a.safetensors", {name: noise(128), **pair})
    adapter = open_adapter(path)
    assert adapter.architecture.id == "flux" and not adapter.extras
    assert {module.targets[0].path for module in adapter.modules if module.family.id == "diff"} == {
        "transformer_blocks.0.attn.norm_q"
    }
    convert_file(path, "kohya", tmp_path / "k.safetensors")
    there = load(tmp_path / "k.safetensors")
    assert "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff" in there
    convert_file(tmp_path / "k.safetensors", "comfyui", tmp_path / "back.safetensors")
    assert torch.equal(load(tmp_path / "back.safetensors")[name], noise(128))


def test_fused_weights_are_split_where_the_family_allows(tmp_path: Path) -> None:
    """Flux' qkv in kohya's names becomes q, k, v: LoHa and full differences exactly, OFT between its blocks."""
    stem, out = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"
    shapes = {"w1_a": (9216, 2), "w1_b": (2, 3072), "w2_a": (9216, 2), "w2_b": (2, 3072)}
    cases: dict[str, Tensors] = {
        "loha": {
            f"{stem}.hada_{role}": noise(*shape, seed=n, size=0.1) for n, (role, shape) in enumerate(shapes.items())
        },
        "oft": {f"{stem}.oft_blocks": noise(96, 96, 96, size=0.01), f"{stem}.alpha": torch.tensor(0.0)},
        "cut": {f"{stem}.oft_blocks": noise(9, 1024, 1024, size=0.001), f"{stem}.alpha": torch.tensor(1e-9)},
    }
    from loratool.ops.regroup import regroup

    for name, tensors in cases.items():
        pair = {f"{out}.lora_up.weight": noise(3072, 2), f"{out}.lora_down.weight": noise(2, 3072)}
        adapter = open_adapter(save(tmp_path / f"{name}.safetensors", dict(tensors) | pair), architecture="flux")
        naming = {"transformer": adapter.architecture.naming("transformer", "diffusers")}
        if name == "cut":
            with pytest.raises(NotExact, match="OFT"):
                regroup(adapter.modules, naming)
            continue
        parts = [m for m in regroup(adapter.modules, naming).modules if m.family.id == name]
        assert [module.targets[0].path.rpartition(".")[2] for module in parts] == ["to_q", "to_k", "to_v"]
        whole = next(module for module in adapter.modules if module.family.id == name)
        weight = noise(9216, 64, seed=5) if name == "oft" else noise(9216, 3072, seed=5, size=0.01)
        made = [
            part.family.apply(
                {role: factor.load() for role, factor in part.factors.items()},
                part.scale,
                weight[3072 * n : 3072 * (n + 1)],
                1.0,
            )
            for n, part in enumerate(parts)
        ]
        loaded = {role: factor.load() for role, factor in whole.factors.items()}
        torch.testing.assert_close(torch.cat(made), whole.family.apply(loaded, whole.scale, weight, 1.0))


def test_a_lora_is_unpacked_from_a_dylora(tmp_path: Path) -> None:
    """As sd-scripts' own tool does: the first components, alpha unchanged."""
    up, down = factors(LINEAR, rank=8)
    tensors = {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down, f"{Q}.alpha": torch.tensor(4.0)}
    header = {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "2"}', "ss_network_dim": "8"}
    path = save(tmp_path / "a.safetensors", tensors, header)
    assert any("--unpack" in note for note in open_adapter(path, architecture="sd15").notes)
    report = convert_file(path, "kohya", tmp_path / "o.safetensors", architecture="sd15", unpack=4)
    assert report.ranks_after == {4: 1}
    (module,) = open_adapter(tmp_path / "o.safetensors", architecture="sd15").modules
    torch.testing.assert_close(module.delta().double(), dense(up[:, :4], down[:4], 1.0), rtol=1e-5, atol=1e-6)
    assert load(tmp_path / "o.safetensors")[f"{Q}.alpha"] == 4.0
    with pytest.raises(UsageError, match="multiple of the 2 ranks"):
        convert_file(path, "kohya", tmp_path / "p.safetensors", architecture="sd15", unpack=3)
    plain = save(tmp_path / "plain.safetensors", tensors)
    with pytest.raises(LoratoolError, match=r"does not say that it is a DyLoRA.*resize --rank"):
        convert_file(plain, "kohya", tmp_path / "p.safetensors", architecture="sd15", unpack=4)


def test_bundled_embeddings_are_kept_and_listed(tmp_path: Path) -> None:
    bundled = {
        "bundle_emb.my token.string_to_param.*": noise(3, 768),
        "bundle_emb.xl.clip_l": noise(2, 768),
        "bundle_emb.xl.clip_g": noise(2, 1280),
        "emb_params": noise(1, 768),
    }
    path = save(
        tmp_path / "a.safetensors",
        kohya({f"{Q[:-1]}{x}": LINEAR for x in "qkv"} | {OUT: LINEAR, CONV: KERNEL}) | bundled,
    )
    assert inspect(path, architecture="sd15").embeddings == {"my token": 3, "xl": 2, "emb_params": 1}
    convert_file(path, "kohya", tmp_path / "o.safetensors", architecture="sd15", dtype="F16")
    after = load(tmp_path / "o.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in bundled.items())


def test_a_magnitude_whose_meaning_is_not_known_is_refused(tmp_path: Path) -> None:
    tensors = dict(FILES["glora"]) | {f"{Q}.dora_scale": noise(320, 1)}
    with pytest.raises(FormatError, match="DoRA magnitude beside a GLoRA module"):
        open_adapter(save(tmp_path / "a.safetensors", tensors), architecture="sd15")
