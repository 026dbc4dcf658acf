"""Compressing a model to a target: structure and size are chosen by measured speed and held-out quality."""

from shrp_hf.workflows.compress.candidates import STRUCTURES, Candidate, Experts, FirstLayers, SpreadLayers, Thin, Uniform
from shrp_hf.workflows.compress.options import CompressOptions
from shrp_hf.workflows.compress.preview import CompressionPreview
from shrp_hf.workflows.compress.run import Compression
from shrp_hf.workflows.compress.search import Targets, Trial

__all__ = [
    "STRUCTURES",
    "Candidate",
    "CompressOptions",
    "Compression",
    "CompressionPreview",
    "Experts",
    "FirstLayers",
    "SpreadLayers",
    "Targets",
    "Thin",
    "Trial",
    "Uniform",
]
