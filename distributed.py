"""Run a function over many tasks: one by one, on all cores, or on a cluster.

This file is meant to be copied: it needs Python 3.11 or newer, joblib 1.5 or newer and
nothing else. `__version__` is the version of this copy, and `__source__` says where
newer ones are.

A backend is picked by name. Whichever it is, results come from a generator:

>>> backend = get_backend("single_process")
>>> for result in backend.setup(abs, [-1, -2, -3]):
...     print(result)
1
2
3

"single_process" (`SingleProcess`) runs the tasks one after another in this process.
Take it to debug, since breakpoints, `print` and profilers work as ever, and for work
too small to share out.

"joblib" (`Joblib`) runs them on all cores; through joblib also in threads, or on a Dask
or Ray cluster. Take it for everything else. Results come as they complete:

>>> backend = get_backend("joblib")
>>> sorted(backend.setup(abs, [-1, -2, -3]))
[1, 2, 3]

Both are lazy, take endless tasks and can be left at any time. The
class `Joblib` says what else may be relied upon, and what not.

Put the file inside a package: a top-level module called ``distributed`` hides the
package of that name in which Dask's scheduler lives.
"""

# Any exception of a batch is reported to the consumer, so broad excepts are needed:
# ruff: noqa: BLE001

from __future__ import annotations

import _thread
import asyncio
import atexit
import builtins
import contextlib
import difflib
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import itertools
import marshal
import math
import mmap
import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import multiprocessing.util
import numbers
import operator
import os
import pickle
import queue
import re
import reprlib
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
import uuid
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, overload

if TYPE_CHECKING:
    from typing import TypedDict, Unpack

    # joblib has no type hints; joblib-stubs lacks what backends are written against.
    # So it is Any to a checker: hence `cast`, `bytes()` and the like.
    joblib: Any
else:
    import joblib
    import joblib.parallel

__all__ = [
    "DistributedBackend",
    "FailedTask",
    "Joblib",
    "SingleProcess",
    "get_backend",
]
# Raise it with each change: workers of a cluster, which live on, keep the code by it.
__version__ = "4.1.0"
__source__ = ""  # where newer ones are to be found; for its owner to fill in

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)


