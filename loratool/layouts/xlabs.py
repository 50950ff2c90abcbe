"""xlabs: XLabs' x-flux, Flux only: attention processors (`double_blocks.0.processor.qkv_lora1.down.weight`). Read only.

1 is the image's stream, 2 the text's; single blocks have `qkv_lora` and `proj_lora`. No alpha: scale 1.
"""

from __future__ import annotations

from loratool.core.layout import Layout

LAYOUT = Layout(
    id="xlabs",
    title="XLabs (x-flux)",
    separator=".",
    spelling={("lora", "down"): ".down.weight", ("lora", "up"): ".up.weight"},
    writable=False,
)
