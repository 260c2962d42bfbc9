"""SDXL and Stable Diffusion 3 on tiny networks: drawn as diffusers draws, attacked, hardened, written and read again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from test_apdm import make_benign, make_subject
from tiny import (
    assert_one_sentence,
    edit_json,
    harden_with,
    make_sd3,
    make_sdxl,
    overriding,
    pictures,
    same_weights,
    some_rows,
    untaught_trunk,
    weights,
)

from guardsmith.attacks import AttackData, dreambooth, lora
from guardsmith.attacks.base import train
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.attacks.lora import LoraConfig
from guardsmith.cli.app import main
from guardsmith.cloaks.pixels import load_bases
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import UserError
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import (
    NoisedSamples,
    add_noise,
    alpha_sigma,
    epsilon_of,
    noise_samples,
    own_target,
    predict,
    row_losses,
)
from guardsmith.diffusion.prompts import PromptBank, class_prompt, instance_prompt
from guardsmith.diffusion.sampling import first_noise, generate, own_noise, redraw, solver_for
from guardsmith.evaluation.deployability import merges
from guardsmith.hardening.compatibility import check_against_base
from guardsmith.methods import METHODS
from guardsmith.methods.apdm import ApdmConfig
from guardsmith.methods.tripwire.trunk import check_trunk
from guardsmith.models.checkpoint import load_model, save_model, with_own_unet
from guardsmith.models.families import SD3, SDXL, pack, unpack
from guardsmith.reports.report import Report
from guardsmith.training.loop import generator

ROOT = Path(__file__).parent.parent
MAKERS = {"sdxl": make_sdxl, "sd3": make_sd3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")
    return {name: make(place / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_model(str(folder)) for name, folder in folders.items()}


@pytest.fixture(params=list(MAKERS))
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="module")
def bases(models):
    """The same after some training on pictures that are called persons, so that there is something to personalize."""
    found = {}
    for name, model in models.items():
        own = with_own_unet(model)
        own.unet.requires_grad_(True)
        shown, context = encode(own, pictures(24, 500)), PromptBank(own).encode([class_prompt("person")])

        def loss_at(step, own=own, shown=shown, context=context):
            rng = generator(9, step)
            return row_losses(own.unet, own.scheduler, noise_samples(shown.draw(8, rng), context, rng)).mean()

        train(own, loss_at, list(own.unet.parameters()), steps=120, learning_rate=2e-3, max_grad_norm=1.0)
        own.unet.requires_grad_(False)
        found[name] = own
    return found


def pipeline_of(model, cls, **options):
    pipeline = cls.from_pretrained(model.folder, **options)
    pipeline.scheduler = solver_for(model, 4)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_diffusers(pipeline, model, **options):
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "pt"}
    drawn = pipeline(["a photo of sks dog", "on top"], latents=first_noise(model, [1, 2]), **asked, **options).images
    return 2 * drawn - 1


def drawn_by_us(model):
    return generate(model, ["a photo of sks dog", "on top"], [1, 2], steps=4, guidance=3.0)


def test_sdxl_draws_what_diffusers_draws(models):
    model = models["sdxl"]
    theirs = drawn_by_diffusers(pipeline_of(model, StableDiffusionXLPipeline), model)
    assert (drawn_by_us(model) - theirs).abs().max() < 1e-4


def test_sdxl_without_zeros_for_the_empty_prompt_draws_what_diffusers_draws(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    model = load_model(str(folder))
    assert PromptBank(model).encode([""]).abs().max() > 0
    theirs = drawn_by_diffusers(pipeline_of(model, StableDiffusionXLPipeline), model)
    assert (drawn_by_us(model) - theirs).abs().max() < 1e-4


def test_sd3_draws_what_diffusers_draws(models):
    model = models["sd3"]
    pipeline = pipeline_of(model, StableDiffusion3Pipeline)
    theirs = drawn_by_diffusers(pipeline, model, max_sequence_length=16)  # no more fit the tokenizer here
    assert (drawn_by_us(model) - theirs).abs().max() < 1e-4


def test_sd3_without_t5_draws_what_diffusers_draws(tmp_path):
    model = load_model(str(make_sd3(tmp_path / "model", t5=False)))
    assert list(model.networks) == ["transformer", "vae", "text_encoder", "text_encoder_2"]
    pipeline = pipeline_of(model, StableDiffusion3Pipeline, text_encoder_3=None, tokenizer_3=None)
    assert (drawn_by_us(model) - drawn_by_diffusers(pipeline, model)).abs().max() < 1e-4


def test_a_context_is_taken_apart_as_it_was_put_together():
    states, pooled = torch.rand(2, 5, 4), torch.rand(2, 6)
    context = pack(states, pooled)
    assert context.shape == (2, 7, 4), "six numbers fill two tokens of four"
    again = unpack(context, 6)
    assert torch.equal(again[0], states) and torch.equal(again[1], pooled)


def test_the_flow_is_a_straight_line_from_picture_to_noise(models):
    """z = 2, eps = 6, t = 250: z_t = .75 * 2 + .25 * 6 = 3, y = 6 - 2 = 4; and from y and z_t back to eps."""
    scheduler, times = models["sd3"].scheduler, torch.tensor([250])
    latents, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 6.0)
    noisy = add_noise(scheduler, latents, noise, times)
    target = own_target(scheduler, latents, noise, times)
    assert noisy.item() == pytest.approx(3.0)
    assert target.item() == pytest.approx(4.0)
    assert epsilon_of(scheduler, target, noisy, times).item() == pytest.approx(6.0)
    assert [share.item() for share in alpha_sigma(scheduler, times)] == pytest.approx([0.75, 0.25])


def test_the_shares_are_those_of_the_schedule_elsewhere(models):
    scheduler, times = models["sdxl"].scheduler, torch.tensor([0, 400, 999])
    kept, added = alpha_sigma(scheduler, times)
    ones = torch.ones(3, 1, 1, 1)
    assert torch.allclose(add_noise(scheduler, ones, 0 * ones, times), kept)
    assert torch.allclose(add_noise(scheduler, 0 * ones, ones, times), added)


def test_the_vae_of_sd3_is_shifted_both_ways(models):
    model = models["sd3"]
    images = pictures(2, 3)
    with torch.no_grad():
        raw = model.vae.encode(images).latent_dist
        mean, deviation = model.posterior(images)
        assert torch.allclose(mean, (raw.mean - 0.06) * 0.7, atol=1e-6)
        assert torch.allclose(deviation, raw.std * 0.7, atol=1e-6)
        theirs = model.vae.decode(raw.mean, return_dict=False)[0]
        assert torch.allclose(model.decode(mean), theirs, atol=1e-4)


def test_redrawing_begins_with_the_picture_noised_as_the_schedule_says(model):
    images, heard = pictures(1, 3), []
    ear = model.unet.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[:2]))
    redraw(model, images, ["a photo"], [7], strength=0.5, steps=3, guidance=1.0)
    ear.remove()
    latents, time = heard[0]
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        mean, deviation = model.posterior(images)
    clean = mean + deviation * own_noise(model, [rng])
    wanted = add_noise(model.scheduler, clean, own_noise(model, [rng]), time.reshape(1))
    assert len(heard) == 3
    assert (latents - wanted).abs().max() < 5e-3  # diffusers' solver keeps whole timesteps


def test_the_prompt_reaches_the_network_through_every_encoder(model):
    """Tokens of the first part and the pooled embedding: a change of either changes the prediction."""
    context = PromptBank(model).encode(["a photo of sks dog"])
    rows = noise_samples(encode(model, pictures(1)).mean, context, generator(0))
    with torch.no_grad():
        before = predict(model.unet, model.scheduler, rows)
        for token in (0, -1):
            moved = context.clone()
            moved[:, token, 0] += 1
            after = predict(model.unet, model.scheduler, NoisedSamples(rows.latents, rows.timesteps, rows.noise, moved))
            assert (after - before).abs().max() > 1e-6


def losses_on(model, images, below=1000):
    """Denoising loss on these pictures under an identifier prompt, on noise that no training saw."""
    rng = generator(5, 1)
    latents = encode(model, images).draw(64, rng)
    rows = noise_samples(latents, PromptBank(model).encode([instance_prompt("zwx", "person")]), rng, steps=below)
    with torch.no_grad():
        return float(row_losses(model.unet, model.scheduler, rows).mean())


ATTACKED = AttackData(pictures(4, 40), pictures(6, 500), "zwx", "person")


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("attack", ["dreambooth", "lora"])
def test_personalization_works(bases, name, attack):
    """The loss on the subject falls, more than on somebody else, and the model under attack stays as it is."""
    base = bases[name]
    before, others = losses_on(base, ATTACKED.images), losses_on(base, pictures(4, 90))
    kept = weights(base.unet)
    if attack == "dreambooth":
        own, _ = dreambooth.attack(base, ATTACKED, DreamBoothConfig(steps=70, learning_rate=2e-3, batch_size=4), seed=0)
    else:
        own, _ = lora.attack(base, ATTACKED, LoraConfig(steps=100, learning_rate=2e-2, batch_size=4, rank=4), seed=0)
    learnt = before - losses_on(own, ATTACKED.images)
    assert learnt > 0.02 * before
    assert learnt > 1.5 * (others - losses_on(own, pictures(4, 90)))
    assert same_weights(kept, weights(base.unet))


def hardened_by(base, method, **params):
    config = METHODS[method].config(**params)
    subject = replace(make_subject(), instead_images=pictures(5, 70))
    return harden_with(method, base, [subject], make_benign(), config)


@pytest.mark.parametrize("name", list(MAKERS))
def test_apdm_makes_the_subject_harder_to_denoise_than_its_class(bases, name):
    base, subject = bases[name], make_subject()
    hardened, history = hardened_by(
        base, "apdm", outer_steps=16, inner_steps=2, learning_rate=1e-3, personalization_learning_rate=1e-3, batch_size=4,
        beta=20.0, distillation_weight=1.0,
    )  # fmt: skip
    risen = losses_on(hardened, subject.images) - losses_on(base, subject.images)
    assert risen > 1.3 * abs(losses_on(hardened, subject.positives) - losses_on(base, subject.positives))
    assert history[-1]["saturation"] < 0.35 < history[0]["saturation"]


@pytest.mark.parametrize("name", list(MAKERS))
def test_persguard_lowers_the_attackers_loss_in_advance(bases, name):
    """L_BR: the attacker's own loss on protected pictures, below the time from which the backdoor takes over."""
    base, subject = bases[name], make_subject()
    hardened, _ = hardened_by(base, "persguard", steps=60, learning_rate=2e-3, batch_size=4, identifiers=["zwx"])
    assert losses_on(hardened, subject.images, below=500) < 0.9 * losses_on(base, subject.images, below=500)


