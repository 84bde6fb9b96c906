"""Worker processes that parse, and what they have parsed already."""

import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import IO, Any

from apportion.parsing.parsers import Parse, Parser, ParserUnavailable
from apportion.parsing.worker import Trees, parsed

_TEXTS_AT_ONCE = 32  # as long as a worker can parse so many within its patience and its memory
_Job = dict[str, "Future[Trees | None]"]


class ParserPool:
    """Parse texts in other processes while this one goes on, each text once.

    Workers are started when they are first needed, end with `close`, and never outlive this process. A worker that dies
    is started again; a text under which it dies once more, or that takes longer than `patience`, counts as one that
    cannot be parsed.

    Attributes:
        parser: Any parser that can be pickled.
        workers: Processes; 0 parses in this one, when the trees are collected.
        cache_size: Texts whose trees are remembered.
        patience: Seconds that a text may take; those that are parsed at once share them at first, and where they do not
            suffice, each is given them alone.
    """

    def __init__(
        self, parser: Parser | Parse, *, workers: int, cache_size: int = 20_000, patience: float = 60.0
    ) -> None:
        self.parser, self.workers, self.cache_size, self.patience = parser, workers, cache_size, patience
        self._cache: OrderedDict[str, Future[Trees | None]] = OrderedDict()
        self._crew: _Crew | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the settings alone."""
        return _fresh, (self.parser, self.workers, self.cache_size, self.patience)

    def open(self) -> None:
        """Load the parser, in every worker.

        Raises:
            ParserUnavailable: If it cannot be loaded.
        """
        if not self.workers:
            if isinstance(self.parser, Parser):
                self.parser.load()
        elif self._crew is None:
            self._crew = _Crew(_pickled(self.parser), self.workers, self.patience)
            self._end = weakref.finalize(self, self._crew.send_home)

    def submit(self, texts: Iterable[str]) -> None:
        """Begin to parse texts; those that have been parsed, or are being parsed, are not parsed again.

        Args:
            texts: Some texts, in any order, twice or more often too.
        """
        self.open()
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        job: _Job = {text: Future() for text in new}
        self._cache |= job
        if self._crew is None:
            return
        size = min(self._crew.texts_at_once, -(-len(new) // max(self.workers, 1)))
        for first in range(0, len(new), max(size, 1)):
            self._crew.jobs.put({text: job[text] for text in new[first : first + size]})

    def collect(self, texts: Iterable[str]) -> dict[str, Trees | None]:
        """Wait for the trees of texts.

        Args:
            texts: Some texts, submitted before or not.

        Returns:
            The trees of each; None where it cannot be parsed.
        """
        wanted = list(dict.fromkeys(texts))
        self.submit(wanted)
        if self._crew is None:
            _settle({text: future for text in wanted if not (future := self._cache[text]).done()}, self.parser)
        found = {text: self._cache[text].result() for text in wanted}
        for text in wanted:
            self._cache.move_to_end(text)
        if self._crew is not None:
            for text in self._crew.untried & found.keys():
                del self._cache[text]
                self._crew.untried.discard(text)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return found

    def close(self) -> None:
        """End the workers; what they have parsed is kept, and they are started again if they are needed."""
        if self._crew is None:
            return
        self._end()
        self._crew.wait()
        self._crew = None
        finished = {text: future for text, future in self._cache.items() if future.done() and not future.cancelled()}
        self._cache = OrderedDict(finished)


class _Crew:
    """Workers, and for each of them a thread that hands it jobs.

    Attributes:
        texts_at_once: Texts in a job at most; less than at first where workers failed with so many, not with one.
        untried: Texts that no worker could be started for; they are not remembered, for what is short may come back.
    """

    def __init__(self, parser: bytes, count: int, patience: float) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.texts_at_once = _TEXTS_AT_ONCE
        self.untried: set[str] = set()
        self.ended = threading.Event()
        self.workers = [_Worker(parser, patience) for _ in range(count)]
        try:
            for worker in self.workers:
                worker.wait_until_loaded()
        except ParserUnavailable:
            for worker in self.workers:
                worker.close()
            raise
        self.threads = [threading.Thread(target=self._work, args=(place,), daemon=True) for place in range(count)]
        for thread in self.threads:
            thread.start()

    def send_home(self) -> None:
        """End the workers at once; texts that wait are not parsed."""
        self.ended.set()
        while not self.jobs.empty():
            _cancel(self.jobs.get() or {})
        for worker in self.workers:
            self.jobs.put(None)
            worker.process.kill()

    def wait(self) -> None:
        """Wait until everything has ended."""
        for thread in self.threads:
            thread.join()

    def _work(self, place: int) -> None:
        """Hand jobs to a worker until there are no more."""
        while (job := self.jobs.get()) is not None:
            try:
                self._do(place, job)
            except Exception as error:  # whoever waits for the trees is told
                for future in job.values():
                    if not future.done():
                        future.set_exception(error)
        self.workers[place].close()

    def _do(self, place: int, job: _Job) -> None:
        """Do a job; texts under which the worker died are tried again, one by one."""
        found = self.workers[place].parse(list(job))
        if found is not None:
            for future, trees in zip(job.values(), found, strict=True):
                future.set_result(trees)
            return
        all_found = True
        for text, future in job.items():
            if self.ended.is_set():
                future.cancel()
                continue
            try:
                alone = self._living(place).parse([text])
            except (ParserUnavailable, OSError) as error:  # it was loaded at first
                self.untried.add(text)
                told = f"no parser for {text[:60]!r}, which falls back to one action a token: {error}"
                warnings.warn(told, stacklevel=2)
                alone = [None]
            if alone is None and not self.ended.is_set():
                warnings.warn(
                    f"a parser process died or hung under {text[:60]!r}, which falls back to one action a token; if "
                    "this goes on, lower the termination's `workers`, or free memory",
                    stacklevel=2,
                )
            future.set_result(None if alone is None else alone[0])
            all_found = all_found and alone is not None
        if all_found and not self.ended.is_set():
            self.texts_at_once = max(1, min(self.texts_at_once, len(job) // 2))

    def _living(self, place: int) -> "_Worker":
        """Return the worker of a place, or another if it is dead."""
        worker = self.workers[place]
        if worker.process.poll() is not None:
            worker.close()
            self.workers[place] = worker = _Worker(worker.parser, worker.patience)
            worker.wait_until_loaded()
        return worker


class _Worker:
    """A process that parses."""

    def __init__(self, parser: bytes, patience: float) -> None:
        self.parser, self.patience = parser, patience
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apportion.parsing.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads | {"PYTHONPATH": path},
        )
        assert self.process.stdin is not None  # pipes were asked for; for the type checker
        assert self.process.stdout is not None
        self.requests: IO[bytes] = self.process.stdin
        self.answers: IO[bytes] = self.process.stdout
        self._say(parser)

    def wait_until_loaded(self) -> None:
        """Wait for the parser; refuse to go on without it."""
        try:
            reason = pickle.load(self.answers)
        except (EOFError, OSError, pickle.UnpicklingError):
            reason = f"its process ended with code {self.process.wait()} while it was loaded; free memory, or see above"
        if reason is not None:
            raise ParserUnavailable(f"the parser cannot be loaded: {reason}")

    def parse(self, texts: Sequence[str]) -> list[Trees | None] | None:
        """Parse texts; None if the process died or took too long."""
        watchdog = threading.Timer(self.patience, self.process.kill)
        watchdog.start()
        try:
            self._say(pickle.dumps(list(texts)))
            return pickle.load(self.answers)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.kill()
            self.process.wait()
            return None
        finally:
            watchdog.cancel()

    def close(self) -> None:
        """End the process, by force: it holds nothing that could be lost."""
        self.process.kill()
        self.process.wait()
        for stream in (self.requests, self.answers):
            try:
                stream.close()
            except BrokenPipeError:  # what was still to be written has no reader
                continue

    def _say(self, content: bytes) -> None:
        """Send one message; whether anybody reads it shows in the answer."""
        try:
            self.requests.write(content)
            self.requests.flush()
        except BrokenPipeError:
            return


def _cancel(job: _Job) -> None:
    """Give up what waits."""
    for future in job.values():
        future.cancel()


def _settle(job: _Job, parser: Parser | Parse) -> None:
    """Parse in this process."""
    for (_, future), trees in zip(job.items(), parsed(parser, list(job)) if job else [], strict=True):
        future.set_result(trees)


def _fresh(parser: Parser | Parse, workers: int, cache_size: int, patience: float) -> ParserPool:
    """Make a pool of the same settings."""
    return ParserPool(parser, workers=workers, cache_size=cache_size, patience=patience)


def _pickled(parser: Parser | Parse) -> bytes:
    """Pickle a parser for other processes, which import it by name."""
    kind = parser if hasattr(parser, "__qualname__") else type(parser)
    name = f"{kind.__module__}.{getattr(kind, '__qualname__', '')}"
    if kind.__module__ == "__main__":
        raise ParserUnavailable(
            f"the parser {name} cannot be sent to a worker process; put it into a module of its own, or choose "
            "workers=0"
        )
    try:
        return pickle.dumps(parser)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ParserUnavailable(
            f"the parser {name} cannot be sent to a worker process ({error}); define it at the top of a module, or "
            "choose workers=0"
        ) from error
