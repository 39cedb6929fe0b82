"""What is trained, and the step that trains it.

base.py           what a method is: all that the rest of the package knows of what is trained
soft_thoughts.py  the step of methods that train a projection in front of a frozen base
projection.py     what every projection is, and reading one's weights
conditioning.py   states as a projection is trained on them: centred or whitened
softcot.py        SoftCoT's linear layer, and the module around the fused kernel
softcot_pp.py     SoftCoT++: several sets of thoughts for a question, and the loss that keeps them apart
initial.py        what the assistant reads at placeholders in each of these
prompt_tuning.py  free vectors, the same for every question: the baseline
trained_base.py   the step of methods that train the base, or beside its weights, without thoughts
thinking.py       the base's own states as thoughts: what methods share that give them back to it
full_step.py      one pass over whole rows with gradient: what steps share that do no less
lora.py           low-rank matrices beside frozen weights, as PEFT has them: a baseline
full.py           all weights of the base: a baseline, and what it forgets
trial.py          is a model fit for the step, for the assistant: tried on its weights
"""
