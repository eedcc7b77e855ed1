"""The report of the demo: results, answers and next commands. `python demo/report.py RUN` prints it again."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError, run_script
from utils.log import format_count
from utils.terminal import strip_control_chars


def share(part: int, total: int) -> str:
    """Return '69.4%', or '-' when total is 0."""
    return f"{100 * part / total:.1f}%" if total else "-"


def table(result: dict[str, Any]) -> str:
    """Return the results as a plain table; rhyme counts only poems that have the requested form."""
    lines = ["", "Poems on held-out titles       poems    exact form   rhyme on even lines   copied verses"]
    rows = {f"  {form}": counts for form, counts in result["by_form"].items()}
    rows |= {
        "this model": result["model"],
        "real held-out poems": result["real_poems"],
        "their lines, shuffled": result["shuffled_poems"],
    }
    for name, counts in rows.items():
        width = 29 - sum(character > "\u2e7f" for character in name)  # a Chinese character is two columns wide
        lines.append(
            f"{name:<{width}} {counts['poems']:6d} {share(counts['in_form'], counts['poems']):>13}"
            f" {share(counts['rhyming'], counts['poems']):>21} {share(counts['copied'], counts['verses']):>15}"
        )
    settings = result["settings"]
    lines += [
        f"(sampled at temperature {settings['temperature']:g}, top_p {settings['top_p']:g}, top_k {settings['top_k']};"
        f" seed {settings['seed']}; a verse is copied when a training poem has it verbatim)",
        "",
    ]
    lines.append(
        f"Bits per character after pretraining: {result['pretrain_bits_per_character']:.3f}"
        f" (title, author and text of {result['bits_poems']} held-out poems)"
    )
    seen = [f"{format_count(tokens)} in {stage}" for stage, tokens in result.get("tokens", {}).items() if tokens]
    if seen:
        lines.append(f"Tokens seen: {', '.join(seen)}")
    return "\n".join(lines)


def conversation(result: dict[str, Any]) -> str:
    """Return the fixed requests and the model's answers."""
    lines = [""]
    for turn in result["answers"]:
        lines += [
            f"> {turn['request']}",
            *(f"  {line}" for line in strip_control_chars(turn["answer"]).splitlines()),
            "",
        ]
    return "\n".join(lines)


def next_commands(run: str) -> str:
    """Return the commands to type next."""
    output = Path(run).parent.as_posix()
    page = "" if output == "output" else f" -- --output_path={output}"
    commands = {
        "source .venv/bin/activate": "the environment that this demo made",
        f"python test.py --run {run}": "talk to it here",
        f"streamlit run run_model.py{page}": "talk to it in the browser",
        f"tensorboard --logdir={output}/": "the curves of every run",
    }
    width = max(map(len, commands))
    return "\n".join(["Now you:", *(f"  {command:<{width}}   {what}" for command, what in commands.items())])


def report(result: dict[str, Any]) -> str:
    """Return the complete report."""
    return "\n".join([table(result), conversation(result), next_commands(result["settings"]["run"])])


def main() -> None:
    """Print the report of the run that is the only argument."""
    if len(sys.argv) != 2:
        raise UserError("which run? python demo/report.py RUN, the folder of a fine-tuning by run_demo.sh")
    path = Path(sys.argv[1]) / "demo.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a fine-tuning by run_demo.sh") from None
    print(report(result))


if __name__ == "__main__":
    run_script(main)
