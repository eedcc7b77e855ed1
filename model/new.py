"""Start an architecture of your own: copies the template under a new name.

python -m model.new my_net      # writes model/my_net.py, whose model is called mini_my_net
"""

import re
import sys
from pathlib import Path

from model import ModelError, list_models

FOLDER = Path(__file__).parent
DOC = '''"""{title}: describe in one sentence what is new about it.

    python check_model.py --model_name={model_name}
    python pretrain.py --model_name={model_name}
"""
'''


def new_file(name, folder=FOLDER):
    """Write `folder`/<name>.py with the template's classes renamed, and return (path, model_name).

    Raises `ModelError` for a name that is not a lower-case Python module name, or that is taken.
    """
    name = name.removesuffix(".py").removeprefix("mini_")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,50}", name):
        raise ModelError(f"{name!r} cannot name an architecture: use small letters, digits and _, a letter first")
    path, model_name = Path(folder) / f"{name}.py", f"mini_{name}"
    if path.exists() or path.with_suffix("").exists() or model_name in list_models():
        raise ModelError(f"model/{path.name} or the model {model_name} exists already: choose another name")
    title = "".join(part.capitalize() for part in name.split("_"))
    text = (FOLDER / "template.py").read_text(encoding="utf-8")
    body = text[text.index('"""', 3) + 4 :]  # the template's docstring is about the template
    body = body.replace("Template", title).replace('"template"', f'"{model_name}"')
    path.write_text(DOC.format(title=title, model_name=model_name) + body, encoding="utf-8")
    return path, model_name


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ModelError("give one name: python -m model.new my_net")
    path, model_name = new_file(sys.argv[1])
    print(f"wrote model/{path.name}: change it, then run python check_model.py --model_name={model_name}")


if __name__ == "__main__":
    try:
        main()
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
