"""Native code that is built ahead of time, by torch's AOTInductor."""

from diffkiln.exporters.aot_inductor.check import AotInductor

PLUGIN = AotInductor()
