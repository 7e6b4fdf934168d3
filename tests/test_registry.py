"""Names, duplicates, near misses, and entry points."""

from importlib.metadata import EntryPoint

import pytest

from optimum_structprune import StructPruneError, registry
from optimum_structprune.registry import Registry


@pytest.fixture
def animals():
    return Registry("animal", "optimum_structprune.test_animals")


def test_register_and_get(animals):
    @animals.register("cat")
    class Cat:
        pass

    assert animals.get("cat") is Cat
    assert animals.register("cat")(Cat) is Cat, "registering the same class again is harmless"
    assert animals.names() == ["cat"]


def test_a_duplicate_names_both_classes(animals):
    @animals.register("cat")
    class Cat:
        pass

    class Lion:
        pass

    with pytest.raises(StructPruneError, match=r"animal 'cat' is already registered by .*Cat; .*Lion"):
        animals.register("cat")(Lion)
    assert animals.get("cat") is Cat


def test_an_unknown_name_proposes_the_nearest(animals):
    animals.register("wanda")(type("W", (), {}))
    with pytest.raises(StructPruneError, match=r"no animal 'wnada'. Did you mean 'wanda'\? Known: wanda."):
        animals.get("wnada")
    with pytest.raises(StructPruneError, match=r"no animal 'zebra'. Known: wanda."):
        animals.get("zebra")


def test_entry_points_load_when_asked_for(animals, monkeypatch):
    point = EntryPoint("ordered", "collections:OrderedDict", animals.group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == animals.group else [])
    assert animals.names() == ["ordered"]
    from collections import OrderedDict

    assert animals.get("ordered") is OrderedDict
