"""Takes out of what a store said whatever may be a secret, so that no traceback that repeats it holds one.

S3 repeats the token of a session in its answer to a signature that is wrong, and some name what was sent to them in the
query of its url.
"""

from __future__ import annotations

import re

_HIDDEN = "<hidden>"
# What an answer in XML may say of itself; other elements hold keys, tokens and what was signed with them.
_PLAIN = {"Code", "Message", "RequestId", "HostId", "Resource", "Key", "BucketName", "Region", "Endpoint", "Condition"}
_ELEMENT = re.compile(r"<([A-Za-z][\w.-]*)>([^<>]+)</\1>")
# Up to the next address at most: a text that is full of them takes no longer for it.
_QUERY = re.compile(r"(://(?:(?!://)[^\s?\"'<>])*\?)[^\s\"'<>)]+")
_USER = re.compile(r"(://)[^\s/?#\"'<>@]+@")


def without_secrets(text: str) -> str:
    """A store's words without queries and users of urls, and without the elements of an answer that may hold more."""
    text = _USER.sub(rf"\1{_HIDDEN}@", _QUERY.sub(rf"\1{_HIDDEN}", text))
    return _ELEMENT.sub(lambda found: found[0] if found[1] in _PLAIN else f"<{found[1]}>{_HIDDEN}</{found[1]}>", text)


def hide_secrets(error: BaseException) -> None:
    """Does so in an error, and in those that caused it: a traceback prints them all."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        found.args = tuple(without_secrets(part) if isinstance(part, str) else part for part in found.args)
        left += [found.__cause__, found.__context__]
