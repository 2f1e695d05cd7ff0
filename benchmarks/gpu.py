"""Speed on a GPU, beside the goals. Run `python benchmarks/gpu.py` (a few minutes on one card).

Nothing is downloaded: models of known shapes get random weights on the card. The card's results are
compared with the CPU's. A part whose results differ beyond the limits below has no row, and the
command then ends with 1. The sizes are arguments of each part, so that
`tests/test_benchmarks_gpu.py` runs all parts without a card.
"""

import copy
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a file: Python looks for modules in its folder, not in the root
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import PreTrainedModel

import entangle
from benchmarks.gpu_experts import mixture_prompt, mixture_token, packed_token, writing
from benchmarks.gpu_results import Result, Shape, built, compared
from benchmarks.prune import Cases, problem, published
from benchmarks.timing import forward, machine, side_by_side
from entangle.model.hashing import weights_hash
from entangle.model.hooks import recording_rows
from entangle.model.layers import find_layers
from entangle.model.sides import Recordable
from entangle.model.text import TokenWindows
from entangle.numerics.histograms import Histograms
from entangle.numerics.masks import prune
from entangle.numerics.moments import InputMoments, output_energy
from entangle.numerics.routing import fit_router
from entangle.numerics.sparsity import Sparsity

SEVEN: Shape = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
SMOLLM2: Shape = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MATRICES = [(4096, 4096), (11_008, 4096), (4096, 11_008)]  # neurons, inputs: those of a 7B block
EXPERTS = 16
SPARSITY = Sparsity(0.5)
ROUNDS = 3  # of the parts that take long; the others have the usual number

COMPARED = 512  # rows of each layer that the CPU counts too
MOVED = 1e-3  # largest share of the mask's places that may differ from the CPU's
CLOSE = 1e-4  # largest relative difference of the layer's error from the CPU's


Part = Callable[[], list[Result]]


def main() -> None:
    """Run the benchmark on the card and print its table.

    Raises:
        SystemExit: torch finds no card (2), or a result differs from the CPU's (1).
    """
    if not torch.cuda.is_available():
        print(
            f"benchmarks/gpu.py needs a GPU, and torch {torch.__version__} finds none on this "
            "machine: run it where torch.cuda.is_available() is true",
            file=sys.stderr,
        )
        raise SystemExit(2)
    begin = time.perf_counter()
    print(f"{card()}; {machine()}", end="\n\n")
    agrees = table(parts(torch.device("cuda")))
    print(f"\nThe table took {time.perf_counter() - begin:.0f} s.")
    if not agrees:
        raise SystemExit(1)


def table(parts: Sequence[Part]) -> bool:
    """Run the parts and print their rows; return whether all results agree with the CPU's."""
    agrees = True
    print("| on the card | measured | goal | least | verdict | from |")
    print("|---|---|---|---|---|---|")
    for part in parts:
        try:
            print(*part(), sep="\n", flush=True)  # at once: an error later loses no row
        except AssertionError as difference:
            agrees = False
            print(f"| WRONG: {difference} | | | | | |", flush=True)
        gc.collect()  # modules are in cycles, and the next part would find less memory
    return agrees


def parts(device: torch.device) -> list[Part]:
    """Return the parts of the benchmark with the sizes of its goals."""
    block = SEVEN | {"num_hidden_layers": 1}
    return [
        partial(recording, "7B shape", SEVEN, 4, 2048, device, 1.35, 1.6),
        partial(recording, "SmolLM2's shape", SMOLLM2, 64, 512, device, 1.5, 2),
        partial(pruning, MATRICES, device),
        partial(expert_pruning, *MATRICES[0], EXPERTS, device),
        partial(router, SEVEN["intermediate_size"], 16_384, EXPERTS, device),
        partial(sparsifying, block, 32, 2048, 1, device, 1.5, 3),
        partial(sparsifying, block, 32, 2048, EXPERTS, device, 10, 20),
        partial(hashing, SEVEN, device),
        partial(packed_token, MATRICES, device),
        partial(mixture_token, *MATRICES[1], EXPERTS, device),
        partial(mixture_prompt, *MATRICES[1], EXPERTS, 4096, device),
        partial(writing, SMOLLM2, EXPERTS, 64, device),
    ]


