"""Pipelines as diffusers stores them: folders, checkpoints, and models without weights."""
