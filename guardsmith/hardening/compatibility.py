"""Whether a registry and a recipe fit the base, checked before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from guardsmith.attacks import find_attack
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import UserError, out_of_memory
from guardsmith.diffusion.prompts import PromptBank, lost_words
from guardsmith.methods import find_method
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.families import SD
from guardsmith.registry.loader import Registry, unknown_class_nouns

BLANK = 0.005  # deviation of a picture in [-1, 1]; black or of one colour
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


@torch.no_grad()
def check_computes(model: DiffusionModel) -> None:
    """Whether the base computes a prediction, latents and a picture in finite numbers: finite weights can be too large.

    Raises:
        UserError: which part does not, or why it cannot be computed at all.
    """
    side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
    device = next(model.unet.parameters()).device
    latents = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    half_way = torch.tensor([int(model.scheduler.config.num_train_timesteps) // 2], device=device)
    part, computed = "text_encoder", dict[str, Tensor]()
    try:
        computed[part] = PromptBank(model).encode(["a photo"]).to(device)
        part, context = model.family.denoiser, computed[part]
        computed[part] = model.unet(latents, half_way, context, return_dict=False)[0]
        part = "vae"
        picture = torch.zeros(1, 3, model.image_size, model.image_size)
        computed["vae decoder"] = model.decode(latents)
        computed["vae encoder"] = torch.cat([each.flatten() for each in model.posterior(picture)])
    except Exception as error:  # parts that do not belong together fail anywhere in the libraries
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{model.source}: its {part} cannot be computed ({reason}); its parts do not belong together."
        ) from error
    for part, values in computed.items():
        if float(values.std()) == 0:
            raise UserError(
                f"{model.source}: its {part} computes the same number everywhere, so every picture would be of one colour; the "
                "checkpoint is broken."
            )
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"{model.source}: its {part} computes numbers that are not finite, so every picture would be black; the "
                "checkpoint is broken."
            )


def check_class_pictures(noun: str, pictures: Tensor, source: str) -> None:
    """Whether pictures of a class show anything.

    Args:
        noun: the class.
        pictures: that the base drew, float32 (n, 3, h, w) in [-1, 1].
        source: the base, for messages.

    Raises:
        UserError: most of them are of one colour.
    """
    blank = int((~(pictures.flatten(1).std(dim=1) >= BLANK)).sum())  # NaN is blank too
    if 2 * blank > len(pictures):
        raise UserError(
            f"{source}: {blank} of {len(pictures)} of its pictures of the class {noun} are blank; the base is broken, or its "
            "half-precision VAE overflows: use one that draws."
        )
