"""ChatGLM's tokenizer, which is SentencePiece's own, as one of the tokenizers library."""

import pytest

from diffkiln.compiler.tokenizers import _tokenizer_json
from diffkiln.errors import RecordError
from tests.pipelines import tokenizers

TEXTS = ("", "a", "a red fox", "  Two   spaces\n and a\tline ", "schön “quoted” ‘words’ 7!", "新しい fox")


@pytest.mark.parametrize("text", TEXTS)
def test_the_library_gives_the_same_tokens(text):
    from tokenizers import Tokenizer

    own = tokenizers.chat_glm()
    made = Tokenizer.from_str(_tokenizer_json("tokenizer", own))
    assert made.encode(text).ids == own(text).input_ids


def test_a_tokenizer_that_no_family_knows_is_refused():
    with pytest.raises(RecordError, match="not backed by the tokenizers library"):
        _tokenizer_json("tokenizer", object())
