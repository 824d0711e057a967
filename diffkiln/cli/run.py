"""The command that runs a bundle."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from diffkiln.cli.group import FILE
from diffkiln.cli.image_files import read_images
from diffkiln.cli.memory import MAX_MEMORY
from diffkiln.cli.output_files import SOUND, Made, format_for, save
from diffkiln.cli.printing import Watch, say, show
from diffkiln.cli.processes import PROCESSES, is_started, run_in_processes
from diffkiln.cli.trust import POLICY, hashed_bytes
from diffkiln.guards.limits import Limits

if TYPE_CHECKING:
    from diffkiln.program import Program

NATIVE = click.option("--allow-native", is_flag=True, help="Load native code that was not built on this machine.")

#: What an address on the Hub begins with, which is not a path.
_SCHEME = "hf://"
#: Keywords of a call that `--set` does not take, and what to use instead.
_ELSEWHERE = {
    "prompt": "Use --prompt",
    "negative_prompt": "Use --negative-prompt",
    "generator": "Use --seed",
    "output_type": "The ending of --output decides it",
    "return_dict": "It is of use in Python only",
    "callback_on_step_end": "It is of use in Python only",
    "latents": "Tensors can be given in Python only",
    "allow_nan": "Use --allow-nan",
    "timeout": "It is of use in Python only",
}


class Device(click.ParamType):
    """A device as torch spells it."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the device's name. Fails for one that is not `cpu`, `cuda` or `cuda:N`."""
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", str(value)):
            self.fail(f"{value!r} is not a device. Use cpu, cuda, or one GPU of several such as cuda:1", param, ctx)
        return str(value)


