"""Run a function over many tasks: one by one, on all cores, or on a cluster.

This file is meant to be copied: it needs Python 3.10 or newer, joblib 1.5 or newer and
nothing else. `__version__` and `__source__`, below, tell whether there is a newer one
where it comes from.

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

# A batch that fails must be reported, whatever its error is:
# ruff: noqa: BLE001

from __future__ import annotations

import asyncio
import atexit
import builtins
import contextlib
import difflib
import functools
import gc
import importlib
import inspect
import io
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.process
import multiprocessing.reduction
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
import sys
import sysconfig
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
    # It ships no types, and is mixed into at run time, which no checker could follow.
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
__version__ = "3.0.1"
__source__ = ""  # where newer ones are to be found; for its owner to fill in

T = TypeVar("T")
R = TypeVar("R")


class DistributedBackend(ABC):
    """Abstract base class of the backends: the interface that each of them implements.

    Each has a strategy of its own, from one process that runs tasks sequentially to
    many that run them in parallel. Both methods are static, so that a class serves as
    well as an instance. A backend of your own implements the two:

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


class FailedTask(NamedTuple):
    """What a run with ``errors="return"`` yields in place of a result that is not.

    >>> for result in Joblib.setup(int, ["1", "two"], 2, errors="return"):
    ...     if isinstance(result, FailedTask):
    ...         print("failed:", result.number, result.task, repr(result.error)[:11])
    failed: 1 two ValueError(
    """

    number: int
    """Of the task, counted from 0."""

    task: Any
    """The object that was drawn."""

    error: Exception
    """What would have ended the run with ``errors="raise"``."""


class SingleProcess(DistributedBackend):
    """Runs tasks one after another in this process.

    The simplest backend: for debugging, and for work that does not call for parallel
    execution.
    """

    @staticmethod
    def setup(
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
            Ignored, so that the options of `Joblib` can stay in place while debugging:
            ``errors="return"``, too, since one debugs to see errors.

        Returns
        -------
        Generator[R, None, None]
            Yields the results in the order of the tasks.

        Raises
        ------
        TypeError
            At once, if *task_func* cannot be called with one argument, or *tasks* is
            not iterable.
        Exception
            From the generator: what *task_func* raised, with a note that tells the
            number of the task and shows it (Python 3.11 and newer).
        RuntimeError
            From the generator, if *task_func* raises `StopIteration`, which becomes its
            cause: out of a generator it would look like the end of the results.
        """
        return _one_by_one(*_checked(task_func, tasks))

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Do nothing, since nothing is kept between runs; may be called at any time.

        >>> SingleProcess.shutdown()
        """


class Joblib(DistributedBackend):
    """Runs tasks in several worker processes, by joblib's `Parallel` and `delayed`.

    For CPU-intensive work, which gains from true parallelism. What follows holds on
    every joblib backend, but for what is listed under "Not promised".

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
    tasks have started (a worker leads a session, and that ends with it); nothing is
    printed or warned of, and no file is left. On Linux nothing is left, either, if the
    program itself is killed, or crashes; but then loky's tracker may tell of a folder
    of arrays that it removes, and the fork server of `multiprocessing` leaves one.

    >>> results.close()
    >>> list(results)
    []

    *The caller's thread.* *tasks* is advanced only inside ``next()``, in the thread
    that calls it. Tasks may come from a database cursor, or depend on context
    variables.

    *Composable.* Runs can be chained, interleaved, overlapped and started inside a task
    (where joblib's default is threads). What a worker loads (a module that it imports,
    an *initializer*) can start runs in the same way, but it is an error if they ask for
    worker processes.

    >>> absolute = Joblib.setup(abs, [-1, -2, -3], num_workers=2)
    >>> sorted(Joblib.setup(str, absolute, num_workers=2))
    ['1', '2', '3']

    *Independent.* Each run of processes has workers of its own, as many as it asks for,
    with its own *initializer*. A run that fails, loses a worker, times out or is closed
    does not disturb another, nor a plain `joblib.Parallel`.

    *Kept warm.* loky's workers that are idle when a run ends well are kept for the next
    that wants the same: the same number, *initializer*, environment variables, current
    directory and `sys.path`. They are not used again once the program has reloaded a
    module. At most three sets of workers are kept, none in a fork.
    They keep nothing of the function; what tasks leave elsewhere in a worker (a thread,
    a program, a changed directory) is there for the next run, too. `shutdown` stops
    idle workers; those that have not left after 3 seconds are killed.

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
    kills its worker or takes too long gives a `FailedTask` in place of its result. A
    worker that is killed costs what was not done of its batch, too.

    *Forks and children.* Runs can be started in a fork, and in a child process of
    `multiprocessing`, however it is started; the child ends when it is done. To read on
    a run of the parent in a fork is a `RuntimeError`, unless it has no workers.

    *Self-contained.* Workers are sent a few functions of this module, by value. They
    import the module only if that of *task_func* does.

    Not promised:

    - Threads cannot be stopped: what they are busy with goes on in the background. The
      same is true of Dask's workers, which are threads, and of the batches that these
      have begun.
    - With ``return_as="generator"``, results behind the one where an error ends the run
      are lost with it.
    - On Dask, what is lost with a worker is run again, and a run waits for workers if
      there are none. On Ray, an actor that dies ends the run, and a run has to end
      before ``ray.shutdown()``.
    - What a task makes a session of its own (a daemon) is not stopped. Elsewhere than
      on Linux, nor is what has a process group of its own; and if the program is
      killed there, its workers finish what they are doing. On Linux, what has a group
      of its own survives if it is the program that is killed.
    - A task that is changed while others of its batch are drawn arrives changed: in
      tasks, yield new objects, or take ``batch_size=1``. So does one in threads that is
      changed before it is run. An array of more than *max_nbytes* is in its file as it
      first was. A result that *task_func* changes in its next call arrives changed.
    - To close a run in a thread that is not the last to have read it, or in *tasks* of
      another run, does not wait for its workers to stop. Otherwise it waits for that,
      but for 10 seconds at most.
    - `atexit` hooks of workers that `multiprocessing` has forked run from Python 3.13
      on.
    - A `KeyboardInterrupt` or `SystemExit` that *tasks* raises is raised at once.
    """

    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        *,
        errors: Literal["return"],
        **kwargs: Any,
    ) -> Generator[R | FailedTask, None, None]: ...
    @overload
    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Generator[R, None, None]: ...

    # To a checker this returns too little; the overloads say what may come.
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
            something large. Worker processes are sent it, the tasks and the results:
            all must be picklable, by cloudpickle, which takes lambdas and functions of
            the program, too. The function is pickled as it is when the run starts, and
            once; each worker (on Dask, each thread of a worker) keeps one copy for the
            run. So what a call leaves on it (a
            compiled solver, a cache) is there for the worker's next call. The same is
            true of a generator of random numbers: each worker starts with the same copy
            of it, so put seeds into the tasks. In threads, it is the object itself.
        tasks : Iterable[T]
            The tasks; an iterator, as the interface has it, or any other iterable.
        num_workers : int, optional
            Number of worker processes, or of threads. Default: -1, which means all
            available cores, unless an open `joblib.parallel_config` sets ``n_jobs``; -2
            means all but one, and so on. With 1, tasks run in this process, one after
            another, unless *timeout*, *maxtasksperchild* or ``errors="return"`` asks
            for a process of "loky" or "multiprocessing", which there cannot be inside
            of a daemon process or a thread's task. Dask ignores it and uses the whole
            cluster.
        **kwargs
            Options. Those of `joblib.Parallel`, but for ``n_jobs``:

            backend : str or joblib.parallel.ParallelBackendBase, default "loky"
                "loky" (processes), "threading", "multiprocessing", "dask" (the cluster
                of the current `dask.distributed.Client`), "ray", another registered
                name, or an instance. An open `joblib.parallel_config`, *prefer* or
                *require* may change the default.
            return_as : {"generator_unordered", "generator"}
                Results as they complete, which is the default, or in the order of the
                tasks. In order, a task that takes long keeps workers idle once
                *pre_dispatch* batches are out.
            errors : {"raise", "return"}
                "return": where a task has no result, yield a `FailedTask` in its place
                and go on. The other tasks of its batch are run all the same. A worker
                that dies, or a time-out, costs those tasks of its batch that are not
                known to be done: with ``batch_size=1``, one. None is run twice, but on
                Dask. A worker that dies or fails as it loads *task_func* costs a batch,
                too, and a fresh one is started for the next; the run ends if no worker
                has loaded it yet, or after three in a row. Errors of *tasks*, of an *initializer* and of pickling
                *task_func*, and what a debugger raises to be left, still end the run.
            timeout : float, optional
                Seconds that one task may take in its worker process; it is killed then,
                and the run ends with an error, or goes on with ``errors="return"``.
                What the task builds on the first call counts. No other task, start,
                initializer or wait does. In a batch of several, it is noticed up to a
                fifth of *timeout* later, or at twice *timeout* if the task holds the
                interpreter's lock. A worker that is not ready after *timeout*, or 60
                seconds if that is more, is an error. Other backends cannot watch single
                tasks: there, the run ends when the consumer has waited for so long and
                no batch has completed; the start of workers counts, unless the engine
                itself waits for it. Default: wait for ever.
            maxtasksperchild : int, optional
                Tasks that a worker process of "loky" or "multiprocessing" may do before
                it leaves and a fresh one takes its place: for tasks that leak memory.
                No batch is larger. Default: any number.
            batch_size : int or "auto", default "auto"
                Tasks sent to a worker at once; fewer towards the end of the tasks, so
                that all workers have some. "auto" starts with 1. A batch that is out
                and read in less than 0.2 seconds, or more than 2, makes the next ones
                as large as would take 0.4; but at most twice as large, or 16 or 64
                times if it took less than 10 ms or 1 ms, and no larger than 8192 tasks
                or 8 MB of arrays. In threads, it stays 1; a backend that has a rule of
                its own keeps it.
            pre_dispatch : int or str, default "2 * n_jobs"
                The most batches that are out at a time, being worked on or waiting for
                a worker; a number, a formula of the number of workers (on Dask, of the
                moment), or "all", which lifts the bound.
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
                already stays mapped, unless its file may not have what it has.
            prefer, require
                As in joblib.

            Also what else the backend takes from `joblib.Parallel`, such as loky's
            ``idle_worker_timeout`` (seconds, default 300). What its constructor takes
            goes into a ``joblib.parallel_config(backend=..., ...)`` around the call.
            One that is open when `setup` is called is honoured; neither it nor a
            backend passed in is changed.

        Returns
        -------
        Generator[R, None, None]
            Yields the results. Like any generator, it can be read by several threads,
            but only by one at a time.

        Raises
        ------
        TypeError, ValueError, ImportError
            At once, if an argument is not as said here, or if the package of *backend*
            is missing or hidden; the message names the argument and shows the value. If
            a formula of *pre_dispatch* comes to 0 for the workers that turn up, it is
            raised from the generator.
        pickle.PicklingError
            From the generator, if *task_func*, a task or a result cannot be pickled.
            Threads pickle nothing.
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
            with a note that tells the number of the task and shows it (Python 3.11 and
            newer). In threads it is the error itself; elsewhere, the text of the
            worker's traceback is its cause. If it cannot be pickled, it is put together
            again without its ``__init__``, or else is a `RuntimeError` that shows it. A
            `StopIteration`, and what is no `Exception` (of ``sys.exit()``, say), is the
            cause of a `RuntimeError`; but with one worker, in this process, a
            `SystemExit` or `KeyboardInterrupt` is the program's own.
        """
        return _results(_Run(task_func, tasks, num_workers, kwargs))

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Stop idle worker processes. May be called at any time, or never.

        Those of loky are kept for the next run; without this, they leave when they have
        been idle for *idle_worker_timeout*, or with the program. Open runs are not
        touched.

        >>> Joblib.shutdown()
        """
        _stop_idle_pools()


@overload
def get_backend(backend_name: Literal["single_process"]) -> SingleProcess: ...
@overload
def get_backend(backend_name: Literal["joblib"]) -> Joblib: ...
@overload
def get_backend(backend_name: str) -> SingleProcess | Joblib: ...
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
# Arguments: all that is wrong with them is said when `setup` is called. What joblib
# says clearly by itself, when its Parallel is made, is left to it.


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


def _checked_num_workers(num_workers: int | None) -> int:
    if num_workers is None:
        configured = joblib.parallel.get_active_backend()[1]
        return -1 if configured is None else configured
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


# What others call an option, or have and joblib has not, and what to use instead.
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
        "a positive number of seconds, within a life, or None",
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


def _most_batches(pre_dispatch: Any, workers: int) -> float:
    """Return how many batches *pre_dispatch* comes to, which must be some."""
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


