"""Variations of a picture: kept, mirrored, moved and zoomed; and transformed as one who wants to evade recognition would."""

import torch
from tiny import pictures

from guardsmith.attacks.evasion import EVASIONS
from guardsmith.methods.transformations import FAMILIES, transformed_at_random
from guardsmith.methods.variations import variations
from guardsmith.training.loop import generator


def test_variations_keeps_the_originals_and_the_range():
    images = pictures(3)
    found = variations(images, 4, generator(0))
    assert found.shape == (15, 3, 64, 64)
    assert torch.equal(found[:3], images)
    assert -1 <= found.min() <= found.max() <= 1
    shifts = (found[3:] - images.repeat(4, 1, 1, 1)).abs().mean((1, 2, 3))
    assert shifts.min() > 0
    assert shifts.max() < 0.8


def test_half_of_the_variations_are_mirrored():
    """A picture that is bright on the left stays so, or is bright on the right, and is never turned on its head."""
    image = torch.full((1, 3, 64, 64), -1.0)
    image[..., :32] = 1.0
    found = variations(image, 200, generator(0))[1:].mean(1)
    left = found[:, :, :16].mean((1, 2)) > found[:, :, -16:].mean((1, 2)) + 1
    right = found[:, :, -16:].mean((1, 2)) > found[:, :, :16].mean((1, 2)) + 1
    assert (left | right).all()
    assert 70 < left.sum() < 130


def test_variations_of_a_disc_are_moved_and_zoomed_but_not_sheared():
    across = torch.linspace(-1, 1, 64)
    disc = ((across[:, None] ** 2 + across**2).sqrt() < 0.5).float() * 2 - 1
    found = variations(disc.expand(1, 3, 64, 64), 50, generator(1))[1:].mean(1)
    lit = found > (found.amin((1, 2), keepdim=True) + found.amax((1, 2), keepdim=True)) / 2
    wide, high = lit.any(1).sum(1), lit.any(2).sum(1)
    assert (wide - high).abs().max() <= 2
    assert 27 <= wide.min() < 32 < wide.max() <= 37


def test_every_family_of_transformations_is_drawn_and_none_that_is_kept_out(monkeypatch):
    used = []
    names = {name for family in FAMILIES for name in family}
    for name, entry in EVASIONS.items():

        def apply(images, context, name=name):
            used.append((name, context.seed))
            return images

        monkeypatch.setitem(EVASIONS, name, entry._replace(apply=apply))
    for _ in transformed_at_random(pictures(2), 300, pictures(3), generator(0)):
        pass
    assert {name for name, _ in used} == names
    assert not names & {"swirl", "checkerboard"}
    assert len({seed for _, seed in used}) > 500, "every picture has its own frame and its own colours"
    drawn = [sum(name in family for name, _ in used) for family in FAMILIES]
    assert min(drawn) > 0.4 * len(used) / len(FAMILIES)


def test_transformed_pictures_are_of_the_same_kind_and_follow_the_generator():
    images, strangers = pictures(4), pictures(3, seed=9)

    def made(seed):
        parts = list(transformed_at_random(images, 20, strangers, generator(seed)))
        assert [len(part) for part in parts] == [64, 16], "not all in memory at once"
        return torch.cat(parts)

    found = made(1)
    assert found.shape == (80, 3, 64, 64) and found.dtype == images.dtype
    assert -1 <= found.min() <= found.max() <= 1
    assert torch.equal(found, made(1)) and not torch.equal(found, made(2))
    assert (found - images.repeat(20, 1, 1, 1)).abs().mean((1, 2, 3)).min() > 0.01


def test_every_copy_is_of_its_picture(monkeypatch):
    """Copies follow each other picture by picture, also across the parts, and are varied as they are drawn."""
    monkeypatch.setattr("guardsmith.methods.transformations.FAMILIES", (("blur",),))
    shades = torch.linspace(-0.6, 0.6, 5)
    images = shades[:, None, None, None].expand(5, 3, 64, 64).contiguous()
    found = torch.cat(list(transformed_at_random(images, 30, images, generator(3))))
    means = found.mean((1, 2, 3)).view(30, 5).mean(0)
    assert (means - shades).abs().max() < 0.06
