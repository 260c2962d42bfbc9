import copy

import pytest
import torch
from pydantic import ValidationError
from tiny import pictures, same_weights, weights

from guardsmith.attacks import (
    ATTACKS,
    AttackData,
    cdl,
    custom_diffusion,
    draw_after_attack,
    draw_during_attack,
    dreambooth,
    lora,
    textual_inversion,
)
from guardsmith.attacks.custom_diffusion import CustomDiffusionConfig
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.attacks.lora import LoraConfig
from guardsmith.attacks.textual_inversion import TextualInversionConfig
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank
from guardsmith.training.loop import UNetCost, generator

NOTHING = torch.empty(0)


def make_data(class_images=4, identifier="sks"):
    return AttackData(pictures(2), pictures(class_images, 9) if class_images else NOTHING, identifier, "person")


def loss_on(model, data, prompt="a photo of sks person"):
    """Denoising loss on the subject's pictures, always with the same timesteps and noise."""
    rng = generator(99)
    context = PromptBank(model).encode([prompt])
    with torch.no_grad():
        rows = noise_samples(encode(model, data.images).draw(64, rng), context, rng)
        return float(row_losses(model.unet, model.scheduler, rows).mean())


def state(model):
    return {name: weights(getattr(model, name)) for name in ("unet", "vae", "text_encoder")}


def same_state(first, second):
    return all(same_weights(first[name], second[name]) for name in first)


def test_dreambooth_learns_the_subject_and_leaves_the_base_alone(tiny):
    data, before = make_data(), state(tiny)
    config = DreamBoothConfig(learning_rate=1e-3, steps=40, batch_size=2)
    own, losses = dreambooth.attack(tiny, data, config, seed=0)
    assert loss_on(own, data) < 0.95 * loss_on(tiny, data)
    assert len(losses) == 40
    assert sum(losses[-10:]) < sum(losses[:10])
    assert same_state(before, state(tiny))
    assert own.unet is not tiny.unet
    assert same_weights(weights(own.text_encoder), before["text_encoder"])
    assert same_weights(weights(own.vae), before["vae"])
    for part in (own.unet, tiny.unet, own.text_encoder):
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
        assert not part.training


def test_every_weight_of_the_unet_is_trained(tiny_v):
    own, _ = dreambooth.attack(tiny_v, make_data(), DreamBoothConfig(learning_rate=1e-3, steps=1, batch_size=1), seed=0)
    before, after = weights(tiny_v.unet), weights(own.unet)
    assert not [name for name in before if torch.equal(before[name], after[name])]


def everything(model):
    """All weights that an attack may change."""
    return {**weights(model.unet), **{f"text.{name}": value for name, value in weights(model.text_encoder).items()}}


# What some do before their training, in a step or two.
SHORT = {
    "unlearn_first": {"unlearn_steps": 2},
    "purified_cdl": {"purifier": "impress", "purifier_params": {"steps": 1}},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_seed_decides(tiny_v, name):
    attack = ATTACKS[name]
    config = attack.config(learning_rate=1e-3, steps=3, batch_size=1, **SHORT.get(name, {}))
    first, second, other = (attack.run(tiny_v, make_data(), config, seed=seed) for seed in (1, 1, 2))
    assert same_weights(everything(first[0]), everything(second[0]))
    assert first[1] == second[1]
    assert not same_weights(everything(first[0]), everything(other[0]))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_global_generator_is_neither_used_nor_moved(tiny_v, name):
    attack = ATTACKS[name]
    config = attack.config(learning_rate=1e-3, steps=2, batch_size=1, **SHORT.get(name, {}))
    torch.manual_seed(1)
    first, _ = attack.run(tiny_v, make_data(), config, seed=0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    second, _ = attack.run(tiny_v, make_data(), config, seed=0)
    assert same_weights(everything(first), everything(second))


def test_one_step_is_adamw_on_the_mean_of_both_losses(tiny):
    """The same step by hand: own rows, own loss, plain AdamW."""
    data = make_data()
    config = DreamBoothConfig(learning_rate=1e-3, steps=1, batch_size=2, prior_weight=0.5, max_grad_norm=0.1)
    own, losses = dreambooth.attack(tiny, data, config, seed=4)

    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    rng, bank = generator(4, 0), PromptBank(tiny)
    instance = noise_samples(encode(tiny, data.images).draw(2, rng), bank.encode(["a photo of sks person"]), rng)
    prior = noise_samples(encode(tiny, data.class_images).draw(2, rng), bank.encode(["a photo of person"]), rng)
    loss = row_losses(unet, tiny.scheduler, instance).mean() + 0.5 * row_losses(unet, tiny.scheduler, prior).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in unet.parameters()]).norm()
    assert norm > 0.1  # or clipping would not be seen
    for p in unet.parameters():
        p.grad *= 0.1 / norm
    torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2).step()
    assert losses == [pytest.approx(float(loss.detach()), rel=1e-5)]
    found, expected, before = weights(own.unet), weights(unet), weights(tiny.unet)
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in found)
    moved = sum(float((before[name] - expected[name]).square().sum()) for name in found)
    assert apart < 1e-3 * moved


