"""The formula that others have for each loss, and inputs of their shapes."""

import numpy as np

from benchmarks.formulas import distillation, policy, preference, rewards

ROWS = policy.ROWS | distillation.ROWS | preference.ROWS | rewards.ROWS

# Public names of `postrain.losses` that have no value and gradient to time.
NO_LOSS = {
  'annealed_coef': 'a coefficient, one number',
  'expert_shares': 'constants of `load_balance`, no gradient',
  'implicit_reward': 'a piece of `f_dpo`, timed there',
  'kto_reference_point': 'a constant of `kto`, no gradient',
  'last_score': 'a reading of scores',
  'monte_carlo_labels': 'labels, no gradient',
  'step_score': 'a reading of scores',
  'swap_averaged': 'labels, no gradient',
  'top_candidates': 'shortens the logits of a divergence',
  'until_first_error': 'a mask',
}


def inputs(rows: int, length: int, vocab: int) -> dict[str, np.ndarray]:
  """Arrays by name: [rows, length], [256 rows], [rows / 4, 32, vocab]."""
  draw = np.random.default_rng(0)

  def noise(*shape: int) -> np.ndarray:
    return draw.standard_normal(shape).astype(np.float32)

  def chance(*shape: int) -> np.ndarray:
    return draw.random(shape, np.float32)

  shape, pairs, groups = (rows, length), rows * 256, (rows * 32, 8)
  logprobs = -np.abs(noise(*shape))
  # Off 0 on average, so that no sum cancels and the check means something.
  advantages = noise(*shape) + np.float32(0.5)
  x = dict(
    logprobs=logprobs,
    old_logprobs=np.minimum(logprobs + 0.1 * noise(*shape), 0),
    sampler_logprobs=np.minimum(logprobs + 0.1 * noise(*shape), 0),
    advantages=advantages,
    mask=draw.random(shape) < 0.8,
    selected=draw.random(shape) < 0.01,
    values=noise(*shape),
    old_values=noise(*shape),
    returns=noise(*shape),
    scores=noise(*shape),
    labels=chance(*shape),
    logits=noise(rows // 4, 32, vocab),
    teacher_logits=noise(rows // 4, 32, vocab),
    chosen_scores=noise(pairs),
    rejected_scores=noise(pairs),
    margins=chance(pairs),
    preference=chance(pairs),
    desirable=draw.random(pairs) < 0.5,
    reference_point=np.float32(0.5),
    group_scores=noise(*groups),
    ranks=draw.permuted(
      np.tile(np.arange(8, dtype=np.int32), (groups[0], 1)), axis=1
    ),
  )
  x['router_logits'] = noise(*shape, 8)
  x['experts'] = draw.integers(0, 8, (*shape, 2), dtype=np.int32)
  x['shares'] = draw.dirichlet(np.ones(8)).astype(np.float32)
  for side in ('chosen', 'rejected'):
    lengths = draw.integers(16, 512, pairs, dtype=np.int32)
    sums = -lengths * (0.1 + chance(pairs))
    x[f'{side}_lengths'], x[side] = lengths, np.float32(sums)
    x[f'ref_{side}'] = np.float32(sums + 3 * noise(pairs))
  return x
