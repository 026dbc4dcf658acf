"""What heads and neurons do on calibration data (importance, entropy, attention signatures, means), measured in one pass."""

from shrp_hf.scoring.collect import collect_head_stats, neuron_magnitude, scored_heads, weight_magnitude
from shrp_hf.scoring.recorder import attention_entropy, resize_weights
from shrp_hf.scoring.stats import GRANULARITIES, HeadStats, StatsRequest

__all__ = [
    "GRANULARITIES",
    "HeadStats",
    "StatsRequest",
    "attention_entropy",
    "collect_head_stats",
    "neuron_magnitude",
    "resize_weights",
    "scored_heads",
    "weight_magnitude",
]