@functools.cache  # to look at signatures is slow
def _option_names(kind: Any, mixin: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of what `joblib.Parallel` takes for a backend, and of what it
    takes as an argument of its constructor.
    """

    def names(function: Any) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}

    taken = names(joblib.Parallel) | names(kind.configure) | mixin.more_options
    taken.add("errors")
    nothing = object  # which takes no arguments
    makers = (vars(base).get("__init__", nothing) for base in kind.__mro__[:-1])
    made_with = set().union(*map(names, makers))
    internal = {"self", "n_jobs", "parallel", "nesting_level", "args", "kwargs"}
    return frozenset(taken - internal), frozenset(made_with - taken - internal)


def _check_options(options: dict[str, Any], backend: Any, n_jobs: int) -> None:
    """Raise an error if one of *options* is unknown, or known to be bad."""
    kind: Any = type(backend)
    known, for_constructor = _option_names(kind, _mixin_for(backend))
    for name, value in options.items():
        if name in _INSTEAD and name not in known:
            message = f"{name}={value!r} is not an option: use {_INSTEAD[name]}"
            raise TypeError(message)
        if name in _OF_PROCESSES and name not in known:
            raise TypeError(
                f"{name}={value!r} is an option of worker processes of this machine, "
                f"those of 'loky' and 'multiprocessing', not of {kind.__name__}"
            )
        if name in for_constructor:
            raise TypeError(
                f"{name}={value!r} is not an option of setup: put it into "
                f"joblib.parallel_config(backend=..., {name}=...) around the call"
            )
        if name not in known:
            usual = sorted(known - {"backward_reducers", "forward_reducers", "prewarm"})
            near = difflib.get_close_matches(name, [*usual, "num_workers"], 1, 0.8)
            expected = "".join(f"did you mean {word!r}? " for word in near)
            expected += f"Expected one of {', '.join(map(repr, usual))}"
            raise TypeError(f"unknown option {name}={value!r}: {expected}")
        expected, is_valid = _CHECKS.get(name, ("", lambda value: True))
        if not is_valid(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    # The number of workers may not be known yet: 64 stands for it.
    _most_batches(options.get("pre_dispatch", "all"), n_jobs if n_jobs > 1 else 64)
    shares_memory = getattr(backend, "supports_sharedmem", False)
    if options.get("require") == "sharedmem" and not shares_memory:
        raise ValueError(f"require='sharedmem' is more than {kind.__name__} can do")


def _chosen_backend(options: dict[str, Any]) -> Any:
    """Return the joblib backend that `joblib.Parallel` would use; it may be shared.

    Its name is taken out of *options*.
    """
    backend = options.pop("backend", None)
    if (
        backend is None
        and _is_loading()
        and not options.keys().isdisjoint(_OF_PROCESSES)
    ):
        backend = "loky"  # which is an error, but not before the run starts
    if backend is None:
        names = options.keys() & {"prefer", "require"}
        hints = {name: options[name] for name in names}
        return joblib.parallel.get_active_backend(**hints)[0]
    if isinstance(backend, joblib.parallel.ParallelBackendBase):
        return backend
    if backend == "dask":
        _require_dask()
    elif backend == "ray":
        _register_ray()
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


def _require_dask() -> None:
    try:
        package = importlib.import_module("distributed")
    except ImportError as error:
        message = "install it with pip install 'dask[distributed]'"
        raise ImportError(f"backend='dask' needs Dask: {message}") from error
    if not hasattr(package, "Client"):
        raise ImportError(
            f"backend='dask' needs Dask's package 'distributed', which is hidden by "
            f"{package.__file__}, a top-level module of the same name: move that file "
            "into a package"
        )


def _register_ray() -> None:
    try:
        ray = importlib.import_module("ray.util.joblib")
    except ImportError as error:
        message = "backend='ray' needs Ray: install it with pip install ray"
        raise ImportError(message) from error
    ray.register_ray()


# --------------------------------------------------------------------------------------
# The loop.
#
# The consumer is whoever reads the generator that `setup` returns. An engine is what
# runs the batches of a joblib backend: worker processes of loky or multiprocessing,
# threads, Dask or Ray.
#
#    the consumer's thread, in _results()             an engine
#   +------------------------------------+
#   |  1 draw      tasks                 |
#   |                |                   |            worker processes (below), threads,
#   |  2 send        +--> batch ---------|----------> Dask or Ray: in each worker
#   |                                    |            run_tasks(task_func, ..., tasks)
#   |  3 wait      _Inbox <--------------|----------- report(outcome)
#   |                |                   |
#   |  4 hand out    +--> results: yield |
#   +------------------------------------+
#
#   _Lifetime.end(), in any thread -> a thread that ends the run: clean_up()
#
# That is all of it: one loop, in the thread that calls next(). It draws tasks until as
# many batches are out as *pre_dispatch* says, waits for a report, hands out its
# results, and draws again. So runs are lazy, bounded, composable and lossless by
# construction. All that a thread of an engine ever does to a run is to put an outcome
# into its inbox, which cannot block or fail.
#
# joblib's Parallel resolves what a user has configured, and enters and leaves its
# backend; all but Dask are sent batches by `submit`, as with joblib.


class _TaskTimeoutError(TimeoutError, multiprocessing.TimeoutError):
    """A task took too long. joblib's users catch the one class, others the other."""

    def __reduce__(self) -> Any:  # by its name, another class would be found
        return _timeout_error, self.args


def _timeout_error(*arguments: Any) -> _TaskTimeoutError:
    return _TaskTimeoutError(*arguments)


# It is shown as what it is for everybody.
_TaskTimeoutError.__name__ = _TaskTimeoutError.__qualname__ = "TimeoutError"
_TaskTimeoutError.__module__ = "builtins"


class _WorkerTraceback(Exception):
    """The text of a traceback from elsewhere, as the cause of an error."""


class _Failure:
    """An error of an engine in place of the outcome of a batch.

    Its traceback is kept as text, since frames would refer to the run.
    """

    def __init__(self, error: BaseException, *, ends_run: bool = False) -> None:
        if error.__traceback__ is not None:
            _set_cause(error, "".join(traceback.format_exception(error)).strip())
            error.__context__ = None
        self.error = error.with_traceback(None)
        self.ends_run = ends_run  # also if failed tasks are to be returned


# Of tasks that take no time, batches of more gain nothing, but all that are out have to
# be kept in memory.
_LARGEST_BATCH = 8192

# Bytes of arrays in the tasks of a batch, beyond which it does not grow.
_HEAVIEST_BATCH = 8_000_000

# Seconds after which a wait looks whether there is still something to wait for. It is
# also how long a Ctrl-C may have to wait on Windows, where it interrupts no lock.
_WAIT_SLICE = 0.5


def _one_by_one(
    task_func: Callable[[T], R],
    tasks: Iterator[T],
    progress: _Progress | None = None,
    *,
    returns_errors: bool = False,
) -> Generator[Any, None, None]:
    """Yield results like `map`, but a StopIteration of *task_func* is an error."""
    counter = itertools.count()
    result: Any
    for task in tasks:
        number = next(counter)  # enumerate() would hold on to the task
        try:
            result = task_func(task)
        except Exception as error:
            failed = _as_raised(error, _task_note(number, task))
            if not returns_errors or _WORKER.leaves_debugger(error):
                if failed is error:
                    raise
                raise failed from error
            result = FailedTask(number, task, failed)
            del failed
        if progress is not None:
            progress.add(1)
        del task  # hold on to neither while the next is drawn and run
        yield result
        del result


def _task_note(number: int, task: Any) -> str:
    return f"Task {number} (counted from 0): {_shown(task)}"


def _batch_note(first: int, tasks: list[Any]) -> str:
    """Say which tasks it was, or one of them."""
    if not tasks:
        return f"It had done all that it had, up to task {first - 1} (counted from 0)"
    if len(tasks) == 1:
        return _task_note(first, tasks[0])
    return (
        f"One of tasks {first} to {first + len(tasks) - 1} (counted from 0), of which "
        f"the first is: {_shown(tasks[0])}"
    )


def _as_raised(error: BaseException, note: str) -> Any:
    """Return what is raised where a task has raised *error*, with a note.

    What is no Exception would end the program, or look like the end of the results.
    """
    if isinstance(error, StopIteration) or not isinstance(error, Exception):
        shown = type(error).__qualname__
        with contextlib.suppress(Exception):  # as its own methods may fail
            shown = repr(error)
        cause, error = error, RuntimeError(f"a task raised {shown}")
        error.__cause__ = cause
    # Python 3.10, of which a type checker knows that it has no notes, or a class that
    # refuses them.
    with contextlib.suppress(Exception):
        error.add_note(note)  # type: ignore[attr-defined, unused-ignore]
    return error


def _shown(value: Any) -> str:
    """Return a short text for *value*, whatever its own methods do."""
    texts = [f"<{type(value).__qualname__}>"]
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200

    def show() -> None:
        with contextlib.suppress(BaseException):
            texts.append(short.repr(value)[:400])

    thread = threading.Thread(target=show, daemon=True)  # as it may take for ever
    if type(value) not in _slow_to_show:
        with contextlib.suppress(RuntimeError):  # no thread can be started
            thread.start()
            thread.join(timeout=1)
            if thread.is_alive() and type(value).__module__ != "builtins":
                _slow_to_show.add(type(value))
    return texts[-1]


_slow_to_show: weakref.WeakSet[Any] = weakref.WeakSet()  # types; not waited for again


class _Inbox:
    """The reports of a run's batches, in the order in which they are wanted.

    Any thread may call `put` and `fail`, which cannot block or fail; the consumer's
    thread alone calls `take`.
    """

    def __init__(self, *, ordered: bool) -> None:
        self.reports: queue.SimpleQueue[tuple[int | None, Any]] = queue.SimpleQueue()
        self.put = self.reports.put
        self.ordered = ordered
        self.next_number = 0  # of the batch whose turn it is, if ordered
        self.early: dict[int, Any] = {}  # outcomes of batches whose turn it is not

    def fail(self, error: BaseException) -> None:
        """Report an error that ends the run, of no batch that is known."""
        self.put((None, _Failure(error, ends_run=True)))

    def take(self, timeout: float) -> tuple[int | None, Any] | None:
        """Return the number of the next batch, or None, and what has become of it.

        Return None if one has come whose turn it is not. Raise `queue.Empty` after
        *timeout* seconds.
        """
        if self.next_number not in self.early:
            number, outcome = self._wait_until(time.monotonic() + timeout)
            again = isinstance(outcome, _Outcome) and outcome.is_unreadable()
            if number is None or again or not self.ordered:
                return number, outcome
            self.early[number] = outcome
            if number != self.next_number:
                return None
        self.next_number += 1
        return self.next_number - 1, self.early.pop(self.next_number - 1)

    def wait_again_for(self, number: int) -> None:
        self.next_number = min(self.next_number, number)

    def _wait_until(self, deadline: float) -> tuple[int | None, Any]:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return self.reports.get_nowait()
            with contextlib.suppress(queue.Empty):
                # Python 3.10 may wait for ever for what is over before it has begun.
                return self.reports.get(timeout=min(max(left, 0.01), _WAIT_SLICE))


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
        # The lag between two messages grows with the square root of their number.
        scale = 0.5 * (11 - min(self.verbose, 10.5)) ** 2
        before, self.done = self.done, self.done + count
        steps = {math.isqrt(int(done / scale)) for done in (before, self.done)}
        stream = sys.stderr if self.verbose < 50 else sys.stdout
        if (
            stream is not None
            and not getattr(stream, "closed", False)
            and (len(steps) > 1 or self.verbose > 10 or self.done == self.total)
        ):
            of = "" if self.total is None else f" out of {self.total:3d}"
            seconds = time.monotonic() - self.start
            print(f"Done {self.done:3d}{of} | {seconds:.1f} s", file=stream)
            getattr(stream, "flush", bool)()  # which not all have


class _BatchSizes:
    """The rule of ``batch_size="auto"``, which `Joblib.setup` tells.

    It has the methods that joblib's backends have for it.
    """

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.size = 1

    def compute_batch_size(self) -> int:
        weight = self.engine.task_weight
        self.size = min(self.size, max(1, int(_HEAVIEST_BATCH / max(weight, 1))))
        return self.size

    def batch_completed(self, size: int, seconds: float) -> None:
        """Take note of how long a batch was out, until its results had been read."""
        if size == self.size and not 0.2 <= seconds <= 2:
            steps = 64 if seconds < 0.001 else 16 if seconds < 0.01 else 2
            self.size = (
                int(min(0.4 * size / seconds, steps * size, _LARGEST_BATCH)) or 1
            )


def _report(inbox: _Inbox, number: int, outcome: Any) -> None:
    """Report the outcome of a batch: what an engine does, in any thread.

    It refers to nothing of the run but the inbox, or a run that its own tasks refer to
    would never be collected.
    """
    inbox.put((number, outcome))


class _Batch:
    """Tasks that travel together, for as long as they are out."""

    def __init__(self, number: int, first: int, tasks: list[Any]) -> None:
        self.number = number
        self.first = first  # the number of its first task
        self.tasks = tasks
        self.data: Any = None  # the tasks, pickled
        self.sent_at = 0.0
        self.unpicklable: dict[int, BaseException] = {}  # errors, by index
        self.arrays: list[Any] = []  # that lie in files for it, which go with them
        self.scattered: dict[str, Any] = {}  # on Dask, by the user


class _Run:
    """One call of `Joblib.setup`: its function, tasks and results.

    All is for the consumer's thread. Only the run's generator refers to it: nothing
    that an engine keeps, and no registry, does. Otherwise a run that its own tasks,
    results or function refer to would never be collected, and so never end.
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
        self.timeout: float | None = options.pop("timeout", None)
        self.most_tasks: int | None = options.pop("maxtasksperchild", None)
        self.engine = _engine_like(backend)
        self.parallel = joblib.Parallel(n_jobs=n_jobs, backend=self.engine, **options)
        self.lifetime = _Lifetime(self)
        self.given_tasks = tasks
        self.tasks_error: BaseException | None = None
        self.is_exhausted = False
        self.progress: _Progress | None = None
        self.task_seconds = math.inf  # that a task was out, of the last batch
        self.ready: deque[_Batch] = deque()  # drawn, and not yet sent
        self.out: dict[int, _Batch] = {}
        self.most_out: float = 0  # batches
        self.batches, self.drawn = itertools.count(), 0
        self.completed: _Batch | None = None  # whose results are being handed out
        self.results: list[Any] = []  # received, and not yet handed out; reversed
        self.waiting_since: float | None = None

    def start(self) -> bool:
        """Start the engine. Return False if this process is to run the tasks."""
        engine, parallel = self.engine, self.parallel
        if parallel.verbose:
            self.progress = _Progress(parallel.verbose, self.given_tasks)
        del self.given_tasks
        self.lifetime.begin()
        with self.lifetime.at_work():
            workers = int(engine.effective_n_jobs(parallel.n_jobs))
            if workers == 0:  # as joblib says it, of a cluster
                raise RuntimeError(f"{type(engine).__name__} has no active worker")
            asks = self.timeout is not None or self.returns_errors or self.most_tasks
            if workers == 1 and not (asks and engine.can_isolate()):
                return False
            self.lifetime.clean_ups.push(parallel)
            parallel.__enter__()
            self.lifetime.clean_ups.callback(engine.stop_call)
            engine.start_call()
            engine.workers = workers
            auto = joblib.parallel.AutoBatchingMixin.compute_batch_size
            own = type(engine).compute_batch_size is not auto
            self.sizes = engine if own else _BatchSizes(engine)
            self.most_out = _most_batches(parallel.pre_dispatch, workers)
            engine.prepare(self)
        return True

    def dispatch(self) -> bool:
        """Draw and send until all is out that may be. Return whether anything is."""
        with self.lifetime.at_work():
            if self.completed is not None:
                self.note_completion(self.completed)
            if self.engine.has_changed():
                formula = self.parallel.pre_dispatch
                with contextlib.suppress(ValueError):  # it comes to 0 for a moment
                    self.most_out = _most_batches(formula, self.engine.workers)
            while len(self.out) < self.most_out and self.lifetime.takes_more():
                if not self.ready and not self.is_exhausted:
                    self.draw()
                if not self.ready:
                    break
                self.send(self.ready.popleft())
        return bool(self.out) or self.lifetime.is_over()  # of which there is a report

    def draw(self) -> None:
        """Draw the tasks of the next batches: of one, if a batch has one task.

        Larger ones are drawn for all workers at once, so that the end is seen in time
        to share out what is left in small batches, but for what takes no time. An error
        of the tasks is kept until the results of what they did yield are out.
        """
        size, workers = self.parallel.batch_size, self.engine.workers
        if size == "auto":
            size = int(self.sizes.compute_batch_size())
        size = min(size, self.most_tasks or size)
        count = 1 if size == 1 else min(size * workers, sys.maxsize)
        drawn: list[Any] = []
        try:
            drawn.extend(itertools.islice(self.tasks, count))  # keeps what came before
        except (Exception, GeneratorExit) as error:
            self.tasks_error = error
        if len(drawn) < count:
            self.is_exhausted = True
            least = int(0.002 / self.task_seconds)  # what takes 2 ms
            size = max(1, min(size, max(least, len(drawn) // (10 * workers))))
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
        report = functools.partial(_report, self.inbox, batch.number)
        try:
            self.engine.send(self, batch, report)
        except Exception as error:
            # To be raised after the results that came before it.
            report(_Failure(error, ends_run=True))
            self.lifetime.has_failed = True

    def next_batch(self) -> BaseException | None:
        """Wait for a batch, take its results, and return an error that ends the run.

        There are none if it is time to look at the engine, or tasks are sent again.
        """
        with self.lifetime.at_work():
            report = self.wait()
            if report is None:
                return None
            number, outcome = report
            batch: Any = None if number is None else self.out.pop(number)
            received: Any
            try:
                received = self.engine.read(outcome)
            except Exception as caught:
                received = [], {}, _Failure(caught)
            if received is None:
                self.inbox.wait_again_for(batch.number)  # Ray's, whose turn it was
                self.engine.pack(batch, apart=True)
                self.send(batch)
                return None
            error: BaseException | None
            results, error = self.items_of(batch, *received)
            self.completed, self.lifetime.is_busy = batch, bool(self.out)
        results.reverse()
        self.results = results
        return error

    def wait(self) -> tuple[int | None, Any] | None:
        """Return the next report, or None if it is not there yet.

        Then it is time to look at the engine, or to wait anew.
        """
        self.engine.give_way()
        now = time.monotonic()
        if self.waiting_since is None:
            self.waiting_since = now
        limit = math.inf if self.engine.limits_tasks else self.timeout
        left = self.waiting_since + (math.inf if limit is None else limit) - now
        try:
            report = self.inbox.take(min(left, self.engine.look_again))
        except queue.Empty:
            if left > self.engine.look_again:
                self.engine.check()
                return None
            raise self.timeout_error() from None
        self.waiting_since = None
        return report

    def timeout_error(self) -> _TaskTimeoutError:
        early = self.inbox.early  # in order, these wait for the others
        batches = [self.out[number] for number in self.out.keys() - early]
        oldest = min(batches, key=operator.attrgetter("first"))
        return _TaskTimeoutError(
            f"no task has completed within the timeout of {self.timeout!r} seconds. "
            f"{sum(len(batch.tasks) for batch in batches)} are out, of which the "
            f"oldest batch is: {_batch_note(oldest.first, oldest.tasks)}"
        )

    def items_of(
        self, batch: Any, results: list[Any], failures: Any, failure: _Failure | None
    ) -> tuple[list[Any], Any]:
        """Return what the run yields for a batch, and an error that ends the run.

        *results* are those of the first tasks, *failures* are errors of some of these
        by their indices, and *failure* is what has become of the other tasks.
        """
        if batch is None:
            return [], failure and failure.error
        done = len(results)
        if not (failures or failure):
            if done == len(batch.tasks):
                return results, None
            failure = _Failure(RuntimeError("results are missing"))
        rest: Any = failure and self.engine.explained(
            failure, _batch_note(batch.first + done, batch.tasks[done:])
        )
        items: list[Any] = []
        for index, task in enumerate(batch.tasks):
            number, error = batch.first + index, rest
            if index in failures:
                packed = batch.unpicklable.pop(index, failures[index])
                note = _task_note(number, task)
                error = _as_raised(self.engine.unpacked(packed, note, batch), note)
            elif index < done:
                items.append(results[index])
                continue
            ends_run = error is rest and failure is not None and failure.ends_run
            if not self.returns_errors or ends_run or _WORKER.leaves_debugger(error):
                self.lifetime.has_failed |= failure is not None
                return items, error
            items.append(FailedTask(number, task, error))
        return items, None

    def note_completion(self, batch: _Batch) -> None:
        """Let the size of batches follow; the time of reading counts, too."""
        self.completed = None
        size = len(batch.tasks)
        seconds = max(time.monotonic() - batch.sent_at, 1e-6)  # some clocks tick seldom
        self.task_seconds = seconds / size
        self.sizes.batch_completed(size, seconds)
        if self.progress is not None:
            self.progress.add(size)


def _results(run: _Run) -> Generator[Any, None, None]:
    """Yield the results of a run: what `Joblib.setup` returns."""
    # Also if an interrupt keeps this from reaching its end.
    weakref.finalize(run, run.lifetime.end).atexit = False  # _at_exit does that
    error: BaseException | None = None
    try:
        if not run.start():
            yield from _one_by_one(
                run.task_func,
                run.tasks,
                run.progress,
                returns_errors=run.returns_errors,
            )
            return
        with run.engine.retrieval_context():
            while error is None and run.dispatch():
                error = run.next_batch()
                results, pop = run.results, run.results.pop
                while results:
                    yield pop()  # hold on to none that has been handed out
        if error is None:
            error = run.tasks_error
        if error is not None:
            # Not inside `with`, which assigns to attributes of errors. Python itself
            # makes a RuntimeError of a StopIteration here.
            raise error
    finally:
        run.tasks_error = None
        # Here, since Python drops an interrupt of what the collector calls.
        run.lifetime.end()
        del error, run  # as its traceback refers to this frame


# --------------------------------------------------------------------------------------
# Ends of runs.
#
# However a run ends (`finally` of _results, the finalizer of its _Run, or a hook at
# exit), its lifetime's `end` is called. In a thread of its own that calls `clean_up`:
# what is out is called off by `abort_everything` of the engine, which kills workers
# that are busy; `stop_call` and `terminate` follow, as with joblib.
#
# A lifetime stands in _open_runs from the start of the run until all that it has
# started has ended. When the interpreter exits, runs that nobody will read to the end
# are ended: those that were last read in the main thread, in one that has ended, or in
# a daemon thread. Then all pools of workers are stopped. There are two hooks: of
# atexit, which comes before those of Dask and Ray if these were imported before the
# first run; and of multiprocessing, for its child processes.


class _Lifetime:
    """Who reads a run, what it has started, and whether it has ended.

    Any thread may call `end` and `fail`; `_end` and `clean_up` are called in a thread
    of their own; the rest is for the consumer's thread.
    """

    def __init__(self, run: _Run) -> None:
        self.run = weakref.ref(run)
        self.engine = run.engine
        self.pid = 0  # of the process that it was started in
        self.reader = threading.current_thread()  # who has last read it
        self.is_at_work = False  # inside of the engine
        self.is_busy = False  # something is out
        self.has_failed = False  # the engine, which takes no more
        self.end_once = threading.Lock()  # test-and-set: it is never unlocked
        self.ended = threading.Event()  # set if there is nothing to end
        self.ended.set()
        self.clean_ups = contextlib.ExitStack()  # all of them are done, if one fails

    def begin(self) -> None:
        self.pid, self.reader = os.getpid(), threading.current_thread()
        self.ended.clear()
        _open_runs.add(self)
        _end_all_at_exit(self.pid)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Surround what the consumer's thread does with the engine."""
        if self.pid != os.getpid():
            raise RuntimeError(
                "a run cannot be read in a fork of the process it is from"
            )
        self.reader, self.is_at_work = threading.current_thread(), True
        try:
            yield
        finally:
            self.is_at_work = False
            if self.is_over():  # meanwhile, in another thread
                self.engine.abort_everything(ensure_ready=False)

    def is_over(self) -> bool:
        return self.end_once.locked()

    def takes_more(self) -> bool:
        return not (self.has_failed or self.is_over())

    def end(self) -> None:
        """End the run, and wait for that if it is this thread's. May be repeated.

        It is done in another thread, where no signal handler interrupts it, and which
        can wait for whatever this one may hold: the garbage collector may call this
        anywhere, even in the middle of another run's work.
        """
        if self.ended.is_set() or self.pid != os.getpid():
            return
        with _interrupts_later():
            if self.end_once.acquire(blocking=False):
                try:
                    _call_in_thread(self._end)
                except BaseException:  # no stack is left, say: to be done another time
                    self.end_once.release()
                    raise
        me = threading.current_thread()
        is_busy = any(
            other.is_at_work and other.reader is me for other in list(_open_runs)
        )
        if self.reader is me and not is_busy:
            self.ended.wait(timeout=10)

    def _end(self) -> None:
        try:
            self.clean_up()
        finally:
            _open_runs.discard(self)
            self.ended.set()

    def clean_up(self) -> None:
        """Call off what is out; stop the workers, or keep them for the next run."""
        if self.is_busy or self.has_failed:
            self.clean_ups.callback(self.engine.abort_everything, ensure_ready=False)
        self.clean_ups.close()
        self.engine.parallel = None  # which refers to the engine

    def fail(self, error: BaseException) -> None:
        """Let whoever reads on meet an error."""
        run = self.run()
        if run is not None:
            run.inbox.fail(error)


_open_runs: set[_Lifetime] = set()
_idle_pools: list[_Pool] = []  # only ever changed by atomic calls, so needs no lock
_pools: weakref.WeakSet[_Pool] = weakref.WeakSet()  # all that are not collected
_most_idle = 3  # pools; none in a fork, which may end without any clean-up, or at exit
_inherited: list[Any] = []  # what a fork has of its parent, which must not be collected


def _call_in_thread(function: Callable[[], object]) -> None:
    """Start *function* in a thread; call it here if no thread can be started."""
    thread = threading.Thread(target=function, daemon=True)
    try:
        if not sys.is_finalizing():
            thread.start()
            return
    except RuntimeError:  # a limit is reached, or the interpreter exits
        pass
    function()


@functools.cache
def _end_all_at_exit(pid: int) -> None:
    """See to it, once a process, that nothing is left when it exits."""
    atexit.register(_at_exit, pid)
    multiprocessing.util.Finalize(None, _at_exit, (pid,), exitpriority=100)


def _at_exit(pid: int) -> None:
    """End the runs that nobody will read to the end, and stop their workers."""
    global _most_idle
    if pid != os.getpid():  # a fork
        return
    _most_idle = 0
    read_on = set()
    for lifetime in list(_open_runs):
        reader = lifetime.reader
        if reader is threading.main_thread() or not reader.is_alive():
            # Whoever reads on, in a hook that comes later, must not take it for the
            # end.
            lifetime.fail(
                RuntimeError("the run was ended, since the interpreter exits")
            )
        elif reader.daemon:
            lifetime.fail(SystemExit())  # which ends a thread in silence
        else:
            read_on.add(lifetime.engine.pool)  # `threading` waits for it
            continue
        lifetime.end()
        lifetime.ended.wait(timeout=10)
    for pool in set(_pools) - read_on:
        pool.stop()


def _stop_idle_pools(most: int = 0) -> None:
    """Stop idle workers, those that have been idle for longest first."""
    while len(_idle_pools) > most:
        with contextlib.suppress(IndexError):  # another thread has taken it
            _idle_pools.pop(0).stop()


# All starts of processes take this: a fork in the middle of one would hold the ends of
# connections open.
_starting = threading.RLock()
_our_ends: set[Any] = set()  # of connections to workers, and of the life line
_life_line: Any = None  # a pipe that ends when this process does


def _after_fork() -> None:
    """In a fork: let go of what the parent's runs have, and touch none of it."""
    global _open_runs, _idle_pools, _most_idle, _life_line, _starting
    _starting = threading.RLock()  # of which no other thread of the parent has a part
    pools = [*_pools]
    _inherited.append((_open_runs, _idle_pools, pools))
    for lifetime in _open_runs:
        run = lifetime.run()
        if run is not None:
            run.results.clear()  # which are to be read in the parent
    for end in _our_ends:
        end.close()  # or the parent's workers would not see that it has ended
    # Python would stop the parent's worker processes, or fail to wait for them.
    workers = {worker.process for pool in pools for worker in pool.workers}
    if workers:
        _private(multiprocessing.process, "_children").difference_update(workers)
    _open_runs, _idle_pools, _most_idle, _life_line = set(), [], 0, None
    _pools.clear()
    _our_ends.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _starting.acquire(),
        after_in_parent=lambda: _starting.release(),
        after_in_child=_after_fork,
    )


