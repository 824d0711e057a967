"""The runtime: loads a bundle and runs it on torch alone."""
