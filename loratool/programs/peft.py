"""peft: `PeftModel.from_pretrained(model, FOLDER)`, the model being the one component that the folder is for."""

from __future__ import annotations

from loratool.core.program import IGNORES, KeyRule, Program, When

PROGRAM = Program(
    id="peft",
    title="PEFT",
    version="0.21.2 (with diffusers 0.42.1, transformers 5.23.0)",
    sources=(
        "https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py",
        "https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py",
    ),
    reads=(
        # PEFT takes names as they stand: only those that the model class of today has.
        When(
            layouts=("peft",),
            written=True,
            families=("lora", "loha", "lokr", "ia3", "oft", "boft"),
            keys=r"^([\w-]+/)?base_model\.model\.(?!(unet|transformer|text_encoder(_\d)?)\.)",
        ),
        # A language model may be called `transformer` within its class.
        When(
            layouts=("peft",),
            architectures=("generic",),
            families=("lora", "loha", "lokr", "ia3", "oft", "boft"),
            keys=r"^base_model\.model\.transformer\.",
        ),
    ),
    keys=(
        KeyRule(r"\.(modules_to_save\.)?[\w.]*(weight|bias)$", "", layouts=("peft",), architectures=("generic",)),
        KeyRule(r"", IGNORES, "passes over tensors of no module, with a warning"),
    ),
    writes={"*": ("peft",)},
    notes=("A folder with one sub-folder per component is loaded component by component.",),
)
