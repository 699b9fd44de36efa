"""What a job costs its driver, its store and its purse, by size: arithmetic on measured coefficients.

    python -m benchmarks.scale_model            prints the tables of docs/scale.md

Every coefficient says by which command it was measured; none is for a GPU, so the rate of one is a parameter
(`--images-per-s`). Prices are those of S3 Standard in us-east-1, in US dollars, as a field to change.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

GPUS = (1, 10, 100, 1000)
IMAGES = (10_000_000, 100_000_000, 1_000_000_000)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What was measured, a unit being 64 images of 3 boxes; docs/scale.md names the command of each."""

    images_per_unit: int = 64
    driver_cpu_s_per_unit: float = 0.0278
    worker_cpu_s_per_unit: float = 0.079
    plan_bytes_per_image: float = 900.0
    plan_bytes_at_least: float = 235e6
    plan_cpu_s_per_image: float = 22e-6
    decoded_bytes_per_image: float = 1024 * 768 * 3
    gets_per_image: float = 1.0
    gets_per_unit: float = 6.6
    heads_per_unit: float = 2.0
    puts_per_unit: float = 2.0
    listed_units_per_request: int = 1000
    output_bytes_per_image: float = 2 * (120 + 3 * 160)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars."""

    get: float = 0.4e-6
    put: float = 5e-6
    gb_month: float = 0.023
    gpu_hour: float = 1.6  # of an A100, whose rate is the default


DRIVER_BUSY = 0.7
"""A driver that works more than this of one core falls behind in bursts."""


def by_gpus(known: Coefficients, images_per_s: float) -> list[list[str]]:
    """One row for each number of GPUs: rates that follow from it."""
    rows = []
    for gpus in GPUS:
        images = gpus * images_per_s
        units = images / known.images_per_unit
        busy = units * known.driver_cpu_s_per_unit
        rows.append(
            [
                f"{gpus:,}",
                f"{images:,.0f}",
                f"{units:,.2f}",
                f"{busy:.2f}",
                f"{max(1, -(-busy // DRIVER_BUSY)):.0f}",
                f"{units * known.worker_cpu_s_per_unit:,.1f}",
                f"{images * known.decoded_bytes_per_image / 1e9:,.2f}",
                f"{images * known.gets_per_image + units * known.gets_per_unit:,.0f}",
                f"{units * known.puts_per_unit:,.1f}",
                *(f"{total / images / 86400:,.1f}" for total in IMAGES),
            ]
        )
    return rows


def by_images(known: Coefficients, prices: Prices, images_per_s: float) -> list[list[str]]:
    """One row for each size of a job: what does not depend on the number of GPUs."""
    rows = []
    for images in IMAGES:
        units = images / known.images_per_unit
        reads = images * known.gets_per_image + units * (known.gets_per_unit + known.heads_per_unit)
        writes = units * known.puts_per_unit
        hours = images / images_per_s / 3600
        rows.append(
            [
                f"{images / 1e6:,.0f} M",
                f"{units:,.0f}",
                f"{(known.plan_bytes_at_least + images * known.plan_bytes_per_image) / 1e9:,.0f}",
                f"{images * known.plan_cpu_s_per_image / 3600:,.1f}",
                f"{units / known.listed_units_per_request:,.0f}",
                f"{images * known.output_bytes_per_image / 1e9:,.0f}",
                f"{reads * prices.get + writes * prices.put:,.0f}",
                f"{images * known.output_bytes_per_image / 1e9 * prices.gb_month:,.1f}",
                f"{hours:,.0f}",
                f"{hours * prices.gpu_hour:,.0f}",
            ]
        )
    return rows


GPU_HEAD = (
    "GPUs", "images/s", "units/s", "driver cores", "drivers", "other worker cores", "decoded GB/s", "GET/s",
    "PUT/s", "days for 10 M", "100 M", "1 B",
)  # fmt: skip
IMAGE_HEAD = (
    "images", "units", "plan in one process, GB", "plan, CPU hours", "LIST to resume", "output, GB",
    "requests, $", "output, $ a month", "GPU-hours", "GPUs, $",
)  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["--:"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        .replace("| --: ", "|--:")
        .replace("--: |", "--:|")
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images-per-s", type=float, default=15.0)
    rate = parser.parse_args().images_per_s
    print(tables(rate))


def tables(images_per_s: float) -> str:
    """Both tables as they stand in docs/scale.md."""
    known, prices = Coefficients(), Prices()
    first = table(GPU_HEAD, by_gpus(known, images_per_s))
    return first + "\n\n" + table(IMAGE_HEAD, by_images(known, prices, images_per_s))


if __name__ == "__main__":
    main()
