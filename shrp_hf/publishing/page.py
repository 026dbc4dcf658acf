"""What HTML reports share: one file that opens without a network, a frontier to look into, sortable tables, maps of heads."""

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrp_hf.publishing.plots.drawing import DPI

NO_PLOTLY = "The picture that tells what each point is needs plotly: pip install 'shrp-hf[plots]', and write the report again."
# Nothing may be fetched, whatever stands in the page; scripts and pictures are in it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222 }
p, ul { max-width: 60em } h2 { margin-top: 2em } img { max-width: 100% } figure { margin: 1.5em 0 }
.answer { font-size: 18px; border-left: 4px solid #1f77b4; padding: .4em 1em; background: #f3f7fb }
figcaption, summary small { color: #555; font-size: 13px } .wide { overflow: auto; max-height: 85vh; border: 1px solid #ddd }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; background: #fff }
th { position: sticky; top: 0; z-index: 1 } .words { text-align: left }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid #1f77b4 }
th[aria-sort=ascending] button::after { content: " \\25b2" } th[aria-sort=descending] button::after { content: " \\25bc" }
td:first-child { position: sticky; left: 0 } tr:hover td { background: #eef3f8 }
details { margin: .3em 0 } summary { cursor: pointer } .frontier { height: 560px }
@media print { .wide { overflow: visible; max-height: none } .modebar, .updatemenu-container { display: none }
  table { font-size: 8px } td, th { white-space: normal; padding: .1em .3em } th, td:first-child { position: static } }"""
_SORT = """for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, row = head.parentElement, body = row.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending", column = [...row.children].indexOf(head);
  for (const other of row.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = line => line.children[column].textContent.trim(),
    number = text => head.className ? NaN : parseFloat(text.replace(/,/g, ""));
  const order = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? (up ? 1 : -1) * a.localeCompare(b) : isNaN(x) - isNaN(y);
    return (up ? 1 : -1) * (x - y);
  };
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
});"""
_COLOURS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #bcbd22 #17becf".split()
_SYMBOLS = "circle square diamond triangle-up triangle-down cross star".split()
_DASHES = "solid dash dot".split()
_GREY = "#8a8a8a"


@dataclass(frozen=True)
class Point:
    """A model in the frontier.

    Args:
        series: What it is joined with, and what a click in the legend hides.
        x: Its speed, as a multiple of the dense model's.
        y: Its quality.
        low: Lower end of the interval.
        high: Upper end.
        tells: Lines that are shown where the pointer is.
        panel: Points of one panel are shown together; a menu changes between panels.
    """

    series: str
    x: float
    y: float
    low: float
    high: float
    tells: tuple[str, ...]
    panel: str = ""


def page(title: str, heading: str, answer: str, sections: Iterable[str]) -> str:
    """Returns a whole page.

    Args:
        title: Of the window.
        heading: Of the page.
        answer: HTML: what the page says in a sentence or two.
        sections: HTML of what follows.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(heading)}</h1>
<p class="answer">{answer}</p>
{"".join(sections)}
<script>{_SORT}</script>
</body></html>
"""


def frontier(points: Sequence[Point], baseline: float, quality: str, x_label: str, picture: Path | None = None) -> str:
    """Returns the HTML of quality against speed: the pointer tells what a point is, a click in the legend hides a series.

    Args:
        points: The models; of several panels the last is shown first.
        baseline: Quality of the dense model, whose speed is 1.
        quality: What is measured, for the axis.
        x_label: What x is, for the axis.
        picture: A PNG file of the same, shown where plotly, which brings the other one, is not installed; None: there is none.
    """
    if not points:
        return ""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return f"{'' if picture is None else _image(picture)}<p>{html.escape(NO_PLOTLY)}</p>\n"
    caption = (
        "Up and to the right is better. Hover: what a point is. A click in the legend hides a series, two leave it alone."
    )
    drawn = {"data": _traces(points, baseline), "layout": _layout(points, quality, x_label)}
    # A "<" could end the script, whatever a name holds.
    written = json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")
    buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"]  # none that would want a network
    config = json.dumps({"displaylogo": False, "responsive": True, "modeBarButtons": [buttons]})
    script = f'const drawn = {written};\nPlotly.newPlot("frontier", drawn.data, drawn.layout, {config});'
    return f"""<figure><div id="frontier" class="frontier"></div><figcaption>{caption}</figcaption></figure>
<script>{get_plotlyjs()}</script>
<script>{script}</script>
"""


def _keys(points: Sequence[Point]) -> list[tuple[str, str]]:
    """(panel, series) of each trace but the dense model's, in their order."""
    names, panels = (list(dict.fromkeys(getattr(point, field) for point in points)) for field in ("series", "panel"))
    there = {(point.panel, point.series) for point in points}
    return [(panel, name) for panel in panels for name in names if (panel, name) in there]


