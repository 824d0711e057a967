"""The command that runs a bundle."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffkiln.cli.group import FILE
from diffkiln.cli.image_files import read_images
from diffkiln.cli.output_files import format_for, save
from diffkiln.cli.printing import Watch, show
from diffkiln.cli.trust import POLICY, hashed_bytes
from diffkiln.guards.limits import Limits

if TYPE_CHECKING:
    from diffkiln.program import Program

_NATIVE = click.option("--allow-native", is_flag=True, help="Load native code that was not built on this machine.")

#: Keywords of a call that `--set` does not take, and what to use instead.
_ELSEWHERE = {
    "prompt": "Use --prompt",
    "negative_prompt": "Use --negative-prompt",
    "generator": "Use --seed",
    "output_type": "The ending of --output decides it",
    "return_dict": "It is of use in Python only",
    "callback_on_step_end": "It is of use in Python only",
    "latents": "Tensors can be given in Python only",
}


class Device(click.ParamType):
    """A device as torch spells it."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the device's name. Fails for one that is not `cpu`, `cuda` or `cuda:N`."""
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", str(value)):
            self.fail(f"{value!r} is no device. Use cpu, cuda, or one GPU of several such as cuda:1", param, ctx)
        return str(value)


@click.command("run")
@click.argument("bundle", type=FILE)
@click.option("--prompt", required=True, multiple=True, help="What to draw; repeat it for a batch.")
@click.option("--negative-prompt", multiple=True, help="What not to draw.")
@click.option("-o", "--output", type=FILE, required=True, help="File to write: .png, .jpg, .webp, .gif, .npy or .mp4.")
@click.option("--seed", type=int, help="Seed of the noise; the same seed draws the same image.")
@click.option("--steps", "num_inference_steps", type=int, help="Number of denoising steps.")
@click.option("--height", type=int, help="Height in pixels.")
@click.option("--width", type=int, help="Width in pixels.")
@click.option("--guidance-scale", type=float, help="Guidance scale.")
@click.option(
    "--image", multiple=True, metavar="[KEYWORD=]FILE", help="Image for the call; KEYWORD is image if absent."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEYWORD=VALUE", help="Any other keyword of the call, as JSON."
)
@click.option("--fps", type=click.FloatRange(1, 240), default=16, show_default=True, help="Frames a second of a video.")
@click.option("--device", type=Device(), help="cpu, cuda or cuda:N (default: what the bundle is for).")
@click.option("--as-diffusers", is_flag=True, help="Run the original diffusers pipeline, with the engines in it.")
@click.option("--limit", "limits", multiple=True, metavar="NAME=NUMBER", help="A limit of diffkiln.Limits to change.")
@click.option("--paranoid", is_flag=True, help="Compare the type of every result with the declared one.")
@click.option("--rehash", is_flag=True, help="Re-hash all weights, even those unchanged since the last load.")
@POLICY
@_NATIVE
def run_(
    bundle: Path,
    prompt: tuple[str, ...],
    negative_prompt: tuple[str, ...],
    output: Path,
    seed: int | None,
    image: tuple[str, ...],
    settings: tuple[str, ...],
    fps: float,
    device: str | None,
    as_diffusers: bool,
    limits: tuple[str, ...],
    paranoid: bool,
    rehash: bool,
    policy: Path | None,
    allow_native: bool,
    **keywords: Any,
) -> None:
    """Make images or a video with BUNDLE.

    Sizes and steps must be those of one of the bundle's variants, which `diffkiln inspect` lists; those left out are
    the first variant's. Several images get numbered names.

    \b
    diffkiln run bundle --prompt "a red fox" --seed 7 -o fox.png
    diffkiln run bundle --prompt "a red fox" --set eta=0.5 -o fox.png
    diffkiln run bundle --prompt "a fox runs" -o fox.mp4
    """
    format_for(output)  # before anything is opened or loaded
    given = {name: value for name, value in keywords.items() if value is not None}
    given |= _settings(settings, taken=given)
    given |= {"prompt": _one_or_list(prompt)} | read_images(image)
    if negative_prompt:
        given["negative_prompt"] = _one_or_list(negative_prompt)
    call = _call_of(bundle)
    given["output_type"] = format_for(output, _videos(call))
    if as_diffusers:  # whose own defaults are other sizes
        given = _fixed_in_the_first_variant(bundle) | given
    import torch

    from diffkiln.runtime.loading import load

    if seed is not None:
        given["generator"] = torch.Generator("cpu").manual_seed(seed)
    with Watch() as watch:
        watch("load")
        pipe = load(
            bundle,
            allow_native=allow_native,
            as_diffusers=as_diffusers,
            device=device,
            policy=policy,
            rehash=rehash,
            limits=_limits(limits),
            paranoid=paranoid,
            progress=watch.hashing(hashed_bytes(bundle)),
        )
        if as_diffusers:
            _refuse_unknown(pipe, given)
            pipe.set_progress_bar_config(disable=True)
        watch("run")
        result = pipe(**given, **_watched(pipe, given, watch.step, as_diffusers))
    for path in save(next(iter(result.values())), output, fps):
        show(str(path))