# --------------------------------------------------------------------------------------
# Engines: joblib's backends, and what they lack.


# Private names of Python and joblib that this file uses, and what for. Looked at in
# Python 3.10 to 3.14 and joblib 1.5.0 to 1.6.0. Without one of them no run that needs it
# starts.
_PRIVATE_NAMES = {
    # multiprocessing.process
    "_children": "to let a fork not stop its parent's workers",
    # joblib._memmapping_reducer
    "_get_temp_dir": "to put files where joblib would",
    # joblib.parallel.ParallelBackendBase
    "_prepare_worker_env": "to limit the threads of libraries in workers",
    # joblib.parallel.ThreadingBackend
    "_pool": "to share no threads with others",
}


def _private(owner: Any, name: str) -> Any:
    """Return an attribute that stands in the list above."""
    try:
        return getattr(owner, name)
    except AttributeError:
        message = f"{name}, which is needed {_PRIVATE_NAMES[name]}, is not in {owner!r}"
        versions = f"joblib {joblib.__version__}, Python {sys.version.split()[0]}"
        raise RuntimeError(f"{message} ({versions}): use another version") from None


_Received = tuple[list[Any], dict[int, Any], "_Failure | None"]
_ReportFunction = Callable[[Any], None]


# To a type checker the base could be anything: hence the "ignore", here and below.
class _Engine(joblib.parallel.ParallelBackendBase):  # type: ignore[misc]
    """Mixed into the class of a joblib backend: what the loop asks of it.

    This is what threads and backends of others need. All but `abort_everything`,
    `stop_call` and `terminate`, which are called in the thread that ends the run, is
    for the consumer's thread.
    """

    more_options: frozenset[str] = frozenset()  # that no signature tells of
    pool: Any = None
    workers = 1
    limits_tasks = False  # it keeps *timeout* itself, for each task
    look_again = math.inf  # seconds after which it may have changed
    task_weight: float = 0  # bytes of arrays in a task, if known

    def separate_from(self, original: Any) -> None:
        """Give up what must not be shared with *original*, of which this is a copy."""
        if isinstance(self, joblib.parallel.ThreadingBackend):
            _private(self, "_pool")  # maybe somebody else's threads
            self._pool = None
        if hasattr(self, "reset_batch_stats"):
            self.reset_batch_stats()  # those of another run

    def can_isolate(self) -> bool:
        """Tell whether one worker would be another process, which can be killed."""
        return False

    def has_changed(self) -> bool:
        """Tell whether there are more workers than there were, or fewer."""
        return False

    def check(self) -> None:
        """Raise an error if no report will ever come."""

    def give_way(self) -> None:
        """Get ready to wait, where that could keep tasks from running."""

    def prepare(self, run: _Run) -> None:
        """Get ready for the batches of a run."""

    def pack(self, batch: _Batch, *, apart: bool = False) -> None:
        """Pickle a batch as it was drawn, if it is to be."""

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        """Submit a batch. The engine must not keep the function: see _Run."""
        in_thread = getattr(self, "supports_sharedmem", False)
        run_batch = _WORKER.run_in_thread if in_thread else _by_value("run_elsewhere")
        arguments = run.task_func, run.returns_errors, *batch.tasks
        # The first may start threads, which an interrupt would leave behind.
        starts = in_thread and batch.number == 0
        try:
            with _interrupts_later() if starts else contextlib.nullcontext():
                calls = self.calls_of(batch, run_batch, *arguments)
                self.submit(calls, callback=report)
        except AttributeError as error:
            # A thread could not be started, and Python's own pool of threads fails to
            # stop those that could.
            if isinstance(error.__context__, RuntimeError):
                raise error.__context__ from None
            raise

    def calls_of(self, batch: _Batch, function: Any, *arguments: Any) -> Any:
        """Return what joblib's backends take as a batch: a call of *function*."""
        calls = joblib.parallel.BatchedCalls(batch.tasks, self.get_nested_backend())
        # One call a batch: a call a task takes several times longer to make, to send
        # and to unpickle.
        calls.items = [joblib.delayed(function)(*arguments)]
        return calls

    def read(self, outcome: Any) -> _Received | None:
        """Return the results of a batch, what failed among them, and what ended it.

        The results are those of the first tasks, in their order; None stands for that
        of a task that failed. If tasks have to be sent again, apart, None is returned.
        """
        if isinstance(outcome, _Failure):
            return [], {}, outcome
        ((results, failures),) = self.retrieve_result_callback(outcome)
        return results, failures, None

    def unpacked(self, error: Any, note: str, batch: _Batch) -> BaseException:
        """Return the error of a task, from what the worker has sent."""
        if isinstance(error, BaseException):
            return error
        return _unpacked_error(error, note)

    def explained(self, failure: _Failure, rest: str) -> Any:
        """Return the error that ended a batch; *rest* says of which tasks."""
        return _as_raised(failure.error, rest)


