"""Caches and state: this user's alone, whatever the umask, and refused where another user could have filled them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from diffkiln.bundle.private import Home, closed_to_others
from diffkiln.bundle.state import cache_home, state_dir
from diffkiln.errors import BuildError, IntegrityError, PathEscape

OTHER = 65533
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "cache" / "diffkiln", "cache", "DIFFKILN_CACHE_DIR")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_every_directory_that_is_made_is_private_whatever_the_umask(home: Home, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = home.directory("engines")
    finally:
        os.umask(before)
    assert made == home.path / "engines"
    for directory in (made, home.path, home.path.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert home.existing("engines") == made
    assert home.directory("engines") == made


@as_root
@pytest.mark.parametrize("upper", [False, True])
def test_directory_of_another_user_is_refused_with_the_mend(home: Home, upper: bool) -> None:
    made = home.directory("engines")
    os.chown(made.parent if upper else made, OTHER, OTHER)
    for call in (home.directory, home.existing):
        with pytest.raises(IntegrityError, match=r"belongs to another user. Set DIFFKILN_CACHE_DIR to a directory"):
            call("engines")


def test_directory_that_others_could_only_read_is_closed_to_them(tmp_path: Path) -> None:
    """As an earlier version left it, under a umask of 022."""
    home = Home(tmp_path / "home", "cache", "DIFFKILN_CACHE_DIR")
    home.directory("engines").chmod(0o755)
    assert stat.S_IMODE(home.directory("engines").stat().st_mode) == 0o700


@pytest.mark.parametrize(("mode", "upper"), [(0o777, True), (0o770, True), (0o777, False)])
def test_directory_that_is_open_to_others_is_refused_with_the_mend(home: Home, mode: int, upper: bool) -> None:
    made = home.directory("engines")
    (made.parent if upper else made).chmod(mode)
    for call in (home.directory, home.existing):
        with pytest.raises(IntegrityError, match=r"is open to other users.*Remove it, or.*chmod 700"):
            call("engines")


def test_others_may_look_into_the_upper_directory(home: Home) -> None:
    home.directory("engines")
    home.path.chmod(0o755)
    assert home.existing("engines")


def test_link_in_the_place_of_a_directory_is_refused(home: Home, tmp_path: Path) -> None:
    home.path.mkdir(parents=True, mode=0o700)
    (home.path / "engines").symlink_to(tmp_path)
    with pytest.raises(PathEscape, match="not a real directory"):
        home.directory("engines")


def test_what_is_not_there_is_nothing_and_not_made(home: Home) -> None:
    assert home.existing("engines") is None
    assert not home.path.exists()


def test_directory_that_cannot_be_made_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="Set DIFFKILN_CACHE_DIR elsewhere"):
        cache_home(tmp_path / "file" / "cache").directory("engines")


def test_state_directory_is_checked_by_the_same_function(state_home: Path) -> None:
    state_dir("receipts").chmod(0o777)
    with pytest.raises(IntegrityError, match="open to other users"):
        state_dir("receipts")


_CASES: list[tuple[Callable[[Path], object], bool]] = [
    (lambda path: path.chmod(0o700), True),
    (lambda path: path.chmod(0o755), True),
    (lambda path: path.chmod(0o1777), True),
    (lambda path: path.chmod(0o777), False),
    (lambda path: path.chmod(0o770), False),
]


@pytest.mark.parametrize(("change", "closed"), _CASES)
def test_directory_in_which_others_can_rename_is_not_closed(
    tmp_path: Path, change: Callable[[Path], object], closed: bool
) -> None:
    change(tmp_path)
    assert closed_to_others(tmp_path) is closed
    tmp_path.chmod(0o700)


@as_root
def test_directory_of_another_user_is_not_closed(tmp_path: Path) -> None:
    os.chown(tmp_path, OTHER, OTHER)
    assert not closed_to_others(tmp_path)
