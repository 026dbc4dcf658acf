"""Writes models for ONNX Runtime and OpenVINO, and refuses to publish a file that does not say what PyTorch says."""

from shrp_hf.export.onnx import export_model, export_onnx, load_for_export
from shrp_hf.export.openvino import openvino_session
from shrp_hf.export.options import ExportOptions, ExportRows, QualityLoss
from shrp_hf.export.runtime import onnx_session

__all__ = [
    "ExportOptions",
    "ExportRows",
    "QualityLoss",
    "export_model",
    "export_onnx",
    "load_for_export",
    "onnx_session",
    "openvino_session",
]
