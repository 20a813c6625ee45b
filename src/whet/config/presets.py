"""The named algorithms as data: for each, the axes in which it differs from `PolicyConfig`'s own defaults.

Numbers are the papers'. Where a paper states none, the released code's is taken, and the comment says so. A method
with a clip of its own gets four updates from each batch of rollouts (GSPO's setting): with one update the ratio is 1
and no clip ever acts. DAPO's paper makes 16, of a batch of 512 prompts; of the default 32 prompts that would leave two
for each update, and sixteen updates of a small batch did harm here (docs/log.md). Of a batch of hundreds, set
`minibatches: 16`.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (2402.03300): group mean and std, 1/|o| per sequence, k3 KL to the reference in the loss.
    "grpo": {"reduction": "sequence_mean", "kl": {"place": "loss", "coefficient": 0.04}},
    # DeepSeekMath (2402.03300), 4.1.3: the same with the grades of steps, normalised over all steps of the group.
    "grpo_ps": {"credit": "process", "reduction": "sequence_mean", "kl": {"place": "loss", "coefficient": 0.04}},
    # GDPO (2601.05242): each reward normalised in its group, their weighted sum over the std of the step (its mean is 0
    # as it is). The rest is GRPO as it is run today: no KL, token-level loss.
    "gdpo": {"objectives": "normalised", "scale": "batch_std"},
    # DAPO (2503.14476): clip-higher, token-level loss, dynamic sampling, no KL. The soft overlong punishment is a
    # reward (`kind: overlong`); overlong filtering is an option that the paper's best run left off.
    "dapo": {"clip": {"high": 0.28}, "dynamic_sampling": {"rounds": 10}, "minibatches": 4},
    # Dr. GRPO (2503.20783): no std, a constant length in the denominator.
    "dr_grpo": {"scale": "none", "reduction": "sequence_sum_over_constant"},
    # RLOO (2402.14740): the whole answer is one action, the others' mean is its baseline, KL in the reward.
    "rloo": {
        "baseline": "leave_one_out",
        "scale": "none",
        "ratio": {"level": "none"},
        "clip": {"kind": "none"},
        "kl": {"place": "reward", "coefficient": 0.03},
        "reduction": "sequence_sum",
    },
    # RLOO of turns: a turn is one action; its return to go less the mean of the others that came as far.
    "turn_rloo": {"credit": "turns", "baseline": "turn_leave_one_out", "scale": "none"},
    # GiGPO (2505.10978): group-relative advantages of whole answers, and of turns that began in the same state.
    "gigpo": {
        "credit": "turns",
        "baseline": "same_state",
        "turn_gamma": 0.95,
        "kl": {"place": "loss", "coefficient": 0.01},
        "reduction": "sequence_mean",
    },
    # ReMax (2310.10505): the reward of the greedy answer is the baseline. KL coefficient: its code's.
    "remax": {
        "baseline": "greedy",
        "scale": "none",
        "ratio": {"level": "none"},
        "clip": {"kind": "none"},
        "kl": {"place": "reward", "coefficient": 0.05},
        "reduction": "sequence_sum",
    },
    # REINFORCE++ (2501.03262): KL in the reward of each token, its return to go, whitened over the step's tokens.
    "reinforce_pp": {
        "credit": "return_to_go",
        "baseline": "none",
        "scale": "token_std",
        "kl": {"place": "reward", "coefficient": 0.01},
    },
    # REINFORCE++-baseline (2501.03262): the group's mean, whitened over the step's tokens, k2 KL in the loss.
    "reinforce_pp_baseline": {
        "scale": "token_std",
        "kl": {"place": "loss", "estimator": "k2", "coefficient": 0.01},
    },
    # GSPO (2507.18071): one ratio for the sequence, the geometric mean of its tokens' ratios; tiny bounds.
    "gspo": {
        "ratio": {"level": "sequence_mean"},
        "clip": {"low": 3e-4, "high": 4e-4},
        "reduction": "sequence_mean",
        "minibatches": 4,
    },
    # GSPO-token (2507.18071, section 4.3): that value, with each token's own gradient.
    "gspo_token": {
        "ratio": {"level": "sequence_mean_token"},
        "clip": {"low": 3e-4, "high": 4e-4},
        "reduction": "sequence_mean",
        "minibatches": 4,
    },
    # GMPO (2507.20673): tokens' log ratios clipped at 0.4 on one side, then their geometric mean.
    "gmpo": {"clip": {"kind": "geometric"}, "reduction": "sequence_mean", "minibatches": 4},
    # CISPO (MiniMax-M1, 2506.13585): the truncated ratio weighs log p. The cap is ScaleRL's (2510.13786).
    "cispo": {"clip": {"kind": "cispo"}, "minibatches": 4},
    # GPG (2504.02546): plain policy gradient, scaled up by the share of answers whose group has a signal.
    "gpg": {"scale": "informative_share", "ratio": {"level": "none"}, "clip": {"kind": "none"}},
    # SAPO (2511.20347): a sigmoid gate in place of the clip, steeper where the advantage is negative.
    "sapo": {"clip": {"kind": "sapo"}, "reduction": "sequence_mean", "minibatches": 4},
    # DPPO (2602.04879), binary total variation: bounds on the probability, against the sampler's. Bounds: those of
    # the recipes that run it in verl.
    "dppo": {"ratio": {"denominator": "sampler"}, "clip": {"kind": "dppo"}, "minibatches": 4},
    # Decoupled PPO (AReaL, 2505.24298): the clip is about the policy before the update, and a weight is for what
    # separates that from the policies that sampled; a token whose weight is above 5 is left out, as in AReaL's code
    # (`behav_imp_weight_cap`; there is no lower bound). No critic (gamma and lambda 1), advantages whitened.
    "decoupled_ppo": {
        "baseline": "none",
        "scale": "token_std",
        "correction": {"kind": "mask", "low": 0.0},
        "minibatches": 4,
    },
    # Lite PPO (2508.08221): the group's mean, the step's std, token-level loss.
    "lite_ppo": {"scale": "batch_std"},
    # OPO (2505.23585): exactly on-policy, the baseline that minimises variance under length-proportional gradients.
    "opo": {
        "baseline": "length_weighted_mean",
        "scale": "none",
        "ratio": {"level": "none"},
        "clip": {"kind": "none"},
        "reduction": "sequence_sum",
    },
    # DeepSeek-R1 (2501.12948), stage one as printed: ratio and KL of whole answers, no 1/|o|, epsilon 10, the
    # reference renewed every 400 steps, 16 mini-batches.
    "r1": {
        "ratio": {"level": "sequence_product"},
        "clip": {"low": 10.0, "high": 10.0},
        "kl": {"place": "loss", "level": "sequence", "coefficient": 0.001, "update_every": 400},
        "reduction": "sequence_mean",
        "minibatches": 16,
    },
    # Clip-Cov and KL-Cov (2505.22617): brakes on the few tokens whose probability and advantage go together most.
    "clip_cov": {"token_filter": {"kind": "covariance"}, "minibatches": 4},
    "kl_cov": {"clip": {"kind": "none"}, "kl_cov": {}, "minibatches": 4},
    # 80/20 (2506.01939): DAPO, with the gradient of the most uncertain fifth of the tokens only.
    "high_entropy": {
        "clip": {"high": 0.28},
        "dynamic_sampling": {"rounds": 10},
        "token_filter": {"kind": "high_entropy"},
        "minibatches": 4,
    },
    # PPO (1707.06347) for language models as in InstructGPT (2203.02155) and the N+ details (2403.17031): KL in the
    # reward of each token, GAE, whitened advantages, four updates from each batch.
    "ppo": {
        "credit": "gae",
        "critic": {},
        "baseline": "none",
        "scale": "token_std",
        "kl": {"place": "reward", "coefficient": 0.05},
        "minibatches": 4,
    },
    # VC-PPO (2503.01491): the critic is trained before the policy, and on Monte-Carlo returns.
    "vc_ppo": {
        "credit": "gae",
        "critic": {"lam_value": 1.0, "pretrain_steps": 50},
        "baseline": "none",
        "scale": "token_std",
        "minibatches": 4,
    },
    # VAPO (2504.05118): VC-PPO, lambda by length, clip-higher, and NLL on the answers that were right.
    "vapo": {
        "credit": "gae",
        "critic": {"lam_value": 1.0, "length_alpha": 0.05, "pretrain_steps": 50},
        "baseline": "none",
        "scale": "token_std",
        "clip": {"high": 0.28},
        "positive_nll": {},
        "minibatches": 4,
    },
}
