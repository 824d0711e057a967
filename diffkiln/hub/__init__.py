"""Bundles on the Hugging Face Hub: `push` publishes one, `pull` fetches one, `cached` is what `load("hf://…")` calls.

huggingface_hub (extra `hub`) is imported when the Hub is asked, and not before.
"""

from diffkiln.hub.address import SCHEME, check_repo, parse_address
from diffkiln.hub.cache import cached
from diffkiln.hub.fetch import Choose, Pulled, only, pull
from diffkiln.hub.publish import Pushed, push

__all__ = ["SCHEME", "Choose", "Pulled", "Pushed", "cached", "check_repo", "only", "parse_address", "pull", "push"]
