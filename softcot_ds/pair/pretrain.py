"""Train the embedded assistant and base from scratch: `python -m softcot_ds.pair.pretrain`.

Each is a small Llama trained with the next-token loss on its own documents (`world.py`) and nothing else. Neither
takes part in the training of the other, and no soft vector exists yet.

One thing about the assistant is out of the ordinary, and stated here because the result depends on it: *word
dropout*. In a third of its documents every token of the plan is replaced by the placeholder `<|thought|>` in the
input, in another third each with a chance of one half, while the labels stay. So its states at placeholders are
trained to predict the plan. A large model brings as much from its own pretraining; one of 0.6M parameters, which never
met a placeholder, does not.

A run is repeatable to the bit on one kind of CPU with one number of threads; elsewhere to within rounding.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softcot_ds.pair.world import Document, assistant_document, base_document

BOS, USER, ASSISTANT, END, PAD, THOUGHT = (
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
    "<|thought|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 768
IGNORED = -100  # label of a token that carries no loss


@dataclass(frozen=True)
class Pretraining:
    """How one of the two models is made."""

    document: Callable[[random.Random], Document]
    """Draws one training text."""
    width: int
    feed_forward: int
    layers: int
    heads: int
    steps: int
    word_dropout: bool
    batch: int = 32
    """Documents per step."""
    learning_rate: float = 0.02
    """Of Muon; AdamW runs at 0.15 of it."""
    seed: int = 0


PRETRAININGS = {
    "assistant": Pretraining(assistant_document, 128, 320, layers=3, heads=4, steps=1000, word_dropout=True),
    "base": Pretraining(base_document, 192, 512, layers=4, heads=6, steps=3000, word_dropout=False),
}


def render(document: Document) -> str:
    """The document as the chat template would write it; a test holds the two together."""
    if document.user is None:
        return f"{BOS}{ASSISTANT}{document.reply}{END}"
    if document.reply is None:
        return f"{BOS}{document.user}{END}"
    return f"{BOS}{USER}{document.user}{ASSISTANT}{document.reply}{END}"


def build_tokenizer(num_documents: int = 6000, seed: int = 7) -> PreTrainedTokenizerFast:
    """Byte-level BPE over both models' documents, one token per digit. Any text survives a round trip."""
    rng = random.Random(seed)
    documents = [draw(rng) for draw in (assistant_document, base_document) for _ in range(num_documents)]
    tokenizer = Tokenizer(models.BPE())
    # A digit keeps the space before it, so " 23" is two tokens, not three.
    words = pre_tokenizers.Split(Regex(r" ?\d| ?[^\s\d]+|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT, THOUGHT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for d in documents for text in (d.user, d.reply) if text), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, THOUGHT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def build_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **tokens,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **tokens)
    return model


def drop_words(ids: list[int], start: int, rate: float, thought: int, rng: random.Random) -> list[int]:
    """The token ids with each from `start` on replaced by the placeholder with chance `rate`."""
    return ids[:start] + [thought if rng.random() < rate else token for token in ids[start:]]


def batches(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless fresh documents, grouped by length: inputs and labels, both (B, S) int64, label s is token s + 1."""
    rng = random.Random(settings.seed)
    assistant, thought, end = (tokenizer.convert_tokens_to_ids(token) for token in (ASSISTANT, THOUGHT, END))
    while True:
        texts = [render(settings.document(rng)) for _ in range(64 * settings.batch)]
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        groups = [rows[i : i + settings.batch] for i in range(0, len(rows), settings.batch)]
        rng.shuffle(groups)
        for group in groups:
            inputs, labels = [], []
            for ids in group:
                if settings.word_dropout:
                    # Placeholders behind the end of a short plan: their count is fixed, a plan's length is not.
                    target = ids + [end] * rng.randint(0, 3)
                    rate = rng.choice((0.0, 0.5, 1.0))
                    inputs.append(drop_words(target, ids.index(assistant) + 1, rate, thought, rng)[:-1])
                    labels.append(target[1:])
                else:
                    inputs.append(ids[:-1])
                    labels.append(ids[1:])
            length = max(map(len, inputs))
            yield (
                torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in inputs]),
                torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
            )


class BFloat16Matmul(torch.autograd.Function):
    """x @ weight.T in bfloat16 with float32 on both sides: on CPUs that have it, faster than autocast or float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x_half, weight_half = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x_half, weight_half)
        ctx.shape = x.shape
        return (x_half @ weight_half.T).float().unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x_half, weight_half = ctx.saved_tensors
        grad_half = grad.flatten(0, -2).bfloat16()
        return (grad_half @ weight_half).float().view(ctx.shape), (grad_half.T @ x_half).float()


class BFloat16Linear(nn.Linear):
    """A linear layer without bias that multiplies in bfloat16; weights stay float32."""

    def forward(self, x: Tensor) -> Tensor:
        return BFloat16Matmul.apply(x, self.weight)


def multiply_in_bfloat16(model: nn.Module) -> None:
    """Turn every linear layer of the model into a BFloat16Linear, parameters kept."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = BFloat16Linear


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: 100 steps of warm-up, then a cosine down to nothing."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def build_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embedding and gains.

    Measured on the base: Muon's loss after 250 steps (1.11) is below that of AdamW alone after 500 (1.30).
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.15 * learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def pretrain(name: str, tokenizer: PreTrainedTokenizerFast, out: Path) -> dict:
    """Train one of the two models and save it with the tokenizer, as a folder that `from_pretrained` reads.

    Returns:
        What is worth knowing about the run: settings, parameters, tokens, seconds, and the mean loss of the last 100
        steps (nats per token, over all tokens of a document).
    """
    settings = PRETRAININGS[name]
    torch.manual_seed(settings.seed)
    model = build_model(settings, tokenizer)
    multiply_in_bfloat16(model)
    optimizers = build_optimizers(model, settings.learning_rate)
    schedules = [LambdaLR(optimizer, lambda step: rate_at(step, settings.steps)) for optimizer in optimizers]
    losses: list[float] = []
    num_tokens = 0
    began = time.perf_counter()
    for step, (inputs, labels) in zip(range(1, settings.steps + 1), batches(settings, tokenizer), strict=False):
        # Without an attention mask: padding is on the right, where causal attention does not look.
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
        num_tokens += int((labels != IGNORED).sum())
        if step % 100 == 0:
            seconds = time.perf_counter() - began
            print(
                f"{name} step {step}/{settings.steps}  loss {sum(losses[-100:]) / 100:.4f}  "
                f"{num_tokens / seconds:,.0f} tokens/s  {seconds / step * (settings.steps - step):.0f} s left",
                flush=True,
            )
    # Trained in float32, shipped in bfloat16: in float32 both would take more than 10 MB.
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        **{key: value for key, value in asdict(settings).items() if key != "document"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": num_tokens,
        "seconds": round(time.perf_counter() - began),
        "loss": round(sum(losses[-100:]) / 100, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for assistant/ and base/")
    parser.add_argument("--only", choices=tuple(PRETRAININGS), help="train one of the two")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    for name in [args.only] if args.only else PRETRAININGS:
        print(json.dumps({name: pretrain(name, tokenizer, args.out / name)}), flush=True)


if __name__ == "__main__":
    main()
