"""How problems are put, and how answers are drawn and graded."""

import dataclasses
from typing import Literal

from postrain.policies import check_sampling
from postrain.rewards.statements import Extract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The choices of an examination.

  Attributes:
    style: ``plain`` text, or ``chat`` through the tokenizer's template.
    template: text around the question, with ``{question}`` in its place.
    system: system message of a chat.
    num_samples: drawn beside the greedy answer; 0 for none.
    ks: of pass@k.
    batch_size: problems that are sampled at once.
    grader: one of ``READERS``, another reward by name, or 'module:function';
      a completion is correct where the reward is at least 1.
    extract: where an answer is stated, see `postrain.rewards.statements`.
    marker: introduces an answer.
  """

  style: Literal['plain', 'chat'] = 'plain'
  template: str | None = None
  system: str | None = None
  max_new_tokens: int = 512
  num_samples: int = 0
  ks: tuple[int, ...] = ()
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  seed: int = 0
  batch_size: int = 16
  grader: str = 'accuracy'
  extract: Extract = 'any'
  marker: str = '####'


def check(settings: Settings, num_problems: int) -> None:
  """Refuse what would be answered wrongly or not at all.

  Raises:
    ValueError: names the setting and its range.
  """
  names = ('seed', 'temperature', 'top_k', 'top_p', 'min_p')
  check_sampling(**{name: getattr(settings, name) for name in names})
  for name, least in (('num_samples', 0), ('batch_size', 1)):
    if (value := getattr(settings, name)) < least:
      raise ValueError(f'{name}={value}: it must be at least {least}')
  for k in settings.ks:
    if not 1 <= k <= settings.num_samples:
      raise ValueError(
        f'k={k}: pass@k needs k in [1, num_samples={settings.num_samples}]:'
        ' draw more samples or lower k'
      )
  if num_problems < 2:
    raise ValueError(
      f'{num_problems} problems have no spread: examine on at least 2'
    )
  if settings.template is not None and '{question}' not in settings.template:
    raise ValueError(
      f'template={settings.template!r} needs {{question}} in it, where the'
      ' question goes'
    )
  if settings.system is not None and settings.style == 'plain':
    raise ValueError("system needs style='chat'; a plain prompt has no roles")
  if not settings.marker.strip():
    raise ValueError(f'marker={settings.marker!r}: give a text, like ####')
