"""`lab prompts`: writes the corpora, byte for byte the same on every machine for the same count and seed.

There are two: `prompts`, whose budgets are the lengths of its answers, and `instructions`, for models that
end their answers themselves. The harness checks the digest beside a corpus before a run.
`--extend-with` lets a language model lengthen the prompts. What a model writes depends on the machine, so
such a corpus needs a file of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path

from adapters.base import ConfigError, LabError
from adapters.data_files import DATA
from harness.results.output_dir import whole_file
from services.engine.messages import StepReport
from tools.corpus.instructions import MAX_TOKENS, write_instruction
from tools.corpus.lengths import OUTPUT_TOKENS, PROMPT_TOKENS, Draws, stratified_lengths
from tools.corpus.texts import write_prompt

CORPUS_PATH = DATA / "prompts.jsonl"
DEFAULT_NUM = 500
NUM_INSTRUCTIONS = 256
DEFAULT_SEED = 0
_MAX_ATTEMPTS = 1000


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the corpus. `max_tokens` is the budget of the answer."""

    id: str
    prompt: str
    max_tokens: int
    category: str
    chat: bool = False
    """The prompt is the message of a user."""
    earlier: tuple[tuple[str, str], ...] = ()
    """Roles and texts of the turns before the prompt."""


def make_instructions(num: int = NUM_INSTRUCTIONS, seed: int = DEFAULT_SEED) -> list[Prompt]:
    """The second corpus. No two messages are equal, and a longer corpus starts with the shorter one."""
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for index in range(num):
        draws = Draws(seed, "instructions", index)
        for _ in range(_MAX_ATTEMPTS):
            category, turns = write_instruction(draws)
            if (text := "\n".join(turns)) not in seen:
                break
        else:
            raise ConfigError(f"there are no {num} different instructions; lower --n")
        seen.add(text)
        earlier = tuple(zip(cycle(("user", "assistant")), turns[:-1], strict=False))
        prompts.append(Prompt(f"i{index:05d}", turns[-1], MAX_TOKENS, category, chat=True, earlier=earlier))
    return prompts


