"""Attention spelled out: a product, a softmax, a product.

``softmax(q @ k.T * scale + mask) @ v`` with ``matmul``, ``bmm``, ``baddbmm`` or ``einsum``; the
scale on the scores, on q, on k or on both, as a factor or a divisor; a mask that is added, filled
in or chosen by ``where``; casts around the softmax; dropout that is off. Inputs are 4-D, or 3-D
with batch and heads in one, as ``(B * H, L, D)``.

It starts from the softmax and walks up to the first product and down to the second. On the way
everything must be understood and used nowhere else. Where it is not, but a softmax does stand
between two products, the attention is reported and left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from cef_compile.graph.patterns import masks, products
from cef_compile.graph.patterns.calls import (
    PRODUCTS,
    argument,
    call_name,
    fake_value,
    is_number,
    transposition,
)
from cef_compile.graph.patterns.match import (
    NOTHING,
    Match,
    Operand,
    RefusedError,
    View,
    check_nothing_changes,
    same,
    same_shape,
)
from cef_compile.policy import Reason

REACH = 32
"""How many nodes away from a softmax its products are looked for."""


def match(node: fx.Node) -> Match | None:
    """The attention around a softmax; None where it is no attention's."""
    if call_name(node) != "softmax":
        return None
    first = _nearest(node, lambda n: n.all_input_nodes)
    second = _nearest(node, lambda n: list(n.users))
    if first is None or second is None:
        return None
    try:
        return _Walk(node, first, second).match()
    except RefusedError as refused:
        return _seen(first, second, refused.problem)


def _nearest(start: fx.Node, neighbours: Callable[[fx.Node], list[fx.Node]]) -> fx.Node | None:
    """The nearest product of two activations in one direction, not across a projection."""
    seen, todo = {start}, [start]
    while todo and len(seen) <= REACH:
        for node in neighbours(todo.pop(0)):
            if node in seen:
                continue
            if call_name(node) in PRODUCTS:
                if _of_activations(node):
                    return node
                continue
            if call_name(node) not in ("projection", "softmax"):
                seen.add(node)
                todo.append(node)
    return None


def _of_activations(product: fx.Node) -> bool:
    pair = products.factors(product)
    return len(pair) >= 2 and not any(map(_is_weight, pair))


def _is_weight(node: Any) -> bool:
    while isinstance(node, fx.Node) and call_name(node) in ("transpose", "permute", "cast", "view"):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return True
    return node.op == "get_attr" or isinstance(fake_value(node), torch.nn.Parameter)


def _seen(first: fx.Node, second: fx.Node, problem: tuple[Reason, str]) -> Match | None:
    """The attention between two products, to be reported; None where not even shapes are known."""
    query, key = products.factors(first)[:2]
    try:
        found = products.scores(first)
        q, k = found.query, found.key
    except RefusedError:
        q, k = Operand(query), Operand(key)
    value = Operand(products.factors(second)[1])
    fakes = [operand.fake for operand in (q, k, value)] + [fake_value(second)]
    if any(not isinstance(fake, torch.Tensor) or fake.dim() < 2 for fake in fakes):
        return None
    return Match(second, _form(first, second), q, k, value, problem=problem)


def _form(first: fx.Node, second: fx.Node) -> str:
    """``softmax(...)`` of what computes the scores, or of both products where they differ."""
    names = dict.fromkeys((call_name(first), call_name(second)))
    return f"softmax({', '.join(names)})"


