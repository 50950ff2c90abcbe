"""diffusers: `pipeline.load_lora_weights(FILE)` with PEFT, as tested against the installed library.

What is said of Stable Diffusion and FLUX.1 is tested; the rest is read from `loaders/lora_pipeline.py` and
`loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

from loratool.core.program import CHANGES, COMMONEST, DROPS, IGNORES, ONE, REFUSES, SCALES, KeyRule, Program, Rule, When
from loratool.programs._diffusers import FLATTENED, WAN_BLOCK, WAN_IMAGE, WHOLE_FLUX
from loratool.programs._models import (
    BARE,
    DOTTED,
    ENCODERS,
    GLUED,
    LETTERS,
    NESTED,
    NOT_LORA,
    SD,
    TRANSFORMERS,
    VECTOR,
)

_COMPONENTS = r"^(unet|transformer(_2)?|text_encoder(_2)?|connectors|text_conditioner)\."
_EACH_KEY = "wants `lora` in every key and refuses a file with others"
_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
_ATTENDING = r"(^|\.)(q_proj|k_proj|v_proj|out_proj)$"
_RANKED = r"(^|\.)(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
_CLIPS = ((SD, ENCODERS), (("sd3",), ("text_encoder", "text_encoder_2")), (("flux",), ("text_encoder",)))
_OUTSIDE = r"^(x_embedder|context_embedder|time_text_embed|norm_out|proj_out)"
_WRONG_ALPHA = "matches alphas by names that no module has: it takes the commonest alpha of the {} instead"
_UNSCALED = ("lumina2", "hidream", "ltx-video", "ltx2", "flux2", "anima", "krea2")
"""Models whose converter for native names knows no alpha."""

_NO_ALPHA = tuple(m for m in (*SD, *TRANSFORMERS, "generic") if m not in ("flux", "chroma", "qwen-image", "z-image"))
_NO_ALPHA_DOTTED = tuple(model for model in _NO_ALPHA if model != "wan")
"""Models for which no tensor `.alpha` may stand beside the factors: in diffusers' names, and in native ones."""

