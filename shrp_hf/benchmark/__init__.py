"""What a model costs: parameters in three conventions, FLOPs, time, memory, and the table that compares models."""

from shrp_hf.benchmark.cost import (
    LayerCost,
    ModelCost,
    ParameterCount,
    count_flops,
    count_parameters,
    model_cost,
    peak_memory,
    random_inputs,
)
from shrp_hf.benchmark.table import Z_95, ModelReport, accuracy_interval, report_table
from shrp_hf.benchmark.timing import Progress, Timing, measure_calls, measure_throughput, measure_training_step, training_step

__all__ = [
    "Z_95",
    "LayerCost",
    "ModelCost",
    "ModelReport",
    "ParameterCount",
    "Progress",
    "Timing",
    "accuracy_interval",
    "count_flops",
    "count_parameters",
    "measure_calls",
    "measure_throughput",
    "measure_training_step",
    "model_cost",
    "peak_memory",
    "random_inputs",
    "report_table",
    "training_step",
]
