"""When parameters are waited for: hooks on the forward of modules.

**The hazard**: after ``step()`` parameters are in flight. Given the module, whoever comes to a parameter through it
waits for that parameter's bucket, and only then: the forward of the module that owns it, reading it as an attribute
(``waiting_parameters.py``), ``model.parameters()``, ``state_dict`` and ``load_state_dict``. What cannot be seen is a
reference held elsewhere: a list of parameters made before. In the forward of the root such a parameter is safe if its
owner's forward did not run last time (its bucket is waited for at the root); everybody else calls
``finish_param_sync()``.

**Compiled modules.** A hook inside a compiled region breaks its graph, and Dynamo looks at the frames of what runs in
the break again in every step (24 blocks on a GPU: 27 ms). So a module that was compiled in place (``module.compile()``)
waits before its compiled call, outside of it, for all parameters inside, and nothing inside has hooks. Whether a module
has been compiled since is asked at each forward of the root. Where compiled code enters a module that still has a hook
(``torch.compile(model)`` after the optimizer was made, a compiled function), the graph breaks once, at that hook, which
waits for everything; hooks behind it see that nothing is in flight and vanish from the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lion_dist.sharding.bucket import Bucket, ParamState
from lion_dist.sharding.waiting_parameters import WaitingParameters


class OwnModelHook:
    """A module hook that stays behind when the model is copied or pickled (EMA): the copy's parameters never leave."""

    def __init__(self, hooks: ForwardHooks | None):
        self.hooks = hooks

    def __deepcopy__(self, _memo) -> OwnModelHook:
        return type(self)(None)

    def __reduce__(self):
        return type(self), (None,)


class BeforeForward(OwnModelHook):
    """Before the forward of one module: the parameters that it covers are whole when the hook returns.

    It runs hundreds of times a step, so it is one frame, and is traced in compiled code: see the module's docstring.
    """

    def __init__(self, hooks: ForwardHooks | None, buckets: Sequence[Bucket] = ()):
        super().__init__(hooks)
        self.buckets = buckets

    def __call__(self, module: nn.Module, _args) -> None:
        hooks = self.hooks
        if hooks is None:
            return
        if torch.compiler.is_compiling():
            if not hooks.all_whole:
                hooks.finish_from_compiled()
        elif not hooks.in_forward:  # a sub-module called by itself: nobody has waited for what it uses functionally
            hooks.finish_all()
        else:
            if torch.is_grad_enabled():
                hooks.ran.add(module)
            for bucket in self.buckets:
                if bucket.param_state is not ParamState.FULL:
                    hooks.finish(bucket)


class BeforeRootForward(OwnModelHook):
    def __call__(self, _module: nn.Module, _args) -> None:
        hooks = self.hooks
        if hooks is None:
            return
        if torch.compiler.is_compiling():
            if not hooks.all_whole:
                hooks.finish_from_compiled()
        else:
            hooks.begin_root_forward()


class AfterRootForward(OwnModelHook):
    def __call__(self, _module: nn.Module, _args, _output) -> None:
        if self.hooks is not None and not torch.compiler.is_compiling():
            self.hooks.in_forward = False


class BeforeStateDict(OwnModelHook):
    def __call__(self, *_args, **_kwargs) -> None:
        if self.hooks is not None:
            self.hooks.finish_all()


class CompiledCall:
    """What a module that was compiled in place is called by: waits, then calls the compiled code."""

    def __init__(self, module: nn.Module, before: BeforeForward):
        self.module, self.before, self.compiled = module, before, module._compiled_call_impl

    def __call__(self, *args, **kwargs):
        self.before(self.module, args)
        return self.compiled(*args, **kwargs)  # pyrefly: ignore[not-callable]


