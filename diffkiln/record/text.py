"""How prompts become tokens, found by experiment.

The recording's prompts are *sentinels*: strings with capitals, entities, doubled spaces and broken Unicode. The string
that reaches each tokenizer tells what the pipeline does to a prompt on the way: the template around it and which of a
closed list of transforms were applied.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import DataDependent, RecordError
from diffkiln.guards.limits import active
from diffkiln.interpreter.aten import type_of
from diffkiln.program.text_rules import COUNTED, TRANSFORMS
from diffkiln.record.counted import Counted
from diffkiln.record.shadows import UNKNOWN, Shadow
from diffkiln.record.tape import Tape
from diffkiln.record.tokens import tokens_of

_POSITIONS = "position_ids"
#: A library that is not installed does nothing to a prompt in diffusers either.
_KNOWN = [name for name in TRANSFORMS if name != "ftfy" or find_spec("ftfy")]


def sentinel(keyword: str, index: int) -> str:
    """Returns a prompt that shows what is done to it; each keyword and place in the batch has its own."""
    return f"  Kiln {keyword} No{index}Z &amp;lt;Fire&amp;gt;  <Clay>\n schÃ¶n \u201cGLAZE\u201d  "


def is_sentinel(prompt: Any) -> bool:
    """Returns True for a prompt of a recording, before anything was done to it."""
    return isinstance(prompt, str) and "Kiln " in prompt and "GLAZE" in prompt


def demand(key: str, what: str) -> None:
    """Says of the prompts of the recording that runs now what they may not hold, or what they must be
    (program.text_rules.FORBIDDEN, FORMS)."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.demanded[key] = what


class Ruled(str):
    """A prompt that says by which rules it becomes tokens, such as quotations="characters" (program.text_rules)."""

    rules: Mapping[str, str] = {}

    def __new__(cls, text: str, **rules: str) -> Ruled:
        """Returns the text with entries for the program's text."""
        made = super().__new__(cls, text)
        made.rules = rules
        return made


def apply(transforms: tuple[str, ...], text: str) -> str:
    for name in transforms:
        text = TRANSFORMS[name](text)
    return text


def tokenizer_of(component: Any) -> Any:
    """Returns the tokenizer of a component that also prepares images, such as Qwen2VLProcessor; else the component."""
    from transformers import PreTrainedTokenizerBase

    # ChatGLM's tokenizer has one of another kind inside.
    return component if isinstance(component, PreTrainedTokenizerBase) else getattr(component, "tokenizer", component)


def marks_of(component: Any) -> list[str]:
    """Returns the text that stands for an image or a video in a component's prompts, which no prompt may hold."""
    found = [getattr(component, name, None) for name in ("image_token", "video_token")]
    return [mark for mark in found if isinstance(mark, str)] if hasattr(component, "tokenizer") else []


