"""Stable Diffusion: both layouts read in full or not at all and written exactly, and the pictures of diffusers' pipelines from the same weights."""

import hashlib
import json
import os
import pickle
import re
import warnings
from copy import deepcopy
from functools import cache
from math import inf
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from unet_course.clip import CLIPTextModel, Tokenizer
from unet_course.diffusion import Schedule
from unet_course.latent_diffusion import FoldedPixels
from unet_course.sampling import choose_steps, ddim, denoiser, dpm_solver, sample
from unet_course.stable_diffusion import (
    CONFIG_KEY,
    FOLDERS,
    PARTS,
    SAMPLERS,
    SD1,
    SD2,
    SD2_BASE,
    SD15,
    SDXL_UNET,
    InTurn,
    StableDiffusion,
    TensorFile,
    UNetXL,
    build,
    check_file,
    compvis_slots,
    diffusers_slots,
    download,
    known_latents,
    load_stable_diffusion,
    make_parts,
    plan_walk,
    published_steps,
    read_config,
    read_parts,
    read_picture,
    save_stable_diffusion,
    slots,
    tiny,
    unet_from_diffusers,
    unet_table,
    unet_to_diffusers,
    vae_table,
    write_file,
    write_folder,
    write_picture,
)
from unet_course.training import CheckpointError
from unet_course.unet import UNetModel
from unet_course.vae import AutoencoderKL
from unet_course.workbench import compare, count_parameters, randomize, relative_error

CONFIGS = {"1": SD1, "2": SD2}
PROMPTS = ["a red bicycle in the snow", "two cats"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


@cache
def on_meta(version, thin=False):
    """The networks without numbers, made once."""
    return make_parts(tiny(CONFIGS[version]) if thin else CONFIGS[version], "meta")


@pytest.fixture(scope="module")
def thin():
    """Thin twins with random weights, one for each version; not to be changed."""
    models = {}
    for version, config in CONFIGS.items():
        models[version] = build(tiny(config))
        for i, part in enumerate(PARTS):
            randomize(getattr(models[version], part), seed=i)
    return models


@pytest.fixture(scope="module")
def files(thin, tmp_path_factory):
    """The twins on disk: version → file, and version + "/" → folder."""
    root = tmp_path_factory.mktemp("thin")
    places = {}
    for version, model in thin.items():
        places[version], places[f"{version}/"] = root / f"{version}.safetensors", root / version
        for place in (places[version], places[f"{version}/"]):
            save_stable_diffusion(model, place)
    return places


@pytest.fixture(scope="module")
def tensors(files):
    """What the file of the first twin holds; copy before changing."""
    return load_file(files["1"])


def same(a, b):
    """The same names and numbers."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def refused(tmp_path, tensors, *words, config=None, **options):
    """A file with these tensors is refused, with these words."""
    save_file(tensors, tmp_path / "spoiled.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_stable_diffusion(tmp_path / "spoiled.safetensors", config=config or tiny(SD1), **options)
    for word in (*words, "othing was loaded"):
        assert word in str(caught.value), caught.value


# Names and sizes


@pytest.mark.parametrize(
    ("version", "sizes"),
    [
        ("1", {"unet": (686, 859_520_964), "vae": (248, 83_653_863), "text": (196, 123_060_480)}),
        ("2", {"unet": (686, 865_910_724), "vae": (248, 83_653_863), "text": (372, 340_387_840)}),
    ],
)
def test_full_size(version, sizes):
    parts = on_meta(version)
    assert {part: (len(module.state_dict()), count_parameters(module)) for part, module in parts.items()} == sizes
    assert all({t.device.type for t in module.state_dict().values()} == {"meta"} for module in parts.values())


@pytest.mark.parametrize("version", CONFIGS)
def test_tiny_has_all_names(version):
    """Thin in every direction, complete in names."""
    thin, full = on_meta(version, True), on_meta(version)
    for part in PARTS:
        assert list(thin[part].state_dict()) == list(full[part].state_dict())
    assert sum(map(count_parameters, thin.values())) < sum(map(count_parameters, full.values())) / 60


def theirs_on_meta(config):
    """The three networks of diffusers and transformers for our configuration."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    channels = [config["vae"]["ch"] * m for m in config["vae"]["ch_mult"]]
    text = config["text"]
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel(**{k: v for k, v in unet_to_diffusers(config["unet"]).items() if k != "_class_name"}),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=channels, latent_channels=4, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
            ),
            "text": transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(
                    hidden_size=text["width"], intermediate_size=text["mlp_width"], num_hidden_layers=text["layers"], num_attention_heads=text["heads"]
                )
            ),
        }


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("version", CONFIGS)
def test_diffusers_names(version, thin):
    """Every name and shape of the folder's layout, at full size, without a weight."""
    config = tiny(CONFIGS[version]) if thin else CONFIGS[version]
    ours = {part: module.state_dict() for part, module in on_meta(version, thin).items()}
    theirs = {part: module.state_dict() for part, module in theirs_on_meta(config).items()}
    del theirs["text"]["text_projection.weight"]
    for part, ways in diffusers_slots(ours, config).items():
        keys = {slot.key: ours[part][name].shape for name, slot in ways[0].items()}
        assert len(keys) == len(ours[part]) and keys.keys() == theirs[part].keys()
        for key, shape in keys.items():
            assert shape == theirs[part][key].shape or shape == (*theirs[part][key].shape, 1, 1), key


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_settings_there_and_back(config):
    assert unet_from_diffusers(unet_to_diffusers(config["unet"])) == config["unet"]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("version", CONFIGS)
def test_no_two_in_one_place(version, ema):
    """No table puts two tensors in one slot."""
    names = {part: list(module.state_dict()) for part, module in on_meta(version, True).items()}
    for layout in (compvis_slots(names, ema), diffusers_slots(names, CONFIGS[version])):
        for part, ways in layout.items():
            for way in ways:
                assert list(way) == names[part] and len(set(way.values())) == len(way)


def test_examples_of_names():
    """Spelled out, for those who search for a name."""
    table = {name: slot.key for name, slot in slots(["output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.bias", "input_blocks.9.0.op.bias"], table=unet_table()).items()}
    assert table == {
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        "input_blocks.9.0.op.bias": "down_blocks.2.downsamplers.0.conv.bias",
    }
    vae = slots(["decoder.up.3.block.0.nin_shortcut.bias", "encoder.mid.attn_1.q.weight"], table=vae_table())
    assert [slot.key for slot in vae.values()] == ["decoder.up_blocks.0.resnets.0.conv_shortcut.bias", "encoder.mid_block.attentions.0.to_q.weight"]
    key = compvis_slots({"unet": ["input_blocks.1.0.in_layers.2.weight"], "vae": [], "text": []}, ema=True)["unet"][0]["input_blocks.1.0.in_layers.2.weight"].key
    assert key == "model_ema.diffusion_modelinput_blocks10in_layers2weight"


# Round trips


@pytest.mark.parametrize("place", ["1", "2", "1/", "2/"])
def test_round_trip(thin, files, place):
    """Both layouts, both versions: every tensor and every setting comes back."""
    model = thin[place[0]]
    again = load_stable_diffusion(files[place], config=None if place.endswith("/") else tiny(CONFIGS[place]))
    assert same(again, model) and again.config == model.config and not again.training
    assert (again.pad, again.prediction, again.scale_factor, again.length) == (model.pad, model.prediction, model.scale_factor, 77)
    assert torch.equal(again.schedule.alphas, model.schedule.alphas)


