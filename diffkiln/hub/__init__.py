"""Bundles on the Hugging Face Hub: `push` publishes a bundle, `pull` fetches one, and `load("hf://…")` calls `cached`.

huggingface_hub (extra `hub`) is imported when the Hub is asked, and not before.
"""

from diffkiln.hub.adapters import adapter_file
from diffkiln.hub.address import SCHEME, check_repo, parse_address
from diffkiln.hub.cache import cached, pinned
from diffkiln.hub.fetch import Choose, Pulled, only, pull
from diffkiln.hub.publish import Pushed, push

__all__ = [
    "SCHEME",
    "Choose",
    "Pulled",
    "Pushed",
    "adapter_file",
    "cached",
    "check_repo",
    "only",
    "parse_address",
    "pinned",
    "pull",
    "push",
]
