"""`lab bench` from end to end: against a fake server, against the real service, and killed in mid-run."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import psutil
import pytest

from harness.comparing.combine import compare_files
from harness.replay import server_gauges, service_process
from harness.results.manifest import ComparisonManifest, RunManifest, Validity
from harness.results.record import JOURNAL_SUFFIX, read_parquet
from harness.settings import HarnessSettings
from tests.adapters.test_gpu import fake_nvml
from tests.harness.fake_server import (
    END,
    STREAM_HEAD,
    FakeServer,
    answer_all,
    as_list,
    event,
    json_response,
    model_card,
)
from tests.harness.replay.test_server_gauges import VLLM
from tools.cli import main

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in HarnessSettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("CORPUS", str(write_corpus(tmp_path)))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("FLOOR", "0")


def write_corpus(folder: Path, num: int = 40) -> Path:
    lines = [
        json.dumps({"id": f"p{i}", "prompt": f"Tell me about {i}.", "max_tokens": 2 + i % 7, "category": "x"})
        for i in range(num)
    ]
    content = ("\n".join(lines) + "\n").encode()
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  prompts.jsonl\n")
    return path


def only_result(folder: Path) -> tuple[Path, RunManifest, pd.DataFrame]:
    (path,) = [p for p in folder.rglob("*.parquet") if not p.name.endswith(".steps.parquet")]
    manifest, rows = read_parquet(path)
    assert isinstance(manifest, RunManifest)
    return path, manifest, rows


def validity_of(manifest: RunManifest) -> Validity:
    assert manifest.validity is not None
    return manifest.validity


def test_a_service_of_ours_at_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(card=model_card(variant="static", client_chunk=4)) as server:
        words = ["--url", server.url, "--variant", "static_batch", "--requests", "20", "--concurrency", "8"]
        assert main(["bench", *words]) == 0
    path, manifest, rows = only_result(tmp_path / "out")
    assert path.parent.name == "static"
    assert set(rows["variant"]) == {"static"}
    assert sorted(rows["group_size"].unique()) == [4]
    assert validity_of(manifest).level == "CAUTION"
    assert manifest.model_digest == "d1"
    assert manifest.corpus.sha256 == manifest.corpus.recorded_sha256
    assert {"cpu_model", "physical_cores", "cpu_governor", "gpu"} <= manifest.host.model_fields_set
    assert manifest.seeds.keys() == {"arrivals", "sampling"}
    # Eight warm-up prompts in two chunks came first, and are in no row.
    assert [len(as_list(json.loads(body)["prompt"])) for body in server.bodies[:2]] == [4, 4]
    assert len(rows) == 20
    assert 0 < (manifest.repeats[0].round_trip_s or 0) < 1
    shown = capsys.readouterr().out
    assert "TTFT, from schedule (ms)" in shown
    assert str(path) in shown
    assert not list((tmp_path / "out").rglob("*" + JOURNAL_SUFFIX))


def test_rows_say_where_the_engine_scheduled_itself(tmp_path: Path) -> None:
    with FakeServer(card=model_card(scheduling="engine")) as server:
        words = ["--url", server.url, "--variant", "continuous", "--requests", "12", "--concurrency", "4"]
        assert main(["bench", *words]) == 0
    _, manifest, rows = only_result(tmp_path / "out")
    assert set(rows["arm"]) == {"continuous SCHEDULING=engine"}
    assert manifest.service is not None
    assert manifest.service.scheduling == "engine"


def test_any_openai_compatible_server(tmp_path: Path) -> None:
    async def foreign(body):  # type: ignore[no-untyped-def]
        assert body["stream_options"] == {"include_usage": True}
        yield STREAM_HEAD
        for number in range(body["max_tokens"]):
            yield event({"choices": [{"index": 0, "text": f" {number}", "finish_reason": None}]})
        yield event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"], "total_tokens": 0}
        yield event({"choices": [], "usage": usage})
        yield event("[DONE]")
        yield END

    with FakeServer(foreign) as server:
        # On a busy machine this may send late, which is an INVALID run: the rows are the question here.
        code = main(["bench", "--url", f"{server.url}/v1", "--requests", "10", "--rate", "200"])
        assert code in (0, 1)
    path, manifest, rows = only_result(tmp_path / "out")
    assert path.parent.name == "external"
    assert (manifest.service, manifest.model) == (None, "foreign-model")
    assert manifest.foreign is not None
    assert manifest.foreign.in_words() == (
        "of a kind unknown here: token counts from usage alone, no queue time"
    )
    assert list(rows["num_output_tokens"]) == list(rows["max_tokens"])
    assert rows["chunk_tokens"].isna().all()
    assert rows["output_sha256"].isna().all()
    assert rows["text_sha256"].notna().all()
    assert (rows["sent_s"] >= rows["scheduled_s"]).all()


def test_a_foreign_server_is_named_with_what_it_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def vllm(body):  # type: ignore[no-untyped-def]
        assert body["return_token_ids"] is True
        yield STREAM_HEAD
        for number in range(body["max_tokens"]):
            choice = {"index": 0, "text": " w", "token_ids": [number], "finish_reason": None}
            yield event({"choices": [choice]})
        yield event({"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": "length"}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": body["max_tokens"]}})
        yield event("[DONE]")
        yield END

    models = {"data": [{"id": "m", "owned_by": "vllm"}]}
    with FakeServer(vllm, pages={"/v1/models": models, "/version": {"version": "0.11.0"}}) as server:
        assert main(["bench", "--url", server.url, "--requests", "10", "--concurrency", "2"]) == 0
    path, manifest, rows = only_result(tmp_path / "out")
    assert manifest.foreign is not None
    assert manifest.foreign.model_dump() == {
        "kind": "vLLM", "version": "0.11.0", "token_ids": True, "queue_time": False,
    }  # fmt: skip
    assert [sum(tokens) for tokens in rows["chunk_tokens"]] == list(rows["max_tokens"])
    assert rows["output_sha256"].notna().all()
    told = "vLLM 0.11.0: token ids with every chunk, no queue time"
    assert f"server           {told}" in capsys.readouterr().out
    assert main(["report", str(path), "--markdown"]) == 0
    assert f"Server: {told}." in capsys.readouterr().out


def test_the_batch_and_the_queue_of_a_foreign_server_are_its_own_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_asked = 0

    def metrics() -> str:
        nonlocal num_asked
        num_asked += 1
        totals = (100 + num_asked, 50 + num_asked * 0.25, 100 + num_asked, 10 + num_asked * 0.125)
        return VLLM % (6, 2, 0.4, *totals)

    async def slow(body):  # type: ignore[no-untyped-def]
        await asyncio.sleep(0.02)
        yield STREAM_HEAD
        yield event({"choices": [{"index": 0, "text": " a", "finish_reason": "length"}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
        yield event("[DONE]")
        yield END

    monkeypatch.setattr(server_gauges, "PERIOD_S", 0.02)
    with FakeServer(slow, metrics=metrics) as server:
        words = ["--url", f"{server.url}/v1", "--requests", "40", "--concurrency", "4"]
        assert main(["bench", *words]) == 0
    path, manifest, _ = only_result(tmp_path / "out")
    told = manifest.repeats[0].server
    assert told is not None
    assert (told.server, told.mean_batch_size, told.queue_s, told.prefill_s) == ("vLLM", 6, 0.25, 0.125)
    assert 2 <= told.num_samples <= num_asked
    shown = capsys.readouterr().out
    assert "mean batch size  6.00" in shown
    assert "mean queue       2.00 requests, at most 2" in shown
    assert "KV cache in use  40.0%, at most 40.0%" in shown
    assert main(["report", str(path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "Mean queue: 2.00 requests" in page
    assert "250.00" in page  # the queue in the latency budget


def test_joules_a_token_where_a_gpu_tells_its_energy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joules = iter((1_000_000, 1_400_000))  # millijoules
    nvml = fake_nvml(nvmlDeviceGetTotalEnergyConsumption=lambda device: next(joules))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with FakeServer(card=model_card()) as server:
        assert main(["bench", "--url", server.url, "--requests", "10", "--concurrency", "2"]) == 0
    path, manifest, rows = only_result(tmp_path / "out")
    entry = manifest.repeats[0]
    assert entry.machine.gpu_joules == pytest.approx(400)
    assert entry.joules_per_token == pytest.approx(400 / rows["num_output_tokens"].sum())
    assert "J a token" in capsys.readouterr().out
    assert "lab_run_gpu_joules_per_token{" in path.with_suffix(".om").read_text()


def test_two_runs_of_a_seed_send_and_get_the_same(tmp_path: Path) -> None:
    frames, digests = [], []
    for name in ("one", "two"):
        with FakeServer(card=model_card(client_chunk=4)) as server:
            words = ["--url", server.url, "--requests", "18", "--concurrency", "4", "--seed", "9"]
            assert main(["bench", *words, "--out", str(tmp_path / name)]) == 0
        _, manifest, rows = only_result(tmp_path / name)
        frames.append(rows.sort_values("schedule_index"))
        digests.append(manifest.schedule.digest)
    assert digests[0] == digests[1]
    for column in ("prompt_id", "seed", "max_tokens", "body_sha256", "output_sha256"):
        assert list(frames[0][column]) == list(frames[1][column])


def test_a_foreign_server_gets_prompts_that_it_cannot_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    prompts: list[str] = []

    async def caches(body):  # type: ignore[no-untyped-def]
        prompt = body["prompt"]
        if prompt not in seen:
            await asyncio.sleep(0.2)
        if not prompt.startswith("0 warm-up"):
            prompts.append(prompt)
        seen.add(prompt)
        yield STREAM_HEAD
        yield event({"choices": [{"index": 0, "text": " a", "finish_reason": "length"}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
        yield event("[DONE]")
        yield END

    def measure(out: str) -> tuple[Path, RunManifest, pd.DataFrame]:
        words = ["--requests", "4", "--concurrency", "1", "--out", str(tmp_path / out)]
        assert main(["bench", "--url", f"{server.url}/v1", *words]) == 0
        return only_result(tmp_path / out)

    with FakeServer(caches) as server:
        first, second = measure("first"), measure("second")
        assert len(set(prompts)) == len(prompts) == 8
        assert all(prompt[:9].isdecimal() and prompt[9:].startswith(" Tell me") for prompt in prompts)
        plans = [manifest.schedule for _, manifest, _ in (first, second)]
        assert plans[0].salt != plans[1].salt
        assert plans[0].digest != plans[1].digest
        assert plans[0].plan_digest == plans[1].plan_digest
        made = compare_files([first[0], second[0]])
        assert not any("prefix cache" in reason for reason in made.manifest.validity.caution)
        monkeypatch.setenv("SALT", "0")
        third, fourth = measure("third"), measure("fourth")
    assert prompts[-1] == "Tell me about 3."
    assert third[1].validity is not None
    assert "prompts went out without a salt (SALT=0)" in " ".join(third[1].validity.caution)
    # The cache makes the second of the two 40 times as fast: without a salt that is said.
    cautions = compare_files([third[0], fourth[0]]).manifest.validity.caution
    assert any("a prefix cache would show: TTFT fell" in reason for reason in cautions)
    assert compare_files([first[0], third[0]]).manifest.validity.level == "CAUTION"


def test_an_invalid_run_says_why_and_exits_non_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def sometimes_full(body):  # type: ignore[no-untyped-def]
        if body["max_tokens"] == 5:
            yield json_response(429, {"error": {"message": "try later", "code": "queue_full"}})
            return
        async for piece in answer_all(body):
            yield piece

    with FakeServer(sometimes_full, card=model_card()) as server:
        assert main(["bench", "--url", server.url, "--requests", "20"]) == 1
    path, manifest, rows = only_result(tmp_path / "out")
    assert validity_of(manifest).level == "INVALID"
    assert set(rows.loc[rows["error"].notna(), "max_tokens"]) == {5}
    assert "http 429: queue_full: try later" in capsys.readouterr().out
    assert main(["report", str(path)]) == 1


def test_a_server_that_refuses_everything_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuses(body):  # type: ignore[no-untyped-def]
        yield json_response(503, {"error": {"message": "draining"}})

    with FakeServer(refuses, card=model_card()) as server:
        assert main(["bench", "--url", server.url]) == 2
    assert "all 16 warm-up requests failed, the first with: http 503: draining" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_a_label_that_contradicts_the_service_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(card=model_card(variant="continuous")) as server:
        assert main(["bench", "--url", server.url, "--variant", "static"]) == 2
    assert "runs continuous, not static" in capsys.readouterr().err


def test_a_changed_corpus_needs_a_flag_and_never_counts(tmp_path: Path) -> None:
    corpus = tmp_path / "prompts.jsonl"
    corpus.write_bytes(corpus.read_bytes() + b'{"id":"new","prompt":"x","max_tokens":1,"category":"x"}\n')
    with FakeServer(card=model_card()) as server:
        words = ["bench", "--url", server.url, "--requests", "5"]
        assert main(words) == 2
        assert server.bodies == []
        assert main([*words, "--allow-changed-corpus"]) == 1
    assert "not the recorded one" in validity_of(only_result(tmp_path / "out")[1]).invalid[0]


def bench_process(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tools.cli", "bench", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.02)


def journal_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*" + JOURNAL_SUFFIX))


NULL = {"BACKEND": "null", "NULL_STEP_MS": "1", "MAX_BATCH": "4", "ENGINE_PROCESS": "1"}


def services_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "serve" in child.cmdline()]


def test_kill_leaves_a_journal_that_one_command_turns_into_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**NULL, "NULL_STEP_MS": "10"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    process = bench_process(["--requests", "2000", "--concurrency", "4", "--warmup", "0"])
    wait_for(lambda: journal_lines(out) > 12)
    services = services_of(psutil.Process(process.pid))
    assert services
    process.kill()
    process.communicate()
    (journal,) = out.rglob("*" + JOURNAL_SUFFIX)
    num_rows = journal_lines(out) - 1
    assert main(["report", "--recover", str(journal)]) == 1
    path, manifest, rows = only_result(out)
    assert path.name == journal.name.removesuffix(JOURNAL_SUFFIX) + ".parquet"
    assert len(rows) == num_rows >= 12
    assert rows["error"].isna().all()
    assert validity_of(manifest).level == "INVALID"
    # Nobody was left to stop the service: it ended by itself.
    assert not psutil.wait_procs(services, timeout=30)[1]


def test_a_killed_harness_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**NULL, "NULL_STEP_MS": "10"}.items():
        monkeypatch.setenv(name, value)
    process = bench_process(["--requests", "2000", "--rate", "20", "--warmup", "0", "--processes", "2"])
    wait_for(lambda: journal_lines(tmp_path / "out") > 6)
    started = psutil.Process(process.pid).children(recursive=True)
    assert sum("spawn_main" in " ".join(child.cmdline()) for child in started) >= 2
    process.kill()
    left = psutil.wait_procs(started, timeout=20)[1]
    for child in left:
        child.kill()
    process.communicate()
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_told_to_stop_writes_the_file(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**NULL, "NULL_STEP_MS": "10"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    process = bench_process(["--requests", "2000", "--concurrency", "4", "--warmup", "0"])
    wait_for(lambda: journal_lines(out) > 6)
    services = services_of(psutil.Process(process.pid))
    assert services
    process.send_signal(number)
    shown, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    assert "the run was interrupted" in shown
    _, manifest, rows = only_result(out)
    assert manifest.repeats[0].was_interrupted
    interrupted = rows["error"].str.startswith("interrupted", na=False)
    assert 0 < interrupted.sum() <= 4
    assert rows.loc[~interrupted, "error"].isna().all()
    assert not any(service.is_running() for service in services)


def test_the_real_service_from_start_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in NULL.items():
        monkeypatch.setenv(name, value)
    words = ["--variant", "static", "--requests", "12", "--concurrency", "4", "--repeats", "2"]
    assert main(["bench", *words]) == 0
    _, manifest, rows = only_result(tmp_path / "out")
    assert list(rows.groupby("repeat").size()) == [12, 12]
    assert (rows["group_size"] == 4).all()
    assert list(rows["num_output_tokens"]) == list(rows["max_tokens"])
    assert (rows["mean_batch_size"] >= 1).all()
    steps = [entry.steps for entry in manifest.repeats if entry.steps]
    assert [0 < entry.dead_row_share < 1 for entry in steps] == [True, True]
    (step_file,) = (tmp_path / "out").rglob("*.steps.parquet")
    logged = pd.read_parquet(step_file)
    assert len(logged) == sum(entry.num_steps for entry in steps)
    assert set(logged["repeat"]) == {0, 1}
    # The steps made every token but those that a prompt's last chunk yields.
    assert logged["num_decode_tokens"].sum() <= rows["num_output_tokens"].sum()
    assert "dead-row share" in capsys.readouterr().out
    assert not services_of(psutil.Process())


def test_another_service_on_the_port_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took the port that was found free, and answers like the service that was started."""
    for name, value in NULL.items():
        monkeypatch.setenv(name, value)
    launch = service_process.ServiceLaunch("continuous", {}, {})
    with service_process.running_service(launch, start_timeout_s=60, announce=lambda _: None) as other:
        port = int(other.url.rpartition(":")[2])
        monkeypatch.setattr(service_process, "_free_port", lambda: port)
        assert main(["bench", "--requests", "4"]) == 2
        said = capsys.readouterr().err
        assert f"is process {other.process.pid}, so it is not the service that was started" in said
        assert other.problem() is None
    assert not list((tmp_path / "out").rglob("*.parquet"))