@pytest.mark.parametrize("version", CONFIGS)
def test_round_trip_ckpt(thin, tmp_path, version):
    save_stable_diffusion(thin[version], tmp_path / "thin.ckpt")
    assert same(load_stable_diffusion(tmp_path / "thin.ckpt", config=tiny(CONFIGS[version])), thin[version])


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_files_say_what_they_are(thin, tmp_path, ending):
    """A model with the shapes of version 1 and other settings comes back with its own; a configuration that is given counts more."""
    unet = {**tiny(SD1)["unet"], "num_heads": 4}
    config = {**tiny(SD1), "unet": unet, "prediction": "v", "pad": 0, "scale_factor": 0.5, "schedule": dict(kind="linear", steps=1000, start=1e-4, end=0.02)}
    path = tmp_path / f"own.{ending}"
    build(config, {part: getattr(thin["1"], part) for part in PARTS}, tokenizer=tokenizer()).save(path)
    again = StableDiffusion.load(path)
    assert same(again, thin["1"]) and again.config == config
    assert (again.pad, again.prediction, again.scale_factor, again.unet.middle_block[1].transformer_blocks[0].attn1.heads) == (0, "v", 0.5, 4)
    assert load_stable_diffusion(path, config=tiny(SD1)).prediction == "epsilon"
    if ending == "safetensors":
        assert json.loads(safe_open(path, "pt").metadata()[CONFIG_KEY])["prediction"] == "v"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("note", "word"),
    [
        ("{", "no JSON"), ("[" * 100_000, "no JSON"), ("null", "config must be"), ('"SD1"', "config must be"), ('{"unet": 1}', "config must be"),
        (json.dumps(tiny(SD1) | {"unet": 3}), "no networks"), (json.dumps(tiny(SD1) | {"vae": {"ch": "x"}}), "no networks"),
        (json.dumps(tiny(SD1) | {"schedule": None}), "no networks"), (json.dumps(tiny(SD1) | {"scale_factor": "x"}), "scale_factor='x'"),
        (json.dumps(tiny(SD1) | {"scale_factor": float("nan")}), "scale_factor=nan"), (json.dumps(tiny(SD1) | {"prediction": 1}), "prediction=1"),
        (json.dumps(tiny(SD1) | {"pad": "x"}), "pad='x'"), (json.dumps(tiny(SD2)), "does not fit"),
    ],
)  # fmt: skip
def test_broken_notes(thin, tensors, tmp_path, note, word):
    """What stands where our files have their settings is no settings: an error that names the file. With a configuration it is not looked at."""
    save_file(tensors, tmp_path / "noted.safetensors", {CONFIG_KEY: note})
    torch.save({"state_dict": tensors, CONFIG_KEY: note}, tmp_path / "noted.ckpt")
    for name in ("noted.safetensors", "noted.ckpt"):
        with pytest.raises(CheckpointError, match=f"{name} .*{word}.*othing was loaded|{name} .*othing was loaded.*{word}"):
            load_stable_diffusion(tmp_path / name, tokenizer=tokenizer())
        assert same(load_stable_diffusion(tmp_path / name, config=tiny(SD1), tokenizer=tokenizer()), thin["1"])


def test_notes_of_other_kinds(tensors, tmp_path):
    """A pickle can hold anything under our name; notes of other programs are passed over."""
    torch.save({"state_dict": tensors, CONFIG_KEY: [1]}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match="odd.ckpt is damaged.*no JSON"):
        load_stable_diffusion(tmp_path / "odd.ckpt")
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt", "modelspec.title": "{"})
    with pytest.raises(CheckpointError, match="give config"):
        load_stable_diffusion(tmp_path / "other.safetensors")


def test_old_and_bare_ckpt(thin, tensors, tmp_path):
    """The pickles of before PyTorch 1.6, and those without a state_dict around the tensors."""
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(tensors, tmp_path / "bare.ckpt")
    for name in ("old", "bare"):
        assert same(load_stable_diffusion(tmp_path / f"{name}.ckpt", config=tiny(SD1)), thin["1"])


def test_second_file_from_the_first(thin, files, tmp_path):
    """From folder to file to folder, nothing is lost; the bytes of the weights are the same."""
    save_stable_diffusion(load_stable_diffusion(files["2/"]), tmp_path / "2.safetensors")
    assert {n: t.tolist() for n, t in load_file(tmp_path / "2.safetensors").items() if t.ndim < 2} == {
        n: t.tolist() for n, t in load_file(files["2"]).items() if t.ndim < 2
    }
    save_stable_diffusion(load_stable_diffusion(tmp_path / "2.safetensors", config=tiny(SD2)), tmp_path / "2")
    for folder in FOLDERS.values():
        a, b = (next((root / folder).glob("*.safetensors")).read_bytes() for root in (tmp_path / "2", files["2/"]))
        assert a == b


def test_thirds(files, thin):
    """OpenCLIP keeps queries, keys and values in one piece, in this order."""
    weight = load_file(files["2"])["cond_stage_model.model.transformer.resblocks.5.attn.in_proj_weight"]
    layer = thin["2"].text.text_model.encoder.layers[5].self_attn
    assert torch.equal(weight, torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))


def test_penultimate_layer(thin):
    """23 layers give what 24 give one before the last."""
    text = tiny(SD2)["text"]
    longer = CLIPTextModel(**text | {"layers": 24})
    found = longer.load_state_dict(thin["2"].text.state_dict(), strict=False)
    assert not found.unexpected_keys and all(".layers.23." in name for name in found.missing_keys)
    tokens = Tokenizer()(PROMPTS, pad=0)
    assert torch.equal(longer(tokens, layer=-2), thin["2"].text(tokens))


# What else files hold


def averages(tensors):
    """The averages as CompVis' program keeps them: other numbers, flat names."""
    unet = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.diffusion_model.")}
    return {f"model_ema.{name.replace('.', '')}": t + 1 for name, t in unet.items()} | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
    }


def test_ema(tensors, thin, tmp_path):
    """Both or either can be taken from a file that holds both."""
    save_file(tensors | averages(tensors), tmp_path / "both.safetensors")
    raw, mean = (load_stable_diffusion(tmp_path / "both.safetensors", config=tiny(SD1), ema=ema) for ema in (False, True))
    assert same(raw, thin["1"]) and same(mean.vae, thin["1"].vae) and same(mean.text, thin["1"].text)
    assert all(torch.equal(t, thin["1"].unet.state_dict()[name] + 1) for name, t in mean.unet.state_dict().items())


def test_ema_missing(tensors, tmp_path):
    refused(tmp_path, tensors, "686 of 686 are missing", "model_ema.diffusion_modeltime_embed0weight", ema=True)


def test_left_out(tensors, thin, tmp_path):
    """The buffers of the training program are no weights."""
    names = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
             "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
             "posterior_mean_coef2", "logvar", "scale_factor", "cond_stage_model.transformer.text_model.embeddings.position_ids",
             "first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.main.0.weight"]  # fmt: skip
    known = {"alphas_cumprod": Schedule.scaled_linear().alphas_cumprod.half(), "scale_factor": torch.tensor(0.18215)}
    save_file(tensors | {name: torch.zeros(3) for name in names} | known, tmp_path / "more.safetensors")
    assert same(load_stable_diffusion(tmp_path / "more.safetensors", config=tiny(SD1)), thin["1"])


