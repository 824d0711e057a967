"""Which files a bundle may hold, by name and role. Pure text: nothing is opened, nothing is looked up.

The format knows the place of every file, and whatever has none is refused. That keeps out what other programs act on by
its name alone: `.git`, `.envrc` and other dot files, Python modules, and directories that git takes for a repository.
"""

from __future__ import annotations

import re
import unicodedata

#: The list of all files, and its digest.
MANIFEST, MANIFEST_DIGEST = "manifest.json", "manifest.sha256"
#: Made of the manifest: so it is outside the id, and signing a bundle does not change which bundle it is.
SIGNATURE = "manifest.sig"
#: Beside a manifest whose engines are here for some of its targets only (diffkiln.bundle.partial).
PARTIAL = "partial.json"
#: How the bundle was built, and its card: not reproducible, so outside the id and the digests.
BUILD, CARD = "build.json", "README.md"
UNHASHED = frozenset({BUILD, CARD})
#: The spec as compiled, and the licences of what went in.
SPEC, LICENCES = "spec.json", "licences.json"
#: The folded tensors of all programs, and the schemas of the operators that they name.
CONSTANTS, SCHEMAS = "programs/constants.safetensors", "programs/operators.json"
#: Folders: of diffusers' configuration, and of tokenizers.
PIPELINE, TEXT = "pipeline/", "text/"
#: In a component's folder of `pipeline/`: its layers that are stored in another form.
LAYERS = "layers.json"
#: Groups of weights besides those of blocks: what lies outside of blocks, and what no program reads.
REST, UNUSED = "rest", "unused"
#: A feature, and the key of a file's metadata that lists the weights that lie with their channels last.
CHANNELS_LAST = "channels_last"


def program_file(name: str) -> str:
    """Returns the path of the programs of a variant or a component."""
    return f"programs/{name}.json"


def weights_file(component: str, group: str) -> str:
    """Returns the path of a group of a component's weights."""
    return f"weights/{component}/{group}.safetensors"


def before_loop(group: str) -> str:
    """Returns the group of those of its weights that are read before the denoising loop alone."""
    return f"{group}.before"


def engine_folder(target: str, component: str, region: str) -> str:
    """Returns the path of the folder of an engine."""
    return f"engines/{target}/{component}/{region}"


def tokenizer_file(name: str) -> str:
    """Returns the path of a tokenizer."""
    return f"{TEXT}{name}.json"


def calibration_file(component: str) -> str:
    """Returns the path of what was measured to choose the steps of a component's schedule."""
    return f"calibration/{component}.json"


#: One more folder or file of any name, and any number of folders.
_ONE, _ANY = "[^/]+", "(?:[^/]+/)*"
#: What tokenizers, schedulers and processors of diffusers and transformers read: text, and vocabularies.
_CONFIGURATION = "json|txt|model|jinja|tiktoken|spm|vocab|bpe"

#: By role, where a file may lie. A later minor of the format may add places.
_NAMES = {
    "config": rf"spec\.json|text/{_ONE}\.json|pipeline/{_ANY}{_ONE}\.(?:{_CONFIGURATION})",
    "program": rf"programs/{_ONE}\.(?:json|safetensors)",
    "weights": rf"weights/{_ONE}/{_ONE}\.safetensors",
    "native": rf"engines/{_ONE}/{_ANY}{_ONE}",
    "doc": rf"licences\.json|calibration/{_ONE}\.json",
}
_PATTERNS = {role: re.compile(pattern) for role, pattern in _NAMES.items()}

# Python runs a module that is imported from a folder, and a .pth file at its start.
_PYTHON = (".py", ".pyc", ".pyd", ".pyi", ".pyo", ".pyw", ".pyz", ".pth")


def misplaced(path: str, role: str) -> str | None:
    """Returns why a file of this name and role has no place in a bundle; `None` where it has one.

    Args:
        path: one that `check_path` accepts.
        role: one of the manifest's.
    """
    if reason := acted_on(path):
        return reason
    if not _PATTERNS[role].fullmatch(path):
        return f"the format has no such file with the role {role}"
    return None


def acted_on(path: str) -> str | None:
    """Returns why some program would act on a file of this name by itself; `None` where none would."""
    for component in unicodedata.normalize("NFKC", path).casefold().split("/"):
        if component.startswith("."):
            return f"{component!r} is a dot file or a dot folder, which programs such as git act on"
        if component.endswith(_PYTHON):
            return f"{component!r} is code of Python"
        if component == "head":  # with `objects` and `refs` beside it: a repository, whose configuration runs programs
            return f"{component!r} makes git take the folder for a repository"
    return None
