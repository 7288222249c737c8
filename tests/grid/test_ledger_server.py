"""The ledger on a PostgreSQL server that goes away, refuses, or serves several machines."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator

import pytest
from postgres import PASSWORD, Server, programs
from test_ledger import arm, filled

from basd.errors import UserError
from basd.grid.ledger import Ledger

pytestmark = pytest.mark.skipif(programs() is None, reason="PostgreSQL's server is not installed")


@pytest.fixture
def own() -> Iterator[Server]:
    """A server for one test, which may end it."""
    server = Server()
    yield server
    server.close()


@pytest.mark.full
def test_a_server_that_goes_away_and_comes_back_loses_nothing(own: Server) -> None:
    ledger, keys = filled(own.database(), [arm(0), arm(1)], timeout=5.0)
    assert ledger.claim(keys, 1) == keys[:1]
    own.stop()
    # a claim that cannot be confirmed stands: training goes on
    assert ledger.owned(keys[0])
    for action in (lambda: ledger.complete(keys[0], {"val/top1": 1.0}), ledger.arms, lambda: ledger.claim(keys, 1)):
        with pytest.raises(UserError, match="cannot be used") as caught:
            action()
        assert PASSWORD not in str(caught.value) and "\n" not in str(caught.value)
    own.start()
    assert ledger.owned(keys[0])
    assert ledger.complete(keys[0], {"val/top1": 1.0})
    assert ledger.claim(keys, 1) == keys[1:]
    states = ledger.arms()
    assert [states[key].state for key in keys] == ["complete", "running"]
    ledger.close()


def test_a_server_that_refuses_is_one_sentence_without_the_password(postgres: Server) -> None:
    url = postgres.database()
    for address, words in (
        (url.replace(PASSWORD, "wrong"), "password authentication failed"),
        (url.rpartition("/")[0] + "/nothere", "does not exist"),
        ("postgresql://basd:wrong@127.0.0.1:1/x", "onnection refused"),
    ):
        with pytest.raises(UserError) as caught:
            Ledger(address, "setting", timeout=2.0).check()
        said = str(caught.value)
        assert words in said and "ledger.url=" in said and "\n" not in said, words
        assert "wrong" not in said and PASSWORD not in said, words


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"pip install 'basd\[postgres\]'"):
        Ledger("postgresql://basd@127.0.0.1:1/x", "setting", timeout=2.0).check()


def test_a_machine_of_the_same_name_is_judged_by_its_counter_alone(postgres: Server) -> None:
    """Same host name, another boot id: the users of a server's ledger may be on two machines of one name."""
    ledger, keys = filled(postgres.database(), [arm(0)])
    ledger.owner = dataclasses.replace(ledger.owner, boot="another")
    ledger.claim(keys, 1)
    watcher = Ledger(ledger.database.url, "setting")
    assert watcher.reap_stale() == [] and watcher.arms()[keys[0]].state == "running"
    ledger.close()


def test_threads_of_one_process_take_turns(postgres: Server) -> None:
    """The server knows connections only: two threads of one ledger must not have its lock together."""
    ledger, keys = filled(postgres.database(), [arm(i) for i in range(6)])
    claimed: list[str] = []

    def work() -> None:
        while found := ledger.claim(keys, 1):
            claimed.extend(found)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == keys
    ledger.close()
