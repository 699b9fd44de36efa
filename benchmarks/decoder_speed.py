"""The mask decoder: its shortcuts beside the plain definition, and its memory beside the number of boxes.

    python -m benchmarks.decoder_speed [--boxes 50] [--dtype bfloat16] [--rounds 3]
    python -m benchmarks.decoder_speed --memory 50 500 5000 [--side 256]

The first form decodes boxes on features of the published size (64 x 64 tokens), in turn by our decoder and
by the plain definition that the tests hold it to, both in calls of `--per-call` boxes; medians, wall and CPU
seconds. The second runs `Segmenter` in one process on one picture with more and more boxes and prints
the most memory that the process has had up to then.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch

from hqlabel.model.records import CallShape, Instances
from hqlabel.model.sam_config import PATCH_SIZE, vit_config
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.segmenter import Segmenter
from tests.model.plain_decoder import plain_decode
from tests.parity.lively import boxes_in, lively, photo

SIZE_HW = (768, 1024)


def small_encoder(side: int) -> SamHQ:
    """A model whose decoder has the published widths, and whose encoder costs little."""
    return lively(
        vit_config(
            embed_dim=64,
            depth=2,
            num_heads=1,
            global_attn_indexes=(1,),
            window_size=min(14, side // PATCH_SIZE - 1),
            image_size=side,
        )
    )


@torch.no_grad()
def speed(model: SamHQ, boxes: int, per_call: int, rounds: int) -> None:
    embedding = model.encode_images([photo(*SIZE_HW)])
    sparse, dense = model.prompt_encoder(boxes_N4=torch.from_numpy(boxes_in(*SIZE_HW, boxes)).float())
    given = {
        "embedding_BCGG": embedding.embedding_BCGG,
        "features": embedding.features,
        "dense_BCGG": dense.to(model.dtype),
        "image_pe_1CGG": model.prompt_encoder.image_pe().to(model.dtype),
    }
    calls = [
        {"sparse_NTC": part.to(model.dtype), "image_index_N": torch.zeros(len(part), dtype=torch.int64)}
        for part in sparse.split(per_call)
    ]
    decoder = model.mask_decoder

    def ours() -> None:
        shared = decoder.share(**given)
        for call in calls:
            index = call["image_index_N"]
            decoder.decode(
                shared,
                sparse_NTC=call["sparse_NTC"],
                key_index_N=index,
                image_index_N=index,
                mask_tokens=(0,),
            )

    def plain() -> None:
        for call in calls:
            plain_decode(decoder, **given, **call)

    roads: dict[str, Callable[[], None]] = {"ours": ours, "plain": plain}
    walls: dict[str, list[float]] = {name: [] for name in roads}
    cpus: dict[str, list[float]] = {name: [] for name in roads}
    for _ in range(rounds):
        for name, road in roads.items():
            wall, cpu = time.perf_counter(), time.process_time()
            road()
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    for times, what in ((walls, "wall"), (cpus, "CPU")):
        ours, plain = (1e3 * statistics.median(times[name]) / boxes for name in ("ours", "plain"))
        print(f"{what:>5}: ours {ours:6.1f} ms a box, plain {plain:6.1f}, ratio {plain / ours:.2f}")


def memory(model: SamHQ, counts: list[int], per_call: int) -> None:
    segmenter = Segmenter(
        model,
        call_shape=CallShape(boxes_per_call=per_call),
        dtype="bfloat16" if model.dtype == torch.bfloat16 else "float32",
    )
    # No larger than the model's input: what is asked is what thousands of boxes add, not what a frame costs.
    size_hw = (segmenter.input_side * 3 // 4, segmenter.input_side)
    picture = photo(*size_hw)
    for count in counts:
        (result,) = segmenter.segment([picture], [boxes_in(*size_hw, count)])
        assert isinstance(result, Instances), result
        assert len(result.counts) == count
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        text = sum(map(len, result.counts)) / 1024**2
        print(
            f"{count:>6} boxes: most memory so far {peak:.0f} MiB ({text:.1f} MiB of it are the RLE strings)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=50)
    parser.add_argument("--per-call", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--memory", type=int, nargs="+", metavar="BOXES")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = small_encoder(options.side).cast(getattr(torch, options.dtype))
    print(f"torch {torch.__version__}, {options.threads} threads, {options.dtype}, input {options.side}")
    if options.memory:
        memory(model, options.memory, options.per_call)
    else:
        speed(model, options.boxes, options.per_call, options.rounds)


if __name__ == "__main__":
    main()