def test_as_in_the_real_file(tensors, thin, tmp_path):
    """The 1,145 names of version 1.5: twelve tables, positions, two counters without averages."""
    betas = Schedule.scaled_linear().betas.float()
    table = (1 - betas.double()).cumprod(0)
    names = ["alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
             "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]  # fmt: skip
    more = {"betas": betas, "alphas_cumprod": table.float()} | {name: torch.zeros(1000) for name in names}
    more |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    more |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    assert len(tensors | more) == 1145
    save_file(tensors | more, tmp_path / "real.safetensors")
    assert same(load_stable_diffusion(tmp_path / "real.safetensors", config=tiny(SD1)), thin["1"])


def test_other_tables(tensors, tmp_path):
    """A file that says with which schedule or factor it was trained is believed."""
    other = Schedule.scaled_linear(1000, 0.00085, 0.014).alphas_cumprod.float()
    for more, word in ((other, "alphas_cumprod"), (other[:500], "alphas_cumprod"), (torch.tensor(0.13025), "scale_factor")):
        refused(tmp_path, tensors | {word: more.clone()}, f"its {word} is not what config says")


def test_left_out_of_openclip(files, thin, tmp_path):
    prefix = "cond_stage_model.model."
    more = {f"{prefix}{name}": torch.zeros(2) for name in ("logit_scale", "text_projection", "attn_mask", "transformer.resblocks.23.ln_1.weight")}
    save_file(load_file(files["2"]) | more, tmp_path / "more.safetensors")
    assert same(load_stable_diffusion(tmp_path / "more.safetensors", config=tiny(SD2)), thin["2"])


def test_without_text_model(tensors, thin, tmp_path):
    """Some files name the text encoder's tensors without `text_model.`"""
    save_file({name.replace(".text_model.", "."): t for name, t in tensors.items()}, tmp_path / "flat.safetensors")
    assert same(load_stable_diffusion(tmp_path / "flat.safetensors", config=tiny(SD1)), thin["1"])


# Refused, with a reason


def test_missing(tensors, tmp_path):
    kept = {name: t for name, t in tensors.items() if ".middle_block." not in name}
    refused(tmp_path, kept, "unet: 46 of 686 are missing", "model.diffusion_model.middle_block.0.in_layers.0.weight")


def test_superfluous(tensors, tmp_path):
    refused(tmp_path, tensors | {"control_model.zero": torch.zeros(2)}, "1 superfluous", "control_model.zero")


def test_other_shape(tensors, tmp_path):
    """The nine channels of a model for inpainting."""
    nine = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    refused(tmp_path, tensors | nine, "another shape", "(32, 9, 3, 3) instead of (32, 4, 3, 3)")


def test_all_complaints_at_once(tensors, tmp_path):
    kept = {name: t for name, t in tensors.items() if not name.startswith("first_stage_model.quant_conv")}
    refused(tmp_path, kept | {"odd": torch.zeros(1)}, "vae: 2 of 248 are missing", "1 superfluous")


def test_transposed_is_no_linear_layer(tensors, tmp_path):
    """Only trailing axes of one position may be left out, not any shape with as many numbers."""
    name = "model.diffusion_model.input_blocks.4.0.skip_connection.weight"
    assert tensors[name].shape == (64, 32, 1, 1)
    refused(tmp_path, tensors | {name: tensors[name].reshape(32, 64)}, "(32, 64) instead of (64, 32, 1, 1)")


def test_guess(tensors, tmp_path):
    """Version 1 is recognised; for version 2 one has to say what it predicts; others need a configuration."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    for width, word in ((768, "are missing"), (1024, "config=SD2"), (640, "give config")):
        save_file({key: torch.zeros(320, width)}, tmp_path / "one.safetensors")
        with pytest.raises(CheckpointError, match=word):
            load_stable_diffusion(tmp_path / "one.safetensors")


def test_checked_before_reading(tensors, tmp_path, monkeypatch):
    """Length and checksum are compared before anything opens the file as a checkpoint."""
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    assert load_stable_diffusion(path, config=tiny(SD1), sha256=digest.upper(), size=size)
    monkeypatch.setattr(TensorFile, "__init__", lambda *_: pytest.fail("opened"))
    for options, word in (({"sha256": "0" * 64}, digest), ({"size": size + 1}, f"{size + 1:,}"), ({"sha256": "0" * 64, "size": 3}, "3 were expected")):
        with pytest.raises(CheckpointError, match=word) as caught:
            load_stable_diffusion(path, config=tiny(SD1), **options)
        assert "Nothing was read" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        load_stable_diffusion(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        load_stable_diffusion(tmp_path)
    with pytest.raises(CheckpointError, match="no weights"):
        load_stable_diffusion(tmp_path, config=tiny(SD1))
    with pytest.raises(CheckpointError, match="no file"):
        check_file(tmp_path)


class Order:
    """A pickle that orders a file to be made."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_pickle_is_not_run(tensors, tmp_path, old):
    """An order in a pickle is refused, not carried out."""
    torch.save({"state_dict": tensors, "callbacks": Order(tmp_path / "made")}, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=not old)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"state_dict": Order(tmp_path / "made")}))
    for name in ("bad", "plain"):
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            load_stable_diffusion(tmp_path / f"{name}.ckpt", config=tiny(SD1))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.ckpt", "bad.bin"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"PK\x03\x04 not a zip", b"https://x", b"Repository not found", b"G", "half"],
    ids=["empty", "html", "zip", "address", "message", "letter", "half"],
)
def test_damaged(files, tmp_path, name, content):
    (tmp_path / name).write_bytes(files["1"].read_bytes()[:100_000] if content == "half" else content)
    with pytest.raises(CheckpointError, match=name):
        load_stable_diffusion(tmp_path / name, config=tiny(SD1))


@pytest.mark.parametrize("content", [{"state_dict": None}, {"state_dict": [1]}, {0: torch.zeros(2)}, [torch.zeros(2)], None], ids=str)
def test_pickles_of_other_things(tmp_path, content):
    """Tensors without names, names without tensors."""
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="bad.ckpt"):
        load_stable_diffusion(tmp_path / "bad.ckpt")


def test_whole_numbers(tensors, files, tmp_path):
    """Weights of 8 bits need a scale that no table has."""
    name = "model.diffusion_model.out.2.bias"
    refused(tmp_path, tensors | {name: tensors[name].to(torch.int8)}, name, "torch.int8")
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        load_stable_diffusion(files["1"], config=tiny(SD1), dtype=torch.int8)


def test_shape_of_thirds(files, tmp_path):
    """A piece for three is shown once, with the shape that it should have."""
    key = "cond_stage_model.model.transformer.resblocks.5.attn.in_proj_weight"
    wanted = tuple(load_file(files["2"])[key].shape)
    refused(tmp_path, load_file(files["2"]) | {key: torch.zeros(8, 8)}, f"such as {key} (8, 8) instead of {wanted}", config=tiny(SD2))


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_save_over_what_was_loaded(thin, tmp_path, ending):
    """The tensors may still live in the file; it is replaced, never written into, and nothing is left beside it."""
    path = tmp_path / f"model.{ending}"
    save_stable_diffusion(thin["1"], path)
    model = load_stable_diffusion(path, config=tiny(SD1))
    save_stable_diffusion(model, path)
    assert same(model, thin["1"]) and same(load_stable_diffusion(path, config=tiny(SD1)), thin["1"])
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_save(thin, tmp_path, monkeypatch):
    """What was there stays until the new file is complete."""
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"the old one")

    def fail(content, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_stable_diffusion(thin["1"], path)
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", [2, 5, 12])
def test_interrupted_folder(thin, tmp_path, monkeypatch, broken):
    """A folder that could not be written to its end is what it was before, settings and weights, to the last byte."""
    parts = {part: getattr(thin["1"], part) for part in PARTS}
    write_folder(parts, tiny(SD1), tokenizer(), tmp_path / "sd")
    before = {path: path.read_bytes() for path in (tmp_path / "sd").rglob("*") if path.is_file()}
    count, save, text = [0], save_file, Path.write_text

    def fails(write):
        def failing(*args, **options):
            count[0] += 1
            if count[0] == broken:
                raise SafetensorError("no space left") if write is save else OSError("no space left")
            return write(*args, **options)

        return failing

    monkeypatch.setattr("unet_course.stable_diffusion.save_file", fails(save))
    monkeypatch.setattr(Path, "write_text", fails(text))
    other = {part: randomize(deepcopy(module), seed=9) for part, module in parts.items()}
    with pytest.raises(OSError, match="no space left"):
        write_folder(other, tiny(SD1) | {"prediction": "v"}, tokenizer(), tmp_path / "sd")
    assert {path: path.read_bytes() for path in (tmp_path / "sd").rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    write_folder(other, tiny(SD1) | {"prediction": "v"}, tokenizer(), tmp_path / "sd")
    again = load_stable_diffusion(tmp_path / "sd", tokenizer=tokenizer())
    assert again.prediction == "v" and torch.equal(again.unet.out[2].bias, other["unet"].out[2].bias)


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_save_makes_folders(thin, tmp_path, monkeypatch, ending):
    thin["1"].save(tmp_path / "runs" / "new" / f"m.{ending}")
    assert (tmp_path / "runs" / "new" / f"m.{ending}").is_file()
    monkeypatch.setattr("unet_course.stable_diffusion.save_file", lambda *_: (_ for _ in ()).throw(SafetensorError("I/O error")))
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("I/O error")))
    with pytest.raises(OSError, match=f"full.{ending} was not written: I/O error"):
        thin["1"].save(tmp_path / f"full.{ending}")


def test_methods_save_and_load(thin, tmp_path):
    """The method of chapter 16 writes the whole model here, not one without its VAE."""
    for place, options in (("1.safetensors", {"config": tiny(SD1)}), ("1", {})):
        thin["1"].save(tmp_path / place)
        again = StableDiffusion.load(tmp_path / place, **options)
        assert same(again, thin["1"]) and again.config == thin["1"].config
    with pytest.raises(ValueError, match="dtype="):
        thin["1"].save(tmp_path / "1", torch.float16)
    with pytest.raises(ValueError, match=r"model\.save"):
        save_stable_diffusion(small(), tmp_path / "small")


