# %% [markdown]
# # A walk through minillava
#
# Every cell does by hand what the code does, prints what is worth seeing, and asserts what it teaches. `tour.py` runs
# as it is, and cell by cell in VS Code or Spyder. `tour.ipynb` is the same with its outputs and pictures. Run all
# cells once; after that, run any of them again, in any order.
#
# Sections 2 to 8 are the model: a picture and a request become an answer. 9 to 15 are PrefixKV, which keeps a part of
# the model's memory. 16 to 19 are two ways to keep the answer right with a fifth of it. 20 asks a second question.
#
# `# [1, N, D]` in the code is a shape. N: tokens; P: patches; R: pixels a side; D: width of the decoder, Dv of the
# vision tower; L: layers; H: query heads, Hkv: KV heads, Hv: vision heads; Dh: numbers in a head; S: cached tokens.

# %% [markdown]
# ## 1. Load a checkpoint
#
# `TINY`, the embedded one, is a folder like a Hub repository: 2.7 million parameters that know coloured shapes only.

# %%
from minillava import TINY  # isort: skip  before torch, of whose import it silences a warning

import math
import sys

import torch
import torch.nn.functional as F
from PIL import Image

from minillava.compressors import GOLDEN, Cover
from minillava.model import apply_rope, manual_attention, merge_heads, split_heads
from minillava.quantised import QuantisedKVCache, quantise
from prefixkv import QUEUED, PrefixKV, importance, priority, retain, search
from weights import load

