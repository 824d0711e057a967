"""Measuring and comparing: what a bundle gains against other ways to draw, and what it loses."""
