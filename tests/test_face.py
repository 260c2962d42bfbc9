"""Faces as judge: what is compared, what a picture without a face counts as, and that a missing package is a sentence.

dlib itself is an extra; the last test runs where it is installed, on a portrait in the public domain.
"""

import importlib.util

import pytest
import torch
from test_page import case, made  # noqa: F401 (a fixture)
from tiny import assert_one_sentence

from guardsmith.config.judge import JudgeSpec
from guardsmith.core.errors import UserError
from guardsmith.evaluation.judging import face_detection_failure
from guardsmith.gate import policy
from guardsmith.gate.policy import measure_policy
from guardsmith.metrics import Judge, face, load_judge
from guardsmith.registry.loader import load_registry


class Eyes:
    """A face is a picture that is not black; its embedding is the colour."""

    def embed(self, image):
        colour = (image + 1).mean((1, 2))
        return None if not colour.any() else colour / colour.norm()


def plain(*colours):
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, 8, 8) * 2 - 1


RED, GREEN, BLACK, BOTH = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)


@pytest.fixture
def eyes(monkeypatch):
    monkeypatch.setattr(face, "load_faces", Eyes)


def test_faces_are_compared_with_the_mean_of_the_real_ones(eyes):
    """The references without a face are no part of the mean; here it is the bisector of red and green."""
    images = plain(RED, BOTH, BLACK, GREEN).clone()
    images[3, 0, 0, 0] = float("nan")
    found = face.similarity(images, plain(RED, BLACK, GREEN))
    assert found == [pytest.approx(0.5**0.5), pytest.approx(1.0), face.NO_FACE, None]


def test_references_without_any_face_are_refused(eyes):
    with pytest.raises(UserError, match="no face is found in the reference pictures") as caught:
        face.similarity(plain(RED), plain(BLACK, BLACK))
    assert_one_sentence(caught.value)


def test_the_detector_failure_rate_counts_scored_pictures():
    judge = Judge(face.similarity, None, no_face=face.NO_FACE)
    assert face_detection_failure([[0.0, 0.9, None], [0.0, 0.8, 0.7]], judge) == 0.4
    assert face_detection_failure([[None]], judge) is None
    assert face_detection_failure([[0.0, 0.9]], Judge(face.similarity, None)) is None


def test_the_page_says_in_how_many_pictures_no_face_was_found(case, tmp_path):  # noqa: F811
    assert "No face was found" not in made(case, tmp_path)
    for told in case[0]["scores"]:
        told["fdfr"] = {"base": 0.0, "hardened": 0.5}[told["side"]]
    text = made(case, tmp_path)
    assert "50 % of the pictures of protected subjects on the hardened model" in text
    assert "0 % of the pictures of controls on the base model" in text


def test_levels_are_not_measured_on_pictures_without_faces(monkeypatch):
    registry = load_registry("registries/avatars.yaml")
    people = [subject for subject in (*registry.subjects, *registry.controls) if subject.class_noun == "person"][:2]
    two = registry.__class__(**{**vars(registry), "subjects": people, "controls": []})
    judge = Judge(lambda images, _: [0.0, *[0.9] * (len(images) - 1)], None, no_face=face.NO_FACE)
    monkeypatch.setattr(policy, "load_judge", lambda *_: judge)
    with pytest.raises(UserError, match="no face is found in 1 of the attack pictures") as caught:
        measure_policy(two, JudgeSpec(name="face"), 64)
    assert_one_sentence(caught.value)
    assert people[0].id in str(caught.value)


def test_a_missing_package_is_a_sentence(monkeypatch):
    face.load_faces.cache_clear()
    monkeypatch.setattr(face, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"install guardsmith\[face\]") as caught:
        load_judge("face")
    assert_one_sentence(caught.value)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dlib", "face_recognition_models", "skimage"))), reason="extra `face`"
)
def test_the_real_detectors_know_an_astronaut_again():
    from PIL import Image
    from skimage.data import astronaut

    from guardsmith.core.images import to_tensor

    face.load_faces.cache_clear()
    shown = Image.fromarray(astronaut()).crop((100, 0, 356, 256))
    mirrored, other = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", (256, 256), "teal")
    scores = face.similarity(to_tensor([shown, mirrored, other]), to_tensor([shown]))
    assert scores[0] == pytest.approx(1.0, abs=1e-4)
    assert scores[1] > 0.95
    assert scores[2] == face.NO_FACE
