"""Published algorithms, and what popular trainers compute under their names.

`PRESETS[algorithm][source]` fixes every axis on which the sources differ:
``paper``, or a trainer's defaults (``trl`` 1.16, ``verl`` 0.9.1, ``tunix``
0.1.7), so that who moves from another stack gets its numbers and sees what
differs. In a config, after the sampling limit is set:

  presets.apply(config, 'dapo/verl')

Those of preferences stand in `PREFERENCES`: a loss of `postrain.objectives`
(``preference``, of KTO ``unpaired``) and a term that imitates the chosen.

What a preset does not name (the reference, dynamic sampling) it leaves alone.
`docs/presets.md` is this table, and a test holds losses and gradients against
those of the trainers.
"""

from ml_collections import ConfigDict

Block = dict[str, object]


def group(eps: float = 1e-6, ddof: int = 0) -> Block:
  return dict(name='group_normalized', eps=eps, ddof=ddof)


def clip(low: float = 0.2, high: float = 0.2, **more: object) -> Block:
  return dict(name='ppo_clip', clip_low=low, clip_high=high, **more)


def loss_kl(name: str, coef: float) -> Block:
  return dict(estimator=dict(name=name), loss_coef=coef, reward_coef=None)


def reward_kl(name: str, coef: float) -> Block:
  return dict(estimator=dict(name=name), loss_coef=None, reward_coef=coef)


NO_KL = dict(loss_coef=None, reward_coef=None)
CENTERED = dict(name='group_centered')
LEAVE_ONE_OUT = dict(name='leave_one_out')
TRL, VERL = group(1e-4, ddof=1), group(1e-6, ddof=1)
UNLIMITED = dict(max_log_ratio=None)
DUAL = dict(dual_clip=3.0)  # on by default in verl
TOKENS = dict(name='token_mean')
SEQUENCES = dict(name='sequence_mean')
ALL_SEQUENCES = dict(name='sequence_mean', count_empty=True)
SUMS = dict(name='sequence_sum')
COVARIANCE = dict(name='covariance', fraction=2e-4, low=1.0, high=5.0)
# Dr. GRPO divides by the limit of new tokens, which `apply` fills in.
CONSTANT = dict(name='constant_length', length=None)
ALL_CONSTANT = dict(name='constant_length', length=None, count_empty=True)


def choices(
  advantage: Block,
  loss: Block,
  aggregation: Block,
  kl: Block = NO_KL,
  selection: Block | None = None,
) -> Block:
  return dict(
    advantage=advantage,
    loss=loss,
    aggregation=aggregation,
    selection=selection,
    kl=kl,
  )


def top_covariance(fraction: float) -> Block:
  return dict(name='top_covariance', fraction=fraction)


def plus_plus(baseline: bool = False, ddof: int = 1) -> Block:
  name = 'reinforce_plus_plus' + ('_baseline' if baseline else '')
  return dict(name=name, eps=1e-8, ddof=ddof)


GSPO = dict(clip_low=3e-4, clip_high=4e-4)
PRESETS: dict[str, dict[str, Block]] = {
  'grpo': dict(
    paper=choices(group(), clip(), SEQUENCES, loss_kl('k3', 0.04)),
    trl=choices(TRL, clip(**UNLIMITED), TOKENS),
    verl=choices(VERL, clip(**DUAL), TOKENS),
    # k1 in the loss: its expected gradient is 0, and the trainer refuses it.
    tunix=choices(VERL, clip(), SEQUENCES, loss_kl('k1', 0.04)),
  ),
  'dr_grpo': dict(
    paper=choices(CENTERED, clip(), CONSTANT),
    trl=choices(CENTERED, clip(**UNLIMITED), ALL_CONSTANT),
    verl=choices(CENTERED, clip(**DUAL), CONSTANT),
  ),
  'dapo': dict(
    paper=choices(
      group(), clip(high=0.28), dict(name='group_token_mean')
    ),
    trl=choices(TRL, clip(high=0.28, **UNLIMITED), TOKENS),
    verl=choices(VERL, clip(high=0.28, dual_clip=10.0), TOKENS),
  ),
  'rloo': dict(
    paper=choices(
      LEAVE_ONE_OUT, dict(name='reinforce'), SUMS, reward_kl('k1', 0.05)
    ),
    trl=choices(
      LEAVE_ONE_OUT, dict(name='sequence_clip', **UNLIMITED), ALL_SEQUENCES,
      reward_kl('k1', 0.05),
    ),
    verl=choices(LEAVE_ONE_OUT, clip(**DUAL), TOKENS),
  ),
  'gspo': dict(
    paper=choices(group(), dict(name='gspo', **GSPO), SEQUENCES),
    trl=choices(TRL, dict(name='gspo', **GSPO, **UNLIMITED), TOKENS),
    verl=choices(
      VERL, dict(name='gspo_token', **GSPO, max_log_ratio=10.0), TOKENS
    ),
  ),
  'cispo': dict(
    paper=choices(group(), dict(name='cispo', clip_high=4.0), TOKENS),
    trl=choices(TRL, dict(name='cispo', cap=5.0, **UNLIMITED), TOKENS),
    verl=choices(
      VERL, dict(name='cispo', clip_low=10.0, clip_high=0.2), TOKENS
    ),
  ),
  'sapo': dict(
    paper=choices(group(), dict(name='sapo'), SEQUENCES),
    trl=choices(TRL, dict(name='sapo', **UNLIMITED), ALL_SEQUENCES),
    verl=choices(VERL, dict(name='sapo'), SEQUENCES),
  ),
  'gmpo': dict(
    paper=choices(group(), dict(name='geometric_mean'), SEQUENCES),
  ),
  'dppo': dict(
    verl=choices(
      VERL, dict(name='dppo', divergence='tv', clip_low=0.2, clip_high=0.2),
      TOKENS,
    ),
  ),
  'minirl': dict(
    paper=choices(CENTERED, dict(name='minirl'), SUMS),
  ),
  'opo': dict(
    paper=choices(dict(name='optimal_baseline'), clip(), TOKENS),
    verl=choices(
      dict(name='optimal_baseline', singleton='raw'), clip(**DUAL), TOKENS
    ),
  ),
  'mirror_descent': dict(
    paper=choices(
      CENTERED, dict(name='mirror_descent', kl_coef=1.0), SEQUENCES
    ),
  ),
  'remax': dict(
    paper=choices(dict(name='remax'), dict(name='reinforce'), SUMS),
    verl=choices(dict(name='remax'), clip(**DUAL), TOKENS),
  ),
  'gpg': dict(
    paper=choices(dict(name='gpg'), dict(name='reinforce'), TOKENS),
    verl=choices(
      dict(name='gpg', counted='nonzero', singleton='raw'),
      dict(name='reinforce'), TOKENS,
    ),
  ),
  'reinforce_plus_plus': dict(
    paper=choices(plus_plus(ddof=0), clip(), TOKENS, reward_kl('k1', 0.01)),
    verl=choices(plus_plus(), clip(**DUAL), TOKENS),
  ),
  'reinforce_plus_plus_baseline': dict(
    paper=choices(
      plus_plus(True, ddof=0), clip(), TOKENS, loss_kl('k2', 1e-3)
    ),
    verl=choices(plus_plus(True), clip(**DUAL), TOKENS),
  ),
  'gdpo': dict(
    paper=choices(dict(name='gdpo', eps=1e-6, ddof=0), clip(), SEQUENCES),
    trl=choices(
      dict(name='gdpo', eps=1e-4, ddof=1), clip(**UNLIMITED), TOKENS
    ),
  ),
  'clip_cov': dict(
    paper=choices(
      group(), clip(1.0, 1.0), TOKENS,
      selection=dict(**COVARIANCE, clip_low=1.0, clip_high=1.0),
    ),
    verl=choices(
      VERL, clip(**UNLIMITED), TOKENS,
      selection=dict(**COVARIANCE, clip_low=0.2, clip_high=0.2),
    ),
  ),
  'kl_cov': dict(
    paper=choices(
      group(), dict(name='kl_cov', kl_coef=1.0), TOKENS,
      selection=top_covariance(2e-3),
    ),
    verl=choices(
      VERL, dict(name='kl_cov', kl_coef=0.1, **UNLIMITED), TOKENS,
      selection=top_covariance(2e-4),
    ),
  ),
}  # fmt: skip


