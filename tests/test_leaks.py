"""Nothing of the base's own weights, and nothing secret, is in what guardsmith writes and publishes."""

import json
import os
import shutil
import stat

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from leaks import CLUTTER, TOKEN, UNET, base_tensors_in, clutter
from safetensors.torch import load_file, save_file
from test_publish import TO, make_output
from tiny import assert_one_sentence, edit_json, make_sd3, same_weights, weights

from guardsmith.cli import app as cli
from guardsmith.core.atomic_io import write_json
from guardsmith.core.credentials import credential_in
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.evaluation.preflight import hardened_here
from guardsmith.models.base_weights import ChangedWeights, content_key
from guardsmith.models.checkpoint import load_model, save_model, weights_digest, with_own_unet
from guardsmith.models.contents import list_files
from guardsmith.models.saved import try_saving
from guardsmith.registry.loader import load_registry
from guardsmith.release import publish
from guardsmith.release.publish import Refused
from guardsmith.release.signing import SIGNATURE

pytestmark = pytest.mark.filterwarnings("ignore")


def hardened(folder):
    """The checkpoint with another U-Net, nearly the base's."""
    model = with_own_unet(load_model(str(folder)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def folder(v_folder, tmp_path):
    return shutil.copytree(v_folder, tmp_path / "base")


@pytest.fixture
def registry():
    from test_publish import ROOT

    return load_registry(ROOT / "registries" / "demo.yaml")


def texts(folder):
    return {name: file.read_bytes() for name, file in list_files(folder).items()}


@pytest.mark.parametrize("half", [False, True])
def test_a_hardened_folder_holds_what_the_index_names_and_nothing_else(folder, tmp_path, half):
    clean = set(list_files(folder))
    built = save_model(hardened(clutter(folder)), tmp_path / "out", half_variant=half)
    names = set(list_files(tmp_path / "out"))
    variants = {name for name in names if ".fp16." in name}
    assert names - variants == clean | {"LICENSE.md"} and bool(variants) == half
    assert not base_tensors_in((tmp_path / "out").rglob("*.safetensors"), folder, tmp_path / "out")
    assert not [name for name, data in texts(tmp_path / "out").items() if TOKEN.encode() in data]
    assert "unet_ema" not in json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert set(load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")) == set(
        weights(load_model(str(folder)).vae)
    )
    said = " ".join(built.left_out)
    for name in CLUTTER:
        top = name.split("/")[0]
        assert name in built.left_out or f"{top}/" in built.left_out or "unet/nested/" in built.left_out, name
    assert "README.md" in said and ".git/" in said and "tensors of vae/diffusion_pytorch_model.safetensors" in said
    assert built.nulled == {"unet_ema": "no part of this kind of pipeline"}
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_the_search_finds_what_it_is_for(folder, tmp_path):
    """In any precision, transposed, under any name: by the test's own search and by guardsmith's."""
    save_model(hardened(folder), tmp_path / "out")
    before, after = load_file(folder / UNET), load_file(tmp_path / "out" / UNET)
    changed = ChangedWeights()
    assert changed.add(before.items(), after.get, "unet") == changed.changed == changed.total > 20
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    for number, copy in enumerate(
        (before[name], before[name].half(), before[name].bfloat16().float(), before[name].T.contiguous().half().float(),
         before[name].reshape(-1, 2).bfloat16())
    ):  # fmt: skip
        save_file({"x": copy}, tmp_path / f"{number}.safetensors")
        assert base_tensors_in([tmp_path / f"{number}.safetensors"], folder, tmp_path / "out"), number
        assert [found for found, _ in changed.found_in([("x", copy)])] == ["x"], number
    for other in (after[name], after[name].half(), after[name].bfloat16(), before[name] + 1e-3, torch.zeros(500)):
        assert not list(changed.found_in([("x", other)]))
    assert content_key(before[name]) == content_key(before[name].flip(0)) != content_key(before[name] * 2)
    assert not ChangedWeights().add(before.items(), {k: v.half() for k, v in before.items()}.get, "unet")


def test_a_read_only_base_gives_a_folder_that_can_be_written_to(folder, tmp_path):
    for place, _, names in os.walk(folder):
        for name in names:
            os.chmod(os.path.join(place, name), 0o444)  # noqa: PTH101, PTH118
        os.chmod(place, 0o555)  # noqa: PTH101
    (tmp_path / ".out.tmp" / "unet").mkdir(parents=True)  # what earlier runs left behind
    (tmp_path / ".out.tmp").chmod(0o555)
    try:
        save_model(hardened(folder), tmp_path / "out")
    finally:
        for place, _, _ in os.walk(folder):
            os.chmod(place, 0o755)  # noqa: PTH101
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert all(mode & 0o200 for mode in modes) and len(modes) == 1
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").rglob("*") if path.is_dir())
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def as_snapshot(folder, cache):
    """The layout of the Hub client's cache: every file a link to ../../blobs."""
    blobs, snapshot = cache / "models--a--b" / "blobs", cache / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for number, (name, file) in enumerate(list_files(folder).items()):
        shutil.copy(file, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    return snapshot


def test_a_snapshot_of_the_hub_is_links_and_becomes_files(folder, tmp_path):
    snapshot = as_snapshot(folder, tmp_path / "hub")
    save_model(hardened(snapshot), tmp_path / "out")
    files = list_files(tmp_path / "out")
    assert set(files) == set(list_files(folder)) and not any(file.is_symlink() for file in files.values())


@pytest.mark.parametrize(
    "part", ["vae/config.json", "vae", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"]
)
def test_links_out_of_the_base_are_not_followed(folder, tmp_path, part):
    shutil.move(folder / part, tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link") as caught:
        try_saving(load_model(str(folder)), tmp_path)
    assert_one_sentence(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "elsewhere"}


def test_a_readme_that_is_a_link_to_something_else_is_left_out(folder, tmp_path):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("private")
    (tmp_path / "secret.txt").write_text("private")
    (folder / "README.md").symlink_to(".git/config")
    (folder / "LICENSE").symlink_to(tmp_path / "secret.txt")
    built = save_model(hardened(folder), tmp_path / "out")
    assert built.left_out == [".git/", "LICENSE", "README.md"]
    assert not [name for name, data in texts(tmp_path / "out").items() if b"private" in data]


def test_an_index_of_shards_may_not_name_files_outside(folder, tmp_path):
    from guardsmith.models.contents import Part, weight_names

    for name in ("../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 3, None):
        index = json.dumps({"metadata": {}, "weight_map": {"a": name}}).encode()
        path = "vae/diffusion_pytorch_model.safetensors.index.json"
        with pytest.raises(UserError) as caught:
            weight_names(Part("vae", "diffusers"), {path}, lambda _, index=index: index)
        assert_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["../secret", "a/b", ".git", "unet/../../x"])
def test_parts_are_folders_of_the_base(folder, tmp_path, name):
    edit_json(folder / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(UserError, match="no name of a folder"):
        try_saving(load_model(str(folder)), tmp_path)


CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
EXTRACTOR = ["transformers", "CLIPImageProcessor"]


def absent(folder):
    return {"safety_checker": "absent", "feature_extractor": "absent"}


def pickled(folder):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    return {"safety_checker": "its weights are pickled"}


def null(folder):
    edit_json(folder / "model_index.json", safety_checker=None, feature_extractor=None)
    return {"safety_checker": "it is null", "feature_extractor": "it is null"}


@pytest.mark.parametrize("how", [absent, pickled, null])
def test_a_safety_checker_that_cannot_be_taken_is_null_and_the_model_opens(folder, tmp_path, how):
    edit_json(folder / "model_index.json", safety_checker=CHECKER, feature_extractor=EXTRACTOR)
    why = how(folder)
    built = save_model(hardened(folder), tmp_path / "out")
    assert built.nulled == why
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert all(index[name] == [None, None] for name in why)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker is None


def test_a_safety_checker_is_taken_without_what_is_hidden_in_it(folder, tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "feature_extractor")
    edit_json(folder / "model_index.json", safety_checker=CHECKER, feature_extractor=EXTRACTOR)
    file = folder / "safety_checker" / "model.safetensors"
    own = load_file(file)
    save_file(own | {f"ema.{k}": v for k, v in load_file(folder / UNET).items()}, file, metadata={"format": "pt"})
    built = save_model(hardened(folder), tmp_path / "out")
    assert same_weights(own, load_file(tmp_path / "out" / "safety_checker" / "model.safetensors"))
    assert built.nulled == {} and any("safety_checker" in each for each in built.left_out)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker is not None


def test_a_safety_checker_of_the_published_layout_keeps_all_of_its_weights(folder, tmp_path):
    """Files of 2022 say vision_model twice, newer libraries once: no reason to empty the checker."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "feature_extractor")
    edit_json(folder / "model_index.json", safety_checker=CHECKER, feature_extractor=EXTRACTOR)
    file = folder / "safety_checker" / "model.safetensors"
    old = {
        f"vision_model.{name}" if name.count("vision_model.") == 1 else name: value
        for name, value in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    built = save_model(hardened(folder), tmp_path / "out")
    assert built.left_out == [] and same_weights(old, load_file(tmp_path / "out" / "safety_checker/model.safetensors"))


def test_floating_point_position_ids_are_no_way_out(folder, tmp_path):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    own = load_file(file)
    save_file(
        own | {"x.position_ids": load_file(folder / UNET)["conv_in.weight"] * 1.01}, file, metadata={"format": "pt"}
    )
    save_model(hardened(folder), tmp_path / "out")
    assert same_weights(own, load_file(tmp_path / "out" / "vae" / file.name))


def test_a_base_in_a_folder_of_a_snapshot(folder, tmp_path):
    (tmp_path / "repository").mkdir()
    shutil.copytree(folder, tmp_path / "repository" / "base")
    snapshot = as_snapshot(tmp_path / "repository", tmp_path / "hub")
    assert save_model(hardened(snapshot / "base"), tmp_path / "out").left_out == []


def test_odd_files_beside_a_base_do_not_keep_it_from_being_digested(folder):
    digest = weights_digest(folder)
    (folder / "x.json").mkdir()
    (folder / "y.txt").symlink_to("y.txt")
    (folder / "z.json").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe.txt")
    assert weights_digest(folder) == digest
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"")
    assert weights_digest(folder) != digest


def test_long_texts_are_searched_in_time():
    import time

    start = time.process_time()
    for text in ("\n" * 300_000, "a-" * 300_000):
        assert credential_in(text) is None
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "file", ["unet/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"]
)
def test_a_credential_in_a_part_is_refused_before_training(folder, tmp_path, file):
    edit_json(folder / file, _name_or_path=f"https://me:{TOKEN}@huggingface.co/a/b")
    with pytest.raises(UserError, match=file) as caught:
        try_saving(load_model(str(folder)), tmp_path)
    assert_one_sentence(caught.value)
    assert TOKEN not in str(caught.value)


def test_what_diffusers_cannot_open_is_not_kept(folder, tmp_path, monkeypatch):
    model = hardened(folder)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: {}["broken"])
    with pytest.raises(RunFailed, match="diffusers cannot open"):
        save_model(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"x {TOKEN}", "a token of the Hub (line 1)"),
        ("a\nAWS_SECRET_ACCESS_KEY=abcdEFGH123456", "a secret that is set (line 2)"),
        ("https://me:hunter22@git.example.org/x", "a password in a URL (line 1)"),
        ("https://" + "a1B2" * 8 + "@github.com/x", "a token in a URL (line 1)"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key (line 1)"),
        ("AKIA" + "ABCD1234EFGH5678", "an access key of AWS (line 1)"),
        ("hf_token = None; password: 3; https://huggingface.co/a@b; mailto:me@example.org", None),
        ('"secret</w>": 11743, "hf_": 1, "sk": 2', None), ('src="data:image/png;base64,AIza' + "A" * 35 + '"', None),
    ],
)  # fmt: skip
def test_what_looks_like_a_credential(text, kind):
    assert credential_in(text) == kind


def test_stable_diffusion_3_without_t5_is_opened_as_diffusers_wants_it(tmp_path):
    save_model(hardened(make_sd3(tmp_path / "base", t5=False)), tmp_path / "out")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", text_encoder_3=None, tokenizer_3=None)
    assert pipeline.transformer is not None


def test_links_in_a_loop_and_pipes_are_left_out(folder, tmp_path):
    (folder / "LICENSE.md").symlink_to("LICENSE.md")
    os.mkfifo(folder / "README.md")
    assert save_model(hardened(folder), tmp_path / "out").left_out == ["LICENSE.md", "README.md"]


def test_half_precision_shards_of_the_base_are_written_anew(folder, tmp_path):
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(load_model(str(folder)), name)
        part.half().save_pretrained(tmp_path / name, variant="fp16", max_shard_size="40KB")
        for file in (tmp_path / name).glob("*fp16*"):
            shutil.move(file, folder / name / file.name)
    assert len(list((folder / "unet").glob("*.fp16-*.safetensors"))) > 1
    model = hardened(folder)
    save_model(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(written, {name: value.half() for name, value in weights(model.unet).items()})
    assert not base_tensors_in((tmp_path / "out").rglob("*.safetensors"), folder, tmp_path / "out")


# --- publishing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path, folder, registry):
    """A verified hardening of the cluttered base."""
    save_model(hardened(clutter(folder)), tmp_path / "model", half_variant=True)
    return make_output(tmp_path / "out", tmp_path / "model", registry)


@pytest.mark.parametrize(
    "surplus", ["unet/diffusion_pytorch_model.non_ema.safetensors", ".env", "x/y.bin", ".git/config"]
)
def test_a_folder_with_anything_else_is_not_published_for_any_reason(output, folder, surplus, capsys):
    (output / "model" / surplus).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / UNET, output / "model" / surplus)
    for more in ([], ["--force-unverified", "--reason", "because"]):
        assert cli.main(["publish", str(output), *TO, "--dry-run", *more]) == 1
        assert "holds what was not verified" in (said := capsys.readouterr().err) and surplus.split("/")[0] in said
    assert not (output / "release").exists()


def test_a_link_is_not_published(output, tmp_path, capsys):
    file = output / "model" / "vae" / "config.json"
    file.rename(tmp_path / "config.json")
    file.symlink_to(tmp_path / "config.json")
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 1
    assert "vae/config.json" in capsys.readouterr().err


def test_every_weight_file_is_compared_with_the_report(output, registry, capsys):
    for name in sorted(
        name for name in list_files(output / "model") if name.endswith((".safetensors", ".json", ".txt"))
    ):
        file = output / "model" / name
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 1
        assert name in capsys.readouterr().err
        file.write_bytes(before)
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 0


def test_a_report_without_digests_of_files_is_verified_again(output, capsys):
    for file in (output / "verify" / "report.json", output / "verify" / "public" / "report.json"):
        report = json.loads(file.read_text())
        del report["hardening"]["files"]
        write_json(file, report)
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 2
    assert "verify again" in capsys.readouterr().err


def test_a_credential_in_the_evidence_is_not_published(output, capsys):
    with (output / "verify" / "public" / "report.html").open("a") as file:
        file.write(f"<!-- {TOKEN} -->")
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert "guardsmith/report.html seems to hold a token of the Hub" in said and TOKEN not in said
    assert not (output / "release").exists()


def test_only_known_evidence_goes_up(output):
    (output / "verify" / "public" / "notes.txt").write_text("private")
    (output / "verify" / "public" / "state.safetensors").write_bytes(b"x")
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 0
    assert {name for name in list_files(output / "release") if name.startswith("guardsmith/")} == {
        f"guardsmith/{name}"
        for name in ("report.json", "report.html", "harden.json", "recipe.yaml", "bom.cdx.json", "grid.png")
    }


def test_what_appears_while_it_is_gathered_is_refused(output, registry, monkeypatch, folder):
    import datetime

    real = publish.gather

    def late(*args, **options):
        release = real(*args, **options)
        shutil.copy(folder / UNET, release / "late.safetensors")
        return release

    monkeypatch.setattr(publish, "gather", late)
    with pytest.raises((Refused, RunFailed)):
        publish.publish(output, registry, "acme/avatar", today=datetime.date(2026, 11, 25), contact="x", dry_run=True)


def test_nothing_of_the_base_and_no_secret_is_in_the_release_its_signature_or_its_bill(output, folder, tmp_path):
    pytest.importorskip("model_signing")
    import base64
    import subprocess

    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    assert cli.main(["publish", str(output), *TO, "--dry-run", "--sign-key", str(key)]) == 0
    release = output / "release"
    assert not base_tensors_in(release.rglob("*.safetensors"), folder, output / "model")
    assert not [name for name, data in texts(release).items() if TOKEN.encode() in data or b"PRIVATE KEY" in data]
    names = set(list_files(release))
    bundle = json.loads((release / SIGNATURE).read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {each["name"] for each in payload["predicate"]["resources"]}
    assert signed == names - {"README.md", SIGNATURE}
    bill = json.loads((release / "guardsmith" / "bom.cdx.json").read_text())["metadata"]["component"]["components"]
    assert {each["name"] for each in bill} == {name for name in names if name.endswith(".safetensors")}
    for each in bill:
        import hashlib

        assert each["hashes"][0]["content"] == hashlib.sha256((release / each["name"]).read_bytes()).hexdigest()


# --- verification -----------------------------------------------------------------------------------------------------


def record_of(output, folder, registry, **changes):
    told = dict.fromkeys(
        ("base_revision", "method", "params", "seed", "subjects", "seconds", "unet_forward_equivalents")
    ) | {
        "base": str(folder), "base_digest": weights_digest(folder), "registry_digest": registry.digest,
        "model_digest": weights_digest(output / "model"),
    }  # fmt: skip
    write_json(output / "harden.json", told | changes)


def test_a_verification_begins_with_the_files(folder, tmp_path, registry):
    output = tmp_path / "out"
    output.mkdir()
    save_model(hardened(folder), output / "model")
    record_of(output, folder, registry)  # of an earlier guardsmith
    files = hardened_here(output, registry)[2]["files"]
    assert set(files) == set(list_files(output / "model"))
    record_of(output, folder, registry, files=files)
    assert hardened_here(output, registry)[2]["files"] == files
    (output / "model" / "model.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.ckpt"):
        hardened_here(output, registry)
    record_of(output, folder, registry)
    with pytest.raises(UserError, match="harden again"):
        hardened_here(output, registry)
    (output / "model" / "model.ckpt").unlink()
    (output / "model" / "README.md").write_text("new")
    record_of(output, folder, registry, files=files | {"README.md": "sha256:0"})
    with pytest.raises(UserError, match=r"README\.md"):
        hardened_here(output, registry)


def test_what_else_a_checkpoint_carries_is_said(folder, tmp_path):
    from guardsmith.models.release_files import surplus_of

    base = load_model(str(folder))
    other = tmp_path / "other"
    save_model(hardened(folder), other)
    assert surplus_of(other, base) == []
    for name in ("unet/ema.safetensors", ".env", "model.ckpt"):
        shutil.copy(folder / UNET, other / name)
    tensors = load_file(other / UNET)
    save_file(tensors | {"extra": load_file(folder / UNET)["conv_in.weight"]}, other / UNET, metadata={"format": "pt"})
    found = surplus_of(other, base)
    assert found[:3] == [".env", "model.ckpt", "unet/ema.safetensors"]
    assert found[3] == f"{UNET}: extra is the base's unet conv_in.weight" and len(found) == 4
