"""The index of a registry: one unit vector for each protected subject, made once and kept by digest."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures
from guardsmith.core.progress import stage
from guardsmith.registry.loader import Registry
from guardsmith.screening.encoders import Encoder
from guardsmith.screening.levels import Tables, measured_levels
from guardsmith.screening.variants import VARIANTS

VERSION = 1


@dataclass(frozen=True)
class Index:
    """What uploads are compared with.

    Attributes:
        subjects: ids of the protected subjects.
        nouns: their class nouns.
        vectors: unit vectors, float32 (S, width): the mean of the embeddings of all their pictures.
        digest: of registry, encoder and version.
    """

    subjects: tuple[str, ...]
    nouns: tuple[str, ...]
    vectors: Tensor
    digest: str


def cache_folder() -> Path:
    """Where indices are kept unless another folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guardsmith" / "screening"


def index_digest(registry: Registry, encoder: Encoder) -> str:
    """Of everything that decides an index: subjects, the bytes of their pictures, the encoder."""
    people = [(s.id, s.class_noun, [image.sha256 for image in s.images]) for s in registry.subjects]
    return folder_digest(VERSION, encoder.digest, encoder.size, people)


def kept_index(registry: Registry, encoder: Encoder, folder: Path | None = None) -> Index | None:
    """The index of a registry's protected subjects if it was made before, whatever has become of their pictures since.

    Args:
        registry: its pictures need not have been opened.
        encoder: whose vectors.
        folder: where indices are kept; by default the cache of guardsmith.
    """
    return _read(_file(index_digest(registry, encoder), folder))


def _file(digest: str, folder: Path | None) -> Path:
    return (folder or cache_folder()) / f"{digest}.safetensors"


def load_index(registry: Registry, encoder: Encoder, folder: Path | None = None) -> Index:
    """The index of a registry's protected subjects; made if it is not there.

    Args:
        registry: checked.
        encoder: whose vectors.
        folder: where indices are kept; by default the cache of guardsmith.

    Raises:
        UserError: a picture cannot be read, or no face is found in a subject's pictures.
    """
    cached = kept_index(registry, encoder, folder)
    if cached is not None:
        return cached
    digest = index_digest(registry, encoder)
    vectors = []
    with stage("index of the registry", len(registry.subjects)) as bar:
        for subject in registry.subjects:
            rows = encoder.embed(open_pictures([image.path for image in subject.images], encoder.size))
            rows = rows[rows.norm(dim=1) > 0]
            if not len(rows):
                raise UserError(f"no face is found in the pictures of {subject.id}; choose others, or another judge")
            vectors.append(F.normalize(rows.mean(dim=0), dim=0))
            bar()
    index = Index(
        tuple(s.id for s in registry.subjects),
        tuple(s.class_noun for s in registry.subjects),
        torch.stack(vectors),
        digest,
    )
    _write(_file(digest, folder), index)
    return index


def _write(file: Path, index: Index) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    metadata = {"index": json.dumps({"subjects": index.subjects, "nouns": index.nouns, "digest": index.digest})}
    try:
        save_file({"vectors": index.vectors.contiguous()}, temporary, metadata)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path) -> Index | None:
    """The index in a file; `None` where there is none, or it is damaged and has to be made again."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            record = json.loads(content.metadata()["index"])
            vectors = content.get_tensor("vectors")
        index = Index(tuple(record["subjects"]), tuple(record["nouns"]), vectors, record["digest"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    return index if index.digest == file.stem and len(vectors) == len(index.subjects) else None


def every_variant(encoder: Encoder, images: Tensor, names: tuple[str, ...]) -> Tensor:
    """Unit vectors of pictures after undoing each of these transformations, float32 (variants, n, width)."""
    return torch.stack([encoder.embed(VARIANTS[name](images)) for name in names])


def levels_against(index: Index, encoder: Encoder, strangers: Tensor, names: tuple[str, ...]) -> Tables:
    """Levels measured with strangers' pictures (n, 3, h, w) against the subjects of an index (see `measured_levels`)."""
    vectors = []
    with stage("strangers' pictures", len(strangers)) as bar:
        for part in strangers.split(64):
            vectors.append(every_variant(encoder, part, names))
            bar(done=sum(v.shape[1] for v in vectors))
    return measured_levels(torch.cat(vectors, dim=1), index.vectors, index.nouns)
