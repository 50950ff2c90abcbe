"""The return ticket is data from a file: whatever it says, nothing breaks and nothing is written elsewhere."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratool.core.errors import LoratoolError
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import Bundle, write_bundle
from loratool.ops import origin
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter

STEM = "lora_unet_double_blocks_0_img_attn_qkv"


def converted(folder: Path, to: str = "diffusers") -> Path:
    """A Flux module of sd-scripts' in another spelling."""
    tensors = {f"{STEM}.lora_down.weight": torch.rand(2, 3072), f"{STEM}.lora_up.weight": torch.rand(9216, 2)}
    save_file({**tensors, f"{STEM}.alpha": torch.tensor(1.0)}, folder / "kohya.safetensors")
    convert_file(folder / "kohya.safetensors", to, folder / "there.safetensors")
    return folder / "there.safetensors"


def forged(file: Path, **changes: Any) -> Path:
    """The file with a ticket that says something else."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    ticket = json.loads(zlib.decompress(base64.b64decode(metadata[origin.ENTRY]))) | changes
    metadata[origin.ENTRY] = base64.b64encode(zlib.compress(json.dumps(ticket).encode())).decode()
    save_file(load_file(file), file, metadata=metadata)
    return file


DOWN, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.alpha"


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": []},
        {"keys": {DOWN: None}},
        {"keys": {DOWN: ["x", [1, 2], "F32"]}},
        {"keys": {DOWN: [3]}},
        {"keys": {ALPHA: ["alpha", [], "NOPE"]}},
        {"voices": [1, 2]},
        {"voices": {"transformer": ["../", "diffusers", "x"]}},
        {"voices": {"transformer": ["lora_unet_", "nope"]}},
        {"blocks": {"a": 3}},
        {"blocks": 7},
        {"extras": {"x": ["F32", [1000000], ""]}},
        {"extras": {"x": 5}},
        {"added": {ALPHA: ["F32", [], "AACAQA=="]}},
        {"metadata": {"a": 5}},
        {"order": [[]]},
        {"side_files": {"../../evil": "x"}},
        {"side_files": {"adapter_config.json": 3}},
        {"unknown": 1},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_a_forged_ticket_never_changes_the_update_nor_writes_elsewhere(changes: dict[str, Any], tmp_path: Path) -> None:
    there, back = forged(converted(tmp_path), **changes), tmp_path / "back.safetensors"
    before = {path.name for path in tmp_path.parent.iterdir()}
    expected = {module.targets: module.delta() for module in open_adapter(tmp_path / "kohya.safetensors").modules}
    try:
        convert_file(there, "kohya", back)
    except LoratoolError:
        assert not back.exists()
    else:
        found = {module.targets: module.delta() for module in open_adapter(back).modules}
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[targets], expected[targets]) for targets in expected)
    assert {path.name for path in tmp_path.parent.iterdir()} == before


@pytest.mark.parametrize("text", ["", "x", "AAAA", base64.b64encode(zlib.compress(b"[1]")).decode()])
def test_what_is_no_ticket_is_none(text: str) -> None:
    assert origin.decode({origin.ENTRY: text}) is None


def test_a_ticket_that_expands_without_end_is_none() -> None:
    bomb = base64.b64encode(zlib.compress(b'"' + b"a" * (origin.MAX_EXPANDED + 10) + b'"', 9)).decode()
    assert origin.decode({origin.ENTRY: bomb}) is None


@pytest.mark.parametrize("key", ["../evil/x", "/etc/x", "a/b/c", "..", "unet/../../x"])
def test_no_key_leaves_the_folder_that_is_written(key: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside" / "adapter"
    folder.parent.mkdir()
    tensor = LazyTensor.from_torch(torch.ones(2))
    write_bundle(folder, Bundle({key: tensor, "unet/y": tensor}), folder=True)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} <= {"inside", "adapter", "unet", "a"}
    assert {path.parent for path in tmp_path.rglob("*.safetensors")} <= {folder, folder / "unet", folder / "a"}


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "x/../adapter_config.json", "other.json"])
def test_no_side_file_is_written_under_another_name(name: str, tmp_path: Path) -> None:
    bundle = Bundle({"x": LazyTensor.from_torch(torch.ones(2))}, {}, {name: "{}"})
    with pytest.raises(LoratoolError, match="side file"):
        write_bundle(tmp_path / "adapter", bundle, folder=True)
    assert list(tmp_path.iterdir()) == []
