"""RID: its loss and its network by hand, what training does on a small model, and the commands."""

import json

import pytest
import torch
from test_attacks import make_data
from test_cloaks import rise
from tiny import assert_one_sentence, pictures, same_weights, weights

from guardsmith.attacks import AttackData
from guardsmith.cli import app as cli
from guardsmith.cloaks import rid
from guardsmith.cloaks.pixels import PIXEL
from guardsmith.cloaks.rid import (
    Defender,
    RidConfig,
    RidTraining,
    adversarial_loss,
    applied,
    load_defender,
    train,
)
from guardsmith.core.errors import UserError
from guardsmith.core.images import to_pil
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import add_noise, epsilon_of, noise_samples
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.networks import save_network
from guardsmith.pictures.rid_training import DEFENDER
from guardsmith.training.loop import generator

TRAINING = {
    "patch": 16,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "steps": 60,
    "warm_up": 5,
    "batch_size": 4,
    "learning_rate": 1e-2,
}
NOBODY = torch.empty(0, 3, 64, 64)


def test_an_untrained_defender_changes_nothing_and_a_trained_one_keeps_the_budget():
    network, images = Defender(64, 16, 16, 2, 2), pictures(3)
    assert torch.equal(applied(network, images, 8), images)
    torch.nn.init.normal_(network.last.weight, std=10)
    change = network(images)
    assert change.shape == images.shape and float(change.detach().abs().max()) <= 1
    assert float((applied(network, images, 8) - images).detach().abs().max()) <= 8 * PIXEL + 1e-6


def test_patches_go_back_to_where_they_came_from():
    """A network that only copies patches gives the picture back."""
    network, images = Defender(32, 8, 192, 0, 1), pictures(2)[:, :, :32, :32]
    with torch.no_grad():
        network.cut.weight.copy_(torch.eye(192).reshape(192, 3, 8, 8))
        network.cut.bias.zero_()
        network.positions.zero_()
        network.last.weight.copy_(torch.eye(192))
    network.norm = torch.nn.Identity()
    assert torch.allclose(network(images), images.tanh(), atol=1e-6)


def test_every_place_has_a_position_of_its_own():
    places = rid.grid_positions(4, 18)
    assert places.shape == (16, 18)
    assert len({tuple(row) for row in places.round(decimals=4).tolist()}) == 16


def test_a_block_begins_as_nothing():
    block, tokens = rid.Block(8, 2), torch.randn(2, 5, 8)
    assert torch.equal(block(tokens), tokens), "its gates are shut"
    torch.nn.init.ones_(block.gates)
    q, k, v = block.qkv(block.norms[0](tokens)).chunk(3, -1)
    heads = [
        torch.softmax(q[..., at] @ k[..., at].transpose(1, 2) / 2, -1) @ v[..., at] for at in (slice(0, 4), slice(4, 8))
    ]
    seen = tokens + block.out(torch.cat(heads, -1))
    wanted = seen + block.narrow(torch.nn.functional.gelu(block.widen(block.norms[1](seen)), approximate="tanh"))
    assert torch.allclose(block(tokens), wanted, atol=1e-5)


def test_the_gradient_of_the_loss_by_hand(tiny, monkeypatch):
    context, kept = PromptBank(tiny).encode([" "]), {}

    def latents(model, part, rng):
        kept["z"] = encode(model, part).mean.requires_grad_()
        return kept["z"]

    monkeypatch.setattr(rid, "sampled_latents", latents)
    adversarial_loss(tiny, pictures(2), context, generator(1)).backward()
    rows = noise_samples(kept["z"].detach(), context, generator(1))
    noisy = add_noise(tiny.scheduler, rows.latents, rows.noise, rows.timesteps)
    with torch.no_grad():
        out = tiny.unet(noisy, rows.timesteps, rows.context, return_dict=False)[0]
    bar = tiny.scheduler.alphas_cumprod[rows.timesteps].reshape(-1, 1, 1, 1)
    residual = epsilon_of(tiny.scheduler, out, noisy, rows.timesteps) - rows.noise
    assert torch.allclose(kept["z"].grad, bar.sqrt() * -(1 - bar) * residual / noisy.numel(), atol=1e-8)


def test_training_raises_the_denoising_loss_of_pictures_it_never_saw(tiny_v):
    config = RidTraining(**TRAINING | {"steps": 200}, budget=48, prompt="a photo", regression_weight=0)
    seen = torch.cat([pictures(8, seed) for seed in (11, 12, 13)])
    network, history = train([tiny_v], seen, NOBODY, config, seed=0)
    data = make_data()
    assert rise(tiny_v, data, applied(network, data.images, 48), "a photo") > 4
    assert history[0]["change"] == 0 and history[-1]["change"] > 5
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_training_learns_its_pairs(tiny_v):
    images = pictures(4)
    change = 6 * PIXEL * torch.linspace(-1, 1, 64).sign()
    config = RidTraining(**TRAINING | {"steps": 150}, budget=8, adversarial_weight=0, regression_weight=10)
    network, history = train([tiny_v], images, (images + change).clamp(-1, 1), config, seed=0)
    assert history[-1]["regression"] < 0.3 * history[0]["regression"]
    found = applied(network, images, 8) - images
    assert float((found * change).mean()) > 0


