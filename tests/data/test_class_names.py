"""The classes of data are a network's own by their names, by numbers, or in their order."""

import pytest

from fast.data.labels import class_places, places_by_order

OWN = ["tench, Tinca tinca", "crane", "Great_White shark", "crane", "dog"]


@pytest.mark.parametrize(
    ("classes", "own", "places"),
    [
        (["dog", "crane"], ["crane", "dog"], [1, 0]),
        (["tench", "great white shark", "DOG"], OWN, [0, 2, 4]),
        (["Ga\u0308nse"], ["G\u00e4nse"], [0]),  # written in two ways
        (["crane"], OWN, [3]),  # an exact name; the last of two
        (["Crane", "cat"], OWN, [None, None]),
        (["Dog", "dog"], OWN, [None, 4]),
        (["2", "10"], OWN, [2, 10]),
        (["7", "9"], ["3", "7", "9"], [1, 2]),
        (["0", "1"], (), [0, 1]),
        (["cat"], (), [None]),
    ],
)
def test_places(classes, own, places):
    assert class_places(classes, own) == places


def test_an_order_is_told_and_what_contradicts_it_refused():
    note = places_by_order("old/", ["a", "b"], None)
    assert note.startswith("old/: the classes a, b are taken in this order for the network's outp")
    assert "which it calls cat, dog" in places_by_order("old/", ["a", "dog"], ["cat", "dog"])
    with pytest.raises(ValueError, match="old/: cat is class 1 of the network, and dogs none of"):
        places_by_order("old/", ["cat", "dogs"], ["dog", "cat"])
