"""A bundle as the original diffusers pipeline, with its engines plugged in."""