class _Walk:
    """From a softmax to both products.

    Attributes:
        absorbed: the nodes that the attention consists of, the last product aside.
        scale: product of the constant factors seen so far; on the way up, those that come after.
        mask: the one mask, if there is any.
    """

    def __init__(self, softmax: fx.Node, first: fx.Node, second: fx.Node) -> None:
        self.softmax, self.first, self.second = softmax, first, second
        self.absorbed = {softmax}
        self.scale = 1.0
        self.mask = NOTHING

    def match(self) -> Match:
        """The attention.

        Raises:
            RefusedError: some part of it is not understood or used elsewhere.
        """
        self._check_axis()
        node = argument(self.softmax, 0, "input", "self")
        while node is not self.first:
            node = self._up(node)
        self._take(node)
        found = products.scores(node)
        if found.bias is not None:
            self._add_mask(masks.added(found.bias, self.scale))
        self.scale *= found.scale
        product = self._down()
        dtype = fake_value(product).dtype
        query, key = (self._undone(x, node, dtype) for x in (found.query, found.key))
        result = self._batched(product, query, key)
        check_nothing_changes(self.absorbed, product)
        return result

    def _check_axis(self) -> None:
        dim = argument(self.softmax, 1, "dim")
        if dim not in (-1, fake_value(self.softmax).dim() - 1):
            raise RefusedError(Reason.UNKNOWN_FORM, f"softmax over dimension {dim}")

    def _take(self, node: fx.Node) -> None:
        """Absorb a node of the scores or weights, which nobody else may use."""
        # x.type_as(node) asks for its dtype alone.
        users = [u for u in node.users if call_name(u) != "cast" or u.args[0] is node]
        if len(users) != 1:
            raise RefusedError(Reason.INTERMEDIATES, f"{node.name} has {len(users)} users")
        if not same_shape(fake_value(node).shape, fake_value(self.first).shape):
            raise RefusedError(
                Reason.UNKNOWN_FORM, f"{node.name} has another shape than the scores"
            )
        self.absorbed.add(node)

    def _up(self, node: Any) -> fx.Node:
        """Understand one node between the first product and the softmax; returns the one before."""
        name = call_name(node)
        if not name:
            spelled = getattr(node, "target", node)
            raise RefusedError(
                Reason.UNKNOWN_FORM, f"{getattr(spelled, '__name__', spelled)} before the softmax"
            )
        self._take(node)
        before = argument(node, 0, "input", "self")
        if name == "contiguous":
            return before
        if name == "cast":
            self._check_cast(node, before)
            return before
        if name.rstrip("_") in ("mul", "div", "add"):
            other = argument(node, 1, "other")
            commutes = name in ("mul", "add") and not is_number(other)
            if commutes and not self._leads_up(before):
                before, other = other, before
            if name.startswith("add"):
                self._check_alpha(node)
                self._add_mask(masks.added(other, self.scale))
            else:
                self._multiply(node, name.rstrip("_"), other)
            return before
        if name in ("masked_fill", "masked_fill_"):
            condition, fill = argument(node, 1, "mask"), argument(node, 2, "value")
            self._add_mask(masks.filled(condition, fill, self.scale))
            return before
        if name == "where":
            condition, fill = argument(node, 0, "condition"), argument(node, 2, "other")
            self._add_mask(masks.kept(condition, fill, self.scale))
            return argument(node, 1, "input", "self")
        raise RefusedError(Reason.UNKNOWN_FORM, f"{name} between the products")

    def _leads_up(self, start: Any) -> bool:
        """Whether the first product is behind a value, rather than behind what it is added to.

        The product itself: a bias may have products of its own behind it.
        """
        seen, todo = set(), [start] if isinstance(start, fx.Node) else []
        while todo:
            node = todo.pop()
            if node is self.first:
                return True
            if node in seen or call_name(node) in ("", "projection", "softmax", *PRODUCTS):
                continue
            seen.add(node)
            todo.extend(node.all_input_nodes)
        return False

    def _multiply(self, node: fx.Node, name: str, other: Any) -> None:
        if not is_number(other):
            raise RefusedError(Reason.SCALE, "the factor of the scores is computed in the graph")
        if node.kwargs.get("rounding_mode") is not None or (name == "div" and other == 0):
            raise RefusedError(Reason.UNKNOWN_FORM, "the scores are rounded or divided by zero")
        self.scale *= 1 / other if name == "div" else other

    def _check_alpha(self, node: fx.Node) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise RefusedError(Reason.UNKNOWN_FORM, "a mask is added with a factor")

    def _add_mask(self, mask: Operand) -> None:
        if self.mask.source is not None:
            raise RefusedError(Reason.MASK, "two masks")
        self.mask = mask

    def _check_cast(self, node: fx.Node, before: Any) -> None:
        new, old = fake_value(node), fake_value(before)
        if not new.dtype.is_floating_point or new.device != old.device:
            raise RefusedError(Reason.UNKNOWN_FORM, f"a cast to {new.dtype} on {new.device}")

    def _down(self) -> fx.Node:
        """Understand what is between the softmax and the second product; returns the product."""
        node = self.softmax
        while True:
            self._take(node)
            user = next(u for u in node.users if call_name(u) != "cast" or u.args[0] is node)
            name = call_name(user)
            if name in PRODUCTS:
                if user is not self.second:
                    raise RefusedError(Reason.UNKNOWN_FORM, "the softmax meets a weight")
                self.weights = node
                return user
            if name == "cast":
                self._check_cast(user, node)
            elif name == "dropout":
                self._check_dropout(user)
            elif name != "contiguous":
                raise RefusedError(
                    Reason.UNKNOWN_FORM, f"{name or user.name} between softmax and product"
                )
            node = user

    def _check_dropout(self, node: fx.Node) -> None:
        rate = argument(node, 1, "p", default=0.5)
        if rate != 0 and argument(node, 2, "training", "train", default=True) is not False:
            raise RefusedError(Reason.DROPOUT, f"dropout_p={rate}")

    def _undone(self, operand: Operand, product: fx.Node, dtype: torch.dtype) -> Operand:
        """A query or key before constant factors and casts up, which the op does itself."""
        source, found = operand.source, operand
        views: list[View] = []
        factor, passed = 1.0, []
        while isinstance(source, fx.Node):
            name = call_name(source)
            before = argument(source, 0, "input", "self")
            if name in ("mul", "div"):
                other = argument(source, 1, "other")
                if name == "mul" and is_number(before):
                    before, other = other, before
                if not is_number(other) or not other or source.kwargs.get("rounding_mode"):
                    break
                factor *= 1 / other if name == "div" else other
            elif name == "cast":
                old, new = fake_value(before), fake_value(source)
                if old.dtype != dtype or new.dtype != torch.float32 or old.device != new.device:
                    break
            elif name in ("transpose", "permute"):
                views.insert(0, transposition(source))
            elif name != "contiguous":
                break
            passed.append(source)
            source = before
            if name in ("mul", "div", "cast"):
                found = Operand(source, (*views, *operand.views))
                self.scale *= factor
                self.absorbed.update(passed)
                factor, passed = 1.0, []
        in_dtype = fake_value(found.source).dtype == dtype
        if not in_dtype and fake_value(product).dtype != dtype:
            raise RefusedError(
                Reason.DTYPE,
                f"scores of {fake_value(found.source).dtype}, values of {dtype}",
            )
        return found

    def _batched(self, product: fx.Node, query: Operand, key: Operand) -> Match:
        """The match with 4-D operands."""
        weighted = products.weighted(product, self.weights)
        value, mask, views = weighted.value, self.mask, weighted.views
        dims = [operand.fake.dim() for operand in (query, key, value)]
        if dims not in ([3, 3, 3], [4, 4, 4]):
            raise RefusedError(Reason.LAYOUT, f"{dims[0]}-D, {dims[1]}-D and {dims[2]}-D inputs")
        if mask.source is not None:
            for _ in range(dims[0] - mask.fake.dim()):
                mask = mask.then(torch.unsqueeze, 0)
        if dims[0] == 3:  # batch and heads in one
            query, key, value = (x.then(torch.unsqueeze, 1) for x in (query, key, value))
            mask = mask if mask.source is None else mask.then(torch.unsqueeze, 1)
            views = ((torch.squeeze, (1,)), *views)
        q, k, v = (operand.fake.shape for operand in (query, key, value))
        shared = same_shape(k[:2], q[:2]) or (same(k[0], q[0]) and same(k[1], 1))
        if not shared or not same_shape(k[:3], v[:3]):
            raise RefusedError(Reason.LAYOUT, "batch or heads are broadcast")
        return Match(
            result=product,
            form=_form(self.first, product),
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=self.scale,
            enable_gqa=not same(q[1], k[1]),
            result_views=views,
            absorbed=frozenset(self.absorbed),
        )
