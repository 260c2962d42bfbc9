"""Where the shipped recipes are and what they are called; nothing heavy is imported, so that the shell completes at once."""

from __future__ import annotations

from pathlib import Path

from guardsmith.core.errors import UserError, did_you_mean


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    in_package = Path(__file__).parents[1] / "builtin" / "recipes"
    return in_package if in_package.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(file.stem for file in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or path; a path need not exist.

    Raises:
        UserError: there is neither such a file nor such a name.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    in_folder = recipe_folder() / f"{name}.yaml"
    if in_folder.is_file():
        return in_folder
    hint = did_you_mean(name, recipe_names()) or "; `guardsmith list recipes` prints the shipped ones, such as demo"
    raise UserError(f"there is no recipe {name!r}, neither as a file nor by name{hint}")
