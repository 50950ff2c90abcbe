"""What LTX-Video and LTX-2 have in common: how the original calls embedders and attention."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.architectures._rows import Row, one


def modulation(name: str, path: str, width: int, chunks: int, time: int = 256) -> Iterator[Row]:
    """An embedder of the time step with a layer that makes `chunks` modulations of it."""
    yield one(f"{name}.emb.timestep_embedder.linear_1", f"{path}.emb.timestep_embedder.linear_1", width, time)
    yield one(f"{name}.emb.timestep_embedder.linear_2", f"{path}.emb.timestep_embedder.linear_2", width, width)
    yield one(f"{name}.linear", f"{path}.linear", chunks * width, width)


def caption(name: str, width: int, size: int) -> Iterator[Row]:
    """The projection of the text; named alike."""
    yield one(f"{name}.linear_1", f"{name}.linear_1", width, size)
    yield one(f"{name}.linear_2", f"{name}.linear_2", width, width)


def attention(
    name: str, query: int, context: int, inner: int, gates: int = 0, path: str | None = None
) -> Iterator[Row]:
    """Attention from `query` to `context` features, `inner` in between; `gates` is the number of its gates, if any."""
    path = path or name
    for part, size in (("to_q", query), ("to_k", context), ("to_v", context)):
        yield one(f"{name}.{part}", f"{path}.{part}", inner, size)
    yield one(f"{name}.to_out.0", f"{path}.to_out.0", query, inner)
    for part in "qk":
        yield one(f"{name}.{part}_norm", f"{path}.norm_{part}", inner)
    if gates:
        yield one(f"{name}.to_gate_logits", f"{path}.to_gate_logits", gates, query)


def feed_forward(name: str, width: int, path: str | None = None) -> Iterator[Row]:
    """Two layers, four times as wide in between."""
    path = path or name
    yield one(f"{name}.net.0.proj", f"{path}.net.0.proj", 4 * width, width)
    yield one(f"{name}.net.2", f"{path}.net.2", width, 4 * width)
