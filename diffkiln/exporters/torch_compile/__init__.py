"""What torch.compile wrote, for torch.compile where the bundle runs."""

from diffkiln.exporters.torch_compile.check import TorchCompile

PLUGIN = TorchCompile()