@pytest.mark.parametrize("name", ["sd-v1.5", "v1.5-inpainting", "two.words", "model.2"])
def test_folder_with_a_dot(thin, tmp_path, name):
    """What looks like an ending, but is none of letters, belongs to a folder's name; one of letters does if the folder is there."""
    path = tmp_path / name
    if name == "two.words":
        with pytest.raises(ValueError, match="must end in"):
            thin["1"].save(path)
        assert not path.exists()
        path.mkdir()
    thin["1"].save(path)
    assert (path / "unet" / "config.json").is_file() and same(StableDiffusion.load(path), thin["1"])
    assert [found.name for found in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_mapped(files, thin, tmp_path, ending):
    """A tensor that keeps its type is not copied: asked for twice, it is at one place. With another type it is, and has no more than its share."""
    path = tmp_path / f"thin.{ending}"
    thin["2"].save(path)
    source = TensorFile(path)
    name = next(name for name in source.shapes if name.endswith("to_k.weight"))
    assert source[name].data_ptr() == source[name].data_ptr()
    half, _ = read_parts(path, tiny(SD2), dtype=torch.float16)
    for module in half.values():
        for t in module.state_dict().values():
            assert t.untyped_storage().nbytes() == t.nbytes


def test_second_base():
    """The base model of version 2 draws at 512 and answers with noise."""
    sizes = {config["prediction"]: build(config, make_parts(config, "meta"), tokenizer=tokenizer()).latent_shape() for config in (SD2, SD2_BASE)}
    assert sizes == {"v": (4, 96, 96), "epsilon": (4, 64, 64)}


@pytest.mark.bad_input
def test_wrong_arguments(thin, files, tmp_path):
    with pytest.raises(ValueError, match="config"):
        load_stable_diffusion(files["1"], config={"unet": {}})
    with pytest.raises(ValueError, match="config"):
        make_parts("SD1")
    with pytest.raises(ValueError, match="kind of schedule"):
        build(tiny(SD1) | {"schedule": dict(kind="cosine")}, make_parts(tiny(SD1), "meta"))
    with pytest.raises(ValueError, match="ema=True"):
        load_stable_diffusion(files["1/"], ema=True)
    with pytest.raises(ValueError, match="single files"):
        load_stable_diffusion(files["1/"], size=3)
    with pytest.raises(ValueError, match="must end in"):
        write_file({part: getattr(thin["1"], part) for part in PARTS}, tmp_path / "thin.pt")
    for dtype in ("float16", torch.int8, 16):
        with pytest.raises(ValueError, match=f"dtype={dtype!r}"):
            load_stable_diffusion(files["1"], dtype=dtype)
    with pytest.raises(ValueError, match="attention='new'"):
        vae_table(4, "new")


# Folders


def copied(files, tmp_path, version="1"):
    import shutil

    return shutil.copytree(files[f"{version}/"], tmp_path / "folder")


def test_folder_with_old_names(files, thin, tmp_path):
    """The VAE's attention as files of 2022 have it: other names, and 1×1 convolutions as linear layers."""
    folder = copied(files, tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): t for key, t in tensors.items()}
    assert any(".proj_attn." in key for key in tensors) and not any(".to_q." in key for key in tensors)
    save_file(tensors, path)
    assert same(load_stable_diffusion(folder), thin["1"])


def test_folder_of_pickles(files, thin, tmp_path):
    """.bin files; position_ids in them; text names without `text_model.`; a half-precision variant beside the whole one."""
    folder = copied(files, tmp_path)
    for name in FOLDERS.values():
        path = next((folder / name).glob("*.safetensors"))
        tensors = {key.removeprefix("text_model."): t for key, t in load_file(path).items()}
        torch.save(tensors | ({"embeddings.position_ids": torch.arange(77)} if name == "text_encoder" else {}), path.with_name("pytorch_model.bin"))
        path.unlink()
    torch.save({}, folder / "unet" / "pytorch_model.fp16.bin")
    save_file({}, folder / "vae" / "a.fp16.safetensors")
    assert same(load_stable_diffusion(folder), thin["1"])


def edit(folder, name, **changes):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("unet/config", {"act_fn": "gelu"}, "act_fn"),
        ("unet/config", {"norm_eps": 1e-6}, "norm_eps"),
        ("unet/config", {"only_cross_attention": True}, "only_cross_attention"),
        ("unet/config", {"block_out_channels": [0, 0, 0, 0]}, "make no sense"),
        ("unet/config", {"attention_head_dim": None}, "make no sense"),
        ("vae/config", {"latents_mean": [0.0]}, "latents_mean"),
        ("tokenizer/tokenizer_config", {"pad_token": "<pad>"}, "<pad>"),
        ("tokenizer/tokenizer_config", {"pad_token": ["!"]}, "pad_token"),
        ("tokenizer/tokenizer_config", {"pad_token": {"content": {}}}, "pad_token"),
        ("unet/config", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config", {"attention_head_dim": [1, 2, 2, 2]}, "another number of heads"),
        ("vae/config", {"use_quant_conv": False}, "use_quant_conv"),
        ("scheduler/scheduler_config", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ("scheduler/scheduler_config", {"prediction_type": "flow"}, "prediction_type"),
        ("scheduler/scheduler_config", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_other_settings(files, tmp_path, name, changes, word):
    """Settings that our networks do not have are refused, not passed over."""
    folder = copied(files, tmp_path)
    edit(folder, name, **changes)
    with pytest.raises(CheckpointError, match=word):
        read_config(folder)


@pytest.mark.bad_input
def test_settings_without_sense_name_the_folder(files, tmp_path):
    folder = copied(files, tmp_path)
    edit(folder, "text_encoder/config", hidden_size=[])
    with pytest.raises(CheckpointError, match=f"{folder} was not read.*Nothing was loaded"):
        load_stable_diffusion(folder, tokenizer=tokenizer())


@pytest.mark.parametrize("factor", [None, "x", "0.5", [1], True, 0])
def test_factors_that_are_none(files, tmp_path, factor):
    folder = copied(files, tmp_path)
    edit(folder, "vae/config", scaling_factor=factor)
    with pytest.raises(CheckpointError, match=f"{folder} was not read.*scale_factor=.*Nothing was loaded"):
        load_stable_diffusion(folder, tokenizer=tokenizer())


def test_width_of_heads_counts(tmp_path):
    """Where both are given, the width of a head is what the U-Net is built with, so the settings of a folder are made from it."""
    both = {**tiny(SD1)["unet"], "num_head_channels": 8}
    assert unet_to_diffusers(both)["attention_head_dim"] == [4, 8, 16, 16]
    assert unet_to_diffusers(both | {"num_heads": -1})["attention_head_dim"] == [4, 8, 16, 16]
    assert unet_to_diffusers(both | {"num_head_channels": -1})["attention_head_dim"] == 8


def test_multiples_left_out(tmp_path):
    """A U-Net with the levels that it has by itself."""
    config = tiny(SD1)
    plain = {**config, "unet": {name: value for name, value in config["unet"].items() if name != "channel_mult"}}
    parts = make_parts(plain)
    write_folder(parts, plain, tokenizer(), tmp_path / "sd")
    assert same(read_parts(tmp_path / "sd", plain)[0]["unet"], parts["unet"])
    assert read_config(tmp_path / "sd")["unet"]["channel_mult"] == (1, 2, 4, 8)


def test_settings_that_are_left_out(files, tmp_path):
    """The folder of version 1.5 names another sampler, and neither the kind of prediction nor the scale factor."""
    folder = copied(files, tmp_path)
    for name, dropped in (("scheduler/scheduler_config", "prediction_type"), ("vae/config", "scaling_factor")):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != dropped}))
    edit(folder, "scheduler/scheduler_config", _class_name="PNDMScheduler", skip_prk_steps=True)
    edit(folder, "unet/config", attention_head_dim=8, sample_size=8, dual_cross_attention=False, norm_eps=1e-05, mid_block_scale_factor=1)
    assert read_config(folder) == tiny(SD1)


def test_tokens_of_a_folder(files, thin, tmp_path):
    """Added words are not dropped without a word."""
    folder = copied(files, tmp_path)
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<my-cat>": 49408}')
    with pytest.raises(CheckpointError, match="<my-cat>"):
        load_stable_diffusion(folder)
    assert same(load_stable_diffusion(folder, tokenizer=tokenizer()), thin["1"])


@pytest.mark.parametrize("config", [SD1, SD2], ids=["1", "2"])
def test_upcast_is_written(config):
    """What version 2.1 needs in float16 is not in its weights: the settings say it."""
    assert unet_to_diffusers(tiny(config)["unet"])["upcast_attention"] is (config is SD2)


