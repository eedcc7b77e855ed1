"""Prints the demo's training preset of a model: `python demo/preset.py MODEL [--output_path output]`.

That is configs/<model>_cpu.yaml where it exists. For any other model a preset is written: the training settings of
configs/any_cpu.yaml, and small sizes for those fields that its args class has.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml

from model import BaseModel, BaseModelArgs, get_model_and_args
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent

# The usual field names of sizes, as in model/llama3.py and model/deepseekv3.py. A model gets those that it has.
SMALL = {
    "dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "inter_dim": 704,
    "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "moe_inter_dim": 176, "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 2,
    "n_dense_layers": 1, "n_expert_groups": 1, "n_limited_groups": 1, "n_mtp_layers": 1,
}  # fmt: skip


def small_sizes(Model: type[BaseModel], Args: type[BaseModelArgs]) -> dict[str, int]:
    """Return the small sizes for this model; {} with a note on stderr when it cannot be built with them."""
    fields = {field.name: field for field in dataclasses.fields(Args)}
    sizes = {name: value for name, value in SMALL.items() if name in fields and _is_plain_int(fields[name])}
    try:
        with torch.device("meta"):
            Model(Args(**sizes))
    except Exception as error:  # a plugin may raise anything; its defaults are used then
        print(f"note: {Model.model_name} is trained at its default size, since it does not take the small one {sizes}: "
              f"{type(error).__name__}: {error}", file=sys.stderr)  # fmt: skip
        return {}
    return sizes


def _is_plain_int(field: dataclasses.Field) -> bool:
    return isinstance(field.default, int) and not isinstance(field.default, bool)


def preset(model_name: str, output_path: Path) -> Path:
    """Return the path of the preset of this model, written to output_path when the model has none in configs/."""
    own = ROOT / "configs" / f"{model_name}_cpu.yaml"
    Model, Args = get_model_and_args(model_name)
    if own.exists():
        return own
    shared = ROOT / "configs" / "any_cpu.yaml"
    if not shared.exists():
        raise UserError(f"{shared} is missing: restore it, or write {own.name} next to it")
    fields = yaml.safe_load(shared.read_text(encoding="utf-8"))
    fields["model"] = small_sizes(Model, Args)
    path = output_path / f"demo_{model_name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Written by demo/preset.py from configs/any_cpu.yaml for {model_name}.\n"
    path.write_text(head + yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    """Print the path of the preset on stdout, and nothing else there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_name")
    parser.add_argument("--output_path", type=Path, default=ROOT / "output")
    args = parser.parse_args()
    print(preset(args.model_name, args.output_path))


if __name__ == "__main__":
    run_script(main)
