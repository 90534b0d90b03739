"""What the yardsticks make of `generate()`."""

from __future__ import annotations

import pytest

from tools.engine_drive import Work

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_a_padded_batch_gives_what_each_prompt_gets_alone() -> None:
    from tools.transformers_runs import run_generate, run_padded_generate

    shape = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(shape).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    work = [Work([5 + i, 7, 11][: 1 + i % 3] * (1 + i), 2 + 3 * (i % 4)) for i in range(7)]
    widths: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, given: widths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    padded = run_padded_generate(model, work, batch_size=4)
    # Each batch takes all its rows through as many steps as its longest answer.
    assert [rows for rows, _ in widths] == [4] * 11 + [3] * 8
    assert widths[0][1] == max(len(item.token_ids) for item in work[:4])
    assert padded == run_generate(model, work)
