"""A backend that compiles nothing: its engines replay a region operation by operation."""
