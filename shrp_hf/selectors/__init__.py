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

__all__ = [
    "SELECTORS",
    "CahpDirectSelector",
    "CahpSelector",
    "EntropySelector",
    "HeadClusterSelector",
    "HiesSelector",
    "HisSelector",
    "MagnitudeSelector",
    "RandomSelector",
    "Selector",
    "UsageSelector",
]
