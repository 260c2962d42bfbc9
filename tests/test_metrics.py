import pytest
import torch

from guardsmith.metrics import fidelity, identity
from guardsmith.metrics.kid import kernel, kid, kid_interval, kid_ratio_interval
from guardsmith.training.loop import generator, torch_seed


def features(count, seed, shift=0.0, width=16):
    return torch.randn((count, width), generator=generator(seed)) + shift


def test_kid_of_two_pairs_worked_out_by_hand():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    # k(a, b) = (a.b / 2 + 1)^3: 1.5^3 = 3.375 for a.b = 1, 2^3 = 8 for a.b = 2.
    assert kernel(x, x).tolist() == [[3.375, 1], [1, 3.375]]
    assert kernel(y, y).tolist() == [[8, 1], [1, 1]]
    assert kernel(x, y).tolist() == [[3.375, 1], [3.375, 1]]
    assert kid(x, y) == pytest.approx((3.375 + 1) / 2 + 11 / 4 - 2 * (3.375 + 1) / 2)
    assert kid(x, y) == pytest.approx(0.5625)


def test_kid_of_equal_sets_is_zero_and_order_does_not_matter():
    x = features(20, 0)
    assert kid(x, x) == pytest.approx(0, abs=1e-12)
    assert kid(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    y = features(30, 1)
    assert kid(x, y) == pytest.approx(kid(y, x))


def test_kid_is_never_negative_and_grows_with_the_distance():
    x = features(100, 0)
    values = [kid(x, features(100, 1, shift)) for shift in (0, 0.25, 0.5, 1, 2)]
    assert values[0] > 0  # the V-statistic's bias, the same at the same n
    assert values == sorted(values)
    assert values[-1] > 20 * values[0]
    assert all(kid(features(5, seed), features(5, seed + 1)) >= 0 for seed in range(20))


def test_kid_sees_a_collapse_that_the_mean_does_not():
    x = features(200, 0)
    assert kid(x, 0.1 * features(200, 1)) > 2 * kid(x, features(200, 1))


def test_kid_interval_is_around_kid_and_reproducible():
    x, y = features(60, 0), features(60, 1, 0.5)
    low, high = kid_interval(x, y)
    assert 0 < low < kid(x, y) < high
    assert kid_interval(x, y) == (low, high)
    assert kid_interval(x, y, seed=1) != (low, high)
    # Repeated pictures raise the V-statistic; where two sets hardly differ that alone would lift the interval above it.
    y = features(60, 1)
    low, high = kid_interval(x, y)
    assert low < kid(x, y) < high
    one = torch.ones(4, 3)
    assert kid_interval(one, one) == (0, 0)
    wide = kid_interval(x[:15], y[:15])
    assert wide[1] - wide[0] > high - low


def test_kid_ratio_is_that_of_two_kids_and_its_interval_the_jackknife():
    x, again, other = features(12, 0), features(12, 1), features(12, 2, 0.5)
    ratio, low, high = kid_ratio_interval(x, again, other)
    assert ratio == pytest.approx(kid(x, other) / kid(x, again))
    left = []
    for k in range(12):
        keep = [i for i in range(12) if i != k]
        left.append(kid(x[keep], other[keep]) / kid(x[keep], again[keep]))
    mean = sum(left) / 12
    error = (11 / 12 * sum((v - mean) ** 2 for v in left)) ** 0.5
    assert high - ratio == pytest.approx(1.96 * error)
    assert ratio - low == pytest.approx(1.96 * error)


def test_pictures_that_hardly_changed_have_a_ratio_near_one_and_a_narrow_interval():
    x, again = features(100, 0), features(100, 1)
    assert kid_ratio_interval(x, again, again) == pytest.approx((1, 1, 1))
    near = kid_ratio_interval(x, again, again + 0.02 * features(100, 2))
    apart = kid_ratio_interval(x, again, features(100, 3))  # the same model with yet other seeds
    assert near[2] - near[1] < 0.2 * (apart[2] - apart[1])
    assert kid_ratio_interval(x, again, 1.5 * again)[1] > 1


@pytest.fixture
def random_encoder(monkeypatch):
    with torch_seed(0):
        encoder = identity.IdentityEncoder().eval()
    monkeypatch.setattr(identity, "load_encoder", lambda: encoder)


def test_similarity_is_the_mean_cosine_to_the_references(random_encoder):
    images, references = (torch.rand((3, 3, 64, 64), generator=generator(seed)) * 2 - 1 for seed in (0, 1))
    found = identity.similarity(images, references)
    embedded = identity.embed(images), identity.embed(references)
    for i in range(3):
        cosines = [torch.nn.functional.cosine_similarity(embedded[0][i], other, dim=0) for other in embedded[1]]
        assert found[i] == pytest.approx(float(sum(cosines) / 3), abs=1e-5)
    assert identity.similarity(references[:1], references[:1]) == [pytest.approx(1, abs=1e-5)]


def test_a_picture_that_is_not_finite_has_no_similarity(random_encoder):
    images = torch.zeros(3, 3, 64, 64)
    images[1, 0, 5, 5] = float("nan")
    images[2, 0, 5, 5] = float("inf")
    first, *others = identity.similarity(images, torch.zeros(1, 3, 64, 64))
    assert first == pytest.approx(1, abs=1e-5)
    assert others == [None, None]


def test_pictures_of_other_sizes_are_resized(random_encoder):
    image = torch.rand((1, 3, 8, 8), generator=generator(0)) * 2 - 1
    large = torch.nn.functional.interpolate(image, (128, 128), mode="bilinear")
    small = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear")
    assert identity.similarity(large, small) == [pytest.approx(1, abs=1e-2)]


def test_fidelity_is_the_share_of_traits_shown(monkeypatch):
    shown = {"class": "person", "style": "micah", "background": "blue", "hair": "red", "glasses": "no"}
    monkeypatch.setattr(fidelity, "read_traits", lambda images: [shown] * len(images))
    images = torch.zeros(5, 3, 64, 64)
    images[4] = float("nan")
    asked = [
        {"class": "person", "hair": "red"},
        {"class": "robot", "hair": "red"},
        {"glasses": "yes"},
        {},
        {"class": "person"},
    ]
    assert fidelity.fidelity(images, asked) == [1, 0.5, 0, None, None]


def test_the_most_likely_trait_is_read(monkeypatch):
    class Stub:
        def __call__(self, images):
            logits = {name: torch.zeros(len(images), len(values)) for name, values in fidelity.TRAITS.items()}
            for i in range(len(images)):
                logits["hair"][i, i % 7] = 3
            return logits

    monkeypatch.setattr(fidelity, "load_classifier", Stub)
    found = fidelity.read_traits(torch.zeros(300, 3, 8, 8))  # more than one batch
    assert [row["hair"] for row in found[:8]] == [*fidelity.TRAITS["hair"], "black"]
    assert found[256]["hair"] == "black"  # the second batch starts anew
    assert len(found) == 300
    assert {row["class"] for row in found} == {"person"}
