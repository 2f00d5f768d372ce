"""Object stores and local folders under one kind of address: ``s3://``, ``gs://``, ``az://``, ``abfss://``, a path.

Addresses are taken literally, as the command line tools of the clouds take them: no percent-decoding, and ``?`` or
``#`` are letters like any other. Only ``file://`` is a url in the strict sense.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import obstore
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from vlmflow.config import StorageConfig
from vlmflow.errors import (
    ConfigError,
    ImageError,
    SourceError,
    StorageAccessError,
    StoreLostError,
    TransientError,
    VlmflowError,
)
from vlmflow.store_secrets import hide_secrets
from vlmflow.store_variables import check_variables

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# obstore raises its own classes, and some of Python's: FileNotFoundError, PermissionError, ValueError.
STORE_ERRORS = (BaseError, OSError, ValueError)

_OBJECT_SCHEMES = {"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Absolute local paths as :func:`parse_address` gives them, told at a glance: a manifest may hold millions.
NORMAL_PATH = r"(?:/(?!\.\.?(?:/|\Z))[^/]+)+"
_NORMAL_PATH = re.compile(NORMAL_PATH)
_AROUND_PATH = re.compile(r"^[^/?#]*|[?#].*$", re.DOTALL)  # in the rest of a file:// url
# Of whoever may use a store, by the word with which deltalake's settings of it begin.
_VARIABLES = {
    "aws": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    "google": "GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
MAX_BACKOFF = timedelta(seconds=5)  # eight retries take about 16 s, not minutes

# What obstore's text says of an answer: its status and, in the body, the store's own code. The text also holds the
# name of the object, which may be anything, so nothing is searched for in the whole of it.
_ANSWER = re.compile(r"Server returned non-2xx status code: (\d{3})(?:.*?<Code>([\w.]+)</Code>)?", re.DOTALL)
# deltalake lays the causes of an error out on lines of their own, in colour; obstore has them on one, after colons.
_CAUSE = re.compile(r"\s*\n\s*(?:\x1b\[\d+m)?↳(?:\x1b\[0m)?\s*")
_LISTING = re.compile(r"Generic \w+ error: Error performing list request")
_STORE = re.compile(r"Generic (?:S3|GCS|MicrosoftAzure|LocalFileSystem) error|HTTP error|[Oo]bject ?[Ss]tore")
_METADATA_SERVER = re.compile(r"Error performing \w+ http://(169\.254\.169\.254|metadata\.google)")
_KEY = re.compile(r"\bpem\b|CryptoProvider|private key", re.IGNORECASE)
_REFUSED = re.compile(r" (/[^\n]*?)(?:#\d+)?: [^:]+ \(os error 13\)")
_OS_ERROR = re.compile(r": ([^:]+) \(os error \d+\)")
_CLOCK_CODES = {"RequestTimeTooSkewed", "RequestExpired"}  # of S3: signed by a clock off by more than 15 minutes
_TOO_MANY_OPEN = re.compile(r"os error 2[34]\b|Errno 2[34]\b|Too many open files")
MORE_OPEN_FILES = "Allow more: `ulimit -n 4096`, in a container `docker run --ulimit nofile=4096`; then run again."
# deltalake's, of a table that is damaged or has what it does not know.
_UNUSABLE = re.compile(r"Kernel error: (?:Unsupported|Max|Json|Arrow|Schema|Invalid Checkpoint|No .* delta log)")
_FULL = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)\b")
_TIMEOUT = re.compile(r"TimedOut|timed out", re.IGNORECASE)
# A body that stalled was asked for again from where it stalled, up to `max_retries` times.
_RETRIED = re.compile(
    r" in [\d.]+\w+, after \d+ retries, max_retries: |^Generic \w+ error: HTTP error: request or response body error"
)

_GONE_CODES = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "FilesystemNotFound", "AccountIsDisabled"}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed"}
_LOCAL_REFUSAL = re.compile(r"os error (?:13|30)\b")  # no permission, or mounted for reading: deltalake has no class
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed"}
_DENIED_CODES |= {"KMS.DisabledException", "KMS.KMSInvalidStateException", "KMS.NotFoundException"}


class Fault(Enum):
    """What went wrong with a request to a store."""

    MISSING = "missing"  # this one object
    DENIED = "denied"  # this request; the whole store or this one object, only the caller can tell
    NO_CREDENTIALS = "no credentials"
    GONE = "gone"  # the bucket or container
    REGION = "region"
    PATH = "path"  # a name that obstore cannot express
    CHANGED = "changed"  # this one object, since the version that was asked for
    TIMEOUT = "timeout"
    TRANSIENT = "transient"  # still failing after all retries


class Address(NamedTuple):
    """Where something is: ``root`` is ``s3://bucket`` or empty for the local disk, ``path`` what follows."""

    root: str
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is on the local disk."""
        return not self.root

    def child(self, name: str) -> str:
        """The uri of something below this address."""
        return f"{str(self).rstrip('/')}/{name}"

    @property
    def parent(self) -> Address:
        """The folder that holds what is at this address."""
        return Address(self.root, self.path.rpartition("/")[0] or ("/" if self.is_local else ""))

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        return f"{self.root}/{self.path}" if self.path else self.root


def parse_address(uri: str) -> Address:
    """Splits a uri into its store and the path in it; a local path becomes absolute, symbolic links stay.

    A ``~`` at the beginning of a local path is the user's home, as in a shell: job files pass through none.

    Raises:
        ConfigError: no store goes by the scheme, no bucket or path is named, or the name is no UTF-8.
    """
    try:
        uri.encode("utf-8")
    except UnicodeEncodeError as error:
        remedy = "Rename it: neither tables nor stores can hold other names."
        raise ConfigError(f"the uri {uri!r} is no UTF-8", remedy=remedy) from error
    if _NORMAL_PATH.fullmatch(uri):
        return Address("", uri)
    match = _SCHEME.match(uri)
    if match is None:
        return _on_disk(uri, os.path.expanduser(uri))  # noqa: PTH111 (Path.expanduser raises: there is no such user)
    scheme = match[1].lower()
    if scheme == "file":
        return _on_disk(uri, unquote(_AROUND_PATH.sub("", uri[match.end() :])))
    if scheme not in _OBJECT_SCHEMES:
        known = "a local path, s3://, gs://, az:// or abfss://"
        raise ConfigError(f"{scheme}:// is not a store that can be used here", remedy=f"Use {known}.")
    bucket, _, path = uri[match.end() :].partition("/")
    if "@" in bucket and not scheme.startswith("abfs"):
        remedy = "Leave them to the environment or the machine's role."
        raise ConfigError(f"the {scheme}:// uri holds credentials", remedy=remedy)
    if not bucket:
        raise ConfigError(f"{uri} names no bucket", remedy=f"Write {scheme}://bucket/path.")
    return Address(f"{'s3' if scheme == 's3a' else scheme}://{bucket}", path.strip("/"))


def wherever(uri: str) -> str:
    """The uri for processes that work in other folders: workers of a cluster are where it was started."""
    address = parse_address(uri)
    return str(address) if address.is_local else uri


def check_on_disk(path: Path) -> None:
    """Refuses what was meant as a uri, or as standard output, where a path of this machine is wanted.

    :class:`Path` makes ``s3:/bucket`` of ``s3://bucket``, a folder like any other.

    Raises:
        ConfigError: the path begins as a uri does, or is ``-``.
    """
    if path == Path("-"):
        raise ConfigError("-: standard input and output cannot be used here", remedy="Name a path of this machine.")
    scheme, begins_so, rest = path.as_posix().partition(":/")
    if begins_so and _SCHEME.match(f"{scheme}://"):
        remedy = "Name a path of this machine, and copy what it holds from or to the store."
        raise ConfigError(f"{scheme}://{rest}: only a path of this machine can be used here", remedy=remedy)


def _on_disk(uri: str, path: str) -> Address:
    if not path.strip():  # else it would be the folder that the process stands in
        remedy = "Name a folder or a uri; the folder one stands in is `.`. A variable that is not set leaves it empty."
        raise ConfigError(f"the uri {uri!r} names no place", remedy=remedy)
    return Address("", os.path.abspath(path))  # noqa: PTH100 (Path.resolve would follow symbolic links)


def open_store(uri: str, config: StorageConfig) -> tuple[ObjectStore, str]:
    """Opens the store of a uri; nothing is sent yet. Credentials come from the environment or the machine's role.

    Returns:
        The store and the path of the uri in it. Of the local disk, the store is the whole of it.

    Raises:
        ConfigError: the uri, a setting that its store does not have, or a variable of the environment that cannot be
            sent to it.
    """
    address = parse_address(uri)
    if address.is_local:
        return LocalStore(), address.path.lstrip("/")
    names_endpoint, signs = config.endpoint is None, not config.anonymous
    check_variables(provider_of(address), address.root, names_endpoint=names_endpoint, signs=signs)
    settings: Any = {}  # of S3, GCS or Azure, which the root decides
    if config.anonymous:
        settings["skip_signature"] = True
    if config.endpoint is not None:
        settings["base_url" if address.root.startswith("gs:") else "endpoint"] = config.endpoint
    if config.region is not None and address.root.startswith("s3:"):
        settings["region"] = config.region
    # An endpoint says itself whether it is http; the clouds' own are https.
    client: ClientConfig = {"timeout": timedelta(seconds=config.timeout_s), "allow_http": True}
    retry: RetryConfig = {"max_retries": config.max_retries, "backoff": {"max_backoff": MAX_BACKOFF}}
    try:
        store: ObjectStore = from_url(address.root, config=settings, client_options=client, retry_config=retry)
    except STORE_ERRORS as error:
        remedy = f"Check storage.* in the job, and the store's variables ({_VARIABLES[provider_of(address)]}, ...)."
        # Not with its cause, which logs of flows would repeat.
        raise ConfigError(f"{address.root} cannot be opened: {_why_not(error)}", remedy=remedy) from None
    return store, address.path


def _why_not(error: Exception) -> str:
    """Why a store cannot be opened. Of a key that it cannot read, obstore repeats the line: all of it, often.

    So it does of a file of one: its path, in whose place a variable may have the key itself, and words in it.
    """
    text = str(error)
    if "service account file" in text:
        reason = _OS_ERROR.search(text)
        return "the file of the service account " + (
            f"cannot be opened: {reason[1]}" if reason else "holds no such key"
        )
    if _KEY.search(text):
        return "the private key of the service account cannot be read"
    return text.splitlines()[0]


def provider_of(address: Address) -> str:
    """The word with which settings of a store begin."""
    return {"s3": "aws", "gs": "google"}.get(address.root.partition(":")[0], "azure")


def object_version(meta: ObjectMeta) -> str:
    """The ETag without its quotes, else the time of modification and the size."""
    e_tag = meta["e_tag"]
    return e_tag.strip('"') if e_tag else f"{int(meta['last_modified'].timestamp() * 1e6):x}-{meta['size']:x}"


def local_version(status: os.stat_result) -> str:
    """The version of a local file: its time of modification in nanoseconds, and its size, both hexadecimal."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def text_of(error: Exception) -> str:
    """What an error of obstore or of deltalake says, as obstore would say it."""
    return _CAUSE.sub(": ", str(error))


