"""The adapters of a loaded pipeline: which there are, with which scales they are in its weights, and who changes that.

The weights hold one mix of adapters at a time. A call that asks for another one has the weights changed first, within
its own turn; so whoever calls next gets what it asks for, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diffkiln.bundle import Verified
from diffkiln.bundle.manifest import ADAPTER_SLOTS
from diffkiln.errors import CallError
from diffkiln.guards.printable import get_logger
from diffkiln.guards.spelling import suggest
from diffkiln.program import REGION, owner_of, weight_in
from diffkiln.program.calls import follows_noise
from diffkiln.program.mesh import LAYERS
from diffkiln.program.narrowed import full
from diffkiln.runtime.adapters.adding import patches_of
from diffkiln.runtime.adapters.moved import check_folded, check_moved
from diffkiln.runtime.adapters.reading import Adapter, Wanted, read_adapter
from diffkiln.runtime.adapters.scales import AnyScale, Scale, as_given, check_blocks, checked_scale, scale_of
from diffkiln.runtime.adapters.slots import Mix, Slots
from diffkiln.runtime.adapters.targets import Layers, denoiser, read_layers, without_unread
from diffkiln.runtime.engines import holds_weights
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.variants import CompiledVariant
from diffkiln.runtime.weights import Key, Patch

log = get_logger(__name__)

#: The mixes of a call: one for all rows, or one for each prompt.
Mixes = Mix | Sequence[Mix]


class Shelf:
    """The adapters of one pipeline.

    Args:
        verified: The bundle.
        executor: Whose weights are changed, within its turns.
        variants: Whose programs say which weights adapters cannot change.
    """

    def __init__(self, verified: Verified, executor: Executor, variants: Sequence[CompiledVariant]) -> None:
        self._verified, self._executor, self._variants = verified, executor, variants
        self._loaded: dict[str, Adapter] = {}
        self._mix: dict[str, Scale] = {}
        self._applied: tuple[tuple[str, Scale], ...] | None = ()  # None: nobody knows, after an error
        self._layers_of = cache(self._read_layers)
        self._slots = self._made_slots()
        #: Numbers of slots that calls of every variant may compute alone.
        self._counts = sorted(set.intersection(*map(_counts_of, variants))) if variants else []

    @property
    def mix(self) -> Mapping[str, AnyScale]:
        """Returns all adapters by name, with the scale that calls use."""
        return {name: as_given(self._mix.get(name, 0.0)) for name in list(self._loaded)}

    @property
    def slots(self) -> int:
        """Returns the number of slots of each layer."""
        return self._slots.count if self._slots is not None else 0

    def load(self, path: Path, name: str, given: AnyScale, wanted: Wanted, timeout: float | None) -> None:
        """Reads an adapter, while calls go on, and adds it to the mix, once no call runs.

        Raises:
            CallError: As `read_adapter`; there is an adapter of this name; or engines hold a weight that it changes.
            Busy: Calls took longer than `timeout`.
        """
        self._check_free(name)
        if self._executor.group is not None and self._executor.group.mesh.count(LAYERS) > 1:
            raise CallError(
                "load_lora: each process of this bundle holds weights of a range of layers, and an adapter changes all "
                "of them. Add it with the pass fuse_lora, and compile anew"
            )
        scale = checked_scale(name, given)
        adapter = read_adapter(path, wanted, self._layers_of, self._executor.store.patched_on)
        self._check_reachable(adapter)
        check_blocks(name, scale, adapter.layers)
        with self._executor.turns.taken(timeout):
            self._check_free(name)
            self._loaded[name] = adapter
            try:
                if scale:  # turned off, it needs no change: the weights may be another call's, which come again
                    self._change_to(self._mix | {name: scale})
            except BaseException:
                del self._loaded[name]
                raise

    def set(self, mix: Mix, timeout: float | None) -> None:
        """Makes this the mix of all calls that name no other."""
        with self._executor.turns.taken(timeout):
            self._change_to(self.checked_mix(mix))

    def unload(self, name: str, timeout: float | None) -> None:
        """Takes an adapter out of the mix, and forgets it."""
        self._check_known(name)
        with self._executor.turns.taken(timeout):
            self._check_known(name)
            rest = {other: scale for other, scale in self._mix.items() if other != name}
            if self._slots is not None and self._loaded[name].slots:
                self._slots.forget(name)
            elif self._applied is None or name in dict(self._applied):
                self._apply(rest)
            self._mix = rest
            del self._loaded[name]

    def checked(self, given: Any) -> Mixes:
        """Returns a caller's mix, or those of each prompt.

        Raises:
            CallError: It is no mapping of names to scales, or names an adapter that is not loaded, or a block that it
                does not change; or there are several, and the bundle has no slots.
        """
        if not isinstance(given, (list, tuple)) or not all(isinstance(mix, Mapping) for mix in given):
            return self.checked_mix(given)
        mixes = [self.checked_mix(mix) for mix in given]
        if self._slots is None:
            raise CallError(
                "adapters: a mix for each prompt needs slots, and this bundle adds adapters to its weights. Give one "
                'mix, or compile it with "runtime": {"adapters": {"rank": 16, "slots": 2}}'
            )
        self._slots.check(sorted({name for mix in mixes for name, scale in mix.items() if scale}))
        names = {name for mix in mixes for name in mix if not self._loaded[name].slots}
        if uneven := next((name for name in sorted(names) if len({mix.get(name, 0.0) for mix in mixes}) > 1), None):
            raise CallError(
                f"adapters: {uneven[:60]!r} was added to the weights, so all rows have it. Give it the same scale in "
                "each mix, or load it without merged=True"
            )
        return mixes

    def checked_mix(self, mix: Any) -> dict[str, Scale]:
        """Returns a caller's mix for all rows."""
        if not isinstance(mix, Mapping):
            raise CallError('adapters: give names and scales, such as {"style": 0.8}, or {} for none')
        for name in mix:
            self._check_known(name)
        scales = {name: checked_scale(name, scale) for name, scale in mix.items()}
        for name, scale in scales.items():
            check_blocks(name, scale, self._loaded[name].layers)
        return scales

    def check_count(self, mixes: Mixes, prompts: int) -> None:
        """Raises `CallError` if there are several mixes, and not one for each prompt."""
        if not isinstance(mixes, Mapping) and len(mixes) != prompts:
            raise CallError(f"adapters: {len(mixes)} mixes for {prompts} prompts. Give one for each, or one for all")

    def ready(self, mixes: Mixes | None, images: int = 1, counts: Sequence[int] = ()) -> int:
        """Brings a mix into the weights, or the mix of all calls for None. Called within a call's own turn.

        Args:
            mixes: One for all rows, or one for each prompt.
            images: How many a call gives for each prompt.
            counts: Numbers of slots, less than all, which the call may compute alone.

        Returns:
            How many slots the call computes: one of `counts`, or all.
        """
        if mixes is None:
            return self._apply(self._mix, counts=counts)
        if isinstance(mixes, Mapping):
            return self._apply(self.checked_mix(mixes), counts=counts)
        return self._apply(*[self.checked_mix(mix) for mix in mixes], images=images, counts=counts)

    # -- changes, within a turn --

    def _change_to(self, mix: Mix) -> None:
        self._apply(mix)
        self._mix = dict(mix)

    def _apply(self, *mixes: Mix, images: int = 1, counts: Sequence[int] | None = None) -> int:
        """Brings adapters where they belong: those that have slots into these, the others into the weights. Gives the
        number of slots that are computed."""
        mix, count = mixes[0], 0
        if self._slots is not None:
            own = [{name: scale for name, scale in mix.items() if self._loaded[name].slots} for mix in mixes]
            rows = self._slots.expanded(own, images) if len(own) > 1 else own
            count = self._slots.use(rows, self._loaded, self._counts if counts is None else counts)
            mix = {name: scale for name, scale in mix.items() if not self._loaded[name].slots}
        self._merge(mix)
        return count

    def _merge(self, mix: Mix) -> None:
        """Adds adapters to the originals in the order of their names, so that a mix always gives the same bits."""
        wanted = tuple((name, mix[name]) for name in sorted(self._loaded) if mix.get(name))
        if wanted == self._applied:
            return
        changes = [
            (scale_of(scale, change.target.path), change)
            for name, scale in wanted
            for change in self._loaded[name].changes
        ]
        store = self._executor.store
        patches: dict[Key, list[Patch]] = {}
        for target, patch in patches_of(changes):
            patches.setdefault(store.key_of(target.component, target.weight), []).append(patch)
        self._applied = None
        store.patch(patches)
        self._applied = wanted

    # -- checks --

    def _check_free(self, name: str) -> None:
        if name in self._loaded:
            raise CallError(
                f"load_lora: there is an adapter called {name!r}. Give another name, or first unload_lora({name!r})"
            )

    def _check_known(self, name: Any) -> None:
        if name in self._loaded:
            return
        known = ", ".join(self._loaded) or "none"
        hint = suggest(str(name), self._loaded) or "Load it by load_lora(path, name=…)"
        raise CallError(f"adapters: {str(name)[:60]!r} is not loaded; loaded are: {known[:200]}. {hint}")

    def _check_reachable(self, adapter: Adapter) -> None:
        """Raises `CallError` if a layer has another name by now, or its weight is also elsewhere than in the store."""
        changed = {change.target.component for change in adapter.changes}
        check_moved(self._verified.manifest, changed, adapter.file)
        first: Any = self._verified.manifest.runtime.get("first") or ()
        if alone := sorted(changed & set(first)):
            raise CallError(
                f"load_lora: the first of several processes alone holds {alone[0]}, and {adapter.file} changes it. "
                f'Compile without {alone[0]} in "first", add the adapter by the pass fuse_lora, or ignore its layers'
            )
        # A text encoder reads all its layers still, and what it made of a fixed prompt was computed once.
        late = [row.target for row in adapter.changes if not row.target.used or self._encodes(row.target.component)]
        unread = {target.component: target.layer for target in late}
        check_folded(self._verified.manifest, unread, adapter.file)
        fixed = self._fixed()
        for change in adapter.changes:
            if change.target.used and (change.target.component, change.target.weight) in fixed:
                raise CallError(
                    f"load_lora: engines hold the weights of {change.target.component}, such as "
                    f"{change.target.layer}, so {adapter.file} cannot change them. Compile with the backend "
                    "aot_inductor, or add the adapter by the pass fuse_lora"
                )
        unused = sum(not change.target.used for change in adapter.changes)
        if unused:
            log.info("%d layers of %s change nothing: no program reads their weights", unused, adapter.file)

    def _encodes(self, component: str) -> bool:
        calls = [program for variant in self._variants for program in variant.programs.values()]
        return not any(follows_noise(call, component) for call in calls)

    def _fixed(self) -> Collection[tuple[str, str]]:
        """Returns the weights that engines hold, and those that calls take themselves."""
        found: set[tuple[str, str]] = set()
        for variant in self._variants:
            for program in variant.programs.values():
                found.update(owner_of(name) for name in program.weights)
        for component, module in self._executor.modules.items():
            for op in (op for program in module.programs.values() for op in program.ops if op.name == REGION):
                engine = self._executor.engines.get((component, op.attrs["region"]))
                if engine is not None and holds_weights(engine):
                    weights = module.regions[op.attrs["region"]].weights
                    found.update((component, weight_in(op, weight)) for weight in weights)
        return found

    def _read_layers(self, component: str) -> Layers:
        module = self._executor.modules.get(component)
        return without_unread(read_layers(self._verified, component), module)

    def _made_slots(self) -> Slots | None:
        """Returns the slots of the bundle's layers; None for a bundle that has none."""
        if self._verified is None or ADAPTER_SLOTS not in self._verified.manifest.features_required:
            return None
        return Slots(self._executor.store, [self._layers_of(name) for name in self._executor.modules])

    def wanted(self, component: str | None, ignored: Sequence[str], requantize: bool, merged: bool) -> Wanted:
        """Returns how a file is to be read.

        Raises:
            CallError: The bundle has no such component.
        """
        components = self._verified.manifest.weights
        if component is not None and component not in components:
            raise CallError(f"load_lora: component {component[:60]!r} is none of {', '.join(components)}")
        slots = self._slots is not None and not merged
        return Wanted(frozenset(components), component or denoiser(components), ignored, requantize, slots)


def _counts_of(variant: CompiledVariant) -> set[int]:
    counts = [set(variant.narrowed(program)) for program in full(variant.programs).values()]
    return set.intersection(*counts) if counts else set()
