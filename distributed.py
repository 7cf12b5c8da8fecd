"""Run a function over many tasks: one by one, on all cores, or on a cluster.

This file is meant to be copied: it needs Python 3.10 or newer, joblib 1.5 or newer and
nothing else. `__version__`, below, tells whether there is a newer one where it comes
from.

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
import contextlib
import functools
import gc
import importlib
import inspect
import itertools
import math
import multiprocessing
import multiprocessing.process
import numbers
import operator
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

if TYPE_CHECKING:
    # It ships no types, and is mixed into at run time, which no checker could follow.
    joblib: Any
else:
    import joblib
    import joblib.parallel

__all__ = ["DistributedBackend", "Joblib", "SingleProcess", "get_backend"]
__version__ = "1.1.0"

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
        >>> next(results)
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'two'

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
            At once, if *task_func* is not callable or *tasks* is not iterable.
        RuntimeError
            From the generator, if *task_func* raises `StopIteration`, which becomes its
            cause: out of a generator it would look like the end of the results.
        """
        return _one_by_one(task_func, _checked_tasks(task_func, tasks))

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

    *Bounded.* At most *pre_dispatch* batches, and as many more as there are workers,
    have been drawn beyond the results handed out, however slow the consumer and however
    many tasks there are. With ``batch_size=1`` and a small *pre_dispatch*, tasks can
    depend on earlier results.

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

    *Ends cleanly.* Closing the generator ends the run, as do ``break``, ``del``, an
    error and leaving the interpreter. What is queued is dropped, workers that are busy
    with the run are stopped, and nothing is printed or warned of.

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

    *Independent.* A run that fails, times out or is closed does not disturb another
    run.

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

    *No hang.* A worker process that dies is an error, and so is the death of the thread
    that manages loky's workers. To use loky, or the fork server of `multiprocessing`,
    in a fork of a process that has used it is a `RuntimeError`.

    *Self-contained.* Workers are sent one function of this module, by value. They
    import the module only if that of *task_func* does.

    Not promised:

    - loky has one pool of workers for a process. While one run has work in it, another
      run that starts shares the pool as it is, with the number of workers,
      *initializer* and memory-mapping options of the first. Of a run that is left then,
      up to two batches a worker go on until the other runs have ended; if they are
      stuck, only a *timeout* of the others ends the wait. A worker that dies, or a task
      or result that cannot be unpickled, is an error in every run that has work in the
      pool.
    - Whoever else uses loky through `joblib.Parallel` shares the pool, too: its failure
      is an error here, and the other way round. If it asks for another number of
      workers in another thread, both can wait for each other for ever, as two of its
      kind can. To leave a run here may stop its work, and loky may print a traceback
      then. When the main thread has ended, the pool takes no more tasks.
    - Threads cannot be stopped: what they are busy with goes on in the background. The
      same is true of Dask's workers, which are threads.
    - With `multiprocessing`, a worker's death is noticed within about a second, and
      only when no other task completes; with *maxtasksperchild*, only if its exit code
      is not 0. An interrupt while it starts may leave workers.
    - Of a batch with a result that cannot be pickled, or a task that raises what is no
      `Exception`, such as `SystemExit`, no result arrives. With
      ``return_as="generator"``, results behind one that is missing are lost with it.
    - To close a run in a thread that is not the last to have read it does not wait for
      its workers to stop; elsewhere, that wait ends after 10 seconds.
    - An error of *tasks* that is no `Exception`, such as `KeyboardInterrupt`, is raised
      at once.
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
        >>> next(results)
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'two'

        Parameters
        ----------
        task_func : Callable[[T], R]
            The function to run; it is called with one task. Worker processes are sent
            it, the tasks and the results: all must be picklable, on most backends by
            cloudpickle, which takes lambdas and functions of ``__main__``, too.
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
                completed, the run ends with an error. The start of the workers and
                their imports count, too. Default: wait for ever. Ignored with one
                worker.
            batch_size : int or "auto", default "auto"
                Tasks sent to a worker at once. "auto" starts with 1 and grows for as
                long as a batch is out and read within 0.2 seconds, up to 8192.
            pre_dispatch : int or str, default "2 * n_jobs"
                How far to work ahead: tasks drawn at first, and the most batches that
                are out later; a number, a formula, or "all", which lifts the bound.
            initializer, initargs : callable and tuple, optional
                Called in each worker process of "loky" or "multiprocessing" as it
                starts.
            prefer, require, verbose, temp_folder, max_nbytes, mmap_mode
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
        TimeoutError
            From the generator, after *timeout*; also a `multiprocessing.TimeoutError`.
        concurrent.futures.BrokenExecutor
            From the generator, if a worker process of loky or `multiprocessing` dies.
            Of Dask, it is a ``KilledWorker``; of Ray, a ``RayActorError``.
        Exception
            From the generator: what *tasks* raised, as it is; or what a task raised,
            with the text of the worker's traceback as its cause. If it cannot be
            pickled, it is put together again without its ``__init__``, or else is a
            `RuntimeError` that shows it, as a `StopIteration` always is.
        """
        source = _Source(task_func, _checked_tasks(task_func, tasks))
        return _results(_Run(num_workers, kwargs), source)

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Do nothing: joblib needs no shutdown. May be called at any time, or never.

        loky's worker processes stay for the next run, and leave when idle for 300
        seconds.

        >>> Joblib.shutdown()
        """


@overload
def get_backend(backend_name: Literal["single_process"]) -> SingleProcess: ...
@overload
def get_backend(backend_name: Literal["joblib"]) -> Joblib: ...
@overload
def get_backend(backend_name: str) -> DistributedBackend: ...
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


def _checked_tasks(task_func: Callable[[T], R], tasks: Iterable[T]) -> Iterator[T]:
    """Return an iterator over *tasks*, of which nothing has been drawn."""
    if not callable(task_func):
        raise TypeError(f"task_func must be callable, got {task_func!r}")
    try:
        return iter(tasks)
    except TypeError as error:
        raise TypeError(f"tasks must be iterable, got {tasks!r}") from error


def _checked_num_workers(num_workers: int | None) -> int:
    if num_workers is None:
        configured = joblib.parallel.get_active_backend()[1]
        return -1 if configured is None else configured
    try:
        count = operator.index(num_workers)
    except TypeError:
        message = f"num_workers must be an integer or None, got {num_workers!r}"
        raise TypeError(message) from None
    if count == 0:
        raise ValueError(
            "num_workers must not be 0: use -1 for all cores, or 1, 2, ..."
        )
    return count


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, numbers.Real) and operator.ge(value, least)


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
        "'generator_unordered' or 'generator'",
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


