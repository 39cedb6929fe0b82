"""What takes seconds to import, for the process that forked.py forks ranks from."""

# ruff: noqa: F401
import deepspeed.runtime.zero.muon.original_muon  # which an engine imports, and with it PyTorch's compiler
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama

import softcot_ds.evaluation.report_page
import softcot_ds.inference
import softcot_ds.training.loop
