"""Engines of OpenVINO."""

from diffkiln.runtime.engines.openvino.engine import OpenvinoEngine

PLUGIN = OpenvinoEngine
