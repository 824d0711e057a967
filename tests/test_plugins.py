"""Plug-ins are found by name: built-ins by their files, others by entry points; two of one name are an error."""

from importlib.metadata import EntryPoint

import pytest

from diffkiln import plugins
from diffkiln.errors import MissingDependency, SpecError


@pytest.fixture
def installed(monkeypatch):
    """Pretends that other distributions bring the entry points in this list."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: [e for e in entries if e.group == group])
    plugins.plugins.cache_clear()
    yield entries
    plugins.plugins.cache_clear()


def test_finds_a_plug_in_of_another_distribution(installed):
    installed.append(EntryPoint("own", "json:dumps", "diffkiln.engines"))
    assert plugins.load("engines", "own")([1]) == "[1]"


def test_refuses_two_plug_ins_of_one_name(installed):
    installed += [
        EntryPoint("own", "json:dumps", "diffkiln.engines"),
        EntryPoint("own", "json:loads", "diffkiln.engines"),
    ]
    with pytest.raises(SpecError, match=r"two engines are called 'own'.*Uninstall one"):
        plugins.plugins("engines")


def test_names_the_package_that_a_plug_in_lacks(installed):
    installed.append(EntryPoint("own", "a_package_that_is_not_there:thing", "diffkiln.passes"))
    with pytest.raises(MissingDependency, match="own needs the package a_package_that_is_not_there"):
        plugins.load("passes", "own")


def test_a_name_that_nobody_brings_is_a_key_error(installed):
    with pytest.raises(KeyError):
        plugins.load("families", "none")
