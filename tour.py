# %% [markdown]
# # A walk through minillava
#
# Every cell does by hand what the code does, prints what is worth seeing, and asserts what it teaches. `tour.py` runs
# as it is, and cell by cell in VS Code or Spyder. `tour.ipynb` is the same with its outputs and pictures.

# %% [markdown]
# ## 1. Load a checkpoint
#
# The embedded one has 2.7 million trained parameters, in the layout of a Hub repository.

# %%
from minillava import TINY  # isort: skip  before torch, of whose import it silences a warning

import sys

import torch
import torch.nn.functional as F
from PIL import Image

from minillava.model import apply_rope, manual_attention, merge_heads, split_heads
from prefixkv import PrefixKV, importance, priority, retain, search
from weights import load

torch.set_grad_enabled(False)
model, processor = load(TINY)
config = model.config
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters; the decoder has {config.text.num_hidden_layers} layers"
)
assert config.vision.num_patches == (config.vision.image_size // config.vision.patch_size) ** 2

# %% [markdown]
# Pictures are drawn in a notebook alone, and need matplotlib: `pip install -c constraints.txt -e ".[notebook]"`.

# %%
if "ipykernel" in sys.modules:
    import matplotlib.pyplot as plt
else:
    plt = None


def show(pictures: dict[str, torch.Tensor]) -> None:
    """Draws pictures side by side: each [rows, columns], or [rows, columns, 3] in colours from 0 to 1."""
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(pictures), squeeze=False, figsize=(min(12, 3 * len(pictures)), 3))
    for axis, (title, picture) in zip(axes[0], pictures.items()):
        axis.imshow(picture, interpolation="nearest", aspect="auto" if 4 * len(picture) < picture.shape[1] else "equal")
        axis.set(title=title, xticks=[], yticks=[])
    plt.show()
    plt.close(figure)


# %% [markdown]
# ## 2. Pixels
#
# An image is resized, cropped, scaled to 0 .. 1 and normalised.

# %%
image = Image.open(TINY / "examples" / "scene_1.png")
inputs = processor("USER: <image>\nDescribe the image in detail. ASSISTANT:", [image])
pixels = inputs["pixel_values"]  # [1, 3, R, R]
mean, std = (
    torch.tensor(v)[:, None, None] for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
)
red, green, blue = ((pixels[0] * std + mean) * 255).round().int()[:, 0, 0].tolist()
print(f"{image.size} pixels became {tuple(pixels.shape)}; the first one is red {red}, green {green}, blue {blue}")
show({"what the model sees": ((pixels[0] * std + mean).permute(1, 2, 0)).clamp(0, 1)})
small = image.convert("RGB").resize((config.vision.image_size,) * 2, Image.Resampling.BICUBIC)
assert (red, green, blue) == small.getpixel((0, 0))

# %% [markdown]
# ## 3. Token ids
#
# `<image>` takes one position for each patch.

# %%
ids = inputs["input_ids"]  # [1, N]
length = ids.shape[1]
shown = [processor.tokenizer.model.id_to_piece(i) for i in ids[0].tolist() if i != config.image_token_id]
print(f"{length} tokens, {int((ids == config.image_token_id).sum())} of them patches; the text is {shown}")
assert int((ids == config.image_token_id).sum()) == config.num_image_tokens

# %% [markdown]
# ## 4. Patches
#
# The first convolution cuts the image up and multiplies each piece with the same matrix.

# %%
tower = model.vision_tower
size, width = config.vision.patch_size, config.vision.hidden_size
pieces = pixels.unfold(2, size, size).unfold(3, size, size)  # [1, 3, rows, columns, patch, patch]
pieces = pieces.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [1, P, 3 * patch * patch]
patches = pieces @ tower.patch_embedding.weight.flatten(1).T  # [1, P, Dv]
colours = (pieces.unflatten(2, (3, size, size)) * std + mean).permute(0, 1, 3, 4, 2).clamp(0, 1)
show({f"patch {p}": colours[0, p] for p in range(153, 159)})
print(f"{pieces.shape[1]} pieces of {pieces.shape[2]} numbers became vectors of {width}")
assert torch.allclose(patches, tower.patch_embedding(pixels).flatten(2).transpose(1, 2), atol=1e-5)

# %% [markdown]
# ## 5. One vision layer by hand
#
# Every patch looks at every patch. The picture shows what one head makes of it, from the patch in the middle.

