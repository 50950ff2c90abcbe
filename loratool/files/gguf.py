"""GGUF files of llama.cpp, by way of its own `gguf` package: adapters as bundles, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.core.adapter import GGUF, Bundle
from loratool.core.errors import FormatError, LoratoolError
from loratool.core.tensor import DTYPES, Held, LazyTensor
from loratool.files.safetensors import OpenFile

MAGIC = b"GGUF"
TYPES = "gguf.types"
"""Entry of a bundle's metadata: JSON, key -> GGUF's type of every entry that is no string."""

ARCHITECTURE = "general.architecture"
_FLOATS = ("F64", "F32", "F16", "BF16")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as GGUF files do; a file that cannot be read does not."""
    try:
        file = OpenFile(os.fspath(path))
        return file.pread(min(file.size, len(MAGIC)), 0) == MAGIC
    except FormatError:
        return False


def read_gguf(path: str | os.PathLike[str]) -> Bundle:
    """An adapter's tensors, mapped and not read, and its entries as text; `gguf.types` says what they were.

    Raises FormatError for a damaged file, a whole model, and quantised tensors.
    """
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        entries = {field.name: (field.types, field.contents()) for field in reader.fields.values()}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        raise FormatError(f"is a damaged GGUF file: {error}", file=os.fspath(path)) from error
    entries = {name: entry for name, entry in entries.items() if not name.startswith("GGUF.")}
    kind = entries.get("adapter.type", (None, None))[1]
    if kind != "lora":
        what = "a GGUF model" if kind is None else f"a GGUF adapter of type {kind!r}"
        raise FormatError(f"is {what}, not a LoRA", file=os.fspath(path), hint="name a LoRA in GGUF")
    tensors = {}
    for tensor in reader.tensors:
        dtype = tensor.tensor_type.name
        if dtype not in _FLOATS:
            raise FormatError(
                f"is stored as {dtype}: quantised factors are not read",
                file=os.fspath(path),
                key=tensor.name,
                hint="convert the original again with --outtype f16",
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = LazyTensor(shape, dtype, Held(memoryview(tensor.data.reshape(-1).view("u1"))))
    metadata, types = {}, {}
    for name, (kinds, value) in entries.items():
        names = [one.name for one in kinds]
        if names == ["STRING"]:
            metadata[name] = str(value)
        else:
            metadata[name], types[name] = json.dumps(value), names
    if types:
        metadata[TYPES] = json.dumps(types, sort_keys=True)
    return Bundle(tensors, metadata, {}, os.fspath(path), Path(path).stat().st_size, GGUF)


def write_gguf(path: str | os.PathLike[str], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Writes what `read_gguf` reads; `metadata` names the architecture. The tensors are held in memory meanwhile.

    Raises LoratoolError for a dtype that the file cannot hold.
    """
    gguf = _package()
    writer = gguf.GGUFWriter(os.fspath(path), metadata[ARCHITECTURE])
    types = json.loads(metadata.get(TYPES, "{}"))
    for name, text in metadata.items():
        if name in (ARCHITECTURE, TYPES):
            continue
        kinds = [gguf.GGUFValueType[kind] for kind in types.get(name, ["STRING"])]
        value = json.loads(text) if name in types else text
        writer.add_key_value(name, value, *kinds[:2])
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise LoratoolError(f"GGUF holds no {tensor.dtype} factors", key=name, hint="--dtype fp16, bf16 or fp32")
        width = tensor.shape[-1] * DTYPES[tensor.dtype] // 8
        array = tensor.octets().reshape(*tensor.shape[:-1], width)
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LoratoolError(
            "is a GGUF file, and the package gguf is not installed", hint="pip install 'loratool[gguf]'"
        ) from error
    return gguf
