"""Uris made comparable, and the identity of an image that follows from them.

A normalised uri holds no secret: neither userinfo nor the signature of a presigned url, both of which also change
while the image stays the same.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b, pbkdf2_hmac
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from vlmflow.errors import ConfigError
from vlmflow.storage import NORMAL_PATH, Address, parse_address

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Uris that are their own normal form, as most are: told at a glance, for a manifest may hold millions.
_NORMAL = re.compile(
    r"(?:s3|gs|az|azure|adl|abfs|abfss)://[^/@]+/.*"
    r"|https?://[a-z0-9.-]+/[A-Za-z0-9/:@!$&'()*+,;=~._-]*"
    rf"|{NORMAL_PATH}",
    re.DOTALL,
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
# RFC 3986: letters of a path, and of a query, that need no percent sign. An existing escape is decoded first.
_PATH_SAFE = "/:@!$&'()*+,;=~"

# Signature parameters, each set recognised by a parameter that only a signature has.
_SIGNED_PREFIXES = ("x-amz-", "x-goog-", "x-tos-")  # AWS version 4, GCS version 4, Volcengine TOS
_SIGNED_SETS: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    # AWS version 2, GCS version 2, Alibaba OSS version 1, Huawei OBS, CloudFront
    (
        frozenset({"awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "accesskeyid", "key-pair-id"}),
        frozenset(
            {"awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "accesskeyid", "key-pair-id", "signature"}
            | {"expires", "policy", "security-token", "x-obs-security-token", "hash-algorithm"}
        ),
    ),
    # Alibaba OSS version 4; of x-oss-, parameters such as x-oss-process belong to the image
    (
        frozenset({"x-oss-signature"}),
        frozenset(
            {"x-oss-signature", "x-oss-signature-version", "x-oss-credential", "x-oss-date", "x-oss-expires"}
            | {"x-oss-security-token", "x-oss-additional-headers"}
        ),
    ),
    # Tencent COS
    (
        frozenset({"q-signature"}),
        frozenset(
            {"q-signature", "q-sign-algorithm", "q-ak", "q-sign-time", "q-key-time", "q-header-list"}
            | {"q-url-param-list", "x-cos-security-token"}
        ),
    ),
    # Azure shared access signatures
    (
        frozenset({"sig"}),
        frozenset(
            {"sig", "sv", "ss", "srt", "sp", "st", "se", "spr", "sip", "sr", "sdd", "si", "ses", "scid"}
            | {"skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid"}
        ),
    ),
)
# Earlier versions knew these alone: the signatures of other services were a part of the address, by which an image may
# have been erased.
_SIGNED_PREFIXES_BEFORE = ("x-amz-", "x-goog-")
_SIGNED_SETS_BEFORE = (
    (
        frozenset({"awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "key-pair-id"}),
        frozenset(
            {"awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "key-pair-id", "signature", "expires", "policy"}
            | {"security-token", "hash-algorithm"}
        ),
    ),
    _SIGNED_SETS[-1],
)
# What a url has whose address was another then; for RE2.
SIGNED_SINCE = r"(?i)^https?://[^?#]*\?.*(x-tos-[a-z0-9-]+|x-oss-signature|q-signature|accesskeyid|keyname)="
# Google Cloud CDN: only the two together are its own.
_CDN_MARKS, _CDN_SET = {"keyname", "signature"}, {"keyname", "signature", "expires", "urlprefix"}

# About half a millisecond: a manifest may hold a million urls with one misspelled port.
_DIGEST_ROUNDS = 1_000


def is_http(uri: str) -> bool:
    """Whether a uri is an http(s) url."""
    return uri[:8].lower().startswith(("http://", "https://"))


def spelled(name: str) -> str:
    """A name as rows have it: bytes that are no UTF-8, which no table holds and a command line may, as ``\\xe9``."""
    try:
        data = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair, which is no byte of a name, as JSON can hold it
        data = name.encode("utf-8", "surrogatepass")
    return data.decode("utf-8", "backslashreplace")


def normalise_uri(uri: str) -> str:
    """The one spelling of a uri under which its image is known; normalising it again changes nothing.

    Local paths become absolute, ``file://`` is dropped, object-store uris stay as they are. Http urls lose userinfo,
    fragment, default port and signature parameters, and their percent-escapes are made uniform. What names no place
    stays as it is, but for what may be a password: reading it records what is wrong.
    """
    if _NORMAL.fullmatch(uri):
        return uri
    match = _SCHEME.match(uri)
    if match is None or match[1].lower() == "file":
        try:
            return parse_address(uri).path
        except ConfigError:
            return uri
    if is_http(uri):
        return _normalise_http(uri)
    scheme, rest = match[1].lower(), uri[match.end() :]
    authority, slash, path = rest.partition("/")
    if not scheme.startswith("abfs"):  # where the container stands before the @
        authority = authority.rpartition("@")[2]
    return f"{'s3' if scheme == 's3a' else scheme}://{authority}{slash}{path}"


def _normalise_http(uri: str) -> str:
    try:
        return _normal_url(*_take_apart(uri.strip()))
    except ValueError:
        return _misspelled(uri.strip())


def _normal_url(parts: SplitResult, host: str, port: int | None, *, as_before: bool = False) -> str:
    scheme = parts.scheme.lower()
    authority = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        authority = f"{authority}:{port}"
    path = _requote(parts.path, _PATH_SAFE) or "/"
    return urlunsplit((scheme, authority, path, _unsigned(parts.query, as_before=as_before), ""))


def spellings(uri: str) -> tuple[str, ...]:
    """The normal spelling of a uri and, of a signed url that earlier versions knew by another, that one too."""
    normal = normalise_uri(uri)
    if not is_http(uri.strip()):
        return (normal,)
    try:
        former = _normal_url(*_take_apart(uri.strip()), as_before=True)
    except ValueError:
        return (normal,)
    return (normal,) if former == normal else (normal, former)


def _take_apart(url: str) -> tuple[SplitResult, str, int | None]:
    """Gives the parts of a url, its host and its port.

    Raises:
        ValueError: an unclosed bracket, a port that is no number, no host: the read records what is wrong.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("no host")
    return parts, parts.hostname.lower(), parts.port


