"""lycoris: `lycoris.kohya.create_network_from_weights`, what sd-scripts loads with `--network_module lycoris.kohya`."""

from __future__ import annotations

from loratool.core.program import IGNORES, KeyRule, Program, Rule, When

PROGRAM = Program(
    id="lycoris",
    title="LyCORIS",
    version="4.1.3",
    sources=(
        "https://github.com/KohakuBlueleaf/LyCORIS/blob/v4.1.3/lycoris/kohya.py",
        "https://github.com/KohakuBlueleaf/LyCORIS/tree/v4.1.3/lycoris/modules",
    ),
    reads=(
        When(
            layouts=("kohya",),
            written=True,
            families=("lora", "loha", "lokr", "diff", "ia3", "oft", "boft", "glora"),
            keys=r"^lora_(unet|te\d?)_",
        ),
    ),
    rules=(
        Rule(
            When(families=("lora",), keys=r"\.lora_[AB]\.weight$"),
            IGNORES,
            "knows no lora_A and lora_B",
        ),
    ),
    keys=(KeyRule(r"", IGNORES, "passes over tensors of no module"),),
    writes={"*": ("kohya",)},
)
