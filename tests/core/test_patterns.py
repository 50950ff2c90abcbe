"""Expressions of strangers: the same answers as Python's matcher, in bounded time."""

from __future__ import annotations

import random
import re
import time

import pytest

from loratool.core.patterns import Bounded, Name, Unsafe, names

EXPRESSIONS = [
    "a", "a.b", ".*q_proj", "(q|v)_proj", r".*\.(q_proj|v_proj)$", r"(.*\.)?(^foo)$", "[a-c]+x?", "a{2,3}b*", "(a|a)*b",
    "(a+)+$", r"\d+\.\w*", r"[^.]+\.to_q", "(x?){5}x{5}", "(?:ab|a)(?:c|bcd)(d*)", "^$", "a|", r"\S*\D", "a*?b",
]  # fmt: skip
TEXTS = ["", "model.q_proj", "foo", "a.foo", "v_proj", "x.y.v_proj", "aab", "aaaa", "7.to_q", "abcd", "abbcd"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_matches_as_python_does(expression: str) -> None:
    rng = random.Random(expression)
    bounded, python = Bounded(expression), re.compile(expression)
    texts = TEXTS + ["".join(rng.choice("abcdxqv_.17fo") for _ in range(rng.randrange(9))) for _ in range(500)]
    for text in texts:
        assert bounded.match(text) == bool(python.fullmatch(text)), text


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|a)*$", "(a*)*b", "(.*a){20}", "(x+x+)+y", ".*.*.*.*.*.*=.*"])
def test_takes_no_longer_for_the_worst(expression: str) -> None:
    before = time.perf_counter()
    assert not Bounded(expression).match("a" * 300 + "x" * 300 + "!")
    assert time.perf_counter() - before < 2


@pytest.mark.parametrize(
    "expression",
    ["(a*)\\1", "(?=a)b", "(?<!a)b", "(?i)a", "(?i:a)", "(" * 5000 + ")" * 5000, "a{60000}", "((){60000}){60000}",
     "a" * (1 << 19)],
)  # fmt: skip
def test_refuses_what_cannot_be_bounded(expression: str) -> None:
    with pytest.raises(Unsafe):
        Bounded(expression)


def test_knows_lists_of_names() -> None:
    assert names(r"(a\.b)|(^c$)") == (Name("a.b", False), Name("c", True))
    assert names(r"^(a|b)") is None
    assert names("a|b.*") is None
    assert names("(") is None
