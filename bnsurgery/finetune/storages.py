"""Where the trials of a comparison may be kept: SQLite, database servers and journals; and the errors of these."""

import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnsurgery.errors import BNSurgeryError, printable, shown

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

RETRY = 0.5  # seconds between two attempts
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # names for pip


def place(storage: str | Path) -> tuple[Path | None, str]:
    """The file of a storage, None for a server, and its name for messages, without a password."""
    if isinstance(storage, Path) or storage.endswith(".journal"):
        return Path(storage), f"'{storage}'"
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(storage)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise BNSurgeryError(
            f"compare: `storage`: got {shown(storage)}, expected a database's URL, such as postgresql://host/name, or "
            "FILE.journal"
        ) from None
    name = f"storage '{printable(url.render_as_string())}'"
    if url.get_backend_name() != "sqlite":
        return None, name
    if url.database in (None, "", ":memory:"):
        raise BNSurgeryError(f"compare: {name} is in the memory of one process: name a file, sqlite:///FILE.db")
    return Path(str(url.database)), name


def opened(storage: str | Path, file: Path | None) -> "BaseStorage":
    """Optuna's storage, made if there is none; `file` is that of `place`."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.pool import NullPool

    if file is not None and file.suffix == ".journal":
        return JournalStorage(JournalFileBackend(str(file)))
    options: dict[str, Any] = {"poolclass": NullPool}  # no connection that a forked reader of images could inherit
    url = str(storage).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    if file is not None:  # not by its URL, in which ? and % have a meaning
        options["creator"] = lambda: sqlite3.connect(file, timeout=60.0)
        url = "sqlite://"
    for _ in range(10):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except DBAPIError as error:
            if not any(word in str(error).lower() for word in ("exist", "unique", "duplicate")):
                raise
            time.sleep(RETRY)  # another worker creates the same tables
    return RDBStorage(url, engine_kwargs=options)


def lost_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors of a storage that cannot be reached, and others."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return StorageInternalError, SQLAlchemyError, OSError, *others


def reason(error: BaseException) -> str:
    """The database's own message, in one line."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."), 300)
