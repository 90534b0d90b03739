"""Which arms a comparison has, and in which order each block measures them.

What enters are names of variants; what leaves are arms with their settings. A strategy that keeps
finished rows becomes two arms, one for each value of PAD_FINISHED. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.base import ConfigError
from harness.arm_file import Arm
from harness.arrivals import derive_seed
from harness.progress import Reporter
from harness.server import find_server
from harness.service_process import ServiceLaunch, running_service
from harness.settings import HarnessSettings


def find_arms(names: Sequence[str], pad: str, settings: HarnessSettings, reporter: Reporter) -> list[Arm]:
    """The arms of these variants: each once, and those that keep finished rows with it on, off or both.

    Starts each service for a moment, without a model, to learn its canonical name and whether it pads;
    a name that does not exist so fails before anything is measured.

    Raises:
        ConfigError: there are no names.
    """
    if not names:
        raise ConfigError("name at least one strategy to compare")
    arms: dict[str, Arm] = {}
    for name in names:
        reporter.announce(f"looking at {name}")
        launch = ServiceLaunch(name, {"BACKEND": "null", "PAD_FINISHED": "1"})
        with running_service(
            launch, start_timeout_s=settings.start_timeout_s, announce=lambda _: None
        ) as service:
            card = find_server(service.url, settings, service.process.pid).card
            assert card is not None, "a service that was started has a card"
        if not card.strategy.get("pad_finished"):
            arms[card.variant] = Arm(card.variant, card.variant)
            continue
        if pad in ("on", "both"):
            arms[card.variant] = Arm(card.variant, card.variant, {"PAD_FINISHED": "1"})
        if pad in ("off", "both"):
            label = f"{card.variant} PAD_FINISHED=0"
            arms[label] = Arm(card.variant, label, {"PAD_FINISHED": "0"})
    return list(arms.values())


def arm_order(arms: Sequence[Arm], block: int, num_blocks: int, seed: int) -> list[Arm]:
    """The order of one block: a seeded permutation, rotated so that positions are spread over blocks."""
    keys = [derive_seed(seed, f"arm/{arm.name}") for arm in arms]
    shuffled = [arms[i] for i in sorted(range(len(arms)), key=keys.__getitem__)]
    shift = block * max(1, len(arms) // num_blocks) % len(arms)
    return shuffled[shift:] + shuffled[:shift]
