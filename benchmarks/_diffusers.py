"""What diffusers' documentation says for fusing a LoRA into a checkpoint on a GPU, as a process of its own.

    python benchmarks/_diffusers.py sd15|sdxl BASE LORA OUTPUT DEVICE

Loads the pipeline in fp16, moves it to the device, loads the LoRA, fuses it, saves the pipeline as the folder OUTPUT.
The configs are written anew into a temporary folder (a user has them in a cache); there are no tokenizers, as a network
would be needed for them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from _models import CLIP_G, CLIP_L, UNETS, VAE, Config
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

STRENGTH = 0.8
PIPELINES: dict[str, type[DiffusionPipeline]] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def configs(model: str) -> dict[str, tuple[str, str, Config]]:
    """component -> library, class, config."""
    clip = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "model_type": "clip_text_model"}
    found: dict[str, tuple[str, str, Config]] = {
        "unet": ("diffusers", "UNet2DConditionModel", UNETS[model]),
        "vae": ("diffusers", "AutoencoderKL", VAE),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", {"steps_offset": 1}),
        "text_encoder": ("transformers", "CLIPTextModel", {**CLIP_L, **clip}),
    }
    if model == "sdxl":
        found["text_encoder_2"] = ("transformers", "CLIPTextModelWithProjection", {**CLIP_G, **clip})
    return found


def write_configs(model: str, folder: Path) -> None:
    """The folder of a pipeline without its weights."""
    parts = configs(model)
    index: dict[str, object] = {name: [library, kind] for name, (library, kind, _) in parts.items()}
    for name, (_, kind, config) in parts.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": kind, **config}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[model].__name__, **index}))


def main(model: str, base: str, lora: str, output: str, device: str) -> None:
    """Fuses a LoRA, and saves."""
    kind = PIPELINES[model]
    expected, _ = kind._get_signature_keys(kind)
    given: dict[str, object] = {name: None for name in expected if name not in configs(model)}
    if model == "sd15":
        given["requires_safety_checker"] = False
    with tempfile.TemporaryDirectory() as place:
        write_configs(model, Path(place))
        pipe = kind.from_single_file(base, config=place, local_files_only=True, torch_dtype=torch.float16, **given)
    pipe.to(device)
    pipe.load_lora_weights(str(Path(lora).parent), weight_name=Path(lora).name)
    pipe.fuse_lora(lora_scale=STRENGTH)
    pipe.unload_lora_weights()
    pipe.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
