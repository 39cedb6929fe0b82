"""Accuracy with controls.

run.py         the story of an evaluation
conditions.py  what stands for the thoughts
strategies.py  how an answer is reached
decoder.py     problems decoded over the ranks, kept on disk batch by batch
report.py      from outputs to the table, and which report is the run's
statistics.py  intervals and paired tests
"""
