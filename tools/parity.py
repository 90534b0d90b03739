"""`lab parity`: how far two backends with the same weights are apart, in logits and in greedy tokens.

torch in fp32 answers greedily. llama.cpp with an fp32 GGUF file answers too, and is then fed torch's own
tokens, so that logits can be compared at every position even after the answers have parted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import Backend, BackendConfig, SamplingParams, ScheduledChunk, Sequence
from adapters.llama_cpp_backend.backend import LlamaCppBackend
from adapters.registry import load_tokenizer
from adapters.torch_backend.backend import TorchBackend
from harness.plan.corpus import default_path, load_corpus

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Parity:
    """`smallest_margin` is the least lead that a best logit has over the next."""

    num_prompts: int
    num_same: int
    num_positions: int
    num_same_positions: int
    """Positions where both backends, given the same tokens before, choose the same next one."""
    max_difference: float
    smallest_margin: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=os.environ.get("MODEL", "lab-26m"), help="preset or local folder")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the corpus (default 64)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer (default 32)")
    parser.add_argument("--threads", type=int, default=1, help="engine threads (default 1)")
    parser.add_argument("--artifacts-dir", default=os.environ.get("ARTIFACTS_DIR", "artifacts"))


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    limits: dict[str, Any] = {
        "num_threads": args.threads,
        "max_batch_size": 1,
        "artifacts_dir": args.artifacts_dir,
        "max_step_tokens": 4096,
    }
    texts = [item.prompt for item in load_corpus(default_path()).prompts[: args.prompts]]
    tokenizer = load_tokenizer(BackendConfig(model=args.model, artifacts_dir=args.artifacts_dir))
    prompts = [tokenizer.encode(text) for text in texts if isinstance(text, str)]
    parity = measure(
        TorchBackend(BackendConfig(model=args.model, dtype="fp32", device="cpu", **limits)),
        LlamaCppBackend(
            BackendConfig(backend="llama_cpp", model=args.model, dtype="f32", device="cpu", **limits)
        ),
        prompts,
        args.tokens,
    )
    print(
        f"{args.model}: torch fp32 against llama.cpp f32, {args.threads} thread(s), {args.tokens} tokens each"
    )
    print(f"  same greedy answer: {parity.num_same} of {parity.num_prompts} prompts")
    print(
        f"  same choice after the same tokens: {parity.num_same_positions} of {parity.num_positions} places"
    )
    print(f"  largest logit difference: {parity.max_difference:.2e}")
    print(f"  smallest lead of a best logit over the next: {parity.smallest_margin:.2e}")
    return 0


def measure(
    torch_backend: TorchBackend, llama_backend: LlamaCppBackend, prompts: list[list[int]], num_tokens: int
) -> Parity:
    """Let both answer; then compare logits position by position along torch's answers."""
    num_same = num_positions = num_same_positions = 0
    max_difference, margin = 0.0, float("inf")
    kept: list[Logits] = []

    def keep(logits: Any) -> None:
        kept[:] = [logits[0].float().numpy()]

    def llama_logits() -> Logits:
        logits: Logits = llama_backend.logits(1)[0]
        return logits

    torch_backend.on_logits = keep
    for number, prompt in enumerate(prompts):
        want = _answer(torch_backend, number, prompt, num_tokens, lambda: kept[0])
        torch_tokens = [token for token, _ in want]
        got = _answer(llama_backend, number, prompt, num_tokens, llama_logits)
        forced = _answer(llama_backend, number, prompt, num_tokens, llama_logits, force=torch_tokens)
        num_same += torch_tokens == [token for token, _ in got]
        for (_, ours), (_, theirs) in zip(want, forced, strict=True):
            num_positions += 1
            num_same_positions += int(ours.argmax()) == int(theirs.argmax())
            max_difference = max(max_difference, float(np.abs(ours - theirs).max()))
            second, first = np.partition(ours, -2)[-2:]
            margin = min(margin, float(first - second))
    torch_backend.on_logits = None
    return Parity(len(prompts), num_same, num_positions, num_same_positions, max_difference, margin)


def _answer(
    backend: Backend,
    seq_id: int,
    prompt: list[int],
    num_tokens: int,
    logits: Callable[[], Logits],
    force: list[int] | None = None,
) -> list[tuple[int, Logits]]:
    """The greedy tokens and the logits behind each; with `force` these tokens are fed instead of its own."""
    seq = Sequence(seq_id, prompt, SamplingParams(max_tokens=num_tokens))
    steps: list[tuple[int, Logits]] = []
    for index in range(num_tokens):
        start = seq.num_computed_tokens
        (output,) = backend.step([ScheduledChunk(seq, start, seq.num_tokens - start)])
        steps.append((output.token_ids[0], logits().copy()))
        seq.num_computed_tokens = seq.num_tokens
        seq.output_token_ids.append(output.token_ids[0] if force is None else force[index])
    backend.release([seq_id])
    return steps
