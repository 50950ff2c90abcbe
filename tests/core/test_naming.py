"""A naming finds what a text reads as, also where names read alike or hold line breaks."""

from __future__ import annotations

from loratool.core.naming import Naming, kind
from loratool.core.target import Target


def naming(**shapes: tuple[int, ...]) -> Naming:
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return Naming({name: (Target("model", name, shape),) for name, shape in names.items()})


def test_names_that_read_alike() -> None:
    """`a.b` and `a_b` are both spelled `a_b`."""
    one = naming(a__b=(2, 2), a_b=(3, 3), c__d=(4, 4))
    assert one.spelled("a_b", "_") == ("a.b", "a_b") and one.spelled("c_d", "_") == ("c.d",)
    assert one.spelled("a_b", ".") == ("a_b",) and not one.spelled("b", "_")
    assert list(one.alike("a_b", "_")) == ["a.b", "a_b"]


def test_one_name_of_each_kind_and_shape() -> None:
    one = naming(b__0__q=(2, 2), b__1__q=(2, 2), b__2__q=(4, 2), b__0__v=(2, 2))
    assert list(one.alike(kind("b_7_q"), "_")) == ["b.0.q", "b.2.q"]
    assert list(one.alike(kind("b.7.v"), ".")) == ["b.0.v"] and not one.alike("b_#_k", "_")


def test_line_breaks_in_names() -> None:
    """Nobody writes such, but a checkpoint may hold them."""
    one = Naming({name: (Target("model", name, (2, 2)),) for name in ("a\nb.0", "c.1")})
    assert one.spelled("a\nb_0", "_") == ("a\nb.0",) and one.spelled("c_1", "_") == ("c.1",)
    assert list(one.alike("a\nb_#", "_")) == ["a\nb.0"]
