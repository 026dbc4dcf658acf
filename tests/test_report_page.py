"""The HTML reports: what they say first, that they need no network, and what stands in where plotly is missing."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
from plotly.offline import get_plotlyjs

from shrp_hf.publishing.page import NO_PLOTLY, Point, frontier, head_map, sortable_table, words
from shrp_hf.publishing.plots import plot_frontier
from shrp_hf.workflows.compare.page import answer
from tests.reports import METHODS, comparison_page, rows


def drawn(page):
    """What plotly is given."""
    (found,) = re.findall(r"^<script>const drawn = (.*);$", page, re.MULTILINE)
    return json.loads(found)


def test_page_has_plotly_once_and_everything_else_in_it():
    page = comparison_page()
    assert page.count(get_plotlyjs()) == 1
    assert len(page) < len(get_plotlyjs()) + 600_000
    rest = page.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|\ssrc=|href=|@import", rest)
    assert "default-src 'none'" in rest
    assert rest.count("<script>") == rest.count("</script>") == 3  # what a task is called ends none
    assert "moods &lt;b&gt;&amp;amp;" in rest
    assert rest.index('class="answer"') < rest.index('id="frontier"') < rest.index("All results") < rest.index("<details>")


def test_every_method_is_a_series_and_every_recovery_a_panel():
    found = drawn(comparison_page())
    traces, (menu,) = found["data"], found["layout"]["updatemenus"]
    assert traces[0]["name"] == "dense"
    assert [button["label"] for button in menu["buttons"]] == ["without recovery", "5 epochs of recovery"]
    for i, button in enumerate(menu["buttons"]):
        shown = [trace["name"] for trace, is_shown in zip(traces, button["args"][1], strict=True) if is_shown]
        assert len(shown) == len(set(shown)) == 21  # 20 methods and the dense model
        assert shown[1:4] == METHODS[:3]
        assert (button["args"][1] == [trace.get("visible", True) for trace in traces]) == (i == 1)
    styles = {(t["marker"]["color"], t["marker"]["symbol"], t["line"]["dash"]) for t in traces[1:]}
    assert len(styles) == 20
    (thin,) = [trace for trace in traces if trace["name"] == "thin, uniform" and trace["visible"]]
    assert thin["text"][0].startswith("thin, 25% of heads and neurons<br>default, 5 recovery<br>accuracy 0.8")
    assert thin["error_y"]["array"][0] == pytest.approx(12.706204736 * 0.0005)


def test_answer_is_the_fastest_that_keeps_enough_of_the_held_out_quality():
    found = answer(rows(), "accuracy")
    assert found.startswith("Ship <b>method4, 25% of heads</b> (default, 5 recovery): 1.90x the dense model's throughput, ")
    assert "It is the fastest of 5 that keep at least 98% there, over 2 seeds." in found
    nothing = answer(rows(shift=-0.1), "accuracy")
    assert nothing.startswith("Ship the dense model: none of 40 faster ones keeps 98%")
    assert "The nearest is <b>method0, 25% of heads</b> (default, 5 recovery): 1.50x" in nothing
    assert "1/1.90 of the dense model's FLOPs" in answer(rows(is_timed=False), "accuracy")
    assert answer([row for row in rows() if row.name == "dense"], "accuracy").startswith("No model can be recommended")


def test_without_times_flops_stand_in():
    page = comparison_page(is_timed=False)
    assert drawn(page)["layout"]["xaxis"]["title"]["text"] == "times fewer FLOPs than dense (speed was not measured)"
    assert "Speed was not measured." in page


def test_without_plotly_the_picture_stays_and_the_extra_is_named(monkeypatch, tmp_path):
    points = {"thin": [(2.0, 0.8, 0.7, 0.9)]}
    picture = plot_frontier(points, tmp_path / "frontier.png", 0.9)
    found = [Point("thin", 2.0, 0.8, 0.7, 0.9, ("thin",))]
    assert "<img" not in frontier(found, 0.9, "accuracy", "speed", picture)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    text = frontier(found, 0.9, "accuracy", "speed", picture)
    assert re.search(r'<img alt="frontier" style="width: 7\.\d\din" src="data:image/png;base64,', text)
    assert NO_PLOTLY.replace("'", "&#x27;") in text
    assert "shrp-hf[plots]" in text
    assert "<script>" not in text
    assert frontier([], 0.9, "accuracy", "speed") == ""


def test_table_marks_columns_of_words_and_escapes():
    text = sortable_table(["", "a<b"], [["x & y", "1,000"]], 1)
    assert '<th class=words><button type="button">name</button></th><th><button type="button">a&lt;b</button></th>' in text
    assert "<tr><td class=words>x &amp; y</td><td>1,000</td></tr>" in text
    assert words("**met**: `a<b`") == "<b>met</b>: <code>a&lt;b</code>"


def test_map_has_a_box_for_each_head_and_a_bar_for_each_layer_of_neurons():
    tree = ElementTree.fromstring(head_map([[1.0, 0.5], [0.0, 1.0]], [0.25, 1.0]))
    boxes = list(tree.iter("rect"))
    assert [box.get("fill-opacity") for box in boxes if box.get("fill-opacity")] == ["1.00", "0.53", "0.06", "1.00"]
    assert [box.get("width") for box in boxes if box.get("fill") == "#2ca02c"] == ["30.0", "120.0"]
    assert "layer 1: 100% of its neurons" in [title.text for title in tree.iter("title")]
    assert len(list(ElementTree.fromstring(head_map([[1.0, 0.5]])).iter("rect"))) == 2
