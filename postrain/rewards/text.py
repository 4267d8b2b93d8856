"""Rewards that read the wording, the format or the length of a completion."""

import re
from typing import Any

from postrain.types import Completion

ANIMALS = (
  'ant', 'bear', 'bee', 'bird', 'bug', 'bunny', 'butterfly', 'cat', 'chick',
  'chicken', 'cow', 'crab', 'crow', 'deer', 'dinosaur', 'dog', 'dolphin',
  'donkey', 'dragon', 'duck', 'elephant', 'fish', 'fly', 'fox', 'frog',
  'giraffe', 'goat', 'goose', 'hamster', 'hen', 'hippo', 'horse', 'kangaroo',
  'kitten', 'kitty', 'ladybug', 'lamb', 'lion', 'lizard', 'monkey', 'mouse',
  'owl', 'panda', 'parrot', 'penguin', 'pig', 'pony', 'puppy', 'rabbit',
  'raccoon', 'rat', 'seal', 'shark', 'sheep', 'snail', 'snake', 'spider',
  'squirrel', 'swan', 'tiger', 'turtle', 'unicorn', 'whale', 'wolf', 'worm',
  'zebra',
)  # fmt: skip

# A dog named Max; a cat who was called Tom; the dog's name was Max; a bird. Its
# name was Kiki. A name is a capitalised word that is no pronoun or opener.
_NAME = (
  r'(?!(?:A|An|And|But|He|Her|His|I|It|Its|My|She|So|The|Then|They)\b)'
  r'[A-Z][a-z]+'
)
_NAMING = (
  rf'(?:,? (?:who |that |which )?(?:is |was )?(?:named|called) {_NAME}'
  rf'|,? whose name (?:is|was) {_NAME}'
  rf'|[\'’]s name (?:is|was) {_NAME}'
  rf'|\. (?:Its|His|Her) name (?:is|was) {_NAME})'
)


def format_tags(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  first: str = 'think',
  second: str = 'answer',
  opened: bool = False,
) -> list[float]:
  """Whether the text is ``<think>..</think><answer>..</answer>``: 1 or 0.

  Each tag stands exactly once, in this order, with nothing but white space
  outside. Give it a weight below the gain that accuracy promises: it is
  earned without an answer.

  Args:
    completions: rows to grade.
    examples: not read.
    first: name of the first pair of tags.
    second: name of the second pair.
    opened: the prompt ends with the first opening tag, which the completion
      therefore lacks.

  References:
    DeepSeek-AI 2025, DeepSeek-R1: Incentivizing Reasoning Capability in LLMs
    via Reinforcement Learning, arXiv:2501.12948.
  """
  del examples
  tags = [f'<{first}>', f'</{first}>', f'<{second}>', f'</{second}>']
  a, b, c, d = map(re.escape, tags)
  layout = re.compile(rf'\s*{a}.*{b}\s*{c}.*{d}\s*', re.DOTALL)
  texts = [(tags[0] if opened else '') + each.text for each in completions]
  return [
    float(
      all(text.count(tag) == 1 for tag in tags)
      and layout.fullmatch(text) is not None
    )
    for text in texts
  ]


def finished(
  completions: list[Completion], examples: list[dict[str, Any]]
) -> list[float]:
  """1 where the completion stopped by itself, 0 where the limit cut it.

  Args:
    completions: rows to grade.
    examples: not read.
  """
  del examples
  return [float(not each.truncated) for each in completions]


def num_tokens(
  completions: list[Completion], examples: list[dict[str, Any]]
) -> list[float]:
  """Length |y| in tokens; a weight of -λ makes it the penalty R - λ|y|.

  Args:
    completions: rows to grade.
    examples: not read.
  """
  del examples
  return [float(len(each.tokens)) for each in completions]