def _is_registered(backend: Any, name: str) -> bool:
    """Tell whether *backend* is of the class that is registered by that name."""
    kind = joblib.parallel.BACKENDS.get(name)
    return isinstance(kind, type) and isinstance(backend, kind)


def _mixin_for(backend: Any) -> Any:
    if isinstance(backend, joblib.parallel.LokyBackend):
        return _Loky
    if _is_registered(backend, "dask"):
        return _Dask
    if _is_registered(backend, "ray"):  # derived from that of multiprocessing
        return _Ray
    if isinstance(backend, joblib.parallel.MultiprocessingBackend):
        return _Multiprocessing
    return _Engine


@functools.cache
def _engine_class(mixin: Any, kind: Any) -> Any:
    if issubclass(mixin, kind):
        bases: Any = (mixin,)
    elif issubclass(mixin, _Processes):
        bases = (kind, mixin)  # what a third party adds to loky wraps what we do
    else:
        bases = (mixin, kind)
    return type(kind.__name__, bases, {})


def _engine_like(backend: Any) -> Any:
    """Return an engine for one run like *backend*, which is left as it is."""
    is_sequential = isinstance(backend, joblib.parallel.SequentialBackend)
    if not (is_sequential or backend.supports_retrieve_callback):
        raise ValueError(
            f"backend must tell when a batch has completed, got {backend!r}"
        )
    kind: Any = type(backend)
    engine = object.__new__(_engine_class(_mixin_for(backend), kind))
    vars(engine).update(vars(backend))
    engine.separate_from(backend)
    return engine


# ---- what is pickled -----------------------------------------------------------------


class _PicklesAs:
    """Something that arrives in a worker as what *function* returns for *arguments*."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("it is a function in workers only")  # pickle wants a callable


@functools.cache
def _by_value(name: str) -> _PicklesAs:
    """Return what stands for a function that runs in workers (see below)."""
    wrap = joblib.wrap_non_picklable_objects
    function, arguments = wrap(getattr(_WORKER, name), keep_wrapper=False).__reduce__()
    return _PicklesAs(function, *arguments)


def _set_cause(error: BaseException, text: str) -> None:
    # As `raise ... from` would, though the class may refuse an assignment.
    set_cause: Any = BaseException.__cause__
    set_cause.__set__(error, _WorkerTraceback(f'\n"""\n{text}\n"""'))


def _unpacked_error(packed: Any, note: str = "") -> BaseException:
    """Return an error that a worker has packed, with the text of its traceback."""
    data, members, summary, text = packed
    error: BaseException
    try:
        form = pickle.loads(data or b"")  # no data: it fails
        if members is not None:
            builtin, kind, args, state = form
            form = builtin, kind, (*args, [*map(_unpacked_error, members)]), state
        error = form if isinstance(form, BaseException) else _rebuilt_error(*form)
    except Exception:
        message = f"a task raised an exception that cannot be pickled: {summary}"
        error = RuntimeError(message)
    _set_cause(error, f"{text}\n{note}".strip() if sys.version_info < (3, 11) else text)
    return error


def _told_more(error: BaseException, text: str) -> BaseException:
    """Return *error* with more text, if it is one that this file has made."""
    if type(error) not in (BrokenProcessPool, _TaskTimeoutError):
        return error
    more = type(error)(f"{error}{text}")
    more.__cause__ = error.__cause__
    return more


def _rebuilt_error(builtin: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Make an error of class *kind* by the methods of its built-in base class alone."""
    error = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    for name, value in (state or {}).items():
        object.__setattr__(error, name, value)  # also if the class is frozen
    return error


def _without_first_frame(error: BaseException) -> BaseException:
    """Let go of the frame that has caught *error*, which is to refer to it."""
    trace = error.__traceback__
    return error.with_traceback(trace and trace.tb_next)


class _Remote(_Engine):
    """An engine whose workers are other processes: what is sent to them is pickled.

    All of that is done here, in the consumer's thread, so that an error names its task,
    keeps the results before it, and costs no worker.
    """

    dump: Any = None  # pickles the function and the tasks
    files: Any = None  # _Files, if large arrays are mapped

    def prepare(self, run: _Run) -> None:
        self.returns_errors, self.limit = run.returns_errors, run.timeout
        self.tasks_pickled = 0
        self.dump = self.pickler()
        try:
            payload = self.dump(run.task_func)
        except Exception as error:
            shown = _shown(run.task_func)
            message = f"task_func cannot be pickled: {shown}: {_WORKER.told(error)}"
            raise pickle.PicklingError(message) from error
        self.take_function(payload)
        if self.files is not None:
            self.files.of_function, self.files.weight = self.files.kept, 0

    def pickler(self) -> Any:
        return _WORKER.make_dump({types.CodeType: _code_with_its_file})

    def take_function(self, payload: bytes) -> None:
        """Keep the pickled function, which each worker is to unpickle once."""
        raise NotImplementedError

    def pack(self, batch: _Batch, *, apart: bool = False) -> None:
        if self.files is not None:
            self.files.kept = batch.arrays
        batch.data = self.pickled(self.stand_ins(batch), batch.unpicklable, apart)
        if self.files is not None:
            self.tasks_pickled += len(batch.tasks)
            self.task_weight = self.files.weight / self.tasks_pickled

    def stand_ins(self, batch: _Batch) -> list[Any]:
        """Return what is to be pickled in place of the tasks."""
        return batch.tasks

    def pickled(self, tasks: list[Any], unpicklable: Any, apart: bool) -> bytes:
        """Return the pickled tasks of a batch; put errors of that into *unpicklable*.

        They travel together. Those of which one cannot be pickled or unpickled travel
        apart, so that it costs none of the others; in its place there is nothing, which
        cannot be unpickled.
        """
        # To unpickle a task is part of the time that it may take.
        if not (apart or (self.limit is not None and not _WORKER.are_plain(tasks))):
            with contextlib.suppress(Exception):
                return bytes(self.dump(tasks, _TOGETHER))
        parts = []
        for index, task in enumerate(tasks):
            try:
                parts.append(self.dump(task))
            except Exception as error:
                message = f"a task cannot be pickled: {_WORKER.told(error)}"
                unpicklable[index] = pickle.PicklingError(message)
                unpicklable[index].__cause__ = _without_first_frame(error)
                parts.append(b"")
        return _APART + pickle.dumps(parts, protocol=-1)

    def read(self, outcome: Any) -> _Received | None:
        outcome = self.retrieve_result_callback(outcome)
        if isinstance(outcome, _Failure):
            return [], {}, outcome
        received: list[Any] = []
        failures: dict[int, Any] = {}
        if outcome.is_unreadable():
            return None
        for reply in outcome.replies:
            kind, results, failed = pickle.loads(memoryview(reply)[1:])
            if kind in ("no function", "no results"):
                ends_run = kind == "no function" and outcome.ends_run
                failure = _Failure(_unpacked_error(failed), ends_run=ends_run)
                return received, failures, failure
            failures.update((len(received) + index, failed[index]) for index in failed)
            if kind == "apart":
                self.unpickle(results, failures, len(received))
            received += results
        return received, failures, outcome.failure

    def unpickle(self, results: list[Any], failures: Any, first: int) -> None:
        """Unpickle results that have come apart, each in its place."""
        for index, data in enumerate(results):
            if first + index not in failures:
                try:
                    results[index] = pickle.loads(data)
                except (Exception, SystemExit, GeneratorExit) as error:
                    message = f"the result cannot be unpickled: {_WORKER.told(error)}"
                    if isinstance(error, AttributeError):
                        message += (
                            ": a class of the program travels by value, which not all "
                            "can (those with slots): put it into a module"
                        )
                    failure = pickle.UnpicklingError(message)
                    failure.__cause__ = _without_first_frame(error)
                    failures[first + index] = failure

    def retrieve_result_callback(self, out: Any) -> Any:
        return out

    def unpacked(self, error: Any, note: str, batch: _Batch) -> BaseException:
        unpacked = super().unpacked(error, note, batch)
        has_arrays = self.files is not None and (batch.arrays or self.files.of_function)
        with contextlib.suppress(Exception):  # as its own methods may fail
            text = f"{unpacked} {unpacked.__cause__}"
            if has_arrays and re.search("(array|buffer|destination).* read-only", text):
                return cast(BaseException, _as_raised(unpacked, _READ_ONLY))
        return unpacked


_READ_ONLY = (
    "Arrays of more than max_nbytes are mapped, read-only: mmap_mode='c' lets a task "
    "change its own view, max_nbytes=None sends copies"
)


class _Outcome(NamedTuple):
    """What a worker has sent for a batch, and what kept it from sending the rest."""

    replies: list[Any]
    failure: _Failure | None = None
    ends_run: bool = True  # if the function could not be loaded

    def is_unreadable(self) -> bool:
        return self.replies[-1:] == [_UNREADABLE]


# ---- Dask and Ray --------------------------------------------------------------------


class _Dask(_Remote):
    """Sends batches by the client itself: joblib's way to it scatters the tasks.

    What is scattered is lost with its worker, and joblib (1.5.0 to 1.6.0) does not
    report that; nor does it let go of the results of a run that was left. Here batches
    are calls, and so is the function: Dask makes it again if it is lost.
    """

    look_again = 2
    next_look: float = 0

    def separate_from(self, original: Any) -> None:
        super().separate_from(original)
        self.futures: set[Any] = set()  # of batches that are out
        self.function: Any = None
        self.threads: list[int] = []  # how many all workers have, once that is known

    def effective_n_jobs(self, n_jobs: int) -> int:
        # With one worker tasks would run in this process, not on the cluster. With
        # none, joblib raises an error.
        workers = int(super().effective_n_jobs(n_jobs))
        return workers and max(workers, 2)

    def has_changed(self) -> bool:
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + self.look_again
            # To wait for the answer could be to wait for ever.
            self.client.loop.add_callback(_count_on_dask, self.client, self.threads)
        before = self.workers
        if self.threads:
            self.workers = max(2, self.threads[0])
        if self.workers == before:
            return False
        self.hand_out_function()
        return True

    def check(self) -> None:
        if self.client.status in ("closing", "closed"):
            raise RuntimeError("the client of Dask has been closed")

    def give_way(self) -> None:
        if self in _seceded.runs:
            return
        if not _seceded.is_out:
            # That fails if it is no thread of a task, or the task has done it itself.
            with contextlib.suppress(Exception):
                importlib.import_module("dask.distributed").secede()
                _seceded.is_out = True
        _seceded.runs.add(self)

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        # That of joblib fails for the second run that a task has open, and does not
        # come back from one that is left.
        try:
            yield
        finally:
            _seceded.runs.discard(self)
            if _seceded.is_out and not _seceded.runs:
                _seceded.is_out = False
                importlib.import_module("dask.distributed").rejoin()

    def start_call(self) -> None:
        self.next_look = time.monotonic() + self.look_again
        self.over = threading.Event()

    def stop_call(self) -> None:
        self.over.set()
        self.futures.clear()
        self.function = None  # which lets the cluster forget it

    def take_function(self, payload: bytes) -> None:
        config = {"backend": "dask"}
        functions = self.dump(_WORKER.Functions(payload, self.returns_errors, config))
        call = functools.partial(_call_on_dask, self.client, self.submit_kwargs)
        self.function, self.call = call(-1, pickle.loads, functions), call
        self.is_handed_out = asyncio.Event()
        self.hand_out_function()

    def hand_out_function(self) -> None:
        state = self.function, self.is_handed_out
        self.client.loop.add_callback(_hand_out_on_dask, self.client, *state)

    def stand_ins(self, batch: _Batch) -> list[Any]:
        # What the user has scattered stays where it is; its key stands for it.
        futures = [self.data_futures.get(id(task)) for task in batch.tasks]
        batch.scattered = {str(f.key): f for f in futures if f is not None}
        return [
            task if future is None else str(future.key)
            for task, future in zip(batch.tasks, futures, strict=True)
        ]

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        apply = importlib.import_module("dask.utils").apply
        arguments = [batch.data, batch.scattered]
        call = functools.partial(
            self.call, batch.number, apply, self.function, arguments
        )
        state = self.function, self.is_handed_out, self.futures, self.over
        self.client.loop.add_callback(_run_on_dask, self.client, call, *state, report)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        self.over.set()
        if self.client.status == "running":
            self.client.cancel([*self.futures, *filter(None, [self.function])])


class _Seceded(threading.local):
    """Of a thread of a Dask worker: runs that its task has open, and waits for."""

    def __init__(self) -> None:
        self.runs: weakref.WeakSet[_Dask] = weakref.WeakSet()
        self.is_out = False  # of the pool of threads: the worker has started another


_seceded = _Seceded()
_configuring_dask = threading.Lock()


def _call_on_dask(client: Any, options: Any, number: int, *call: Any) -> Any:
    """Have the cluster call something; return the future."""
    # To Dask, tasks of one name are of one kind: these are shared out evenly.
    name = "function" if number < 0 else "batch"
    # What is submitted in the same moment would be run in any order.
    options = {**options, "priority": options.get("priority", 0) - number * 1e-6}
    config = importlib.import_module("dask").config
    # Dask would warn of large tasks; but they have to travel in some way.
    limit = {"distributed.admin.large-graph-warning-threshold": "1TB"}
    with _configuring_dask, config.set(limit):
        return client.submit(*call, key=f"{name}-{uuid.uuid4().hex}", **options)


async def _count_on_dask(client: Any, threads: list[int]) -> None:
    """Look how many threads all workers have: on the event loop of the client."""
    with contextlib.suppress(Exception):  # the client has been closed, say
        threads[:] = [sum((await client.ncores()).values())]


async def _hand_out_on_dask(client: Any, function: Any, done: asyncio.Event) -> None:
    """Copy the function to all workers of the moment: on the event loop of the client.

    Dask has a call run where the data is that it needs, and moves calls to idle workers
    only if those that have had their name took long.
    """
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await function.exception(asynchronous=True)
        # One that does not answer must not keep the others from work.
        copying = client.replicate([function], asynchronous=True)
        await asyncio.wait_for(copying, _PATIENCE)
    done.set()


