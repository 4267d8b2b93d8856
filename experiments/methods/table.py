"""Write docs/methods.md: each method with its functions and its tests.

  python experiments/methods/table.py

A test named ``test_mNN_...`` belongs to the method NN, one named
``test_mNN_to_mMM_...`` or ``test_mNN_mMM_...`` to each of them.
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'methods.md'

HEAD = """# Methods

Written by `python experiments/methods/table.py`; tests/test_methods_table.py
holds it to the tests that exist. The numbers are those in the names of the
tests.

| # | method | functions of `postrain` | tests |
| --- | --- | --- | --- |
"""
# Without a row: what has no function of its own in the mathematics.
LATER = {
  '31': 'the loop of GRPO',
  '36, 44': 'recipes whose parts are 8, 29 and 37 to 40',
  '79': 'reinforcement learning of a controller inside a frozen model',
  '81 to 84, 87 to 97, 99 to 101': 'staged pipelines and curricula',
  '104 to 106': 'search and its scaling',
  '108': 'the toy sort, which is the study experiments/sort',
}
METHODS = {
  1: ('likelihood of text', 'losses.negative_log_likelihood'),
  2: ('supervised fine-tuning', 'losses.negative_log_likelihood'),
  3: ('log-probs of sequences', 'logprobs.token_logprobs'),
  4: ('REINFORCE', 'losses.reinforce advantages.group_centered'
      ' advantages.max_only'),
  5: ('baselines', 'advantages.leave_one_out advantages.optimal_baseline'),
  6: ('GAE', 'advantages.gae advantages.whiten'),
  7: ('value loss', 'losses.squared_error losses.clipped_squared_error'),
  8: ('PPO', 'losses.ppo_clip'),
  9: ('aggregation', 'aggregation.token_mean aggregation.sequence_mean'
      ' aggregation.sequence_sum aggregation.constant_length'),
  10: ('Bradley–Terry', 'losses.bradley_terry losses.score_centering'
       ' reward_models.completion_objective'),
  11: ('score of the last token', 'losses.last_score'
       ' reward_models.completion_scores reward_models.token_scores'),
  12: ('rankings', 'losses.ranked_pairs losses.plackett_luce'),
  13: ('the regularised optimum', 'kl.k1 shaping.kl_penalized'),
  14: ('KL in the reward', 'shaping.kl_shaped shaping.kl_penalized'),
  15: ('KL controllers', 'kl.fixed_coef kl.adaptive_coef'),
  16: ('RLHF with a reference', 'shaping.kl_shaped values.token_values'
       ' critics.copied'),
  17: ('minibatches', 'losses.ppo_clip'),
  18: ('diagnostics of over-optimisation', 'reporting.rollout_figures'),
  19: ('RLAIF', 'losses.soft_preference losses.swap_averaged'
       ' soft_labels.mean_over_labels feedback.rule'
       ' feedback.language_model feedback.reward_model feedback.both_orders'),
  20: ('constitutional AI', 'feedback.constitution feedback.revised'),
  21: ('oversight', 'feedback.oversight.alone feedback.oversight.assisted'
       ' feedback.oversight.debate feedback.oversight.decomposed'),
  22: ('DPO and its family', 'losses.dpo losses.robust_dpo losses.f_dpo'
       ' losses.length_normalized_dpo losses.hinge losses.exo_pair losses.aot'
       ' losses.discopop losses.apo_zero losses.apo_down'),
  23: ('IPO', 'losses.ipo losses.length_normalized_ipo'),
  24: ('KTO', 'losses.kto losses.kto_reference_point'),
  25: ('ORPO', 'losses.orpo'),
  26: ('SimPO', 'losses.simpo losses.cpo'),
  27: ('online DPO', 'losses.dpo pairing.rewarded'),
  28: ('SPIN', 'losses.dpo pairing.demonstrations pairing.beside'),
  29: ('group advantage', 'advantages.group_normalized'
       ' advantages.batch_normalized'),
  30: ('GRPO', 'losses.ppo_clip aggregation.sequence_mean'),
  32: ('GRPO of steps', 'advantages.group_process'),
  33: ('bias of the deviation', 'advantages.group_normalized'),
  34: ('bias of the length', 'aggregation.sequence_mean'
       ' aggregation.constant_length'),
  35: ('Dr. GRPO', 'advantages.group_centered aggregation.constant_length'),
  37: ('clip-higher', 'losses.ppo_clip'),
  38: ('dynamic sampling', 'masks.informative_groups'),
  39: ('token-level loss', 'aggregation.token_mean'),
  40: ('overlong responses', 'shaping.soft_overlong masks.overlong'),
  41: ('price on length', 'shaping.length_penalty'),
  42: ('GSPO', 'losses.gspo losses.gspo_token importance.sequence_ratio'),
  43: ('CISPO', 'losses.cispo'),
  45: ('MiniRL', 'losses.minirl'),
  46: ('k1', 'kl.k1'),
  47: ('k2', 'kl.k2'),
  48: ('k3', 'kl.k3'),
  49: ('placement of the KL', 'kl.k1 kl.k2 kl.k3 shaping.kl_penalized'),
  50: ('weighted KL', 'kl.importance_weighted'),
  51: ('straight-through and exact KL', 'kl.straight_through kl.exact'),
  52: ('off-policy distillation', 'losses.forward_kl'),
  53: ('on-policy distillation', 'losses.reverse_kl losses.generalized_jsd'
       ' losses.sampled_reverse_kl losses.top_candidates'),
  54: ('forward against reverse', 'losses.forward_kl losses.reverse_kl'),
  55: ('KDRL', 'losses.sampled_reverse_kl kl.k2'),
  56: ('annealing', 'losses.annealed_coef'),
  57: ('reward-guided masking', 'masks.unsolved'),
  58: ('verified outcomes', 'rewards.accuracy'),
  59: ('format rewards', 'rewards.format_tags shaping.weighted_sum'),
  60: ('outcome reward model', 'losses.outcome_correctness'),
  61: ('process reward model', 'losses.step_correctness'
       ' losses.monte_carlo_labels losses.until_first_error'
       ' reward_models.step_ends reward_models.step_objective'
       ' step_labels.rollouts_after_steps labelling.label_steps'),
  62: ('aggregates of steps', 'losses.step_score'),
  63: ('difference rewards', 'shaping.difference_rewards'),
  64: ('language and mixtures', 'shaping.language_consistency'
       ' shaping.weighted_sum'),
  65: ('mismatch of engines', 'importance.truncated importance.masked'
       ' importance.decomposition importance.mismatch_metrics'),
  66: ('order of token ratios', 'importance.ratio importance.product_ratio'),
  67: ('variance of ratios', 'importance.product_ratio'
       ' importance.effective_sample_size'),
  68: ('off-policy sequences', 'masks.off_policy_sequences'),
  69: ('routing replay', 'models.moe.route scoring.score scoring.rerouted'),
  70: ('kept sampling sets', 'logprobs.kept_token_logprobs'),
  71: ('entropy', 'logprobs.token_entropy'),
  72: ('covariance law', 'logprobs.token_entropy'),
  73: ('Clip-Cov', 'masks.covariance'),
  74: ('KL-Cov', 'losses.kl_cov masks.top_covariance'),
  75: ('differential smoothing', 'advantages.differential_smoothing'),
  76: ('pass@k', 'evaluation.pass_at_k'),
  77: ('policies of inner layers', 'internals.layer_scores'
       ' internals.entropy_flow'),
  78: ('BuPO', 'internals.layer_policy'),
  80: ('probes', 'internals.layer_states internals.linear_probe'
       ' internals.probe_accuracy'),
  85: ('Kimi k1.5', 'losses.mirror_descent'),
  86: ('length reward', 'shaping.length_reward'),
  98: ('composite rewards', 'shaping.composite shaping.strict_composite'),
  102: ('best of n', 'evaluation.pass_at_k'),
  103: ('votes', 'evaluation.majority'),
  107: ('turns', 'advantages.gae'),
}  # fmt: skip


def numbers(name: str) -> list[int]:
  """Methods that a test's name holds."""
  found = re.match(r'test_m(\d+)_to_m(\d+)_', name)
  if found:
    return list(range(int(found[1]), int(found[2]) + 1))
  prefix = re.match(r'test((?:_m\d+)+)_', name)
  return [int(n) for n in re.findall(r'\d+', prefix[1])] if prefix else []


