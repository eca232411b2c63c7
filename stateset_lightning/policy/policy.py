"""The policy: a causal language model that scores completions, and chooses by itself how to do so cheaply.

Two paths give the same log-probs. `packed` computes each prompt once per group and pads nothing; `padded` has a row per
completion with its prompt repeated, and works for every architecture. A probe compares the two when the policy is made:
`packed` is used where it is exact; where it is not, a warning gives the reason. Letters: T sampled tokens of all
completions, packed; H hidden size; B rows of S tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from stateset_lightning.errors import ConfigError, log
from stateset_lightning.policy import lora, packed_attention, probes
from stateset_lightning.policy.config import PolicyConfig
from stateset_lightning.policy.head import Comparison, capped, head_of, softcap, token_logprobs, uploaded
from stateset_lightning.policy.lora_state import AdapterState, base_digest, keep_only_in_state_dict
from stateset_lightning.policy.recomputed_layers import use_recomputed_layers
from stateset_lightning.policy.routing import check_routers, routed_sums
from stateset_lightning.policy.sampling_mask import SamplingMask
from stateset_lightning.policy.text_model import context_length, use_one_rope_table
from stateset_lightning.ranks import Ranks

# Of the prompts and their completions in the probe: on both sides of every threshold of a twin, 64 tokens together.
PROBE_LENGTHS = ((21, (12, 5)), (13, (7,)), (3, (2, 1)))
# Tokens of a forward pass that keeps nothing for a backward pass: enough to occupy a CPU, or a GPU.
TOKENS_WITHOUT_GRADIENT = {"cpu": 16_384, "cuda": 65_536}


@dataclass(frozen=True)
class Group:
    """A prompt and some of its completions, as token ids.

    Args:
        prompt: At least one token.
        completions: Each has at least one token.
        sampled: Of each completion, which of its tokens the policy sampled; only these are scored. None: all of them.
        mask: Of the sampled tokens of all completions: they are scored as drawn from what it keeps alone.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    sampled: Sequence[Sequence[bool]] | None = None
    mask: SamplingMask | None = None

    def __post_init__(self) -> None:
        assert self.sampled is None or list(map(len, self.sampled)) == list(map(len, self.completions))

    @property
    def num_completion_tokens(self) -> int:
        """All tokens of the completions."""
        return sum(map(len, self.completions))

    @property
    def sampled_places(self) -> list[Sequence[int]]:
        """Of each completion, at which of its places the sampled tokens stand, from 0."""
        places: list[Sequence[int]] = [range(len(completion)) for completion in self.completions]
        if self.sampled is None:
            return places
        return [list(compress(*pair)) for pair in zip(places, self.sampled, strict=True)]