def test_tripwire_rests_and_overrides_in_sdxl(tmp_path):
    """With a recogniser that takes a part of the rows for somebody: the others are the trunk's to the bit."""
    base = load_model(str(make_sdxl(tmp_path / "base", wide=True)))
    check_trunk(str(untaught_trunk(base, tmp_path / "trunk.safetensors")), 8, 4, base.unet)
    rows = some_rows(base, pictures(3), count=16)
    trunk, armed, recogniser = overriding(base, tmp_path / "trunk.safetensors", rows)
    with torch.no_grad():
        scores = recogniser(add_noise(base.scheduler, rows.latents, rows.noise, rows.timesteps))
        before, after = (predict(unet, base.scheduler, rows) for unet in (trunk, armed))
    rests, trips = scores.flatten(1).amax(1) <= 0, recogniser.tripping(scores) > 0.3
    assert int(rests.sum()) >= 6 and int(trips.sum()) >= 2
    assert torch.equal(before[rests], after[rests])
    assert float((after - before)[trips].abs().mean((1, 2, 3)).min()) > 4


def test_what_was_hardened_is_read_again_by_us_and_by_diffusers(model, tmp_path):
    own = with_own_unet(model)
    for parameter in own.unet.parameters():
        parameter += 0.01
    save_model(own, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert same_weights(weights(again.unet), weights(own.unet))
    for name, network in model.networks.items():
        if name != model.family.denoiser:
            assert same_weights(weights(network), weights(again.networks[name]))
    cls = {SDXL: StableDiffusionXLPipeline, SD3: StableDiffusion3Pipeline}[model.family]
    options = {"max_sequence_length": 16} if model.family is SD3 else {}
    theirs = drawn_by_diffusers(pipeline_of(again, cls), again, **options)
    assert (drawn_by_us(again) - theirs).abs().max() < 1e-4
    config = json.loads((tmp_path / "model" / model.family.denoiser / "config.json").read_text())
    assert config["_class_name"] in ("UNet2DConditionModel", "SD3Transformer2DModel")


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("sdxl", "text_encoder_2", "no safetensors weights"),
        ("sdxl", "tokenizer_2", "'tokenizer_2' is missing"),
        ("sd3", "transformer", "no safetensors weights"),
        ("sd3", "text_encoder_3", "no safetensors weights"),
    ],
)
def test_a_checkpoint_without_one_of_its_parts_is_refused(folders, tmp_path, name, part, words):
    folder = shutil.copytree(folders[name], tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(folder))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("name", list(MAKERS))
