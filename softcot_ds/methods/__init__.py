"""What is trained, and the step that trains it.

base.py           what every projection is, and reading one's weights
conditioning.py   states as a projection is trained on them: centred or whitened
softcot.py        SoftCoT's linear layer, and the module around the fused kernel
prompt_tuning.py  free vectors, the same for every question: the baseline
soft_thoughts.py  the step: from a batch to the loss
trial.py          is a model fit for the step, for the assistant: tried on its weights
"""
