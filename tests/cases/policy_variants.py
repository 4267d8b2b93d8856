"""Losses that bound the policy otherwise than by PPO's clip."""

from cases.record import Case, case
from postrain import losses

POLICY = 'logprobs old_logprobs advantages mask'


def smooth(fn, names=POLICY, **options) -> Case:
  return case(fn, names, gradients='logprobs', **options)


def constant_weight(fn, names=POLICY, **options) -> Case:
  return smooth(fn, names, stopped='logprobs', **options)


def cases() -> list[Case]:
  minirl = 'logprobs old_logprobs sampler_logprobs advantages mask'
  found = []

  for limit in (20.0, 0.3):
    found += [
      smooth(losses.sequence_clip, max_log_ratio=limit),
      smooth(losses.kl_cov, f'{POLICY} selected', max_log_ratio=limit),
      smooth(losses.sapo, max_log_ratio=limit),
      smooth(losses.geometric_mean, max_log_ratio=limit),
      smooth(losses.dro, kl_coef=0.1, max_log_ratio=limit),
      smooth(losses.mirror_descent, kl_coef=0.3, max_log_ratio=limit),
      constant_weight(losses.minirl, minirl, max_log_ratio=limit),
      constant_weight(losses.dppo, max_log_ratio=limit),
      constant_weight(losses.vespo, max_log_ratio=limit),
    ]
  return [
    *found,
    smooth(losses.sequence_clip, clip_low=0.5, clip_high=1.5),
    smooth(losses.kl_cov, f'{POLICY} selected', kl_coef=0.1),
    smooth(losses.sapo, temperature_positive=0.5, temperature_negative=2.0),
    smooth(losses.geometric_mean, clip_low=0.1, clip_high=0.2),
    constant_weight(losses.minirl, minirl, clip_low=0.4, cap=1.2),
    constant_weight(losses.dppo, divergence='kl', clip_low=0.05, clip_high=0.1),
    constant_weight(losses.dppo, clip_low=0.02, clip_high=0.03, cap=1.1),
    constant_weight(losses.vespo, power_positive=1.0, rate_negative=0.5),
  ]
