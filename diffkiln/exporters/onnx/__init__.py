"""Models of ONNX, for ONNX Runtime."""

from diffkiln.exporters.onnx.check import Onnx

PLUGIN = Onnx()
