"""DINOv2's objective against a slow one: each crop alone, heads over all tokens, losses pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from geoexplora.explora import ExploraConfig, apply_explora
from geoexplora.objectives.dinov2 import Centering, DINOv2, DINOv2Output, HeadSizes

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Of fp32 scores, divided by a temperature of 0.07 on the way."""

TEMPERATURE = 0.07
IMAGES = 2
WIDTH = 32
GROUPS = ((2, 0), (1, 3, 5), (4,))
SIZES = {
    "img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "num_classes": 0,
    "dynamic_img_size": True,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {"init_values": 1.0}),
    "registers": ("vit_tiny_patch16_224", {"init_values": 1.0, "reg_tokens": 2, "no_embed_class": True}),
    "groups": ("group_channel_vit_base", {"groups": GROUPS, "channel_width": 8}),
}


def noisy(model: Any, seed: int, scale: float = 0.1) -> None:
    """Every tensor random, but for LayerScale's gammas of 1; what teacher and student share is changed once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("gamma"):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def build(
    kind: str = "plain",
    *,
    separate: bool = False,
    centering: Centering = "softmax",
    explora: bool = False,
    koleo_weight: float = 0.1,
    checkpointing: bool = False,
    **kwargs: Any,
) -> DINOv2:
    """Student and teacher of different weights, in training mode, with centers that are not zero."""
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    encoder = timm.create_model(name, **(SIZES | settings | kwargs))
    if explora:
        apply_explora(encoder, ExploraConfig((2,), 2))
    encoder.set_grad_checkpointing(checkpointing)
    sizes = HeadSizes(prototypes=10, layers=2, hidden=20, bottleneck=6, separate=separate)
    model = DINOv2(encoder, sizes, centering, ibot_weight=0.7, koleo_weight=koleo_weight)
    noisy(model.student, 1)
    noisy(model.teacher, 2, 0.05)
    generator = torch.Generator().manual_seed(3)
    model.dino_center.copy_(0.1 * torch.randn(10, generator=generator))
    model.ibot_center.copy_(0.1 * torch.randn(10, generator=generator))
    return model.train()


def batch(model: DINOv2, local_crops: int = 3, local_size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of two images and a mask; one crop without hidden tokens, one with nothing else."""
    encoder: Any = model.student.encoder
    generator = torch.Generator().manual_seed(4)
    whole = torch.randn(2 * IMAGES, encoder.in_chans, 16, 16, generator=generator)
    local = torch.randn(local_crops * IMAGES, encoder.in_chans, local_size, local_size, generator=generator)
    mask = torch.rand(2 * IMAGES, getattr(encoder, "num_groups", 1) * 16, generator=generator) < 0.4
    mask[1] = False
    mask[2] = True
    return whole, local, mask


# The slow objective, written from the papers.


