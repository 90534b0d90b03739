"""Templates come with a model and are somebody else's programs: what they do wrong stops chat alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adapters.text.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from adapters.text.render_process import RenderProcess
from tests.services.served import until

MESSAGES = [{"role": "user", "content": "héllo <b>"}]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% do x %}", "cannot be compiled: .*'do'"),
        ("{{ messages | nosuchfilter }}", "cannot be compiled: .*nosuchfilter"),
        ("{% for m in messages %}", "cannot be compiled: Unexpected end"),
        ("{{ messages[9].content }}", "refuses these messages: .*no element 9"),
        ("{{ '{} {}'.format('a') }}", "refuses these messages: IndexError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses these messages: RecursionError"),
        ("{{ 1 // 0 }}", "refuses these messages: ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
    ],
)
def test_a_template_that_fails_is_one_sentence_at_the_first_chat(source: str, said: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(ChatTemplateError, match=said):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    ("options", "rendered"),
    [
        ("", '[{"role": "user", "content": "héllo <b>"}]'),
        ("(separators=(',', ':'))", '[{"role":"user","content":"héllo <b>"}]'),
        ("(sort_keys=true)", '[{"content": "héllo <b>", "role": "user"}]'),
        ("(true)", '[{"role": "user", "content": "h\\u00e9llo <b>"}]'),
        ("(indent=1)", '[\n {\n  "role": "user",\n  "content": "héllo <b>"\n }\n]'),
    ],
)
def test_tojson_takes_the_options_of_transformers(options: str, rendered: str) -> None:
    assert ChatTemplate("{{ messages | tojson" + options + " }}", {}).render(MESSAGES) == rendered


def test_what_transformers_gives_a_template_is_there() -> None:
    asked = ChatTemplate("{{ documents is none }} {{ tools is none }} {{ messages | length }}", {})
    assert asked.render(MESSAGES) == "True True 1"
    assert asked.render(MESSAGES, {"documents": []}) == "False True 1"


@pytest.mark.parametrize("entry", [3, {"default": "x"}, [], ["x"], [{"name": "other", "template": "x"}], ""])
def test_a_config_without_a_usable_template_has_none(tmp_path: Path, entry: object) -> None:
    assert load_chat_template(tmp_path, {"chat_template": entry}) is None


def test_a_file_of_another_encoding_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes("é{{ messages[0].role }}".encode("latin-1"))
    template = load_chat_template(tmp_path, {})
    assert template is not None
    assert template.render(MESSAGES).endswith("user")


HUGE_RANGE = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (HUGE_RANGE, "does not end within 1 s"),
        ("{{ 7 ** (7 ** (7 + messages | length)) }}", "does not end within 1 s"),
        ("{{ 7 ** 999999999 }}", "does not end within 1 s"),  # in the compiler, which computes constants
        ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
        ("{{ 'x' | center(10 ** 10) }}", "MemoryError"),
        ("{{ messages[0].role * 10000000 }}", "makes 40000000 characters"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_template_without_end_is_ended_and_the_next_one_rendered(source: str, said: str) -> None:
    renderer = RenderProcess(timeout_s=1.0)
    try:
        with pytest.raises(ChatTemplateError, match=said):
            renderer.render(source, {}, MESSAGES, {})
        assert renderer.render("{{ messages[0].role }}", {}, MESSAGES, {}) == "user"
    finally:
        renderer.close()


def test_a_process_that_could_not_start_leaves_the_next_chat_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = RenderProcess()

    def fail(self: object) -> None:
        raise OSError("too many processes")

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.context.SpawnProcess.start", fail)
        with pytest.raises(ChatTemplateError, match="ended the process that ran it"):
            renderer.render("{{ 1 }}", {}, MESSAGES, {})
    try:
        assert renderer.render("{{ 1 }}", {}, MESSAGES, {}) == "1"
    finally:
        renderer.close()


def test_a_renderer_ends_by_itself_where_its_parent_was_killed_in_the_middle(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading, time; from adapters.text.render_process import RenderProcess\n"
        "renderer = RenderProcess(timeout_s=1.0)\n"
        f"source = {HUGE_RANGE!r}\n"
        "if __name__ == '__main__':\n"
        "    renderer.render('', {}, [], {})\n"
        "    print(renderer._process.pid, flush=True)\n"
        "    renderer.render(source, {}, [], {})\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
