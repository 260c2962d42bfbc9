import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tiny import TOKENS, WIDTH, assert_one_sentence, same_weights

from guardsmith.core.errors import RunFailed
from guardsmith.models.checkpoint import with_own_unet
from guardsmith.models.tensor_files import changed_fraction
from guardsmith.training import loop as training
from guardsmith.training.loop import (
    Snapshot,
    TrainingLoop,
    UNetCost,
    add_gradients,
    generator,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_step,
    optimizer_tensors,
    reset_optimizer,
    save_checkpoint,
    save_modules,
    torch_seed,
)


def make_network(seed=0):
    with torch_seed(seed):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def adamw(network, lr=1e-2):
    return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2, fused=True)


def train(network, optimizer, steps, first=0):
    for step in range(first, first + steps):
        data = torch.randn((5, 4), generator=generator(7, step))
        network(data).square().mean().backward()
        optimizer_step(optimizer, list(network.parameters()), max_grad_norm=None)


def copy_of(network):
    twin = make_network()
    twin.load_state_dict(network.state_dict())
    return twin


def values(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def test_generators_are_reproducible_and_independent():
    def draw(*numbers):
        return tuple(torch.randn(4, generator=generator(*numbers)).tolist())

    assert draw(3, 1, 2) == draw(3, 1, 2)
    streams = [
        (0,),
        (1,),
        (-1,),
        (0, 0),
        (0, 1),
        (1, 0),
        (0, -1),
        (-1, 0),
        (0, 0, 0),
        (0, 1, -1),
        (2**63, 5),
        (2**64 - 2,),
    ]
    assert len({draw(*stream) for stream in streams}) == len(streams)
    # A run's streams, one per outer and inner step, are all different and together look like one long stream.
    many = torch.stack([torch.randn(4, generator=generator(0, j, i)) for j in range(60) for i in range(-1, 20)])
    assert len(many[:, 0].unique()) == len(many)
    assert many.mean(dim=0).abs().max() < 0.12  # 1260 draws: deviation of a mean is 0.028
    assert (many.std(dim=0) - 1).abs().max() < 0.08
    assert abs(float((many[1:, 0] * many[:-1, 0]).mean())) < 0.12


def test_generator_leaves_the_global_one_alone():
    with torch_seed(5):
        expected = torch.rand(3)
    with torch_seed(5):
        generator(9, 9)
        assert torch.equal(torch.rand(3), expected)


def test_torch_seed_restores_the_global_generator():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with torch_seed(2):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with torch_seed(2):
        assert torch.equal(torch.rand(2), inside)


def test_optimizer_step_clips_reports_and_clears():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1)
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizer_step(optimizer, [weight], max_grad_norm=1.0) == pytest.approx(5)
    assert torch.allclose(weight.detach(), torch.tensor([-0.6, -0.8]), atol=1e-5)
    assert weight.grad is None
    weight.grad = torch.tensor([3.0, 4.0])
    before = weight.detach().clone()
    assert optimizer_step(optimizer, [weight], max_grad_norm=None) == pytest.approx(5)
    assert torch.equal(before - weight.detach(), torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([float("nan"), 0])
    assert math.isnan(optimizer_step(optimizer, [weight]))  # for the caller to judge


def test_gradients_are_added_to_sums_and_leave_nothing_behind():
    first, second = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor(3.0))
    sums = [torch.tensor([10.0, 20.0]), torch.tensor(30.0)]
    where = [summed.data_ptr() for summed in sums]
    for _ in range(2):
        add_gradients((first.square().sum() * second), [first, second], sums)  # 2 first second; sum of first^2 = 5
    assert torch.equal(sums[0], torch.tensor([10 + 2 * 6.0, 20 + 2 * 12.0]))
    assert float(sums[1]) == 30 + 2 * 5
    assert [summed.data_ptr() for summed in sums] == where
    assert first.grad is None and second.grad is None


def test_gradients_of_others_are_not_touched():
    asked, other = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(5.0))
    total = [torch.tensor(0.0)]
    add_gradients(asked * other, [asked], total)
    assert float(total[0]) == 5
    assert other.grad is None


