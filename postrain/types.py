"""The records that flow between the parts, and the legend of their axes.

Axes: ``P`` prompts, ``G`` samples of each, ``B`` = P x G sequences (the samples
of a prompt stand together), ``S`` prompt slots, ``T`` token positions (prompt
and completion, or the completion alone where a docstring says so), ``V``
vocabulary, ``D`` model, ``L`` layers, ``K`` kept candidates of a token
or experts that it visits.

Alignment: a ``[B, T]`` array is indexed by the token that it describes.
``logprobs[:, t]`` scores ``tokens[:, t]``; position 0 holds 0.

Two masks: ``valid`` is True on real tokens (prompt and completion; what others
call attention mask), ``mask`` on the tokens that the policy chose and that are
trained, the stop token it chose included.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int, Key

from postrain.dtypes import Scalar as Scalar

Params = Any  # a pytree of arrays
Path = tuple[str, ...]  # of a leaf in nested dicts of parameters
Cache = Any  # a pytree of arrays that only its model looks into

Metrics = dict[str, Any]  # name -> Mean, Sum or Max


@runtime_checkable
class HiddenFn(Protocol):
  """``hidden(params, tokens, ...) -> (hidden [B N D], cache)``.

  ``hidden[:, t]`` has seen the tokens up to and including slot ``t`` that carry
  the same segment id, and predicts the token of slot ``t + 1``. Without a cache
  the ``N`` slots are the whole sequence and the returned cache is None. With a
  cache they are appended to it. Segment id 0 marks padding.
  """

  def __call__(
    self,
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]: ...


@runtime_checkable
class EmptyCacheFn(Protocol):
  """``empty_cache(batch_size, length, prefix=None)``: ``length`` free slots.

  A ``prefix`` is a filled cache of ``P`` sequences, ``P`` dividing
  ``batch_size``: row ``b`` continues prefix row ``b // (batch_size // P)``.
  """

  def __call__(
    self, batch_size: int, length: int, prefix: Cache | None = None
  ) -> Cache: ...


@runtime_checkable
class InternalsFn(Protocol):
  """`HiddenFn` that also returns what it is asked for: name -> array.

  'residual' [L B N D] is the stream after each layer, 'attention' and 'mlp'
  [L B N D] what each added to it, 'attention_input' and 'mlp_input' [L B N D]
  what each read, 'experts' [B N L K] the experts that each token visited and
  'router_logits' [L B N E]. ``experts`` forces tokens onto experts, with live
  gates; where they are negative the router chooses.
  """

  def __call__(
    self,
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
    capture: tuple[str, ...] = (),
    experts: Int[Array, 'B N L K'] | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None, dict[str, Array]]: ...


@dataclasses.dataclass(frozen=True)
class Model:
  """All that the library knows of a network: pure functions on arrays.

  Attributes:
    init: key -> params.
    hidden: see `HiddenFn`.
    unembed: (params, hidden [... D]) -> logits [... V]. Soft caps, quantised
      and adapted heads live in it.
    empty_cache: see `EmptyCacheFn`.
    vocab_size: rows of the embedding.
    logical_axes: key -> a tree like params whose leaves are tuples of logical
      axis names, for `postrain.sharding`; None replicates every parameter.
    internals: see `InternalsFn`; None where a network shows none.
    serving: params -> the same in the form that is fastest to read over and
      over, once a token; ``hidden``, ``internals`` and ``unembed`` take both.
      None where there is one form.
    reads_prefix: whether rows of ``hidden`` may read a prefix behind which
      nothing is kept, ``empty_cache(B, 0, prefix)``, with its gradient.
    normalize: (params, residual) -> hidden, the final norm, so that
      unembed(normalize(residual[l])) is the policy of layer l.
    num_experts: of each layer; 0 where the network is dense.
    packed: the same network for rows of several segments, where ``hidden`` and
      ``internals`` read rows of one; None where they read both.
    kernels: path of each matrix that may be a `postrain.models.lora.LowRank` ->
      its numbers of stacked and of input axes; None where none may.
  """

  init: Callable[[Key[Array, '']], Params]
  hidden: HiddenFn
  unembed: Callable[[Params, Array], Array]
  empty_cache: EmptyCacheFn
  vocab_size: int
  logical_axes: Callable[[], Params] | None = None
  internals: InternalsFn | None = None
  serving: Callable[[Params], Params] | None = None
  reads_prefix: bool = False
  normalize: Callable[[Params, Array], Array] | None = None
  num_experts: int = 0
  packed: 'Model | None' = None
  kernels: Callable[[], dict[Path, tuple[int, int]]] | None = None

  @functools.cached_property
  def shapes(self) -> Params:
    """Shape and dtype of each parameter, traced once."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))