def _check_formula(formula: str, n_jobs: int) -> None:
    """Raise an error if joblib can make no number of batches of *formula*."""
    workers = n_jobs if n_jobs > 1 else 64  # stands for a number that is not known yet
    try:
        value = joblib.parallel.eval_expr(formula.replace("n_jobs", str(workers)))
        batches = int(value)
    except (ArithmeticError, TypeError, ValueError) as error:
        message = f"pre_dispatch must be 'all', a number or a formula, got {formula!r}"
        raise ValueError(message) from error
    if batches < 1:
        raise ValueError(f"pre_dispatch must come to 1 or more, got {formula!r}")


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
    if "n_jobs" in options:
        raise TypeError(
            f"n_jobs={options['n_jobs']!r} is not an option: use num_workers"
        )
    kind: Any = type(backend)
    known, for_constructor = _option_names(kind, _mixin_for(backend))
    for name, value in options.items():
        if name in for_constructor:
            raise TypeError(
                f"{name}={value!r} is not an option of setup: put it into "
                f"joblib.parallel_config(backend=..., {name}=...) around the call"
            )
        if name not in known:
            expected = ", ".join(map(repr, sorted(known)))
            raise TypeError(
                f"unknown option {name}={value!r}: expected one of {expected}"
            )
        expected, is_valid = _CHECKS.get(name, ("", lambda value: True))
        if not is_valid(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    formula = options.get("pre_dispatch", "all")
    if isinstance(formula, str) and formula != "all":
        _check_formula(formula, n_jobs)
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


def _batch_runner(*, packs_errors: bool) -> Callable[..., tuple[list[Any], Any]]:
    """Return the function that runs a batch in a worker.

    It travels by value, so it refers to nothing of this module and imports what it
    needs.
    """

    def run_batch(task_func: Any, *tasks: Any) -> tuple[list[Any], Any]:
        """Return the results, and the error of the task that ended it, if any."""
        results: list[Any] = []
        try:
            for task in tasks:
                results.append(task_func(task))
        except Exception as error:
            return results, pack(error) if packs_errors else error
        return results, None

    def pack(error: Exception) -> tuple[bytes | None, str, str]:
        """Return *error* pickled in a form that survives, a summary, a traceback."""
        import builtins
        import contextlib
        import pickle
        import traceback

        # Where it ships no types, or has stubs:
        import joblib  # type: ignore[import-untyped, unused-ignore]

        def dump_by_value(value: Any) -> Any:
            wrapper = joblib.wrap_non_picklable_objects(value, keep_wrapper=False)
            return wrapper.__reduce__()[1][0]

        def show(lines: Any, *more: Any) -> str:
            try:
                return "".join(lines(kind, error, *more)).strip()
            except Exception:  # as its own methods may fail
                return f"{kind.__module__}.{kind.__qualname__}, which cannot be shown"

        kind: Any = type(error)
        summary = show(traceback.format_exception_only)
        text = show(traceback.format_exception, error.__traceback__)
        # Many a class cannot be called with the `args` that it has passed to its base,
        # as pickle would. What the built-in class underneath knows is sent instead,
        # then.
        bases = [base for base in kind.__mro__ if base in vars(builtins).values()]
        builtin: Any = bases[0]
        for form in (error, (builtin, *builtin.__reduce__(error))):
            # By value, a class may arrive as another one of the same name.
            for dump in (pickle.dumps, dump_by_value):
                with contextlib.suppress(Exception):
                    data = dump(form)
                    copy = pickle.loads(data)
                    if form is not error or repr(copy.args) == repr(error.args):
                        return data, summary, text
        return None, summary, text

    return run_batch


def _unpacked_error(data: bytes | None, summary: str, text: str) -> BaseException:
    """Return an error that a worker has packed, with the text of its traceback."""
    error: BaseException
    try:
        form = pickle.loads(data or b"")  # no data: it fails
        error = form if isinstance(form, BaseException) else _rebuilt_error(*form)
    except Exception:
        message = f"a task raised an exception that cannot be pickled: {summary}"
        error = RuntimeError(message)
    # As `raise ... from` would, though the class may refuse an assignment.
    set_cause: Any = BaseException.__cause__
    set_cause.__set__(error, _WorkerTraceback(f'\n"""\n{text}\n"""'))
    return error


def _rebuilt_error(builtin: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """Make an error of class *kind* by the methods of its built-in base class alone."""
    error = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    for name, value in (state or {}).items():
        object.__setattr__(error, name, value)  # also if the class is frozen
    return error


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


_RUN_BATCH = _SentByValue(_batch_runner(packs_errors=True))
_RUN_BATCH_IN_THREAD = _batch_runner(packs_errors=False)


# --------------------------------------------------------------------------------------
# Running tasks.
#
# The consumer is whoever reads the generator that `setup` returns. An engine is what
# runs the batches of a joblib backend: loky, a multiprocessing.Pool, threads, Dask or
# Ray.
#
#   the consumer's thread                            threads of the   worker processes
#                                                    engine           or threads
#   +----------------------------------------+
#   | for result in results:                 |
#   |                                        |
#   | _results()  --- hands out the results  |
#   |    |                                   |
#   |    | next_batch()     +--------------+ |  report   +-----------+ results
#   |    +<-----------------|   _Inbox     |<------------|           |<---------+
#   |    |                  +--------------+ |           |           |          |
#   |    | advance()                         |           | loky's,   |   run_batch(
#   |    v                                   |           | a Pool's, |     task_func,
#   | joblib.Parallel <--- _Source (tasks)   |           | Dask's    |     *tasks)
#   |    |                                   |           |           |          ^
#   |    v submit()                          |           |           |          |
#   | _ConsumerDriven (a joblib backend) ----|---------->|           |----------+
#   +----------------------------------------+  a batch  +-----------+ tasks
#
#   a thread that ends a run: _Run.end() -> clean_up() of the backend
#   loky only, a thread that hands over what had to wait: _LokyPool.feed()
#
# joblib draws tasks, puts them into a batch and submits it to its backend, together
# with a callback. The backend (_ConsumerDriven) makes one call of the batch,
# `run_batch`, and hands it to the engine together with a callback of its own: all that
# this one does, in a thread of the engine, is to put what has become of the batch into
# the _Inbox. The consumer, when asked for the next result, takes it out and hands the
# results on. Only when they are all out it runs joblib's callback, in which lies the
# whole of joblib's scheduling: it draws, batches and submits the next tasks.
#
# So joblib stays the scheduler, but everything that it does is done in the consumer's
# thread, one step at a time; that makes runs lazy (nothing happens before the first
# next()), bounded (a batch is drawn only when the results of another are out, so there
# are never more than joblib drew at first, and what it draws at once, one a worker, on
# top), composable and lossless. However a run is left, what it has started is ended in
# a thread of its own (_Run.end).
#
# Of joblib this uses what backends of third parties are written against:
# joblib.parallel with its tables of backends and eval_expr, the methods and attributes
# of backends, and BatchedCalls.items. Besides: of its Dask backend the futures it waits
# for and the data it has scattered; what wrap_non_picklable_objects reduces to; of its
# vendored loky the names of its threads and processes, ShutdownExecutorError,
# get_reusable_executor and the class Popen; that its pool makes the pipe of the tasks
# first; and the name of one exit handler (_keep_folders_of_parent). All of it is the
# same from 1.5.0 to 1.6.0.


class _TaskTimeoutError(TimeoutError, multiprocessing.TimeoutError):
    """No task completed in time. joblib's users catch the one, others the other."""


class _WorkerTraceback(Exception):
    """The text of the traceback of an error of a task, as the cause of that error."""


class _OneWorker(Exception):
    """Raised by a backend that would have one worker: this process can do its work."""


class _RunEnded(BaseException):
    """Thrown into joblib's generator to end it without the warning of close()."""


class _Failure:
    """An error in place of the outcome of a batch; raised when its turn comes."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


# Of tasks that take no time, joblib would send 100,000 and more at once. So many gain
# nothing, but all that are out have to be kept in memory.
_LARGEST_BATCH = 8192

# Seconds after which a wait looks whether there is still something to wait for. It is
# also how long a Ctrl-C may have to wait on Windows, where it interrupts no lock.
_WAIT_SLICE = 0.5


def _one_by_one(
    task_func: Callable[[T], R], tasks: Iterator[T]
) -> Generator[R, None, None]:
    """Yield results like `map`, but a StopIteration of *task_func* is an error."""
    for task in tasks:
        yield task_func(task)


class _Source:
    """The function and the tasks of a run; for the consumer's thread.

    It draws tasks for joblib and keeps their error, so that no result is lost with it.
    Only the run's generator refers to it: what joblib or an engine keeps while workers
    are busy does not. Otherwise a run that its own tasks refer to would never be
    collected.
    """

    def __init__(self, task_func: Callable[[Any], Any], tasks: Iterator[Any]) -> None:
        self.task_func = task_func
        self.tasks = tasks
        self.error: BaseException | None = None
        self.is_exhausted = False

    def draw(self, run: _Run) -> Generator[Iterator[Any], None, None]:
        """Yield the tasks, as many at a time as joblib takes: one by one costs thrice.

        Keep their error, for which joblib would drop the tasks drawn just before it. It
        would take a GeneratorExit for that of its own generator.
        """
        while not self.is_exhausted:
            count = run.draw_count()
            drawn: deque[Any] = deque()
            try:
                drawn.extend(itertools.islice(self.tasks, count))
            except (Exception, GeneratorExit) as error:
                self.error = error
            self.is_exhausted = len(drawn) < count
            # joblib keeps this for long, but none of the tasks that it has taken.
            yield map(deque.popleft, itertools.repeat(drawn, len(drawn)))


def _results(run: _Run, source: _Source) -> Generator[Any, None, None]:
    """Yield the results of a run: what `Joblib.setup` returns."""
    tasks = source.draw(run)
    # Also if an interrupt keeps this from reaching its end.
    end = weakref.finalize(tasks, run.end)
    end.atexit = False  # _end_open_runs does that
    try:
        if not run.start(source, tasks):
            yield from run.one_by_one(source)
            return
        error: BaseException | None = None
        callback: Any = None
        with run.backend.waiting():
            while run.inbox.expected:
                callback, results, error = run.next_batch()
                while results:
                    yield results.pop()  # hold on to none that has been handed out
                if error is not None:
                    break
                # Not before: tasks may be slow to draw, or depend on those results.
                run.advance(callback)
        if error is not None:
            try:
                raise error  # not inside `with`, which assigns to attributes of errors
            finally:
                del error, callback  # as its traceback refers to this frame
        if source.error is not None:
            raise source.error
        if not source.is_exhausted:
            # Nothing was drawn at first, with as few workers as there turned out to be.
            raise ValueError(f"pre_dispatch={run.parallel.pre_dispatch!r} comes to 0")
    finally:
        source.error = None  # its traceback refers to this frame
        end()
        tasks.close()  # lets go of the tasks


class _Inbox:
    """What is known of the batches of a run that are out.

    Threads of an engine only put reports into it, which cannot block or fail; so all
    that follows from a report happens in the consumer's thread, which alone calls the
    methods (but for `fail`).
    """

    def __init__(self, *, ordered: bool) -> None:
        self.ordered = ordered
        self.expected: dict[int, Callable[[Any], None]] = {}  # joblib's callbacks
        self.numbers = itertools.count()
        self.next_number = 0  # of the batch whose turn it is, if ordered
        self.early: dict[int, Any] = {}  # outcomes of batches whose turn it is not
        self.reports: queue.SimpleQueue[tuple[int | None, Any]] = queue.SimpleQueue()

    def expect(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return the callback to give to the engine, in place of joblib's."""
        number, put = next(self.numbers), self.reports.put
        self.expected[number] = callback
        return lambda outcome: put((number, outcome))  # refers to no more: see _Source

    def fail(self, error: BaseException) -> None:
        """Report an error of no batch that is known. Any thread may do so."""
        self.reports.put((None, _Failure(error)))

    def take(
        self, timeout: float | None, fault: Callable[[], Exception | None]
    ) -> tuple[Callable[[Any], None], Any]:
        """Return joblib's callback for the next batch to complete, and its outcome."""
        while self.next_number not in self.early:
            number, outcome = self._wait(timeout, fault)
            if number is None:  # a failure, after which there are no more callbacks
                return lambda outcome: None, outcome
            if not self.ordered:
                return self.expected.pop(number), outcome
            self.early[number] = outcome
        number = self.next_number
        self.next_number += 1
        return self.expected.pop(number), self.early.pop(number)

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
                    message = f"no task has completed within the timeout of {timeout!r}"
                    raise _TaskTimeoutError(f"{message} seconds") from None
            if error is not None and fault() is not None:
                return None, _Failure(error)  # the last reports had time to arrive
            error = fault()


class _Run:
    """One call of `Joblib.setup`, but for its function and its tasks (see _Source).

    It steps joblib through the run, and sees to it that the run is ended, once, however
    it is left. Any thread may call `end`, which has `clean_up` called in a thread of
    its own; all other methods are for the consumer's thread.
    """

    def __init__(self, num_workers: int | None, options: dict[str, Any]) -> None:
        n_jobs = _checked_num_workers(num_workers)
        options = dict(options)
        backend = _chosen_backend(options)
        _check_options(options, backend, n_jobs)
        self.inbox = _Inbox(ordered=options.pop("return_as", None) == "generator")
        self.timeout: float | None = options.pop("timeout", None)
        self.backend = _consumer_driven(backend, self.inbox)
        self.parallel = joblib.Parallel(
            n_jobs=n_jobs,
            backend=self.backend,
            return_as="generator_unordered",
            **options,
        )
        # joblib's generator. Until the run has ended, weakref.finalize (in _results)
        # and _open_runs keep it from the garbage collector, which would make it warn.
        self.output: Any = None
        self.results: list[Any] = []  # received, and not yet handed out; reversed
        self.reader = threading.current_thread()  # who has last read it
        self.is_at_work = False  # inside of joblib or the engine
        self.end_once = threading.Lock()  # once locked, never unlocked
        self.ended = threading.Event()  # set if there is nothing to end
        self.ended.set()

    def start(self, source: _Source, tasks: Generator[Any, None, None]) -> bool:
        """Let joblib draw and submit the first tasks, if there are workers for them."""
        self.backend.source = weakref.ref(source)
        self.backend.process = os.getpid()
        with self.submitting():
            self.ended.clear()
            _open_runs.add(self)
            _end_open_runs_at_exit()
            # joblib keeps this iterator, which must not refer to the tasks.
            drawn = map(next, itertools.repeat(weakref.proxy(tasks)))
            try:
                self.output = self.parallel(itertools.chain.from_iterable(drawn))
            except _OneWorker:
                _open_runs.discard(self)
                self.ended.set()
                return False
        return True

    def draw_count(self) -> int:
        """Return how many tasks joblib will certainly draw at once."""
        if self.output is None and self.parallel.pre_dispatch != "all":
            return 1  # as the run starts, pre_dispatch may be less than a batch
        size = self.parallel.batch_size
        size = self.backend.effective_batch_size if size == "auto" else size
        return int(self.backend.workers * size)

    def one_by_one(self, source: _Source) -> Iterator[Any]:
        """Return the results as one worker makes them."""
        verbose = self.parallel.verbose
        if not verbose:
            return _one_by_one(source.task_func, source.tasks)
        # joblib does the same, and prints how far it is.
        run = joblib.Parallel(
            backend="sequential", return_as="generator", verbose=verbose
        )
        call = joblib.delayed(source.task_func)
        results: Iterator[Any] = run(call(task) for task in source.tasks)
        return results

    def next_batch(
        self,
    ) -> tuple[Callable[[Any], None], list[Any], BaseException | None]:
        """Wait for a batch. Return joblib's callback, results (reversed), an error."""
        with self.at_work():
            callback, outcome = self.inbox.take(self.timeout, self.backend.fault)
            try:
                results, error = self.backend.results_of(outcome)
            except BaseException as fault:
                # Its traceback refers to frames, which must not refer to what refers to
                # it: only the garbage collector would free such a circle.
                del callback, outcome
                raise fault.with_traceback(None) from fault.__cause__
        if isinstance(error, tuple):
            error = _unpacked_error(*error)
        results.reverse()
        self.results = results
        return callback, results, error

    def advance(self, callback: Callable[[Any], None]) -> None:
        """Let joblib act on the completion of a batch."""
        with self.submitting():
            callback(None)
            next(self.output, None)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Surround what the consumer's thread does with joblib and the engine."""
        if self.backend.process != os.getpid():
            raise RuntimeError(
                "a run cannot be read in a fork of the process it is from"
            )
        self.reader, self.is_at_work = threading.current_thread(), True
        try:
            yield
        finally:
            self.is_at_work = False

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Surround what may leave something with the engine that no report tells of."""
        with self.at_work():
            try:
                yield
            except BaseException:
                self.backend.was_interrupted = True
                raise

    def end(self) -> None:
        """End the run, and wait for that if it is this thread's. May be repeated.

        It is done in another thread, where no signal handler interrupts it, and which
        can wait for whatever this one may hold: the garbage collector may call this
        anywhere, even in the middle of another run's submission.
        """
        if self.ended.is_set() or self.backend.process != os.getpid():
            return
        if self.end_once.acquire(blocking=False):
            _call_in_thread(self.clean_up)
        me = threading.current_thread()
        is_busy = any(run.is_at_work and run.reader is me for run in list(_open_runs))
        if self.reader is me and not is_busy:
            self.ended.wait(timeout=10)

    def clean_up(self) -> None:
        """Close joblib's generator, stop the workers."""
        try:
            if self.output is not None:
                # A ValueError: a daemon thread reads it, as the interpreter exits.
                with contextlib.suppress(_RunEnded, ValueError):
                    self.output.throw(_RunEnded())
        finally:
            try:
                self.backend.clean_up()
            finally:
                _open_runs.discard(self)
                self.ended.set()


# --------------------------------------------------------------------------------------
# Ending runs.
#
# However a run ends (`finally` of _results, the finalizer of its tasks, or a hook at
# exit), _Run.end is called. In a thread of its own that calls _Run.clean_up, which
# closes joblib's generator and then calls clean_up of the backend: `abort` drops what
# is queued and stops the workers that are busy, `finish` releases what the run has
# used.
#
# A run stands in _open_runs from its start until all that it has started has ended.
# When the interpreter exits, runs that nobody will read to the end are ended: those
# that were last read in the main thread, in one that has ended, or in a daemon thread.
# There are two hooks, since loky waits for running tasks in a hook of `threading`,
# which comes before those of `atexit`.

_open_runs: set[_Run] = set()


def _call_in_thread(function: Callable[[], object]) -> threading.Thread | None:
    """Start *function* in a thread; call it here if no thread can be started."""
    thread = threading.Thread(target=function, daemon=True)
    try:
        if not sys.is_finalizing():
            thread.start()
            return thread
    except RuntimeError:  # a limit is reached, or the interpreter exits
        pass
    function()
    return None


def _end_open_runs() -> None:
    """End the runs that nobody will read to the end, as the interpreter exits."""
    for run in list(_open_runs):
        reader = run.reader
        if run.backend.process != os.getpid():
            continue  # it is that of a parent of this fork
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


@functools.cache
def _end_open_runs_at_exit() -> None:
    """See to it, once, that open runs are ended at exit."""
    atexit.register(_end_open_runs)


@functools.cache
def _end_open_runs_before_loky() -> None:
    """See to it, once, that open runs are ended before loky waits for running tasks.

    The last hook of `threading` to be registered is the first to run; so this is for
    when loky has registered its own.
    """
    _register_before_exit(_end_open_runs)


def _register_before_exit(function: Callable[[], object]) -> None:
    # Private, but loky and concurrent.futures stand and fall with it. Without it, to
    # leave the interpreter with a run open takes as long as the tasks that are running.
    getattr(threading, "_register_atexit", atexit.register)(function)


def _disown_runs_of_parent() -> None:
    """In a fork: let its exit not touch what the parent's runs have."""
    global _loky_pool
    _loky_pool = _LokyPool()  # the parent's may be locked by a thread that is not here
    for run in _open_runs:
        run.results.clear()  # which are to be read there
    if _open_runs or _loky_process is not None:
        # Private, but multiprocessing (to Python 3.14 at least) does so only in forks
        # of its own: others would stop its worker processes, or fail to wait for them.
        getattr(multiprocessing.process, "_children", set()).clear()
        with contextlib.suppress(RuntimeError):  # the interpreter exits already
            _register_before_exit(_keep_folders_of_parent)


def _keep_folders_of_parent() -> None:
    """Let a fork not delete the folders of memory-mapped arrays, as joblib would."""
    name = "register_folder_finalizer.<locals>._cleanup"
    for item in gc.get_objects():
        if type(item) is types.FunctionType and item.__qualname__.endswith(name):
            folder = inspect.getclosurevars(item).nonlocals["pool_subfolder"]
            if f"_{os.getpid()}_" not in folder:
                atexit.unregister(item)


# --------------------------------------------------------------------------------------
# joblib's backends, made consumer-driven.


# What pools of processes take besides what the signatures of joblib's backends tell of.
_POOL_OPTIONS = frozenset(
    ("initializer", "initargs", "forward_reducers", "backward_reducers", "prewarm")
)


# To a type checker the base could be anything: hence the "ignore".
class _ConsumerDriven(joblib.parallel.ParallelBackendBase):  # type: ignore[misc]
    """Mixed into the class of a joblib backend: lets the consumer act on its reports.

    By itself such a backend lets joblib draw and submit tasks in threads of the engine;
    all that is promised of order, bounds and the caller's thread hangs on this class.

    joblib calls, in the consumer's thread, `configure`, `submit`, `compute_batch_size`,
    `batch_completed`, `retrieve_result_callback` and `retrieval_context`; in the thread
    that ends the run, `abort_everything` and `terminate`. Of the others, `clean_up`,
    `abort` and `finish` are for the latter, the rest for the consumer's thread.
    """

    supports_return_generator = True  # some do not, since their callbacks would block
    more_options: frozenset[str] = frozenset()  # that no signature tells of
    inbox: _Inbox
    source: Callable[[], _Source]  # a weak reference
    process: int  # whose workers are to be stopped, not those of a fork of it
    was_interrupted = False  # while the engine was given something to do
    workers: int  # as joblib is told
    effective_batch_size = 1
    wanted_batch_size: int = 1  # by joblib's own reckoning
    last_duration: float = math.inf

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        try:
            workers = super().configure(n_jobs=n_jobs, parallel=parallel, **options)
        except joblib.parallel.FallbackToBackend:
            workers = 1
        if workers == 1:
            raise _OneWorker
        self.workers = int(workers)
        return self.workers

    def submit(self, func: Any, callback: Any = None) -> Any:
        report = self.inbox.expect(callback)
        # One call a batch: joblib does not look at the items again, and a call a task
        # takes several times longer to draw, to send and to unpickle.
        in_thread = getattr(self, "supports_sharedmem", False)
        run_batch = _RUN_BATCH_IN_THREAD if in_thread else _RUN_BATCH
        func.items = [(run_batch, (self.source().task_func, *func.items), {})]
        try:
            return self.submit_to_engine(func, report)
        except Exception as error:
            # To be raised after the results that came before it.
            report(_Failure(error))
            return None

    def submit_to_engine(self, batch: Any, report: Callable[[Any], None]) -> Any:
        """Give a batch to the engine, which calls *report* when it has completed."""
        return super().submit(batch, callback=report)

    def results_of(self, outcome: Any) -> tuple[list[Any], Any]:
        """Return what run_batch returned for a batch, or raise the engine's error."""
        if isinstance(outcome, _Failure):
            raise outcome.error
        ((results, error),) = super().retrieve_result_callback(outcome)
        return results, error

    def fault(self) -> Exception | None:
        """Return an error if the engine has died, and will report nothing more."""
        return None

    def retrieve_result_callback(self, out: Any) -> list[None]:
        # joblib asks for the results in its callback, when they have been handed out.
        # It gets one item a batch, so that its generator advances by one step a batch.
        return [None]

    def compute_batch_size(self) -> int:
        before = self.wanted_batch_size
        size = self.wanted_batch_size = super().compute_batch_size()
        if size > before and self.last_duration < 0.01:
            # joblib doubles the size at each step. If a batch takes next to no time, it
            # is told how long one of the new size would take, and takes the next step,
            # too.
            super().batch_completed(size, self.last_duration * size / before)
            self.wanted_batch_size = super().compute_batch_size()
        self.effective_batch_size = min(self.wanted_batch_size, _LARGEST_BATCH)
        return self.effective_batch_size

    def batch_completed(self, batch_size: int, duration: float) -> None:
        if batch_size == _LARGEST_BATCH < self.wanted_batch_size:
            # joblib wants to know of a batch of the size that it has asked for.
            duration *= self.wanted_batch_size / batch_size
            batch_size = self.wanted_batch_size
        self.last_duration = duration
        super().batch_completed(batch_size, duration)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        pass  # joblib's generator is closed in any thread: clean_up() does it

    def terminate(self) -> None:
        pass  # likewise

    def clean_up(self) -> None:
        """Drop what is queued, stop the workers: in the thread that ends the run."""
        self.abort()
        self.finish()

    def abort(self) -> None:
        super().abort_everything(ensure_ready=False)

    def finish(self) -> None:
        super().terminate()

    def separate_from(self, original: Any) -> None:
        """Give up what must not be shared with *original*, of which this is a copy."""
        if hasattr(self, "reset_batch_stats"):
            self.reset_batch_stats()  # those of another run

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return what is to surround the run.

        In a task on Dask, it frees the place of that task meanwhile. Otherwise nested
        runs could fill the cluster and wait for ever.
        """
        context: contextlib.AbstractContextManager[None] = super().retrieval_context()
        return context

    def retrieval_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # joblib would enter it with the first results


# ---- loky ----------------------------------------------------------------------------


class _PoolSettings(NamedTuple):
    """What a run asks of loky's pool. If there is such a pool, it stands for that."""

    n_jobs: int
    capacity: int  # the most batches that loky may have
    options: dict[str, Any]
    inner_max_num_threads: int | None
    backend_kwargs: dict[str, Any]
    gone: threading.Event  # set if a worker has died, or somebody shut the pool down


class _LokyPool:
    """loky's one pool of workers, as the runs of this process share it.

    It keeps runs independent: joblib resizes or replaces the pool for each run that
    starts, and kills it for each that is left. Here a pool in which another run has
    work is left as it is.

    And it lets any run be left at any time. loky has a manager thread, which moves what
    is submitted into a queue, from which the workers take it; the future is then
    "running". If the pool is killed while more has been submitted than that queue
    holds, the manager thread dies of a KeyError, and nothing completes any more (joblib
    1.5.0 to 1.6.0). So loky never gets more: the rest waits here, in the backlog.

    Any thread may call the methods, with the lock held. Two are called without it:
    `feed`, in a thread of its own, takes it; `note_completion`, in loky's manager
    thread, must not, since whoever kills the pool holds it and waits for that thread to
    end.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings: _PoolSettings | None = None  # those of the pool that there is
        self.runs: set[_ConsumerDrivenLoky] = set()  # those that have not been ended
        self.out: dict[Future[Any], _ConsumerDrivenLoky] = {}  # what loky has
        self.backlog: deque[tuple[_ConsumerDrivenLoky, Any, Any]] = deque()
        self.feeder: threading.Thread | None = None
        self.completions: queue.SimpleQueue[None] = queue.SimpleQueue()

    def unfinished(self) -> dict[Future[Any], _ConsumerDrivenLoky]:
        """Return what loky has and has not completed, with the run that it is of."""
        self.out = {job: run for job, run in self.out.items() if not job.done()}
        return self.out

    def busy_runs(self) -> set[_ConsumerDrivenLoky]:
        """Return the runs that wait for results, which ended runs do not."""
        return self.runs & {
            *self.unfinished().values(),
            *(item[0] for item in self.backlog),
        }

    def configure_for(self, run: _ConsumerDrivenLoky) -> None:
        """Make the pool what *run* asks for, or let it share that of a busy run."""
        if self.settings is not None and self.settings.gone.is_set():
            self.settings = None
        others = self.busy_runs() - {run}
        if others:
            run.settings = self.settings or next(iter(others)).settings
        # loky would wait for the end of what ended runs have left before it changes the
        # pool, and joblib does not change the folder of a pool.
        elif self.settings is not None and (
            self.unfinished()
            or self.settings.options.get("temp_folder")
            != run.settings.options.get("temp_folder")
        ):
            self.kill(run)
        if self.settings is None:
            # An object of its own for each pool.
            run.settings = run.settings._replace(gone=threading.Event())
        run.use_pool(run.settings)
        self.settings = run.settings

    def enqueue(
        self, run: _ConsumerDrivenLoky, batch: Any, report: Callable[[Any], None]
    ) -> None:
        """Submit a batch to loky, or keep it until there is room for it."""
        self.backlog.append((run, batch, report))
        self.submit_backlog()
        if self.backlog and self.feeder is None:
            feeder = threading.Thread(target=self.feed, daemon=True)
            with contextlib.suppress(RuntimeError):  # without it, the consumer does it
                feeder.start()
                self.feeder = feeder

    def submit_backlog(self) -> None:
        """Give loky as many batches as its queue holds."""
        while self.backlog:
            if self.settings and len(self.unfinished()) >= self.settings.capacity:
                return
            run, batch, report = self.backlog.popleft()
            if not run.lost_work:
                run.submit_to_loky(batch, report)

    def feed(self) -> None:
        """Empty the backlog as batches complete, however slow the consumer is."""
        while True:
            with self.lock:
                self.submit_backlog()
                if not self.backlog:
                    self.feeder = None
                    return
            self.completions.get()

    def note_completion(
        self, run: _ConsumerDrivenLoky, settings: _PoolSettings, job: Future[Any]
    ) -> None:
        """Take note, in loky's manager thread, that a batch of *run* has completed."""
        if not job.cancelled() and isinstance(job.exception(), BrokenExecutor):
            run.lost_work = True
            settings.gone.set()
        if self.feeder is not None:
            self.completions.put(None)

    def remove(self, run: _ConsumerDrivenLoky) -> None:
        """Drop what *run* has queued. Kill a pool that is busy for ended runs alone."""
        self.runs.discard(run)
        self.backlog = deque(item for item in self.backlog if item[0] is not run)
        if self.feeder is not None:
            self.completions.put(None)
        if run.has_pool and run.settings.gone.is_set():
            run.kill_pool()  # the run's own, to which another may have succeeded
        unwanted = set(self.unfinished().values()) - self.runs
        if (unwanted or run.was_interrupted) and not self.busy_runs():
            self.kill(run)

    def kill(self, run: _ConsumerDrivenLoky) -> None:
        """Kill the pool, by the hand of *run*."""
        settings = self.settings
        if settings is None or settings.gone.is_set():
            return
        if settings is not run.settings:
            run.use_pool(settings)  # it has been changed since
        if run.was_interrupted:
            # Just then, loky may have got a batch that is not in `out`. What is
            # submitted now arrives after it.
            with contextlib.suppress(Exception):
                self.out[run.submit_probe()] = run

        # As said above: all that loky has must have arrived in its call queue. If it
        # does not, what somebody else has submitted comes first: the pool is left to
        # that.
        def has_arrived() -> bool:
            return all(job.running() or job.done() for job in self.unfinished())

        if not _wait_until(lambda: has_arrived() or not _is_loky_running(), seconds=10):
            for job in self.unfinished():
                job.cancel()
            return
        if _is_loky_running():
            run.kill_pool()
            self.out, self.settings = {}, None
        else:
            self.clear_up()

    def clear_up(self) -> None:
        """Do what loky's manager thread would do, if it has died or could not start."""
        for process in multiprocessing.active_children():
            if process.name.startswith("LokyProcess"):
                process.kill()
                process.join()
        _loky("reusable_executor").get_reusable_executor(reuse=True).shutdown(
            wait=False
        )
        self.out, self.settings = {}, None


_loky_pool = _LokyPool()
_loky_process: int | None = None  # that was using loky when it was last forked


def _loky(module: str) -> Any:
    return importlib.import_module(f"joblib.externals.loky.{module}")


def _is_loky_running() -> bool:
    """Tell whether there is a manager thread of loky, without which nothing completes.

    That of an executor that somebody else has made counts, too: it cannot be told
    apart.
    """
    return any(
        thread.name == "ExecutorManagerThread" for thread in threading.enumerate()
    )


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for what loky tells nobody of. Return whether it has come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _note_use_of_loky() -> None:
    """Take note, before a fork, whether it inherits a pool that has lost its thread."""
    global _loky_process
    if _is_loky_running():
        _loky_process = os.getpid()
    elif _loky_process == os.getpid():
        _loky_process = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_use_of_loky, after_in_child=_disown_runs_of_parent)


_NO_PGREP = "Failed to kill subprocesses on this platform"


def _let_loky_kill() -> None:
    """Let loky kill its workers where there is neither psutil nor pgrep, in silence.

    It warns there, which is an error to some programs, and calls a method that its
    class of processes lacks on POSIX (joblib 1.5.0 to 1.6.0). Its manager thread dies
    of that.
    """
    if os.name == "posix":
        popen = _loky("backend.popen_loky_posix").Popen
        if not hasattr(popen, "kill"):
            popen.kill = _kill
    # Anybody may have reset the filters since.
    if all(getattr(item[1], "pattern", None) != _NO_PGREP for item in warnings.filters):
        warnings.filterwarnings("ignore", _NO_PGREP)


def _kill(process: Any) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class _ConsumerDrivenLoky(_ConsumerDriven):
    """Shares loky's pool with the other runs of the process. See _LokyPool.

    It asks for nothing by itself: _LokyPool decides when it may configure the pool,
    submit to it or kill it, and calls the methods that do so.
    """

    more_options = _POOL_OPTIONS
    settings: _PoolSettings  # what this run wants of the pool, or has found
    has_pool = False
    lost_work = False  # when a worker of the pool died

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        workers = int(self.effective_n_jobs(n_jobs))
        if workers == 1:
            raise _OneWorker
        if _loky_process not in (None, os.getpid()):
            raise RuntimeError(
                "loky does not work in a fork of a process that has used it: start the "
                "process by 'spawn', or use backend='multiprocessing' or 'threading'"
            )
        self.parallel, self.workers = parallel, workers
        # loky's queue has room for two batches a core, however large the pool has
        # grown; and for as many as there are workers, since each takes one out.
        capacity = max(workers, 2 * min(workers, joblib.cpu_count()))
        self.settings = _PoolSettings(
            workers,
            capacity,
            options,
            self.inner_max_num_threads,
            self.backend_kwargs,
            gone=threading.Event(),
        )
        with _loky_pool.lock:
            _loky_pool.runs.add(self)
            _loky_pool.configure_for(self)
        return workers

    def use_pool(self, settings: _PoolSettings) -> None:
        self.inner_max_num_threads = settings.inner_max_num_threads
        self.backend_kwargs = settings.backend_kwargs
        super().configure(settings.n_jobs, self.parallel, **settings.options)
        self.has_pool = True

    def submit_to_engine(self, batch: Any, report: Callable[[Any], None]) -> None:
        with _loky_pool.lock:
            _loky_pool.enqueue(self, batch, report)
        _end_open_runs_before_loky()

    def submit_to_loky(self, batch: Any, report: Callable[[Any], None]) -> None:
        """Submit a batch to loky, in the consumer's thread or the feeder's."""

        def completed(job: Future[Any]) -> None:
            report(job)
            _loky_pool.note_completion(self, settings, job)

        _let_loky_kill()
        try:
            if self.settings is not _loky_pool.settings:
                _loky_pool.configure_for(self)  # another run has changed it since
            settings = self.settings
            try:
                job = super().submit_to_engine(batch, completed)
            except (BrokenExecutor, _loky("process_executor").ShutdownExecutorError):
                # A worker has died, or somebody else has shut the pool down.
                settings.gone.set()
                _loky_pool.configure_for(self)
                settings = self.settings
                job = super().submit_to_engine(batch, completed)
            _loky_pool.out[job] = self
        except Exception as error:
            if not _is_loky_running():
                _loky_pool.clear_up()
            report(_Failure(error))

    def results_of(self, outcome: Any) -> tuple[list[Any], Any]:
        with _loky_pool.lock:
            _loky_pool.submit_backlog()
        return super().results_of(outcome)

    def fault(self) -> Exception | None:
        with _loky_pool.lock:
            _loky_pool.submit_backlog()  # in case no thread could be started for that
        if _is_loky_running():
            return None
        return RuntimeError("loky has stopped working: its manager thread has died")

    def submit_probe(self) -> Any:
        """Return the future of a call that does nothing."""
        return super().submit_to_engine(os.getpid, lambda job: None)

    def kill_pool(self) -> None:
        _let_loky_kill()
        feeders = [t for t in threading.enumerate() if t.name == "QueueFeederThread"]
        super().abort()
        # Wait for the thread that has filled the pool's queue, as loky does not (joblib
        # 1.5.0 to 1.6.0): if the interpreter exits while it lets go of a semaphore,
        # that is reported as leaked. Other queues have such threads, too.
        if feeders:
            _wait_until(lambda: not all(t.is_alive() for t in feeders), seconds=2)

    def clean_up(self) -> None:
        if hasattr(self, "settings"):  # or else it was interrupted before
            with _loky_pool.lock:
                _loky_pool.remove(self)
                if self.has_pool:
                    self.finish()


# ---- multiprocessing -----------------------------------------------------------------


class _PoolContext:
    """A multiprocessing context that records what a pool makes with it.

    `multiprocessing.Pool` (of Python 3.10 to 3.14) does not report that a worker has
    died, and its result thread dies of a result that it cannot unpickle. When the pool
    terminates a worker that has one of its locks, or is in the middle of a message, or
    handles SIGTERM, it waits for ever. With what is recorded, the first two are found
    out and the last is broken off.

    The pool calls `Process`, `Lock` and `Pipe` as it is made, in the consumer's thread,
    and later `Process` and `receive` in its own; the consumer's thread calls
    `exit_codes`, the one that ends the run the rest.
    """

    def __init__(self, context: Any, inbox: _Inbox, *, replaces_workers: bool) -> None:
        self.context = context
        self.inbox = inbox
        self.replaces_workers = replaces_workers  # which end with 0, then
        self.processes: list[Any] = []
        self.locks: list[Any] = []
        self.pipes: list[tuple[Any, Any]] = []  # that of the tasks, that of the results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        process = self.context.Process(*args, **kwargs)
        self.processes = [*self.unexpected(self.processes), process]
        return process

    def Lock(self) -> Any:
        self.locks.append(self.context.Lock())
        return self.locks[-1]

    def Pipe(self, duplex: bool = True) -> Any:
        reader, writer = self.context.Pipe(duplex)
        self.pipes.append((reader, writer))
        if len(self.pipes) == 2:
            reader.recv = functools.partial(self.receive, reader.recv_bytes)
        return reader, writer

    def receive(self, recv_bytes: Callable[[], bytes]) -> Any:
        """Receive a result in the pool's result thread, which survives a bad one."""
        data = recv_bytes()
        try:
            return pickle.loads(data)
        except Exception as error:
            failure = pickle.UnpicklingError(f"a result cannot be unpickled: {error!r}")
            failure.__cause__ = error
            self.inbox.fail(failure)
            return None, None, None  # a result of no job that the pool knows of

    def unexpected(self, processes: list[Any]) -> list[Any]:
        """Return those that have not ended as replaced workers do."""
        return [p for p in processes if not (self.replaces_workers and p.exitcode == 0)]

    def exit_codes(self) -> list[int]:
        """Return those of workers that have ended, and should not have."""
        codes = [process.exitcode for process in self.unexpected(self.processes)]
        return [code for code in codes if code is not None]

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()

    def break_off(self) -> None:
        """Kill the workers, and free the pool's threads from waiting for them."""
        self.kill()
        for lock in self.locks:
            # A worker may have died with it, or just when it was woken to have it.
            lock.acquire(block=False)
            with contextlib.suppress(ValueError):  # it has been released meanwhile
                lock.release()
        for connection in (self.pipes[0][0], self.pipes[1][1]):
            with contextlib.suppress(OSError):
                connection.close()

    def close(self) -> None:
        """Kill the workers that are left; let go of what the pool was made of."""
        self.kill()
        for process in self.processes:
            if process.pid is not None:
                process.join(timeout=1)
        self.pipes.clear()


class _ConsumerDrivenPool(_ConsumerDriven):
    """Makes up for what `multiprocessing.Pool` does not notice. See _PoolContext."""

    more_options = _POOL_OPTIONS | {"maxtasksperchild"}
    context: _PoolContext | None = None

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        context = options.get("context") or multiprocessing.get_context()
        self.context = options["context"] = _PoolContext(
            context,
            self.inbox,
            replaces_workers=options.get("maxtasksperchild") is not None,
        )
        try:
            return super().configure(n_jobs, parallel, **options)
        except ChildProcessError as error:  # the server is a child of the parent
            raise RuntimeError(
                "multiprocessing's fork server does not work in a fork of a process "
                "that has used it: use backend='threading'"
            ) from error

    def fault(self) -> Exception | None:
        exit_codes = self.context.exit_codes() if self.context else []
        message = f"a worker process has died, with exit code {exit_codes}"
        return BrokenExecutor(message) if exit_codes else None

    def finish(self) -> None:
        context = self.context
        if context is None:
            return  # it was interrupted before there was a pool

        def terminate() -> None:
            # What it makes of the loss of its pipes is no matter.
            with contextlib.suppress(Exception):
                super(_ConsumerDrivenPool, self).finish()

        thread = _call_in_thread(terminate)
        if thread is not None:
            thread.join(timeout=0.5)
            deadline = time.monotonic() + 5
            while thread.is_alive() and time.monotonic() < deadline:
                context.break_off()
                thread.join(timeout=0.05)
        context.close()


# ---- Dask ----------------------------------------------------------------------------


class _ConsumerDrivenDask(_ConsumerDriven):
    """Reports what joblib's Dask backend (1.5.0 to 1.6.0) does not, and cancels tasks.

    Without it, a run waits for ever for a worker that is lost, or for what cannot be
    pickled (see _DaskClient), and what is queued goes on when a run has been left.
    """

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

    def submit_to_engine(self, batch: Any, report: Callable[[Any], None]) -> Any:
        def report_error(job: Future[Any]) -> None:
            error = job.exception()
            if error is not None:
                report(_Failure(error))

        job = super().submit_to_engine(batch, report)
        job.add_done_callback(report_error)  # if a worker is lost, joblib calls nothing
        return job

    def abort(self) -> None:
        futures = list(self.waiting_futures.futures)
        super().abort()
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


# ---- any of them ---------------------------------------------------------------------


def _is_registered(backend: Any, name: str) -> bool:
    """Tell whether *backend* is of the class that is registered by that name."""
    kind = joblib.parallel.BACKENDS.get(name)
    return isinstance(kind, type) and isinstance(backend, kind)


def _mixin_for(backend: Any) -> Any:
    if isinstance(backend, joblib.parallel.LokyBackend):
        return _ConsumerDrivenLoky
    if _is_registered(backend, "dask"):
        return _ConsumerDrivenDask
    is_pool = isinstance(backend, joblib.parallel.MultiprocessingBackend)
    if is_pool and not _is_registered(backend, "ray"):  # which is derived from it
        return _ConsumerDrivenPool
    return _ConsumerDriven


@functools.cache
def _subclass(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {})  # joblib shows the name


def _consumer_driven(backend: Any, inbox: _Inbox) -> Any:
    """Return a joblib backend like *backend*, which is left as it is, for one run."""
    is_sequential = isinstance(backend, joblib.parallel.SequentialBackend)
    if not (is_sequential or backend.supports_retrieve_callback):
        raise ValueError(
            f"backend must tell when a batch has completed, got {backend!r}"
        )
    kind: Any = type(backend)
    own = object.__new__(_subclass(_mixin_for(backend), kind))
    vars(own).update(vars(backend))
    own.inbox = inbox
    own.separate_from(backend)
    return own
