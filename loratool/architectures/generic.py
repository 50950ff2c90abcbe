"""generic: a model without a table. Any dotted name is a target, so dotted layouts convert among themselves."""

from __future__ import annotations

from loratool.core.architecture import Architecture, Namings, Voice
from loratool.core.naming import Naming


def _nothing() -> Namings:
    return {"dotted": Naming({})}


_COMPONENTS = ("model", "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def _voice(prefix: str) -> Voice:
    return Voice(prefix, "dotted")


ARCHITECTURE = Architecture(
    id="generic",
    title="a model without a table",
    components=dict.fromkeys(_COMPONENTS, _nothing),
    writes={
        # Without a table nothing says which component a bare name belongs to: it is "the model".
        "peft": {component: _voice("base_model.model.") for component in _COMPONENTS},
        "diffusers": {
            **{component: _voice(f"{component}.") for component in _COMPONENTS[1:]},
            "model": _voice("transformer."),
        },
        "comfyui": {
            "transformer": _voice("diffusion_model."),
            "unet": _voice("diffusion_model."),
            "model": _voice("diffusion_model."),
            "text_encoder": _voice("text_encoders."),
            "text_encoder_2": _voice("text_encoders.text_encoder_2."),
            "text_encoder_3": _voice("text_encoders.text_encoder_3."),
        },
    },
    reads={"diffusers": {"model": (_voice(""),)}, "comfyui": {"transformer": (_voice("model.diffusion_model."),)}},
    open=True,
)
