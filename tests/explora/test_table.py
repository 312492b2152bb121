from __future__ import annotations

import json

import torch
from torch import nn

from geoexplora.explora import ExploraConfig, apply_explora, format_table, parameter_table, table_to_json
from geoexplora.explora.table import norm_parameters, part_of

from .conftest import decoder_for, group_encoder, plain_encoder, trainable


def test_the_table_holds_every_parameter_once() -> None:
    encoder = group_encoder()
    decoder = decoder_for(encoder)
    apply_explora(encoder, ExploraConfig((1, 4), 3, embeddings=True))
    table = parameter_table(encoder, (1, 4), decoder=decoder)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    assert sum(row.trainable for row in table) == sum(p.numel() for p in parameters if p.requires_grad)
    assert sum(row.frozen for row in table) == sum(p.numel() for p in parameters if not p.requires_grad)
    assert [row.part for row in table] == [
        "whole blocks",
        "LoRA",
        "norms",
        "other block weights",
        "patch embedding",
        "position encoding",
        "channel encoding",
        "class token",
        "decoder",
    ]
    whole = next(row for row in table if row.part == "whole blocks")
    assert (whole.trainable, whole.frozen) == (sum(p.numel() for p in encoder.blocks[0].parameters()) * 2, 0)


def test_text_and_json() -> None:
    encoder = plain_encoder()
    apply_explora(encoder, ExploraConfig((4,), 3))
    table = parameter_table(encoder, (4,))
    lines = format_table(table).splitlines()
    assert lines[0].split() == ["part", "trainable", "frozen"]
    assert len({len(line) for line in lines}) == 1
    total = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert lines[-1].startswith("total (")
    assert f"{total:,}" in lines[-1]
    stored = json.loads(json.dumps(table_to_json(table)))
    assert sum(row["trainable"] for row in stored) == total
    assert format_table([]).splitlines()[-1].split()[-2:] == ["0", "0"]


def test_parts_of_names() -> None:
    encoder = plain_encoder()
    apply_explora(encoder, ExploraConfig((1,), 3))
    norms = norm_parameters(encoder)
    assert {"norm.weight", "blocks.1.norm1.bias"} <= norms
    assert {name for name in trainable(encoder) if part_of(name, norms, (1,)) == "other"} == set()
    assert part_of("blocks.0.norm1.weight", norms, (1,)) == "whole blocks"
    assert part_of("blocks.1.norm1.weight", norms, (1,)) == "norms"
    assert part_of("blocks.10.mlp.fc1.weight", norms, (1,)) == "other block weights"
    assert part_of("reg_token", norms, ()) == "other"
    assert norm_parameters(nn.Sequential(nn.LayerNorm(2), nn.RMSNorm(2), nn.BatchNorm1d(2))) == {
        "0.weight",
        "0.bias",
        "1.weight",
    }
    assert norm_parameters(torch.nn.LayerNorm(3)) == {"weight", "bias"}
