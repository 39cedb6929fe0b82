"""Runs a command beside a vLLM server on the CPU, whose address the command finds in SOFTCOT_VLLM_SERVER:

python tests/with_vllm.py PYTHON_OF_VLLM MODEL_FOLDER DTYPE COMMAND ...
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

PATIENCE_S = 600
FLAGS = "--host 127.0.0.1 --enforce-eager --max-model-len 2048 --max-num-seqs 32"
FLAGS += " --enable-prompt-embeds --trust-request-chat-template"
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
SETTINGS |= {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": str(os.cpu_count())}


def main(python: str, model: str, dtype: str, *command: str) -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Not `vllm serve`: that of vllm-cpu 0.32 asks for the version of a package vllm, and there is none.
    serve = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--dtype",
        dtype,
        "--port",
        str(port),
        *FLAGS.split(),
    ]
    server = subprocess.Popen(serve, env=ours | SETTINGS, stdout=sys.stderr)
    try:
        url, began = f"http://127.0.0.1:{port}", time.monotonic()
        while not healthy(url):
            if server.poll() is not None or time.monotonic() - began > PATIENCE_S:
                print("with_vllm: the server did not start; its own lines above say why", file=sys.stderr)
                return 1
            time.sleep(1)
        return subprocess.run(command, env=os.environ | {"SOFTCOT_VLLM_SERVER": url}).returncode
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def healthy(url: str) -> bool:
    open_ = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # localhost is behind no proxy
    try:
        return open_(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
