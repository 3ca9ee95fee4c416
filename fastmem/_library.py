"""Registers ops with torch. One stem names an op in every room, so implementations are found by name."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmem import _check, _native, _select

library = torch.library.Library("fastmem", "DEF")


class Op(NamedTuple):
    """An op: its name, that of its file, its selector and its argument check."""

    name: str
    stem: str
    select: Callable[..., _select.Choice]
    check: Callable[..., Any]
    tensors: dict[int, tuple[str, bool]]  # position -> name and whether it may be None
    lists: tuple[int, ...]  # positions of lists of tensors
    written: tuple[int, ...]  # positions of what the op writes in place
    translate: Callable[..., tuple[Any, ...]]  # from the public function's arguments to the op's
    lacking: dict[str, str]  # backends that have no such op, and why

    def check_types(self, arguments: tuple[Any, ...]) -> None:
        _check.tensors(self.tensors.values(), (arguments[position] for position in self.tensors))

    def choose(self, arguments: tuple[Any, ...], backend: str | None) -> _select.Choice:
        """Checks the arguments; the backend they need."""
        self.check_types(arguments)
        self.check(*arguments)
        return self.select(*arguments, backend=backend)

    def run(self, *arguments: Any, backend: str | None = None) -> Any:
        """Checks the arguments and calls the backend they need."""
        return self._run_on(self.choose(arguments, backend).backend, arguments)

    def run_eagerly(self, *arguments: Any, backend: str | None = None) -> Any:
        """`run`, but the C++ op, which checks for safety anyway, tries first.

        Where it raises, the checks explain or the selector finds another backend. If neither does, as when memory ran
        out, the error is the C++ op's own.
        """
        if backend is None and _native.module and _on_cpu(arguments):
            try:
                return self._run_on("cpp", arguments)
            except RuntimeError:
                try:
                    backend = self.choose(arguments, None).backend
                except Exception as explanation:
                    raise explanation from None
                if backend == "cpp":
                    raise
            return self._run_on(backend, arguments)
        return self.run(*arguments, backend=backend)

    def _run_on(self, backend: str, arguments: tuple[Any, ...]) -> Any:
        """Calls a backend, and tells autograd what it wrote: a gradient that still needs the old values then raises."""
        try:
            result = implementation(backend, self.stem, self.name)(*arguments)
        except RuntimeError:
            if backend == "cpp":
                _native.raise_interrupt()
            raise
        if backend == "reference":  # plain PyTorch keeps the layout of its inputs; the op promises dense results
            result = torch.utils._pytree.tree_map_only(Tensor, Tensor.contiguous, result)
        if self.written:
            torch.autograd.graph.increment_version([arguments[position] for position in self.written])
        return result


OPS: dict[str, Op] = {}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), str, int, float, bool, tuple}
_functions: dict[str, Callable[..., Any]] = {}  # with a gradient, for plain calls; the last argument is the backend


def implementation(backend: str, stem: str, name: str) -> Callable[..., Any]:
    """The function `name` of a backend. Triton is imported here, at the first call that needs it."""
    if backend == "cpp":
        return getattr(torch.ops.fastmem_cpu, name).default
    room = {"triton": "fastmem.kernels", "reference": "fastmem.reference"}[backend]
    return getattr(importlib.import_module(f"{room}.{stem}"), name)


def register(
    stem: str,
    name: str,
    signature: str,
    *,
    select: Callable[..., _select.Choice],
    check: Callable[..., Any],
    fake: Callable[..., Any],
    translate: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments,
    lacking: dict[str, str] | None = None,
) -> None:
    """Defines `fastmem::name`. `select`, `check` and `fake` take the op's own arguments.

    `translate` makes them of the public function's.
    """
    schema = torch._C.parse_schema(f"fastmem::{name}{signature}")
    holding = {i: a for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type)}
    lists = tuple(i for i, a in holding.items() if "List" in str(a.type))  # whose entries the checks know by name
    tensors = {i: (a.name, "Optional" in str(a.type)) for i, a in holding.items() if i not in lists}
    written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write)
    op = OPS[name] = Op(name, stem, select, check, tensors, lists, written, translate, lacking or {})

    def checked_fake(*arguments: Any, backend: str | None = None) -> Any:
        check(*arguments)
        return fake(*arguments)

    library.define(f"{name}{signature}")
    library.impl(name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmem::{name}", checked_fake, lib=library)


def call(name: str, *arguments: Any, backend: str | None) -> Any:
    """What public functions and gradients do: `fastmem::name` with the backend that was asked for.

    A plain eager call goes straight to the backend. Through the dispatcher and its Python kernels it would take 5 us
    longer, 25 us with a gradient, and small memories take no more than that. All else goes through the dispatcher.
    torch.func.grad, jvp, forward-mode derivatives and their kin cannot follow a registered op, but they can follow its
    PyTorch reference.
    """
    backend = _select.requested(backend)
    if not torch.compiler.is_compiling():
        if _is_plain(arguments):
            if not (torch.is_grad_enabled() and _requires_grad(arguments)):
                return OPS[name].run_eagerly(*arguments, backend=backend)
            if name in _functions:
                return _functions[name](*arguments, backend)
        OPS[name].check_types(arguments)
        if _differentiating():
            if OPS[name].written:
                raise NotImplementedError(f"{name}: what writes in place has no derivative")
            OPS[name].check(*arguments)
            if backend not in (None, "reference"):
                raise _select.BackendUnavailable(f"{name}: backend {backend!r} has no torch.func derivative")
            return implementation("reference", OPS[name].stem, name)(*arguments)
    return getattr(torch.ops.fastmem, name)(*arguments, backend=backend)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing looks on: no transform, mode, trace, autocast or tensor subclass, and no type to refuse."""
    for argument in arguments:
        for entry in argument if type(argument) is list else (argument,):
            if type(entry) not in _PLAIN_TYPES:
                return False
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    )


