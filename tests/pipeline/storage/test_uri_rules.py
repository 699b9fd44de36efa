"""What a uri may point at: nothing outside the roots and schemes is ever opened."""

from __future__ import annotations

import os

import pytest

from hqlabel.pipeline.errors import ImageError, UsageError
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.uri_rules import (
    check_uri,
    masked,
    refuse_storage_secrets,
    secret_options,
    split_scheme,
    without_credentials,
)


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
        ({"x": [{"password": "x"}, [["y", {"pkey": "x"}]]]}, ["x.password", "x.pkey"]),
        ({"conn_str": "x", "pat": "x", "session": "x", "sig": "x"}, ["conn_str", "pat", "session", "sig"]),
        ({"hdrs": {"X-Mine": "x"}, "sessionToken": "x", "otp": 123}, ["hdrs", "sessionToken", "otp"]),
        ({"params": {"X-Api-Key": "x", "code": "x"}}, ["params.X-Api-Key", "params.code"]),
        ({"max_tokens": 5, "pattern": "x", "monkey": "x", "signature_version": "s3v4"}, []),
        ({"headers": {}, "auth": None}, []),
        ({"endpoint_url": "http://minio:9000", "anon": True, "token": "anon", "profile": "p"}, []),
        ({"s3_additional_kwargs": {"SSEKMSKeyId": "arn", "ServerSideEncryption": "aws:kms"}}, []),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}, "key": None}, []),
    ],
)
def test_options_that_look_like_secrets_are_found_at_any_depth(options, names):
    assert secret_options(options) == names


STORES = {
    "s3": {
        "endpoint_url": "http://minio:9000", "anon": True, "profile": "p", "use_ssl": False,
        "client_kwargs": {"region_name": "eu-west-1"},
        "config_kwargs": {
            "s3": {"addressing_style": "path"}, "retries": {"mode": "standard"}, "max_pool_connections": 9,
            "signature_version": "s3v4", "proxies": {"https": "http://proxy:3128"},
        },
        "s3_additional_kwargs": {"SSEKMSKeyId": "arn", "ServerSideEncryption": "aws:kms", "ACL": "private"},
    },
    "gs": {"project": "p", "token": "google_default", "endpoint_url": "http://h", "session_kwargs": {}},
    "az": {"account_name": "a", "account_host": "a.blob.core.windows.net", "tenant_id": "t"},
    "https": {"block_size": 1, "client_kwargs": {"trust_env": True, "timeout": 5.0}},
}  # fmt: skip


@pytest.mark.parametrize("options", STORES.values(), ids=STORES)
def test_options_of_stores_that_are_no_secret_pass(options):
    refuse_storage_secrets(options, where="storage.x")


@pytest.mark.parametrize("options", [{"odd": "c"}, {"odd": [["c"]]}, {"client_kwargs": {"odd": b"c"}}])
def test_a_text_under_a_name_that_nobody_knows_is_refused(options):
    with pytest.raises(UsageError, match=r"storage\.s3: option '(client_kwargs\.)?odd' holds a text"):
        refuse_storage_secrets(options, where="storage.s3")


@pytest.mark.parametrize(
    "end",
    ["#access_token=SECRET", ";jsessionid=SECRET", ";JSESSIONID=SECRET?size=2", "?code=SECRET",
     "?a=1;sid=SECRET", "?a=1&Key-Pair-Id=SECRET", "?sessionToken=SECRET", "#a=1&id_token=SECRET"],
)  # fmt: skip
def test_what_signs_a_web_address_is_refused_and_not_repeated(rooted, end):
    uri = f"https://host/a.jpg{end}"
    assert "signature or token" in reason(uri, rooted[1])
    assert "SECRET" not in masked(f"the image {uri} fails") + without_credentials(uri)


@pytest.mark.parametrize(
    "text",
    ["https://host/a;v=2.jpg?size=2#top", "/data/a;code=1#key=2.jpg", "a; code=5", "https://host/a.jpg?code=1",
     "https://host/a.jpg?key=12&session=3", "https://host/a?file=holiday_beach_in_2024_no_0017.jpg"],
)  # fmt: skip
def test_other_parts_of_an_address_and_other_texts_stand(text):
    assert masked(text) == without_credentials(text) == text


@pytest.mark.parametrize("value", ["3f" * 16, "aB3dE5gH7jK9mN1pQ3sT5vW7", "aB3dE5gH7jK9mN1pQ3sT5vW7+/="])
def test_a_long_random_value_under_any_name_is_read_and_not_shown(value):
    uri = f"https://host/a.jpg?size=2&ref={value}"
    check_uri(uri, AccessRules(schemes=("https",)))
    assert value not in masked(f"the image {uri} fails")
    assert "size=2" in masked(uri)
