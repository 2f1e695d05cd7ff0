"""The hash by which a run and a model are known to have the same weights.

The kind of hash is the text before the colon: ``xxh3-128:HEX`` is XXH3 with 128 bits. It need not
withstand forgery: whoever can change a model can change run.json too. Two models that differ have
the same hash with a probability of 2⁻¹²⁸. It is read at the speed of the memory, several times as
fast as SHA-256. Files that are written have SHA-256 sums (`model.integrity`).

Versions before 0.2.0 stored a SHA-256 of the parameters without the name of a kind.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import xxhash
from torch import nn

from entangle.model.placing import stored_buffers, stored_parameters
from entangle.model.sparse_inputs import rule_tensors

KIND = "xxh3-128"
UNNAMED = ""  # the kind of versions before 0.2.0
_KINDS: dict[str, Callable[[], Any]] = {KIND: xxhash.xxh3_128, UNNAMED: hashlib.sha256}

_PIECE = 2**26  # bytes that are copied at a time from a device to the host


def weights_hash(model: nn.Module, kind: str = KIND) -> str:
    """Return the hash of the names, dtypes, shapes and bytes of all weights; tied ones once.

    Weights are the parameters, and the buffers that the model's files hold: the codes of GPTQ and
    AWQ are buffers. The kind of old versions leaves out the buffers. The rules of sparse inputs are
    hashed too: with them the same weights are another model.

    Raises:
        ValueError: no kind of hash has this name.
    """
    if kind not in _KINDS:
        raise ValueError(
            f"hashes of weights of the kind {kind} are unknown to this version of entangle, which "
            f"knows {KIND}: use the version that stored this hash"
        )
    digest = _KINDS[kind]()
    named = [stored_parameters(model)] + [stored_buffers(model)] * (kind != UNNAMED)
    named.append(iter(rule_tensors(model).items()))
    for name, tensor in (pair for pairs in named for pair in pairs):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _parts(tensor.detach()):
            for piece in _pieces(part):
                digest.update(piece)
    return f"{kind}:{digest.hexdigest()}" if kind else digest.hexdigest()


def kind_of(weights: str) -> str:
    """Return the kind of hash that ``weights`` is."""
    return weights.rpartition(":")[0]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that a tensor is made of: codes and scales of a quantised one, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces, so that no whole copy of it is made."""
    rows = tensor.reshape(-1) if tensor.is_contiguous() else tensor
    for rows_of_piece in rows.split(max(1, _PIECE * len(rows) // max(tensor.nbytes, 1))):
        piece = rows_of_piece
        if piece.device.type != "cpu":  # pinned memory, which torch keeps for the next piece
            host = torch.empty(
                piece.shape, dtype=piece.dtype, device="cpu", pin_memory=piece.is_cuda
            )
            piece = host.copy_(piece)
        yield piece.contiguous().view(-1).view(torch.uint8).numpy().data
