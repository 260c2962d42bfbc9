"""Open weights: every removal does to the weights what it says, leaves the model under attack alone, and its cost is recorded."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_attacks import make_data
from tiny import assert_one_sentence, pictures, same_weights, some_rows, trained, weights

from guardsmith.attacks.adaptive.base import changed_share, run_removal, weight_layers
from guardsmith.attacks.adaptive.clamp_activations import ClampActivationsConfig, clamp_activations, limits, per_channel
from guardsmith.attacks.adaptive.prune_activations import PruneActivationsConfig, prune_activations
from guardsmith.attacks.adaptive.prune_magnitude import PruneMagnitudeConfig, prune_magnitude
from guardsmith.attacks.adaptive.quantize_weights import rounded
from guardsmith.attacks.adaptive.reinitialise_block import ReinitialiseBlockConfig, reinitialise_block
from guardsmith.attacks.adaptive.removals import REMOVALS
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.config.loading import load_recipe
from guardsmith.config.threat_model import threat_model_of
from guardsmith.core.errors import UserError
from guardsmith.diffusion.losses import predict
from guardsmith.evaluation.planning import TargetModel, plan_units
from guardsmith.evaluation.runs import run_unit
from guardsmith.models.checkpoint import load_model, with_own_unet
from guardsmith.registry.loader import load_registry

ROOT = Path(__file__).parent.parent
PARAMS = {"steps": 3, "batch_size": 1, "learning_rate": 1e-3}
QUICK = {"reinitialise_block": {"steps": 2, "batch_size": 2}, "clamp_activations": {"batches": 1}}


@pytest.mark.parametrize("name", REMOVALS)
def test_every_removal_changes_a_copy_and_says_what_it_cost(name, tiny_v):
    model = replace(tiny_v, unet=trained(tiny_v))
    with torch.no_grad():  # something that each of them finds
        model.unet.mid_block.resnets[0].conv1.weight[3] *= 1e4
        [layer] = [
            layer
            for key, layer in weight_layers(model.unet).items()
            if key.endswith("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
        ]
        layer.weight[:, 1] *= 1e9
    before, base = weights(model.unet), with_own_unet(tiny_v)
    edited, cost = run_removal(REMOVALS[name], model, make_data(), QUICK.get(name, {}), seed=0, base=base)
    assert same_weights(before, weights(model.unet)), "the model under attack stays as it is"
    rows = some_rows(tiny_v, pictures(3))
    with torch.no_grad():
        assert not torch.equal(predict(edited.unet, model.scheduler, rows), predict(model.unet, model.scheduler, rows))
    record = cost.record()
    assert record["seconds"] > 0
    assert (record["changed_weights"] > 0) == (name != "clamp_activations")
    assert record["needs_base"] == (name in ("normalise_scales", "merge_weights"))
    needs_forwards = name in ("clamp_activations", "prune_activations", "reinitialise_block")
    assert (record["unet_forwards"] > 0) == needs_forwards and (record["pictures"] > 0) == needs_forwards
    if name == "reinitialise_block":  # teacher 1, pupil 1 and its backward pass 2, for every row
        assert record["unet_forwards"] == 2 * 2 * 4


def test_what_a_removal_lacks_is_said(tiny_v):
    for name, removal in REMOVALS.items():
        if removal.needs_base:
            with pytest.raises(ValueError, match="needs the public base"):
                run_removal(removal, tiny_v, make_data(), {}, seed=0, base=None)
        if name in ("clamp_activations", "prune_activations", "reinitialise_block"):
            with pytest.raises(ValueError, match="needs class pictures"):
                run_removal(removal, tiny_v, make_data(class_images=0), {}, seed=0, base=tiny_v)


def test_the_share_of_changed_weights(tiny_v):
    other = copy.deepcopy(tiny_v.unet)
    total = sum(p.numel() for p in other.parameters())
    with torch.no_grad():
        other.conv_in.weight.view(-1)[:5] += 1
    assert changed_share(tiny_v.unet, other) == pytest.approx(5 / total)


def test_half_a_merge_lies_half_way(tiny_v):
    model = replace(tiny_v, unet=trained(tiny_v))
    edited, _ = run_removal(REMOVALS["merge_weights"], model, make_data(), {"share": 0.25}, seed=0, base=tiny_v)
    for name, value in weights(edited.unet).items():
        wanted = 0.75 * weights(model.unet)[name] + 0.25 * weights(tiny_v.unet)[name]
        assert torch.allclose(value, wanted, atol=1e-6)


def test_rescaled_weights_get_the_lengths_of_the_base_back(tiny_v):
    unet = copy.deepcopy(tiny_v.unet)
    with torch.no_grad():
        for layer in weight_layers(unet).values():
            layer.weight.mul_(torch.logspace(0, 4, layer.weight.shape[0]).view(-1, *[1] * (layer.weight.dim() - 1)))
        unet.conv_norm_out.weight.mul_(2.0**16)
    model = replace(tiny_v, unet=unet)
    edited, _ = run_removal(REMOVALS["normalise_scales"], model, make_data(), {}, seed=0, base=tiny_v)
    for name, value in weights(edited.unet).items():
        assert torch.allclose(value, weights(tiny_v.unet)[name], rtol=1e-4, atol=1e-6), name


def test_only_outliers_of_a_layer_are_pruned(tiny_v):
    unet = copy.deepcopy(tiny_v.unet)
    with torch.no_grad():
        unet.conv_in.weight[2] *= 100
        unet.mid_block.resnets[0].conv1.weight[:, 5] *= 100
    edited = prune_magnitude(replace(tiny_v, unet=unet), make_data(), PruneMagnitudeConfig())
    assert not edited.unet.conv_in.weight[2].any() and edited.unet.conv_in.bias[2] == 0
    assert not edited.unet.mid_block.resnets[0].conv1.weight[:, 5].any()
    again = prune_magnitude(tiny_v, make_data(), PruneMagnitudeConfig())
    same = {name for name, value in weights(again.unet).items() if torch.equal(value, weights(tiny_v.unet)[name])}
    assert "conv_in.weight" in same and "mid_block.resnets.0.conv1.weight" in same


def test_channels_that_answer_to_the_subject_alone_are_pruned(tiny_v):
    """A subject of white pictures and a channel that sees white: it goes, and one in a hundred with it."""
    data = replace(make_data(), images=torch.full((3, 3, 64, 64), 1.0))
    edited = prune_activations(tiny_v, data, PruneActivationsConfig(share=0.05), seed=0)
    layers = weight_layers(tiny_v.unet)
    channels = sum(layer.weight.shape[0] for name, layer in layers.items() if name != "conv_out")
    gone = sum(int((~layer.weight.flatten(1).any(dim=1)).sum()) for name, layer in weight_layers(edited.unet).items())
    assert gone == pytest.approx(0.05 * channels, abs=2)
    assert torch.equal(edited.unet.conv_out.weight, tiny_v.unet.conv_out.weight)
    same = replace(make_data(), images=make_data().class_images)
    other = prune_activations(tiny_v, same, PruneActivationsConfig(share=0.05), seed=0)
    assert not same_weights(weights(edited.unet), weights(other.unet)), "which ones depends on the subject"


def test_no_layer_gives_more_than_its_limit(tiny_v):
    config = ClampActivationsConfig(factor=0.5, batches=2)
    found = limits(tiny_v, make_data(), config, seed=0)
    own = clamp_activations(tiny_v, make_data(), config, seed=0)
    copied, seen = with_own_unet(own), {}
    for name, layer in weight_layers(copied.unet).items():
        layer.register_forward_hook(lambda layer, _, out, name=name: seen.update({name: per_channel(layer, out)}))
    with torch.no_grad():
        predict(copied.unet, tiny_v.scheduler, some_rows(tiny_v, pictures(3)))
    assert seen.keys() == found.keys()
    assert all((seen[name] <= 0.5 * found[name] + 1e-6).all() for name in seen), "in copies of the model too"
    assert any((seen[name] >= 0.499 * found[name]).any() for name in seen)


def test_a_block_is_learnt_anew_and_nothing_else(tiny_v):
    model = replace(tiny_v, unet=trained(tiny_v))
    few, many = (
        reinitialise_block(model, make_data(), ReinitialiseBlockConfig(steps=steps, batch_size=4), seed=0)
        for steps in (1, 60)
    )
    changed = {
        name.split(".")[0] for name, value in weights(many.unet).items()
        if not torch.equal(value, weights(model.unet)[name])
    }  # fmt: skip
    assert changed == {"mid_block"}
    rows = some_rows(tiny_v, make_data().class_images)
    with torch.no_grad():
        wanted, early, late = (predict(each.unet, model.scheduler, rows) for each in (model, few, many))
    assert (late - wanted).square().mean() < 0.7 * (early - wanted).square().mean()
    with pytest.raises(ValueError, match="no part 'middle'"):
        reinitialise_block(model, make_data(), ReinitialiseBlockConfig(block="middle"), seed=0)


def test_rounded_weights_have_few_values():
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[4] = 0
    few = rounded(weight, 4)
    assert all(len(row.unique()) <= 15 for row in few)
    assert (few - weight).abs().max() <= weight.flatten(1).abs().max() / 7 / 2 + 1e-6
    assert torch.allclose(rounded(weight, 8), weight, atol=0.02) and not torch.equal(rounded(weight, 8), weight)


def units_of(tmp_path, change, seed=0):
    base = load_model("builtin:avatar")
    target = {side: TargetModel(base, f"sha256:{side}", tmp_path / side) for side in ("base", "hardened")}
    attacks = {"other": {"name": "lora", "params": PARAMS} | change}
    recipe = load_recipe("demo", ["verify.attacks=" + json.dumps(attacks), f"verify.seeds=[{seed}]", "verify.identifiers=[zwx]",
                                  "verify.class_images=0", "verify.images_per_unit=2"])  # fmt: skip
    return list(plan_units(load_registry(ROOT / "registries" / "demo.yaml"), recipe, target))


def test_a_unit_trains_on_the_edited_model_and_records_the_cost(tmp_path, monkeypatch):
    unit = units_of(tmp_path, {"removal": {"name": "merge_weights", "params": {"share": 0.25}}})[0]
    assert unit.settings["removal"] == {"name": "merge_weights", "params": {"share": 0.25}}
    assert unit.settings["public"] == "sha256:base"
    run_unit(unit)
    record = json.loads((unit.folder / "attack.json").read_text())
    assert record["removal_cost"]["needs_base"] and record["removal_cost"]["unet_forwards"] == 0
    cut = units_of(tmp_path, {"removal": {"name": "cut_channels"}})[0]
    assert "public" not in cut.settings, "no base is needed"


@pytest.mark.parametrize(
    ("verify", "wanted"),
    [
        ({"attacks": {"a": {"name": "dreambooth"}}}, "hosted"),
        ({"attacks": {"a": {"name": "cut_channels"}}}, "open-weights"),
        ({"attacks": {"a": {"name": "lora", "removal": {"name": "merge_weights"}}}}, "open-weights"),
        ({"threat_model": "hosted", "attacks": {"a": {"name": "dreambooth"}}}, "hosted"),
    ],
)
def test_the_threat_model_is_what_the_attacks_need(verify, wanted):
    assert threat_model_of(load_recipe("demo", ["verify=" + json.dumps(verify)]).verify) == wanted


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        ({"threat_model": "hosted", "attacks": {"a": {"name": "cut_channels"}}}, "a edits the weights"),
        (
            {"threat_model": "hosted", "attacks": {"b": {"name": "lora", "removal": {"name": "cut_channels"}}}},
            "b edits",
        ),
        ({"threat_model": "open-weights", "attacks": {"a": {"name": "lora"}}}, "no attack edits the weights"),
        ({"threat_model": "open"}, "hosted"),
        ({"attacks": {"a": {"name": "lora", "removal": {"name": "merge"}}}}, "merge_weights"),
        ({"attacks": {"a": {"name": "lora", "removal": {"name": "merge_weights", "params": {"share": 2}}}}}, "share"),
        ({"attacks": {"a": {"name": "lora", "trained_on": "base", "removal": {"name": "cut_channels"}}}}, "cannot be"),
    ],
)
def test_a_claim_that_the_attacks_do_not_test_is_refused(verify, said):
    with pytest.raises(UserError, match=said) as caught:
        load_recipe("demo", ["verify=" + json.dumps(verify)])
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "prodigy", "adamw8bit"])
def test_attackers_train_with_other_optimizers(optimizer, tiny_v, monkeypatch):
    from guardsmith.attacks import ATTACKS, optimizers

    if optimizer in optimizers.NEEDED:
        pytest.importorskip(optimizers.NEEDED[optimizer][0])
    made = []
    real = optimizers.make_optimizer
    monkeypatch.setattr(
        "guardsmith.attacks.base.make_optimizer",
        lambda name, *args, **more: made.append((name, more["weight_decay"])) or real(name, *args, **more),
    )
    for name in ("dreambooth", "lora", "custom_diffusion", "cdl"):
        attack = ATTACKS[name]
        config = attack.config(**PARAMS, optimizer=optimizer, weight_decay=0.05)
        own, losses = attack.run(tiny_v, make_data(), config, seed=0)
        assert len(losses) == 3 and all(torch.isfinite(p).all() for p in own.unet.parameters())
    assert made == [(optimizer, 0.05)] * 4
    plain, _ = ATTACKS["dreambooth"].run(tiny_v, make_data(), DreamBoothConfig(**PARAMS), seed=0)
    other, _ = ATTACKS["dreambooth"].run(tiny_v, make_data(), DreamBoothConfig(**PARAMS, optimizer=optimizer), seed=0)
    assert not same_weights(weights(plain.unet), weights(other.unet))


def test_an_optimizer_that_is_not_installed_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("guardsmith.attacks.optimizers.find_spec", lambda name: None)
    attack = {"name": "lora", "params": {"optimizer": "prodigy"}}
    with pytest.raises(UserError, match=r"needs prodigyopt: pip install guardsmith\[prodigy\]") as caught:
        load_recipe("demo", ["verify.attacks=" + json.dumps({"some": attack})])
    assert_one_sentence(caught.value)


def test_the_report_says_what_removals_cost(tmp_path):
    from guardsmith.core.atomic_io import write_json
    from guardsmith.evaluation.judging import removal_records

    units = [
        unit for seed in (0, 1) for unit in units_of(tmp_path, {"removal": {"name": "merge_weights"}}, seed)
        if (unit.side, unit.subject) == ("hardened", "mira")
    ]  # fmt: skip
    cost = {"unet_forwards": 0, "pictures": 0, "needs_base": True, "changed_weights": 0.5}
    for unit, seconds in zip(units, (1.0, 3.0), strict=True):
        assert removal_records([unit]) == [], "a unit that did not run has no cost"
        unit.folder.mkdir(parents=True)
        write_json(unit.folder / "attack.json", {"removal_cost": cost | {"seconds": seconds}})
    [record] = removal_records(units)
    assert (record.side, record.subject, record.attack, record.removal) == (
        "hardened",
        "mira",
        "other",
        "merge_weights",
    )
    assert record.seconds == 2.0 and record.needs_base and record.changed_weights == 0.5
    assert removal_records(units_of(tmp_path, {})) == []


def test_a_policy_judges_the_threat_model_that_it_names():
    from guardsmith.evaluation.preflight import check_threat_model
    from guardsmith.gate.policy import default_policy

    hosted = load_recipe("demo")
    editing = load_recipe("avatar-removal")
    policy = default_policy()
    for recipe, tested, other in ((hosted, "hosted", "open-weights"), (editing, "open-weights", "hosted")):
        check_threat_model(policy, recipe)
        check_threat_model(policy.model_copy(update={"threat_model": tested}), recipe)
        with pytest.raises(UserError, match=f"{other}, and the recipe's attacks test {tested}") as caught:
            check_threat_model(policy.model_copy(update={"threat_model": other}), recipe)
        assert_one_sentence(caught.value)
    assert policy.digest != policy.model_copy(update={"threat_model": "hosted"}).digest
