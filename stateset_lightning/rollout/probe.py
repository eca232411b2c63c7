"""Whether a way of decoding gives the model's own log-probs, tried on a few short prompts; and the slowest way."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from stateset_lightning.errors import ConfigError, log
from stateset_lightning.policy.probes import check_own_forward, exact_on, own_logprobs, probe_tokens
from stateset_lightning.rollout.cpu_decoding import LlamaDecoder
from stateset_lightning.rollout.cuda_decoding import WITH_GRAPHS, GraphBatch, obstacle_to_graph
from stateset_lightning.rollout.running_batch import RunningBatch

# Rows [B, S] and their logits [B, V] -> the answer.
Hook = Callable[[Tensor, Tensor], Tensor]

# A kind of batch, and whether a `LlamaDecoder` makes its steps; or None for transformers' own decoding, and whether
# with a cache.
Kind = type[RunningBatch | GraphBatch]
Way = tuple[Kind | None, bool]


def exact_way(model: PreTrainedModel, name: str, kinds: Sequence[Kind], decodes: bool) -> Way:
    """The fastest way of decoding that gives the model's own log-probs; announced where it is not the first one.

    Args:
        model: That samples.
        name: What the announcement calls it.
        kinds: Of batches, the fastest first.
        decodes: Whether `LlamaDecoder` knows the model.

    Raises:
        ConfigError: If not even the model's own forward can be relied on; or the one kind that there is cannot.
    """
    decoders = [True, False] if decodes else [False]
    own: list[Way] = [(kind, fast) for kind in kinds for fast in decoders if not (fast and kind is GraphBatch)]
    obstacle: str | None = None
    for kind, is_fast in [*own, (None, True)]:
        difference = difference_of_cache if kind is None else partial(difference_of_decoding, kind, decodes=is_fast)
        reason = obstacle_to_graph(model) if kind is GraphBatch else None
        reason = reason or exact_on(model, f"{kind} {is_fast}", difference)
        if reason is None:
            break
        if own == [(GraphBatch, False)]:
            raise ConfigError(f"model.rollout.decoding='graph' cannot decode {name}: {reason}; set it to auto or eager")
        obstacle = reason
    else:
        check_own_forward(model, name)
        kind, is_fast = None, False
    if obstacle is not None:
        taken = f"without {kinds[0].gain}" if kind in kinds[1:] else "by its own forward"
        if kind is None:
            taken = "by transformers' own decoding" if is_fast else "without a cache, a whole forward per token"
        log.warning("%s is sampled %s, which is slower: %s.", name, taken, obstacle)
    elif kind is GraphBatch and model.device.type in WITH_GRAPHS:
        log.info("%s is sampled by a CUDA graph of each step (model.rollout.decoding=eager does without).", name)
    return kind, is_fast


def decode_plainly(
    model: PreTrainedModel, ids: Tensor, max_new_tokens: int, use_cache: bool, logits_processor: Hook, stop: Hook
) -> Tensor:
    """The rows with what is added to them by transformers' `generate`, or by the model's forward alone.

    Args:
        model: Any that generates.
        ids: Rows [B, S] of one prompt length.
        max_new_tokens: Of each row.
        use_cache: False computes each row anew for each token, and leaves positions to the model, too.
        logits_processor: Gets rows and logits, and returns the logits whose largest is the next token.
        stop: Says after each token, for each row, whether this was the last one.
    """
    if not use_cache:
        for _ in range(max_new_tokens):
            logits = logits_processor(ids, model(input_ids=ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=-1)
            if stop(ids, logits).all():
                break
        return ids
    models = model.generation_config
    # In place of the model's own, whose penalties and suppressed tokens would change the samples.
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    hooks = {"logits_processor": [logits_processor], "stopping_criteria": [stop]}
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **hooks)
    finally:
        model.generation_config = models


def difference_of_cache(model: PreTrainedModel) -> float:
    """As `difference_of_decoding`, of transformers' own decoding with a cache."""
    seen: list[Tensor] = []

    def note(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits[0].float().log_softmax(-1))
        return logits

    prompt = probe_tokens(13)
    never = torch.zeros(2, dtype=torch.bool, device=model.device)
    ids = torch.tensor([prompt, prompt], device=model.device)
    rows = decode_plainly(model, ids, 12, True, note, lambda *_: never)
    expected = own_logprobs(model, rows[0].tolist())[len(prompt) - 1 : -1]
    return float((torch.stack(seen) - expected).abs().max())


def difference_of_decoding(kind: Kind, model: PreTrainedModel, *, decodes: bool) -> float:
    """The largest difference of a log-prob, in nats, between a batch and the model's own forward of each row.

    Rows of prompts of three lengths are admitted at two times, decoded and dropped, and go on from parts of themselves:
    all that a batch can do, on both sides of every threshold of a twin.

    Args:
        kind: Of the batch.
        model: The real one, or its twin.
        decodes: Whether a `LlamaDecoder` makes the steps.
    """
    decoder = LlamaDecoder(model) if decodes else None
    batch = kind(model, 24, decoder)
    rows: list[list[int]] = []
    seen: list[tuple[list[int], Tensor]] = []  # rows, and the log-probs behind them
    for lengths, steps in (((13, 3), 6), ((21,), 9)):
        prompts = [probe_tokens(n, n) for n in lengths]
        batch.admit(prompts, [p for p in range(len(prompts)) for _ in range(2)])
        rows += [list(prompt) for prompt in prompts for _ in range(2)]
        tokens_B = torch.empty(len(rows), dtype=torch.long, device=model.device)
        for step in range(steps):
            tokens = probe_tokens(len(rows), 7 * step)
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            batch.repeat(partial(batch.step, tokens_B.copy_(torch.tensor(tokens))), 1)
            if step == 2:
                kept = torch.arange(0, len(rows), 2, device=model.device)
                batch.keep(kept)
                rows, tokens_B = rows[::2], tokens_B[kept]
        seen += zip(map(list, rows), batch.logits_BV.float().log_softmax(-1), strict=True)
    if batch.can_keep:
        before = [batch.kept(i, len(row) - 1 - 5 * i) for i, row in enumerate(rows)]
        batch = kind(model, 24, decoder)
        batch.resume(before, rows)
        seen += zip(rows, batch.logits_BV.float().log_softmax(-1), strict=True)
    return max(float((logprobs_V - own_logprobs(model, row)[-1]).abs().max()) for row, logprobs_V in seen)
