"""diffkiln: a declarative compiler for diffusers pipelines.

    diffkiln.compile("spec.json", "bundle")         # spec in, self-contained bundle out
    pipe = diffkiln.load("bundle")                  # torch alone, nothing is compiled
    pipe("a prompt").images[0].save("image.png")

Names are imported when they are first used, so `import diffkiln` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "compile": "diffkiln.compiler",
    "check": "diffkiln.compiler",
    "compile_module": "diffkiln.modules",
    "CompiledModule": "diffkiln.modules",
    "add_target": "diffkiln.retarget",
    "strip": "diffkiln.retarget",
    "retune": "diffkiln.retarget",
    "load": "diffkiln.runtime.loading",
    "Limits": "diffkiln.limits",
    "Spec": "diffkiln.spec",
    "parse_spec": "diffkiln.spec",
    "errors": "diffkiln.errors",
    "DiffkilnError": "diffkiln.errors",
}

if TYPE_CHECKING:
    from diffkiln import errors
    from diffkiln.compiler import check, compile
    from diffkiln.errors import DiffkilnError
    from diffkiln.limits import Limits
    from diffkiln.modules import CompiledModule, compile_module
    from diffkiln.retarget import add_target, retune, strip
    from diffkiln.runtime.loading import load
    from diffkiln.spec import Spec, parse_spec


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'diffkiln' has no attribute {name!r}")
    try:
        module = import_module(_PLACES[name])
    except ModuleNotFoundError as error:
        if name not in ("compile", "check", "compile_module") or (error.name or "").startswith("diffkiln"):
            raise
        from diffkiln.errors import MissingDependency

        raise MissingDependency(
            f"diffkiln.{name} needs the package {error.name}: pip install 'diffkiln[compile]'"
        ) from error
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])


__all__ = [
    "CompiledModule",
    "DiffkilnError",
    "Limits",
    "Spec",
    "__version__",
    "add_target",
    "check",
    "compile",
    "compile_module",
    "errors",
    "load",
    "parse_spec",
    "retune",
    "strip",
]