async def _run_on_dask(
    client: Any,
    call: Any,
    function: Any,
    is_handed_out: asyncio.Event,
    futures: set[Any],
    over: threading.Event,
    report: _ReportFunction,
) -> None:
    """Have a batch run, and report its outcome: on the event loop of the client."""
    future: Any = None
    try:
        # Those that wait for the function on the cluster would be run in any order.
        await is_handed_out.wait()
        if not over.is_set():
            future = call()
            futures.add(future)
            if over.is_set():  # meanwhile
                await client.cancel([future], asynchronous=True)
            reply = await client.gather(future, asynchronous=True)
            report(_Outcome([reply]))
    except BaseException as error:
        # Without the function, no other batch could be run, either.
        is_lost = function.status in ("cancelled", "error")
        report(_Failure(error, ends_run=is_lost))
    futures.discard(future)


class _Ray(_Remote):
    """Puts the function into Ray's store once a run; each worker unpickles it once."""

    def effective_n_jobs(self, n_jobs: int) -> int:
        ray = importlib.import_module("ray")
        if not ray.is_initialized():
            ray.init()  # as joblib's backend would, a moment later
        return int(super().effective_n_jobs(n_jobs))

    def take_function(self, payload: bytes) -> None:
        functions = self.dump(_WORKER.Functions(payload, self.returns_errors, {}))
        self.function = uuid.uuid4().hex, importlib.import_module("ray").put(functions)

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        answer, arguments = _by_value("answer_of_ray"), (*self.function, batch.data)
        self.submit(self.calls_of(batch, answer, *arguments), callback=report)

    def read(self, outcome: Any) -> _Received | None:
        try:
            return super().read(outcome)
        except Exception as error:  # an actor has died, which Ray does not replace
            return [], {}, _Failure(error, ends_run=True)

    def retrieve_result_callback(self, out: Any) -> Any:
        if isinstance(out, _Failure):
            return out
        return _Outcome(super(_Remote, self).retrieve_result_callback(out))

    def abort_everything(self, ensure_ready: bool = True) -> None:
        if importlib.import_module("ray").is_initialized():  # or it would be started
            super().abort_everything(ensure_ready)

    def terminate(self) -> None:
        if importlib.import_module("ray").is_initialized():
            super().terminate()


# ---- loky and multiprocessing --------------------------------------------------------


def _loky(module: str) -> Any:
    return importlib.import_module(f"joblib.externals.loky.{module}")


@functools.cache
def _pickle_main_by_value() -> None:
    """Let functions of the program travel from a process that was spawned, too.

    The program is called __mp_main__ there, which no worker can import.
    """
    if "__mp_main__" in sys.modules:
        try:
            cloudpickle = importlib.import_module("joblib.externals.cloudpickle")
        except ImportError:  # joblib 1.6
            cloudpickle = importlib.import_module("cloudpickle")
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])


class _Files:
    """The large arrays of a run, each in a file that goes with it.

    joblib would keep the file until the run ends. They lie in a folder of the run, the
    user's alone, which is made when it is first needed. The instance is the reducer of
    arrays: it is called for each that is pickled, in the consumer's thread.
    """

    def __init__(self, root: Any, options: dict[str, Any]) -> None:
        self.root = root
        self.pid = os.getpid()
        self.folder: Any = None
        self.files: dict[int, tuple[Any, str]] = {}  # by the ids of their arrays
        self.kept: list[Any] = []  # keeps the arrays that what is pickled has in files
        self.of_function: list[Any] = []
        self.weight = 0  # bytes of all arrays
        limit = options.pop("max_nbytes")
        self.max_nbytes = math.inf if limit is None else limit
        self.mode = options.pop("mmap_mode")
        self.prewarm = options.pop("prewarm", False)
        module = importlib.import_module("joblib._memmapping_reducer")
        self.place = _private(module, "_get_temp_dir")
        # Copied, since whoever has passed reducers does not want them changed.
        self.result_reducers = dict(options.get("backward_reducers") or {})
        self.reducers = {
            **(options.get("forward_reducers") or {}),
            **_WORKER.array_reducers(self),
        }

    def __call__(self, array: Any) -> Any:
        self.weight += array.nbytes
        mapping = _WORKER.mapping_of(array)
        if mapping is not None:
            return mapping
        if array.nbytes <= self.max_nbytes or array.dtype.hasobject:
            return _WORKER.copy_of(array)
        self.kept.append(array)
        drop, file = self.files.get(id(array), (None, ""))
        if drop is None or not drop.alive:
            file = self.written(array)
        return joblib.load, (file, self.mode, False)  # in its own byte order

    def written(self, array: Any) -> str:
        """Put an array into a file, which goes with it."""
        file = ""
        try:
            self.folder = self.folder or self.made_folder()
            file = os.path.join(self.folder, f"{uuid.uuid4().hex}.pkl")
            joblib.dump(array, file)
            os.chmod(file, 0o600)
        except OSError as error:
            if file:
                self.drop(0, file)
            folder = self.folder or self.root or "the folder for temporary files"
            raise OSError(
                error.errno,
                f"{error.strerror}: large arrays cannot be put into files there; the "
                "option temp_folder says where, max_nbytes=None sends copies instead",
                os.fspath(folder),
            ) from error
        if self.prewarm:
            joblib.load(file, mmap_mode=self.mode).max()
        drop = weakref.finalize(array, self.drop, id(array), file)
        drop.atexit = False
        self.files[id(array)] = drop, file
        return file

    def made_folder(self) -> str:
        # joblib's own name, by which those who look for such folders find them.
        name = f"joblib_memmapping_folder_{self.pid}_{uuid.uuid4().hex}"
        folder, _ = self.place(name, self.root)
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # which that has made, for everybody
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        os.mkdir(folder, mode=0o700)
        if not _is_frozen():  # where it would start the program anew
            tracker = _loky("backend.resource_tracker")
            tracker.register(folder, "folder")  # removes it if we cannot
        return str(folder)

    def drop(self, key: int, file: str) -> None:
        """Remove the file of an array that is no more."""
        self.files.pop(key, None)
        if self.pid == os.getpid():
            with contextlib.suppress(OSError):  # Windows, where a worker maps it
                os.unlink(file)

    def close(self) -> None:
        """Remove all files."""
        self.reducers.clear()  # which refers to this
        while self.files:
            self.files.popitem()[1][0].detach()
        folder, self.folder = self.folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            if not _is_frozen():
                _loky("backend.resource_tracker").unregister(folder, "folder")


def _is_frozen() -> bool:
    """Tell whether this is an executable made by PyInstaller, or the like."""
    return bool(getattr(sys, "frozen", False))


class _Processes(_Remote):
    """Gives each run worker processes of its own, as many as it asked for."""

    more_options = frozenset(
        (
            "initializer",
            "initargs",
            "forward_reducers",
            "backward_reducers",
            "maxtasksperchild",
            "prewarm",
        )
    )
    limits_tasks = True
    function: Any = None  # a _Function

    def can_isolate(self) -> bool:
        return bool(self.effective_n_jobs(2) > 1)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,
        require: Any = None,
        idle_worker_timeout: float | None = None,
        **options: Any,
    ) -> int:
        self.parallel = parallel
        options = {**self.backend_kwargs, **options}
        idle = options.pop("idle_worker_timeout", None)
        self.idle_seconds = idle_worker_timeout or idle or 300
        self.context = options.pop("context", None) or multiprocessing.get_context()
        self.prepared: Any = (
            options.pop("initializer", None),
            options.pop("initargs", ()),
        )
        self.files = _Files(options.pop("temp_folder", None), options)
        _pickle_main_by_value()
        return int(self.effective_n_jobs(n_jobs))

    def prepare(self, run: _Run) -> None:
        if _is_loading():
            raise RuntimeError(
                f"{_importing_module()} starts worker processes while it is loaded in a "
                "worker process, which these would do in turn: guard it by `if __name__ "
                "== '__main__':`"
            )
        self.most_tasks = run.most_tasks or math.inf
        super().prepare(run)

    def pickler(self) -> Any:
        reducers = {types.CodeType: _code_with_its_file, **self.files.reducers}
        return _WORKER.make_dump(reducers, self.forks())

    def forks(self) -> bool:
        """Tell whether workers have all modules and functions of the program."""
        return False

    def take_function(self, payload: bytes) -> None:
        self.function = _Function(self, payload)

    def send(self, run: _Run, batch: _Batch, report: _ReportFunction) -> None:
        job = _Job(self.function, batch.data, len(batch.tasks), batch.number)
        self.submit(job, callback=report)

    def submit(self, func: Any, callback: Any = None) -> Any:
        if not isinstance(func, _Job):  # somebody has wrapped it
            func = _Job(self.function, self.dump(func, _CALL), 1)
        func.report = callback
        if self.pool is None:
            self.pool = self.find_pool()
        self.pool.submit(func)
        return func

    def find_pool(self) -> _Pool:
        raise NotImplementedError

    def explained(self, failure: _Failure, rest: str) -> Any:
        error = failure.error
        if failure.ends_run:  # no worker could be started, whatever the task
            return error
        if type(error) not in (BrokenProcessPool, _TaskTimeoutError):
            return super().explained(failure, rest)
        return _told_more(error, f". {rest}")

    def abort_everything(self, ensure_ready: bool = True) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop(kill=True)

    def terminate(self) -> None:
        if self.function is not None:
            self.function.is_over = True
        pool, self.pool = self.pool, None
        try:
            if pool is not None:
                pool.keep(self.idle_seconds)
        finally:
            if self.files is not None:
                self.files.close()


class _Loky(_Processes, joblib.parallel.LokyBackend):  # type: ignore[misc]
    """Keeps the workers of a run that ended well for the next that wants the same."""

    def find_pool(self) -> _Pool:
        env = _private(self, "_prepare_worker_env")(n_jobs=self.workers)
        prepared, key = self.prepared, cast(Any, None)
        # What can be pickled only while a process is started, such as a lock, is not
        # compared: those workers serve one run.
        with contextlib.suppress(Exception):
            prepared = super(_Processes, self).pickler()(prepared)  # arrays, too
            reducers = self.files.result_reducers
            options = self.workers, self.most_tasks, env, reducers
            key = _surroundings(), prepared, options
        # Loky starts an executable as if it were Python, which begins the program anew.
        context = (
            multiprocessing.get_context("spawn")
            if _is_frozen()
            else _loky("backend").get_context("loky")
        )
        recipe = _Recipe(
            context, prepared, self.files.result_reducers, env, self.most_tasks
        )
        return _take_pool(key) or _Pool(key, self.workers, recipe)


def _is_loading() -> bool:
    """Tell whether this is a worker process that is loading what a run needs."""
    return bool(getattr(sys.modules.get(_WORKER_MODULE), "is_loading", False))


def _importing_module() -> str:
    """Return the name of the module that is being imported, or that has called this."""
    stack = traceback.walk_stack(inspect.currentframe())
    frames = [frame for frame, _ in stack if frame.f_globals is not globals()]
    modules = [frame for frame in frames if frame.f_code.co_name == "<module>"]
    names = [str(frame.f_globals["__name__"]) for frame in [*modules, *frames]]
    return next(name for name in names if name != "__main__")  # that of the worker


def _surroundings() -> Any:
    """Return what a worker that is started now finds, and another run may not want."""
    environment = dict(os.environ)
    environment.pop("PYTEST_CURRENT_TEST", None)  # another one in each test
    return environment, os.getcwd(), list(sys.path)


class _Multiprocessing(_Processes, joblib.parallel.MultiprocessingBackend):  # type: ignore[misc]
    """Starts workers as multiprocessing does, anew for each run.

    A fork is a picture of the program as it is when the run starts.
    """

    def forks(self) -> bool:
        return bool(self.context.get_start_method() == "fork")

    def find_pool(self) -> _Pool:
        if _inherited and self.context.get_start_method() == "forkserver":
            # The server is a child of the parent, and no use to a fork.
            self.context = multiprocessing.get_context("spawn")
        reducers, prepared = self.files.result_reducers, self.prepared
        if not self.forks():
            # Not in an attendant, where pickle waits for imports that are going on
            # here. What can be pickled only while a process is started is left.
            with contextlib.suppress(Exception):
                prepared = super(_Processes, self).pickler()(prepared)
        recipe = _Recipe(self.context, prepared, reducers, {}, self.most_tasks)
        return _Pool(None, self.workers, recipe)


def _code_with_its_file(code: types.CodeType) -> Any:
    """Pickle code as cloudpickle does, but for the file that tracebacks show."""
    table = _loky("backend.reduction").get_loky_pickler().dispatch_table
    function, arguments, *_ = table[types.CodeType](code)
    name = "<dynamic-code>"
    return function, tuple(
        code.co_filename if type(a) is str and a == name else a for a in arguments
    )


# --------------------------------------------------------------------------------------
# Worker processes, as the program sees them.
#
#    the consumer's thread            an attendant                     a worker process
#                                     (a thread of the program)        serve()
#   +---------------------+          +---------------------+          +----------------+
#   | pickle the tasks ---|-> jobs ->| take a job          |          |                |
#   |                     |          | send the function,  |          | unpickle it,   |
#   |                     |          |   if it is new -----|--------->|   keep it      |
#   |                     |          | send the tasks -----|--------->| run_tasks()    |
#   | unpickle results <--|- inbox <-| receive replies <---|----------|   and send     |
#   +---------------------+          +---------------------+          +----------------+
#
# A worker has one connection, which its attendant alone reads and writes here, in turn:
# so nothing can deadlock, whatever the size of messages. There, if there is a limit of
# time, a thread tells now and then of what is done of a batch, and that a task is over
# its limit (see Signs). Attendants move bytes. All of a pool take jobs from one queue,
# which balances by itself, and workers go on while the consumer is elsewhere. It is
# known which worker has which batch: its death is the failure of that batch alone, and
# so is a task that takes too long; the attendant starts another worker for the next
# job.
#
# An attendant refers to its worker and to the queue, not to the pool: one that nobody
# has any more, since an interrupt came in between, is collected, and so stopped.

# Seconds that a worker has for what should take a moment: to leave when it is told to.
_PATIENCE = 3

# Seconds that it has to start, or *timeout*, if that is more; for ever without it.
_START_PATIENCE = 60

# Starts that may fail in a row, at each of its places, before it is left empty.
_MOST_FAILED_STARTS = 3


class _Recipe(NamedTuple):
    """How to start the workers of a pool."""

    context: Any  # of multiprocessing or loky
    prepared: Any  # an initializer and its arguments, maybe pickled
    reducers: Any  # of results
    env: dict[str, str]
    most_tasks: float  # of one worker

    def forks(self) -> bool:
        return bool(self.context.get_start_method() == "fork")

    def process(self, connection: Any) -> Any:
        """Return a process that is to serve at the other end of a connection."""
        forks, env, options = self.forks(), self.env, {}
        if self.context.get_start_method() == "loky":
            options, env = {"env": env}, {}  # from its start on
        serve: Any = _WORKER.serve if forks else _by_value("serve")
        line, prepared = _life_line_of_program(), self.prepared
        if not (forks or isinstance(prepared, bytes)):
            prepared = _PickledApart(prepared, self.context)
        arguments = connection, line, prepared, self.reducers, forks, env
        return self.context.Process(target=serve, args=arguments, **options)


