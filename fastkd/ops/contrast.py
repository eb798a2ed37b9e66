"""``contrast``: InfoNCE of query rows against key rows, over the rows of one rank or of several.

:class:`fastkd.backends.masks.Mask` says which keys count as what. :func:`forward` and :func:`backward` are the
operation. They hand blocks of keys to a backend's ``Forward`` or ``Backward``. :func:`weighted_sum` runs them as a
plain autograd function. Under torch.compile, on one rank, custom ops take its place.

On one rank its own keys are all there are. On several ranks the keys of the others arrive through an exchange. Queries,
and two numbers per query, travel only where a rank's keys need a gradient, and then for the backward, so that nothing
waits for them. Queries that are contrasted with each other travel once. The upstream gradients must be equal on all
ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.backends.inputs import ContrastRows, ContrastUpstream
from fastkd.backends.masks import Mask, label_codes
from fastkd.distributed.agree import Peers
from fastkd.distributed.exchange import Alone, Exchange, start, start_numbers
from fastkd.distributed.group import exchange_dtype
from fastkd.distributed.pack import pack_rows
from fastkd.numerics import accumulation_dtype
from fastkd.ops.eager import computing, differentiable_once, is_traced


class Side(NamedTuple):
    """Queries or keys: this rank's rows [n, D], and their inverse norms [n, 1] if they were normalised."""

    exchange: Exchange | Alone
    rows: Tensor
    inverse_norm: Tensor | None
    gathered: Tensor | None = None


def _rows(
    queries: Side,
    keys: Side,
    logit_scale: Tensor,
    mask: Mask,
    like: Tensor,
    normalize: bool,
    needs: tuple[bool, bool] | None = None,
) -> ContrastRows:
    scale, k = logit_scale.to(accumulation_dtype(like.dtype)), None if mask.exclude_self else keys.rows
    total, is_packed = keys.exchange.total, keys.exchange.is_packed
    inverse_norms = queries.inverse_norm, keys.inverse_norm
    return ContrastRows(queries.rows, k, scale, mask, normalize, total, is_packed, inverse_norms, needs)


def _needed(need_query: bool, need_key: bool, need_scale: bool) -> tuple[bool, bool]:
    """Whether the gradients of queries and keys must be computed, for inputs that need theirs or not."""
    # The gradient of logit_scale falls out of either side's. On all ranks the same side must yield it.
    return need_query or need_scale or not need_key, need_key


