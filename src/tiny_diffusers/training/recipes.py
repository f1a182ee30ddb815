"""Recipes by name: where a recipe lies, and which script it is for."""

from importlib.resources import files
from pathlib import Path

from ..errors import UserError, unknown


# train_scripts/train_SCRIPT.py
SCRIPTS = ("unconditional", "conditional", "pixelcnn", "vae", "dcgan", "consistency", "autoencoder")


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package: name -> file."""
    folder = Path(str(files("tiny_diffusers.train_scripts"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """
    Finds a recipe: a file, or one that comes with the package, by its name.

    Raises:
        UserError: If a name that is no path, such as `conditional_guidance`, is unknown.
    """
    path = Path(name)
    if path.is_file() or path.suffix or path.name != name:
        return path  # whoever reads it says if there is none
    recipes = shipped_recipes()
    if name not in recipes:
        raise unknown("recipe (give a file, or one that comes with the package)", name, recipes)
    return recipes[name]


def script_of(recipe: Path, given: str | None = None) -> str:
    """
    Returns the script that a recipe or a cell of it is for: `given`, or the beginning of the recipe's name.

    Raises:
        UserError: If there is no such script.
    """
    if given is not None and given not in SCRIPTS:
        raise unknown(f"script for {recipe}", str(given), SCRIPTS)
    script = given or recipe.stem.partition("_")[0]
    if script not in SCRIPTS:
        raise UserError(
            f"{recipe} does not say which script it is for: begin its name with it, as in unconditional_{recipe.stem}.yaml "
            f"({', '.join(SCRIPTS)}), or give 'script: NAME' in it or in each cell."
        )
    return script
