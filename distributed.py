"""Run a function over many tasks: one by one, on all cores, or on a cluster.

Copy this file into a package of yours. It needs Python 3.10 or newer, joblib 1.5 or newer and
nothing else.

An engine is picked by name. Whatever the engine, results come from a generator:

>>> engine = get_backend("single_process")
>>> for result in engine.setup(abs, [-1, -2, -3]):
...     print(result)
1
2
3

"single_process" (`SingleProcess`) runs the tasks one after another in this process. Take it to
debug, since breakpoints, `print` and profilers work as ever, and for work too small to share out.

"joblib" (`Joblib`) runs them on all cores; through joblib also in threads, or on a Dask or Ray
cluster. Take it for everything else. Results then come in the order in which they complete:

>>> engine = get_backend("joblib")
>>> sorted(engine.setup(abs, [-1, -2, -3]))
[1, 2, 3]

Both are lazy, take endless tasks, agree on errors and can be left at any time; what else may be
relied upon is said in `Joblib.setup`.

The file belongs inside a package because a top-level module called ``distributed`` hides the
package of that name in which Dask's scheduler lives.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import inspect
import itertools
import math
import multiprocessing
import multiprocessing.pool
import numbers
import operator
import os
import pickle
import queue
import re
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

# joblib ships no types; some users have its stubs installed.
import joblib  # type: ignore[import-untyped, unused-ignore]
import joblib.parallel  # type: ignore[import-untyped, unused-ignore]

__all__ = ["DistributedBackend", "Joblib", "SingleProcess", "get_backend"]
__version__ = "1.0.0"

T = TypeVar("T")
R = TypeVar("R")


class DistributedBackend(ABC):
    """Abstract base class of the engines: the interface that each of them implements.

    Each has a strategy of its own, from one process that runs tasks sequentially to many that run
    them in parallel. Both methods are static, so that a class serves as well as an instance. An
    engine of your own implements the two:

    >>> class Backwards(DistributedBackend):
    ...     @staticmethod
    ...     def setup(task_func, tasks, num_workers=None, **kwargs):
    ...         yield from map(task_func, reversed(list(tasks)))
    ...
    ...     @staticmethod
    ...     def shutdown(*args, **kwargs):
    ...         pass
    >>> list(Backwards.setup(abs, iter([-1, -2, -3])))
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
        """Run *task_func* on every one of *tasks*, in the way of the engine.

        Parameters
        ----------
        task_func : Callable[[T], R]
            The function to run; it is called with one task.
        tasks : Iterator[T]
            Yields the tasks.
        num_workers : int, optional
            Number of worker processes or threads. Default: the most that are available.
        **kwargs
            Options of the engine.

        Returns
        -------
        Generator[R, None, None]
            Yields the results as they complete.
        """

    @staticmethod
    @abstractmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Release what the engine keeps between runs."""


class SingleProcess(DistributedBackend):
    """Runs tasks one after another in this process.

    The simplest engine: for debugging, and for work that does not call for parallel execution.
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
            From the generator, if *task_func* raises `StopIteration`, which becomes its cause:
            out of a generator it would look like the end of the results.
        """
        return _one_by_one(task_func, _checked_call(task_func, tasks))

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Do nothing, since nothing is kept between runs; call it any number of times, or never.

        >>> SingleProcess.shutdown()
        """


