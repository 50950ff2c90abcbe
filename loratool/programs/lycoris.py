"""lycoris: what sd-scripts loads with `--network_module lycoris.kohya` (`create_network_from_weights`), and files with
`lycoris_` in front, which LyCORIS' own wrapper loads into one model (`create_lycoris_from_weights`)."""

from __future__ import annotations

from loratool.core.program import DROPS, IGNORES, REFUSES, KeyRule, Program, Rule, When
from loratool.programs._models import GLUED, LETTERS, NESTED, VECTOR

_FAMILIES = ("lora", "loha", "lokr", "diff", "ia3", "oft", "boft", "glora")

PROGRAM = Program(
    id="lycoris",
    title="LyCORIS",
    version="4.1.3",
    sources=(
        "https://github.com/KohakuBlueleaf/LyCORIS/blob/v4.1.3/lycoris/kohya.py",
        "https://github.com/KohakuBlueleaf/LyCORIS/blob/v4.1.3/lycoris/wrapper.py",
        "https://github.com/KohakuBlueleaf/LyCORIS/tree/v4.1.3/lycoris/modules",
    ),
    reads=(
        When(
            layouts=("kohya",),
            written=True,
            families=_FAMILIES,
            keys=r"^lora_(unet|te\d?)_",
        ),
        When(layouts=("lycoris",), written=True, families=_FAMILIES),
    ),
    rules=(
        Rule(
            When(architectures=("sd15", "sd21"), components=("unet",), keys=r"^lora_unet_"),
            REFUSES,
            "fails on UNets with diffusers' names: its list of modules has time_embedding twice",
        ),
        Rule(When(has=("magnitude per input",)), REFUSES, "fails on a DoRA magnitude per input (wd_on_output=False)"),
        Rule(When(families=("ia3",)), REFUSES, "fails on its own IA3 files"),
        Rule(
            When(families=("lora", "loha", "lokr", "glora", "oft", "boft"), has=("no alpha",)),
            REFUSES,
            "fails on a module without an alpha",
        ),
        Rule(When(families=("lokr",), roles=("w1_a",)), REFUSES, "fails on a LoKr whose w1 is factored"),
        Rule(When(families=("lokr",), roles=("t2",)), REFUSES, "fails on a LoKr with a Tucker core"),
        *(
            Rule(When(families=("lokr",), taller=("w1", right)), REFUSES, "fails on an unbalanced LoKr")
            for right in ("w2", "w2_a")
        ),
        Rule(
            When(architectures=("flux",), keys=r"^lora_te3_"),
            IGNORES,
            "numbers text encoders in order, so that FLUX.1's T5 is lora_te2",
        ),
        Rule(When(keys=GLUED), IGNORES, "finds no module for `_lora.down` and `_lora.up`"),
        Rule(When(keys=rf"{NESTED}|{LETTERS}"), REFUSES, "fails on a LoRA that is not spelled lora_down and lora_up"),
        Rule(When(keys=VECTOR), DROPS, "reads DoRA magnitudes as dora_scale only", "magnitude"),
    ),
    keys=(KeyRule(r"", IGNORES, "passes over tensors of no module"),),
    writes={"*": ("kohya", "lycoris")},
)
