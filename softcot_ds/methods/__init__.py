"""What is trained.

base.py           what every projection is, and reading one's weights
softcot.py        SoftCoT's linear layer, and the module around the fused kernel
prompt_tuning.py  free vectors, the same for every question: the baseline
"""
