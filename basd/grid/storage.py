"""The database behind the ledger: Optuna's RDBStorage with transactions that exclude each other, and readable errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.errors import UserError, without_passwords
from basd.tracking.files import FileLock

if TYPE_CHECKING:
    import sqlalchemy
    from optuna.storages import RDBStorage


# Of the advisory lock that stands for a ledger's lock file; locks are per database of a server.
ADVISORY_KEY = 0x42415344
# Seconds that a server has to answer.
CONNECT_TIMEOUT = 10


class _AdvisoryLock:
    """PostgreSQL's lock on a number, held by a connection of its own; the server frees it when its holder dies."""

    def __init__(self, url: sqlalchemy.URL) -> None:
        self.url = url
        self._engine: sqlalchemy.Engine | None = None
        self._connection: sqlalchemy.Connection | None = None

    def acquire(self, timeout: float) -> bool:
        """False where another connection kept it for `timeout` seconds."""
        import sqlalchemy

        if self._engine is None:
            self._engine = sqlalchemy.create_engine(
                self.url,
                isolation_level="AUTOCOMMIT",
                connect_args={"connect_timeout": CONNECT_TIMEOUT},
                pool_size=1,
                pool_pre_ping=True,
            )
        connection = self._engine.connect()
        try:
            # 0 would be no limit
            connection.exec_driver_sql(f"SET lock_timeout = {max(1, round(1000 * timeout))}")
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({ADVISORY_KEY})")
        except sqlalchemy.exc.OperationalError as error:
            connection.close()
            if "lock timeout" in str(error):
                return False
            raise
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        self._connection = connection
        return True

    def release(self) -> None:
        import sqlalchemy

        connection, self._connection = self._connection, None
        assert connection is not None
        try:
            connection.exec_driver_sql(f"SELECT pg_advisory_unlock({ADVISORY_KEY})")
        except sqlalchemy.exc.SQLAlchemyError:
            # a connection that ended has given up its locks
            connection.invalidate()
        finally:
            connection.close()


class Database:
    """An Optuna storage at a URL: a file of SQLite, or a PostgreSQL database where there are several machines.

    On SQLite every transaction is opened by BEGIN IMMEDIATE, without which two processes can read one state and both write it.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        import sqlalchemy

        self.url = url
        self.timeout = timeout
        try:
            self.parsed = sqlalchemy.engine.make_url(url)
        except (sqlalchemy.exc.ArgumentError, ValueError) as error:
            raise UserError(
                f"ledger.url={url} is no database address; use sqlite:///FILE or postgresql://HOST/NAME"
            ) from error
        self.shown = without_passwords(self.parsed.render_as_string(hide_password=True))
        self.path: Path | None = None
        backend = self.parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise UserError(
                f"ledger.url={self.shown}: {backend} cannot hold a ledger; use sqlite:///FILE or postgresql://HOST/NAME"
            )
        if self.parsed.drivername == "postgresql":
            # the driver that the extra installs; SQLAlchemy would look for its predecessor
            self.parsed = self.parsed.set(drivername="postgresql+psycopg")
        if backend == "sqlite":
            if not self.parsed.database or self.parsed.database == ":memory:":
                raise UserError("The ledger must be a file that all processes see; use ledger.url=sqlite:///ledger.db")
            self.path = Path(self.parsed.database).absolute()
        self._storage: RDBStorage | None = None
        self._mutex = threading.RLock()  # neither lock below is re-entrant, and each is one for the process
        self._lock = (
            FileLock(self.path.with_name(self.path.name + ".lock")) if self.path else _AdvisoryLock(self.parsed)
        )
        self._depth = 0

    @property
    def one_machine(self) -> bool:
        """True for a file, which the processes of one machine share."""
        return self.path is not None

    @property
    def exists(self) -> bool:
        """False when the ledger is a file that was not created yet."""
        return self.path is None or self.path.exists()

    @property
    def storage(self) -> RDBStorage:
        """The storage, opened (and its tables created, by one process at a time) on first use."""
        if self._storage is None:
            # Optuna imports it within: seconds of a busy machine, for which others need not wait
            import alembic.command  # noqa: F401

            with self.errors(), self.exclusive():
                self._storage = self._open()
        return self._storage

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Only one process at a time is in such a block, on all machines that share the ledger."""
        if self.path is not None and not self.path.parent.is_dir():
            raise UserError(
                f"The ledger {self.shown} cannot be written: {self.path.parent} is no directory; set ledger.url=…"
            )
        if not self._mutex.acquire(timeout=self.timeout):
            raise UserError(self._locked())
        try:
            if self._depth == 0 and not self._lock.acquire(self.timeout):
                raise UserError(self._locked())
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._lock.release()
        finally:
            self._mutex.release()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what a database can throw into one sentence."""
        import optuna
        import sqlalchemy

        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError, ImportError) as error:
            cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
            raise UserError(self._sentence(getattr(cause, "orig", None) or cause or error)) from error
        except RuntimeError as error:
            if "table schema" not in str(error):
                raise
            raise UserError(f"The ledger {self.shown} was written by another Optuna version: {error}") from error

    def _open(self) -> RDBStorage:
        import optuna
        import sqlalchemy

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        arguments: dict[str, Any] = (
            {"connect_args": {"timeout": self.timeout}}
            if self.path
            else {"connect_args": {"connect_timeout": CONNECT_TIMEOUT}, "pool_pre_ping": True}
        )
        url = self.parsed.render_as_string(hide_password=False)
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments)
                break
            except sqlalchemy.exc.OperationalError as error:
                # SQLite does not wait when a reader turns writer, so creating tables may meet a lock at once
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        if self.path:
            storage.engine.dispose()  # connections made before the two hooks below

            @sqlalchemy.event.listens_for(storage.engine, "connect")
            def _(connection: Any, record: Any) -> None:
                connection.isolation_level = None  # the sqlite3 module must not open transactions of its own

            @sqlalchemy.event.listens_for(storage.engine, "begin")
            def _(connection: Any) -> None:
                connection.exec_driver_sql("BEGIN IMMEDIATE")

        return storage

    def _locked(self) -> str:
        return (
            f"The ledger {self.shown} stayed locked by another process for {self.timeout:g} s; "
            "end that process, then run the same command again"
        )

    def _sentence(self, error: BaseException) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        if "locked" in text or "busy" in text:
            return self._locked()
        if "not a database" in text or "malformed" in text:
            return f"The ledger {self.shown} is not an SQLite database or is damaged; move it away or choose another with ledger.url=…"
        if "full" in text or "No space" in text:
            return f"The disk is full, the ledger {self.shown} cannot be written; make room, then run the same command again"
        if isinstance(error, ImportError):
            return f"The driver for the ledger {self.shown} is not installed; run `pip install 'basd[postgres]'`"
        return f"The ledger {self.shown} cannot be used ({text}); check it or choose another with ledger.url=…"
