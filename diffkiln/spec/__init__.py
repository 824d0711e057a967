"""What a user declares, read safely: the spec's models, its targets and its JSON Schema. No torch."""

from diffkiln.guards.spelling import suggest
from diffkiln.spec.migrate import migrate
from diffkiln.spec.model import DEFAULT_BACKEND, FEWER, Inputs, Offload, PassEntry, Runtime, Source, Spec, TargetSpec
from diffkiln.spec.parse import parse_spec
from diffkiln.spec.problems import problems_from, refuse, show
from diffkiln.spec.schema import json_schema, options_schema
from diffkiln.spec.strict import Conflict, Json, Strict, as_tuple, freeze
from diffkiln.spec.targets import CPU_FLAGS, CPUS, GPUS, TARGETS, Target, find_gpu, resolve_target, resolve_targets

__all__ = [
    "CPUS",
    "CPU_FLAGS",
    "DEFAULT_BACKEND",
    "FEWER",
    "GPUS",
    "TARGETS",
    "Conflict",
    "Inputs",
    "Json",
    "Offload",
    "PassEntry",
    "Runtime",
    "Source",
    "Spec",
    "Strict",
    "Target",
    "TargetSpec",
    "as_tuple",
    "find_gpu",
    "freeze",
    "json_schema",
    "migrate",
    "options_schema",
    "parse_spec",
    "problems_from",
    "refuse",
    "resolve_target",
    "resolve_targets",
    "show",
    "suggest",
]
