"""Recordings are believed only after they were compared with what they were recorded from.

The call: the pipeline's own `__call__` runs with *stand-ins* for its components, functions that give pseudo-random
tensors which depend on every bit of their arguments; so does the program, through the runtime that will run it in
production. The components: each is run as diffusers runs it and replayed from its program, on what the call gave it;
whole where its weights are small enough, else as a reduced model with one block of each kind. Both bit for bit.

Where a call has a fixed length that diffusers' own has not (diffkiln.record.patches), what diffusers gives a component
is padded first, so that the call is compared bit for bit all the same. Each such component is then compared with
itself, as a reduced model in float32 with a block of each list: as diffusers has it, on what diffusers gives it, and at
the fixed length; within rounding.
"""

from diffkiln.compiler.verify.batches import check_batches
from diffkiln.compiler.verify.call import Verification
from diffkiln.compiler.verify.comparing import close, difference, same
from diffkiln.compiler.verify.components import compare_component
from diffkiln.compiler.verify.reduced import in_float32, shrunken

__all__ = [
    "Verification",
    "check_batches",
    "close",
    "compare_component",
    "difference",
    "in_float32",
    "same",
    "shrunken",
]
