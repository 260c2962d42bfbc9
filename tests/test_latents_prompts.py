from types import SimpleNamespace

import pytest
import torch
from tiny import TOKENS, WIDTH, pictures

from guardsmith.diffusion import latents
from guardsmith.diffusion.latents import LatentStore, decode, encode
from guardsmith.diffusion.prompts import (
    HARDENING_IDENTIFIERS,
    HARDENING_TEMPLATES,
    SAMPLE_TEMPLATES,
    UNSEEN_IDENTIFIERS,
    VERIFICATION_TEMPLATES,
    PromptBank,
    benign_prompts,
    class_prompt,
    instance_prompt,
    lost_words,
)
from guardsmith.metrics.fidelity import TRAITS
from guardsmith.training.loop import generator


def test_a_store_holds_the_scaled_posterior_of_every_picture(tiny_v, monkeypatch):
    images = pictures(5)
    monkeypatch.setattr(latents, "PIXELS", 2 * images.shape[-1] ** 2)  # two at a time
    store = encode(tiny_v, images)
    assert len(store) == 5
    assert store.mean.shape == (5, 4, 8, 8)
    assert tiny_v.vae.config.scaling_factor == 0.7
    for i, image in enumerate(images):
        with torch.no_grad():
            posterior = tiny_v.vae.encode(image[None]).latent_dist
        assert torch.allclose(store.mean[i], 0.7 * posterior.mean[0], atol=1e-5)
        assert torch.allclose(store.std[i], 0.7 * posterior.std[0], atol=1e-5)
    assert not store.mean.requires_grad


@pytest.mark.parametrize(("side", "at_once"), [(64, 16), (256, 1), (512, 1), (1024, 1)])
def test_pictures_go_through_the_vae_a_few_at_a_time(side, at_once):
    """A gibibyte each at 512: sixteen at once were the peak of a hardening's memory."""
    parts = latents.few(torch.zeros(17, 1), side)
    assert [len(part) for part in parts] == [at_once] * (17 // at_once) + [17 % at_once] * (at_once > 1)


def test_pictures_are_decoded_a_few_at_a_time_to_the_same(tiny_v, monkeypatch):
    given, sizes = torch.randn(5, 4, 8, 8, generator=generator(1)), []
    with torch.no_grad():
        wanted = tiny_v.decode(given)
    monkeypatch.setattr(latents, "PIXELS", 2 * tiny_v.image_size**2)
    watch = tiny_v.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert torch.allclose(decode(tiny_v, given), wanted, atol=1e-5)
    watch.remove()
    assert sizes == [2, 2, 1]


def test_samples_have_the_posteriors_mean_and_deviation(tiny_v):
    store = encode(tiny_v, pictures(2))
    samples = store.sample(torch.ones(4000, dtype=torch.int64), generator(0))
    assert samples.shape == (4000, 4, 8, 8)
    error = (samples.mean(dim=0) - store.mean[1]) / (store.std[1] / 4000**0.5)
    assert error.abs().max() < 5  # 256 entries
    assert float(error.std()) == pytest.approx(1, abs=0.2)
    assert torch.allclose(samples.std(dim=0) / store.std[1], torch.ones(4, 8, 8), atol=0.06)


def test_samples_are_reproducible_and_of_the_asked_pictures():
    store = LatentStore(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 8, 8), torch.zeros(3, 4, 8, 8))
    rows = torch.tensor([2, 0, 2])
    assert store.sample(rows, generator(0))[:, 0, 0, 0].tolist() == [2, 0, 2]
    drawn = store.draw(300, generator(0))[:, 0, 0, 0].tolist()
    assert all(70 < drawn.count(value) < 130 for value in (0, 1, 2))
    assert torch.equal(store.draw(5, generator(1)), store.draw(5, generator(1)))
    assert not torch.equal(store.draw(50, generator(1)), store.draw(50, generator(2)))


