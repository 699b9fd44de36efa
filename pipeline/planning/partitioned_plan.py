"""The plan of more rows than one process should hold: in partitions, each the work of a task.

Rows of both tables are parted by the hash of the key that joins them, joined, and parted again by ranges of
image ids; the ranges, one after the other, are the plan. It is the plan that `make_plan` makes, bit for bit:
how many partitions there are, where they ran and in which order shows nowhere. This process holds counts,
names of classes and samples, and no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.errors import JobRefused, clean_text, count
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.inputs.box_tables import (
    COST_OF_LISTS,
    COST_OF_ROWS,
    are_labels_ids,
    labels_as_ids,
    spaced_names,
)
from hqlabel.pipeline.inputs.columns import RowFaults
from hqlabel.pipeline.inputs.find_files import listings_kept
from hqlabel.pipeline.inputs.image_box_lists import TEXT, examples
from hqlabel.pipeline.inputs.open_inputs import COST_OF_IMAGES, allowed_access
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.job_state.plan_files import UNITS_PER_FILE
from hqlabel.pipeline.planning import partition_tasks as steps
from hqlabel.pipeline.planning.images_named_twice import NamedTwice
from hqlabel.pipeline.planning.join_boxes_to_images import (
    Joined,
    PartOf,
    Unmatched,
    counted_once,
    images_of,
    is_by_uri,
    not_listed,
    rows_repeated,
    why,
)
from hqlabel.pipeline.planning.make_plan import Plan, make_plan, missing_files, rules_of, write_plan
from hqlabel.pipeline.planning.partition_inputs import Source, TableInputs, inspect_inputs, read_piece, split
from hqlabel.pipeline.planning.plan_summary import (
    BOXES_CHECKED,
    CheckedBoxes,
    JoinedInputs,
    PlanSummary,
    RowCounts,
    summarise,
)
from hqlabel.pipeline.planning.plan_table import (
    Categories,
    RefusedUris,
    number_categories,
    refuse_if_a_flag_is_missing,
)
from hqlabel.pipeline.schema import PLAN
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.read_objects import one_version_each

LARGE_ROWS = 5_000_000
"""Rows of images and boxes above which a plan is made in partitions: some 1.5 GB in one process."""
_LEAST_BYTES = 2
"""Of a row: files that are smaller are not opened to count their rows."""
SOME_ROWS = 1024


class Tasks(Protocol):
    """What calls functions of partitions, each in some process; what it returns are handles of results.

    A handle among the arguments is given to the function as its result.
    """

    def start(self, function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        """Begin a call; return a handle, or `returns` of them for a function that returns a list."""

    def fold(self, function: Callable[..., Any], *arguments: Any, over: Sequence[Any]) -> Any:
        """Begin a call with an iterator of the results of handles as last argument; return a handle."""

    def result(self, handle: Any) -> Any:
        """Return a result, waiting for it; raises what its function, or one before it, raised."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How inputs are cut; nothing of the plan depends on it. Rows are of images and of boxes.

    `piece`: rows that one task reads; `partition`: rows that one task joins, some 0.3 kB each, three times;
    `bucket`: images of which one task compares the hashes.
    """

    piece: int = 2_000_000
    partition: int = 2_000_000
    bucket: int = 4_000_000


SIZES = Sizes()


@dataclass(frozen=True, kw_only=True)
class PlanInPartitions:
    """As `Plan`, with its rows in `ranges` of ids: handles of `tasks`. `table`: some rows, spread evenly."""

    table: pa.Table
    summary: PlanSummary
    categories: Categories
    sha256: str
    images_per_unit: int
    access: AccessRules
    ranges: list[_Range]
    tasks: Tasks

    def write(self, store: Store) -> None:
        """Write every file of the plan that the store does not have yet, and let go of the rows."""
        rows_per_file = UNITS_PER_FILE * self.images_per_unit
        missing = np.array(
            missing_files(store, self.sha256, self.summary.images, self.images_per_unit), np.int64
        )
        writing = []
        for at, one in enumerate(self.ranges):
            first, stop = (-(-edge // rows_per_file) for edge in (one.first, one.first + one.rows))
            files = tuple(missing[(missing >= first) & (missing < stop)].tolist())
            if files:
                step = steps.WriteStep(
                    place=store.place,
                    sha256=self.sha256,
                    images_per_unit=self.images_per_unit,
                    first=one.first,
                    files=files,
                )
                writing.append(self.tasks.start(steps.write_range, step, one.table, *self._after(at)))
        for handle in writing:
            self.tasks.result(handle)
        self.ranges.clear()
        visit("plan.written")

    def _after(self, at: int) -> list[Any]:
        """Return handles of rows behind a range, enough for the last file that begins in it."""
        needed, heads = UNITS_PER_FILE * self.images_per_unit - 1, []
        for one in self.ranges[at + 1 :]:
            if needed <= 0:
                break
            heads.append(one.head)
            needed -= one.rows
        return heads


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Rows `first` to `first + rows` of a plan: handles of them, and of those at its beginning."""

    first: int
    rows: int
    table: Any
    head: Any


