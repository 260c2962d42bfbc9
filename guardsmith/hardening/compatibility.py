"""Whether a registry and a recipe fit the base, checked before anything runs."""

from __future__ import annotations

from guardsmith.attacks import find_attack
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import UserError
from guardsmith.diffusion.prompts import lost_words
from guardsmith.methods import find_method
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.families import SD
from guardsmith.registry.loader import Registry, unknown_class_nouns

CLASSES_OF_AVATAR = ("person", "character", "robot")


def check_against_base(model: DiffusionModel, registry: Registry, recipe: Recipe) -> None:
    """Check what depends on the model: class nouns it does not know, identifiers its tokenizer drops, methods not made for it.

    Raises:
        UserError: every problem, one sentence a line.
    """
    problems = unknown_class_nouns(registry, CLASSES_OF_AVATAR) if model.source == "builtin:avatar" else []
    names = {name for subject in registry.subjects for name in subject.identifiers} | set(recipe.verify.identifiers)
    names |= set(recipe.method.params.get("identifiers", ()))
    problems += _not_for_this_family(model, recipe)
    method = find_method(recipe.method.name)
    try:
        method.check_base(method.config(**recipe.method.params), model.unet)
        capacity = method.capacity(model.unet)
    except UserError as error:
        problems.append(f"{recipe.base}: {error}")
        capacity = None
    if capacity is not None and len(registry.subjects) > capacity:
        problems.append(
            f"{registry.path}: {recipe.method.name} has room for {capacity} subjects in this base, and there are "
            f"{len(registry.subjects)}; protect fewer of them in one model."
        )
    problems += [
        f"{registry.path}: the identifier '{word}' has no token in this model's tokenizer; choose another."
        for word in sorted(lost_words(model, names))
    ]
    if problems:
        raise UserError("\n".join(problems))


def _not_for_this_family(model: DiffusionModel, recipe: Recipe) -> list[str]:
    """One sentence for the method and for each attack of the recipe that the model's family does not support."""
    if model.family is SD:
        return []
    method = find_method(recipe.method.name)
    trains_text = {f"the method {method.name}": method.trains_text_encoder(method.config(**recipe.method.params))}
    for label, spec in recipe.verify.attacks.items():
        attack = find_attack(spec.name)
        encoder = getattr(attack.config(**spec.params), "train_text_encoder", False)
        trains_text[f"the attack '{label}'"] = attack.new_words or encoder
    return [
        f"{recipe.base}: {what} trains the text encoder or its words, which guardsmith does on {SD.name} only; leave it out, or "
        "set its train_text_encoder to false."
        for what, trains in trains_text.items()
        if trains
    ]
