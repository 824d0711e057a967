"""Runs call programs: components replayed operation by operation, regions by their engines, weights by schedule."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from diffkiln.errors import CallError, LimitExceeded
from diffkiln.guards import forks
from diffkiln.guards.host_memory import return_memory
from diffkiln.interpreter.aten import CutShort, Interpreter, Special, dtype_of
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions
from diffkiln.program import (
    ATTENTION,
    CALL,
    NOISE,
    NORMAL,
    REGION,
    STEP,
    Module,
    Op,
    Program,
    last_step,
    owner_of,
    weight_in,
    why_unseen,
    why_whole,
)
from diffkiln.program.exchange import exchanged
from diffkiln.program.moments import Groups, Key
from diffkiln.program.residency import Residency
from diffkiln.runtime.attention import packaged
from diffkiln.runtime.current_device import current
from diffkiln.runtime.engines import Engine, holds_weights
from diffkiln.runtime.finite import Outputs, all_finite, check, not_finite, outputs_of
from diffkiln.runtime.graphs import WHOLE, Graphs
from diffkiln.runtime.host_numbers import constants_on, read_on_host
from diffkiln.runtime.noise import Generators, draw
from diffkiln.runtime.precision import float32_precision
from diffkiln.runtime.processes import Group, digest_of, shared_operations, together
from diffkiln.runtime.streaming import Recorder, SlotCursor
from diffkiln.runtime.turns import PATIENCE, Turn, Turns
from diffkiln.runtime.weights import COMES_AND_GOES, Cursor, WeightStore

#: Set in the tests: every executor compares the type of every result with the declared one.
PARANOID = bool(os.environ.get("DIFFKILN_PARANOID"))

#: What is called at the end of a step: (step, timestep, latents) → latents.
StepEnd = Callable[[int, float, torch.Tensor], torch.Tensor]


class Executor:
    """The executor of one bundle's call programs on one device, one call at a time.

    Args:
        modules: components by name.
        store: their weights.
        constants: folded tensors by key, on the CPU.
        engines: (component, region) → engine; regions without one are replayed.
        device: where everything runs.
        tf32: whether a GPU may compute float32 products in TF32; None leaves torch's settings alone.
        graphs: launches calls as CUDA graphs; None launches operation by operation.
        seconds: how long one call may take, looked at before each operation; None for no limit.
        paranoid: compares the type of every result with the declared one.
        planned: gives the plan of a call's weights; without it groups that are offloaded come and go.
        group: the processes that run each call together; None for this one alone.
        frugal: returns to the system what the C library keeps of freed memory, before another component runs.

    Attributes:
        turns: whose call runs, and who waits.
        observer: opened around each component of a call, with the component's name; not where calls are CUDA graphs.
    """

    observer: Callable[[str], contextlib.AbstractContextManager[object]] | None = None

    def __init__(
        self,
        modules: Mapping[str, Module],
        store: WeightStore,
        constants: Mapping[str, torch.Tensor],
        engines: Mapping[tuple[str, str], Engine],
        device: torch.device,
        tf32: bool | None = None,
        graphs: Graphs | None = None,
        seconds: float | None = None,
        paranoid: bool = False,
        planned: Callable[[Program], Residency] | None = None,
        group: Group | None = None,
        frugal: bool = False,
    ) -> None:
        self._planned, self.group, self._frugal = planned, group, frugal
        self._seconds, self._ends, self._paranoid = seconds, 0.0, paranoid or PARANOID
        self.modules, self.store, self.engines, self.device = modules, store, engines, device
        self.tf32, self.graphs = tf32, graphs
        #: What runs attention by packages, and operators whose kernels for this device are not for all shapes.
        self.special: Mapping[str, Special] = {
            ATTENTION: packaged,
            **gpu_decompositions(device),
            **shared_operations(group),
        }
        self.constants = constants_on(constants, device)
        inside = {key for key, engine in engines.items() if holds_weights(engine)}
        self.groups = Groups(modules, lambda component, weight: store.key_of(component, weight), inside)
        self._components: dict[tuple[str, str], _Component] = {}
        self._calls: dict[int, _Call] = {}
        self.turns = Turns()
        self._run: _Run | None = None
        self._forked = False
        forks.renewed(self)

    def __call__(
        self,
        program: Program,
        inputs: Sequence[Any],
        generator: Generators = None,
        step_end: StepEnd | None = None,
        latents: bool = False,
        timeout: float | None = PATIENCE,
        allow_nan: bool = False,
        ready: Callable[[Program], Program] = lambda program: program,
    ) -> list[torch.Tensor]:
        """Runs a call program.

        Args:
            program: a call; its inputs in order.
            inputs: tensors (moved to the device) and numbers.
            generator: where noise comes from.
            step_end: called after each denoising step; what it gives takes the latents' place.
            latents: give those of the last step, and not what the program gives.
            timeout: seconds to wait for calls of other threads; None waits for ever.
            allow_nan: give results that are not finite, too.
            ready: called first, within this call's turn; gives the program that runs, which takes the same inputs.

        Raises:
            Busy: other threads run this pipeline for longer than `timeout`.
            NotFinite: the result is not finite, or a decoder's output is not.
            CallError: the callback gives latents of another shape, or there is a callback and nowhere to call it, or
                latents are asked for and there are no steps.
        """
        if latents and not any(op.name == STEP for op in program.ops):
            raise CallError("output_type: this pipeline does not show its latents. Choose 'pil', 'np' or 'pt'")
        if self.graphs is not None:
            self.graphs.check(step_end is not None)
        with self._turn(timeout) as turn, torch.inference_mode(), float32_precision(self.tf32):
            call = self._call(ready(program))
            with self._begun(_Run(turn, self.store.follow(call.schedule, call.residency), generator, step_end)) as run:
                run.call, run.watched = call.program, not allow_nan
                if self.group is not None:
                    self.group.agree(digest_of(call.program, inputs))
                values = [item.to(self.device) if isinstance(item, torch.Tensor) else item for item in inputs]
                with together(self.group):
                    found = self._run_call(call, run, values)
                given = run.latents if latents else found
                if not allow_nan:
                    self._check_finite(run, given, decoded=not latents)
                return given

    def _run_call(self, call: _Call, run: _Run, values: Sequence[Any]) -> list[torch.Tensor]:
        if self.graphs is None:
            return call.run(values, self._weights(call.program), self.constants)
        own, stopped = partial(self._weights, call.program), lambda: run.turn.interrupted
        streams = Recorder(self.store, self._slot_cursor, self._uses) if self.store.streams else None
        return self.graphs(call.listed, values, own, self.constants, self._special(), stopped, streams)

    def _check_finite(self, run: _Run, given: Sequence[torch.Tensor], decoded: bool) -> None:
        if self.graphs is None or all_finite(given):
            check(run.outputs, given, decoded)
        else:
            raise not_finite(*self.graphs.first_not_finite())

    def interrupt(self) -> bool:
        """Ends the call that runs now after the step that it is in; what follows the steps is still run.

        Returns:
            False where no call runs.

        Raises:
            CallError: this call cannot be cut short.
        """
        run = self._run
        if run is None:
            return False
        if reason := self._why_whole(run.call):
            raise CallError(
                f"interrupt: this pipeline's call cannot be cut short, since {reason}. Raise an exception in a "
                "callback to end it without a result"
            )
        run.turn.interrupted = True
        return True

    def preview(self) -> tuple[Program, list[torch.Tensor]]:
        """Decodes the latents of the step that has just ended, as if it were the last one; the call then goes on.

        Returns:
            The call program that runs, and what it would give.

        Raises:
            CallError: no step of this thread's call has just ended, or the call's latents cannot be decoded.
        """
        run = self._run
        if run is None or run.call is None or not run.shown or run.turn.thread != threading.get_ident():
            raise CallError("preview: there is something to show at the end of a step: ask in callback_on_step_end")
        if reason := why_unseen(run.call):
            raise CallError(f"preview: this pipeline's steps cannot be shown, since {reason}")
        if self.group is not None and exchanged(run.call, self.modules)[-1].count:
            raise CallError("preview: several processes decode an image together, and one cannot do so by itself")
        call = self._call(run.call)
        run_last = call.run.as_if_last if self.graphs is None else self.graphs.as_if_last
        with run.aside(self._after_steps(call)):
            return run.call, run_last(run.latents[0])

    def _after_steps(self, call: _Call) -> Cursor | SlotCursor:
        """Begins what follows the last step by itself. Within a limit of memory, the denoiser's weights make room."""
        plan = call.residency
        alone = replace(COMES_AND_GOES, ahead=plan.ahead) if plan is not None and plan.strategy == "auto" else None
        return self.store.follow(self._order(call.listed.ops[last_step(call.listed) + 1 :]), alone)

    def _why_whole(self, call: Program | None) -> str:
        if call is None:
            return "a component runs by itself"
        if self.group is not None:
            return "several processes run it together, and one cannot end it for the others"
        if self.graphs is not None and self.graphs.unit == WHOLE:
            return "all steps are one CUDA graph"
        return why_whole(call)

    def component(self, name: str, program: str) -> _Component:
        """Returns one component program, ready to run."""
        key = (name, program)
        if key not in self._components:
            self._components[key] = _Component(self, name, program)
        return self._components[key]

    def run_component(self, name: str, program: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs one component by itself (for verification), on tensors in the order of its program's inputs."""
        component = self.component(name, program)
        with self.running(component.schedule), torch.inference_mode(), float32_precision(self.tf32):
            return component(*inputs)

    @contextlib.contextmanager
    def running(self, schedule: Sequence[Key]) -> Iterator[_Run]:
        """Begins a run that brings in groups of weights in this order. Other threads wait for their turn.

        Raises:
            Busy: other threads have been running this pipeline for too long.
            CallError: this thread is running it; or it is closed; or it is on a GPU and was loaded before a fork.
        """
        with self._turn(PATIENCE) as turn, self._begun(_Run(turn, self.store.follow(schedule))) as run:
            yield run

    @contextlib.contextmanager
    def _turn(self, timeout: float | None) -> Iterator[Turn]:
        if self._forked and self.device.type == "cuda":
            raise CallError("this pipeline was loaded before a fork, which CUDA does not survive. Load it in the child")
        with self.turns.taken(timeout) as turn:
            yield turn

    @contextlib.contextmanager
    def _begun(self, run: _Run) -> Iterator[_Run]:
        self._run = run
        self._ends = time.monotonic() + (self._seconds or 0.0)
        try:
            with current(self.device):
                yield run
        finally:
            self._run = None
            run.cursor.close()

    def renew(self) -> None:
        """Begins anew in a forked child: a call that another thread of the parent was making goes on there alone."""
        self._forked = True
        if self._run is not None and self._run.turn.thread != threading.get_ident():
            self._run = None
            self._components.clear()  # which hold what that call was using
            self._calls.clear()

    @property
    def run(self) -> _Run:
        if self._run is None:
            raise CallError("a component runs only within a call")
        return self._run

    def interpreter(self, program: Program, special: Mapping[str, Special]) -> Interpreter:
        """Returns what replays a program within a call."""
        watch = self._watch if self._seconds is not None else None
        listed = read_on_host(program, self.device)
        return Interpreter(listed, self.device, special, self._paranoid, watch, explain=True)

    def _watch(self) -> None:
        if time.monotonic() > self._ends:
            raise LimitExceeded(
                f"the call took longer than the {self._seconds} seconds that limits.seconds allows. Raise the limit in "
                "load(limits=…), or ask for fewer steps"
            )

    def _weights(self, program: Program) -> dict[str, torch.Tensor]:
        """Returns the weights that a call takes itself."""
        return {name: self.store.peek(*owner_of(name)) for name in program.weights}

    def _special(self) -> Mapping[str, Special]:
        own = {CALL: self._call_op, NOISE: self._noise_op, STEP: self._step_op}
        return {**own, **shared_operations(self.group)}

    def _call(self, program: Program) -> _Call:
        if id(program) not in self._calls:
            interpreter = self.interpreter(program, self._special())
            residency = self._planned(program) if self._planned is not None else None
            order = self._order(program.ops)
            self._calls[id(program)] = _Call(program, interpreter.program, interpreter, order, residency)
        return self._calls[id(program)]

    def _order(self, ops: Sequence[Op]) -> list[Key]:
        """Returns the groups of weights that operations of a call use, in the order of their use."""
        calls = [op.attrs for op in ops if op.name == CALL]
        return [key for attrs in calls for key in self.component(attrs["component"], attrs["program"]).schedule]

    def _uses(self, ops: Sequence[Op]) -> int:
        return len(self._order(ops))

    def _slot_cursor(self) -> SlotCursor:
        assert isinstance(self.run.cursor, SlotCursor), "weights that stream have a cursor of their own"
        return self.run.cursor

    def _call_op(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        name = op.attrs["component"]
        component = self.component(name, op.attrs["program"])
        if self.graphs is not None:
            return component  # what is launched again runs nothing here: graphs have their results looked at

        def call(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
            if self._frugal and self.run.component != name:
                return_memory()
            self.run.component = name
            with self.observer(name) if self.observer is not None else contextlib.nullcontext():
                given = component(*inputs)
            if self.run.watched and (outputs := outputs_of(name, given)) is not None:
                self.run.outputs.append(outputs)
            return given

        return call

    def _noise_op(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        shape, dtype = op.attrs["shape"], dtype_of(op.attrs["dtype"])
        seeded, distribution = op.attrs.get("seeded", True), op.attrs.get("distribution", NORMAL)

        def drawn() -> Sequence[torch.Tensor]:
            noise = draw(shape, dtype, self.run.generator if seeded else None, self.device, distribution)
            # Every process draws, so that its generator moves on, and all take what the first one has drawn.
            return [noise if self.group is None else self.group.from_first(noise)]

        return drawn

    def _step_op(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        step, timestep = op.attrs["step"], op.attrs["timestep"]

        def end(latents: torch.Tensor) -> Sequence[torch.Tensor]:
            self.run.latents = [latents]
            if self.group is not None:
                self.group.settle()
            if self.run.step_end is None:
                return self._goes_on()
            self.run.shown = True
            try:
                changed = self.run.step_end(step, timestep, latents)
            finally:
                self.run.shown = False
            if changed.shape != latents.shape or changed.dtype != latents.dtype:
                raise CallError(
                    f"callback_on_step_end gave latents {changed.dtype} {tuple(changed.shape)} after step {step}; they "
                    f"were {latents.dtype} {tuple(latents.shape)}"
                )
            self.run.latents = [changed.to(self.device)]
            return self._goes_on()

        return end

    def _goes_on(self) -> Sequence[torch.Tensor]:
        """Returns the latents at the end of a step, unless the caller wants no further one."""
        run = self.run
        if run.turn.interrupted:
            call = self._call(run.call) if run.call is not None else None
            if call is not None and call.residency is not None:
                run.cursor = self._after_steps(call)  # the plan is that of a call that goes on
            raise CutShort(run.latents[0])
        return run.latents


class _Call(NamedTuple):
    """A call program, which is kept so that its id stays its own; the same as it runs here; its groups in order, and
    which of them stay.
    """

    program: Program
    listed: Program
    run: Interpreter
    schedule: list[Key]
    residency: Residency | None


class _Run:
    """The state of one call."""

    def __init__(
        self,
        turn: Turn,
        cursor: Cursor | SlotCursor,
        generator: Generators = None,
        step_end: StepEnd | None = None,
    ) -> None:
        self.turn, self.cursor, self.generator, self.step_end = turn, cursor, generator, step_end
        self.call: Program | None = None
        self.watched = False
        self.outputs: list[Outputs] = []
        self.block: Key | None = None
        self.component = ""
        self.latents: list[torch.Tensor] = []
        self.shown = False

    @contextlib.contextmanager
    def aside(self, cursor: Cursor | SlotCursor) -> Iterator[None]:
        """Leaves this run's place in its schedule, and what is known of its outputs, as they are for a while."""
        kept = self.cursor, self.watched
        self.cursor, self.watched = cursor, False
        try:
            yield
        finally:
            self.cursor, self.watched = kept


class _Component:
    """One component program with its weights' groups."""

    def __init__(self, executor: Executor, name: str, program: str) -> None:
        self._executor, self._name = executor, name
        self._module = executor.modules[name]
        listed = self._module.programs[program]
        self._interpreter = executor.interpreter(listed, {REGION: self._region, **executor.special})
        self._held: dict[str, torch.Tensor] = {}
        self._own = executor.groups.own(name, program)
        self.schedule = executor.groups.entered(name, program)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        run = self._executor.run
        for key in self._own:
            self._held.update(run.cursor.enter(key))
        try:
            return self._interpreter(inputs, self._held, self._executor.constants)
        finally:
            self._held.clear()
            self._enter_block(None)
            for key in self._own:
                run.cursor.leave(key)

    def _enter_block(self, key: Key | None) -> Mapping[str, torch.Tensor]:
        """Makes a block's group the one in use; the group before it may leave."""
        run = self._executor.run
        if key in self._own:
            return self._executor.store.get(key)  # type: ignore[arg-type]
        before, run.block = run.block, key
        if before is not None and before != key:
            run.cursor.leave(before)
        if key is None:
            return self._held
        return run.cursor.enter(key) if before != key else self._executor.store.get(key)

    def _region(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        name, prefix = op.attrs["region"], weight_in(op, "")
        region, key, constants = (
            self._module.regions[name],
            self._executor.groups.of_block(self._name, op),
            self._executor.constants,
        )
        engine = self._executor.engines.get((self._name, name))
        if engine is None:
            replay = self._executor.interpreter(region, self._executor.special)
            return lambda *args: replay(args, self._enter_block(key), constants, prefix)
        folded = [constants[item] for item in region.constants]
        if holds_weights(engine):
            inside = [torch.empty(0, device=self._executor.device)] * len(region.weights)
            return lambda *args: engine([*args, *inside, *folded])
        names = [weight_in(op, weight) for weight in region.weights]

        def call(*args: torch.Tensor) -> Sequence[torch.Tensor]:
            weights = self._enter_block(key)
            return engine([*args, *[weights[item] for item in names], *folded])

        return call
