"""The mathematics of a tile of logits as Triton kernels; ``distill.fused`` launches them.

A program takes a row (``gradient``: a block of a row) and holds ``BLOCK`` columns of it at a time. Pointers are to
contiguous tensors: logits and gradient [C, V], facts [*, C]. Suffixes: s of the student, t of the teacher.

Untyped on purpose: Triton compiles a function from its source and takes a parameter's annotation for a type of its own.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
"""Stands for logits of minus infinity, those behind the last column too: finite, so that its probability of 0 times its
logarithm is 0."""


@triton.jit
def _load(logits_ptr, columns, num_vocab, inverse_temperature):
    inside = columns < num_vocab
    logits = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    return tl.where(inside & ~(logits < FLOOR), logits, FLOOR)  # what is not a number stays so


@triton.jit
def log_totals(
    logits_ptr,
    log_totals_ptr,  # [C]: the logsumexp at temperature 1
    num_vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * num_vocab
    highest = FLOOR
    total = 0.0
    for start in range(0, num_vocab, BLOCK):
        x = _load(logits_ptr, start + tl.arange(0, BLOCK), num_vocab, 1.0)
        new_highest = tl.maximum(highest, tl.max(x, 0))
        total = tl.exp(highest - new_highest) * total + tl.sum(tl.exp(x - new_highest), 0)
        highest = new_highest
    tl.store(log_totals_ptr + row, highest + tl.log(total))


@triton.jit
def _log_ratio(x, y, excess):
    """log(x / y), to full precision also where the excess of y over x is small beside them."""
    w = excess / (x + y)
    square = w * w
    near = -2.0 * w * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square / 7)))  # log((1 - w) / (1 + w))
    return tl.where(tl.abs(w) < 0.1, near, tl.log(x) - tl.log(y))


@triton.jit
def online_facts(
    student_ptr,
    teacher_ptr,
    facts_ptr,  # [9, C]: max and log(sum(exp(x - max))) of each, the latters' difference, both KLs, both entropies
    num_rows,
    num_vocab,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    student_ptr += row.to(tl.int64) * num_vocab
    teacher_ptr += row.to(tl.int64) * num_vocab
    max_s = FLOOR
    max_t = FLOOR
    # With e = exp(x - max): sums of e, of e * (x - max) and of e * (difference of the two centred logits). Where both
    # are sure of one token the two sums of e are 1 and little else: what the teacher's has more is summed by itself.
    sum_s = 0.0
    sum_t = 0.0
    excess_t = 0.0
    moment_s = 0.0
    moment_t = 0.0
    cross_s = 0.0
    cross_t = 0.0
    for start in range(0, num_vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load(student_ptr, columns, num_vocab, inverse_temperature)
        y = _load(teacher_ptr, columns, num_vocab, inverse_temperature)
        new_max_s = tl.maximum(max_s, tl.max(x, 0))
        new_max_t = tl.maximum(max_t, tl.max(y, 0))
        fall_s = max_s - new_max_s
        fall_t = max_t - new_max_t
        scale_s = tl.exp(fall_s)
        scale_t = tl.exp(fall_t)
        x -= new_max_s
        y -= new_max_t
        e = tl.exp(x)
        f = tl.exp(y)
        moment_s = scale_s * (moment_s + sum_s * fall_s) + tl.sum(e * x, 0)
        moment_t = scale_t * (moment_t + sum_t * fall_t) + tl.sum(f * y, 0)
        cross_s = scale_s * (cross_s + sum_s * (fall_s - fall_t)) + tl.sum(e * (x - y), 0)
        cross_t = scale_t * (cross_t + sum_t * (fall_t - fall_s)) + tl.sum(f * (y - x), 0)
        excess_t = scale_s * excess_t + (scale_t - scale_s) * sum_t + tl.sum(f - e, 0)
        sum_s = scale_s * sum_s + tl.sum(e, 0)
        sum_t = scale_t * sum_t + tl.sum(f, 0)
        max_s = new_max_s
        max_t = new_max_t
    log_s = tl.log(sum_s)
    log_t = tl.log(sum_t)
    log_ratio = _log_ratio(sum_s, sum_t, excess_t)
    facts_ptr += row
    tl.store(facts_ptr, max_s)
    tl.store(facts_ptr + num_rows, log_s)
    tl.store(facts_ptr + 2 * num_rows, max_t)
    tl.store(facts_ptr + 3 * num_rows, log_t)
    tl.store(facts_ptr + 4 * num_rows, log_ratio)
    tl.store(facts_ptr + 5 * num_rows, cross_s / sum_s - log_ratio)
    tl.store(facts_ptr + 6 * num_rows, cross_t / sum_t + log_ratio)
    tl.store(facts_ptr + 7 * num_rows, log_s - moment_s / sum_s)
    tl.store(facts_ptr + 8 * num_rows, log_t - moment_t / sum_t)


@triton.jit
def _log_share(ratio, alpha):
    """log x - log(alpha x + (1 - alpha) y) from the ratio log x - log y."""
    log_x = tl.log(alpha)
    log_y = tl.log(1.0 - alpha) - ratio
    return -(tl.maximum(log_x, log_y) + tl.log(1.0 + tl.exp(-tl.abs(log_x - log_y))))


NEAR = tl.constexpr(0.3)
"""So far from 0 the series below is exact in float32."""


@triton.jit
def _expm1_near(x):
    """exp(x) - 1 of a small x, to full precision."""
    return x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7))))))


@triton.jit
def _expm1(x):
    return tl.where(tl.abs(x) < NEAR, _expm1_near(x), tl.exp(x) - 1.0)


@triton.jit
def _row_facts(facts_ptr, num_rows):
    """max and log(sum(exp(x - max))) of each, and the latters' difference."""
    max_s = tl.load(facts_ptr)
    log_s = tl.load(facts_ptr + num_rows)
    max_t = tl.load(facts_ptr + 2 * num_rows)
    log_t = tl.load(facts_ptr + 3 * num_rows)
    return max_s, log_s, max_t, log_t, tl.load(facts_ptr + 4 * num_rows)


