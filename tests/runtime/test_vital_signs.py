from __future__ import annotations

from moecompiler.runtime.places import places_of
from moecompiler.runtime.vital_signs import LostRank, VitalSigns, work_done


def test_silence() -> None:
    signs = VitalSigns((1, 2), 5.0, now=100.0)
    signs.hear(1, 0.1, 103.0)
    assert signs.lost(104.9) is None
    assert signs.lost(105.1) == LostRank(2, "has given no sign of life for 5.1 s")
    assert signs.lost(105.1, seconds=6.0) is None
    signs.hear(2, 0.1, 105.2)
    signs.hear(2, 0.3, 108.0)
    assert signs.lost(108.1) == LostRank(1, "has given no sign of life for 5.1 s")


def test_a_rank_that_speaks_and_does_nothing_is_stuck() -> None:
    signs = VitalSigns((1, 2), 5.0, now=0.0)
    for second in range(12):
        signs.hear(1, 0.02 * second, second)  # 2% of the time
        signs.hear(2, min(second, 4) * 1.0, second)  # works for 4 s, then no more
        assert (signs.lost(second) is not None) == (second > 9)
    assert signs.lost(11.0) == LostRank(2, "hangs: it has done nothing for 7.0 s")


def test_after_a_pause_of_the_judge_all_begin_anew() -> None:
    signs = VitalSigns((1,), 5.0, now=0.0)
    signs.hear(1, 1.0, 1.0)
    signs.forgive(50.0)
    assert signs.lost(54.0) is None
    signs.hear(1, 1.0, 54.0)
    assert signs.lost(58.0) is None
    assert signs.lost(59.5) == LostRank(1, "has given no sign of life for 5.5 s")


def test_work_is_time_of_the_cpu() -> None:
    before = work_done()
    sum(range(2_000_000))
    assert work_done() - before > 0.005


def test_places() -> None:
    places = places_of(["a", "b", "a", "b", "b"])
    assert [place.local_rank for place in places] == [0, 0, 1, 1, 2]
    assert str(places[3]) == "rank 3 on b"
