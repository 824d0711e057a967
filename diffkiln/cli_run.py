"""The command that runs a bundle."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from diffkiln.cli_trust import POLICY, hashed_bytes
from diffkiln.image_files import read_images, save
from diffkiln.printing import Watch, show

_NATIVE = click.option(
    "--allow-native", is_flag=True, help="Load native code of a bundle that was not built on this machine."
)


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, multiple=True, help="What to draw; several for a batch.")
@click.option("--negative-prompt", multiple=True, help="What not to draw.")
@click.option(
    "--image",
    multiple=True,
    metavar="[KEYWORD=]FILE",
    help="An image that the call takes, as `image` or another keyword (mask_image=mask.png); several for a list.",
)
@click.option("--seed", type=int, help="Seed of the noise.")
@click.option("--steps", "num_inference_steps", type=int, help="Number of denoising steps.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--width", type=int, help="In pixels.")
@click.option("--guidance-scale", type=float, help="Guidance scale.")
@click.option("--as-diffusers", is_flag=True, help="Run as the original diffusers pipeline with engines plugged in.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Image, or animation, to write.")
@click.option("--rehash", is_flag=True, help="Hash weights again that an earlier load hashed and that look untouched.")
@POLICY
@_NATIVE
def run_(
    bundle: Path,
    prompt: tuple[str, ...],
    negative_prompt: tuple[str, ...],
    image: tuple[str, ...],
    seed: int | None,
    as_diffusers: bool,
    output: Path,
    allow_native: bool,
    policy: Path | None,
    rehash: bool,
    **keywords: Any,
) -> None:
    """Make images with a bundle. Sizes and steps must be those of a variant; left out, they are the first's."""
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"the directory {output.parent} is not there", param_hint="--output")
    import torch

    from diffkiln.runtime.loading import load

    given = {name: value for name, value in keywords.items() if value is not None}
    if as_diffusers:  # whose own defaults are other sizes
        given = _fixed_in_the_first_variant(bundle) | given
    given["prompt"] = prompt[0] if len(prompt) == 1 else list(prompt)
    if negative_prompt:
        given["negative_prompt"] = negative_prompt[0] if len(negative_prompt) == 1 else list(negative_prompt)
    given |= read_images(image)
    if seed is not None:
        given["generator"] = torch.Generator("cpu").manual_seed(seed)
    with Watch() as watch:
        watch("load")
        pipe = load(
            bundle,
            allow_native=allow_native,
            as_diffusers=as_diffusers,
            policy=policy,
            rehash=rehash,
            progress=watch.hashing(hashed_bytes(bundle)),
        )
        if as_diffusers:
            _refuse_unknown(pipe, given)
        watch("run")
        result = pipe(**given)
    for path in save(next(iter(result.values())), output):
        show(str(path))


def _refuse_unknown(pipe: Any, given: Mapping[str, Any]) -> None:
    """What diffusers would tell of with a traceback."""
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := [keyword for keyword in given if keyword not in known]:
        raise click.UsageError(f"{type(pipe).__name__} takes no {unknown[0]}")


def _fixed_in_the_first_variant(path: Path) -> dict[str, Any]:
    from diffkiln.bundle import open_bundle
    from diffkiln.program.images import IMAGES

    with open_bundle(path) as bundle:
        fixed = bundle.manifest.pipeline.variants[0].fixed
    return {name: value for name, value in fixed.items() if value is not None and name not in IMAGES}