def test_without_prior_weight_no_class_pictures_are_needed(tiny_v):
    config = DreamBoothConfig(learning_rate=1e-3, steps=2, batch_size=3, prior_weight=0)
    with UNetCost() as cost:
        without, _ = dreambooth.attack(tiny_v, make_data(0), config, seed=0)
    assert (cost.forwards, cost.backwards) == (6, 6)
    # And where there are some they make no difference.
    given, _ = dreambooth.attack(tiny_v, make_data(4), config, seed=0)
    assert same_weights(weights(without.unet), weights(given.unet))


def test_the_prior_doubles_the_rows_and_changes_the_result(tiny_v):
    config = DreamBoothConfig(learning_rate=1e-3, steps=2, batch_size=3)
    with UNetCost() as cost:
        with_prior, _ = dreambooth.attack(tiny_v, make_data(), config, seed=0)
    assert (cost.forwards, cost.backwards) == (12, 12)
    without, _ = dreambooth.attack(tiny_v, make_data(0), config, seed=0)
    assert not same_weights(weights(with_prior.unet), weights(without.unet))


def test_the_text_encoder_trains_only_when_asked(tiny_v):
    before, data = state(tiny_v), make_data()
    config = DreamBoothConfig(learning_rate=1e-3, steps=20, batch_size=2, train_text_encoder=True)
    own, _ = dreambooth.attack(tiny_v, data, config, seed=0)
    changed = weights(own.text_encoder)
    layers = [name for name in changed if "encoder.layers" in name]
    assert layers
    assert all(
        not torch.equal(changed[name], before["text_encoder"][name]) for name in layers if "k_proj.bias" not in name
    )
    assert same_state(before, state(tiny_v))
    assert own.text_encoder is not tiny_v.text_encoder
    assert not any(p.requires_grad or p.grad is not None for p in own.text_encoder.parameters())
    assert loss_on(own, data) < loss_on(tiny_v, data)  # a stale cache of embeddings would train another prompt


def test_the_identifier_is_what_gets_trained(tiny_v):
    config = DreamBoothConfig(learning_rate=1e-3, steps=2, batch_size=1)
    first, _ = dreambooth.attack(tiny_v, make_data(identifier="sks"), config, seed=0)
    second, _ = dreambooth.attack(tiny_v, make_data(identifier="zwx"), config, seed=0)
    assert not same_weights(weights(first.unet), weights(second.unet))


def test_progress_is_told(tiny_v):
    told = []
    config = DreamBoothConfig(learning_rate=1e-3, steps=3, batch_size=1)
    _, losses = dreambooth.attack(tiny_v, make_data(), config, seed=0, on_step=lambda *now: told.append(now))
    assert [now[:2] for now in told] == list(enumerate(losses))


@pytest.mark.parametrize("name", ATTACKS)
def test_looks_on_the_way_do_not_disturb_the_attack(tiny_v, name):
    """And each shows what an attack that ends there draws."""
    params = {"steps": 3, "batch_size": 1, "learning_rate": 1e-2} | SHORT.get(name, {})
    fixed = {"seed": 0, "count": 2, "sampling": {"steps": 2}}
    looks, losses = draw_during_attack(tiny_v, name, params, make_data(), evaluate_at=[1, 2, 3], **fixed)
    assert list(looks) == [1, 2, 3]
    for steps, images in looks.items():
        alone, without = draw_after_attack(tiny_v, name, params | {"steps": steps}, make_data(), **fixed)
        assert torch.equal(images, alone)
        assert losses[:steps] == without
    assert not torch.equal(looks[1], looks[3])


