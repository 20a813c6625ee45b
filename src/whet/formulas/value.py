"""PPO's critic: rewards along an episode become advantages and returns, and values are regressed on returns.

The chain of an episode is that of its *trained* tokens. Observations (tool output, template text) are not in the
columns, so the state after an action is the one in which the next action token is chosen, and no reward or value of
anything else gets in. Advantages and returns are constants of the update and carry no gradient.

Legend: T trained tokens of one episode, N trained tokens of a whole batch of rollouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------- advantages, returns


def gae(rewards_T: Tensor, values_T: Tensor, *, gamma: float, lam: float, bootstrap: float = 0.0) -> Tensor:
    """A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t (Schulman 1506.02438 eq. 16).

    `values_T[t]` is the value of the state in which token t is chosen; `bootstrap` that of the state after the last:
    0 where the episode is over. An answer that was cut off may be given the value of its last state instead.
    """
    next_T = torch.cat([values_T[1:], values_T.new_tensor([bootstrap])])
    delta_T = rewards_T + gamma * next_T - values_T
    advantages, running = [], 0.0
    for delta in reversed(delta_T.tolist()):
        running = delta + gamma * lam * running
        advantages.append(running)
    return values_T.new_tensor(advantages[::-1])


def returns(rewards_T: Tensor, values_T: Tensor, *, gamma: float, lam: float, bootstrap: float = 0.0) -> Tensor:
    """What the values should have been: raw (never whitened) advantages plus values.

    With lam 1 it is the discounted sum of rewards, whatever the values (Monte Carlo). VC-PPO (2503.01491) takes
    lam 1 here and a smaller one for the policy's advantages.
    """
    return gae(rewards_T, values_T, gamma=gamma, lam=lam, bootstrap=bootstrap) + values_T


def length_adaptive_lambda(length: int, *, alpha: float) -> float:
    """1 - 1 / (alpha * length): the lambdas' geometric sum is about alpha * length (VAPO 2504.05118, alpha 0.05).

    At or below 0 for answers of up to 1 / alpha tokens; held to [0, 1], which the paper leaves open.
    """
    return min(max(1 - 1 / (alpha * length), 0.0), 1.0)


def turn_gae(
    rewards_T: Tensor, values_T: Tensor, turn_T: Tensor, *, gamma: float, lam: float, bootstrap: float = 0.0
) -> Tensor:
    """GAE with whole turns as actions; every token of a turn gets the turn's advantage (turn-PPO 2512.17008).

    `turn_T` numbers each token's turn from 0, ascending. A turn's reward is the sum over its tokens, its value that
    of its first token.
    """
    first_T = torch.cat([turn_T.new_ones(1), turn_T[1:] - turn_T[:-1]]) > 0
    turns = int(turn_T[-1]) + 1
    summed = rewards_T.new_zeros(turns).index_add(0, turn_T, rewards_T)
    return gae(summed, values_T[first_T], gamma=gamma, lam=lam, bootstrap=bootstrap)[turn_T]


# ---------------------------------------------------------------------------------------- the critic's own loss


def value_loss(value_T: Tensor, return_T: Tensor) -> Tensor:
    """1/2 (V - R)^2."""
    return (value_T - return_T).square() / 2


def clipped_value_loss(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, *, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2), as in OpenAI's PPO (baselines, lm-human-preferences).

    The maximum stops the gradient where V has moved more than c towards R, and only there.
    """
    near_T = old_value_T + (value_T - old_value_T).clamp(-clip, clip)
    return torch.maximum(value_loss(value_T, return_T), value_loss(near_T, return_T))


def value_clipped(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, *, clip: float) -> Tensor:
    """1 where the clip stops the value's gradient: |V - V_old| > c, and V is on the return's side."""
    moved_T = value_T - old_value_T
    near_T = old_value_T + moved_T.clamp(-clip, clip)
    stopped_T = (moved_T.abs() > clip) & ((near_T - return_T).abs() > (value_T - return_T).abs())
    return stopped_T.to(value_T.dtype)


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant; NaN where the returns do not vary."""
    variance = float(returns_N.var(correction=0))
    return 1 - float((returns_N - values_N).var(correction=0)) / variance if variance > 0 else float("nan")
