"""What the manifest of an output may say: a value that no publish writes makes it damaged, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_state.job_file import MOST_UNITS
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables import manifest
from hqlabel.pipeline.tables.manifest import MANIFEST_KEY, look_for_manifest, write_manifest
from tests.pipeline.made_units import MadeJob, make_job
from tests.pipeline.tables.test_publish_tables import run

Content = dict[str, Any]


@pytest.fixture
def made(local_store: Store) -> MadeJob:
    """Four units in two parts, published."""
    made = make_job(local_store, 16)
    made.commit()
    run(made)
    return made


def in_part(name: str, value: object, part: int = 0) -> Callable[[Content], None]:
    return lambda content: content["parts"][part].update({name: value})


def in_counts(name: str, value: object) -> Callable[[Content], None]:
    return lambda content: content["parts"][0]["counts"].update({name: value})


WRONG: dict[str, tuple[Callable[[Content], None], str]] = {
    "another format": (lambda content: content.update(format=2), "format 2, wanted 1"),
    "fewer than no units": (lambda content: content.update(units=-1, state="partial", parts=[]), "-1 units"),
    "more units than any plan": (lambda content: content.update(units=MOST_UNITS + 1), "units, wanted 0 to"),
    "a part before the first unit": (in_part("first_unit", -1), "part 0 has the units -1 to 2"),
    "a part that ends before it begins": (in_part("stop_unit", -1), "part 0 has the units 0 to -1"),
    "two parts of one unit": (in_part("first_unit", 1, part=1), "part 1 has the units 1 to 4"),
    "a part beyond the plan": (in_part("stop_unit", 5, part=1), "part 1 has the units 2 to 5"),
    "a part too few": (lambda content: content["parts"].pop(), "complete, but the parts have 2 of 4 units"),
    "a count below nothing": (in_counts("images", -1), "counts of images out of range"),
    "a count beyond 64 bits": (in_counts("boxes", 2**63), "counts of boxes out of range"),
    "a code with a terminal's command": (in_counts("failed", {"\x1b[2J": 1}), "a name of its counts is"),
    "a code without end": (in_counts("failed", {"x" * 101: 1}), "a name of its counts is"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_manifest_that_no_publish_writes_is_damaged(wrong: str, made: MadeJob) -> None:
    change, said = WRONG[wrong]
    content = json.loads(made.store.read(MANIFEST_KEY))
    change(content)
    made.store.put(MANIFEST_KEY, json.dumps(content).encode())

    found = look_for_manifest(made.store)

    assert found.manifest is None
    assert said in (found.damage or "")


def test_a_manifest_of_more_bytes_than_any_is_not_read(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MOST_BYTES", len(made.store.read(MANIFEST_KEY)) - 1)

    found = look_for_manifest(made.store)

    assert "which no such file of hqlabel has" in (found.damage or "")
    assert found.entry == made.store.head(MANIFEST_KEY)


def test_a_manifest_is_not_put_over_another_than_its_writer_has_read(made: MadeJob) -> None:
    first = look_for_manifest(made.store)
    assert first.manifest is not None
    mine, others = (dataclasses.replace(first.manifest, revision=number) for number in (10, 11))
    write_manifest(made.store, others, first.entry)

    with pytest.raises(JobRefused, match="another command has published or cleaned here meanwhile"):
        write_manifest(made.store, mine, first.entry)

    assert look_for_manifest(made.store).manifest == others


def test_a_manifest_that_is_replaced_the_moment_after_is_not_called_ours(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, put = look_for_manifest(made.store), Store.put_if_unchanged

    def overtaken(self: Store, key: str, data: bytes, seen: Entry | None) -> bool:
        done = put(self, key, data, seen)
        self.put(key, b"of another")
        return done

    monkeypatch.setattr(Store, "put_if_unchanged", overtaken)
    with pytest.raises(JobRefused, match="another command has published or cleaned here meanwhile"):
        write_manifest(made.store, dataclasses.replace(first.manifest, revision=10), first.entry)