class _PickledApart:
    """An argument of a process that arrives pickled, and is pickled as it starts.

    A worker can report what it meets when it unpickles that itself.
    """

    def __init__(self, value: Any, context: Any) -> None:
        is_loky = context.get_start_method() == "loky"
        pickling = multiprocessing.reduction.ForkingPickler
        self.dumps = _loky("backend.reduction").dumps if is_loky else pickling.dumps
        self.value = value

    def __reduce__(self) -> Any:
        return bytes, (bytes(self.dumps(self.value)),)


class _Function:
    """The function of a run, as it is sent to each of its workers."""

    def __init__(self, engine: Any, payload: bytes) -> None:
        nested = engine.get_nested_backend()
        nested = nested if isinstance(nested, tuple) else (nested, None)
        limit, self.slack, watch = engine.limit, 0.0, None
        if limit is not None:
            self.slack = max(limit / 10, 0.05)  # seconds between two signs of life
            watch = self.slack, limit
        head = engine.dump((*nested, engine.returns_errors, watch))
        size = len(head).to_bytes(8, "big")
        self.message = b"".join((_FUNCTION, size, head, payload))
        self.limit = math.inf if limit is None else limit
        self.patience = max(self.limit, _START_PATIENCE)  # for a worker to start
        self.returns_errors = engine.returns_errors
        self.was_loaded = False  # by any worker
        self.dispensable = [None] * (engine.workers - 1)  # one for each attendant
        self.last_number = math.inf  # of a batch: its failure ends the run
        self.is_over = False  # its run has ended: idle workers are to forget it


class _Job:
    """A batch for an attendant; to joblib, a call."""

    report: Any = None

    def __init__(
        self, function: Any, message: bytes, size: int, number: int = 0
    ) -> None:
        self.function = function
        self.message = message
        self.size = size
        self.number = number  # of the batch

    def __len__(self) -> int:
        return self.size

    def __reduce__(self) -> Any:  # for backends of others, which may wrap it
        state = _PicklesAs(importlib.import_module, _WORKER_MODULE)
        return functools.partial, (_PicklesAs(getattr, state, "answer"), [self.message])


class _Worker:
    """A worker process, and one after another in its place; for its attendant.

    Other threads only look at `process`, `is_ready` and `failure`, and set
    `is_stopped`; the consumer's launches what is started before there are attendants.
    """

    def __init__(self, recipe: _Recipe) -> None:
        self.recipe = recipe
        self.thread: Any = None  # the attendant
        self.process: Any = None
        self.connection: Any = None
        self.poller: Any = None
        self.has_begun = threading.Event()  # a process: it is in the right directory
        self.surroundings: Any = None  # that the process was started in
        self.is_ready = False
        self.is_stopped = False
        self.function: Any = None  # that the process has
        self.done = 0  # tasks
        self.failure: _Failure | None = None  # the process could not be started
        self.failed_starts = 0  # in a row
        self.has_given_up = False

    def launch(self) -> None:
        """Start a process."""
        with _starting, _standard_streams():
            if self.is_stopped:
                raise EOFError("the pool has been stopped")
            _occupy_standard_streams()
            _start_helpers(self.recipe.context.get_start_method())
            self.connection, theirs = multiprocessing.Pipe()
            _our_ends.add(self.connection)
            try:
                self.process = self.recipe.process(theirs)
                with _signals_blocked():
                    self.process.start()
            finally:
                theirs.close()
            self.surroundings = None
            with contextlib.suppress(Exception):  # the directory is gone, say
                self.surroundings = _surroundings()
            if hasattr(select, "poll"):
                self.poller = select.poll()
                self.poller.register(self.connection, select.POLLIN)

    def start(self, patience: float) -> None:
        """Start a process if there is none, and wait until it is ready."""
        try:
            if self.process is None:
                self.launch()
            while (reply := self.receive(patience)) == _MORE:
                self.has_begun.set()
            if reply != _DONE:
                raise _StartError(reply)
            self.is_ready = True
        except Exception as error:
            self.failure = self.bury_and_explain(error, patience)
        self.has_begun.set()

    def outcome_of(self, job: _Job) -> Any:
        """Have a job done, by a fresh process if need be."""
        replies: list[bytes] = []
        function = job.function
        try:
            if self.process is not None and self.process.exitcode is not None:
                self.bury()  # it was idle
            if self.done and self.done + job.size > self.recipe.most_tasks:
                self.retire()
            if self.process is None and self.failure is None:
                self.start(function.patience)
            if self.failure is not None:
                failure, self.failure = self.failure, None
                return self.failed(job, replies, failure, is_start=True)
            if self.function is not function:
                self.function, self.is_ready = None, False
                self.limit_stalls(function)
                self.send(function.message)
                reply = self.receive(function.patience)
                self.is_ready = True
                if reply != _DONE:
                    return _Outcome([reply], ends_run=self.start_ends_run(function))
                self.function = function
                function.was_loaded, self.failed_starts = True, 0
            self.send(job.message)
            self.done += job.size
            limit = function.limit
            if job.size > 1:
                # The worker itself sees to it, unless a task holds the interpreter's
                # lock: then it tells that it lives after every other task.
                limit = 2 * limit + function.slack
            reply = _MORE
            while reply[:1] == _MORE:
                reply = self.receive(limit)
                if reply != _MORE:
                    replies.append(reply)
        except Exception as error:
            is_start = not self.is_ready
            failure = self.bury_and_explain(error, function.patience, function.limit)
            return self.failed(job, replies, failure, is_start=is_start)
        return _Outcome(replies)

    def failed(
        self, job: _Job, replies: list[bytes], failure: _Failure, *, is_start: bool
    ) -> _Outcome:
        """Return the outcome of a batch whose worker has failed."""
        function = job.function
        if is_start and not failure.ends_run and self.start_ends_run(function):
            failure.ends_run = True
            if self.failed_starts >= _MOST_FAILED_STARTS:
                text = f"{self.failed_starts} workers in a row have failed to start"
                failure.error = _told_more(failure.error, f"; {text}")
        if failure.ends_run or not function.returns_errors:
            function.last_number = min(function.last_number, job.number)
        return _Outcome(replies, failure)

    def start_ends_run(self, function: Any) -> bool:
        """Tell whether a start that has failed ends the run, or costs its batch only.

        If no worker has loaded the function yet, others would fail as well. Afterwards,
        starts go on, until several have failed in a row; then the other attendants go
        on, unless this is the last.
        """
        self.failed_starts += 1
        if not function.was_loaded:
            return True
        if self.failed_starts >= _MOST_FAILED_STARTS:
            try:
                function.dispensable.pop()  # atomic, as attendants are threads
            except IndexError:
                return True
            self.has_given_up = True
        return False

    def limit_stalls(self, function: Any) -> None:
        """Let no message wait for ever for a worker in its midst, if there is a limit."""
        if os.name == "posix":
            seconds = 0 if function.limit == math.inf else math.ceil(function.patience)
            with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
                end.settimeout(None)  # as the connection is, whatever the default is
                value = struct.pack("ll", min(seconds, 10**9), 0)
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    end.setsockopt(socket.SOL_SOCKET, option, value)

    def send(self, message: bytes) -> None:
        """Send a message; a large one in parts: see `Server.received`."""
        size = len(message)
        if size < _LEAST_LARGE:
            self.connection.send_bytes(message)
            return
        self.connection.send_bytes(_LARGE + message[:1] + size.to_bytes(8, "big"))
        for start in range(0, size, _PART):
            self.connection.send_bytes(message, start, min(_PART, size - start))

    def receive(self, limit: float) -> bytes:
        """Return the next message, for which the worker has *limit* seconds."""
        deadline = time.monotonic() + limit
        while True:
            left = deadline - time.monotonic()
            if self.has_message(max(0, min(left, _WAIT_SLICE))):
                message = bytes(self.connection.recv_bytes())
                if message == _OVERDUE:
                    raise TimeoutError
                return message
            # A program that the worker has forked may hold the connection open.
            if self.process.exitcode is not None and not self.has_message(0):
                raise EOFError
            if left <= 0:
                raise TimeoutError

    def has_message(self, seconds: float) -> bool:
        if self.poller is None:
            return bool(self.connection.poll(seconds))
        return bool(self.poller.poll(seconds * 1000))

    def bury_and_explain(
        self, error: Exception, patience: float, limit: float = math.inf
    ) -> _Failure:
        """Kill the process, and say what has become of it."""
        is_ready, was_started = self.is_ready, self.process is not None
        code = self.bury()
        if isinstance(error, _StartError):
            broken, ends_run = BrokenProcessPool(str(error)), error.is_of_initializer
            _set_cause(broken, error.text)
            return _Failure(broken, ends_run=ends_run)
        if isinstance(error, (TimeoutError, BlockingIOError)):
            text, seconds = "a worker was not ready after", patience
            if is_ready and isinstance(error, BlockingIOError):
                text = "a worker has stalled in the midst of a message for"
            elif is_ready:
                text, seconds = "a task has taken longer than the timeout of", limit
            error = _TaskTimeoutError(f"{text} {seconds!r} seconds")
        elif isinstance(error, (EOFError, OSError)) and was_started:
            text = f"a worker process has died{'' if is_ready else ' as it started'}"
            hint = " (SIGKILL, as when memory runs out)" if code == -9 else ""
            error = BrokenProcessPool(f"{text}: exit code {code}{hint}")
            if not is_ready:
                names = (f"{name}.py" for name in sorted(sys.stdlib_module_names))
                hidden = ", ".join(filter(os.path.exists, names)) or "none"
                what = "Files of the current directory that hide modules of Python"
                _set_cause(error, f"{what}, which it may need: {hidden}")
        return _Failure(error)

    def forget(self) -> None:
        """Let an idle worker keep nothing of a run that has ended."""
        if self.function is not None and self.function.is_over:
            self.function = None
            with contextlib.suppress(EOFError, OSError):  # the next job will find out
                self.connection.send_bytes(_FORGET)

    def leave(self) -> None:
        """Close the connection, at which the process leaves, too."""
        self.function = self.poller = None
        connection, self.connection = self.connection, None
        if connection is not None:
            with _starting:  # no fork comes in between
                _our_ends.discard(connection)
                connection.close()

    def bury(self) -> int | None:
        """Kill the process with all that it has started; return its exit code."""
        process, code = self.process, None
        self.leave()
        if process is not None and process.pid is not None:
            _kill([process])
            process.join()
            for _ in range(50):  # another thread may be about to know, too
                code = process.exitcode
                if code is None:
                    time.sleep(0.01)
        self.process, self.is_ready, self.done = None, False, 0
        return code

    def retire(self) -> None:
        """Let the process end in peace."""
        self.leave()
        self.process.join(_PATIENCE)
        self.bury()


def _start_helpers(start_method: str) -> None:
    """Start the processes that Python and loky start with the first worker.

    They stay, and must not inherit the signals that are blocked while a worker starts.
    """
    if os.name == "posix" and start_method != "fork":
        importlib.import_module("multiprocessing.resource_tracker").ensure_running()
        if start_method == "loky":
            _loky("backend.resource_tracker").ensure_running()
        elif start_method == "forkserver":
            importlib.import_module("multiprocessing.forkserver").ensure_running()


class _StartError(Exception):
    """What a worker has sent since it could not get ready: the text of a traceback."""

    def __init__(self, reply: bytes) -> None:
        what, _, text = reply.decode(errors="replace").partition("\n")
        self.is_of_initializer = what == _INITIALIZER_FAILED
        self.text = text.strip()
        super().__init__(f"{what}: {self.text.splitlines()[-1]}")


def _attend(
    worker: _Worker, jobs: queue.SimpleQueue[_Job | None], patience: float
) -> None:
    """Be the attendant of a worker: in a thread of its own."""
    worker.start(patience)
    while True:
        try:
            # To see soon that the run of its function has ended.
            seconds = None if worker.function is None else _WAIT_SLICE / 2
            job = jobs.get(timeout=seconds)
        except queue.Empty:
            worker.forget()
            continue
        if job is None:
            break
        if job.number > job.function.last_number:
            # Nobody will read of it: the report of that batch ends the run. And it may
            # take a fresh worker.
            continue
        outcome: Any
        try:
            outcome = worker.outcome_of(job)
        except Exception as error:  # whatever comes, nobody is to wait for a report
            outcome = _Failure(error, ends_run=True)
        job.report(outcome)
        del job, outcome
        if worker.has_given_up:
            break
    worker.leave()


class _Pool:
    """Workers that serve one run at a time, and may serve several, one after another.

    The consumer's thread makes or takes it, and submits to it; the thread that ends the
    run keeps or stops it, and so do a timer, `shutdown` and the exit.
    """

    def __init__(self, key: Any, size: int, recipe: _Recipe) -> None:
        self.key = key  # of what another run must want to be served, too
        self.size = size
        self.recipe = recipe
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.workers: list[_Worker] = []
        self.timer: Any = None
        self.modules = _module_specs({})  # as workers may have imported them
        _private(multiprocessing.process, "_children")  # which a fork will need
        _pools.add(self)

    def __del__(self) -> None:
        # A finalizer of weakref would do nothing once the interpreter exits.
        _dismiss(self.jobs, self.workers)

    def submit(self, job: _Job) -> None:
        """Have a job done; start another worker, unless there are enough."""
        if len(self.workers) < self.size or not self.workers[-1].thread:
            with _interrupts_later():
                self.grow(job.function.patience)
        self.jobs.put(job)

    def grow(self, patience: float) -> None:
        # Python warns of forks beside threads: first all processes, then threads.
        forks = self.recipe.forks()
        for _ in range(self.size - len(self.workers) if forks else 1):
            self.workers.append(_Worker(self.recipe))
            if forks:
                self.workers[-1].launch()
        for worker in self.workers:
            if worker.thread is None:
                arguments = worker, self.jobs, patience
                thread = threading.Thread(target=_attend, args=arguments, daemon=True)
                thread.start()
                worker.thread = thread

    def keep(self, seconds: float) -> None:
        """Let the next run of the same settings have the workers, which are idle.

        Stop them after so many seconds.
        """
        for worker in self.workers if self.key is not None else ():
            worker.has_begun.wait(_PATIENCE)  # while what it needs for that is there
        self.modules.update(_module_specs(self.modules))
        if self.key is None or not all(map(self.is_sound, self.workers)):
            self.stop()
            return
        self.timer = threading.Timer(seconds, _stop_if_idle, (weakref.ref(self),))
        self.timer.daemon = True
        _idle_pools.append(self)
        try:
            self.timer.start()
        except RuntimeError:  # no thread can be started
            _stop_if_idle(weakref.ref(self))
        _stop_idle_pools(_most_idle)

    def is_sound(self, worker: _Worker) -> bool:
        """Tell whether it could be started, and as it would have been at first."""
        is_elsewhere = worker.process and worker.surroundings != self.key[0]
        has_failed = worker.failure is not None or worker.has_given_up
        return not (has_failed or is_elsewhere)

    def stop(self, *, kill: bool = False) -> None:
        """Let the workers leave, which are idle; or kill them.

        In both cases, what their tasks have started ends with them.
        """
        if self.timer is not None:
            self.timer.cancel()
        with _starting:  # none is in the middle of that
            for worker in self.workers:
                worker.is_stopped = True
        found = [(w.process, w.is_ready) for w in self.workers]
        found = [pair for pair in found if pair[0] is not None and pair[0].pid]
        processes = [process for process, _ in found]
        _kill([process for process, is_ready in found if kill or not is_ready])
        _dismiss(self.jobs, self.workers)
        for worker in self.workers:
            if worker.thread is None:  # it could not be started
                worker.leave()
            else:
                worker.thread.join(timeout=_PATIENCE)
        deadline = time.monotonic() + _PATIENCE
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        _kill(processes)
        for process in processes:
            process.join()


