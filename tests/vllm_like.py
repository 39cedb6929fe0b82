"""What plays a vLLM server on this machine, with the embedded base: as vLLM 0.32 does, its mistake with caches too.

Texts become tokens by the base's tokenizer, and answers by transformers' own ``generate``: nothing of ours decodes.
"""

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jinja2 import Environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from softcot_ds.values import resolve_location

BASE = resolve_location("package:pair/base")
MARK = "<prompt_embeds>"
SAYS = {
    "embeds": "You must set `--enable-prompt-embeds` to input `prompt_embeds`",
    "template": "Chat template is passed with request, but --trust-request-chat-template is not set.",
}


class Vllm(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.state: State = self.server.state

    def do_GET(self):
        state = self.state
        state.got += 1
        if state.key and self.headers["Authorization"] != f"Bearer {state.key}":
            return self.reply({"error": "Unauthorized"}, 401)
        model = {"id": "base", "root": state.root, "parent": None, "max_model_len": state.context}
        self.reply({"data": [model]} if self.path == "/v1/models" else {"version": "0.32.0"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        with state.lock:
            state.asked.append(asked)
            fault = state.faults.pop(0) if state.faults else None
            if len(state.asked) > state.lives:
                fault = "closes"
            if fault == "closes":
                self.close_connection = True
                return
            if isinstance(fault, int):
                return self.refuse("EngineCore died", fault)
            if "messages" in asked:
                for flag, said in SAYS.items():
                    if flag in state.without:
                        return self.refuse(said)
            answer = state.answer(asked, "messages" in asked)
            if fault == "abort":  # it is being ended
                choice = answer["choices"][0]
                choice |= {"token_ids": choice["token_ids"][:2], "finish_reason": "abort"}
            self.reply(answer)

    def refuse(self, message, code=400):
        self.reply({"error": {"message": message, "code": code}}, code)

    def reply(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class State:
    """What the server is, and what it is to do wrong."""

    def __init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
        self.model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        self.root, self.context, self.key = BASE, 512, None
        self.without: set[str] = set()
        self.first_ids: list[int] = []
        self.lives = float("inf")
        """It dies at the request after so many."""
        self.faults: list[int | str | None] = []
        self.asked: list[dict] = []
        self.got = 0
        self.lock = threading.Lock()
        self.cache: dict[tuple, torch.Tensor] = {}

    def answer(self, asked, is_chat):
        embed = self.model.get_input_embeddings()
        if is_chat:
            ids, embeds = self.read(asked, embed)
        else:
            ids, embeds = asked["prompt"], embed(torch.tensor(asked["prompt"]))
        # Issue 56655: what was read before is found by tokens and salt alone.
        embeds = self.cache.setdefault((asked.get("cache_salt"), *ids), embeds)
        torch.manual_seed(asked["seed"] % 2**32)
        drawn = {"do_sample": True, "temperature": asked["temperature"], "top_k": 0, "top_p": asked["top_p"]}
        written = self.model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=asked["max_tokens"],
            eos_token_id=asked["stop_token_ids"] or [10**6],
            pad_token_id=0,
            **(drawn if asked["temperature"] else {"do_sample": False}),
        )[0].tolist()
        ended = written[-1] in asked["stop_token_ids"]
        choice = {"token_ids": written, "finish_reason": "stop" if ended else "length", "prompt_token_ids": ids}
        return {"choices": [choice], **({"prompt_token_ids": ids} if is_chat else {})}

    def read(self, asked, embed):
        """Of a chat message: its tokens, in which a mark stands for each thought, and what the model reads."""
        thoughts, parts = [], []
        for part in asked["messages"][0]["content"]:
            if part["type"] == "prompt_embeds":
                thoughts = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True).float()
            parts.append({"text": MARK if part["type"] == "prompt_embeds" else part["text"]})
        text = Environment().from_string(asked["chat_template"]).render(messages=[{"content": parts}])
        ids = self.first_ids + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        place = ids.index(self.tokenizer.convert_tokens_to_ids(MARK))
        left, right = (embed(torch.tensor(part, dtype=torch.long)) for part in (ids[:place], ids[place + 1 :]))
        return ids[:place] + [ids[place]] * len(thoughts) + ids[place + 1 :], torch.cat([left, thoughts, right])


@contextmanager
def served() -> Iterator[tuple[str, State]]:
    """The address of a server, for a while, and what it is."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vllm)
    server.state = State()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.state
    finally:
        server.shutdown()
        server.server_close()
