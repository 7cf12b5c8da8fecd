"""What a doctest cannot show well: faults, threads, leaks and other engines.

The module is loaded under a name by which no worker could import it, so that a test fails if
anything of it is pickled to a worker. Most tasks are expressions, run by `eval`: a function that
every engine can send to its workers.

After what several tests need, they stand in the order of the docstrings, under their words: the
interface, the promises of `Joblib`, the arguments of its `setup`, what it raises. Then come Dask
and Ray, the README, the soak, and the benchmarks.
"""

import asyncio
import bdb
import collections
import contextlib
import contextvars
import dataclasses
import errno
import functools
import gc
import importlib.util
import inspect
import itertools
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import traceback
import types
import typing
import warnings
import weakref
import zipfile
from collections import Counter
from concurrent.futures import (
    BrokenExecutor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from fractions import Fraction
from pathlib import Path

import joblib
import joblib.parallel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if os.name == "posix":
    import resource

try:
    import numpy
except ImportError:

    class WithoutNumpy:
        """Skips the test that asks for something of numpy."""

        def __bool__(self):
            return False

        def __getattr__(self, name):
            if name.startswith("_"):  # pytest looks at it
                raise AttributeError(name)
            pytest.skip("needs numpy")

    numpy = WithoutNumpy()
needs_numpy = pytest.mark.skipif(not numpy, reason="needs numpy")

FILE = Path(__file__).with_name("distributed.py")
README = Path(__file__).with_name("README.md")

# Of other systems, as far as Linux can show them: what every Python executes as it starts, the
# workers' too, if the tests are run by `tox -e elsewhere`.
ELSEWHERE = """
import fcntl, multiprocessing, os, resource, subprocess, sys, sysconfig
sysconfig.get_config_vars()  # kept, of Linux
sys.platform = "darwin"
vars(fcntl).pop("F_SETSIG", None)
vars(os).pop("memfd_create", None)
limit = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
"""
if "ELSEWHERE" in os.environ:  # a folder for this
    Path(os.environ["ELSEWHERE"], "sitecustomize.py").write_text(ELSEWHERE)
    os.environ["PYTHONPATH"] = os.environ["ELSEWHERE"]
    eval(compile(ELSEWHERE, "sitecustomize", "exec"), {})

spec = importlib.util.spec_from_file_location("vendored.distributed", FILE)
distributed = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = distributed
spec.loader.exec_module(distributed)
Joblib, SingleProcess = distributed.Joblib, distributed.SingleProcess
FailedTask = distributed.FailedTask

# A shell that starts the tests in the background may have them ignore signals, and what they
# start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if os.name == "posix":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# On Windows, os.kill() ends a process with whatever number, and there are few signals.
SIGKILL = getattr(signal, "SIGKILL", 9)
USER_SIGNAL = getattr(signal, "SIGUSR1", None) or signal.SIGBREAK

once = pytest.mark.once

# What the system must have for a test; what is meant for one system says so.
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
HAS_PROC = os.name == "posix" and os.path.exists("/proc/self")
needs_proc = pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
needs_signals = pytest.mark.skipif(
    os.name != "posix", reason="needs to send signals, or to block them"
)
needs_exec = pytest.mark.skipif(os.name != "posix", reason="needs exec")
needs_shell = pytest.mark.skipif(os.name != "posix", reason="a script of the shell")
needs_modes = pytest.mark.skipif(os.name != "posix", reason="needs modes of files")

# CPython's advice, on each fork, to a process that has threads.
forks = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)

# ------------------------------------------------------------------------------------------------
# Tasks


def value(number):
    return repr(number)


def raising(error):
    """An expression that raises what the expression *error* makes."""
    return f"(_ for _ in ()).throw({error})"


def touch(path, number=0):
    return f"(__import__('pathlib').Path({str(path)!r}).touch(), {number!r})[1]"


def await_path(path, number=0):
    """An expression for *number*, as soon as there is a file at *path*."""
    exists, sleep = (
        f"__import__('os').path.exists({str(path)!r})",
        "__import__('time').sleep(0.01)",
    )
    return f"([*iter(lambda: {exists} or {sleep}, True)], {number!r})[1]"


def mark(folder):
    """An expression that leaves a file named like its process in *folder*; it is None."""
    pid = "str(__import__('os').getpid())"
    return f"__import__('pathlib').Path({str(folder)!r}, {pid}).touch()"


def block(folder):
    """An expression that leaves such a file in *folder*, and goes on for ever."""
    return f"({mark(folder)}, __import__('time').sleep(3600))"


KILL = "__import__('os').kill(__import__('os').getpid(), 9)"
EXIT = "__import__('os')._exit(7)"
EXIT_IN_PEACE = EXIT.replace("7", "0")
LOCK = "__import__('_thread').allocate_lock()"
BAD_RESULT = "type('Bad', (), {'__reduce__': lambda self: (int, ('x',))})()"
EXITS_HERE = (
    "type('Bad', (), {'__reduce__': lambda self: (__import__('sys').exit, (3,))})()"
)
PID = "__import__('os').getpid()"


def wait_until(condition):
    while not condition():  # pytest-timeout puts an end to it
        time.sleep(0.01)


def pools_now():
    return [p for reference in [*distributed._state.pools] if (p := reference())]


def workers_now():
    processes = [process for pool in pools_now() for process in pool.processes()]
    return {process.popen.pid for process in processes if not process.has_ended()}


def children():
    """Return the ids of the processes that this one has started, and not waited for."""
    import contextlib
    import pathlib
    import sys

    pids = []
    if sys.platform == "win32":
        import ctypes
        import os
        import struct

        kernel32 = ctypes.WinDLL("kernel32")
        snapshot = ctypes.c_void_p(kernel32.CreateToolhelp32Snapshot(2, 0))
        entry = ctypes.create_string_buffer(struct.pack("L", 568), 568)
        more = kernel32.Process32FirstW(snapshot, entry)
        while more:
            pid, parent = struct.unpack_from("8xL20xL", entry)
            if parent == os.getpid():
                pids.append(pid)
            more = kernel32.Process32NextW(snapshot, entry)
        kernel32.CloseHandle(snapshot)
    for path in pathlib.Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            pids += map(int, path.read_text().split())
    return sorted(pids)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def is_alive(pid):
    import os  # programs of tests have this, too

    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    import _winapi

    synchronize, timeout = 0x100000, 258
    try:
        handle = _winapi.OpenProcess(synchronize, False, pid)
    except OSError:
        return False
    try:
        return _winapi.WaitForSingleObject(handle, 0) == timeout
    finally:
        _winapi.CloseHandle(handle)


def left_in(folder):
    """Return what runs have left in a folder.

    On Windows, files stay there for as long as idle workers map them.
    """
    if os.name != "posix":
        wait_until(lambda: not list(folder.iterdir()))
    return list(folder.iterdir())


def pids_in(folder):
    return [int(path.name) for path in folder.iterdir()]


def collect(results, *errors):
    """Return what *results* yields, and what error of *errors* it ends with."""
    received = []
    try:
        received.extend(results)
    except errors as error:
        return received, error
    return received, None


class Task:
    """A task that can be referred to weakly."""


class Model:
    """Counts how often it is pickled; what a worker does is told by its results."""

    pickled = 0

    def __init__(self, data=None):
        self.data = data
        self.calls = 0

    def __getstate__(self):
        type(self).pickled += 1
        return vars(self)

    def objective(self, task):
        time.sleep(0.002)
        self.calls += 1
        return os.getpid(), self.calls, task, self.data


def by_value(cls):
    """Return the class as if it were of the program: it travels by value."""
    names = {"__name__": "__main__", "os": os, "time": time}
    eval(compile(inspect.getsource(cls), "<by value>", "exec"), names)
    return names[cls.__name__]


def by_value_of(function):
    """Return the function as if it were of the program: it travels by value."""
    return types.FunctionType(function.__code__, {"__name__": "__main__"})


# A function that takes expressions, and other tasks as they are; it travels by value.
run = lambda task: eval(task, {}) if isinstance(task, str) else repr(task)


def exiting(error):
    """An expression that raises it, StopIteration as well: not by a generator."""
    return f"exec({f'raise {error}'!r})"


class CannotBePickled:
    def __reduce__(self):
        raise KeyError("stays here")


class CannotBeUnpickled:
    def __getstate__(self):
        return {"key": 1}

    def __setstate__(self, state):
        raise KeyError("not here")

    def call(self, task):
        return task


def logged(folder, number, expression=None):
    """An expression for *number* that leaves a byte in a file of that name, first."""
    path = str(folder / str(number))
    expression = repr(number) if expression is None else expression
    return f"(open({path!r}, 'ab', 0).write(b'x'), {expression})[1]"


def times_run(folder):
    return {int(path.name): path.stat().st_size for path in folder.iterdir()}


def numbers_of(results):
    """Return the numbers of tasks that failed, and what the others gave."""
    results = list(results)
    failed = [result.number for result in results if isinstance(result, FailedTask)]
    return failed, [result for result in results if not isinstance(result, FailedTask)]


def slow(seconds, number=0):
    return f"(__import__('time').sleep({seconds}), {number})[1]"


def notes_of(error):
    return getattr(error, "__notes__", [])


PICKLING = {
    "task to pickle": (CannotBePickled(), pickle.PicklingError),
    "lock to pickle": (threading.Lock(), pickle.PicklingError),
    "task to unpickle": (by_value(CannotBeUnpickled)(), pickle.UnpicklingError),
    "result to pickle": (LOCK, pickle.PicklingError),
    "result to unpickle": (BAD_RESULT, pickle.UnpicklingError),
    "result that exits": (EXITS_HERE, pickle.UnpicklingError),
}
each_fault = pytest.mark.parametrize(
    "bad",
    [
        pytest.param(
            fault,
            id=what,
            marks=[] if what in ("task to pickle", "result to unpickle") else once,
        )
        for what, (fault, _) in PICKLING.items()
    ],
)


def meet(folder, here, there):
    """An expression for the worker's id, when one for *there* has begun as well."""
    return f"({touch(folder / here)}, {await_path(folder / there)}, {PID})[2]"


def meeting(folder, name):
    """Two tasks that each need a worker, and return its id."""
    folder = Path(folder, name)
    folder.mkdir()
    return [meet(folder, "one", "two"), meet(folder, "two", "one")]


# ------------------------------------------------------------------------------------------------
# Engines. A test that takes one of these fixtures holds on each engine that it has a parameter of.


@contextlib.contextmanager
def dask_client(folder, n_workers=2, allowed_failures=3, threads=1):
    """Connect to a cluster of another process, so that its workers share nothing with this one."""
    script = """
        import sys
        from dask.distributed import LocalCluster

        if __name__ == "__main__":
            with LocalCluster(
                n_workers=int(sys.argv[1]),
                threads_per_worker=int(sys.argv[2]),
                dashboard_address=None,
            ) as cluster:
                print(cluster.scheduler_address, flush=True)
                sys.stdin.read()
    """
    (folder / "cluster.py").write_text(textwrap.dedent(script))
    environment = {
        **os.environ,
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures),
        "DASK_TEMPORARY_DIRECTORY": str(folder),
    }
    with subprocess.Popen(
        [sys.executable, "cluster.py", str(n_workers), str(threads)],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        from dask.distributed import Client

        try:
            with Client(process.stdout.readline().strip()) as client:
                yield client
        finally:
            process.stdin.close()
            process.wait()


@pytest.fixture(scope="session")
def dask(tmp_path_factory):
    pytest.importorskip("dask.distributed")
    with dask_client(tmp_path_factory.mktemp("dask")) as client:
        yield client


@pytest.fixture(scope="session")
def ray(tmp_path_factory):
    ray = pytest.importorskip("ray")
    folder = Path.cwd()
    os.chdir(
        tmp_path_factory.mktemp("ray")
    )  # Ray puts the folder on the path of its workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
    os.chdir(folder)


@pytest.fixture(autouse=True)
def no_task_waits_on(request):
    """Let the tasks of a test that has failed end, which would keep others from workers."""
    has_folder = "tmp_path" in request.fixturenames
    folder = request.getfixturevalue("tmp_path") if has_folder else None
    yield
    if folder is not None:
        (folder / "go").touch()


ENGINES = ["loky", "threading"]
RAY = pytest.param("ray", marks=[pytest.mark.engines, pytest.mark.ray])
CLUSTERS = [pytest.param("dask", marks=pytest.mark.engines), RAY]
# "multiprocessing" is the same engine as "loky".
by_either_name = pytest.mark.parametrize(
    "processes", ["loky", "multiprocessing"], indirect=True
)


def start(request, name):
    if name in ("dask", "ray"):
        request.getfixturevalue(name)
    return functools.partial(Joblib.setup, num_workers=2, backend=name)


@pytest.fixture(params=[*ENGINES, *CLUSTERS])
def setup(request):
    """`Joblib.setup` on two workers of one of joblib's backends."""
    return start(request, request.param)


@pytest.fixture(params=["single_process", *ENGINES, *CLUSTERS])
def any_setup(request):
    """`setup` of either engine, with results in order."""
    if request.param == "single_process":
        return SingleProcess.setup
    return functools.partial(start(request, request.param), return_as="generator")


@pytest.fixture(params=["loky", RAY])
def stoppable_setup(request):
    """`Joblib.setup` on backends whose workers can be stopped."""
    return start(request, request.param)


class CountingLoky(joblib.parallel.LokyBackend):
    """Counts the batches that joblib makes."""

    submitted: typing.ClassVar[list[int]] = []

    def submit(self, func, callback=None):
        self.submitted.append(len(func))
        return super().submit(func, callback)


class FailingThreading(joblib.parallel.ThreadingBackend):
    """Takes four batches, and no more."""

    taken = 0
    reported: typing.ClassVar[list[object]] = []

    def submit(self, func, callback=None):
        self.taken += 1
        if self.taken > 4:
            raise OSError("no more")
        return super().submit(
            func, lambda outcome: self.reported.append(callback(outcome))
        )


def check_what_was_received_comes_first(setup, folder, fault, expected_error):
    tasks = [touch(folder / str(task), task) for task in range(3)]
    results = setup(eval, [*tasks, f"{await_path(folder / 'go')} or {fault}"])
    received = [next(results)]
    (lifetime,) = distributed._state.open_runs
    inbox = lifetime.run().inbox
    wait_until(lambda: inbox.reports.qsize() == 2)  # the other two have arrived
    (folder / "go").touch()
    rest, error = collect(results, expected_error)
    assert sorted([*received, *rest]) == [0, 1, 2]
    assert error is not None


@pytest.fixture
def processes(request):
    """`Joblib.setup` on the engine that gives each run worker processes of its own."""
    return start(request, getattr(request, "param", "loky"))


@pytest.fixture(params=["loky", *CLUSTERS])
def pickling_setup(request):
    """`Joblib.setup` on backends that pickle what they are given."""
    return start(request, request.param)


@pytest.fixture(params=["loky", *CLUSTERS])
def remembering(request):
    """`Joblib.setup` on backends whose workers are sent the function once."""
    return start(request, request.param)


@pytest.fixture
def fresh():
    """Let no worker be idle that another test has left, and leave none."""
    Joblib.shutdown()
    yield
    Joblib.shutdown()


# ------------------------------------------------------------------------------------------------
# Programs that use a copy, as people do


@pytest.fixture
def program(tmp_path):
    """Run a program, with a copy of the module in a package beside it."""
    (tmp_path / "yourpackage").mkdir()
    (tmp_path / "yourpackage" / "__init__.py").touch()
    shutil.copy(FILE, tmp_path / "yourpackage")
    (tmp_path / "helpers.py").write_text(
        inspect.getsource(children) + inspect.getsource(is_alive)
    )

    with contextlib.ExitStack() as stack:

        def start(source, *arguments, warnings="error"):
            if "import numpy" in source and not numpy:
                pytest.skip("needs numpy")
            (tmp_path / "program.py").write_text(textwrap.dedent(source))
            process = subprocess.Popen(
                [sys.executable, "-W", warnings, "program.py", *map(str, arguments)],
                cwd=tmp_path,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def output_of(process, status=0):
    output, errors = process.communicate()
    assert (errors, process.returncode) == ("", status)
    return output


INTERRUPTED = """
    import os, random, signal, sys, threading, time
    from helpers import children
    from yourpackage.distributed import Joblib, _state

    def interrupt(delay):
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    if __name__ == "__main__":
        backend, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        chance = random.Random(seed)
        interrupts = 0
        for _ in range(count):
            thread = threading.Thread(target=interrupt, args=(chance.uniform(0, 0.3),))
            try:
                thread.start()
                for result in Joblib.setup(time.sleep, [0.001] * 999, 2, backend=backend):
                    pass
                time.sleep(60)
            except KeyboardInterrupt:
                interrupts += 1
            thread.join()
            assert len(list(Joblib.setup(abs, range(20), 2, backend=backend))) == 20
        while _state.open_runs:
            time.sleep(0.01)
        Joblib.shutdown()
        print(interrupts, "interrupts,", len(children()), "left")
"""


# How a program begins.
BEGIN = """
import ctypes, itertools, multiprocessing, os, signal, subprocess, sys, threading
import atexit, gc, pathlib, random, time, warnings
from helpers import children, is_alive
from yourpackage.distributed import Joblib, _state
"""


@pytest.fixture
def begun(program):
    """Like `program`, which has imported what it needs."""

    def start(source, *arguments, **options):
        return program(BEGIN + textwrap.dedent(source), *arguments, **options)

    return start


def is_running(pid):
    """Tell whether a process goes on; one that nobody has waited for does not."""
    if not HAS_PROC:
        return is_alive(pid)
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def running(seconds, begin=".*"):
    """Return the ids of the processes whose command is to sleep for *seconds*.

    Those of a shell or of `timeout` count, unless the command is to *begin* with that.
    """
    command = f"{begin}sleep[\\0 ]{seconds}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found = re.match(command, path.read_bytes(), re.DOTALL)
            if found and is_running(path.parent.name):
                pids.append(int(path.parent.name))
    return pids


def sleeping(seconds):
    return running(seconds, begin="")


@pytest.fixture
def seconds():
    """How long a `sleep` is to take, by which it is told from all others."""
    if not HAS_PROC:
        pytest.skip("needs /proc, to find programs by their arguments")
    seconds = f"{3600 + random.random():.9f}"
    yield seconds
    for pid in running(seconds):
        os.kill(pid, SIGKILL)


# ------------------------------------------------------------------------------------------------
# The interface


@pytest.mark.parametrize(
    "engine", [distributed.DistributedBackend, SingleProcess, Joblib]
)
def test_signatures(engine):
    parameters = inspect.signature(engine.setup).parameters
    assert list(parameters) == ["task_func", "tasks", "num_workers", "kwargs"]
    assert parameters["num_workers"].default is None
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    shutdown = inspect.signature(engine.shutdown).parameters
    assert [str(parameter) for parameter in shutdown.values()] == [
        "*args: 'Any'",
        "**kwargs: 'Any'",
    ]
    for method in ("setup", "shutdown"):
        assert isinstance(inspect.getattr_static(engine, method), staticmethod)


def test_annotations():
    hints = typing.get_type_hints(distributed.DistributedBackend.setup)
    assert hints == {
        "task_func": typing.get_type_hints(Joblib.setup)["task_func"],
        "tasks": distributed.Iterator[distributed.T],
        "num_workers": int | None,
        "kwargs": typing.Any,
        "return": distributed.Generator[distributed.R, None, None],
    }
    for engine in (SingleProcess, Joblib):
        assert (
            typing.get_type_hints(engine.setup)["tasks"]
            == distributed.Iterable[distributed.T]
        )


def test_interface_is_abstract():
    assert distributed.DistributedBackend.__abstractmethods__ == {"setup", "shutdown"}
    assert issubclass(SingleProcess, distributed.DistributedBackend)
    assert issubclass(Joblib, distributed.DistributedBackend)


def test_get_backend():
    assert type(distributed.get_backend("single_process")) is SingleProcess
    assert type(distributed.get_backend("joblib")) is Joblib


@pytest.mark.parametrize("name", ["Joblib", "", None, ["joblib"]])
def test_get_backend_refuses(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
        distributed.get_backend(name)
    assert "'single_process'" in str(caught.value)
    assert "'joblib'" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["dask", "ray", "loky", "threading", "multiprocessing", "sequential"]
)
def test_the_name_of_an_engine_is_no_backend_and_the_hint_says_what_is(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
        distributed.get_backend(name)
    assert f"setup(..., backend={name!r})" in str(caught.value)


def test_public_names():
    assert distributed.__all__ == [
        "DistributedBackend",
        "FailedTask",
        "Joblib",
        "SingleProcess",
        "get_backend",
    ]
    assert re.fullmatch(r"\d+\.\d+\.\d+", distributed.__version__)


def test_results_are_a_generator(any_setup):
    assert inspect.isgenerator(any_setup(abs, [-1]))


@pytest.mark.parametrize("engine", [SingleProcess, Joblib])
def test_shutdown_may_be_called_at_any_time(engine):
    results = engine.setup(abs, [-1, -2])
    engine.shutdown()
    assert sorted(results) == [1, 2]
    assert engine.shutdown("anything", wait=True) is None


def test_single_process_ignores_options():
    results = SingleProcess.setup(
        abs, [-2, -1], num_workers=0, timeout=-1, n_jobs="two", nonsense=1
    )
    assert list(results) == [2, 1]


@pytest.mark.parametrize("arguments", [{"task_func": 5}, {"tasks": 5}])
def test_bad_input_of_single_process_is_met_at_once(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        SingleProcess.setup(**{"task_func": abs, "tasks": [1], **arguments})


def test_single_process_raises_whatever_errors_says():
    results = SingleProcess.setup(run, [value(0), "1 / 0"], errors="return")
    received, error = collect(results, ZeroDivisionError)
    assert received == [0]
    assert error is not None
    with pytest.raises(SystemExit):
        list(SingleProcess.setup(run, [raising("SystemExit()")], errors="return"))


@pytest.mark.parametrize("expression", ["SystemExit(4)", "KeyboardInterrupt()"])
@pytest.mark.parametrize(
    "setup", [SingleProcess.setup, functools.partial(Joblib.setup, num_workers=1)]
)
def test_in_this_process_it_is_what_the_program_has_raised(setup, expression):
    tasks = [value(0), raising(expression)]
    received, error = collect(setup(run, tasks), SystemExit, KeyboardInterrupt)
    assert received == [0]
    assert repr(error) == expression.replace("KeyboardInterrupt()", repr(error))


def one_worker(*arguments, **options):
    return Joblib.setup(*arguments, num_workers=1, **options)


def sequential(*arguments, **options):
    return Joblib.setup(*arguments, backend="sequential", **options)


@pytest.mark.parametrize(
    ("engine", "errors"),
    [
        (SingleProcess.setup, "raise"),
        (one_worker, "raise"),  # with "return", it is another process
        (sequential, "raise"),
        (sequential, "return"),
    ],
)
@pytest.mark.parametrize("return_tasks", [False, True])
def test_neither_task_nor_result_is_held_while_the_next_is_computed(
    engine, errors, return_tasks
):
    tasks, results, counts = weakref.WeakSet(), weakref.WeakSet(), []

    def made(kept):
        item = Task()
        kept.add(item)
        return item

    def function(task):
        counts.append((len(tasks), len(results)))
        return made(results)

    drawn = (made(tasks) for _ in range(9))
    options = {"errors": errors, "return_tasks": return_tasks}
    collections.deque(engine(function, drawn, **options), maxlen=0)
    assert counts == [(1, 0)] * 9


# What a type checker is to flag in it, and no more, is marked.
CHECKED = """
import functools, os
from collections.abc import Generator
from typing import Any, Literal, assert_type
from yourpackage.distributed import FailedTask, Joblib, SingleProcess, get_backend

def text(task: int) -> str:
    return str(task)

Texts = Generator[str, None, None]
TextsOrFailures = Generator[str | FailedTask, None, None]
Pairs = Generator[tuple[int, str], None, None]
PairsOrFailures = Generator[tuple[int, str | FailedTask], None, None]

backend = get_backend("joblib")
assert_type(backend, Joblib)
assert_type(backend.setup(text, [1]), Texts)
assert_type(backend.setup(text, iter([1]), 2, errors="raise", timeout=3), Texts)
assert_type(backend.setup(text, [1], return_tasks=False), Texts)
assert_type(backend.setup(text, [1], errors="return", verbose=5), TextsOrFailures)
assert_type(backend.setup(text, [1], return_tasks=True, batch_size=1), Pairs)
assert_type(backend.setup(text, [1], errors="raise", return_tasks=True), Pairs)
both = backend.setup(text, [1], 2, errors="return", return_tasks=True, timeout=3)
assert_type(both, PairsOrFailures)
for task, result in both:
    result.upper()  # flagged: it may be a FailedTask
    if not isinstance(result, FailedTask):
        result.upper()

def choose(errors: Literal["raise", "return"]) -> None:
    for result in Joblib.setup(text, [1], errors=errors):
        assert_type(result, str | FailedTask)

single = get_backend("single_process")
assert_type(single, SingleProcess)
assert_type(single.setup(text, [1], 2, errors="return", timeout=3), Texts)
assert_type(single.setup(text, [1], 2, return_tasks=True, timeout=3), Pairs)
either = get_backend("single_process" if "DEBUG" in os.environ else "joblib")
for result in either.setup(text, [1], 2, timeout=3):
    assert_type(result, str)
get_backend("Joblib")  # flagged

all_options = backend.setup(
    text,
    [1],
    backend="loky",
    return_as="generator",
    timeout=None,
    maxtasksperchild=5,
    batch_size="auto",
    pre_dispatch="2 * n_jobs",
    initializer=exec,
    initargs=("pass",),
    idle_worker_timeout=60,
    verbose=0,
    max_nbytes="1M",
    mmap_mode="c",
    temp_folder=os.curdir,
    prefer="processes",
    require=None,
)
backend.setup(text, [1], backend="ray", ray_remote_args={"max_restarts": 0})
backend.setup(text, [1], tiemout=3)  # flagged
backend.setup(text, [1], errors="return", tiemout=3)  # flagged
backend.setup(text, [1], return_tasks=True, tiemout=3)  # flagged
backend.setup(text, [1], errors="return", return_tasks=True, tiemout=3)  # flagged
either.setup(text, [1], tiemout=3)  # flagged
backend.setup(text, [1], return_as="list")  # flagged
backend.setup(text, [1], errors="ignore")  # flagged
backend.setup(text, [1], return_tasks="yes")  # flagged
single.setup(text, [1], return_tasks="yes")  # flagged
backend.setup(text, [1], timeout="3")  # flagged
backend.setup(text, [1], batch_size="all")  # flagged
backend.setup(text, [1], n_jobs=2)  # flagged
backend.setup(text, ["1"])  # flagged
backend.setup(text, [1], option_of_a_third_party=5)  # flagged

options: dict[str, Any] = {"option_of_a_third_party": 5, "errors": "return"}
backend.setup(text, [1], 2, **options)
assert_type(backend.setup(text, [1], 2, errors="return", return_tasks=True, **options), PairsOrFailures)
ordered = functools.partial(Joblib.setup, num_workers=2, return_as="generator")
for result in ordered(text, [1]):
    print(result)

failed = FailedTask(1, "task", ValueError())
match failed:
    case FailedTask(number, task, error):
        assert_type(number, int)
        assert_type(error, Exception)
number, task, error = failed  # flagged
"""


@pytest.mark.types
@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_at_their_defaults_flag_mistakes_and_nothing_else(
    program, tmp_path, checker
):
    program("")  # for the package beside it
    files = {"checked.py": CHECKED}
    files |= {f"example_{n}.py": source for n, (source, _) in enumerate(EXAMPLES)}
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    command = [sys.executable, "-m", checker, *files]
    output = subprocess.run(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, check=False
    ).stdout
    error = r"(\w+\.py):(\d+):(?:\d+ -)? error: (.*)"
    # What they find out of others, and of an attribute that the example adds to a module.
    of_others = r"[Ii]mport|dashboard_address|connection_of_worker"
    flagged = {
        (name, int(line))
        for name, line, message in re.findall(error, output)
        if name == "checked.py" or not re.search(of_others, message)
    }
    lines = enumerate(CHECKED.splitlines(), 1)
    expected = {("checked.py", number) for number, line in lines if "# flagged" in line}
    assert flagged == expected, output


# ------------------------------------------------------------------------------------------------
# Lazy


def test_nothing_happens_before_the_first_result(setup):
    drawn = []
    tasks = (drawn.append(task) or task for task in [-1, -2])
    threads, started = threading.enumerate(), children()
    results = setup(abs, tasks)
    assert drawn == []
    assert threading.enumerate() == threads
    assert children() == started
    assert sorted(results) == [1, 2]
    assert drawn == [-1, -2]


def test_the_number_of_tasks_is_nobodys_business_but_that_of_verbose(capfd):
    class Tasks:
        def __iter__(self):
            return iter([-1, -2])

        def __len__(self):
            raise NotImplementedError

    for verbose in (0, 11):
        assert sorted(Joblib.setup(abs, Tasks(), 2, verbose=verbose)) == [1, 2]
    assert "Done   2 |" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------
# Bounded


@pytest.mark.parametrize(
    "return_as",
    [pytest.param("generator", marks=pytest.mark.locally), "generator_unordered"],
)
@pytest.mark.parametrize(
    ("batch_size", "pre_dispatch"),
    [
        pytest.param(1, 1, marks=pytest.mark.locally),
        (1, "2 * n_jobs"),
        pytest.param(3, 5, marks=pytest.mark.alike),
    ],
)
def test_bounded(setup, tmp_path, return_as, batch_size, pre_dispatch):
    drawn = []

    def tasks():
        for task in itertools.count():
            drawn.append(task)
            yield touch(tmp_path / str(task))

    results = setup(
        eval,
        tasks(),
        return_as=return_as,
        batch_size=batch_size,
        pre_dispatch=pre_dispatch,
    )
    bound = eval(str(pre_dispatch), {"n_jobs": 2})
    if batch_size > 1:
        bound = (bound + 2) * batch_size
    for handed_out in range(1, 13):
        next(results)
        # Let the workers do all that they have. What has not been submitted is less than a draw.
        wait_until(lambda: len(list(tmp_path.iterdir())) > len(drawn) - 2 * batch_size)
        assert len(drawn) <= handed_out + bound
    results.close()


@pytest.mark.once
@pytest.mark.parametrize("backend", ENGINES)
def test_bounded_whatever_fails(backend):
    drawn = 0

    def tasks():
        nonlocal drawn
        for number in itertools.count():
            drawn += 1
            yield value(number) if number % 3 else "1 / 0"

    options = {"errors": "return", "batch_size": 1, "return_as": "generator"}
    results = Joblib.setup(run, tasks(), 2, backend=backend, **options)
    for handed_out in range(1, 61):
        next(results)
        assert drawn <= handed_out + 4
    results.close()


@pytest.mark.locally
def test_ask_and_tell(setup):
    asked, told, lags = 0, 0, []

    def ask():
        nonlocal asked
        while told < 30:
            asked += 1
            lags.append(asked - told)
            yield asked

    for _ in setup(abs, ask(), batch_size=1, pre_dispatch=2):
        told += 1
    assert told == asked
    assert max(lags) <= 2


@pytest.mark.alike
def test_a_result_is_not_held_back_by_slow_tasks(setup):
    received = set()

    def tasks():
        yield from range(4)  # as many as are out at first
        assert received  # or else this would not be the time to ask for more
        yield 4

    for result in setup(abs, tasks(), batch_size=1):
        received.add(result)
    assert received == {0, 1, 2, 3, 4}


def test_batches_are_handed_over_while_the_consumer_is_elsewhere(tmp_path):
    tasks = [touch(tmp_path / str(number)) for number in range(40)]
    results = Joblib.setup(eval, tasks, num_workers=2, batch_size=1, pre_dispatch="all")
    next(results)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 40)
    results.close()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_tasks_are_freed_when_they_have_been_run(batch_size):
    alive = weakref.WeakSet()

    def tasks():
        for _ in range(50):
            task = Task()
            alive.add(task)
            yield task
            del task

    options = {"backend": "threading", "batch_size": batch_size}
    results = Joblib.setup(bool, tasks(), 2, **options)
    for _ in range(12):
        next(results)
    # Those that are out, and of larger batches one more for each worker.
    assert len(alive) <= batch_size * (4 if batch_size == 1 else 6)
    assert len(list(results)) == 38
    assert not alive


@pytest.mark.alike
def test_there_may_be_more_tasks_than_a_length_can_say(setup):
    assert next(setup(abs, range(10**30))) in range(4)


# ------------------------------------------------------------------------------------------------
# Ends cleanly: a run that is left


def leave_by_break(results):
    for _ in results:
        break


def leave_by_close(results):
    next(results)
    results.close()


def leave_by_del(results):
    next(results)
    del results


def leave_by_error(results):
    def body():
        for _ in results:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        body()


def leave_by_collection(results):
    next(results)
    cycle = [results]
    cycle.append(cycle)  # for the garbage collector alone
    del results, cycle
    gc.collect()


LEAVE = [
    leave_by_break,
    leave_by_close,
    leave_by_del,
    leave_by_error,
    leave_by_collection,
]


LEAVE_AGAIN = [
    leave_by_break,
    *(pytest.param(leave, marks=[once, pytest.mark.locally]) for leave in LEAVE[1:]),
]


@pytest.mark.parametrize("leave", LEAVE_AGAIN)
def test_leaving_stops_the_workers(stoppable_setup, tmp_path, leave, capfd):
    start_to_block = [value(1), *[block(tmp_path)] * 9]

    def run():  # holds the only reference
        return stoppable_setup(eval, start_to_block)

    leave(run())
    wait_until(lambda: not any(map(is_alive, pids_in(tmp_path))))
    assert capfd.readouterr().err == ""
    assert sorted(stoppable_setup(abs, [-1, -2, -3])) == [1, 2, 3]


@pytest.mark.parametrize("leave", LEAVE_AGAIN)
def test_leaving_is_silent_and_the_next_run_works(setup, leave, capfd):
    leave(setup(abs, itertools.count()))
    assert sorted(setup(abs, [-1, -2, -3])) == [1, 2, 3]
    assert capfd.readouterr().err == ""


@pytest.mark.once
@pytest.mark.parametrize("pre_dispatch", [4, 8, 50])
def test_leaving_is_silent_whatever_is_queued(tmp_path, pre_dispatch, capfd):
    run = functools.partial(
        Joblib.setup,
        eval,
        [block(tmp_path)] * 99,
        pre_dispatch=pre_dispatch,
        num_workers=2,
    )
    with pytest.raises(TimeoutError):
        next(run(timeout=0.2))
    assert not any(map(is_alive, pids_in(tmp_path)))
    assert capfd.readouterr().err == ""


def test_leaving_calls_off_what_is_queued(setup, tmp_path):
    (tmp_path / "late").mkdir()
    (tmp_path / "pids").mkdir()
    stuck = [f"{mark(tmp_path / 'pids')} or {await_path(tmp_path / 'go')}"] * 2
    late = [touch(tmp_path / "late" / str(task)) for task in range(20)]
    results = setup(eval, stuck + late, pre_dispatch="all", batch_size=1, timeout=0.5)
    with pytest.raises(TimeoutError):
        next(results)
    if setup.keywords["backend"] == "ray":  # which stops its workers in its own time
        wait_until(lambda: not any(map(is_alive, pids_in(tmp_path / "pids"))))
    if setup.keywords["backend"] == "dask":  # whose workers hear of it a moment later
        queued = eval("lambda dask_worker: len(dask_worker.state.ready)")
        client = importlib.import_module("dask.distributed").get_client()
        wait_until(lambda: not any(client.run(queued).values()))
    (tmp_path / "go").touch()
    assert sorted(setup(abs, range(10))) == list(range(10))
    assert list((tmp_path / "late").iterdir()) == []


@pytest.mark.parametrize("death", [KILL, "__import__('time').sleep(3600)"])
def test_no_task_begins_after_a_death_or_time_out_that_ends_the_run(
    processes, tmp_path, death
):
    late = [touch(tmp_path / str(task)) for task in range(5)]
    options = {"batch_size": 1, "pre_dispatch": "all", "timeout": 1, "num_workers": 1}
    results = processes(eval, [value(0), death, *late], **options)
    assert next(results) == 0
    # Nobody reads of it yet, and the attendant has come to the end of what it was given.
    wait_until(lambda: all(pool.jobs.empty() for pool in pools_now()))
    assert list(tmp_path.iterdir()) == []
    assert collect(results, BrokenExecutor, TimeoutError)[1] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "blocked"),
    [("loky", "inner"), ("loky", "outer")],
)
def test_leaving_a_chain_stops_all_of_it(tmp_path, backend, blocked, capfd):
    setup = functools.partial(Joblib.setup, num_workers=2, backend=backend)
    stuck = [block(tmp_path)] * 9
    # The outer run draws four tasks before it gives a result.
    inner = [repr(value(1))] * 4 + (
        stuck if blocked == "inner" else [repr(task) for task in stuck]
    )

    def run():  # holds the only references
        return setup(eval, setup(eval, inner, batch_size=1), batch_size=1)

    results = run()
    next(results)
    if blocked == "outer":
        next(results)  # draws more
    wait_until(lambda: pids_in(tmp_path))
    del results
    wait_until(lambda: not any(map(is_alive, pids_in(tmp_path))))
    assert capfd.readouterr().err == ""


@pytest.mark.alike
def test_closing_lets_go_of_the_tasks(setup):
    ended = threading.Event()

    def tasks():
        try:
            yield from itertools.count()
        finally:
            ended.set()

    results = setup(abs, tasks())
    next(results)
    results.close()
    assert ended.is_set()


@pytest.mark.once
def test_a_run_that_could_not_be_closed_is_ended_later(
    processes, tmp_path, monkeypatch
):
    call = distributed._call_in_thread

    def fail(function):
        monkeypatch.setattr(distributed, "_call_in_thread", call)
        raise RecursionError

    results = processes(eval, [value(1), *[block(tmp_path)] * 9])
    next(results)
    wait_until(lambda: pids_in(tmp_path))
    monkeypatch.setattr(distributed, "_call_in_thread", fail)
    with pytest.raises(RecursionError):
        results.close()
    del results
    gc.collect()
    wait_until(lambda: not any(map(is_alive, pids_in(tmp_path))))
    wait_until(lambda: not distributed._state.open_runs)


@pytest.mark.locally
def test_a_run_can_be_closed_in_another_thread(stoppable_setup, tmp_path):
    results = stoppable_setup(eval, [value(1), *[block(tmp_path)] * 9])
    reader = threading.Thread(target=next, args=(results,))
    reader.start()
    reader.join()
    wait_until(lambda: len(pids_in(tmp_path)) >= 1)
    results.close()
    wait_until(lambda: not any(map(is_alive, pids_in(tmp_path))))


@pytest.mark.slow
def test_leaving_while_much_is_queued(program):
    source = """
        import itertools, time
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            for task_func, pre_dispatch in (time.sleep, 99), (int, "all"):
                results = Joblib.setup(
                    task_func, [0.001] * 9999, 2, batch_size=1, pre_dispatch=pre_dispatch
                )
                next(results)
                results.close()
            print("left")
    """
    assert output_of(program(source)) == "left\n"


@pytest.mark.slow
def test_leaving_while_other_threads_compute(program):
    source = """
        import itertools, threading
        from yourpackage.distributed import Joblib

        def compute():
            while not done:
                pass

        if __name__ == "__main__":
            done = False
            threads = [threading.Thread(target=compute) for _ in range(3)]
            for thread in threads:
                thread.start()
            results = Joblib.setup(abs, itertools.count(), num_workers=2)
            next(results)
            results.close()
            done = True
            print("left")
    """
    assert output_of(program(source)) == "left\n"


class Search:
    """Draws tasks that may depend on its own results."""

    def __init__(self, setup, tasks):
        self.left = tasks
        self.results = setup(eval, self.tasks(), batch_size=1)

    def tasks(self):
        while self.left:
            yield self.left.pop(0)


@pytest.mark.alike
def test_a_run_that_its_tasks_refer_to_is_collected(stoppable_setup, tmp_path):
    search = Search(stoppable_setup, [value(1), *[block(tmp_path)] * 9])
    next(search.results)
    wait_until(lambda: pids_in(tmp_path))
    reference = weakref.ref(search)
    del search
    gc.collect()
    assert reference() is None
    wait_until(lambda: not any(map(is_alive, pids_in(tmp_path))))


class Knowing:
    """A function that refers to its own run."""

    def __init__(self, setup, tasks):
        self.results = setup(self.work, tasks)

    def work(self, task):
        return eval(task)

    def __getstate__(self):
        return {}  # a generator cannot be sent


@pytest.mark.once
@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_its_function_refers_to_is_collected(name, request, tmp_path):
    ended = threading.Event()

    def tasks():
        try:
            yield from map(value, itertools.count())
        finally:
            ended.set()

    kind = Knowing if name == "threading" else by_value(Knowing)
    knowing = kind(start(request, name), tasks())
    next(knowing.results)
    reference = weakref.ref(knowing)
    del knowing
    # Threads hold the function for as long as they are busy with it.
    wait_until(lambda: gc.collect() >= 0 and reference() is None)
    wait_until(ended.is_set)
    wait_until(lambda: not distributed._state.open_runs)


@pytest.fixture(params=ENGINES)
def any_local_setup(request):
    return start(request, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["main", "thread"])
@pytest.mark.parametrize("collector", ["main", "thread"])
def test_the_collector_does_not_decide_the_order(
    any_local_setup, reader, collector, capfd
):
    def run(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    cycle = [any_local_setup(abs, itertools.count())]
    gc.collect(0)  # now that generator is older than the one of joblib
    read = functools.partial(next, cycle[0])
    read() if reader == "main" else run(read)
    cycle.append(cycle)  # for the garbage collector alone
    del read, cycle
    gc.collect() if collector == "main" else run(gc.collect)
    assert sorted(any_local_setup(abs, [-1, -2, -3])) == [1, 2, 3]
    wait_until(lambda: not distributed._state.open_runs)
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_a_run_left_in_a_thread_that_has_ended_is_collected_in_silence(capfd):
    cycle = [
        Joblib.setup(
            bytes,
            [4_000_000] * 60,
            4,
            batch_size=3,
            pre_dispatch="all",
        )
    ]
    cycle.append(cycle)  # for the garbage collector alone
    thread = threading.Thread(target=next, args=(cycle[0],))
    thread.start()
    thread.join()
    del thread, cycle
    gc.collect()
    wait_until(lambda: not distributed._state.open_runs)
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_a_run_that_is_collected_while_another_uses_the_pool_is_not_waited_for(
    monkeypatch,
):
    assert distributed._state.open_runs == set()
    cycle = [Joblib.setup(abs, range(99), num_workers=2, batch_size=1)]
    cycle.append(cycle)  # for the garbage collector alone
    next(cycle[0])
    (forsaken,) = distributed._state.open_runs
    waits = []
    monkeypatch.setattr(forsaken.ended, "wait", lambda **options: waits.append(options))
    results = Joblib.setup(abs, range(9), num_workers=2, batch_size=1)
    first = next(results)
    submit = distributed._Pool.submit

    def collect(pool, data):
        gc.collect()
        return submit(pool, data)

    monkeypatch.setattr(distributed._Pool, "submit", collect)
    gc.disable()
    try:
        del cycle
        assert first + sum(results) == sum(range(9))
    finally:
        gc.enable()
    assert waits == []
    wait_until(forsaken.ended.is_set)


class UnstoppableThreading(joblib.parallel.ThreadingBackend):
    """A joblib backend that fails when joblib has been told to stop."""

    terminated = threading.Event()

    def stop_call(self):
        raise OSError("cannot stop")

    def terminate(self):
        super().terminate()
        self.terminated.set()


def test_workers_are_stopped_even_if_joblib_fails_to_stop(monkeypatch):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    for _ in Joblib.setup(abs, range(99), 2, backend=UnstoppableThreading()):
        break
    assert UnstoppableThreading.terminated.wait(60)
    assert distributed._state.open_runs == set()
    assert [str(error.exc_value) for error in errors] == ["cannot stop"]


DEADLY_RESULT = f"type('Bad', (), {{'__reduce__': lambda self: ({KILL}, 1)[1]}})()"


@needs_proc
@pytest.mark.parametrize(
    "fault",
    [
        KILL,
        BAD_RESULT,
        *(pytest.param(fault, marks=once) for fault in (EXIT, DEADLY_RESULT)),
        pytest.param(raising("SystemExit()"), marks=once),
    ],
)
def test_a_pool_that_fails_leaves_nothing(tmp_path, fault):
    Joblib.shutdown()
    before, threads, files = children(), set(threading.enumerate()), descriptors()
    tasks = [block(tmp_path), value(1), fault, *[value(1)] * 9]
    results = Joblib.setup(eval, tasks, 2, batch_size=1)
    _, error = collect(results, BaseException)
    assert error is not None
    assert children() == before
    assert not any(map(is_alive, pids_in(tmp_path)))
    del error, results
    wait_until(lambda: set(threading.enumerate()) <= threads)
    gc.collect()
    wait_until(lambda: descriptors() <= files)


@needs_proc
@pytest.mark.slow
def test_runs_leave_nothing(program):
    source = """
        import collections, gc, os, sys
        from yourpackage.distributed import Joblib

        def count():
            gc.collect()
            kinds = collections.Counter(type(item).__name__ for item in gc.get_objects())
            names = "_Run", "_Pool", "_Process", "_Batch", "_ArrayFiles", "Parallel"
            ours = {name: kinds[name] for name in names}
            own = [name for name in os.listdir("/dev/shm") if str(os.getpid()) in name]
            return ours, len(os.listdir("/proc/self/fd")), len(own)

        if __name__ == "__main__":
            options = {"max_nbytes": 10}
            def run():
                numpy = __import__("numpy")
                arrays = [numpy.zeros(99) for _ in range(9)]
                assert sum(Joblib.setup(numpy.sum, arrays, 2, **options)) == 0
                for _ in Joblib.setup(numpy.sum, arrays * 9, 2, batch_size=1, **options):
                    break
                assert len(list(Joblib.setup(abs, range(9), 2, **options))) == 9
            run()
            before = count()
            for _ in range(2):
                run()
            after = count()
            print(after == before or (before, after))
    """
    assert output_of(program(source)) == "True\n"


@pytest.mark.slow
def test_a_run_leaves_no_folder(tmp_path):
    arrays = itertools.repeat(numpy.zeros(300_000))
    options = {"num_workers": 2, "temp_folder": str(tmp_path)}
    for leave in LEAVE:
        leave(Joblib.setup(numpy.sum, arrays, **options))
    _, error = collect(Joblib.setup(numpy.linalg.inv, arrays, **options), Exception)
    assert error is not None
    assert left_in(tmp_path) == []


@needs_proc
@pytest.mark.once
def test_workers_that_are_killed_leave_no_descriptor(processes, tmp_path, fresh):
    def go(number):
        before, after = (meeting(tmp_path, f"{number}{part}") for part in "ab")
        tasks = [*before, KILL, *after]
        results = processes(eval, tasks, batch_size=1, errors="return")
        pids = [item for item in results if isinstance(item, int)]
        assert len(pids) == 4
        assert collect(processes(eval, [KILL]), BrokenExecutor)[1] is not None
        left = processes(eval, [value(1), *[block(tmp_path / f"{number}a")] * 9])
        next(left)
        left.close()
        Joblib.shutdown()

    def count():
        gc.collect()
        return descriptors()

    go(0)  # which starts what stays
    before, threads = count(), threading.active_count()
    for number in range(1, 3):
        go(number)
    wait_until(lambda: threading.active_count() <= threads)
    assert count() <= before


@pytest.mark.parametrize(
    ("function", "tasks", "backend"),
    [
        (int, ["1", "two"], "loky"),
        (int, ["1", "two"], "threading"),
        (abs, [-1, (task for task in ())], "loky"),
        (os._exit, [1, 1], "loky"),
    ],
)
def test_an_error_is_freed_with_its_last_reference(function, tasks, backend):
    def is_alive():
        return any(
            id(item) == number
            for item in gc.get_objects()
            if issubclass(type(item), BaseException)
        )

    gc.collect()
    gc.disable()
    try:
        try:
            list(Joblib.setup(function, tasks, 2, backend=backend))
        except (pickle.PicklingError, ValueError, BrokenExecutor) as error:
            number = id(error)
            assert is_alive()
        assert not is_alive()
    finally:
        gc.enable()


REFUSED = """
    import sys, threading
    from helpers import children
    from yourpackage.distributed import FailedTask, Joblib

    def refuse(self):
        global count
        count += 1
        if count == int(sys.argv[2]):
            raise RuntimeError("can't start new thread")
        start(self)

    if __name__ == "__main__":
        start, threading.Thread.start, count = threading.Thread.start, refuse, 0
        results = Joblib.setup(
            abs, [-1, -2, -3, -4], 3, backend=sys.argv[1], errors=sys.argv[3]
        )
        try:
            print(*sorted(results))
        except RuntimeError as error:
            print(error)
        threading.Thread.start = start
        del results
        Joblib.shutdown()
        print(children())
        print(*sorted(Joblib.setup(abs, [-1, -2], 2, backend=sys.argv[1])))
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("backend", "which", "errors"),
    [
        ("loky", 1, "raise"),
        ("loky", 2, "return"),
        ("loky", 4, "return"),
        ("threading", 1, "return"),
    ],
)
def test_any_thread_that_cannot_be_started_is_an_error_at_once(
    program, backend, which, errors
):
    output = output_of(program(REFUSED, backend, which, errors)).splitlines()
    assert output[1:] == ["[]", "1 2"]
    refused = "can't start new thread"
    if which <= 3:  # that is one of those that run the tasks
        assert output[0] == refused
    else:
        assert output[0] in (refused, "1 2 3 4")


# ------------------------------------------------------------------------------------------------
# Ends cleanly: what tasks have started


def shell(*command):
    """An expression that runs a command, and waits for it."""
    return f"__import__('subprocess').run({command!r}).returncode"


def popen(*command, **options):
    """An expression that starts a command, and forgets about it."""
    started = f"__import__('subprocess').Popen({command!r}, **{options!r})"
    return f"vars(__import__('builtins')).setdefault('kept', []).append({started})"


SLEEPS = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(3600)"]

STARTED = {
    "an orphan": lambda s: shell("sh", "-c", f"sleep {s} & exit 0"),
    "by timeout": lambda s: shell("sh", "-c", f"timeout 999 sleep {s} & exit 0"),
    "in a group of its own": lambda s: popen("sleep", s, process_group=0),
    "that ignores signals": lambda s: shell(
        "sh", "-c", f"trap '' INT TERM HUP; sleep {s} & exit 0"
    ),
}


started = pytest.mark.parametrize("make", STARTED.values(), ids=STARTED)


@pytest.mark.once
@started
def test_what_tasks_have_started_ends_with_a_run_that_is_left(
    processes, make, seconds, tmp_path
):
    tasks = [make(seconds), *[block(tmp_path)] * 3]
    results = processes(eval, tasks, batch_size=1)
    next(results)
    wait_until(lambda: sleeping(seconds) and len(pids_in(tmp_path)) == 2)
    results.close()
    assert not any(map(is_running, pids_in(tmp_path)))
    assert running(seconds) == []


@pytest.mark.once
@started
def test_what_tasks_have_started_ends_with_idle_workers(
    processes, make, seconds, fresh
):
    assert len(list(processes(eval, [make(seconds)]))) == 1
    Joblib.shutdown()
    assert running(seconds) == []


@pytest.mark.once
@started
def test_what_a_dead_worker_has_started_ends_with_it(
    processes, make, seconds, tmp_path
):
    go = tmp_path / "go"
    results = processes(eval, [f"({make(seconds)}, {await_path(go)}, {KILL})"])
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(collect, results, BrokenExecutor)
        wait_until(lambda: sleeping(seconds))
        go.touch()
        assert error.result()[1] is not None
    assert running(seconds) == []


@pytest.mark.once
def test_what_makes_a_session_of_its_own_goes_on(processes, seconds, tmp_path):
    daemon = popen("sleep", seconds, start_new_session=True)
    results = processes(eval, [daemon, *[block(tmp_path)] * 3], batch_size=1)
    next(results)
    wait_until(lambda: sleeping(seconds))
    (sleeper,) = sleeping(seconds)
    assert os.getsid(sleeper) == sleeper
    wait_until(lambda: len(pids_in(tmp_path)) == 2)
    results.close()
    assert not any(map(is_running, pids_in(tmp_path)))
    assert sleeping(seconds) == [sleeper]


@pytest.mark.skipif(os.name != "posix", reason="needs sessions")
def test_whoever_has_the_id_of_a_worker_that_is_gone_is_left_alone():
    with subprocess.Popen(["sleep", "3600"], start_new_session=True) as stranger:
        distributed._kill([types.SimpleNamespace(pid=stranger.pid, poll=lambda: 0)])
        stopped = stranger.poll()
        stranger.kill()
    assert stopped is None


# A task that starts a program, and leaves the ids of both in a folder.
STARTS = """
import os, pathlib, subprocess
program = subprocess.Popen({command!r})
for pid in (program.pid, os.getpid()):
    pathlib.Path({folder!r}, str(pid)).touch()
{then}
"""


def starting(folder, then="program.wait()"):
    """An expression that starts a program, and goes on with *then*."""
    source = STARTS.format(command=SLEEPS, folder=str(folder), then=then)
    return f"exec({source!r}, {{}})"


@pytest.mark.once
@pytest.mark.parametrize("way", ["left", "idle", "dead", "late"])
def test_programs_of_tasks_end_with_their_worker_on_any_system(
    processes, tmp_path, fresh, way
):
    then = {"idle": "", "dead": KILL}.get(way, "program.wait()")
    tasks = [starting(tmp_path, then)] * 2
    options = {"batch_size": 1, "errors": "return"}
    if way == "late":
        options["timeout"] = 1
    results = processes(run, [value(0), *tasks], **options)
    if way == "left":
        assert next(results) == 0
        wait_until(lambda: len(pids_in(tmp_path)) == 4)
        results.close()
    failed, _ = numbers_of(results)
    assert sorted(failed) == ([] if way in ("left", "idle") else [1, 2])
    Joblib.shutdown()
    pids = pids_in(tmp_path)
    assert len(pids) >= 3  # an idle worker may have done both
    wait_until(lambda: not any(map(is_alive, pids)))


KILLED = """
import numpy

def work(task):
    expression, array = task
    assert array.filename  # it lies in a file
    eval(expression)

if __name__ == "__main__":
    tasks = [(sys.argv[1], numpy.zeros(300_000))] * 2
    list(Joblib.setup(work, tasks, 2, batch_size=1, temp_folder=sys.argv[2]))
"""


@pytest.mark.once
@pytest.mark.skipif(
    not (os.name == "nt" or sys.platform == "linux"), reason="there is no life line"
)
def test_nothing_is_left_of_a_program_that_is_killed(begun, tmp_path):
    folder, files = tmp_path / "pids", tmp_path / "files"
    folder.mkdir()
    files.mkdir()
    process = begun(KILLED, starting(folder), files)
    wait_until(lambda: len(pids_in(folder)) == 4)
    assert list(files.iterdir()) != []
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_running, pids_in(folder))))
    wait_until(lambda: list(files.iterdir()) == [])


def blocked(task=None):
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.once
@needs_proc
def test_nothing_that_is_started_blocks_signals(processes):
    def of_threads():
        paths = Path("/proc/self/task").glob("*/status")
        texts = {path: path.read_text().partition("SigBlk:")[2] for path in paths}
        return {path: int(text.split()[0], 16) for path, text in texts.items()}

    Joblib.shutdown()
    before = of_threads()
    mask = "(signal := __import__('signal')).pthread_sigmask(signal.SIG_BLOCK, [])"
    results = processes(eval, itertools.repeat(mask))
    assert next(results) == set()
    new = [mask for path, mask in of_threads().items() if path not in before]
    assert set(new) == {0}
    results.close()
    assert blocked() == set()


@needs_signals
def test_a_program_that_a_task_in_a_thread_has_started_can_be_terminated():
    assert blocked() == set()
    assert list(Joblib.setup(blocked, range(4), 2, backend="threading")) == [set()] * 4
    command = "timeout", "0.1", "sleep", "3600"  # which waits for a signal
    (code,) = Joblib.setup(run, [shell(*command)], 2, backend="threading")
    assert code == 124


LEAVES_THREADS = """
def leave_thread(task):
    threading.Thread(target=threading.Event().wait).start()
    if task == 0:
        return os.getpid()
    threading.Event().wait()

if __name__ == "__main__":
    many = [0] * 4 if sys.argv[1] != "close" else itertools.chain([0], [1] * 9)
    results = Joblib.setup(leave_thread, many, 2, batch_size=1)
    if sys.argv[1] in ("close", "open"):
        pids = {next(results)}
    else:
        pids = set(results)
    if sys.argv[1] == "close":
        results.close()
    if sys.argv[1] == "shutdown":
        Joblib.shutdown()
        for pid in filter(is_alive, pids):
            print(pid, "is left")
    print("ended", *pids)
"""


@pytest.mark.once
@pytest.mark.parametrize("way", ["shutdown", "exit", "close", "open"])
def test_a_thread_that_a_task_leaves_keeps_nothing_waiting(begun, way):
    ended, *pids = output_of(begun(LEAVES_THREADS, way)).split()
    assert ended == "ended"
    assert not any(is_running(int(pid)) for pid in pids)


HOOKS = """
def work(task):
    path = pathlib.Path(sys.argv[1], str(os.getpid()))
    atexit.register(path.touch)
    return os.getpid()

if __name__ == "__main__":
    pids = set(Joblib.setup(work, range(8), 2, batch_size=1))
    Joblib.shutdown()
    assert {int(name) for name in os.listdir(sys.argv[1])} == pids
    print(*sorted(pids))
"""


@pytest.mark.once
def test_a_pool_that_is_stopped_in_peace_runs_the_hooks_of_its_workers(begun, tmp_path):
    (tmp_path / "hooks").mkdir()
    output = output_of(begun(HOOKS, tmp_path / "hooks"))
    assert output.split() == sorted(map(str, pids_in(tmp_path / "hooks")))


@pytest.mark.once
def test_tasks_read_an_empty_standard_input(begun):
    source = """
        def read(task):
            reads = "import sys; sys.stdout.write(sys.stdin.read())"
            command = [sys.executable, "-c", reads]
            child = subprocess.run(command, stdout=subprocess.PIPE).stdout
            return os.read(0, 9), sys.stdin.read(), child

        if __name__ == "__main__":
            print(*set(Joblib.setup(read, range(4), 2)), flush=True)
            print(sys.stdin.readline())
    """
    process = begun(source)  # whose own standard input stays open
    assert process.stdout.readline() == "(b'', '', b'')\n"
    process.stdin.write("for the program")
    assert output_of(process) == "for the program\n"


# ------------------------------------------------------------------------------------------------
# Ends cleanly: a program that ends


@pytest.mark.slow
def test_a_program_whose_runs_end_in_any_way_prints_nothing(program):
    source = """
        import itertools, os, time
        from yourpackage.distributed import Joblib

        def work(task):
            time.sleep(0 if task < 3 else 3600)
            return task

        if __name__ == "__main__":
            for _ in Joblib.setup(work, itertools.count(), num_workers=2):
                break
            for function, timeout in (work, 1), (os._exit, None):
                try:
                    list(Joblib.setup(function, range(9), 2, timeout=timeout))
                except Exception as error:
                    print(isinstance(error, TimeoutError), type(error).__name__)
                print(sum(Joblib.setup(abs, range(10), num_workers=2)))
    """
    expected = "True TimeoutError\n45\nFalse BrokenProcessPool\n45\n"
    assert output_of(program(source)) == expected


OPEN_RUN = """
    import sys, threading
    from yourpackage.distributed import Joblib

    def read():
        assert next(results) == 1

    def read_on():
        for result in results:
            first.set()

    if __name__ == "__main__":
        *tasks, backend, reader = sys.argv[1:]
        first = threading.Event()
        results = Joblib.setup(eval, tasks, num_workers=2, backend=backend)
        if reader == "main":
            read()
        elif reader == "thread":
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
        elif reader == "daemon":
            threading.Thread(target=read_on, daemon=True).start()
            first.wait()
        elif reader == "cycle":
            read()
            box = [results]
            box.append(box)
            del results
        elif reader == "chain":
            results = Joblib.setup(abs, results, num_workers=2, backend=backend)
            read()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "reader"),
    [
        *(
            ("loky", reader)
            for reader in ("main", "thread", "daemon", "cycle", "chain")
        ),
        *(("threading", reader) for reader in ("main", "daemon")),
    ],
)
def test_leaving_the_interpreter_with_a_run_open(program, tmp_path, backend, reader):
    folder = tmp_path / "pids"
    folder.mkdir()
    tasks = [value(1)] * (4 if reader == "chain" else 1) + [block(folder)] * 9
    process = program(OPEN_RUN, *tasks, backend, reader)
    assert output_of(process) == ""
    wait_until(lambda: not any(map(is_alive, pids_in(folder))))


@pytest.mark.slow
def test_reading_on_as_the_interpreter_exits_is_an_error(program):
    source = """
        import atexit, itertools, os, threading, time
        from yourpackage.distributed import Joblib

        def read_on():
            try:
                for result in results:
                    print(result)
            except RuntimeError as error:
                print(error, threading.active_count())

        atexit.register(read_on)
        tasks = map(str, itertools.count())
        results = Joblib.setup(os.mkdir, tasks, num_workers=2, batch_size=1)
        next(results)
        while not os.path.exists("3"):
            time.sleep(0.01)
    """
    *received, end = output_of(program(source)).splitlines()
    assert set(received) <= {"None"}
    assert end == "the run was ended, since the interpreter exits 1"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"errors": "return", "timeout": 60}])
def test_a_run_as_the_interpreter_exits_has_workers_of_its_own(program, options):
    source = f"""
        import atexit
        from yourpackage.distributed import Joblib

        def run():
            print(sorted(Joblib.setup(abs, [-1, -2], num_workers=2, **{options})))

        atexit.register(run)  # before the hook of the module, which comes first
        run()
    """
    assert output_of(program(source)) == "[1, 2]\n[1, 2]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "way"),
    [("loky", "exit"), ("loky", "break"), ("threading", "exit")],
)
def test_leaving_a_program_that_handles_sigterm(program, backend, way):
    source = """
        import signal, sys, time
        from helpers import children
        from yourpackage.distributed import Joblib

        def busy(task):
            end = time.monotonic() + (0.1 if task == 0 else 2)
            while time.monotonic() < end:
                pass

        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            for _ in Joblib.setup(busy, range(99), num_workers=2, backend=sys.argv[1]):
                if sys.argv[2] == "exit":
                    sys.exit()
                break
            print(*children())
    """
    output = output_of(program(source, backend, way))
    assert output == ("" if way == "exit" else "\n")


@needs_signals
@pytest.mark.slow
def test_stopping_on_sigterm(program, tmp_path):
    source = """
        import signal, sys
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            list(Joblib.setup(eval, sys.argv[1:], num_workers=2))
    """
    folder = tmp_path / "pids"
    folder.mkdir()
    process = program(source, *[block(folder)] * 9)
    wait_until(lambda: pids_in(folder))
    process.terminate()
    assert (*process.communicate(), process.returncode) == ("", "", 143)
    wait_until(lambda: not any(map(is_alive, pids_in(folder))))


ENDED = """
import numpy

def work(task):
    number, array = task
    assert array.filename  # it lies in a file
    print(os.getpid(), flush=True)
    if sys.argv[1] == "busy":
        subprocess.run([*sys.argv[3:-1], "sleep", sys.argv[-1]])

if __name__ == "__main__":
    tasks = [(number, numpy.zeros(300_000)) for number in range(2)]
    results = Joblib.setup(work, tasks, 2, batch_size=1)
    next(results)
    next(results)  # which does not end the run: its workers are idle
    print("idle", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "crash":
        ctypes.string_at(0)
    os._exit(3)
"""


WAYS = ["SIGTERM", "SIGHUP", "SIGSEGV", "SIGKILL"]


def end_program(process, way):
    """End a program that `ENDED` is the source of."""
    if way in ("crash", "_exit"):
        process.stdin.write("\n")
        process.stdin.flush()
    else:
        process.send_signal(way)
    return process.wait()


def has_files(pid):
    return any(Path("/dev/shm").glob(f"*_{pid}_*"))


def check_that_nothing_is_left(process, way, pids, seconds):
    assert has_files(process.pid)
    status = end_program(process, way)
    expected = {"_exit": 3, "crash": -signal.SIGSEGV}
    assert status == (expected[way] if isinstance(way, str) else -way)
    wait_until(lambda: not any(map(is_running, pids)))
    wait_until(lambda: not running(seconds))
    wait_until(lambda: not has_files(process.pid))


@pytest.mark.once
@pytest.mark.parametrize("way", [getattr(signal, way, None) for way in WAYS], ids=WAYS)
def test_busy_workers_and_their_programs_end_with_a_program_that_is_killed(
    begun, way, seconds
):
    process = begun(ENDED, "busy", "", seconds)
    pids = {int(process.stdout.readline()) for _ in range(2)}
    wait_until(lambda: len(sleeping(seconds)) == 2)
    check_that_nothing_is_left(process, way, pids, seconds)


@pytest.mark.once
@pytest.mark.parametrize("way", ["crash", "_exit"])
def test_idle_workers_end_with_a_program_that_ends_in_any_way(begun, way, seconds):
    process = begun(ENDED, "idle", way, seconds)
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines.pop() == "idle\n"
    check_that_nothing_is_left(process, way, set(map(int, lines)), seconds)


BIG = "bytes(3_000_000)"


def closed(setup, folder):
    results = setup(itertools.repeat(BIG))
    next(results)
    results.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "closed"),
    [
        *(
            pytest.param("descriptor", closed, marks=needs_exec)
            for closed in ([0], [1], [2], [0, 1, 2])
        ),
        ("None", [0, 1, 2]),
        ("object", [0, 1, 2]),
    ],
)
def test_standard_streams_may_be_closed(program, tmp_path, closed, way):
    source = """
        import os, sys
        if sys.argv[2] == "descriptor" and len(sys.argv) < 4:
            for number in eval(sys.argv[1]):
                os.close(number)
            os.execv(sys.executable, [sys.executable, *sys.argv, "closed"])
        from yourpackage.distributed import Joblib

        def work(task):
            print(task)
            return task

        if __name__ == "__main__":
            for number in eval(sys.argv[1]):
                name = ("stdin", "stdout", "stderr")[number]
                if sys.argv[2] == "None":
                    setattr(sys, name, None)
                elif sys.argv[2] == "object":
                    getattr(sys, name).close()
            for backend in ("loky", "threading"):
                if sys.argv[2] != "object" or backend != "threading":
                    total = sum(Joblib.setup(work, range(9), 2, backend=backend))
                    with open("total.txt", "a") as file:
                        print(total, file=file)
            os._exit(0)
    """
    program(source, closed, way).wait()
    totals = (tmp_path / "total.txt").read_text().split()
    assert totals == ["36"] * (1 if way == "object" else 2)


@pytest.mark.slow
def test_standard_streams_may_have_few_methods(program, tmp_path):
    source = """
        import os, sys
        from yourpackage.distributed import Joblib

        class Console:
            text = ""

            def write(self, text):
                type(self).text += text

            def __len__(self):
                return 0

        class Flushed(Console):
            def flush(self):
                pass

        if __name__ == "__main__":
            real = sys.stdout, sys.stderr
            for kind in Console, Flushed:
                sys.stdout = sys.stderr = kind()
                for backend in "loky", "threading":
                    for verbose in 0, 11, 51:
                        options = {"backend": backend, "verbose": verbose}
                        assert sum(Joblib.setup(abs, range(4), 2, **options)) == 6
                assert "Done   4 out of   4" in kind.text
            sys.stdout, sys.stderr = real
            print("over")
    """
    assert output_of(program(source)) == "over\n"


OTHER_MAIN_THREAD = """
    import os, sys

    def work():
        sys.path.insert(0, os.getcwd())
        sys.modules["numpy"] = None  # it warns, in a subinterpreter
        from yourpackage.distributed import Joblib

        for backend in "loky", "threading":
            results = Joblib.setup(abs, range(4), 2, backend=backend)
            print(sum(results), flush=True)
            results = Joblib.setup(abs, range(99999), 2, backend=backend)
            next(results)
            results.close()
        Joblib.shutdown()

    if __name__ == "__main__":
        if sys.version_info >= (3, 13):
            import _interpreters

            with open(__file__) as file:
                source = file.read().partition("if __name__")[0] + "work()"
            print(_interpreters.exec(_interpreters.create("legacy"), source))
        else:
            import _thread, time

            over = []
            assert "threading" not in sys.modules  # it takes the first for the main one
            _thread.start_new_thread(lambda: over.append(work()), ())
            while not over:
                time.sleep(0.01)
            print(*over)
"""


@pytest.mark.once
def test_the_main_thread_may_be_another_than_threading_takes_it_for(program):
    assert output_of(program(OTHER_MAIN_THREAD)).split() == ["6", "6", "None"]


@needs_proc
@pytest.mark.slow
def test_there_may_be_no_proc(program, tmp_path, monkeypatch):
    hidden = """
        import builtins, os

        def hiding(function):
            def call(path, *arguments, **options):
                if str(path).startswith("/proc"):
                    raise FileNotFoundError(2, "hidden", path)
                return function(path, *arguments, **options)
            return call

        for owner, name in (os, "open"), (os, "stat"), (os, "listdir"), (builtins, "open"):
            setattr(owner, name, hiding(getattr(owner, name)))
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hidden))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = """
        import os, time
        from helpers import children
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            print(os.path.exists("/proc"))
            print(sum(Joblib.setup(abs, range(4), 2)))
            results = Joblib.setup(time.sleep, [0, 3600, 3600], 2)
            next(results)
            results.close()
            Joblib.shutdown()
            print(children())
    """
    output = output_of(program(source))
    assert output.splitlines() == ["False", "6", "[]"]


# ------------------------------------------------------------------------------------------------
# Ends cleanly: interrupts


INTERRUPTED_WAIT = """
    import sys
    from yourpackage.distributed import Joblib

    if __name__ == "__main__":
        results = Joblib.setup(eval, sys.argv[2:], num_workers=2, backend=sys.argv[1])
        try:
            next(results)
        except KeyboardInterrupt:
            print("interrupted")
        print(*sorted(Joblib.setup(abs, [-1, -2], num_workers=2, backend=sys.argv[1])))
"""


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kill"),
    [
        ("loky", "kill"),
        ("loky", "killpg"),  # at a terminal, where workers get it, too
        ("threading", "kill"),
    ],
)
def test_an_interrupt_ends_the_wait_and_prints_nothing(
    program, tmp_path, backend, kill
):
    folder = tmp_path / "pids"
    folder.mkdir()
    process = program(INTERRUPTED_WAIT, backend, *[block(folder)] * 9)
    wait_until(lambda: pids_in(folder))
    getattr(os, kill)(process.pid, signal.SIGINT)
    assert output_of(process) == "interrupted\n1 2\n"
    assert backend == "threading" or not any(map(is_alive, pids_in(folder)))


@needs_signals
@pytest.mark.slow
def test_an_interrupt_at_the_terminal_while_workers_start_prints_nothing(program):
    source = """
        import sys
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            print("begins", flush=True)
            try:
                list(Joblib.setup(abs, range(9), num_workers=4))
                sys.stdin.read()
            except KeyboardInterrupt:
                pass
    """
    for delay in (0.05, 0.15, 0.3):
        process = program(source)
        assert process.stdout.readline() == "begins\n"
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)  # the workers, too
        assert output_of(process) == ""


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("backend", ENGINES)
def test_interrupts_at_any_time(program, backend):
    output = output_of(program(INTERRUPTED, backend, 4, 0))
    assert output == "4 interrupts, 0 left\n"


INTERRUPTED_START = """
import select

def interrupt(delay):
    select.select([], [], [], delay)
    os.kill(os.getpid(), signal.SIGINT)

def workers():
    # Each leads a session; so does this program, and no helper of joblib does.
    parents, sessions = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(name)], sessions[int(name)] = int(fields[1]), int(fields[3])
    ours = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return [pid for pid in ours if sessions[pid] != os.getsid(0)]

if __name__ == "__main__":
    count, seed, longest = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    chance = random.Random(seed)
    for _ in range(count):
        delay = chance.uniform(0.002, longest)
        thread = threading.Thread(target=interrupt, args=(delay,))
        try:
            thread.start()
            list(Joblib.setup(abs, range(9), 2, batch_size=1))
            thread.join()
        except KeyboardInterrupt:
            pass
        thread.join()
        if chance.random() < 0.5:
            Joblib.shutdown()  # so that the next run starts a pool
    assert sum(Joblib.setup(abs, range(9), 2)) == 36
    Joblib.shutdown()
    while _state.open_runs:
        time.sleep(0.01)
    while workers():
        time.sleep(0.01)
    print("done")
"""


@needs_signals
@pytest.mark.once
@pytest.mark.timeout(200)
def test_interrupts_at_every_moment_of_the_start_of_a_pool(begun):
    assert output_of(begun(INTERRUPTED_START, 12, 1, 0.5)) == "done\n"


# `interrupt_main` is what happens if another thread takes the signal.
INTERRUPTED_THERE = """
import _thread

def interrupting(function, when, is_meant):
    calls = itertools.count(1)

    def call(*arguments):
        meant = is_meant(*arguments) and next(calls) == 2
        if meant and when == "before":
            _thread.interrupt_main()
        function(*arguments)
        if meant and when == "after":
            _thread.interrupt_main()

    return call

if __name__ == "__main__":
    owner = threading.Thread
    is_meant = lambda thread: getattr(thread._target, "__name__", "") == "attend"
    start, owner.start = owner.start, interrupting(owner.start, sys.argv[1], is_meant)
    try:
        list(Joblib.setup(abs, range(9), 2, batch_size=1))
    except KeyboardInterrupt:
        print("interrupted")
    owner.start = start
    while _state.open_runs:
        time.sleep(0.01)
    Joblib.shutdown()
    print(children(), "left")
"""


@pytest.mark.once
@pytest.mark.timeout(60)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_at_a_moment_of_the_start_of_a_pool(begun, when):
    output = output_of(begun(INTERRUPTED_THERE, when))
    assert output == "interrupted\n[] left\n"


def test_an_interrupt_while_threads_start_leaves_none(monkeypatch):
    before, start, started = threading.active_count(), threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == 1:
            signal.raise_signal(signal.SIGINT)

    results = Joblib.setup(abs, range(9), 2, backend="threading")
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    monkeypatch.undo()
    del results
    started.clear()
    wait_until(lambda: threading.active_count() <= before)


@pytest.mark.locally
def test_an_interrupt_of_the_tasks_comes_at_once(setup):
    def tasks():
        yield value(1)
        raise KeyboardInterrupt

    received, error = collect(setup(eval, tasks()), KeyboardInterrupt)
    assert error is not None
    assert received == []
    assert sorted(setup(abs, [-1, -2])) == [1, 2]


@pytest.mark.once
@pytest.mark.parametrize(("errors", "batch_size"), [("raise", 5), ("return", 1)])
def test_an_interrupt_while_a_result_is_unpickled_ends_the_run(
    processes, errors, batch_size
):
    reduced = "(__import__('signal').raise_signal, (2,))"
    interrupts = f"type('R', (), {{'__reduce__': lambda self: {reduced}}})()"
    tasks = [value(0), interrupts, *map(value, range(9))]
    with pytest.raises(KeyboardInterrupt):
        list(processes(run, tasks, errors=errors, batch_size=batch_size))
    assert sorted(processes(abs, [-1, -2])) == [1, 2]


class Alarm(Exception):
    """What a handler of the program raises."""


def raising_handler(number, frame):
    raise Alarm(number)


class Handler:
    """A handler that is an object, or one of its methods."""

    def __call__(self, number, frame):
        raise Alarm(number)

    method = __call__


class SignalsAsItIsPickled:
    def __reduce__(self):
        signal.raise_signal(USER_SIGNAL)
        return int, ()


# A result: it is sent by its name.
SIGNALS_AS_IT_IS_UNPICKLED = (
    "type('R', (), {'__reduce__': lambda self: (__import__('signal').raise_signal, "
    f"({int(USER_SIGNAL)},))}})()"
)


def signalling_tasks():
    yield slow(3600)  # not waited for
    signal.raise_signal(USER_SIGNAL)
    yield value(1)


SIGNALLED = {
    "drawn": signalling_tasks,
    "pickled": lambda: [value(0), SignalsAsItIsPickled(), *[value(1)] * 9],
    "unpickled": lambda: [value(0), SIGNALS_AS_IT_IS_UNPICKLED, *[value(1)] * 9],
}


@contextlib.contextmanager
def handled(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("errors", "batch_size"), [("raise", 1), ("return", 4)])
@pytest.mark.parametrize("moment", SIGNALLED)
def test_what_a_handler_raises_comes_at_once_and_as_it_is(
    processes, moment, batch_size, errors, capfd
):
    options = {"errors": errors, "batch_size": batch_size, "return_as": "generator"}
    with handled(USER_SIGNAL, raising_handler):
        results = processes(run, SIGNALLED[moment](), **options)
        received, error = collect(results, Exception)
    assert (type(error), error.args) == (Alarm, (USER_SIGNAL,))
    assert received in ([], [0])
    assert "raising_handler" in "".join(traceback.format_tb(error.__traceback__))
    assert list(results) == []
    wait_until(lambda: not distributed._state.open_runs)
    assert sorted(processes(abs, [-1, -2])) == [1, 2]
    assert capfd.readouterr().err == ""


def renaming_handler(number, frame):
    number = signal.Signals(number).name
    raise Alarm(number)


@pytest.mark.once
@pytest.mark.parametrize(
    "handler",
    [Handler(), Handler().method, renaming_handler],
    ids=["object", "method", "renaming"],
)
def test_a_handler_may_be_any_callable(processes, handler):
    with handled(USER_SIGNAL, handler):
        _, error = collect(processes(run, SIGNALLED["pickled"]()), Exception)
    assert type(error) is Alarm


@pytest.mark.once
def test_a_time_out_of_a_handler_is_none_of_files(processes, monkeypatch):
    def time_out(number, frame):
        raise TimeoutError("of the program")

    def dump(array, file):
        signal.raise_signal(USER_SIGNAL)

    monkeypatch.setattr(joblib, "dump", dump)
    tasks = [numpy.zeros(300_000)]
    with handled(USER_SIGNAL, time_out):
        _, error = collect(processes(len, tasks, errors="return"), TimeoutError)
    assert str(error) == "of the program"


def test_an_error_of_a_function_that_has_changed_its_arguments_is_its_own():
    def function(*args):
        (args,) = args
        raise ValueError("mine")

    _, error = collect(SingleProcess.setup(function, [1]), ValueError)
    assert error.args == ("mine",)


class CannotBeLookedInto(dict):
    calls = 0

    def items(self):
        self.calls += 1
        if self.calls > 2:  # to pickle it in its batch and alone
            raise LookupError("stay out")
        return super().items()


@pytest.mark.once
def test_an_error_of_pickling_is_not_looked_for_where_that_fails(processes):
    bad = CannotBeLookedInto(lock=threading.Lock())
    (failed,) = processes(id, [bad], errors="return")
    assert type(failed.error) is pickle.PicklingError


def look_up(frame, name):
    return frame.f_locals[name]


def test_a_function_that_is_given_the_frame_of_its_caller_is_no_handler(processes):
    class Unpicklable:
        def __reduce__(self):
            return look_up(inspect.currentframe(), "missing")

    def tasks():
        yield from (-1, Unpicklable(), -2)
        yield look_up(inspect.currentframe(), "missing")

    options = {"errors": "return", "return_as": "generator"}
    received, error = collect(processes(abs, tasks(), **options), KeyError)
    assert type(error) is KeyError
    assert [type(result) for result in received] == [int, FailedTask, int]


@pytest.mark.once
@pytest.mark.parametrize("what", ["task_func", "initargs"])
def test_what_a_handler_raises_as_a_run_starts_comes_as_it_is(processes, what):
    signals = SignalsAsItIsPickled()
    options = {"initializer": len, "initargs": (signals,)} if what == "initargs" else {}
    function = functools.partial(max, signals) if what == "task_func" else abs
    with handled(USER_SIGNAL, raising_handler):
        received, error = collect(processes(function, range(9), **options), Exception)
    assert (type(error), received) == (Alarm, [])
    assert sorted(processes(abs, [-1, -2])) == [1, 2]


@needs_signals
@pytest.mark.parametrize("number", ["SIGALRM", pytest.param("SIGTERM", marks=once)])
@pytest.mark.parametrize("setup", ENGINES, indirect=True)
def test_what_a_handler_raises_ends_the_wait(setup, number, tmp_path, capfd):
    number = getattr(signal, number)
    (tmp_path / "pids").mkdir()
    waits = f"({mark(tmp_path / 'pids')}, {await_path(tmp_path / 'go')})"

    def send():
        wait_until(lambda: len(list((tmp_path / "pids").iterdir())) >= 1)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    with handled(number, raising_handler):
        thread.start()
        with pytest.raises(Alarm):
            list(setup(run, [waits] * 9, errors="return"))
    thread.join()
    (tmp_path / "go").touch()
    if setup.keywords["backend"] == "loky":
        assert not any(map(is_alive, pids_in(tmp_path / "pids")))
    assert sorted(setup(abs, [-1, -2])) == [1, 2]
    assert capfd.readouterr().err == ""


ALARMS = """
class Alarm(Exception):
    pass

def handler(*_):
    raise Alarm

def tasks():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        yield [0.0005]

if __name__ == "__main__":
    signal.signal(signal.SIGALRM, handler)
    chance = random.Random(int(sys.argv[1]))
    count = 0
    for number in range(20):
        # The first ones come while workers start.
        delay = chance.uniform(0.001, 0.4)
        try:
            results = Joblib.setup(lambda task: time.sleep(*task), tasks(), 2)
            signal.setitimer(signal.ITIMER_REAL, delay)
            for result in results:
                pass
        except Alarm:
            count += 1
        del results
        if chance.random() < 0.5:
            Joblib.shutdown()
    Joblib.shutdown()
    while _state.open_runs:
        time.sleep(0.01)
    print(count, children())
"""


@needs_signals
@pytest.mark.once
def test_alarms_at_any_time(begun):
    assert output_of(begun(ALARMS, 1)) == "20 []\n"


# ------------------------------------------------------------------------------------------------
# The caller's thread


@pytest.mark.alike
def test_tasks_are_drawn_in_the_thread_and_context_of_the_consumer(setup):
    variable = contextvars.ContextVar("variable")
    variable.set("consumer's")
    inside = False
    seen = []

    def tasks():
        for task in range(50):
            seen.append((threading.get_ident(), variable.get(None), inside))
            yield task

    results = setup(abs, tasks())
    for _ in range(50):
        inside = True
        next(results)
        inside = False
    assert next(results, None) is None
    assert set(seen) == {(threading.get_ident(), "consumer's", True)}


@pytest.mark.locally
def test_a_database_cursor_can_feed(setup):
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        counting = "SELECT 0 UNION ALL SELECT n + 1 FROM r WHERE n < 99"
        rows = f"WITH RECURSIVE r(n) AS ({counting}) SELECT n FROM r"
        assert sorted(setup(sum, database.execute(rows))) == list(range(100))


@pytest.mark.locally
def test_a_run_can_be_read_by_one_thread_after_another(setup):
    results = setup(abs, range(100))
    received = []
    for _ in range(10):
        thread = threading.Thread(
            target=lambda: received.extend(itertools.islice(results, 9))
        )
        thread.start()
        thread.join()
    received.extend(results)
    assert sorted(received) == list(range(100))


@pytest.mark.locally
def test_runs_can_be_read_in_threads(setup):
    received = []

    def read():
        received.append(sum(setup(abs, range(100))))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == [4950] * 4


READER = """
def read():
    results = Joblib.setup(abs, iter(range(200)), 2, batch_size=1)
    received = [next(results)]
    first.set()
    threading.main_thread().join()
    assert not threading.main_thread().is_alive()
    received.extend(results)
    print(sorted(received) == list(range(200)), flush=True)

if __name__ == "__main__":
    first = threading.Event()
    threading.Thread(target=read).start()
    first.wait()
"""


@pytest.mark.once
def test_a_reader_goes_on_when_the_main_thread_has_ended(begun):
    assert output_of(begun(READER)) == "True\n"


# ------------------------------------------------------------------------------------------------
# Composable


@pytest.mark.parametrize("depth", [2, pytest.param(3, marks=pytest.mark.locally)])
@pytest.mark.parametrize(
    "return_as",
    [pytest.param("generator", marks=pytest.mark.locally), "generator_unordered"],
)
def test_runs_can_be_chained(setup, depth, return_as):
    stage = iter(range(200))
    for _ in range(depth):
        stage = setup(abs, stage, return_as=return_as)
    assert Counter(stage) == Counter(range(200))


@pytest.mark.locally
def test_runs_can_be_interleaved(setup):
    one, two = setup(abs, range(100)), setup(abs, range(100, 200))
    pairs = list(zip(one, two, strict=True))
    assert sorted(itertools.chain(*pairs)) == list(range(200))


@pytest.mark.slow
def test_runs_with_other_options_overlap(tmp_path):
    options = [
        {},
        {"max_nbytes": None, "num_workers": 3},
        {"temp_folder": str(tmp_path), "mmap_mode": "c"},
        {"num_workers": 1},
    ]
    runs = [
        Joblib.setup(abs, range(100), **{"num_workers": 2, **more}) for more in options
    ]
    for _ in range(10):
        for run in runs:
            next(run)
    assert [len(list(run)) for run in runs] == [90] * 4


def run_in_threads(count):
    return sum(Joblib.setup(abs, range(count), num_workers=2, backend="threading"))


def test_a_run_can_be_started_in_a_task():
    results = Joblib.setup(
        run_in_threads, [10, 20, 30], num_workers=2, backend="threading"
    )
    assert sorted(results) == [45, 190, 435]


@pytest.mark.slow
def test_a_run_in_a_task_of_another(program):
    source = """
        from yourpackage.distributed import Joblib

        def total(count):
            return sum(Joblib.setup(abs, range(count)))

        if __name__ == "__main__":
            print(*sorted(Joblib.setup(total, [10, 20], num_workers=2)))
    """
    assert output_of(program(source)) == "45 190\n"


NESTED = """
    import itertools, os, sys
    from helpers import children
    from yourpackage.distributed import FailedTask, Joblib

    def dies(task):
        if task == 1:
            os.kill(os.getpid(), 9)
        return task

    def run(backend, way):
        setup = __import__("functools").partial(Joblib.setup, backend=backend)
        if way == "read":
            return sum(setup(abs, range(9), 2))
        if way == "left":
            for _ in setup(abs, itertools.count(), 2, batch_size=1):
                break
            return len(children())
        return len(list(setup(dies, range(9), 2, errors="return", batch_size=1)))

    def inner(arguments):
        return run(*arguments)

    if __name__ == "__main__":
        nested, way = sys.argv[1:]
        print(*Joblib.setup(inner, [(nested, way)], 2))
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("inner", "way", "expected"),
    [
        ("loky", "read", 36),
        ("multiprocessing", "read", 36),
        ("loky", "left", 0),
        ("loky", "dies", 9),
    ],
)
def test_a_run_of_processes_in_a_task_of_another(program, inner, way, expected):
    assert output_of(program(NESTED, inner, way)) == f"{expected}\n"


@pytest.mark.slow
def test_an_error_of_a_run_in_a_task(program):
    source = """
        from yourpackage.distributed import Joblib

        def fail(task):
            raise ValueError(task)

        def total(count):
            return sum(Joblib.setup(fail, [count, count], num_workers=2))

        if __name__ == "__main__":
            try:
                list(Joblib.setup(total, [1], num_workers=2))
            except ValueError as error:
                print(error)
    """
    assert output_of(program(source)) == "1\n"


@pytest.mark.once
def test_a_time_out_of_a_nested_run_comes_home(program):
    source = """
        import multiprocessing, pickle, sys, time
        from yourpackage.distributed import Joblib

        def inner(backend):
            if multiprocessing.current_process().name == "MainProcess":
                raise AssertionError
            return list(
                Joblib.setup(time.sleep, [3600], 2, backend=backend, timeout=0.3)
            )

        if __name__ == "__main__":
            try:
                list(Joblib.setup(inner, ["loky"], 2))
            except TimeoutError as error:
                error = pickle.loads(pickle.dumps(error))
                print(
                    type(error).__name__,
                    isinstance(error, multiprocessing.TimeoutError),
                    "timeout of 0.3 seconds" in str(error),
                )
    """
    assert output_of(program(source)) == "TimeoutError True True\n"


LOADED_BY_WORKERS = """
    import os
    from yourpackage.distributed import Joblib

    def where(task):
        return os.getpid()

    def start(*_):
        with open("started", "a+") as file:
            print(os.getpid(), file=file, flush=True)
            file.seek(0)
            if len({{*file}}) > 6:
                os._exit(9)  # there would be no end
        pids = {{*Joblib.setup(where, range(6), 2, **{options})}}
        if os.environ.setdefault("PROGRAM", str(os.getpid())) != str(os.getpid()):
            assert pids == {{os.getpid()}}

    class Task:
        __setstate__ = start

        def __init__(self):
            self.state = 1

    if {how!r} == "import":
        start()
"""

LOADING = """
    import os, sys
    from yourpackage.distributed import Joblib

    if __name__ == "__main__":
        os.environ["PROGRAM"] = str(os.getpid())
        how = sys.argv[1]
        try:
            import experiment

            initializer = experiment.start if how == "initializer" else None
            tasks = [experiment.Task() if how == "task" else 0] * 4
            options = {"initializer": initializer}
            print(len([*Joblib.setup(experiment.where, tasks, 2, **options)]))
        except Exception as error:
            print(error)
"""


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("import", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("import", {"backend": "loky"}),
                ("import", {"initializer": print}),
                ("initializer", {}),
                ("initializer", {"backend": "loky"}),
                ("task", {}),
                ("task", {"backend": "loky"}),
            ]
        ),
    ],
)
def test_runs_that_workers_start_as_they_load_something_are_nested(
    program, tmp_path, how, options
):
    shown = repr(options).replace(repr(print), "print")
    module = textwrap.dedent(LOADED_BY_WORKERS).format(how=how, options=shown)
    (tmp_path / "experiment.py").write_text(module)
    output = output_of(program(LOADING, how)).strip()
    if options:
        assert "experiment starts worker processes" in output
        assert "guard it by `if __name__ == '__main__':`" in output
    else:
        assert output == "4"
    assert len({*(tmp_path / "started").read_text().split()}) <= 5


@pytest.mark.slow
def test_a_run_of_processes_that_is_not_read_as_it_is_loaded_is_no_error(
    program, tmp_path
):
    module = """
        import os
        from yourpackage.distributed import Joblib

        def where(task):
            return os.getpid()

        others = Joblib.setup(where, [1], 2, backend="loky")
        more = Joblib.setup(where, [1], 2, initializer=print)
    """
    (tmp_path / "experiment.py").write_text(textwrap.dedent(module))
    source = """
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            import experiment

            print(len([*Joblib.setup(experiment.where, [1] * 4, 2)]))
    """
    assert output_of(program(source)) == "4\n"


# ------------------------------------------------------------------------------------------------
# Independent


@pytest.mark.slow
@by_either_name
def test_each_run_has_workers_of_its_own(processes):
    def run(number, workers):
        prepared = f"import os; os.environ['NUMBER'] = '{number}'"
        seen = f"({PID}, __import__('os').environ['NUMBER'])"
        tasks = [f"(__import__('time').sleep(0.01), {seen})[1]"] * 50
        options = {"initializer": exec, "initargs": (prepared,), "batch_size": 1}
        return processes(eval, tasks, num_workers=workers, **options)

    counts = [2, 3, 2]
    runs = list(itertools.starmap(run, enumerate(counts)))
    for _ in range(10):
        seen = [{next(results)} for results in runs]
    for number, results in enumerate(runs):
        seen[number].update(results)
        assert {value for _, value in seen[number]} == {str(number)}
        assert 1 <= len(seen[number]) <= counts[number]
    pids = [{pid for pid, _ in pairs} for pairs in seen]
    assert len(set().union(*pids)) == sum(map(len, pids))


def disturb_by_error(setup, folder):
    assert collect(setup(eval, [raising("KeyError()")] * 4), KeyError)[1] is not None


def disturb_by_closing(setup, folder):
    results = setup(abs, itertools.count(), batch_size=1)
    next(results)
    results.close()


def disturb_by_timeout(setup, folder):
    with pytest.raises(TimeoutError):
        next(setup(eval, [await_path(folder / "never")] * 2, timeout=0.1))
    (folder / "never").touch()  # where it cannot be stopped


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(disturb_by_error, marks=pytest.mark.alike),
        pytest.param(disturb_by_closing, marks=pytest.mark.alike),
        disturb_by_timeout,
    ],
)
@pytest.mark.parametrize(
    "return_as",
    [pytest.param("generator", marks=pytest.mark.locally), "generator_unordered"],
)
def test_runs_do_not_disturb_each_other(setup, tmp_path, disturb, return_as):
    tasks = [value(0), await_path(tmp_path / "go", 1), *map(value, range(2, 30))]
    run = setup(eval, tasks, batch_size=1, return_as=return_as)
    received = [next(run)]
    disturb(setup, tmp_path)  # while it is at work
    (tmp_path / "go").touch()
    received.extend(run)
    assert sorted(received) == list(range(30))
    assert return_as == "generator_unordered" or received == list(range(30))


def test_a_run_that_is_left_stops_though_others_go_on(processes, tmp_path):
    (tmp_path / "pids").mkdir()
    other = processes(eval, [value(0), await_path(tmp_path / "go", 1)])
    received = [next(other)]
    left = processes(eval, [value(0), *[block(tmp_path / "pids")] * 9])
    assert next(left) == 0
    wait_until(lambda: pids_in(tmp_path / "pids"))
    left.close()
    assert not any(map(is_alive, pids_in(tmp_path / "pids")))
    (tmp_path / "go").touch()
    assert [*received, *other] == [0, 1]


@pytest.mark.once
@pytest.mark.parametrize("fault", [KILL, BAD_RESULT])
def test_the_fault_of_a_run_is_its_own(processes, fault):
    resting = processes(abs, range(100), batch_size=1)
    next(resting)
    _, error = collect(processes(eval, [fault] * 2), Exception)
    assert error is not None
    assert sum(1 for _ in resting) == 99


def test_two_runs_do_not_mix_up_their_functions(remembering):
    model = by_value(Model)
    one, two = (remembering(model(data).objective, range(40)) for data in "ab")
    pairs = list(zip(one, two, strict=True))
    assert {(a[3], b[3]) for a, b in pairs} == {("a", "b")}


@pytest.mark.slow
def test_a_plain_joblib_beside_does_not_disturb(tmp_path):
    (tmp_path / "started").mkdir()

    def stuck(task):
        path = tmp_path / "started" / str(task)
        return joblib.delayed(eval)(f"{touch(path)} or {await_path(tmp_path / 'go')}")

    def work():
        joblib.Parallel(n_jobs=2, pre_dispatch="all", batch_size=1)(
            map(stuck, range(20))
        )

    worker = threading.Thread(target=work)
    worker.start()
    wait_until(lambda: len(list((tmp_path / "started").iterdir())) == 2)
    assert sorted(Joblib.setup(abs, [-1, -2], num_workers=2)) == [1, 2]
    for _ in Joblib.setup(abs, itertools.count(), num_workers=3):
        break
    (tmp_path / "go").touch()
    worker.join()


def test_a_backend_that_is_in_use_is_not_disturbed():
    backend = joblib.parallel.ThreadingBackend()
    with joblib.Parallel(n_jobs=2, backend=backend) as parallel:
        for _ in range(2):
            assert parallel(joblib.delayed(abs)(-task) for task in range(9)) == [
                *range(9)
            ]
            assert len(list(Joblib.setup(abs, range(9), 2, backend=backend))) == 9


@pytest.mark.parametrize(
    "kind",
    [
        joblib.parallel.LokyBackend,
        joblib.parallel.ThreadingBackend,
        joblib.parallel.MultiprocessingBackend,
        joblib.parallel.SequentialBackend,
    ],
)
def test_an_instance_is_not_changed(kind):
    backend = kind()
    before = dict(vars(backend))
    results = Joblib.setup(abs, range(20), num_workers=2, backend=backend)
    assert sorted(results) == list(range(20))
    assert vars(backend) == before
    assert type(backend) is kind


def test_reducers_of_the_user_are_not_changed(processes):
    empty, own = {}, {Task: lambda task: (int, ("7",))}
    backward = {}
    options = {"max_nbytes": 10, "backward_reducers": backward}
    arrays = [numpy.zeros(99)] * 3
    list(processes(numpy.sum, arrays, forward_reducers=empty, **options))
    assert empty == backward == {}
    results = processes(str, [Task()] * 3, forward_reducers=own, **options)
    assert list(results) == ["7"] * 3
    assert list(own) == [Task]
    assert backward == {}


# ------------------------------------------------------------------------------------------------
# Kept warm


def pids_of(**options):
    """Return the ids of two workers: each has a task, which waits for that of the other."""
    with tempfile.TemporaryDirectory() as folder:
        met = f"len(__import__('os').listdir({folder!r})) == 2"
        wait = f"[*iter(lambda: {met} or __import__('time').sleep(0.01), True)]"
        tasks = [f"({mark(folder)}, {wait}, {PID})[2]"] * 2
        options = {"num_workers": 2, "batch_size": 1} | options
        return set(Joblib.setup(eval, tasks, **options))


class Large:
    def __init__(self):
        self.data = bytes(200_000_000)

    def call(self, task):
        return os.getpid()


@needs_proc
@pytest.mark.once
@pytest.mark.timeout(30)
def test_idle_workers_keep_no_bytes_of_the_function(fresh):
    def megabytes(pid):
        text = Path(f"/proc/{pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    (pid,) = set(Joblib.setup(by_value(Large)().call, [1], 2, batch_size=1))
    wait_until(lambda: megabytes(pid) < 150)


@pytest.mark.slow
def test_idle_workers_are_kept_for_the_next_run():
    Joblib.shutdown()
    pids = pids_of()
    assert pids_of(backend="multiprocessing") == pids
    assert pids_of(max_nbytes=None, temp_folder="/tmp") == pids
    assert pids_of(initializer=exec, initargs=("",)).isdisjoint(pids)
    assert pids_of() == pids
    assert set(map(is_alive, pids)) == {True}
    Joblib.shutdown()
    assert set(map(is_alive, pids)) == {False}
    assert pids_of().isdisjoint(pids)


@pytest.mark.slow
def test_idle_workers_are_kept_across_nested_loops_and_chains():
    Joblib.shutdown()
    setup = functools.partial(Joblib.setup, abs, num_workers=2, batch_size=1)
    inner = [pids_of() for _ in setup(range(3))]
    assert inner == inner[:1] * 3
    for _ in range(3):
        assert len(list(setup(setup(range(9))))) == 9
    assert len(distributed._state.idle_pools) <= 3


@pytest.mark.once
def test_workers_that_an_array_has_prepared_are_kept():
    Joblib.shutdown()
    options = {"initializer": numpy.sum, "initargs": (numpy.zeros(300_000),)}
    pids = pids_of(**options)
    assert pids_of(**options) == pids


def test_an_error_that_leaves_nothing_out_leaves_the_workers():
    assert len(list(Joblib.setup(abs, range(9), num_workers=2))) == 9
    workers = workers_now()
    assert workers
    _, error = collect(Joblib.setup(eval, ["1 / 0"], num_workers=2), ZeroDivisionError)
    assert error is not None
    assert list(Joblib.setup(abs, [], num_workers=2)) == []
    assert workers <= workers_now()


@pytest.mark.parametrize("change", ["environment", "directory", "path"])
def test_workers_are_not_kept_for_other_surroundings(monkeypatch, tmp_path, change):
    seen = "__import__('os').environ.get('LEVEL'), __import__('os').getcwd(), __import__('sys').path[-1]"
    assert len(set(Joblib.setup(eval, [seen] * 9, num_workers=2))) == 1
    monkeypatch.setenv("LEVEL", "2") if change == "environment" else None
    monkeypatch.chdir(tmp_path) if change == "directory" else None
    monkeypatch.setattr(
        sys, "path", [*sys.path, str(tmp_path)]
    ) if change == "path" else None
    expected = (os.environ.get("LEVEL"), os.getcwd(), sys.path[-1])
    assert set(Joblib.setup(eval, [seen] * 9, num_workers=2)) == {expected}


RELOADED = """
    import importlib, pathlib, sys
    from yourpackage.distributed import Joblib

    sys.dont_write_bytecode = True
    source = "def factor(task): return {} * task, __import__('os').getpid()"

    def write(number):
        pathlib.Path("helper.py").write_text(source.format(number))

    def run():
        import user

        factor = (user.use(1)[0],)  # as it is here
        results = [*Joblib.setup(user.use, [1] * 9, 2, batch_size=1)]
        return factor, {result[0] for result in results}, {r[1] for r in results}

    def drawn():
        yield 1
        write(30)  # of another size, or bytecode could be taken for it
        importlib.reload(sys.modules["helper"])

    if __name__ == "__main__":
        pathlib.Path("user.py").write_text(
            "def use(task):\\n    import helper\\n    return helper.factor(task)"
        )
        write(2)
        how = sys.argv[1]
        if how == "first":  # imported by the program in the run, or before it
            import helper
        print(*run()[:2])
        if how == "drawn":
            import user

            print(len([*Joblib.setup(user.use, drawn(), 2, batch_size=1)]))
        else:
            write(30)
        if how == "anew":
            del sys.modules["helper"]
        elif how != "drawn":
            importlib.reload(sys.modules["helper"])
        print(*run()[:2])
        before = run()[2]
        import this_is_new
        after = run()[2]
        print(len(before | after) <= 2)
"""


@pytest.mark.parametrize(
    "how",
    [
        "first",
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in ("later", "anew", "drawn")
        ),
    ],
)
def test_workers_that_have_imported_what_is_reloaded_are_not_kept(
    program, tmp_path, how
):
    (tmp_path / "this_is_new.py").touch()
    output = output_of(program(RELOADED, how)).splitlines()
    assert output[0] == "(2,) {2}"
    assert output[-2:] == ["(30,) {30}", "True"]


@pytest.mark.slow
def test_workers_are_not_kept_if_autoreload_has_changed_a_module_in_place(program):
    source = """
        import os, pathlib, sys, types
        from yourpackage.distributed import Joblib

        def run():
            return {*Joblib.setup(helper.factor, [1] * 9, 2, batch_size=1)}

        if __name__ == "__main__":
            path = pathlib.Path("helper.py")
            path.write_text("def factor(task): return task, __import__('os').getpid()")
            import helper

            name = "IPython.extensions.autoreload"
            sys.modules[name] = types.ModuleType(name)
            before = run()
            print(len(before | run()) <= 2)
            path.write_text(path.read_text().replace("(task):", "(task): task *= 30;"))
            os.utime(path, (1e9, 1e9))
            exec(path.read_text(), vars(new := types.ModuleType("helper")))
            helper.factor.__code__ = new.factor.__code__  # which is all that it does
            print({task for task, _ in run()})
    """
    assert output_of(program(source)) == "True\n{30}\n"


def test_lazy_modules_stay_lazy_when_a_run_starts(monkeypatch):
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(name)

    class NoModule:
        __slots__ = ()
        __getattr__ = Lazy.__getattribute__

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "no_module", NoModule())
    pids = pids_of()
    assert pids_of() == pids


@pytest.mark.once
def test_workers_that_were_started_elsewhere_are_not_kept(fresh, monkeypatch, tmp_path):
    here = os.getcwd()
    tasks = [value(0), KILL, KILL, *meeting(tmp_path, "first")]
    options = {"num_workers": 2, "batch_size": 1, "errors": "return"}
    options["return_as"] = "generator"
    results = Joblib.setup(eval, iter(tasks), pre_dispatch=2, **options)
    assert next(results) == 0
    monkeypatch.chdir(tmp_path)  # where those start that take the places of the dead
    assert len(list(results)) == 4
    monkeypatch.chdir(here)
    tasks = [
        f"({task}, __import__('os').getcwd())[1]" for task in meeting(tmp_path, "after")
    ]
    assert set(Joblib.setup(eval, tasks, num_workers=2, batch_size=1)) == {here}


@pytest.mark.skipif(
    os.name != "posix", reason="it is not gone before the workers that have it"
)
@pytest.mark.slow
def test_a_directory_that_is_gone_after_a_short_run(program, tmp_path):
    source = """
        import os, tempfile
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            root = os.getcwd()
            for _ in range(3):
                with tempfile.TemporaryDirectory() as folder:
                    os.chdir(folder)
                    assert list(Joblib.setup(abs, [-1], num_workers=4)) == [1]
                    os.chdir(root)
    """
    assert output_of(program(source)) == ""


def test_idle_workers_keep_nothing_of_a_run():
    array = numpy.zeros(300_000)
    reference = weakref.ref(array)
    assert list(Joblib.setup(numpy.sum, [array] * 9, 2)) == [0] * 9
    del array
    gc.collect()
    assert reference() is None


class Watched:
    """Leaves a file named like its process when it is let go there."""

    def __init__(self, folder):
        self.folder = folder
        self.itself = self  # for the garbage collector alone

    def __del__(self):
        with open(os.path.join(self.folder, str(os.getpid())), "w"):
            pass

    def work(self, task):
        return eval(task)


@pytest.mark.once
@pytest.mark.parametrize("end", ["exhausted", "an error", "errors returned"])
def test_an_idle_worker_keeps_no_function(fresh, tmp_path, end):
    (tmp_path / "gone").mkdir()
    watched = by_value(Watched)(str(tmp_path / "gone"))
    tasks = meeting(tmp_path, "before")
    errors = "return" if end == "errors returned" else "raise"
    if end != "exhausted":
        tasks.append(raising("KeyError()"))
    options = {"batch_size": 1, "errors": errors, "return_as": "generator"}
    results = Joblib.setup(watched.work, tasks, 2, **options)
    received, error = collect(results, KeyError)
    pids = {item for item in received if isinstance(item, int)}
    assert len(pids) == 2
    assert (error is not None) == (end == "an error")
    wait_until(lambda: set(pids_in(tmp_path / "gone")) == pids)
    assert all(map(is_running, pids))
    assert set(Joblib.setup(eval, meeting(tmp_path, "after"), 2)) == pids
    del watched
    gc.collect()


@pytest.mark.once
def test_idle_workers_are_stopped_when_their_time_is_over(fresh, tmp_path):
    options = {"num_workers": 2, "batch_size": 1, "idle_worker_timeout": 0.2}
    pids = set(Joblib.setup(eval, meeting(tmp_path, "first"), **options))
    wait_until(lambda: not any(map(is_alive, pids)))
    assert pids.isdisjoint(workers_now())
    again = set(Joblib.setup(eval, meeting(tmp_path, "second"), **options))
    assert len(again) == 2
    assert again.isdisjoint(pids)
    wait_until(lambda: not any(map(is_alive, again)))


@pytest.mark.once
def test_workers_that_serve_again_in_time_are_not_stopped(fresh, tmp_path):
    options = {"num_workers": 2, "batch_size": 1, "idle_worker_timeout": 0.2}
    pids = set(Joblib.setup(eval, meeting(tmp_path, "first"), **options))
    if pids <= workers_now():  # else it has taken too long here
        results = Joblib.setup(eval, meeting(tmp_path, "second"), **options)
        second = {next(results)}
        # Another pool comes and goes in the meantime.
        other = functools.partial(Joblib.setup, initializer=exec, initargs=("",))
        others = set(other(eval, meeting(tmp_path, "others"), **options))
        wait_until(lambda: not any(map(is_alive, others)))
        second |= set(results)
        assert len(second) == 2


@pytest.mark.once
@pytest.mark.parametrize("number", [SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_while_idle_is_replaced(fresh, tmp_path, number):
    setup = functools.partial(Joblib.setup, eval, num_workers=2, batch_size=1)
    pids = set(setup(meeting(tmp_path, "first")))
    killed = min(pids)
    os.kill(killed, number)
    wait_until(lambda: killed not in workers_now())
    again = set(setup(meeting(tmp_path, "second")))
    assert len(again) == 2
    assert again & pids == pids - {killed}


@pytest.mark.once
def test_warm_workers_that_die_as_a_run_begins_cost_nothing(fresh, tmp_path):
    pids = set(Joblib.setup(eval, meeting(tmp_path, "first"), 2, batch_size=1))
    for pid in pids:
        os.kill(pid, SIGKILL)
    results = list(Joblib.setup(abs, range(6), 2, errors="return"))
    assert sorted(results) == [*range(6)]


SLOW = """
import os, time
try:
    os.close(os.open({first!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    while not os.path.exists({go!r}):
        time.sleep(0.01)
"""


@pytest.mark.once
@pytest.mark.parametrize("count", [1, 2])
def test_a_short_run_does_not_wait_for_a_worker_that_starts_slowly(
    processes, tmp_path, fresh, count
):
    go = tmp_path / "go"
    code = SLOW.format(first=str(tmp_path / "first"), go=str(go))
    options = {"initializer": exec, "initargs": (code,), "batch_size": 1}
    before = workers_now()
    first = set(processes(eval, [PID] * count, **options))
    assert len(first) == 1
    assert not go.exists()
    waiting = workers_now() - before
    assert first <= waiting
    go.touch()
    second = set(processes(eval, meeting(tmp_path, "after"), **options))
    assert len(second) == 2
    assert waiting <= second


# ------------------------------------------------------------------------------------------------
# Nothing is lost


def test_an_error_of_a_task(any_setup):
    results = any_setup(
        eval, [value(1), value(2), raising("KeyError('key', 3)"), value(4)]
    )
    received, error = collect(results, Exception)
    assert received == [1, 2]
    assert type(error) is KeyError
    assert error.args == ("key", 3)
    assert list(results) == []


@pytest.mark.alike
def test_an_error_comes_after_what_was_received_before(setup, tmp_path):
    setup = functools.partial(setup, batch_size=1)
    check_what_was_received_comes_first(setup, tmp_path, "1 / 0", ZeroDivisionError)


def test_an_error_of_the_backend_comes_after_what_was_received_before():
    FailingThreading.reported.clear()
    results = Joblib.setup(abs, range(10), num_workers=2, backend=FailingThreading())
    received = [next(results)]
    wait_until(lambda: len(FailingThreading.reported) == 4)
    rest, error = collect(results, OSError)
    assert sorted([*received, *rest]) == [0, 1, 2, 3]
    assert error.args == ("no more",)


@pytest.mark.locally
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"batch_size": 7}])
def test_an_error_of_the_tasks_comes_after_all_results(any_setup, options):
    def tasks():
        yield from range(30)
        raise LookupError("no more", 30)

    received, error = collect(any_setup(abs, tasks(), **options), LookupError)
    assert received == list(range(30))
    assert error.args == ("no more", 30)


@pytest.mark.locally
@pytest.mark.parametrize("options", [{}, {"pre_dispatch": "all"}])
def test_tasks_may_raise_what_ends_a_generator(any_setup, options):
    def tasks():
        yield -1
        raise GeneratorExit

    received, error = collect(any_setup(abs, tasks(), **options), GeneratorExit)
    assert received == [1]
    assert error is not None


# Takes numbers; every backend can send it.
reciprocal_of = functools.partial(operator.truediv, 1)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    tasks=st.lists(st.integers(-3, 9), max_size=40),
    backend=st.sampled_from(ENGINES),
    batch_size=st.sampled_from(["auto", 1, 2, 7, 50]),
    pre_dispatch=st.sampled_from(["all", 1, "2 * n_jobs"]),
)
def test_a_failing_task_costs_no_other_result(tasks, backend, batch_size, pre_dispatch):
    expected, expected_error = collect(
        SingleProcess.setup(reciprocal_of, tasks), Exception
    )
    received, error = collect(
        Joblib.setup(
            reciprocal_of,
            iter(tasks),
            2,
            backend=backend,
            batch_size=batch_size,
            pre_dispatch=pre_dispatch,
            return_as="generator",
        ),
        Exception,
    )
    assert received == expected
    assert type(error) is type(expected_error)
    assert error is None or error.args == expected_error.args


@each_fault
def test_what_cannot_be_sent_costs_nothing_before_it_and_names_its_task(processes, bad):
    tasks = [value(0), value(1), bad, value(3)]
    results = processes(eval, tasks, batch_size=4, return_as="generator")
    received, error = collect(results, Exception)
    assert received == [0, 1]
    assert re.search("(?i)pickle", f"{type(error)} {error}")
    assert error.__notes__[0].startswith("Task 2 (counted from 0): ")
    assert sorted(processes(abs, [-1, -2])) == [1, 2]


def test_a_task_that_is_changed_after_it_was_drawn_arrives_as_it_was(processes):
    def tasks():
        task = [0]
        for task[0] in range(40):
            yield task
        task[0] = -1

    results = processes(sum, tasks(), batch_size=1)
    assert sorted(results) == list(range(40))


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_a_task_that_the_consumer_changes_arrives_as_it_was_drawn(
    processes, batch_size
):
    drawn = []

    def tasks():
        for number in range(60):
            drawn.append([number])
            yield drawn[-1]

    received = []
    for result in processes(sum, tasks(), batch_size=batch_size):
        received.append(result)
        for task in drawn:
            task[0] = -1
    assert sorted(received) == list(range(60))


# ------------------------------------------------------------------------------------------------
# No hang: workers that die


@pytest.mark.parametrize(
    ("processes", "death"),
    [
        ("loky", KILL),
        pytest.param("loky", EXIT_IN_PEACE, marks=once),
        pytest.param("multiprocessing", EXIT, marks=once),
    ],
    indirect=["processes"],
)
def test_a_worker_that_dies_is_an_error(processes, death, capfd):
    tasks = [value(1), death, *map(value, range(20))]
    received, error = collect(processes(eval, tasks), Exception)
    assert isinstance(error, BrokenExecutor)
    assert Counter(received) <= Counter([1, *range(20)])
    assert sorted(processes(abs, range(10))) == list(range(10))
    assert capfd.readouterr().err == ""


def test_a_worker_that_dies_costs_nothing_that_was_received(processes, tmp_path):
    check_what_was_received_comes_first(processes, tmp_path, KILL, BrokenExecutor)


DIES_WHILE_IT_SENDS = """
import os, sys, threading

def watch(thread):
    while True:
        frame = sys._current_frames()[thread]
        while frame is not None:
            # Of multiprocessing's connections:
            if frame.f_code.co_name == ("_send" if os.name == "posix" else "_send_bytes"):
                os.kill(os.getpid(), 9)
            frame = frame.f_back

threading.Thread(target=watch, args=(threading.get_ident(),), daemon=True).start()
"""


@pytest.mark.slow
def test_a_worker_that_dies_while_it_sends_is_an_error():
    # No end of the pipe tells of it, since the other worker holds the pipe as well.
    task = f"exec({DIES_WHILE_IT_SENDS!r}, {{}}) or bytes(100_000_000)"
    _, error = collect(Joblib.setup(eval, [task], num_workers=2), BrokenExecutor)
    assert error is not None
    assert sorted(Joblib.setup(abs, range(10), num_workers=2)) == list(range(10))


def signal_self(name):
    return f"__import__('os').kill(__import__('os').getpid(), {signal.Signals[name]})"


@needs_signals
@pytest.mark.once
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_exit_codes_of_workers_have_names(processes, errors):
    expected = {
        signal_self("SIGSEGV"): "exit code -11 (SIGSEGV).",
        signal_self("SIGABRT"): "exit code -6 (SIGABRT).",
        signal_self("SIGKILL"): "exit code -9 (SIGKILL, as when memory runs out).",
        EXIT: "exit code 7.",
        EXIT_IN_PEACE: "exit code 0.",
    }
    for death, text in expected.items():
        results = processes(eval, [death], errors=errors)
        received, error = collect(results, BrokenExecutor)
        assert str(error or received[0].error).startswith(
            f"a worker process has died: {text} Task 0 "
        )


@pytest.mark.once
def test_exit_codes_of_windows_have_names():
    files = distributed._ArrayFiles({"max_nbytes": 1, "mmap_mode": "r"})
    for code, name in (
        (0xC0000005, "access violation"),
        (0xC00000FD, "stack overflow"),
    ):
        text = distributed._exit_code_text(code, files)
        assert text == f"exit code {code:#x} ({name})"
    assert distributed._exit_code_text(0xC0000001, files) == f"exit code {0xC0000001}"


writes_in_c = lambda array: (
    __import__("ctypes").memset(array.__array_interface__["data"][0], 0, 8) > 0
)


@needs_signals
@pytest.mark.once
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_a_task_that_writes_to_a_mapped_array_from_c_is_told_what_to_do(
    processes, errors
):
    tasks = [numpy.zeros(300_000)]
    results = processes(writes_in_c, tasks, errors=errors)
    received, error = collect(results, BrokenExecutor)
    text = str(error or received[0].error)
    assert "(SIGSEGV, as when C code writes to a read-only array. Arrays of" in text
    assert "mmap_mode='c'" in text
    assert list(processes(writes_in_c, tasks, mmap_mode="c")) == [True]
    received, error = collect(
        processes(eval, [signal_self("SIGSEGV")], mmap_mode="c"), BrokenExecutor
    )
    assert "read-only" not in str(error)


@needs_shell
@pytest.mark.once
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_a_program_that_serves_as_no_worker_is_an_error(begun, errors):
    source = f"""
    if __name__ == "__main__":
        multiprocessing.set_executable("/bin/true")
        try:
            list(Joblib.setup(abs, range(9), 2, errors={errors!r}))
        except Exception as error:
            print(type(error).__name__, error)
    """
    output = output_of(begun(source))
    expected = "died as it started: exit code 0, and nothing was read from it: "
    assert f"BrokenProcessPool a worker process has {expected}" in output
    assert "/bin/true" in output
    assert "freeze_support()" in output


@needs_proc
def test_what_a_task_starts_does_not_hold_the_connection(processes):
    code = """
import os
names = [int(name) for name in os.listdir("/proc/self/fd")]
for fd in names:
    try:
        if os.get_inheritable(fd):
            held.append(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
"""
    task = f"(held := [], exec({code!r}, {{'held': held}}))[0]"
    (held,) = processes(eval, [task])
    assert held  # its standard streams
    assert not any("socket" in name for name in held)


def test_whatever_an_attendant_meets_is_reported(processes, monkeypatch):
    def fail(worker, job):
        raise OSError("no descriptor is free")

    monkeypatch.setattr(distributed._Attendant, "do", fail)
    _, error = collect(processes(abs, range(9), errors="return"), OSError)
    assert error.args == ("no descriptor is free",)


@needs_shell
@pytest.mark.once
@pytest.mark.parametrize("options", [{}, {"errors": "return", "timeout": 60}])
def test_sockets_may_be_without_blocking(begun, options):
    # As those of gevent are, whose own methods wait instead.
    source = f"""
    import socket
    pair = socket.socketpair

    class Socket(socket.socket):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            super().setblocking(False)

        def setblocking(self, flag):
            pass

        settimeout = setblocking

    socket.socketpair = lambda: [Socket(fileno=end.detach()) for end in pair()]
    socket.socket = Socket
    if __name__ == "__main__":
        for size in (1, 1_000_000):
            tasks = [b"x" * size] * 9
            print(sum(map(len, Joblib.setup(lambda task: task, tasks, 2, **{options}))))
    """
    assert output_of(begun(source)) == "9\n9000000\n"


@pytest.mark.once
def test_the_error_of_a_dead_worker_is_shown_as_it_is():
    _, error = collect(Joblib.setup(eval, [KILL] * 2, num_workers=2), BrokenExecutor)
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names == ["collect", "_results"]


@pytest.mark.slow
def test_a_file_that_hides_a_module_of_python_disturbs_no_worker(program, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "random.py").write_text("raise ImportError")
    source = """
        import os
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            import random
            os.chdir("folder")
            print(sum(Joblib.setup(abs, range(9), num_workers=2)))
    """
    assert output_of(program(source)) == "36\n"


# ------------------------------------------------------------------------------------------------
# No hang: timeout


def test_timeout(setup, tmp_path):
    # Of Ray, the start of workers counts.
    timeout = 3 if setup.keywords["backend"] == "ray" else 1
    tasks = [value(1), value(2), await_path(tmp_path / "go")]
    received, error = collect(setup(eval, tasks, timeout=timeout), Exception)
    (tmp_path / "go").touch()
    assert sorted(received) == [1, 2]
    assert isinstance(error, TimeoutError)
    assert isinstance(error, multiprocessing.TimeoutError)
    assert f"timeout of {timeout} seconds" in str(error)
    assert sorted(setup(abs, [-1, -2], timeout=60)) == [1, 2]


@pytest.mark.locally
def test_timeout_of_nothing_and_of_more_than_a_life(setup, tmp_path):
    for timeout in (0, 1e-9):
        with pytest.raises(TimeoutError):
            next(setup(eval, [await_path(tmp_path / "go")], timeout=timeout))
    (tmp_path / "go").touch()
    assert list(setup(abs, [-1], timeout=1e12)) == [1]


@pytest.mark.locally
def test_a_timeout_tells_which_task_it_was(setup, tmp_path):
    tasks = [await_path(tmp_path / "go", number) for number in range(9)]
    with pytest.raises(TimeoutError) as caught:
        next(setup(eval, tasks, timeout=0.5, batch_size=1))
    (tmp_path / "go").touch()
    expected = r"4 are out, of which the oldest batch is: Task 0 \(counted from 0\): "
    if setup.keywords["backend"] == "loky":
        expected = (
            r"the timeout of 0.5 seconds; it was .*\. Task [01] \(counted from 0\): "
        )
    assert re.search(expected, str(caught.value))


def timed_out():
    results = Joblib.setup(run, [slow(3600)], 2, timeout=0.2, errors="return")
    return next(results).error


def test_a_time_out_is_shown_by_the_name_that_everybody_knows():
    error = timed_out()
    assert isinstance(error, TimeoutError)
    assert isinstance(error, multiprocessing.TimeoutError)
    (line,) = traceback.format_exception_only(type(error), error)
    assert line.startswith("TimeoutError: a task has taken longer than the timeout of")
    assert repr(error).startswith("TimeoutError(")


@pytest.mark.once
def test_neither_start_nor_initializer_count_to_the_timeout(processes):
    Joblib.shutdown()
    options = {"initializer": exec, "initargs": ("import time; time.sleep(1)",)}
    results = processes(abs, range(9), timeout=0.5, **options)
    assert sorted(results) == list(range(9))


@pytest.mark.once
def test_the_timeout_is_the_same_in_a_batch_as_alone(processes):
    tasks = [slow(0.7, number) for number in range(12)]
    tasks[8] = slow(1.6, 8)
    options = {"timeout": 1, "errors": "return", "batch_size": 6}
    results = list(processes(run, tasks, **options))
    failed, others = numbers_of(results)
    assert (failed, sorted(others)) == ([8], [*range(8), *range(9, 12)])


@pytest.mark.once
def test_waiting_for_a_worker_does_not_count_to_the_timeout(processes):
    tasks = [slow(0.3, number) for number in range(5)]
    options = {"timeout": 1, "batch_size": 1, "pre_dispatch": "all", "num_workers": 1}
    assert sorted(processes(run, tasks, **options)) == list(range(5))


@pytest.mark.once
def test_a_slow_reader_does_not_count_to_the_timeout(processes):
    tasks = map(value, range(12))
    options = {"batch_size": 1, "return_as": "generator"}
    results = processes(run, tasks, timeout=0.5, **options)
    received = [next(results)]
    for result in results:
        received.append(result)
        if len(received) == 2:
            time.sleep(1)
    assert sorted(received) == list(range(12))


class SlowToUnpickle:
    def __setstate__(self, state):
        time.sleep(0.3)

    def __getstate__(self):
        return {"key": 1}


class SlowToPickle:
    def __reduce__(self):
        time.sleep(0.3)
        return abs, (-1,)


@pytest.mark.once
@pytest.mark.parametrize("kind", [SlowToUnpickle, SlowToPickle])
def test_other_tasks_and_results_that_travel_do_not_count_to_the_timeout(
    processes, kind
):
    kind = by_value(kind)
    if kind.__name__ == "SlowToPickle":
        function, tasks = (lambda task: kind()), [1] * 10
    else:
        function, tasks = (lambda task: 1), [kind() for _ in range(10)]
    results = processes(function, tasks, timeout=1, batch_size=5)
    assert list(results) == [1] * 10


@pytest.mark.once
def test_no_result_is_lost_by_replies_that_take_long(processes):
    # Each reply carries so much that tasks are done while it is on its way.
    function = lambda task: (__import__("time").sleep(0.002), b"x" * 500_000)[1]
    results = processes(function, range(300), num_workers=1, timeout=1, batch_size=300)
    assert sum(1 for _ in results) == 300


@pytest.mark.once
@pytest.mark.skipif(os.name != "posix", reason="a function of POSIX")
def test_tasks_that_hold_the_lock_of_the_interpreter_are_not_taken_for_hanging(
    processes,
):
    # Nothing else runs in the worker until the call has ended.
    function = lambda task: __import__("ctypes").PyDLL(None).usleep(600_000)
    options = {"timeout": 1, "batch_size": 4, "errors": "return"}
    assert list(processes(function, range(8), **options)) == [0] * 8


@pytest.mark.once
def test_results_that_are_sent_before_the_last_do_not_count_to_the_timeout(processes):
    kind = by_value(SlowToPickle)
    function = lambda task: (time.sleep(0.02), kind())[1]
    results = processes(function, range(16), timeout=1, batch_size=8)
    assert list(results) == [1] * 16


class HangsInPickle:
    def __reduce__(self):
        time.sleep(3600)


@pytest.mark.once
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_result_that_hangs_while_it_is_pickled_takes_too_long(processes, batch_size):
    kind = by_value(HangsInPickle)
    function = lambda task: kind() if task == 2 else task
    options = {"timeout": 1, "batch_size": batch_size, "errors": "return"}
    results = list(processes(function, range(8), **options))
    failed, others = numbers_of(results)
    assert sorted([*failed, *others]) == list(range(8))
    assert 2 in failed
    assert len(failed) <= batch_size
    for error in (item.error for item in results if isinstance(item, FailedTask)):
        assert isinstance(error, TimeoutError)


@needs_signals
@pytest.mark.once
def test_a_worker_that_does_not_take_its_task_is_replaced(processes, monkeypatch):
    Joblib.shutdown()
    monkeypatch.setattr(distributed, "_START_PATIENCE", 4)
    others, tasks = workers_now(), [b"", bytes(5_000_000), b"1"]
    options = {"timeout": 1, "batch_size": 1, "pre_dispatch": 1, "errors": "return"}
    results = processes(len, tasks, num_workers=1, **options)
    assert next(results) == 0
    (worker,) = workers_now() - others
    os.kill(worker, signal.SIGSTOP)
    assert list(results) == [5_000_000, 1]
    assert not is_alive(worker)


class BuildsOnItsFirstCall:
    solver = None

    def run(self, task):
        if self.solver is None:
            time.sleep(3600)
        return task


@pytest.mark.parametrize("code", [0, 3, 255])
def test_an_exit_code_that_is_none_of_a_signal_has_no_name(code):
    files = distributed._ArrayFiles({"max_nbytes": None, "mmap_mode": "r"})
    assert distributed._exit_code_text(code, files) == f"exit code {code}"


FIRST = "first in its worker: what task_func builds on its first call counts"


@pytest.mark.once
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_time_out_tells_that_the_task_was_the_first_of_its_worker(
    processes, batch_size
):
    function = by_value(BuildsOnItsFirstCall)().run
    options = {"timeout": 0.5, "errors": "return", "batch_size": batch_size}
    for more in ({}, {"maxtasksperchild": 3}):
        results = list(processes(function, range(3), **options, **more))
        assert len(results) == 3
        assert all(FIRST in str(result.error) for result in results)
    _, error = collect(processes(function, range(3), timeout=0.5), TimeoutError)
    assert FIRST in str(error)


@pytest.mark.once
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_a_time_out_tells_so_of_no_other_task(processes, batch_size):
    options = {"timeout": 0.5, "errors": "return", "batch_size": batch_size}
    tasks = [*[slow(0.01)] * 4, slow(3600), slow(3600)]  # all but these are sent
    results = list(processes(run, tasks, **options, num_workers=1))
    first, second = [result for result in results if isinstance(result, FailedTask)]
    assert FIRST not in str(first.error)
    assert FIRST in str(second.error)  # it is, in a worker in place of another one


@pytest.mark.once
def test_who_takes_too_long_is_killed_with_all_that_it_has_started(processes, tmp_path):
    source = f"""
import os, pathlib, subprocess
program = subprocess.Popen({SLEEPS!r})
apart = subprocess.Popen({SLEEPS!r}, start_new_session=True)
for pid in (program.pid, os.getpid()):
    pathlib.Path({str(tmp_path)!r}, str(pid)).touch()
apart.kill()
apart.wait()
program.wait()
"""
    hangs = f"exec({source!r}, {{}})"
    results = processes(
        run, [value(0), hangs], timeout=2, batch_size=1, errors="return"
    )
    received = list(results)
    (error,) = [item.error for item in received if isinstance(item, FailedTask)]
    assert "Task 1 (counted from 0)" in str(error)
    pids = pids_in(tmp_path)
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.once
def test_a_worker_that_is_not_ready_in_time_is_an_error(processes, monkeypatch, capfd):
    Joblib.shutdown()
    others = workers_now()
    monkeypatch.setattr(distributed, "_START_PATIENCE", 1)
    options = {"initializer": time.sleep, "initargs": (3600,)}
    results = processes(abs, range(9), timeout=0.1, errors="return", **options)
    received, error = collect(results, TimeoutError)
    assert received == []
    assert "a worker was not ready after 1 seconds" in str(error)
    wait_until(lambda: workers_now() <= others)
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_a_worker_that_hangs_as_python_starts_is_an_error(
    processes, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(3600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(distributed, "_START_PATIENCE", 1)
    _, error = collect(processes(abs, range(9), timeout=0.1), TimeoutError)
    assert "a worker was not ready after 1 seconds" in str(error)


@pytest.mark.once
def test_a_timeout_that_is_longer_than_the_patience_is_that_of_starts(
    processes, monkeypatch
):
    monkeypatch.setattr(distributed, "_START_PATIENCE", 0.1)
    options = {"initializer": time.sleep, "initargs": (1,)}
    assert sorted(processes(abs, range(9), timeout=60, **options)) == list(range(9))


@pytest.mark.once
def test_threads_keep_the_timeout_as_the_wait_for_anything(tmp_path):
    tasks = [value(0), await_path(tmp_path / "go")]
    options = {"errors": "return", "timeout": 1, "batch_size": 1}
    results = Joblib.setup(run, tasks, 2, backend="threading", **options)
    received, error = collect(results, TimeoutError)
    (tmp_path / "go").touch()
    assert received == [0]
    assert "no task has completed within the timeout of 1 seconds" in str(error)


@pytest.mark.once
def test_in_threads_the_timeout_is_for_the_wait_not_for_the_run():
    results = Joblib.setup(time.sleep, [0.3] * 8, 2, backend="threading", timeout=1)
    assert len(list(results)) == 8


@pytest.mark.once
def test_in_threads_what_completes_out_of_order_is_waited_for_as_well():
    tasks = [slow(1.6), *[slow(0.3)] * 6]
    options = {"timeout": 1, "return_as": "generator", "pre_dispatch": "all"}
    results = Joblib.setup(eval, tasks, 2, backend="threading", **options)
    assert len(list(results)) == 7


def stand_still(process, seconds):
    """Suspend a program and its workers, as a paused container or a laptop's lid does."""
    paths = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [process.pid, *map(int, " ".join(p.read_text() for p in paths).split())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)


@needs_signals
@pytest.mark.once
@pytest.mark.parametrize("backend", ENGINES)
def test_the_time_in_which_the_program_is_suspended_does_not_count(
    begun, tmp_path, backend
):
    task = f"({touch(tmp_path / 'began')}, {await_path(tmp_path / 'go', 5)})[1]"
    source = f"""
    if __name__ == "__main__":
        run = lambda task: eval(task, {{}})
        print(*Joblib.setup(run, [{task!r}], 2, backend={backend!r}, timeout=3))
    """
    process = begun(source)
    wait_until((tmp_path / "began").exists)
    stand_still(process, 4)
    (tmp_path / "go").touch()
    assert output_of(process) == "5\n"


@needs_signals
@pytest.mark.once
def test_the_time_in_which_the_program_is_suspended_does_not_count_as_idle(begun):
    source = """
    if __name__ == "__main__":
        run = lambda task: (time.sleep(0.1), os.getpid())[1]
        results = lambda: set(Joblib.setup(run, range(8), 2, idle_worker_timeout=9))
        before = results()
        print(len(before), flush=True)
        input()
        time.sleep(1)  # still less than the limit
        print(len(before & results()))
    """
    process = begun(source)
    assert process.stdout.readline() == "2\n"
    stand_still(process, 10)
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert output_of(process) == "2\n"


def test_a_clock_that_stands_still(monkeypatch):
    clock = types.SimpleNamespace(monotonic=lambda: 5.0, perf_counter=lambda: 5.0)
    monkeypatch.setattr(distributed, "time", clock)
    results = Joblib.setup(abs, range(300), 2, backend="threading")
    assert sorted(itertools.islice(results, 300)) == list(range(300))


# ------------------------------------------------------------------------------------------------
# A sweep goes on: errors="return"


def check_failed_task(setup, fault, error_type, return_as, batch_size, **options):
    tasks = [value(number) for number in range(12)]
    tasks[7] = fault
    options |= {"return_as": return_as, "batch_size": batch_size}
    results = list(setup(run, iter(tasks), errors="return", **options))
    (failed,) = (result for result in results if isinstance(result, FailedTask))
    assert (failed.number, type(failed.error)) == (7, error_type)
    assert failed.task is tasks[7]
    position = results.index(failed)
    assert return_as == "generator_unordered" or position == 7
    results.remove(failed)
    expected = [*range(7), *range(8, 12)]
    assert (results if return_as == "generator" else sorted(results)) == expected
    _, raised = collect(setup(run, iter(tasks), **options), Exception)
    assert type(raised) is error_type
    assert str(raised) == str(failed.error)
    assert notes_of(raised) == notes_of(failed.error)
    assert type(raised.__cause__) is type(failed.error.__cause__)
    return failed.error


ORDERS = [
    pytest.param("generator", 1, marks=pytest.mark.locally),
    ("generator_unordered", 5),
]


@pytest.mark.once
@pytest.mark.parametrize(("return_as", "batch_size"), ORDERS)
@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        ("ValueError('bad')", ValueError),
        pytest.param(
            "OSError(2, 'gone', 'x')", FileNotFoundError, marks=pytest.mark.alike
        ),
    ],
)
def test_a_task_that_raises_is_a_failed_task_in_its_place(
    setup, error, error_type, return_as, batch_size
):
    error = check_failed_task(setup, raising(error), error_type, return_as, batch_size)
    (note,) = error.__notes__
    assert note.startswith("Task 7 (counted from 0): ")


EXITS = [
    "SystemExit(3)",
    "SystemExit()",
    "KeyboardInterrupt()",
    "GeneratorExit()",
    "StopIteration(4)",
    "BaseException(5)",
]


@pytest.mark.alike
@pytest.mark.once
@pytest.mark.parametrize(
    "expression",
    [EXITS[0], *(pytest.param(e, marks=pytest.mark.locally) for e in EXITS[2::2])],
)
def test_what_is_no_exception_is_the_cause_of_the_error_of_a_failed_task(
    setup, expression
):
    fault = exiting(expression)
    error = check_failed_task(setup, fault, RuntimeError, "generator", 5)
    expected = eval(expression)
    assert type(error.__cause__) is type(expected)
    assert error.__cause__.args == expected.args
    assert type(expected).__name__ in str(error)
    assert error.__notes__[0].startswith("Task 7 (counted from 0): ")


@pytest.mark.alike
@pytest.mark.once
@pytest.mark.parametrize(("return_as", "batch_size"), ORDERS)
@pytest.mark.parametrize(
    "what",
    [
        *(what for what in PICKLING if what != "lock to pickle"),
        pytest.param("lock to pickle", marks=pytest.mark.locally),
    ],
)
def test_what_cannot_be_pickled_or_unpickled_is_a_failed_task(
    pickling_setup, what, return_as, batch_size
):
    fault, error_type = PICKLING[what]
    error = check_failed_task(pickling_setup, fault, error_type, return_as, batch_size)
    assert "pickled" in str(error)
    assert what.split()[0].replace("lock", "task") in str(error)


@pytest.mark.once
@pytest.mark.parametrize("death", [KILL, EXIT, EXIT_IN_PEACE])
def test_a_task_that_ends_its_worker_is_a_failed_task(processes, death):
    error = check_failed_task(
        processes, death, distributed.BrokenProcessPool, "generator", 1
    )
    assert isinstance(error, BrokenExecutor)
    assert "a worker process has died" in str(error)
    assert "Task 7 (counted from 0)" in str(error)


@pytest.mark.once
@by_either_name
def test_a_task_that_takes_too_long_is_a_failed_task(processes):
    error = check_failed_task(
        processes, slow(3600), distributed._TaskTimeoutError, "generator", 1, timeout=1
    )
    assert "Task 7 (counted from 0)" in str(error)
    assert "1 seconds" in str(error)


@pytest.mark.once
def test_all_tasks_of_a_batch_may_fail_each_in_its_way(processes):
    faults, kinds = zip(*PICKLING.values(), strict=True)
    size = len(faults) + 2
    tasks = [*faults, raising("KeyError()"), value("fine")]
    # Enough for two workers: at the end of the tasks batches are smaller.
    tasks += map(value, range(size))
    results = list(processes(run, tasks, errors="return", batch_size=size))
    failed, others = numbers_of(results)
    assert sorted(failed) == list(range(size - 1))
    assert Counter(others) == Counter(["fine", *range(size)])
    for failed in (r for r in results if isinstance(r, FailedTask)):
        assert type(failed.error) is [*kinds, KeyError][failed.number]
        assert f"Task {failed.number} (counted" in failed.error.__notes__[-1]


def failed_task(task, error):
    """Return the FailedTask of a function that raises *error*."""

    def fail(task):
        raise error

    (failed,) = Joblib.setup(fail, [task], 2, backend="threading", errors="return")
    return failed


@dataclasses.dataclass
class Row:
    a: int


@pytest.mark.parametrize(
    "use",
    [
        list,
        lambda failed: [a for a, _, _ in [failed]],
        # As pandas does with rows, if the first is a dataclass.
        lambda failed: [*map(dataclasses.asdict, [Row(1), failed])],
    ],
)
def test_a_failed_task_cannot_be_taken_for_a_row(use):
    failed = failed_task((1, 2), ValueError("bad"))
    with pytest.raises(TypeError, match="FailedTask|asdict"):
        use(failed)


def test_a_failed_task_stays_as_it_is():
    failed = failed_task([1, 2], ValueError("bad"))
    with pytest.raises(AttributeError, match="number=5"):
        failed.number = 5
    with pytest.raises(AttributeError, match="number"):
        del failed.number
    assert failed.number == 0
    assert failed in {failed}  # though its task is unhashable
    match failed:
        case FailedTask(number, task, error):
            assert (number, task, str(error)) == (0, [1, 2], "bad")


def test_a_failed_task_is_copied_and_pickled(program):
    process = program("""
        import copy, pickle
        from yourpackage.distributed import FailedTask, Joblib

        (failed,) = Joblib.setup(int, ["bad"], 2, errors="return")
        copies = [pickle.loads(pickle.dumps(failed)), copy.deepcopy(failed)]
        for copied in *copies, *Joblib.setup(lambda failed: failed, [failed], 2):
            assert type(copied) is FailedTask
            assert copied is not failed
            assert (copied.number, copied.task) == (0, "bad")
            assert repr(copied) == repr(failed)
            assert copied.error.__notes__ == ["Task 0 (counted from 0): 'bad'"]
    """)
    assert output_of(process) == ""


class Rows:
    def __repr__(self):
        return "array([[1., 0.],\n       [0., 1.]])"


class Lines(Exception):
    def __repr__(self):
        return "Lines(\n    1,\n)"


@pytest.mark.parametrize(
    ("task", "error", "shown"),
    [
        (3, ValueError("bad"), "task=3, error=ValueError('bad')"),
        (3, ValueError("a\nb"), r"task=3, error=ValueError('a\nb')"),
        (Rows(), Lines(), "task=array([[1., 0.], [0., 1.]]), error=Lines( 1, )"),
        (range(5), Lines(), "task=range(0, 5), error=Lines( 1, )"),
    ],
)
def test_a_failed_task_is_shown_in_one_line(task, error, shown):
    assert repr(failed_task(task, error)) == f"FailedTask(number=0, {shown})"
    assert str(failed_task(task, error)) == f"FailedTask(number=0, {shown})"


def test_a_failed_task_is_shown_in_a_short_line():
    line = repr(failed_task("x" * 9999, ValueError("y\n" * 9999)))
    assert len(line) < 600
    assert "\n" not in line


def test_the_error_of_a_failed_task_shows_all():
    tasks = [value(0), raising("ValueError('a\\nb')")]
    *_, failed = Joblib.setup(run, tasks, 2, errors="return", return_as="generator")
    shown = "".join(traceback.format_exception(failed.error))
    for text in ("ValueError: a\nb", "Task 1 (counted from 0)", "<lambda>"):
        assert text in shown


class Mute(Exception):
    def __str__(self):
        raise LookupError("no text")


@pytest.mark.parametrize("has_array", [False, True], ids=["", "mapped"])
def test_an_error_that_cannot_be_shown_is_one_of_its_task_alone(setup, has_array):
    array = numpy.zeros(300_000) if has_array else None
    mute = by_value(Mute)

    def function(task):
        if task[0] == 2:
            raise mute
        return task[0]

    tasks = [(number, array) for number in range(6)]
    results = setup(function, tasks, errors="return", return_as="generator")
    failed, others = numbers_of(list(results))
    assert (failed, others) == ([2], [0, 1, 3, 4, 5])


class Shapeless(BaseException):
    def __repr__(self):
        raise LookupError("no text")


class Traceless(Exception):
    def with_traceback(self, trace):
        raise LookupError("no traceback")


class CannotBePickledOrShown:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.once
@pytest.mark.parametrize(
    ("error", "way"),
    [
        *itertools.product((Shapeless, Traceless), ("raised", "returned")),
        (Traceless, "sent"),  # one that is no Exception would end the program
    ],
)
def test_an_error_whose_methods_fail_is_one_of_its_task_alone(setup, way, error):
    error, kind = by_value(error), by_value(CannotBePickledOrShown)

    def function(task):
        if task == 2 and way == "raised":
            raise error
        return kind(error()) if task == 2 else task

    options = {"errors": "return", "return_as": "generator", "batch_size": 6}
    if setup.keywords["backend"] == "threading" and way != "raised":
        return  # nothing is pickled there
    tasks = [0, 1, kind(error()) if way == "sent" else 2, 3, 4, 5]
    failed, others = numbers_of(list(setup(function, tasks, **options)))
    assert (failed, others) == ([2], [0, 1, 3, 4, 5])


class Logging:
    """A function for numbers: it takes *seconds*, and some of them have a fate.

    Each call leaves the number in a file of its process.
    """

    def __init__(self, path, seconds, fates):
        self.path, self.seconds, self.fates = str(path), seconds, fates
        self.file = None

    def __call__(self, number):
        if self.file is None:
            path = f"{self.path}{os.getpid()}"
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self.file, b"%d\n" % number)
        if number in self.fates:
            eval(self.fates[number], {})
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return number


def check_that_faults_cost_their_tasks(
    setup, path, count, fates, seconds, unsent, **options
):
    """Check that the tasks that have a fate fail, and at most so many that were done."""
    function = by_value(Logging)(path, seconds, fates)
    results = list(setup(function, iter(range(count)), errors="return", **options))
    numbers = [r.number if isinstance(r, FailedTask) else r for r in results]
    is_ordered = options.get("return_as") == "generator"
    assert (numbers if is_ordered else sorted(numbers)) == list(range(count))
    failed = {r.number: r.error for r in results if isinstance(r, FailedTask)}
    assert set(fates) <= set(failed)
    assert len(failed) <= len(fates) + unsent
    for number, error in failed.items():
        assert ("the task was done" in str(error)) == (number not in fates)
        assert f"Task {number} (counted from 0)" in str(error)
    texts = [file.read_text() for file in path.parent.glob(f"{path.name}*")]
    assert Counter(map(int, " ".join(texts).split())) == Counter(range(count))


# In one call of C, which keeps the interpreter's lock.
HOLDS_LOCK = "__import__('re').match('(a*)*b', 'a' * 60)"

FATES = [
    pytest.param(KILL, {}, BrokenExecutor, id="dies"),
    pytest.param(
        slow(3600), {"timeout": 1}, TimeoutError, id="hangs", marks=pytest.mark.once
    ),
    pytest.param(
        HOLDS_LOCK, {"timeout": 1}, TimeoutError, id="lock", marks=pytest.mark.once
    ),
]
each_fate = pytest.mark.parametrize(("fate", "options", "kind"), FATES)
each_order = pytest.mark.parametrize(
    "return_as", ["generator", pytest.param("generator_unordered", marks=once)]
)


@each_order
@each_fate
def test_a_fault_among_many_quick_tasks_costs_its_own(
    processes, tmp_path, fate, options, kind, return_as
):
    options = {"return_as": return_as, **options}
    check_that_faults_cost_their_tasks(
        processes, tmp_path / "log", 6000, {3000: fate}, 0.0002, unsent=25, **options
    )


# Tasks that take longer than 3 ms, each of which is sent as soon as it is done.
@each_fate
def test_a_fault_among_slower_tasks_costs_nothing_else(
    processes, tmp_path, fate, options, kind
):
    options = {"batch_size": 10, **options}
    check_that_faults_cost_their_tasks(
        processes, tmp_path / "log", 20, {7: fate}, 0.02, unsent=0, **options
    )


@pytest.mark.parametrize(
    ("batch_size", "numbers", "return_as"),
    [
        pytest.param(10, [0], "generator", marks=once),
        pytest.param(10, [9], "generator_unordered", marks=once),
        (10, [0, 9, 10, 19], "generator"),
        pytest.param(10, [3, 4, 5], "generator_unordered", marks=once),
        pytest.param(100, range(5, 100, 10), "generator", marks=pytest.mark.once),
    ],
    ids=["first", "last", "first and last", "in a row", "ten"],
)
def test_deaths_in_one_batch_cost_nothing_else(
    processes, tmp_path, batch_size, numbers, return_as
):
    options = {"return_as": return_as, "batch_size": batch_size}
    fates = dict.fromkeys(numbers, KILL)
    check_that_faults_cost_their_tasks(
        processes, tmp_path / "log", 2 * batch_size, fates, 0.005, unsent=0, **options
    )


class DiesAsItIsUnpickled:
    def __getstate__(self):
        return {"key": 1}

    def __setstate__(self, state):
        os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    ("numbers", "return_as"),
    [([0, 9], "generator"), pytest.param([3], "generator_unordered", marks=once)],
)
def test_a_death_as_a_task_is_unpickled_costs_nothing_else(
    processes, tmp_path, numbers, return_as
):
    tasks = [logged(tmp_path, number) for number in range(20)]
    for number in numbers:
        tasks[number] = by_value(DiesAsItIsUnpickled)()
    options = {"return_as": return_as, "batch_size": 10, "errors": "return"}
    failed, others = numbers_of(processes(run, tasks, **options))
    assert sorted(failed) == numbers
    expected = [number for number in range(20) if number not in numbers]
    assert (others if return_as == "generator" else sorted(others)) == expected
    assert times_run(tmp_path) == dict.fromkeys(expected, 1)


# With errors="raise".
@each_fate
def test_a_fault_in_a_batch_tells_which_task_was_running(
    processes, fate, options, kind
):
    tasks = [value(number) for number in range(100)]
    tasks[23] = fate
    options = {"batch_size": 50, "return_as": "generator", **options}
    _, error = collect(processes(run, tasks, **options), kind)
    assert "Task 23 (counted from 0): " in str(error)


@pytest.mark.once
@each_fault
@pytest.mark.timeout(60)
@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_what_cannot_be_sent_costs_no_worker_and_no_other_result(
    processes, bad, tmp_path, return_as
):
    first, second = meeting(tmp_path, "before")
    third, fourth = meeting(tmp_path, "after")
    tasks = [first, bad, value(1), second, bad, value(1)]
    tasks += [third, value(1), bad, fourth, value(1), bad]
    # Those that meet are out together, and nothing else.
    options = {"batch_size": 3, "pre_dispatch": 2, "errors": "return"}
    options["return_as"] = return_as
    results = list(processes(eval, tasks, **options))
    failed = {r.number for r in results if isinstance(r, FailedTask)}
    assert failed == {1, 4, 8, 11}
    assert results.count(1) == 4
    pids = Counter(r for r in results if isinstance(r, int) and r != 1)
    assert list(pids.values()) == [2, 2]  # two workers, before and after


KINDS = {
    "fine": None,
    "raises": raising("KeyError(1)"),
    "exits": raising("SystemExit(1)"),
    "dies": KILL,
    "leaves": EXIT_IN_PEACE,
    "lock": LOCK,
    "bad result": BAD_RESULT,
    "unpicklable": CannotBePickled(),
    "unreadable": by_value(CannotBeUnpickled)(),
}


FATAL = {"dies", "leaves"}


@pytest.mark.once
@settings(deadline=None, max_examples=15)
@given(
    kinds=st.lists(
        st.one_of(st.just("fine"), st.sampled_from(sorted(KINDS))), max_size=25
    ),
    batch_size=st.sampled_from([1, 1, 3, "auto"]),
    num_workers=st.sampled_from([1, 2, 3]),
    return_as=st.sampled_from(["generator", "generator_unordered"]),
    more=st.fixed_dictionaries(
        {},
        optional={
            "timeout": st.just(60),
            "maxtasksperchild": st.sampled_from([1, 4]),
            "pre_dispatch": st.sampled_from(["all", 1]),
        },
    ),
)
def test_any_mixture_of_tasks_is_accounted_for(
    tmp_path_factory, kinds, batch_size, num_workers, return_as, more
):
    folder = tmp_path_factory.mktemp("tasks")
    tasks = [
        logged(folder, number, KINDS[kind])
        if isinstance(KINDS[kind], str | None)
        else KINDS[kind]
        for number, kind in enumerate(kinds)
    ]
    options = {"batch_size": batch_size, "return_as": return_as, **more}
    results = list(
        Joblib.setup(run, iter(tasks), num_workers, errors="return", **options)
    )
    numbers = [r.number if isinstance(r, FailedTask) else r for r in results]
    in_order = list(range(len(tasks)))
    assert (numbers if return_as == "generator" else sorted(numbers)) == in_order
    assert all(r.task is tasks[r.number] for r in results if isinstance(r, FailedTask))
    failed, fine = map(set, numbers_of(results))
    faulty = {number for number, kind in enumerate(kinds) if kind != "fine"}
    assert failed >= faulty
    if batch_size == 1 or not FATAL & set(kinds):
        assert failed == faulty
    ran = times_run(folder)
    assert set(ran.values()) <= {1}
    assert set(ran) >= fine


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    expressions=st.lists(st.sampled_from([None, *EXITS, "KeyError(1)"]), max_size=30),
    batch_size=st.sampled_from([1, 4, 50]),
    return_as=st.sampled_from(["generator", "generator_unordered"]),
)
def test_any_mixture_of_tasks_is_accounted_for_in_threads(
    expressions, batch_size, return_as
):
    tasks = [
        value(number) if expression is None else exiting(expression)
        for number, expression in enumerate(expressions)
    ]
    options = {"batch_size": batch_size, "return_as": return_as, "errors": "return"}
    results = list(Joblib.setup(run, iter(tasks), 2, backend="threading", **options))
    numbers = [r.number if isinstance(r, FailedTask) else r for r in results]
    in_order = list(range(len(tasks)))
    assert (numbers if return_as == "generator" else sorted(numbers)) == in_order
    failed = {r.number for r in results if isinstance(r, FailedTask)}
    assert failed == {n for n, e in enumerate(expressions) if e is not None}


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_the_error_of_a_failed_task_refers_to_nothing_of_the_run(backend):
    function = lambda task: 1 / 0 if task == 3 else 0
    results = Joblib.setup(
        function, (n for n in range(9)), 2, backend=backend, errors="return"
    )
    run = weakref.ref(results.gi_frame.f_locals["run"])
    (failed,) = [result for result in results if isinstance(result, FailedTask)]
    assert type(failed.error) is ZeroDivisionError
    del results
    gc.collect()
    assert run() is None


class FailsNowAndThen(joblib.parallel.ThreadingBackend):
    """Reports an error in place of a batch, as an engine does that has lost it."""

    submitted = 0

    def submit(self, func, callback=None):
        self.submitted += 1
        if self.submitted % 3 == 0:
            callback(OSError("lost"))
            return None
        return super().submit(func, callback)

    def retrieve_result_callback(self, out):
        if isinstance(out, OSError):
            raise out
        return super().retrieve_result_callback(out)


def test_what_an_engine_reports_of_a_batch_is_its_failed_tasks():
    options = {"errors": "return", "batch_size": 2, "return_as": "generator"}
    results = list(
        Joblib.setup(
            run, map(value, range(20)), 2, backend=FailsNowAndThen(), **options
        )
    )
    failed, others = numbers_of(results)
    assert sorted(failed) == [4, 5, 10, 11, 16, 17]
    assert sorted([*failed, *others]) == list(range(20))
    for error in (item.error for item in results if isinstance(item, FailedTask)):
        assert type(error) is OSError


# Lets a worker have 400 MB more than it has, of which a thread reserves 136.
LIMITS_MEMORY = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
size = pages * resource.getpagesize() + 400_000_000
resource.setrlimit(resource.RLIMIT_AS, (size, size))
"""
short_of_memory = pytest.mark.skipif(
    not HAS_PROC, reason="limits the memory of workers"
)


@pytest.mark.once
@short_of_memory
@pytest.mark.timeout(60)
@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize("size", [220_000_000, 450_000_000])  # to unpickle, to receive
def test_a_task_that_is_too_large_for_a_worker_is_a_failed_task(
    processes, capfd, size, timeout
):
    options = {"initializer": exec, "initargs": (LIMITS_MEMORY,), "errors": "return"}
    options |= {"batch_size": 1, "timeout": timeout, "return_as": "generator"}
    tasks = [b"0", b"x" * size, b"2", b"3"]
    results = list(processes(len, tasks, **options))
    assert numbers_of(results) == ([1], [1, 1, 1])
    assert type(results[1].error) is pickle.UnpicklingError
    assert "MemoryError" in str(results[1].error)
    assert capfd.readouterr().err == ""


@pytest.mark.once
@short_of_memory
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("form", "timeout", "batch_size"),
    [("{}", None, 1), ("{}", 30, 4), ("[{}]", None, 4)],
)
def test_a_result_that_is_too_large_for_a_worker_is_a_failed_task(
    processes, capfd, form, timeout, batch_size
):
    options = {"initializer": exec, "initargs": (LIMITS_MEMORY,), "errors": "return"}
    options |= {"batch_size": batch_size, "timeout": timeout, "return_as": "generator"}
    tasks = [value(0), form.format("b'x' * 220_000_000"), *map(value, range(2, 40))]
    results = list(processes(run, tasks, **options))
    assert numbers_of(results) == ([1], [0, *range(2, 40)])
    assert type(results[1].error) is pickle.PicklingError
    assert "MemoryError" in str(results[1].error)
    assert "MemoryError" in str(results[1].error.__cause__)
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------------------
# A sweep goes on: what ends it all the same


@pytest.mark.alike
def test_an_error_of_the_tasks_is_raised_after_all_that_there_is(setup):
    def tasks():
        yield from (value(0), "1 / 0", value(2))
        raise LookupError("no more")

    received, error = collect(
        setup(run, tasks(), errors="return", return_as="generator"), LookupError
    )
    assert str(error) == "no more"
    assert [type(result) for result in received] == [int, FailedTask, int]


@pytest.mark.alike
@pytest.mark.parametrize(
    ("function", "text"),
    [
        (CannotBePickled().__reduce__, "task_func cannot be pickled"),
        (by_value(CannotBeUnpickled)().call, "task_func cannot be unpickled"),
    ],
)
def test_a_function_that_cannot_travel_ends_the_run(pickling_setup, function, text):
    if text.endswith("be pickled"):
        function = threading.Lock().acquire
    received, error = collect(
        pickling_setup(function, [1, 2, 3], errors="return"), Exception
    )
    assert received == []
    assert text in str(error)
    assert isinstance(error, pickle.PickleError)


def test_an_initializer_that_fails_ends_the_run_and_is_shown(processes, capfd):
    options = {"initializer": eval, "initargs": ("1 / 0",), "errors": "return"}
    received, error = collect(processes(abs, range(9), **options), BrokenExecutor)
    assert received == []
    assert "the initializer has failed in a worker: ZeroDivisionError" in str(error)
    assert "Traceback" in str(error.__cause__)
    assert capfd.readouterr().err == ""


@pytest.mark.once
@short_of_memory
def test_a_function_that_is_too_large_for_a_worker_ends_the_run(processes, capfd):
    options = {"initializer": exec, "initargs": (LIMITS_MEMORY,), "errors": "return"}
    function = functools.partial(operator.contains, b"x" * 450_000_000)
    received, error = collect(processes(function, range(9), **options), Exception)
    assert received == []
    assert type(error) is pickle.UnpicklingError
    assert "task_func cannot be unpickled" in str(error)
    assert "MemoryError" in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_the_error_of_an_initializer_may_have_any_text(processes, capfd):
    options = {"initializer": run, "initargs": (raising("OSError('no \\udcff')"),)}
    received, error = collect(processes(abs, range(9), **options), BrokenExecutor)
    assert received == []
    assert "failed in a worker: OSError: no \\udcff" in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_an_initializer_that_cannot_be_unpickled_is_shown(begun):
    source = """
        class Unloadable:
            def __setstate__(self, state):
                raise KeyError("not here")

            def __call__(self):
                pass

        if __name__ == "__main__":
            prepare = Unloadable()
            prepare.state = 1
            try:
                list(Joblib.setup(abs, [-1], 2, initializer=prepare))
            except Exception as error:
                print(error)
    """
    output = output_of(begun(source))
    assert output == "the initializer has failed in a worker: KeyError: 'not here'\n"


@pytest.mark.once
def test_an_initializer_that_ends_its_worker_ends_the_run(processes, capfd):
    options = {"initializer": eval, "initargs": (EXIT_IN_PEACE,), "errors": "return"}
    received, error = collect(processes(abs, range(9), **options), BrokenExecutor)
    assert received == []
    assert "a worker process has died as it started" in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.once
def test_an_initializer_that_fails_in_a_worker_in_place_of_another_ends_the_run(
    processes, tmp_path
):
    (tmp_path / "fine").mkdir()
    source = f"import os; os.listdir({str(tmp_path / 'fine')!r})"
    options = {"initializer": exec, "initargs": (source,), "errors": "return"}
    remove = f"__import__('os').rmdir({str(tmp_path / 'fine')!r})"
    tasks = [value(0), *[value(1)] * 9, f"({remove}, {KILL})", *[value(2)] * 9]
    results = processes(run, tasks, batch_size=1, return_as="generator", **options)
    received, error = collect(results, BrokenExecutor)
    assert "initializer has failed" in str(error)
    assert "FileNotFoundError" in str(error)
    assert received[:10] == [0, *[1] * 9]


def test_the_failure_of_an_engine_is_raised_whatever_errors_says():
    results = Joblib.setup(
        abs, range(10), 2, backend=FailingThreading(), errors="return"
    )
    received, error = collect(results, OSError)
    assert error is not None
    assert not any(isinstance(result, FailedTask) for result in received)


@pytest.mark.alike
@pytest.mark.once
@pytest.mark.parametrize("num_workers", [1, 2])
def test_who_quits_the_debugger_means_the_program(setup, num_workers):
    tasks = [value(0), raising("__import__('bdb').BdbQuit()"), value(2)]
    options = {"errors": "return", "return_as": "generator", "batch_size": 1}
    results = setup(run, tasks, num_workers=num_workers, **options)
    received, error = collect(results, bdb.BdbQuit)
    assert received == [0]
    assert type(error) is bdb.BdbQuit


@pytest.mark.slow
def test_who_quits_the_debugger_in_a_batch_means_the_program(processes, tmp_path):
    quits = raising("__import__('bdb').BdbQuit()")
    tasks = [value(0), "1 / 0", quits, logged(tmp_path, 3), logged(tmp_path, 4)]
    tasks += map(value, range(5, 10))  # for the other worker
    options = {"errors": "return", "return_as": "generator", "batch_size": 5}
    received, error = collect(processes(run, tasks, **options), bdb.BdbQuit)
    assert [type(result) for result in received] == [int, FailedTask]
    assert type(error) is bdb.BdbQuit
    assert times_run(tmp_path) == {}


@pytest.mark.once
def test_who_quits_the_debugger_by_an_error_that_cannot_be_sent_ends_the_run(processes):
    def function(task):
        error = bdb.BdbQuit()
        error.lock = threading.Lock()
        raise error

    # What is behind it is not run, and not waited for, either.
    results = list(processes(function, range(50), errors="return", batch_size=1))
    assert all(isinstance(result, FailedTask) for result in results)
    assert sorted(result.number for result in results) == list(range(50))


INTERRUPTED_SWEEP = """
    import pathlib, sys, time
    from yourpackage.distributed import Joblib

    def work(task):
        if task == 2:
            pathlib.Path("begun").touch()
            time.sleep(3600)
        return task

    if __name__ == "__main__":
        backend, workers, errors = sys.argv[1:]
        try:
            for result in Joblib.setup(
                work, range(5), int(workers), backend=backend, errors=errors
            ):
                if result == 0:
                    print("first", flush=True)
        except KeyboardInterrupt:
            print("interrupted")
"""


@needs_signals
@pytest.mark.once
@pytest.mark.parametrize(
    ("backend", "workers"), [("loky", 2), ("loky", 1), ("threading", 1)]
)
def test_an_interrupt_of_the_program_is_no_failed_task(
    program, tmp_path, backend, workers
):
    process = program(INTERRUPTED_SWEEP, backend, workers, "return")
    assert process.stdout.readline() == "first\n"
    wait_until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    assert output_of(process) == "interrupted\n"


# ------------------------------------------------------------------------------------------------
# A sweep goes on: workers in place of others


@needs_proc
@pytest.mark.once
def test_deaths_leave_nothing():
    count = 100
    Joblib.shutdown()
    prepare = "import os; os.environ['PREPARED'] = 'yes'"
    options = {"initializer": exec, "initargs": (prepare,), "errors": "return"}
    sees = "__import__('os').environ['PREPARED']"
    tasks = [sees if n % 10 else KILL for n in range(count)]
    setup = functools.partial(Joblib.setup, run, batch_size=1, **options)
    list(setup([sees, KILL, sees], 2))  # starts what stays
    Joblib.shutdown()
    gc.collect()
    threads, files = set(threading.enumerate()), descriptors()
    before = workers_now()
    results = list(setup(tasks, 2))
    failed, others = numbers_of(results)
    assert sorted(failed) == list(range(0, count, 10))
    assert others == ["yes"] * (count - len(failed))
    del results
    Joblib.shutdown()
    gc.collect()
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert workers_now() <= before
    wait_until(lambda: descriptors() <= files)


@pytest.mark.once
def test_there_are_as_many_workers_after_deaths_as_before(processes, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    meet = [f"({touch(one)}, {await_path(two)})", f"({touch(two)}, {await_path(one)})"]
    tasks = [KILL] * 4 + meet + [KILL]
    results = list(processes(run, tasks, errors="return", batch_size=1))
    assert sorted(numbers_of(results)[0]) == [0, 1, 2, 3, 6]


def test_a_new_worker_has_the_function_and_its_arrays(processes, tmp_path):
    data = numpy.arange(300_000)

    def function(task):
        if task == 3:
            os.kill(os.getpid(), 9)
        return int(data[task]), os.getpid()

    results = processes(
        function, range(30), errors="return", batch_size=1, temp_folder=str(tmp_path)
    )
    failed, others = numbers_of(list(results))
    assert failed == [3]
    assert sorted(task for task, _ in others) == [*range(3), *range(4, 30)]
    assert left_in(tmp_path) == []


class FailsToLoad:
    """Fails to load, by an expression, once for each file that is in a folder."""

    def __init__(self, folder, expression):
        self.folder, self.expression = folder, expression

    def __setstate__(self, state):
        vars(self).update(state)
        for name in os.listdir(self.folder)[:1]:
            os.unlink(os.path.join(self.folder, name))
            eval(self.expression)

    def run(self, task):
        return eval(task)


@pytest.fixture
def fails_to_load(tmp_path):
    """Return a function, and a task: it dies, as do so many workers after its own."""
    folder = tmp_path / "failures"
    folder.mkdir()

    def make(count, expression=KILL):
        files = [f"open({str(folder / str(n))!r}, 'w').close()" for n in range(count)]
        dies = f"({', '.join(files)}, {KILL})"
        return by_value(FailsToLoad)(str(folder), expression).run, dies

    return make


@pytest.mark.once
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("expression", [KILL, "1 / 0"])
def test_a_new_worker_that_fails_to_load_the_function_costs_nothing(
    processes, fails_to_load, expression, count
):
    function, dies = fails_to_load(count, expression)
    tasks = [value(0), dies, *map(value, range(2, 9))]
    options = {"num_workers": 1, "errors": "return", "batch_size": 1}
    results = list(processes(function, tasks, **options))
    failed, others = numbers_of(results)
    assert (failed, sorted(others)) == ([1], [0, *range(2, 9)])


@pytest.mark.once
def test_a_run_ends_if_several_new_workers_in_a_row_fail(processes, fails_to_load):
    function, dies = fails_to_load(99)
    tasks = [value(0), dies, *map(value, range(2, 99))]
    options = {"num_workers": 1, "errors": "return", "batch_size": 1}
    received, error = collect(processes(function, tasks, **options), BrokenExecutor)
    failed, others = numbers_of(received)
    assert (failed, others) == ([1], [0])
    assert "died as it started" in str(error)
    assert "3 workers in a row" in str(error)


@pytest.mark.once
def test_a_worker_that_cannot_be_replaced_leaves_the_others_at_work(
    processes, fails_to_load, tmp_path
):
    function, dies = fails_to_load(99)
    tasks = [*meeting(tmp_path, "one"), dies, *map(value, range(500))]
    results = list(processes(function, tasks, errors="return", batch_size=1))
    failed, others = numbers_of(results)
    assert failed[0] == 2
    assert len(failed) <= 4
    assert len(others) == len(tasks) - len(failed)
    # A run after it has as many workers as ever.
    assert len(set(processes(run, meeting(tmp_path, "two"), batch_size=1))) == 2


@pytest.mark.once
def test_deaths_are_silent_though_warnings_are_errors(program):
    source = """
        import os, sys
        from yourpackage.distributed import FailedTask, Joblib

        def work(task):
            if task % 5 == 3:
                os.kill(os.getpid(), 9)
            return task

        if __name__ == "__main__":
            for options in {"errors": "return"}, {"maxtasksperchild": 1}:
                step = 5 if "maxtasksperchild" in options else 1
                tasks = range(0, 6 * step, step)
                print(len(list(Joblib.setup(work, tasks, 2, **options))))
    """
    assert output_of(program(source)) == "6\n" * 2


@pytest.mark.once
@pytest.mark.parametrize(
    "options", [{"timeout": 60}, {"errors": "return"}, {"maxtasksperchild": 50}]
)
def test_one_worker_is_a_process_where_that_is_asked_for(processes, options):
    pids = set(processes(run, [PID] * 5, num_workers=1, **options))
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.once
def test_one_worker_survives_its_tasks(processes):
    tasks = [value(0), KILL, value(2), slow(3600), value(4), EXIT_IN_PEACE, value(6)]
    options = {"errors": "return", "timeout": 1, "return_as": "generator"}
    results = list(processes(run, tasks, num_workers=1, batch_size=1, **options))
    assert numbers_of(results) == ([1, 3, 5], [0, 2, 4, 6])
    assert [type(result) for result in results] == [int, FailedTask] * 3 + [int]
    assert type(results[3].error).__name__ == "TimeoutError"


def test_a_machine_of_one_core_uses_a_process_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert os.getpid() not in set(Joblib.setup(run, [PID] * 3, errors="return"))
    assert set(Joblib.setup(run, [PID] * 3)) == {os.getpid()}


@pytest.mark.parametrize("backend", ["threading", "sequential"])
def test_one_thread_is_this_one_and_returns_errors(backend):
    tasks = [PID, "1 / 0", PID, exiting("StopIteration(3)"), PID]
    options = {"errors": "return", "return_as": "generator"}
    results = list(Joblib.setup(run, tasks, 1, backend=backend, **options))
    failed, pids = numbers_of(results)
    assert (failed, set(pids)) == ([1, 3], {os.getpid()})
    assert results[1].task is tasks[1]
    assert type(results[3].error.__cause__) is StopIteration
    assert type(results[3].error) is RuntimeError
    assert results[1].error.__notes__ == ["Task 1 (counted from 0): '1 / 0'"]


@pytest.mark.parametrize("error", ["SystemExit(5)", "KeyboardInterrupt()"])
def test_one_thread_leaves_what_ends_the_program_to_it(error):
    tasks = [value(0), raising(error), value(2)]
    results = Joblib.setup(run, tasks, 1, backend="threading", errors="return")
    received, raised = collect(results, SystemExit, KeyboardInterrupt)
    assert received == [0]
    assert type(raised).__name__ == error.partition("(")[0]


@pytest.mark.once
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 2), (7, 2), ("auto", 1)])
def test_no_worker_does_more_tasks_than_it_may(processes, batch_size, workers):
    options = {"maxtasksperchild": 3, "batch_size": batch_size, "num_workers": workers}
    pids = Counter(processes(run, [PID] * 10, **options))
    assert sum(pids.values()) == 10
    assert max(pids.values()) <= 3
    assert os.getpid() not in pids


@pytest.mark.once
def test_a_worker_that_has_done_its_tasks_leaves_in_peace(processes, tmp_path):
    source = f"""
import atexit, os, pathlib
path = pathlib.Path({str(tmp_path)!r}, str(os.getpid()))
atexit.register(path.touch)
"""
    options = {"initializer": exec, "initargs": (source,), "batch_size": 1}
    Joblib.shutdown()
    others = workers_now()
    pids = set(processes(run, [PID] * 9, maxtasksperchild=2, **options))
    assert len(pids) >= 5
    Joblib.shutdown()
    assert pids <= set(pids_in(tmp_path))
    assert workers_now() <= others


@pytest.mark.once
@pytest.mark.parametrize("death", [KILL, slow(3600)])
def test_a_worker_that_dies_at_its_last_task_is_replaced(processes, death):
    tasks = [death if number % 3 == 2 else value(number) for number in range(6)]
    options = {"errors": "return", "timeout": 1, "num_workers": 1, "batch_size": 1}
    results = list(processes(run, tasks, maxtasksperchild=3, **options))
    failed, others = numbers_of(results)
    assert (sorted(failed), sorted(others)) == ([2, 5], [0, 1, 3, 4])


@pytest.mark.once
def test_a_worker_that_is_kept_counts_its_tasks_of_all_runs():
    options = {"maxtasksperchild": 4, "batch_size": 1}
    pids = Counter()
    for _ in range(4):
        pids.update(Joblib.setup(run, [PID] * 3, 2, **options))
    assert max(pids.values()) <= 4


# ------------------------------------------------------------------------------------------------
# Forks and children


FORKED = """
    import os, sys, warnings
    from helpers import children
    from yourpackage.distributed import Joblib

    def show(results):
        try:
            print(sum(results), flush=True)
        except RuntimeError as error:
            print(error, flush=True)

    if __name__ == "__main__":
        warnings.simplefilter("ignore", DeprecationWarning)  # CPython's, on forks
        backend, used, way = sys.argv[1:]
        results = Joblib.setup(abs, [1] * 100, 2, backend=backend, batch_size=1)
        if used == "used":
            next(results)
        if os.fork() == 0:
            if used == "used":
                show(results)
            show(Joblib.setup(abs, range(10), num_workers=2, backend=backend))
            left = children()
            for _ in Joblib.setup(abs, range(10), num_workers=2, backend=backend):
                break
            print(left, children(), flush=True)
            sys.exit() if way == "exit" else os._exit(0)
        print(os.wait()[1], flush=True)
        show(results)
"""


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(
    ("backend", "used", "way"),
    [
        ("loky", "used", "exit"),
        ("loky", "used", "_exit"),
        ("loky", "unused", "exit"),
        ("threading", "used", "exit"),
    ],
)
def test_a_fork(program, backend, used, way):
    output = output_of(program(FORKED, backend, used, way)).splitlines()
    if used == "used":
        first = "a run cannot be read in a fork of the process it is from"
        assert output.pop(0) == first
    assert output == ["45", "[] []", "0", "99" if used == "used" else "100"]


@needs_fork
@forks
def test_a_fork_cannot_end_a_run(tmp_path):
    arrays = (numpy.full(300_000, task) for task in range(30))
    results = Joblib.setup(numpy.max, arrays, num_workers=2, batch_size=1)
    received = [next(results)]
    if (child := os.fork()) == 0:
        results.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert sorted([*received, *results]) == list(range(30))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(
    ("backend", "batch_size"), [("loky", 1), ("loky", 4), ("threading", 1)]
)
def test_a_fork_that_reads_on_takes_nothing_from_its_parent(
    program, backend, batch_size
):
    source = """
        import os, sys, warnings
        from yourpackage.distributed import Joblib

        def tasks():
            while byte := os.read(reader, 1):  # of a pipe that the fork has as well
                yield byte[0]

        if __name__ == "__main__":
            warnings.simplefilter("ignore", DeprecationWarning)  # CPython's, on forks
            reader, writer = os.pipe()
            os.write(writer, bytes(range(40)))
            os.close(writer)
            backend, batch_size = sys.argv[1:]
            results = Joblib.setup(
                abs, tasks(), 2, backend=backend, batch_size=int(batch_size)
            )
            received = [next(results)]
            if os.fork() == 0:
                try:
                    print(next(results))
                except RuntimeError as error:
                    print(error, flush=True)
                os._exit(0)
            os.wait()
            print(sorted([*received, *results]) == list(range(40)))
    """
    assert output_of(program(source, backend, batch_size)) == (
        "a run cannot be read in a fork of the process it is from\nTrue\n"
    )


@needs_fork
@pytest.mark.slow
def test_a_fork_that_exits_leaves_its_parent_alone(program):
    pytest.importorskip("numpy")
    source = """
        import os, sys, warnings
        import numpy
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            warnings.simplefilter("ignore", DeprecationWarning)  # CPython's, on forks
            arrays = (numpy.full(300_000, task) for task in range(30))
            results = Joblib.setup(numpy.max, arrays, 2, batch_size=1)
            total = next(results)
            if os.fork() == 0:
                sys.exit()
            os.wait()
            print(total + sum(results))
    """
    assert output_of(program(source)) == "435\n"


@pytest.mark.slow
@needs_fork
def test_a_fork_while_another_thread_starts_a_run(program):
    source = """
        import multiprocessing, os, sys, threading, time, warnings
        from yourpackage import distributed

        def start():
            list(distributed.Joblib.setup(abs, range(9), num_workers=2))

        def open_slowly(*arguments, **options):
            if threading.current_thread() is not threading.main_thread():
                has_begun.set()
                time.sleep(0.1)
            return pipe(*arguments, **options)

        if __name__ == "__main__":
            warnings.simplefilter("ignore", DeprecationWarning)  # CPython's, on forks
            has_begun, pipe = threading.Event(), multiprocessing.Pipe
            multiprocessing.Pipe = open_slowly
            thread = threading.Thread(target=start)
            thread.start()
            has_begun.wait()
            if os.fork() == 0:
                print(sum(distributed.Joblib.setup(abs, range(9), num_workers=2)))
                sys.exit()
            thread.join()
            os.wait()
    """
    assert output_of(program(source)) == "36\n"


FORKS_IN_A_THREAD = """
def work(task):
    statuses = []

    def start():
        done = subprocess.run(["true"], preexec_fn=os.getpid)
        statuses.append(done.returncode)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    return statuses

if __name__ == "__main__":
    print(*Joblib.setup(work, range(2), 2))
"""


@needs_fork
@pytest.mark.once
@pytest.mark.timeout(60)
def test_a_thread_of_a_task_can_fork(begun):
    assert output_of(begun(FORKS_IN_A_THREAD, warnings="ignore")) == "[0] [0]\n"


CHILD = """
    import multiprocessing, sys, time
    from yourpackage.distributed import Joblib

    def work(task):  # a function of the program, called __mp_main__ in a child
        time.sleep(seconds)
        return 2 * task

    def child(way, duration):
        global seconds
        seconds = float(duration)
        results = Joblib.setup(work, range(8), num_workers=2)
        if way == "read":
            assert sum(results) == 56
        elif way == "left":
            next(results)
        elif way == "open":
            globals()["kept"] = results
            next(results)

    if __name__ == "__main__":
        method, *arguments = sys.argv[1:]
        context = multiprocessing.get_context(method)
        process = context.Process(target=child, args=arguments)
        process.start()
        process.join()
        print(process.exitcode)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "way", "duration"),
    [
        ("spawn", "read", "0.2"),
        ("spawn", "open", "0.2"),
        *(
            pytest.param("fork", way, "0", marks=needs_fork)
            for way in ("read", "left", "open")
        ),
        pytest.param("forkserver", "read", "0.2", marks=needs_fork),
    ],
)
def test_a_child_process_ends_when_it_is_done(program, method, way, duration):
    assert output_of(program(CHILD, method, way, duration)) == "0\n"


# ------------------------------------------------------------------------------------------------
# Self-contained


@pytest.mark.slow
def test_a_copy_in_a_package(program):
    source = """
        import sys
        from yourpackage import distributed

        def modules(task):
            return [name for name in sys.modules if "distributed" in name]

        if __name__ == "__main__":
            for name in ("single_process", "joblib"):
                print(*sorted(distributed.get_backend(name).setup(abs, [-2, -1])))
            print(*distributed.get_backend("joblib").setup(modules, [1], num_workers=2))
    """
    assert output_of(program(source)) == "1 2\n1 2\n[]\n"


@pytest.mark.once
def test_a_copy_that_hides_the_package_of_dask(program, tmp_path):
    shutil.copy(FILE, tmp_path)
    source = """
        from distributed import Joblib

        try:
            Joblib.setup(abs, [1], backend="dask")
        except ImportError as error:
            print(error)
    """
    output = output_of(program(source))
    assert str(tmp_path / "distributed.py") in output
    assert "move that file into a package" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", distributed._PRIVATE_NAMES)
def test_a_private_name_that_has_vanished_is_a_clear_error(program, name):
    source = """
        import numpy, sys
        from yourpackage import distributed

        def hide(owner, name, *default):
            if name == sys.argv[1]:
                raise AttributeError(name)
            return getattr(owner, name, *default)

        if __name__ == "__main__":
            distributed.getattr = hide
            try:
                arrays = [numpy.zeros(300_000)]
                print(list(distributed.Joblib.setup(len, arrays, 2)))
            except Exception as error:
                print(error)
    """
    output = output_of(program(source, name))
    assert f"{name}, which is needed " in output


UNGUARDED = """
import sys
sys.path.insert(0, {folder!r})
from yourpackage.distributed import Joblib

def work(task):
    return 2 * task

print(sum(Joblib.setup(work, range(9), 2, errors="return")), __name__)
"""


@pytest.mark.parametrize(
    "way",
    [
        "script",
        *(
            pytest.param(way, marks=pytest.mark.once)
            for way in ("-c", "stdin", "zip", "-I", "-m")
        ),
    ],
)
@pytest.mark.usefixtures("program")  # whose folder this is
def test_a_program_needs_no_guard(way, tmp_path):
    source = UNGUARDED.format(folder=str(tmp_path))
    (tmp_path / "unguarded.py").write_text(source)
    with zipfile.ZipFile(tmp_path / "unguarded.zip", "w") as archive:
        archive.writestr("__main__.py", source)
    arguments = {
        "script": ["unguarded.py"],
        "-c": ["-c", source],
        "stdin": ["-"],
        "zip": ["unguarded.zip"],
        "-I": ["-I", "unguarded.py"],
        "-m": ["-m", "unguarded"],
    }[way]
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        check=False,
        input=source if way == "stdin" else "",
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert (done.stdout, done.stderr) == ("72 __main__\n", "")


@pytest.mark.once
@needs_shell
def test_workers_are_run_by_the_executable_that_multiprocessing_is_told_of(
    begun, tmp_path
):
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        f'#!/bin/sh\necho >>{tmp_path}/started\nexec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    source = """
        multiprocessing.set_executable(sys.argv[1])
        sys.executable = "/nowhere"
        print(sum(Joblib.setup(abs, range(9), 2)))
    """
    assert output_of(begun(source, wrapper)) == "36\n"
    assert (tmp_path / "started").read_text() == "\n\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("initializer", [eval, exec])
def test_large_arguments_of_an_initializer_that_exits_keep_nothing_waiting(
    processes, initializer
):
    # A worker of eval() dies before it has read all of it; that of exec(), after.
    initargs = (EXIT if initializer is exec else "", {"large": bytes(5_000_000)})
    if initializer is eval:
        initargs = (by_value(DiesAsItIsUnpickled)(), *initargs)
    options = {"initializer": initializer, "initargs": initargs}
    received, error = collect(processes(abs, range(9), **options), BrokenExecutor)
    assert received == []
    assert "a worker process has died as it started" in str(error)


def test_a_lock_in_initargs_is_an_error_that_names_them(processes):
    options = {"initializer": print, "initargs": (multiprocessing.Lock(),)}
    received, error = collect(processes(abs, range(9), **options), Exception)
    assert received == []
    assert type(error) is pickle.PicklingError
    assert "initargs" in str(error)


@pytest.mark.once
def test_functions_travel_though_bytes_are_compared_strictly(program):
    source = """
        import subprocess, sys
        from yourpackage.distributed import Joblib

        def work(task):
            return 2 * task

        if __name__ == "__main__":
            if len(sys.argv) == 1:
                run = subprocess.run([sys.executable, "-bb", __file__, "again"])
                sys.exit(run.returncode)
            print(sum(Joblib.setup(work, range(9), 2)))
    """
    assert output_of(program(source)) == "72\n"


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [None, 60])
def test_the_pickler_that_loky_is_told_to_use(program, tmp_path, monkeypatch, timeout):
    monkeypatch.setenv("LOKY_PICKLER", "pickle")
    (tmp_path / "helpers_with_caches.py").write_text(HELPERS)
    source = f"""
        import helpers_with_caches
        from fractions import Fraction
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            tasks = [Fraction(-1, 3), Fraction(-2, 3)]
            print(*sorted(Joblib.setup(abs, tasks, 2, timeout={timeout})))
            print(*Joblib.setup(helpers_with_caches.fibonacci, [10], 2))
    """
    assert output_of(program(source)) == "1/3 2/3\n55\n"


FROZEN = """
    import os, stat, sys

    if __name__ == "__main__":
        # As the bootloader of PyInstaller: the executable is the program.
        sys.frozen = True
        sys.executable = os.path.abspath("executable")
        import multiprocessing.spawn

        multiprocessing.set_executable(sys.executable)
        multiprocessing.spawn.freeze_support()

    import numpy
    from yourpackage.distributed import FailedTask, Joblib

    def work(task):
        return len(task) if hasattr(task, "__len__") else task

    if __name__ == "__main__":
        from joblib.externals.loky.backend import resource_tracker

        if sys.argv[1] == "array":
            tasks, expected = [numpy.zeros(300_000) for _ in range(6)], 1_800_000
        else:
            tasks, expected = range(6), 15
        for _ in range(2):
            results = Joblib.setup(work, tasks, 2, backend=sys.argv[2])
            assert sum(results) == expected
        tracker = resource_tracker._resource_tracker
        print(tracker._pid, tracker._fd)
        Joblib.shutdown()
"""


EXECUTABLE = """#!/bin/sh
echo "$*" >>{folder}/started
[ "$(wc -l <{folder}/started)" -gt 9 ] && exit 9
for argument do
    [ "$argument" = -c ] && exec {python} "$@"
done
exec {python} {folder}/program.py "$@"
"""


@pytest.mark.once
@needs_shell
@pytest.mark.parametrize(
    ("backend", "tasks"),
    [("loky", "array"), ("loky", "numbers"), ("multiprocessing", "numbers")],
)
def test_a_frozen_program_starts_workers_and_nothing_of_loky(
    program, tmp_path, tasks, backend
):
    executable = tmp_path / "executable"
    executable.write_text(EXECUTABLE.format(folder=tmp_path, python=sys.executable))
    executable.chmod(0o755)
    before = set(os.listdir("/dev/shm"))
    process = program(FROZEN, tasks, backend)
    assert output_of(process) == "None None\n"
    started = tmp_path / "started"
    lines = started.read_text().splitlines() if started.exists() else []
    assert not any("loky" in line for line in lines)
    workers = [line for line in lines if "--multiprocessing-fork" in line]
    assert len(workers) == 2
    left = set(os.listdir("/dev/shm")) - before
    assert not any(f"_{process.pid}_" in name for name in left)


# ------------------------------------------------------------------------------------------------
# task_func


@pytest.mark.parametrize("size", [pytest.param(10, marks=pytest.mark.locally), 100_000])
@pytest.mark.parametrize("batch_size", [1, pytest.param(5, marks=pytest.mark.locally)])
def test_the_function_is_sent_once(remembering, size, batch_size):
    model = by_value(Model)("x" * size)
    for data in (model.data, "changed between two runs"):
        model.data, pickled = data, type(model).pickled
        results = list(remembering(model.objective, range(60), batch_size=batch_size))
        assert type(model).pickled == pickled + 1
        assert sorted(task for _, _, task, _ in results) == list(range(60))
        assert {seen for *_, seen in results} == {data}
        if remembering.keywords["backend"] != "dask":  # pickled again by each worker
            for pid in {pid for pid, *_ in results}:
                calls = sorted(calls for other, calls, *_ in results if other == pid)
                assert calls == list(range(1, len(calls) + 1))


class Unwilling:
    def __getstate__(self):
        return {}[self.key]

    key = "stays here"

    def call(self, task):
        return task


@pytest.mark.alike
def test_a_function_that_cannot_be_pickled_is_named(remembering):
    function = by_value(Unwilling)().call
    _, error = collect(remembering(function, [1]), Exception)
    assert type(error) is pickle.PicklingError
    assert "task_func cannot be pickled: " in str(error)
    assert "Unwilling" in str(error)
    assert isinstance(error.__cause__, KeyError)
    assert "__getstate__" in "".join(traceback.format_tb(error.__cause__.__traceback__))


class Holder:
    def __init__(self, held):
        self.values = {"solver": [1, held]}

    def call(self, task):
        return task


@pytest.mark.once
@pytest.mark.parametrize("what", ["method", "lambda", "task", "initargs", "result"])
def test_an_error_of_pickling_says_where_it_was(processes, what):
    make = by_value(Holder)
    held = make({"lock": threading.Lock()})
    if what == "method":
        results = processes(held.call, [1])
    elif what == "lambda":
        results = processes(lambda task: held, [1])
    elif what == "task":
        results = processes(id, [held])
    elif what == "initargs":
        results = processes(abs, [1], initializer=id, initargs=(held,))
    else:
        code = "{'lock': __import__('threading').Lock()}"
        results = processes(lambda task: make(eval(code)), [1])
    _, error = collect(results, pickle.PicklingError)
    for name in ("'values'", "'solver'", "1", "'lock'"):
        assert name in str(error)
    if what == "lambda":
        assert "held" in str(error)


@pytest.mark.once
def test_an_error_of_pickling_is_looked_for_in_what_has_no_end(processes):
    holder = by_value(Holder)(threading.Lock())
    holder.values = {"again": holder, **holder.values}
    _, error = collect(processes(id, [holder]), pickle.PicklingError)
    assert "'solver'" in str(error)


def test_reducers_of_the_user_are_asked_for_plain_results(processes):
    kind = by_value(Holder)
    backward = {kind: lambda holder: (str, ("reduced",))}
    results = processes(lambda task: kind(task), [1], backward_reducers=backward)
    assert list(results) == ["reduced"]


CLASSES_OF_THE_PROGRAM = """
    import collections, importlib, sys
    from unittest import mock
    from yourpackage import distributed
    from yourpackage.distributed import Joblib

    RATE = 1

    class Plain:
        scale = 1
        def __init__(self, x):
            self.x = x
        def value(self):
            Plain.scale += 1
            return self.x * RATE

    class Failed(Exception):
        def value(self):
            return self.args[0] * RATE

    class Row(collections.namedtuple("Row", "x")):
        def value(self):
            return self.x * RATE

    def fail(task):
        raise Failed(task)

    def count(task):
        global RATE
        RATE += 1
        if task == 1:
            raise Failed(1)
        return Failed(1).value()

    if __name__ == "__main__":
        with mock.patch.dict(sys.modules):
            list(Joblib.setup(Plain, [1], 2))
        for RATE in (1, 2):
            for function in (Plain, Row, fail):
                for result in Joblib.setup(function, [1], 2, errors="return"):
                    print(getattr(result, "error", result).value(), end=" ")
        Plain.scale = 10
        list(Joblib.setup(Plain, [1], 2))
        print(Plain.scale)
        RATE = 0
        options = {"errors": "return", "timeout": 60, "return_as": "generator"}
        print(*[r for r in Joblib.setup(count, range(4), 1, **options) if type(r) is int])
        importlib.reload(distributed)
        print(*[type(plain) is Plain for plain in distributed.Joblib.setup(Plain, [1], 2)])
"""


@pytest.mark.once
def test_results_do_not_change_classes_of_the_program(program):
    output = output_of(program(CLASSES_OF_THE_PROGRAM)).splitlines()
    assert output == ["1 1 1 2 2 2 10", "1 3 4", "True"]


@pytest.mark.once
def test_joblib_may_be_found_by_the_path_of_the_program_alone(program):
    source = """
        import subprocess, sys

        if len(sys.argv) == 1:
            again = [sys.executable, "-S", __file__, *sys.path]
            sys.exit(subprocess.run(again).returncode)
        sys.path[:] = sys.argv[1:]
        from yourpackage.distributed import Joblib

        print(*sorted(Joblib.setup(abs, [-1, -2], 2)))
    """
    assert output_of(program(source)) == "1 2\n"


@pytest.mark.once
def test_errors_of_code_that_has_no_name_keep_their_class(processes):
    names = {}
    source = """
class Failed(Exception):
    def __init__(self, a, *, b):
        super().__init__(a)
"""
    eval(compile(source, "nameless", "exec"), names)

    def function(task):
        raise names["Failed"](1, b=2)

    _, error = collect(processes(function, [1]), Exception)
    assert type(error).__name__ == "Failed"


@pytest.mark.once
def test_a_result_that_cannot_be_sent_is_a_failed_task(processes):
    def limit():
        from multiprocessing import connection

        kind = getattr(connection, "PipeConnection", connection.Connection)
        send = kind.send_bytes

        def send_less(self, data, *arguments):
            if len(data) > 1_000_000:  # as Windows has a limit
                raise OSError(22, "this is too large")
            send(self, data, *arguments)

        kind.send_bytes = send_less

    options = {"initializer": limit, "errors": "return", "batch_size": 1}
    results = list(processes(bytes, [1, 2_000_000, 3], **options))
    (failed,) = [result for result in results if isinstance(result, FailedTask)]
    assert failed.number == 1
    assert "too large" in str(failed.error)


@pytest.mark.alike
def test_a_function_that_a_worker_cannot_unpickle_is_named(pickling_setup):
    function = by_value(CannotBeUnpickled)().call
    _, error = collect(pickling_setup(function, [1]), pickle.UnpicklingError)
    message = "task_func cannot be unpickled in a worker: KeyError: 'not here'"
    assert message in str(error)
    assert "__setstate__" in str(error.__cause__)


@pytest.mark.alike
@pytest.mark.once
def test_a_task_that_a_worker_cannot_unpickle_is_named(pickling_setup):
    tasks = [1, 2, by_value(CannotBeUnpickled)(), 3]
    options = {"return_as": "generator", "batch_size": 2}
    received, error = collect(pickling_setup(repr, tasks, **options), Exception)
    assert received == ["1", "2"]
    assert type(error) is pickle.UnpicklingError
    assert "the task cannot be unpickled in a worker: KeyError: 'not here'" in str(
        error
    )
    assert "__setstate__" in str(error.__cause__)
    assert error.__notes__[0].startswith("Task 2 (counted from 0): ")


@pytest.mark.once
@pytest.mark.parametrize("what", ["function", "task"])
def test_a_module_that_workers_cannot_find_is_told_of(monkeypatch, what):
    module = types.ModuleType("only_here")
    source = "def work(task):\n    return 1\nclass Task:\n    pass"
    eval(compile(source, "only_here", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    function, tasks = (
        (module.work, [1]) if what == "function" else (id, [module.Task()])
    )
    _, error = collect(Joblib.setup(function, tasks, 2), pickle.UnpicklingError)
    assert "No module named 'only_here'" in str(error)
    assert "install it where the workers are" in str(error)
    assert ("task_func" if what == "function" else "the task") in str(error)


WRAPPED = """
    import sys
    from yourpackage.distributed import FailedTask, Joblib

    class Wrapped:
        def __reduce__(self):
            return "work"

        def __call__(self, task):
            return 2 * task

    work = Wrapped()

    if __name__ == "__main__":
        backend, what = sys.argv[1:]
        function, tasks = (work, range(3)) if what == "function" else (id, [work])
        try:
            print(sorted(Joblib.setup(function, tasks, 2, backend=backend)))
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.mark.once
@pytest.mark.parametrize("what", ["function", "task"])
def test_a_wrapped_function_of_the_program_is_told_of(program, what):
    output = output_of(program(WRAPPED, "loky", what))
    assert output.startswith("UnpicklingError ")
    assert ("task_func" if what == "function" else "the task") in output
    assert "AttributeError: " in output
    assert "'work'" in output
    assert "put it into a module" in output


DECORATED = """
    import functools, sys
    import helpers_with_caches as helpers
    from yourpackage.distributed import Joblib

    @functools.lru_cache(maxsize=5, typed=True)
    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    @functools.cache
    def twice(n):
        return 2 * helpers.fibonacci(n)

    @functools.singledispatch
    def kind(task):
        return "any"

    @kind.register
    def _(task: int):
        return "int"

    class Model:
        @functools.lru_cache
        def cached(self, task):
            return task

        @functools.singledispatchmethod
        def kind(self, task):
            return "any"

        @kind.register
        def _(self, task: int):
            return "int"

    def info(task):
        fibonacci(1)
        return tuple(fibonacci.cache_info()), fibonacci.cache_parameters()["typed"]

    def local():
        return functools.cache(lambda task: task + 1)

    @functools.cache
    def scaled(task):
        return task * scaled.factor

    if __name__ == "__main__":
        setup = functools.partial(Joblib.setup, num_workers=2, backend=sys.argv[1])
        fibonacci(10), kind(1), Model().cached(1)
        print(*setup(fibonacci, [10]), *setup(twice, [10]), *setup(local(), [1]))
        print(*setup(Model().cached, [3]), *setup(helpers.Model().cached, [4]))
        print(*sorted(setup(kind, [1, "x"])), *sorted(setup(Model().kind, [1, "x"])))
        print(*setup(info, [1]))
        print(*sorted(setup(lambda task: task(10), [fibonacci, twice])))
        is_that_of_the_module = lambda task: task is helpers.fibonacci
        print(*setup(is_that_of_the_module, [helpers.fibonacci]))
        scaled.factor = 3
        print(*setup(scaled, [2]), *setup(functools.cache(functools.partial(pow, 2)), [5]))
        print(*setup(functools.cache(", ".join), [("a", "b")]))
        print(*(model.cached(5) for model in setup(lambda task: Model(), [1])))
"""

HELPERS = """
import functools

@functools.cache
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

fibonacci(3)

class Model:
    @functools.cache
    def cached(self, task):
        return task
"""


@pytest.mark.once
@pytest.mark.parametrize("name", ["loky", *CLUSTERS])
def test_decorated_functions_of_the_program_travel(program, tmp_path, name):
    (tmp_path / "helpers_with_caches.py").write_text(HELPERS)
    source = DECORATED
    if name != "loky":
        pytest.importorskip(name)
        begin = {
            "dask": "from dask.distributed import Client, LocalCluster; cluster = "
            "LocalCluster(n_workers=1, dashboard_address=None); client = Client(cluster)",
            # What Ray itself has to say would come between the lines that are compared.
            "ray": "import ray; ray.init(num_cpus=2, include_dashboard=False, "
            "log_to_driver=False)",
        }
        main = 'if __name__ == "__main__":\n'
        source = source.replace(main, f"{main}        {begin[name]}\n")
    process = program(source, name, warnings="default")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.splitlines()[-9:] == [
        "55 110 2",
        "3 4",
        "any int any int",
        "((0, 1, 5, 1), True)",
        "55 110",
        "True",
        "6 32",
        "a, b",
        "5",
    ]


async def coroutine(task):
    return task


async def asynchronous_generator(task):
    yield task


def generator(task):
    yield task


class CallsCoroutine:
    async def __call__(self, task):
        return task


RESULTS_STAY = {
    "asyncio.run(f(task))": coroutine,
    "asyncio.run(...)": asynchronous_generator,
    "list(f(task))": generator,
    "a coroutine": CallsCoroutine(),
    "a generator": functools.partial(generator),
}


@pytest.mark.alike
@pytest.mark.parametrize("what", RESULTS_STAY)
def test_results_that_cannot_be_sent_are_an_error_at_once(pickling_setup, what):
    with pytest.raises(TypeError) as caught:
        pickling_setup(RESULTS_STAY[what], [1])
    assert "task_func must not return a" in str(caught.value)
    assert what in str(caught.value)


@pytest.mark.parametrize("timeout", [Fraction(60), 10**400, math.inf, "float32"])
def test_all_kinds_of_numbers_limit_time(timeout):
    if timeout == "float32":
        timeout = pytest.importorskip("numpy").float32(60)
    results = Joblib.setup(abs, [-1, -2], 2, timeout=timeout, errors="return")
    assert sorted(results) == [1, 2]


@pytest.mark.parametrize("options", [{"timeout": 9}, {"errors": "return"}])
def test_results_of_one_process_have_to_be_sent(options):
    with pytest.raises(TypeError, match="task_func must not return a"):
        Joblib.setup(generator, [1], num_workers=1, **options)


@pytest.mark.parametrize(
    "options", [{"backend": "threading"}, {"num_workers": 1}, {"prefer": "threads"}]
)
def test_results_need_not_be_sent_by_threads(options):
    (result,) = Joblib.setup(generator, [1], **{"num_workers": 2, **options})
    assert list(result) == [1]
    (result,) = SingleProcess.setup(coroutine, [1])
    result.close()


def test_what_is_done_for_each_task():
    """Count the calls, resumptions of generators among them, in the consumer's process."""
    calls = Counter()

    def profile(frame, event, argument):
        calls[frame.f_code.co_name] += event == "call"

    count = 50_000
    sys.setprofile(profile)
    try:
        collections.deque(Joblib.setup(abs, range(count), num_workers=2), maxlen=0)
    finally:
        sys.setprofile(None)
    assert calls.pop("draw") <= count + 1
    assert calls.pop("_results") <= count + 1
    assert sum(calls.values()) < count / 2


# ------------------------------------------------------------------------------------------------
# num_workers and backend


def test_all_cores_are_the_default(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    barrier = threading.Barrier(min(2, os.cpu_count()))
    results = Joblib.setup(
        lambda task: barrier.wait(timeout=60), range(2), backend="threading"
    )
    assert len(list(results)) == 2


def test_as_many_tasks_run_at_once_as_there_are_workers(setup, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    tasks = [f"({touch(one)}, {await_path(two)})", f"({touch(two)}, {await_path(one)})"]
    assert len(list(setup(eval, tasks))) == 2


WHERE = "(__import__('os').getpid(), __import__('threading').get_ident())"


def test_one_worker_is_this_process():
    results = Joblib.setup(eval, [WHERE] * 3, num_workers=1)
    assert set(results) == {(os.getpid(), threading.get_ident())}


@pytest.mark.parametrize("options", [{"prefer": "threads"}, {"require": "sharedmem"}])
def test_hints_reach_joblib(options):
    ((process, thread),) = set(Joblib.setup(eval, [WHERE], **options))
    assert process == os.getpid()
    assert thread != threading.get_ident()


def test_an_open_configuration_is_honoured():
    backend = joblib.parallel.ThreadingBackend()
    with joblib.parallel_config(backend=backend, n_jobs=3) as config:
        before = (dict(config), dict(vars(backend)))
        barrier = threading.Barrier(3)
        results = Joblib.setup(lambda task: barrier.wait(timeout=60), range(3))
        assert (config, vars(backend)) == before
    assert len(list(results)) == 3  # read when it is no longer open
    assert (config, vars(backend)) == before


def test_an_open_configuration_gives_a_named_backend_its_options(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1, n_jobs=3):
        results = Joblib.setup(
            os.getenv, ["OMP_NUM_THREADS"], backend="loky", num_workers=2
        )
    assert list(results) == ["1"]


def test_arguments_override_an_open_configuration():
    with joblib.parallel_config(backend="threading", n_jobs=1):
        ((process, _),) = set(Joblib.setup(eval, [WHERE], 2, backend="loky"))
    assert process != os.getpid()


def test_a_registered_name(monkeypatch):
    monkeypatch.setitem(joblib.parallel.BACKENDS, "ours", CountingLoky)
    CountingLoky.submitted.clear()
    assert sorted(Joblib.setup(abs, [-1, -2], num_workers=2, backend="ours")) == [1, 2]
    assert sum(CountingLoky.submitted) == 2


def test_an_option_of_the_backend_itself():
    results = Joblib.setup(abs, [-1, -2], num_workers=2, idle_worker_timeout=100)
    assert sorted(results) == [1, 2]


@pytest.mark.once
@pytest.mark.parametrize("package", ["dask", "ray"])
def test_a_missing_engine_is_named(program, package):
    source = """
        import sys
        from yourpackage.distributed import Joblib

        sys.modules[sys.argv[2]] = None  # as if it were not installed
        try:
            Joblib.setup(abs, [1], backend=sys.argv[1])
        except ImportError as error:
            print(error)
    """
    hidden = {"dask": "distributed", "ray": "ray"}[package]
    assert "pip install" in output_of(program(source, package, hidden))


# ------------------------------------------------------------------------------------------------
# Other options


def test_results_come_as_they_complete(setup, tmp_path):
    results = setup(eval, [await_path(tmp_path / "go", "slow"), value("quick")])
    assert next(results) == "quick"
    (tmp_path / "go").touch()
    assert list(results) == ["slow"]


def test_results_in_order(setup, tmp_path):
    # The first to complete is not the first in order.
    first, second = await_path(tmp_path / "go", 0), touch(tmp_path / "go", 1)
    tasks = [first, second, *map(value, range(2, 20))]
    assert list(setup(eval, tasks, return_as="generator", batch_size=1)) == list(
        range(20)
    )


class SentAsANumber:
    """A task of which nothing but a number travels."""

    def __init__(self, number):
        self.number = number

    def __int__(self):  # where it does not travel
        return self.number

    def __reduce__(self):
        return int, (self.number,)


def number_of(task):
    if int(task) % 5 == 3:
        raise ValueError(int(task))
    return int(task)


@pytest.mark.alike
@pytest.mark.parametrize(
    ("return_as", "batch_size"), [("generator", 4), ("generator_unordered", "auto")]
)
def test_results_are_returned_with_the_tasks_that_were_drawn(
    setup, return_as, batch_size
):
    tasks = [SentAsANumber(number) for number in range(0, 15, 5)]
    tasks += [SentAsANumber(number) for number in range(0, 15, 5)]
    options = {"return_as": return_as, "batch_size": batch_size, "return_tasks": True}
    pairs = list(setup(by_value_of(number_of), iter(tasks), **options))
    assert all(type(pair) is tuple for pair in pairs)
    assert [result for _, result in pairs] == [task.number for task, _ in pairs]
    drawn = [task for task, _ in pairs]
    assert return_as == "generator_unordered" or drawn == tasks
    assert set(drawn) == set(tasks)  # they are equal to themselves only


@pytest.mark.alike
@pytest.mark.parametrize("batch_size", [1, 4])
def test_failed_tasks_are_returned_with_the_tasks_that_were_drawn(setup, batch_size):
    tasks = [SentAsANumber(number) for number in range(12)]
    options = {"batch_size": batch_size, "errors": "return", "return_tasks": True}
    pairs = list(setup(by_value_of(number_of), iter(tasks), **options))
    assert {task for task, _ in pairs} == set(tasks)
    for task, result in pairs:
        if task.number % 5 == 3:
            assert type(result) is FailedTask
            assert result.task is task
            assert result.number == task.number
        else:
            assert result == task.number


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tasks_that_end_their_worker_are_returned_as_they_were_drawn(
    processes, batch_size
):
    tasks = [value(number) for number in range(12)]
    tasks[5] = EXIT
    tasks[7] = CannotBePickled()
    options = {"batch_size": batch_size, "errors": "return", "return_tasks": True}
    pairs = list(processes(run, iter(tasks), return_as="generator", **options))
    assert all(pair[0] is task for pair, task in zip(pairs, tasks, strict=True))
    failed, fine = numbers_of(result for _, result in pairs)
    assert set(failed) >= {5, 7}
    assert {*failed, *fine} == set(range(12))


def test_results_before_an_error_are_returned_with_their_tasks(any_setup):
    tasks = [value(0), value(1), raising("KeyError()"), value(3)]
    received, error = collect(any_setup(run, tasks, return_tasks=True), KeyError)
    assert received == [(tasks[0], 0), (tasks[1], 1)]
    assert error is not None


@pytest.mark.parametrize("setup", [SingleProcess.setup, Joblib.setup])
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_return_tasks_must_be_one_of_two(setup, value):
    message = f"return_tasks must be True or False, got {value!r}"
    with pytest.raises(ValueError, match=message):
        setup(abs, [1], return_tasks=value)


def test_sizes_of_batches():
    CountingLoky.submitted.clear()
    results = Joblib.setup(abs, range(400_000), num_workers=2, backend=CountingLoky())
    assert sum(1 for _ in results) == sum(CountingLoky.submitted) == 400_000
    assert len(CountingLoky.submitted) < 4000
    assert max(CountingLoky.submitted) <= 8192  # joblib would go on, and take up memory
    CountingLoky.submitted.clear()
    results = Joblib.setup(
        abs, range(70), num_workers=2, batch_size=7, backend=CountingLoky()
    )
    assert len(list(results)) == 70
    assert max(CountingLoky.submitted) == 7


def test_batches_of_heavy_tasks_do_not_grow(tmp_path):
    drawn = []

    def tasks():
        for number in range(200):
            drawn.append(number)
            yield numpy.zeros(125_000)  # 1 MB

    results = Joblib.setup(numpy.sum, tasks(), 2, pre_dispatch=2)
    # Two batches are out, and two may have been drawn; of 8 tasks at most.
    ahead = [len(drawn) - received for received, _ in enumerate(results)]
    assert max(ahead) <= 32


def counting_loads(data, loads=pickle.loads):
    pickle.calls += 1
    return loads(data)


COUNT_LOADS = f"""
import pickle
pickle.calls = 0
{inspect.getsource(counting_loads)}
pickle.loads = counting_loads
"""

PLAIN_TASKS = {
    "pair": "(number, str(number))",
    "list": "[number, None]",
    "nested": "({'a': [number, 1.5]}, {(number, b'')}, 1j)",
}


@pytest.mark.parametrize("source", PLAIN_TASKS.values(), ids=PLAIN_TASKS)
def test_plain_tasks_and_results_are_not_unpickled_one_by_one(processes, source):
    function = lambda task: (__import__("pickle").calls, task)
    tasks = [eval(source, {"number": number}) for number in range(400)]
    options = {"initializer": exec, "initargs": (COUNT_LOADS, {}), "timeout": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle, "calls", 0, raising=False)
        patch.setattr(pickle, "loads", counting_loads)
        results = list(processes(function, tasks, batch_size=100, **options))
        assert pickle.calls < 100
    counts, received = zip(*results, strict=True)
    assert sorted(map(repr, received)) == sorted(map(repr, tasks))
    assert max(counts) < 100


def test_results_of_a_batch_share_nothing(pickling_setup):
    shared = {"list": []}
    function = lambda task: [task, (shared, shared), shared["list"]]
    results = sorted(pickling_setup(function, range(8), batch_size=8))
    for number, result in enumerate(results):
        assert result == [number, ({"list": []}, {"list": []}), []]
        assert result[1][0] is result[1][1]
        assert result[1][0]["list"] is result[2]
        result[2].append(number)


def test_results_of_a_batch_are_what_they_would_be_alone(pickling_setup):
    def function(task):
        import collections

        ring, deep, wide = [task], [], (task,)
        ring.append(ring)
        for _ in range(100_000):
            deep = [deep]
        for _ in range(100):
            wide = (wide, wide)
        if isinstance(task, str):
            return {"ring": ring, "deep": deep, "wide": wide}[task]
        kinds = set, collections.Counter, frozenset, bytearray
        return kinds[task]([task])

    tasks = ["ring", *range(1, 4), "deep", "wide", "ring"]
    options = {"errors": "return", "batch_size": 7, "return_as": "generator"}
    results = list(pickling_setup(function, tasks, **options))
    for ring in results[0], results[6]:
        assert ring[1] is ring
    assert results[0] is not results[6]
    assert list(map(type, results[1:4])) == [Counter, frozenset, bytearray]
    assert isinstance(results[4].error, pickle.PicklingError)
    wide = results[5]
    while wide != ("wide",):
        assert wide[0] is wide[1]
        wide = wide[0]


OF_THE_PROGRAM = """
    import collections, dataclasses, enum, sys
    from yourpackage.distributed import FailedTask, Joblib

    @dataclasses.dataclass
    class Point:
        x: int

    class Plain:
        def __init__(self, number):
            self.number = number

    class Child(Plain):
        pass

    class Slotted:
        __slots__ = ("number",)

    class Stateful(Plain):
        def __getstate__(self):
            return {"number": -self.number}

    class Listed(list):
        pass

    class Colour(enum.Enum):
        RED = 1

    class Failed(Exception):
        pass

    Pair = collections.namedtuple("Pair", "x y")
    kinds = Point, Plain, Child, Stateful, Listed, Failed

    def make(task):
        number, form = task
        if form == "enum":
            return Colour.RED
        if form == "class":
            return Point
        if form == "pair":
            return Pair(Point(number), Plain(number))
        made = kinds[number]([number] if kinds[number] is Listed else number)
        return {"alone": made, "nested": [{"key": (made, [made])}]}[form]

    for form in ("alone", "nested"):
        tasks = [(number, form) for number in range(len(kinds))]
        for size in 1, len(kinds):
            results = list(Joblib.setup(make, tasks, 1, return_as="generator",
                batch_size=size, timeout=60))
            if form == "nested":
                assert all(r[0]["key"][0] is r[0]["key"][1][0] for r in results)
                results = [r[0]["key"][0] for r in results]
            print(*[type(r) is kind for r, kind in zip(results, kinds)])
            print(results[0] == Point(0), results[3].number, *results[4])
    tasks = [(1, form) for form in ("enum", "class", "pair")]
    enum, kind, pair = Joblib.setup(make, tasks, 1, return_as="generator",
        batch_size=3, timeout=60)
    print(enum is Colour.RED, kind is Point, type(pair) is Pair, pair.x == Point(1))
"""


def test_results_of_a_class_of_the_program_are_of_its_own_class(program):
    lines = output_of(program(OF_THE_PROGRAM)).splitlines()
    assert lines == [*["True " * 5 + "True", "True -3 4"] * 4, "True True True True"]


OF_NUMPY = {
    "float": "numpy.arange(5.0)",
    "none": "numpy.empty((0, 3))",
    "fortran": "numpy.asfortranarray(numpy.arange(6).reshape(2, 3))",
    "steps": "numpy.arange(20)[::-3]",
    "big-endian": "numpy.arange(5, dtype='>i4')",
    "bytes": "numpy.array([b'a', b'bc'])",
    "text": "numpy.array(['a', 'bc'])",
    "structured": "numpy.array([(1, 2.5)], dtype=[('n', 'i4'), ('x', 'f8')])",
    "record": "numpy.rec.array([(1, 2.5)], dtype=[('n', 'i4'), ('x', 'f8')])",
    "times": "numpy.array(['2020-02-29', 'NaT'], dtype='datetime64[D]')",
    "objects": "numpy.array([1, 'two', None, [4]], dtype=object)",
    "masked": "numpy.ma.array([1, 2], mask=[True, False])",
    "scalar": "numpy.float32(0.1)",
    "boolean": "numpy.bool_(True)",
    "time": "numpy.datetime64('2020-02-29T01:02')",
    "delta": "numpy.timedelta64(5, 'h')",
    "complex": "numpy.complex64(1 + 2j)",
    "void": "numpy.array([(1, 2.5)], dtype=[('n', 'i4'), ('x', 'f8')])[0]",
    "type": "numpy.dtype([('n', 'i4')])",
    "function": "numpy.sin",
    "generator": "numpy.random.default_rng(1).bit_generator.state",
}


@pytest.mark.parametrize("form", ["{}", "({}, [{}])", "{{'key': {}}}"])
@needs_numpy
def test_results_of_numpy_arrive_equal(pickling_setup, form):
    sources = [form.format(*[source] * 2) for source in OF_NUMPY.values()]
    tasks = [f"(numpy := __import__('numpy'), {source})[1]" for source in sources]
    options = {"batch_size": len(tasks), "return_as": "generator"}
    for source, result in zip(
        sources, pickling_setup(eval, tasks, **options), strict=True
    ):
        expected = eval(source)
        assert type(result) is type(expected)
        assert repr(result) == repr(expected)
        array, own = getattr(result, "dtype", None), getattr(expected, "dtype", None)
        assert array == own
        numpy.testing.assert_equal(result, expected)


@pytest.mark.parametrize("size", [3, 100_000])
def test_results_of_a_batch_share_no_array(pickling_setup, size):
    function = lambda task: [shared, task, {"of": shared}]
    shared = numpy.zeros(size)
    results = list(pickling_setup(function, iter(range(12)), batch_size=6))
    assert sorted(task for _, task, _ in results) == list(range(12))
    for array, number, _ in results:
        array += number
    for array, number, others in results:
        assert array[0] == number
        assert others["of"] is array


ONLY_THERE = """
import sys, types
module = sys.modules.setdefault("only_there", types.ModuleType("only_there"))
if not hasattr(module, "A"):
    exec("class A: pass", vars(module))
A = module.A
"""

# What is in a class that is made in a worker, so that it or its instances cannot be
# unpickled elsewhere.
UNREADABLE_CLASSES = {
    "attribute": f"{{'a': {BAD_RESULT}}}",
    "of the program": f"{{'__module__': '__main__', 'a': {BAD_RESULT}}}",
    "of a module": (
        f"{{'__module__': '__main__', 'a': (exec({ONLY_THERE!r}, g := {{}}), g['A'])[1]}}"
    ),
    "proxy": (
        "{'__module__': '__main__', '__init__': lambda self: setattr(self, 'held', 1), "
        "'__getattr__': lambda self, name: getattr(self.held, name)}"
    ),
    "reduce": "{'__reduce__': lambda self: (int, ('x',))}",
    "state": (
        "{'__setstate__': lambda self, state: 1 / 0, '__getstate__': lambda self: [1]}"
    ),
}


@each_order
@pytest.mark.parametrize("form", ["{}()", "[{}()]"])
@pytest.mark.parametrize("made", UNREADABLE_CLASSES.values(), ids=UNREADABLE_CLASSES)
def test_a_result_of_a_class_that_cannot_be_unpickled_costs_no_other(
    processes, made, form, return_as
):
    bad = form.format(f"type('Bad', (), {made})")
    fine = "type('Fine', (), {'__module__': '__main__'})()"
    tasks = ["0", "[1]", bad, "(3, {4})", fine, bad, "5.5"]
    options = {"errors": "return", "batch_size": 7, "return_as": return_as}
    # One worker, since batches are smaller at the end of the tasks.
    results = processes(run, tasks, num_workers=1, **options)
    failed, others = numbers_of(results)
    assert failed == [2, 5]
    assert [type(result).__name__ for result in others] == [
        *("int", "list", "tuple", "Fine", "float")
    ]


def test_a_formula_that_comes_to_nothing(monkeypatch):
    with pytest.raises(
        ValueError, match="pre_dispatch must come to 1 or more, got 'n_jobs - 2'"
    ):
        Joblib.setup(abs, [1], num_workers=2, pre_dispatch="n_jobs - 2")
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    workers = joblib.cpu_count()
    results = Joblib.setup(
        abs, [1], backend="threading", pre_dispatch=f"n_jobs - {workers}"
    )
    with pytest.raises(
        ValueError, match="pre_dispatch must come to 1 or more, got 'n_jobs - 2'"
    ):
        next(results)


@by_either_name
def test_an_initializer_prepares_each_worker(processes):
    results = processes(
        os.getenv,
        ["PREPARED"] * 9,
        initializer=exec,
        initargs=("import os; os.environ['PREPARED'] = 'yes'",),
    )
    assert set(results) == {"yes"}


def test_verbose_tells_how_far_it_is(capfd):
    list(Joblib.setup(abs, range(3), num_workers=2, verbose=11))
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("Done   3 out of   3 | ")


def test_verbose_with_one_worker(capfd):
    assert list(Joblib.setup(abs, [-1, -2], num_workers=1, verbose=11)) == [1, 2]
    assert "Done   2 out of   2" in capfd.readouterr().err


@settings(deadline=None, max_examples=60)
@given(
    tasks=st.lists(st.integers(), max_size=40),
    num_workers=st.sampled_from([1, 2, 3]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "backend": st.sampled_from(["loky", "threading", "sequential"]),
            "batch_size": st.sampled_from(["auto", 1, 3, 50]),
            "pre_dispatch": st.sampled_from(["all", 1, 3, "n_jobs", "3 * n_jobs"]),
            "return_as": st.sampled_from(["generator", "generator_unordered"]),
            "timeout": st.sampled_from([None, 60, 99.5]),
            "max_nbytes": st.sampled_from([None, "1K", 10**6]),
        },
    ),
)
def test_any_options_give_the_results_of_map(tasks, num_workers, options):
    expected = list(map(abs, tasks))
    results = list(Joblib.setup(abs, iter(tasks), num_workers, **options))
    if options.get("return_as") == "generator":
        assert results == expected
    else:
        assert Counter(results) == Counter(expected)
    assert (
        list(SingleProcess.setup(abs, iter(tasks), num_workers, **options)) == expected
    )


# ------------------------------------------------------------------------------------------------
# Other options: arguments that are not as said


class NoTasks:
    """Has the method that iterables have, as an array without dimensions."""

    def __iter__(self):
        raise TypeError("iteration over a 0-d array")

    def __repr__(self):
        return "array(5)"


class Silent(joblib.parallel.ThreadingBackend):
    supports_retrieve_callback = False


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"task_func": "abs"}, "task_func must be callable, got 'abs'"),
        (TypeError, {"tasks": 5}, "tasks must be iterable, got 5"),
        (TypeError, {"tasks": NoTasks()}, "tasks must be iterable, got array(5)"),
        (ValueError, {"num_workers": 0}, "num_workers must not be 0"),
        (
            TypeError,
            {"num_workers": 1.5},
            "num_workers must be an integer or None, got 1.5",
        ),
        (
            TypeError,
            {"num_workers": "two"},
            "num_workers must be an integer or None, got 'two'",
        ),
        (TypeError, {"n_jobs": 2}, "n_jobs=2 is not an option: use num_workers"),
        (ValueError, {"backend": "lokki"}, "got 'lokki'"),
        (ValueError, {"backend": 5}, "backend must be an instance or one of"),
        (ValueError, {"backend": ["loky"]}, "got ['loky']"),
        (
            ValueError,
            {"backend": Silent()},
            "backend must tell when a batch has completed",
        ),
        (
            ValueError,
            {"return_as": "list"},
            "'generator' (to have a list, use list(...)), got 'list'",
        ),
        (ValueError, {"return_as": None}, "return_as must be"),
        (ValueError, {"timeout": -1}, "timeout must be a number of seconds"),
        (ValueError, {"timeout": "1"}, "got '1'"),
        (ValueError, {"timeout": float("nan")}, "got nan"),
        (
            ValueError,
            {"batch_size": 0},
            "batch_size must be 'auto' or a positive integer, got: 0",
        ),
        (ValueError, {"batch_size": "many"}, "got: 'many'"),
        (ValueError, {"pre_dispatch": 0}, "pre_dispatch must be"),
        (ValueError, {"pre_dispatch": "2 * n_cores"}, "got '2 * n_cores'"),
        (ValueError, {"pre_dispatch": "2 *"}, "got '2 *'"),
        (ValueError, {"pre_dispatch": "0 * n_jobs"}, "got '0 * n_jobs'"),
        (ValueError, {"pre_dispatch": "-n_jobs"}, "got '-n_jobs'"),
        (ValueError, {"pre_dispatch": "n_jobs // 0"}, "got 'n_jobs // 0'"),
        (ValueError, {"idle_worker_timeout": "long"}, "idle_worker_timeout must be"),
        (ValueError, {"pre_dispatch": None}, "pre_dispatch must be"),
        (ValueError, {"mmap_mode": "x"}, "mmap_mode must be"),
        (ValueError, {"max_nbytes": "much"}, "max_nbytes must be"),
        (ValueError, {"max_nbytes": -1.5}, "got -1.5"),
        (ValueError, {"pre_dispatch": "(-n_jobs) ** 0.5"}, "got '(-n_jobs) ** 0.5'"),
        (ValueError, {"temp_folder": 5}, "temp_folder must be a path or None, got 5"),
        (ValueError, {"verbose": "yes"}, "verbose must be a number, got 'yes'"),
        (ValueError, {"prefer": "speed"}, "prefer=speed"),
        (ValueError, {"require": "speed"}, "require=speed"),
        (ValueError, {"backend": "loky", "require": "sharedmem"}, "require"),
        (ValueError, {"prefer": "processes", "require": "sharedmem"}, "prefer"),
        (ValueError, {"initializer": 5}, "initializer must be callable or None, got 5"),
        (ValueError, {"initargs": 5}, "initargs must be a tuple, got 5"),
        (
            TypeError,
            {"inner_max_num_threads": 1},
            "put it into joblib.parallel_config(backend=..., inner_max_num_threads=...)",
        ),
        (
            TypeError,
            {"bacth_size": 1},
            "option bacth_size=1: did you mean 'batch_size'?",
        ),
        (
            TypeError,
            {"nonsense": 1},
            "nonsense=1: Expected one of 'backend', 'batch_size'",
        ),
        *[
            (TypeError, {name: 1}, f"{name}=1 is not an option: use num_workers")
            for name in ("num_worker", "workers", "max_workers", "processes")
        ],
        (TypeError, {"chunksize": 9}, "chunksize=9 is not an option: use batch_size"),
        (TypeError, {"chunk_size": 9}, "chunk_size=9 is not an option: use batch_size"),
        (
            TypeError,
            {"backend": "threading", "maxtasksperchild": 9},
            "maxtasksperchild=9 is an option of worker processes of this machine",
        ),
        (
            TypeError,
            {"backend": CountingLoky(), "initializer": print},
            "those of 'loky' and 'multiprocessing', not of CountingLoky",
        ),
        (TypeError, {"num_workers": True}, "num_workers must be an integer or None"),
        (ValueError, {"timeout": True}, "timeout must be a number of seconds"),
        (TypeError, {"task_func": lambda x, y: 0}, "use lambda task: f(*task)"),
        (TypeError, {"task_func": pow}, "task_func must take one argument"),
    ],
)
def test_bad_input_is_met_at_once(error, arguments, message):
    arguments = {"task_func": abs, "tasks": [1], **arguments}
    with pytest.raises(error, match=re.escape(message)):
        Joblib.setup(**arguments)


@pytest.mark.parametrize("errors", ["ignore", None])
def test_errors_must_be_one_of_two(errors):
    with pytest.raises(ValueError, match="^errors must be ") as caught:
        Joblib.setup(abs, [1], errors=errors)
    for text in ("'raise'", "'return'", repr(errors)):
        assert text in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_maxtasksperchild_must_be_a_number_of_tasks(value):
    with pytest.raises(ValueError, match="^maxtasksperchild must be ") as caught:
        Joblib.setup(abs, [1], 2, maxtasksperchild=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("formula", ["2 * n_cores"])
def test_a_formula_with_another_name_says_so(formula):
    with pytest.raises(ValueError, match="pre_dispatch") as caught:
        Joblib.setup(abs, [1], 2, pre_dispatch=formula)
    assert "n_jobs is the only name" in str(caught.value)
    assert repr(formula) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"max_tasks_per_child": 5}, ["maxtasksperchild"]),
        ({"ordered": True}, ["return_as", "'generator'"]),
        ({"unordered": True}, ["return_as", "'generator_unordered'"]),
        ({"retries": 2}, ["errors='return'"]),
        ({"max_retries": 2}, ["errors='return'"]),
        ({"progress": True}, ["verbose", "tqdm"]),
        ({"error": "return"}, ["did you mean 'errors'?"]),
        ({"time_out": 5}, ["did you mean 'timeout'?"]),
        ({"maxtasksperchildren": 5}, ["did you mean 'maxtasksperchild'?"]),
        ({"batchsize": 5}, ["did you mean 'batch_size'?"]),
    ],
)
def test_options_of_others_are_told_what_there_is(options, texts):
    with pytest.raises(TypeError, match=next(iter(options))) as caught:
        Joblib.setup(abs, [1], 2, **options)
    for text in texts:
        assert text in str(caught.value)
    assert "max_nbytes'?" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_memory", "order"])
def test_a_word_that_is_not_near_is_not_named(name):
    with pytest.raises(TypeError, match=f"unknown option {name}=1") as caught:
        Joblib.setup(abs, [1], 2, **{name: 1})
    assert "did you mean" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# max_nbytes, mmap_mode, temp_folder


def test_large_arrays_are_mapped(processes, tmp_path):
    def mapped(**options):
        attributes = operator.attrgetter("mode", "filename")
        ((mode, file),) = processes(attributes, [array], **options)
        return mode, str(Path(file).parent.parent)

    array = numpy.zeros(300_000)
    folder = str(tmp_path)
    assert mapped()[0] == "r"
    assert mapped(temp_folder=folder) == ("r", folder)
    assert mapped(temp_folder=folder, mmap_mode="c") == ("c", folder)
    with pytest.raises(AttributeError, match="mode"):
        mapped(temp_folder=folder, max_nbytes=None)
    assert mapped(temp_folder=folder, max_nbytes="1K") == ("r", folder)
    assert mapped()[1] != folder


def test_what_is_large_in_a_function_lies_in_the_folder_of_the_run(processes, tmp_path):
    model = by_value(Model)((numpy.zeros(300_000), "x" * 100_000))
    results = processes(model.objective, range(20), temp_folder=str(tmp_path))
    *_, (array, _) = next(results)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 1
    assert array.shape == (300_000,)
    del array  # which the program maps
    results.close()
    assert left_in(tmp_path) == []


# Expressions for arrays, and for views of them; {} stands for what the view is of.
ROOTS = [
    "numpy.memmap(file, dtype, mode, offset, shape, order)",
    "numpy.asarray(numpy.memmap(file, dtype, mode, offset, shape, order))",
    "numpy.array(numpy.memmap(file, dtype, 'r', offset, shape, order))",
]
VIEWS = [
    "{}.T",
    "{}.swapaxes(0, -1)",
    "{}[::-1]",
    "{}[..., ::-2]",
    "{}[1:]",
    "{}[:, 1:]",
    "{}[::2]",
    "{}[:0]",
    "{}[..., :1]",
    "{}[..., None]",
    "{}['x']",
    "{}.real",
    "{}.view('u1')",
    "{}.reshape(-1)",
    "{}.reshape(-1, order='F')",
    "{0}.reshape({0}.shape if {0}.size != 1 else ())",
    "numpy.broadcast_to({0}, (2, *{0}.shape))",
]


DTYPES = ["u1", ">i4", "f8", "c16", "M8[s]", "S3", [("x", "f8"), ("y", "i2")]]


def array_expression(root, views, **names):
    """Return an expression for a view of an array; views that it has not are left out."""
    expression = re.sub("|".join(names), lambda name: repr(names[name.group()]), root)
    for view in views:
        with contextlib.suppress(IndexError, ValueError):
            eval(view.format(expression), {"numpy": numpy})
            expression = view.format(expression)
    return expression


def array_expressions(file):
    return st.builds(
        array_expression,
        st.sampled_from(ROOTS),
        st.lists(st.sampled_from(VIEWS), max_size=4),
        file=st.just(str(file)),
        dtype=st.sampled_from(DTYPES),
        mode=st.sampled_from(["r", "r+", "c"]),
        offset=st.sampled_from([0, 3, 5000]),
        shape=st.sampled_from([(), (1,), (9,), (3, 4), (4, 3, 5)]),
        order=st.sampled_from("CF"),
    )


def check_that_arrays_arrive_equal(setup, expressions, **options):
    """Check it of tasks, of what the function has, and of results."""
    made = lambda expression: eval(expression, {"numpy": __import__("numpy")})
    content = lambda array: (array.dtype, array.shape, array.tobytes())
    arrays = [made(expression) for expression in expressions]
    expected = [content(array) for array in arrays]
    options["return_as"] = "generator"
    assert list(setup(content, arrays, **options)) == expected
    in_function = lambda index: content(arrays[index])
    assert list(setup(in_function, range(len(arrays)), **options)) == expected
    results = setup(made, expressions, **options)
    assert [content(array) for array in results] == expected


def test_any_view_of_an_array_arrives_equal(setup, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4)
    names = {"file": str(tmp_path / "file"), "mode": "r", "offset": 3, "shape": (3, 4)}
    for root, order in itertools.product(ROOTS, "CF"):  # a memmap has a descriptor
        expressions = [
            array_expression(root, [view], dtype=dtype, order=order, **names)
            for view, dtype in itertools.product(VIEWS, DTYPES)
        ]
        check_that_arrays_arrive_equal(setup, expressions)


@pytest.mark.parametrize("backend", ENGINES)
def test_any_view_of_any_view_arrives_equal(backend, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    setup = functools.partial(Joblib.setup, num_workers=2, backend=backend)

    @settings(deadline=None, max_examples=30)
    @given(
        st.lists(array_expressions(tmp_path / "file"), min_size=1, max_size=12),
        st.sampled_from([None, 20, 10**6]),
        st.sampled_from(["r", "c", None]),
    )
    def check(expressions, max_nbytes, mmap_mode):
        options = {"max_nbytes": max_nbytes, "mmap_mode": mmap_mode}
        check_that_arrays_arrive_equal(setup, expressions, **options)

    check()


needs_mapped_files_to_go = pytest.mark.skipif(
    os.name != "posix",
    reason="a file that is mapped can be neither removed nor changed",
)

# What makes a memmap of eight numbers in *folder* whose file does not have what it has.
NOT_IN_THE_FILE = {
    "no name": """
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(64))
            array = numpy.memmap(file, "f8", "r+")
    """,
    "removed": """
        array = numpy.memmap(folder / "file", "f8", "w+", shape=8)
        (folder / "file").unlink()
    """,
    "replaced": """
        array = numpy.memmap(folder / "file", "f8", "w+", shape=8)
        (folder / "other").write_bytes(bytes(64))
        (folder / "other").replace(folder / "file")
    """,
    "private": """
        (folder / "file").write_bytes(bytes(64))
        array = numpy.memmap(folder / "file", "f8", "c")
    """,
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=[] if what == "no name" else needs_mapped_files_to_go)
        for what in NOT_IN_THE_FILE
    ],
)
@pytest.mark.parametrize("max_nbytes", [None, 10])
@needs_numpy
def test_what_a_file_does_not_have_arrives(pickling_setup, tmp_path, what, max_nbytes):
    source = NOT_IN_THE_FILE[what]

    def made(numbers):
        names = {"folder": tmp_path}
        code = compile(f"import numpy, tempfile\n{textwrap.dedent(source)}", "", "exec")
        eval(code, names)
        names["array"][:] = numbers
        return names["array"]

    array = made(range(8))
    options = {"max_nbytes": max_nbytes, "return_as": "generator"}
    results = pickling_setup(list, [array, array[::2]], **options)
    assert list(results) == [[*range(8)], [0, 2, 4, 6]]
    assert list(pickling_setup(lambda _: list(array), [0], **options)) == [[*range(8)]]
    (result,) = pickling_setup(made, [range(8)], **options)
    assert list(result) == [*range(8)]


@needs_mapped_files_to_go
@pytest.mark.parametrize("is_replaced", [False, True])
def test_where_linux_does_not_tell_what_is_mapped(
    processes, tmp_path, monkeypatch, is_replaced
):
    def readlink(path, *arguments, real=os.readlink, **options):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "readlink", readlink)
    array = numpy.memmap(tmp_path / "file", "u1", "w+", shape=8)
    if is_replaced:
        (tmp_path / "other").write_bytes(bytes(8))
        (tmp_path / "other").replace(tmp_path / "file")
    array[:] = range(8)
    seen = lambda array: (isinstance(array, numpy.memmap), array.tolist())
    results = processes(seen, [array])
    assert list(results) == [(not is_replaced, [*range(8)])]


def test_what_a_task_changes_in_its_own_view_is_in_its_result(processes):
    tasks = [numpy.zeros(9), numpy.zeros((3, 3)).T, numpy.zeros(9)[::-1]]
    change = lambda array: array.__iadd__(7)
    results = list(processes(change, tasks, max_nbytes=10, mmap_mode="c"))
    assert [array.sum() for array in results] == [63] * 3


def test_a_task_changes_a_mapped_array_of_the_program(processes, tmp_path):
    array = numpy.memmap(tmp_path / "file", "i4", "w+", shape=(4, 3))
    views = [array[:1], array[1:2].T, array[2:3, ::-1], array[3:, ::2]]
    change = lambda view: view.__iadd__(numpy.arange(view.size).reshape(view.shape))
    assert len(list(processes(change, views))) == 4
    assert array.tolist() == [[0, 1, 2], [0, 1, 2], [2, 1, 0], [0, 0, 1]]


def bytes_in(folder):
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_arrays_leave_when_they_have_been_used(processes, tmp_path):
    arrays = (numpy.full(250_000, task) for task in range(120))
    options = {"batch_size": 1, "temp_folder": str(tmp_path)}
    most = count = 0
    for result in processes(numpy.mean, arrays, **options):
        most, count = max(most, bytes_in(tmp_path)), count + result
    assert count == sum(range(120))
    assert most <= 8 * 2_001_000
    assert left_in(tmp_path) == []


def test_an_array_is_let_go_when_its_batch_has_been_read(processes):
    references = []

    def tasks():
        for _ in range(4):
            array = numpy.zeros(300_000)
            references.append(weakref.ref(array))
            yield array
            del array

    with contextlib.closing(processes(len, tasks(), batch_size=2)) as results:
        assert list(itertools.islice(results, 4)) == [300_000] * 4
        gc.collect()
        assert [reference() for reference in references] == [None] * 4


class Delayed:
    """Returns a part of the array of the task before this one."""

    before = None

    def call(self, array):
        before, self.before = self.before, array
        return (array if before is None else before)[:3]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_that_are_parts_of_arrays_keep_no_file(processes, tmp_path, batch_size):
    tasks = (numpy.full(300_000, task) for task in range(40))
    options = {"temp_folder": str(tmp_path), "batch_size": batch_size}
    results = list(processes(by_value(Delayed)().call, tasks, **options))
    assert left_in(tmp_path) == []
    # Each worker returns its first one twice.
    assert sorted({tuple(result) for result in results}) >= [(n,) * 3 for n in range(9)]
    assert not any(isinstance(result.base, numpy.memmap) for result in results)


@pytest.mark.once
def test_files_that_cannot_be_removed_are_tried_again_now_and_then(
    processes, tmp_path, monkeypatch
):
    # As those that a process maps on Windows.
    unlink, calls = os.unlink, []

    def refuse(path, **options):
        if str(path).endswith(".pkl"):
            calls.append(path)
            raise PermissionError(13, "is mapped", path)
        unlink(path, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "unlink", refuse)
        tasks = (numpy.full(300_000, task) for task in range(60))
        options = {"temp_folder": str(tmp_path), "batch_size": 1}
        with contextlib.closing(processes(numpy.mean, tasks, **options)) as results:
            assert sum(itertools.islice(results, 60)) == sum(range(60))
            assert 50 <= len(calls) <= 300  # before the end, which tries all
    Joblib.shutdown()
    assert left_in(tmp_path) == []


ENDS_IN_A_FOLDER = """
    import importlib, signal, sys
    import numpy
    from yourpackage import distributed

    def interrupt_in(owner, name):
        def call(folder, *arguments, **options):
            is_meant = "joblib_memmapping_folder" in folder
            if is_meant and sys.argv[2] == "before":
                signal.raise_signal(signal.SIGINT)
            result = function(folder, *arguments, **options)
            if is_meant and sys.argv[2] == "after":
                signal.raise_signal(signal.SIGINT)
            return result
        function = getattr(owner, name)
        setattr(owner, name, call)

    if __name__ == "__main__":
        module, name = sys.argv[1].rsplit(".", 1)
        interrupt_in(importlib.import_module(module), name)
        try:
            list(distributed.Joblib.setup(len, [numpy.zeros(300_000)], 2))
        except KeyboardInterrupt:
            print("interrupted")
"""


@needs_signals
@pytest.mark.once
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name",
    [
        "joblib._memmapping_reducer._get_temp_dir",
        "os.mkdir",
        "joblib.externals.loky.backend.resource_tracker.register",
    ],
)
def test_an_interrupt_while_a_folder_is_made_leaves_none(
    program, tmp_path, monkeypatch, name, when
):
    (tmp_path / "files").mkdir()
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path / "files"))
    assert output_of(program(ENDS_IN_A_FOLDER, name, when)) == "interrupted\n"
    assert left_in(tmp_path / "files") == []


@pytest.mark.once
@needs_mapped_files_to_go
def test_a_file_that_is_replaced_before_a_worker_maps_it_is_an_error(
    processes, tmp_path
):
    def put(number):
        numpy.full(9, number).tofile(tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "data")
        return numpy.memmap(tmp_path / "data", int, "r", shape=9)

    def tasks():
        for number in range(20):
            yield number, put(number)

    function = lambda task: task[0] == int(task[1][0])
    options = {"errors": "return", "batch_size": 1}
    results = list(processes(function, tasks(), **options))
    assert len(results) == 20
    assert False not in results
    errors = [item.error for item in results if isinstance(item, FailedTask)]
    assert errors
    assert all(isinstance(error, pickle.UnpicklingError) for error in errors)
    assert "replaced" in str(errors[0])


def test_an_array_in_many_tasks_is_written_once(processes, tmp_path):
    array = numpy.zeros(300_000)
    options = {"batch_size": 1, "temp_folder": str(tmp_path)}
    for value in (1, 2):  # changed between two runs, it is sent anew
        array[:] = value
        results = processes(numpy.mean, [array] * 30, **options)
        received = [next(results) for _ in range(20)]
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 1
        assert [*received, *results] == [value] * 30


class MakesArrays:
    """Its array is there only while it is being pickled."""

    def __init__(self, task):
        self.task = task

    def __reduce__(self):
        return list, ((numpy.full(300_000, self.task),),)


def test_an_array_that_is_made_to_be_pickled_arrives(processes):
    tasks = map(MakesArrays, range(30))
    results = processes(lambda arrays: arrays[0].mean(), tasks, batch_size=1)
    assert sorted(results) == list(range(30))


def test_arrays_of_the_function_are_not_those_of_tasks():
    CountingLoky.submitted.clear()
    data = numpy.zeros(200_000)
    function = functools.partial(operator.is_, data)
    results = Joblib.setup(function, range(20_000), 2, backend=CountingLoky())
    assert sum(results) == 0
    assert max(CountingLoky.submitted) > 100


@needs_modes
@pytest.mark.once
@pytest.mark.parametrize(
    ("place", "mask"), [("default", 0o000), ("given", 0o022), ("new", 0o000)]
)
def test_the_folder_of_a_run_is_the_users_alone(processes, tmp_path, place, mask):
    folder = {"default": None, "given": tmp_path, "new": tmp_path / "a" / "b"}[place]
    before = os.umask(mask)
    try:
        array = numpy.zeros(300_000)
        name = operator.attrgetter("filename")
        results = processes(name, [array] * 3, temp_folder=folder, batch_size=1)
        file = Path(next(results))
        assert file.is_relative_to(folder or "/")
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        results.close()
        assert not file.parent.exists()
    finally:
        os.umask(before)


FOLDERS = """
    import errno, os, sys
    import joblib, numpy
    from yourpackage.distributed import FailedTask, Joblib

    def no_space(array, path):
        with open(path, "wb") as file:
            file.write(bytes(9))
        raise OSError(errno.ENOSPC, "No space left on device")

    if __name__ == "__main__":
        backend, folder, errors, what = sys.argv[1:]
        if what == "full":
            joblib.dump = no_space
        array = numpy.zeros(300_000)
        function = array.__eq__ if what == "function" else len
        tasks = [array] * 4 if what != "function" else range(4)
        try:
            for result in Joblib.setup(
                function, tasks, 2, backend=backend, temp_folder=folder, errors=errors
            ):
                print(result.number)
                error = result.error
        except Exception as caught:
            error = caught
        print("temp_folder" in str(error), folder in str(error))
        print(sorted(Joblib.setup(abs, range(3), 2, backend=backend)))
"""


@needs_proc
@pytest.mark.once
@pytest.mark.parametrize(
    ("what", "backend", "errors", "place"),
    [
        ("tasks", "loky", "raise", "file"),
        ("tasks", "loky", "return", "/proc/nowhere"),
        ("function", "loky", "raise", "file"),
        ("full", "loky", "return", "file"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(
    program, tmp_path, what, backend, errors, place
):
    folder = tmp_path / "folder"
    if what == "full":
        folder.mkdir()
    elif place == "file":
        folder.touch()
    else:
        folder = Path(place)
    before = {path for path in Path("/dev/shm").iterdir() if "joblib" in path.name}
    output = output_of(program(FOLDERS, backend, folder, errors, what)).splitlines()
    numbers = [str(n) for n in range(4)]
    failed = numbers if errors == "return" and what != "function" else []
    assert sorted(output[:-2]) == failed
    assert output[-2:] == ["True True", "[0, 1, 2]"]
    assert what != "full" or list(folder.iterdir()) == []
    after = {path for path in Path("/dev/shm").iterdir() if "joblib" in path.name}
    assert not {path for path in after - before if f"_{os.getpid()}_" in path.name}


@pytest.mark.once
def test_a_folder_of_the_environment_that_cannot_be_used_is_named(
    monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path / "file"))
    array = numpy.zeros(300_000)
    _, error = collect(Joblib.setup(len, [array] * 4, 2), Exception)
    shown = "".join(traceback.format_exception(error))
    assert repr(str(tmp_path / "file")) in shown
    assert "temp_folder" in shown


def test_a_folder_that_fills_up_costs_no_result_before(
    processes, monkeypatch, tmp_path
):
    dump, dumped = joblib.dump, []

    def fills_up(array, path):
        dumped.append(path)
        if len(dumped) == 4:
            Path(path).write_bytes(bytes(9))
            raise OSError(errno.ENOSPC, "No space left on device")
        return dump(array, path)

    monkeypatch.setattr(joblib, "dump", fills_up)
    arrays = [numpy.full(300_000, number) for number in range(6)]
    options = {"temp_folder": str(tmp_path), "batch_size": 1, "return_as": "generator"}
    results = processes(numpy.max, arrays, errors="return", **options)
    received, error = collect(results, Exception)
    assert error is None
    # To put it into a file is tried again, when the task is pickled apart from others.
    assert len(dumped) == 7
    assert received == list(range(6))
    assert left_in(tmp_path) == []


changes_array = lambda array: (array.__iadd__(1), float(array.sum()))[1]


def read_only_notes(error):
    return [note for note in notes_of(error) if "mmap_mode" in note]


@pytest.mark.once
@pytest.mark.parametrize(("errors", "batch_size"), [("raise", 1), ("return", 3)])
def test_a_task_that_changes_a_mapped_array_is_told_what_to_do(
    processes, errors, batch_size
):
    tasks = [numpy.zeros(300_000) for _ in range(4)]
    options = {"errors": errors, "batch_size": batch_size}
    received, error = collect(processes(changes_array, tasks, **options), ValueError)
    assert received == [] or errors == "return"
    every = [error] if error else [item.error for item in received]
    for error in every:
        assert "read-only" in str(error)
        (note,) = read_only_notes(error)
        assert "max_nbytes=None" in note
        assert any("Task " in note for note in notes_of(error))
    for more in ({"mmap_mode": "c"}, {"max_nbytes": None}):
        assert list(processes(changes_array, tasks, **more)) == [300_000.0] * 4


def test_a_task_that_changes_a_mapped_array_of_the_function_is_told_what_to_do(
    processes,
):
    array = numpy.zeros(300_000)
    function = lambda task: array.__iadd__(task)[0]
    _, error = collect(processes(function, [1, 2]), ValueError)
    assert "read-only" in str(error)
    assert len(read_only_notes(error)) == 1


@pytest.mark.once
def test_a_cause_that_says_read_only_is_enough(processes):
    def function(array):
        try:
            array[0] = 1
        except ValueError as error:
            raise KeyError("another name") from error

    _, error = collect(processes(function, [numpy.zeros(300_000)] * 2), KeyError)
    assert len(read_only_notes(error)) == 1


CHANGES_OF_ARRAYS = [
    "numpy.add(array, 1, out=array)",
    "array.sort()",
    "array.put(0, 1)",
    "array.setflags(write=True)",
    "numpy.take(array, [0], out=array[:1])",
    "numpy.einsum('i->i', array, out=array).__setitem__(0, 1)",
    "numpy.random.default_rng(0).random(out=array)",
    "numpy.random.default_rng(0).permuted(array, out=numpy.asarray(array))",
    "numpy.random.shuffle(array)",
    "memoryview(array).__setitem__(0, 1.0)",
    "__import__('io').BytesIO(b'12345678').readinto(array)",
    "__import__('struct').pack_into('d', array, 0, 1.0)",
    "__import__('ctypes').c_double.from_buffer(array)",
    exiting("BufferError('Object is not writable.')"),
    exiting("ExceptionGroup('all', [ValueError('buffer source array is read-only')])"),
    exiting(
        "ValueError('WRITEBACKIFCOPY base is read-only')"
    ),  # as scipy.sparse has it
    exiting("ValueError('cannot set WRITEABLE flag to True of this array')"),
]
HAVE_OTHER_CAUSES = [
    "ValueError('this file is read-only')",
    "TypeError('readonly attribute')",
    "__import__('io').UnsupportedOperation('array: not writable')",
    "PermissionError('the array is read-only')",
    "__import__('sqlite3').OperationalError('attempt to write a readonly database')",
    "RuntimeError('array, which is read-only')",
]


@pytest.mark.once
def test_all_words_for_what_is_read_only_are_known(processes):
    array = numpy.zeros(300_000)
    function = lambda change: eval(change, {"array": array, "numpy": numpy})
    tasks = [*CHANGES_OF_ARRAYS, *map(exiting, HAVE_OTHER_CAUSES)]
    options = {"errors": "return", "return_as": "generator"}
    received = list(processes(function, tasks, **options))
    assert all(isinstance(item, FailedTask) for item in received)
    noted = [item.task for item in received if read_only_notes(item.error)]
    assert noted == CHANGES_OF_ARRAYS


@pytest.mark.once
@pytest.mark.timeout(30)
def test_a_long_message_is_searched_in_no_time(processes):
    def function(array):
        raise ValueError("array([1.0, 2.0]), " * 20_000)

    tasks = [numpy.zeros(300_000)]
    (failed,) = processes(function, tasks, errors="return")
    assert read_only_notes(failed.error) == []


@pytest.mark.once
def test_what_is_not_mapped_has_no_such_note(processes):
    def function(array):
        array = array.copy()
        array.flags.writeable = False
        array[0] = 1

    for size, options in ((9, {}), (300_000, {"max_nbytes": None})):
        tasks = [numpy.zeros(size)] * 2
        _, error = collect(processes(function, tasks, **options), ValueError)
        assert "read-only" in str(error)
        assert read_only_notes(error) == []


@pytest.mark.once
def test_the_array_of_another_task_is_none_of_its_own(processes):
    def function(task):
        if task is None:
            raise ValueError("this file is read-only")
        return len(task)

    tasks = [numpy.zeros(300_000), None] * 2
    _, error = collect(processes(function, tasks, batch_size=2), ValueError)
    assert read_only_notes(error) == []


# ------------------------------------------------------------------------------------------------
# Raises: the errors of tasks


SOLVER_FAILED = """
class SolverFailed(Exception):
    def __init__(self, message, *, code):
        super().__init__(message)
        self.code = code

class Doubled(Exception):
    def __init__(self, code, more=()):
        super().__init__(f"failed with {code}", *more)

class Shy(Exception):
    def __reduce__(self):
        raise TypeError("stay here")

class Falsy(Exception):
    def __len__(self):
        return 0

class NotFound(FileNotFoundError):
    def __init__(self, path, code):
        super().__init__(2, "is not there", path)
        self.code = code

class Frozen(Exception):
    def __init__(self, *, code):
        super().__init__(code)
        object.__setattr__(self, "code", code)

    def __setattr__(self, name, value):
        raise AttributeError(name)

class Unshown(NameError):
    @property
    def name(self):
        raise KeyError("name")

class Locked(Exception):
    def __init__(self, message):
        import threading
        super().__init__(message)
        self.lock = threading.Lock()

def fail(error):
    raise error

def fail_deep_down(error, depth=9):
    return fail_deep_down(error, depth - 1) if depth else fail(error)
"""


def failing(expression):
    """An expression that raises what *expression*, with the names above, evaluates to."""
    return (
        f"(exec({SOLVER_FAILED!r}, names := {{'__name__': '__main__'}}), "
        f"names['fail_deep_down'](eval({expression!r}, names)))"
    )


@pytest.mark.alike
@pytest.mark.parametrize(
    ("expression", "name", "arguments", "attributes"),
    [
        ("SolverFailed('no luck', code=3)", "SolverFailed", ("no luck",), {"code": 3}),
        # These are packed in the worker, as the first is.
        *(
            pytest.param(*row, marks=[once, pytest.mark.locally])
            for row in [
                ("Doubled(3)", "Doubled", ("failed with 3",), {}),
                ("Shy(1, 2)", "Shy", (1, 2), {}),
                ("Falsy('nothing')", "Falsy", ("nothing",), {}),
                ("Frozen(code=4)", "Frozen", (4,), {"code": 4}),
                ("Unshown('what')", "Unshown", ("what",), {}),
                (
                    "NotFound('/nowhere', 4)",
                    "NotFound",
                    (2, "is not there"),
                    {"filename": "/nowhere", "errno": 2, "code": 4},
                ),
                (
                    "FileNotFoundError(2, 'gone', 'x')",
                    "FileNotFoundError",
                    (2, "gone"),
                    {"filename": "x"},
                ),
                (
                    "ExceptionGroup('g', [KeyError(1)])",
                    "ExceptionGroup",
                    None,
                    {"message": "g"},
                ),
            ]
        ),
    ],
)
def test_an_error_comes_home(any_setup, expression, name, arguments, attributes):
    tasks = [value(1), value(2), failing(expression), value(4)]
    received, error = collect(any_setup(eval, tasks, batch_size=3), Exception)
    assert received == [1, 2]
    assert type(error).__name__ == name
    assert arguments is None or error.args == arguments
    for attribute, expected in attributes.items():
        assert getattr(error, attribute) == expected
    # Of a false exception, Python itself does not show the cause.
    shown = [str(error.__cause__), *traceback.format_tb(error.__traceback__)]
    assert "fail_deep_down" in "".join(shown) or name == "Unshown"


@pytest.mark.once
@pytest.mark.alike
def test_an_error_that_cannot_be_sent_is_shown(pickling_setup):
    other = pickling_setup(eval, [value(0)] * 20, batch_size=1)
    assert next(other) == 0
    tasks = [value(1), failing("Locked('in a hurry')")]
    _, error = collect(pickling_setup(eval, tasks, batch_size=2), Exception)
    assert type(error) is RuntimeError
    assert "Locked: in a hurry" in str(error)
    assert "fail_deep_down" in str(error.__cause__)
    assert sum(1 for _ in other) == 19  # it is an error of its own run alone


@pytest.mark.alike
def test_a_group_of_errors_comes_home(any_setup):
    members = "[SolverFailed('a', code=3), Locked('b'), KeyError(4)]"
    _, error = collect(
        any_setup(eval, [failing(f"ExceptionGroup('g', {members})")]), ExceptionGroup
    )
    assert error.message == "g"
    names = [type(member).__name__ for member in error.exceptions]
    in_process = any_setup is SingleProcess.setup
    in_process = in_process or any_setup.keywords["backend"] == "threading"
    assert names == [
        "SolverFailed",
        "Locked" if in_process else "RuntimeError",
        "KeyError",
    ]
    assert error.exceptions[0].code == 3


@pytest.mark.alike
def test_an_error_keeps_its_notes(setup):
    noted = "(error := KeyError(1), error.add_note('take note'), fail(error))[0]"
    _, error = collect(setup(eval, [failing(noted)]), KeyError)
    assert error.__notes__[0] == "take note"


def test_threads_raise_the_error_itself():
    error = ValueError()
    error.__cause__ = KeyError()

    def fail(task):
        raise error

    _, raised = collect(Joblib.setup(fail, [1], 2, backend="threading"), ValueError)
    assert raised is error
    assert type(raised.__cause__) is KeyError


@pytest.mark.alike
def test_a_stop_iteration_of_a_task_is_an_error(any_setup):
    received, error = collect(any_setup(eval, [value(1), "next(iter([]))"]), Exception)
    assert received == [1]
    assert type(error) is RuntimeError
    assert type(error.__cause__) is StopIteration


def test_the_class_of_an_error_is_that_of_the_program(program):
    source = """
        from yourpackage.distributed import Joblib

        class SolverFailed(Exception):
            def __init__(self, message, code):
                super().__init__(message)
                self.code = code

        def fail(task):
            raise SolverFailed("no luck", task)

        if __name__ == "__main__":
            for backend in ("loky", "threading"):
                try:
                    list(Joblib.setup(fail, [3], num_workers=2, backend=backend))
                except SolverFailed as error:
                    print(error, error.code)
    """
    assert output_of(program(source)) == "no luck 3\n" * 2


@pytest.mark.alike
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"batch_size": 7}])
def test_an_error_tells_which_task(any_setup, options):
    tasks = [value(number) for number in range(20)] + ["1 / 0"]
    received, error = collect(any_setup(eval, tasks, **options), ZeroDivisionError)
    assert received == list(range(20))
    assert error.args == ("division by zero",)
    assert error.__notes__ == ["Task 20 (counted from 0): '1 / 0'"]


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_an_error_whose_attributes_cannot_be_read_costs_its_task(backend):
    class Proxy(Exception):
        def __getattribute__(self, name):
            raise ConnectionError(f"{name}: the other side has gone")

    def fail(task):
        if task == 1:
            raise Proxy
        return task

    results = Joblib.setup(
        fail, range(3), 2, backend=backend, errors="return", return_as="generator"
    )
    first, failed, last = results
    assert (first, failed.number, last) == (0, 1, 2)
    assert type(failed.error).__name__ == "Proxy"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_is_one_object_has_one_note(workers):
    errors = [KeyError("of a module"), ValueError("another one")]

    def fail(task):
        raise errors[task % 2]

    options = {"backend": "threading", "errors": "return", "num_workers": workers}
    results = list(Joblib.setup(fail, range(20), return_as="generator", **options))
    assert [result.error for result in results] == errors * 10
    assert {len(notes_of(error)) for error in errors} == {1}
    for number in range(10):
        _, error = collect(SingleProcess.setup(fail, [number]), *map(type, errors))
        assert notes_of(error) == [f"Task 0 (counted from 0): {number}"]


@pytest.mark.parametrize("outer", [1, 2])
@pytest.mark.parametrize("inner", [1, 2])
def test_an_error_of_a_run_inside_of_a_task_tells_of_both_tasks(outer, inner):
    known = KeyError("of a module")

    def fail(task):
        raise known

    def task(number):
        list(Joblib.setup(fail, [7], num_workers=inner, backend="threading"))

    for number in range(3):
        results = Joblib.setup(task, [number], num_workers=outer, backend="threading")
        _, error = collect(results, KeyError)
        assert error is known
        first, second = notes_of(error)
        assert first == "Task 0 (counted from 0): 7"
        assert second == f"Task 0 (counted from 0): {number}"
        assert notes_of(pickle.loads(pickle.dumps(error))) == [first, second]


class Shown:
    def __init__(self, way):
        self.way = way

    def __repr__(self):
        if self.way == "raises":
            raise LookupError
        return "x" * 10**6


@pytest.mark.parametrize("way", ["raises", "long"])
def test_a_task_is_shown_though_its_repr_is_bad(setup, way):
    function = lambda task: eval(task, {}) if isinstance(task, str) else 1 / 0
    task = by_value(Shown)(way)
    _, error = collect(setup(function, [task]), ZeroDivisionError)
    (note,) = error.__notes__
    assert note.startswith("Task 0 (counted from 0): ")
    assert len(note) <= 500


@pytest.mark.alike
def test_an_error_of_a_task_has_the_traceback_of_the_worker(setup):
    _, error = collect(setup(eval, [raising("KeyError()")]), KeyError)
    if setup.keywords["backend"] == "threading":
        assert error.__cause__ is None
        assert "<genexpr>" in "".join(traceback.format_exception(error))
    else:
        assert "<genexpr>" in str(error.__cause__)


def test_an_error_of_the_backend_keeps_its_traceback():
    results = Joblib.setup(abs, range(10), num_workers=2, backend=FailingThreading())
    _, error = collect(results, OSError)
    assert 'raise OSError("no more")' in str(error.__cause__)


TRACEBACKS = """
    import dataclasses, sys, traceback
    from yourpackage.distributed import FailedTask, Joblib

    def deep_down(task):
        raise ValueError(f"no luck with {task}")  # this very line

    def work(task):
        return deep_down(task)

    class Model:
        def objective(self, task):
            return (lambda: deep_down(task))()

    if __name__ == "__main__":
        functions = {"work": work, "method": Model().objective}
        functions["lambda"] = lambda task: work(task)
        backend, name, size, errors = sys.argv[1:]
        try:
            for result in Joblib.setup(
                functions[name],
                range(3),
                2,
                backend=backend,
                batch_size=int(size),
                errors=errors,
            ):
                raise result.error
        except ValueError as error:
            print(error.__cause__)
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("backend", "name", "size"),
    [
        ("loky", "work", 1),
        ("loky", "method", 3),
        ("loky", "lambda", 1),
    ],
)
def test_a_traceback_of_a_worker_shows_the_lines_of_the_program(
    program, tmp_path, backend, name, size
):
    text = output_of(program(TRACEBACKS, backend, name, size, "return"))
    assert f'File "{tmp_path / "program.py"}", line 6, in deep_down' in text
    assert '    raise ValueError(f"no luck with {task}")  # this very line' in text
    assert "dynamic-code" not in text
    for ours in ("distributed.py", "run_tasks", "joblib"):
        assert ours not in text
    assert text.count("  File ") == {"work": 2, "method": 3, "lambda": 3}[name]


# Whatever cannot be pickled or unpickled, too.
@pytest.mark.parametrize("what", ["task to unpickle", "result to pickle"])
def test_a_traceback_has_no_frames_of_this_module(processes, what):
    _, error = collect(processes(run, [PICKLING[what][0]]), Exception)
    text = str(error.__cause__)
    for ours in ("distributed.py", "dynamic-code", "in load\n", "in reply\n"):
        assert ours not in text


# ------------------------------------------------------------------------------------------------
# Dask and Ray, beside the tests above that take them


@pytest.mark.engines
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_workers_have_neither_the_module_nor_the_folder(request, name):
    setup = start(request, name)
    tasks = ["[*__import__('sys').path, __import__('os').getcwd()]"] * 2
    for path in itertools.chain(*setup(eval, tasks)):
        assert not Path(path, FILE.name).exists()
        assert Path(path) != FILE.parent


@pytest.mark.engines
def test_dask_without_a_client(program):
    pytest.importorskip("dask.distributed")
    source = """
        from yourpackage.distributed import Joblib

        try:
            Joblib.setup(abs, [1], backend="dask")
        except ValueError as error:
            print(error)
    """
    assert "client = Client" in output_of(program(source))


@pytest.mark.engines
def test_dask_client_that_closes(tmp_path):
    pytest.importorskip("dask.distributed")
    with dask_client(tmp_path) as client:
        results = Joblib.setup(
            eval, [value(1), *[await_path(tmp_path / "go")] * 9], backend="dask"
        )
        assert next(results) == 1
        client.close()
        (tmp_path / "go").touch()
        _, error = collect(results, BaseException)
        assert error is not None


@pytest.mark.engines
def test_a_dask_client_that_closes_costs_no_result_that_was_received(
    tmp_path, monkeypatch
):
    pytest.importorskip("dask.distributed")
    monkeypatch.setattr(distributed._Dask, "look_again", 0.05)
    with dask_client(tmp_path) as client:
        options = {"backend": "dask", "batch_size": 1, "pre_dispatch": 8}
        results = Joblib.setup(abs, itertools.count(), **options)
        received = [next(results)]
        inbox = results.gi_frame.f_locals["run"].inbox
        wait_until(lambda: inbox.reports.qsize() == 7)
        client.close()
        rest, error = collect(results, Exception)
        assert len([*received, *rest]) >= 8
        assert error is not None


@pytest.mark.engines
def test_a_function_that_dask_cannot_take_ends_the_run(dask):
    with joblib.parallel_config(backend="dask", priorty=1):
        received, error = collect(
            Joblib.setup(abs, range(9), errors="return"), Exception
        )
    assert received == []
    assert "priorty" in f"{error!r} {error.__cause__}"


RUNS_IN_TASKS_OF_DASK = """
    import time
    from concurrent.futures import ThreadPoolExecutor
    from dask.distributed import Client, LocalCluster, worker_client
    from yourpackage.distributed import Joblib

    def chained(task):
        return sorted(Joblib.setup(str, Joblib.setup(abs, [-1, -2])))

    def interleaved(task):
        return [*zip(*(Joblib.setup(abs, [-1], return_as="generator") for _ in "ab"))]

    def left(task):
        for _ in Joblib.setup(abs, range(50), batch_size=1):
            break
        return sum(Joblib.setup(abs, range(3)))

    def back(task):  # in the worker's only thread
        left(task)
        begin = time.monotonic()
        time.sleep(0.2)
        return begin, time.monotonic()

    def begun_in_a_thread(task):
        results = Joblib.setup(abs, [-1, -2, -3], batch_size=1)
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(next, results).result()
        return first + sum(results)

    def with_a_client(task):
        with worker_client():
            return sum(Joblib.setup(abs, range(3)))

    if __name__ == "__main__":
        options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**options) as cluster, Client(cluster):
            for function in chained, interleaved, left, with_a_client:
                print(*Joblib.setup(function, range(2), backend="dask", timeout=60))
            times = [*Joblib.setup(back, range(3), backend="dask", timeout=60)]
            times = sum(sorted(times), ())
            print(times == tuple(sorted(times)))
        options["threads_per_worker"] = 2  # one of them waits for the other thread
        with LocalCluster(**options) as cluster, Client(cluster):
            print(*Joblib.setup(begun_in_a_thread, [0], backend="dask", timeout=60))
"""


@pytest.mark.engines
def test_runs_in_a_task_of_dask_are_composable(program):
    pytest.importorskip("dask.distributed")
    process = program(RUNS_IN_TASKS_OF_DASK, warnings="default")
    printed, errors = process.communicate()
    expected = [["1", "2"]] * 2, [[(1, 1)]] * 2, [3] * 2, [3] * 2, [True], [6]
    assert printed.splitlines() == [" ".join(map(str, pair)) for pair in expected], (
        errors
    )


@pytest.mark.engines
def test_dask_cluster_of_one_core(tmp_path):
    pytest.importorskip("dask.distributed")
    with dask_client(tmp_path, n_workers=1):
        (process,) = set(Joblib.setup(eval, [PID] * 4, backend="dask"))
    assert process != os.getpid()


@pytest.mark.engines
def test_dask_cluster_without_a_worker(tmp_path):
    pytest.importorskip("dask.distributed")
    with dask_client(tmp_path, n_workers=0):
        with joblib.parallel_config(backend="dask", wait_for_workers_timeout=0):
            results = Joblib.setup(abs, [1])
        with pytest.raises(RuntimeError, match="no active worker"):
            next(results)


@pytest.mark.engines
def test_dask_options_of_an_open_configuration(dask, tmp_path):
    address, array = dask.scheduler.address, numpy.ones(1000)
    with joblib.parallel_config(
        backend="dask", scheduler_host=address, scatter=[array]
    ) as config:
        results = Joblib.setup(numpy.sum, [array] * 4, backend="dask")
    assert list(results) == [1000] * 4
    config["backend"].client.close()
    with dask_client(tmp_path, n_workers=0):
        with joblib.parallel_config(backend="dask", wait_for_workers_timeout=1):
            results = Joblib.setup(abs, [1])
        with pytest.raises(TimeoutError, match="no worker after 1 seconds"):
            next(results)


@pytest.mark.engines
@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_ray_options(ray, way):
    options = {"ray_remote_args": {"runtime_env": {"env_vars": {"VARIABLE": "value"}}}}
    if way == "argument":
        results = Joblib.setup(os.getenv, ["VARIABLE"], 2, backend="ray", **options)
    else:
        importlib.import_module("ray.util.joblib").register_ray()
        with joblib.parallel_config(backend="ray", **options):
            results = Joblib.setup(os.getenv, ["VARIABLE"], 2)
    assert list(results) == ["value"]


@pytest.mark.engines
@pytest.mark.parametrize("name", ["dask", "ray"])
@pytest.mark.parametrize("option", [{"initializer": print}])
def test_an_initializer_is_for_processes_of_this_machine(request, name, option):
    setup = start(request, name)
    with pytest.raises(TypeError, match="processes of this machine") as caught:
        setup(abs, [1], **option)
    assert next(iter(option)) in str(caught.value)


class Buffered:
    """A model with a buffer, which no two threads may fill at the same time."""

    def __init__(self):
        self.buffer = [0] * 1000

    def simulate(self, task):
        import time

        self.buffer[:] = [task] * 1000
        time.sleep(0.001)  # another thread's turn
        return task == self.buffer[0]


@pytest.mark.engines
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_threads_of_a_worker_do_not_share_the_function(request, tmp_path, name):
    model = by_value(Buffered)()
    if name == "ray":
        setup = start(request, name)
        options = {"ray_remote_args": {"max_concurrency": 2}}
        assert set(setup(model.simulate, range(400), **options)) == {True}
        return
    pytest.importorskip("dask.distributed")
    with dask_client(tmp_path, n_workers=1, threads=2):
        results = Joblib.setup(model.simulate, range(400), backend="dask")
        assert set(results) == {True}


class Cluster:
    """Workers without a nanny: one that is killed does not come again."""

    def __init__(self, client, folder, stack):
        self.client = client
        self.folder = folder
        self.stack = stack
        self.processes = []

    def add(self, count=1, threads=1):
        """Start workers, and wait for them."""
        before = len(self.client.ncores())
        for _ in range(count):
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "distributed.cli.dask_worker"),
                    *(self.client.scheduler.address, "--no-nanny", "--no-dashboard"),
                    *("--nthreads", str(threads)),
                    *("--local-directory", str(self.folder)),
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.stack.enter_context(process)
            self.stack.callback(process.kill)
            self.processes.append(process)
        wait_until(lambda: len(self.client.ncores()) == before + count)

    def lose(self, pid, number=SIGKILL):
        """Have a worker end, and wait until the scheduler knows."""
        before = len(self.client.ncores())
        os.kill(pid, number)
        wait_until(lambda: len(self.client.ncores()) == before - 1)


@contextlib.contextmanager
def cluster_in(folder, allowed_failures=3):
    pytest.importorskip("dask.distributed")
    with (
        dask_client(folder, 0, allowed_failures) as client,
        contextlib.ExitStack() as stack,
    ):
        yield Cluster(client, folder, stack)


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(distributed._Dask, "look_again", 0.2)
    with cluster_in(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.mark.engines
def test_runs_at_the_same_time_do_not_mix_up_their_functions(cluster):
    cluster.add(2, threads=2)
    model = by_value(Model)

    def read(name):
        run = Joblib.setup(
            model(name).objective, range(60), backend="dask", batch_size=1
        )
        return sorted((task, data) for _, _, task, data in run)

    names = ["a", "b" * 5_000, "c" * 100_000]
    with ThreadPoolExecutor(3) as threads:
        for name, results in zip(names, threads.map(read, names), strict=True):
            assert results == [(number, name) for number in range(60)]


@pytest.mark.engines
def test_all_workers_of_dask_have_the_function_before_there_are_tasks(dask):
    # Otherwise the first tasks would wait for each other on the one that has it.
    def have_it():
        options = {"backend": "dask", "batch_size": 1, "pre_dispatch": 1}
        results = Joblib.setup(abs, range(9), 2, **options)
        next(results)
        held = [str(keys) for keys in dask.has_what().values()]
        results.close()
        return ["function-" in keys for keys in held] == [True, True]

    wait_until(have_it)  # Dask may have dropped a copy meanwhile


@pytest.mark.engines
def test_the_first_tasks_come_first_on_dask(cluster):
    """Or a result waits for those of later tasks, and may wait for ever."""
    cluster.add(1)
    options = {"batch_size": 1, "pre_dispatch": 8}
    tasks = ["__import__('time').monotonic()"] * 16
    results = Joblib.setup(
        eval, tasks, backend="dask", return_as="generator", **options
    )
    times = list(results)
    assert times == sorted(times)


class Weighed:
    """Tells how often it has been pickled."""

    pickled = 0

    def __init__(self, number):
        self.number = number
        self.data = "x" * 5_000

    def __getstate__(self):
        type(self).pickled += 1
        return vars(self)


@pytest.mark.engines
@pytest.mark.parametrize("return_as", ["generator"])
@pytest.mark.parametrize("batch_size", [7])
def test_what_was_scattered_is_not_sent_again(dask, return_as, batch_size):
    number_of = operator.attrgetter("number")
    kind = by_value(Weighed)
    scattered = [kind(0), kind(1)]
    with joblib.parallel_config(backend="dask", scatter=scattered):
        pickled = kind.pickled
        tasks = [scattered[index % 2] for index in range(50)]
        results = Joblib.setup(
            number_of, tasks, batch_size=batch_size, return_as=return_as
        )
        assert sorted(results) == [0] * 25 + [1] * 25
        assert kind.pickled == pickled
        tasks[3::5] = [kind(2)] * 10
        results = list(
            Joblib.setup(number_of, tasks, batch_size=batch_size, return_as=return_as)
        )
    expected = [number_of(task) for task in tasks]
    assert sorted(results) == sorted(expected)
    assert return_as != "generator" or results == expected
    assert pickled < kind.pickled <= pickled + 10


@pytest.mark.engines
def test_what_was_scattered_goes_with_tasks_that_fail(dask):
    kind = by_value(Weighed)
    scattered = kind(0)
    tasks = [scattered, threading.Lock(), kind(5), scattered, kind(None), scattered]
    with joblib.parallel_config(backend="dask", scatter=[scattered]):
        results = list(
            Joblib.setup(
                lambda task: 1 + task.number,
                tasks,
                batch_size=6,
                return_as="generator",
                errors="return",
            )
        )
    failed = {r.number: r for r in results if isinstance(r, FailedTask)}
    assert set(failed) == {1, 4}
    assert all(failed[number].task is tasks[number] for number in failed)
    assert [r for r in results if isinstance(r, int)] == [1, 6, 1, 1]


@pytest.mark.engines
@pytest.mark.parametrize("what", ["function", "task"])
def test_what_is_large_gives_no_warning_on_dask(dask, what):
    before = __import__("dask").config.get(
        "distributed.admin.large-graph-warning-threshold"
    )
    large = "x" * 20_000_000
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if what == "function":
            model = by_value(Model)(large)
            results = Joblib.setup(model.objective, range(8), backend="dask")
            assert sorted(task for _, _, task, _ in results) == list(range(8))
        elif what == "task":
            results = Joblib.setup(len, [large] * 4, backend="dask")
            assert list(results) == [20_000_000] * 4
        else:
            results = Joblib.setup(eval, ["'x' * 20_000_000"] * 4, backend="dask")
            assert list(map(len, results)) == [20_000_000] * 4
    assert [str(warning.message) for warning in caught] == []
    after = __import__("dask").config.get(
        "distributed.admin.large-graph-warning-threshold"
    )
    assert after == before


@pytest.mark.engines
def test_runs_in_threads_leave_the_configuration_of_dask_as_it_was(dask):
    config = importlib.import_module("dask").config
    name = "distributed.admin.large-graph-warning-threshold"
    before = config.get(name)
    try:
        with ThreadPoolExecutor(4) as threads:
            runs = [
                threads.submit(
                    lambda: sum(
                        Joblib.setup(abs, [1] * 60, backend="dask", batch_size=1)
                    )
                )
                for _ in range(4)
            ]
            assert [run.result() for run in runs] == [60] * 4
        assert config.get(name) == before
    finally:
        config.set({name: before})


@pytest.mark.engines
def test_dask_worker_that_dies(tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    with dask_client(tmp_path, allowed_failures=1):
        tasks = [value(1), value(2), KILL, *map(value, range(20))]
        _, error = collect(Joblib.setup(eval, tasks, backend="dask"), Exception)
        assert type(error) is distributed.KilledWorker
        assert sorted(Joblib.setup(abs, range(10), backend="dask")) == list(range(10))


@pytest.mark.engines
@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_dask_worker_that_dies_once_costs_nothing(dask, tmp_path, return_as):
    died = tmp_path / "died"
    tasks = list(map(value, range(40)))
    tasks[5] = (
        f"5 if __import__('os').path.exists({str(died)!r}) else ({touch(died)}, {KILL})"
    )
    results = Joblib.setup(eval, tasks, backend="dask", return_as=return_as)
    assert sorted(results) == list(range(40))
    assert died.exists()


class Marking:
    """A model of any size. Its tasks tell where they are, and may have to wait."""

    def __init__(self, folder, size=0):
        self.folder = str(folder)
        self.data = "x" * size

    def number(self, array):
        import pathlib

        pathlib.Path(self.folder, str(os.getpid())).touch()
        while not pathlib.Path(self.folder, "go").exists():
            time.sleep(0.01)
        return int(array[0])


def marked(folder):
    return {int(path.name) for path in folder.iterdir() if path.name != "go"}


@pytest.mark.engines
@pytest.mark.parametrize("size", [5_000])
@pytest.mark.parametrize("return_as", ["generator"])
def test_a_dask_worker_that_is_killed_takes_no_task_with_it(
    cluster, tmp_path, size, return_as
):
    cluster.add(2)

    def tasks():
        for number in range(40):
            if number == 5:
                wait_until(lambda: len(marked(tmp_path)) == 2)
                cluster.lose(min(marked(tmp_path)))
                (tmp_path / "go").touch()
            yield numpy.full(1000, number)

    model = by_value(Marking)(tmp_path, size)
    results = Joblib.setup(
        model.number, tasks(), backend="dask", pre_dispatch=6, return_as=return_as
    )
    assert sorted(results) == list(range(40))


@pytest.mark.engines
@pytest.mark.parametrize("size", [5_000])
def test_the_function_survives_the_last_dask_worker(cluster, tmp_path, size):
    cluster.add(1)

    def exchange():
        wait_until(lambda: marked(tmp_path))
        (first,) = marked(tmp_path)
        cluster.lose(first)
        (tmp_path / "go").touch()
        cluster.add(1)
        return first

    arrays = [numpy.full(1000, number) for number in range(40)]
    model = by_value(Marking)(tmp_path, size)
    with ThreadPoolExecutor(1) as thread:  # as the consumer waits in one next()
        first = thread.submit(exchange)
        results = Joblib.setup(model.number, arrays, backend="dask")
        assert sorted(results) == list(range(40))
        assert len(marked(tmp_path) - {first.result()}) == 1


@pytest.mark.engines
def test_ray_worker_that_dies(ray):
    tasks = [value(1), value(2), KILL, *map(value, range(20))]
    _, error = collect(
        Joblib.setup(eval, tasks, num_workers=2, backend="ray"), Exception
    )
    assert isinstance(error, ray.exceptions.RayActorError)
    results = Joblib.setup(abs, range(10), num_workers=2, backend="ray")
    assert sorted(results) == list(range(10))


@pytest.fixture(params=["dask", "ray"])
def losing(request):
    """`Joblib.setup` on a cluster that takes the death of a worker as an error."""
    if request.param == "ray":
        yield start(request, "ray")
        return
    pytest.importorskip("dask.distributed")
    folder = request.getfixturevalue("tmp_path_factory").mktemp("losing")
    with dask_client(folder, allowed_failures=0):
        yield functools.partial(Joblib.setup, backend="dask")


def is_of_a_lost_worker(error):
    names = [kind.__name__ for kind in type(error).__mro__]
    return "KilledWorker" in names or "RayActorError" in names


@pytest.mark.engines
def test_a_batch_whose_worker_is_killed_costs_itself_alone(losing):
    """Whatever else the worker had been given may be lost with it."""
    tasks = [*map(value, range(200))]
    tasks[12] = KILL
    results = losing(eval, tasks, batch_size=4, errors="return", pre_dispatch=4)
    received, error = collect(results, Exception)
    numbers, done = numbers_of(received)
    if "num_workers" in losing.keywords:  # Ray, which does not replace an actor
        assert is_of_a_lost_worker(error)
        assert set(done) <= set(range(200)) - {12}
        return
    assert error is None
    assert sorted([*done, *numbers]) == list(range(200))
    assert {12, 13, 14, 15} <= set(numbers)
    assert len(numbers) <= 16  # those of four batches
    assert all(is_of_a_lost_worker(item.error) for item in received if item in numbers)


@pytest.mark.engines
def test_a_cluster_that_loses_a_worker_tells_which_tasks_were_in_the_batch(losing):
    tasks = [value(0), value(1), KILL, value(3), value(4)]
    tasks = itertools.chain(tasks, itertools.repeat(value(5)))
    options = {"batch_size": 5, "pre_dispatch": 1}
    _, error = collect(losing(eval, tasks, **options), Exception)
    assert is_of_a_lost_worker(error)
    assert (
        "One of tasks 0 to 4 (counted from 0), of which the first is: '0'"
        in "\n".join(notes_of(error))
    )


def is_of_a_run(key):
    return str(key).startswith(("batch-", "function-"))


def keys_of_runs(client):
    """Return the keys of runs that the client, a worker or the scheduler has."""
    held = [*client.futures]
    if client.ncores():  # or Dask would wait for a worker
        get = client.run(lambda dask_worker: list(dask_worker.data))
        held += itertools.chain(*get.values())
    held += client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))
    return [key for key in held if is_of_a_run(key)]


@pytest.mark.engines
@pytest.mark.parametrize("errors", ["return"])
def test_a_timeout_holds_when_all_dask_workers_are_gone(cluster, tmp_path, errors):
    cluster.add(1)

    def tasks():
        yield value(0)
        for number in itertools.count(1):
            if number == 2:
                wait_until((tmp_path / "here").exists)
                cluster.lose(cluster.processes[0].pid)
            yield f"({touch(tmp_path / 'here')}, {await_path(tmp_path / 'go')})"

    results = Joblib.setup(
        eval,
        tasks(),
        backend="dask",
        timeout=2,
        batch_size=1,
        pre_dispatch=3,
        errors=errors,
    )
    received, error = collect(results, Exception)
    assert received in ([0], [])
    assert isinstance(error, TimeoutError)
    assert "2 seconds" in str(error)
    wait_until(lambda: not keys_of_runs(cluster.client))
    (tmp_path / "go").touch()
    cluster.add(1)
    assert sorted(Joblib.setup(abs, range(9), backend="dask")) == list(range(9))


@pytest.mark.engines
@pytest.mark.parametrize("name", ["dask", "ray"])
@pytest.mark.parametrize("return_as", ["generator"])
def test_a_timeout_names_the_tasks_of_the_batch(request, tmp_path, name, return_as):
    setup = start(request, name)
    stuck = await_path(tmp_path / "go")
    tasks = itertools.chain(map(value, range(4)), itertools.repeat(stuck))
    results = setup(
        eval,
        tasks,
        batch_size=4,
        timeout=3,  # of which Ray needs a part to start
        pre_dispatch=1,
        return_as=return_as,
    )
    received, error = collect(results, Exception)
    (tmp_path / "go").touch()
    assert received == list(range(4))
    assert isinstance(error, TimeoutError)
    shown = f"{error}\n{notes_of(error)}"
    assert "4 are out" in shown
    assert "tasks 4 to 7" in shown


@pytest.mark.engines
def test_new_dask_workers_are_used_while_the_consumer_reads(cluster):
    cluster.add(1)
    seen = set()
    results = Joblib.setup(eval, itertools.repeat(PID), backend="dask", batch_size=1)
    seen.add(next(results))
    cluster.add(3)
    while len(seen) < 4:
        seen.add(next(results))
    results.close()
    assert seen == {process.pid for process in cluster.processes}


@pytest.mark.engines
@pytest.mark.parametrize("return_as", ["generator"])
def test_new_dask_workers_are_used_while_the_consumer_waits(
    cluster, tmp_path, return_as
):
    """Six threads at the end; four tasks were the bound of the beginning."""
    cluster.add(1)

    def grow():
        wait_until(lambda: marks() == 1)
        cluster.add(1, threads=5)
        wait_until(lambda: marks() == 6)
        (tmp_path / "go").touch()

    def marks():
        return sum(path.name.startswith("at") for path in tmp_path.iterdir())

    tasks = (
        f"({touch(tmp_path / f'at {number}')}, {await_path(tmp_path / 'go')})"
        for number in range(30)
    )
    with ThreadPoolExecutor(1) as thread:
        grown = thread.submit(grow)
        results = Joblib.setup(eval, tasks, backend="dask", return_as=return_as)
        assert len(list(results)) == 30
        grown.result()


@pytest.mark.engines
@pytest.mark.parametrize("number", [SIGKILL])
def test_the_run_follows_a_dask_cluster_that_shrinks(cluster, number):
    cluster.add(1, threads=4)
    cluster.add(1, threads=2)
    drawn = received = 0

    def tasks():
        nonlocal drawn
        for drawn in range(1, 1_000_000):
            yield value(drawn)

    results = Joblib.setup(eval, tasks(), backend="dask", batch_size=1)
    seen = set()

    def read():
        nonlocal received
        seen.add(next(results))
        received += 1

    while drawn - received < 11:
        read()
    cluster.lose(cluster.processes[0].pid, number)
    while drawn - received > 3:
        read()
    for _ in range(100):
        read()
        assert drawn - received <= 3
    results.close()
    assert len(seen) == received
    missing = set(range(1, max(seen))) - seen
    assert len(missing) <= 12  # these were out


@pytest.mark.engines
def test_a_formula_that_comes_to_none_for_a_moment_costs_no_result(cluster):
    cluster.add(1, threads=4)
    cluster.add(1, threads=2)
    results = Joblib.setup(
        eval,
        map(value, itertools.count()),
        backend="dask",
        batch_size=1,
        pre_dispatch="n_jobs - 2",
        return_as="generator",
    )
    for number in range(50):
        assert next(results) == number
    cluster.lose(cluster.processes[0].pid)
    engine, left = results.gi_frame.f_locals["run"].engine, 20
    while left:
        number += 1
        assert next(results) == number
        left -= engine.workers == 2  # it has seen that one is gone
    results.close()


@pytest.fixture
def module(monkeypatch, tmp_path, request):
    """A module that is on the path of this process alone; returns the module."""

    def make():
        name = f"only_here_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(
            textwrap.dedent(
                """
                def twice(task):
                    return 2 * task

                class Number:
                    def __init__(self, number):
                        self.number = number

                    def __index__(self):
                        return self.number
                """
            )
        )
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(name)
        request.addfinalizer(functools.partial(sys.modules.pop, name))
        return module

    return make


@pytest.mark.engines
@pytest.mark.parametrize("errors", ["return"])
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_function_of_a_module_that_workers_lack_is_named(
    request, module, name, errors
):
    setup = start(request, name)  # before the folder is on the path
    module = module()
    received, error = collect(setup(module.twice, range(9), errors=errors), Exception)
    assert received == []
    assert type(error) is pickle.UnpicklingError
    assert re.search("task_func cannot be unpickled in a worker", str(error))
    assert module.__name__ in str(error)
    assert "register_pickle_by_value" in str(error)


@pytest.mark.engines
@pytest.mark.parametrize("batch_size", [4])
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_task_of_a_module_that_workers_lack_is_named(
    request, module, name, batch_size
):
    setup = start(request, name)
    module = module()
    tasks = [*range(6), module.Number(6), *range(7, 10)]
    setup = functools.partial(setup, return_as="generator", batch_size=batch_size)
    received, error = collect(setup(hex, tasks), Exception)
    assert received == [hex(number) for number in range(6)]
    assert type(error) is pickle.UnpicklingError
    assert module.__name__ in str(error)
    assert "register_pickle_by_value" in str(error)
    assert "Task 6 " in error.__notes__[0]
    results = list(setup(hex, tasks, errors="return"))
    assert isinstance(results[6], FailedTask)
    assert results[6].number == 6
    assert results[6].task is tasks[6]
    assert module.__name__ in str(results[6].error)
    del results[6]
    assert results == [hex(number) for number in range(10) if number != 6]


def waiting(client):
    """Return what coroutines of runs are on the event loop of a client."""

    async def coroutines():
        return [task.get_coro() for task in __import__("asyncio").all_tasks()]

    files = str(FILE), joblib._dask.__file__
    return [c for c in client.sync(coroutines) if c.cr_code.co_filename in files]


def broken_off(setup, folder):
    for _ in setup([BIG] * 50):
        break


def in_a_cycle(setup, folder):
    cell = []
    results = setup(cell.append(None) or BIG for _ in range(50))
    cell.append(results)
    next(results)
    del results, cell
    gc.collect()


def failed(setup, folder):
    _, error = collect(setup([*[BIG] * 9, "1 / 0", *[BIG] * 30]), Exception)
    assert isinstance(error, ZeroDivisionError)


def failed_in_the_source(setup, folder):
    def tasks():
        yield from [BIG] * 9
        raise LookupError

    assert collect(setup(tasks()), Exception)[1].args == ()


def out_of_time(setup, folder):
    tasks = [BIG, *[await_path(folder / "go")] * 9]
    _, error = collect(setup(tasks, timeout=1), Exception)
    assert isinstance(error, TimeoutError)


def all_read(setup, folder):
    assert len(list(setup([BIG] * 30))) == 30


ENDS = [
    broken_off,
    closed,
    in_a_cycle,
    failed,
    failed_in_the_source,
    out_of_time,
    all_read,
]


@pytest.mark.engines
@pytest.mark.parametrize("end", ENDS)
def test_a_run_on_dask_leaves_nothing(dask, tmp_path, end):
    def setup(tasks, **options):
        return Joblib.setup(eval, tasks, backend="dask", **options)

    try:
        for _ in range(2):
            end(setup, tmp_path)
        gc.collect()
        wait_until(lambda: not keys_of_runs(dask))
        wait_until(lambda: not waiting(dask))
    finally:
        (tmp_path / "go").touch()  # sets the workers free
    assert sorted(Joblib.setup(abs, range(9), backend="dask")) == list(range(9))


@pytest.mark.engines
def test_a_run_on_dask_that_its_function_refers_to_is_collected(dask):
    class Holder:
        def __reduce__(self):
            return eval, ("abs",)

        def __call__(self, task):
            return abs(task)

    holder = Holder()
    holder.results = Joblib.setup(holder, itertools.repeat(-1), backend="dask")
    assert next(holder.results) == 1
    reference = weakref.ref(holder)
    del holder
    gc.collect()
    assert reference() is None
    wait_until(lambda: not keys_of_runs(dask))


@pytest.mark.engines
def test_a_run_that_is_left_after_ray_was_shut_down_starts_no_other(program):
    pytest.importorskip("ray")
    source = """
        import time
        import ray
        from yourpackage.distributed import Joblib

        if __name__ == "__main__":
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            results = Joblib.setup(abs, [-1, -1], 2, backend="ray", batch_size=1)
            print(next(results), flush=True)
            inbox = results.gi_frame.f_locals["run"].inbox
            while inbox.reports.empty():  # Ray exits if tasks are out when it ends
                time.sleep(0.01)
            ray.shutdown()
            results.close()
            print(ray.is_initialized())
    """
    process = program(source, warnings="default")
    printed, errors = process.communicate()
    assert printed == "1\nFalse\n"
    assert "Traceback" not in errors


# ------------------------------------------------------------------------------------------------
# The README


PEERS = ["plain_joblib", "executor", "pool", "pebble_map", "this_module"]


SITUATIONS = {
    "two tasks that kill their workers": "death",
    "two tasks that hang, with a time limit": "hang",
    "the results of one run are the tasks of another": "chain",
    "another run fails meanwhile": "neighbour",
    "a reader slower than the workers": "slow_reader",
    "a source that fails after 10 tasks": "failing_source",
    "a loop left by `break`": "left_loop",
    "a method of a model, for 40 tasks one by one": "model",
    "40 arrays made one by one, read slowly": "arrays",
}


def cells_of_readme():
    for line in README.read_text().splitlines():
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if title in SITUATIONS:
            for peer, cell in zip(PEERS, cells, strict=True):
                said = re.fullmatch(r"It (?:gives |raises |is )?(.*)\.", cell)
                yield SITUATIONS[title], peer, said[1]


def test_all_situations_are_compared():
    assert len(list(cells_of_readme())) == len(SITUATIONS) * len(PEERS)


COMPARED = """
    import contextlib, itertools, multiprocessing, os, pathlib, sys, tempfile, time, warnings, weakref
    from concurrent.futures import ProcessPoolExecutor
    import joblib
    import numpy
    from yourpackage.distributed import Joblib

    def plain_joblib(function, tasks, **options):
        parallel = joblib.Parallel(n_jobs=2, return_as="generator_unordered", **options)
        return parallel(joblib.delayed(function)(task) for task in tasks)

    def executor(function, tasks, batch_size=1, pre_dispatch=None):
        workers = stack.enter_context(ProcessPoolExecutor(2))
        return workers.map(function, tasks, chunksize=batch_size)

    def pool(function, tasks, batch_size=1, pre_dispatch=None):
        workers = stack.enter_context(multiprocessing.Pool(2))
        return workers.imap_unordered(function, tasks, chunksize=batch_size)

    def pebble_map(function, tasks, batch_size=1, pre_dispatch=None, timeout=None):
        pebble = __import__("pebble")
        workers = stack.enter_context(pebble.ProcessPool(2))
        stack.callback(workers.stop)
        return workers.map(function, tasks, chunksize=batch_size, timeout=timeout).result()

    def this_module(function, tasks, **options):
        return Joblib.setup(function, tasks, num_workers=2, **options)

    def survivors(function, limit):
        # 10 tasks, of which two fail in a way of their own.
        options = {"timeout": limit, "batch_size": 1}
        if sys.argv[2] == "this_module":
            options["errors"] = "return"
        if sys.argv[2] == "executor":
            workers = stack.enter_context(ProcessPoolExecutor(2))
            results = workers.map(function, range(10), timeout=limit)
        elif sys.argv[2] == "pool":
            workers = stack.enter_context(multiprocessing.Pool(2))
            unlimited = workers.imap_unordered(function, range(10))
            results = iter(lambda: unlimited.next(limit), None)
        else:
            results = run(function, range(10), **options)
        received, failed = [], 0
        while failed < 3 and len(received) + failed < 10:
            try:
                result = next(results)
                is_failed = type(result).__name__ == "FailedTask"
                failed += is_failed
                received += [] if is_failed else [result]
            except StopIteration:
                break
            except Exception:
                failed += 1
        return "costs these tasks" if len(received) == 8 else "ends the run"

    def death():
        return survivors(die, None)

    def die(task):
        time.sleep(0.1)
        return os._exit(1) if task in (4, 5) else task

    def hang():
        return survivors(sleep_long, 1.5)

    def sleep_long(task):
        time.sleep(3600 if task in (4, 5) else 0.1)
        return task

    def chain():
        return "works" if len(list(run(str, run(abs, range(200))))) == 200 else "fails"

    def neighbour():
        results = run(touch, range(200))
        next(results)
        with contextlib.suppress(ZeroDivisionError):
            list(run(reciprocal, [0]))
        return "works" if len(list(results)) == 199 else "fails"

    def reciprocal(task):
        return 1 / task

    def slow_reader():
        drawn = 0
        def tasks():
            nonlocal drawn
            for drawn in range(1, 20_001):
                yield drawn
        results = run(abs, tasks())
        for _ in range(5):
            next(results)
            time.sleep(0.2)
        return "draws a few tasks ahead" if drawn < 100 else "draws all tasks"

    def failing_source():
        def tasks():
            yield from range(10)
            raise LookupError
        received = []
        with contextlib.suppress(LookupError):
            received.extend(run(abs, tasks()))
        return {10: "all 10 results first", 0: "no result"}.get(len(received), "loses results")

    def left_loop():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Not about a thread of numpy's that is just ending when Python forks.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")
            for _ in run(touch, range(1000)):
                break
        if caught:
            return "warns"
        count = len(list(folder.iterdir()))
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            if len(list(folder.iterdir())) > count + 10:
                return "goes on in the background"
        return "stops, silently"

    def touch(task):
        time.sleep(0.01)
        (folder / str(task)).touch()

    class Model:
        def __getstate__(self):
            return {"something": "large"}

        def __setstate__(self, state):
            descriptor, _ = tempfile.mkstemp(dir="folder")
            os.close(descriptor)

        def objective(self, task):
            return task

    def model():
        assert len(list(run(Model().objective, range(40), batch_size=1))) == 40
        count = len(list(folder.iterdir()))
        return "unpickled once a worker" if count <= 2 else f"unpickled {count} times"

    def arrays():
        alive = weakref.WeakValueDictionary()
        def tasks():
            for task in range(40):
                array = alive[task] = numpy.full(250_000, task)
                yield array
                del array
        os.environ["JOBLIB_TEMP_FOLDER"] = str(folder.resolve())
        most = 0
        for _ in run(numpy.sum, tasks(), batch_size=1):
            time.sleep(0.03)
            files = sum(path.is_file() for path in folder.rglob("*"))
            most = max(most, files, len(alive))
        return "keeps many" if most > 12 else "keeps a few"

    folder = pathlib.Path("folder")
    if __name__ == "__main__":
        folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            run = globals()[sys.argv[2]]
            try:
                print(globals()[sys.argv[1]](), flush=True)
            except Exception as error:
                print(type(error).__name__, flush=True)
"""


@pytest.mark.readme
@pytest.mark.parametrize(("situation", "peer", "expected"), list(cells_of_readme()))
def test_what_the_readme_says_of_others(
    program, tmp_path, monkeypatch, situation, peer, expected
):
    # A pgrep that finds no process: this machine may have none.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pgrep").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "pgrep").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    process = program(COMPARED, situation, peer, warnings="default")
    try:
        output, errors = process.communicate(timeout=5 if "hang" in expected else None)
        output = output.strip()
    except subprocess.TimeoutExpired:
        output = "hangs"
        # Its workers, too, which would wait for it for long.
        os.killpg(process.pid, SIGKILL)
    possible = {
        "may lose results": ("loses results", "all 10 results first"),
        "may hang": ("hangs", "works"),
        "may keep many": ("keeps many", "keeps a few"),
    }
    assert output in possible.get(expected, (expected,)), errors
    assert peer != "this_module" or errors == ""


EXAMPLES = re.findall(
    r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", README.read_text(), re.DOTALL
)


class Reader:
    """Reads a run by the `stream` of the README; its last task waits for a file."""

    def __init__(self, folder):
        (source,) = [source for source, _ in EXAMPLES if "asyncio" in source]
        source = source.partition("async def main")[0]
        source = source.replace("from yourpackage.distributed import Joblib\n", "")
        names = {}
        eval(compile(source, "<README>", "exec"), names)
        self.go = folder / "go"
        tasks = [value(0), await_path(self.go)]
        self.results = Joblib.setup(run, tasks, 2, return_as="generator")
        self.items = names["stream"](self.results)
        self.received = []
        self.reported = []  # to the event loop

    async def read(self):
        async with contextlib.aclosing(self.items) as items:
            async for item in items:
                self.received.append(item)

    async def main(self, cancellations):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.reported.append(context))
        reader = asyncio.create_task(self.read())
        while not (self.received and self.results.gi_running):
            await asyncio.sleep(0.01)
        for _ in range(cancellations):
            reader.cancel()
            await asyncio.wait([reader], timeout=0.1)  # until it closes the run
        is_done = reader.done()
        self.go.touch()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert is_done == (cancellations == 2)  # it waits no more


@pytest.mark.readme
@pytest.mark.parametrize("cancellations", [1, 2])
def test_a_run_that_asyncio_reads_is_closed_though_its_reader_is_cancelled(
    tmp_path, cancellations, capfd
):
    reader = Reader(tmp_path)
    asyncio.run(reader.main(cancellations))
    if cancellations == 2:  # it did not wait for that
        wait_until(lambda: reader.results.gi_frame is None)
    assert reader.results.gi_frame is None
    assert reader.reported == []
    assert capfd.readouterr() == ("", "")


@once
def test_what_the_tests_need_is_named():
    command = [sys.executable, "-m", "pytest", "-p", "no:timeout", "-k", "test_lazy"]
    process = subprocess.run(
        command, cwd=FILE.parent, text=True, capture_output=True, check=False
    )
    assert process.stderr.strip() == "ERROR: Missing required plugins: pytest-timeout"
    assert process.stdout == ""


def uses_a_cluster(source):
    return "dask" in source


@pytest.mark.readme
@pytest.mark.parametrize(
    ("source", "output"),
    [example for example in EXAMPLES if not uses_a_cluster(example[0])],
)
def test_examples(program, source, output):
    assert output_of(program(source)) == output


def example_with(word):
    ((source, _),) = [example for example in EXAMPLES if word in example[0]]
    return source


@needs_shell
@pytest.mark.slow
def test_numbers_of_workers_are_given_back_by_deaths(program):
    source = example_with("take_number").replace("range(20)", "range(100)")
    source = source.replace("% 5", "% 3").replace("== 20", "== 100")
    assert output_of(program(source)) == ""


@pytest.mark.engines
@pytest.mark.locally
def test_what_tasks_log_on_dask_can_be_sent_to_the_program(dask, caplog):
    dask.forward_logging(level="INFO")
    try:
        task = "__import__('logging').warning('a word of a task')"
        assert list(Joblib.setup(eval, [task], backend="dask")) == [None]
        wait_until(lambda: "a word of a task" in caplog.text)
    finally:
        dask.unforward_logging()


@pytest.mark.once
@pytest.mark.parametrize("make", ["Queue", "Lock"])
def test_queues_and_locks_among_initargs_are_told_of(processes, make):
    initargs = (getattr(multiprocessing, make)(),)
    results = processes(abs, [1], initializer=id, initargs=initargs)
    _, error = collect(results, pickle.PicklingError)
    assert "initargs" in str(error)
    assert "Manager()" in notes_of(error)[0]
    with multiprocessing.get_context("spawn").Manager() as manager:
        initargs = (getattr(manager, make)(),)
        results = processes(abs, [1], initializer=id, initargs=initargs)
        assert list(results) == [1]
        Joblib.shutdown()


@pytest.mark.once
def test_the_order_of_sets_can_be_made_the_same(begun):
    source = """
    if __name__ == "__main__":
        os.environ["PYTHONHASHSEED"] = "0"
        run = lambda task: (time.sleep(0.1), os.getpid(), hash("text"))[1:]
        workers, hashes = zip(*Joblib.setup(run, range(6), 2, batch_size=1))
        print(len({*workers}), len({*hashes}))
    """
    assert output_of(begun(source)) == "2 1\n"


@needs_fork
@pytest.mark.once
def test_tasks_may_start_processes_of_multiprocessing(begun):
    source = """
    def start(task):
        queue = multiprocessing.Queue()
        process = multiprocessing.Process(target=queue.put, args=(task,))
        process.start()
        result = queue.get()
        process.join()
        return result

    if __name__ == "__main__":
        multiprocessing.set_start_method("fork")
        print(sum(Joblib.setup(start, range(4), 2)))
    """
    assert output_of(begun(source)) == "6\n"


@pytest.mark.engines
@pytest.mark.parametrize(
    ("source", "output"),
    [example for example in EXAMPLES if uses_a_cluster(example[0])],
)
def test_examples_of_clusters(program, source, output):
    pytest.importorskip("dask.distributed")
    process = program(source, warnings="default")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed.endswith(output)  # Dask logs


# ------------------------------------------------------------------------------------------------
# Soak: episodes of runs side by side, drawn by chance.


class Episode:
    """A few runs, each with an ending of its own, and what must hold of them."""

    ENDINGS = (
        "all",
        "all",
        "close",
        "drop",
        "cycle",
        "error",
        "source",
        "exit",
        "timeout",
        "death",
    )

    def __init__(self, seed, folder):
        self.chance = random.Random(seed)
        self.folder = folder

    def run(self):
        runs = [self.plan(number) for number in range(self.chance.choice([1, 1, 2, 3]))]
        if self.chance.random() < 0.5:
            with ThreadPoolExecutor(len(runs)) as threads:
                for done in [threads.submit(self.read, **run) for run in runs]:
                    done.result()
        else:
            readers = [self.reading(**run) for run in runs]
            while readers:
                reader = self.chance.choice(readers)
                if next(reader, "end") == "end":
                    readers.remove(reader)

    def plan(self, number):
        choice = self.chance.choice
        count = choice([0, 1, 5, 30, 200])
        return {
            "number": number,
            "count": count,
            "bad": self.chance.randrange(count + 1),
            "backend": choice(ENGINES),
            "ending": choice(self.ENDINGS),
            "ordered": choice([True, False]),
            "num_workers": choice([2, 2, 3]),
            "batch_size": choice([1, 1, 4]),
            "pre_dispatch": choice([1, 3, "2 * n_jobs", "8 * n_jobs"]),
            "depth": choice([1, 1, 1, 2]),
            "pause": choice([0, 0, 0.003]),
            "errors": choice(["raise", "raise", "return"]),
            "maxtasksperchild": choice([None, None, None, 20]),
        }

    def read(self, **run):
        for _ in self.reading(**run):
            pass

    def reading(
        self, number, count, bad, backend, ending, ordered, depth, pause, **options
    ):
        """Read a run, and check it; a step for each of its results."""
        drawn, received, failed = [], [], []
        if backend == "threading":
            del options["maxtasksperchild"]
            ending = "error" if ending == "death" else ending
        if depth > 1:  # what fails would be a task of the next run
            options["errors"] = "raise"
        faults = {"error": "1 / 0", "exit": raising("SystemExit(3)"), "death": KILL}
        stuck = await_path(self.folder / f"go{number}")

        def tasks():
            for task in range(count):
                drawn.append((task, threading.get_ident()))
                if task == bad and ending == "source":
                    raise LookupError(task)
                quick = f"(__import__('time').sleep({pause}), {task})[1]"
                slow = stuck if ending == "timeout" else faults.get(ending, quick)
                yield slow if task == bad else quick

        options |= {
            "backend": backend,
            "return_as": "generator" if ordered else "generator_unordered",
            "temp_folder": str(self.folder),
            "timeout": 2 if ending == "timeout" else 100,
        }
        results = Joblib.setup(eval, tasks(), **options)
        for _ in range(depth - 1):
            results = Joblib.setup(operator.pos, results, **options)
        workers, pre_dispatch = options["num_workers"], options["pre_dispatch"]
        most = eval(str(pre_dispatch), {"n_jobs": workers})
        if options["batch_size"] > 1:
            most = (most + workers) * options["batch_size"]
        error = None
        try:
            for result in results:
                if isinstance(result, FailedTask):
                    failed.append(result.number)
                else:
                    received.append(result)
                assert len(drawn) <= len(received) + len(failed) + most * depth
                assert drawn[-1][1] == threading.get_ident()
                yield
                if len(received) > bad and ending in ("close", "drop", "cycle"):
                    break
        except BaseException as caught:
            error = caught
            if isinstance(caught, (AssertionError, GeneratorExit)):
                raise
        expected = (
            {
                "error": ZeroDivisionError,
                "source": LookupError,
                "exit": RuntimeError,
                "timeout": TimeoutError,
                "death": BrokenExecutor,
            }.get(ending)
            if bad < count
            else None
        )
        returned = (*faults, *(["timeout"] if backend != "threading" else []))
        if options["errors"] == "return" and ending in returned:
            assert bad in failed or bad == count
            assert len(failed) <= options["batch_size"]
            assert sorted([*received, *failed]) == list(range(count))
            assert not ordered or received == sorted(received)
            (self.folder / f"go{number}").touch()
            return
        assert isinstance(error, expected or type(None)), (expected, error)
        if error is None and ending not in ("close", "drop", "cycle"):
            assert len(received) == count
        if ending == "source" and error is not None:
            assert len(received) == bad
        in_order = [task for task in range(count) if task != bad or expected is None]
        if ordered:
            assert received == in_order[: len(received)]
        else:
            assert Counter(received) <= Counter(in_order)
        if ending == "close":
            results.close()
        if ending == "cycle":
            box = [results]
            box.append(box)
            del box
        (self.folder / f"go{number}").touch()


def soak(seed, count, folder):
    """Run episodes with the seeds *seed*, *seed* + 1, ... and check what they leave."""
    folder, files = Path(folder), None
    for number in range(int(seed), int(seed) + int(count)):
        print(number, end=" ", flush=True)
        own = folder / str(number)
        own.mkdir()
        Episode(number, own).run()
        gc.collect()
        wait_until(lambda: not distributed._state.open_runs)
        wait_until(
            lambda own=own: all(path.name.startswith("go") for path in own.iterdir())
        )
        Joblib.shutdown()
        wait_until(lambda: workers_now() == set())
        wait_until(lambda: threading.active_count() == 1)
        shutil.rmtree(own)
        files = files or descriptors() + 4  # what starts once
        wait_until(functools.partial(has_few_files, files))
    print("clean", flush=True)


def has_few_files(most):
    gc.collect()
    return descriptors() <= most


def soaked(folder, seed, count, environment=None):
    """Return what `soak` prints, in a process of its own."""
    command = [sys.executable, "-W", "error", "-X", "faulthandler", __file__, "soak"]
    process = subprocess.Popen(
        [*command, str(seed), str(count), str(folder)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            return output_of(process)
        finally:
            process.kill()


@needs_proc
@pytest.mark.slow
def test_a_short_soak(tmp_path):
    assert soaked(tmp_path, seed=0, count=10).endswith("clean\n")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_long_soak(tmp_path):
    seconds = float(os.environ.get("SOAK_SECONDS", "300"))
    end, seed, count = (
        time.monotonic() + seconds,
        time.time_ns() // 10**9 % 10**6 * 1000,
        0,
    )
    while time.monotonic() < end:
        print(f"python test_distributed.py soak {seed + count} 20 FOLDER", flush=True)
        assert soaked(tmp_path, seed + count, 20).endswith("clean\n")
        count += 20
    print(count, "episodes ran clean")


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ENGINES)
def test_two_hundred_interrupts(program, backend):
    assert (
        output_of(program(INTERRUPTED, backend, 200, 1)) == "200 interrupts, 0 left\n"
    )


# ------------------------------------------------------------------------------------------------
# Benchmarks: this module beside what else could be used, on the same tasks, in the same run.


@contextlib.contextmanager
def this_module():
    yield functools.partial(Joblib.setup, num_workers=2)


@contextlib.contextmanager
def in_order():
    yield functools.partial(Joblib.setup, num_workers=2, return_as="generator")


def generator_of_joblib():
    return joblib.Parallel(n_jobs=2, return_as="generator_unordered")


@contextlib.contextmanager
def plain_joblib():
    yield lambda function, tasks: generator_of_joblib()(
        joblib.delayed(function)(task) for task in tasks
    )


@contextlib.contextmanager
def delayed_once():
    yield lambda function, tasks: generator_of_joblib()(
        map(joblib.delayed(function), tasks)
    )


@contextlib.contextmanager
def pool():
    with multiprocessing.Pool(2) as workers:
        yield workers.imap_unordered


@contextlib.contextmanager
def tuned_pool():
    with multiprocessing.Pool(2) as workers:
        yield functools.partial(workers.imap_unordered, chunksize=1000)


@contextlib.contextmanager
def executor():
    with ProcessPoolExecutor(2) as workers:
        yield workers.map


@contextlib.contextmanager
def mpire():
    def run(function, tasks):
        return workers.imap_unordered(function, ((task,) for task in tasks))

    with (
        importlib.import_module("mpire").WorkerPool(2) as workers,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # it would rather know the number of tasks
        yield run


@contextlib.contextmanager
def tuned_mpire():
    def run(function, tasks):
        tasks = [(task,) for task in tasks]
        return workers.imap_unordered(function, tasks, chunk_size=1000)

    with importlib.import_module("mpire").WorkerPool(2) as workers:
        yield run


@contextlib.contextmanager
def tuned_pebble():
    with importlib.import_module("pebble").ProcessPool(2) as workers:
        yield lambda function, tasks: workers.map(
            function, tasks, chunksize=1000
        ).result()


@contextlib.contextmanager
def in_threads():
    yield functools.partial(Joblib.setup, num_workers=2, backend="threading")


@contextlib.contextmanager
def thread_pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads.map


@contextlib.contextmanager
def limit():
    """What two cores could do at best: half of the tasks, one after another."""
    yield lambda function, tasks: map(function, itertools.islice(tasks, 0, None, 2))


@contextlib.contextmanager
def single_process():
    yield SingleProcess.setup


@contextlib.contextmanager
def plain_map():
    yield map


class HeavyModel:
    """Takes 20 ms to pickle; what it builds on its first call takes *seconds*."""

    def __init__(self, seconds):
        self.parameters = {
            f"parameter {k}": [float(k), (k, str(k))] for k in range(30_000)
        }
        self.seconds, self.solver = seconds, None

    def objective(self, milliseconds):
        if self.solver is None:
            time.sleep(self.seconds)
            self.solver = "built"
        end = time.perf_counter() + milliseconds / 1000
        while time.perf_counter() < end:
            pass


def heavy(seconds):
    model = by_value(HeavyModel)
    sys.modules["__main__"].HeavyModel = model  # where pools find it
    return model(seconds).objective


def give_model(model):
    HeavyModel.given = model


def objective_of_given(task):
    return HeavyModel.given.objective(task)


@contextlib.contextmanager
def pool_with_initializer():
    """A pool that is given the model as it starts, like each run of this module."""

    def run(function, tasks):
        with multiprocessing.Pool(2, give_model, (function.__self__,)) as workers:
            yield from workers.imap_unordered(objective_of_given, tasks)

    yield run


@contextlib.contextmanager
def one_by_one():
    yield functools.partial(Joblib.setup, num_workers=2, batch_size=1)


@contextlib.contextmanager
def watched():
    yield functools.partial(Joblib.setup, num_workers=2, errors="return", timeout=60)


@contextlib.contextmanager
def pebble():
    with importlib.import_module("pebble").ProcessPool(2) as workers:
        yield lambda function, tasks: workers.map(function, tasks).result()


def faulty(number):
    """Of 100 tasks, two raise, four end their worker, and one hangs."""
    kind = number % 100
    if kind < 2:
        raise ValueError(number)
    if kind < 6:
        os._exit(1)
    time.sleep(3600 if kind == 6 else 0.01)


def of_the_program(function):
    function = by_value(function)
    setattr(sys.modules["__main__"], function.__name__, function)  # for pebble
    return function


@contextlib.contextmanager
def surviving():
    options = {"errors": "return", "batch_size": 1}
    yield functools.partial(Joblib.setup, num_workers=2, timeout=1, **options)


@contextlib.contextmanager
def surviving_pebble():
    with importlib.import_module("pebble").ProcessPool(2) as workers:

        def run(function, tasks):
            results = workers.map(function, tasks, timeout=1).result()
            while True:
                try:
                    yield next(results)
                except StopIteration:
                    return
                except Exception as error:  # noqa: BLE001 # whatever a task has raised
                    yield error

        yield run


NAMES = {
    watched: "this module, watched",
    surviving: "this module",
    surviving_pebble: "pebble",
    pebble: "pebble",
    tuned_mpire: "mpire",
    tuned_pebble: "pebble",
    in_threads: "this module",
    thread_pool: "`ThreadPoolExecutor.map`",
    this_module: "this module",
    one_by_one: "this module, `batch_size=1`",
    pool_with_initializer: "Pool with an initializer",
    in_order: "this module, in order",
    plain_joblib: "joblib",
    delayed_once: "joblib, `delayed` called once",
    pool: "`Pool.imap_unordered`",
    tuned_pool: "the same, `chunksize=1000`",
    executor: "`ProcessPoolExecutor.map`",
    mpire: "mpire",
    limit: "two-core limit",
    single_process: "this module",
    plain_map: "`map`",
}
RIVALS = [this_module, plain_joblib, pool, executor, mpire]


@functools.cache  # the same for all
def busy(milliseconds):
    """Return a task that makes `sum` work for so long."""
    count = 100_000
    fastest = min(timeit.repeat(lambda: sum(range(count)), number=1, repeat=50))
    return range(int(count * milliseconds / 1000 / fastest))


trivial = inspect.isclass  # a function of a line of Python, which all can send
pair = math.frexp  # returns two numbers

WORKLOADS = {
    "100,000 trivial tasks": (
        lambda: (trivial, range(100_000)),
        [
            this_module,
            in_order,
            plain_joblib,
            delayed_once,
            pool,
            tuned_pool,
            executor,
            mpire,
        ],
    ),
    "1,000,000 trivial tasks": (
        lambda: (trivial, range(1_000_000)),
        [
            this_module,
            in_order,
            watched,
            plain_joblib,
            delayed_once,
            tuned_pool,
            limit,
        ],
    ),
    "200,000 tasks that return pairs": (
        lambda: (pair, range(200_000)),
        [this_module, plain_joblib, tuned_pool, tuned_mpire, tuned_pebble],
    ),
    "100,000 trivial tasks, in threads": (
        lambda: (trivial, range(100_000)),
        [in_threads, thread_pool],
    ),
    "3,000 trivial tasks one by one": (
        lambda: (trivial, range(3000)),
        [one_by_one, executor, pool, pebble],
    ),
    "600 of 1 ms, one by one": (
        lambda: (sum, [busy(1)] * 600),
        [one_by_one, plain_joblib, executor, pebble, limit],
    ),
    "400 of 10 ms: 8 raise, 16 die, 4 hang, limit 1 s": (
        lambda: (of_the_program(faulty), range(400)),
        [surviving, surviving_pebble],
    ),
    "1 ms each": (
        lambda: (sum, [busy(1)] * 1000),
        [this_module, watched, *RIVALS[1:], pebble, limit],
    ),
    "20 ms each": (lambda: (sum, [busy(20)] * 250), [*RIVALS, limit]),
    "uneven: one of 150 ms among 1 ms": (
        lambda: (sum, [busy(1)] * 400 + [busy(150)] + [busy(1)] * 100),
        [*RIVALS, limit],
    ),
    "16 trivial tasks": (lambda: (trivial, range(16)), [this_module, plain_joblib]),
    "50 trivial tasks": (
        lambda: (trivial, range(50)),
        [this_module, plain_joblib, pool, executor],
    ),
    "a method of a heavy model, 200 of 5 ms": (
        lambda: (heavy(0), [5] * 200),
        [this_module, one_by_one, plain_joblib, pool, pool_with_initializer],
    ),
    "the same, 40 of 20 ms, a solver built in 0.5 s": (
        lambda: (heavy(0.5), [20] * 40),
        [this_module, one_by_one, plain_joblib, pool, pool_with_initializer],
    ),
    "100,000 trivial tasks, in one process": (
        lambda: (trivial, range(100_000)),
        [single_process, plain_map],
    ),
}


@pytest.fixture(scope="session")
def table():
    """Rows of measurements, by the name of the contender. They are printed at the end."""
    rows = {}
    yield rows
    columns = list(dict.fromkeys(NAMES.values()))
    print(
        "\n\n| "
        + " | ".join(["", *columns])
        + " |\n"
        + "| --- " * (len(columns) + 1)
        + "|"
    )
    for title, row in rows.items():
        print(
            "| "
            + " | ".join([title, *(row.get(column, "") for column in columns)])
            + " |"
        )


def take_turns(benchmark, table, title, contenders, measure, rounds):
    """Measure each contender once a round; compare it with the first of the same round."""
    unit, *_ = contenders = list(contenders)
    times = {contender: [] for contender in contenders}
    with contextlib.ExitStack() as stack:
        runs = {contender: stack.enter_context(contender()) for contender in contenders}

        def play_round():
            for contender in contenders:
                times[contender].append(measure(runs[contender]))
            contenders.reverse()  # what one leaves behind is not always the same one's

        benchmark.group = title
        benchmark.pedantic(play_round, rounds=rounds, warmup_rounds=1)
    for contender, measured in times.items():
        ratios = map(operator.truediv, measured[1:], times[unit][1:])
        table.setdefault(title, {})[NAMES[contender]] = (
            f"{statistics.median(ratios):.2f}"
        )


def timed(function, tasks):
    """Return what tells how many seconds a contender takes for some tasks."""

    def measure(run):
        start = time.perf_counter()
        collections.deque(run(function, iter(tasks)), maxlen=0)
        return time.perf_counter() - start

    return measure


@forks
@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("title", WORKLOADS)
def test_speed(benchmark, table, title):
    workload, contenders = WORKLOADS[title]
    function, tasks = workload()
    rounds = 9 if function is trivial else 5
    take_turns(benchmark, table, title, contenders, timed(function, tasks), rounds)


# What is measured on clusters of two workers with one thread each.


@contextlib.contextmanager
def on_dask():
    yield functools.partial(Joblib.setup, backend="dask")


@contextlib.contextmanager
def map_of_dask():
    client = importlib.import_module("dask.distributed")

    def run(function, tasks):
        futures = client.default_client().map(function, list(tasks), pure=False)
        for future in client.as_completed(futures):
            yield future.result()

    yield run


@contextlib.contextmanager
def on_ray():
    yield functools.partial(Joblib.setup, num_workers=2, backend="ray")


class Actor:
    def run(self, function, task):
        return function(task)


@contextlib.contextmanager
def actors_of_ray():
    ray = importlib.import_module("ray")
    # They take no CPU of those that the workers of this module need.
    kind = ray.remote(num_cpus=0)(by_value(Actor))
    actors = importlib.import_module("ray.util").ActorPool(
        [kind.remote(), kind.remote()]
    )

    def run(function, tasks):
        def submit(actor, task):
            return actor.run.remote(function, task)

        return actors.map_unordered(submit, tasks)

    yield run


NAMES |= {
    on_dask: "this module",
    map_of_dask: "`client.map`, `as_completed`",
    on_ray: "this module",
    actors_of_ray: "two actors that are there already",
}

ON_CLUSTERS = {
    "Dask, 20,000 trivial tasks": (
        lambda: (trivial, range(20_000)),
        [on_dask, map_of_dask],
    ),
    "Dask, 4,000 of 1 ms": (
        lambda: (sum, [busy(1)] * 4000),
        [this_module, on_dask],
    ),
    "Ray, 5,000 trivial tasks": (
        lambda: (trivial, range(5000)),
        [on_ray, actors_of_ray],
    ),
}


@forks
@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("title", ON_CLUSTERS)
def test_speed_on_clusters(request, benchmark, table, title):
    request.getfixturevalue(title.partition(",")[0].lower())
    workload, contenders = ON_CLUSTERS[title]
    take_turns(benchmark, table, title, contenders, timed(*workload()), rounds=3)


@forks
@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_speed_of_the_first_result(benchmark, table):
    def measure(run):
        start = time.perf_counter()
        results = iter(run(abs, iter(range(8))))
        next(results)
        elapsed = time.perf_counter() - start
        collections.deque(results, maxlen=0)
        return elapsed

    take_turns(benchmark, table, "time to the first result", RIVALS, measure, rounds=30)


def limit_memory():
    """What needs more than 4 GiB is not going to survive a long run."""
    resource.setrlimit(resource.RLIMIT_DATA, [4 << 30] * 2)


def measure_drawn(contender):
    """Count the tasks drawn ahead of ten results that are read slowly."""
    limit_memory()
    drawn = 0

    def tasks():
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    with globals()[contender]() as run:
        results = iter(run(abs, tasks()))
        for _ in range(10):
            next(results)
            time.sleep(0.1)
        print(drawn - 10, flush=True)
        os._exit(0)  # some would never end


def measure_memory(contender, millions):
    """Measure the most memory that this process has had."""
    limit_memory()
    with globals()[contender]() as run:
        collections.deque(run(abs, iter(range(int(millions) * 10**6))), maxlen=0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)


def measure(*arguments):
    """Return what a function of this file prints in a process of its own, if it survives."""
    command = [sys.executable, __file__, *map(str, arguments)]
    seconds = 60
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:

        def kill():  # it and its workers
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            return int(process.stdout.readline() or 0) or None
        finally:
            timer.cancel()
            kill()


@forks
@pytest.mark.bench
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("contender", RIVALS)
def test_tasks_drawn_ahead(table, contender):
    drawn = measure("measure_drawn", contender.__name__)
    row = table.setdefault("tasks drawn ahead of ten slow results (count)", {})
    row[NAMES[contender]] = "does not end" if drawn is None else f"{drawn:,}"


@forks
@pytest.mark.bench
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("contender", RIVALS)
def test_peak_memory(table, contender):
    title = "peak memory, 4 million tasks to 1 million"
    one = measure("measure_memory", contender.__name__, 1)
    four = one and measure("measure_memory", contender.__name__, 4)
    row = table.setdefault(title, {})
    row[NAMES[contender]] = "does not end" if four is None else f"{four / one:.2f}"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