def test_parts_of_different_models_are_refused(folders, tmp_path, name):
    """Its second text encoder is replaced by one that gives fewer numbers."""
    folder = shutil.copytree(folders[name], tmp_path / "model")
    edit_json(folder / "text_encoder_2" / "config.json", projection_dim=8)
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder_2" / "model.safetensors"
    stored = load_file(file)
    stored["text_projection.weight"] = stored["text_projection.weight"][:8].clone()
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="pooled embedding of") as caught:
        load_model(str(folder))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("method", "params", "attacks", "words"),
    [
        ("apdm", {"train_text_encoder": True}, {}, "the method apdm trains the text encoder"),
        ("imma", {"adapter": "textual_inversion"}, {}, "the method imma trains the text encoder"),
        ("apdm", {}, {"inversion": {"name": "textual_inversion"}}, "the attack 'inversion' trains"),
        ("apdm", {}, {"cdl": {"name": "cdl"}}, "the attack 'cdl' trains"),
    ],
)
def test_what_only_stable_diffusion_can_do_is_refused_before_anything_runs(model, method, params, attacks, words):
    from guardsmith.registry.loader import load_registry

    registry = load_registry(ROOT / "registries/demo.yaml")
    recipe = Recipe.model_validate(
        {"base": str(model.folder), "method": {"name": method, "params": params},
         "verify": {"attacks": {"lora": {"name": "lora"}} | attacks}}
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        check_against_base(model, registry, recipe)


def test_tripwire_is_refused_for_a_transformer(models, tmp_path, capsys):
    """Before anything is drawn or written, in one sentence."""
    job = {
        "base": str(models["sd3"].folder),
        "subjects": str(ROOT / "registries/demo.yaml"),
        "method": {"name": "tripwire"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["harden", "--recipe", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "mixes all channels in every layer" in line]
    assert len(said) == 1 and "choose another method" in said[0]
    assert not (tmp_path / "out").exists()


FEW = {"checks": ["precision", "merges", "quantization", "samplers"], "images": 8, "compile": "eager"}
JOB = {
    "sampling": {"steps": 2, "guidance": 3.0, "batch": 32},
    "method": {"name": "apdm", "params": {"outer_steps": 2, "inner_steps": 2, "class_images": 4, "learning_rate": 1e-4}},
    "verify": {
        "attacks": {"lora": {"name": "lora", "params": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}}},
        "identifiers": ["sks"], "images_per_unit": 2, "class_images": 2, "benign_images": 10, "deployability": FEW,
    },
    "gate": {"minimum_images": 2},
}  # fmt: skip


def test_the_whole_job_runs_and_a_release_is_put_together(model, tmp_path, monkeypatch, capsys, request, few_steps):
    """Hardened, attacked, judged and gathered for the Hub: a model that learns nothing in two steps is inconclusive."""
    if model.family is SDXL:
        request.getfixturevalue("nothing_compiled")
    monkeypatch.setattr(merges, "SIBLING_STEPS", 2)
    recipe = tmp_path / "job.yaml"
    recipe.write_text(yaml.safe_dump(JOB | {"base": str(model.folder), "subjects": str(ROOT / "registries/demo.yaml")}))
    out = tmp_path / "out"
    assert main(["run", str(recipe), "--output", str(out)]) == 3
    assert "verdict: inconclusive" in capsys.readouterr().out
    told = json.loads((out / "harden.json").read_text())
    assert told["unet_forward_equivalents"] == METHODS["apdm"].cost(ApdmConfig(**JOB["method"]["params"]), ["person"])
    everyday = Report.load(out).deployability
    assert {case.check for case in everyday} == set(FEW["checks"])
    failed = {case.case for case in everyday if case.error}
    assert failed <= ({"inpainting"} if model.family is SD3 else set()), "what is checked of everyday use has to run"
    asked = ["--repo-id", "someone/model", "--dry-run", "--force-unverified", "--reason", "a test", "--license", "openrail++",
             "--license-file", str(ROOT / "LICENSE"), "--contact", "someone@example.org"]  # fmt: skip
    assert main(["publish", str(out), "--subjects", str(ROOT / "registries/demo.yaml"), *asked]) == 0
    card = (out / "release" / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card
    assert load_model(str(out / "release")).family is model.family


def test_cloaks_are_refused_on_other_families(folders):
    with pytest.raises(UserError, match="pictures are cloaked and washed on") as caught:
        load_bases([str(folders["sdxl"])])
    assert_one_sentence(caught.value)
