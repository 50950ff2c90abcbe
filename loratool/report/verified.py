"""What reading a merged or resized file back showed, in words."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.ops.made import Held
from loratool.report.inert import inert
from loratool.report.units import few, plural, short


def verified(held: Held | None, error: float) -> Iterator[tuple[str, str, str]]:
    """Title, text and style of the lines that tell it; `error` is the one that was computed.

    Where that is 0, what was measured is rounding. Elsewhere it is an estimate of the number that is already told.
    """
    if held is None:
        yield "verified", "no (--no-verify)", "yellow"
        return
    text = f"{plural(held.modules, 'update')} read back"
    if not held.modules:
        yield "verified", "every tensor read back, the same bytes", "green"
    elif not error:
        yield "verified", f"{text}: relative error {short(held.error)}, rounding included", "green"
    elif held.coarse:
        yield "verified", f"{text}, all but {len(held.coarse):,} as far off as computed", "green"
    else:
        yield "verified", f"{text}, as far off as computed", "green"
    if held.coarse:
        worst = f"; the worst is off by {short(held.worst)}" if held.worst_module in held.coarse else ""
        why = "farther off than computed, too small for the dtype perhaps"
        yield "coarse", f"{plural(len(held.coarse), 'module')} {why}: {few(map(inert, held.coarse))}{worst}", "yellow"
