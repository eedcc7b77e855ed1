"""What the demo prints at its end: a table of its figures, a few answers, and the commands to type next."""

from preprocess_data.demo_chat import poem_request

# One for each of the five tasks of the chat rows, worded as they are there.
REQUESTS = [
    poem_request("春夜", "五言绝句"),
    poem_request("江上送别", "七言律诗"),
]


def share(part: int, whole: int) -> str:
    """Return '69.4%', or '-' of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def table(result: dict) -> str:
    """Return the measured figures as a plain table; rhyme counts only poems that have the asked form."""
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
        f" seed {settings['seed']}; a verse is copied when a training poem has it word for word)",
        "",
    ]
    bpc = result["pretrain_val_bpc"]
    stated = f"{bpc:.3f}" if bpc is not None else "not in the pretraining run's summary"
    lines.append(f"Held-out bits per character after pretraining: {stated}")
    return "\n".join(lines)


def conversation(result: dict) -> str:
    """Return the fixed requests and the model's answers."""
    lines = [""]
    for turn in result["answers"]:
        lines += [f"> {turn['request']}", *(f"  {line}" for line in turn["answer"].splitlines()), ""]
    return "\n".join(lines)


def next_commands(run: str) -> str:
    """Return the commands to type next."""
    return "\n".join([
        "Now you:",
        f"  python test.py --run {run}          talk to it here",
        "  streamlit run run_model.py                   talk to it in the browser",
        "  tensorboard --logdir=output/                 the curves of every run",
    ])  # fmt: skip
