"""Compressing a model to a target: the depth and the experts are chosen by measured speed and held-out quality."""

from shrp_hf.compress.candidates import Candidate
from shrp_hf.compress.options import CompressOptions
from shrp_hf.compress.run import Compression
from shrp_hf.compress.search import Targets, Trial

__all__ = ["Candidate", "CompressOptions", "Compression", "Targets", "Trial"]
