"""Claims steer two people to different images, and expire."""

from __future__ import annotations

from vlmflow.web.claims import Claims


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_image_is_claimed_once_and_free_again_when_the_claim_expires() -> None:
    clock = Clock()
    claims = Claims(clock, expires_s=100)
    assert claims.take("ada", "image-1") is None
    assert claims.take("ada", "image-1") is None
    assert claims.take("bob", "image-1") == "ada"
    assert claims.of_others("bob") == {"image-1"}
    assert claims.of_others("ada") == set()
    clock.now = 99
    assert claims.take("bob", "image-1") == "ada"
    clock.now = 101
    assert claims.take("bob", "image-1") is None
    assert claims.of_others("ada") == {"image-1"}


def test_who_goes_on_gives_up_the_image_before() -> None:
    claims = Claims(Clock())
    claims.take("ada", "image-1")
    claims.take("ada", "image-2")
    assert claims.of_others("bob") == {"image-2"}
    claims.drop("ada")
    assert claims.of_others("bob") == set()
