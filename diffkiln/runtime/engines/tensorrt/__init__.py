"""Engines of TensorRT."""

from diffkiln.runtime.engines.tensorrt.engine import TensorrtEngine

PLUGIN = TensorrtEngine
