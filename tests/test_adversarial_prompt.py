"""Words instead of training: they are found, anyone can type them, and the weights stay as they are."""

from dataclasses import replace

import pytest
import torch
from test_attacks import make_data, state
from tiny import same_weights, weights

from guardsmith.attacks import ATTACKS
from guardsmith.attacks.adversarial_prompt import AdversarialPromptConfig, attack, project_onto_simplex, whole_words
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank
from guardsmith.diffusion.sampling import generate
from guardsmith.training.loop import generator


def test_whole_words_are_what_people_can_type(tiny):
    names = tiny.tokenizer.convert_ids_to_tokens(whole_words(tiny.tokenizer))
    assert {"sks</w>", "of</w>", "7</w>"} <= set(names)
    assert not {"sk", "ph", "<|endoftext|>", "A</w>", "Ġ</w>"} & set(names)  # parts, marks, capitals, bytes of a space
    for name in names:
        assert tiny.tokenizer.tokenize(name.removesuffix("</w>")) == [name]


def test_the_nearest_point_of_the_simplex():
    rows = torch.tensor([[0.5, 0.5, 0.5], [2.0, 0.0, 0.0], [0.6, 0.5, -1.0], [0.2, 0.3, 0.5]])
    wanted = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.55, 0.45, 0.0], [0.2, 0.3, 0.5]])
    assert torch.allclose(project_onto_simplex(rows), wanted, atol=1e-6)


@pytest.fixture
def listening(tiny_v):
    """A model to which its prompts mean a lot."""
    unet = ATTACKS["dreambooth"].run(tiny_v, make_data(), ATTACKS["dreambooth"].config(steps=1), seed=0)[0].unet
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(6)
    return replace(tiny_v, unet=unet)


def losses_by_word(model, data, words):
    """What the model errs on the subject's pictures under each single word, always with the same timesteps and noise."""
    found = {}
    for word in words:
        rng = generator(3)
        bank = PromptBank(model)
        contexts = bank.encode([template.format(f"{word} person") for template in INVERSION_TEMPLATES])
        context = contexts[torch.randint(len(contexts), (96,), generator=rng)]
        with torch.no_grad():
            rows = noise_samples(encode(model, data.images).draw(96, rng), context, rng)
            found[word] = float(row_losses(model.unet, model.scheduler, rows).mean())
    return found


def test_the_search_finds_one_of_the_best_words(listening):
    data = make_data()
    words = [
        name.removesuffix("</w>")
        for name in listening.tokenizer.convert_ids_to_tokens(whole_words(listening.tokenizer))
    ]
    losses = losses_by_word(listening, data, words)
    config = AdversarialPromptConfig(words=1, steps=60, batch_size=8, learning_rate=0.05)
    own, _ = attack(listening, data, config, seed=0)
    table = own.text_encoder.get_input_embeddings().weight
    [found] = (table[:-1] == table[-1]).all(dim=1).nonzero().flatten().tolist()
    word = own.tokenizer.convert_ids_to_tokens(found).removesuffix("</w>")
    better = sum(loss < losses[word] for loss in losses.values())
    assert better <= len(words) // 10, f"{better} of {len(words)} words are better than the one found"


def test_anyone_can_type_what_was_found_and_no_weight_has_moved(listening):
    before = state(listening)
    own, losses = attack(listening, make_data(), AdversarialPromptConfig(words=3, steps=4, learning_rate=0.1), seed=0)
    assert len(losses) == 4
    assert own.unet is listening.unet
    assert all(same_weights(before[name], after) for name, after in state(listening).items())
    table, count = own.text_encoder.get_input_embeddings().weight, listening.text_encoder.config.vocab_size
    assert same_weights({"": table[:count]}, {"": listening.text_encoder.get_input_embeddings().weight})
    typed = []
    for new in range(count, count + 3):
        [token] = (table[:count] == table[new]).all(dim=1).nonzero().flatten().tolist()
        typed.append(own.tokenizer.convert_ids_to_tokens(token).removesuffix("</w>"))
    [asked] = ATTACKS["adversarial_prompt"].prompts("sks", "person", 1)
    assert asked == "a photo of <sks> person"
    drawn = generate(own, [asked], [0], steps=2)
    assert torch.equal(drawn, generate(listening, [f"a photo of {' '.join(typed)} person"], [0], steps=2))
    assert not torch.equal(drawn, generate(listening, ["a photo of sks person"], [0], steps=2))
    assert weights(own.vae).keys() == weights(listening.vae).keys()
