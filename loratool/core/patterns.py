"""Expressions from files, matched in bounded time: the author is a stranger, and Python's own matcher can take years.

An expression becomes an automaton that is in all its states at once (Thompson 1968), so that a text is read once from
left to right whatever the expression. What that cannot do (look around, back references, flags) is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

try:
    from re import _parser as _sre  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _sre

MOST_CHARACTERS = 1 << 18
"""An expression at most so long is looked at."""

MOST_STATES = 20_000
_LONGEST_TEXT = 4096
_MOST_CACHED = 20_000
_MOST_ENDLESS = 4


class Unsafe(ValueError):
    """An expression that is not run, and why."""


class Bounded:
    """An expression that reads any text in time proportional to its length.

    Raises re.error where it is no expression, Unsafe where it needs more than one reading from left to right, or more
    than MOST_STATES states.
    """

    def __init__(self, expression: str) -> None:
        self.accepting = 0
        self.steps: list[list[tuple[Callable[[str], bool], int]]] = [[]]
        self.jumps: list[list[tuple[str, int]]] = [[]]
        self._cache: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._rounds = 0
        try:
            self.accepting = self._build(_parsed(expression), 0)
        except RecursionError:
            raise Unsafe("it is nested too deeply") from None
        self._start = self._closed({0}, True)

    def match(self, text: str) -> bool:
        """Whether the whole of `text` is what the expression says."""
        if len(text) > _LONGEST_TEXT:
            return False
        states = self._start if text else self._closed({0}, True, True)
        last = len(text) - 1
        for at, char in enumerate(text):
            states = self._after(states, char) if at < last else self._closed(self._moved(states, char), False, True)
            if not states:
                return False
        return self.accepting in states

    def _after(self, states: frozenset[int], char: str) -> frozenset[int]:
        found = self._cache.get((states, char))
        if found is None:
            if len(self._cache) >= _MOST_CACHED:
                self._cache.clear()
            found = self._cache[states, char] = self._closed(self._moved(states, char), False)
        return found

    def _moved(self, states: Iterable[int], char: str) -> set[int]:
        return {after for state in states for test, after in self.steps[state] if test(char)}

    def _closed(self, states: set[int], begins: bool, ends: bool = False) -> frozenset[int]:
        """With every state that is reached without reading."""
        found, rest = set(states), list(states)
        while rest:
            for condition, after in self.jumps[rest.pop()]:
                if after in found or (condition == "^" and not begins) or (condition == "$" and not ends):
                    continue
                found.add(after)
                rest.append(after)
        return frozenset(found)

    # -- building

    def _state(self) -> int:
        if len(self.steps) >= MOST_STATES:
            raise Unsafe("it is too large")
        self.steps.append([])
        self.jumps.append([])
        return len(self.steps) - 1

    def _build(self, parts: Any, state: int) -> int:
        """Adds what reads `parts` behind `state`; the state behind it."""
        for op, argument in parts:
            state = self._part(str(op), argument, state)
        return state

    def _part(self, op: str, argument: Any, state: int) -> int:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            after = self._state()
            self.steps[state].append((_test(op, argument), after))
            return after
        if op == "BRANCH":
            end = self._state()
            for branch in argument[1]:
                begin = self._state()
                self.jumps[state].append(("", begin))
                self.jumps[self._build(branch, begin)].append(("", end))
            return end
        if op == "SUBPATTERN":
            if argument[1] or argument[2]:
                raise Unsafe("it switches flags")
            return self._build(argument[3], state)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(argument[0], argument[1], argument[2], state)
        if op == "AT" and str(argument) in ("AT_BEGINNING", "AT_BEGINNING_STRING", "AT_END", "AT_END_STRING"):
            after = self._state()
            self.jumps[state].append(("^" if "BEGINNING" in str(argument) else "$", after))
            return after
        raise Unsafe("it looks around or back")

    def _repeated(self, least: int, most: int, parts: Any, state: int) -> int:
        self._rounds += least if most == _sre.MAXREPEAT else most
        if self._rounds > MOST_STATES:
            raise Unsafe("it is too large")
        endless = most == _sre.MAXREPEAT
        # The last one that must be there is the one that repeats: copies of nested ones would double each time.
        for _ in range(least - 1 if endless else least):
            state = self._build(parts, state)
        if endless and least:
            begin = self._state()
            self.jumps[state].append(("", begin))
            end = self._build(parts, begin)
            self.jumps[end].append(("", begin))
            return end
        if endless:
            begin = self._state()
            self.jumps[state].append(("", begin))
            end = self._build(parts, begin)
            self.jumps[end].append(("", begin))
            after = self._state()
            self.jumps[begin].append(("", after))
            return after
        after = self._state()
        for _ in range(most - least):
            self.jumps[state].append(("", after))
            state = self._build(parts, state)
        self.jumps[state].append(("", after))
        return after


class Name(NamedTuple):
    """A text that an expression lists; `whole` says that nothing may stand before it (`^name`)."""

    text: str
    whole: bool


def names(expression: str) -> tuple[Name, ...] | None:
    """The names that an expression lists and nothing else (`^a\\.b`, `(a)|(c)`); None if it is of another kind."""
    try:
        found = [_name(list(parts)) for parts in _branches(_parsed(expression))]
    except (Unsafe, re.error, RecursionError):
        return None
    return None if None in found else tuple(name for name in found if name is not None)


def explosive(expression: str) -> bool:
    """Whether Python's matcher may take forever: a repeated group that repeats inside or has alternatives, or more than
    four repetitions without an end."""
    try:
        return _explosive(_parsed(expression), False) or _endless(_parsed(expression)) > _MOST_ENDLESS
    except (Unsafe, re.error, RecursionError):
        return False


def _parts(op: str, argument: Any) -> list[Any]:
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        return [argument[2]]
    return list(argument[1]) if op == "BRANCH" else [argument[3]] if op == "SUBPATTERN" else []


def _explosive(parts: Any, repeated: bool) -> bool:
    for op, argument in parts:
        repeats = str(op) in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] > 1
        if repeated and ((repeats and argument[0] != argument[1]) or str(op) == "BRANCH"):
            return True
        if any(_explosive(inner, repeated or repeats) for inner in _parts(str(op), argument)):
            return True
    return False


def _endless(parts: Any) -> int:
    own: int = sum(str(op) in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] == _sre.MAXREPEAT for op, argument in parts)
    return own + sum(_endless(inner) for op, argument in parts for inner in _parts(str(op), argument))


def _name(parts: list[Any]) -> Name | None:
    whole = bool(parts) and str(parts[0][1]) == "AT_BEGINNING"
    ends = len(parts) > whole and str(parts[-1][1]) == "AT_END"
    letters = parts[whole : len(parts) - ends]
    if any(str(op) != "LITERAL" for op, _ in letters):
        return None
    return Name("".join(chr(code) for _, code in letters), whole)


def _branches(parts: Any) -> list[Any]:
    parts = list(parts)
    if len(parts) == 1:
        op, argument = str(parts[0][0]), parts[0][1]
        if op == "BRANCH":
            return [inner for branch in argument[1] for inner in _branches(branch)]
        if op == "SUBPATTERN" and not argument[1] and not argument[2]:
            return _branches(argument[3])
    return [parts]


def _parsed(expression: str) -> Any:
    if len(expression) > MOST_CHARACTERS:
        raise Unsafe("it is too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = _sre.parse(expression)
    except (RecursionError, OverflowError, MemoryError):
        raise Unsafe("it is nested too deeply") from None
    if parsed.state.flags & ~re.UNICODE:
        raise Unsafe("it switches flags")
    return parsed


def _test(op: str, argument: Any) -> Callable[[str], bool]:
    """The function that says whether a character is meant."""
    if op == "LITERAL":
        wanted = chr(argument)
        return lambda char: char == wanted
    if op == "NOT_LITERAL":
        unwanted = chr(argument)
        return lambda char: char != unwanted
    if op == "ANY":
        return lambda char: char != "\n"
    negated = bool(argument) and str(argument[0][0]) == "NEGATE"
    tests = [_member(str(kind), what) for kind, what in argument[negated:]]
    return lambda char: any(test(char) for test in tests) != negated


def _member(kind: str, what: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda char: ord(char) == what
    if kind == "RANGE":
        return lambda char: bool(what[0] <= ord(char) <= what[1])
    category = str(what)
    inside = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}[category.rpartition("_")[2]]
    outside = "_NOT_" in category
    return lambda char: inside(char) != outside


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
