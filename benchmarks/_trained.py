"""Writes a LoRA of real names and sizes whose factors have the spectrum of a trained one: run as a process of its own.

    python benchmarks/_trained.py ARCHITECTURE RANK SEED PATH

As sd-scripts writes it: fp16, alpha = rank / 2. The i-th of r components of `up` shrinks as exp(-4 i / r), that of
`down` as exp(-i / r), both turned by random orthogonal matrices as training mixes them: singular values fall over more
than two decades.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _measure import Shape, header_of, kohya_modules
from safetensors.torch import save_file


def factors(shape: Shape, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`up` and `down` of one module, fp16."""
    out, size, *kernel = shape
    fall = torch.arange(rank) / rank
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    up = torch.randn(out, rank, generator=generator) * torch.exp(-4 * fall) @ mix * 0.02
    down = mix.T @ (torch.exp(-fall).unsqueeze(1) * torch.randn(rank, size, generator=generator)) * 0.05
    ones = [1] * len(kernel)
    return up.reshape(out, rank, *ones).half(), down.reshape(rank, size, *kernel).half()


def main() -> None:
    """Writes the file."""
    architecture, rank, seed, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for stem, shape in kohya_modules(architecture).items():
        up, down = factors(shape, rank, generator)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2).half()
    save_file(tensors, path, header_of(architecture))


if __name__ == "__main__":
    main()
