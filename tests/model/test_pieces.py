"""Pieces: together they are the text, and each belongs to its token."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entangle.model.pieces import pieces_of
from tests.tiny_models import tiny_tokenizer

BYTES = tiny_tokenizer()


def words() -> Any:
    kinds = {"<unk>": 0, "▁the": 1, "▁dog": 2, "s": 3}
    backend = Tokenizer(models.WordLevel(kinds, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()  # as sentencepiece's: the first space of a text is lost
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("text", ["the dog", " two  spaces\n\ttab", "naïve — 猫が好き 🐈‍⬛!", ""])
def test_pieces_add_up_to_the_text(text: str) -> None:
    tokens = BYTES(text, add_special_tokens=False)["input_ids"]
    found = pieces_of(tokens, BYTES.decode)
    assert len(found) == len(tokens)
    assert "".join(found) == text


def test_a_character_belongs_to_its_last_token() -> None:
    tokens = BYTES("a猫b", add_special_tokens=False)["input_ids"]
    assert pieces_of(tokens, BYTES.decode) == ["a", "", "", "猫", "b"]


def test_words_keep_the_space_before_them() -> None:
    assert pieces_of([1, 2, 3, 1, 2], words().decode) == ["the", " dog", "s", " the", " dog"]


def test_bytes_of_no_character_do_not_swallow_the_text_after_them() -> None:
    byte = BYTES("猫", add_special_tokens=False)["input_ids"][1]
    letters = BYTES("abcdef", add_special_tokens=False)["input_ids"]
    found = pieces_of([byte, *letters], BYTES.decode)
    assert found[-4:] == ["c", "d", "e", "f"]
    assert "".join(found).endswith("abcdef")
    assert "".join(pieces_of([*letters, byte], BYTES.decode)).startswith("abcdef")


def test_whatever_the_bytes_are_pieces_add_up_and_invalid_ones_stay_at_their_tokens() -> None:
    ids = BYTES("aé猫🐈\ufffd ", add_special_tokens=False)["input_ids"]
    generator = np.random.default_rng(0)
    for _ in range(300):
        tokens = generator.choice(ids, 12).tolist()
        assert "".join(pieces_of(tokens, BYTES.decode)) == BYTES.decode(tokens)
    first, *_ = BYTES("猫", add_special_tokens=False)["input_ids"]
    a, b = BYTES("ab", add_special_tokens=False)["input_ids"]
    assert pieces_of([first, a, first, first, b], BYTES.decode) == [
        "\ufffd",
        "a",
        *"\ufffd\ufffd",
        "b",
    ]
    cat = BYTES("猫", add_special_tokens=False)["input_ids"]
    assert pieces_of([first, *cat, a], BYTES.decode) == ["\ufffd", "", "", "猫", "a"]
