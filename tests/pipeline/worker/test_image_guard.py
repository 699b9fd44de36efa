"""What is raised in the work on one image becomes its error, and its trace a line of the log."""

from __future__ import annotations

import pytest

from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.worker import image_guard
from hqlabel.pipeline.worker.image_guard import charge

URI = "https://me:word@host/a.jpg?key=secret"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    monkeypatch.setattr(
        image_guard.logs, "event", lambda name, **fields: found.append({"name": name, **fields})
    )
    return found


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_an_unknown_error_is_internal_and_its_trace_is_logged_without_secrets(
    lines: list[dict[str, object]],
) -> None:
    found = charge(raised(KeyError(f"no {URI}\nhere")), uri=URI, step="decode")

    assert (found.code, found.fault and found.fault.code) == ("internal", "internal")
    assert found.message.startswith("decode: KeyError: ")
    [line] = lines
    assert (line["name"], line["uri"], line["step"]) == ("image_raised", "https://host/a.jpg", "decode")
    assert "in raised" in str(line["trace"])
    for text in (found.message, str(line["trace"]), str(line["uri"])):
        assert "secret" not in text
        assert "word" not in text


def test_memory_is_out_of_memory_and_our_own_error_stays_itself(lines: list[dict[str, object]]) -> None:
    own = ImageError("corrupt", "half a picture")
    assert charge(raised(MemoryError()), uri=URI, step="decode").code == "out_of_memory"
    assert charge(own, uri=URI, step="decode") is own
    assert lines == []


@pytest.mark.parametrize("error", [SystemicFault("disk", "full"), KeyboardInterrupt()])
def test_what_is_no_images_rises(error: BaseException) -> None:
    with pytest.raises(type(error)):
        charge(error, uri=URI, step="decode")
