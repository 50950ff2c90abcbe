"""What diffusers' converters look for in whole files: parts of its rules."""

from __future__ import annotations

FLATTENED = r"^lora_unet_"
WAN_BLOCK = (
    *(rf"^{{block}}\.attn{n}\.{part}$" for n in (1, 2) for part in ("to_q", "to_k", "to_v", r"to_out\.0")),
    r"^{block}\.ffn\.net\.0\.proj$",
    r"^{block}\.ffn\.net\.2$",
    r"^{before}\.attn1\.to_q$",
    r"^blocks\.0\.attn1\.to_q$",
)
"""What its converter of musubi-tuner's Wan looks for in each block that it counts."""

WAN_IMAGE = ((r"k_img", r"^{block}\.attn2\.add_v_proj$"), (r"v_img", r"^{block}\.attn2\.add_k_proj$"))

_NORMS = ("norm_q", "norm_k")
WHOLE_FLUX = (
    *(("", rf"^{path}$") for path in ("x_embedder", "context_embedder", r"norm_out\.linear:shift", "proj_out")),
    *(("", rf"^time_text_embed\.{part}_embedder\.linear_{n}$") for part in ("timestep", "text") for n in (1, 2)),
    *((r"guidance_embedder", rf"^time_text_embed\.guidance_embedder\.linear_{n}$") for n in (1, 2)),
    ("", r"^transformer_blocks\.18\."),
    ("", r"^single_transformer_blocks\.37\."),
    (r"^(single_)?transformer_blocks\.", r"^{before}\."),
    *(
        (r"^transformer_blocks\.", rf"^{{block}}\.{part}$")
        for part in (
            *(r"norm1\.linear", r"norm1_context\.linear"),
            *(r"attn\.to_q", r"attn\.add_q_proj", r"attn\.to_out\.0", r"attn\.to_add_out"),
            *(rf"{ff}\.net\.{layer}" for ff in ("ff", "ff_context") for layer in (r"0\.proj", "2")),
            *(rf"attn\.{norm}" for norm in (*_NORMS, "norm_added_q", "norm_added_k")),
        )
    ),
    *(
        (r"^single_transformer_blocks\.", rf"^{{block}}\.{part}$")
        for part in (r"norm\.linear", r"attn\.to_q", "proj_out", *(rf"attn\.{norm}" for norm in _NORMS))
    ),
)
"""What its converter of control LoRAs looks for: paths of modules that ask for it, and what may not be lacking."""