SECRET = "hunter2"


@pytest.mark.parametrize("answers", [True, False])
def test_a_login_in_the_url_is_sent_and_stands_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: bool
) -> None:
    with FakeServer(card=model_card()) as server:
        port = server.port
        url = f"http://me:{SECRET}@127.0.0.1:{port}?token={SECRET}"
        if answers:
            assert main(["bench", "--url", url, "--requests", "8", "--concurrency", "4"]) == 0
    if not answers:
        assert main(["bench", "--url", url, "--requests", "8"]) == 2
    told = capsys.readouterr()
    assert SECRET not in told.out + told.err
    if answers:
        basic = base64.b64encode(f"me:{SECRET}".encode()).decode()
        assert all(f"Authorization: Basic {basic}\r\n" in head for head in server.heads)
        path, manifest, _ = only_result(tmp_path / "out")
        assert manifest.settings.url == f"http://127.0.0.1:{port}"
        assert main(["report", str(path)]) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == (3 if answers else 0)
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@127.0.0.1:99999",
        f"http://me:{SECRET}/x@127.0.0.1:9",
        f"me:{SECRET}@127.0.0.1:9",
        f"http:/me:{SECRET}@h",
        f"http://[::1?{SECRET}",
        f"ftp://{SECRET}@127.0.0.1/",
        f"http://me:{SECRET}@127.0.0.1:9/v1",
    ],
)
def test_a_login_in_a_url_that_cannot_be_used(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", url, "--requests", "8"]) == 2
    told = capsys.readouterr()
    assert SECRET not in told.out + told.err
    assert told.err.startswith("lab bench: ")


def test_compare_measures_every_arm_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in NULL.items():
        monkeypatch.setenv(name, value)
    words = [
        "--variants",
        "baseline",
        "dynamic_batch@MAX_BATCH=2",
        "--blocks",
        "1",
        "--requests",
        "8",
        "--concurrency",
        "4",
        "--loads",
        "closed",
    ]
    assert main(["compare", *words]) == 0
    (path,) = (tmp_path / "out" / "compare").glob("*.parquet")
    manifest, rows = read_parquet(path)
    assert isinstance(manifest, ComparisonManifest)
    own = "dynamic MAX_BATCH=2"
    assert manifest.arms == ["baseline", own, f"{own} PAD_FINISHED=0"]
    assert rows.groupby("arm").size().to_dict() == dict.fromkeys(manifest.arms, 8)
    assert rows.groupby("schedule_index")["output_sha256"].nunique().eq(1).all()
    strategies = {run.arm: run.service.strategy for run in manifest.runs if run.service}
    pads = {arm: strategy["pad_finished"] for arm, strategy in strategies.items()}
    assert pads == {"baseline": False, own: True, f"{own} PAD_FINISHED=0": False}
    batches = {arm: strategy["max_batch"] for arm, strategy in strategies.items()}
    assert batches[own] == batches[f"{own} PAD_FINISHED=0"] == 2
    shown = capsys.readouterr().out
    assert "same as baseline" in shown
    assert "All arms gave the same output for 8 of 8 prompts." in shown
    assert main(["report", str(path)]) == 0
    assert "Ratios to baseline" in capsys.readouterr().out


def test_compare_refuses_an_arm_that_is_there_and_limits_that_nothing_reads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "--backend", "null", "--variants", "continuous", "continuous"]) == 2
    assert "is there already; to compare an arm with itself" in capsys.readouterr().err
    assert main(["compare", "--files", "x.parquet", "--slo", "ttft_ms=20"]) == 2
    assert "give --objective goodput" in capsys.readouterr().err


