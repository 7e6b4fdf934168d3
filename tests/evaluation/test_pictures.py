"""Pictures of quality against size: which points are joined, and that they are files."""

from itertools import permutations

import pytest

from optimum_structprune.evaluation.pictures import Point, draw_quality, front


POINTS = [Point("a", 1, 9), Point("b", 2, 5), Point("c", 2, 6), Point("d", 3, 7), Point("e", 4, 1)]


@pytest.mark.parametrize("higher", [False, True])
def test_the_front_holds_what_no_other_point_beats(higher):
    def beats(one, other):
        better = one.quality >= other.quality if higher else one.quality <= other.quality
        return one.size <= other.size and better and one != other

    expected = {point for point in POINTS if not any(beats(other, point) for other in POINTS)}
    for order in [*permutations(POINTS)][::17]:
        found = front(order, higher)
        assert set(found) == expected and [p.size for p in found] == sorted(p.size for p in found)


def test_the_same_points_give_the_same_file(tmp_path):
    for name in ("1.svg", "2.svg"):
        draw_quality(tmp_path / name, POINTS)
    text = (tmp_path / "1.svg").read_text()
    assert text == (tmp_path / "2.svg").read_text() and all(f">{point.name}<" in text for point in POINTS)