PROGRAM = Program(
    id="diffusers",
    title="diffusers",
    version="0.42.1 (with peft 0.21.2, transformers 5.23.0)",
    sources=(
        "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/loaders/lora_pipeline.py",
        "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/loaders/lora_conversion_utils.py",
        "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/loaders/peft.py",
        "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/utils/peft_utils.py",
    ),
    reads=(
        When(layouts=("diffusers",), components=("unet", "transformer"), families=("lora",), keys=_COMPONENTS),
        When(
            layouts=("diffusers",),
            architectures=(*SD, "sd3", "flux", "generic"),
            components=("text_encoder",),
            families=("lora",),
            keys=_COMPONENTS,
        ),
        When(
            layouts=("diffusers",),
            architectures=("sdxl", "sdxl-refiner", "sd3", "generic"),
            components=("text_encoder_2",),
            families=("lora",),
            keys=_COMPONENTS,
        ),
        When(layouts=("kohya",), architectures=SD, families=("lora",), keys=r"^lora_(unet|te1?|te2)_"),
        When(
            layouts=("kohya",),
            architectures=("flux", "chroma"),
            components=("transformer",),
            namings=("bfl",),
            families=("lora",),
            keys=r"^lora_unet_",
        ),
        When(
            layouts=("kohya",),
            architectures=("flux",),
            components=("text_encoder",),
            namings=("hf",),
            families=("lora",),
            keys=r"^lora_te1?_",
        ),
        When(
            layouts=DOTTED,
            architectures=("flux",),
            components=("transformer",),
            namings=("bfl",),
            families=("lora",),
            keys=r"^diffusion_model\..*\.lora_down\.weight$",
        ),
        When(
            layouts=("native",),
            architectures=("flux",),
            families=("lora", "set"),
            keys=BARE,
            beside=r"query_norm\.scale",
        ),
        When(layouts=("peft",), architectures=("flux",), namings=("bfl",), families=("lora",)),  # fal's Kontext trainer
        When(layouts=("xlabs",), architectures=("flux",), components=("transformer",), families=("lora",)),
        When(
            layouts=("kohya", "musubi"),
            architectures=("qwen-image", "z-image", "flux2"),
            families=("lora",),
            keys=r"^lora_unet_(?!_)",
        ),
        When(
            layouts=("kohya", "musubi"),
            architectures=("wan",),
            namings=("native",),
            families=("lora",),
            keys=r"^lora_unet_blocks_",
        ),
        When(
            layouts=DOTTED,
            architectures=("wan", "qwen-image", "z-image", *_UNSCALED),
            families=("lora",),
            keys=r"^diffusion_model\.",
        ),
        When(
            layouts=("diffusers",),
            architectures=("qwen-image", "z-image"),
            families=("lora",),
            keys=r"^(transformer_blocks|layers)\.",
            beside=r"\.alpha$|\.default\.",
        ),
        # Tencent's own names only: with ComfyUI's dots (img_attn.qkv) nothing is converted.
        When(layouts=DOTTED, architectures=("hunyuan-video",), families=("lora",), beside=r"img_attn_qkv"),
        When(layouts=(*DOTTED, "diffusers"), architectures=("flux2", "z-image"), families=("lokr",)),
        When(layouts=("lycoris",), architectures=("flux2",), families=("lokr",)),
    ),
    rules=(
        # Stable Diffusion, kohya's spelling.
        Rule(When(architectures=SD, families=NOT_LORA), REFUSES, "knows LoRA only and refuses a file with other kinds"),
        Rule(When(architectures=SD, roles=("mid",)), REFUSES, "refuses a file with a Tucker core (lora_mid)"),
        Rule(
            When(layouts=("kohya",), architectures=SD, keys=rf"{GLUED}|{NESTED}|{LETTERS}"),
            REFUSES,
            "wants lora_down and lora_up behind flattened names",
        ),
        Rule(
            When(layouts=("kohya",), architectures=("flux",), keys=rf"{NESTED}|{LETTERS}"),
            IGNORES,
            "wants lora_down and lora_up behind flattened names",
        ),
        Rule(
            When(layouts=("kohya",), architectures=(*SD, "flux"), keys=VECTOR),
            REFUSES,
            "refuses lora_magnitude_vector behind flattened names",
        ),
        Rule(
            When(layouts=("kohya",), architectures=SD, components=("unet",), paths=_ATTENTION),
            SCALES,
            _WRONG_ALPHA.format("UNet"),
            COMMONEST,
        ),
        Rule(
            When(layouts=("kohya",), architectures=SD, components=("text_encoder",)),
            SCALES,
            _WRONG_ALPHA.format("text encoder"),
            COMMONEST,
        ),
        Rule(
            When(layouts=("kohya",), architectures=SD, components=("text_encoder_2",), paths=r"self_attn"),
            SCALES,
            _WRONG_ALPHA.format("text encoder"),
            COMMONEST,
        ),
        Rule(
            When(layouts=("kohya",), architectures=SD, has=("no alpha",)),
            SCALES,
            "gives modules without an alpha the commonest one of their component",
            COMMONEST,
        ),
        # Stable Diffusion, other spellings.
        Rule(When(layouts=("diffusers",), architectures=_NO_ALPHA, has=("alpha stored",)), REFUSES, _EACH_KEY),
        Rule(When(layouts=DOTTED, architectures=_NO_ALPHA_DOTTED, has=("alpha stored",)), REFUSES, _EACH_KEY),
        Rule(When(architectures=SD, keys=r"^lycoris_", has=("alpha stored",)), REFUSES, _EACH_KEY),
        Rule(
            When(layouts=("diffusers",), architectures=_NO_ALPHA, keys=r"\.lora_(up|down)\.weight$"),
            REFUSES,
            "refuses lora_down and lora_up in dotted names",
        ),
        Rule(
            When(
                layouts=("diffusers", "kohya"),
                architectures=("sdxl",),
                components=("text_encoder_2",),
                namings=("hf-short",),
            ),
            REFUSES,
            "wants `text_model.` in the names of the second text encoder",
        ),
        # Any model, diffusers' spelling.
        Rule(
            When(layouts=("diffusers",), components=ENCODERS, keys=r"\.lora\.(up|down)\.weight$"),
            REFUSES,
            "refuses `.lora.up` in a text encoder, where it wants `.lora_linear_layer.up` or `.lora_B`",
        ),
        Rule(
            When(
                layouts=("diffusers",),
                components=("unet", "transformer"),
                first=r"\.lora_A\.",
                keys=r"(\.lora|_lora)\.(up|down)\.weight$",
            ),
            IGNORES,
            "takes the spelling of the first key for all and passes over modules of another one",
        ),
        Rule(
            When(layouts=("diffusers",), components=("unet", "transformer"), families=("lora",), beside=r"\.lokr_"),
            IGNORES,
            "takes a file for LoKr where one key is, and applies no LoRA of that model",
        ),
        *(
            Rule(
                When(layouts=("diffusers",), architectures=models, components=encoders, keys=keys, lacking=lacking),
                REFUSES,
                f"recognises a text encoder in this spelling by its {what} modules, and the file has none",
            )
            for models, encoders in _CLIPS
            for keys, lacking, what in (
                (r"\.lora_[AB]\.weight$", _ATTENDING, "attention"),
                (r"\.lora_linear_layer\.", _RANKED, "attention and MLP"),
            )
        ),
        # It tells kohya's spelling of a text encoder by `to_out_lora`, or `lora_linear_layer` of the MLP.
        *(
            Rule(
                When(layouts=("kohya",), architectures=models, components=encoders, lacking=r"(out_proj|fc1|fc2)$"),
                REFUSES,
                "recognises kohya's text encoders by an out_proj or an MLP module, and the file has none",
            )
            for models, encoders in _CLIPS
        ),
        *(
            Rule(
                When(
                    layouts=("kohya",),
                    architectures=models,
                    components=encoders,
                    paths=r"self_attn\.[qkv]_proj$",
                    lacking=r"out_proj$",
                ),
                IGNORES,
                "reads q, k and v of kohya's text encoders only where the file has an out_proj, too",
            )
            for models, encoders in _CLIPS
        ),
        # DoRA.
        Rule(
            When(keys=r"\.dora_scale$"),
            DROPS,
            "drops DoRA magnitudes called dora_scale, with a warning",
            "magnitude",
        ),
        Rule(
            When(layouts=("diffusers",), components=ENCODERS, keys=r"\.lora_magnitude_vector$"),
            DROPS,
            "reads no magnitude without `.weight` behind its name in a text encoder",
            "magnitude",
        ),
        # FLUX.1.
        Rule(
            When(architectures=("flux",), families=NOT_LORA, layouts=("kohya", "diffusers")),
            REFUSES,
            "applies nothing of a file with other kinds than LoRA",
        ),
        Rule(
            When(
                layouts=("kohya", *DOTTED),
                architectures=("flux", "chroma"),
                components=("transformer",),
                paths=_OUTSIDE,
                keys=r"^(lora_unet_|diffusion_model\.)",
            ),
            IGNORES,
            "forgets the prefix when it converts modules outside the blocks, and then passes them over",
        ),
        Rule(
            When(layouts=("kohya",), architectures=("flux",), components=("transformer",), namings=("diffusers",)),
            REFUSES,
            "cannot convert flattened diffusers names (OneTrainer, LyCORIS) of FLUX.1",
            unread=True,
        ),
        Rule(
            When(layouts=("onetrainer",), architectures=("flux",), components=("transformer",)),
            REFUSES,
            "cannot convert OneTrainer's names of FLUX.1",
            unread=True,
        ),
        Rule(
            When(layouts=("omi",), architectures=("flux",)),
            REFUSES,
            "cannot convert OneTrainer's OMI names",
            unread=True,
        ),
        Rule(
            When(layouts=("peft",), architectures=("flux",), namings=("diffusers",)),
            REFUSES,
            "takes every file with `base_model.model.` for one of fal's Kontext trainer",
            unread=True,
        ),
        Rule(
            When(layouts=("peft",), namings=("bfl",), lacking=r"^transformer_blocks\.18\.norm1\.linear$"),
            REFUSES,
            "wants all modules of all blocks in a file of fal's Kontext trainer",
        ),
        Rule(
            When(layouts=("peft",), namings=("bfl",), lacking=r"^single_transformer_blocks\.37\.norm\.linear$"),
            REFUSES,
            "wants all modules of all blocks in a file of fal's Kontext trainer",
        ),
        Rule(
            When(
                layouts=("diffusers",),
                architectures=("flux", "chroma"),
                keys=r"\.lora_(up|down)\.weight$",
                has=("alpha stored",),
            ),
            SCALES,
            "applies no alpha beside lora_down and lora_up in dotted names",
            ONE,
        ),
        Rule(
            When(
                layouts=("diffusers",), components=ENCODERS, architectures=("flux",), keys=r"\.lora_(up|down)\.weight$"
            ),
            IGNORES,
            "reads no lora_down and lora_up of a text encoder",
        ),
        Rule(
            When(layouts=("diffusers",), architectures=("flux",), components=ENCODERS, has=("alpha stored",)),
            SCALES,
            _WRONG_ALPHA.format("text encoder"),
            COMMONEST,
        ),
        Rule(
            When(layouts=("diffusers",), architectures=("flux", "chroma"), has=("no alpha",)),
            SCALES,
            "gives modules without an alpha the commonest one of their component",
            COMMONEST,
        ),
        # Control LoRAs.
        *(
            Rule(
                When(layouts=("native",), architectures=("flux",), keys=BARE, lacking=lacking, paths=paths),
                REFUSES,
                "wants every module and every norm of FLUX.1 in a control LoRA",
            )
            for paths, lacking in WHOLE_FLUX
        ),
        Rule(
            When(layouts=("native",), architectures=("flux",), keys=BARE, paths=r"^norm_out"),
            CHANGES,
            "swaps the halves of lora_A, too, where it swaps shift and scale of a control LoRA's last modulation",
        ),
        # musubi-tuner's flattened names.
        *(
            Rule(
                When(layouts=("kohya", "musubi"), architectures=("wan",), keys=FLATTENED, lacking=lacking),
                REFUSES,
                "wants every layer of every block in a file of Wan with flattened names, without gaps",
            )
            for lacking in WAN_BLOCK
        ),
        *(
            Rule(
                When(
                    layouts=("kohya", "musubi"), architectures=("wan",), keys=FLATTENED, beside=beside, lacking=lacking
                ),
                REFUSES,
                "wants every layer of every block in a file of Wan with flattened names, without gaps",
            )
            for beside, lacking in WAN_IMAGE
        ),
        *(
            Rule(
                when, REFUSES, "knows nothing but lora_down, lora_up and alpha of the blocks in flattened names of Wan"
            )
            for when in (
                When(architectures=("wan",), keys=r"^lora_unet_(?!blocks_)"),
                When(architectures=("wan",), keys=rf"{FLATTENED}.*(lora_[AB]|\.lora\.|_lora\.|magnitude|dora_scale)"),
                When(architectures=("wan",), keys=FLATTENED, has=("no alpha",)),
                When(architectures=("wan",), keys=FLATTENED, families=NOT_LORA),
            )
        ),
        Rule(
            When(layouts=("kohya", "musubi"), architectures=("z-image", "flux2"), keys=rf"{FLATTENED}.*lora_[AB]"),
            REFUSES,
            "wants lora_down and lora_up behind flattened names",
        ),
        # Models whose converter knows lora_A and lora_B only.
        Rule(
            When(layouts=DOTTED, architectures=_UNSCALED, keys=r"\.lora_(up|down)\.weight$"),
            REFUSES,
            "converts lora_A and lora_B only in native names",
        ),
        Rule(
            When(layouts=DOTTED, architectures=("lumina2",), keys=r"^diffusion_model\.", lacking=r"attn\.to_out\.0$"),
            REFUSES,
            "wants every module of Lumina's attention in a file with native names",
        ),
    ),
    keys=(
        KeyRule(r"^(?!.*lora)", REFUSES, _EACH_KEY, architectures=(*_NO_ALPHA, "qwen-image", "z-image")),
        KeyRule(r"", IGNORES, "passes over tensors of no module, with a warning at most"),
    ),
    writes={"*": ("diffusers",)},
    notes=("It loads a file; a PEFT folder is loaded with PEFT.",),
)
