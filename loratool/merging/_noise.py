"""Random numbers that depend on the seed, the input and the module alone: not on device, threads or order of work."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from loratool.core.method import Update


def uniform(update: Update, seed: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), `update.shape`, float32. Drawn on the CPU, then moved.

    Philox (Salmon et al. 2011), keyed by the first 128 bits of SHA-256 over seed, index and name. Call it as
    `_noise.uniform`, so that a test can put other numbers in its place.
    """
    digest = sha256(f"{seed}\n{update.index}\n{update.name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.random(update.shape, dtype=np.float32)).to(device)
