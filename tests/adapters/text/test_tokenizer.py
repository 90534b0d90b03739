"""Streams against whole decodes, for every kind of decoder that a model may bring."""

from __future__ import annotations

import json
import random
import threading
import time
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from adapters.base import BackendConfig, ConfigError
from adapters.registry import load_tokenizer
from adapters.text.detokenizer import SpelledStream
from adapters.text.tokenizer import ByteTokenizer, ChatTemplateError, HFTokenizer, Tokenizer, least_num_tokens
from tests.adapters.chat import chat_token_ids

TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "naïve café: e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}, Zoë",
    "emoji 😀👩\N{ZERO WIDTH JOINER}💻🏳️\N{ZERO WIDTH JOINER}🌈 and flags 🇳🇱",
    "日本語とหลายภาษา и русский",
    "  two leading spaces\n\tand a tab  ",
]


def byte_level_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<|tool|>", "two words"])
    return tokenizer


def llama_like_bpe() -> tokenizers.Tokenizer:
    """Spaces as U+2581 and missing characters as byte tokens, as SentencePiece models have them."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for char in "▁" + "".join(sorted(set("".join(TEXTS[:2])) - {" "})):
        vocab.setdefault(char, len(vocab))
    merges = [("▁", "t"), ("▁", "q"), ("h", "e"), ("▁t", "he"), ("o", "x")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace_unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"])
    trainer.show_progress = False
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """Its decoder looks at neighbours, so that it takes the sliding window."""
    words = ["[UNK]", "the", "quick", "##ly", "##er", "fox", "jump", "##s", ",", "caf", "##é", "😀"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(dict(zip(words, range(12), strict=True)), unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level_bpe,
    "llama-like": llama_like_bpe,
    "metaspace": metaspace_unigram,
    "word-piece": word_piece,
}
RAW = {name: make() for name, make in MAKERS.items()}
ALL: dict[str, Tokenizer] = {name: HFTokenizer(raw) for name, raw in RAW.items()} | {"bytes": ByteTokenizer()}


def streamed(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    stream, parts, start = tokenizer.stream(), [], 0
    for size in sizes:
        parts.append(stream.push(token_ids[start : start + size]))
        start += size
    return [*parts, stream.push(token_ids[start:]), stream.flush()]


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_a_stream_of_any_ids_gives_the_whole_decode(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=60))
    assert "".join(streamed(tokenizer, token_ids, sizes)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("name", ALL)
def test_a_stream_of_text_never_shows_half_a_character(name: str) -> None:
    tokenizer = ALL[name]
    for text in TEXTS:
        token_ids = tokenizer.encode(text)
        parts = streamed(tokenizer, token_ids, [1] * len(token_ids))
        assert "".join(parts) == tokenizer.decode(token_ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize("name", ALL)
def test_plain_letters_are_not_held_back(name: str) -> None:
    tokenizer = ALL[name]
    stream = tokenizer.stream()
    shown = "".join(stream.push([i]) for i in tokenizer.encode("the quick fox"))
    assert shown.strip() == "the quick fox"


def composing(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    raw.normalizer = normalizers.NFC()
    return raw


SIZED: dict[str, Tokenizer] = {
    "byte-level": ALL["byte-level"],
    "llama-like": ALL["llama-like"],
    "NFC": HFTokenizer(composing(byte_level_bpe())),
    "bytes": ALL["bytes"],
}
DENSE = ["ᾂ" * 50, "two words" * 20, "가" * 30, " " * 100, *TEXTS]


@pytest.mark.parametrize("name", SIZED)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_a_text_has_at_least_as_many_tokens_as_its_length_tells(name: str, text: str) -> None:
    tokenizer = SIZED[name]
    for sample in (text, *DENSE, *(unicodedata.normalize("NFD", dense) for dense in DENSE)):
        assert least_num_tokens(tokenizer, sample) <= max(1, len(tokenizer.encode(sample)))
    assert least_num_tokens(tokenizer, "a" * 100_000) > 100


@pytest.mark.parametrize("name", ["metaspace", "word-piece"])
def test_where_text_may_shrink_its_length_tells_nothing(name: str) -> None:
    assert least_num_tokens(ALL[name], " " * 100_000) == 1


def test_an_added_token_that_takes_the_spaces_around_it_is_no_measure_of_text() -> None:
    raw = byte_level_bpe()
    raw.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    assert least_num_tokens(HFTokenizer(raw), " " * 100_000 + "<mask>") == 1


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_encoded_as_its_texts_are(name: str) -> None:
    tokenizer = ALL[name]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer = ALL["byte-level"]
    working = threading.Thread(target=tokenizer.encode_batch, args=([TEXTS[0] * 20_000],))
    stamps = [time.monotonic()]
    working.start()
    while working.is_alive():
        time.sleep(0.001)
        stamps.append(time.monotonic())
    longest_s = max(after - before for before, after in pairwise(stamps))
    assert longest_s < 0.5 * (stamps[-1] - stamps[0])


@pytest.mark.parametrize("name", ["byte-level", "bytes"])
def test_byte_tokenizers_give_the_text_back(name: str) -> None:
    for text in TEXTS:
        assert ALL[name].decode(ALL[name].encode(text)) == text


@pytest.mark.parametrize("name", ["byte-level", "word-piece"])
def test_decoding_is_that_of_the_tokenizers_package(name: str) -> None:
    rng = random.Random(5)
    for _ in range(300):
        token_ids = [rng.randrange(ALL[name].vocab_size) for _ in range(rng.randrange(30))]
        assert ALL[name].decode(token_ids) == RAW[name].decode(token_ids)


@pytest.mark.parametrize("name", ["llama-like", "metaspace"])
def test_a_continuation_keeps_the_space_before_its_first_word(name: str) -> None:
    """The package's own decode drops it, as it would for a whole text."""
    raw, tokenizer = RAW[name], ALL[name]
    for text in TEXTS[:2]:
        token_ids = raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(token_ids) == " " + raw.decode(token_ids)


