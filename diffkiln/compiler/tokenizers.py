"""The tokenizers of a recorded call, as the runtime reads them."""

from __future__ import annotations

from typing import Any

from diffkiln.errors import RecordError
from diffkiln.plugins import plugins
from diffkiln.record.pipeline import Recording
from diffkiln.record.text import tokenizer_of


def tokenizers_of(recording: Recording, pipe: Any) -> dict[str, str]:
    """Returns the tokenizers that the calls use, by name, as JSON of the tokenizers library.

    Raises:
        RecordError: a tokenizer is not backed by that library.
    """
    names = {text["tokenizer"] for programs in recording.calls for p in programs.values() for text in p.texts}
    return {name: _tokenizer_json(name, tokenizer_of(pipe.components[name])) for name in sorted(names)}


def _tokenizer_json(name: str, tokenizer: Any) -> str:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None) or _of_families(tokenizer)
    if not isinstance(backend, Tokenizer):
        raise RecordError(
            f"the tokenizer {name!r} ({type(tokenizer).__name__}) is not backed by the tokenizers library, which the "
            "runtime uses. Save the pipeline with a fast tokenizer"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str(pretty=True)


def _of_families(tokenizer: Any) -> Any:
    """Returns what a family makes of a tokenizer that the library does not back; None where none does."""
    families = (plugin.load() for plugin in plugins("families").values())
    makers = (family.tokenizers.get(type(tokenizer).__name__) for family in families)
    maker = next(filter(None, makers), None)
    return None if maker is None else maker(tokenizer)
