"""Numbers in text that may be hostile, read exactly or not at all.

Nothing here evaluates text, every pattern runs in linear time, and a number of
more than 64 characters is none: a hostile completion costs a reward of 0, not a
hang. Where a reader could doubt what was meant, there is no number: a wrong
reward teaches, a missing one only costs a sample.
"""

from fractions import Fraction
import re
import unicodedata

MAX_NUMBER_LENGTH = 64
MAX_EXPONENT = 30
WINDOW = 32  # characters around a number that may spoil it

_DASHES = '\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d'
_INVISIBLE = (
  '\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c'
  '\u2060\u2066\u2067\u2068\u2069\ufeff'
)
_OVERRIDES = re.compile('[\u202d\u202e]')  # what is seen is not what is stored
_CHARACTERS = str.maketrans(
  {
    **dict.fromkeys(_DASHES, '-'),
    **dict.fromkeys(_INVISIBLE, ''),
    **dict.fromkeys('\u2044\u2215', '/'),
    '\N{RIGHT SINGLE QUOTATION MARK}': "'",
  }
  | {c: '\ue000' + unicodedata.normalize('NFKC', c).replace('\u2044', '/')
     for c in '¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞'}
)  # fmt: skip
_SUPERSCRIPTS = '⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻'
_RAISED = str.maketrans(_SUPERSCRIPTS, '0123456789+-')

# Commands of LaTeX that change the look of a number and not its value.
_LOOKS = (
  'boxed|fbox|boldsymbol|displaystyle|left|right|mathbf|mathit|mathrm|mathsf|'
  'mbox|qquad|quad|text|textbf|textit|textrm|therefore|underline'
)
_REWRITES = [
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    # A narrow space is a separator of thousands, never one of numbers.
    ('(?<=[0-9])(?:[\u00a0\u2007\u2009\u202f]|\\\\,)(?=[0-9]{3}(?![0-9]))',
     "'"),
    (r'\s+', ' '),
    ('(?<=[0-9])\ue000', ' '),
    ('\ue000', ''),
    (r'\\!', ''),
    (r'\{,\}', ','),
    (r'\\([$%£€])', r'\1'),
    (r'\\[,;: ()\[\]]', ' '),
    (rf'\\(?:{_LOOKS})(?![a-zA-Z]) ?', ''),
    (r'\^? ?\{? ?\\(?:circ|degree)(?![a-zA-Z])\}?', '°'),
    (r'([\^_]) ?\{ ?([^{} ]{1,8}) ?\}', r'\1\2'),
    (r'</?[a-zA-Z][^<>]{0,30}>|[-=>]>', ' '),
    (r'(?<=[0-9]) / (?=[0-9])', '/'),
    (r'(?i)\b(?:minus|negative) (?=[$€£]?[0-9])', '-'),
    (r'(?<=[0-9]) ?(?:\\times|\\cdot|[×x*·]) ?10(?:\^|\*\*)'
     r'(?=[+-]?[0-9])', 'e'),
  )
]  # fmt: skip
_FRAC = re.compile(
  r'(?P<whole>[0-9] ?)?\\[dtc]?frac ?(?:\{ ?(?P<top>-?[0-9]+) ?\}|(?P<t>[0-9]))'
  r' ?(?:\{ ?(?P<bottom>[0-9]+) ?\}|(?P<b>[0-9]))'
)

# A sign counts where it cannot be a subtraction: 10-5 ends in 5, not in -5.
# The run of digits and separators is taken whole and judged afterwards, so
# that 1.2.3 or 3:30 or 1,5 is no number instead of its last part.
NUMBER = re.compile(
  r'(?P<sign>(?<![\w)\]}%])-)?'
  r'(?:(?:(?<![\w])[A-Z]{1,3})?[$€£¥₹₩₽₺₿฿¢] ?(?P<inner>-)?'
  r'|(?<=-)[A-Z]{3} ?)?'
  r"(?<![\w^])(?<![0-9][.,:/'])"
  r"(?P<run>(?:(?<!\.)\.)?[0-9](?:[0-9.,:/'_]*[0-9])?)"
  r'(?: (?P<part>[0-9]{1,9}/[0-9]{1,9})(?![0-9.,:/]))?'
  r'(?P<power>\^|!|[eE][+-]?[0-9]+)?'
)
_WORDS = (
  r"not|n't|never|about|around|approx\.?|approximately|roughly|nearly|almost|"
  r'over|under|above|below|than|least|most|up to|half|twice|double|triple|plus|'
  r'root of|power of'
)
# What makes a number a part of something else, before and after it.
_SPOILT_BEFORE = re.compile(
  r'(?:[√∛∜≈≃≅~<>≤≥≠±∓^]=?|\+/'  # a root, a bound, either sign
  r'|(?<![\w)\]}%])-[ ({\[*]*'  # -(5), --5
  r'|(?:\\[a-zA-Z]+|∞) ?[\[({,]?|[a-zA-Z]\(|\} ?\{'  # \sqrt{2}, f(2)
  r'|(?:\b[a-zA-Z] ?-|(?:\b[a-zA-Z]|[)}\]]) ?[+*/×·÷]|[0-9)]\*\*)'  # x + 2
  rf'|(?i:\b(?:{_WORDS})|n\'t)(?: (?:a|be|equal to|of))? ?[$€£]?'
  r') ?$'
)
_SPOILT_AFTER = re.compile(
  r'(?:[abijknqruvxyzKMB]|[abxyz]{2,3}|[bm]n)(?!\w)|x[0-9a-fA-F]'  # 2x, 5K
  r'|[a-ln-zA-Z]\^|\d|_'  # 5r^5, but 5m^2
  r'|\([a-zA-Z][)+*/^-]|\.\('  # 2(x+1), 0.(3)
  r'| ?(?:\^|\.\.|…|[.,]? ?(?:\\[a-zA-Z]|∞)|±|\+(?![0-9])'  # 0.3..., 2\pi
  r'|(?:[+/×·÷-]|\*(?!\*)) ?(?:[a-zA-Z]\b|[({\[\\√])'  # 2 + x
  r'|(?i:and (?:a|one|two|three)\b|(?:or|and) (?:more|less|fewer|so)\b'
  r'|(?:squared|cubed|factorial|mod)\b'
  r'|(?:hal[fv]|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth'
  r'|hundredth|thousandth|millionth)(?:e?s)?\b))'
)
_SCALE = re.compile(
  r'[ -]?\{? ?(hundred|thousand|million|billion|trillion|lakh|crore)s?\b',
  re.IGNORECASE,
)
_SCALES = {
  'hundred': 10**2, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9,
  'trillion': 10**12, 'lakh': 10**5, 'crore': 10**7,
}  # fmt: skip

