"""musubi: what musubi-tuner writes. The model's own names, flattened, behind `lora_unet_`, whatever the model is.

For models that sd-scripts trains as well the two agree. Text encoders are not trained. alpha is always there.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.core.architecture import Architecture
from loratool.core.layout import Voices
from loratool.layouts._derived import distinct, main_component, renamed, written
from loratool.layouts._flattened import Flattened
from loratool.layouts._lycoris import IA3
from loratool.layouts._suffixes import ALIASES, LYCORIS

_PREFIX = "lora_unet_"
_NETWORKS = frozenset(
    f"networks.lora_{model}"
    for model in (
        *("wan", "framepack", "hv_1_5", "kandinsky", "qwen_image", "zimage"),
        *("flux_2", "krea2", "ideogram4", "hidream_o1"),
    )
)
"""`ss_network_module` of the models that sd-scripts has no network for."""


def _voices(architecture: Architecture) -> Voices:
    main = main_component(architecture)
    if main is None or main == "unet":
        return {}
    kohya, native = written(architecture, "kohya").get(main), written(architecture, "comfyui").get(main)
    split = written(architecture, "diffusers").get(main)
    voices = distinct(kohya, renamed(native, _PREFIX), renamed(split, _PREFIX))
    return {main: voices} if voices else {}


class Musubi(Flattened):
    """The flattened spelling of musubi-tuner."""

    def signed(self, metadata: Mapping[str, str]) -> bool:
        """Its networks are called after the models."""
        module = metadata.get("ss_network_module", "")
        return module.startswith("musubi_tuner.") or module in _NETWORKS


LAYOUT = Musubi(
    id="musubi",
    title="musubi-tuner",
    separator="_",
    spelling={**LYCORIS, **IA3},
    aliases=ALIASES,
    derive=_voices,
)
