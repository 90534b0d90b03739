"""The corpus: the same bytes each time, the lengths it promises, and the guard against drift."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapters.base import ConfigError
from adapters.models.preset_tokenizer import write_tokenizer
from adapters.models.presets import PRESETS
from adapters.text.tokenizer import HFTokenizer
from tools import make_prompts
from tools.corpus.instructions import KINDS as instruction_kinds
from tools.corpus.lengths import BLOCK, OUTPUT_TOKENS, PROMPT_TOKENS, Draws, LogNormal, stratified_lengths
from tools.corpus.texts import KINDS, estimated_tokens, write_prompt
from tools.make_prompts import CORPUS_PATH, Prompt, check_corpus, to_jsonl, write_corpus


@pytest.fixture(scope="module")
def corpus() -> list[Prompt]:
    return make_prompts.make_prompts()


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    make_prompts.add_arguments(parser)
    return make_prompts.run(parser.parse_args(argv))


def test_the_recorded_corpus_is_what_the_generator_writes(corpus: list[Prompt]) -> None:
    assert check_corpus(CORPUS_PATH, to_jsonl(corpus)) is None


def test_the_recorded_instructions_are_what_the_generator_writes() -> None:
    instructions = make_prompts.make_instructions()
    assert check_corpus(CORPUS_PATH.with_stem("instructions"), to_jsonl(instructions)) is None
    assert len({(prompt.earlier, prompt.prompt) for prompt in instructions}) == len(instructions)
    assert {len(prompt.earlier) for prompt in instructions} == {0, 2, 4}
    texts = [text for prompt in instructions for _, text in (*prompt.earlier, ("user", prompt.prompt))]
    assert not any("{" in text.split("```")[0] for text in texts)
    assert all(prompt.chat for prompt in instructions)
    assert {prompt.category for prompt in instructions[:64]} == set(instruction_kinds)
    assert make_prompts.make_instructions(70) == instructions[:70]


def test_the_check_covers_both_corpora(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--check") == 0
    told = capsys.readouterr().err
    assert "prompts.jsonl is what" in told
    assert "instructions.jsonl is what" in told
    monkeypatch.setattr(make_prompts, "MAX_TOKENS", 7)
    assert run("--check") == 1
    assert "instructions.jsonl is not what the generator writes (line 1 differs)" in capsys.readouterr().err


def test_draws_are_those_of_sha256_in_counter_mode() -> None:
    """Golden values: another Python, library or machine must give the same."""
    draws = Draws(0, "golden")
    assert [draws.below(1000) for _ in range(5)] == [190, 22, 133, 181, 239]
    assert Draws(0, "golden").shuffled("abcdef") == ["f", "c", "d", "e", "a", "b"]


def test_lengths_are_heavy_tailed_and_of_the_promised_size(corpus: list[Prompt]) -> None:
    outputs = [prompt.max_tokens for prompt in corpus]
    mean = statistics.mean(outputs)
    assert 76 <= mean <= 84
    assert statistics.quantiles(outputs, n=100)[98] >= 4 * mean
    assert min(outputs) >= OUTPUT_TOKENS.least
    assert max(outputs) == OUTPUT_TOKENS.most == 512


@pytest.fixture(scope="module")
def prompt_lengths(corpus: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """In tokens of the default model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [prompt.prompt for prompt in corpus]
    write_tokenizer(texts, PRESETS["lab-26m"].vocab_size, folder)
    tokenizer = HFTokenizer.from_folder(folder)
    return [len(tokenizer.encode(text)) for text in texts]


def test_the_readme_tells_what_came_out(corpus: list[Prompt], prompt_lengths: list[int]) -> None:
    readme = CORPUS_PATH.with_name("README.md").read_text("utf-8")
    for name, lengths in (
        ("prompt tokens", prompt_lengths),
        ("output tokens", [prompt.max_tokens for prompt in corpus]),
    ):
        for part, some in (("all 500", lengths), ("first 64", lengths[:BLOCK])):
            p50, p95, p99 = np.quantile(some, [0.5, 0.95, 0.99])
            row = f"{np.mean(some):.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f} | {max(some)} | {sum(some):,}"
            assert f"| {name}, {part} | {row} |" in readme


def test_prompts_have_the_promised_size(prompt_lengths: list[int]) -> None:
    lengths = prompt_lengths
    assert 57 <= statistics.mean(lengths) <= 63
    assert 57 <= statistics.mean(lengths[:BLOCK]) <= 63
    assert statistics.quantiles(lengths, n=100)[98] > 4 * statistics.mean(lengths)
    assert max(lengths) <= 512


@pytest.mark.parametrize("seed", range(5))
def test_every_block_of_64_carries_the_same_load(seed: int) -> None:
    lengths = stratified_lengths(OUTPUT_TOKENS, 8 * BLOCK, Draws(seed, "x"))
    blocks = [lengths[start : start + BLOCK] for start in range(0, len(lengths), BLOCK)]
    for block in blocks:
        assert sum(block) == pytest.approx(BLOCK * OUTPUT_TOKENS.mean, rel=0.06)
        assert max(block) > 4 * OUTPUT_TOKENS.mean
    assert len({tuple(sorted(block)) for block in blocks}) == len(blocks)


