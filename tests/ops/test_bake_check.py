"""Rows that are computed anew: many together give what each gives by itself, and each wrong value is found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loratool.files.safetensors import read_header
from loratool.files.stream import Output, plan_like
from loratool.ops import bake_check
from loratool.ops.bake_check import Checked, NotWritten, RowCheck, _exact, _products, _Sample
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options, prepared
from loratool.ops.bake_work import How
from loratool.ops.baking import Destination
from loratool.ops.inputs import Asked
from loratool.ops.sites import Part, Site
from tests.bakes import CONV, KEYS, OUT, TEXT, K, Q, V, kohya, noise, save

SHAPES = {Q: (320, 320), K: (320, 320), V: (320, 320), OUT: (320, 320), CONV: (320, 320, 3, 3), TEXT: (768, 768)}
ENCODER = "conditioner.embedders.1.model."
FUSED = f"{ENCODER}transformer.resblocks.3.attn.in_proj_weight"
TURNED = f"{ENCODER}text_projection"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", {KEYS[stem]: noise(*shape).half() for stem, shape in SHAPES.items()})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "lora.safetensors", kohya(SHAPES))


def sites_of(base: Path, *asked: Asked) -> list[Site]:
    return list(prepared(base, asked, Options(), None).found.sites)


def sdxl(tmp_path: Path) -> tuple[Path, Path]:
    """OpenCLIP's q, k and v are one weight; its projection is stored turned."""
    tensors = {FUSED: noise(3840, 1280).half(), TURNED: noise(1280, 1280).half()}
    base = save(tmp_path / "sdxl.safetensors", tensors)
    shapes = {f"lora_te2_text_model_encoder_layers_3_self_attn_{x}_proj": (1280, 1280) for x in "qv"}
    header = {"ss_base_model_version": "sdxl_base_v1-0"}
    path = save(tmp_path / "te2.safetensors", kohya({**shapes, "lora_te2_text_projection": (1280, 1280)}), header)
    return base, path


def both(sites: list[Site], rows: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of each width, all together as products, and one by one by what bakes them."""
    widths = {site.tensor.numel // site.tensor.shape[0] for site in sites}
    for width in widths:
        some = [site for site in sites if site.tensor.numel // site.tensor.shape[0] == width]
        stored = [site.tensor.rows(rows.start, rows.stop).load().double().reshape(len(rows), -1) for site in some]
        samples = [_Sample(site, rows, _products(site, rows)) for site in some]
        assert all(sample.products is not None for sample in samples)
        alone = [_exact([_Sample(site, rows, None)], one, How()) for site, one in zip(some, stored, strict=True)]
        yield _exact(samples, torch.cat(stored), How()), torch.cat(alone)


@pytest.mark.parametrize("rows", [range(2), range(318, 320), range(7, 8)])
def test_products_together_are_those_one_by_one(base: Path, lora: Path, tmp_path: Path, rows: range) -> None:
    """Of two adapters of different ranks, dtypes and strengths on the same tensors."""
    other = save(tmp_path / "other.safetensors", {k: t.half() for k, t in kohya({Q: SHAPES[Q], K: SHAPES[K]}).items()})
    sites = sites_of(base, Asked(str(lora), 0.8), Asked(str(other), -0.3))
    assert [len(site.parts) for site in sites if site.key in (KEYS[Q], KEYS[K])] == [2, 2]
    for together, alone in both(sites, rows):
        torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("row", [0, 1279, 1280, 2558, 2559, 3838])
def test_rows_on_both_sides_of_a_border(tmp_path: Path, row: int) -> None:
    """q ends where k begins, which the adapter leaves as it is."""
    base, path = sdxl(tmp_path)
    (site,) = (site for site in sites_of(base, Asked(str(path), 0.7)) if site.key == FUSED)
    rows = range(row, row + 2)
    products = _products(site, rows)
    assert products is not None
    changed = [row + one.row + at for one in products for at in range(one.left.shape[0])]
    assert changed == [at for at in rows if not 1280 <= at < 2560]
    ((together, alone),) = both([site], rows)
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)
    stored = site.tensor.rows(rows.start, rows.stop).load().double()
    assert [bool((one != other).any()) for one, other in zip(together, stored, strict=True)] == [
        at in changed for at in rows
    ]


def test_what_is_no_product_is_left_to_what_bakes_it(tmp_path: Path, base: Path) -> None:
    """A turned weight, and DoRA, whose norm is that of the weight."""
    encoder, path = sdxl(tmp_path)
    (turned,) = (site for site in sites_of(encoder, Asked(str(path))) if site.key == TURNED)
    assert _products(turned, range(2)) is None
    tensors = kohya({Q: SHAPES[Q]}) | {f"{Q}.dora_scale": noise(320, 1).abs()}
    (site,) = sites_of(base, Asked(str(save(tmp_path / "dora.safetensors", tensors))))
    (part,) = site.parts
    assert isinstance(part, Part) and part.module.magnitude is not None
    assert _products(site, range(2)) is None


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_every_site_is_looked_at(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, kind: str, batch: int
) -> None:
    """Whether it fills a batch or not; a value that is wrong in any of them is found, and only there."""
    monkeypatch.setattr(bake_check, "_BATCH", batch)
    tensors = kohya(SHAPES)
    if kind == "dora":
        tensors |= {f"{stem}.dora_scale": noise(shape[0], 1).abs() for stem, shape in SHAPES.items() if stem != CONV}
    asked = Asked(str(save(tmp_path / "adapter.safetensors", tensors)), 0.8)
    out = tmp_path / "out.safetensors"
    report = bake_file(base, [asked], out)
    assert report.checked is not None and (report.checked.tensors, report.checked.rows) == (6, 12)
    header = read_header(out)
    plan = plan_like(header)

    def look() -> Checked:
        ticks: list[int] = []
        sites = sites_of(base, asked)
        with (
            Output(out, header.header_bytes, plan) as output,
            RowCheck({site.file: Destination(output, plan) for site in sites}, How()) as check,
        ):
            for site in sites:
                check.add(site)
            found = check.result(ticks.append)
        assert sum(ticks) == len(sites)
        return found

    found = look()
    assert (found.bytes, found.tensors, found.rows) == (0, 6, 12)
    assert 0 < found.worst <= 0.6 and math.isfinite(found.worst)
    for stem in SHAPES:
        start, nbytes = header.header_bytes + plan.start(KEYS[stem]), header.tensors[KEYS[stem]].nbytes
        kept = out.read_bytes()[start : start + nbytes]
        with out.open("r+b") as file:
            file.seek(start)
            file.write(bytes(byte ^ (0x80 if at % 2 else 0) for at, byte in enumerate(kept)))
        with pytest.raises(NotWritten) as caught:
            look()
        assert caught.value.key == KEYS[stem]
        with out.open("r+b") as file:
            file.seek(start)
            file.write(kept)
    assert look().tensors == 6


def test_a_tensor_without_values(tmp_path: Path) -> None:
    """Has no rows, and is counted."""
    base = save(tmp_path / "base.safetensors", {KEYS[Q]: noise(320, 320), KEYS[K]: torch.zeros(0, 320)})
    path = save(tmp_path / "lora.safetensors", kohya({Q: (320, 320)}))
    report = bake_file(base, [Asked(str(path))], tmp_path / "out.safetensors", Options(dtype="F16"))
    assert report.checked is not None and report.checked.tensors == 2 and report.checked.rows == 2
