"""The forward: five verbs a layer, over the rows of a batch. There is no other.

``ops`` is what stands behind the verbs: `plain.Plain`, `few.Few` or `many.Many`. ``batch`` says whose the rows are: a
prompt, a part of one, the newest token of each of thirty sequences, or all of that at once; the forward need not know.
"""


def forward(model, batch, cache, ops):
    """Run ``model`` over the rows of ``batch``, whose embeddings are in ``ops.b.x``; leaves the logits that it asks for
    in ``ops.logits``.

    cache: `cache.pages.PagedCache`; the rows' keys and values are written to their places before they are read.
    """
    for layer in model.layers:
        ops.qkv(layer, cache, batch)  # norm, product, split into heads; keys and values to their pages
        ops.attend(layer, cache, batch)
        ops.residual(layer.proj, ops.b.att, batch)  # x += att @ W + bias: alone would add over several GPUs
        ops.up(layer, batch)  # norm, product, GELU
        ops.residual(layer.down, ops.b.ff, batch)
    ops.head(model, batch)
