"""Which metrics are measured: the built-in ones, those of other distributions, and functions by their dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from diffkiln.compiler.metrics import About, Metric, Pair, Score
from diffkiln.errors import CallError, SpecError
from diffkiln.guards.spelling import suggest
from diffkiln.plugins import load, plugins


class UserMetric(Metric):
    """A function of the user.

    It takes images and prompts, and is called for both sides; or images, references and prompts. Images are float32
    [pictures, 3, height, width], or [pictures, frames, 3, height, width] for videos, 0 to 1. It gives a number, or one
    for each picture.
    """

    packages = ()

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self._paired = len(inspect.signature(function).parameters) >= 3

    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the function's numbers, and those of the references where it looks at one side."""
        prompts = [pair.prompt for pair in pairs]
        ours, theirs = _stacked([pair.picture for pair in pairs]), _stacked([pair.reference for pair in pairs])
        if self._paired:
            return self._scored(ours, theirs, prompts)
        own, reference = self._scored(ours, prompts), self._scored(theirs, prompts)
        return Score(own.overall, own.each, reference.overall)

    def _scored(self, *given: Any) -> Score:
        try:
            found = self._function(*given)
            numbers = [float(value) for value in found] if hasattr(found, "__len__") else [float(found)]
        except (TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CallError(f"the metric {self._name} gives no number, nor one for each picture: {reason}") from error
        each = tuple(numbers) if hasattr(found, "__len__") else ()
        return Score(sum(numbers) / len(numbers), each)


def _stacked(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    made = torch.stack(list(pictures))
    return made[:, 0] if made.shape[1] == 1 else made


def metrics_of(words: Sequence[str]) -> dict[str, Metric]:
    """Returns metrics by their names.

    Args:
        words: names of metrics, or dotted paths of functions, `package.module:function`; none for all that are known.

    Raises:
        SpecError: there is no such metric, or no such function.
    """
    return {word: metric(word) for word in words or tuple(plugins("metrics"))}


def metric(word: str) -> Metric:
    """Returns the metric of one name or dotted path.

    Raises:
        SpecError: there is none.
    """
    if ":" in word:
        return _as_metric(word, _imported(word))
    if word not in plugins("metrics"):
        hint = suggest(word, plugins("metrics")) or f"There are {', '.join(plugins('metrics'))}"
        raise SpecError(f"there is no metric {word!r}. {hint}; a function of yours is package.module:function")
    return _as_metric(word, load("metrics", word))


def _as_metric(name: str, found: Any) -> Metric:
    if isinstance(found, Metric):
        return found
    if callable(found):
        return UserMetric(name, found)
    raise SpecError(f"the metric {name} is no function, but {type(found).__name__}. Name a function")


def _imported(word: str) -> Any:
    module, _, attribute = word.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise SpecError(
            f"the metric {word} cannot be imported: there is no module {error.name}. Install it, or set PYTHONPATH"
        ) from error
    except AttributeError:
        raise SpecError(f"the metric {word} cannot be imported: {module} has no {attribute}") from None


def check_computable(metrics: Mapping[str, Metric], about: About) -> None:
    """Checks that every metric that was asked for can be measured.

    Raises:
        SpecError: some cannot; says why.
    """
    reasons = {name: each.objection(about) for name, each in metrics.items()}
    if wrong := [f"{name} {reason}" for name, reason in reasons.items() if reason]:
        raise SpecError(f"what was asked for cannot be measured: {'; '.join(wrong)}")


def backbones_of(items: Sequence[str]) -> dict[str, Path]:
    """Returns the folder of each backbone.

    Args:
        items: `KIND=FOLDER`, or `KIND=owner/name@commit` for a repository on the Hub, which is fetched once.

    Raises:
        SpecError: an item is malformed, or there is no such folder.
        SourceError: the Hub does not have it.
    """
    found: dict[str, Path] = {}
    known = sorted({load("metrics", name).backbone for name in plugins("metrics")} - {""})
    for item in items:
        kind, equals, where = item.partition("=")
        if not equals or not where or kind not in known:
            raise SpecError(f"--backbone {item}: write KIND=FOLDER, where KIND is one of {', '.join(known)}")
        found[kind] = _folder(kind, where)
    return found


def _folder(kind: str, where: str) -> Path:
    path = Path(where).expanduser()
    if path.is_dir():
        return path.absolute()
    repo, at, commit = where.rpartition("@")
    from diffkiln.models.opening import COMMIT, HUB_ID, from_the_hub

    if at and HUB_ID.fullmatch(repo) and COMMIT.fullmatch(commit):
        with from_the_hub(repo, commit, f"--backbone {kind}"):
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.txt", "*.safetensors"]
            return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
    raise SpecError(
        f"--backbone {kind}: there is no folder {where}. Give a local folder, or owner/name@commit with the 40 digits "
        "of a commit on the Hub"
    )