_FORMS = [
  (re.compile(pattern), separator, point)
  for pattern, separator, point in (
    (r'(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.[0-9]+)?', ',', '.'),
    (r'\.[0-9]+', ',', '.'),
    (r'[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?', ',', '.'),
    (r"[1-9][0-9]{0,2}(?:'[0-9]{3})+(?:\.[0-9]+)?", "'", '.'),
    (r'[1-9][0-9]{0,2}(?:_[0-9]{3})+(?:\.[0-9]+)?', '_', '.'),
    (r'[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?:,[0-9]+)?', '.', ','),
    (r'[1-9][0-9]{0,2}\.[0-9]{3},[0-9]+', '.', ','),
  )
]


def sole_number(text: str) -> Fraction | None:
  """The value of a text that holds exactly one number, else None."""
  values = numbers(re.sub(rf'^[{_DASHES}-]\s+', '-', text.strip()))
  return values[0] if len(values) == 1 else None


def numbers(text: str) -> list[Fraction | None]:
  """All numbers in order; None for what looks like one and is not.

  1,080 and 1.080,50 and 1'080 and 12,34,567 are grouped digits; 1.5 has a
  decimal point and 1,5 is no number, for it could be two. 2 1/2 is 5/2, 3e4 and
  3 x 10^4 are 30000, 2 million is what it says. Currency signs, units, a
  percent sign and LaTeX that only changes the look are read over. A number
  that is part of an expression (x + 2, \\sqrt{2}, 2^10, 4!), a bound or a guess
  (about 5, > 5, 5 or more), a time, a ratio or a recurring decimal is None.
  """
  if _OVERRIDES.search(text):
    return [None]
  text = _plain(text)
  return [number_value(match) for match in NUMBER.finditer(text)]


def number_value(match: re.Match[str]) -> Fraction | None:
  """The value of a match of ``NUMBER``, None if its context spoils it."""
  start, end, text = match.start(), match.end(), match.string
  before = text[max(0, start - WINDOW) : start]
  after = text[end : end + WINDOW]
  absolute = match['sign'] and before.endswith('|')
  if absolute or _SPOILT_BEFORE.search(before) or _SPOILT_AFTER.match(after):
    return None
  value = _run_value(match['run'])
  if value is None:
    return None
  if match['part']:
    top, bottom = map(int, match['part'].split('/'))
    if not top < bottom or value.denominator != 1 or not match['run'].isdigit():
      return None
    value += Fraction(top, bottom)
  if power := match['power']:
    if power[0] not in 'eE' or len(power) > 4 or '/' in match['run']:
      return None
    if abs(int(power[1:])) > MAX_EXPONENT:
      return None
    value *= Fraction(10) ** int(power[1:])
  if scale := _SCALE.match(after):
    value *= _SCALES[scale[1].lower()]
  return -value if match['sign'] or match['inner'] else value


def _run_value(run: str) -> Fraction | None:
  """A run of digits and separators as a number or a quotient of two."""
  if len(run) > MAX_NUMBER_LENGTH:
    return None
  top, slash, bottom = run.partition('/')
  value, divisor = _decimal(top), _decimal(bottom) if slash else Fraction(1)
  return value / divisor if value is not None and divisor else None


def _decimal(run: str) -> Fraction | None:
  for form, separator, point in _FORMS:
    if form.fullmatch(run):
      return Fraction(run.replace(separator, '').replace(point, '.'))
  return None


def _plain(text: str) -> str:
  """The text with its typography and its LaTeX simplified."""
  text = text.translate(_CHARACTERS)
  text = re.sub(
    f'[{_SUPERSCRIPTS}]+', lambda m: '^' + m[0].translate(_RAISED), text
  )
  for pattern, replacement in _REWRITES:
    text = pattern.sub(replacement, text)
  return _FRAC.sub(_quotient, text)


def _quotient(match: re.Match[str]) -> str:
  whole = f'{match["whole"].strip()} ' if match['whole'] else ''
  top, bottom = match['top'] or match['t'], match['bottom'] or match['b']
  return f'{whole}{top}/{bottom}'
