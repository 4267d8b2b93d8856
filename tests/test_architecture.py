"""The rules of the house, held over the syntax trees.

A rule takes a module's dotted name and its tree and yields what breaks it. The
examples at the end show for each rule what it lets pass and what it catches.
"""

import ast
from collections.abc import Iterator
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A new module of postrain finds its place here; imports go to the left only.
LAYERS = (
  {
    *('advantages', 'aggregation', 'dtypes', 'importance', 'keys', 'kl'),
    *('logprobs', 'losses', 'masks', 'shaping'),
  },
  {
    *('adapted', 'batches', 'couplings', 'internals', 'models', 'objectives'),
    *('optimizers', 'reward_models', 'sampling', 'scoring', 'sharding'),
    *('digests', 'soft_labels', 'step_labels', 'tasks', 'train_step'),
    *('types', 'values'),
  },
  {
    *('chat', 'checkpoints', 'console', 'data', 'evaluation', 'hosts', 'hub'),
    *('metrics', 'peft', 'quantization', 'reporting', 'rewards', 'rollouts'),
    *('sandbox', 'thinking', 'tokenizers', 'workdir'),
  },
  {
    *('actors', 'algorithm', 'assembly', 'binding', 'checks', 'collection'),
    *('compilation', 'control', 'critics', 'learned_rewards'),
    *('device_loop', 'drawing', 'programs'),
    *('environments', 'evaluator', 'exam', 'grading', 'labelling', 'policies'),
    'feedback',
    'pair_evaluation',
    *('mesh_checks', 'packing', 'pairing', 'pipeline'),
    *('preference_checks', 'preferring'),
    *('preparation', 'recipe', 'reference_table'),
    *('rehearsal', 'schema', 'shapes', 'states'),
    *('streaming', 'sweeps', 'topologies', 'traffic', 'trainer'),
  },
)
MATHEMATICS = {'jax', 'jaxtyping', 'numpy'}
STRUCTURE = MATHEMATICS | {'flax', 'optax', 'chex'}
APART = {'rewards', 'models', 'data'}
COMPILERS = {'checkpoints', 'evaluation', 'sampling.engine', 'sharding.arrays'}
SHARDING_NAMES = {'Mesh', 'NamedSharding', 'PartitionSpec'}
FORBIDDEN_WORDS = ('utils', 'helper', 'manager')
FORBIDDEN_PREFIXES = ('compute_', 'get_')
MAX_FILE_LINES = 300  # without docstrings
MAX_FUNCTION_LINES = 50  # without docstring and inner functions


def part(module: str) -> str:
  """The first name below the package; '' for the package itself."""
  return module.removeprefix('postrain').lstrip('.').split('.')[0]


def layer(module: str) -> int:
  """0 mathematics, 1 structure, 2 outside world, 3 assembly; -1 the package."""
  if not part(module) or part(module).startswith('__'):
    return -1
  for number, parts in enumerate(LAYERS):
    if part(module) in parts:
      return number
  raise ValueError(f'{module} has no layer: add it to LAYERS')


def imported(node: ast.AST) -> list[str]:
  """Dotted names that an import statement may load."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom):
    package = '.' * node.level + (node.module or '')
    return [f'{package}.{alias.name}' for alias in node.names]
  return []


def imports(tree: ast.AST) -> Iterator[str]:
  """Everything imported anywhere in a tree."""
  for node in ast.walk(tree):
    yield from imported(node)


def imports_at_load(tree: ast.AST) -> Iterator[str]:
  """What is imported when the module is, that is outside of functions."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield from imported(node)
      yield from imports_at_load(node)


def is_foreign(name: str) -> bool:
  top = name.split('.')[0]
  return top != 'postrain' and top not in sys.stdlib_module_names


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
  """Functions of the module and methods of its classes, without _names."""
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
      yield from (n for n in node.body if isinstance(n, ast.FunctionDef))
    elif isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
      yield node


