import os
import sys

import pytest
import torch

from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.publishing.plots import (
    curves,
    plot_clusters,
    plot_frontier,
    plot_head_map,
    plot_keep_rates,
    plot_knee,
    plot_panels,
    plot_quality_curve,
    plot_usage,
)

pytest.importorskip("matplotlib")

PLAN = KeepPlan(kept=((0,), (1, 2)), num_heads=3)
USAGE = {0: [5, 0, 1], 1: [2, 2, 2]}
SCORES = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
POINTS = {"hies": [(2, 0.5, 0.4, 0.6), (4, 0.6, 0.5, 0.7)], "random": [(2, 0.3, 0.2, 0.4)]}
PLANE = [[0.0, 0.0], [1.0, 0.0], [5.0, 5.0], [5.0, 6.0]]


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize(
    "plot",
    [
        pytest.param(lambda path: plot_usage(USAGE, path), id="usage"),
        pytest.param(lambda path: plot_usage({1: [5, 1, 0]}, path, kept=PLAN), id="usage, kept"),
        pytest.param(lambda path: plot_head_map(SCORES, PLAN, path), id="head map"),
        pytest.param(lambda path: plot_head_map(1e-9 * torch.tensor(SCORES), PLAN, path), id="head map, small scores"),
        pytest.param(lambda path: plot_head_map(torch.zeros(2, 3), PLAN, path), id="head map, all equal"),
        pytest.param(lambda path: plot_quality_curve(POINTS, path, baseline=0.7), id="quality"),
        pytest.param(lambda path: plot_frontier(POINTS, path, 0.7), id="frontier"),
        pytest.param(lambda path: plot_panels({"a": POINTS}, path, 0.7, "accuracy", "heads"), id="panels"),
        pytest.param(lambda path: plot_keep_rates({"hies": [[0.0, 1.0], [0.5, 0.5]]}, path, "heads"), id="keep rates"),
        pytest.param(lambda path: plot_clusters(PLANE, [0, 0, 1, 1], [0, 2], [1, 3], path), id="clusters"),
        pytest.param(lambda path: plot_knee([2, 3, 4], [0.2, 0.8, 1.0], 3, path), id="knee"),
        pytest.param(lambda path: plot_knee([2, 3, 4], [0.2, 0.4, 0.6], None, path), id="no knee"),
    ],
)
def test_writes_a_png_and_nothing_else(plot, tmp_path):
    target = tmp_path / "new" / "picture.png"
    assert plot(target) == target
    width, height = size_of_png(target)
    assert min(width, height) > 300
    assert [path.name for path in target.parent.iterdir()] == ["picture.png"]


def test_the_suffix_chooses_the_format(tmp_path):
    path = plot_usage(USAGE, tmp_path / "usage.svg")
    assert "<svg" in path.read_text(encoding="utf-8")


def test_outlines_what_is_kept(tmp_path):
    colour = "#d1495b"
    with_plan = plot_usage(USAGE, tmp_path / "a.svg", kept=PLAN).read_text(encoding="utf-8")
    assert with_plan.count(f"stroke: {colour}") == PLAN.num_kept
    assert colour not in plot_usage(USAGE, tmp_path / "b.svg").read_text(encoding="utf-8")