def _limits(items: Sequence[str]) -> Limits:
    """Returns the limits of `--limit`."""
    known = {item.name: item.type for item in fields(Limits)}
    found: dict[str, float] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--limit")
        try:
            found[name] = float(text) if name == "seconds" else int(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is no number", param_hint=f"--limit {name}") from None
    return Limits(**found)  # type: ignore[arg-type]


def _settings(items: Sequence[str], taken: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of `--set`. A value is JSON; a word that is not JSON is text."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise _wrong(f"{item!r} is not KEYWORD=VALUE. Write it as --set max_sequence_length=256")
        if name in _ELSEWHERE:
            raise _wrong(f"{name} cannot be set this way. {_ELSEWHERE[name]}")
        if name in found or name in taken:
            raise _wrong(f"{name} is given twice. Remove one of the two")
        found[name] = _value(name, text)
    return found


def _value(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        if text[:1] in '[{"':  # meant as JSON
            raise _wrong(f"{name}: {text} is not valid JSON. Quote it for the shell: --set '{name}=[1, 2]'") from None
    return text


def _wrong(reason: str) -> click.BadParameter:
    return click.BadParameter(reason, param_hint="'--set'")


def _one_or_list(texts: tuple[str, ...]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)


def _watched(pipe: Any, given: Mapping[str, Any], show: Callable[[int, int], None], diffusers: bool) -> dict[str, Any]:
    """Returns the keyword by which a call tells of its steps; nothing where the call does not take it."""
    if diffusers:
        if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
            return {}
    elif pipe.bundle.manifest.runtime.get("cuda_graphs") == "program":  # one launch has no steps to tell of
        return {}
    total = 0 if diffusers else _steps(pipe, given)

    def step_end(ran: Any, step: int, _timestep: Any, _values: Any) -> dict[str, Any]:
        show(step + 1, total or int(getattr(ran, "num_timesteps", 0)))
        return {}

    return {"callback_on_step_end": step_end}


def _steps(pipe: Any, given: Mapping[str, Any]) -> int:
    """Returns the number of steps of the first variant that has as many as are asked for."""
    from diffkiln.program import STEP

    asked = given.get("num_inference_steps")
    fitting = [v for v in pipe.variants if asked is None or v.fixed.get("num_inference_steps") == asked]
    return sum(op.name == STEP for op in fitting[0].programs["call"].ops) if fitting else 0


def _refuse_unknown(pipe: Any, given: Mapping[str, Any]) -> None:
    """Says in a sentence what diffusers would tell of with a traceback."""
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := [keyword for keyword in given if keyword not in known]:
        from diffkiln.spec import suggest

        hint = suggest(unknown[0], known) or f"It takes {', '.join(name for name in known if name != 'self')}"
        raise click.UsageError(f"{type(pipe).__name__} has no keyword {unknown[0]}. {hint}")


def _call_of(path: Path) -> Program | None:
    from diffkiln.bundle import open_bundle
    from diffkiln.cli.printing_bundle import read_call

    with open_bundle(path, ignore_signature=True) as bundle:
        return read_call(bundle)


def _videos(call: Program | None) -> bool | None:
    from diffkiln.cli.printing_bundle import makes_videos

    return None if call is None else makes_videos(call)


def _fixed_in_the_first_variant(path: Path) -> dict[str, Any]:
    from diffkiln.bundle import open_bundle
    from diffkiln.program.images import IMAGES

    with open_bundle(path) as bundle:
        fixed = bundle.manifest.pipeline.variants[0].fixed
    return {name: value for name, value in fixed.items() if value is not None and name not in IMAGES}
