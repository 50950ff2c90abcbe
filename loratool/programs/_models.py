"""Ids that several programs' rules name."""

from __future__ import annotations

SD = ("sd15", "sd21", "sdxl", "sdxl-refiner")
"""Stable Diffusion's UNets."""

TRANSFORMERS = (
    "sd3",
    "flux",
    "chroma",
    "flux2",
    "lumina2",
    "z-image",
    "qwen-image",
    "wan",
    "hunyuan-video",
    "hunyuan-video-15",
    "hunyuan-image",
    "ltx-video",
    "ltx2",
    "hidream",
    "auraflow",
    "pixart",
    "sana",
    "cogvideox",
    "cosmos",
    "cosmos1",
    "anima",
    "krea2",
)

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

NOT_LORA = ("loha", "lokr", "diff", "set", "ia3", "oft", "boft", "glora")
"""Every family but LoRA itself."""

DOTTED = ("comfyui", "ai-toolkit")
"""Layouts with dots and `diffusion_model.` in front."""

GLUED = r"_lora\.(up|down)\.weight$"
"""`..._to_k_lora.down.weight`: old diffusers' attention, also in flattened names."""

NESTED = r"\.lora\.(up|down)\.weight$"

LETTERS = r"\.lora_[AB]\.weight$"

VECTOR = r"\.lora_magnitude_vector(\.weight)?$"
"""PEFT's name of a DoRA magnitude."""

CONTROL = r"^single_blocks\.0\.norm\.key_norm\.scale$"
"""BFL's control LoRAs for FLUX.1 bring the norms of the attention along; programs know them by this one."""

BARE = r"^(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\."
"""Native names without a prefix, as control LoRAs have them."""
