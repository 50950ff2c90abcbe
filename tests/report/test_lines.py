"""Lines for people: where they may end, how names are shortened, and that no blanks are left behind."""

from __future__ import annotations

from io import StringIO
from typing import Literal

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from loratool.ops.made import Held
from loratool.report.lines import Name, Told, Trimmed, facts, glued, numbers, shortened
from loratool.report.units import few, ranks, short, spread
from loratool.report.verified import verified


def printed(*things: object, width: int = 40, terminal: bool = False) -> str:
    stream = StringIO()
    colours: Literal["standard"] | None = "standard" if terminal else None
    console = Console(file=stream, width=width, force_terminal=terminal, highlight=False, color_system=colours)
    console.push_render_hook(Trimmed())
    for thing in things:
        console.print(thing)
    return stream.getvalue()


@pytest.mark.parametrize("width", range(24, 70))
def test_numbers_keep_their_units(width: int) -> None:
    text = "19 modules, rank 16 x264, 4 x50, 8 x36, 276.5 KiB: relative error 0.13"
    lines = printed(facts([("read", text, "")]), width=width).splitlines()
    assert "".join(line[10:] + " " for line in lines).strip() == text
    for line in lines[:-1]:
        assert line.endswith((",", ":", "relative")), line
    assert all(cell_len(line) <= width for line in lines)


def test_glued_text_stays_together() -> None:
    assert (
        printed(Padding(Told("  ".join([glued("--sign total"), glued("--seed 0")])), 0), width=16)
        == "--sign total\n--seed 0\n"
    )


def test_no_blanks_at_the_ends_of_lines() -> None:
    table = numbers("name", "n")
    table.add_row("a", "1", style="bold")
    table.add_row("a longer one", "")
    text = printed(facts([("title", "text", "green"), ("", "", "")]), table, Text("x   "), "")
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "title     text" in text and text.endswith("x\n\n")


def test_colours_stay_on_terminals() -> None:
    text = printed(facts([("title", "text", "green")]), terminal=True)
    assert "\x1b[32mtext\x1b[0m\n" in text


def test_long_lines_that_are_to_be_copied_stay_one() -> None:
    stream = StringIO()
    console = Console(file=stream, width=20)
    console.push_render_hook(Trimmed())
    console.print(Text("1," * 40), soft_wrap=True)
    assert stream.getvalue() == "1," * 40 + "\n"


LONG = [
    "unet.down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
    "transformer.single_transformer_blocks.12.attn.to_q",
    "transformer.12.to_out.0",
    "a" * 90,
    "x.y." + "漢" * 60 + ".0.k",
]


@pytest.mark.parametrize("name", LONG)
def test_names_fit(name: str) -> None:
    for width in range(1, 100):
        short_one = shortened(name, width)
        assert cell_len(short_one) <= width
        assert (short_one == name) == (cell_len(name) <= width)


def test_what_tells_names_apart_stays() -> None:
    assert shortened(LONG[1], 46) == "text_encoder.text...yers.11.self_attn.out_proj"
    assert shortened(LONG[2], 46) == "transformer.single_tr...er_blocks.12.attn.to_q"
    first, second = (shortened(LONG[0].replace("attentions.1", f"attentions.{n}"), 46) for n in (1, 2))
    assert first != second and first.startswith("unet.") and first.endswith(".0.proj")


def test_a_name_takes_one_line_of_a_table() -> None:
    table = numbers("module", "rank")
    for name in LONG[:3]:
        table.add_row(Name(name), "8 -> 4")
    lines = printed(table, width=50).splitlines()
    assert len(lines) == 4 and all(line.endswith("8 -> 4") for line in lines[1:])


def test_short_words() -> None:
    assert (spread([8, 64, 32]), spread([4, 4])) == ("8/32/64", "4")
    assert (short(0.0), short(0.12345)) == ("0", "0.12")
    assert ranks({6: 10, 4: 6}) == "6 x10, 4 x6"
    assert (few("ab"), few("abcde")) == ("a, b", "a, b, c, +2 more")


def held(error: float, coarse: tuple[str, ...] = ()) -> Held:
    return Held(modules=5, error=error, worst=0.5, worst_module="m", coarse=coarse)


def test_verified() -> None:
    assert [text for _, text, _ in verified(None, 0.1)] == ["no (--no-verify)"]
    ((_, exact, style),) = verified(held(2e-4), 0.0)
    assert (exact, style) == ("5 updates read back: relative error 0.0002, rounding included", "green")
    ((_, cut, _),) = verified(held(0.39), 0.44)
    assert cut == "5 updates read back, as far off as computed"
    first, second = verified(held(0.39, ("m", "n")), 0.44)
    assert first[1] == "5 updates read back, all but 2 as far off as computed"
    assert second[0] == "coarse" and second[1].endswith("perhaps: m, n; the worst is off by 0.5")
    assert "worst" not in list(verified(held(0.39, ("n",)), 0.44))[1][1]
