"""From a model to one file that ONNX Runtime serves, checked against the model before it is published."""

from shrp_hf.onnx_export.export import export_onnx, onnx_session
from shrp_hf.onnx_export.loading import load_for_export

__all__ = ["export_onnx", "load_for_export", "onnx_session"]
