"""Cost of an arm of an ablation: 2 and 20 arms compared with one evaluation. Run `make bench`.

Each layer is pruned once for all arms, so a further arm should cost one evaluation.
"""

from functools import partial
from pathlib import Path

import entangle
from benchmarks.timing import machine, side_by_side

DATA = Path(__file__).parents[1] / "data"
WINDOWS, EVALUATION = 8, 4  # windows of 512 tokens
LAYERS = ["*.mlp.*"]
SHARE = 0.03
FEW, MANY = 2, 20  # arms
MOST = 1.3  # evaluations that a further arm may cost


def main() -> None:
    """Run the benchmark and print its tables."""
    print(machine(), end="\n\n")
    name = DATA / "smollm2-135m"
    model, tokenizer = entangle.load_model(name), entangle.load_tokenizer(name)
    text = DATA / "python-docs"
    windows = entangle.token_windows(text, tokenizer, windows=WINDOWS)
    held_out = entangle.token_windows(text, tokenizer, windows=EVALUATION, purpose="evaluation")
    run = entangle.measure(model, windows, layers=LAYERS)
    for experts in (1, 4):
        cases = {
            arms: partial(
                entangle.ablate,
                model,
                windows,
                held_out,
                run=run,
                share=[SHARE],
                experts=[experts],
                sets=["random"],
                seeds=arms,
                layers=LAYERS,
            )
            for arms in (FEW, MANY)
        }
        seconds = side_by_side(
            {
                "evaluation": partial(entangle.perplexity, model, held_out),
                "few": cases[FEW],
                "many": cases[MANY],
            },
            rounds=1,
        )
        arm = (seconds["many"] - seconds["few"]) / (MANY - FEW)
        print(
            f"| {experts} expert{'s' if experts > 1 else ''}, {LAYERS[0]} | seconds | evaluations |"
        )
        print("|---|---|---|")
        print(f"| one evaluation | {seconds['evaluation']:.4g} | 1.00 |")
        for name_, arms in (("few", FEW), ("many", MANY)):
            ratio = seconds[name_] / seconds["evaluation"]
            print(f"| {arms} arms | {seconds[name_]:.4g} | {ratio:.2f} |")
        print(f"| an arm more | {arm:.4g} | {arm / seconds['evaluation']:.2f} |\n", flush=True)
        limit = MOST * seconds["evaluation"]
        assert arm <= limit, f"a further arm costs {arm:.4g} s, limit {limit:.4g} s"


if __name__ == "__main__":
    main()
