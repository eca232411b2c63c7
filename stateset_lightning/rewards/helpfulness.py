"""A cheap reward for helpful answers in English: word statistics, no model. Good for a first run."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from stateset_lightning.rewards import base
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, target_texts
from stateset_lightning.rewards.penalties import repeated_share, words

_FUNCTION_WORDS = frozenset(Path(__file__).with_name("function_words.txt").read_text().split())
# One a line. The phrases end with their clause: after the next punctuation mark an answer may begin.
_PHRASES = "|".join(Path(__file__).with_name("stock_phrases.txt").read_text().splitlines())
_ENDING = re.compile(r"((?<=...)(?<!s)s)?('s)?$")  # of a plural, and of a genitive
_STOCK_PHRASES = re.compile(rf"\b(?:{_PHRASES})[^.!?,:;\n]{{0,80}}")


@base.options
class HelpfulnessReward(RewardFunction):
    """How helpful an answer looks, from 0 to 1, by word statistics of English text.

    The score is a product, so an answer cannot make up for one missing part by another:

        (0.3 + 0.7 relevance) * informativeness * prose * (1 - stock) * (1 - repetition) * (1 - echo) * brevity

    * relevance: content words of the question (the last user turn) that the answer takes up; half of them, at most 5,
      are enough.
    * informativeness: n / (n + 1.5), where n counts the different content words that the question does not have.
      Echoing the question or stuffing its key words into the answer gives n = 0, hence a score of 0.
    * prose: share of function words (the, of, is), relative to the 20 % that any English sentence reaches; a bare list
      of words has few.
    * stock: share of the answer that is stock phrases ("Great question! I'd be happy to help."). They do not count as
      information.
    * repetition: share of word trigrams that occurred before. echo: share of words copied from the question in long
      runs.
    * brevity: 1 up to 300 words, then falling, so that padding costs.

    If the scenario has a `target`, the score is 0.4 times the above plus 0.6 times agreement: the share of the target's
    content words in the answer (of the best target in a list), cut by repetition, echo and brevity alike.

    It knows nothing about the truth and can be gamed by a policy that trains on it for long: prefer a target, a
    checkable answer or a judge wherever there is one. Its arguments are those of every reward.
    """

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        question = next((str(turn.get("content")) for turn in reversed(turns[:-1]) if turn.get("role") == "user"), "")
        asked, answer = words(question), completion(turns).casefold().replace("’", "'")
        all_words = words(answer)
        if not all_words:
            return RewardResult(0.0, {"empty": 1.0})
        said = words(_STOCK_PHRASES.sub(" ", answer))
        wanted, given = _content(asked), _content(said)
        needed, new = min(5, math.ceil(len(wanted) / 2)), len(given - wanted)
        num_function_words = sum(word in _FUNCTION_WORDS for word in said)
        parts = {
            "relevance": min(1.0, len(wanted & given) / needed) if needed else 1.0,
            "informativeness": new / (new + 1.5),
            "prose": min(1.0, num_function_words / (0.2 * len(said))) if len(said) > 3 else 1.0,  # too short to tell
            "stock": 1 - len(said) / len(all_words),
            "repetition": repeated_share(all_words, 3),
            "echo": _echo(asked, all_words),
            "brevity": min(1.0, 300 / len(all_words)),
        }
        honest = (1 - parts["repetition"]) * (1 - parts["echo"]) * parts["brevity"]
        useful = (0.3 + 0.7 * parts["relevance"]) * parts["informativeness"] * parts["prose"] * (1 - parts["stock"])
        score = useful * honest
        if (context or {}).get("target") is not None:
            targets = target_texts(context, self.name)
            parts["agreement"] = max(_agreement(words(target), all_words) for target in targets)
            score = 0.4 * score + 0.6 * parts["agreement"] * honest
        return RewardResult(score, parts)


def _content(tokens: Sequence[str]) -> set[str]:
    """The different content words: without `'s` and a plural's `s`, cut to six letters.

    So `explains` and `explained` count as one word.
    """
    kept = [token for token in tokens if token not in _FUNCTION_WORDS and (len(token) > 1 or token.isdigit())]
    return {_ENDING.sub("", token)[:6] for token in kept}


def _echo(asked: Sequence[str], answer: Sequence[str]) -> float:
    """Share of the answer's words that stand in runs copied from the question.

    A run has 6 words, or as many as the question has, but at least 3.
    """
    n = min(6, len(asked))
    if n < 3:
        return 0.0
    runs = {tuple(asked[i : i + n]) for i in range(len(asked) - n + 1)}
    starts = [i for i in range(len(answer) - n + 1) if tuple(answer[i : i + n]) in runs]
    return len({i + k for i in starts for k in range(n)}) / len(answer)


def _agreement(target: Sequence[str], answer: Sequence[str]) -> float:
    """Share of the target's content words (of all its words, if it has no content words) in the answer."""
    read = _content if _content(target) else set
    return len(read(target) & read(answer)) / len(read(target)) if target else 0.0
