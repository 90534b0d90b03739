"""Numbers in front of prompts: who gets them, and what stays as it was."""

from __future__ import annotations

from harness.plan.corpus import Prompt
from harness.plan.salt import choose_salt, with_salted_prompts
from harness.plan.schedule import Arrivals, Load, Schedule, make_schedule
from harness.settings import HarnessSettings
from services.contract.requests import ChatMessage


def schedule(*prompts: str | tuple[int, ...]) -> Schedule:
    made = [Prompt(id=f"p{i}", prompt=prompt, max_tokens=1) for i, prompt in enumerate(prompts)]
    return make_schedule(made, 4, Load(Arrivals.CLOSED, concurrency=2), 1)


def test_only_foreign_servers_get_a_salt_unless_one_is_given() -> None:
    plain = HarnessSettings()
    assert choose_salt(plain, is_foreign=False) is None
    salts = {choose_salt(plain, is_foreign=True) for _ in range(3)}
    assert len(salts) == 3
    assert choose_salt(plain.model_copy(update={"salt": "0"}), is_foreign=True) is None
    assert choose_salt(plain.model_copy(update={"salt": "x"}), is_foreign=False) == "x"


def test_shards_share_their_salt() -> None:
    shards = [HarnessSettings().model_copy(update={"shard": f"{i}/2", "start_at": 7.5}) for i in range(2)]
    assert {choose_salt(shard, is_foreign=True) for shard in shards} == {"7.500"}
    late = HarnessSettings().model_copy(update={"shard": "0/2"})
    assert choose_salt(late, is_foreign=True) is None
    plan = schedule("a").salted("7.500")
    assert plan.part(0, 2).digest == plan.part(1, 2).digest == plan.digest
    assert len({plan.part_digest, plan.part(0, 2).part_digest, plan.part(1, 2).part_digest}) == 3


def test_every_request_of_every_repeat_begins_otherwise() -> None:
    plan = schedule("a", "b").salted("s")
    sent = [r.prompt for repeat in range(3) for r in with_salted_prompts(plan, repeat).requests]
    # The corpus of two prompts is sent twice in each repeat.
    assert len(set(sent)) == 12
    assert {str(prompt)[9:] for prompt in sent} == {" a", " b"}
    again = [r.prompt for r in with_salted_prompts(schedule("a", "b").salted("s"), 0).requests]
    assert again == sent[:4]
    assert plan.digest != schedule("a", "b").digest == plan.unsalted_digest
    assert schedule("a").salted(None) == schedule("a")
    assert with_salted_prompts(schedule("a"), 1) == schedule("a")


def test_prompts_of_token_ids_keep_their_length() -> None:
    long, short = tuple(range(32, 64)), (40, 41)
    sent = [r.prompt for r in with_salted_prompts(schedule(long, short).salted("s"), 0).requests]
    assert [len(prompt) for prompt in sent] == [32, 2, 32, 2]
    assert sent[0] != sent[2] != long
    assert sent[0][8:] == long[8:]


def test_the_first_turn_of_a_chat_has_the_number() -> None:
    turns = [ChatMessage(role=role, content=role) for role in ("system", "user")]
    chat = Prompt(id="c", messages=tuple(turns), max_tokens=1)
    plan = make_schedule([chat], 4, Load(Arrivals.CLOSED, concurrency=2), 1).salted("s")
    sent = [r.messages for repeat in range(2) for r in with_salted_prompts(plan, repeat).requests]
    assert len({first.content for first, _ in sent}) == 8
    assert {(first.role, first.content[9:], last.content) for first, last in sent} == {
        ("system", " system", "user")
    }