def forward(
    rows: ContrastRows, keys: Side, weight: Tensor | None, backend: str, factor: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """The weighted sum over this rank's queries times ``factor``; two numbers per query for the backward, [2, n].

    The last is the backend's ``Forward``. It may have ``gradients`` of queries, keys (empty if not needed) and scale
    for an upstream gradient of 1, where they cost less now than later. Or it has ``kept`` what spares a backward work.
    """
    state = implementation("contrast", backend).Forward(rows)
    for cols, block in keys.exchange.columns(keys.rows[None], keys.gathered):
        state.add_own() if cols == keys.exchange.own else state.add(block[0], cols)
    return *state.finish(weight, factor), state


def backward(
    rows: ContrastRows,
    queries: Side,
    keys: Side,
    upstream: ContrastUpstream,
    needs: tuple[bool, bool, bool],
    like: Tensor,
    backend: str,
    kept: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and keys (empty where not needed), as wide as ``like`` and in its dtype; of the scale."""
    with_query, need_key = _needed(*needs)
    state = implementation("contrast", backend).Backward(rows, upstream, with_query, need_key, kept)
    # In a ring every rank must take part, whatever it needs itself.
    if with_query or rows.keys is None or keys.exchange.is_ring:
        for cols, block in keys.exchange.columns(keys.rows[None], keys.gathered):
            state.add_own() if cols == keys.exchange.own else state.add(block[0], cols)
    else:
        state.add_own()
    if queries.exchange is not keys.exchange and (need_key or queries.exchange.is_ring):
        for cols, block in queries.exchange.columns(queries.rows[None], queries.gathered):
            if cols != queries.exchange.own:
                state.add_queries(block[0], cols)
    grad_query, grad_key, grad_scale = state.finish(queries.inverse_norm, keys.inverse_norm, like.dtype, like.shape[1])
    return grad_query if needs[0] else grad_query.new_empty(0), grad_key, grad_scale


def _alone(query: Tensor, key: Tensor | None, normalize: bool, backend: str) -> tuple[Side, Side]:
    """Queries and keys of one rank, as the backend computes with them."""
    sides = (query,) if key is None else (query, key)
    found = implementation("contrast", backend).rows(sides, normalize)
    exchange = Alone(sides[-1].shape[0])
    return Side(exchange, *found[0]), Side(exchange, *found[-1])


@torch.library.custom_op("fastkd::contrast", mutates_args=())
def contrast(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    by_label: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over the queries, and two numbers per query for the backward, [2, n].

    ``sum_i w_i (logsumexp_{j in D_i} x_ij - mean_{j in P_i} x_ij)`` with ``x_ij = logit_scale q_i . k_j``.

    query [n, D], key [N, D]; without ``key`` the queries are contrasted with each other, none with itself, and
    ``key_labels`` is None. logit_scale: 0-dim. weight: [n] or None for ones. Labels are
    int64 of any values, or what ``label_codes`` makes of them, which saves that step in the backward.
    The rest is described at :class:`fastkd.backends.masks.Mask`.

    The two numbers: by index, the query's loss and its positive's logit; by label, its log-sum-exp and its number of
    positives.
    """
    mask = _mask(key, query_labels, key_labels, positive_index, by_label)
    with computing(query):
        queries, keys = _alone(query, key, normalize, backend)
        return forward(_rows(queries, keys, logit_scale, mask, query, normalize), keys, weight, backend)[:2]


@contrast.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty((), dtype=dtype), query.new_empty((2, query.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::contrast_backward", mutates_args=())
def contrast_backward(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    stats: Tensor,
    grad_loss: Tensor,
    by_label: bool,
    normalize: bool,
    need_query: bool,
    need_key: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key (empty where not needed, or absent) and of logit_scale, in their inputs' dtypes."""
    mask, needs = _mask(key, query_labels, key_labels, positive_index, by_label), (need_query, need_key, False)
    with computing(query):
        queries, keys = _alone(query, key, normalize, backend)
        rows = _rows(queries, keys, logit_scale, mask, query, normalize)
        upstream = ContrastUpstream(stats, weight, grad_loss)
        grad_query, grad_key, grad_scale = backward(rows, queries, keys, upstream, needs, query, backend)
    return grad_query, grad_key, grad_scale.to(logit_scale.dtype)


@contrast_backward.register_fake
def _(query: Tensor, key: Tensor | None, logit_scale: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_query, need_key = inputs[-3:-1]
    dense = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=dense) if need_query else query.new_empty(0),
        torch.empty_like(key, memory_format=dense) if need_key and key is not None else query.new_empty(0),
        torch.empty_like(logit_scale),
    )


def _mask(
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    by_label: bool,
) -> Mask:
    return Mask(
        query_labels=query_labels,
        key_labels=query_labels if key is None else key_labels,
        positive_index=positive_index,
        by_label=by_label,
        exclude_self=key is None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.by_label, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _op_backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = contrast_backward(*ctx.saved_tensors, grad_loss, ctx.by_label, ctx.normalize, *needs[:2], ctx.backend)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 7


contrast.register_autograd(_op_backward, setup_context=_setup_context)


class Contrast(torch.autograd.Function):
    """The weighted sum over this rank's queries, times a factor, against the keys of all ``peers``, if there are any.

    Unlike the custom op it may take a process group, keep what it likes for its backward, and start quickly. Labels are
    any int64, and ``positive_index`` counts this rank's keys. ``keeps``: whether gradients are enabled, so that a
    backward may come. Returns what ``fastkd::contrast`` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        logit_scale: Tensor,
        weight: Tensor | None,
        query_labels: Tensor | None,
        key_labels: Tensor | None,
        positive_index: Tensor | None,
        by_label: bool,
        normalize: bool,
        backend: str,
        factor: float,
        peers: Peers | None,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        if peers is not None and peers.has_weight and weight is None:
            weight = query.new_ones(query.shape[0])
        labels = query_labels, key_labels
        with computing(query):
            if peers is None:
                needs_numbers, (queries, keys) = False, _alone(query, key, normalize, backend)
            else:
                # Where queries are contrasted with each other, the gradient of the scale needs the others' numbers too.
                needs_numbers = peers.needs_grad if key is None else peers.needs_key_grad
                queries, keys, labels = _exchange_all(peers, query, key, labels, needs_numbers, normalize)
            mask = _mask(key, *labels, positive_index, by_label)
            needs = _needed(*ctx.needs_input_grad[:3]) if keeps and any(ctx.needs_input_grad[:3]) else None
            rows = _rows(queries, keys, logit_scale, mask, query, normalize, needs)
            total, stats, state = forward(rows, keys, weight, backend, factor)
            ctx.numbers = None
            if peers is not None and needs_numbers:
                numbers = stats if weight is None else torch.cat([stats, weight.to(stats.dtype)[None]])
                # Not among the saved tensors: they are still arriving, and autograd would take that for a change.
                ctx.numbers = start_numbers(peers, numbers.T)
        ctx.gathered_queries, ctx.exchanges = queries.gathered, (queries.exchange, keys.exchange)
        ctx.mask, ctx.normalize, ctx.backend, ctx.factor = mask, normalize, backend, factor
        saved = query, key, logit_scale, weight, stats, *queries[1:3], *keys[1:]
        of_mask = query_labels, key_labels, positive_index
        ctx.has_gradients = bool(state.gradients)
        ctx.save_for_backward(*saved, *of_mask, *state.gradients, *state.kept)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return total, stats

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 13
        query, _, logit_scale, weight, stats, q, inverse_q, k, inverse_k, gathered_keys, *others = saved
        kept = others[3:]  # after what the mask is made of, which must not have changed since
        needs = ctx.needs_input_grad[:3]
        if ctx.has_gradients:
            dtypes = query.dtype, query.dtype, logit_scale.dtype
            found = zip(kept, needs, dtypes, strict=True)
            return *((x * grad_loss).to(dtype) if need else None for x, need, dtype in found), *[None] * 10
        with computing(q):
            queries = Side(ctx.exchanges[0], q, inverse_q, ctx.gathered_queries)
            keys = Side(ctx.exchanges[1], k, inverse_k, gathered_keys)
            if ctx.numbers is not None:
                numbers = ctx.numbers.wait(queries.exchange).T.contiguous()
                stats, weight = numbers[:2], None if weight is None else numbers[2]
            rows = _rows(queries, keys, logit_scale, ctx.mask, query, ctx.normalize)
            upstream = ContrastUpstream(stats, weight, grad_loss, ctx.factor)
            computed = backward(rows, queries, keys, upstream, needs, query, ctx.backend, tuple(kept))
        grads = (*computed[:2], computed[2].to(logit_scale.dtype))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 10


def weighted_sum(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    labels: tuple[Tensor | None, Tensor | None],
    positive_index: Tensor | None,
    *,
    by_label: bool,
    normalize: bool,
    backend: str,
    factor: float,
    peers: Peers | None,
) -> tuple[Tensor, Tensor]:
    """``factor`` times the weighted sum over this rank's queries, and the numbers of ``fastkd::contrast``."""
    if peers is None and is_traced(query, key, logit_scale):
        if labels[0] is not None:
            codes = label_codes(labels[0], labels[0] if labels[1] is None else labels[1])
            labels = codes[0], None if key is None else codes[1]
        total, stats = contrast(query, key, logit_scale, weight, *labels, positive_index, by_label, normalize, backend)
        return total * factor, stats
    return Contrast.apply(
        query, key, logit_scale, weight, *labels, positive_index, by_label, normalize, backend, factor, peers,
        torch.is_grad_enabled(),
    )  # fmt: skip


def _exchange_all(
    peers: Peers,
    query: Tensor,
    key: Tensor | None,
    labels: tuple[Tensor | None, Tensor | None],
    needs_numbers: bool,
    normalize: bool,
) -> tuple[Side, Side, tuple[Tensor | None, Tensor | None]]:
    """Start to exchange the keys, and the queries where keys need a gradient; the labels of all that arrives."""
    dtype, is_self = exchange_dtype(query.dtype), key is None
    own = labels[0] if is_self else labels[1]
    running = None if own is None else start_numbers(peers.keys, own[:, None])
    others = None
    if labels[0] is not None and needs_numbers and not is_self:
        others = start_numbers(peers, labels[0][:, None])
    exchange, keys = _exchanged(peers.keys, query if key is None else key, dtype, normalize)
    of_queries, queries = exchange, keys
    if not is_self and needs_numbers:
        of_queries, queries = _exchanged(peers, query, dtype, normalize)
    elif not is_self:
        queries = _packed(exchange, query, dtype, normalize)
    if labels[0] is None or running is None:
        return queries, keys, labels
    key_labels = running.wait(exchange)[:, 0]
    if is_self:
        return queries, keys, (key_labels, key_labels)
    query_labels = labels[0] if others is None else others.wait(of_queries)[:, 0]
    return queries, keys, (query_labels, key_labels)


def _exchanged(peers: Peers, rows: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Exchange, Side]:
    """Start to exchange a side."""
    exchange, units, inverse_norm, gathered = start(peers, (rows,), dtype, normalize)
    return exchange, Side(exchange, units[0], inverse_norm[0] if normalize else None, gathered)


def _packed(exchange: Exchange | Alone, rows: Tensor, dtype: torch.dtype, normalize: bool) -> Side:
    """A side that stays at home."""
    units, inverse_norm = pack_rows((rows,), dtype, normalize)
    return Side(exchange, units[0], inverse_norm[0] if normalize else None)
