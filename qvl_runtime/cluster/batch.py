"""Answer a file of requests on a Ray cluster: each row once, whatever dies on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.cluster.actor import Answer
from qvl_runtime.cluster.dispatch import LIVES, Dispatch
from qvl_runtime.cluster.parts import Parts
from qvl_runtime.cluster.pool import ActorPool, Done, Lost, Ready
from qvl_runtime.cluster.rows import Row, Survey, chunks, survey
from qvl_runtime.reading.lines import MAX_LINE
from qvl_runtime.server.openai_batch import is_openai, openai_error, openai_names


class Progress(NamedTuple):
    """Progress of a job."""

    done: int  # rows answered, those of earlier runs included
    errors: int  # of them
    tokens: int  # generated in this run
    lost: int  # actors that died in this run


class Job:
    """The requests of a file and the folder of their answers, which is locked until `close`."""

    def __init__(self, source: Path, folder: Path, settings: Mapping[str, Any], limit: int = MAX_LINE) -> None:
        """settings: what besides the requests decides the answers, in JSON. Raises `PromptError` and `OSError`."""
        self.source, self.limit = source, limit
        self.survey: Survey = survey(source, limit)
        job = {"format": 1, "rows": self.survey.rows, "sha256 of requests": self.survey.digest, **settings}
        self.parts = Parts(folder, json.loads(json.dumps(job)))
        self._tokens = self._lost = 0

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(len(self.parts.done), self.parts.errors, self._tokens, self._lost)

    @property
    def is_complete(self) -> bool:
        """Whether all rows are answered."""
        return len(self.parts.done) == self.survey.rows

    def run(
        self, open_pool: Callable[[], ActorPool], room: int, say_error: Callable[[str], str] = str
    ) -> Iterator[Progress]:
        """Answer what is not answered; yields when some rows were written.

        room: rows that an actor has at a time. say_error: puts an error into the words of the command line.
        """
        if self.is_complete:
            return
        with closing(open_pool()) as pool:
            # read while the actors load
            dispatch = Dispatch(chunks(self.source, frozenset(self.parts.done), self.limit))
            ready: set[str] = set()
            while not dispatch.is_over:
                for event in pool.events():
                    if isinstance(event, Ready):
                        ready.add(event.worker)
                    elif isinstance(event, Done):
                        dispatch.answered(event.worker, [answer.position for answer in event.answers])
                        for answer in event.answers:
                            self._write(answer, say_error)
                    else:
                        ready.discard(event.worker)
                        self._take_back(dispatch, event)
                self.parts.flush()
                yield self.progress
                for worker in sorted(ready, key=dispatch.held):
                    while rows := dispatch.take(worker, room):
                        pool.send(worker, rows)

    def close(self) -> None:
        """Let others have the folder."""
        self.parts.close()

    def _take_back(self, dispatch: Dispatch, event: Lost) -> None:
        self._lost += 1
        for row in dispatch.lost(event.worker):
            self._fail(row, f"{LIVES} actors died while they answered this request; the last: {event.why}")

    def _fail(self, row: Row, error: str) -> None:
        record = _parsed(row)
        self._write(
            Answer(
                row.position,
                row.line.number,
                record.get("custom_id", record.get("id")),
                is_openai(record),
                None,
                error,
                0,
            ),
            str,
        )

    def _write(self, answer: Answer, say_error: Callable[[str], str]) -> None:
        form, position = answer.in_openai_form, answer.position
        names = openai_names(position, answer.id) if form else {"index": position, "id": answer.id}
        record = answer.record
        if record is None:
            message = say_error(answer.error or "")
            record = json.dumps(
                openai_error(message) if form else {"line": answer.line, "error": message}, ensure_ascii=False
            )
        line = f"{json.dumps(names, ensure_ascii=False)[:-1]}, {record[1:]}"
        if self.parts.write(position, line, answer.record is None):
            self._tokens += answer.tokens


def _parsed(row: Row) -> dict[str, Any]:
    try:
        record = json.loads(row.line.data)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
