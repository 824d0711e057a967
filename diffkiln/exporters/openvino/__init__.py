"""Models of OpenVINO, for CPUs."""

from diffkiln.exporters.openvino.check import Openvino

PLUGIN = Openvino()