def _traces(points: Sequence[Point], baseline: float) -> list[dict[str, Any]]:
    keys, names = _keys(points), list(dict.fromkeys(point.series for point in points))
    dense = {
        "name": "dense",
        "x": [1],
        "y": [baseline],
        "mode": "markers",
        "hovertemplate": "dense<br>%{y:.4f}<extra></extra>",
    }
    traces: list[dict[str, Any]] = [dense | {"marker": {"symbol": "star", "size": 14, "color": "#222"}}]
    for panel, name in keys:
        found = sorted((p for p in points if (p.panel, p.series) == (panel, name)), key=lambda p: p.x)
        i = names.index(name)
        colour = _GREY if name.split(",")[0] == "random" else _COLOURS[i % len(_COLOURS)]
        bars = {"array": [p.high - p.y for p in found], "arrayminus": [p.y - p.low for p in found], "thickness": 1, "width": 3}
        traces.append(
            {
                "name": html.escape(name),
                "x": [p.x for p in found],
                "y": [p.y for p in found],
                "error_y": bars | {"visible": any(p.high > p.low for p in found)},
                "text": ["<br>".join(map(html.escape, p.tells)) for p in found],
                "hovertemplate": "%{text}<extra></extra>",
                "mode": "lines+markers",
                "marker": {"symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 9, "color": colour},
                "line": {"color": colour, "width": 1.5, "dash": _DASHES[i // len(_COLOURS) % len(_DASHES)]},
                "visible": panel == keys[-1][0],
            }
        )
    return traces


def _layout(points: Sequence[Point], quality: str, x_label: str) -> dict[str, Any]:
    panels = list(dict.fromkeys(point.panel for point in points))
    is_wide = max(point.x for point in points) > 2
    axis: dict[str, Any] = {
        "title": {"text": html.escape(x_label)},
        "ticksuffix": "x",
        "gridcolor": "#e6e6e6",
        "zeroline": False,
    }
    if is_wide:
        low, high = min(1.0, *(point.x for point in points)), max(point.x for point in points)
        steps = [2.0**power * part for power in range(-3, 8) for part in (1, 1.5)]
        axis |= {"type": "log", "tickvals": steps, "ticktext": [f"{step:g}" for step in steps]}
        axis["range"] = [math.log10(low) - 0.05, math.log10(high) + 0.05]
    layout: dict[str, Any] = {
        "xaxis": axis,
        "yaxis": {"title": {"text": html.escape(quality)}, "gridcolor": "#e6e6e6", "zeroline": False},
        "hovermode": "closest",
        "plot_bgcolor": "#fff",
        "legend": {"itemclick": "toggle", "itemdoubleclick": "toggleothers"},
        "margin": {"t": 50, "r": 20},
    }
    if len(panels) > 1:
        shown = {panel: [True, *(owner == panel for owner, _ in _keys(points))] for panel in panels}
        buttons = [{"label": panel, "method": "restyle", "args": ["visible", shown[panel]]} for panel in panels]
        place = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.12}
        layout["updatemenus"] = [{"buttons": buttons, "active": len(panels) - 1, **place}]
    return layout


def _image(path: Path) -> str:
    picture = path.read_bytes()
    # The width is in the PNG's header. In inches, letters have one size in all pictures.
    size = f"width: {int.from_bytes(picture[16:20]) / DPI:.2f}in"
    image = f'<img alt="{path.stem}" style="{size}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    return f"<figure>{image}<figcaption>Up and to the right is better.</figcaption></figure>\n"


def sortable_table(titles: Sequence[str], lines: Iterable[Sequence[str]], num_words: int) -> str:
    """Returns a table that a click on a title sorts: by the first number in a cell, those without one last.

    Args:
        titles: Of the columns.
        lines: Cells.
        num_words: Columns of words, from the left; the others hold numbers.
    """

    def cells(tag: str, texts: Iterable[str]) -> str:
        return "".join(f"<{tag}{' class=words' * (i < num_words)}>{text}</{tag}>" for i, text in enumerate(texts))

    head = cells("th", (f'<button type="button">{html.escape(title) or "name"}</button>' for title in titles))
    body = "".join(f"<tr>{cells('td', map(html.escape, line))}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def head_map(rates: Sequence[Sequence[float]], neurons: Sequence[float] | None = None) -> str:
    """Returns a drawing of which heads stay, and beside each layer the share of its neurons, bottom layer last.

    Args:
        rates: How often each head stays, 0 to 1, for each layer.
        neurons: Share of the neurons that stay, 0 to 1, for each layer; None: all do.
    """
    size, bar = 14, 120
    width, parts = max(map(len, rates)) * size, []
    for layer, line in enumerate(rates):
        top = layer * size
        for head, rate in enumerate(line):
            place = f'x="{30 + head * size}" y="{top}" width="{size - 1}" height="{size - 1}"'
            parts.append(
                f'<rect {place} fill="#1f5f99" fill-opacity="{0.06 + 0.94 * rate:.2f}"><title>layer {layer}, head {head}: '
                f"{rate:.0%}</title></rect>"
            )
        parts.append(f'<text x="24" y="{top + 11}" text-anchor="end">{layer}</text>')
        if neurons is not None:
            place = f'x="{50 + width}" y="{top}" height="{size - 1}"'
            parts.append(f'<rect {place} width="{bar}" fill="#eee"/>')
            told = f"<title>layer {layer}: {neurons[layer]:.0%} of its neurons</title>"
            parts.append(f'<rect {place} width="{bar * neurons[layer]:.1f}" fill="#2ca02c">{told}</rect>')
    box = f"0 0 {60 + width + bar} {len(rates) * size + 2}"
    return f'<svg viewBox="{box}" width="{60 + width + bar}" font-size="10" role="img">{"".join(parts)}</svg>'


def on_demand(summary: str, content: str) -> str:
    """Returns content that a click on its summary opens.

    Args:
        summary: Text.
        content: HTML.
    """
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>\n"


def words(text: str) -> str:
    """Returns the HTML of a sentence that has its stress (`**`) and its names (backticks) as in Markdown."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def facts(values: Mapping[str, Any]) -> str:
    """Returns a list of names and values."""
    return f"<ul>{''.join(f'<li>{html.escape(name)}: {html.escape(str(value))}</li>' for name, value in values.items())}</ul>"