def test_an_attack_ends_once_it_has_enough(tiny_v):
    asked = []

    def enough(steps, images):
        asked.append((steps, len(images)))
        return steps == 3

    params = {"steps": 9, "batch_size": 1, "learning_rate": 1e-2}
    fixed = {"seed": 0, "count": 2, "sampling": {"steps": 2}}
    looks, losses = draw_during_attack(tiny_v, "lora", params, make_data(), evaluate_at=[1, 3, 5], stop=enough, **fixed)
    assert asked == [(1, 2), (3, 2)]
    assert list(looks) == [1, 3]
    assert len(losses) == 3


def without_adapters(module):
    """The weights under the names they have without adapters."""
    return {name.replace(".base_layer", ""): value for name, value in weights(module).items() if "lora_" not in name}


def test_lora_learns_the_subject_and_changes_only_adapters(tiny):
    data, before = make_data(), state(tiny)
    config = LoraConfig(learning_rate=1e-2, steps=40, batch_size=2, rank=3)
    own, losses = lora.attack(tiny, data, config, seed=0)
    assert loss_on(own, data) < 0.98 * loss_on(tiny, data)
    assert len(losses) == 40
    assert same_state(before, state(tiny))
    assert not [name for name, _ in tiny.unet.named_parameters() if "lora" in name]
    assert same_weights(without_adapters(own.unet), before["unet"])
    assert not any(p.requires_grad or p.grad is not None for p in own.unet.parameters())

    adapters = {name: value for name, value in weights(own.unet).items() if "lora_" in name}
    attentions = sum(name.endswith("to_q.weight") for name in before["unet"])
    assert len(adapters) == attentions * 4 * 2  # q, k, v, out; A and B
    assert all(value.shape[0 if "lora_A" in name else 1] == 3 for name, value in adapters.items())
    assert all(value.abs().max() > 0 for value in adapters.values())  # B starts at zero and was trained


def test_lora_starts_as_the_identity(tiny_v):
    """With a rate too small to move anything the model still draws what the base does: B = 0 at the start."""
    own, _ = lora.attack(tiny_v, make_data(), LoraConfig(learning_rate=1e-30, steps=1, batch_size=1), seed=0)
    adapters = {name: value for name, value in weights(own.unet).items() if "lora_" in name}
    assert all(value.abs().max() < 1e-20 for name, value in adapters.items() if "lora_B" in name)
    spread = torch.cat([value.flatten() for name, value in adapters.items() if "lora_A" in name]).std()
    assert float(spread) == pytest.approx(1 / 4, rel=0.1)  # peft's Gaussian start: deviation 1 / rank
    latents, context = torch.randn((2, 4, 8, 8), generator=generator(0)), PromptBank(tiny_v).encode(["a", "b"])
    with torch.no_grad():
        expected, found = (m.unet(latents, torch.tensor([5, 700]), context).sample for m in (tiny_v, own))
    assert torch.equal(expected, found)
    other, _ = lora.attack(tiny_v, make_data(), LoraConfig(learning_rate=1e-30, steps=1, batch_size=1), seed=1)
    starts = [adapters, weights(other.unet)]
    assert not any(torch.equal(starts[0][name], starts[1][name]) for name in adapters if "lora_A" in name)


def test_lora_has_no_scale_of_its_own(tiny_v):
    """alpha = rank, so that the adapters' product is added as it is."""
    own, _ = lora.attack(tiny_v, make_data(), LoraConfig(learning_rate=1e-3, steps=2, batch_size=1, rank=2), seed=0)
    layers = [m for m in own.unet.modules() if hasattr(m, "lora_A")]
    assert layers
    for layer in layers:
        assert set(layer.scaling.values()) == {1.0}
        assert all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values())


def test_two_loras_from_one_base_do_not_meet(tiny_v):
    config = LoraConfig(learning_rate=1e-3, steps=1, batch_size=1)
    first, _ = lora.attack(tiny_v, make_data(), config, seed=0)
    kept = weights(first.unet)
    lora.attack(tiny_v, make_data(), config, seed=1)
    assert same_weights(kept, weights(first.unet))


