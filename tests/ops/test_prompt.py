"""Prompts: the tags of WebUI, and the files that their names lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.core.errors import LoratoolError, UsageError
from loratool.ops.prompt import find_lora, loras_in
from tests.checkpoints import sparse_file


@pytest.mark.parametrize(
    ("tag", "name", "text_encoder", "unet"),
    [
        ("<lora:style:0.8>", "style", 0.8, 0.8),
        ("<lora:style>", "style", 1.0, 1.0),
        ("<lora:my style v1.5:-1>", "my style v1.5", -1.0, -1.0),
        ("<lora:style:0.5:0.8>", "style", 0.5, 0.8),
        ("<lora:style:te=0.5:unet=0.8>", "style", 0.5, 0.8),
        ("<lora:style:te=0.5>", "style", 0.5, 0.5),
        ("<lora:style:unet=0.5>", "style", 1.0, 0.5),
        ("<lora:style:0.3:unet=0>", "style", 0.3, 0.0),
        ("<lora:style: .5 >", "style", 0.5, 0.5),
        ("<lyco:anime/style:1e-1>", "anime/style", 0.1, 0.1),
    ],
)
def test_tags(tag: str, name: str, text_encoder: float, unet: float) -> None:
    (found,) = loras_in(f"1girl, (red scarf:1.2){tag}, outdoors")
    assert (found.name, found.text_encoder, found.unet, found.tag) == (name, text_encoder, unet, tag)
    assert found.strength == (unet if unet == text_encoder else None)


def test_several_tags_in_order_and_others() -> None:
    prompt = "a <lora:a:1>, <hypernet:h:0.5> <lora:b:0.5>\n<lora:a:0.25> <LORA:c:1> <lora:d:1 [x|y]"
    assert [(one.name, one.strength) for one in loras_in(prompt)[:3]] == [("a", 1.0), ("b", 0.5), ("a", 0.25)]
    assert loras_in("no tag, a < b > c, <lora>") == []
    assert loras_in("") == []


@pytest.mark.parametrize(
    ("tag", "what"),
    [
        ("<lora:style:strong>", "'strong' is no number"),
        ("<lora:style:>", "'' is no number"),
        ("<lora:style:nan>", "'nan' is no number"),
        ("<lora:style:te=inf>", "'inf' is no number"),
        ("<lora:style:0,8>", "'0,8' is no number"),
        ("<lora:style:1_0>", "'1_0' is no number"),
        ("<lora:style:1:0.5=0.7>", "0.5= is not supported"),
        ("<lora:style:1:dyn=8>", "dyn= is not supported"),
        ("<lora:style:1:1:8>", "'8' is not supported"),
        ("<lora:style:1:lbw=OUTD>", "lbw= is not supported"),
        ("<lora::0.8>", "names no LoRA"),
        ("<lora:>", "names no LoRA"),
    ],
)
def test_malformed_tags(tag: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        loras_in(f"a {tag} b")
    assert tag in str(caught.value) and what in str(caught.value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def lora(path: Path, output_name: str | None = None) -> str:
    metadata = {} if output_name is None else {"ss_output_name": output_name}
    return str(sparse_file(path, {"lora_unet_x.lora_up.weight": (4, 2)}, metadata=metadata))


@pytest.mark.parametrize(
    "place",
    [
        "stable-diffusion-webui/models/Lora/style.safetensors",
        "stable-diffusion-webui-forge/models/Lora/deep/er/style.safetensors",
        "stable-diffusion-webui/models/LyCORIS/style.safetensors",
        "ComfyUI/models/loras/style.safetensors",
        "StabilityMatrix/Data/Models/Lora/style.safetensors",
        "here/style.safetensors",
        "mine/style.safetensors",
    ],
)
def test_found_by_file_name(home: Path, place: str) -> None:
    config = home / "config.yaml"
    config.write_text("loras:\n- mine\n", encoding="utf-8")
    path = lora(home / place, "another")
    for name in ("style", "style.safetensors"):
        assert find_lora(name, environ={"LORATOOL_CONFIG": str(config)}, home=home) == path


def test_found_by_what_its_header_says(home: Path) -> None:
    folder = home / "ComfyUI/models/loras"
    (folder / "sub").mkdir(parents=True)
    (folder / "broken.safetensors").write_bytes(b"<html>")
    path = lora(folder / "sub/renamed.safetensors", "style")
    assert find_lora("style", environ={}, home=home) == path
    named = lora(folder / "style.safetensors", "yet another")
    assert find_lora("style", environ={}, home=home) == named, "the name of a file goes first"


def test_ambiguous(home: Path) -> None:
    paths = [lora(home / f"ComfyUI/models/loras/{sub}/style.safetensors") for sub in ("a", "b")]
    with pytest.raises(LoratoolError) as caught:
        find_lora("style", environ={}, home=home)
    assert caught.value.exit_code == 1
    assert all(path in str(caught.value) for path in paths) and "(a/style)" in str(caught.value)
    assert find_lora("b/style", environ={}, home=home) == paths[1]
    (home / "stable-diffusion-webui/models").mkdir(parents=True)
    (home / "stable-diffusion-webui/models/Lora").symlink_to(home / "ComfyUI/models/loras/a")
    assert find_lora("a/style", environ={}, home=home) == paths[0], "two ways to one file are one file"


def test_ambiguous_output_names(home: Path) -> None:
    for name in ("one", "two"):
        lora(home / f"ComfyUI/models/loras/{name}.safetensors", "style")
    with pytest.raises(LoratoolError, match="any of 2 files"):
        find_lora("style", environ={}, home=home)


def test_not_found(home: Path) -> None:
    lora(home / "ComfyUI/models/loras/my_style.safetensors")
    with pytest.raises(LoratoolError) as caught:
        find_lora("my_stile", environ={}, home=home)
    told = str(caught.value)
    assert "did you mean my_style?" in told and "1 files" not in told
    assert str(home / "ComfyUI/models/loras") in told and "loras:" in told


def test_pickles(home: Path) -> None:
    (home / "here/style.pt").write_bytes(b"x")
    assert find_lora("style", environ={}, home=home) == str(home / "here/style.pt")
    path = lora(home / "here/style.safetensors")
    assert find_lora("style", environ={}, home=home) == path


def test_a_peft_folder(home: Path) -> None:
    folder = home / "ComfyUI/models/loras/style"
    lora(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert find_lora("style", environ={}, home=home) == str(folder)


def test_names_stay_in_their_places(home: Path) -> None:
    lora(home / "secret.safetensors")
    for name in ("../secret", str(home / "secret"), "\0", "[a-z]*"):
        with pytest.raises(LoratoolError, match="no LoRA is called"):
            find_lora(name, environ={}, home=home)