AnyPlan = Plan | PlanInPartitions
TasksFor = Callable[[Sequence[str]], Tasks | None]
"""Given the uris of all tables, returns what runs tasks; None where not every process could read them."""


def plan_of_any_size(
    settings: InputSettings,
    access: AccessRules | None = None,
    *,
    images_per_unit: int = 64,
    tasks: TasksFor,
    tell: Callable[[str], None] = lambda _: None,
    some_rows: int = SOME_ROWS,
    sizes: Sizes | None = None,
    large_rows: int | None = None,
) -> AnyPlan:
    """Return the plan of the inputs, in partitions where they are large tables; else as `make_plan`.

    `tasks`: called for large ones. `tell` is given a sentence when the work begins. `some_rows`: how many
    rows `PlanInPartitions.table` holds. `sizes`, `large_rows`: for tests.

    Raises:
        UsageError, JobRefused: as `make_plan`.
    """
    rules = allowed_access(settings, access)
    large_rows = LARGE_ROWS if large_rows is None else large_rows
    with one_version_each(), listings_kept():
        inputs = inspect_inputs(settings, rules, least_bytes=_LEAST_BYTES * large_rows)
        if inputs is None or inputs.rows <= large_rows:
            return make_plan(settings, access, images_per_unit=images_per_unit)
        runs = tasks([file.uri for table in inputs.tables for file in table.files])
        plan = None
        if runs is not None:
            planner = _Planner(settings, inputs, runs, sizes or SIZES, images_per_unit, some_rows)
            tell(planner.about)
            plan = planner.plan()
        return plan or make_plan(settings, access, images_per_unit=images_per_unit)


def write_any_plan(store: Store, plan: AnyPlan) -> None:
    """Write every file of a plan that the store does not have yet."""
    if isinstance(plan, PlanInPartitions):
        plan.write(store)
    else:
        write_plan(store, plan)