def pairs(name: str, sft: Block | None = None, **options: object) -> Block:
  return dict(loss=dict(name=name, **options), sft=sft)


LIKELIHOOD = dict(coef=1.0, aggregation=TOKENS)
KTO = dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
# ORPO of TRL imitates the prompt too, and has no row.
PREFERENCES: dict[str, dict[str, Block]] = {
  'dpo': dict(
    paper=pairs('dpo', beta=0.1, label_smoothing=0.0),
    trl=pairs('dpo', beta=0.1, label_smoothing=0.0),
  ),
  'ipo': dict(
    paper=pairs('ipo', beta=0.1),
    trl=pairs('length_normalized_ipo', beta=0.1),
  ),
  'hinge': dict(
    paper=pairs('hinge', beta=0.05),
    trl=pairs('hinge', beta=0.1),
  ),
  'robust': dict(
    paper=pairs('robust_dpo', beta=0.1, label_smoothing=0.1),
    trl=pairs('robust_dpo', beta=0.1, label_smoothing=0.0),
  ),
  'kto': dict(paper=pairs('kto', **KTO), trl=pairs('kto', **KTO)),
  'orpo': dict(paper=pairs('orpo', coef=0.1)),
  'simpo': dict(
    paper=pairs('simpo', beta=2.0, gamma=1.0),
    trl=pairs('simpo', LIKELIHOOD, beta=0.1, gamma=0.5),
  ),
  'cpo': dict(
    paper=pairs('cpo', beta=0.1, nll_coef=1.0),
    trl=pairs('cpo', LIKELIHOOD, beta=0.1, nll_coef=None),
  ),
}


def preset(name: str) -> Block:
  """The blocks of ``'algorithm/source'``, a copy.

  Raises:
    ValueError: no such preset.
  """
  presets = {**PRESETS, **PREFERENCES}
  algorithm, _, source = name.partition('/')
  if source not in presets.get(algorithm, {}):
    known = ', '.join(f'{a}/{s}' for a, of in presets.items() for s in of)
    raise ValueError(f'preset {name!r} does not exist; there are: {known}')
  return ConfigDict(presets[algorithm][source]).to_dict()


def apply(config: ConfigDict, name: str) -> None:
  """Replace the axes of a config by those of a preset.

  Raises:
    ValueError: no such preset, or one of preferences.
  """
  blocks = preset(name)
  if 'advantage' not in blocks:
    raise ValueError(
      f'preset {name!r} is of preferences, a config of rollouts: take its loss'
      ' by preset() and give it to postrain.objectives'
    )
  if blocks['aggregation'].get('length', 0) is None:
    blocks['aggregation']['length'] = config.sampling.max_new_tokens
  kl = blocks.pop('kl')
  config.selection = blocks.pop('selection')
  for axis, block in blocks.items():
    config[axis] = ConfigDict(block)
  if 'estimator' in kl:
    config.kl.estimator = ConfigDict(kl.pop('estimator'))
  config.kl.update(kl)