def slow_tokens(encoder: Any, crop: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
    """Tokens (T + N, D) of one crop, through timm's own steps."""
    patches = encoder.patch_embed(crop[None])
    if hidden is not None:
        rows = list(patches.flatten(1, -2)[0])
        rows = [token[0] if hides else row for row, hides in zip(rows, hidden.tolist(), strict=True)]
        patches = torch.stack(rows).view(patches.shape)
    return encoder.norm(encoder.blocks(encoder.norm_pre(encoder._pos_embed(patches))))[0]


def slow_cross_entropy(target: Tensor, scores: Tensor) -> Tensor:
    return -(target * (scores / 0.1).log_softmax(-1)).sum()


def slow_sinkhorn(scores: Tensor) -> Tensor:
    q = (scores.double() / TEMPERATURE).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q.float()


def slow_targets(scores: Tensor, center: Tensor, centering: str) -> Tensor:
    return slow_sinkhorn(scores) if centering == "sinkhorn" else ((scores - center) / TEMPERATURE).softmax(-1)


def slow_koleo(features: Tensor) -> Tensor:
    rows = features / features.norm(dim=1, keepdim=True)
    total = torch.zeros(())
    for i in range(len(rows)):
        total = total - min((rows[i] - rows[j]).norm() for j in range(len(rows)) if j != i).log()
    return total / len(rows)


def slow_objective(model: DINOv2, whole: Tensor, local: Tensor, mask: Tensor) -> dict[str, Any]:
    student, teacher = model.student, model.teacher
    prefix = student.encoder.num_prefix_tokens  # type: ignore[union-attr]
    with torch.no_grad():
        seen = [slow_tokens(teacher.encoder, crop) for crop in whole]
        class_scores = torch.stack([teacher.heads.dino(tokens[:1])[0] for tokens in seen])
        patch_scores = torch.cat([
            teacher.heads.ibot(tokens[prefix:])[hidden] for tokens, hidden in zip(seen, mask, strict=True)
        ])  # fmt: skip
        dino_targets = slow_targets(class_scores, model.dino_center, model.centering)
        ibot_targets = slow_targets(patch_scores, model.ibot_center, model.centering)
        centers = [
            0.9 * center + 0.1 * scores.mean(0)
            for center, scores in ((model.dino_center, class_scores), (model.ibot_center, patch_scores))
        ]
    token = student.heads.mask_token
    whole_tokens = [slow_tokens(student.encoder, crop, hidden, token) for crop, hidden in zip(whole, mask, strict=True)]
    class_tokens = [tokens[0] for tokens in whole_tokens] + [slow_tokens(student.encoder, crop)[0] for crop in local]

    pairs = []
    for image in range(IMAGES):
        for t in range(2):
            for v in range(len(class_tokens) // IMAGES):
                if t != v:
                    scores = student.heads.dino(class_tokens[v * IMAGES + image][None])[0]
                    pairs.append(slow_cross_entropy(dino_targets[t * IMAGES + image], scores))
    ibot, place = torch.zeros(()), 0
    for tokens, hidden in zip(whole_tokens, mask, strict=True):
        scores = student.heads.ibot(tokens[prefix:])[hidden]
        for score in scores:
            ibot = ibot + slow_cross_entropy(ibot_targets[place], score) / len(scores) / len(mask)
            place += 1
    koleo = sum(slow_koleo(torch.stack(class_tokens[t * IMAGES : (t + 1) * IMAGES])) for t in range(2))
    dino = sum(pairs) / len(pairs)
    return {
        "loss": dino + model.ibot_weight * ibot + model.koleo_weight * koleo,
        "dino_loss": dino,
        "ibot_loss": ibot,
        "koleo_loss": koleo,
        "teacher_entropy": -(dino_targets * dino_targets.log()).sum(1).mean(),
        "teacher_mean_entropy": -(dino_targets.mean(0) * dino_targets.mean(0).log()).sum(),
        "features": torch.stack([tokens[0] for tokens in seen]),
        "centers": centers,
    }


def gradients(model: DINOv2) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("local_crops", "local_size", "koleo"), [(3, 8, 0.1), (3, 16, 0.0), (1, 12, 0.5), (0, 8, 0.1), (8, 8, 0.0)]
)
def test_against_the_slow_objective(
    kind: str, centering: Centering, separate: bool, local_crops: int, local_size: int, koleo: float
) -> None:
    model = build(kind, centering=centering, separate=separate, koleo_weight=koleo, explora=koleo == 0.5)
    whole, local, mask = batch(model, local_crops, local_size)
    expected = slow_objective(model, whole, local, mask)
    expected["loss"].backward()
    slow_gradients = gradients(model)
    model.zero_grad()
    before = [model.dino_center.clone(), model.ibot_center.clone()]

    output = model(whole, local, mask, TEMPERATURE)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected["loss"], **CLOSE)
    names = {"dino_loss", "ibot_loss", "teacher_entropy", "teacher_mean_entropy"} | ({"koleo_loss"} if koleo else set())
    for name in names:
        torch.testing.assert_close(output.parts[name], expected[name].detach(), **CLOSE)
    torch.testing.assert_close(
        output.parts["teacher_student_kl"], (expected["dino_loss"] - expected["teacher_entropy"]).detach(), **CLOSE
    )
    assert output.parts.keys() == names | {"teacher_student_kl"}
    assert not any(part.requires_grad for part in (*output.parts.values(), output.features))
    torch.testing.assert_close(output.features, expected["features"], **CLOSE)
    for name, grad in gradients(model).items():
        assert (grad is None) == (slow_gradients[name] is None), name
        if grad is not None:
            torch.testing.assert_close(
                grad, slow_gradients[name], **CLOSE, msg=lambda text, name=name: f"{name} {text}"
            )
    assert model.dino_center.equal(before[0]), "centers move after the optimizer's step"
    model.update_centers()
    centers = [model.dino_center, model.ibot_center]
    for center, old, new in zip(centers, before, expected["centers"], strict=True):
        torch.testing.assert_close(center, old if centering == "sinkhorn" else new)


