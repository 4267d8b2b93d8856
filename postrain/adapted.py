"""Parameters in two parts: a base that never changes, and what is trained."""

from typing import Any, NamedTuple

import jax

from postrain.types import Params


class Adapted(NamedTuple):
  """A frozen base and its adapters, as a node of the parameters.

  Whatever trains, differentiates `trainable` parameters alone: the base has no
  gradient, no optimiser state and no second copy for a reference.
  """

  base: Params
  adapters: Params


def trainable(tree: Any) -> Any:
  """The same tree without its bases."""
  return jax.tree.map(
    lambda node: Adapted(None, node.adapters) if _adapted(node) else node,
    tree,
    is_leaf=_adapted,
  )


def bases(tree: Any) -> list[Params]:
  """The bases of a tree, in its order."""
  nodes = jax.tree.leaves(tree, is_leaf=_adapted)
  return [node.base for node in nodes if _adapted(node)]


def rejoined(tree: Any, frozen: list[Params]) -> Any:
  """The whole of what `trainable` and `bases` took apart."""
  remaining = iter(frozen)
  return jax.tree.map(
    lambda node: (
      Adapted(next(remaining), node.adapters) if _adapted(node) else node
    ),
    tree,
    is_leaf=_adapted,
  )


def _adapted(node: Any) -> bool:
  return isinstance(node, Adapted)
