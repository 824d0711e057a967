"""Moving what does not follow the latents out of the denoising loop: what values depend on (`dependence`), which
operations are worth it (`choosing`), a program in phases (`phases`), the component (`components`) and its calls
(`calling`). What components make of constants alone is evaluated as a whole (`encoders`); `tables` collects what is
evaluated when the bundle is made. They are rewrites of programs and know nothing of models."""

from diffkiln.passes.hoisting.calling import Hoisted, hoisted
from diffkiln.passes.hoisting.choosing import matches
from diffkiln.passes.hoisting.encoders import Encoded, encoded_ahead

__all__ = ["Encoded", "Hoisted", "encoded_ahead", "hoisted", "matches"]