def _dismiss(jobs: queue.SimpleQueue[Any], workers: list[_Worker]) -> None:
    """Let all attendants of a pool come to their end."""
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()
    for _ in workers:
        jobs.put(None)


def _take_pool(key: Any) -> _Pool | None:
    """Return idle workers of these settings, if there are any."""
    if key is None:  # it may not be compared
        return None
    modules = _module_specs({})
    for pool in [*_idle_pools]:
        if pool.key == key and _take_off_list(pool):
            pool.timer.cancel()  # or it would stop the pool once it is idle again
            known, now = pool.modules, map(modules.get, pool.modules)
            is_current = all(map(operator.is_, known.values(), now))
            if is_current and all(map(pool.is_sound, pool.workers)):
                pool.modules = {**modules, **known}
                return pool
            pool.stop()
    return None


def _module_specs(known: dict[str, Any]) -> dict[str, Any]:
    """Return the specs of the modules of the program whose names are not in *known*.

    Whatever loads a module again gives it another spec. Specs must be compared by
    identity, since the old and the new one are equal.
    """
    # Not by getattr(), at which a lazy module is loaded.
    namespace_of = vars(types.ModuleType)["__dict__"].__get__
    specs: dict[str, Any] = {}
    for name, module in sys.modules.copy().items():
        if name not in known:
            try:  # contextlib.suppress() takes longer than all else here
                specs[name] = namespace_of(module)["__spec__"]
            except (KeyError, TypeError):  # it has none, or is not a module
                pass
    if "IPython.extensions.autoreload" in sys.modules:
        # It may change a module in place, once the file is another: that is an item of
        # its own. Files of installed packages are left out, since there are too many.
        folders = operator.itemgetter("stdlib", "platlib", "purelib")
        installed = folders(sysconfig.get_paths())
        for name, spec in [*specs.items()]:
            file = str(getattr(spec, "origin", None))
            if getattr(spec, "has_location", False) and not file.startswith(installed):
                with contextlib.suppress(OSError, ValueError):
                    specs[f"{name}: {os.stat(file).st_mtime_ns}"] = spec
    return specs


def _take_off_list(pool: _Pool) -> bool:
    """Take a pool off the list, which decides who has it; tell whether that worked."""
    try:
        _idle_pools.remove(pool)
    except ValueError:  # another thread has taken it
        return False
    return True


def _stop_if_idle(reference: weakref.ref[_Pool]) -> None:
    pool = reference()
    if pool is not None and _take_off_list(pool):
        pool.stop()


def _life_line_of_program() -> Any:
    """Return the reading end of a pipe that ends when this process does.

    On Linux, that can have workers killed: see `hold_life_line`.
    """
    global _life_line
    if sys.platform != "linux":
        return None
    if _life_line is None:
        _life_line = multiprocessing.Pipe(duplex=False)
        _our_ends.add(_life_line[1])
    return _life_line[0]


def _kill(processes: list[Any]) -> None:
    """Kill processes, and all that they have started, also if they have ended.

    Each leads a session, and what has one of its own goes on. On Linux, a session is
    found though it has several process groups; elsewhere, only the first is.
    """
    if os.name != "posix":
        for process in processes:
            _loky("backend.utils").kill_process_tree(process)
        return
    leaders = {process.pid for process in processes if not _is_of_another(process)}
    for pid in leaders:
        with contextlib.suppress(OSError):  # there is nothing left
            os.killpg(pid, signal.SIGKILL)
    for process in processes:
        if process.exitcode is None:
            with contextlib.suppress(OSError):  # it may not lead its session yet
                os.kill(process.pid, signal.SIGKILL)
    for _ in range(100):
        left = list(_members(leaders))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _is_of_another(process: Any) -> bool:
    """Tell whether the id of a process that has ended is that of another by now.

    Then nothing is left of its session, or the id would not be free.
    """
    if process.exitcode is None:
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


@contextlib.contextmanager
def _standard_streams() -> Iterator[None]:
    """Lend standard streams to those who flush them, if those of the program fail."""
    with contextlib.ExitStack() as stack:
        for name in "stdout", "stderr":
            try:
                getattr(sys, name).flush()
            except Exception:  # it is None, closed, or has no such method, say
                sink = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(getattr(contextlib, f"redirect_{name}")(sink))
        yield


