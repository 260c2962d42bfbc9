"""Destroyed pictures: by hand, and on pictures whose right answer is known."""

import torch

from guardsmith.diffusion.sampling import generate
from guardsmith.metrics.collapse import collapsed
from guardsmith.metrics.fidelity import features
from guardsmith.models.checkpoint import load_model
from guardsmith.training.loop import generator


def test_the_bar_is_the_largest_distance_between_two_pictures_of_the_base():
    reference, again = torch.tensor([[0.0], [0.0], [0.0]]), torch.tensor([[1.0], [-2.0], [0.5]])
    other = torch.tensor([[3.0], [-4.001], [float("nan")]])
    assert collapsed(reference, again, other).tolist() == [False, True, True]


def test_garbage_is_found_and_a_little_noise_is_not():
    base = load_model("builtin:avatar")
    prompts = ["a photo of person with red hair", "a photo of robot, green background"] * 6
    first, again = (generate(base, prompts, range(k, k + 12), steps=8, guidance=3.0) for k in (0, 100))
    noise = torch.randn(again.shape, generator=generator(0))
    other = (again + 0.02 * noise).clamp(-1, 1)
    garbage = [3, 4, 8]
    brown = torch.tensor([-0.1, -0.35, -1.0]).view(3, 1, 1) + 0.1 * noise[0]
    other[3], other[4], other[8] = brown, noise[4].clamp(-1, 1), torch.zeros(3, 64, 64)
    found = collapsed(features(first), features(again), features(other))
    assert found.nonzero()[:, 0].tolist() == garbage
