"""What the user gets to read."""

from __future__ import annotations

import pytest
from torch._utils import ExceptionWrapper

from geoexplora.errors import DataError, GeoExploraError, user_message


def test_problem_and_remedy() -> None:
    assert user_message(DataError("problem", "remedy")) == "problem\nremedy"
    assert user_message(GeoExploraError("problem")) == "problem"


@pytest.mark.parametrize("chained", [False, True])
def test_a_workers_traceback_is_left_out(chained: bool) -> None:
    try:
        try:
            raise ValueError("cause: DataError: not this one")
        except ValueError as cause:
            raise DataError("first line: of two\nsecond line", "remedy") from (cause if chained else None)
    except DataError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError) as caught:
        wrapper.reraise()
    assert "Traceback" in str(caught.value)
    assert user_message(caught.value) == "first line: of two\nsecond line\nremedy"
