"""Pieces of hostile files: headers, tensors and adapters as bytes, without the code under test."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
FORMS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "U8": "B", "BOOL": "B"}
ONE = {"F64": 1.0, "F32": 1.0, "F16": 1.0, "I64": 1, "I32": 1, "U8": 1, "BOOL": 1}
FP8_ONE = {"F8_E4M3": 0x38, "F8_E5M2": 0x3C}

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
"""Stem of four modules of Stable Diffusion 1.x in kohya's layout, `(320, 320)` each."""

PARTS = ("q", "k", "v", "out_0")


def packed(text: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header and data; `length` lies about the header's."""
    if isinstance(text, dict):
        text = json.dumps(text, separators=(",", ":"))
        text += " " * (-len(text.encode()) % 8)
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def values(dtype: str, count: int, value: float | None = None, seed: int = 0) -> bytes:
    """`count` numbers: a few different ones below 1, or `value`."""
    if dtype == "BF16":
        return b"".join(struct.pack("<f", n)[2:] for n in _numbers(count, value, seed))
    if dtype in FP8_ONE:
        codes = [FP8_ONE[dtype] - 8 - (i * 7 + seed) % 13 for i in range(count)]
        return bytes(codes if value is None else [int(value)] * count)
    numbers = _numbers(count, value, seed)
    return struct.pack(f"<{count}{FORMS[dtype]}", *(numbers if FORMS[dtype] in "dfe" else map(int, numbers)))


def _numbers(count: int, value: float | None, seed: int) -> list[float]:
    return [((i * 37 + seed * 11) % 101 - 50) / 400 + 0.001 if value is None else value for i in range(count)]


Tensor = tuple[str, Sequence[int], bytes]


def tensor(dtype: str, shape: Sequence[int], value: float | None = None, seed: int = 0) -> Tensor:
    """dtype, shape and data."""
    count = 1
    for size in shape:
        count *= size
    return dtype, shape, values(dtype, count, value, seed)


def file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A well-formed file, tensors in the given order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for key, (dtype, shape, raw) in tensors.items():
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return packed(header, data)


def pair(
    stem: str, shape: Sequence[int] = (320, 320), rank: int = 4, dtype: str = "F16", **more: Any
) -> dict[str, Tensor]:
    """One kohya module: down, up, alpha."""
    return {
        f"{stem}.lora_down.weight": tensor(dtype, (rank, *shape[1:]), seed=len(stem)),
        f"{stem}.lora_up.weight": tensor(dtype, (shape[0], rank, *(1,) * (len(shape) - 2)), seed=3),
        f"{stem}.alpha": tensor(
            more.get("alpha_dtype", dtype if dtype in FORMS else "F32"), (), more.get("alpha", 4.0)
        ),
    }


def lora(dtype: str = "F16", rank: int = 4, **changed: Tensor | None) -> dict[str, Tensor]:
    """Four modules of Stable Diffusion 1.x. `changed`: part of the first one (`up`, `down`, `alpha`) -> another
    tensor, or None to leave it out."""
    found: dict[str, Tensor] = {}
    for part in PARTS:
        found |= pair(UNET + part, rank=rank, dtype=dtype)
    for part, other in changed.items():
        key = f"{UNET}q.{part if part == 'alpha' else f'lora_{part}.weight'}"
        if other is None:
            del found[key]
        else:
            found[key] = other
    return found


def alphas(value: float, dtype: str = "F16") -> dict[str, Tensor]:
    """The same modules, all with another alpha."""
    return {key: tensor(dtype, (), value) if key.endswith("alpha") else one for key, one in lora(dtype).items()}


def dotted() -> dict[str, Tensor]:
    """One module in diffusers' spelling, with an alpha beside it."""
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = tensor("F16", (320, 4), seed=3), tensor("F16", (4, 320), seed=4)
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.alpha": tensor("F16", (), 4.0)}


def with_bits(found: dict[str, Tensor], key: str, bits: bytes, at: int = 5) -> dict[str, Tensor]:
    """The tensors with one number of one of them replaced by these bytes."""
    dtype, shape, raw = found[key]
    start = at * len(bits)
    return {**found, key: (dtype, shape, raw[:start] + bits + raw[start + len(bits) :])}


def hashed(tensors: Mapping[str, Tensor], name: str = "sshs_model_hash", prefix: str = "") -> bytes:
    """A file with a true hash of its data in the metadata."""
    digest = hashlib.sha256(b"".join(raw for _, _, raw in tensors.values())).hexdigest()
    return file(tensors, {name: prefix + digest})


def flipped(raw: bytes, at: int = -7) -> bytes:
    """The file with one bit flipped."""
    changed = bytearray(raw)
    changed[at] ^= 4
    return bytes(changed)


def a_zip(name: str, content: bytes = b"content") -> bytes:
    """An archive with one member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def a_tar(name: str) -> bytes:
    """An archive with one member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return buffer.getvalue()


def a_gzip() -> bytes:
    """Compressed text."""
    return gzip.compress(b"content", mtime=0)


def a_pickle(protocol: int) -> bytes:
    """A plain dict."""
    return pickle.dumps({"a": [1, 2, 3]}, protocol)
