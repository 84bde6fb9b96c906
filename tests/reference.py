"""The papers' equations as slow loops over one row, in plain Python floats: what the batched code is held against.

Written from the documents (MA-RLHF, arXiv 2410.02743; ABC, 2402.00782; RED, 2411.08302; GAE, 1506.02438), not from the
code. A row is a list of its valid tokens only: there is no padding here, and no mask.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby


@dataclass(frozen=True, kw_only=True)
class Row:
    """One response of n tokens; `prefix_scores` has n + 1 entries, the bare prompt first."""

    old_logprobs: list[float]
    ref_logprobs: list[float]
    values: list[float]
    score: float
    attention: list[float]
    policy_attention: list[float]
    prefix_scores: list[float]
    error_tokens: list[bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """One choice on each axis; `termination` and `redistribution` are (name, arguments ...)."""

    termination: tuple
    redistribution: tuple
    macro_value: str = "equal"
    macro_reward: str = "sum"
    gamma: float = 1.0
    lam: float = 0.95
    per: str = "action"
    kl_coef: float = 0.05
    score_clamp: float | None = None
    last_token_apart: bool = False


@dataclass(frozen=True, kw_only=True)
class RowCredit:
    """What assign_credit gives, for one row."""

    token_level_scores: list[float]
    token_level_rewards: list[float]
    macro_ids: list[int]
    advantages: list[float]
    returns: list[float]


# Segmentation: ma-rlhf.md section 1.4.


def ids_of_lengths(lengths: Sequence[int], tokens: int) -> list[int]:
    """Number actions of the given lengths; what they leave over is one more action, what exceeds the row is cut."""
    ids: list[int] = []
    for action, length in enumerate(lengths):
        for _ in range(length):
            if len(ids) < tokens:
                ids.append(action)
    rest = ids[-1] + 1 if ids else 0
    while len(ids) < tokens:
        ids.append(rest)
    return ids


def fixed_ngram(tokens: int, n: int) -> list[int]:
    """Every n tokens; the rest is a shorter last action."""
    return [t // n for t in range(tokens)]


def perplexity(ref_logprobs: list[float], variant: str) -> list[int]:
    """A new action where the token's surprise exceeds the last one's, or the mean over the current action."""
    ids: list[int] = []
    current: list[float] = []
    for logprob in ref_logprobs:
        surprise = -logprob
        if not current:
            ids.append(0)
        elif surprise > (current[-1] if variant == "token" else math.fsum(current) / len(current)):
            ids.append(ids[-1] + 1)
            current = []
        else:
            ids.append(ids[-1])
        current.append(surprise)
    return ids


Nested = int | tuple["Nested", ...]
"""A parse tree: a leaf is the number of tokens of its word."""


def parse(trees: Sequence[Nested], cutoff: int) -> list[int]:
    """Sizes of the actions: one word extends the last one, fewer tokens than the cutoff are one, other nodes divide.

    Each tree begins anew; a node without tokens changes nothing.
    """
    actions: list[int] = []

    def leaves(node: Nested) -> list[int]:
        return [node] if isinstance(node, int) else [leaf for child in node for leaf in leaves(child)]

    def visit(node: Nested, begins: bool) -> bool:
        """Return whether the next token begins an action."""
        words = leaves(node)
        if sum(words) == 0:
            return begins
        if len(words) == 1:
            if begins:
                actions.append(0)
            actions[-1] += words[0]
        elif sum(words) < cutoff:
            actions.append(sum(words))
        else:
            assert not isinstance(node, int)
            for child in node:
                begins = visit(child, begins)
        return False

    for tree in trees:
        visit(tree, begins=True)
    return actions


def by_threshold(unsure: Sequence[bool]) -> list[int]:
    """Begin an action at every token that was drawn unsurely: Entropy, LowProbability."""
    ids: list[int] = []
    for t, opens in enumerate(unsure):
        ids.append(0 if t == 0 else ids[-1] + opens)
    return ids


def apart(ids: list[int]) -> list[int]:
    """Make the last token an action of its own, if it is not one."""
    if len(ids) > 1 and ids[-1] == ids[-2]:
        return [*ids[:-1], ids[-1] + 1]
    return ids


def macro_ids(row: Row, options: Options) -> list[int]:
    """Number the actions of a row."""
    name, *arguments = options.termination
    tokens = len(row.values)
    if name == "every":
        ids = list(range(tokens))
    elif name == "whole":
        ids = [0] * tokens
    elif name == "fixed":
        ids = fixed_ngram(tokens, *arguments)
    elif name == "lengths":
        ids = ids_of_lengths(arguments[0], tokens)
    else:
        ids = perplexity(row.ref_logprobs, *arguments)
    return apart(ids) if options.last_token_apart else ids


def sizes(ids: Sequence[int]) -> list[int]:
    """Count the tokens of each action."""
    return [len(list(group)) for _, group in groupby(ids)]


def official_sizes(tokens: int, n: int) -> list[int]:
    """Sizes as released: the last token is apart, and where the others divide evenly an empty step comes before it."""
    before = [n] * ((tokens - 1) // n)
    return [*before, (tokens - 1) % n, 1]


# Redistribution: abc.md sections 1 and 3, conditions C1 and C2 of section 4.


def redistribute(row: Row, options: Options, steps: list[int]) -> list[float]:
    """Place the score; steps[t] is the step of discounting in which token t is paid."""
    name, *arguments = options.redistribution
    bound = math.inf if options.score_clamp is None else options.score_clamp
    score = min(max(row.score, -bound), bound)
    last = len(steps) - 1
    if name == "terminal":
        return [score if t == last else 0.0 for t in range(len(steps))]
    if name == "prefix":
        opinions = [min(max(p, -bound), bound) for p in row.prefix_scores]
        return prefix_difference(opinions, score, *arguments, gamma=options.gamma, steps=steps)
    if name == "mixture":
        placed = [
            (weight, redistribute(row, replace(options, redistribution=part), steps)) for weight, part in arguments
        ]
        return [math.fsum(weight * part[t] for weight, part in placed) for t in range(len(steps))]
    beta = arguments[0]
    if name == "uniform":
        alpha = [1.0 / max(len(steps), 1)] * len(steps)
    elif name == "error":
        alpha = normalised([float(blamed) for blamed in row.error_tokens])
    elif name == "policy":
        shifted = [0.0, *row.policy_attention[:-1]][: len(steps)]
        alpha = normalised(shifted if arguments[2] else row.policy_attention)
    else:
        alpha = normalised(row.attention)
    return [
        beta * options.gamma ** (steps[last] - steps[t]) * alpha[t] * score + (1 - beta) * score * (t == last)
        for t in range(len(steps))
    ]


def normalised(attention: list[float]) -> list[float]:
    """Make the weights sum to 1; without any mass, or a finite one, all of it goes to the last token."""
    mass = math.fsum(attention) if all(map(math.isfinite, attention)) else 0.0
    if mass > 0:
        return [a / mass for a in attention]
    return [float(t == len(attention) - 1) for t in range(len(attention))]


# Attention: abc.md sections 2 and 9. Maps are lists of rows, one a query.


def attention_map(
    queries: list[list[float]],
    keys: list[list[float]],
    *,
    scaling: float,
    sees: Callable[[int, int], bool],
    softcap: float | None = None,
    sink: float | None = None,
) -> list[list[float]]:
    """One head's softmax over the keys that each query sees; a sink takes mass and gives it to no key."""
    rows = []
    for q, query in enumerate(queries):
        weights = []
        for k, key in enumerate(keys):
            score = scaling * math.fsum(x * y for x, y in zip(query, key, strict=True))
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            weights.append(math.exp(score) if sees(q, k) else 0.0)
        mass = math.fsum(weights) + (0.0 if sink is None else math.exp(sink))
        rows.append([w / mass if mass > 0 else 0.0 for w in weights])
    return rows


