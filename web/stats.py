"""The line below an answer, on the page and in the terminal."""

from typing import Any

from web.texts import Texts


def stats_line(t: Texts, stats: dict[str, Any]) -> str:
    """The statistics of a `Generation`: numbers and our own texts only, because st.caption reads Markdown."""
    parts = [
        f"{stats['tokens']} {t['tokens']}",
        f"{stats['tokens_per_s']:.1f} {t['tokens_per_s']}",
        f"{t['first_token']} {1000 * stats['first_seconds']:.0f} ms",
    ]
    if stats.get("drafted"):
        parts.append(t["accepted"].format(percent=100 * stats["accepted"] / stats["drafted"], drafted=stats["drafted"]))
    if stats["finish"] != "stop":
        parts.append(t[stats["finish"]])
    if stats["dropped"]:
        parts.append(t["dropped"].format(messages=stats["dropped"]))
    return " · ".join(parts)
