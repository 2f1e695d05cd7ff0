"""What an arm of an ablation costs: 20 arms beside 2, and beside one evaluation: `make bench`.

Each layer is pruned once for all arms, so that an arm is to cost one evaluation and no more.
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
MOST = 1.3  # evaluations that an arm more may cost


def main() -> None:
    """Run all of it."""
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
        assert arm <= MOST * seconds["evaluation"], f"an arm costs {arm} s"


if __name__ == "__main__":
    main()
