"""What a detector is, and the detectors of the transformers library, closed-set and zero-shot.

A user's detector is a class with the names of `Detector` and needs nothing else of this package
(docs/detectors.md): it returns plain arrays, so that a detector of any library fits.

Of the library's detectors: safetensors alone; no code of a checkpoint is run, nothing is unpickled, and
nothing is fetched but the named repository. Images are prepared and boxes computed by the library's own
processors, always by their Pillow backend, so that the same machine gives the same boxes with torchvision
and without. The numbers are float32.

CPU workers import this file: torch and transformers are imported when a detector is made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    import torch

UInt8Array = npt.NDArray[np.uint8]

_FILES = ("*.safetensors", "*.json", "vocab.txt", "merges.txt")
"""What is read of a folder or repository, and what its fingerprint covers."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)


class DetectorError(ValueError):
    """A detector that cannot be found, loaded or used, or that returns an invalid result."""


@dataclass(frozen=True, kw_only=True)
class Category:
    """One class of a detector: the number that its detections carry, and its name, if it has one."""

    id: int
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a detector found in one image; N boxes, in any order.

    `boxes_xyxy`: (N, 4) in pixels of the image that it was given. `category_ids`: (N,) integers, ids of
    `Detector.categories`. `scores`: (N,), or None where the detector has none. `box_ids`: a name a box.
    """

    boxes_xyxy: npt.NDArray[np.floating]
    category_ids: npt.NDArray[np.integer]
    scores: npt.NDArray[np.floating] | None = None
    box_ids: Sequence[str] | None = None


class Detector(Protocol):
    """Finds boxes in images. One a process, called from one thread.

    `name`: for the user. `license`: of the code and the weights, None where unknown. `categories`: all that
    `category_ids` may hold.
    """

    name: str
    license: str | None
    categories: Sequence[Category]

    def fingerprint(self) -> str:
        """Return what changes whenever the boxes of an image may: weights, version, settings."""

    def detect(self, images: Sequence[npt.NDArray[np.uint8]]) -> Sequence[Detections]:
        """Return one result an image, in order. `images`: upright RGB (h, w, 3), of any sizes, read-only."""


# Detectors of transformers


class _TransformersDetector:
    """What both kinds share: the files, their fingerprint and licence, and the loaded model."""

    def __init__(self, source: str, auto_model: str, auto_processor: str, device: str) -> None:
        folder = _folder(source)
        names = _checked_files(folder, source)
        self._fingerprint = _digest(folder, names)
        self.license = _stated_license(folder)
        self._device = device
        library = _library()
        _refuse_other_kind(folder, source, auto_model)
        try:
            self._processor: Any = getattr(library, auto_processor).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
            model = getattr(library, auto_model).from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="float32",
                output_loading_info=True,
            )
        except (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DetectorError(f"{source}: no detector that transformers can load: {error}") from error
        self._model, loading = model
        _refuse_missing(loading, source)
        self._model = self._model.to(device).eval()
        self.name = str(self._model.config.model_type)

    def _outputs(self, inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(**inputs)


class ClosedSetDetector(_TransformersDetector):
    """A detector with its own classes: RT-DETR, RT-DETRv2, D-FINE, DETR and all else that
    `AutoModelForObjectDetection` loads. Only boxes with a score over `threshold` come out.

    Raises:
        DetectorError: no such checkpoint, or one that may not or cannot be loaded.
    """

    def __init__(self, source: str, *, threshold: float, device: str = "cpu") -> None:
        super().__init__(source, "AutoModelForObjectDetection", "AutoImageProcessor", device)
        self._threshold = threshold
        labels: Mapping[int, str] = self._model.config.id2label
        self.categories: Sequence[Category] = tuple(
            Category(id=int(key), name=labels[key]) for key in sorted(labels)
        )

    def fingerprint(self) -> str:
        """Return the sha256 over the names and bytes of the checkpoint's files."""
        return self._fingerprint

    def detect(self, images: Sequence[UInt8Array]) -> list[Detections]:
        """See `Detector`."""
        inputs = self._processor(images=_pictures(images), return_tensors="pt").to(self._device)
        results = self._processor.post_process_object_detection(
            self._outputs(inputs), threshold=self._threshold, target_sizes=_sizes(images)
        )
        return [_detections(one, one["labels"].cpu().numpy()) for one in results]