class DistributedBackend(ABC):
    """Abstract base class of the backends: the interface that each of them implements.

    Each has a strategy of its own, from one process that runs tasks sequentially to
    many that run them in parallel. Both methods are static, so that they can be called
    on the class and on an instance. A backend of your own implements the two:

    >>> class Backwards(DistributedBackend):
    ...     @staticmethod
    ...     def setup(task_func, tasks, num_workers=None, **kwargs):
    ...         yield from map(task_func, reversed(list(tasks)))
    ...
    ...     @staticmethod
    ...     def shutdown(*args, **kwargs):
    ...         pass
    >>> list(Backwards.setup(abs, [-1, -2, -3]))
    [3, 2, 1]

    The interface itself has no instances:

    >>> DistributedBackend()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: Can't instantiate abstract class DistributedBackend with...
    """

    @staticmethod
    @abstractmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterator[T],
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Generator[R, None, None]:
        """Run *task_func* on every one of *tasks*, in the way of the backend.

        Parameters
        ----------
        task_func : Callable[[T], R]
            The function to run; it is called with one task.
        tasks : Iterator[T]
            Yields the tasks.
        num_workers : int, optional
            Number of worker processes or threads. Default: the most that are available.
        **kwargs
            Options of the backend.

        Returns
        -------
        Generator[R, None, None]
            Yields the results as they complete.
        """

    @staticmethod
    @abstractmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Release what the backend keeps between runs."""


class FailedTask:
    """What a run with ``errors="return"`` yields in place of the result of a task.

    >>> for result in Joblib.setup(int, ["1", "two"], 2, errors="return"):
    ...     if isinstance(result, FailedTask):
    ...         print("failed:", result.number, result.task, repr(result.error)[:11])
    failed: 1 two ValueError(

    It cannot be changed or unpacked, and is equal to itself only. Its `repr` is one
    line; ``traceback.print_exception(failed.error)`` shows all of the error.
    """

    # Not a dataclass: among rows that are dataclasses, pandas would take it for one
    # more.
    __match_args__ = ("number", "task", "error")

    number: int
    """The number of the task in its run, counted from 0."""

    task: Any
    """The object that was drawn."""

    error: Exception
    """What ``errors="raise"`` would raise; several tasks may have the same object."""

    def __init__(self, number: int, task: Any, error: Exception) -> None:
        vars(self).update(number=number, task=task, error=error)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a FailedTask cannot be changed, got {name}={value!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a FailedTask cannot be changed, got del of {name!r}")

    def __repr__(self) -> str:
        fields = f"task={_short_repr(self.task)}, error={_short_repr(self.error)}"
        return f"FailedTask(number={self.number}, {' '.join(fields.split())})"


class SingleProcess(DistributedBackend):
    """Runs tasks one after another in this process.

    The simplest backend: for debugging, and for work that does not call for parallel
    execution.
    """

    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        return_tasks: Literal[False] = False,
        **kwargs: Any,
    ) -> Generator[R, None, None]: ...
    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        return_tasks: Literal[True],
        **kwargs: Any,
    ) -> Generator[tuple[T, R], None, None]: ...

    # The return type leaves out what options add; the overloads have it.
    @staticmethod
    def setup(  # pyright: ignore[reportInconsistentOverload]
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Generator[R, None, None]:
        """Run *task_func* on every one of *tasks*, one after another.

        A task is drawn when its result is asked for:

        >>> def tasks():
        ...     for task in (-1, -2):
        ...         print("drawing", task)
        ...         yield task
        >>> results = SingleProcess.setup(abs, tasks())
        >>> next(results)
        drawing -1
        1
        >>> next(results)
        drawing -2
        2

        What *task_func* or *tasks* raises is raised from the generator:

        >>> results = SingleProcess.setup(int, ["1", "two"])
        >>> next(results)
        1
        >>> next(results)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'two'...

        Parameters
        ----------
        task_func : Callable[[T], R]
            The function to run; it is called with one task.
        tasks : Iterable[T]
            The tasks; an iterator, as the interface has it, or any other iterable.
        num_workers : None, optional
            Ignored.
        **kwargs
            Ignored but for *return_tasks*, so that the options of `Joblib` can stay in
            place while debugging: ``errors="return"``, too, since one debugs to see
            errors.

            return_tasks : bool, default False
                Yield pairs ``(task, result)``.

        Returns
        -------
        Generator[R, None, None]
            Yields the results in the order of the tasks; pairs with *return_tasks*.

        Raises
        ------
        TypeError
            At once, if *task_func* cannot be called with one argument, or *tasks* is
            not iterable.
        ValueError
            At once, if *return_tasks* is not a bool.
        Exception
            From the generator: what *task_func* raised, with a note that tells the
            number of the task and shows it.
        RuntimeError
            From the generator, if *task_func* raises `StopIteration`, which becomes its
            cause: out of a generator it would look like the end of the results.
        """
        returns_tasks = kwargs.get("return_tasks", False)
        _check_option("return_tasks", returns_tasks)
        return _one_by_one(*_checked(task_func, tasks), returns_tasks=returns_tasks)

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Do nothing, since nothing is kept between runs; may be called at any time.

        >>> SingleProcess.shutdown()
        """


if TYPE_CHECKING:

    class _Options(TypedDict, total=False):
        """Options of `Joblib.setup` for type checkers, but *errors* and *return_tasks*.

        Of options that only one engine has, they know those of joblib and Ray.
        """

        backend: str | Any  # an instance: joblib has no types
        return_as: Literal["generator_unordered", "generator"]
        timeout: float | None
        maxtasksperchild: int | None
        batch_size: int | Literal["auto"]
        pre_dispatch: int | str
        initializer: Callable[..., object] | None
        initargs: tuple[Any, ...]
        idle_worker_timeout: float | None
        verbose: float
        max_nbytes: float | str | None
        mmap_mode: Literal["r", "r+", "w+", "c"] | None
        temp_folder: str | os.PathLike[str] | None
        prefer: Literal["processes", "threads"] | None
        require: Literal["sharedmem"] | None
        ray_remote_args: dict[str, Any] | None


class Joblib(DistributedBackend):
    """Runs tasks in several worker processes, as joblib's `Parallel` and `delayed` do.

    For CPU-intensive work, which gains from true parallelism. The worker processes are
    those of this file. joblib says what the user has configured, and supplies other
    backends: what follows holds on each of them, but for what is listed under "Not
    promised".

    *Lazy.* Nothing is drawn or started before the first result is asked for.

    *Bounded.* Of single tasks (``batch_size=1``), no more than *pre_dispatch* have been
    drawn beyond the results handed out, however slow the consumer and however many
    tasks there are; so tasks can depend on earlier results. Of larger ones,
    *pre_dispatch* batches are out, and one more for each worker may have been drawn.

    >>> def tasks():
    ...     for task in itertools.count():
    ...         print("drawing", task)
    ...         yield task
    >>> results = Joblib.setup(abs, tasks(), num_workers=2)
    >>> first = next(results)
    drawing 0
    drawing 1
    drawing 2
    drawing 3

    *Ends cleanly.* Closing the generator ends the run, as do ``break`` in a loop that
    holds its only reference, ``del``, an error and leaving the interpreter. No further
    task begins. Worker processes that are busy are killed, with all programs that their
    tasks have started (a worker leads a session, on Windows a job, which is killed with
    it); nothing is printed or warned of, and no file is left. On Linux and Windows
    nothing is left, either, if the program itself is killed, or crashes; but then
    loky's resource tracker may warn of a folder of arrays that it removes.

    >>> results.close()
    >>> list(results)
    []

    *The caller's thread.* *tasks* is advanced only inside ``next()``, in the thread
    that calls it. Tasks may come from a database cursor, or depend on context
    variables.

    *Composable.* Runs can be chained, interleaved, overlapped and started inside a task
    (where joblib's default is threads). So can they be in a module that a worker
    imports, and in an *initializer*; but there it is an error to ask for worker
    processes.

    >>> absolute = Joblib.setup(abs, [-1, -2, -3], num_workers=2)
    >>> sorted(Joblib.setup(str, absolute, num_workers=2))
    ['1', '2', '3']

    *Independent.* Each run of processes has workers of its own, as many as it asks for,
    with its own *initializer*. A run that fails, loses a worker, times out or is closed
    does not disturb another, nor a plain `joblib.Parallel`.

    *Kept warm.* Workers that are idle when a run ends well are kept for the next that
    wants the same: the same number, *initializer*, environment variables, current
    directory and `sys.path`. They are not used again once the program has reloaded a
    module. At most three sets of workers are kept, none in a fork. They keep nothing of
    the function after a moment; what tasks leave elsewhere in a worker (a thread, a
    program, a changed directory) is there for the next run, too. `shutdown` stops idle
    workers; those that have not left after 3 seconds are killed.

    *Nothing is lost.* Whatever results were received before an error are handed out
    first. An error of a task, or of pickling it or its result, costs no earlier result
    of its batch (later tasks of it are not run); an error of *tasks* is raised when the
    results of all that it did yield are out.

    >>> def failing():
    ...     yield -1
    ...     yield -2
    ...     raise LookupError("no more tasks")
    >>> results = Joblib.setup(abs, failing(), num_workers=2, return_as="generator")
    >>> next(results), next(results)
    (1, 2)
    >>> next(results)
    Traceback (most recent call last):
    LookupError: no more tasks

    *No hang.* A worker process that dies is an error, also in the middle of a result.
    So is, with *timeout*, a task that takes too long.

    *A sweep goes on.* With ``errors="return"``, a task that raises, cannot be pickled,
    kills its worker or takes too long gives a `FailedTask` in place of its result. So
    do tasks of its batch that were done in the 3 ms before it began, since their
    results had not been sent when the worker was lost. What is left of the batch goes
    to a fresh worker. No task is run twice.

    *Forks and children.* Runs can be started in a fork, and in a child process of
    `multiprocessing`, however it is started; the child ends when it is done. To read on
    a run of the parent in a fork is a `RuntimeError`, unless it has no workers.

    *Self-contained.* Workers are programs of their own, which are sent the code of this
    file. They import neither it nor the program's main module: a program needs no ``if
    __name__ == "__main__":``.

    Not promised:

    - Threads cannot be stopped: what they are busy with goes on in the background. The
      same is true of Dask's workers, which are threads, and of the batches that these
      have begun.
    - With ``return_as="generator"``, results behind the one where an error ends the run
      are lost with it.
    - The death of a worker costs one task on "loky" and "multiprocessing" only. On
      Dask, what is lost with a worker is run again, and a run waits while there are no
      workers. On Ray, an actor that dies ends the run, and a run has to end before
      ``ray.shutdown()``.
    - What a task changes in an object that it shares with other tasks of its batch, as
      in ``[(model, p) for p in grid]``, these may see.
    - A program that makes a session of its own (a daemon), or that is started with
      ``CREATE_BREAKAWAY_FROM_JOB`` on Windows, is not stopped. On Linux, what has a
      process group of its own survives if it is the program that is killed.
    - On Windows, files of arrays stay while workers map them, which takes idle ones
      some seconds to end.
    - On macOS and other systems: workers of a program that is killed finish what they
      are doing; what has a process group of its own is not stopped with its worker; and
      a file that has replaced that of a `numpy.memmap` is taken for it if the program
      has both open.
    - A task that is changed while others of its batch are drawn arrives changed: in
      tasks, yield new objects, or take ``batch_size=1``. So does a task in threads that
      is changed before it is run. An array of more than *max_nbytes* is in its file as
      it first was. A result that *task_func* changes in its next call arrives changed,
      as does a `numpy.memmap` whose file it makes anew.
    - Tasks are pickled apart from the function, batch by batch. So ``task is MISSING``
      is false there for an object of the program; what the function assigns to global
      variables is not seen by methods of tasks; and what is left on a class of tasks is
      lost with the next batch. Put such things into a module.
    - ``close()`` waits until the workers have stopped, for 10 seconds at most. It does
      not wait in another thread than that of the last ``next()``, or in *tasks* of
      another run.
    - A `KeyboardInterrupt` or `SystemExit` that *tasks* raises is raised at once.
    """

    # The interface takes any option.
    @overload  # type: ignore[override]
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        errors: Literal["raise"] = "raise",
        return_tasks: Literal[False] = False,
        **kwargs: Unpack[_Options],
    ) -> Generator[R, None, None]: ...
    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        errors: Literal["return"],
        return_tasks: Literal[False] = False,
        **kwargs: Unpack[_Options],
    ) -> Generator[R | FailedTask, None, None]: ...
    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        errors: Literal["raise"] = "raise",
        return_tasks: Literal[True],
        **kwargs: Unpack[_Options],
    ) -> Generator[tuple[T, R], None, None]: ...
    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        errors: Literal["return"],
        return_tasks: Literal[True],
        **kwargs: Unpack[_Options],
    ) -> Generator[tuple[T, R | FailedTask], None, None]: ...

    # The return type leaves out what options add; the overloads have it.
    @staticmethod
    def setup(  # pyright: ignore[reportInconsistentOverload]
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Generator[R, None, None]:
        """Run *task_func* on every one of *tasks*, in parallel.

        Results come as they complete, or in the order of the tasks:

        >>> sorted(Joblib.setup(abs, [-3, -1, -2], num_workers=2))
        [1, 2, 3]
        >>> list(Joblib.setup(abs, [-3, -1, -2], num_workers=2, return_as="generator"))
        [3, 1, 2]
        >>> for task, result in Joblib.setup(abs, [-3], return_tasks=True):
        ...     print(task, result)
        -3 3

        An error of a task is raised where its result would have been:

        >>> results = Joblib.setup(int, ["1", "two"], 2, return_as="generator")
        >>> next(results)
        1
        >>> next(results)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'two'...

        Parameters
        ----------
        task_func : Callable[[T], R]
            The function to run; it is called with one task. It may be a method of
            something large. Between processes, it, the tasks and the results are
            pickled by cloudpickle, which takes lambdas and functions of the program,
            too. The function is pickled as it is when the run starts, and once; each
            worker (on Dask, each thread of a worker) keeps one copy for the run. So
            what a call leaves on it (a compiled solver, a cache) is there for the
            worker's next call. The same is true of a generator of random numbers: each
            worker starts with the same copy of it, so put seeds into the tasks. In
            threads, it is the object itself.
        tasks : Iterable[T]
            The tasks; an iterator, as the interface has it, or any other iterable.
        num_workers : int, optional
            Number of worker processes, or of threads. Default: -1, which means all
            available cores, unless an open `joblib.parallel_config` sets ``n_jobs``; -2
            means all but one, and so on. With 1, tasks run in this process, one after
            another, unless *timeout*, *maxtasksperchild* or ``errors="return"`` asks
            for a process of "loky" or "multiprocessing". (There are none inside of a
            daemon process or of a task that runs in a thread.) Dask ignores it and uses
            the whole cluster.
        **kwargs
            Options. Those of `joblib.Parallel`, but for ``n_jobs``:

            backend : str or joblib.parallel.ParallelBackendBase, default "loky"
                "loky" (processes), "multiprocessing" (the same), "threading", "dask"
                (the cluster of the current `dask.distributed.Client`), "ray", another
                registered name, or an instance. An open `joblib.parallel_config`,
                *prefer* or *require* may change the default. What a third party has
                derived from one of joblib's classes is used as it is.
            return_as : {"generator_unordered", "generator"}
                Results as they complete, which is the default, or in the order of the
                tasks. In order, a task that takes long leaves workers idle once
                *pre_dispatch* batches are out.
            return_tasks : bool, default False
                Yield pairs ``(task, result)``, in which *task* is the object that was
                drawn: nothing is sent for it. With ``errors="return"``, the result may
                be a `FailedTask`.
            errors : {"raise", "return"}
                "return": where a task has no result, yield a `FailedTask` in its place
                and go on. The other tasks of its batch are run all the same. A worker
                that dies, or a time-out, costs the task that was running, and those of
                its batch done in the 3 ms before it. None is run twice, but on Dask. A
                worker that is lost before it begins a task costs nothing, since another
                one takes its place; but the run ends if none has ever been ready, or if
                three for each worker are lost in a row. Exceptions of *tasks*, of an
                *initializer* and of pickling *task_func*, and `bdb.BdbQuit` of a
                debugger that is left, still end the run.
            timeout : float, optional
                Seconds that one task may take in its worker process; it is killed then,
                and the run ends with an error, or goes on with ``errors="return"``.
                What the task builds on the first call counts. No other task, start,
                initializer or wait does, nor does the time for which this process is
                suspended; to send results has a limit of its own, of the same length.
                It is ignored where tasks run in this process, one after another. It is
                noticed a tenth of *timeout* later at most, and never more than 0.5
                seconds. A worker that is not ready after *timeout*, or 60 seconds if
                that is more, or that stalls for so long in the midst of a message, is
                lost. Other backends cannot watch single tasks: there, the run ends when
                the consumer has waited for so long and no batch has completed; the
                start of workers counts, unless the backend itself waits for it.
                Default: wait for ever.
            maxtasksperchild : int, optional
                Tasks that a worker process of "loky" or "multiprocessing" may do before
                it leaves and a fresh one takes its place: for tasks that leak memory.
                No batch is larger. Default: any number.
            batch_size : int or "auto", default "auto"
                Tasks sent to a worker at once; fewer towards the end of the tasks, so
                that all workers have some. "auto" starts with 1. If a batch takes less
                than 0.2 seconds or more than 2, from being sent until its results have
                been read, the next ones are as large as would take 0.4; but at most
                twice as large, or 16 or 64 times if it took less than 10 ms or 1 ms,
                and no larger than 8192 tasks or 8 MB of arrays. In threads, that is 4
                ms in place of 0.4 seconds. A backend that has a rule of its own keeps
                it.
            pre_dispatch : int or str, default "2 * n_jobs"
                The most batches that are out at a time, being worked on or waiting for
                a worker; a number, a formula of the number of workers (on Dask, of the
                present one), or "all", which lifts the bound.
            initializer, initargs : callable and tuple, optional
                Called in each worker process of "loky" or "multiprocessing" as it
                starts; not if tasks run in this process. A function of the program
                travels by value: what it assigns to global variables is not seen by
                *task_func*. Keep that in a module.
            verbose : int, default 0
                Print how many tasks are done; the more often, the larger it is.
            max_nbytes, mmap_mode, temp_folder
                As in joblib: arrays of more than *max_nbytes* (1 MB), in tasks and in
                *task_func*, reach worker processes in files that they map, read-only.
                ``max_nbytes=None`` sends copies, ``mmap_mode="c"`` lets a task change
                its own view. The file of an array that the program has let go is
                removed when its batch has been read. What is a view of a `numpy.memmap`
                already stays mapped, unless its file may have other content by now; if
                that is replaced before a worker opens it, it is an error. Arrays of
                results are copies, but for views of a file of the user's.
            prefer, require
                As in joblib.

            Also what else the backend takes from `joblib.Parallel`, such as
            ``idle_worker_timeout`` (seconds, default 300). Type checkers know those of
            joblib and Ray, and accept others from a dictionary that is annotated:
            ``options: dict[str, Any] = {...}``. What the backend's constructor takes
            goes into a ``joblib.parallel_config(backend=..., ...)`` around the call.
            One that is open when `setup` is called is honoured; neither it nor a
            backend passed in is changed.

        Returns
        -------
        Generator[R, None, None]
            Yields the results; pairs with *return_tasks*. Like any generator, it can be
            read by several threads, but only by one at a time.

        Raises
        ------
        TypeError, ValueError, ImportError
            At once, if an argument is invalid, or if the package of *backend* is
            missing or hidden, or if *task_func* is a coroutine or generator function
            for processes; the message names the argument and shows the value. If
            a formula of *pre_dispatch* comes to 0 for the workers that turn up, it is
            raised from the generator.
        pickle.PicklingError
            From the generator, if *task_func*, a task or a result cannot be pickled. It
            says by which attributes and items that is reached. Threads pickle nothing.
        pickle.UnpicklingError
            From the generator, if one of them cannot be unpickled.
        TimeoutError
            From the generator, after *timeout*; also a `multiprocessing.TimeoutError`.
            It says which task it was, or which are out.
        concurrent.futures.BrokenExecutor
            From the generator, if a worker process of loky or `multiprocessing` dies,
            or its *initializer* fails. Of Dask, it is a ``KilledWorker``; of Ray, a
            ``RayActorError``.
        Exception
            From the generator: what *tasks* raised, as it is; or what a task raised,
            with a note that tells the number of the task and shows it. In threads it is
            the exception itself; elsewhere, the text of the worker's traceback is its
            cause. If it cannot be pickled, it is made again without a call of its
            ``__init__``, or else is a `RuntimeError` that shows it. A `StopIteration`,
            and what is no `Exception` (of ``sys.exit()``, say), is the cause of a
            `RuntimeError`; but with one worker, in this process, a `SystemExit` or
            `KeyboardInterrupt` is the program's own. What a signal handler raises while
            the generator is read, is raised from it as it is.
        """
        return _results(_Run(task_func, tasks, num_workers, kwargs))

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Stop idle worker processes. May be called at any time, or never.

        They are kept for the next run; without this, they leave when they have been
        idle for *idle_worker_timeout*, or with the program. Open runs are not touched.

        >>> Joblib.shutdown()
        """
        _stop_idle_pools()


@overload
def get_backend(backend_name: Literal["single_process"]) -> SingleProcess: ...
@overload
def get_backend(backend_name: Literal["joblib"]) -> Joblib: ...
@overload
def get_backend(
    backend_name: Literal["single_process", "joblib"],
) -> SingleProcess | Joblib: ...
def get_backend(backend_name: str) -> DistributedBackend:
    """Return a backend by its name.

    >>> isinstance(get_backend("joblib"), Joblib)
    True

    Parameters
    ----------
    backend_name : str
        "single_process" for `SingleProcess`, "joblib" for `Joblib`.

    Returns
    -------
    DistributedBackend
        An instance, ready for use.

    Raises
    ------
    ValueError
        If *backend_name* is neither.

        >>> get_backend("threads")
        Traceback (most recent call last):
        ValueError: backend_name must be 'single_process' or 'joblib', got 'threads'
    """
    if backend_name == "single_process":
        return SingleProcess()
    if backend_name == "joblib":
        return Joblib()
    message = f"backend_name must be 'single_process' or 'joblib', got {backend_name!r}"
    if isinstance(backend_name, str) and backend_name in _joblib_backends():
        message += f": use get_backend('joblib').setup(..., backend={backend_name!r})"
    raise ValueError(message)


# --------------------------------------------------------------------------------------
# Arguments: all that is wrong with them is said when `setup` is called. Errors that
# joblib reports clearly, when its Parallel is made, are left to it.


def _checked(task_func: Any, tasks: Any) -> tuple[Any, Iterator[Any]]:
    """Return the function and an iterator of the tasks."""
    _check_task_func(task_func)
    try:
        return task_func, iter(tasks)
    except TypeError as error:
        raise TypeError(f"tasks must be iterable, got {tasks!r}") from error


def _check_task_func(task_func: Any) -> None:
    if not callable(task_func):
        raise TypeError(f"task_func must be callable, got {task_func!r}")
    plain = types.FunctionType, types.MethodType, types.BuiltinFunctionType
    if not isinstance(task_func, plain) or hasattr(task_func, "__signature__"):
        return  # what it takes is not known for sure
    try:
        signature = inspect.signature(task_func, follow_wrapped=False)
    except ValueError:
        return
    try:
        signature.bind("a task")
    except TypeError:
        raise TypeError(
            "task_func must take one argument, the task: for several, use "
            f"lambda task: f(*task); got {task_func!r} with {signature}"
        ) from None


def _check_that_results_travel(task_func: Any) -> None:
    for is_one, what, instead in (
        (inspect.iscoroutinefunction, "a coroutine", "asyncio.run(f(task))"),
        (inspect.isgeneratorfunction, "a generator", "list(f(task))"),
        (inspect.isasyncgenfunction, "an asynchronous generator", "asyncio.run(...)"),
    ):
        if is_one(task_func) or is_one(type(task_func).__call__):
            raise TypeError(
                f"task_func must not return {what}, which no process can send to "
                f"another: use lambda task: {instead}; got {task_func!r}"
            )


def _checked_num_workers(num_workers: int | None) -> int:
    if num_workers is None:
        num_workers = joblib.parallel.get_active_backend()[1]
    if num_workers is None:
        return -1
    if isinstance(num_workers, bool) or not hasattr(num_workers, "__index__"):
        raise TypeError(f"num_workers must be an integer or None, got {num_workers!r}")
    count = operator.index(num_workers)
    if count == 0:
        raise ValueError(
            "num_workers must not be 0: use -1 for all cores, or 1, 2, ..."
        )
    return count


def _is_number(value: Any, least: float) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and operator.ge(value, least)


def _seconds(value: Any) -> float:
    """Return a limit of time as waits take it: numpy has numbers that are no float."""
    if value is None:
        return math.inf
    return min(value, 10**9) if isinstance(value, int) else min(float(value), 1e9)


# Names that options have in other libraries, and what to use instead.
_INSTEAD = {
    **dict.fromkeys(("chunk_size", "chunksize"), "batch_size"),
    **dict.fromkeys(
        ("max_workers", "n_jobs", "num_worker", "processes", "workers"), "num_workers"
    ),
    "max_tasks_per_child": "maxtasksperchild",
    **dict.fromkeys(
        ("ordered", "unordered"),
        "return_as='generator' for the order of the tasks, 'generator_unordered' for "
        "results as they complete",
    ),
    **dict.fromkeys(
        ("retries", "max_retries"), "errors='return', and run again what has failed"
    ),
    "progress": "verbose, or put tqdm around the generator",
}

# Options of worker processes of this machine.
_OF_PROCESSES = ("initializer", "initargs", "maxtasksperchild")


# What joblib would notice late, or not at all, or report without naming the option.
_CHECKS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "errors": ("'raise' or 'return'", lambda value: value in ("raise", "return")),
    "idle_worker_timeout": (
        "a number of seconds from 0.001 to 1e9, or None",
        lambda value: value is None or (_is_number(value, least=0.001) and value < 1e9),
    ),
    "initargs": ("a tuple", lambda value: isinstance(value, tuple)),
    "initializer": (
        "callable or None",
        lambda value: value is None or callable(value),
    ),
    "max_nbytes": (
        "a number of bytes, a string such as '1M', or None",
        lambda value: (
            value is None
            or _is_number(value, least=0)
            or (isinstance(value, str) and re.fullmatch(r"\d*\.?\d+[KMG]", value))
        ),
    ),
    "maxtasksperchild": (
        "a positive integer or None",
        lambda value: (
            value is None
            or (isinstance(value, numbers.Integral) and _is_number(value, least=1))
        ),
    ),
    "mmap_mode": (
        "'r', 'r+', 'w+', 'c' or None",
        lambda value: value in ("r", "r+", "w+", "c", None),
    ),
    "pre_dispatch": (
        "'all', a positive integer or a formula such as '2 * n_jobs'",
        lambda value: (
            isinstance(value, str)
            or (isinstance(value, numbers.Integral) and _is_number(value, least=1))
        ),
    ),
    "return_as": (
        "'generator_unordered' or 'generator' (to have a list, use list(...))",
        lambda value: value in ("generator_unordered", "generator"),
    ),
    "return_tasks": ("True or False", lambda value: isinstance(value, bool)),
    "temp_folder": (
        "a path or None",
        lambda value: value is None or isinstance(value, (str, os.PathLike)),
    ),
    "timeout": (
        "a number of seconds, not negative, or None",
        lambda value: value is None or _is_number(value, least=0),
    ),
    "verbose": ("a number", lambda value: isinstance(value, numbers.Real)),
}


def _count_of_batches(pre_dispatch: Any, workers: int) -> float:
    """Return how many batches *pre_dispatch* allows. Raise ValueError if none."""
    if pre_dispatch == "all":
        return math.inf
    try:
        formula = str(pre_dispatch).replace("n_jobs", str(workers))
        batches = int(joblib.parallel.eval_expr(formula))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(
            "pre_dispatch must be 'all', a number or a formula, in which n_jobs is the "
            f"only name, got {pre_dispatch!r}"
        ) from error
    if batches < 1:
        raise ValueError(f"pre_dispatch must come to 1 or more, got {pre_dispatch!r}")
    return batches


@functools.cache  # inspect.signature is slow
def _option_names(kind: Any, more: frozenset[str]) -> Any:
    """Return the names of what `joblib.Parallel` takes for a backend, and of what it
    takes as an argument of its constructor.
    """

    def names(function: Any) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}

    own = {"errors", "return_tasks"}
    taken = names(joblib.Parallel) | names(kind.configure) | more | own
    # A class that has none is looked up as `object`, which takes no arguments.
    makers = (vars(base).get("__init__", object) for base in kind.__mro__[:-1])
    made_with = set().union(*map(names, makers))
    internal = {"self", "n_jobs", "parallel", "nesting_level", "args", "kwargs"}
    return frozenset(taken - internal), frozenset(made_with - taken - internal)


def _check_option(name: str, value: Any) -> None:
    expected, is_valid = _CHECKS.get(name, ("", lambda value: True))
    if not is_valid(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_options(options: dict[str, Any], backend: Any, n_jobs: int) -> None:
    """Raise an error if one of *options* is unknown, or known to be bad."""
    kind: Any = type(backend)
    known, for_constructor = _option_names(kind, _engine_class(backend).more_options)
    for name, value in options.items():
        if name not in known:
            names = known, for_constructor
            raise TypeError(_why_unknown(name, value, kind.__name__, *names))
        _check_option(name, value)
    # The number of workers may not be known yet: 64 stands for it.
    _count_of_batches(options.get("pre_dispatch", "all"), n_jobs if n_jobs > 1 else 64)
    shares_memory = getattr(backend, "supports_sharedmem", False)
    if options.get("require") == "sharedmem" and not shares_memory:
        raise ValueError(f"require='sharedmem' is more than {kind.__name__} can do")


def _why_unknown(
    name: str, value: Any, kind: str, known: Any, for_constructor: Any
) -> str:
    option = f"{name}={value!r}"
    if name in _INSTEAD:
        return f"{option} is not an option: use {_INSTEAD[name]}"
    if name in _OF_PROCESSES:
        return (
            f"{option} is an option of worker processes of this machine, those of "
            f"'loky' and 'multiprocessing', not of {kind}"
        )
    if name in for_constructor:
        return (
            f"{option} is not an option of setup: put it into "
            f"joblib.parallel_config(backend=..., {name}=...) around the call"
        )
    usual = sorted(known - {"backward_reducers", "forward_reducers"})
    near = difflib.get_close_matches(name, [*usual, "num_workers"], 1, 0.8)
    expected = "".join(f"did you mean {word!r}? " for word in near)
    expected += f"Expected one of {', '.join(map(repr, usual))}"
    return f"unknown option {option}: {expected}"


def _chosen_backend(options: dict[str, Any]) -> Any:
    """Return the joblib backend that `joblib.Parallel` would use; it may be shared.

    Its name is taken out of *options*.
    """
    backend = options.pop("backend", None)
    asks = not options.keys().isdisjoint(_OF_PROCESSES)
    if backend is None and asks and _module_of_workers()._in_thread.is_loading:
        # The default would be threads, which refuse these options. When the run starts,
        # _Processes raises an exception that says more.
        backend = "loky"
    if backend is None:
        asked = ("prefer", "require")
        hints = {name: options[name] for name in asked if name in options}
        return joblib.parallel.get_active_backend(**hints)[0]
    if isinstance(backend, joblib.parallel.ParallelBackendBase):
        return backend
    if backend == "dask":
        _require_dask()
    elif backend == "ray":
        needs = "Ray: install it with pip install ray"
        _import_engine("ray.util.joblib", f"backend='ray' needs {needs}").register_ray()
    names = _joblib_backends()
    if not isinstance(backend, str) or backend not in names:
        expected = ", ".join(map(repr, sorted(names)))
        message = f"backend must be an instance or one of {expected}, got {backend!r}"
        raise ValueError(message)
    active = joblib.parallel.get_active_backend()[0]
    if type(active) is joblib.parallel.BACKENDS.get(backend):
        return active  # with the options of the caller's parallel_config
    with joblib.parallel_config(backend=backend):
        return joblib.parallel.get_active_backend()[0]


def _joblib_backends() -> set[str]:
    """Return the names that joblib knows."""
    return {
        *joblib.parallel.BACKENDS,
        *joblib.parallel.EXTERNAL_BACKENDS,
        *joblib.parallel.MAYBE_AVAILABLE_BACKENDS,
        "ray",
    }


def _import_engine(module: str, message: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(message) from error


def _require_dask() -> None:
    needs = "Dask: install it with pip install 'dask[distributed]'"
    package = _import_engine("distributed", f"backend='dask' needs {needs}")
    if not hasattr(package, "Client"):
        raise ImportError(
            f"backend='dask' needs Dask's package 'distributed', which is hidden by "
            f"{package.__file__}, a top-level module of the same name: move that file "
            "into a package"
        )


# --------------------------------------------------------------------------------------
# The loop.
#
# The consumer is whoever reads the generator that `setup` returns. An engine runs
# batches of tasks: in worker processes of this machine, in threads, on Dask, or by
# another backend of joblib.
#
#    the consumer's thread, in _results()             an engine
#   +------------------------------------+
#   |  1 draw      tasks                 |
#   |                |                   |            worker processes (below), threads,
#   |  2 send        +--> batch ---------|----------> Dask or others: in each worker
#   |                                    |            _run_tasks(task_func, tasks)
#   |  3 wait      _Inbox <--------------|----------- report(outcome)
#   |                |                   |
#   |  4 hand out    +--> results: yield |
#   +------------------------------------+
#
#   _Lifetime.end(), in any thread -> a thread that ends the run: engine.end()
#
# There is one loop, in the thread that calls next(). It draws tasks until as many
# batches are out as *pre_dispatch* says, waits for a report, hands out its results, and
# draws again. So nothing is drawn outside of next(), and no result is dropped. All that
# a thread of an engine ever does to a run is to put an outcome into its inbox, which
# cannot block or fail.


class _TaskTimeoutError(TimeoutError, multiprocessing.TimeoutError):
    """A task took too long. joblib's users catch the second class, others the first."""

    def __reduce__(self) -> Any:  # pickle cannot find it by its name, which is changed
        return _timeout_error, self.args


def _timeout_error(*arguments: Any) -> _TaskTimeoutError:
    return _TaskTimeoutError(*arguments)


# Tracebacks show the name that everybody knows.
_TaskTimeoutError.__name__ = _TaskTimeoutError.__qualname__ = "TimeoutError"
_TaskTimeoutError.__module__ = "builtins"


class _NoResult(NamedTuple):
    """Takes the place of the result of a task that has none.

    *error* is an exception or, if the task's worker was lost, a `_Failure`; in a
    worker, what `_pack_error` returns.
    """

    error: Any


class _Failure:
    """An exception in place of the results of a batch, and whether it ends the run.

    Its traceback is kept as text, since its frames would refer to the run.
    """

    def __init__(self, error: BaseException, *, ends_run: bool = False) -> None:
        try:
            if error.__traceback__ is not None:
                _set_cause(error, "".join(traceback.format_exception(error)).strip())
                cast("Any", BaseException.__context__).__set__(error, None)
            self.error = error.with_traceback(None)
        except Exception:  # its own methods may fail
            self.error = RuntimeError(f"{type(error).__qualname__}, which fails itself")
        self.ends_run = ends_run  # even with errors="return"
        # The tasks of the batch, by their indices, that may be at fault; if known.
        self.suspects: range | None = None

    def explained(self, note: str) -> Any:
        """Return the exception that is raised; *note* says for which tasks."""
        if self.ends_run and self.suspects is None:
            return self.error  # no task is at fault
        explained = self.with_text(f". {note}")
        if explained is self.error:
            return _with_task_note(explained, note)
        return explained

    def with_text(self, text: str) -> BaseException:
        """Return the exception; if it is one of this file, a new one with more text."""
        if type(self.error) not in (BrokenProcessPool, _TaskTimeoutError):
            return self.error
        explained = type(self.error)(f"{self.error}{text}")
        explained.__cause__ = self.error.__cause__
        return explained


# What `read` returns if the tasks without results are to be sent again, one by one. It
# is compared by identity.
_SEND_AGAIN = _Failure(RuntimeError("not sent again"))

# Larger batches are not faster, even if tasks take no time, and they need memory.
_MAX_BATCH_SIZE = 8192

# Bytes of arrays in the tasks of a batch, beyond which batches do not grow.
_MAX_BATCH_BYTES = 8_000_000

# Seconds after which a wait looks whether there is still something to wait for. On
# Windows, a Ctrl-C does not interrupt a wait for a lock: it takes up to this long.
# Limits of time are counted in such slices, not by a clock: if this process is
# suspended, with its workers or not, that counts as one slice. (What goes by a clock,
# such as how long a worker has been idle, makes up for that.)
_WAIT_SLICE = 0.5


def _wait_in_slices(wait: Callable[[float], object], seconds: float) -> None:
    """Call *wait*, which returns at once when all is done, with a timeout."""
    for _ in range(math.ceil(seconds / _WAIT_SLICE)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait(_WAIT_SLICE)


def _one_by_one(
    task_func: Callable[[T], R],
    tasks: Iterator[T],
    progress: _Progress | None = None,
    *,
    returns_errors: bool = False,
    returns_tasks: bool = False,
) -> Generator[Any, None, None]:
    """Yield results like `map`, but a StopIteration of *task_func* is an error."""
    counter = itertools.count()
    result: Any
    for task in tasks:
        number = next(counter)  # enumerate() would keep a reference to the task
        try:
            result = task_func(task)
        except Exception as error:
            _raise_if_of_handler(error)
            failed = _with_task_note(error, _task_note(number, task))
            if not returns_errors or _leaves_debugger(error):
                if failed is error:
                    raise
                raise failed from error
            result = FailedTask(number, task, failed)
            del failed
        if returns_tasks:
            result = task, result
        if progress is not None:
            progress.add(1)
        del task  # keep no reference while the next one is drawn and run
        yield result
        del result


def _task_note(number: int, task: Any) -> str:
    return f"Task {number} (counted from 0): {_short_repr(task)}"


def _tasks_note(first: int, tasks: list[Any]) -> str:
    """Return a note that names the tasks of a batch."""
    if not tasks:
        return f"No task was running: the next one was {first} (counted from 0)"
    if len(tasks) == 1:
        return _task_note(first, tasks[0])
    return (
        f"One of tasks {first} to {first + len(tasks) - 1} (counted from 0), of which "
        f"the first is: {_short_repr(tasks[0])}"
    )


def _with_task_note(error: BaseException, note: str) -> Any:
    """Return the exception that is raised where a task has raised *error*.

    A BaseException would end the program; a StopIteration would look like the end of
    the results. Both become the cause of a RuntimeError.
    """
    kind = type(error)  # the methods of some raise, and so may isinstance()
    if issubclass(kind, StopIteration) or not issubclass(kind, Exception):
        text = type(error).__qualname__
        with contextlib.suppress(Exception):  # its own methods may fail
            text = repr(error)
        cause, error = error, RuntimeError(f"a task raised {text}")
        error.__cause__ = cause
    # How many runs this one is inside of, in this thread; its caller may be
    # _one_by_one.
    stack = traceback.walk_stack(inspect.currentframe())
    callers = [frame.f_code.co_name for frame, _ in stack][2:]
    marked = _TaskNote(note)
    marked.depth = sum(callers.count(name) for name in ("_one_by_one", "_run_tasks"))
    with contextlib.suppress(Exception):  # a class may refuse notes
        notes = getattr(error, "__notes__", [])
        # An object that is raised again and again has the note of the last task only.
        notes[:] = [n for n in notes if getattr(n, "depth", math.inf) > marked.depth]
        error.add_note(marked)
    return error


class _TaskNote(str):
    """A note that names a task; it is pickled as text."""

    depth: int  # of its run

    def __reduce__(self) -> Any:
        return str, (str(self),)


def _short_repr(value: Any) -> str:
    """Return a short text for *value*, even if its own methods fail."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    try:
        return short.repr(value)[:400]
    except (Exception, SystemExit, GeneratorExit) as error:
        _raise_if_of_handler(error)
        return f"<{type(value).__qualname__}>"


def _raise_if_of_handler(error: BaseException) -> None:
    """Raise an exception again that a signal handler of the program has raised.

    It may come out of any call: out of the iterator of the tasks, or out of pickle. A
    handler is recognized by its arguments, one of which is the frame that called it:
    before that is the number of a signal, unless the handler has changed it.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals is globals():
            continue  # to look into frames of this file would keep what they refer to
        names, rest, _, values = inspect.getargvalues(frame)
        more = values.get(rest or "", ())
        passed = [*map(values.get, names), *(more if type(more) is tuple else ())]
        for number, caller in itertools.pairwise(passed):
            is_caller = type(caller) is types.FrameType and caller is frame.f_back
            if is_caller and (_is_signal(number) or _is_of_handler(frame.f_code)):
                raise error


def _is_signal(number: Any) -> bool:
    return isinstance(number, int) and number in signal.valid_signals()


def _is_of_handler(code: types.CodeType) -> bool:
    handlers = map(signal.getsignal, signal.valid_signals())
    return any(getattr(handler, "__code__", None) is code for handler in handlers)


class _Inbox:
    """The reports of a run's batches, as they come or, if *ordered*, by their numbers.

    Any thread may call `put`, which cannot block or fail; the consumer's thread alone
    calls the other methods.
    """

    def __init__(self, *, ordered: bool) -> None:
        self.reports: queue.SimpleQueue[tuple[int | None, Any]] = queue.SimpleQueue()
        self.ordered = ordered
        self.next_number = 0  # ordered: of the batch to be returned next
        self.early: dict[int, Any] = {}  # ordered: outcomes of batches behind that one

    def put(self, number: int | None, outcome: Any) -> None:
        """Report the outcome of a batch; without a number, one that ends the run."""
        self.reports.put((number, outcome))

    def take(self, timeout: float) -> tuple[int | None, Any] | None:
        """Return the number of the next batch and its outcome.

        Return None if the report of a later batch has come. The number is None if the
        outcome ends the run. Raise `queue.Empty` after *timeout* seconds.
        """
        if self.next_number not in self.early:
            number, outcome = self._wait(timeout)
            # What is unreadable is sent again at once, not when its turn comes.
            if number is None or not self.ordered or _is_unreadable(outcome):
                return number, outcome
            self.early[number] = outcome
            if number != self.next_number:
                return None
        self.next_number += 1
        return self.next_number - 1, self.early.pop(self.next_number - 1)

    def wait_again_for(self, number: int) -> None:
        self.next_number = min(self.next_number, number)

    def _wait(self, left: float) -> tuple[int | None, Any]:
        while left > 0:  # see _WAIT_SLICE
            with contextlib.suppress(queue.Empty):
                # No less: in Python 3.11 and 3.12, get() may wait for ever if its time
                # is over before it has begun to wait.
                return self.reports.get(timeout=min(max(left, 0.01), _WAIT_SLICE))
            left -= _WAIT_SLICE
        return self.reports.get_nowait()


class _Progress:
    """What *verbose* prints, about as often as joblib does."""

    def __init__(self, verbose: float, tasks: Any) -> None:
        self.verbose = verbose
        self.total: int | None = None
        with contextlib.suppress(Exception):
            self.total = len(tasks)
        self.done = 0
        self.start = time.monotonic()

    def add(self, count: int) -> None:
        # The interval between lines grows with the square root of the tasks done.
        scale = 0.5 * (11 - min(self.verbose, 10.5)) ** 2
        before, self.done = self.done, self.done + count
        steps = {math.isqrt(int(done / scale)) for done in (before, self.done)}
        stream = sys.stderr if self.verbose < 50 else sys.stdout
        is_open = stream is not None and not getattr(stream, "closed", False)
        is_due = len(steps) > 1 or self.verbose > 10 or self.done == self.total
        if is_open and is_due:
            of = "" if self.total is None else f" out of {self.total:3d}"
            seconds = time.monotonic() - self.start
            flush = hasattr(stream, "flush")  # not all streams have it
            print(
                f"Done {self.done:3d}{of} | {seconds:.1f} s", file=stream, flush=flush
            )


class _Batch:
    """Tasks that are sent together, and their results."""

    def __init__(self, number: int, first: int, tasks: list[Any]) -> None:
        self.number = number
        self.first = first  # the number of its first task
        self.tasks = tasks
        self.messages: list[bytes | None] = []  # the tasks, pickled
        self.unpicklable: list[_NoResult] = []  # one for each None in messages
        self.sent_at = 0.0
        self.seconds = 0.0  # that they took, where they were run
        self.arrays: list[Any] = []  # in files; a file is removed after its array
        self.scattered: dict[str, Any] = {}  # on Dask: tasks that the user has sent
        self.results: list[Any] = []  # of the first tasks, or _NoResult in place of one
        self.plain = 0  # how many of these came as plain values, and need no look


class _Run:
    """One call of `Joblib.setup`: its function, tasks and results.

    The consumer's thread alone uses it, but for `_Lifetime.fail` and forks. Only the
    run's generator refers to it: nothing that an engine keeps, and no registry, does.
    Otherwise a run to which its own tasks, results or function refer would never be
    collected, and so never end.
    """

    def __init__(
        self, task_func: Any, tasks: Any, num_workers: int | None, options: Any
    ) -> None:
        self.task_func, self.tasks = _checked(task_func, tasks)
        n_jobs = _checked_num_workers(num_workers)
        backend = _chosen_backend(options)
        _check_options(options, backend, n_jobs)
        self.inbox = _Inbox(ordered=options.pop("return_as", None) == "generator")
        self.returns_errors = options.pop("errors", None) == "return"
        self.returns_tasks = options.pop("return_tasks", False)
        self.timeout = _seconds(options.pop("timeout", None))
        self.max_tasks: float = options.pop("maxtasksperchild", None) or math.inf
        # For one worker to be a process, if there can be one.
        self.asks = self.returns_errors or min(self.timeout, self.max_tasks) < math.inf
        self.engine = _engine_class(backend)(backend)
        if self.engine.sends_results(n_jobs, self.asks):
            _check_that_results_travel(task_func)
        self.parallel = self.engine.configure(n_jobs, options)
        self.lifetime = _Lifetime(self)
        self.given_tasks = tasks  # which may have a length; its iterator has none
        self.tasks_error: BaseException | None = None
        self.is_exhausted = False
        self.progress: _Progress | None = None
        self.auto_size = 1  # of the next batches, if batch_size is "auto"
        self.task_seconds = math.inf  # for a task of the last batch, on average
        # A batch is in `ready`, then `out`, then `completed` while it is handed out.
        self.ready: deque[_Batch] = deque()  # drawn, and not yet sent
        self.out: dict[int, _Batch] = {}
        self.max_batches: float = 0  # the most that may be out
        self.batches, self.drawn = itertools.count(), 0
        # How many tasks were in the batch whose results are being handed out, when it
        # was sent, and the seconds that it took.
        self.completed: tuple[int, float, float] | None = None
        self.results: list[Any] = []  # not yet handed out; the next one is the last
        self.waited = 0.0  # seconds, since a batch has completed

    def start(self) -> bool:
        """Start the engine. Return False if this process is to run the tasks."""
        engine, parallel = self.engine, self.parallel
        if parallel.verbose:
            self.progress = _Progress(parallel.verbose, self.given_tasks)
        del self.given_tasks
        self.lifetime.begin()
        with self.lifetime:
            engine.workers = engine.effective_n_jobs(parallel.n_jobs)
            if engine.workers == 0:
                name = type(engine.backend).__name__
                raise RuntimeError(f"{name} has no active worker")
            if engine.workers == 1 and not (self.asks and engine.can_isolate()):
                return False
            self.max_batches = _count_of_batches(parallel.pre_dispatch, engine.workers)
            engine.start(self)
        return True

    def dispatch(self) -> bool:
        """Draw and send until as much is out as may be. Return whether anything is."""
        with self.lifetime:
            if self.completed is not None:
                self.note_completion(*self.completed)
            if self.engine.has_changed():
                formula = self.parallel.pre_dispatch
                with contextlib.suppress(ValueError):  # the formula is 0 for a moment
                    self.max_batches = _count_of_batches(formula, self.engine.workers)
            while len(self.out) < self.max_batches and self.lifetime.takes_more():
                if not self.ready and not self.is_exhausted:
                    self.draw()
                if not self.ready:
                    break
                self.send(self.ready.popleft())
        # If the run was ended elsewhere, `_Lifetime.fail` has left a report.
        return bool(self.out) or self.lifetime.is_over()

    def batch_size(self) -> int:
        """Return how many tasks the next batches are to have."""
        size, rule = self.parallel.batch_size, self.engine.batch_rule
        if size == "auto" and rule is not None:
            size = rule.compute_batch_size()
        elif size == "auto":
            weight = max(self.engine.task_weight, 1)
            most = max(1, int(_MAX_BATCH_BYTES / weight))
            size = self.auto_size = int(min(self.auto_size, most, self.max_tasks))
        return int(min(size, self.max_tasks))

    def draw(self) -> None:
        """Draw the tasks of a batch for each worker; of one, if batches have one task.

        So the end of the tasks is seen early enough to share out what is left in small
        batches, unless tasks take no time. An exception of the tasks is kept until all
        results are out.
        """
        size, workers = self.batch_size(), self.engine.workers
        count = 1 if size == 1 else min(size * workers, sys.maxsize)
        drawn: list[Any] = []
        try:
            drawn.extend(itertools.islice(self.tasks, count))  # keeps what came before
        except (Exception, GeneratorExit) as error:
            _raise_if_of_handler(error)
            self.tasks_error = error
        if len(drawn) < count:
            self.is_exhausted = True
            least = int(0.002 / self.task_seconds)  # as many tasks as take 2 ms
            share = math.ceil(len(drawn) / workers)
            size = max(1, min(size, share, max(least, share // 10)))
        for start in range(0, len(drawn), size):
            tasks = drawn[start : start + size]
            batch = _Batch(next(self.batches), self.drawn, tasks)
            self.drawn += len(tasks)
            self.engine.pack(batch)
            self.ready.append(batch)

    def send(self, batch: _Batch) -> None:
        batch.sent_at = time.monotonic()
        self.out[batch.number] = batch
        self.lifetime.is_busy = True
        # It refers to the inbox only. If it referred to the run, a run to which its own
        # tasks refer would never be collected.
        report = functools.partial(self.inbox.put, batch.number)
        try:
            self.engine.send(self, batch, report)
        except Exception as error:
            _raise_if_of_handler(error)
            # It is raised after the results that were received before.
            report(_Failure(error, ends_run=True))
            self.lifetime.has_failed = True

    def next_batch(self) -> BaseException | None:
        """Wait for a batch and take its results. Return an exception that ends the run.

        There may be no results: if the engine is to be looked at, or if tasks are sent
        again.
        """
        with self.lifetime:
            report = self.wait()
            if report is None:
                return None
            number, outcome = report
            if number is None:
                return cast("BaseException", outcome.error)
            batch = self.out.pop(number)
            try:
                failure = self.engine.read(batch, outcome)
            except Exception as error:
                _raise_if_of_handler(error)
                failure = _Failure(error)
            if failure is _SEND_AGAIN:
                self.inbox.wait_again_for(number)
                self.engine.pack_apart(batch)
                self.send(batch)
                return None
            results, error_of_run = self.to_yield(batch, failure)
            if self.returns_tasks:
                results = list(zip(batch.tasks, results, strict=False))
            self.completed = len(batch.tasks), batch.sent_at, batch.seconds
            self.lifetime.is_busy = bool(self.out)
        results.reverse()
        self.results = results
        return error_of_run

    def wait(self) -> tuple[int | None, Any] | None:
        """Return the next report, or None if it is time to look at the engine."""
        left = math.inf if self.engine.limits_tasks else self.timeout - self.waited
        try:
            report = self.inbox.take(min(left, self.engine.look_again))
        except queue.Empty:
            if left > self.engine.look_again:
                self.waited += self.engine.look_again
                self.engine.check()
                return None
            raise self.timeout_error() from None
        self.waited = 0
        return report

    def timeout_error(self) -> _TaskTimeoutError:
        early = self.inbox.early  # ordered: complete, but behind others
        batches = [self.out[number] for number in self.out.keys() - early]
        oldest = min(batches, key=operator.attrgetter("first"))
        return _TaskTimeoutError(
            f"no task has completed within the timeout of {self.timeout!r} seconds. "
            f"{sum(len(batch.tasks) for batch in batches)} are out, of which the "
            f"oldest batch is: {_tasks_note(oldest.first, oldest.tasks)}"
        )

    def to_yield(
        self, batch: _Batch, failure: _Failure | None
    ) -> tuple[list[Any], BaseException | None]:
        """Return what the run yields for a batch, and an exception that ends the run.

        *failure* is what has become of the tasks without results.
        """
        # The batch must not keep them: exceptions have frames that refer to the run.
        results, batch.results = batch.results, []
        done = len(results)
        if failure is None and done == len(batch.tasks):
            are_failed = (type(result) is _NoResult for result in results)
            if batch.plain == done or not any(are_failed):
                return results, None
        failure = failure or _Failure(RuntimeError("results are missing"))
        span = failure.suspects
        if span is None:
            span = range(done, len(batch.tasks))
        suspects = batch.tasks[span.start : span.stop]
        # One exception for all tasks without results.
        rest = failure.explained(_tasks_note(batch.first + span.start, suspects))
        items: list[Any] = []
        for index, task in enumerate(batch.tasks):
            error: BaseException = rest
            if index < done:
                if type(results[index]) is not _NoResult:
                    items.append(results[index])
                    continue
                note = _task_note(batch.first + index, task)
                error = self.engine.explained(results[index].error, note, batch)
            ends_run = index >= done and failure.ends_run
            if not self.returns_errors or ends_run or _leaves_debugger(error):
                # If it is a task that has raised, the workers can be kept.
                self.lifetime.has_failed |= index >= done
                return items, error
            items.append(FailedTask(batch.first + index, task, cast("Any", error)))
        return items, None

    def note_completion(self, size: int, sent_at: float, seconds_there: float) -> None:
        """Adapt the size of batches.

        The time that the consumer took to read the results counts: so a slow consumer
        has small batches, and few tasks are drawn ahead of it.
        """
        self.completed = None
        target = self.engine.batch_seconds
        seconds = max(time.monotonic() - sent_at, 1e-6)  # some clocks are coarse
        if seconds_there:  # else its worker was lost
            self.task_seconds = seconds_there / size
        if self.engine.batch_rule is not None:
            self.engine.batch_rule.batch_completed(size, seconds)
        elif size == self.auto_size and not target / 2 <= seconds <= target * 5:
            steps = 64 if seconds < 0.001 else 16 if seconds < 0.01 else 2
            most = min(target * size / seconds, steps * size, _MAX_BATCH_SIZE)
            self.auto_size = int(most) or 1
        if self.progress is not None:
            self.progress.add(size)


def _results(run: _Run) -> Generator[Any, None, None]:
    """Yield the results of a run: what `Joblib.setup` returns."""
    # Ends the run even if an interrupt keeps `finally`, below, from doing so.
    weakref.finalize(run, run.lifetime.end).atexit = False  # _at_exit does that
    error: BaseException | None = None
    try:
        if not run.start():
            yield from _one_by_one(
                run.task_func,
                run.tasks,
                run.progress,
                returns_errors=run.returns_errors,
                returns_tasks=run.returns_tasks,
            )
            return
        with run.engine.reading():
            while error is None and run.dispatch():
                error = run.next_batch()
                results, pop = run.results, run.results.pop
                while results:
                    yield pop()  # keep no reference to it
        if error is None:
            error = run.tasks_error
        if error is not None:
            # Not inside of reading(), since contextmanager sets `__traceback__` on what
            # passes through it. Python makes a RuntimeError of a StopIteration here.
            raise error
    finally:
        run.tasks_error = None
        # Not left to the collector: Python ignores an interrupt of what that calls.
        run.lifetime.end()
        del error, run  # the traceback of the error refers to this frame


# --------------------------------------------------------------------------------------
# Engines.


# Private names of Python and joblib that this file uses, and what for. Looked at in
# Python 3.11 to 3.15 and joblib 1.5.0 to 1.6.0. Without one of them, runs that need it
# do not start.
_PRIVATE_NAMES = {
    # multiprocessing.process.BaseProcess
    "_bootstrap": "to start workers as multiprocessing starts processes",
    # cloudpickle.cloudpickle, or joblib.externals.cloudpickle.cloudpickle
    "_class_setstate": "to leave the classes of the program as they are",
    # joblib._memmapping_reducer
    "_get_temp_dir": "to put files where joblib would",
    # joblib.parallel.ParallelBackendBase
    "_prepare_worker_env": "to limit the threads of libraries in workers",
}


def _private(owner: Any, name: str) -> Any:
    """Return an attribute that stands in the list above."""
    try:
        return getattr(owner, name)
    except AttributeError:
        message = f"{name}, which is needed {_PRIVATE_NAMES[name]}, is not in {owner!r}"
        versions = f"joblib {joblib.__version__}, Python {sys.version.split()[0]}"
        raise RuntimeError(f"{message} ({versions}): use another version") from None


_ReportFunction = Callable[[Any], None]


class _Engine:
    """Runs the batches of a run: what the loop asks of it.

    `end` may be called in any thread, while the consumer's is in another method, and
    again after that; the other methods are for the consumer's thread.
    """

    more_options: frozenset[str] = frozenset()  # than the backend's `configure` has
    pool: Any = None  # of processes
    workers = 1
    batch_seconds = 0.4  # that a batch of many tasks should take
    batch_rule: Any = None  # a backend that has a rule of its own for that
    limits_tasks = False  # it applies *timeout* itself, to each task
    look_again = math.inf  # seconds between calls of check()
    task_weight: float = 0  # bytes of arrays in a task, if known
    dump: Any = None  # pickles the function and the tasks, if they are sent

    def __init__(self, backend: Any) -> None:
        # A copy, since it may be shared. Dask's is not copied by copy.copy().
        self.backend: Any = object.__new__(type(backend))
        vars(self.backend).update(vars(backend))

    def configure(self, n_jobs: int, options: dict[str, Any]) -> Any:
        """Have joblib check the options; return the Parallel that has them.

        It is not called.
        """
        return joblib.Parallel(n_jobs=n_jobs, backend=self.backend, **options)

    def effective_n_jobs(self, n_jobs: int) -> int:
        return int(self.backend.effective_n_jobs(n_jobs))

    def sends_results(self, n_jobs: int, asks: Any) -> bool:
        """Return whether results come from other processes, as far as that is known."""
        return n_jobs != 1 and not getattr(self.backend, "supports_sharedmem", False)

    def can_isolate(self) -> bool:
        """Return whether one worker would be a process, which can be killed."""
        return False

    def start(self, run: _Run) -> None:
        """Get ready for the batches of a run."""

    def has_changed(self) -> bool:
        """Return whether the number of workers has changed."""
        return False

    def check(self) -> None:
        """Raise an exception if no report will ever come."""

    def reading(self) -> Any:
        """Return a context manager that is open while results are read.

        If this thread is one of a pool, it lets another task run meanwhile.
        """
        return contextlib.nullcontext()

    def pack(self, batch: _Batch) -> None:
        """Pickle the tasks as they are when they are drawn, if they are sent."""
        if self.dump is None:
            return
        try:
            batch.messages = [_message(self.tasks_to_send(batch), self.dump)]
            return
        except Exception as error:
            _raise_if_of_handler(error)
        self.pack_apart(batch)

    def pack_apart(self, batch: _Batch) -> None:
        """Pickle each task that has no result in a message of its own.

        So one that cannot be pickled or unpickled costs no other. None stands for the
        message of one that cannot be pickled.
        """
        batch.messages, batch.unpicklable = [], []
        for task in self.tasks_to_send(batch)[len(batch.results) :]:
            try:
                batch.messages.append(_message([task], self.dump))
            except Exception as error:
                _raise_if_of_handler(error)
                batch.messages.append(None)
                what = "a task cannot be pickled"
                # In no variable, since the frames of its cause refer to this one.
                batch.unpicklable.append(
                    _NoResult(_pickling_error(what, error, task, self.dump))
                )

    def tasks_to_send(self, batch: _Batch) -> list[Any]:
        return batch.tasks

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        """Have a batch done. The engine must not keep the function: see _Run."""
        raise NotImplementedError

    def end(self, *, kill: bool) -> None:
        """Stop the workers, or keep them for another run. May be called again."""

    def pickled_function(self, task_func: Any) -> bytes:
        # Looked at here; it is called when results are read.
        _private(_cloudpickle().cloudpickle, "_class_setstate")
        try:
            return bytes(self.dump(task_func))
        except Exception as error:
            _raise_if_of_handler(error)
            what = f"task_func cannot be pickled: {_short_repr(task_func)}"
            raise _pickling_error(what, error, task_func, self.dump) from error

    def nested(self) -> dict[str, Any]:
        """Return what joblib is to use for what tasks start by it."""
        nested = self.backend.get_nested_backend()
        backend, n_jobs = nested if isinstance(nested, tuple) else (nested, None)
        return {"backend": backend, "n_jobs": n_jobs}

    def read(self, batch: _Batch, outcome: Any) -> _Failure | None:
        """Take the results of a batch from its outcome.

        Return what has become of the tasks that have none.
        """
        if isinstance(outcome, _Failure):
            return outcome
        if isinstance(outcome, tuple):  # what `_run_in_thread` has returned
            batch.results, batch.seconds = outcome
            return None
        for reply in outcome:
            if isinstance(reply, bytes):
                failure = self.read_reply(batch, reply)
            else:
                failure = self.read_other(batch, reply)
            if failure is not None:
                return failure
        return None

    def read_reply(self, batch: _Batch, reply: bytes) -> _Failure | None:
        kind = reply[:1]
        if kind == _UNREADABLE:
            return _SEND_AGAIN
        if kind not in (_NO_FUNCTION, _BROKEN):
            received = pickle.loads(memoryview(reply)[1:])
            if type(received) is list:
                batch.plain += len(received)
            batch.results += _read_results(received)
            return None
        _, packed = pickle.loads(memoryview(reply)[1:])
        if kind == _NO_FUNCTION:
            return _Failure(_unpacked_error(packed), ends_run=True)
        batch.results.append(_NoResult(_unpacked_error(packed)))
        return None

    def read_other(self, batch: _Batch, reply: Any) -> _Failure | None:
        """Take seconds, or None in place of the reply to a task that was not sent."""
        if reply is not None:
            batch.seconds += reply
            return None
        batch.results.append(batch.unpicklable.pop(0))
        return None

    def explained(self, error: Any, note: str, batch: _Batch) -> BaseException:
        """Return the exception of a task with its note."""
        if type(error) is _Failure:
            return cast("BaseException", error.explained(note))
        return cast("BaseException", _with_task_note(error, note))


def _engine_class(backend: Any) -> Any:
    """Return the class of engine that runs tasks as a backend of joblib would.

    Classes that others have derived from those of joblib are used as they are.
    """
    kinds = {
        joblib.parallel.LokyBackend: _Processes,
        joblib.parallel.MultiprocessingBackend: _Processes,
        joblib.parallel.ThreadingBackend: _Threads,
        joblib.parallel.BACKENDS.get("dask"): _Dask,
        joblib.parallel.BACKENDS.get("ray"): _Ray,
    }
    kind = kinds.get(type(backend), _Registered)
    is_sequential = isinstance(backend, joblib.parallel.SequentialBackend)
    reports = is_sequential or backend.supports_retrieve_callback
    if kind is _Registered and not reports:
        raise ValueError(
            f"backend must tell when a batch has completed, got {backend!r}"
        )
    return kind


# ---- threads -------------------------------------------------------------------------


class _Threads(_Engine):
    """Threads of this process. They cannot be stopped: busy ones are left alone."""

    # Short, so that a thread that is no longer wanted soon ends.
    batch_seconds = 0.004

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.started = 0

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        if self.started < self.workers:
            arguments = self.jobs, self.nested()
            thread = threading.Thread(target=_work, args=arguments, daemon=True)
            self.started += 1  # first, as an interrupt may come in between
            _start(thread)
        self.jobs.put((report, run.task_func, run.returns_errors, batch.tasks))

    def end(self, *, kill: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:  # none of these begins
                self.jobs.get_nowait()
        for _ in range(self.started):
            self.jobs.put(None)


def _work(jobs: queue.SimpleQueue[Any], nested: dict[str, Any]) -> None:
    """Be a worker that is a thread."""
    with joblib.parallel_config(**nested):
        while (job := jobs.get()) is not None:
            report, *arguments = job
            outcome: Any
            try:
                outcome = _run_in_thread(*arguments)
            except BaseException as error:  # somebody waits for a report
                outcome = _Failure(error, ends_run=True)
            report(outcome)
            del job, report, arguments, outcome


# ---- backends of others --------------------------------------------------------------


class _Registered(_Engine):
    """Any other backend of joblib, used by the methods that `joblib.Parallel` calls."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        auto = joblib.parallel.AutoBatchingMixin.compute_batch_size
        if type(backend).compute_batch_size is not auto:
            self.batch_rule = self.backend
        self.clean_ups = contextlib.ExitStack()  # calls all, even if one fails

    def start(self, run: _Run) -> None:
        self.clean_ups.push(run.parallel)
        run.parallel.__enter__()
        self.clean_ups.callback(self.backend.stop_call)
        self.backend.start_call()
        if not getattr(self.backend, "supports_sharedmem", False):
            self.dump = _make_dump(_common_reducers())
            payload = self.pickled_function(run.task_func)
            function = _LoadedFunction(payload, run.returns_errors, {})
            self.key, self.function = uuid.uuid4().hex, self.stored(function)

    def stored(self, function: _LoadedFunction) -> Any:
        return function

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        call: Any = _run_in_thread
        arguments: Any = run.task_func, run.returns_errors, batch.tasks
        if self.dump is not None:
            call = _InWorker("_answer_in_worker")
            arguments = self.key, self.function, batch.messages
        calls = joblib.parallel.BatchedCalls(
            batch.tasks, self.backend.get_nested_backend()
        )
        # One call for the batch: one for each task takes several times longer.
        calls.items = [joblib.delayed(call)(*arguments)]
        self.backend.submit(calls, callback=report)

    def read(self, batch: _Batch, outcome: Any) -> _Failure | None:
        if not isinstance(outcome, _Failure):
            (outcome,) = self.backend.retrieve_result_callback(outcome)
        return super().read(batch, outcome)

    def end(self, *, kill: bool) -> None:
        if kill:
            self.clean_ups.callback(self.backend.abort_everything, ensure_ready=False)
        self.clean_ups.close()
        self.backend.parallel = None


class _Ray(_Registered):
    """Puts the function into Ray's store once a run; each worker unpickles it once."""

    def effective_n_jobs(self, n_jobs: int) -> int:
        ray = importlib.import_module("ray")
        if not ray.is_initialized():
            ray.init()  # as joblib's backend would, a moment later
        return super().effective_n_jobs(n_jobs)

    def stored(self, function: _LoadedFunction) -> Any:
        return importlib.import_module("ray").put(function)

    def read(self, batch: _Batch, outcome: Any) -> _Failure | None:
        try:
            return super().read(batch, outcome)
        except Exception as error:  # an actor has died, which Ray does not replace
            _raise_if_of_handler(error)
            failure = _Failure(error, ends_run=True)
            failure.suspects = range(len(batch.tasks))
            return failure

    def end(self, *, kill: bool) -> None:
        if importlib.import_module("ray").is_initialized():  # or it would be started
            super().end(kill=kill)


# ---- Dask ----------------------------------------------------------------------------


class _Dask(_Engine):
    """Sends batches by the client itself: joblib's backend scatters the tasks.

    What is scattered is lost with its worker, and joblib (1.5.0 to 1.6.0) does not
    report that; nor does it release the results of a run that is closed early. Here
    batches are calls, and so is the function: Dask computes it again if it is lost.
    """

    look_again = 2

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.client = backend.client
        self.futures: set[Any] = set()  # of batches that are out
        self.function_future: Any = None
        self.over = threading.Event()

    def sends_results(self, n_jobs: int, asks: Any) -> bool:
        return True  # whatever n_jobs is

    def effective_n_jobs(self, n_jobs: int) -> int:
        # With one worker, tasks would run in this process, not on the cluster. With
        # none, joblib raises an exception.
        workers = super().effective_n_jobs(n_jobs)
        return workers and max(workers, 2)

    def start(self, run: _Run) -> None:
        self.next_look = time.monotonic() + self.look_again
        self.dump = _make_dump(_common_reducers())
        payload = self.pickled_function(run.task_func)
        function = _LoadedFunction(payload, run.returns_errors, {"backend": "dask"})
        self.function_future = self.call(-1, _InWorker("_of_known_type"), function)
        self.is_handed_out = asyncio.Event()
        self.counted = self.workers  # threads of all workers, when last asked
        self.hand_out_function()

    def has_changed(self) -> bool:
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + self.look_again
            # The scheduler may never answer: do not wait for it.
            self.client.loop.add_callback(self.count_workers)
        if self.workers == self.counted:
            return False
        self.workers = self.counted
        self.hand_out_function()
        return True

    def check(self) -> None:
        if self.client.status in ("closing", "closed"):
            raise RuntimeError("the client of Dask has been closed")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        # joblib's own fails for the second run that a task has open, and does not
        # rejoin after one that is left.
        if not _seceded.is_out:
            # Fails if this is no thread of a task, or if the task has seceded itself.
            with contextlib.suppress(Exception):
                importlib.import_module("dask.distributed").secede()
                _seceded.is_out = True
        _seceded.runs.add(self)
        try:
            yield
        finally:
            _seceded.runs.discard(self)
            if _seceded.is_out and not _seceded.runs:
                _seceded.is_out = False
                importlib.import_module("dask.distributed").rejoin()

    def hand_out_function(self) -> None:
        self.client.loop.add_callback(self.copy_to_workers, self.function_future)

    def tasks_to_send(self, batch: _Batch) -> list[Any]:
        # What the user has scattered stays where it is: its key replaces it.
        futures = [self.backend.data_futures.get(id(task)) for task in batch.tasks]
        batch.scattered = {str(f.key): f for f in futures if f is not None}
        return [
            task if future is None else str(future.key)
            for task, future in zip(batch.tasks, futures, strict=True)
        ]

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        arguments = [batch.messages, batch.scattered]
        state = self.function_future, batch.number, arguments, report
        self.client.loop.add_callback(self.run, *state)

    def end(self, *, kill: bool) -> None:
        self.over.set()
        if kill and self.client.status == "running":
            self.client.cancel([*self.futures, *filter(None, [self.function_future])])
        self.futures.clear()
        self.function_future = None  # so that the cluster releases it

    def call(self, number: int, *call: Any) -> Any:
        """Have the cluster call something; return the future."""
        # Dask takes tasks of one name for one kind: these are shared out evenly.
        name = "function" if number < 0 else "batch"
        options = self.backend.submit_kwargs
        # Without a priority, calls that are submitted together may be run in any order.
        options = {**options, "priority": options.get("priority", 0) - number * 1e-6}
        config = importlib.import_module("dask").config
        # Dask would warn of large tasks; but they have to be sent in some way.
        limit = {"distributed.admin.large-graph-warning-threshold": "1TB"}
        with _configuring_dask, config.set(limit):
            return self.client.submit(
                *call, key=f"{name}-{uuid.uuid4().hex}", **options
            )

    # These are called on the event loop of the client.

    async def count_workers(self) -> None:
        """Find out how many threads all workers have."""
        with contextlib.suppress(Exception):  # the client has been closed, say
            self.counted = max(2, sum((await self.client.ncores()).values()))

    async def copy_to_workers(self, function_future: Any) -> None:
        """Copy the function to all workers of the moment.

        Dask has a call run where its arguments are, and moves calls to idle workers
        only if earlier calls of the same name took long.
        """
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await function_future.exception(asynchronous=True)
            # A worker that does not answer must not keep the others from work.
            copying = self.client.replicate([function_future], asynchronous=True)
            await asyncio.wait_for(copying, _PATIENCE)
        self.is_handed_out.set()

    async def run(
        self, function_future: Any, number: int, arguments: Any, report: _ReportFunction
    ) -> None:
        """Have a batch run, and report its outcome."""
        future: Any = None
        try:
            # Calls that wait for the function on the cluster would be run in any order.
            await self.is_handed_out.wait()
            if not self.over.is_set():
                apply = importlib.import_module("dask.utils").apply
                future = self.call(number, apply, function_future, arguments)
                self.futures.add(future)
                if self.over.is_set():  # meanwhile
                    await self.client.cancel([future], asynchronous=True)
                report(await self.client.gather(future, asynchronous=True))
        except BaseException as error:
            # Without the function, no other batch could be run, either.
            is_lost = function_future.status in ("cancelled", "error")
            report(_Failure(error, ends_run=is_lost))
        self.futures.discard(future)


class _Seceded(threading.local):
    """For a thread of a Dask worker: the runs that its task has open."""

    def __init__(self) -> None:
        self.runs: weakref.WeakSet[_Dask] = weakref.WeakSet()
        self.is_out = False  # of the pool of threads: the worker has started another


_seceded = _Seceded()
_configuring_dask = threading.Lock()


# --------------------------------------------------------------------------------------
# What is sent: the function, tasks, results and exceptions.
#
#    a message      a list of tasks, as one pickle: so what they share is sent once. If
#                   it cannot be pickled or unpickled, each task is a list of its own.
#    a reply        a byte that tells its kind; then a list of results, as one pickle,
#                   if the program can unpickle them without fail: see _PlainPickler. If
#                   some are of classes of the program, a dict of these, the list and
#                   its length. Otherwise a tuple: each result as a pickle of its own,
#                   so that one that cannot be unpickled costs no other; or, in its
#                   place, a packed exception. If the function cannot be unpickled, or
#                   the worker fails, a pair: what has failed, and a packed exception.

# First bytes of messages: a list of tasks, or of one; the function of a run; to drop
# that, since its run has ended.
_MANY_TASKS, _ONE_TASK, _FUNCTION, _FORGET = b"n", b"1", b"F", b"-"

# First bytes of replies. The worker is ready; some results, with more to come; the last
# ones; the last ones, since a task has failed and errors are to be raised.
_READY, _MORE, _DONE, _STOPPED = b"r", b"+", b".", b"!"

# More of them. The tasks of a message cannot be unpickled together; or the function
# cannot; or the worker itself has failed, and leaves.
_UNREADABLE, _NO_FUNCTION, _BROKEN = b"?", b"f", b"x"


class _InThread(threading.local):
    """What a thread is doing."""

    classes: Any = None  # of the reply that is being unpickled
    is_loading = False  # a worker imports, unpickles or calls an initializer


_in_thread = _InThread()


class _WorkerTraceback(Exception):
    """The text of a traceback from elsewhere, as the cause of an exception."""


def _set_cause(error: BaseException, text: str) -> None:
    # As `raise ... from` would, though the class may refuse an assignment.
    set_cause: Any = BaseException.__cause__
    set_cause.__set__(error, _WorkerTraceback(f'\n"""\n{text}\n"""'))


def _make_dump(reducers: Any) -> Any:
    """Return a function that pickles like joblib.

    It has one pickler, since to make one is slow.
    """
    kind: Any = _loky("backend.reduction").get_loky_pickler()
    buffer = pickler = cast("Any", None)

    def dump(value: Any, prefix: bytes = b"") -> bytes:
        nonlocal buffer, pickler
        if pickler is None:
            buffer = io.BytesIO()
            pickler = kind(buffer, reducers=reducers, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            buffer.write(prefix)
            pickler.dump(value)
            return bytes(buffer.getvalue())
        finally:
            # A memo table never shrinks, and a large one takes long to clear. A buffer
            # for which there was no memory is closed.
            if buffer.closed or buffer.tell() > _LARGE_PICKLE:
                pickler = None
            else:
                pickler.clear_memo()
                buffer.seek(0)
                buffer.truncate()

    return dump


_LARGE_PICKLE = 30_000  # bytes


def _common_reducers() -> dict[Any, Any]:
    return {
        types.CodeType: _reduce_code,
        type(functools.cache(abs)): _reduce_cached,
        # A function of functools.singledispatch has one.
        weakref.WeakKeyDictionary: lambda known: (type(known), (dict(known),)),
        **_array_reducers(_reduce_to_copy),
    }


def _reduce_cached(function: Any) -> Any:
    """Reduce what lru_cache has made as cloudpickle does a function; without the cache.

    That is: to its name, if workers can import it from there.
    """
    by_value = _cloudpickle().list_registry_pickle_by_value()
    module = function.__module__ or ""  # a method of a built-in type has none
    names = itertools.accumulate(module.split("."), "{}.{}".format)
    is_by_value = {"__main__", *by_value}.intersection(names)
    if _is_found_by_name(function) and not is_by_value:
        return function.__reduce__()
    settings = function.__wrapped__, function.cache_parameters()
    return _InWorker("_cached"), settings, vars(function)


def _is_found_by_name(value: Any) -> bool:
    """Return whether a function or class is what its name means in its module."""
    found: Any = functools.reduce(
        lambda owner, name: getattr(owner, name, None),
        getattr(value, "__qualname__", "").split("."),  # a partial has none
        sys.modules.get(value.__module__),
    )
    return found is value


def _cached(function: Any, settings: dict[str, Any]) -> Any:
    return functools.lru_cache(**settings)(function)


def _reduce_code(code: types.CodeType) -> Any:
    """Reduce code as cloudpickle does, but keep the file name, for tracebacks."""
    table = _loky("backend.reduction").get_loky_pickler().dispatch_table
    function, arguments, *_ = table[types.CodeType](code)
    name = "<dynamic-code>"
    return function, tuple(
        code.co_filename if type(a) is str and a == name else a for a in arguments
    )


def _loky(module: str) -> Any:
    return importlib.import_module(f"joblib.externals.loky.{module}")


@functools.cache
def _cloudpickle() -> Any:
    try:
        return importlib.import_module("joblib.externals.cloudpickle")
    except ImportError:  # joblib 1.6
        return importlib.import_module("cloudpickle")


def _pickling_error(
    what: str, error: BaseException, value: Any, dump: Any
) -> pickle.PicklingError:
    """Return an exception that says what cannot be pickled, and where in *value* it is.

    Python 3.14 says that itself, by notes.
    """
    message = f"{what}: {_error_line(error)}"
    is_of_pickle = isinstance(error, (AttributeError, TypeError, pickle.PicklingError))
    if is_of_pickle and not hasattr(error, "__notes__"):
        names = _names_on_the_way(value, dump)
        message += f", which is reached by {', '.join(names)}" if names else ""
    return _caused(pickle.PicklingError(message), error)


def _names_on_the_way(value: Any, dump: Any) -> list[str]:
    """Return the names and indices by which what cannot be pickled is reached."""
    names: list[str] = []
    way, due = [value], time.monotonic() + 0.1
    while len(way) < 20:  # it may be nested deeply
        for name, part in _parts(way[-1]):
            try:
                dump(part)
            except Exception as error:
                _raise_if_of_handler(error)
                if not any(part is other for other in way):  # else it is a cycle
                    names += [] if name is None else [_short_repr(name)]
                    way.append(part)
                    break
            if time.monotonic() > due:
                return names
        else:
            break
    return names


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """Return what is pickled with a value, by names, or None where it has no name."""
    try:
        if isinstance(value, dict):
            return [*value.items()]
        if isinstance(value, (list, tuple)):
            return [*enumerate(value)]
        if isinstance(value, types.FunctionType):
            used = inspect.getclosurevars(value)
            return [*used.nonlocals.items(), *used.globals.items()]
        # The arguments of a call, a state and, perhaps, items: see object.__reduce__
        _, *parts = value.__reduce_ex__(4)
        tuples = [part if type(part) is tuple else (part,) for part in parts]
        return [(None, part) for part in itertools.chain(*tuples)]
    except Exception as error:
        _raise_if_of_handler(error)
        return []


def _caused(failure: E, error: BaseException) -> E:
    """Return an exception with its cause."""
    # Without the frame that has caught it, which will refer to this exception.
    trace = error.__traceback__
    BaseException.with_traceback(error, trace and trace.tb_next)
    failure.__cause__ = error
    return failure


def _unpickling_error(what: str, error: BaseException) -> pickle.UnpicklingError:
    """Return an exception that says what cannot be unpickled, and what to do."""
    message = f"{what}: {_error_line(error)}"
    trace: Any = error.__traceback__
    if isinstance(error, ImportError):
        message += (
            ": install it where the workers are, or have the module sent with what "
            f"is of it, by {_cloudpickle().__name__}.register_pickle_by_value"
        )
    elif isinstance(error, AttributeError) and not trace.tb_next:  # of pickle itself
        message += (
            ": other processes cannot make what the program has wrapped or made with "
            "slots: put it into a module"
        )
    return _caused(pickle.UnpicklingError(message), error)


def _error_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def _message(tasks: list[Any], dump: Any) -> bytes:
    return bytes(dump(tasks, _ONE_TASK if len(tasks) == 1 else _MANY_TASKS))


def _is_unreadable(outcome: Any) -> bool:
    """Return whether tasks of a batch are to be sent again, one by one."""
    return isinstance(outcome, list) and outcome[-1:] == [_UNREADABLE]


class _PlainPickler(pickle.Pickler):
    """Pickles what the program can certainly unpickle; for all else it raises.

    That is: plain values and their containers, arrays and scalars of numpy, and objects
    of classes of the program that are pickled by default. The classes are indices into
    *classes*, since to pickle one takes longer than a small result.
    """

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.classes: list[type] = []

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        numpy: Any = sys.modules.get("numpy")
        if kind in self.classes or value is _class_at:
            return NotImplemented
        if isinstance(value, type) and value in self.classes:
            return _class_at, (self.classes.index(value),)
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            if kind is numpy.ndarray and not value.dtype.hasobject:
                if _reduce_to_mapping_of_user(value) is None:
                    return _reduce_to_copy(value)
            elif kind is not numpy.void and isinstance(value, numpy.generic):
                return NotImplemented
        elif kind is complex or value is complex or _is_of_numpy(value):
            return NotImplemented  # these are pickled by calls of what the program has
        elif _is_pickled_by_default(kind):
            self.classes.append(kind)
            return NotImplemented
        raise pickle.PicklingError


def _is_of_numpy(value: Any) -> bool:
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).partition(".")[0] == "numpy"


def _is_pickled_by_default(kind: Any) -> bool:
    """Return whether this is a class of the program that says nothing of pickling."""
    return kind.__module__ == "__main__" and all(
        getattr(kind, name, None) is getattr(object, name, None)
        for name in (
            *("__new__", "__reduce__", "__reduce_ex__", "__getstate__"),
            *("__getnewargs__", "__getnewargs_ex__", "__setstate__", "__slots__"),
            *("__getattr__", "__getattribute__"),
        )
    )


def _share_changeable(values: list[Any]) -> bool:
    """Return whether something that can be changed is in *values* twice.

    Results are not to share it, since others are in the same reply by chance only. This
    goes down level by level, counting what can be changed: if there are fewer ids than
    values, one is there twice.
    """
    most, count = 100 * len(values), 0
    ids: set[int] = set()
    while (kinds := {type(value) for value in values}) - _PLAIN:
        kinds = kinds - _UNCHANGEABLE
        if kinds:
            changeable = [value for value in values if type(value) in kinds]
            ids.update(map(id, changeable))
            count += len(changeable)
        values = gc.get_referents(*values)
        if not kinds <= _CONTAINERS:
            values = [value for value in values if not isinstance(value, type)]
        if len(ids) < count or len(values) > most:  # finding out may take too long
            return True
    return False


# Types whose values refer to no others; types of what cannot be changed; containers.
_PLAIN = frozenset((bool, bytes, complex, float, int, str, type(None)))
_UNCHANGEABLE = _PLAIN | {tuple, frozenset}
_CONTAINERS = frozenset((dict, list, set))


class _ReplyPickler:
    """Pickles the replies of a worker."""

    def __init__(self, reducers: Any, page: Any, user_reducers: Any = None) -> None:
        self.dump = _make_dump({**reducers, **(user_reducers or {})})
        self.page = page  # see _BEGUN
        self.takes_plain = not user_reducers  # else these have a say

    def reply(self, kind: bytes, results: list[Any]) -> bytes:
        """Return the reply that has these results, some of which may be _NoResult."""
        plain = self.plain_reply(kind, results) if self.takes_plain else None
        if plain is not None:
            return plain
        parts = [self.packed(result) for result in results]
        while True:
            try:
                return kind + pickle.dumps(tuple(parts), pickle.HIGHEST_PROTOCOL)
            except MemoryError as error:  # leave out the largest
                sizes = [len(part) if type(part) is bytes else 0 for part in parts]
                if not any(sizes):
                    raise
                parts[sizes.index(max(sizes))] = self.packed_error(error)

    def plain_reply(self, kind: bytes, results: list[Any]) -> bytes | None:
        """Return a reply that the program can certainly unpickle, if there is one."""
        buffer = io.BytesIO()
        buffer.write(kind)
        with contextlib.suppress(Exception):  # other values, or nested too deeply
            pickler = _PlainPickler(buffer)
            pickler.dump(results)
            if len(results) > 1 and _share_changeable(results):
                return None
            if not pickler.classes:
                return buffer.getvalue()
            classes = [self.dump(known) for known in pickler.classes]
            content = {
                "classes": classes,
                "results": buffer.getvalue()[1:],
                "count": len(results),
            }
            return kind + pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
        return None

    def packed(self, result: Any) -> Any:
        if type(result) is _NoResult:
            return result.error
        self.page[_PICKLED] += 1  # each result has a time limit of its own
        try:
            return self.dump(result)
        except BaseException as error:
            return self.packed_error(error, result)

    def packed_error(self, error: BaseException, result: Any = None) -> Any:
        what = "the result cannot be pickled"
        failure = _pickling_error(what, error, result, self.dump)
        return _pack_error(failure, self.dump)


def _read_results(received: Any) -> list[Any]:
    """Return the results of a reply, with _NoResult in place of those that are lost."""
    if type(received) is tuple:
        return [
            _loaded(part) if type(part) is bytes else _NoResult(_unpacked_error(part))
            for part in received
        ]
    if type(received) is dict:
        in_thread = _module_of_workers()._in_thread
        lost: dict[type, _NoResult] = {}
        in_thread.classes = [_loaded_class(data, lost) for data in received["classes"]]
        loaded = _loaded(received["results"])
        in_thread.classes = None
        if type(loaded) is _NoResult:
            return [loaded] * received["count"]
        if lost:
            return [_lost_class_in(result, lost) or result for result in loaded]
        received = loaded
    return cast("list[Any]", received)


class _ResultUnpickler(pickle.Unpickler):
    """Leaves classes as they are that *is_here* knows.

    cloudpickle sends the state of a class with it, which in a worker may be another
    one, and whose functions have global variables of their own.
    """

    def __init__(self, data: bytes, is_here: Callable[[Any], bool]) -> None:
        super().__init__(io.BytesIO(data))
        self.is_here = is_here

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if found is not _private(_cloudpickle().cloudpickle, "_class_setstate"):
            return found
        return lambda kind, state: kind if self.is_here(kind) else found(kind, state)


def _load(data: bytes, is_here: Callable[[Any], bool]) -> Any:
    if b"_class_setstate" not in data:
        return pickle.loads(data)  # which is faster
    return _ResultUnpickler(data, is_here).load()


def _loaded(data: bytes) -> Any:
    """Return what was pickled, or _NoResult."""
    try:
        return _load(data, _is_found_by_name)
    except (Exception, SystemExit, GeneratorExit) as error:
        _raise_if_of_handler(error)
        what = "the result cannot be unpickled"
        return _NoResult(_unpickling_error(what, error))


def _loaded_class(data: bytes, lost: dict[type, _NoResult]) -> type:
    """Unpickle a class; if that fails, return another one, whose objects are *lost*.

    Its objects are unpickled by default, so that any class will do.
    """
    loaded = _loaded(data)
    if type(loaded) is _NoResult:
        failed, loaded = loaded, type("Lost", (), {})
        lost[loaded] = failed
    return cast("type", loaded)


def _lost_class_in(result: Any, lost: dict[type, _NoResult]) -> _NoResult | None:
    """Return _NoResult if a result has an object of a class that is lost."""
    values, seen = [result], {id(result)}
    while values:
        for value in values:
            if type(value) in lost:
                return lost[type(value)]
        found = {id(v): v for v in gc.get_referents(*values) if not isinstance(v, type)}
        values = [found[key] for key in found.keys() - seen]
        seen |= found.keys()
    return None


def _class_at(index: int) -> Any:
    # Not what has this name here: the program may have reloaded this file.
    return _module_of_workers()._in_thread.classes[index]


def _module_of_workers() -> Any:
    """Return the module of this file by the name that it has in workers.

    In the program, `_class_at` is unpickled by that name; in a worker, other copies of
    this file find out by it what the worker does.
    """
    if _NAME_IN_WORKERS not in sys.modules:
        module = types.ModuleType(_NAME_IN_WORKERS)
        vars(module).update(globals())  # for workers that are threads of this process
        sys.modules.setdefault(_NAME_IN_WORKERS, module)
    return sys.modules[_NAME_IN_WORKERS]


def _pack_error(error: Any, dump: Any) -> Any:
    """Return an exception in a form that can be unpickled: see `_unpacked_error`."""
    kind: Any = type(error)
    summary = _text_of(kind, lambda: traceback.format_exception_only(kind, error))
    text = _text_of(kind, lambda: _lines_of_traceback(error))
    # Many a class cannot be called with the `args` that it has passed to its base, as
    # pickle would. Then it is sent with what its built-in base class would pickle.
    # (A class has the module "builtins", too, if it was made by exec() without a name.)
    bases = (b for b in kind.__mro__ if getattr(builtins, b.__name__, None) is b)
    builtin: Any = next(bases)
    data, members = _dumped_error(error, error, dump), None
    if data is None and issubclass(kind, BaseExceptionGroup):
        members = [_pack_error(member, dump) for member in error.exceptions]
        form = builtin, kind, (error.message,), vars(error)
        data = _dumped_error(error, form, dump)
    elif data is None:
        data = _dumped_error(error, (builtin, *builtin.__reduce__(error)), dump)
    return data, members, summary, text


def _text_of(kind: type, format_lines: Callable[[], Iterable[str]]) -> str:
    try:
        text = "".join(format_lines()).strip()
        return text.encode(errors="backslashreplace").decode()
    except Exception:  # methods of the exception may fail
        return f"{kind.__module__}.{kind.__qualname__}, which cannot be shown"


def _lines_of_traceback(error: BaseException) -> Iterator[str]:
    """Return the lines of a traceback, without the frames of this file."""
    whole = traceback.TracebackException.from_exception(error)
    part: Any = whole
    while part is not None:
        frames = [f for f in part.stack if f.filename != _CODE.co_filename]
        part.stack = traceback.StackSummary.from_list(frames)
        part = part.__cause__ or part.__context__
    return whole.format()


def _dumped_error(error: Any, form: Any, dump: Any) -> Any:
    """Return a pickle of *form*, which stands for an exception; or None."""
    with contextlib.suppress(BaseException):
        data = dump(form)
        loaded = _load(data, lambda kind: True)
        if form is not error or repr(loaded.args) == repr(error.args):
            return data
    return None


def _unpacked_error(packed: Any) -> BaseException:
    """Return an exception that was packed, with the text of its traceback."""
    data, members, summary, text = packed
    error: BaseException
    try:
        form = _load(data or b"", _is_found_by_name)  # without data, this fails
        if members is not None:
            builtin, kind, args, state = form
            form = builtin, kind, (*args, [*map(_unpacked_error, members)]), state
        error = form if isinstance(form, BaseException) else _rebuilt_error(*form)
    except Exception as caught:
        _raise_if_of_handler(caught)
        message = f"a task raised an exception that cannot be pickled: {summary}"
        error = RuntimeError(message)
    _set_cause(error, text)
    return error


def _rebuilt_error(builtin: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Make an exception by the methods of its built-in base class alone."""
    error = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    for name, value in (state or {}).items():
        object.__setattr__(error, name, value)  # also if the class is frozen
    return error


# --------------------------------------------------------------------------------------
# What runs in a worker.
#
# Workers need not have this file, and never import it: they are sent its code, and
# execute that as a module of another name. The first few lines are sent as text, since
# the worker may run another version of Python.

_CODE: Any = cast("Any", inspect.currentframe()).f_code  # of this very file

_LOADER = """
def load(magic, version, name, code):
    import importlib.util, marshal, sys, types
    if magic != importlib.util.MAGIC_NUMBER:
        found = sys.version.split()[0]
        raise ImportError(f"the program runs Python {version}, a worker {found}")
    if name not in sys.modules:
        module = types.ModuleType(name)
        exec(marshal.loads(code), module.__dict__)
        sys.modules.setdefault(name, module)
    return sys.modules[name]
"""


# The name that the module of this file has in workers.
_NAME_IN_WORKERS = "_joblib_batches_" + __version__.replace(".", "_")


@functools.cache
def _code_to_send() -> tuple[bytes, str, str, bytes]:
    """Return the arguments of `load`, above."""
    version, code = sys.version.split()[0], marshal.dumps(_CODE)
    return importlib.util.MAGIC_NUMBER, version, _NAME_IN_WORKERS, code


class _InWorker:
    """A function of this file; is unpickled as the one that a worker has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        return globals()[self.name](*arguments)

    def __reduce__(self) -> Any:
        names = {"source": _LOADER, "arguments": _code_to_send(), "name": self.name}
        return eval, ("(exec(source), getattr(load(*arguments), name))[1]", names)


class _ByName(_InWorker):
    """A function of this file, where its module is known to have been loaded."""

    def __reduce__(self) -> Any:
        names = {"module": _NAME_IN_WORKERS, "name": self.name}
        return eval, ("getattr(__import__(module), name)", names)


def _run_in_thread(task_func: Any, returns_errors: bool, tasks: list[Any]) -> Any:
    """Return the results of tasks, and how long it took."""
    start = time.perf_counter()

    def failed(error: BaseException) -> _NoResult:
        trace = sys.exc_info()[2]
        # Without the frame of _run_tasks, which would refer to it, too.
        return _NoResult(BaseException.with_traceback(error, trace and trace.tb_next))

    numbered = zip(itertools.repeat(0), tasks)  # nobody reads the numbers
    results, _ = _run_tasks(task_func, returns_errors, numbered, failed, [0])
    return results, time.perf_counter() - start


def _run_tasks(
    task_func: Any,
    returns_errors: bool,
    numbered: Iterator[tuple[int, Any]],
    failed: Callable[[BaseException], _NoResult],
    page: Any,
    send: Any = None,
) -> tuple[list[Any], bool]:
    """Return the results of tasks, and whether a failed task is the last one to be run.

    The number of each task is written to the *page* before it begins. If there is
    *send*, it is called every few milliseconds with the results so far, which are not
    returned then.
    """
    results: list[Any] = []
    # monotonic() changes every 16 ms on Windows, before Python 3.13.
    append, clock = results.append, time.perf_counter
    due = math.inf if send is None else clock() + _SEND_EVERY
    while True:
        try:
            if send is None:
                # Each step writes the number of the task, and then the task runs. After
                # an exception, this goes on behind that task.
                for page[_BEGUN], task in numbered:
                    append(task_func(task))
                return results, False
            for page[_BEGUN], task in numbered:
                append(task_func(task))
                if clock() >= due:
                    break
            else:
                return results, False
        except BaseException as error:
            append(failed(error))
            if not returns_errors or _leaves_debugger(error):
                return results, True
        # Not inside `try`: what is raised here is none of a task.
        if send is not None and clock() >= due:
            send(results)
            results.clear()
            due = clock() + _SEND_EVERY


def _numbered(tasks: list[Any], begun: int = 0) -> Iterator[tuple[int, Any]]:
    """Return an iterator of the tasks that have not begun, and their numbers."""
    # To make an integer takes longer than to write it to memory.
    if len(_NUMBERS) < len(tasks):
        _NUMBERS.extend(range(len(_NUMBERS) + 1, len(tasks) + 1))
    return zip(
        _NUMBERS[begun:] if begun else _NUMBERS, tasks[begun:] if begun else tasks
    )


# From 1 on. Threads of Dask may add to it at once: then it is not in order, but long
# enough, and nobody reads their numbers.
_NUMBERS: list[int] = []


def _leaves_debugger(error: Any) -> bool:
    """Return whether somebody has quit pdb, which is to end the program."""
    return issubclass(type(error), getattr(sys.modules.get("bdb"), "BdbQuit", ()))


class _LoadedFunction:
    """The function of a run, in a worker.

    A worker of Dask is a process with threads. Each thread has a copy of its own, since
    a model is not made to be shared. The copies are freed with this object.
    """

    def __init__(self, payload: bytes, returns_errors: bool, config: Any) -> None:
        self.payload = payload
        self.returns_errors = returns_errors
        self.config = config  # of joblib, for what tasks start by it
        self.kept = threading.local()

    def __reduce__(self) -> Any:
        settings = self.payload, self.returns_errors, self.config
        return _InWorker("_LoadedFunction"), settings

    def load(self, dump: Any) -> bytes:
        """Unpickle the function, if this thread has not; return the reply to that."""
        if not hasattr(self.kept, "task_func"):
            try:
                with _Loading():
                    self.kept.task_func = pickle.loads(self.payload)
            except BaseException as error:
                what = "task_func cannot be unpickled in a worker"
                packed = _pack_error(_unpickling_error(what, error), dump)
                return _NO_FUNCTION + pickle.dumps(("a worker has failed", packed))
        return _READY

    def answer(
        self,
        messages: list[bytes],
        pickler: _ReplyPickler,
        scattered: Any = None,
        send: Any = None,
    ) -> bytes:
        """Run the tasks of a message, which is taken off the list; return the reply.

        *scattered* has tasks that were not sent, by the keys that replace them.
        """

        def failed(error: BaseException) -> _NoResult:
            return _NoResult(_pack_error(error, pickler.dump))

        page = pickler.page
        message, begun = messages.pop(), page[_BEGUN]
        is_one = message[:1] == _ONE_TASK
        try:
            if is_one:
                page[_BEGUN] += 1  # to unpickle it is part of the task
            with _Loading():
                tasks: Any = pickle.loads(memoryview(message)[1:])
        except BaseException as error:
            if not is_one:
                return _UNREADABLE
            what = "the task cannot be unpickled in a worker"
            lost = failed(_unpickling_error(what, error))
            page[_ENDED] = page[_BEGUN]
            return pickler.reply(_DONE if self.returns_errors else _STOPPED, [lost])
        del message
        if scattered:
            tasks = [scattered.get(t, t) if type(t) is str else t for t in tasks]
        numbered = _numbered(tasks, begun)
        del tasks
        arguments = self.kept.task_func, self.returns_errors, numbered, failed
        results, is_stopped = _run_tasks(*arguments, page, send)
        page[_ENDED] = page[_BEGUN]  # what follows has a time limit of its own
        return pickler.reply(_STOPPED if is_stopped else _DONE, results)

    def __call__(self, messages: list[Any], scattered: Any = None) -> list[Any]:
        """Return the replies to messages: in workers of Dask, and of others."""
        with joblib.parallel_config(**self.config):
            pickler = _ReplyPickler(_common_reducers(), [0, 0, 0, 0])
            if (reply := self.load(pickler.dump)) != _READY:
                return [reply]
            replies: list[Any] = []
            start = time.perf_counter()
            for message in messages:  # None: it could not be pickled
                pickler.page[_BEGUN] = 0
                answer = None
                if message is not None:
                    answer = self.answer([message], pickler, scattered)
                replies.append(answer)
                if not self.returns_errors and (not answer or answer[:1] != _DONE):
                    break
            replies.insert(0, time.perf_counter() - start)
            return replies


class _Loading:
    """Surrounds what a worker does that may import modules of the program."""

    def __enter__(self) -> None:
        _in_thread.is_loading = True

    def __exit__(self, *_: object) -> None:
        _in_thread.is_loading = False


def _of_known_type(function: Any) -> Any:
    """Wrap a function: Dask's scheduler unpickles its type, and does not know ours."""
    return functools.partial(function)


_last_function: dict[str, Any] = {}  # of a worker of another backend; by its key


def _answer_in_worker(key: str, function: Any, messages: list[Any]) -> list[Any]:
    """Run a batch by the function of the run *key*; the worker keeps one function."""
    loaded = _last_function.get(key)  # once: there may be other threads
    if loaded is None:
        if not isinstance(function, _LoadedFunction):  # a reference of Ray
            function = importlib.import_module("ray").get(function)
        loaded = function
        _last_function.clear()
        _last_function[key] = loaded
    return cast("list[Any]", loaded(messages))


# --------------------------------------------------------------------------------------
# Worker processes.
#
#    the consumer's thread            an attendant                     a worker process
#                                     (a thread of the program)        _serve()
#   +---------------------+          +---------------------+          +----------------+
#   | pickle the tasks ---|-> jobs ->| take a job          |          |                |
#   |                     |          | send the function,  |          | unpickle it,   |
#   |                     |          |   if it is new -----|--------->|   keep it      |
#   |                     |          | send the tasks -----|--------->| _run_tasks()   |
#   | unpickle results <--|- inbox <-| receive the reply <-|----------|   and send     |
#   +---------------------+          +---------------------+          +----------------+
#                                         reads  ^-------- page of memory <--- writes
#
# A worker has one connection, which its attendant alone reads and writes here, in turn:
# so nothing can deadlock, whatever the size of messages. Attendants move bytes. All
# attendants of a pool take jobs from one queue, so that a free worker takes the next,
# and workers go on while the consumer is elsewhere.
#
# A worker and its attendant share a page of memory, in which the worker counts the
# tasks of its batch. So the attendant sees a task that takes too long, and, when the
# worker is lost, which task was running. With errors="return", a fresh worker is sent
# the same message and goes on behind that task; none is run twice. The consumer is sent
# one report, when all tasks of the batch are done.
#
# An attendant refers to its worker and to the queue, not to the pool: a pool that
# nobody refers to, since an interrupt came in between, is collected, and so stopped.

# Seconds that a worker has to leave when it is told to, and for other short waits.
_PATIENCE = 3

# Seconds that it has to start; with a *timeout*, the larger of the two; without a
# *timeout*, there is no limit.
_START_PATIENCE = 60

# The numbers in the page of a worker:
# - how many tasks of its message have begun;
# - how many of these had ended when it last began to send results: if that is less, a
#   task is running, else the worker is sending;
# - how many results were pickled by themselves;
# - how many nanoseconds the message took, written at its end.
# The worker writes them. While it has no tasks, the attendant writes to the first two
# how many have begun in workers that were lost.
_BEGUN, _ENDED, _PICKLED, _NANOSECONDS = 0, 1, 2, 3
_PAGE_BYTES = 32

# Seconds after which a worker sends the results that it has, if the run asks for that.
_SEND_EVERY = 0.003

# How often in a row, for each worker of a run, a process may be lost before it begins a
# task.
_MAX_FAILURES = 3


# To a type checker, the base may be anything: hence the "ignore".
class _Resolver(joblib.parallel.ParallelBackendBase):  # type: ignore[misc]
    """A backend by which `joblib.Parallel` finds out what the user has configured."""

    supports_retrieve_callback = True

    def effective_n_jobs(self, n_jobs: int) -> int:
        return n_jobs

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        self.options = options
        return n_jobs


class _Processes(_Engine):
    """Gives each run worker processes of its own, as many as it asked for.

    They are kept for the next run that wants the same.
    """

    more_options = frozenset((*_OF_PROCESSES, "forward_reducers", "backward_reducers"))
    limits_tasks = True
    shared: Any = None  # a _SharedRun
    files: Any = None  # an _ArrayFiles

    def configure(self, n_jobs: int, options: dict[str, Any]) -> Any:
        resolver = _Resolver(nesting_level=self.backend.nesting_level)
        parallel = joblib.Parallel(n_jobs=n_jobs, backend=resolver, **options)
        with parallel:
            options = {**self.backend.backend_kwargs, **resolver.options}
        self.backend.nesting_level = resolver.nesting_level  # for nested()
        self.options = options
        return parallel

    def sends_results(self, n_jobs: int, asks: Any) -> bool:
        return bool(n_jobs != 1 or (asks and self.can_isolate()))

    def can_isolate(self) -> bool:
        return self.effective_n_jobs(2) > 1  # joblib says 1 where none can be started

    def start(self, run: _Run) -> None:
        if _module_of_workers()._in_thread.is_loading:
            raise RuntimeError(
                f"{_importing_module()} starts worker processes while it is loaded in "
                "a worker, and these would start more: guard it by `if __name__ == "
                "'__main__':`"
            )
        self.files = _ArrayFiles(self.options)
        _pickle_main_by_value()
        self.dump = _make_dump({**_common_reducers(), **self.files.reducers})
        payload = self.pickled_function(run.task_func)
        settings: Any = payload, run.returns_errors, {}
        watches = run.returns_errors or run.timeout < math.inf
        self.shared = _SharedRun(self.dump((settings, watches), _FUNCTION), run)
        self.files.of_function, self.files.weight = self.files.kept, 0

    def pack(self, batch: _Batch) -> None:
        self.files.remove_dropped()
        super().pack(batch)
        self.task_weight = self.files.weight / (batch.first + len(batch.tasks))

    def tasks_to_send(self, batch: _Batch) -> list[Any]:
        self.files.kept = batch.arrays  # of what is pickled from now on
        return batch.tasks

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        if self.pool is None:
            self.pool = self.find_pool(run.max_tasks)
        self.pool.submit(_Job(self.shared, batch, report))

    def find_pool(self, max_tasks: float) -> _Pool:
        """Return idle workers of these settings, or a new pool."""
        environment = {**os.environ}
        environment.pop("PYTEST_CURRENT_TEST", None)  # another one in each test
        environment.pop("PYTHONINSPECT", None)  # nobody talks to workers
        options = self.options
        user_reducers = options.get("backward_reducers") or {}
        initializer = options.get("initializer"), options.get("initargs", ())
        dump = _make_dump(_common_reducers())
        try:
            prepared = dump((dump(initializer), user_reducers, self.nested()))
        except Exception as error:
            _raise_if_of_handler(error)
            what = "initializer and initargs cannot be pickled"
            failure = _pickling_error(what, error, initializer, dump)
            failure.add_note(
                "Locks and queues of a multiprocessing.Manager() can be pickled"
            )
            raise failure from error
        recipe = _Recipe(
            environment,
            self.backend.inner_max_num_threads,
            os.getcwd(),
            [*sys.path],
            prepared,
            max_tasks,
            self.workers,
        )
        pool = _take_pool(recipe)
        if pool is None:
            # Only for a new pool: joblib counts cores each time, which is slow.
            limits = _private(self.backend, "_prepare_worker_env")(n_jobs=self.workers)
            pool = _Pool(recipe, limits)
        return pool

    def read(self, batch: _Batch, outcome: Any) -> _Failure | None:
        self.files.kept = []  # it may have been of this batch
        self.files.remove_dropped()
        return super().read(batch, outcome)

    def read_other(self, batch: _Batch, reply: Any) -> _Failure | None:
        if not isinstance(reply, _LostWorker):
            return super().read_other(batch, reply)
        failure, begun, results = reply.failure, reply.begun, batch.results
        if failure.ends_run:
            return failure
        ended = begun - int(reply.was_running)
        if not self.shared.returns_errors:
            failure.suspects = range(
                ended if reply.was_running else len(results), begun
            )
            return failure
        results += [_NoResult(reply.unsent())] * (ended - len(results))
        results += [_NoResult(failure)] * (begun - ended)
        return None

    def explained(self, error: Any, note: str, batch: _Batch) -> BaseException:
        explained = super().explained(error, note, batch)
        has_arrays = batch.arrays or self.files.of_function
        # The cause has the text of the traceback, and of exceptions before this one.
        if has_arrays and _SAYS_READ_ONLY.search(str(explained.__cause__)):
            with contextlib.suppress(Exception):  # a class may refuse notes
                if _READ_ONLY not in explained.__notes__:
                    explained.add_note(_READ_ONLY)
        return explained

    def end(self, *, kill: bool) -> None:
        pool, self.pool = self.pool, None
        if self.shared is not None:
            self.shared.has_ended = True
        try:
            if pool is not None:
                seconds = self.options.get("idle_worker_timeout") or 300
                pool.stop(kill=True) if kill else pool.keep(seconds)
        finally:
            if self.files is not None:
                self.files.close()


def _importing_module() -> str:
    """Return the name of the module that is being imported, or that has called this."""
    stack = traceback.walk_stack(inspect.currentframe())
    frames = [frame for frame, _ in stack if frame.f_globals is not globals()]
    modules = [frame for frame in frames if frame.f_code.co_name == "<module>"]
    names = [frame.f_globals.get("__name__") for frame in [*modules, *frames]]
    others = (name for name in names if name not in (None, "__main__"))
    return str(next(others, "a module"))


@functools.cache
def _pickle_main_by_value() -> None:
    """Let functions of the program be sent by a process that was spawned, too.

    The program is called __mp_main__ there, which no worker can import.
    """
    if "__mp_main__" in sys.modules:
        _cloudpickle().register_pickle_by_value(sys.modules["__mp_main__"])


class _SharedRun:
    """What attendants know of a run: its function, its limits and its failures.

    It does not refer to the run. Attendants change it at the same time, without a lock:
    so a failure, or an earlier `skip_after`, may be lost, which costs no more than
    another try.
    """

    def __init__(self, message: bytes, run: _Run) -> None:
        self.message = message  # the function
        self.limit = run.timeout
        # Seconds for a worker to start, and for what stalls.
        self.patience = max(self.limit, _START_PATIENCE)
        self.returns_errors = run.returns_errors
        self.was_loaded = False  # the function, by a worker
        self.failures = 0  # processes in a row, lost before they began a task
        self.at_work: set[_Process] = set()
        self.skip_after = math.inf  # the number of a batch whose failure ends the run
        self.has_ended = False  # idle workers are to forget it
        self.files: _ArrayFiles = run.engine.files


class _Job:
    """A batch for an attendant, and for another one if its worker is lost too early."""

    def __init__(self, run: _SharedRun, batch: _Batch, report: _ReportFunction) -> None:
        self.run = run
        self.number = batch.number
        self.report = report
        self.messages = deque(batch.messages)  # that are not done
        self.first = len(batch.results)  # tasks of the batch before these
        count = len(batch.tasks) - self.first
        self.size = count if len(self.messages) == 1 else 1  # tasks of a message
        self.begun = 0  # tasks of the first message, in workers that were lost
        # Replies, and the seconds before them; None where a task was not sent; a
        # _LostWorker where a worker was lost.
        self.outcome: list[Any] = []
        self.is_stopped = False  # what is left is not run, since the run ends here

    def done_with_message(self) -> None:
        self.messages.popleft()
        self.first += self.size
        self.begun = 0


class _LostWorker(NamedTuple):
    """In place of a reply: a worker was lost that had begun tasks of a batch."""

    failure: _Failure
    begun: int  # tasks of the batch, by this worker and those before it
    was_running: bool  # the last of these; else the worker was sending results

    def unsent(self) -> _Failure:
        """Return what has become of a task that was done."""
        error: Any = self.failure.error
        kind: Any = BrokenProcessPool
        if isinstance(error, _TaskTimeoutError) and not self.was_running:
            kind = _TaskTimeoutError
        text = "the task was done, but its result was lost with its worker"
        unsent = _Failure(kind(f"{text}: {str(error) or type(error).__name__}"))
        unsent.error.__cause__ = error.__cause__
        return unsent


class _Recipe(NamedTuple):
    """How to start the workers of a pool. Pools of equal recipes are alike."""

    environment: dict[str, str]
    inner_threads: int | None  # of libraries, in each worker
    folder: str
    path: list[str]
    prepared: bytes  # an initializer with its arguments, reducers of results, nesting
    max_tasks: float  # of one worker
    size: int  # of the pool


# What a worker executes first, with the names that _Started passes. `spawn_main` of
# multiprocessing calls `_bootstrap` of the object that it unpickles; *sentinel* is open
# for as long as the program runs.
_STARTER = """
def begin(sentinel):
    import multiprocessing.connection, pickle, sys, traceback
    connection = getattr(multiprocessing.connection, kind)(end)
    try:
        message = connection.recv_bytes()
        try:
            sys.path[:], arguments = pickle.loads(message)
            module = load(*arguments)
        except Exception as error:
            packed = None, None, repr(error), traceback.format_exc()
            failure = "a worker cannot start", packed
            connection.send_bytes(broken + pickle.dumps(failure))
            return
    except (EOFError, OSError):
        return  # the program has ended
    module._serve(connection, page, sentinel)
class Started:
    _bootstrap = staticmethod(begin)
"""


class _Started:
    """Is unpickled as a class whose `_bootstrap` makes the process a worker."""

    def __init__(self, connection: Any, page: Any) -> None:
        kind = type(connection).__name__
        self.names = {"kind": kind, "end": connection.fileno(), "page": page}

    def __reduce__(self) -> Any:
        source = _LOADER + _STARTER
        names = {"source": source, "broken": _BROKEN, **self.names}
        return eval, ("(exec(source), Started)[1]", names)


def _new_page() -> tuple[Any, Any]:
    """Return a file without a name for a page of memory, and its descriptor.

    On Windows, return None and a name for the page.
    """
    if os.name != "posix":
        return None, f"page of {os.getpid()} {uuid.uuid4().hex}"
    try:
        file: Any = os.fdopen(os.memfd_create("tasks begun"), "r+b", buffering=0)
    except (AttributeError, OSError):  # macOS, or it is not permitted
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 # its user closes it
    # Written, since on a full disk a hole in the file would be a SIGBUS.
    file.write(bytes(_PAGE_BYTES))
    return file, file.fileno()


def _mapped_page(name: Any) -> Any:
    """Map the page that a worker and its attendant share."""
    if sys.platform == "win32":
        mapped = mmap.mmap(-1, _PAGE_BYTES, tagname=name)
    else:
        mapped = mmap.mmap(name, _PAGE_BYTES)
    return memoryview(mapped).cast("Q")


class _Process:
    """A worker process, for its attendant.

    Other threads read `popen` and `is_ready`.
    """

    def __init__(self) -> None:
        self.popen: Any = None
        self.connection: Any = None
        self.poller: Any = None  # of the connection
        self.pipe: list[Any] = []  # the process is killed as its writing end is closed
        self.page: Any = None  # of memory, as numbers
        self.patience = 0.0  # seconds for which a message may stall
        self.is_ready = False
        self.run: Any = None  # a _SharedRun, whose function the process has
        self.is_new = False  # the function: no message of it has been answered
        self.done = 0  # tasks that were sent to it

    def launch(self, recipe: _Recipe, environment: dict[str, str]) -> None:
        _occupy_standard_streams()
        self.connection, theirs = multiprocessing.Pipe()
        reader, writer = os.pipe()
        self.pipe = [os.fdopen(reader, "rb", 0), os.fdopen(writer, "wb", 0)]
        _state.ends.update((self.connection, self.pipe[1]))
        file, name = _new_page()
        with theirs, file or contextlib.nullcontext():
            self.page = _mapped_page(name)
            first = pickle.dumps({}) + pickle.dumps(_Started(theirs, name))
            self.pipe[1].write(first)  # much less than a pipe holds
            options = {"env": environment, "cwd": recipe.folder}
            self.popen = _start_python(self.pipe[0], theirs, name, options)
        if os.name == "posix":
            self.pipe.pop(0).close()  # Windows reads from it by another handle
        if hasattr(select, "poll"):  # Connection.poll() makes a selector each time
            self.poller = select.poll()
            self.poller.register(self.connection, select.POLLIN)

    def greet(self, recipe: _Recipe, patience: float) -> None:
        """Send what is no function of a run, and wait until the process is ready."""
        self.limit_stalls(patience)
        key = bytes(multiprocessing.current_process().authkey)  # of managers
        code, settings = (recipe.path, _code_to_send()), (sys.argv, key)
        for message in pickle.dumps(code), pickle.dumps(settings), recipe.prepared:
            self.send(message)
        reply = self.receive(patience)
        if reply != _READY:
            raise _BrokenWorkerError(reply)
        self.is_ready = True

    def has_ended(self) -> bool:
        return self.popen is None or self.popen.poll() is not None

    def send(self, message: bytes) -> None:
        try:
            if os.name == "nt" and len(message) > 4000:  # less always fits into a pipe
                self.send_or_kill(message)
            else:
                self.connection.send_bytes(message)
        except OSError as error:
            # What it has sent says why it does not read; unless it was killed for that.
            was_killed = os.name == "nt" and isinstance(error, BlockingIOError)
            if was_killed or not self.has_message(0):
                raise

    def send_or_kill(self, message: bytes) -> None:
        """Send a message on Windows, where nothing but its end limits a stall."""
        stalled = threading.Event()

        def kill() -> None:
            stalled.set()
            _kill([self.popen])

        timer = threading.Timer(self.patience, kill)
        timer.start()
        try:
            self.connection.send_bytes(message)
        except OSError:
            if stalled.is_set():
                raise BlockingIOError from None
            raise
        finally:
            timer.cancel()

    def receive(self, limit: float, page: Any = None) -> bytes:
        """Return the next message, for which the process has *limit* seconds.

        With a *page*, the time starts anew whenever a number in it has changed. It is
        counted in slices: see _WAIT_SLICE.
        """
        left, seen = limit, page and page.tobytes()
        seconds = min(max(limit / 10, 0.001), _WAIT_SLICE)  # poll() rounds up to 1 ms
        while not self.has_message(seconds):
            # A program that the worker has forked may hold the connection open.
            if self.has_ended() and not self.has_message(0):
                raise EOFError
            left -= seconds
            if page and page.tobytes() != seen:
                left, seen = limit, page.tobytes()
            if left <= 0:
                raise TimeoutError
        return bytes(self.connection.recv_bytes())

    def has_message(self, seconds: float) -> bool:
        if self.poller is None:
            return bool(self.connection.poll(seconds))
        return bool(self.poller.poll(seconds * 1000))

    def limit_stalls(self, patience: float) -> None:
        """Let no send or receive wait for ever for a worker that has stalled in it.

        On Windows, `send` sees to that; and what is received has been sent as a whole.
        """
        self.patience = min(patience, threading.TIMEOUT_MAX)
        if os.name == "posix":
            value = struct.pack("ll", math.ceil(min(patience, 1e9)), 0)
            with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    end.setsockopt(socket.SOL_SOCKET, option, value)
            # That may have changed, by socket.setdefaulttimeout() or gevent.
            os.set_blocking(self.connection.fileno(), True)

    def load(self, run: _SharedRun) -> bytes:
        """Have the process load the function of a run; return its reply to that."""
        if self.run is run:
            return _READY
        self.run, self.is_ready = None, False
        self.limit_stalls(run.patience)
        self.send(run.message)
        reply = self.receive(run.patience)
        self.is_ready = True
        if reply == _READY:
            self.run, self.is_new, run.was_loaded = run, True, True
        elif run.was_loaded:  # elsewhere: so this worker is at fault
            raise _BrokenWorkerError(reply)
        return reply

    def forget(self) -> None:
        """Let an idle process keep nothing of a run that has ended."""
        if self.run is not None and self.run.has_ended:
            self.run = None
            with contextlib.suppress(EOFError, OSError):  # the next job will find out
                self.connection.send_bytes(_FORGET)

    def close(self, *ends: Any) -> None:
        with _state.starting:  # no fork comes in between
            _state.ends.difference_update(ends)
            for end in filter(None, ends):
                end.close()

    def kill(self) -> int | None:
        """Kill it with all that it has started; return its exit code. Repeatable."""
        self.run, self.done, code = None, 0, None
        if self.popen is not None:
            _kill([self.popen])
            code = self.popen.wait()
        self.close(self.connection, *self.pipe)
        return cast("int | None", code)

    def retire(self) -> None:
        """Let it leave, since it is idle; kill it if it does not."""
        self.close(self.connection)  # then it leaves
        if self.popen is not None:
            _wait_in_slices(self.popen.wait, _PATIENCE)
        self.kill()


def _start_python(
    reader: Any, theirs: Any, page_name: Any, options: dict[str, Any]
) -> Any:
    """Start a Python that reads from a pipe what to do; return its Popen."""
    # Looked at here; it is called in the process.
    _private(multiprocessing.process.BaseProcess, "_bootstrap")
    handle, job = reader.fileno(), None
    if sys.platform == "win32":
        job = _new_job_object(page_name)
        handle = importlib.import_module("msvcrt").get_osfhandle(handle)
        os.set_handle_inheritable(theirs.fileno(), True)
        handles = {"handle_list": [theirs.fileno()]}
        options["startupinfo"] = subprocess.STARTUPINFO(lpAttributeList=handles)
        # A process group of its own gets no Ctrl-C.
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        os.set_blocking(theirs.fileno(), True)  # gevent makes others
        options["pass_fds"] = theirs.fileno(), handle, page_name
        options["start_new_session"] = True
    command = multiprocessing.spawn.get_command_line(
        pipe_handle=handle, parent_pid=os.getpid()
    )
    if not command[0]:
        raise RuntimeError(
            "sys.executable is empty: multiprocessing.set_executable() says which "
            "Python workers are to run"
        )
    if not getattr(sys, "frozen", False):
        command.insert(1, "-P")  # no file of the directory hides a module of Python
    popen: Any = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    popen.job_object = job
    return popen


class _Attendant:
    """Has jobs done by a worker process, and by those that replace it; in a thread.

    Other threads read `process`, `thread` and `start_error`, and set `idle_until`.
    """

    def __init__(self, pool: _Pool) -> None:
        self.recipe, self.jobs = pool.recipe, pool.jobs
        self.environment = {**pool.recipe.environment, **pool.limits}
        self.pool = weakref.ref(pool)
        self.stopping = pool.stopping
        self.idle_until = [math.inf]
        self.thread: Any = None
        self.process = _Process()  # which is not started yet
        self.start_error: Any = None  # of the process that was started first

    def attend(self, patience: float) -> None:
        """Do jobs, until the pool is stopped: in a thread of its own."""
        try:
            self.start(patience)
        except Exception as error:
            self.start_error = error  # for the first job
        while True:
            # A short wait while it has a function, to forget it soon after its run.
            seconds = 10 * _WAIT_SLICE if self.process.run is None else _WAIT_SLICE / 2
            due = time.monotonic() + seconds
            try:
                job = self.jobs.get(timeout=seconds)
            except queue.Empty:
                self.be_idle(time.monotonic() - due)
                continue
            if job is None or self.stopping.is_set():
                break
            if job.number > job.run.skip_after:
                job.report([])  # or a run that goes on all the same would wait for ever
            else:
                self.work_on(job)
            del job  # keep no reference while this is idle
        self.process.retire()

    def work_on(self, job: _Job) -> None:
        """Have a job done and report its outcome, or give it back."""
        outcome: Any = job.outcome
        try:
            if not self.do(job):
                self.jobs.put(job)
                self.stopping.wait(_WAIT_SLICE)  # another may take it first
                return
        except Exception as error:  # whatever it is, somebody waits for a report
            outcome = _Failure(error, ends_run=True)
        job.report(outcome)
        if job.is_stopped:
            # No batch behind this one is to begin, since the run ends here. Not before
            # the report, or the consumer might see that of a skipped batch first.
            job.run.skip_after = min(job.run.skip_after, job.number)

    def be_idle(self, seconds_late: float) -> None:
        self.process.forget()
        _remove_folders()
        self.idle_until[0] += seconds_late  # for which this was suspended
        if time.monotonic() > self.idle_until[0]:
            _stop_if_idle(self.pool)

    def start(self, patience: float) -> _Process:
        """Start a process, and wait until it is ready."""
        with _state.starting:
            if self.stopping.is_set():
                raise EOFError("the pool has been stopped")
            self.process = process = _Process()
            process.launch(self.recipe, self.environment)
        process.greet(self.recipe, patience)
        return process

    def do(self, job: _Job) -> bool:
        """Have a job done, by several processes one after another if need be.

        Return False if a process was lost that had begun none of its tasks: then this
        can be called again, also by another attendant.
        """
        was_warm = self.process.done > 0
        while job.messages and not job.is_stopped:
            if job.messages[0] is None:
                job.outcome.append(None)
                job.done_with_message()
                job.is_stopped = not job.run.returns_errors
                continue
            page: Any = None
            try:
                process = self.process_for(job)
                reply = process.load(job.run)
                if reply != _READY:  # it may be _BROKEN, which has the same content
                    job.outcome.append(_NO_FUNCTION + reply[1:])
                    job.is_stopped = True
                    continue
                page = process.page
                self.run(job, process)
            except Exception as error:
                failure = self.kill_and_explain(error, job, page)
                if not self.go_on(job, failure, page, was_warm):
                    return False
        return True

    def process_for(self, job: _Job) -> _Process:
        """Return a process that may do the next message."""
        error, self.start_error = self.start_error, None
        if error is not None and not isinstance(error, EOFError):
            raise error  # after an EOFError (it died as it started), try again
        process = self.process
        if process.done and process.done + job.size - job.begun > self.recipe.max_tasks:
            process.retire()
        if not process.has_ended():
            return process
        process.kill()  # with what it has started
        return self.start(job.run.patience)

    def run(self, job: _Job, process: _Process) -> None:
        """Have a process run the tasks of the next message."""
        run, page, count = job.run, process.page, job.size - job.begun
        page[_BEGUN] = page[_ENDED] = job.begun
        page[_NANOSECONDS] = 0
        run.at_work.add(process)
        try:
            process.send(cast("bytes", job.messages[0]))
            process.done += count
            while (reply := process.receive(run.limit, page))[:1] == _MORE:
                job.outcome.append(reply)
        finally:
            run.at_work.discard(process)
        process.is_new = False
        kind = reply[:1]
        if kind == _BROKEN:
            process.kill()
            if count > 1 or page[_ENDED] > job.begun:  # so this is no task's failure
                raise _BrokenWorkerError(reply)
        job.outcome += page[_NANOSECONDS] * 1e-9, reply
        run.failures = 0
        job.done_with_message()
        job.is_stopped = kind == _STOPPED or (
            kind == _BROKEN and not run.returns_errors
        )

    def go_on(self, job: _Job, failure: _Failure, page: Any, was_warm: bool) -> bool:
        """Have a job go on behind a process that is lost, or stop.

        *page* is None if the process had been sent no tasks. Return False if it had
        begun none.
        """
        run = job.run
        # The process has ended, so that the numbers are its last.
        begun, ended, *_ = page or (job.begun, job.begun)
        if begun > job.begun:
            job.begun, run.failures = begun, 0
            lost = _LostWorker(failure, job.first + begun, begun > ended)
            job.outcome.append(lost)
            if begun == job.size:
                job.done_with_message()
            job.is_stopped = not run.returns_errors or self.stopping.is_set()
        elif page is not None and job.size - begun > 1:
            # It may be lost for what it unpickled: have the tasks sent one by one.
            job.outcome.append(_UNREADABLE)
            job.messages.clear()
        elif failure.ends_run or self.gives_up(run, was_warm):
            if run.failures > 1:
                text = f"; {run.failures} workers in a row were lost like this"
                failure.error = failure.with_text(text)
            failure.ends_run = job.is_stopped = True
            job.outcome.append(_LostWorker(failure, job.first + begun, False))
        else:
            return False
        return True

    def gives_up(self, run: _SharedRun, was_warm: bool) -> bool:
        """Return whether the run ends, since processes are lost before they begin."""
        run.failures += 1
        has_enough = run.failures >= _MAX_FAILURES * self.recipe.size
        has_no_chance = not (run.was_loaded or was_warm)
        return has_no_chance or (has_enough and not run.at_work)

    def kill_and_explain(self, error: Exception, job: _Job, page: Any) -> _Failure:
        """Kill the process; return what has become of it."""
        process, goes_on = self.process, False
        if process.popen is not None and isinstance(error, EOFError):
            try:
                process.popen.wait(_WAIT_SLICE)  # it ends a moment after its connection
            except subprocess.TimeoutExpired:
                goes_on = True
        code, is_ready = process.kill(), process.is_ready
        if isinstance(error, _BrokenWorkerError):
            failure = _Failure(BrokenProcessPool(str(error)))
            failure.ends_run = error.what == _INITIALIZER_HAS_FAILED
            _set_cause(failure.error, error.text)
            return failure
        if process.popen is None:
            return _Failure(error)  # it could not be started
        if isinstance(error, (TimeoutError, BlockingIOError)):
            is_stalled = is_ready and isinstance(error, BlockingIOError)
            is_first = process.is_new
            text = _time_out_text(job.run, is_stalled, page, job.begun, is_first)
            return _Failure(_TaskTimeoutError(text))
        if isinstance(error, (EOFError, ConnectionError)) or (
            isinstance(error, OSError) and error.errno is None
        ):
            text = f"a worker process has died{'' if is_ready else ' as it started'}: "
            text += _exit_code_text(code, job.run.files)
            if goes_on:
                text = "a worker process has closed its connection: it was killed"
            elif code in range(256) and not is_ready:
                read = "half a message" if error.args else "nothing"
                text += (
                    f", and {read} was read from it: "
                    f"{multiprocessing.spawn.get_executable()!r} is no Python, or a "
                    "frozen program that does not call multiprocessing."
                    "freeze_support(); or what it imports has ended it"
                )
            error = BrokenProcessPool(text)
        return _Failure(error)


class _BrokenWorkerError(Exception):
    """A worker has reported that it failed outside of any task, and leaves."""

    def __init__(self, reply: bytes) -> None:
        self.what, (_, _, summary, self.text) = pickle.loads(memoryview(reply)[1:])
        super().__init__(f"{self.what}: {summary}")


def _time_out_text(
    run: _SharedRun, is_stalled: bool, page: Any, before: int, is_first: bool
) -> str:
    """Return what has taken too long.

    There is a *page* if the worker had been sent tasks; *before* of these had begun in
    other workers.
    """
    if is_stalled:
        what = "a worker has stalled in the midst of a message for"
        return f"{what} {run.patience!r} seconds"
    if not page:
        return f"a worker was not ready after {run.patience!r} seconds"
    if page[_BEGUN] == page[_ENDED]:
        what = "to send results has taken longer than the timeout of"
        return f"{what} {run.limit!r} seconds"
    what = "a task has taken longer than the timeout of"
    text = f"{what} {run.limit!r} seconds"
    if is_first and page[_BEGUN] == before + 1:
        text += (
            "; it was the first in its worker: what task_func builds on its first call "
            "counts, what __setstate__ or an initializer builds does not"
        )
    return text


# What Windows makes the exit code of a process that it ends.
_CODES_OF_WINDOWS = {
    0xC0000005: "access violation",
    0xC0000017: "no memory",
    0xC000001D: "illegal instruction",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL is missing",
    0xC000013A: "Ctrl-C",
    0xC0000142: "a DLL has failed",
    0xC0000374: "heap corruption",
    0xC0000409: "abort, or an overrun buffer",
}


def _exit_code_text(code: Any, files: _ArrayFiles) -> str:
    """Return an exit code with its name, and with what it may be due to."""
    name = _CODES_OF_WINDOWS.get(code, "")
    with contextlib.suppress(ValueError):  # it is not of a signal
        name = signal.Signals(-code).name if code < 0 else name
    if name == "SIGKILL":
        name += ", as when memory runs out"
    elif name in ("SIGSEGV", "SIGBUS", "access violation") and files.are_read_only():
        name += f", as when C code writes to a read-only array. {_READ_ONLY}"
    shown = f"{code:#x}" if code >= 0x80000000 else code
    return f"exit code {shown} ({name})" if name else f"exit code {code}"


_INITIALIZER_HAS_FAILED = "the initializer has failed in a worker"


# ---- in a worker process


def _serve(connection: Any, page_name: Any, sentinel: Any) -> None:
    """Be a worker, until the connection ends."""
    page = _mapped_page(page_name)
    if os.name == "posix":
        os.close(page_name)
        os.set_inheritable(connection.fileno(), False)
        # What a task forks is not to keep the connection open, nor to count.
        os.register_at_fork(after_in_child=connection.close)
        os.register_at_fork(after_in_child=page.release)
        _hold_life_line(sentinel)
    # An interrupt is for the program: it ends the run, and so this process.
    for name in {"SIGINT", "SIGBREAK"}.intersection(dir(signal)):
        signal.signal(getattr(signal, name), lambda *_: None)
    server = _Server(connection, page)
    try:
        if sys.platform == "win32":
            _join_job_object(page_name)
        server.serve()
    except _ProgramEnded:
        pass
    except BaseException as error:
        packed = _pack_error(error, _make_dump(_common_reducers()))
        with contextlib.suppress(OSError, ValueError):
            connection.send_bytes(_BROKEN + pickle.dumps((server.failure, packed)))


class _ProgramEnded(BaseException):
    """In a worker: the connection has ended; or this is a fork that a task has left."""


class _Server:
    """Answers the messages of the attendant, in a worker."""

    def __init__(self, connection: Any, page: Any) -> None:
        self.connection = connection
        self.page = page
        self.pickler: Any = None
        self.failure = "a worker has failed"  # what an exception would mean

    def serve(self) -> None:
        process = multiprocessing.current_process()
        process.name = f"Worker-{os.getpid()}"
        sys.argv[:], process.authkey = pickle.loads(self.receive())
        prepared, user_reducers, nested = pickle.loads(self.receive())
        with joblib.parallel_config(**nested):  # for its life: this takes some time
            self.initialize(prepared)
            self.answer_all(user_reducers)

    def answer_all(self, user_reducers: dict[Any, Any]) -> None:
        reducers = {**_common_reducers(), **_array_reducers(_reduce_result)}
        self.pickler = _ReplyPickler(reducers, self.page, user_reducers)
        self.reply(_READY)
        # Later collections skip what is there by now. PyPy has no gc.freeze.
        getattr(gc, "freeze", gc.collect)()
        function: Any = None
        send: Any = None
        while True:
            try:
                messages = [self.receive()]  # a list: nothing else refers to it
            except MemoryError as error:
                what = "task_func" if function is None else "the task"
                what += " cannot be unpickled in a worker"
                raise _unpickling_error(what, error) from error
            if messages[0][:1] in (_ONE_TASK, _MANY_TASKS):
                start = time.perf_counter_ns()
                reply = function.answer(messages, self.pickler, None, send)
                self.page[_NANOSECONDS] = time.perf_counter_ns() - start
                self.reply(reply)
                del reply  # which may be large
                continue
            function = None
            gc.collect()
            if messages[0][:1] == _FUNCTION:
                settings, watches = pickle.loads(memoryview(messages.pop())[1:])
                function = _LoadedFunction(*settings)
                del settings  # which has the payload
                send = self.send_some if watches else None
                self.reply(function.load(self.pickler.dump))
                function.payload = b""

    def initialize(self, prepared: bytes) -> None:
        usual, self.failure = self.failure, _INITIALIZER_HAS_FAILED
        with _Loading():
            initializer, initargs = pickle.loads(prepared)
            if initializer is not None:
                initializer(*initargs)
        self.failure = usual

    def receive(self) -> bytes:
        try:
            return bytes(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise _ProgramEnded from None

    def reply(self, reply: bytes) -> None:
        try:
            self.connection.send_bytes(reply)
        except OSError as error:
            # It has no number if a fork that a task has left has closed it.
            if not isinstance(error, ConnectionError) and error.errno is not None:
                raise  # it is too large for Windows, say
            raise _ProgramEnded from None

    def send_some(self, results: list[Any]) -> None:
        self.page[_ENDED] = self.page[_BEGUN]
        self.reply(self.pickler.reply(_MORE, results))


def _hold_life_line(line: int) -> None:
    """Have Linux kill this process group when the program ends, in whatever way.

    *line* is the reading end of a pipe. The program holds the other end, and does not
    write to it any more.
    """
    fcntl = importlib.import_module("fcntl")
    if not hasattr(fcntl, "F_SETSIG"):
        return  # not Linux
    fcntl.fcntl(line, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(line, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(line, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    poller = select.poll()
    poller.register(line, 0)
    if poller.poll(0):  # it has ended already
        os.killpg(0, signal.SIGKILL)


# ---- pools


class _Pool:
    """Workers that serve one run at a time, and may serve several, one after another.

    The consumer's thread makes or takes it, and submits to it; the thread that ends the
    run keeps or stops it, and so do its attendants, `shutdown` and the exit.
    """

    def __init__(self, recipe: _Recipe, limits: dict[str, str]) -> None:
        self.recipe = recipe
        self.limits = limits  # of threads of libraries: environment variables
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.attendants: list[_Attendant] = []
        self.stopping = threading.Event()
        self.modules = _Modules()
        _state.pools.add(weakref.ref(self, _state.pools.discard))

    def __del__(self) -> None:
        # A finalizer of weakref would do nothing once the interpreter exits.
        self.dismiss()

    def submit(self, job: _Job) -> None:
        """Have a job done; start another worker, unless there are enough."""
        if len(self.attendants) < self.recipe.size:
            new = _Attendant(self)
            arguments = (job.run.patience,)
            new.thread = threading.Thread(
                target=new.attend, args=arguments, daemon=True
            )
            self.attendants.append(new)  # first, as an interrupt may come in between
            _start(new.thread)
        self.jobs.put(job)

    def keep(self, seconds: float) -> None:
        """Let the next run of the same settings have the workers, which are idle.

        Stop them after so many seconds.
        """
        if any(attendant.start_error is not None for attendant in self.attendants):
            self.stop()
            return
        self.modules.update()
        for attendant in self.attendants:
            # A new list, since the attendant may be adding to the old one.
            attendant.idle_until = [time.monotonic() + seconds]
        _state.idle_pools.append(self)
        _stop_idle_pools(_state.max_idle)

    def dismiss(self) -> None:
        """Let the attendants take no more jobs, but come to their ends."""
        self.stopping.set()
        for _ in self.attendants:
            self.jobs.put(None)

    def stop(self, *, kill: bool = False) -> None:
        """Let the workers leave, which are idle; or kill them.

        In both cases, what their tasks have started ends with them.
        """
        _take_off_list(self)  # no other run is to have it
        with _state.starting:  # no process is being started
            self.dismiss()
        found = [p for p in self.processes() if kill or not p.is_ready]
        _kill([process.popen for process in found])
        for attendant in self.attendants:
            # It may not have been started; or it may be this one.
            with contextlib.suppress(RuntimeError):
                _wait_in_slices(attendant.thread.join, 2 * _PATIENCE)

    def processes(self) -> list[_Process]:
        """Return those that have been started."""
        found = [attendant.process for attendant in self.attendants]
        return [process for process in found if process.popen is not None]


def _take_pool(recipe: _Recipe) -> _Pool | None:
    """Return idle workers of these settings, if there are any."""
    for pool in [*_state.idle_pools]:
        if pool.recipe == recipe and _take_off_list(pool):
            for attendant in pool.attendants:
                attendant.idle_until = [math.inf]
            if pool.modules.are_current():
                return pool
            pool.stop()
    return None


class _Modules:
    """The modules that the workers of a pool may have imported, as they are here.

    Whatever loads a module again gives it another spec. Specs must be compared by
    identity, since the old and the new one are equal.
    """

    def __init__(self) -> None:
        # By name: a module, its namespace and its spec.
        self.known: dict[str, tuple[Any, dict[str, Any], Any]] = {}
        self.times: dict[str, int] = {}  # of the last changes of files
        self.update()

    def update(self) -> None:
        """Add what has been imported since."""
        # Not by getattr(), at which a lazy module is loaded.
        namespace_of = vars(types.ModuleType)["__dict__"].__get__
        modules = sys.modules.copy()
        for name in modules.keys() - self.known.keys():
            module = modules[name]
            is_module = issubclass(type(module), types.ModuleType)
            namespace = namespace_of(module) if is_module else {}
            self.known[name] = module, namespace, namespace.get("__spec__")
        if "IPython.extensions.autoreload" not in modules:
            return
        # It changes modules in place when their files have changed. Installed packages
        # are left out, since they have too many files.
        folders = operator.itemgetter("stdlib", "platlib", "purelib")
        installed = folders(sysconfig.get_paths())
        for _, _, spec in self.known.values():
            file = str(getattr(spec, "origin", None))
            if getattr(spec, "has_location", False) and not file.startswith(installed):
                self.times.setdefault(file, _time_of_change(file))

    def are_current(self) -> bool:
        """Return whether none of them has been loaded again."""
        return all(
            sys.modules.get(name) is module and namespace.get("__spec__") is spec
            for name, (module, namespace, spec) in self.known.items()
        ) and all(_time_of_change(file) == then for file, then in self.times.items())


def _time_of_change(file: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.stat(file).st_mtime_ns
    return 0


def _take_off_list(pool: _Pool) -> bool:
    """Take a pool off the list; return False if another thread has taken it."""
    try:
        _state.idle_pools.remove(pool)
    except ValueError:
        return False
    return True


def _stop_if_idle(reference: weakref.ref[_Pool]) -> None:
    pool = reference()
    if pool is not None and _take_off_list(pool):
        pool.stop()


def _stop_idle_pools(most: int = 0) -> None:
    """Stop idle workers, those that have been idle for longest first."""
    while len(_state.idle_pools) > most:
        with contextlib.suppress(IndexError):  # another thread has taken it
            _state.idle_pools.pop(0).stop()
    _remove_folders()


# What a session is on Windows: a job object of each worker, which all that it starts is
# in. Windows kills that when the last handle is closed. The program has the only one,
# so that nothing survives it, in whatever way it ends. The worker joins by the name of
# the job, since what was started may be the launcher of a venv, whose child is the
# worker.


def _new_job_object(name: str) -> Any:
    job = _call_windows("CreateJobObjectW", None, f"job of {name}")
    # No earlier: another thread may be about to use it, and handles are used again.
    weakref.finalize(job, _call_windows, "CloseHandle", job.value).atexit = False
    # Limits, as JOBOBJECT_EXTENDED_LIMIT_INFORMATION: KILL_ON_JOB_CLOSE, BREAKAWAY_OK
    limits = struct.pack("QQLPPLPLL6Q4P", 0, 0, 0x2000 | 0x0800, *[0] * 16)
    _call_windows("SetInformationJobObject", job, 9, limits, len(limits))
    return job


def _join_job_object(name: str) -> None:
    job = _call_windows("OpenJobObjectW", 1, False, f"job of {name}")  # to assign
    _call_windows("AssignProcessToJobObject", job, _call_windows("GetCurrentProcess"))
    _call_windows("CloseHandle", job)


def _call_windows(name: str, *arguments: Any) -> Any:
    """Call a function of Windows; return its result, or raise an error if it is 0."""
    ctypes = importlib.import_module("ctypes")
    function = getattr(ctypes.WinDLL("kernel32", use_last_error=True), name)
    if result := function(*arguments):
        return ctypes.c_void_p(result)  # it may be a handle
    reason = ctypes.FormatError(ctypes.get_last_error())
    raise RuntimeError(f"{name}, which is needed to end workers, has failed: {reason}")


def _kill(processes: list[Any]) -> None:
    """Kill processes, and all that they have started, also if they have ended.

    Each leads a session. A program that has made one of its own goes on. On Linux, a
    session is found though it has several process groups; elsewhere, only the first
    group is. On Windows, a job object is all of that.
    """
    if sys.platform == "win32":
        for process in processes:
            # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION, with TotalProcesses at 9
            counts = (importlib.import_module("ctypes").c_uint32 * 12)()
            _call_windows(
                "QueryInformationJobObject", process.job_object, 1, counts, 48, None
            )
            _call_windows("TerminateJobObject", process.job_object, 1)
            if not counts[9]:  # the worker has not joined yet
                process.kill()
        return
    leaders = {process.pid for process in processes if not _is_reused(process)}
    for pid in leaders:
        with contextlib.suppress(OSError):  # there is nothing left
            os.killpg(pid, signal.SIGKILL)
    for _ in range(100):
        left = list(_members(leaders))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _is_reused(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the id of a process that has ended is that of another by now.

    Then nothing is left of its session, or the id would not be free.
    """
    if process.poll() is None:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _members(leaders: set[int]) -> Iterator[int]:
    """Yield the ids of what is alive in the sessions of *leaders*, if that is known."""
    names: list[str] = []
    if leaders and os.path.exists("/proc/self/stat"):
        with contextlib.suppress(OSError):  # no descriptor is free
            names = os.listdir("/proc")
    for pid in map(int, filter(str.isdigit, names)):
        with contextlib.suppress(OSError):  # it is gone
            if os.getsid(pid) in leaders:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    # "number (name) state ...", and the name may be anything
                    state = file.read().rpartition(b")")[2].split()[0]
                if state not in b"ZX":
                    yield pid


def _occupy_standard_streams() -> None:
    """Let no pipe become the standard output of a worker, where that is closed.

    On Windows, streams are no descriptors to other processes.
    """
    for number in range(3) if os.name == "posix" else ():
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:
                os.set_inheritable(number, True)


# --------------------------------------------------------------------------------------
# Large arrays.


_READ_ONLY = (
    "Arrays of more than max_nbytes are mapped, read-only: mmap_mode='c' lets a task "
    "change its own view, max_nbytes=None sends copies"
)

# The last lines of tracebacks, in which numpy and Python say that an array is mapped
# so.
_SAYS_READ_ONLY = re.compile(
    r"^[ |]*(Buffer|Type|Value)Error: .*("
    r"\b(array|buffer|destination|memory|out)\b.{0,99}\b(read.?only|write?able)\b"
    r"|read.?only (array|buffer|memory)|object is not writable|read-write bytes"
    r"|WRITEABLE flag|WRITEBACKIFCOPY)",
    re.IGNORECASE | re.MULTILINE,
)

# Folders of arrays have the name that joblib gives its own, which some tools remove.
_FOLDER_NAME = "joblib_memmapping_folder_"


def _array_reducers(reducer: Any) -> dict[Any, Any]:
    numpy: Any = sys.modules.get("numpy")  # joblib has imported it, if there is one
    return (
        {} if numpy is None else dict.fromkeys((numpy.ndarray, numpy.memmap), reducer)
    )


def _reduce_result(array: Any) -> Any:
    return _reduce_to_mapping_of_user(array) or _reduce_to_copy(array)


def _reduce_to_mapping_of_user(array: Any) -> Any:
    """Reduce an array to its place in a file of the user's, or return None.

    A file of this module's is soon removed, and may be much larger than a view of it.
    """
    root = _mapped_root(array)
    is_ours = root is not None and _FOLDER_NAME in str(root.filename)
    return None if is_ours else _reduce_to_mapping(array)


def _mapped_root(array: Any) -> Any:
    """Return the `numpy.memmap` of which an array is a view, or None."""
    root = array
    while not isinstance(getattr(root, "base", None), (mmap.mmap, type(None))):
        root = root.base
    is_mapped = isinstance(root, sys.modules["numpy"].memmap) and root.base is not None
    return root if is_mapped else None


def _reduce_to_copy(array: Any) -> Any:
    plain = sys.modules["numpy"].asarray(array)
    # numpy keeps the byte order of contiguous arrays only.
    plain = plain if plain.flags.forc else plain.copy()
    return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _reduce_to_mapping(array: Any) -> Any:
    """Reduce a view of a memory-mapped file to its place there, or return None.

    joblib's own reducer drops the strides of contiguous views. It also maps what may
    differ by now: private changes, and a file that another has replaced.
    """
    root: Any = _mapped_root(array)
    identity = _identity_of(getattr(root, "filename", None))
    numpy: Any = sys.modules["numpy"]
    if not (
        identity is not None
        and root.mode in ("r", "r+", "w+")  # with "c", changes are private
        and root.flags.forc
        and array.nbytes
        and _is_current(root)
    ):
        return None
    first = _address_of(array) - _address_of(root)
    steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low = first + sum(step for step in steps if step < 0)
    high = first + sum(step for step in steps if step > 0) + array.itemsize
    if low < 0 or high > root.nbytes:  # as_strided() checks nothing
        return None
    if array.flags.forc:
        mode = "r+" if array.flags.writeable else "r"
        order = "C" if array.flags.c_contiguous else "F"
        place = root.filename, array.dtype, mode, root.offset + low, array.shape, order
        return _ByName("_mapped"), (identity, *place)
    part = root.ravel("K").view("u1")[low:high]  # it is contiguous
    return numpy.ndarray, (array.shape, array.dtype, part, first - low, array.strides)


def _mapped(identity: Any, file: Any, *place: Any) -> Any:
    """Return a `numpy.memmap`, if another file has not taken the place of its file."""
    _check_identity(file, identity)  # first, since numpy makes a short file longer
    array = importlib.import_module("numpy").memmap(file, *place)
    _check_identity(file, identity)
    return array


def _check_identity(file: Any, identity: Any) -> None:
    if _identity_of(file) != identity:
        message = "is not the file that was mapped: it has been replaced or removed"
        raise OSError(f"{file} {message}")


def _identity_of(file: Any) -> Any:
    with contextlib.suppress(OSError, TypeError):  # there is none, or it has no name
        found = os.stat(file)
        return found.st_dev, found.st_ino
    return None


def _address_of(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _is_current(root: Any) -> bool:
    """Return whether what a memmap has mapped is still the file of that name."""
    start = _address_of(root) - root.offset % mmap.ALLOCATIONGRANULARITY
    end = start + -(-len(root.base) // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        file: str = os.path.realpath(root.filename)
        with contextlib.suppress(OSError):  # this is not Linux, say
            return os.readlink(f"/proc/self/map_files/{start:x}-{end:x}") == file
        if os.name == "posix":  # what has replaced the file is not open, as a rule
            return _is_open(os.stat(file))
        with open(file, "rb") as current:  # Windows may not let others open it
            return os.fstat(current.fileno()).st_size == int(root.base.size())
    except (OSError, TypeError):  # it has no name
        return False


def _is_open(file: os.stat_result) -> bool:
    """Return whether this process has a file open, as it has what it has mapped."""
    for number in (
        os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else map(str, range(256))
    ):
        with contextlib.suppress(OSError):  # it is not open
            if os.path.samestat(os.fstat(int(number)), file):
                return True
    return False


class _ArrayFiles:
    """The large arrays of a run, each in a file that is removed with the array.

    joblib would keep the file until the run ends. They lie in a folder of the run,
    which only the user may read, and which is made when it is first needed. The
    instance is the reducer of arrays: it is called for each that is pickled, in the
    consumer's thread.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.root = options.get("temp_folder")
        self.pid = os.getpid()
        self.folder: Any = None
        self.files: dict[int, _ArrayReference] = {}  # by the ids of their arrays
        self.dropped: deque[_ArrayReference] = deque()  # of arrays that are no more
        self.mapped: deque[_ArrayReference] = deque()  # of these, still mapped
        self.kept: list[Any] = []  # references to the arrays of what is pickled
        self.of_function: list[Any] = []
        self.weight = 0  # bytes of all arrays that were copied or put into files
        self.is_tracked = self.is_closed = False
        limit = options["max_nbytes"]
        self.max_nbytes = math.inf if limit is None else limit
        self.mode = options["mmap_mode"]
        user_reducers = options.get("forward_reducers") or {}
        self.reducers = {**_array_reducers(self), **user_reducers}

    def __call__(self, array: Any) -> Any:
        mapping = _reduce_to_mapping(array)
        if mapping is not None:
            return mapping
        if array.nbytes <= self.max_nbytes or array.dtype.hasobject:
            self.weight += array.nbytes
            return _reduce_to_copy(array)
        self.kept.append(array)
        reference = self.files.get(id(array))
        if reference is None or reference() is not array:
            reference = self.written(array)
        # False: not converted to the byte order of the machine.
        return joblib.load, (reference.file, self.mode, False)

    def written(self, array: Any) -> _ArrayReference:
        """Put an array into a file, which is removed after it."""
        # The callback is no Python code, in which a signal handler could raise.
        self.weight += array.nbytes
        reference = _ArrayReference(array, self.dropped.append)
        reference.key = id(array)
        try:
            # In a thread, since an interrupt in the middle would leave the folder.
            folder = self.folder or _undisturbed(self.made_folder)
            reference.file = os.path.join(folder, f"{uuid.uuid4().hex}.pkl")
            joblib.dump(array, reference.file)
            os.chmod(reference.file, 0o600)
        except OSError as error:
            self.remove(reference)
            _raise_if_of_handler(error)
            raise OSError(
                error.errno,
                f"{error.strerror}: large arrays cannot be put into files there; the "
                "option temp_folder says where, max_nbytes=None sends copies instead",
                os.fspath(self.folder or self.root or "the folder for temporary files"),
            ) from error
        self.files[reference.key] = reference
        return reference

    def made_folder(self) -> str:
        name = f"{_FOLDER_NAME}{self.pid}_{uuid.uuid4().hex}"
        module = importlib.import_module("joblib._memmapping_reducer")
        folder, _ = _private(module, "_get_temp_dir")(name, self.root)
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # it may have been made, but readable by everybody
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        os.mkdir(folder, mode=0o700)
        self.folder = folder
        if not getattr(sys, "frozen", False):  # where that would start the program anew
            tracker = _loky("backend.resource_tracker")
            tracker.register(folder, "folder")  # removes it if the program is killed
            self.is_tracked = True
        if self.is_closed:  # meanwhile, in another thread
            self.folder = folder
            self.close()
            raise RuntimeError("the run has ended")
        return str(folder)

    def remove_dropped(self) -> None:
        """Remove the files of arrays that are no more."""
        count = len(self.dropped)
        for _ in range(count):
            self.remove(self.dropped.popleft())
        # A few of those that were mapped: to try all each time would take too long.
        for _ in range(min(len(self.mapped), count + 1)):
            self.remove(self.mapped.popleft())

    def remove(self, reference: _ArrayReference) -> None:
        if self.files.get(reference.key) is reference:
            del self.files[reference.key]
        if self.pid == os.getpid():
            try:
                os.unlink(reference.file)
            except OSError as error:
                _raise_if_of_handler(error)
                if isinstance(error, PermissionError):  # Windows: a worker maps it
                    self.mapped.append(reference)

    def are_read_only(self) -> bool:
        """Return whether workers map some of them, and cannot write to them."""
        return self.folder is not None and self.mode == "r"

    def close(self) -> None:
        """Remove all files. May be called again."""
        self.is_closed = True
        self.reducers.clear()  # since they refer to this
        self.files.clear()
        self.kept, self.of_function = [], []
        folder, self.folder = self.folder, None
        if folder is not None:
            _state.folders[folder] = self.is_tracked
        _remove_folders()


def _remove_folders() -> None:
    """Remove the folders of runs that have ended.

    On Windows, files that are mapped stay. So this is called again when idle workers
    have had the time to forget, and when workers have left.
    """
    for folder in [*_state.folders]:
        shutil.rmtree(folder, ignore_errors=True)
        # Several threads may come here, and the tracker is to be told once.
        if not os.path.exists(folder) and _state.folders.pop(folder, False):
            _loky("backend.resource_tracker").unregister(folder, "folder")


class _ArrayReference(weakref.ref[Any]):
    """A reference to an array that knows its file."""

    key: int
    file = ""


# --------------------------------------------------------------------------------------
# Ends of runs.
#
# However a run ends (`finally` of _results, the finalizer of its _Run, or a hook at
# exit), its lifetime's `end` is called, and that calls `end` of its engine in a thread:
# workers that are busy are killed, others are kept or stopped.
#
# A lifetime is among the open runs from the start of the run until all that it has
# started has ended. When the interpreter exits, runs that nobody will read to the end
# are ended: those that were last read in the main thread, in one that has ended, or in
# a daemon thread. Then all pools of workers are stopped. There are two hooks: of
# atexit, which comes before those of Dask and Ray if these were imported before the
# first run; and of multiprocessing, for its child processes.


class _State:
    """What this process has started. In a fork, there is an empty one in its place.

    Any thread uses these without a lock, by single calls of methods in C, of which
    ``[*x]`` is one: they are atomic, in builds of Python without a GIL as well.
    """

    def __init__(self, max_idle: int) -> None:
        self.open_runs: set[_Lifetime] = set()
        # All. No WeakSet: to iterate over one fails while another thread adds to it.
        self.pools: set[weakref.ref[_Pool]] = set()
        self.idle_pools: list[_Pool] = []
        self.max_idle = max_idle
        # Folders to be removed, and whether loky's tracker knows of each.
        self.folders: dict[str, bool] = {}
        # All starts of processes hold this, and forks wait for it: a fork in the middle
        # of one would hold the worker's end of a connection open.
        self.starting = threading.RLock()
        self.ends: set[Any] = set()  # of connections and pipes, which a fork closes


_state = _State(max_idle=3)
_inherited: list[Any] = []  # what a fork has of its parent, and must not collect


class _Lifetime:
    """Who reads a run, what it has started, and whether it has ended.

    Any thread may call `end` and `fail`; `_end` is called in a thread of its own if one
    can be started; the rest is for the consumer's thread.
    """

    def __init__(self, run: _Run) -> None:
        self.run = weakref.ref(run)
        self.engine = run.engine
        self.pid = 0  # of the process that it was started in; 0 before that
        self.is_at_work = False  # inside of the engine
        self.is_busy = False  # something is out
        self.has_failed = False  # the engine: nothing more is sent to it
        self.end_lock = threading.Lock()  # test-and-set: it is never released
        self.ended = threading.Event()

    def begin(self) -> None:
        self.pid = os.getpid()
        self.reader = threading.current_thread()  # the last one
        _state.open_runs.add(self)
        _end_all_at_exit(self.pid)

    def __enter__(self) -> None:
        """Surround what the consumer's thread does with the engine."""
        if self.pid != os.getpid():
            raise RuntimeError(
                "a run cannot be read in a fork of the process it is from"
            )
        self.reader, self.is_at_work = threading.current_thread(), True

    def __exit__(self, *_: object) -> None:
        self.is_at_work = False
        if self.is_over():  # meanwhile, in another thread, which is waited for
            self.ended.wait(10)
            self.engine.end(kill=True)

    def is_over(self) -> bool:
        return self.end_lock.locked()

    def takes_more(self) -> bool:
        return not (self.has_failed or self.is_over())

    def end(self) -> None:
        """End the run; wait for that if this thread was the last to read it.

        It is done in another thread, where no signal handler interrupts it, and which
        can wait for locks that this one may hold: the garbage collector may call this
        anywhere, even in the middle of another run's work.
        """
        if self.ended.is_set() or self.pid != os.getpid():
            return
        # If an interrupt comes in between, the finalizer of the run does it again.
        _call_in_thread(self._end)
        me = threading.current_thread()
        is_inside_an_engine = any(
            other.is_at_work and other.reader is me for other in [*_state.open_runs]
        )
        if self.reader is me and not is_inside_an_engine:
            _wait_in_slices(self.ended.wait, 10)

    def _end(self) -> None:
        """Call off what is out; stop the workers, or keep them for the next run."""
        if not self.end_lock.acquire(blocking=False):
            return
        try:
            self.engine.end(kill=self.is_busy or self.has_failed)
        finally:
            _state.open_runs.discard(self)
            self.ended.set()

    def fail(self, error: BaseException) -> None:
        """Let whoever reads on meet an exception."""
        run = self.run()
        if run is not None:
            run.inbox.put(None, _Failure(error, ends_run=True))


def _start(thread: threading.Thread) -> None:
    """Start a thread. (An interrupt in the middle would leave a lock locked.)"""
    _undisturbed(thread.start)


def _undisturbed(function: Callable[[], Any]) -> Any:
    """Call a function in another thread, where no signal handler raises, and wait."""
    outcome: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def call() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    _thread.start_new_thread(call, ())
    result, error = outcome.get()
    try:
        if error is not None:
            raise error
        return result
    finally:
        del error  # its traceback refers to this frame


def _call_in_thread(function: Callable[[], object]) -> None:
    """Call *function* in a thread; here, if no thread can be started."""
    try:
        if not sys.is_finalizing():
            _start(threading.Thread(target=function, daemon=True))
            return
    except RuntimeError as error:  # a limit is reached, or the interpreter exits
        _raise_if_of_handler(error)
    function()


@functools.cache
def _end_all_at_exit(pid: int) -> None:
    """See to it, once a process, that nothing is left when it exits."""
    atexit.register(_at_exit, pid)
    multiprocessing.util.Finalize(None, _at_exit, (pid,), exitpriority=100)


def _at_exit(pid: int) -> None:
    """End the runs that nobody will read to the end, and stop their workers."""
    if pid != os.getpid():  # a fork
        return
    _state.max_idle = 0
    read_on = set()
    for lifetime in [*_state.open_runs]:
        reader = lifetime.reader
        if reader is threading.main_thread() or not reader.is_alive():
            # Whoever reads on, in a hook that comes later, must not take it for the
            # end of the results.
            lifetime.fail(
                RuntimeError("the run was ended, since the interpreter exits")
            )
        elif reader.daemon:
            lifetime.fail(SystemExit())  # ends a thread in silence
        else:
            read_on.add(lifetime.engine.pool)  # `threading` waits for it
            continue
        _call_in_thread(lifetime._end)
        _wait_in_slices(lifetime.ended.wait, 10)
    for pool in {*filter(None, (ref() for ref in [*_state.pools]))} - read_on:
        pool.stop()
    _remove_folders()


def _after_fork() -> None:
    """In a fork: let go of what belongs to the parent, without stopping it."""
    global _state
    for lifetime in _state.open_runs:
        # Its lock may be held by a thread of the parent.
        lifetime.ended = threading.Event()
        lifetime.ended.set()
        run = lifetime.run()
        if run is not None:
            run.results.clear()  # they are to be read in the parent
    for end in _state.ends:
        end.close()  # or the parent's workers would not see that it has ended
    pools = (ref() for ref in _state.pools)
    for process in itertools.chain(*(pool.processes() for pool in pools if pool)):
        process.popen.returncode = 0  # it is no child of this process
    _inherited.append(_state)
    _state = _State(max_idle=0)  # a fork may end without any clean-up


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _state.starting.acquire(),
        after_in_parent=lambda: _state.starting.release(),
        after_in_child=_after_fork,
    )
