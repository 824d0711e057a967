"""The recorder: a dispatch mode that writes down what depends on the request and lets everything else run.

A value that depends on the request is *marked*: it is a `FakeTensor`, with a shape and no data. Operations on marked
values are written to the tape and give marked values. All others run at once, with the same result on every machine
(diffkiln.interpreter.portable), and what they give folds into constants the moment a marked operation uses it. Under
inference mode the dispatcher shows composite operators (`linear`, `scaled_dot_product_attention`, `reshape`) whole, so
the program stays short and each device picks its own kernels.

In-place writes become functional. A write through a view is scattered into the storage's base, and every other view of
that storage is taken again from the base when it is next used.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from diffkiln.errors import DataDependent, RecordError
from diffkiln.interpreter.aten import dtype_name, type_of
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.interpreter.nests import map_tensors, same_geometry, tensors_in
from diffkiln.interpreter.portable import evaluate, portable_numpy
from diffkiln.program import (
    EXPONENTIAL,
    NORMAL,
    UNIFORM,
    Arg,
    Device,
    DType,
    Input,
    Layout,
    MemoryFormat,
    Op,
    Program,
    Ref,
    TensorType,
    prune,
)
from diffkiln.program.operators import RESHAPES, allowed, has_equal, safe_equal
from diffkiln.record.bounds import Known
from diffkiln.record.constants import Constants
from diffkiln.record.selecting import SELECTS, by_position
from diffkiln.record.shadows import Shadow, moved

#: Operators that turn a value into a Python number or choose a shape by it.
_READS = {
    "aten._local_scalar_dense.default",
    "aten.item.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.allclose.default",
}
#: What draws noise, and from which distribution.
_DRAWN = {
    "randn": NORMAL,
    "randn_like": NORMAL,
    "rand": UNIFORM,
    "rand_like": UNIFORM,
    "uniform_": UNIFORM,
    "multinomial": EXPONENTIAL,
}
_PAST_THE_DISPATCHER = ("tolist", "numpy")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
_IDENTITY_WHEN_EVAL = {f"aten.{name}{ending}.default" for name in _DROPOUTS for ending in ("", "_")}


@dataclass
class _Storage:
    """The state of one storage: the value that covers it, and how often it was written."""

    base: torch.Tensor
    version: int = 0
    reduced: torch.Tensor | None = None  # of a real storage that was written to: a marked one, so that its views alias


class Tape(TorchDispatchMode):
    """A mode that records one straight line of operations.

    Args:
        fake: the mode that every marked value belongs to.
        constants: where folded tensors are kept.
        weights: marked tensors that are weights, by name.
        what: what is being recorded, for messages.
    """

    def __init__(
        self,
        fake: FakeTensorMode,
        constants: Constants,
        weights: Iterable[tuple[str, torch.Tensor]] = (),
        what: str = "the call",
    ) -> None:
        super().__init__()
        self.fake, self.constants, self.what = fake, constants, what
        self.ops: list[Op] = []
        self.types: dict[str, TensorType] = {}
        self.inputs: list[Input] = []
        self._names: dict[int, tuple[str, int]] = {}  # id(tensor) → its value, storage version when bound
        self._storages: dict[int, _Storage] = {}
        self._written = False  # whether any real storage holds marked data
        self._alive: list[Any] = []  # ids stay unique while tensors live
        self._count = 0
        self._patches = contextlib.ExitStack()
        #: What `Tensor.numpy` gives of a marked tensor; None where it stops the recording.
        self.as_array: Callable[[torch.Tensor], Any] | None = None
        #: Marked noise of a shape and a type, by a generator or without one, of a distribution; None where drawing
        #: stops the recording.
        self.noise: Callable[[Any, torch.dtype | None, Any, str], torch.Tensor] | None = None
        #: The first seed of the caller's generator, by which it is known. What others draw is the same in every call.
        self.callers_seed: int | None = None
        #: Tells of two texts, by their places, whether they are made of one prompt by one tokenizer.
        self.same_prompt: Callable[[int, int], bool] | None = None
        #: What is known of tokens, by the id of their tensor.
        self.shadows: dict[int, Shadow] = {}
        for name, tensor in weights:
            self._bind(tensor, f"@{name}")

    # -- what the recorders of calls, components and regions use --

    def new_input(self, name: str, type_: TensorType, source: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Returns a marked tensor that the caller will bring."""
        unique = name = f"%{name}"
        while any(item.name == unique for item in self.inputs):
            unique = f"{name}_{len(self.inputs)}"
        tensor = self.blank(type_)
        self._bind(tensor, unique)
        self.inputs.append(Input(unique, type_, source or {}))
        return tensor

    def blank(self, type_: TensorType) -> torch.Tensor:
        """Returns a contiguous marked tensor that has no value yet."""
        with self.fake:
            return torch.empty(type_.shape, dtype=dtype_of(type_.dtype))

    def emit(
        self,
        name: str,
        args: Sequence[Arg],
        outputs: Sequence[torch.Tensor],
        kwargs: Mapping[str, Arg] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one operation whose results are these marked tensors."""
        names = []
        for tensor in outputs:
            self._count += 1
            names.append(f"%{self._count}")
            self._bind(tensor, names[-1])
        self.ops.append(safe_equal(Op(name, tuple(args), tuple(names), kwargs or {}, attrs or {})))

    def value(self, arg: Any) -> Arg:
        """Returns an argument as the program writes it; real tensors become constants."""
        if isinstance(arg, torch.Tensor):
            return self._tensor(arg)
        if isinstance(arg, torch.dtype):
            return DType(dtype_name(arg))
        if isinstance(arg, torch.device):
            return Device()
        if isinstance(arg, torch.memory_format):
            return MemoryFormat(str(arg).removeprefix("torch."))
        if isinstance(arg, torch.layout):
            return Layout(str(arg).removeprefix("torch."))
        if isinstance(arg, (list, tuple)):
            return tuple(self.value(item) for item in arg)
        if arg is None or isinstance(arg, (bool, int, float, str)):
            return arg
        raise RecordError(f"{self.what}: an argument of type {type(arg).__name__} cannot be written down{_where()}")

    def finish(self, name: str, outputs: Sequence[torch.Tensor], **fields: Any) -> Program:
        """Returns the recorded program, without dead operations."""
        refs = tuple(self._tensor(tensor) for tensor in outputs)
        types = dict(self.types)
        return prune(Program(name, tuple(self.inputs), tuple(self.ops), refs, types, **fields))

    def is_marked(self, tensor: Any) -> bool:
        """Returns True if the tensor depends on the request."""
        if isinstance(tensor, FakeTensor) or not self._written:
            return isinstance(tensor, FakeTensor)
        storage = self._storages.get(tensor.untyped_storage()._cdata) if isinstance(tensor, torch.Tensor) else None
        return storage is not None and storage.reduced is not None

    # -- the mode --

    def __enter__(self) -> Tape:
        """Makes `tolist` and `numpy`, which read memory past the dispatcher, ask the tape first."""
        self._patches.enter_context(portable_numpy())
        for name in _PAST_THE_DISPATCHER:
            read = getattr(torch.Tensor, name)
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._guarded(name, read)))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._patches.close()

    def _guarded(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.is_marked(tensor) and name == "numpy" and self.as_array is not None:
                return self.as_array(tensor)
            if self.is_marked(tensor):
                raise self._data_dependent(f"Tensor.{name}")
            return read(tensor, *args, **kwargs)

        return guarded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._dispatched(func, args, dict(kwargs or {}))

    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(is_traceable_wrapper_subclass(t) for t in tensors_in((args, kwargs))):
            return NotImplemented  # a quantized tensor: it lowers itself to plain operators, which come back here
        if self.noise is not None and func._opname in _DRAWN:
            found = self._drawn(self.noise, func, args, kwargs)
            if found is not NotImplemented:
                return found
        if func.namespace == "prim" or not self._touches_marked(args, kwargs):
            self._refuse_randomness(func, args)
            return evaluate(func, args, kwargs)
        name = f"{func.namespace}.{func._opname}.{func._overloadname}"
        self._refuse_randomness(func, args)
        if func.namespace != "aten":
            result = self._decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if name in _READS:
            return self._read(name, args)
        if name == "aten.eq.Scalar" and (shadow := self.shadows.get(id(args[0]))) is not None:
            known = shadow.equal(args[1])
            if known is not None:
                return known
        if name in SELECTS:
            func, name, args, kwargs = by_position(func, name, args, kwargs, self.is_marked)
        if name in _IDENTITY_WHEN_EVAL:
            return args[0]
        if func._schema.is_mutable:
            return self._write_in_place(func, name, args, kwargs)
        return self._record(func, name, args, kwargs)

    def _drawn(
        self, noise: Callable[..., torch.Tensor], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records noise that is drawn past diffusers' function, and evaluates that of a generator made for it."""
        name, names = func._opname, [item.name for item in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        generator = given.get("generator")
        if generator is not None and generator.initial_seed() != self.callers_seed:
            return NotImplemented if self._touches_marked(args, kwargs) else evaluate(func, args, kwargs)
        if name == "multinomial":
            return self._chosen(noise, given["self"], given["num_samples"], generator)
        if name == "uniform_":
            return self._filled(noise, given["self"], (given.get("from", 0.0), given.get("to", 1.0)), generator)
        alike = name.endswith("_like")
        dtype = kwargs.get("dtype") or (args[0].dtype if alike else None)
        return noise(args[0].shape if alike else args[0], dtype, generator, _DRAWN[name])

    def _chosen(self, noise: Callable[..., torch.Tensor], weights: torch.Tensor, count: int, generator: Any) -> Any:
        """Records the choice of one of several by their weights as torch makes it: the greatest of them, each divided
        by exponential noise."""
        if count != 1:
            return NotImplemented
        drawn = noise(weights.shape, weights.dtype, generator, EXPONENTIAL)
        odds = self._dispatched(torch.ops.aten.div.Tensor, (weights, drawn), {})
        return self._dispatched(torch.ops.aten.argmax.default, (odds, -1, True), {})

    def _filled(
        self, noise: Callable[..., torch.Tensor], target: torch.Tensor, ends: tuple[float, float], generator: Any
    ) -> Any:
        """Records a tensor that is filled with uniform noise."""
        if ends != (0.0, 1.0):
            return NotImplemented
        self._store(target, noise(target.shape, target.dtype, generator, UNIFORM))
        return target

    def _decomposed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Records a library's composite operator as the operators that it consists of."""
        TorchDispatchMode.__enter__(self)
        try:
            return func.decompose(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def _record(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        fakes = self._as_fakes(args), self._as_fakes(kwargs)
        if name == "aten._conj.default":
            func, name = _conjugated, "aten.conj_physical.default"
        try:
            result = func(*fakes[0], **fakes[1])
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise self._data_dependent(name) from None
        if any(result is tensor for tensor in tensors_in(fakes)):
            return result  # `to` or `contiguous` with nothing to do
        if not isinstance(result, (torch.Tensor, list, tuple)):
            return result  # what is asked of types and shapes alone
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        if not all(isinstance(tensor, FakeTensor) for tensor in outputs):
            raise self._data_dependent(name)
        name = "aten.reshape.default" if name in RESHAPES else name
        self._check_allowed(name)
        self.emit(name, self.value(args), outputs, {key: self.value(arg) for key, arg in kwargs.items()})  # type: ignore[arg-type]
        if self.shadows:
            self._cast_shadows(func, args, kwargs, outputs)
        return result

    def _cast_shadows(self, func: Any, args: Any, kwargs: Mapping[str, Any], outputs: list[torch.Tensor]) -> None:
        """Notes what is known of tokens that an operation only moves."""
        name = f"{func.namespace}.{func._opname}.{func._overloadname}" if hasattr(func, "_opname") else ""
        found = moved(func, name, args, kwargs, self._shadow_of)
        for tensor, shadow in zip(outputs, found if isinstance(found, list) else [found], strict=False):
            if shadow is not None:
                self.shadows[id(tensor)] = shadow

    def _shadow_of(self, tensor: torch.Tensor) -> Shadow | None:
        return self.shadows.get(id(tensor))

    def _write_in_place(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Records the functional form of an operator such as `add_`, and the storage's new content."""
        target = args[0]
        packet, overload = func._opname, func._overloadname
        if not packet.endswith("_") or packet.startswith("__"):
            raise RecordError(f"{self.what}: {name} writes to its argument{_where()}")
        if packet == "zero_":
            functional, rest = "aten.zeros_like.default", ()
        else:
            functional, rest = f"aten.{packet.removesuffix('_')}.{overload}", args[1:]
        self._check_allowed(functional)
        written = (self.value(target), *(self.value(arg) for arg in rest))
        named = {key: self.value(arg) for key, arg in kwargs.items()}
        type_ = type_of(target)
        dtype = self._result_dtype(functional, target, rest, kwargs)
        fresh = self.blank(TensorType(dtype_name(dtype), type_.shape))
        self.emit(functional, written, [fresh], named)
        if dtype != target.dtype:
            cast = self.blank(type_)
            self.emit("aten.to.dtype", (self._tensor(fresh), DType(type_.dtype)), [cast])
            fresh = cast
        self._store(target, fresh)
        return target

    def _result_dtype(self, name: str, target: Any, rest: Any, kwargs: Mapping[str, Any]) -> torch.dtype:
        _, packet, overload = name.split(".")
        function = getattr(getattr(torch.ops.aten, packet), overload)
        return function(*self._as_fakes((target, *rest)), **self._as_fakes(kwargs)).dtype

    def _read(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "aten.equal.default" and args[0].shape != args[1].shape:
            return False
        if name == "aten.equal.default" and self._are_cuts_of_one_prompt(*args):
            return True
        if name == "aten.is_nonzero.default":
            known = Known(self.inputs, self.ops, self.types).truth(self._tensor(args[0]))
            if known is not None:
                return known
        raise self._data_dependent(name)

    def _are_cuts_of_one_prompt(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        """Returns True for the tokens of one prompt with and without a cut, which pipelines compare to warn of it.

        Whatever else they do then shows when the recording is verified, with prompts of both kinds.
        """
        sources = {item.name: item.source for item in self.inputs}
        found = [sources.get(self._names.get(id(tensor), ("", 0))[0], {}) for tensor in (first, second)]
        alike = all(source.get("kind") == "tokens" for source in found) and found[0]["key"] == found[1]["key"]
        return alike and self.same_prompt is not None and self.same_prompt(found[0]["text"], found[1]["text"])

    # -- values, constants, storages --

    def _bind(self, tensor: torch.Tensor, name: str) -> None:
        storage = self._storage(tensor)
        self._names[id(tensor)] = (name, storage.version)
        self._alive.append(tensor)
        self.types.setdefault(name, type_of(tensor))

    def _storage(self, tensor: torch.Tensor) -> _Storage:
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self._alive.append(tensor.untyped_storage())
            whole = tensor if isinstance(tensor, FakeTensor) else tensor.new_empty(0).set_(tensor.untyped_storage())
            self._storages[key] = _Storage(whole)
        return self._storages[key]

    def _tensor(self, tensor: torch.Tensor) -> Ref:
        if not self.is_marked(tensor):
            return self._constant(tensor)
        bound = self._names.get(id(tensor))
        storage = self._storage(tensor)
        if bound is not None and bound[1] == storage.version:
            return Ref(bound[0])
        if storage.version == 0:
            raise RecordError(f"{self.what} uses a value from outside of it, or an untracked alias{_where()}")
        return self._view_again(tensor, storage)

    def _constant(self, tensor: torch.Tensor) -> Ref:
        if tensor.is_meta:
            raise RecordError(f"{self.what} uses a weight outside of its component's call{_where()}")
        if tensor.dtype == torch.complex128:
            return self._complex(tensor)
        ref = Ref(f"#{self.constants.add(tensor)}")
        self.types.setdefault(ref.name, type_of(tensor))
        return ref

    def _complex(self, tensor: torch.Tensor) -> Ref:
        """Returns a constant of a type that safetensors lacks: pairs of real numbers, and their complex view."""
        fresh = self.blank(type_of(tensor))
        self.emit("aten.view_as_complex.default", (self._constant(torch.view_as_real(tensor.resolve_conj())),), [fresh])
        return Ref(self._names[id(fresh)][0])

    def _view_again(self, tensor: torch.Tensor, storage: _Storage) -> Ref:
        """Returns a view of a storage that was written to after the view was made."""
        base = self._in_order(storage.base)
        geometry = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        fresh = self.blank(type_of(tensor))
        self.emit("aten.as_strided.default", (base, *geometry), [fresh])
        self._names[id(tensor)] = (self._names[id(fresh)][0], storage.version)
        self._alive.append(tensor)
        return Ref(self._names[id(tensor)][0])

    def _store(self, target: torch.Tensor, fresh: torch.Tensor) -> None:
        """Records `fresh` as the new content of `target`, after an in-place write."""
        storage = self._storage(target)
        base = storage.base
        name = self._names[id(fresh)][0]
        whole_name = name
        if not same_geometry(target, base):
            whole = self.blank(_in_memory(base))
            geometry = tuple(target.shape), tuple(target.stride()), int(target.storage_offset())
            self.emit("aten.as_strided_scatter.default", (self._in_order(base), Ref(name), *geometry), [whole])
            whole_name = self._names[id(self._as_seen(whole, base))][0]
        storage.version += 1
        self._names[id(base)] = (whole_name, storage.version)
        self._names[id(target)] = (name, storage.version)
        self._alive += [target, base]
        if not isinstance(base, FakeTensor) and storage.reduced is None:
            storage.reduced = self.blank(type_of(base))
            self._storages[storage.reduced.untyped_storage()._cdata] = storage
            self._alive.append(storage.reduced)
            self._written = True

    def _in_order(self, base: torch.Tensor) -> Ref:
        """Returns the whole of a storage, its axes in the order in which they lie in memory, which strides count in."""
        order = _order(base)
        if order is None:
            raise RecordError(f"{self.what} writes through a view of a tensor with gaps or repeats in memory{_where()}")
        ref = self._tensor(base)
        if order != sorted(order):
            turned = self.blank(_in_memory(base))
            self.emit("aten.permute.default", (ref, tuple(order)), [turned])
            ref = Ref(self._names[id(turned)][0])
        dense = self.blank(_in_memory(base))
        self.emit("aten.contiguous.default", (ref,), [dense])
        return Ref(self._names[id(dense)][0])

    def _as_seen(self, whole: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Returns what `_in_order` gave, written to, with the axes as the storage's own tensor has them."""
        order = _order(base) or []
        if order == sorted(order):
            return whole
        back = self.blank(type_of(base))
        self.emit("aten.permute.default", (self._tensor(whole), tuple(map(order.index, range(len(order))))), [back])
        return back

    # -- helpers --

    def _touches_marked(self, args: Any, kwargs: Any) -> bool:
        return any(self.is_marked(tensor) for tensor in tensors_in((args, kwargs)))

    def _as_fakes(self, args: Any) -> Any:
        """Replaces real tensors that hold marked data by marked ones of the same geometry."""

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor) or not self.is_marked(tensor):
                return tensor
            reduced = self._storage(tensor).reduced
            return torch.as_strided(reduced, tensor.shape, tensor.stride(), tensor.storage_offset())  # type: ignore[arg-type]

        return map_tensors(args, fake)

    def _check_allowed(self, name: str) -> None:
        if not allowed(name) and not has_equal(name):
            raise RecordError(f"{self.what} uses {name}, which is not in diffkiln's closed list of operators{_where()}")

    def _refuse_randomness(self, func: Any, args: tuple[Any, ...]) -> None:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return
        if func._opname.removesuffix("_") in _DROPOUTS and not args[2]:
            return
        if func._opname == "scaled_dot_product_attention" and (len(args) < 5 or args[4] == 0.0):
            return
        raise RecordError(f"{self.what} draws random numbers with {func._opname}, not with randn_tensor{_where()}")

    def _data_dependent(self, name: str) -> DataDependent:
        return DataDependent(
            f"{self.what} reads a value that depends on the request ({name}), so its shape or its control flow may "
            f"change with the prompt{_where()}"
        )


def _order(tensor: torch.Tensor) -> list[int] | None:
    """Returns the axes of a tensor from outermost to innermost in memory; None if it does not fill its memory."""
    if tensor.is_contiguous():
        return list(range(tensor.dim())) if tensor.storage_offset() == 0 else None
    order = sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), tensor.shape[axis] == 1))
    dense = tensor.permute(order)
    return order if dense.is_contiguous() and tensor.storage_offset() == 0 else None


def _in_memory(tensor: torch.Tensor) -> TensorType:
    """Returns the type of a tensor with its axes in the order in which they lie in memory."""
    shape = tuple(tensor.shape[axis] for axis in _order(tensor) or range(tensor.dim()))
    return TensorType(type_of(tensor).dtype, shape)


def _conjugated(tensor: torch.Tensor) -> torch.Tensor:
    """Conjugates at once: a delayed conjugation is a bit of the tensor that an engine, given its memory, does not see.

    The dispatcher takes the result for a view, so it must not be a tensor of inference.
    """
    with torch.inference_mode(False):
        return torch.ops.aten.conj_physical.default(tensor)


#: By their own folders: a user's code may well lie in a folder called diffkiln, too.
_LIBRARIES = (torch.__path__[0] + os.sep, str(Path(__file__).parents[1]) + os.sep)


def _where() -> str:
    """Returns where in the model's own code the recorder stopped: the innermost frame outside of torch and diffkiln."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_LIBRARIES):
            return f", at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return ""