def test_an_interrupted_training_ends_with_the_same_weights(tiny_v, tiny_epsilon, tmp_path):
    config = RidTraining(**TRAINING | {"steps": 8})
    models, images = [tiny_v, tiny_epsilon], pictures(6)
    whole, _ = train(models, images, images[:2], config, seed=3)

    def stop(step, shown):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(models, images, images[:2], config, seed=3, checkpoint=tmp_path / "s", checkpoint_every=2, on_step=stop)
    again, history = train(models, images, images[:2], config, seed=3, checkpoint=tmp_path / "s", checkpoint_every=2)
    assert same_weights(weights(whole), weights(again)) and len(history) == 8
    other, _ = train([tiny_v], images, images[:2], config, seed=3)
    assert not same_weights(weights(whole), weights(other)), "every base counts"


def test_the_rate_rises_and_falls():
    config = RidTraining(learning_rate=1.0, steps=10, warm_up=2)
    assert [rid.rate_at(step, config) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])


def test_a_defender_in_a_file(tmp_path):
    network, file = Defender(64, 16, 16, 1, 2), tmp_path / "d.safetensors"
    torch.nn.init.normal_(network.last.weight)
    save_network(network, network.shape, file, {"seed": 7})
    once = file.read_bytes()
    for _ in range(8):
        save_network(network, network.shape, file, {"seed": 7})
        assert file.read_bytes() == once, "the same network gives the same file"
    read = load_defender(str(file))
    assert read.shape == network.shape
    assert same_weights(weights(read), {name: value.half().float() for name, value in weights(network).items()})
    data = AttackData(pictures(3), NOBODY, "sks", "person")
    told = []
    cloaked = rid.cloak([], data, RidConfig(defender=str(file), budget=6, batch_size=2), seed=0, on_step=told.append)
    assert torch.allclose(cloaked, applied(read, data.images, 6), atol=1e-6) and len(told) == 2
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "nonsense.safetensors").write_bytes(b"x")
    for wrong, said in (
        (file, "is no defender"),
        (tmp_path / "nonsense.safetensors", "is no defender"),
        ("no", "train-rid"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            load_defender(str(wrong))
        assert_one_sentence(caught.value)
    other = Defender(32, 16, 16, 1, 2)
    save_network(other, other.shape, file, {})
    with pytest.raises(UserError, match="32 pixels, and the base draws 64"):
        rid.cloak([], data, RidConfig(defender=str(file)), seed=0)


@pytest.fixture
def setting(tmp_path, v_folder):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(pictures(6, 4)):
        to_pil(image).save(tmp_path / "photos" / f"{i}.png")
    recipe = {"base": str(v_folder), "defender": TRAINING | {
        "steps": 3, "pair_share": 0.5, "pair_cloak": "photoguard", "pair_params": {"steps": 2}, "pair_group": 2,
    }}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def trained(setting, *more):
    return ["train-rid", str(setting / "photos"), "--output", str(setting / "out"), "--recipe", str(setting / "recipe.yaml"),
            *more]  # fmt: skip


def test_the_commands(setting, capsys):
    assert cli.main(trained(setting, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pictures"], told["pairs"], len(told["history"])) == (6, 3, 3)
    file = setting / "out" / DEFENDER
    cloak = ["cloak", str(setting / "photos"), "--method", "rid", "--class-noun", "person", "--recipe",
             str(setting / "recipe.yaml"), "--set", "cloaks.rid.name=rid", "--set", f"cloaks.rid.params.defender={file}",
             "--output", str(setting / "cloaked"), "--json"]  # fmt: skip
    assert cli.main(cloak) == 0
    assert len(json.loads(capsys.readouterr().out)["pictures"]) == 6
    before = file.read_bytes()
    assert cli.main(trained(setting)) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(trained(setting, "--resume")) == 0
    assert file.read_bytes() == before, "it was finished"
    assert cli.main(trained(setting, "--resume", "--seed", "5")) == 2
    assert "other settings" in capsys.readouterr().err
    assert cli.main(trained(setting, "--set", "defender.speed=1")) == 2
    assert "defender" in capsys.readouterr().err


def test_killed_among_the_pairs_it_goes_on(setting, monkeypatch, capsys):
    from guardsmith.cloaks import photoguard

    assert cli.main(trained(setting)) == 0
    whole = (setting / "out" / DEFENDER).read_bytes()
    (setting / "out").rename(setting / "first")
    real, calls = photoguard.cloak, []

    def second(*args, **how):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **how)

    from guardsmith.cloaks import find_cloak
    from guardsmith.pictures import rid_training as train_rid

    monkeypatch.setattr(train_rid, "find_cloak", lambda name: find_cloak(name)._replace(run=second))
    assert cli.main(trained(setting)) == 130
    monkeypatch.setattr(train_rid, "find_cloak", find_cloak)
    assert cli.main(trained(setting, "--resume")) == 0
    assert (setting / "out" / DEFENDER).read_bytes() == whole


def test_a_shape_that_does_not_fit(setting, capsys):
    assert cli.main(trained(setting, "--set", "defender.patch=24")) == 2
    assert "has to fit into 64 pixels" in capsys.readouterr().err
