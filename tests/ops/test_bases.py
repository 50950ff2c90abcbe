"""Base models by name: where each name leads, in which order, and what is refused."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loratool.core.errors import LoratoolError, UsageError
from loratool.ops.bases import Base, NoneFound, add_base, download_base, known_bases, resolve_base
from loratool.ops.known_models import PUBLISHED, look_at, models
from tests.checkpoints import checkpoint_shapes, sparse_checkpoint, sparse_file

COMFY = "ComfyUI/models/checkpoints"
WEBUI = "stable-diffusion-webui/models/Stable-diffusion"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def sd15(path: Path) -> Path:
    return sparse_checkpoint(path, "sd15", "ldm")


def sdxl(path: Path) -> Path:
    return sparse_checkpoint(path, "sdxl", "sgm")


def config(home: Path, text: str) -> None:
    path = home / ".config/loratool/config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def resolved(text: str, home: Path, **environ: str) -> tuple[str, str | None, str]:
    base = resolve_base(text, environ=environ, home=home)
    assert base.name == text
    return base.path, base.architecture, base.source


def refused(text: str, home: Path, **environ: str) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        resolve_base(text, environ=environ, home=home)
    assert "\n" not in str(caught.value)
    return caught.value


# -- what a file is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "checkpoint"),
    [(name, checkpoint.id) for name, model in models().items() for checkpoint in model.checkpoints],
)
def test_every_kind_of_checkpoint_is_known(tmp_path: Path, architecture: str, checkpoint: str) -> None:
    path = sparse_checkpoint(tmp_path / "model", architecture, checkpoint)
    look = look_at(path)
    assert (look.architecture, look.what, look.checkpoint) == (architecture, models()[architecture].title, True)
    assert look.size_bytes == sum(
        file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*.safet*"))
    )
    assert path.is_dir() == (checkpoint.startswith("diffusers") and len(models()[architecture].components) > 1)


def test_relatives_and_parts_are_not_the_model(tmp_path: Path) -> None:
    shapes = checkpoint_shapes("sd15", "ldm")
    unet = shapes["unet"]
    wider = {key: (shape[0], 896) if shape[1:] == (768,) else shape for key, shape in unet.items()}
    assert "32 of 391 weights have other shapes" in look_at(sparse_file(tmp_path / "wide.safetensors", wider)).what
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = {**unet, first: (320, 9, 3, 3)}
    assert look_at(sparse_file(tmp_path / "inpainting.safetensors", inpainting)).architecture == "sd15"
    clip = look_at(sparse_file(tmp_path / "clip.safetensors", shapes["text_encoder"]))
    assert clip.architecture is None and "a part of" in clip.what


# -- the order -------------------------------------------------------------------------------------------------------


def test_a_path_is_a_path(home: Path) -> None:
    file = sd15(home / "here/sd15")
    assert resolved("sd15", home) == ("sd15", None, "path")
    assert resolved(str(file), home) == (str(file), None, "path")


def test_a_folder_called_like_a_model(home: Path) -> None:
    expected = sd15(home / COMFY / "v1-5-pruned.safetensors")
    (home / "here/sd15").mkdir()
    assert resolved("sd15", home) == (str(expected), "sd15", "ComfyUI")
    assert resolved("./sd15", home) == ("./sd15", None, "path")
    sparse_checkpoint(home / "here/sd15", "sd15", "diffusers")
    assert resolved("sd15", home) == ("sd15", None, "path")


def test_each_source_goes_before_the_next(home: Path) -> None:
    hub = hub_file(home, "sd15")
    assert resolved("sd15", home) == (str(hub), "sd15", "Hugging Face cache")
    comfy = sd15(home / COMFY / "any.safetensors")
    assert resolved("sd15", home) == (str(comfy), "sd15", "ComfyUI")
    named = sd15(home / "named.safetensors")
    entry = f"sd15={named}"
    assert resolved("sd15", home, LORATOOL_BASES=entry) == (str(named), "sd15", "LORATOOL_BASES")
    mine = sd15(home / "mine.safetensors")
    config(home, f"bases:\n  sd15: {mine}\n")
    assert resolved("sd15", home, LORATOOL_BASES=entry) == (str(mine), "sd15", "config file")


def test_an_own_name(home: Path) -> None:
    anime = sd15(home / "a.safetensors")
    other = sparse_file(home / "new.safetensors", {f"blocks.{i}.attn.weight": (8, 8) for i in range(9)})
    config(home, f"bases:\n  anime: {anime}\n  new-model: {other}\n")
    assert resolved("anime", home) == (str(anime), "sd15", "config file")
    assert resolved("new-model", home) == (str(other), None, "config file")


def test_a_folder_of_the_variable(home: Path) -> None:
    file = sd15(home / "models/deep/x.safetensors")
    assert resolved("sd15", home, LORATOOL_BASES=str(home / "models")) == (str(file), "sd15", "LORATOOL_BASES")
    assert resolved("x", home, LORATOOL_BASES=str(home / "models")) == (str(file), "sd15", "LORATOOL_BASES")


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        (COMFY, "ComfyUI"),
        ("ComfyUI/models/unet", "ComfyUI"),
        (f"{WEBUI}/sub", "WebUI"),
        ("stable-diffusion-webui-forge/models/Stable-diffusion", "WebUI"),
        ("StabilityMatrix/Data/Models/StableDiffusion", "StabilityMatrix"),
        ("here/models/diffusion_models", "ComfyUI"),
        ("elsewhere/models/checkpoints", "ComfyUI"),
        ("configured/models/checkpoints", "ComfyUI"),
    ],
)
def test_known_places(home: Path, folder: str, source: str) -> None:
    config(home, "roots: [../../configured]\n")
    file = sparse_checkpoint(home / folder / "x.safetensors", "flux", "bfl", "BF16")
    assert resolved("flux", home, COMFYUI_PATH=str(home / "elsewhere")) == (str(file), "flux", source)
    assert refused("sdxl", home, COMFYUI_PATH=str(home / "elsewhere")).exit_code == 1


def test_a_diffusers_folder_in_a_place(home: Path) -> None:
    folder = sparse_checkpoint(home / COMFY / "model", "sdxl", "diffusers")
    assert resolved("sdxl", home) == (str(folder), "sdxl", "ComfyUI")


# -- several ---------------------------------------------------------------------------------------------------------


def test_the_usual_file_name_wins_if_its_header_agrees(home: Path) -> None:
    sd15(home / COMFY / "a.safetensors")
    usual = sd15(home / WEBUI / "v1-5-pruned-emaonly.safetensors")
    sdxl(home / COMFY / "v1-5-pruned-emaonly.safetensors")
    assert resolved("sd15", home) == (str(usual), "sd15", "WebUI")


def test_several_are_an_error_that_lists_them(home: Path) -> None:
    files = [sdxl(home / COMFY / f"{name}.safetensors") for name in ("a", "b")]
    error = refused("sdxl", home)
    assert error.exit_code == 1
    assert all(str(file) in str(error) for file in files)
    assert "`loratool bases add sdxl PATH`" in str(error)
    hub = hub_file(home, "sdxl")
    assert resolved("sdxl", home) == (str(hub), "sdxl", "Hugging Face cache"), "the published one is unmistakable"


def test_two_ways_to_one_file_are_one_file(home: Path) -> None:
    file = sdxl(home / COMFY / "a.safetensors")
    (home / WEBUI).mkdir(parents=True)
    (home / WEBUI / "b.safetensors").symlink_to(file)
    assert resolved("sdxl", home)[0] == str(file)


def test_by_file_name(home: Path) -> None:
    files = [sd15(home / COMFY / sub / "dream_8.safetensors") for sub in ("x", "y")]
    assert resolved("x/dream_8", home) == (str(files[0]), "sd15", "ComfyUI")
    assert resolved("y/dream_8.safetensors", home) == (str(files[1]), "sd15", "ComfyUI")
    assert "any of 2 files" in str(refused("dream_8", home))
    (home / COMFY / "broken.safetensors").write_bytes(b"<html>")
    assert "web page" in str(refused("broken", home))
    sparse_file(home / COMFY / "vae.safetensors", {"decoder.conv_in.weight": (4, 4)})
    assert "is a VAE, not a checkpoint" in str(refused("vae", home))
    (home / COMFY / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    assert "is a pickle; checkpoints are only read from safetensors" in str(refused("old", home))
    (home / COMFY / "x").mkdir(exist_ok=True)
    (home / COMFY / "x" / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    assert "is a pickle; checkpoints are only read from safetensors" in str(refused("old", home))
    file = sd15(home / COMFY / "old.safetensors")  # as it was rewritten
    assert resolved("old", home) == (str(file), "sd15", "ComfyUI")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["config file", "LORATOOL_BASES"])
def test_a_name_on_purpose_never_leads_elsewhere(home: Path, source: str) -> None:
    sd15(home / COMFY / "good.safetensors")
    file = home / "x.safetensors"
    environ = {}
    if source == "config file":
        config(home, f"bases:\n  sd15: {file}\n")
    else:
        environ["LORATOOL_BASES"] = f"sd15={file}"
    missing = refused("sd15", home, **environ)
    assert str(file) in str(missing) and source in str(missing) and missing.exit_code == 1
    sdxl(file)
    wrong = refused("sd15", home, **environ)
    assert f"{file}: is Stable Diffusion XL, but it is called sd15 by the {source}" in str(wrong)
    assert ("loratool bases add sd15" if source == "config file" else "correct LORATOOL_BASES") in str(wrong)
    sparse_file(file, {"lora_unet_x.lora_up.weight": (4, 2)})
    assert refused("sd15", home, **environ)


def test_none_found(home: Path) -> None:
    (home / COMFY).mkdir(parents=True)
    (home / COMFY / "v1-5-pruned.ckpt").write_bytes(b"x")
    sdxl(home / COMFY / "other.safetensors")
    error = refused("sd15", home)
    told = str(error)
    assert error.exit_code == 1 and isinstance(error, NoneFound)
    assert "no Stable Diffusion 1.x checkpoint" in told and "2 files in 1 folder" in told and "1 of them" in told
    assert "`loratool bases add sd15 /path/to/file.safetensors`" in told
    assert "--download fetches v1-5-pruned-emaonly.safetensors (4.3 GB)" in told


@pytest.mark.parametrize(
    ("text", "near"), [("sd1.5", "sd15"), ("SDXL", "sdxl"), ("dreem", "dream"), ("animee", "anime")]
)
def test_an_unknown_name(home: Path, text: str, near: str) -> None:
    sd15(home / COMFY / "dream.safetensors")
    config(home, f"bases: {{anime: {home}/a.safetensors, sd15: {home}/b.safetensors}}\n")
    error = refused(text, home)
    assert (
        error.exit_code == 2
        and f"did you mean {near}?" in str(error)
        and f"known: {', '.join(models())}, anime;" in str(error)
    )


@pytest.mark.parametrize("text", ["models/x.safetensors", "x.safetensors", "./x", "x.ckpt"])
def test_a_path_that_does_not_exist(home: Path, text: str) -> None:
    error = refused(text, home)
    assert error.exit_code == 1 and str(error).startswith(f"{text}: there is no such file")


@pytest.mark.parametrize("text", ["", "\0", "a" * 5000, "\x1b[31m"])
def test_hostile_names(home: Path, text: str) -> None:
    assert "\x1b" not in str(refused(text, home))


# -- the Hugging Face cache ------------------------------------------------------------------------------------------


def repository(home: Path, name: str) -> Path:
    return home / ".cache/huggingface/hub" / f"models--{name.replace('/', '--')}"


def hub_file(home: Path, architecture: str, revision: str = "abc") -> Path:
    """The published file, as huggingface_hub lays it out: a link into `blobs`."""
    name, file = PUBLISHED[architecture].download
    folder = repository(home, name)
    blob = sparse_checkpoint(folder / "blobs/0123", architecture, models()[architecture].checkpoints[0].id)
    link = folder / "snapshots" / revision / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return link


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
def test_published_files_in_the_cache(home: Path, architecture: str) -> None:
    file = hub_file(home, architecture)
    assert resolved(architecture, home) == (str(file), architecture, "Hugging Face cache")


def test_the_main_revision_goes_first(home: Path) -> None:
    main = hub_file(home, "sdxl", "aaa")
    newer = hub_file(home, "sdxl", "bbb")
    refs = repository(home, "stabilityai/stable-diffusion-xl-base-1.0") / "refs"
    refs.mkdir()
    for revision, expected in (("aaa", main), ("bbb\n", newer)):
        (refs / "main").write_text(revision, encoding="utf-8")
        assert resolved("sdxl", home)[0] == str(expected)


def test_a_diffusers_folder_in_the_cache(home: Path) -> None:
    folder = repository(home, "black-forest-labs/FLUX.1-schnell") / "snapshots/abc"
    sparse_checkpoint(folder, "flux", "diffusers", "BF16")
    assert resolved("flux", home) == (str(folder), "flux", "Hugging Face cache")
    moved = home / "moved"
    (home / ".cache/huggingface/hub").rename(moved)
    assert refused("flux", home)
    assert resolved("flux", home, HF_HUB_CACHE=str(moved))[1] == "flux"


def test_an_incomplete_download_is_skipped(home: Path) -> None:
    folder = repository(home, "stable-diffusion-v1-5/stable-diffusion-v1-5") / "snapshots/abc"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert refused("sd15", home).exit_code == 1
    assert [skipped.path for skipped in known_bases(environ={}, home=home).skipped] == [str(folder)]


# -- downloads -------------------------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    module: Any = ModuleType("huggingface_hub")
    module.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
def test_download(home: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    def download(repo_id: str, filename: str, cache_dir: str) -> str:
        assert (repo_id, filename) == PUBLISHED[architecture].download
        assert cache_dir == str(home / ".cache/huggingface/hub")
        return str(hub_file(home, architecture))

    fake_hub(monkeypatch, download)
    base = download_base(architecture, environ={}, home=home)
    assert base == Base(architecture, base.path, architecture, "download")
    assert resolved(architecture, home)[0] == base.path, "what was fetched is found from now on"


def test_a_download_of_another_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, lambda **_: str(sdxl(home / "x.safetensors")))
    with pytest.raises(LoratoolError, match="is Stable Diffusion XL"):
        download_base("sd15", environ={}, home=home)


def hub_error(name: str, *bases: type[Exception]) -> Exception:
    return type(name, bases or (Exception,), {})("401 Client Error.\n(Request ID: 1)")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (hub_error("GatedRepoError"), "licence has to be accepted"),
        (hub_error("RepositoryNotFoundError"), "no such repository"),
        (hub_error("LocalEntryNotFoundError", FileNotFoundError), "cannot be reached"),
        (hub_error("OfflineModeIsEnabled", ConnectionError), "cannot be reached"),
        (hub_error("EntryNotFoundError"), "no such file"),
        (hub_error("ConnectError"), "401 Client Error. (Request ID: 1); try again"),
        (OSError(28, "No space left on device"), "No space left"),
        (ValueError(), "ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_download_that_fails(home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, what: str) -> None:
    def download(**_: str) -> str:
        raise error

    fake_hub(monkeypatch, download)
    with pytest.raises(LoratoolError) as caught:
        download_base("flux", environ={}, home=home)
    told = str(caught.value)
    assert "flux1-dev.safetensors of black-forest-labs/FLUX.1-dev cannot be downloaded" in told and what in told
    assert caught.value.exit_code == 1 and "\n" not in told


def test_the_real_library_without_a_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoratoolError, match="cannot be reached"):
        download_base("sd15", environ={}, home=home)


def test_without_the_library(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    real = builtins.__import__

    def imported(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(LoratoolError, match=r"pip install 'loratool\[download\]'"):
        download_base("sd15", environ={}, home=home)


def test_no_download_is_known(home: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean sd15\?"):
        download_base("sd14", environ={}, home=home)


# -- adding and listing ----------------------------------------------------------------------------------------------


def test_add(home: Path) -> None:
    file = sd15(home / "here/a.safetensors")
    added = add_base("sd15", "a.safetensors", environ={}, home=home)
    assert (added.name, added.path, added.architecture, added.replaced) == ("sd15", str(file), "sd15", None)
    assert resolved("sd15", home) == (str(file), "sd15", "config file")
    assert add_base("sd15", "a.safetensors", environ={}, home=home).replaced is None
    folder = sparse_checkpoint(home / "b", "sd15", "diffusers")
    assert add_base("sd15", "~/b", environ={}, home=home).replaced == str(file)
    assert add_base("my-one", str(folder), environ={}, home=home).architecture == "sd15"
    assert resolved("my-one", home)[0] == str(folder)


def test_what_cannot_be_added(home: Path) -> None:
    file = sdxl(home / "x.safetensors")
    lora = sparse_file(home / "lora.safetensors", {"lora_unet_x.lora_up.weight": (4, 2)})
    for name, path, what in (
        ("sd15", file, "is Stable Diffusion XL, not Stable Diffusion 1.x; call it sdxl"),
        ("mine", lora, "lora.safetensors: is an adapter, or unknown, not a checkpoint; name"),
        ("mine", home / "none.safetensors", "does not exist"),
        ("mine", home / "here", "holds no safetensors"),
        ("a/b", file, "cannot be a name"),
        ("", file, "cannot be a name"),
        ("mine", "a" * 5000, "cannot be read"),
        ("mine", "a" * 5000 + ".ckpt", "cannot be read"),
        ("mine", "\0", "does not exist"),
        ("-x", file, "cannot be a name"),
    ):
        with pytest.raises(LoratoolError) as caught:
            add_base(name, str(path), environ={}, home=home)
        assert what in str(caught.value)
    assert not (home / ".config").exists()
    config(home, "bases: [\n")
    with pytest.raises(UsageError, match="is no YAML"):
        add_base("mine", str(file), environ={}, home=home)


def test_listing(home: Path) -> None:
    usual = sd15(home / COMFY / "v1-5-pruned.safetensors")
    dream = sd15(home / COMFY / "sub/dream.safetensors")
    (home / COMFY / "old.ckpt").write_bytes(b"x")
    hub_file(home, "flux")
    config(home, f"bases:\n  anime: {dream}\n  gone: /none.safetensors\nroot: []\n")
    listing = known_bases(environ={"LORATOOL_BASES": "/nowhere"}, home=home)
    names = {one.name: one for one in listing.names}
    assert list(names) == ["anime", "gone", *models()]
    assert (names["anime"].path, names["anime"].architecture, names["anime"].problem) == (str(dream), "sd15", None)
    assert names["gone"].problem is not None and "does not exist" in names["gone"].problem
    assert (names["sd15"].path, names["sd15"].size) == (str(usual), usual.stat().st_size)
    assert (names["flux"].source, names["sdxl"].problem) == ("Hugging Face cache", "none found")
    assert [(one.name, one.architecture, one.source) for one in listing.files] == [
        ("sub/dream", "sd15", "ComfyUI"),
        ("v1-5-pruned", "sd15", "ComfyUI"),
    ]
    places = {one.path: one for one in listing.places}
    assert (places[str(home / COMFY)].exists, places[str(home / COMFY)].checkpoints) == (True, 2)
    assert places[str(home / ".cache/huggingface/hub")].checkpoints == 1
    assert not places["/nowhere"].exists and not places[str(home / "stable-diffusion-webui")].exists
    assert [(Path(one.path).name, "pickle" in one.reason) for one in listing.skipped] == [("old.ckpt", True)]
    assert listing.config_exists and "`root` means nothing" in listing.notes[0]


def test_listing_several(home: Path) -> None:
    for name in ("a", "b"):
        sdxl(home / COMFY / f"{name}.safetensors")
    listed = next(one for one in known_bases(environ={}, home=home).names if one.name == "sdxl")
    assert listed.problem is not None and "2 files" in listed.problem
