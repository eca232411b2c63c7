"""How evenly the routers of a mixture of experts use their experts (arXiv:2101.03961, equations 4 to 6).

The loss is E sum_e f_e P_e: f_e is how often expert e is chosen per token, P_e its mean probability. A gradient passes
P_e alone, so that with f_e known beforehand the loss is a sum over tokens. As in transformers, experts are counted over
all layers together. Letters: L layers; T sampled tokens, at the positions that predict them; E experts.
"""

from typing import Any

import torch
from torch import Tensor

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.probes import probe_tokens


def routed_sums(model: Any, router_logits: tuple[Tensor, ...], places_T: Tensor) -> Tensor:
    """Of each expert, its probability and how often it is chosen; summed over tokens, mean over layers: [2, E]."""
    top_k = getattr(model, "num_experts_per_tok", None) or model.config.get_text_config().num_experts_per_tok
    logits_LTE = torch.stack([logits.flatten(0, -2).index_select(0, places_T) for logits in router_logits])
    probs_LTE = logits_LTE.float().softmax(-1)
    chosen_LTE = torch.zeros_like(probs_LTE).scatter(-1, probs_LTE.topk(top_k).indices, 1.0)
    return torch.stack([probs_LTE.sum(1), chosen_LTE.sum(1)]).mean(1)


def balance(probabilities_E: Tensor, per_token_E: Tensor) -> Tensor:
    """The loss; of probabilities that are summed over tokens, summed over tokens."""
    return len(per_token_E) * (per_token_E * probabilities_E).sum()


@torch.no_grad()
def check_routers(model: Any, coefficient: float) -> None:
    """Checks, on a few tokens, that this is the model's own loss.

    Raises:
        ConfigError: If it has none, or another: DeepSeek's models, for one, balance experts by a bias.
    """
    ids, own = torch.tensor([probe_tokens(16)], device=model.device), None
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        output = model(input_ids=ids, use_cache=False, output_router_logits=True)
        own = getattr(output, "aux_loss", None)
    if own:  # 0 where a model of such a class has no experts
        sums = routed_sums(model, output.router_logits, torch.arange(16, device=ids.device))
        own = torch.isclose(balance(*sums / 16), own, rtol=0.05)
    if not own:
        why = "has no such loss in transformers (it has no experts, or balances them in another way)"
        raise ConfigError(f"model.policy.router_aux_loss={coefficient}: {type(model).__name__} {why}: set it to 0")
