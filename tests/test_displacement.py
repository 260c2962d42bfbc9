"""How far attacks move a model: by hand on models of a few thousand weights."""

import copy
import math

import pytest
import torch
from test_attacks import make_data
from tiny import same_weights, weights

from guardsmith.attacks import draw_during_attack, find_attack
from guardsmith.attacks.adaptive.warm_restarts import WarmRestartsConfig, rate_at
from guardsmith.attacks.displacement import block_of, displacement, movement, relative, weight_norms
from guardsmith.attacks.lora import add_adapters, merge_adapters
from guardsmith.models.checkpoint import with_own_unet

SAMPLING = {"steps": 2, "guidance": 3.0}


def run(model, attack, params, at, **more):
    """Movements of an attack by number of steps."""
    found = {}
    draw_during_attack(
        model, attack, params | {"batch_size": 1}, make_data(), evaluate_at=at, seed=0, count=1, sampling=SAMPLING,
        on_movement=found.__setitem__, **more,
    )  # fmt: skip
    return found


def test_the_norm_of_a_change_by_hand(tiny_v):
    """One weight of the first block and one bias of the input are changed; the others count in the norm only."""
    own = with_own_unet(tiny_v)
    names = dict(own.unet.named_parameters())
    with torch.no_grad():
        names["down_blocks.0.resnets.0.conv1.weight"][0, 0, 0, 0] += 3.0
        names["conv_in.bias"][:4] -= 2.0
    found = movement(tiny_v, own, 0.5)
    assert found.allowed == 0.5 and found.largest == pytest.approx(3.0)
    expected = {"down": 3.0, "rest": 4.0, "mid": 0.0, "up": 0.0, "text_encoder": 0.0}
    assert found.change == pytest.approx(expected, abs=1e-6)
    flat = torch.cat([weight.flatten() for weight in tiny_v.unet.parameters()]).double()
    assert displacement(found.change, found.norm) == pytest.approx(5 / float(flat.norm()), rel=1e-6)
    mid = torch.cat([w.flatten() for name, w in tiny_v.unet.named_parameters() if name.startswith("mid_block.")])
    assert found.norm["mid"] == pytest.approx(float(mid.norm()), rel=1e-5)
    assert relative(found.change, found.norm, ["down"]) == pytest.approx(3 / found.norm["down"])
    assert weight_norms(tiny_v) == found.norm
    blocks = {block_of(name) for name, _ in tiny_v.unet.named_parameters()}
    assert blocks == {"down", "mid", "up", "rest"}


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_counts_with_what_it_adds(tiny_v, kind):
    own = with_own_unet(tiny_v)
    add_adapters(own.unet, 2, 0, kind=kind)
    untouched = movement(tiny_v, own, None)
    assert displacement(untouched.change, untouched.norm) < 1e-6
    with torch.no_grad():
        for number, parameter in enumerate(p for p in own.unet.parameters() if p.requires_grad):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    before = weights(own.unet)
    found = movement(tiny_v, own, None)
    assert same_weights(before, weights(own.unet)), "measuring changed it"
    merged = copy.copy(own)
    merged.unet = copy.deepcopy(own.unet)
    merge_adapters(merged.unet)
    plain = movement(tiny_v, merged, None)
    assert min(found.change[block] for block in ("down", "up")) > 1e-4
    assert found.change == pytest.approx(plain.change, rel=1e-3)
    assert found.norm == plain.norm, "adapters are no part of the weights that it is relative to"


def test_networks_of_other_weights_are_not_compared(tiny_v):
    """An attack of somebody's own may add layers of its own."""
    own = with_own_unet(tiny_v)
    own.unet.extra = torch.nn.Linear(2, 2)
    assert movement(tiny_v, own, None) is None and movement(own, tiny_v, None) is None
    own = with_own_unet(tiny_v)
    own.unet.conv_in.bias = torch.nn.Parameter(torch.zeros(3))
    assert movement(tiny_v, own, None) is None