KINDS = ("lora", "dora", "loha", "lokr")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_starts_as_the_identity_and_learns(tiny, kind):
    data, before = make_data(), state(tiny)
    still, _ = lora.attack(tiny, data, LoraConfig(kind=kind, learning_rate=1e-30, steps=1, batch_size=1), seed=0)
    latents, context = torch.randn((2, 4, 8, 8), generator=generator(0)), PromptBank(tiny).encode(["a", "b"])
    with torch.no_grad():
        expected, found = (m.unet(latents, torch.tensor([5, 700]), context).sample for m in (tiny, still))
    assert torch.allclose(expected, found, atol=1e-5)
    # the same start in the same place, another one from another seed
    again, other = (
        lora.attack(tiny, data, LoraConfig(kind=kind, learning_rate=1e-30, steps=1, batch_size=1), seed=seed)[0]
        for seed in (0, 1)
    )
    assert same_weights(weights(still.unet), weights(again.unet))
    assert not same_weights(weights(still.unet), weights(other.unet))

    own, _ = lora.attack(tiny, data, LoraConfig(kind=kind, learning_rate=1e-2, steps=25, batch_size=2, rank=3), seed=0)
    assert loss_on(own, data) < 0.98 * loss_on(tiny, data)
    assert same_state(before, state(tiny))
    assert not any(p.requires_grad or p.grad is not None for p in own.unet.parameters())


def test_the_kinds_of_adapters_are_different_ones(tiny_v):
    """By the names of their parameters in peft."""
    found = {}
    for kind in KINDS:
        own, _ = lora.attack(tiny_v, make_data(), LoraConfig(kind=kind, steps=1, batch_size=1), seed=0)
        names = {name.split(".default")[0].rsplit(".", 1)[1] for name in weights(own.unet) if ".default" in name}
        found[kind] = names
    assert found["lora"] == {"lora_A", "lora_B"}
    assert found["dora"] == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert all(name.startswith("hada_w") for name in found["loha"]) and found["loha"]
    assert all(name.startswith("lokr_w") for name in found["lokr"]) and found["lokr"]


def test_adapters_on_the_text_encoder_too(tiny_v):
    data, before = make_data(), state(tiny_v)
    config = LoraConfig(learning_rate=1e-2, steps=3, batch_size=1, train_text_encoder=True)
    own, _ = lora.attack(tiny_v, data, config, seed=0)
    assert same_state(before, state(tiny_v))
    adapters = {name: value for name, value in weights(own.text_encoder).items() if "lora_" in name}
    layers = tiny_v.text_encoder.config.num_hidden_layers
    assert len(adapters) == layers * 4 * 2  # q, k, v, out; A and B
    assert all(value.abs().max() > 0 for value in adapters.values())  # B starts at zero and was trained
    assert same_weights(without_adapters(own.text_encoder), before["text_encoder"])
    assert not any(p.requires_grad or p.grad is not None for p in own.text_encoder.parameters())
    alone, _ = lora.attack(tiny_v, data, config.model_copy(update={"train_text_encoder": False}), seed=0)
    assert alone.text_encoder is tiny_v.text_encoder
    words = ["a photo of sks person"]
    assert not torch.equal(PromptBank(own).encode(words), PromptBank(tiny_v).encode(words))


def test_cdl_trains_with_the_noise_token_and_draws_without_it(tiny_v, monkeypatch):
    import guardsmith.attacks.sampling_tricks as module

    said, asked = [], {}
    real_tokens = PromptBank.tokens
    monkeypatch.setattr(
        PromptBank, "tokens", lambda bank, prompts: said.append(list(prompts)) or real_tokens(bank, prompts)
    )
    real = module.generate
    monkeypatch.setattr(
        module, "generate", lambda model, words, *a, **k: asked.update(words=words, **k) or real(model, words, *a, **k)
    )
    draw_after_attack(
        tiny_v, "cdl", {"steps": 1, "learning_rate": 1e-3}, make_data(), seed=0, count=2, sampling={"steps": 1}
    )
    assert said[0] == ["a photo of sks person, bhj noisy pattern", "a photo of person, without bhj noisy pattern"]
    assert asked["words"] == [
        "a photo of sks person, without bhj noisy pattern", "a portrait of sks person, without bhj noisy pattern",
    ]  # fmt: skip
    assert asked["negative_prompt"] == "noisy, abstract, pattern, low quality"


