"""Where prompts come from and what rewards their completions."""

from postrain.environments.record import Environment as Environment
from postrain.environments.synthetic import task
from postrain.environments.written import text

__all__ = ['task', 'text']