class Bundle(click.ParamType):
    """A bundle's directory, or its address on the Hub, which stays text."""

    name = "bundle"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Returns a path, or an address that begins with hf://."""
        return str(value) if str(value).startswith(_SCHEME) else FILE.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the completion of paths."""
        return FILE.shell_complete(ctx, param, incomplete)


DEVICE = click.option("--device", type=Device(), help="cpu, cuda or cuda:N (default: the bundle's target).")
LIMIT = click.option(
    "--limit", "limits", multiple=True, metavar="NAME=NUMBER", help="A limit of diffkiln.Limits to change."
)


@click.command("run")
@click.argument("bundle", type=Bundle())
@click.option("--prompt", multiple=True, help="What to draw; repeat it for a batch.")
@click.option("--negative-prompt", multiple=True, help="What not to draw.")
@click.option(
    "-o", "--output", type=FILE, required=True, help="File to write: .png, .jpg, .webp, .gif, .npy, .mp4 or .wav."
)
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
@DEVICE
@click.option("--as-diffusers", is_flag=True, help="Run the original diffusers pipeline, with the engines in it.")
@MAX_MEMORY
@PROCESSES
@LIMIT
@click.option("--paranoid", is_flag=True, help="Compare the type of every result with the declared one.")
@click.option("--allow-nan", is_flag=True, help="Write the result also where numbers overflowed.")
@click.option("--rehash", is_flag=True, help="Re-hash all weights, even those unchanged since the last load.")
@POLICY
@NATIVE
def run_(
    bundle: Path | str,
    prompt: tuple[str, ...],
    negative_prompt: tuple[str, ...],
    output: Path,
    seed: int | None,
    image: tuple[str, ...],
    settings: tuple[str, ...],
    fps: float,
    device: str | None,
    as_diffusers: bool,
    max_memory: int | None,
    processes: int | None,
    limits: tuple[str, ...],
    paranoid: bool,
    allow_nan: bool,
    rehash: bool,
    policy: Path | None,
    allow_native: bool,
    **keywords: Any,
) -> None:
    """Make images, a video or sound with BUNDLE.

    BUNDLE is a directory, or hf://owner/name@revision on the Hugging Face Hub, which is fetched once. Sizes and steps
    must be those of one of the bundle's variants, which `diffkiln inspect` lists; by default they are the first
    variant's. Several images get numbered names.

    \b
    diffkiln run bundle --prompt "a red fox" --seed 7 -o fox.png
    diffkiln run bundle --prompt "a red fox" --set eta=0.5 -o fox.png
    diffkiln run bundle --prompt "a fox runs" -o fox.mp4
    diffkiln run bundle --prompt "a red fox" -o fox.png --processes 2
    """
    format_for(output)  # before anything is opened or loaded
    given = {name: value for name, value in keywords.items() if value is not None}
    given |= _settings(settings, taken=given)
    given |= read_images(image)
    if prompt:
        given["prompt"] = _one_or_list(prompt)
    if negative_prompt:
        given["negative_prompt"] = _one_or_list(negative_prompt)
    bundle = _fetched(bundle, device) if isinstance(bundle, str) else bundle
    call = _call_of(bundle)
    _need_prompt(call, given)
    if processes is not None and not is_started():
        run_in_processes(processes, bundle)
        return
    given["output_type"] = format_for(output, _made(call))
    if as_diffusers:  # whose own defaults are other sizes
        given = _fixed_in_the_first_variant(bundle) | given
    import torch

    from diffkiln.program.calls import SOUNDS
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
            limits=limits_of(limits),
            paranoid=paranoid,
            max_memory=max_memory,
            progress=watch.hashing(hashed_bytes(bundle)),
        )
        if as_diffusers:
            _refuse_unknown(pipe, given)
            pipe.set_progress_bar_config(disable=True)
        watch("run")
        given |= _watched(pipe, given, watch.step, as_diffusers)
        result = _checked(pipe, given, allow_nan) if as_diffusers else pipe(**given, allow_nan=allow_nan)
    if not as_diffusers and pipe.rank > 0:
        return  # the first process writes
    sound = output.suffix.lower() == SOUND
    kept = next((value for name, value in result.items() if sound and name in SOUNDS), next(iter(result.values())))
    rate: Any = call.signature.get("rate") if call else None
    for path in save(kept, output, fps, rate):
        show(str(path))


def _checked(pipe: Any, given: Mapping[str, Any], allow_nan: bool) -> Any:
    """Returns what a pipeline of diffusers gives, which writes black for numbers that are none.

    Raises:
        NotFinite: there are such.
    """
    import numpy as np

    from diffkiln.runtime.finite import not_finite

    with warnings.catch_warnings():
        action = "ignore" if allow_nan else "error"
        warnings.filterwarnings(action, "invalid value encountered in cast", RuntimeWarning)
        try:
            result = pipe(**given)
        except RuntimeWarning:
            raise not_finite("", None) from None
    made = next(iter(result.values()))
    if not allow_nan and isinstance(made, np.ndarray) and not np.isfinite(made).all():
        raise not_finite("", None)
    return result


def _fetched(address: str, device: str | None) -> Path:
    """Returns the directory of a bundle on the Hub, fetched for this machine; says which commit a branch means now."""
    from diffkiln.hub import cached, pinned
    from diffkiln.runtime.targets import fitting_targets

    commit = pinned(address)
    if commit != address:
        say(f"{address} is {commit}")
    return cached(commit, lambda manifest: fitting_targets(manifest, device))


def limits_of(items: Sequence[str]) -> Limits:
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
            raise click.BadParameter(f"{text!r} is not a number", param_hint=f"--limit {name}") from None
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


def _need_prompt(call: Program | None, given: Mapping[str, Any]) -> None:
    """Says before anything is loaded that a prompt is missing."""
    from diffkiln.program.calls import text_keywords

    if call is not None and "prompt" in text_keywords([call]) and "prompt" not in given:
        raise click.UsageError("This bundle takes a prompt. Add --prompt, such as --prompt 'a red fox'")


def _made(call: Program | None) -> Made | None:
    from diffkiln.cli.printing_bundle import what_it_makes

    return None if call is None else what_it_makes(call)


def _fixed_in_the_first_variant(path: Path) -> dict[str, Any]:
    from diffkiln.bundle import open_bundle
    from diffkiln.program.images import IMAGES

    def is_declared(value: Any) -> bool:
        first = value[0] if isinstance(value, list | tuple) and value else value
        return isinstance(first, Mapping) and ("shape" in first or set(first) == {"height", "width"})

    with open_bundle(path) as bundle:
        fixed = bundle.manifest.pipeline.variants[0].fixed
    given = {name: value for name, value in fixed.items() if value is not None and name not in IMAGES}
    return {name: value for name, value in given.items() if not is_declared(value)}
