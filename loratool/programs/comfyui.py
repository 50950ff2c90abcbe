"""comfyui: the LoraLoader node (`comfy/lora.py`, `comfy/weight_adapter/`)."""

from __future__ import annotations

from loratool.core.program import CHANGES, DROPS, IGNORES, ONE, SCALES, KeyRule, Program, Rule, When
from loratool.programs._models import BARE, CONTROL, SD

_FAMILIES = ("lora", "loha", "lokr", "glora", "oft", "boft", "diff", "set")
_CLIP = r"^text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"

PROGRAM = Program(
    id="comfyui",
    title="ComfyUI",
    version="0.38 (comfy/lora.py of 17358c8f, comfy/weight_adapter of 0323d874)",
    sources=(
        "https://github.com/Comfy-Org/ComfyUI/blob/17358c8f73b581a0d22facc3c385822f09b8bfb1/comfy/lora.py",
        "https://github.com/comfyanonymous/ComfyUI/tree/0323d8746da9beb8f3face4b77305af8d58319d6/comfy/weight_adapter",
        "https://github.com/comfyanonymous/ComfyUI/blob/02b5222dcc6105dbfa8c1730c87ccd70a9316b67/comfy/lora_convert.py",
    ),
    reads=(
        # Native names with dots: every weight of the model and of its text encoders.
        When(layouts=("comfyui",), written=True, families=_FAMILIES, keys=r"^diffusion_model\."),
        When(
            layouts=("comfyui", "ai-toolkit"),
            architectures=("z-image", "lumina2"),
            namings=("diffusers",),
            families=_FAMILIES,
            keys=r"^diffusion_model\.",
        ),
        When(layouts=("comfyui",), families=_FAMILIES, namings=("hf",), keys=r"^text_encoders\."),
        # BFL's control LoRAs, which have no prefix, are renamed.
        When(layouts=("native",), architectures=("flux",), families=("lora", "set"), keys=BARE, beside=CONTROL),
        When(
            layouts=("comfyui",),
            architectures=("ltx-video", "ltx2", "qwen-image", "z-image", "krea2"),
            families=_FAMILIES,
            keys=r"^(?!diffusion_model|text_enc)",
        ),
        # Flattened names: native ones, and diffusers' for UNets.
        When(
            layouts=("kohya", "musubi"),
            components=("unet", "transformer"),
            families=_FAMILIES,
            written=True,
            keys=r"^lora_unet_(?!_)",
        ),
        When(layouts=("kohya",), architectures=SD, components=("unet",), families=_FAMILIES, keys=r"^lora_unet_"),
        When(
            layouts=("kohya", "musubi"),
            architectures=("wan",),
            families=_FAMILIES,
            keys=r"^lora_unet__",
            beside=r"^lora_unet__blocks_0_cross_attn_k\.lora_down\.weight$",
        ),
        When(
            layouts=("kohya",),
            components=("text_encoder", "text_encoder_2"),
            families=_FAMILIES,
            keys=r"^lora_te[12]?_",
            paths=_CLIP,
        ),
        When(layouts=("kohya",), architectures=("sdxl",), families=_FAMILIES, paths=r"^text_projection$"),
        When(
            layouts=("kohya", "onetrainer"),
            architectures=("flux", "sd3"),
            families=_FAMILIES,
            keys=r"^lora_te[23]_encoder_block",
        ),
        When(
            layouts=("kohya", "onetrainer", "lycoris"),
            architectures=("flux", "sd3"),
            components=("transformer",),
            namings=("diffusers",),
            families=_FAMILIES,
            keys=r"^(lora_transformer_|lycoris_)",
        ),
        When(
            layouts=("kohya", "lycoris"),
            architectures=(*SD, "hidream", "qwen-image", "z-image", "lumina2", "krea2"),
            families=_FAMILIES,
            keys=r"^lycoris_",
        ),
        # diffusers' names.
        When(layouts=("diffusers",), architectures=SD, components=("unet",), families=_FAMILIES),
        When(
            layouts=("diffusers",),
            architectures=("sd15", "sd21", "sdxl", "sd3", "flux"),
            components=("text_encoder",),
            families=_FAMILIES,
            paths=_CLIP,
            namings=("hf",),
            keys=r"^text_encoder\.",
        ),
        When(
            layouts=("diffusers",),
            architectures=("sdxl", "sd3"),
            components=("text_encoder_2",),
            families=_FAMILIES,
            paths=_CLIP,
            namings=("hf",),
            keys=r"^text_encoder_2\.",
        ),
        When(
            layouts=("diffusers",),
            architectures=("sd3", "auraflow", "pixart", "flux", "hidream", "qwen-image", "krea2", "lumina2", "z-image"),
            components=("transformer",),
            families=_FAMILIES,
            keys=r"^transformer\.",
        ),
        When(
            layouts=("diffusers",),
            architectures=("flux", "qwen-image", "krea2", "lumina2", "z-image"),
            components=("transformer",),
            families=_FAMILIES,
            keys=r"^(?!transformer\.|text_encoder)",
        ),
        When(layouts=("peft",), architectures=("sd3", "pixart"), components=("transformer",), families=_FAMILIES),
        When(
            layouts=("xlabs",),
            architectures=("flux",),
            families=("lora",),
            keys=r"^(double|single)_blocks\.",
            beside=r"^single_blocks\.37\.processor\.qkv_lora\.up\.weight$",
        ),
    ),
    rules=(
        Rule(
            When(
                layouts=("diffusers",),
                architectures=SD,
                components=("unet",),
                keys=r"^(?!.*\.processor\.).*\.to_(q|k|v|out)(\.|$)",
            ),
            IGNORES,
            "knows attention of diffusers' UNets by its old name only (attn1.processor.to_q_lora)",
        ),
        Rule(When(roles=("embedding_A",)), IGNORES, "reads no PEFT embeddings (lora_embedding_A)"),
        Rule(
            When(has=("alpha elsewhere",)),
            SCALES,
            "reads alpha beside the factors only, not from a header or a config",
            ONE,
        ),
        Rule(
            When(keys=r"^(diffusion_model|transformer|unet|text_enc).*\.lora_B\.bias$"),
            DROPS,
            "reads a bias as diff_b, not as lora_B.bias",
            "bias",
        ),
        Rule(
            When(keys=r"\.lora_magnitude_vector(\.weight)?$"),
            DROPS,
            "reads DoRA magnitudes as dora_scale only",
            "magnitude",
        ),
        Rule(
            When(keys=r"\.dora_scale$", has=("magnitude per output",)),
            CHANGES,
            "divides a DoRA magnitude per output by the norm of the base weight, not of the updated one",
        ),
    ),
    keys=(KeyRule(r"", IGNORES, "warns of tensors that it knows no place for"),),
    writes={"*": ("comfyui", "kohya")},
)
