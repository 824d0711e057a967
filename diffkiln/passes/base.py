"""What a pass is: options that are its fields, a check from configuration, and one method that does the work.

A model pass changes one component's module. It runs twice: on the *meta model*, a module without weights, which shows
what will be compiled before a byte is read; and on the real module, when its weights are streamed into the bundle. Both
must come out with the same names, shapes and dtypes, which the compiler checks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, ValidationError

from diffkiln import plugins
from diffkiln.errors import Problem, SpecError
from diffkiln.models.added import Added
from diffkiln.program import Module
from diffkiln.spec import Spec, Strict, Target, problems_from, suggest

if TYPE_CHECKING:
    from diffkiln.record.pipeline import Recording


@dataclass(frozen=True)
class Fact:
    """A property of a component that a pass established, such as `qkv_fused(transformer)`.

    `by` names the pass. `kind` is one word for several facts that make the same illegal, and `reason` says why this one
    does, which the illegal pass cannot know.
    """

    name: str
    component: str
    by: str = field(default="", compare=False)
    kind: str = field(default="", compare=False)
    reason: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.name}({self.component})"


@dataclass(frozen=True)
class CompileRequest:
    """A component whose regions are to be lowered, and how: with one engine for all sizes if `dynamic`."""

    component: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dynamic: bool = False

    @property
    def holds_weights(self) -> bool:
        """Returns True if the engines hold their weights, which are then needed to build them."""
        return plugins.load("exporters", self.backend).holds_weights(self.options)


@dataclass(frozen=True)
class State:
    """The compiler's state between passes. A pass returns a new one.

    `modules` are meta models: modules of true structure, shapes and dtypes without weights. `variants` are the keywords
    that each variant fixes, and its `batch_size`. `wanted_steps` are their numbers of steps, and `steps` those in which
    they call the denoiser, which the `scheduler` decides; empty where two denoisers share the run. `ranged` says that
    sizes come from a range. `added` are the modules that passes add, which no step calls.
    """

    class_name: str
    modules: Mapping[str, torch.nn.Module]
    facts: frozenset[Fact] = frozenset()
    compile: tuple[CompileRequest, ...] = ()
    wanted_steps: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    variants: tuple[Mapping[str, Any], ...] = ({},)
    scheduler: Any = None
    ranged: bool = False
    added: frozenset[str] = frozenset()

    @property
    def denoisers(self) -> list[str]:
        """Returns the components that a denoising step calls: models of diffusers without a decoder."""
        models = {name: type(module) for name, module in self.modules.items() if name not in self.added}
        own = [name for name, kind in models.items() if kind.__module__.startswith("diffusers.")]
        return [name for name in own if not hasattr(models[name], "decode")]

    def with_facts(self, facts: Iterable[Fact]) -> State:
        return replace(self, facts=self.facts | frozenset(facts))


@dataclass(frozen=True)
class Outcome:
    """The result of running a pass: the new state, whether anything changed, and notes for the report."""

    state: State
    changed: bool
    notes: tuple[str, ...] = ()


class Restored(Protocol):
    """A bundle that is about to run as diffusers' own pipeline.

    Attributes:
        modules: the recorded components.
        compiled: the components that have engines.
        eager: whether diffusers' own blocks may run where engines do not fit.
        to_disk: whether weights are offloaded to a disk.
    """

    @property
    def modules(self) -> Mapping[str, Module]: ...
    @property
    def compiled(self) -> frozenset[str]: ...
    @property
    def eager(self) -> bool: ...
    @property
    def to_disk(self) -> bool: ...

    def check_kernel(self, component: str, kernel: str) -> None:
        """Raises `Incompatible` if the device cannot run the attention kernel."""


class Pass(Strict):
    """A pass. Its pydantic fields are its options: they give the JSON Schema, the help and the provenance.

    Class attributes: `name`, the word in the spec; `version`, which grows when the same options give another result;
    `summary`, one line for a person; `examples`, entries of a spec; `requires_not`, facts that make it illegal, with
    the reason; `repeats`, whether it may stand more than once for a component; `maps`, whether the spec may give a
    `mapping` of components to options instead of one component; `features`, what a reader of the bundle must know;
    `needs_all`, why `apply` takes a component with all of its weights only, after the pass's name in a sentence: else
    it is given modules in which some blocks have data and the others are meta models; `before` and `after`, the passes
    of the same component that it must stand before or after, each with the reason, "*" for all others; `before_all`,
    those of `before` that may be of any component; `takes`, facts of earlier passes that are there for its sake;
    `moves_layers`, how layers came to have other names, so that an adapter's names would mean other layers;
    `folds_weights`, what was computed from weights once, so that changes of them would come too late; `adds`, whether
    it adds a component to the pipeline (`added`); `asked_at`, the JSON path that asks for it where the list does not
    (`implied`).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str]
    examples: ClassVar[tuple[dict[str, Any], ...]]
    requires_not: ClassVar[Mapping[str, str]] = {}
    repeats: ClassVar[bool] = False
    maps: ClassVar[bool] = False
    features: ClassVar[frozenset[str]] = frozenset()
    needs_all: ClassVar[str] = ""
    before: ClassVar[Mapping[str, str]] = {}
    before_all: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[Mapping[str, str]] = {}
    takes: ClassVar[frozenset[str]] = frozenset()
    moves_layers: ClassVar[str] = ""
    folds_weights: ClassVar[str] = ""
    adds: ClassVar[bool] = False
    asked_at: ClassVar[str] = ""

    component: str = Field(description="Component by its name in the pipeline, such as transformer or unet.")

    @classmethod
    def model_for(cls, options: Mapping[str, Any] | None = None, where: str = "") -> type[Pass]:
        """Returns the model that reads these options, where a choice among them decides which others there are.

        Args:
            options: of a spec or a manifest; None for the model that schema and help show.
            where: their JSON path.

        Raises:
            SpecError: they choose a method that the pass does not have.
        """
        return cls

    @classmethod
    def variants(cls) -> Mapping[str, type[Pass]]:
        """Returns the options models of a pass with several methods by what a user calls each; most have none."""
        return {}

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Pass:
        """Returns the pass with these options of a spec, which stand at the JSON path `where`.

        Raises:
            SpecError: some are wrong; says all of them.
        """
        model = cls.model_for(options, where)
        try:
            return model.model_validate(options)
        except ValidationError as error:
            raise SpecError(problems=problems_from(error, model, where)) from None

    @classmethod
    def ways(cls, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Returns, by name, the options among which a build chooses by measuring; none where nothing is left open."""
        return {}

    @classmethod
    def within_memory(cls, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Returns, by name, the options of which a build takes the first that fit the memory; none for others."""
        return {}

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterable[Pass]:
        """Returns passes that the spec asks for elsewhere than in its list; most are asked for there alone."""
        return ()

    def prepare(self, base: Path, pipeline_class: type) -> Pass:
        """Returns the pass with its files found and read; relative paths start from `base`.

        Raises:
            SourceError: a file is not there or is not what the pass needs.
        """
        return self

    def check(self, state: State, target: Target, where: str) -> Sequence[Problem]:
        """Returns the reasons why the pass is illegal here, from configuration alone; `where` is its JSON path."""
        problems = unknown_component(self.component, state, where)
        if problems:
            return problems
        for fact in sorted(state.facts, key=str):
            refused = self.requires_not.get(fact.name) or self.requires_not.get(fact.kind)
            if fact.component == self.component and refused:
                after = f"{self.name} cannot follow {fact.by}: " if fact.by else f"{self.name} after {fact}: "
                problems.append(Problem(where, after + (fact.reason or refused)))
        return problems or list(self.check_module(state.modules[self.component], state, target, where))

    @property
    def decodes(self) -> Literal["", "one", "tiles"]:
        """Returns how images are decoded: one at a time, or in tiles; "" where the pass says nothing of it."""
        return ""

    def added(self) -> Sequence[Added]:
        """Returns the components that the pass adds to the pipeline, once it is prepared."""
        return ()

    def origins(self) -> Iterable[tuple[Mapping[str, Any], Path]]:
        """Returns files of others that go into the weights: their description in the options, and their path."""
        return ()

    def notices(self, recording: Recording, compiled: Collection[str]) -> Iterable[str]:
        """Returns what a user should know once the programs are rewritten; `compiled` are the components with
        engines."""
        return ()

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        """Returns what the rest of the spec makes illegal, of which `others` are all passes."""
        return ()

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        """Yields the pass's own objections to this component."""
        return ()

    def run(self, state: State) -> Outcome:
        """Applies the pass to the state's meta model.

        Raises:
            Exception: whatever goes wrong; the manager turns it into a PassError that names the pass.
        """
        notes = self.apply(state.modules[self.component])
        return Outcome(state.with_facts(self.provides()), bool(notes), tuple(notes))

    def provides(self) -> Iterable[Fact]:
        return ()

    def packages(self) -> dict[str, str]:
        """Returns the packages that the bundle needs at run time, each with a version specifier."""
        return {}

    @property
    def rewrites(self) -> bool:
        """Returns True if the pass does nothing without a program to rewrite."""
        return False

    @property
    def leaves_weights_out(self) -> bool:
        """Returns True if the bundle may lack weights of the component that its module has."""
        return False

    def check_recording(self, recording: Recording, target: Target, where: str) -> Iterable[Problem]:
        """Yields reasons why the pass is illegal that only the recorded programs show; `where` is its JSON path."""
        return ()

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with its programs rewritten, and notes; most passes change nothing."""
        return recording, ()

    def complete(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with programs beside those that all passes have left, and notes; most add none."""
        return recording, ()

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        """Changes the module in place; gives notes on what was done, none if nothing was."""
        return ()

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON."""
        return self.model_dump(mode="json")

    # -- a bundle as diffusers' own pipeline; `options` are those of a manifest, as `options()` gave them --

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        """Raises `Incompatible` if diffusers' pipeline cannot do what the pass did."""

    @classmethod
    def restore(cls, module: torch.nn.Module, options: Mapping[str, Any]) -> None:
        """Does again what the pass did to the module's structure. The module has no weights yet."""

    @classmethod
    def restore_weight(
        cls, layer: str, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Returns a weight that the pass split into parts, put together again; None for a layer that the pass left
        alone.

        Args:
            layer: its name in the component.
            weight: as diffusers builds it, on the meta device.
            parts: the tensors that the bundle holds for it, by name.

        Raises:
            ValueError: they do not fit together.
        """
        return None

    @classmethod
    def restore_call(cls, module: torch.nn.Module, options: Mapping[str, Any]) -> None:
        """Changes how the module is called. It has its weights, and neither engines nor hooks yet.

        Raises:
            Incompatible: diffusers cannot do what the pass did.
        """

    @classmethod
    def restore_run(cls, pipe: Any, options: Mapping[str, Any]) -> None:
        """Changes how the pipeline runs, after everything else.

        Raises:
            Incompatible: as `restore_call`.
        """


class ModelPass(Pass):
    """A pass that changes one component's module: its structure, or its weights."""

    @abstractmethod
    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        """Changes the module in place; gives notes on what was done, none if nothing was."""


class ProgramPass(Pass):
    """A pass that leaves modules alone: it rewrites programs, or decides how they run."""


def unknown_component(component: str, state: State, where: str) -> list[Problem]:
    if component in state.modules:
        return []
    hint = suggest(component, state.modules) or f"It has {', '.join(state.modules)}."
    return [Problem(f"{where}.component", f"{state.class_name} has no component {component!r}", hint)]
