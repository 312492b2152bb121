"""``geoexplora export``: every format from an RGB run and from a group-channel run, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_encoder
from geoexplora.weights.source_weights import sha256
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

from .finetuning.helpers import FINE

RGB_NAME = "plain_vit_pico.s16_p4_c3"
GROUP_NAME = "group_channel_vit_pico.s16_p8_g0-1-2-6_g3-4-5-7_g8-9"
LINES = {
    "timm": ("a", "import {}timm; timm.create_model('local-dir:{path}', pretrained=True)"),
    "torchgeo": (
        "a.ckpt",
        "import geoexplora; from torchgeo.tasks import Classification;"
        " Classification(model=\"{name}\", weights='{path}', in_channels={bands}, num_classes=...)",
    ),
    "hf-dinov2": ("a", "import transformers; transformers.AutoModel.from_pretrained('{path}')"),
    "satmae": ("a.pth", "import torch; model.load_state_dict(torch.load('{path}', weights_only=True)[\"model\"])"),
    "safetensors": ("a.safetensors", "import geoexplora; geoexplora.load_encoder('{path}')"),
    "onnx": ("a.onnx", "import onnxruntime; onnxruntime.InferenceSession('{path}').run(None, {{\"image\": images}})"),
}


@pytest.fixture
def features():
    """What an encoder makes of random images."""

    @torch.inference_mode()
    def compute(source):
        encoder, spec = load_encoder(source)
        generator = torch.Generator().manual_seed(0)
        return encoder.forward_features(torch.randn(2, len(spec.bands), 16, 16, generator=generator))

    return compute


@pytest.mark.parametrize("form", LINES)
def test_an_rgb_run(geoexplora, photo_run, tmp_path, features, form):
    name, line = LINES[form]
    path = tmp_path / name
    got = geoexplora("export", photo_run, "--format", form, "--output", path)
    assert got.status == 0, got.err
    assert got.err == ""
    written, *more, check, fed, load = got.out.splitlines()
    assert (form == "satmae") == (not more)  # all others say that they leave the decoder out
    assert written.startswith(f"{path}: vit_pico as {form}, float32, ")
    assert "outputs differ by at most" in check
    assert fed == "input: 3 bands (R, G, B), 16 px, normalization standardize"
    assert load == "load: " + line.format("", path=path, name=RGB_NAME, bands=3)
    if form != "onnx":
        torch.testing.assert_close(features(path), features(photo_run), rtol=1e-5, atol=1e-5)
    if form not in {"onnx", "hf-dinov2"}:
        assert read_weights(path).described().normalization == read_weights(photo_run).described().normalization
    if form == "satmae":
        assert read_weights(path).decoder_tensors.keys() == read_weights(photo_run).decoder_tensors.keys()
    for file in [path, *path.rglob("*")]:
        assert not file.is_file() or not any(str(here).encode() in file.read_bytes() for here in (tmp_path, photo_run))


@pytest.mark.parametrize("form", [form for form in LINES if form != "hf-dinov2"])
def test_a_group_channel_run(geoexplora, explora_run, tmp_path, features, form):
    name, line = LINES[form]
    path = tmp_path / name
    got = geoexplora("export", "--init", explora_run, "--format", form, "--output", path)
    assert got.status == 0, got.err
    assert "input: 10 bands (B2, B3, B4, B5, B6, B7, B8, B8A, B11, B12), 16 px" in got.out
    assert line.format("geoexplora, ", path=path, name=GROUP_NAME, bands=10) in got.out
    if form != "onnx":
        assert read_weights(path).described() == read_weights(explora_run).described()
        torch.testing.assert_close(features(path), features(explora_run), rtol=1e-5, atol=1e-5)


def test_segmentation_in_half_precision(geoexplora, explora_run, tmp_path):
    path = tmp_path / "a.pth"
    words = ("--task", "segmentation", "--dtype", "bfloat16")
    got = geoexplora("export", explora_run, "--format", "torchgeo", "--output", path, *words)
    assert got.status == 0, got.err
    assert f'SemanticSegmentation(model="dpt", backbone="tu-{GROUP_NAME}", weights=\'{path}\', in_chan' in got.out
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["model.backbone.model.model.cls_token"].dtype == torch.bfloat16


def test_an_adapter_and_its_base(geoexplora, photo_run, explora_run, tmp_path):
    path = tmp_path / "a.safetensors"
    words = ("export", explora_run / "adapter", "--format", "safetensors", "--output", path)
    got = geoexplora(*words)
    assert got.status == 2
    digest = sha256(photo_run / "encoder.safetensors")
    assert f"Name them by --base: run/encoder.safetensors, sha256 {digest}." in got.err
    got = geoexplora(*words, "--base", explora_run)
    assert got.status == 2
    assert digest in got.err
    got = geoexplora(*words, "--base", photo_run)
    assert got.status == 0, got.err
    merged, wanted = load_file(path), load_file(explora_run / "encoder.safetensors")
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [16, 24])
def test_an_adapter_of_fine_tuning_and_its_base(geoexplora, photo_run, explora_run, tmp_path, size):
    """Its base is the run that it was trained on, not what that run was trained from."""
    run, path = tmp_path / "run", tmp_path / "a.safetensors"
    words = ("--dataset", "sample", "--tile-size", "32", "--image-size", size, "--method", "lora", *FINE)
    got = geoexplora("finetune", "--init", explora_run, *words, "--max-steps", "2", "--output", run)
    assert got.status == 0, got.err
    words = ("export", run / "adapter", "--format", "safetensors", "--output", path)
    digest = sha256(explora_run / "encoder.safetensors")
    for base in ((), ("--base", photo_run)):
        got = geoexplora(*words, *base)
        assert got.status == 2
        assert digest in got.err
    got = geoexplora(*words, "--base", explora_run)
    assert got.status == 0, got.err
    merged, wanted, before = map(load_file, (path, *(a / "encoder.safetensors" for a in (run, explora_run))))
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    name = "blocks.0.attn.qkv.weight"
    assert not torch.allclose(merged[name], before[name], atol=1e-3)
    source = json.loads(geoexplora("inspect", run, "--json").out)["weights"]["encoder"]["source"]
    assert source["sha256"] == digest
    assert read_weights(path).described() == read_weights(run).described()


def test_others_files(geoexplora, tmp_path, features):
    """Where they come from is recorded, by name and digest."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain_vit_tiny.pth")
    got = geoexplora("export", tmp_path / "mae_pretrain_vit_tiny.pth", "--format", "timm", "--output", tmp_path / "a")
    assert got.status == 0, got.err
    assert read_weights(tmp_path / "a").described().source == {
        "name": "mae_pretrain_vit_tiny.pth",
        "sha256": sha256(tmp_path / "mae_pretrain_vit_tiny.pth"),
        "format": "meta-mae",
    }
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architecture"], config["num_features"]) == ("vit_tiny_patch16_224", 192)
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.485, 0.456, 0.406], abs=1e-6)
    again = geoexplora("inspect", tmp_path / "a")
    assert again.status == 0
    torch.testing.assert_close(features(tmp_path / "a"), features(tmp_path / "mae_pretrain_vit_tiny.pth"))


