"""a1111: AUTOMATIC1111's WebUI (`extensions-builtin/Lora`)."""

from __future__ import annotations

from loratool.core.program import CHANGES, DROPS, IGNORES, REFUSES, KeyRule, Program, Rule, When
from loratool.programs._models import GLUED, NESTED, VECTOR

_FAMILIES = ("lora", "loha", "lokr", "ia3", "diff", "glora", "oft", "boft")
_WHOLE_ATTENTION = tuple(
    Rule(
        When(
            architectures=architectures,
            components=(component,),
            paths=r"self_attn\.(q|k|v|out)_proj$",
            lacking=rf"^{{parent}}\.{part}_proj$",
        ),
        IGNORES,
        "changes an OpenCLIP attention only where q, k, v and out are all in the file",
    )
    for architectures, component in ((("sdxl",), "text_encoder_2"), (("sd21",), "text_encoder"))
    for part in ("q", "k", "v", "out")
)

PROGRAM = Program(
    id="a1111",
    title="WebUI",
    version="1.10.1",
    sources=(
        "https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/extensions-builtin/Lora/networks.py",
        "https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/extensions-builtin/Lora/network.py",
        "https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/extensions-builtin/Lora/network_lora.py",
    ),
    reads=(
        When(
            layouts=("kohya",),
            architectures=("sd15", "sd21"),
            families=_FAMILIES,
            namings=("diffusers", "hf"),
            keys=r"^lora_(unet|te1?)_",
        ),
        When(
            layouts=("kohya",),
            architectures=("sdxl", "sdxl-refiner"),
            families=_FAMILIES,
            namings=("ldm", "diffusers", "hf"),
            keys=r"^lora_(unet|te1|te2)_",
        ),
        When(layouts=("diffusers",), architectures=("sd3",), components=("transformer",), families=("lora",)),
    ),
    rules=(
        *_WHOLE_ATTENTION,
        Rule(When(layouts=("kohya",), keys=GLUED), IGNORES, "finds no module for `_lora.down` and `_lora.up`"),
        Rule(When(layouts=("kohya",), keys=NESTED), REFUSES, "raises an error at `.lora.down` and `.lora.up`"),
        Rule(
            When(families=("diff",), without=("diff", "w_norm")),
            REFUSES,
            "raises an error at a bias (diff_b) without a weight",
        ),
        Rule(
            When(families=("diff",), roles=("w_norm",), without=("bias",)),
            REFUSES,
            "raises an error at a norm without a bias (b_norm)",
        ),
        Rule(When(keys=VECTOR), DROPS, "reads DoRA magnitudes as dora_scale only", "magnitude"),
        Rule(
            When(has=("magnitude per output",), keys=r"\.dora_scale$"),
            CHANGES,
            "divides a DoRA magnitude by the norms of the weight's columns, also one that is per output",
        ),
    ),
    keys=(
        KeyRule(r"^bundle_emb\.", "", layouts=("kohya",)),
        KeyRule(r"", IGNORES, "passes over keys that match no module"),
    ),
    writes={"*": ("kohya",), "sd3": ("diffusers",)},
)
