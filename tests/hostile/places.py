"""Hostile places and folders: what stands at a path, PEFT folders and sharded checkpoints, one a line."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.hostile.bytes import Tensor, file, packed, tensor
from tests.hostile.cases import Case

PATHS = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{part}" for part in ("q", "k", "v", "out.0")]
DEAD = "(" * 20 + "a" + "+)" * 20 + "$"
SHARD = "model-0000{}-of-00002.safetensors"

Make = Callable[[Path], None]


def module(path: str, rank: int = 4) -> dict[str, Tensor]:
    """One PEFT module."""
    stem = f"base_model.model.{path}"
    return {f"{stem}.lora_A.weight": tensor("F16", (rank, 320)), f"{stem}.lora_B.weight": tensor("F16", (320, rank))}


def weights() -> bytes:
    """The tensors of a PEFT adapter."""
    found: dict[str, Tensor] = {}
    for path in PATHS:
        found |= module(path)
    return file(found, {"format": "pt"})


def config(**changed: Any) -> dict[str, Any]:
    """A config that fits the weights."""
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    return {name: value for name, value in {**usual, **changed}.items() if value is not ...}


def peft(text: str | bytes | None = None, **changed: Any) -> Make:
    """A PEFT folder with a config, or with this text for one."""

    def make(path: Path) -> None:
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(weights())
        raw = json.dumps(config(**changed)) if text is None else text
        (path / "adapter_config.json").write_bytes(raw.encode() if isinstance(raw, str) else raw)

    return make


def also(make: Make, *more: Callable[[Path], object]) -> Make:
    """The folder, and then something done to it."""

    def both(path: Path) -> None:
        make(path)
        for one in more:
            one(path)

    return both


def without(name: str) -> Callable[[Path], object]:
    """Removes a file."""
    return lambda path: (path / name).unlink()


def instead(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    """Puts something in the place of a file."""

    def replace(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        put(path / name)

    return replace


def link(target: str) -> Callable[[Path], object]:
    """A link."""
    return lambda path: path.symlink_to(target)


def a_socket(path: Path) -> None:
    """A socket; its name may be too long for one, so that it is made in a short folder and moved."""
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            listening.bind(path.name[:60])
        finally:
            os.chdir(here)
        if path.name[:60] != path.name:
            (path.parent / path.name[:60]).rename(path)


def a_loop(path: Path) -> None:
    """Two links that name each other."""
    path.symlink_to(path.name + ".2")
    Path(f"{path}.2").symlink_to(path.name)


def folder_loop(path: Path) -> None:
    """A folder with a link to itself, and one to the folder above."""
    path.mkdir()
    (path / "again").symlink_to(".")
    (path / "unet").symlink_to("..")
    (path / "adapter_model.safetensors").write_bytes(weights())
    (path / "adapter_config.json").write_text(json.dumps(config()))


def sparse(path: Path) -> None:
    """2.4 GB of nothing behind the claim of a header of 100 MB."""
    with path.open("wb") as out:
        out.write((100_000_000).to_bytes(8, "little") + b"{")
        out.truncate(2_400_000_000)


def sparse_lora(path: Path) -> None:
    """A well-formed file of 2.4 GB of zeros."""
    size = 1_200_000_000
    header = {
        "lora_unet_conv_in.lora_down.weight": {"dtype": "U8", "shape": [4, size // 4], "data_offsets": [0, size]},
        "lora_unet_conv_in.lora_up.weight": {"dtype": "U8", "shape": [size // 4, 4], "data_offsets": [size, 2 * size]},
    }
    raw = packed(header)
    with path.open("wb") as out:
        out.write(raw)
        out.truncate(len(raw) + 2 * size)


def many_keys(count: int) -> Make:
    """A well-formed file with very many tensors."""

    def make(path: Path) -> None:
        entries, end = [], 0
        for number in range(count // 2):
            for name, shape in (("down", "4,1"), ("up", "1,4")):
                key = f"lora_unet_blocks_{number}.lora_{name}.weight"
                entries.append(f'"{key}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{end},{end + 4}]}}')
                end += 4
        path.write_bytes(packed(f"{{{','.join(entries)}}}", b"\1" * end))

    return make


def sharded(index: Any = None, **files: bytes | None) -> Make:
    """A checkpoint of two shards; `index` changes its weight_map or replaces it, `files` its shards."""

    def make(path: Path) -> None:
        path.mkdir()
        for number, name in (("1", "a"), ("2", "b")):
            raw = files.get(name, file({f"{name}.weight": tensor("F16", (4, 4))}))
            if raw is not None:
                (path / SHARD.format(number)).write_bytes(raw)
        usual: Any = {"a.weight": SHARD.format(1), "b.weight": SHARD.format(2)}
        usual = {**usual, **index} if isinstance(index, Mapping) else usual
        text = index if isinstance(index, str) else json.dumps({"metadata": {"total_size": 64}, "weight_map": usual})
        (path / "model.safetensors.index.json").write_text(text)

    return make


def place(name: str, make: Make, found: str, says: str | None = None) -> Case:
    """A case that is made at a path."""
    return Case(name, make, found, says, place=True)


SPECIAL = [
    place("nothing", lambda path: None, "not-found", "no such file"),
    place("a pipe", lambda path: os.mkfifo(path), "is-special", "is a pipe"),
    place("a socket", a_socket, "is-special", "is a socket"),
    place("/dev/zero", link("/dev/zero"), "is-special", "is a device"),
    place("/dev/null", link("/dev/null"), "is-special", "is a device"),
    place("/dev/urandom", link("/dev/urandom"), "is-special", "is a device"),
    place("/dev/tty", link("/dev/tty"), "is-special", "is a device"),
    place("a loop of links", a_loop, "link-loop", "cannot be"),
    place("a link to nothing", link("nowhere"), "not-found", "no such file"),
    place("a link to a text", link("/etc/passwd"), "is-text", "plain text"),
    place("/proc/self/mem", link("/proc/self/mem"), "is-empty", None),
    place("an empty folder", lambda path: path.mkdir(), "no-adapter-here", "is a folder without"),
    place("a folder with a loop", folder_loop, "", ""),
    place("2.4 GB of nothing", sparse, "nul-byte", "not valid JSON"),
    place("2.4 GB of zeros", sparse_lora, "numbers-skipped", ""),
    place("200,000 tensors", many_keys(200_000), "unknown-model", "200,000 tensors"),
    place("10,000 tensors", many_keys(10_000), "unknown-model", ""),
]

CONFIGS = [
    place("clean PEFT", peft(), "", ""),
    place("PEFT with patterns", peft(rank_pattern={}, alpha_pattern={r".*\.to_q": 8, "^nope$": 2}), "pattern-unmatched", ""),
    place("no config", also(peft(), without("adapter_config.json")), "config-missing", ""),
    place("no weights", also(peft(), without("adapter_model.safetensors")), "not-found", "has adapter_config.json but no"),
    place("config empty", peft(""), "config-broken", "not JSON"),
    place("config not JSON", peft("{nonsense"), "config-broken", "not JSON"),
    place("config a list", peft("[1]"), "config-broken", "not a JSON object"),
    place("config not UTF-8", peft(b'{"r": "\xff"}'), "config-broken", "not UTF-8"),
    place("config deep", peft("[" * 100_000), "config-broken", "JSON"),
    place("config of 17 MB", peft(" " * (17 << 20)), "config-broken", "larger than 16 MiB"),
    place("config with a huge number", peft('{"r": ' + "9" * 10_000 + "}"), "config-broken", "not JSON"),
    place("config a pipe", also(peft(), instead("adapter_config.json", os.mkfifo)), "shard-special", None),
    place("config /dev/zero", also(peft(), instead("adapter_config.json", link("/dev/zero"))), "shard-special", None),
    place("config a link outside", also(peft(), instead("adapter_config.json", link("/etc/passwd"))), "link-outside config-broken", "JSON"),
    place("weights a pipe", also(peft(), instead("adapter_model.safetensors", os.mkfifo)), "is-special", None),
    place("weights /dev/zero", also(peft(), instead("adapter_model.safetensors", link("/dev/zero"))), "is-special", None),
    place("weights a pickle", also(peft(), instead("adapter_model.safetensors", lambda p: p.write_bytes(b"\x80\x02}q\0."))), "is-pickle", "pickle"),
    place("weights a git-lfs pointer", also(peft(), instead("adapter_model.safetensors", lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"))), "is-git-lfs", "git lfs pull"),
    place("of another kind", peft(peft_type="LOHA"), "config-kind", "LOHA"),
    place("r 0", peft(r=0), "config-rank", None),
    place("r -4", peft(r=-4), "config-rank", None),
    place("r a text", peft(r="4"), "config-field", None),
    place("r true", peft(r=True), "config-field", None),
    place("r a fraction", peft(r=4.5), "config-field", None),
    place("r null", peft(r=None), "config-field", None),
    place("r another", peft(r=8), "config-rank-differs", ""),
    place("lora_alpha a text", peft(lora_alpha="4"), "config-field", "expected a number"),
    place("lora_alpha NaN", peft(lora_alpha=float("nan")), "config-field", "expected a number"),
    place("lora_alpha 1e999", peft(json.dumps(config(lora_alpha=0)).replace(": 0", ": 1e999")), "config-field", "expected a number"),
    place("lora_alpha 10^400", peft(lora_alpha=10**400), "config-field", None),
    place("lora_alpha 0", peft(lora_alpha=0), "alpha-zero", ""),
    place("lora_alpha -4", peft(lora_alpha=-4), "alpha-negative", ""),
    place("rank_pattern a list", peft(rank_pattern=[1]), "config-field", None),
    place("rank_pattern of texts", peft(rank_pattern={"to_q": "4"}), "config-field", None),
    place("rank_pattern with 0", peft(rank_pattern={"to_q": 0}), "config-rank", None),
    place("alpha_pattern a text", peft(alpha_pattern="x"), "config-field", "expected a map"),
    place("alpha_pattern of lists", peft(alpha_pattern={"to_q": [1]}), "config-field", "expected a number"),
    place("target_modules a number", peft(target_modules=3), "config-field", None),
    place("target_modules of objects", peft(target_modules=[{}]), "config-field", None),
    place("target_modules of strangers", peft(target_modules=["to_q", "to_k", "to_v", "to_out.0", "c_attn"]), "pattern-unmatched", ""),
    place("a pattern of strangers", peft(target_modules=r".*\.c_attn"), "pattern-unmatched", ""),
    place("a pattern that is none", peft(target_modules="(to_q"), "pattern-broken", ""),
    place("a pattern that is none, alpha", peft(alpha_pattern={"*q": 3}), "pattern-broken", "not a regular expression"),
    place("(a+)+$ as target", peft(target_modules="(t+)+$"), "pattern-unsafe", ""),
    place("(a|a)*$ as rank", peft(rank_pattern={"(.|[a-z])*x": 4}), "pattern-unsafe", ""),
    place("(.*)*x as alpha", peft(alpha_pattern={"(.*)*x": 4}), "pattern-unsafe", ""),
    place("20 nested + as alpha", peft(alpha_pattern={DEAD: 4}), "pattern-unsafe", ""),
    place("(.*a){30} as excluded", peft(exclude_modules="(.*a){30}"), "pattern-unsafe", ""),
    place("six endless ones", peft(exclude_modules=".*.*.*.*.*.*x"), "pattern-unsafe", ""),
    place("a back reference", peft(alpha_pattern={r"(.*)\1": 4}), "pattern-unsafe", "not run"),
    place("looking ahead", peft(alpha_pattern={"(?=.*to_q).*": 4}), "pattern-unsafe", "not run"),
    place("flags", peft(alpha_pattern={"(?i:TO_Q)": 4}), "pattern-unsafe", "not run"),
    place("a{60000}", peft(alpha_pattern={"a{60000}": 4}), "pattern-unsafe", "not run"),
    place("5,000 brackets", peft(alpha_pattern={"(" * 5000 + ")" * 5000: 4}), "pattern-unsafe", "not run"),
    place("a pattern of 1 MB", peft(alpha_pattern={"a" * (1 << 20): 4}), "pattern-unsafe", "not run"),
    place("2,000 patterns", peft(alpha_pattern={rf".*block_{n}\..*": n for n in range(1, 2000)}), "pattern-unmatched", ""),
    place("auto_mapping", peft(auto_mapping={"base_model_class": "os", "parent_library": "os"}), "config-code", ""),
    place("megatron_core", peft(megatron_core="evil.core", megatron_config={"x": 1}), "config-code", ""),
    place("trust_remote_code", peft(trust_remote_code=True), "config-code", ""),
    place("base model a path", peft(base_model_name_or_path="../../../etc/passwd"), "", ""),
]  # fmt: skip

SHARDS = [
    place("clean shards", sharded(), "", None),
    place("index empty", sharded(""), "index-broken", None),
    place("index not JSON", sharded("{"), "index-broken", None),
    place("index a list", sharded("[]"), "index-broken", None),
    place("index without a map", sharded("{}"), "index-broken", None),
    place("index of numbers", sharded({"a.weight": 3}), "index-broken", None),
    place("index deep", sharded("[" * 100_000), "index-broken", None),
    place("index a pipe", also(sharded(), instead("model.safetensors.index.json", os.mkfifo)), "shard-special", None),
    place("shard missing", sharded(b=None), "shard-missing", None),
    place("shard lacks a tensor", sharded({"c.weight": SHARD.format(1)}), "shard-lacks", None),
    place(
        "shard with more", sharded(a=file({f"{n}.weight": tensor("F16", (4, 4)) for n in "az"})), "shard-extra", None
    ),
    place("shard cut", sharded(a=file({"a.weight": tensor("F16", (4, 4))})[:-3]), "truncated", None),
    place("shard with NaN", sharded(a=file({"a.weight": ("F16", (1,), b"\0\x7e")})), "not-finite", None),
    place("shard a pickle", sharded(a=b"\x80\x02}q\0."), "is-pickle", None),
    place("shard ../", sharded({"a.weight": "../../etc/passwd"}), "path-outside", None),
    place("shard absolute", sharded({"a.weight": "/etc/passwd"}), "path-outside", None),
    place("shard of Windows", sharded({"a.weight": "..\\..\\x.safetensors"}), "path-outside", None),
    place("shard with a drive", sharded({"a.weight": "C:x.safetensors"}), "path-outside", None),
    place("shard ..", sharded({"a.weight": ".."}), "path-outside", None),
    place("shard without a name", sharded({"a.weight": ""}), "path-outside", None),
    place("shard with NUL", sharded({"a.weight": "a\0b"}), "path-outside", None),
    place(
        "shard a link outside",
        also(sharded(), instead(SHARD.format(1), link("/etc/passwd"))),
        "link-outside is-text",
        None,
    ),
    place(
        "shard /dev/zero",
        also(sharded(), instead(SHARD.format(1), link("/dev/zero"))),
        "shard-special link-outside",
        None,
    ),
    place("shard a pipe", also(sharded(), instead(SHARD.format(1), os.mkfifo)), "shard-special", None),
    place(
        "shard a folder", also(sharded(a=None), lambda path: (path / SHARD.format(1)).mkdir()), "shard-missing", None
    ),
]

PLACES = [*SPECIAL, *CONFIGS, *SHARDS]
