"""The version of Mini-LLM: `--version`, /health and run.json report it, and pyproject.toml reads it here."""

VERSION = "0.2.0"
