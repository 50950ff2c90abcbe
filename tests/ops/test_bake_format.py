"""`bake --format`: the same weights as without it under other names, checked, and all or nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.files.safetensors import read_header
from loratool.files.stream import Output
from loratool.ops import bake_format
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_report import BakeReport
from loratool.ops.bake_task import ENTRY, Options
from loratool.ops.inputs import Asked
from loratool.ops.unbake_file import subtract_file
from tests.bakes import CONV, DIFFUSERS, KEYS, TEXT, K, Q, kohya, load, noise, save
from tests.checkpoints import checkpoint_shapes, sparse_checkpoint

SHAPES: Mapping[str, tuple[int, ...]] = {Q: (16, 16), K: (16, 16), CONV: (16, 8, 3, 3), TEXT: (8, 8)}
UNTOUCHED: Mapping[tuple[str, str], str] = {
    ("unet", "conv_in.bias"): "model.diffusion_model.input_blocks.0.0.bias",
    ("unet", "time_embedding.linear_1.weight"): "model.diffusion_model.time_embed.0.weight",
    (
        "text_encoder",
        "text_model.final_layer_norm.bias",
    ): "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ("vae", "encoder.mid_block.attentions.0.to_q.weight"): "first_stage_model.encoder.mid.attn_1.q.weight",
}
"""(sub-folder, key) in a diffusers folder -> key in a file."""

F16 = torch.float16


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of diffusers with a UNet of two files, and a safety checker."""
    folder = tmp_path / "model"
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for at, (stem, shape) in enumerate(SHAPES.items()):
        place, key = DIFFUSERS[stem]
        parts.setdefault(place, {})[key] = noise(*shape, seed=at).to(F16)
    for at, (place, key) in enumerate(UNTOUCHED):
        parts.setdefault(place, {})[key] = noise(*((8, 8) if key.endswith("weight") else (8,)), seed=100 + at).to(F16)
    conv = {DIFFUSERS[CONV][1]: parts["unet"].pop(DIFFUSERS[CONV][1])}
    save(folder / "unet" / "a.safetensors", parts["unet"], {"format": "pt"})
    save(folder / "unet" / "b.safetensors", conv, {"format": "pt"})
    save(folder / "text_encoder" / "model.safetensors", parts["text_encoder"], {"format": "pt"})
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", parts["vae"])
    save(folder / "safety_checker" / "model.safetensors", {"weight": noise(3)})
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "lora.safetensors", kohya(SHAPES))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def bake(base: Path, lora: Path | None, out: Path | None, strength: float = 0.7, **options: object) -> BakeReport:
    asked = [Asked(str(lora), strength)] if lora else []
    return bake_file(base, asked, out, Options(**{"format": "ldm", **options}))  # type: ignore[arg-type]


