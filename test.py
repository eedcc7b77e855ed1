"""Talk to a trained model in the terminal.

python test.py                                     the newest run in output/, a chat if it has been fine-tuned
python test.py --run output/pretrain_MODEL         a base model continues what is typed
python test.py --prompt "Hello"                    one answer and out; `echo Hello | python test.py` does the same
"""

import json
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import utils.openmp  # noqa: F401  before PyTorch is loaded
from engine.inference.options import SAMPLING, ChatOptions, check_speculative_name
from utils.config import SWITCH, convert, opt, parse
from utils.errors import UserError, run_script
from utils.logo import print_logo
from utils.terminal import line_history, paint, prompt, strip_control_chars, use_utf8
from web.stats import stats_line
from web.texts import TEXTS

if typing.TYPE_CHECKING:  # torch takes seconds to import
    from engine.inference.chat import ChatModel

HELP = """\
  /reset               forget the conversation
  /system TEXT         set the system prompt (without TEXT: remove it) and forget the conversation
  /set NAME VALUE      change a setting, e.g. /set temperature 0.7
  /show                show the settings
  /save FILE           append the conversation to FILE, as one JSON line in the format of the fine-tuning data
  /quit                leave (Ctrl-D does too); Ctrl-C stops an answer, and at the prompt it leaves
  \"\"\" begins a text of several lines, the next \"\"\" ends it; pasted text may have several lines anyway."""
QUOTES = '"' * 3
SETTABLE = ("max_new_tokens", *SAMPLING)


@dataclass
class TestConfig(ChatOptions):
    __doc__ = __doc__
    run: str = opt("", "run folder (empty: the newest in output_path, fine-tuned before base)", path=True)
    prompt: str = opt("", "answer this, print nothing else, and end")
    system: str = opt("", "system prompt of a chat")
    compile: str = opt(
        "auto",
        "the decode step: auto compiles it while it answers, true before the first, half a minute; kept on disk",
        choices=SWITCH,
    )
    speculative: str = opt(
        "", "speculative decoding, same answer: draft uses the model's own draft module, ngram copies from the text"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_speculative_name(self.speculative)


def main() -> None:
    config = parse(TestConfig)
    use_utf8()
    config.prompt = config.prompt.encode(errors="replace").decode()  # a stray byte in an argument becomes a "?"
    one_shot = config.prompt or ("" if sys.stdin.isatty() else sys.stdin.read().strip())
    if not one_shot and not sys.stdin.isatty():
        raise UserError("nothing to answer: the standard input is empty; pass --prompt TEXT, or start it on a terminal")
    from engine.inference.chat import choose_run, open_chat_model

    path = config.run or choose_run(config.output_path)
    compile = "cached" if one_shot and config.compile == "auto" else config.compile  # one answer is no reason to build
    with open_chat_model(path, config.device, config.precision, compile, config.speculative) as chat_model:
        session = Session(chat_model, config)
        if one_shot:
            session.ask(one_shot)
            return
        print_logo(f"{path} · {'base model: it continues your text' if chat_model.is_base else 'chat'} · /help")
        line_history("terminal")
        session.loop()


class Session:
    """One conversation on the terminal."""

    def __init__(self, chat_model: "ChatModel", config: TestConfig) -> None:
        self.chat_model = chat_model
        self.config = config
        self.messages = self._opening()
        self.commands: dict[str, Callable[[str], None]] = {
            "help": self.help,
            "reset": self.reset,
            "system": self.system,
            "set": self.set,
            "show": self.show,
            "save": self.save,
        }

    def loop(self) -> None:
        while True:
            try:
                line = self.read()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/") and "\n" not in line:
                    self.command(line[1:])
                elif line:
                    self.ask(line)
            except KeyboardInterrupt:  # before the first token, or during a command
                print()
            except UserError as error:
                print(paint(f"error: {error}", "red"))

    def read(self) -> str:
        """Return the next line, or the lines from one pair of three quotation marks to the other."""
        text = prompt("› ", "bold", "green").strip()
        if not text.startswith(QUOTES):
            return text
        text = text.removeprefix(QUOTES)
        while not text.endswith(QUOTES):
            text += "\n" + prompt("… ", "dim")
        return text.removesuffix(QUOTES).strip("\n")

    def command(self, line: str) -> None:
        name, argument = [*line.split(None, 1), "", ""][:2]
        if name not in self.commands:
            raise UserError(f"no command /{strip_control_chars(name)}: /help lists them")
        self.commands[name](argument.strip())

    def help(self, argument: str) -> None:
        note(HELP)

    def reset(self, argument: str) -> None:
        self.messages = self._opening()
        note("  a new conversation")

    def system(self, argument: str) -> None:
        self.config.system = argument
        self.messages = self._opening()
        note("  system prompt set" if argument else "  no system prompt")

    def set(self, argument: str) -> None:
        words = argument.replace("=", " ").split()
        if len(words) != 2 or words[0] not in SETTABLE:
            raise UserError(f"/set takes a name and a value; the names are {', '.join(SETTABLE)}")
        name, value = words
        hint = typing.get_type_hints(type(self.config))[name]
        self.config = replace(self.config, **{name: convert(value, hint, name)})
        self.show("")

    def show(self, argument: str) -> None:
        note("  " + "  ".join(f"{name} {value}" for name, value in self.settings().items()))

    def save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save takes a file name, e.g. /save chat.jsonl")
        try:
            with open(os.path.expanduser(argument), "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {argument}: {error.strerror}; choose another file") from None
        note(f"  {len(self.messages)} messages appended to {argument}")

    def settings(self) -> dict[str, typing.Any]:
        return {name: value for name, value in asdict(self.config).items() if name in SETTABLE}

    def ask(self, text: str) -> None:
        """Print the answer to one message as it is generated; Ctrl-C stops it and keeps what there is."""
        generation = self.chat_model.generate([*self.messages, {"role": "user", "content": text}], **self.settings())
        if self.chat_model.is_base:
            print(paint(strip_control_chars(text), "dim"), end="", flush=True)
        try:
            for piece in generation:
                print(strip_control_chars(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdout.isatty():
                raise
        finally:
            generation.cancel()
        print()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": generation.text}]
        if sys.stderr.isatty():
            line = "  " + stats_line(TEXTS["English"], generation.stats())
            print(paint(line, "dim", stream=sys.stderr), file=sys.stderr)

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.config.system}] if self.config.system else []


def note(text: str) -> None:
    print(paint(text, "dim"))


if __name__ == "__main__":
    run_script(main)
