"""The way from a spec to a bundle: read `compile.py` first."""
