"""Singular values drawn block by block, with the cuts: PNG, SVG, or a page of HTML. Needs matplotlib."""

from __future__ import annotations

import html
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.core.errors import LoratoolError, UsageError
from loratool.files.atomic import atomic_write
from loratool.files.bundle import check_output
from loratool.ops.resize import Cut
from loratool.ops.resize_file import ResizeReport
from loratool.ops.summary import Curve, curve, spread
from loratool.report.inert import inert
from loratool.report.units import plural, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".html")

MOST = 120
"""Blocks that are drawn; a model without a table can have thousands."""

_COLOURS = ("#d1495b", "#1b7f5c", "#8a5fbf", "#c77700", "#00798c", "#7a7a7a")
_CURVE = "#2b5c8a"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.parse_math": False,  # a name is no formula
    "svg.hashsalt": "loratool",
    "svg.fonttype": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def check(path: str, inputs: Sequence[str], overwrite: bool) -> None:
    """Raises, before any work, what would be in the way: UsageError for another suffix, LoratoolError if matplotlib is
    missing, or the file is there or cannot be written."""
    if _kind(path) not in KINDS:
        raise UsageError("--plot draws .png, .svg and .html", file=path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise LoratoolError("--plot needs matplotlib", hint="pip install 'loratool[plot]'") from None
    check_output(path, list(inputs), False, overwrite)


def plot(report: ResizeReport, path: str, overwrite: bool = False) -> None:
    """Draws the report to `path`, whose suffix says how. The same report gives the same SVG and HTML, byte for byte.

    Raises LoratoolError if the file is there already (without `overwrite`) or cannot be written.
    """
    with _style():
        figure = _figure(report)
        data = _page(report, _svg(figure)).encode() if _kind(path) == ".html" else _rendered(figure, _kind(path)[1:])
    with atomic_write(path, overwrite) as file:
        file.write_bytes(data)


def _kind(path: str) -> str:
    return Path(path).suffix.lower()


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's settings are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the letters of some name
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _rendered(figure: Figure, kind: str) -> bytes:
    # No date and no version: the same picture is the same file.
    nothing: dict[str, Any] = {"Software": None} if kind == "png" else dict.fromkeys(("Date", "Creator"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, metadata=nothing)
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    text = _rendered(figure, "svg").decode()
    return text[text.index("<svg") :]


# -- the figure -----------------------------------------------------------------------------------------------------


def _figure(report: ResizeReport) -> Figure:
    """One small panel per block, in model order, all on the same scale."""
    from matplotlib.figure import Figure

    blocks = list(_panels(report))[:MOST]
    curves = [curve([report.values[index] for index in places]) for _, places in blocks]
    columns = max(1, min(len(blocks), round(math.sqrt(1.25 * len(blocks))), 12))
    rows = math.ceil(len(blocks) / columns)
    width, height = max(1.75 * columns + 0.7, 6.4), 1.35 * rows + 1.0
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat = [one for row in axes for one in row]
    for index, (axis, (name, places), found) in enumerate(zip(flat, blocks, curves, strict=False)):
        _panel(axis, f"{name} ({len(places)})", found, [_cut(one.modules, places) for one in report.outcomes])
        axis.tick_params(labelbottom=index + columns >= len(blocks), width=0.6, length=2.5)
    for axis in flat[len(blocks) :]:
        axis.set_visible(False)
    _scales(flat[0], curves)
    _words(figure, report, width, height, len(report.blocks))
    return figure


def _panels(report: ResizeReport) -> Iterator[tuple[str, Sequence[int]]]:
    """Name and places of every block, one per component where a block has modules of several."""
    cuts = report.outcomes[0].modules
    for label, places in report.blocks.items():
        parts: dict[str, list[int]] = {}
        for place in places:
            parts.setdefault(cuts[place].component, []).append(place)
        for component, own in parts.items():
            yield (inert(label if len(parts) == 1 else component, 28), own)


def _cut(cuts: Sequence[Cut], places: Sequence[int]) -> tuple[int, int, int]:
    return spread([cuts[place].rank_after for place in places])


def _panel(axis: Axes, title: str, found: Curve, ranks: Sequence[tuple[int, int, int]]) -> None:
    at = range(1, len(found.mean) + 1)
    axis.fill_between(at, found.low, found.high, color=_CURVE, alpha=0.18, linewidth=0)
    axis.plot(at, found.mean, color=_CURVE, linewidth=1.2, marker="." if len(at) < 3 else "")
    for rule, ((least, middle, most), colour) in enumerate(zip(ranks, _cycle(len(ranks)), strict=True)):
        # Dashes that alternate, so that rules with the same rank are all seen; what the ranks range over at the bottom.
        dashes = (4.0 * rule, (4.0, 4.0 * (len(ranks) - 1))) if len(ranks) > 1 else "-"
        axis.axvline(middle, color=colour, linewidth=1.2, linestyle=dashes)
        if least < most:
            height = 0.03 + 0.05 * rule
            axis.plot([least, most], [height] * 2, color=colour, linewidth=2, transform=axis.get_xaxis_transform())
    axis.set_title(title, fontsize=7.5, pad=2.5)
    axis.grid(True, which="major", linewidth=0.3, color="#d8d8d8")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _scales(axis: Axes, curves: Sequence[Curve]) -> None:
    """Log scale; no lower than a millionth of the largest value, so that dead values do not flatten the rest."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    values = [value for one in curves for value in (*one.low, *one.high)]
    if values:
        top, bottom = max(values) * 1.5, max(min(values) / 1.5, max(values) * 1e-6)
        axis.set_yscale("log")
        axis.set_ylim(bottom, top)
        # With few powers of ten in sight, also what is between them.
        subs = (
            (1.0,) if top / bottom > 100 else (1.0, 2.0, 5.0) if top / bottom > 8 else tuple(map(float, range(1, 10)))
        )
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlim(0, max((len(one.mean) for one in curves), default=1) + 1)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _words(figure: Figure, report: ResizeReport, width: float, height: float, blocks: int) -> None:
    """Title, axes and legend, at sizes in inches whatever the size of the figure."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    name = inert(os.path.basename(os.path.normpath(report.source)), 60)
    left_out = f", the first {MOST} blocks" if blocks > MOST else ""
    figure.suptitle(
        f"{name}: singular values per block (modules){left_out}", x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top"
    )
    handles: list[Any] = [Line2D([], [], color=_CURVE, linewidth=1.2, label="mean")]
    handles.append(Patch(facecolor=_CURVE, alpha=0.18, label="least to largest"))
    for one, colour in zip(report.outcomes, _cycle(len(report.outcomes)), strict=True):
        handles.append(Line2D([], [], color=colour, linewidth=1.2, label=f"{one.rule}: {size(one.size_after)}"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.28 / height),
        ncols=max(1, min(len(handles), int(width // 2.1))),
        frameon=False,
        fontsize=7.5,
    )
    lines = math.ceil(len(handles) / max(1, int(width // 2.1)))
    figure.supxlabel("index of the singular value", y=0.06 / height, va="bottom", fontsize=8)
    figure.supylabel("singular value", x=0.06 / width, ha="left", fontsize=8)
    figure.subplots_adjust(
        left=0.72 / width,
        right=1 - 0.12 / width,
        bottom=0.48 / height,
        top=1 - (0.58 + 0.17 * lines) / height,
        wspace=0.12,
        hspace=0.32,
    )


# -- the page -------------------------------------------------------------------------------------------------------

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { font: 14px sans-serif; margin: 1.5em; color: #222; background: #fff; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin-top: 1em; }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { position: sticky; top: 0; background: #fff; }
th button { font: inherit; font-weight: bold; background: none; border: 0; padding: 0; cursor: pointer; }
</style>
"""

_SCRIPT = """<script>
const body = document.querySelector("tbody");
const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
document.querySelectorAll("th button").forEach((button, column) => {
  let up = false;
  button.onclick = () => {
    up = !up;
    const rows = [...body.rows].sort((a, b) => column > 1
      ? key(a, column) - key(b, column)
      : key(a, column).localeCompare(key(b, column), "en", { numeric: true }));
    body.append(...(up ? rows : rows.reverse()));
  };
});
</script>
"""


def _page(report: ResizeReport, svg: str) -> str:
    """One page that needs nothing else: the drawing and a table of all modules that sorts by any column."""
    title = _escaped(f"{os.path.basename(os.path.normpath(report.source))}: resize")
    titles = ["module", "block", "rank"]
    for one in report.outcomes:
        titles += [f"{one.rule}: rank", "energy", "error", "bytes saved"]
    head = "".join(f'<th scope="col"><button type="button">{_escaped(text)}</button></th>' for text in titles)
    rows = "\n".join(f"<tr>{cells}</tr>" for cells in _rows(report))
    about = f"{report.layout_before}, {report.architecture_title}, {plural(len(report.values), 'module')}"
    lines = [f"{about}, {size(report.size_before)}"] + [
        f"{one.rule}: {size(one.size_after)}, {one.energy:.2%} of the energy, relative error {one.error:.2g}"
        for one in report.outcomes
    ]
    paragraphs = "".join(f"<p>{_escaped(line)}</p>\n" for line in lines)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n"
    start = f"{_HEAD}<title>{title}</title>\n</head>\n<body>\n<h1>{title}</h1>\n"
    return f"{start}{paragraphs}{svg}\n{table}{_SCRIPT}</body>\n</html>\n"


def _rows(report: ResizeReport) -> Iterator[str]:
    labels = {place: label for label, places in report.blocks.items() for place in places}
    for place, cut in enumerate(report.outcomes[0].modules):
        cells = [f"<td>{_escaped(cut.title)}</td>", f"<td>{_escaped(labels[place])}</td>", _number(cut.rank_before)]
        for one in report.outcomes:
            made = one.modules[place]
            cells += [_number(made.rank_after), _number(made.energy, f"{made.energy:.2%}")]
            cells += [_number(made.error, f"{made.error:.2g}"), _number(made.bytes_before - made.bytes_after)]
        yield "".join(cells)


def _number(value: float, text: str | None = None) -> str:
    return f'<td data-value="{value!r}">{text if text is not None else format(value, ",")}</td>'


def _escaped(text: str) -> str:
    return html.escape(inert(text, 300))