def fault_of(error: Exception) -> Fault:
    """Tells what an error of a store means. Its classes say too little: listings raise one class for everything."""
    text = text_of(error)
    answer = _ANSWER.search(text)
    status, code = (int(answer[1]), answer[2]) if answer else (0, None)
    if code in _GONE_CODES or (status == 404 and _LISTING.match(text)):
        return Fault.GONE
    if isinstance(error, InvalidPathError):
        return Fault.PATH
    if isinstance(error, PreconditionError) or status == 412:
        return Fault.CHANGED
    if _METADATA_SERVER.search(text):  # the last place where credentials are looked for
        return Fault.NO_CREDENTIALS
    if code in _REGION_CODES or status == 301 or "Received redirect without LOCATION" in text:
        return Fault.REGION
    refused = (PermissionDeniedError, UnauthenticatedError, PermissionError)
    if isinstance(error, refused) or status in (401, 403) or code in _DENIED_CODES or _LOCAL_REFUSAL.search(text):
        return Fault.DENIED
    if isinstance(error, FileNotFoundError):
        return Fault.MISSING
    return Fault.TIMEOUT if _TIMEOUT.search(text) else Fault.TRANSIENT


def passes(error: Exception) -> bool:
    """Whether a request that failed so may succeed when it is made again.

    One that the client itself has made again until it gave up, always without an answer, has had minutes.
    """
    text = text_of(error)
    if _FULL.search(text) or is_unknown(error) or (_UNUSABLE.search(text) and not _STORE.search(text)):
        return False
    if "LocalFileSystem" in text or isinstance(error, ImageError):
        return False
    fault = fault_of(error)
    return fault is Fault.TRANSIENT or (fault is Fault.TIMEOUT and not _RETRIED.search(text))