def mean_map(maps: list[list[list[float]]]) -> list[list[float]]:
    """The mean over heads."""
    return [[math.fsum(xs) / len(xs) for xs in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]


def column_means(rows: list[list[float]], counted: list[int], sees: Callable[[int, int], bool]) -> list[float]:
    """The mean of each column over the counted rows that see it; 0 where none does."""
    means = []
    for k in range(len(rows[0])):
        seeing = [rows[q][k] for q in counted if sees(q, k)]
        means.append(math.fsum(seeing) / len(seeing) if seeing else 0.0)
    return means


def official_abc_d(rows: list[list[float]], mode: str) -> list[float]:
    """Weights as released, of the n - 1 rows of generation (q + 1 columns in row q): one too far, zeros not counted."""
    tokens = len(rows) + 1
    weights = [0.0] * tokens
    for j in range(tokens - 1):
        seen = [row[j] for row in rows if len(row) > j and row[j] != 0.0]
        value = math.fsum(seen) / len(seen) if seen else 0.0
        weights[j + 1] = value if mode == "mean" else rows[-1][j]
    return weights


def prefix_difference(
    opinions: list[float], score: float, beta: float, from_prompt: bool, *, gamma: float, steps: list[int]
) -> list[float]:
    """The score at the end plus shaping by Phi = beta * opinion of the prefix, Phi = 0 after the end."""
    potential = [beta * opinion for opinion in opinions]
    if not from_prompt:
        potential[0] = 0.0
    placed = []
    for t in range(len(steps)):
        ends = t == len(steps) - 1
        after = 0.0 if ends else gamma ** (steps[t + 1] - steps[t]) * potential[t + 1]
        placed.append(after - potential[t] + (score if ends else 0.0))
    return placed


# Pooling, GAE: ma-rlhf.md sections 1.3 and 1.5.


def pooling(m: int, kind: str) -> list[float]:
    """Weights of the values in an action of m tokens."""
    if kind == "equal":
        return [1 / m] * m
    if kind == "unit":
        return [0.0] * (m - 1) + [1.0]
    rising = [1 / (m - i) for i in range(m)]
    weights = [w / math.fsum(rising) for w in rising]
    return weights if kind == "position" else weights[::-1]


def gae(
    rewards: list[float], values: list[float], gammas: list[float], lams: list[float]
) -> tuple[list[float], list[float]]:
    """Run the recursion backwards; the value after the last step is 0."""
    advantages = [0.0] * len(rewards)
    following_value, following_advantage = 0.0, 0.0
    for k in reversed(range(len(rewards))):
        delta = rewards[k] + gammas[k] * following_value - values[k]
        advantages[k] = delta + gammas[k] * lams[k] * following_advantage
        following_value, following_advantage = values[k], advantages[k]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def assign_credit(row: Row, options: Options) -> RowCredit:
    """All the steps, in order, for one row."""
    ids = macro_ids(row, options)
    per_token = options.per == "token"
    scores = redistribute(row, options, list(range(len(ids))) if per_token else ids)
    kl = [old - ref for old, ref in zip(row.old_logprobs, row.ref_logprobs, strict=True)]
    rewards = [s - options.kl_coef * k for s, k in zip(scores, kl, strict=True)]
    macro_rewards, macro_values, lengths = [], [], sizes(ids)
    first = 0
    for m in lengths:
        sigma = pooling(m, options.macro_value)
        weights = sigma if options.macro_reward == "mean" else [1.0] * m
        inside = [options.gamma**i if per_token else 1.0 for i in range(m)]
        macro_rewards.append(sum(weights[i] * inside[i] * rewards[first + i] for i in range(m)))
        macro_values.append(sum(sigma[i] * row.values[first + i] for i in range(m)))
        first += m
    exponents = lengths if per_token else [1] * len(lengths)
    gammas, lams = [options.gamma**e for e in exponents], [options.lam**e for e in exponents]
    advantages, returns = gae(macro_rewards, macro_values, gammas, lams)
    return RowCredit(
        token_level_scores=scores,
        token_level_rewards=rewards,
        macro_ids=ids,
        advantages=[advantages[k] for k in ids],
        returns=[returns[k] for k in ids],
    )


def whiten(rows: list[list[float]]) -> list[list[float]]:
    """Mean 0 and variance 1 (with Bessel's correction) over all tokens of all rows."""
    every = [x for row in rows for x in row]
    mean = math.fsum(every) / max(len(every), 1)
    variance = math.fsum((x - mean) ** 2 for x in every) / max(len(every) - 1, 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


# Losses: ma-rlhf.md sections 1.6 and 1.7. Each argument is a list of rows.


def policy_loss(
    logprobs: list[list[float]],
    old_logprobs: list[list[float]],
    advantages: list[list[float]],
    ids: list[list[int]],
    *,
    cliprange: float,
    ratio: str,
) -> float:
    """Sum the clipped losses over tokens, or over actions, and divide by their number."""
    losses = []
    for new_row, old_row, advantage_row, id_row in zip(logprobs, old_logprobs, advantages, ids, strict=True):
        first = 0
        for m in [1] * len(id_row) if ratio == "token" else sizes(id_row):
            log_ratio = sum(new_row[t] - old_row[t] for t in range(first, first + m))
            r = math.exp(log_ratio / m if ratio == "macro_mean" else log_ratio)
            clipped = min(max(r, 1 - cliprange), 1 + cliprange)
            losses.append(max(-advantage_row[first] * r, -advantage_row[first] * clipped))
            first += m
    return math.fsum(losses) / max(len(losses), 1)


def value_loss(
    values: list[list[float]], old_values: list[list[float]], returns: list[list[float]], *, cliprange_value: float
) -> float:
    """Half the mean over tokens of the larger of the two squares."""
    losses = []
    for new_row, old_row, return_row in zip(values, old_values, returns, strict=True):
        for v, old, target in zip(new_row, old_row, return_row, strict=True):
            clipped = min(max(v, old - cliprange_value), old + cliprange_value)
            losses.append(max((v - target) ** 2, (clipped - target) ** 2))
    return 0.5 * math.fsum(losses) / max(len(losses), 1)


# Estimators without a critic, and lambda between boundaries: related.md sections 2 to 4. A batch is a list of rows.


def boundary_gae(
    rewards: list[float], values: list[float], ids: list[int], *, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """GAE over tokens with lambda 1 but on the tokens that close an action."""
    lams = [lam if t + 1 == len(ids) or ids[t + 1] != ids[t] else 1.0 for t in range(len(ids))]
    return gae(rewards, values, [gamma] * len(ids), lams)


def group_advantages(name: str, totals: list[float | None], g: int) -> list[float]:
    """Compare each response with its group; None stands for one that has no tokens, and does not count."""
    advantages = []
    for i, total in enumerate(totals):
        group = [x for x in totals[i - i % g : i - i % g + g] if x is not None]
        if total is None or len(group) < 2:
            advantages.append(0.0)
            continue
        mean = math.fsum(group) / len(group)
        if name == "rloo":
            others = (math.fsum(group) - total) / (len(group) - 1)
            advantages.append(total - others)
        elif name == "grpo":
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (len(group) - 1))
            advantages.append((total - mean) / (std + 1e-6))
        else:
            advantages.append(total - mean)
    return advantages


def reward_to_go(rewards: list[float], ids: list[int], gamma: float, *, per: str) -> list[float]:
    """What is still earned from each token's action on, discounted by actions or by tokens, from the action's start."""
    firsts = [ids.index(k) for k in ids]
    clock = ids if per == "action" else list(range(len(ids)))
    return [
        math.fsum(gamma ** (clock[s] - clock[first]) * rewards[s] for s in range(first, len(ids))) for first in firsts
    ]


def token_weights(shares: list[float], beta: float, ids: list[int]) -> list[float]:
    """Weights of mean 1 from shares that are not negative, averaged over actions; 1 where only the end has a share."""
    n = len(ids)
    if not any(shares[:-1]):
        return [1.0] * n
    spread = [(1 - beta) + beta * n * share / math.fsum(shares) for share in shares]
    means = {k: math.fsum(w for w, j in zip(spread, ids, strict=True) if j == k) / ids.count(k) for k in set(ids)}
    return [means[k] for k in ids]


# Losses with any pooling, clipping and aggregation, with their gradients; and those of three papers on their own.

Losses = tuple[float, list[list[float]]]


def policy_loss_and_gradient(
    logprobs: list[list[float]],
    old_logprobs: list[list[float]],
    advantages: list[list[float]],
    ids: list[list[int]],
    *,
    ratio: str,
    clip: str,
    low: float,
    high: float,
    aggregation: str,
    longest: int,
) -> Losses:
    """Every token carries the loss of its step, at a weight; the gradient is written out by hand."""
    total, gradients = 0.0, []
    for new, old, gains, actions in zip(logprobs, old_logprobs, advantages, ids, strict=True):
        gradient = [0.0] * len(new)
        steps = [[t] for t in range(len(new))]
        if ratio != "token":
            steps = [[t for t in range(len(new)) if actions[t] == k] for k in sorted(set(actions))]
        for step in steps:
            gain = gains[step[0]]
            pool = len(step) if ratio == "macro_mean" else 1
            free, moves = [new[t] - old[t] for t in step], [1.0] * len(step)
            if clip == "token":
                moves = [float(not ((gain > 0 and x > high) or (gain < 0 and x < -low))) for x in free]
                free = [min(x, high) if gain > 0 else max(x, -low) if gain < 0 else x for x in free]
            r = math.exp(math.fsum(free) / pool)
            loss, slope = -gain * r, -gain * r / pool
            if clip == "pooled":
                clipped = min(max(r, 1 - low), 1 + high)
                if -gain * clipped > loss:
                    loss, slope = -gain * clipped, 0.0
            weight = math.fsum(token_weight(aggregation, t, actions) for t in step)
            total += weight * loss
            for t, moves_on in zip(step, moves, strict=True):
                gradient[t] = weight * slope * moves_on
        gradients.append(gradient)
    whole = {
        "token_mean": sum(map(len, ids)),
        "action_mean": sum(len(set(actions)) for actions in ids),
        "sequence_mean": sum(bool(actions) for actions in ids),
        "constant": sum(bool(actions) for actions in ids) * longest,
    }[aggregation]
    return total / max(whole, 1), [[x / max(whole, 1) for x in row] for row in gradients]


def token_weight(aggregation: str, t: int, actions: list[int]) -> float:
    """What a token weighs in a row before the whole is divided."""
    if aggregation == "action_mean":
        return 1 / actions.count(actions[t])
    return 1 / len(actions) if aggregation == "sequence_mean" else 1.0


def ppo(new: list[list[float]], old: list[list[float]], gains: list[list[float]], *, epsilon: float) -> Losses:
    """PPO, equation 7 of 1707.06347, as a mean over all tokens."""
    tokens = sum(map(len, new))
    total, gradients = 0.0, []
    for row in range(len(new)):
        gradient = []
        for x, y, gain in zip(new[row], old[row], gains[row], strict=True):
            r = math.exp(x - y)
            surrogate = min(r * gain, max(1 - epsilon, min(1 + epsilon, r)) * gain)
            total -= surrogate
            gradient.append(-gain * r / tokens if surrogate == r * gain else 0.0)
        gradients.append(gradient)
    return total / tokens, gradients


def gspo(new: list[list[float]], old: list[list[float]], gains: list[float], *, low: float, high: float) -> Losses:
    """GSPO, equations 5 to 10 of 2507.18071: s_i = (pi / pi_old)^(1 / |y_i|), one advantage a response."""
    total, gradients = 0.0, []
    for x, y, gain in zip(new, old, gains, strict=True):
        s = math.exp(sum(a - b for a, b in zip(x, y, strict=True)) / len(x))
        surrogate = min(s * gain, max(1 - low, min(1 + high, s)) * gain)
        total -= surrogate / len(new)
        inside = surrogate == s * gain
        gradients.append([-s * gain / len(x) / len(new) if inside else 0.0 for _ in x])
    return total, gradients


def gmpo(new: list[list[float]], old: list[list[float]], gains: list[float], *, low: float, high: float) -> Losses:
    """GMPO, equation 4 of 2507.20673: the geometric mean of token ratios, each of them clipped by its own min.

    Its prod_t min(r_t^sgn, clip(r_t, e^-low, e^high)^sgn)^sgn, to the power 1 / n, times the advantage.
    """
    total, gradients = 0.0, []
    for x, y, gain in zip(new, old, gains, strict=True):
        n, product, inside = len(x), 1.0, []
        for a, b in zip(x, y, strict=True):
            r = math.exp(a - b)
            clipped = max(math.exp(-low), min(math.exp(high), r))
            kept = min(r, clipped) if gain > 0 else max(r, clipped)
            inside.append(kept == r)
            product *= kept ** (1 / n)
        total -= gain * product / len(new)
        gradients.append([-gain * product / n / len(new) if moves else 0.0 for moves in inside])
    return total, gradients