def test_predictor():
    """The same walk as `steps`, with the same guidance; not for a U-Net that comes and goes."""
    model, noise = small(), torch.randn(1, *small().latent_shape(None), generator=torch.Generator().manual_seed(3))
    *_, last = model.steps("a cat", steps=3, seed=3)
    *_, other = dpm_solver(model.predictor("a cat"), noise, model.schedule, choose_steps(model.schedule, 3))
    assert relative_error(other.x, last.x) < 1e-5
    with pytest.raises(ValueError, match="save_memory"):
        model.save_memory("cpu").predictor("a cat")


def test_settings_are_read(files, tmp_path):
    folder = copied(files, tmp_path)
    edit(folder, "scheduler/scheduler_config", prediction_type="v_prediction", beta_schedule="linear", beta_end=0.02)
    edit(folder, "vae/config", scaling_factor=0.5)
    edit(folder, "tokenizer/tokenizer_config", pad_token={"content": "!"})
    model = load_stable_diffusion(folder)
    assert (model.prediction, model.scale_factor, model.pad) == ("v", 0.5, 0)
    assert torch.allclose(model.schedule.betas, Schedule.linear(1000, 0.00085, 0.02).betas)


def test_broken_folders(files, tmp_path):
    folder = copied(files, tmp_path)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_stable_diffusion(folder)
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="do not say"):
        load_stable_diffusion(folder)
    (folder / "vae" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no settings"):
        load_stable_diffusion(folder)
    (folder / "vae" / "config.json").write_bytes((files["1/"] / "vae" / "config.json").read_bytes())
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="several files"):
        load_stable_diffusion(folder)
    weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_stable_diffusion(folder)


# The walk


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 333, 600, 999])
def test_published_steps(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    assert published_steps(steps) == scheduler.timesteps.tolist()


@pytest.mark.bad_input
@pytest.mark.parametrize("steps", [0, 1000, 1001, 2.0, True, "7"])
def test_published_steps_refused(steps):
    with pytest.raises(ValueError, match="steps="):
        published_steps(steps)


def walked(scheduler, network, x, **steps):
    """A walk by one of diffusers' schedulers."""
    scheduler.set_timesteps(**steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, torch.full((len(x),), t.item())), t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_schedulers(steps, prediction):
    """diffusers' DDIM and DPM-Solver++ at the same steps, with Stable Diffusion's settings."""
    diffusers = pytest.importorskip("diffusers")
    shared = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, timestep_spacing="leading",
                  prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction])  # fmt: skip
    network = lambda x, times: torch.tanh(0.7 * x + times.reshape(-1, 1, 1, 1) / 700 - 0.5) + 0.2 * x.roll(1, -1)
    schedule, x = Schedule.scaled_linear(), random(2, 4, 5, 7)
    predict = denoiser(network, schedule, prediction)
    visits = published_steps(steps)
    theirs = walked(diffusers.DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=False), network, x, num_inference_steps=steps)
    ours = {step.time: step.x for step in ddim(predict, x, schedule, [*visits, 0])}
    assert relative_error(ours[0], theirs) < 1e-4 < relative_error(ours[None], theirs)
    solver = diffusers.DPMSolverMultistepScheduler(**shared)
    assert relative_error(sample(dpm_solver(predict, x, schedule, visits)), walked(solver, network, x, timesteps=visits)) < 1e-3
    solver = diffusers.DPMSolverMultistepScheduler(**shared)  # and at the steps that it chooses itself
    solver.set_timesteps(steps)
    chosen = solver.timesteps.tolist()
    assert relative_error(sample(dpm_solver(predict, x, schedule, chosen)), walked(solver, network, x, num_inference_steps=steps)) < 1e-3


# The pictures of diffusers' pipelines


def pipeline(folder, kind="StableDiffusionPipeline", **parts):
    """A pipeline of diffusers, quiet."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, kind).from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels(ours, theirs):
    """The largest difference, in levels of brightness (0 to 255); theirs as diffusers gives pictures."""
    theirs = 2 * torch.from_numpy(theirs).permute(0, 3, 1, 2) - 1
    assert ours.shape == theirs.shape and ours.std() > 0.05
    return 255 * (ours - theirs).abs().max().item() / 2


def start_noise(rows, columns, seeds):
    return torch.stack([random(4, rows, columns, seed=seed) for seed in seeds])


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("single", [True, False])
def test_equals_diffusers(files, version, single):
    """Tokens, text, guidance, walk, decoder; from a single file and from a folder."""
    pipe = pipeline(files[f"{version}/"])
    model = load_stable_diffusion(files[version], config=tiny(CONFIGS[version])) if single else load_stable_diffusion(files[f"{version}/"])
    ours = model(PROMPTS, negative="blurred", sampler="ddim", steps=published_steps(5), until=0, size=(64, 96), seed=[3, 8])
    theirs = pipe(PROMPTS, negative_prompt=["blurred"] * 2, latents=start_noise(8, 12, [3, 8]), height=64, width=96, num_inference_steps=5, output_type="np").images
    assert levels(ours, theirs) < 0.1


def test_folder_of_diffusers_own(files, thin, tmp_path):
    """What `pipeline.save_pretrained` writes loads with all settings."""
    for version, model in thin.items():
        pipeline(files[f"{version}/"]).save_pretrained(tmp_path / version)
        again = load_stable_diffusion(tmp_path / version)
        assert same(again, model) and again.config == model.config


def test_img2img_equals_diffusers(files, thin):
    """From the same latents and the same noise."""
    pipe = pipeline(files["1/"], "StableDiffusionImg2ImgPipeline")
    latents = random(1, 4, 8, 12, seed=5)
    theirs = pipe("two cats", image=latents, strength=0.6, num_inference_steps=5, generator=seeded(4), output_type="np").images
    ours = thin["1"]("two cats", latents=latents, strength=0.6, sampler="ddim", steps=published_steps(5), until=0, seed=4)
    assert levels(ours, theirs) < 0.1


def test_dpm_solver_equals_diffusers(files, thin):
    diffusers = pytest.importorskip("diffusers")
    pipe = pipeline(files["2/"])
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(6)
    visits = pipe.scheduler.timesteps.tolist()
    theirs = pipe(PROMPTS, latents=start_noise(8, 8, [0, 1]), height=64, width=64, num_inference_steps=6, output_type="np").images
    assert levels(thin["2"](PROMPTS, steps=visits, size=64), theirs) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size_equals_diffusers(tmp_path):
    """The whole thing at its real size: a file of 4.26 GB with random weights, read in both layouts, five steps, the pipeline's picture."""
    parts = make_parts(SD1)
    for i, part in enumerate(PARTS):
        randomize(parts[part], seed=i)
    shape = (192, 256)
    save_stable_diffusion(build(SD1, parts), tmp_path / "sd1")
    write_file(parts, tmp_path / "sd1.safetensors")
    del parts
    assert (tmp_path / "sd1.safetensors").stat().st_size > 4 * 1_066_235_307
    request = dict(negative="blurred", sampler="ddim", steps=published_steps(5), until=0, size=shape, seed=3)
    single = load_stable_diffusion(tmp_path / "sd1.safetensors")
    ours = single(PROMPTS[0], **request)
    folder = load_stable_diffusion(tmp_path / "sd1")
    assert same(single, folder)
    del single
    assert torch.equal(folder(PROMPTS[0], **request), ours)
    del folder
    (tmp_path / "sd1.safetensors").unlink()
    pipe = pipeline(tmp_path / "sd1")
    theirs = pipe(PROMPTS[0], negative_prompt="blurred", latents=start_noise(24, 32, [3]), height=shape[0], width=shape[1], num_inference_steps=5, output_type="np").images
    assert levels(ours, theirs) < 0.1


# What the class can do, on something small and fast


class Network(nn.Module):
    """Different for every position, time and word; notes how many it sees."""

    def __init__(self):
        super().__init__()
        self.weight, self.in_channels, self.image_size, self.seen = nn.Parameter(torch.ones(1)), 4, (4, 4), []

    def forward(self, x, times, context):
        self.seen.append(len(x))
        told = context.mean((1, 2)).reshape(-1, 1, 1, 1) + times.reshape(-1, 1, 1, 1) / 1000
        return self.weight * (torch.tanh(x + told) + 0.2 * x.roll(1, -1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(49408, 5)

    def forward(self, tokens):
        return self.table(tokens)


def small():
    """A model that takes a few milliseconds; pictures of 8×8."""
    vae = AutoencoderKL(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8)
    model = StableDiffusion(Network(), randomize(vae), randomize(Words()), tokenizer(), schedule=Schedule.scaled_linear(), prediction="epsilon", scale_factor=0.5, length=8)
    return model.eval()


_tokenizer = []


def tokenizer():
    """Made once."""
    if not _tokenizer:
        _tokenizer.append(Tokenizer())
    return _tokenizer[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}], ids=["", "eta"])