def is_of_store(error: Exception) -> bool:
    """Whether a store caused an error of deltalake, which wraps some in its own and has others that are none."""
    return isinstance(error, OSError) or fault_of(error) is not Fault.TRANSIENT or _STORE.search(str(error)) is not None


def is_unknown(error: Exception) -> bool:
    """Whether a store says that it has no such request, as of conditional ones: 501, Not Implemented."""
    answer = _ANSWER.search(text_of(error))
    return answer is not None and answer[1] == "501"


def is_full(error: Exception) -> bool:
    """Whether a store's disk has no room left."""
    return _FULL.search(str(error)) is not None


def access_error(error: Exception, uri: str) -> VlmflowError:
    """The error for a store that cannot be used, in our words; its own lose what may be a secret."""
    hide_secrets(error)
    address = parse_address(uri)
    root = address.root or address.path
    if is_full(error):
        what = f"{root}: no space is left on the disk"
        return StoreLostError(what, remedy="Free some, and run again: what was committed stays.")
    if address.is_local and _TOO_MANY_OPEN.search(str(error)):
        return TransientError(f"{root}: too many open files", remedy=MORE_OPEN_FILES)
    fault = fault_of(error)
    if fault is Fault.GONE:
        return StorageAccessError(f"{root} does not exist", remedy="Check the name, the endpoint and the region.")
    if fault is Fault.NO_CREDENTIALS:
        names = _VARIABLES[provider_of(address)]
        remedy = f"Set the store's variables ({names}, ...), use a machine with a role, or storage.anonymous."
        if provider_of(address) == "aws":  # obstore does not read the files of the AWS command line
            remedy += " `aws configure export-credentials --format env` prints the variables of a profile."
        return StorageAccessError(f"{root}: no credentials were found", remedy=remedy)
    if fault is Fault.DENIED and address.is_local:
        place = f": {found[1]}" if (found := _REFUSED.search(text_of(error))) else ""
        remedy = "Check its permissions and how it is mounted."
        return StorageAccessError(f"{root} refuses this user{place}", remedy=remedy)
    if fault is Fault.DENIED:
        remedy = "Check that they are valid and may list and read it."
        if (answer := _ANSWER.search(text_of(error))) and answer[2] in _CLOCK_CODES:
            remedy = "Set the clock of this machine right: the store finds it off by too much."
        return StorageAccessError(f"{root} refused the credentials", remedy=remedy)
    if fault is Fault.REGION:
        return StorageAccessError(f"{root} is in another region", remedy="Set storage.region (or AWS_REGION).")
    if fault is Fault.MISSING:
        return SourceError(f"{uri} does not exist", remedy="Check the path.")
    if fault is Fault.CHANGED:
        return SourceError(f"{uri} was changed while it was read", remedy="Run again when nothing writes to it.")
    if fault is Fault.PATH:
        names = "names with empty segments, `.`, `..` or control characters"
        remedy = f"Rename it, or list the images in a manifest: {names}."
        return SourceError(f"{root} holds a name that cannot be read: {_named_path(error)}", remedy=remedy)
    if address.is_local and isinstance(error, OSError) and error.strerror:
        remedy = "Check the disk, and how it is mounted; then run again."
        return TransientError(f"{root} cannot be read: {error.strerror}", remedy=remedy)
    what = "does not answer in time" if fault is Fault.TIMEOUT else "is out of reach or throttling"
    remedy = "Check storage.endpoint and the network; run again."
    return TransientError(f"{root} {what}, after all retries", remedy=remedy)


def _named_path(error: Exception) -> str:
    match = re.search(r'[Pp]ath "(.*?)"', str(error), re.DOTALL)
    return repr(match[1]) if match else "unknown"


def read_bytes(uri: str, config: StorageConfig) -> bytes:
    """Reads a whole object or local file, for what is small.

    Raises:
        SourceError: it does not exist.
        StorageAccessError: the store refused, or is not there.
        TransientError: the store is out of reach.
    """
    address = parse_address(uri)
    try:
        if address.is_local:
            return Path(address.path).read_bytes()
        store, path = open_store(uri, config)
        from vlmflow.retry import retried  # which knows what passes from here

        return retried(lambda: bytes(obstore.get(store, path).bytes()))
    except STORE_ERRORS as error:
        raise access_error(error, uri) from error
