"""Which arms a comparison has, and in which order each block measures them.

A strategy that keeps finished rows in the batch becomes two arms, one for each value of PAD_FINISHED, unless
its settings name one, or there is a PAD_STYLE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.base import ConfigError, LabError
from adapters.registry import check_backend
from harness.client.server import find_server
from harness.plan.schedule import derive_seed
from harness.replay.arm_file import Arm
from harness.replay.checkout import Checkout
from harness.replay.progress import Reporter
from harness.replay.service_process import ServiceLaunch, running_service
from harness.settings import HarnessSettings
from services.contract.status import ModelCard

_OF_THE_RUN = {*HarnessSettings.model_fields, "host", "port"} - {"backend", "model"}


def is_of_the_run(setting: str) -> bool:
    """What all arms have in common: the load, and what the harness itself tells every service."""
    return setting.lower() in _OF_THE_RUN


def parse_arm(text: str) -> tuple[str, dict[str, str]]:
    """`continuous@MAX_BATCH=8,MODEL=lab-110m` -> the name and its settings.

    Raises:
        ConfigError: it is spelled otherwise, or sets what is no arm's own.
    """
    name, _, listed = text.partition("@")
    settings: dict[str, str] = {}
    for item in filter(None, listed.split(",")):
        setting, equals, value = item.partition("=")
        if not equals or not setting.isidentifier():
            raise ConfigError(f"{text!r}: settings of an arm are written NAME@SETTING=VALUE,SETTING=VALUE")
        if is_of_the_run(setting):
            raise ConfigError(f"{text!r}: {setting.upper()} is the same for all arms, not a setting of one")
        settings[setting.upper()] = value
    if not name:
        raise ConfigError(f"{text!r} names no strategy before its @")
    if backend := settings.get("BACKEND"):
        check_backend(backend)
    return name, settings


def split_names(words: Sequence[str]) -> list[str]:
    """Names may be separated by blanks or commas; a comma after @ separates settings."""
    return [n for word in words for n in ([word] if "@" in word else word.replace(",", " ").split())]


def find_arms(
    words: Sequence[str],
    pad: str,
    settings: HarnessSettings,
    reporter: Reporter,
    source: Checkout | None = None,
) -> list[Arm]:
    """One arm for each variant; one that keeps finished rows has them on, off or both, as `pad` says.

    Each service is started for a moment, without a model, to learn its canonical name and whether it pads. So
    a name, a setting or a value that a service refuses fails before anything is measured.

    Raises:
        ConfigError: there are no names, or one of them is spelled wrong.
        LabError: a service refused its name or its settings, in its own words.
    """
    names = split_names(words)
    if not names:
        raise ConfigError("name at least one strategy to compare")
    asked = [(text, *parse_arm(text)) for text in names]
    arms: dict[str, Arm] = {}
    for text, name, own in asked:
        reporter.announce(f"looking at {text}")
        card = _card_of(text, name, own, settings, source)
        chosen = "".join(f" {setting}={value}" for setting, value in own.items())
        label = f"{card.variant}{chosen}" + (f" at {source.sha[:12]}" if source else "")
        if label in arms or f"{label} PAD_FINISHED=0" in arms:
            raise ConfigError(
                f"{text!r} is there already; to compare an arm with itself, give one of them a setting that "
                "changes nothing, as continuous@MAX_BATCH=16"
            )
        # PAD_STYLE says how finished rows are kept, so that such an arm keeps them.
        keeps_them = "PAD_STYLE" in own or card.strategy.get("pad_style", "lean") != "lean"
        if keeps_them or "PAD_FINISHED" in own or not card.strategy.get("pad_finished"):
            arms[label] = Arm(card.variant, label, own, source)
            continue
        if pad in ("on", "both"):
            arms[label] = Arm(card.variant, label, {**own, "PAD_FINISHED": "1"}, source)
        if pad in ("off", "both"):
            unpadded = f"{label} PAD_FINISHED=0"
            arms[unpadded] = Arm(card.variant, unpadded, {**own, "PAD_FINISHED": "0"}, source)
    return list(arms.values())


def _card_of(
    text: str, name: str, own: Mapping[str, str], settings: HarnessSettings, source: Checkout | None
) -> ModelCard:
    """What a service with these settings says about itself, without a model.

    It has no scheduler beside the lab's, so a wrong SCHEDULING is found when the arm itself starts.
    """
    chosen = {key: value for key, value in own.items() if key != "SCHEDULING"}
    env = {"PAD_FINISHED": "1", "SCHEDULING": "lab"}
    launch = ServiceLaunch(name, env, {**chosen, "BACKEND": "null"}, source=source)
    try:
        with running_service(
            launch, start_timeout_s=settings.start_timeout_s, announce=lambda _: None
        ) as service:
            card = find_server(service.url, settings, service.process.pid).card
    except LabError as error:
        raise LabError(f"{text}: {error}") from error
    assert card is not None, "a service that was started has a card"
    return card


def arm_order(arms: Sequence[Arm], block: int, seed: int) -> list[Arm]:
    """The order of one block: a row of a Williams design over a seeded permutation of the arms.

    Over n blocks (2n for an odd number of arms) every arm stands in every position equally often and
    directly follows every other equally often; two arms give AB BA. Source: Williams (1949).
    """
    keys = [derive_seed(seed, f"arm/{arm.name}") for arm in arms]
    shuffled = [arms[i] for i in sorted(range(len(arms)), key=keys.__getitem__)]
    return [shuffled[i] for i in williams_row(len(arms), block)]


def williams_row(num: int, block: int) -> list[int]:
    # 0, 1, n-1, 2, n-2, ...: neighbours differ by every distance once.
    first = [(i + 1) // 2 if i % 2 else (num - i // 2) % num for i in range(num)]
    row = [(item + block) % num for item in first]
    return row[::-1] if num % 2 and block % (2 * num) >= num else row
