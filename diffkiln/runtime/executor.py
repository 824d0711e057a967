"""Runs call programs: components replayed operation by operation, regions by their engines, weights by schedule."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from diffkiln.errors import CallError, LimitExceeded
from diffkiln.guards import forks
from diffkiln.interpreter.aten import Interpreter, Special, dtype_of
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions
from diffkiln.program import ATTENTION, CALL, NOISE, REGION, STEP, Module, Op, Program, owner_of, weight_in
from diffkiln.runtime.attention import packaged
from diffkiln.runtime.engines import Engine, holds_weights
from diffkiln.runtime.graphs import Graphs
from diffkiln.runtime.host_numbers import place_constants, read_on_host
from diffkiln.runtime.noise import Generators, draw
from diffkiln.runtime.places import current
from diffkiln.runtime.precision import float32_precision
from diffkiln.runtime.weights import Cursor, Key, WeightStore

#: Set in the tests: every executor compares the type of every result with the declared one.
PARANOID = bool(os.environ.get("DIFFKILN_PARANOID"))

#: What is called at the end of a step: (step, timestep, latents) → latents.
StepEnd = Callable[[int, float, torch.Tensor], torch.Tensor]


#: Seconds that a call waits for another thread's.
PATIENCE = 600.0


class Executor:
    """Runs the call programs of one bundle on one device, one call at a time.

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

    Attributes:
        patience: seconds that a call waits for another thread's, before it raises.
    """

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
    ) -> None:
        self._seconds, self._ends, self._paranoid = seconds, 0.0, paranoid or PARANOID
        self.modules, self.store, self.engines, self.device = modules, store, engines, device
        self.tf32, self.graphs = tf32, graphs
        #: What runs attention by packages, and operators whose kernels for this device are not for all shapes.
        self.special: Mapping[str, Special] = {ATTENTION: packaged, **gpu_decompositions(device)}
        self.constants = place_constants(constants, device)
        self._components: dict[tuple[str, str], _Component] = {}
        self._calls: dict[int, _Call] = {}
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.patience = PATIENCE
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
    ) -> list[torch.Tensor]:
        """Run a call program.

        Args:
            program: a call; its inputs in order.
            inputs: tensors (moved to the device) and numbers.
            generator: where noise comes from.
            step_end: called after each denoising step; what it gives takes the latents' place.
            latents: give those of the last step, and not what the program gives.

        Raises:
            CallError: another thread runs this pipeline too long, or the callback gives latents of another shape, or
                there is a callback and nowhere to call it, or latents are asked for and there are no steps.
        """
        if latents and not any(op.name == STEP for op in program.ops):
            raise CallError("output_type: this pipeline does not show its latents. Choose 'pil', 'np' or 'pt'")
        if self.graphs is not None:
            self.graphs.check(step_end is not None)
        call = self._call(program)
        with self.running(call.schedule, generator, step_end), torch.inference_mode(), float32_precision(self.tf32):
            values = [item.to(self.device) if isinstance(item, torch.Tensor) else item for item in inputs]
            if self.graphs is not None:
                special = self._special()
                found = self.graphs(call.listed, values, lambda: self._weights(program), self.constants, special)
            else:
                found = call.run(values, self._weights(program), self.constants)
            return self.run.latents if latents else found

    def component(self, name: str, program: str) -> _Component:
        """One component program, ready to run."""
        key = (name, program)
        if key not in self._components:
            self._components[key] = _Component(self, name, self.modules[name].programs[program])
        return self._components[key]

    def run_component(self, name: str, program: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one component by itself (for verification): tensors in the order of its program's inputs."""
        component = self.component(name, program)
        with self.running(component.schedule), torch.inference_mode(), float32_precision(self.tf32):
            return component(*inputs)

    @contextlib.contextmanager
    def running(
        self, schedule: Sequence[Key], generator: Generators = None, step_end: StepEnd | None = None
    ) -> Iterator[None]:
        """A run that brings in groups of weights in this order. One at a time: other threads wait for their turn.

        Raises:
            CallError: another thread has been running this pipeline for longer than `patience`, or this one is; or the
                pipeline is on a GPU and was loaded before a fork.
        """
        if self._forked and self.device.type == "cuda":
            raise CallError("this pipeline was loaded before a fork, which CUDA does not survive. Load it in the child")
        lock = self._take_turn()
        self._run = run = _Run(self.store.follow(schedule), generator, step_end)
        self._ends = time.monotonic() + (self._seconds or 0.0)
        try:
            with current(self.device):
                yield
        finally:
            self._run = None
            try:
                run.cursor.close()
            finally:
                self._owner = None
                lock.release()

    def renew(self) -> None:
        """In a forked child: a call that another thread of the parent was making goes on there alone."""
        self._lock = threading.Lock()
        self._forked = True
        if self._run is not None and self._run.thread != threading.get_ident():
            self._run = self._owner = None
            self._components.clear()  # which hold what that call was using
            self._calls.clear()

    def _take_turn(self) -> threading.Lock:
        lock = self._lock
        if self._owner == threading.get_ident():
            raise CallError("this pipeline is called within its own call, say by a callback. Load the bundle twice")
        if not lock.acquire(timeout=self.patience):
            raise CallError(
                f"this pipeline has been running in another thread for {self.patience:.0f} seconds. Wait for it, or "
                "load the bundle once for each thread"
            )
        self._owner = threading.get_ident()
        return lock

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
        """Those that a call takes itself."""
        return {name: self.store.peek(*owner_of(name)) for name in program.weights}

    def _special(self) -> Mapping[str, Special]:
        return {CALL: self._call_op, NOISE: self._noise_op, STEP: self._step_op}

    def _call(self, program: Program) -> _Call:
        if id(program) not in self._calls:
            interpreter = self.interpreter(program, self._special())
            schedule = [
                key
                for op in program.ops
                if op.name == CALL
                for key in self.component(op.attrs["component"], op.attrs["program"]).schedule
            ]
            self._calls[id(program)] = _Call(program, interpreter.program, interpreter, schedule)
        return self._calls[id(program)]

    def _call_op(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        return self.component(op.attrs["component"], op.attrs["program"])

    def _noise_op(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        shape, dtype = op.attrs["shape"], dtype_of(op.attrs["dtype"])
        seeded = op.attrs.get("seeded", True)
        return lambda: [draw(shape, dtype, self.run.generator if seeded else None, self.device)]

    def _step_op(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        step, timestep = op.attrs["step"], op.attrs["timestep"]

        def end(latents: torch.Tensor) -> Sequence[torch.Tensor]:
            self.run.latents = [latents]
            if self.run.step_end is None:
                return [latents]
            changed = self.run.step_end(step, timestep, latents)
            if changed.shape != latents.shape or changed.dtype != latents.dtype:
                raise CallError(
                    f"callback_on_step_end gave latents {changed.dtype} {tuple(changed.shape)} after step {step}; they "
                    f"were {latents.dtype} {tuple(latents.shape)}"
                )
            self.run.latents = [changed.to(self.device)]
            return self.run.latents

        return end


class _Call(NamedTuple):
    """A call program, which is kept so that its id stays its own; the same as it runs here; its groups in order."""

    program: Program
    listed: Program
    run: Interpreter
    schedule: list[Key]


class _Run:
    """What belongs to one call."""

    def __init__(self, cursor: Cursor, generator: Generators, step_end: StepEnd | None) -> None:
        self.cursor, self.generator, self.step_end = cursor, generator, step_end
        self.thread = threading.get_ident()
        self.block: Key | None = None
        self.latents: list[torch.Tensor] = []


class _Component:
    """One component program with its weights' groups."""

    def __init__(self, executor: Executor, name: str, program: Program) -> None:
        self._executor, self._name, self._program = executor, name, program
        self._module = executor.modules[name]
        self._interpreter = executor.interpreter(program, {REGION: self._region, **executor.special})
        self._held: dict[str, torch.Tensor] = {}
        self._own = list(dict.fromkeys(executor.store.key_of(name, weight) for weight in self._weights()))
        self.schedule = [*self._own, *self._block_order()]

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

    def _weights(self) -> Iterator[str]:
        """Those that are needed throughout: of the operators around the blocks, and of regions that are no blocks."""
        yield from self._program.weights
        for op in self._program.ops:
            if op.name == REGION and not op.attrs["instance"]:
                engine = self._executor.engines.get((self._name, op.attrs["region"]))
                if engine is None or not holds_weights(engine):
                    yield from self._module.regions[op.attrs["region"]].weights

    def _block_order(self) -> list[Key]:
        """The groups of the regions in the order of their use; a group that serves neighbours comes once."""
        order: list[Key] = []
        for op in self._program.ops:
            key = self._group_of(op) if op.name == REGION else None
            if key is not None and key not in self._own and (not order or order[-1] != key):
                order.append(key)
        return order

    def _group_of(self, op: Op) -> Key | None:
        """The group of a block's weights; None for a region that is no block, or has none."""
        weights = self._module.regions[op.attrs["region"]].weights if op.attrs["instance"] else ()
        return self._executor.store.key_of(self._name, weight_in(op, weights[0])) if weights else None

    def _enter_block(self, key: Key | None) -> Mapping[str, torch.Tensor]:
        """Make a block's group the one that is in use; the one before it may leave."""
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
        region, key, constants = self._module.regions[name], self._group_of(op), self._executor.constants
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
