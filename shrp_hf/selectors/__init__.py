"""Importance, entropy, clusters: how heads are chosen."""

from shrp_hf.selectors.base import Selector
from shrp_hf.selectors.baselines import (
    EntropySelector,
    HisSelector,
    MagnitudeSelector,
    RandomSelector,
    UsageSelector,
)
from shrp_hf.selectors.cahp import CahpSelector
from shrp_hf.selectors.hies import HiesSelector

SELECTORS: dict[str, type[Selector]] = {
    "cahp": CahpSelector,
    "entropy": EntropySelector,
    "hies": HiesSelector,
    "his": HisSelector,
    "magnitude": MagnitudeSelector,
    "random": RandomSelector,
    "usage": UsageSelector,
}

__all__ = [
    "SELECTORS",
    "CahpSelector",
    "EntropySelector",
    "HiesSelector",
    "HisSelector",
    "MagnitudeSelector",
    "RandomSelector",
    "Selector",
    "UsageSelector",
]