# %%
hidden = torch.cat([tower.class_embedding.expand(1, 1, -1), patches], dim=1) + tower.position_embedding.weight
hidden = tower.pre_layrnorm(hidden)  # [1, P + 1, Dv]
layer = tower.layers[0]
x = layer.layer_norm1(hidden)
query, key, value = (split_heads(p(x), layer.num_heads) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)  # [1, Hv, P + 1, P + 1]
after = hidden + layer.out_proj(merge_heads(weights @ value))
inner = layer.fc1(layer.layer_norm2(after))
after = after + layer.fc2(inner * torch.sigmoid(1.702 * inner))  # quick_gelu
rows = config.vision.image_size // size
middle = 1 + (rows // 2) * rows + rows // 2
show({f"head {head}": weights[0, head, middle, 1:].view(rows, rows) for head in range(layer.num_heads)})
print(f"the patch in the middle looks most at patch {int(weights[0, 0, middle, 1:].argmax())}")
assert torch.allclose(after, layer(hidden), atol=1e-5)

# %% [markdown]
# ## 6. Projector
#
# It maps the vision tower's width to the decoder's. CLS stays behind.

# %%
features = tower(pixels, config.vision_feature_layer)[:, 1:]  # [1, P, Dv], of the last layer but one
projector = model.multi_modal_projector
projected = projector.linear_2(F.gelu(projector.linear_1(features)))  # [1, P, D]
assert torch.allclose(projected, model.image_features(pixels), atol=1e-5)

# %% [markdown]
# ## 7. Merge
#
# Projected patches take the places of `<image>` among the word embeddings.

# %%
embeddings = model.language_model.embed_tokens(ids)  # [1, N, D]
embeddings[ids == config.image_token_id] = projected[0]
assert torch.allclose(embeddings, model.embed(ids, pixels), atol=1e-5)

# %% [markdown]
# ## 8. One decoder layer by hand
#
# Causal attention with shared keys, then SwiGLU. The picture shows what the last word attends to, head by head.

# %%
block, heads = model.language_model.layers[0], config.text.num_attention_heads
cos, sin = model.language_model.cos_sin(torch.arange(length)[None])
attention, x = block.self_attn, block.input_layernorm(embeddings)
query = apply_rope(split_heads(attention.q_proj(x), heads), cos, sin)  # [1, H, N, Dh]
key = apply_rope(split_heads(attention.k_proj(x), config.text.kv_heads), cos, sin)  # [1, Hkv, N, Dh]
value = split_heads(attention.v_proj(x), config.text.kv_heads)
shared = heads // config.text.kv_heads  # query heads that read one key
scores = query @ key.repeat_interleave(shared, 1).mT / query.shape[-1] ** 0.5
future = torch.ones(length, length).triu(1).bool()
weights = scores.masked_fill(future, -torch.inf).softmax(-1)  # [1, H, N, N]
out = embeddings + attention.o_proj(merge_heads(weights @ value.repeat_interleave(shared, 1)))
x = block.post_attention_layernorm(out)
out = out + block.mlp.down_proj(F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x))
is_image = ids[0] == config.image_token_id
show({f"head {head}": weights[0, head, -1, is_image].view(rows, rows) for head in range(heads)})
print(f"{heads} query heads share {config.text.kv_heads} key-value heads")
assert torch.allclose(out, block(embeddings, (cos, sin)), atol=1e-5)
assert torch.allclose(weights, manual_attention(query, key, value, None)[1], atol=1e-5)

# %% [markdown]
# ## 9. Importance
#
# How much attention does each key receive, from all queries together? (PrefixKV, section 3)

# %%
present = torch.ones(1, length, dtype=torch.bool)
by_hand = weights.mean(1).sum(1)  # [1, N]: mean over heads, sum over queries
print(
    f"the most important key of layer 0 is number {int(by_hand.argmax())} of {length}; the sum is {by_hand.sum():.0f}"
)
assert torch.allclose(by_hand, importance(query, key, present, block=16), atol=1e-4)  # 16 queries at a time

# %% [markdown]
# ## 10. Every layer's importance
#
# Every layer has its own importance. What does a prefix of the most important keys hold? Bright patches are important.

# %%
hidden, table = model.embed(ids, pixels), []
for block in model.language_model.layers:
    query, key, _ = block.self_attn.project(block.input_layernorm(hidden), (cos, sin))
    table.append(importance(query, key, present)[0])
    hidden = block(hidden, (cos, sin))
table = torch.stack(table)  # [L, N]
show({f"layer {i}": row[is_image].view(rows, rows) for i, row in enumerate(table)})
curve = priority(table)  # [L, N + 1]: P(0), P(1) .. P(N)
for number, row in enumerate(curve):
    half = int((row < 0.5).sum())  # P(0) .. P(half - 1) are below a half, P(half) is not
    print(f"layer {number}: half of the importance is in {half:3} keys  {'#' * (half // 4)}")
assert torch.allclose(curve[:, -1], torch.ones(len(table), dtype=torch.float64))

# %% [markdown]
# ## 11. The search
#
# One threshold p for all layers, found by halving the bracket. Every curve is cut at the height p.

# %%
budget, protected = 0.2, 2
total = round(budget * len(table) * length)


def sizes(p: float) -> torch.Tensor:
    """Each layer's shortest prefix that holds a share p of its importance, and the protected tokens on top."""
    return ((curve < p).sum(-1) + protected).clamp(max=length)


