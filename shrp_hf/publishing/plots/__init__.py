"""Pictures of usage, plans, quality and speed; every function writes one file and returns its path."""

from shrp_hf.publishing.plots.curves import plot_frontier, plot_panels, plot_quality_curve, plot_speed
from shrp_hf.publishing.plots.drawing import check_drawable
from shrp_hf.publishing.plots.heads import plot_clusters, plot_head_map, plot_keep_rates, plot_knee, plot_usage

__all__ = [
    "check_drawable",
    "plot_clusters",
    "plot_frontier",
    "plot_head_map",
    "plot_keep_rates",
    "plot_knee",
    "plot_panels",
    "plot_quality_curve",
    "plot_speed",
    "plot_usage",
]
