"""Writes models for ONNX Runtime, and refuses to publish a file that does not say what PyTorch says."""

from shrp_hf.export.onnx import export_onnx, load_for_export
from shrp_hf.export.runtime import onnx_session

__all__ = ["export_onnx", "load_for_export", "onnx_session"]