def imports_go_down(module: str, tree: ast.Module) -> Iterator[str]:
  """Layers import from themselves and from those below."""
  for name in imports(tree):
    if name.startswith('.'):
      yield f'relative import of {name}'
    elif name.startswith('postrain.') and layer(name) > layer(module):
      yield f'imports {name} from a higher layer'


def nothing_sideways(module: str, tree: ast.Module) -> Iterator[str]:
  """Rewards, models and data know nothing of each other."""
  for name in imports(tree):
    parts = {part(module), part(name)}
    if name.startswith('postrain.') and parts <= APART and len(parts) == 2:
      yield f'imports {name} sideways'


def foreign_imports(module: str, tree: ast.Module) -> Iterator[str]:
  """L0 is jax, L1 adds flax, optax, chex; above, the rest is loaded late."""
  if layer(module) >= 2:
    for name in imports_at_load(tree):
      if is_foreign(name) and name.split('.')[0] not in STRUCTURE:
        yield f'imports {name} outside of the function that needs it'
    return
  allowed = (MATHEMATICS, STRUCTURE, set())[layer(module)]
  for name in imports(tree):
    if is_foreign(name) and name.split('.')[0] not in allowed:
      yield f'imports {name}; its layer has only {sorted(allowed)}'


def shardings_in_one_place(module: str, tree: ast.Module) -> Iterator[str]:
  """Meshes and shardings are made in postrain.sharding."""
  if part(module) == 'sharding':
    return
  for node in ast.walk(tree):
    match node:
      case ast.alias(name=name) if name in SHARDING_NAMES:
        yield f'imports {name}'
      case ast.Attribute(ast.Attribute(attr='sharding'), name):
        yield f'names sharding.{name}'
      case ast.Attribute(ast.Name('sharding'), name) if name in SHARDING_NAMES:
        yield f'names sharding.{name}'
      case ast.Attribute(ast.Name('jax'), 'P' | 'make_mesh' as name):
        yield f'names jax.{name}'


def jit_at_assembly(module: str, tree: ast.Module) -> Iterator[str]:
  """Core functions are jittable, undecorated; the assembly compiles."""
  if layer(module) == 3 or module.removeprefix('postrain.') in COMPILERS:
    return
  for node in ast.walk(tree):
    match node:
      case ast.Attribute(attr='jit' | 'pmap' | 'pjit' as name):
        yield f'line {node.lineno}: applies {name}'
      case ast.ImportFrom(names=names):
        for alias in names:
          if alias.name in ('jit', 'pmap', 'pjit'):
            yield f'line {node.lineno}: imports {alias.name}'


