"""The configuration: what wins over what, and what is said when something is wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from hqlabel.jobs.load_config import (
    MOST_CHARS,
    MOST_DEEP,
    Config,
    ConfigSources,
    known_names,
    parse_set,
    parse_yaml,
    to_yaml,
)
from hqlabel.pipeline.errors import UsageError


def written(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_set_goes_over_flags_and_flags_go_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "input: {images: from-file, boxes: from-file}\nmodel: {dtype: bfloat16}\n")
    config = ConfigSources(
        path=path, flags={"input.images": "from-flag", "input.limit": None}, sets=["model.dtype=float32"]
    ).load()
    assert config.input.images == "from-flag"
    assert config.input.boxes == "from-file"
    assert config.input.limit is None
    assert config.model.dtype == "float32"


def test_values_of_set_have_the_types_of_yaml() -> None:
    sets = ["limits.max_failure_rate=1e-3", "cluster.actors=2", "storage.s3={endpoint_url: 'http://x:9000'}"]
    config = ConfigSources(sets=[*sets, "input.limit=null", "input.allow_roots=[/a, /b]"]).load()
    assert config.limits.max_failure_rate == 0.001
    assert config.cluster.actors == 2
    assert config.storage == {"s3": {"endpoint_url": "http://x:9000"}}
    assert config.input.limit is None
    assert config.input.allow_roots == ["/a", "/b"]
    assert parse_set("a.b=c=d") == ("a.b", "c=d")


def test_the_saved_configuration_is_read_back_equal(tmp_path: Path) -> None:
    config = ConfigSources(flags={"input.images": "ü/ä b"}, sets=["filter.min_predicted_iou=0.8"]).load()
    assert ConfigSources(path=written(tmp_path, to_yaml(config))).load() == config
    assert Config.model_validate(yaml.safe_load(to_yaml(Config()))) == Config()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("limits.max_failure_rat=1", "did you mean limits.max_failure_rate?"),
        ("images=x", "did you mean input.images?"),
        ("model.dtype=half", "model.dtype: Input should be 'auto', 'float32' or 'bfloat16' (found 'half')"),
        ("model.dtype=float16", "model.dtype"),
        ("cluster.actors=true", "cluster.actors: Input should be a valid integer (found True)"),
        ("cluster.actors=0", "cluster.actors: Input should be greater than or equal to 1 (found 0)"),
        ("limits.max_failure_rate=5", "less than or equal to 1 (found 5)"),
        ("model=3", "model: wanted a section"),
        ("model.checkpoint.x=3", "model.checkpoint: Input should be a valid string"),
        ("cluster.actors", "wanted name=value"),
        ("cluster.actors=[", "not valid YAML"),
        ("version=2", "version: Input should be 1 (found 2)"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_wanted(setting: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        ConfigSources(sets=[setting]).load()
    assert said in str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        ConfigSources(sets=["cluster.actors=none", "outptu.uri=x"]).load()
    assert "cluster.actors" in str(caught.value)
    assert "outptu" in str(caught.value)


def test_a_pool_that_begins_larger_than_it_may_grow_is_refused() -> None:
    with pytest.raises(UsageError, match="actors_min 3 is more than actors 2"):
        ConfigSources(sets=["cluster.actors=2", "cluster.actors_min=3"]).load()


def test_a_flag_and_a_set_that_disagree_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--set output.uri=b contradicts the flag that gives 'a'"):
        ConfigSources(flags={"output.uri": "a"}, sets=["output.uri=b"]).load()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {dtype: float32, dtype: bfloat16}", "the name 'dtype' is written twice"),
        ("- a\n- b", "wanted `name: value` lines at the top, found a list"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        ConfigSources(path=path).load()
    assert path in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.yaml: cannot be read: No such file"):
        ConfigSources(path=str(tmp_path / "no.yaml")).load()


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path) -> None:
    assert ConfigSources(path=written(tmp_path, "# nothing yet\n")).load() == Config()


def test_the_names_that_scripts_rely_on_are_there() -> None:
    wanted = {"model.dtype", "output.images_per_unit", "cluster.actors", "limits.max_failure_rate"}
    assert wanted <= set(known_names())


BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)),
    "circle": "input: &a {columns: *a}",
    "brackets": "input: " + "[" * 100_000,
    "dashes": "- " * 100_000,
    "length": "x" * 10**7,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_file_that_would_never_end_is_refused_soon_and_in_few_words(text: str, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(UsageError) as refused:
        ConfigSources(path=written(tmp_path, text)).load()
    assert time.process_time() - began < 2
    assert len(str(refused.value)) < 1000
    with pytest.raises(UsageError):
        ConfigSources(sets=[f"input.columns={text}"]).load()


def test_a_text_is_refused_by_its_length_and_its_brackets_before_it_is_parsed() -> None:
    comment = "# " + "x" * MOST_CHARS
    with pytest.raises(UsageError, match="which no configuration has"):
        parse_yaml(comment, "c.yaml")
    deep = MOST_DEEP + 1
    with pytest.raises(UsageError, match="brackets inside each other"):
        parse_yaml("a: " + "[" * deep + "]" * deep, "c.yaml")
    assert parse_yaml("a: " + "[" * MOST_DEEP + "]" * MOST_DEEP, "c.yaml")


ABSURD = {
    "nan": ".nan",
    "nan as text": "'nan'",
    "infinite": ".inf",
    "hexadecimal": "0x" + "f" * 200_000,
    "decimal": "9" * 400,
    "over 64 bits": str(2**63),
    "sexagesimal": "1" + ":1" * 60_000,
    "sexagesimal float": "1" + ":1" * 60_000 + ".5",
}


@pytest.mark.parametrize(
    "name", ["filter.min_area_px", "filter.min_predicted_iou", "filter.min_detector_score"]
)
@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
def test_a_number_that_is_none_is_refused_by_name(value: str, name: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError) as refused:
        ConfigSources(sets=[f"{name}={value}"]).load()
    assert time.process_time() - began < 2
    assert len(str(refused.value)) < 1000
    assert name in str(refused.value).replace("filter: ", "filter.")


def test_a_flag_with_a_number_beyond_64_bits_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="input: limit: a number beyond"):
        ConfigSources(flags={"input.limit": 16**200_000}).load()


def test_whole_numbers_of_64_bits_stay_allowed() -> None:
    assert ConfigSources(sets=[f"filter.min_area_px={2**63 - 1}"]).load().filter.min_area_px == 2**63 - 1


def test_a_setting_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "limits: 3\n")
    with pytest.raises(
        UsageError, match=r"limits\.max_image_pixels cannot be set, because limits is a plain"
    ):
        ConfigSources(path=path, sets=("limits.max_image_pixels=5",)).load()


def test_a_wrong_value_is_repeated_without_the_credential_in_it() -> None:
    for value in ("https://me:canary@host/a", "https://host/a?token=canary"):
        with pytest.raises(UsageError, match=r"limits\.max_image_pixels: .*\(found ") as caught:
            ConfigSources(sets=(f"limits.max_image_pixels={value}",)).load()
        assert "canary" not in str(caught.value)