class ForwardHooks:
    """Lets each module's forward wait for its own parameters only. The module gets hooks with the first buckets.

    Attributes:
        all_whole: nothing is in flight; known since ``finish_all()``, and until ``note_sync_starts()``.
        in_forward: the root's forward is under way.
        ran: modules whose forward, with gradients, began since the root's did.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.buckets: list[Bucket] = []
        self.all_whole = self.in_forward = False
        self.ran: set[nn.Module] = set()
        self._bucket_of: dict[Parameter, Bucket] = {}
        self._covered: dict[nn.Module, list[Bucket]] = {}  # by the hook of each module that has parameters
        self._calls: dict[nn.Module, CompiledCall | None] = {}  # of modules with hooks; None: not compiled in place
        self._outside: list[Bucket] = []
        self._handles: list[RemovableHandle] = []
        self.finish = torch.compiler.disable(Bucket.finish_param_sync)
        self.finish_from_compiled = torch.compiler.disable(
            self._finish_from_compiled,
            reason="ShardedLion waits for parameters here. Compile the model before ShardedLion is made, or in place "
            "(model.compile(), block.compile()), and the graph stays whole.",
        )

    # ---- hooks

    def _hook_up(self) -> None:
        for module, is_compiled in self._entries().items():
            covered = module.parameters(recurse=is_compiled)
            buckets = list(dict.fromkeys(self._bucket_of[p] for p in covered if p in self._bucket_of))
            if buckets or is_compiled:
                self._covered[module] = buckets
            before = BeforeForward(self, buckets)
            self._calls[module] = None
            if module._compiled_call_impl is not None:
                self._calls[module] = module._compiled_call_impl = CompiledCall(module, before)
                continue
            self._before(module, before)
            if not is_compiled:
                WaitingParameters.install(module, self._bucket_of)
        if self._calls[self.module] is None:
            self._before(self.module, BeforeRootForward(self))
            self._handles.append(self.module.register_forward_hook(AfterRootForward(self), always_call=True))
        for module in self.module.modules():
            self._handles.append(module.register_state_dict_pre_hook(BeforeStateDict(self)))
            self._handles.append(module.register_load_state_dict_pre_hook(BeforeStateDict(self)))

    def _entries(self) -> dict[nn.Module, bool]:
        """The modules that get a hook, and whether they are compiled: such a one stands for all of its inside."""
        entries, inside = {}, set()
        for module in self.module.modules():
            if module not in inside:
                entries[module] = is_compiled(module)
                if entries[module]:
                    inside.update(module.modules())
        return entries

    def _before(self, module: nn.Module, hook: OwnModelHook) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, call in self._calls.items():
            WaitingParameters.remove(module, self._bucket_of)
            if call is not None and module._compiled_call_impl is call:
                module._compiled_call_impl = call.compiled
        self._handles.clear()
        self._calls.clear()
        self._covered.clear()

    def _hook_up_again(self) -> None:
        self._unhook()
        self._hook_up()

    def close(self) -> None:
        """The module is as it was before; nothing waits for parameters any more, so all are waited for now."""
        self.finish_all()
        self._unhook()

    def add_buckets(self, buckets: Sequence[Bucket]) -> None:
        self.buckets += buckets
        self._bucket_of.update((param, bucket) for bucket in buckets for param in bucket.params)
        self.look_at_modules()

    def look_at_modules(self) -> None:
        """Find out which module owns which parameters; again whenever there are others."""
        self._hook_up_again()
        inside = set(self.module.parameters())
        self._outside = [bucket for bucket in self.buckets if not inside.issuperset(bucket.params)]

    # ---- waiting

    def begin_root_forward(self) -> None:
        if any(module._compiled_call_impl is not call for module, call in self._calls.items()):
            self._hook_up_again()
        self.in_forward = True
        if not torch.is_grad_enabled():  # evaluation may take another path through the model
            self.finish_all()
            return
        silent = [m for m in self._covered if m not in self.ran and m is not self.module]  # their forward did not run
        for bucket in dict.fromkeys(bucket for module in silent for bucket in self._covered[module]):
            if bucket.param_state is not ParamState.FULL:
                self.finish(bucket)
        self.ran = set()

    def _finish_from_compiled(self) -> None:
        self.finish_all()
        entries = self._entries()
        if entries.keys() != self._calls.keys() or any(m._compiled_call_impl is not c for m, c in self._calls.items()):
            self._hook_up_again()

    def note_sync_starts(self) -> None:
        """Parameters are about to leave."""
        self.all_whole = False

    def finish_outside(self) -> None:
        """Wait for buckets with parameters that are not the module's (a loss with weights): no forward does."""
        for bucket in self._outside:
            bucket.finish_param_sync()

    def finish_all(self) -> None:
        for bucket in self.buckets:
            if bucket.param_state is not ParamState.FULL:
                self.finish(bucket)
        self.all_whole = True


def is_compiled(module: nn.Module) -> bool:
    """Whether it is ``torch.compile(module)`` or was compiled in place by ``module.compile()``."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