def refused(error: type[LoratoolError], words: str, base: Path, lora: Path | None, out: Path, **options: object) -> str:
    """The hint of an error, after which every file is what it was."""
    before = tree(base.parent)
    with pytest.raises(error, match=words) as caught:
        bake(base, lora, out, **options)
    assert tree(base.parent) == before
    assert not [name for name in os.listdir(base.parent) if name.startswith(".")]
    return caught.value.hint or ""


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_a_folder_becomes_one_file_of_the_same_weights(
    tmp_path: Path, base: Path, lora: Path, out: Path, dtype: str | None
) -> None:
    before = tree(base)
    report = bake(base, lora, out, dtype=dtype)
    bake(base, lora, tmp_path / "folder", format=None, dtype=dtype)
    assert tree(base) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    expected = {
        key: value for file in (tmp_path / "folder").rglob("*.safetensors") for key, value in load(file).items()
    }
    found = load(out)
    names = {KEYS[stem]: DIFFUSERS[stem][1] for stem in SHAPES} | {new: key for (_, key), new in UNTOUCHED.items()}
    assert found.keys() == names.keys()
    for new, old in names.items():
        assert found[new].dtype == expected[old].dtype
        assert torch.equal(found[new].flatten(), expected[old].flatten()), new
    assert found["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert not torch.equal(found[KEYS[Q]].to(F16), load(base / "unet" / "a.safetensors")[DIFFUSERS[Q][1]])
    assert (report.output, report.format, report.size) == (str(out), "ldm", out.stat().st_size)
    rewritten = {"text_encoder/model.safetensors", "unet/a.safetensors", "unet/b.safetensors"}
    assert set(report.files) == rewritten | ({"vae/diffusion_pytorch_model.safetensors"} if dtype else set())
    assert "left out: safety_checker, which is no part of such a file" in report.notes
    assert report.untouched == (0 if dtype else sum(found[key].nbytes for key in UNTOUCHED.values()))
    assert report.linked == report.copied == 0
    assert report.checked is not None
    assert report.checked.bytes == sum(tensor.nbytes for tensor in read_header(out).tensors.values())


def test_the_report_counts_what_stays(base: Path, lora: Path, out: Path) -> None:
    report = bake(base, lora, out)
    tensors = read_header(out).tensors
    assert report.untouched == sum(tensors[key].nbytes for key in UNTOUCHED.values())
    assert sum(one.bytes for one in report.components) == sum(tensors[KEYS[stem]].nbytes for stem in SHAPES)
    assert bake(base, lora, out, overwrite=True, verify=False).checked is None


def test_the_record_of_every_bake_is_in_the_header(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    once = tmp_path / "once"
    bake(base, lora, once, format=None)
    bake(once, lora, out, strength=0.5)
    metadata = read_header(out).metadata
    first, second = json.loads(metadata[ENTRY])
    assert metadata["format"] == "pt"
    assert [one["adapters"][0]["strength"] for one in (first, second)] == [0.7, 0.5]
    assert ("format" in first, second["format"], second["base"]) == (False, "ldm", "once")


def test_from_file_to_file_the_metadata_stay(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    unet = {KEYS[stem].removeprefix("model.diffusion_model."): noise(*SHAPES[stem]) for stem in (Q, K, CONV)}
    file = save(tmp_path / "unet.safetensors", unet, {"modelspec.title": "mine", "modelspec.hash_sha256": "0x1"})
    report = bake(file, lora, out, allow_unmatched=True)
    assert set(load(out)) == {KEYS[stem] for stem in (Q, K, CONV)}
    metadata = read_header(out).metadata
    assert metadata.keys() == {"modelspec.title", ENTRY}
    assert any("modelspec.hash_sha256" in note for note in report.notes)
    back = tmp_path / "back.safetensors"
    bake(out, lora, back, strength=-0.7, format="ldm-unet", allow_unmatched=True)
    assert load(back).keys() == unet.keys()


def test_what_is_spelled_so_already_is_baked_as_ever(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    bake(base, lora, out)
    report = bake(out, lora, tmp_path / "again.safetensors")
    bake(out, lora, tmp_path / "plain.safetensors", format=None)
    assert report.format == "ldm"
    assert "it is spelled as ldm already" in report.notes
    again, plain = load(tmp_path / "again.safetensors"), load(tmp_path / "plain.safetensors")
    assert list(again) == list(plain)
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    folder = bake(base, lora, tmp_path / "folder", format="diffusers")
    assert "it is spelled as diffusers already" in folder.notes
    assert (tmp_path / "folder" / "model_index.json").exists()


def test_unbake_subtracts_from_what_was_spelled_anew(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    bake(base, lora, out, dtype="F32")
    report = subtract_file(out, [Asked(str(lora), 0.7)], tmp_path / "base.safetensors", Options())
    assert not any("does not say" in note for note in report.notes)
    before = load(base / "unet" / "a.safetensors")[DIFFUSERS[Q][1]].float()
    assert float((load(tmp_path / "base.safetensors")[KEYS[Q]] - before).abs().max()) < 1e-6


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_it(base: Path, lora: Path, out: Path) -> None:
    planned = bake(base, lora, None)
    assert not out.exists()
    done = bake(base, lora, out)
    told = len(read_header(out).metadata[ENTRY])
    assert 0 < done.size - planned.size < 2 * told  # quotes in it are escaped
    for name in ("format", "untouched", "files", "notes"):
        assert getattr(planned, name) == getattr(done, name)


def test_a_full_model_is_planned_in_no_time(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "sdxl", "sdxl", "diffusers")
    planned = bake(folder, None, None, format="sgm", dtype="BF16")
    values = sum(math.prod(shape) for part in checkpoint_shapes("sdxl", "sgm").values() for shape in part.values())
    assert planned.output is None and planned.untouched == 0
    assert 2 * values < planned.size < 2 * values + 400_000
    assert planned.seconds < 10


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_name_that_is_none_is_told_all_that_are(base: Path, lora: Path, out: Path) -> None:
    hint = refused(
        UsageError, "no checkpoint of Stable Diffusion 1.x is spelled 'nonsense'", base, lora, out, format="nonsense"
    )
    assert hint == "known: ldm, ldm-unet, diffusers, diffusers-short"


def test_a_folder_cannot_be_made_of_a_file(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    bake(base, lora, out)
    hint = refused(FormatError, "configs, a scheduler and tokenizers", out, lora, tmp_path / "f", format="diffusers")
    assert "diffusers folder of the model as --base" in hint
    refused(FormatError, "a folder keeps its names", base, lora, tmp_path / "f", format="diffusers-short")


def test_a_model_without_a_table(tmp_path: Path, out: Path) -> None:
    base = save(tmp_path / "llm.safetensors", {f"model.layers.{at}.mlp.weight": noise(4, 4) for at in range(4)})
    hint = refused(FormatError, "no model whose other spellings are known", base, None, out, dtype="F16")
    assert "Stable Diffusion XL" in hint


def test_undo_is_for_the_base_as_it_is(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="--undo cannot undo --format"):
        bake_file(base, [Asked(str(lora))], out, Options(format="ldm"), undo=tmp_path / "undo.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["lora.safetensors", "model"]


def test_an_unknown_tensor(base: Path, lora: Path, out: Path) -> None:
    save(base / "unet" / "c.safetensors", {"mystery": noise(2)})
    refused(FormatError, "1 tensor has no name in ldm: unet/mystery", base, lora, out)


def test_a_part_without_a_place(base: Path, lora: Path, out: Path) -> None:
    hint = refused(
        FormatError, "for unet alone: it has no place for text_encoder, vae", base, lora, out, format="ldm-unet"
    )
    assert f"{base}/unet" in hint


def test_an_output_that_exists_or_is_a_folder(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    out.write_bytes(b"theirs")
    refused(LoratoolError, "exists already", base, lora, out)
    (tmp_path / "folder").mkdir()
    refused(LoratoolError, "a file would be written", base, lora, tmp_path / "folder", overwrite=True)
    refused(LoratoolError, "an input", base, lora, lora, overwrite=True)


def test_there_must_be_room_for_both_the_output_and_what_is_baked(
    base: Path, lora: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = bake(base, lora, out).size
    out.unlink()
    baked = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for room in (size, size + baked // 2):
        monkeypatch.setattr(os, "statvfs", lambda _, room=room: SimpleNamespace(f_bavail=room, f_frsize=1))
        refused(LoratoolError, "not enough room", base, lora, out)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=size + baked, f_frsize=1))
    bake(base, lora, out)


def test_a_disk_that_fills_up_names_the_output(
    tmp_path: Path, base: Path, lora: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LoratoolError, match="No space left on device") as caught:
        bake_file(base, [Asked(str(lora))], out, Options(format="ldm"))
    assert caught.value.file == str(out)
    assert sorted(os.listdir(tmp_path)) == ["lora.safetensors", "model"]


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_byte_that_is_not_written_as_it_was_is_noticed(
    tmp_path: Path, base: Path, lora: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bake_format.write_safetensors

    def spoil(path: Path, *arguments: object, **options: object) -> None:
        write(path, *arguments, **options)  # type: ignore[arg-type]
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(bake_format, "write_safetensors", spoil)
    refused(FormatError, "is not the same in what was written", base, lora, out)
    bake(base, lora, out, verify=False)


def test_a_weight_that_is_baked_wrongly_is_noticed(
    base: Path, lora: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Output.write
    monkeypatch.setattr(Output, "write", lambda self, data, at: write(self, memoryview(bytes(data.nbytes)), at))
    refused(LoratoolError, r"row \d+, column \d+ holds .*, expected", base, lora, out)


@pytest.mark.parametrize("stop", ["writing", "verifying", "respelling", "comparing"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, base: Path, lora: Path, out: Path, stop: str) -> None:
    before = tree(tmp_path)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake_file(base, [Asked(str(lora))], out, Options(format="ldm"), progress=progress)
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["lora.safetensors", "model"]


KILLED = """
import sys, time
from loratool.ops import bake_format
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
def hang(*_, **__):
    print("hanging", flush=True)
    time.sleep(60)
bake_format.write_safetensors = hang
bake_file(sys.argv[1], [Asked(sys.argv[2])], sys.argv[3], Options(format="ldm"))
"""


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(base), str(lora), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"hanging\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    left = set(os.listdir(tmp_path)) - {"model", "lora.safetensors"}
    assert len(left) == 2 and all(name.startswith(".out.safetensors.loratool-") for name in left)
    bake(base, lora, out)
    assert sorted(os.listdir(tmp_path)) == ["lora.safetensors", "model", "out.safetensors"]
