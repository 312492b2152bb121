"""Rows of several arrays, in any order."""

from __future__ import annotations

import numpy as np
import pytest

from geoexplora.tasks.probe.rows import FeatureRows, chunks


@pytest.fixture
def whole():
    return np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)


@pytest.mark.parametrize("rows", [[0], [29, 3, 3, 12], [5, 4, 6], list(range(30)), []])
@pytest.mark.parametrize("columns", [slice(None), slice(2, 5)])
def test_reading(whole, rows, columns):
    index = np.array(rows, dtype=np.int64)
    got = FeatureRows([whole[:5], whole[5:7], whole[7:]]).read(index, columns)
    np.testing.assert_array_equal(got.numpy(), whole[index, columns])


def test_streaming_keeps_the_order(whole):
    rows = np.random.default_rng(1).permutation(30)
    features = FeatureRows([whole])
    parts = list(features.stream(chunks(rows, 7)))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 2]
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in parts]), whole[rows])
    assert len(features) == 30


def test_an_error_of_reading_comes_through(whole):
    with pytest.raises((IndexError, RuntimeError)):
        list(FeatureRows([whole]).stream([np.array([1]), np.array([30])]))


def test_a_stream_may_be_left_early(whole):
    stream = FeatureRows([whole]).stream(chunks(np.arange(30), 2))
    assert next(stream).shape == (2, 6)
    stream.close()
