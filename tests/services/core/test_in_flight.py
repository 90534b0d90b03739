"""The load that the requests in flight are."""

from __future__ import annotations

from services.core.in_flight import InFlight
from services.core.metrics import Metrics
from services.engine.messages import SequenceUpdate, StepReport
from tests.services.core.test_outputs import new_request
from tests.services.scripted_engine import last


def test_outstanding_tokens_are_prompts_without_an_answer_and_what_answers_may_still_take() -> None:
    in_flight = InFlight(Metrics("continuous", "null", "null"))
    in_flight.add(new_request(num_prompts=2))
    assert in_flight.outstanding_tokens == 2 * (2 + 128)
    in_flight.update(StepReport([SequenceUpdate(0, [97])]))
    assert in_flight.outstanding_tokens == 127 + 128
    in_flight.update(StepReport([last(0, [98]), last(1, [99])]))
    assert in_flight.outstanding_tokens == 0
