"""What the tests of the commands share: a small checkpoint and a small data set."""

from pathlib import Path

import pytest

from tests.e2e.scenes import DataSet, make_data_set, small_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("weights") / "small")


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """14 images, 2 of them without boxes, and one cut in half."""
    data = make_data_set(tmp_path_factory.mktemp("data"), images=14, most_boxes=5)
    cut = data.images / broken_image(data)
    cut.write_bytes(cut.read_bytes()[:-1500])
    return data


def broken_image(data: DataSet) -> str:
    """The id of the image that is cut."""
    return next(
        name for name, boxes in sorted(data.boxes_by_id.items()) if len(boxes) and name.endswith("jpg")
    )
