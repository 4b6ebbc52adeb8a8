"""Where a runtime listens: texts, sockets, and what is in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.errors import StartupError
from mm.runtime.address import Address


def test_address_texts() -> None:
    assert Address.parse("8085") == Address(port=8085)
    assert Address.parse("0.0.0.0:1") == Address(host="0.0.0.0", port=1)
    assert Address.parse("unix:///run/x") == Address(path="/run/x")
    assert Address.parse("unix:rel") == Address(path="rel")


def test_an_address_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    for address in (Address(), Address(path=path)):
        with address.bind() as listener:
            taken = Address(path=path) if address.path else Address(port=listener.getsockname()[1])
            with pytest.raises(StartupError, match=f"cannot listen on {taken}: in use"):
                taken.bind()
    # The file of the socket is still there, as after a crash; nobody answers.
    Address(path=path).bind().close()


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.joblib"
    path.write_text("kept")
    with pytest.raises(StartupError, match="there is a file that is no socket"):
        Address(path=str(path)).bind()
    assert path.read_text() == "kept"


@pytest.mark.parametrize("text", ["", "x", "1:2:x", "65536", "-1", "unix:", "unix://", "localhost"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(StartupError, match="address"):
        Address.parse(text)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 203\.0\.113\.1:1"):
        Address(host="203.0.113.1", port=1).bind()
    with pytest.raises(StartupError, match="cannot listen on unix:///nowhere/at/all"):
        Address(path="/nowhere/at/all").bind()