def test_large_weights_do_not_round_an_adapter_away(tiny_v):
    """Tripwire has weights of 2^16; an update of a millionth of them is there all the same."""
    large = with_own_unet(tiny_v)
    with torch.no_grad():
        for parameter in large.unet.parameters():
            parameter *= 2.0**20
    own = with_own_unet(large)
    add_adapters(own.unet, 1, 0)
    with torch.no_grad():
        for name, parameter in own.unet.named_parameters():
            if "lora_B" in name:
                parameter += 1e-4
    layer = own.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    update = layer.get_delta_weight("default").abs().max()
    resolution = float(layer.base_layer.weight.detach().abs().max()) * 2**-24
    assert float(update.detach()) < resolution, "below float32's there"
    assert movement(large, own, None).change["down"] > 0


@pytest.mark.parametrize(
    ("optimizer", "rates"), [("adamw", 3e-3), ("sgd", None), ("adafactor", None)]
)  # what these do depends on the size of gradients or weights
def test_what_the_optimizer_allows(tiny_v, optimizer, rates):
    params = {"learning_rate": 1e-3, "steps": 3, "weight_decay": 0, "optimizer": optimizer}
    found = run(tiny_v, "dreambooth", params, [1, 3])
    if rates is None:
        assert found[3].allowed is None
        return
    assert [found[steps].allowed for steps in (1, 3)] == pytest.approx([1e-3, 3e-3])
    assert found[1].largest == pytest.approx(1e-3, rel=1e-2), "Adam's first step moves every weight by the rate"
    assert 2e-3 < found[3].largest <= 3e-3 * 1.05
    assert displacement(found[1].change, found[1].norm) < displacement(found[3].change, found[3].norm)
    count = sum(weight.numel() for name, weight in tiny_v.unet.named_parameters() if block_of(name) == "up")
    assert found[1].change["up"] == pytest.approx(1e-3 * math.sqrt(count), rel=0.05)


def test_rates_that_change_and_first_stages_count(tiny_v):
    config = {"learning_rate": 1e-3, "steps": 4, "peak": 5.0, "cycle": 2}
    rates = [rate_at(WarmRestartsConfig(**config), step) for step in range(4)]
    assert run(tiny_v, "warm_restarts", config, [4])[4].allowed == pytest.approx(sum(rates))
    lora = {"learning_rate": 1e-3, "steps": 3}
    alone = run(tiny_v, "lora", lora, [3])[3]
    second = run(tiny_v, "lora", lora, [3], first=make_data(identifier="ktn"), first_steps=2)[3]
    assert second.allowed == pytest.approx(5e-3) and alone.allowed == pytest.approx(3e-3)
    assert second.change["up"] > alone.change["up"], "what the first stage did is part of it"


def test_the_text_encoder_is_a_block_of_its_own(tiny_v):
    found = run(tiny_v, "dreambooth", {"learning_rate": 1e-3, "steps": 1, "train_text_encoder": True}, [1])[1]
    assert found.change["text_encoder"] > 0
    both = math.hypot(*found.change.values()) / math.hypot(*found.norm.values())
    assert displacement(found.change, found.norm) == pytest.approx(both)


@pytest.mark.parametrize("name", ["textual_inversion", "custom_diffusion"])
def test_a_new_word_is_compared_with_its_first_value(tiny_v, name):
    found = run(tiny_v, name, {"learning_rate": 1e-2, "steps": 2}, [1, 2])[2]
    data, attack = make_data(), find_attack(name)
    own, _ = attack.run(tiny_v, data, attack.config(learning_rate=1e-2, steps=2, batch_size=1), seed=0)
    table = tiny_v.text_encoder.get_input_embeddings().weight
    start = data.class_noun if name == "textual_inversion" else data.identifier
    first = table[tiny_v.tokenizer(start, add_special_tokens=False).input_ids].mean(0)
    change = own.text_encoder.get_input_embeddings().weight[-1] - first
    assert found.change["words"] == pytest.approx(float(change.norm()), rel=1e-4)
    assert found.change["text_encoder"] == 0
    moved = {block for block, change in found.change.items() if change}
    if name == "textual_inversion":
        assert moved == {"words"}
        assert relative(found.change, found.norm, ["words"]) == pytest.approx(
            float(change.norm() / first.norm()), rel=1e-4
        )
        assert displacement(found.change, found.norm) == 0, "the model's weights stay as they are"
    else:
        assert moved == {"words", "down", "mid", "up"}
        assert 0 < displacement(found.change, found.norm) < 1
