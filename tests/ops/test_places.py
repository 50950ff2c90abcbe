"""Places and the config file: where is looked, what counts as a file there, and what a broken config says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from loratool.core.errors import LoratoolError, UsageError
from loratool.ops.config import config_path, read_config, write_base
from loratool.ops.places import (
    called,
    files_in,
    hub_cache,
    look_around,
    lora_places,
    model_places,
    named_by_variable,
    roots,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def config(home: Path, text: str) -> Path:
    path = home / ".config" / "loratool" / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


# -- the config file -------------------------------------------------------------------------------------------------


def test_where_the_config_is(tmp_path: Path) -> None:
    assert config_path({}, tmp_path) == tmp_path / ".config/loratool/config.yaml"
    assert config_path({"XDG_CONFIG_HOME": "/x"}, tmp_path) == Path("/x/loratool/config.yaml")
    assert config_path({"XDG_CONFIG_HOME": "/x", "LORATOOL_CONFIG": "~/my.yaml"}, tmp_path) == tmp_path / "my.yaml"
    assert read_config({}, tmp_path).exists is False


def test_what_the_config_says(tmp_path: Path) -> None:
    text = (
        "bases: {sd15: /m/a.safetensors, mine: ~/b.safetensors, near: c}\nroots: [/comfy]\nloras: ~/loras\nother: 1\n"
    )
    path = config(tmp_path, text)
    found = read_config({}, tmp_path)
    assert found.bases == {
        "sd15": Path("/m/a.safetensors"),
        "mine": tmp_path / "b.safetensors",
        "near": path.parent / "c",
    }
    assert (found.roots, found.loras, found.unknown) == ((Path("/comfy"),), (tmp_path / "loras",), ("other",))


@pytest.mark.parametrize("text", ["", "# nothing\n", "bases:\nroots:\nloras: []\n", "\ufeffbases: {}\n"])
def test_an_empty_config(tmp_path: Path, text: str) -> None:
    config(tmp_path, text)
    found = read_config({}, tmp_path)
    assert (found.exists, found.bases, found.roots, found.loras) == (True, {}, (), ())


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("bases:\n  a: [1\n", 3, "is no YAML"),
        ("bases:\n\ta: b\n", 2, "is no YAML"),
        ("- sd15\n", 1, "expected entries"),
        ("bases: /m/a.safetensors\n", 1, "expected entries"),
        ("bases:\n  sd15:\n    - a\n", 3, "expected a path"),
        ("bases:\n  sd15:\n", 2, "expected a path"),
        ("bases:\n  a: b\n  a: c\n", 3, "stands twice"),
        ("roots: {a: b}\n", 1, "expected a path"),
        ("loras:\n- a\n- {b: c}\n", 3, "expected a path"),
        ("? [a]\n: b\n", 1, "a name is one text"),
        ("a: b\n---\nc: d\n", 2, "is no YAML"),
        ("a: &x [*x]\nbases: *x\n", 1, "expected entries"),
    ],
)
def test_a_broken_config(tmp_path: Path, text: str, line: int, what: str) -> None:
    path = config(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_config({}, tmp_path)
    assert (caught.value.file, caught.value.exit_code) == (str(path), 2)
    assert f"line {line}: " in str(caught.value) and what in str(caught.value)


def test_a_config_that_is_no_text(tmp_path: Path) -> None:
    config(tmp_path, "").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_config({}, tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_config({"LORATOOL_CONFIG": str(tmp_path)}, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# mine\nroots:\n  - /comfy  # big disk\n",
        "bases:\n  # the good one\n  anime: /a.safetensors  # v3\n  sd15: '/old: one.safetensors'\nloras: [/l]\n",
        "bases:\n    sd15: /old\n    b: /b\n",
        "bases:\n# anime: /a.safetensors\nloras: [/l]\n",
        "bases: {sd15: /old, b: /b}\nextra: {deep: [1, 2]}\n",
        "bases: {}\n",
        "roots: [/no/newline/at/the/end]",
    ],
)
@pytest.mark.parametrize("target", ["/new/file.safetensors", "/odd: #1 'ü' .safetensors"])
def test_writing_keeps_everything_else(tmp_path: Path, text: str, target: str) -> None:
    path = config(tmp_path, text)
    before = yaml.safe_load(text) or {}
    write_base(read_config({}, tmp_path), "sd15", Path(target))
    after = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert after == {**before, "bases": {**(before.get("bases") or {}), "sd15": target}}
    assert read_config({}, tmp_path).bases["sd15"] == Path(target)
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert path.read_text(encoding="utf-8").count("#") - target.count("#") == text.count("#")


@pytest.mark.parametrize(
    ("text", "name", "after"),
    [
        ("bases:\n  1: /a\n", "1", "bases:\n  1: {0}\n"),
        ("bases: {{on: /a, b: '/c'}}  # mine\n", "q", 'bases: {{"q": "{0}", on: /a, b: \'/c\'}}  # mine\n'),
        ("bases: {{on: /a}}\n", "on", 'bases: {{on: "{0}"}}\n'),
        ("bases:\n  on: /a\n", "on", "bases:\n  on: {0}\n"),
        (
            "\ufeffbases:\r\n  a: /x # hi\r\nroots: []\r\n",
            "q",
            "\ufeffbases:\r\n  q: {0}\r\n  a: /x # hi\r\nroots: []\r\n",
        ),
        ("\ufeffbases: {{on: /a}}\r\n", "on", '\ufeffbases: {{on: "{0}"}}\r\n'),
        ("roots: []\r\n", "q", "roots: []\r\nbases:\r\n  q: {0}\r\n"),
        ("bases:\r\nroots: []\n", "q", "bases:\r\n  q: {0}\r\nroots: []\n"),
        ("mine: !secret x\nwhen: 2024-13-45\n", "q", "mine: !secret x\nwhen: 2024-13-45\nbases:\n  q: {0}\n"),
    ],
)
def test_an_entry_is_added_whatever_else_the_file_says(tmp_path: Path, text: str, name: str, after: str) -> None:
    """Keys are text, and so are values: nothing of it is read as a number, a date or a tag."""
    path = tmp_path / "config.yaml"
    path.write_bytes(text.format().encode())
    environ = {"LORATOOL_CONFIG": str(path)}
    write_base(read_config(environ, tmp_path), name, tmp_path / "base.safetensors")
    assert path.read_bytes().decode() == after.format(tmp_path / "base.safetensors")
    assert read_config(environ, tmp_path).bases[name] == tmp_path / "base.safetensors"


def test_a_disk_that_is_full_names_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(tmp_path, "bases: {a: /a}\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LoratoolError, match="cannot be written: No space left on device") as caught:
        write_base(read_config({}, tmp_path), "b", Path("/b"))
    assert caught.value.file == str(path) and path.read_text() == "bases: {a: /a}\n"


def test_what_others_refer_to_is_not_edited(tmp_path: Path) -> None:
    text = "bases:\n  sd15: &x /old\n  other: *x\n"
    path = config(tmp_path, text)
    with pytest.raises(UsageError, match="write it there by hand: sd15: /new"):
        write_base(read_config({}, tmp_path), "sd15", Path("/new"))
    assert path.read_text(encoding="utf-8") == text
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_writing_creates_the_folder_and_follows_links(tmp_path: Path) -> None:
    write_base(read_config({}, tmp_path), "a", Path("/a"))
    path = tmp_path / ".config/loratool/config.yaml"
    assert path.read_text(encoding="utf-8") == "bases:\n  a: /a\n"
    real = tmp_path / "dotfiles.yaml"
    path.rename(real)
    path.symlink_to(real)
    write_base(read_config({}, tmp_path), "b", Path("/b"))
    assert path.is_symlink() and yaml.safe_load(real.read_text(encoding="utf-8")) == {"bases": {"a": "/a", "b": "/b"}}


# -- folders ---------------------------------------------------------------------------------------------------------


def test_roots_in_order_and_once(tmp_path: Path) -> None:
    config(tmp_path, f"roots: [/conf, {tmp_path}/ComfyUI]\n")
    around = look_around({"COMFYUI_PATH": "/env", "WEBUI_PATH": "/web/models"}, tmp_path)
    found = [(str(root.path), root.source) for root in roots(around)]
    assert found[:4] == [
        ("/conf", "config file"),
        (f"{tmp_path}/ComfyUI", "config file"),
        ("/env", "COMFYUI_PATH"),
        ("/web", "WEBUI_PATH"),
    ]
    assert (f"{tmp_path}/stable-diffusion-webui", "home folder") in found
    assert (f"{tmp_path}/here", "current folder") in found
    assert (f"{tmp_path}/ComfyUI", "home folder") not in found


def test_places_that_exist(tmp_path: Path) -> None:
    for folder in (
        "ComfyUI/models/checkpoints",
        "ComfyUI/models/loras",
        "stable-diffusion-webui/models/Stable-diffusion",
        "stable-diffusion-webui/models/Lora",
        "StabilityMatrix/Data/Models/StableDiffusion",
        "here/models/unet",
        "mine",
    ):
        (tmp_path / folder).mkdir(parents=True)
    config(tmp_path, "loras: [../../mine, /none]\n")
    around = look_around({"LORATOOL_BASES": f"{tmp_path}/mine{os.pathsep}{os.pathsep}/none"}, tmp_path)
    models = [(place.path.relative_to(tmp_path).as_posix(), place.source) for place in model_places(around)]
    assert models == [
        ("mine", "LORATOOL_BASES"),
        ("ComfyUI/models/checkpoints", "ComfyUI"),
        ("stable-diffusion-webui/models/Stable-diffusion", "WebUI"),
        ("StabilityMatrix/Data/Models/StableDiffusion", "StabilityMatrix"),
        ("here/models/unet", "ComfyUI"),
    ]
    loras = [(place.path.relative_to(tmp_path).as_posix(), place.deep) for place in lora_places(around)]
    assert loras == [
        ("mine", True),
        ("ComfyUI/models/loras", True),
        ("stable-diffusion-webui/models/Lora", True),
        ("here", False),
    ]


def test_folders_that_cannot_be_looked_at(tmp_path: Path) -> None:
    bad = "/" + "a" * 5000
    config(tmp_path, f"roots: [{bad}]\nloras: [{bad}]\n")
    around = look_around({"LORATOOL_BASES": bad, "COMFYUI_PATH": bad}, tmp_path)
    assert model_places(around) == ()
    assert [place.source for place in lora_places(around)] == ["current folder"]


def test_entries_of_the_variable(tmp_path: Path) -> None:
    text = os.pathsep.join(["sd15=/a.safetensors", " my-one = ~/b ", "/folder", "/odd=folder/x", ""])
    assert named_by_variable(look_around({"LORATOOL_BASES": text}, tmp_path)) == (
        ("sd15", Path("/a.safetensors")),
        ("my-one", tmp_path / "b"),
        (None, Path("/folder")),
        (None, Path("/odd=folder/x")),
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "HOME/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HUB_CACHE": "~/hub", "HF_HOME": "/hf"}, "HOME/hub"),
    ],
)
def test_the_hub_cache(tmp_path: Path, environ: Mapping[str, str], expected: str) -> None:
    assert hub_cache(look_around(environ, tmp_path)) == Path(expected.replace("HOME", str(tmp_path)))


def test_the_hub_cache_is_that_of_huggingface_hub() -> None:
    from huggingface_hub import constants

    assert str(hub_cache(look_around())) == constants.HF_HUB_CACHE


def test_files_in_places(tmp_path: Path) -> None:
    folder = tmp_path / "ComfyUI/models/checkpoints"
    touch(folder / "b.safetensors")
    touch(folder / "a/b.SAFETENSORS")
    touch(folder / "a/v1.5.ckpt")
    touch(folder / "a/preview.png")
    touch(folder / ".hidden/c.safetensors")
    touch(folder / "model/model_index.json")
    touch(folder / "model/unet/diffusion_pytorch_model.safetensors")
    (folder / "a/circle").symlink_to(folder)
    (folder / "z.safetensors").symlink_to(folder / "b.safetensors")
    files = list(files_in(model_places(look_around({}, tmp_path))))
    assert [file.name for file in files] == ["a/b", "a/v1.5.ckpt", "b", "model"]
    assert [file.name for file in called("b", files)] == ["a/b", "b"]
    assert [file.name for file in called("a\\b.safetensors", files)] == ["a/b"]
    assert called("model_index", files) == []


def test_a_flat_place_has_no_folders(tmp_path: Path) -> None:
    touch(tmp_path / "here/style.safetensors")
    touch(tmp_path / "here/sub/other.safetensors")
    assert [file.name for file in files_in(lora_places(look_around({}, tmp_path)))] == ["style"]
