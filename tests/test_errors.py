"""What the user gets to read."""

from __future__ import annotations

import pytest
from torch._utils import ExceptionWrapper

from geoexplora.errors import DataError, GeoExploraError, message_in_traceback, user_message


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


def test_the_message_of_another_process() -> None:
    text = 'Traceback (most recent call last):\n  File "x.py"\ngeoexplora.errors.DataError: tile 7\nremedy\n'
    assert message_in_traceback(text) == "tile 7\nremedy"
    assert message_in_traceback("Traceback (most recent call last):\nRuntimeError: connection closed") is None
    chained = f"{text}\nDuring handling of the above:\n\nTraceback (most recent call last):\nValueError: no"
    assert message_in_traceback(chained) is None