def no_assert(module: str, tree: ast.Module) -> Iterator[str]:
  """Users' mistakes are ValueErrors, which python -O keeps."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Assert):
      yield f'line {node.lineno}: assert'


def no_swallowed_errors(module: str, tree: ast.Module) -> Iterator[str]:
  """Who catches everything raises again."""
  for node in ast.walk(tree):
    match node:
      case ast.ExceptHandler(
        type=None | ast.Name(id='Exception' | 'BaseException')
      ):
        if not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
          yield f'line {node.lineno}: swallows every error'


def no_open_arguments(module: str, tree: ast.Module) -> Iterator[str]:
  """A signature is a schema: no **kwargs in public."""
  for function in public_functions(tree):
    if function.args.kwarg is not None:
      yield f'{function.name} takes **{function.args.kwarg.arg}'


def names(module: str, tree: ast.Module) -> Iterator[str]:
  """Nouns for mathematics, verbs for effects, no empty words."""
  defined = module.split('.')[1:]
  for node in ast.walk(tree):
    match node:
      case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
        defined.append(name)
      case ast.arg(arg='rng') | ast.Name('rng', ast.Store()):
        yield f'line {node.lineno}: rng is called key here'
      case ast.Assign([ast.Name('data')]):
        yield f'line {node.lineno}: say what the data is'
  for name in defined:
    if any(word in name.lower() for word in FORBIDDEN_WORDS):
      yield f'{name}: says nothing'
    if name.startswith(FORBIDDEN_PREFIXES):
      yield f'{name}: name the thing itself'


def docstrings(module: str, tree: ast.Module) -> Iterator[str]:
  """Modules, public classes and public functions say what they are."""
  nodes = [tree] + [
    node
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    and not node.name.startswith('_')
  ]
  for node in nodes:
    if not ast.get_docstring(node):
      yield f'{getattr(node, "name", module)} has no docstring'


def own_lines(function: ast.FunctionDef) -> int:
  """Lines without the docstring and without the functions inside."""
  apart = [n for n in function.body if isinstance(n, ast.FunctionDef)]
  if ast.get_docstring(function) is not None:
    apart.append(function.body[0])
  lengths = [n.end_lineno - n.lineno + 1 for n in [function, *apart]]
  return lengths[0] - sum(lengths[1:])


def undocumented_lines(source: str) -> int:
  """Lines of a file without its docstrings."""
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  docstrings = [
    node.body[0]
    for node in ast.walk(ast.parse(source))
    if isinstance(node, documented) and ast.get_docstring(node) is not None
  ]
  written = sum(d.end_lineno - d.lineno + 1 for d in docstrings)
  return len(source.splitlines()) - written


def short_functions(module: str, tree: ast.Module) -> Iterator[str]:
  """A function fits on a screen."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      size = own_lines(node)
      if size > MAX_FUNCTION_LINES:
        yield f'{node.name} has {size} lines'


RULES = (
  imports_go_down,
  nothing_sideways,
  foreign_imports,
  shardings_in_one_place,
  jit_at_assembly,
  no_assert,
  no_swallowed_errors,
  no_open_arguments,
  names,
  docstrings,
  short_functions,
)


def sources(folder: str) -> list[pathlib.Path]:
  return sorted((ROOT / folder).rglob('*.py'))


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def trees(folder: str) -> dict[str, ast.Module]:
  return {module_name(p): ast.parse(p.read_text()) for p in sources(folder)}


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_library(rule):
  broken = [
    f'{module}: {violation}'
    for module, tree in trees('postrain').items()
    for violation in rule(module, tree)
  ]
  assert not broken, '\n'.join([rule.__doc__, *broken])


def test_modules_import_without_cycles():
  modules = trees('postrain')
  graph = {}
  for module, tree in modules.items():
    targets = {
      n if n in modules else n.rpartition('.')[0] for n in imports(tree)
    }
    graph[module] = (targets & modules.keys()) - {module}
  list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_configs_are_data():
  """They import ml_collections, and of each other at most one base file."""
  configs = trees('configs')
  for module, tree in configs.items():
    for name in imports(tree):
      base = '.'.join(name.split('.')[:2])
      assert name.split('.')[0] in {'ml_collections', 'configs'}, (module, name)
      if base in configs:
        assert not any(n.startswith('configs') for n in imports(configs[base]))


@pytest.mark.parametrize(
  'folder', ['postrain', 'configs', 'experiments', 'benchmarks', 'tests']
)
def test_nothing_imports_experiments(folder):
  """But the parts of a study each other."""
  for module, tree in trees(folder).items():
    study = '.'.join(module.split('.')[:2])
    for name in imports(tree):
      own = name.startswith(study)
      assert own or name.split('.')[0] != 'experiments', (module, name)


@pytest.mark.parametrize('folder', ['postrain', 'configs', 'experiments'])
def test_files_are_short(folder):
  long = {
    str(path.relative_to(ROOT)): size
    for path in sources(folder)
    if (size := undocumented_lines(path.read_text())) > MAX_FILE_LINES
  }
  assert not long, long