class Samples(NamedTuple):
  """Completions: ``T`` counts completion slots only.

  ``sampler_logprobs`` are under the distribution that was sampled from
  (temperature and filters applied), ``model_logprobs`` under the plain model.
  ``truncated`` sequences met the length limit before a stop token. ``kept``
  holds the candidates that the filters kept, filled up with -1. ``experts``
  holds those that each token of prompt and completion visited (``N = S + T``):
  -1 on padding and on the last token, which the model was not run on.
  ``version`` is the iteration whose parameters drew each token; None where all
  are of one.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  sampler_logprobs: Float[Array, 'B T']
  model_logprobs: Float[Array, 'B T']
  truncated: Bool[Array, ' B']
  kept: Int[Array, 'B T K'] | None = None
  experts: Int[Array, 'B N L K'] | None = None
  version: Int[Array, 'B T'] | None = None


class Carried(NamedTuple):
  """Completions that were begun for a later iteration.

  ``numbers`` are those of their prompts, counted over the run, where groups
  end at iterations of their own; None where all are of the next iteration.
  """

  samples: Samples
  numbers: Any = None  # Int [P], NumPy


@flax.struct.dataclass
class Rollout:
  """What one iteration of sampling, rewarding and scoring leaves behind.

  ``T`` spans the prompt slots (left-padded) and the completion slots.
  ``arrays`` holds further inputs by their vocabulary name (``old_logprobs``,
  ``ref_logprobs``, ``old_values``, ...), each with leading axis ``B``.
  """

  tokens: Int[Array, 'B T']
  valid: Bool[Array, 'B T']
  mask: Bool[Array, 'B T']
  rewards: Float[Array, 'P G']
  truncated: Bool[Array, ' B']
  version: Int[Array, 'B T']
  turn_ids: Int[Array, 'B T']
  arrays: dict[str, Array]


@flax.struct.dataclass
class Batch:
  """One optimiser minibatch: what an objective reads.

  Every array has the leading axis ``B``, and micro-batches, shards and
  permutations cut it between units of ``unit_size`` rows only.

  Attributes:
    weights: for each term of the objective its normaliser as an array: a term
      is sum(weights * values).
    arrays: inputs of losses by vocabulary name.
    packing: optional layout of the model call: see `postrain.batches.pack`, or
      prompts that are read once for all rows of their group.
    unit_size: rows that a loss couples (1: sequences; 2: pairs; G: groups).
  """

  tokens: Int[Array, 'B T']
  valid: Bool[Array, 'B T']
  mask: Bool[Array, 'B T']
  weights: dict[str, Array]
  arrays: dict[str, Array]
  packing: 'Packing | SharedPrompts | None' = None
  unit_size: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Packing:
  """Where each token of ``[B, T]`` stands in ``[R, W]`` rows of the model call.

  ``R`` is a multiple of the number of micro-batches (and of data shards), and
  the sequences of one slice of units stand in the same slice of rows.

  Attributes:
    source: flat index into the slice's ``[b, t]`` tokens for each packed slot.
    segment_ids: 0 on empty slots, else the number of the sequence in its row.
    positions: position within the sequence.
    slot: flat index into the slice's ``[r, w]`` slots for each token; 0 where
      the token is padding.
    num_slices: slices that it was made for.
    unit_size: rows of a unit that it was made for.
  """

  source: Int[Array, 'R W']
  segment_ids: Int[Array, 'R W']
  positions: Int[Array, 'R W']
  slot: Int[Array, 'B T']
  num_slices: int = flax.struct.field(pytree_node=False, default=1)
  unit_size: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class SharedPrompts:
  """Neighbouring rows begin with the same prompt, which the model reads once.

  No figures of the prompts themselves are asked for.

  Attributes:
    length: slots of the prompt, before those of the completions.
    num_samples: rows that share it.
  """

  length: int = flax.struct.field(pytree_node=False)
  num_samples: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class TrainState:
  """What a step changes: ``params`` and ``ref_params`` are dicts by role."""

  step: Any  # Int[Array, ''], or its shape
  params: dict[str, Params]
  opt_state: Any
  ref_params: Params | None = None
  kl_coef: Any = None  # Float[Array, ''], where a controller moves it
  stopped: Any = None  # Bool[Array, ''], where updates may be left out
  ref_digest: Any = None  # UInt32[Array, '8'], of a table of the reference
  carried: Any = None  # `Carried`, in checkpoints alone


class Mean(NamedTuple):
  """A mean in the making: merge by adding, finish by dividing."""

  total: Array
  count: Array


class Sum(NamedTuple):
  """A sum in the making."""

  total: Array


class Max(NamedTuple):
  """A maximum in the making."""

  value: Array


class Prompts(NamedTuple):
  """Prompts as arrays, left-padded, and the examples that they came from."""

  tokens: Any  # Int [P S], NumPy or JAX
  mask: Any  # Bool [P S]
  examples: list[dict[str, Any]]


class Completion(NamedTuple):
  """What a reward function of the host sees of one completion."""

  text: str
  tokens: list[int]
  truncated: bool


RewardFn = Callable[..., list[float]]  # (completions, examples, *, ...)
Objective = Callable[
  [dict[str, Params], dict[str, Params], Batch], tuple[jax.Array, Metrics]
]


@dataclasses.dataclass(frozen=True)
class Task:
  """A synthetic task: prompts and rewards as jittable functions.

  Attributes:
    vocab_size: number of token ids.
    pad_id: fills unused slots; never a stop id.
    stop_ids: ids that end a completion, possibly none.
    prompt_length: slots ``S`` of a prompt (left-padded).
    completion_length: slots ``T`` of a completion, the stop token included.
    prompt: (key, held_out: bool) -> (tokens [S], mask [S]) of one prompt. The
      prompts of training and evaluation are disjoint where the task is finite.
    rewards: name -> (prompts [B S], completions [B T], mask [B T]) -> [B].
    render: token ids -> text, for people.
    solution: (prompts [B S]) -> (completions [B T], mask [B T]), the
      demonstrations of supervised training; None where there are none.
  """

  vocab_size: int
  pad_id: int
  stop_ids: tuple[int, ...]
  prompt_length: int
  completion_length: int
  prompt: Callable[..., tuple[Array, Array]]
  rewards: dict[str, Callable[[Array, Array, Array], Array]]
  render: Callable[[Any], str]
  solution: Callable[[Array], tuple[Array, Array]] | None = None