def test_heads_without_a_choice_stay_blank(tmp_path):
    scores = [[float("nan")] * 3, [0.1, 0.9, 0.5]]
    path = plot_head_map(scores, KeepPlan(((0, 1, 2), (1,)), 3), tmp_path / "heads.svg")
    assert "nan" not in path.read_text(encoding="utf-8").lower()


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    target = plot_usage(USAGE, tmp_path / "usage.png")
    before = target.read_bytes()

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_usage({0: [1, 1]}, target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["usage.png"]


def test_two_processes_may_draw_one_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    def interrupted(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        monkeypatch.undo()
        child = os.fork()  # draws the same picture from start to end before this process has moved its own
        if not child:
            plot_usage(USAGE, tmp_path / "x.png")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    monkeypatch.setattr(Figure, "savefig", interrupted)
    plot_usage(USAGE, tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("usage", "kept", "message"),
    [
        ({}, None, "`usage`"),
        ({0: [1, 2], 1: [1]}, None, "`usage`"),
        ({0: [1, -1]}, None, "0 or more"),
        ({0: [1, 2], 1: [0, 0]}, None, "some in every layer"),
        ({0: [1, 2]}, PLAN, "2 layers of 3 heads"),
        ({2: [1, 2, 3]}, PLAN, "layers up to 2"),
    ],
    ids=["empty", "ragged", "negative", "uncounted layer", "other experts", "layer missing in plan"],
)
def test_usage_that_does_not_fit_is_refused(usage, kept, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_usage(usage, tmp_path / "x.png", kept=kept)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "scores",
    [[[0.1, 0.2], [0.3, 0.4]], [0.1, 0.2, 0.3], [[0.1, 0.2, float("inf")]] * 2, "scores"],
    ids=["narrow", "flat", "infinite", "text"],
)
def test_scores_of_another_shape_are_refused(scores, tmp_path):
    with pytest.raises(ValueError, match="`scores`"):
        plot_head_map(scores, PLAN, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "at least one selector"),
        ({"hies": []}, "hies"),
        ({"hies": [(2, 0.5)]}, "4 in each row"),
        ({"hies": [(2, 0.5, 0.6, 0.7)]}, "low <= quality <= high"),
    ],
    ids=["none", "no points", "no interval", "interval beside the value"],
)
def test_quality_points_that_do_not_fit_are_refused(points, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_quality_curve(points, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("points", "labels", "medoids", "kept", "message"),
    [
        ([[0.0, 0.0, 0.0]], [0], [0], [0], "`points`.*2 in each row"),
        (PLANE, [0, 0, 1], [0, 2], [1], "`labels`.*4 heads, got 3"),
        (PLANE, [0, 0, 1, 2], [0, 2], [1], "`labels`.*0 to 1, got 2"),
        (PLANE, [0, 0, 1, 1], [0, 4], [1], "`medoids`.*got 4"),
        (PLANE, [0, 0, 1, 1], [0, 2], [-1], "`kept`.*got -1"),
    ],
    ids=["3-D", "labels short", "label unknown", "medoid unknown", "kept unknown"],
)
def test_clusters_that_do_not_fit_are_refused(points, labels, medoids, kept, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_clusters(points, labels, medoids, kept, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("ks", "mss", "knee", "message"),
    [([2, 3], [0.5], 2, "one length"), ([], [], None, "at least 1"), ([2, 3], [0.5, 0.6], 4, "2 to 3.*got 4")],
    ids=["lengths", "empty", "knee elsewhere"],
)
def test_knee_that_does_not_fit_is_refused(ks, mss, knee, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_knee(ks, mss, knee, tmp_path / "x.png")


@pytest.mark.parametrize(("apart", "expected"), [(True, [1.988, 2.012]), (False, [2.0, 2.0])])
def test_error_bars_at_one_x_stand_side_by_side_only_where_x_was_chosen(apart, expected, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "write_figure", lambda figure, path: figures.append(figure))
    plot_panels({"panel": POINTS}, tmp_path / "x.png", 0.7, "accuracy", "kept heads", apart=apart)
    assert [bars[0].get_xdata()[0] for bars in figures[0].axes[0].containers] == pytest.approx(expected)


def test_panels_share_one_legend_in_which_each_series_has_one_look(tmp_path):
    panels = {"without recovery": POINTS, "1 epoch": {"random": POINTS["random"], "cahp": POINTS["hies"]}}
    text = plot_panels(panels, tmp_path / "x.svg", 0.7, "accuracy", "kept heads").read_text(encoding="utf-8")
    for word in ("dense", "hies", "random", "cahp", "without recovery", "1 epoch", "kept heads"):
        # Twice where a panel repeats it; the legend names each series once.
        assert text.count(f"<!-- {word} -->") == (2 if word == "kept heads" else 1)
    assert "#8a8a8a" in text  # the control


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda path: plot_panels({}, path, 0.7, "accuracy", "heads"), "`panels` must hold at least one panel, got none"),
        (lambda path: plot_panels({"a": {}}, path, 0.7, "accuracy", "heads"), "`points` must hold at least one selector"),
        (lambda path: plot_keep_rates({}, path, "heads"), "`rates` must hold numbers from 0 to 1 .*, got none"),
        (lambda path: plot_keep_rates({"his": [[1.5]]}, path, "heads"), r"`rates` must hold .*, got \['his'\]"),
        (lambda path: plot_frontier({"his": [(0, 0.5, 0.5, 0.5)]}, path, 0.7), "`points` must hold speed-ups of more than 0"),
    ],
    ids=["no panel", "empty panel", "no method", "no share", "no speed"],
)
def test_comparisons_that_do_not_fit_are_refused(plot, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot(tmp_path / "x.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"shrp-hf\[plots\]"):
        plot_usage(USAGE, tmp_path / "x.png")


def test_speedups_stand_between_labelled_ticks():
    assert curves._ticks(2.98, 5.87) == [2, 3, 4, 6]
    assert curves._ticks(1, 17) == [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24]
