"""Sparklines: a falling curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.,:-=+#"
"""The same in ASCII."""

FLOOR = 1e-6
"""What is smaller than this share of the largest value looks the same."""


def can_show(encoding: str) -> bool:
    """Whether text in this encoding can hold the blocks."""
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def spark(values: Sequence[float], cut: int, width: int, blocks: bool = True) -> str:
    """Positive values on a log scale in at most `width` characters, `|` after the first `cut` of them."""
    count = min(width - 1, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [math.fsum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    marks = BLOCKS if blocks else PLAIN
    top = max(means)
    depth = -math.log(max(min(means) / top, FLOOR))
    heights = [max(0.0, 1 + math.log(max(mean / top, FLOOR)) / depth) if depth > 1e-9 else 1.0 for mean in means]
    line = [marks[round(height * (len(marks) - 1))] for height in heights]
    line.insert(sum(edge <= cut for edge in edges[1:]), "|")
    return "".join(line)
