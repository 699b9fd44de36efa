"""Tasks of a plan in partitions, called at once in this process; what they return is pickled, as by Ray."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any


class Handle:
    def __init__(self, value: Any) -> None:
        self._body = pickle.dumps(value, protocol=5)

    def value(self) -> Any:
        return pickle.loads(self._body)


class TasksHere:
    def __init__(self) -> None:
        self.called: list[str] = []

    def start(self, function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        self.called.append(function.__name__)
        found = function(*(one.value() if isinstance(one, Handle) else one for one in arguments))
        if returns == 1:
            return Handle(found)
        assert len(found) == returns
        return [Handle(one) for one in found]

    def fold(self, function: Callable[..., Any], *arguments: Any, over: Sequence[Any]) -> Any:
        return Handle(function(*arguments, (one.value() for one in over)))

    def result(self, handle: Any) -> Any:
        return handle.value()
