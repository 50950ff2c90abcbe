"""kohya: sd-scripts' own networks (`networks.lora`, `networks.lora_flux`, ...), as its inference scripts load them."""

from __future__ import annotations

from loratool.core.program import DROPS, IGNORES, REFUSES, KeyRule, Program, Rule, When
from loratool.programs._models import GLUED, LETTERS, NESTED

_UNETS = ("sd15", "sd21", "sdxl")
_OTHERS = ("sd3", "flux", "chroma", "lumina2", "hunyuan-image", "anima")
_OUTSIDE_UNET = r"^(conv_in|conv_out|time_embedding|add_embedding)"
_OUTSIDE_FLUX = r"^(x_embedder|context_embedder|time_text_embed|norm_out|proj_out)"
_ENCODER_LAYERS = r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|SelfAttention\.[qkvo]|DenseReluDense\.\w+)$"
_STRICT = "loads weights strictly and refuses {}"

PROGRAM = Program(
    id="kohya",
    title="sd-scripts",
    version="0.10.1 (48d368fa)",
    sources=(
        "https://github.com/kohya-ss/sd-scripts/blob/v0.10.1/networks/lora.py",
        "https://github.com/kohya-ss/sd-scripts/blob/v0.10.1/networks/lora_flux.py",
        "https://github.com/kohya-ss/sd-scripts/blob/v0.10.1/flux_minimal_inference.py",
        "https://github.com/kohya-ss/sd-scripts/blob/v0.10.1/gen_img.py",
    ),
    reads=(
        When(layouts=("kohya",), architectures=("sd15", "sd21"), families=("lora",), written=True),
        When(layouts=("kohya",), architectures=("sdxl",), families=("lora",), namings=("ldm", "diffusers", "hf")),
        When(
            layouts=("kohya",),
            architectures=_OTHERS,
            families=("lora",),
            written=True,
            keys=r"^lora_(unet_(?!_)|te)",
        ),
        When(layouts=("kohya",), architectures=(*_UNETS, "flux"), families=("oft",), keys=r"^oft_unet_"),
    ),
    rules=(
        Rule(
            When(architectures=_UNETS, components=("unet",), paths=_OUTSIDE_UNET),
            IGNORES,
            "has no networks outside the UNet's attention, residual and sampling blocks",
        ),
        Rule(
            When(architectures=("flux",), components=("transformer",), paths=_OUTSIDE_FLUX),
            REFUSES,
            _STRICT.format("modules outside the blocks"),
        ),
        Rule(
            When(
                components=("text_encoder", "text_encoder_2", "text_encoder_3"),
                paths=rf"^(?!.*{_ENCODER_LAYERS})",
                architectures=_UNETS,
            ),
            IGNORES,
            "has networks in the attention and MLP of text encoders only",
        ),
        Rule(
            When(architectures=("flux",), families=("loha", "lokr", "diff", "set", "ia3", "boft", "glora")),
            REFUSES,
            _STRICT.format("kinds that need LyCORIS"),
        ),
        Rule(When(roles=("mid",)), REFUSES, "expects another shape of lora_down than beside a Tucker core"),
        Rule(When(keys=rf"{GLUED}|{NESTED}|{LETTERS}"), IGNORES, "knows lora_down and lora_up only"),
        Rule(
            When(architectures=_UNETS, has=("magnitude",)),
            DROPS,
            "applies a DoRA module without its magnitude",
            "magnitude",
        ),
        Rule(When(architectures=_OTHERS, has=("magnitude",)), REFUSES, _STRICT.format("DoRA magnitudes")),
        Rule(When(architectures=("flux",), has=("no alpha",)), REFUSES, "wants an alpha beside every module of FLUX.1"),
    ),
    keys=(
        KeyRule(r"", REFUSES, _STRICT.format("tensors of no module"), architectures=("flux",)),
        KeyRule(r"", IGNORES, "passes over tensors of no module"),
    ),
    writes={"*": ("kohya",)},
    notes=("Other kinds than LoRA are loaded by LyCORIS (--network_module lycoris.kohya): see the program lycoris.",),
)