def test_cdl_is_dreambooth_on_its_own_prompts(tiny_v):
    """Text encoder included: with the usual prompts it would be the usual attack."""
    config = cdl.CdlConfig(steps=2, learning_rate=1e-3)
    own, losses = cdl.attack(tiny_v, make_data(), config, seed=0)
    prompts = ("a photo of sks person, bhj noisy pattern", "a photo of person, without bhj noisy pattern")
    plain = DreamBoothConfig(**config.model_dump())
    expected, told = dreambooth.attack(tiny_v, make_data(), plain, seed=0, prompts=prompts)
    assert losses == told
    assert same_state(state(own), state(expected))
    assert not same_weights(weights(own.text_encoder), weights(tiny_v.text_encoder))
    usual, _ = dreambooth.attack(tiny_v, make_data(), plain, seed=0)
    assert not same_weights(weights(own.unet), weights(usual.unet))


def old_rows(model, base):
    """The embeddings of the words that the base knows."""
    return model.text_encoder.get_input_embeddings().weight[: base.text_encoder.config.vocab_size]


def test_textual_inversion_learns_a_word_and_nothing_else(tiny):
    data, before = make_data(), state(tiny)
    config = TextualInversionConfig(learning_rate=0.1, steps=60, batch_size=4)
    own, losses = textual_inversion.attack(tiny, data, config, seed=0)
    start, _ = textual_inversion.attack(tiny, data, TextualInversionConfig(learning_rate=1e-9, steps=1), seed=0)
    assert loss_on(own, data, "a photo of <sks>") < loss_on(start, data, "a photo of <sks>")
    assert len(losses) == 60
    assert same_state(before, state(tiny))
    assert len(tiny.tokenizer) == tiny.text_encoder.config.vocab_size

    after = state(own)
    assert same_weights(after["unet"], before["unet"])
    assert same_weights(after["vae"], before["vae"])
    table = "embeddings.token_embedding.weight"
    changed = {n for n, v in after["text_encoder"].items() if not torch.equal(v, before["text_encoder"].get(n, v))}
    assert all(name.endswith(table) for name in changed)
    assert torch.equal(old_rows(own, tiny), old_rows(tiny, tiny))
    assert own.tokenizer("<sks>").input_ids[1] == tiny.text_encoder.config.vocab_size  # one token, and a new one
    assert not any(p.requires_grad or p.grad is not None for p in own.text_encoder.parameters())
    assert not own.text_encoder.get_input_embeddings()._forward_hooks
    told = PromptBank(tiny).encode(["a photo of person"])
    assert torch.equal(PromptBank(own).encode(["a photo of person"]), told)


def test_the_new_word_starts_as_its_likeness(tiny):
    """Textual inversion starts from the class noun, Custom Diffusion from the identifier: the mean over their tokens."""
    table = tiny.text_encoder.get_input_embeddings().weight
    for attack, config, like in (
        (textual_inversion.attack, TextualInversionConfig(learning_rate=1e-12, steps=1), "person"),
        (custom_diffusion.attack, CustomDiffusionConfig(learning_rate=1e-12, steps=1), "sks"),
    ):
        own, _ = attack(tiny, make_data(), config, seed=0)
        tokens = tiny.tokenizer(like, add_special_tokens=False).input_ids
        found = own.text_encoder.get_input_embeddings().weight[tiny.text_encoder.config.vocab_size]
        assert torch.allclose(found, table[tokens].mean(0), atol=1e-6)


def test_one_step_of_textual_inversion_by_hand(tiny_v):
    """Plain AdamW on the gradient of the new row, taken through a whole table."""
    data, config = make_data(), TextualInversionConfig(learning_rate=1e-2, steps=1, batch_size=3)
    own, losses = textual_inversion.attack(tiny_v, data, config, seed=5)
    start, _ = textual_inversion.attack(tiny_v, data, TextualInversionConfig(learning_rate=1e-12, steps=1), seed=5)
    token = tiny_v.text_encoder.config.vocab_size
    rng = generator(5, int.from_bytes(b"sks", "big"), 0)
    prompts = [template.format("<sks>") for template in INVERSION_TEMPLATES]
    asked = PromptBank(start).tokens(prompts)[torch.randint(len(prompts), (3,), generator=rng)]
    table = start.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    store = encode(start, torch.cat([data.images, data.images.flip(-1)]))
    rows = noise_samples(store.draw(3, rng), start.text_encoder(asked).last_hidden_state, rng)
    loss = row_losses(start.unet, start.scheduler, rows).mean()
    loss.backward()
    assert losses == [pytest.approx(float(loss.detach()), rel=1e-5)]
    row = table[token].detach() * (1 - 1e-2 * 1e-2)  # weight decay
    expected = row - 1e-2 * table.grad[token].sign()  # AdamW's first step
    found = own.text_encoder.get_input_embeddings().weight[token]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, row, atol=5e-3)


