"""Services and servers under the same load, in turns."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest

from adapters.base import LabError
from harness.replay.service_process import ServiceLaunch, running_service
from tools import served_yardsticks

_NULL = {"BACKEND": "null"}


def arguments(out: Path, **changes: object) -> Namespace:
    given = {"served": ["null"], "model": "null", "dtype": "auto", "threads": 1}
    return Namespace(**{**given, "requests": 20, "blocks": 2, "out": out, **changes})


def test_a_service_and_a_server_that_runs_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = ServiceLaunch("continuous", _NULL)
    with running_service(launch, start_timeout_s=60, announce=lambda _: None) as other:
        assert served_yardsticks.run(arguments(tmp_path, served=["null", f"other={other.url}"])) == 0
    (path,) = tmp_path.glob("yardsticks/*.parquet")
    frame = pd.read_parquet(path)
    assert frame["engine"].to_list() == ["null", "other", "other", "null"]
    assert frame["measure"].unique().tolist() == ["20 requests, 16 users"]
    tokens = frame.pivot(index="block", columns="engine", values="num_tokens")
    assert (tokens["null"] == tokens["other"]).all()
    others = frame.pivot(index="block", columns="engine", values="other_cpu_share")
    assert others["null"].notna().all(), "its own processes are known"
    assert others["other"].isna().all()
    assert "other" in capsys.readouterr().out


def test_a_server_that_refuses_is_an_error(tmp_path: Path) -> None:
    launch = ServiceLaunch("continuous", _NULL, {"MAX_MODEL_LEN": "64"})
    with (
        running_service(launch, start_timeout_s=60, announce=lambda _: None) as small,
        pytest.raises(LabError, match=r"small: .*failed"),
    ):
        served_yardsticks.run(arguments(tmp_path, served=[f"small={small.url}"]))
