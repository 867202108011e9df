"""Recipes: overlays of params.yaml, one real task each."""

import io
import subprocess
from pathlib import Path

from stages.params import PARAMS, did_you_mean


def apply_recipe(name: str) -> None:
    """Lay `recipes/NAME.yaml` over the committed params.yaml, keeping its comments.

    A recipe's `runs` replace the runs, any other section is merged key by key. Edits of a person
    in params.yaml that are neither committed nor a recipe's are never overwritten.

    Raises:
        ValueError: if there is no such recipe, or params.yaml holds such edits.
    """
    recipes = {path.stem: path for path in sorted(Path("recipes").glob("*.yaml"))}
    recipes.pop("base", None)  # makes data/base, `make base`
    if name not in recipes:
        raise ValueError(
            f"RECIPE: no such recipe, got '{name}'; known: {', '.join(recipes)}"
            + did_you_mean(name, recipes)
        )
    committed = subprocess.run(
        ["git", "show", f"HEAD:./{PARAMS}"], capture_output=True, text=True, check=False
    )
    original = committed.stdout if committed.returncode == 0 else PARAMS.read_text()
    ours = {original, *(overlaid(original, path.read_text()) for path in recipes.values())}
    if PARAMS.read_text() not in ours:
        raise ValueError(
            f"{PARAMS}: has edits of yours that recipe '{name}' would overwrite, got a file that "
            "is neither committed nor a recipe's; commit it, or `git checkout params.yaml`"
        )
    PARAMS.write_text(overlaid(original, recipes[name].read_text()))


def overlaid(original: str, recipe: str) -> str:
    """A params.yaml with a recipe laid over it, both as texts; comments are kept."""
    from ruamel.yaml import YAML

    editor = YAML()
    editor.width = 120
    tree, overlay = editor.load(original), editor.load(recipe)
    for section, value in (overlay or {}).items():
        if isinstance(value, dict) and section != "runs":
            for key, leaf in value.items():
                tree[section][key] = leaf
        else:
            tree[section] = value
    stream = io.StringIO()
    editor.dump(tree, stream)
    return stream.getvalue() if overlay else original