def test_a_word_of_several_vectors(tiny_v):
    """Every prompt with the word has them all, in order; they start alike and part."""
    data, config = make_data(), TextualInversionConfig(learning_rate=1e-2, steps=4, batch_size=2, vectors=3)
    own, _ = textual_inversion.attack(tiny_v, data, config, seed=0)
    first = tiny_v.text_encoder.config.vocab_size
    asked = PromptBank(own).tokens(["a photo of <sks>, a photo"])[0].tolist()
    at = asked.index(first)
    assert asked[at : at + 3] == [first, first + 1, first + 2]
    assert asked[at + 3 :] == PromptBank(tiny_v).tokens([", a photo"])[0].tolist()[1 : len(asked) - at - 2]
    table = own.text_encoder.get_input_embeddings().weight
    assert len({tuple(row) for row in table[first : first + 3].tolist()}) == 3
    assert torch.equal(old_rows(own, tiny_v), old_rows(tiny_v, tiny_v))
    one, _ = textual_inversion.attack(tiny_v, data, config.model_copy(update={"vectors": 1}), seed=0)
    assert len(table) == len(one.text_encoder.get_input_embeddings().weight) + 2


def test_textual_inversion_under_another_name_is_another_run(tiny_v):
    config = TextualInversionConfig(steps=2, batch_size=2)
    _, first = textual_inversion.attack(tiny_v, make_data(identifier="sks"), config, seed=0)
    _, second = textual_inversion.attack(tiny_v, make_data(identifier="zwx"), config, seed=0)
    assert first != second


def test_custom_diffusion_trains_keys_values_and_a_word(tiny):
    data, before = make_data(), state(tiny)
    config = CustomDiffusionConfig(learning_rate=1e-2, steps=40, batch_size=2)
    own, _ = custom_diffusion.attack(tiny, data, config, seed=0)
    assert loss_on(own, data, "a photo of <sks> person") < loss_on(tiny, data, "a photo of sks person")
    assert same_state(before, state(tiny))
    after = state(own)
    changed = {name for name, value in after["unet"].items() if not torch.equal(value, before["unet"][name])}
    assert changed == {name for name in before["unet"] if "attn2.to_k" in name or "attn2.to_v" in name}
    assert torch.equal(old_rows(own, tiny), old_rows(tiny, tiny))
    start, _ = custom_diffusion.attack(tiny, data, CustomDiffusionConfig(learning_rate=1e-12, steps=1), seed=0)
    rows = [m.text_encoder.get_input_embeddings().weight[tiny.text_encoder.config.vocab_size] for m in (own, start)]
    assert float((rows[0] - rows[1]).detach().abs().max()) > 0.01
    assert not any(p.requires_grad or p.grad is not None for p in own.unet.parameters())

    config = CustomDiffusionConfig(learning_rate=1e-2, steps=1, parameters="cross_attention")
    faces, _ = custom_diffusion.attack(tiny, data, config, seed=0)
    wider = weights(faces.unet)
    changed = {name for name, value in wider.items() if not torch.equal(value, before["unet"][name])}
    assert changed == {name for name in before["unet"] if "attn2" in name}


def test_resized_pictures_are_masked_where_they_do_not_show():
    """White pictures on grey: every latent cell the mask keeps is white all over, and a cell that is white all over is kept."""
    seen = set()
    for seed in range(60):
        shown, masks, said = custom_diffusion.resized(torch.ones(2, 3, 64, 64), 8, generator(seed))
        assert shown.shape == (2, 3, 64, 64)
        for image, mask, phrase in zip(shown, masks, said, strict=True):
            cells = torch.nn.functional.avg_pool2d(image[None, :1], 8)[0]
            assert torch.equal(mask, (cells > 0.9999).float())
            assert mask.sum() > 0
            side = int((image[0] > 0.5).sum().sqrt().round())
            assert side >= 21
            assert (phrase in ("far away", "very small")) == (side < 0.6 * 64)
            if phrase in ("zoomed in", "close up"):
                assert side == 64
            seen.add(phrase)
    assert seen == {"", "far away", "very small", "zoomed in", "close up"}


