"""Triton's interpreter in a quarter of the time.

It puts its own functions into ``triton.language`` at every call of a device function: 1.2 ms of each, 60,000 times a
run of these tests. Once a launch is enough for all functions of one file, which see the language by the same names.

It looks for overflows of integers, and does nothing where it finds one. And it makes the types and shapes of tensors
anew at every operation, though the same few return.
"""

from __future__ import annotations

import dataclasses
import functools
import sys


def hasten() -> None:
    """Where the interpreter has been imported."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        _hasten(interpreter)


@functools.cache
def _hasten(interpreter) -> None:
    _patch_once_a_launch(interpreter)
    options = interpreter.interpreter_builder.options
    if not options.debug:  # what is found is asserted only then
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    _remember_types(interpreter, interpreter.tl.core)


def _patch_once_a_launch(interpreter) -> None:
    launch, seen = interpreter.GridExecutor.__call__, set()  # files, by their globals

    def launch_anew(self, *args, **kwargs):
        seen.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in seen:
            seen.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


def _remember_types(interpreter, core) -> None:
    np_dtype, make_type, make_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    np_dtypes, types, shapes = {}, {}, {}

    def remembered_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    def remembered_type(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if not all(type(size) is int for size in shape):  # constexpr
            return make_type(self, element_ty, shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty, (self.shape, self.numel, self.name) = element_ty, types[key]

    def remembered_tensor(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, shapes[key]

    interpreter._get_np_dtype = remembered_np_dtype
    core.block_type.__init__ = remembered_type
    core.tensor.__init__ = remembered_tensor