LONG = 'def f():\n  """One line."""\n' + '  x = 1\n' * 48  # 49 own lines
EXAMPLES = [
  # rule, module, passes, is caught
  (
    imports_go_down,
    'postrain.batches',
    'from postrain.losses import dpo; import postrain',
    'def f():\n  from postrain import trainer',
  ),
  (
    imports_go_down,
    'postrain.losses',
    'from postrain import kl',
    'from . import x',
  ),
  (
    imports_go_down,
    'postrain.kl',
    'from postrain.logprobs import x',
    'import postrain.types',
  ),
  (
    nothing_sideways,
    'postrain.rewards.math',
    'from postrain.rewards import code; import postrain.kl',
    'from postrain.data import jsonl',
  ),
  (
    foreign_imports,
    'postrain.losses.policy',
    'import math; import jax.numpy as jnp; import numpy',
    'def f():\n  import optax',
  ),
  (
    foreign_imports,
    'postrain.scoring',
    'import flax.linen; import optax, chex',
    'import transformers',
  ),
  (
    foreign_imports,
    'postrain.hub',
    'def f():\n  import transformers',
    'if True:\n  from safetensors import numpy',
  ),
  (foreign_imports, 'postrain', 'import re', 'import jax'),
  (
    shardings_in_one_place,
    'postrain.trainer',
    'from postrain.sharding import make_mesh',
    'from jax.sharding import NamedSharding',
  ),
  (
    shardings_in_one_place,
    'postrain.trainer',
    'class Mesh: ...\nmesh = Mesh()',
    'import jax; jax.P()',
  ),
  (
    shardings_in_one_place,
    'postrain.scoring',
    'import jax',
    'jax.sharding.PartitionSpec()',
  ),
  (
    jit_at_assembly,
    'postrain.losses',
    'jax.grad(f)',
    '@functools.partial(jax.jit, static_argnums=0)\ndef f(): ...',
  ),
  (
    jit_at_assembly,
    'postrain.kl',
    'from jax import vmap',
    'from jax import jit',
  ),
  (no_assert, 'postrain.kl', 'raise ValueError', 'def f():\n  assert x'),
  (
    no_swallowed_errors,
    'postrain.hub',
    'try: f()\nexcept Exception as e: raise ValueError from e',
    'try: f()\nexcept Exception as e: print(e)',
  ),
  (
    no_swallowed_errors,
    'postrain.hub',
    'try: f()\nexcept OSError: g()',
    'try: f()\nexcept: g()',
  ),
  (
    no_open_arguments,
    'postrain.kl',
    'def _f(**kwargs): ...\ndef f(*args): ...',
    'class C:\n  def f(self, **options): ...',
  ),
  (names, 'postrain.kl', 'def k3(key): ...', 'def compute_k3(): ...'),
  (names, 'postrain.kl', 'def f(data=1): ...', 'def f(rng): ...'),
  (names, 'postrain.kl', 'manager = 1', 'class RunManager: ...'),
  (names, 'postrain.keys', 'x = 1', 'data = 1'),
  (names, 'postrain.losses.policy', '', 'def f():\n  def get_x(): ...'),
  (
    docstrings,
    'postrain.kl',
    '"""A."""\ndef _f(): ...',
    '"""A."""\ndef f(): ...',
  ),
  (docstrings, 'postrain.kl', '"""A."""', 'x = 1'),
  (
    short_functions,
    'postrain.kl',
    LONG + '  def g():\n    return 1\n  return g',
    LONG + '  def g():\n' + '    x = 1\n' * 51,
  ),
  (short_functions, 'postrain.kl', LONG + '  x = 1\n', LONG + '  x = 1\n' * 2),
]


@pytest.mark.parametrize(('rule', 'module', 'good', 'bad'), EXAMPLES)
def test_rules_catch_what_they_forbid(rule, module, good, bad):
  assert list(rule(module, ast.parse(good))) == []
  assert len(list(rule(module, ast.parse(bad)))) == 1


def test_a_module_without_a_layer_is_an_error():
  with pytest.raises(ValueError, match='add it to LAYERS'):
    layer('postrain.misc')
