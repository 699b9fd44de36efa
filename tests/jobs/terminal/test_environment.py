"""A job does not start in an environment that switches a protection off."""

from __future__ import annotations

import pytest

from jobs.terminal.environment import REFUSED, dangerous_switches, refuse_dangerous_switches
from pipeline.errors import JobRefused


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_dangerous_switch_is_refused_by_name_and_reason(name: str) -> None:
    with pytest.raises(JobRefused) as caught:
        refuse_dangerous_switches({name: "1", "PATH": "/bin"})
    assert name in str(caught.value)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("value", ["", "0", "false", " No "])
def test_a_switch_that_is_off_is_no_reason(value: str) -> None:
    assert dangerous_switches({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": value}) == {}
