"""Seeds on a CPU: takes back what vLLM draws for a piece of a prompt.

vLLM draws a token for every row of a step and throws away that of a prompt that is not whole yet. Then it
winds the request's generator back, which a generator of a CPU cannot do: the step fails, and the engine with
it. No token of such a request was kept, so its generator starts from the seed again. (A request that vLLM
itself preempted has some; it goes on otherwise than without the preemption.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from adapters.base import BackendError


class _StartingAgain(CPUModelRunner):  # type: ignore[misc]
    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        batch: Any = self.input_batch
        generators = batch.generators
        for row in np.nonzero(self.discard_request_mask.np[: batch.num_reqs])[0]:
            if (generator := generators.get(int(row))) is not None:
                generator.manual_seed(generator.initial_seed())
        batch.generators = {}  # nothing is left for vLLM to wind back
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            batch.generators = generators


def take_back_draws(engine: Any) -> None:
    """Of an `LLMEngine` whose worker runs in this process.

    Raises:
        BackendError: its worker is not the one that is known here.
    """
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    if type(runner) is not CPUModelRunner:
        raise BackendError(
            f"vLLM computes with {type(runner).__name__}, whose seeds BACKEND=vllm does not know: install "
            "the version of vLLM that adapters/vllm_backend/pyproject.toml names"
        )
    runner.__class__ = _StartingAgain
