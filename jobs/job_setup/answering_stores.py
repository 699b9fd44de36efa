"""Whether the stores that a call names answer at all, asked before any work.

Within a job a store has minutes to come back. Before it, silence means a wrong address or a missing endpoint
far more often than an outage, and a person waits: one small request to each store decides in 7 s, so that a
command ends within 15 s, its imports on a busy machine included.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable

from hqlabel.jobs.job_setup.resolve_settings import is_local, storage_options
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage.read_objects import ask_store

FIRST_ANSWER_S = 7.0
_HUB_ID = re.compile(r"(hf:|hf-zero-shot:)?[\w.-]+/[\w./-]+")


def require_answers(config: Config) -> None:
    """Raise JobRefused, naming the store, where one of this configuration's places gets no answer."""
    named = [config.output.uri, *config.input.model_dump(include={"images", "boxes", "image_root"}).values()]
    named.append(config.model.checkpoint)
    places = [Place(uri=uri, options=storage_options(config, uri)) for uri in named if uri]
    asked = set()
    for place in places:
        store = (*place.uri.split("/")[:3], repr(place.options))
        if not is_local(place.uri) and store not in asked:
            asked.add(store)
            _require_answer(place)


def _require_answer(place: Place) -> None:
    if place.uri.startswith("hf://"):
        look_in_the_cache_of_a_silent_hub([place.uri.removeprefix("hf://")])
        return
    ending = "" if place.uri.startswith(("http://", "https://")) else "/.hqlabel"
    uri = place.uri.rstrip("/") + ending  # of a bucket alone no object can be looked up
    error = ask_store(uri, place.options, within_s=FIRST_ANSWER_S)
    if error is not None:
        is_s3 = place.uri.startswith("s3")
        at = is_s3 and (place.options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL"))
        address = f" at {at}" if at else ""
        hint = ", or name its endpoint: --set 'storage.s3={endpoint_url: ...}'" if is_s3 else ""
        raise JobRefused(
            f"{place.uri}: the store{address} does not answer within {FIRST_ANSWER_S:g} s ({error}); check "
            f"its address and the network{hint}"
        )


def look_in_the_cache_of_a_silent_hub(names: Iterable[str | None]) -> None:
    """Where the Hugging Face hub is needed and silent, say so, and use its cache alone from here on.

    `names`: checkpoints and detectors; those that are paths, other uris or no hub id need no hub. Its own
    client would try six times for each file, with two raw lines each.
    """
    wanted = [name for name in names if name and _HUB_ID.fullmatch(name) and not os.path.exists(_path(name))]
    if not wanted:
        return
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or _hub_answers(hub.ENDPOINT):
        return
    console.say(
        f"the hub at {hub.ENDPOINT} does not answer within {FIRST_ANSWER_S:g} s: its cache alone counts"
    )
    hub.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes begun from here


def _path(name: str) -> str:
    return name.removeprefix("hf-zero-shot:").removeprefix("hf:")


def _hub_answers(endpoint: str) -> bool:
    """Return whether the hub sends any answer to a small request, asked again until the time is over."""
    from huggingface_hub import get_session

    deadline = time.monotonic() + FIRST_ANSWER_S
    while (left := deadline - time.monotonic()) > 0.5:
        try:
            get_session().head(endpoint, timeout=left)
        except Exception:  # refused, reset, no such name, no answer
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        else:
            return True
    return False
