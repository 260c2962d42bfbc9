"""Everyday use as jobs of a verification: what is kept is the same to the bit, and nothing is made twice."""

import json
from dataclasses import replace

import pytest
import torch
from test_deployability import bench_of

from guardsmith.config.deployability import DeployabilitySpec
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts
from guardsmith.evaluation.deployability import CHECKS, Bench, adapters, measure, parts_of
from guardsmith.evaluation.deployability.bench import Shelf
from guardsmith.evaluation.deployability.kept import (
    EverydayUse,
    Place,
    everyday_measurements,
    missing_checks,
    missing_plain,
)
from guardsmith.evaluation.drawing import Drawing, draw_beside_each_other
from guardsmith.evaluation.runs import run_job, run_units
from guardsmith.models.checkpoint import builtin_path, load_model
from guardsmith.registry.loader import load_registry

CHEAP = ("controlnet", "quantization")


@pytest.fixture(scope="module")
def base():
    return load_model("builtin:avatar")


@pytest.fixture
def drawn(monkeypatch):
    """Pipelines that drew, in their order."""
    pipelines, draw = [], Bench.draw

    def counted(self, pipeline, **options):
        pipelines.append(pipeline)
        return draw(self, pipeline, **options)

    monkeypatch.setattr(Bench, "draw", counted)
    return pipelines


def shelved(base, root, shelf, **spec):
    """The bench of the base against itself, whose base side has a shelf."""
    bench = bench_of(base, base, root, **spec)
    bench.shelves = {"base": shelf}
    return bench


def values(measured):
    return [one.model_dump(mode="json") for one in measured]


def test_what_the_base_drew_is_the_same_to_the_bit_for_the_next_verification(base, tmp_path, drawn):
    shelf = Shelf("digest", tmp_path / "shelf")
    alone = measure(bench_of(base, base, tmp_path / "a", checks=CHEAP))
    count = len(drawn)
    first = measure(shelved(base, tmp_path / "a", shelf, checks=CHEAP))
    assert len(drawn) == 2 * count, "the shelf was empty"
    again = measure(shelved(base, tmp_path / "a", shelf, checks=CHEAP))
    assert values(alone) == values(first) == values(again)
    assert len(drawn) == 2 * count + count // 2, "the hardened side alone was drawn"
    measure(shelved(base, tmp_path / "a", Shelf("another", shelf.folder), checks=("quantization",)))
    assert len(drawn) == 2 * count + count // 2 + 8, "of another base nothing may be read"


def test_pictures_of_other_settings_are_not_read(base, tmp_path, drawn):
    shelf = Shelf("digest", tmp_path)
    for change in ({}, {"steps": 3}, {"guidance": 2.0}, {"prompts": ["a person"] * 16}, {}):
        replace(shelved(base, tmp_path, shelf), **change, _plain={}).plain("base")
    assert len(drawn) == 4, "the last one was there"


def test_a_damaged_file_is_made_again(base, tmp_path, drawn, capsys):
    shelf = Shelf("digest", tmp_path)
    before = shelved(base, tmp_path, shelf).plain("base")
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(shelved(base, tmp_path, shelf).plain("base"), before) and len(drawn) == 2


def test_an_adapter_of_the_base_is_trained_once(base, tmp_path, monkeypatch):
    sides, trained = [], adapters.trained

    def counted(bench, side, *rest):
        sides.append(side)
        return trained(bench, side, *rest)

    monkeypatch.setattr(adapters, "trained", counted)
    registry = load_registry(builtin_path("avatar").parents[2] / "registries" / "demo.yaml")
    found = []
    for steps in (20, 20, 21):
        settings = {"lora": {"learning_rate": 2e-3, "steps": steps, "batch_size": 4}}
        bench = shelved(base, tmp_path, Shelf("digest", tmp_path), trained=True, adapters=settings, adapter_images=8)
        bench.controls, bench.steps = registry.controls, 4
        found.append(values(CHECKS["adapters"].run(bench)))
    assert found[0] == found[1] != found[2]
    assert sides == ["base", "hardened", "hardened", "base", "hardened"]


def use_of(base, root, **spec):
    prompts = tuple(prompt.text for prompt in benign_prompts(base, VERIFICATION_TEMPLATES, 16, 1))
    models = {
        side: Place(base.place, base.source, side, str(root / side)) for side in ("base", "hardened")
    }  # as if they were two
    spec = DeployabilitySpec(**{"trained": False} | spec).model_copy(update={"images": 4})
    sampling = {"steps": 2, "guidance": 3.0, "batch": 16}
    return EverydayUse(
        models, prompts, (), ("avatar", None), spec, sampling, str(root), (), "zwx", {}, 0, {"name": "avatar"}
    )


