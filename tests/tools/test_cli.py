"""The `lab` program: what it offers, what it loads, and how it says that something is wrong."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import NoReturn

import pytest

from adapters.base import ConfigError
from tools import cli


def fake_command(monkeypatch: pytest.MonkeyPatch, problem: BaseException | None = None) -> None:
    def run(args: argparse.Namespace) -> int:
        if problem is not None:
            raise problem
        return int(args.code)

    module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--code", default="0"), run=run)
    monkeypatch.setattr(cli, "import_module", lambda name: module)


def test_help_names_every_command_without_loading_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> NoReturn:
        pytest.fail(f"{name} was imported")

    monkeypatch.setattr(cli, "import_module", refuse)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"\n    {name}" not in told] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_tells_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = cli.COMMANDS[name]
    try:
        import_module(module)
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs an extra: {missing}")
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"usage: lab {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["serv"], ["serve", "--no-such-option"]])
def test_wrong_arguments_end_with_two(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    fake_command(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)


def test_the_exit_code_is_the_commands_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch)
    assert cli.main(["bench", "--code", "7"]) == 7


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (ConfigError("MAX_BATCH is odd"), "lab bench: MAX_BATCH is odd\n"),
        (
            ModuleNotFoundError("x", name="torch.nn"),
            "lab bench: needs torch; install it with `uv sync --extra torch`\n",
        ),
    ],
)
def test_our_own_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem: Exception, sentence: str
) -> None:
    fake_command(monkeypatch, problem)
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == sentence


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, ModuleNotFoundError("x", name="harness.missing"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench"])


def test_serving_the_null_backend_loads_no_torch() -> None:
    code = "import sys, services.main, adapters.null_backend; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"}.isdisjoint(output.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="no full device to write to")
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_standard_output_that_is_full_is_one_sentence(length: int) -> None:
    code = f"""
import sys
from types import SimpleNamespace
from tools import cli
command = SimpleNamespace(add_arguments=lambda parser: None, run=lambda args: print("x" * {length}) or 0)
cli.import_module = lambda name: command
sys.exit(cli.main(["bench"]))
"""
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "lab bench: standard output takes no more: No space left on device\n"


def test_a_service_becomes_a_process_of_the_python_that_has_its_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []

    def execv(path: str, arguments: list[str]) -> NoReturn:
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr("services.main.interpreter_of", lambda backend: f"/{backend}/python")
    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit):
        cli.main(["serve", "--backend", "null"])
    assert started == [["/null/python", *sys.orig_argv[1:]]]
