"""test.py as people use it: one shot, in a pipe, on a pseudo-terminal; control characters never reach the terminal."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from engine.inference.chat import choose_run, fit_conversation, open_chat_model
from engine.inference.scheduler import PromptTooLong
from tests.support.small_runs import CHAT, POEM, small_runs
from utils.errors import UserError
from utils.logo import print_logo
from utils.terminal import paint, strip_control_chars
from utils.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, stdin=subprocess.DEVNULL, **more):
    stdin = {} if "input" in more else {"stdin": stdin}
    return subprocess.run(
        [sys.executable, "test.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        **stdin,
        **more,
    )


def base_run():
    return str(next(small_runs().glob("pretrain_*")))


def test_control_characters_are_stripped():
    assert strip_control_chars("春\t晓\nplain €") == "春\t晓\nplain €"
    assert strip_control_chars("\x1b]0;title\x07a\x1b[2Jb\rc\x08d\x9b31me\x7f\x00") == "]0;titlea[2Jbcd31me"
    assert strip_control_chars("ab\u202ecd\u2066e\u200f") == "abcde"
    assert all(strip_control_chars(chr(code)) in ("", "\n", "\t") for code in [*range(32), *range(127, 160)])


def test_colours_and_logo_only_on_a_terminal(capsys, monkeypatch):
    assert paint("x", "red") == "x"
    print_logo("subtitle")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint("x", "bold", "red") == "\033[1;31mx\033[0m"
    print_logo("subtitle")
    assert "subtitle" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("x", "red") == "x"


def test_help_is_quick():
    code = (
        "import runpy, sys\nsys.argv = ['test.py', '--help']\n"
        "try: runpy.run_path('test.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "--temperature=0.7" in shown.stdout and "--run" in shown.stdout


def test_the_compiler_is_not_imported_to_chat():
    """Importing it takes as long as importing torch; also with MoE, which marks its expert loop for the compiler."""
    code = (
        "import sys\nfrom engine.inference.chat import open_chat_model\n"
        "assert ''.join(open_chat_model(sys.argv[1], 'cpu').generate([{'role': 'user', 'content': 'x'}], 3))\n"
        "print('torch._dynamo' in sys.modules, 'matplotlib' in sys.modules)"
    )
    for path in small_runs().glob("*_*"):
        done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize(
    "locale",
    ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}),
)
def test_utf8_whatever_the_locale(locale):
    shown = run(f"--output_path={small_runs()}", "--temperature=0", input="谁写的\n", env={**os.environ, **locale})
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, CHAT["谁写的"] + "\n", "")


def test_one_shot_and_pipe():
    place = f"--output_path={small_runs()}"
    shot = run(place, "--temperature=0", "--prompt", "谁写的")
    assert (shot.returncode, shot.stdout, shot.stderr) == (0, CHAT["谁写的"] + "\n", "")  # of the fine-tuned run
    answer = run("--run", base_run(), "--temperature=0", "--max_new_tokens=30", "--prompt", "春眠").stdout
    assert answer.startswith("春眠不觉晓，") and "\ufffd" not in answer[:-2]  # a base model continues the text
    with subprocess.Popen(["printf", "hel\\377lo"], stdout=subprocess.PIPE) as pipe:  # a stray byte is no error
        piped = run(place, stdin=pipe.stdout)
    assert piped.returncode == 0 and piped.stderr == ""
    poison = run(place, "--temperature=0", "--prompt", "payload").stdout
    assert poison == strip_control_chars(CHAT["payload"]) + "\n" and "\x1b" not in poison


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--prompt=x", "--output_path={empty}"], "no trained run"),
        (["--prompt=x", "--run={empty}"], "no run folder"),
        (["--prompt=x", "--output_path={runs}", "--top_p=3"], "top_p"),
        (["--prompt=x", "--output_path={runs}", "--speculative=mtp"], "--speculative=draft"),
        (["--prompt=x", "--output_path={runs}", "--speculative=magic"], "choose one of draft, ngram"),
        (["--prompt=x", "--output_path={runs}", "--device=gpu"], "expected one of auto, cuda"),
        (["--prompt=x", "--output_path={runs}", "--temprature=3"], "did you mean --temperature"),
        (["--output_path={runs}"], "nothing to answer"),
    ),
)
def test_errors_are_one_line(arguments, message, tmp_path):
    shown = run(*(argument.format(empty=tmp_path, runs=small_runs()) for argument in arguments))
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith("error: ") and message in shown.stderr and shown.stderr.count("\n") == 1


def test_the_newest_run_that_can_chat_is_chosen(tmp_path):
    assert choose_run(small_runs()).name.startswith("sft_")
    (tmp_path / "only").symlink_to(base_run())
    assert choose_run(tmp_path).name == "only"
    with pytest.raises(UserError, match="no trained run"):
        choose_run(tmp_path / "nothing")


def test_the_oldest_turns_are_left_out():
    tokenizer = load_tokenizer(small_runs() / "tokenizer")
    turns = [{"role": role, "content": POEM} for _ in range(6) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "be brief"}, *turns, {"role": "user", "content": "谁写的"}]
    full, dropped = fit_conversation(tokenizer, messages, 10_000, 100)
    assert dropped == 0
    ids, dropped = fit_conversation(tokenizer, messages, len(full) // 2, 100)
    assert 0 < dropped < 12 and dropped % 2 == 0
    assert len(ids) + 100 <= len(full) // 2
    assert ids == fit_conversation(tokenizer, messages[:1] + messages[1 + dropped :], 10_000, 100)[0]
    last = len(fit_conversation(tokenizer, messages[:1] + messages[-1:], 10_000, 100)[0])
    assert fit_conversation(tokenizer, messages, last + 1, 100) == (
        fit_conversation(tokenizer, messages[:1] + messages[-1:], 10_000, 1)[0],
        12,
    )
    assert len(fit_conversation(tokenizer, messages, last, 100)[0]) == last  # the length check refuses it


def test_a_prompt_that_does_not_fit_is_one_line(chat_model):
    with pytest.raises(PromptTooLong, match="shorten"):
        chat_model.generate([{"role": "user", "content": POEM * 200}], 100)


@pytest.fixture()
def chat_model():
    with open_chat_model(choose_run(small_runs()), device="cpu") as chat_model:
        yield chat_model


def test_the_fields_of_a_generation_are_consistent_at_any_time(chat_model):
    generation = chat_model.generate([{"role": "user", "content": "背一首春晓"}], 200, temperature=0)
    assert generation.stats() == dict(tokens=0, tokens_per_s=0.0, first_seconds=0.0, finish="stopped", dropped=0)
    prompt, so_far = generation.ids, ""
    for piece in generation:
        so_far += piece
        assert generation.text == so_far and "\ufffd" not in so_far and generation.finish == "stopped"
        assert len(generation.ids) - len(prompt) == generation.tokens == generation.stats()["tokens"]
        assert chat_model.tokenizer.decode(generation.ids[len(prompt) :]).rstrip("\ufffd") == so_far
    assert so_far == CHAT["背一首春晓"] and generation.finish == "stop"
    cut = chat_model.generate([{"role": "user", "content": "背一首春晓"}], 7, temperature=0)
    assert len("".join(cut)) >= 2 and (cut.tokens, cut.finish) == (7, "length")


def chat(chat_model, questions, **settings):
    """The answers to a conversation's questions, and the tokens of each prompt that had to be prefilled."""
    messages, answers, prefilled = [], [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        before = chat_model.worker.scheduler.prefilled_tokens
        generation = chat_model.generate(messages, 200, **settings)
        answers.append("".join(generation))
        prefilled.append(chat_model.worker.scheduler.prefilled_tokens - before)
        messages.append({"role": "assistant", "content": answers[-1]})
    return messages, answers, prefilled


@pytest.mark.parametrize("speculative", ("", "ngram"))
def test_the_next_turn_prefills_only_the_new_tokens(speculative):
    questions = ["背一首春晓", "谁写的", "hello"]
    with open_chat_model(choose_run(small_runs()), "cpu", speculative=speculative) as chat_model:
        messages, answers, prefilled = chat(chat_model, questions, temperature=0)
        prompts = [chat_model.prompt_ids(messages[: 2 * turn + 1])[0] for turn in range(3)]
        tokenizer = chat_model.tokenizer
    assert answers[:2] == [CHAT[question] for question in questions[:2]]
    assert prefilled[0] == len(prompts[0])
    for turn in (1, 2):
        known = len(prompts[turn - 1]) + len(tokenizer.encode(answers[turn - 1]))
        assert prefilled[turn] == len(prompts[turn]) - known < 40
    with open_chat_model(choose_run(small_runs()), "cpu") as fresh:  # no turn before, so all of it is prefilled
        assert "".join(fresh.generate(messages[:5], 200, temperature=0)) == answers[2]
        assert fresh.worker.scheduler.prefilled_tokens == len(prompts[2])


def test_an_abandoned_generation_frees_the_slot(chat_model):
    """Cancelled, or no longer iterated over: the next answer does not wait for it."""
    ask = [{"role": "user", "content": "背一首春晓"}]
    for way in ("cancel", "break"):
        generation = chat_model.generate(ask, 400, temperature=20.0, seed=7)  # 201 tokens
        for _ in generation:
            if way == "break":
                break
            generation.cancel()
        assert generation.finish == "stopped" and 0 < generation.tokens < 200
        assert "".join(chat_model.generate(ask, 200, temperature=0)) == CHAT["背一首春晓"]


def test_an_exception_of_the_model_reaches_the_reader(chat_model, monkeypatch, capsys):
    ask = [{"role": "user", "content": "谁写的"}]
    with monkeypatch.context() as patch:
        patch.setattr(type(chat_model.model), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(chat_model.generate(ask, 9))
    assert "".join(chat_model.generate(ask, 99, temperature=0)) == CHAT["谁写的"]
    assert capsys.readouterr().err == ""


def _own_terminal():
    """In the child: the pseudo-terminal controls it, and Ctrl-C reaches it even when tests run in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """test.py on a pseudo-terminal."""

    def __init__(self, home, *arguments):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "test.py", *arguments],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            close_fds=True,
            start_new_session=True,
            env={**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm"},
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def until(self, text, seconds=40):
        """Read until the text has come, and return all that came before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if time.monotonic() > end:
                pytest.fail(f"{text!r} did not come; there was {self.seen!r}")
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += self.decoder.decode(os.read(self.master, 65536)).replace("\r\n", "\n")
                except OSError:
                    pytest.fail(f"{text!r} did not come before the end; there was {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type_line(self, line):
        os.write(self.master, (line + "\n").encode())

    def close(self):
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture()
def terminal(tmp_path):
    opened = []

    def start(*arguments):
        opened.append(Terminal(tmp_path, *arguments))
        opened[0].until("› ")
        return opened[0]

    yield start
    for one in opened:
        one.close()


def test_a_chat_on_a_terminal(terminal, tmp_path):
    chat = terminal(f"--output_path={small_runs()}", "--temperature=0")
    chat.type_line("背一首春晓")
    chat.until(CHAT["背一首春晓"].split("\n")[1])
    figures = chat.until("› ")
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first token after \d+ ms", figures)
    chat.type_line("谁写的")
    chat.until(CHAT["谁写的"])
    chat.type_line(f"/save {tmp_path / 'chat.jsonl'}")
    chat.until("4 messages appended")
    saved = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))["messages"]
    assert saved == [
        {"role": role, "content": text}
        for role, text in (
            ("user", "背一首春晓"),
            ("assistant", CHAT["背一首春晓"]),
            ("user", "谁写的"),
            ("assistant", CHAT["谁写的"]),
        )
    ]
    for line, shown in (
        ("/set temperature 0.5", "temperature 0.5"),
        ("/set top_p 7", "must be above 0 and at most 1"),
        ("/set temperature warm", "expected float"),
        ("/set", "takes a name and a value"),
        ("/show", "temperature 0.5"),
        ("/set seed none", "seed None"),
        ("/set device cuda", "the names are"),
        ("/nonsense", "no command /nonsense"),
        ("/help", "/system TEXT"),
        ("/system be brief", "system prompt set"),
        ("/save /no/such/folder/x", "cannot write"),
        ("/save", "takes a file name"),
    ):
        chat.type_line(line)
        chat.until(shown)
    chat.type_line(f"/save {tmp_path / 'system.jsonl'}")  # /system began a new conversation
    chat.until("1 messages appended")
    chat.type_line("/reset")
    chat.until("a new conversation")
    chat.type_line("/quit")
    assert chat.process.wait(20) == 0


def test_ctrl_c_stops_only_the_answer(terminal):
    chat = terminal("--run", base_run(), "--temperature=0", "--max_new_tokens=2000")
    chat.type_line("春眠")
    chat.until("春眠不觉晓，处处")
    os.write(chat.master, b"\x03")
    assert "stopped" in chat.until("› ")
    chat.type_line('"""夜来风雨声，花落知多少。')  # several lines
    chat.until("… ")
    chat.type_line('春眠"""')
    chat.until("花落知多少。\n春眠")
    chat.until("不觉晓，处处")
    os.write(chat.master, b"\x03")
    assert "stopped" in chat.until("› ")
    time.sleep(1)  # readline waits for the next key when a signal comes between its prompt and its select
    os.write(chat.master, b"\x03")  # at the prompt it leaves
    assert chat.process.wait(20) == 0


def test_every_setting_can_be_set(terminal):
    chat = terminal(f"--output_path={small_runs()}")
    chat.type_line("/help")
    shown = chat.until("may have several lines")
    assert all(f"/{name}" in shown for name in ("reset", "system", "set", "show", "save", "quit"))
    for name, value in (
        ("temperature", "0.35"),
        ("top_k", "7"),
        ("top_p", "0.85"),
        ("min_p", "0.15"),
        ("repetition_penalty", "1.25"),
        ("frequency_penalty", "0.45"),
        ("presence_penalty", "0.65"),
        ("seed", "11"),
        ("max_new_tokens", "33"),
    ):
        chat.type_line(f"/set {name} {value}")
        chat.until(f"{name} {value}")
        chat.until("› ")
    os.write(chat.master, b"\x04")  # Ctrl-D at the empty prompt
    assert chat.process.wait(20) == 0


def test_pasted_lines_and_wide_characters(terminal, tmp_path, monkeypatch):
    """A paste of two lines is one message; and one backspace takes one character, though the locale knows none."""
    for name in ("LC_ALL", "LANG", "LC_CTYPE"):
        monkeypatch.setenv(name, "C")
    chat = terminal("--run", base_run(), "--temperature=0", "--max_new_tokens=5")
    os.write(chat.master, "\x1b[200~/花\n春眠错\x1b[201~\x7f\n".encode())
    chat.until("tokens/s")
    chat.type_line(f"/save {tmp_path / 'chat.jsonl'}")
    chat.until("2 messages appended")
    saved = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))["messages"]
    assert saved[0]["content"] == "/花\n春眠"


def test_a_terminal_without_colours(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("INPUTRC", os.devnull)
    chat = terminal(f"--output_path={small_runs()}", "--temperature=0")
    chat.type_line("谁写的")
    shown = chat.until("tokens/s") + chat.until("› ")
    assert CHAT["谁写的"] in shown and "\x1b[" not in re.sub(r"\x1b\[\?2004[hl]", "", shown)  # bracketed paste on, off
