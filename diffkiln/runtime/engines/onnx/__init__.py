"""Models of ONNX, run by ONNX Runtime."""

from diffkiln.runtime.engines.onnx.engine import OnnxEngine

PLUGIN = OnnxEngine
