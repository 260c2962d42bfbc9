import copy
import dataclasses
import json
import math
import pickle
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import assert_one_sentence, edit_json, same_weights, weights

from guardsmith.core.errors import RunFailed, UserError
from guardsmith.models import checkpoint as models
from guardsmith.models.checkpoint import (
    builtin_path,
    load_model,
    resolve,
    save_model,
    stored_dtype,
    weights_digest,
    with_own_unet,
)
from guardsmith.models.tensor_files import changed_fraction

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = {
    "unet": UNET_FILE,
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def folder(v_folder, tmp_path):
    """A checkpoint of one's own to break."""
    return shutil.copytree(v_folder, tmp_path / "model")


def refuses(source, *words, error=UserError):
    with pytest.raises(error) as caught:
        load_model(str(source))
    assert_one_sentence(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_folder_loads_in_float32_frozen_and_in_eval_mode(request, kind):
    place = request.getfixturevalue({"epsilon": "epsilon_folder", "v_prediction": "v_folder"}[kind])
    model = load_model(str(place))
    assert model.prediction_type == kind
    assert model.image_size == 64
    assert model.folder == place
    assert model.source == str(place)
    for part in (model.unet, model.vae, model.text_encoder):
        assert not part.training
        assert not any(module.training for module in part.modules())
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())
    for name, file in WEIGHTS.items():
        stored, loaded = load_file(place / file), weights(getattr(model, name))
        # transformers 5 names the weights of CLIPTextModel without the prefix that files carry.
        assert {k.removeprefix("text_model.") for k in stored} == {k.removeprefix("text_model.") for k in loaded}
        loaded = {k.removeprefix("text_model."): v for k, v in loaded.items()}
        assert all(torch.equal(v, loaded[k.removeprefix("text_model.")]) for k, v in stored.items())
    assert model.tokenizer.model_max_length == 16


def test_a_folder_is_found_below_the_home_and_relative(v_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(v_folder.parent))
    assert resolve(f"~/{v_folder.name}") == v_folder
    monkeypatch.chdir(v_folder.parent)
    assert resolve(v_folder.name).resolve() == v_folder.resolve()
    assert resolve(f"./{v_folder.name}").resolve() == v_folder.resolve()


def test_own_unet_is_a_copy_and_the_rest_is_shared(tiny_v):
    own = with_own_unet(tiny_v)
    with torch.no_grad():
        own.unet.conv_in.weight.add_(1)
    assert not torch.equal(own.unet.conv_in.weight, tiny_v.unet.conv_in.weight)
    assert own.vae is tiny_v.vae
    assert own.text_encoder is tiny_v.text_encoder
    assert own.source == tiny_v.source


@pytest.fixture
def changed(tiny_v):
    own = with_own_unet(tiny_v)
    with torch.no_grad():
        own.unet.conv_in.weight.add_(0.25)
    return own


def test_a_saved_model_is_a_pipeline_with_only_the_unet_changed(changed, tmp_path):
    target = tmp_path / "out" / "model"
    before, source = weights(changed.unet), files(changed.folder)
    save_model(changed, target)
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert same_weights(before, weights(changed.unet))
    assert files(changed.folder) == source

    saved = files(target)
    assert saved.keys() == source.keys()
    assert {name for name in saved if saved[name] != source[name]} <= {UNET_FILE, "unet/config.json"}
    assert saved[UNET_FILE] != source[UNET_FILE]
    assert same_weights(before, load_file(target / UNET_FILE))

    pipeline = StableDiffusionPipeline.from_pretrained(target, safety_checker=None)
    assert same_weights(before, weights(pipeline.unet))
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.shape == (64, 64, 3)

    again = load_model(str(target))
    assert same_weights(before, weights(again.unet))
    assert again.prediction_type == "v_prediction"
    assert changed_fraction(changed.folder / "unet", target / "unet") > 0


def test_a_changed_text_encoder_is_saved_when_asked(changed, tmp_path):
    changed.text_encoder = copy.deepcopy(changed.text_encoder)
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight.add_(0.25)
    save_model(changed, tmp_path / "both", ("unet", "text_encoder"))
    again = load_model(str(tmp_path / "both"))
    assert same_weights(weights(changed.text_encoder), weights(again.text_encoder))
    assert same_weights(weights(changed.unet), weights(again.unet))
    old, new = files(changed.folder), files(tmp_path / "both")
    assert old.keys() == new.keys()
    assert {name for name in old if old[name] != new[name]} == {UNET_FILE, "text_encoder/model.safetensors"}
    StableDiffusionPipeline.from_pretrained(tmp_path / "both", safety_checker=None)
    save_model(changed, tmp_path / "unet")
    assert files(tmp_path / "unet")["text_encoder/model.safetensors"] == old["text_encoder/model.safetensors"]


def test_the_config_of_a_saved_unet_says_the_same(changed, tmp_path):
    save_model(changed, tmp_path / "model")
    old, new = (json.loads((place / "unet/config.json").read_text()) for place in (changed.folder, tmp_path / "model"))
    for config in (old, new):
        config.pop("_name_or_path", None)
    assert old == new


def test_a_weight_that_does_not_fit_the_precision_makes_the_part_float32(changed, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "stored_dtype", lambda *_: torch.float16)
    with torch.no_grad():
        changed.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    save_model(changed, tmp_path / "model")
    written = load_file(tmp_path / "model" / UNET_FILE)
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert same_weights(written, weights(changed.unet))


def test_a_weight_that_is_not_finite_is_not_written(changed, tmp_path):
    with torch.no_grad():
        changed.unet.conv_in.weight[0, 0, 0, 0] = math.inf
    with pytest.raises(RunFailed) as caught:
        save_model(changed, tmp_path / "model")
    assert_one_sentence(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_an_older_model(changed, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "left over").write_text("x")
    save_model(changed, target)
    save_model(changed, target)
    assert files(target).keys() == files(changed.folder).keys()


def test_a_failed_save_leaves_the_old_model(changed, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_model(changed, target)
    before = files(target)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="space"):
        save_model(changed, target)
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_half_precision_base_stays_one_on_disk(folder, tmp_path):
    halved = {name: value.half() for name, value in load_file(folder / UNET_FILE).items()}
    save_file(halved, folder / UNET_FILE, metadata={"format": "pt"})
    assert stored_dtype(folder) == torch.float16
    model = load_model(str(folder))
    assert all(p.dtype == torch.float32 for p in model.unet.parameters())
    own = with_own_unet(model)
    save_model(own, tmp_path / "same")
    assert same_weights(halved, load_file(tmp_path / "same" / UNET_FILE))
    assert all(p.dtype == torch.float32 for p in own.unet.parameters())
    with torch.no_grad():
        own.unet.conv_in.weight.add_(0.25)
    save_model(own, tmp_path / "out")
    assert stored_dtype(tmp_path / "out") == torch.float16
    assert load_model(str(tmp_path / "out")).unet.conv_in.weight.mean() > model.unet.conv_in.weight.mean() + 0.2


def test_variants_beside_the_weights_do_not_count(folder, tmp_path):
    """Stable Diffusion 1.5's own folder has fp16 and non-EMA variants beside the weights that are loaded."""
    stored = load_file(folder / UNET_FILE)
    for variant, values in (
        ("fp16", {k: (v + 1).half() for k, v in stored.items()}),
        ("non_ema", {k: v + 2 for k, v in stored.items()}),
    ):
        save_file(values, folder / f"unet/diffusion_pytorch_model.{variant}.safetensors", metadata={"format": "pt"})
    model = load_model(str(folder))
    assert same_weights(stored, weights(model.unet))
    assert stored_dtype(folder) == torch.float32
    save_model(model, tmp_path / "out")
    assert same_weights(stored, load_file(tmp_path / "out" / UNET_FILE))
    # The variants hold the base's weights: in the hardened model they would undo the hardening.
    assert sorted(path.name for path in (tmp_path / "out/unet").glob("*.safetensors")) == [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]
    written = load_file(tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(written, {k: v.half() for k, v in stored.items()})
    assert changed_fraction(folder / "unet", tmp_path / "out/unet") == 0


@pytest.mark.parametrize("fits", [True, False])
def test_a_base_with_half_precision_files_keeps_them_whole_or_not_at_all(folder, tmp_path, fits):
    """Half of the parts hardened and half of them not, or of another precision, would be a model that nobody judged."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16")
    model = load_model(str(folder))
    with torch.no_grad():
        model.unet.conv_in.weight.add_(0.25 if fits else 1e6)
    save_model(model, tmp_path / "out")
    assert same_weights(load_file(tmp_path / "out" / UNET_FILE), weights(model.unet))
    halves = sorted(path.parent.name for path in (tmp_path / "out").rglob("*.fp16.safetensors"))
    assert halves == (["text_encoder", "unet", "vae"] if fits else [])
    if fits:
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", torch_dtype=torch.float16)
        assert same_weights(weights(loaded.unet), {k: v.half() for k, v in weights(model.unet).items()})
    assert same_weights(weights(load_model(str(tmp_path / "out")).unet), weights(model.unet))
    assert changed_fraction(folder / "unet", tmp_path / "out/unet") > 0


@pytest.mark.parametrize("fits", [True, False])
def test_half_precision_files_can_be_asked_for(folder, tmp_path, fits):
    model = load_model(str(folder))
    with torch.no_grad():
        model.unet.conv_in.weight.add_(0.25 if fits else 1e6)
    save_model(model, tmp_path / "out", half_variant=True)
    halves = sorted(path.parent.name for path in (tmp_path / "out").rglob("*.fp16.safetensors"))
    assert halves == (["text_encoder", "unet", "vae"] if fits else [])
    assert same_weights(weights(load_model(str(tmp_path / "out")).unet), weights(model.unet))
    if fits:
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", torch_dtype=torch.float16)
        for part in ("unet", "vae", "text_encoder"):
            wanted = {k: v.half() if v.is_floating_point() else v for k, v in weights(getattr(model, part)).items()}
            assert same_weights(weights(getattr(loaded, part)), wanted), part
    for part in ("unet", "vae", "text_encoder"):
        assert (tmp_path / "out" / part / "config.json").read_bytes() == (folder / part / "config.json").read_bytes()


def test_a_sharded_base_is_saved_whole(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / UNET_FILE).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    model = load_model(str(folder))
    assert stored_dtype(folder) == torch.float32
    save_model(model, tmp_path / "out")
    assert not list((tmp_path / "out/unet").glob("*.index.json"))
    assert same_weights(weights(model.unet), load_file(tmp_path / "out" / UNET_FILE))
    assert changed_fraction(folder / "unet", tmp_path / "out/unet") == 0


def test_a_saved_model_has_no_pickles(folder, tmp_path):
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"not opened")
    model = load_model(str(folder))
    save_model(model, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert (folder / "text_encoder/pytorch_model.bin").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl", ".CKPT"])
def test_pickled_files_are_refused_unopened(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb()))
    refuses(file, str(file), "pickle", "safetensors")
    refuses(tmp_path / f"absent{suffix}", "pickle")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_with_only_pickled_weights_is_refused(folder, part):
    file = folder / WEIGHTS[part]
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    refuses(folder, part, "pickle", file.with_suffix(".bin").name)


def test_single_files_are_refused(folder):
    refuses(folder / UNET_FILE, "is a single file", "guardsmith import")


def test_other_folders_are_refused(tmp_path):
    refuses(tmp_path, "model_index.json")
    (tmp_path / "model_index.json").write_text("{")
    refuses(tmp_path, "JSON")
    (tmp_path / "model_index.json").write_text("[]")
    refuses(tmp_path, "model_index.json", "mapping")
    (tmp_path / "model_index.json").write_bytes(b"\xff\xfe\x00")
    refuses(tmp_path, "JSON")


@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "FluxPipeline", None])
def test_other_pipelines_are_refused(folder, kind):
    edit_json(folder / "model_index.json", _class_name=kind)
    refuses(folder, str(kind), "1.x and 2.x")


def test_the_output_of_a_hardening_run_points_to_its_model(folder):
    refuses(folder.parent, str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refuses(folder, part, "incomplete")


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json",
                                  "scheduler/scheduler_config.json"])  # fmt: skip
def test_a_missing_or_broken_config_is_refused(folder, file):
    (folder / file).write_text('{"a": ')
    refuses(folder)
    (folder / file).unlink()
    refuses(folder)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 4, 2000, -10])
def test_truncated_weights_are_refused(folder, part, kept):
    file = folder / WEIGHTS[part]
    file.write_bytes(file.read_bytes()[:kept])
    refuses(folder, str(folder))


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_tensor_is_refused(folder, part):
    """The libraries fill it with random numbers and go on."""
    file = folder / WEIGHTS[part]
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("weight"))
    save_file({k: v for k, v in tensors.items() if k != gone}, file, metadata={"format": "pt"})
    refuses(folder, part)


def test_the_old_names_of_the_vae_are_not_missing(folder):
    """Stable Diffusion 1's VAE is stored with the names that its attention had in 2022."""
    file = folder / WEIGHTS["vae"]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {
            k.replace(f"mid_block.attentions.0.{new}", f"mid_block.attentions.0.{name}"): v for k, v in tensors.items()
        }
    assert sum(".query." in name for name in tensors) == 4  # weight and bias of encoder and decoder
    expected = weights(load_model(str(folder)).vae)
    save_file(tensors, file, metadata={"format": "pt"})
    assert same_weights(weights(load_model(str(folder)).vae), expected)


def test_a_tokenizer_that_knows_too_many_words_is_refused(folder):
    file = folder / "tokenizer/tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["surplus"] = len(data["model"]["vocab"])
    file.write_text(json.dumps(data))
    refuses(folder, "tokenizer", "belong together")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_tensor_of_another_shape_is_refused(folder, part):
    file = folder / WEIGHTS[part]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("bias"))
    save_file(tensors | {name: torch.zeros(3)}, file, metadata={"format": "pt"})
    refuses(folder)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, part, value):
    file = folder / WEIGHTS[part]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    refuses(folder, part, "finite")


def test_a_text_encoder_of_another_width_is_refused(folder, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.hidden_size, config.intermediate_size = 8, 16
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    refuses(folder, "8", "16", "belong together")


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_other_prediction_types_are_refused(folder, kind):
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type=kind)
    refuses(folder, kind, "not supported")


def test_what_does_not_exist_is_said_so(tmp_path):
    for source in (tmp_path / "nothing", "./nothing/here", "nothing", "a/b/c", "~/no such folder", ""):
        refuses(source, "builtin:avatar" if source else "")
    refuses("builtin:nothing", "avatar")
    with pytest.raises(UserError):
        builtin_path("../models")


def test_a_hub_id_without_network_says_so():
    refuses("guardsmith-tests/no-such-model", "guardsmith-tests/no-such-model", "HF_HUB_OFFLINE", error=RunFailed)


def test_a_malformed_hub_id_is_refused_in_one_sentence():
    with pytest.raises((UserError, RunFailed)) as caught:
        load_model("what is/this?")
    assert_one_sentence(caught.value)


def test_the_digest_is_of_the_weights_and_not_of_their_place(folder, tmp_path):
    digest = weights_digest(folder)
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "other name")
    assert weights_digest(moved) == digest
    (moved / "README.md").write_text("x")
    assert weights_digest(moved) == digest
    for file in WEIGHTS.values():
        data = bytearray((moved / file).read_bytes())
        data[-1] ^= 1
        (moved / file).write_bytes(data)
        assert weights_digest(moved) != digest
        data[-1] ^= 1
        (moved / file).write_bytes(data)
        assert weights_digest(moved) == digest
    (moved / UNET_FILE).rename(moved / "unet/other.safetensors")
    assert weights_digest(moved) != digest


def test_the_digest_follows_a_saved_change(changed, tmp_path):
    save_model(changed, tmp_path / "a")
    save_model(changed, tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b") != weights_digest(changed.folder)


def test_a_source_may_be_hidden_but_not_the_folder(tiny_v):
    """`save_model` and the pipelines read `folder`; `source` is only shown."""
    renamed = dataclasses.replace(tiny_v, source="builtin:avatar")
    assert renamed.folder == tiny_v.folder
    assert renamed.image_size == tiny_v.image_size


def test_small_networks_are_opened_together_and_large_ones_one_at_a_time(v_folder, monkeypatch):
    from diffusers import StableDiffusionPipeline

    from guardsmith.models import building

    opened, real = [], StableDiffusionPipeline.from_pretrained

    def counted(*args, dtype, **options):
        opened.append(list(dtype))
        return real(*args, dtype=dtype, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", counted)
    networks = ["unet", "vae", "text_encoder"]
    building.open_once(v_folder, networks)
    assert opened == [networks]
    monkeypatch.setattr(building, "OPENED_TOGETHER", 0)
    building.open_once(v_folder, networks)
    assert opened[1:] == [[name] for name in networks]
