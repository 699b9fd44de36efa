"""Canaries: a secret put anywhere a person may put one reaches no file, no message and no log of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output

CANARY = "c4n4ryS3cret"
PLACES = ("--images", "--boxes", "--checkpoint", "--output")
URIS = (f"https://me:{CANARY}@host/x", f"https://{CANARY}@host/x", f"https://host/x?token={CANARY}",
        f"https://host/x?a=1&X-Goog-Credential={CANARY}", f"s3://{CANARY}@bucket/x",
        f"https://host/x#access_token={CANARY}", f"https://host/x;jsessionid={CANARY}",
        f"https://host/x?a=1&code={CANARY}", f"https://host/x?a=1;sid={CANARY}")  # fmt: skip
SETS = (
    f"storage.s3.key={CANARY}", f"storage.s3.auth={CANARY}", f"storage.s3.pwd={CANARY}",
    f"storage.http.headers={{X-Mine: {CANARY}}}", f"storage.http.client_kwargs={{auth: [me, {CANARY}]}}",
    f"storage.https.client_kwargs={{headers: {{Cookie: {CANARY}}}}}",
    f"storage.s3.config_kwargs={{proxies: {{http: 'http://{CANARY}@proxy'}}}}",
    f"storage.s3={CANARY}", f"storage.s3=[{CANARY}", f"storage.s3.endpoint_url=http://me:{CANARY}@host",
    f"storage.http.params.sig={CANARY}", f"storage.az.conn_str={CANARY}", f"storage.sftp.pkey={CANARY}",
    f"storage.http.session={CANARY}", f"storage.http.pat={CANARY}", f"storage.http.hdrs.X={CANARY}",
    f"storage.s3.x=[{{password: {CANARY}}}]", f"storage.s3.x=[[[{CANARY}]]]", f"storage.s3.odd={CANARY}",
    f"storage.s3.endpoint_url=https://host/#access_token={CANARY}",
    f"storage.http.x={{host: {{odd: [{CANARY}]}}}}", f"detector.options.x=[[{{passphrase: {CANARY}}}]]",
    f"detector.options={{api_key: {CANARY}}}", f"detector.options={CANARY}",
    f"model.dtype='Bearer {CANARY}'", f"input.image_root=https://me:{CANARY}@host/",
)  # fmt: skip


FILES = (f"storage: {{s3: {{key: {CANARY}", f"storage:\n  s3: {{key: {CANARY}}}\n")


def no_canary(folder: Path, *said: str) -> None:
    assert CANARY not in "".join(said)
    for path in folder.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    (tmp_path / "photos").mkdir()
    places = ["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    return ["label", *places, "--checkpoint", "demo", "--detector", "hf:no/such"]


@pytest.mark.parametrize("setting", SETS)
def test_a_secret_in_a_setting_is_refused_and_not_repeated(
    setting: str, call: list[str], tmp_path: Path
) -> None:
    code, out, err = run(*call, "--set", setting, "--verbose")

    assert code in (2, 4), err
    no_canary(tmp_path, out, err)


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("flag", PLACES)
def test_a_secret_in_a_place_is_refused_and_not_repeated(
    flag: str, uri: str, call: list[str], tmp_path: Path
) -> None:
    code, out, err = run(*call, flag, uri)

    assert code in (2, 4), err
    no_canary(tmp_path, out, err)


@pytest.mark.parametrize("text", FILES)
def test_a_secret_in_a_file_is_not_repeated(text: str, call: list[str], tmp_path: Path) -> None:
    (tmp_path.parent / "run.yaml").write_text(text)

    code, out, err = run(*call, "--config", str(tmp_path.parent / "run.yaml"))

    assert code == 2, err
    no_canary(tmp_path, out, err)


def test_a_secret_in_an_image_uri_is_in_no_report_and_no_message(tmp_path: Path) -> None:
    uri = f"https://me:{CANARY}@host/a.jpg?sig={CANARY}"
    images = [
        MadeImage(image_id="a", masks=[blob(1)], uri=uri),
        MadeImage(image_id="b", uri=uri + "b", error="uri_refused"),
    ]
    output = make_output(tmp_path / "out", images)
    page = tmp_path / "page.html"

    for command in (["report", "--to", str(page)], ["inspect", "a"], ["status"], ["validate"]):
        _, out, err = run(*command, "--output", output)
        assert CANARY not in out + err
    assert CANARY not in page.read_text()