def test_zooming_shows_a_part_at_a_larger_scale():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    for seed in range(60):
        shown, _, said = custom_diffusion.resized(ramp, 8, generator(seed))
        if said[0] in ("zoomed in", "close up"):
            assert 1 / 1.45 < float(shown.max() - shown.min()) / 2 < 1 / 1.15


def test_custom_diffusion_leaves_out_what_is_not_picture(tiny_v, monkeypatch):
    """What lies outside of the mask may be anything: the losses do not change."""
    data, config = make_data(), CustomDiffusionConfig(learning_rate=1e-12, steps=3, batch_size=4, prior_weight=0)
    _, losses = custom_diffusion.attack(tiny_v, data, config, seed=0)
    masks = []
    real = custom_diffusion.squared_errors

    def spoilt(unet, scheduler, rows):
        errors = real(unet, scheduler, rows)
        masks.append(errors)
        return errors

    monkeypatch.setattr(custom_diffusion, "squared_errors", spoilt)
    custom_diffusion.attack(tiny_v, data, config, seed=0)
    views = [custom_diffusion.resized(data.images, 8, generator(0, -1, v))[1] for v in range(custom_diffusion.VIEWS)]
    kept = torch.cat(views)
    for step, (errors, loss) in enumerate(zip(masks, losses, strict=True)):
        picked = torch.randint(len(kept), (4,), generator=generator(0, step))
        by_hand = [
            sum(float((errors[row, c].detach() * kept[i, 0]).sum()) for c in range(4)) / float(kept[i].sum())
            for row, i in enumerate(picked.tolist())
        ]
        assert loss == pytest.approx(sum(by_hand) / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("dreambooth", ["a photo of sks person", "a portrait of sks person"]),
        ("textual_inversion", ["a photo of <sks>", "a portrait of <sks>"]),
        ("custom_diffusion", ["a photo of <sks> person", "a portrait of <sks> person"]),
    ],
)
def test_the_personalized_model_is_asked_in_the_attackers_words(tiny_v, monkeypatch, name, prompts):
    import guardsmith.attacks.sampling_tricks as module

    asked = []
    real = module.generate
    monkeypatch.setattr(
        module, "generate", lambda model, words, *a, **k: asked.extend(words) or real(model, words, *a, **k)
    )
    images, losses = draw_after_attack(
        tiny_v, name, {"steps": 1, "batch_size": 1}, make_data(), seed=0, count=2, sampling={"steps": 1}
    )
    assert asked == prompts
    assert images.shape == (2, 3, 64, 64)
    assert len(losses) == 1


def test_a_word_that_exists_is_refused(tiny_v):
    """A second new word of the same name would train the first one's."""
    own, _ = textual_inversion.attack(tiny_v, make_data(), TextualInversionConfig(steps=1), seed=0)
    with pytest.raises(RunFailed, match="has a token '<sks>' already; choose another identifier"):
        custom_diffusion.attack(own, make_data(), CustomDiffusionConfig(steps=1), seed=0)


def test_the_defaults_are_diffusers():
    booth, adapter = DreamBoothConfig(), LoraConfig()
    assert (booth.learning_rate, booth.batch_size, booth.prior_weight, booth.max_grad_norm) == (5e-6, 4, 1.0, 1.0)
    assert (adapter.learning_rate, adapter.rank, adapter.steps, adapter.batch_size) == (1e-4, 4, 500, 4)
    inversion, custom = TextualInversionConfig(), CustomDiffusionConfig()
    assert (inversion.learning_rate, inversion.steps, inversion.batch_size) == (5e-4 * 4, 3000, 4)
    assert (custom.learning_rate, custom.steps, custom.batch_size) == (1e-5 * 2 * 2, 250, 2)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0}, {"batch_size": 0}, {"rnak": 4}])
def test_wrong_settings_are_refused(wrong):
    for attack in ATTACKS.values():
        with pytest.raises(ValidationError):
            attack.config(**wrong)


def test_a_diverging_attack_fails_instead_of_giving_a_broken_model(tiny):
    config = DreamBoothConfig(learning_rate=1e30, steps=5)
    with pytest.raises(RunFailed, match="the attack diverged at step"):
        dreambooth.attack(tiny, make_data(), config, seed=0)