def test_snapshot_restores_exactly_and_in_place():
    network = make_network()
    optimizer = adamw(network)
    parameters = list(network.parameters())
    places = [p.data_ptr() for p in parameters]
    snapshot = Snapshot(network.parameters())
    before = values(network)
    train(network, optimizer, 3)
    assert not same_weights(before, values(network))
    snapshot.restore()
    assert same_weights(before, values(network))
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert [p.data_ptr() for p in network.parameters()] == places
    assert all(p.requires_grad for p in network.parameters())
    train(network, optimizer, 1, first=3)  # the optimizer still moves these weights
    assert not same_weights(before, values(network))
    after = values(network)
    snapshot.take()
    train(network, optimizer, 1, first=4)
    snapshot.restore()
    assert same_weights(after, values(network))


def test_snapshot_shares_no_memory_with_the_weights():
    weight = torch.nn.Parameter(torch.ones(3))
    snapshot = Snapshot([weight])
    with torch.no_grad():
        weight.zero_()
    assert snapshot.values[0].tolist() == [1, 1, 1]
    assert not snapshot.values[0].requires_grad


def test_a_reset_optimizer_behaves_like_a_fresh_one():
    network = make_network()
    optimizer = adamw(network)
    train(network, optimizer, 5)
    twin = copy_of(network)
    reset_optimizer(optimizer)
    train(network, optimizer, 4, first=100)
    train(twin, adamw(twin), 4, first=100)
    assert same_weights(values(network), values(twin))


def test_without_the_reset_it_would_not():
    network = make_network()
    optimizer = adamw(network)
    train(network, optimizer, 5)
    twin = copy_of(network)
    train(network, optimizer, 1, first=100)
    train(twin, adamw(twin), 1, first=100)
    assert not same_weights(values(network), values(twin))


def test_optimizer_state_survives_a_checkpoint_bit_for_bit(tmp_path):
    network = make_network()
    optimizer = adamw(network)
    train(network, optimizer, 3)
    tensors = {f"weights.{k}": v for k, v in network.state_dict().items()} | optimizer_tensors(optimizer, "outer")
    save_checkpoint(tmp_path / "c.safetensors", tensors, {"step": 3})

    loaded, info = load_checkpoint(tmp_path / "c.safetensors")
    assert info == {"step": 3}
    twin = make_network(seed=1)
    twin.load_state_dict({k.removeprefix("weights."): v for k, v in loaded.items() if k.startswith("weights.")})
    other = adamw(twin)
    load_optimizer_tensors(other, loaded, "outer")
    assert all(group["fused"] for group in other.param_groups)
    train(network, optimizer, 3, first=3)
    train(twin, other, 3, first=3)
    assert same_weights(values(network), values(twin))


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "last.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})

    def full_disk(tensors, file, metadata=None):
        save_file(tensors, file, metadata=metadata)
        with open(file, "r+b") as stream:  # noqa: PTH123 (half a file, as a full disk leaves it)
            stream.truncate(5)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full_disk)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 2})
    assert [file.name for file in path.parent.iterdir()] == ["last.safetensors"]
    tensors, info = load_checkpoint(path)
    assert info == {"step": 1}
    assert tensors["a"].tolist() == [1, 1]


