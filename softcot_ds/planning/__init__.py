"""What a recipe needs on GPUs that need not be here: memory, traffic, time.

hardware.py  GPUs and networks; hardware.yaml is the only table of them
shapes.py    a model's sizes from its configuration; models.yaml has those that recipes name
lengths.py   how long the examples are
work.py      the operations of a step and their memory, from the step itself without values
memory.py    bytes of weights and of what is trained
traffic.py   bytes that ranks move
search.py    all ways to hold the weights and cut the batches, the best first
jobs.py      how long cache, training and evaluation take
fit.py       whether a recipe fits as it stands
report.py    the table, the object for scripts, the scaling over GPUs
"""
