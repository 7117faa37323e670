"""The command line as a user meets it: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from headrace import LLM, SamplingParams, cli
from headrace.formats import hub

HEADRACE = [sys.executable, "-m", "headrace"]
LONG = [*HEADRACE, "run", "--raw", "Once upon a time", "--max-tokens", "4000"]


def headrace(*words: str, stdin: str | bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*HEADRACE, *words], input=data or b"", capture_output=True, timeout=100, env=os.environ | environment
    )
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


# -- how commands end --------------------------------------------------------------------------------------------------


def test_help_names_every_command():
    out = CliRunner().invoke(cli.app, ["--help"]).stdout
    for name in ("run", "chat", "pull", "info", "eval", "bench"):
        assert re.search(rf"\b{name}\b", out), name
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.startswith("headrace 0.")


@pytest.mark.parametrize(
    "words", [["run", "--nonsense"], ["nonsense"], ["run", "x", "--max-tokens", "many"], ["eval", "perplexity"]]
)
def test_a_wrong_command_line_is_exit_2(words):
    done = headrace(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_an_error_is_one_line_and_exit_1(tmp_path, smollm2):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:5000])
    for words in (
        ["run", "hi", "--model", "no-such-model"],
        ["run", "hi", "--max-tokens", "0"],
        ["run", "hi", "--temperature", "nan"],
        ["run", "hi", "--raw", "--system", "x"],
        ["run"],
        ["info", str(cut)],
        ["pull", "no-such-model"],
        ["bench", "--tests", "xx1"],
        ["eval", "perplexity", "--text", str(tmp_path / "none.txt")],
    ):
        done = headrace(*words)
        assert done.returncode == 1, words
        assert re.fullmatch(r"headrace: [^\n]+\n", done.stderr), (words, done.stderr)
        assert done.stdout == ""


def test_debug_shows_where_an_error_came_from():
    done = headrace("run", "hi", "--model", "no-such-model", HEADRACE_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ModelNotFoundError" in done.stderr


def test_ctrl_c_ends_with_130(smollm2):
    process = subprocess.Popen(LONG, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.decode().strip() == ""


def test_a_reader_that_leaves_is_no_error(smollm2):
    process = subprocess.Popen(LONG, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.read(1) and process.stderr
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert errors.decode().strip() == ""


# -- run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(smollm2):
    """Eight greedy tokens, by the Python door."""
    with LLM(str(smollm2)) as llm:
        return llm.generate(["Once upon a time"], SamplingParams(max_tokens=8, temperature=0))[0]


def test_run_prints_what_the_python_door_gives(story):
    done = headrace("run", "Once upon a time", "--raw", "--max-tokens", "8")
    assert done.stdout == story.text + "\n" and done.stderr == ""


def test_run_json(story):
    done = headrace("run", "--raw", "--json", "--max-tokens", "8", stdin="Once upon a time\n")
    answer = json.loads(done.stdout)
    assert answer["text"] == story.text
    assert answer["token_ids"] == story.token_ids
    assert answer["prompt_token_ids"] == story.prompt_token_ids
    assert answer["finish_reason"] == "length"
    prompt, new = len(story.prompt_token_ids), len(story.token_ids)
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    assert answer["timings"]["prefill"] > 0 and set(answer["timings"]) >= {
        "queue",
        "prefill",
        "decode",
        "cached_tokens",
    }


def test_run_uses_the_chat_template_and_the_seed(smollm2):
    options = ["--json", "--max-tokens", "12", "--temperature", "1"]
    first, again, other = (
        json.loads(headrace("run", "Name a river.", "--system", "You are brief.", *options, "--seed", seed).stdout)
        for seed in ("1", "1", "2")
    )
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    with LLM(str(smollm2)) as llm:
        prompt = llm.tokenizer.decode(first["prompt_token_ids"])
    assert "You are brief." in prompt and "assistant" in prompt


@pytest.mark.parametrize(("data", "problem"), [(b"", "empty"), (b"\n", "empty")])
def test_a_prompt_that_is_not_there(data, problem):
    done = headrace("run", stdin=data)
    assert done.returncode == 1 and problem in done.stderr


def test_a_prompt_that_is_too_long(monkeypatch):
    monkeypatch.setattr(cli, "MAX_PROMPT_BYTES", 10)
    done = CliRunner().invoke(cli.app, ["run", "-"], input="x" * 11)
    assert done.exit_code == 1 and "longer than 10 bytes" in done.stderr


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_pull_prints_the_path(smollm2):
    assert headrace("pull").stdout == f"{smollm2}\n"
    assert cli.DEFAULT_MODEL == hub.DEFAULT_MODEL


def test_info_json():
    facts = json.loads(headrace("info", "smollm2-135m", "--json").stdout)
    assert facts["model"]["spec"]["layers"] == 30 and facts["kernels"]["name"]


def test_perplexity_json(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One two three four five six seven eight nine ten. " * 3)
    words = ["eval", "perplexity", "--text", str(text), "--context", "16", "--stride", "8"]
    result = json.loads(headrace(*words, "--json").stdout)
    assert result["scored"] == result["tokens"] - 1 and result["perplexity"] > 1
    assert f"perplexity {result['perplexity']:.4f}" in headrace(*words).stdout


def test_bench_overhead_json():
    rows = json.loads(headrace("bench", "overhead", "--steps", "10", "--json").stdout)
    assert [row["sequences"] for row in rows] == [1, 64]


def test_bench_writes_its_results(tmp_path):
    done = headrace("bench", "--tests", "pp4", "--reps", "1", "--json", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    assert "pp4" in done.stdout
    assert set(json.loads((tmp_path / "b.json").read_text())["summary"]) == {"pp4"}


def test_a_command_imports_only_what_it_uses(smollm2):
    def imported(code: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split("\n")[-2].split())

    assert not {"numpy", "msgspec", "rich.console", "headrace.llm"} & imported("import headrace.cli")
    run = "from headrace.cli import app; app(['run', '--raw', 'x', '--max-tokens', '1'], standalone_mode=False)"
    heavy = {"huggingface_hub", "jinja2", "rich.console", "rich.progress", "headrace.lab.bench", "torch", "requests"}
    assert not heavy & imported(run)


# -- in a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a pseudo-terminal: keys in, screen out."""

    def __init__(self, words: list[str], home: str) -> None:
        self.screen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"XDG_STATE_HOME": home, "TERM": "dumb"}
            os.execv(sys.executable, [*HEADRACE, *words])

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears; what was shown up to its end."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            if not select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {text!r} within {seconds} s in {self.screen!r}")
            self.screen += os.read(self.fd, 4096).decode(errors="replace")
        shown, _, self.screen = self.screen.partition(text)
        return shown + text

    def interrupt(self) -> None:
        """Ctrl-C at the prompt until there is a new one: readline misses a signal that comes as it begins to wait, and
        holds it until the next. The new prompt stands on a new line, one that is only drawn again does not."""
        for _ in range(30):
            self.type("\x03")
            try:
                self.wait_for("\r\n>>> ", 2)
                return
            except AssertionError:
                pass
        raise AssertionError("Ctrl-C thirty times, and no new prompt")

    def end(self) -> int:
        """Exit code, once the command has ended by itself."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:
            pass  # Linux: the other end is closed
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_in_a_terminal(smollm2, tmp_path):
    terminal = Terminal(["chat", "--max-tokens", "2000", "--temperature", "0"], str(tmp_path))
    terminal.wait_for(">>> ")
    terminal.type("/params max_tokens=4\n")
    terminal.wait_for("max_tokens=4 ")
    terminal.wait_for(">>> ")
    terminal.type("Say hello.\n")
    answer = terminal.wait_for("\r\n>>> ").split("Say hello.\r\n")[1]
    assert len(answer.removesuffix("\r\n>>> ")) > 0
    terminal.type("/params max_tokens=2000 ignore_eos=true\n")
    terminal.wait_for(">>> ")
    terminal.type("Count to a thousand.\n")
    terminal.wait_for("Count to a thousand.\r\n")
    while not re.search(r"\w", terminal.screen):
        terminal.screen += os.read(terminal.fd, 64).decode(errors="replace")
    terminal.type("\x03")  # Ctrl-C: the answer stops, the chat does not
    terminal.wait_for("(stopped)")
    terminal.wait_for(">>> ")
    terminal.type("/save " + str(tmp_path / "chat.json") + "\n")
    terminal.wait_for("(saved 4 messages")
    terminal.wait_for(">>> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt()  # at the prompt: the line goes, the chat stays
    terminal.type("\x04")
    assert terminal.end() == 0
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert saved[2]["content"] == "Count to a thousand."
    history = tmp_path / "headrace" / "chat_history"
    assert "Say hello." in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_a_chat_through_a_pipe(smollm2):
    done = headrace("chat", "--max-tokens", "4", stdin="Hello.\n/nonsense\n/retry\n/reset\n/retry\n/exit\nnever read\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and "never" not in done.stdout
    assert "no command /nonsense" in done.stderr and "no question" in done.stderr
