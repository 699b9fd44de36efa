"""What a uri may point at: nothing outside the roots and schemes is ever opened."""

from __future__ import annotations

import os

import pytest

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.uri_rules import check_uri, secret_options, split_scheme


@pytest.fixture
def rooted(tmp_path):
    """(folder, rules that allow it, http and s3)."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "good.jpg").write_bytes(b"1")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "x.jpg").write_bytes(b"1")
    rules = AccessRules(roots=(str(root.resolve()),), schemes=("s3", "http", "https", "abfs"))
    return root, rules


def reason(uri: str, rules: AccessRules) -> str:
    with pytest.raises(ImageError) as caught:
        check_uri(uri, rules)
    assert caught.value.code == "uri_refused"
    return caught.value.message


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/key.jpg",
        "s3://bucket/a%20b::c #?.jpg",
        "https://host/a.jpg",
        "https://host:8080/a.jpg?size=2",
        "abfs://container@account.dfs.core.windows.net/a.jpg",
    ],
)
def test_allowed_remote_uris_pass(rooted, uri):
    check_uri(uri, rooted[1])


NAMES = [
    "a b.jpg", " outer .jpg", "é.jpg", "e\u0301.jpg", "日本.jpg", "🙂.jpg", "%20.jpg", "%2F.jpg", "#.jpg",
    "?.jpg", "&+*.jpg", "[1].jpg", "{a,b}.jpg", "a::b.jpg", "new\nline.jpg", "tab\t.jpg",
    "\"q'.jpg", "back\\slash.jpg",
    "-l.jpg", ".dot.jpg", "$(touch x).jpg", "=1+1.jpg", "UP.JPG", "none", "x" * 250, ";|.jpg", "file:", "s3:",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_inside_the_root_passes_as_it_is(rooted, name):
    root, rules = rooted
    (root / name).write_bytes(b"1")
    check_uri(f"{root}/{name}", rules)
    check_uri(f"file://{root}/{name}", rules)
    check_uri(f"file://localhost{root}/{name}", rules)


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/a.jpg", "sftp://host/a.jpg", "github://o:r@main/a.jpg", "memory://a.jpg",
        "data:image/png;base64,AA",
        "gs://bucket/a.jpg", "local:///etc/passwd", "FILE:///etc/passwd", "S3://bucket/a.jpg",
        "simplecache::file:///etc/passwd", "filecache::s3://bucket/a", "zip://a::s3://bucket/b.zip",
        "reference::s3://bucket/a", "async_wrapper::file:///etc/passwd", "simplecache::s3://bucket/a.jpg",
        "", " ", "\n", "relative.jpg", "./a.jpg", "../a.jpg", "~/a.jpg", "unknown",
        "file://etc/passwd", "file://host/etc/passwd", "/etc/passwd", "file:///etc/passwd",
        "/proc/self/environ",
        "/dev/zero", "/dev/fd/0", "s3://bucket", "s3://bucket/", "s3:///key", "s3://bucket/../other/a.jpg",
        "s3://bucket/./a.jpg", "s3://key:secret@bucket/a.jpg", "https://user:password@host/a.jpg",
        "https://user@host/a.jpg", "https://host/a.jpg?X-Amz-Signature=abc", "https://host/a.jpg?x=1&token=abc",
        "http://169.254.169.254/latest/meta-data/", "http://169.254.169.254:80/latest", "http://[fe80::1]/x",
        "http://2852039166/latest", "http://0xa9fea9fe/latest", "http://[::ffff:169.254.169.254]/x",
        "http://h:99999/x", "http://metadata.google.internal/computeMetadata/v1/", "http://METADATA.google.internal./x",
        "s3://bucket/a\x00.jpg",
    ],
)  # fmt: skip
def test_everything_else_is_refused(rooted, uri):
    message = reason(uri, rooted[1])
    assert "secret" not in message.replace("such as", "")
    assert "password@" not in message


def test_traversal_is_judged_after_links_are_followed(rooted, tmp_path):
    root, rules = rooted
    os.symlink(root / "good.jpg", root / "inside.jpg")
    os.symlink(tmp_path / "root-2" / "x.jpg", root / "outside.jpg")
    os.symlink(tmp_path / "root-2", root / "folder-out")
    check_uri(f"{root}/inside.jpg", rules)
    check_uri(f"{root}/../root/good.jpg", rules)
    for path in ("outside.jpg", "folder-out/x.jpg", "../root-2/x.jpg"):
        assert "outside the allowed folders" in reason(f"{root}/{path}", rules)


def test_percent_signs_are_not_decoded(rooted):
    check_uri(f"{rooted[0]}/%2e%2e/root-2/x.jpg", rooted[1])  # a folder of that very name, which is absent


def test_a_missing_file_inside_the_root_is_left_to_the_reader(rooted):
    check_uri(f"{rooted[0]}/absent.jpg", rooted[1])


def test_what_is_no_file_is_named(rooted):
    root, rules = rooted
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    os.symlink(root / "loop.jpg", root / "loop.jpg")
    os.symlink(root / "folder.jpg", root / "to-folder.jpg")
    assert "a named pipe" in reason(f"{root}/pipe.jpg", rules)
    assert "a folder" in reason(f"{root}/folder.jpg", rules)
    assert "a folder" in reason(f"{root}/to-folder.jpg", rules)
    assert "circle of symbolic links" in reason(f"{root}/loop.jpg", rules)
    everything = AccessRules(roots=("/",))
    assert "a device" in reason("/dev/null", everything)


def test_no_roots_allow_no_local_file(tmp_path):
    assert "outside" in reason(str(tmp_path), AccessRules())


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("/a/b.jpg", ("file", "/a/b.jpg")),
        ("file:///a%20b", ("file", "/a%20b")),
        ("s3://b/k#?", ("s3", "b/k#?")),
        ("a::s3://b/k", ("file", "a::s3://b/k")),
        ("s3://b/line\nbreak", ("s3", "b/line\nbreak")),
    ],
)
def test_schemes_are_split_without_decoding(uri, parts):
    assert split_scheme(uri) == parts


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"key": "AKIA"}, ["key"]),
        ({"client_kwargs": {"aws_session_token": "x"}}, ["client_kwargs.aws_session_token"]),
        ({"s3_additional_kwargs": {"SSECustomerKey": "x"}}, ["s3_additional_kwargs.SSECustomerKey"]),
        ({"connection_string": "x", "account_key": "y"}, ["connection_string", "account_key"]),
        ({"proxy": "http://me:pw@proxy:3128"}, ["proxy"]),
        ({"headers": {"X-Api": "x"}}, ["headers"]),
        (
            {"client_kwargs": {"headers": {"X-Mine": "x"}, "auth": ["me", "pw"]}},
            ["client_kwargs.headers", "client_kwargs.auth"],
        ),
        ({"auth": "x", "pwd": "x", "user": "x"}, ["auth", "pwd", "user"]),
        ({"proxies": ["http://token@proxy:3128"]}, ["proxies"]),
        ({"endpoint_url": "http://host/?token=x"}, ["endpoint_url"]),
        ({"extra": "Bearer abcdefgh12345"}, ["extra"]),
        ({"headers": {}, "auth": None}, []),
        ({"endpoint_url": "http://minio:9000", "anon": True, "token": "anon", "profile": "p"}, []),
        ({"s3_additional_kwargs": {"SSEKMSKeyId": "arn", "ServerSideEncryption": "aws:kms"}}, []),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}, "key": None}, []),
    ],
)
def test_options_that_look_like_secrets_are_found_at_any_depth(options, names):
    assert secret_options(options) == names