class _Planner:
    """The steps of one plan, each begun for all partitions at once."""

    def __init__(
        self,
        settings: InputSettings,
        inputs: TableInputs,
        tasks: Tasks,
        sizes: Sizes,
        images_per_unit: int,
        some_rows: int,
    ) -> None:
        self._settings, self._inputs, self._tasks, self._sizes = settings, inputs, tasks, sizes
        self._images_per_unit, self._some_rows = images_per_unit, some_rows
        self._boxes = inputs.boxes
        if inputs.images is not None:
            self._images = inputs.images
        else:
            assert inputs.boxes is not None, "there are images, or boxes that name them"
            self._images = images_of(inputs.boxes)
        self._parts = max(1, -(-inputs.rows // sizes.partition))

    @property
    def about(self) -> str:
        """What there is to do, as a sentence."""
        parts = count(self._parts, "partition")
        return f"planning {self._inputs.rows:,} rows of images and boxes in {parts}"

    def plan(self) -> PlanInPartitions | None:
        """Return the plan; None where rows lack an id that only other partitions could give them."""
        found = self._joined(self._inputs, "" if self._boxes is None else self._boxes.folder)
        if found is None:
            return None
        partitions, facts, buckets, faults = found
        if self._could_be_below_images(facts):
            again = self._joined(self._inputs.below(self._images.root), self._images.root)
            if again is not None and any(one.matched for one in again[1]):
                partitions, facts, buckets, faults = again
        labels_are_ids = self._are_labels_ids(facts)
        self._with_notes(faults, facts, labels_are_ids=labels_are_ids)
        joined = self._judged(partitions, facts)
        used_alone = joined.unmatched.boxes > 0
        found_classes = pa.concat_tables([one.used_classes if used_alone else one.classes for one in facts])
        if labels_are_ids:
            uri = self._inputs.tables[-1].files[0].uri
            names = labels_as_ids(found_classes.drop_columns(["category_id"]), uri)
            found_classes = names.append_column("category_name", pa.nulls(names.num_rows, TEXT))
        categories, classes = self._numbered(found_classes)
        verdict = self._doubles(partitions, buckets, facts)
        step = steps.RowsStep(
            access=self._inputs.access,
            classes=classes,
            used_alone=used_alone,
            labels_are_ids=labels_are_ids,
            edges=_edges([one.ids for one in facts], self._parts),
        )
        del buckets
        return self._cut(partitions, step, verdict, facts, joined, categories)

    # -----------------------------------------------------------------------------------------
    # Reading and joining
    # -----------------------------------------------------------------------------------------

    def _joined(
        self, inputs: TableInputs, uris_below: str
    ) -> tuple[list[Any], list[steps.PartFacts], list[list[Any]], list[RowFaults]] | None:
        """Return handles of `Partition`s, their facts, handles of hashes by bucket, and faults by table."""
        pieces = [self._read(source) for source in inputs.tables]
        faults = [RowFaults.merged([self._tasks.result(handles[0]) for handles in table]) for table in pieces]
        for one in faults:
            one.refuse_bad_columns()
        both = [{"image_id", "image_uri"} <= set(one.files[0].names) for one in inputs.tables]
        if any(one.bad("no image_id") and has for one, has in zip(faults, both, strict=True)):
            return None
        buckets = max(1, -(-inputs.image_rows // self._sizes.bucket))
        step = steps.JoinStep(
            inputs=_without_files(inputs),
            part=PartOf(uris_below=uris_below),
            image_pieces=len(pieces[0]) if inputs.images is not None else 0,
            buckets=buckets,
            most_checked=max(1, BOXES_CHECKED // self._parts),
        )
        begun = [
            self._tasks.start(
                steps.join_partition,
                step,
                *(handles[1 + part] for table in pieces for handles in table),
                returns=2 + buckets,
            )
            for part in range(self._parts)
        ]
        del pieces
        facts = [self._tasks.result(handles[0]) for handles in begun]
        partitions = [handles[1] for handles in begun]
        return partitions, facts, [[one[2 + at] for one in begun] for at in range(buckets)], faults

    def _read(self, source: Source) -> list[list[Any]]:
        access, parts = self._inputs.access, self._parts
        return [
            self._tasks.start(read_piece, piece, access, parts, returns=1 + parts)
            for piece in split(source, access, self._sizes.piece)
        ]

    def _could_be_below_images(self, facts: Sequence[steps.PartFacts]) -> bool:
        """Return whether no uri of a box is found below its table's folder, but might be below another."""
        return (
            self._inputs.images is not None
            and self._boxes is not None
            and is_by_uri(self._images, self._boxes)
            and self._boxes.folder != self._images.root
            and not any(one.matched for one in facts)
        )

    def _are_labels_ids(self, facts: Sequence[steps.PartFacts]) -> bool:
        """Return whether the boxes are a CSV's whose labels are all integers.

        Raises:
            JobRefused: it has category ids as well.
        """
        file = self._inputs.tables[-1].files[0]
        classes = pa.concat_tables([one.classes for one in facts])
        if self._boxes is None or file.file_format != "csv" or not are_labels_ids(classes):
            return False
        given = any("category_id" in one.columns for one in facts)
        labels_as_ids(classes if given else classes.drop_columns(["category_id"]), file.uri)
        return True

    def _with_notes(
        self, faults: Sequence[RowFaults], facts: Sequence[steps.PartFacts], *, labels_are_ids: bool
    ) -> None:
        """Add to images and boxes what their rows are told of."""
        if self._inputs.images is not None:
            self._images = replace(self._images, notes=faults[0].notes(COST_OF_IMAGES))
        if self._boxes is None:
            return
        notes = list(faults[-1].notes(COST_OF_LISTS if self._boxes.one_row_per_image else COST_OF_ROWS))
        if not self._boxes.one_row_per_image and not labels_are_ids:
            notes += spaced_names(pa.concat_tables([one.classes for one in facts]), self._boxes.files[0])
        self._boxes = replace(self._boxes, notes=(*notes, *self._boxes.notes))

    # -----------------------------------------------------------------------------------------
    # What is judged over all partitions
    # -----------------------------------------------------------------------------------------

    def _judged(self, partitions: Sequence[Any], facts: Sequence[steps.PartFacts]) -> Joined:
        """Return what `join` states of all, without its rows.

        Raises:
            JobRefused: as `join`.
        """
        mentions, torn = sum(one.mentions for one in facts), sum(one.torn[0] for one in facts)
        if 2 * torn > mentions:
            raise JobRefused(clean_text(next(one.torn[1] for one in facts if one.torn[0])))
        twice = NamedTwice.merged([one.twice for one in facts])
        if twice.is_most() and self._boxes is not None:
            raise rows_repeated(twice, self._boxes)
        unmatched = Unmatched(
            boxes=sum(one.unmatched.boxes for one in facts),
            images=sum(one.unmatched.images for one in facts),
            examples=tuple(name for one in facts for name in one.unmatched.examples)[:5],
        )
        hint = self._hint(partitions, facts) if unmatched.boxes else ""
        if unmatched.boxes and not self._settings.allow_unmatched and self._boxes is not None:
            keys = examples([key for one in facts for key in one.keys])
            raise not_listed(unmatched, mentions, keys, self._boxes.files[0], hint)
        again = sum(one.again for one in facts)
        uris = examples(list(dict.fromkeys(uri for one in facts for uri in one.again_uris)))
        nothing = pa.array([], TEXT)
        return Joined(
            image_id=nothing,
            image_uri=nothing,
            mention=np.zeros(0, np.int64),
            unmatched=unmatched,
            id_rule=facts[0].id_rule,
            hint=hint,
            notes=(
                *(twice.notes(self._boxes) if self._boxes is not None else ()),
                *([counted_once(again, uris)] if again else []),
            ),
        )

    def _hint(self, partitions: Sequence[Any], facts: Sequence[steps.PartFacts]) -> str:
        """Return why boxes found no image, from names that could be meant by a sample of theirs."""
        missing = pa.concat_arrays([one.missing for one in facts])
        handles = [self._tasks.start(steps.likely_keys, one, missing) for one in partitions]
        return why(pa.concat_arrays([self._tasks.result(handle) for handle in handles]), missing)

    def _numbered(self, found: pa.Table) -> tuple[Categories, pa.Table]:
        """Return the categories of all partitions, and each pair of id and name that a box has."""
        classes = found.group_by(list(steps.CLASS_COLUMNS)).aggregate([])
        if self._boxes is None:
            return (), classes
        boxes, categories = number_categories(replace(self._boxes, boxes=classes), None)
        self._boxes = replace(self._boxes, notes=boxes.notes)
        return categories, classes

    def _doubles(
        self, partitions: Sequence[Any], buckets: Sequence[Sequence[Any]], facts: Sequence[steps.PartFacts]
    ) -> Any:
        """Return a handle of what `judge_doubles` says of images that are not told apart, None for none.

        Raises:
            JobRefused: most are not.
        """
        found = [self._tasks.result(self._tasks.start(steps.find_doubles, *one)) for one in buckets]
        ids, uris = (np.concatenate([one[at] for one in found]) for at in (0, 1))
        if not len(ids) and not len(uris):
            return None
        rows = [self._tasks.start(steps.doubtful_rows, one, ids, uris) for one in partitions]
        of = sum(one.rows - one.again for one in facts)
        boxes = self._boxes
        is_box_file = boxes is not None and bool(self._images.files) and self._images.files == boxes.files
        verdict = self._tasks.start(steps.judge_doubles, of, is_box_file, *rows)
        self._tasks.result(self._tasks.start(len, verdict))  # refused before anything else is
        return verdict

    # -----------------------------------------------------------------------------------------
    # The rows
    # -----------------------------------------------------------------------------------------

    def _cut(
        self,
        partitions: list[Any],
        step: steps.RowsStep,
        verdict: Any,
        facts: Sequence[steps.PartFacts],
        joined: Joined,
        categories: Categories,
    ) -> PlanInPartitions:
        """Return the plan: rows of each range of ids, counted, hashed and ready to be written."""
        parts = len(step.edges) + 1
        begun = [
            self._tasks.start(steps.rows_of_partition, step, one, verdict, returns=1 + parts)
            for one in partitions
        ]
        partitions.clear()
        counts = np.sum([self._tasks.result(handles[0]) for handles in begun], axis=0)
        listed = int(counts.sum())
        images = min(listed, self._settings.limit or listed)
        firsts = np.minimum(np.cumsum(counts) - counts, images)
        stops = np.minimum(firsts + counts, images)
        columns = tuple(dict.fromkeys(name for one in facts for name in one.columns))
        places = np.unique(np.linspace(0, images - 1, min(images, self._some_rows)).round().astype(np.int64))
        cut = []
        for at, (first, stop) in enumerate(zip(firsts.tolist(), stops.tolist(), strict=True)):
            spec = steps.RangeStep(
                access=step.access,
                images_per_unit=self._images_per_unit,
                first=first,
                stop=stop,
                columns=columns,
                head=UNITS_PER_FILE * self._images_per_unit - 1,
                places=places,
            )
            pieces = [handles[1 + at] for handles in begun]
            cut.append((first, stop, self._tasks.start(steps.rows_of_range, spec, *pieces, returns=3)))
        del begun
        found = [self._tasks.result(handles[0]) for _, _, handles in cut]
        ranges = [
            _Range(first=first, rows=stop - first, table=handles[1], head=handles[2])
            for first, stop, handles in cut
        ]
        refuse_if_a_flag_is_missing(RefusedUris.merged([one.refused for one in found]))
        return PlanInPartitions(
            table=pa.concat_tables([PLAN.empty_table(), *(one.some for one in found)]),
            summary=self._summary(joined, found, facts, listed),
            categories=categories,
            sha256=self._sha256(ranges, images, has_versions=any(one.versions for one in found)),
            images_per_unit=self._images_per_unit,
            access=step.access,
            ranges=ranges,
            tasks=self._tasks,
        )

    def _summary(
        self,
        joined: Joined,
        found: Sequence[steps.RangeFacts],
        facts: Sequence[steps.PartFacts],
        listed: int,
    ) -> PlanSummary:
        whole = JoinedInputs(
            access=self._inputs.access,
            images_per_unit=self._images_per_unit,
            images=self._images,
            boxes=self._boxes,
            joined=joined,
            rules=rules_of(self._settings, self._boxes),
            format_stated=self._settings.box_format is not None,
        )
        checked = CheckedBoxes.merged([one.checked for one in facts])
        return summarise(whole, RowCounts.merged([one.counts for one in found]), checked, listed=listed)

    def _sha256(self, ranges: Sequence[_Range], images: int, *, has_versions: bool) -> str:
        names = tuple(name for name in PLAN.names if has_versions or name != "source_version")
        tables = [one.table for one in ranges]
        sha256: str = self._tasks.result(self._tasks.fold(steps.hash_ranges, images, names, over=tables))
        return sha256


def _without_files(inputs: TableInputs) -> TableInputs:
    """Return inputs as small as a task needs them."""
    images, boxes = inputs.images, inputs.boxes
    images = None if images is None else replace(images, files=images.files[:1])
    boxes = None if boxes is None else replace(boxes, files=boxes.files[:1])
    tables = tuple(replace(one, files=one.files[:1]) for one in inputs.tables)
    return replace(inputs, images=images, boxes=boxes, tables=tables)


def _edges(ids: Sequence[pa.Array], ranges: int) -> tuple[bytes, ...]:
    """Return the first ids of ranges that hold about as many images each, but for the first range."""
    some = pc.cast(pa.concat_arrays(list(ids)), pa.large_binary())
    some = some.take(pc.sort_indices(some))
    places = np.linspace(0, len(some), ranges + 1).astype(np.int64)[1:-1]
    return tuple(sorted({some[place].as_py() for place in places.tolist() if place < len(some)}))
