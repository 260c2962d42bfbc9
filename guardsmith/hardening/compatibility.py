"""Whether a registry and a recipe fit the base: what only the model can tell, before anything runs."""

from __future__ import annotations

from guardsmith.attacks import find_attack
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import UserError
from guardsmith.diffusion.prompts import lost_words
from guardsmith.methods import METHODS
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.families import SD
from guardsmith.registry.loader import Registry, unknown_class_nouns

CLASSES_OF_AVATAR = ("person", "character", "robot")


def check_against_base(model: DiffusionModel, registry: Registry, recipe: Recipe) -> None:
    """What only the model can tell: class nouns it does not know, identifiers its tokenizer drops, methods not made for it.

    Raises:
        UserError: every problem, one sentence a line.
    """
    problems = unknown_class_nouns(registry, CLASSES_OF_AVATAR) if model.source == "builtin:avatar" else []
    names = {name for subject in registry.subjects for name in subject.identifiers} | set(recipe.verify.identifiers)
    names |= set(recipe.method.params.get("identifiers", ()))
    problems += _not_for_this_family(model, recipe)
    room = METHODS[recipe.method.name].room
    if room is not None and len(registry.subjects) > room(model.unet):
        problems.append(
            f"{registry.path}: {recipe.method.name} has room for {room(model.unet)} subjects in this base, and there are "
            f"{len(registry.subjects)}; protect fewer of them in one model."
        )
    problems += [
        f"{registry.path}: the identifier '{word}' has no token in this model's tokenizer; choose another."
        for word in sorted(lost_words(model, names))
    ]
    if problems:
        raise UserError("\n".join(problems))


def _not_for_this_family(model: DiffusionModel, recipe: Recipe) -> list[str]:
    """What a recipe asks for and the model's family does not do, one sentence each."""
    if model.family is SD:
        return []
    found = []
    name, config = recipe.method.name, METHODS[recipe.method.name].config(**recipe.method.params)
    asked = {f"the method {name}": (config, getattr(config, "adapter", None) == "textual_inversion")}
    for label, spec in recipe.verify.attacks.items():
        attack = find_attack(spec.name)
        asked[f"the attack '{label}'"] = (attack.config(**spec.params), attack.new_words)
    for what, (settings, words) in asked.items():
        if words or getattr(settings, "train_text_encoder", False):
            found.append(
                f"{recipe.base}: {what} trains the text encoder or its words, which guardsmith does on {SD.name} only; leave it "
                "out, or set its train_text_encoder to false."
            )
    return found
