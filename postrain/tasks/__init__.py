"""Synthetic tasks with exact verifiers, as jittable functions.

``bind(postrain.tasks, {'name': 'arithmetic', 'num_digits': 2})()`` builds a
`postrain.types.Task`. One task, one file; the policies that belong to a task
(`sort.toy_policy`, `tabular.tabular_policy`, `chain.noisy_policy`) stand beside
it, and what raters say of completions whose reward is known is in `labels`.
"""

from postrain.tasks.arithmetic import arithmetic
from postrain.tasks.chain import chain
from postrain.tasks.preference import preference
from postrain.tasks.sort import sort
from postrain.tasks.tabular import tabular

__all__ = ['arithmetic', 'chain', 'preference', 'sort', 'tabular']
