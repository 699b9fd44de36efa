"""Every way in which something can go wrong, as types and as a closed list of codes.

    HqlabelError
    ├── ImageError        one image: ends as `failed` in its row, costs nothing else
    ├── UsageError        the command or configuration is wrong                     exit 2
    ├── JobRefused        refused before any work: identity, rights, weights, input exit 4
    ├── SystemicFault     the world is broken, not an image: the job stops, resumes exit 5
    └── DamageFound       what was written does not verify                          exit 6

An unknown exception of one image costs that image (`internal`); any other one is a bug and ends the job with
1. Messages name the thing, the value found, the expected value and the next step. `clean_text` bounds and
escapes whatever comes from outside.
"""

from __future__ import annotations

MAX_MESSAGE_CHARS = 500


class HqlabelError(Exception):
    """Root of the errors that this product raises on purpose."""

    exit_code = 1


class UsageError(HqlabelError):
    """The command line or the configuration cannot be used as given."""

    exit_code = 2


class JobRefused(HqlabelError):
    """The job may not start: another identity, no rights, bad weights or bad input files."""

    exit_code = 4


class SystemicFault(HqlabelError):
    """A fault of the surroundings; `code` is one of `SYSTEMIC_CODES`. No image is marked for it."""

    exit_code = 5

    def __init__(self, code: str, message: str) -> None:
        if code not in SYSTEMIC_CODES:
            raise ValueError(f"unknown systemic code {code!r}; add it to pipeline/errors.py")
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class DamageFound(HqlabelError):
    """Stored files are not what the plan or the manifest describes."""

    exit_code = 6


class ImageError(HqlabelError):
    """One image cannot be labelled; `code` is one of `IMAGE_CODES`, `message` is already clean.

    `fault`: what it means when most images of the job meet the same; None where it is this image's alone.
    """

    def __init__(self, code: str, message: str, *, fault: SystemicFault | None = None) -> None:
        if code not in IMAGE_CODES:
            raise ValueError(f"unknown image error code {code!r}; add it to pipeline/errors.py")
        clean = clean_text(message)
        super().__init__(code, clean)
        self.code = code
        self.message = clean
        self.fault = fault

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


# code -> (stage, meaning). The closed list behind images.error_code; docs/errors.md explains each.
IMAGE_CODES: dict[str, tuple[str, str]] = {
    "uri_refused": ("plan", "the uri is outside the allowed schemes and roots, or is malformed"),
    "boxes_missing": ("plan", "the box list of this image is null"),
    "labels_mismatch": (
        "plan",
        "labels, scores or ids have another length than the boxes, a list cannot be read, or rows of the "
        "image contradict each other",
    ),
    "too_many_boxes": ("plan", "more boxes than limits.max_boxes_per_image"),
    "no_usable_box": ("decode", "boxes were given, none of them can be used"),
    "not_found": ("fetch", "there is no object under this uri"),
    "denied": ("fetch", "the store refuses to read this object"),
    "too_many_bytes": ("fetch", "the object is larger than limits.max_image_bytes"),
    "changed": ("fetch", "the object is not the one that was planned, or changed while it was read"),
    "unreachable": ("fetch", "the object could not be read within the retry budget"),
    "fetch_timeout": ("fetch", "the object did not arrive within limits.fetch_timeout_s"),
    "empty": ("decode", "the object has no bytes"),
    "not_an_image": ("decode", "the bytes are of no known picture format"),
    "format": ("decode", "a picture format that is not on the allow-list"),
    "truncated": ("decode", "the picture ends early"),
    "corrupt": ("decode", "the picture's data are damaged"),
    "too_large": ("decode", "more pixels or metadata than the limit"),
    "too_elongated": ("decode", "one side would be 0 pixels at the model's input size"),
    "pixel_type": ("decode", "a pixel type with no stated meaning as RGB"),
    "crashed": ("worker", "the process that worked on this image died, three times"),
    "timeout": ("worker", "this image did not finish within its deadline"),
    "out_of_memory": ("worker", "this image does not fit in memory, even alone"),
    "internal": ("worker", "hqlabel, or a library that it calls, raised on this image"),
    "detector_failed": ("detect", "the detector raised on this image"),
    "non_finite": ("segment", "the model gave NaN or infinity for every box"),
    "model_failed": ("segment", "the model, or what prepares its prompts, raised on this image"),
}

# codes that stop the job when they are not one image's fault (see `limits` in docs/errors.md)
SYSTEMIC_CODES: dict[str, str] = {
    "denied": "the store refuses most images of the job",
    "credentials": "credentials are missing, expired or wrong",
    "clock": "the store refuses requests because of this machine's clock",
    "store": "the store, bucket or folder is gone or answers nothing but errors",
    "driver": "a worker has no driver for the store of most images",
    "internal": "hqlabel, or a library that it calls, raises on most images of the job",
    "disk": "the disk or the object store is full",
    "device": "the accelerator failed",
    "model": "the model or the detector raises on a blank picture too, or on every image of a process",
    "weights": "a worker does not find the job's weights",
    "environment": "a worker's environment switches a protection off",
    "resources": "the cluster cannot place what the job needs",
}

# Reasons why one box has no mask (instances.reject_reason); its row stays.
BOX_CODES: dict[str, str] = {
    "box_malformed": "not four numbers, or a value of its row cannot be read",
    "box_not_finite": "NaN or infinity",
    "box_inverted": "x2 < x1 or y2 < y1",
    "box_empty": "no width or no height",
    "box_outside": "does not touch the image",
    "prompt_invalid": "points or mask prompt cannot be used",
    "non_finite": "the model gave NaN or infinity for this box",
    "crowd": "a region of many objects (iscrowd 1), not one object",
    "box_small": "a side is shorter than boxes.min_side_px",
    "box_score": "the score is lower than boxes.min_score",
    "box_rank": "not among the boxes.top_k best of its image",
    "nms": "overlaps a better box, whose instance_index follows the colon (boxes.nms_mode)",
    "image_failed": "the whole image failed",
}


SKIP_CODES = ("crowd", "box_small", "box_score", "box_rank", "nms")
"""Of these, the reasons that are no fault of a box: its own flag or the job's rules skip it."""


def box_code(reason: str) -> str:
    """Return the kind of a box's reason: `nms` for `nms:<instance_index of the better box>`, else itself."""
    kind, colon, winner = reason.partition(":")
    return "nms" if colon and kind == "nms" and winner.isascii() and winner.isdigit() else reason


def stage_of(code: str) -> str:
    """Return the stage in which an image error code arises, as written to images.error_stage."""
    return IMAGE_CODES[code][0]


def count(number: int, noun: str = "", plural: str | None = None) -> str:
    """Return a count, with its noun in the right number: `1 image`, `12,000 images`, `2 boxes`."""
    if not noun:
        return f"{number:,}"
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def text_of(error: BaseException) -> str:
    """Return the text of an error; errors of libraries may fail to give it."""
    try:
        return str(error)
    except Exception:
        return "(without a text)"


def clean_text(text: str) -> str:
    """Return text with control characters escaped and at most MAX_MESSAGE_CHARS characters, one line."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return safe if len(safe) <= MAX_MESSAGE_CHARS else safe[: MAX_MESSAGE_CHARS - 1] + "…"
