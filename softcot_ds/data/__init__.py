"""From a task's problems to batches of tokens.

chat.py      chat templates: rendering, where an answer begins, what ends a turn
prompts.py   the wording of a task, and prompts of both models as tokens
targets.py   the file of solutions that the base wrote itself
examples.py  examples from problems
batches.py   batches from examples
"""