class ZeroShotDetector(_TransformersDetector):
    """A detector whose classes are text prompts: Grounding DINO, OWL-ViT and the like.

    OWLv2 needs scipy, OmDet-Turbo torchvision; they are imported when the checkpoint is opened or tried.

    `prompts`: text to the name of its category. Categories are numbered from 1 in the order of the UTF-8
    bytes of their names, like names in a table of boxes.

    Raises:
        DetectorError: no such checkpoint, or one that may not or cannot be loaded, or no prompts.
    """

    def __init__(
        self, source: str, prompts: Mapping[str, str], *, threshold: float, device: str = "cpu"
    ) -> None:
        if not prompts:
            raise DetectorError(f"{source}: a zero-shot detector needs prompts, such as 'person; red car'")
        super().__init__(source, "AutoModelForZeroShotObjectDetection", "AutoProcessor", device)
        self._threshold = threshold
        self._category_of = dict(prompts)
        self._prompts = list(prompts)
        names = sorted(set(prompts.values()), key=str.encode)
        self.categories: Sequence[Category] = tuple(
            Category(id=at, name=name) for at, name in enumerate(names, start=1)
        )
        self._ids = np.array([names.index(prompts[one]) + 1 for one in self._prompts], np.int32)
        self._reads_phrases = "grounding" in self._model.config.model_type
        if self._reads_phrases and any("." in prompt for prompt in prompts):
            raise DetectorError(f"{source}: prompts are joined by '.', so none may hold one")

    def fingerprint(self) -> str:
        """Return the sha256 over the names and bytes of the checkpoint's files, and the prompts."""
        prompts = json.dumps(list(self._category_of.items()))
        return hashlib.sha256(f"{self._fingerprint} {prompts}".encode()).hexdigest()

    def detect(self, images: Sequence[UInt8Array]) -> list[Detections]:
        """See `Detector`."""
        text = [self._prompts] * len(images)
        inputs = self._processor(images=_pictures(images), text=text, return_tensors="pt").to(self._device)
        outputs = self._outputs(inputs)
        results = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self._threshold, target_sizes=_sizes(images)
        )
        if not self._reads_phrases:
            return [_detections(one, self._ids[one["labels"].cpu()]) for one in results]
        prompts = _prompt_of_each_query(outputs.logits, inputs["input_ids"], self._period())
        kept = outputs.logits.sigmoid().amax(dim=-1) > self._threshold
        return [
            _detections(one, self._ids[prompts[at][kept[at].cpu().numpy()]]) for at, one in enumerate(results)
        ]

    def _period(self) -> int:
        return int(self._processor.tokenizer.convert_tokens_to_ids("."))


def _prompt_of_each_query(logits: torch.Tensor, input_ids: torch.Tensor, period: int) -> npt.NDArray[np.intp]:
    """Return which prompt's words each query agrees with most, (B, Q).

    The library's own phrases are made of the words over a threshold, and may be empty, half a prompt or
    two of them; here every box has one category. `input_ids` (B, T): [CLS] words of one prompt . words
    of the next . and so on [SEP].
    """
    answers = []
    for row, ids in zip(logits.float().cpu().numpy(), input_ids.cpu().numpy(), strict=True):
        ends = np.flatnonzero(ids == period).tolist()
        starts = [1, *(end + 1 for end in ends[:-1])]
        best = [row[:, start:end].max(axis=-1) for start, end in zip(starts, ends, strict=True)]
        answers.append(np.stack(best, axis=-1).argmax(axis=-1))
    return np.stack(answers)