def test_many_blocks_together_follow_the_distribution() -> None:
    lengths = sorted(stratified_lengths(PROMPT_TOKENS, 8 * BLOCK, Draws(1, "x")))
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95):
        assert lengths[round(share * len(lengths))] == pytest.approx(
            PROMPT_TOKENS.quantile(share), rel=0.06, abs=1
        )


def test_long_answers_stand_anywhere_in_a_block() -> None:
    """Otherwise the end of a run would be its slowest part by construction."""
    places = []
    for seed in range(40):
        block = stratified_lengths(OUTPUT_TOKENS, BLOCK, Draws(seed, "x"))
        places.append(block.index(max(block)))
    assert 20 < statistics.mean(places) < 44
    assert min(places) < 8
    assert max(places) >= BLOCK - 8


def test_a_log_normal_has_the_mean_and_spread_it_was_given() -> None:
    wide = LogNormal(mean=100, sigma=0.5, least=1, most=10**6)
    lengths = [wide.quantile((i + 0.5) / 4000) for i in range(4000)]
    assert statistics.mean(lengths) == pytest.approx(100, rel=0.01)
    assert wide.quantile(0.8413) / wide.quantile(0.5) == pytest.approx(1.6487, rel=0.01)


def test_a_longer_corpus_starts_with_the_shorter_one(corpus: list[Prompt]) -> None:
    assert make_prompts.make_prompts(70) == corpus[:70]
    assert make_prompts.make_prompts(70, seed=1) != corpus[:70]


def test_prompts_are_distinct_and_of_every_kind(corpus: list[Prompt]) -> None:
    texts = [prompt.prompt for prompt in corpus]
    assert len(set(texts)) == len(texts)
    assert {prompt.category for prompt in corpus} == {kind.category for kind in KINDS}
    assert {prompt.category for prompt in corpus[:BLOCK]} == {kind.category for kind in KINDS}
    assert len({prompt.id for prompt in corpus}) == len(corpus)
    assert not any("{" in text and "}" in text and "\n" not in text for text in texts)  # a slot left open


def test_few_prompts_share_a_long_beginning(corpus: list[Prompt]) -> None:
    """A prefix cache would otherwise measure the corpus instead of the batching."""
    beginnings = [prompt.prompt[:120] for prompt in corpus if len(prompt.prompt) >= 120]
    assert len(beginnings) > 250
    assert len(set(beginnings)) >= 0.98 * len(beginnings)


def test_texts_come_out_about_as_long_as_asked() -> None:
    for wanted in (8, 20, 60, 150, 400):
        texts = [write_prompt(wanted, Draws("length", wanted, i))[1] for i in range(10)]
        assert statistics.mean(map(estimated_tokens, texts)) == pytest.approx(wanted, rel=0.08, abs=1.5)


def test_very_many_short_prompts_stay_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    """When short ones run out, the text grows instead of the search going on for ever."""
    monkeypatch.setattr(make_prompts, "write_prompt", lambda wanted, draws: ("question", "x" * wanted))
    prompts = make_prompts.make_prompts(40)
    assert len({prompt.prompt for prompt in prompts}) == 40


def test_each_line_has_the_four_fields(tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    assert run("--n", "3", "--seed", "7", "--out", str(out)) == 0
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [list(line) for line in lines] == [["id", "prompt", "max_tokens", "category"]] * 3
    assert (tmp_path / "mine.sha256").read_text().split()[1] == "mine.jsonl"
    assert run("--n", "3", "--seed", "7", "--out", str(out), "--check") == 0
    assert run("--n", "3", "--seed", "8", "--out", str(out), "--check") == 1


def test_drift_is_named(tmp_path: Path) -> None:
    content = to_jsonl(make_prompts.make_prompts(5))
    path = tmp_path / "prompts.jsonl"
    assert "is missing" in str(check_corpus(path, content))
    write_corpus(path, content)
    assert check_corpus(path, content) is None
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"p00002", b"p99999"), *lines[3:]]))
    assert "line 3 differs" in str(check_corpus(path, content))
    path.write_bytes(b"".join(lines[:4]))
    assert "number of lines" in str(check_corpus(path, content))
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text("0  prompts.jsonl\n")
    assert "does not hold the digest" in str(check_corpus(path, content))


def test_a_language_model_can_extend_the_prompts(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tmp_path / "model"
    model.mkdir()
    write_tokenizer(["a few words to learn from"], 300, model)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=0,
        )
    ).save_pretrained(model)
    out = tmp_path / "long.jsonl"
    assert run("--n", "2", "--out", str(out), "--extend-with", str(model), "--extend-tokens", "24") == 0
    originals = make_prompts.make_prompts(2)
    for line, original in zip(out.read_text("utf-8").splitlines(), originals, strict=True):
        extended = json.loads(line)
        assert extended["prompt"].startswith(original.prompt)
        assert len(extended["prompt"]) > len(original.prompt)
        assert extended["max_tokens"] == original.max_tokens


def test_an_extended_corpus_does_not_replace_the_recorded_one() -> None:
    with pytest.raises(ConfigError, match="--out"):
        run("--extend-with", "lab-26m")


def test_the_file_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, make_prompts.__file__, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