def length_penalty(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  max_length: int,
  window: int,
) -> list[float]:
  """Soft overlong punishment, a ramp from 0 to -1 before the length limit.

  r = clip((L_max - C - |y|) / C, -1, 0)

  verl's copy goes on falling beyond L_max; the paper's stays at -1.

  Args:
    completions: rows to grade; their length counts tokens.
    examples: not read.
    max_length: L_max in tokens, from which on the reward is -1.
    window: C in tokens, the width of the ramp, in [1, max_length].

  Raises:
    ValueError: the window is out of its range.

  References:
    Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at
    Scale, arXiv:2503.14476.
  """
  del examples
  if not 1 <= window <= max_length:
    raise ValueError(
      f'window={window}: it must be in [1, max_length={max_length}] tokens'
    )
  free = max_length - window
  return [
    min(0.0, max(-1.0, (free - len(each.tokens)) / window))
    for each in completions
  ]


def contains(
  completions: list[Completion], examples: list[dict[str, Any]], *, text: str
) -> list[float]:
  """Whether the completion has ``text`` in it, letter by letter: 1 or 0.

  Args:
    completions: rows to grade.
    examples: not read.
    text: what to look for.

  Raises:
    ValueError: the text is empty, which every completion contains.
  """
  del examples
  if not text:
    raise ValueError("text='': every completion contains it; name some text")
  return [float(text in each.text) for each in completions]


def mentions_any(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  words: tuple[str, ...],
) -> list[float]:
  """Whether a completion has one of the words, whole, in any case: 1 or 0.

  Args:
    completions: rows to grade.
    examples: not read.
    words: words or phrases.

  Raises:
    ValueError: there are no words, or an empty one.
  """
  del examples
  pattern = re.compile(rf'(?<!\w){_any_of(words)}(?!\w)', re.IGNORECASE)
  return [float(pattern.search(each.text) is not None) for each in completions]


def names_animal(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  animals: tuple[str, ...] = ANIMALS,
  mention: float = 0.0,
) -> list[float]:
  """Whether a story gives an animal a name: 1, else ``mention`` or 0.

  "a dog named Max", "the cat was called Tom", "the bird's name was Kiki", "a
  little fish. Its name was Nemo". A girl with a name and a nameless dog earn
  nothing: the name has to belong to the animal. Said twice, it counts once.

  Args:
    completions: rows to grade.
    examples: not read.
    animals: their names, in the singular.
    mention: partial credit for an animal without a name, in [0, 1].

  Raises:
    ValueError: there are no animals, or the credit is out of its range.
  """
  del examples
  if not 0 <= mention <= 1:
    raise ValueError(f'mention={mention}: a partial credit is in [0, 1]')
  # The case of an animal is free, that of a name is what makes it one.
  animal = rf'(?<!\w)(?i:{_any_of(animals)})'
  named = re.compile(animal + _NAMING)
  mentioned = re.compile(animal + r'(?!\w)')
  texts = [' '.join(each.text.split()) for each in completions]
  return [
    1.0 if named.search(text) else mention if mentioned.search(text) else 0.0
    for text in texts
  ]


def animal_story(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  animals: tuple[str, ...] = ANIMALS,
  min_words: int = 0,
) -> list[float]:
  """Whether a story ended by itself and names an animal: 1 or 0.

  `finished` and `names_animal` at once, for nothing less is a story. The
  shortest way to both is a sentence: ``min_words`` closes it.

  Args:
    completions: rows to grade.
    examples: not read.
    animals: see `names_animal`.
    min_words: words of the shortest story, white space between them.

  Raises:
    ValueError: there are no animals.
  """
  named = names_animal(completions, examples, animals=animals)
  ended = finished(completions, examples)
  words = [len(each.text.split()) for each in completions]
  return [
    name * end * (num >= min_words)
    for name, end, num in zip(named, ended, words, strict=True)
  ]


def _any_of(words: tuple[str, ...]) -> str:
  if not words or not all(word.strip() for word in words):
    raise ValueError(f'words={words!r}: expected words, none of them empty')
  return f'(?:{"|".join(map(re.escape, words))})'
