"""Backends that lower a region into an engine for one target."""