def card() -> str:
    """Return the card's name and memory, and the versions of its software."""
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    found = importlib.util.find_spec("triton") is not None
    triton = importlib.import_module("triton").__version__ if found else "is not installed"
    software = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name()}, {memory:.0f} GB, {software}, Triton {triton}"


def random_tokens(model: PreTrainedModel, windows: int, length: int) -> torch.Tensor:
    """Return random tokens (windows, length) on the host."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (windows, length), generator=generator)


def recording(
    name: str,
    shape: Shape,
    windows: int,
    length: int,
    device: torch.device,
    goal: float,
    least: float,
) -> list[Result]:
    """Compare one batch through a model, recorded at all layers, with a plain forward pass."""
    model = built(shape, device)
    tokens = random_tokens(model, windows, length).to(device)
    check_recording(model, tokens)
    twin = copy.deepcopy(model)  # so that the hooks of one do not slow down the other
    with entangle.record(twin):
        forward(twin, tokens)  # the pilot
        seconds = side_by_side(
            {"plain": partial(forward, model, tokens), "recorded": partial(forward, twin, tokens)}
        )
    title = f"recording all layers, {name}, {windows} windows of {length}, times a plain forward"
    times = seconds["recorded"] / seconds["plain"]
    return [Result(title, times, goal, least, compared(seconds))]


def check_recording(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Count a sample of each layer's rows on the device and on the host, and compare the integers."""

    def compare(layer: Recordable, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        on_card = Histograms.zeros(layer.neurons, device=rows.device)
        on_card.start(rows, places)
        on_host = on_card.to(torch.device("cpu"))
        sample = rows[:: max(len(rows) // COMPARED, 1)].clone()
        sample[::64] *= 100  # into the tails
        on_card.add(sample)
        on_host.add(sample.cpu().float())
        check_integers(layer.name, on_card, on_host)

    with recording_rows(model, find_layers(model), compare):
        forward(model, tokens)


def check_integers(name: str, on_card: Histograms, on_host: Histograms) -> None:
    """Compare all integers of the states of a layer's neurons."""
    for field, expected in on_host.tensors().items():
        if not expected.is_floating_point():
            different = int((getattr(on_card, field).cpu() != expected).sum())
            assert not different, (
                f"{name}: {different} of {expected.numel()} {field} differ from the CPU's"
            )


def hashing(shape: Shape, device: torch.device) -> list[Result]:
    """Time the hash of a model's weights."""
    model = built(shape, device)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    seconds = side_by_side({"hash": partial(weights_hash, model)}, ROUNDS)["hash"]
    details = f"{seconds:.3g} s for {size:.3g} GB"
    return [Result("the weights' hash, s per GB", seconds / size, 0.3, 0.3, details)]


def pruning(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Result]:
    """Compare SparseGPT with the published algorithm, summed over matrices of these shapes."""
    theirs, ours, details = 0.0, 0.0, []
    for neurons, inputs in shapes:
        weight, moments = problem(neurons, inputs, device=device)
        cases: Cases = {
            "published": partial(published, weight, moments.gram, SPARSITY),
            "ours": partial(prune, weight, moments, SPARSITY),
        }
        seconds = side_by_side(cases, ROUNDS)
        theirs, ours = theirs + seconds["published"], ours + seconds["ours"]
        details.append(f"{neurons} x {inputs}: {compared(seconds)}")
        check_pruned(prune(weight, moments, SPARSITY).weight, weight, moments)
    title = "SparseGPT at 50%, sum over matrices, times faster than published"
    return [Result(title, theirs / ours, 25, 15, "; ".join(details))]


def expert_pruning(neurons: int, inputs: int, experts: int, device: torch.device) -> list[Result]:
    """Compare several experts of one matrix with as many times the published algorithm."""
    weight = problem(neurons, inputs, device=device)[0]
    each = [problem(neurons, inputs, seed, device=device)[1] for seed in range(experts)]
    moments = InputMoments.stack(each)
    cases: Cases = {
        "published": partial(published, weight, each[-1].gram, SPARSITY),
        "ours": partial(prune, weight, moments, SPARSITY),
    }
    seconds = side_by_side(cases, ROUNDS)
    seconds["published"] *= experts
    check_pruned(prune(weight, moments, SPARSITY).weight[-1], weight, each[-1])
    title = f"{experts} experts of {neurons} x {inputs}, times faster than {experts} x published"
    times = seconds["published"] / seconds["ours"]
    return [Result(title, times, 50, 30, compared(seconds))]


def check_pruned(pruned: torch.Tensor, weight: torch.Tensor, moments: InputMoments) -> None:
    """Prune by the same moments on the host, and compare the counts, places and error."""
    of_host = InputMoments(moments.lower.cpu(), moments.count.cpu())
    host = prune(weight.cpu(), of_host, SPARSITY).weight.to(weight.device)
    ours, theirs = pruned == 0, host == 0
    rows = int((ours.sum(dim=1) != theirs.sum(dim=1)).sum())
    assert not rows, f"{rows} of {len(weight)} rows have another number of zeros than the CPU's"
    moved = float((ours != theirs).double().mean())
    assert moved <= MOVED, (
        f"{moved:.3%} of the mask's places differ from the CPU's, limit {MOVED:.1%}"
    )
    error, expected = (float(output_energy(weight - one, moments).sum()) for one in (pruned, host))
    away = abs(error / expected - 1)
    assert away <= CLOSE, f"the error differs by {away:.2g} of the CPU's, limit {CLOSE:g}"


def router(inputs: int, tokens: int, experts: int, device: torch.device) -> list[Result]:
    """Time the fit of a router to rows around centres, whose inputs have unequal variances."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    chosen = torch.randint(4 * experts, (tokens,), generator=generator, device=device)
    rows = (draw(4 * experts, inputs)[chosen] + draw(tokens, inputs)) * draw(inputs)
    seconds = side_by_side({"": partial(fit_router, rows, experts)}, ROUNDS)[""]
    title = f"a router, {experts} experts, {inputs:,} inputs, {tokens:,} rows, s"
    return [Result(title, seconds, 0.5, 2, "")]


def sparsifying(
    shape: Shape,
    windows: int,
    length: int,
    experts: int,
    device: torch.device,
    goal: float,
    least: float,
) -> list[Result]:
    """Time `sparsify` of a model of this shape on random tokens, and the card's peak memory.

    A first call on a few windows is not timed: it compiles the kernels.
    """
    model = built(shape, device)
    tokens = random_tokens(model, windows, length)
    text = TokenWindows(tokens, "random tokens", available=None, seed=0, bos="never")
    run = partial(entangle.sparsify, sparsity=SPARSITY.share, experts=experts)
    run(copy.deepcopy(model), text[: max(windows // 8, 1)])
    gc.collect()  # modules are in cycles, and what they keep would count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    found = run(model, text)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 1e9  # 0 without a card
    what = f"`sparsify`, {shape['num_hidden_layers']} block, {tokens.numel():,} tokens, "
    what += f"{experts} expert{'s' if experts > 1 else ''}"
    # A cluster of few tokens is merged with another one, so there may be fewer.
    details = f"mean {found.layers['clusters'].mean():.3g} a layer" if experts > 1 else ""
    return [
        Result(f"{what}, s", seconds, goal, least, details),
        Result(f"{what}, peak memory of tensors, GB", peak, 24, 24, ""),
    ]


if __name__ == "__main__":
    main()
