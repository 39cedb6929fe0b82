"""Is this environment fit for training?

examine.py  what each rank finds out about itself and its node
judge.py    from the facts of all ranks to findings, and their table
"""
