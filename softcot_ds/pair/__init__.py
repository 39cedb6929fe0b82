"""The embedded pair: two tiny models that make demo trains with.

world.py     the generated problems, and what each model knows of them
pretrain.py  how both models were made
"""
