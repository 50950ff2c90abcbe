"""invokeai: its model manager and `invokeai/backend/patches`."""

from __future__ import annotations

from loratool.core.program import CHANGES, DROPS, IGNORES, ONE, REFUSES, SCALES, KeyRule, Program, Rule, When
from loratool.programs._models import BARE, CONTROL, DOTTED, GLUED, LETTERS, NESTED, SD, VECTOR

_FAMILIES = ("lora", "loha", "lokr", "diff", "ia3")
_NEWER = ("flux2", "z-image", "qwen-image", "krea2", "anima", "wan")
_PARTLY = "recognises a FLUX.1 file only if every key is one of the blocks', of the last layer's or of an encoder's"

PROGRAM = Program(
    id="invokeai",
    title="InvokeAI",
    version="6.14.0-alpha (8e71a8a5)",
    sources=(
        "https://github.com/invoke-ai/InvokeAI/blob/8e71a8a519399d6db32054ae9afc7c6c4e2355af/invokeai/backend/model_manager/load/model_loaders/lora.py",
        "https://github.com/invoke-ai/InvokeAI/blob/8e71a8a519399d6db32054ae9afc7c6c4e2355af/invokeai/backend/model_manager/configs/lora.py",
        "https://github.com/invoke-ai/InvokeAI/tree/8e71a8a519399d6db32054ae9afc7c6c4e2355af/invokeai/backend/patches",
    ),
    reads=(
        When(
            layouts=("kohya",),
            architectures=("sd15", "sd21"),
            families=_FAMILIES,
            written=True,
            keys=r"^lora_(unet|te)_",
        ),
        When(
            layouts=("kohya",),
            architectures=("sdxl",),
            families=_FAMILIES,
            namings=("ldm", "diffusers", "hf"),
            keys=r"^lora_(unet|te1|te2)_",
        ),
        When(layouts=("kohya",), architectures=("flux",), families=_FAMILIES, namings=("bfl",), keys=r"^lora_unet_"),
        When(layouts=("kohya", "onetrainer"), architectures=("flux",), families=_FAMILIES, keys=r"^lora_te[12]_"),
        When(
            layouts=("kohya", "onetrainer"),
            architectures=("flux",),
            families=_FAMILIES,
            namings=("diffusers",),
            keys=r"^lora_transformer_",
        ),
        When(layouts=("diffusers", "peft"), architectures=("flux",), components=("transformer",), families=("lora",)),
        When(
            layouts=DOTTED,
            architectures=("flux",),
            components=("transformer",),
            families=_FAMILIES,
            namings=("bfl",),
            keys=r"^diffusion_model\.",
        ),
        When(layouts=("native",), architectures=("flux",), families=("lora", "set"), keys=BARE, beside=CONTROL),
        When(
            layouts=("omi",),
            architectures=("flux",),
            components=("transformer",),
            families=("lora",),
            beside=r"\.qkv\.[012]\.|\.linear1\.0\.",
        ),
        When(layouts=("xlabs",), architectures=("flux",), families=("lora",), paths=r"^transformer_blocks\."),
        When(layouts=("kohya", "musubi", "diffusers", *DOTTED), architectures=_NEWER, families=_FAMILIES),
    ),
    rules=(
        Rule(
            When(layouts=("kohya",), families=("glora", "oft", "boft", "set")),
            REFUSES,
            "raises an error at kinds that it has no layer for",
        ),
        Rule(
            When(families=("loha", "lokr", "diff", "ia3"), has=("magnitude",)),
            REFUSES,
            "expects a LoRA beside every DoRA magnitude",
        ),
        Rule(
            When(layouts=("kohya",), architectures=SD, keys=rf"{GLUED}|{NESTED}|{LETTERS}"),
            REFUSES,
            "wants lora_down and lora_up behind flattened names",
        ),
        Rule(When(layouts=("kohya",), keys=VECTOR), DROPS, "reads DoRA magnitudes as dora_scale only", "magnitude"),
        Rule(
            When(has=("magnitude per output",), families=("lora",), keys=r"\.dora_scale$"),
            CHANGES,
            "divides a DoRA magnitude by the norms of the weight's columns, also one that is per output",
        ),
        Rule(
            When(layouts=("diffusers", *DOTTED), architectures=("sdxl",)), REFUSES, "knows SDXL by kohya's names only"
        ),
        Rule(
            When(layouts=("diffusers", *DOTTED), architectures=("sd15", "sd21")),
            REFUSES,
            "knows Stable Diffusion by kohya's names only",
        ),
        # FLUX.1, as told by its keys.
        Rule(
            When(layouts=("omi",), architectures=("flux",), components=("text_encoder", "text_encoder_2")),
            REFUSES,
            "reads nothing but the transformer from OneTrainer's OMI names",
        ),
        Rule(
            When(
                layouts=("omi",),
                architectures=("flux",),
                keys=r"(?<!\.lora_down\.weight)(?<!\.lora_up\.weight)(?<!\.alpha)$",
            ),
            REFUSES,
            "knows lora_down, lora_up and alpha behind OneTrainer's OMI names only",
        ),
        Rule(
            When(
                layouts=("kohya",),
                architectures=("flux",),
                components=("transformer",),
                paths=r"^(x_embedder|context_embedder|time_text_embed)",
            ),
            REFUSES,
            _PARTLY,
        ),
        Rule(
            When(layouts=("kohya",), architectures=("flux",), paths=r"^(norm_out|proj_out)"),
            IGNORES,
            "passes over the last layer of FLUX.1",
        ),
        Rule(When(layouts=("kohya",), architectures=("flux",), keys=r"^lora_te3_"), REFUSES, _PARTLY),
        Rule(
            When(layouts=("diffusers", "peft"), architectures=("flux",), components=("text_encoder", "text_encoder_2")),
            REFUSES,
            "converts nothing but the transformer from diffusers' names of FLUX.1, and accepts nothing else",
        ),
        Rule(
            When(
                layouts=("diffusers",),
                architectures=("flux",),
                keys=r"^(?!.*\.(lora_[AB]|lora\.(up|down))\.weight$).*(lora_magnitude_vector|alpha|dora_scale|bias)",
            ),
            REFUSES,
            "recognises diffusers' names of FLUX.1 only in a file with nothing but lora_A and lora_B",
        ),
        Rule(
            When(
                layouts=("diffusers", "peft"),
                architectures=("flux",),
                components=("transformer",),
                lacking=r"^single_transformer_blocks\.0\.attn\.to_q$",
            ),
            REFUSES,
            "recognises FLUX.1 by the first blocks' attention, which is not in the file",
        ),
        Rule(
            When(
                layouts=("diffusers", "peft"),
                architectures=("flux",),
                components=("transformer",),
                lacking=r"^transformer_blocks\.0\.attn\.add_q_proj$",
            ),
            REFUSES,
            "recognises FLUX.1 by the first blocks' attention, which is not in the file",
        ),
        Rule(
            When(layouts=("diffusers", "peft"), has=("alpha elsewhere",)),
            SCALES,
            "reads no alpha from a header or a config",
            ONE,
        ),
    ),
    keys=(
        KeyRule(r"^bundle_emb", IGNORES, "leaves bundled embeddings out"),
        KeyRule(r"", REFUSES, "knows SDXL keys by three prefixes and refuses others", architectures=("sdxl",)),
        KeyRule(r"", REFUSES, _PARTLY, architectures=("flux",)),
        KeyRule(r"", REFUSES, "raises an error at keys of no kind that it knows", architectures=SD),
        KeyRule(r"", IGNORES, "passes over tensors of no module"),
    ),
    writes={"*": ("kohya", "comfyui", "diffusers")},
)
