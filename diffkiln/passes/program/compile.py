"""Have the regions of a component lowered by a backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, reduce
from inspect import cleandoc
from operator import or_
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from diffkiln import plugins
from diffkiln.errors import Problem
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.passes.base import CompileRequest, Fact, Outcome, Pass, ProgramPass, State
from diffkiln.passes.outlining import SCHEDULER, between_blocks, between_calls, whole
from diffkiln.record.pipeline import Recording
from diffkiln.spec import DEFAULT_BACKEND, Conflict, Spec, Strict, Target, refuse, resolve_targets

_BACKEND = "Backend that compiles the regions; auto: the fastest of those whose engines compile nothing at load."
#: The choice of the backend by measurement.
AUTO = "auto"
_SCOPE = "Region to compile at once: each repeated block, or the whole component. Absent: {}"


class Compile(ProgramPass):
    """Lower the regions of a component with a backend. Other operations are replayed one by one.

    With `scope` "blocks", a region is a repeated block of a class that diffusers declares in `_repeated_blocks`.
    `between` adds the operations between the blocks. With `scope` "whole", the region is the whole component, whose
    weights are then all needed at once. The component `scheduler` is the arithmetic between the denoiser's calls.
    """

    name: ClassVar[str] = "compile"
    summary: ClassVar[str] = "compile a component ahead of time: its repeated blocks or all of it"
    after: ClassVar = {"*": "engines are built from the result of the other passes"}
    requires_not: ClassVar = {
        "uncompilable": "an earlier pass left layers that no engine can hold",
        "hooked_inside": "its hooks are inside the blocks, which engines replace. Choose a schedule that reuses whole "
        "blocks, or do not compile the component",
        "gguf": "GGUF's layers are unpacked by operations that an engine would repeat at every call. Quantize the "
        "original weights with torchao, or do not compile the component",
    }
    #: The backend's own: what fits it, and its options, which are fields of `model_for` it.
    exporter: ClassVar[Any]

    backend: str = Field(DEFAULT_BACKEND, description=_BACKEND)
    scope: Literal["blocks", "whole"] | None = Field(None, description=_SCOPE.format("the backend's own choice."))
    between: bool = Field(False, description="Also compile the operations between the blocks.")
    dynamic: bool | None = Field(
        None,
        description="Build one engine for all sizes of a region where possible, instead of one engine a size. Absent: "
        "true if the inputs give a range of sizes.",
    )

    @classmethod
    def model_for(cls, options: Mapping[str, Any] | None = None, where: str = "") -> type[Pass]:
        """Returns the pass with the options of the backend that is named among its fields; with those of all."""
        known = tuple(plugins.plugins("exporters"))
        name = None if options is None else options.get("backend", DEFAULT_BACKEND)
        return _of_one(name) if name in known else _of_all(known)

    @classmethod
    def ways(cls, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        if options.get("backend") != AUTO:
            return {}
        backends = [plugins.load("exporters", name) for name in plugins.plugins("exporters")]
        return {each.name: {**options, "backend": each.name} for each in backends if each.complete}

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.get("backend") == AUTO:
            yield ("backend",), refuse("is chosen while a spec is compiled, which this is not", "Name a backend")
        if given.get("between") and given.get("scope") != "blocks" and (given.get("scope") or cls.exporter.whole):
            yield ("between",), refuse("the whole component is one region already", "Remove it")
        if given.get("component") == SCHEDULER:
            for name in ("scope", "between"):
                if given.get(name):
                    yield (name,), refuse("a scheduler has no blocks", "Remove it")

    @classmethod
    def no_such_field(cls, name: str) -> tuple[str, str] | None:
        """Returns the reason and the hint for an option that only other backends have; None for one that none has."""
        exporters = (plugins.load("exporters", each) for each in plugins.plugins("exporters"))
        having = [f'"{each.name}"' for each in exporters if _has(each.options, name)]
        if not having:
            return None
        hint = f'Remove it, or choose "backend": {" or ".join(having)}'
        return f"the backend {cls.exporter.name} has no such option", hint

    @property
    def whole(self) -> bool:
        """Returns True if the component is one region."""
        return self.scope == "whole" or (self.scope is None and self.exporter.whole)

    @property
    def engines_hold_weights(self) -> bool:
        """Returns True if an engine has the weights of all blocks that it runs."""
        lowered: dict[str, Any] = self.lowered()  # pyright: ignore[reportAttributeAccessIssue]: the options have it
        return self.exporter.holds_weights(lowered)

    def packages(self) -> dict[str, str]:
        """Returns what the backend's engines need, and the distribution that brings what runs them."""
        engine = plugins.plugins("engines").get(self.backend)
        return {**self.exporter.packages, **(engine.requirement if engine else {})}

    def provides(self) -> Iterable[Fact]:
        return [Fact("compiled", self.component, self.name)]

    def check(self, state: State, target: Target, where: str) -> Sequence[Problem]:
        if self.component != SCHEDULER or SCHEDULER in state.modules or state.scheduler is None:
            return super().check(state, target, where)
        return list(self._problems(None, state, target, where))

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        yield from self._problems(module, state, target, where)
        if not self.whole and not repeated_blocks(module):
            reason = f"{type(module).__name__} has no repeated blocks to compile"
            yield Problem(where, reason, 'Set "scope" to "whole", or remove it.')

    def _problems(self, module: torch.nn.Module | None, state: State, target: Target, where: str) -> Iterator[Problem]:
        if self.dynamic and len(state.variants) == 1:
            yield Problem(f"{where}.dynamic", "there is one variant, and so one size", "Remove it, or add sizes.")
        if self.backend not in plugins.plugins("engines"):
            reason = f"no package that is installed runs the engines of {self.backend}"
            yield Problem(
                f"{where}.backend", reason, "Install the torch that does: engines are tried when they are built."
            )
        facts = {fact.name for fact in state.facts if fact.component == self.component}
        if "slotted" in facts and self.engines_hold_weights:
            reason = f"the engines of {self.backend} hold their weights, so no adapter can be put into their slots"
            yield Problem(where, reason, 'Choose another backend, or remove "adapters" from "runtime".')
        yield from self.exporter.problems(self.component, module, facts, target, where, self)

    def check_recording(self, recording: Recording, target: Target, where: str) -> Iterable[Problem]:
        if module := recording.modules.get(self.component):
            yield from self.exporter.type_problems(self.component, module, target, self.whole, where)

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        """Yields what the spec asks of the runtime and promises of its targets, and engines do not allow."""
        yield from self.exporter.runtime_problems(self, spec.runtime, where)
        for index, target in enumerate(resolve_targets(spec)):
            at = f"$.target[{index}]" if isinstance(spec.target, tuple) else "$.target"
            yield from self.exporter.promise_problems(target, at)

    def run(self, state: State) -> Outcome:
        dynamic = state.ranged if self.dynamic is None else self.dynamic
        lowered: dict[str, Any] = self.lowered()  # pyright: ignore[reportAttributeAccessIssue]: the options have it
        request = CompileRequest(self.component, self.backend, lowered, dynamic)
        state = replace(state.with_facts(self.provides()), compile=(*state.compile, request))
        what = "whole" if self.whole else "blocks and the operations between" if self.between else "blocks"
        return Outcome(state, True, (f"{'arithmetic' if self.component == SCHEDULER else what} by {self.backend}",))

    @property
    def rewrites(self) -> bool:
        return self.component == SCHEDULER

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with the code to be lowered as regions.

        Raises:
            ValueError: there is nothing to lower between the denoiser's calls.
        """
        if self.component == SCHEDULER:
            recording = between_calls(recording)
        elif (module := recording.modules.get(self.component)) and (self.whole or self.between):
            outlined = whole(module) if self.whole else between_blocks(module)
            recording = replace(recording, modules={**recording.modules, self.component: outlined})
        return recording, ()


def _has(options: type[Strict], name: str) -> bool:
    """Returns True if a backend has an option, and does not only refuse its name."""
    field = options.model_fields.get(name)
    return field is not None and bool(field.description)


@cache
def _of_one(name: str) -> Any:
    """Returns the pass with the options of one backend."""
    exporter = plugins.load("exporters", name)
    model = create_model("Compile", __base__=(exporter.options, Compile), __doc__=Compile.__doc__)
    model.exporter = exporter
    return model


@cache
def _of_all(names: tuple[str, ...]) -> Any:
    """Returns the pass with the options that some backend has: it describes them, and refuses the name of any other
    backend."""
    backends = [plugins.load("exporters", name) for name in names]
    own: dict[str, list[FieldInfo]] = {}
    for backend in backends:
        for name, field in backend.options.model_fields.items():
            if field.description:
                own.setdefault(name, []).append(field)
    wholes = ", ".join(f"whole for {backend.name}" for backend in backends if backend.whole)
    described = {
        "backend": (Literal[(*names, AUTO)], Field(DEFAULT_BACKEND, description=_BACKEND)),
        "scope": (
            Compile.model_fields["scope"].annotation,
            Field(None, description=_SCOPE.format(f"{wholes}, blocks for the others.")),
        ),
        **{name: _of_several(fields) for name, fields in own.items()},
    }
    doc = " ".join(f"`{backend.name}` {backend.summary}" for backend in backends)
    model = create_model("Compile", __base__=Compile, __doc__=f"{cleandoc(str(Compile.__doc__))}\n\n{doc}", **described)
    model.exporter = plugins.load("exporters", DEFAULT_BACKEND)
    model.examples = tuple(example for backend in backends for example in backend.examples)
    return model


def _of_several(fields: Sequence[FieldInfo]) -> tuple[Any, FieldInfo]:
    """Returns the type and the field of an option that one backend has, or several, with what each says of it."""
    first = fields[0]
    if len(fields) == 1:
        return first.annotation, first
    described = " ".join(dict.fromkeys(str(field.description) for field in fields))
    return reduce(or_, (field.annotation for field in fields)), Field(first.default, description=described)


PLUGIN = Compile