class TextRecorder:
    """The stand-in for the tokenizers' `__call__` while a call is recorded.

    Args:
        tape: where the tokens become marked inputs.
        sentinels: text → (keyword, index in the batch).
        names: id of a tokenizer → its name in the pipeline.
        marks: name of a tokenizer → what its prompts may not hold.
        counted: the numbers of tokens of the prompts, where they are fixed.
    """

    def __init__(
        self,
        tape: Tape,
        sentinels: Mapping[str, tuple[str, int]],
        names: Mapping[int, str],
        marks: Mapping[str, list[str]] | None = None,
        counted: Counted | None = None,
    ) -> None:
        self.tape, self.sentinels, self.names, self.marks = tape, sentinels, names, marks or {}
        self.counted = counted
        self.texts: list[dict[str, Any]] = []
        self.demanded: dict[str, str] = {}
        tape.same_prompt = self._same_prompt

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the recorder of the prompts inside the `with` block."""
        token = _RECORDER.set(self)
        try:
            yield
        finally:
            _RECORDER.reset(token)

    @property
    def entries(self) -> tuple[dict[str, Any], ...]:
        """Returns the texts as a program has them."""
        return tuple(text | self.demanded for text in self.texts)

    def __call__(self, tokenizer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Tokenizes; if the text holds a sentinel, the tensors of the result are marked inputs.

        A sentinel is cut if it must not be longer; the runtime refuses such a prompt.
        """
        if kwargs.get("padding") == "max_length":  # else the library may end the process for want of memory
            length = kwargs.get("max_length") or getattr(tokenizer, "model_max_length", 0)
            active().check("tokens", length, f"{self.names.get(id(tokenizer), 'a tokenizer')}, model_max_length")
        cut = {"truncation": True} if kwargs.get("padding") == "max_length" else {}
        with _disable_current_modes():
            encoding = original(tokenizer, *args, **kwargs | cut)
        text = args[0] if args else kwargs.get("text")
        strings: list[str] = [text] if isinstance(text, str) else list(text or ())
        if not any(self._holds_sentinel(string) for string in strings):
            return encoding
        if tokenizer is not None and id(tokenizer) not in self.names:
            raise RecordError(f"a tokenizer that is not a component of the pipeline ({type(tokenizer).__name__})")
        entry = self._entry(tokenizer, strings, kwargs)
        if self.counted is not None and self.counted.applies(entry):
            return self._of_fixed_length(self.counted, entry, tokenizer, original, kwargs, encoding)
        self.texts.append(entry)
        counted_up = _positions_of(encoding)
        for key, tensor in list(encoding.items()):
            encoding[key] = self._mark(tensor, key, len(self.texts) - 1)
        if counted_up:
            encoding[_POSITIONS] = (encoding["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return encoding

    def _of_fixed_length(
        self,
        counted: Counted,
        entry: dict[str, Any],
        tokenizer: Any,
        original: Callable[..., Any],
        kwargs: Mapping[str, Any],
        encoding: Any,
    ) -> Any:
        """Returns the tokens of prompts of known lengths, with their mask as a constant."""

        def count(text: str) -> int:
            return len(original(tokenizer, text, add_special_tokens=entry["add_special_tokens"])["input_ids"])

        with _disable_current_modes():
            entry, mask = counted.fixed(entry, count, kwargs)
        self.texts.append(entry)
        shadow = self._shadow(entry, mask, tokenizer, original)
        for key, tensor in list(encoding.items()):
            if key == "attention_mask" and isinstance(tensor, torch.Tensor):
                encoding[key] = mask.to(tensor.dtype)
            elif isinstance(tensor, torch.Tensor) and tensor.shape[:1] == mask.shape[:1] and tensor.ndim == mask.ndim:
                encoding[key] = self._mark(tensor.new_zeros(mask.shape), key, len(self.texts) - 1)
                if key == "input_ids" and shadow is not None:
                    self.tape.shadows[id(encoding[key])] = shadow
            elif isinstance(tensor, list) and key in ("input_ids", "attention_mask"):
                rows = self._rows(key, mask)
                encoding[key] = rows if tensor and isinstance(tensor[0], list) else rows[0]
            else:
                encoding[key] = self._mark(tensor, key, len(self.texts) - 1)
        return encoding

    def _shadow(
        self, entry: dict[str, Any], mask: torch.Tensor, tokenizer: Any, original: Callable[..., Any]
    ) -> Shadow | None:
        """Returns what is known of the tokens: those before and after each prompt. None where a text is cut."""
        added = tokenizer.get_added_vocab()
        words = {number: word for word, number in added.items()}

        def is_mark(number: int) -> bool:
            if number not in words:
                return False
            entry["marks"] = sorted({*entry.get("marks", ()), words[number]})
            return True

        def tokens(text: str) -> list[int]:
            return original(tokenizer, text, add_special_tokens=entry["add_special_tokens"])["input_ids"]

        with _disable_current_modes():
            rows = []
            for row, total in zip(entry["rows"], entry[COUNTED], strict=True):
                before, after = (tokens(row.get(side, "")) for side in ("prefix", "suffix"))
                if "text" in row:
                    before, after = tokens(row["text"]), []
                if len(before) + len(after) > total or (entry["cut"] is not None and total >= entry["cut"]):
                    return None
                content = [*before, *[UNKNOWN] * (total - len(before) - len(after)), *after]
                padding = [entry["pad_id"]] * (mask.shape[1] - total)
                rows.append([*content, *padding] if entry["padding_side"] == "right" else [*padding, *content])
            return Shadow(torch.tensor(rows, dtype=torch.int64), is_mark)

    def _rows(self, key: str, mask: torch.Tensor) -> list[Any]:
        """Returns the tokens of each text, or their mask, as lists."""
        if key == "attention_mask":
            return mask.tolist()
        ids = self._mark(torch.zeros_like(mask), key, len(self.texts) - 1)
        return [tokens_of(ids[row]) for row in range(ids.shape[0])]

    def _same_prompt(self, first: int, second: int) -> bool:
        one, other = self.texts[first], self.texts[second]
        return all(one[key] == other[key] for key in ("tokenizer", "rows", "transforms", "max_length", "padding"))

    def _mark(self, tensor: Any, key: str, text: int) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return _Unreadable(self.names, key)
        source = {"kind": "tokens", "text": text, "key": key}
        return self.tape.new_input(f"{self.texts[text]['tokenizer']}.{key}", type_of(tensor), source)

    def _holds_sentinel(self, string: str) -> bool:
        return isinstance(string, str) and self._row(string) is not None

    def _entry(self, tokenizer: Any, strings: list[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        found = [self._row(string) for string in strings]
        transforms = next(item[0] for item in found if item)
        rows = [item[1] if item else {"text": string} for item, string in zip(found, strings, strict=True)]
        padding = kwargs.get("padding", False)
        max_length = kwargs.get("max_length") or tokenizer.model_max_length
        marks = self.marks.get(self.names[id(tokenizer)])
        return {
            "tokenizer": self.names[id(tokenizer)],
            "rows": rows,
            "transforms": list(transforms),
            "padding": {True: "longest", False: "none"}.get(padding, padding),
            "max_length": int(max_length) if max_length < 10**9 else None,
            "truncation": bool(kwargs.get("truncation", False)),
            "add_special_tokens": bool(kwargs.get("add_special_tokens", True)),
            "padding_side": kwargs.get("padding_side") or tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            "pad_id": tokenizer.pad_token_id,
            "pad_token": tokenizer.pad_token,
            "pad_type_id": getattr(tokenizer, "pad_token_type_id", 0),
            **({"marks": marks} if marks else {}),
            **next((string.rules for string in strings if isinstance(string, Ruled)), {}),
        }

    def _row(self, string: str) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        """Returns which sentinel is in the string, under which transforms, and the text around it."""
        if "kiln" not in string.lower():
            return None
        for count in range(len(_KNOWN) + 1):
            for transforms in itertools.combinations(_KNOWN, count):
                for text, (keyword, index) in self.sentinels.items():
                    prefix, found, suffix = string.partition(apply(transforms, text))
                    if found:
                        return transforms, {"keyword": keyword, "index": index, "prefix": prefix, "suffix": suffix}
        raise RecordError(
            f"the pipeline changes a prompt in a way that is not in diffkiln's closed list {sorted(TRANSFORMS)}: it "
            f"made {string!r}. If the call has a keyword such as clean_caption, set it to false in inputs.call"
        )


def _positions_of(encoding: Any) -> bool:
    """Returns True if a tokenizer counts the tokens that its mask has, from 0."""
    positions, mask = encoding.get(_POSITIONS), encoding.get("attention_mask")
    if not (isinstance(positions, torch.Tensor) and isinstance(mask, torch.Tensor)):
        return False
    with _disable_current_modes():
        return torch.equal(positions, (mask.cumsum(-1) - 1).clamp(min=0))


class _Unreadable(list[Any]):
    """Token ids that were not asked for as tensors: using them would bake one prompt into the program."""

    def __init__(self, names: Mapping[int, str], key: str) -> None:
        super().__init__()
        self._what = f"tokens ({key}) as Python lists"

    def _refuse(self, *_args: Any) -> Any:
        raise DataDependent(f"the pipeline reads {self._what}, so its control flow may change with the prompt")

    __iter__ = __len__ = __getitem__ = _refuse


def refuse_unpadded(texts: list[dict[str, Any]], used: set[int]) -> None:
    """Refuses tokens whose length follows the prompt.

    Raises:
        DataDependent: a text in `used` is not padded to a fixed length.
    """
    for index in sorted(used):
        text = texts[index]
        if text["padding"] != "max_length" or text["max_length"] is None:
            raise DataDependent(
                f"{text['tokenizer']} is called with padding={text['padding']!r} and truncation={text['truncation']}: "
                "the number of tokens follows the prompt"
            )


_RECORDER: ContextVar[TextRecorder | None] = ContextVar("_RECORDER", default=None)
