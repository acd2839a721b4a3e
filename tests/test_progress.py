"""Progress where nobody watches: a line every half minute, and nothing for what takes less."""

from __future__ import annotations

import pytest

from dynamax_lm_eval import progress


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_short_work_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.over([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_line_every_half_minute_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(8, "work", unit="rows") as bar:
        for number in range(8):
            clock.seconds += 20
            bar.show(f"so far {number}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 2 of 8 rows, 00:40 gone, 02:00 left, so far 1"
    assert [line.split()[1] for line in lines] == ["2", "4", "6", "8", "8"]
    assert "00:00 left" in lines[-1]


def test_what_was_done_before_is_no_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(4_000_000, "work", unit="tok", unit_scale=True, initial=3_000_000) as bar:
        clock.seconds += 50
        bar.update(500_000)
    assert capsys.readouterr().err.splitlines()[0] == "work: 3.50M of 4.00M tok, 00:50 gone, 00:50 left"


def test_hidden(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(2, "work", disable=True) as bar:
        clock.seconds += 100
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_a_bar_where_somebody_watches(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.Bar(2, "work") as bar:
        clock.seconds += 100
        bar.update(2)
    shown = capsys.readouterr().err
    assert "work: 100%" in shown
    assert "gone" not in shown
