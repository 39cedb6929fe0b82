"""The training of a method.

loop.py        the loop
engine.py      DeepSpeed's engine around the models and what is trained
start.py       the first weights, and the conditioning of states
batches.py     this rank's micro-batches, step by step
schedule.py    the learning rate
stop.py        signals that ask to stop, agreed on by all ranks
record.py      what is kept and said of the steps: losses, speed, curves, lines of the log
metrics.py     TensorBoard, timers
tags.py        what each curve in TensorBoard shows
trackers.py    Weights & Biases, MLflow and trackio beside it
profiling.py   a window of steps as a trace
memory.py      the memory that a training is expected to need
validation.py  validation loss, thoughts, sample answers
gap.py         whether thoughts carry their question
checkpoint.py  what training needs to go on, saved and loaded
resume.py      what a training goes on from, and that it is of this very run
"""