def test_seed_belongs_to_the_picture(sampler, options):
    """A picture does not depend on its neighbours, in any sampler; another seed is another picture."""
    if options and sampler != "ddim":
        return
    model = small()
    together = model(["a", "b", "c"], seed=[7, 8, 7], steps=4, sampler=sampler, **options)
    for i, (prompt, seed) in enumerate(zip("abc", [7, 8, 7])):
        assert (model(prompt, seed=seed, steps=4, sampler=sampler, **options) - together[i : i + 1]).abs().max() < 1e-5
    assert (model("a", seed=9, steps=4, sampler=sampler, **options) - together[:1]).abs().max() > 1e-3
    assert torch.equal(model(["a", "b", "c"], seed=range(7, 10), steps=4, sampler=sampler, **options), model(["a", "b", "c"], seed=7, steps=4, sampler=sampler, **options))


def test_prompts_are_heard():
    """Prompt, negative prompt, guidance and its options each change the picture."""
    model = small()
    base = dict(prompts="a cat", steps=4)
    plain = model(**base)
    for other in (dict(prompts="a dog"), dict(negative="a dog"), dict(guidance=2), dict(rescale=0.7), dict(interval=(0.0, 1.0)), dict(steps=5), dict(until=0),
                  dict(sampler="heun"), dict(sampler="ddpm"), dict(sampler="ddim"), dict(seed=1)):  # fmt: skip
        assert (model(**base | other) - plain).abs().max() > 1e-4, other
    assert torch.equal(model("a cat", negative="a dog", guidance=1, steps=4), model("a cat", guidance=1, steps=4))
    both = model(["a cat"] * 2, negative=["a dog", ""], seed=[0, 0], steps=4)
    assert (both[1:] - plain).abs().max() < 1e-5 < (both[:1] - plain).abs().max()
    assert (model("a cat", sampler="ddpm", variance="large", steps=4) - model("a cat", sampler="ddpm", steps=4)).abs().max() > 1e-4


def test_padding():
    """Version 2 fills up prompts with another token, and the vectors differ. In a prompt, "!" is a word like others."""
    assert tokenizer()("two cats!", pad=0)[0, 3:6].tolist() == [256, tokenizer().end, 0]
    model = small()
    ends, zeros = model.encode_text("a cat"), None
    model.pad = 0
    zeros = model.encode_text("a cat")
    assert torch.equal(ends[:, :4], zeros[:, :4]) and not torch.equal(ends[:, 4:], zeros[:, 4:])


def test_img2img():
    """Nothing at strength 0, the whole walk at 1; more at more strength; pictures and latents left as they were."""
    model, images = small(), random(1, 3, 8, 8).clamp(-1, 1)
    before = images.clone()
    rebuilt = model.decode(model.encode(images))
    assert torch.equal(model.img2img(images, "a", strength=0, steps=4), rebuilt)
    far = [(model.img2img(images, "a", strength=s, steps=10) - rebuilt).abs().mean().item() for s in (0.1, 0.5, 1.0)]
    assert 0 < far[0] < far[1] and torch.equal(images, before)
    assert model.img2img(images, ["a", "b"], strength=0.5, steps=4).shape == (2, 3, 8, 8)
    model.unet.seen.clear()
    model.img2img(images, "a", strength=0.5, steps=10)
    assert model.unet.seen == [2] * 5


@pytest.mark.parametrize("strength", [0, 0.5])
def test_img2img_refuses_odd_sides(strength):
    """Instead of a smaller picture."""
    with pytest.raises(ValueError, match=r"images have sides of \(8, 9\); 2 must divide both"):
        small().img2img(torch.zeros(1, 3, 8, 9), "a", strength=strength, steps=2)


def test_vae_without_parameters():
    """The squares of chapter 16 can stand in for a VAE."""
    model = small()
    model.vae = FoldedPixels(2)
    plain = model("a", steps=2)
    assert plain.shape == (1, 1, 8, 8) and (model.save_memory("cpu")("a", steps=2) - plain).abs().max() < 1e-5


def test_steps():
    """Numbered steps that end where they should, and may be stopped at any time."""
    model = small()
    assert [(s.number, s.time) for s in model.steps("a", steps=[900, 400, 1])] == [(1, 400), (2, 1), (3, None)]
    assert [(s.number, s.time) for s in model.steps("a", steps=[900, 400, 1], until=0)] == [(1, 400), (2, 1), (3, 0)]
    assert [s.time for s in model.steps("a", latents=torch.zeros(1, 4, 4, 4), strength=0, steps=4)] == [None]
    assert next(model.steps("a", steps=4)).x.shape == (1, 4, 4, 4)
    assert model("a", size=(8, 12), steps=2).shape == (1, 3, 8, 12)
    assert model("a", steps=2, progress=True).shape == (1, 3, 8, 8)


def test_inpaint():
    """What is known stays, to the last bit; what is not does not depend on what stood there, neither in latents nor in the picture."""
    model, images = small(), random(2, 3, 8, 8).clamp(-1, 1)
    known = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    known[..., :5] = True
    for sampler in SAMPLERS:
        filled = model.inpaint(images, known, ["a", "b"], steps=4, sampler=sampler)
        assert torch.equal(filled[..., :5], images[..., :5]) and (filled[..., 5:] - images[..., 5:]).abs().max() > 0.01
    repainted = torch.where(known, images, -images.roll(1, 0))
    again = [model.inpaint(x, known, ["a", "b"], steps=4) for x in (images, repainted)]
    assert torch.equal(*again)
    drawn_over = [model.inpaint(x, known, ["a", "b"], steps=4, strength=0.5) for x in (images, repainted)]
    assert not torch.equal(*drawn_over)
    latents = torch.zeros(1, 4, 4, 4)
    known = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    other = latents.clone()
    other[..., 2:] = 3.0
    a, b = (list(model.steps("a", latents=z, known=known, steps=4))[-1].x for z in (latents, other))
    assert torch.equal(a, b) and torch.equal(a[..., :2], latents[..., :2])
    assert not torch.equal(list(model.steps("a", latents=other, known=known, strength=0.5, steps=4))[-1].x, b)


@pytest.mark.bad_input
def test_inpaint_refused():
    """A mask of another size than the picture."""
    with pytest.raises(ValueError, match="known has sides"):
        small().inpaint(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 4).bool(), "a")


def test_known_latents():
    known = torch.ones(2, 1, 8, 12, dtype=torch.bool)
    known[0, 0, 5, 7] = False
    wanted = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    wanted[0, 0, 1, 1] = False
    assert torch.equal(known_latents(known, 4), wanted)


@pytest.mark.bad_input
@pytest.mark.parametrize("known", [torch.ones(1, 1, 8, 8), torch.ones(1, 1, 7, 8).bool(), torch.ones(8, 8).bool(), torch.ones(1, 3, 8, 8).bool()])
def test_known_latents_refused(known):
    with pytest.raises(ValueError, match="known must be"):
        known_latents(known, 4)


def test_plan_walk():
    schedule = Schedule.scaled_linear()
    assert plan_walk(schedule, 5) == [999, 799, 599, 399, 199]
    assert plan_walk(schedule, 5, strength=0.4, until=0) == [399, 199, 0]
    assert plan_walk(schedule, [900, 1], until=0) == [900, 1, 0] and plan_walk(schedule, 5, strength=0, until=0) == []
    assert plan_walk(Schedule.flow(), 5, "heun")[0] < 999 and plan_walk(schedule, 5, "heun") != plan_walk(schedule, 5)


@pytest.mark.bad_input
@pytest.mark.parametrize("steps", [True, 2.5, None, ["a"], [900.0], "ab", "", [], [True]])
def test_plan_walk_refused(steps):
    with pytest.raises(ValueError, match="steps="):
        plan_walk(Schedule.scaled_linear(), steps)