torch.set_grad_enabled(False)
model, processor = load(TINY)
config = model.config
layers, heads, kv_heads = config.text.num_hidden_layers, config.text.num_attention_heads, config.text.kv_heads
print(f"{sum(p.numel() for p in model.parameters()):,} parameters; the decoder has {layers} layers of {heads} heads")
assert config.vision.num_patches == (config.vision.image_size // config.vision.patch_size) ** 2

# %% [markdown]
# Pictures are drawn in a notebook only, and need matplotlib: `pip install -c constraints.txt -e ".[notebook]"`.

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
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
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
mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
std = torch.tensor(processor.image_processor.image_std)[:, None, None]
red, green, blue = ((pixels[0] * std + mean) * 255).round().int()[:, 0, 0].tolist()
print(f"{image.size} pixels became {tuple(pixels.shape)}; the first one is red {red}, green {green}, blue {blue}")
show({"what the model sees": ((pixels[0] * std + mean).permute(1, 2, 0)).clamp(0, 1)})
resized = image.convert("RGB").resize((config.vision.image_size,) * 2, Image.Resampling.BICUBIC)
assert (red, green, blue) == resized.getpixel((0, 0))

# %% [markdown]
# ## 3. Token ids
#
# `<image>` takes one position for each patch: a square of 8 x 8 pixels. `▁` is a space, `<0x0A>` a line break.

# %%
ids = inputs["input_ids"]  # [1, N]
length = ids.shape[1]
is_image = ids[0] == config.image_token_id  # [N]
words = [processor.tokenizer.model.id_to_piece(i) for i in ids[0, ~is_image].tolist()]
print(f"{length} tokens, {int(is_image.sum())} of them patches; the text is {words}")
assert int(is_image.sum()) == config.num_image_tokens

# %% [markdown]
# ## 4. Patches
#
# The first convolution cuts the image up and multiplies each piece with the same matrix.

# %%
tower, patch = model.vision_tower, config.vision.patch_size
rows = config.vision.image_size // patch  # of patches, and as many columns
pieces = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [1, 3, rows, columns, patch, patch]
pieces = pieces.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [1, P, 3 * patch * patch]
patches = pieces @ tower.patch_embedding.weight.flatten(1).T  # [1, P, Dv]
colours = (pieces.unflatten(2, (3, patch, patch)) * std + mean).permute(0, 1, 3, 4, 2).clamp(0, 1)
show({f"patch {p}": colours[0, p] for p in range(153, 159)})
print(f"{rows} x {rows} pieces of {pieces.shape[2]} numbers became vectors of {patches.shape[2]}")
assert torch.allclose(patches, tower.patch_embedding(pixels).flatten(2).transpose(1, 2), atol=1e-5)

# %% [markdown]
# ## 5. One vision layer by hand
#
# Before the patches stands CLS, a learned vector that belongs to no patch. Every patch looks at every patch. The
# pictures show where the patch in the middle looks, head by head, in the first vision layer.

# %%
tower_in = torch.cat([tower.class_embedding.expand(1, 1, -1), patches], dim=1) + tower.position_embedding.weight
tower_in = tower.pre_layrnorm(tower_in)  # [1, P + 1, Dv]
vision = tower.layers[0]
seen = vision.layer_norm1(tower_in)
q, k, v = (split_heads(project(seen), vision.num_heads) for project in (vision.q_proj, vision.k_proj, vision.v_proj))
looks = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # [1, Hv, P + 1, P + 1]
tower_out = tower_in + vision.out_proj(merge_heads(looks @ v))
inner = vision.fc1(vision.layer_norm2(tower_out))
tower_out = tower_out + vision.fc2(inner * torch.sigmoid(1.702 * inner))  # CLIP's GELU
centre = (rows // 2) * rows + rows // 2
from_centre = looks[0, :, 1 + centre, 1:]  # [Hv, P]
show({f"vision layer 0, head {h}": row.view(rows, rows) for h, row in enumerate(from_centre)})
print(f"vision layer 0, head 0: patch {centre}, in the middle, looks most at patch {int(from_centre[0].argmax())}")
assert torch.allclose(tower_out, vision(tower_in), atol=1e-5)

# %% [markdown]
# ## 6. Projector and merge
#
# The projector maps the vision tower's width to the decoder's. CLS is left out. Projected patches take the places of
# `<image>` among the word embeddings. From here on, a patch is a token like a word.

# %%
features = tower(pixels, config.vision_feature_layer)[:, 1:]  # [1, P, Dv], of the last layer but one
projector = model.multi_modal_projector
projected = projector.linear_2(F.gelu(projector.linear_1(features)))  # [1, P, D]
embeddings = model.language_model.embed_tokens(ids)  # [1, N, D]
embeddings[:, is_image] = projected
assert torch.allclose(projected, model.image_features(pixels), atol=1e-5)
assert torch.allclose(embeddings, model.embed(ids, pixels), atol=1e-5)

# %% [markdown]
# ## 7. One decoder layer by hand
#
# Causal attention, then an MLP (SwiGLU). Two query heads share the keys and values of one KV head. RoPE turns queries
# and keys by an angle that grows with their position, so that a score depends on how far apart two tokens are. The
# pictures show where the last token looks, head by head; the answer's first word follows from it.

# %%
decoder = model.language_model
first, cos_sin = decoder.layers[0], decoder.cos_sin(torch.arange(length)[None])
attention, x = first.self_attn, first.input_layernorm(embeddings)
query = apply_rope(split_heads(attention.q_proj(x), heads), *cos_sin)  # [1, H, N, Dh]
key = apply_rope(split_heads(attention.k_proj(x), kv_heads), *cos_sin)  # [1, Hkv, N, Dh]
value = split_heads(attention.v_proj(x), kv_heads)  # [1, Hkv, N, Dh]
shared = heads // kv_heads  # query heads that read one KV head
scores = query @ key.repeat_interleave(shared, 1).mT / query.shape[-1] ** 0.5  # [1, H, N, N]
future = torch.ones(length, length).triu(1).bool()
weights = scores.masked_fill(future, -torch.inf).softmax(-1)  # [1, H, N, N]
out = embeddings + attention.o_proj(merge_heads(weights @ value.repeat_interleave(shared, 1)))
normed = first.post_attention_layernorm(out)
out = out + first.mlp.down_proj(F.silu(first.mlp.gate_proj(normed)) * first.mlp.up_proj(normed))
show({f"layer 0, head {h}": weights[0, h, -1, is_image].view(rows, rows) for h in range(heads)})
print("layer 0: to patches, the last token's heads give", [f"{w:.0%}" for w in weights[0, :, -1, is_image].sum(-1)])
assert torch.allclose(out, first(embeddings, cos_sin), atol=1e-5)
assert torch.allclose(weights, manual_attention(query, key, value, None)[1], atol=1e-5)

# %% [markdown]
# ## 8. Generation with a full cache
#
# The next token is the one with the largest logit. To read it, a layer needs the keys and values of all tokens before
# it. They never change, since no token looks ahead. So they are kept: this is the KV cache. The prompt is read at
# once; then every new token is read on its own, and adds a key and a value to each layer.

# %%
cached = [[torch.empty(1, kv_heads, 0, config.text.head_size)] * 2 for _ in decoder.layers]  # each layer's key, value
answer, block = [], embeddings  # a block is what is read at once: first the prompt, then one token
while len(answer) < 96 and not {*answer} & {*config.eos_token_id}:
    start = cached[0][0].shape[2]
    rope = decoder.cos_sin(torch.arange(start, start + block.shape[1])[None])
    for i, layer in enumerate(decoder.layers):
        new_query, *new = layer.self_attn.project(layer.input_layernorm(block), rope)  # query, key, value of section 7
        cached[i] = [torch.cat(pair, dim=2) for pair in zip(cached[i], new)]  # [1, Hkv, S, Dh] each
        context, _ = manual_attention(new_query, *cached[i], None)  # what section 7 does by hand, and the weights
        block = block + layer.self_attn.o_proj(merge_heads(context))
        block = block + layer.mlp(layer.post_attention_layernorm(block))
    answer.append(int(model.lm_head(decoder.norm(block[:, -1])).argmax()))
    block = decoder.embed_tokens(torch.tensor([answer[-1:]]))
print(f"{sum(t.nbytes for pair in cached for t in pair):,} bytes of keys and values: {processor.decode(answer)}")
assert answer == model.generate(**inputs, max_new_tokens=96).token_ids[0].tolist()

# %% [markdown]
# ## 9. Importance
#
# The cache grows with the text. Which keys could be left out? PrefixKV (arXiv 2412.03409, section 3) asks: how much
# attention does each key receive, from all queries together?

# %%
present = torch.ones(1, length, dtype=torch.bool)  # which tokens are not padding: here all
received = weights.mean(1).sum(1)  # [1, N]: mean over heads, sum over queries
print(f"layer 0, mean of its {heads} heads: key {int(received.argmax())} receives most, {received.max():.1f}")
print(f"all keys receive {received.sum():.0f} together: each query's weights sum to 1, and there are {length} queries")
assert torch.allclose(received, importance(query, key, present, block=16), atol=1e-4)  # 16 queries at a time

# %% [markdown]
# ## 10. Every layer's importance
#
# Bright patches are important. The upper rows are favoured, since more queries come after them. Sort a layer's keys
# by importance: the first k are a prefix, and P(k) is the share of the importance that it holds.

# %%
hidden, found = embeddings, []
for layer in decoder.layers:
    of_queries, of_keys = layer.self_attn.project(layer.input_layernorm(hidden), cos_sin)[:2]
    found.append(importance(of_queries, of_keys, present)[0])
    hidden = layer(hidden, cos_sin)
table = torch.stack(found)  # [L, N]
show({f"layer {i}\nmean of heads": row[is_image].view(rows, rows) for i, row in enumerate(table)})
curve = priority(table)  # [L, N + 1]: P(0), P(1) .. P(N)
for i, row in enumerate(curve):
    half = int((row < 0.5).sum())  # P(0) .. P(half - 1) are below a half, P(half) is not
    print(f"layer {i}: half of the importance is in {half:3} of {length} keys  {'#' * (half // 4)}")
assert torch.allclose(curve[:, -1], torch.ones(layers, dtype=torch.float64))

# %% [markdown]
# ## 11. The search
#
# The budget is a fifth of all keys of all layers. A layer that needs more keys for the same share shall get more. So
# all curves P are cut at one height p: each layer keeps its shortest prefix with P(k) >= p. The largest p that the
# budget allows is found by halving. Room for the first and the last token, which are protected, comes on top.

# %%
budget, protected = 0.2, 2
total = round(budget * layers * length)
low, high = 0.0, 1.0
for step in range(20):
    p = (low + high) / 2
    size = int(((curve < p).sum(-1) + protected).clamp(max=length).sum())  # of all layers together
    if step < 6:
        print(f"p in [{low:.4f}, {high:.4f}]: {p:.4f} keeps {size} of {total} keys, in {layers} layers together")
    low, high = (p, high) if size <= total else (low, p)
threshold, counts = search(curve, total, protected)  # which also hands out the few keys that halving leaves over
print(f"p = {threshold:.4f}; layers 0 to {layers - 1} keep {counts.tolist()} keys, {int(counts.sum())} in all")
if plt is not None:
    plt.plot(torch.linspace(0, 1, length + 1), curve.T, linewidth=1, label=[f"layer {i}" for i in range(layers)])
    plt.axhline(threshold, color="black", linestyle="--", label="p")
    plt.gca().set(xlabel="share of the keys, most important first", ylabel="share of the importance, mean of heads")
    plt.legend(fontsize=8)
    plt.show()
assert int(counts.sum()) == total and abs(threshold - low) < 1e-5

# %% [markdown]
# ## 12. Retention
#
# The first and the last token stay, then the most important. A layer's heads keep the same tokens: the bright ones.

# %%
kept = torch.cat([retain(row[None], count[None], present) for row, count in zip(table, counts)])  # [L, N]
show({f"layer {i}\nall heads": row[is_image].view(rows, rows) for i, row in enumerate(kept)})
order = table[0].clone()
order[0] = order[-1] = torch.inf
chosen = order.argsort(descending=True, stable=True)[: counts[0]].sort().values
print(f"layer 0 keeps {len(chosen)} positions, from {chosen[:8].tolist()} to {chosen[-8:].tolist()}")
assert torch.equal(kept[0].nonzero()[:, 0], chosen)

# %% [markdown]
# ## 13. Reading the prompt
#
# `read` does all of this, and returns the logits of the next token. Its cache has slots, as many as will be needed at
# the end. A layer that kept a quarter of the prompt may hold a quarter of the text, however long it gets.

# %%
cache = model.new_cache(64, PrefixKV(budget))  # 64: tokens that may follow the prompt
logits = model.read(**inputs, cache=cache)
print(f"layer 0 has {cache.key[0].shape[2]} slots for a text that may grow to {length + 64} tokens")
assert torch.equal(cache.kept[:, 0], counts)
assert torch.equal(cache.position[0, 0, : counts[0]].sort().values, chosen)

# %% [markdown]
# ## 14. Three steps of decoding
#
# A layer's slots are `[pinned | queue | free]`. The last 25 tokens that it kept of the prompt are queued, and so is
# every later token. Those before them are pinned: they never leave. While the layer may hold one more, a new token
# takes a free slot; else it takes that of the oldest in the queue. No token is moved. Numbers are positions in the
# text. In the picture, a row is a step, and the brighter a slot, the newer its token; free ones are darkest.

# %%
pinned = int(counts[0]) - QUEUED


def diagram(position: torch.Tensor) -> str:
    """The slots of a layer, given the position of the token in each, in the order of the slots."""
    queue = [str(p) for p in position[pinned:].tolist() if p >= 0]
    return f"[{pinned} pinned | {' '.join(queue[:4])} .. {' '.join(queue[-3:])} | {int((position < 0).sum())} free]"


walk, scored = cache.fork(), logits  # a copy of the cache, so that this cell can be run again
history = [walk.position[0, 0].clone()]
print(f"layer 0 before: {diagram(history[0])}")
for step in range(3):
    token = scored.argmax(-1)
    scored = model.read(token[:, None], walk)
    history.append(walk.position[0, 0].clone())
    print(f"{processor.decode(token)!r:>9} is {length + step}: {diagram(history[-1])}")
    before, (slot,) = history[-2], (history[-1] != history[-2]).nonzero()[:, 0].tolist()  # one slot has changed
    assert slot == int(walk.slot[0, 0]) and int(history[-1][slot]) == length + step
    assert before[slot] == -1 or before[slot] == min(p for p in before[pinned:].tolist() if p >= 0)
show({"layer 0, all heads: position of the token in each of the last 60 slots": torch.stack(history)[:, -60:]})

# %% [markdown]
# ## 15. A fifth of the cache with PrefixKV
#
# On this model the answer suffers: nearly all that PrefixKV keeps is in the upper part of the picture (section 12).

# %%
result = model.generate(**inputs, max_new_tokens=96, compressor=PrefixKV(budget))
print(f"PrefixKV, {result.cache_bytes:,} bytes: {processor.decode(result.token_ids[0])}")
assert torch.equal(result.kept[0], counts)

# %% [markdown]
# ## 16. Cover: which patches
#
# `Cover` is the method to try first on this model. It keeps the patches evenly, important or not. Every sixth patch
# of a grid 24 wide would be four columns. So the patches, row by row, are laid around a circle, each 0.618 of a turn
# after the one before (the golden ratio). A sixth of the circle, an arc, spreads over rows and columns. In each layer
# it begins an eighth of a turn further on, so that the layers together see every patch.

# %%
numbers = torch.arange(rows * rows).view(rows, rows)
sixth = numbers % 6 == 0
arcs = torch.stack([(numbers.double() * GOLDEN + i / layers) % 1 < 1 / 6 for i in range(layers)])  # [L, rows, columns]
show({"every sixth patch": sixth} | {f"arc of layer {i}, all heads": arcs[i] for i in range(3)})
print(f"every sixth patch: {int(sixth.any(0).sum())} of {rows} columns; layer 0's arc: {int(arcs[0].any(0).sum())}")
assert arcs[0].any(0).all() and arcs[0].any(1).all() and arcs.any(0).all()

# %% [markdown]
# ## 17. Cover: one patch for n
#
# A patch on the arc stands for n patches: itself and n - 1 dropped ones. In the softmax, a key with score s counts
# eˢ. To count n times it needs the score s + log n, since log(n · eˢ) = s + log n. This is exact if all n have the
# same key and the same value. Patches of a plain background nearly do. Those of a small object do not: if none of
# them is on the arc, no weight brings it back. (In this model, every patch of an object tells all about it.)

# %%
alone = torch.tensor([1.3 + math.log(6), 0.2, -0.7]).softmax(0)  # one key for six, and two others
assert torch.allclose(torch.tensor([1.3] * 6 + [0.2, -0.7]).softmax(0)[:6].sum(), alone[0])
last = scores[0, 3, -1]  # [N]: layer 0, head 3, before the softmax
gone = is_image.masked_scatter(is_image, ~arcs[0])  # [N]: patches that are not on the arc
cut, raised = last.masked_fill(gone, -torch.inf), (last + math.log(6) * is_image).masked_fill(gone, -torch.inf)
for what, changed in {"all patches": last, "the arc": cut, "the arc with log 6": raised}.items():
    print(f"layer 0, head 3: the last token gives {changed.softmax(0)[is_image].sum():.1%} of its attention to {what}")

# %% [markdown]
# ## 18. Cover reads the prompt
#
# The words stay, up to half of what a layer keeps; then what the question looks at most, a fifth of the rest. All
# others are on an arc. Later, the token with least attention goes first. (`decode` is section 8's loop on any cache.)

# %%
cover = Cover(budget)
covered = model.new_cache(96, cover)
expected = model.read(**inputs, cache=covered)
spaced = cover.log_weights[:, 0, :-1] > 0  # [L, N]: which stand for others; last: new tokens
show({f"layer {i}\nall heads": row[is_image].view(rows, rows) for i, row in enumerate(cover.chosen[:, 0])})
left = spaced[0] | ~cover.chosen[0, 0]  # [N]: neither a word nor looked at most
around = (torch.arange(1, length + 1).double() * GOLDEN) % 1  # places on the circle, from token 1 on
on_arc = around.masked_fill(~left, 2.0).argsort()[: spaced[0].sum()]
n = left.sum() / len(on_arc)
print(f"layer 0 keeps {length - int(left.sum())} words or patches looked at, {len(on_arc)} on the arc for {n:.1f} each")
assert torch.equal(on_arc.sort().values, spaced[0].nonzero()[:, 0])
assert torch.allclose(cover.log_weights[0, 0, on_arc], n.log())
spoken = torch.cat(list(model.decode(expected, covered)))
print(f"cover, {covered.held_bytes:,} bytes: {processor.decode(spoken)}")

# %% [markdown]
# ## 19. Fewer bits
#
# Another way: keep every token, but round its numbers. With 2 bits a number becomes a code from 0 to 3: it is about
# zero + scale * code. 32 numbers share a zero and a scale: of values, those of one token; of keys, the same number of
# 32 tokens; both are stored in 16 bits. It costs time, since each step turns all codes back into numbers.

# %%
vector = value[0, 0, -1]  # [Dh]: layer 0, KV head 0, the last token
zero = vector.min().half().float()
scale = ((vector.max() - zero) / 3).half().float()
codes = ((vector - zero) / scale).round().clamp(0, 3)
print("layer 0, KV head 0, value of the last token:", [f"{v:.2f}" for v in vector[:5]], "..")
print(f"become codes {codes[:5].int().tolist()} .. and are read as", [f"{v:.2f}" for v in (zero + scale * codes)[:5]])
assert torch.equal(codes, quantise(vector, 2, torch.ones_like(vector, dtype=torch.bool))[0])
packed = QuantisedKVCache(config.text, 96, bits=2)
rounded = torch.cat(list(model.decode(model.read(**inputs, cache=packed), packed)))
print(f"every token in 2 bits, {packed.held_bytes:,} bytes: {processor.decode(rounded)}")

# %% [markdown]
# ## 20. A second question on the same cache
#
# The picture is not read again: `read` gets only the ids that are new. They see all that the cache holds, and one
# another. `fork` copies the cache, so that each question finds it as the first answer left it.

# %%
question = "How many objects are there?"
asked = processor(processor.chat([(question, None)], num_images=1), images=[image])
talk = model.new_cache(128, Cover(budget))
reply_ids = torch.cat(list(model.decode(model.read(**asked, cache=talk), talk)))  # [T]
known = torch.cat([asked["input_ids"][0], reply_ids[:-1]])  # the last token, which ends the answer, is not read yet
reply = processor.decode(reply_ids).strip()
print(f"{question} {reply}")
for second in ("Is there a red square?", "Where is the star?"):
    dialogue = processor(processor.chat([(question, reply), (second, None)], num_images=1), images=[image])["input_ids"]
    assert torch.equal(dialogue[0, : len(known)], known)  # else the conversation would have to be read again
    fresh, branch = dialogue[:, len(known) :], talk.fork()
    said = torch.cat(list(model.decode(model.read(fresh, branch), branch)))
    print(f"{second} {processor.decode(said).strip()} ({fresh.shape[1]} of {dialogue.shape[1]} tokens read)")
assert int(talk.lengths) == len(known)  # the forks have changed nothing