def test_byte_tokens_become_characters_when_complete() -> None:
    tokenizer = ALL["llama-like"]
    stream = tokenizer.stream()
    grin = [3 + byte for byte in "😀".encode()]
    assert [stream.push([i]) for i in grin] == ["", "", "", "😀"]
    assert stream.push(grin[:2]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_and_unknown_ids_have_no_text() -> None:
    tokenizer, raw = ALL["byte-level"], RAW["byte-level"]
    token_ids = [*raw.encode("fox<|endoftext|>").ids, 10**6]
    assert raw.token_to_id("<|endoftext|>") in token_ids
    assert tokenizer.decode(token_ids) == "fox"
    stream = tokenizer.stream()
    assert stream.push(token_ids) + stream.flush() == "fox"
    assert tokenizer.special_tokens == {raw.token_to_id("<|endoftext|>"): "<|endoftext|>"}
    spelled = SpelledStream(tokenizer.stream(), tokenizer.special_tokens)
    assert spelled.push(token_ids) + spelled.flush() == "fox<|endoftext|>"


def test_a_prompt_may_go_without_the_first_token() -> None:
    tokenizer = ALL["llama-like"]
    with_first = tokenizer.encode("the fox")
    assert tokenizer.encode("the fox", add_special_tokens=False) == with_first[1:]
    assert tokenizer.special_tokens[with_first[0]] == "<s>"


def test_half_a_surrogate_pair_in_a_prompt_is_replaced() -> None:
    for name in ("byte-level", "bytes"):
        assert ALL[name].decode(ALL[name].encode("a\ud83db")) == "a\N{REPLACEMENT CHARACTER}b"


def test_truncation_and_padding_in_the_file_are_not_followed() -> None:
    raw = byte_level_bpe()
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    assert HFTokenizer(raw).encode(TEXTS[0]) == ALL["byte-level"].encode(TEXTS[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama_like_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<s>"},
                "eos_token": "</s>",
                "chat_template": "{{ bos_token }}{% for m in messages %}"
                "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
                "{{ m.role }}: {{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}!{% endif %}",
            }
        )
    )
    return tmp_path


def test_a_folder_gives_ids_of_text_and_of_chat(folder: Path) -> None:
    tokenizer = HFTokenizer.from_folder(folder)
    raw = RAW["llama-like"]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == raw.get_vocab_size()
    assert tokenizer.encode("the fox")[0] == 1
    chat = chat_token_ids(
        tokenizer, [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]
    )
    assert chat == raw.encode("<s>user: the</s>assistant: fox!", add_special_tokens=False).ids
    assert chat.count(1) == 1


def test_a_chat_template_file_goes_before_the_one_in_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    tokenizer = HFTokenizer.from_folder(folder)
    ids = chat_token_ids(tokenizer, [{"role": "user", "content": "fox"}])
    assert tokenizer.decode(ids) == " fox"


def test_generation_config_adds_ends_of_answers(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert HFTokenizer.from_folder(folder).eos_token_ids == (7, 8, 2)


def test_a_template_may_refuse_messages_but_not_reach_python(folder: Path) -> None:
    tokenizer = HFTokenizer.from_folder(folder)
    with pytest.raises(ChatTemplateError, match="no tools"):
        chat_token_ids(tokenizer, [{"role": "tool", "content": "x"}])
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ChatTemplateError, match="unsafe"):
        chat_token_ids(HFTokenizer.from_folder(folder), [{"role": "user", "content": "x"}])


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ChatTemplateError, match="/v1/completions"):
        chat_token_ids(ALL["byte-level"], [{"role": "user", "content": "x"}])


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        HFTokenizer.from_folder(tmp_path)


def test_the_null_backend_speaks_bytes() -> None:
    tokenizer = load_tokenizer(BackendConfig(backend="null"))
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.eos_token_ids == (256,)
    assert tokenizer.decode([104, 105, 256]) == "hi"
    assert tokenizer.decode(chat_token_ids(tokenizer, [{"role": "user", "content": "hi"}])) == (
        "user: hi\nassistant: "
    )