class Policy(nn.Module):
    """A causal language model with the one operation that training needs: `score`.

    Args:
        model: The language model; any that transformers loads.
        config: How it scores. `scoring` "packed" is an error where it is not exact.

    Attributes:
        has_dropout: Whether training uses any dropout.
        context_length: See the function of this name.
        longest: Tokens of the longest sequence that it is prepared for; 0 as long as that is not known.
        adapter: State of the low-rank adapter; None without one.
        base_digest: Of the weights as they were loaded, without an adapter's.
        uses_packed_scoring: Whether each prompt is computed once per group.
        scores_alone: Whether each completion has a forward of its own, as a model's rows are not independent.
        uses_chunked_head: Whether logits exist for a chunk of tokens at a time only.
        fingerprint_of_shards: Of the weights of all ranks, where each has a part and servers sample; else None.
        routed: With `router_aux_loss`, the `routed_sums` of all forwards since it was last set to 0.
    """

    def __init__(self, model: PreTrainedModel, config: PolicyConfig, role: str = "policy") -> None:
        super().__init__()
        # cuDNN plans attention anew for each shape, which takes it seconds, and every episode has new ones.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model, self.config, self.has_dropout = model, config, config.has_dropout
        self.context_length = context_length(model)
        self.longest = 0
        self.fingerprint_of_shards: list[int] | None = None
        self.adapter = AdapterState(model, config) if lora.is_adapted(model) else None
        self.base_digest = base_digest(model) if self.adapter is None else self.adapter.base["digest"]
        if self.adapter is not None:
            keep_only_in_state_dict(self, [f"model.{name}" for name in self.adapter.names])
        use_recomputed_layers(model)
        self.softcap = softcap(model.config.get_text_config())
        self.routed: Any = 0
        self.scores_alone = self.uses_chunked_head = True  # while the head is compared
        self.uses_chunked_head = self._probe_head()
        if config.router_aux_loss:
            check_routers(model, config.router_aux_loss)
        self.scores_alone = False
        self.uses_packed_scoring = config.scoring != "padded" and self._probe_packed()
        self.scores_alone = not self.uses_packed_scoring and self._probe_padded()
        dtype = str(model.dtype).removeprefix("torch.")
        size = f"{model.num_parameters():,} parameters"
        if self.adapter is not None:
            size += f" ({model.num_parameters(only_trainable=True):,} of them an adapter, trained)"
        log.info("%s: %s, %s, %s, %s scoring", role, config.model_name, size, dtype, self.scoring)

    @property
    def scoring(self) -> str:
        """How log-probs are computed: "packed", "padded", or "one-by-one"."""
        return "packed" if self.uses_packed_scoring else "one-by-one" if self.scores_alone else "padded"

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train(self, mode: bool = True) -> Self:
        """As of any module; but routers that add noise while they are trained choose experts as in sampling."""
        super().train(mode)
        for module in self.model.modules():
            module.training &= not any("jitter" in key for key in vars(module))
        return self

    def prepare_for(self, longest: int) -> None:
        """Has rotary frequencies that depend on the length be those of the run's longest sequence (announced)."""
        if longest and use_one_rope_table(self.model, longest) and longest != self.longest:
            told = "%s chooses rotary frequencies by the length: this run uses those of %d tokens, its longest prompt"
            log.info(told + " and max_new_tokens, for all sequences", self.config.model_name, longest)
        self.longest = longest

    def merged_adapter(self) -> AbstractContextManager[None]:
        """For sampling: an adapter added into copies of the weights while the context lasts (`lora.merged_adapter`)."""
        return nullcontext() if self.adapter is None else lora.merged_adapter(self.model)

    def score(
        self, groups: Sequence[Group], temperature: float = 1.0, comparison: Comparison | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probs and entropies (nats, float32 [T]) of the sampled tokens, completion by completion; differentiable.

        Log-probs are those of the logits divided by `temperature`, before any top-k, top-p or min-p; where groups have
        a mask, over what it keeps. Third come divergences, where there is a comparison.
        """
        rows = [row for group in groups for row in zip(group.completions, group.sampled_places, strict=True)]
        targets_T = self._ids([completion[place] for completion, places in rows for place in places])
        masks = [group.mask for group in groups if group.mask is not None]
        mask = SamplingMask.cat(masks) if masks else None
        outputs_TX = self.outputs(groups)
        if not self.uses_chunked_head:
            logits = outputs_TX.float() / temperature
            divergences = () if comparison is None else (comparison(logits, slice(None))[0],)
            logps = (logits if mask is None else mask.exclude(logits)).log_softmax(-1)
            return logps.gather(-1, targets_T[:, None])[:, 0], -(logps.exp() * logps).sum(-1), *divergences
        weight_VH, bias_V, options = head_of(self, temperature, mask, comparison)
        return token_logprobs(outputs_TX, weight_VH, bias_V, targets_T, options)

    def outputs(self, groups: Sequence[Group]) -> Tensor:
        """Of the places that predict sampled tokens: hidden states [T, H], or logits without a chunked head."""
        return (self._packed if self.uses_packed_scoring else self._padded)(groups)

    @torch.no_grad()
    def score_without_gradient(self, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `score`, some groups at a time and without dropout: for old log-probs and for the reference."""
        training = self.model.training
        self.eval()
        try:
            batches = _batches(groups, TOKENS_WITHOUT_GRADIENT.get(self.device.type, TOKENS_WITHOUT_GRADIENT["cpu"]))
            # Each forward of shards takes all ranks: those with fewer batches go on with what nobody asked for.
            rounds = max(Ranks.current().gather(len(batches))) if isinstance(self, FSDPModule) else 0
            scores = [self.score(batch, temperature) for batch in batches]
            routed = self.routed
            for _ in range(rounds - len(batches)):
                self.score([Group([0], [[0]])])
            self.routed = routed
        finally:
            self.train(training)
        if not scores:
            return torch.empty(0), torch.empty(0)
        logprobs, entropies = zip(*scores, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _packed(self, groups: Sequence[Group]) -> Tensor:
        """Outputs at the positions that predict sampled tokens, each prompt computed once: [T, H]."""
        ids, positions, sources = list[int](), list[int](), list[int]()
        for group in groups:
            ids += group.prompt
            positions += range(len(group.prompt))
            last = len(ids) - 1
            for completion, places in zip(group.completions, group.sampled_places, strict=True):
                # The prompt's last position predicts a completion's first token; each of its tokens predicts the next.
                sources += [len(ids) - 1 + place if place else last for place in places]
                ids += completion
                positions += range(len(group.prompt), len(group.prompt) + len(completion))
        lengths = [[len(completion) for completion in group.completions] for group in groups]
        layout = packed_attention.Layout([len(group.prompt) for group in groups], lengths, self.device)
        arguments = packed_attention.arguments(layout, self.device)
        return self._forward(self._ids(ids)[None], sources, position_ids=self._ids(positions)[None], **arguments)

    def _padded(self, groups: Sequence[Group]) -> Tensor:
        """The same from one row per completion, padded on the right, where causal attention never looks."""
        parts = [(g.prompt, *part) for g in groups for part in zip(g.completions, g.sampled_places, strict=True)]
        rows = [(len(prompt), [*prompt, *completion], places) for prompt, completion, places in parts]
        return torch.cat([self._rows([row]) for row in rows]) if self.scores_alone else self._rows(rows)

    def _rows(self, rows: Sequence[tuple[int, list[int], Sequence[int]]]) -> Tensor:
        """Outputs of (length of the prompt, all tokens, places of the sampled ones) that stand in one batch."""
        width = max(len(ids) for _, ids, _ in rows)
        input_ids = self._ids([ids + [0] * (width - len(ids)) for _, ids, _ in rows])
        # Positions are the model's own business where it is not known to count them from 0 (RoBERTa's begin at 2).
        positions = torch.arange(width, device=self.device).expand(len(rows), -1)
        sources = [i * width + prompt - 1 + place for i, (prompt, _, places) in enumerate(rows) for place in places]
        return self._forward(input_ids, sources, **({} if self.scores_alone else {"position_ids": positions}))

    def _forward(self, input_ids: Tensor, sources: Sequence[int], **arguments: Any) -> Tensor:
        """Hidden states at some places [T, H], or logits [T, V] of a model whose head is not a plain linear layer."""
        model, places_T = self.model.base_model if self.uses_chunked_head else self.model, self._ids(sources)
        if self.config.router_aux_loss:
            arguments["output_router_logits"] = True
        output = model(input_ids=input_ids, use_cache=False, **arguments)
        if self.config.router_aux_loss:
            self.routed = self.routed + routed_sums(self.model, output.router_logits, places_T)
        outputs = output.last_hidden_state if self.uses_chunked_head else output.logits
        return outputs.flatten(0, 1).index_select(0, places_T)

    def _ids(self, values: Sequence[Any]) -> Tensor:
        return uploaded(torch.tensor(values, dtype=torch.long), self.device)

    @torch.no_grad()
    def _probe_head(self) -> bool:
        """Whether the model's logits are its output embedding applied to its last hidden states (and a soft cap)."""
        head, name = self.model.get_output_embeddings(), self.config.model_name
        reason: str | None = "it has no output embedding"
        if head is not None and not set(dict(head.named_parameters())) <= {"weight", "bias"}:
            # A new adapter changes nothing yet, so the comparison below would not notice it.
            reason = "its output embedding is adapted"
        elif self.model.base_model is self.model:
            reason = "it has no body without its output embedding"
        elif head is not None:
            reason = probes.exact_on(self.model, "head", partial(self._compare_with_own, self._padded))
            if reason is None:
                return True
        probes.check_own_forward(self.model, name)
        if self.config.head_dtype == "float32":
            raise ConfigError(f"model.policy.head_dtype='float32' is not possible for {name}: {reason}; leave it out")
        log.warning("%s is scored with all logits in memory: %s.", name, reason)
        return False

    @torch.no_grad()
    def _probe_packed(self) -> bool:
        """Whether packed scoring gives the padded path's log-probs; switches the model's attention if so."""
        # Ours already, if the model has had a policy before; "eager" where transformers has nothing else (Gemma 2's
        # soft caps, gpt-oss's sinks).
        previous, known = self.model.config.get_text_config()._attn_implementation, ["sdpa", packed_attention.NAME]
        reason: str | None = f"its attention is {previous!r}, not 'sdpa'"
        if previous in (known if self.model._supports_sdpa else [*known, "eager"]):
            packed_attention.register()
            self.model.set_attn_implementation(packed_attention.NAME)
            compare = partial(self._compare_with_own, self._packed, attention=previous)
            reason = probes.exact_on(self.model, "packed", compare)
            if reason is None:
                return True
            self.model.set_attn_implementation(previous)
        name = self.config.model_name
        if self.config.scoring == "packed":
            raise ConfigError(f"model.policy.scoring='packed' is not exact for {name}: {reason}; use auto or padded")
        log.warning("%s is scored a row per completion, prompt repeated: %s.", name, reason)
        return False

    def _probe_padded(self) -> bool:
        """Whether completions must be scored one by one, as padding or a neighbour changes their log-probs."""
        name = self.config.model_name
        reason = probes.exact_on(self.model, "padded", partial(self._compare_with_own, self._padded))
        if reason is not None and probes.sees_ahead(self.model):
            remedy = "set `is_decoder` to true in its config.json if it has this key, or choose another model"
            raise ConfigError(f"{name} is no causal language model: its tokens see those behind them; {remedy}")
        if reason is not None:
            log.warning("%s is scored a completion at a time: %s.", name, reason)
        return reason is not None

    def _compare_with_own(
        self, path: Callable[[Sequence[Group]], Tensor], model: PreTrainedModel, attention: str | None = None
    ) -> float:
        """The largest difference in nats between a path and the forward of one row, in a small ragged batch.

        Our attention is compared with the one that the model has otherwise.
        """
        if attention is not None:
            model.set_attn_implementation(attention)
        draw = probes.probe_tokens
        groups = [Group(draw(n, n), [draw(m, m) for m in lengths]) for n, lengths in PROBE_LENGTHS]
        rows = [(group.prompt, completion) for group in groups for completion in group.completions]
        expected = [probes.own_logprobs(model, [*prompt, *row])[len(prompt) - 1 : -1] for prompt, row in rows]
        if attention is not None:
            model.set_attn_implementation(packed_attention.NAME)
        policys, self.model = self.model, model
        try:
            outputs = path(groups)
        finally:
            self.model = policys
        if self.uses_chunked_head:
            outputs = capped(model.get_output_embeddings()(outputs).float(), self.softcap)
        return float((outputs.float().log_softmax(-1) - torch.cat(expected)).abs().max())


def _batches(groups: Sequence[Group], most: int) -> list[list[Group]]:
    """Groups in order, as many together as stay below this many tokens in padded rows; at least one."""
    batches: list[list[Group]] = []
    tokens = most
    for group in groups:
        size = len(group.completions) * (len(group.prompt) + max(map(len, group.completions)))
        if tokens + size > most:
            batches.append([])
            tokens = 0
        batches[-1].append(group)
        tokens += size
    return batches
