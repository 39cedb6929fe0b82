"""What stands in for decoding and for losses where the model does not matter."""

import random
from types import SimpleNamespace

import torch

from softcot_ds.evaluation import decoder, jobs, losses, nearest, report_page
from softcot_ds.models.decoding import Output
from softcot_ds.models.scoring import Score


class Scribe:
    """Stands in for decoding: writes what depends on the prompt, the thoughts and the seed, and notes it."""

    ENDINGS = (("answer 7", False), ("answer 7 .", True), ("answer 7", True), ("so it is", False), ("so", True))

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.batches = []
        self.scored = []

    @property
    def num_prompts(self):
        return sum(len(batch) for batch in self.batches)

    def ending(self, prompt):
        return self.ENDINGS[sum(prompt.prefix_ids) % len(self.ENDINGS)]

    def __call__(self, model, prompts, thoughts, stop_ids, sampling, table, batch_size, seeds, samples, drafter):
        self.batches.append(list(prompts))
        outputs = []
        for number, seed in enumerate(seeds):
            index = number // samples
            prompt = prompts[index]
            text, cut = self.ending(prompt)
            told = 0.0 if thoughts is None else float(thoughts[index].double().sum())
            chance = random.Random(seed).randrange(10**6) if sampling.temperature else 0
            outputs.append(Output(self.tokenizer.encode(f"{told:.3f} {chance} {text}", add_special_tokens=False), cut))
        return outputs

    def read_shared(self, prompts):
        return None

    def scores(self, prompts, thoughts, texts, shared, table):
        self.scored.append(list(prompts))
        told = torch.zeros(len(prompts)) if thoughts is None else thoughts.double().sum(dim=(1, 2))
        given = zip(prompts, texts, told.tolist(), strict=True)
        return [Score(sum(prompt.prefix_ids) + len(text) + one, False) for prompt, text, one in given]

    def read_whole_rows(self):
        pass


def replace_decoding(monkeypatch, scribe):
    """Losses too, the tokens that thoughts are nearest to, and the figures of the report's page, which take a tenth of
    a second each."""
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(len(scribe.tokenizer), 1))
    monkeypatch.setattr(decoder, "decode", scribe)
    monkeypatch.setattr(decoder, "try_decoding", lambda model: None)
    monkeypatch.setattr(jobs, "load_to_run", lambda *_: model)
    monkeypatch.setattr(losses, "load_scorer", lambda *_: scribe)
    monkeypatch.setattr(report_page, "drawn", no_figure)
    monkeypatch.setattr(nearest, "nearest_tokens", lambda model, thoughts: [[(7, 0.5)] * len(of) for of in thoughts])


def no_figure(*_):
    return "<svg></svg>"
