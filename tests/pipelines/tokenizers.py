"""Tiny tokenizers of the real kinds: byte-level BPE, Unigram and WordPiece over printable ASCII.

Each function returns a transformers tokenizer whose rules (case, white space, special tokens) are those of the
real model and whose vocabulary is an alphabet plus a few words, so that every English prompt becomes several
known tokens.
"""

import string
import tempfile
from collections.abc import Iterable
from pathlib import Path

import transformers
from tokenizers import AddedToken, processors
from tokenizers.pre_tokenizers import ByteLevel

# Each word brings the merges that build it from left to right, so a word stays whole if no earlier one begins with
# two letters from its middle. The first line is Qwen-Image's template, which its pipeline takes for 34 tokens.
WORD_LIST = (
    "system texture spatial relationships background detailing quantity objects Describe shape image color size text "
    "user assistant mountain portrait painting drawing morning quality prompt street photo house light night river "
    "green white black small quiet little tree lake city blue high big red old fox dog cat bird you are "
    "the and with from for an at by in is of on to ing er ed th st re ou a"
)
WORDS = WORD_LIST.split()

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _merges(words: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The merges that build each word from left to right, in order and without repeats."""
    merges: dict[tuple[str, str], None] = {}
    for first, *rest in words:
        left = first
        for right in rest:
            merges[left, right] = None
            left += right
    return list(merges)


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _unigrams() -> dict[str, float]:
    pieces = {"▁": -2.0}
    pieces |= {char: -6.0 for char in string.printable if char.isprintable() and not char.isspace()}
    for rank, word in enumerate(WORDS):
        pieces["▁" + word] = -3.0 - rank / 64
        pieces.setdefault(word, -5.0 - rank / 64)
    return pieces


def clip(pad_token: str = "<|endoftext|>", max_length: int = 77):
    """CLIP: lower-cased byte-level BPE with `</w>`; bos and eos are the last two ids, as in the real one."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = _merges((*word[:-1], word[-1] + "</w>") for word in WORDS)
    ends = [char + "</w>" for char in alphabet]
    # "!" is id 0 and pads SDXL's second tokenizer; it sorts first in the alphabet.
    vocab = _numbered([*alphabet, *ends, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"])
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)


def t5(max_length: int = 512):
    """T5 and UMT5: case-sensitive Unigram with `▁` for a word's beginning, `</s>` at the end, no bos."""
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, **_unigrams()}
    return transformers.T5TokenizerFast(
        vocab=list(pieces.items()), extra_ids=0, additional_special_tokens=[], model_max_length=max_length
    )


def qwen(max_length: int = 512):
    """Qwen2, 2.5 and 3: case-sensitive byte-level BPE, chat template, `<|endoftext|>` as padding, no bos or eos."""
    merges = _merges(tuple(lead + word) for word in WORDS for lead in ("Ġ", ""))
    vocab = _numbered([*sorted(ByteLevel.alphabet()), *map("".join, merges), "<|endoftext|>"])
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", model_max_length=max_length
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(token) for token in ("<think>", "</think>")])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma(max_length: int = 512, padding_side: str = "right"):
    """Gemma: case-sensitive BPE with byte fallback, spaces kept as `▁`, bos in front."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    alphabet = ["▁", "\n", *(char for char in string.printable if char.isprintable() and char != " ")]
    merges = _merges(tuple(lead + word) for word in WORDS for lead in ("▁", ""))
    vocab = _numbered([*special, *bytes_, *alphabet, *map("".join, merges)])
    tokenizer = transformers.GemmaTokenizer(
        vocab=vocab, merges=merges, padding_side=padding_side, model_max_length=max_length
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def bert(max_length: int = 77):
    """BERT: lower-cased WordPiece between `[CLS]` and `[SEP]`."""
    chars = [char for char in string.printable if char.isprintable() and not char.isspace()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*chars, *WORDS]
    vocab = _numbered([*special, *pieces, *("##" + piece for piece in pieces)])
    return transformers.BertTokenizer(vocab=vocab, model_max_length=max_length)


def xlm_roberta(max_length: int = 512):
    """XLM-RoBERTa: case-sensitive Unigram with `▁` for a word's beginning, between `<s>` and `</s>`."""
    pieces = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, **_unigrams()}
    return transformers.XLMRobertaTokenizer(vocab=list(pieces.items()), model_max_length=max_length)


def roberta(max_length: int = 77):
    """RoBERTa: case-sensitive byte-level BPE between `<s>` and `</s>`."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    merges = _merges(tuple(lead + word) for word in WORDS for lead in ("Ġ", ""))
    vocab = _numbered([*special, *sorted(ByteLevel.alphabet()), *map("".join, merges)])
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def llama(max_length: int = 512):
    """Llama 2: case-sensitive BPE with byte fallback, spaces kept as `▁`, bos in front."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    alphabet = ["▁", *(char for char in string.printable if char.isprintable() and char != " ")]
    merges = _merges(tuple(lead + word) for word in WORDS for lead in ("▁", ""))
    vocab = _numbered([*special, *bytes_, *alphabet, *map("".join, merges)])
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def llama3(max_length: int = 512):
    """Llama 3's marks around what each side says, and one of an image, in Qwen's kind of vocabulary."""
    tokenizer = qwen(max_length)
    marks = ("<image>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    return tokenizer


def chat_glm(max_length: int = 64):
    """ChatGLM 3: SentencePiece's own file, which is trained on the words, padded on the left."""
    import sentencepiece
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    folder = Path(tempfile.mkdtemp(prefix="diffkiln-glm-"))
    alphabet = "".join(char for char in string.printable if char.isprintable() and not char.isspace())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORD_LIST, *alphabet]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return ChatGLMTokenizer(str(folder / "tokenizer.model"), model_max_length=max_length)
