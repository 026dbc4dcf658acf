"""Models side by side as they are served: runtimes, latency, throughput, memory."""

from shrp_hf.workflows.benchmark.measure import ServingOptions, measure_serving
from shrp_hf.workflows.benchmark.results import ServingResult, ServingRow, figures_of, write_serving

__all__ = ["ServingOptions", "ServingResult", "ServingRow", "figures_of", "measure_serving", "write_serving"]
