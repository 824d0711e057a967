"""diffkiln: a declarative compiler for diffusers pipelines.

    diffkiln.compile("spec.json", "bundle")         # spec in, self-contained bundle out
    pipe = diffkiln.load("bundle")                  # torch alone, nothing is compiled
    pipe("a prompt").images[0].save("image.png")

Names are imported when they are first used, so `import diffkiln` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffkiln.version import __version__

_HOMES = {
    "compile": "diffkiln.compiler.compile",
    "check": "diffkiln.compiler.compile",
    "compile_module": "diffkiln.compiler.modules",
    "CompiledModule": "diffkiln.compiler.modules",
    "add_target": "diffkiln.compiler.retarget",
    "strip": "diffkiln.compiler.retarget",
    "retune": "diffkiln.compiler.retarget",
    "load": "diffkiln.runtime.loading",
    "plan_memory": "diffkiln.runtime.memory",
    "bench": "diffkiln.evaluate.bench",
    "Limits": "diffkiln.guards.limits",
    "Spec": "diffkiln.spec",
    "parse_spec": "diffkiln.spec",
    "errors": "diffkiln.errors",
    "DiffkilnError": "diffkiln.errors",
}

if TYPE_CHECKING:
    from diffkiln import errors
    from diffkiln.compiler.compile import check, compile
    from diffkiln.compiler.modules import CompiledModule, compile_module
    from diffkiln.compiler.retarget import add_target, retune, strip
    from diffkiln.errors import DiffkilnError
    from diffkiln.evaluate.bench import bench
    from diffkiln.guards.limits import Limits
    from diffkiln.runtime.loading import load
    from diffkiln.runtime.memory import plan_memory
    from diffkiln.spec import Spec, parse_spec


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffkiln' has no attribute {name!r}")
    try:
        module = import_module(_HOMES[name])
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
    return sorted([*globals(), *_HOMES])


__all__ = [
    "CompiledModule",
    "DiffkilnError",
    "Limits",
    "Spec",
    "__version__",
    "add_target",
    "bench",
    "check",
    "compile",
    "compile_module",
    "errors",
    "load",
    "parse_spec",
    "plan_memory",
    "retune",
    "strip",
]