def test_compare_measures_two_loads_and_repeats_their_schedules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**NULL, "CAPACITY": "50", "REQUESTS": "6"}.items():
        monkeypatch.setenv(name, value)

    def digests(out: str) -> list[list[list[str]]]:
        words = ["--variants", "baseline", "continuous", "--blocks", "2", "--out", str(tmp_path / out)]
        main(["compare", *words])
        # Two files of one second sort otherwise by name.
        paths = sorted((tmp_path / out / "compare").glob("*.parquet"), key=lambda p: p.stat().st_mtime_ns)
        made = [read_parquet(path)[0] for path in paths]
        assert [made[0].runs[0].schedule.concurrency, made[1].runs[0].schedule.rate] == [24, 37.5]
        return [
            [sorted({r.schedule.digest for r in m.runs if r.planned_repeats == [b]}) for b in (0, 1)]
            for m in made
        ]

    first = digests("one")
    # The arms of a block share a schedule, which no other block and no other load has.
    assert [[len(block) for block in load] for load in first] == [[1, 1], [1, 1]]
    assert len({block[0] for load in first for block in load}) == 4
    shown = capsys.readouterr().out
    assert "2 blocks of 6 requests, 24 users" in shown
    assert "37.5 requests/s (75% of baseline's capacity of 50)" in shown
    assert shown.count("Ratios to baseline") == 2
    assert digests("two") == first


