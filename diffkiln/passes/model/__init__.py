"""Passes that change modules and weights."""
