"""The version of Mini-LLM, for `--version`, /health, run.json and pyproject.toml."""

VERSION = "0.2.0"