def _occupy_standard_streams() -> None:
    """Let no pipe become the standard output of a worker, where that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:
                os.set_inheritable(number, True)


# Those by which programs are usually told to end, and whose handlers may raise.
_WAITING_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGTERM", "SIGINT")
    if hasattr(signal, name)
)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Delay the handlers of the signals that end a program until this is over.

    Otherwise they might raise in the middle of a start, or of a fork, where Python
    drops what they raise. The signals are not blocked: the threads that are started
    here would inherit that, and so would the programs that tasks start in them.
    """
    noted: list[int] = []
    handlers: dict[Any, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # this is not Python's main thread
            # SIGINT is the last, since its handler raises as soon as it is restored.
            for number in _WAITING_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    signal.signal(number, lambda number, _: noted.append(number))
                    handlers[number] = handler
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in noted:
            signal.raise_signal(number)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that end a program in a worker process that is started here.

    It unblocks them once it takes no part in what happens at the terminal (see
    `lead_session`). Nothing else may be started here, as it would inherit the mask.
    """
    mask: Any = getattr(signal, "pthread_sigmask", lambda *_: set())  # Windows
    blocked = mask(getattr(signal, "SIG_BLOCK", 0), _WAITING_SIGNALS)
    try:
        yield
    finally:
        mask(getattr(signal, "SIG_SETMASK", 0), blocked)


# --------------------------------------------------------------------------------------
# What runs in a worker.
#
# Workers need not import this file. What they need of it are the functions nested in
# `_worker_functions`, which travel by value, and refer to nothing of this module but
# what it imports and the names below.

# The name of the module in which worker processes keep what they have.
_WORKER_MODULE = "_joblib_batches"

# First bytes of messages: tasks that travel together, or each apart; a call that a
# backend of others has wrapped; a function, or that the last one may be forgotten.
_TOGETHER, _APART, _CALL, _FUNCTION, _FORGET = b"t", b"a", b"c", b"f", b"-"

# First bytes of replies: results so far, the last ones, and none, since tasks that came
# together cannot be unpickled.
_MORE, _DONE, _UNREADABLE, _OVERDUE = b"+", b".", b"?", b"!"

# First byte of what announces a large message, which follows in parts: the next bytes
# are the first of the message, and its length.
_LARGE, _LEAST_LARGE, _PART = b"l", 2**22, 2**16

# What a worker could not do that does not get ready.
_START_FAILED = "a worker process could not be started"
_INITIALIZER_FAILED = "the initializer has failed in a worker"

# Types of which nothing can fail to be pickled or unpickled.
_PLAIN = frozenset((bool, bytes, complex, float, int, str, type(None)))
_CONTAINERS = frozenset((dict, frozenset, list, set, tuple))


def _worker_functions() -> types.SimpleNamespace:
    """Return what runs in workers."""

    def run_in_thread(task_func: Any, returns_errors: bool, *tasks: Any) -> Any:
        """Return the results, and by their indices the errors of tasks that failed."""

        def packed(error: BaseException) -> Any:
            # The frame of run_tasks would refer to it, too.
            return error.with_traceback(getattr(error.__traceback__, "tb_next", None))

        return run_tasks(task_func, returns_errors, iter(tasks), packed)

    def run_elsewhere(task_func: Any, returns_errors: bool, *tasks: Any) -> Any:
        """Do the same in a process of a backend of others."""

        def packed(error: BaseException) -> Any:
            return pack_error(error, make_dump({}))

        return run_tasks(task_func, returns_errors, iter(tasks), packed)

    def run_tasks(
        task_func: Any, returns_errors: bool, tasks: Any, packed: Any, signs: Any = None
    ) -> tuple[list[Any], dict[int, Any]]:
        """Return the results, and by their indices the packed errors of failed tasks.

        None stands for the result of these. Without *returns_errors*, the first task
        that fails is the last to be run. *signs*, if given, may take away what is done.
        """
        results: list[Any] = []
        failures: dict[int, Any] = {}
        lock = contextlib.nullcontext() if signs is None else signs.lock
        with lock:
            if signs is not None:
                signs.watched, signs.failures = results, failures
        append = results.append
        while True:
            try:
                for task in tasks:
                    append(task_func(task))
            except BaseException as error:
                failure = packed(error)
                with lock:
                    failures[len(results)] = failure
                    append(None)
                if returns_errors and not leaves_debugger(error):
                    continue
            with lock:
                if signs is not None:
                    signs.watched, signs.failures = signs.nothing, None
                return results, failures

    def leaves_debugger(error: Any) -> bool:
        """Tell whether somebody has quit pdb, and means the program."""
        return isinstance(error, getattr(sys.modules.get("bdb"), "BdbQuit", ()))

    def told(error: BaseException) -> str:
        return "".join(traceback.format_exception_only(type(error), error)).strip()

    class Signs:
        """Signs of life: a thread that sends, now and then, what is done of a batch.

        So it costs a task nothing to be watched. It is also this that finds a task over
        its limit: the same has been under way at two looks that are as far apart. The
        program could not tell, since a call that holds the interpreter's lock puts
        a look off until it ends, when its result is not there yet.
        """

        def __init__(
            self, connection: Any, dump: Any, seconds: float, limit: float
        ) -> None:
            self.connection = connection
            self.dump = dump
            self.lock = threading.Lock()
            self.nothing: list[Any] = []  # to be watched: what may take its time
            # The list that grows with each task, or with each result that is pickled;
            # None between two batches.
            self.watched: list[Any] | None = None
            self.failures: Any = None  # of the tasks, while these are being run
            self.over = threading.Event()
            arguments = seconds, limit
            threading.Thread(target=self.look, args=arguments, daemon=True).start()

        def look(self, seconds: float, limit: float) -> None:
            seen, length, since = None, 0, 0.0
            while not self.over.wait(seconds):
                # The program has ended, or this is left to the reply.
                with self.lock, contextlib.suppress(OSError, MemoryError):
                    watched, now = self.watched, time.monotonic()
                    goes_on = watched is seen and watched is not self.nothing
                    seen = watched
                    if watched is None:
                        continue
                    if not (goes_on and len(watched) == length):
                        since = now
                    length = len(watched)
                    if now - since > limit:
                        self.connection.send_bytes(_OVERDUE)
                    elif self.failures is None or not watched:
                        self.connection.send_bytes(_MORE)
                    else:
                        self.send(watched, self.failures)
                        length = 0

        def send(self, results: list[Any], failures: Any) -> None:
            """Send results that there are, and forget them."""
            count = len(results)  # there may be more in a moment
            # Others may take long to pickle: each is a sign of its own.
            size = count if are_plain(results[:count]) and not failures else 1
            sent = 0
            try:
                for start in range(0, count, size):
                    found = {0: failures[start]} if start in failures else {}
                    part = results[start : start + size]
                    self.connection.send_bytes(reply(part, found, self.dump, _MORE))
                    sent += len(part)
            finally:  # whatever comes, nothing is sent twice
                del results[:sent]
                left = {n - sent: failures[n] for n in failures if n >= sent}
                failures.clear()
                failures.update(left)

    def answer(
        get_function: Any,
        returns_errors: bool,
        messages: list[bytes],
        dump: Any,
        get_signs: Any = lambda size: None,
        scattered: Any = None,
    ) -> bytes:
        """Run the tasks of a message, which is let go; return the reply, pickled.

        *scattered* has tasks that were not, by the keys that stand in their places.
        """

        server: Any = sys.modules.get(_WORKER_MODULE, types.SimpleNamespace())

        def load(part: bytes) -> Any:
            server.is_loading = True
            try:
                return pickle.loads(part)
            except BaseException as error:
                raise unreadable("the task", error) from error
            finally:
                server.is_loading = False

        def replaced(task: Any) -> Any:
            return scattered.get(task, task) if type(task) is str else task

        def packed(error: BaseException) -> Any:
            return pack_error(error, dump)

        try:
            task_func = get_function()
        except BaseException as error:
            return cast(bytes, dump(("no function", [], packed(error)), _DONE))
        data = messages.pop()
        server.is_loading = True
        try:
            tasks = pickle.loads(memoryview(data)[1:])
        except BaseException as error:
            if data[:1] == _TOGETHER:
                return _UNREADABLE  # they are sent again, apart
            failure = unreadable("the tasks of a batch", error)
            failure.__cause__ = error
            return cast(bytes, dump(("no results", [], packed(failure)), _DONE))
        finally:
            server.is_loading = False
        signs = get_signs(len(tasks))
        tasks = map(load, tasks) if data[:1] == _APART else iter(tasks)
        del data
        if scattered:
            tasks = map(replaced, tasks)
        results, failures = run_tasks(task_func, returns_errors, tasks, packed, signs)
        return reply(results, failures, dump, _DONE, signs)

    def reply(
        results: list[Any], failures: Any, dump: Any, first: bytes, signs: Any = None
    ) -> bytes:
        """Pickle results: apart, if one of them could cost others."""

        def packed(error: BaseException) -> Any:
            message = f"the result cannot be pickled: {told(error)}"
            failure = pickle.PicklingError(message)
            failure.__cause__ = error
            return pack_error(failure, dump)

        with contextlib.suppress(Exception):  # one is nested too deeply, say
            if not failures and are_plain(results):
                return cast(bytes, dump(("together", results, failures), first))
        parts: list[Any] = []
        if signs is not None:
            signs.watched = parts
        for index, result in enumerate(results):
            parts.append(None)
            try:
                parts[-1] = None if index in failures else dump(result)
            except BaseException as error:
                failures[index] = packed(error)
        while True:
            try:
                return cast(bytes, dump(("apart", parts, failures), first))
            except MemoryError as error:  # not for all of them: without the largest
                sizes = [len(part or b"") for part in parts]
                if not any(sizes):
                    raise
                index = sizes.index(max(sizes))
                parts[index] = None
                failures[index] = packed(error)

    def are_plain(values: list[Any]) -> bool:
        """Tell whether it makes no difference if values are pickled as one.

        That is so if they hold nothing but plain values in containers, and share none
        that can be changed. Of many parts it is not worth finding out.
        """
        most = 100 * len(values)
        seen: set[int] = set()  # ids of containers that can be changed
        count = 0  # of the same
        while len(values) <= most:
            if _PLAIN.issuperset(map(type, values)):
                return True
            values = [value for value in values if type(value) not in _PLAIN]
            if not _CONTAINERS.issuperset(map(type, values)):
                return False
            ids = [id(value) for value in values if type(value) is not tuple]
            seen.update(ids)
            count += len(ids)
            if len(seen) < count:
                return False
            # Each tuple once, or nested ones that share others would take for ever.
            values = gc.get_referents(*{id(value): value for value in values}.values())
        return False

    def unreadable(what: str, error: BaseException) -> Exception:
        """Return an error that says what cannot be unpickled, and what to do."""
        message = f"{what} cannot be unpickled in a worker: {told(error)}"
        trace: Any = error.__traceback__
        if isinstance(error, ImportError):
            kind = importlib.import_module("joblib.externals.loky.backend.reduction")
            home = kind.get_loky_pickler().__mro__[1].__module__.rpartition(".")[0]
            message += (
                ": install it where the workers are, or have the module sent with what "
                f"is of it, by {home}.register_pickle_by_value"
            )
        elif isinstance(error, AttributeError) and not trace.tb_next:
            message += (
                ": a function of the program that is wrapped (as by lru_cache) travels "
                "by its name, which workers do not have: put it into a module"
            )
        return pickle.UnpicklingError(message)

    def load_function(payload: Any) -> Any:
        try:
            return pickle.loads(payload)
        except BaseException as error:
            raise unreadable("task_func", error) from error

    def make_dump(reducers: Any, by_name: bool = False) -> Any:
        """Return a function that pickles like joblib, by one pickler, as to make one is
        slow. *by_name*: what is the program's own, as if it were of a module.
        """
        reduction = importlib.import_module("joblib.externals.loky.backend.reduction")
        kind = reduction.get_loky_pickler()
        override = getattr(kind, "reducer_override", None)  # LOKY_PICKLER may have none
        reducers = {**array_reducers(copy_of), **reducers}

        class Pickler(kind):  # type: ignore[misc, valid-type]
            def reducer_override(self, value: Any) -> Any:
                if by_name and isinstance(value, (type, types.FunctionType)):
                    found: Any = sys.modules.get("__main__")
                    for name in value.__qualname__.split("."):
                        found = getattr(found, name, None)
                    if found is value and value.__module__ == "__main__":
                        return NotImplemented
                return override(self, value) if override else NotImplemented

        def fresh() -> tuple[io.BytesIO, Any]:
            buffer = io.BytesIO()
            options = {"reducers": reducers, "protocol": pickle.HIGHEST_PROTOCOL}
            return buffer, Pickler(buffer, **options)

        buffer, pickler = fresh()

        def dump(value: Any, first: bytes = b"") -> bytes:
            nonlocal buffer, pickler
            buffer.write(first)
            try:
                pickler.dump(value)
                return buffer.getvalue()
            finally:  # keep nothing of it
                # The table of its memo never shrinks, and all of it is cleared.
                # The buffer is closed when there was no memory for it.
                if buffer.closed or sys.getsizeof(pickler, 0) > 200_000:
                    buffer, pickler = fresh()
                pickler.clear_memo()
                buffer.seek(0)
                buffer.truncate()

        return dump

    def pack_error(error: BaseException, dump: Any) -> Any:
        """Return *error* in a form that survives pickling: see `_unpacked_error`."""

        def show(lines: Any) -> str:
            try:
                return "".join(lines()).strip()
            except Exception:  # as its own methods may fail
                return f"{kind.__module__}.{kind.__qualname__}, which cannot be shown"

        def whole() -> Any:
            told = traceback.TracebackException.from_exception(error)
            part: Any = told
            while part is not None:  # without the frames of this module
                frames = [
                    f
                    for f in part.stack
                    if f.filename != pack_error.__code__.co_filename
                ]
                part.stack = traceback.StackSummary.from_list(frames)
                part = part.__cause__ or part.__context__
            return told.format()

        def dumped(form: Any) -> Any:
            with contextlib.suppress(BaseException):
                data = dump(form)
                copy = pickle.loads(data)
                if form is not error or repr(copy.args) == repr(error.args):
                    return data
            return None

        kind: Any = type(error)
        summary = show(lambda: traceback.format_exception_only(kind, error))
        text = show(whole)
        # Many a class cannot be called with the `args` that it has passed to its base,
        # as pickle would. What the built-in class underneath knows is sent instead,
        # then.
        bases = [base for base in kind.__mro__ if base in vars(builtins).values()]
        builtin: Any = bases[0]
        data, members = dumped(error), None
        if data is None and isinstance(
            error, vars(builtins).get("BaseExceptionGroup", ())
        ):
            group: Any = error
            members = [pack_error(member, dump) for member in group.exceptions]
            data = dumped((builtin, kind, (group.message,), vars(group)))
        elif data is None:
            data = dumped((builtin, *builtin.__reduce__(error)))
        return data, members, summary, text

    # ---- arrays of numpy, in tasks and in results

    def array_reducers(reducer: Any) -> Any:
        """Return reducers that pickle arrays by *reducer*, if there is numpy."""
        numpy: Any = sys.modules.get("numpy")  # which joblib has imported
        kinds = () if numpy is None else (numpy.ndarray, numpy.memmap)
        return dict.fromkeys(kinds, reducer)

    def reduce_array(array: Any) -> Any:
        return mapping_of(array) or copy_of(array)

    def copy_of(array: Any) -> Any:
        """Reduce an array to its data; that of a memmap becomes an ndarray."""
        plain = sys.modules["numpy"].asarray(array)
        # numpy keeps the order of bytes of what is contiguous only.
        plain = plain if plain.flags.forc else plain.copy()
        return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)

    def mapping_of(array: Any) -> Any:
        """Reduce a view of a memory-mapped file to its place there, or return None.

        joblib's own reducer drops the strides of contiguous views. It also maps what
        may differ by now: private changes, and a file that another has replaced.
        """
        numpy: Any = sys.modules["numpy"]
        root = array
        while not isinstance(getattr(root, "base", None), (mmap.mmap, type(None))):
            root = root.base
        if not (
            isinstance(root, numpy.memmap)
            and isinstance(root.base, mmap.mmap)
            and root.mode in ("r", "r+", "w+")  # with "c", changes are private
            and root.flags.forc
            and array.nbytes
            and is_current(root)
        ):
            return None
        first = address_of(array) - address_of(root)
        steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        low = first + sum(step for step in steps if step < 0)
        high = first + sum(step for step in steps if step > 0) + array.itemsize
        if low < 0 or high > root.nbytes:  # as_strided() checks nothing
            return None
        if array.flags.forc:
            mode = "r+" if array.flags.writeable else "r"
            order = "C" if array.flags.c_contiguous else "F"
            place = root.filename, array.dtype, mode, root.offset + low
            return numpy.memmap, (*place, array.shape, order)
        part = root.ravel("K").view("u1")[low:high]  # which is contiguous
        layout = part, first - low, array.strides
        return numpy.ndarray, (array.shape, array.dtype, *layout)

    def address_of(array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    def is_current(root: Any) -> bool:
        """Tell whether what a memmap has mapped is still the file of that name."""
        start = address_of(root) - root.offset % mmap.ALLOCATIONGRANULARITY
        end = start + -(-len(root.base) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            file: str = os.path.realpath(root.filename)
            size: int = root.base.size()
            with contextlib.suppress(OSError):  # this is not Linux, say
                return os.readlink(f"/proc/self/map_files/{start:x}-{end:x}") == file
            return os.path.getsize(file) == size
        except (OSError, TypeError):  # it has no name
            return False

    # ---- worker processes of loky and multiprocessing

    def serve(
        connection: Any,
        line: Any,
        prepared: Any,
        reducers: Any,
        by_name: bool,
        env: Any,
    ) -> None:
        """Be a worker, until the connection ends."""
        with contextlib.suppress(EOFError, OSError):  # the program has ended
            what = _START_FAILED
            try:
                lead_session(connection)
                if line is not None:
                    hold_life_line(line)
                os.environ.update(env)
                reducers = {**reducers, **array_reducers(reduce_array)}
                make_own_dump = functools.partial(make_dump, reducers, by_name)
                server = Server(connection, make_own_dump)
                sys.modules[_WORKER_MODULE] = cast(Any, server)
                # To forget a function need not look at what is there already. PyPy has
                # none.
                getattr(gc, "freeze", gc.collect)()
                connection.send_bytes(_MORE)  # it has begun
                what = _INITIALIZER_FAILED
                # What it starts by joblib is nested, like what tasks start.
                nested = joblib.parallel.ThreadingBackend(nesting_level=1)
                joblib.parallel_config(backend=nested)
                initialize(prepared)
                server.is_loading = False
            except BaseException:
                text = f"{what}\n{traceback.format_exc()}"
                connection.send_bytes(text.encode(errors="backslashreplace"))
                return
            del prepared
            connection.send_bytes(_DONE)
            while True:
                server.handle()

    def initialize(prepared: Any) -> None:
        initializer, initargs = (
            pickle.loads(prepared) if isinstance(prepared, bytes) else prepared
        )
        if initializer is not None:
            initializer(*initargs)

    class Server:
        """Answers what arrives at a connection, by the function of a run."""

        def __init__(self, connection: Any, make_own_dump: Any) -> None:
            self.connection = connection
            self.make_dump = make_own_dump
            self.dump = make_own_dump()
            self.function = self.config = self.signs = self.watch = None
            self.returns_errors = False
            # Processes that are started meanwhile would do so in turn, without end.
            self.is_loading = True

        def handle(self) -> None:
            """Read a message, and answer it; keep nothing of either."""
            message = self.connection.recv_bytes()
            kind = message[:1]
            if kind == _LARGE:
                kind = message[1:2]
                message = self.received(int.from_bytes(message[2:], "big"))
            if kind == _FORGET:
                self.forget()
                return
            messages = [message]
            del message
            try:
                if messages[0] is None:
                    what = "task_func" if kind == _FUNCTION else "the tasks of a batch"
                    failure = MemoryError("its message is too large")
                    raise unreadable(what, failure) from failure
                if kind == _FUNCTION:
                    answered = self.take(messages.pop())
                elif kind == _CALL:
                    answered = pickle.loads(messages.pop()[1:])()
                else:
                    answered = self.answer(messages)
            except BaseException as error:
                how = "no function" if kind == _FUNCTION else "no results"
                packed = pack_error(error, self.dump)
                answered = self.dump((how, [], packed), _DONE)
            with contextlib.nullcontext() if self.signs is None else self.signs.lock:
                if self.signs is not None:
                    self.signs.watched = None
                self.connection.send_bytes(answered)

        def received(self, size: int) -> Any:
            """Return a large message; skip it and return None if there is no memory.

            That could not be done in the midst of one that comes as a whole.
            """
            content = None
            with contextlib.suppress(MemoryError):
                content = bytearray(size)
            for start in range(0, size, _PART):
                if content is None:
                    self.connection.recv_bytes()
                else:
                    self.connection.recv_bytes_into(content, start)
            return content

        def forget(self) -> None:
            """Let go of a function, and of all that came with it."""
            if self.config is None:
                return
            self.config.unregister()
            if self.signs is not None:
                self.signs.over.set()
            self.function = self.config = self.signs = None
            gc.collect()

        def take(self, message: bytes) -> bytes:
            """Keep a function for the batches to come; return a reply."""
            self.forget()
            content = memoryview(message)[1:]
            size = int.from_bytes(content[:8], "big") + 8
            head = pickle.loads(content[8:size])
            nested, n_jobs, self.returns_errors, self.watch = head
            # What tasks start by joblib uses the backend that joblib would give them,
            # and so does what is started while the function is loaded.
            self.config = joblib.parallel_config(backend=nested, n_jobs=n_jobs)
            self.is_loading = True
            try:
                self.function = load_function(content[size:])
            finally:
                self.is_loading = False
            return _DONE

        def answer(self, messages: list[bytes]) -> bytes:
            """Run a batch."""
            get = lambda: self.function
            return answer(get, self.returns_errors, messages, self.dump, self.get_signs)

        def get_signs(self, size: int) -> Any:
            """Return what tells of a batch of many tasks, if there is a limit."""
            if self.watch is None or size == 1:
                return None
            if self.signs is None:
                self.signs = Signs(self.connection, self.make_dump(), *self.watch)
            return self.signs

    def lead_session(connection: Any) -> None:
        """Take no part in what happens at the program's terminal."""
        # A fork inherits the program's handlers, which must not act here. An interrupt
        # is for the program: it ends the run, and so this process.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                ignore = number == signal.SIGINT
                signal.signal(number, (lambda *_: None) if ignore else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if os.name == "posix":
            os.setsid()
            # Or it would not end with this process.
            os.register_at_fork(after_in_child=connection.close)
            os.set_inheritable(connection.fileno(), False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITING_SIGNALS)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)

    def hold_life_line(line: Any) -> None:
        """Have Linux kill this process group when the program ends, in whatever way.

        The program holds the writing end of a pipe, to which nobody writes. This opens
        the reading end anew, since what is asked for here is of an open file.
        """
        fcntl = importlib.import_module("fcntl")
        try:
            path = f"/proc/self/fd/{line.fileno()}"
            own = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # a sandbox without /proc, where it is left out
            return
        finally:
            line.close()
        fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        poller = select.poll()
        poller.register(own, 0)
        if poller.poll(0):  # it has ended already
            os.killpg(0, signal.SIGKILL)

    # ---- workers of Dask and Ray

    class Functions:
        """The function of a run in a worker of Dask or Ray.

        A worker of Dask is a process with threads. Each thread has a copy of its own,
        since a model is not made to be shared. They go with this, when Dask lets it go.
        """

        def __init__(self, payload: bytes, returns_errors: bool, config: Any) -> None:
            self.payload = payload
            self.returns_errors = returns_errors
            self.config = config  # for what tasks start by joblib themselves
            self.kept = threading.local()

        def __reduce__(self) -> Any:
            return Functions, (self.payload, self.returns_errors, self.config)

        def __sizeof__(self) -> int:
            return len(self.payload)  # Dask asks

        def __call__(self, data: bytes, scattered: Any = None) -> bytes:
            """Run a batch."""
            get, dump = self.get, make_dump({})
            with joblib.parallel_config(**self.config):
                return answer(
                    get, self.returns_errors, [data], dump, scattered=scattered
                )

        def get(self) -> Any:
            if not hasattr(self.kept, "function"):
                self.kept.function = load_function(self.payload)
            return self.kept.function

    def answer_of_ray(key: str, stored: Any, data: bytes) -> bytes:
        """Run a batch by the function of the run *key*; the worker keeps one."""
        state: Any = sys.modules.get(_WORKER_MODULE)
        if state is None or state.key != key:
            functions = pickle.loads(importlib.import_module("ray").get(stored))
            state = types.SimpleNamespace(key=key, functions=functions)
            sys.modules[_WORKER_MODULE] = state
        return cast(bytes, state.functions(data))

    return types.SimpleNamespace(**locals())


_WORKER = _worker_functions()
