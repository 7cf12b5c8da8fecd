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

Both are lazy, take endless tasks, agree on errors and can be left at any time. The
class `Joblib` says what else may be relied upon, and what not.

Put the file inside a package: a top-level module called ``distributed`` hides the
package of that name in which Dask's scheduler lives.
"""

# A batch that fails must be reported, whatever its error is:
# ruff: noqa: BLE001

from __future__ import annotations

import atexit
import builtins
import contextlib
import difflib
import errno
import functools
import importlib
import inspect
import itertools
import math
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import numbers
import operator
import os
import pickle
import queue
import re
import reprlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import uuid
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, overload

if TYPE_CHECKING:
    # It ships no types, and is mixed into at run time, which no checker could follow.
    joblib: Any
else:
    import joblib
    import joblib.parallel

__all__ = ["DistributedBackend", "Joblib", "SingleProcess", "get_backend"]
__version__ = "2.0.1"
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
            Ignored, so that the options of `Joblib` can stay in place while debugging.

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
        source = _Source(task_func, tasks)
        return _one_by_one(source.task_func, source.tasks)

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
    tasks there are; so tasks can depend on earlier results. Of larger batches,
    *pre_dispatch* are out, and as many more as there are workers may have been drawn.

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
    tasks have started; nothing is printed or warned of, and no file is left.

    >>> results.close()
    >>> list(results)
    []

    *The caller's thread.* *tasks* is advanced only inside ``next()``, in the thread
    that calls it. Tasks may come from a database cursor, or depend on context
    variables.

    *Composable.* Runs can be chained, interleaved, overlapped and started inside a task
    (where joblib's default is threads).

    >>> absolute = Joblib.setup(abs, [-1, -2, -3], num_workers=2)
    >>> sorted(Joblib.setup(str, absolute, num_workers=2))
    ['1', '2', '3']

    *Independent.* Each run of processes has workers of its own, as many as it asks for,
    with its own *initializer*. A run that fails, loses a worker, times out or is closed
    does not disturb another, nor a plain `joblib.Parallel`.

    *Kept warm.* loky's workers that are idle when a run ends well are kept for the next
    that wants the same: the same number, *initializer*, environment variables, current
    directory and `sys.path`. At most three sets of workers are kept, none in a fork.
    What tasks leave in a worker (a thread, a changed directory) is there for the next
    run, too; `shutdown` stops idle workers.

    *Nothing is lost.* Whatever results were received before an error are handed out
    first. An error of a task costs no earlier result of its batch (later tasks of it
    are not run); an error of *tasks* is raised when the results of all that it did
    yield are out.

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

    *Forks and children.* Runs can be started in a fork, and in a child process of
    `multiprocessing`, however it is started; the child ends when it is done. To read on
    a run of the parent in a fork is a `RuntimeError`.

    *Self-contained.* Workers are sent a few functions of this module, by value. They
    import the module only if that of *task_func* does.

    Not promised:

    - Threads cannot be stopped: what they are busy with goes on in the background. The
      same is true of Dask's workers, which are threads.
    - Of a batch with a task or a result that cannot be pickled or unpickled, no result
      arrives. With ``return_as="generator"``, results behind one that is missing are
      lost with it.
    - A program that a task has started is found by its parents: if all of these have
      ended, or a worker has died before the run was left, it goes on. Where neither
      ``/proc`` nor ``ps`` tells who the parents are, so do all.
    - A task, an array among them, that is changed after it was drawn arrives changed or
      not; so does a result that *task_func* changes in its next call: return a copy.
    - To close a run in a thread that is not the last to have read it does not wait for
      its workers to stop; elsewhere, that wait ends after 10 seconds.
    - When the main thread has ended, processes take no more tasks of runs that other
      threads are reading: that is an error.
    - If the program itself is killed, its workers finish what has been sent to them, and
      leave when they have been idle for *idle_worker_timeout*.
    - A `KeyboardInterrupt` or `SystemExit` that *tasks* raises is raised at once.
    """

    @staticmethod
    def setup(
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
            another. Dask ignores it and uses the whole cluster.
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
            timeout : float, optional
                Seconds. When the consumer has waited for that long and no batch has
                completed, the run ends with an error: it must be longer than a batch
                takes, and one task that is stuck counts when all others are done. The
                start of the workers and their imports count, too. Default: wait for
                ever. Ignored with one worker.
            batch_size : int or "auto", default "auto"
                Tasks sent to a worker at once; fewer towards the end of the tasks, so
                that all workers have some. "auto" starts with 1 and grows for as
                long as a batch is out and read within 0.2 seconds, up to 8192; with
                worker processes, also for as long as the arrays in a batch have no more
                than 8 MB. In threads, it stays 1.
            pre_dispatch : int or str, default "2 * n_jobs"
                The most batches that are out at a time, being worked on or waiting for
                a worker; a number, a formula, or "all", which lifts the bound.
            initializer, initargs : callable and tuple, optional
                Called in each worker process of "loky" or "multiprocessing" as it
                starts. A function of the program travels by value: what it assigns to
                global variables is not seen by *task_func*. Keep that in a module.
            verbose : int, default 0
                Print how many tasks are done; the more often, the larger it is.
            max_nbytes, mmap_mode, temp_folder
                As in joblib: arrays of more than 1 MB reach worker processes in files
                that they map into memory, read-only. ``max_nbytes=None`` sends copies,
                ``mmap_mode="c"`` lets a task change its own view. The file of an array
                that the program has let go is removed when its batch has been read.
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
            From the generator, if *task_func* or a task cannot be pickled. Of a result,
            it is what the pickler raises, such as a `TypeError`.
        TimeoutError
            From the generator, after *timeout*; also a `multiprocessing.TimeoutError`.
            It says how many tasks are out, and which has been out for longest.
        concurrent.futures.BrokenExecutor
            From the generator, if a worker process of loky or `multiprocessing` dies,
            or a task or result cannot be unpickled; its cause says what is known. Of
            Dask, it is a ``KilledWorker``; of Ray, a ``RayActorError``.
        Exception
            From the generator: what *tasks* raised, as it is; or what a task raised,
            with a note that tells the number of the task and shows it (Python 3.11 and
            newer). In threads it is the error itself; elsewhere, the text of the
            worker's traceback is its cause. If it cannot be pickled, it is put together
            again without its ``__init__``, or else is a `RuntimeError` that shows it. A
            `StopIteration` is the cause of a `RuntimeError`, or it would look like the
            end of the results.
        """
        source = _Source(task_func, tasks)
        return _results(_Run(num_workers, kwargs), source)

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Stop idle worker processes. May be called at any time, or never.

        Those of loky are kept for the next run; without this, they leave when they have
        been idle for 300 seconds, or with the program. Open runs are not touched.

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
    raise ValueError(message)


# --------------------------------------------------------------------------------------
# Arguments: all that is wrong with them is said when `setup` is called. What joblib
# says clearly by itself, when its Parallel is made, is left to it.


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
    "maxtasksperchild": "backend='loky', which replaces workers that have grown much",
}


# What joblib would notice late, or not at all, or report without naming the option.
_CHECKS: dict[str, tuple[str, Callable[[Any], object]]] = {
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
        message = "pre_dispatch must be 'all', a number or a formula, got "
        raise ValueError(f"{message}{pre_dispatch!r}") from error
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
        if name in for_constructor:
            raise TypeError(
                f"{name}={value!r} is not an option of setup: put it into "
                f"joblib.parallel_config(backend=..., {name}=...) around the call"
            )
        if name not in known:
            usual = sorted(known - {"backward_reducers", "forward_reducers", "prewarm"})
            near = difflib.get_close_matches(name, [*usual, "num_workers"], 1)
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
    names = {
        *joblib.parallel.BACKENDS,
        *joblib.parallel.EXTERNAL_BACKENDS,
        *joblib.parallel.MAYBE_AVAILABLE_BACKENDS,
        "ray",
    }
    if not isinstance(backend, str) or backend not in names:
        expected = ", ".join(map(repr, sorted(names)))
        message = f"backend must be an instance or one of {expected}, got {backend!r}"
        raise ValueError(message)
    active = joblib.parallel.get_active_backend()[0]
    if type(active) is joblib.parallel.BACKENDS.get(backend):
        return active  # with the options of the caller's parallel_config
    with joblib.parallel_config(backend=backend):
        return joblib.parallel.get_active_backend()[0]


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
# What workers are sent.
#
# Workers need not import this file. What they need of it are the functions nested in
# `_worker_functions`, which travel by value, and refer to nothing of this module but
# what it imports and the name below: to the processes of loky and multiprocessing once,
# as they start; to Dask and Ray with each batch.

# The name of the module that worker processes keep those functions in. It also keeps
# the function of the run that the worker is serving.
_WORKER_MODULE = "_joblib_batches"


def _worker_functions(*, packs_errors: bool) -> types.SimpleNamespace:
    """Return what runs in workers."""

    def run_batch(task_func: Any, *tasks: Any) -> tuple[list[Any], Any]:
        """Return the results, and of the task that ended the batch what to say."""
        results: list[Any] = []
        task: Any = None
        try:
            for task in tasks:
                results.append(task_func(task))
        except BaseException as error:
            # Its traceback refers to this frame, of which no variable may refer to it.
            what = len(results), shown(task)
            return results, (*what, pack(error) if packs_errors else error)
        return results, None

    def shown(value: Any) -> str:
        """Return a short text for *value*, whatever its own methods do."""
        texts = [f"<{type(value).__qualname__}>"]
        short = reprlib.Repr()
        short.maxstring = short.maxother = short.maxlong = 200

        def show() -> None:
            with contextlib.suppress(BaseException):
                texts.append(short.repr(value)[:400])

        thread = threading.Thread(target=show, daemon=True)  # as it may take for ever
        with contextlib.suppress(RuntimeError):  # no thread can be started
            thread.start()
            thread.join(timeout=1)
        return texts[-1]

    def pack(error: BaseException) -> Any:
        """Return *error* in a form that survives pickling: see `_unpacked_error`."""

        def dump_by_value(value: Any) -> Any:
            wrapper = joblib.wrap_non_picklable_objects(value, keep_wrapper=False)
            return wrapper.__reduce__()[1][0]

        def show(lines: Any, *more: Any) -> str:
            try:
                return "".join(lines(kind, error, *more)).strip()
            except Exception:  # as its own methods may fail
                return f"{kind.__module__}.{kind.__qualname__}, which cannot be shown"

        def dumped(form: Any) -> Any:
            # By value, a class may arrive as another one of the same name.
            for dump in (pickle.dumps, dump_by_value):
                with contextlib.suppress(BaseException):
                    data = dump(form)
                    copy = pickle.loads(data)
                    if form is not error or repr(copy.args) == repr(error.args):
                        return data
            return None

        kind: Any = type(error)
        summary = show(traceback.format_exception_only)
        text = show(traceback.format_exception, error.__traceback__)
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
            members = [pack(member) for member in group.exceptions]
            data = dumped((builtin, kind, (group.message,), vars(group)))
        elif data is None:
            data = dumped((builtin, *builtin.__reduce__(error)))
        return data, members, summary, text

    def function_of(key: str, payload: Any) -> Any:
        """Return the function of the run *key* for this thread, which keeps no other.

        It is unpickled once a thread, since a model is not made to be shared by two.
        """
        module: Any = sys.modules.setdefault(
            _WORKER_MODULE, types.ModuleType(_WORKER_MODULE)
        )
        kept: Any = vars(module).setdefault("kept", threading.local())
        if getattr(kept, "key", None) != key:
            kept.key = kept.function = None
            if isinstance(payload, str):
                with open(payload, "rb") as file:
                    kept.function = pickle.load(file)
            else:
                if not isinstance(payload, bytes):
                    payload = importlib.import_module("ray").get(payload)
                kept.function = pickle.loads(payload)
            kept.key = key
        return kept.function

    class FunctionOfThreads:
        """The function of a run on a Dask worker, which is a process with threads.

        Each thread has a copy of its own. They go with this, when Dask lets it go.
        """

        def __init__(self, payload: bytes) -> None:
            self.payload = payload
            self.kept = threading.local()

        def __reduce__(self) -> Any:
            return FunctionOfThreads, (self.payload,)

        def __sizeof__(self) -> int:
            return len(self.payload)  # Dask asks

        def get(self) -> Any:
            if not hasattr(self.kept, "function"):
                self.kept.function = pickle.loads(self.payload)
            return self.kept.function

    def run_batch_of_thread(functions: Any, *tasks: Any) -> Any:
        """Run a batch by the function of this thread."""
        return run_batch(functions.get(), *tasks)

    def prepare(announce: Any, prepared: Any) -> None:
        """Make a worker process ready, and announce that, or what went wrong."""
        # A fork inherits the program's handlers, which must not act here. An interrupt
        # at the terminal is for the program: it ends the run, and so this process.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                ignore = number == signal.SIGINT
                signal.signal(number, (lambda *_: None) if ignore else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        module: Any = types.ModuleType(_WORKER_MODULE)
        module.run_batch, module.function_of = run_batch, function_of
        sys.modules[module.__name__] = module
        try:
            if isinstance(prepared, bytes):
                prepared = pickle.loads(prepared)
            initializer, initargs = prepared
            if initializer is not None:
                initializer(*initargs)
        except BaseException:
            # All workers share the pipe: what is this short arrives in one piece.
            announce.send_bytes(traceback.format_exc().encode()[-500:])
            os._exit(1)
        announce.send_bytes(b"")

    return types.SimpleNamespace(**locals())


_IN_PROCESS = _worker_functions(packs_errors=True)
_IN_THREAD = _worker_functions(packs_errors=False)
_shown: Callable[[Any], str] = _IN_THREAD.shown


class _SentByValue(functools.partial[Any]):
    """A function that pickles by value on every backend, and only once, which is slow.

    Any thread of an engine may pickle it; in the same process it can be called as well.
    """

    @functools.cached_property
    def reduced(self) -> Any:
        wrap = joblib.wrap_non_picklable_objects
        return wrap(self.func, keep_wrapper=False).__reduce__()

    def __reduce__(self) -> Any:
        return self.reduced


class _SentAs:
    """Something that stands for what *function* returns for *arguments* in a worker."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("it is a function in workers only")  # pickle wants a callable


def _of_worker(name: str) -> _SentAs:
    """Return what stands for a function that `prepare` has given to the worker."""
    return _SentAs(getattr, _SentAs(importlib.import_module, _WORKER_MODULE), name)


_RUN_BATCH = _SentByValue(_IN_PROCESS.run_batch)
_RUN_BATCH_OF_THREAD = _SentByValue(_IN_PROCESS.run_batch_of_thread)
_FUNCTION_OF = _SentByValue(_IN_PROCESS.function_of)
_PREPARE = _SentByValue(_IN_PROCESS.prepare)


def _dumps(value: Any, reducers: Any = None) -> bytes:
    """Pickle like joblib, which takes functions of the program and lambdas, too."""
    return bytes(_loky("backend.reduction").dumps(value, reducers=reducers))


def _pickled_function(task_func: Any, reducers: Any = None) -> bytes:
    try:
        return _dumps(task_func, reducers)
    except Exception as error:
        message = f"task_func cannot be pickled: {_shown(task_func)}: {error!r}"
        raise pickle.PicklingError(message) from error


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


def _rebuilt_error(builtin: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Make an error of class *kind* by the methods of its built-in base class alone."""
    error = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    for name, value in (state or {}).items():
        object.__setattr__(error, name, value)  # also if the class is frozen
    return error


def _add_note(error: BaseException, note: str) -> None:
    # Python 3.10, of which a type checker knows that it has no notes, or a class that
    # refuses them.
    with contextlib.suppress(Exception):
        error.add_note(note)  # type: ignore[attr-defined, unused-ignore]


# --------------------------------------------------------------------------------------
# Running tasks.
#
# The consumer is whoever reads the generator that `setup` returns. An engine is what
# runs the batches of a joblib backend: worker processes of loky or multiprocessing,
# threads, Dask or Ray.
#
#    the consumer's thread, in _results()              threads of the     workers
#                                                      engine
#   +---------------------------------------+
#   |  1 draw      _Source --> tasks        |
#   |                            |          |
#   |  2 submit    _Engine <-- batch -------|--------> queue -----------> run_batch(
#   |                                       |                               task_func,
#   |  3 wait      _Inbox <-----------------|-------- put(report) <------   *tasks)
#   |                |                      |
#   |  4 hand out    +--> results --> yield |
#   +---------------------------------------+
#
#   a thread that ends a run: _Lifetime.end() -> _Run.clean_up()
#
# That is all of it: one loop, in the thread that calls next(). The loop draws tasks
# until as many batches are out as *pre_dispatch* says, waits for a report, hands out
# its results, and draws again. So runs are lazy, bounded, composable and lossless by
# construction. All that a thread of an engine ever does is to put a report into the
# inbox of the run, which cannot block or fail.
#
# joblib's Parallel resolves what a user has configured, and enters and leaves its
# backend; of the backend, the loop calls what joblib calls: `submit`, with
# BatchedCalls and a callback, and the two methods that reckon batch sizes.


class _TaskTimeoutError(TimeoutError, multiprocessing.TimeoutError):
    """No task completed in time. joblib's users catch the one, others the other."""


class _WorkerTraceback(Exception):
    """The text of a traceback from elsewhere, as the cause of an error."""


class _OneWorker(Exception):
    """Raised by a backend that would have one worker: this process can do its work."""


class _Failure:
    """An error of an engine in place of the outcome of a batch.

    Its traceback is kept as text, since frames would refer to the run.
    """

    def __init__(self, error: BaseException) -> None:
        if error.__traceback__ is not None:
            _set_cause(error, "".join(traceback.format_exception(error)).strip())
            error.__context__ = None
        self.error = error.with_traceback(None)


# Of tasks that take no time, joblib would send 100,000 and more at once. So many gain
# nothing, but all that are out have to be kept in memory.
_LARGEST_BATCH = 8192

# Seconds. Of what takes less, larger batches are made at once.
_SHORT_BATCH = 0.01

# Bytes of arrays in the tasks of a batch, beyond which it does not grow.
_HEAVIEST_BATCH = 8_000_000

# Seconds after which a wait looks whether there is still something to wait for. It is
# also how long a Ctrl-C may have to wait on Windows, where it interrupts no lock.
_WAIT_SLICE = 0.5


def _one_by_one(
    task_func: Callable[[T], R], tasks: Iterator[T], progress: _Progress | None = None
) -> Generator[R, None, None]:
    """Yield results like `map`, but a StopIteration of *task_func* is an error."""
    for number, task in enumerate(tasks):
        try:
            result = task_func(task)
        except Exception as error:
            _add_note(error, _task_note(number, _shown(task)))
            raise
        if progress is not None:
            progress.add(1)
        yield result


def _task_note(number: int, shown: str | None) -> str:
    return f"Task {number} (counted from 0): {shown}"


class _Source:
    """The function and the tasks of a run; for the consumer's thread.

    Only the run's generator refers to it: nothing that an engine keeps while workers
    are busy does. Otherwise a run that its own tasks refer to would never be collected.
    """

    def __init__(self, task_func: Callable[[Any], Any], tasks: Iterable[Any]) -> None:
        _check_task_func(task_func)
        self.task_func = task_func
        try:
            self.tasks = iter(tasks)
        except TypeError as error:
            raise TypeError(f"tasks must be iterable, got {tasks!r}") from error
        self.total: int | None = None
        with contextlib.suppress(TypeError):
            self.total = len(cast(Sized, tasks))
        self.error: BaseException | None = None
        self.is_exhausted = False

    def draw(self, size: int, workers: int, least: int) -> list[list[Any]]:
        """Draw the tasks of the next batches: of one, if a batch has one task.

        Larger ones are drawn for all workers at once, so that the end is seen in time
        to share out what is left in small batches, of no less than *least*. An error of
        the tasks is kept until the results of what they did yield are out.
        """
        count = 1 if size == 1 else min(size * workers, sys.maxsize)
        drawn: list[Any] = []
        try:
            drawn.extend(itertools.islice(self.tasks, count))
        except (Exception, GeneratorExit) as error:
            self.error = error
        if len(drawn) < count:
            self.is_exhausted = True
            size = min(size, max(least, len(drawn) // (10 * workers)))
        return [drawn[i : i + size] for i in range(0, len(drawn), size)]


def _results(run: _Run, source: _Source) -> Generator[Any, None, None]:
    """Yield the results of a run: what `Joblib.setup` returns."""
    # Also if an interrupt keeps this from reaching its end.
    end = weakref.finalize(source, run.end)
    end.atexit = False  # _at_exit does that
    error: BaseException | None = None
    try:
        if not run.start(source):
            yield from _one_by_one(source.task_func, source.tasks, run.progress)
            return
        with run.engine.retrieval_context():
            while error is None and run.dispatch(source):
                results, error = run.next_batch()
                while results:
                    yield results.pop()  # hold on to none that has been handed out
        if error is None:
            error = source.error
        if error is not None:
            # Not inside `with`, which assigns to attributes of errors. Python itself
            # makes a RuntimeError of a StopIteration here.
            raise error
    finally:
        source.error = None
        end()  # here, since Python drops an interrupt of what the collector calls
        del error, run, source  # as its traceback refers to this frame


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
        """Report an error of no batch that is known."""
        self.put((None, _Failure(error)))

    def take(
        self, timeout: float | None, fault: Callable[[], Exception | None]
    ) -> tuple[int | None, Any]:
        """Return the number of the next batch, or None, and what has become of it.

        Raise `queue.Empty` after *timeout* seconds.
        """
        while self.next_number not in self.early:
            number, outcome = self._wait(timeout, fault)
            if number is None or not self.ordered:
                return number, outcome
            self.early[number] = outcome
        self.next_number += 1
        return self.next_number - 1, self.early.pop(self.next_number - 1)

    def _wait(
        self, timeout: float | None, fault: Callable[[], Exception | None]
    ) -> tuple[int | None, Any]:
        """Return the next report, or a failure if none can be expected."""
        deadline = math.inf if timeout is None else time.monotonic() + min(timeout, 1e9)
        error: Exception | None = None
        while True:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    return self.reports.get_nowait()
                # Python 3.10 may wait for ever for what is over before it has begun.
                return self.reports.get(timeout=min(max(left, 0.01), _WAIT_SLICE))
            except queue.Empty:
                if left <= _WAIT_SLICE:
                    raise
            if error is not None and fault() is not None:
                return None, _Failure(error)  # the last reports had time to arrive
            error = fault()


class _Progress:
    """What *verbose* prints, about as often as joblib does."""

    def __init__(self, verbose: float, total: int | None) -> None:
        self.verbose = verbose
        self.total = total
        self.done = 0
        self.start = time.monotonic()

    def add(self, count: int) -> None:
        # The lag between two messages grows with the square root of their number.
        scale = 0.5 * (11 - min(self.verbose, 10.5)) ** 2
        before, self.done = self.done, self.done + count
        steps = {math.isqrt(int(done / scale)) for done in (before, self.done)}
        stream = sys.stderr if self.verbose < 50 else sys.stdout
        if (
            stream
            and not stream.closed
            and (len(steps) > 1 or self.verbose > 10 or self.done == self.total)
        ):
            of = "" if self.total is None else f" out of {self.total:3d}"
            seconds = time.monotonic() - self.start
            print(f"Done {self.done:3d}{of} | {seconds:.1f} s", file=stream, flush=True)


class _Report:
    """What an engine calls, once, with the outcome of a batch, in any thread.

    Until then it keeps the tasks, and arrays that lie in files for it. It refers to
    nothing of the run but the inbox: see _Source; and afterwards to nothing, since the
    outcome may refer to it.
    """

    def __init__(self, inbox: _Inbox, number: int, tasks: list[Any]) -> None:
        self.put: Callable[[Any], None] | None = inbox.put
        self.number = number
        self.tasks = tasks
        self.held: list[Any] = []

    def __call__(self, outcome: Any) -> None:
        put, self.put, self.tasks, self.held = self.put, None, [], []
        if put is not None:
            put((self.number, outcome))


class _Batch(NamedTuple):
    """A batch that is out."""

    first: int  # the number of its first task
    size: int
    submitted: float
    report: weakref.ref[_Report]


def _error_of_task(first: int, index: int, shown: str | None, error: Any) -> Any:
    """Return what a task of a batch has raised, with a note that says which task."""
    note = _task_note(first + index, shown)
    if not isinstance(error, BaseException):
        error = _unpacked_error(error, note)
    _add_note(error, note)
    return error


def _timeout_error(
    timeout: Any, out: dict[int, _Batch], early: Iterable[int]
) -> _TaskTimeoutError:
    batches = [out[number] for number in out.keys() - early]
    oldest = min(batches, key=operator.attrgetter("first"))
    report = oldest.report()
    task = report.tasks[0] if report is not None and report.tasks else None
    return _TaskTimeoutError(
        f"no task has completed within the timeout of {timeout!r} seconds. "
        f"{sum(batch.size for batch in batches)} are out, of which the oldest is: "
        + _task_note(oldest.first, _shown(task))
    )


class _Lifetime:
    """Who reads a run, and whether it has ended.

    Any thread may call `end`, which has `clean_up` called in a thread of its own; the
    rest is for the consumer's thread.
    """

    inbox: _Inbox
    results: list[Any]

    def __init__(self) -> None:
        self.process = 0  # that it was started in
        self.reader = threading.current_thread()  # who has last read it
        self.is_at_work = False  # inside of the engine
        self.end_once = threading.Lock()  # test-and-set: it is never unlocked
        self.ended = threading.Event()  # set if there is nothing to end
        self.ended.set()
        self.has_failed = False  # the engine, or somebody in the middle of using it
        self.clean_ups = contextlib.ExitStack()  # all of them are done, if one fails

    def begin(self) -> None:
        self.process, self.reader = os.getpid(), threading.current_thread()
        self.ended.clear()
        _open_runs.add(self)
        _end_open_runs_at_exit()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Surround what the consumer's thread does with the engine."""
        if self.process != os.getpid():
            raise RuntimeError(
                "a run cannot be read in a fork of the process it is from"
            )
        self.reader, self.is_at_work = threading.current_thread(), True
        try:
            yield
        finally:
            self.is_at_work = False

    def end(self) -> None:
        """End the run, and wait for that if it is this thread's. May be repeated.

        It is done in another thread, where no signal handler interrupts it, and which
        can wait for whatever this one may hold: the garbage collector may call this
        anywhere, even in the middle of another run's submission.
        """
        if self.ended.is_set() or self.process != os.getpid():
            return
        if self.end_once.acquire(blocking=False):
            _call_in_thread(self._end)
        me = threading.current_thread()
        is_busy = any(run.is_at_work and run.reader is me for run in list(_open_runs))
        if self.reader is me and not is_busy:
            self.ended.wait(timeout=10)

    def _end(self) -> None:
        try:
            self.clean_up()
        finally:
            _open_runs.discard(self)
            self.ended.set()

    def clean_up(self) -> None:
        """Stop what was started."""
        raise NotImplementedError


class _Run(_Lifetime):
    """One call of `Joblib.setup`, but for its function and its tasks (see _Source).

    All but `clean_up` is for the consumer's thread.
    """

    def __init__(self, num_workers: int | None, options: dict[str, Any]) -> None:
        super().__init__()
        n_jobs = _checked_num_workers(num_workers)
        backend = _chosen_backend(options)
        _check_options(options, backend, n_jobs)
        self.inbox = _Inbox(ordered=options.pop("return_as", None) == "generator")
        self.timeout: float | None = options.pop("timeout", None)
        self.engine = _engine_like(backend, self.inbox)
        self.parallel = joblib.Parallel(n_jobs=n_jobs, backend=self.engine, **options)
        self.progress: _Progress | None = None
        self.most_out: float = 0  # batches
        self.ready: deque[list[Any]] = deque()  # drawn, and not yet submitted
        self.out: dict[int, _Batch] = {}
        self.numbers = itertools.count()
        self.submitted = 0  # tasks
        self.completed: _Batch | None = None  # whose results are being handed out
        self.results = []  # received, and not yet handed out; reversed

    def start(self, source: _Source) -> bool:
        """Start the engine. Return whether it has several workers."""
        if self.parallel.verbose:
            self.progress = _Progress(self.parallel.verbose, source.total)
        self.begin()
        with self.at_work():
            try:
                self.parallel.__enter__()
            except _OneWorker:
                return False
            finally:
                self.clean_ups.push(self.parallel)
            self.engine.start_call()
            self.clean_ups.callback(self.engine.stop_call)
            formula, workers = self.parallel.pre_dispatch, self.engine.workers
            self.most_out = _most_batches(formula, workers)
            self.engine.get_ready_for(source.task_func)
        return True

    def dispatch(self, source: _Source) -> bool:
        """Draw and submit until all is out that may be. Return whether anything is."""
        with self.at_work():
            if self.completed is not None:
                self.note_completion(self.completed)
            while len(self.out) < self.most_out and not self.has_failed:
                if not self.ready and not source.is_exhausted:
                    size, least = self.engine.batch_sizes(self.parallel.batch_size)
                    self.ready.extend(source.draw(size, self.engine.workers, least))
                if not self.ready:
                    break
                self.submit(self.ready.popleft())
        return bool(self.out)

    def submit(self, tasks: list[Any]) -> None:
        report = _Report(self.inbox, next(self.numbers), tasks)
        first, self.submitted = self.submitted, self.submitted + len(tasks)
        batch = _Batch(first, len(tasks), time.monotonic(), weakref.ref(report))
        self.out[report.number] = batch
        try:
            self.engine.submit(self.engine.calls_of(report), callback=report)
        except Exception as error:
            # To be raised after the results that came before it.
            report(_Failure(error))
            self.has_failed = True

    def next_batch(self) -> tuple[list[Any], BaseException | None]:
        """Wait for a batch. Return its results, reversed, and an error."""
        with self.at_work():
            try:
                number, outcome = self.inbox.take(self.timeout, self.engine.fault)
            except queue.Empty:
                early = self.inbox.early  # in order, these wait for the others
                raise _timeout_error(self.timeout, self.out, early) from None
            if number is not None:
                self.completed = self.out.pop(number)
            try:
                self.results, failure = self.engine.results_of(outcome)
            except BaseException as error:
                self.has_failed = True
                return [], error.with_traceback(None)
        first = cast(_Batch, self.completed).first
        return self.results, failure and _error_of_task(first, *failure)

    def note_completion(self, batch: _Batch) -> None:
        """Let joblib reckon the size of batches; it counts the time of reading, too."""
        self.completed = None
        self.engine.batch_completed(batch.size, time.monotonic() - batch.submitted)
        if self.progress is not None:
            self.progress.add(batch.size)

    def clean_up(self) -> None:
        """Call off what is out, stop the workers or keep them for the next run."""
        if self.out or self.has_failed:
            self.clean_ups.callback(self.engine.abort_everything, ensure_ready=False)
        self.clean_ups.close()
        self.engine.parallel = None  # which refers to the engine


# --------------------------------------------------------------------------------------
# Ending runs.
#
# However a run ends (`finally` of _results, the finalizer of its source, or a hook at
# exit), its `end` is called. In a thread of its own that calls _Run.clean_up: what is
# out is called off by `abort_everything` of the engine, which stops workers that are
# busy; `stop_call` and `terminate` follow, as with joblib.
#
# A run stands in _open_runs from its start until all that it has started has ended.
# When the interpreter exits, runs that nobody will read to the end are ended: those
# that were last read in the main thread, in one that has ended, or in a daemon thread.
# Then idle workers are stopped. There are three hooks: loky waits for its workers in a
# hook of `threading`, which comes before those of `atexit`; a child process of
# multiprocessing waits for its own children before both.

_open_runs: set[_Lifetime] = set()
_idle_pools: list[_Pool] = []  # only ever changed by atomic calls, so needs no lock
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


def _at_exit() -> None:
    """End the runs that nobody will read to the end, and idle workers."""
    global _most_idle
    _most_idle = 0
    for run in list(_open_runs):
        reader = run.reader
        if reader is threading.main_thread() or not reader.is_alive():
            # Whoever reads on, in a hook that comes later, must not take it for the
            # end.
            run.inbox.fail(
                RuntimeError("the run was ended, since the interpreter exits")
            )
        elif reader.daemon:
            run.inbox.fail(SystemExit())  # which ends a thread in silence
        else:
            continue  # `threading` waits for it
        run.end()
        run.ended.wait(timeout=10)
    _stop_idle_pools()


def _stop_idle_pools(most: int = 0) -> None:
    """Stop idle workers, those that have been idle for longest first."""
    while len(_idle_pools) > most:
        with contextlib.suppress(IndexError):  # another thread has taken it
            _idle_pools.pop(0).stop()


@functools.cache
def _end_open_runs_at_exit() -> None:
    """See to it, once, that open runs are ended at exit."""
    atexit.register(_at_exit)


@functools.cache
def _at_exit_before_loky(process: int) -> None:
    """See to it, once a process, that they are ended before somebody waits for workers.

    The last hook of `threading` to be registered is the first to run; so this is for
    when loky has registered its own.
    """
    multiprocessing.util.Finalize(None, _at_exit, exitpriority=100)
    _private(threading, "_register_atexit")(_at_exit)
    _private(multiprocessing.process, "_children")  # which a fork will need
    _private(_loky("process_executor"), "_threads_wakeups")
    # loky means to register its own once, and does so again for each executor, since
    # what it remembers is None (joblib 1.5.0 to 1.6.0). They would come before ours.
    _loky("process_executor").process_pool_executor_at_exit = _at_exit


def _disown_runs_of_parent() -> None:
    """In a fork: let its exit not touch what the parent's runs have."""
    global _open_runs, _idle_pools, _most_idle
    _inherited.append((_open_runs, _idle_pools, [*_pools]))
    for run in _open_runs:
        run.results.clear()  # which are to be read there
    # Python would stop the parent's worker processes, or fail to wait for them.
    ours = {process for pool in _pools for process in pool.processes()}
    _private(multiprocessing.process, "_children").difference_update(ours)
    if ours:  # or loky may wait for a lock that a thread of the parent had
        _private(_loky("process_executor"), "_threads_wakeups").clear()
    _open_runs, _idle_pools, _most_idle = set(), [], 0
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_runs_of_parent)


# --------------------------------------------------------------------------------------
# Engines: joblib's backends, and what they lack.


# Private names of Python, joblib and loky that this file uses, and what for. Looked at
# in Python 3.10 to 3.14 and joblib 1.5.0 to 1.6.0. Without one of them no run of
# processes starts.
_PRIVATE_NAMES = {
    # threading
    "_register_atexit": "to end runs before loky waits for their workers at exit",
    # multiprocessing.process
    "_children": "to let a fork not stop its parent's workers",
    # joblib._memmapping_reducer
    "get_memmapping_reducers": "to map large arrays",
    "_get_temp_dir": "to put files where joblib would",
    # joblib.parallel.ParallelBackendBase
    "_prepare_worker_env": "to limit the threads of libraries in workers",
    # joblib.externals.loky.process_executor, its ProcessPoolExecutor and queues
    "_threads_wakeups": "to let a fork not wait for its parent's threads",
    "_processes": "to stop workers",
    "_executor_manager_thread": "to know whether anything will be reported",
    "kill_workers": "of that thread: to stop workers with all that they have started",
    "work_ids_queue": "of that thread: to empty it, or it looks for forgotten work",
    "call_queue": "of that thread: to wait for the thread that fills it",
    "result_queue": "of that thread: to end its wait for half a result",
    "_reader": "of the former: to end the wait of the thread that fills it",
    "_writer": "of the latter: for the same",
    "_thread": "the one that fills the queue of calls",
}


def _private(owner: Any, name: str) -> Any:
    """Return an attribute that stands in the list above."""
    try:
        return getattr(owner, name)
    except AttributeError:
        message = f"{name}, which is needed {_PRIVATE_NAMES[name]}, is not in {owner!r}"
        versions = f"joblib {joblib.__version__}, Python {sys.version.split()[0]}"
        raise RuntimeError(f"{message} ({versions}): use another version") from None


# To a type checker the base could be anything: hence the "ignore", here and below.
class _BatchSizes(joblib.parallel.ParallelBackendBase):  # type: ignore[misc]
    """Reckons the size of batches as joblib does, and faster; in the consumer's thread."""

    effective_batch_size = 1
    wanted_batch_size: int = 1  # by joblib's own reckoning
    last_duration: float = math.inf
    task_weight: float = 0  # bytes of arrays in a task, if known

    def compute_batch_size(self) -> int:
        size = super().compute_batch_size()
        # joblib doubles the size at each step. It is told how long a batch of the new
        # size would take, and takes the next step, too, if that is next to no time.
        while size > self.wanted_batch_size:
            self.last_duration *= size / self.wanted_batch_size
            self.wanted_batch_size = size
            if self.last_duration < _SHORT_BATCH:
                super().batch_completed(size, self.last_duration)
                size = super().compute_batch_size()
        self.wanted_batch_size = size
        most = _LARGEST_BATCH
        if self.task_weight * most > _HEAVIEST_BATCH:
            most = max(1, int(_HEAVIEST_BATCH / self.task_weight))
        self.effective_batch_size = min(self.wanted_batch_size, most)
        return self.effective_batch_size

    def batch_sizes(self, batch_size: Any) -> tuple[int, int]:
        """Return the size of the next batches, and the least at the end of the tasks."""
        if batch_size != "auto":
            return int(batch_size), 1
        size = int(self.compute_batch_size())
        # Few that last a moment are shared out in less time than many.
        least = int(_SHORT_BATCH * self.wanted_batch_size / self.last_duration)
        return size, max(1, least)

    def batch_completed(self, batch_size: int, duration: float) -> None:
        if batch_size == self.effective_batch_size < self.wanted_batch_size:
            # joblib wants to know of a batch of the size that it has asked for.
            duration *= self.wanted_batch_size / batch_size
            batch_size = self.wanted_batch_size
        self.last_duration = max(duration, 1e-6)  # some clocks tick seldom
        super().batch_completed(batch_size, duration)


class _Engine(_BatchSizes):
    """Mixed into the class of a joblib backend: what the loop asks of it.

    All but `abort_everything`, `stop_call` and `terminate`, which are called in the
    thread that ends the run, is for the consumer's thread.
    """

    more_options: frozenset[str] = frozenset()  # that no signature tells of
    inbox: _Inbox
    workers = 1

    def get_ready_for(self, task_func: Callable[[Any], Any]) -> None:
        self.nested = self.get_nested_backend()
        self.function = self.send(task_func)
        self.call = joblib.delayed(self.batch_runner())

    def calls_of(self, report: _Report) -> Any:
        """Return what joblib's backends take as a batch."""
        pickled = functools.partial(self.note_pickling, report)
        calls = joblib.parallel.BatchedCalls(report.tasks, self.nested, pickled)
        # One call a batch: a call a task takes several times longer to make, to send
        # and to unpickle.
        calls.items = [self.call(self.function, *report.tasks)]
        return calls

    def batch_runner(self) -> Any:
        """Return the function that runs a batch."""
        in_thread = getattr(self, "supports_sharedmem", False)
        return _IN_THREAD.run_batch if in_thread else _RUN_BATCH

    def send(self, task_func: Callable[[Any], Any]) -> Any:
        """Return what each batch carries as its function."""
        return task_func

    def note_pickling(self, report: _Report) -> None:
        """Take note, in a thread of the engine, that it begins to pickle a batch."""

    def separate_from(self, original: Any) -> None:
        """Give up what must not be shared with *original*, of which this is a copy."""
        if getattr(original, "_pool", None) is not None:  # somebody else's threads
            self._pool = None
        if hasattr(self, "reset_batch_stats"):
            self.reset_batch_stats()  # those of another run

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        try:
            workers = super().configure(n_jobs=n_jobs, parallel=parallel, **options)
        except joblib.parallel.FallbackToBackend:
            workers = 1
        if workers == 1:
            raise _OneWorker
        if workers == 0:  # as joblib says it, of a cluster
            raise RuntimeError(f"{type(self).__name__} has no active worker")
        self.workers = int(workers)
        return self.workers

    def results_of(self, outcome: Any) -> tuple[list[Any], Any]:
        """Return the results of a batch, reversed, and an error of its tasks, packed.

        An error of the engine is raised.
        """
        if isinstance(outcome, _Failure):
            raise outcome.error
        ((results, failure),) = self.retrieve_result_callback(outcome)
        results.reverse()
        return results, failure

    def fault(self) -> Exception | None:
        """Return an error if the engine has died, and will report nothing more."""
        return None


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


def _engine_like(backend: Any, inbox: _Inbox) -> Any:
    """Return an engine for one run like *backend*, which is left as it is."""
    is_sequential = isinstance(backend, joblib.parallel.SequentialBackend)
    if not (is_sequential or backend.supports_retrieve_callback):
        raise ValueError(
            f"backend must tell when a batch has completed, got {backend!r}"
        )
    kind: Any = type(backend)
    engine = object.__new__(_engine_class(_mixin_for(backend), kind))
    vars(engine).update(vars(backend))
    engine.inbox = inbox
    engine.separate_from(backend)
    return engine


# ---- worker processes: loky and multiprocessing --------------------------------------

# A pickled function of more bytes is not sent with each batch, but put into a file.
_LARGEST_INLINE_FUNCTION = 32_000

# Seconds that a run which ends waits for each of what should take a moment.
_PATIENCE = 3


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
    """What a run puts into files: large arrays, as joblib does, and a heavy function.

    joblib keeps the file of an array until the run ends; here each goes with its array.
    They lie in a folder of the run, which is made when it is first needed. The instance
    is called for each array, in the thread in which joblib's reducer would be.
    """

    def __init__(self, root: str | None, options: dict[str, Any]) -> None:
        self.root = root
        self.process = os.getpid()
        self.folder: Any = None
        self.tracker = _loky("backend.resource_tracker")
        self.drops: dict[str, Any] = {}  # finalizers of arrays, by their files
        self.held: list[Any] = []  # keeps the arrays that what is pickled has in files
        self.weight = 0  # bytes of all arrays
        self.has_ended = False
        module = importlib.import_module("joblib._memmapping_reducer")
        self.place = _private(module, "_get_temp_dir")
        self.reducers, self.result_reducers = _private(
            module, "get_memmapping_reducers"
        )(temp_folder_resolver=self.path, unlink_on_gc_collect=False, **options)
        numpy = sys.modules.get("numpy")  # joblib has imported it, if there is one
        if numpy is not None:
            self.reduce = self.reducers[numpy.ndarray]
            self.reducers[numpy.ndarray] = self.reducers[numpy.memmap] = self

    def __reduce__(self) -> Any:
        return dict, ()  # workers get it with loky's queue, but put nothing into that

    def path(self) -> str:
        """Return the folder."""
        if self.has_ended:
            # loky's thread still pickles: to it, this is a pipe that nobody reads.
            raise BrokenPipeError(errno.EPIPE, "the run has ended")
        if self.folder is None:
            # joblib's own name, by which those who look for such folders find them.
            name = f"joblib_memmapping_folder_{self.process}_{uuid.uuid4().hex}"
            self.folder, _ = self.place(name, self.root)
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self.tracker.register(self.folder, "folder")  # removes it if we cannot
        return str(self.folder)

    def __call__(self, array: Any) -> Any:
        self.weight += array.nbytes
        try:
            reduced = self.reduce(array)
        except BaseException:
            for name in os.listdir(self.folder) if self.folder else ():
                if name.startswith(f"{self.process}-"):  # not that of the function
                    self.adopt(array, os.path.join(self.folder, name))
            raise
        file = reduced[1][0]
        if isinstance(file, str) and os.path.dirname(file) == self.folder:
            self.adopt(array, file)
            self.held.append(array)
        return reduced

    def adopt(self, array: Any, file: str) -> None:
        """Let a file that joblib has begun go with its array."""
        if file not in self.drops:
            self.tracker.unregister(file, "file")  # that of the folder will do
            self.drops[file] = weakref.finalize(array, self.drop, file)
            self.drops[file].atexit = False

    def drop(self, file: str) -> None:
        """Remove the file of an array that is no more."""
        if self.drops.pop(file, None) is not None and self.process == os.getpid():
            with contextlib.suppress(OSError):  # Windows, where a worker maps it
                os.unlink(file)

    def close(self) -> None:
        """Remove all files. A pool that is kept must not keep what was in them."""
        self.held, self.has_ended = [], True
        while self.drops:
            self.drops.popitem()[1].detach()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.tracker.unregister(self.folder, "folder")
            self.folder = None


class _Workers:
    """Worker processes, which serve one run at a time: an executor of loky.

    The consumer's thread makes it, submits to it and asks what is wrong with it.
    """

    def __init__(
        self, key: Any, workers: int, prepared: Any, files: _Files, **options: Any
    ) -> None:
        self.key = key  # of what another run must want to be served, too
        self.workers = workers
        self.unannounced = workers  # as many have not said that they have started
        self.complaint = ""  # of an initializer
        _occupy_standard_streams()
        self.announced, self.announce = multiprocessing.Pipe(duplex=False)
        self.reducers: dict[Any, Any] = {}  # those of the run
        self.executor = _loky("process_executor").ProcessPoolExecutor(
            workers,
            job_reducers=self.reducers,
            result_reducers=files.result_reducers,
            initializer=_PREPARE,
            initargs=(self.announce, prepared),
            **options,
        )
        self.start_method = options["context"] and options["context"].get_start_method()
        self.table = _private(self.executor, "_processes")
        self.manager: Any = None  # loky's thread
        _pools.add(self)

    def processes(self) -> list[Any]:
        return list(self.table.values())

    def submit(self, calls: Any) -> Future[Any]:
        if self.manager is not None and len(self.table) == self.workers:
            return cast(Future[Any], self.executor.submit(calls))
        if self.start_method == "fork":
            # Not in a thread of its own, since Python warns of forks beside threads.
            return self.start(calls)
        # Workers that were interrupted as they start would print a traceback, or go
        # on for ever. No handler of a signal ever interrupts another thread.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self.start, calls).result()

    def start(self, calls: Any) -> Future[Any]:
        """Submit a batch, which starts the workers, or those that have left."""
        if self.start_method != "fork" and os.name == "posix":
            # Python starts its own as a worker starts, and unblocks interrupts then.
            importlib.import_module("multiprocessing.resource_tracker").ensure_running()
        with _interrupts_blocked(), _standard_streams():
            future = self.executor.submit(calls)
        manager = _private(self.executor, "_executor_manager_thread")
        calls, results = (
            _private(manager, "call_queue"),
            _private(manager, "result_queue"),
        )
        self.queues = calls, results
        for owner, name in (calls, "_thread"), (results, "_writer"):
            _private(owner, name)
        numbers, _ = (
            _private(manager, "work_ids_queue"),
            _private(manager, "kill_workers"),
        )
        manager.kill_workers = functools.partial(
            _kill_workers, self.table, numbers, _private(calls, "_reader")
        )
        self.manager = manager
        _at_exit_before_loky(os.getpid())  # if it fails, these workers can be stopped
        return cast(Future[Any], future)

    def hear(self, seconds: float) -> bool:
        """Return whether all workers have announced themselves, or do so in time."""
        deadline = time.monotonic() + seconds
        while self.announced.poll(
            max(0, deadline - time.monotonic()) if self.unannounced > 0 else 0
        ):
            self.complaint += self.announced.recv_bytes().decode(errors="replace")
            self.unannounced -= 1
        return self.unannounced <= 0

    def fault(self) -> Exception | None:
        """Return an error if a worker is dead, or loky's thread."""
        codes = [p.exitcode for p in self.processes() if p.exitcode is not None]
        if codes:  # one that leaves in peace is taken off the table before it ends
            return BrokenExecutor(f"a worker process has died, with exit code {codes}")
        if not self.manager.is_alive():
            return RuntimeError("loky has stopped working: its manager thread has died")
        return None


def _explained(error: BaseException, pool: _Workers) -> BaseException:
    """Return the error of a worker that died, with what is known of the reason."""
    if not isinstance(error, BrokenExecutor):
        return error
    pool.hear(0)
    if pool.complaint:
        last = pool.complaint.strip().splitlines()[-1]
        error = BrokenExecutor(f"the initializer has failed in a worker: {last}")
        _set_cause(error, pool.complaint.strip())
    elif pool.unannounced > 0 and error.__cause__ is None:
        names = (f"{name}.py" for name in sorted(sys.stdlib_module_names))
        hidden = ", ".join(filter(os.path.exists, names)) or "none"
        _set_cause(
            error,
            "A worker has died as it started. Files of the current directory that "
            f"hide modules of Python, which it may need: {hidden}",
        )
    return error


class _Pool(_Workers):
    """Workers that may serve several runs, one after another.

    The consumer's thread takes it, if it is sound; the thread that ends a run keeps,
    stops or kills it. In loky's manager thread _kill_workers is called.
    """

    def is_sound(self) -> bool:
        return len(self.table) == self.workers and self.fault() is None

    def keep(self) -> None:
        """Let the next run of the same settings have the workers, which are idle."""
        has_started = self.hear(_PATIENCE)
        if self.key is None or not has_started:
            self.stop(kill=not has_started)
        else:
            self.reducers.clear()
            _idle_pools.append(self)
            _stop_idle_pools(_most_idle)

    def stop(self, *, kill: bool = False) -> None:
        """Let the workers end, which are idle; or kill them and what they have started."""
        # To wait for it here would be behind a lock that all executors share.
        self.executor.shutdown(wait=False, kill_workers=kill)
        if self.manager is not None:
            self.manager.join(timeout=_PATIENCE)
        if self.table:
            self.break_off()
        if self.manager is not None:
            # If the interpreter exits while the thread that fills loky's queue lets go
            # of a semaphore, that is reported as leaked (joblib 1.5.0 to 1.6.0).
            feeder = _private(self.queues[0], "_thread")
            if feeder is not None:
                feeder.join(timeout=_PATIENCE)
        self.announced.close()
        self.announce.close()

    def break_off(self) -> None:
        """Kill the workers though loky's thread does not.

        It could not start, has died, or waits for the rest of a result whose sender was
        killed by somebody else.
        """
        processes = self.processes()
        _kill_trees(processes)
        for process in processes:
            process.join(timeout=1)
        if self.manager is None:
            return
        self.manager.join(timeout=_PATIENCE)
        calls, results = self.queues
        if not self.manager.is_alive():
            _private(calls, "_reader").close()
            calls.close()
        elif os.name == "posix":
            # Its pipe comes to an end when nobody could write into it any more. That
            # thread will close what is put in its place.
            with open(os.devnull, "wb") as sink:
                os.dup2(sink.fileno(), _private(results, "_writer").fileno())
            self.manager.join(timeout=_PATIENCE)


_pools: weakref.WeakSet[_Workers] = weakref.WeakSet()  # all that are not collected


def _take_pool(key: Any) -> _Pool | None:
    """Return idle workers of these settings, if there are any."""
    if key is None:  # it may not be compared
        return None
    for pool in list(_idle_pools):
        if pool.key == key:
            try:
                _idle_pools.remove(pool)
            except ValueError:  # another thread has taken it
                continue
            if pool.is_sound():
                return pool
            pool.stop(kill=True)
    return None


@contextlib.contextmanager
def _standard_streams() -> Iterator[None]:
    """Lend standard streams to those who flush them, if the program has closed them."""
    with contextlib.ExitStack() as stack:
        for name in "stdout", "stderr":
            stream = getattr(sys, name)
            if stream is None or stream.closed:
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


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keep interrupts from this thread, and from processes that it starts.

    These unblock them when they are ready.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_workers(
    table: dict[int, Any], numbers: Any, calls: Any, reason: str = ""
) -> None:
    """Kill the workers of a pool: in loky's manager thread, which then ends.

    It stands in for the thread's own method, which kills one worker after another, and
    of each the children first; the rest take the next tasks meanwhile, or start more
    programs. Here that thread reads no more: no worker can be in the middle of a result
    that it waits for.
    """
    processes = list(table.values())
    _kill_trees(processes)
    for process in processes:
        process.join()
    table.clear()
    # It has forgotten all work, and would look for what these are the numbers of.
    with contextlib.suppress(queue.Empty):
        while True:
            numbers.get_nowait()
    calls.close()  # or the thread that fills this pipe might wait for ever


def _kill_trees(processes: Iterable[Any]) -> None:
    """Stop processes and all that they have started; when all are stopped, kill them.

    Nothing can start anything meanwhile, or be told of a child's end.
    """
    if os.name != "posix":
        for process in processes:
            _loky("backend.utils").kill_process_tree(process)
        return
    found: set[int] = set()
    new = {p.pid for p in processes if p.pid is not None and p.exitcode is None}
    while new:
        _send(signal.SIGSTOP, new)
        found |= new
        new = {pid for pid, parent in _parents() if parent in found} - found
    _send(signal.SIGKILL, found)


def _send(number: int, pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # it is gone, or somebody else's
            os.kill(pid, number)


def _parents() -> Iterator[tuple[int, int]]:
    """Yield the ids of all processes and of their parents, if that can be known."""
    if os.path.exists("/proc/self/stat"):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # "number (name) state parent ...", and the name may be anything
                yield int(name), int(file.read().rpartition(b")")[2].split()[1])
        return
    with contextlib.suppress(OSError):
        command = ["ps", "-A", "-o", "pid=,ppid="]
        listed = subprocess.run(command, capture_output=True, check=False).stdout
        for line in listed.splitlines():
            pid, parent = map(int, line.split())
            yield pid, parent


class _Processes(_Engine):
    """Gives each run workers of its own, by loky's executor.

    So a run has as many as it asked for, with its own initializer, and runs cannot
    disturb each other.
    """

    more_options = frozenset(
        ("initializer", "initargs", "forward_reducers", "backward_reducers", "prewarm")
    )
    pool: Any = None  # a _Pool
    files: Any = None  # _Files
    tasks_pickled = 0

    def batch_runner(self) -> Any:
        return _of_worker("run_batch")

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,
        require: Any = None,
        idle_worker_timeout: float | None = None,
        **options: Any,
    ) -> int:
        workers = int(self.effective_n_jobs(n_jobs))
        if workers == 1:
            raise _OneWorker
        self.parallel, self.workers = parallel, workers
        options = {**self.backend_kwargs, **options}
        self.idle_seconds = idle_worker_timeout or options.pop(
            "idle_worker_timeout", 300
        )
        self.context = options.pop("context", None)
        self.prepared: Any = (
            options.pop("initializer", None),
            options.pop("initargs", ()),
        )
        self.files = _Files(options.pop("temp_folder", None), options)
        _pickle_main_by_value()
        return workers

    def send(self, task_func: Callable[[Any], Any]) -> Any:
        """Pickle the function, once; each worker unpickles it once."""
        payload: Any = _pickled_function(task_func, self.files.reducers)
        self.held, self.files.weight = self.files.held, 0
        if len(payload) > _LARGEST_INLINE_FUNCTION:
            file = os.path.join(self.files.path(), "task_func.pkl")
            with open(file, "wb") as opened:
                opened.write(payload)
            payload = file
        return _SentAs(_of_worker("function_of"), uuid.uuid4().hex, payload)

    def submit(self, func: Any, callback: Any = None) -> Any:
        if self.files.has_ended:
            raise RuntimeError("the run has ended")
        if self.pool is None:
            self.pool = self.find_pool()
            self.pool.reducers.update(self.files.reducers)
        job = self.pool.submit(func)
        job.add_done_callback(callback)
        return job

    def note_pickling(self, report: _Report) -> None:
        # The arrays stay until the batch has been reported, and so do their files, even
        # if some were made only to be pickled.
        self.files.held = report.held
        self.task_weight = self.files.weight / (self.tasks_pickled or 1)
        self.tasks_pickled += len(report.tasks)

    def retrieve_result_callback(self, out: Any) -> Any:
        error, pool = out.exception(), self.pool
        if error is None:
            return out.result()
        raise error if pool is None else _explained(error, pool)

    def fault(self) -> Exception | None:
        return None if self.pool is None else self.pool.fault()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop(kill=True)

    def terminate(self) -> None:
        pool, self.pool = self.pool, None
        try:
            if pool is not None:
                pool.keep()
        finally:
            if self.files is not None:
                self.files.close()
            self.reset_batch_stats()


class _Loky(_Processes, joblib.parallel.LokyBackend):  # type: ignore[misc]
    """Keeps the workers of a run that ended well for the next that wants the same."""

    def find_pool(self) -> _Pool:
        env = _private(self, "_prepare_worker_env")(n_jobs=self.workers)
        options = {"timeout": self.idle_seconds, "env": env}
        prepared, key = self.prepared, cast(Any, None)
        # What can be pickled only while a process is started, such as a lock, is not
        # compared: those workers serve one run.
        with contextlib.suppress(Exception):
            prepared = _dumps(prepared)
            environment = dict(os.environ)
            environment.pop("PYTEST_CURRENT_TEST", None)  # another one in each test
            surroundings = environment, os.getcwd(), list(sys.path)
            reducers = dict(self.files.result_reducers)
            key = self.workers, prepared, options, surroundings, reducers
        return _take_pool(key) or _Pool(
            key, self.workers, prepared, self.files, context=None, **options
        )


class _Multiprocessing(_Processes, joblib.parallel.MultiprocessingBackend):  # type: ignore[misc]
    """Starts workers as multiprocessing does, anew for each run.

    A fork is a picture of the program as it is when the run starts.
    """

    def find_pool(self) -> _Pool:
        if _inherited and self.context.get_start_method() == "forkserver":
            # The server is a child of the parent, and no use to a fork.
            self.context = multiprocessing.get_context("spawn")
        options = {"timeout": self.idle_seconds, "context": self.context}
        return _Pool(None, self.workers, self.prepared, self.files, **options)


# ---- Dask and Ray --------------------------------------------------------------------


class _Dask(_Engine):
    """Reports what joblib's Dask backend (1.5.0 to 1.6.0) does not, and cancels tasks.

    Without it, a run waits for ever for a worker that is lost, or for what cannot be
    pickled (see _DaskClient), and what is queued goes on when a run has been left.
    """

    def batch_runner(self) -> Any:
        return _RUN_BATCH_OF_THREAD

    def send(self, task_func: Callable[[Any], Any]) -> Any:
        # Dask scatters what is large, once a run, to its workers.
        return _IN_PROCESS.FunctionOfThreads(_pickled_function(task_func))

    def separate_from(self, original: Any) -> None:
        # What it keeps of its calls must not be shared; what was scattered may be.
        own: Any = self
        own.__init__(
            client=_DaskClient(original.client, self.inbox),
            wait_for_workers_timeout=original.wait_for_workers_timeout,
            **original.submit_kwargs,
        )
        self.nesting_level = original.nesting_level
        # The keys are ids of what was scattered, which the original keeps alive.
        self.data_futures, self.original = original.data_futures, original

    def effective_n_jobs(self, n_jobs: int) -> int:
        # With one worker tasks would run in this process, not on the cluster. With
        # none, joblib raises an error.
        workers = int(super().effective_n_jobs(n_jobs))
        return workers and max(workers, 2)

    def submit(self, func: Any, callback: Any = None) -> Any:
        def report_error(job: Future[Any]) -> None:
            error = job.exception()
            if error is not None:
                callback(_Failure(error))

        job = super().submit(func, callback)
        job.add_done_callback(report_error)  # if a worker is lost, joblib calls nothing
        return job

    def abort_everything(self, ensure_ready: bool = True) -> None:
        futures = list(self.waiting_futures.futures)
        super().abort_everything(ensure_ready)
        if self.client.status == "running":
            self.client.cancel(futures)  # joblib only forgets them


class _DaskClient:
    """A Dask client for joblib, on whose event loop nothing fails in silence.

    There joblib (1.5.0 to 1.6.0) sends tasks and fetches results. What cannot be
    pickled makes that fail; all that Dask does about it is to write to a log. joblib
    calls `add_callback` in the consumer's thread and on the event loop.
    """

    def __init__(self, client: Any, inbox: _Inbox) -> None:
        self.client = client
        self.inbox = inbox

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    @property
    def loop(self) -> _DaskClient:
        return self  # of the loop, joblib uses add_callback alone

    def add_callback(self, function: Callable[..., Any], *args: Any) -> None:
        async def guarded() -> None:
            try:
                await function(*args)
            except Exception as error:
                self.inbox.fail(error)

        self.client.loop.add_callback(guarded)


class _Ray(_Engine):
    """Puts the function into Ray's store once a run; each worker unpickles it once."""

    def send(self, task_func: Callable[[Any], Any]) -> Any:
        stored = importlib.import_module("ray").put(_pickled_function(task_func))
        return _SentAs(_FUNCTION_OF, uuid.uuid4().hex, stored)