def passes(model: DINOv2, local_crops: int, local_size: int) -> tuple[int, int]:
    """How often student and teacher go through their first block in a step."""
    counts = {"student": 0, "teacher": 0}
    for name, branch in (("student", model.student), ("teacher", model.teacher)):
        encoder: Any = branch.encoder
        encoder.blocks[0].register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    model(*batch(model, local_crops, local_size), TEMPERATURE)
    return counts["student"], counts["teacher"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("local_crops", "local_size", "expected"), [(3, 8, 2), (3, 16, 1), (0, 8, 1)])
def test_as_few_passes_as_shapes_allow(kind: str, local_crops: int, local_size: int, expected: int) -> None:
    assert passes(build(kind), local_crops, local_size) == (expected, 1)


@pytest.mark.parametrize("separate", [False, True])
def test_heads_compute_hidden_tokens_only(separate: bool) -> None:
    model = build(separate=separate)
    rows = {"dino": 0, "ibot": 0}
    for name in ("dino", "ibot") if separate else ("dino",):
        getattr(model.student.heads, name).register_forward_hook(
            lambda _, inputs, __, name=name: rows.update({name: rows[name] + len(inputs[0])})
        )
    whole, local, mask = batch(model)
    model(whole, local, mask, TEMPERATURE)
    class_tokens, hidden = len(whole) + len(local), int(mask.sum())
    expected = {"dino": class_tokens, "ibot": hidden} if separate else {"dino": class_tokens + hidden, "ibot": 0}
    assert rows == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("local_size", [8, 16])
