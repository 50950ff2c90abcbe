"""onetrainer: loading a LoRA to train on (`modules/util/load_lora_util.py`)."""

from __future__ import annotations

from loratool.core.program import IGNORES, ONE, REFUSES, SCALES, KeyRule, Program, Rule, When
from loratool.programs._models import GLUED

_MODELS = (
    "sd15",
    "sd21",
    "sdxl",
    "sd3",
    "flux",
    "chroma",
    "flux2",
    "z-image",
    "qwen-image",
    "hunyuan-video",
    "hidream",
    "pixart",
    "sana",
    "anima",
    "krea2",
)
_LAYOUTS = (
    "onetrainer",
    "omi",
    "kohya",
    "lycoris",
    "musubi",
    "diffusers",
    "comfyui",
    "ai-toolkit",
    "native",
    "peft",
)

PROGRAM = Program(
    id="onetrainer",
    title="OneTrainer",
    version="23df3832 (2026-08-19)",
    sources=(
        "https://github.com/Nerogar/OneTrainer/blob/23df3832e8f213d64c337e39f9365ba46e99fed0/modules/util/load_lora_util.py",
        "https://github.com/Nerogar/OneTrainer/blob/23df3832e8f213d64c337e39f9365ba46e99fed0/modules/util/convert_util.py",
        "https://github.com/Nerogar/OneTrainer/blob/23df3832e8f213d64c337e39f9365ba46e99fed0/modules/module/LoRAModule.py",
    ),
    reads=(When(layouts=_LAYOUTS, architectures=_MODELS, families=("lora", "loha", "lokr")),),
    rules=(
        Rule(
            When(families=("glora", "ia3", "diff", "set")),
            REFUSES,
            "refuses a file with other kinds than LoRA, LoHa, LoKr and its own OFT",
        ),
        Rule(When(families=("oft", "boft")), REFUSES, "trains another OFT than LyCORIS and sd-scripts"),
        Rule(
            When(keys=rf"{GLUED}|\.lora_linear_layer\."),
            REFUSES,
            "knows lora_down and lora_up, `.lora.down` and `.lora.up`, lora_A and lora_B only",
        ),
        Rule(When(roles=("mid",)), REFUSES, "has no Tucker core in a LoRA"),
        Rule(When(roles=("bias",)), REFUSES, "refuses a file with a bias (lora_B.bias, diff_b)"),
        Rule(When(namings=("hf-short",)), IGNORES, "knows CLIP's names with `text_model.` only"),
        Rule(When(roles=("embedding_A",)), IGNORES, "adapts linear layers and convolutions only"),
        Rule(
            When(keys=r"\.lora_magnitude_vector$"),
            REFUSES,
            "wants `.weight` behind lora_magnitude_vector",
        ),
        Rule(
            When(families=("lora",), has=("alpha elsewhere",)),
            SCALES,
            "takes the rank for alpha where none is beside the factors",
            ONE,
        ),
    ),
    keys=(
        KeyRule(r"^bundle_emb\.", ""),
        KeyRule(r"^_aux\.", IGNORES, "drops the tensors of slider tools"),
        KeyRule(r"", REFUSES, "refuses keys of kinds that it does not train"),
    ),
    writes={"*": ("onetrainer", "kohya", "diffusers")},
    notes=(
        "The kind, the rank and the DoRA settings of the training must be those of the file.",
        "A LoRA without alpha is trained on with alpha = rank.",
    ),
)
