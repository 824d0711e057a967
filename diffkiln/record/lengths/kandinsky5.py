"""Kandinsky 5: refused, as no length can be fixed by what the other families have."""

from __future__ import annotations

from typing import Any

from diffkiln.errors import DataDependent
from diffkiln.record.lengths.rewriting import Rewrite


def _encode_prompt_qwen(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise DataDependent(
        f"the text encoder and the denoiser of {type(self).__name__} take as many tokens as the longest prompt has, "
        "without a mask, and a long prompt is cut by the characters that its last tokens decode to, so that shapes and "
        "text follow the prompt. No keyword of the call changes that"
    )


def _refused(fingerprint: str, *owners: str) -> Rewrite:
    return Rewrite(
        owners=owners,
        method="_encode_prompt_qwen",
        prints={"_encode_prompt_qwen": fingerprint},
        replacement=_encode_prompt_qwen,
        refuses=True,
    )


REWRITES = (
    _refused(
        "fabe41311900017e",
        "pipelines.kandinsky5.pipeline_kandinsky:Kandinsky5T2VPipeline",
        "pipelines.kandinsky5.pipeline_kandinsky_i2v:Kandinsky5I2VPipeline",
    ),
    _refused("ff8d0f233a6d0202", "pipelines.kandinsky5.pipeline_kandinsky_t2i:Kandinsky5T2IPipeline"),
)