@triton.jit
def _slope(p, q, ratio, beta, KIND: tl.constexpr):
    """p * dD/dp up to the multiple of p that makes it 0 where p = q, as the functions in ``distill.divergence.KINDS``
    give it."""
    if KIND == "reverse_kl":
        slope = p * ratio
    elif KIND == "forward_kl":
        slope = tl.where(tl.abs(ratio) < NEAR, -p * _expm1_near(-ratio), p - q)
    elif KIND == "jsd":
        slope = (1.0 - beta) * p * _log_share(ratio, 1.0 - beta)
    elif KIND == "skew_forward_kl":
        slope = (beta - 1.0) * p * _expm1(_log_share(-ratio, beta))
    else:
        tl.static_assert(KIND == "skew_reverse_kl")
        share = _log_share(ratio, beta)
        slope = p * (share - beta * _expm1(share))
    return slope


@triton.jit
def mixture_sums(
    student_ptr,
    teacher_ptr,
    facts_ptr,
    sums_ptr,  # [2, C]: the values of the kind, and the slope's sum over the row
    num_rows,
    num_vocab,
    inverse_temperature,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    student_ptr += row.to(tl.int64) * num_vocab
    teacher_ptr += row.to(tl.int64) * num_vocab
    max_s, log_s, max_t, log_t, log_ratio = _row_facts(facts_ptr + row, num_rows)
    value = 0.0
    total = 0.0
    for start in range(0, num_vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load(student_ptr, columns, num_vocab, inverse_temperature) - max_s
        y = _load(teacher_ptr, columns, num_vocab, inverse_temperature) - max_t
        p = tl.exp(x - log_s)
        q = tl.exp(y - log_t)
        ratio = x - y - log_ratio
        slope = _slope(p, q, ratio, beta, KIND)
        total += tl.sum(slope, 0)
        if KIND == "jsd":
            value += tl.sum(slope + beta * q * _log_share(-ratio, beta), 0)
        elif KIND == "skew_forward_kl":
            value += tl.sum(q * _log_share(-ratio, beta), 0)
        else:
            value += tl.sum(p * _log_share(ratio, beta), 0)
    tl.store(sums_ptr + row, value)
    tl.store(sums_ptr + num_rows + row, total)


@triton.jit
def gradient(
    student_ptr,
    teacher_ptr,
    facts_ptr,
    total_ptr,  # [C]: the slope's sum over the row
    weights_ptr,  # [C]: weight over temperature
    gradient_ptr,  # [C, V]; may be the student's logits
    num_rows,
    num_vocab,
    inverse_temperature,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offset = row.to(tl.int64) * num_vocab
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    max_s, log_s, max_t, log_t, log_ratio = _row_facts(facts_ptr + row, num_rows)
    x = _load(student_ptr + offset, columns, num_vocab, inverse_temperature) - max_s
    y = _load(teacher_ptr + offset, columns, num_vocab, inverse_temperature) - max_t
    p = tl.exp(x - log_s)
    q = tl.exp(y - log_t)
    slope = _slope(p, q, x - y - log_ratio, beta, KIND) - p * tl.load(total_ptr + row)
    gradient = slope * tl.load(weights_ptr + row)
    tl.store(gradient_ptr + offset + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=columns < num_vocab)
