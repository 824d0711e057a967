"""Regions as ONNX: what both the backend that ends there and the one that goes on from there need."""
