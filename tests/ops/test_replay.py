"""replay: the same bytes again, inputs found by name or hash, and recipes that are not believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.core.adapter import Bundle
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.registry import methods
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import read_bundle
from loratool.ops import recipe
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from loratool.ops.per_block import from_mapping
from loratool.ops.ranks import Limits, parse_rule
from loratool.ops.replay import replay_file
from loratool.ops.resize_file import resize_file
from tests.builders import Style, build, write_file
from tests.ops.test_merge_files import make, small_parts

CONCAT = methods()["concat"]


def two(tmp_path: Path) -> list[Asked]:
    a = make(tmp_path / "a.safetensors", "kohya", 1, Style(metadata={"modelspec.title": "a"}), count=4)
    b = make(tmp_path / "b.safetensors", "diffusers", 2, rank=4, count=4)
    return [Asked(str(a), 0.7), Asked(str(b), -0.3)]


def merged(tmp_path: Path, name: str = "out.safetensors", **options: Any) -> Path:
    merge_files(two(tmp_path), tmp_path / name, options.pop("method", CONCAT), **options)
    return tmp_path / name


def again(path: Path, **options: Any) -> str:
    return replay_file(path, **options).comparison.result


RANDOM = sorted(one.id for one in methods().values() if "seed" in one.options)


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods(tmp_path: Path, method: str) -> None:
    out = merged(tmp_path, method=methods()[method], options={"density": 0.5, "seed": 7})
    assert again(out) == "identical"
    other = merged(tmp_path, "other.safetensors", method=methods()[method], options={"density": 0.5, "seed": 8})
    ours, theirs = (read_bundle(path).tensors for path in (out, other))
    assert any(bytes(ours[key].read()) != bytes(theirs[key].read()) for key in ours)


@pytest.mark.parametrize("method", sorted(methods().keys() - set(RANDOM) - {"linear"}))
def test_the_other_methods(tmp_path: Path, method: str) -> None:
    assert again(merged(tmp_path, method=methods()[method])) == "identical"


@pytest.mark.parametrize(
    "options",
    [
        {"rule": parse_rule("energy", "0.9"), "limits": Limits(2, 3)},
        {"rule": parse_rule("size", "0.1MiB"), "dtype": "F16"},
        {"rule": parse_rule("knee", ""), "limits": Limits(conv_rank=1)},
        {"to": "peft"},
        {"to": "comfyui", "dtype": "BF16", "metadata": "union"},
        {"metadata": "none", "architecture": "sd15", "title": "a title"},
    ],
    ids=["energy", "size", "knee", "peft", "comfyui", "none"],
)
def test_rules_layouts_and_headers(tmp_path: Path, options: dict[str, Any]) -> None:
    assert (
        again(merged(tmp_path, "out" if options.get("to") == "peft" else "out.safetensors", **options)) == "identical"
    )


def test_blocks(tmp_path: Path) -> None:
    (tmp_path / "blocks.yaml").write_text('"IN*": 0.5\n"unet.*.attn1.*": 0.25\nBASE: 2\n', encoding="utf-8")
    asked = [replace(one, blocks=str(tmp_path / "blocks.yaml")) for one in two(tmp_path)]
    merge_files([*asked[:1], replace(asked[1], blocks="ALL0.5")], tmp_path / "out.safetensors", CONCAT)
    (tmp_path / "blocks.yaml").unlink()
    assert again(tmp_path / "out.safetensors") == "identical"


def test_resize_with_several_rules_and_rules_per_block(tmp_path: Path) -> None:
    path = make(tmp_path / "a.safetensors", rank=6, style=Style(metadata={"ss_network_dim": "6"}))
    adapter = open_adapter(path)
    own = from_mapping({"BASE": "energy 0.5", "IN*": "keep"}, adapter.architecture, adapter.modules)
    rules = [parse_rule("rank", "2"), parse_rule("error", "0.3"), parse_rule("size", "0.1 MiB")]
    report = resize_file(
        path,
        rules,
        tmp_path / "out-{rule}.safetensors",
        own=own,
        per_block=own.to_data(),
        limits=Limits(2),
        to="diffusers",
    )
    path.rename(tmp_path / "renamed.safetensors")
    for outcome in report.outcomes:
        assert again(Path(str(outcome.output))) == "identical"
    done = replay_file(str(report.outcomes[0].output), tmp_path / "x-{rule}.safetensors")
    assert done.output == str(tmp_path / "x-rank2.safetensors")


def test_resize_to_a_folder_with_a_base(tmp_path: Path) -> None:
    parts = [part for part in small_parts("kohya", rank=4) if part.weight.component == "unet"]
    path = write_file(tmp_path / "a.safetensors", build(parts, "kohya"))
    base = {f"{p.weight.name}.weight": LazyTensor.from_torch(torch.randn(p.weight.shape)) for p in parts}
    (tmp_path / "model" / "unet").mkdir(parents=True)
    write_file(tmp_path / "model" / "unet" / "w.safetensors", Bundle(base, {}))
    rule = parse_rule("error", "0.4")
    resize_file(path, [rule], tmp_path / "out", to="peft", base=str(tmp_path / "model"), architecture="sd15")
    made = recipe.decode(read_bundle(tmp_path / "out").metadata)
    assert made["architecture"] == "sd15" and made["base"]["name"] == "model"
    done = replay_file(tmp_path / "out")
    assert done.comparison.result == "identical" and done.base is not None
    write_file(tmp_path / "model" / "unet" / "w.safetensors", Bundle({**base, "x": LazyTensor.scalar(1.0, "F32")}, {}))
    with pytest.raises(LoratoolError, match=r"model \(.* is another file now\)"):
        replay_file(tmp_path / "out")


def test_peft_folders_in_and_out_by_their_model_file(tmp_path: Path) -> None:
    parts = [part for part in small_parts("peft") if part.weight.component == "unet"]
    folder = write_file(tmp_path / "in", build(parts, "peft"))
    merge_files([Asked(str(folder))], tmp_path / "out", CONCAT)
    assert again(tmp_path / "out") == again(tmp_path / "out" / "adapter_model.safetensors") == "identical"
    folder.rename(tmp_path / "moved")
    done = replay_file(tmp_path / "out")
    assert done.inputs[0].path == str(tmp_path / "moved") and done.comparison.result == "identical"
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    done = replay_file(tmp_path / "out")
    assert (done.comparison.result, done.comparison.entries) == ("header", ("adapter_config.json",))


# -- where inputs are ------------------------------------------------------------------------


def test_renamed_moved_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = merged(tmp_path)
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir(), here.mkdir()
    (tmp_path / "a.safetensors").rename(elsewhere / "z.safetensors")
    (tmp_path / "b.safetensors").rename(here / "b.safetensors")
    with pytest.raises(LoratoolError, match=r"a.safetensors is not there; b.safetensors is not there.*--from"):
        replay_file(out)
    monkeypatch.chdir(here)
    done = replay_file(out, tmp_path / "new.safetensors", folders=[elsewhere])
    assert done.comparison.result == "identical"
    assert (tmp_path / "new.safetensors").read_bytes() == out.read_bytes()
    assert [one.path for one in done.inputs] == [str(elsewhere / "z.safetensors"), str(here / "b.safetensors")]
    with pytest.raises(LoratoolError, match="exists already"):
        replay_file(out, tmp_path / "new.safetensors", folders=[elsewhere])
    with pytest.raises(LoratoolError, match="is an input"):
        replay_file(out, out, folders=[elsewhere], overwrite=True)
    with pytest.raises(LoratoolError, match="is an input"):
        replay_file(out, elsewhere / "z.safetensors", folders=[elsewhere], overwrite=True)
    with pytest.raises(UsageError, match="no such folder"):
        replay_file(out, folders=[tmp_path / "none"])


def test_a_changed_input_is_said_and_another_with_the_hash_found(tmp_path: Path) -> None:
    out = merged(tmp_path)
    old = (tmp_path / "a.safetensors").read_bytes()
    make(tmp_path / "a.safetensors", seed=99)
    with pytest.raises(LoratoolError, match=r"a.safetensors \(.*a.safetensors is another file now\)"):
        replay_file(out)
    (tmp_path / "backup.safetensors").write_bytes(old)
    done = replay_file(out)
    assert done.comparison.result == "identical" and done.inputs[0].path == str(tmp_path / "backup.safetensors")


def test_pipes_and_locked_folders_are_passed_by(tmp_path: Path) -> None:
    out = merged(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "z.safetensors")
    os.mkfifo(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert again(out) == "identical"


# -- what differs ------------------------------------------------------------------------


def rewritten(path: Path, tensors: Callable[[str, LazyTensor], LazyTensor] | None = None, **metadata: str) -> None:
    bundle = read_bundle(path)
    changed = {key: tensors(key, tensor) if tensors else tensor for key, tensor in bundle.tensors.items()}
    held = {key: LazyTensor.from_torch(tensor.load().clone()) for key, tensor in changed.items()}
    write_file(path, Bundle(held, {**bundle.metadata, **metadata}))


def test_another_header(tmp_path: Path) -> None:
    out = merged(tmp_path)
    made = recipe.decode(read_bundle(out).metadata) | {"version": "0.0.1"}
    rewritten(out, extra="x", **{recipe.ENTRY: recipe.encode(made)})
    done = replay_file(out)
    assert done.version == "0.0.1"
    assert (done.comparison.result, done.comparison.tensors, done.comparison.error) == ("header", 0, None)
    assert done.comparison.entries == ("extra", "loratool.recipe (version)")


def test_other_tensors(tmp_path: Path) -> None:
    out = merged(tmp_path)
    first = next(key for key in read_bundle(out).tensors if key.endswith("lora_up.weight"))
    rewritten(out, lambda key, tensor: LazyTensor.from_torch(tensor.load() * 1.25) if key == first else tensor)
    done = replay_file(out)
    assert (done.comparison.result, done.comparison.tensors) == ("tensors", 1)
    assert done.comparison.error == pytest.approx(0.2, rel=1e-4)
    assert done.comparison.worst_module is not None
    rewritten(out, lambda key, tensor: LazyTensor.from_torch(tensor.load() * math.nan) if key == first else tensor)
    error = replay_file(out).comparison.error
    assert error is not None and math.isnan(error)


def test_a_recipe_of_another_device_is_followed_with_a_word(tmp_path: Path) -> None:
    out = merged(tmp_path)
    forged(out, device="xpu")
    done = replay_file(out)
    assert done.comparison.result == "header" and "xpu" in done.notes[0]


# -- hostile recipes ------------------------------------------------------------------------


def forged(path: Path, first: Mapping[str, Any] | None = None, **changes: Any) -> None:
    made = recipe.decode(read_bundle(path).metadata)
    made["inputs"][0] |= first or {}
    rewritten(path, **{recipe.ENTRY: json.dumps({**made, **changes})})


OTHER_NAMES = ["", ".", "..", "/etc/passwd", "../a.safetensors", "sub/a.safetensors", "a\\b", "a\0b", "x" * 2000]
FORGED: list[dict[str, Any]] = [
    *({"first": {"name": name}} for name in OTHER_NAMES),
    {"first": {"sha256": "zz"}},
    {"first": {"weight": "1"}},
    {"first": {"weight": True}},
    {"first": {"weight": math.nan}},
    {"first": {"weight": 10**400}},
    {"first": {"blocks": "ALL"}},
    {"first": {"blocks": {"entries": [["IN*"]], "rest": 1}}},
    {"first": {"blocks": {"entries": [["IN*", 10**400]], "rest": 1}}},
    {"first": {"blocks": {"entries": [["*", 1.0]] * 100_000, "rest": 1}}},
    {"first": {"blocks": {"entries": [["*" * 100_000, 1.0]], "rest": 1}}},
    {"inputs": [{"name": "a", "sha256": "0" * 64}] * 2000},
    {"inputs": []},
    {"inputs": "a"},
    {"command": "rm"},
    {"command": ["merge"]},
    {"command": "resize"},
    {"version": 3},
    {"method": "nope"},
    {"method": ["ties"]},
    {"method": "__init__"},
    {"options": {"density": 0.5}},
    {"options": {"__class__": 1}},
    {"options": []},
    {"rule": "rank 0"},
    {"rule": "nope 3"},
    {"rule": "size"},
    {"rule": "knee knee\x1b[31m" + "x" * 2000},
    {"min_rank": 0},
    {"min_rank": 1.5},
    {"max_rank": True},
    {"to": "nope"},
    {"to": "../x"},
    {"dtype": "I64"},
    {"metadata": "all"},
    {"architecture": "nope"},
    {"base": {"name": "../base", "sha256": "0" * 64}},
    {"base": {"name": "base"}},
    {"base": "base"},
    {"approximate": "yes"},
    {"drop_extras": 1},
    {"title": "x" * 100_000},
    {"unknown": 1},
    {"output": "/tmp/x"},
]


@pytest.mark.parametrize("changes", FORGED, ids=lambda changes: str(changes)[:50].encode("ascii", "replace").decode())
def test_forged_recipes_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    out = merged(tmp_path)
    forged(out, **changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoratoolError) as caught:
        replay_file(out, tmp_path / "new.safetensors")
    assert caught.value.exit_code == 1 and caught.value.file is not None
    assert len(str(caught.value)) < 1000
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("entry", ["", "{", "[]", "3", '{"inputs": 3}', "[" * 100_000, '{"x": ' * 100_000])
def test_what_is_no_recipe(tmp_path: Path, entry: str) -> None:
    out = merged(tmp_path)
    rewritten(out, **{recipe.ENTRY: entry})
    with pytest.raises(FormatError):
        replay_file(out)


def test_files_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no recipe"):
        replay_file(make(tmp_path / "a.safetensors"))


def test_per_block_of_a_forged_resize(tmp_path: Path) -> None:
    path = make(tmp_path / "a.safetensors", rank=3)
    resize_file(path, [parse_rule("rank", "2")], tmp_path / "out.safetensors")
    for per_block in (
        {"nothing.of.the.kind": "rank 1"},
        {"BASE": "size 3"},
        {"BASE": ["rank"]},
        {"x" * 2000: "rank 1"},
    ):
        forged(tmp_path / "out.safetensors", per_block=per_block)
        with pytest.raises(FormatError):
            replay_file(tmp_path / "out.safetensors")