class Joblib(DistributedBackend):
    """Runs tasks in several worker processes, through joblib's `Parallel` and `delayed`.

    For CPU-intensive work, which gains from true parallelism.
    """

    @staticmethod
    def setup(
        task_func: Callable[[T], R],
        tasks: Iterable[T],
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Generator[R, None, None]:
        """Run *task_func* on every one of *tasks*, in parallel.

        Nothing is drawn or started before the first result is asked for, and then only so much
        as keeps the workers busy. Two workers have four tasks out at first, however many there are:

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

        Closing the generator ends the run, as do ``break``, ``del`` and an error:

        >>> results.close()
        >>> list(results)
        []

        Results can be had in the order of the tasks, under the same bound:

        >>> list(Joblib.setup(abs, [-3, -1, -2], num_workers=2, return_as="generator"))
        [3, 1, 2]

        An error of a task is raised where its result would have been:

        >>> results = Joblib.setup(int, ["1", "two"], num_workers=2, return_as="generator")
        >>> next(results)
        1
        >>> next(results)
        Traceback (most recent call last):
        ValueError: invalid literal for int() with base 10: 'two'

        An error of *tasks* is raised when the results of all that it did yield are out:

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

        One run can feed another:

        >>> absolute = Joblib.setup(abs, [-1, -2, -3], num_workers=2)
        >>> sorted(Joblib.setup(str, absolute, num_workers=2))
        ['1', '2', '3']

        Parameters
        ----------
        task_func : Callable[[T], R]
            The function to run; it is called with one task. Worker processes are sent it, the
            tasks and the results: all must be picklable, on most backends by cloudpickle, which
            takes lambdas and functions of ``__main__``, too.
        tasks : Iterable[T]
            The tasks; an iterator, as the interface has it, or any other iterable.
        num_workers : int, optional
            Number of worker processes, or of threads. Default: -1, which means all available
            cores, unless an open `joblib.parallel_config` sets ``n_jobs``; -2 means all but one,
            and so on. With 1, tasks run in this process, one after another. Dask ignores it and
            uses the whole cluster.
        **kwargs
            Options. Those of `joblib.Parallel`, but for ``n_jobs``:

            backend : str or joblib.parallel.ParallelBackendBase, default "loky"
                "loky" (processes), "threading", "multiprocessing", "dask" (the cluster of the
                current `dask.distributed.Client`), "ray", another registered name, or an instance.
                The default is another if an open `joblib.parallel_config`, *prefer* or *require*
                says so.
            return_as : {"generator_unordered", "generator"}, default "generator_unordered"
                Whether results come as they complete or in the order of the tasks. In order, a
                task that takes long keeps workers idle once *pre_dispatch* batches are out.
            timeout : float, optional
                Seconds. When the consumer has waited for that long and no task has completed, the
                run ends with an error. Default: wait for ever. Ignored with one worker.
            batch_size : int or "auto", default "auto"
                Tasks sent to a worker at once. "auto" starts with 1 and grows for as long as a
                batch is out and read within 0.2 seconds, up to 8192.
            pre_dispatch : int or str, default "2 * n_jobs"
                Tasks drawn at first, and the most batches that are out later; a number, a formula,
                or "all", which lifts the bound.
            prefer, require, verbose, temp_folder, max_nbytes, mmap_mode
                As in joblib.

            Also those that ``configure`` of the joblib backend takes by name, such as loky's
            ``idle_worker_timeout`` (seconds, default 300). What its constructor takes goes into a
            ``joblib.parallel_config(backend=..., ...)`` around the call. One that is open when
            `setup` is called is honoured; neither it nor a backend passed in is changed.

        Returns
        -------
        Generator[R, None, None]
            Yields the results as they complete. Like any generator, it can be read by several
            threads, but only by one at a time.

        Raises
        ------
        TypeError, ValueError
            At once, if an argument is not as said here; the message names it and shows the value.

            >>> Joblib.setup(abs, [], backend="nope")  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ValueError: backend must be an instance or one of 'dask', ..., got 'nope'
            >>> Joblib.setup(abs, [], bacth_size=1)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            TypeError: unknown option bacth_size=1: expected one of 'backend', 'batch_size', ...

        ImportError
            At once, if *backend* is "dask" or "ray" and its package is missing or hidden.
        TimeoutError
            From the generator, after *timeout*; it is a `multiprocessing.TimeoutError`, too.
        RuntimeError
            From the generator, if *task_func* raises `StopIteration`, which becomes its cause.
        Exception
            From the generator: what *tasks* raised, as it is; or what a task raised, with its
            arguments, and with the text of the worker's traceback as its cause (unless there is
            one worker). If a worker dies, the error of the engine: of loky a
            `concurrent.futures.BrokenExecutor`, of Dask a ``KilledWorker``, of Ray a
            ``RayActorError``.

        Notes
        -----
        These hold on every joblib backend, but for what is said below.

        *The caller's thread.* *tasks* is advanced only inside ``next()``, in the thread that calls
        it. A database cursor, a context variable or another run can feed it.

        *Bounded.* At most *pre_dispatch* batches, and as many more as there are workers, have been
        drawn beyond the results handed out, however slow the consumer. With ``batch_size=1`` and a
        small *pre_dispatch* that is close enough for tasks that depend on earlier results.

        *Nothing is lost.* Whatever results were received before an error are handed out first.

        *Composable.* Runs can be chained, interleaved, overlapped and started inside a task.

        *Independent.* A run that fails, times out or is closed does not disturb another run.

        *Ends cleanly.* Leaving a run, in any way, drops what is queued, stops the workers that are
        busy with it, and prints and warns of nothing. So does leaving the interpreter with a run
        open.

        *No hang.* A worker process that dies is an error.

        *Self-contained.* Nothing of this module is sent to workers. They import it only if the
        module of *task_func* does.

        Not promised:

        - loky has one pool of workers for a process. While one run has work in it, another run that
          starts shares the pool as it is, with the number of workers and the memory-mapping
          options of the first. Of a run that is left then, queued tasks are dropped, but running
          ones go on until the other runs have ended; if they are stuck, only a *timeout* of the
          others ends the wait. A worker that dies, or something that cannot be unpickled, is an
          error in every run that has work in the pool.
        - Whoever else uses loky through `joblib.Parallel` shares the pool, too: its failure is an
          error here, and the other way round. When the main thread has ended, the pool takes no
          more tasks.
        - Threads cannot be stopped: what they are busy with goes on in the background. The same is
          true of Dask's workers, which are threads.
        - `multiprocessing.Pool` does not tell that a worker died, or that something could not be
          unpickled: only *timeout* ends the wait. An interrupt while it starts may leave workers.
        - Results of a batch arrive together: of a batch with a task that fails, there are none.
        - An error of *tasks* that is no `Exception`, such as `KeyboardInterrupt`, is raised at
          once.
        """
        run = _Run(task_func, _checked_call(task_func, tasks), num_workers, kwargs)
        return run.results()

    @staticmethod
    def shutdown(*args: Any, **kwargs: Any) -> None:
        """Do nothing, which joblib does not need; call it any number of times, or never.

        loky's worker processes stay for the next run, and leave when idle for 300 seconds.

        >>> Joblib.shutdown()
        """


@overload
def get_backend(backend_name: Literal["single_process"]) -> SingleProcess: ...
@overload
def get_backend(backend_name: Literal["joblib"]) -> Joblib: ...
@overload
def get_backend(backend_name: str) -> DistributedBackend: ...
def get_backend(backend_name: str) -> DistributedBackend:
    """Return an engine by its name.

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
    raise ValueError(f"backend_name must be 'single_process' or 'joblib', got {backend_name!r}")


# ------------------------------------------------------------------------------------------------
# Arguments: all that is wrong with them is said when `setup` is called.


def _checked_call(task_func: Callable[[T], R], tasks: Iterable[T]) -> Iterator[T]:
    """Return an iterator over *tasks*, of which nothing has been drawn."""
    if not callable(task_func):
        raise TypeError(f"task_func must be callable, got {task_func!r}")
    try:
        return iter(tasks)
    except TypeError as error:
        raise TypeError(f"tasks must be iterable, got {tasks!r}") from error


def _checked_num_workers(num_workers: int | None) -> int | None:
    if num_workers is None:
        return None
    try:
        count = operator.index(num_workers)
    except TypeError:
        raise TypeError(f"num_workers must be an integer or None, got {num_workers!r}") from None
    if count == 0:
        raise ValueError("num_workers must not be 0: use -1 for all cores, or 1, 2, ...")
    return count


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and int(value) >= least


def _is_number(value: Any, least: float) -> bool:
    try:
        return isinstance(value, numbers.Real) and float(value) >= least
    except OverflowError:
        return False


def _check_formula(formula: str, n_jobs: int) -> None:
    """Raise an error if joblib can make no number of batches of *formula*."""
    workers = n_jobs if n_jobs > 1 else 64  # as many as that, if it is not known
    try:
        batches = int(joblib.parallel.eval_expr(formula.replace("n_jobs", str(workers))))
    except (ArithmeticError, TypeError, ValueError) as error:
        message = f"pre_dispatch must be 'all', a number or a formula, got {formula!r}"
        raise ValueError(message) from error
    if batches < 1:
        raise ValueError(f"pre_dispatch must come to 1 or more, got {formula!r}")


# What joblib would notice late, or not at all, or report without naming the option.
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "batch_size": (
        "'auto' or a positive integer",
        lambda value: value == "auto" or _is_integer(value, least=1),
    ),
    "idle_worker_timeout": (
        "a positive number of seconds or None",
        lambda value: value is None or _is_number(value, least=0.001),
    ),
    "max_nbytes": (
        "a number of bytes, a string such as '1M', or None",
        lambda value: (
            value is None
            or _is_number(value, least=0)
            or (isinstance(value, str) and re.fullmatch(r"\d*\.?\d+[KMG]", value) is not None)
        ),
    ),
    "mmap_mode": (
        "'r', 'r+', 'w+', 'c' or None",
        lambda value: value in ("r", "r+", "w+", "c", None),
    ),
    "pre_dispatch": (
        "'all', a positive integer or a formula such as '2 * n_jobs'",
        lambda value: isinstance(value, str) or _is_integer(value, least=1),
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


@functools.cache  # to look at signatures is slow
def _known_options(kind: Any) -> frozenset[str]:
    """Return the names of joblib's options, and of those that a class of backends takes itself."""
    takers = (joblib.Parallel, kind.configure)
    return frozenset(
        parameter.name
        for taker in takers
        for parameter in inspect.signature(taker).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ) - {"self", "n_jobs", "parallel"}


def _check_options(options: dict[str, Any], backend: Any, n_jobs: int) -> None:
    """Raise an error if one of *options* is unknown, or known to be bad."""
    if "n_jobs" in options:
        raise TypeError(f"n_jobs={options['n_jobs']!r} is not an option: use num_workers")
    kind: Any = type(backend)
    known = _known_options(kind)
    for name, value in options.items():
        if name not in known:
            expected = ", ".join(map(repr, sorted(known)))
            raise TypeError(f"unknown option {name}={value!r}: expected one of {expected}")
        if name in _CHECKS:
            expected, is_valid = _CHECKS[name]
            if not is_valid(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")
    formula = options.get("pre_dispatch", "all")
    if isinstance(formula, str) and formula != "all":
        _check_formula(formula, n_jobs)
    if options.get("require") == "sharedmem" and not getattr(backend, "supports_sharedmem", False):
        raise ValueError(f"require='sharedmem' is more than {kind.__name__} can do")


def _chosen_backend(backend: Any, hints: dict[str, Any]) -> Any:
    """Return the joblib backend that `joblib.Parallel` would use; it may be shared."""
    if backend is None:
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
        raise ValueError(f"backend must be an instance or one of {expected}, got {backend!r}")
    active = joblib.parallel.get_active_backend()[0]
    if type(active) is joblib.parallel.BACKENDS.get(backend):
        return active  # with the options of the caller's parallel_config
    with joblib.parallel_config(backend=backend):
        return joblib.parallel.get_active_backend()[0]


def _require_dask() -> None:
    try:
        package = importlib.import_module("distributed")
    except ImportError as error:
        message = "backend='dask' needs Dask: install it with pip install 'dask[distributed]'"
        raise ImportError(message) from error
    if not hasattr(package, "Client"):
        raise ImportError(
            f"backend='dask' needs Dask's package 'distributed', which {package.__file__} hides, "
            "since it is a top-level module of the same name: move that file into a package"
        )


def _register_ray() -> None:
    try:
        ray = importlib.import_module("ray.util.joblib")
    except ImportError as error:
        message = "backend='ray' needs Ray: install it with pip install ray"
        raise ImportError(message) from error
    ray.register_ray()


# ------------------------------------------------------------------------------------------------
# Running tasks.
#
# joblib hands every batch of tasks to its backend together with a callback, which the backend runs
# in a thread of its own when the batch has completed. In that callback lies the whole of joblib's
# scheduling: it takes the results, then draws, batches and submits the next tasks. Here, the
# backend's thread only puts a report into an _Inbox. The consumer's thread takes it out when it is
# asked for the next result, and runs the callback itself. joblib stays the scheduler, but all that
# it does is done in the consumer's thread, one step at a time (_Run).
#
# Of joblib this uses what backends of third parties are written against (joblib.parallel, the
# methods and attributes of backends, BatchedCalls.items) and, of joblib's Dask backend, the futures
# it waits for and the data it has scattered. All that has been the same from joblib 1.5.0 to 1.6.0.
#
# A joblib backend is made to work like that by a subclass (_ConsumerDriven). Some need more, each
# for a reason of its own (_ConsumerDrivenLoky, _ConsumerDrivenPool, _ConsumerDrivenDask).


def _one_by_one(task_func: Callable[[T], R], tasks: Iterator[T]) -> Generator[R, None, None]:
    for task in tasks:
        yield task_func(task)  # not map(), which would take a StopIteration for the end


def _batch_runner(pack_errors: bool) -> Callable[..., tuple[list[Any], Any]]:
    """Return the function that workers call: the only thing of this module that is sent to them.

    It travels by value, so it must not refer to anything of this module: it imports what it needs.
    """

    def run_batch(task_func: Any, *tasks: Any) -> tuple[list[Any], Any]:
        """Return the results, and the error of the task that ended the batch, if one did."""
        results: list[Any] = []
        try:
            for task in tasks:
                results.append(task_func(task))
        except Exception as error:
            return results, pack(error) if pack_errors else error
        return results, None

    def pack(error: Exception) -> tuple[bytes | None, str, str]:
        """Return *error* pickled in a form that survives, its summary, and its traceback."""
        import pickle
        import traceback

        import joblib

        def dump_by_value(value: Any) -> bytes:
            _, (data,) = joblib.wrap_non_picklable_objects(value, keep_wrapper=False).__reduce__()
            return data  # type: ignore[no-any-return]

        summary = "".join(traceback.format_exception_only(type(error), error)).strip()
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        # Many a class cannot be called with the `args` that it gave to its base. Then what the
        # built-in class underneath knows of the error is sent instead.
        kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
        for form in (error, (kind, *kind.__reduce__(error))):
            # By reference first: by value, a class may turn into another one of the same name.
            for dump in (pickle.dumps, dump_by_value):
                try:
                    data = dump(form)
                    copy = pickle.loads(data)
                    if form is not error or repr(copy.args) == repr(error.args):
                        return data, summary, text
                except Exception:
                    continue
        return None, summary, text

    return run_batch


def _unpacked_error(data: bytes | None, summary: str, text: str) -> BaseException:
    """Return the error that a worker has packed, with the worker's traceback as its cause."""
    error: BaseException
    try:
        if data is None:
            raise pickle.PicklingError
        form = pickle.loads(data)
        error = form if isinstance(form, BaseException) else _rebuilt_error(*form)
    except Exception:
        error = RuntimeError(f"a task raised an exception that cannot be pickled: {summary}")
    error.__cause__ = multiprocessing.pool.RemoteTraceback(f'\n"""\n{text}"""')
    return error


def _rebuilt_error(kind: Any, cls: Any, args: Any, state: Any = None) -> BaseException:
    """Put an error together as its built-in base class *kind* does, without its own __init__."""
    error: BaseException = kind.__new__(cls, *args)
    kind.__init__(error, *args)
    kind.__setstate__(error, state)
    return error


class _SentByValue:
    """A function that is pickled by value, and only once, since that is slow."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> Any:
        return self._reduced

    @functools.cached_property
    def _reduced(self) -> Any:
        return joblib.wrap_non_picklable_objects(self.function, keep_wrapper=False).__reduce__()


_RUN_BATCH = _SentByValue(_batch_runner(pack_errors=True))
_RUN_BATCH_IN_THREAD = _SentByValue(_batch_runner(pack_errors=False))


class _TaskTimeoutError(TimeoutError, multiprocessing.TimeoutError):
    """No task completed in time. joblib's users catch the one, everybody else the other."""


class _OneWorker(Exception):
    """Raised by a backend that has one worker only: tasks can as well run in this process."""


class _RunEnded(BaseException):
    """Thrown into joblib's generator to end it: unlike close(), that makes it warn of nothing."""


class _Failure:
    """The outcome of a batch which ended in a way that the backend itself does not report."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


# Of tasks that take no time, joblib would send 100,000 and more at once. So many gain nothing, but
# all that are out have to be kept in memory.
_LARGEST_BATCH = 8192

# On Windows, Ctrl-C does not interrupt a wait.
_LONGEST_WAIT = 0.1 if sys.platform == "win32" else threading.TIMEOUT_MAX


class _Inbox:
    """What is known of the batches of a run that are out.

    It belongs to the consumer's thread, but for the reports, which come from those of the backend.
    """

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered
        self.expected: dict[int, Callable[[Any], None]] = {}  # joblib's callbacks
        self.numbers = itertools.count()
        self.next_number = 0  # of the batch whose turn it is, if ordered
        self.early: dict[int, Any] = {}  # outcomes of batches whose turn it is not
        self.reports: queue.SimpleQueue[tuple[int | None, Any]] = queue.SimpleQueue()

    def expect(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return the callback to give to the backend, in place of joblib's."""
        number, put = next(self.numbers), self.reports.put
        self.expected[number] = callback
        return lambda outcome: put((number, outcome))  # refers to no more: see _Run

    def fail(self, error: BaseException) -> None:
        """Report an error that no batch is known to have caused."""
        self.reports.put((None, _Failure(error)))

    def take(self, timeout: float | None) -> tuple[Callable[[Any], None], Any]:
        """Return joblib's callback for the next batch to complete, and the outcome of the batch."""
        number, outcome = self._next_report(timeout)
        if number is None:
            return _ignore, outcome
        return self.expected.pop(number), outcome

    def count_running(self) -> int:
        return len(self.expected) - len(self.early) - self.reports.qsize()

    def _next_report(self, timeout: float | None) -> tuple[int | None, Any]:
        if not self.ordered:
            return self._wait(timeout)
        while self.next_number not in self.early:
            number, outcome = self._wait(timeout)
            if number is None:
                return number, outcome
            self.early[number] = outcome
        number = self.next_number
        self.next_number += 1
        return number, self.early.pop(number)

    def _wait(self, timeout: float | None) -> tuple[int | None, Any]:
        deadline = math.inf if timeout is None else time.monotonic() + min(timeout, 1e9)
        while True:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    return self.reports.get_nowait()
                # Python 3.10 may wait for ever if the time is over before it has begun to wait.
                return self.reports.get(timeout=min(max(left, 0.01), _LONGEST_WAIT))
            except queue.Empty:
                if left <= _LONGEST_WAIT:
                    message = f"no task has completed within the timeout of {timeout!r} seconds"
                    raise _TaskTimeoutError(message) from None


def _ignore(outcome: Any) -> None:
    pass


class _Run:
    """One call of `Joblib.setup`.

    Only its generator refers to it: not joblib, and nothing that loky refers to while workers are
    busy. Otherwise a generator that its own tasks refer to would never be collected.
    """

    def __init__(
        self,
        task_func: Callable[[Any], Any],
        tasks: Iterator[Any],
        num_workers: int | None,
        options: dict[str, Any],
    ) -> None:
        n_jobs = _checked_num_workers(num_workers)
        if n_jobs is None:
            configured = joblib.parallel.get_active_backend()[1]
            n_jobs = -1 if configured is None else configured
        options = dict(options)
        hints = {name: value for name, value in options.items() if name in ("prefer", "require")}
        backend = _chosen_backend(options.pop("backend", None), hints)
        _check_options(options, backend, n_jobs)
        self.inbox = _Inbox(ordered=options.pop("return_as", None) == "generator")
        self.timeout: float | None = options.pop("timeout", None)
        self.backend = _consumer_driven(backend, self.inbox, task_func)
        self.parallel = joblib.Parallel(
            n_jobs=n_jobs, backend=self.backend, return_as="generator_unordered", **options
        )
        self.task_func = task_func
        self.tasks = tasks
        self.tasks_error: Exception | None = None
        self.exhausted = False
        self.ended = threading.Event()
        self.reader: threading.Thread
        self.drawn: Generator[Any, None, None]
        self.output: Generator[Any, None, None] | None = None

    def results(self) -> Generator[Any, None, None]:
        """Yield the results, advancing joblib as they are asked for."""
        self.reader = threading.current_thread()
        self.drawn = self._draw()
        _open_runs[id(self)] = weakref.ref(self)
        _end_open_runs_at_exit()
        try:
            try:
                self.output = self.parallel(self._tasks())
            except _OneWorker:
                yield from self._one_by_one()
                return
            with self.backend.waiting():
                while self.inbox.expected:
                    self.reader = threading.current_thread()
                    callback, results, error = self._next_batch()
                    while results:
                        yield results.pop()  # hold on to none that has been handed out
                    if error is not None:
                        try:
                            raise error
                        finally:
                            del error  # its traceback refers to this frame
                    self.reader = threading.current_thread()
                    # Not before: tasks may be slow to draw, or depend on those results.
                    callback(None)
                    next(self.output, None)
            if self.tasks_error is not None:
                raise self.tasks_error
            if not self.exhausted:
                # Nothing was drawn at first, with as few workers as there turned out to be.
                raise ValueError(f"pre_dispatch={self.parallel.pre_dispatch!r} comes to 0")
        finally:
            self.tasks_error = None  # its traceback refers to this frame
            try:
                self.end()
            finally:
                _open_runs.pop(id(self), None)
                self.ended.set()

    def _draw(self) -> Generator[Any, None, None]:
        """Yield the tasks. Keep back an error of theirs, for which joblib would drop results."""
        try:
            yield from itertools.chain(self.tasks)  # not to be closed along with this
        except Exception as error:
            self.tasks_error = error
        self.exhausted = True

    def _tasks(self) -> Iterator[Any]:
        # joblib keeps this iterator, which must not refer to the run; iter() of a proxy would.
        return map(next, itertools.repeat(weakref.proxy(self.drawn)))

    def _one_by_one(self) -> Iterator[Any]:
        if not self.parallel.verbose:
            return _one_by_one(self.task_func, self.tasks)
        # joblib does the same, and prints how far it is.
        run = joblib.Parallel(
            n_jobs=1, backend="sequential", return_as="generator", verbose=self.parallel.verbose
        )
        call = joblib.delayed(self.task_func)
        return run(call(task) for task in self.tasks)  # type: ignore[no-any-return]

    def _next_batch(self) -> tuple[Callable[[Any], None], list[Any], BaseException | None]:
        callback, outcome = self.inbox.take(self.timeout)
        try:
            results, error = self.backend.results_of(outcome)
        except BaseException as error:
            # Its traceback leads to the outcome, and if that leads to the error they stay for long.
            raise error.with_traceback(None) from error.__cause__
        if isinstance(error, tuple):
            error = _unpacked_error(*error)
        results.reverse()
        return callback, results, error

    def end(self) -> None:
        output = self.output
        try:
            if output is None or inspect.getgeneratorstate(output) == inspect.GEN_CLOSED:
                pass
            elif threading.current_thread() is self.reader:
                _end_joblib(output)
            else:
                # The garbage collector may have interrupted a thread that must go on for the run
                # to end.
                _call_in_thread(functools.partial(_end_joblib, output))
        finally:
            self.drawn.close()  # lets go of this run, and so of the tasks


def _end_joblib(output: Generator[Any, None, None]) -> None:
    with contextlib.suppress(_RunEnded):
        output.throw(_RunEnded())


def _call_in_thread(function: Callable[[], Any]) -> None:
    """Call *function*; if it has not returned after 3 seconds, leave it to go on by itself."""
    if sys.is_finalizing():
        function()  # a thread would not get to run
        return
    thread = threading.Thread(target=function, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        function()  # as the interpreter exits, Python 3.12 may refuse to start a thread
        return
    thread.join(timeout=3)


_open_runs: dict[int, weakref.ref[_Run]] = {}  # by id(); any thread may add one at any time


def _end_open_runs() -> None:
    """End the runs that nobody will read to the end, as the interpreter exits."""
    for reference in list(_open_runs.values()):
        run = reference()
        if run is None or run.backend.process != os.getpid():
            continue  # it is gone, or that of a parent of this fork
        if run.reader is threading.main_thread() or not run.reader.is_alive():
            # Whoever reads on, in a hook that comes later, must not take this for the end.
            run.inbox.fail(RuntimeError("the run was ended, since the interpreter exits"))
            with contextlib.suppress(ValueError):  # a daemon thread is just doing the same
                run.end()
        elif run.reader.daemon:
            run.inbox.fail(SystemExit())  # which ends a thread in silence
            run.backend.abort_everything(ensure_ready=False)
            run.ended.wait(timeout=1)


@functools.cache
def _end_open_runs_at_exit() -> None:
    """See to it, once, that at exit open runs are ended."""
    atexit.register(_end_open_runs)


@functools.cache
def _end_open_runs_before_loky() -> None:
    """See to it, once, that at exit open runs are ended before loky waits for running tasks.

    It waits in a hook of `threading`, which comes before those of `atexit`. The last of these to be
    registered is the first to run; so this is for when loky has registered its own.
    """
    # Private, but loky and concurrent.futures stand and fall with it. Without it, leaving the
    # interpreter with a run open takes as long as the tasks that are running.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(_end_open_runs)


# joblib ships no types, so to a type checker the base could be anything.
class _ConsumerDriven(joblib.parallel.ParallelBackendBase):  # type: ignore[misc, unused-ignore]
    """Mixed into the class of a joblib backend: lets the consumer act on what it reports."""

    supports_return_generator = True  # some do not, since their callbacks would block
    inbox: _Inbox
    task_func: Callable[[Any], Any]
    process: int  # in which the workers are to be stopped: not a fork of it
    wanted_batch_size: int = 1  # by joblib's own reckoning

    def submit(self, func: Any, callback: Any = None) -> Any:
        report = self.inbox.expect(callback)
        # One call a batch: joblib does not look at the items again, and a call for each task would
        # take several times longer to pickle.
        in_thread = getattr(self, "supports_sharedmem", False)
        run_batch = _RUN_BATCH_IN_THREAD if in_thread else _RUN_BATCH
        func.items = [(run_batch, (self.task_func, *func.items), {})]
        try:
            return self.hand_over(func, report)
        except Exception as error:
            report(_Failure(error))  # to be raised after the results that came before it
            return None

    def hand_over(self, batch: Any, report: Callable[[Any], None]) -> Any:
        return super().submit(batch, callback=report)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        try:
            workers: int = super().configure(n_jobs=n_jobs, parallel=parallel, **options)
        except joblib.parallel.FallbackToBackend:
            workers = 1
        if workers == 1:
            raise _OneWorker
        return workers

    def results_of(self, outcome: Any) -> tuple[list[Any], Any]:
        """Return what run_batch has returned for a batch, or raise the error of the engine."""
        if isinstance(outcome, _Failure):
            raise outcome.error
        (returned,) = super().retrieve_result_callback(outcome)
        return returned  # type: ignore[no-any-return]

    def retrieve_result_callback(self, out: Any) -> list[None]:
        # joblib asks for the results in its callback, when they have been handed out. It gets one
        # item a batch, so that its generator advances by one step a batch.
        return [None]

    def compute_batch_size(self) -> int:
        self.wanted_batch_size = super().compute_batch_size()
        return min(self.wanted_batch_size, _LARGEST_BATCH)

    def batch_completed(self, batch_size: int, duration: float) -> None:
        if batch_size == _LARGEST_BATCH < self.wanted_batch_size:
            # joblib wants to know of a batch of the size that it has asked for.
            duration *= self.wanted_batch_size / batch_size
            batch_size = self.wanted_batch_size
        super().batch_completed(batch_size, duration)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        if self.process == os.getpid():
            self.abort()

    def abort(self) -> None:
        super().abort_everything(ensure_ready=False)

    def terminate(self) -> None:
        if self.process == os.getpid():
            self.finish()

    def finish(self) -> None:
        super().terminate()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return what surrounds the wait for results; joblib would enter it too late."""
        context: contextlib.AbstractContextManager[None] = super().retrieval_context()
        return context

    def retrieval_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _wait_while_falling(count: Callable[[], int]) -> None:
    """Wait until *count* is 0, has not fallen for 50 ms, or 1 s has passed."""
    lowest, now = count(), time.monotonic()
    end, limit = now + 0.05, now + 1
    while lowest > 0 and time.monotonic() < min(end, limit):
        time.sleep(0.001)
        if count() < lowest:
            lowest, end = count(), time.monotonic() + 0.05


class _PoolSettings(NamedTuple):
    n_jobs: int
    options: dict[str, Any]
    inner_max_num_threads: int | None
    backend_kwargs: dict[str, Any]

    @property
    def temp_folder(self) -> Any:
        return self.options.get("temp_folder")


class _ConsumerDrivenLoky(_ConsumerDriven):
    """Shares loky's one pool of workers with the other runs of the process.

    joblib resizes or replaces the pool for each run that starts, and kills it for each that is
    left. Here a pool in which another run has work is left as it is.
    """

    lock = threading.RLock()  # guards what follows, and the pool; see locked()
    depth: ClassVar[int] = 0
    live: ClassVar[tuple[weakref.ref[_ConsumerDrivenLoky], ...]] = ()
    pool_settings: ClassVar[_PoolSettings | None] = None  # None: there is no pool that is known of
    abandoned: ClassVar[frozenset[Future[Any]]] = frozenset()  # work of runs that were left

    settings: _PoolSettings  # what this run wants of the pool, or has found
    batches: dict[Future[Any], Any]  # those in the pool

    @staticmethod
    @contextlib.contextmanager
    def locked() -> Iterator[bool]:
        """Guard the pool. Tell if this thread is doing something with it already.

        It is if the garbage collector, which may do so at any time, ends a run.
        """
        with _ConsumerDrivenLoky.lock:
            _ConsumerDrivenLoky.depth += 1
            try:
                yield _ConsumerDrivenLoky.depth > 1
            finally:
                _ConsumerDrivenLoky.depth -= 1

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        wanted: int = self.effective_n_jobs(n_jobs)
        if wanted == 1:
            raise _OneWorker
        self.parallel = parallel
        self.batches = {}
        self.settings = _PoolSettings(
            n_jobs, options, self.inner_max_num_threads, self.backend_kwargs
        )
        with self.locked():
            self.join_pool()
            _ConsumerDrivenLoky.live += (weakref.ref(self),)
        return wanted

    def join_pool(self) -> None:
        busy = self.another_busy()
        if busy is not None:
            self.settings = busy.settings
        elif self.pool_settings is not None and (
            # loky would wait for the end of such work before it changes the pool, and
            self.is_pool_haunted()
            # joblib does not change that of a pool.
            or self.pool_settings.temp_folder != self.settings.temp_folder
        ):
            self.use_pool(self.pool_settings)
            self.kill_pool()
        self.use_pool(self.settings)

    def use_pool(self, settings: _PoolSettings) -> None:
        self.inner_max_num_threads = settings.inner_max_num_threads
        self.backend_kwargs = settings.backend_kwargs
        super().configure(n_jobs=settings.n_jobs, parallel=self.parallel, **settings.options)
        _ConsumerDrivenLoky.pool_settings = settings

    def is_busy(self) -> bool:
        return any(not job.done() for job in list(self.batches))

    def is_pool_haunted(self) -> bool:
        """Tell if workers are busy for a run that was left."""
        _ConsumerDrivenLoky.abandoned = frozenset(job for job in self.abandoned if not job.done())
        return bool(self.abandoned)

    def another_busy(self) -> _ConsumerDrivenLoky | None:
        others = (reference() for reference in self.live)
        return next((run for run in others if run not in (None, self) and run.is_busy()), None)

    def hand_over(self, batch: Any, report: Callable[[Any], None]) -> Any:
        with self.locked():
            if self.settings is not self.pool_settings:
                self.join_pool()  # another run has changed it since
            try:
                job = super().hand_over(batch, report)
            except RuntimeError:  # the pool is broken, or was shut down by somebody else
                self.join_pool()
                job = super().hand_over(batch, report)
            self.batches[job] = batch
        _end_open_runs_before_loky()
        return job

    def results_of(self, outcome: Any) -> tuple[list[Any], Any]:
        with self.locked():
            self.batches.pop(outcome, None)
        return super().results_of(outcome)

    def abort(self) -> None:
        with self.locked() as is_interruption:
            left = {job: batch for job, batch in self.batches.items() if not job.done()}
            self.batches = {}
            _ConsumerDrivenLoky.abandoned |= left.keys()
            if self.another_busy() is None and not is_interruption:
                self.kill_pool()
            else:
                # Futures are not cancelled: loky's manager thread does not survive a kill of the
                # pool while it has cancelled ones. A batch of nothing is as good. (So far joblib
                # fails to pickle what a run has left in the queue, which has the same effect.)
                for batch in left.values():
                    batch.items.clear()

    def kill_pool(self) -> None:
        if self.pool_settings is None:
            return  # another run has killed it
        # loky's manager thread does not survive a kill before it has put what was submitted into
        # the queue of the workers, as far as there is room. Only a submission makes it look.
        with contextlib.suppress(RuntimeError):  # broken already
            last = super().hand_over(joblib.parallel.BatchedCalls([], (None, None)), _ignore)
            jobs = {last, *self.abandoned}
            _wait_while_falling(lambda: sum(not job.running() and not job.done() for job in jobs))
        super().abort()
        _ConsumerDrivenLoky.abandoned = frozenset()
        _ConsumerDrivenLoky.pool_settings = None

    def finish(self) -> None:
        with self.locked() as is_interruption:
            _ConsumerDrivenLoky.live = tuple(
                reference for reference in self.live if reference() not in (None, self)
            )
            if self.is_pool_haunted() and self.another_busy() is None and not is_interruption:
                self.kill_pool()  # it was spared for the sake of this run
            super().finish()


class _ConsumerDrivenPool(_ConsumerDriven):
    """Gets over a weakness of `multiprocessing.Pool`.

    When it terminates a worker that is just sending a result, it waits for ever for a lock that the
    worker had.
    """

    def finish(self) -> None:
        _wait_while_falling(self.inbox.count_running)
        _call_in_thread(super().finish)


class _ConsumerDrivenDask(_ConsumerDriven):
    """Adds what joblib's Dask backend does not tell, and does not do."""

    def effective_n_jobs(self, n_jobs: int) -> int:
        # With one worker tasks would run in this process, not on the cluster.
        workers: int = super().effective_n_jobs(n_jobs)
        return max(workers, 2)

    def hand_over(self, batch: Any, report: Callable[[Any], None]) -> Any:
        def report_error(job: Future[Any]) -> None:
            error = job.exception()
            if error is not None:
                report(_Failure(error))

        job = super().hand_over(batch, report)
        job.add_done_callback(report_error)  # if a worker is lost, joblib calls nothing else
        return job

    def abort(self) -> None:
        futures = list(self.waiting_futures.futures)
        super().abort()
        if self.client.status == "running":
            self.client.cancel(futures)  # joblib only forgets them


class _DaskClient:
    """A Dask client for joblib, on whose event loop nothing fails in silence.

    There joblib sends tasks and fetches results. What cannot be pickled makes that fail; all that
    Dask does about it is to write to a log.
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


@functools.cache
def _subclass(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {})  # joblib shows the name


def _consumer_driven(backend: Any, inbox: _Inbox, task_func: Callable[[Any], Any]) -> Any:
    """Return a joblib backend like *backend*, which is left as it is, for one run."""
    is_sequential = isinstance(backend, joblib.parallel.SequentialBackend)
    if not (is_sequential or backend.supports_retrieve_callback):
        raise ValueError(f"backend must tell when a batch has completed, got {backend!r}")
    dask = joblib.parallel.BACKENDS.get("dask")
    is_dask = isinstance(dask, type) and isinstance(backend, dask)
    kind: Any = type(backend)
    mixin: Any = _ConsumerDriven
    if isinstance(backend, joblib.parallel.LokyBackend):
        mixin = _ConsumerDrivenLoky
    elif isinstance(backend, joblib.parallel.MultiprocessingBackend):
        mixin = _ConsumerDrivenPool
    elif is_dask:
        mixin = _ConsumerDrivenDask
    clone = object.__new__(_subclass(mixin, kind))
    vars(clone).update(vars(backend))
    if is_dask:
        # What it keeps of its calls must not be shared; what was scattered may be.
        clone.__init__(
            client=_DaskClient(backend.client, inbox),
            wait_for_workers_timeout=backend.wait_for_workers_timeout,
            **backend.submit_kwargs,
        )
        clone.nesting_level = backend.nesting_level
        # The keys are ids of what was scattered, which the original keeps alive.
        clone.data_futures, clone.original = backend.data_futures, backend
    if hasattr(clone, "reset_batch_stats"):
        clone.reset_batch_stats()  # those of another run
    clone.inbox = inbox
    clone.task_func = task_func
    clone.process = os.getpid()
    return clone