def make_prompts(num: int = DEFAULT_NUM, seed: int = DEFAULT_SEED) -> list[Prompt]:
    """The corpus. No two prompts are equal, and a longer corpus starts with the shorter one."""
    prompt_lengths = stratified_lengths(PROMPT_TOKENS, num, Draws(seed, "prompt tokens"))
    output_lengths = stratified_lengths(OUTPUT_TOKENS, num, Draws(seed, "output tokens"))
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for index, (wanted, max_tokens) in enumerate(zip(prompt_lengths, output_lengths, strict=True)):
        draws = Draws(seed, "text", index)
        for attempt in count():
            # A very large corpus uses up the short texts, so later attempts ask for longer ones.
            category, text = write_prompt(min(wanted + attempt // 10, PROMPT_TOKENS.most), draws)
            if text not in seen:
                break
        seen.add(text)
        prompts.append(Prompt(f"p{index:05d}", text, max_tokens, category))
    return prompts


def to_jsonl(prompts: list[Prompt]) -> bytes:
    return "".join(json.dumps(_fields(prompt), ensure_ascii=False) + "\n" for prompt in prompts).encode()


def _fields(prompt: Prompt) -> dict[str, object]:
    """A chat of several turns has `messages` instead of `prompt`; `chat` stands only where it is true."""
    fields = {"id": prompt.id, "prompt": prompt.prompt, "max_tokens": prompt.max_tokens}
    fields["category"] = prompt.category
    if prompt.earlier:
        del fields["prompt"]
        turns = (*prompt.earlier, ("user", prompt.prompt))
        return fields | {"messages": [{"role": role, "content": content} for role, content in turns]}
    return fields | ({"chat": True} if prompt.chat else {})


def write_corpus(path: Path, content: bytes) -> str:
    """Write the corpus and its digest file; return the digest."""
    digest = hashlib.sha256(content).hexdigest()
    for written, what in ((path, content), (path.with_suffix(".sha256"), _digest_line(path, digest))):
        with whole_file(written) as file:
            file.write(what)
    return digest


def check_corpus(path: Path, content: bytes) -> str | None:
    """What is wrong with the files on disk, or None when they are what the generator writes."""
    remake = f"run `lab prompts --out {path}` or restore the file"
    if not path.is_file():
        return f"{path} is missing; {remake}."
    on_disk = path.read_bytes()
    if on_disk != content:
        pairs = enumerate(zip(on_disk.splitlines(), content.splitlines(), strict=False), 1)
        first = next((number for number, (old, new) in pairs if old != new), None)
        where = f"line {first} differs" if first else "the number of lines differs"
        return f"{path} is not what the generator writes ({where}); {remake}."
    sums = path.with_suffix(".sha256")
    expected = _digest_line(path, hashlib.sha256(content).hexdigest())
    if not sums.is_file() or sums.read_bytes() != expected:
        return f"{sums} does not hold the digest of {path.name}; {remake}."
    return None


def _digest_line(path: Path, digest: str) -> bytes:
    return f"{digest}  {path.name}\n".encode()


def extend_prompts(
    prompts: list[Prompt], model: str, artifacts_dir: str, num_tokens: int, seed: int
) -> list[Prompt]:
    """Let a causal language model go on with each prompt for up to `num_tokens`, sampled from `seed`.

    The lab's own engine batches them. What is added ends with a whole character.
    """
    from adapters.base import BackendConfig
    from adapters.registry import create_backend, load_tokenizer
    from adapters.sampling import mix64
    from tools.engine_drive import Work, drive

    config = BackendConfig(model=model, artifacts_dir=artifacts_dir)
    tokenizer = load_tokenizer(config)
    backend = create_backend(config)
    streams = [tokenizer.stream() for _ in prompts]
    texts = [prompt.prompt for prompt in prompts]
    num_done = 0

    def publish(report: StepReport) -> None:
        nonlocal num_done
        for update in report.updates:
            texts[update.seq_id] += streams[update.seq_id].push(update.token_ids)
            if update.finish_reason == "error":
                raise LabError(f"{model} cannot extend {prompts[update.seq_id].id}: {update.error}")
            num_done += update.finish_reason is not None
        print(f"\rextended {num_done} of {len(prompts)} prompts", end="", file=sys.stderr, flush=True)

    work = [
        Work(ids, num_tokens, ignore_eos=False, temperature=1.0, seed=mix64(seed << 32 | number) >> 1)
        for number, ids in enumerate(tokenizer.encode_batch(texts))
    ]
    drive(backend, "continuous", work, publish=publish)
    print(file=sys.stderr)
    return [replace(prompt, prompt=text) for prompt, text in zip(prompts, texts, strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        choices=_CORPORA,
        help="which one (default: prompts; without --out both, each into its own file)",
    )
    parser.add_argument(
        "--n", type=positive, help=f"number of prompts ({DEFAULT_NUM}; {NUM_INSTRUCTIONS} instructions)"
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="another seed is another corpus")
    parser.add_argument("--out", type=Path, help="file to write (data/CORPUS.jsonl)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file differs")
    extend = parser.add_argument_group("extension by a language model")
    extend.add_argument("--extend-with", metavar="MODEL", help="a preset, a local folder or a hub id")
    extend.add_argument("--extend-tokens", type=positive, default=32, help="most tokens added (%(default)s)")
    extend.add_argument("--artifacts-dir", default="artifacts", help="where models are kept (%(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.extend_with and (args.check or args.out is None or args.out.parent.resolve() == DATA):
        raise ConfigError(
            "an extended corpus differs from machine to machine; give it a file of its own with --out, "
            "and do not --check it"
        )
    both = args.corpus is None and args.out is None
    names = list(_CORPORA) if both else [args.corpus or "prompts"]
    return max(_write(name, args.out or CORPUS_PATH.with_stem(name), args) for name in names)


def _write(name: str, out: Path, args: argparse.Namespace) -> int:
    make, num = _CORPORA[name]
    prompts = make(args.n or num, args.seed)
    if args.extend_with:
        prompts = extend_prompts(prompts, args.extend_with, args.artifacts_dir, args.extend_tokens, args.seed)
    content = to_jsonl(prompts)
    if args.check:
        problem = check_corpus(out, content)
        told = f"lab prompts: {problem}" if problem else f"{out} is what the generator writes."
        print(told, file=sys.stderr)
        return 1 if problem else 0
    digest = write_corpus(out, content)
    print(f"{out}: {len(prompts)} prompts, {sum(p.max_tokens for p in prompts)} output tokens at most")
    print(f"sha256 {digest}")
    return 0


_CORPORA: dict[str, tuple[Callable[[int, int], list[Prompt]], int]] = {
    "prompts": (make_prompts, DEFAULT_NUM),
    "instructions": (make_instructions, NUM_INSTRUCTIONS),
}
"""What makes each corpus, and how many lines it has."""


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    from tools.cli import main

    raise SystemExit(main(["prompts", *sys.argv[1:]]))
