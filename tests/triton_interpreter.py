"""Triton's interpreter, as an instrument; needs ``TRITON_INTERPRET=1`` and a process of its own.

Importing this makes it sum a row of a product in the same order wherever the row stands, and quicker. It can then say
what each program reads and writes, and run programs at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import random
import threading

import numpy as np
from triton.runtime import interpreter
from triton_aot import kernel_names

from sdtp_kernels.backends.triton import attention, configs, fused, gather, score, select, window

assert configs.INTERPRETED, "set TRITON_INTERPRET=1: the interpreter is chosen when Triton is imported"

builder = interpreter.interpreter_builder
KERNELS = {
    name: vars(module)[name]
    for name in kernel_names()
    for module in (score, select, gather, fused, attention, window)
    if name in vars(module)
}


def _dot(a, b, d, input_precision, max_num_imprecise_acc):
    """A row at a time: BLAS may sum a row in another order at another place of the matrix, a tensor core does not."""
    rows = np.matmul(a.data[:, None, :], b.data, dtype=d.data.dtype)[:, 0]
    return interpreter.TensorHandle(rows + d.data, d.dtype.scalar)


class _Patched:
    """What a function's patching leaves: nothing to undo."""

    def __init__(self, function):
        _patch_lang(function)

    def restore(self):
        pass


# Of the interpreter's accesses: which arguments are the pointers and the mask.
PLACES = {"load": (0, 1), "store": (0, 2), "atomic": (1, 3)}

_patch_lang = interpreter._patch_lang
builder.create_dot = _dot
# Spare the interpreter what it repeats: patching `tl` at each call of a function, and copying CPU tensors back.
interpreter._patch_lang = functools.cache(_Patched)
interpreter.GridExecutor._restore_args_dev = lambda *_: None


@contextlib.contextmanager
def recorded_launches():
    """Yields the names of the kernels launched meanwhile."""
    names = []
    for name, kernel in KERNELS.items():
        kernel.add_pre_run_hook(lambda *_, name=name, **__: names.append(name))
    try:
        yield names
    finally:
        for kernel in KERNELS.values():
            kernel.pre_run_hooks.clear()


@contextlib.contextmanager
def before_each_access(act):
    """Call ``act(kind, addresses, itemsize)`` before each access of a program to memory.

    The kind is "load", "store" or "atomic".
    """

    def wrap(kind, method):
        def wrapped(*args):
            pointers, mask = args[PLACES[kind][0]], args[PLACES[kind][1]]
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            act(kind, addresses, pointers.get_element_ty().primitive_bitwidth // 8)
            return method(*args)

        return wrapped

    names = {"create_masked_load": "load", "create_masked_store": "store", "create_atomic_rmw": "atomic"}
    for name, kind in names.items():
        setattr(builder, name, wrap(kind, getattr(builder, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(builder, name)


class Schedule:
    """Programs of a launch as threads. One runs at a time; at each access to memory the next one is drawn at random."""

    def __init__(self, seed):
        self.random, self.turns, self.errors = random.Random(seed), {}, []

    def run(self, program, places):
        self.turns = {place: threading.Semaphore(0) for place in places}
        threads = [threading.Thread(target=self.run_one, args=(program, place)) for place in places]
        for thread in threads:
            thread.start()
        self.wake_one()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def run_one(self, program, place):
        self.turns[place].acquire()
        builder.grid_idx = place
        try:
            program()
        except BaseException as error:
            self.errors.append(error)
        del self.turns[place]
        self.wake_one()

    def wake_one(self):
        if self.turns:
            self.random.choice(list(self.turns.values())).release()

    def switch(self, *_):
        place = builder.grid_idx
        self.wake_one()
        self.turns[place].acquire()
        builder.grid_idx = place


@contextlib.contextmanager
def concurrent_programs(seed):
    """Launches run under a :class:`Schedule`, where the interpreter runs one program after the other."""
    schedule, serial = Schedule(seed), interpreter.GridExecutor

    class Concurrent(serial):
        def __call__(self, *args, **kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name in self.arg_names}
            for hook in self.pre_run_hooks:
                hook(*args, **kwargs)
            interpreter._patch_lang(self.fn)
            args = inspect.getcallargs(self.fn, *args, **kwargs)
            args = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in args.items()}
            dims = (*self.grid, 1, 1)[:3]
            builder.set_grid_dim(*dims)
            schedule.run(lambda: self.fn(**args), list(itertools.product(*map(range, dims))))

    interpreter.GridExecutor = Concurrent
    try:
        with before_each_access(schedule.switch):
            yield
    finally:
        interpreter.GridExecutor = serial
