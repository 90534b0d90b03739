"""*Results*: runs, comparisons and the nightly trend, from series that `lab history` writes.

A band needs the whole name of its series, so each strategy has its own queries. The arms of other names share
theirs, and the ends of their intervals are dashed lines.

The interval of a figure is a band, so that a line that moves inside the band is not taken for a regression.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.history.series import GROUP
from services.strategies import VARIANTS
from tools.dashboards.panels import Json, annotation, dashboard, lines, stat, table, target, variable

FIGURES = {
    "throughput_tokens_per_s": ("Throughput", "ops", "Output tokens a second; more is better."),
    "ttft_p50_seconds": ("TTFT p50", "s", "Time to first token as the client sees it, the median."),
    "ttft_p95_seconds": ("TTFT p95", "s", "Time to first token as the client sees it, of the slowest 5%."),
    "tpot_p50_seconds": ("TPOT p50", "s", "Time per output token after the first, the median."),
    "itl_p99_seconds": ("ITL p99", "s", "Gap between tokens, of the slowest 1%; few requests have none."),
}
"""By the name behind `lab_result_`."""
_VALID = "lab_result_valid"
ENDS = {"low": "_low", "high": "_high"}
_WHERE = 'backend="$backend",model="$model",load="$load"'
_CHOSEN = f'strategy=~"$strategy",{_WHERE}'
_MEASURED = f'{_CHOSEN},machine="$machine"'
"""Of one machine: another one's figures are no change of the code. Ratios hold across machines."""
_BY = "strategy, backend, model, load"
_WHO = "{{strategy}} {{backend}} {{model}} {{load}}"


def _trend(name: str) -> Json:
    title, unit, words = FIGURES[name]

    def over(arm: str, suffix: str) -> str:
        series = f"lab_result_{name}{suffix}{{{arm},{_MEASURED}}}"
        return f"avg by ({_BY}) (last_over_time({series}[$__interval]))"

    about = f"{words} The band is the 95% interval of a run."
    return lines(title, about, unit, _with_ends("strategy", over), bands=list(VARIANTS))


def _with_ends(label: str, over: Callable[[str, str], str]) -> list[Json]:
    """For each strategy, and for the arms of other names, the line and the two ends of its interval."""
    arms = {f'{label}="{strategy}"': strategy for strategy in VARIANTS}
    arms[f'{label}!~"{"|".join(VARIANTS)}"'] = f"{{{{{label}}}}}"
    ends = {"": "", **ENDS}
    return [
        target(over(arm, suffix), f"{legend} {end}".strip())
        for arm, legend in arms.items()
        for end, suffix in ends.items()
    ]


def _latest(name: str, legend: str) -> Json:
    series = f"lab_result_{name}{{{_MEASURED}}}"
    return target(f"last_over_time({series}[$__range])", legend)


def _chain() -> Json:
    def over(arm: str, suffix: str) -> str:
        series = f'lab_chained_ratio{suffix}{{{arm},{_CHOSEN},metric="$metric"}}'
        return f"avg by ({_BY}) (last_over_time({series}[$__interval]))"

    about = (
        "Ratios of commits measured in turns, chained; the oldest commit is 1. What a machine does from "
        "night to night is in none of them. The band is the interval of a night's own ratio. Empty where no "
        "commit was held against an older one."
    )
    return lines("Commits, chained", about, "none", _with_ends("strategy", over), bands=list(VARIANTS))


def _comparison() -> list[Json]:
    chosen = f'{_WHERE},metric="$metric"'

    def over(arm: str, suffix: str) -> str:
        series = f"lab_comparison_ratio{suffix}{{{arm},{chosen}}}"
        return f"avg by (arm, against) (last_over_time({series}[$__interval]))"

    about = "Ratio of an arm to the one it is held against; 1 is no difference. The band is its interval."
    latest = f"last_over_time(lab_comparison_ratio{{{chosen}}}[$__range])"
    return [
        lines("Comparisons", about, "none", _with_ends("arm", over), bands=list(VARIANTS)),
        table("Latest ratios", about, "none", [target(latest, "")]),
    ]


def _marked(validity: float) -> str:
    """1 where a run of the interval is that. Grafana draws an annotation where its value is above 0."""
    worst = f"min_over_time({_VALID}{{{_MEASURED}}}[$__interval])"
    return f"({worst} == {validity}) * 0 + 1"


def _chosen_of(series: str, label: str, *chosen: str) -> str:
    """Only values that exist together with those that are chosen before."""
    where = ",".join(f'{name}="${name}"' for name in chosen)
    return f"label_values({series}{{{where}}}, {label})"


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
                [target(f"min by ({_BY}) (last_over_time({_VALID}{{{_MEASURED}}}[$__interval]))", _WHO)],
                {0: "red", 0.5: "orange", 1: "green"},
            ),
        ],
    },
    [
        variable("backend", "Backend", _chosen_of(_VALID, "backend"), one=True),
        variable("model", "Model", _chosen_of(_VALID, "model", "backend"), one=True),
        variable("load", "Load", _chosen_of(_VALID, "load", *GROUP[:2]), one=True),
        variable("machine", "Machine", _chosen_of(_VALID, "machine", *GROUP), one=True),
        variable("strategy", "Strategy", _chosen_of(_VALID, "strategy", *GROUP)),
        variable("metric", "Metric", _chosen_of("lab_comparison_ratio", "metric", *GROUP), one=True),
    ],
    [
        annotation("INVALID", _marked(0), "INVALID: {{strategy}} {{commit}}", "red"),
        annotation("CAUTION", _marked(0.5), "CAUTION: {{strategy}} {{commit}}", "orange"),
    ],
    since="now-90d",
)