def _detections(result: Mapping[str, torch.Tensor], category_ids: npt.NDArray[np.integer]) -> Detections:
    return Detections(
        boxes_xyxy=result["boxes"].float().cpu().numpy(),
        scores=result["scores"].float().cpu().numpy(),
        category_ids=category_ids.astype(np.int32),
    )


def _pictures(images: Sequence[UInt8Array]) -> list[Image.Image]:
    """Return Pillow's images, which know their axes; an array of 3 x 3 x 3 is ambiguous."""
    return [Image.fromarray(image) for image in images]


def _sizes(images: Sequence[UInt8Array]) -> list[tuple[int, int]]:
    return [(image.shape[0], image.shape[1]) for image in images]


def _refuse_other_kind(folder: Path, source: str, auto_model: str) -> None:
    """Raise DetectorError if the checkpoint is a detector of the other kind, and name that."""
    from transformers.models.auto import modeling_auto as auto

    content = json.loads((folder / "config.json").read_bytes())
    kind = content.get("model_type") if isinstance(content, dict) else None
    zero_shot = kind in auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
    closed_set = kind in auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    if zero_shot and not closed_set and auto_model == "AutoModelForObjectDetection":
        raise DetectorError(
            f"{source}: the classes of {kind} are text prompts; "
            f"wanted --detector hf-zero-shot:{source} with --prompts"
        )
    if closed_set and not zero_shot and auto_model == "AutoModelForZeroShotObjectDetection":
        raise DetectorError(
            f"{source}: {kind} has its own classes; wanted --detector hf:{source}, without --prompts"
        )


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DetectorError(
            "detectors hf: and hf-zero-shot: need transformers: pip install 'hqlabel[detect]'"
        ) from error
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    return transformers


def _folder(source: str) -> Path:
    """Return the folder of a checkpoint: a local one, or a hub repository in the hub's cache."""
    path = Path(source)
    if path.is_dir():
        return path
    if _HUB_ID.fullmatch(source) is None:
        raise DetectorError(f"{source}: no such folder, nor a hub id (org/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[*_FILES, "README.md"]))
    except Exception as error:  # the hub's client has many ways to fail, and none is ours
        raise DetectorError(
            f"{source}: no such folder here, and as a hub id it could not be fetched: {error}"
        ) from error


def _checked_files(folder: Path, source: str) -> list[str]:
    """Return the names of the files that count; DetectorError for what only running code could load."""
    names = sorted({path.name for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})
    if "config.json" not in names:
        raise DetectorError(f"{source}: no config.json; wanted a folder as transformers saves it")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(path.name for path in folder.glob("*.bin")) or ["nothing"]
        raise DetectorError(
            f"{source}: no *.safetensors; found {pickled[0]}. Pickled weights are never opened: "
            "save them again with safetensors"
        )
    for name in (name for name in names if name.endswith(".json")):
        _refuse_own_code(folder / name, source)
    return names


def _refuse_own_code(path: Path, source: str) -> None:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DetectorError(f"{source}: {path.name} is no JSON: {error}") from error
    if isinstance(content, dict) and content.get("auto_map"):
        raise DetectorError(f"{source}: {path.name} names its own code (auto_map), which is never run")


def _refuse_missing(loading: Mapping[str, Any], source: str) -> None:
    """Raise DetectorError unless the file held every tensor: the library makes the others random."""
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        names = sorted(map(str, loading.get(what) or ()))
        if names:
            raise DetectorError(f"{source}: {len(names)} {what.replace('_', ' ')}, such as {names[0]}")


def _digest(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        with open(folder / name, "rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _stated_license(folder: Path) -> str | None:
    """Return the licence in the head of the model card."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    match = _LICENSE.search(text.split("\n---")[0]) if text.startswith("---\n") else None
    return match.group(1) if match else None
