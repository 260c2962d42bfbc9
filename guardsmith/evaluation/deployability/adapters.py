"""Adapters: what people made on the base, loaded onto the hardened model, and the other way round.

Each is trained for an unprotected subject and judged by the similarity of what it draws, counted from that of the base's ordinary
pictures. Both models draw the same prompts from the same noise.

    lora, lora_conv     written and read by diffusers' own pipeline, as LoRA files are
    loha                by peft, for diffusers' pipeline does not read LoHa
    textual_inversion   `load_textual_inversion` of diffusers' pipeline
    custom_diffusion    the keys and values of the cross-attention as they are, which is what its files hold, and the new word
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from torch import Tensor

from guardsmith.attacks import AttackData, find_attack, lora
from guardsmith.config.deployability import ADAPTERS, AdapterKind
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures
from guardsmith.evaluation.deployability.bench import SIDES, Bench, attempt
from guardsmith.evaluation.deployability.intervals import paired_ratio
from guardsmith.gate.deployability import Measurement
from guardsmith.registry.loader import Subject

NAMES: dict[AdapterKind, str] = {
    "lora": "LoRA (attention)", "lora_conv": "LoRA (attention, linear layers, convolutions)", "loha": "LoHa",
    "textual_inversion": "textual inversion", "custom_diffusion": "Custom Diffusion",
}  # fmt: skip


WORD = "word"
"""Name of a new word's vector among an adapter's weights."""


def config_of(bench: Bench, kind: AdapterKind) -> Any:
    """The settings that an adapter is trained with."""
    name, own = ADAPTERS[kind]
    return find_attack(name).config(**own | bench.spec.adapters[kind])


def identity_of(bench: Bench, kind: AdapterKind, subject: Subject) -> tuple[Any, ...]:
    """Everything that an adapter depends on beside the model it is trained on."""
    attack, settings = find_attack(ADAPTERS[kind][0]), config_of(bench, kind).model_dump(mode="json")
    digests = [image.sha256 for image in subject.images_of("attack")]
    return kind, attack.revision, settings, digests, subject.class_noun, bench.identifier, bench.seed


def trained(bench: Bench, side: str, kind: AdapterKind, subject: Subject) -> dict[str, Tensor]:
    """Weights of an adapter of this kind for the subject, trained on a side, by the names that `load_onto` reads."""
    model = bench.models[side]
    images = open_pictures([image.path for image in subject.images_of("attack")], model.image_size)
    data = AttackData(images, torch.empty(0), bench.identifier, subject.class_noun)
    personalized, _ = find_attack(ADAPTERS[kind][0]).run(model, data, config_of(bench, kind), seed=bench.seed)
    if kind in ("lora", "lora_conv"):
        return {name: value.detach().cpu() for name, value in get_peft_model_state_dict(personalized.unet).items()}
    weights = {
        name: value.detach().cpu() for name, value in personalized.unet.named_parameters()
        if (kind == "loha" and "hada_" in name) or (kind == "custom_diffusion" and crossing(name))
    }  # fmt: skip
    if kind != "loha":
        token = personalized.tokenizer.convert_tokens_to_ids(f"<{bench.identifier}>")
        weights[WORD] = personalized.text_encoder.get_input_embeddings().weight[token].detach().cpu().clone()
    return weights


def crossing(name: str) -> bool:
    """Whether a parameter is of the keys or values of the cross-attention."""
    return "attn2.to_k" in name or "attn2.to_v" in name


def load_onto(bench: Bench, side: str, kind: AdapterKind, weights: Mapping[str, Tensor]) -> Any:
    """A pipeline of a side with an adapter that was made on either."""
    pipeline = bench.load(side)
    if kind in ("lora", "lora_conv"):
        layers = convert_state_dict_to_diffusers(dict(weights))
        pipeline.load_lora_weights({f"unet.{name}": value for name, value in layers.items()})
    elif kind == "loha":
        lora.add_adapters(pipeline.unet, config_of(bench, kind).rank, 0, kind="loha")
        with torch.no_grad():
            for name, value in pipeline.unet.named_parameters():
                if value.requires_grad:
                    value.copy_(weights[name])
        pipeline.unet.requires_grad_(False)
    else:
        word = f"<{bench.identifier}>"
        pipeline.load_textual_inversion({word: weights[WORD][None]}, token=word)
        if kind == "custom_diffusion":
            with torch.no_grad():
                for name, value in pipeline.unet.named_parameters():
                    if crossing(name):
                        value.copy_(weights[name])
    return pipeline


def similarities(bench: Bench, pictures: Tensor, subject: Subject, floor: float) -> list[float]:
    """Similarity of each picture to the subject, counted from a floor; a picture that cannot be scored is at the floor."""
    size = bench.judge.size or bench.models["base"].image_size
    references = open_pictures([image.path for image in subject.images_of("reference")], size)
    return [0.0 if score is None else score - floor for score in bench.judge.similarity(pictures, references)]


def case(bench: Bench, kind: AdapterKind, subject: Subject) -> list[Measurement]:
    """One kind both ways."""
    floor = sum(similarities(bench, bench.plain("base"), subject, 0.0)) / bench.spec.images
    identity = identity_of(bench, kind, subject)
    adapters = {
        side: bench.kept(side, f"adapter {kind}", partial(trained, bench, side, kind, subject), *identity)
        for side in SIDES
    }
    prompts = find_attack(ADAPTERS[kind][0]).prompts(bench.identifier, subject.class_noun, bench.spec.adapter_images)
    pictures, scores = {}, {}
    for maker, user in (("base", "base"), ("base", "hardened"), ("hardened", "base")):

        def draw(maker: str = maker, user: str = user) -> Tensor:
            return bench.draw(load_onto(bench, user, kind, adapters[maker]), prompts=prompts, count=len(prompts))

        if maker == user:
            pictures[maker, user] = bench.pictures(
                user, f"with {kind}", draw, *identity, count=len(prompts), prompts=prompts
            )
        else:  # depends on both models
            pictures[maker, user] = draw()
        scores[maker, user] = similarities(bench, pictures[maker, user], subject, floor)
    own = scores["base", "base"]
    measurements = []
    for maker, user in (("base", "hardened"), ("hardened", "base")):
        name, retention = f"{NAMES[kind]}: made on the {maker}, used on the {user}", scores[maker, user]
        ratio = paired_ratio(retention, own)
        if ratio is None:
            raise UserError(f"{NAMES[kind]} made on the base learns nothing there; give it other settings")
        measurements.append(Measurement(
            check="adapters", case=name, measure="retention", value=ratio.mean, low=ratio.low, high=ratio.high, n=len(own),
            base=sum(own) / len(own), hardened=sum(retention) / len(retention), subject=subject.id,
            pictures=bench.strip("adapters", name, pictures["base", "base"], pictures[maker, user]),
        ))  # fmt: skip
    return measurements


def run(bench: Bench) -> list[Measurement]:
    """Every kind that the recipe names, for the first unprotected subject."""
    if not bench.spec.trained:
        return []
    if not bench.controls:
        error = "the registry has no controls to make adapters for"
        return [Measurement(check="adapters", case="all adapters", measure="retention", error=error)]
    subject = bench.controls[0]
    return [
        m for kind in bench.spec.adapters
        for m in attempt("adapters", NAMES[kind], "retention", partial(case, bench, kind, subject))
    ]  # fmt: skip
