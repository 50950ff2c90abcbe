"""vllm: `--enable-lora --lora-modules name=FOLDER` (`vllm/lora`)."""

from __future__ import annotations

from loratool.core.program import CONFIGS, REFUSES, SCALES, KeyRule, Program, RankLimit, Rule, When

PROGRAM = Program(
    id="vllm",
    title="vLLM",
    version="0.26 (vllm/lora/lora_model.py of 0306474e)",
    sources=(
        "https://github.com/vllm-project/vllm/blob/v0.26.0/vllm/config/lora.py",
        "https://github.com/vllm-project/vllm/blob/0306474e9d1f26d8717aad457b9511f0c9e57d60/vllm/lora/lora_model.py",
        "https://github.com/vllm-project/vllm/blob/e745bafffc44744aa601169f8c6f325e47ca7cd5/vllm/lora/peft_helper.py",
    ),
    reads=(When(layouts=("peft",), architectures=("generic",), families=("lora",)),),
    rules=(
        Rule(When(has=("magnitude",)), REFUSES, "has no DoRA"),
        Rule(When(roles=("bias",)), REFUSES, "has no bias in a LoRA"),
        Rule(When(roles=("mid",)), REFUSES, "has no Tucker core"),
        Rule(When(has=("kernel",)), REFUSES, "adapts linear layers and embeddings only"),
        Rule(
            When(),
            SCALES,
            "gives every module lora_alpha / r of the config and knows no rank_pattern and alpha_pattern",
            CONFIGS,
        ),
    ),
    keys=(
        KeyRule(r"\.(embed_tokens|lm_head)\.base_layer\.weight$", "", layouts=("peft",)),
        KeyRule(r"", REFUSES, "wants no modules_to_save and refuses tensors of no LoRA"),
    ),
    rank=RankLimit(16, (1, 8, 16, 32, 64, 128, 256, 320, 512), "--max-lora-rank"),
    writes={"*": ("peft",)},
    notes=(
        "Modules of different ranks are padded to --max-lora-rank.",
        "The model must be one that vLLM supports LoRA for, and its layers linear ones that vLLM has by these names.",
    ),
)