def test_jobs_measure_what_one_bench_measures(base, tmp_path, drawn):
    use = use_of(base, tmp_path, checks=CHEAP)
    jobs = missing_checks(use)
    assert [job.use.spec.checks for job in jobs] == [(name,) for name in CHEAP]
    for job in [*missing_plain(use, jobs), *reversed(jobs)]:
        run_job(job)
    together = measure(bench_of(base, base, tmp_path, checks=CHEAP))
    assert values(everyday_measurements(use)) == values(together), "in the table's order, whichever ran first"
    assert not missing_checks(use)
    next((tmp_path / "deployability").glob("quantization-*.png")).unlink()
    assert [job.use.spec.checks for job in missing_checks(use)] == [("quantization",)], "it lost a picture"
    lost = everyday_measurements(use)[-1]
    assert (lost.check, lost.error) == ("quantization", "its measurements are not there"), (
        "no check is left out silently"
    )


def test_pictures_that_checks_share_are_drawn_once(base, tmp_path, drawn):
    use = use_of(base, tmp_path, checks=("quantization", "merges"))
    jobs = missing_checks(use)
    for job in missing_plain(use, jobs):
        run_job(job)
    plain = len(drawn)
    assert plain == 4, "the base's of both sets of noise and the rest for merges, and the hardened model's"
    for job in jobs:
        run_job(replace(job, use=replace(job.use, root=str(tmp_path / job.use.spec.checks[0]))))  # a bench of its own
    # Three formats on both sides, the merge, and the reference that a verification has among its benign prompts.
    assert len(drawn) - plain == 6 + 1 + 1


def test_what_failed_to_run_is_in_the_report_and_tried_again(base, tmp_path, monkeypatch):
    def explode(_):
        raise ValueError("no such pipeline")

    use = use_of(base, tmp_path, checks=("quantization",))
    with monkeypatch.context() as patch:
        patch.setitem(CHECKS, "quantization", CHECKS["quantization"]._replace(run=explode))
        [job] = missing_checks(use)
        run_job(job)
    assert [one.error for one in everyday_measurements(use)] == ["ValueError: no such pipeline"]
    assert len(missing_checks(use)) == 1


def test_a_measurement_of_an_earlier_version_in_one_file_is_read(base, tmp_path):
    use = use_of(base, tmp_path, checks=CHEAP)
    one = {"check": "quantization", "case": "int8", "measure": "faults", "value": 0.0, "n": 4}
    use.file.parent.mkdir()
    use.file.write_text(json.dumps([one]))
    assert not missing_checks(use) and [m.case for m in everyday_measurements(use)] == ["int8"]


def test_every_kind_of_adapter_is_a_part_and_the_longest_checks_begin(base, tmp_path):
    spec = DeployabilitySpec()
    parts = parts_of(spec)
    assert sum(part.checks == ("adapters",) for part in parts) == len(spec.adapters)
    assert {kind for part in parts if part.checks == ("adapters",) for kind in part.adapters} == set(spec.adapters)
    jobs = missing_checks(use_of(base, tmp_path, trained=True))
    assert [job.use.spec.checks[0] for job in jobs[:2]] == ["samplers", "merges"] and len(jobs) == len(parts)


class Failing:
    cost = 1

    def run(self):
        raise RunFailed("the disk is gone")


def test_what_runs_beside_attacks_must_not_fail_unseen():
    with pytest.raises(RunFailed, match="the disk is gone"):
        run_units([], beside=[Failing()])
    with pytest.raises(RunFailed, match="the disk is gone"):
        draw_beside_each_other([Failing(), Failing()], "pictures", 2, "local")


def test_one_set_of_pictures_is_left_to_all_threads(base, tmp_path, monkeypatch):
    job = Drawing(base.place, Recipe(sampling={"steps": 2, "guidance": 3.0, "batch": 4}), ("a person",) * 2, 5,
                  tmp_path / "a.safetensors", "pictures")  # fmt: skip
    for jobs, workers, executor in (([job], 2, "local"), ([job, job], 1, "local"), ([job, job], 2, "ray")):
        draw_beside_each_other(jobs, "pictures", workers, executor)
        assert not job.file.exists()
    other = replace(job, file=tmp_path / "b.safetensors")
    draw_beside_each_other([job, other], "pictures", 2, "local")
    assert torch.equal(job.drawn(base), replace(job, file=tmp_path / "c.safetensors").drawn(base)), "the same bits"
    assert other.file.is_file()
