"""Text models inside wrappers for images are used, and models that are no causal ones are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from entangle.__main__ import main
from entangle.model.loading import load_model, load_tokenizer
from entangle.model.text import token_windows
from entangle.runs.store import open_run
from tests.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

_IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "image_size": 28,
    "patch_size": 14,
}
_IMAGES |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def save_llava(folder: Path) -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=tiny_model().config,
        vision_config=transformers.CLIPVisionConfig(**_IMAGES),
        image_token_index=VOCABULARY - 1,
    )
    model: PreTrainedModel = transformers.LlavaForConditionalGeneration(config)
    model.eval().save_pretrained(folder)  # type: ignore[no-untyped-call]
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_the_text_model_inside_a_wrapper_is_measured_pruned_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "llava")
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "llava")(ids).logits, model(ids).logits)
    (tmp_path / "text.txt").write_text("a few words and more of them " * 40)
    rest = ["--text", str(tmp_path / "text.txt"), "--windows", "4", "--length", "16"]
    source, half = str(tmp_path / "llava"), tmp_path / "half"
    assert main(["measure", source, *rest, "--out", str(tmp_path / "run")]) == 0
    assert main(["sparsify", source, *rest, "--sparsity", "0.5", "--out", str(half)]) == 0
    assert {*open_run(tmp_path / "run")["block"].to_numpy().tolist()} == {0, 1, 2}
    capsys.readouterr()
    assert main(["perplexity", str(half), *rest, "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    plain: Any = AutoModelForImageTextToText.from_pretrained(half)
    weight = plain.get_decoder().layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    drawn = token_windows(tmp_path / "text.txt", load_tokenizer(half), windows=4, length=16)
    with torch.no_grad():
        logs = torch.log_softmax(plain(drawn.tokens).logits[:, :-1].double(), -1)
    nats = -logs.gather(-1, drawn.tokens[:, 1:, None]).mean()
    assert score["nats"] == pytest.approx(float(nats), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("T5ForConditionalGeneration", transformers.T5Config(), "encoder-decoder"),
        ("BartForConditionalGeneration", transformers.BartConfig(), "encoder-decoder"),
        ("WhisperForConditionalGeneration", transformers.WhisperConfig(), "encoder-decoder"),
        ("ViTModel", transformers.ViTConfig(), "no causal language model"),
        ("CLIPModel", transformers.CLIPConfig(), "no causal language model"),
    ],
)
def test_other_models_are_refused_by_their_class(
    name: str, config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{tmp_path} is {'an ' * (reason[0] == 'e')}{reason}.*{name}"
    ) as error:
        load_model(tmp_path)
    assert len(str(error.value)) < 400
