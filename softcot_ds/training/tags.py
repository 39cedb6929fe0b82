"""The tags of a run's curves in TensorBoard: what each is, and which of them belong on one chart."""

DESCRIPTIONS = {
    "loss/train": "What training minimises, mean over the steps since the last point. Cross entropy is in nats per "
    "token of the solutions.",
    "loss/language_model": "The part of the loss that is cross entropy, nats per token of the solutions.",
    "loss/contrastive": "The part of the loss that keeps the sets of thoughts of a question apart (SoftCoT++).",
    "loss/validation": "Cross entropy of the validation problems' solutions, nats per token.",
    "loss/validation_shuffled": "The same with another question's thoughts: where it is as low, thoughts carry nothing "
    "of their question.",
    "loss/validation_gap": "loss/validation_shuffled less loss/validation: what the question's own thoughts are worth, "
    "nats per token.",
    "loss/validation_gap_margin": "Half the width of the gap's 95% interval over the problems: a gap that is larger is "
    "no chance.",
    "optimizer/learning_rate": "Of the newest step.",
    "optimizer/gradient_norm": "L2 norm of the newest step's gradient, before it is clipped. Not finite: the step was "
    "skipped.",
    "optimizer/skipped_steps": "Steps so far whose gradient was not finite; the weights stayed as they were.",
    "throughput/tokens_per_second": "Tokens read in training, by all ranks together; without padding.",
    "throughput/tokens_per_second_per_rank": "The same of one rank.",
    "throughput/samples_per_second": "Training problems, by all ranks together.",
    "throughput/mfu": "Model FLOPs utilisation: operations of the model, by what the GPU does at most.",
    "step_time_ms/data": "Milliseconds of a step in which its batches are made.",
    "step_time_ms/forward": "Milliseconds of a step in its forward passes.",
    "step_time_ms/backward": "Milliseconds of a step in its backward passes.",
    "step_time_ms/optimizer": "Milliseconds of a step in the optimizer, and in adding up gradients over the ranks.",
    "memory/peak_gib": "The most that rank 0 has held so far, GiB: tensors on its GPU, or without one the process.",
    "thoughts/norm": "Mean length of the thoughts as the base reads them, of some validation problems.",
    "thoughts/token_embedding_norm": "Mean length of the base's token embeddings, to compare.",
    "thoughts/cosine_to_nearest_token": "Mean cosine of a thought to the token embedding that is nearest in direction: "
    "1 where thoughts are words.",
    "thoughts/cosine_between_chains": "Mean cosine of two sets of thoughts of one question: 1 where they are the same.",
    "thoughts/constant_norm": "Length of what is the same for all questions in each thought, root mean square.",
    "thoughts/varying_norm": "Length of what varies with the question, root mean square.",
    "thoughts/question_share": "The part of the thoughts' variance that comes from the question, not from the slot.",
}
"""What a curve shows, as TensorBoard says it beside its name."""

CHARTS = {
    "loss": {
        "training and validation": ["Multiline", ["loss/train", "loss/validation$", "loss/validation_shuffled"]],
    },
    "accuracy": {
        "by condition": ["Multiline", ["accuracy/"]],
    },
    "thoughts": {
        "length, beside token embeddings": ["Multiline", ["thoughts/norm$", "thoughts/token_embedding_norm"]],
    },
}
"""For the tab of custom scalars, by category: tags, regular expressions, that are drawn into one chart."""

METRICS = ("accuracy/learned", "loss/validation", "loss/train")
"""What runs are compared by; the first is there once the run is evaluated."""

VARIED = ("method", "projection.condition", "seed", "thoughts.count", "training.learning_rate")
"""What runs are most likely to differ in: as many settings as TensorBoard shows before it is asked for more."""
