"""Files of adapters on the Hub."""

from __future__ import annotations

from pathlib import Path

from diffkiln.errors import HubError
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import active
from diffkiln.hub.address import SCHEME, parse_address
from diffkiln.hub.explained import asking


@gated()
def adapter_file(address: str) -> Path:
    """Returns the file at `hf://owner/name@commit/FILE`, and fetches it into huggingface_hub's cache once.

    Raises:
        HubError: It is not such an address, or the Hub does not have the file. `HubUnavailable` for what may pass.
        LimitExceeded: The file is larger than the limits allow.
    """
    bundle, _, file = _split(address)
    repo, commit = parse_address(bundle)
    if not file.endswith(".safetensors"):
        raise HubError(
            f"{address[:300]} names no safetensors file. Give {SCHEME}{repo}@{commit}/FILE.safetensors; a pickle can "
            "run code that it carries"
        )
    with asking(repo, f"fetch {file[:100]} of"):
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

        found = try_to_load_from_cache(repo, file, revision=commit)
        if isinstance(found, str):
            return Path(found)
        size = get_hf_file_metadata(hf_hub_url(repo, file, revision=commit)).size or 0
        active().check("adapter_bytes", size, f"{repo}/{file}")
        return Path(hf_hub_download(repo, file, revision=commit))


def _split(address: str) -> tuple[str, str, str]:
    """Splits an address after its commit."""
    repo, at, rest = address.partition("@")
    commit, slash, file = rest.partition("/")
    return f"{repo}{at}{commit}", slash, file
