"""What a model costs: parameters, FLOPs, time, memory; and what each layer would cost by its heads and neurons."""

from shrp_hf.measuring.comparison import ModelReport, accuracy_interval, report_table
from shrp_hf.measuring.cost import (
    ParameterCount,
    count_flops,
    count_parameters,
    peak_memory,
    random_inputs,
)
from shrp_hf.measuring.cost_table import CostTable
from shrp_hf.measuring.counted import flop_table, parameter_table
from shrp_hf.measuring.latency import latency_table
from shrp_hf.measuring.timing import Progress, Timing, measure_calls, measure_throughput, measure_training_step, training_step

__all__ = [
    "CostTable",
    "ModelReport",
    "ParameterCount",
    "Progress",
    "Timing",
    "accuracy_interval",
    "count_flops",
    "count_parameters",
    "flop_table",
    "latency_table",
    "measure_calls",
    "measure_throughput",
    "measure_training_step",
    "parameter_table",
    "peak_memory",
    "random_inputs",
    "report_table",
    "training_step",
]