@pytest.fixture
def refused(geoexplora, tmp_path):
    """Run export, expecting a message of the wanted words, and nothing written."""

    def run(*words, contains):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        got = geoexplora("export", *words)
        assert got.status == 2, got.err
        assert got.out == ""
        assert "Traceback" not in got.err
        message = got.err[got.err.index("geoexplora export: ") :]
        for text in contains:
            assert text in message
        remedies = ("\n", ". ", "expected one of", "no such file")
        assert any(text in message.strip() for text in remedies), "a remedy follows"
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    return run


def test_missing_settings(refused):
    refused(contains=["nothing to export", "--format is missing. Name one of: timm, torchgeo", "--output is missing"])
    refused("run", "--format", "onnx", contains=["--output is missing. Name a file that ends in .onnx, or a folder."])


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (("--format", "timn", "--output", "a"), ["--format: expected one of timm", "'timn'"]),
        (
            ("--format", "onnx", "--output", "a.pt"),
            ["a.pt cannot hold", "Name a file that ends in .onnx, or a folder."],
        ),
        (("--format", "timm", "--output", "a", "--task", "segmentation"), ["--task", "Leave out --task"]),
        (("--format", "onnx", "--output", "a.onnx", "--dtype", "float16"), ["--dtype", "stay float32"]),
        (("--format", "timm", "--output", "a", "--dtype", "int8"), ["--dtype: expected one of float32, float16"]),
        (("--format", "timm", "--output", "a", "--base", "b.pth"), ["is no adapter", "Leave out --base"]),
        (("--format", "timm", "--output", "a", "--quantize", "8"), ["unknown option --quantize"]),
    ],
)
def test_settings(refused, photo_run, words, contains):
    refused(photo_run, *words, contains=contains)


def test_sources(refused, explora_run, tmp_path):
    output = ("--format", "timm", "--output", tmp_path / "new")
    refused("./nowhere", *output, contains=["no such file"])
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", *output, contains=["is not a weights file"])
    refused(tmp_path, *output, contains=["has no encoder.safetensors"])
    (tmp_path / "half.safetensors").write_bytes((explora_run / "encoder.safetensors").read_bytes()[:5000])
    refused(tmp_path / "half.safetensors", *output, contains=["damaged"])
    tensors = load_file(explora_run / "encoder.safetensors")
    tensors["norm.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", read_weights(explora_run).described().to_metadata())
    refused(tmp_path / "nan.safetensors", *output, contains=["hold NaN or Inf: norm.bias"])
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", *output, contains=["no known format"])


def test_what_a_format_cannot_hold(refused, explora_run, tmp_path):
    output = ("--format", "hf-dinov2", "--output", tmp_path / "new")
    refused(explora_run, *output, contains=["knows no channel groups", "Export to timm or torchgeo instead."])


def test_outputs(refused, photo_run, tmp_path):
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "run").mkdir()
    shutil.copy(photo_run / "encoder.safetensors", tmp_path / "run")
    refused(photo_run, "--format", "satmae", "--output", tmp_path / "there.pth", contains=["exists already", "another"])
    for form in ("timm", "safetensors", "hf-dinov2"):
        refused(photo_run, "--format", form, "--output", tmp_path / "run", contains=["exists already"])
    where = tmp_path / "there.pth" / "new.onnx"
    refused(photo_run, "--format", "onnx", "--output", where, contains=["cannot write", "name another"])


def test_an_encoder_whose_normalization_nobody_told(geoexplora, tmp_path):
    """As TorchGeo's SENTINEL1_GRD_CLOSP: its transforms do not tell it."""
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="rgb", bands=("R", "G", "B"), normalization={}
    )
    save_encoder(tmp_path / "a.safetensors", build_encoder(spec).state_dict(), spec)
    for form in ("timm", "hf-dinov2"):
        got = geoexplora("export", tmp_path / "a.safetensors", "--format", form, "--output", tmp_path / form)
        assert got.status == 0, got.err
        assert "normalization not known" in got.out
