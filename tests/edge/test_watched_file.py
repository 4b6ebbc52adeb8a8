"""A settings file: every way to change it is noticed, and a bad one does no harm."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from mm.config import Config
from mm.core.constraints import TypeConstraints, parse_type_constraints
from mm.core.dataplane import DataplaneConfig
from mm.core.json_input import JSON_BYTES_MAX
from mm.edge import watched_file
from mm.edge.settings_files import SettingsFiles
from mm.edge.watched_file import BadFileError, WatchedFile

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "SECOND_LOOK_S"):
        monkeypatch.setattr(watched_file, name, 0.01)
    # Where a start is to succeed, it may take as long as a busy machine needs.
    monkeypatch.setattr(watched_file, "START_WAIT_S", 60.0)
    # Whatever the machine does between two lines of a test, a file just written is fresh.
    monkeypatch.setattr(watched_file, "FRESH_S", 300.0)


def text(label: str) -> str:
    return json.dumps({"t": {"required": [label]}})


def watched(path: Path) -> WatchedFile[TypeConstraints]:
    return WatchedFile("type constraints", str(path), parse_type_constraints)


def label(constraints: TypeConstraints | None) -> str | None:
    return None if constraints is None else constraints.required("t")[0]


def age(path: Path) -> None:
    """Make a file look as if it had not been touched for a while."""
    old_s = path.stat().st_mtime - 10 * watched_file.FRESH_S
    os.utime(path, (old_s, old_s))


class Warnings:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def take(self) -> list[str]:
        found = [r.getMessage() for r in self._caplog.records if r.levelno >= logging.WARNING]
        self._caplog.clear()
        return found


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Warnings:
    return Warnings(caplog)


async def test_a_change_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    file = watched(path)
    assert label(await file.first()) == "a"
    assert await file.changed() is None
    path.write_text(text("bb"))
    assert label(await file.changed()) == "bb"
    assert await file.changed() is None


async def test_a_change_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    file = watched(path)
    await file.first()
    status = path.stat()
    path.write_text(text("b"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert label(await file.changed()) == "b", "even within one tick of the file system's clock"


async def test_a_file_that_is_old_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    age(path)
    file = watched(path)
    await file.first()
    status = path.stat()
    path.write_text(text("b"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert await file.changed() is None
    path.touch()
    assert label(await file.changed()) == "b"


async def test_a_rename_over_it_is_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "constraints", tmp_path / "new"
    path.write_text(text("a"))
    age(path)
    file = watched(path)
    await file.first()
    other.write_text(text("b"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)
    assert label(await file.changed()) == "b"


async def test_the_swap_of_a_mounted_configmap_is_noticed(tmp_path: Path) -> None:
    """Kubernetes: the file is a link into ..data, itself a link to a directory, and that turns."""
    for version, each in (("..1", "a"), ("..2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "type_constraints").write_text(text(each))
        age(tmp_path / version / "type_constraints")
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "type_constraints"
    path.symlink_to("..data/type_constraints")
    file = watched(path)
    assert label(await file.first()) == "a"
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert label(await file.changed()) == "b"


async def test_a_bad_file_is_named_once_and_changes_nothing(
    tmp_path: Path, warnings: Warnings
) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    file = watched(path)
    await file.first()
    path.write_text('{"t": []}')
    for _ in range(3):
        assert await file.changed() is None
    (warning,) = warnings.take()
    assert str(path) in warning
    assert "Expected" in warning
    path.write_text('{"t": ')
    assert await file.changed() is None
    (warning,) = warnings.take()
    assert "truncated" in warning
    path.write_text(text("a"))
    assert await file.changed() is None, "it is what it was"
    path.write_text(text("b"))
    assert label(await file.changed()) == "b"
    assert warnings.take() == []


async def test_a_file_that_is_gone_is_named_once_and_found_again(
    tmp_path: Path, warnings: Warnings
) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    file = watched(path)
    await file.first()
    path.unlink()
    for _ in range(3):
        assert await file.changed() is None
    (warning,) = warnings.take()
    assert "no such file" in warning
    path.write_text(text("b"))
    assert label(await file.changed()) == "b"


async def test_what_is_no_file_or_too_long_is_bad(tmp_path: Path, warnings: Warnings) -> None:
    path = tmp_path / "constraints"
    path.write_text(" " * (JSON_BYTES_MAX + 10))
    file = watched(path)
    assert await file.changed() is None
    path.unlink()
    path.mkdir()
    assert await file.changed() is None
    path.rmdir()
    os.mkfifo(path)  # to open it is to wait for a writer
    assert await file.changed() is None
    path.unlink()
    path.write_text(text("a"))
    assert label(await file.changed()) == "a"
    long, directory, pipe = warnings.take()
    assert "longer than" in long
    assert "is a directory" in directory
    assert "not a file" in pipe


async def test_a_file_that_is_just_being_written_is_looked_at_twice(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    file = watched(path)
    await file.first()
    path.write_text("")
    write_after_look(monkeypatch, path, text("b"))
    assert label(await file.changed()) == "b"
    assert warnings.take() == []


def write_after_look(monkeypatch: pytest.MonkeyPatch, path: Path, content: str) -> None:
    """Have the file written as soon as it was looked at."""
    look = watched_file._look

    def look_and_write(*args: Any) -> Any:
        found = look(*args)
        path.write_text(content)
        return found

    monkeypatch.setattr(watched_file, "_look", look_and_write)


async def test_a_start_without_a_good_file_names_it(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_file, "START_WAIT_S", 1.0)
    path = tmp_path / "constraints"
    for content, problem in ((None, "no such file or directory"), ('{\n"t": 1}', '"t": Expected')):
        if content is not None:
            path.write_text(content)
        file = watched(path)
        with pytest.raises(BadFileError) as caught:
            await file.first()
        assert str(caught.value).startswith(f"type constraints file {path}: {problem}")
        (warning,) = warnings.take()
        assert "still holds" not in warning
        path.write_text(text("a"))
        assert label(await file.changed()) == "a", "it is watched on"


async def test_a_start_waits_for_a_file_that_is_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "constraints"
    path.write_text("")
    write_after_look(monkeypatch, path, text("a"))
    assert label(await watched(path).first()) == "a"


async def test_whoever_listens_hears_of_every_change(tmp_path: Path) -> None:
    path = tmp_path / "constraints"
    path.write_text(text("a"))
    file = watched(path)
    await file.first()
    tell, heard = anyio.create_memory_object_stream[TypeConstraints](9)
    with tell, heard:
        async with file.followed(tell.send_nowait):
            with anyio.fail_after(60):
                for each in ("b", "c"):
                    path.write_text(text(each))
                    assert label(await heard.receive()) == each


ODD = '{"rpcConfigs": {"a.B/C": {"vModelId": true}}}'
ODD_REMARK = 'data-plane configuration: "a.B/C": vModelId means nothing without an idExtractionPath'


async def test_what_a_data_plane_configuration_hardly_means_is_in_the_log(
    tmp_path: Path, warnings: Warnings
) -> None:
    """At the start, from the variable or the file, and at each change."""
    config = Config.from_environment({"KV_STORE": "memory", "MM_DATAPLANE_CONFIG": ODD})
    await SettingsFiles(config).read_into(config)
    assert warnings.take() == [ODD_REMARK]

    path = tmp_path / "dataplane"
    path.write_text(ODD)
    config = replace(config, dataplane_config=DataplaneConfig(), dataplane_config_path=str(path))
    files = SettingsFiles(config)
    assert (await files.read_into(config)).dataplane_config.rpc("/a.B/C")
    assert warnings.take() == [ODD_REMARK]
    told = anyio.Event()
    async with files.followed(
        access=lambda _: None,
        constraints=lambda _: None,
        dataplane=lambda _: told.set(),
        static_models=lambda _: None,
    ):
        path.write_text(ODD.replace("}}}", '}}, "allowOtherRpcs": true}'))
        with anyio.fail_after(10):
            await told.wait()
    assert warnings.take() == [ODD_REMARK]
