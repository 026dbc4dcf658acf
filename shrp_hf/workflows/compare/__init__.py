"""Methods side by side on one dense model, under equal conditions: cells, tables, report."""

from shrp_hf.workflows.compare.cells import Settings
from shrp_hf.workflows.compare.grid import METHODS, Grid
from shrp_hf.workflows.compare.preview import preview_comparison
from shrp_hf.workflows.compare.results import write_results
from shrp_hf.workflows.compare.run import Comparison
from shrp_hf.workflows.compare.speed import measure_speed
from shrp_hf.workflows.compare.tables import read_cells

__all__ = ["METHODS", "Comparison", "Grid", "Settings", "measure_speed", "preview_comparison", "read_cells", "write_results"]
