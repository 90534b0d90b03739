"""*Results*: runs, comparisons and the nightly trend, from series that `lab history` writes.

A band needs the whole name of its series, so each strategy has its own queries.

The interval of a figure is a band, so that a line that moves inside the band is not taken for a regression.
"""

from __future__ import annotations

from collections.abc import Callable

from services.strategies import VARIANTS
from tools.dashboards.panels import Json, annotation, dashboard, lines, stat, table, target, variable

FIGURES = {
    "throughput_tokens_per_s": ("Throughput", "ops", "Output tokens a second; more is better."),
    "ttft_p50_seconds": ("TTFT p50", "s", "Time to first token as the client sees it, the median."),
    "ttft_p95_seconds": ("TTFT p95", "s", "Time to first token as the client sees it, of the slowest 5%."),
    "tpot_p50_seconds": ("TPOT p50", "s", "Time per output token after the first, the median."),
    "itl_p99_seconds": ("ITL p99", "s", "Gap between tokens, of the slowest 1%."),
}
"""By the name behind `lab_result_`."""
ENDS = {"low": "_low", "high": "_high"}
_WHERE = 'backend="$backend",model="$model",load="$load"'
_CHOSEN = f'strategy=~"$strategy",{_WHERE}'
_BY = "strategy, backend, model, load"
_WHO = "{{strategy}} {{backend}} {{model}} {{load}}"


def _trend(name: str) -> Json:
    title, unit, words = FIGURES[name]

    def over(strategy: str, suffix: str) -> str:
        series = f'lab_result_{name}{suffix}{{strategy="{strategy}",{_CHOSEN}}}'
        return f"avg by ({_BY}) (last_over_time({series}[$__interval]))"

    about = f"{words} The band is the 95% interval of a run."
    return lines(title, about, unit, _with_ends(over), bands=list(VARIANTS))


def _with_ends(over: Callable[[str, str], str]) -> list[Json]:
    """For each strategy its line and the two ends of its band."""
    ends = {"": "", **ENDS}
    return [
        target(over(strategy, suffix), f"{strategy} {end}".strip())
        for strategy in VARIANTS
        for end, suffix in ends.items()
    ]


def _latest(name: str, legend: str) -> Json:
    series = f"lab_result_{name}{{{_CHOSEN}}}"
    return target(f"last_over_time({series}[$__range])", legend)


def _chain() -> Json:
    def over(strategy: str, suffix: str) -> str:
        series = f'lab_chained_ratio{suffix}{{strategy="{strategy}",{_CHOSEN},metric="$metric"}}'
        return f"avg by ({_BY}) (last_over_time({series}[$__interval]))"

    about = (
        "Ratios of commits measured in turns, chained; the oldest commit is 1. What a machine does from "
        "night to night is in none of them. The band is the interval of a night's own ratio."
    )
    return lines("Commits, chained", about, "none", _with_ends(over), bands=list(VARIANTS))


def _comparison() -> list[Json]:
    chosen = f'{_WHERE},metric="$metric"'

    def over(arm: str, suffix: str) -> str:
        series = f'lab_comparison_ratio{suffix}{{arm="{arm}",{chosen}}}'
        return f"avg by (arm, against) (last_over_time({series}[$__interval]))"

    about = "Ratio of an arm to the one it is held against; 1 is no difference. The band is its interval."
    latest = f"last_over_time(lab_comparison_ratio{{{chosen}}}[$__range])"
    return [
        lines("Comparisons", about, "none", _with_ends(over), bands=list(VARIANTS)),
        table("Latest ratios", about, "none", [target(latest, "")]),
    ]


_INVALID = f"lab_result_valid{{{_CHOSEN}}} == 0"
_CAUTION = f"lab_result_valid{{{_CHOSEN}}} == 0.5"

RESULTS = dashboard(
    "batching-lab-results",
    "Batching lab: results",
    "Measured runs, comparisons with their intervals, and the nightly trend.",
    {
        "Nightly trend": [_chain(), *(_trend(name) for name in FIGURES)],
        "Comparisons": _comparison(),
        "Runs": [
            table("Runs", "Throughput of every run.", "ops", [_latest("throughput_tokens_per_s", "")]),
            stat(
                "Validity",
                "Of the latest run: 1 VALID, 0.5 CAUTION, 0 INVALID.",
                "none",
                [target(f"min by ({_BY}) (last_over_time(lab_result_valid{{{_CHOSEN}}}[$__range]))", _WHO)],
                {0: "red", 0.5: "orange", 1: "green"},
            ),
        ],
    },
    [
        variable("strategy", "Strategy", "label_values(lab_result_valid, strategy)"),
        variable("backend", "Backend", "label_values(lab_result_valid, backend)", one=True),
        variable("model", "Model", "label_values(lab_result_valid, model)", one=True),
        variable("load", "Load", "label_values(lab_result_valid, load)", one=True),
        variable("metric", "Metric", "label_values(lab_comparison_ratio, metric)", one=True),
    ],
    [
        annotation("INVALID", _INVALID, "INVALID: {{strategy}} {{commit}}", "red"),
        annotation("CAUTION", _CAUTION, "CAUTION: {{strategy}} {{commit}}", "orange"),
    ],
    since="now-90d",
)