@pytest.mark.bad_input
@pytest.mark.parametrize("strength", [2, -1, True, "1", None, float("nan")])
def test_plan_walk_refuses_strength(strength):
    with pytest.raises(ValueError, match="strength="):
        plan_walk(Schedule.scaled_linear(), 5, strength=strength)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(sampler="euler"), "sampler='euler'"), (dict(strength=0.5), "latents="), (dict(known=torch.ones(1, 1, 4, 4).bool()), "latents="),
        (dict(strength=2, latents=torch.zeros(1, 4, 4, 4)), "strength=2"), (dict(strength=True, latents=torch.zeros(1, 4, 4, 4)), "strength=True"),
        (dict(latents=torch.zeros(3, 4, 4, 4)), "latents must be"), (dict(latents=torch.zeros(4, 4, 4)), "latents must be"),
        (dict(latents=torch.zeros(1, 4, 4, 4), known=torch.ones(3, 1, 4, 4).bool()), "known must be"),
        (dict(latents=torch.zeros(1, 4, 4, 4), known=torch.ones(1, 1, 4, 4)), "known must be"), (dict(latents=torch.zeros(1, 4, 4, 4), size=8), "size=8"),
        (dict(latents=torch.zeros(1, 4, 4, 4), known=torch.ones(1, 1, 2, 2).bool()), "known must be"), (dict(steps=[]), "steps="),
        (dict(seed=[1]), "seed"), (dict(seed=-1), "seed"), (dict(size=7), "size=7"), (dict(negative=["a"]), "negative"), (dict(prompts=[]), "prompts"),
        (dict(until=2000), "until=2000"), (dict(until=-1), "until=-1"), (dict(until=50, steps=[900, 20]), "until=50"), (dict(steps=0), "steps=0"),
        (dict(steps=[20, 900]), "steps="), (dict(guidance=inf), "scale=inf"), (dict(eta=2.0, sampler="ddim"), "eta=2.0"),
    ],
)  # fmt: skip
def test_requests_refused(options, word):
    with pytest.raises(ValueError, match=word):
        sample(small().steps(**{"prompts": ["a", "b"], "steps": 2} | options))


valid_share = {"valid": 0, "all": 0}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompts=st.integers(1, 3),
    sampler=st.sampled_from([*SAMPLERS] * 5 + ["nothing"]),
    steps=st.integers(1, 8) | st.sampled_from([1, 2, 3, 4, 5, 0]) | st.lists(st.integers(2, 999), min_size=1, max_size=3, unique=True).map(lambda t: sorted(t, reverse=True)),
    until=st.none() | st.sampled_from([0, 1] * 10 + [-1]),
    seed=st.integers(0, 9) | st.integers(0, 9) | st.integers(0, 9) | st.lists(st.integers(0, 5), min_size=1, max_size=3),
    size=st.none() | st.sampled_from([8, (6, 10), 4, 12, 8, (6, 10), 4, 7]),
    guidance=st.floats(0, 9),
    strength=st.none() | st.floats(0, 1),
)
def test_any_request(prompts, sampler, steps, until, seed, size, guidance, strength):
    """Any request gives pictures of the right shape, or a ValueError that names an argument."""
    if isinstance(seed, list) and seed[0]:
        seed = (seed * 3)[:prompts]
    begin = {} if strength is None else dict(latents=random(1, 4, 3, 5), strength=strength)
    size = None if begin else size
    valid_share["all"] += 1
    try:
        pictures = _any_model()(["a cat"] * prompts, sampler=sampler, steps=steps, until=until, seed=seed, size=size, guidance=guidance, **begin)
    except ValueError as error:
        assert any(word in str(error) for word in ("sampler", "steps", "until", "seed", "size")), error
        return
    valid_share["valid"] += 1
    height, width = (6, 10) if begin else (8, 8) if size is None else (size, size) if isinstance(size, int) else size
    assert pictures.shape == (prompts, 3, height, width) and pictures.isfinite().all() and pictures.abs().max() <= 1


_models = []


def _any_model():
    if not _models:
        _models.append(small())
    return _models[0]


def test_enough_valid_requests():
    assert valid_share["valid"] >= 0.6 * valid_share["all"], valid_share


# Types of numbers, memory


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.05), (torch.bfloat16, 0.3)])
def test_dtype(files, thin, dtype, error):
    """All weights in the type asked for; latents and pictures in float32; nearly the same picture."""
    model = load_stable_diffusion(files["1"], config=tiny(SD1), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    ours, exact = (list(m.steps("a cat", steps=3, size=64))[-1].x for m in (model, thin["1"]))
    assert ours.dtype == torch.float32 and 0 < relative_error(ours, exact) < error
    assert model.decode(ours).dtype == torch.float32


def test_dtype_of_the_file(thin, tmp_path):
    """A file in half precision is read as it is, or in another type on request."""
    save_stable_diffusion(deepcopy(thin["1"]).half(), tmp_path / "half.safetensors")
    as_it_is = load_stable_diffusion(tmp_path / "half.safetensors", config=tiny(SD1))
    wider = load_stable_diffusion(tmp_path / "half.safetensors", config=tiny(SD1), dtype=torch.float32)
    assert {p.dtype for p in as_it_is.parameters()} == {torch.float16} and {p.dtype for p in wider.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(as_it_is.parameters(), wider.parameters()))


def test_save_memory(files, thin):
    """The same pictures; a latent at a time; parts that come and go."""
    model = load_stable_diffusion(files["1"], config=tiny(SD1)).save_memory("cpu")
    assert (model(PROMPTS, steps=2, size=64) - thin["1"](PROMPTS, steps=2, size=64)).abs().max() < 1e-3
    frugal, plain, images = small().save_memory("cpu"), small(), random(1, 3, 8, 8).clamp(-1, 1)
    assert (frugal(["a", "b"], steps=3) - plain(["a", "b"], steps=3)).abs().max() < 1e-4
    assert set(frugal.unet.seen) == {1} and set(plain.unet.seen) == {4}
    assert (frugal.img2img(images, "a", steps=4) - plain.img2img(images, "a", steps=4)).abs().max() < 1e-4


def test_parts_visit_the_device(monkeypatch):
    """Each part is moved for its turn only, and back, whatever happens."""
    model, moves = small().save_memory("cpu"), []
    for part in PARTS:
        module = getattr(model, part)
        monkeypatch.setattr(module, "to", lambda device, part=part, module=module: moves.append((part, str(device))) or module)
    model.sparing = torch.device("cpu", 0)
    model("a", steps=2)
    turns = [(part, device) for part, device in moves]
    assert turns == [(p, d) for p in ("text", "text", "unet", "vae") for d in ("cpu:0", "cpu")]
    moves.clear()
    with pytest.raises(RuntimeError), model._at_work("vae"):
        raise RuntimeError
    assert moves == [("vae", "cpu:0"), ("vae", "cpu")]
    moves.clear()
    walk = model.steps("a", steps=4)
    next(walk)
    walk.close()
    assert moves[-1] == ("unet", "cpu")


def test_walks_that_take_turns(monkeypatch):
    """The U-Net stays on the device until the last of them is over, and is on the CPU then, wherever it was before."""
    model, moves = small().save_memory("cpu"), []
    monkeypatch.setattr(model.unet, "to", lambda device: moves.append(str(device)) or model.unet)
    model.sparing = torch.device("cpu", 0)
    short, long = model.steps("a cat", steps=2), model.steps("a dog", steps=3)
    for _ in zip(short, long):
        pass
    assert moves == ["cpu:0", "cpu:0"]
    for _ in long:
        pass
    assert moves == ["cpu:0", "cpu:0", "cpu"]


@pytest.mark.bad_input
def test_in_turn_refuses_a_short_batch():
    with pytest.raises(ValueError):
        InTurn(Network())(random(4, 4, 5, 3), torch.tensor([1, 2, 3, 4]), random(1, 7, 5))


def test_in_turn():
    network = Network()
    x, times, context = random(3, 4, 5, 3), torch.tensor([1, 2, 3]), random(3, 7, 5)
    assert torch.allclose(InTurn(network)(x, times, context), network(x, times, context), atol=1e-6)
    assert network.seen == [1, 1, 1, 3]


# SDXL's U-Net


def test_xl_size():
    with torch.device("meta"):
        unet = UNetXL(**SDXL_UNET)
    assert count_parameters(unet) == 2_567_463_684 and len(unet.state_dict()) == 1680
    assert {"label_emb.0.0.weight", "label_emb.0.2.bias", "middle_block.1.transformer_blocks.9.norm3.bias"} <= unet.state_dict().keys()


def test_xl_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    ours = UNetXL(**SDXL_UNET | dict(image_size=8, model_channels=32, num_head_channels=8, transformer_depth=(1, 2, 3), context_dim=16, adm_in_channels=12 + 6 * 8))
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128), cross_attention_dim=16, attention_head_dim=(4, 8, 16), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8,
    )  # fmt: skip
    table = unet_table(3, 2) | {".label_emb.0.0.": ".add_embedding.linear_1.", ".label_emb.0.2.": ".add_embedding.linear_2."}
    names = {name: slot.key for name, slot in slots(list(ours.state_dict()), table=table).items()}
    times, sizes, summary = torch.tensor([3, 700]), torch.tensor([[64.0, 48, 0, 0, 64, 64]] * 2), random(2, 12, seed=3)

    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = ours

        def forward(self, x, context, summary):
            sinusoids = theirs.add_time_proj(sizes.flatten()).reshape(2, -1)
            return self.unet(x, times, context, torch.cat([summary, sinusoids], 1))

    def call(x, context, summary):
        return theirs(x, times, context, added_cond_kwargs={"text_embeds": summary, "time_ids": sizes}).sample

    agreement = compare(Ours(), theirs, (random(2, 4, 8, 12), random(2, 5, 16, seed=2), summary), {f"unet.{a}": b for a, b in names.items()}, call)
    assert agreement, agreement


