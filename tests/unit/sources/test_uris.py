"""One spelling for each image, without secrets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlmflow.sources import image_ids, normalise_uri
from vlmflow.sources.uris import SIGNED_SINCE, resolve, spellings
from vlmflow.storage import Address

GOLDEN = ["73d27d696480c1329d57a660ae6333c8", "79c1e8fa8cb66c936aae406ac82d86bc"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/a b/100%/é#?.jpg", "s3://bucket/a b/100%/é#?.jpg"),
        ("S3A://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("gs://bucket/%20.jpg", "gs://bucket/%20.jpg"),
        (
            "abfss://container@account.dfs.core.windows.net/a.jpg",
            "abfss://container@account.dfs.core.windows.net/a.jpg",
        ),
        ("/data//x/../a b%20#1.jpg", "/data/a b%20#1.jpg"),
        ("file:///data/a%20b.jpg", "/data/a b.jpg"),
        ("HTTP://User:Secret@Example.COM:80/a%2db/%c3%a9 é.jpg#part", "http://example.com/a-b/%C3%A9%20%C3%A9.jpg"),
        ("https://example.com:8443", "https://example.com:8443/"),
        ("https://example.com/a%2Fb?q=%41+b&&x", "https://example.com/a%2Fb?q=A+b&x"),
        ("https://[2001:DB8::1]:443/a.jpg", "https://[2001:db8::1]/a.jpg"),
        ("ftp://user:secret@host/a.jpg", "ftp://host/a.jpg"),
        ("file://[a/x.jpg", "/x.jpg"),
        ("file://", "file://"),
    ],
)
def test_a_uri_has_one_spelling(uri: str, expected: str) -> None:
    assert normalise_uri(uri) == expected


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalise_uri("images/a.jpg") == str(tmp_path / "images/a.jpg")


@pytest.mark.parametrize(
    "signature",
    [
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=k%2F1&X-Amz-Date=1&X-Amz-Expires=9&X-Amz-Signature=5ec7e7",
        "x-amz-security-token=5ec7e7&X-Amz-SignedHeaders=host&X-Amz-Signature=5ec7e7",
        "AWSAccessKeyId=k&Signature=5ec7e7%3D&Expires=1700000000",
        "X-Goog-Algorithm=GOOG4&X-Goog-Credential=5ec7e7&X-Goog-Signature=5ec7e7",
        "GoogleAccessId=k%40p&Expires=1&Signature=5ec7e7",
        "sv=2022-11-02&st=1&se=2&sr=b&sp=r&skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=5&sig=5ec7e7%3D",
        "Expires=1&Signature=5ec7e7&Key-Pair-Id=K",
        "Policy=5ec7e7&Signature=5ec7e7&Key-Pair-Id=K",
        "OSSAccessKeyId=k&Expires=1&Signature=5ec7e7",
        "x-oss-signature-version=OSS4-HMAC-SHA256&x-oss-credential=k%2F1&x-oss-date=1&x-oss-expires=2"
        "&x-oss-security-token=5ec7e7&x-oss-additional-headers=host&x-oss-signature=5ec7e7",
        "q-sign-algorithm=sha1&q-ak=k&q-sign-time=1;2&q-key-time=1;2&q-header-list=&q-url-param-list="
        "&q-signature=5ec7e7&x-cos-security-token=5ec7e7",
        "X-Tos-Algorithm=TOS4&X-Tos-Credential=k&X-Tos-Date=1&X-Tos-Expires=2&X-Tos-Signature=5ec7e7",
        "AccessKeyId=k&Expires=1&Signature=5ec7e7%3D&x-obs-security-token=5ec7e7",
        "Expires=1&KeyName=k&Signature=5ec7e7",
        "URLPrefix=aHR0cA&Expires=1&KeyName=k&Signature=5ec7e7",
        "%58-Amz-Signature=5ec7e7&X-Amz-Date=1",
    ],
)
def test_the_signature_of_a_presigned_url_is_dropped(signature: str) -> None:
    normalised = normalise_uri(f"https://host.example/a.jpg?width=3&{signature}&page=2")
    assert normalised == "https://host.example/a.jpg?width=3&page=2"


@pytest.mark.parametrize(
    ("url", "former"),
    [
        (
            "https://host/a.jpg?w=3&x-oss-signature=1&x-oss-date=2",
            ["https://host/a.jpg?w=3&x-oss-signature=1&x-oss-date=2"],
        ),
        ("HTTPS://u:p@host:443/a b.jpg?q-signature=1#top", ["https://host/a%20b.jpg?q-signature=1"]),
        ("https://host/a.jpg?AccessKeyId=k&Signature=1", ["https://host/a.jpg?AccessKeyId=k&Signature=1"]),
        ("https://host/a.jpg?X-Tos-Signature=1&sig=2&se=3", ["https://host/a.jpg?X-Tos-Signature=1"]),
        ("https://host/a.jpg?Expires=1&KeyName=k&Signature=2", ["https://host/a.jpg?Expires=1&KeyName=k&Signature=2"]),
        ("https://host/a.jpg?AWSAccessKeyId=k&Signature=1", []),
        ("https://host:port/a.jpg?q-signature=1", []),
        ("s3://bucket/a.jpg?q-signature=1", []),
    ],
)
def test_signatures_that_came_later_were_a_part_of_the_address(url: str, former: list[str]) -> None:
    assert spellings(url) == (normalise_uri(url), *former)
    assert not former or pc.match_substring_regex(pa.scalar(url), SIGNED_SINCE).as_py()


def test_parameters_that_only_look_like_a_signature_stay() -> None:
    url = "https://host.example/a.jpg?expires=never&sp=1&st=2&policy=x&signature=mine&urlprefix=y"
    assert normalise_uri(url) == url
    for query in ("x-oss-process=image/resize,w_100&x-oss-date=1", "keyname=k&expires=1", "q-ak=k&q-header-list="):
        assert normalise_uri(f"https://host.example/a.jpg?{query}") == f"https://host.example/a.jpg?{query}"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://user:5ec7e7@host:port/x.jpg?sig=5ec7e7", "https://host:port/x.jpg"),
        ("https://host:port/x.jpg?width=3&sig=5ec7e7#top", "https://host:port/x.jpg?width=3"),
        ("http://user:5ec7e7@[bad/x", "http://[bad/x"),
        ("HTTPS://a@b:5ec7e7@host:99999/x", "https://host:99999/x"),
        ("http:////other.example/x.jpg", "http:////other.example/x.jpg"),
        # What stands before the @ is a part of the password, or is none.
        ("https://user:pa/5ec7e7@host/x.jpg", "https://[hidden-2a590f34579bdaf7/host/x.jpg"),
        ("https://user:5ec7e7?5ec7e7@host/x.jpg", "https://[hidden-e300b431bd619837/host/x.jpg"),
        ("https://user:5ec7e7#5ec7e7@host/x.jpg", "https://[hidden-02743fc7a7663e8a/host/x.jpg"),
        ("http://us[er:5ec7e7@host/x.jpg", "http://[hidden-0b62ecdcb2642b5b/host/x.jpg"),
        ("https://host:port/x.jpg?mail=me@host&sig=5ec7e7", "https://[hidden-06cd70819be0b8d3/host"),
        ("http://user:5ec7e7@one.example:port/a@2x.jpg?sig=5ec7e7", "http://[hidden-9f4e93a01db635c1/2x.jpg"),
        ("http://one.example:port/a@2x.jpg", "http://[hidden-9f4e93a01db635c1/2x.jpg"),
    ],
)
def test_a_url_that_cannot_be_taken_apart_keeps_no_secret(uri: str, expected: str) -> None:
    assert normalise_uri(uri) == expected
    assert normalise_uri(expected) == expected


def test_a_url_that_cannot_be_taken_apart_is_no_other_image() -> None:
    urls = [
        "http://one.example:port/a@2x.jpg",
        "http://two.example:port/b/c@2x.jpg",
        "http://cdn.example:8O80/user@evil.example/x.jpg",
        "http://evil.example/x.jpg",
        "http://fine.example/a.jpg",
        "http:////evil.example/x.jpg",
        "http://u[ser@evil.example/x.jpg",
        "http://evil.example: #/x.jpg",
        "http://evil.example:port/x.jpg?page=1",
        "http://evil.example:port/x.jpg?page=2",
    ]
    assert len(set(map(normalise_uri, urls))) == len(urls)
    for url in urls:
        assert _can_be_taken_apart(normalise_uri(url)) is _can_be_taken_apart(url)


def _can_be_taken_apart(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.port != 0 and bool(parts.hostname)
    except ValueError:
        return False


def test_blanks_before_a_url_make_no_path_of_it() -> None:
    url = "https://user:5ec7e7@h/a.jpg?X-Amz-Signature=5ec7e7"
    assert resolve([f" \t\u00a0{url}", " s3://b/a.jpg", " a.jpg"], Address("", "/data")) == [
        url,
        "s3://b/a.jpg",
        "/data/ a.jpg",
    ]


@given(
    st.from_regex(r"(https?://[a-z.]{1,9}(:\d{1,4})?/|s3://bkt/|/)[\x20-\x7e\u00e9\u4e2d]{0,20}", fullmatch=True)
    | st.from_regex(r"https?://[a-z@\[]{0,4}(:(\d{1,5}|port))?[a@:/?#&=%\[\] \u00e9]{0,9}", fullmatch=True)
)
@example("http://a:\u0661/b@c")
def test_normalising_again_changes_nothing(uri: str) -> None:
    once = normalise_uri(uri)
    assert normalise_uri(once) == once
    if uri.startswith("http"):
        assert _can_be_taken_apart(once) is _can_be_taken_apart(uri.strip())


def test_identity_is_that_of_the_normalised_uri_and_the_key() -> None:
    plain, signed, other = image_ids(
        ["https://h/a.jpg", "https://h/a.jpg?X-Amz-Signature=1&X-Amz-Date=2", "https://h/b.jpg"]
    )
    assert plain == signed != other
    assert len(plain) == 32
    int(plain, 16)
    keyed = image_ids(["https://h/a.jpg"] * 3, ["1", "2", None])
    assert len(set(keyed)) == 3
    assert keyed[2] == plain


def test_identities_never_change() -> None:
    # A new way to compute them would make every image of every catalog a new one.
    assert image_ids(["s3://bucket/a.jpg", "s3://bucket/a.jpg"], [None, "k"]) == GOLDEN


def test_uris_of_a_manifest_are_relative_to_its_folder() -> None:
    names = ["a.jpg", "../b c.jpg", "s3://other/c.jpg", "https://h/d.jpg", "/e.jpg"]
    assert resolve(names, Address("", "/data/sets")) == [
        "/data/sets/a.jpg",
        "/data/b c.jpg",
        "s3://other/c.jpg",
        "https://h/d.jpg",
        "/e.jpg",
    ]
    assert resolve(names[:2], Address("s3://bucket", "sets/one")) == [
        "s3://bucket/sets/one/a.jpg",
        "s3://bucket/sets/b c.jpg",
    ]
    assert resolve(names[:1], Address("s3://bucket", "")) == ["s3://bucket/a.jpg"]
