"""What a model costs by its heads and neurons: tables that are counted, and one that is measured."""

from shrp_hf.costs.counted import flop_table, parameter_table
from shrp_hf.costs.measured import latency_table
from shrp_hf.costs.table import CostTable

__all__ = ["CostTable", "flop_table", "latency_table", "parameter_table"]
