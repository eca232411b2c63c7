"""A candidate for decoding on a GPU: a whole decoding step, sampling included, as one CUDA graph.

Rows are left-aligned in a cache of fixed size. Where a row ends is a tensor on the device, so a captured step stays
valid while rows grow. Attention is PyTorch's flash kernel with `seqused_k`. Noise is counted as in `InProcessEngine`,
so tokens are the same. The host looks every `look_every` steps whether all rows have finished. A prototype for timing:
layers of Llama, Mistral, Qwen2 and Qwen3, all rows at once. Letters: B rows, C capacity of the cache in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.rollout.sampling import sample_tokens
from stateset_lightning.seeding import uniforms

PREFILL_TOKENS = 16_384


class GraphDecoder:
    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int],
        end_tokens: Iterable[int],
    ) -> None:
        self.model, self.sampling = model, sampling
        device, dtype, config = model.device, model.dtype, model.config
        self.layers = list(model.model.layers)
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.rows = len(prompts) * num_generations
        self.capacity = max(map(len, prompts)) + sampling.max_new_tokens
        shape = (self.rows, self.capacity, self.key_heads, self.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers]
        lengths = [len(prompt) for prompt in prompts for _ in range(num_generations)]
        self.lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.first_slot_B = torch.arange(self.rows, device=device) * self.capacity
        self.query_ends = torch.arange(self.rows + 1, dtype=torch.int32, device=device)
        self.key_ends = self.query_ends * self.capacity
        self.end_tokens = torch.tensor(sorted(end_tokens), device=device)
        self.noise_BT = torch.from_numpy(uniforms(list(seeds_N), sampling.max_new_tokens)).to(device)
        self.tokens_BT = torch.zeros(self.rows, sampling.max_new_tokens, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros(self.rows, sampling.max_new_tokens, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.finished_B = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.ends_B = torch.full((self.rows,), sampling.max_new_tokens, dtype=torch.long, device=device)
        positions = torch.arange(self.capacity, device=device)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1, dtype=dtype, device=device), positions)
        self.cos_C, self.sin_C = cos[0].to(dtype), sin[0].to(dtype)
        self.logits_BV = self._prefill(prompts, num_generations)

    def _prefill(self, prompts: list[list[int]], num_generations: int) -> Tensor:
        """Fills the cache, each prompt computed once; logits of the first token, [B, V]."""
        width, device = max(map(len, prompts)), self.model.device
        logits = []
        share = max(1, PREFILL_TOKENS // width)
        for start in range(0, len(prompts), share):
            some = prompts[start : start + share]
            # Padded on the right, where causal attention never looks.
            ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in some], device=device)
            cache = DynamicCache(config=self.model.config)
            hidden = self.model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            last = torch.tensor([len(prompt) - 1 for prompt in some], device=device)
            logits.append(self.model.lm_head(hidden[torch.arange(len(some), device=device), last]))
            rows = slice(start * num_generations, (start + len(some)) * num_generations)
            for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
                keys[rows, :width] = layer.keys.transpose(1, 2).repeat_interleave(num_generations, 0)
                values[rows, :width] = layer.values.transpose(1, 2).repeat_interleave(num_generations, 0)
        return torch.cat(logits).repeat_interleave(num_generations, 0).float()

    def _attend(self, q: Tensor, layer: int) -> Tensor:
        """Query [B, heads, d] to the row's keys so far, itself included."""
        scale = self.head_dim**-0.5
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            flat = (-1, self.key_heads, self.head_dim)
            ends = (self.query_ends, self.key_ends, 1, self.capacity)
            keys, values = self.keys[layer].view(flat), self.values[layer].view(flat)
            return torch.ops.aten._flash_attention_forward(
                q, keys, values, *ends, 0.0, False, False, scale=scale, seqused_k=self.lengths_B + 1
            )[0]
        mask = torch.arange(self.capacity, device=q.device) <= self.lengths_B[:, None]
        keys, values = (x[layer].transpose(1, 2) for x in (self.keys, self.values))
        return F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=mask[:, None, None], scale=scale, enable_gqa=True
        )[:, :, 0]

    def sample(self) -> None:
        place = self.count.expand(self.rows)[:, None]
        tokens_B, logprobs_B = sample_tokens(self.logits_BV, self.noise_BT.gather(1, place)[:, 0], self.sampling)
        self.tokens_BT.scatter_(1, place, tokens_B[:, None])
        self.logprobs_BT.scatter_(1, place, logprobs_B[:, None])
        self.count += 1
        ended_B = torch.isin(tokens_B, self.end_tokens) & ~self.finished_B
        self.ends_B.copy_(torch.where(ended_B, self.count, self.ends_B))
        self.finished_B |= ended_B
        self.tokens_B = tokens_B

    def forward(self) -> None:
        """Logits after the sampled tokens, whose keys and values go into the cache."""
        positions_B = self.lengths_B.long()
        cos, sin = self.cos_C[positions_B][:, None], self.sin_C[positions_B][:, None]
        slots_B = self.first_slot_B + positions_B

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        x = self.model.model.embed_tokens(self.tokens_B)
        for n, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            h = _norm(x, layer.input_layernorm)
            q = attention.q_proj(h).view(self.rows, self.heads, self.head_dim)
            k = attention.k_proj(h).view(self.rows, self.key_heads, self.head_dim)
            v = attention.v_proj(h).view(self.rows, self.key_heads, self.head_dim)
            if hasattr(attention, "q_norm"):
                q, k = _norm(q, attention.q_norm), _norm(k, attention.k_norm)
            flat = (-1, self.key_heads, self.head_dim)
            self.keys[n].view(flat).index_copy_(0, slots_B, rotated(k))
            self.values[n].view(flat).index_copy_(0, slots_B, v)
            x = x + attention.o_proj(self._attend(rotated(q), n).reshape(self.rows, -1))
            h = _norm(x, layer.post_attention_layernorm)
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        self.logits_BV.copy_(self.model.lm_head(_norm(x, self.model.model.norm)))
        self.lengths_B.copy_((self.lengths_B + 1).clamp(max=self.capacity - 1))

    def step(self) -> None:
        self.sample()
        self.forward()

    def _captured_step(self) -> Callable[[], None]:
        """Two steps to warm up, then the graph of one; capturing computes nothing."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    @torch.inference_mode()
    def run(self, graph: bool = True, look_every: int = 16) -> tuple[list[list[int]], Tensor]:
        """Tokens of each row, and log-probs [B, T], of which a row's first ones count."""
        step, done = self.step, 0
        if graph and self.model.device.type == "cuda":
            step, done = self._captured_step(), 2
        while done < self.sampling.max_new_tokens - 1:
            step()
            done += 1
            if done % look_every == 0 and bool(self.finished_B.all()):
                break
        if int(self.count) < self.sampling.max_new_tokens:
            self.sample()
        rows = zip(self.tokens_BT.tolist(), self.ends_B.tolist(), strict=True)
        return [tokens[:end] for tokens, end in rows], self.logprobs_BT


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
