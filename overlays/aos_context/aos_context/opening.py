"""Opens the folder of runs that settings name, with the memory that all of them share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from aos_context.errors import NotFoundError
from aos_context.files import make_folder
from aos_context.layout import DATABASE
from aos_context.memory_sqlite import SQLiteMemoryStore
from aos_context.runs import Runs
from aos_context.tokens import estimate, tiktoken_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aos_context.settings import Settings


@contextlib.contextmanager
def opened(settings: Settings, *, makes: bool = True) -> Iterator[Runs]:
    """The runs, as long as the block lasts.

    A folder that is not there is made; without `makes` it is a `NotFoundError`. Raises `ContextError`, `OSError`.
    """
    count = estimate if settings.encoding is None else tiktoken_count(settings.encoding)
    if makes:
        make_folder(settings.root)
    elif not settings.root.is_dir():
        hint = "--root names it, or AOS_CONTEXT_ROOT; demo, serve and load make it."
        raise NotFoundError(f"there is no folder {settings.root}", hint=hint)
    with contextlib.closing(SQLiteMemoryStore(settings.root / DATABASE, settings.config)) as memory:
        runs = Runs(settings.root, memory=memory, config=settings.config, count=count, testing=settings.testing)
        runs.sweep()
        yield runs