def test_compare_is_sized_before_it_starts_and_resumes_with_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (NULL | {"NULL_STEP_MS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("REQUESTS", raising=False)
    words = ["--variants", "baseline", "continuous", "--quick", "1", "--loads", "closed"]
    words += ["--concurrency", "4"]
    assert main(["compare", *words]) == 0
    (note,) = (tmp_path / "out" / "compare").glob("*.size.json")
    size = json.loads(note.read_text())
    assert (size["num_blocks"], size["requests"], size["left_out"]) == (1, [48], 0)
    told = capsys.readouterr().err
    assert "trying out baseline" in told
    assert "plan: 1 block of 2 runs, about " in told
    assert "4 users: 48 requests a block; baseline, continuous" in told
    (path,) = (tmp_path / "out" / "compare").glob("*.parquet")
    manifest, _ = read_parquet(path)
    assert isinstance(manifest, ComparisonManifest)
    assert {run.schedule.num_requests for run in manifest.runs} == {48}
    note.write_text(json.dumps(size | {"block_s": 1e6}))
    assert main(["compare", *words, "--resume"]) == 0
    told = capsys.readouterr().err
    assert "trying out" not in told
    assert "about 277.8 h" in told
    assert "2 runs of this plan are there already" in told


def test_a_mistyped_setting_of_an_arm_fails_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--variants", "baseline", "continuous@MAX_BTCH=1", "--requests", "2"]) == 2
    complaint = capsys.readouterr().err
    assert "continuous@MAX_BTCH=1: " in complaint
    assert "MAX_BTCH, given, is not a setting; did you mean MAX_BATCH?" in complaint
    Path(complaint.rpartition("its log: ")[2].strip()).unlink()
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_unknown_strategy_fails_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--variant", "no_such_strategy"]) == 2
    complaint = capsys.readouterr().err
    assert "no_such_strategy" in complaint
    Path(complaint.rpartition("its log: ")[2].strip()).unlink()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("words", [["bench"], ["compare"], ["sweep", "--concurrency", "1"]])
def test_a_place_that_takes_no_files_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a service was started"))
    assert main([*words, "--out", str(tmp_path / "prompts.jsonl" / "below")]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"lab {words[0]}: cannot write into ")
    assert complaint.endswith(": Not a directory\n")
