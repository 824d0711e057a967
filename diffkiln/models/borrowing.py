"""Modules that a pipeline gives from one of its components to another.

Z-Image gives its control net the embedders of its transformer: alone the control net has nothing in their place.
"""

from __future__ import annotations

from torch import nn


def shares(one: nn.Module, other: nn.Module) -> bool:
    """Returns True if a module is an attribute of both components."""
    return not {id(child) for child in one.children()}.isdisjoint(map(id, other.children()))


def borrowed(module: nn.Module, whole: nn.Module, lender: nn.Module) -> dict[str, str]:
    """Returns the attributes that a component is given by another one: its own name → the lender's.

    Args:
        module: the component alone.
        whole: the same component in the pipeline.
        lender: another component of the pipeline.
    """
    missing = [name for name, value in _attributes(whole).items() if value is not None and _lacks(module, name)]
    owned = {id(child): name for name, child in lender.named_children()}
    children = dict(whole.named_children())
    found = {name: owned[id(children[name])] for name in missing if name in children and id(children[name]) in owned}
    if not found:
        return {}
    # What is no module cannot be recognised: parameters are replaced, and numbers are equal by chance.
    rest = (name for name in missing if name not in found and getattr(lender, name, None) is not None)
    return found | {name: name for name in rest}


def borrow(module: nn.Module, whole: nn.Module, loaded: nn.Module, lender: nn.Module) -> None:
    """Gives a component what the pipeline would give it.

    Args:
        module: the component alone, with its weights.
        whole: the same component in the pipeline.
        loaded: the lender with its weights.
        lender: the lender in the pipeline.
    """
    for name, other in borrowed(module, whole, lender).items():
        setattr(module, name, getattr(loaded, other))


def _attributes(module: nn.Module) -> dict[str, object]:
    parts = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return plain | parts | dict(module.named_children())


def _lacks(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is None
