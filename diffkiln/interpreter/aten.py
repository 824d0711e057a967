"""Programs meet torch here: operators by name, and an interpreter that runs a program's operations one by one.

The runtime replays with it what is not compiled, the exporters trace through it to lower a region, and the compiler
checks recordings with it. It imports torch and the IR, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffkiln.errors import CallError, DiffkilnError, Incompatible, VerifyError
from diffkiln.guards.gate import is_no_memory
from diffkiln.interpreter.attention import by_kernel
from diffkiln.interpreter.checked import checked
from diffkiln.interpreter.dtypes import dtype_of, format_of
from diffkiln.program import (
    Device,
    DType,
    Layout,
    MemoryFormat,
    Op,
    Program,
    Ref,
    TensorType,
    kernel_of,
    last_step,
    refs,
)
from diffkiln.program.operators import allowed, has_equal

#: Gives for an operation that is not ATen's the function that runs it: tensors in, a sequence of tensors out.
Special = Callable[[Op], Callable[..., Sequence[torch.Tensor]]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def type_of(tensor: torch.Tensor) -> TensorType:
    return TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))


def overload(name: str) -> torch._ops.OpOverload:
    """Returns the operator that "aten.add.Tensor" names.

    Raises:
        Incompatible: this torch has no such operator.
        VerifyError: the name is not in the closed list.
    """
    if not allowed(name):
        raise VerifyError(f"{name} is not in the closed list of operators")
    _, packet, which = name.split(".")
    try:
        found = getattr(getattr(torch.ops.aten, packet), which)
    except AttributeError:
        raise Incompatible(f"torch {torch.__version__} has no operator {name}, which the program uses") from None
    if found._schema.is_mutable:
        raise VerifyError(f"{name} writes to its arguments, which no program may")
    return found


def schemas(programs: Sequence[Program]) -> dict[str, str]:
    """Returns the schema of every ATen operator that the programs use; loading a bundle compares them."""
    names = {op.name for program in programs for op in program.ops if op.is_aten}
    return {name: str(overload(name)._schema) for name in sorted(names)}


def check_schemas(recorded: Mapping[str, str]) -> None:
    """Compares the schemas that a bundle was recorded with to this torch's.

    Raises:
        Incompatible: lists every operator that is missing or has another schema, found against required.
    """
    wrong = []
    for name, schema in recorded.items():
        if has_equal(name):
            continue  # another operator is run in its place
        found = str(overload(name)._schema)
        if found != schema:
            wrong.append(f"{name}: found {found}, required {schema}")
    if wrong:
        raise Incompatible(
            f"torch {torch.__version__} has changed operators that the bundle uses:\n" + "\n".join(wrong)
        )


def literal(arg: Any, device: torch.device) -> Any:
    """Returns a literal argument as torch takes it; `Ref`s stay."""
    match arg:
        case DType(name):
            return dtype_of(name)
        case Device():
            return device
        case MemoryFormat(name) | Layout(name):
            return format_of(name)
        case tuple() | list():
            return [literal(item, device) for item in arg]
    return arg


def in_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a complex tensor as a real one whose last dimension holds real and imaginary parts; others unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class CutShort(Exception):
    """Raised by the end of a step: no more steps run, and what follows the last one goes on from `latents`."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__("cut short")
        self.latents = latents


