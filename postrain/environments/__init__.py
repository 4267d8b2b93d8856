"""Where prompts come from and what rewards their completions."""

from postrain.environments.record import Comparisons as Comparisons
from postrain.environments.record import Environment as Environment
from postrain.environments.record import Units as Units
from postrain.environments.record import rows_of as rows_of
from postrain.environments.synthetic import task
from postrain.environments.written import text

__all__ = ['task', 'text']
