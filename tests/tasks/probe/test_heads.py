"""Every head trained in one pass equals a single classifier trained alone by autograd and torch's optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from geoexplora.tasks.probe.heads import LinearHeads, batch_order
from geoexplora.tasks.probe.rows import FeatureRows

SETS = {"first": slice(0, 6), "middle": slice(4, 10), "all": slice(0, 12)}
RATES = (1e-3, 0.1, 2.0)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    features = rng.standard_normal((50, 12)) + labels[:, None]
    return features.astype(np.float32), labels


def alone(features, labels, weight, columns, rate, batches, steps):
    """The same by torch's own means; returns weight and bias."""
    head = torch.nn.Linear(columns.stop - columns.start, 4)
    head.weight.data, head.bias.data = weight.clone(), torch.zeros(4)
    size = len(batches[0])
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * size / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    for rows in batches:
        loss = F.cross_entropy(head(torch.from_numpy(features[rows])[:, columns]), torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


@pytest.mark.parametrize("batch", [16, 500])
@pytest.mark.parametrize("sets", [SETS, {"middle": SETS["middle"]}])
def test_heads_equal_those_trained_alone(data, batch, sets):
    features, labels = data
    heads = LinearHeads(sets, RATES, 4, seed=3)
    begun = [stack.weight.clone() for stack in heads._stacks]
    heads.fit(FeatureRows([features[:20], features[20:]]), labels, np.arange(50), 25, batch, seed=1)
    batches = list(batch_order(np.arange(50), batch, 25, seed=1))
    assert len(batches) == 25
    inputs = torch.from_numpy(features[:, heads.span])
    got = heads.logits(inputs)
    for number, setting in enumerate(heads.settings):
        place = list(sets).index(setting.features)
        columns = sets[setting.features]
        expected = alone(features, labels, begun[place][:4], columns, setting.rate, batches, 25)
        logits = expected(torch.from_numpy(features[:, columns]))
        torch.testing.assert_close(got[:, number], logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_stay_near(data):
    features, labels = data
    exact, near = (LinearHeads(SETS, (0.1,), 4, products=kind) for kind in (torch.float32, torch.bfloat16))
    for heads in (exact, near):
        heads.fit(FeatureRows([features]), labels, np.arange(50), 25, 16, seed=1)
    inputs = torch.from_numpy(features)
    difference = (exact.logits(inputs) - near.logits(inputs)).abs().max()
    assert 0 < difference < 0.05 * exact.logits(inputs).abs().max()


def test_testing_tells_classes_and_losses(data):
    features, labels = data
    heads = LinearHeads(SETS, RATES, 4)
    heads.fit(FeatureRows([features]), labels, np.arange(50), 10, 16, seed=0)
    rows = np.arange(7, 40)
    predicted, losses = heads.test(FeatureRows([features]), labels, rows)
    logits = heads.logits(torch.from_numpy(features[rows]))
    assert predicted.equal(logits.argmax(2).T)
    for number in range(len(heads.settings)):
        expected = F.cross_entropy(logits[:, number], torch.from_numpy(labels[rows])).item()
        assert losses[number].item() == pytest.approx(expected, rel=1e-5)


def test_a_head_that_diverges_says_so(data):
    features, labels = data
    heads = LinearHeads({"all": slice(0, 12)}, (1e-3, 1e30), 4)
    heads.fit(FeatureRows([1e10 * features]), labels, np.arange(50), 10, 16, seed=0)
    _, losses = heads.test(FeatureRows([1e10 * features]), labels, np.arange(50))
    assert math.isfinite(losses[0])
    assert not math.isfinite(losses[1])


def test_every_pass_takes_each_row_at_most_once():
    rows = np.arange(100, 110)
    batches = list(batch_order(rows, 4, 7, seed=0))
    assert [len(batch) for batch in batches] == [4] * 7
    for first in (0, 2, 4):
        seen = np.concatenate(batches[first : first + 2])
        assert len(np.unique(seen)) == 8
        assert set(seen) <= set(rows)
    assert not np.array_equal(batches[0], batches[2])
    assert all(np.array_equal(a, b) for a, b in zip(batches, batch_order(rows, 4, 7, seed=0), strict=True))
    assert [len(batch) for batch in batch_order(rows, 256, 3, seed=0)] == [10] * 3
