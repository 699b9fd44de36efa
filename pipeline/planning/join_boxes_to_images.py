"""Which boxes belong to which image, and what every image is called: joined once, by whole columns.

Joined by id where images and boxes both have given ids, else by uri, else by the ids that follow from the
uris. Ids: the given ones; else the uri below the image root; else the whole uri. Bytes are compared:
no case, Unicode or percent folding. What does not fit is refused with examples from both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import BoolArray, Int64Array, null_mask, positions
from hqlabel.pipeline.errors import JobRefused, clean_text, count
from hqlabel.pipeline.inputs.box_tables import NO_URI
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, ImageList, examples, repeated
from hqlabel.pipeline.inputs.open_inputs import resolve_uris
from hqlabel.pipeline.planning.images_named_twice import NamedTwice, boxes_once

_MOST_CHECKED = 20_000  # ids checked to find out why nothing matches


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Boxes whose image is not listed: how many, of how many images, and a few of their names."""

    boxes: int = 0
    images: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PartOf:
    """Images and boxes are some of all there are, with all that have a key of theirs: a partition.

    `uris_below`: the folder that relative uris of boxes start from. What must be judged over all (doubles,
    boxes without an image, why they have none) is left to who joins the parts.
    """

    uris_below: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Every image, in the order of the input, with its id and its place in the box list.

    `image_id`, `image_uri`: large_string (n,). `mention`: int64 (n,), the image's place in `BoxList`, -1
    where no box file names it. `id_rule`: how ids and joins came about, as text. `hint`: a sentence on why
    boxes of `unmatched` found no image, or "". `twice`: images that a box file has more than once. `again`:
    rows that say what an earlier one of the same id says, bool (n,), or None for none. `errors`: row -> why
    its id, or its uri, names no one image. `notes`: sentences for the summary. `boxes`: those that `mention`
    counts in, each image's at one place.
    """

    image_id: pa.Array
    image_uri: pa.Array
    mention: Int64Array
    unmatched: Unmatched
    id_rule: str
    hint: str = ""
    twice: NamedTwice = field(default_factory=NamedTwice)
    again: BoolArray | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    boxes: BoxList | None = None

    def listed(self) -> pa.Array:
        """Return the places of the images by the bytes of their ids, each once."""
        order = pc.sort_indices(self.image_id)
        return order if self.again is None else order.filter(pa.array(~self.again).take(order))


def images_of(boxes: BoxList) -> ImageList:
    """Return the images that a box file names by itself.

    Raises:
        JobRefused: it names no uris.
    """
    uris = boxes.image_uri
    if uris is None:
        raise JobRefused(
            f"{boxes.files[0]}: the boxes name images by id alone; state with --images where they are"
        )
    named = uris.is_valid()  # boxes of an image that the file does not list are found by the join
    return ImageList(
        image_uri=resolve_uris(uris.filter(named), boxes.folder),
        image_id=None if boxes.image_id is None else boxes.image_id.filter(named),
        id_rule=boxes.id_rule,
        root=boxes.folder,
        size_hw=None if boxes.size_hw is None else boxes.size_hw[named.to_numpy(zero_copy_only=False)],
    )


def join(
    images: ImageList, boxes: BoxList | None, *, allow_unmatched: bool, part: PartOf | None = None
) -> Joined:
    """Return every image with its boxes' place.

    Rows that are there twice count once; an id of two images, and an image of two ids, have `errors`. `part`:
    what else is known, where these are some of the images; `told_apart` is then called for all of them.

    Raises:
        JobRefused: most ids name several images, most images have several lists of boxes, or boxes whose
            image is not listed (unless they may be skipped).
    """
    if boxes is None:
        ids, rule = _ids(images)
        joined = Joined(
            image_id=ids,
            image_uri=images.image_uri,
            mention=np.full(len(ids), -1, dtype=np.int64),
            unmatched=Unmatched(),
            id_rule=rule,
        )
    else:
        joined = _match(images, boxes, allow_unmatched, part)
    if pc.any(pc.equal(joined.image_id, "")).as_py():
        raise JobRefused("an image has the empty string as its image_id; every image needs an id of its own")
    if part is not None:
        return joined
    joined = _told_apart(
        joined, is_box_file=boxes is not None and bool(images.files) and images.files == boxes.files
    )
    if not images.unnameable:
        return joined
    rows = pc.indices_nonzero(pc.is_in(joined.image_uri, pa.array(images.unnameable, TEXT))).to_pylist()
    reason = "the file's name is not UTF-8, and no table can hold it: rename the file"
    return replace(joined, errors={**joined.errors, **dict.fromkeys(rows, reason)})


def is_by_uri(images: ImageList, boxes: BoxList) -> bool:
    """Return whether boxes find their images by uri."""
    return boxes.image_uri is not None and (images.image_id is None or boxes.image_id is None)


def _match(images: ImageList, boxes: BoxList, allow_unmatched: bool, part: PartOf | None) -> Joined:
    ids, rule = _ids(images)
    by_uri = is_by_uri(images, boxes)
    if boxes.by_stem:
        keys, wanted, how, boxes = _stem_keys(images, boxes, part)
    elif by_uri and part is not None:
        keys, wanted, how = _uri_keys_below(part.uris_below, images, boxes)
    elif by_uri:
        keys, wanted, how = _uri_keys(images, boxes)
    else:
        assert boxes.image_id is not None, "boxes are named by id or by uri"
        keys, wanted, how = ids, boxes.image_id, "joined by image_id"
        if boxes.image_uri is not None and images.files:
            how += " (the uris of the box file are not used)"
    boxes, twice = boxes_once(boxes, wanted, boxes.image_id if by_uri else None)
    if part is None and twice.is_most():
        raise rows_repeated(twice, boxes)
    mention = positions(keys, wanted)
    unmatched = _unmatched(wanted, boxes, mention)
    if part is not None:
        allow_unmatched = True
    hint = (
        why(keys, _as_compared(images, boxes, wanted, keys) if by_uri else wanted)
        if unmatched.boxes and part is None
        else ""
    )
    if not allow_unmatched and unmatched.boxes and not _are_few_of_no_file(boxes, unmatched, mention):
        raise not_listed(unmatched, len(boxes.lengths), examples(keys), boxes.files[0], hint)
    if by_uri and boxes.image_id is not None:
        ids = pc.coalesce(boxes.image_id.take(pa.array(mention, mask=mention < 0)), ids)
        rule = f"ids of {boxes.files[0]}, for images it does not name: {rule}"
    return Joined(
        image_id=ids,
        image_uri=images.image_uri,
        mention=mention,
        unmatched=unmatched,
        id_rule=f"{rule}; {how}",
        hint=hint,
        twice=twice,
        notes=twice.notes(boxes),
        boxes=boxes,
    )


def _ids(images: ImageList) -> tuple[pa.Array, str]:
    """Return the id of each image, and the rule as text."""
    if images.image_id is not None:
        return images.image_id, images.id_rule
    return ids_of_uris(images)


def ids_of_uris(images: ImageList) -> tuple[pa.Array, str]:
    """Return the ids that follow from the uris, and the rule as text."""
    below = pc.starts_with(images.image_uri, f"{images.root.rstrip('/')}/")
    names = pc.utf8_slice_codeunits(images.image_uri, start=len(images.root.rstrip("/")) + 1)
    below = pc.and_(below, pc.not_equal(names, ""))  # the root itself keeps its whole uri
    return pc.if_else(below, names, images.image_uri), f"ids are the uris below {images.root}"


def _uri_keys(images: ImageList, boxes: BoxList) -> tuple[pa.Array, pa.Array, str]:
    """Return both sides' uris to compare, and how relative ones were read.

    Relative uris of a box file start from its folder. Where none of them is found so, and the images were
    listed from a folder, they are read as names below that folder: all of them or none.
    """
    assert boxes.image_uri is not None, "the caller has checked"
    keys = comparable(images.image_uri)
    wanted = comparable(resolve_uris(boxes.image_uri, boxes.folder))
    if boxes.folder == images.root or (positions(wanted, keys) >= 0).any():
        return keys, wanted, "joined by image_uri"
    below_root = _uri_keys_below(images.root, images, boxes)
    return (
        below_root if (positions(below_root[1], keys) >= 0).any() else (keys, wanted, "joined by image_uri")
    )


def _uri_keys_below(folder: str, images: ImageList, boxes: BoxList) -> tuple[pa.Array, pa.Array, str]:
    assert boxes.image_uri is not None, "the caller has checked"
    how = "joined by image_uri" + (f", relative ones below {folder}" if folder != boxes.folder else "")
    return comparable(images.image_uri), comparable(resolve_uris(boxes.image_uri, folder)), how


def _as_compared(images: ImageList, boxes: BoxList, wanted: pa.Array, keys: pa.Array) -> pa.Array:
    """Return the uris of a box file to compare with those of the images: relative ones below their folder.

    So they are read where none is found by the other rule, and the folder alone decides nothing then.
    """
    if (positions(wanted, keys) >= 0).any():
        return wanted
    return comparable(resolve_uris(boxes.image_uri, images.root))


def _stem_keys(
    images: ImageList, boxes: BoxList, part: PartOf | None
) -> tuple[pa.Array, pa.Array, str, BoxList]:
    """Return both sides' names below their folders without ending: `a/1` for `a/1.jpg` and `a/1.txt`.

    A label file that could be of several images is of none: its list has an error, which fails those.

    Raises:
        JobRefused: most of the label files could be of several images.
    """
    assert boxes.image_id is not None, "label files are named"
    names = images.image_id if images.listed and images.image_id is not None else ids_of_uris(images)[0]
    keys = _stem(names)
    twice = repeated(keys.filter(pc.is_in(keys, boxes.image_id)))
    if len(twice):
        some = keys.filter(pc.is_in(keys, twice))
        reasons = _of_several(boxes, twice, some, names.filter(pc.is_in(keys, twice)))
        if part is None and 2 * len(twice) > len(boxes.image_id):
            raise JobRefused(reasons[0])
        error = pa.array(reasons, TEXT).take(pc.index_in(boxes.image_id, twice))
        first = clean_text(reasons[0])
        note = f"{count(len(twice), 'label file')} could be of several images, which fail: {first}"
        boxes = replace(boxes, error=pc.coalesce(error, boxes.error), notes=(*boxes.notes, note))
    return keys, boxes.image_id, "joined by name without ending", boxes


def _of_several(boxes: BoxList, twice: pa.Array, stems: pa.Array, names: pa.Array) -> list[str]:
    """Return which images each stem of `twice` could be of; `stems` and `names`: of all such images."""
    by_stem: dict[str, list[str]] = {}
    for stem, name in zip(stems.to_pylist(), names.to_pylist(), strict=True):
        by_stem.setdefault(stem, []).append(name)
    return [
        f"{boxes.folder}/{clean_text(stem)}.txt could hold the boxes of {examples(sorted(by_stem[stem]))}; "
        "give the pictures names that differ before their ending"
        for stem in twice.to_pylist()
    ]


def comparable(uris: pa.Array) -> pa.Array:
    """Return uris as they are compared: without `file://`: `file:///a` and `/a` are one file."""
    return pc.replace_substring_regex(uris, r"\Afile://(localhost)?/", "/")


def _unmatched(wanted: pa.Array, boxes: BoxList, mention: Int64Array) -> Unmatched:
    lost = boxes.lengths > 0
    lost[mention[mention >= 0]] = False
    told = pc.fill_null(pc.equal(wanted, NO_URI), False)  # by the reader of the table
    lost &= ~told.to_numpy(zero_copy_only=False)
    names = _names(wanted, boxes, lost)
    return Unmatched(
        boxes=int(boxes.lengths[lost].sum()),
        images=int(lost.sum()),
        examples=tuple(names.slice(0, 5).to_pylist()),
    )


def _are_few_of_no_file(boxes: BoxList, unmatched: Unmatched, mention: Int64Array) -> bool:
    """Return whether boxes without an image are a few whose own file does not list it: nobody has that image.

    So it is with an annotation of COCO whose `image_id` is wrong. Another list may lack an image by mistake.
    """
    if boxes.image_uri is None or 2 * unmatched.images >= len(boxes.lengths):
        return False
    of_no_file = null_mask(boxes.image_uri) & (boxes.lengths > 0)
    of_no_file[mention[mention >= 0]] = False
    return int(np.count_nonzero(of_no_file)) == unmatched.images


def _names(wanted: pa.Array, boxes: BoxList, where: BoolArray) -> pa.Array:
    """Return the keys of some mentions; where there is no uri, the id."""
    keys = wanted.filter(pa.array(where))
    return keys if boxes.image_id is None else pc.coalesce(keys, boxes.image_id.filter(pa.array(where)))


def rows_repeated(twice: NamedTwice, boxes: BoxList) -> JobRefused:
    """Return the refusal of a box file of which most images are there twice, and not alike."""
    if boxes.one_row_per_image:
        reason = "more than one row; join their lists, or give a table with one row a box"
    else:
        reason = "more than one id; give each image one"
    names = examples(twice.failed_names)
    return JobRefused(
        f"{boxes.files[0]}: {twice.failed:,} of {count(twice.of, 'image')}, such as {names}, have {reason}"
    )


def not_listed(unmatched: Unmatched, mentions: int, keys: str, file: str, hint: str) -> JobRefused:
    """Return the refusal of boxes without an image; `mentions`: images of the box file, `keys`: examples."""
    none_joined = unmatched.images == mentions
    are_numbers = all(name.isascii() and name.isdecimal() for name in unmatched.examples)
    if not hint and none_joined and file.lower().endswith(".json") and are_numbers:
        hint = "For COCO results give the instances JSON, which names whose these numbers are, as --images. "
    return JobRefused(
        f"{file}: {count(unmatched.boxes, 'box', 'boxes')} of {count(unmatched.images, 'image')} "
        f"(of {mentions:,}) have no image: "
        f"it names {examples(unmatched.examples)}; the images are {keys or 'none'}. "
        f"{hint}Fix --images or --boxes, or skip these boxes with --allow-unmatched"
    )


def _told_apart(joined: Joined, *, is_box_file: bool) -> Joined:
    """Return the same, with what is there twice in `again`, and what is not told apart in `errors`.

    `is_box_file`: the box file lists the images.
    """
    uris = comparable(joined.image_uri)
    named = uris.filter(pc.not_equal(uris, NO_URI))
    if not len(repeated(joined.image_id)) and not len(repeated(named)):
        return joined
    again, by_id, by_uri = doubled_rows(joined)
    bad = np.flatnonzero((by_id | by_uri) & ~again)
    refuse_most_doubled(
        joined, bad, int(np.count_nonzero(~again)), by_id=bool(by_id.any()), is_box_file=is_box_file
    )
    number = int(again.sum())
    notes = joined.notes
    if number:
        notes = (*notes, counted_once(number, examples(pc.unique(uris.filter(pa.array(again))))))
    errors, others = not_told_apart(joined, bad)
    again[others] = True  # one row an id is left to say so
    return replace(joined, again=again, errors=errors, notes=notes)


def doubled_rows(joined: Joined) -> tuple[BoolArray, BoolArray, BoolArray]:
    """Return three masks of rows: those that say what earlier ones say, of an id with several uris, of a uri
    with several ids.
    """
    ids, uris = joined.image_id, comparable(joined.image_uri)
    is_named = pc.not_equal(uris, NO_URI).to_numpy(zero_copy_only=False)
    codes_N2 = np.stack([one.dictionary_encode().indices.to_numpy() for one in (ids, uris)], axis=1)
    again = np.ones(len(ids), dtype=np.bool_)
    again[np.unique(codes_N2, axis=0, return_index=True)[1]] = False
    per_id, per_uri = (np.bincount(codes[~again], minlength=len(ids)) for codes in codes_N2.T)
    by_id = per_id[codes_N2[:, 0]] > 1
    by_uri = (per_uri[codes_N2[:, 1]] > 1) & is_named
    return again, by_id, by_uri


def counted_once(rows: int, uris: str) -> str:
    """Return the note on rows that say what earlier ones say; `uris`: examples as text."""
    return f"{count(rows, 'row')} of images listed before, such as {uris}: counted once"


def not_told_apart(joined: Joined, bad: Int64Array) -> tuple[dict[int, str], list[int]]:
    """Return row -> why its id or uri names no one image, one row an id, and the other ones of `bad`."""
    rows: dict[str, list[int]] = {}
    for row in bad.tolist():
        rows.setdefault(joined.image_id[row].as_py(), []).append(row)
    errors: dict[int, str] = {}
    others: list[int] = []
    for name, own in rows.items():
        own.sort(key=lambda row: str(joined.image_uri[row].as_py()))
        others += own[1:]
        errors[own[0]] = _why_not_told_apart(name, joined.image_uri.take(pa.array(own)))
    return errors, others


def _why_not_told_apart(name: str, uris: pa.Array) -> str:
    if len(uris) > 1:
        more = f" and {len(uris) - 2:,} more" if len(uris) > 2 else ""
        return (
            f"image_id {name!r} stands for {examples(uris.slice(0, 1))} and for {examples(uris[1:2])}{more}"
        )
    return f"{examples(uris)} has another image_id than {name!r} too; name each image once"


def refuse_most_doubled(joined: Joined, bad: Int64Array, of: int, *, by_id: bool, is_box_file: bool) -> None:
    """Refuse images most of which are not told apart. `bad`: their rows, of `of`; `by_id`: ids name several.

    Raises:
        JobRefused: with two of the rows.
    """
    if 2 * len(bad) <= of:
        return
    some = replace(
        joined,
        image_id=joined.image_id.take(pa.array(bad)),
        image_uri=joined.image_uri.take(pa.array(bad)),
    )
    keys, name = (some.image_id, "image_id") if by_id else (comparable(some.image_uri), "image_uri")
    twice = repeated(keys)
    rows = pc.indices_nonzero(pc.equal(keys, twice[0])).slice(0, 2)
    ids, uris = some.image_id.take(rows).to_pylist(), some.image_uri.take(rows).to_pylist()
    if name == "image_id" and uris[0] != uris[1]:
        what = f"image_id {ids[0]!r} stands for {uris[0]!r} and for {uris[1]!r}"
    else:
        what = f"{uris[0]!r} is there twice, with ids {ids[0]!r} and {ids[1]!r}"
    fix = (
        "leave --images out, the box file names its images itself" if is_box_file else "name each image once"
    )
    raise JobRefused(f"{len(twice)} images are not distinguished by {name}: {clean_text(what)}; {fix}")


# ---------------------------------------------------------------------------------------------
# Why nothing matches
# ---------------------------------------------------------------------------------------------


Spelling = Callable[[pa.Array], pa.Array]
Guess = tuple[str, Spelling]


def _replaced(*pairs: tuple[str, str]) -> Spelling:
    def spelling(keys: pa.Array) -> pa.Array:
        for pattern, text in pairs:
            keys = pc.replace_substring_regex(keys, pattern, text)
        return keys

    return spelling


def _unquoted(keys: pa.Array) -> pa.Array:
    """Return `a%20b` as `a b`, and so `a%2520b`, which was encoded twice."""
    encoded = pc.match_substring_regex(keys, "%[0-9A-Fa-f]{2}")
    texts = [unquote(unquote(text)) for text in keys.filter(encoded).to_pylist()]
    return pc.replace_with_mask(keys, encoded, pa.array(texts, keys.type)) if texts else keys


_base = _replaced((r"\A.*/", ""))
_stem = _replaced((r"\.[^./]*\z", ""))
_unpadded = _replaced((r"(\A|/)0+([0-9])", r"\1\2"))


def _bare(keys: pa.Array) -> pa.Array:
    return _stem(_base(keys))


# What two names may differ in, and what takes the difference away; in the order in which it can be taken.
_DIFFERENCES: tuple[Guess, ...] = (
    ("backslashes (Windows)", _replaced((r"\\+", "/"))),
    ("white space or quotes around them", _replaced((r"(\A|/)[\s\"']+", r"\1"), (r"[\s\"']+\z", ""))),
    ("percent-encoding (%20)", _unquoted),
    (
        "what Label Studio puts before them",
        # Its exports to COCO and YOLO keep the eight digits of an upload, below any folder or none.
        _replaced((r"\A.*/data/local-files/\?d=", ""), (r"\A(.*/)?[0-9a-f]{8}-", "")),
    ),
    ("a query behind the name (?, #)", _replaced((r"[?#].*\z", ""))),
    (
        "what comes before them (a scheme, a drive, / or ./)",
        _replaced((r"\A([A-Za-z][A-Za-z0-9+.\-]*:)?[./]*/", "")),
    ),
    ("upper and lower case", pc.utf8_lower),
    ("Unicode form (NFC, NFD)", lambda keys: pc.utf8_normalize(keys, form="NFC")),
    ("spaces (_, + or a no-break space for them)", _replaced((r"[\s_+\x{a0}\x{202f}]+", " "))),
    ("the folder", _base),
    ("a .0 behind whole numbers", _replaced((r"\A([0-9]+)\.0\z", r"\1"))),
    ("the ending", _stem),
    ("leading zeros", _unpadded),
)
# One difference that has a sentence of its own.
_GUESSES: tuple[Guess, ...] = (
    *((f"they differ in {words}", spelling) for words, spelling in _DIFFERENCES[:9]),
    (
        "the ids of one side end in .0, as pandas writes whole numbers of a column with gaps "
        "(.astype('Int64') before it is written)",
        dict(_DIFFERENCES)["a .0 behind whole numbers"],
    ),
    ("they differ in leading zeros", _unpadded),
    ("the ids of the boxes look like names without their ending, or with another one", _stem),
    ("they agree but for the folder", _base),
)
# Several that have a name together, and leave less of the names than the others.
_STEMS: Guess = ("the ids of the boxes look like file stems", _bare)
_NUMBERS: Guess = (
    "the ids of the boxes look like the numbers in the file names; "
    "for COCO results give the instances JSON as --images",
    lambda keys: _unpadded(_replaced((r"\A.*?([0-9]+)[^0-9]*\z", r"\1"))(_bare(keys))),
)


def why(keys: pa.Array, wanted: pa.Array) -> str:
    """Return a sentence when most of what does not match would, but for a difference of spelling, else ""."""
    missing = wanted.filter(pa.array(positions(wanted, keys) < 0)).drop_null()
    step = max(1, len(missing) // _MOST_CHECKED)
    sample = missing.take(pa.array(np.arange(0, len(missing), step)))
    but_ending = tuple(one for one in _DIFFERENCES if one[0] != "the ending")
    numbers = pc.fill_null(pc.match_substring_regex(_bare(sample), r"\A[0-9]+\z"), False)
    is_numbers = _is_most(numbers.to_numpy(zero_copy_only=False))
    return (
        _one(_GUESSES, keys, sample)
        or _several(but_ending, keys, sample)
        or _one([_STEMS, _NUMBERS] if is_numbers else [_STEMS], keys, sample)
        or _several(_DIFFERENCES, keys, sample)
    )


def likely(keys: pa.Array, sample: pa.Array) -> pa.Array:
    """Return the keys that `why` could find for names that are missing: all that it has to be given."""
    found = np.zeros(len(keys), dtype=np.bool_)
    for differences in (_DIFFERENCES, *((one,) for one in (*_GUESSES, _STEMS, _NUMBERS))):
        found |= positions(_spelled(keys, differences), _spelled(sample, differences)) >= 0
    return keys.filter(pa.array(found))


def _one(guesses: Sequence[Guess], keys: pa.Array, sample: pa.Array) -> str:
    for sentence, spelling in guesses:
        found = positions(spelling(sample), spelling(keys))
        if _is_most(found >= 0):
            return _sentence(sentence, sample, keys, found)
    return ""


def _several(differences: tuple[Guess, ...], keys: pa.Array, sample: pa.Array) -> str:
    """Return a sentence on names that differ in several things at once: a smallest set of them.

    All differences are taken away to find who could belong to whom, and then put back one by one.
    """
    found = positions(_spelled(sample, differences), _spelled(keys, differences))
    if not _is_most(found >= 0):
        return ""
    theirs = keys.take(pa.array(found, mask=found < 0))
    needed = differences
    for one in reversed(differences):
        fewer = tuple(other for other in needed if other is not one)
        same = pc.fill_null(pc.equal(_spelled(sample, fewer), _spelled(theirs, fewer)), False)
        if _is_most(same.to_numpy(zero_copy_only=False)):
            needed = fewer
    words = [words for words, _ in needed]
    same = pc.fill_null(pc.equal(_spelled(sample, needed), _spelled(theirs, needed)), False)
    found = np.where(same.to_numpy(zero_copy_only=False), found, -1)
    return _sentence(f"they differ in {' and '.join(words)}", sample, keys, found)


def _spelled(keys: pa.Array, differences: Sequence[Guess]) -> pa.Array:
    for _, spelling in differences:
        keys = spelling(keys)
    return keys


def _is_most(found: BoolArray) -> bool:
    return bool(len(found)) and float(found.mean()) >= 0.5


def _sentence(text: str, sample: pa.Array, keys: pa.Array, found: Int64Array) -> str:
    """Return the sentence with the first pair that it is true of."""
    at = int(np.flatnonzero(found >= 0)[0])
    pair = [repr(clean_text(name.as_py())) for name in (sample[at], keys[int(found[at])])]
    return f"{text[0].upper()}{text[1:]}: {pair[0]} and {pair[1]}. "
