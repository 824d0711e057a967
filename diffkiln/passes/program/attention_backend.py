"""Choose the kernel that computes a component's attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from diffkiln.bundle.versions import fits
from diffkiln.errors import Incompatible, Problem
from diffkiln.interpreter.attention import by_kernel
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes.base import Fact, Outcome, ProgramPass, Restored, State
from diffkiln.program import ATTENTION, KERNELS, NATIVE, SDPA, Builder, Module, Op, Program, read_attention
from diffkiln.program.attention import Kernel, call_problems, device_problem
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Target, refuse

#: Words that diffusers has as well and that choose nothing here: why, and what to write.
_REFUSED = {
    "native": ("torch chooses a kernel at each call without this pass as well", "Remove it"),
    "flash": (
        "may be torch's own FlashAttention-2 or the package flash-attn, as in diffusers",
        "Choose native_flash for torch's, flash_2 for the package's",
    ),
    "flex": (
        "flex_attention is a kernel only where torch.compile makes one, and a bundle compiles nothing when it is "
        "loaded; run as it is, it computes every score",
        "Choose native_efficient, or native_math to compute every score",
    ),
}
_FROM_THE_HUB = ("is fetched from the Hub when it is first used, and a bundle fetches nothing", "Choose the package's")


def _spelling(word: Any) -> Any:
    """Returns a kernel's name from diffusers' name, in which a leading underscore says that it may change."""
    if not isinstance(word, str):
        return word
    if word in _REFUSED or word.endswith("_hub"):
        raise refuse(*_REFUSED.get(word, _FROM_THE_HUB))
    return word.removeprefix("_")


Backend = Literal[
    "native_math",
    "native_flash",
    "native_efficient",
    "native_cudnn",
    "flash_2",
    "flash_3",
    "flash_4",
    "sage",
    "xformers",
]


class AttentionBackend(ProgramPass):
    """Compute a component's attention with one kernel, instead of the one that torch chooses at each call.

    torch's own kernels are `native_math` (every score, any device), `native_flash` (FlashAttention-2; a form of its own
    on CPUs), `native_efficient` and `native_cudnn`. Other kernels need a package, which the bundle then requires:
    `flash_2`, `flash_3`, `flash_4` (flash-attn), `sage` (SageAttention, in int8) and `xformers`. A kernel that cannot
    take its arguments raises an error; no other kernel takes its place.
    """

    name: ClassVar[str] = "attention_backend"
    summary: ClassVar[str] = "choose the kernel of a component's attention"
    maps: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = frozenset({"attention_kernels"})
    examples: ClassVar = (
        {"name": "attention_backend", "component": "transformer", "backend": "native_math"},
        {"name": "attention_backend", "mapping": {"unet": {"backend": "sage"}, "vae": {"backend": "native_efficient"}}},
    )

    backend: Annotated[Backend, BeforeValidator(_spelling)] = Field(description="Kernel that computes attention.")

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.backend]

    def provides(self) -> Iterable[Fact]:
        yield Fact("attention_chosen", self.component, self.name)
        if self.kernel.package:
            yield Fact("attention_by_package", self.component, self.name)

    def packages(self) -> dict[str, str]:
        return {self.kernel.package: self.kernel.versions} if self.kernel.package else {}

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        bundle.check_kernel(str(options["component"]), str(options["backend"]))

    @classmethod
    def restore_call(cls, module: torch.nn.Module, options: Mapping[str, Any]) -> None:
        choose_attention(module, str(options["component"]), str(options["backend"]))

    # -- from configuration --

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        where = f"{where}.backend"
        if reason := device_problem(self.backend, target.device, target.capability):
            yield Problem(where, f"{reason}, and the target is {target.name}", self._others(target))
        if reason := self._package_problem():
            yield Problem(where, reason, self.kernel.install)
        if reason := no_attention(module):
            yield Problem(where, reason, "Remove it.")
        types = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point() and tensor.itemsize > 1}
        names = {str(dtype).removeprefix("torch.") for dtype in types}
        if target.device != "cpu" and self.kernel.dtypes and names and names.isdisjoint(self.kernel.dtypes):
            reason = f"{self.backend} takes {' and '.join(self.kernel.dtypes)}, and {self.component} is in"
            hint = f'Put {{"name": "cast", "component": "{self.component}", "dtype": "bfloat16"}} before it.'
            yield Problem(where, f"{reason} {', '.join(sorted(names))}", hint)

    def _others(self, target: Target) -> str:
        fit = [name for name in KERNELS if not device_problem(name, target.device, target.capability)]
        return f"Choose one of {', '.join(fit)}."

    def _package_problem(self) -> str:
        """Returns why the package is not the one that the kernel needs; imports nothing."""
        package, wanted = self.kernel.package, self.kernel.versions
        if not package:
            return ""
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{self.backend} needs {package} {wanted}, which is not installed"
        return "" if fits(found, wanted) else f"{self.backend} needs {package} {wanted}, found {found}"

    def run(self, state: State) -> Outcome:
        return Outcome(state.with_facts(self.provides()), True, (f"attention by {self.backend}",))

    # -- from the recording --

    def check_recording(self, recording: Recording, target: Target, where: str) -> Iterable[Problem]:
        where = f"{where}.backend"
        if self.component not in recording.modules:
            yield Problem(where, f"the call never calls {self.component}", "Remove it.")
            return
        found = list(_attentions(recording.modules[self.component]))
        if not found:
            yield Problem(where, f"{self.component} computes nothing by scaled_dot_product_attention", "Remove it.")
        reasons = {
            f"{self.component} has attention with {problem}": None
            for program, op in found
            for problem in call_problems(self.backend, op, program.types, target.device)
        }
        for reason in reasons:
            yield Problem(where, f"{self.backend} cannot compute all of it: {reason}", "Choose another kernel.")

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        module = recording.modules[self.component]
        count = sum(1 for _ in _attentions(module))
        changed = replace(module, programs=self._rewritten(module.programs), regions=self._rewritten(module.regions))
        modules = {**recording.modules, self.component: changed}
        return replace(recording, modules=modules), [f"{count} operations by {self.backend}"]

    def _rewritten(self, programs: Any) -> dict[str, Program]:
        return {name: Builder(program).map(self._chosen).build() for name, program in programs.items()}

    def _chosen(self, op: Op) -> Op:
        if op.name != SDPA:
            return op
        if not self.kernel.package:
            return replace(op, attrs={"kernel": self.backend})
        call = read_attention(op)
        attrs = {"kernel": self.backend, "causal": call.causal, "scale": call.scale}
        return Op(ATTENTION, (call.query, call.key, call.value), op.outputs, attrs=attrs)


def no_attention(module: torch.nn.Module) -> str:
    """Returns why a module does not use `scaled_dot_product_attention`, judged by its classes; empty if it may."""
    kind = type(module).__name__
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if isinstance(chosen, str):  # transformers'
        return "" if chosen == "sdpa" else f"{kind} computes its attention itself ({chosen}), not by torch's"
    return "" if _processors(module) else f"{kind} has no attention"


def _attentions(module: Module) -> Iterator[tuple[Program, Op]]:
    for program in (*module.programs.values(), *module.regions.values()):
        for op in program.ops:
            if op.name == SDPA:
                yield program, op


#: Methods of a component that a pipeline calls.
_METHODS = ("forward", "encode", "decode")

#: What diffusers calls the kernels of packages. It has the fourth FlashAttention from the Hub alone.
_IN_DIFFUSERS = {"flash_2": "flash", "flash_3": "_flash_3", "sage": "sage", "xformers": "xformers"}


def choose_attention(module: torch.nn.Module, component: str, kernel: str) -> None:
    """Makes a module compute its attention by this kernel.

    torch's own kernels are switched on around the module's methods. diffusers' `set_attention_backend` does nothing for
    UNets, VAEs, text encoders and older transformers, and changes all pipelines of the process besides.

    Raises:
        Incompatible: diffusers has no such kernel for the module, or it cannot be used.
    """
    if kernel in NATIVE:
        for name in _METHODS:
            if callable(method := getattr(module, name, None)):
                setattr(module, name, by_kernel(method, kernel, component))
        return
    if kernel not in _IN_DIFFUSERS or not _heeds_backends(module):
        raise Incompatible(
            f"diffusers cannot compute the attention of {component} ({type(module).__name__}) by {kernel}. Load the "
            "bundle without as_diffusers"
        )
    from diffusers.models.attention_dispatch import attention_backend

    own: Any = module
    try:
        with quiet_libraries(), attention_backend("native"):  # which puts back what is set for the whole process
            own.set_attention_backend(_IN_DIFFUSERS[kernel])
    except (RuntimeError, ImportError) as error:
        raise Incompatible(f"diffusers cannot use {kernel} for {component}: {error}") from error


def _heeds_backends(module: torch.nn.Module) -> bool:
    """Returns True if all attention of a module asks diffusers which kernel to use."""
    own = _processors(module)
    return bool(own) and all(hasattr(processor, "_attention_backend") for processor in own)


def _processors(module: torch.nn.Module) -> list[Any]:
    """Returns what computes each attention of a model of diffusers: every class of attention there has a processor."""
    return [part.processor for part in module.modules() if getattr(part, "processor", None) is not None]


PLUGIN = AttentionBackend
