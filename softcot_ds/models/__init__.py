"""The frozen models: how they are loaded, held and run.

model_files.py    a model's files: where they are, downloaded once, checked
backbone.py       loading, configurations, fingerprints
loading.py        lines that tell how far a model is loaded
partition.py      how weights are held: whole, split by ZeRO-3, in slices; DeepSpeed's configuration
slices.py         models in slices, tried first on small ones
limits.py         how far ahead ZeRO-3 gathers, from the sizes of the layers
quantized.py      linear layers held in 8 or 4 bits
low_rank.py       low-rank matrices beside linear layers, as PEFT has them
embedding.py      what tokens look like to a model, asked of its own module; those of the data, kept at hand
shared_prefix.py  what all rows begin with, read once
assistant.py      running the assistant: the states at the placeholders
chain.py          passes over rows that grow, with gradient through what was read before
layer_states.py   what each layer hands on, and layers that are trained apart
places.py         where in its rows a pass is, told to a model with other weights at each place
frozen_prefix.py  the base's prefix without gradient, layer by layer
fused_layers.py   norms, rotary embeddings and SwiGLUs by liger-kernel's kernels
loss.py           cross entropy, alone or fused with the head
decoding.py       decoding with thoughts in the prompt, each model in the way that a trial finds
server.py         the same by a vLLM server, over HTTP
refill.py         waiting prompts take the place of outputs that have ended; what they have in common is read once
rows.py           rows that are decoded together: what each has written, their keys and values
drafting.py       the assistant writes ahead of the base
reading.py        prompts as a model reads them: padded, thoughts in place
sampling.py       which token comes next, by random numbers of the output's own; which drafts are accepted
scoring.py        losses of texts after prompts with thoughts
operations.py     how many operations a step takes
toy.py            a small model made from a configuration, to try what is not loaded yet
"""
