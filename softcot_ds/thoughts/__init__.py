"""The thought cache: the assistant's states on disk.

manifest.py    what a cache is: identity, manifest, names
store.py       its shards, their reader and writer
reader.py      the thoughts that a job reads: the cache of a recipe, found and opened
moments.py     mean and covariance of the states, kept beside them
builder.py     what the ranks do to fill a cache
computing.py   computing a recipe's thoughts with its assistant: what is missing, or a sample again
inspection.py  whether a cache is whole, and what may go
anatomy.py     what of thoughts is the same for all questions, and what varies with them
ranks.py       the processes of a build
"""
