"""The parts of a model beside those that adapters are for: the VAE's names and shapes are those of the real class."""

from __future__ import annotations

import pytest

from loratool.core.registry import architectures

MODELS = {"sd15": (4, True), "sdxl": (4, True), "flux": (16, False)}
"""Channels of the latents, and whether there are convolutions around them."""


@pytest.mark.parametrize("model", MODELS)
def test_every_naming_names_the_same_targets(model: str) -> None:
    table = architectures()[model]
    assert list(table.beside) == ["vae"]
    namings = table.namings("vae")
    canonical = namings["diffusers"]
    for naming in namings.values():
        assert naming.targets == canonical.targets
        assert len(naming) == len(canonical)
    for kind in table.checkpoints:
        assert all(voice.naming in table.namings(component) for component, voice in kind.beside.items())
        assert not kind.beside.keys() & kind.voices.keys()


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_those_of_the_real_class(model: str) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    latent, quant = MODELS[model]
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=latent,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
        )
    naming = architectures()[model].naming("vae", "diffusers")
    expected = {key: tuple(one.shape) for key, one in vae.state_dict().items() if key.endswith(".weight")}
    assert {f"{name}.weight": target.shape for name, (target,) in naming.items()} == expected


def test_only_ldm_keeps_attention_as_convolutions() -> None:
    for naming_id, naming in architectures()["sd15"].namings("vae").items():
        kept = {target.path for (target,) in naming.values() if naming.home(target).pointwise}
        linears = {target.path for (target,) in naming.values() if len(target.shape) == 2}
        assert len(linears) == 8
        assert kept == (linears if naming_id == "ldm" else set())