def tests() -> dict[int, list[tuple[str, str]]]:
  """(file, what it says) of every test of each method."""
  table = {}
  for path in sorted((ROOT / 'tests').glob('test_*.py')):
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
      if isinstance(node, ast.FunctionDef):
        what = re.sub(r'^test(_m\d+|_to(?=_m))+_', '', node.name)
        for number in numbers(node.name):
          table.setdefault(number, []).append((path.stem, what))
  return table


def page() -> str:
  """The whole page."""
  found, rows = tests(), []
  for number, (name, functions) in METHODS.items():
    of_file = {}
    for file, what in found.get(number, []):
      of_file.setdefault(file, []).append(what.replace('_', ' '))
    cell = '; '.join(
      f'`{file}`: {", ".join(each)}' for file, each in of_file.items()
    )
    code = ' '.join(f'`{function}`' for function in functions.split())
    rows.append(f'| {number} | {name} | {code} | {cell} |\n')
  later = ''.join(f'- {n}: {what}\n' for n, what in LATER.items())
  return (
    HEAD
    + ''.join(rows)
    + '\nNumbers without a row need a trainer, a model or a pipeline:\n\n'
    + later
  )


if __name__ == '__main__':
  PAGE.parent.mkdir(exist_ok=True)
  PAGE.write_text(page(), encoding='utf-8')
  sys.stdout.write(f'{PAGE.relative_to(ROOT)}: {len(METHODS)} methods\n')
