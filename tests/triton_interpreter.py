"""Triton's interpreter in half the time.

It puts its own functions into ``triton.language`` at every call of a device function: 1.2 ms of each, 60,000 times a
run of these tests. Once a launch is enough for all functions of one file, which see the language by the same names.
"""

from __future__ import annotations

import functools
import sys


def hasten() -> None:
    """Where the interpreter has been imported."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        _hasten(interpreter)


@functools.cache
def _hasten(interpreter) -> None:
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
