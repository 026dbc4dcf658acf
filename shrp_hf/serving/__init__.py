"""Models side by side as they are served: runtimes, latency, throughput, memory."""

from shrp_hf.serving.measure import ServingOptions, measure_serving
from shrp_hf.serving.results import ServingResult, ServingRow, write_serving

__all__ = ["ServingOptions", "ServingResult", "ServingRow", "measure_serving", "write_serving"]
