"""What a run shows while it goes on."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter

import pytest
from rich.console import Console

from vlmflow.engine.progress import JsonProgress, LiveProgress, LogProgress, Tally, describe, duration


def test_a_line_names_counts_rate_time_to_go_and_errors() -> None:
    tally = Tally(total=1000, done=250, committed=200, errors=Counter({"truncated": 2}), elapsed_s=10)
    assert describe(tally) == "250/1,000 images, 25.0 images/s, 30 s to go, 200 saved, errors: truncated 2"


def test_before_the_first_image_there_is_no_time_to_go() -> None:
    assert "to go" not in describe(Tally(total=10))


def test_finished_there_is_none_either() -> None:
    assert "to go" not in describe(Tally(total=10, done=10, elapsed_s=1))


def ran(tally: Tally, *parts: tuple[int, float]) -> Tally:
    """The run some seconds further in each part, with so many images each second; it is looked at as they come."""
    for seconds, rate in parts:
        done, elapsed_s = tally.done, tally.elapsed_s
        for second in range(1, seconds + 1):
            tally.done = done + int(second * rate)
            tally.at(elapsed_s + second)
    return tally


def test_the_rate_is_that_of_the_last_minutes() -> None:
    grown = ran(Tally(total=2_000_000, done=512, num_first=512), (3600, 100), (300, 1000))
    assert grown.images_per_s == pytest.approx(1000)
    assert grown.eta_s == pytest.approx((2_000_000 - grown.done) / 1000)
    assert ran(grown, (1800, 0)).images_per_s < 1, "nothing has come for half an hour"


def test_images_that_take_minutes_have_a_rate_too() -> None:
    slow = ran(Tally(total=100), (4000, 1 / 600))
    assert slow.images_per_s == pytest.approx(1 / 600, rel=0.5)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_json_lines_are_thinned_out() -> None:
    stream = io.StringIO()
    display = JsonProgress(stream, interval_s=3600)
    display.stage("enriching")
    display.update(Tally(total=2, done=1, elapsed_s=2))
    display.update(Tally(total=2, done=2, elapsed_s=4))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["stage", "progress"]
    assert events[1]["eta_s"] == 2.0


def test_log_lines_are_thinned_out(caplog: pytest.LogCaptureFixture) -> None:
    display = LogProgress(interval_s=3600)
    with caplog.at_level(logging.INFO, logger="vlmflow"):
        display.update(Tally(total=2, done=1, elapsed_s=1))
        display.update(Tally(total=2, done=2, elapsed_s=1))
    assert len(caplog.records) == 1


def test_the_last_line_is_written_once_however_soon_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    """Else the log of a run that was over ends with images that look as if they had not been saved."""
    stream = io.StringIO()
    displays = [JsonProgress(stream, interval_s=3600), LogProgress(interval_s=3600)]
    with caplog.at_level(logging.INFO, logger="vlmflow"):
        for committed in (0, 1, 2, 2):
            for display in displays:
                display.update(Tally(total=2, done=2, committed=committed, elapsed_s=4))
    assert [json.loads(line)["committed"] for line in stream.getvalue().splitlines()] == [0, 2]
    assert [record.getMessage().rpartition(", ")[2] for record in caplog.records] == ["0 saved", "2 saved"]


def test_where_not_all_is_ever_committed_the_last_line_comes_when_the_stage_or_the_run_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of some images another run keeps the rows, or they are erased meanwhile."""
    stream = io.StringIO()
    displays = [JsonProgress(stream, interval_s=3600), LogProgress(interval_s=3600)]
    with caplog.at_level(logging.INFO, logger="vlmflow"):
        for display in displays:
            tally = Tally(total=3, done=1)
            display.update(tally)
            tally.done, tally.committed = 3, 1
            display.update(tally)
            display.stage("running 1 images alone")
            tally.committed = 2
            display.update(tally)
            display.close()
            display.close()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event.get("committed", event["event"]) for event in events] == [0, 1, "stage", 2]
    told = [record.getMessage().rpartition(", ")[2] for record in caplog.records]
    assert told == ["0 saved", "1 saved", "running 1 images alone", "2 saved"]


@pytest.mark.parametrize("width", [50, 80])
def test_a_terminal_has_room_for_the_counts_of_a_large_run(width: int) -> None:
    screen = io.StringIO()
    display = LiveProgress(Console(file=screen, force_terminal=True, width=width))
    display.stage("enriching")
    tally = Tally(total=2_000_000, done=1_234_567, committed=1_233_000, elapsed_s=1480)
    tally.errors.update(missing=4_321, truncated=45)
    display.update(tally)
    display.close()
    shown = " ".join(screen.getvalue().split())
    assert "1,234,567/2,000,000 images, 834.2 images/s, 15 min 18 s to go" in shown
    assert "1,233,000 saved, errors: missing 4,321, truncated 45" in shown


def test_a_terminal_sees_no_rate_before_there_is_one() -> None:
    screen = io.StringIO()
    display = LiveProgress(Console(file=screen, force_terminal=True, width=80))
    display.update(Tally(total=213, done=32, num_first=32))
    display.close()
    assert "32/213 images, 0 saved" in screen.getvalue()


def test_a_terminal_without_unicode_gets_letters_that_it_has() -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display = LiveProgress(Console(file=screen, force_terminal=True, width=80))
    display.stage("enriching")
    display.update(Tally(total=100, done=40))
    display.close()  # a letter that the terminal lacks would raise
    screen.seek(0)
    assert "40/100 images" in screen.read()