@pytest.mark.bad_input
def test_xl_refused():
    small = dict(image_size=4, in_channels=4, out_channels=4, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_heads=4)
    for wrong in (0, 2.5, "sequential"):
        with pytest.raises(ValueError, match="adm_in_channels"):
            UNetXL(**small, adm_in_channels=wrong)
    unet = UNetXL(**small, adm_in_channels=6)
    for y in (None, torch.zeros(2, 5), torch.zeros(1, 6), 3):
        with pytest.raises(ValueError, match="y must be"):
            unet(torch.zeros(2, 4, 4, 4), 5, y=y)
    a, b = (randomize(unet)(random(2, 4, 4, 4), 5, y=random(2, 6, seed=s)) for s in (0, 1))
    assert a.shape == (2, 4, 4, 4) and not torch.equal(a, b)


xl_share = {"valid": 0, "all": 0}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(adm=st.sampled_from([1, 2, 5, 9, 3, 4, 6, 0]), channels=st.sampled_from([32, 64]), depth=st.integers(1, 2), levels=st.integers(1, 2), heads=st.sampled_from([8, 16, 32, 8, 16, 32, 5]))
def test_any_xl(adm, channels, depth, levels, heads):
    """Any U-Net of this kind works forward and backward, or says which argument is wrong."""
    xl_share["all"] += 1
    try:
        unet = UNetXL(image_size=4, in_channels=4, out_channels=3, model_channels=channels, channel_mult=(1, 2)[:levels], num_res_blocks=1, attention_resolutions=(1,),
                      num_head_channels=heads, use_spatial_transformer=True, transformer_depth=depth, context_dim=5, adm_in_channels=adm)  # fmt: skip
    except ValueError as error:
        assert any(word in str(error) for word in ("adm_in_channels", "model_channels", "num_head_channels")), error
        return
    xl_share["valid"] += 1
    y = random(2, adm).requires_grad_()
    randomize(unet)(random(2, 4, 4, 6), 7, random(2, 3, 5), y).square().sum().backward()
    assert y.grad.abs().max() > 0


def test_enough_valid_xl():
    assert xl_share["valid"] >= 0.6 * xl_share["all"], xl_share


# Downloads


def test_download(tmp_path, monkeypatch):
    """The first mirror that gives the right file is taken; otherwise all answers are told, and what to do."""
    import huggingface_hub

    (tmp_path / "file").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    asked = []

    def hub(repository, name, local_dir=None):
        asked.append(repository)
        if repository == "no/where":
            raise OSError("no network\nsecond line")
        (tmp_path / "other").write_bytes(b"other!!")
        return str(tmp_path / ("other" if repository == "not/it" else "file"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    mirrors = [("no/where", "a"), ("not/it", "a"), ("good/one", "a"), ("never/asked", "a")]
    assert download(mirrors, sha256=digest, size=7).read_bytes() == b"weights" and asked == ["no/where", "not/it", "good/one"]
    with pytest.raises(CheckpointError) as caught:
        download(mirrors[:2], sha256=digest)
    for word in ("no/where: OSError, no network", "not/it: CheckpointError", "https://huggingface.co/no/where/blob/main/a", "load_stable_diffusion("):
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="mirrors"):
        download([])


def test_recipe(files, tmp_path, monkeypatch):
    """The lines at the beginning of the chapter draw; here a thin file takes the place of the real one, and the CPU that of the GPU."""
    chapter = Path(__file__).parents[2] / "nbs" / "17_stable_diffusion.ipynb"
    text = "\n".join(cell.source for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "markdown")
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.S)
    asked = {}

    def fetched(mirrors, **options):
        asked.update(options, mirrors=mirrors)
        return files["1"]

    monkeypatch.setattr("unet_course.stable_diffusion.download", fetched)
    monkeypatch.setattr("unet_course.stable_diffusion.SD1", tiny(SD1))
    monkeypatch.chdir(tmp_path)
    assert recipe.count('.to("cuda")') == 1 and len(recipe.splitlines()) <= 5
    names = {}
    exec(recipe.replace('.to("cuda")', ""), names)
    assert asked == SD15 and next(names["model"].parameters()).dtype == torch.float16
    picture = read_picture("apple.png", 64)
    assert picture.shape == (1, 3, 64, 64) and picture.std() > 0.05
    assert (picture - names["model"]("a red apple on a table", seed=1)).abs().max() <= 0.51 / 127.5


def test_pictures(tmp_path):
    """There and back; turned as the camera says; the middle; white behind what is transparent."""
    from PIL import Image

    picture = torch.rand(3, 16, 24, generator=seeded()) * 2 - 1
    write_picture(picture, tmp_path / "a.png")
    again = read_picture(tmp_path / "a.png", (16, 24))
    assert again.shape == (1, 3, 16, 24) and (again[0] - picture).abs().max() <= 0.51 / 127.5
    write_picture(3 * picture.half(), str(tmp_path / "b.png"))
    assert torch.equal(read_picture(tmp_path / "b.png", (16, 24)).abs() == 1, (3 * picture.half()).abs()[None] >= 0.998)
    stripes = torch.full((3, 8, 24), -1.0)
    stripes[..., 8:16] = 1
    write_picture(stripes, tmp_path / "c.png")
    assert torch.equal(read_picture(tmp_path / "c.png", 8), torch.ones(1, 3, 8, 8))
    upper = Image.new("RGB", (8, 16))
    upper.paste((255, 255, 255), (0, 0, 8, 8))
    upper.getexif()[0x0112] = 3  # upside down
    exif = upper.getexif()
    upper.save(tmp_path / "d.png", exif=exif)
    turned = read_picture(tmp_path / "d.png", (16, 8))
    assert (turned[:, :, :8] == -1).all() and (turned[:, :, 8:] == 1).all()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "e.png")
    assert (read_picture(tmp_path / "e.png", 8) == 1).all()


def test_pictures_are_read_as_data(tmp_path):
    """The reader of appendix 90, with all it knows: 16 bits, files cut off, pixels of unknown range."""
    import numpy as np
    from PIL import Image

    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert (read_picture(tmp_path / "deep.png", 16)[0] - (torch.from_numpy(ramp.astype(np.float32)) / 32767.5 - 1)).abs().max() < 0.01
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="x.tiff.*no picture that Pillow can read: .*floating-point"):
        read_picture(tmp_path / "x.tiff", 8)
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:800])
    with pytest.raises(ValueError, match="half.jpg.*no picture that Pillow can read"):
        read_picture(str(tmp_path / "half.jpg"))
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_picture(tmp_path / "nowhere.png")


@pytest.mark.bad_input
def test_pictures_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="no picture that Pillow can read"):
        read_picture(tmp_path / "text.png")
    for size in (0, 2.5, True, "64", (8,), (8, 8, 8), (8, 0), None):
        with pytest.raises(ValueError, match="size"):
            read_picture(tmp_path / "text.png", size)
    for picture in (torch.zeros(1, 3, 8, 8), torch.zeros(8, 8), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match="picture must be"):
            write_picture(picture, tmp_path / "a.png")
    with pytest.raises(ValueError, match="overflowed"):
        write_picture(torch.full((3, 8, 8), inf), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_read_parts_leaves_training_possible(files):
    """Weights that were read can be trained on."""
    parts, _ = read_parts(files["1"], tiny(SD1))
    assert all(p.requires_grad and p.device.type == "cpu" for module in parts.values() for p in module.parameters())
    assert isinstance(parts["unet"], UNetModel)
