"""Writes docs/findings.md's tables: every code with its meaning and an example that a hostile file gave.

`python -m tests.hostile.make_findings` prints them; `tests/hostile/test_findings.py` compares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from loratool.core.finding import Finding
from loratool.core.registry import checks
from loratool.ops.validate import validate
from loratool.report.inert import inert
from tests.hostile.cases import FILES
from tests.hostile.places import PLACES

WITHOUT_CASE = {
    "file-changed": "became shorter while it was read: no data at byte 8192, expected 24576 bytes",
    "cannot-be-opened": "cannot be opened: Permission denied",
    "base-unusable": "is a checkpoint of Stable Diffusion XL, the adapter is for Stable Diffusion 1.x",
    "not-in-base": "unet.mid_block.attentions.0.proj_in is not in base.safetensors",
    "base-shape": "the base weight is [640, 640], the adapter's [320, 320]",
    "ambiguous-model": "could be any of sd15, sdxl",
    "unread-family": "4 modules of the kind glora",
    "cannot-be-read": "peft_type is 'LOHA'; only LORA can be read so far",
}
"""Codes that need more than one file or a moment; tests of their own show them."""

ORDER = ("place", "identity", "container", "adapter", "producer", "numbers", "folder")


@cache
def examples() -> dict[str, Finding]:
    """The first finding of each code that a case gives."""
    found: dict[str, Finding] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate([*FILES, *PLACES]):
            if not set(case.found.split()) - found.keys():
                continue
            place = Path(folder) / str(number)
            place.mkdir()
            case.put(place / "style.safetensors")
            for result in validate(place / "style.safetensors"):
                for finding in result.findings:
                    if finding.code in case.found.split():
                        found.setdefault(finding.code, finding)
    return found


def lines() -> Iterator[str]:
    """The tables, one for each check."""
    for check in (checks()[name] for name in ORDER):
        yield f"## {check.title}"
        yield ""
        yield "| code | severity | meaning | example |"
        yield "|---|---|---|---|"
        for code in check.codes.values():
            yield f"| `{code.id}` | {code.severity} | {code.title} | {example(code.id)} |"
        yield ""


def example(code: str) -> str:
    """One line that was told, without where."""
    message = examples()[code].message if code in examples() else WITHOUT_CASE[code]
    # In a table, `|` ends a cell, and only the beginning of a long message is needed.
    text = inert(message, 110).replace("|", "\\|").replace("`", "'")
    return f"`{text}`"


if __name__ == "__main__":
    print("\n".join(lines()))
