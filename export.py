"""Export a trained model to transformers, or import a published checkpoint as a run.

python export.py --run output/sft_MODEL --to hf DIR             a folder that AutoModelForCausalLM loads
python export.py --from hf DIR --out output/imported_NAME       a run folder, for python sft.py --init_from=...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from utils.config import opt, parse
from utils.errors import UserError, run_script

FORMATS = ("hf",)


@dataclass
class ExportConfig:
    __doc__ = __doc__
    run: str = opt("", "run folder to export", path=True)
    to_hf: str = opt("", "folder to write; the same as --to hf DIR", path=True)
    from_hf: str = opt("", "folder of a checkpoint, config.json and safetensors; the same as --from hf DIR", path=True)
    out: str = opt("", "run folder to write", path=True)
    max_seq_len: int = opt(0, "with --from: tokens that the model is built for; 0: that of the checkpoint")


def main(argv: list[str] | None = None) -> None:
    """Export or import, by the command line."""
    config = parse(ExportConfig, join_format(sys.argv[1:] if argv is None else argv))
    if bool(config.to_hf) == bool(config.from_hf):
        raise UserError("give one of --to hf DIR (with --run RUN) and --from hf DIR (with --out RUN)")
    if config.to_hf and not config.run:
        raise UserError("which run? add --run output/...")
    if config.from_hf and not config.out:
        raise UserError("where to? add --out output/imported_NAME")
    from engine.interchange.hf import export_hf, import_hf  # imports torch

    if config.to_hf:
        export_hf(Path(config.run), Path(config.to_hf))
    else:
        import_hf(Path(config.from_hf), Path(config.out), config.max_seq_len)


def join_format(argv: list[str]) -> list[str]:
    """Rewrite `--to hf DIR` and `--from hf DIR`, which have two values, to --to_hf=DIR and --from_hf=DIR."""
    arguments = iter(argv)
    settings = []
    for argument in arguments:
        if argument in ("--to", "--from"):
            format_ = next(arguments, "")
            folder = next(arguments, "")
            if format_ not in FORMATS or not folder:
                raise UserError(
                    f"{argument} takes a format ({', '.join(FORMATS)}) and a folder, as in {argument} hf DIR"
                )
            argument = f"{argument}_{format_}={folder}"
        settings.append(argument)
    return settings


if __name__ == "__main__":
    run_script(main)
