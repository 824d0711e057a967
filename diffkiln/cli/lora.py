"""Commands for LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import click

from diffkiln.cli.group import FILE, needs_compiler
from diffkiln.cli.printing import say, show


@click.group("lora")
def lora() -> None:
    """Prepare LoRA adapters for a bundle."""


@lora.command("convert")
@click.argument("file", type=FILE)
@click.option("--for", "bundle", type=FILE, required=True, help="The bundle that the adapter is for.")
@click.option("-o", "--output", type=FILE, required=True, help="The new file.")
@click.option("--force", is_flag=True, help="Replace a file that is at the output.")
def convert(file: Path, bundle: Path, output: Path, force: bool) -> None:
    """Convert FILE to what `load_lora` reads.

    diffusers' own converters read FILE: kohya's, X-Labs', BFL's and ComfyUI's names among others. The result is
    checked against the bundle. The runtime, which has no converters, reads it.

    \b
    diffkiln lora convert kohya.safetensors --for bundle -o style.safetensors
    """
    needs_compiler()
    from diffkiln.compiler.adapters import convert_adapter

    made = convert_adapter(file, bundle, output, force)
    for notice in made.notices:
        say(f"warning: diffusers: {notice}")
    show(f"{made.path}: changes {made.layers} layers")