class Interpreter:
    """The interpreter of one program on one device. Values live in slots and are freed after their last use.

    Args:
        program: verified.
        device: what the symbolic device stands for.
        special: for CALL, REGION, NOISE, STEP and ATTENTION, by the operation's name. One for an ATen operator takes
            its place.
        paranoid: compares the type of each result with the one that the program declares.
        watch: called before each operation; what it raises ends the run.
        explain: turns what torch raises for an operator into a CallError that names the operation.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device | str = "cpu",
        special: Mapping[str, Special] | None = None,
        paranoid: bool = False,
        watch: Callable[[], None] | None = None,
        explain: bool = False,
    ) -> None:
        self.program = program
        self._paranoid, self._watch, self._explain = paranoid, watch, explain
        self.device = torch.device(device)
        self._slots: dict[str, int] = {}
        self._inputs = [self._slot(item.name) for item in program.inputs]
        self._weights = [(self._slot(f"@{name}"), name) for name in program.weights]
        self._constants = [(self._slot(f"#{key}"), key) for key in program.constants]
        self._steps = [self._step(op, special or {}) for op in program.ops]
        self._outputs = [self._slot(ref.name) for ref in program.outputs]
        self._free = self._last_uses()
        self._env: list[Any] = []

    def __call__(
        self,
        inputs: Sequence[torch.Tensor],
        weights: Mapping[str, torch.Tensor] | None = None,
        constants: Mapping[str, torch.Tensor] | None = None,
        prefix: str = "",
    ) -> list[torch.Tensor]:
        """Runs the program: takes tensors in the order of its inputs, and returns its outputs in their order.

        `weights` is looked up at every call as `prefix + name`, `constants` by key.
        """
        env: list[Any] = [None] * len(self._slots)
        for slot, value in zip(self._inputs, inputs, strict=True):
            env[slot] = value
        for slot, name in self._weights:
            env[slot] = weights[prefix + name]  # type: ignore[index]
        for slot, key in self._constants:
            env[slot] = constants[key]  # type: ignore[index]
        self._env = env
        try:
            self._run(env, self._steps, self._free)
        except CutShort as cut:
            self._finish(env, cut.latents)
        finally:
            self._env = []
        return [env[slot] for slot in self._outputs]

    def as_if_last(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Returns what the program would give if the step that has just ended were its last one.

        The end of a step may call it. The run then goes on as if it had not: it has its values to itself.

        Args:
            latents: Of that step.
        """
        env = list(self._env)
        self._finish(env, latents)
        return [env[slot] for slot in self._outputs]

    def _finish(self, env: list[Any], latents: torch.Tensor) -> None:
        """Runs what follows the last step, from these latents."""
        last = last_step(self.program)
        env[self._slots[self.program.ops[last].outputs[0]]] = latents
        self._run(env, self._steps[last + 1 :], self._free[last + 1 :])

    def _run(self, env: list[Any], steps: Sequence[Any], frees: Sequence[list[int]]) -> None:
        watch = self._watch
        for (run, outs), free in zip(steps, frees, strict=True):
            if watch is not None:
                watch()
            result = run(env)
            if outs.__class__ is int:
                env[outs] = result
            else:
                for slot, value in zip(outs, result, strict=True):
                    env[slot] = value
            for slot in free:
                env[slot] = None

    def _slot(self, name: str) -> int:
        return self._slots.setdefault(name, len(self._slots))

    def _step(self, op: Op, special: Mapping[str, Special]) -> tuple[Callable[[list[Any]], Any], Any]:
        own = op.is_aten and op.name not in special
        function = overload(op.name) if own else special[op.name](op)
        alone = own and gives_one_tensor(function)
        if own:
            kernel = kernel_of(op)
            plain = by_kernel(function, kernel, self.program.name) if kernel else function
            function = checked(op.name, plain, self.device)
        run = self._bind(function, op)
        if own and self._explain:
            run = _explained(run, f"program {self.program.name!r}, {op.name} to {', '.join(op.outputs)}")
        if self._paranoid:
            run = self._compared(run, op, alone)
        outs: Any = [self._slot(name) for name in op.outputs]
        return run, outs[0] if alone else outs

    def _compared(self, run: Callable[[list[Any]], Any], op: Op, alone: bool) -> Callable[[list[Any]], Any]:
        """Returns the operation with its results compared with the types that the program declares."""
        declared = [self.program.types[name] for name in op.outputs]

        def compared(env: list[Any]) -> Any:
            result = run(env)
            found = [type_of(tensor) for tensor in ([result] if alone else result)]
            if found != declared:
                shown = [", ".join(map(str, types)) for types in (found, declared)]
                raise VerifyError(f"program {self.program.name!r}, {op.name}: it gave {shown[0]}, not {shown[1]}")
            return result

        return compared

    def _bind(self, function: Callable[..., Any], op: Op) -> Callable[[list[Any]], Any]:
        """Returns the operation as a function of the slots, with literals resolved ahead of time."""
        base = [literal(arg, self.device) for arg in op.args]
        kwargs = {key: literal(arg, self.device) for key, arg in op.kwargs.items()}
        plain = [(i, self._slot(arg.name)) for i, arg in enumerate(base) if isinstance(arg, Ref)]
        nested = [i for i, arg in enumerate(base) if isinstance(arg, list) and any(True for _ in refs(arg))]
        named = [key for key, arg in kwargs.items() if any(True for _ in refs(arg))]

        def fill(arg: Any, env: list[Any]) -> Any:
            if isinstance(arg, Ref):
                return env[self._slots[arg.name]]
            return [fill(item, env) for item in arg] if isinstance(arg, list) else arg

        if not nested and not named:
            if plain == [(0, plain[0][1])] if plain else False:
                slot, rest = plain[0][1], base[1:]
                return lambda env: function(env[slot], *rest, **kwargs)

            def run(env: list[Any]) -> Any:
                args = base.copy()
                for position, slot in plain:
                    args[position] = env[slot]
                return function(*args, **kwargs)

            return run

        def run_nested(env: list[Any]) -> Any:
            filled = {key: fill(arg, env) for key, arg in kwargs.items()}
            return function(*(fill(arg, env) for arg in base), **filled)

        for name in {ref.name for ref in refs((op.args, op.kwargs))}:
            self._slot(name)
        return run_nested

    def _last_uses(self) -> list[list[int]]:
        last: dict[int, int] = {}
        for index, op in enumerate(self.program.ops):
            for name in (*(ref.name for ref in refs((op.args, op.kwargs))), *op.outputs):
                last[self._slots[name]] = index
        free: list[list[int]] = [[] for _ in self.program.ops]
        for slot, index in last.items():
            if slot not in self._outputs:
                free[index].append(slot)
        return free


#: What torch raises for arguments that an operator does not take.
_RAISED = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, ArithmeticError)


def _explained(run: Callable[[list[Any]], Any], where: str) -> Callable[[list[Any]], Any]:
    """Returns the operation with its failures as diffkiln's errors, which say nothing of the tensors' numbers."""

    def explained(env: list[Any]) -> Any:
        try:
            return run(env)
        except DiffkilnError:
            raise
        except _RAISED as error:
            if is_no_memory(error):
                raise  # the gate of the public function says so
            reason = str(error).partition("\n")[0][:200]
            raise CallError(f"{where} failed: {reason}. The operator cannot do this with these arguments") from error

    return explained


def gives_one_tensor(function: Any) -> bool:
    """Returns True if an operator gives a tensor, and not a tuple or a list of them."""
    returns = function._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "Tensor"
