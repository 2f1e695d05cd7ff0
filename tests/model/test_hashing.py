"""A hash tells models apart by their weights alone, and knows the hashes of older versions."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import nn

from entangle.model import hashing
from entangle.model.hashing import KIND, UNNAMED, kind_of, weights_hash
from entangle.model.loading import load_model
from tests.tiny_models import save_tiny, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(folder)
    return folder


def bytes_of(model: nn.Module) -> bytes:
    """Names, dtypes, shapes and bytes of all parameters, sorted by name."""
    found = b""
    for name, value in sorted(model.named_parameters()):
        found += f"{name} {value.dtype} {tuple(value.shape)}".encode()
        found += value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [8, 100, 2**26])
def test_each_kind_of_hash_is_that_of_all_bytes_in_one_stream(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_PIECE", piece)
    model: Any = tiny_model("gpt2", dtype=dtype)
    layer = model.transformer.h[1].mlp
    layer.c_fc.weight = nn.Parameter(layer.c_fc.weight.detach().T.contiguous().T)
    assert not layer.c_fc.weight.is_contiguous()
    layer.scale = nn.Parameter(torch.tensor(3.0, dtype=dtype))
    layer.none = nn.Parameter(torch.zeros(0, 4, dtype=dtype))
    assert weights_hash(model) == f"xxh3-128:{xxhash.xxh3_128_hexdigest(bytes_of(model))}"
    assert weights_hash(model, UNNAMED) == hashlib.sha256(bytes_of(model)).hexdigest()


def test_a_hash_tells_its_kind() -> None:
    model = tiny_model()
    for kind in (KIND, UNNAMED):
        assert kind_of(weights_hash(model, kind)) == kind
    with pytest.raises(ValueError, match=rf"\bmd5\b.*{KIND}"):
        weights_hash(model, "md5")


def test_the_hash_counts_the_buffers_that_files_hold() -> None:
    model: Any = tiny_model()
    before = weights_hash(model), weights_hash(model, UNNAMED)
    inverse = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    inverse.mul_(2)  # it is computed from the configuration, and in no file
    assert (weights_hash(model), weights_hash(model, UNNAMED)) == before
    layer = model.model.layers[1].mlp.up_proj
    layer.register_buffer("qweight", torch.arange(12, dtype=torch.int32).reshape(3, 4))
    found = {before[0], weights_hash(model)}
    layer.qweight[2, 3] += 1
    found.add(weights_hash(model))
    layer.qweight = layer.qweight.reshape(4, 3)
    found.add(weights_hash(model))
    assert len(found) == 4
    assert weights_hash(model, UNNAMED) == before[1]


def test_the_hash_is_of_the_weights_alone(saved: Path, tmp_path: Path) -> None:
    digest = weights_hash(load_model(saved))
    assert digest == weights_hash(load_model(saved, device="cpu")) == weights_hash(tiny_model())
    load_model(saved).save_pretrained(tmp_path / "again")
    assert digest == weights_hash(load_model(tmp_path / "again"))
    others = [tiny_model(seed=1), tiny_model(dtype=torch.bfloat16), tiny_model("qwen2")]
    assert len({digest, *map(weights_hash, others)}) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_hash_changes_with_any_one_weight(name: str) -> None:
    model = tiny_model(name)
    digest = weights_hash(model)
    for key, parameter in model.named_parameters():
        value = parameter.data.view(-1)[-1].item()
        parameter.data.view(-1)[-1] = np.nextafter(np.float32(value), np.float32(9)).item()
        assert weights_hash(model) != digest, key
        parameter.data.view(-1)[-1] = value
    assert weights_hash(model) == digest


def test_the_hash_counts_names_and_shapes_and_tied_weights_once() -> None:
    model = tiny_model("gpt2")
    digest = weights_hash(model)
    lm_head: Any = model.lm_head
    assert lm_head.weight is model.get_parameter("transformer.wte.weight")
    lm_head.weight = nn.Parameter(lm_head.weight.detach().clone())
    assert weights_hash(model) != digest  # untied: the same numbers, but another model
    changed = tiny_model("llama")
    mlp: Any = changed.model.layers[0].mlp
    digests = [weights_hash(changed)]
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().reshape(24, 37))
    digests.append(weights_hash(changed))
    mlp.upper_proj = mlp.up_proj
    del mlp.up_proj
    digests.append(weights_hash(changed))
    assert len(set(digests)) == 3


class Codes(torch.Tensor):
    """A tensor of codes and a scale, as those of torchao, which has no bytes of its own."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> "Codes":
        made: Codes = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        return made

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def test_the_hash_of_quantised_tensors_is_that_of_their_codes_and_scales() -> None:
    def hashed(codes: int, scale: float) -> str:
        model: Any = tiny_model()
        tensor = Codes(torch.full((37, 24), codes, dtype=torch.int8), torch.tensor(scale))
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(tensor, requires_grad=False)
        return weights_hash(model)

    assert hashed(3, 0.5) == hashed(3, 0.5)
    assert len({hashed(3, 0.5), hashed(4, 0.5), hashed(3, 0.25)}) == 3
