"""A declarative pipeline compiler for Hugging Face diffusers."""