def test_a_checkpoint_takes_gradients_views_and_shared_tensors(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    save_checkpoint(
        tmp_path / "c.safetensors", {"a": weight, "b": weight.t(), "c": weight[0]}, {"history": [{"x": 1.5}]}
    )
    tensors, info = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(tensors["a"], weight.detach())
    assert torch.equal(tensors["b"], weight.detach().t())
    assert torch.equal(tensors["c"], weight.detach()[0])
    assert info["history"] == [{"x": 1.5}]
    assert json.dumps(info)


def test_unet_cost_counts_rows(tiny_v):
    own = with_own_unet(tiny_v)
    latents, context = torch.zeros(3, 4, 8, 8), torch.zeros(3, TOKENS, WIDTH)
    with UNetCost() as cost:
        own.unet(latents, torch.zeros(3), context)
        with torch.no_grad():
            own.unet(latents[:2], torch.zeros(2), context[:2])
        tiny_v.vae.decode(latents)  # not a U-Net
    own.unet(latents, torch.zeros(3), context)  # not counted any more
    assert (cost.forwards, cost.backwards) == (5, 3)


def test_changed_fraction_counts_stored_entries(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir(), after.mkdir()
    save_file({"a": torch.zeros(6), "b": torch.zeros(2)}, before / "one.safetensors")
    save_file({"a": torch.zeros(6)}, after / "1.safetensors")  # sharded in another way
    save_file({"b": torch.tensor([0.0, 1.0])}, after / "2.safetensors")
    assert changed_fraction(before, after) == pytest.approx(1 / 8)
    assert changed_fraction(before, before) == 0
    # What the guard is for: an update that half precision rounds away.
    save_file({"a": torch.ones(4, dtype=torch.float16)}, before / "one.safetensors")
    (after / "2.safetensors").unlink()
    save_file({"a": (torch.ones(4) + 1e-5).half()}, after / "1.safetensors")
    assert changed_fraction(before, after) == 0


def make_loop(module, steps=6, **options):
    return TrainingLoop("it", steps, modules={"part": module}, optimizers={}, **options)


def walk(loop, module, die_after=None):
    """Every step adds 1 to all weights."""
    for step in loop:
        with torch.no_grad():
            module.weight.add_(1)
        loop.finish_step(step, {"loss": float(step)})
        if step == die_after:
            return


def test_a_course_goes_on_from_its_last_save(tmp_path):
    file, module = tmp_path / "c.safetensors", torch.nn.Linear(2, 3, bias=False)
    torch.nn.init.zeros_(module.weight)
    walk(make_loop(module, checkpoint=file, checkpoint_every=2), module, die_after=4)  # saved after 4 steps
    again, extra = torch.nn.Linear(2, 3, bias=False), torch.zeros(2)
    loop = make_loop(again, checkpoint=file, checkpoint_every=2)
    assert [told["loss"] for told in loop.history] == [0, 1, 2, 3]
    walk(loop, again)
    assert torch.equal(again.weight, torch.full((3, 2), 6.0))
    assert [told["loss"] for told in loop.history] == [0, 1, 2, 3, 4, 5]
    left = tmp_path / "left.safetensors"
    save_modules(file, left)
    tensors, _ = load_checkpoint(left)
    assert tensors.keys() == {"part.weight"} and torch.equal(tensors["part.weight"], again.weight)
    # Tensors that the loop changes in place are put back into the same objects.
    own = tmp_path / "t.safetensors"
    loop = make_loop(module, 1, tensors={"extra": extra}, checkpoint=own)
    extra += 5
    walk(loop, module)
    other = torch.zeros(2)
    make_loop(module, 1, tensors={"extra": other}, checkpoint=own)
    assert torch.equal(other, torch.full((2,), 5.0))
    save_modules(own, left)
    assert load_checkpoint(left)[0].keys() == {"part.weight"}


def test_a_course_that_begins_from_another_keeps_what_is_new(tmp_path):
    """Two subjects' rows are taken over; the third one's start is its own. A checkpoint of its own comes first."""
    file, old = tmp_path / "old.safetensors", torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(old.weight)
    walk(make_loop(old, 1, checkpoint=file), old)
    new = torch.nn.Linear(2, 3, bias=False)
    torch.nn.init.constant_(new.weight, 7.0)
    loop = make_loop(new, 2, start=file, checkpoint=tmp_path / "new.safetensors")
    assert torch.equal(new.weight, torch.tensor([[1.0, 1.0], [1.0, 1.0], [7.0, 7.0]]))
    assert loop.history == []
    walk(loop, new)
    again = torch.nn.Linear(2, 3, bias=False)
    make_loop(again, 2, start=file, checkpoint=tmp_path / "new.safetensors")
    assert torch.equal(again.weight, new.weight)


@pytest.mark.parametrize(("shown", "sound"), [({"loss": float("nan")}, True), ({"loss": 1.0}, False)])
def test_a_course_ends_where_it_diverges(tmp_path, shown, sound):
    file, module = tmp_path / "c.safetensors", torch.nn.Linear(1, 1)
    loop = make_loop(module, checkpoint=file, checkpoint_every=1)
    loop.finish_step(0, {"loss": 1.0})
    kept = file.read_bytes()
    with pytest.raises(RunFailed) as caught:
        loop.finish_step(1, shown, finite_weights=sound)
    assert_one_sentence(caught.value)
    assert f"it diverged at step 2: a loss is not finite; the last good state is {file}; lower" in str(caught.value)
    assert file.read_bytes() == kept