def _on_cpu(arguments: tuple[Any, ...]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.is_cpu
    return False


def _requires_grad(arguments: tuple[Any, ...]) -> bool:
    for argument in arguments:
        for entry in argument if type(argument) is list else (argument,):
            if isinstance(entry, Tensor) and entry.requires_grad:
                return True
    return False


def _differentiating() -> bool:
    """Whether a forward-mode derivative or a torch.func one is active (vmap alone is none: the ops have its rule)."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(i.key() in (TransformType.Grad, TransformType.Jvp) for i in retrieve_all_functorch_interpreters())


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """The gradient of an op: `setup_context` saves, `backward` calls `<name>_backward`, which has none itself."""

    def setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend = keyword_only_inputs["backend"]
        setup_context(ctx, inputs, output)

    class Function(torch.autograd.Function):
        """The same for a call that does not pass the dispatcher."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *arguments, backend = inputs
            output = OPS[name].run_eagerly(*arguments, backend=backend)
            setup(ctx, tuple(arguments), {"backend": backend}, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return *backward(ctx, *grads), None

    class ListFunction(torch.autograd.Function):
        """The same for an op of lists, whose entries autograd must see one by one: first their number in each list."""

        @staticmethod
        def forward(ctx: Any, lengths: tuple[int, ...], *inputs: Any) -> Any:
            *arguments, backend = _together(lists, lengths, inputs)
            output = OPS[name].run_eagerly(*arguments, backend=backend)
            setup(ctx, tuple(arguments), {"backend": backend}, output)
            ctx.lengths = lengths
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = _together(lists, ctx.lengths, needs[1:])
            try:
                return None, *_apart(lists, (*backward(ctx, [*grads]), None))
            finally:
                ctx.needs_input_grad = needs  # as it was, for another backward through the same call

    lists = OPS[name].lists
    # torch.autograd.Function.apply prepares for transforms first, which costs 3 us; a plain call is under none.
    if lists:
        apply = super(torch.autograd.Function, ListFunction).apply
        _functions[name] = lambda *given: apply(tuple(len(given[i]) for i in lists), *_apart(lists, given))
    else:
        _functions[name] = super(torch.autograd.Function, Function).apply
    torch.library.register_autograd(f"fastmem::{name}", backward, setup_context=setup, lib=library)
    refuse_gradient(
        f"{name}_backward", f"{name} has no second derivative; fastmem.reference.{name} is plain PyTorch and has"
    )


def _apart(lists: tuple[int, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with the entries of lists in place of the lists at these positions."""
    flat: list[Any] = []
    for position, argument in enumerate(arguments):
        flat += argument if position in lists else [argument]
    return flat


def _together(lists: tuple[int, ...], lengths: tuple[int, ...], flat: tuple[Any, ...]) -> list[Any]:
    """`_apart` undone."""
    arguments = list(flat)
    for position, length in zip(lists, lengths, strict=True):  # of the earlier lists one entry is left each
        arguments[position : position + length] = [arguments[position : position + length]]
    return arguments


def refuse_gradient(name: str, reason: str) -> None:
    """Lets an op run, and raises by name when its gradient is asked for."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(reason)

    torch.library.register_autograd(f"fastmem::{name}", backward, lib=library)


def register_autocast(name: str, keep: tuple[int, ...] = ()) -> None:
    """Under autocast, casts bfloat16 and float16 arguments to float32, but for the positions in `keep`."""
    op = getattr(torch.ops.fastmem, name).default
    for device in ("CPU", "CUDA"):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def kernel(*arguments: Any, key: Any = key, **keywords: Any) -> Any:
            cast = (a if i in keep else _raised(a) for i, a in enumerate(arguments))
            with torch._C._ExcludeDispatchKeyGuard(key):
                return op(*cast, **keywords)

        library.impl(name, kernel, f"Autocast{device}")


def _raised(argument: Any) -> Any:
    """A low-precision tensor, or those of a list, in float32."""
    if isinstance(argument, list):
        return [_raised(entry) for entry in argument]
    low = isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
    return argument.float() if low else argument


def refuse_vmap(name: str, reason: str) -> None:
    """Lets an op run, and raises by name under vmap."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"{name}: {reason}")

    torch.library.register_vmap(f"fastmem::{name}", rule, lib=library)


def register_vmap(name: str, batched: tuple[int, ...]) -> None:
    """vmap by folding its dimension into the batch. `batched`: the positions of arguments with a batch dimension."""
    op = getattr(torch.ops.fastmem, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any, **keywords: Any) -> Any:
        folded = list(arguments)
        for i, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True)):
            if not isinstance(argument, Tensor):
                continue
            if i in batched:
                moved = (
                    argument.movedim(dim, 0) if dim is not None else argument.expand(info.batch_size, *argument.shape)
                )
                folded[i] = moved.flatten(0, 1)
            elif dim is not None:
                raise NotImplementedError(f"{name}: vmap over argument {i}, which all samples share, is not supported")
        outputs = op(*folded, **keywords)
        single = isinstance(outputs, Tensor)
        unfolded = [out.unflatten(0, (info.batch_size, -1)) for out in ([outputs] if single else outputs)]
        return (unfolded[0], 0) if single else (tuple(unfolded), (0,) * len(unfolded))

    torch.library.register_vmap(f"fastmem::{name}", rule, lib=library)


def backends() -> dict[str, list[tuple[str, bool, str]]]:
    """For every op the backends in order of preference: name, whether this machine can run it, and why or why not."""
    listed = [op for name, op in OPS.items() if not name.endswith(("_", "_backward"))]
    return {
        op.name: [
            (backend, available and backend not in op.lacking, op.lacking.get(backend, reason))
            for backend, available, reason in _select.availability()
        ]
        for op in listed
    }


def explain(
    op: str | Callable[..., Any], *arguments: Any, backend: str | None = None, **keywords: Any
) -> _select.Choice:
    """Prints and returns the backend that a call would use, with the reason.

    `op` is a public function or its name, the arguments are the function's. Wrong ones raise as the call would. Of a
    module, called with the arguments of its call, it tells whether whole sequences run in one op, or why not.
    """
    if hasattr(op, "served") and not isinstance(op, type):
        choice = _select.Choice(*op.served(*arguments, **keywords))
        print(f"{type(op).__name__}: {choice.backend} ({choice.reason})")
        return choice
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    if name is None or isinstance(op, type):
        got = f"the class {name}" if isinstance(op, type) else type(op).__name__
        raise TypeError(f"op: expected an op, its name or a module of fastmem.nn, got {got}")
    if name not in OPS:
        raise ValueError(f"op: expected one of {', '.join(sorted(OPS))}, got {name!r}")
    public = getattr(importlib.import_module("fastmem.ops"), name, None)
    function = public or implementation("reference", OPS[name].stem, name)  # a gradient has no public function
    bound = inspect.signature(function).bind(*arguments, **keywords)
    bound.apply_defaults()
    choice = OPS[name].choose(OPS[name].translate(*bound.args), backend)
    print(f"{name}: {choice.backend} ({choice.reason})")
    return choice
