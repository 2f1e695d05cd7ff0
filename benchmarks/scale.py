"""Costs of a model that is run block by block: a random Llama of 1.2 billion weights.

`measure` and `sparsify` run as commands, each in its own process, with 16 and with 128 windows. Their
costs are compared with those that `plan` expects. It takes half an hour on two cores, 8 GB of disk
and 3 GB of memory:

    python -m benchmarks.scale FOLDER [WINDOWS...]
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import entangle
from benchmarks.timing import machine

DATA = Path(__file__).parents[1] / "data"
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
COMMANDS: dict[str, list[str]] = {
    "measure": [],
    "sparsify": ["--sparsity", "0.5"],
}


def main() -> None:
    """Run the benchmark in a folder, keep the model in it, and print the table."""
    folder = Path(sys.argv[1])
    model = made(folder / "llama-1.2b")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(machine(), f"{size / 1e9:.2f} GB of weights on disk", sep="; ", end="\n\n")
    print("| command | windows | peak memory, GB: measured | planned | minutes | planned |")
    print("|---|---|---|---|---|---|")
    for windows in map(int, sys.argv[2:] or ["16", "128"]):
        text = ["--text", str(DATA / "python-docs"), "--windows", str(windows)]
        text += ["--offload", str(folder / "offloaded")]
        expected = run("plan", str(model), *text, *COMMANDS["sparsify"], "--json")
        for command, options in COMMANDS.items():
            out = folder / f"{command}-{windows}"
            begin = time.perf_counter()
            run(command, str(model), *text, *options, "--out", str(out), "--overwrite")
            minutes = (time.perf_counter() - begin) / 60
            log = json.loads((out / "log.json").read_text())
            stage = next(one for one in expected["stages"] if one["command"] == command)
            print(
                f"| {command} | {windows} | {log['peak_memory_bytes'] / 1e9:.2f} | "
                f"{stage['memory_bytes'] / 1e9:.2f} | {minutes:.1f} | "
                f"{stage['seconds'] / 60:.1f} |",
                flush=True,
            )


def made(folder: Path) -> Path:
    """Return the folder of the model, after making it if it does not exist."""
    if not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES)
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        partial = folder.with_suffix(".partial")
        model.save_pretrained(partial)
        entangle.load_tokenizer(DATA / "smollm2-135m").save_pretrained(partial)
        partial.rename(folder)
    return folder


def run(*arguments: str) -> dict[str, Any]:
    """Run a command; return the JSON that it prints, empty without --json."""
    done = subprocess.run(
        [sys.executable, "-m", "entangle", *arguments], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout) if "--json" in arguments else {}
    return found


if __name__ == "__main__":
    main()
