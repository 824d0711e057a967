"""Passes that rewrite programs, or decide how a pipeline runs."""