low, high = 0.0, 1.0
for step in range(20):
    p = (low + high) / 2
    kept = int(sizes(p).sum())
    if step < 6:
        print(f"p in [{low:.4f}, {high:.4f}]: {p:.4f} keeps {kept} of {total}")
    low, high = (p, high) if kept <= total else (low, p)
threshold, counts = search(curve, total, protected)
print(f"p = {threshold:.4f}; kept by layer {counts.tolist()}, {int(counts.sum())} in all")
if plt is not None:
    plt.plot(torch.linspace(0, 1, length + 1), curve.T, linewidth=1)
    plt.axhline(threshold, color="black", linestyle="--")
    plt.gca().set(xlabel="share of the keys, most important first", ylabel="share of the importance")
    plt.show()
assert int(counts.sum()) == total and abs(threshold - low) < 1e-5

# %% [markdown]
# ## 12. Retention
#
# The first and the last token stay, then the most important. Ties go to the earlier one.

# %%
kept = torch.cat([retain(row[None], count[None], present) for row, count in zip(table, counts)])  # [L, N]
show({f"layer {i}": row[is_image].view(rows, rows) for i, row in enumerate(kept)})
order = table[0].clone()
order[0] = order[-1] = torch.inf
by_hand = order.argsort(descending=True, stable=True)[: counts[0]].sort().values
print(f"layer 0 keeps {len(by_hand)} positions, the first of them {by_hand[:8].tolist()}")
assert torch.equal(kept[0].nonzero()[:, 0], by_hand)

# %% [markdown]
# ## 13. Reading the prompt
#
# `read` does all of this, and fills a cache of slots.

# %%
compressor = PrefixKV(budget)
cache = model.new_cache(64, compressor)
logits = model.read(**inputs, cache=cache)
print(f"layer 0 has {cache.key[0].shape[2]} slots for a text that may grow to {length + 64} tokens")
assert torch.equal(cache.kept[:, 0], counts)
assert torch.equal(cache.position[0, 0, : counts[0]].sort().values, by_hand)

# %% [markdown]
# ## 14. Three steps of decoding
#
# A new token takes a free slot, or that of the oldest queued one. No token is moved. The picture shows the last slots
# of layer 0: a row is a step, and the brighter a slot, the newer its token.

# %%
filled = [cache.position[0, 0].clone()]
for step in range(3):
    before = cache.position[0, 0].clone()
    token = logits.argmax(-1)
    logits = model.read(token[:, None], cache)
    slot = int(cache.slot[0, 0])
    old = int(before[slot])
    where = "a free slot" if old < 0 else f"the slot of token {old}"
    print(f"{processor.decode(token)!r:>10} is token {int(cache.lengths) - 1}: layer 0 puts it in slot {slot}, {where}")
    changed = (cache.position[0, 0] != before).nonzero()[:, 0].tolist()
    assert changed == [slot] and int(cache.position[0, 0, slot]) == length + step
    filled.append(cache.position[0, 0].clone())
show({"position of the token in each slot": torch.stack(filled)[:, -60:]})

# %% [markdown]
# ## 15. Full cache against a fifth of it
#
# What does the answer look like with each?

# %%
for name, chosen in (("full cache", None), ("a fifth of it", compressor)):
    result = model.generate(**inputs, max_new_tokens=96, compressor=chosen)
    print(f"{name}, {result.cache_bytes:,} bytes: {processor.decode(result.token_ids[0])}")
assert torch.equal(result.kept[0], counts)
full = model.generate(**inputs, max_new_tokens=96)
same = model.generate(**inputs, max_new_tokens=96, compressor=PrefixKV(1.0))
assert torch.equal(full.token_ids, same.token_ids)  # a budget of 1 changes nothing

# %% [markdown]
# ## 16. A second question on the same cache
#
# The picture is not read again: `read` gets only the ids that are new. They see all that the cache holds, and one
# another. `fork` copies the cache, so that each question finds it as the first answer left it.

# %%
first = "How many objects are there?"
asked = processor(processor.chat([(first, None)], num_images=1), images=[image])
talk = model.new_cache(128, PrefixKV(0.5))
spoken = torch.cat(list(model.decode(model.read(**asked, cache=talk), talk)))  # [T]
known = torch.cat([asked["input_ids"][0], spoken[:-1]])  # the last token, which ends the answer, is not read yet
reply = processor.decode(spoken).strip()
print(f"{first} {reply}")
for second in ("Is there a red square?", "Where is the star?"):
    whole = processor(processor.chat([(first, reply), (second, None)], num_images=1), images=[image])["input_ids"]
    assert torch.equal(whole[0, : len(known)], known)  # else the conversation would have to be read again
    branch = talk.fork()
    tokens = torch.cat(list(model.decode(model.read(whole[:, len(known) :], branch), branch)))
    print(
        f"{second} {processor.decode(tokens).strip()} ({whole.shape[1] - len(known)} of {whole.shape[1]} tokens read)"
    )
assert int(talk.lengths) == len(known)  # the forks have changed nothing
