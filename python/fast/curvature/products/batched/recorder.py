"""The recorder sees every operation of a forward and a backward pass, and puts those that depend on
the parameters on a tape."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fast.curvature.network.network import StrayParameter
from fast.curvature.products.batched.tape import Operation, Slots, Tape
from fast.curvature.products.rules import (
    BY_FIRST,
    NO_FAULT,
    RULES,
    Call,
    RuleError,
    UnsupportedOperation,
    decomposition,
)

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Records every operation on an active tensor: one that depends on the parameters.

    Operations are recorded while the mode is entered: first those of the forward pass, and after
    `start_backward` those of the backward pass. `finish` gives both tapes.

    Args:
        exact: whether the backward pass may read values of the forward pass that depend on the
            parameters. It then goes on the same tape.

    Attributes:
        originals: parameters of the model by id. Leaves stand for them, so that nothing should read
            them.
        value_of: slot of a gradient -> slot of the value that it is the gradient in.
    """

    def __init__(self, exact: bool):
        super().__init__()
        self.exact = exact
        self.originals: dict[int, str] = {}
        self.value_of: dict[int, int] = {}
        self._forward = True
        self._forward_tape = self._tape = Tape()
        self._slots = WeakTensorKeyDictionary()
        self._below_autograd = False  # inside a decomposition
        self._with_hooks: set[int] = set()
        self._cache: dict[Any, tuple[Any, tuple[Tensor, ...]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load its compiler, 128 MiB, to keep it out of __torch_dispatch__; where it is
        # loaded, `evaluation` turns it off.
        return False

    def activate(self, tensor: Tensor) -> int:
        """Give a tensor a slot: what is computed from it is recorded."""
        slot = self._tape.new_slot(tensor)
        self._slots[tensor] = slot
        return slot

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor for a constant from now on."""
        self._slots.pop(tensor, None)

    def slot(self, tensor: Tensor) -> int | None:
        """The slot of an active tensor, None for others."""
        return self._slots.get(tensor)

    def start_backward(self) -> int:
        """Go over to the backward pass; the number of operations of the forward pass."""
        self._forward = False
        split = len(self._tape.operations)
        if not self.exact:
            self._slots.clear()
            self._tape = Tape()
        return split

    def finish(self) -> tuple[Tape, Tape]:
        """The tapes of the forward and the backward pass.

        Raises:
            UnsupportedOperation: a value that a derivative reads was overwritten.
        """
        self._cache.clear()
        self._forward_tape.verify()
        self._tape.verify()
        return self._forward_tape, self._tape

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        slots = tuple(self._lookup(a) for a in args)
        if any(self._lookup(a) is not None for a in kwargs.values()):
            raise UnsupportedOperation(f"{func} with a keyword argument that depends on parameters")
        self._check_untracked(func, args)
        if not any(_any(s) for s in slots):
            return func(*args, **kwargs)
        if self._forward and self.exact:
            self._watch_gradients(args)
        target = _mutated(func, args)
        if self._forward and not torch.is_grad_enabled():
            # Under no_grad the result is a constant to autograd, and so it is here.
            if target is not None:
                raise UnsupportedOperation(f"{func} under no_grad")
            return func(*args, **kwargs)
        if target is not None:
            return self._in_place(func, args, kwargs, slots, target)
        if self._below_autograd and func in _GUARDS:
            raise UnsupportedOperation(f"{func} in a decomposition")
        rule = RULES.get(func)
        if rule is None:
            simpler = decomposition(func)
            if simpler is None:
                raise UnsupportedOperation(str(func))
            out = self._decompose(simpler, args, kwargs)
            if out is NotImplemented:  # torch has it for other shapes alone
                raise UnsupportedOperation(str(func))
            return out
        # The transposed pass of a GGN is linear in what moves: only its shapes matter.
        shapes_only = not (self._forward or self.exact) and _is_expensive(args)
        out = _placeholder(func, *args, **kwargs) if shapes_only else func(*args, **kwargs)
        self._note(func, rule, args, kwargs, slots, out)
        return out

    def _watch_gradients(self, args: Sequence[Any]) -> None:
        """Ask autograd to say, in the backward pass, which gradient is that of each argument."""
        for t in _tensors(args):
            slot = self._slots.get(t)
            if slot is None or slot in self._with_hooks or not t.requires_grad or t.is_leaf:
                continue
            self._with_hooks.add(slot)
            t.register_hook(functools.partial(self._saw_gradient, slot))

    def _saw_gradient(self, value: int, gradient: Tensor) -> None:
        """Note that `gradient` is the gradient in the value of slot `value`."""
        slot = self._slots.get(gradient)
        if slot is not None:
            # Where one gradient is passed on, as by a sum, that of the sum comes first.
            self.value_of.setdefault(slot, value)

    def _decompose(self, simpler: Any, args: Any, kwargs: Any) -> Any:
        """Compute an operation without a rule by simpler ones, and record those."""
        before, self._below_autograd = self._below_autograd, True
        try:
            with self:
                return simpler(*args, **kwargs)
        finally:
            self._below_autograd = before

    def _note(
        self, func: Any, rule: Any, args: Any, kwargs: Any, slots: tuple[Slots, ...], out: Any
    ) -> None:
        """Put a call that has been made on the tape, with the derivative that its rule gives."""
        active = tuple(_any(s) for s in slots)
        call = Call(
            func=func,
            args=args,
            kwargs=kwargs,
            out=out,
            active=active,
            versions=self._tape.versions,
            cache=self._cache,
            exact=self.exact,
        )
        if func in BY_FIRST:
            slots = slots[:1]
            rule = rule if active[0] else Call.constant
        try:
            derivative = rule(call)
        except NO_FAULT:
            raise
        except Exception as error:
            raise RuleError.of(func, error) from error
        outs = out if isinstance(out, tuple | list) else (out,)
        which = call.differentiable_outputs
        targets = tuple(
            self.activate(o) if isinstance(o, Tensor) and (which is None or i in which) else None
            for i, o in enumerate(outs)
        )
        self._tape.operations.append(
            Operation(name=str(func), derivative=derivative, inputs=slots, outputs=targets)
        )

    def _in_place(
        self, func: Any, args: Any, kwargs: Any, slots: tuple[Slots, ...], target: Tensor
    ) -> Any:
        """Make a call that overwrites `target`, recorded as one that makes a new tensor."""
        functional = _functional(func)
        rule = RULES.get(functional) if functional is not None else None
        if rule is None:
            raise UnsupportedOperation(f"{func} in place")
        if target._is_view() or self._has_alias(target):
            raise UnsupportedOperation(f"{func} in place on a view")
        before = (target.clone(), *args[1:])
        out = func(*args, **kwargs)
        self._note(functional, rule, before, kwargs, slots, out)
        return out

    def _has_alias(self, tensor: Tensor) -> bool:
        """Whether another active tensor lies in the memory of `tensor`."""
        storage = tensor.untyped_storage().data_ptr()
        return any(
            t is not tensor and t.untyped_storage().data_ptr() == storage for t in self._slots
        )

    def _lookup(self, arg: Any) -> Slots:
        """The slot, or slots, of an argument; None where it does not depend on the parameters."""
        if isinstance(arg, Tensor):
            return self._slot_of(arg)
        if isinstance(arg, list | tuple) and any(isinstance(a, Tensor) for a in arg):
            slots = [self._slot_of(a) if isinstance(a, Tensor) else None for a in arg]
            return slots if any(s is not None for s in slots) else None
        return None

    def _slot_of(self, tensor: Tensor) -> int | None:
        slot: int | None = self._slots.get(tensor)
        if slot is None or tensor.requires_grad or not self._forward or self._below_autograd:
            return slot
        # It was detached where no function mode sees it: in scripted code, by torch.tensor(h), in
        # vmap. From here on it is a constant, in the backward pass too.
        del self._slots[tensor]
        return None

    def _check_untracked(self, func: Any, args: Sequence[Any]) -> None:
        """Raise where autograd knows of a dependence on the parameters that the record misses."""
        if not (self._forward and torch.is_grad_enabled()):
            return
        for t in _tensors(args):
            if id(t) in self.originals:
                raise StrayParameter(self.originals[id(t)])
            # Autograd detaches the results that it saves, such as the mean that a group norm gives.
            by_autograd = func is aten.detach.default
            if t.requires_grad and t not in self._slots and not by_autograd:
                raise UnsupportedOperation(
                    f"the custom autograd function whose result goes into {func}"
                )


# A decomposition that asks for equality keeps away from a point such as 0 / 0, at which its own
# derivative is not that of the function.
_GUARDS = {getattr(getattr(aten, f), kind) for f in ("eq", "ne") for kind in ("Scalar", "Tensor")}
# Number of elements from which a CPU takes longer to compute a result than torch takes to infer its
# shape (50 to 150 us of Python): without this limit, a record of 12 transformer layers of width 64
# took 4 times as long.
EXPENSIVE = 2**17


def _is_expensive(args: Any) -> bool:
    """Whether it takes longer to compute a result than to infer its shape.

    It never does on a GPU, which computes while Python goes on.
    """
    return any(
        isinstance(t, Tensor) and t.device.type == "cpu" and t.numel() > EXPENSIVE
        for t in pytree.tree_leaves(args)
    )


def _placeholder(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Uninitialised results of the right shapes; views stay views."""
    if any(r.alias_info is not None for r in func._schema.returns):
        return func(*args, **kwargs)
    device = next(t.device for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
    device = kwargs.get("device") or device

    def to_meta(t: Any) -> Any:
        if isinstance(t, torch.device):
            return torch.device("meta")
        if not isinstance(t, Tensor):
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    meta = func(*pytree.tree_map(to_meta, args), **pytree.tree_map(to_meta, kwargs))
    return pytree.tree_map_only(
        Tensor,
        lambda m: torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=device),
        meta,
    )


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        for t in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(t, Tensor):
                yield t


def _any(slots: Slots) -> bool:
    return any(s is not None for s in slots) if isinstance(slots, list) else slots is not None


def _mutated(func: Any, args: Sequence[Any]) -> Tensor | None:
    """The argument that a call overwrites."""
    for spec, arg in zip(func._schema.arguments, args, strict=False):
        if spec.alias_info is not None and spec.alias_info.is_write and isinstance(arg, Tensor):
            return arg
    return None


def _functional(func: Any) -> Any:
    """aten.add.Tensor for aten.add_.Tensor; None where there is no such operation."""
    name = func._schema.name.removeprefix("aten::")
    if not name.endswith("_") or func.namespace != "aten":
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, func._overloadname, None)
