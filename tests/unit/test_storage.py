"""Addresses, settings, and what the errors of stores mean."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, SourceConfig, StorageConfig
from vlmflow.delta_table import delta_storage_options
from vlmflow.errors import ConfigError, SourceError, StorageAccessError, StoreLostError
from vlmflow.sources import open_source
from vlmflow.sources.uris import normalise_uri
from vlmflow.storage import Fault, access_error, fault_of, open_store, parse_address, passes, read_bytes


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of stores: tests of others leave keys of the S3 server in the environment."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "GCE_", "IDENTITY_", "MSI_")):
            monkeypatch.delenv(name)


def test_an_address_is_its_store_and_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address("s3://bucket/a b/c%20#?/") == ("s3://bucket", "a b/c%20#?")
    assert parse_address("S3A://bucket") == ("s3://bucket", "")
    assert parse_address("abfss://box@account.dfs.core.windows.net/a") == (
        "abfss://box@account.dfs.core.windows.net",
        "a",
    )
    assert parse_address("images/x") == ("", str(tmp_path / "images/x"))
    assert parse_address("file:///a%20b") == ("", "/a b")
    assert parse_address("s3://bucket/p/q").child("r") == "s3://bucket/p/q/r"
    assert str(parse_address("s3://bucket/p/q").parent) == "s3://bucket/p"
    assert str(parse_address("s3://bucket/p").parent) == "s3://bucket"
    assert str(parse_address("/p").parent) == "/"
    assert parse_address("FILE://localhost/a[b].jpg?x#y") == ("", "/a[b].jpg")
    assert parse_address("file://[a/x.jpg") == ("", "/x.jpg")


@pytest.mark.parametrize(
    "path",
    [
        "/a", "/a/b.jpg", "/a//b", "//a", "/a/./b", "/a/../b", "/a/b/", "/a/.", "/a/..", "/a/...", "/.a/..b/c.", "/",
        "/a/~b", "/ /b ", "/a\nb/c", "/s3://x", "/café №7/ü.jpg", "/a/.\n",
    ],
)  # fmt: skip
def test_a_path_is_normal_by_a_glance_where_it_is_by_the_library(path: str) -> None:
    assert parse_address(path) == ("", os.path.abspath(path))  # noqa: PTH100
    assert normalise_uri(path) == os.path.abspath(path)  # noqa: PTH100


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_address("~/catalog") == ("", str(tmp_path / "catalog"))
    monkeypatch.chdir(tmp_path)
    assert parse_address("./~") == ("", str(tmp_path / "~"))
    assert parse_address("~nobody-here/x") == ("", str(tmp_path / "~nobody-here/x"))
    assert parse_address("file:///~/x") == ("", "/~/x")


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/list.csv",
        "ftp://host",
        "s3://",
        "gs:///x",
        "s3://key:secret@bucket/x",
        "",
        " ",
        "file://",
        "file://host",
    ],
)
def test_an_address_that_is_none_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(uri)
    assert caught.value.remedy
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://bucket/x", "gs://bucket/x", "abfss://box@account.dfs.core.windows.net/x"])
def test_every_store_takes_the_same_settings(uri: str) -> None:
    config = StorageConfig(endpoint="http://127.0.0.1:9000", region="eu-west-1", anonymous=True)
    store, path = open_store(uri, config)
    assert path == "x"
    options = delta_storage_options(config, uri)
    assert "http://127.0.0.1:9000" in options.values()
    assert any(name.endswith("skip_signature") for name in options)
    assert type(store).__name__ in ("S3Store", "GCSStore", "AzureStore")


def test_the_local_disk_needs_no_settings(tmp_path: Path) -> None:
    assert delta_storage_options(StorageConfig(), str(tmp_path)) == {}
    (tmp_path / "a#1").write_bytes(b"x")
    assert read_bytes(str(tmp_path / "a#1"), StorageConfig()) == b"x"
    with pytest.raises(SourceError, match="gone does not exist"):
        read_bytes(str(tmp_path / "gone"), StorageConfig())


def answered(status: str, code: str = "") -> str:
    return (
        f"Error performing GET http://h/b/k in 1ms - Server returned non-2xx status code: {status}: <Code>{code}</Code>"
    )


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (FileNotFoundError(f"Object at location k not found: {answered('404 Not Found', 'NoSuchKey')}"), Fault.MISSING),
        (FileNotFoundError(f"Object at location k not found: {answered('404 Not Found', 'NoSuchBucket')}"), Fault.GONE),
        (GenericError(f"Generic S3 error: Error performing list request: {answered('404 Not Found')}"), Fault.GONE),
        (PermissionDeniedError("no"), Fault.DENIED),
        (OSError("Unable to open file /a/b Permission denied (os error 13)"), Fault.DENIED),
        (OSError("Read-only file system (os error 30)"), Fault.DENIED),
        (GenericError(f"Generic S3 error: {answered('400 Bad Request', 'ExpiredToken')}"), Fault.DENIED),
        (GenericError(f"Generic S3 error: {answered('503 Service Unavailable', 'SlowDown')}"), Fault.TRANSIENT),
        (GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/x"), Fault.NO_CREDENTIALS),
        (GenericError("Generic S3 error: HTTP error: TimedOut"), Fault.TIMEOUT),
        # The name of an object is no answer of its store.
        (FileNotFoundError("Object at location NoSuchBucket 403 Forbidden AccessDenied.jpg not found"), Fault.MISSING),
    ],
)
def test_an_error_of_a_store_is_told_by_its_answer(error: Exception, fault: Fault) -> None:
    assert fault_of(error) is fault


def test_a_full_disk_is_named_for_what_it_is() -> None:
    error = access_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "/data/catalog")
    assert isinstance(error, StoreLostError)
    assert str(error) == "/data/catalog: no space is left on the disk"
    assert "run again" in error.remedy


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), GenericError("(os error 24)")])
def test_a_limit_of_open_files_is_no_store_out_of_reach(error: Exception) -> None:
    found = access_error(error, "/data/catalog")
    assert str(found) == "/data/catalog: too many open files"
    assert "ulimit -n" in found.remedy


def test_a_clock_that_is_off_is_no_matter_of_credentials() -> None:
    text = answered("403 Forbidden", "RequestTimeTooSkewed")
    assert "clock" in access_error(PermissionDeniedError(f"Generic S3 error: {text}"), "s3://bucket/catalog").remedy
    text = answered("403 Forbidden", "AccessDenied")
    assert "clock" not in access_error(PermissionDeniedError(f"Generic S3 error: {text}"), "s3://bucket/x").remedy


@pytest.mark.parametrize(
    ("text", "again"),
    [
        (
            "Generic S3 error: Error getting list response body: HTTP error: request or response body error: TimedOut",
            True,
        ),
        ("Error performing GET http://h/b/k in 5.1s - HTTP error: error sending request: TimedOut", True),
        # The client has asked for minutes already; for the rest of a body that stalled as often as for an answer.
        (
            "Generic S3 error: HTTP error: request or response body error\n\nDebug source: kind: Timeout, TimedOut",
            False,
        ),
        (
            "Error performing GET http://h/b/k in 190.7s, after 5 retries, max_retries: 8, retry_timeout: 180s  - "
            "HTTP error: error sending request: TimedOut",
            False,
        ),
        ("Error performing GET http://h/b/k in 16s, after 8 retries, max_retries: 8 - connection refused", True),
    ],
)
def test_a_store_that_was_silent_through_all_retries_of_the_client_is_not_asked_again(text: str, again: bool) -> None:
    assert passes(GenericError(text)) is again


def test_what_is_in_a_folder_of_another_user_is_refused_in_our_words(tmp_path: Path) -> None:
    for name in ("list.csv", "list.jsonl", "list.parquet"):
        (tmp_path / name).write_bytes(b"uri\n")
        (tmp_path / name).chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "open").mkdir()
    with without_rights(tmp_path):
        for name in ("list.csv", "list.jsonl", "list.parquet", "closed/list.csv"):
            with pytest.raises(StorageAccessError, match=f"{name} refuses this user"):
                list(open_source(SourceConfig(uri=str(tmp_path / name))).list())
        with pytest.raises(StorageAccessError, match="catalog refuses this user"):
            Catalog.exists(CatalogConfig(uri=str(tmp_path / "closed" / "catalog")))


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """As a user who may do no more than the modes say, which root is not bound by."""
    if os.geteuid() != 0:
        yield
        return
    for above in (folder, *folder.parents[:-1]):
        if not above.stat().st_mode & 1:
            above.chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# As deltalake prints them, in colour.
DELTA_REFUSAL = (
    "Generic MicrosoftAzure error\n    \x1b[31m↳\x1b[0m Error performing list request\n    \x1b[31m↳\x1b[0m Error "
    "performing GET REDACTED in 2.9ms - Server returned non-2xx status code\n    \x1b[31m↳\x1b[0m 403 Forbidden\n    "
    "\x1b[31m↳\x1b[0m <?xml version='1.0'?>\n<Error>\n  <Code>AuthorizationFailure</Code>\n"
)
DELTA_DEAD = (
    "Generic MicrosoftAzure error\n    \x1b[31m↳\x1b[0m Error performing list request\n    \x1b[31m↳\x1b[0m Error "
    "performing GET http://127.0.0.1:9/a/b in 102ms, after 1 retries, max_retries\n    \x1b[31m↳\x1b[0m 1, "
    "retry_timeout\n    \x1b[31m↳\x1b[0m 180s  - HTTP error\n    \x1b[31m↳\x1b[0m error sending request\n"
)


def test_errors_that_deltalake_lays_out_on_lines_are_told_apart() -> None:
    refused = access_error(OSError(DELTA_REFUSAL), "az://shop/catalog")
    assert (type(refused), str(refused)) == (StorageAccessError, "az://shop refused the credentials")
    gone = DELTA_REFUSAL.replace("403 Forbidden", "404 Not Found").replace("AuthorizationFailure", "ContainerNotFound")
    assert fault_of(OSError(gone)) is Fault.GONE
    assert fault_of(OSError(DELTA_DEAD)) is Fault.TRANSIENT
    assert not passes(OSError(DELTA_REFUSAL))


@pytest.mark.parametrize(
    ("uri", "variable"),
    [
        ("s3://shop/x", "AWS_ACCESS_KEY_ID"),
        ("gs://shop/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://shop/x", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("abfss://shop@account.dfs.core.windows.net/x", "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_absent_credentials_are_named_as_their_store_names_them(uri: str, variable: str) -> None:
    said = "Error performing token request: Error performing GET http://169.254.169.254/metadata in 1ms - refused"
    remedy = access_error(GenericError(said), uri).remedy
    assert variable in remedy
    assert ("aws configure" in remedy) == uri.startswith("s3:")


@pytest.mark.parametrize(
    ("uri", "variable", "value"),
    [
        ("s3://shop/x", "AWS_ACCESS_KEY_ID", "AKIA1\n"),
        ("s3://shop/x", "AWS_SECRET_ACCESS_KEY", "secret\n"),
        ("s3://shop/x", "AWS_SESSION_TOKEN", "t\u00f6ken"),
        ("gs://shop/x", "GOOGLE_BEARER_TOKEN", "ya29\r\n"),
        ("az://shop/x", "AZURE_STORAGE_SAS_TOKEN", "sv=2021&sig=x\n"),
    ],
)
def test_a_variable_that_no_request_can_carry_is_named_and_not_repeated(
    uri: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f": {variable} holds a line break") as caught:
        open_store(uri, StorageConfig())
    assert value.strip() not in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize(
    ("uri", "variable"),
    [
        ("s3://shop/x", "AWS_ENDPOINT_URL"),
        ("s3://shop/x", "AWS_ENDPOINT"),
        ("gs://shop/x", "GOOGLE_BASE_URL"),
        ("az://shop/x", "AZURE_STORAGE_ENDPOINT"),
    ],
)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "is empty"),
        ("minio:9000", "must begin with http://"),
        ("http://", "must begin with http:// or https:// and a host"),
        ("http://minio:99999", "is not a url"),
        ("http://minio:9000/sub path", "is not a url"),
        ("http://[minio", "is not a url"),
        ("http://key:hunter2@minio:9000", "must hold no user, password"),
    ],
)
def test_an_endpoint_of_the_environment_that_is_none_is_named(
    uri: str, variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f": {variable} {said}") as caught:
        open_store(uri, StorageConfig())
    assert "hunter2" not in f"{caught.value}"
    if value == "":  # as of a compose file; the job's own goes before it
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        open_store(uri, StorageConfig(endpoint="http://minio:9000"))


@pytest.mark.parametrize(
    ("uri", "variable", "values"),
    [
        ("s3://shop/x", "AWS_ENDPOINT_URL_STS", ["", "sts", "http://sts:99999"]),
        ("s3://shop/x", "AWS_METADATA_ENDPOINT", ["", "127.0.0.1:1"]),
        ("s3://shop/x", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", ["/a b", ":x"]),
        ("gs://shop/x", "GCE_METADATA_HOST", ["", "a b", "host:99999"]),
        ("az://shop/x", "AZURE_AUTHORITY_HOST", ["", "login.microsoftonline.com"]),
        ("az://shop/x", "IDENTITY_ENDPOINT", ["", "127.0.0.1:1"]),
        ("az://shop/x", "AZURE_TENANT_ID", ["a b"]),
        ("az://shop/x", "IDENTITY_HEADER", ["key\n"]),
    ],
)
def test_a_server_of_credentials_that_is_none_is_named_where_it_would_be_asked(
    uri: str, variable: str, values: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for value in values:
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError, match=f"^{uri[:9]} cannot be opened: {variable} ") as caught:
            open_store(uri, StorageConfig())
        assert "\n" not in str(caught.value)
    monkeypatch.setenv(variable, "")
    open_store(uri, StorageConfig(anonymous=True))
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "GOOGLE_BEARER_TOKEN": "c"}
    for name, key in (keys | {"AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}).items():
        monkeypatch.setenv(name, key)
    open_store(uri, StorageConfig())


@pytest.mark.parametrize(
    ("uri", "variable", "value"),
    [
        ("gs://shop/x", "GOOGLE_CREDENTIALS", '{\n"type": "service_account"}'),
        ("gs://shop/x", "GOOGLE_CLOUD_PROJECT_NAME", "L\u00e4den"),
        ("az://shop/x", "AZURE_CREDENTIALS", '{\n"clientId": "x"}'),
        ("s3://shop/x", "AWS_PROFILE_NAME", "Zo\u00eb"),
        ("s3://shop/x", "AWS_CA_CERTIFICATES", "-----BEGIN CERTIFICATE-----\nMII\n"),
    ],
)
def test_variables_of_other_programs_may_hold_what_they_like(
    uri: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv(variable, value)
    open_store(uri, StorageConfig())


@pytest.mark.parametrize(
    ("variable", "content", "said"),
    [
        (
            "GOOGLE_APPLICATION_CREDENTIALS",
            '{"type": "authorized_user", "refresh_token": "hunter2"}',
            "cannot be opened",
        ),
        ("GOOGLE_APPLICATION_CREDENTIALS", '{\n"refresh_token": "hunter2"}', "cannot be opened"),
        ("GOOGLE_SERVICE_ACCOUNT", "aHVudGVyhunter2", "cannot be opened: No such file"),
        ("GOOGLE_SERVICE_ACCOUNT_KEY", '"hunter2"', "holds no such key"),
    ],
)
def test_a_key_where_its_path_should_be_is_not_repeated(
    variable: str, content: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, content)
    with pytest.raises(ConfigError, match=f"the file of the service account {said}") as caught:
        open_store("gs://shop/x", StorageConfig())
    assert "hunter2" not in f"{caught.value} {caught.value.remedy}"
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.remedy


def test_variables_of_other_stores_and_those_of_several_lines_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "key\n")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/t\u00f6ken")
    open_store("s3://shop/x", StorageConfig())
    open_store(str(tmp_path), StorageConfig())
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", '{\n"private_key": 1')
    with pytest.raises(ConfigError, match="the file of the service account holds no such key"):
        open_store("gs://shop/x", StorageConfig())


def test_an_azure_store_without_an_account_says_which_variable() -> None:
    with pytest.raises(ConfigError, match="Account must be specified") as caught:
        open_store("az://shop/x", StorageConfig())
    assert "AZURE_STORAGE_ACCOUNT_NAME" in caught.value.remedy
