"""Engines of TensorRT, for NVIDIA's GPUs."""

from diffkiln.exporters.tensorrt.check import Tensorrt

PLUGIN = Tensorrt()