def _misspelled(url: str) -> str:
    """The spelling of a url that cannot be taken apart. It cannot be either: it is never that of another image's url.

    All before the last @ may be a password, which may hold any of the letters that divide a url, or an address as
    ``http://host:port/a@2x.jpg`` is. Where one cannot tell, a digest stands for it behind a bracket that never closes.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    before, _, kept = rest.rpartition("@")
    place, _, query = kept.partition("#")[0].partition("?")
    query = _unsigned(query)
    spelled = f"{scheme}://{place}{'?' if query else ''}{query}".rstrip()
    if re.search(r"[/?#]", before) or _is_url(spelled):
        shown = re.split("[?#&]", kept, maxsplit=1)[0].rstrip()
        return f"{scheme}://[hidden-{_slow_digest(rest)}/{shown}"
    return spelled


def _is_url(text: str) -> bool:
    try:
        _take_apart(text)
    except ValueError:
        return False
    return True


def _slow_digest(rest: str) -> str:
    """What stands for a text that may hold a password: too slow to be guessed at, of nothing that is plainly secret."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    place, _, query = rest[authority.rfind("@") + 1 :].partition("?")
    text = f"{place}?{_unsigned(query)}".encode("utf-8", "surrogatepass")
    return pbkdf2_hmac("sha256", text, b"vlmflow", _DIGEST_ROUNDS, dklen=8).hex()


def _requote(text: str, safe: str) -> str:
    """Spells percent-escapes uniformly; %2F stays apart from a slash, and so do other escaped delimiters."""
    pieces = re.split(r"(%[0-9A-Fa-f]{2})", text)
    spelled = []
    for piece in pieces:
        if re.fullmatch(r"%[0-9A-Fa-f]{2}", piece):
            letter = unquote(piece, errors="replace")
            spelled.append(letter if re.fullmatch(r"[A-Za-z0-9._~-]", letter) else piece.upper())
        else:
            spelled.append(quote(piece, safe=safe))
    return "".join(spelled)


def _unsigned(query: str, *, as_before: bool = False) -> str:
    parameters = [(item, unquote(item.partition("=")[0]).lower()) for item in query.split("&") if item]
    names = {name for _, name in parameters}
    dropped: set[str] = set()
    for marks, members in _SIGNED_SETS_BEFORE if as_before else _SIGNED_SETS:
        if marks & names:
            dropped |= members
    if names >= _CDN_MARKS and not as_before:
        dropped |= _CDN_SET
    prefixes = _SIGNED_PREFIXES_BEFORE if as_before else _SIGNED_PREFIXES
    kept = [item for item, name in parameters if name not in dropped and not name.startswith(prefixes)]
    return "&".join(_requote(item, _PATH_SAFE + "?") for item in kept)


def image_ids(uris: Iterable[str], keys: Iterable[str | None] | None = None) -> list[str]:
    """The identities of images: 128 bits of BLAKE2b over the normalised uri and the caller's key, hexadecimal."""
    return ids_of_normalised((normalise_uri(uri) for uri in uris), keys)


def ids_of_normalised(uris: Iterable[str], keys: Iterable[str | None] | None) -> list[str]:
    """As :func:`image_ids`, of uris that are normalised already."""
    if keys is None:
        return [_digest(uri) for uri in uris]
    return [_digest(uri if key is None else f"{uri}\0{key}") for uri, key in zip(uris, keys, strict=True)]


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def resolve(uris: Sequence[str], folder: Address) -> list[str]:
    """Makes relative uris of a manifest absolute, against the folder that holds it; blanks before a scheme go."""
    return [given if _SCHEME.match(given := uri.lstrip()) else _join(folder, uri) for uri in uris]


def _join(folder: Address, name: str) -> str:
    if folder.is_local or name.startswith("/"):  # a reader refuses local paths that a remote manifest names
        return posixpath.normpath(posixpath.join(folder.path, name))
    path = posixpath.normpath(posixpath.join("/", folder.path, name))
    return f"{folder.root}{path}"
