"""A region compiled by `torch.compile` where it runs, with the caches of an earlier compilation.

    Program ──graph──▶ torch.fx ──torch.compile──▶ a function, and what Inductor wrote on the way

What Inductor writes lies in a folder of the caller's. Filled when a bundle is made and handed back when it is loaded,
it spares the compilation; where it does not fit, say under another compiler or another Python, Inductor compiles anew.
The exporter and the runtime both come here, so that both ask for the same thing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffkiln.errors import DiffkilnError, ExportError, MissingDependency
from diffkiln.interpreter.aten import Special, dtype_of, gives_one_tensor, literal, overload
from diffkiln.interpreter.attention import kernel_for
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions
from diffkiln.interpreter.inductor import INDUCTOR, ISAS, host_settings, quiet
from diffkiln.program import Op, Program, Ref, engine_types
from diffkiln.program.convolutions import heavy_weights

#: The files of an engine: the region, what `compiled` is told, and a folder of Inductor's caches.
REGION, OPTIONS, CACHES = "region.json", "options.json", "caches"

#: What a compiled region is called with: its inputs, weights and constants, in `engine_inputs` order.
Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def compiled(
    region: Program,
    folder: Path,
    *,
    device: torch.device,
    isa: str = "",
    flags: Mapping[str, bool] | None = None,
    fullgraph: bool = True,
    special: Mapping[str, Special] | None = None,
) -> tuple[Run, bool]:
    """Compiles a region and runs it once, on zeros.

    The returned function compiles nothing more and compares nothing: it is for tensors of the region's own types.

    Args:
        region: verified.
        folder: of Inductor's caches; what is missing there is added.
        device: where it runs.
        isa: the CPU's instruction set.
        flags: Inductor's.
        fullgraph: refuse breaks; with breaks, what lies between them is compiled.
        special: runs what is not ATen's, by the operation's name; the graph breaks there.

    Returns:
        The function, and whether the folder spared the compilation.

    Raises:
        ExportError: torch cannot compile it; says why.
        MissingDependency: a compiler that Inductor needs is not there.
    """
    import torch._dynamo.utils

    module = as_graph(region, device, special or {})
    zeros = [torch.zeros(t.shape, dtype=dtype_of(t.dtype), device=device) for t in engine_types(region).values()]
    counters = torch._dynamo.utils.counters
    with INDUCTOR, quiet(), host_settings(isa, folder), torch.inference_mode(), kernel_for(region):
        misses = counters["inductor"]["fxgraph_cache_miss"]
        # Its forward alone: the method that calls it is one for all graphs, and no guard would tell them apart.
        options = _options(isa, flags or {})
        if device.type == "cpu" and heavy_weights(region):
            options["layout_optimization"] = False
        run: Any = torch.compile(module.forward, fullgraph=fullgraph, dynamic=False, options=options)
        try:
            run(*zeros)
        except DiffkilnError:
            raise
        except Exception as error:
            raise _explained(error) from error
        found = counters["inductor"]["fxgraph_cache_miss"] == misses
    return lambda flat: run(*flat), found


def as_graph(region: Program, device: torch.device, special: Mapping[str, Special]) -> torch.fx.GraphModule:
    """Returns a region as torch's graph of its inputs, weights and constants. Outputs are contiguous and alias no
    input.
    """
    graph = torch.fx.Graph()
    nodes = {name: graph.placeholder(f"a{position}") for position, name in enumerate(engine_types(region))}
    given = frozenset(nodes.values())

    def filled(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return nodes[arg.name]
        return [filled(item) for item in arg] if isinstance(arg, list) else arg

    for op in region.ops:
        args = tuple(filled(literal(arg, device)) for arg in op.args)
        kwargs = {key: filled(literal(arg, device)) for key, arg in op.kwargs.items()}
        own = gpu_decompositions(device).get(op.name)
        node = graph.call_function(own(op) if own else _function(op, special), args, kwargs)
        if op.is_aten and not own and gives_one_tensor(node.target):
            nodes[op.outputs[0]] = node
            continue
        for position, name in enumerate(op.outputs):
            nodes[name] = graph.call_function(operator.getitem, (node, position))
    results = [nodes[ref.name] for ref in region.outputs]
    graph.output(tuple(graph.call_method("clone" if r in given else "contiguous", (r,)) for r in results))
    return torch.fx.GraphModule(torch.nn.Module(), graph, region.name.replace("-", "_"))


def _function(op: Op, special: Mapping[str, Special]) -> Callable[..., Any]:
    if op.is_aten:
        return overload(op.name)
    return torch.compiler.disable(special[op.name](op), reason=f"{op.name} is not an operator of torch's")


def _options(isa: str, flags: Mapping[str, bool]) -> dict[str, Any]:
    """Returns Inductor's configuration, as far as this torch has it; equal on every machine of a target."""
    import torch._inductor

    wanted = {
        "cpp.march": isa,
        "cpp.simdlen": ISAS[isa][0],
        "cpp.vec_isa_ok": True,
        "cpp.dynamic_threads": True,
    } if isa else {}  # fmt: skip
    wanted |= {"cpp_cache_precompile_headers": False, "fx_graph_cache": True, "fx_graph_remote_cache": False}
    known = set(torch._inductor.list_options())
    # The region's types never change, and a guard that fails would compile in the middle of a call.
    return {name: value for name, value in (wanted | dict(flags)).items() if name in known} | {
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe
    }


def _explained(error: Exception) -> DiffkilnError:
    """Returns the reason that stopped torch, in one line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    if compiler := next((e for e in chain if type(e).__name__ in ("InvalidCxxCompiler", "TritonMissing")), None):
        what = "a C++ compiler" if type(compiler).__name__ == "InvalidCxxCompiler" else "Triton"
        return MissingDependency(f"torch_compile compiles where it runs and needs {what} there, and found none")
    first = next((line for line in str(error).strip().splitlines() if line.strip()), "").rstrip(".")
    return ExportError(f"torch.compile stopped with {type(error).__name__}: {first}. Choose another backend")
