"""Talk to a trained model in the terminal.

python test.py                                     the newest run in output/, a chat if it has been fine-tuned
python test.py --run output/pretrain_MODEL         a base model goes on from what is typed
python test.py --prompt "Hello"                    one answer and out; `echo Hello | python test.py` does the same
"""

import json
import os
import sys
import typing
from dataclasses import asdict, dataclass

from engine.inference.options import SAMPLING, TalkOptions
from utils.config import convert, opt, parse
from utils.errors import UserError, run_script
from utils.logo import print_logo
from utils.terminal import line_history, paint, prompt, speak_utf8, strip_control_chars

HELP = """\
  /reset               forget the conversation
  /system TEXT         set the system prompt (without TEXT: remove it) and forget the conversation
  /set NAME VALUE      change a setting, e.g. /set temperature 0.7
  /show                the settings as they are
  /save FILE           append the conversation to FILE, one JSON line as the fine-tuning data has them
  /quit                leave (Ctrl-D does too); Ctrl-C stops an answer, and at the prompt it leaves
  \"\"\" begins a text of several lines, the next \"\"\" ends it; what is pasted may have several lines anyway."""
QUOTES = '"' * 3
SETTABLE = ("max_new_tokens", *SAMPLING)


@dataclass
class TestConfig(TalkOptions):
    __doc__ = __doc__
    run: str = opt("", "run folder (empty: the newest in output_path, fine-tuned before base)", path=True)
    prompt: str = opt("", "answer this, print nothing else, and end")
    system: str = opt("", "system prompt of a chat")
    compile: bool = opt(False, "compile the step that writes a token: half a minute to two at the start, then faster")
    speculative: str = opt(
        "",
        "guess tokens ahead, same text: mtp by the model's own module, ngram by looking them up",
        choices=("", "mtp", "ngram"),
    )


def main():
    config = parse(TestConfig)
    speak_utf8()
    config.prompt = config.prompt.encode(errors="replace").decode()  # the same for a stray byte in an argument
    one_shot = config.prompt or ("" if sys.stdin.isatty() else sys.stdin.read().strip())
    if not one_shot and not sys.stdin.isatty():
        raise UserError("nothing to answer: the standard input is empty; pass --prompt TEXT, or start it on a terminal")
    speaker, run = open_run(config)
    session = Session(speaker, config)
    if one_shot:
        session.ask(one_shot)
        return
    print_logo(f"{run} · {'base model: it goes on from your text' if speaker.is_base else 'chat'} · /help")
    line_history("terminal")
    session.loop()


def open_run(config):
    """Load the run that the config names, or the best one to talk to: (Speaker, path)."""
    from engine.inference.chat import choose_run, open_speaker  # torch comes with it
    from engine.inference.sampling import Sampling

    Sampling(**config.sampling())  # a wrong setting is told before the model is loaded
    path = config.run or choose_run(config.output_path)
    return open_speaker(path, config.device, config.precision, config.compile, config.speculative), path


class Session:
    """One conversation on the terminal."""

    def __init__(self, speaker, config):
        self.speaker, self.config = speaker, config
        self.messages = self._opening()

    def loop(self):
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
                    self.command(*line[1:].split(None, 1))
                elif line:
                    self.ask(line)
            except KeyboardInterrupt:  # before the first token, or between two of our own lines
                print()
            except ValueError as error:
                if not getattr(error, "user_error", False):
                    raise
                print(paint(f"error: {error}", "red"))

    def read(self):
        """What is typed next: a line, or, from one pair of three quotation marks to the other, several."""
        text = prompt("› ", "bold", "green").strip()
        if not text.startswith(QUOTES):
            return text
        text = text.removeprefix(QUOTES)
        while not text.endswith(QUOTES):
            text += "\n" + prompt("… ", "dim")
        return text.removesuffix(QUOTES).strip("\n")

    def command(self, name="", rest=""):
        if name == "help":
            print(paint(HELP, "dim"))
        elif name == "reset":
            self.messages = self._opening()
            print(paint("  a new conversation", "dim"))
        elif name == "system":
            self.config.system = rest.strip()
            self.messages = self._opening()
            print(paint("  system prompt set" if rest.strip() else "  no system prompt", "dim"))
        elif name == "set":
            self.set(*rest.replace("=", " ").split())
        elif name == "show":
            self.show()
        elif name == "save":
            self.save(rest.strip())
        else:
            raise UserError(f"no command /{strip_control_chars(name)}: /help lists them")

    def set(self, name="", value="", *more):
        if name not in SETTABLE or not value or more:
            raise UserError(f"/set takes a name and a value; the names are {', '.join(SETTABLE)}")
        value = convert(value, typing.get_type_hints(type(self.config))[name], name)
        self.speaker.check(**{**self.settings(), name: value})
        setattr(self.config, name, value)
        self.show()

    def show(self):
        print(paint("  " + "  ".join(f"{key} {value}" for key, value in self.settings().items()), "dim"))

    def settings(self):
        return {name: value for name, value in asdict(self.config).items() if name in SETTABLE}

    def save(self, path):
        if not path:
            raise UserError("/save takes a file name, e.g. /save chat.jsonl")
        try:
            with open(os.path.expanduser(path), "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None
        print(paint(f"  {len(self.messages)} messages appended to {path}", "dim"))

    def ask(self, text):
        """Print the answer to one message as it is written; Ctrl-C keeps what there is of it."""
        reply = self.speaker.answer([*self.messages, {"role": "user", "content": text}], **self.settings())
        if self.speaker.is_base:
            print(paint(strip_control_chars(text), "dim"), end="", flush=True)
        try:
            for piece in reply:
                print(strip_control_chars(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdout.isatty():
                raise
        print()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        if sys.stderr.isatty():
            print(paint(describe(reply.figures()), "dim", stream=sys.stderr), file=sys.stderr)

    def _opening(self):
        return [{"role": "system", "content": self.config.system}] if self.config.system else []


def describe(figures):
    """The line below an answer."""
    parts = [
        f"{figures['tokens']} tokens",
        f"{figures['tokens_per_s']:.1f} tokens/s",
        f"first after {1000 * figures['first_seconds']:.0f} ms",
    ]
    if figures.get("guesses"):
        parts.append(f"{100 * figures['hits'] / figures['guesses']:.0f}% of {figures['guesses']} guesses right")
    if figures["finish"] == "length":
        parts.append("cut off at the limit")
    elif figures["finish"] == "stopped":
        parts.append("stopped")
    if figures["dropped"]:
        parts.append(f"the oldest {figures['dropped']} messages no longer fit")
    return "  " + " · ".join(parts)


if __name__ == "__main__":
    run_script(main)
