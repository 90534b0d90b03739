"""The tokenizer of a Hugging Face folder in the words of GGUF.

Two families are known: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-like BPE with byte fallback
(Llama 2).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf

from adapters.base import UnsupportedModel

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PRE_TOKENIZERS = {
    _WORDS + r"|\p{N}{1,3}" + _TAIL: "llama-bpe",
    _WORDS + r"|\p{N}" + _TAIL: "qwen2",
}
"""The patterns that cut text into words, and what llama.cpp calls them."""

_UNUSED = "[unused{}]"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def add_vocab(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of `folder`; ids beyond its own up to `vocab_size` become unused tokens.

    Raises:
        UnsupportedModel: it is of neither family.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(f"{folder} has no tokenizer.json, which the export to GGUF reads")
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModel(f"a {model.get('type')} tokenizer is not exported to GGUF; BPE ones are")
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    by_id = {i: text for text, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [by_id.get(i, _UNUSED.format(i)) for i in range(vocab_size)]
    byte_level = not model.get("byte_fallback")
    kinds = [_kind(i, by_id, added, byte_level) for i in range(vocab_size)]
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(content.get("pre_tokenizer")))
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, vocab_size))
        writer.add_add_space_prefix(_adds_space(content))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, n_vocab=vocab_size)
    special.add_to_gguf(writer, quiet=True)
    if "bos" not in special.add_special_token:
        writer.add_add_bos_token(_post_processor_adds(content, special.special_token_ids.get("bos"), tokens))


def _kind(i: int, by_id: dict[int, str], added: dict[int, dict[str, Any]], byte_level: bool) -> int:
    if i not in by_id:
        kind = gguf.TokenType.UNUSED
    elif i in added:
        is_special = added[i].get("special")
        kind = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
        if by_id[i] == "<unk>":
            kind = gguf.TokenType.UNKNOWN
    elif not byte_level and _BYTE_TOKEN.fullmatch(by_id[i]):
        kind = gguf.TokenType.BYTE
    else:
        kind = gguf.TokenType.NORMAL
    return int(kind)


def _pre_tokenizer(state: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way in which text is cut into words."""
    steps = [] if state is None else state["pretokenizers"] if state["type"] == "Sequence" else [state]
    digits_alone = False
    for step in steps:
        digits_alone |= step["type"] == "Digits" and step.get("individual_digits", False)
        if step["type"] == "ByteLevel" and step.get("use_regex", True):
            return "smollm" if digits_alone else "gpt-2"
        if step["type"] == "Split":
            name = _PRE_TOKENIZERS.get(step["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise UnsupportedModel(
        "the tokenizer cuts text into words in a way that the export to GGUF does not know; "
        "give MODEL a .gguf file made by llama.cpp's own converter"
    )


def _scores(model: dict[str, Any], vocab_size: int) -> list[float]:
    """llama.cpp merges the pair with the best score first, so a score is the negative rank of the merge."""
    scores = [-1000.0] * vocab_size
    rank = 0
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token_id = model["vocab"][left + right]
        if scores[token_id] == -1000.0:
            scores[token_id] = -float(rank)
            rank += 1
    return scores


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a space is put before the first word."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text


def _post_processor_adds(content: dict[str, Any], bos: int | None, tokens: list[str]) -> bool:
    """Whether a prompt starts with the model's first token."""
    return bos is not None and json.dumps(tokens[bos]) in json.dumps(content.get("post_processor"))
