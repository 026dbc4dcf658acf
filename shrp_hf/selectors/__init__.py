"""Importance, entropy, clusters: how heads, and neurons, are chosen."""

from shrp_hf.selectors.base import Selector
from shrp_hf.selectors.baselines import (
    EntropySelector,
    HisSelector,
    MagnitudeSelector,
    RandomSelector,
    UsageSelector,
)
from shrp_hf.selectors.cahp import CahpDirectSelector, CahpSelector, HeadClusterSelector
from shrp_hf.selectors.hies import HiesSelector
from shrp_hf.selectors.neurons import (
    NeuronImportanceSelector,
    NeuronMagnitudeSelector,
    NeuronRandomSelector,
    NeuronSelector,
)

SELECTORS: dict[str, type[Selector]] = {
    "cahp": CahpSelector,
    "cahp-direct": CahpDirectSelector,
    "entropy": EntropySelector,
    "hies": HiesSelector,
    "his": HisSelector,
    "magnitude": MagnitudeSelector,
    "random": RandomSelector,
    "usage": UsageSelector,
}

NEURON_SELECTORS: dict[str, type[NeuronSelector]] = {
    "importance": NeuronImportanceSelector,
    "magnitude": NeuronMagnitudeSelector,
    "random": NeuronRandomSelector,
}

__all__ = [
    "NEURON_SELECTORS",
    "SELECTORS",
    "CahpDirectSelector",
    "CahpSelector",
    "EntropySelector",
    "HeadClusterSelector",
    "HiesSelector",
    "HisSelector",
    "MagnitudeSelector",
    "NeuronImportanceSelector",
    "NeuronMagnitudeSelector",
    "NeuronRandomSelector",
    "NeuronSelector",
    "RandomSelector",
    "Selector",
    "UsageSelector",
]