@pytest.mark.parametrize("bad", [1.1, -1.1, 255.0, float("nan"), float("inf")])
def test_pictures_out_of_range_are_refused(tiny_v, bad):
    images = pictures(2)
    images[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        encode(tiny_v, images)


def test_contexts_are_the_text_encoders_last_hidden_states(tiny):
    prompts = ["a photo of sks person", "", "sks", "a photo of sks person"]
    found = PromptBank(tiny).encode(prompts)
    assert found.shape == (4, TOKENS, WIDTH)
    assert torch.equal(found[0], found[3])
    for prompt, context in zip(prompts, found, strict=True):
        ids = tiny.tokenizer(prompt, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = tiny.text_encoder(ids).last_hidden_state[0]
        assert torch.allclose(context, expected, atol=1e-6)
    assert not found.requires_grad


def test_a_prompt_is_encoded_once(tiny_v, monkeypatch):
    bank, calls = PromptBank(tiny_v), []
    forward = type(tiny_v.text_encoder).forward

    def count(self, ids, *rest, **options):
        calls.append(len(ids))
        return forward(self, ids, *rest, **options)

    monkeypatch.setattr(type(tiny_v.text_encoder), "forward", count)
    first = bank.encode(["a", "b", "a"])
    second = bank.encode(["b", "c"])
    assert calls == [2, 1]
    assert torch.equal(first[1], second[0])
    bank.encode(["a", "b", "c"])
    assert calls == [2, 1]


def test_prompts_are_padded_and_cut_to_full_length(tiny_v):
    bank = PromptBank(tiny_v)
    tokens = bank.tokens(["a", "b " * 100])
    start, end = tiny_v.tokenizer.bos_token_id, tiny_v.tokenizer.eos_token_id
    assert tokens.shape == (2, TOKENS)
    assert tokens.dtype == torch.int64
    assert tokens[:, 0].tolist() == [start, start]
    assert tokens[0, 2:].tolist() == [end] * (TOKENS - 2)
    assert tokens[1, -1] == end
    assert end not in tokens[1, :-1]


def test_prompts_keep_their_spaces_and_have_no_quotes():
    """APDM's run script trained on "a_photo_of_sks_person", quotes included, and sampled from other words."""
    assert instance_prompt("sks", "person") == "a photo of sks person"
    assert class_prompt("person") == "a photo of person"
    assert SAMPLE_TEMPLATES[0] == "a photo of {identifier} {class_noun}"
    for template in SAMPLE_TEMPLATES:
        prompt = instance_prompt("t@t", "small dog", template)
        assert "t@t small dog" in prompt
        assert not set(prompt) & set("_\"'{}")
    assert instance_prompt("{x}", "a{b}") == "a photo of {x} a{b}"


def test_verification_uses_words_that_hardening_does_not():
    assert not set(HARDENING_IDENTIFIERS) & set(UNSEEN_IDENTIFIERS)
    assert not set(HARDENING_TEMPLATES) & set(VERIFICATION_TEMPLATES)


def test_words_that_the_tokenizer_drops_are_found(tiny_v):
    assert lost_words(tiny_v, HARDENING_IDENTIFIERS) == []
    assert lost_words(tiny_v, UNSEEN_IDENTIFIERS) == []
    nothing = ["", " ", "\t\n", "\u3000", "<|endoftext|>", "<|startoftext|>"]
    assert lost_words(tiny_v, ["sks", *nothing, "zwx"]) == nothing


def test_words_that_reach_the_model_are_not_lost(tiny_v):
    """Byte-level BPE has a token for everything else: also for accents, emoji and zero-width characters."""
    words = ["é", "你好", "🦊", "\u200b", "\ufeff", "\u0301", "-", "1", "t@t"]
    assert lost_words(tiny_v, words) == []
    tokens = PromptBank(tiny_v).tokens([instance_prompt(word, "person") for word in ("\u200b", "")])
    assert not torch.equal(tokens[0], tokens[1])


def test_ordinary_prompts_are_the_same_every_time(tiny_v):
    first = benign_prompts(tiny_v, HARDENING_TEMPLATES, 40, 0)
    assert first == benign_prompts(tiny_v, HARDENING_TEMPLATES, 40, 0)
    assert first[:10] == benign_prompts(tiny_v, HARDENING_TEMPLATES, 10, 0)
    assert first != benign_prompts(tiny_v, HARDENING_TEMPLATES, 40, 1)
    assert len({prompt.text for prompt in first}) > 20
    assert all(prompt.traits == {} for prompt in first)
    other = benign_prompts(tiny_v, VERIFICATION_TEMPLATES, 40, 0)
    assert not {prompt.text for prompt in first} & {prompt.text for prompt in other}


def test_ordinary_prompts_of_the_embedded_base_ask_for_what_can_be_checked():
    prompts = benign_prompts(SimpleNamespace(source="builtin:avatar"), VERIFICATION_TEMPLATES, 300, 0)
    assert {prompt.traits["class"] for prompt in prompts} == set(TRAITS["class"])
    for prompt in prompts:
        assert prompt.traits
        for trait, value in prompt.traits.items():
            assert value in TRAITS[trait]
            if trait != "glasses":
                assert value in prompt.text
        worn = {"yes": "wearing glasses", "no": "without glasses"}.get(prompt.traits.get("glasses"))
        assert (worn is None) == (prompt.traits["class"] != "person")
        assert worn is None or worn in prompt.text
    assert {prompt.traits["style"] for prompt in prompts} == set(TRAITS["style"])


def test_ordinary_prompts_are_the_same_in_another_process():
    """Sets and hashes of words differ between processes; these lines were printed by one of them."""
    found = benign_prompts(SimpleNamespace(source="builtin:avatar"), ("a {}", "the {}"), 3, 3)
    assert [prompt.text for prompt in found] == [
        "a blue robot on a orange background in bottts style",
        "the tan person with black hair wearing glasses on a yellow background in avataaars style",
        "the brown character with red hair on a gray background in toon style",
    ]
    found = benign_prompts(SimpleNamespace(source="a folder"), ("a {}", "the {}"), 3, 3)
    assert [prompt.text for prompt in found] == [
        "a mountain on the beach",
        "the bicycle on a table",
        "the dog in a garden",
    ]