def test_the_student_does_not_see_hidden_pixels_and_the_teacher_does(kind: str, local_size: int) -> None:
    """The teacher takes no gradients: those of the pixels come from the student alone."""
    model = build(kind)
    whole, local, mask = batch(model, 3, local_size)
    whole.requires_grad_()
    output: DINOv2Output = model(whole, local, mask, TEMPERATURE)
    output.loss.backward()
    assert whole.grad is not None
    hidden = torch.zeros(whole.shape, dtype=torch.bool)
    for group, bands in enumerate(GROUPS if kind == "groups" else ((0, 1, 2),)):
        for place in range(16):
            top, left = 4 * (place // 4), 4 * (place % 4)
            hides = mask[:, group * 16 + place].view(-1, 1, 1, 1)
            hidden[:, list(bands), top : top + 4, left : left + 4] = hides
    assert ((whole.grad == 0) == hidden).all()
    changed = model(torch.where(hidden, whole + 1, whole), local, mask, TEMPERATURE)
    moved = (changed.features - output.features).abs().amax(1) > 1e-3
    assert moved.tolist() == mask.any(1).tolist()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("explora", [False, True])
def test_no_hidden_token_at_all(separate: bool, centering: Centering, explora: bool) -> None:
    """Every trained parameter still has a gradient, as distributed training needs; the center of tokens stays."""
    model = build(separate=separate, centering=centering, explora=explora)
    whole, local, mask = batch(model)
    center = model.ibot_center.clone()
    output = model(whole, local, torch.zeros_like(mask), TEMPERATURE)
    output.loss.backward()
    model.update_centers()
    assert output.parts["ibot_loss"] == 0
    assert torch.isfinite(output.loss)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    mask_token = model.student.heads.mask_token
    assert mask_token.grad is not None
    assert (mask_token.grad == 0).all()
    assert model.ibot_center.equal(center)


def test_stochastic_depth_is_the_students_only() -> None:
    model = build(drop_path_rate=0.6)
    inputs = batch(model)
    outputs = []
    for seed in range(4):
        torch.manual_seed(seed)
        outputs.append(model(*inputs, TEMPERATURE))
    assert len({float(output.loss.detach()) for output in outputs}) > 1
    assert all(output.features.equal(outputs[0].features) for output in outputs)
    model.eval()
    assert not model.student.training
    assert model.train().student.training
    assert not any(module.training for module in model.teacher.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("explora", [False, True])
def test_gradient_checkpointing_changes_nothing(kind: str, explora: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = build(kind, explora=explora, checkpointing=checkpointing)
        runs = []
        encoder: Any = model.student.encoder
        encoder.blocks[0].attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        output = model(*batch(model), TEMPERATURE)
        output.loss.backward()
        assert len(runs) == (4 if checkpointing else 2)
        results.append((output, gradients(model)))
    (one, grads), (other, others) = results
    assert one.loss.equal(other.loss)
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None)
        if grad is not None:
            torch.testing.assert_close(grad, others[name])


def test_koleo_needs_two_images() -> None:
    model = build()
    whole, local, mask = batch(model)
    with pytest.raises(ValueError, match="batch of one"):
        model(whole[::2], local[::2], mask[::2], TEMPERATURE)
    model = build(koleo_weight=0.0)
    assert torch.isfinite(model(whole[::2], local[::2], mask[::2], TEMPERATURE).loss)


def test_class_token_is_needed() -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", **(SIZES | {"class_token": False, "global_pool": "avg"}))
    with pytest.raises(ValueError, match="class token"):
        DINOv2(encoder, HeadSizes(4, 1, 4, 4))


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (1, 1, WIDTH)])
def test_mask_token_starts_from_the_sources(shape: tuple[int, ...]) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", **SIZES)
    given = torch.randn(shape)
    model = DINOv2(encoder, HeadSizes(4, 1, 4, 4))
    assert not model.start_heads({"mask_token": given}), "no heads came with it"
    for branch in (model.student, model.teacher):
        assert branch.heads.mask_token.equal(given.view(1, -1))
    assert model.student.heads.mask_token.requires_grad
    assert not DINOv2(encoder, HeadSizes(4, 1, 4, 4)).student.heads.mask_token.any()


def test_default_heads_are_dinov2s() -> None:
    with torch.device("meta"):
        head = HeadSizes().build(1024)
    linears = 1024 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(parameter.numel() for parameter in head.parameters()) == linears + 65536 * 256 + 65536


def test_a_step_moves_the_teacher_by_average_only() -> None:
    model = build(explora=True)
    frozen = {name: p.clone() for name, p in model.student.named_parameters() if not p.requires_grad}
    teacher = {name: p.clone() for name, p in model.teacher.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    model(*batch(model), TEMPERATURE).loss.backward()
    optimizer.step()
    assert all(p.equal(teacher[name]) for name, p in model.teacher.named_parameters())
    model.update_teacher(0.9)
    student = dict(model.student.named_parameters())
    for name, parameter in model.teacher.named_parameters():
        if name in frozen:
            assert parameter.equal(frozen[name])
            assert student[name].equal(frozen[name])
        else:
            torch.testing.assert_close(parameter, 0.9 * teacher[name] + 0.1 * student[name])
            assert not parameter.equal(teacher[name])


def test_autocast_to_bf16_stays_close() -> None:
    model = build(koleo_weight=0.0)
    inputs = batch(model)
    exact = model(*inputs, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs, 0.5)
    rough.loss.backward()
    assert rough.loss.dtype == rough.features.dtype == torch.float32
    assert float(rough.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.05)
